package caddymodule

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

func TestServeUsers(t *testing.T) {
	app, _ := newTestApp(t, testConfig(""))
	core, logs := observer.New(zap.DebugLevel)
	a := &API{app: app, logger: zap.New(core)}
	crm := &Client{Name: "crm", AppIDs: []string{accountID}}
	other := &Client{Name: "other", AppIDs: []string{authorizerID}}
	user := tokens.User{
		AppID: accountID, OpenID: openID, Scope: "snsapi_base", FuncKey: "scan", State: `a"&<`,
	}
	redeem := func(method, id string, client *Client) *httptest.ResponseRecorder {
		t.Helper()
		rec := httptest.NewRecorder()
		if err := a.serveUsers(rec, httptest.NewRequest(method, usersPath+id, nil), client); err != nil {
			t.Errorf("serveUsers returned an error, with which Caddy would log the id: %v", err)
		}
		if rec.Code != http.StatusOK {
			var refusal struct {
				Code int64  `json:"errcode"`
				Msg  string `json:"errmsg"`
			}
			if err := json.Unmarshal(rec.Body.Bytes(), &refusal); err != nil || refusal.Code == 0 || refusal.Msg == "" {
				t.Errorf("an error of another shape than the API's: %s", rec.Body)
			}
		}
		for _, e := range logs.TakeAll() {
			line, _ := json.Marshal(e.ContextMap())
			if len(id) == 22 && strings.Contains(e.Message+string(line), id) {
				t.Errorf("the id was logged: %s %s", e.Message, line)
			}
		}
		if h := rec.Header(); h.Get("Cache-Control") != "no-store" || !strings.HasPrefix(h.Get("Content-Type"), "application/json") || !json.Valid(rec.Body.Bytes()) {
			t.Errorf("headers %v, body %q", h, rec.Body)
		}
		return rec
	}
	body := func(rec *httptest.ResponseRecorder) (v map[string]any) {
		t.Helper()
		if err := json.Unmarshal(rec.Body.Bytes(), &v); err != nil {
			t.Fatal(err)
		}
		return v
	}

	t.Run("once", func(t *testing.T) {
		id := app.users().Keep(t.Context(), user, tokens.UserGrant{}, time.Minute, true)
		if rec := redeem(http.MethodGet, id, other); rec.Code != http.StatusForbidden || strings.Contains(rec.Body.String(), openID) {
			t.Errorf("another client: %d %s", rec.Code, rec.Body)
		}
		if rec := redeem(http.MethodPost, id, crm); rec.Code != http.StatusMethodNotAllowed || rec.Header().Get("Allow") != "GET" {
			t.Errorf("POST: %d", rec.Code)
		}
		rec := redeem(http.MethodGet, id, crm)
		want := map[string]any{"appid": accountID, "openid": openID, "unionid": "", "scope": "snsapi_base", "funcKey": "scan", "state": `a"&<`}
		if diff := cmp.Diff(want, body(rec)); rec.Code != http.StatusOK || diff != "" {
			t.Errorf("%d (-want +got):\n%s", rec.Code, diff)
		}
		if rec := redeem(http.MethodGet, id, crm); rec.Code != http.StatusNotFound {
			t.Errorf("second time: %d", rec.Code)
		}
	})
	t.Run("everything", func(t *testing.T) {
		full := user
		full.Platform, full.UnionID, full.Snapshot = platformID, "u1", true
		full.Profile = &tokens.Profile{
			Nickname: "n", HeadImgURL: "https://thirdwx.qlogo.cn/a?x=1&y=2", Sex: 1, Language: "zh_CN",
			Province: "p", City: "c", Country: "CN", Privilege: []string{"x"},
		}
		id := app.users().Keep(t.Context(), full, tokens.UserGrant{}, time.Minute, false)
		want := map[string]any{
			"appid": accountID, "platform": platformID, "openid": openID, "unionid": "u1", "scope": "snsapi_base", "funcKey": "scan",
			"state": `a"&<`, "is_snapshotuser": true, "nickname": "n", "headimgurl": "https://thirdwx.qlogo.cn/a?x=1&y=2", "sex": 1.0,
			"language": "zh_CN", "province": "p", "city": "c", "country": "CN", "privilege": []any{"x"},
		}
		for range 2 {
			if diff := cmp.Diff(want, body(redeem(http.MethodGet, id, crm))); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		}
	})
	t.Run("authorizer of a platform", func(t *testing.T) {
		ofPlatform := user
		ofPlatform.AppID, ofPlatform.Platform = authorizerID, platformID
		for _, tt := range []struct {
			name   string
			appids []string
			user   tokens.User
			want   int
		}{
			{"client of the platform", []string{platformID}, ofPlatform, http.StatusOK},
			{"client of the account", []string{authorizerID}, ofPlatform, http.StatusOK},
			{"client of another platform", []string{otherPlatform}, ofPlatform, http.StatusForbidden},
			{"client of the platform, plain account", []string{platformID}, user, http.StatusForbidden},
		} {
			id := app.users().Keep(t.Context(), tt.user, tokens.UserGrant{}, time.Minute, false)
			if rec := redeem(http.MethodGet, id, &Client{Name: "platform", AppIDs: tt.appids}); rec.Code != tt.want {
				t.Errorf("%s: %d %s", tt.name, rec.Code, rec.Body)
			}
		}
	})
	t.Run("unknown", func(t *testing.T) {
		for _, id := range []string{"", "AAAAAAAAAAAAAAAAAAAAAA", "AAAAAAAAAAAAAAAAAAAAAA/userinfo", "a/b"} {
			if rec := redeem(http.MethodGet, id, crm); rec.Code != http.StatusNotFound {
				t.Errorf("%q: %d", id, rec.Code)
			}
		}
	})
	for result, want := range map[string]float64{"ok": 5, "forbidden": 3, "method": 1, "unknown": 4} {
		if got := counted(t, app.metrics().oauth, "redeem", result); got != want {
			t.Errorf("counted %v as %s, want %v", got, result, want)
		}
	}
}

