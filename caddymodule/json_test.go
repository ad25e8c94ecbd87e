package caddymodule

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// TestJSONIsRefused: what only somebody writes who writes JSON by hand is refused when it is loaded, by an error that names the module and
// the place, and says what is wrong.
func TestJSONIsRefused(t *testing.T) {
	t.Parallel()
	app := testConfig("http://127.0.0.1:1")
	const unit = `a number there is of nanoseconds`
	proxy := func(more string) string {
		return `{"upstreams": [{"dial": "127.0.0.1:1"}]` + more + `}`
	}
	tests := []struct {
		name, app, module, config string
		want                      []string // none: it is accepted
	}{
		{"window without a unit", app, "http.handlers.wechat_event", `{"timestamp_window": 300}`, []string{"timestamp_window: 300ns", unit}},
		{"window of a number", app, "http.handlers.wechat_event", `{"timestamp_window": 300000000000}`, nil},
		{"limits of forward", app, "http.handlers.wechat_event", `{"forward": true, "forward_limits": {"backend_timeout": "5s", "max_in_flight": 1, "max_waiting": 2, "try_duration": "1h"}}`, nil},
		{"limits without forward", app, "http.handlers.wechat_event", `{"forward_limits": {"max_waiting": 2}}`, []string{`put "forward": true beside it`}},
		{"a backend's time without a unit", app, "http.handlers.wechat_event", `{"forward": true, "forward_limits": {"backend_timeout": 30}}`, []string{"forward_limits: backend_timeout: 30ns", unit}},
		{"tried for no time", app, "http.handlers.wechat_event", `{"forward": true, "forward_limits": {"try_duration": -1}}`, []string{"forward_limits: try_duration: want at least 1m0s"}},
		{"a number of events below 0", app, "http.handlers.wechat_event", `{"forward": true, "forward_limits": {"max_in_flight": -1}}`, []string{"forward_limits: max_in_flight: want a number from 1"}},
		{"window of nothing", app, "http.handlers.wechat_event", `{"timestamp_window": null}`, nil},
		{"window of for ever", app, "http.handlers.wechat_event", `{"timestamp_window": "1300000h"}`, []string{"timestamp_window: want at most 100 years"}},
		{"a message's window without a unit", app, "http.handlers.wechat_message", `{"timestamp_window": 300}`, []string{"timestamp_window: 300ns", unit}},
		{"a message's window of for ever", app, "http.handlers.wechat_message", `{"timestamp_window": "1300000h"}`, []string{"timestamp_window: want at most 100 years"}},
		{"reply_timeout in seconds", app, "http.handlers.wechat_message", `{"reply_timeout": 4}`, []string{"reply_timeout: 4ns", unit}},
		{"reply_timeout in milliseconds", app, "http.handlers.wechat_message", `{"reply_timeout": 4500}`, []string{"reply_timeout: 4.5µs", unit}},
		{"reply_timeout with its unit", app, "http.handlers.wechat_message", `{"reply_timeout": "4s"}`, nil},
		{"backend_timeout in seconds", app, "http.handlers.wechat_message", `{"backend_timeout": 60}`, []string{"backend_timeout: 60ns", unit}},
		{"ttl in seconds", app, "http.handlers.wechat_oauth", `{"base": "/o", "platform": "` + platformID + `", "funcs": [{"key": "a", "prefix": "https://a.example/", "ttl": 300}]}`,
			[]string{"func a: ttl: 300ns", unit}},
		{"nothing for a func", app, "http.handlers.wechat_oauth", `{"base": "/o", "platform": "` + platformID + `", "funcs": [{"key": "a", "prefix": "https://a.example/"}, null]}`,
			[]string{"funcs: entry 2 is null"}},
		{"a func without its key", app, "http.handlers.wechat_oauth", `{"base": "/o", "platform": "` + platformID + `", "funcs": [{"key": "a", "prefix": "https://a.example/"}, {"prefix": "https://a.example/"}]}`,
			[]string{"funcs: entry 2: key is missing"}},
		{"a func for a platform's users", app, "http.handlers.wechat_oauth", `{"base": "/o", "platform": "` + platformID + `", "funcs": [{"key": "a", "prefix": "https://a.example/", "appids": ["` + platformID + `"]}]}`,
			[]string{"func a: appids: " + platformID + " is a platform"}},
		{"a mirror twice", app, "http.handlers.wechat_message", `{"mirrors": [` + proxy(`, "handler": "reverse_proxy"`) + `, {"upstreams": [{"dial": "127.0.0.1:1"}],  "handler": "reverse_proxy"}]}`,
			[]string{"mirrors: entry 2"}},
		{"a mirror's time without a unit", app, "http.handlers.wechat_message", `{"mirror_timeout": 15}`, []string{"mirror_timeout: 15ns", unit}},
		{"a mirror's time above all others", app, "http.handlers.wechat_message", `{"mirror_timeout": "31s"}`, []string{"mirror_timeout: want more than 0 and at most 30s"}},
		{"a mirror's time below none", app, "http.handlers.wechat_message", `{"mirror_timeout": "-1s"}`, []string{"mirror_timeout: want more than 0"}},
		{"fewer copies than none", app, "http.handlers.wechat_message", `{"mirror_max_in_flight": -1}`, []string{"mirror_max_in_flight: want a number from 1"}},
		{"copies without end", app, "http.handlers.wechat_message", `{"mirror_max_in_flight": 1000001}`, []string{"mirror_max_in_flight: want a number from 1 to 1000000"}},
		{"a mirror's time without a mirror", app, "http.handlers.wechat_message", `{"mirror_timeout": "15s"}`, []string{"mirror_timeout and mirror_max_in_flight are of copies for a mirror, and there is none"}},
		{"a mirror's copies without a mirror", app, "http.handlers.wechat_message", `{"mirror_max_in_flight": 7}`, []string{"mirror_timeout and mirror_max_in_flight are of copies for a mirror, and there is none"}},
		{"two mirrors", app, "http.handlers.wechat_message", `{"mirrors": [` + proxy(`, "handler": "reverse_proxy"`) + `, ` + proxy(`, "handler": "reverse_proxy", "rewrite": {"uri": "/test"}`) + `]}`, nil},
		{"nothing for a mirror", app, "http.handlers.wechat_message", `{"mirrors": [null, null]}`, []string{"mirrors: position 0"}},
		{"base of slashes", app, "http.handlers.wechat_jssdk", `{"base": "//", "hosts": ["a.example"]}`, []string{"base '//' is not a plain path"}},
		{"logins below slashes", app, "http.handlers.wechat_oauth", `{"base": "//", "platform": "` + platformID + `", "funcs": [{"key": "a", "prefix": "https://a.example/"}]}`,
			[]string{"base '//' is not a plain path"}},
		{"logins at the root", app, "http.handlers.wechat_oauth", `{"base": "/", "platform": "` + platformID + `", "funcs": [{"key": "a", "prefix": "https://a.example/"}]}`, nil},
		{"another's transport", app, "http.handlers.reverse_proxy", proxy(`, "transport": {"protocol": "wechat"}`), []string{"the transport wechat serves wechat_api alone"}},
		{"wechat_api's transport", app, "http.handlers.wechat_api", `{}`, nil},
		{"a matcher without the app", "", "http.matchers.wechat_message", `{"type": ["text"]}`, []string{"needs the global option wechat", "in JSON: the app wechat"}},
		{"a matcher with it", app, "http.matchers.wechat_message", `{"type": ["text"]}`, nil},
		{"a handler without the app", "", "http.handlers.wechat_ready", `{}`, []string{"needs the global option wechat", "in JSON: the app wechat"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			ctx := jsonContext(t, tt.app)
			provisioning.Lock()
			_, err := ctx.LoadModuleByID(tt.module, json.RawMessage(tt.config))
			provisioning.Unlock()
			wantError(t, err, tt.module, tt.want...)
		})
	}
}

