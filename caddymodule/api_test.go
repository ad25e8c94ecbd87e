package caddymodule

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

func TestAPIWays(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.authorize()
	opaqueAccount, opaqueAuthorizer := g.opaque(accountID, crmKey), g.opaque(authorizerID, crmKey)
	wechat.seen()
	for _, c := range []struct {
		name, target string
		headers      []string
		path, query  string
	}{
		{"path, account", "/" + accountID + "/cgi-bin/user/info?openid=o1&lang=zh_CN", []string{bearer(crmKey)},
			"/cgi-bin/user/info", "openid=o1&lang=zh_CN&access_token=REALTOKEN-" + accountID + "-1"},
		{"path, authorizer", "/" + authorizerID + "/cgi-bin/user/info?openid=o1", []string{bearer(crmKey)},
			"/cgi-bin/user/info", "openid=o1&access_token=REALTOKEN-" + authorizerID + "-1"},
		{"path, second key of the client", "/" + accountID + "/cgi-bin/user/info", []string{bearer(crmOldKey)},
			"/cgi-bin/user/info", "access_token=REALTOKEN-" + accountID + "-1"},
		{"path, key known by its sum", "/" + authorizerID + "/cgi-bin/user/info", []string{"Authorization: bearer " + hashedKey},
			"/cgi-bin/user/info", "access_token=REALTOKEN-" + authorizerID + "-1"},
		{"header", "/cgi-bin/user/info?openid=o1", []string{bearer(crmKey), "X-Wechat-Appid: " + accountID},
			"/cgi-bin/user/info", "openid=o1&access_token=REALTOKEN-" + accountID + "-1"},
		{"header and path alike", "/" + accountID + "/cgi-bin/user/info", []string{bearer(crmKey), "X-Wechat-Appid: " + accountID},
			"/cgi-bin/user/info", "access_token=REALTOKEN-" + accountID + "-1"},
		{"drop-in, token first", "/cgi-bin/user/info?access_token=" + opaqueAccount + "&openid=o1", nil,
			"/cgi-bin/user/info", "access_token=REALTOKEN-" + accountID + "-1&openid=o1"},
		{"drop-in, token last", "/cgi-bin/user/info?openid=o1&access_token=" + opaqueAuthorizer, nil,
			"/cgi-bin/user/info", "openid=o1&access_token=REALTOKEN-" + authorizerID + "-1"},
		{"drop-in, token in the middle", "/cgi-bin/user/info?a=1&access_token=" + opaqueAccount + "&b=2", nil,
			"/cgi-bin/user/info", "a=1&access_token=REALTOKEN-" + accountID + "-1&b=2"},
		{"drop-in below its prefix", "/" + accountID + "/cgi-bin/user/info?access_token=" + opaqueAccount, nil,
			"/cgi-bin/user/info", "access_token=REALTOKEN-" + accountID + "-1"},
		{"leading slashes", "//" + accountID + "//cgi-bin/user/info", []string{bearer(crmKey)},
			"/cgi-bin/user/info", "access_token=REALTOKEN-" + accountID + "-1"},
		{"roots that begin like an appid", "/wxa/getwxacode", []string{bearer(crmKey), "X-Wechat-Appid: " + accountID},
			"/wxa/getwxacode", "access_token=REALTOKEN-" + accountID + "-1"},
		{"query kept byte for byte", "/" + accountID + "/cgi-bin/x?b=%7e~%E4%BD%A0&a=1+2&&c&=d&b=2", []string{bearer(crmKey)},
			"/cgi-bin/x", "b=%7e~%E4%BD%A0&a=1+2&&c&=d&b=2&access_token=REALTOKEN-" + accountID + "-1"},
	} {
		a := g.get(c.target, c.headers...)
		if a.Status != http.StatusOK || a.Body != `{"errcode":0,"errmsg":"ok"}` {
			t.Errorf("%s: got %d %s", c.name, a.Status, a.Body)
			continue
		}
		if got := wechat.one(t); got.Path != c.path || got.Query != c.query {
			t.Errorf("%s: WeChat got %s?%s, want %s?%s", c.name, got.Path, got.Query, c.path, c.query)
		}
	}
	if n := counted(t, g.app.metrics().apiRequests, "crm", "ok"); n < 10 {
		t.Errorf("%v calls of crm were counted", n)
	}
	g.noSecretsLogged(opaqueAccount)
}

