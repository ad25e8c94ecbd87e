package caddymodule

import (
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// TestAppRefusesWhatAPlaceholderHid: the error names block and field, says what to do, and shows no value.
func TestAppRefusesWhatAPlaceholderHid(t *testing.T) {
	t.Setenv("SHORT_KEY", "abcdefghijklmnopqrstuvwxyz0123456789ABCDEF")
	t.Setenv("BAD_ORIGIN", "http://wechat.internal")
	t.Setenv("EMPTY", "")
	t.Setenv("BROKEN", "hidden\r")
	t.Setenv("SPACED", "hid den")
	t.Setenv("BLANK", " ")
	t.Setenv("QUOTED", `"hidden"`)
	platform := func(rest string) string {
		return `{"platforms": [{"appid": "wx1111111111111111", ` + rest + `}]}`
	}
	good := `"secret": "s", "tokens": ["t"], "aes_keys": ["` + platformKey + `"]`
	tests := []struct {
		name, config string
		want         []string
	}{
		{"first secret empty", platform(`"secret": "{env.EMPTY}", "tokens": ["t"], "aes_keys": ["` + platformKey + `"]`),
			[]string{"platform wx1111111111111111", "secret", "{env.EMPTY} resolves to nothing"}},
		{"first token unset", platform(`"secret": "s", "tokens": ["{env.UNSET_TOKEN}"], "aes_keys": ["` + platformKey + `"]`),
			[]string{"platform wx1111111111111111", "token", "{env.UNSET_TOKEN} resolves to nothing"}},
		{"short key", platform(`"secret": "s", "tokens": ["t"], "aes_keys": ["` + platformKey + `", "{env.SHORT_KEY}"]`),
			[]string{"platform wx1111111111111111", "aes_key 2", "43"}},
		{"unknown placeholder", platform(`"secret": "s", "tokens": ["t", "{no.such}"], "aes_keys": ["` + platformKey + `"]`),
			[]string{"token", "is not a placeholder that Caddy knows"}},
		{"first placeholder unknown", platform(`"secret": "{NAME}", "tokens": ["t"], "aes_keys": ["` + platformKey + `"]`),
			[]string{"platform wx1111111111111111", "secret", "write {env.NAME} or {file./absolute/path}"}},
		{"secret with a line break", platform(`"secret": "{env.BROKEN}", "tokens": ["t"], "aes_keys": ["` + platformKey + `"]`),
			[]string{"platform wx1111111111111111", "secret: {env.BROKEN}", "a line break"}},
		{"token with a space", platform(`"secret": "s", "tokens": ["t", "{env.SPACED}"], "aes_keys": ["` + platformKey + `"]`),
			[]string{"platform wx1111111111111111", "token 2: {env.SPACED}", "a space"}},
		{"old token of blanks", platform(`"secret": "s", "tokens": ["t", "{env.BLANK}"], "aes_keys": ["` + platformKey + `"]`),
			[]string{"platform wx1111111111111111", "token 2: {env.BLANK}", "a space"}},
		{"secret in quotation marks", platform(`"secret": "{env.QUOTED}", "tokens": ["t"], "aes_keys": ["` + platformKey + `"]`),
			[]string{"platform wx1111111111111111", "secret: {env.QUOTED}", "quotation marks"}},
		{"account's secret", `{"accounts": [{"appid": "wx2222222222222222", "secret": "“hidden”"}]}`,
			[]string{"account wx2222222222222222", "secret", "Chinese punctuation"}},
		{"account's token", `{"accounts": [{"appid": "wx2222222222222222", "secret": "s", "tokens": ["hidden，"]}]}`,
			[]string{"account wx2222222222222222", "token 1", "Chinese punctuation"}},
		{"client's key of a shell", `{"clients": [{"name": "a", "keys": ["$CRM_KEY"], "appids": ["*"]}]}`,
			[]string{"client a", "key 1", "write {env.NAME}"}},
		{"secret missing", platform(`"tokens": ["t"], "aes_keys": ["` + platformKey + `"]`), []string{"secret is missing"}},
		{"no token", platform(`"secret": "s", "aes_keys": ["` + platformKey + `"]`), []string{"token is missing"}},
		{"no key", platform(`"secret": "s", "tokens": ["t"]`), []string{"aes_key is missing"}},
		{"appid shape", `{"platforms": [{"appid": "wx1", ` + good + `}]}`, []string{"'wx1' is not an appid"}},
		{"appid twice", `{"platforms": [{"appid": "wx1111111111111111", ` + good + `}, {"appid": "wx1111111111111111", ` + good + `}]}`,
			[]string{"configured twice"}},
		{"account is a platform", `{"platforms": [{"appid": "wx1111111111111111", ` + good + `}], "accounts": [{"appid": "wx1111111111111111", "secret": "s"}]}`,
			[]string{"account wx1111111111111111", "configured twice"}},
		{"account key without token", `{"accounts": [{"appid": "wx2222222222222222", "secret": "s", "aes_keys": ["` + accountKey + `"]}]}`,
			[]string{"account wx2222222222222222", "token is missing"}},
		{"account mode without key", `{"accounts": [{"appid": "wx2222222222222222", "secret": "s", "tokens": ["t"], "mode": "compat"}]}`,
			[]string{"account wx2222222222222222", "aes_key is missing", "compat"}},
		{"account mode without token", `{"accounts": [{"appid": "wx2222222222222222", "secret": "s", "mode": "plain"}]}`,
			[]string{"account wx2222222222222222", "token is missing"}},
		{"client twice", `{"clients": [{"name": "a", "keys": ["k"], "appids": ["*"]}, {"name": "a", "keys": ["k"], "appids": ["*"]}]}`,
			[]string{"client a", "configured twice"}},
		{"client without a name", `{"clients": [{"keys": ["k"], "appids": ["*"]}]}`, []string{"name is missing"}},
		{"client without a key", `{"clients": [{"name": "a", "appids": ["*"]}]}`, []string{"client a", "key is missing"}},
		{"client without appids", `{"clients": [{"name": "a", "keys": ["k"]}]}`, []string{"client a", "appids is missing"}},
		{"client appid", `{"clients": [{"name": "a", "keys": ["k"], "appids": ["wx"]}]}`, []string{"client a", "appids", "'wx'"}},
		{"client path", `{"clients": [{"name": "a", "keys": ["k"], "appids": ["*"], "paths": ["x"]}]}`, []string{"client a", "must begin with /"}},
		{"client hash", `{"clients": [{"name": "a", "key_sha256": ["zz"], "appids": ["*"]}]}`, []string{"client a", "64 hexadecimal digits"}},
		{"secret with braces", `{"clients": [{"name": "a", "keys": ["hidden{word}123"], "appids": ["*"]}]}`, []string{"client a", "key"}},
		{"second secret with braces", `{"clients": [{"name": "a", "keys": ["k", "hidden{word}123"], "appids": ["*"]}]}`, []string{"client a", "key"}},
		{"key of two clients", `{"clients": [{"name": "a", "keys": ["k"], "appids": ["*"]}, {"name": "b", "keys": ["k"], "appids": ["*"]}]}`,
			[]string{"client b", "client a has too"}},
		{"origin with a password", `{"api": ["https://u:hidden%zz@h"]}`, []string{"api", "no user and password"}},
		{"origin", `{"api": ["{env.BAD_ORIGIN}"]}`, []string{"api", "in the clear"}},
		{"origin is no URL", `{"api": ["weixin"]}`, []string{"api", "is not an origin"}},
		{"proxy", `{"proxy": "ftp://user:hidden@x"}`, []string{"proxy", "not a proxy address"}},
		{"spill", `{"spill": "{env.BAD_ORIGIN}"}`, []string{"spill", "is not an absolute path"}},
		{"spill placeholder", `{"spill": "{env.NO_SUCH_SPILL}"}`, []string{"spill", "resolves to nothing"}},
		{"seal key", `{"seal_keys": ["short"]}`, []string{"seal_key 1"}},
		{"store", `{"store": {"module": "nowhere"}}`, []string{"store", "nowhere"}},
		{"unknown field", `{"platform": []}`, []string{"unknown field"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, _, err := provisionApp(t, tt.config)
			if err == nil {
				t.Fatal("accepted")
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q does not contain %q", err, want)
				}
			}
			for _, hidden := range []string{os.Getenv("SHORT_KEY"), platformKey, accountKey, "hidden", "hid den"} {
				if strings.Contains(err.Error(), hidden) {
					t.Errorf("the error shows a secret: %v", err)
				}
			}
		})
	}
}