// jsonContext is a context with the app wechat, or without it.
func jsonContext(t *testing.T, app string) caddy.Context {
	t.Helper()
	if app != "" {
		_, ctx := newTestApp(t, app)
		return ctx
	}
	provisioning.Lock()
	defer provisioning.Unlock()
	ctx, err := caddy.ProvisionContext(&caddy.Config{Admin: &caddy.AdminConfig{Disabled: true}})
	if err != nil {
		t.Fatal(err)
	}
	return ctx
}

// wantError checks that an error has the texts in it, and the module's name; without any text, that there is none.
func wantError(t *testing.T, err error, module string, texts ...string) {
	t.Helper()
	if len(texts) == 0 {
		if err != nil {
			t.Error(err)
		}
		return
	}
	for _, want := range append(texts, module) {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("err = %v, want %q in it", err, want)
		}
	}
}

// TestAppByJSON is TestJSONIsRefused for the app: what has no name is called by its place, and null says as little as nothing.
func TestAppByJSON(t *testing.T) {
	t.Parallel()
	platform := platformJSON(platformID)
	for config, want := range map[string]string{
		`{"platforms": [` + platform + `, {"secret": "s", "tokens": ["t"]}]}`: "platforms: entry 2: appid is missing",
		`{"accounts": [{"secret": "s"}]}`:                                     "accounts: entry 1: appid is missing",
		`{"clients": [{"keys": ["0123456789abcdef"], "appids": ["*"]}]}`:      "clients: entry 1: name is missing",
		`{"store": {}}`: "store: ",
		`{"store": {"module": "redis", "addresses": ["127.0.0.1:1"], "dial_timeout": 1}}`: "dial_timeout: 1ns is too short",
		`{"store": null}`: "",
		`{"store": null, "platforms": null, "accounts": [], "seal_keys": null, "api": null, "open": null, "spill": "", "proxy": null}`: "",
	} {
		app, _, err := provisionApp(t, config)
		switch {
		case want != "":
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: err = %v, want %q in it", config, err, want)
			}
		case err != nil:
			t.Errorf("%s: %v", config, err)
		case app.storeModule != "caddy" || len(app.apiOrigins()) != 1 || app.openOrigin() != defaultOpen:
			t.Errorf("%s: the store is %q, the origins %v and %s", config, app.storeModule, app.apiOrigins(), app.openOrigin())
		}
	}
	if !(&App{StoreRaw: json.RawMessage("null")}).storesAlone() {
		t.Error("null is no store that nodes share")
	}
}

