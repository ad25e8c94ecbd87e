package integration_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// The accounts of these tests, by what they are for.
const (
	textAccount     = "wxa000000000000001" // slow_reply text
	kefuAccount     = "wxa000000000000002" // slow_reply customer_service
	refusedAccount  = "wxa000000000000003" // nothing listens where its backend should be
	lateAccount     = "wxa000000000000004" // its backend comes up late
	fallbackAccount = "wxa000000000000005" // fallback text
	fiveAccount     = "wxa000000000000006" // pushes 5, which is more than WeChat makes
	twoAccount      = "wxa000000000000007" // pushes 2, and reply_timeout 1s
	oneJSONAccount  = "wxa000000000000008" // pushes 1, in JSON, with both texts
	kefuJSONAccount = "wxa000000000000009" // slow_reply customer_service, in JSON, with a mirror that refuses its copies
)

const (
	slowText     = "还在处理，稍后再来看看"
	fallbackText = "服务暂时不可用"
)

const (
	// wechatWait is how long WeChat waits for an answer, replyTimeout how long the gateway has the last push wait.
	wechatWait   = 5 * time.Second
	replyTimeout = 4500 * time.Millisecond
	// lastAnswer is when the last push is answered at the latest.
	lastAnswer = 2*wechatWait + replyTimeout
	// slack is how late something may be before it is wrong.
	slack = 1500 * time.Millisecond

	// patience is by how much WeChat waits for longer in these tests, and busySlack is their slack: they run side by side
	// with others, on a machine that is busy with the race detector. The soak tests keep WeChat's own time.
	patience  = 500 * time.Millisecond
	busySlack = 3 * time.Second
)