func TestAPICredentials(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	const target = "/" + accountID + "/cgi-bin/user/info"
	for _, c := range []struct {
		name, target string
		headers      []string
		status       int
		code         int64
	}{
		{"none", target, nil, 401, 41001},
		{"wrong key", target, []string{bearer(strangerKey)}, 401, 40125},
		{"empty key", target, []string{"Authorization: Bearer "}, 401, 40125},
		{"sum of a key", target, []string{bearer("d6a3")}, 401, 40125},
		{"another scheme", target, []string{"Authorization: Basic " + crmKey}, 401, 40125},
		{"two keys", target, []string{bearer(crmKey), bearer(crmKey)}, 401, 40125},
		{"unknown opaque token", target + "?access_token=80_abc", nil, 200, 40001},
		{"empty opaque token", target + "?access_token=", nil, 401, 41001},
		{"the key as a token", target + "?access_token=" + crmKey, nil, 200, 40001},
		{"Bearer wins over a token", target + "?access_token=80_abc", []string{bearer(strangerKey)}, 401, 40125},
		{"loopback is not trusted by default", target, []string{"Host: localhost"}, 401, 41001},
	} {
		a := g.get(c.target, c.headers...)
		if code := a.code(t); a.Status != c.status || code != c.code {
			t.Errorf("%s: got %d, errcode %d; want %d, %d", c.name, a.Status, code, c.status, c.code)
		}
		if (a.Status == 401) != (a.Header.Get("WWW-Authenticate") != "") {
			t.Errorf("%s: WWW-Authenticate is %q with status %d", c.name, a.Header.Get("WWW-Authenticate"), a.Status)
		}
	}
	if calls := wechat.seen(); len(calls) != 0 {
		t.Errorf("WeChat was called: %+v", calls)
	}
	if n := g.logs.FilterLevelExact(zapcore.WarnLevel).Len(); n != 1 {
		t.Errorf("%d warnings about refused credentials, want one, and the rest counted", n)
	}
	g.noSecretsLogged(strangerKey, "80_abc")
}

