package caddymodule

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

func TestAuthorizeCallback(t *testing.T) {
	f := newAuthorize(t, &Authorize{})
	b := f.begin("kind=pc")
	back := b.back("queryauthcode@@@1")
	rec := f.get(back, "Cookie", b.cookie)
	body := rec.Body.String()
	for _, s := range []string{
		"授权成功", "小店 &lt;b&gt;", "某公司", authorizerID, `<img src="https://wx.qlogo.cn/mmopen/a/0"`,
		`<ul class="granted"><li>消息管理</li><li>用户管理</li><li>菜单管理</li></ul>`, `<ul class="missing"><li>网页服务</li></ul>`,
	} {
		if !strings.Contains(body, s) {
			t.Errorf("body lacks %q:\n%s", s, body)
		}
	}
	h := rec.Header()
	if rec.Code != http.StatusOK || h.Get("Referrer-Policy") != "no-referrer" || h.Get("Cache-Control") != "no-store" ||
		!strings.HasSuffix(h.Get("Content-Security-Policy"), "; img-src https://*.qlogo.cn https://*.qpic.cn") {
		t.Errorf("answer %d %v", rec.Code, h)
	}
	token, err := f.app.manager().Get(t.Context(), tokens.AuthorizerKey(platformID, authorizerID))
	if err != nil || token.Value.Reveal() != grantedAccess {
		t.Errorf("the account's token: %v", err)
	}
	f.assertNoSecrets(rec, b.state())

	// The back button, in either language, asks WeChat for nothing more.
	if again := f.get(back, "Cookie", b.cookie, "Accept-Language", "en"); again.Code != http.StatusOK || !strings.Contains(again.Body.String(), "<li>messages</li>") {
		t.Errorf("again: %d\n%s", again.Code, again.Body)
	}
	// The start is used up for any other code.
	if other := f.get(b.back("queryauthcode@@@2"), "Cookie", b.cookie); other.Code != http.StatusGone {
		t.Errorf("another code: %d", other.Code)
	}
	if a, i := f.wechat.count(queryAuthPath), f.wechat.count(infoPath); a != 1 || i != 1 {
		t.Errorf("%d exchanges, %d questions about the account", a, i)
	}
	if ok, used := counted(t, f.app.metrics().authorize, "callback", "ok"), counted(t, f.app.metrics().authorize, "callback", "used"); ok != 2 || used != 1 {
		t.Errorf("counted %v ok, %v used", ok, used)
	}
}

func TestAuthorizeCallbackThen(t *testing.T) {
	f := newAuthorize(t, &Authorize{Then: "https://admin.example.com/accounts?from=wechat#/list"})
	b := f.begin("kind=h5")
	rec := f.get(b.back("queryauthcode@@@1")+"&then=https://evil.example&appid="+strangerID, "Cookie", b.cookie)
	if want := "https://admin.example.com/accounts?from=wechat&appid=" + authorizerID + "#/list"; rec.Code != http.StatusFound || rec.Header().Get("Location") != want {
		t.Errorf("answer %d to %s", rec.Code, rec.Header().Get("Location"))
	}
	assertPrivate(t, rec.Header())
	f.assertNoSecrets(rec, b.state())
}

// The permission sets that the link asked for are those that can be missing.
func TestAuthorizeCallbackMissing(t *testing.T) {
	for _, tt := range []struct {
		name, query, info string
		sets              []int
		missing           []string
	}{
		{"of those asked for", "&category=1,15,33,999", accountInfoJSON, []int{15}, []string{"messages", "linked mini programs", "permission set 999"}},
		{"none of those asked for", "&category=15", accountInfoJSON, []int{1, 15}, nil},
		{"of those in use", "", accountInfoJSON, []int{15}, []string{"messages", "web service: OAuth, JS-SDK"}},
		{"of a mini program", "", `{"nick_name":"x","user_name":"gh_1","MiniProgramInfo":{"network":{}}}`, []int{18}, []string{"mini program: customer messages"}},
		{"nothing known, nothing granted", "", `{}`, nil, []string{"messages", "web service: OAuth, JS-SDK"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newAuthorize(t, &Authorize{})
			f.wechat.set(func() { f.wechat.sets, f.wechat.info = tt.sets, tt.info })
			b := f.begin("kind=pc" + tt.query)
			rec := f.get(b.back("queryauthcode@@@1"), "Cookie", b.cookie, "Accept-Language", "en")
			_, rest, found := strings.Cut(rec.Body.String(), `<ul class="missing">`)
			list, _, _ := strings.Cut(rest, "</ul>")
			want := ""
			for _, name := range tt.missing {
				want += "<li>" + name + "</li>"
			}
			if rec.Code != http.StatusOK || found != (want != "") || list != want {
				t.Errorf("answer %d, missing %s, want %s", rec.Code, list, want)
			}
			if granted := strings.Contains(rec.Body.String(), "No permission was granted"); granted != (tt.sets == nil) {
				t.Errorf("the page:\n%s", rec.Body)
			}
		})
	}
}

