package caddymodule

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// loginWeChat is the part of WeChat that a login meets. Like the real one it takes each code once.
type loginWeChat struct {
	*httptest.Server

	mu       sync.Mutex
	scope    string            // that the user grants
	failures map[string]string // by code: the answer instead of a grant
	profile  string            // the answer to /sns/userinfo
	used     map[string]bool
	asked    []string // path and code
}

const (
	userToken   = "user-access-token"
	userRefresh = "user-refresh-token"
)

func newLoginWeChat(t *testing.T) *loginWeChat {
	t.Helper()
	f := &loginWeChat{
		scope: "snsapi_base", used: make(map[string]bool), failures: make(map[string]string),
		profile: `{"openid":"` + openID + `","nickname":"张三 <b>","headimgurl":"https://thirdwx.qlogo.cn/a?x=1&y=2","unionid":"u-profile","privilege":["p"]}`,
	}
	f.Server = httptest.NewServer(f)
	t.Cleanup(f.Close)
	return f
}

func (f *loginWeChat) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	q := r.URL.Query()
	answer := `{"errcode":-1,"errmsg":"no such path"}`
	switch r.URL.Path {
	case "/cgi-bin/component/api_component_token":
		answer = `{"component_access_token":"component-token","expires_in":7200}`
	case "/sns/oauth2/component/access_token", "/sns/oauth2/access_token":
		f.asked = append(f.asked, r.URL.Path+" "+q.Get("appid")+" "+q.Get("code"))
		answer = f.exchange(q)
	case "/sns/userinfo":
		f.asked = append(f.asked, r.URL.Path)
		answer = f.profile
	}
	_, _ = w.Write([]byte(answer))
}

func (f *loginWeChat) exchange(q url.Values) string {
	code := q.Get("code")
	if answer, ok := f.failures[code]; ok {
		return answer
	}
	if f.used[code] {
		return `{"errcode":40163,"errmsg":"code been used, rid: 64f1e2d3-0a1b2c3d-4e5f6071"}`
	}
	f.used[code] = true
	grant, _ := json.Marshal(map[string]any{
		"access_token": userToken, "refresh_token": userRefresh, "expires_in": 7200, "openid": openID, "scope": f.scope,
	})
	return string(grant)
}

func (f *loginWeChat) calls() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.asked...)
}

// oauthFixture is a handler of wechat_oauth in front of that WeChat.
type oauthFixture struct {
	*OAuth
	t      *testing.T
	wechat *loginWeChat
	logs   *observer.ObservedLogs
}

const oauthBase = "/wx/thirdParty"

// newOAuth provisions o, with the funcs of these tests, behind two platforms and an account.
func newOAuth(t *testing.T, o *OAuth) *oauthFixture {
	t.Helper()
	wechat := newLoginWeChat(t)
	app, ctx := newTestApp(t, testConfig(wechat.URL))
	if o.Base == "" {
		o.Base = oauthBase
	}
	o.Funcs = append(o.Funcs,
		&Func{Key: "verify", Prefix: "http://wechat.example.com/webVerify/"},
		&Func{Key: "scan", Prefix: "https://shop.example.com/scan?from=wechat", Scope: "snsapi_userinfo", RedirectStatus: 303},
		&Func{Key: "vip", Prefix: "https://vip.example.com/", AppIDs: []string{accountID}, TTL: caddy.Duration(time.Hour), Once: true},
	)
	if err := o.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	if err := o.Validate(); err != nil {
		t.Fatal(err)
	}
	core, logs := observer.New(zap.DebugLevel)
	o.logger = zap.New(core)
	for _, p := range []string{platformID, otherPlatform} {
		err := app.manager().PutTicket(t.Context(), p, tokens.Ticket{Value: secret.New("ticket"), CreatedAt: time.Now()})
		if err != nil {
			t.Fatal(err)
		}
	}
	return &oauthFixture{OAuth: o, t: t, wechat: wechat, logs: logs}
}

func (f *oauthFixture) get(target string) *httptest.ResponseRecorder {
	f.t.Helper()
	return serve(f.t, f.OAuth, httptest.NewRequest(http.MethodGet, target, nil), nil)
}

