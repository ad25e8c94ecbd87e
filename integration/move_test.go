package integration_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
)

// TestMoveToRedis: a platform that is running goes from Caddy's file storage to Redis, as docs/clustering.md has it. Nobody
// authorises again, no token is refreshed for it, and no call fails, although WeChat changes the refresh token with each
// refresh and the old one is void.
func TestMoveToRedis(t *testing.T) {
	t.Parallel()
	example, err := os.ReadFile("../Caddyfile.example")
	if err != nil {
		t.Fatal(err)
	}
	server := redistest.Start(t)
	folder := t.TempDir()
	oldConfig, newConfig := filepath.Join(folder, "old.Caddyfile"), filepath.Join(folder, "new.Caddyfile")
	const at = "\t\tseal_key "
	moved := strings.Replace(string(example), at, "\t\tstore redis {\n\t\t\taddress "+server.Addr+"\n\t\t}\n"+at, 1)
	if err := os.WriteFile(oldConfig, example, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(newConfig, []byte(moved), 0o600); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, func(w *integration.World) {
		polite(w)
		w.Caddyfile = oldConfig
		w.Config.Faults.RotateRefreshTokens = true
	})
	authorize(t, w)
	user := w.WeChat.NewUser(integration.AuthorizerID)
	works := func(when string) {
		t.Helper()
		if body := callUser(t, w, user); !strings.Contains(body, user.OpenID) {
			t.Errorf("%s: %s", when, body)
		}
	}
	// The gateway's own environment, and a shell in the place of its program.
	shell := &integration.Gateway{Binary: "/bin/sh", Dir: w.Dir, Env: w.Gateway.Env}
	move := func(what string) string {
		t.Helper()
		out, err := shell.Command(t.Context(), "-c", fmt.Sprintf(`%[1]s wechat export --config %[2]s | %[1]s wechat import --config %[3]s`, binary, oldConfig, newConfig))
		if err != nil {
			t.Fatalf("%s: %v\n%s", what, err, out)
		}
		checkNoSecrets(t, w, what, out)
		return out
	}
	if out := move("first"); !strings.Contains(out, "authorizers: 1 written") || !strings.Contains(out, "tickets: 1 written") {
		t.Errorf("first: %s", out)
	}
	// What changes meanwhile comes with the next.
	w.WeChat.ExpireAll(wxsim.KindAuthorizer, integration.AuthorizerID)
	works("after the first import")
	if out := move("second"); !strings.Contains(out, "authorizers: 1 written") || !strings.Contains(out, "tickets: 0 written, 1 already there") {
		t.Errorf("second: %s", out)
	}
	component := w.WeChat.Journal().Refreshes(wxsim.KindComponent, integration.PlatformID)
	refreshes := w.WeChat.Journal().Refreshes(wxsim.KindAuthorizer, integration.AuthorizerID)
	exchanges := w.WeChat.Journal().Count("/cgi-bin/component/api_query_auth")

	w.Gateway.Caddyfile = newConfig
	if err := w.Gateway.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	works("after the reload")
	if out := move("third"); !strings.Contains(out, "authorizers: 0 written, 1 already") {
		t.Errorf("third: %s", out)
	}
	works("after the third import")
	if err := os.RemoveAll(records(w)); err != nil { // it is not needed any more
		t.Fatal(err)
	}
	restart(t, w)
	works("after a restart, without the old records")
	if n := w.WeChat.Journal().Refreshes(wxsim.KindAuthorizer, integration.AuthorizerID); n != refreshes {
		t.Errorf("the account's token was refreshed %d times", n-refreshes)
	}
	if n := w.WeChat.Journal().Refreshes(wxsim.KindComponent, integration.PlatformID); n != component {
		t.Errorf("the platform's token was refreshed %d times", n-component)
	}
	if n := w.WeChat.Journal().Count("/cgi-bin/component/api_query_auth"); n != exchanges {
		t.Error("the account authorised again")
	}

	// The gateway has gone on, and the store of before the move comes back: nothing of it counts.
	w.WeChat.AllowRefresh(wxsim.KindAuthorizer, integration.AuthorizerID)
	stale := filepath.Join(folder, "stale.archive")
	if out, err := w.Gateway.Command(t.Context(), "wechat", "export", "--config", newConfig, stale); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	w.WeChat.ExpireAll(wxsim.KindAuthorizer, integration.AuthorizerID)
	works("with a token that ended")
	refreshes = w.WeChat.Journal().Refreshes(wxsim.KindAuthorizer, integration.AuthorizerID)
	out, err := w.Gateway.Command(t.Context(), "wechat", "import", "--config", newConfig, stale)
	if err != nil || !strings.Contains(out, "authorizers: 0 written, 1 already newer") {
		t.Errorf("an older archive: %v\n%s", err, out)
	}
	works("after the import of an older archive")
	if n := w.WeChat.Journal().Refreshes(wxsim.KindAuthorizer, integration.AuthorizerID); n != refreshes {
		t.Errorf("the account's token was refreshed %d times more", n-refreshes)
	}
	checkViolations(t, w)
}