// An account of which WeChat shows nothing has authorised all the same.
func TestAuthorizeCallbackWithoutInfo(t *testing.T) {
	f := newAuthorize(t, &Authorize{})
	f.wechat.set(func() {
		f.wechat.failures[infoPath] = `{"errcode":45009,"errmsg":"reach max api daily quota limit"}`
	})
	b := f.begin("kind=pc")
	rec := f.get(b.back("queryauthcode@@@1"), "Cookie", b.cookie)
	if rec.Code != http.StatusOK || !strings.Contains(rec.Body.String(), "<li>消息管理</li>") || strings.Contains(rec.Body.String(), "<img") || strings.Contains(rec.Body.String(), "missing\">") {
		t.Errorf("answer %d\n%s", rec.Code, rec.Body)
	}
	if n := f.logs.FilterMessageSnippet("name and picture are missing").Len(); n != 1 {
		t.Errorf("%d log lines", n)
	}
}

// Without a state of this browser's own, WeChat is not asked.
func TestAuthorizeCallbackRefuses(t *testing.T) {
	f := newAuthorize(t, &Authorize{})
	mine, other := f.begin("kind=pc"), f.begin("kind=pc")
	elsewhere := f.begin("kind=pc&platform=" + otherPlatform)
	const code = "queryauthcode@@@1"
	path := authorizeBase + "/callback/" + platformID
	opaque, err := f.app.manager().IssueOpaque(t.Context(), tokens.OpaqueClaims{AppID: platformID, ExpiresAt: time.Now().Add(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	bound := place{origin: "http://example.com"}.boundTo(platformID, strings.TrimPrefix(mine.cookie, browserCookie+"="))
	expired, err := f.app.manager().SealState(t.Context(), new(authorizeState).payload(), time.Now(), bound...)
	if err != nil {
		t.Fatal(err)
	}
	short, err := f.app.manager().SealState(t.Context(), []byte("x"), time.Now().Add(time.Hour), bound...)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := f.app.manager().SealState(t.Context(), new(authorizeState).payload(), time.Now().Add(time.Hour), append([]string{flowPurpose}, bound[1:]...)...)
	if err != nil {
		t.Fatal(err)
	}
	with := func(s string) string { return path + "?auth_code=" + code + "&s=" + url.QueryEscape(s) }
	for _, tt := range []struct {
		name, target, cookie string
		status               int
	}{
		{"no state", path + "?auth_code=" + code, mine.cookie, 400},
		{"no cookie", mine.back(code), "", 400},
		{"another browser's cookie", mine.back(code), other.cookie, 400},
		{"cookie that is none", mine.back(code), browserCookie + "=x", 400},
		{"made up", with("made-up"), mine.cookie, 400},
		{"altered", with(flip(mine.state())), mine.cookie, 400},
		{"an opaque token of ours", with(opaque.Reveal()), mine.cookie, 400},
		{"a state of a login", with(foreign.Reveal()), mine.cookie, 400},
		{"a state of another form", with(short.Reveal()), mine.cookie, 400},
		{"expired", with(expired.Reveal()), mine.cookie, 400},
		{"too long", with(strings.Repeat("A", 600)), mine.cookie, 400},
		{"state twice", mine.back(code) + "&s=x", mine.cookie, 400},
		{"code twice", mine.back(code) + "&auth_code=x", mine.cookie, 400},
		{"no code", mine.back(""), mine.cookie, 400},
		{"code too long", mine.back(strings.Repeat("x", maxCode+1)), mine.cookie, 400},
		{"another platform's state", strings.Replace(elsewhere.back(code), otherPlatform, platformID, 1), elsewhere.cookie, 400},
		{"unknown platform", strings.Replace(mine.back(code), platformID, strangerID, 1), mine.cookie, 404},
		{"no platform", strings.Replace(mine.back(code), platformID, "", 1), mine.cookie, 404},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := f.logs.Len()
			rec := f.get(tt.target, "Cookie", tt.cookie)
			if rec.Code != tt.status || rec.Header().Get("Location") != "" {
				t.Errorf("answer %d\n%s", rec.Code, rec.Body)
			}
			if n := f.logs.Len() - before; n != 1 {
				t.Errorf("%d log lines, want 1", n)
			}
			assertPrivate(t, rec.Header())
			f.assertNoSecrets(rec, mine.state())
			if tt.status == 400 && !strings.Contains(rec.Body.String(), `href="/wx/authorize">`) && !strings.Contains(tt.name, "twice") {
				t.Errorf("the page does not lead back:\n%s", rec.Body)
			}
		})
	}
	if n := f.wechat.count(queryAuthPath); n != 0 {
		t.Errorf("WeChat was asked %d times", n)
	}
	if rec := f.get(mine.back(code), "Cookie", mine.cookie); rec.Code != http.StatusOK {
		t.Errorf("the right one: %d", rec.Code)
	}
}

// flip changes a character in the middle.
func flip(s string) string {
	b := []byte(s)
	if b[len(b)/2]++; b[len(b)/2] == 'z'+1 || b[len(b)/2] == 'Z'+1 || b[len(b)/2] == '9'+1 {
		b[len(b)/2] = 'a'
	}
	return string(b)
}

func TestAuthorizeCallbackFails(t *testing.T) {
	for _, tt := range []struct {
		name, code, answer string
		status             int
		result             string
		asked              int // exchanges after a reload
	}{
		{"made up", "x", "", 410, "invalid", 1},
		{"expired", "queryauthcode@@@1", `{"errcode":61010,"errmsg":"code expired"}`, 410, "invalid", 1},
		{"refused", "queryauthcode@@@1", `{"errcode":61007,"errmsg":"api is unauthorized"}`, 502, "refused", 2},
		{"busy", "queryauthcode@@@1", `{"errcode":-1,"errmsg":"system error"}`, 503, "unavailable", 2},
		{"not JSON", "queryauthcode@@@1", `<html>`, 503, "unavailable", 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newAuthorize(t, &Authorize{})
			f.wechat.set(func() { f.wechat.failures[queryAuthPath] = tt.answer })
			b := f.begin("kind=pc")
			rec := f.get(b.back(tt.code), "Cookie", b.cookie)
			if rec.Code != tt.status || counted(t, f.app.metrics().authorize, "callback", tt.result) != 1 {
				t.Errorf("answer %d", rec.Code)
			}
			f.assertNoSecrets(rec, b.state())
			if lines := f.logs.All(); len(lines) != 1 || lines[0].ContextMap()["remedy"] == "" {
				t.Errorf("log %v", lines)
			}
			if n := f.wechat.count(queryAuthPath); n != 1 {
				t.Errorf("%d exchanges", n)
			}
			f.wechat.set(func() { delete(f.wechat.failures, queryAuthPath) })
			again := f.get(b.back(tt.code), "Cookie", b.cookie)
			if tt.asked == 1 && again.Code != tt.status || tt.asked > 1 && again.Code != http.StatusOK {
				t.Errorf("after a reload: %d\n%s", again.Code, again.Body)
			}
			if n := f.wechat.count(queryAuthPath); tt.asked == 1 && n != 1 {
				t.Errorf("%d exchanges after a reload", n)
			}
		})
	}
}

