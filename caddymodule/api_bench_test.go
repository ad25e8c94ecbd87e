package caddymodule

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// The gateway's own work on a call, without Caddy's proxy and net/http. The target for both halves together is 2 µs of
// CPU, the gate 5 µs.

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
	return func() { call.request(tb.Context(), http.MethodGet, origin, token) }
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
