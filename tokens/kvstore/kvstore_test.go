package kvstore_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/certmagic"
	"go.uber.org/goleak"

	"github.com/caddy-wechat/caddy-wechat/tokens"
	"github.com/caddy-wechat/caddy-wechat/tokens/kvstore"
	"github.com/caddy-wechat/caddy-wechat/tokens/storetest"
)

func TestMain(m *testing.M) {
	// The file storage's heartbeat of a lock sleeps up to five seconds after the lock is gone.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/caddyserver/certmagic.keepLockfileFresh"))
}

func TestConformanceMemoryKV(t *testing.T) {
	t.Parallel()
	storetest.Run(t, func() tokens.Store { return kvstore.New(newMemKV()) })
}

func TestConformanceFileStorage(t *testing.T) {
	t.Parallel()
	storetest.Run(t, func() tokens.Store {
		return kvstore.New(&certmagic.FileStorage{Path: t.TempDir()})
	})
}

func TestFilesArePrivateAndTemporaryOnesNotListed(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := kvstore.New(&certmagic.FileStorage{Path: dir})
	if err := s.Store(t.Context(), "wechat/v1/intent/ab", []byte("secret")); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "wechat", "v1", "intent", "ab")
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 {
		t.Errorf("mode of a record: %v, want 0600", info.Mode().Perm())
	}
	for _, stray := range []string{".tmp-ab123", "ab.tmp", "x_zz", "x_6162"} { // the last is a plain name in hex: not ours
		if err := os.WriteFile(filepath.Join(filepath.Dir(file), stray), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	names, err := s.List(t.Context(), "wechat/v1/intent")
	if err != nil || len(names) != 1 || names[0] != "wechat/v1/intent/ab" {
		t.Errorf("List = %q, %v; want the one record", names, err)
	}
}

func TestHangingStorageEndsAtTheDeadline(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		kv := newMemKV()
		kv.hang = make(chan struct{})
		s := kvstore.New(kv)
		operations := map[string]func() error{
			"load":   func() error { _, err := s.Load(t.Context(), "wechat/v1/a"); return err },
			"store":  func() error { return s.Store(t.Context(), "wechat/v1/b", []byte("x")) },
			"delete": func() error { return s.Delete(t.Context(), "wechat/v1/c") },
			"list":   func() error { _, err := s.List(t.Context(), "wechat/v1"); return err },
		}
		for name, operation := range operations {
			start := time.Now()
			if err := operation(); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s: %v, want a deadline", name, err)
			}
			if took := time.Since(start); took != kvstore.Timeout {
				t.Errorf("%s took %v, want %v", name, took, kvstore.Timeout)
			}
		}
		start := time.Now()
		if _, err := s.Lock(t.Context(), "wechat/v1/a"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("lock: %v, want a deadline", err)
		}
		if took := time.Since(start); took > time.Minute {
			t.Errorf("lock without a deadline of the caller took %v", took)
		}
		close(kv.hang)
	})
}

// A write that was given up on may still reach the storage: a later one must not be overtaken by it.
func TestLateWriteDoesNotUndoALaterOne(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		kv := newMemKV()
		kv.hang = make(chan struct{})
		s := kvstore.New(kv)
		if err := s.Store(t.Context(), "wechat/v1/a", []byte("generation 1")); err == nil {
			t.Fatal("the first write did not hang")
		}
		if err := s.Store(t.Context(), "wechat/v1/a", []byte("generation 2")); err == nil {
			t.Fatal("a second write went ahead while the first may still take effect")
		}
		close(kv.hang)
		synctest.Wait()
		if err := s.Store(t.Context(), "wechat/v1/a", []byte("generation 3")); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if got, _ := s.Load(t.Context(), "wechat/v1/a"); string(got) != "generation 3" {
			t.Errorf("holds %q", got)
		}
	})
}

// Who gave up on a write may do with the value what he likes.
func TestLateWriteHasTheValueAsItWas(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		kv := &lateKV{memKV: newMemKV(), late: make(chan struct{})}
		s := kvstore.New(kv)
		value := []byte("as it was")
		if err := s.Store(t.Context(), "wechat/v1/a", value); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("%v, want a deadline", err)
		}
		clear(value)
		close(kv.late)
		synctest.Wait()
		if got, err := s.Load(t.Context(), "wechat/v1/a"); string(got) != "as it was" {
			t.Errorf("holds %q, %v", got, err)
		}
	})
}

