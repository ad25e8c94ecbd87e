package wxsim

import (
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestComponentTokenRefusals(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name    string
		changes map[string]string
		noPush  bool
		code    int64
		rule    Rule
	}{
		{name: "no ticket yet", noPush: true, changes: map[string]string{"component_verify_ticket": "ticket@@@x"}, code: 61005},
		{name: "ticket missing", changes: map[string]string{"component_verify_ticket": ""}, code: 61005},
		{name: "made-up ticket", changes: map[string]string{"component_verify_ticket": "ticket@@@x"}, code: 61006},
		{name: "wrong secret", changes: map[string]string{"component_appsecret": "x"}, code: 40125, rule: RuleSecret},
		{name: "secret missing", changes: map[string]string{"component_appsecret": ""}, code: 41004},
		{name: "secret in the wrong field", changes: map[string]string{"component_appsecret": "", "component_secret": testSecret}, code: 41004, rule: RuleField},
		{name: "no appid", changes: map[string]string{"component_appid": ""}, code: 41018, rule: RuleField},
		{name: "unknown appid", changes: map[string]string{"component_appid": "wx9999999999999999"}, code: 40013},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := newSim(t, nil)
			c := caller{t, s}
			if !tc.noPush {
				c.componentToken()
			}
			s.AllowRefresh(KindComponent, testPlatform)
			wantCode(t, c.post("/cgi-bin/component/api_component_token", "", c.tokenBody(tc.changes)), tc.code)
			if tc.rule != "" && rules(s)[tc.rule] != 1 {
				t.Errorf("violations %v, want one of %s", rules(s), tc.rule)
			}
		})
	}
}

func TestTicketLifeAndOrder(t *testing.T) {
	t.Parallel()
	s := newSim(t, func(c *Config) { c.Faults.NewestTicketOnly = true })
	c := caller{t, s}
	c.componentToken()
	old, _ := s.Current(KindTicket, testPlatform, testPlatform)
	if _, err := s.PushTicket(t.Context(), testPlatform); err != nil {
		t.Fatal(err)
	}
	s.AllowRefresh(KindComponent, testPlatform)
	wantCode(t, c.post("/cgi-bin/component/api_component_token", "", c.tokenBody(map[string]string{"component_verify_ticket": old})), 61006)
	s.ExpireAll(KindTicket, testPlatform)
	wantCode(t, c.post("/cgi-bin/component/api_component_token", "", c.tokenBody(nil)), 61005)
}

func TestShapesOfValues(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	component, access, refresh := c.authorized(testShop)
	ticket, live := s.Current(KindTicket, testPlatform, testPlatform)
	if !live {
		t.Error("the ticket is not live")
	}
	for value, shape := range map[string]string{
		ticket: `^ticket@@@[\w-]{86}$`, refresh: `^refreshtoken@@@[\w-]{43}$`, component: `^97_[\w-]{133}$`, access: `^97_[\w-]{133}$`,
	} {
		if !regexp.MustCompile(shape).MatchString(value) {
			t.Errorf("%q does not look like %s", value, shape)
		}
	}
	secrets := strings.Join(s.Secrets(), "\n")
	for _, v := range []string{ticket, refresh, component, access, testSecret, testKey, testToken} {
		if !strings.Contains(secrets, v) {
			t.Errorf("Secrets lacks %q", v)
		}
	}
	wantNoViolations(t, s)
}

// TestPriorAuthorization: the refresh token of an authorization that nobody saw works, and lists show it.
func TestPriorAuthorization(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	component := c.componentToken()
	pushes := len(s.Journal().Pushes(""))
	refresh, err := s.PriorAuthorization(testPlatform, testShop)
	if err != nil {
		t.Fatal(err)
	}
	if got := len(s.Journal().Pushes("")); got != pushes {
		t.Errorf("%d pushes", got-pushes)
	}
	if _, err := s.PriorAuthorization("wx9999999999999999", testShop); err == nil {
		t.Error("an unknown platform was authorized")
	}
	list := c.post("/cgi-bin/component/api_get_authorizer_list", "component_access_token="+component,
		map[string]any{"component_appid": testPlatform, "offset": 0, "count": 10})
	if !strings.Contains(string(list.body), refresh) {
		t.Errorf("the list is %s", list.body)
	}
	access := c.refresh(component, testShop, refresh).text("authorizer_access_token")
	wantCode(t, c.get("/cgi-bin/user/get", "access_token="+access), 0)
	wantNoViolations(t, s)
}