// callbackURL is how WeChat calls back for an authorizer.
func callbackURL(funcKey, code, state string) string {
	return oauthBase + "/authUserReceive/" + platformID + "/" + funcKey + "?" +
		url.Values{"code": {code}, "state": {state}, "appid": {authorizerID}}.Encode()
}

// assertNoSecrets fails if what people or operators see of a login tells what it must not.
func (f *oauthFixture) assertNoSecrets(rec *httptest.ResponseRecorder, code string) {
	f.t.Helper()
	var seen strings.Builder
	fmt.Fprint(&seen, rec.Body.String(), rec.Header())
	for _, e := range f.logs.All() {
		line, _ := json.Marshal(e.ContextMap())
		seen.WriteString(e.Message + string(line))
	}
	for _, private := range []string{code, userToken, userRefresh, "component-token", "-secret"} {
		if private != "" && strings.Contains(seen.String(), private) {
			f.t.Errorf("%q is told", private)
		}
	}
}

func TestOAuthAuthorize(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID})
	page := func(appid, redirect, scope, rest string) string {
		return f.wechat.URL + "/connect/oauth2/authorize?appid=" + appid + "&redirect_uri=" + redirect + "&response_type=code&scope=" + scope + rest + "#wechat_redirect"
	}
	const (
		toPlatform = "http%3A%2F%2Fexample.com%2Fwx%2FthirdParty%2FauthUserReceive%2F" + platformID + "%2F"
		toAccount  = "http%3A%2F%2Fexample.com%2Fwx%2FthirdParty%2FauthUserReceive%2F" + accountID + "%2F"
		component  = "&component_appid=" + platformID
	)
	tests := []struct{ name, target, want string }{
		{"authorizer", authorizerID + "/verify", page(authorizerID, toPlatform+"verify", "snsapi_base", component)},
		{"with state", authorizerID + "/verify?state=scan1", page(authorizerID, toPlatform+"verify", "snsapi_base", "&state=scan1"+component)},
		{"scope of the func", authorizerID + "/scan", page(authorizerID, toPlatform+"scan", "snsapi_userinfo", component)},
		{"scope of the link", authorizerID + "/scan?scope=snsapi_base,snsapi_privateinfo", page(authorizerID, toPlatform+"scan", "snsapi_base,snsapi_privateinfo", component)},
		{"account", accountID + "/vip?state=a", page(accountID, toAccount+"vip", "snsapi_base", "&state=a")},
		{"a redirect target of the caller's is nothing", accountID + "/vip?redirect_uri=https://evil.example&wxTkId=x&prefix=//evil.example", page(accountID, toAccount+"vip", "snsapi_base", "")},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			rec := f.get(oauthBase + "/authorize/" + tt.target)
			if rec.Code != http.StatusFound || rec.Header().Get("Location") != tt.want {
				t.Errorf("%d to %s\nwant   %s", rec.Code, rec.Header().Get("Location"), tt.want)
			}
			if rec.Body.Len() != 0 {
				t.Errorf("body %q", rec.Body)
			}
			assertPrivate(t, rec.Header())
		})
	}
	if got := counted(t, f.app.metrics().oauth, "authorize", "ok"); got != float64(len(tests)) {
		t.Errorf("counted %v", got)
	}
}

