package storetest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// claiming are the tests of tokens.Claims.
var claiming = []test{
	{"claims of many callers", claimsOfMany},
	{"a claim's time", claimsTime},
	{"a claim is swapped once", claimsSwap},
	{"claims are no values", claimsAreNoValues},
	{"a node lives", nodeLives},
	{"a node is told", nodeIsTold},
}

// patience is for a store on a busy machine.
const patience = 10 * time.Second

// claimsOfMany: however they are sent together, each name has one first, and everybody gets the answer to their own.
func claimsOfMany(t *testing.T, s tokens.Store) {
	const names, callers = 300, 3
	c := s.(tokens.Claims)
	var firsts atomic.Int32
	var wg sync.WaitGroup
	for caller := range callers {
		for i := range names {
			wg.Go(func() {
				own := []byte(fmt.Sprint(caller))
				claims := []tokens.Claim{
					{Name: fmt.Sprint("push/", i), Value: own, TTL: long},
					{Name: fmt.Sprint("body/", i), Value: []byte(fmt.Sprint("body ", i)), TTL: long},
				}
				if err := c.ClaimAll(claims, patience); err != nil {
					t.Error(err)
					return
				}
				if claims[0].First {
					firsts.Add(1)
				} else if string(claims[0].Held) == string(own) || len(claims[0].Held) != 1 {
					t.Errorf("%d: the claim of another one: %q", i, claims[0].Held)
				}
				if !claims[1].First && string(claims[1].Held) != fmt.Sprint("body ", i) {
					t.Errorf("%d: held is %q", i, claims[1].Held)
				}
			})
		}
	}
	wg.Wait()
	if n := firsts.Load(); n != names {
		t.Errorf("%d firsts of %d names", n, names)
	}
}

func claimsTime(t *testing.T, s tokens.Store) {
	c := s.(tokens.Claims)
	if _, _, err := c.PeekClaim(t.Context(), "x"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("PeekClaim of nothing: %v", err)
	}
	claim := func(ttl time.Duration) bool {
		claims := []tokens.Claim{{Name: "x", Value: []byte("1"), TTL: ttl}}
		if err := c.ClaimAll(claims, patience); err != nil {
			t.Fatal(err)
		}
		return claims[0].First
	}
	claim(short)
	until(t, "the claim ends", func() bool { return claim(long) })
	value, left, err := c.PeekClaim(t.Context(), "x")
	if string(value) != "1" || left > long || left < long-patience || err != nil {
		t.Errorf("PeekClaim = %q, %v, %v", value, left, err)
	}
	if ok, err := c.SwapClaim(t.Context(), "x", []byte("1"), []byte("2"), 0); !ok || err != nil {
		t.Errorf("SwapClaim = %v, %v", ok, err)
	}
	if value, kept, err := c.PeekClaim(t.Context(), "x"); string(value) != "2" || kept > left || kept < left-patience || err != nil {
		t.Errorf("PeekClaim = %q, %v, %v", value, kept, err)
	}
	if ok, err := c.SwapClaim(t.Context(), "x", []byte("2"), []byte("3"), 2*long); !ok || err != nil {
		t.Errorf("SwapClaim = %v, %v", ok, err)
	}
	if _, left, err := c.PeekClaim(t.Context(), "x"); left <= long || err != nil {
		t.Errorf("PeekClaim = %v, %v", left, err)
	}
}

// claimsSwap: of many who saw a value one replaces it, also if they all want the same next one.
func claimsSwap(t *testing.T, s tokens.Store) {
	c := s.(tokens.Claims)
	if ok, err := c.SwapClaim(t.Context(), "x", []byte("old"), []byte("next"), long); ok || err != nil {
		t.Errorf("SwapClaim of nothing = %v, %v", ok, err)
	}
	if err := c.ClaimAll([]tokens.Claim{{Name: "x", Value: []byte("old"), TTL: long}}, patience); err != nil {
		t.Fatal(err)
	}
	var swapped atomic.Int32
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			ok, err := c.SwapClaim(t.Context(), "x", []byte("old"), []byte("next"), 0)
			if err != nil {
				t.Error(err)
			}
			if ok {
				swapped.Add(1)
			}
		})
	}
	wg.Wait()
	if n := swapped.Load(); n != 1 {
		t.Errorf("%d swapped it", n)
	}
}

func claimsAreNoValues(t *testing.T, s tokens.Store) {
	c := s.(tokens.Claims)
	if err := c.ClaimAll([]tokens.Claim{{Name: "x", Value: []byte("claim"), TTL: long}}, patience); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Peek(t.Context(), "x"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Peek: %v", err)
	}
	if alive, err := c.Lives(t.Context(), "x"); alive || err != nil {
		t.Errorf("Lives = %v, %v", alive, err)
	}
}

func nodeLives(t *testing.T, s tokens.Store) {
	c := s.(tokens.Claims)
	for _, ttl := range []time.Duration{long, short} {
		if err := c.Beat(t.Context(), "node", ttl); err != nil {
			t.Fatal(err)
		}
		if alive, err := c.Lives(t.Context(), "node"); err != nil || !alive && ttl == long {
			t.Errorf("Lives = %v, %v", alive, err)
		}
	}
	until(t, "the node is dead", func() bool {
		alive, err := c.Lives(t.Context(), "node")
		return !alive && err == nil
	})
}

// nodeIsTold: each node its own, in any order.
func nodeIsTold(t *testing.T, s tokens.Store) {
	c := s.(tokens.Claims)
	ctx, cancel := context.WithCancel(t.Context())
	heard := make(chan string, 1000)
	var wg sync.WaitGroup
	wg.Go(func() { c.Hear(ctx, "a", func(m string) { heard <- m }) })
	tell := func(node, message string) {
		if err := c.Tell(t.Context(), node, message); err != nil {
			t.Error(err)
		}
	}
	until(t, "the node hears", func() bool { tell("a", "is there anybody?"); return len(heard) > 0 })
	tell("b", "for another one")
	tell("a", "first")
	tell("a", "second")
	for wanted := map[string]bool{"first": true, "second": true}; len(wanted) > 0; {
		got := <-heard
		if got != "is there anybody?" && !wanted[got] {
			t.Errorf("heard %q", got)
		}
		delete(wanted, got)
	}
	cancel()
	wg.Wait()
}
