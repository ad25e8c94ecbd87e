package tokens

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io/fs"
	"log/slog"
	"maps"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// hub is a bus between nodes that can be cut.
type hub struct {
	mu  sync.Mutex
	cut bool
	ear map[*busStore]Listener
}

func (h *hub) set(cut bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.cut = cut
	for _, l := range h.ear {
		l.Listening(!cut)
	}
}

func (h *hub) tell(from *busStore, name string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for s, l := range h.ear {
		if s != from && !h.cut {
			l.Changed(name)
		}
	}
}

// busStore is one node's way to a store that all share: a Swapper and a Bus.
type busStore struct {
	*faultStore
	hub *hub
}

func (s *busStore) Store(ctx context.Context, name string, value []byte) error {
	err := s.faultStore.Store(ctx, name, value)
	if err == nil {
		s.hub.tell(s, name)
	}
	return err
}

func (s *busStore) Delete(ctx context.Context, name string) error {
	err := s.faultStore.Delete(ctx, name)
	if err == nil {
		s.hub.tell(s, name)
	}
	return err
}

func (s *busStore) Swap(_ context.Context, name string, old, next []byte) error {
	if err := s.check("store", name); err != nil {
		return err
	}
	m := s.MemStore
	m.mu.Lock()
	held, there := m.records[name]
	ok := there == (old != nil) && bytes.Equal(held, old)
	if ok {
		m.records[name] = bytes.Clone(next)
	}
	m.mu.Unlock()
	if !ok {
		return fmt.Errorf("record %s: %w", name, ErrSwapped)
	}
	s.hub.tell(s, name)
	return nil
}

func (s *busStore) Watch(ctx context.Context, l Listener) {
	s.hub.mu.Lock()
	s.hub.ear[s] = l
	if !s.hub.cut {
		l.Listening(true)
	}
	s.hub.mu.Unlock()
	<-ctx.Done()
	s.hub.mu.Lock()
	delete(s.hub.ear, s)
	s.hub.mu.Unlock()
}

var (
	_ Swapper = (*busStore)(nil)
	_ Bus     = (*busStore)(nil)
)

// cluster is two nodes in a bubble, with tickets, that hear each other.
func cluster(t *testing.T) (a, b *rig, h *hub) {
	t.Helper()
	h = &hub{ear: make(map[*busStore]Listener)}
	a = newRig(t)
	b = &rig{wx: a.wx, store: a.store, log: &logBuffer{}, Manager: NewManager()}
	env := *a.env
	b.env = &env
	b.env.Log = slog.New(slog.NewTextHandler(b.log, nil))
	a.env.Store, b.env.Store = &busStore{a.store, h}, &busStore{a.store, h}
	t.Cleanup(func() {
		b.Close()
		b.noSecretLogged(t)
	})
	a.Use(a.env)
	b.Use(b.env)
	for _, p := range []string{testPlatform, testPlatform2} {
		a.ticket(t, p)
	}
	synctest.Wait()
	return a, b, h
}

// inCluster runs a test with two nodes, after an account has authorised and both have its token at hand.
func inCluster(t *testing.T, test func(t *testing.T, a, b *rig, h *hub)) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a, b, h := cluster(t)
		a.authorize(t, testPlatform, testAuthorizer)
		a.get(t, testAuthKey)
		b.get(t, testAuthKey)
		time.Sleep(time.Minute)
		test(t, a, b, h)
	})
}

func revoke(t *testing.T, r *rig) {
	t.Helper()
	if err := r.Revoke(t.Context(), testPlatform, testAuthorizer, time.Now()); err != nil {
		t.Fatal(err)
	}
}

// atOnce fails if a call took any time.
func atOnce(t *testing.T, call func()) {
	t.Helper()
	start := time.Now()
	call()
	if took := time.Since(start); took > 0 {
		t.Errorf("it took %v", took)
	}
}

func TestRevocationCountsOnAllNodes(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		revoke(t, a)
		atOnce(t, func() {
			if _, err := b.Get(t.Context(), testAuthKey); !errors.Is(err, ErrNotAuthorized) {
				t.Errorf("on the other node: %v", err)
			}
			if known, err := b.Authorized(t.Context(), testAuthorizer); known || err != nil {
				t.Errorf("Authorized: %v, %v", known, err)
			}
			if _, err := b.PlatformOf(t.Context(), testAuthorizer); !errors.Is(err, ErrNotAuthorized) {
				t.Errorf("PlatformOf: %v", err)
			}
		})
	})
}

