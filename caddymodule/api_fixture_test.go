package caddymodule

import (
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// The clients of the tests on wechat_api.
const (
	crmKey      = "crm-key-0123456789"    // all accounts and authorizers
	crmOldKey   = "crm-old-key-0123456"   // of the same client
	shopKey     = "shop-key-0123456789"   // the account, /cgi-bin/user/* and two more paths
	panelKey    = "panel-key-0123456789"  // the platform, by name
	hashedKey   = "hashed-key-0123456789" // known by its sum only; the authorizer
	strangerKey = "stranger-key-01234567"
)

// seenCall is a request as WeChat got it.
type seenCall struct {
	Method, Path, Query, Host string
	Header                    http.Header
	Body                      string
	Length                    int64
	Chunked                   bool
}

// fakeWeChat is as much of WeChat as these tests need. It refuses tokens that are not the newest of their kind.
type fakeWeChat struct {
	*httptest.Server

	mu       sync.Mutex
	issued   map[string]int    // by kind of token and appid
	current  map[string]string // the token in force
	calls    []seenCall        // other than for tokens
	refuseBy int64             // errcode for a token that is not in force
	grantErr string            // in the place of each answer to a request for a token
	slow     time.Duration     // what one takes
	pushErr  string            // in the place of each answer to api_start_push_ticket
	pushes   chan struct{}     // if not nil, gets one for each of those
	api      http.HandlerFunc  // what an API call with a good token gets
	ahead    time.Duration     // of its clock, by the Date of its answers
}

func newFakeWeChat(t testing.TB) *fakeWeChat {
	t.Helper()
	f := &fakeWeChat{issued: map[string]int{}, current: map[string]string{}, refuseBy: 40001}
	f.Server = httptest.NewServer(f)
	t.Cleanup(f.Close)
	return f
}

func (f *fakeWeChat) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	w.Header().Set("Date", time.Now().Add(f.ahead).UTC().Format(http.TimeFormat))
	f.mu.Unlock()
	switch strings.TrimPrefix(r.URL.Path, "/cgi-bin/") {
	case "stable_token":
		f.grant(w, r, "access_token", "appid", "")
	case "component/api_component_token":
		f.grant(w, r, "component_access_token", "component_appid", "")
	case "component/api_authorizer_token":
		f.grant(w, r, "authorizer_access_token", "authorizer_appid", `,"authorizer_refresh_token":"refreshtoken@@@real"`)
	case "component/api_query_auth":
		var body map[string]string
		_ = json.NewDecoder(r.Body).Decode(&body)
		fmt.Fprintf(w, `{"authorization_info":{"authorizer_appid":%q,"authorizer_access_token":%q,"expires_in":7200,"authorizer_refresh_token":"refreshtoken@@@real","func_info":[{"funcscope_category":{"id":1}},{"funcscope_category":{"id":7}}]}}`,
			authorizerID, f.issue(tokenOwner(authorizerID, body["component_appid"]), false))
	case "component/api_get_authorizer_list": // the gateway's own, now and then: not one of the test's calls
		io.WriteString(w, `{"total_count":0,"list":[]}`)
	case "component/api_start_push_ticket":
		f.mu.Lock()
		pushErr, pushes := f.pushErr, f.pushes
		f.mu.Unlock()
		io.WriteString(w, cmp.Or(pushErr, `{"errcode":0,"errmsg":"ok"}`))
		if pushes != nil {
			pushes <- struct{}{}
		}
	default:
		f.call(w, r)
	}
}

func (f *fakeWeChat) grant(w http.ResponseWriter, r *http.Request, name, owner, more string) {
	var body map[string]any
	_ = json.NewDecoder(r.Body).Decode(&body)
	appid, _ := body[owner].(string)
	force, _ := body["force_refresh"].(bool)
	f.mu.Lock()
	grantErr, slow := f.grantErr, f.slow
	f.mu.Unlock()
	<-time.After(slow)
	if grantErr != "" {
		io.WriteString(w, grantErr)
		return
	}
	if owner == "authorizer_appid" {
		platform, _ := body["component_appid"].(string)
		appid = tokenOwner(appid, platform)
	}
	fmt.Fprintf(w, `{%q:%q,"expires_in":7200%s}`, name, f.issue(appid, owner == "appid" && !force), more)
}

// tokenOwner names in a token whose it is: an authorizer has another one with each platform.
func tokenOwner(authorizer, platform string) string {
	if platform == otherPlatform {
		return authorizer + "-BY-" + platform
	}
	return authorizer
}

// issue makes a token; with keep, one that is in force is given again, as stable_token does.
func (f *fakeWeChat) issue(appid string, keep bool) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if current := f.current[appid]; keep && current != "" {
		return current
	}
	f.issued[appid]++
	f.current[appid] = fmt.Sprintf("REALTOKEN-%s-%d", appid, f.issued[appid])
	return f.current[appid]
}

// spoil makes the token in force one that WeChat refuses; stable_token gives a new one at once.
func (f *fakeWeChat) spoil(appid string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.current[appid] = ""
}