// TestPace has the backend take its time. All of it happens at once, so the whole lasts as long as its slowest part.
func TestPace(t *testing.T) {
	t.Parallel()
	refused, late := freeAddr(t), freeAddr(t)
	copies := make(chan []byte, 10)
	mirror := &integration.Backend{Answer: func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		copies <- body
		w.WriteHeader(http.StatusInternalServerError)
	}}
	if err := mirror.Start("127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(mirror.Close)
	site := &paceSite{
		routes: []paceRoute{
			{name: "message"},
			{name: "text", options: []string{`slow_reply text "` + slowText + `"`}},
			{name: "kefu", options: []string{`slow_reply customer_service`}},
			{name: "refused", backend: refused},
			{name: "late", backend: late},
			{name: "fallback", options: []string{`fallback text "` + fallbackText + `"`}},
			{name: "five", options: []string{"pushes 5"}},
			{name: "two", options: []string{"pushes 2", "reply_timeout 1s"}},
			{name: "one", options: []string{"pushes 1", `slow_reply text "` + slowText + `"`, `fallback text "` + fallbackText + `"`}},
			{name: "kefumirror", options: []string{`slow_reply customer_service`, "mirror " + mirror.Addr()}},
		},
		accounts: []paceAccount{
			{appid: textAccount, route: "text"},
			{appid: kefuAccount, route: "kefu"},
			{appid: refusedAccount, route: "refused"},
			{appid: lateAccount, route: "late"},
			{appid: fallbackAccount, route: "fallback"},
			{appid: fiveAccount, route: "five"},
			{appid: twoAccount, route: "two"},
			{appid: oneJSONAccount, route: "one", format: wxsim.FormatJSON},
			{appid: kefuJSONAccount, route: "kefumirror", format: wxsim.FormatJSON},
		},
	}
	site.accounts = append(site.accounts, modeAccounts()...)
	w, backend := newPaceWorld(t, site, nil)

	cases := map[string]func(*testing.T){
		"customer service": func(t *testing.T) { paceCustomerService(t, w, backend, kefuAccount) },
		"customer service, JSON": func(t *testing.T) {
			paceCustomerService(t, w, backend, kefuJSONAccount)
			if len(copies) != 1 || !bytes.HasPrefix(<-copies, []byte("{")) {
				t.Errorf("the mirror got %d copies more, or none in JSON", len(copies))
			}
		},
		"backend down":            func(t *testing.T) { paceRefused(t, w) },
		"backend comes up":        func(t *testing.T) { paceLate(t, w, backend, late) },
		"told apart":              func(t *testing.T) { paceToldApart(t, w, backend) },
		"after the answer":        func(t *testing.T) { paceAgain(t, w, backend) },
		"last by its age":         func(t *testing.T) { paceAge(t, w) },
		"two sets of credentials": func(t *testing.T) { paceCredentials(t, w, backend) },
		"modes":                   func(t *testing.T) { paceModes(t, w, backend, site) },
	}
	for name, p := range map[string]paced{
		"at once":              {take: 0, saw: giveText, attempts: 1},
		"after 1 s":            {take: time.Second, saw: giveText, attempts: 1},
		"after 7 s":            {take: 7 * time.Second, saw: giveText, attempts: 2},
		"after 12 s":           {take: 12 * time.Second, saw: giveText, attempts: 3},
		"never":                {give: giveNever, attempts: 3, at: lastAnswer + 2*patience},
		"never, with a text":   {to: textAccount, give: giveNever, saw: slowText, attempts: 3, at: lastAnswer + 2*patience},
		"in time, with a text": {to: textAccount, take: 12 * time.Second, saw: giveText, attempts: 3},
		"success after 7 s":    {take: 7 * time.Second, give: giveSuccess, attempts: 2},
		"500 after 7 s":        {take: 7 * time.Second, give: give500, attempts: 2},
		"an HTML page":         {give: giveHTML, attempts: 1},
		"garbage after 7 s":    {take: 7 * time.Second, give: giveGarbage, attempts: 2},
		"half a reply":         {give: giveHalf, attempts: 1},
		"the other format":     {give: giveOther, attempts: 1},
		"too much":             {give: giveLarge, attempts: 1},
		"500 with a fallback":  {to: fallbackAccount, give: give500, saw: fallbackText, attempts: 1},
		"never, pushes 5":      {to: fiveAccount, give: giveNever, attempts: 3, at: lastAnswer + 2*patience},
		"after 6 s, pushes 2":  {to: twoAccount, take: 6 * time.Second, saw: giveText, attempts: 2},
		"never, pushes 2":      {to: twoAccount, give: giveNever, attempts: 2, at: wechatWait + time.Second + patience},
		"never, pushes 1":      {to: oneJSONAccount, give: giveNever, saw: slowText, attempts: 1, at: replyTimeout},
		"XML to JSON":          {to: oneJSONAccount, give: giveOther, saw: fallbackText, attempts: 1},
		"half with a fallback": {to: fallbackAccount, take: 6 * time.Second, give: giveHalf, saw: fallbackText, attempts: 2},
	} {
		cases[name] = func(t *testing.T) { p.run(t, w, backend) }
	}
	atOnce(t, cases)
	checkViolations(t, w)
}

// apart is the time between the beginnings of tests that run side by side.
const apart = 50 * time.Millisecond

// atOnce runs subtests side by side however few processors there are: they wait for most of their time.
func atOnce(t *testing.T, tests map[string]func(*testing.T)) {
	var wg sync.WaitGroup
	for name, test := range tests {
		wg.Go(func() { t.Run(name, test) })
		time.Sleep(apart) // or they all make their connections at the same instant
	}
	wg.Wait()
}

func freeAddr(t *testing.T) string {
	t.Helper()
	addr, err := integration.FreeAddr("")
	if err != nil {
		t.Fatal(err)
	}
	return addr
}

// paced is one message and what must come of it.
type paced struct {
	to       string // a plain account; "": an authorizer of the platform
	take     time.Duration
	give     string        // default: a text
	saw      string        // what the user sees: giveText stands for the backend's reply
	attempts int           // how often WeChat pushed it
	at       time.Duration // when the last was answered; default: take
}

func (p paced) run(t *testing.T, w *integration.World, backend *scripted) {
	s := scriptFor(t, p.take, p.give)
	m := wxsim.Message{AppID: p.to, Content: s.String()}
	if p.to == "" {
		m.Platform, m.AppID = integration.PlatformID, integration.AuthorizerID
	}
	begun := time.Now()
	r := pushed(t, w, m)
	took := time.Since(begun)
	saw := p.saw
	if saw == giveText {
		saw = s.repliesWith()
	}
	if r.UserSaw != saw {
		t.Errorf("the user saw %q, want %q", r.UserSaw, saw)
	}
	if len(r.Attempts) != p.attempts {
		t.Errorf("pushed %d times, want %d", len(r.Attempts), p.attempts)
	}
	heldUntilDropped(t, r)
	at := max(p.take, p.at)
	if took < at-100*time.Millisecond || took > at+busySlack {
		t.Errorf("answered after %v, want %v", took, at)
	}
	if n := backend.ran(s); n != 1 {
		t.Errorf("the backend was given it %d times", n)
	}
}

