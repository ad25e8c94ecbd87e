package tokens

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

const (
	// stallsFor is shorter than storeTimeout, which nobody waits longer for, and leaseLife is that of Redis.
	stallsFor = 2 * time.Second
	doneAfter = 5 * time.Second
	leaseLife = 10 * time.Second
)

// breakingNode is one node's way to a store that others share, and that does all that Redis does.
type breakingNode struct {
	*breakingStore
	shared *busStore
	fences *fences
	own    fences // of the locks that this node holds
}

// fences are the numbers of the locks that were given last, by their names.
type fences struct {
	mu   sync.Mutex
	last map[string]int
}

func (f *fences) get(name string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.last[name]
}

func (f *fences) set(name string, fence int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.last == nil {
		f.last = make(map[string]int)
	}
	f.last[name] = fence
}

func newBreakingNode(store *faultStore, h *hub, f *fences) *breakingNode {
	bus := &busStore{store, h}
	return &breakingNode{breakingStore: &breakingStore{records: bus, left: -1}, shared: bus, fences: f}
}

// write makes a change of a record, unless it is made under a lock that is another's by now.
func (s *breakingNode) write(ctx context.Context, name string, change func(context.Context) error) error {
	fence := s.own.get(name)
	ctx = context.WithoutCancel(ctx)
	return s.operate(func() error {
		if fence != 0 && fence != s.fences.get(name) {
			return ErrLockLost
		}
		return change(ctx)
	})
}

func (s *breakingNode) Swap(ctx context.Context, name string, old, next []byte) error {
	return s.write(ctx, name, func(ctx context.Context) error { return s.shared.Swap(ctx, name, old, next) })
}

func (s *breakingNode) Store(ctx context.Context, name string, value []byte) error {
	return s.write(ctx, name, func(ctx context.Context) error { return s.shared.Store(ctx, name, value) })
}

func (s *breakingNode) Delete(ctx context.Context, name string) error {
	return s.write(ctx, name, func(ctx context.Context) error { return s.shared.Delete(ctx, name) })
}

func (s *breakingNode) Watch(ctx context.Context, l Listener) { s.shared.Watch(ctx, l) }

// Lock leaves a lock of a process that is killed until its lease ends.
func (s *breakingNode) Lock(ctx context.Context, name string) (func(), error) {
	unlock, err := s.breakingStore.Lock(ctx, name)
	if err != nil && errors.Is(err, context.DeadlineExceeded) {
		return nil, fmt.Errorf("%w: %w", ErrLockHeld, err)
	}
	if err != nil {
		return nil, err
	}
	fence := s.fences.get(name) + 1
	s.fences.set(name, fence)
	s.own.set(name, fence)
	return func() {
		s.own.set(name, 0)
		if s.killed() {
			time.AfterFunc(leaseLife, unlock)
			return
		}
		unlock()
	}, nil
}

func (s *breakingNode) Claim(ctx context.Context, name string, value []byte, ttl time.Duration) (held []byte, first bool, err error) {
	err = s.operate(func() (err error) { held, first, err = s.shared.Claim(ctx, name, value, ttl); return err })
	return held, first, err
}

func (s *breakingNode) Put(ctx context.Context, name string, value []byte, ttl time.Duration) error {
	return s.operate(func() error { return s.shared.Put(ctx, name, value, ttl) })
}

func (s *breakingNode) Replace(ctx context.Context, name string, value []byte) error {
	return s.operate(func() error { return s.shared.Replace(ctx, name, value) })
}

func (s *breakingNode) Peek(ctx context.Context, name string) (value []byte, err error) {
	err = s.operate(func() (err error) { value, err = s.shared.Peek(ctx, name); return err })
	return value, err
}

func (s *breakingNode) Take(ctx context.Context, name string) (value []byte, err error) {
	err = s.operate(func() (err error) { value, err = s.shared.Take(ctx, name); return err })
	return value, err
}

var (
	_ Swapper   = (*breakingNode)(nil)
	_ Bus       = (*breakingNode)(nil)
	_ Ephemeral = (*breakingNode)(nil)
)