func TestOAuthAuthorizeRefuses(t *testing.T) {
	f := newOAuth(t, &OAuth{})
	f.platform = f.app.platform(platformID)
	tests := []struct {
		name, target string
		status       int
	}{
		{"unknown func", authorizerID + "/nobody", http.StatusNotFound},
		{"func of another case", authorizerID + "/VERIFY", http.StatusNotFound},
		{"no func", authorizerID + "/", http.StatusNotFound},
		{"no func, no slash", authorizerID, http.StatusNotFound},
		{"more segments", authorizerID + "/verify/x", http.StatusNotFound},
		{"not an appid", "gh_123/verify", http.StatusNotFound},
		{"upper case", strings.ToUpper(authorizerID) + "/verify", http.StatusNotFound},
		{"a platform", otherPlatform + "/verify", http.StatusNotFound},
		{"account the func is not for", authorizerID + "/vip", http.StatusNotFound},
		{"unknown scope", authorizerID + "/verify?scope=snsapi_login", http.StatusBadRequest},
		{"scope with a parameter in it", authorizerID + "/verify?scope=snsapi_base%26component_appid%3Dx", http.StatusBadRequest},
		{"scope twice", authorizerID + "/verify?scope=snsapi_base&scope=snsapi_userinfo", http.StatusBadRequest},
		{"state too long", authorizerID + "/verify?state=" + strings.Repeat("a", maxState+1), http.StatusBadRequest},
		{"state with a parameter in it", authorizerID + "/verify?state=a%26redirect_uri%3Dhttps://evil.example", http.StatusBadRequest},
		{"state with a fragment in it", authorizerID + "/verify?state=a%23b", http.StatusBadRequest},
		{"state with a line end", authorizerID + "/verify?state=a%0d%0aSet-Cookie:x=1", http.StatusBadRequest},
		{"state with a last newline", authorizerID + "/verify?state=a%0a", http.StatusBadRequest},
		{"query that is none", authorizerID + "/verify?state=%zz", http.StatusBadRequest},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before := f.logs.Len()
			rec := f.get(oauthBase + "/authorize/" + tt.target)
			if rec.Code != tt.status || rec.Header().Get("Location") != "" || !strings.Contains(rec.Body.String(), "<h1>") {
				t.Errorf("answer %d, Location %q", rec.Code, rec.Header().Get("Location"))
			}
			if n := f.logs.Len() - before; n != 1 {
				t.Errorf("%d log lines, want 1", n)
			}
		})
	}
	t.Run("no platform chosen", func(t *testing.T) {
		f.platform = nil
		rec := f.get(oauthBase + "/authorize/" + authorizerID + "/verify")
		logs := f.logs.All()
		if rec.Code != http.StatusNotFound || !strings.Contains(logs[len(logs)-1].ContextMap()["remedy"].(string), "platform") {
			t.Errorf("answer %d, log %v", rec.Code, logs[len(logs)-1].ContextMap())
		}
	})
}

// redirectURIOf is the callback address that a request to start a login makes.
func redirectURIOf(t *testing.T, h caddyhttp.MiddlewareHandler, r *http.Request) string {
	t.Helper()
	rec := serve(t, h, r, nil)
	u, err := url.Parse(rec.Header().Get("Location"))
	if err != nil || rec.Code != http.StatusFound {
		t.Fatalf("answer %d, Location %q", rec.Code, rec.Header().Get("Location"))
	}
	return u.Query().Get("redirect_uri")
}

