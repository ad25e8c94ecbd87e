package caddymodule

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// explained calls path for appid, has WeChat answer it so, and returns what the log says of it.
func explained(t *testing.T, g *gateway, wechat *fakeWeChat, logs *observer.ObservedLogs, appid, path, answer string) []observer.LoggedEntry {
	t.Helper()
	wechat.answer(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json; encoding=utf-8")
		io.WriteString(w, answer)
	})
	logs.TakeAll()
	if a := g.get("/"+appid+path, bearer(crmKey)); a.Status != http.StatusOK || a.Body != answer {
		t.Errorf("%s: the app got %d %q, not WeChat's answer", path, a.Status, a.Body)
	}
	return logs.FilterMessage("WeChat refused a call").All()
}

func TestAPIExplainsRefusals(t *testing.T) {
	const rid = "64f1e2d3-0a1b2c3d-4e5f6071"
	for _, c := range []struct {
		name, appid, path, answer string
		level                     zapcore.Level
		want                      map[string]any
		remedy                    string
	}{
		{"platform's whitelist", authorizerID, "/cgi-bin/user/info",
			`{"errcode":61004,"errmsg":"access clientip is not registered hint: [x] requestIP: 203.0.113.7 rid: ` + rid + `"}`, zapcore.ErrorLevel,
			map[string]any{"errcode": int64(61004), "egress_ip": "203.0.113.7", "rid": rid, "client": "crm", "platform": platformID, "permission_set": nil}, "白名单IP地址列表"},
		{"account's whitelist", accountID, "/cgi-bin/user/info",
			`{"errmsg":"invalid ip 203.0.113.8 ipv6 ::ffff:203.0.113.8, not in whitelist rid: ` + rid + `","errcode":40164}`, zapcore.ErrorLevel,
			map[string]any{"egress_ip": "203.0.113.8", "rid": rid, "platform": ""}, "IP白名单"},
		{"bad source, no address", accountID, "/cgi-bin/user/info", `{"errcode":40090,"errmsg":"invalid request source (bad client ip)"}`, zapcore.ErrorLevel,
			map[string]any{"egress_ip": nil, "rid": ""}, "IP白名单"},
		{"set not granted", authorizerID, "/cgi-bin/menu/create", `{"errcode":61007,"errmsg":"api is unauthorized to component rid: ` + rid + `"}`, zapcore.WarnLevel,
			map[string]any{"permission_set": "15 (custom menu, 菜单管理)", "granted": "no"}, "authorise it again with that set"},
		{"set granted", authorizerID, "/cgi-bin/message/mass/send", `{"errcode":48001,"errmsg":"api unauthorized"}`, zapcore.WarnLevel,
			map[string]any{"permission_set": "7 (mass messages and notices, 群发与通知)", "granted": "yes"}, "own 接口权限"},
		{"path of which nothing is known", authorizerID, "/cgi-bin/some/thing", `{"errcode":61016,"errmsg":"x"}`, zapcore.WarnLevel,
			map[string]any{"permission_set": "unknown", "granted": "unknown"}, "权限集"},
		{"one of two sets granted", authorizerID, "/cgi-bin/message/custom/send", `{"errcode":61017,"errmsg":"x"}`, zapcore.WarnLevel,
			map[string]any{"granted": "yes"}, "own 接口权限"},
		{"plain account", accountID, "/cgi-bin/menu/create", `{"errcode":48001,"errmsg":"api unauthorized"}`, zapcore.WarnLevel,
			map[string]any{"permission_set": nil, "granted": nil}, "接口权限"},
		{"daily quota", accountID, "/cgi-bin/menu/create", `{"errcode":45009,"errmsg":"reach max api daily quota limit"}`, zapcore.WarnLevel, nil, "clear_quota"},
	} {
		t.Run(c.name, func(t *testing.T) {
			wechat := newFakeWeChat(t)
			g := newGateway(t, wechat, "", "")
			g.authorize()
			core, logs := observer.New(zapcore.DebugLevel)
			g.transport().logger = zap.New(core)
			got := explained(t, g, wechat, logs, c.appid, c.path, c.answer)
			if len(got) != 1 {
				t.Fatalf("%d log lines, want 1: %v", len(got), got)
			}
			fields := got[0].ContextMap()
			if got[0].Level != c.level || fields["appid"] != c.appid || fields["api"] != c.path || !strings.Contains(fmt.Sprint(fields["remedy"]), c.remedy) {
				t.Errorf("logged at %s: %v", got[0].Level, fields)
			}
			for name, want := range c.want {
				if fields[name] != want {
					t.Errorf("%s is %v, want %v", name, fields[name], want)
				}
			}
			if again := explained(t, g, wechat, logs, c.appid, "/cgi-bin/other", c.answer); len(again) != 0 {
				t.Errorf("said again at once: %v", again)
			}
			g.noSecretsLogged()
		})
	}
}

