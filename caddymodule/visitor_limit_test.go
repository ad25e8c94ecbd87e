package caddymodule

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap/zaptest/observer"
)

// TestRefusalsNameTheVisitor: behind a proxy that Caddy trusts, the log names who came, as Caddy's access log does, and not the proxy alone.
func TestRefusalsNameTheVisitor(t *testing.T) {
	g := newGateway(t, newFakeWeChat(t), "", "")
	m, app := newMessage(t, nil)
	pushes := watchLog(app)
	for _, c := range []struct{ remote, forwarded, want string }{
		{"10.1.2.3:4567", "203.0.113.9", "203.0.113.9"},
		{"10.1.2.3:4567", "", "10.1.2.3"},
		{"@", "@", "@"}, // of a Unix socket that Caddy trusts
		{"@", "", ""},   // of one that it does not
	} {
		for _, h := range []struct {
			caddyhttp.MiddlewareHandler
			logs    *observer.ObservedLogs
			message string
		}{{m, pushes, "push refused"}, {g.api, g.logs, "call refused"}} {
			r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/wx/message/"+authorizerID, strings.NewReader("<xml></xml>"))
			r.RemoteAddr = c.remote
			rec := httptest.NewRecorder()
			r = caddyhttp.PrepareRequest(r, caddy.NewReplacer(), rec, &caddyhttp.Server{})
			if c.forwarded != "" {
				caddyhttp.SetVar(r.Context(), caddyhttp.ClientIPVarKey, c.forwarded)
			}
			if err := h.ServeHTTP(rec, r, caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { return io.EOF })); err != nil {
				t.Fatal(err)
			}
			found := h.logs.FilterMessage(h.message).TakeAll()
			h.logs.TakeAll()
			if len(found) != 1 || found[0].ContextMap()["client_ip"] != c.want || found[0].ContextMap()["remote"] != r.RemoteAddr {
				t.Errorf("%s, from %s, forwarded for %q: the log says %v, want client_ip %q", h.message, c.remote, c.forwarded, found, c.want)
			}
		}
	}
}