func (f *fakeWeChat) tokensIssued(appid string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.issued[appid]
}

func (f *fakeWeChat) inForce(token string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, current := range f.current {
		if token != "" && token == current {
			return true
		}
	}
	return false
}

func (f *fakeWeChat) call(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // the caller of the gateway left
	}
	f.mu.Lock()
	f.calls = append(f.calls, seenCall{
		Method: r.Method, Path: r.URL.EscapedPath(), Query: r.URL.RawQuery, Host: r.Host, Header: r.Header.Clone(), Body: string(body),
		Length: r.ContentLength, Chunked: len(r.TransferEncoding) > 0,
	})
	api, refuseBy := f.api, f.refuseBy
	f.mu.Unlock()
	q := r.URL.Query()
	token := q.Get("access_token") + q.Get("component_access_token")
	if token != "" && strings.HasPrefix(token, "REALTOKEN") && !f.inForce(token) {
		w.Header().Set("Content-Type", "application/json; encoding=utf-8")
		fmt.Fprintf(w, `{"errcode":%d,"errmsg":"invalid credential rid: 64f1e2d3-0a1b2c3d-4e5f6071"}`, refuseBy)
		return
	}
	if api != nil {
		r.Body = io.NopCloser(strings.NewReader(string(body)))
		api(w, r)
		return
	}
	w.Header().Set("Content-Type", "application/json; encoding=utf-8")
	io.WriteString(w, `{"errcode":0,"errmsg":"ok"}`)
}

func (f *fakeWeChat) answer(h http.HandlerFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.api = h
}

// writeRaw answers with these bytes, whatever they are, and hangs up.
func writeRaw(t *testing.T, w http.ResponseWriter, raw string) {
	t.Helper()
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		t.Error(err)
		return
	}
	defer conn.Close()
	io.WriteString(conn, raw)
}

// seen returns the API calls so far, and forgets them.
func (f *fakeWeChat) seen() []seenCall {
	f.mu.Lock()
	defer f.mu.Unlock()
	calls := f.calls
	f.calls = nil
	return calls
}

// one returns the only API call since the last look.
func (f *fakeWeChat) one(t *testing.T) seenCall {
	t.Helper()
	calls := f.seen()
	if len(calls) != 1 {
		t.Fatalf("WeChat saw %d calls, want 1: %+v", len(calls), calls)
	}
	return calls[0]
}

// gateway is wechat_api on a socket, in front of a fake WeChat.
type gateway struct {
	*httptest.Server
	t    testing.TB
	app  *App
	api  *API
	logs *observer.ObservedLogs
}

// gatewayConfig is the app of these tests.
func gatewayConfig(origins ...string) string {
	list, _ := json.Marshal(origins)
	return fmt.Sprintf(`{
		"platforms": [{"appid": %q, "secret": "platform-secret", "tokens": [%q], "aes_keys": [%q]}],
		"accounts": [{"appid": %q, "secret": "account-secret"}],
		"clients": [
			{"name": "crm", "keys": [%q, %q], "appids": ["*"]},
			{"name": "shop", "keys": [%q], "appids": [%q], "paths": ["/cgi-bin/user/*", "/sns/*", "/cgi-bin/media/*"]},
			{"name": "panel", "keys": [%q], "appids": [%q]},
			{"name": "hashed", "key_sha256": ["%x"], "appids": [%q]}
		],
		"api": %s
	}`, platformID, platformToken, platformKey, accountID, crmKey, crmOldKey, shopKey, accountID, panelKey, platformID,
		sha256.Sum256([]byte(hashedKey)), authorizerID, list)
}

// newGateway starts a gateway. handler is the JSON of wechat_api, config that of the app; both may be empty. Tests that
// use it are not parallel: provisioning a reverse_proxy writes variables of Caddy's packages.
func newGateway(t testing.TB, wechat *fakeWeChat, config, handler string) *gateway {
	t.Helper()
	if config == "" {
		config = gatewayConfig(wechat.URL)
	}
	return newGatewayAt(t, t.TempDir(), config, handler)
}

// newGatewayAt is newGateway with its storage in a folder, which several gateways may share.
func newGatewayAt(t testing.TB, root, config, handler string) *gateway {
	t.Helper()
	storage, _ := json.Marshal(map[string]string{"module": "file_system", "root": root})
	g := provisionGateway(t, &caddy.Config{
		Admin: &caddy.AdminConfig{Disabled: true}, StorageRaw: storage, AppsRaw: caddy.ModuleMap{"wechat": json.RawMessage(config)},
	}, handler)
	core, logs := observer.New(zapcore.DebugLevel)
	g.logs, g.api.logger = logs, zap.New(core)
	return g
}

