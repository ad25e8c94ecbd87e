package caddymodule

import (
	"bytes"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// visitor is a person with a browser that keeps cookies as browsers do.
type visitor struct {
	t   *testing.T
	h   caddyhttp.MiddlewareHandler
	jar *cookiejar.Jar
}

func newVisitor(t *testing.T, h caddyhttp.MiddlewareHandler) *visitor {
	t.Helper()
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	return &visitor{t: t, h: h, jar: jar}
}

// get asks for an address; a path alone is one of http://example.com.
func (v *visitor) get(target string) *httptest.ResponseRecorder {
	v.t.Helper()
	if strings.HasPrefix(target, "/") {
		target = "http://example.com" + target
	}
	r := httptest.NewRequest(http.MethodGet, target, nil)
	for _, c := range v.jar.Cookies(r.URL) {
		r.AddCookie(c)
	}
	rec := serve(v.t, v.h, r, nil)
	v.jar.SetCookies(r.URL, rec.Result().Cookies())
	return rec
}

// start begins a login and returns the callback address and the state that WeChat gets.
func (v *visitor) start(target string) (callback, state string) {
	v.t.Helper()
	rec := v.get(target)
	u, err := url.Parse(rec.Header().Get("Location"))
	if err != nil || rec.Code != http.StatusFound || u.Query().Get("redirect_uri") == "" {
		v.t.Fatalf("start: %d to %q", rec.Code, rec.Header().Get("Location"))
	}
	return u.Query().Get("redirect_uri"), u.Query().Get("state")
}

// wechatCalls is how WeChat calls back for an authorizer.
func wechatCalls(callback, code, state string) string {
	return callback + "?" + url.Values{"code": {code}, "state": {state}, "appid": {authorizerID}}.Encode()
}

// assertLanded fails unless an answer sends the visitor to the func verify with that state, and returns the tracking id.
func assertLanded(t *testing.T, rec *httptest.ResponseRecorder, state string) (trackingID string) {
	t.Helper()
	m := landing.FindStringSubmatch(rec.Header().Get("Location"))
	if rec.Code != http.StatusFound || m == nil || m[1] != "http://wechat.example.com/webVerify/?" {
		t.Fatalf("%d to %q", rec.Code, rec.Header().Get("Location"))
	}
	if got, err := url.PathUnescape(m[3]); err != nil || got != state {
		t.Errorf("landed with the state %q, want %q", m[3], state)
	}
	return m[2]
}

// assertTurnedAway fails unless an answer is a page with one log line, and WeChat was not asked.
func (f *oauthFixture) assertTurnedAway(rec *httptest.ResponseRecorder, status int) {
	f.t.Helper()
	if rec.Code != status || rec.Header().Get("Location") != "" || !strings.Contains(rec.Body.String(), "<h1>") {
		f.t.Errorf("answer %d to %q, want the page of %d", rec.Code, rec.Header().Get("Location"), status)
	}
	if calls := f.wechat.calls(); len(calls) > 0 {
		f.t.Errorf("WeChat was asked %q", calls)
	}
	if logs := f.logs.TakeAll(); len(logs) != 1 || logs[0].ContextMap()["remedy"] == "" {
		f.t.Errorf("logged %v", logs)
	}
	assertPrivate(f.t, rec.Header())
}

const startPath = oauthBase + "/authorize/" + authorizerID + "/verify"

// The app gets its own state back exactly, whatever it is, while WeChat gets letters and digits.
func TestOAuthFlowKeepsTheState(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID, RequireStart: true})
	for i, state := range []string{
		"", "scan", "a_b-C.9~", "a;b", "a&wxTkId=x#y", "/home?x=1", "a b+c", "扫码", "\xff\xfe", "a\r\nSet-Cookie: x=1\x00", `"'><script>`,
		"%0d%0a", flowMark, flowMark + strings.Repeat("A", 26), strings.Repeat("\xff", maxState), strings.Repeat("%", maxState),
	} {
		for _, appid := range []string{authorizerID, accountID} {
			v := newVisitor(t, f.OAuth)
			callback, wire := v.start(oauthBase + "/authorize/" + appid + "/verify?state=" + url.QueryEscape(state))
			if !flowState.MatchString("&state="+wire) || len(wire) != 34 {
				t.Errorf("state %q on the way to WeChat", wire)
			}
			query := url.Values{"code": {fmt.Sprint("c", i, appid)}, "state": {wire}}
			if appid == authorizerID {
				query.Set("appid", appid)
			}
			id := assertLanded(t, v.get(callback+"?"+query.Encode()), state)
			if u, err := f.app.users().Redeem(t.Context(), id, "crm", nil); err != nil || u.State != state || u.AppID != appid {
				t.Errorf("kept %+v, %v", u, err)
			}
		}
	}
}

