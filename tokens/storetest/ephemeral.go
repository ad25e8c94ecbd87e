package storetest

import (
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// ephemeral are the tests of a tokens.Ephemeral.
var ephemeral = []test{
	{"a claim has one first", claimOnce},
	{"a claim is free after its time", claimEnds},
	{"a value is taken once", takeOnce},
	{"a value ends", putEnds},
	{"a value that is replaced ends as it would have", replaceEnds},
	{"values are no records", valuesAreNoRecords},
}

const (
	long  = time.Minute
	short = 50 * time.Millisecond
)

func claimOnce(t *testing.T, s tokens.Store) {
	e := s.(tokens.Ephemeral)
	for round, value := range []string{"a", "", "\x00\xff\r\n"} {
		name := fmt.Sprintf("push/%d {x}", round)
		var firsts atomic.Int32
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				held, first, err := e.Claim(t.Context(), name, []byte(value), long)
				if err != nil || string(held) != value {
					t.Errorf("Claim = %q, %v", held, err)
				}
				if first {
					firsts.Add(1)
				}
			})
		}
		wg.Wait()
		if n := firsts.Load(); n != 1 {
			t.Errorf("%d firsts", n)
		}
		if held, first, err := e.Claim(t.Context(), name, []byte("later"), long); first || string(held) != value || err != nil {
			t.Errorf("a later claim: %q, first %v, %v", held, first, err)
		}
		if held, err := e.Peek(t.Context(), name); err != nil || string(held) != value {
			t.Errorf("Peek = %q, %v", held, err)
		}
	}
}

func claimEnds(t *testing.T, s tokens.Store) {
	e := s.(tokens.Ephemeral)
	if _, first, err := e.Claim(t.Context(), "x", []byte("1"), short); !first || err != nil {
		t.Fatalf("first %v, %v", first, err)
	}
	until(t, "the claim ends", func() bool {
		_, first, err := e.Claim(t.Context(), "x", []byte("2"), long)
		return first && err == nil
	})
}

func takeOnce(t *testing.T, s tokens.Store) {
	e := s.(tokens.Ephemeral)
	for range 2 {
		if err := e.Put(t.Context(), "code", []byte("earlier"), long); err != nil {
			t.Fatal(err)
		}
		if err := e.Put(t.Context(), "code", []byte("it"), long); err != nil {
			t.Fatal(err)
		}
		var got atomic.Int32
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				value, err := e.Take(t.Context(), "code")
				switch {
				case err == nil && string(value) == "it":
					got.Add(1)
				case !errors.Is(err, fs.ErrNotExist):
					t.Errorf("Take = %q, %v", value, err)
				}
			})
		}
		wg.Wait()
		if n := got.Load(); n != 1 {
			t.Errorf("%d got it", n)
		}
		if _, err := e.Peek(t.Context(), "code"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Peek of what was taken: %v", err)
		}
	}
}

func putEnds(t *testing.T, s tokens.Store) {
	e := s.(tokens.Ephemeral)
	if err := e.Put(t.Context(), "brief", []byte("x"), short); err != nil {
		t.Fatal(err)
	}
	until(t, "the value ends", func() bool {
		_, err := e.Peek(t.Context(), "brief")
		return errors.Is(err, fs.ErrNotExist)
	})
	if _, err := e.Take(t.Context(), "brief"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Take of what has ended: %v", err)
	}
}

func replaceEnds(t *testing.T, s tokens.Store) {
	e := s.(tokens.Ephemeral)
	if err := e.Replace(t.Context(), "none", []byte("x")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Replace of nothing: %v", err)
	}
	if _, err := e.Peek(t.Context(), "none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Peek after it: %v", err)
	}
	if err := e.Put(t.Context(), "lasting", []byte("x"), long); err != nil {
		t.Fatal(err)
	}
	if err := e.Replace(t.Context(), "lasting", []byte("y")); err != nil {
		t.Fatal(err)
	}
	if held, err := e.Peek(t.Context(), "lasting"); err != nil || string(held) != "y" {
		t.Errorf("Peek = %q, %v", held, err)
	}
	if err := e.Put(t.Context(), "brief", []byte("x"), 20*short); err != nil {
		t.Fatal(err)
	}
	if err := e.Replace(t.Context(), "brief", []byte("y")); err != nil {
		t.Fatal(err)
	}
	until(t, "the value ends", func() bool {
		_, err := e.Peek(t.Context(), "brief")
		return errors.Is(err, fs.ErrNotExist)
	})
}

func valuesAreNoRecords(t *testing.T, s tokens.Store) {
	const name = "wechat/v1/both/one"
	if err := s.(tokens.Ephemeral).Put(t.Context(), name, []byte("x"), long); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Load(t.Context(), name); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Load: %v", err)
	}
	if names, err := s.List(t.Context(), "wechat/v1/both"); err != nil || len(names) != 0 {
		t.Errorf("List = %q, %v", names, err)
	}
	mustStore(t, s, name, []byte("record"))
	if _, err := s.(tokens.Ephemeral).Take(t.Context(), name); err != nil {
		t.Error(err)
	}
	if got := mustLoad(t, s, name); string(got) != "record" {
		t.Errorf("the record: %q", got)
	}
}

// until waits for what only time brings about.
func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !done(); time.Sleep(short / 10) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not yet", what)
		}
	}
}
