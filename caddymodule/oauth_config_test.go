package caddymodule

import (
	"encoding/json"
	"net/url"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
)

func TestCheckPrefix(t *testing.T) {
	t.Parallel()
	tests := []struct{ prefix, wantErr string }{
		{"http://wechat.example.com/webVerify/", ""},
		{"https://shop.example.com/scan?from=wechat", ""},
		{"https://shop.example.com:8443", ""},
		{"https://[2001:db8::1]:8443/x", ""},
		{"https://shop.example.com/a%20b?c=%E4%B8%AD", ""},
		{"HTTPS://shop.example.com/", ""},
		{"/scan", "relative redirect target"},
		{"scan", "relative redirect target"},
		{"//evil.example/scan", "relative redirect target"},
		{"", "relative redirect target"},
		{"https:shop.example.com", "relative redirect target"},
		{"https:///scan", "no host"},
		{"https://:443/scan", "no host"},
		{"ftp://shop.example.com/", "the scheme 'ftp'"},
		{"data:text/html,x", "relative redirect target"},
		{"data://x/text", "the scheme 'data'"},
		{"javascript://x/%0aalert(1)", "the scheme 'javascript'"},
		{"https://user@shop.example.com/", "user name"},
		{"https://user:pass@shop.example.com/", "user name"},
		{"https://shop.example.com/#home", "fragment"},
		{"https://shop.example.com/#", "fragment"},
		{`https://shop.example.com\.evil.example/`, "percent-encoded"},
		{"https://shop.example.com/a b", "percent-encoded"},
		{"https://shop.example.com/\r\nSet-Cookie:x=1", "percent-encoded"},
		{"https://shop.example.com/\t", "percent-encoded"},
		{"https://shop\u3002example.com/", "percent-encoded"},
		{"https://shop.example.com\u2044evil.example/", "percent-encoded"},
		{"https://shop.example.com%2eevil.example/", "not a URL"},
		{"https://%zz/", "not a URL"},
	}
	for _, tt := range tests {
		t.Run(tt.prefix, func(t *testing.T) {
			t.Parallel()
			err := checkPrefix(tt.prefix)
			if tt.wantErr == "" && err != nil || tt.wantErr != "" && (err == nil || !strings.Contains(err.Error(), tt.wantErr)) {
				t.Errorf("err = %v, want %q", err, tt.wantErr)
			}
		})
	}
}

func TestFuncTarget(t *testing.T) {
	t.Parallel()
	tests := []struct{ name, prefix, state, want string }{
		{"from the contract", "http://wechat.example.com/webVerify/", "scan", "http://wechat.example.com/webVerify/?wxTkId=ID#scan"},
		{"has a query", "https://h.example/scan?from=wechat", "s", "https://h.example/scan?from=wechat&wxTkId=ID#s"},
		{"ready for a query", "https://h.example/scan?", "s", "https://h.example/scan?wxTkId=ID#s"},
		{"ready for more", "https://h.example/scan?a=b&", "s", "https://h.example/scan?a=b&wxTkId=ID#s"},
		{"host alone", "https://h.example", "s", "https://h.example?wxTkId=ID#s"},
		{"no state", "https://h.example/", "", "https://h.example/?wxTkId=ID#"},
		{"header injection", "https://h.example/", "a\r\nSet-Cookie: x=1", "https://h.example/?wxTkId=ID#a%0D%0ASet-Cookie:%20x=1"},
		{"quotes and tags", "https://h.example/", `"'><script>`, "https://h.example/?wxTkId=ID#%22%27%3E%3Cscript%3E"},
		{"path-like", "https://h.example/", "/home?x=1#y", "https://h.example/?wxTkId=ID#%2Fhome%3Fx=1%23y"},
		{"already escaped", "https://h.example/", "a%0d", "https://h.example/?wxTkId=ID#a%250d"},
		{"chinese", "https://h.example/", "扫", "https://h.example/?wxTkId=ID#%E6%89%AB"},
		{"not UTF-8, NUL", "https://h.example/", "\xff\x00", "https://h.example/?wxTkId=ID#%FF%00"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			f := &Func{Key: "a", Prefix: tt.prefix}
			if err := f.provision(resolver{repl: caddy.NewReplacer()}); err != nil {
				t.Fatal(err)
			}
			got := f.target("ID", tt.state)
			if got != tt.want {
				t.Errorf("target %q, want %q", got, tt.want)
			}
			u, err := url.Parse(got)
			if err != nil || u.Query().Get("wxTkId") != "ID" || u.Fragment != tt.state {
				t.Errorf("a browser reads id %q and state %q (%v)", u.Query().Get("wxTkId"), u.Fragment, err)
			}
		})
	}
}

