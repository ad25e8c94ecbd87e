package caddymodule

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// operated is an app with an account that authorised its first platform, on a simulated WeChat.
func operated(t *testing.T) (*App, *platformWeChat) {
	t.Helper()
	wx := newPlatformWeChat(t)
	wx.failures["/cgi-bin/component/api_authorizer_token"] = `{"authorizer_access_token":"access-token-renewed","expires_in":7200,"authorizer_refresh_token":"refreshtoken@@@renewed"}`
	wx.failures["/cgi-bin/stable_token"] = `{"access_token":"access-token-stable","expires_in":7200}`
	app, _ := newTestApp(t, testConfig(wx.URL))
	if err := app.Start(); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{platformID, otherPlatform} {
		err := app.manager().PutTicket(t.Context(), p, tokens.Ticket{Value: secret.New("ticket@@@" + p), CreatedAt: time.Now()})
		if err != nil {
			t.Fatal(err)
		}
	}
	join(t, app, platformID, "queryauthcode@@@1")
	return app, wx
}

func join(t *testing.T, app *App, platform, code string) {
	t.Helper()
	if _, err := app.manager().ExchangeAuthCode(t.Context(), platform, authorizerID, secret.New(code)); err != nil {
		t.Fatal(err)
	}
}

// changing is what differs between two answers that are alike.
var changing = regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ`)

func TestAdminAuthorizers(t *testing.T) {
	t.Parallel()
	app, wx := operated(t)
	mux := adminMux(t, app)
	const list = `{"authorizers":[{"platform":"` + platformID + `","appid":"` + authorizerID + `","state":"authorized"}],"next":"","index":{"state":"absent","seen":0}}`
	const none = `{"authorizers":[],"next":"","index":{"state":"absent","seen":0}}`
	const sets = `"permission_sets":[{"id":1,"name":{"en":"messages","zh":"消息管理"}},{"id":2,"name":{"en":"users","zh":"用户管理"}},{"id":15,"name":{"en":"custom menu","zh":"菜单管理"}}]`
	const detail = `{"platform":"` + platformID + `","appid":"` + authorizerID + `","name":"小店 \u003cb\u003e","user_name":"gh_0123456789ab","state":"authorized",` +
		`"authorized_at":"T","type":{"mini_program":false},"principal":"某公司",` + sets + `,"token":{"expires":"T","refreshed":"T"}}`
	for _, step := range []struct {
		method, path string
		status       int
		want         string // the whole answer, or a part of an error
	}{
		{"GET", "/authorizers", 200, list},
		{"GET", "/authorizers?platform=" + platformID + "&q=&cursor=&limit=200", 200, list},
		{"GET", "/authorizers?platform=" + otherPlatform, 200, none},
		{"GET", "/authorizers?q=" + authorizerID, 200, list},
		{"GET", "/authorizers?q=" + authorizerID[:9], 200, list},
		{"GET", "/authorizers?q=" + ghID, 200, none},
		{"GET", "/authorizers?limit=0", 400, "limit: want a number from 1 to 200"},
		{"GET", "/authorizers?limit=201", 400, "limit: want a number from 1 to 200"},
		{"GET", "/authorizers?limit=9999999999999999999", 400, "limit: want"},
		{"GET", "/authorizers?limit=1&limit=2", 400, "limit: comes twice"},
		{"GET", "/authorizers?q=%FF", 400, "q: not UTF-8"},
		{"GET", "/authorizers?q=%00", 400, "q: has a control character"},
		{"GET", "/authorizers?q=%zz", 400, "the query is not in order"},
		{"GET", "/authorizers?q=" + strings.Repeat("a", 129), 400, "q: longer than 128 bytes"},
		{"GET", "/authorizers?cursor=..%2F..%2Fticket", 400, "cursor: not one that this list has given"},
		{"GET", "/authorizers?platform=" + strangerID, 400, "platform: the configuration has no platform"},
		{"POST", "/authorizers", 405, ""},
		{"GET", "/authorizers/" + strangerID, 404, "has not authorised the platform"},
		{"GET", "/authorizers/..%2F..%2Fticket", 404, "has not authorised the platform"},
		{"GET", "/authorizers/" + strings.Repeat("a", 100), 404, "has not authorised the platform"},
		{"GET", "/authorizers/" + platformID, 404, "is a platform"},
		{"GET", "/authorizers/" + accountID, 404, "is an account of the configuration"},
		{"GET", "/authorizers/" + authorizerID + "?platform=" + otherPlatform, 404, "has not authorised the platform"},
		{"GET", "/authorizers/" + authorizerID + "?platform=" + strangerID, 404, "not configured"},
		{"GET", "/authorizers/" + authorizerID, 200, detail},
		{"GET", "/authorizers/" + authorizerID + "?platform=" + platformID, 200, detail},
		{"GET", "/authorizers?q=" + ghID, 200, strings.Replace(list, `"state":"auth`, `"name":"小店 \u003cb\u003e","user_name":"`+ghID+`","state":"auth`, 1)},
	} {
		rec := adminCall(mux, step.method, "/wechat"+step.path, "")
		got := changing.ReplaceAllString(rec.Body.String(), "T")
		if rec.Code != step.status || step.status == 200 && got != step.want || !strings.Contains(got, step.want) {
			t.Errorf("%s %s: %d %s\nwant %d %s", step.method, step.path, rec.Code, got, step.status, step.want)
		}
	}
	if n := wx.count(infoPath); n != 1 {
		t.Errorf("WeChat was asked about accounts %d times", n)
	}
	// By name, once the index is there.
	deadline := time.Now().Add(time.Minute)
	for {
		var page authorizerPage
		rec := adminCall(mux, "GET", "/wechat/authorizers?q="+url.QueryEscape("小店"), "")
		if err := json.Unmarshal(rec.Body.Bytes(), &page); err != nil || rec.Code != 200 {
			t.Fatalf("%d %s", rec.Code, rec.Body)
		}
		if page.Index.State == "ready" {
			if len(page.Authorizers) != 1 || page.Index.Seen != 1 {
				t.Errorf("%s", rec.Body)
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("no index: %s", rec.Body)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestAdminRefreshAndRevoke(t *testing.T) {
	t.Parallel()
	app, wx := operated(t)
	mux := adminMux(t, app)
	renewed := func(platform, appid, kind string) string {
		text := fmt.Sprintf(`"appid":%q,"kind":%q,"expires":"T"}`, appid, kind)
		if platform != "" {
			text = fmt.Sprintf(`"platform":%q,`, platform) + text
		}
		return "{" + text
	}
	const revoked = `{"platform":"` + platformID + `","appid":"` + authorizerID + `","state":"revoked"}`
	wx.set(func() {
		wx.failures[infoPath] = `{"errcode":61003,"errmsg":"component is not authorized by this account"}`
		wx.failures["/cgi-bin/stable_token"] = `{"errcode":40164,"errmsg":"invalid ip 203.0.113.9 ipv6 ::ffff:203.0.113.9, not in whitelist rid: 64f1e2d3-0a1b2c3d-4e5f6071"}`
	})
	try := func(method, path string, status int, want string) {
		t.Helper()
		rec := adminCall(mux, method, "/wechat"+path, "")
		got := changing.ReplaceAllString(rec.Body.String(), "T")
		if rec.Code != status || status == 200 && got != want || !strings.Contains(got, want) {
			t.Errorf("%s %s: %d %s\nwant %d %s", method, path, rec.Code, got, status, want)
		}
		if (rec.Header().Get("Retry-After") != "") != strings.Contains(got, "a moment ago") {
			t.Errorf("%s: %d with Retry-After %q", path, rec.Code, rec.Header().Get("Retry-After"))
		}
	}
	try("GET", "/refresh/"+authorizerID, 405, "")
	try("POST", "/refresh/"+strangerID, 404, "no platform holds an authorization of it")
	try("POST", "/refresh/..%2Fticket", 404, "no platform holds an authorization of it")
	try("POST", "/refresh/"+authorizerID+"?platform="+otherPlatform, 404, "has not authorised the platform")
	try("POST", "/refresh/"+authorizerID+"?platform="+strangerID, 404, "not configured")
	try("POST", "/refresh/"+accountID+"?platform="+platformID, 400, "leave it out")
	try("POST", "/refresh/"+platformID+"?platform="+otherPlatform, 400, "leave it out")
	try("POST", "/refresh/"+authorizerID, 200, renewed(platformID, authorizerID, "authorizer"))
	try("POST", "/refresh/"+authorizerID, 429, "somebody had this token renewed a moment ago: wait for ")
	try("POST", "/refresh/"+platformID, 200, renewed(platformID, platformID, "component"))
	try("POST", "/refresh/"+platformID+"?platform="+platformID, 429, "a moment ago")
	try("POST", "/refresh/"+accountID, 502, "WeChat refuses: /cgi-bin/stable_token: 40164 invalid ip 203.0.113.9")
	try("POST", "/refresh/"+accountID, 429, "a moment ago")

	try("GET", "/revoke/"+authorizerID, 405, "")
	try("POST", "/revoke/"+strangerID, 404, "no platform holds an authorization of it")
	try("POST", "/revoke/"+platformID, 404, "is a platform")
	try("POST", "/revoke/"+accountID, 404, "is an account of the configuration")
	try("POST", "/revoke/"+authorizerID+"?platform="+otherPlatform, 404, "has not authorised the platform")
	join(t, app, otherPlatform, "queryauthcode@@@2")
	try("POST", "/revoke/"+authorizerID, 400, "platform: "+authorizerID+" has authorised "+platformID+" and "+otherPlatform+": say which one is meant")
	try("POST", "/refresh/"+authorizerID, 400, "say which one is meant")
	try("POST", "/revoke/"+authorizerID+"?platform="+platformID, 200, revoked)
	try("POST", "/revoke/"+authorizerID+"?platform="+platformID, 200, revoked)
	try("POST", "/refresh/"+authorizerID+"?platform="+platformID, 404, "has not authorised the platform")
	try("POST", "/revoke/"+authorizerID, 200, strings.Replace(revoked, platformID, otherPlatform, 1))
	try("POST", "/revoke/"+authorizerID, 404, "no platform holds an authorization of it")
	if _, err := app.manager().Get(t.Context(), tokens.AuthorizerKey(platformID, authorizerID)); err == nil {
		t.Error("the token is still there")
	}
}

func TestAdminDrain(t *testing.T) {
	t.Parallel()
	app, wx := operated(t)
	mux := adminMux(t, app)
	wx.set(func() { wx.failures[queryAuthPath] = `{"errcode":-1,"errmsg":"system error queryauthcode@@@stuck"}` })
	err := app.manager().Accept(t.Context(), tokens.Intent{Platform: otherPlatform, AppID: strangerID, Code: secret.New("queryauthcode@@@stuck"), CreatedAt: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	rec := adminCall(mux, "POST", "/wechat/drain", "")
	want := `{"waiting":1,"tried":1,"done":0,"failed":[{"platform":"` + otherPlatform + `","appid":"` + strangerID + `","reason":"-1 system busy","text":{"en":"-1 system busy","zh":"-1 系统繁忙"}}]}`
	if rec.Code != 200 || rec.Body.String() != want {
		t.Errorf("%d %s\nwant %s", rec.Code, rec.Body, want)
	}
	if rec := adminCall(mux, "POST", "/wechat/drain", ""); rec.Code != http.StatusTooManyRequests || rec.Header().Get("Retry-After") != "10" {
		t.Errorf("%d %s, Retry-After %s", rec.Code, rec.Body, rec.Header().Get("Retry-After"))
	}
	if rec := adminCall(mux, "GET", "/wechat/drain", ""); rec.Code != http.StatusMethodNotAllowed {
		t.Errorf("GET: %d", rec.Code)
	}
}

// No answer and no line of the log holds what is secret, and each change has a line.
func TestAdminOperationsKeepSecrets(t *testing.T) {
	t.Parallel()
	core, logs := observer.New(zapcore.DebugLevel)
	var said strings.Builder
	for _, failing := range []bool{false, true} {
		app, wx := operated(t)
		mux := http.NewServeMux()
		for _, route := range (&Admin{operations{app: app, logger: zap.New(core)}}).Routes() {
			mux.HandleFunc(route.Pattern, func(w http.ResponseWriter, r *http.Request) {
				if err := route.Handler.ServeHTTP(w, r); err != nil {
					http.Error(w, fmt.Sprintf("%+v", err), err.(caddy.APIError).HTTPStatus)
				}
			})
		}
		if failing {
			// As WeChat does, these quote what the call had in it.
			wx.set(func() {
				for path, quoted := range map[string]string{
					queryAuthPath: "component-token queryauthcode@@@stuck", infoPath: "component-token", "/cgi-bin/stable_token": "account-secret",
					"/cgi-bin/component/api_authorizer_token": "component-token " + grantedRefresh,
				} {
					wx.failures[path] = `{"errcode":45009,"errmsg":"reach max api daily quota limit ` + quoted + `"}`
				}
			})
			err := app.manager().Accept(t.Context(), tokens.Intent{Platform: platformID, AppID: strangerID, Code: secret.New("queryauthcode@@@stuck"), CreatedAt: time.Now()})
			if err != nil {
				t.Fatal(err)
			}
		}
		for _, call := range []string{
			"GET /wechat/authorizers", "GET /wechat/authorizers?q=x", "GET /wechat/authorizers/" + authorizerID, "POST /wechat/drain",
			"POST /wechat/refresh/" + accountID, "POST /wechat/refresh/" + authorizerID, "POST /wechat/refresh/" + platformID,
			"GET /wechat/authorizers/" + authorizerID, "POST /wechat/revoke/" + authorizerID,
		} {
			method, path, _ := strings.Cut(call, " ")
			said.WriteString(adminCall(mux, method, path, "").Body.String() + "\n")
		}
	}
	if n := strings.Count(said.String(), "[redacted]"); n < 2 {
		t.Errorf("WeChat's errors are told %d times:\n%s", n, said.String())
	}
	for _, line := range logs.All() {
		fmt.Fprintf(&said, "%s %v\n", line.Message, line.ContextMap())
	}
	for _, value := range []string{"component-token", "-secret", "@@@", grantedAccess, "access-token", platformKey, platformToken} {
		if strings.Contains(said.String(), value) {
			t.Errorf("%q is told:\n%s", value, said.String())
		}
	}
	if n := logs.FilterMessageSnippet("authorization dropped on demand").Len(); n != 2 {
		t.Errorf("%d lines on a revocation", n)
	}
}

// Without the global option, and without a store, all say so.
func TestAdminOperationsUnavailable(t *testing.T) {
	t.Parallel()
	closed, _ := newTestApp(t, testConfig(""))
	closed.manager().Close()
	for _, tt := range []struct {
		app    *App
		status int
	}{{nil, http.StatusNotFound}, {closed, http.StatusServiceUnavailable}} {
		mux := adminMux(t, tt.app)
		for _, call := range []string{
			"GET /wechat/authorizers", "GET /wechat/authorizers/" + authorizerID, "POST /wechat/refresh/" + authorizerID, "POST /wechat/refresh/" + accountID,
			"POST /wechat/revoke/" + authorizerID, "POST /wechat/drain",
		} {
			method, path, _ := strings.Cut(call, " ")
			if rec := adminCall(mux, method, path, ""); rec.Code != tt.status {
				t.Errorf("%s: %d %s", call, rec.Code, rec.Body)
			}
		}
	}
}
