package caddymodule

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
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

// TestVisitorsOfIPv4WithinIPv6: a translator of its provider's, or a tunnel, makes nobody share what is counted with all others behind it,
// and gives nobody more than one address's.
func TestVisitorsOfIPv4WithinIPv6(t *testing.T) {
	for _, c := range []struct{ remote, want string }{
		{"192.0.2.33", "192.0.2.33/32"},
		{"::ffff:192.0.2.33", "192.0.2.33/32"},
		{"2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"},
		{"64:ff9b::192.0.2.33", "192.0.2.33/32"},
		{"64:ff9b::1:192.0.2.33", "64:ff9b::/64"},                          // none of that network
		{"64:ff9b:1::192.0.2.33", "64:ff9b:1::192.0.2.33/128"},             // /96
		{"64:ff9b:1:c000:2:2100::", "64:ff9b:1:c000:2:2100::/128"},         // /48
		{"64:ff9b:2::192.0.2.33", "64:ff9b:2::/64"},                        // nobody's
		{"2001:0:4136:e378:8000:63bf:3fff:fdde", "192.0.2.33/32"},          // Teredo
		{"2001:1:4136:e378:8000:63bf:3fff:fdde", "2001:1:4136:e378::/64"},  // another of IETF's
		{"2002:c000:221:7:8::9", "192.0.2.33/32"},                          // 6to4
		{"64:ff9b::10.1.2.3", ""}, {"64:ff9b::127.0.0.1", ""}, {"::1", ""}, // not told by a proxy
	} {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.RemoteAddr = "[" + c.remote + "]:1234"
		want := netip.Prefix{}
		if c.want != "" {
			want = netip.MustParsePrefix(c.want)
		}
		if got := oneVisitorOf(r); got != want {
			t.Errorf("%s counts as %v, want %v", c.remote, got, want)
		}
		if got := visitorOf(r); c.want != "" && got != want {
			t.Errorf("%s counts as %v where all do, want %v", c.remote, got, want)
		}
	}
}

// TestNAT64IsNoLoopback: what stands for an address of this machine's is none, and nobody's that trust_loopback trusts.
// A private address that a trusted proxy tells is a visitor's.
func TestVisitorsOfPrivateNetworks(t *testing.T) {
	for told, want := range map[string]string{
		"10.1.2.3": "10.1.2.3/32", "64:ff9b::10.1.2.3": "10.1.2.3/32", "100.64.1.2": "100.64.1.2/32", "fd00:1:2:3::4": "fd00:1:2:3::/64",
	} {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.RemoteAddr = "10.0.0.1:1234"
		r = r.WithContext(context.WithValue(r.Context(), caddyhttp.VarsCtxKey, map[string]any{caddyhttp.ClientIPVarKey: told}))
		if got := oneVisitorOf(r); got != netip.MustParsePrefix(want) {
			t.Errorf("%s counts as %v, want %s", told, got, want)
		}
	}
}

func TestNAT64IsNoLoopback(t *testing.T) {
	for _, remote := range []string{"[64:ff9b::7f00:1]:1", "[2002:7f00:1::1]:1"} {
		r := httptest.NewRequest(http.MethodGet, "http://localhost/", nil)
		if r.RemoteAddr = remote; isTrustedLoopback(r) {
			t.Errorf("%s is trusted", remote)
		}
	}
}