// scriptFor makes a script whose name is the test's.
func scriptFor(t *testing.T, take time.Duration, give string) script {
	if give == "" {
		give = giveText
	}
	return script{strings.ReplaceAll(t.Name(), " ", "_"), take, give}
}

// pushed pushes a message, which must be answered rightly in the end.
func pushed(t *testing.T, w *integration.World, m wxsim.Message) wxsim.PushResult {
	t.Helper()
	r, err := w.WeChat.PushMessage(t.Context(), m)
	if err != nil || !r.OK() {
		t.Fatalf("%s %v", r.Wrong, err)
	}
	return r
}

// heldUntilDropped checks that all attempts but the last were held until WeChat dropped them.
func heldUntilDropped(t *testing.T, r wxsim.PushResult) {
	t.Helper()
	for i, a := range r.Attempts[:max(0, len(r.Attempts)-1)] {
		if !a.TimedOut {
			t.Errorf("attempt %d ended after %v with status %d: %v", i+1, a.Latency, a.Status, a.Err)
		}
	}
}

// paceCustomerService: what the backend answers too late reaches the user through the API.
func paceCustomerService(t *testing.T, w *integration.World, backend *scripted, appid string) {
	s := scriptFor(t, 16*time.Second, giveText)
	begun := time.Now()
	r := pushed(t, w, wxsim.Message{AppID: appid, Content: s.String()})
	if r.Kind != wxsim.ReplySuccess || len(r.Attempts) != 3 {
		t.Errorf("answered %s after %d attempts", r.Kind, len(r.Attempts))
	}
	heldUntilDropped(t, r)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	sent, err := w.WeChat.WaitSent(ctx, r.OpenID, nil)
	if err != nil {
		t.Fatalf("nothing was sent to the user: %v", err)
	}
	if sent.Content != s.repliesWith() || sent.AppID != appid {
		t.Errorf("sent %q for %s", sent.Content, sent.AppID)
	}
	if took := sent.At.Sub(begun); took < s.take || took > s.take+busySlack {
		t.Errorf("sent after %v", took)
	}
	if n := backend.ran(s); n != 1 {
		t.Errorf("the backend was given it %d times", n)
	}
	if all := w.WeChat.SentTo(r.OpenID); len(all) != 1 {
		t.Errorf("%d messages were sent", len(all))
	}
}

// paceRefused: nothing listens. Nothing is acknowledged before the last push, and the loss is told.
func paceRefused(t *testing.T, w *integration.World) {
	const lost = `caddy_wechat_replies_total{outcome="lost"}`
	begun := time.Now()
	r := pushed(t, w, wxsim.Message{AppID: refusedAccount, Content: scriptFor(t, 0, "").String()})
	took := time.Since(begun)
	if r.Kind != wxsim.ReplySuccess || len(r.Attempts) != 3 {
		t.Errorf("answered %s after %d attempts", r.Kind, len(r.Attempts))
	}
	heldUntilDropped(t, r)
	if took < 2*wechatWait || took > lastAnswer+2*patience+busySlack {
		t.Errorf("answered after %v", took)
	}
	if got := metric(t, w, lost); got != "1" {
		t.Errorf("%s is %q", lost, got)
	}
	checkLost(t, w, refusedAccount, r.MsgID)
}

// checkLost looks for the line of the log that names a lost message.
func checkLost(t *testing.T, w *integration.World, appid string, msgID int64) {
	t.Helper()
	id := strconv.FormatInt(msgID, 10)
	eventually(t, "the lost message's line in the log", func() error {
		for line := range strings.Lines(w.Gateway.Log()) {
			if strings.Contains(line, `"level":"error"`) && strings.Contains(line, id) && strings.Contains(line, appid) {
				return nil
			}
		}
		return fmt.Errorf("no error names account %s and message %s", appid, id)
	})
}

