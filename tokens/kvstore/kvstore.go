// Package kvstore keeps tokens in a key-value storage of the shape of Caddy's: any certmagic.Storage satisfies KV.
package kvstore

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"sync"
	"time"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

const (
	// Timeout bounds one operation other than Lock: WeChat waits five seconds for the answer that waits for it.
	Timeout = 3 * time.Second
	// lockTimeout bounds a Lock whose context has no end.
	lockTimeout = 30 * time.Second
	// maxOperations and maxLocks bound what runs at the same time, and so what a storage that hangs can hold up: when
	// as many hang, further ones fail at the end of their own deadline.
	maxOperations = 64
	maxLocks      = 1024
	// unlockAttempts and unlockPause: a lock that is not removed would be kept fresh by the storage for as long as the
	// process lives.
	unlockAttempts = 3
	unlockPause    = time.Second
)

// KV is what a storage must do; see certmagic.Storage for its contract. Load and List may return fs.ErrNotExist. The
// methods may ignore their context.
type KV interface {
	Store(ctx context.Context, key string, value []byte) error
	Load(ctx context.Context, key string) ([]byte, error)
	Delete(ctx context.Context, key string) error
	List(ctx context.Context, path string, recursive bool) ([]string, error)
	Lock(ctx context.Context, name string) error
	Unlock(ctx context.Context, name string) error
}

// Store is a tokens.Store over a KV. Every operation ends at its deadline, also where the KV does not: it runs on a
// goroutine of its own that the Store owns until it returns. An operation that was given up on may still take effect;
// until it has ended, no other write to the same record is begun, and a lock of the record's name is kept, so that it cannot
// undo a later one of this process or of another.
type Store struct {
	kv KV

	operations, locks chan struct{} // one element for each that runs

	mu      sync.Mutex
	writing map[string]*write // by key
}

// write is a change of a key that is under way, also after its caller has given up on it.
type write struct {
	ended  chan struct{} // closed when it has
	unlock []func()      // to be done then; guarded by Store.mu
}

// New returns a store over kv. It does not touch kv.
func New(kv KV) *Store {
	return &Store{
		kv: kv, writing: make(map[string]*write),
		operations: make(chan struct{}, maxOperations), locks: make(chan struct{}, maxLocks),
	}
}

// Load implements tokens.Store.
func (s *Store) Load(ctx context.Context, name string) ([]byte, error) {
	return run(ctx, Timeout, s.operations, func(ctx context.Context) ([]byte, error) {
		return s.kv.Load(ctx, encodeName(name))
	}, nil)
}

// Store implements tokens.Store.
func (s *Store) Store(ctx context.Context, name string, value []byte) error {
	value = bytes.Clone(value) // a write that is given up on may still read it
	return s.write(ctx, encodeName(name), func(ctx context.Context, key string) error {
		return s.kv.Store(ctx, key, value)
	})
}

// Delete implements tokens.Store.
func (s *Store) Delete(ctx context.Context, name string) error {
	return s.write(ctx, encodeName(name), func(ctx context.Context, key string) error {
		if err := s.kv.Delete(ctx, key); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	})
}

// List implements tokens.Store. Keys that no name of ours encodes to, such as a file system's temporary files, are
// left out.
func (s *Store) List(ctx context.Context, prefix string) ([]string, error) {
	folder := encodeName(prefix)
	keys, err := run(ctx, Timeout, s.operations, func(ctx context.Context) ([]string, error) {
		return s.kv.List(ctx, folder, false)
	}, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, key := range keys {
		if path.Dir(key) != folder {
			continue
		}
		if segment, ok := decodeSegment(path.Base(key)); ok {
			names = append(names, path.Join(prefix, segment))
		}
	}
	return names, nil
}

// Lock implements tokens.Store. The KV's lock is named by a hash: KVs change or drop characters of lock names.
//
// Unlock does not wait for a write of the record of the same name that was given up on: the lock is removed once that has
// ended, and where it never does the lock ends with the process.
func (s *Store) Lock(ctx context.Context, name string) (unlock func(), err error) {
	sum := sha256.Sum256([]byte(name))
	lock := "wechat_" + hex.EncodeToString(sum[:16])
	abandoned := func(release context.CancelFunc, err error) {
		if err == nil { // it was granted after all, with nobody left to hold it
			s.unlock(lock)
			release()
		}
	}
	release, err := run(ctx, lockTimeout, s.locks, func(ctx context.Context) (context.CancelFunc, error) {
		return s.lock(ctx, lock)
	}, abandoned)
	if err != nil {
		return nil, err
	}
	var once sync.Once
	return func() {
		once.Do(func() {
			done := make(chan struct{})
			remove := func() { s.unlock(lock); release(); close(done) }
			if s.afterWrite(encodeName(name), remove) {
				return
			}
			go remove()
			t := time.NewTimer(Timeout)
			defer t.Stop()
			select {
			case <-done:
			case <-t.C: // it goes on by itself
			}
		})
	}, nil
}

// lock takes a lock. The end of ctx ends the wait for it, and nothing more: a KV may keep a lock fresh only for as long
// as the context lives that it was taken with. Release ends that one.
func (s *Store) lock(ctx context.Context, lock string) (release context.CancelFunc, err error) {
	held, release := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, release)
	if err = s.kv.Lock(held, lock); err != nil {
		stop()
		release()
		return nil, err
	}
	if !stop() {
		s.unlock(lock)
		return nil, ctx.Err()
	}
	return release, nil
}

