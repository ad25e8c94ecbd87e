package wxsim

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
)

// userToken is a user's access token of a plain account.
func (c caller) userToken(appID, scope string) string {
	c.t.Helper()
	u := c.s.NewUser(appID)
	r := c.get("/sns/oauth2/access_token", "appid="+appID+"&secret=account-"+testSecret+"&code="+c.s.UserCode(u, "", scope)+"&grant_type=authorization_code")
	if r.text("access_token") == "" {
		c.t.Fatalf("no user token: %s", r.body)
	}
	return r.text("access_token")
}

// link is a right link with parts replaced, in pairs of old and new.
func link(replace ...string) string {
	l := "https://open.weixin.qq.com/connect/oauth2/authorize?appid=" + testShop + "&redirect_uri=" +
		url.QueryEscape("https://wechat.example.com/cb?a=1#/page") + "&response_type=code&scope=snsapi_base&state=s1&component_appid=" +
		testPlatform + "#wechat_redirect"
	return strings.NewReplacer(replace...).Replace(l)
}

func TestVisit(t *testing.T) {
	t.Parallel()
	s := newSim(t, func(c *Config) { c.OAuthHosts = []string{"wechat.example.com"} })
	c := caller{t, s}
	component, _, _ := c.authorized(testShop)
	user := s.NewUser(testShop)
	callback, err := s.Visit(link(), user)
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(callback)
	if err != nil {
		t.Fatal(err)
	}
	q := u.Query()
	if u.Fragment != "/page" || q.Get("a") != "1" || q.Get("state") != "s1" || q.Get("appid") != testShop || q.Get("code") == "" {
		t.Errorf("callback %s", callback)
	}
	exchange := func(query string) result {
		return c.get("/sns/oauth2/component/access_token", query+"&component_access_token="+component)
	}
	base := "appid=" + testShop + "&grant_type=authorization_code&component_appid=" + testPlatform
	wantCode(t, exchange(base), 41008)
	wantCode(t, exchange(base+"&code=made-up"), 40029)
	r := exchange(base + "&code=" + q.Get("code"))
	if r.text("openid") != user.OpenID || r.text("scope") != scopeBase || r.header.Get("Content-Type") != textContentType {
		t.Errorf("exchange: %s %v", r.body, r.header)
	}
	wantCode(t, exchange(base+"&code="+q.Get("code")), 40163)
	wantCode(t, exchange(strings.Replace(base, testShop, testMini, 1)+"&code=x"), 61003)
	wantCode(t, exchange("appid="+testShop+"&grant_type=authorization_code&code=x"), 41018)
	if rules(s)[RuleCodeAgain] != 1 {
		t.Errorf("violations %v, want %s", rules(s), RuleCodeAgain)
	}

	s.RefuseNext()
	callback, err = s.Visit(link(), user)
	if err != nil || callback != "https://wechat.example.com/cb?a=1&state=s1#/page" {
		t.Errorf("refused: %s, %v", callback, err)
	}
	// Plain account.
	plain := "https://open.weixin.qq.com/connect/oauth2/authorize?appid=" + testAccount +
		"&redirect_uri=https%3A%2F%2Fwechat.example.com%2Fcb&response_type=code&scope=snsapi_userinfo&state=1#wechat_redirect"
	callback, err = s.Visit(plain, User{})
	if err != nil || !strings.HasPrefix(callback, "https://wechat.example.com/cb?code=") || strings.Contains(callback, "appid") {
		t.Errorf("plain: %s, %v", callback, err)
	}
	// As SDKs have it beyond what is documented: WxJava and PHP's socialite, and node-socialite.
	for _, link := range []string{
		link("&component_appid", "&connect_redirect=1&component_appid"), link("#", "&connect_redirect=1#"), link("&state=s1", "&connect_redirect=1&state=s1"),
	} {
		if callback, err := s.Visit(link, user); err != nil || !strings.Contains(callback, "code=") || strings.Contains(callback, "connect_redirect") {
			t.Errorf("%s: %s, %v", link, callback, err)
		}
	}
	// The page as a browser gets it.
	address, _, _ := strings.Cut(strings.TrimPrefix(link(), "https://open.weixin.qq.com"), "#")
	path, query, _ := strings.Cut(address, "?")
	if r := c.get(path, query); r.status != http.StatusFound || !strings.Contains(r.header.Get("Location"), "code=") {
		t.Errorf("page: %d %v", r.status, r.header)
	}
}

