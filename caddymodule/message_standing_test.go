package caddymodule

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// claimsOn are the claims of one node on a store, ended with the test. They are made in a bubble of synctest.
func claimsOn(t *testing.T, store tokens.Store) *claims {
	t.Helper()
	c := newClaims(newCallTable(nil), prometheus.NewGauge(prometheus.GaugeOpts{Name: "degraded"}))
	c.use(&tokens.Environment{Store: store})
	t.Cleanup(func() { // also while a message is in flight, as at the end of the process
		c.close()
		if c.cancel != nil {
			c.cancel()
		}
		c.work.Wait()
	})
	return c
}

// put puts a standing into a store, and returns it as it is read.
func (s *standing) put(t *testing.T, store *tokens.MemStore, id pushID) standing {
	t.Helper()
	list := []tokens.Claim{{Name: id.name(), Value: s.encode(), TTL: s.life}}
	if err := store.ClaimAll(list, claimWait); err != nil || !list[0].First {
		t.Fatalf("the claim is there already, %v", err)
	}
	return *s
}

// TestStandingSteps: what each step makes of a claim that another node may have changed meanwhile.
func TestStandingSteps(t *testing.T) {
	t.Parallel()
	const me, other, third = "me", "other", "third"
	var id pushID
	taking := func(from standing) func(*claims) {
		return func(c *claims) { _, _ = c.takeOver(id, from) }
	}
	from := standing{owner: other, run: 1, state: claimRunning}
	giveUp := func(c *claims) { _, _ = c.giveUp(id) }
	deliver := func(c *claims) { _, _ = c.deliver(id) }
	unclaim := func(c *claims) { c.unclaim(id) }
	release := func(c *claims) { c.release(id) }
	begunHere := func(c *claims) { c.calls.arrive(id, time.Now(), 0, 0, pace{3, defaultReplyTimeout}); c.release(id) }
	arrive := func(c *claims) { _, _ = c.arrive(id, time.Hour, "12345678") }
	look := func(c *claims) {
		_, _ = c.look(id, standing{owner: other, life: time.Hour, left: time.Hour, count: 2, run: 1}, time.Hour)
	}
	for name, tt := range map[string]struct {
		held *standing // nil: the store knows none
		step func(*claims)
		want standing
	}{
		"taken over":                     {&standing{owner: other, count: 2, run: 1, state: claimRunning}, taking(from), standing{owner: me, count: 2, run: 2, state: claimRunning}},
		"taken over by a third":          {&standing{owner: third, count: 2, run: 2, state: claimRunning}, taking(from), standing{owner: third, count: 2, run: 2, state: claimRunning}},
		"taken over and back":            {&standing{owner: other, count: 2, run: 2, state: claimRunning}, taking(from), standing{owner: other, count: 2, run: 2, state: claimRunning}},
		"taken over too often":           {&standing{owner: other, count: 2, run: maxRuns, state: claimRunning}, taking(standing{owner: other, run: maxRuns}), standing{owner: other, count: 2, run: maxRuns, state: claimRunning}},
		"taken over when answered":       {&standing{owner: other, count: 2, run: 1, state: claimAnswered}, taking(from), standing{owner: other, count: 2, run: 1, state: claimAnswered}},
		"taken over when free":           {&standing{owner: third, count: 2, run: 1, state: claimFree}, taking(from), standing{owner: me, count: 2, run: 1, state: claimRunning}},
		"given up":                       {&standing{owner: other, count: 3, run: 1, state: claimRunning}, giveUp, standing{owner: other, count: 3, run: 1, state: claimLate}},
		"given up when answered":         {&standing{owner: other, count: 3, run: 1, state: claimAnswered}, giveUp, standing{owner: other, count: 3, run: 1, state: claimAnswered}},
		"given up when delivered":        {&standing{owner: other, count: 3, run: 1, state: claimDelivered}, giveUp, standing{owner: other, count: 3, run: 1, state: claimDelivered}},
		"delivered":                      {&standing{owner: other, count: 2, run: 1, state: claimAnswered}, deliver, standing{owner: other, count: 2, run: 1, state: claimDelivered}},
		"delivered when late":            {&standing{owner: other, count: 2, run: 1, state: claimLate}, deliver, standing{owner: other, count: 2, run: 1, state: claimLate}},
		"delivered when running":         {&standing{owner: other, count: 2, run: 1, state: claimRunning}, deliver, standing{owner: other, count: 2, run: 1, state: claimRunning}},
		"unclaimed":                      {&standing{owner: me, count: 1, run: 1, state: claimRunning}, unclaim, standing{owner: me, count: 0, run: 1, state: claimFree}},
		"unclaimed when it came again":   {&standing{owner: me, count: 2, run: 1, state: claimRunning}, unclaim, standing{owner: me, count: 2, run: 1, state: claimRunning}},
		"unclaimed, another node's":      {&standing{owner: other, count: 1, run: 1, state: claimRunning}, unclaim, standing{owner: other, count: 1, run: 1, state: claimRunning}},
		"released":                       {&standing{owner: me, count: 1, run: 1, state: claimRunning}, release, standing{owner: me, count: 1, run: 1, state: claimFree}},
		"released, another node's":       {&standing{owner: other, count: 1, run: 1, state: claimRunning}, release, standing{owner: other, count: 1, run: 1, state: claimRunning}},
		"released, begun meanwhile":      {&standing{owner: me, count: 1, run: 1, state: claimRunning}, begunHere, standing{owner: me, count: 1, run: 1, state: claimRunning}},
		"came again":                     {&standing{owner: other, count: 1, run: 1, state: claimRunning}, arrive, standing{owner: other, count: 2, run: 1, state: claimRunning, mark: "12345678"}},
		"came again, counted before":     {&standing{owner: other, count: 2, run: 1, state: claimRunning, mark: "12345678"}, arrive, standing{owner: other, count: 2, run: 1, state: claimRunning, mark: "12345678"}},
		"came again, never begun":        {&standing{owner: other, count: 1, run: 1, state: claimFree}, arrive, standing{owner: me, count: 2, run: 1, state: claimRunning, mark: "12345678"}},
		"came again, and is gone":        {nil, arrive, standing{owner: me, count: 1, run: 1, state: claimRunning}},
		"looked at":                      {&standing{owner: other, count: 2, run: 1, state: claimAnswered}, look, standing{owner: other, count: 2, run: 1, state: claimAnswered}},
		"looked at in an emptied store":  {nil, look, standing{owner: me, count: 2, run: 2, state: claimRunning}},
		"a step of what the store lacks": {nil, giveUp, standing{}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				store := tokens.NewMemStore()
				c := claimsOn(t, store)
				c.node = me
				if tt.held != nil {
					held := *tt.held
					held.life = time.Hour
					held.put(t, store, id)
				}
				tt.step(c)
				got, err := c.peek(id)
				if (err != nil) != (tt.want == standing{}) {
					t.Fatal(err)
				}
				got.life, got.left = 0, 0
				if got != tt.want {
					t.Errorf("the claim says %+v, want %+v", got, tt.want)
				}
			})
		})
	}
}

