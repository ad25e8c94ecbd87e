// Package storetest holds the tests that every tokens.Store must pass.
package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// contention is how long a test waits for a lock that somebody else holds.
const contention = 50 * time.Millisecond

// Run tests the stores that open makes, also as a tokens.Swapper, a tokens.Ephemeral, tokens.Claims and a tokens.Scanner if they are. Each call of open
// returns a new, empty store.
func Run(t *testing.T, open func() tokens.Store) {
	t.Helper()
	tests := []test{
		{"absent record", absentRecord},
		{"values come back as they were", values},
		{"a value is the store's own", ownership},
		{"overwrite", overwrite},
		{"delete", remove},
		{"names stay apart", names},
		{"no name leaves its folder", hostileNames},
		{"list", list},
		{"list of an absent folder is empty", listAbsent},
		{"ended context", endedContext},
		{"writes are not torn", concurrentWrites},
		{"lock excludes", lockExcludes},
		{"lock waits until its context ends", lockWaits},
		{"locks are independent", locksIndependent},
		{"unlock after the context ended", unlockLate},
		{"unlock twice", unlockTwice},
		{"authorizers in pages", authorizersInPages},
	}
	s := open()
	if _, ok := s.(tokens.Swapper); ok {
		tests = append(tests, swapping...)
	}
	if _, ok := s.(tokens.Ephemeral); ok {
		tests = append(tests, ephemeral...)
	}
	if _, ok := s.(tokens.Scanner); ok {
		tests = append(tests, scanning...)
	}
	if _, ok := s.(tokens.Claims); ok {
		tests = append(tests, claiming...)
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			test.run(t, open())
		})
	}
}

type test struct {
	name string
	run  func(*testing.T, tokens.Store)
}

func absentRecord(t *testing.T, s tokens.Store) {
	if _, err := s.Load(t.Context(), "wechat/v1/ticket/wx0"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Load of nothing: %v, want fs.ErrNotExist", err)
	}
}

func values(t *testing.T, s tokens.Store) {
	for i, value := range [][]byte{[]byte("text"), {0, 1, 254, 255, '\n', '\r', 0}, bytes.Repeat([]byte("long "), 20_000), {}} {
		name := fmt.Sprintf("wechat/v1/value/%d", i)
		mustStore(t, s, name, value)
		if got := mustLoad(t, s, name); !bytes.Equal(got, value) {
			t.Errorf("value %d: %d bytes came back as %d others", i, len(value), len(got))
		}
	}
}

func ownership(t *testing.T, s tokens.Store) {
	value := []byte("kept")
	mustStore(t, s, "wechat/v1/value/own", value)
	value[0] = 'X'
	mustLoad(t, s, "wechat/v1/value/own")[1] = 'X'
	if got := mustLoad(t, s, "wechat/v1/value/own"); string(got) != "kept" {
		t.Errorf("value changed under the store: %q", got)
	}
}

func overwrite(t *testing.T, s tokens.Store) {
	mustStore(t, s, "wechat/v1/value/o", []byte("a longer first value"))
	mustStore(t, s, "wechat/v1/value/o", []byte("second"))
	if got := mustLoad(t, s, "wechat/v1/value/o"); string(got) != "second" {
		t.Errorf("after a second Store: %q", got)
	}
}

func remove(t *testing.T, s tokens.Store) {
	const name = "wechat/v1/intent/gone"
	if err := s.Delete(t.Context(), name); err != nil {
		t.Errorf("Delete of nothing: %v", err)
	}
	mustStore(t, s, name, []byte("x"))
	for range 2 {
		if err := s.Delete(t.Context(), name); err != nil {
			t.Errorf("Delete: %v", err)
		}
	}
	if _, err := s.Load(t.Context(), name); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Load after Delete: %v, want fs.ErrNotExist", err)
	}
}

func names(t *testing.T, s tokens.Store) {
	all := []string{"ab", "AB", "aB", "a.b", "a b", "a+b", "a:b", "a*b", "ab.", "é", "x_6162", "X_6162", "-", "_", strings.Repeat("a", 60)}
	for _, name := range all {
		mustStore(t, s, "wechat/v1/name/"+name, []byte(name))
	}
	for _, name := range all {
		if got := mustLoad(t, s, "wechat/v1/name/"+name); string(got) != name {
			t.Errorf("record %q holds what was stored as %q", name, got)
		}
	}
	listed, err := s.List(t.Context(), "wechat/v1/name")
	if err != nil || len(listed) != len(all) {
		t.Errorf("List gives %d of %d names, error %v", len(listed), len(all), err)
	}
}

func hostileNames(t *testing.T, s tokens.Store) {
	mustStore(t, s, "wechat/v1/victim", []byte("untouched"))
	for _, name := range []string{"..", ".", "", "\x00", "%2e%2e", `..\victim`, "~", "C:"} {
		name = "wechat/v1/folder/" + name + "/victim"
		if err := s.Store(t.Context(), name, []byte("hostile")); err != nil {
			continue // refusing is fine
		}
		if got := mustLoad(t, s, name); string(got) != "hostile" {
			t.Errorf("record %q: %q", name, got)
		}
	}
	if got := mustLoad(t, s, "wechat/v1/victim"); string(got) != "untouched" {
		t.Errorf("a name with dots wrote outside of its folder: %q", got)
	}
}