// A KV may give the keys of deeper folders, too.
func TestListNamesNothingOfDeeperFolders(t *testing.T) {
	t.Parallel()
	s := kvstore.New(newMemKV())
	for _, name := range []string{"wechat/v1/a", "wechat/v1/intent/b"} {
		if err := s.Store(t.Context(), name, []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	if names, err := s.List(t.Context(), "wechat/v1"); err != nil || len(names) != 1 || names[0] != "wechat/v1/a" {
		t.Errorf("List = %q, %v; want the one record", names, err)
	}
}

// A write that was given up on keeps the lock that it was made under, or another process would write in between.
func TestLockIsKeptForALateWrite(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(s *kvstore.Store) error{
		"store":  func(s *kvstore.Store) error { return s.Store(context.Background(), "wechat/v1/a", []byte("late")) },
		"delete": func(s *kvstore.Store) error { return s.Delete(context.Background(), "wechat/v1/a") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				kv := &lateKV{memKV: newMemKV(), late: make(chan struct{})}
				s, other := kvstore.New(kv), kvstore.New(kv.memKV)
				unlock, err := s.Lock(t.Context(), "wechat/v1/a")
				if err != nil {
					t.Fatal(err)
				}
				if err := change(s); !errors.Is(err, context.DeadlineExceeded) {
					t.Fatalf("%v, want a deadline", err)
				}
				start := time.Now()
				unlock()
				unlock()
				if took := time.Since(start); took != 0 {
					t.Errorf("unlocking took %v", took)
				}
				wait, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				if _, err := other.Lock(wait, "wechat/v1/a"); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("another process gets the lock while the write may still take effect: %v", err)
				}
				synctest.Wait()
				free, err := s.Lock(t.Context(), "wechat/v1/b") // that of another record is none of its business
				if err != nil {
					t.Fatal(err)
				}
				free()
				close(kv.late)
				synctest.Wait()
				if held := kv.held(); held != 0 {
					t.Fatalf("%d locks are held after the write has ended", held)
				}
				unlock, err = other.Lock(t.Context(), "wechat/v1/a")
				if err != nil {
					t.Fatal(err)
				}
				defer unlock()
				if err := other.Store(t.Context(), "wechat/v1/a", []byte("later")); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				if got, err := other.Load(t.Context(), "wechat/v1/a"); string(got) != "later" {
					t.Errorf("holds %q, %v", got, err)
				}
			})
		})
	}
}

// lateKV is a KV whose changes of records take effect late.
type lateKV struct {
	*memKV
	late chan struct{} // they wait until it is closed
}

func (kv *lateKV) Store(ctx context.Context, key string, value []byte) error {
	<-kv.late
	return kv.memKV.Store(ctx, key, value)
}

func (kv *lateKV) Delete(ctx context.Context, key string) error {
	<-kv.late
	return kv.memKV.Delete(ctx, key)
}

func TestHangingOperationsAreBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		kv := newMemKV()
		kv.hang = make(chan struct{})
		s := kvstore.New(kv)
		var wg sync.WaitGroup
		for range 200 {
			wg.Go(func() {
				if _, err := s.Load(t.Context(), "wechat/v1/a"); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("Load: %v", err)
				}
			})
		}
		wg.Wait()
		if n := kv.calls(); n > 64 {
			t.Errorf("%d operations reached a storage that hangs", n)
		}
		start := time.Now()
		err := s.Store(t.Context(), "wechat/v1/b", []byte("never started"))
		if err == nil || time.Since(start) != kvstore.Timeout {
			t.Errorf("Store on a full store: %v after %v", err, time.Since(start))
		}
		close(kv.hang)
		synctest.Wait()
		if err := s.Store(t.Context(), "wechat/v1/b", []byte("x")); err != nil {
			t.Errorf("after the storage recovered: %v", err)
		}
	})
}

func TestLockGrantedTooLateIsGivenBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		kv := newMemKV()
		kv.hang = make(chan struct{})
		s := kvstore.New(kv)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := s.Lock(ctx, "wechat/v1/a"); err == nil {
			t.Fatal("lock on a hanging storage")
		}
		close(kv.hang)
		synctest.Wait()
		if held := kv.held(); held != 0 {
			t.Errorf("%d locks are held by nobody", held)
		}
	})
}

func TestUnlockIsTriedAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		kv := newMemKV()
		s := kvstore.New(kv)
		unlock, err := s.Lock(t.Context(), "wechat/v1/a")
		if err != nil {
			t.Fatal(err)
		}
		kv.failUnlocks(2)
		start := time.Now()
		unlock()
		if took := time.Since(start); took < 2*time.Second {
			t.Errorf("a storage that fails for a moment is asked three times within %v", took)
		}
		time.Sleep(10 * time.Second) // in the bubble
		if held := kv.held(); held != 0 {
			t.Errorf("%d locks left", held)
		}
	})
}

