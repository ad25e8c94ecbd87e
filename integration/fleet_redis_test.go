package integration_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
	"github.com/caddy-wechat/caddy-wechat/internal/stall"
)

// promptly is a call that waits for nothing but WeChat, on a machine with other work.
const promptly = 1500 * time.Millisecond

// TestFleetInForce: what WeChat tells one node, of a new authorization or of the end of one, counts on the others within a
// second, however busy they are with the account.
func TestFleetInForce(t *testing.T) {
	t.Parallel()
	f := newFleet(t, fleetOptions{nodes: 3})
	u := f.authorize(integration.AuthorizerID)[0]
	a, others := f.nodes[0], f.nodes[1:]
	// quietly calls on the other nodes once what node A was told must count there.
	quietly := func(what string, check func(*fleetNode, fleetAnswer)) {
		t.Helper()
		f.awaitPromise()
		for _, n := range others {
			check(n, f.user(t.Context(), n, u))
		}
	}
	for round := range 3 {
		exchanges := f.wechat.Journal().Count(pathQueryAuth)
		if g, err := f.wechat.Reauthorize(on(t.Context(), a), integration.PlatformID, u.AppID); err != nil || !g.Push.OK() {
			t.Fatalf("authorized: %s %v", g.Push.Wrong, err)
		}
		if err := f.wechat.Journal().WaitCalls(t.Context(), pathQueryAuth, exchanges+1); err != nil {
			t.Fatal(err)
		}
		told := time.Now()
		quietly("authorized", func(n *fleetNode, got fleetAnswer) {
			if !got.good(u) || f.refusals(u, told) > 0 {
				t.Errorf("round %d: a second after a new authorization on node A, node %s used a token of before: %s", round, n.name, got)
			}
		})
		if got := f.renewals(u, told); len(got) > 0 {
			t.Errorf("round %d: a new authorization made other nodes refresh: %v", round, got)
		}

		// WeChat goes on to take the token: it is the gateways that must not use it any more.
		r, err := f.wechat.PushEvent(on(t.Context(), a), integration.PlatformID, u.AppID, "unauthorized", wxsim.Field{Name: "AuthorizerAppid", Value: u.AppID})
		if err != nil || !r.OK() {
			t.Fatalf("unauthorized: %s %v", r.Wrong, err)
		}
		calls := 0
		quietly("unauthorized", func(n *fleetNode, got fleetAnswer) {
			if !strings.Contains(got.body, `"errcode":61003,`) {
				t.Errorf("round %d: a second after the end of an authorization on node A, node %s still serves: %s", round, n.name, got)
			}
			calls++
		})
		if calls != len(others) {
			t.Fatal("not all nodes were asked")
		}
	}
}