func TestValidScope(t *testing.T) {
	t.Parallel()
	for scope, want := range map[string]bool{
		"snsapi_base": true, "snsapi_userinfo": true, "snsapi_privateinfo": true, "snsapi_base,snsapi_userinfo": true,
		"": false, "snsapi_login": false, "snsapi_base,": false, "snsapi_base,snsapi_base": false, "snsapi_base snsapi_userinfo": false,
		"SNSAPI_BASE": false, "snsapi_base&x=1": false,
	} {
		if got := validScope(scope); got != want {
			t.Errorf("validScope(%q) = %v", scope, got)
		}
	}
}

func TestCheckRedirectOrigin(t *testing.T) {
	t.Parallel()
	for origin, want := range map[string]bool{
		"https://wx.example.com": true, "http://127.0.0.1:8080": true, "https://[::1]:8443": true,
		"https://wx.example.com/": false, "https://wx.example.com/x": false, "wx.example.com": false, "//wx.example.com": false,
		"https://": false, "https://u@wx.example.com": false, "https://wx.example.com?": false, "https://wx.example.com#": false,
		"ftp://wx.example.com": false, "https://wx.example.com:": false, "https://a\nb": false, "": false,
	} {
		if err := checkRedirectOrigin(origin); (err == nil) != want {
			t.Errorf("checkRedirectOrigin(%q) = %v", origin, err)
		}
	}
}

const oneFunc = `"funcs":[{"key":"a","prefix":"https://a.example.com/"}]`