// keptUser is a user of the account, as the callback keeps one.
func keptUser(app *App, u tokens.User, ends time.Time, once bool) (id string) {
	grant := tokens.UserGrant{OpenID: u.OpenID, AccessToken: secret.New(userToken), RefreshToken: secret.New(userRefresh), ExpiresAt: ends}
	return app.users().Keep(context.Background(), u, grant, time.Minute, once)
}

func TestServeUserInfo(t *testing.T) {
	wechat := newLoginWeChat(t)
	app, _ := newTestApp(t, testConfig(wechat.URL))
	if err := app.manager().PutTicket(t.Context(), platformID, tokens.Ticket{Value: secret.New("ticket"), CreatedAt: time.Now()}); err != nil {
		t.Fatal(err)
	}
	core, logs := observer.New(zap.DebugLevel)
	a := &API{app: app, logger: zap.New(core)}
	crm, other := &Client{Name: "crm", AppIDs: []string{"*"}}, &Client{Name: "other", AppIDs: []string{authorizerID}}
	user := tokens.User{AppID: accountID, OpenID: openID, Scope: "snsapi_userinfo"}
	live, ended := time.Now().Add(time.Hour), time.Now()
	ask := func(id, query string, client *Client) *httptest.ResponseRecorder {
		t.Helper()
		before := len(wechat.calls())
		rec := httptest.NewRecorder()
		if err := a.serveUsers(rec, httptest.NewRequest(http.MethodGet, usersPath+id+"/userinfo"+query, nil), client); err != nil {
			t.Errorf("serveUsers returned an error, with which Caddy would log the id: %v", err)
		}
		for _, private := range []string{userToken, userRefresh, "renewed-token", "component-token"} {
			if strings.Contains(rec.Body.String(), private) {
				t.Errorf("a token is told: %s", rec.Body)
			}
		}
		if rec.Code >= 400 && rec.Code < 500 && len(wechat.calls()) != before {
			t.Errorf("%d, and yet WeChat was asked", rec.Code)
		}
		if h := rec.Header(); h.Get("Cache-Control") != "no-store" || h.Get("Content-Type") != "application/json" || h.Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("headers %v", h)
		}
		return rec
	}
	refusal := func(rec *httptest.ResponseRecorder) int64 {
		t.Helper()
		var body struct {
			Code int64  `json:"errcode"`
			Msg  string `json:"errmsg"`
		}
		if err := json.Unmarshal(rec.Body.Bytes(), &body); err != nil || body.Code != 0 && body.Msg == "" {
			t.Errorf("%s: %v", rec.Body, err)
		}
		return body.Code
	}
	asked := func(want ...string) {
		t.Helper()
		if diff := cmp.Diff(want, wechat.takeCalls()); diff != "" {
			t.Errorf("asked (-want +got):\n%s", diff)
		}
	}

	t.Run("live", func(t *testing.T) {
		rec := ask(keptUser(app, user, live, false), "", crm)
		want := `{"openid":"oUser123","nickname":"张三 <b>","sex":0,"language":"","city":"","province":"","country":"",` +
			`"headimgurl":"https://thirdwx.qlogo.cn/a?x=1&y=2","privilege":["p"],"unionid":"u-profile"}` + "\n"
		if rec.Code != http.StatusOK || rec.Body.String() != want {
			t.Errorf("%d %s", rec.Code, rec.Body)
		}
		asked("/sns/userinfo zh_CN " + userToken)
	})
	t.Run("ended, in English", func(t *testing.T) {
		id := keptUser(app, user, ended, false)
		for range 2 {
			if rec := ask(id, "?lang=en", crm); rec.Code != http.StatusOK || !strings.Contains(rec.Body.String(), openID) {
				t.Errorf("%d %s", rec.Code, rec.Body)
			}
		}
		asked("/sns/oauth2/refresh_token "+accountID+" "+userRefresh, "/sns/userinfo en renewed-token", "/sns/userinfo en renewed-token")
	})
	t.Run("ended, authorizer", func(t *testing.T) {
		of := user
		of.AppID, of.Platform = authorizerID, platformID
		id := keptUser(app, of, ended, false)
		if rec := ask(id, "", &Client{Name: "p", AppIDs: []string{platformID}}); rec.Code != http.StatusOK {
			t.Errorf("client of the platform: %d %s", rec.Code, rec.Body)
		}
		if rec := ask(id, "", &Client{Name: "p", AppIDs: []string{otherPlatform}}); rec.Code != http.StatusForbidden {
			t.Errorf("client of another platform: %d %s", rec.Code, rec.Body)
		}
		asked("/sns/oauth2/component/refresh_token "+authorizerID+" "+userRefresh, "/sns/userinfo zh_CN renewed-token")
	})
	t.Run("many at once", func(t *testing.T) {
		id := keptUser(app, user, ended, false)
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				rec := httptest.NewRecorder()
				if err := a.serveUsers(rec, httptest.NewRequest(http.MethodGet, usersPath+id+"/userinfo", nil), crm); err != nil || rec.Code != http.StatusOK {
					t.Errorf("%d %s, %v", rec.Code, rec.Body, err)
				}
			})
		}
		wg.Wait()
		refreshed := 0
		for _, call := range wechat.takeCalls() {
			if strings.HasPrefix(call, "/sns/oauth2/refresh_token") {
				refreshed++
			}
		}
		if refreshed != 1 {
			t.Errorf("the token was renewed %d times", refreshed)
		}
	})
	t.Run("refusals", func(t *testing.T) {
		id := keptUser(app, user, live, false)
		for _, tt := range []struct {
			name, id, query string
			client          *Client
			status          int
			code            int64
		}{
			{"another account's client", id, "", other, http.StatusForbidden, codeUnauthorizedAPI},
			{"unknown id", "AAAAAAAAAAAAAAAAAAAAAA", "", crm, http.StatusNotFound, http.StatusNotFound},
			{"no id", "", "", crm, http.StatusNotFound, http.StatusNotFound},
			{"unknown language", id, "?lang=fr", crm, http.StatusBadRequest, codeInvalidArgs},
			{"two languages", id, "?lang=en&lang=zh_CN", crm, http.StatusBadRequest, codeInvalidArgs},
		} {
			if rec := ask(tt.id, tt.query, tt.client); rec.Code != tt.status || refusal(rec) != tt.code {
				t.Errorf("%s: %d %s", tt.name, rec.Code, rec.Body)
			}
		}
		rec := httptest.NewRecorder()
		if err := a.serveUsers(rec, httptest.NewRequest(http.MethodPost, usersPath+id+"/userinfo", nil), crm); err != nil || rec.Code != http.StatusMethodNotAllowed {
			t.Errorf("POST: %d, %v", rec.Code, err)
		}
		asked()
	})
	t.Run("once", func(t *testing.T) {
		id := keptUser(app, user, live, true)
		if rec := ask(id, "", other); rec.Code != http.StatusForbidden {
			t.Errorf("another account's client: %d", rec.Code)
		}
		for range 2 {
			if rec := ask(id, "", crm); rec.Code != http.StatusOK {
				t.Errorf("%d %s", rec.Code, rec.Body)
			}
		}
		if rec := ask(id, "", &Client{Name: "shop", AppIDs: []string{"*"}}); rec.Code != http.StatusNotFound {
			t.Errorf("the next client: %d %s", rec.Code, rec.Body)
		}
		if _, err := app.users().Redeem(t.Context(), id, "crm", nil); err == nil {
			t.Error("redeemed twice")
		}
		wechat.takeCalls()
	})
	t.Run("WeChat refuses", func(t *testing.T) {
		for _, tt := range []struct {
			name, profile, refresh string
			ends                   time.Time
			status                 int
			code                   int64
		}{
			{"only snsapi_base", `{"errcode":48001,"errmsg":"api unauthorized ` + userToken + `"}`, "", live, http.StatusOK, 48001},
			{"token void, refresh token ended", "", `{"errcode":42002,"errmsg":"refresh_token expired ` + userRefresh + `"}`, ended, http.StatusOK, 42002},
			{"about somebody else", `{"openid":"oOther","nickname":"n"}`, "", live, http.StatusBadGateway, http.StatusBadGateway},
			{"no JSON", "<html>", "", live, http.StatusBadGateway, http.StatusBadGateway},
			{"busy", `{"errcode":-1,"errmsg":"system busy"}`, "", live, http.StatusServiceUnavailable, http.StatusServiceUnavailable},
		} {
			wechat.say(tt.profile, tt.refresh)
			if rec := ask(keptUser(app, user, tt.ends, false), "", crm); rec.Code != tt.status || refusal(rec) != tt.code {
				t.Errorf("%s: %d %s", tt.name, rec.Code, rec.Body)
			}
		}
		wechat.say("", "")
	})
	for result, want := range map[string]float64{"ok": 16, "forbidden": 3, "unknown": 3, "malformed": 2, "method": 1, "refused": 2, "unavailable": 3} {
		if got := counted(t, app.metrics().oauth, "userinfo", result); got != want {
			t.Errorf("counted %v as %s, want %v", got, result, want)
		}
	}
	if logs.Len() > 0 {
		t.Errorf("logged %v", logs.All())
	}
}

