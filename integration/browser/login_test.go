package browser_test

import (
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

const (
	loginBase = "/wx/thirdParty"
	userAPI   = "/sns/oauth2/component/access_token"
)

// startOf is a link that starts a login here.
func (w *world) startOf(funcKey, query string) string {
	return w.URL(loginBase + "/authorize/" + integration.AuthorizerID + "/" + funcKey + query)
}

// menuOf is a menu's link, which starts a login at WeChat.
func (w *world) menuOf(callback, state string) string {
	return w.WeChat.URL() + "/connect/oauth2/authorize?appid=" + integration.AuthorizerID + "&redirect_uri=" + url.QueryEscape(w.URL(callback)) +
		"&response_type=code&scope=snsapi_base&state=" + state + "&component_appid=" + integration.PlatformID + "#wechat_redirect"
}

// landed checks that the visitor is at the web application with a tracking id and that state, and redeems the id.
func (v *visitor) landed(place, state string) (user map[string]any) {
	v.t.Helper()
	u, err := url.Parse(v.at)
	if err != nil {
		v.t.Fatal(err)
	}
	if before, _, _ := strings.Cut(v.at, "wxTkId="); before != v.w.web+place || u.Fragment != state || v.status != http.StatusOK {
		v.t.Fatalf("landed at %s with status %d, want %s… and state %q", v.at, v.status, place, state)
	}
	v.content("landing")
	req, err := http.NewRequestWithContext(v.t.Context(), http.MethodGet, v.w.APIURL("/wechat/users/"+u.Query().Get("wxTkId")), nil)
	if err != nil {
		v.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+v.w.ClientKey)
	resp, err := (&http.Client{Timeout: stepLimit}).Do(req)
	if err != nil {
		v.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		v.t.Fatal(err)
	}
	if err := json.Unmarshal(body, &user); err != nil || user["appid"] != integration.AuthorizerID || user["state"] != state {
		v.t.Fatalf("redeemed %d %s: %v", resp.StatusCode, body, err)
	}
	return user
}

// callback is where WeChat sent the visitor back to last.
func (v *visitor) callback() string {
	v.t.Helper()
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.returned == "" {
		v.t.Fatal("WeChat sent nobody back")
	}
	return v.returned
}

// login has people log in to the web application.
func login(t *testing.T, w *world) {
	const menuPath = loginBase + "/authUserReceive/" + integration.PlatformID + "/verify"
	v := newVisitor(t, w, phone, chinese)
	v.open(w.startOf("scan", "?state="+url.QueryEscape("a b/扫码")))
	v.meetWeChat()
	v.click(agree)
	v.landed("/scan?from=wechat&", "a b/扫码")
	callback := v.callback()
	v.open(callback) // as some clients do by themselves
	v.landed("/scan?from=wechat&", "a b/扫码")

	v.open(w.startOf("scan", "?state=twice"))
	v.click(agree)
	v.landed("/scan?from=wechat&", "twice")
	v.back() // to WeChat's page, which gives another code for the same login
	v.meetWeChat()
	v.click(agree)
	v.see("login-used-flow", http.StatusForbidden, "请重新登录")
	v.stops()

	v.open(w.startOf("scan", ""))
	v.click(refuse)
	v.see("login-denied", http.StatusForbidden, "未授权登录")

	t.Run("profile", func(t *testing.T) {
		v := newVisitor(t, w, desktop, english)
		v.open(w.startOf("verify", "?scope=snsapi_userinfo&state=p"))
		v.meetWeChat()
		v.click(agree)
		if user := v.landed("/webVerify/?", "p"); user["nickname"] == "" || user["nickname"] == nil {
			t.Errorf("no profile: %v", user)
		}
		v.open(callback)
		v.see("login-foreign", http.StatusForbidden, "Please start again")
		v.open(w.startOf("scan", "?state=1"))
		v.click(refuse)
		v.see("login-denied", http.StatusForbidden, "Not signed in")
	})
	t.Run("menu", func(t *testing.T) {
		v := newVisitor(t, w, phone, english)
		v.open(w.web + "/menu?menu=" + url.QueryEscape(w.menuOf(menuPath, "menu1")))
		v.click("#menu")
		v.meetWeChat()
		v.click(agree)
		v.landed("/webVerify/?", "menu1")
		used := v.callback()
		v.open(used)
		v.landed("/webVerify/?", "menu1")
		v.open(strings.Replace(used, "/verify?", "/scan?", 1))
		v.see("login-used-code", http.StatusGone, "Sign-in expired")
		v.open(w.menuOf("/wx/strict/authUserReceive/"+integration.PlatformID+"/verify", "menu1"))
		v.click(agree)
		v.see("login-strict", http.StatusForbidden, "Please start again")
		v.open(w.startOf("nowhere", ""))
		v.see("login-unknown", http.StatusNotFound, "No such page")
		v.open(w.startOf("scan", "?state=1&state=2"))
		v.see("login-bad-link", http.StatusBadRequest, "Invalid link")
	})
	for _, d := range []struct {
		device   device
		language string
		texts    map[string]string
	}{
		{phone, chinese, map[string]string{"expired": "登录已失效", "invalid": "登录无效", "refused": "微信拒绝了这个公众号的登录请求", "unavailable": "现在联系不上微信", "again": "请再试一次"}},
		{desktop, english, map[string]string{"expired": "Sign-in expired", "invalid": "Sign-in not valid", "refused": "WeChat refuses sign-ins", "unavailable": "WeChat cannot be reached", "again": "Please try again"}},
	} {
		t.Run("WeChat fails, "+d.device.name, func(t *testing.T) {
			v := newVisitor(t, w, d.device, d.language)
			for _, tt := range []struct {
				name   string
				status int64
				fault  wxsim.Fault
			}{
				{"expired", http.StatusGone, wxsim.Fault{Errcode: 42003}},
				{"invalid", http.StatusBadRequest, wxsim.Fault{Errcode: 40029}},
				{"refused", http.StatusBadGateway, wxsim.Fault{Errcode: 48001}},
				{"unavailable", http.StatusServiceUnavailable, wxsim.Fault{DropConnection: true}},
				{"again", http.StatusServiceUnavailable, wxsim.Fault{Errcode: 40001}},
			} {
				v.open(w.startOf("verify", "?state=s"))
				v.meetWeChat()
				w.WeChat.FailNext(userAPI, tt.fault)
				v.click(agree)
				v.see("login-"+tt.name, tt.status, d.texts[tt.name])
			}
			v.click("main a")
			v.landed("/webVerify/?", "s")
		})
	}
}
