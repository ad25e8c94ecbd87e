package caddymodule

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

const secureSite = "https://example.com"

func ask(t *testing.T, h caddyhttp.MiddlewareHandler, target string, cookies ...*http.Cookie) *httptest.ResponseRecorder {
	t.Helper()
	r := httptest.NewRequest(http.MethodGet, target, nil)
	for _, c := range cookies {
		r.AddCookie(c)
	}
	return serve(t, h, r, nil)
}

// assertHostCookie fails unless browsers take a cookie from this very host over https alone.
func assertHostCookie(t *testing.T, c *http.Cookie) {
	t.Helper()
	if !strings.HasPrefix(c.Name, "__Host-") || c.Path != "/" || !c.Secure || c.Domain != "" || !c.HttpOnly || c.SameSite != http.SameSiteLaxMode {
		t.Errorf("cookie %v", c)
	}
}

// A server or a page on a sibling host can set cookies for the parent domain, of any name but one with hostCookie. What a
// stranger got from us for a login of their own signs nobody else in under such a name.
func TestOAuthPlantedCookie(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID, RequireStart: true})
	for _, scheme := range []string{"https", "http"} {
		t.Run(scheme, func(t *testing.T) {
			stranger := newVisitor(t, f.OAuth)
			callback, wire := stranger.start(scheme + "://example.com" + startPath + "?state=theirs")
			site, _ := url.Parse(callback)
			got := stranger.jar.Cookies(site)[0]
			id := strings.TrimPrefix(wire, flowMark)
			target := wechatCalls(strings.Replace(callback, "http://", "https://", 1), "theirs", wire)
			for _, name := range []string{secureCookie + flowCookie + id, flowCookie + id, strings.ToLower(hostCookie) + flowCookie + id} {
				f.logs.TakeAll()
				f.assertTurnedAway(ask(t, f.OAuth, target, &http.Cookie{Name: name, Value: got.Value}), http.StatusForbidden)
			}
			if scheme == "http" { // a browser that came by http has it under no name of https's; whoever set it, it is not good there
				f.logs.TakeAll()
				f.assertTurnedAway(ask(t, f.OAuth, target, &http.Cookie{Name: hostCookie + flowCookie + id, Value: got.Value}), http.StatusForbidden)
			}
			assertLanded(t, stranger.get(wechatCalls(callback, "own-"+scheme, wire)), "theirs")
			f.wechat.takeCalls()
		})
	}
}

// Logins on several routes of one host, each with cookies that all of the site sees, do not disturb each other.
func TestOAuthRoutesOnOneHost(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID, RequireStart: true})
	g := newOAuth(t, &OAuth{Platform: platformID, RequireStart: true, Base: "/wx/other"})
	v := newVisitor(t, middleware(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
		return f.ServeHTTP(w, r, caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error { return g.ServeHTTP(w, r, next) }))
	}))
	type login struct{ callback, wire, state string }
	var logins []login
	for i := range 4 {
		for _, path := range []string{startPath, "/wx/other/authorize/" + authorizerID + "/verify"} {
			state := fmt.Sprint("s", i, path)
			callback, wire := v.start(secureSite + path + "?state=" + url.QueryEscape(state))
			logins = append(logins, login{callback, wire, state})
		}
	}
	for i, l := range logins {
		assertLanded(t, v.get(wechatCalls(l.callback, fmt.Sprint("c", i), l.wire)), l.state)
	}
}

// Who began before the upgrade ends after it.
func TestOAuthCookieBefore(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID, RequireStart: true})
	for scheme, prefix := range map[string]string{"https": "__Secure-wxTkFlow-", "http": "wxTkFlow-"} {
		id := strings.Repeat("A", 25) + strings.ToUpper(scheme[len(scheme)-1:])
		path := oauthBase + "/authUserReceive/" + platformID + "/verify"
		value, err := f.app.manager().SealState(t.Context(), []byte("mine"), time.Now().Add(tokens.FlowLife), "wechat_oauth flow", id, path, authorizerID)
		if err != nil {
			t.Fatal(err)
		}
		target := wechatCalls(scheme+"://example.com"+path, scheme, flowMark+id)
		junk := &http.Cookie{Name: prefix + id, Value: "junk"}
		assertLanded(t, ask(t, f.OAuth, target, junk, junk, junk, &http.Cookie{Name: prefix + id, Value: value.Reveal()}), "mine")
		f.wechat.takeCalls()
		f.logs.TakeAll()
		f.assertTurnedAway(ask(t, f.OAuth, strings.Replace(target, "code="+scheme, "code=other", 1), &http.Cookie{Name: hostCookie + flowCookie + id, Value: value.Reveal()}), http.StatusForbidden)
	}
}

// secureStart begins an authorization over https.
func (f *authorizeFixture) secureStart(base string, cookies ...*http.Cookie) (b begun, cookie *http.Cookie) {
	f.t.Helper()
	rec := ask(f.t, f.Authorize, secureSite+base+"/go?kind=pc", cookies...)
	if rec.Code != http.StatusFound || len(rec.Result().Cookies()) != 1 {
		f.t.Fatalf("go: %d %v", rec.Code, rec.Header())
	}
	return readStart(f.t, rec), rec.Result().Cookies()[0]
}