func TestOAuthFlowCookie(t *testing.T) {
	tests := []struct {
		name, base, target string
		https              bool
		prefix, path       string
	}{
		{"https", "", startPath, true, "__Host-wxTkFlow-", "/"},
		{"http", "", startPath, false, "wxTkFlow-", oauthBase},
		{"the root", "/", "/authorize/" + authorizerID + "/verify", true, "__Host-wxTkFlow-", "/"},
		{"the root, http", "/", "/authorize/" + authorizerID + "/verify", false, "wxTkFlow-", "/"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newOAuth(t, &OAuth{Base: tt.base, Platform: platformID})
			r := httptest.NewRequest(http.MethodGet, tt.target+"?state="+strings.Repeat("s", maxState), nil)
			if tt.https {
				r.TLS = new(tls.ConnectionState)
			}
			rec := serve(t, f.OAuth, r, nil)
			cookies := rec.Result().Cookies()
			if len(cookies) != 1 {
				t.Fatalf("cookies %v", cookies)
			}
			c := cookies[0]
			if !strings.HasPrefix(c.Name, tt.prefix) || c.Path != tt.path || c.Domain != "" || !c.HttpOnly || c.Secure != tt.https ||
				c.SameSite != http.SameSiteLaxMode || c.MaxAge != 1800 {
				t.Errorf("cookie %v", c)
			}
			if size := len(rec.Header().Get("Set-Cookie")); size > 400 {
				t.Errorf("the cookie has %d bytes", size)
			}
			if strings.Contains(c.Value, "=") || strings.Contains(rec.Header().Get("Location"), c.Value) {
				t.Errorf("value %q", c.Value)
			}
		})
	}
}

// Two tabs, and more, have logins of their own; too many end the oldest.
func TestOAuthFlowsInSeveralTabs(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID, RequireStart: true})
	v := newVisitor(t, f.OAuth)
	type tab struct{ callback, wire, state string }
	var tabs []tab
	for i := range maxFlows {
		state := fmt.Sprint("tab", i)
		callback, wire := v.start(startPath + "?state=" + state)
		tabs = append(tabs, tab{callback, wire, state})
	}
	slices.Reverse(tabs)
	for i, one := range tabs {
		assertLanded(t, v.get(wechatCalls(one.callback, fmt.Sprint("c", i), one.wire)), one.state)
	}
	site := &url.URL{Scheme: "http", Host: "example.com", Path: startPath}
	for range 20 {
		callback, wire := v.start(startPath + "?state=last")
		if n := len(v.jar.Cookies(site)); n != maxFlows {
			t.Fatalf("the browser has %d cookies", n)
		}
		tabs = append(tabs, tab{callback, wire, "last"})
	}
	last := tabs[len(tabs)-1]
	assertLanded(t, v.get(wechatCalls(last.callback, "of the last", last.wire)), "last")
	assertLanded(t, v.get(wechatCalls(tabs[len(tabs)-maxFlows].callback, "of the eighth", tabs[len(tabs)-maxFlows].wire)), "last")
	if rec := v.get(wechatCalls(tabs[0].callback, "of the first", tabs[0].wire)); rec.Code != http.StatusForbidden {
		t.Errorf("a login whose cookie is gone: %d", rec.Code)
	}
}