// No ticket, and WeChat's refusals before anybody leaves.
func TestAuthorizeGoFails(t *testing.T) {
	f := newAuthorize(t, &Authorize{})
	for _, tt := range []struct {
		answer string
		status int
	}{
		{`{"errcode":61004,"errmsg":"access clientip is not registered requestIP: 10.0.0.1"}`, 502},
		{`{"errcode":45009,"errmsg":"reach max api daily quota limit"}`, 503},
		{`{}`, 503},
	} {
		f.wechat.set(func() { f.wechat.failures[preAuthPath] = tt.answer })
		before := f.logs.Len()
		rec := f.get(authorizeBase + "/go?kind=pc")
		if rec.Code != tt.status || rec.Header().Get("Location") != "" || f.logs.Len() != before+1 {
			t.Errorf("%s: %d, %d log lines", tt.answer, rec.Code, f.logs.Len()-before)
		}
		f.assertNoSecrets(rec)
	}
	wechat := newPlatformWeChat(t)
	_, ctx := newTestApp(t, testConfig(wechat.URL))
	noTicket := &authorizeFixture{Authorize: &Authorize{Platform: platformID}, t: t, wechat: wechat}
	noTicket.provision(ctx)
	rec := noTicket.get(authorizeBase + "/go?kind=pc")
	if lines := noTicket.logs.All(); rec.Code != http.StatusServiceUnavailable || len(lines) != 1 || !strings.Contains(fmt.Sprint(lines[0].ContextMap()["remedy"]), "component_verify_ticket") {
		t.Errorf("without a ticket: %d, log %v", rec.Code, lines)
	}
}

