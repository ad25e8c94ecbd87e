package caddymodule

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-wechat/caddy-wechat/crypto"
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

// timeWeChat is a WeChat of which only the time can be had.
type timeWeChat struct {
	*httptest.Server
	asked atomic.Int32
	date  func(http.Header) // sets the Date
	body  string
	wait  chan struct{} // closed once it answers; nil: at once
}

func newTimeWeChat(t *testing.T, ahead time.Duration) *timeWeChat {
	t.Helper()
	f := &timeWeChat{body: `{"errcode":41001,"errmsg":"access_token missing"}`, date: func(h http.Header) {
		h.Set("Date", time.Now().Add(ahead).UTC().Format(http.TimeFormat))
	}}
	f.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != probePath {
			w.WriteHeader(http.StatusServiceUnavailable) // which no Date counts of
			return
		}
		if f.asked.Add(1); r.Method != http.MethodGet || r.URL.RawQuery != "" || r.Header.Get("Authorization") != "" || r.ContentLength != 0 {
			t.Errorf("asked with %s %s, %d bytes, %v", r.Method, r.URL, r.ContentLength, r.Header)
		}
		if f.wait != nil {
			<-f.wait
		}
		f.date(w.Header())
		_, _ = io.WriteString(w, f.body)
	}))
	t.Cleanup(f.Close)
	return f
}

func (f *timeWeChat) times(t *testing.T, want int32) {
	t.Helper()
	if got := f.asked.Load(); got != want {
		t.Errorf("WeChat was asked for its time %d times, want %d", got, want)
	}
}

// handshakeAt is WeChat's check of a URL.
func handshakeAt(s *sender, path string) *http.Request {
	stamp := strconv.FormatInt(s.at.Unix(), 10)
	return httptest.NewRequest(http.MethodGet, path+"?signature="+s.codec.Signature(stamp, s.nonce)+"&timestamp="+stamp+"&nonce="+s.nonce+"&echostr=echo", nil)
}

// TestClockIsAskedFor: before an answer has told WeChat's time, what seems stale has WeChat asked for it, and is judged by that. So is whatever
// comes first, and once for all platforms and accounts.
func TestClockIsAskedFor(t *testing.T) {
	t.Parallel()
	const messages, events = "/wx/message/" + authorizerID, "/wx/event"
	unauthorized := eventXML("unauthorized", "<AuthorizerAppid>"+authorizerID+"</AuthorizerAppid>")
	hungUp, hangUp := context.WithCancel(t.Context())
	hangUp()
	for name, first := range map[string]struct {
		sender  *sender
		request func(s *sender) *http.Request
		old     int // what an old one gets
	}{
		"message":           {platformSender(t), func(s *sender) *http.Request { return s.push(messages, textMessage("hello")) }, http.StatusForbidden},
		"account's message": {accountSender(t), func(s *sender) *http.Request { return s.push("/wx/message/"+accountID, textMessage("hello")) }, http.StatusForbidden},
		"event":             {eventSender(t), func(s *sender) *http.Request { return s.push(events, unauthorized) }, http.StatusForbidden},
		"event, hung up":    {eventSender(t), func(s *sender) *http.Request { return s.push(events, unauthorized).WithContext(hungUp) }, http.StatusForbidden},
		"event, misplaced":  {eventSender(t), func(s *sender) *http.Request { return s.push(messages, unauthorized) }, http.StatusForbidden},
		"ticket": {eventSender(t), func(s *sender) *http.Request {
			return s.push(events, eventXML("component_verify_ticket", ticketElement))
		}, http.StatusOK},
		"check of a message URL": {platformSender(t), func(s *sender) *http.Request { return handshakeAt(s, messages) }, http.StatusForbidden},
		"check of an event URL":  {eventSender(t), func(s *sender) *http.Request { return handshakeAt(s, events) }, http.StatusForbidden},
	} {
		for _, ahead := range []time.Duration{10 * time.Minute, -10 * time.Minute} {
			wechat := newTimeWeChat(t, ahead)
			app, ctx := newTestApp(t, testConfig(wechat.URL))
			logs := watchLog(app)
			m, e := messageHandler(t, ctx), eventHandler(t, ctx)
			ask := func(r *http.Request) (status int) {
				t.Helper()
				if r.URL.Path == events {
					return serve(t, e, r, nil).Code
				}
				return serve(t, m, r, quiet).Code
			}
			at := func(s *sender, late time.Duration) *sender {
				c := *s
				c.at = time.Now().Add(ahead - late)
				return &c
			}
			if got := ask(first.request(at(first.sender, 0))); got != http.StatusOK {
				t.Errorf("%s, %v: got %d", name, ahead, got)
			}
			if logs.FilterMessageSnippet("timestamp_window").Len() > 0 {
				t.Errorf("%s, %v: %v", name, ahead, logs.All())
			}
			if got := ask(first.request(at(first.sender, 7*time.Minute))); got != first.old {
				t.Errorf("%s, %v: an old one: got %d, want %d", name, ahead, got, first.old)
			}
			for what, r := range map[string]*http.Request{
				"message":           at(platformSender(t), 0).push(messages, textMessage("then")),
				"account's message": at(accountSender(t), 0).push("/wx/message/"+accountID, textMessage("then")),
				"event":             at(eventSender(t), 0).push(events, unauthorized),
				"check":             handshakeAt(at(platformSender(t), 0), messages),
			} {
				if got := ask(r); got != http.StatusOK {
					t.Errorf("%s, %v: a %s after it: got %d", name, ahead, what, got)
				}
			}
			look(t, app).has(t, Red, codeClock, thisMachine, "by the Date of its answers, by which it is judged whether pushes are in time")
			wechat.times(t, 1)
		}
	}
}

