package integration_test

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// restart kills the gateway as kill -9 does and starts it again on the same storage.
func restart(t *testing.T, w *integration.World) {
	t.Helper()
	if err := w.Gateway.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := w.Gateway.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestKillAfterTicket: the process dies right after `success` to a ticket. WeChat pushes the next one only ten minutes
// later, so the one acknowledged must be there.
func TestKillAfterTicket(t *testing.T) {
	t.Parallel()
	w := newWorld(t, polite)
	if result, err := w.WeChat.PushTicket(t.Context(), integration.PlatformID); err != nil || !result.OK() {
		t.Fatalf("%s %v", result.Wrong, err)
	}
	if err := w.Gateway.Kill(); err != nil {
		t.Fatal(err)
	}
	w.WeChat.AllowRefresh(wxsim.KindComponent, integration.PlatformID) // the kill may have hit between its arrival and its record
	if err := w.Gateway.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	result, err := w.WeChat.PushMessage(t.Context(), wxsim.Message{Platform: integration.PlatformID, AppID: integration.AuthorizerID, Content: "up"})
	if err != nil || !result.OK() {
		t.Fatalf("after the restart: %s %v", result.Wrong, err)
	}
	if a, err := w.WeChat.Authorize(t.Context(), integration.PlatformID, integration.AuthorizerID); err != nil || !a.Push.OK() {
		t.Fatalf("authorized: %v", err)
	}
	awaitAuthorizer(t, w) // needs a component token, which needs the ticket
	checkViolations(t, w)
}

// TestKillAfterAuthorized: the process dies between `success` to an authorization and the exchange of its code, which
// WeChat is made to hold up. The intent is durable, so the exchange is made after the restart.
func TestKillAfterAuthorized(t *testing.T) {
	t.Parallel()
	w := newWorld(t, polite)
	if result, err := w.WeChat.PushTicket(t.Context(), integration.PlatformID); err != nil || !result.OK() {
		t.Fatalf("%s %v", result.Wrong, err)
	}
	w.WeChat.FailNext("/cgi-bin/component/api_query_auth", wxsim.Fault{DropConnection: true, Times: -1})
	if a, err := w.WeChat.Authorize(t.Context(), integration.PlatformID, integration.AuthorizerID); err != nil || !a.Push.OK() {
		t.Fatalf("authorized: %v", err)
	}
	if err := w.Gateway.Kill(); err != nil {
		t.Fatal(err)
	}
	w.WeChat.ClearFaults()
	w.WeChat.AllowRefresh(wxsim.KindComponent, integration.PlatformID) // the kill may have hit between its arrival and its record
	if err := w.Gateway.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	awaitAuthorizer(t, w)
	checkViolations(t, w)
}

// TestKillAfterRefresh: WeChat changes the refresh token with every refresh, and the process dies right after one. The
// new refresh token is the only way to the account.
func TestKillAfterRefresh(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(w *integration.World) {
		polite(w)
		w.Config.Faults.RotateRefreshTokens = true
	})
	authorize(t, w)
	user := w.WeChat.NewUser(integration.AuthorizerID)
	info := "/" + integration.AuthorizerID + "/cgi-bin/user/info?openid=" + user.OpenID
	for round := range 5 {
		w.WeChat.ExpireAll(wxsim.KindAuthorizer, integration.AuthorizerID)
		if status, body := call(t, w, http.MethodGet, info, bearer(w), ""); status != 200 || !strings.Contains(body, user.OpenID) {
			t.Fatalf("round %d: %d %s", round, status, body)
		}
		restart(t, w)
		refreshes := w.WeChat.Journal().Refreshes(wxsim.KindAuthorizer, integration.AuthorizerID)
		if status, body := call(t, w, http.MethodGet, info, bearer(w), ""); status != 200 || !strings.Contains(body, user.OpenID) {
			t.Fatalf("round %d, after the restart: %d %s", round, status, body)
		}
		if got := w.WeChat.Journal().Refreshes(wxsim.KindAuthorizer, integration.AuthorizerID); got != refreshes {
			t.Errorf("round %d: refreshed again after the restart, although the token was stored", round)
		}
	}
	checkViolations(t, w)
}

// TestKillDuringRefresh: the process dies while a refresh is under way, with its lock held. Another process waits no
// longer than the lock lives, and WeChat still accepts the refresh token, which had not changed.
func TestKillDuringRefresh(t *testing.T) {
	t.Parallel()
	w := newWorld(t, polite)
	authorize(t, w)
	user := w.WeChat.NewUser(integration.AuthorizerID)
	info := "/" + integration.AuthorizerID + "/cgi-bin/user/info?openid=" + user.OpenID
	w.WeChat.ExpireAll(wxsim.KindAuthorizer, integration.AuthorizerID)
	w.WeChat.FailNext("/cgi-bin/component/api_authorizer_token", wxsim.Fault{Delay: 3 * time.Second, DropConnection: true})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	started := w.WeChat.Journal().Count("/cgi-bin/component/api_authorizer_token")
	go func() { // ends with the process that it calls, or with the test
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, w.APIURL(info), nil)
		if err != nil {
			return
		}
		req.Header = bearer(w)
		if resp, err := plainClient.Do(req); err == nil {
			_ = resp.Body.Close()
		}
	}()
	eventually(t, "the lock", func() error {
		out, err := lockFiles(w)
		if err != nil || len(out) == 0 {
			return fmt.Errorf("no lock yet (%d calls): %w", w.WeChat.Journal().Count("/cgi-bin/component/api_authorizer_token")-started, err)
		}
		return nil
	})
	restart(t, w)
	w.WeChat.ClearFaults()
	eventually(t, "a call after the restart", func() error {
		if status, body := call(t, w, http.MethodGet, info, bearer(w), ""); status != 200 || !strings.Contains(body, user.OpenID) {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})
}
