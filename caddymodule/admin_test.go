package caddymodule

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
)

// Without the global option the routes exist and say so; with it, and nothing to report, the list is empty.
func TestAdminOrphans(t *testing.T) {
	t.Parallel()
	app, _ := newTestApp(t, testConfig("http://127.0.0.1:1"))
	for _, tt := range []struct {
		admin  *Admin
		query  string
		status int
		body   string
	}{
		{&Admin{}, "", http.StatusNotFound, ""},
		{&Admin{operations{app: app}}, "", http.StatusOK, `{"orphans":[]}`},
		{&Admin{operations{app: app}}, "?redirect=ftp://x", http.StatusBadRequest, ""},
		{&Admin{operations{app: app}}, "?redirect=https:///x", http.StatusBadRequest, ""},
		{&Admin{operations{app: app}}, "?redirect=%", http.StatusOK, `{"orphans":[]}`},
	} {
		rec := httptest.NewRecorder()
		status := http.StatusOK
		err := tt.admin.operations.orphans(rec, httptest.NewRequest(http.MethodGet, "http://localhost/wechat/orphans"+tt.query, nil))
		if refused, ok := err.(caddy.APIError); ok {
			status = refused.HTTPStatus
		} else if err != nil {
			t.Fatal(err)
		}
		if status != tt.status || rec.Body.String() != tt.body {
			t.Errorf("%q: %d %s", tt.query, status, rec.Body)
		}
	}
}

// provisionedAdmin is the admin endpoint of a configuration, as Caddy provisions it, among the generations of a process of its own:
// those of this one are all tests'.
func provisionedAdmin(t *testing.T, ctx caddy.Context, g *generations) *http.ServeMux {
	t.Helper()
	admin := new(Admin)
	if err := admin.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	if admin.operations.running != &running {
		t.Error("it does not ask the generations of the process")
	}
	admin.operations.running = g
	return muxOf(t, admin)
}