// The same mistakes as in a Caddyfile, and those that placeholders hide, by way of JSON.
func TestOAuthBadConfig(t *testing.T) {
	t.Setenv("WECHAT_OAUTH_TEST_RELATIVE", "/relative")
	t.Setenv("WECHAT_OAUTH_TEST_PATH", "https://wx.example.com/path")
	one := `{"platforms":[` + platformJSON(platformID) + `],"api":["http://127.0.0.1:1"]}`
	none := `{"accounts":[{"appid":"` + accountID + `","secret":"s"}],"api":["http://127.0.0.1:1"]}`
	tests := []struct{ name, app, config, wantErr string }{
		{"complete", one, `{"base":"/wx","callback":"/cb",` + oneFunc + `}`, ""},
		{"no app", "", `{"base":"/wx",` + oneFunc + `}`, "needs the global option wechat"},
		{"no base", one, `{` + oneFunc + `}`, "base is missing"},
		{"base with a star", one, `{"base":"/wx/*",` + oneFunc + `}`, "a base is a path, not a matcher"},
		{"base with a placeholder", one, `{"base":"/{env.X}",` + oneFunc + `}`, "not a plain path"},
		{"callback below the base", one, `{"base":"/wx","callback":"/wx/cb",` + oneFunc + `}`, ""},
		{"callback beside authorize", one, `{"base":"/wx","callback":"/wx/authorized",` + oneFunc + `}`, ""},
		{"callback where logins begin", one, `{"base":"/wx/","callback":"/wx/authorize",` + oneFunc + `}`, "give a path of its own"},
		{"callback below that", one, `{"base":"/wx","callback":"/wx/authorize/a/",` + oneFunc + `}`, "give a path of its own"},
		{"callback where the others are", one, `{"base":"/","callback":"/authUserReceive/",` + oneFunc + `}`, "give a path of its own"},
		{"callback at the root", one, `{"base":"/wx","callback":"/",` + oneFunc + `}`, "every path"},
		{"no func", one, `{"base":"/wx"}`, "no func"},
		{"null func", one, `{"base":"/wx","funcs":[null]}`, "no func"},
		{"func twice", one, `{"base":"/wx","funcs":[{"key":"a","prefix":"https://a.example.com/"},{"key":"a","prefix":"https://b.example.com/"}]}`, "func a: this key is configured twice"},
		{"func without a key", one, `{"base":"/wx","funcs":[{"prefix":"https://a.example.com/"}]}`, "is not a funcKey"},
		{"func without a prefix", one, `{"base":"/wx","funcs":[{"key":"a"}]}`, "func a: prefix is missing"},
		{"relative target", one, `{"base":"/wx","funcs":[{"key":"a","prefix":"/x"}]}`, "func a: relative redirect target '/x'"},
		{"hidden relative target", one, `{"base":"/wx","funcs":[{"key":"a","prefix":"{env.WECHAT_OAUTH_TEST_RELATIVE}"}]}`, "func a: relative redirect target '/relative'"},
		{"target of nothing", one, `{"base":"/wx","funcs":[{"key":"a","prefix":"{env.WECHAT_NO_SUCH_VARIABLE}/x"}]}`, "func a: prefix: {env.WECHAT_NO_SUCH_VARIABLE} resolves to nothing"},
		{"hidden origin with a path", one, `{"base":"/wx","origin":"{env.WECHAT_OAUTH_TEST_PATH}",` + oneFunc + `}`, "origin 'https://wx.example.com/path' is not a scheme and host alone"},
		{"origin of nothing", one, `{"base":"/wx","origin":"{env.WECHAT_NO_SUCH_VARIABLE}",` + oneFunc + `}`, "origin: {env.WECHAT_NO_SUCH_VARIABLE} resolves to nothing"},
		{"scope", one, `{"base":"/wx","funcs":[{"key":"a","prefix":"https://a.example.com/","scope":"x"}]}`, "func a: unknown scope 'x'"},
		{"appids", one, `{"base":"/wx","funcs":[{"key":"a","prefix":"https://a.example.com/","appids":["*"]}]}`, "func a: appids: '*' is not an appid"},
		{"ttl", one, `{"base":"/wx","funcs":[{"key":"a","prefix":"https://a.example.com/","ttl":-1}]}`, "func a: ttl must not be negative"},
		{"redirect_status", one, `{"base":"/wx","funcs":[{"key":"a","prefix":"https://a.example.com/","redirect_status":200}]}`, "func a: redirect_status 200 is no redirect"},
		{"any number of bad codes", one, `{"base":"/wx","bad_codes":-1,` + oneFunc + `}`, ""},
		{"bad_codes", one, `{"base":"/wx","bad_codes":-2,` + oneFunc + `}`, "bad_codes: want a number from 1 to 100000, or -1"},
		{"too many bad_codes", one, `{"base":"/wx","bad_codes":100001,` + oneFunc + `}`, "bad_codes: want a number from 1 to 100000, or -1"},
		{"max_in_flight", one, `{"base":"/wx","max_in_flight":-1,` + oneFunc + `}`, "max_in_flight: want a number from 1 to 1000000"},
		{"unknown platform", one, `{"base":"/wx","platform":"` + strangerID + `",` + oneFunc + `}`, "platform '" + strangerID + "' is not configured"},
		{"callback without a platform", none, `{"base":"/wx","callback":"/cb",` + oneFunc + `}`, "callback needs a platform"},
		{"callback with several platforms", testConfig(""), `{"base":"/wx","callback":"/cb",` + oneFunc + `}`, "there are several platforms"},
		{"unknown field", one, `{"base":"/wx","redirect":"https://evil.example",` + oneFunc + `}`, "unknown field"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var ctx caddy.Context
			var err error
			if tt.app == "" {
				ctx, err = caddy.ProvisionContext(&caddy.Config{Admin: &caddy.AdminConfig{Disabled: true}})
				if err != nil {
					t.Fatal(err)
				}
			} else {
				_, ctx = newTestApp(t, tt.app)
			}
			_, err = ctx.LoadModuleByID("http.handlers.wechat_oauth", json.RawMessage(tt.config))
			if tt.wantErr == "" && err != nil || tt.wantErr != "" && (err == nil || !strings.Contains(err.Error(), tt.wantErr)) {
				t.Errorf("err = %v, want %q in it", err, tt.wantErr)
			}
		})
	}
}

func platformJSON(appid string) string {
	return `{"appid":"` + appid + `","secret":"platform-secret","tokens":["` + platformToken + `"],"aes_keys":["` + platformKey + `"]}`
}