// mortal is the way of a process to WeChat, which ends with it.
type mortal struct {
	http.RoundTripper
	breaking *breakingStore
}

func (m mortal) RoundTrip(r *http.Request) (*http.Response, error) {
	if m.breaking.killed() {
		return nil, errors.New("nobody is there to ask")
	}
	return m.RoundTripper.RoundTrip(r)
}

// newBrokenNodes are two gateways on a store, of which one's way to it goes wrong.
func newBrokenNodes(t *testing.T) (a, b *brokenOff) {
	t.Helper()
	h, f := &hub{ear: make(map[*busStore]Listener)}, new(fences)
	first := newRig(t)
	events := new(receiver)
	node := func(r *rig) *brokenOff {
		way := newBreakingNode(first.store, h, f)
		n := &brokenOff{rig: r, breaking: way.breakingStore, events: events}
		client, err := NewClient(ClientOptions{Transport: mortal{first.wx, n.breaking}})
		if err != nil {
			t.Fatal(err)
		}
		env := *first.env
		env.Store, env.RosterEvery, env.Forward, env.Platforms, env.API = way, rosterEvery, n.forward, first.env.Platforms[:1], client
		env.Log = slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
		r.env = &env
		return n
	}
	second := &rig{Manager: NewManager(), wx: first.wx, store: first.store, log: &logBuffer{}}
	t.Cleanup(func() {
		second.Close()
		second.noSecretLogged(t)
	})
	a, b = node(first), node(second)
	a.wx.rotate, a.wx.strict = true, true
	a.wx.hook = func(path string, body map[string]any) (string, error) {
		var hook func(string, map[string]any) (string, error)
		a.wx.set(func(*fakeWeChat) { hook = a.wechat })
		if hook != nil {
			return hook(path, body)
		}
		return "", nil
	}
	a.Use(a.env)
	b.Use(b.env)
	a.ticket(t, testPlatform)
	a.live(t, time.Minute)
	b.live(t, time.Minute)
	return a, b
}

// inBrokenNodes runs an operation that is broken off on one of two nodes, after so many operations of the store, and done by the other one
// at that moment. It returns how many there were.
func inBrokenNodes(t *testing.T, op brokenOperation, how breakage, after int) (operations int) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newBrokenNodes(t)
		if op.before != nil {
			op.before(t, a)
		}
		_, _ = b.Get(t.Context(), testAuthKey)
		synctest.Wait()
		others := make(chan error, 1)
		a.breaking.arm(how, after)
		a.breaking.onceBroken(func() { go func() { others <- op.act(t, b) }() })
		err := op.act(t, a)
		time.Sleep(time.Second)
		synctest.Wait()
		operations = a.breaking.operations()
		if a.breaking.killed() {
			a.Close()
		}
		if after >= 0 {
			select {
			case err = <-others:
			case <-time.After(20 * time.Minute):
				t.Error("the other node hangs")
			}
		}
		for range 10 {
			if err == nil {
				break
			}
			time.Sleep(5 * time.Second)
			err = op.act(t, b)
		}
		if err != nil {
			t.Errorf("it is refused: %v", err)
		}
		b.wx.set(func(*fakeWeChat) { a.wechat = nil })
		b.live(t, 70*time.Minute)
		b.agree(t, op)
		if a.breaking.killed() {
			a.revive()
		}
		a.live(t, time.Minute)
		a.agree(t, op)
		if op.after != nil {
			op.after(t, a)
			op.after(t, b)
		}
		b.agree(t, op)
		a.revive()
		b.revive()
		a.live(t, time.Minute)
		a.agree(t, op)
		b.agree(t, op)
		if t.Failed() {
			t.Log(a.log.String())
			t.Log(b.log.String())
		}
	})
	return operations
}

// What two nodes do at once agrees in the end, wherever it was broken off on one of them.
func TestBrokenNode(t *testing.T) {
	t.Parallel()
	for name, op := range brokenOperations() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			breakAt(t, 10, func(t *testing.T, how breakage, after int) int { return inBrokenNodes(t, op(), how, after) },
				breaksDown, breaks, breaksAfter, breaksLate, stalls)
		})
	}
}
