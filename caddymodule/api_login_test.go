package caddymodule

import (
	"net/http"
	"strings"
	"testing"
)

func TestAPIUserTokensPass(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	opaque := g.opaque(accountID, crmKey)
	wechat.seen()
	const query = "access_token=USER_TOKEN&openid=o1&lang=zh_CN"
	for _, target := range []string{"/sns/userinfo?" + query, "/" + accountID + "/sns/auth?" + query} {
		if a := g.get(target, bearer(crmKey)); a.Status != http.StatusOK {
			t.Errorf("got %d %s", a.Status, a.Body)
		}
		if got := wechat.one(t); got.Query != query || !strings.HasPrefix(got.Path, "/sns/") || got.Header.Get("Authorization") != "" {
			t.Errorf("WeChat got %s?%s", got.Path, got.Query)
		}
	}
	// They need no client, since they need nothing of the gateway's; but a key that is shown must be right.
	for _, target := range []string{"/sns/userinfo?" + query, "/sns/auth?" + query, "/sns/oauth2/refresh_token?appid=" + accountID + "&refresh_token=USER_REFRESH"} {
		if a := g.get(target); a.Status != http.StatusOK || a.Body != `{"errcode":0,"errmsg":"ok"}` {
			t.Errorf("without a client: got %d %s", a.Status, a.Body)
		}
		if got := wechat.one(t); got.Path+"?"+got.Query != target {
			t.Errorf("without a client: WeChat got %s?%s, want %s", got.Path, got.Query, target)
		}
		if a := g.get(target, bearer(strangerKey)); a.Status != http.StatusUnauthorized || a.code(t) != 40125 {
			t.Errorf("a wrong key: got %d %s", a.Status, a.Body)
		}
		if a := g.get(target, bearer(hashedKey)); a.Status != http.StatusOK {
			t.Errorf("any client: got %d %s", a.Status, a.Body)
		}
		wechat.seen()
	}
	if n := counted(t, g.app.metrics().apiRequests, "", outcomeOK); n != 3 {
		t.Errorf("%v calls without a client are counted, want 3", n)
	}
	for _, target := range []string{"/sns/userinfo?openid=o1", "/sns/userinfo?access_token=&openid=o1", "/sns/oauth2/refresh_token?appid=" + accountID} {
		if a := g.get(target); a.code(t) != 41001 {
			t.Errorf("%s: got %d %s, want a refusal", target, a.Status, a.Body)
		}
	}
	if a := g.get("/sns/anything/else?" + query); a.code(t) != 40001 {
		t.Errorf("other paths below /sns: got %d %s", a.Status, a.Body)
	}
	if a := g.get("/sns/userinfo?access_token=" + opaque + "&openid=o1"); a.Status != http.StatusOK || a.code(t) != 48001 {
		t.Errorf("an opaque token in the place of the user's: got %d %s", a.Status, a.Body)
	}
	if a := g.get("/sns/userinfo?access_token="+opaque, bearer(crmKey)); a.code(t) != 48001 {
		t.Errorf("an opaque token, with Bearer: got %d %s", a.Status, a.Body)
	}
	if calls := wechat.seen(); len(calls) != 0 {
		t.Errorf("WeChat was called: %+v", calls)
	}
	if a := g.get("/sns/oauth2/refresh_token?appid="+accountID+"&refresh_token=USER_REFRESH&access_token="+opaque, bearer(crmKey)); a.Status != http.StatusOK {
		t.Errorf("got %d %s", a.Status, a.Body)
	}
	if got := wechat.one(t); got.Query != "appid="+accountID+"&refresh_token=USER_REFRESH" {
		t.Errorf("a path without a token: WeChat got %s?%s", got.Path, got.Query)
	}
	if a := g.get("/sns/oauth2/refresh_token?appid=" + accountID + "&refresh_token=" + opaque); a.code(t) != 48001 {
		t.Errorf("an opaque token to refresh: got %d %s", a.Status, a.Body)
	}
}

