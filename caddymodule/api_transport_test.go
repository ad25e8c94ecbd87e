package caddymodule

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// transport is the one that the gateway provisioned.
func (g *gateway) transport() *Transport {
	return g.api.proxy.(*reverseproxy.Handler).Transport.(*Transport)
}

func TestAPIUnreachable(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	opaque := g.opaque(accountID, crmKey)
	wechat.Close()
	for _, a := range []answer{
		g.get("/"+accountID+"/cgi-bin/x", bearer(crmKey)),
		g.post("/cgi-bin/x?access_token="+opaque, "{}"),
	} {
		if a.Status != http.StatusBadGateway || a.code(t) != 502 {
			t.Errorf("got %d %s", a.Status, a.Body)
		}
	}
	if n := counted(t, g.app.metrics().apiRequests, "crm", outcomeUnreachable); n != 2 {
		t.Errorf("%v unreachable calls are counted", n)
	}
	g.noSecretsLogged(opaque)
}

func TestAPISlow(t *testing.T) {
	release := make(chan struct{})
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.transport().HTTPTransport.Transport.ResponseHeaderTimeout = 50 * time.Millisecond
	g.opaque(accountID, crmKey)
	wechat.answer(func(w http.ResponseWriter, r *http.Request) { <-release })
	defer close(release)
	wechat.seen()
	a := g.get("/"+accountID+"/cgi-bin/x", bearer(crmKey))
	if a.Status != http.StatusGatewayTimeout || a.code(t) != 504 {
		t.Errorf("got %d %s", a.Status, a.Body)
	}
	wechat.one(t) // and not once more
}

// The next origin is tried if no connection to the first can be made, with the whole body; the first is then passed
// over for a while.
func TestAPIBackupOrigin(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, gatewayConfig("http://"+deadAddress(t), wechat.URL), "")
	upstreams := g.api.proxy.(*reverseproxy.Handler).Upstreams
	if !upstreams[0].Healthy() || !upstreams[1].Healthy() {
		t.Error("an origin is passed over before the first call")
	}
	for _, body := range []io.Reader{strings.NewReader("whole body"), onlyReader{strings.NewReader("whole body")}} {
		if a := g.do(http.MethodPost, "/"+accountID+"/cgi-bin/x", body, bearer(crmKey)); a.Status != http.StatusOK {
			t.Errorf("got %d %s", a.Status, a.Body)
		}
		if got := wechat.one(t); got.Body != "whole body" || got.Host != wechat.Listener.Addr().String() {
			t.Errorf("WeChat got %+v", got)
		}
	}
	if upstreams[0].Healthy() || !upstreams[1].Healthy() {
		t.Error("Caddy does not pass the dead origin over, or passes the other one over")
	}
}

// So is it where an egress proxy cannot reach the first, and where no handshake with it succeeds: nothing of the call was sent. The gateway's
// own call, for the token, finds its way too.
func TestAPIBackupOriginWithoutAConnection(t *testing.T) {
	wechat := newFakeWeChat(t)
	proxy := newRefusingProxy(t)
	noTLS := httptest.NewUnstartedServer(http.NotFoundHandler())
	noTLS.Config.ErrorLog = log.New(io.Discard, "", 0) // it says that it got no HTTP
	noTLS.Start()
	t.Cleanup(noTLS.Close)
	for class, config := range map[string]string{ // what status says of the host: a proxy's refusal has no type
		classAnswer: strings.Replace(gatewayConfig("https://127.0.0.1:9", wechat.URL), `"platforms"`, `"proxy": "`+proxy.URL+`", "platforms"`, 1),
		classTLS:    gatewayConfig(strings.Replace(noTLS.URL, "http:", "https:", 1), wechat.URL),
	} {
		for _, body := range []io.Reader{strings.NewReader("whole body"), onlyReader{strings.NewReader("whole body")}, http.NoBody} {
			g := newGateway(t, wechat, config, "") // to which both origins are healthy
			want := ""
			if body != http.NoBody {
				want = "whole body"
			}
			if a := g.do(http.MethodPost, "/"+accountID+"/cgi-bin/x", body, bearer(crmKey)); a.Status != http.StatusOK {
				t.Errorf("%s: got %d %s", class, a.Status, a.Body)
			}
			if got := wechat.one(t); got.Body != want || got.Host != wechat.Listener.Addr().String() {
				t.Errorf("%s: WeChat got %+v", class, got)
			}
			if upstreams := g.api.proxy.(*reverseproxy.Handler).Upstreams; upstreams[0].Healthy() || !upstreams[1].Healthy() {
				t.Errorf("%s: Caddy does not pass the dead origin over, or passes the other one over", class)
			}
			for at, origin := range g.transport().origins {
				h := g.transport().hosts[origin]
				if failing := at != wechat.Listener.Addr().String(); h.failing.Load() != failing || failing && h.class != class {
					t.Errorf("%s: noted of %s: failing %v, %s: %s", class, origin, h.failing.Load(), h.class, h.reason)
				}
			}
		}
	}
	proxy.mu.Lock()
	defer proxy.mu.Unlock()
	if len(proxy.got) == 0 {
		t.Error("the proxy was not asked")
	}
}

