package storetest

import (
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"sync"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// swapping are the tests of a tokens.Swapper.
var swapping = []test{
	{"swap what is there", swapThere},
	{"swap what is absent", swapAbsent},
	{"swap twice", swapTwice},
	{"swaps count", swapsCount},
}

func swap(t *testing.T, s tokens.Store, name string, old, next []byte) error {
	t.Helper()
	return s.(tokens.Swapper).Swap(t.Context(), name, old, next)
}

func swapThere(t *testing.T, s tokens.Store) {
	const name = "wechat/v1/swap/there"
	for _, old := range []string{"first", "", "\x00\xff"} {
		mustStore(t, s, name, []byte(old))
		if err := swap(t, s, name, []byte("other"), []byte("wrong")); !errors.Is(err, tokens.ErrSwapped) {
			t.Errorf("Swap of another value: %v, want tokens.ErrSwapped", err)
		}
		if err := swap(t, s, name, nil, []byte("wrong")); !errors.Is(err, tokens.ErrSwapped) {
			t.Errorf("Swap as if it were absent: %v, want tokens.ErrSwapped", err)
		}
		if got := mustLoad(t, s, name); string(got) != old {
			t.Errorf("a refused Swap left %q in the place of %q", got, old)
		}
		if err := swap(t, s, name, []byte(old), []byte("next")); err != nil {
			t.Errorf("Swap: %v", err)
		}
		if got := mustLoad(t, s, name); string(got) != "next" {
			t.Errorf("after Swap: %q", got)
		}
	}
}

func swapAbsent(t *testing.T, s tokens.Store) {
	const name = "wechat/v1/swap/absent"
	for _, old := range [][]byte{[]byte("something"), {}} {
		if err := swap(t, s, name, old, []byte("wrong")); !errors.Is(err, tokens.ErrSwapped) {
			t.Errorf("Swap of %q that is not there: %v, want tokens.ErrSwapped", old, err)
		}
	}
	if _, err := s.Load(t.Context(), name); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a refused Swap made a record: %v", err)
	}
	if err := swap(t, s, name, nil, []byte("made")); err != nil {
		t.Errorf("Swap: %v", err)
	}
	if names, err := s.List(t.Context(), "wechat/v1/swap"); err != nil || len(names) != 1 {
		t.Errorf("List = %q, %v", names, err)
	}
}

// swapTwice: the answer to the first got lost.
func swapTwice(t *testing.T, s tokens.Store) {
	const name = "wechat/v1/swap/twice"
	for range 2 {
		if err := swap(t, s, name, nil, []byte("next")); err != nil {
			t.Errorf("Swap: %v", err)
		}
	}
}

func swapsCount(t *testing.T, s tokens.Store) {
	const name, writers, each = "wechat/v1/swap/count", 4, 10
	mustStore(t, s, name, []byte("0 nobody 0"))
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := 0; i < each; {
				old := mustLoad(t, s, name)
				var n int
				if _, err := fmt.Sscan(string(old), &n); err != nil {
					t.Errorf("%q: %v", old, err)
					return
				}
				// No two values are the same: one that is there already counts as written.
				err := swap(t, s, name, old, []byte(strconv.Itoa(n+1)+" "+strconv.Itoa(w)+" "+strconv.Itoa(i)))
				switch {
				case err == nil:
					i++
				case !errors.Is(err, tokens.ErrSwapped):
					t.Errorf("Swap: %v", err)
					return
				}
			}
		})
	}
	wg.Wait()
	var n int
	if _, err := fmt.Sscan(string(mustLoad(t, s, name)), &n); err != nil || n != writers*each {
		t.Errorf("%d of %d changes are left (%v)", n, writers*each, err)
	}
}