func TestAuthorizerTokenStates(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	component, access, refresh := c.authorized(testShop)
	info := func(token string) result { return c.get("/cgi-bin/user/get", "access_token="+token) }
	wantCode(t, info(access), 0)

	again := c.refresh(component, testShop, refresh)
	if rules(s)[RuleFreshRefresh] != 1 {
		t.Errorf("violations %v: a fresh token was renewed unseen", rules(s))
	}
	newer := again.text("authorizer_access_token")
	if newer == "" || again.text("authorizer_refresh_token") != refresh {
		t.Fatalf("refresh: %s", again.body)
	}
	wantCode(t, info(access), 40001) // no overlap by default
	wantCode(t, info(newer), 0)
	if !s.ExpireToken(newer) {
		t.Fatal("the token is unknown")
	}
	wantCode(t, info(newer), 42001)

	s.Journal().Reset()
	newer = c.refresh(component, testShop, refresh).text("authorizer_access_token")
	if n := s.ReplaceAll(KindAuthorizer, testShop); n != 1 {
		t.Errorf("%d tokens replaced, want 1", n)
	}
	wantCode(t, info(newer), 40001)
	newer = c.refresh(component, testShop, refresh).text("authorizer_access_token")
	if got := s.Journal().Refreshes(KindAuthorizer, testShop); got != 2 {
		t.Errorf("%d refreshes, want 2", got)
	}
	wantNoViolations(t, s)

	wantCode(t, c.refresh(component, testShop, "refreshtoken@@@made-up"), 61023)
	wantCode(t, c.refresh(component, testShop, ""), 61023)
	wantCode(t, c.refresh(component, testMini, refresh), 61003)
	if r, err := s.Unauthorize(t.Context(), testPlatform, testShop); err != nil || !r.OK() {
		t.Fatalf("unauthorize: %v %+v", err, r)
	}
	wantCode(t, info(newer), 61003)
	wantCode(t, c.refresh(component, testShop, refresh), 61003)
}

func TestOverlapAndRotation(t *testing.T) {
	t.Parallel()
	s := newSim(t, func(c *Config) {
		c.Lives.AuthorizerOverlap = time.Hour
		c.Faults.RotateRefreshTokens = true
	})
	c := caller{t, s}
	component, access, refresh := c.authorized(testShop)
	r := c.refresh(component, testShop, refresh)
	if r.text("authorizer_refresh_token") == refresh {
		t.Error("the refresh token did not change")
	}
	wantCode(t, c.get("/cgi-bin/user/get", "access_token="+access), 0)
	wantCode(t, c.refresh(component, testShop, refresh), 61023)
	wantCode(t, c.refresh(component, testShop, r.text("authorizer_refresh_token")), 0)
}

func TestReauthorize(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	if _, err := s.Reauthorize(t.Context(), testPlatform, testShop); err == nil {
		t.Error("an account that never authorized did so again")
	}
	component, access, refresh := c.authorized(testShop)
	list := func() string {
		return string(c.post("/cgi-bin/component/api_get_authorizer_list", "access_token="+component,
			map[string]any{"component_appid": testPlatform, "offset": 0, "count": 500}).body)
	}
	if !strings.Contains(list(), refresh) {
		t.Errorf("list %s lacks the refresh token", list())
	}
	a, err := s.Reauthorize(t.Context(), testPlatform, testShop, 1, 2)
	if err != nil || !a.Push.OK() {
		t.Fatalf("%v %+v", err, a)
	}
	if !strings.Contains(list(), `"refresh_token":""`) {
		t.Errorf("list %s shows a refresh token whose code was not exchanged", list())
	}
	wantCode(t, c.refresh(component, testShop, refresh), 61023)
	wantCode(t, c.get("/cgi-bin/user/get", "access_token="+access), 0)
	info := c.exchange(component, a.Code)
	if info["authorizer_refresh_token"] == refresh {
		t.Error("the refresh token did not change")
	}
	wantCode(t, c.get("/cgi-bin/user/get", "access_token="+access), 40001)
	wantCode(t, c.post("/cgi-bin/component/api_query_auth", "access_token="+component,
		map[string]string{"component_appid": testPlatform, "authorization_code": a.Code}), 61009)
}