func TestOAuthRedirectURI(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID})
	const path = oauthBase + "/authorize/" + authorizerID + "/verify"
	const callback = oauthBase + "/authUserReceive/" + platformID + "/verify"
	request := func(change func(*http.Request)) *http.Request {
		r := httptest.NewRequest(http.MethodGet, path, nil)
		change(r)
		return r
	}
	tests := []struct {
		name string
		r    *http.Request
		want string
	}{
		{"http", request(func(*http.Request) {}), "http://example.com" + callback},
		{"https", request(func(r *http.Request) { r.TLS = new(tls.ConnectionState) }), "https://example.com" + callback},
		{"port", request(func(r *http.Request) { r.Host = "wx.example.com:8443" }), "http://wx.example.com:8443" + callback},
		{"forwarded by nobody we trust", request(func(r *http.Request) {
			r.Header.Set("X-Forwarded-Proto", "https")
			r.Header.Set("X-Forwarded-Host", "evil.example")
		}), "http://example.com" + callback},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := redirectURIOf(t, f.OAuth, tt.r); got != tt.want {
				t.Errorf("redirect_uri %s, want %s", got, tt.want)
			}
		})
	}
	for _, host := range []string{"", "evil.example/x", "user@evil.example", "a b", "example.com#", `example.com\x`, "example.com:port"} {
		rec := serve(t, f.OAuth, request(func(r *http.Request) { r.Host = host }), nil)
		if rec.Code != http.StatusBadRequest {
			t.Errorf("Host %q: answer %d to %s", host, rec.Code, rec.Header().Get("Location"))
		}
	}
	t.Run("proxy that is trusted", func(t *testing.T) {
		h := middleware(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
			caddyhttp.SetVar(r.Context(), caddyhttp.TrustedProxyVarKey, true)
			return f.ServeHTTP(w, r, next)
		})
		r := request(func(r *http.Request) { r.Header.Set("X-Forwarded-Proto", "https") })
		if got := redirectURIOf(t, h, r); got != "https://example.com"+callback {
			t.Errorf("redirect_uri %s", got)
		}
	})
	t.Run("origin", func(t *testing.T) {
		f.origin = "https://wx.example.com"
		defer func() { f.origin = "" }()
		if got := redirectURIOf(t, f.OAuth, request(func(r *http.Request) { r.Host = "evil.example" })); got != "https://wx.example.com"+callback {
			t.Errorf("redirect_uri %s", got)
		}
	})
	t.Run("handle_path", func(t *testing.T) {
		h := middleware(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
			r.URL.Path = strings.TrimPrefix(r.URL.Path, "/out side")
			r.URL.RawPath = ""
			return f.ServeHTTP(w, r, next)
		})
		r := httptest.NewRequest(http.MethodGet, "/out%20side"+path+"?state=a", nil)
		if got := redirectURIOf(t, h, r); got != "http://example.com/out%20side"+callback {
			t.Errorf("redirect_uri %s", got)
		}
	})
	t.Run("rewritten", func(t *testing.T) {
		h := middleware(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
			r.URL.Path = path
			return f.ServeHTTP(w, r, next)
		})
		if got := redirectURIOf(t, h, httptest.NewRequest(http.MethodGet, "/menu", nil)); got != "http://example.com"+callback {
			t.Errorf("redirect_uri %s", got)
		}
	})
}

type middleware func(http.ResponseWriter, *http.Request, caddyhttp.Handler) error

func (m middleware) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	return m(w, r, next)
}

func TestOAuthBaseAtTheRoot(t *testing.T) {
	f := newOAuth(t, &OAuth{Base: "/", Platform: platformID})
	got := redirectURIOf(t, f.OAuth, httptest.NewRequest(http.MethodGet, "/authorize/"+authorizerID+"/verify", nil))
	if got != "http://example.com/authUserReceive/"+platformID+"/verify" {
		t.Errorf("redirect_uri %s", got)
	}
}

func TestOAuthPassesOtherPathsOn(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID, Callback: "/apiWechat/wx/userAuth/callBack"})
	for _, path := range []string{"/", oauthBase, oauthBase + "/", oauthBase + "/authorize", oauthBase + "/authorizeX/y", oauthBase + "/other/x", "/apiWechat/wx/userAuth/callBack", "/x" + oauthBase + "/authorize/a/b"} {
		passed := false
		serve(t, f.OAuth, httptest.NewRequest(http.MethodGet, path, nil), caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
			passed = true
			return nil
		}))
		if !passed {
			t.Errorf("%s was not passed on", path)
		}
	}
}

var landing = regexp.MustCompile(`^(.*[?&])wxTkId=([A-Za-z0-9_-]{22})#(.*)$`)

