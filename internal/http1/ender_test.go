package http1

import (
	"context"
	"sync"
	"testing"
)

// testEnder is an Ender like that of a caller that makes its contexts itself.
type testEnder struct {
	context.Context
	cancel context.CancelCauseFunc

	mu    sync.Mutex
	onEnd func()
	asked int
}

func newTestEnder(parent context.Context) *testEnder {
	e := new(testEnder)
	e.Context, e.cancel = context.WithCancelCause(parent)
	return e
}

func (e *testEnder) Value(key any) any {
	if key == (EnderKey{}) {
		return e
	}
	return e.Context.Value(key)
}

func (e *testEnder) OnEnd(f func()) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.asked++
	if e.onEnd != nil || e.Err() != nil {
		return false
	}
	e.onEnd = f
	return true
}

func (e *testEnder) Forget() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	waiting := e.onEnd != nil
	e.onEnd = nil
	return waiting
}

func (e *testEnder) end(cause error) {
	e.cancel(cause)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.onEnd != nil {
		go e.onEnd()
		e.onEnd = nil
	}
}

// cancellable are contexts such as a request may have, and what ends them.
var cancellable = map[string]func(parent context.Context) (context.Context, context.CancelCauseFunc){
	"context": context.WithCancelCause,
	"ender": func(parent context.Context) (context.Context, context.CancelCauseFunc) {
		e := newTestEnder(parent)
		return context.WithValue(e, someKey{}, "a handler's"), e.end
	},
	"ender that another exchange has": func(parent context.Context) (context.Context, context.CancelCauseFunc) {
		e := newTestEnder(parent)
		e.OnEnd(func() {})
		return e, e.end
	},
	"ends before the ender": func(parent context.Context) (context.Context, context.CancelCauseFunc) {
		return context.WithCancelCause(newTestEnder(parent))
	},
}

type someKey struct{}

// TestEnderIsLetGo: an Ender has nothing left to do once an exchange is over, and what comes next has it again.
func TestEnderIsLetGo(t *testing.T) {
	t.Parallel()
	rt := newLean(t)
	b := newBackend(t, func(w *wire) {
		for {
			if _, _, err := w.request(); err != nil {
				return
			}
			w.say(okAnswer)
		}
	})
	e := newTestEnder(t.Context())
	defer e.end(nil)
	for i := range 3 {
		res, err := rt.RoundTrip(newRequest(t, "GET", b.url(), nil).WithContext(e))
		if got := outcome(res, err); got == "error" {
			t.Fatal(err)
		}
		e.mu.Lock()
		if e.onEnd != nil || e.asked != i+1 {
			t.Errorf("after exchange %d: asked %d times, still watching: %v", i, e.asked, e.onEnd != nil)
		}
		e.mu.Unlock()
	}
	if n := b.conns.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
	hangsUp := newBackend(t, func(w *wire) { _, _, _ = w.request() })
	if _, err := rt.RoundTrip(newRequest(t, "GET", hangsUp.url(), nil).WithContext(e)); err == nil {
		t.Error("no error")
	}
	e.mu.Lock()
	if e.onEnd != nil {
		t.Error("still watching after an exchange that failed")
	}
	e.mu.Unlock()
}
