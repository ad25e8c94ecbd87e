package caddymodule

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddytls"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// confirmingWeChat answers what a platform needs to hold one authorizer, and gives the confirm files of web-view domains.
func confirmingWeChat(t testing.TB) *httptest.Server {
	t.Helper()
	answers := map[string]any{
		"/cgi-bin/component/api_component_token": map[string]any{"component_access_token": "component-access", "expires_in": 7200},
		"/cgi-bin/component/api_query_auth": map[string]any{"authorization_info": map[string]any{
			"authorizer_appid": authorizerID, "authorizer_access_token": "authorizer-access", "expires_in": 7200,
			"authorizer_refresh_token": "authorizer-refresh", "func_info": []any{map[string]any{"funcscope_category": map[string]int{"id": 18}}},
		}},
		"/cgi-bin/component/get_domain_confirmfile": map[string]any{"errcode": 0, "errmsg": "ok", "file_name": platformFile, "file_content": "of the platform"},
		"/wxa/get_webviewdomain_confirmfile":        map[string]any{"errcode": 0, "errmsg": "ok", "file_name": authorizerFile, "file_content": "of the authorizer"},
	}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer, ok := answers[r.URL.Path]
		if !ok {
			answer = map[string]any{"errcode": -1, "errmsg": "system error"} // to what is not of interest here
		}
		_ = json.NewEncoder(w).Encode(answer)
	}))
	t.Cleanup(srv.Close)
	return srv
}

const (
	platformFile   = "87PweoaRBw.txt"
	authorizerFile = "b1C2d3E4f5.txt"
)

// onePlatform is a configuration with one platform.
func onePlatform(api string) string {
	return fmt.Sprintf(`{
		"platforms": [{"appid": %q, "secret": "platform-secret", "tokens": [%q], "aes_keys": [%q]}],
		"accounts": [{"appid": %q, "secret": "account-secret"}],
		"api": [%q]
	}`, platformID, platformToken, platformKey, accountID, api)
}

// authorizedApp is an app whose one platform holds the authorizer.
func authorizedApp(t testing.TB) (*App, caddy.Context) {
	t.Helper()
	app, ctx := newTestApp(t, onePlatform(confirmingWeChat(t).URL))
	err := app.manager().PutTicket(t.Context(), platformID, tokens.Ticket{Value: secret.New("ticket"), CreatedAt: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := app.manager().ExchangeAuthCode(t.Context(), platformID, authorizerID, secret.New("code")); err != nil {
		t.Fatal(err)
	}
	return app, ctx
}

func newPermission(t *testing.T, ctx caddy.Context, suffix string) *Permission {
	t.Helper()
	p := &Permission{Suffix: suffix}
	if err := p.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	if err := p.Validate(); err != nil {
		t.Fatal(err)
	}
	return p
}

// loads is how often the store was read, by the metric that operators see.
func loads(t *testing.T, app *App) uint64 {
	t.Helper()
	registry := prometheus.NewPedanticRegistry()
	if err := app.metrics().register(registry); err != nil {
		t.Fatal(err)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "caddy_wechat_store_operation_duration_seconds" {
			continue
		}
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if l.GetName() == "op" && l.GetValue() == "load" {
					return m.GetHistogram().GetSampleCount()
				}
			}
		}
	}
	return 0
}