func TestAuthorizationCountsOnAllNodes(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		a.authorize(t, testPlatform, testAuthorizer)
		want := a.get(t, testAuthKey)
		atOnce(t, func() {
			if got := b.get(t, testAuthKey); !sameToken(got, want) {
				t.Errorf("generation %d on the other node, want %d", got.Generation, want.Generation)
			}
		})
		// One that was never heard of, and that the other node was just asked about.
		const other = "wx00000000000000ee"
		if known, err := b.Authorized(t.Context(), other); known || err != nil {
			t.Fatalf("%v, %v", known, err)
		}
		a.authorize(t, testPlatform, other)
		atOnce(t, func() {
			if known, err := b.Authorized(t.Context(), other); !known || err != nil {
				t.Errorf("a new account on the other node: %v, %v", known, err)
			}
		})
	})
}

// The ticket of an account, too, is worth nothing once the account has gone on another node.
func TestTicketOfARevokedAccountOnAllNodes(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		b.get(t, JSAPIKey(testPlatform, testAuthorizer))
		revoke(t, a)
		if _, err := b.Get(t.Context(), JSAPIKey(testPlatform, testAuthorizer)); !errors.Is(err, ErrNotAuthorized) {
			t.Errorf("jsapi_ticket: %v", err)
		}
	})
}

// Also where the account is not at hand: nothing would be heard of it.
func TestTicketOfARevokedAccountThatIsNotAtHand(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		key := JSAPIKey(testPlatform, testAuthorizer)
		b.get(t, key)
		forget := func() {
			c := b.cache.Load()
			c.entries.Del(maphash.Comparable(c.seed, testAuthKey))
			c.entries.Wait()
		}
		forget()
		b.get(t, key)
		forget()
		revoke(t, a)
		if _, err := b.Get(t.Context(), key); !errors.Is(err, ErrNotAuthorized) {
			t.Errorf("jsapi_ticket: %v", err)
		}
	})
}

func TestOneRefreshForAllNodes(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		a.wx.set(func(f *fakeWeChat) { f.latency, f.rotate, f.strict = 100*time.Millisecond, true, true })
		before := a.wx.count(pathAuthorizerToken)
		var wg sync.WaitGroup
		for minute := range 5 * 60 {
			if minute%10 == 0 {
				a.ticket(t, testPlatform)
			}
			for _, node := range []*rig{a, b} {
				for range 3 {
					wg.Go(func() { node.get(t, testAuthKey) })
				}
			}
			time.Sleep(time.Minute)
		}
		wg.Wait()
		if n := a.wx.count(pathAuthorizerToken) - before; n != 2 {
			t.Errorf("%d refreshes in five hours on two nodes, want 2", n)
		}
	})
}

func TestFreshTokenCostsNoRead(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		before := a.store.count("load")
		for range 1000 {
			a.get(t, testAuthKey)
			b.get(t, testAuthKey)
		}
		if n := a.store.count("load") - before; n != 0 {
			t.Errorf("%d reads for fresh tokens", n)
		}
	})
}

// What was missed counts with the first use after the bus is back.
func TestMissedMessage(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, h *hub) {
		h.set(true)
		revoke(t, a)
		time.Sleep(10 * time.Second)
		h.set(false)
		synctest.Wait()
		before := a.store.count("load")
		atOnce(t, func() {
			if _, err := b.Get(t.Context(), testAuthKey); !errors.Is(err, ErrNotAuthorized) {
				t.Errorf("after the bus is back: %v", err)
			}
		})
		if n := a.store.count("load") - before; n > 1 {
			t.Errorf("%d reads", n)
		}
	})
}

// While nothing is heard, an account in use is looked at once a second, behind its uses.
func TestDeafNode(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, h *hub) {
		h.set(true)
		revoke(t, a)
		atOnce(t, func() { b.get(t, testAuthKey) })
		synctest.Wait()
		if _, err := b.Get(t.Context(), testAuthKey); !errors.Is(err, ErrNotAuthorized) {
			t.Errorf("the next use: %v", err)
		}
		a.authorize(t, testPlatform, testAuthorizer)
		a.get(t, testAuthKey)
		time.Sleep(absentRecheck)
		b.get(t, testAuthKey)
		synctest.Wait()
		before := a.store.count("load")
		for range 100 {
			b.get(t, testAuthKey)
			time.Sleep(100 * time.Millisecond)
		}
		if n := a.store.count("load") - before; n < 9 || n > 11 {
			t.Errorf("%d reads in ten seconds, want 10", n)
		}
	})
}