func list(t *testing.T, s tokens.Store) {
	want := []string{"wechat/v1/intent/1", "wechat/v1/intent/2", "wechat/v1/intent/Three"}
	for _, name := range append(want, "wechat/v1/intents", "wechat/v1/intent2/4", "wechat/v1/other/5") {
		mustStore(t, s, name, []byte("x"))
	}
	got, err := s.List(t.Context(), "wechat/v1/intent")
	if err != nil {
		t.Fatalf("List: %v", err)
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("List = %q, want %q", got, want)
	}
	if err := s.Delete(t.Context(), want[0]); err != nil {
		t.Fatal(err)
	}
	if got, err := s.List(t.Context(), "wechat/v1/intent"); err != nil || len(got) != 2 {
		t.Errorf("List after a Delete: %q, %v", got, err)
	}
}

func listAbsent(t *testing.T, s tokens.Store) {
	if got, err := s.List(t.Context(), "wechat/v1/nothing"); err != nil || len(got) != 0 {
		t.Errorf("List = %q, %v; want nothing and no error", got, err)
	}
}

func endedContext(t *testing.T, s tokens.Store) {
	mustStore(t, s, "wechat/v1/value/ctx", []byte("before"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Load(ctx, "wechat/v1/value/ctx"); !errors.Is(err, context.Canceled) {
		t.Errorf("Load: %v, want context.Canceled", err)
	}
	if err := s.Store(ctx, "wechat/v1/value/ctx", []byte("after")); !errors.Is(err, context.Canceled) {
		t.Errorf("Store: %v, want context.Canceled", err)
	}
	if err := s.Delete(ctx, "wechat/v1/value/ctx"); !errors.Is(err, context.Canceled) {
		t.Errorf("Delete: %v, want context.Canceled", err)
	}
	if _, err := s.List(ctx, "wechat/v1/value"); !errors.Is(err, context.Canceled) {
		t.Errorf("List: %v, want context.Canceled", err)
	}
	if _, err := s.Lock(ctx, "wechat/v1/value/ctx"); !errors.Is(err, context.Canceled) {
		t.Errorf("Lock: %v, want context.Canceled", err)
	}
	if got := mustLoad(t, s, "wechat/v1/value/ctx"); string(got) != "before" {
		t.Errorf("a write with an ended context took effect: %q", got)
	}
}

func concurrentWrites(t *testing.T, s tokens.Store) {
	const name = "wechat/v1/value/busy"
	mustStore(t, s, name, bytes.Repeat([]byte{'a'}, 4096))
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for range 10 {
				if err := s.Store(t.Context(), name, bytes.Repeat([]byte{byte('a' + i)}, 4096)); err != nil {
					t.Errorf("Store: %v", err)
				}
			}
		})
		wg.Go(func() {
			for range 10 {
				got, err := s.Load(t.Context(), name)
				if err != nil || len(got) != 4096 || bytes.Count(got, got[:1]) != 4096 {
					t.Errorf("Load beside writers: a torn value of %d bytes, error %v", len(got), err)
				}
			}
		})
	}
	wg.Wait()
}

func lockExcludes(t *testing.T, s tokens.Store) {
	const name = "wechat/v1/authorizer/lock"
	var holders, most atomic.Int32
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			unlock, err := s.Lock(t.Context(), name)
			if err != nil {
				t.Errorf("Lock: %v", err)
				return
			}
			if n := holders.Add(1); n > most.Load() {
				most.Store(n)
			}
			mustStore(t, s, name, []byte("while holding"))
			holders.Add(-1)
			unlock()
		})
	}
	wg.Wait()
	if most.Load() != 1 {
		t.Errorf("%d holders at once", most.Load())
	}
}

func lockWaits(t *testing.T, s tokens.Store) {
	unlock := mustLock(t, s, "wechat/v1/held")
	ctx, cancel := context.WithTimeout(t.Context(), contention)
	defer cancel()
	if _, err := s.Lock(ctx, "wechat/v1/held"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Lock of a held lock: %v, want context.DeadlineExceeded", err)
	}
	unlock()
	// The waiter that gave up must not have got it.
	mustLock(t, s, "wechat/v1/held")()
}

func locksIndependent(t *testing.T, s tokens.Store) {
	for _, name := range []string{"wechat/v1/a", "wechat/v1/A", "wechat/v1/a/renewal", "wechat/v1a"} {
		defer mustLock(t, s, name)()
	}
}

func unlockLate(t *testing.T, s tokens.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	unlock, err := s.Lock(ctx, "wechat/v1/late")
	if err != nil {
		t.Fatalf("Lock: %v", err)
	}
	cancel()
	unlock()
	mustLock(t, s, "wechat/v1/late")()
}

func unlockTwice(t *testing.T, s tokens.Store) {
	unlock := mustLock(t, s, "wechat/v1/twice")
	unlock()
	next := mustLock(t, s, "wechat/v1/twice")
	defer next()
	unlock() // not the holder's any more
	ctx, cancel := context.WithTimeout(t.Context(), contention)
	defer cancel()
	if _, err := s.Lock(ctx, "wechat/v1/twice"); err == nil {
		t.Error("a second unlock freed the next holder's lock")
	}
}

func mustStore(t *testing.T, s tokens.Store, name string, value []byte) {
	t.Helper()
	if err := s.Store(t.Context(), name, value); err != nil {
		t.Errorf("Store(%q): %v", name, err)
	}
}

func mustLoad(t *testing.T, s tokens.Store, name string) []byte {
	t.Helper()
	value, err := s.Load(t.Context(), name)
	if err != nil {
		t.Fatalf("Load(%q): %v", name, err)
	}
	return value
}

func mustLock(t *testing.T, s tokens.Store, name string) (unlock func()) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	unlock, err := s.Lock(ctx, name)
	if err != nil {
		t.Fatalf("Lock(%q): %v", name, err)
	}
	return unlock
}
