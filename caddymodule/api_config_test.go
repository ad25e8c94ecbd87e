package caddymodule

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

func TestAPIValidate(t *testing.T) {
	t.Parallel()
	valid := func(change func(*API)) *API {
		a := &API{RepeatBuffer: 1, ResponseHeaderTimeout: caddy.Duration(maxAPITimeout), StallTimeout: caddy.Duration(leastDuration)}
		change(a)
		return a
	}
	if err := valid(func(*API) {}).Validate(); err != nil {
		t.Error(err)
	}
	for want, a := range map[string]*API{
		"repeat_buffer: want":                         valid(func(a *API) { a.RepeatBuffer = -1 }),
		"repeat_buffer: want a number of bytes up to": valid(func(a *API) { a.RepeatBuffer = maxSize + 1 }),
		"response_header_timeout: want more than 0":   valid(func(a *API) { a.ResponseHeaderTimeout = -1 }),
		"response_header_timeout: 30ns":               valid(func(a *API) { a.ResponseHeaderTimeout = 30 }),
		"stall_timeout: want more than 0 and at most": valid(func(a *API) { a.StallTimeout = caddy.Duration(maxAPITimeout + 1) }),
		"stall_timeout: 30ns":                         valid(func(a *API) { a.StallTimeout = 30 }),
	} {
		if err := a.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: got %v, want %q", a, err, want)
		}
	}
}

func TestAPIUnmarshalCaddyfile(t *testing.T) {
	t.Parallel()
	h := httpcaddyfile.Helper{Dispenser: caddyfile.NewTestDispenser("wechat_api {\n repeat_buffer 2MiB\n trust_loopback\n response_header_timeout 2m\n stall_timeout 45s\n}")}
	handler, err := parseAPI(h)
	if err != nil {
		t.Fatal(err)
	}
	if a := handler.(*API); a.RepeatBuffer != 2<<20 || !a.TrustLoopback || time.Duration(a.ResponseHeaderTimeout) != 2*time.Minute || time.Duration(a.StallTimeout) != 45*time.Second {
		t.Errorf("got %+v", a)
	}
	for input, want := range map[string]string{
		"wechat_api x": "wrong argument count", "wechat_api {\n nope\n}": "unknown subdirective 'nope'", "wechat_api {\n repeat_buffer\n}": "wrong argument count",
		"wechat_api {\n repeat_buffer 1MiB 2MiB\n}": "wrong argument count", "wechat_api {\n repeat_buffer much\n}": "'much' is not a size",
		"wechat_api {\n repeat_buffer 0\n}": "is not a size", "wechat_api {\n repeat_buffer 1MiB\n repeat_buffer 1MiB\n}": "given twice",
		"wechat_api {\n stall_timeout 2h\n}": "stall_timeout: want more than 0 and at most 1h", "wechat_api {\n response_header_timeout 2h\n}": "response_header_timeout: want",
		"wechat_api {\n stall_timeout 5\n}": "'5' is not a duration", "wechat_api {\n stall_timeout 5s\n stall_timeout 5s\n}": "given twice",
		"wechat_api {\n trust_loopback yes\n}": "wrong argument count", "wechat_api {\n trust_loopback\n trust_loopback\n}": "given twice",
	} {
		_, err := parseAPI(httpcaddyfile.Helper{Dispenser: caddyfile.NewTestDispenser(input)})
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "Testfile:") {
			t.Errorf("%q: got %v, want %q with file and line", input, err, want)
		}
	}
}

func TestAPIProxyConfig(t *testing.T) {
	app, ctx := newTestApp(t, `{"accounts":[{"appid":"`+accountID+`","secret":"s"}],
		"api":["https://api.weixin.qq.com","https://api2.weixin.qq.com:8443","http://127.0.0.1:8080"],"proxy":"http://user:pw@proxy.internal:3128"}`)
	module, err := ctx.LoadModuleByID("http.handlers.wechat_api", nil)
	if err != nil {
		t.Fatal(err)
	}
	a := module.(*API)
	handler := a.proxy.(*reverseproxy.Handler)
	var dials []string
	for _, u := range handler.Upstreams {
		dials = append(dials, u.Dial)
	}
	if got := strings.Join(dials, " "); got != "api.weixin.qq.com:443 api2.weixin.qq.com:8443 127.0.0.1:8080" {
		t.Errorf("upstreams are %s", got)
	}
	tr := handler.Transport.(*Transport)
	if len(tr.origins) != 3 || tr.RequestHeaderOps() != nil || !tr.HTTPTransport.Transport.DisableCompression {
		t.Errorf("transport is %+v", tr)
	}
	req := httptest.NewRequest(http.MethodGet, "https://api.weixin.qq.com/", nil)
	req = caddyhttp.PrepareRequest(req, caddy.NewReplacer(), httptest.NewRecorder(), &caddyhttp.Server{})
	if proxy, err := tr.HTTPTransport.Transport.Proxy(req); err != nil || proxy.Host != "proxy.internal:3128" {
		t.Errorf("egress is %v, %v", proxy, err)
	}
	if app.apiOrigins()[0].Host != "api.weixin.qq.com" {
		t.Error("origins are out of order")
	}
}