// provisionGateway is newGateway for a configuration of Caddy's.
func provisionGateway(t testing.TB, config *caddy.Config, handler string) *gateway {
	t.Helper()
	ctx, err := caddy.ProvisionContext(config)
	if err != nil {
		t.Fatal(err)
	}
	app, err := loadApp(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := app.Cleanup(); err != nil {
			t.Errorf("cleanup: %v", err)
		}
	})
	if handler == "" {
		handler = "{}"
	}
	ctx, cancel := caddy.NewContext(ctx)
	t.Cleanup(cancel) // or Caddy would know of failures at addresses that are other servers' by then
	module, err := ctx.LoadModuleByID("http.handlers.wechat_api", json.RawMessage(handler))
	if err != nil {
		t.Fatal(err)
	}
	g := &gateway{t: t, app: app, api: module.(*API)}
	g.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// With log_credentials, so that what is logged is what the handler lets through.
		server := &caddyhttp.Server{Logs: &caddyhttp.ServerLogConfig{ShouldLogCredentials: true}}
		r = caddyhttp.PrepareRequest(r, caddy.NewReplacer(), w, server)
		if err := g.api.ServeHTTP(w, r, nil); err != nil {
			t.Errorf("handler returned an error, with which Caddy would log the URI: %v", err)
		}
	}))
	t.Cleanup(g.Close)
	return g
}

// authorize makes the authorizer authorize the platform.
func (g *gateway) authorize() {
	g.t.Helper()
	g.authorizeAt(platformID)
}

func (g *gateway) authorizeAt(platform string) {
	g.t.Helper()
	m := g.app.manager()
	if err := m.PutTicket(g.t.Context(), platform, tokens.Ticket{Value: secret.New("ticket@@@1"), CreatedAt: time.Now()}); err != nil {
		g.t.Fatal(err)
	}
	if _, err := m.ExchangeAuthCode(g.t.Context(), platform, authorizerID, secret.New("queryauthcode@@@1")); err != nil {
		g.t.Fatal(err)
	}
}

// answer is what a caller got.
type answer struct {
	Status int
	Header http.Header
	Body   string
	Length int64
}

func (a answer) code(t *testing.T) int64 {
	t.Helper()
	if a.Header.Get("Content-Type") == "" || strings.HasSuffix(a.Body, "\n") {
		t.Errorf("answer has no Content-Type or ends in a newline: %q", a.Body)
	}
	var shape struct {
		Code *int64  `json:"errcode"`
		Msg  *string `json:"errmsg"`
	}
	if err := json.Unmarshal([]byte(a.Body), &shape); err != nil || shape.Code == nil || shape.Msg == nil || *shape.Msg == "" {
		t.Fatalf("answer is not an error in WeChat's shape: %d %q", a.Status, a.Body)
	}
	return *shape.Code
}

// do sends a request; headers are "Name: value".
func (g *gateway) do(method, target string, body io.Reader, headers ...string) answer {
	g.t.Helper()
	req, err := http.NewRequestWithContext(g.t.Context(), method, g.URL+target, body)
	if err != nil {
		g.t.Fatal(err)
	}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Add(name, value)
	}
	return g.send(req)
}

func (g *gateway) send(req *http.Request) answer {
	g.t.Helper()
	res, err := g.Client().Transport.RoundTrip(req)
	if err != nil {
		g.t.Fatal(err)
	}
	defer res.Body.Close()
	got, err := io.ReadAll(res.Body)
	if err != nil {
		g.t.Fatal(err)
	}
	a := answer{res.StatusCode, res.Header, string(got), res.ContentLength}
	if strings.Contains(a.Body, "REALTOKEN") || strings.Contains(a.Body, "account-secret") {
		g.t.Errorf("the answer shows a secret: %q", a.Body)
	}
	return a
}

func (g *gateway) get(target string, headers ...string) answer {
	g.t.Helper()
	return g.do(http.MethodGet, target, nil, headers...)
}

func (g *gateway) post(target, body string, headers ...string) answer {
	g.t.Helper()
	return g.do(http.MethodPost, target, strings.NewReader(body), headers...)
}

func bearer(key string) string { return "Authorization: Bearer " + key }

// opaque gets an opaque token as an SDK does.
func (g *gateway) opaque(appid, key string) string {
	g.t.Helper()
	a := g.get("/cgi-bin/token?grant_type=client_credential&appid=" + appid + "&secret=" + key)
	return g.tokenOf(a, "access_token")
}

func (g *gateway) tokenOf(a answer, name string) string {
	g.t.Helper()
	var body map[string]any
	if err := json.Unmarshal([]byte(a.Body), &body); err != nil {
		g.t.Fatalf("%q: %v", a.Body, err)
	}
	token, _ := body[name].(string)
	if token == "" {
		g.t.Fatalf("no %s in %q", name, a.Body)
	}
	return token
}

// noSecretsLogged fails if a known secret is anywhere in the log.
func (g *gateway) noSecretsLogged(more ...string) {
	g.t.Helper()
	for _, e := range g.logs.All() {
		text := e.Message + fmt.Sprint(e.ContextMap())
		for _, s := range append(more, "REALTOKEN", crmKey, shopKey, panelKey, hashedKey, "account-secret", "platform-secret") {
			if strings.Contains(text, s) {
				g.t.Errorf("log shows %q: %s", s, text)
			}
		}
	}
}
