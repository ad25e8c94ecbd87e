package caddymodule

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
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

// loginWeChat is the part of WeChat that a login meets. Like the real one it takes each code once.
type loginWeChat struct {
	*httptest.Server

	mu       sync.Mutex
	scope    string            // that the user grants
	failures map[string]string // by code: the answer instead of a grant
	profile  string            // the answer to /sns/userinfo
	refresh  string            // the answer to a refresh; empty: a new access token
	used     map[string]bool
	asked    []string       // path and code
	issued   map[string]int // component tokens so far, by platform
	with     []string       // component tokens of the exchanges
}

const (
	userToken   = "user-access-token"
	userRefresh = "user-refresh-token"
	goodProfile = `{"openid":"` + openID + `","nickname":"张三 <b>","headimgurl":"https://thirdwx.qlogo.cn/a?x=1&y=2","unionid":"u-profile","privilege":["p"]}`
)

func newLoginWeChat(t *testing.T) *loginWeChat {
	t.Helper()
	f := &loginWeChat{
		scope: "snsapi_base", used: make(map[string]bool), failures: make(map[string]string), issued: make(map[string]int),
		profile: goodProfile,
	}
	f.Server = httptest.NewServer(f)
	t.Cleanup(f.Close)
	return f
}

func (f *loginWeChat) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	q := r.URL.Query()
	answer := `{"errcode":-1,"errmsg":"no such path"}`
	switch r.URL.Path {
	case "/cgi-bin/component/api_component_token":
		var body struct {
			Platform string `json:"component_appid"`
		}
		_ = json.NewDecoder(r.Body).Decode(&body)
		f.issued[body.Platform]++
		answer = fmt.Sprintf(`{"component_access_token":"component-token-%d","expires_in":7200}`, f.issued[body.Platform])
	case "/cgi-bin/component/api_get_authorizer_list":
		answer = `{"total_count":0,"list":[]}`
	case "/cgi-bin/component/api_query_auth":
		answer = `{"authorization_info":{"authorizer_appid":"` + authorizerID + `","authorizer_access_token":"a","expires_in":7200,"authorizer_refresh_token":"r"}}`
	case "/sns/oauth2/component/access_token", "/sns/oauth2/access_token":
		f.asked = append(f.asked, r.URL.Path+" "+q.Get("appid")+" "+q.Get("code"))
		f.with = append(f.with, q.Get("component_access_token"))
		answer = f.exchange(q)
	case "/sns/userinfo":
		f.asked = append(f.asked, r.URL.Path+" "+q.Get("lang")+" "+q.Get("access_token"))
		answer = f.profile
	case "/sns/oauth2/refresh_token", "/sns/oauth2/component/refresh_token":
		f.asked = append(f.asked, r.URL.Path+" "+q.Get("appid")+" "+q.Get("refresh_token"))
		if answer = f.refresh; answer == "" {
			answer = `{"access_token":"renewed-token","expires_in":7200,"refresh_token":"` + userRefresh + `","openid":"` + openID + `","scope":"snsapi_userinfo"}`
		}
	}
	_, _ = w.Write([]byte(answer))
}

func (f *loginWeChat) exchange(q url.Values) string {
	code := q.Get("code")
	if answer, ok := f.failures[code]; ok {
		return answer
	}
	if f.used[code] {
		return `{"errcode":40163,"errmsg":"code been used, rid: 64f1e2d3-0a1b2c3d-4e5f6071"}`
	}
	f.used[code] = true
	grant, _ := json.Marshal(map[string]any{
		"access_token": userToken, "refresh_token": userRefresh, "expires_in": 7200, "openid": openID, "scope": f.scope,
	})
	return string(grant)
}

// answer sets what a code gets instead of a grant; nothing: a grant again.
func (f *loginWeChat) answer(code, answer string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failures[code] = answer; answer == "" {
		delete(f.failures, code)
	}
}

// RoundTrip is WeChat without a network, for tests in which time passes.
func (f *loginWeChat) RoundTrip(r *http.Request) (*http.Response, error) {
	rec := httptest.NewRecorder()
	f.ServeHTTP(rec, r)
	return rec.Result(), nil
}

func (f *loginWeChat) calls() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.asked...)
}

// takeCalls is calls, which it forgets.
func (f *loginWeChat) takeCalls() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	asked := f.asked
	f.asked = nil
	return asked
}

// say sets the answers about profiles and to refreshes; empty: good ones.
func (f *loginWeChat) say(profile, refresh string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if profile == "" {
		profile = goodProfile
	}
	f.profile, f.refresh = profile, refresh
}