// paceLate: the backend is down for some seconds, as when it is deployed. The user gets the reply.
func paceLate(t *testing.T, w *integration.World, backend *scripted, addr string) {
	const down = 7 * time.Second
	started := make(chan error, 1)
	b := &integration.Backend{Answer: backend.ServeHTTP}
	t.Cleanup(func() {
		if err := <-started; err != nil {
			t.Error(err)
			return
		}
		b.Close()
	})
	time.AfterFunc(down, func() { started <- b.Start(addr) })

	s := scriptFor(t, 0, giveText)
	begun := time.Now()
	r := pushed(t, w, wxsim.Message{AppID: lateAccount, Content: s.String()})
	if r.UserSaw != s.repliesWith() {
		t.Errorf("the user saw %q", r.UserSaw)
	}
	heldUntilDropped(t, r)
	if took := time.Since(begun); took < down || took > down+busySlack {
		t.Errorf("answered after %v", took)
	}
	if n := backend.ran(s); n != 1 {
		t.Errorf("the backend was given it %d times", n)
	}
}

// paceToldApart: pushes that look alike and are not the same. The backend sees each of them, once.
func paceToldApart(t *testing.T, w *integration.World, backend *scripted) {
	from := w.WeChat.NewUser(integration.AuthorizerID).OpenID
	now := time.Now()
	before := len(w.Backend.Received())
	event := scriptFor(t, 7*time.Second, giveText)
	event.name += "/event"
	message := scriptFor(t, 7*time.Second, giveText)
	message.name += "/message"
	list := []wxsim.Message{
		// Two events of one second, which differ in one element alone.
		{Platform: integration.PlatformID, Event: "wxa_media_check", EventKey: event.String(), Fields: []wxsim.Field{{Name: "trace_id", Value: "1"}}},
		{Platform: integration.PlatformID, Event: "wxa_media_check", EventKey: event.String(), Fields: []wxsim.Field{{Name: "trace_id", Value: "2"}}},
		// Their MsgID is the template message's, and not their own.
		{Platform: integration.PlatformID, Event: "TEMPLATESENDJOBFINISH", EventKey: event.String(), Fields: []wxsim.Field{{Name: "MsgID", Value: "200163836", Number: true}, {Name: "Status", Value: "success"}}},
		{Platform: integration.PlatformID, Event: "TEMPLATESENDJOBFINISH", EventKey: event.String(), Fields: []wxsim.Field{{Name: "MsgID", Value: "200163836", Number: true}, {Name: "Status", Value: "failed:user block"}}},
		// One message of which WeChat tells two platforms.
		{Platform: integration.PlatformID, MsgID: 6054768590064713728, Content: message.String()},
		{Platform: secondPlatform, MsgID: 6054768590064713728, Content: message.String()},
	}
	done := make(chan wxsim.PushResult, len(list))
	for _, m := range list {
		m.AppID, m.From, m.CreateTime = integration.AuthorizerID, from, now
		go func() {
			r, err := w.WeChat.PushMessage(t.Context(), m)
			if err != nil || !r.OK() {
				t.Errorf("%s of %s: %s %v", m.Event, m.Platform, r.Wrong, err)
			}
			done <- r
		}()
	}
	for range list {
		r := <-done
		if want := event.repliesWith(); r.UserSaw != want && r.UserSaw != message.repliesWith() {
			t.Errorf("the user saw %q", r.UserSaw)
		}
		if len(r.Attempts) != 2 {
			t.Errorf("pushed %d times", len(r.Attempts))
		}
	}
	if events, messages := backend.ran(event), backend.ran(message); events != 4 || messages != 2 {
		t.Errorf("the backend was given %d of 4 events, and %d of 2 messages", events, messages)
	}
	platforms := map[string]int{}
	for _, r := range w.Backend.Received()[before:] {
		if bytes.Contains(r.Body, []byte(message.name)) {
			platforms[r.Header.Get("X-Wechat-Platform")]++
		}
	}
	if platforms[integration.PlatformID] != 1 || platforms[secondPlatform] != 1 {
		t.Errorf("the backend was given the message by platform: %v", platforms)
	}
}