// A login code is exchanged with the platform's token, but the right to it is the account's.
func TestAPIExplainsLoginsOfAuthorizers(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.authorize()
	core, logs := observer.New(zapcore.DebugLevel)
	g.transport().logger = zap.New(core)
	got := explained(t, g, wechat, logs, authorizerID, "/sns/oauth2/access_token?code=c1", `{"errcode":48001,"errmsg":"api unauthorized"}`)
	if len(got) != 1 {
		t.Fatalf("%d log lines, want 1: %v", len(got), got)
	}
	fields := got[0].ContextMap()
	if set := fmt.Sprint(fields["permission_set"]); fields["appid"] != authorizerID || !strings.HasPrefix(set, "4 (") || fields["granted"] != "no" {
		t.Errorf("logged %v", fields)
	}
	g.noSecretsLogged()
}

// What is between the app and WeChat is nobody else's business.
func TestAPIDoesNotExplainTheAppsOwn(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	core, logs := observer.New(zapcore.DebugLevel)
	g.transport().logger = zap.New(core)
	for _, code := range []int{-1, 0, 40003, 45011, 47001, 85009, 99999} {
		answer := fmt.Sprintf(`{"errcode":%d,"errmsg":"x"}`, code)
		if got := explained(t, g, wechat, logs, accountID, "/cgi-bin/x", answer); len(got) != 0 {
			t.Errorf("%d: logged %v", code, got)
		}
	}
}

// One account's refusals do not hide another's.
func TestAPIExplainsPerAccount(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.authorize()
	core, logs := observer.New(zapcore.DebugLevel)
	g.transport().logger = zap.New(core)
	for _, appid := range []string{accountID, authorizerID} {
		if got := explained(t, g, wechat, logs, appid, "/cgi-bin/x", `{"errcode":48001,"errmsg":"x"}`); len(got) != 1 {
			t.Errorf("%s: %d log lines, want 1", appid, len(got))
		}
	}
}

func TestTokenRefusalSaysTheRemedy(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		err  tokens.APIError
		sdk  bool
		code int64
		want []string
	}{
		{tokens.APIError{Code: 40164, Msg: "invalid ip 203.0.113.8, not in whitelist"}, true, 40164, []string{"invalid ip 203.0.113.8, not in whitelist [gateway: ", "IP白名单"}},
		{tokens.APIError{Code: 40125}, false, 40125, []string{"invalid secret: ", "option wechat"}},
		{tokens.APIError{Code: 40001, Msg: "invalid credential"}, true, 48001, []string{"40001 invalid credential", "option wechat"}},
		{tokens.APIError{Code: 45011, Msg: "limit"}, true, 45011, []string{"limit"}},
	} {
		got := tokenRefusal(&c.err, accountID, c.sdk)
		if got.status != http.StatusOK || got.code != c.code {
			t.Errorf("%d: got %d %d", c.err.Code, got.status, got.code)
		}
		for _, part := range c.want {
			if !strings.Contains(got.msg, part) {
				t.Errorf("%d: %q lacks %q", c.err.Code, got.msg, part)
			}
		}
	}
}