func TestAPIRules(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.authorize()
	wechat.seen()
	for _, c := range []struct {
		name, method, target, key string
		status                    int
		code                      int64 // 0: reaches WeChat
	}{
		{"appid not listed", "GET", "/" + authorizerID + "/cgi-bin/user/info", shopKey, 403, 48001},
		{"appid that does not exist, not listed", "GET", "/" + strangerID + "/cgi-bin/user/info", shopKey, 403, 48001},
		{"path not listed", "GET", "/" + accountID + "/cgi-bin/menu/get", shopKey, 403, 48001},
		{"path listed", "GET", "/" + accountID + "/cgi-bin/user/tag/get", shopKey, 200, 0},
		{"* is not a platform", "GET", "/" + platformID + "/cgi-bin/component/api_create_preauthcode", crmKey, 403, 48001},
		{"* is not a platform, by its authorizer", "POST", "/" + authorizerID + "/cgi-bin/component/get_authorizer_option", crmKey, 403, 48001},
		{"a listed platform", "POST", "/" + platformID + "/cgi-bin/component/api_create_preauthcode", panelKey, 200, 0},
		{"its authorizers with it", "GET", "/" + authorizerID + "/cgi-bin/user/info", panelKey, 200, 0},
		{"its token by an authorizer's name", "GET", "/" + authorizerID + "/wxa/gettemplatelist", panelKey, 200, 0},
		{"but no plain account", "GET", "/" + accountID + "/cgi-bin/user/info", panelKey, 403, 48001},
		{"nor a stranger", "GET", "/" + strangerID + "/cgi-bin/user/info", panelKey, 403, 48001},
		{"guarded by default", "POST", "/" + platformID + "/cgi-bin/component/modify_wxa_server_domain", panelKey, 403, 48001},
		{"account API for a platform", "GET", "/" + platformID + "/cgi-bin/user/info", panelKey, 200, 61015},
		{"component API for an account", "GET", "/" + accountID + "/wxa/gettemplatelist", crmKey, 200, 61014},
		{"unknown appid", "GET", "/" + strangerID + "/cgi-bin/user/info", crmKey, 200, 61003},
		{"no appid", "GET", "/cgi-bin/user/info", crmKey, 400, 41002},
		{"never forwarded", "POST", "/" + platformID + "/cgi-bin/component/api_query_auth", panelKey, 403, 48001},
		{"never forwarded, in capitals", "POST", "/" + platformID + "/CGI-BIN/Component/API_query_auth", panelKey, 403, 48001},
		{"never forwarded, slash at the end", "POST", "/" + platformID + "/cgi-bin/component/api_get_authorizer_list/", panelKey, 403, 48001},
		{"never forwarded", "POST", "/" + platformID + "/cgi-bin/component/api_get_authorizer_info", panelKey, 403, 48001},
		{"never forwarded", "POST", "/" + authorizerID + "/cgi-bin/account/fastregister", crmKey, 403, 48001},
		{"never forwarded", "POST", "/" + accountID + "/cgi-bin/openapi/rid/get", crmKey, 403, 48001},
		{"never forwarded", "POST", "/" + platformID + "/cgi-bin/component/api_start_push_ticket", panelKey, 403, 48001},
		{"a page of the gateway's that is none", "GET", "/wechat/status", crmKey, 404, 404},
		{"a page of the gateway's below an appid", "GET", "/" + accountID + "/wechat/users/abc", crmKey, 404, 404},
	} {
		a := g.do(c.method, c.target, nil, bearer(c.key))
		calls := wechat.seen()
		if c.code == 0 {
			if a.Status != 200 || len(calls) != 1 {
				t.Errorf("%s: got %d %s and %d calls to WeChat, want it passed on", c.name, a.Status, a.Body, len(calls))
			}
			continue
		}
		if code := a.code(t); a.Status != c.status || code != c.code || len(calls) != 0 {
			t.Errorf("%s: got %d, errcode %d, %d calls to WeChat; want %d, %d and none", c.name, a.Status, code, len(calls), c.status, c.code)
		}
	}
	refused := g.logs.FilterMessage("call refused").FilterFieldKey("rule")
	if refused.Len() < 15 {
		t.Errorf("%d refusals are logged", refused.Len())
	}
	g.noSecretsLogged()
}

// Redefined rights apply to tokens that were given out before.
func TestAPIOpaqueRights(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.authorize()
	shop, crm := g.opaque(accountID, shopKey), g.opaque(authorizerID, crmKey)
	wechat.seen()
	check := func(name, target string, want int64) {
		t.Helper()
		a := g.get(target)
		if code := a.code(t); a.Status != http.StatusOK || code != want {
			t.Errorf("%s: got %d, errcode %d (%s); want 200, %d", name, a.Status, code, a.Body, want)
		}
	}
	check("path not listed", "/cgi-bin/menu/get?access_token="+shop, 48001)
	check("another account's prefix", "/"+authorizerID+"/cgi-bin/user/info?access_token="+shop, 48001)
	check("never forwarded", "/cgi-bin/openapi/rid/get?access_token="+crm, 48001)
	check("component API", "/wxa/gettemplatelist?access_token="+crm, 48001)
	if a := g.get("/cgi-bin/user/info?access_token=" + shop + "&access_token=" + crm); a.Status != http.StatusOK || a.code(t) != 40097 {
		t.Errorf("two different tokens: got %d %s", a.Status, a.Body)
	}

	keys := g.api.keys
	for i := range keys {
		if keys[i].client.Name == "crm" {
			keys[i].fingerprint = "rotated"
		}
	}
	check("key gone", "/cgi-bin/user/info?access_token="+crm, 42001)
	g.app.Clients[1].AppIDs = []string{authorizerID}
	check("right gone", "/cgi-bin/user/info?access_token="+shop, 48001)
	g.api.keys = nil
	check("client gone", "/cgi-bin/user/info?access_token="+shop, 48001)
	if calls := wechat.seen(); len(calls) != 0 {
		t.Errorf("WeChat was called: %+v", calls)
	}
}