// TestClockIsAskedForOnce: pushes that come meanwhile wait for the same answer.
func TestClockIsAskedForOnce(t *testing.T) {
	t.Parallel()
	const pushes = 20
	wechat := newTimeWeChat(t, time.Hour)
	wechat.wait = make(chan struct{})
	_, ctx := newTestApp(t, testConfig(wechat.URL))
	m := messageHandler(t, ctx)
	s := platformSender(t)
	s.at = time.Now().Add(time.Hour)
	var all sync.WaitGroup
	for range pushes {
		r := s.push("/wx/message/"+authorizerID, textMessage("hello"))
		all.Go(func() {
			if rec := serve(t, m, r, quiet); rec.Code != http.StatusOK {
				t.Errorf("got %d %s", rec.Code, rec.Body)
			}
		})
	}
	time.Sleep(clockAskWait / 4) // for most of them to wait
	close(wechat.wait)
	all.Wait()
	wechat.times(t, 1)
}

// TestClockIsAnsweredLate: no push waits for long, and those that come after the answer have it.
func TestClockIsAnsweredLate(t *testing.T) {
	t.Parallel()
	wechat := newTimeWeChat(t, time.Hour)
	wechat.wait = make(chan struct{})
	app, ctx := newTestApp(t, testConfig(wechat.URL))
	m := messageHandler(t, ctx)
	s := platformSender(t)
	s.at = time.Now().Add(time.Hour)
	began := time.Now()
	if rec := serve(t, m, s.push("/wx/message/"+authorizerID, textMessage("hello")), nil); rec.Code != http.StatusForbidden {
		t.Errorf("before the answer: got %d", rec.Code)
	}
	if took := time.Since(began); took < clockAskWait || took > eventStoreTimeout {
		t.Errorf("it waited %v", took)
	}
	close(wechat.wait)
	for deadline := time.Now().Add(clockAskTimeout); ; time.Sleep(10 * time.Millisecond) {
		if _, known := app.health().clock.offset(time.Now()); known {
			break
		} else if time.Now().After(deadline) {
			t.Fatal("the answer does not count")
		}
	}
	if rec := serve(t, m, s.push("/wx/message/"+authorizerID, textMessage("again")), quiet); rec.Code != http.StatusOK {
		t.Errorf("after it: got %d", rec.Code)
	}
	wechat.times(t, 1)
}

// TestClockIsNotTold: without an answer of WeChat's with a Date that can be, pushes are judged by the clock here; WeChat is asked again, but
// rarely.
func TestClockIsNotTold(t *testing.T) {
	t.Parallel()
	const page = "<html>sign in</html>"
	for name, spoil := range map[string]func(f *timeWeChat){
		"another's answer": func(f *timeWeChat) { f.body = page },
		"no Date":          func(f *timeWeChat) { f.date = func(h http.Header) { h["Date"] = nil } },
		"no time":          func(f *timeWeChat) { f.date = func(h http.Header) { h.Set("Date", "yesterday") } },
		"of another age":   func(f *timeWeChat) { f.date = func(h http.Header) { h.Set("Date", "Thu, 01 Jan 1970 00:00:00 GMT") } },
	} {
		wechat := newTimeWeChat(t, time.Hour)
		spoil(wechat)
		app, ctx := newTestApp(t, testConfig(wechat.URL))
		m := messageHandler(t, ctx)
		stale := platformSender(t)
		stale.at = time.Now().Add(time.Hour)
		pushed := func(asked int32) {
			t.Helper()
			if rec := serve(t, m, stale.push("/wx/message/"+authorizerID, textMessage("hello")), nil); rec.Code != http.StatusForbidden {
				t.Errorf("%s: got %d", name, rec.Code)
			}
			look(t, app).has(t, Red, codeClock, thisMachine, "ahead of this machine's: messages are refused")
			if rec := serve(t, m, platformSender(t).push("/wx/message/"+authorizerID, textMessage("hello")), quiet); rec.Code != http.StatusOK {
				t.Errorf("%s: one that is in time: got %d", name, rec.Code)
			}
			wechat.times(t, asked)
		}
		pushed(1)
		pushed(1)
		c := &app.health().clock
		c.mu.Lock()
		c.asked = c.asked.Add(-clockAskEvery)
		c.mu.Unlock()
		pushed(2)
	}
}