// TestNodeIsDead: a node counts as dead once nothing was seen of it for a while, and no longer than it is gone.
func TestNodeIsDead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := tokens.NewMemStore()
		c := claimsOn(t, store)
		look := func(want bool, when string) {
			t.Helper()
			if c.dead("other") != want {
				t.Errorf("%s: dead: %v", when, !want)
			}
		}
		beat := func() {
			t.Helper()
			if err := store.Beat(t.Context(), "other", time.Second); err != nil {
				t.Fatal(err)
			}
		}
		die := func() { // it has been looked for meanwhile
			t.Helper()
			for range 3 {
				look(false, "not seen for a moment")
				time.Sleep(deadAfter / 3)
			}
		}
		die()
		look(true, "not seen for long")
		look(true, "at once again")
		beat()
		look(false, "back from the dead")
		time.Sleep(time.Second)
		die()
		look(true, "gone again")
		time.Sleep(2 * deadAfter)
		look(false, "not looked for meanwhile: it may have been there")
		time.Sleep(peerEvery)
		look(false, "not seen for a moment after that")
		if c.dead(c.node) {
			t.Error("this node is dead")
		}
	})
}

// TestClaimJobs: what other nodes ask for is done by so many at once, and however often.
func TestClaimJobs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := claimsOn(t, tokens.NewMemStore())
		var mu sync.Mutex
		done := 0
		gate := make(chan struct{})
		for range 3 {
			for range 2 * maxClaimJobs {
				c.job(func() {
					<-gate
					mu.Lock()
					defer mu.Unlock()
					done++
				})
			}
			for range maxClaimJobs {
				gate <- struct{}{}
			}
			synctest.Wait()
		}
		if done != 3*maxClaimJobs {
			t.Errorf("%d were done", done)
		}
	})
}