// The oldest go, which browsers send first; cookies that are none of ours stay.
func TestEndFlows(t *testing.T) {
	t.Parallel()
	const prefix = "wxTkFlow-"
	id := func(i int) string { return fmt.Sprintf("%sAAAAAAAAAAAAAAAAAAAAAAAA%c%c", prefix, 'A'+i/16, 'A'+i%16) }
	sent := []*http.Cookie{
		{Name: id(0), Value: "junk"}, {Name: prefix + "short", Value: "x"}, {Name: "session", Value: "x"}, {Name: "__Secure-" + id(3), Value: "x"}, {Name: "__Host-" + id(4), Value: "x"}, {Name: id(1)},
	}
	if ended := endFlows(sent, prefix); len(ended) != 0 {
		t.Errorf("ended %v although there is room", ended)
	}
	for i := range maxFlows - 1 {
		sent = append(sent, &http.Cookie{Name: id(10 + i), Value: "x"})
	}
	var ended []string
	for _, c := range endFlows(sent, prefix) {
		if c.MaxAge >= 0 || c.Value != "" {
			t.Errorf("cookie %v", c)
		}
		ended = append(ended, c.Name)
	}
	if want := []string{id(0), id(1)}; !slices.Equal(ended, want) {
		t.Errorf("ended %q, want %q", ended, want)
	}
}

