package caddymodule

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

func TestOAuthCallbackPages(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID, Callback: "/cb"})
	receive := oauthBase + "/authUserReceive/"
	q := "?code=the-code&state=s&appid=" + authorizerID
	tests := []struct {
		name, target, result string
		status               int
	}{
		{"unknown func", receive + platformID + "/nobody" + q, "unknown", http.StatusNotFound},
		{"unknown func of the extra callback", "/cb/nobody" + q, "unknown", http.StatusNotFound},
		{"more segments", "/cb/verify/x" + q, "unknown", http.StatusNotFound},
		{"unknown platform", receive + strangerID + "/verify" + q, "unknown", http.StatusNotFound},
		{"not an appid", receive + "x/verify" + q, "unknown", http.StatusNotFound},
		{"account the func is not for", receive + platformID + "/vip" + q, "unknown", http.StatusNotFound},
		{"no account", receive + platformID + "/verify?code=the-code&state=s", "malformed", http.StatusBadRequest},
		{"account of the wrong shape", "/cb/verify?code=the-code&appid=../../x", "malformed", http.StatusBadRequest},
		{"code twice", receive + platformID + "/verify" + q + "&code=other", "malformed", http.StatusBadRequest},
		{"account twice", receive + platformID + "/verify" + q + "&appid=" + accountID, "malformed", http.StatusBadRequest},
		{"code too long", receive + accountID + "/verify?code=" + strings.Repeat("a", maxCode+1), "malformed", http.StatusBadRequest},
		{"state too long", receive + accountID + "/verify?code=the-code&state=" + strings.Repeat("a", maxState+1), "malformed", http.StatusBadRequest},
		{"refused by the user", receive + platformID + "/verify?state=s&appid=" + authorizerID, "denied", http.StatusForbidden},
		{"refused by the user, state alone", receive + platformID + "/verify?state=s", "denied", http.StatusForbidden},
		{"refused by the user, empty code", receive + accountID + "/verify?code=&state=s", "denied", http.StatusForbidden},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f.logs.TakeAll()
			before := counted(t, f.app.metrics().oauth, "callback", tt.result)
			rec := f.get(tt.target)
			if rec.Code != tt.status || rec.Header().Get("Location") != "" || !strings.Contains(rec.Body.String(), "<h1>") {
				t.Errorf("answer %d, Location %q", rec.Code, rec.Header().Get("Location"))
			}
			if got := counted(t, f.app.metrics().oauth, "callback", tt.result) - before; got != 1 {
				t.Errorf("counted %v", got)
			}
			assertPrivate(t, rec.Header())
			f.assertNoSecrets(rec, "the-code")
			if n := f.logs.Len(); n != 1 {
				t.Errorf("%d log lines, want 1", n)
			}
		})
	}
	if calls := f.wechat.calls(); len(calls) != 0 {
		t.Errorf("WeChat was asked %q", calls)
	}
}

func TestOAuthWeChatErrors(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID})
	refusal := func(code int) string {
		return fmt.Sprintf(`{"errcode":%d,"errmsg":"about the-code, rid: 64f1e2d3-0a1b2c3d-4e5f6071"}`, code)
	}
	tests := []struct {
		name, answer, result string
		status               int
		remedy               string
		errcode              int64
	}{
		{"invalid", refusal(40029), "invalid", http.StatusBadRequest, "starts again", 40029},
		{"missing", refusal(41008), "invalid", http.StatusBadRequest, "starts again", 41008},
		{"used elsewhere", refusal(40163), "used", http.StatusGone, "starts again", 40163},
		{"expired", refusal(42003), "used", http.StatusGone, "starts again", 42003},
		{"not authorised", refusal(61003), "refused", http.StatusBadGateway, "owner authorise", 61003},
		{"address", refusal(61004), "refused", http.StatusBadGateway, "whitelist", 61004},
		{"ticket", refusal(61005), "unavailable", http.StatusServiceUnavailable, "component_verify_ticket", 61005},
		{"busy", refusal(-1), "unavailable", http.StatusServiceUnavailable, "wait", -1},
		{"quota", refusal(45009), "unavailable", http.StatusServiceUnavailable, "quota", 45009},
		{"secret", refusal(40125), "refused", http.StatusBadGateway, "secret", 40125},
		{"right", refusal(48001), "refused", http.StatusBadGateway, "网页授权", 48001},
		{"anything else", refusal(99999), "refused", http.StatusBadGateway, "documentation", 99999},
		{"HTML", "<html>the-code</html>", "unavailable", http.StatusServiceUnavailable, "api.weixin.qq.com", 0},
		{"half an answer", `{"openid":"o`, "unavailable", http.StatusServiceUnavailable, "api.weixin.qq.com", 0},
		{"no openid", `{"access_token":"` + userToken + `"}`, "unavailable", http.StatusServiceUnavailable, "api.weixin.qq.com", 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f.logs.TakeAll()
			f.wechat.answer("the-code-"+tt.name, tt.answer)
			before := counted(t, f.app.metrics().oauth, "callback", tt.result)
			rec := f.get(callbackURL("verify", "the-code-"+tt.name, "s"))
			if rec.Code != tt.status || rec.Header().Get("Location") != "" {
				t.Errorf("answer %d, Location %q", rec.Code, rec.Header().Get("Location"))
			}
			if got := counted(t, f.app.metrics().oauth, "callback", tt.result) - before; got != 1 {
				t.Errorf("counted %v as %s", got, tt.result)
			}
			f.assertNoSecrets(rec, "the-code")
			logs := f.logs.All()
			if len(logs) != 1 {
				t.Fatalf("%d log lines, want 1", len(logs))
			}
			fields := logs[0].ContextMap()
			if !strings.Contains(fields["remedy"].(string), tt.remedy) || fields["appid"] != authorizerID || fields["platform"] != platformID || fields["func"] != "verify" {
				t.Errorf("logged %v", fields)
			}
			if tt.errcode != 0 && (fields["errcode"] != tt.errcode || fields["rid"] != "64f1e2d3-0a1b2c3d-4e5f6071") {
				t.Errorf("logged %v, want errcode %d", fields, tt.errcode)
			}
		})
	}
}

