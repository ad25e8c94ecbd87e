package integration_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// TestLoginsByClientKey: an app exchanges users' login codes at WeChat's own paths with the client's key in the place of
// the secret, for a plain account and for an authorizer, whose calls become the platform's. A code is never sent twice,
// also when the answer is lost or the platform's token is refused.
func TestLoginsByClientKey(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(w *integration.World) {
		polite(w)
		w.Config.Authorizers = []wxsim.Authorizer{{AppID: integration.AuthorizerID, MiniProgram: true}}
	})
	authorize(t, w)
	for _, tt := range []struct {
		appid, path, parameter, seen string
		code                         func(wxsim.User) string
	}{
		{integration.AccountID, "/sns/jscode2session", "js_code", "/sns/jscode2session", w.WeChat.LoginCode},
		{integration.AuthorizerID, "/sns/jscode2session", "js_code", "/sns/component/jscode2session", w.WeChat.LoginCode},
		{integration.AccountID, "/sns/oauth2/access_token", "code", "/sns/oauth2/access_token",
			func(u wxsim.User) string { return w.WeChat.UserCode(u, "", "snsapi_userinfo") }},
		{integration.AuthorizerID, "/sns/oauth2/access_token", "code", "/sns/oauth2/component/access_token",
			func(u wxsim.User) string { return w.WeChat.UserCode(u, integration.PlatformID, "snsapi_userinfo") }},
	} {
		user := w.WeChat.NewUser(tt.appid)
		login := func() (int, string) {
			return call(t, w, http.MethodGet, tt.path+"?appid="+tt.appid+"&secret="+w.ClientKey+"&"+tt.parameter+"="+tt.code(user)+"&grant_type=authorization_code", nil, "")
		}
		status, body := login()
		if status != 200 || !strings.Contains(body, user.OpenID) {
			t.Errorf("%s for %s: %d %s", tt.path, tt.appid, status, body)
		}
		if token, _ := field(t, body, "access_token").(string); token != "" { // the user's own, which passes
			if status, body := call(t, w, http.MethodGet, "/sns/userinfo?access_token="+token+"&openid="+user.OpenID, nil, ""); status != 200 || !strings.Contains(body, "nickname") {
				t.Errorf("%s for %s: the user's token: %d %s", tt.path, tt.appid, status, body)
			}
		}
		for name, c := range map[string]struct {
			fault  wxsim.Fault
			status int
		}{"lost": {wxsim.Fault{Act: true, DropConnection: true}, 502}, "refused": {wxsim.Fault{Errcode: 40001}, 200}} {
			before := w.WeChat.Journal().Count(tt.seen)
			w.WeChat.FailNext(tt.seen, c.fault)
			if status, body := login(); status != c.status {
				t.Errorf("%s for %s, %s: %d %s", tt.path, tt.appid, name, status, body)
			}
			if n := w.WeChat.Journal().Count(tt.seen) - before; n != 1 {
				t.Errorf("%s for %s, %s: WeChat got the code %d times", tt.path, tt.appid, name, n)
			}
		}
		if status, body := login(); status != 200 || !strings.Contains(body, user.OpenID) {
			t.Errorf("%s for %s, the next: %d %s", tt.path, tt.appid, status, body)
		}
	}
	checkViolations(t, w)
}
