package caddymodule

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// platformWeChat is the part of WeChat that the authorization of a platform meets. Like the real one it takes each
// authorization code once.
type platformWeChat struct {
	*httptest.Server

	mu       sync.Mutex
	made     int               // pre-authorization codes
	asked    map[string]int    // calls, by path
	used     map[string]bool   // authorization codes
	sets     []int             // that are granted
	info     string            // authorizer_info
	failures map[string]string // by path: the answer instead
	gate     chan struct{}     // held back until it is closed: exchanges
}

const (
	preAuthPath   = "/cgi-bin/component/api_create_preauthcode"
	queryAuthPath = "/cgi-bin/component/api_query_auth"
	infoPath      = "/cgi-bin/component/api_get_authorizer_info"

	authorizeBase   = "/wx/authorize"
	grantedRefresh  = "refreshtoken@@@granted"
	grantedAccess   = "access-token-granted"
	accountInfoJSON = `{"nick_name":"小店 <b>","head_img":"http://wx.qlogo.cn/mmopen/a/0","user_name":"gh_0123456789ab","principal_name":"某公司"}`
)

func newPlatformWeChat(t *testing.T) *platformWeChat {
	t.Helper()
	f := &platformWeChat{
		asked: make(map[string]int), used: make(map[string]bool), failures: make(map[string]string),
		sets: []int{1, 2, 15}, info: accountInfoJSON,
	}
	f.Server = httptest.NewServer(f)
	t.Cleanup(f.Close)
	return f
}

func (f *platformWeChat) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var body struct {
		Platform string `json:"component_appid"`
		Code     string `json:"authorization_code"`
		AppID    string `json:"authorizer_appid"`
	}
	_ = json.NewDecoder(r.Body).Decode(&body)
	f.mu.Lock()
	f.asked[r.URL.Path]++
	gate := f.gate
	f.mu.Unlock()
	if gate != nil && r.URL.Path == queryAuthPath {
		<-gate
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	sets := make([]string, len(f.sets))
	for i, id := range f.sets {
		sets[i] = fmt.Sprintf(`{"funcscope_category":{"id":%d}}`, id)
	}
	answer := `{"errcode":-1,"errmsg":"no such path"}`
	switch r.URL.Path {
	case "/cgi-bin/component/api_component_token":
		answer = `{"component_access_token":"component-token","expires_in":7200}`
	case "/cgi-bin/component/api_get_authorizer_list":
		answer = `{"total_count":0,"list":[]}`
	case preAuthPath:
		f.made++
		answer = fmt.Sprintf(`{"pre_auth_code":"preauthcode@@@%d","expires_in":1800}`, f.made)
	case queryAuthPath:
		answer = fmt.Sprintf(`{"authorization_info":{"authorizer_appid":%q,"authorizer_access_token":%q,"expires_in":7200,"authorizer_refresh_token":%q,"func_info":[%s]}}`,
			authorizerID, grantedAccess, grantedRefresh, strings.Join(sets, ","))
		if f.used[body.Code] || !strings.HasPrefix(body.Code, "queryauthcode@@@") {
			answer = `{"errcode":61009,"errmsg":"code is invalid rid: 64f1e2d3-0a1b2c3d-4e5f6071"}`
		}
		if f.failures[queryAuthPath] == "" {
			f.used[body.Code] = true
		}
	case infoPath:
		answer = fmt.Sprintf(`{"authorizer_info":%s,"authorization_info":{"authorizer_appid":%q,"authorizer_refresh_token":%q,"func_info":[%s]}}`,
			f.info, body.AppID, grantedRefresh, strings.Join(sets, ","))
	}
	if failure := f.failures[r.URL.Path]; failure != "" {
		answer = failure
	}
	_, _ = w.Write([]byte(answer))
}

func (f *platformWeChat) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *platformWeChat) count(path string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.asked[path]
}

