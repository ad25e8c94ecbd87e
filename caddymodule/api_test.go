package caddymodule

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"go.uber.org/zap/zapcore"
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
			"/cgi-bin/x", "b=%7e~%E4%BD%A0&a=1+2&c&=d&b=2&access_token=REALTOKEN-" + accountID + "-1"},
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
	if a := g.get("/cgi-bin/user/info?access_token=" + shop + "&access_token=" + crm); a.Status != http.StatusBadRequest || a.code(t) != 40097 {
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

func TestAPIHostile(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.opaque(accountID, crmKey)
	wechat.seen()
	auth := "Authorization: Bearer " + crmKey + "\r\n"
	for name, request := range map[string]string{
		"dots":                  "GET /" + accountID + "/cgi-bin/user/../token HTTP/1.1\r\n" + auth,
		"dots out of an appid":  "GET /" + accountID + "/../" + strangerID + "/cgi-bin/user/info HTTP/1.1\r\n" + auth,
		"one dot":               "GET /" + accountID + "/cgi-bin/./token HTTP/1.1\r\n" + auth,
		"encoded dots":          "GET /" + accountID + "/cgi-bin/%2e%2e/token HTTP/1.1\r\n" + auth,
		"encoded slash":         "GET /" + accountID + "/cgi-bin%2fuser%2finfo HTTP/1.1\r\n" + auth,
		"encoded slash, upper":  "GET /" + accountID + "/cgi-bin/x%2Ftoken HTTP/1.1\r\n" + auth,
		"backslash":             "GET /" + accountID + "/cgi-bin\\token HTTP/1.1\r\n" + auth,
		"encoded backslash":     "GET /" + accountID + "/cgi-bin%5ctoken HTTP/1.1\r\n" + auth,
		"encoded NUL":           "GET /" + accountID + "/cgi-bin/token%00 HTTP/1.1\r\n" + auth,
		"encoded twice":         "GET /" + accountID + "/cgi-bin/%252e%252e/token HTTP/1.1\r\n" + auth,
		"encoded letter":        "GET /" + accountID + "/cgi-bin/%74oken HTTP/1.1\r\n" + auth,
		"empty segment":         "GET /" + accountID + "/cgi-bin//token HTTP/1.1\r\n" + auth,
		"path parameter":        "GET /" + accountID + "/cgi-bin/token;a=b HTTP/1.1\r\n" + auth,
		"space":                 "GET /" + accountID + "/cgi-bin/token%20 HTTP/1.1\r\n" + auth,
		"two appids":            "GET /" + accountID + "/" + strangerID + "/cgi-bin/user/info HTTP/1.1\r\n" + auth,
		"nothing":               "GET / HTTP/1.1\r\n" + auth,
		"an appid alone":        "GET /" + accountID + "/ HTTP/1.1\r\n" + auth,
		"endless":               "GET /" + accountID + "/" + strings.Repeat("a", 300) + " HTTP/1.1\r\n" + auth,
		"two header appids":     "GET /cgi-bin/user/info HTTP/1.1\r\nX-Wechat-Appid: " + accountID + "\r\nX-Wechat-Appid: " + strangerID + "\r\n" + auth,
		"header against path":   "GET /" + accountID + "/cgi-bin/user/info HTTP/1.1\r\nX-Wechat-Appid: " + strangerID + "\r\n" + auth,
		"header of other shape": "GET /cgi-bin/user/info HTTP/1.1\r\nX-Wechat-Appid: ../" + accountID + "\r\n" + auth,
		"token behind semi":     "GET /" + accountID + "/cgi-bin/user/info?a=1;access_token=x HTTP/1.1\r\n" + auth,
		"TRACE":                 "TRACE /" + accountID + "/cgi-bin/user/info HTTP/1.1\r\n" + auth,
		"OPTIONS":               "OPTIONS /" + accountID + "/cgi-bin/user/info HTTP/1.1\r\n" + auth,
		"CONNECT":               "CONNECT evil.example:443 HTTP/1.1\r\n" + auth,
		"absolute, no rights":   "GET http://evil.example/" + accountID + "/cgi-bin/user/info HTTP/1.1\r\n",
	} {
		status, body := g.raw(t, request+"Host: api.weixin.qq.com\r\nConnection: close\r\n\r\n")
		if status < 400 || status >= 500 || !strings.HasPrefix(body, `{"errcode":`) {
			t.Errorf("%s: got %d %q, want a refusal", name, status, body)
		}
	}
	if calls := wechat.seen(); len(calls) != 0 {
		t.Errorf("WeChat was called: %+v", calls)
	}
	g.noSecretsLogged()
}

// raw sends bytes and returns the status and body of the answer.
func (g *gateway) raw(t *testing.T, request string) (int, string) {
	t.Helper()
	conn, err := net.Dial("tcp", g.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, _ := io.ReadAll(res.Body)
	return res.StatusCode, string(body)
}

// Whatever host a caller names, in the target or in Host, the call goes to WeChat's.
func TestAPIOneHostOnly(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	for name, request := range map[string]string{
		"absolute target": "GET http://evil.example/%s/cgi-bin/user/info HTTP/1.1\r\nHost: evil.example\r\n",
		"host":            "GET /%s/cgi-bin/user/info HTTP/1.1\r\nHost: evil.example:1234\r\n",
	} {
		status, body := g.raw(t, fmt.Sprintf(request, accountID)+"Authorization: Bearer "+crmKey+"\r\nConnection: close\r\n\r\n")
		if status != http.StatusOK {
			t.Errorf("%s: got %d %s", name, status, body)
		}
		if got := wechat.one(t); got.Host != wechat.Listener.Addr().String() || got.Path != "/cgi-bin/user/info" {
			t.Errorf("%s: WeChat got Host %s, path %s", name, got.Host, got.Path)
		}
	}
}

func TestAPICallersCredentialsStayHere(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	opaque := g.opaque(accountID, crmKey)
	wechat.seen()
	a := g.do(http.MethodPost, "/"+accountID+"/cgi-bin/message/custom/send?access_token="+opaque+"&x=1&access_token="+opaque+
		"&component%5Faccess_token="+opaque+"&ACCESS_TOKEN="+opaque+"&cloudbase_access_token="+opaque+"&y=access_token", strings.NewReader(`{"a":"<&>你"}`),
		bearer(crmKey), "Cookie: session=1", "X-Forwarded-For: 192.0.2.1", "X-Forwarded-Whatever: 1", "Forwarded: for=192.0.2.1", "Via: 1.1 x",
		"X-Real-Ip: 192.0.2.1", "Idempotency-Key: k", "X-Idempotency-Key: k", "X-Wechat-Appid: "+accountID, "X-Wechat-Openid: o", "Accept-Encoding: gzip",
		"Origin: https://app.example", "Sec-Fetch-Mode: cors", "Connection: X-Nominated, Upgrade", "Upgrade: websocket", "X-Nominated: 1", "Te: trailers",
		"Proxy-Authorization: Basic x", "Wechatmp-Appid: kept", "Content-Type: application/json;charset=utf-8", "User-Agent: sdk/1")
	if a.Status != http.StatusOK {
		t.Fatalf("got %d %s", a.Status, a.Body)
	}
	got := wechat.one(t)
	if want := "access_token=REALTOKEN-" + accountID + "-1&x=1&y=access_token"; got.Query != want {
		t.Errorf("WeChat got the query %s, want %s", got.Query, want)
	}
	allowed := map[string]string{
		"Wechatmp-Appid": "kept", "Content-Type": "application/json;charset=utf-8", "User-Agent": "sdk/1", "Content-Length": "14",
	}
	for name, values := range got.Header {
		if want, ok := allowed[name]; !ok || want != values[0] {
			t.Errorf("WeChat got %s: %q", name, values)
		}
	}
	if got.Body != `{"a":"<&>你"}` || got.Length != 14 || got.Chunked {
		t.Errorf("WeChat got the body %q, length %d, chunked %v", got.Body, got.Length, got.Chunked)
	}

	g.get("/"+accountID+"/cgi-bin/user/info", bearer(crmKey), "User-Agent: ")
	if got := wechat.one(t); got.Header.Get("User-Agent") != "" || got.Header.Get("Via") != "" {
		t.Errorf("WeChat got headers that nobody sent: %v", got.Header)
	}
}

func TestAPITrustLoopback(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", `{"trust_loopback":true}`)
	g.authorize()
	wechat.seen()
	const target = "/" + accountID + "/cgi-bin/user/info"
	if a := g.get(target); a.Status != http.StatusOK || a.Body != `{"errcode":0,"errmsg":"ok"}` {
		t.Fatalf("got %d %s", a.Status, a.Body)
	}
	if a := g.get("/" + authorizerID + "/cgi-bin/user/info"); a.Status != http.StatusOK {
		t.Errorf("authorizer: got %d %s", a.Status, a.Body)
	}
	wechat.seen()
	for _, header := range []string{
		"Forwarded: for=1", "X-Forwarded-For: 127.0.0.1", "X-Forwarded-Proto: https", "X-Forwarded-Anything: x", "X-Real-IP: 127.0.0.1",
		"Via: 1.1 proxy", "Origin: null", "Sec-Fetch-Site: none", "Sec-Fetch-Mode: navigate",
	} {
		if a := g.get(target, header); a.Status != http.StatusUnauthorized || a.code(t) != 41001 {
			t.Errorf("%s: got %d %s, want 401", header, a.Status, a.Body)
		}
	}
	for name, a := range map[string]answer{
		"a wrong key stays wrong": g.get(target, bearer(strangerKey)),
		"a platform":              g.get("/" + platformID + "/cgi-bin/component/get_authorizer_option"),
		"an SDK's wrong secret":   g.get("/cgi-bin/token?grant_type=client_credential&secret=x&appid=" + accountID),
	} {
		if code := a.code(t); code != 40125 && code != 48001 {
			t.Errorf("%s: got %d %s", name, a.Status, a.Body)
		}
	}
	if calls := wechat.seen(); len(calls) != 0 {
		t.Errorf("WeChat was called: %+v", calls)
	}
}

func TestIsTrustedLoopback(t *testing.T) {
	t.Parallel()
	for remote, want := range map[string]bool{
		"127.0.0.1:1": true, "127.8.9.1:1": true, "[::1]:1": true, "[::ffff:127.0.0.1]:1": true,
		"192.0.2.1:1": false, "[2001:db8::1]:1": false, "@": false, "": false, "127.0.0.1": false, "localhost:1": false,
	} {
		r := &http.Request{RemoteAddr: remote, Header: http.Header{"Accept": {"*/*"}}}
		if got := isTrustedLoopback(r); got != want {
			t.Errorf("%q: got %v", remote, got)
		}
	}
}

// Without any client, trust_loopback serves SDKs too: they have to send some secret.
func TestAPITrustLoopbackForSDKs(t *testing.T) {
	wechat := newFakeWeChat(t)
	config := fmt.Sprintf(`{"accounts":[{"appid":%q,"secret":"account-secret"}],"api":[%q]}`, accountID, wechat.URL)
	g := newGateway(t, wechat, config, `{"trust_loopback":true}`)
	token := g.opaque(accountID, "whatever")
	if a := g.get("/cgi-bin/user/info?access_token=" + token); a.Status != http.StatusOK || a.Body != `{"errcode":0,"errmsg":"ok"}` {
		t.Errorf("got %d %s", a.Status, a.Body)
	}
	if a := g.get("/cgi-bin/user/info?access_token="+token, "Via: 1.1 proxy"); a.code(t) != 48001 {
		t.Errorf("through a proxy: got %d %s", a.Status, a.Body)
	}
	g.api.TrustLoopback = false
	if a := g.get("/cgi-bin/user/info?access_token=" + token); a.code(t) != 48001 {
		t.Errorf("no longer trusted: got %d %s", a.Status, a.Body)
	}
	if a := g.get("/cgi-bin/token?grant_type=client_credential&secret=x&appid=" + accountID); a.code(t) != 40125 {
		t.Errorf("no longer trusted: got %d %s", a.Status, a.Body)
	}
}

func TestAPIUserTokensPass(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	opaque := g.opaque(accountID, crmKey)
	wechat.seen()
	const query = "access_token=USER_TOKEN&openid=o1&lang=zh_CN"
	for _, target := range []string{"/sns/userinfo?" + query, "/" + accountID + "/sns/auth?" + query} {
		if a := g.get(target, bearer(crmKey)); a.Status != http.StatusOK {
			t.Errorf("got %d %s", a.Status, a.Body)
		}
		if got := wechat.one(t); got.Query != query || !strings.HasPrefix(got.Path, "/sns/") || got.Header.Get("Authorization") != "" {
			t.Errorf("WeChat got %s?%s", got.Path, got.Query)
		}
	}
	if a := g.get("/sns/userinfo?" + query); a.Status != http.StatusUnauthorized {
		t.Errorf("without a client: got %d %s", a.Status, a.Body)
	}
	if a := g.get("/sns/userinfo?access_token=" + opaque + "&openid=o1"); a.Status != http.StatusOK || a.code(t) != 48001 {
		t.Errorf("an opaque token in the place of the user's: got %d %s", a.Status, a.Body)
	}
	if a := g.get("/sns/userinfo?access_token="+opaque, bearer(crmKey)); a.code(t) != 48001 {
		t.Errorf("an opaque token, with Bearer: got %d %s", a.Status, a.Body)
	}
	if calls := wechat.seen(); len(calls) != 0 {
		t.Errorf("WeChat was called: %+v", calls)
	}
	if a := g.get("/sns/oauth2/refresh_token?appid="+accountID+"&refresh_token=USER_REFRESH&access_token="+opaque, bearer(crmKey)); a.Status != http.StatusOK {
		t.Errorf("got %d %s", a.Status, a.Body)
	}
	if got := wechat.one(t); got.Query != "appid="+accountID+"&refresh_token=USER_REFRESH" {
		t.Errorf("a path without a token: WeChat got %s?%s", got.Path, got.Query)
	}
}

func TestAPILogin(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.authorize()
	wechat.seen()
	for _, c := range []struct {
		name, target string
		headers      []string
		path, query  string
	}{
		{"account, key as secret", "/sns/jscode2session?appid=" + accountID + "&secret=" + crmKey + "&js_code=c1&grant_type=authorization_code", nil,
			"/sns/jscode2session", "appid=" + accountID + "&js_code=c1&grant_type=authorization_code&secret=account-secret"},
		{"account, Bearer", "/" + accountID + "/sns/oauth2/access_token?code=c1&grant_type=authorization_code", []string{bearer(crmKey)},
			"/sns/oauth2/access_token", "code=c1&grant_type=authorization_code&appid=" + accountID + "&secret=account-secret"},
		{"authorizer, mini program", "/sns/jscode2session?appid=" + authorizerID + "&secret=" + crmKey + "&js_code=c1", nil,
			"/sns/component/jscode2session", "appid=" + authorizerID + "&js_code=c1&component_access_token=REALTOKEN-" + platformID + "-1&component_appid=" + platformID},
		{"authorizer, web", "/sns/oauth2/access_token?secret=" + crmKey + "&appid=" + authorizerID + "&code=c1", nil,
			"/sns/oauth2/component/access_token", "appid=" + authorizerID + "&code=c1&component_access_token=REALTOKEN-" + platformID + "-1&component_appid=" + platformID},
	} {
		a := g.get(c.target, c.headers...)
		if got := wechat.one(t); a.Status != http.StatusOK || got.Path != c.path || got.Query != c.query {
			t.Errorf("%s: got %d, WeChat got %s?%s, want %s?%s", c.name, a.Status, got.Path, got.Query, c.path, c.query)
		}
	}
	for name, target := range map[string]string{
		"wrong key":        "/sns/jscode2session?js_code=c1&appid=" + accountID + "&secret=" + strangerKey,
		"appid not listed": "/sns/jscode2session?js_code=c1&appid=" + authorizerID + "&secret=" + shopKey,
		"no appid":         "/sns/jscode2session?js_code=c1&secret=" + shopKey,
		"other appid":      "/" + accountID + "/sns/jscode2session?js_code=c1&appid=" + authorizerID + "&secret=" + crmKey,
		"platform":         "/sns/jscode2session?js_code=c1&appid=" + platformID + "&secret=" + panelKey,
	} {
		if a := g.get(target); a.Status != http.StatusOK || a.code(t) == 0 {
			t.Errorf("%s: got %d %s", name, a.Status, a.Body)
		}
	}
	if calls := wechat.seen(); len(calls) != 0 {
		t.Errorf("WeChat was called: %+v", calls)
	}
	g.noSecretsLogged("c1")
}

func TestAPIMisc(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	if a := g.do(http.MethodHead, "/"+accountID+"/cgi-bin/media/get", nil, bearer(crmKey)); a.Status != http.StatusOK {
		t.Errorf("HEAD: got %d", a.Status)
	}
	if a := g.post("/"+accountID+"/cgi-bin/ticket/getticket?type=jsapi", "", bearer(crmKey)); a.Status != http.StatusOK {
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