// A code is never sent twice by ourselves. Where WeChat refused our token before it looked at the code, the visitor's own
// reload sends it, with the new token.
func TestOAuthAsksToTryAgainAfterARefusedComponentToken(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID})
	f.wechat.answer("the-code", `{"errcode":42001,"errmsg":"component_access_token expired, rid: 64f1e2d3-0a1b2c3d-4e5f6071"}`)
	rec := f.get(callbackURL("verify", "the-code", "s"))
	if rec.Code != http.StatusServiceUnavailable || rec.Header().Get("Location") != "" {
		t.Errorf("answer %d, Location %q", rec.Code, rec.Header().Get("Location"))
	}
	if body := rec.Body.String(); !strings.Contains(body, pageTryAgain.zh.Title) || !strings.Contains(body, `href="">`) {
		t.Errorf("the page has no link to try again:\n%s", body)
	}
	if calls := f.wechat.calls(); len(calls) != 1 {
		t.Errorf("sent the code %d times", len(calls))
	}
	if logs := f.logs.All(); len(logs) != 1 || logs[0].ContextMap()["errcode"] != int64(42001) || !strings.Contains(logs[0].ContextMap()["remedy"].(string), "tries again") {
		t.Errorf("logged %v", logs)
	}
	f.assertNoSecrets(rec, "the-code")

	f.wechat.answer("the-code", "")
	if rec = f.get(callbackURL("verify", "the-code", "s")); rec.Code != http.StatusFound {
		t.Errorf("reload: answer %d", rec.Code)
	}
	if got := strings.Join(f.wechat.with, " "); got != "component-token-1 component-token-2" {
		t.Errorf("exchanged with %s", got)
	}
}

// Where nobody knows whether WeChat took the code, it counts as used: the reload must not send it again.
func TestOAuthCodeInDoubtCountsAsUsed(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID})
	for i, answer := range []string{"<html>502</html>", `{"openid":"o`, `{"access_token":"` + userToken + `"}`} {
		code := fmt.Sprintf("code%d", i)
		f.wechat.answer(code, answer)
		if rec := f.get(callbackURL("verify", code, "s")); rec.Code != http.StatusServiceUnavailable || strings.Contains(rec.Body.String(), "<a ") {
			t.Errorf("%s: answer %d\n%s", answer, rec.Code, rec.Body)
		}
		f.wechat.answer(code, "")
		if rec := f.get(callbackURL("verify", code, "s")); rec.Code != http.StatusGone || !strings.Contains(rec.Body.String(), pageUsedCode.zh.Title) {
			t.Errorf("%s, reload: answer %d", answer, rec.Code)
		}
		if calls := f.wechat.calls(); len(calls) != i+1 {
			t.Errorf("%s: sent the code again: %q", answer, calls)
		}
	}
}

// A code that did not reach WeChat is tried again.
func TestOAuthCodeThatWasNotSent(t *testing.T) {
	f := newOAuth(t, &OAuth{})
	client, err := tokens.NewClient(tokens.ClientOptions{Origins: []string{"http://" + deadAddress(t)}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	unreached := *f.app.env
	unreached.API = client
	target := oauthBase + "/authUserReceive/" + accountID + "/verify?code=the-code&state=s"
	f.app.manager().Use(&unreached)
	if rec := f.get(target); rec.Code != http.StatusServiceUnavailable {
		t.Errorf("unreachable: answer %d", rec.Code)
	}
	f.app.manager().Use(f.app.env)
	if rec := f.get(target); rec.Code != http.StatusFound {
		t.Errorf("reload: answer %d", rec.Code)
	}
}

func TestOAuthWeChatUnreachableOrWithoutTicket(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID})
	f.wechat.Close()
	rec := f.get(callbackURL("verify", "the-code", "s"))
	if rec.Code != http.StatusServiceUnavailable {
		t.Errorf("unreachable: answer %d", rec.Code)
	}
	f.assertNoSecrets(rec, "the-code")
	if got := loginFailure(fmt.Errorf("platform: %w", tokens.ErrNoTicket)); got.page.status != http.StatusServiceUnavailable || !strings.Contains(got.remedy, "component_verify_ticket") {
		t.Errorf("no ticket: %+v", got)
	}
	if got := loginFailure(fmt.Errorf("x: %w", tokens.ErrNotAuthorized)); got.page.status != http.StatusBadGateway {
		t.Errorf("not authorized: %+v", got)
	}
	if got := loginFailure(context.Canceled); got.level != zap.DebugLevel {
		t.Errorf("visitor left: %+v", got)
	}
}

func TestOAuthPageLanguage(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID})
	for accept, want := range map[string]string{"": pageDenied.zh.Title, "en-US,en": pageDenied.en.Title} {
		r := httptest.NewRequest(http.MethodGet, callbackURL("verify", "", "s"), nil)
		r.Header.Set("Accept-Language", accept)
		if body := serve(t, f.OAuth, r, nil).Body.String(); !strings.Contains(body, want) {
			t.Errorf("Accept-Language %q: %s", accept, body)
		}
	}
}