// TestFleetAndRedis has one fleet go through what can happen to its Redis: away at the start, away later, slow, full, wiped.
func TestFleetAndRedis(t *testing.T) {
	t.Parallel()
	f := newFleet(t, fleetOptions{nodes: 3, cut: true})
	plain := f.wechat.NewUser(integration.AccountID)

	t.Log("Redis is away at the start")
	for _, n := range f.nodes {
		if a := f.user(t.Context(), n, plain); !a.good(plain) {
			t.Errorf("a plain account needs no Redis, node %s: %s", n.name, a)
		}
		f.notTaken(n)
	}
	f.reach()
	var names []string
	for i := range 8 {
		names = append(names, fmt.Sprintf("wx7%015x", i))
	}
	users := f.authorize(names...)
	all := append([]wxsim.User{plain}, users...)

	t.Log("Redis is away")
	f.each(func(n *fleetNode) { n.relay.Cut() })
	f.serveOn(all)
	f.notTaken(f.nodes[1])
	f.renewedAlone(f.nodes[0], users[0])
	connections := f.redisInfo("total_connections_received")
	f.reach()
	f.writtenBy(f.nodes[0], users[0])
	f.calmly(all, connections)

	t.Log("Redis hangs")
	f.each(func(n *fleetNode) { n.relay.Hang() })
	f.serveOn(all)
	f.notTaken(f.nodes[2])
	f.renewedAlone(f.nodes[1], users[1])
	connections = f.redisInfo("total_connections_received")
	f.reach()
	f.writtenBy(f.nodes[1], users[1])
	f.calmly(all, connections)

	t.Log("Redis is slow")
	f.each(func(n *fleetNode) { n.relay.Slow(300 * time.Millisecond) })
	f.serveOn(all)
	f.storm(users[2], 1)
	if err := f.ticket(on(t.Context(), f.nodes[0])); err != nil {
		t.Errorf("a ticket, over a slow connection: %v", err)
	}
	f.each(func(n *fleetNode) { n.relay.Slow(0) })

	t.Log("Redis is full")
	f.redis.Do("CONFIG", "SET", "maxmemory", "1")
	f.serveOn(all)
	f.notTaken(f.nodes[0])
	f.renewedAlone(f.nodes[2], users[3])
	f.redis.Do("CONFIG", "SET", "maxmemory", "0")
	f.writtenBy(f.nodes[2], users[3])

	t.Log("Redis is wiped")
	f.redis.Do("FLUSHALL")
	f.serveOn(all)
	if err := f.ticket(t.Context()); err != nil {
		t.Fatal(err)
	}
	fresh := f.nodes[0]
	if err := errors.Join(fresh.Kill(), fresh.Start(t.Context())); err != nil {
		t.Fatal(err)
	}
	for _, u := range all {
		if err := f.untilGood(t.Context(), fresh, u, healTime); err != nil {
			t.Errorf("a node that knows nothing: %v", err)
		}
	}
	f.serveOn(all)
	f.storm(users[4], 1)
	for _, u := range users {
		f.wechat.ExpireAll(wxsim.KindAuthorizer, u.AppID)
	}
	f.storm(users[5], 1)
	for _, u := range users {
		for _, n := range f.nodes {
			if err := f.untilGood(t.Context(), n, u, healTime); err != nil {
				t.Errorf("after the wipe: %v", err)
			}
		}
	}
	for _, n := range f.nodes {
		resp, text := fetch(t, plainClient, http.MethodGet, "http://"+n.Admin+"/metrics", nil, "")
		if resp.StatusCode != http.StatusOK {
			t.Errorf("metrics: %d", resp.StatusCode)
		}
		f.checkNoSecrets("metrics", text)
	}
	f.checkNoSecrets("dump of Redis", dump(t, f))
}

// each does something to each node.
func (f *fleet) each(do func(*fleetNode)) {
	for _, n := range f.nodes {
		do(n)
	}
}

// reach lets all nodes reach Redis, and waits until they take what must be kept.
func (f *fleet) reach() {
	f.t.Helper()
	start := time.Now()
	f.each(func(n *fleetNode) { n.relay.Pass() })
	for _, n := range f.nodes {
		if err := f.ticket(on(f.t.Context(), n)); err != nil {
			f.t.Errorf("node %s: a ticket: %v", n.name, err)
		}
	}
	if took := time.Since(start); took > 10*time.Second {
		f.t.Errorf("Redis was reachable for %v before all nodes took events", took)
	}
}

// serveOn fails unless all nodes serve all accounts with the tokens that they have, and soon.
func (f *fleet) serveOn(users []wxsim.User) {
	f.t.Helper()
	for _, n := range f.nodes {
		for i, u := range users {
			limit := promptly
			if i == 0 {
				limit += 2 * time.Second // the first use may find out that Redis is away
			}
			if a := f.user(f.t.Context(), n, u); !a.good(u) || a.took > limit {
				f.t.Errorf("node %s, %s: %s, after %v", n.name, u.AppID, a, a.took)
			}
		}
	}
}

// notTaken fails unless the node refuses to acknowledge an event, in time, while it takes the ticket in it into memory.
func (f *fleet) notTaken(n *fleetNode) {
	f.t.Helper()
	ctx, cancel := context.WithCancel(on(f.t.Context(), n))
	defer cancel()
	r, err := f.wechat.PushEventWith(ctx, wxsim.EventPush{
		Platform: integration.PlatformID, InfoType: "unauthorized", Attempts: 1,
		Fields: []wxsim.Field{{Name: "AuthorizerAppid", Value: "wx7fffffffffffffff"}},
	})
	if last := r.Last(); err != nil || last.Status != http.StatusServiceUnavailable {
		f.t.Errorf("node %s answered an event that it cannot keep with %d, %v, after %v", n.name, last.Status, err, last.Latency)
	}
}