func TestOAuthCallback(t *testing.T) {
	const extra = "/apiWechat/wx/userAuth/callBack"
	f := newOAuth(t, &OAuth{Platform: platformID, Callback: extra})
	tests := []struct {
		name, target string
		status       int
		prefix       string
		fragment     string
		exchange     string
		want         tokens.User
	}{
		{"authorizer", callbackURL("verify", "c1", "scan"), http.StatusFound, "http://wechat.example.com/webVerify/?", "scan",
			"/sns/oauth2/component/access_token " + authorizerID + " c1",
			tokens.User{AppID: authorizerID, Platform: platformID, FuncKey: "verify", State: "scan"}},
		{"authorizer of the other platform", oauthBase + "/authUserReceive/" + otherPlatform + "/scan?code=c2&state=&appid=" + authorizerID,
			http.StatusSeeOther, "https://shop.example.com/scan?from=wechat&", "",
			"/sns/oauth2/component/access_token " + authorizerID + " c2",
			tokens.User{AppID: authorizerID, Platform: otherPlatform, FuncKey: "scan"}},
		{"account", oauthBase + "/authUserReceive/" + accountID + "/vip?code=c3&state=x%22y", http.StatusFound, "https://vip.example.com/?", "x%22y",
			"/sns/oauth2/access_token " + accountID + " c3",
			tokens.User{AppID: accountID, FuncKey: "vip", State: `x"y`}},
		{"extra callback", extra + "/scan?code=c4&state=s&appid=" + authorizerID, http.StatusSeeOther, "https://shop.example.com/scan?from=wechat&", "s",
			"/sns/oauth2/component/access_token " + authorizerID + " c4",
			tokens.User{AppID: authorizerID, Platform: platformID, FuncKey: "scan", State: "s"}},
	}
	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			rec := f.get(tt.target)
			m := landing.FindStringSubmatch(rec.Header().Get("Location"))
			if rec.Code != tt.status || m == nil || m[1] != tt.prefix || m[3] != tt.fragment {
				t.Fatalf("%d to %q", rec.Code, rec.Header().Get("Location"))
			}
			assertPrivate(t, rec.Header())
			if calls := f.wechat.calls(); len(calls) != i+1 || calls[i] != tt.exchange {
				t.Errorf("asked %q, want %q", calls, tt.exchange)
			}
			u, ok := f.app.users().Redeem(m[2], nil)
			if !ok || u.AppID != tt.want.AppID || u.Platform != tt.want.Platform || u.FuncKey != tt.want.FuncKey || u.State != tt.want.State ||
				u.OpenID != openID || u.Scope != "snsapi_base" || u.Profile != nil || u.Grant.AccessToken.Reveal() != userToken {
				t.Errorf("user %+v", u)
			}
			if _, again := f.app.users().Redeem(m[2], nil); again == (tt.want.FuncKey == "vip") {
				t.Errorf("redeemed again %v", again)
			}
			f.assertNoSecrets(rec, "")
		})
	}
	if f.logs.Len() != 0 {
		t.Errorf("logged %v", f.logs.All())
	}
}

func TestOAuthCallbackPages(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID, Callback: "/cb"})
	receive := oauthBase + "/authUserReceive/"
	q := "?code=the-code&state=s&appid=" + authorizerID
	tests := []struct {
		name, target, result string
		status               int
	}{
		{"unknown func", receive + platformID + "/nobody" + q, "unknown", http.StatusNotFound},
		{"unknown func of the extra callback", "/cb/nobody" + q, "unknown", http.StatusNotFound},
		{"more segments", "/cb/verify/x" + q, "unknown", http.StatusNotFound},
		{"unknown platform", receive + strangerID + "/verify" + q, "unknown", http.StatusNotFound},
		{"not an appid", receive + "x/verify" + q, "unknown", http.StatusNotFound},
		{"account the func is not for", receive + platformID + "/vip" + q, "unknown", http.StatusNotFound},
		{"no account", receive + platformID + "/verify?code=the-code&state=s", "malformed", http.StatusBadRequest},
		{"account of the wrong shape", "/cb/verify?code=the-code&appid=../../x", "malformed", http.StatusBadRequest},
		{"code twice", receive + platformID + "/verify" + q + "&code=other", "malformed", http.StatusBadRequest},
		{"account twice", receive + platformID + "/verify" + q + "&appid=" + accountID, "malformed", http.StatusBadRequest},
		{"code too long", receive + accountID + "/verify?code=" + strings.Repeat("a", maxCode+1), "malformed", http.StatusBadRequest},
		{"state too long", receive + accountID + "/verify?code=the-code&state=" + strings.Repeat("a", maxState+1), "malformed", http.StatusBadRequest},
		{"refused by the user", receive + platformID + "/verify?state=s&appid=" + authorizerID, "denied", http.StatusForbidden},
		{"refused by the user, state alone", receive + platformID + "/verify?state=s", "denied", http.StatusForbidden},
		{"refused by the user, empty code", receive + accountID + "/verify?code=&state=s", "denied", http.StatusForbidden},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f.logs.TakeAll()
			before := counted(t, f.app.metrics().oauth, "callback", tt.result)
			rec := f.get(tt.target)
			if rec.Code != tt.status || rec.Header().Get("Location") != "" || !strings.Contains(rec.Body.String(), "<h1>") {
				t.Errorf("answer %d, Location %q", rec.Code, rec.Header().Get("Location"))
			}
			if got := counted(t, f.app.metrics().oauth, "callback", tt.result) - before; got != 1 {
				t.Errorf("counted %v", got)
			}
			assertPrivate(t, rec.Header())
			f.assertNoSecrets(rec, "the-code")
			if n := f.logs.Len(); n != 1 {
				t.Errorf("%d log lines, want 1", n)
			}
		})
	}
	if calls := f.wechat.calls(); len(calls) != 0 {
		t.Errorf("WeChat was asked %q", calls)
	}
}