func TestPlainToken(t *testing.T) {
	t.Parallel()
	s := newSim(t, func(c *Config) { c.Quotas = map[string]int{"/cgi-bin/token": 3} })
	c := caller{t, s}
	query := "grant_type=client_credential&appid=" + testAccount + "&secret=account-" + testSecret
	first := c.get("/cgi-bin/token", query).text("access_token")
	wantCode(t, c.get("/cgi-bin/user/get", "access_token="+first), 0)
	second := c.get("/cgi-bin/token", query).text("access_token")
	if first == second || second == "" {
		t.Fatal("no new token")
	}
	wantCode(t, c.get("/cgi-bin/user/get", "access_token="+first), 40001)
	stable := c.stable(false).text("access_token")
	wantCode(t, c.get("/cgi-bin/user/get", "access_token="+second), 0) // the two are independent
	wantCode(t, c.get("/cgi-bin/user/get", "access_token="+stable), 0)
	wantCode(t, c.get("/cgi-bin/token", query+"x"), 40125)
	wantCode(t, c.get("/cgi-bin/token", "appid="+testAccount), 40002)
	wantCode(t, c.get("/cgi-bin/token", strings.Replace(query, testAccount, testPlatform, 1)), 61024)
	wantCode(t, c.get("/cgi-bin/token", query), 0)
	wantCode(t, c.get("/cgi-bin/token", query), 45009)
}

func TestStableToken(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	first := c.stable(false).text("access_token")
	if again := c.stable(false).text("access_token"); again != first {
		t.Error("normal mode gave another token")
	}
	forced := c.stable(true).text("access_token")
	if forced == first {
		t.Error("force_refresh gave the same token")
	}
	wantCode(t, c.get("/cgi-bin/user/get", "access_token="+first), 40001)
	if again := c.stable(true).text("access_token"); again != forced {
		t.Error("a second force_refresh within 30 s took effect")
	}
	s.ExpireAll(KindStable, testAccount)
	renewed := c.stable(false).text("access_token")
	if renewed == forced {
		t.Error("an expired token was given")
	}
	if got := s.Journal().Refreshes(KindStable, testAccount); got != 3 {
		t.Errorf("%d refreshes, want 3", got)
	}
	if got := rules(s)[RuleFreshRefresh]; got != 3 {
		t.Errorf("%d fresh refreshes, want 3", got)
	}
	wantCode(t, c.get("/cgi-bin/stable_token", ""), 43002)
}

func TestStableTokenAtItsEnd(t *testing.T) {
	t.Parallel()
	s := newSim(t, func(c *Config) { c.Lives.StableOverlap = tokenLife }) // always in its last part
	c := caller{t, s}
	first := c.stable(false).text("access_token")
	s.AllowRefresh(KindStable, testAccount)
	second := c.stable(false).text("access_token")
	if first == second {
		t.Fatal("no new token at the end of the life")
	}
	for _, token := range []string{first, second} {
		wantCode(t, c.get("/cgi-bin/user/get", "access_token="+token), 0)
	}
	wantNoViolations(t, s)
}