func TestVisitRefusesLinks(t *testing.T) {
	t.Parallel()
	s := newSim(t, func(c *Config) { c.OAuthHosts = []string{"wechat.example.com"} })
	c := caller{t, s}
	c.authorized(testShop)
	for _, tc := range []struct {
		name string
		link string
		code int
	}{
		{"no fragment", link("#wechat_redirect", ""), 0},
		{"another host", link("open.weixin", "evil.weixin"), 0},
		{"case of a parameter", link("appid=", "AppId="), 0},
		{"order", link("response_type=code&scope=snsapi_base", "scope=snsapi_base&response_type=code"), 0},
		{"repeated parameter", link("&state=s1", "&state=s1&state=s1"), 0},
		{"connect_redirect twice", link("&state=s1", "&connect_redirect=1&state=s1&connect_redirect=1"), 0},
		{"another connect_redirect", link("&state=s1", "&state=s1&connect_redirect=2"), 0},
		{"no appid", link("appid="+testShop, "appid="), 10012},
		{"a platform's appid", link("appid="+testShop, "appid="+testPlatform), 10016},
		{"not authorized", link("appid="+testShop, "appid="+testMini), 10015},
		{"component missing", link("&component_appid="+testPlatform, ""), 0},
		{"scope empty", link("snsapi_base", ""), 10010},
		{"unknown scope", link("snsapi_base", "snsapi_login"), 10005},
		{"state empty", link("state=s1", "state="), 10013},
		{"state too long", link("state=s1", "state="+strings.Repeat("a", 129)), 0},
		{"host not registered", link("wechat.example.com", "shop.example.com"), 10003},
		{"port", link("wechat.example.com", "wechat.example.com%3A8443"), 10003},
		{"not encoded", link("%3A%2F%2F", "://"), 0},
		{"encoded twice", link("%3A%2F%2F", "%253A%252F%252F"), 10003},
		{"wrong account's subdomain", link("wechat.example.com", testMini+".wechat.example.com"), 10003},
	} {
		_, err := s.Visit(tc.link, User{})
		page, isPage := errors.AsType[*PageError](err)
		if !isPage || page.Code != tc.code {
			t.Errorf("%s: %v, want page error %d", tc.name, err, tc.code)
		}
	}
	if _, err := s.Visit(link("wechat.example.com", testShop+".wechat.example.com"), User{}); err != nil {
		t.Errorf("the account's own subdomain: %v", err)
	}
}

// TestSNSIsStrict: a component's token under its own name, an AppSecret and what names a caller where they belong and once, and the
// permission that a login needs.
func TestSNSIsStrict(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	component, _, _ := c.authorized(testMini)
	u := s.NewUser(testMini)
	query := "appid=" + testMini + "&grant_type=authorization_code&component_appid=" + testPlatform
	for _, path := range []string{"/sns/oauth2/component/access_token", "/sns/oauth2/component/refresh_token"} {
		wantCode(t, c.get(path, query+"&code=x&access_token="+component), 41021)
	}
	if r := c.get("/sns/component/jscode2session", query+"&access_token="+component+"&js_code="+s.LoginCode(u)); r.text("openid") != u.OpenID {
		t.Errorf("login by access_token: %s", r.body)
	}
	before := rules(s)
	c.get("/sns/component/jscode2session", query+"&secret=x&component_access_token="+component+"&js_code=x")
	if n := rules(s)[RuleTokenPlace] - before[RuleTokenPlace]; n != 1 {
		t.Errorf("%d violations by a secret where none belongs, want 1", n)
	}
	c.get("/sns/jscode2session", "appid="+testAccount+"&appid="+testMini+"&secret=account-"+testSecret+"&js_code=x&grant_type=authorization_code")
	if n := rules(s)[RuleField] - before[RuleField]; n != 1 {
		t.Errorf("%d violations by two appids, want 1", n)
	}
	token := c.userToken(testAccount, scopeBase)
	wantCode(t, c.get("/sns/auth", "access_token="+token), 41009)
	if _, err := s.Reauthorize(t.Context(), testPlatform, testMini, 17); err != nil {
		t.Fatal(err)
	}
	wantCode(t, c.get("/sns/component/jscode2session", query+"&component_access_token="+component+"&js_code="+s.LoginCode(u)), 61007)
}

// TestMiniProgramsHaveNoWebAuthorization: their links are refused, whatever the scope.
func TestMiniProgramsHaveNoWebAuthorization(t *testing.T) {
	t.Parallel()
	s := newSim(t, func(c *Config) { c.OAuthHosts = []string{"wechat.example.com"} })
	caller{t, s}.authorized(testMini)
	_, err := s.Visit(link(testShop, testMini), User{})
	if page, ok := errors.AsType[*PageError](err); !ok || page.Code != 10005 {
		t.Errorf("%v, want page error 10005", err)
	}
}