// paceAge: a push that comes nine seconds after its message was made is WeChat's last, and is answered, whatever this
// machine's clock says in comparison with WeChat's.
func paceAge(t *testing.T, w *integration.World) {
	const skewed = 100 * time.Second
	tests := make(map[string]func(*testing.T))
	for clock, skew := range map[string]time.Duration{"right": 0, "behind": -skewed, "ahead": skewed} {
		tests["fresh, the clock is "+clock] = func(t *testing.T) { paceAged(t, w, skew, 0, false) }
		tests["late, the clock is "+clock] = func(t *testing.T) { paceAged(t, w, skew, 11*time.Second, true) }
	}
	atOnce(t, tests)
}

func paceAged(t *testing.T, w *integration.World, skew, age time.Duration, last bool) {
	r, err := w.WeChat.PushMessage(t.Context(), wxsim.Message{
		Platform: integration.PlatformID, AppID: integration.AuthorizerID, Content: scriptFor(t, 0, giveNever).String(), Attempts: 1,
		Skew: skew, CreateTime: time.Now().Add(skew - age),
	})
	if err != nil {
		t.Fatal(err)
	}
	a := r.Last()
	if answered := a.Status == http.StatusOK; answered != last {
		t.Fatalf("status %d after %v: %v", a.Status, a.Latency, a.Err)
	}
	if last && (a.Latency < replyTimeout-100*time.Millisecond || r.Kind != wxsim.ReplySuccess) {
		t.Errorf("answered %s after %v", r.Kind, a.Latency)
	}
}

// paceAgain: a message that WeChat pushes again although it was answered gets the same answer, sealed anew, and the
// backend hears nothing of it.
func paceAgain(t *testing.T, w *integration.World, backend *scripted) {
	s := scriptFor(t, 0, giveText)
	m := wxsim.Message{
		Platform: integration.PlatformID, AppID: integration.AuthorizerID, Content: s.String(),
		MsgID: time.Now().UnixNano(), From: w.WeChat.NewUser(integration.AuthorizerID).OpenID, CreateTime: time.Now(),
	}
	first := pushed(t, w, m)
	again := pushed(t, w, m)
	if first.UserSaw != s.repliesWith() || !bytes.Equal(first.Reply, again.Reply) {
		t.Errorf("the user saw %q, and then %q", first.UserSaw, again.UserSaw)
	}
	if bytes.Equal(first.Last().Body, again.Last().Body) {
		t.Error("the answer was not sealed anew")
	}
	if n := backend.ran(s); n != 1 {
		t.Errorf("the backend was given it %d times", n)
	}
}

// paceCredentials: both configurations of two platforms push to one address at the same time, and each reply is sealed
// with the credentials of its push.
func paceCredentials(t *testing.T, w *integration.World, backend *scripted) {
	tests := make(map[string]func(*testing.T))
	for _, platform := range []string{integration.PlatformID, secondPlatform} {
		for name, keys := range map[string]*wxsim.PushKeys{"test": nil, "published": published(w, platform)} {
			for _, take := range []time.Duration{0, 7 * time.Second} {
				tests[fmt.Sprintf("%s %s %v", platform, name, take)] = func(t *testing.T) {
					s := scriptFor(t, take, giveText)
					r := pushed(t, w, wxsim.Message{Platform: platform, AppID: integration.AuthorizerID, Content: s.String(), Keys: keys})
					if r.UserSaw != s.repliesWith() || backend.ran(s) != 1 {
						t.Errorf("the user saw %q, and the backend was given it %d times", r.UserSaw, backend.ran(s))
					}
				}
			}
		}
	}
	atOnce(t, tests)
}

// modePrefix is how the appids of those accounts begin.
const modePrefix = "wxb"

// modeAccounts are an account for each mode and format.
func modeAccounts() []paceAccount {
	var list []paceAccount
	for i, mode := range []wxsim.Mode{wxsim.ModePlain, wxsim.ModeCompat, wxsim.ModeSafe} {
		for j, format := range []wxsim.Format{wxsim.FormatXML, wxsim.FormatJSON} {
			list = append(list, paceAccount{appid: fmt.Sprintf("%s0000000000000%d%d", modePrefix, i, j), mode: mode, format: format, route: "message"})
		}
	}
	return list
}