func TestOAuthUserMetrics(t *testing.T) {
	t.Parallel()
	users := tokens.NewUserTable(2)
	defer users.Close()
	for range 3 {
		users.Keep(t.Context(), tokens.User{}, tokens.UserGrant{}, 0, false)
	}
	want := `
# HELP caddy_wechat_oauth_forgotten_total What was remembered of web authorizations and forgotten early, for lack of room: the tracking id, the code or the flow.
# TYPE caddy_wechat_oauth_forgotten_total counter
caddy_wechat_oauth_forgotten_total{what="code"} 0
caddy_wechat_oauth_forgotten_total{what="flow"} 0
caddy_wechat_oauth_forgotten_total{what="tracking_id"} 1
# HELP caddy_wechat_oauth_users Tracking ids that are kept.
# TYPE caddy_wechat_oauth_users gauge
caddy_wechat_oauth_users 2
`
	if err := testutil.CollectAndCompare(usersCollector{users}, strings.NewReader(want)); err != nil {
		t.Error(err)
	}
	if problems, err := testutil.CollectAndLint(usersCollector{users}); err != nil || len(problems) > 0 {
		t.Errorf("%v %v", problems, err)
	}
	r := prometheus.NewPedanticRegistry()
	for range 2 { // a configuration may mention the gateway twice
		if err := newMetrics(tokens.NewManager(), newCallTable(nil)).register(r, usersCollector{users}); err != nil {
			t.Fatal(err)
		}
	}
}