func TestKindsOfTokens(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	component, access, _ := c.authorized(testShop)
	stable := c.stable(false).text("access_token")
	user := c.userToken(testAccount, scopeBase)
	for _, tc := range []struct {
		name, method, path, query string
		code                      int64
		rule                      Rule
	}{
		{"authorizer on a component path", http.MethodPost, "/cgi-bin/component/api_create_preauthcode", "component_access_token=" + access, 61014, RuleTokenKind},
		{"component on an account path", http.MethodGet, "/cgi-bin/user/info", "access_token=" + component, 61015, RuleTokenKind},
		{"account on a component path", http.MethodGet, "/wxa/gettemplatelist", "access_token=" + stable, 61014, RuleTokenKind},
		{"user on an account path", http.MethodGet, "/cgi-bin/user/info", "access_token=" + user, 40001, RuleTokenKind},
		{"authorizer on a user path", http.MethodGet, "/sns/userinfo", "access_token=" + access, 40001, RuleTokenKind},
		{"authorizer on a component sns path", http.MethodGet, "/sns/component/jscode2session", "component_access_token=" + access, 40001, RuleTokenKind},
		{"either, component", http.MethodGet, "/cgi-bin/getcallbackip", "access_token=" + component, 0, ""},
		{"either, account", http.MethodGet, "/cgi-bin/getcallbackip", "access_token=" + stable, 0, ""},
		{"none", http.MethodGet, "/cgi-bin/user/info", "openid=x", 41001, RuleTokenPlace},
		{"none for a component", http.MethodPost, "/cgi-bin/component/api_query_auth", "", 41021, RuleTokenPlace},
		{"made up", http.MethodGet, "/cgi-bin/user/info", "access_token=97_0123456789abcdefghijkl", 40001, RuleUnknownToken},
		{"malformed", http.MethodGet, "/cgi-bin/user/info", "access_token=x", 40014, RuleUnknownToken},
		{"made up by an app, for a user", http.MethodGet, "/sns/userinfo", "access_token=97_0123456789abcdefghijkl", 40001, ""},
		{"none for a user", http.MethodGet, "/sns/auth", "openid=x", 41001, ""},
		{"twice", http.MethodGet, "/cgi-bin/user/get", "access_token=" + stable + "&access_token=" + stable, 0, RuleTokenPlace},
		{"on a token path", http.MethodPost, "/cgi-bin/stable_token", "access_token=" + stable, 44002, RuleTokenPlace},
		{"unknown path", http.MethodGet, "/cgi-bin/nothing", "access_token=" + stable, 40066, ""},
	} {
		s.Journal().Reset()
		r, err := c.do(c.request(tc.method, tc.path, tc.query, nil))
		if err != nil {
			t.Fatal(err)
		}
		if r.errcode() != tc.code {
			t.Errorf("%s: %s, want %d", tc.name, r.body, tc.code)
		}
		found := rules(s)
		if tc.rule == "" && len(found) > 0 || tc.rule != "" && found[tc.rule] != 1 {
			t.Errorf("%s: violations %v, want %q", tc.name, found, tc.rule)
		}
	}
}

func TestErrorsLookLikeWeChat(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	r := caller{t, s}.get("/cgi-bin/user/info", "access_token=x")
	if r.header.Get("LogicRet") != "40014" || r.header.Get("Content-Type") != jsonContentType {
		t.Errorf("header %v", r.header)
	}
	if !regexp.MustCompile(`^\{"errcode":40014,"errmsg":"invalid access_token rid: [0-9a-f]{8}-[0-9a-f]{8}-[0-9a-f]{8}"\}$`).Match(r.body) {
		t.Errorf("body %s", r.body)
	}
}

func TestEarlyDeath(t *testing.T) {
	t.Parallel()
	s := newSim(t, func(c *Config) { c.Faults.EarlyDeath = 1 })
	c := caller{t, s}
	token := c.stable(false).text("access_token")
	uses := 0
	for c.get("/cgi-bin/user/get", "access_token="+token).errcode() == 0 {
		uses++
	}
	if uses < 1 || uses > earlyUses {
		t.Errorf("the token died after %d uses", uses)
	}
	if next := c.stable(false).text("access_token"); next == token {
		t.Error("the dead token was given again")
	}
	wantNoViolations(t, s)
}

func TestExpiredComponentToken(t *testing.T) {
	t.Parallel()
	s := newSim(t, func(c *Config) { c.Faults.ComponentExpired = 1 })
	c := caller{t, s}
	token := c.componentToken()
	if n := s.ExpireAll(KindComponent, ""); n != 1 {
		t.Errorf("%d expired, want 1", n)
	}
	wantCode(t, c.get("/cgi-bin/getcallbackip", "access_token="+token), 42006)
}

func TestSecretReset(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	s.SetSecret(testAccount, "another")
	wantCode(t, caller{t, s}.stable(false), 40125)
}

func TestIssued(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	token := c.stable(false).text("access_token")
	ticket := c.get("/cgi-bin/ticket/getticket", "access_token="+token+"&type=jsapi").text("ticket")
	for _, tt := range []struct {
		kind Kind
		want []string
	}{{KindStable, []string{token}}, {KindJSTicket, []string{ticket}}, {KindComponent, nil}} {
		if got := s.Issued(tt.kind); !slices.Equal(got, tt.want) {
			t.Errorf("%s: %d values, want %d", tt.kind, len(got), len(tt.want))
		}
	}
}
