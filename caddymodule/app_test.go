package caddymodule

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

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
		{"token with a space", platform(`"secret": "s", "tokens": ["{env.SPACED}", "t"], "aes_keys": ["` + platformKey + `"]`),
			[]string{"platform wx1111111111111111", "token 1: {env.SPACED}", "a space"}},
		{"token of blanks", platform(`"secret": "s", "tokens": ["{env.BLANK}"], "aes_keys": ["` + platformKey + `"]`),
			[]string{"platform wx1111111111111111", "token 1: {env.BLANK}", "a space"}},
		{"old token as it stands", platform(`"secret": "s", "tokens": ["t", "hid den"], "aes_keys": ["` + platformKey + `"]`),
			[]string{"platform wx1111111111111111", "token 2", "a space"}},
		{"old token around a placeholder", platform(`"secret": "s", "tokens": ["t", "{env.EMPTY}，"], "aes_keys": ["` + platformKey + `"]`),
			[]string{"platform wx1111111111111111", "token 2: {env.EMPTY}", "Chinese punctuation"}},
		{"secret in quotation marks", platform(`"secret": "{env.QUOTED}", "tokens": ["t"], "aes_keys": ["` + platformKey + `"]`),
			[]string{"platform wx1111111111111111", "secret: {env.QUOTED}", "quotation marks"}},
		{"account's secret", `{"accounts": [{"appid": "wx2222222222222222", "secret": "“hidden”"}]}`,
			[]string{"account wx2222222222222222", "secret", "Chinese punctuation"}},
		{"account's token", `{"accounts": [{"appid": "wx2222222222222222", "secret": "s", "tokens": ["hidden，"]}]}`,
			[]string{"account wx2222222222222222", "token 1", "Chinese punctuation"}},
		{"client's key of a shell", `{"clients": [{"name": "a", "keys": ["$CRM_KEY"], "appids": ["*"]}]}`,
			[]string{"client a", "key 1", "write {env.NAME}"}},
		{"client's key with a line break", `{"clients": [{"name": "a", "keys": ["{env.BROKEN}"], "appids": ["*"]}]}`,
			[]string{"client a", "key 1: {env.BROKEN}", "a line break"}},
		{"client's key of blanks", `{"clients": [{"name": "a", "keys": ["{env.BLANK}"], "appids": ["*"]}]}`,
			[]string{"client a", "key 1: {env.BLANK}", "blanks around it"}},
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
		{"origin with a semicolon", `{"api": ["https://api.weixin.qq.com;"]}`, []string{"api", "is not an origin"}},
		{"origin is no URL", `{"api": ["weixin"]}`, []string{"api", "is not an origin"}},
		{"proxy", `{"proxy": "ftp://user:hidden@x"}`, []string{"proxy", "not a proxy address"}},
		{"proxy with a semicolon", `{"proxy": "http://proxy.internal;"}`, []string{"proxy", "not a proxy address"}},
		{"proxy with a semicolon behind a path", `{"proxy": "http://proxy.internal:3128/;"}`, []string{"proxy", "not a proxy address"}},
		{"spill", `{"spill": "{env.BAD_ORIGIN}"}`, []string{"spill", "is not an absolute path"}},
		{"spill placeholder", `{"spill": "{env.NO_SUCH_SPILL}"}`, []string{"spill", "resolves to nothing"}},
		{"little room for answers", `{"max_answers": 1000}`, []string{"max_answers", "from 1 MiB to 512 MiB"}},
		{"much room for answers", `{"max_answers": 536870913}`, []string{"max_answers", "from 1 MiB to 512 MiB"}},
		{"few identities", `{"max_identities": 9999}`, []string{"max_identities", "from 10000 to 10000000"}},
		{"many identities", `{"max_identities": 10000001}`, []string{"max_identities", "from 10000 to 10000000"}},
		{"seal key", `{"seal_keys": ["short"]}`, []string{"seal_key 1"}},
		{"store", `{"store": {"module": "nowhere"}}`, []string{"store", "nowhere"}},
		{"null for a platform", `{"platforms": [null]}`, []string{"platforms: entry 1 is null"}},
		{"null for an account", `{"accounts": [{"appid": "wx2222222222222222", "secret": "s"}, null]}`, []string{"accounts: entry 2 is null"}},
		{"null for a client", `{"clients": [null]}`, []string{"clients: entry 1 is null"}},
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

