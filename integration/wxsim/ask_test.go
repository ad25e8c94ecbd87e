package wxsim

import (
	"net/http"
	"regexp"
	"strings"
	"testing"
)

// TestAsk: pages that ask check the link first, send nobody on by themselves, and give each press a code of its own.
func TestAsk(t *testing.T) {
	t.Parallel()
	s := newSim(t, func(c *Config) {
		c.Ask, c.OAuthHosts = true, []string{"wechat.example.com"}
		c.Platforms[0].AuthorizeHost = authorizeHost
	})
	c := caller{t, s}
	component, _, _ := c.authorized(testShop)
	buttons := func(r result) (addresses []string) {
		t.Helper()
		for _, m := range regexp.MustCompile(`<a href="([^"]*)">`).FindAllStringSubmatch(string(r.body), -1) {
			addresses = append(addresses, m[1])
		}
		return addresses
	}
	press := func(address string) string {
		t.Helper()
		path, query, _ := strings.Cut(address, "?")
		r := c.get(path, query)
		if r.status != http.StatusFound {
			t.Fatalf("pressed: %d %s", r.status, r.body)
		}
		return r.header.Get("Location")
	}

	address, _, _ := strings.Cut(strings.TrimPrefix(link(), "https://open.weixin.qq.com"), "#")
	path, query, _ := strings.Cut(address, "?")
	page := c.get(path, query)
	found := buttons(page)
	if page.status != http.StatusOK || len(found) != 2 {
		t.Fatalf("the page of a login: %d %s", page.status, page.body)
	}
	first, second, refused := press(found[0]), press(found[0]), press(found[1])
	if !strings.Contains(first, "code=") || first == second || strings.Contains(refused, "code=") || !strings.Contains(refused, "state=s1") {
		t.Errorf("agreed %s, again %s, refused %s", first, second, refused)
	}
	if r := c.get(path, strings.Replace(query, "snsapi_base", "snsapi_nothing", 1)); len(buttons(r)) > 0 || !strings.Contains(string(r.body), "10005") {
		t.Errorf("a wrong link: %d %s", r.status, r.body)
	}
	if r := c.get(choicePath, "id=x"); r.status != http.StatusOK || !strings.Contains(string(r.body), "no such button") {
		t.Errorf("no button: %d %s", r.status, r.body)
	}

	_, query, _ = strings.Cut(c.bindLink(component, desktopLinkPath), "?")
	if r := c.get(desktopLinkPath, query); len(buttons(r)) > 0 || !strings.Contains(string(r.body), "授权发起页域名") {
		t.Errorf("who comes from nowhere: %d %s", r.status, r.body)
	}
}