// authorizeFixture is a handler of wechat_authorize in front of that WeChat.
type authorizeFixture struct {
	*Authorize
	t      *testing.T
	wechat *platformWeChat
	logs   *observer.ObservedLogs
}

// newAuthorize provisions a behind two platforms and an account.
func newAuthorize(t *testing.T, a *Authorize) *authorizeFixture {
	t.Helper()
	wechat := newPlatformWeChat(t)
	app, ctx := newTestApp(t, testConfig(wechat.URL))
	if a.Platform == "" {
		a.Platform = platformID
	}
	f := &authorizeFixture{Authorize: a, t: t, wechat: wechat}
	f.provision(ctx)
	for _, p := range []string{platformID, otherPlatform} {
		if err := app.manager().PutTicket(t.Context(), p, tokens.Ticket{Value: secret.New("ticket"), CreatedAt: time.Now()}); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func (f *authorizeFixture) provision(ctx caddy.Context) {
	f.t.Helper()
	if f.Base == "" {
		f.Base = authorizeBase
	}
	if err := f.Provision(ctx); err != nil {
		f.t.Fatal(err)
	}
	if err := f.Validate(); err != nil {
		f.t.Fatal(err)
	}
	core, logs := observer.New(zap.DebugLevel)
	f.Authorize.logger, f.logs = zap.New(core), logs
}

// get asks for an address as a visitor with that address of their own, with headers in pairs.
func (f *authorizeFixture) get(target string, headers ...string) *httptest.ResponseRecorder {
	f.t.Helper()
	return serve(f.t, f.Authorize, visit(http.MethodGet, target, headers...), nil)
}

func visit(method, target string, headers ...string) *http.Request {
	r := httptest.NewRequest(method, target, nil)
	for pair := range slices.Chunk(headers, 2) {
		r.Header.Set(pair[0], pair[1])
	}
	return r
}

// begun is a browser that was sent to WeChat.
type begun struct {
	link     *url.URL // WeChat's page
	callback *url.URL // redirect_uri
	cookie   string   // as the browser sends it
}

func (b begun) state() string { return b.callback.Query().Get(stateParameter) }

// back is where WeChat sends the browser with a code.
func (b begun) back(code string) string {
	q := b.callback.Query()
	q.Set("auth_code", code)
	q.Set("expires_in", "3600")
	return b.callback.Path + "?" + q.Encode()
}

// begin starts an authorization.
func (f *authorizeFixture) begin(query string, headers ...string) begun {
	f.t.Helper()
	rec := f.get(authorizeBase+"/go?"+query, headers...)
	if rec.Code != http.StatusFound {
		f.t.Fatalf("go?%s: %d\n%s", query, rec.Code, rec.Body)
	}
	return readStart(f.t, rec)
}

func readStart(t *testing.T, rec *httptest.ResponseRecorder) (b begun) {
	t.Helper()
	var err error
	if b.link, err = url.Parse(rec.Header().Get("Location")); err != nil {
		t.Fatal(err)
	}
	if b.callback, err = url.Parse(b.link.Query().Get("redirect_uri")); err != nil {
		t.Fatal(err)
	}
	for _, c := range rec.Result().Cookies() {
		b.cookie = c.Name + "=" + c.Value
	}
	if b.state() == "" || b.cookie == "" {
		t.Fatalf("no state or no cookie: %v", rec.Header())
	}
	return b
}

// assertNoSecrets fails if pages or the log tell what they must not.
func (f *authorizeFixture) assertNoSecrets(rec *httptest.ResponseRecorder, more ...string) {
	f.t.Helper()
	var seen strings.Builder
	fmt.Fprint(&seen, rec.Body.String(), rec.Header())
	for _, e := range f.logs.All() {
		line, _ := json.Marshal(e.ContextMap())
		seen.WriteString(e.Message + string(line))
	}
	for _, private := range append(more, "queryauthcode@@@", grantedAccess, grantedRefresh, "component-token", "platform-secret") {
		if strings.Contains(seen.String(), private) {
			f.t.Errorf("%q is told", private)
		}
	}
}
