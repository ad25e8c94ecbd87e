package wxsim

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"
)

// rolls is what happens in n throws for each of some names, thrown in a given order.
func rolls(seed uint64, names ...string) map[string][]bool {
	d := newDice(seed)
	out := map[string][]bool{}
	for _, name := range names {
		out[name] = append(out[name], d.hit(0.5, "site", name))
	}
	return out
}

func TestHostilityIsRepeatable(t *testing.T) {
	t.Parallel()
	var inOrder, mixed []string
	for range 200 {
		inOrder = append(inOrder, "a")
		mixed = append(mixed, "b", "a")
	}
	for range 200 {
		inOrder = append(inOrder, "b")
	}
	one, two := rolls(1, inOrder...), rolls(1, mixed...)
	if !slices.Equal(one["a"], two["a"]) || !slices.Equal(one["b"], two["b"]) {
		t.Error("the order among names changed the outcome")
	}
	if slices.Equal(one["a"], rolls(2, inOrder...)["a"]) || slices.Equal(one["a"], one["b"]) {
		t.Error("seed or name make no difference")
	}
	hits := 0
	for _, hit := range one["a"] {
		if hit {
			hits++
		}
	}
	if hits < 70 || hits > 130 {
		t.Errorf("%d of 200 hits at a rate of 0.5", hits)
	}
}

// TestSameSeedSamePushes compares all that two equal simulators send.
func TestSameSeedSamePushes(t *testing.T) {
	t.Parallel()
	run := func(seed uint64) string {
		s := newSim(t, func(c *Config) { c.Seed, c.Faults = seed, Faults{} })
		g := newFakeGateway(t, testAccount, ModeSafe, func(string) string { return "" })
		s.SetMessageURL(testAccount, g.URL)
		var log strings.Builder
		for range 20 {
			r, err := s.PushMessage(t.Context(), Message{AppID: testAccount, Content: "x", From: "o1"})
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(&log, "%v ", r.Duplicate != nil)
		}
		for i, q := range g.query {
			for part := range strings.SplitSeq(q, "&") {
				key, _, _ := strings.Cut(part, "=")
				log.WriteString(key + " ")
			}
			fmt.Fprintf(&log, "%v %v\n", strings.Contains(g.plains[i], "CDATA"), strings.Contains(g.plains[i], "\n"))
		}
		return log.String()
	}
	first := run(7)
	if run(7) != first {
		t.Error("two runs with one seed differ")
	}
	if run(8) == first {
		t.Error("two seeds give the same")
	}
	for _, sign := range []string{"true", "false", "wx_trace"} {
		if !strings.Contains(first, sign) {
			t.Errorf("nothing hostile about %q in %s", sign, first)
		}
	}
}

func TestDefaultsOfFaults(t *testing.T) {
	t.Parallel()
	if f := (Faults{}).withDefaults(); f.DuplicatePushes <= 0 || f.LostAnswers <= 0 || f.EarlyDeath <= 0 || f.LostTokenAnswers != 0 {
		t.Errorf("hostile by default: %+v", f)
	}
	if f := (Faults{Polite: true}).withDefaults(); f.DuplicatePushes != 0 || f.LostAnswers != 0 || f.EarlyDeath != 0 {
		t.Errorf("polite: %+v", f)
	}
	f := Faults{Polite: true, LostAnswers: 1, EarlyDeath: -1}.withDefaults()
	if d := newDice(0); f.LostAnswers != 1 || d.hit(f.EarlyDeath, "x", "y") || !d.hit(f.LostAnswers, "x", "y") {
		t.Errorf("chosen: %+v", f)
	}
}

func TestFailNext(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	token := c.stable(false).text("access_token")
	call := func() (result, error) {
		return c.do(c.request(http.MethodPost, "/cgi-bin/menu/create", "access_token="+token, `{"button":[]}`))
	}
	const path = "/cgi-bin/menu/create"
	menu := func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		made := s.menus[testAccount] != nil
		delete(s.menus, testAccount)
		return made
	}
	s.FailNext(path, Fault{Errcode: 40001})
	s.FailNext(path, Fault{Status: http.StatusBadGateway, Body: "<html>", Delay: time.Millisecond})
	s.FailNext(path, Fault{DropConnection: true})
	s.FailNext(path, Fault{DropConnection: true, Act: true})
	s.FailNext(path, Fault{Half: true})
	s.FailNext(path, Fault{Delay: time.Millisecond})
	r, err := call()
	if err != nil || r.errcode() != 40001 || menu() {
		t.Errorf("errcode: %s %v", r.body, err)
	}
	if r, err = call(); err != nil || r.status != http.StatusBadGateway || r.header.Get("Content-Type") != "text/html" || menu() {
		t.Errorf("status: %+v %v", r, err)
	}
	if _, err = call(); err == nil || menu() {
		t.Error("the connection was not dropped before acting")
	}
	if _, err = call(); err == nil || !menu() {
		t.Error("the connection was not dropped after acting")
	}
	if _, err = call(); err == nil {
		t.Error("more than half an answer arrived")
	}
	if r, err = call(); err != nil || r.errcode() != 0 {
		t.Errorf("only slow: %+v %v", r, err)
	}
	s.FailNext(AnyPath, Fault{Errcode: -1, Times: -1})
	for range 3 {
		if r, err = call(); err != nil || r.errcode() != -1 {
			t.Errorf("until cleared: %s %v", r.body, err)
		}
	}
	s.ClearFaults()
	if r, err = call(); err != nil || r.errcode() != 0 {
		t.Errorf("after ClearFaults: %s %v", r.body, err)
	}
	// A token that a fault refused may be renewed.
	c.stable(true)
	wantNoViolations(t, s)
	var faults []string
	for _, e := range s.Journal().Calls(path) {
		faults = append(faults, e.Fault)
	}
	if got := strings.Join(faults[:6], " "); got != "errcode delay+status drop drop+lost half delay" {
		t.Errorf("journal: %s", got)
	}
}