func TestOAuthWeChatErrors(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID})
	refusal := func(code int) string {
		return fmt.Sprintf(`{"errcode":%d,"errmsg":"about the-code, rid: 64f1e2d3-0a1b2c3d-4e5f6071"}`, code)
	}
	tests := []struct {
		name, answer, result string
		status               int
		remedy               string
		errcode              int64
	}{
		{"invalid", refusal(40029), "invalid", http.StatusBadRequest, "starts again", 40029},
		{"missing", refusal(41008), "invalid", http.StatusBadRequest, "starts again", 41008},
		{"used elsewhere", refusal(40163), "used", http.StatusGone, "starts again", 40163},
		{"expired", refusal(42003), "used", http.StatusGone, "starts again", 42003},
		{"not authorised", refusal(61003), "refused", http.StatusBadGateway, "let its owner authorise", 61003},
		{"address", refusal(61004), "refused", http.StatusBadGateway, "whitelist", 61004},
		{"ticket", refusal(61005), "unavailable", http.StatusServiceUnavailable, "component_verify_ticket", 61005},
		{"busy", refusal(-1), "unavailable", http.StatusServiceUnavailable, "wait", -1},
		{"quota", refusal(45009), "unavailable", http.StatusServiceUnavailable, "quota", 45009},
		{"secret", refusal(40125), "refused", http.StatusBadGateway, "secret", 40125},
		{"right", refusal(48001), "refused", http.StatusBadGateway, "网页授权", 48001},
		{"anything else", refusal(99999), "refused", http.StatusBadGateway, "documentation", 99999},
		{"HTML", "<html>the-code</html>", "unavailable", http.StatusServiceUnavailable, "api.weixin.qq.com", 0},
		{"half an answer", `{"openid":"o`, "unavailable", http.StatusServiceUnavailable, "api.weixin.qq.com", 0},
		{"no openid", `{"access_token":"` + userToken + `"}`, "unavailable", http.StatusServiceUnavailable, "api.weixin.qq.com", 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f.logs.TakeAll()
			f.wechat.mu.Lock()
			f.wechat.failures["the-code"] = tt.answer
			f.wechat.mu.Unlock()
			before := counted(t, f.app.metrics().oauth, "callback", tt.result)
			rec := f.get(callbackURL("verify", "the-code", "s"))
			if rec.Code != tt.status || rec.Header().Get("Location") != "" {
				t.Errorf("answer %d, Location %q", rec.Code, rec.Header().Get("Location"))
			}
			if got := counted(t, f.app.metrics().oauth, "callback", tt.result) - before; got != 1 {
				t.Errorf("counted %v as %s", got, tt.result)
			}
			f.assertNoSecrets(rec, "the-code")
			logs := f.logs.All()
			if len(logs) != 1 {
				t.Fatalf("%d log lines, want 1", len(logs))
			}
			fields := logs[0].ContextMap()
			if !strings.Contains(fields["remedy"].(string), tt.remedy) || fields["appid"] != authorizerID || fields["platform"] != platformID || fields["func"] != "verify" {
				t.Errorf("logged %v", fields)
			}
			if tt.errcode != 0 && (fields["errcode"] != tt.errcode || fields["rid"] != "64f1e2d3-0a1b2c3d-4e5f6071") {
				t.Errorf("logged %v, want errcode %d", fields, tt.errcode)
			}
		})
	}
}

