package integration_test

import (
	"net/http"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// TestClockOffAtTheStart: a gateway that has just started, on a machine whose clock is off, and with nothing to ask WeChat for, takes an
// authorization and messages all the same, which WeChat would not push again.
func TestClockOffAtTheStart(t *testing.T) {
	t.Parallel()
	const probe = "/cgi-bin/getcallbackip"
	w := newWorld(t, polite)
	authorize(t, w) // so that there is a ticket
	for _, ahead := range []time.Duration{20 * time.Minute, -20 * time.Minute} {
		if err := w.Gateway.Stop(); err != nil {
			t.Fatal(err)
		}
		w.WeChat.SetClock(ahead)
		// What it does ask for in the background is refused by something in between, of which no Date counts.
		for _, path := range []string{"api_start_push_ticket", "api_component_token", "api_get_authorizer_list", "api_get_authorizer_info", "api_authorizer_token"} {
			w.WeChat.FailNext("/cgi-bin/component/"+path, wxsim.Fault{Status: http.StatusBadGateway, Times: -1})
		}
		if err := w.Gateway.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		awaitTLS(t, w, w.HTTPS)
		before := w.WeChat.Journal().Count(probe)
		if a, err := w.WeChat.Reauthorize(t.Context(), integration.PlatformID, integration.AuthorizerID); err != nil || !a.Push.OK() || len(a.Push.Attempts) != 1 {
			t.Fatalf("%v: an authorization: %s %v", ahead, a.Push.Wrong, err)
		}
		if n := w.WeChat.Journal().Count(probe) - before; n != 1 {
			t.Errorf("%v: WeChat was asked for its time %d times", ahead, n)
		}
		w.WeChat.ClearFaults()
		message := wxsim.Message{Platform: integration.PlatformID, AppID: integration.AuthorizerID, Content: "hello"}
		if r, err := w.WeChat.PushMessage(t.Context(), message); err != nil || !r.OK() || r.Kind != "text" {
			t.Errorf("%v: a message: %s %s %v", ahead, r.Kind, r.Wrong, err)
		}
		message.Skew, message.Attempts = -10*time.Minute, 1
		message.Tamper = func(*wxsim.Outgoing) {} // whatever is answered is no violation
		if r, err := w.WeChat.PushMessage(t.Context(), message); err != nil || r.Last().Status != http.StatusForbidden {
			t.Errorf("%v: an old one: HTTP %d %v", ahead, r.Last().Status, err)
		}
		if h, err := w.WeChat.VerifyEventURL(t.Context(), integration.PlatformID); err != nil || h.Wrong != "" {
			t.Errorf("%v: the check of its event URL: %s %v", ahead, h.Wrong, err)
		}
		if h, err := w.WeChat.VerifyMessageURL(t.Context(), integration.PlatformID, integration.AuthorizerID); err != nil || h.Wrong != "" {
			t.Errorf("%v: the check of its message URL: %s %v", ahead, h.Wrong, err)
		}
		out := &plantedOutput{t: t, secrets: w.Secrets()}
		eventually(t, "the status says so", func() error { return out.status(w.Admin).has("clock_offset", "red", "chrony") })
		awaitAuthorizer(t, w)
	}
	checkViolations(t, w)
}