// TestOldSecretThatCannotBeRight: one that a placeholder hides, as after a rotation, keeps nothing from loading. It is left out,
// and said without being shown.
func TestOldSecretThatCannotBeRight(t *testing.T) {
	t.Setenv("OLD", "hidden \n")
	t.Setenv("OLDER", " ")
	core, logs := observer.New(zap.WarnLevel)
	r := resolver{caddy.NewReplacer(), zap.New(core)}
	for _, kind := range []secretKind{ofWeChat, ofClient} {
		got, err := r.of(zap.String("appid", platformID)).secrets("token", []string{"t", "{env.OLD}", "{env.OLDER}", "{env.UNSET_TOKEN}", "u"}, kind)
		if err != nil || !slices.Equal(got, []string{"t", "u"}) {
			t.Errorf("%q, %v", got, err)
		}
		said := logs.TakeAll()
		if len(said) != 2 {
			t.Fatalf("%d warnings, want 2: %v", len(said), said)
		}
		for i, want := range []string{"token 2: {env.OLD}", "token 3: {env.OLDER}"} {
			text := fmt.Sprint(said[i].Message, said[i].ContextMap())
			if !strings.Contains(text, want) || !strings.Contains(text, platformID) || strings.Contains(text, "hidden") {
				t.Errorf("%s: want %s", text, want)
			}
		}
	}
	app, _, err := provisionApp(t, `{"platforms": [{"appid": "`+platformID+`", "secret": "s", "tokens": ["t", "{env.OLD}"], "aes_keys": ["`+platformKey+`"]}],
		"clients": [{"name": "a", "keys": ["k", "{env.OLD}"], "appids": ["*"]}]}`)
	if err != nil {
		t.Fatal(err)
	}
	if tokens, keys := len(app.Platforms[0].prints.tokens), len(app.Clients[0].keys); tokens != 1 || keys != 1 {
		t.Errorf("%d tokens and %d keys, want one of each", tokens, keys)
	}
	if all, problems := app.pushKeys(); len(problems) != 0 || len(all) != 1 || all[0].tokens != 1 {
		t.Errorf("for the commands: %+v, %v", all, problems)
	}
}

// TestKeysOfClients: a client's key may be any text that a request carries.
func TestKeysOfClients(t *testing.T) {
	for key, fits := range map[string]bool{
		"correct horse battery": true, "密钥 🔑": true, "$Passw0rd": true, "'abc'": true, `"abc"`: true, "env.KEY": true,
		"a\nb": false, "a\r": false, "\uFEFFabc": false, "a\tb": false, " abc": false, "abc ": false,
	} {
		t.Setenv("KEY", key)
		if _, _, err := provisionApp(t, `{"clients": [{"name": "a", "keys": ["{env.KEY}"], "appids": ["*"]}]}`); (err == nil) != fits {
			t.Errorf("%q: %v", key, err)
		}
	}
	for key, fits := range map[string]bool{"correct horse battery": true, "'abc'": true, "{env.A} {env.B}": true, "$CRM_KEY": false, "${env.KEY}": false, "a ": false} {
		if err := literalKey(key); (err == nil) != fits {
			t.Errorf("%q: %v", key, err)
		}
	}
}

// TestShortKeys: a key that can be guessed loads, and is warned about without being shown.
func TestShortKeys(t *testing.T) {
	t.Parallel()
	core, logs := observer.New(zap.WarnLevel)
	r := resolver{caddy.NewReplacer(), zap.New(core)}
	c := &Client{Name: "crm", Keys: []string{"0123456789abcdef", "hunter2"}, AppIDs: []string{"*"}}
	if err := c.provision(r.of(zap.String("client", c.Name))); err != nil || len(c.keys) != 2 {
		t.Fatalf("%d keys, %v", len(c.keys), err)
	}
	said := logs.TakeAll()
	if len(said) != 1 || !strings.Contains(said[0].Message, "a key is short") || said[0].ContextMap()["client"] != "crm" || strings.Contains(fmt.Sprint(said[0]), "hunter2") {
		t.Errorf("%v", said)
	}
}

// TestUnmeantLiterals: what was meant to name a variable is no secret, and no secret looks like it.
func TestUnmeantLiterals(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"$S", "${S}", "${env.S}", "$env.S", "ENV.S", "env.S", "File./run/s", "%S%", "%env.S%", "<env.S>", "<{env.S}>", "{{env.S}}", "${file./run/s}"} {
		if err := literalSecret(s); !errors.Is(err, errUnmeant) {
			t.Errorf("%q: %v", s, err)
		}
	}
	for _, s := range []string{
		"{env.S}", "{file./run/s}", "{$S}", "a{env.S}", "0123456789abcdef0123456789abcdef", platformKey, "environment", "filetoken", "envS", "$", "100%", "a$b", "%", "s",
	} {
		if err := literalSecret(s); err != nil {
			t.Errorf("%q: %v", s, err)
		}
	}
}

// TestSemicolons: what ends a line of nginx's is no part of a secret.
func TestSemicolons(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"{env.S};", "token;", "{file./run/s};"} {
		if err := literalSecret(s); !errors.Is(err, errSemicolon) {
			t.Errorf("%q: %v", s, err)
		}
	}
	for s, want := range map[string]error{"{env.S};": errSemicolon, "any;": nil, "{any};": nil} {
		if err := literalKey(s); !errors.Is(err, want) {
			t.Errorf("key %q: %v", s, err)
		}
	}
	if err := ofWeChat.text("value;"); !errors.Is(err, errSemicolon) {
		t.Error("a value with a semicolon is taken")
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
