package integration_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// jsonGateway is a gateway that is driven by JSON over its admin endpoint alone.
type jsonGateway struct {
	t                            *testing.T
	gateway                      *integration.Gateway
	wechat                       *wxsim.Server
	backend                      *httptest.Server
	client                       *http.Client
	public, api, console, second string // where its servers listen
}

const (
	jsonPlatform   = "wx1111111111111111"
	jsonAccount    = "wx2222222222222222"
	jsonAuthorizer = "wx3333333333333333"
	jsonAESKey     = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEFG"
	jsonClientKey  = "0123456789abcdef0123456789abcdef"
)

func newJSONGateway(t *testing.T) *jsonGateway {
	t.Helper()
	client := *plainClient
	client.Transport = unread{plainClient.Transport}
	g := &jsonGateway{t: t, client: &client}
	var addrs []string
	for range 5 {
		addr, err := integration.FreeAddr("")
		if err != nil {
			t.Fatal(err)
		}
		addrs = append(addrs, addr)
	}
	g.public, g.api, g.console, g.second = addrs[1], addrs[2], addrs[3], addrs[4]
	g.wechat = wxsim.New(wxsim.Config{
		Platforms: []wxsim.Platform{{
			AppID: jsonPlatform, Secret: "platformsecret01", Token: "platformtoken", AESKey: jsonAESKey, AuthorizeHost: g.public,
		}},
		Accounts:   []wxsim.Account{{AppID: jsonAccount, Secret: "accountsecret001", Token: "accounttoken", AESKey: jsonAESKey}},
		OAuthHosts: []string{g.public}, Faults: wxsim.Faults{Polite: true}, Seed: 1,
	})
	if err := g.wechat.Start("127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.wechat.Close)
	g.wechat.SetURLs(jsonPlatform, "http://"+g.public+"/wx/event", "http://"+g.public+"/wx/message/$APPID$")
	g.wechat.SetMessageURL(jsonAccount, "http://"+g.second+"/shop")
	g.backend = httptest.NewServer(http.HandlerFunc(integration.Echo))
	t.Cleanup(g.backend.Close)

	dir := t.TempDir()
	caddyfile := filepath.Join(dir, "Caddyfile")
	if err := os.WriteFile(caddyfile, []byte("{\n\tadmin "+addrs[0]+"\n}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	g.gateway = &integration.Gateway{Binary: binary, Dir: dir, Caddyfile: caddyfile, Admin: addrs[0]}
	if err := g.gateway.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.gateway.Stop(); err != nil {
			t.Error(err)
		}
	})
	return g
}

// admin sends a request to the admin endpoint.
func (g *jsonGateway) admin(method, path, body string) (int, string) {
	g.t.Helper()
	resp, text := fetch(g.t, g.client, method, "http://"+g.gateway.Admin+path, http.Header{"Content-Type": {"application/json"}}, body)
	return resp.StatusCode, text
}

// unread sends a request once more whose connection Caddy closed without having read it, as it does at the moment of a reload with all that
// have just come. Whatever was answered is not repeated.
type unread struct{ http.RoundTripper }

func (u unread) RoundTrip(r *http.Request) (*http.Response, error) {
	for tries := 1; ; tries++ {
		resp, err := u.RoundTripper.RoundTrip(r)
		closed := errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
		if !closed || tries == 3 {
			return resp, err
		}
		if r.GetBody != nil {
			if r.Body, err = r.GetBody(); err != nil {
				return nil, err
			}
		}
	}
}

// change is admin for what must work.
func (g *jsonGateway) change(method, path, body string) {
	g.t.Helper()
	if status, text := g.admin(method, path, body); status != http.StatusOK {
		g.t.Fatalf("%s %s: %d %s", method, path, status, text)
	}
}

// get gets a path of a server.
func (g *jsonGateway) get(server, path string, header http.Header) (*http.Response, string) {
	g.t.Helper()
	return fetch(g.t, g.client, http.MethodGet, "http://"+server+path, header, "")
}

// config is what somebody writes who knows the modules' comments alone: handlers in an order of their own, one in two settings, a
// named route, subroutes, and routes for errors.
func (g *jsonGateway) config() string {
	backend := strings.TrimPrefix(g.backend.URL, "http://")
	return fmt.Sprintf(`{
	"admin": {"listen": %q},
	"apps": {
		"wechat": {
			"@id": "wechat",
			"platforms": [{"appid": "wx1111111111111111", "secret": "platformsecret01", "tokens": ["platformtoken"], "aes_keys": [%[2]q]}],
			"accounts": [{"appid": "wx2222222222222222", "secret": "accountsecret001", "tokens": ["accounttoken"], "aes_keys": [%[2]q]}],
			"clients": [{"name": "crm", "keys": ["0123456789abcdef0123456789abcdef"], "appids": ["*"]}],
			"api": [%[3]q],
			"open": %[3]q
		},
		"http": {"servers": {
			"public": {
				"listen": [%[4]q],
				"routes": [
					{"@id": "logins", "handle": [{
						"handler": "wechat_oauth", "base": "/wx/thirdParty",
						"funcs": [{"key": "scan", "prefix": "https://shop.example.com/scan?from=wechat"}]
					}]},
					{"handle": [{"handler": "wechat_oauth", "@id": "others", "base": "/other", "origin": "http://%[4]s", "require_start": true, "funcs": [{"key": "scan", "prefix": "https://other.example.com/", "once": true}]}]},
					{"handle": [
						{"handler": "wechat_jssdk", "base": "/wx/jssdk", "hosts": ["shop.example.com"]},
						{"handler": "wechat_authorize", "base": "/wx/authorize", "origin": "http://%[4]s"},
						{"handler": "wechat_verify", "files": {"MP_verify_a1B2c3D4e5F6g7H8.txt": "a1B2c3D4e5F6g7H8"}}
					]},
					{"match": [{"path": ["/wx/message/*"]}], "handle": [{"handler": "invoke", "name": "push"}]},
					{"match": [{"path": ["/wx/event"]}], "handle": [{"handler": "wechat_event", "@id": "events"}]},
					{"match": [{"path": ["/ready"]}], "handle": [{"handler": "wechat_ready"}]},
					{"handle": [{"handler": "error", "status_code": 404}]}
				],
				"named_routes": {"push": {"handle": [
					{"handler": "wechat_message", "@id": "messages"},
					{"handler": "subroute", "routes": [
						{
							"match": [{"wechat_message": {"event": ["LOCATION"]}}],
							"handle": [{"handler": "static_response", "body": "success"}],
							"terminal": true
						},
						{"handle": [{"handler": "reverse_proxy", "upstreams": [{"dial": %[5]q}], "transport": {"protocol": "wechat_lean"}}]}
					]}
				]}},
				"errors": {"routes": [{"handle": [{"handler": "static_response", "body": "error {http.error.status_code}"}]}]}
			},
			"second": {
				"listen": [%[6]q],
				"routes": [{"handle": [
					{"handler": "wechat_message", "appid": "wx2222222222222222", "reply_timeout": "4s", "fallback_text": "later"},
					{"handler": "reverse_proxy", "upstreams": [{"dial": %[5]q}]}
				]}]
			},
			"api": {"listen": [%[7]q], "routes": [{"handle": [{"handler": "wechat_api"}]}]},
			"console": {"listen": [%[8]q], "routes": [{"handle": [{"handler": "wechat_console"}]}]}
		}}
	}
}`, g.gateway.Admin, jsonAESKey, g.wechat.URL(), g.public, backend, g.second, g.api, g.console)
}

// user asks WeChat for a user of an account, through the gateway.
func (g *jsonGateway) user(appid string) error {
	u := g.wechat.NewUser(appid)
	resp, body := g.get(g.api, "/"+appid+"/cgi-bin/user/info?openid="+u.OpenID, http.Header{"Authorization": {"Bearer " + jsonClientKey}})
	if !strings.Contains(body, u.OpenID) {
		return fmt.Errorf("%d %s", resp.StatusCode, body)
	}
	return nil
}

// login goes through WeChat's page to where a func leads.
func (g *jsonGateway) login(base, appid string) string {
	g.t.Helper()
	start, body := g.get(g.public, base+"/authorize/"+appid+"/scan?state=s1", nil)
	callback, err := g.wechat.Visit(start.Header.Get("Location"), wxsim.User{})
	if err != nil {
		g.t.Fatalf("%s: %d %s: %v", base, start.StatusCode, body, err)
	}
	u, err := url.Parse(callback)
	if err != nil {
		g.t.Fatal(err)
	}
	header := http.Header{}
	for _, c := range start.Cookies() {
		header.Add("Cookie", c.Name+"="+c.Value)
	}
	end, body := g.get(u.Host, u.RequestURI(), header)
	if end.StatusCode != http.StatusFound {
		g.t.Fatalf("%s: %d %s", base, end.StatusCode, body)
	}
	return end.Header.Get("Location")
}

// serves checks that each handler does its job.
func (g *jsonGateway) serves() {
	g.t.Helper()
	ctx := g.t.Context()
	for _, m := range []wxsim.Message{
		{Platform: jsonPlatform, AppID: jsonAuthorizer, Content: "hello"}, {AppID: jsonAccount, Content: "hello"},
	} {
		if got, err := g.wechat.PushMessage(ctx, m); err != nil || !got.OK() || !strings.Contains(got.UserSaw, "hello") {
			g.t.Errorf("message to %s: the user saw %q: %s %v", m.AppID, got.UserSaw, got.Wrong, err)
		}
	}
	if got, err := g.wechat.PushMessage(ctx, wxsim.Message{Platform: jsonPlatform, AppID: jsonAuthorizer, Event: "LOCATION"}); err != nil || !got.OK() || got.UserSaw != "" {
		g.t.Errorf("event: the user saw %q: %s %v", got.UserSaw, got.Wrong, err)
	}
	for _, appid := range []string{jsonAuthorizer, jsonAccount} {
		if err := g.user(appid); err != nil {
			g.t.Errorf("call for %s: %v", appid, err)
		}
		if at := g.login("/wx/thirdParty", appid); !strings.HasPrefix(at, "https://shop.example.com/scan?from=wechat&wxTkId=") || !strings.HasSuffix(at, "#s1") {
			g.t.Errorf("a login led to %s", at)
		}
		if at := g.login("/other", appid); !strings.HasPrefix(at, "https://other.example.com/?wxTkId=") {
			g.t.Errorf("the other login led to %s", at)
		}
		page := "https://shop.example.com/a?b=c"
		_, body := g.get(g.public, "/wx/jssdk/"+appid+"?url="+url.QueryEscape(page), nil)
		var signed struct {
			AppID, NonceStr, Signature string
			Timestamp                  json.Number
		}
		if err := json.Unmarshal([]byte(body), &signed); err != nil || !g.wechat.CheckJSSDK(appid, signed.NonceStr, signed.Timestamp.String(), page, signed.Signature) {
			g.t.Errorf("signature for %s: %s %v", appid, body, err)
		}
	}
	for _, want := range []struct {
		server, path string
		status       int
		text         string
	}{
		{g.public, "/MP_verify_a1B2c3D4e5F6g7H8.txt", http.StatusOK, "a1B2c3D4e5F6g7H8"},
		{g.public, "/MP_verify_0000000000000000.txt", http.StatusNotFound, "error 404"},
		{g.public, "/wx/authorize", http.StatusOK, "kind=pc"},
		{g.public, "/wx/authorize/elsewhere", http.StatusNotFound, "error 404"},
		{g.public, "/wx/thirdParty/elsewhere", http.StatusNotFound, "error 404"},
		{g.public, "/ready", http.StatusOK, ""},
		{g.console, "/", http.StatusOK, "<html"},
		{g.console, "/api/status", http.StatusOK, jsonPlatform},
	} {
		if resp, body := g.get(want.server, want.path, nil); resp.StatusCode != want.status || !strings.Contains(body, want.text) {
			g.t.Errorf("%s%s: %d %.300s", want.server, want.path, resp.StatusCode, body)
		}
	}
	if status, body := g.admin(http.MethodGet, "/wechat/funcs", ""); status != http.StatusOK || !strings.Contains(body, g.public+"/other/authorize/") || !strings.Contains(body, g.public+"/wx/authorize") {
		g.t.Errorf("funcs: %d %s", status, body)
	}
}

// TestByJSON: the gateway is set up by JSON alone, over the admin endpoint. Parts of the config are changed one by one as they can be
// with Caddy's own modules, and what the gateway has learned is there after each change.
func TestByJSON(t *testing.T) {
	t.Parallel()
	g := newJSONGateway(t)
	g.change(http.MethodPost, "/load", g.config())
	ctx := t.Context()
	if result, err := g.wechat.PushTicket(ctx, jsonPlatform); err != nil || !result.OK() {
		t.Fatalf("ticket: %s %v", result.Wrong, err)
	}
	if a, err := g.wechat.Authorize(ctx, jsonPlatform, jsonAuthorizer); err != nil || !a.Push.OK() {
		t.Fatalf("authorized: %s %v", a.Push.Wrong, err)
	}
	eventually(t, "the authorizer's tokens", func() error { return g.user(jsonAuthorizer) })
	g.serves()

	asked := func() (n int) {
		for _, path := range []string{"/cgi-bin/component/api_component_token", "/cgi-bin/component/api_authorizer_token", "/cgi-bin/stable_token"} {
			n += g.wechat.Journal().Count(path)
		}
		return n
	}
	before := asked()
	for _, c := range []struct{ name, method, path, body string }{
		{"a field", http.MethodPatch, "/id/messages", `{"handler": "wechat_message", "@id": "messages", "pushes": 2}`},
		{"a new field", http.MethodPut, "/id/events/timestamp_window", `"4m"`},
		{"null for a field", http.MethodPatch, "/id/events/timestamp_window", `null`},
		{"without the field", http.MethodDelete, "/id/events/timestamp_window", ``},
		{"a list", http.MethodPut, "/id/logins/handle/0/funcs/0", `{"key": "first", "prefix": "https://shop.example.com/first"}`},
		{"less of a list", http.MethodDelete, "/id/logins/handle/0/funcs/0", ``},
		{"an account more", http.MethodPost, "/config/apps/wechat/accounts", `{"appid": "wx4444444444444444", "secret": "anothersecret001"}`},
		{"an account less", http.MethodDelete, "/config/apps/wechat/accounts/1", ``},
		{"a client more", http.MethodPut, "/config/apps/wechat/clients/0", `{"name": "shop", "keys": ["fedcba9876543210fedcba9876543210"], "appids": ["*"]}`},
		{"the store by name", http.MethodPut, "/config/apps/wechat/store", `{"module": "caddy"}`},
		{"null for the store", http.MethodPatch, "/config/apps/wechat/store", `null`},
		{"no store", http.MethodDelete, "/config/apps/wechat/store", ``},
		{"null for a list", http.MethodPut, "/config/apps/wechat/seal_keys", `null`},
	} {
		g.change(c.method, c.path, c.body)
		if err := g.user(jsonAuthorizer); err != nil {
			t.Errorf("after %s: %v", c.name, err)
		}
	}
	g.serves()
	if n := asked() - before; n != 0 {
		t.Errorf("WeChat was asked for %d tokens after the changes", n)
	}

	for _, c := range []struct{ name, method, path, body, want string }{
		{"an unknown field", http.MethodPut, "/id/events/window", `"5m"`, `unknown field \"window\"`},
		{"the app gone", http.MethodDelete, "/config/apps/wechat", ``, "wechat"},
		{"the platforms gone", http.MethodDelete, "/config/apps/wechat/platforms", ``, "platform"},
		{"another store", http.MethodPut, "/config/apps/wechat/store", `{"module": "nowhere"}`, "nowhere"},
	} {
		if status, text := g.admin(c.method, c.path, c.body); status < http.StatusBadRequest || !strings.Contains(text, c.want) {
			t.Errorf("%s: %d %s", c.name, status, text)
		}
	}
	g.serves()

	// What comes to the wrong address finds its way through the named route.
	g.wechat.SetURLs(jsonPlatform, "http://"+g.public+"/wx/event", "http://"+g.public+"/wx/event")
	if got, err := g.wechat.PushMessage(ctx, wxsim.Message{Platform: jsonPlatform, AppID: jsonAuthorizer, Content: "astray"}); err != nil || !got.OK() || !strings.Contains(got.UserSaw, "astray") {
		t.Errorf("message to the event URL: the user saw %q: %s %v", got.UserSaw, got.Wrong, err)
	}

	file := filepath.Join(g.gateway.Dir, "caddy.json")
	if err := os.WriteFile(file, []byte(g.config()), 0o600); err != nil {
		t.Fatal(err)
	}
	for command, want := range map[string]string{
		"validate": "Valid configuration", "wechat doctor --offline": "loads: 1 platform, 1 account, 1 client", "wechat status": jsonPlatform,
	} {
		out, err := g.gateway.Command(ctx, append(strings.Fields(command), "--config", file)...)
		if !strings.Contains(out, want) || strings.Contains(out, "nothing gets to it") || err != nil && command != "wechat doctor --offline" {
			t.Errorf("%s: %v\n%s", command, err, out)
		}
	}

	g.change(http.MethodDelete, "/id/logins", "")
	if resp, body := g.get(g.public, "/wx/thirdParty/authorize/"+jsonAuthorizer+"/scan", nil); resp.StatusCode != http.StatusNotFound || body != "error 404" {
		t.Errorf("without the handler: %d %s", resp.StatusCode, body)
	}
	if v := g.wechat.Journal().Violations(); len(v) > 0 {
		t.Errorf("WeChat saw what it must not: %v", v)
	}
}