// afterWrite has something done when the write of a key that is under way has ended; false: none is.
func (s *Store) afterWrite(key string, do func()) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.writing[key]
	if w == nil {
		return false
	}
	w.unlock = append(w.unlock, do)
	return true
}

// unlock removes a lock, whatever became of the context that it was taken with.
func (s *Store) unlock(lock string) {
	ctx, cancel := context.WithTimeout(context.Background(), unlockAttempts*(Timeout+unlockPause))
	defer cancel()
	for attempt := range unlockAttempts {
		if attempt > 0 {
			t := time.NewTimer(unlockPause)
			<-t.C
		}
		err := guard(func() error { return s.kv.Unlock(ctx, lock) })
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return
		}
	}
}

// write runs a change of a key once no earlier one is under way.
func (s *Store) write(ctx context.Context, key string, fn func(ctx context.Context, key string) error) error {
	ctx, cancel := context.WithTimeout(ctx, Timeout)
	defer cancel()
	w, err := s.turn(ctx, key)
	if err != nil {
		return err
	}
	leave := func() {
		s.mu.Lock()
		delete(s.writing, key)
		s.mu.Unlock()
		close(w.ended)
		for _, unlock := range w.unlock {
			go unlock() // which ends by itself; the write's caller may still wait
		}
	}
	_, err = run(ctx, Timeout, s.operations, func(ctx context.Context) (struct{}, error) {
		defer leave()
		return struct{}{}, fn(ctx, key)
	}, nil)
	if errors.Is(err, errNotStarted) {
		leave()
	}
	return err
}

// turn waits until no write to the key is under way, and returns the caller's.
func (s *Store) turn(ctx context.Context, key string) (*write, error) {
	for {
		s.mu.Lock()
		before := s.writing[key]
		if before == nil {
			w := &write{ended: make(chan struct{})}
			s.writing[key] = w
			s.mu.Unlock()
			return w, nil
		}
		s.mu.Unlock()
		select {
		case <-before.ended:
		case <-ctx.Done():
			return nil, fmt.Errorf("an earlier write of the same record has not ended: %w", ctx.Err())
		}
	}
}

// errNotStarted marks an operation that never reached the storage.
var errNotStarted = errors.New("storage operation not started")

// run calls fn on a goroutine of its own and waits for it until ctx or limit ends. Abandoned, if given, gets the
// result of a call that nobody waits for any more. An error of errNotStarted means that fn is never called.
func run[T any](ctx context.Context, limit time.Duration, slots chan struct{}, fn func(context.Context) (T, error),
	abandoned func(T, error),
) (T, error) {
	var zero T
	if err := ctx.Err(); err != nil {
		return zero, fmt.Errorf("%w: %w", errNotStarted, err)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	select {
	case slots <- struct{}{}:
	case <-ctx.Done():
		return zero, fmt.Errorf("%w: %d others hang: %w", errNotStarted, cap(slots), ctx.Err())
	}
	type result struct {
		value T
		err   error
	}
	results := make(chan result)
	go func() {
		defer func() { <-slots }()
		var r result
		r.err = guard(func() (err error) { r.value, err = fn(ctx); return err })
		select {
		case results <- r:
		case <-ctx.Done():
			if abandoned != nil {
				abandoned(r.value, r.err)
			}
		}
	}()
	select {
	case r := <-results:
		return r.value, r.err
	case <-ctx.Done():
		return zero, fmt.Errorf("storage did not answer: %w", ctx.Err())
	}
}

// guard turns a panic of the storage into an error.
func guard(fn func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("storage panicked: %T", r)
		}
	}()
	return fn()
}

var _ tokens.Store = (*Store)(nil)