func paceModes(t *testing.T, w *integration.World, backend *scripted, site *paceSite) {
	tests := make(map[string]func(*testing.T))
	for _, a := range site.accounts {
		if strings.HasPrefix(a.appid, modePrefix) {
			tests[fmt.Sprintf("%s %s", a.mode, a.format)] = func(t *testing.T) { paceMode(t, w, backend, a) }
		}
	}
	atOnce(t, tests)
}

func paceMode(t *testing.T, w *integration.World, backend *scripted, a paceAccount) {
	if h, err := w.WeChat.VerifyMessageURL(t.Context(), "", a.appid); err != nil || h.Wrong != "" {
		t.Errorf("handshake: %s %v", h.Wrong, err)
	}
	for _, take := range []time.Duration{0, 7 * time.Second} {
		s := scriptFor(t, take, giveText)
		r := pushed(t, w, wxsim.Message{AppID: a.appid, Content: s.String()})
		if r.UserSaw != s.repliesWith() {
			t.Errorf("the user saw %q", r.UserSaw)
		}
		if sealed := bytes.Contains(r.Last().Body, []byte("Encrypt")); sealed != (a.mode != wxsim.ModePlain) {
			t.Errorf("the answer is sealed: %v", sealed)
		}
		if n := backend.ran(s); n != 1 {
			t.Errorf("the backend was given it %d times", n)
		}
	}
	paceBackendSaw(t, w, a)
	paceForged(t, w, a)
}

// paceBackendSaw checks that a backend cannot tell the mode that its account is in.
func paceBackendSaw(t *testing.T, w *integration.World, a paceAccount) {
	t.Helper()
	seen := 0
	for _, r := range w.Backend.Received() {
		if r.Header.Get("X-Wechat-Appid") != a.appid {
			continue
		}
		seen++
		u, err := url.Parse(r.URI)
		if err != nil {
			t.Fatal(err)
		}
		q := u.Query()
		if q.Get("signature") == "" || q.Get("openid") == "" || q.Has("msg_signature") || q.Has("encrypt_type") {
			t.Errorf("the query's names are %v", slices.Sorted(mapKeys(q)))
		}
		if bytes.Contains(r.Body, []byte("Encrypt")) || !bytes.Contains(r.Body, []byte("Content")) {
			t.Errorf("the body is %s", r.Body)
		}
		want := "text/xml"
		if a.format == wxsim.FormatJSON {
			want = "application/json"
		}
		if got := r.Header.Get("Content-Type"); !strings.HasPrefix(got, want) || r.Length != int64(len(r.Body)) {
			t.Errorf("%d bytes of %s, announced as %d", len(r.Body), got, r.Length)
		}
	}
	if seen == 0 {
		t.Error("the backend was given nothing")
	}
}

func mapKeys(q url.Values) func(func(string) bool) {
	return func(yield func(string) bool) {
		for name := range q {
			if !yield(name) {
				return
			}
		}
	}
}

