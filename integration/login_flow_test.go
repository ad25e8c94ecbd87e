package integration_test

import (
	"fmt"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// loginBrowser is a client of the https site that keeps cookies.
func loginBrowser(t *testing.T, w *integration.World) *http.Client {
	t.Helper()
	client := httpsClient(t, w)
	var err error
	if client.Jar, err = cookiejar.New(nil); err != nil {
		t.Fatal(err)
	}
	return client
}

// loginConfig is Caddyfile.example with another wechat_oauth.
func loginConfig(t *testing.T, oauth string) string {
	t.Helper()
	example, err := os.ReadFile("../Caddyfile.example")
	if err != nil {
		t.Fatal(err)
	}
	block := regexp.MustCompile(`(?s)\twechat_oauth /wx/thirdParty \{.*?\n\t\}\n`)
	if len(block.FindAll(example, -1)) != 1 {
		t.Fatal("Caddyfile.example has no wechat_oauth of the form that is looked for")
	}
	file := filepath.Join(t.TempDir(), "Caddyfile")
	if err := os.WriteFile(file, block.ReplaceAllLiteral(example, []byte(oauth)), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

const loginFuncs = `
		func verify {$WECHAT_WEB}/webVerify/
		func info {$WECHAT_WEB}/info?from=wechat {
			scope snsapi_base,snsapi_userinfo
			redirect_status 303
		}
		func private {$WECHAT_WEB}/private {
			scope snsapi_privateinfo
			appids wx2222222222222222
			once
		}
	}
`

// start has a browser begin a login, and WeChat send it back: the callback address.
func start(t *testing.T, w *integration.World, client *http.Client, path string, user wxsim.User) (callback string) {
	t.Helper()
	resp, page := fetch(t, client, http.MethodGet, w.URL(path), nil, "")
	link := resp.Header.Get("Location")
	callback, err := w.WeChat.Visit(link, user)
	if err != nil {
		t.Fatalf("%s: %d to %s: %v\n%s", path, resp.StatusCode, link, err, page)
	}
	return callback
}

// landed reads the tracking id and the state of a landing, which must be at that place.
func landed(t *testing.T, resp *http.Response, status int, prefix string) (trackingID, state string) {
	t.Helper()
	location := resp.Header.Get("Location")
	u, err := url.Parse(location)
	if err != nil || resp.StatusCode != status || !strings.Contains(location, prefix) {
		t.Fatalf("%d to %q, want %d to …%s…", resp.StatusCode, location, status, prefix)
	}
	return u.Query().Get("wxTkId"), u.Fragment
}

// TestLoginFlows brings users of an authorizer and of a plain account through logins that begin at the gateway, in each
// scope, with the process killed, restarted and reloaded on the way.
func TestLoginFlows(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(w *integration.World) {
		polite(w)
		w.Caddyfile = loginConfig(t, "\twechat_oauth /wx/thirdParty {\n\t\trequire_start"+loginFuncs+
			"\thandle_path /outer/* {\n\twechat_oauth /wx/inner {\n\t\trequire_start"+loginFuncs+"\t}\n")
		w.Env = append(w.Env, "WECHAT_LOG_LEVEL=INFO") // at level debug Caddy's handle_path logs each URI that it cuts
		w.Config.Lives.UserToken = 2 * time.Second     // ends between the login and the question about the profile
	})
	authorize(t, w)
	const state = `a b&wxTkId=x#/扫码"` // the app's own, of more than letters and digits
	between := map[string]func() error{
		"nothing": func() error { return nil },
		"reload":  func() error { return w.Gateway.Reload(t.Context()) },
		"kill": func() error {
			if err := w.Gateway.Kill(); err != nil {
				return err
			}
			if err := w.Gateway.Start(t.Context()); err != nil {
				return err
			}
			eventually(t, "its certificate is there again", func() error { // Caddy looks for it when it listens already
				resp, err := httpsClient(t, w).Get(w.URL("/"))
				if err == nil {
					_ = resp.Body.Close()
				}
				return err
			})
			return nil
		},
	}
	for _, tt := range []struct{ base, appid, funcKey, scope, between, place string }{
		{"/wx/thirdParty", integration.AuthorizerID, "verify", "snsapi_base", "nothing", "/webVerify/?wxTkId="},
		{"/wx/thirdParty", integration.AuthorizerID, "info", "snsapi_base,snsapi_userinfo", "reload", "/info?from=wechat&wxTkId="},
		{"/wx/thirdParty", integration.AccountID, "private", "snsapi_privateinfo", "kill", "/private?wxTkId="},
		{"/outer/wx/inner", integration.AuthorizerID, "info", "snsapi_base,snsapi_userinfo", "kill", "/info?from=wechat&wxTkId="},
		{"/outer/wx/inner", integration.AccountID, "verify", "snsapi_base", "reload", "/webVerify/?wxTkId="},
	} {
		t.Run(strings.Trim(strings.ReplaceAll(tt.base, "/", " "), " ")+" "+tt.appid+" "+tt.scope, func(t *testing.T) {
			client, user := loginBrowser(t, w), w.WeChat.NewUser(tt.appid)
			callback := start(t, w, client, tt.base+"/authorize/"+tt.appid+"/"+tt.funcKey+"?state="+url.QueryEscape(state), user)
			other := start(t, w, client, tt.base+"/authorize/"+tt.appid+"/"+tt.funcKey+"?state=tab2", user)
			if err := between[tt.between](); err != nil {
				t.Fatal(err)
			}
			if resp, _ := fetch(t, loginBrowser(t, w), http.MethodGet, callback, nil, ""); resp.StatusCode != http.StatusForbidden || resp.Header.Get("Location") != "" {
				t.Errorf("another browser: %d to %s", resp.StatusCode, resp.Header.Get("Location"))
			}
			status := http.StatusFound
			if tt.funcKey == "info" {
				status = http.StatusSeeOther
			}
			resp, _ := fetch(t, client, http.MethodGet, callback, nil, "")
			id, got := landed(t, resp, status, tt.place)
			if got != state {
				t.Errorf("state %q, want %q", got, state)
			}
			again, _ := fetch(t, client, http.MethodGet, callback, nil, "")
			if again.Header.Get("Location") != resp.Header.Get("Location") {
				t.Errorf("the same callback again: %d to %s", again.StatusCode, again.Header.Get("Location"))
			}
			if resp, _ = fetch(t, client, http.MethodGet, other, nil, ""); resp.StatusCode != status {
				t.Errorf("the other tab: %d", resp.StatusCode)
			} else if _, got := landed(t, resp, status, tt.place); got != "tab2" {
				t.Errorf("the other tab's state %q", got)
			}

			code, body := call(t, w, http.MethodGet, "/wechat/users/"+id, bearer(w), "")
			want := map[string]any{"appid": tt.appid, "openid": user.OpenID, "scope": tt.scope, "funcKey": tt.funcKey, "state": state}
			if tt.funcKey == "info" {
				want["nickname"], want["unionid"] = user.NickName, user.UnionID
			}
			for name, value := range want {
				if code != http.StatusOK || field(t, body, name) != value {
					t.Errorf("redeemed %d %s, want %s = %v", code, body, name, value)
				}
			}
			if code, body = call(t, w, http.MethodGet, "/wechat/users/"+id, bearer(w), ""); (code == http.StatusOK) != (tt.funcKey != "private") {
				t.Errorf("redeemed again: %d %s", code, body)
			}
		})
	}

	t.Run("profile later", func(t *testing.T) {
		for appid, refresh := range map[string]string{integration.AuthorizerID: "/sns/oauth2/component/refresh_token", integration.AccountID: "/sns/oauth2/refresh_token"} {
			client, user := loginBrowser(t, w), w.WeChat.NewUser(appid)
			resp, _ := fetch(t, client, http.MethodGet, start(t, w, client, "/wx/thirdParty/authorize/"+appid+"/info", user), nil, "")
			id, _ := landed(t, resp, http.StatusSeeOther, "/info?")
			path := "/wechat/users/" + id + "/userinfo?lang=zh_TW"
			eventually(t, "the user's token to end and be renewed", func() error {
				status, body := call(t, w, http.MethodGet, path, bearer(w), "")
				if status != http.StatusOK || field(t, body, "openid") != user.OpenID || field(t, body, "nickname") != user.NickName {
					t.Fatalf("%d %s", status, body)
				}
				if w.WeChat.Journal().Count(refresh) == 0 {
					return fmt.Errorf("%s was not called", refresh)
				}
				return nil
			})
			if status, body := call(t, w, http.MethodGet, path, nil, ""); status != http.StatusUnauthorized || strings.Contains(body, user.OpenID) {
				t.Errorf("without a key: %d %s", status, body)
			}
		}
		client, user := loginBrowser(t, w), w.WeChat.NewUser(integration.AccountID)
		resp, _ := fetch(t, client, http.MethodGet, start(t, w, client, "/wx/thirdParty/authorize/"+integration.AccountID+"/verify", user), nil, "")
		id, _ := landed(t, resp, http.StatusFound, "/webVerify/?")
		if status, body := call(t, w, http.MethodGet, "/wechat/users/"+id+"/userinfo", bearer(w), ""); status != http.StatusOK || field(t, body, "errcode") != 48001.0 {
			t.Errorf("snsapi_base: %d %s", status, body)
		}
	})

	t.Run("menus are refused", func(t *testing.T) {
		before := w.WeChat.Journal().Count("/sns/oauth2/component/access_token")
		for _, landing := range w.WeChat.Land(t.Context(), menuCallback(t, w, "/wx/thirdParty/authUserReceive/"+integration.PlatformID+"/verify", "scan"), 2) {
			if landing.Err != nil || landing.Status != http.StatusForbidden || landing.Location != "" {
				t.Errorf("%d to %s, %v", landing.Status, landing.Location, landing.Err)
			}
		}
		if got := w.WeChat.Journal().Count("/sns/oauth2/component/access_token"); got != before {
			t.Error("WeChat was asked about the code")
		}
	})
	checkViolations(t, w)
}

// menuCallback is where WeChat sends a user who followed a menu's link with that callback address.
func menuCallback(t *testing.T, w *integration.World, path, state string) string {
	t.Helper()
	link := w.WeChat.URL() + "/connect/oauth2/authorize?appid=" + integration.AuthorizerID + "&redirect_uri=" + url.QueryEscape(w.URL(path)) +
		"&response_type=code&scope=snsapi_base&state=" + url.QueryEscape(state) + "&component_appid=" + integration.PlatformID + "#wechat_redirect"
	callback, err := w.WeChat.Visit(link, wxsim.User{})
	if err != nil {
		t.Fatal(err)
	}
	return callback
}

// TestMenuLogins: menus link to WeChat with addresses of their own, which are registered and cannot change. Their logins
// need no cookie, keep their state, and come back twice at once from some clients.
func TestMenuLogins(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(w *integration.World) {
		polite(w)
		w.Caddyfile = loginConfig(t, "\twechat_oauth /wx/thirdParty {\n\t\tcallback /apiWechat/wx/userAuth/callBack"+loginFuncs)
	})
	authorize(t, w)
	for _, path := range []string{"/wx/thirdParty/authUserReceive/" + integration.PlatformID + "/verify", "/apiWechat/wx/userAuth/callBack/verify"} {
		for _, state := range []string{"scan", "a_b-c", "/home?x=1#y", "扫码"} {
			before := w.WeChat.Journal().Count("/sns/oauth2/component/access_token")
			landings := w.WeChat.Land(t.Context(), menuCallback(t, w, path, state), 3)
			want := "http://" + w.Backend.Addr() + "/webVerify/?wxTkId="
			for _, landing := range landings {
				u, err := url.Parse(landing.Location)
				if landing.Err != nil || err != nil || landing.Status != http.StatusFound || !strings.HasPrefix(landing.Location, want) ||
					u.Fragment != state || landing.Location != landings[0].Location || len(landing.Header.Values("Set-Cookie")) > 0 {
					t.Errorf("%s: %d to %s, %v", path, landing.Status, landing.Location, landing.Err)
				}
			}
			if got := w.WeChat.Journal().Count("/sns/oauth2/component/access_token") - before; got != 1 {
				t.Errorf("%s: the code was exchanged %d times", path, got)
			}
		}
		w.WeChat.RefuseNext()
		for _, landing := range w.WeChat.Land(t.Context(), menuCallback(t, w, path, "scan"), 1) {
			if landing.Status != http.StatusForbidden || landing.Location != "" || !strings.Contains(string(landing.Body), "未授权登录") {
				t.Errorf("refused: %d to %s\n%s", landing.Status, landing.Location, landing.Body)
			}
		}
	}
	checkViolations(t, w)
}
