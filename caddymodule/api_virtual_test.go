package caddymodule

import (
	"encoding/json"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// grantAnswer is a token answer as SDKs want it: one line, nothing escaped, an integer, no errcode.
var grantAnswer = regexp.MustCompile(`^\{"access_token":"[A-Za-z0-9_-]{1,512}","expires_in":7200\}$`)

func TestAPITokenForms(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.authorize()
	stable := `{"grant_type":"client_credential","appid":"` + accountID + `","secret":"` + crmKey + `","force_refresh":true}`
	q := "grant_type=client_credential&appid=" + accountID + "&secret=" + crmKey
	form := "Content-Type: application/x-www-form-urlencoded"
	for name, a := range map[string]answer{
		"token":                         g.get("/cgi-bin/token?" + q),
		"token, other order and extras": g.get("/cgi-bin/token?secret=" + crmKey + "&neededText=&appid=" + accountID + "&x=%zz&grant_type=client_credential"),
		"token, POST":                   g.post("/cgi-bin/token?"+q, ""),
		"token, form":                   g.post("/cgi-bin/token", q, form),
		"token, form and query":         g.post("/cgi-bin/token?grant_type=client_credential", "appid="+accountID+"&secret="+crmKey, form+"; charset=utf-8"),
		"token below its prefix":        g.get("/" + accountID + "/cgi-bin/token?" + q),
		"token, slashes":                g.get("//cgi-bin/token?" + q),
		"token, appid by prefix":        g.get("/" + accountID + "/cgi-bin/token?grant_type=client_credential&secret=" + crmKey),
		"token, appid by header":        g.get("/cgi-bin/token?grant_type=client_credential&secret="+crmKey, "X-Wechat-Appid: "+accountID),
		"token, Bearer":                 g.get("/"+accountID+"/cgi-bin/token?grant_type=client_credential", bearer(crmKey)),
		"token, authorizer":             g.get("/cgi-bin/token?grant_type=client_credential&appid=" + authorizerID + "&secret=" + hashedKey),
		"stable":                        g.post("/cgi-bin/stable_token", stable),
		"stable, json":                  g.post("/cgi-bin/stable_token", stable, "Content-Type: application/json;charset=utf-8"),
		"stable, text":                  g.post("/cgi-bin/stable_token", stable, "Content-Type: text/plain"),
		"stable, chunked":               g.do(http.MethodPost, "/cgi-bin/stable_token", onlyReader{strings.NewReader(stable)}),
		"stable below its prefix":       g.post("/"+accountID+"/cgi-bin/stable_token", stable),
	} {
		if a.Status != http.StatusOK || a.Header.Get("Content-Type") != "application/json" || !grantAnswer.MatchString(a.Body) {
			t.Errorf("%s: got %d %s %q", name, a.Status, a.Header.Get("Content-Type"), a.Body)
			continue
		}
		if a := g.get("/cgi-bin/user/info?access_token=" + g.tokenOf(a, "access_token")); a.Body != `{"errcode":0,"errmsg":"ok"}` {
			t.Errorf("%s: its token got %d %s", name, a.Status, a.Body)
		}
	}
	if n := wechat.tokensIssued(accountID); n != 1 {
		t.Errorf("WeChat issued %d tokens, want 1: force_refresh concerns nobody else", n)
	}
	for _, c := range wechat.seen() {
		if strings.Contains(c.Query, crmKey) || !strings.Contains(c.Query, "REALTOKEN") {
			t.Errorf("WeChat got %s?%s", c.Path, c.Query)
		}
	}
	g.noSecretsLogged()
}

// onlyReader hides a body's length, so that it is sent in chunks.
type onlyReader struct{ r *strings.Reader }

func (o onlyReader) Read(p []byte) (int, error) { return o.r.Read(p) }

func TestAPITokenRefusals(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	stable := func(appid, key string) string {
		return `{"grant_type":"client_credential","appid":"` + appid + `","secret":"` + key + `"}`
	}
	const grant = "/cgi-bin/token?grant_type=client_credential"
	for _, c := range []struct {
		name   string
		a      answer
		status int
		code   int64
	}{
		{"wrong key", g.get(grant + "&appid=" + accountID + "&secret=" + strangerKey), 200, 40125},
		{"wrong key, stable", g.post("/cgi-bin/stable_token", stable(accountID, strangerKey)), 200, 40125},
		{"wrong key and an appid that is none", g.get(grant + "&appid=" + strangerID + "&secret=" + strangerKey), 200, 40125},
		{"the account's secret is no key", g.get(grant + "&appid=" + accountID + "&secret=account-secret"), 200, 40125},
		{"no key", g.get(grant + "&appid=" + accountID), 401, 41001},
		{"wrong grant type", g.get("/cgi-bin/token?grant_type=x&appid=" + accountID + "&secret=" + crmKey), 200, 40002},
		{"no appid", g.get(grant + "&secret=" + crmKey), 200, 41002},
		{"no such shape", g.get(grant + "&appid=WX2222222222222222&secret=" + crmKey), 200, 40013},
		{"other appid than the prefix", g.get("/" + accountID + grant + "&appid=" + authorizerID + "&secret=" + crmKey), 200, 40013},
		{"appid not listed", g.get(grant + "&appid=" + authorizerID + "&secret=" + shopKey), 200, 48001},
		// There is no ticket, so WeChat cannot be asked whether the store has lost the account.
		{"unknown account", g.get(grant + "&appid=" + strangerID + "&secret=" + crmKey), 200, 61005},
		{"platform", g.get(grant + "&appid=" + platformID + "&secret=" + panelKey), 200, 61024},
		{"stable by GET", g.get("/cgi-bin/stable_token"), 200, 43002},
		{"stable without JSON", g.post("/cgi-bin/stable_token", "appid="+accountID), 200, 47001},
		{"stable, wrong types", g.post("/cgi-bin/stable_token", `{"appid":1}`), 200, 47001},
		{"too large", g.post("/cgi-bin/stable_token", strings.Repeat(" ", maxGrantBody+1)), 200, 413},
	} {
		if code := c.a.code(t); c.a.Status != c.status || code != c.code {
			t.Errorf("%s: got %d, errcode %d (%s); want %d, %d", c.name, c.a.Status, code, c.a.Body, c.status, c.code)
		}
	}
	if n := wechat.tokensIssued(accountID); n != 0 {
		t.Errorf("WeChat issued %d tokens", n)
	}
	g.noSecretsLogged(strangerKey)
}

// What WeChat says when the gateway asks for a token reaches the caller, without making SDKs ask again for ever.
func TestAPITokenTroubleAtWeChat(t *testing.T) {
	const grant = "/cgi-bin/token?grant_type=client_credential&appid=" + accountID + "&secret=" + crmKey
	for _, c := range []struct {
		name, wechat    string
		sdk, bearer     int64
		status, bstatus int
	}{
		{"ip", `{"errcode":40164,"errmsg":"invalid ip 192.0.2.7, not in whitelist"}`, 40164, 40164, 200, 200},
		{"secret", `{"errcode":40125,"errmsg":"invalid appsecret"}`, 40125, 40125, 200, 200},
		{"40001", `{"errcode":40001,"errmsg":"invalid credential"}`, 48001, 40001, 200, 200},
		{"busy", `{"errcode":-1,"errmsg":"system error"}`, 503, 503, 503, 503},
		{"html", `<html>502 Bad Gateway</html>`, 502, 502, 502, 502},
		{"half", `{"access_token":"REALTO`, 502, 502, 502, 502},
	} {
		wechat := newFakeWeChat(t)
		wechat.grantErr = c.wechat
		g := newGateway(t, wechat, "", "")
		if a := g.get("/"+accountID+"/cgi-bin/user/info", bearer(crmKey)); a.Status != c.bstatus || a.code(t) != c.bearer {
			t.Errorf("%s, Bearer: got %d %s", c.name, a.Status, a.Body)
		}
		if a := g.get(grant); a.Status != c.status || a.code(t) != c.sdk {
			t.Errorf("%s, SDK: got %d %s", c.name, a.Status, a.Body)
		}
	}
}

func TestAPINoTicketYet(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	a := g.post("/"+platformID+"/cgi-bin/component/api_create_preauthcode", "{}", bearer(panelKey))
	if a.Status != http.StatusOK || a.code(t) != 61005 || !strings.Contains(a.Body, "component_verify_ticket") {
		t.Errorf("got %d %s", a.Status, a.Body)
	}
	a = g.post("/cgi-bin/component/api_component_token", `{"component_appid":"`+platformID+`","component_appsecret":"`+panelKey+`","component_verify_ticket":"ticket@@@x"}`)
	if a.Status != http.StatusOK || a.code(t) != 61005 {
		t.Errorf("got %d %s", a.Status, a.Body)
	}
}

func TestAPIPlatformDropIn(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.authorize()
	wechat.seen()
	ask := func(appid, key string) answer {
		return g.post("/cgi-bin/component/api_component_token",
			`{"component_appid":"`+appid+`","component_appsecret":"`+key+`","component_verify_ticket":"ticket@@@of-the-sdk"}`)
	}
	component := g.tokenOf(ask(platformID, panelKey), "component_access_token")

	// Component calls, under both names of the parameter.
	for _, name := range []string{"component_access_token", "access_token"} {
		if a := g.post("/cgi-bin/component/api_create_preauthcode?"+name+"="+component, `{"component_appid":"`+platformID+`"}`); a.Status != http.StatusOK {
			t.Errorf("got %d %s", a.Status, a.Body)
		}
		if got := wechat.one(t); got.Query != "component_access_token=REALTOKEN-"+platformID+"-1" {
			t.Errorf("WeChat got %s?%s", got.Path, got.Query)
		}
	}
	if g.get("/wxa/gettemplatelist?access_token=" + component); wechat.one(t).Query != "access_token=REALTOKEN-"+platformID+"-1" {
		t.Error("a component call outside of /cgi-bin/component got another token")
	}

	// Its authorizers.
	exchange := func(query, refresh string, headers ...string) answer {
		return g.post("/cgi-bin/component/api_authorizer_token?"+query,
			`{"component_appid":"`+platformID+`","authorizer_appid":"`+authorizerID+`","authorizer_refresh_token":"`+refresh+`"}`, headers...)
	}
	a := exchange("component_access_token="+component, "refreshtoken@@@virtual")
	authorizer := g.tokenOf(a, "authorizer_access_token")
	if !strings.HasSuffix(a.Body, `,"expires_in":7200,"authorizer_refresh_token":"refreshtoken@@@virtual"}`) {
		t.Errorf("got %s", a.Body)
	}
	if g.get("/cgi-bin/user/info?access_token=" + authorizer); wechat.one(t).Query != "access_token=REALTOKEN-"+authorizerID+"-1" {
		t.Error("the authorizer's opaque token did not become the authorizer's token")
	}
	if g.post("/cgi-bin/component/getprivacysetting?access_token="+authorizer, "{}"); wechat.one(t).Query != "access_token=REALTOKEN-"+authorizerID+"-1" {
		t.Error("getprivacysetting takes the authorizer's token although its path says component")
	}
	if a := exchange("access_token="+component, `\"<script>`); !strings.Contains(a.Body, `"authorizer_refresh_token":"virtual"}`) {
		t.Errorf("a strange refresh token: got %s", a.Body)
	}
	if a := exchange("", "", bearer(crmKey)); g.tokenOf(a, "authorizer_access_token") == "" {
		t.Errorf("a client that lists the authorizer: got %s", a.Body)
	}

	for name, c := range map[string]struct {
		a    answer
		code int64
	}{
		"account API with a component token":    {g.get("/cgi-bin/user/info?access_token=" + component), 61015},
		"a client that does not list it":        {ask(platformID, crmKey), 48001},
		"wrong key":                             {ask(platformID, strangerKey), 40125},
		"an account is no platform":             {ask(accountID, crmKey), 61014},
		"by GET":                                {g.get("/cgi-bin/component/api_component_token"), 43002},
		"not JSON":                              {g.post("/cgi-bin/component/api_component_token", "x"), 47001},
		"authorizer token with an account's":    {exchange("access_token="+authorizer, "r"), 40013},
		"authorizer token for nobody's":         {exchange("component_access_token=x", "r"), 40001},
		"two tokens":                            {exchange("component_access_token=x&access_token=y", "r"), 40097},
		"authorizer token, a client with less":  {exchange("", "", bearer(shopKey)), 48001},
		"authorizer token of a stranger":        {g.post("/cgi-bin/component/api_authorizer_token?access_token="+component, `{"component_appid":"`+platformID+`","authorizer_appid":"`+strangerID+`"}`), 61003},
		"authorizer token, shape":               {g.post("/cgi-bin/component/api_authorizer_token?access_token="+component, `{"component_appid":"`+platformID+`","authorizer_appid":"x"}`), 40013},
		"api_query_auth with a component token": {g.post("/cgi-bin/component/api_query_auth?component_access_token="+component, "{}"), 48001},
	} {
		if code := c.a.code(t); code != c.code {
			t.Errorf("%s: got %d, errcode %d (%s); want %d", name, c.a.Status, code, c.a.Body, c.code)
		}
	}
	if calls := wechat.seen(); len(calls) != 0 {
		t.Errorf("WeChat was called: %+v", calls)
	}
	g.noSecretsLogged(component, authorizer)
}

func TestAPIRevoked(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.authorize()
	token := g.opaque(authorizerID, crmKey)
	if err := g.app.manager().Revoke(t.Context(), platformID, authorizerID, time.Now().Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	if a := g.get("/cgi-bin/user/info?access_token=" + token); a.Status != http.StatusOK || a.code(t) != 61003 {
		t.Errorf("SDK: got %d %s", a.Status, a.Body)
	}
	if a := g.get("/"+authorizerID+"/cgi-bin/user/info", bearer(panelKey)); a.code(t) != 48001 {
		t.Errorf("Bearer: got %d %s", a.Status, a.Body)
	}
}

func TestAPIExpiredOpaque(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	_, fingerprint := g.api.keys.find(crmKey)
	issue := func(life time.Duration) secret.String {
		token, err := g.app.manager().IssueOpaque(t.Context(), tokens.OpaqueClaims{
			Client: "crm", KeyFingerprint: fingerprint, AppID: accountID, Kind: tokens.KindAccount, ExpiresAt: time.Now().Add(life),
		})
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	a := g.get("/cgi-bin/user/info?access_token=" + issue(-time.Minute).Reveal())
	if a.Status != http.StatusOK || a.code(t) != 42001 || !strings.Contains(a.Body, "access_token expired") {
		t.Errorf("got %d %s", a.Status, a.Body)
	}
	if a := g.get("/cgi-bin/user/info?access_token=" + issue(time.Minute).Reveal()); a.Body != `{"errcode":0,"errmsg":"ok"}` {
		t.Errorf("a live one: got %d %s", a.Status, a.Body)
	}
}

func TestErrorBodyNeedsNoEscapes(t *testing.T) {
	t.Parallel()
	body := errorBody(40013, "a \"quoted\" C:\\path\n\t\x00\u2028 <&> 你\xff")
	var got struct {
		Code int64  `json:"errcode"`
		Msg  string `json:"errmsg"`
	}
	if err := json.Unmarshal(body, &got); err != nil || got.Code != 40013 {
		t.Fatalf("%q: %v", body, err)
	}
	if strings.ContainsAny(string(body), "\\\n\t\x00\u2028") || !strings.Contains(got.Msg, "<&> 你") {
		t.Errorf("got %q", body)
	}
}