// TestAppProvisionIsQuiet: caddy validate runs Provision, which must neither connect nor write.
func TestAppProvisionIsQuiet(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	app, _ := newTestApp(t, testConfig("http://"+l.Addr().String()))
	_, root, _ := strings.Cut(app.poolKey, "FileStorage:")
	if _, err := os.Stat(root); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("storage was touched: %v", err)
	}
	if err := l.(*net.TCPListener).SetDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Accept(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a connection was made: %v", err)
	}
}

// TestAppGenerations: a reload shares its state, a refused configuration leaves the one in force alone, and requests
// that outlive their configuration still find the state.
func TestAppGenerations(t *testing.T) {
	t.Parallel()
	root := filepath.Join(t.TempDir(), "storage")
	provision := func(config string) (*App, error) {
		app, _, err := provisionAt(root, config)
		return app, err
	}
	first, err := provision(testConfig(""))
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Start(); err != nil {
		t.Fatal(err)
	}
	second, err := provision(`{"accounts": [{"appid": "` + authorizerID + `", "secret": "s"}]}`)
	if err != nil {
		t.Fatal(err)
	}
	if first.shared != second.shared {
		t.Fatal("adding an account split the state")
	}
	known := func(a *App, appid string) bool {
		_, err := a.manager().Get(t.Context(), tokens.AccountKey(appid))
		return !errors.Is(err, tokens.ErrNotConfigured)
	}
	if known(first, authorizerID) || !known(first, accountID) {
		t.Error("a configuration that has not started is in force")
	}
	_ = second.manager() // a request may come before Start
	if !known(first, authorizerID) || known(first, accountID) {
		t.Error("the new configuration is not in force")
	}
	if err := second.Cleanup(); err != nil { // refused after all
		t.Fatal(err)
	}
	if known(first, authorizerID) || !known(first, accountID) {
		t.Error("the former configuration is not back in force")
	}
	third, err := provision(`{"accounts": [{"appid": "` + authorizerID + `", "secret": "s"}]}`)
	if err != nil {
		t.Fatal(err)
	}
	if err := third.Cleanup(); err != nil { // another app could not be started
		t.Fatal(err)
	}
	_ = third.manager() // for a request that it had taken in
	if known(first, authorizerID) || !known(first, accountID) {
		t.Error("a refused configuration came into force after its end")
	}
	if _, err := provision(`{"accounts": [{"appid": "bad"}]}`); err == nil {
		t.Fatal("accepted")
	}
	if !known(first, accountID) {
		t.Error("a configuration that could not be provisioned took the state along")
	}
	manager := first.manager()
	if err := first.Cleanup(); err != nil {
		t.Fatal(err)
	}
	if _, err := manager.Get(t.Context(), tokens.AccountKey(accountID)); !errors.Is(err, tokens.ErrClosed) {
		t.Errorf("after the last configuration: %v", err)
	}
}