// dropping is a WeChat whose connections die after their first answer.
func dropping(t *testing.T, wechat *fakeWeChat) (server *httptest.Server, calls *atomic.Int64) {
	calls = new(atomic.Int64)
	server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/cgi-bin/stable_token") || r.URL.Path == "/cgi-bin/warm" {
			wechat.ServeHTTP(w, r)
			return
		}
		// The request has arrived and may have been acted on; the connection dies without an answer.
		calls.Add(1)
		_, _ = io.ReadAll(r.Body)
		conn, _, err := http.NewResponseController(w).Hijack()
		if err == nil {
			conn.Close()
		}
	}))
	server.Start()
	t.Cleanup(server.Close)
	return server, calls
}

// Neither Caddy nor net/http sends a POST again, or a request that can be made only once, when a pooled connection dies.
func TestAPINeverSendsTwice(t *testing.T) {
	wechat := newFakeWeChat(t)
	server, calls := dropping(t, wechat)
	backup := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { calls.Add(1) }))
	defer backup.Close()
	g := newGateway(t, wechat, gatewayConfig(server.URL, backup.URL), "")
	for _, c := range []struct{ name, method, target, body string }{
		{"POST", "POST", "/cgi-bin/message/custom/send", "{}"},
		{"POST without a body", "POST", "/cgi-bin/menu/delete", ""},
		{"PUT", "PUT", "/cgi-bin/x", "{}"},
		{"js_code", "GET", "/sns/jscode2session?js_code=c1", ""},
		{"code", "GET", "/sns/oauth2/access_token?code=c1", ""},
		{"a GET that undoes", "GET", "/wxa/revertcoderelease", ""},
		{"a POST that undoes", "POST", "/wxa/revertcoderelease", ""},
	} {
		// A connection in the pool is what tempts net/http.
		if a := g.get("/"+accountID+"/cgi-bin/warm", bearer(crmKey)); a.Status != http.StatusOK {
			t.Fatalf("%s: got %d %s", c.name, a.Status, a.Body)
		}
		calls.Store(0)
		a := g.do(c.method, "/"+accountID+c.target, strings.NewReader(c.body), bearer(crmKey), "Idempotency-Key: k")
		if a.Status != http.StatusBadGateway || a.code(t) != 502 || calls.Load() != 1 {
			t.Errorf("%s: got %d %s after %d calls", c.name, a.Status, a.Body, calls.Load())
		}
	}
}

// A request without a body leaves as one, also if it can be made only once.
func TestAPINoBodyStaysNone(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	for method, length := range map[string]string{"GET": "", "HEAD": "", "POST": "0", "PUT": "0", "PATCH": "0", "DELETE": ""} {
		for _, path := range []string{"/cgi-bin/x", "/wxa/revertcoderelease"} {
			if a := g.do(method, "/"+accountID+path, nil, bearer(crmKey)); a.Status != http.StatusOK {
				t.Errorf("%s %s: got %d %s", method, path, a.Status, a.Body)
			}
			if got := wechat.one(t); got.Method != method || got.Chunked || got.Length != 0 || got.Header.Get("Content-Length") != length {
				t.Errorf("%s %s: WeChat got %+v", method, path, got)
			}
		}
	}
}

// The shortest body there is goes through, whether its length is told or not.
func TestAPIShortestBody(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	for name, body := range map[string]io.Reader{"length": strings.NewReader("7"), "no length": io.MultiReader(strings.NewReader("7"))} {
		if a := g.do(http.MethodPost, "/"+accountID+"/cgi-bin/x", body, bearer(crmKey)); a.Status != http.StatusOK {
			t.Errorf("%s: got %d %s", name, a.Status, a.Body)
		}
		if got := wechat.one(t); got.Body != "7" {
			t.Errorf("%s: WeChat got %+v", name, got)
		}
	}
}

func TestTransportFailsClosed(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	tr := g.transport()
	req := httptest.NewRequest(http.MethodPost, "/cgi-bin/user/info?access_token=x", strings.NewReader("x"))
	req.URL.Host = wechat.Listener.Addr().String()
	for name, r := range map[string]*http.Request{
		"nobody admitted it": req,
		"another host": func() *http.Request {
			r := req.WithContext(context.WithValue(req.Context(), apiCallKey{}, &apiCall{path: "/x"}))
			u := *req.URL
			u.Host = "evil.example:443"
			r.URL = &u
			return r
		}(),
	} {
		res, err := tr.RoundTrip(r)
		if err != nil || res.StatusCode != http.StatusInternalServerError {
			t.Errorf("%s: got %v, %v", name, res, err)
		}
	}
	if calls := wechat.seen(); len(calls) != 0 {
		t.Errorf("WeChat was called: %+v", calls)
	}
}