func TestLostTokensMayBeRenewed(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	s.FailNext("/cgi-bin/stable_token", Fault{DropConnection: true, Act: true})
	_, err := c.do(c.request(http.MethodPost, "/cgi-bin/stable_token", "", map[string]any{
		"grant_type": "client_credential", "appid": testAccount, "secret": "account-" + testSecret,
	}))
	if err == nil {
		t.Fatal("the answer arrived")
	}
	if c.stable(false).text("access_token") == "" {
		t.Error("no token")
	}
	wantNoViolations(t, s)
}

func TestLostAnswersOfApps(t *testing.T) {
	t.Parallel()
	s := newSim(t, func(c *Config) { c.Faults.LostAnswers, c.Faults.SlowAnswers, c.Faults.SlowBy = 1, 1, time.Millisecond })
	c := caller{t, s}
	token := c.stable(false).text("access_token") // never lost
	var dropped, html int
	for range 40 {
		switch r, err := c.do(c.request(http.MethodGet, "/cgi-bin/user/get", "access_token="+token, nil)); {
		case err != nil:
			dropped++
		case r.status == http.StatusBadGateway:
			html++
		default:
			t.Errorf("an answer came through: %s", r.body)
		}
	}
	if dropped == 0 || html == 0 {
		t.Errorf("%d dropped, %d pages: want some of both", dropped, html)
	}
}

func TestTwoRenewalsAtOnce(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	begin := func(method, target, body string) (*call, func()) {
		c := &call{s: s, r: httptest.NewRequestWithContext(t.Context(), method, target, nil), body: []byte(body)}
		c.query = c.readQuery()
		return c, c.beginRenewal()
	}
	component := fmt.Sprintf(`{"component_appid":%q}`, testPlatform)
	authorizer := func(appID string) string {
		return fmt.Sprintf(`{"component_appid":%q,"authorizer_appid":%q}`, testPlatform, appID)
	}
	var ends []func()
	for _, tc := range []struct {
		method, target, body string
		violation            bool
	}{
		{http.MethodGet, "/cgi-bin/token?appid=" + testAccount, "", false},
		{http.MethodPost, "/cgi-bin/stable_token", `{"appid":"` + testAccount + `"}`, false},
		{http.MethodPost, "/cgi-bin/component/api_component_token", component, false},
		{http.MethodPost, "/cgi-bin/component/api_authorizer_token", authorizer(testShop), false},
		{http.MethodPost, "/cgi-bin/component/api_authorizer_token", authorizer(testMini), false},
		{http.MethodPost, "/cgi-bin/component/api_create_preauthcode", component, false},
		{http.MethodPost, "/cgi-bin/component/api_create_preauthcode", component, false},
		{http.MethodGet, "/cgi-bin/token?appid=" + testAccount, "", true},
		{http.MethodPost, "/cgi-bin/stable_token", `{"appid":"` + testAccount + `"}`, true},
		{http.MethodPost, "/cgi-bin/component/api_component_token", component, true},
		{http.MethodPost, "/cgi-bin/component/api_authorizer_token", authorizer(testShop), true},
	} {
		c, end := begin(tc.method, tc.target, tc.body)
		ends = append(ends, end)
		if got := len(c.entry.Violations) == 1; got != tc.violation {
			t.Errorf("%s %s: violations %v", tc.target, tc.body, c.entry.Violations)
		}
	}
	for _, end := range ends {
		end()
	}
	if len(s.renewing) != 0 {
		t.Errorf("still renewing %v", s.renewing)
	}
}

func TestCallerWhoLeavesLosesTheToken(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	s.FailNext("/cgi-bin/stable_token", Fault{Delay: time.Minute})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s.Watch(func(p Progress) {
		if p.Step == StepArrived {
			cancel() // not before: a call that was never sent leaves nothing to wait for
		}
	})
	body := fmt.Sprintf(`{"grant_type":"client_credential","appid":%q,"secret":"account-%s"}`, testAccount, testSecret)
	if _, err := c.do(c.request(http.MethodPost, "/cgi-bin/stable_token", "", body).WithContext(ctx)); err == nil {
		t.Error("the slow call was answered")
	}
	if _, err := s.Journal().Wait(t.Context(), func(e Entry) bool { return e.Fault == "delay" }); err != nil {
		t.Error(err)
	}
	c.stable(false)
	wantNoViolations(t, s)
}
