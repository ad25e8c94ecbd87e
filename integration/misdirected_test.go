package integration_test

import (
	"strings"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// TestFirstMessageToTheEventURL: the console has one URL for both, and no message ever came, so that the gateway has to ask WeChat whose the
// first one is. Its user gets the backend's reply.
func TestFirstMessageToTheEventURL(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	authorize(t, w)
	w.WeChat.SetURLs(integration.PlatformID, w.URL("/wx/event"), w.URL("/wx/event"))
	got, err := w.WeChat.PushMessage(t.Context(), wxsim.Message{Platform: integration.PlatformID, AppID: integration.AuthorizerID, Content: "astray"})
	if err != nil || !got.OK() || !strings.Contains(got.UserSaw, "astray") {
		t.Errorf("the user saw %q: %s %v", got.UserSaw, got.Wrong, err)
	}
	checkViolations(t, w)
}