// Browsers repeat callbacks while the first is on its way.
func TestAuthorizeCallbacksShareOneExchange(t *testing.T) {
	f := newAuthorize(t, &Authorize{Then: "https://admin.example.com/"})
	b := f.begin("kind=pc")
	gate := make(chan struct{})
	f.wechat.set(func() { f.wechat.gate = gate })
	const visitors = 8
	recs := make([]*httptest.ResponseRecorder, visitors)
	var wg sync.WaitGroup
	for i := range recs {
		wg.Go(func() { recs[i] = f.get(b.back("queryauthcode@@@1"), "Cookie", b.cookie) })
	}
	close(gate)
	wg.Wait()
	for _, rec := range recs {
		if rec.Code != http.StatusFound || rec.Header().Get("Location") != "https://admin.example.com/?appid="+authorizerID {
			t.Errorf("answer %d to %s", rec.Code, rec.Header().Get("Location"))
		}
	}
	if n := f.wechat.count(queryAuthPath); n != 1 {
		t.Errorf("%d exchanges", n)
	}
}

// Starts are apart from each other, whoever made them and however many are under way.
func TestAuthorizeStartsAreApart(t *testing.T) {
	f := newAuthorize(t, &Authorize{Then: "https://admin.example.com/"})
	first, second := f.begin("kind=pc"), f.begin("kind=pc")
	for i, b := range []begun{second, first} {
		if rec := f.get(b.back(fmt.Sprintf("queryauthcode@@@%d", i+1)), "Cookie", b.cookie); rec.Code != http.StatusFound {
			t.Errorf("callback %d: %d\n%s", i+1, rec.Code, rec.Body)
		}
	}
	if n := f.wechat.count(queryAuthPath); n != 2 {
		t.Errorf("%d exchanges", n)
	}
}

// admitted reports whether a visitor from an address may start.
func admitted(s *authorizations, addr string) bool {
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	r.RemoteAddr = addr
	return s.admit(caddyhttp.PrepareRequest(r, caddy.NewReplacer(), httptest.NewRecorder(), &caddyhttp.Server{})) == nil
}

func TestAuthorizeLimits(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newAuthorizations(tokens.NewManager())
		starts := func(addr string, tries int) (n int) {
			for range tries {
				if admitted(s, addr) {
					n++
				}
			}
			return n
		}
		if n := starts("192.0.2.1:1", 50); n != visitorStarts {
			t.Errorf("one visitor started %d times", n)
		}
		if n := starts("192.0.2.2:1", 50); n != visitorStarts {
			t.Errorf("the next visitor started %d times", n)
		}
		if n := starts("[2001:db8::1]:1", 5) + starts("[2001:db8::ffff:1]:1", 50); n != visitorStarts {
			t.Errorf("one /64 started %d times", n)
		}
		if n := starts("[2001:db8:0:1::1]:1", 50); n != visitorStarts {
			t.Errorf("the next /64 started %d times", n)
		}
		if n := starts("[::ffff:192.0.2.1]:1", 1); n != 0 {
			t.Error("an IPv4 address counts twice")
		}
		if n := starts("nonsense", 50) + starts("", 50); n != visitorStarts {
			t.Errorf("visitors without an address started %d times", n)
		}
		time.Sleep(3 * visitorStartEvery)
		if n := starts("192.0.2.1:1", 50); n != 3 {
			t.Errorf("after three minutes %d starts", n)
		}
		time.Sleep(time.Hour)
		n := 0
		for i := range 50 {
			n += starts(fmt.Sprintf("198.51.100.%d:1", i), 4)
		}
		if n != allStarts {
			t.Errorf("all visitors together started %d times", n)
		}
		time.Sleep(3 * allStartsEvery)
		if n := starts("203.0.113.1:1", 10); n != 3 {
			t.Errorf("after three more intervals %d starts", n)
		}
	})
}

