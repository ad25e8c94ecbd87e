package storetest

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// heardWithin is how soon another node must hear of a change.
const heardWithin = time.Second

// ear is a tokens.Listener that remembers.
type ear struct {
	mu    sync.Mutex
	on    bool
	times int // it began to listen
	names []string
}

func (e *ear) Listening(on bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.on = on; on {
		e.times++
	}
}

func (e *ear) Changed(name string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.names = append(e.names, name)
}

func (e *ear) listening() bool { e.mu.Lock(); defer e.mu.Unlock(); return e.on }

func (e *ear) heard(name string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Contains(e.names, name)
}

// RunBus tests stores that are a tokens.Bus. Each call of open returns two nodes of a new, empty one.
func RunBus(t *testing.T, open func() (a, b tokens.Store)) {
	t.Helper()
	t.Run("changes are heard", func(t *testing.T) {
		t.Parallel()
		a, b := open()
		here, there := watch(t, a), watch(t, b)
		until(t, "both listen", func() bool { return here.listening() && there.listening() })
		const stored, swapped, gone = "wechat/v1/bus/stored", "wechat/v1/bus/sw{a}pped %", "wechat/v1/bus/gone"
		changes := []struct {
			name string
			make func()
		}{
			{stored, func() { mustStore(t, a, stored, []byte("x")) }},
			{gone, func() { mustStore(t, a, gone, []byte("x")) }},
			{swapped, func() {
				if s, ok := a.(tokens.Swapper); !ok {
					mustStore(t, a, swapped, []byte("x"))
				} else if err := s.Swap(t.Context(), swapped, nil, []byte("x")); err != nil {
					t.Error(err)
				}
			}},
			{gone, func() {
				if err := a.Delete(t.Context(), gone); err != nil {
					t.Error(err)
				}
			}},
		}
		for _, change := range changes {
			there.mu.Lock()
			there.names = nil
			there.mu.Unlock()
			start := time.Now()
			change.make()
			until(t, "it is heard", func() bool { return there.heard(change.name) })
			if took := time.Since(start); took > heardWithin {
				t.Errorf("%s was heard of after %v", change.name, took)
			}
		}
		if here.heard(stored) || here.heard(swapped) {
			t.Error("a node hears of its own changes")
		}
	})
	t.Run("a watch ends", func(t *testing.T) {
		t.Parallel()
		a, _ := open()
		ctx, cancel := context.WithCancel(t.Context())
		e, ended := new(ear), make(chan struct{})
		go func() { a.(tokens.Bus).Watch(ctx, e); close(ended) }()
		until(t, "it listens", e.listening)
		cancel()
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			t.Fatal("it goes on")
		}
		if e.listening() {
			t.Error("it says that it still listens")
		}
	})
}

// watch listens on a store until the test ends.
func watch(t *testing.T, s tokens.Store) *ear {
	ctx, cancel := context.WithCancel(context.Background())
	e := new(ear)
	var wg sync.WaitGroup
	wg.Go(func() { s.(tokens.Bus).Watch(ctx, e) })
	t.Cleanup(func() { cancel(); wg.Wait() })
	return e
}