// Exactly the one token goes on, as it came, and no key of the client's.
func TestAPIUserTokenOnce(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	for query, want := range map[string]string{
		"openid=o1&access_token=U%2B1&lang=zh_CN":                                             "openid=o1&access_token=U%2B1&lang=zh_CN",
		"access_token=U&openid=o1&access_token=U":                                             "access_token=U&openid=o1",
		"access_token=U&Access_Token=U&secret=" + crmKey + "&appsecret=" + crmKey + "&b=%7e&": "access_token=U&b=%7e&",
	} {
		if a := g.get("/sns/userinfo?" + query); a.Status != http.StatusOK {
			t.Errorf("%s: got %d %s", query, a.Status, a.Body)
		}
		if got := wechat.one(t); got.Query != want {
			t.Errorf("%s: WeChat got %s, want %s", query, got.Query, want)
		}
	}
	for _, query := range []string{"access_token=U&access_token=V", "access_token=U;access_token=V", "access_token=U;appid=x"} {
		if a := g.get("/sns/userinfo?" + query); a.code(t) != 40097 {
			t.Errorf("%s: got %d %s", query, a.Status, a.Body)
		}
	}
	if calls := wechat.seen(); len(calls) != 0 {
		t.Errorf("WeChat was called: %+v", calls)
	}
}

// However a caller writes appid and secret, those that WeChat gets are the gateway's, once each, and for the account
// that was checked.
func TestAPILoginNamesOneAccount(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.authorize()
	wechat.seen()
	const mine = "appid=" + accountID + "&secret=" + shopKey + "&js_code=c1"
	const good = "js_code=c1&appid=" + accountID + "&secret=account-secret"
	for name, query := range map[string]string{
		"plain": mine, "case": "AppID=" + accountID + "&SECRET=" + shopKey + "&js_code=c1", "twice the same": mine + "&appid=" + accountID,
		"encoded name": "%61ppid=" + accountID + "&se%63ret=" + shopKey + "&js_code=c1", "a component": mine + "&component_appid=" + platformID + "&Component_AppID=x",
		"more secrets": mine + "&appsecret=" + shopKey + "&component_appsecret=" + shopKey, "a token": mine + "&component_access_token=x&access_token=y",
	} {
		a := g.get("/sns/jscode2session?" + query)
		if a.Status != http.StatusOK || a.Body != `{"errcode":0,"errmsg":"ok"}` {
			t.Errorf("%s: got %d %s", name, a.Status, a.Body)
			continue
		}
		if got := wechat.one(t); got.Query != good {
			t.Errorf("%s: WeChat got %s, want %s", name, got.Query, good)
		}
	}
	form := "Content-Type: application/x-www-form-urlencoded"
	for name, a := range map[string]answer{
		"second appid":         g.get("/sns/jscode2session?" + mine + "&appid=" + authorizerID),
		"first appid":          g.get("/sns/jscode2session?appid=" + authorizerID + "&" + mine),
		"appid in capitals":    g.get("/sns/jscode2session?" + mine + "&Appid=" + authorizerID),
		"encoded appid":        g.get("/sns/jscode2session?" + mine + "&%61ppid=" + authorizerID),
		"appid with a NUL":     g.get("/sns/jscode2session?" + mine + "&appid%00=" + authorizerID),
		"behind a semicolon":   g.get("/sns/jscode2session?" + mine + "&x=1;appid=" + authorizerID),
		"any semicolon":        g.get("/sns/jscode2session?" + mine + "&x=1;y=2"),
		"second secret":        g.get("/sns/jscode2session?" + mine + "&secret=" + crmKey),
		"form":                 g.post("/sns/jscode2session?"+mine, "appid="+authorizerID, form),
		"form, chunked":        g.do(http.MethodPost, "/sns/jscode2session?"+mine, onlyReader{strings.NewReader("appid=" + authorizerID)}, form),
		"GET with a form":      g.do(http.MethodGet, "/sns/jscode2session?"+mine, strings.NewReader("appid="+authorizerID), form),
		"PUT":                  g.do(http.MethodPut, "/sns/jscode2session?"+mine, nil),
		"prefix against query": g.get("/" + authorizerID + "/sns/jscode2session?" + mine),
	} {
		if a.Status != http.StatusOK || a.code(t) == 0 {
			t.Errorf("%s: got %d %s, want a refusal", name, a.Status, a.Body)
		}
	}
	if calls := wechat.seen(); len(calls) != 0 {
		t.Errorf("WeChat was called: %+v", calls)
	}
	if a := g.post("/sns/jscode2session?"+mine, ""); a.Status != http.StatusOK || wechat.one(t).Query != good {
		t.Errorf("POST without a body: got %d %s", a.Status, a.Body)
	}
	// As of each request over HTTP/3 without a body, nothing but its end says that there is none.
	if a := g.do(http.MethodPost, "/sns/jscode2session?"+mine, onlyReader{strings.NewReader("")}); a.Status != http.StatusOK || wechat.one(t).Query != good {
		t.Errorf("a body of unknown length without a byte: got %d %s", a.Status, a.Body)
	}
	g.noSecretsLogged()
}