func TestAuthorizeTooMany(t *testing.T) {
	f := newAuthorize(t, &Authorize{})
	for range visitorStarts {
		f.begin("kind=pc")
	}
	rec := f.get(authorizeBase+"/go?kind=pc", "Accept-Language", "en")
	if rec.Code != http.StatusTooManyRequests || rec.Header().Get("Retry-After") != "60" || !strings.Contains(rec.Body.String(), "Too many attempts") {
		t.Errorf("answer %d %v\n%s", rec.Code, rec.Header(), rec.Body)
	}
	if n := f.wechat.count(preAuthPath); n != visitorStarts {
		t.Errorf("%d codes", n)
	}
	if rec := f.get(authorizeBase); rec.Code != http.StatusOK {
		t.Errorf("the page: %d", rec.Code)
	}
}

// A panic below costs one callback, and those who wait for it.
func TestArrivalPanics(t *testing.T) {
	t.Parallel()
	s := newAuthorizations(tokens.NewManager())
	code := secret.New("queryauthcode@@@1")
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the panic is gone")
			}
		}()
		_, _ = s.once(t.Context(), stateID{1}, code, nil)
	}()
	got, failure := s.once(t.Context(), stateID{1}, code, func(context.Context) (*authorized, *oauthFailure) { return new(authorized), nil })
	if got == nil || failure != nil {
		t.Errorf("after a panic: %v %v", got, failure)
	}
}

func TestAuthorizePagesAreComplete(t *testing.T) {
	t.Parallel()
	for name, p := range map[string]page{
		"link": pageAuthorizeLink, "state": pageAuthorizeState, "used": pageAuthorizeUsed, "too many": pageAuthorizeTooMany,
		"refused": pageAuthorizeRefused, "unavailable": pageAuthorizeUnavailable, "pending": pageAuthorizePending,
	} {
		if p.status < 400 || p.zh.Title == "" || p.zh.Text == "" || p.en.Title == "" || p.en.Text == "" {
			t.Errorf("page %q: %+v", name, p)
		}
	}
}

// TestAuthorizeStateLivesHalfAnHour: for so long an owner may take at WeChat's page.
func TestAuthorizeStateLivesHalfAnHour(t *testing.T) {
	f := newAuthorize(t, &Authorize{})
	synctest.Test(t, func(t *testing.T) {
		client, err := tokens.NewClient(tokens.ClientOptions{Transport: transport(func(r *http.Request) (*http.Response, error) {
			return nil, fmt.Errorf("WeChat was asked for %s", r.URL.Path)
		})})
		if err != nil {
			t.Fatal(err)
		}
		a := *f.Authorize
		a.app = withinBubble(t, f.app, client)
		req := &authorizeRequest{at: place{"http://example.com", authorizeBase}, platform: f.app.platform(platformID)}
		cookie := strings.Repeat("c", 22)
		state, err := a.newState(t.Context(), cookie, req)
		if err != nil {
			t.Fatal(err)
		}
		r := visit(http.MethodGet, authorizeBase)
		r.AddCookie(&http.Cookie{Name: req.at.browserCookie(), Value: cookie})
		time.Sleep(30*time.Minute - time.Second)
		if _, failure := a.readState(r, req, state); failure != nil {
			t.Errorf("within half an hour: %s", failure.reason)
		}
		time.Sleep(2 * time.Second)
		if _, failure := a.readState(r, req, state); failure != failStateExpired || failure.page.status != http.StatusBadRequest {
			t.Errorf("later: %+v", failure)
		}
	})
}