// TestClaimsOfAnotherStore: on the store of a new configuration a node shows that it lives, and hears.
func TestClaimsOfAnotherStore(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		before, after := tokens.NewMemStore(), tokens.NewMemStore()
		c := claimsOn(t, before)
		lives := func(store *tokens.MemStore) bool {
			t.Helper()
			alive, err := store.Lives(t.Context(), c.node)
			if err != nil {
				t.Fatal(err)
			}
			return alive
		}
		if c.shared() == nil {
			t.Fatal("no store")
		}
		synctest.Wait()
		if !lives(before) || lives(after) {
			t.Fatalf("lives on the one: %v, on the other: %v", lives(before), lives(after))
		}
		c.use(&tokens.Environment{Store: after})
		time.Sleep(2 * beatLife)
		if lives(before) || !lives(after) {
			t.Errorf("after the change it lives on the one: %v, on the other: %v", lives(before), lives(after))
		}
		id := pushID{1}
		signal, stop := c.await(id)
		defer stop()
		if err := after.Tell(t.Context(), c.node, "a "+id.name()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		select {
		case <-signal:
		default:
			t.Error("it does not hear there")
		}
	})
}

// TestWantedByAnother: a node that is asked for a message says how far that is, also of one that it has forgotten.
func TestWantedByAnother(t *testing.T) {
	t.Parallel()
	answer := passiveReply{outcome: outcomePlain, body: []byte("a")}
	for name, tt := range map[string]struct {
		age  time.Duration // of the claim
		here func(*callTable, *call)
		want byte
	}{
		"answered": {0, func(t *callTable, c *call) { t.finish(c, answer, time.Now()) }, claimAnswered},
		"delivered": {0, func(t *callTable, c *call) {
			t.finish(c, answer, time.Now())
			t.deliver(c)
		}, claimDelivered},
		"late": {0, func(t *callTable, c *call) {
			t.giveUp(c)
			t.finish(c, answer, time.Now())
		}, claimLate},
		"never begun":        {0, func(t *callTable, c *call) { t.abandon(c, time.Now()) }, claimFree},
		"running":            {0, func(*callTable, *call) {}, claimRunning},
		"forgotten":          {forgottenAfter + time.Second, nil, claimAnswered},
		"not yet begun here": {forgottenAfter - time.Second, nil, claimRunning},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				store := tokens.NewMemStore()
				c := claimsOn(t, store)
				if c.shared() == nil {
					t.Fatal("no store")
				}
				var mu sync.Mutex
				var heard []string
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				go store.Hear(ctx, "other", func(message string) {
					mu.Lock()
					defer mu.Unlock()
					heard = append(heard, message)
				})
				synctest.Wait() // until it listens
				id := pushID{1}
				(&standing{owner: c.node, life: time.Hour, count: 1, run: 1, state: claimRunning}).put(t, store, id)
				time.Sleep(tt.age)
				if tt.here != nil {
					a := c.calls.arrive(id, time.Now(), 0, time.Now().Unix()+300, pace{3, defaultReplyTimeout})
					c.calls.own(a.call, 1)
					tt.here(c.calls, a.call)
					c.calls.leaveNow(a.call)
				}
				c.wantedBy(id, "other")
				synctest.Wait()
				if s, err := c.peek(id); err != nil || s.state != tt.want {
					t.Errorf("the claim says %q, %v; want %q", s.state, err, tt.want)
				}
				mu.Lock()
				defer mu.Unlock()
				told := []string{"a " + id.name()}
				if tt.want == claimRunning && tt.here != nil {
					told = nil // it hears once there is something to hear
				}
				if !slices.Equal(heard, told) {
					t.Errorf("the other node heard %s", strings.Join(heard, ", "))
				}
			})
		})
	}
}