func TestAPILogin(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.authorize()
	wechat.seen()
	for _, c := range []struct {
		name, target string
		headers      []string
		path, query  string
	}{
		{"account, key as secret", "/sns/jscode2session?appid=" + accountID + "&secret=" + crmKey + "&js_code=c1&grant_type=authorization_code", nil,
			"/sns/jscode2session", "js_code=c1&grant_type=authorization_code&appid=" + accountID + "&secret=account-secret"},
		{"account, Bearer", "/" + accountID + "/sns/oauth2/access_token?code=c1&grant_type=authorization_code", []string{bearer(crmKey)},
			"/sns/oauth2/access_token", "code=c1&grant_type=authorization_code&appid=" + accountID + "&secret=account-secret"},
		{"authorizer, mini program", "/sns/jscode2session?appid=" + authorizerID + "&secret=" + crmKey + "&js_code=c1", nil,
			"/sns/component/jscode2session", "js_code=c1&component_access_token=REALTOKEN-" + platformID + "-1&appid=" + authorizerID + "&component_appid=" + platformID},
		{"authorizer, web", "/sns/oauth2/access_token?secret=" + crmKey + "&appid=" + authorizerID + "&code=c1", nil,
			"/sns/oauth2/component/access_token", "code=c1&component_access_token=REALTOKEN-" + platformID + "-1&appid=" + authorizerID + "&component_appid=" + platformID},
	} {
		a := g.get(c.target, c.headers...)
		if got := wechat.one(t); a.Status != http.StatusOK || got.Path != c.path || got.Query != c.query {
			t.Errorf("%s: got %d, WeChat got %s?%s, want %s?%s", c.name, a.Status, got.Path, got.Query, c.path, c.query)
		}
	}
	for name, target := range map[string]string{
		"wrong key":        "/sns/jscode2session?js_code=c1&appid=" + accountID + "&secret=" + strangerKey,
		"appid not listed": "/sns/jscode2session?js_code=c1&appid=" + authorizerID + "&secret=" + shopKey,
		"no appid":         "/sns/jscode2session?js_code=c1&secret=" + shopKey,
		"other appid":      "/" + accountID + "/sns/jscode2session?js_code=c1&appid=" + authorizerID + "&secret=" + crmKey,
		"platform":         "/sns/jscode2session?js_code=c1&appid=" + platformID + "&secret=" + panelKey,
	} {
		if a := g.get(target); a.Status != http.StatusOK || a.code(t) == 0 {
			t.Errorf("%s: got %d %s", name, a.Status, a.Body)
		}
	}
	if calls := wechat.seen(); len(calls) != 0 {
		t.Errorf("WeChat was called: %+v", calls)
	}
	g.noSecretsLogged("c1")
}