// A callback of a login that began here is for the browser where it began, once, for as long as it lives.
func TestOAuthFlowRefuses(t *testing.T) {
	for _, require := range []bool{false, true} {
		t.Run(fmt.Sprint("require_start ", require), func(t *testing.T) {
			f := newOAuth(t, &OAuth{Platform: platformID, Callback: "/cb", RequireStart: require})
			v := newVisitor(t, f.OAuth)
			callback, wire := v.start(startPath + "?state=mine")
			site, _ := url.Parse(callback)
			cookie := v.jar.Cookies(site)[0]
			other := newVisitor(t, f.OAuth)
			_, otherWire := other.start(startPath + "?state=theirs")
			second := newVisitor(t, f.OAuth)
			scanCallback, scanWire := second.start(oauthBase + "/authorize/" + authorizerID + "/scan?state=scan")
			scanSite, _ := url.Parse(scanCallback)
			scanCookie := second.jar.Cookies(scanSite)[0]
			with := func(target string, cookies ...*http.Cookie) *httptest.ResponseRecorder {
				t.Helper()
				r := httptest.NewRequest(http.MethodGet, target, nil)
				for _, c := range cookies {
					r.AddCookie(c)
				}
				return serve(t, f.OAuth, r, nil)
			}
			named := func(name, value string) *http.Cookie { return &http.Cookie{Name: name, Value: value} }
			own := wechatCalls(callback, "code", wire)
			ended := &flow{id: strings.TrimPrefix(wire, flowMark), cookie: cookie.Name, path: site.Path, appid: authorizerID, state: "mine"}
			endedValue, err := ended.seal(t.Context(), f.app.manager(), time.Now().Add(-time.Second))
			if err != nil {
				t.Fatal(err)
			}
			raw, _ := base64.RawURLEncoding.DecodeString(cookie.Value)
			start, err := f.app.manager().SealState(t.Context(), []byte("mine"), time.Now().Add(time.Hour), append([]string{statePurpose}, ended.bound()[1:]...)...)
			if err != nil {
				t.Fatal(err)
			}

			tests := []struct {
				name    string
				target  string
				cookies []*http.Cookie
			}{
				{"no cookie", own, nil},
				{"another browser's cookie", own, other.jar.Cookies(site)},
				{"another login's cookie under this name", own, []*http.Cookie{named(cookie.Name, other.jar.Cookies(site)[0].Value)}},
				{"this cookie under another login's name", wechatCalls(callback, "code", otherWire), []*http.Cookie{named(flowCookie+strings.TrimPrefix(otherWire, flowMark), cookie.Value)}},
				{"of another func", wechatCalls(callback, "code", scanWire), []*http.Cookie{scanCookie}},
				{"moved to another func", wechatCalls(scanCallback, "code", wire), []*http.Cookie{cookie}},
				{"moved to the other callback", wechatCalls("/cb/verify", "code", wire), []*http.Cookie{cookie}},
				{"moved to another platform", strings.Replace(own, platformID, otherPlatform, 1), []*http.Cookie{cookie}},
				{"for another account", strings.Replace(own, authorizerID, strangerID, 1), []*http.Cookie{cookie}},
				{"expired", own, []*http.Cookie{named(cookie.Name, endedValue.Reveal())}},
				{"of an authorization of a platform", own, []*http.Cookie{named(cookie.Name, start.Reveal())}},
				{"state put in", own, []*http.Cookie{named(cookie.Name, base64.RawURLEncoding.EncodeToString(append(bytes.Clone(raw), "x"...)))}},
				{"cut", own, []*http.Cookie{named(cookie.Name, cookie.Value[:len(cookie.Value)-2])}},
				{"cut to its beginning", own, []*http.Cookie{named(cookie.Name, cookie.Value[:12])}},
				{"longer", own, []*http.Cookie{named(cookie.Name, cookie.Value+"AA")}},
				{"padded", own, []*http.Cookie{named(cookie.Name, cookie.Value+"==")}},
				{"empty", own, []*http.Cookie{named(cookie.Name, "")}},
				{"junk", own, []*http.Cookie{named(cookie.Name, strings.Repeat("A", 4000))}},
				{"name of https", own, []*http.Cookie{named(hostCookie+cookie.Name, cookie.Value)}},
				{"name that https had", own, []*http.Cookie{named(secureCookie+cookie.Name, cookie.Value)}},
				{"name in lower case", own, []*http.Cookie{named(strings.ToLower(cookie.Name), cookie.Value)}},
				{"behind many of the same name", own, append(slices.Repeat([]*http.Cookie{named(cookie.Name, "junk")}, maxCookieCopies), cookie)},
			}
			for _, tt := range tests {
				t.Run(tt.name, func(t *testing.T) {
					f.logs.TakeAll()
					f.assertTurnedAway(with(tt.target, tt.cookies...), http.StatusForbidden)
				})
			}
			for i := range raw { // every byte
				if i >= 1 && i <= 4 {
					continue // these name the key: each one that is unknown has the store looked at
				}
				altered := bytes.Clone(raw)
				altered[i] ^= 1
				rec := with(own, named(cookie.Name, base64.RawURLEncoding.EncodeToString(altered)))
				if rec.Code != http.StatusForbidden || rec.Header().Get("Location") != "" {
					t.Errorf("byte %d altered: %d", i, rec.Code)
				}
			}
			f.logs.TakeAll()
			assertLanded(t, with(own, named(cookie.Name, "junk"), cookie), "mine") // somebody's junk keeps nobody out
			calls := len(f.wechat.calls())

			// The callback repeated is the same; the login replayed with another code is not.
			assertLanded(t, with(own, cookie), "mine")
			f.logs.TakeAll()
			if rec := with(wechatCalls(callback, "another-code", wire), cookie); rec.Code != http.StatusForbidden || rec.Header().Get("Location") != "" {
				t.Errorf("replayed: %d to %s", rec.Code, rec.Header().Get("Location"))
			}
			if logs := f.logs.TakeAll(); len(logs) != 1 || !strings.Contains(logs[0].ContextMap()["reason"].(string), "another code") {
				t.Errorf("logged %v", logs)
			}
			// Who has the callback but not the cookie does not get the redirect, and so not the tracking id.
			for _, state := range []string{wire, "", "mine"} {
				if rec := with(wechatCalls(callback, "code", state)); rec.Code < 400 || rec.Header().Get("Location") != "" {
					t.Errorf("the code with the state %q from another browser: %d to %s", state, rec.Code, rec.Header().Get("Location"))
				}
			}
			if n := len(f.wechat.calls()); n != calls {
				t.Errorf("WeChat was asked %d times more", n-calls)
			}
		})
	}
}

