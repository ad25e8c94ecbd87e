package caddymodule

import (
	"fmt"
	"net/http"
	"strconv"
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
	s.has(t, Red, codeClock, thisMachine, "ahead of this machine's, by the Date of its answers, by which it is judged whether pushes are in time")
	// A push that is refused all the same is old, and says nothing about the clock.
	early := platformSender(t)
	early.at = time.Now().Add(20 * time.Minute)
	serve(t, m, early.push("/wx/message/"+authorizerID, textMessage("hello")), nil)
	renewed(0).hasNot(t, codeClock)
	// Before an answer says so, a push that is refused does, and what both say is said once.
	serve(t, m, early.push("/wx/message/"+authorizerID, textMessage("hello")), nil)
	renewed(20 * time.Minute)
	n := 0
	for _, f := range look(t, app).Findings {
		if f.Code == codeClock {
			n++
		}
	}
	if n != 1 {
		t.Errorf("%d findings about the clock", n)
	}
	serve(t, m, early.push("/wx/message/"+authorizerID, textMessage("again")), quiet)
	renewed(0).hasNot(t, codeClock)
}

// TestPushesByWeChatsClock: where WeChat's answers say how far our clock is off, what it pushes is in time by its own, and what is old by that
// is not. What was pushed is known for as long as it could be taken for new by either.
func TestPushesByWeChatsClock(t *testing.T) {
	t.Parallel()
	for _, ahead := range []time.Duration{10 * time.Minute, -10 * time.Minute} {
		app, ctx := newTestApp(t, testConfig(""))
		m, e := messageHandler(t, ctx), eventHandler(t, ctx)
		push := func(late time.Duration, text string) (status int) {
			t.Helper()
			s := platformSender(t)
			s.at = time.Now().Add(ahead - late)
			return serve(t, m, s.push("/wx/message/"+authorizerID, textMessage(text)), &answering{text: "success"}).Code
		}
		if got := push(0, "not known"); got != http.StatusForbidden {
			t.Fatalf("%v: before an answer said so: got %d", ahead, got)
		}
		saw := func() {
			app.health().dated(time.Now().Add(ahead).UTC().Format(http.TimeFormat), time.Now(), app.logger)
		}
		saw()
		for late, want := range map[time.Duration]int{
			0: http.StatusOK, 4 * time.Minute: http.StatusOK, 7 * time.Minute: http.StatusForbidden, -7 * time.Minute: http.StatusForbidden,
		} {
			if got := push(late, late.String()); got != want {
				t.Errorf("%v: a push %v late: got %d, want %d", ahead, late, got, want)
			}
		}
		s := eventSender(t)
		s.at = time.Now().Add(ahead)
		authorized := fmt.Sprintf("<xml><AppId><![CDATA[%s]]></AppId><CreateTime>%d</CreateTime><InfoType><![CDATA[authorized]]></InfoType><AuthorizerAppid><![CDATA[%s]]></AuthorizerAppid><AuthorizationCode><![CDATA[queryauthcode@@@2]]></AuthorizationCode></xml>",
			platformID, s.at.Unix(), authorizerID)
		if rec := serve(t, e, s.push("/wx/event", authorized), nil); rec.Body.String() != string(success) {
			t.Errorf("%v: an authorization: got %d %q", ahead, rec.Code, rec.Body)
		}
		p := newPush()
		p.query.timestamp, p.ahead = strconv.FormatInt(time.Now().Add(ahead).Unix(), 10), ahead
		byWeChats := time.Now().Add(defaultTimestampWindow)         // until then by its clock
		byOurs := time.Now().Add(ahead).Add(defaultTimestampWindow) // and by ours
		if until := time.Unix(p.validUntil(defaultTimestampWindow)+1, 0); until.Before(byWeChats) || until.Before(byOurs) {
			t.Errorf("%v: it is remembered until %v", ahead, until)
		}
		p.release()
	}
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
