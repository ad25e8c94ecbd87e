package integration_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// TestFleetFrozenNode stops a node in the middle of a refresh, when WeChat has just carried it out, for longer than its lock
// lives. Another node finds the refresh token void (61023), has the current one from WeChat, and refreshes. When the first
// node goes on, WeChat's answer to it is of before: it stores nothing of it, and serves what the other one stored.
func TestFleetFrozenNode(t *testing.T) {
	t.Parallel()
	t.Run("answer under way", func(t *testing.T) { t.Parallel(); frozenNode(t, wxsim.StepActed) })
	// The node has read WeChat's answer, and what it wrote to Redis then arrives when it wakes up.
	t.Run("answer read", func(t *testing.T) { t.Parallel(); frozenNode(t, wxsim.StepAnswered) })
}

func frozenNode(t *testing.T, at wxsim.Step) {
	t.Helper()
	f := newFleet(t, fleetOptions{nodes: 3})
	u := f.authorize(integration.AuthorizerID)[0]
	sleeper, other, third := f.nodes[0], f.nodes[1], f.nodes[2]

	asleep := make(chan struct{})
	f.wechat.Watch(func(p wxsim.Progress) {
		if p.Path != pathAuthorizerToken || p.Errcode != 0 {
			return
		}
		if p.Step == wxsim.StepActed {
			sleeper.relay.Hang() // nothing of what comes of it is written before the node sleeps
		}
		if p.Step == at {
			f.wechat.Watch(nil)
			if at == wxsim.StepAnswered {
				time.Sleep(100 * time.Millisecond) // for it to read the answer, and try to write
			}
			sleeper.freeze()
			close(asleep)
		}
	})
	begun := time.Now()
	f.wechat.ExpireAll(wxsim.KindAuthorizer, u.AppID)
	ctx, cancel := context.WithTimeout(t.Context(), 2*healTime)
	defer cancel()
	sleeping := make(chan fleetAnswer, 1)
	sleeper.apps.Timeout = 2 * healTime
	go func() { sleeping <- f.user(ctx, sleeper, u) }()
	select {
	case <-asleep:
	case a := <-sleeping:
		t.Fatalf("WeChat was not asked, and the app was answered after %v: %s", time.Since(begun), a)
	case <-ctx.Done():
		t.Fatal("WeChat was not asked, and the app has no answer")
	}

	start := time.Now()
	if err := f.untilGood(ctx, other, u, healTime); err != nil {
		t.Fatalf("while the node sleeps: %v", err)
	}
	if took := time.Since(start); took < leaseLife/2 || took > leaseLife+10*time.Second {
		t.Errorf("another node served the account after %v: the lock lives for %v", took, leaseLife)
	}
	if got, want := f.renewals(u, begun), []int64{0, codeRefreshTokenVoid, 0}; !slices.Equal(got, want) {
		t.Errorf("WeChat was asked for a token with the outcomes %v, want %v", got, want)
	}
	if !slices.ContainsFunc(f.wechat.Journal().Calls(pathAuthorizerInfo), func(e wxsim.Entry) bool { return e.AppID == u.AppID && e.Time.After(start) }) {
		t.Error("WeChat was not asked which refresh token counts")
	}

	woken := time.Now()
	sleeper.relay.Pass()
	sleeper.thaw()
	if a := <-sleeping; !a.good(u) {
		t.Errorf("the app of the node that slept: %s", a)
	}
	for range 20 {
		for _, n := range f.nodes {
			if a := f.user(ctx, n, u); !a.good(u) {
				t.Errorf("afterwards, node %s: %s", n.name, a)
			}
		}
	}
	if got := f.renewals(u, woken); len(got) > 0 {
		t.Errorf("after the node woke up, WeChat was asked for a token again: %v", got)
	}
	// One call at most went out with a token of before: that of the app which had waited all the time.
	if n := f.refusals(u, woken); n > 1 {
		t.Errorf("%d calls reached WeChat with a token that was void", n)
	}
	// What is in Redis is the newest: a node that knows nothing is refused nothing, neither the token nor the refresh token.
	if err := errors.Join(third.Kill(), third.Start(ctx)); err != nil {
		t.Fatal(err)
	}
	restarted := time.Now()
	if a := f.user(ctx, third, u); !a.good(u) || f.refusals(u, restarted) > 0 || len(f.renewals(u, restarted)) > 0 {
		t.Errorf("a node that knows nothing: %s; %d refusals, renewals %v", a, f.refusals(u, restarted), f.renewals(u, restarted))
	}
	f.wechat.ExpireAll(wxsim.KindAuthorizer, u.AppID)
	if a := f.user(ctx, third, u); !a.good(u) {
		t.Errorf("the next refresh: %s", a)
	}
	if got := f.renewals(u, restarted); !slices.Equal(got, []int64{0}) {
		t.Errorf("the next refresh with the refresh token in Redis had the outcomes %v", got)
	}
	eventually(t, "nothing waits for Redis", func() error { return sleeper.settled(t) })
	f.checkNoSecrets("dump of Redis", dump(t, f))
}

// renewals are the outcomes of WeChat's being asked for a token of the user's account since then.
func (f *fleet) renewals(u wxsim.User, since time.Time) (outcomes []int64) {
	for _, e := range f.wechat.Journal().Calls(pathAuthorizerToken) {
		if e.AppID == u.AppID && e.Time.After(since) {
			outcomes = append(outcomes, e.Errcode)
		}
	}
	return outcomes
}

// refusals is the number of calls for the user's account since then that WeChat refused for their token.
func (f *fleet) refusals(u wxsim.User, since time.Time) (n int) {
	for _, e := range f.wechat.Journal().Calls("/cgi-bin/user/info") {
		if e.AppID == u.AppID && e.Time.After(since) && slices.Contains(tokenRefusals, e.Errcode) {
			n++
		}
	}
	return n
}