func TestOAuthWeChatUnreachableOrWithoutTicket(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID})
	f.wechat.Close()
	rec := f.get(callbackURL("verify", "the-code", "s"))
	if rec.Code != http.StatusServiceUnavailable {
		t.Errorf("unreachable: answer %d", rec.Code)
	}
	f.assertNoSecrets(rec, "the-code")
	if got := loginFailure(fmt.Errorf("platform: %w", tokens.ErrNoTicket)); got.page.status != http.StatusServiceUnavailable || got.remedy != remedyTicket {
		t.Errorf("no ticket: %+v", got)
	}
	if got := loginFailure(fmt.Errorf("x: %w", tokens.ErrNotAuthorized)); got.page.status != http.StatusBadGateway {
		t.Errorf("not authorized: %+v", got)
	}
	if got := loginFailure(context.Canceled); got.level != zap.DebugLevel {
		t.Errorf("visitor left: %+v", got)
	}
}

func TestOAuthDoubleCallbacks(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID, Callback: "/cb"})
	locations := make([]string, 20)
	var wg sync.WaitGroup
	for i := range locations {
		wg.Go(func() { locations[i] = f.get(callbackURL("verify", "c1", "s")).Header().Get("Location") })
	}
	wg.Wait()
	for _, location := range locations {
		if location == "" || location != locations[0] {
			t.Fatalf("redirects %q", locations)
		}
	}
	if calls := f.wechat.calls(); len(calls) != 1 {
		t.Errorf("asked %q, want one exchange", calls)
	}
	if n := f.app.users().Len(); n != 1 {
		t.Errorf("%d users", n)
	}
	for name, target := range map[string]string{
		"another func":    callbackURL("scan", "c1", "s"),
		"another address": "/cb/verify?code=c1&state=s&appid=" + authorizerID,
		"another account": strings.Replace(callbackURL("verify", "c1", "s"), authorizerID, strangerID, 1),
	} {
		if rec := f.get(target); rec.Code != http.StatusGone || rec.Header().Get("Location") != "" {
			t.Errorf("%s: answer %d, Location %q", name, rec.Code, rec.Header().Get("Location"))
		}
	}
	if calls := f.wechat.calls(); len(calls) != 1 {
		t.Errorf("asked %q about a code that is known to be used", calls)
	}
}

func TestOAuthMethods(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID})
	head := serve(t, f.OAuth, httptest.NewRequest(http.MethodHead, callbackURL("verify", "c1", "s"), nil), nil)
	if head.Code != http.StatusNoContent || head.Header().Get("Location") != "" || len(f.wechat.calls()) != 0 {
		t.Errorf("HEAD of a callback: answer %d, asked %q", head.Code, f.wechat.calls())
	}
	if head = serve(t, f.OAuth, httptest.NewRequest(http.MethodHead, oauthBase+"/authorize/"+authorizerID+"/verify", nil), nil); head.Code != http.StatusFound {
		t.Errorf("HEAD of a start: answer %d", head.Code)
	}
	for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodOptions, "PROPFIND"} {
		rec := serve(t, f.OAuth, httptest.NewRequest(method, callbackURL("verify", "c1", "s"), strings.NewReader("code=c1")), nil)
		if rec.Code != http.StatusMethodNotAllowed || rec.Header().Get("Allow") != "GET, HEAD" {
			t.Errorf("%s: answer %d, Allow %q", method, rec.Code, rec.Header().Get("Allow"))
		}
	}
	if len(f.wechat.calls()) != 0 {
		t.Errorf("asked %q", f.wechat.calls())
	}
}