// TestClockIsNotAskedFor: not by what is in time, is old by any clock, or has no right signature.
func TestClockIsNotAskedFor(t *testing.T) {
	t.Parallel()
	wechat := newTimeWeChat(t, time.Hour)
	app, ctx := newTestApp(t, testConfig(wechat.URL))
	m := messageHandler(t, ctx)
	const path = "/wx/message/" + authorizerID
	s := platformSender(t)
	if rec := serve(t, m, s.push(path, textMessage("hello")), quiet); rec.Code != http.StatusOK {
		t.Fatal(rec.Code)
	}
	if rec := serve(t, m, handshakeAt(s, path), nil); rec.Code != http.StatusOK {
		t.Fatal(rec.Code)
	}
	refused := func(what string, r *http.Request) {
		t.Helper()
		if rec := serve(t, m, r, nil); rec.Code != http.StatusForbidden {
			t.Errorf("%s: got %d", what, rec.Code)
		}
		wechat.times(t, 0)
	}
	stale := platformSender(t)
	stale.at = time.Now().Add(2 * maxMessageAge)
	refused("a timestamp that is none of its message", stale.push(path, textMessage("hello")))
	stale.at = time.Unix(123456789, 0)
	refused("a timestamp that is none", stale.push(path, textMessage("hello")))
	refused("a check with a timestamp that is none", handshakeAt(stale, path))
	forger := newSender(t, platformID, "another0token", platformKey)
	forger.at = time.Now().Add(time.Hour)
	refused("a forgery", forger.push(path, textMessage("hello")))
	refused("a forged check", handshakeAt(forger, path))
	app.health().dated(time.Now().UTC().Format(http.TimeFormat), time.Now(), app.logger)
	stale.at = time.Now().Add(time.Hour)
	refused("one that is known to be stale", stale.push(path, textMessage("hello")))
}

// TestClockIsRight: a push that is sent again, or whose timestamp is none, says nothing about a clock of which WeChat says that it is right. Who
// has seen one could have the status tell of a clock that is off.
func TestClockIsRight(t *testing.T) {
	t.Parallel()
	const path = "/wx/message/" + authorizerID
	for name, ahead := range map[string]time.Duration{"known to be right": 0, "little off": 2 * clockDoubt} {
		wechat := newTimeWeChat(t, ahead)
		app, ctx := newTestApp(t, testConfig(wechat.URL))
		m := messageHandler(t, ctx)
		old := platformSender(t)
		old.at = time.Now().Add(-2 * time.Hour)
		swapped := platformSender(t) // its nonce, as a timestamp
		swapped.at = time.Now().Add(2 * maxMessageAge)
		for what, r := range map[string]*http.Request{
			"check":    handshakeAt(old, path),
			"message":  old.push(path, textMessage("hello")),
			"no stamp": swapped.push(path, textMessage("hello")),
		} {
			if rec := serve(t, m, r, nil); rec.Code != http.StatusForbidden {
				t.Errorf("%s: %s: got %d", name, what, rec.Code)
			}
			for _, f := range look(t, app).Findings {
				if f.Code == codeClock && f.Level == Red {
					t.Errorf("%s: %s: status says %s", name, what, f.Text.EN)
				}
			}
		}
	}
}

// TestClockOfTexts: what the gateway writes itself is dated like its envelope.
func TestClockOfTexts(t *testing.T) {
	t.Parallel()
	for _, format := range []crypto.Format{crypto.FormatXML, crypto.FormatJSON} {
		for _, ahead := range []time.Duration{time.Hour, -time.Hour} {
			wechat := newTimeWeChat(t, ahead)
			_, ctx := newTestApp(t, testConfig(wechat.URL))
			m := messageHandler(t, ctx)
			m.FallbackText = "later"
			s, message := accountSender(t), textMessage("hello")
			s.at = time.Now().Add(ahead)
			if s.format = format; format == crypto.FormatJSON {
				message = `{"ToUserName":"gh_1","FromUserName":"o1","MsgType":"text","MsgId":1}`
			}
			rec := serve(t, m, s.push("/wx/message/"+accountID, message), &answering{status: http.StatusInternalServerError})
			reply, err := s.codec.OpenReply(rec.Body.Bytes())
			if err != nil {
				t.Fatal(rec.Code, rec.Body, err)
			}
			var f crypto.Fields
			if err := crypto.ScanFields(reply, &f); err != nil || !crypto.Fresh(string(f.CreateTime), s.at, time.Minute) {
				t.Errorf("%v: %s (%v) is not dated by WeChat's clock, %d", ahead, reply, err, s.at.Unix())
			}
		}
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
