package caddymodule

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// The gateway's own work on a call, without Caddy's proxy and net/http. The target for both halves together is 2 µs of
// CPU, the gate 5 µs.

// BenchmarkAPICall is a whole call without the network, in "gateway"; in "proxy" the same call through a reverse_proxy
// that only passes it on. What the first takes more is the gateway's own.
func BenchmarkAPICall(b *testing.B) {
	c := newCallBench(b)
	for _, part := range []struct {
		name string
		h    caddyhttp.Handler
	}{{"proxy", c.proxy}, {"gateway", c.gateway}} {
		b.Run(part.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				c.call(b, part.h)
			}
		})
	}
}

// callBench has a call at hand, and two ways to a WeChat in this process.
type callBench struct {
	request        *http.Request
	gateway, proxy caddyhttp.Handler
}

func newCallBench(tb testing.TB) *callBench {
	g := newGateway(tb, newFakeWeChat(tb), "", "")
	g.api.logger = zap.NewNop() // the tests' own takes lines for debugging, too
	wechat := smallAnswer(`{"errcode":0,"errmsg":"ok","subscribe":1,"openid":"oABCDEFGHIJKLMNOPQRSTUVWXYZ","language":"zh_CN","subscribe_time":1382694957}`)
	over := func(t *reverseproxy.HTTPTransport) { t.Transport.RegisterProtocol("http", wechat) }

	over(g.api.proxy.(*reverseproxy.Handler).Transport.(*Transport).HTTPTransport)
	ctx, err := caddy.ProvisionContext(new(caddy.Config))
	if err != nil {
		tb.Fatal(err)
	}
	module, err := ctx.LoadModuleByID("http.handlers.reverse_proxy", json.RawMessage(`{"upstreams": [{"dial": "127.0.0.1:9"}]}`))
	if err != nil {
		tb.Fatal(err)
	}
	proxy := module.(*reverseproxy.Handler)
	over(proxy.Transport.(*reverseproxy.HTTPTransport))
	return &callBench{admittedCalls(g)["bearer"], withoutNext(g.api), withoutNext(proxy)}
}

func withoutNext(m caddyhttp.MiddlewareHandler) caddyhttp.Handler {
	return caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error { return m.ServeHTTP(w, r, nil) })
}

// call has a handler answer the call, with what Caddy's server makes for each request.
func (c *callBench) call(tb testing.TB, h caddyhttp.Handler) {
	req := *c.request
	rec := &discardWriter{header: make(http.Header)}
	if err := h.ServeHTTP(rec, caddyhttp.PrepareRequest(&req, caddy.NewReplacer(), rec, &caddyhttp.Server{})); err != nil || rec.status != http.StatusOK {
		tb.Fatal(rec.status, err)
	}
}

// smallAnswer is a http.RoundTripper that answers everything with this text.
type smallAnswer string

func (a smallAnswer) RoundTrip(req *http.Request) (*http.Response, error) {
	return &http.Response{
		Status: "200 OK", StatusCode: http.StatusOK, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Request: req,
		Header:        http.Header{"Content-Type": {"application/json; encoding=utf-8"}, "Content-Length": {strconv.Itoa(len(a))}, "Date": {"Mon, 02 Jan 2006 15:04:05 GMT"}},
		ContentLength: int64(len(a)), Body: &endingBody{*strings.NewReader(string(a))},
	}, nil
}

// endingBody says that it ends with its last bytes, as net/http's bodies do when their length is known.
type endingBody struct{ strings.Reader }

func (b *endingBody) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if err == nil && b.Len() == 0 {
		err = io.EOF
	}
	return n, err
}

func (*endingBody) Close() error { return nil }

func BenchmarkAPIAdmit(b *testing.B) {
	g := newGateway(b, newFakeWeChat(b), "", "")
	for name, r := range admittedCalls(g) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				admitCall(b, g, r)
			}
		})
	}
}

// admittedCalls are a call for an account with a key, and one with an opaque token.
func admittedCalls(g *gateway) map[string]*http.Request {
	calls := map[string]*http.Request{
		"bearer": httptest.NewRequest(http.MethodGet, "/"+accountID+"/cgi-bin/user/info?openid=oABCDEFGHIJKLMNOPQRSTUVWXYZ&lang=zh_CN", nil),
		"opaque": httptest.NewRequest(http.MethodGet, "/cgi-bin/user/info?access_token="+g.opaque(accountID, crmKey)+"&openid=oABCDEFGHIJKLMNOPQRSTUVWXYZ&lang=zh_CN", nil),
	}
	calls["bearer"].Header.Set("Authorization", "Bearer "+crmKey)
	for _, r := range calls {
		r.Header.Set("User-Agent", "sdk/1")
		r.Header.Set("Accept", "*/*")
	}
	return calls
}

// admitCall is what the handler does with a call before it passes it on.
func admitCall(tb testing.TB, g *gateway, r *http.Request) {
	req := &apiRequest{Request: r}
	if refused := g.api.read(req); refused != nil {
		tb.Fatal(refused.msg)
	}
	call, refused := g.api.admit(req)
	if refused != nil {
		tb.Fatal(refused.msg)
	}
	call.header = outboundHeader(r.Header)
}

func BenchmarkTransportRequest(b *testing.B) {
	request := transportRequest(b)
	b.ReportAllocs()
	for b.Loop() {
		request()
	}
}

// transportRequest is what the transport makes of a call before it sends it.
func transportRequest(tb testing.TB) func() {
	q, err := splitQuery("openid=oABCDEFGHIJKLMNOPQRSTUVWXYZ&lang=zh_CN")
	if err != nil {
		tb.Fatal(err)
	}
	call := &apiCall{key: tokens.AccountKey(accountID), param: paramAccess, path: "/cgi-bin/user/info", query: q, header: http.Header{}}
	token := secret.New("57_abcdefghijklmnopqrstuvwxyz0123456789abcdefghijklmnopqrstuvwxyz0123456789abcdefghijklmnopqrstuvwxyz0123456789")
	origin := &url.URL{Scheme: "https", Host: "api.weixin.qq.com"}
	return func() {
		call.first = url.URL{} // as in a call that has not been sent yet
		call.request(tb.Context(), http.MethodGet, origin, token, nil)
	}
}

func BenchmarkScanErrcode(b *testing.B) {
	body := []byte(`{"subscribe":1,"openid":"oABCDEFGHIJKLMNOPQRSTUVWXYZ","nickname":"someone","sex":0,"language":"zh_CN","city":"","errcode":0}`)
	b.ReportAllocs()
	for b.Loop() {
		if _, found := scanErrcode(body); !found {
			b.Fatal("not found")
		}
	}
}