// A store that is away, hangs, or comes back empty does not cost a live token.
func TestStoreAwayServesOn(t *testing.T) {
	hang := func(string, string) { time.Sleep(time.Hour) }
	for name, tt := range map[string]struct {
		deaf bool
		fail func(op, name string) error
		hold func(op, name string)
		most time.Duration // a use waits
	}{
		"fails":            {deaf: true, fail: failAll},
		"hangs":            {deaf: true, hold: hang},
		"fails, bus back":  {fail: failAll},
		"hangs, bus back":  {hold: hang, most: checkWait},
		"empty, bus back":  {},
		"empty, bus never": {deaf: true},
	} {
		t.Run(name, func(t *testing.T) {
			inCluster(t, func(t *testing.T, a, b *rig, h *hub) {
				want := b.get(t, testAuthKey)
				h.set(true)
				a.store.empty()
				if !tt.deaf {
					h.set(false)
				}
				a.store.fail(tt.fail)
				a.store.hold(tt.hold)
				for i := range 100 {
					start := time.Now()
					got := b.get(t, testAuthKey)
					if took := time.Since(start); took > tt.most || took > 0 && i > 0 {
						t.Errorf("use %d waited %v", i, took)
					}
					if !sameToken(got, want) {
						t.Fatalf("use %d: another token", i)
					}
					time.Sleep(100 * time.Millisecond)
				}
				a.store.fail(nil)
				a.store.hold(nil)
				time.Sleep(2 * time.Hour) // until what hangs has ended
			})
		})
	}
}

// What another node could do, this one may try again at once.
func TestNewsEndsBackoff(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		time.Sleep(3 * time.Hour)
		a.ticket(t, testPlatform)
		b.wx.set(func(f *fakeWeChat) {
			f.hook = func(path string, _ map[string]any) (string, error) {
				if path == pathAuthorizerToken {
					return wxError(-1, "system error"), nil
				}
				return "", nil
			}
		})
		for range 4 {
			_, _ = b.Get(t.Context(), testAuthKey)
		}
		if _, err := b.Get(t.Context(), testAuthKey); !errors.Is(err, ErrBackoff) {
			t.Fatalf("%v, want ErrBackoff", err)
		}
		a.wx.set(func(f *fakeWeChat) { f.hook = nil })
		want := a.get(t, testAuthKey)
		atOnce(t, func() {
			if got := b.get(t, testAuthKey); !sameToken(got, want) {
				t.Error("not the other node's token")
			}
		})
	})
}

// Two nodes that both believe to have the lock: the one that comes later does not undo what the other wrote.
func TestLostLockUndoesNothing(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		a.store.fail(func(op, _ string) error {
			if op == "lock" {
				return errDisk // both go on without it
			}
			return nil
		})
		var begun atomic.Bool
		a.store.hold(func(op, name string) {
			if op == "store" && name == testAuthKey.recordName() && begun.CompareAndSwap(false, true) {
				b.authorize(t, testPlatform, testAuthorizer)
			}
		})
		if _, err := a.Renew(t.Context(), testAuthKey, a.get(t, testAuthKey).Value); err != nil {
			t.Fatal(err)
		}
		rec := a.stored(t, testAuthKey)
		a.wx.set(func(f *fakeWeChat) {
			if rec.RefreshToken.Reveal() != f.refresh[testAuthorizer] {
				t.Error("the renewal wrote over the new authorization")
			}
		})
		if got := a.get(t, testAuthKey); !got.Value.Same(rec.AccessToken) {
			t.Error("the node serves another token than the store has")
		}
	})
}