func TestAPIMisc(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	if a := g.do(http.MethodHead, "/"+accountID+"/cgi-bin/media/get", nil, bearer(crmKey)); a.Status != http.StatusOK {
		t.Errorf("HEAD: got %d", a.Status)
	}
	if a := g.post("/"+accountID+"/cgi-bin/media/get?media_id=m", "", bearer(crmKey)); a.Status != http.StatusOK {
		t.Errorf("POST without a body: got %d", a.Status)
	}
	calls := wechat.seen()
	if len(calls) != 2 || calls[1].Length != 0 || calls[1].Chunked {
		t.Errorf("WeChat got %+v, want the POST with length 0", calls)
	}
	// The redemption of tracking ids is behind the same credentials.
	if a := g.get("/wechat/users/abcdefgh"); a.Status != http.StatusUnauthorized {
		t.Errorf("got %d %s", a.Status, a.Body)
	}
	if a := g.get("//wechat/users/abcdefgh", bearer(crmKey)); a.Status != http.StatusNotFound || !strings.Contains(a.Body, "tracking id") {
		t.Errorf("got %d %s", a.Status, a.Body)
	}
}

// SDKs read errors from HTTP 200 only, whatever is wrong and as early as it is found.
func TestAPIRefusesSDKsWith200(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	opaque := g.opaque(accountID, crmKey)
	wechat.seen()
	for target, code := range map[string]int64{
		"/cgi-bin/../x?": 400,
		"/" + accountID + "/" + strangerID + "/x?":    400,
		"/cgi-bin/x?b=1;access_token=y&":              40097,
		"/cgi-bin/x?access_token=other&":              40097,
		"/cgi-bin/openapi/rid/get?":                   48001,
		"/" + authorizerID + "/cgi-bin/user/info?":    48001,
		"/cgi-bin/token?grant_type=x&secret=wrong&y=": 40125,
	} {
		a := g.get(target + "access_token=" + opaque)
		if got := a.code(t); a.Status != http.StatusOK || got != code || a.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%s, SDK: got %d %s, want 200 and errcode %d", target, a.Status, a.Body, code)
		}
		if strings.Contains(target, "secret") {
			continue
		}
		if a := g.get(target+"access_token="+opaque, bearer(shopKey)); a.Status < 400 {
			t.Errorf("%s, Bearer: got %d %s, want an error's status", target, a.Status, a.Body)
		}
	}
	if a := g.do(http.MethodOptions, "/cgi-bin/x?access_token="+opaque, nil); a.Status != http.StatusOK || a.code(t) != 405 {
		t.Errorf("method, SDK: got %d %s", a.Status, a.Body)
	}
	if calls := wechat.seen(); len(calls) != 0 {
		t.Errorf("WeChat was called: %+v", calls)
	}
}

