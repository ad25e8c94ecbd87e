package redisstore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
	"github.com/caddy-wechat/caddy-wechat/internal/stall"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// TestTakeWhoseAnswerIsLost: nobody was given the value, and then exactly one caller is.
func TestTakeWhoseAnswerIsLost(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		fail  func(*redistest.Relay)
		taken bool
	}{
		"the answer is lost":    {(*redistest.Relay).HangAnswers, true},
		"the question is lost":  {(*redistest.Relay).Cut, false},
		"the question is late":  {(*redistest.Relay).Hang, false}, // it arrives with those that come after it
		"the answer comes late": {func(r *redistest.Relay) { r.Slow(300 * time.Millisecond) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := redistest.Start(t)
			relay := redistest.NewRelay(t, server.Addr)
			a, b := open(t, Options{Addresses: []string{relay.Addr}}), open(t, Options{Addresses: []string{server.Addr}})
			for _, name := range []string{"before", "it"} {
				if err := b.Put(t.Context(), name, []byte(name), time.Minute); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := a.Take(t.Context(), "before"); err != nil { // Redis knows the script, and there is a connection
				t.Fatal(err)
			}
			for again := range 2 {
				tt.fail(relay)
				ctx, cancel := context.WithTimeout(t.Context(), 400*time.Millisecond)
				_, err := a.Take(ctx, "it")
				cancel()
				if err == nil || errors.Is(err, fs.ErrNotExist) {
					t.Fatalf("call %d: %v", again, err)
				}
			}
			redistest.Eventually(t, "the value is as it should be", func() error {
				if _, err := b.Peek(t.Context(), "it"); errors.Is(err, fs.ErrNotExist) != tt.taken {
					return fmt.Errorf("it should be taken: %v, and Peek says %v", tt.taken, err)
				}
				return nil
			})
			relay.Slow(0)
			relay.Pass()
			var got atomic.Int32
			var wg sync.WaitGroup
			for range 4 {
				for _, s := range []*Store{a, b} {
					wg.Go(func() {
						value, err := s.Take(t.Context(), "it")
						switch {
						case err == nil && string(value) == "it":
							got.Add(1)
						case !errors.Is(err, fs.ErrNotExist):
							t.Errorf("Take = %q, %v", value, err)
						}
					})
				}
			}
			wg.Wait()
			if n := got.Load(); n != 1 {
				t.Errorf("%d got it", n)
			}
			if n := a.doubts.Len() + b.doubts.Len(); n != 0 {
				t.Errorf("%d values are still in doubt", n)
			}
		})
	}
}

// What was taken is kept for who took it, for a minute and no longer: it may be of a user.
func TestTakenValueEnds(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	s := open(t, Options{Addresses: []string{server.Addr}})
	if err := s.Put(t.Context(), "it", []byte("x"), time.Hour); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Take(t.Context(), "it"); err != nil {
		t.Fatal(err)
	}
	keys, _ := server.Do("KEYS", "*").([]any)
	if len(keys) != 1 {
		t.Fatalf("keys %v", keys)
	}
	ms, _ := server.Do("PTTL", keys[0]).(int64)
	if left := time.Duration(ms) * time.Millisecond; left < takenLife/2 || left > takenLife {
		t.Errorf("it is kept for %v, want %v", left, takenLife)
	}
}

// lossyStore loses what Redis answers to the next Take.
type lossyStore struct {
	*realStore
	lose  *atomic.Bool
	relay *atomic.Pointer[redistest.Relay]
}

func (s lossyStore) Take(ctx context.Context, name string) ([]byte, error) {
	if s.lose.CompareAndSwap(true, false) {
		s.relay.Load().HangAnswers()
	}
	return s.realStore.Take(ctx, name)
}

// TestTrackingIDWhoseRedemptionIsNotAnswered: the app was told to try again, and can; nobody else, and nobody twice.
func TestTrackingIDWhoseRedemptionIsNotAnswered(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	other := newLoginNodes(t, server, 1)[0]
	lossy := lossyStore{lose: new(atomic.Bool), relay: new(atomic.Pointer[redistest.Relay])}
	n := newLoginNodeOn(t, other.wx, server.Addr, func(s *Store) tokens.Store { lossy.realStore = s; return lossy })
	lossy.relay.Store(n.relay)
	redeem := func(n *loginNode, id string) error { _, err := n.Redeem(t.Context(), id, "crm", nil); return err }
	ask := func(n *loginNode, id string) error {
		_, err := n.AskProfile(t.Context(), id, "crm", nil, func(_ context.Context, _ tokens.User, g tokens.UserGrant) (tokens.Profile, tokens.UserGrant, error) {
			return tokens.Profile{}, g, nil
		})
		return err
	}
	keep := func() string { return other.Keep(t.Context(), tokens.User{OpenID: "o"}, testGrant, time.Hour, true) }
	if err := redeem(n, keep()); err != nil { // Redis knows the script
		t.Fatal(err)
	}
	for name, redeemed := range map[string]func(*loginNode, string) error{"redeem": redeem, "ask": ask} {
		for try := range stall.Tries(t, stepStop, server.Turn) {
			id := keep()
			lossy.lose.Store(true)
			if err := redeemed(n, id); !errors.Is(err, tokens.ErrUserAway) {
				t.Fatalf("%s: a redemption whose answer is lost: %v", name, err)
			}
			n.relay.Pass()
			lossy.lose.Store(false)
			if err := redeem(other, id); !errors.Is(err, tokens.ErrUserUnknown) {
				try.Errorf("%s: it was not taken: %v", name, err) // the question itself was late, or the other node had no answer in time
				redistest.Eventually(t, "Redis has its turn", func() error { return errors.Join(redeem(n, keep()), redeem(other, keep())) })
				continue
			}
			redistest.Eventually(t, name+" again", func() error {
				err := redeemed(n, id)
				if err != nil && !errors.Is(err, tokens.ErrUserAway) {
					t.Fatalf("%s again: %v", name, err)
				}
				return err
			})
			for _, n := range []*loginNode{n, other} {
				if err := redeem(n, id); !errors.Is(err, tokens.ErrUserUnknown) {
					try.Errorf("%s: a second time: %v", name, err)
				}
			}
		}
	}
}

// Two calls at the same time, neither of which hears of what one of them has taken.
func TestTwoTakesWhoseAnswersAreLost(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	relay := redistest.NewRelay(t, server.Addr)
	a, b := open(t, Options{Addresses: []string{relay.Addr}}), open(t, Options{Addresses: []string{server.Addr}})
	for _, name := range []string{"before 0", "before 1", "it"} {
		if err := b.Put(t.Context(), name, []byte(name), time.Minute); err != nil {
			t.Fatal(err)
		}
	}
	var wg sync.WaitGroup
	for i := range 2 { // Redis knows the script, and there are connections
		wg.Go(func() { _, _ = a.Take(t.Context(), fmt.Sprint("before ", i)) })
	}
	wg.Wait()
	relay.HangAnswers()
	for i := range 2 {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(4+i)*100*time.Millisecond)
			defer cancel()
			if _, err := a.Take(ctx, "it"); err == nil || errors.Is(err, fs.ErrNotExist) {
				t.Errorf("while Redis says nothing: %v", err)
			}
		})
	}
	wg.Wait()
	relay.Pass()
	if got, err := a.Take(t.Context(), "it"); err != nil || string(got) != "it" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := a.Take(t.Context(), "it"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("once more: %v", err)
	}
}