// renewedAlone has one node renew a token while it cannot write it, and looks whether it keeps the new refresh token.
func (f *fleet) renewedAlone(n *fleetNode, u wxsim.User) {
	f.t.Helper()
	f.wechat.ExpireAll(wxsim.KindAuthorizer, u.AppID)
	start := time.Now()
	if err := f.untilGood(f.t.Context(), n, u, healTime); err != nil {
		f.t.Errorf("a renewal without Redis: %v", err)
	}
	if got := f.renewals(u, start); len(got) != 1 || got[0] != 0 {
		f.t.Errorf("a renewal without Redis had the outcomes %v", got)
	}
	if len(n.spilled()) == 0 {
		f.t.Errorf("the refresh token that node %s alone has is not on its disk", n.name)
	}
}

// writtenBy waits until the node has written what waited, and looks whether the others use it as it is.
func (f *fleet) writtenBy(n *fleetNode, u wxsim.User) {
	f.t.Helper()
	eventually(f.t, "what waited is written", func() error {
		if w := n.metric(f.t, "caddy_wechat_records_waiting"); w != "0" || len(n.spilled()) > 0 {
			return fmt.Errorf("%s records wait, %d files are spilled", w, len(n.spilled()))
		}
		return nil
	})
	f.awaitPromise()
	start := time.Now()
	for _, other := range f.nodes {
		if a := f.user(f.t.Context(), other, u); !a.good(u) {
			f.t.Errorf("node %s, with the token that node %s had: %s", other.name, n.name, a)
		}
	}
	if got := f.renewals(u, start); len(got) > 0 || f.refusals(u, start) > 0 {
		f.t.Errorf("%d refusals, and renewals %v, although the token was written", f.refusals(u, start), got)
	}
}

// promiseStop is for how long the machine may stand still in a second after which each node has to know what was written.
const promiseStop = 100 * time.Millisecond

// awaitPromise waits for as long as it may take until what was written counts on all nodes: a second in which all of them had their turns.
func (f *fleet) awaitPromise() {
	f.t.Helper()
	turns := []func(){f.redis.Turn}
	for _, n := range f.nodes {
		turns = append(turns, func() {
			if resp, err := plainClient.Get("http://" + n.Admin + "/reverse_proxy/upstreams"); err == nil { //nolint:noctx // the client has a limit
				_ = resp.Body.Close()
			}
		})
	}
	for try := range stall.Tries(f.t, promiseStop, turns...) {
		start := time.Now()
		time.Sleep(fleetInForce) // the promise itself, not a wait for something
		if longest := try.Longest(start); longest > promiseStop {
			try.Errorf("there is no second in which the machine does not stand still, but %v", longest)
		}
	}
}

// storm has all nodes find the account's token ended at the same time, and counts the renewals.
func (f *fleet) storm(u wxsim.User, want int) {
	f.t.Helper()
	start := time.Now()
	f.wechat.ExpireAll(wxsim.KindAuthorizer, u.AppID)
	var wg sync.WaitGroup
	for _, n := range f.nodes {
		for range 15 {
			wg.Go(func() {
				if a := f.user(f.t.Context(), n, u); !a.good(u) {
					f.t.Errorf("in a storm of callers, node %s: %s", n.name, a)
				}
			})
		}
	}
	wg.Wait()
	if got := f.renewals(u, start); len(got) != want {
		f.t.Errorf("%d callers at once had the token renewed with the outcomes %v, want %d renewal", 15*len(f.nodes), got, want)
	}
}

// calmly fails if the return of Redis makes the nodes storm it, or WeChat.
func (f *fleet) calmly(users []wxsim.User, connections int) {
	f.t.Helper()
	start := time.Now()
	f.serveOn(users)
	for _, u := range users {
		if got := f.renewals(u, start); len(got) > 0 {
			f.t.Errorf("the return of Redis had %s renewed: %v", u.AppID, got)
		}
	}
	// A pool of ten for each processor, the listening connection, and this test's own.
	limit := len(f.nodes)*30 + 10
	if got := f.redisInfo("total_connections_received") - connections; got > limit {
		f.t.Errorf("%d connections to Redis since it came back, want at most %d", got, limit)
	}
}

// redisInfo is one number of INFO.
func (f *fleet) redisInfo(name string) int {
	f.t.Helper()
	info, _ := f.redis.Do("INFO").(string)
	for line := range strings.Lines(info) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), name+":"); ok {
			n, err := strconv.Atoi(value)
			if err != nil {
				f.t.Fatal(err)
			}
			return n
		}
	}
	f.t.Fatalf("INFO has no %s", name)
	return 0
}