func TestAppMissing(t *testing.T) {
	t.Parallel()
	provisioning.Lock()
	ctx, err := caddy.ProvisionContext(&caddy.Config{Admin: &caddy.AdminConfig{Disabled: true}})
	provisioning.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	if err := new(Message).Provision(ctx); err == nil || !strings.Contains(err.Error(), "global option wechat") {
		t.Errorf("error %v", err)
	}
}

// TestAppCleansUpHalfOfIt: Provision stops at a metric of somebody else's that has our name.
func TestAppCleansUpHalfOfIt(t *testing.T) {
	t.Parallel()
	storage, _ := json.Marshal(map[string]string{"module": "file_system", "root": filepath.Join(t.TempDir(), "storage")})
	provisioning.Lock()
	ctx, err := caddy.ProvisionContext(&caddy.Config{Admin: &caddy.AdminConfig{Disabled: true}, StorageRaw: storage})
	provisioning.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	other := prometheus.NewCounter(prometheus.CounterOpts{Name: "caddy_wechat_pushes_total", Help: "not ours"})
	if err := ctx.GetMetricsRegistry().Register(other); err != nil {
		t.Fatal(err)
	}
	half := &App{Accounts: []*Account{{AppID: accountID, Secret: "s"}}}
	if err := half.Provision(ctx); err == nil || !strings.Contains(err.Error(), "metrics") {
		t.Fatalf("error %v", err)
	}
	manager := half.shared.manager
	if err := half.Cleanup(); err != nil {
		t.Fatal(err)
	}
	if _, err := manager.Get(t.Context(), tokens.AccountKey(accountID)); !errors.Is(err, tokens.ErrClosed) {
		t.Errorf("what Provision took was not given back: %v", err)
	}
	if err := new(App).Cleanup(); err != nil {
		t.Error(err)
	}
}

func TestOpenOrigin(t *testing.T) {
	t.Parallel()
	for config, want := range map[string]string{
		`{}`:                                 "https://open.weixin.qq.com",
		`{"api": ["http://127.0.0.1:8000"]}`: "https://open.weixin.qq.com", // a way out on this machine is no simulator
		`{"open": "http://127.0.0.1:8000"}`:  "http://127.0.0.1:8000",
	} {
		app, _ := newTestApp(t, config)
		if got := app.openOrigin(); got != want {
			t.Errorf("%s: %s, want %s", config, got, want)
		}
	}
	if _, _, err := provisionApp(t, `{"open": "http://evil.example"}`); err == nil {
		t.Error("plain http to another machine is accepted")
	}
}

func TestMetricsLint(t *testing.T) {
	t.Parallel()
	r := prometheus.NewPedanticRegistry()
	m := newMetrics(tokens.NewManager(), newCallTable(nil))
	for range 2 { // a configuration may mention the gateway twice
		if err := m.register(r); err != nil {
			t.Fatal(err)
		}
	}
	m.StoreOperation("store", 0, errors.New("x"))
	m.TokenRefreshed(tokens.KindAccount, accountID, 0, nil)
	m.RogueRefresh(tokens.KindAccount, accountID)
	problems, err := testutil.GatherAndLint(r)
	if err != nil || len(problems) > 0 {
		t.Errorf("%v %v", problems, err)
	}
}
