package caddymodule

import (
	"net/http"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

func (f *fakeWeChat) setClock(ahead time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ahead = ahead
}

// TestStatusOfAClockByAnswers: the answers to the gateway's own calls tell of a clock that is off, before a push is refused.
func TestStatusOfAClockByAnswers(t *testing.T) {
	t.Parallel()
	wechat := newFakeWeChat(t)
	app, ctx := newTestApp(t, statusConfig(wechat.URL, ""))
	pushTicket(t, eventHandler(t, ctx))
	m := messageHandler(t, ctx)
	renewed := func(ahead time.Duration) Status {
		t.Helper()
		wechat.setClock(ahead)
		if _, err := app.manager().Renew(t.Context(), tokens.ComponentKey(platformID), secret.String{}); err != nil {
			t.Fatal(err)
		}
		return look(t, app)
	}
	renewed(0).hasNot(t, codeClock)
	renewed(clockDoubt/2).hasNot(t, codeClock)
	renewed(2*time.Minute).has(t, Yellow, codeClock, thisMachine, "ahead of this machine's, by the Date of its answers")
	renewed(-2*time.Minute).has(t, Yellow, codeClock, thisMachine, "behind this machine's, by the Date of its answers")
	s := renewed(10 * time.Minute)
	s.has(t, Red, codeClock, thisMachine, "ahead of this machine's, by the Date of its answers: pushes are refused")
	// A push that is refused says more, and what it says is said once.
	early := platformSender(t)
	early.at = time.Now().Add(10 * time.Minute)
	serve(t, m, early.push("/wx/message/"+authorizerID, textMessage("hello")), nil)
	n := 0
	for _, f := range look(t, app).Findings {
		if f.Code == codeClock {
			n++
		}
	}
	if n != 1 {
		t.Errorf("%d findings about the clock", n)
	}
	serve(t, m, platformSender(t).push("/wx/message/"+authorizerID, textMessage("hello")), quiet)
	renewed(0).hasNot(t, codeClock)
}

// TestClockByAppsCalls: so do the answers to apps' calls, one in a minute.
func TestClockByAppsCalls(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	call := func(ahead time.Duration) time.Duration {
		t.Helper()
		wechat.setClock(ahead)
		if a := g.get("/"+accountID+"/cgi-bin/user/info?openid=o", bearer(crmKey)); a.Status != http.StatusOK {
			t.Fatal(a.Status)
		}
		offset, _ := g.app.health().clock.offset(time.Now())
		return offset.Round(time.Minute)
	}
	call(0)
	g.app.health().clock.due.Store(0)
	if got := call(10 * time.Minute); got != 10*time.Minute {
		t.Errorf("WeChat's clock is said to be %v ahead", got)
	}
	if got := call(0); got != 10*time.Minute {
		t.Errorf("the next answer was looked at too, by which it is %v ahead", got)
	}
}

// TestClockInTheLog: the log hears of it at once, then rarely, and anew once it was right.
func TestClockInTheLog(t *testing.T) {
	t.Parallel()
	core, logs := observer.New(zapcore.DebugLevel)
	h, log, now := new(health), zap.New(core), time.Now()
	for _, c := range []struct {
		after, ahead time.Duration
		said         int
	}{
		{0, time.Hour, 1},
		{time.Minute, time.Hour, 1},
		{clockLogEvery, time.Hour, 2},
		{clockLogEvery + time.Minute, 0, 2},
		{clockLogEvery + 2*time.Minute, -time.Hour, 3},
	} {
		at := now.Add(c.after)
		h.dated(at.Add(c.ahead).UTC().Format(http.TimeFormat), at, log)
		if logs.Len() != c.said {
			t.Errorf("after %v: said %d times, want %d", c.after, logs.Len(), c.said)
		}
	}
	h.dated("yesterday", now, log)
	if ahead, known := h.clock.offset(now); !known || ahead.Round(time.Minute) != -time.Hour {
		t.Errorf("a Date that is none counts: %v, %v", ahead, known)
	}
	if _, known := new(wechatClock).offset(now); known {
		t.Error("it is known without an answer")
	}
}

// TestClockStillKnown: what an answer said does not hold for a clock that was set since.
func TestClockStillKnown(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		wall, steady time.Duration
		known        bool
	}{
		{time.Hour, time.Hour, true},
		{time.Hour + 10*time.Second, time.Hour, true},
		{time.Hour, time.Minute, false},  // it slept, or was set forward
		{-time.Hour, time.Minute, false}, // it was set back
		{clockMemory + time.Second, clockMemory + time.Second, false},
	} {
		if got := stillKnown(c.wall, c.steady); got != c.known {
			t.Errorf("%v by the wall clock and %v by the steady one: %v", c.wall, c.steady, got)
		}
	}
}