// A state that resembles one of ours, however it is bent, does not pass with the browser's own cookie either.
func TestOAuthFlowBentStates(t *testing.T) {
	loose := newOAuth(t, &OAuth{Platform: platformID})
	strict := newOAuth(t, &OAuth{Platform: platformID, RequireStart: true})
	bent := func(wire string) map[string]string { // as in the query, after state=
		id := strings.TrimPrefix(wire, flowMark)
		return map[string]string{
			"trailing letter": wire + "A", "trailing space": wire + "+", "trailing newline": wire + "%0a", "trailing CR LF": wire + "%0d%0a",
			"trailing NUL": wire + "%00", "trailing slash": wire + "/", "trailing fragment": wire + "%23x", "trailing parameter": wire + "%26a=b",
			"trailing comma": wire + ",", "trailing semicolon": wire + ";", "trailing question mark": wire + "%3f", "trailing escape": wire + "%2541",
			"trailing zero-width space": wire + "%e2%80%8b", "trailing BOM": wire + "%ef%bb%bf", "trailing bad UTF-8": wire + "%ff",
			"twice": wire + wire, "twice with a bar": wire + "|" + wire, "cut": wire[:len(wire)-1], "mark alone": flowMark,
			"lower-case id": flowMark + strings.ToLower(id), "full-width id": flowMark + "%ef%bc%a1" + id[1:], "padded id": flowMark + id[:24] + "==",
			"id of digits": flowMark + strings.Repeat("0", 26), "path in the id": flowMark + "../" + id[3:], "another id": flowMark + strings.Repeat("A", 26),
			"cookie's attributes": wire + "%3b+Path=/", "leading space": "+" + wire, "leading newline": "%0a" + wire, "leading NUL": "%00" + wire,
			"other case": strings.ToUpper(wire), "id alone": id, "quoted": "%22" + wire + "%22", "escaped twice": "%2577" + wire[1:],
			"full-width mark": "%ef%bd%97" + wire[1:], "empty": "", "leading BOM": "%ef%bb%bf" + wire, "letter of another script": "wx%d0%a2kFlow" + id,
		}
	}
	for _, f := range []*oauthFixture{loose, strict} {
		n := 0
		v := newVisitor(t, f.OAuth)
		callback, wire := v.start(startPath + "?state=mine")
		states := bent(wire)
		if len(states) < 35 {
			t.Errorf("only %d states", len(states))
		}
		for name, state := range states {
			n++
			rec := v.get(fmt.Sprintf("%s?code=c%d&appid=%s&state=%s", callback, n, authorizerID, state))
			plain, _ := url.QueryUnescape(strings.ReplaceAll(state, ";", "%3B"))
			switch {
			case f == strict || strings.HasPrefix(plain, flowMark):
				if rec.Code != http.StatusForbidden && rec.Code != http.StatusBadRequest || rec.Header().Get("Location") != "" {
					t.Errorf("require_start %v, %s: %d to %s", f.RequireStart, name, rec.Code, rec.Header().Get("Location"))
				}
			default: // a menu's own state: it is that, and not ours
				assertLanded(t, rec, plain)
			}
		}
		for name, query := range map[string]string{
			"twice": "state=" + wire + "&state=" + wire, "another before it": "state=x&state=" + wire, "another after it": "state=" + wire + "&state=x",
			"in brackets": "state[]=" + wire, "other case": "State=" + wire, "with a space": "state+=" + wire, "behind a semicolon": "x=y;state=" + wire,
		} {
			n++
			rec := v.get(fmt.Sprintf("%s?code=c%d&appid=%s&%s", callback, n, authorizerID, query))
			if location := rec.Header().Get("Location"); strings.Contains(location, "#mine") || f == strict && location != "" {
				t.Errorf("require_start %v, %s: %d to %s", f.RequireStart, name, rec.Code, location)
			}
		}
		if f == strict {
			if calls := f.wechat.calls(); len(calls) > 0 {
				t.Errorf("WeChat was asked %q", calls)
			}
		}
		assertLanded(t, v.get(wechatCalls(callback, "good", wire)), "mine") // none of it spoilt the login
	}
}