func TestAuthorizePlantedCookie(t *testing.T) {
	f := newAuthorize(t, &Authorize{})
	b, cookie := f.secureStart(authorizeBase)
	assertHostCookie(t, cookie)
	const code = "queryauthcode@@@1"
	plain := &http.Cookie{Name: "wechat_authorize", Value: cookie.Value}
	if rec := ask(t, f.Authorize, secureSite+b.back(code), plain); rec.Code != http.StatusBadRequest {
		t.Errorf("the start's cookie under the name that anybody can set: %d", rec.Code)
	}
	// A state that was got over http, for a cookie of one's own choice, is for http.
	chosen := &http.Cookie{Name: "wechat_authorize", Value: strings.Repeat("A", 22)}
	overHTTP := readStart(t, ask(t, f.Authorize, authorizeBase+"/go?kind=pc", chosen))
	if overHTTP.cookie != chosen.Name+"="+chosen.Value {
		t.Fatalf("the cookie is %s", overHTTP.cookie)
	}
	for _, name := range []string{chosen.Name, cookie.Name} {
		if rec := ask(t, f.Authorize, secureSite+overHTTP.back(code), &http.Cookie{Name: name, Value: chosen.Value}); rec.Code != http.StatusBadRequest {
			t.Errorf("a state of http's with the cookie %s: %d", name, rec.Code)
		}
	}
	// What is planted does not become the browser's own, and does not get in its way.
	other, again := f.secureStart(authorizeBase, plain)
	if again.Value == plain.Value || again.Name != cookie.Name {
		t.Errorf("the start took a cookie over: %v", again)
	}
	if n := f.wechat.count(queryAuthPath); n != 0 {
		t.Errorf("WeChat was asked %d times", n)
	}
	if rec := ask(t, f.Authorize, secureSite+other.back(code), plain, plain, plain, plain, plain, again); rec.Code != http.StatusOK {
		t.Errorf("beside planted cookies: %d", rec.Code)
	}
	// The next start prolongs the cookie, so that both tabs can end.
	if _, prolonged := f.secureStart(authorizeBase, again); prolonged.Value != again.Value {
		t.Errorf("another cookie for the next start: %v", prolonged)
	}
}

// Over http a browser may bring several cookies of the name: of a longer path, and of the parent domain.
func TestAuthorizeSeveralCookies(t *testing.T) {
	f := newAuthorize(t, &Authorize{})
	b := f.begin("kind=pc")
	name, value, _ := strings.Cut(b.cookie, "=")
	own := &http.Cookie{Name: name, Value: value}
	planted := func(n int) (list []*http.Cookie) {
		for i := range n {
			list = append(list, &http.Cookie{Name: name, Value: fmt.Sprintf("%022d", i)}, &http.Cookie{Name: name, Value: "junk"})
		}
		return list
	}
	if rec := ask(t, f.Authorize, b.back("queryauthcode@@@1"), append(planted(maxCookieCopies), own)...); rec.Code != http.StatusBadRequest {
		t.Errorf("behind more than are looked at: %d", rec.Code)
	}
	if rec := ask(t, f.Authorize, b.back("queryauthcode@@@1"), append(planted(maxCookieCopies-1), own)...); rec.Code != http.StatusOK {
		t.Errorf("behind others: %d", rec.Code)
	}
}

// Routes on one host have cookies of their own, as they had by their paths.
func TestAuthorizeRoutesOnOneHost(t *testing.T) {
	f, g, root := newAuthorize(t, &Authorize{}), newAuthorize(t, &Authorize{Base: "/wx/other"}), newAuthorize(t, &Authorize{Base: "/"})
	first, one := f.secureStart(authorizeBase)
	second, two := g.secureStart("/wx/other", one)
	_, three := root.secureStart("", one, two)
	if one.Name == two.Name || one.Name == three.Name || two.Name == three.Name {
		t.Errorf("cookies %s, %s and %s", one.Name, two.Name, three.Name)
	}
	for _, c := range []*http.Cookie{one, two, three} {
		assertHostCookie(t, c)
	}
	if rec := ask(t, f.Authorize, secureSite+first.back("queryauthcode@@@1"), one, two, three); rec.Code != http.StatusOK {
		t.Errorf("the first: %d", rec.Code)
	}
	if rec := ask(t, g.Authorize, secureSite+second.back("queryauthcode@@@1"), one, two, three); rec.Code != http.StatusOK {
		t.Errorf("the second: %d", rec.Code)
	}
	if rec := ask(t, f.Authorize, secureSite+first.back("queryauthcode@@@1"), two, three); rec.Code != http.StatusBadRequest {
		t.Errorf("with another route's cookie: %d", rec.Code)
	}
}

// Who began before the upgrade ends after it, over http and https.
func TestAuthorizeCookieBefore(t *testing.T) {
	f := newAuthorize(t, &Authorize{})
	const value = "0123456789abcdefABCDEF"
	for i, site := range []string{secureSite, ""} {
		payload := (&authorizeState{id: stateID{byte(i)}}).payload()
		state, err := f.app.manager().SealState(t.Context(), payload, time.Now().Add(stateLife), "wechat_authorize start", platformID, value)
		if err != nil {
			t.Fatal(err)
		}
		target := fmt.Sprintf("%s%s/callback/%s?auth_code=queryauthcode@@@%d&s=%s", site, authorizeBase, platformID, i, url.QueryEscape(state.Reveal()))
		if rec := ask(t, f.Authorize, target, &http.Cookie{Name: "wechat_authorize", Value: value}); rec.Code != http.StatusOK {
			t.Errorf("%s: %d", target, rec.Code)
		}
	}
}
