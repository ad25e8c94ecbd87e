package integration_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// TestPermissionSets: an account authorises the platform without the menu, and WeChat refuses that with a token which is good
// for all else. The app gets WeChat's word, no token is renewed for it, and the log names the set; once the account has granted it
// the same call goes through.
func TestPermissionSets(t *testing.T) {
	t.Parallel()
	w := newWorld(t, polite)
	if result, err := w.WeChat.PushTicket(t.Context(), integration.PlatformID); err != nil || !result.OK() {
		t.Fatalf("ticket: %s %v", result.Wrong, err)
	}
	if a, err := w.WeChat.Authorize(t.Context(), integration.PlatformID, integration.AuthorizerID, 2, 4); err != nil || !a.Push.OK() {
		t.Fatalf("authorized: %s %v", a.Push.Wrong, err)
	}
	awaitAuthorizer(t, w)
	menu := func() (answer struct {
		Errcode int64  `json:"errcode"`
		Errmsg  string `json:"errmsg"`
	},
	) {
		t.Helper()
		status, body := call(t, w, http.MethodGet, "/"+integration.AuthorizerID+"/cgi-bin/menu/get", bearer(w), "")
		if err := json.Unmarshal([]byte(body), &answer); err != nil || status != http.StatusOK {
			t.Fatalf("%d %s: %v", status, body, err)
		}
		return answer
	}
	asked := w.WeChat.Journal().Count("/cgi-bin/component/api_authorizer_token")
	for range 2 {
		if got := menu(); got.Errcode != 61007 || !strings.Contains(got.Errmsg, "rid: ") {
			t.Errorf("without the set: got %+v, want WeChat's 61007", got)
		}
	}
	if n := w.WeChat.Journal().Count("/cgi-bin/component/api_authorizer_token"); n != asked {
		t.Errorf("the token was renewed %d times for it", n-asked)
	}
	told := slices.DeleteFunc(strings.Split(w.Gateway.Log(), "\n"), func(line string) bool { return !strings.Contains(line, `"errcode":61007`) })
	if len(told) != 1 || !strings.Contains(told[0], `"permission_set":"15 (`) || !strings.Contains(told[0], `"granted":"no"`) {
		t.Errorf("the log does not say once which set is missing:\n%s", strings.Join(told, "\n"))
	}

	if a, err := w.WeChat.Reauthorize(t.Context(), integration.PlatformID, integration.AuthorizerID, 2, 4, 15); err != nil || !a.Push.OK() {
		t.Fatalf("authorized again: %s %v", a.Push.Wrong, err)
	}
	eventually(t, "the set that was granted", func() error {
		if got := menu(); got.Errcode != 46003 { // WeChat has none
			return fmt.Errorf("%+v", got)
		}
		return nil
	})
	checkViolations(t, w)
}

// TestNoTextForMiniPrograms: the backend answers with an error page. An official account's user reads the fallback; a mini program's reads nothing,
// and not the error notice that WeChat has for any text.
func TestNoTextForMiniPrograms(t *testing.T) {
	t.Parallel()
	const program = "wx4444444444444444"
	w := newWorld(t, func(w *integration.World) {
		polite(w)
		w.Config.Authorizers = []wxsim.Authorizer{{AppID: program, MiniProgram: true}}
		w.Backend = &integration.Backend{Answer: func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "oops", http.StatusInternalServerError)
		}}
		configLines(t, w, "wechat_message #", "wechat_message {\n\t\t\tfallback text \"later\"\n\t\t} #")
	})
	authorize(t, w)
	if a, err := w.WeChat.Authorize(t.Context(), integration.PlatformID, program); err != nil || !a.Push.OK() {
		t.Fatalf("authorized: %s %v", a.Push.Wrong, err)
	}
	eventually(t, "the mini program's tokens", func() error {
		if resp, body := fetch(t, plainClient, http.MethodGet, "http://"+w.Admin+"/wechat/authorizers/"+program, nil, ""); resp.StatusCode != http.StatusOK || !strings.Contains(body, `"id":19`) {
			return fmt.Errorf("%d %s", resp.StatusCode, body)
		}
		return nil
	})
	for appid, saw := range map[string]string{integration.AuthorizerID: "later", program: ""} {
		result, err := w.WeChat.PushMessage(t.Context(), wxsim.Message{
			Platform: integration.PlatformID, AppID: appid, Content: "words of a user",
		})
		if err != nil || !result.OK() || result.UserSaw != saw {
			t.Errorf("%s: the user saw %q, want %q (%s, %v)", appid, result.UserSaw, saw, result.Wrong, err)
		}
	}
	checkViolations(t, w)
}