// What the gateway refuses, and the redemption of tracking ids, is counted and known to placeholders and the access
// log as what WeChat answers is. No log shows a tracking id.
func TestAPIRefusalsAreAnnounced(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	const id = "TrackingIdThatIsSecret"
	g.app.users().Keep(t.Context(), tokens.User{AppID: accountID, OpenID: openID}, tokens.UserGrant{}, time.Minute, false)
	for _, c := range []struct {
		name, target, key string
		status            int
		client, appid     string
		outcome           string
	}{
		{"path", "/" + accountID + "/cgi-bin/menu/get", shopKey, 403, "shop", accountID, outcomeRefused},
		{"appid", "/" + authorizerID + "/cgi-bin/user/info", shopKey, 403, "shop", authorizerID, outcomeRefused},
		{"key", "/" + accountID + "/cgi-bin/user/info", strangerKey, 401, "", accountID, outcomeRefused},
		{"no authorization", "/" + strangerID + "/cgi-bin/user/info", crmKey, 200, "crm", strangerID, outcomeUnavailable},
		{"tracking id", usersPath + id, crmKey, 404, "crm", "", outcomeRefused},
		{"tracking id, wrong key", usersPath + id, strangerKey, 401, "", "", outcomeRefused},
		{"tracking id, misspelt", "/WeChat/Users/" + id, crmKey, 404, "crm", "", outcomeRefused},
		{"tracking id below an appid", "/" + accountID + usersPath + id, crmKey, 404, "crm", accountID, outcomeRefused},
		{"no such page", "/wechat/" + id, crmKey, 404, "crm", "", outcomeRefused},
	} {
		before := counted(t, g.app.metrics().apiRequests, c.client, c.outcome)
		repl, rec := caddy.NewReplacer(), httptest.NewRecorder()
		r := httptest.NewRequest(http.MethodGet, c.target, nil)
		r.Header.Set("Authorization", "Bearer "+c.key)
		r = caddyhttp.PrepareRequest(r, repl, rec, &caddyhttp.Server{})
		extra := new(caddyhttp.ExtraLogFields)
		r = r.WithContext(context.WithValue(r.Context(), caddyhttp.ExtraLogFieldsCtxKey, extra))
		if err := g.api.ServeHTTP(rec, r, nil); err != nil || rec.Code != c.status {
			t.Errorf("%s: got %d %s, %v", c.name, rec.Code, rec.Body, err)
		}
		client, known := repl.GetString("wechat.client")
		appid, _ := repl.GetString("wechat.appid")
		if !known || client != c.client || appid != c.appid {
			t.Errorf("%s: announced client %q, appid %q", c.name, client, appid)
		}
		if n := counted(t, g.app.metrics().apiRequests, c.client, c.outcome) - before; n != 1 {
			t.Errorf("%s: counted %v times as %s", c.name, n, c.outcome)
		}
	}
	if calls := wechat.seen(); len(calls) != 0 {
		t.Errorf("WeChat was called: %+v", calls)
	}
	g.noSecretsLogged(id)
	if n := g.logs.FilterField(zap.String("api", usersPath+"…")).Len(); n == 0 {
		t.Error("refused redemptions are not logged")
	}
}

func TestAPIRedemptionIsCounted(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	id := g.app.users().Keep(t.Context(), tokens.User{AppID: accountID, OpenID: openID}, tokens.UserGrant{}, time.Minute, false)
	if a := g.get(usersPath+id, bearer(crmKey)); a.Status != http.StatusOK || !strings.Contains(a.Body, openID) {
		t.Errorf("got %d %s", a.Status, a.Body)
	}
	if n := counted(t, g.app.metrics().apiRequests, "crm", outcomeOK); n != 1 {
		t.Errorf("%v calls are counted, want 1", n)
	}
}

// A caller that leaves is neither a success nor WeChat's fault.
func TestAPICallerLeaves(t *testing.T) {
	arrived, release := make(chan struct{}), make(chan struct{})
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.opaque(accountID, crmKey)
	defer close(release)
	before := counted(t, g.app.metrics().apiRequests, "crm", outcomeOK)
	for i, start := range []string{"", "first bytes"} {
		wechat.answer(func(w http.ResponseWriter, r *http.Request) {
			if start != "" {
				w.Header().Set("Content-Type", "image/jpeg")
				io.WriteString(w, start)
				_ = http.NewResponseController(w).Flush()
			}
			arrived <- struct{}{}
			<-release
		})
		conn, err := net.Dial("tcp", g.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "GET /%s/cgi-bin/x HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n\r\n", accountID, crmKey)
		<-arrived
		conn.Close()
		if n := waitCounted(t, g, "crm", outcomeCanceled, float64(i+1)); n != float64(i+1) {
			t.Errorf("%v calls are counted as canceled, want %d", n, i+1)
		}
	}
	if n := counted(t, g.app.metrics().apiRequests, "crm", outcomeOK); n != before {
		t.Errorf("%v calls are counted as good", n-before)
	}
}
