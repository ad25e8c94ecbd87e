package caddymodule

import (
	"bufio"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

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

// However a request is written, it is read in one way: for the account that it names, as a plain call.
func TestAPIOddRequests(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	const auth = "Authorization: Bearer " + crmKey + "\r\n"
	const headers = "Host: gw\r\nConnection: close\r\n" + auth
	for name, request := range map[string]string{
		"HTTP/1.0":               "GET /" + accountID + "/cgi-bin/x HTTP/1.0\r\n" + auth,
		"a target without host":  "GET http:/" + accountID + "/cgi-bin/x HTTP/1.1\r\n" + headers,
		"a target with a user":   "GET http://u:p@evil.example/" + accountID + "/cgi-bin/x HTTP/1.1\r\n" + headers,
		"websocket":              "GET /" + accountID + "/cgi-bin/x HTTP/1.1\r\nHost: gw\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13\r\n" + auth,
		"h2c":                    "GET /" + accountID + "/cgi-bin/x HTTP/1.1\r\nHost: gw\r\nConnection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n" + auth,
		"the appid twice":        "GET /cgi-bin/x HTTP/1.1\r\nx-wechat-APPID: " + accountID + "\r\nX-Wechat-Appid: " + accountID + "\r\n" + headers,
		"headers in other cases": "GET /" + accountID + "/cgi-bin/x HTTP/1.1\r\nhOST: gw\r\ncONNECTION: CLOSE\r\naUTHORIZATION: bEARER " + crmKey + "\r\n",
		"slashes around":         "GET ///" + accountID + "//cgi-bin/x/ HTTP/1.1\r\n" + headers,
	} {
		if status, body := g.raw(t, request+"\r\n"); status != http.StatusOK || body != `{"errcode":0,"errmsg":"ok"}` {
			t.Errorf("%s: got %d %s", name, status, body)
			continue
		}
		got := wechat.one(t)
		delete(got.Header, "User-Agent")
		if got.Path != "/cgi-bin/x" || got.Query != "access_token=REALTOKEN-"+accountID+"-1" || got.Host != wechat.Listener.Addr().String() || len(got.Header) != 0 {
			t.Errorf("%s: WeChat got %+v", name, got)
		}
	}
	for name, header := range map[string]string{
		"two appids in one": "X-Wechat-Appid: " + accountID + ", " + authorizerID, "an empty appid": "X-Wechat-Appid:", "another header": "X_Wechat_Appid: " + accountID,
	} {
		if status, body := g.raw(t, "GET /cgi-bin/x HTTP/1.1\r\n"+header+"\r\n"+headers+"\r\n"); status != http.StatusBadRequest {
			t.Errorf("%s: got %d %s", name, status, body)
		}
	}
	if calls := wechat.seen(); len(calls) != 0 {
		t.Errorf("WeChat was called: %+v", calls)
	}
}

// A token in a body is the caller's content: it proves nothing, and stays where it is.
func TestAPITokenInBody(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	opaque := g.opaque(accountID, crmKey)
	wechat.seen()
	for contentType, body := range map[string]string{
		"application/x-www-form-urlencoded": "a=1&access_token=" + opaque,
		"application/json":                  `{"access_token":"` + opaque + `"}`,
		"multipart/form-data; boundary=x":   "--x\r\nContent-Disposition: form-data; name=\"access_token\"\r\n\r\n" + opaque + "\r\n--x--\r\n",
	} {
		for _, target := range []string{"/cgi-bin/x", "/" + accountID + "/cgi-bin/x", "/sns/userinfo", "/cgi-bin/component/api_authorizer_token"} {
			if a := g.post(target, body, "Content-Type: "+contentType); a.code(t) == 0 {
				t.Errorf("%s, %s: got %d %s, want a refusal", target, contentType, a.Status, a.Body)
			}
		}
		if calls := wechat.seen(); len(calls) != 0 {
			t.Errorf("%s: WeChat was called: %+v", contentType, calls)
		}
		if a := g.post("/"+accountID+"/cgi-bin/x", body, "Content-Type: "+contentType, bearer(crmKey)); a.Status != http.StatusOK || wechat.one(t).Body != body {
			t.Errorf("%s: got %d %s, want the body passed on as it is", contentType, a.Status, a.Body)
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

func TestOutboundHeaderNominated(t *testing.T) {
	t.Parallel()
	out := outboundHeader(http.Header{"Connection": {"close, x-one", "X-Two"}, "X-One": {"1"}, "X-Two": {"2"}, "X-Three": {"3"}})
	if len(out) != 2 || out.Get("X-Three") != "3" || out["User-Agent"][0] != "" {
		t.Errorf("got %v", out)
	}
}

// Nothing by which a machine in between would take the call for another one, or that tells where it came from.
func TestOutboundHeaderStaysHere(t *testing.T) {
	t.Parallel()
	in := make(http.Header)
	for _, name := range []string{
		"X-Forwarded-For", "X-Forwarded", "X-Forward-For", "X-Original-Url", "X-Original-Forwarded-For", "X-Originating-Ip", "X-Rewrite-Url", "X-Real-Ip",
		"X-Client-Ip", "X-Cluster-Client-Ip", "X-Http-Method-Override", "X-Http-Method", "X-Method-Override", "Cf-Connecting-Ip", "Cf-Ray", "Cdn-Loop",
		"True-Client-Ip", "Fastly-Client-Ip", "X-Envoy-External-Address", "X-Amzn-Trace-Id", "X-Wechat-Openid", "X-Host",
	} {
		in.Set(name, "x")
	}
	in.Set("Wechatmp-Signature", "kept")
	in.Set("X-Anything-Else", "kept")
	out := outboundHeader(in)
	delete(out, "User-Agent")
	if len(out) != 2 || out.Get("Wechatmp-Signature") != "kept" || out.Get("X-Anything-Else") != "kept" {
		t.Errorf("got %v", out)
	}
}

// The client's key is nobody else's business, wherever a caller writes it.
func TestAPIKeyStaysHere(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	opaque := g.opaque(accountID, crmKey)
	wechat.seen()
	const keys = "secret=" + crmKey + "&appsecret=" + crmKey + "&Component_AppSecret=" + crmKey + "&se%63ret=" + crmKey
	for target, want := range map[string]string{
		"/cgi-bin/x?a=1&" + keys + "&access_token=" + opaque + "&b=2": "a=1&access_token=REALTOKEN-" + accountID + "-1&b=2",
		"/sns/anything/else?" + keys + "&access_token=" + opaque:      "",
		"/sns/userinfo?" + keys + "&access_token=USER":                "access_token=USER",
	} {
		if a := g.get(target); a.Status != http.StatusOK {
			t.Errorf("%s: got %d %s", target, a.Status, a.Body)
		}
		if got := wechat.one(t); got.Query != want {
			t.Errorf("WeChat got %s?%s, want %s", got.Path, got.Query, want)
		}
	}
}

// The server in front of the handler may let through in a query what would end a request line.
func TestAPIQueryThatBreaksOut(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	for _, raw := range []string{"a=1 HTTP/1.1", "a=1\tb", "a=1\r\nX-Evil: 1", "a=1#b", "a=\x00", "a=\x7f"} {
		r := httptest.NewRequest(http.MethodGet, "/"+accountID+"/cgi-bin/x", nil)
		r.URL.RawQuery = raw
		r.Header.Set("Authorization", "Bearer "+crmKey)
		if rec := serve(t, g.api, r, nil); rec.Code != http.StatusBadRequest {
			t.Errorf("%q: got %d %s", raw, rec.Code, rec.Body)
		}
	}
	if calls := wechat.seen(); len(calls) != 0 {
		t.Errorf("WeChat was called: %+v", calls)
	}
}

// The proxy adds where a call came from to the header that it gets, and copies all of it, for its log alone.
func TestProxySeesHeaderForItsLog(t *testing.T) {
	g := newGateway(t, newFakeWeChat(t), "", "")
	var seen http.Header
	g.api.proxy = middleware(func(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
		seen = r.Header
		writeJSON(w, http.StatusOK, []byte("{}"))
		return nil
	})
	for level, shown := range map[zapcore.Level]bool{zapcore.InfoLevel: false, zapcore.DebugLevel: true} {
		core, _ := observer.New(level)
		g.api.proxyLog = zap.New(core)
		g.get("/"+accountID+"/cgi-bin/user/info", bearer(crmKey), "X-Of-The-App: 1")
		values, known := seen["X-Forwarded-For"]
		if got := seen.Get("X-Of-The-App") == "1"; got != shown || seen.Get("Authorization") != "" || known == shown || values != nil {
			t.Errorf("at level %s the proxy sees %v", level, seen)
		}
	}
}

// TestProxyEncodesNoUnshownHeader: after each exchange the proxy encodes the header for its log, whether it is shown or not.
func TestProxyEncodesNoUnshownHeader(t *testing.T) {
	g := newGateway(t, newFakeWeChat(t), "", "")
	proxy, ok := g.api.proxy.(*reverseproxy.Handler)
	if !ok {
		t.Fatalf("the proxy is a %T", g.api.proxy)
	}
	spy := &headerSpy{RoundTripper: proxy.Transport}
	proxy.Transport = spy
	for level, shown := range map[zapcore.Level]bool{zapcore.InfoLevel: false, zapcore.DebugLevel: true} {
		core, _ := observer.New(level)
		g.api.proxyLog = zap.New(core)
		if answer := g.get("/"+accountID+"/cgi-bin/user/info", bearer(crmKey), "X-Of-The-App: 1"); answer.Status != http.StatusOK {
			t.Fatalf("got %d %s", answer.Status, answer.Body)
		}
		if got := spy.left.Get("X-Of-The-App") == "1"; got != shown || !shown && spy.left != nil {
			t.Errorf("at level %s the proxy encodes %v", level, spy.left)
		}
	}
}

// headerSpy keeps what header a transport leaves in the proxy's request.
type headerSpy struct {
	http.RoundTripper
	left http.Header
}

func (s *headerSpy) RoundTrip(req *http.Request) (*http.Response, error) {
	res, err := s.RoundTripper.RoundTrip(req)
	s.left = req.Header
	return res, err
}

// What all calls have in common for the proxy's log, the proxy leaves as it is.
func TestProxyLeavesUnshownHeader(t *testing.T) {
	g := newGateway(t, newFakeWeChat(t), "", "")
	g.api.proxyLog = zap.NewNop()
	before := unshownHeader.Clone()
	for _, r := range []*http.Request{
		httptest.NewRequest(http.MethodGet, "/"+accountID+"/cgi-bin/user/info", nil),
		httptest.NewRequest(http.MethodPost, "/"+accountID+"/cgi-bin/message/custom/send", strings.NewReader(`{"touser":"o"}`)),
	} {
		r.Header.Set("Authorization", "Bearer "+crmKey)
		if rec := serve(t, g.api, r, nil); rec.Code != http.StatusOK {
			t.Fatalf("got %d %s", rec.Code, rec.Body)
		}
	}
	if !maps.EqualFunc(before, unshownHeader, slices.Equal) {
		t.Errorf("got %v, want %v", unshownHeader, before)
	}
}