// Double callbacks at once and later, from the browser where the login began: one exchange, one redirect.
func TestOAuthFlowDoubleCallbacks(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID, RequireStart: true})
	v := newVisitor(t, f.OAuth)
	callback, wire := v.start(startPath + "?state=mine")
	locations := make([]string, 20)
	var wg sync.WaitGroup
	for i := range locations {
		wg.Go(func() { locations[i] = v.get(wechatCalls(callback, "code", wire)).Header().Get("Location") })
	}
	wg.Wait()
	locations = append(locations, v.get(wechatCalls(callback, "code", wire)).Header().Get("Location"))
	for _, location := range locations {
		if location == "" || location != locations[0] {
			t.Fatalf("redirects %q", locations)
		}
	}
	if calls := f.wechat.calls(); len(calls) != 1 {
		t.Errorf("asked %q", calls)
	}
}

// With require_start a menu's callback is refused; without it, it needs neither a cookie nor the key of cookies.
func TestOAuthRequireStart(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID, Callback: "/cb", RequireStart: true})
	for _, target := range []string{
		callbackURL("verify", "c1", "scan"), callbackURL("verify", "c1", ""), "/cb/verify?code=c1&state=scan&appid=" + authorizerID,
		oauthBase + "/authUserReceive/" + accountID + "/verify?code=c1&state=scan", oauthBase + "/authUserReceive/" + accountID + "/verify?code=c1",
	} {
		f.assertTurnedAway(f.get(target), http.StatusForbidden)
	}
	if got := counted(t, f.app.metrics().oauth, "callback", "foreign"); got != 5 {
		t.Errorf("counted %v", got)
	}
	if rec := f.get(callbackURL("verify", "", "scan")); rec.Code != http.StatusForbidden || !strings.Contains(rec.Body.String(), pageDenied.zh.Title) {
		t.Errorf("refused by the user: %d", rec.Code)
	}
}

// flowGeneration is one of several configurations, one after the other on one storage.
func flowGeneration(t *testing.T, root, wechat string, o *OAuth) (*App, *oauthFixture) {
	t.Helper()
	app, ctx, err := provisionAt(root, testConfig(wechat))
	if err != nil {
		t.Fatal(err)
	}
	if err := app.Start(); err != nil {
		t.Fatal(err)
	}
	return app, provisionOAuth(t, o, ctx)
}

// A reload, and a restart, between the start and the callback are nobody's business.
func TestOAuthFlowSurvives(t *testing.T) {
	wechat := newLoginWeChat(t)
	root := filepath.Join(t.TempDir(), "storage")
	start := oauthBase + "/authorize/" + accountID + "/verify?state=mine"
	called := func(callback, code, wire string) string { return callback + "?code=" + code + "&state=" + wire }

	first, before := flowGeneration(t, root, wechat.URL, &OAuth{RequireStart: true})
	v := newVisitor(t, before.OAuth)
	callback, wire := v.start(start)
	laterCallback, laterWire := v.start(start)
	second, after := flowGeneration(t, root, wechat.URL, &OAuth{RequireStart: true})
	if err := first.Cleanup(); err != nil {
		t.Fatal(err)
	}
	v.h = after.OAuth
	landed := v.get(called(callback, "c1", wire))
	assertLanded(t, landed, "mine")
	if rec := v.get(called(callback, "c2", wire)); rec.Code != http.StatusForbidden {
		t.Errorf("replayed: %d", rec.Code)
	}
	if err := second.Cleanup(); err != nil { // the last one: all that memory knows goes
		t.Fatal(err)
	}

	third, restarted := flowGeneration(t, root, wechat.URL, &OAuth{RequireStart: true})
	defer func() { _ = third.Cleanup() }()
	v.h = restarted.OAuth
	assertLanded(t, v.get(called(laterCallback, "c3", laterWire)), "mine")
	stranger := newVisitor(t, restarted.OAuth)
	if rec := stranger.get(called(laterCallback, "c3", laterWire)); rec.Code != http.StatusForbidden {
		t.Errorf("another browser after a restart: %d", rec.Code)
	}
}