// Over TLS the certificate is checked for the origin's name, h2 is spoken, and single-use calls carry no body.
func TestAPITLS(t *testing.T) {
	var protos sync.Map
	wechat := newFakeWeChat(t)
	u := newServedGateway(t, "h2", func(w http.ResponseWriter, r *http.Request) {
		protos.Store(r.Proto+" "+r.TLS.ServerName+" "+r.Host, true)
		wechat.ServeHTTP(w, r)
	})
	tr := u.transport()
	if tr.HTTPTransport.TLS == nil || tr.HTTPTransport.TLS.InsecureSkipVerify {
		t.Fatal("TLS is not on")
	}
	for _, singleUse := range []bool{false, true} {
		call := &apiCall{
			key: tokens.AccountKey(accountID), token: tokens.Token{Value: secret.New("TOKEN")}, param: paramAccess,
			path: "/cgi-bin/user/info", header: http.Header{}, singleUse: singleUse,
		}
		req := httptest.NewRequest(http.MethodGet, "/", nil)
		req = caddyhttp.PrepareRequest(req, caddy.NewReplacer(), httptest.NewRecorder(), &caddyhttp.Server{})
		req = req.WithContext(context.WithValue(req.Context(), apiCallKey{}, call))
		req.URL = &url.URL{Host: u.host}
		res, err := tr.RoundTrip(req)
		if err != nil || res.StatusCode != http.StatusOK {
			t.Fatalf("got %v, %v", res, err)
		}
		res.Body.Close()
		if got := wechat.one(t); got.Query != "access_token=TOKEN" || got.Body != "" || got.Length > 0 {
			t.Errorf("WeChat got %+v", got)
		}
	}
	want := "HTTP/2.0 example.com " + u.host
	protos.Range(func(got, _ any) bool {
		if got != want {
			t.Errorf("WeChat was spoken to as %v, want %s", got, want)
		}
		return true
	})
}

// With everything at debug level, nothing that Caddy's proxy logs shows a token, a key or a query.
func TestAPICaddyLogsNoSecret(t *testing.T) {
	logFile := filepath.Join(t.TempDir(), "caddy.log")
	wechat := newFakeWeChat(t)
	storage, _ := json.Marshal(map[string]string{"module": "file_system", "root": t.TempDir()})
	logging := fmt.Sprintf(`{"logs":{"default":{"level":"DEBUG","writer":{"output":"file","filename":%q}}}}`, logFile)
	config := new(caddy.Config)
	if err := json.Unmarshal([]byte(`{"logging":`+logging+`}`), config); err != nil {
		t.Fatal(err)
	}
	config.Admin = &caddy.AdminConfig{Disabled: true}
	config.StorageRaw = storage
	config.AppsRaw = caddy.ModuleMap{"wechat": json.RawMessage(gatewayConfig(wechat.URL))}
	g := provisionGateway(t, config, "")
	opaque := g.opaque(accountID, crmKey)
	g.get("/cgi-bin/user/info?openid=oSecretUser&access_token=" + opaque)
	g.get("/"+accountID+"/cgi-bin/user/info?access_token="+opaque, bearer(crmKey), "Cookie: session=secret-session")
	g.get("/sns/jscode2session?appid=" + accountID + "&secret=" + crmKey + "&js_code=secret-code")
	g.get("/"+accountID+"/cgi-bin/user/info", bearer(strangerKey))
	wechat.spoil(accountID)
	g.post("/cgi-bin/x?access_token="+opaque, "{}")
	wechat.Close()
	g.get("/cgi-bin/user/info?access_token=" + opaque)

	logged, err := os.ReadFile(logFile)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(logged, []byte("upstream roundtrip")) {
		t.Fatal("the proxy logged nothing")
	}
	for _, s := range []string{"REALTOKEN", opaque, crmKey, strangerKey, "account-secret", "secret-session", "secret-code", "oSecretUser"} {
		if i := bytes.Index(logged, []byte(s)); i >= 0 {
			t.Errorf("log shows %q: …%s", s, logged[max(0, i-300):min(len(logged), i+50)])
		}
	}
}

func TestSafeReason(t *testing.T) {
	t.Parallel()
	for text, safe := range map[string]bool{
		"dial tcp 192.0.2.1:443: connection refused": true, "EOF": true,
		"Get https://x/?access_token=T: EOF": false, `malformed HTTP response "T"`: false, strings.Repeat("x", 300): false,
	} {
		if got := safeReason(errors.New(text)); (got == text) != safe {
			t.Errorf("%q became %q", text, got)
		}
	}
}

// waitCounted returns the number of calls of an outcome once it has reached want: a call is counted after its caller
// has got all there is, or has left.
func waitCounted(t *testing.T, g *gateway, client, outcome string, want float64) (n float64) {
	t.Helper()
	for late := time.Now().Add(10 * time.Second); time.Now().Before(late); <-time.After(time.Millisecond) {
		if n = counted(t, g.app.metrics().apiRequests, client, outcome); n >= want {
			break
		}
	}
	return n
}