// TestZeroValues: what is 0, null or not there gets its default.
func TestZeroValues(t *testing.T) {
	t.Parallel()
	_, ctx := newTestApp(t, testConfig("http://127.0.0.1:1"))
	for _, zero := range []string{"null", "0"} {
		provisioning.Lock()
		v, err := ctx.LoadModuleByID("http.handlers.wechat_message", json.RawMessage(fmt.Sprintf(
			`{"pushes": %[1]s, "reply_timeout": %[1]s, "backend_timeout": %[1]s, "timestamp_window": %[1]s, "max_body": %[1]s, "max_in_flight": %[1]s, "slow_reply": null, "appid": null, "mirrors": null}`, zero)))
		provisioning.Unlock()
		if err != nil {
			t.Fatal(err)
		}
		m := v.(*Message)
		if m.Pushes != 3 || m.ReplyTimeout != caddy.Duration(4500*time.Millisecond) || m.BackendTimeout != caddy.Duration(time.Minute) ||
			m.TimestampWindow != caddy.Duration(5*time.Minute) || m.MaxBody != 1<<20 || m.MaxInFlight != 10_000 || m.SlowReply != "success" {
			t.Errorf("%s: %+v", zero, m)
		}
	}
}

// TestAPIWithoutAnybody: a wechat_api that can admit no caller says so when it is loaded.
func TestAPIWithoutAnybody(t *testing.T) {
	t.Parallel()
	core, logs := observer.New(zap.WarnLevel)
	nobody, _ := newTestApp(t, `{"platforms": [`+platformJSON(platformID)+`]}`)
	crm, _ := newTestApp(t, testConfig(""))
	for _, tt := range []struct {
		app   *App
		trust bool
		want  int
	}{{nobody, false, 1}, {nobody, true, 0}, {crm, false, 0}} {
		(&API{app: tt.app, TrustLoopback: tt.trust}).warnOfNobody(zap.New(core))
		if said := logs.TakeAll(); len(said) != tt.want {
			t.Errorf("trust_loopback %v, %d clients: %v", tt.trust, len(tt.app.Clients), said)
		}
	}
}