// refusingProxy is a forward proxy that tells whose way it bars: each refusal has words of its own.
type refusingProxy struct {
	*httptest.Server

	mu  sync.Mutex
	got []string
}

func newRefusingProxy(t *testing.T) *refusingProxy {
	p := new(refusingProxy)
	p.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.got = append(p.got, r.Method+" "+r.RequestURI)
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		_, _ = fmt.Fprintf(conn, "HTTP/1.1 502 %s\r\nContent-Length: 0\r\n\r\n", refusalOf(len(p.got)))
		_ = conn.Close()
	}))
	t.Cleanup(p.Close)
	return p
}

// refusalOf is what the proxy says to its nth request.
func refusalOf(n int) string { return fmt.Sprintf("refused (request %d)", n) }

// refused is the request whose refusal a text quotes, or empty.
func (p *refusingProxy) refused(text string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, request := range p.got {
		if strings.Contains(text, refusalOf(i+1)) {
			return request
		}
	}
	return ""
}

// What goes to this machine in the clear is not shown to a proxy.
func TestAPIProxyGetsNothingInTheClear(t *testing.T) {
	proxy := newRefusingProxy(t)
	wechat := newFakeWeChat(t)
	through := func(origin string) *gateway {
		return newGateway(t, wechat, strings.Replace(gatewayConfig(origin), `"platforms"`, `"proxy": "`+proxy.URL+`", "platforms"`, 1), "")
	}
	g := through(wechat.URL)
	if a := g.get("/"+accountID+"/cgi-bin/x", bearer(crmKey)); a.Status != http.StatusOK || wechat.tokensIssued(accountID) != 1 {
		t.Errorf("got %d %s", a.Status, a.Body)
	}
	wechat.one(t)
	proxy.mu.Lock()
	if len(proxy.got) != 0 {
		t.Errorf("the proxy got %q", proxy.got)
	}
	proxy.mu.Unlock()
	// Over https both the gateway's own calls and the apps' go through it. Each says why it failed: by which of the proxy's refusals.
	g = through("https://127.0.0.1:9")
	core, calls := observer.New(zapcore.DebugLevel)
	g.transport().logger = zap.New(core)
	for _, c := range []struct {
		name, target, log string
		logs              *observer.ObservedLogs
	}{
		{"the gateway's own call, for a token", "/" + accountID + "/cgi-bin/x", "no token for a call", g.logs},
		{"an app's call, which needs none", "/sns/userinfo?access_token=USER&openid=o1", "exchange with WeChat failed", calls},
	} {
		a := g.get(c.target, bearer(crmKey))
		lines := c.logs.FilterMessageSnippet(c.log).All()
		if a.Status < http.StatusInternalServerError || len(lines) != 1 {
			t.Errorf("%s: got %d %s, and the log says %v", c.name, a.Status, a.Body, lines)
			continue
		}
		if by := proxy.refused(fmt.Sprint(lines[0].ContextMap())); by != "CONNECT 127.0.0.1:9" {
			t.Errorf("%s was not refused by the proxy, but for %v", c.name, lines[0].ContextMap())
		}
	}
}

func TestAPINeedsTheApp(t *testing.T) {
	ctx, err := caddy.ProvisionContext(&caddy.Config{Admin: &caddy.AdminConfig{Disabled: true}, StorageRaw: json.RawMessage(`{"module":"file_system","root":` + strconv.Quote(t.TempDir()) + `}`)})
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"http.handlers.wechat_api", "http.reverse_proxy.transport.wechat"} {
		if _, err := ctx.LoadModuleByID(id, nil); err == nil || !strings.Contains(err.Error(), "global option wechat") {
			t.Errorf("%s: got %v", id, err)
		}
	}
}
