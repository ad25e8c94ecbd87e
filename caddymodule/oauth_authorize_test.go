package caddymodule

import (
	"crypto/tls"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// flowState is the state of a login that began here, on its way to WeChat.
var flowState = regexp.MustCompile(`&state=wxTkFlow[A-Z2-7]{26}\b`)

func TestOAuthAuthorize(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID})
	page := func(appid, redirect, scope, rest string) string {
		return f.wechat.URL + "/connect/oauth2/authorize?appid=" + appid + "&redirect_uri=" + redirect + "&response_type=code&scope=" + scope + "&state=FLOW" + rest + "#wechat_redirect"
	}
	const (
		toPlatform = "http%3A%2F%2Fexample.com%2Fwx%2FthirdParty%2FauthUserReceive%2F" + platformID + "%2F"
		toAccount  = "http%3A%2F%2Fexample.com%2Fwx%2FthirdParty%2FauthUserReceive%2F" + accountID + "%2F"
		component  = "&component_appid=" + platformID
	)
	tests := []struct{ name, target, want string }{
		{"authorizer", authorizerID + "/verify", page(authorizerID, toPlatform+"verify", "snsapi_base", component)},
		{"with state", authorizerID + "/verify?state=scan1", page(authorizerID, toPlatform+"verify", "snsapi_base", component)},
		{"with a state as long as it may be", authorizerID + "/verify?state=" + strings.Repeat("_", maxState), page(authorizerID, toPlatform+"verify", "snsapi_base", component)},
		{"with parameters, a fragment and line ends in the state", authorizerID + "/verify?state=a%26component_appid%3Dx%23y%0d%0aSet-Cookie:x=1;b", page(authorizerID, toPlatform+"verify", "snsapi_base", component)},
		{"scope of the func", authorizerID + "/scan", page(authorizerID, toPlatform+"scan", "snsapi_userinfo", component)},
		{"scope of the link", authorizerID + "/scan?scope=snsapi_base,snsapi_privateinfo", page(authorizerID, toPlatform+"scan", "snsapi_base,snsapi_privateinfo", component)},
		{"account", accountID + "/vip?state=a", page(accountID, toAccount+"vip", "snsapi_base", "")},
		{"a redirect target of the caller's is nothing", accountID + "/vip?redirect_uri=https://evil.example&wxTkId=x&prefix=//evil.example", page(accountID, toAccount+"vip", "snsapi_base", "")},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			rec := f.get(oauthBase + "/authorize/" + tt.target)
			location := flowState.ReplaceAllString(rec.Header().Get("Location"), "&state=FLOW")
			if rec.Code != http.StatusFound || location != tt.want {
				t.Errorf("%d to %s\nwant   %s", rec.Code, location, tt.want)
			}
			if n := len(rec.Header().Values("Set-Cookie")); n != 1 {
				t.Errorf("%d cookies", n)
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
		{"state twice", authorizerID + "/verify?state=a&state=b", http.StatusBadRequest},
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
		for proto, scheme := range map[string]string{
			"https": "https", "HTTPS": "https", "https,http": "https", " https , http": "https", "http": "http", "http, https": "http", "": "http", "httpsx": "http",
		} {
			r := request(func(r *http.Request) { r.Header.Set("X-Forwarded-Proto", proto) })
			if got := redirectURIOf(t, h, r); got != scheme+"://example.com"+callback {
				t.Errorf("X-Forwarded-Proto %q: redirect_uri %s", proto, got)
			}
		}
	})
	t.Run("origin", func(t *testing.T) {
		f.origin = "https://wx.example.com"
		defer func() { f.origin = "" }()
		at := request(func(r *http.Request) { r.Host, r.TLS = "WX.example.com", new(tls.ConnectionState) })
		if got := redirectURIOf(t, f.OAuth, at); got != "https://wx.example.com"+callback {
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

// A visitor who starts at another name of the site than the one that WeChat sends them back to would have the cookie at
// the wrong name: they go there first, once, and nowhere else.
func TestOAuthStartsAtTheOrigin(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID})
	f.origin = "https://wx.example.com"
	const path = oauthBase + "/authorize/" + authorizerID + "/verify"
	for _, host := range []string{"evil.example", "shop.example.com", "wx.example.com:8443", "a b", "", "evil.example/x"} {
		r := httptest.NewRequest(http.MethodGet, path+"?state=a%26b%20c&next=//evil.example", nil)
		r.Host, r.TLS = host, new(tls.ConnectionState)
		rec := serve(t, f.OAuth, r, nil)
		want := "https://wx.example.com" + path + "?at=origin&scope=snsapi_base&state=a%26b+c"
		if got := rec.Header().Get("Location"); rec.Code != http.StatusFound || got != want || len(rec.Header().Values("Set-Cookie")) > 0 {
			t.Fatalf("Host %q: %d to %s, cookies %q", host, rec.Code, got, rec.Header().Values("Set-Cookie"))
		}
		// A proxy may go on to show us that name; there is no second time.
		r = httptest.NewRequest(http.MethodGet, rec.Header().Get("Location"), nil)
		r.Host, r.TLS = host, nil
		if got := redirectURIOf(t, f.OAuth, r); got != "https://wx.example.com"+oauthBase+"/authUserReceive/"+platformID+"/verify" {
			t.Errorf("Host %q: redirect_uri %s", host, got)
		}
	}
	t.Run("handle_path", func(t *testing.T) {
		h := middleware(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
			r.URL.Path, r.URL.RawPath = strings.TrimPrefix(r.URL.Path, "/out side"), ""
			return f.ServeHTTP(w, r, next)
		})
		rec := serve(t, h, httptest.NewRequest(http.MethodGet, "/out%20side"+path, nil), nil)
		if got := rec.Header().Get("Location"); got != "https://wx.example.com/out%20side"+path+"?at=origin&scope=snsapi_base&state=" {
			t.Errorf("to %s", got)
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
