package wxsim

import (
	"errors"
	"net/http"
	"net/url"
	"strings"
	"testing"
)

const authorizeHost = "wechat.example.com"

// bindLink is a right link with a fresh code, with parts replaced, in pairs of old and new.
func (c caller) bindLink(component, path string, replace ...string) string {
	c.t.Helper()
	r := c.post("/cgi-bin/component/api_create_preauthcode", "component_access_token="+component, `{"component_appid":"`+testPlatform+`"}`)
	l := "https://mp.weixin.qq.com" + desktopLinkPath + "?"
	if path == mobileLinkPath {
		l = "https://open.weixin.qq.com" + mobileLinkPath + "?action=bindcomponent&no_scan=1&"
	}
	l += "component_appid=" + testPlatform + "&pre_auth_code=" + url.QueryEscape(r.text("pre_auth_code")) +
		"&redirect_uri=" + url.QueryEscape("https://"+authorizeHost+"/cb?s=x") + "&auth_type=3"
	if path == mobileLinkPath {
		l += "#wechat_redirect"
	}
	return strings.NewReplacer(replace...).Replace(l)
}

func TestFollowAuthorizationLink(t *testing.T) {
	t.Parallel()
	s := newSim(t, func(c *Config) { c.Platforms[0].AuthorizeHost = authorizeHost })
	c := caller{t, s}
	component, _, _ := c.authorized(testShop)
	for _, path := range []string{desktopLinkPath, mobileLinkPath} {
		link := c.bindLink(component, path, "auth_type=3", "auth_type=3&category_id_list=1%7C4")
		callback, err := s.FollowAuthorizationLink(link, "https://"+authorizeHost+"/", testMini)
		if err != nil {
			t.Fatal(err)
		}
		u, err := url.Parse(callback)
		if err != nil || u.Host != authorizeHost || u.Query().Get("s") != "x" || u.Query().Get("expires_in") != "3600" {
			t.Errorf("callback %s", callback)
		}
		r := c.post("/cgi-bin/component/api_query_auth", "component_access_token="+component,
			`{"component_appid":"`+testPlatform+`","authorization_code":"`+u.Query().Get("auth_code")+`"}`)
		if !strings.Contains(string(r.body), testMini) || !strings.Contains(string(r.body), `"func_info":[{"funcscope_category":{"id":1}},{"funcscope_category":{"id":4}}]`) {
			t.Errorf("exchange: %s", r.body)
		}
		if _, err := s.FollowAuthorizationLink(link, "https://"+authorizeHost+"/", testMini); err == nil {
			t.Error("a pre-authorization code works twice")
		}
	}
	if _, err := s.FollowAuthorizationLink(c.bindLink(component, desktopLinkPath, "&auth_type=3", ""), "https://"+authorizeHost+"/", testMini); err != nil {
		t.Errorf("without auth_type: %v", err)
	}
	// As a browser gets it.
	address, _, _ := strings.Cut(c.bindLink(component, mobileLinkPath, "https://open.weixin.qq.com", s.URL()), "#")
	for referer, status := range map[string]int{"": http.StatusOK, "https://" + authorizeHost + "/": http.StatusFound} {
		req, _ := http.NewRequest(http.MethodGet, address, nil)
		req.Header.Set("Referer", referer)
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != status {
			t.Errorf("Referer %q: %d", referer, resp.StatusCode)
		}
	}
}

func TestFollowAuthorizationLinkRefuses(t *testing.T) {
	t.Parallel()
	s := newSim(t, func(c *Config) { c.Platforms[0].AuthorizeHost = authorizeHost })
	c := caller{t, s}
	component, _, _ := c.authorized(testShop)
	const here = "https://" + authorizeHost + "/page"
	for _, tt := range []struct{ name, link, referer, appID string }{
		{"no Referer", c.bindLink(component, desktopLinkPath), "", testShop},
		{"another host's Referer", c.bindLink(component, desktopLinkPath), "https://" + authorizeHost + ".evil.example/", testShop},
		{"redirect to another host", c.bindLink(component, desktopLinkPath, authorizeHost, "evil.example"), here, testShop},
		{"redirect to plain http", c.bindLink(component, desktopLinkPath, "https%3A", "http%3A"), here, testShop},
		{"another origin", c.bindLink(component, desktopLinkPath, "mp.weixin", "open.weixin"), here, testShop},
		{"another page", c.bindLink(component, desktopLinkPath, "componentloginpage", "login"), here, testShop},
		{"no fragment on the phone", c.bindLink(component, mobileLinkPath, "#wechat_redirect", ""), here, testShop},
		{"no action", c.bindLink(component, mobileLinkPath, "action=bindcomponent&", ""), here, testShop},
		{"unknown parameter", c.bindLink(component, desktopLinkPath, "auth_type=3", "auth_type=3&state=x"), here, testShop},
		{"unknown auth_type", c.bindLink(component, desktopLinkPath, "auth_type=3", "auth_type=7"), here, testShop},
		{"empty parameter", c.bindLink(component, desktopLinkPath, "auth_type=3", "auth_type=3&biz_appid="), here, testShop},
		{"list that is none", c.bindLink(component, desktopLinkPath, "auth_type=3", "auth_type=3&category_id_list=1,4"), here, testShop},
		{"unknown platform", c.bindLink(component, desktopLinkPath, testPlatform, testShop), here, testShop},
		{"code made up", c.bindLink(component, desktopLinkPath, "preauthcode", "x"), here, testShop},
		{"account of another sort", c.bindLink(component, desktopLinkPath, "auth_type=3", "auth_type=1"), here, testMini},
		{"another account than wanted", c.bindLink(component, desktopLinkPath, "auth_type=3", "auth_type=3&biz_appid="+testMini), here, testShop},
		{"no such account", c.bindLink(component, desktopLinkPath), here, "wx0000000000000000"},
	} {
		_, err := s.FollowAuthorizationLink(tt.link, tt.referer, tt.appID)
		if _, isPage := errors.AsType[*PageError](err); !isPage {
			t.Errorf("%s: %v, want a page error", tt.name, err)
		}
	}
}