// A node sleeps in the middle of a renewal until its lock has gone to another one, which renews: it has the other's token
// when it goes on, although its own call to WeChat fails.
func TestRenewalThatWasSleptThrough(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		a.store.fail(func(op, _ string) error {
			if op == "lock" {
				return errDisk // as good as lost
			}
			return nil
		})
		before := a.get(t, testAuthKey)
		var begun atomic.Bool
		renewed := make(chan struct{}) // by the other node
		a.wx.set(func(f *fakeWeChat) {
			f.rotate, f.strict = true, true
			f.hook = func(path string, _ map[string]any) (string, error) {
				if path != pathAuthorizerToken || !begun.CompareAndSwap(false, true) {
					return "", nil
				}
				defer close(renewed)
				if _, err := b.Renew(t.Context(), testAuthKey, before.Value); err != nil {
					t.Errorf("the other node: %v", err)
				}
				return "", errDisk
			}
		})
		got, err := a.Renew(t.Context(), testAuthKey, before.Value)
		if err != nil || !sameToken(got, b.get(t, testAuthKey)) {
			t.Errorf("generation %d, %v; the other node has generation %d", got.Generation, err, b.get(t, testAuthKey).Generation)
		}
		<-renewed // this node had its token as soon as it was stored
		if n := a.wx.count(pathAuthorizerToken); n != 2 {
			t.Errorf("WeChat was asked %d times, want 2", n)
		}
	})
}

func TestOlderTicketNeverWins(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		older := Ticket{secret.New("ticket@@@older"), time.Now().Add(time.Minute)}
		newer := Ticket{secret.New("ticket@@@newer"), time.Now().Add(2 * time.Minute)}
		var begun atomic.Bool
		a.store.hold(func(op, name string) {
			if op == "store" && name == ticketName(testPlatform) && begun.CompareAndSwap(false, true) {
				if err := b.PutTicket(t.Context(), testPlatform, newer); err != nil {
					t.Error(err)
				}
			}
		})
		if err := a.PutTicket(t.Context(), testPlatform, older); err != nil {
			t.Fatal(err)
		}
		for _, node := range []*rig{a, b} {
			if got, err := node.Ticket(t.Context(), testPlatform); err != nil || !got.Value.Same(newer.Value) {
				t.Errorf("not the newer ticket (%v)", err)
			}
		}
	})
}

// The age of a ticket is that of the newest on a node too that WeChat does not push to, and not up to 25 minutes more.
func TestAgeOfATicketOnAnotherNode(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		for range 3 {
			time.Sleep(10 * time.Minute)
			a.ticket(t, testPlatform)
			synctest.Wait()
			if came := b.TicketReceived(testPlatform); !came.Equal(a.TicketReceived(testPlatform)) {
				t.Errorf("on the other node it is %s old", time.Since(came))
			}
		}
	})
}

// A node reads that there is no ticket, another one is given it, and only then the first one takes note of what it read.
func TestTicketThatComesDuringARead(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		time.Sleep(ticketLife)
		synctest.Wait() // no job of b's is about to look
		var begun, stored atomic.Bool
		returned := make(chan struct{})
		b.store.fail(func(op, name string) error {
			switch {
			case name != ticketName(testPlatform):
			case op == "store":
				stored.Store(true)
			case op == "load" && begun.CompareAndSwap(false, true):
				a.ticket(t, testPlatform)
				return fs.ErrNotExist // as it was before
			case op == "load" && stored.Load(): // b has heard of it and looks as well, which would tell the read below
				<-returned
			}
			return nil
		})
		_, err := b.Ticket(t.Context(), testPlatform)
		close(returned)
		if !errors.Is(err, ErrNoTicket) {
			t.Fatalf("%v, want ErrNoTicket", err)
		}
		atOnce(t, func() { b.get(t, testAuthKey) })
	})
}