// paceForged: an account that WeChat encrypts for takes nothing else, and the parts that are not signed decide nothing. A
// plain account's signature is good for one body.
func paceForged(t *testing.T, w *integration.World, a paceAccount) {
	t.Helper()
	const forged = "forged-and-not-signed"
	one := func(tamper func(*wxsim.Outgoing)) wxsim.Attempt {
		t.Helper()
		r, err := w.WeChat.PushMessage(t.Context(), wxsim.Message{
			AppID: a.appid, Content: scriptFor(t, 0, giveSuccess).String(), Attempts: 1, Tamper: tamper,
		})
		if err != nil {
			t.Fatal(err)
		}
		return r.Last()
	}
	// A message as in plain mode, signed as far as that mode signs anything.
	body := "<xml><ToUserName>gh_000000000001</ToUserName><FromUserName>o1</FromUserName><CreateTime>" + strconv.FormatInt(time.Now().Unix(), 10) +
		"</CreateTime><MsgType>text</MsgType><Content>" + forged + "</Content><MsgId>1</MsgId></xml>"
	if a.format == wxsim.FormatJSON {
		body = `{"ToUserName":"gh_000000000001","FromUserName":"o1","CreateTime":` + strconv.FormatInt(time.Now().Unix(), 10) +
			`,"MsgType":"text","Content":"` + forged + `","MsgId":1}`
	}
	var sent wxsim.Outgoing
	switch a.mode {
	case wxsim.ModePlain:
		if got := one(func(o *wxsim.Outgoing) { sent = *o; sent.Query = slices.Clone(o.Query) }); got.Status != http.StatusOK {
			t.Errorf("a plain push: %d %v", got.Status, got.Err)
		}
		// Whoever saw it has a signature for this timestamp and nonce, which covers no body.
		if got := one(func(o *wxsim.Outgoing) { o.Query, o.Body = sent.Query, []byte(body) }); got.Status != http.StatusForbidden {
			t.Errorf("another body under a signature that was used: %d %v", got.Status, got.Err)
		}
		// WeChat itself may push the same once more under them.
		if got := one(func(o *wxsim.Outgoing) { o.Query, o.Body = sent.Query, sent.Body }); got.Status != http.StatusOK {
			t.Errorf("the same push once more: %d %v", got.Status, got.Err)
		}
		if got := one(func(o *wxsim.Outgoing) { o.Set("signature", strings.Repeat("0", 40)) }); got.Status != http.StatusForbidden {
			t.Errorf("a wrong signature: %d %v", got.Status, got.Err)
		}
	default:
		for name, tamper := range map[string]func(*wxsim.Outgoing){
			"plain": func(o *wxsim.Outgoing) {
				o.Delete("msg_signature")
				o.Delete("encrypt_type")
				o.Body = []byte(body)
			},
			"plain, said to be encrypted": func(o *wxsim.Outgoing) { o.Body = []byte(body) },
			"without msg_signature":       func(o *wxsim.Outgoing) { o.Delete("msg_signature") },
		} {
			if got := one(tamper); got.Status != http.StatusForbidden {
				t.Errorf("%s: %d %v", name, got.Status, got.Err)
			}
		}
		if a.mode == wxsim.ModeCompat {
			// The elements beside Encrypt are not signed.
			got := one(func(o *wxsim.Outgoing) {
				o.Body = bytes.ReplaceAll(o.Body, []byte(scriptFor(t, 0, giveSuccess).String()), []byte(forged))
				if !bytes.Contains(o.Body, []byte(forged)) {
					t.Error("the body has no plain part")
				}
			})
			if got.Status != http.StatusOK {
				t.Errorf("a forged plain part: %d %v", got.Status, got.Err)
			}
		}
	}
	for _, r := range w.Backend.Received() {
		if bytes.Contains(r.Body, []byte(forged)) {
			t.Error("the backend was given what nobody signed")
		}
	}
}

// TestPaceHold: a push whose connection nobody drops is dropped by the gateway. WeChat is made to wait for longer than it
// does, as something between it and the gateway may.
func TestPaceHold(t *testing.T) {
	t.Parallel()
	w, backend := newPaceWorld(t, &paceSite{routes: []paceRoute{{name: "message"}}}, func(w *integration.World) {
		w.Config.Pace.Timeout = 2 * wechatWait
	})
	s := scriptFor(t, 8*time.Second, giveText)
	r := pushed(t, w, wxsim.Message{Platform: integration.PlatformID, AppID: integration.AuthorizerID, Content: s.String()})
	if r.UserSaw != s.repliesWith() || len(r.Attempts) != 2 || backend.ran(s) != 1 {
		t.Errorf("the user saw %q after %d attempts, and the backend was given it %d times", r.UserSaw, len(r.Attempts), backend.ran(s))
	}
	if a := r.Attempts[0]; a.Err == nil || a.TimedOut || a.Latency < wechatWait || a.Latency > 6*time.Second+slack {
		t.Errorf("the first push ended after %v with status %d: %v", a.Latency, a.Status, a.Err)
	}
}

// TestPaceConnection: a push that is answered while its backend call goes on leaves its connection usable, or closes it:
// WeChat's next push on it does not wait for the backend.
func TestPaceConnection(t *testing.T) {
	t.Parallel()
	w, _ := newPaceWorld(t, &paceSite{routes: []paceRoute{{name: "message"}}}, nil)
	m := wxsim.Message{
		Platform: integration.PlatformID, AppID: integration.AuthorizerID, Content: scriptFor(t, 0, giveNever).String(),
		CreateTime: time.Now().Add(-11 * time.Second), // so that its first push is the last
	}
	if r := pushed(t, w, m); r.Kind != wxsim.ReplySuccess || len(r.Attempts) != 1 {
		t.Errorf("answered %s after %d attempts", r.Kind, len(r.Attempts))
	}
	s := scriptFor(t, 0, giveText)
	m.Content, m.CreateTime = s.String(), time.Now()
	if r := pushed(t, w, m); r.UserSaw != s.repliesWith() || len(r.Attempts) != 1 {
		t.Errorf("the next push was sent %d times until the user saw %q", len(r.Attempts), r.UserSaw)
	}
}