func TestPanickingStorage(t *testing.T) {
	t.Parallel()
	kv := newMemKV()
	kv.panics = true
	if _, err := kvstore.New(kv).Load(t.Context(), "wechat/v1/a"); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Load: %v", err)
	}
}

// memKV is a KV in memory that ignores its contexts, hangs, fails and panics at will.
type memKV struct {
	hang   chan struct{} // operations wait until it is closed; nil: they do not
	panics bool

	mu       sync.Mutex
	values   map[string][]byte
	locks    map[string]chan struct{}
	called   int
	noUnlock int
}

func newMemKV() *memKV {
	return &memKV{values: make(map[string][]byte), locks: make(map[string]chan struct{})}
}

func (kv *memKV) enter() {
	kv.mu.Lock()
	kv.called++
	kv.mu.Unlock()
	if kv.panics {
		panic("storage bug")
	}
	if kv.hang != nil {
		<-kv.hang
	}
}

func (kv *memKV) calls() int {
	kv.mu.Lock()
	defer kv.mu.Unlock()
	return kv.called
}

func (kv *memKV) failUnlocks(n int) {
	kv.mu.Lock()
	defer kv.mu.Unlock()
	kv.noUnlock = n
}

func (kv *memKV) held() (n int) {
	kv.mu.Lock()
	defer kv.mu.Unlock()
	for _, c := range kv.locks {
		n += len(c)
	}
	return n
}

func (kv *memKV) Store(_ context.Context, key string, value []byte) error {
	kv.enter()
	kv.mu.Lock()
	defer kv.mu.Unlock()
	kv.values[key] = append([]byte(nil), value...)
	return nil
}

func (kv *memKV) Load(_ context.Context, key string) ([]byte, error) {
	kv.enter()
	kv.mu.Lock()
	defer kv.mu.Unlock()
	value, ok := kv.values[key]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return append([]byte(nil), value...), nil
}

func (kv *memKV) Delete(_ context.Context, key string) error {
	kv.enter()
	kv.mu.Lock()
	defer kv.mu.Unlock()
	if _, ok := kv.values[key]; !ok {
		return fs.ErrNotExist // as some storages do
	}
	delete(kv.values, key)
	return nil
}

func (kv *memKV) List(_ context.Context, prefix string, _ bool) ([]string, error) {
	kv.enter()
	kv.mu.Lock()
	defer kv.mu.Unlock()
	var keys []string
	for key := range kv.values {
		if strings.HasPrefix(key, prefix+"/") {
			keys = append(keys, key)
		}
	}
	if keys == nil {
		return nil, fs.ErrNotExist
	}
	return keys, nil
}

func (kv *memKV) Lock(ctx context.Context, name string) error {
	kv.enter()
	kv.mu.Lock()
	c := kv.locks[name]
	if c == nil {
		c = make(chan struct{}, 1)
		kv.locks[name] = c
	}
	kv.mu.Unlock()
	if kv.hang != nil {
		c <- struct{}{}
		return nil
	}
	select {
	case c <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (kv *memKV) Unlock(_ context.Context, name string) error {
	kv.mu.Lock()
	defer kv.mu.Unlock()
	if kv.noUnlock > 0 {
		kv.noUnlock--
		return errors.New("read-only")
	}
	<-kv.locks[name]
	return nil
}

var (
	_ kvstore.KV = (*memKV)(nil)
	_ kvstore.KV = certmagic.Storage(nil)
)

// contextKV keeps a lock only while the context lives that it was taken with, as a KV with a lease may.
type contextKV struct {
	*memKV
	mu     sync.Mutex
	leases []context.Context
}

func (kv *contextKV) Lock(ctx context.Context, name string) error {
	if err := kv.memKV.Lock(ctx, name); err != nil {
		return err
	}
	kv.mu.Lock()
	defer kv.mu.Unlock()
	kv.leases = append(kv.leases, ctx)
	return nil
}

func TestLockOutlivesTheWaitForIt(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		kv := &contextKV{memKV: newMemKV()}
		s := kvstore.New(kv)
		wait, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		unlock, err := s.Lock(wait, "wechat/v1/a")
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if err := kv.leases[0].Err(); err != nil {
			t.Errorf("the context of a lock that is held: %v", err)
		}
		// The end of a wait still ends it.
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := s.Lock(short, "wechat/v1/a"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a lock that is taken: %v", err)
		}
		unlock()
		synctest.Wait()
		if kv.leases[0].Err() == nil {
			t.Error("the context of a lock that was given back is left open")
		}
	})
}