// A replica takes over that had not got the last writes.
func TestLostLastWrites(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, h *hub) {
		a.store.MemStore.mu.Lock()
		backup := maps.Clone(a.store.records)
		a.store.MemStore.mu.Unlock()
		a.wx.set(func(f *fakeWeChat) { f.strict = true })
		a.authorize(t, testPlatform, testAuthorizer)
		if err := b.PutTicket(t.Context(), testPlatform, Ticket{secret.New("ticket@@@late"), time.Now()}); err != nil {
			t.Fatal(err)
		}
		a.wx.set(func(f *fakeWeChat) {
			f.hook = func(path string, _ map[string]any) (string, error) {
				if path == pathQueryAuth {
					return "", errors.New("down")
				}
				return "", nil
			}
		})
		if err := a.Accept(t.Context(), a.push(a.newCode(testAuthorizer))); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()

		h.set(true)
		a.store.MemStore.mu.Lock()
		a.store.records = backup
		a.store.MemStore.mu.Unlock()
		h.set(false)
		synctest.Wait()
		rec := a.stored(t, testAuthKey)
		a.wx.set(func(f *fakeWeChat) {
			if rec.RefreshToken.Reveal() != f.refresh[testAuthorizer] {
				t.Error("the refresh token is lost")
			}
		})
		if a.intents(t) != 1 {
			t.Error("the accepted authorization is lost")
		}
		var ticket ticketWire
		if err := a.loadRecord(t.Context(), a.env.prepared(), ticketName(testPlatform), &ticket); err != nil || ticket.Ticket != "ticket@@@late" {
			t.Errorf("the ticket is lost (%v)", err)
		}
		if n := a.Unsaved() + b.Unsaved(); n != 0 {
			t.Errorf("%d unsaved", n)
		}
		a.wx.set(func(f *fakeWeChat) { f.hook = nil })
		time.Sleep(2 * time.Minute)
	})
}

// A node accepts an authorization and dies for good: another one finishes it.
func TestAnotherNodeTakesOver(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		a.wx.set(func(f *fakeWeChat) {
			f.hook = func(path string, _ map[string]any) (string, error) {
				if path == pathQueryAuth {
					return "", errors.New("down")
				}
				return "", nil
			}
		})
		const other = "wx00000000000000ee"
		in := a.push(a.newCode(other))
		in.AppID = other
		if err := a.Accept(t.Context(), in); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		a.Close()
		a.wx.set(func(f *fakeWeChat) { f.hook = nil })
		time.Sleep(takeOverAfter + time.Second)
		if _, err := b.Get(t.Context(), AuthorizerKey(testPlatform, other)); err != nil {
			t.Errorf("the account: %v", err)
		}
		if n := b.intents(t); n != 0 {
			t.Errorf("%d intents are left", n)
		}
	})
}

// A reload that leads to another store listens there.
func TestListenOnTheStoreInForce(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, h *hub) {
		env := *b.env
		env.Store = &busStore{b.store, h}
		b.Use(&env)
		synctest.Wait()
		h.mu.Lock()
		ears := len(h.ear)
		h.mu.Unlock()
		if ears != 2 {
			t.Errorf("%d listen, want 2", ears)
		}
		b.Use(&env) // the same again
		revoke(t, a)
		if _, err := b.Get(t.Context(), testAuthKey); !errors.Is(err, ErrNotAuthorized) {
			t.Errorf("%v", err)
		}
		plain := env
		plain.Store = b.store
		b.Use(&plain)
		synctest.Wait()
		if b.hearingSince() != 0 {
			t.Error("it is waited for a bus that there is none of")
		}
	})
}

func TestKeyOfItsRecord(t *testing.T) {
	t.Parallel()
	keys := []Key{
		ComponentKey("wx1"), AccountKey("wx2"), AuthorizerKey("wx1", "wx3"), JSAPIKey("wx1", "wx3"), JSAPIKey("", "wx2"),
		CardKey("wx1", "wx3"), CardKey("", "wx2"), AuthorizerKey("WX/1", "x-y"), AccountKey("x-6162"), AccountKey("gh_A"),
	}
	for _, k := range keys {
		if got, ok := keyOf(k.recordName()); !ok || got != k {
			t.Errorf("keyOf(%q) = %v, %v", k.recordName(), got, ok)
		}
	}
	for _, name := range []string{
		"", root, root + "/", root + "/account", root + "/account/wx1/x", root + "/authorizer/wx1/00/wx3", root + "/account/X",
		ticketName("wx1"), intentName("00"), opaqueName, AccountKey("wx1").recordName() + renewalLock, root + "/account/x-zz",
	} {
		if k, ok := keyOf(name); ok {
			t.Errorf("keyOf(%q) = %v", name, k)
		}
	}
	if p, ok := ticketPlatform(ticketName("wx1")); !ok || p != "wx1" {
		t.Errorf("ticketPlatform = %q, %v", p, ok)
	}
	if _, ok := ticketPlatform(AccountKey("wx1").recordName()); ok {
		t.Error("an account's record passes for a ticket")
	}
}