// TestAdminSpeaksForWhatIsInForce: whatever becomes of a configuration, its admin endpoint tells of the one in force, and asking
// puts none in force.
func TestAdminSpeaksForWhatIsInForce(t *testing.T) {
	t.Parallel()
	wechat := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(`{"access_token": "T", "expires_in": 7200}`))
	}))
	defer wechat.Close()
	g := new(generations)
	root := t.TempDir()
	provision := func(store, account string) (*App, *http.ServeMux) {
		t.Helper()
		app, ctx, err := provisionAt(filepath.Join(root, store), `{"accounts": [{"appid": "`+account+`", "secret": "s"}], "api": ["`+wechat.URL+`"]}`)
		if err != nil {
			t.Fatal(err)
		}
		if app.generations != &running {
			t.Error("it does not join the generations of the process")
		}
		app.generations = g
		return app, provisionedAdmin(t, ctx, g)
	}
	start := func(a *App) {
		t.Helper()
		if err := a.Start(); err != nil {
			t.Fatal(err)
		}
	}
	end := func(a *App) {
		t.Helper()
		if err := a.Cleanup(); err != nil {
			t.Error(err)
		}
	}
	// tells checks for which account an endpoint speaks, and that its other routes go the same way.
	tells := func(when string, mux *http.ServeMux, account string) {
		t.Helper()
		var status struct {
			Accounts []struct{ AppID string }
			Findings []struct{ Code string }
		}
		rec := adminCall(mux, "GET", "/wechat/status", "")
		if err := json.Unmarshal(rec.Body.Bytes(), &status); err != nil || rec.Code != http.StatusOK || len(status.Accounts) != 1 || status.Accounts[0].AppID != account {
			t.Errorf("%s: %d %s", when, rec.Code, rec.Body)
		}
		for _, f := range status.Findings {
			if f.Code == "store_down" {
				t.Errorf("%s: the store of a configuration that is over was asked: %s", when, rec.Body)
			}
		}
		if rec := adminCall(mux, "POST", "/wechat/refresh/"+account, ""); rec.Code != http.StatusOK && rec.Code != http.StatusTooManyRequests {
			t.Errorf("%s: refresh: %d %s", when, rec.Code, rec.Body)
		}
		if rec := adminCall(mux, "GET", "/wechat/ready", ""); rec.Code != http.StatusOK {
			t.Errorf("%s: ready: %d %s", when, rec.Code, rec.Body)
		}
	}
	// refuses checks that an endpoint has nobody to ask.
	refuses := func(when string, mux *http.ServeMux, want int, text string) {
		t.Helper()
		for _, op := range (&operations{}).list() {
			if op.path == "/explain" {
				continue // is the same everywhere
			}
			path := "/wechat" + strings.NewReplacer("{appid}", accountID, "{name}", verifyFileName).Replace(op.path)
			if rec := adminCall(mux, op.method, path, ""); rec.Code != want || !strings.Contains(rec.Body.String(), text) {
				t.Errorf("%s: %s %s: %d %s", when, op.method, path, rec.Code, rec.Body)
			}
		}
		if rec := adminCall(mux, "GET", "/wechat/explain?code=40001", ""); rec.Code != http.StatusOK {
			t.Errorf("%s: explain: %d %s", when, rec.Code, rec.Body)
		}
	}
	const notYet, noOption = "is in force", "no global option wechat"
	provisioning.Lock()
	bare, err := caddy.ProvisionContext(&caddy.Config{Admin: &caddy.AdminConfig{Disabled: true}})
	provisioning.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	without := provisionedAdmin(t, bare, g)

	first, admin := provision("store", accountID)
	refuses("before the first", admin, http.StatusServiceUnavailable, notYet)
	refuses("before any", without, http.StatusNotFound, noOption)
	if len(first.shared.environments) > 0 {
		t.Error("asking put a configuration in force before it was started")
	}
	start(first)
	tells("started", admin, accountID)

	second, admin := provision("store", authorizerID)
	tells("while the next is provisioned", admin, accountID)
	if n := len(first.shared.environments); n != 1 {
		t.Errorf("%d are in force", n)
	}
	end(second)
	tells("refused, of the same store", admin, accountID)

	third, admin := provision("other", authorizerID)
	end(third)
	tells("refused, of another store", admin, accountID)

	fourth, admin := provision("other", authorizerID)
	start(fourth)
	tells("begun", admin, authorizerID)
	end(fourth)
	tells("refused once it had begun", admin, accountID)
	tells("refused, without the global option", without, accountID)

	fifth, admin := provision("store", authorizerID)
	start(fifth)
	end(first)
	tells("accepted", admin, authorizerID)
	end(fifth)
	refuses("stopped", admin, http.StatusServiceUnavailable, notYet)
	refuses("accepted, without the global option", without, http.StatusNotFound, noOption)
}

// TestAdminWhileProvisioned: questions that come while Caddy still provisions the sites neither race with that nor have the
// configuration in force before all of it was told.
func TestAdminWhileProvisioned(t *testing.T) {
	t.Parallel()
	app, ctx := newTestApp(t, testConfig(""))
	app.generations = new(generations)
	admin := provisionedAdmin(t, ctx, app.generations)
	asked, started, answered := make(chan int, 1), make(chan struct{}), make(chan int, 1)
	go func() {
		status := adminCall(admin, "GET", "/wechat/status", "").Code
		asked <- status
		for begun := false; !begun; {
			select {
			case <-started:
				begun = true // and one question more
			default:
			}
			status = adminCall(admin, "GET", "/wechat/status", "").Code
		}
		answered <- status
	}()
	verifyOf(t, ctx, &Verify{Auto: true}) // while the first question is asked
	if status := <-asked; status != http.StatusServiceUnavailable {
		t.Errorf("before the start: %d", status)
	}
	app.shared.mu.Lock()
	early := len(app.shared.environments)
	app.shared.mu.Unlock()
	if early > 0 {
		t.Error("asking put a configuration in force before it was started")
	}
	if err := app.Start(); err != nil {
		t.Error(err)
	}
	close(started)
	if status := <-answered; status != http.StatusOK {
		t.Errorf("after the start: %d", status)
	}
}
