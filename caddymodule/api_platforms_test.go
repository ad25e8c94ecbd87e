package caddymodule

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// twoPlatforms is an app with two platforms and, for each, a client that lists it; crm may act for all authorizers.
func twoPlatforms(origin string) string {
	return fmt.Sprintf(`{
		"platforms": [
			{"appid": %q, "secret": "platform-secret", "tokens": [%q], "aes_keys": [%q]},
			{"appid": %q, "secret": "other-secret", "tokens": [%q], "aes_keys": [%q]}
		],
		"accounts": [{"appid": %q, "secret": "account-secret"}],
		"clients": [
			{"name": "crm", "keys": [%q], "appids": ["*"]},
			{"name": "panel", "keys": [%q], "appids": [%q]},
			{"name": "other", "keys": [%q], "appids": [%q, "*"]},
			{"name": "both", "keys": [%q], "appids": [%q, %q]}
		],
		"api": [%q]
	}`, platformID, platformToken, platformKey, otherPlatform, otherToken, otherKey, accountID,
		crmKey, panelKey, platformID, shopKey, otherPlatform, hashedKey, platformID, otherPlatform, origin)
}

const (
	firstsToken  = "access_token=REALTOKEN-" + authorizerID + "-1"
	secondsToken = "access_token=REALTOKEN-" + authorizerID + "-BY-" + otherPlatform + "-1"
)

// askAuthorizer gets an opaque token for the authorizer as the SDK of a platform does.
func (g *gateway) askAuthorizer(platform, key string) answer {
	g.t.Helper()
	a := g.post("/cgi-bin/component/api_component_token",
		`{"component_appid":"`+platform+`","component_appsecret":"`+key+`","component_verify_ticket":"ticket@@@x"}`)
	return g.post("/cgi-bin/component/api_authorizer_token?component_access_token="+g.tokenOf(a, "component_access_token"),
		`{"component_appid":"`+platform+`","authorizer_appid":"`+authorizerID+`","authorizer_refresh_token":"r"}`)
}

// One of two platforms has no ticket, and the other one has not the account: whether the first has it cannot be told, so the caller does not
// hear 61003, on which apps give an account up, but which platform it is that has to get a ticket.
func TestAPIPlatformWithoutTicket(t *testing.T) {
	wechat := newFakeWeChat(t)
	wechat.answer(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `{"errcode":61003,"errmsg":"component is not authorized by this account"}`)
	})
	g := newGateway(t, wechat, twoPlatforms(wechat.URL), "")
	ticket := tokens.Ticket{Value: secret.New("ticket@@@1"), CreatedAt: time.Now()}
	if err := g.app.manager().PutTicket(t.Context(), platformID, ticket); err != nil {
		t.Fatal(err)
	}
	got := g.get("/"+strangerID+"/cgi-bin/user/info", bearer(crmKey))
	if got.code(t) != codeNoTicket || !strings.Contains(got.Body, otherPlatform) || strings.Contains(got.Body, platformID) {
		t.Errorf("got %d %s", got.Status, got.Body)
	}
	if err := g.app.manager().PutTicket(t.Context(), otherPlatform, ticket); err != nil {
		t.Fatal(err)
	}
	if got := g.get("/"+strangerID+"/cgi-bin/user/info", bearer(crmKey)); got.code(t) != codeNotAuthorized {
		t.Errorf("with both tickets: got %d %s", got.Status, got.Body)
	}
}

// An account that authorized two platforms is called with the token of the one that is meant.
func TestAPITwoPlatforms(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, twoPlatforms(wechat.URL), "")
	g.authorizeAt(platformID)
	g.authorizeAt(otherPlatform)
	wechat.seen()
	const target = "/" + authorizerID + "/cgi-bin/user/info"
	for _, c := range []struct{ name, key, want string }{
		{"lists neither", crmKey, firstsToken}, {"lists the first", panelKey, firstsToken}, {"lists the second", shopKey, secondsToken}, {"lists both", hashedKey, firstsToken},
	} {
		if a := g.get(target, bearer(c.key)); a.Status != http.StatusOK {
			t.Errorf("%s: got %d %s", c.name, a.Status, a.Body)
		}
		if got := wechat.one(t); got.Query != c.want {
			t.Errorf("%s: WeChat got %s, want %s", c.name, got.Query, c.want)
		}
		token := g.opaque(authorizerID, c.key)
		if g.get("/cgi-bin/user/info?access_token=" + token); wechat.one(t).Query != c.want {
			t.Errorf("%s, like an SDK: WeChat got another token than %s", c.name, c.want)
		}
		if g.get("/sns/jscode2session?js_code=c1&secret=" + c.key + "&appid=" + authorizerID); !strings.Contains(wechat.one(t).Query, "component_appid="+
			map[string]string{firstsToken: platformID, secondsToken: otherPlatform}[c.want]) {
			t.Errorf("%s: the login went by another platform", c.name)
		}
	}
	for platform, want := range map[string]string{platformID: firstsToken, otherPlatform: secondsToken} {
		token := g.tokenOf(g.askAuthorizer(platform, hashedKey), "authorizer_access_token")
		if a := g.get("/cgi-bin/user/info?access_token=" + token); a.Status != http.StatusOK {
			t.Errorf("%s: got %d %s", platform, a.Status, a.Body)
		}
		if got := wechat.one(t); got.Query != want {
			t.Errorf("%s's SDK: WeChat got %s, want %s", platform, got.Query, want)
		}
		if g.get("/wxa/gettemplatelist?access_token=" + token); wechat.one(t).Query != "access_token=REALTOKEN-"+platform+"-1" {
			t.Errorf("%s's SDK: the component's token is another platform's", platform)
		}
	}

	// A token that was asked for one platform does not become another's when that one is gone.
	token := g.tokenOf(g.askAuthorizer(platformID, hashedKey), "authorizer_access_token")
	if err := g.app.manager().Revoke(t.Context(), platformID, authorizerID, time.Now().Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	if a := g.get("/cgi-bin/user/info?access_token=" + token); a.Status != http.StatusOK || a.code(t) != 61003 {
		t.Errorf("revoked: got %d %s", a.Status, a.Body)
	}
	if calls := wechat.seen(); len(calls) != 0 {
		t.Errorf("WeChat was called: %+v", calls)
	}
	if g.get(target, bearer(hashedKey)); wechat.one(t).Query != secondsToken {
		t.Error("the other platform is not used by who names none")
	}
	// Nor does it serve a client whose rights to that platform are gone.
	token = g.tokenOf(g.askAuthorizer(otherPlatform, hashedKey), "authorizer_access_token")
	for _, c := range g.app.Clients {
		if c.Name == "both" {
			c.AppIDs = []string{platformID}
		}
	}
	if a := g.get("/cgi-bin/user/info?access_token=" + token); a.Status != http.StatusOK || a.code(t) != 48001 {
		t.Errorf("right gone: got %d %s", a.Status, a.Body)
	}
	g.noSecretsLogged(token)
}