func TestPermission(t *testing.T) {
	t.Parallel()
	app, ctx := authorizedApp(t)
	p := newPermission(t, ctx, "WX.example.com")
	for _, name := range []string{authorizerID + ".wx.example.com", strings.ToUpper(authorizerID) + ".Wx.Example.COM"} {
		if err := p.CertificateAllowed(t.Context(), name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	before := loads(t, app)
	for _, name := range []string{
		"wx.example.com", ".wx.example.com", "", "example.com", authorizerID, authorizerID + ".", authorizerID + ".example.com",
		authorizerID + ".evil.example", authorizerID + ".wx.example.com.evil.example", authorizerID + ".wx.example.com.",
		authorizerID + ".xwx.example.com", authorizerID + "wx.example.com", "www." + authorizerID + ".wx.example.com",
		authorizerID + "." + authorizerID + ".wx.example.com", "x" + authorizerID + ".wx.example.com", authorizerID + "0.wx.example.com",
		authorizerID[:17] + ".wx.example.com", "wx333333333333333g.wx.example.com", "*.wx.example.com", "192.0.2.1",
		authorizerID + "\x00.wx.example.com", " " + authorizerID + ".wx.example.com",
	} {
		if err := p.CertificateAllowed(t.Context(), name); !errors.Is(err, caddytls.ErrPermissionDenied) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if after := loads(t, app); after != before {
		t.Errorf("names of another shape cost %d reads of the store", after-before)
	}
	for _, appid := range []string{strangerID, accountID, platformID} {
		if err := p.CertificateAllowed(t.Context(), appid+".wx.example.com"); !errors.Is(err, caddytls.ErrPermissionDenied) {
			t.Errorf("%s: %v", appid, err)
		}
	}
	if err := app.manager().Revoke(t.Context(), platformID, authorizerID, time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if err := p.CertificateAllowed(t.Context(), authorizerID+".wx.example.com"); !errors.Is(err, caddytls.ErrPermissionDenied) {
		t.Errorf("an account that has just taken its authorization back: %v", err)
	}
}

// A flood of accounts that nobody knows costs the store no more than the bound; beyond it, it cannot be told, which is
// another answer than no, and an account in use is answered as before.
func TestPermissionFlood(t *testing.T) {
	t.Parallel()
	app, ctx := authorizedApp(t)
	p := newPermission(t, ctx, "wx.example.com")
	before, start := loads(t, app), time.Now()
	denied, untold := 0, 0
	for n := range 5000 {
		err := p.CertificateAllowed(t.Context(), fmt.Sprintf("wx%016x.wx.example.com", n))
		switch {
		case errors.Is(err, caddytls.ErrPermissionDenied):
			denied++
		case errors.Is(err, tokens.ErrTooMany):
			untold++
		default:
			t.Fatalf("name %d: %v", n, err)
		}
	}
	bound := 200 + 100*(time.Since(start).Seconds()+1)
	if n := loads(t, app) - before; float64(n) > bound || int(n) < denied {
		t.Errorf("%d reads of the store for %d names, the bound is %.0f", n, denied, bound)
	}
	if untold == 0 {
		t.Error("nothing was held back")
	}
	if err := p.CertificateAllowed(t.Context(), authorizerID+".wx.example.com"); err != nil {
		t.Errorf("an account in use: %v", err)
	}
}

// A store that does not answer makes it impossible to tell, and that is not a no.
func TestPermissionCannotTell(t *testing.T) {
	t.Parallel()
	app, ctx := newTestApp(t, onePlatform("http://127.0.0.1:1"))
	p := newPermission(t, ctx, "wx.example.com")
	app.manager().Close()
	if err := p.CertificateAllowed(t.Context(), authorizerID+".wx.example.com"); err == nil || errors.Is(err, caddytls.ErrPermissionDenied) {
		t.Errorf("err = %v", err)
	}
}

func TestPermissionBadConfig(t *testing.T) {
	t.Parallel()
	_, ctx := newTestApp(t, onePlatform("http://127.0.0.1:1"))
	_, without := newTestApp(t, `{}`)
	bare, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	t.Cleanup(cancel)
	for _, tt := range []struct {
		name, suffix, want string
		ctx                caddy.Context
	}{
		{"nothing", "", "suffix", ctx},
		{"a wildcard", "*.wx.example.com", "write the domain alone", ctx},
		{"a placeholder for nothing", "{env.WECHAT_NO_SUCH_SUFFIX}", "resolves to nothing", ctx},
		{"a brace", "wx.{example.com", "is not a domain", ctx},
		{"an address", "2001:db8::1", "is not a domain", ctx},
		{"too long", strings.Repeat("abcdefghi.", 24) + "com", "is not a domain", ctx},
		{"one letter too long", strings.Repeat("abcdefghi.", 23) + "local", "is not a domain", ctx},
		{"an empty label", "wx..example.com", "is not a domain", ctx},
		{"a final dot", "wx.example.com.", "is not a domain", ctx},
		{"no app", "wx.example.com", "needs the global option wechat", bare},
		{"no platform", "wx.example.com", "no platform", without},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := &Permission{Suffix: tt.suffix}
			err := p.Provision(tt.ctx)
			if err == nil {
				err = p.Validate()
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("err = %v, want %q in it", err, tt.want)
			}
		})
	}
}

// TestPermissionSuffix: the longest suffix leaves room for an appid in a name of DNS, and a placeholder is resolved later.
func TestPermissionSuffix(t *testing.T) {
	t.Parallel()
	longest := strings.Repeat("abcdefghi.", 23) + "host"
	if n := len(authorizerID + "." + longest); n != 253 {
		t.Fatalf("a name of %d letters", n)
	}
	for _, suffix := range []string{longest, "{env.WECHAT_SUFFIX}"} {
		p := new(Permission)
		if err := p.UnmarshalCaddyfile(caddyfile.NewTestDispenser("wechat " + suffix)); err != nil || p.Suffix != suffix {
			t.Errorf("%q: %v", p.Suffix, err)
		}
	}
}

// The module works from JSON, in the place where Caddy has it.
func TestPermissionFromJSON(t *testing.T) {
	t.Parallel()
	_, ctx := newTestApp(t, onePlatform("http://127.0.0.1:1"))
	v, err := ctx.LoadModule(&caddytls.OnDemandConfig{PermissionRaw: json.RawMessage(`{"module":"wechat","suffix":"wx.example.com"}`)}, "PermissionRaw")
	if err != nil {
		t.Fatal(err)
	}
	if p, ok := v.(caddytls.OnDemandPermission); !ok || !errors.Is(p.CertificateAllowed(t.Context(), "wx.example.com"), caddytls.ErrPermissionDenied) {
		t.Errorf("a %T", v)
	}
}
