package caddymodule

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// breakage is how a node's store goes wrong at one of its operations.
type breakage string

const (
	fails      breakage = "fails"
	failsAfter breakage = "fails, and has done it all the same"
	hangs      breakage = "hangs until the deadline"
	hangsAfter breakage = "hangs until the deadline, and has done it all the same"
)

var (
	breakages = []breakage{fails, failsAfter, hangs, hangsAfter}
	errBroken = errors.New("the store broke")
)

// brokenClaims is one node's way to a store that nodes share, which goes wrong once.
type brokenClaims struct {
	*tokens.MemStore

	mu   sync.Mutex
	how  breakage
	left int // operations other than beats until then; negative: it was, or never is
	done []string
}

func (s *brokenClaims) operate(ctx context.Context, what string, operation func() error) error {
	s.mu.Lock()
	now := s.left == 0
	s.left, s.done = max(s.left-1, -1), append(s.done, what)
	how := s.how
	s.mu.Unlock()
	if !now {
		return operation()
	}
	if how == failsAfter || how == hangsAfter {
		if err := operation(); err != nil {
			return err
		}
	}
	if how == hangs || how == hangsAfter {
		<-ctx.Done()
		return ctx.Err()
	}
	return errBroken
}

func (s *brokenClaims) ClaimAll(claims []tokens.Claim, within time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	return s.operate(ctx, "ClaimAll", func() error { return s.MemStore.ClaimAll(claims, within) })
}

func (s *brokenClaims) PeekClaim(ctx context.Context, name string) (value []byte, left time.Duration, err error) {
	err = s.operate(ctx, "PeekClaim", func() (err error) { value, left, err = s.MemStore.PeekClaim(ctx, name); return err })
	return value, left, err
}

func (s *brokenClaims) SwapClaim(ctx context.Context, name string, old, next []byte, ttl time.Duration) (swapped bool, err error) {
	err = s.operate(ctx, "SwapClaim", func() (err error) { swapped, err = s.MemStore.SwapClaim(ctx, name, old, next, ttl); return err })
	return swapped, err
}

func (s *brokenClaims) Lives(ctx context.Context, node string) (lives bool, err error) {
	err = s.operate(ctx, "Lives", func() (err error) { lives, err = s.MemStore.Lives(ctx, node); return err })
	return lives, err
}

func (s *brokenClaims) Tell(ctx context.Context, node, message string) error {
	return s.operate(ctx, "Tell "+message[:1], func() error { return s.MemStore.Tell(ctx, node, message) })
}

func (s *brokenClaims) Claim(ctx context.Context, name string, value []byte, ttl time.Duration) (held []byte, first bool, err error) {
	err = s.operate(ctx, "Claim", func() (err error) { held, first, err = s.MemStore.Claim(ctx, name, value, ttl); return err })
	if err != nil {
		return nil, false, err
	}
	return held, first, nil
}

func (s *brokenClaims) Take(ctx context.Context, name string) (value []byte, err error) {
	err = s.operate(ctx, "Take", func() (err error) { value, err = s.MemStore.Take(ctx, name); return err })
	return value, err
}

func (s *brokenClaims) Put(ctx context.Context, name string, value []byte, ttl time.Duration) error {
	return s.operate(ctx, "Put", func() error { return s.MemStore.Put(ctx, name, value, ttl) })
}

func (s *brokenClaims) Peek(ctx context.Context, name string) (value []byte, err error) {
	err = s.operate(ctx, "Peek", func() (err error) { value, err = s.MemStore.Peek(ctx, name); return err })
	return value, err
}

// brokenFleet is three nodes, on the first of which the store goes wrong once.
func brokenFleet(t *testing.T, how breakage, after int, backend func(node, run int, w http.ResponseWriter, r *http.Request)) (*fleet, *brokenClaims) {
	t.Helper()
	f := newFleet(t, 3, func(m *Message) { m.SlowReply, m.SlowReplyText = slowText, "请稍候" }, backend)
	broken := &brokenClaims{MemStore: f.store, how: how, left: -1}
	env := *f.nodes[0].m.app.env
	env.Store, env.Log = broken, slog.New(slog.DiscardHandler)
	f.claims(0).use(&env)
	for i := range f.nodes {
		_ = f.claims(i).shared()
	}
	time.Sleep(beatEvery + beatEvery/2) // between two beats
	broken.mu.Lock()
	defer broken.mu.Unlock()
	broken.done, broken.left = nil, after
	return f, broken
}

// recovered checks that nothing is left of a broken operation some time later.
func (f *fleet) recovered(t *testing.T) (late float64) {
	t.Helper()
	time.Sleep(2 * time.Minute)
	for i, p := range f.nodes {
		late += counted(t, p.m.app.metrics().replies, outcomeLate)
		if n := p.m.app.calls().inFlight(); n != 0 || len(p.m.places) != 0 || f.claims(i).held() != 0 {
			t.Errorf("node %d: %d in flight, %d places taken, %d waiting", i, n, len(p.m.places), f.claims(i).held())
		}
		if f.claims(i).away.Load() {
			t.Errorf("node %d: the store is away", i)
		}
	}
	return late
}

// TestSharedBrokenOffAtTheCount: a push of which the store has said that another node has its message waits for that node's answer, however the
// store goes wrong while the push is counted: the backend runs once, and the user gets its answer once.
func TestSharedBrokenOffAtTheCount(t *testing.T) {
	t.Parallel()
	for after, what := range map[int]string{1: "PeekClaim", 2: "SwapClaim"} { // 0 is the claim
		for _, nodes := range [][]int{{1, 0, 0}, {1, 0, 1}} {
			for _, how := range breakages {
				t.Run(fmt.Sprint(what, " ", how, nodes), func(t *testing.T) {
					t.Parallel()
					synctest.Test(t, func(t *testing.T) {
						f, broken := brokenFleet(t, how, after, func(_, _ int, w http.ResponseWriter, _ *http.Request) {
							time.Sleep(12 * time.Second)
							_, _ = io.WriteString(w, replyXML)
						})
						got := f.send(paceMessage(1), nodes...)
						late := f.recovered(t)
						if n := f.runs.Load(); n != 1 || got.answer != replyXML || got.attempt != 3 || late != 0 {
							t.Errorf("the backend ran %d times: %+v, and %v late", n, got, late)
						}
						if broken.done[after] != what {
							t.Errorf("it was %s that went wrong", broken.done[after])
						}
					})
				})
			}
		}
	}
}