// An opaque token is good for all of its life: over a reload, while both configurations serve, and over a restart.
func TestAPIOpaqueSurvives(t *testing.T) {
	wechat := newFakeWeChat(t)
	root := t.TempDir()
	good := func(name string, g *gateway, tokens ...string) {
		t.Helper()
		for _, token := range tokens {
			if a := g.get("/cgi-bin/user/info?access_token=" + token); a.Status != http.StatusOK || a.Body != `{"errcode":0,"errmsg":"ok"}` {
				t.Errorf("%s: got %d %s", name, a.Status, a.Body)
			}
		}
	}
	var first, second string
	t.Run("reload", func(t *testing.T) { // at whose end both configurations are cleaned up, and what they share goes
		old := newGatewayAt(t, root, twoPlatforms(wechat.URL), "")
		old.authorizeAt(otherPlatform)
		first = old.tokenOf(old.askAuthorizer(otherPlatform, hashedKey), "authorizer_access_token")
		next := newGatewayAt(t, root, twoPlatforms(wechat.URL), "")
		second = next.opaque(accountID, crmKey)
		good("the new configuration", next, first, second)
		good("the old one", old, first, second)
	})
	good("after a restart", newGatewayAt(t, root, twoPlatforms(wechat.URL), ""), first, second)
	if n := wechat.tokensIssued(tokenOwner(authorizerID, otherPlatform)); n != 1 {
		t.Errorf("WeChat issued %d tokens, want 1", n)
	}
}

// While an account that one platform has authorises another one too, calls go on by the first, and whoever may use the other alone waits for
// that.
func TestAPITwoPlatformsWhileAuthorizing(t *testing.T) {
	wechat := newFakeWeChat(t)
	begun, goOn := make(chan struct{}), make(chan struct{})
	release := sync.OnceFunc(func() { close(goOn) })
	defer release()
	wechat.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/api_query_auth") {
			body, _ := io.ReadAll(r.Body)
			r.Body = io.NopCloser(bytes.NewReader(body))
			if bytes.Contains(body, []byte(platformID)) {
				close(begun)
				<-goOn
			}
		}
		wechat.ServeHTTP(w, r)
	})
	g := newGateway(t, wechat, twoPlatforms(wechat.URL), "")
	g.authorizeAt(otherPlatform)
	m := g.app.manager()
	if err := m.PutTicket(t.Context(), platformID, tokens.Ticket{Value: secret.New("ticket@@@1"), CreatedAt: time.Now()}); err != nil {
		t.Fatal(err)
	}
	in := tokens.Intent{Platform: platformID, AppID: authorizerID, Code: secret.New("queryauthcode@@@2"), CreatedAt: time.Now()}
	if err := m.Accept(t.Context(), in); err != nil {
		t.Fatal(err)
	}
	<-begun
	const target = "/" + authorizerID + "/cgi-bin/user/info"
	wechat.seen()
	waiting := make(chan answer, 1)
	go func() { waiting <- g.get(target, bearer(panelKey)) }()
	began := time.Now()
	for name, key := range map[string]string{"lists neither": crmKey, "lists the second": shopKey, "lists both": hashedKey} {
		if a := g.get(target, bearer(key)); a.Status != http.StatusOK {
			t.Errorf("%s: got %d %s", name, a.Status, a.Body)
		}
		if got := wechat.one(t); got.Query != secondsToken {
			t.Errorf("%s: WeChat got %s, want %s", name, got.Query, secondsToken)
		}
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("they waited for %v", took)
	}
	select {
	case a := <-waiting:
		t.Errorf("lists the first: got %d %s before its exchange", a.Status, a.Body)
	default:
		release()
		if a := <-waiting; a.Status != http.StatusOK {
			t.Errorf("lists the first: got %d %s", a.Status, a.Body)
		}
		if got := wechat.one(t); got.Query != firstsToken {
			t.Errorf("lists the first: WeChat got %s, want %s", got.Query, firstsToken)
		}
	}
}