// The whole way below handle_path: the callback, the cookie's path and the landing.
func TestOAuthFlowUnderHandlePath(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID, RequireStart: true})
	h := middleware(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
		r.URL.Path, r.URL.RawPath = strings.TrimPrefix(r.URL.Path, "/out side"), ""
		return f.ServeHTTP(w, r, next)
	})
	for outer, elsewhere := range map[string]string{"/out%20side": "", "": "/out%20side"} {
		v := newVisitor(t, h)
		callback, wire := v.start(outer + startPath + "?state=mine")
		if want := "http://example.com" + outer + oauthBase + "/authUserReceive/" + platformID + "/verify"; callback != want {
			t.Errorf("callback %s, want %s", callback, want)
		}
		target := wechatCalls(callback, "c"+outer, wire)
		assertLanded(t, v.get(target), "mine")
		if rec := v.get(strings.Replace(target, "http://example.com"+outer, "http://example.com"+elsewhere, 1)); rec.Code != http.StatusForbidden {
			t.Errorf("the callback elsewhere: %d", rec.Code)
		}
	}
	if path := (callbackAddress{base: "/a;b=c"}).cookiePath(); path != "/" {
		t.Errorf("a base that would end the cookie's path: %q", path)
	}
}

// While the store is away and the key of cookies was never read, logins that begin in a menu go on; others are told to
// come back, and use nothing up.
func TestOAuthFlowWithoutTheStore(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID})
	v := newVisitor(t, f.OAuth)
	callback, wire := v.start(oauthBase + "/authorize/" + accountID + "/verify?state=mine")

	manager := tokens.NewManager()
	defer manager.Close()
	env := *f.app.env
	env.Store = awayStore{tokens.NewMemStore()}
	users := tokens.NewUserTable(10)
	defer users.Close()
	o := *f.OAuth
	o.app = &App{byAppID: f.app.byAppID, Platforms: f.app.Platforms, open: f.app.open, env: &env, shared: &shared{pushMemory: &pushMemory{calls: newCallTable(nil)}, manager: manager, users: users, metrics: newMetrics(manager, newCallTable(nil)), claims: newClaims(newCallTable(nil), nil), feed: newFeed(), events: newEventQueue(t.Context(), nil), logins: newVisitorLimits()}, generations: new(generations)}
	v.h = &o
	own := callback + "?code=c1&state=" + wire
	for name, target := range map[string]string{"start": startPath, "callback of a login that began here": own} {
		if rec := v.get(target); rec.Code != http.StatusServiceUnavailable || rec.Header().Get("Location") != "" {
			t.Errorf("%s: %d to %s", name, rec.Code, rec.Header().Get("Location"))
		}
	}
	if logs := f.logs.FilterField(zapRemedy("check the store")).Len(); logs != 2 {
		t.Errorf("%d log lines name the store", logs)
	}
	menu := oauthBase + "/authUserReceive/" + accountID + "/verify?code=c2&state=scan"
	assertLanded(t, v.get(menu), "scan")
	v.h = f.OAuth
	assertLanded(t, v.get(own), "mine")
}