func TestOAuthPageLanguage(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID})
	for accept, want := range map[string]string{"": pageDenied.zh.Title, "en-US,en": pageDenied.en.Title} {
		r := httptest.NewRequest(http.MethodGet, callbackURL("verify", "", "s"), nil)
		r.Header.Set("Accept-Language", accept)
		if body := serve(t, f.OAuth, r, nil).Body.String(); !strings.Contains(body, want) {
			t.Errorf("Accept-Language %q: %s", accept, body)
		}
	}
}

func TestOAuthProfile(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID})
	f.wechat.scope = "snsapi_base,snsapi_userinfo"
	redeem := func(code string) tokens.User {
		t.Helper()
		m := landing.FindStringSubmatch(f.get(callbackURL("scan", code, "s")).Header().Get("Location"))
		if m == nil {
			t.Fatal("no redirect")
		}
		u, _ := f.app.users().Redeem(m[2], nil)
		return u
	}
	if u := redeem("c1"); u.Profile == nil || u.Profile.Nickname != "张三 <b>" || u.UnionID != "u-profile" {
		t.Errorf("user %+v", u)
	}
	f.wechat.profile = `{"errcode":48001,"errmsg":"api unauthorized"}`
	if u := redeem("c2"); u.Profile != nil || u.OpenID != openID {
		t.Errorf("user %+v", u)
	}
	if logs := f.logs.All(); len(logs) != 1 || logs[0].ContextMap()["errcode"] != int64(48001) {
		t.Errorf("logged %v", logs)
	}
}

// Known ways to bend the redirect of an OAuth proxy. Whatever a request holds, a redirect goes to the configured
// target, or to WeChat.
func TestOAuthIsNoOpenRedirector(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID})
	evil := []string{
		"https://evil.example", "//evil.example", `/\evil.example`, `\\evil.example`, "https:evil.example", "@evil.example",
		".evil.example", "%2f%2fevil.example", "\r\nLocation: https://evil.example", "%0d%0aLocation:https://evil.example",
		"javascript:alert(1)", "data:text/html,x", "https://shop.example.com@evil.example", "evil\u3002example", "\u2028//evil.example",
		"#@evil.example", "?next=//evil.example", "scan\x00//evil.example", "/../..//evil.example", "\t//evil.example",
	}
	parameters := []string{"state", "redirect", "redirect_uri", "redirect_url", "next", "url", "prefix", "return", "wxTkId", "funcKey", "scope", "host"}
	n := 0
	for _, bad := range evil {
		for _, parameter := range parameters {
			n++
			query := url.Values{"code": {fmt.Sprintf("code%d", n)}, "appid": {authorizerID}, parameter: {bad}}.Encode()
			for _, path := range []string{"/authUserReceive/" + platformID + "/scan", "/authorize/" + authorizerID + "/scan"} {
				r := httptest.NewRequest(http.MethodGet, oauthBase+path+"?"+query, nil)
				r.Header.Set("Referer", bad)
				r.Header.Set("X-Forwarded-Host", "evil.example")
				rec := serve(t, f.OAuth, r, nil)
				location := rec.Header().Get("Location")
				toFunc := strings.HasPrefix(location, "https://shop.example.com/scan?from=wechat&wxTkId=")
				toWeChat := strings.HasPrefix(location, f.wechat.URL+authorizePath+"?appid="+authorizerID+"&redirect_uri=http%3A%2F%2Fexample.com%2Fwx%2FthirdParty%2F")
				if location != "" && !toFunc && !toWeChat {
					t.Errorf("%s?%s redirects to %s", path, query, location)
				}
				if strings.ContainsAny(location, "\r\n\t \"'<>\\") || len(rec.Header().Values("Location")) > 1 {
					t.Errorf("%s?%s: Location %q", path, query, location)
				}
			}
		}
	}
	for _, bad := range evil {
		for _, path := range []string{"/authUserReceive/" + platformID + "/", "/authorize/" + authorizerID + "/"} {
			rec := f.get((&url.URL{Path: oauthBase + path + bad, RawQuery: "code=c&appid=" + authorizerID}).String())
			if location := rec.Header().Get("Location"); location != "" {
				t.Errorf("func %q redirects to %s", bad, location)
			}
		}
	}
}