func TestScopeNeedsPermission(t *testing.T) {
	t.Parallel()
	s := newSim(t, func(c *Config) { c.OAuthHosts = []string{"wechat.example.com"} })
	c := caller{t, s}
	c.componentToken()
	if _, err := s.Authorize(t.Context(), testPlatform, testShop, 1); err != nil { // messages alone
		t.Fatal(err)
	}
	for _, scope := range []string{scopeUserInfo, scopePrivate} {
		if _, err := s.Visit(link(scopeBase, scope), User{}); err == nil {
			t.Errorf("%s without permission set 4", scope)
		}
	}
	if _, err := s.Visit(link(), User{}); err != nil {
		t.Error(err)
	}
}

func TestUserTokens(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	u := s.NewUser(testAccount)
	credentials := "appid=" + testAccount + "&secret=account-" + testSecret
	grant := c.get("/sns/oauth2/access_token", credentials+"&code="+s.UserCode(u, "", scopeUserInfo)+"&grant_type=authorization_code")
	token := grant.text("access_token")
	if r := c.get("/sns/userinfo", "access_token="+token+"&openid="+u.OpenID+"&lang=zh_CN"); r.text("nickname") != u.NickName {
		t.Errorf("userinfo: %s", r.body)
	}
	wantCode(t, c.get("/sns/auth", "access_token="+token+"&openid="+u.OpenID), 0)
	wantCode(t, c.get("/sns/auth", "access_token="+token+"&openid=x"), 40003)
	s.ExpireToken(token)
	wantCode(t, c.get("/sns/auth", "access_token="+token+"&openid="+u.OpenID), 42001)
	refreshed := c.get("/sns/oauth2/refresh_token", "appid="+testAccount+"&grant_type=refresh_token&refresh_token="+grant.text("refresh_token"))
	wantCode(t, c.get("/sns/auth", "access_token="+refreshed.text("access_token")+"&openid="+u.OpenID), 0)
	wantCode(t, c.get("/sns/oauth2/refresh_token", "appid="+testAccount+"&grant_type=refresh_token&refresh_token=x"), 40030)

	base := c.userToken(testAccount, scopeBase)
	wantCode(t, c.get("/sns/userinfo", "access_token="+base+"&openid="+u.OpenID), 48001)

	code := s.UserCode(u, "", scopeBase)
	s.ExpireToken(code)
	wantCode(t, c.get("/sns/oauth2/access_token", credentials+"&code="+code+"&grant_type=authorization_code"), 42003)

	js := s.LoginCode(u)
	if r := c.get("/sns/jscode2session", credentials+"&js_code="+js+"&grant_type=authorization_code"); r.text("session_key") != u.SessionKey {
		t.Errorf("jscode2session: %s", r.body)
	}
	wantCode(t, c.get("/sns/jscode2session", credentials+"&js_code="+js+"&grant_type=authorization_code"), 40163)
}

func TestComponentLogin(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	component, _, _ := c.authorized(testMini)
	u := s.NewUser(testMini)
	u.Snapshot = true
	u = s.SetUser(u)
	query := "appid=" + testMini + "&grant_type=authorization_code&component_appid=" + testPlatform + "&component_access_token=" + component
	if r := c.get("/sns/component/jscode2session", query+"&js_code="+s.LoginCode(u)); r.text("openid") != u.OpenID {
		t.Errorf("login: %s", r.body)
	}
	grant := c.get("/sns/oauth2/component/access_token", query+"&code="+s.UserCode(u, testPlatform, scopeBase))
	if grant.fields["is_snapshotuser"] != 1.0 {
		t.Errorf("snapshot user: %s", grant.body)
	}
	refresh := strings.Replace(query, "authorization_code", "refresh_token", 1) + "&refresh_token=" + grant.text("refresh_token")
	if r := c.get("/sns/oauth2/component/refresh_token", refresh); r.text("access_token") == "" {
		t.Errorf("refresh: %s", r.body)
	}
}

func TestLand(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	srv := httptest.NewServer(http.RedirectHandler("https://shop.example.com/?wxTkId=1", http.StatusFound))
	t.Cleanup(srv.Close)
	for _, l := range s.Land(t.Context(), srv.URL+"/cb?code=1#/page", 2) {
		if l.Err != nil || l.Status != http.StatusFound || l.Location != "https://shop.example.com/?wxTkId=1" {
			t.Errorf("%+v", l)
		}
	}
}
