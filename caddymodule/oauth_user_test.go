package caddymodule

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

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
		id := app.users().Keep(user, time.Minute, true)
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
		id := app.users().Keep(full, time.Minute, false)
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
			id := app.users().Keep(tt.user, time.Minute, false)
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
	for result, want := range map[string]float64{"ok": 5, "forbidden": 3, "method": 1, "unknown": 5} {
		if got := counted(t, app.metrics().oauth, "redeem", result); got != want {
			t.Errorf("counted %v as %s, want %v", got, result, want)
		}
	}
}