// TestAnswerThatGoesAnotherWay: the customer-service API has an answer that no push got, on whichever node, and only of a message
// that is this node's still.
func TestAnswerThatGoesAnotherWay(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		held             standing
		run              int // that this node began
		look             bool
		delivered, taken bool
		want             byte
	}{
		"running":           {standing{owner: "me", run: 1, state: claimRunning}, 1, false, false, false, claimLate},
		"answered":          {standing{owner: "me", run: 1, state: claimAnswered}, 1, false, false, false, claimLate},
		"only looked at":    {standing{owner: "me", run: 1, state: claimAnswered}, 1, true, false, false, claimAnswered},
		"delivered":         {standing{owner: "me", run: 1, state: claimDelivered}, 1, false, true, false, claimDelivered},
		"another node's":    {standing{owner: "other", run: 2, state: claimRunning}, 1, false, false, true, claimRunning},
		"of a later run":    {standing{owner: "me", run: 2, state: claimRunning}, 1, false, false, true, claimRunning},
		"not shared":        {standing{owner: "me", run: 1, state: claimRunning}, 0, false, false, false, claimRunning},
		"looked at, theirs": {standing{owner: "other", run: 2, state: claimAnswered}, 1, true, false, true, claimAnswered},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				store := tokens.NewMemStore()
				c := claimsOn(t, store)
				c.node = "me"
				id := pushID{1}
				tt.held.life, tt.held.count = time.Hour, 1
				tt.held.put(t, store, id)
				a := c.calls.arrive(id, time.Now(), 0, 0, pace{3, defaultReplyTimeout})
				if tt.run > 0 {
					c.calls.own(a.call, tt.run)
				}
				if delivered, taken := c.forsake(a.call, !tt.look); delivered != tt.delivered || taken != tt.taken {
					t.Errorf("delivered: %v, taken: %v", delivered, taken)
				}
				if s, err := c.peek(id); err != nil || s.state != tt.want || s.owner != tt.held.owner {
					t.Errorf("the claim says %q of %s, %v; want %q", s.state, s.owner, err, tt.want)
				}
			})
		})
	}
}

// TestAnswerIsMadeKnown: one that took long is, and whether the last push had to go without it, here or elsewhere.
func TestAnswerIsMadeKnown(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		held        byte
		owner       string
		lateHere    bool
		late, taken bool
		want        byte
	}{
		"in time":                     {claimRunning, "me", false, false, false, claimAnswered},
		"late here":                   {claimRunning, "me", true, false, false, claimLate},
		"late elsewhere":              {claimLate, "me", false, true, false, claimLate},
		"late elsewhere and here":     {claimLate, "me", true, false, false, claimLate},
		"another node's by now":       {claimRunning, "other", false, false, true, claimRunning},
		"late, another node's by now": {claimLate, "other", false, true, true, claimLate},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				store := tokens.NewMemStore()
				c := claimsOn(t, store)
				c.node = "me"
				id := pushID{1}
				(&standing{owner: tt.owner, life: time.Hour, count: 1, run: 1, state: tt.held}).put(t, store, id)
				a := c.calls.arrive(id, time.Now(), 0, 0, pace{3, defaultReplyTimeout})
				c.calls.own(a.call, 1)
				if tt.lateHere {
					c.calls.giveUp(a.call)
				}
				late, taken := c.finish(a.call, passiveReply{outcome: outcomePlain, body: []byte("a")}, answerAfter)
				if late != tt.late || taken != tt.taken {
					t.Errorf("late: %v, taken: %v", late, taken)
				}
				if s, err := c.peek(id); err != nil || s.state != tt.want {
					t.Errorf("the claim says %q, %v; want %q", s.state, err, tt.want)
				}
			})
		})
	}
}

// TestCallIsDeliveredOnce: an answer goes to a push or another way, whichever was first.
func TestCallIsDeliveredOnce(t *testing.T) {
	t.Parallel()
	now, p := time.Now(), pace{3, defaultReplyTimeout}
	table := newCallTable(nil)
	pushed := table.arrive(pushID{1}, now, 0, 0, p).call
	if table.deliver(pushed) || table.forsake(pushed) || table.deliver(pushed) {
		t.Error("what a push got goes another way too")
	}
	sent := table.arrive(pushID{2}, now, 0, 0, p).call
	if !table.forsake(sent) || !table.deliver(sent) {
		t.Error("a push gets what goes another way")
	}
}

// TestBackendIsTriedUntilTheLastPush: no longer than an answer can still be of use.
func TestBackendIsTriedUntilTheLastPush(t *testing.T) {
	t.Parallel()
	now, p := time.Now(), pace{3, 4 * time.Second}
	table := newCallTable(nil)
	a := table.arrive(pushID{1}, now, 0, 0, p)
	if got := table.worthTrying(a.call, p).Sub(now); got != 2*wechatWait+4*time.Second-lostMargin {
		t.Errorf("before the last push: for %v", got)
	}
	last := now.Add(9 * time.Second)
	if b := table.arrive(pushID{1}, last, 0, 0, p); !b.last {
		t.Fatal("not the last push")
	}
	if got := table.worthTrying(a.call, p).Sub(last); got != 4*time.Second-lostMargin {
		t.Errorf("after the last push: for %v", got)
	}
}