// TestPaceReload: the configuration is reloaded while pushes are held. None of their replies is lost, and no backend is
// asked twice: the push that comes under the new configuration joins the call that was begun under the old one.
func TestPaceReload(t *testing.T) {
	t.Parallel()
	w, backend := newPaceWorld(t, &paceSite{routes: []paceRoute{{name: "message"}}}, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var scripts []script
	results := make(map[script]chan wxsim.PushResult)
	for _, take := range []time.Duration{3 * time.Second, 8 * time.Second, 13 * time.Second} { // the next push is due at 5 and 10, and may be late by 3
		s := scriptFor(t, take, giveText)
		scripts, results[s] = append(scripts, s), make(chan wxsim.PushResult, 1)
		go func() {
			r, err := w.WeChat.PushMessage(ctx, wxsim.Message{Platform: integration.PlatformID, AppID: integration.AuthorizerID, Content: s.String()})
			if err != nil {
				t.Errorf("%v: %v", s, err)
			}
			results[s] <- r
		}()
	}
	for _, s := range scripts {
		if err := backend.wait(ctx, s); err != nil {
			t.Fatal(err)
		}
	}
	// All three are held now; then the second pushes of two, and then the third push of one.
	for _, joined := range []string{"0", "2", "3"} {
		eventually(t, "pushes that join", func() error {
			if got := metric(t, w, "caddy_wechat_push_retries_joined_total"); got != joined {
				return fmt.Errorf("%q joined, want %s", got, joined)
			}
			return nil
		})
		if err := w.Gateway.Reload(ctx); err != nil {
			t.Error(err)
		}
	}
	for i, s := range scripts {
		r := <-results[s]
		if !r.OK() || r.UserSaw != s.repliesWith() || len(r.Attempts) != i+1 {
			t.Errorf("%v: the user saw %q after %d attempts: %s", s, r.UserSaw, len(r.Attempts), r.Wrong)
		}
		heldUntilDropped(t, r)
		if n := backend.ran(s); n != 1 {
			t.Errorf("%v: the backend was given it %d times", s, n)
		}
	}
	checkViolations(t, w)
}

// TestPaceBackendKilled: the backend's process dies by kill -9 in the middle of an answer. The sender sees the fallback
// at once, and the gateway lives on.
func TestPaceBackendKilled(t *testing.T) {
	t.Parallel()
	addr := freeAddr(t)
	w, backend := newPaceWorld(t, &paceSite{
		routes:   []paceRoute{{name: "fallback", backend: addr, options: []string{`fallback text "` + fallbackText + `"`}}},
		accounts: []paceAccount{{appid: fallbackAccount, route: "fallback"}},
	}, nil)
	pid := w.Gateway.PID()
	cmd, said := startHalfBackend(t, addr)
	go func() {
		if !said.Scan() || said.Text() != "half" {
			t.Errorf("the backend says %q", said.Text())
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
	}()
	r := pushed(t, w, wxsim.Message{AppID: fallbackAccount, Content: "x"})
	if r.UserSaw != fallbackText || len(r.Attempts) != 1 {
		t.Errorf("the user saw %q after %d attempts", r.UserSaw, len(r.Attempts))
	}
	_ = cmd.Wait() // killed

	b := &integration.Backend{Answer: backend.ServeHTTP}
	if err := b.Start(addr); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	s := scriptFor(t, 0, giveText)
	if r := pushed(t, w, wxsim.Message{AppID: fallbackAccount, Content: s.String()}); r.UserSaw != s.repliesWith() {
		t.Errorf("with a backend again, the user saw %q", r.UserSaw)
	}
	select {
	case <-w.Gateway.Exited():
		t.Error("the gateway ended")
	default:
	}
	if w.Gateway.PID() != pid {
		t.Error("the gateway is another process")
	}
}