// oauthFixture is a handler of wechat_oauth in front of that WeChat.
type oauthFixture struct {
	*OAuth
	t      *testing.T
	wechat *loginWeChat
	logs   *observer.ObservedLogs
}

const oauthBase = "/wx/thirdParty"

// withinBubble is an app like another, with a state of its own: what runs for the other is outside of the caller's synctest bubble.
func withinBubble(t *testing.T, like *App, client *tokens.Client) *App {
	t.Helper()
	env := *like.env
	env.API, env.Store = client, tokens.NewMemStore()
	manager := tokens.NewManager()
	inner := &shared{
		pushMemory: &pushMemory{calls: newCallTable(nil)},
		manager:    manager, users: tokens.NewUserTable(10), metrics: newMetrics(manager, newCallTable(nil)), claims: newClaims(newCallTable(nil), nil),
		feed: newFeed(), events: newEventQueue(t.Context(), nil), logins: newVisitorLimits(),
	}
	t.Cleanup(func() {
		inner.users.Close()
		manager.Close()
	})
	return &App{byAppID: like.byAppID, env: &env, shared: inner, generations: new(generations)}
}

// newOAuth provisions o, with the funcs of these tests, behind two platforms and an account.
func newOAuth(t *testing.T, o *OAuth) *oauthFixture {
	t.Helper()
	wechat := newLoginWeChat(t)
	app, ctx := newTestApp(t, testConfig(wechat.URL))
	f := provisionOAuth(t, o, ctx)
	f.wechat = wechat
	for _, p := range []string{platformID, otherPlatform} {
		err := app.manager().PutTicket(t.Context(), p, tokens.Ticket{Value: secret.New("ticket"), CreatedAt: time.Now()})
		if err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// provisionOAuth provisions o, with the funcs of these tests, in a context of the app's.
func provisionOAuth(t *testing.T, o *OAuth, ctx caddy.Context) *oauthFixture {
	t.Helper()
	if o.Base == "" {
		o.Base = oauthBase
	}
	o.Funcs = append(o.Funcs,
		&Func{Key: "verify", Prefix: "http://wechat.example.com/webVerify/"},
		&Func{Key: "scan", Prefix: "https://shop.example.com/scan?from=wechat", Scope: "snsapi_userinfo", RedirectStatus: 303},
		&Func{Key: "vip", Prefix: "https://vip.example.com/", AppIDs: []string{accountID}, TTL: caddy.Duration(time.Hour), Once: true},
	)
	if err := o.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	if err := o.Validate(); err != nil {
		t.Fatal(err)
	}
	core, logs := observer.New(zap.DebugLevel)
	o.logger = zap.New(core)
	return &oauthFixture{OAuth: o, t: t, logs: logs}
}

func (f *oauthFixture) get(target string) *httptest.ResponseRecorder {
	f.t.Helper()
	return serve(f.t, f.OAuth, httptest.NewRequest(http.MethodGet, target, nil), nil)
}

// callbackURL is how WeChat calls back for an authorizer.
func callbackURL(funcKey, code, state string) string {
	return oauthBase + "/authUserReceive/" + platformID + "/" + funcKey + "?" +
		url.Values{"code": {code}, "state": {state}, "appid": {authorizerID}}.Encode()
}

// assertNoSecrets fails if what people or operators see of a login tells what it must not.
func (f *oauthFixture) assertNoSecrets(rec *httptest.ResponseRecorder, code string) {
	f.t.Helper()
	var seen strings.Builder
	fmt.Fprint(&seen, rec.Body.String(), rec.Header())
	for _, e := range f.logs.All() {
		line, _ := json.Marshal(e.ContextMap())
		seen.WriteString(e.Message + string(line))
	}
	for _, private := range []string{code, userToken, userRefresh, "component-token", "-secret"} {
		if private != "" && strings.Contains(seen.String(), private) {
			f.t.Errorf("%q is told", private)
		}
	}
}

var landing = regexp.MustCompile(`^(.*[?&])wxTkId=([A-Za-z0-9_-]{22})#(.*)$`)

// awayStore is a store that does not answer.
type awayStore struct{ *tokens.MemStore }

var errAway = errors.New("store is away")

func (awayStore) Load(context.Context, string) ([]byte, error)   { return nil, errAway }
func (awayStore) Store(context.Context, string, []byte) error    { return errAway }
func (awayStore) Lock(context.Context, string) (func(), error)   { return nil, errAway }
func (awayStore) List(context.Context, string) ([]string, error) { return nil, errAway }

func zapRemedy(text string) zap.Field { return zap.String("remedy", text) }
