package caddymodule

import (
	"net/http"
	"strings"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

func TestMatchPattern(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		pattern, path string
		want          bool
	}{
		{"/cgi-bin/user/info", "/cgi-bin/user/info", true},
		{"/cgi-bin/user/info", "/cgi-bin/user/info2", false},
		{"/cgi-bin/user/*", "/cgi-bin/user/info", true},
		{"/cgi-bin/user/*", "/cgi-bin/user/info/batchget", true},
		{"/cgi-bin/user/*", "/cgi-bin/user", false},
		{"/cgi-bin/user/*", "/cgi-bin/users", false},
		{"/cgi-bin/user*", "/cgi-bin/users", true},
		{"/*/get", "/cgi-bin/menu/get", true},
		{"/*/get", "/cgi-bin/menu/getx", false},
		{"/*/get", "/get", false},
		{"/a*b*c", "/axxbyyc", true},
		{"/a*b*c", "/axxbyyd", false},
		{"/a*b*c", "/abc", true},
		{"/a*b*c", "/ac", false},
		{"/*", "/anything/at/all", true},
		{"/**", "/x", true},
	} {
		if got := matchPattern(c.pattern, c.path); got != c.want {
			t.Errorf("%s on %s: got %v", c.pattern, c.path, got)
		}
	}
}

// A pattern that can match nothing is refused, with what to write in its place.
func TestLiteralPathPattern(t *testing.T) {
	t.Parallel()
	for _, pattern := range []string{"/*", "/**", "/cgi-bin/user/*", "/cgi-bin/user/info", "/*/get", "/a*b*c", "/wx*", "/wxa/*", "/*wx0123456789abcdef/x"} {
		if err := literalPathPattern(pattern); err != nil {
			t.Errorf("%s: %v", pattern, err)
		}
	}
	for pattern, want := range map[string]string{
		"": "must begin with /", "cgi-bin/*": "must begin with /", "*": "must begin with /", "/": "matches nothing", "/cgi-bin/user/": "'/cgi-bin/user/*' is all below it",
		"//cgi-bin/*": "one / at their start", "/cgi-bin//x": "empty", "/cgi-bin/../x": "..", "/cgi-bin/%75ser": "percent-encoded", "/cgi-bin/x?a=*": "only letters",
		"/wx0123456789abcdef/cgi-bin/*": "list that in appids",
	} {
		if err := literalPathPattern(pattern); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", pattern, err, want)
		}
	}
}

// However a path is spelt, it is matched in its one canonical spelling, or refused.
func TestAPIPathsAreCanonical(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.opaque(accountID, shopKey)
	wechat.seen()
	for target, status := range map[string]int{
		"/" + accountID + "/cgi-bin/user/info": 200, "//" + accountID + "//cgi-bin/user/info": 200, "/" + accountID + "/cgi-bin/user/info/": 200,
		"/" + accountID + "/cgi-bin/menu/get": 403, "/" + accountID + "//cgi-bin/menu/get/": 403, "/" + accountID + "/CGI-BIN/USER/info": 403,
		"/" + accountID + "/cgi-bin/user/../menu/get": 400, "/" + accountID + "/cgi-bin/user/%2e%2e/menu/get": 400, "/" + accountID + "/cgi-bin/user%2f..%2fmenu/get": 400,
		"/" + accountID + "/cgi-bin/user//../menu/get": 400, "/" + accountID + "/cgi-bin/user/;/menu": 400,
	} {
		a := g.get(target, bearer(shopKey))
		calls := wechat.seen()
		if a.Status != status || (len(calls) == 1) != (status == 200) || status == 200 && calls[0].Path != "/cgi-bin/user/info" {
			t.Errorf("%s: got %d %s, WeChat %+v; want %d", target, a.Status, a.Body, calls, status)
		}
	}
}

func TestClientKeys(t *testing.T) {
	t.Parallel()
	a := &Client{Name: "a", keys: []secret.String{secret.New("k1"), secret.New("k2")}}
	b := &Client{Name: "b", keys: []secret.String{secret.New("k3")}}
	keys := newClientKeys([]*Client{a, b})
	for key, want := range map[string]*Client{"k1": a, "k2": a, "k3": b, "": nil, "k": nil, "k11": nil} {
		if got, _ := keys.find(key); got != want {
			t.Errorf("%q: got %v", key, got)
		}
	}
	_, fingerprint := keys.find("k2")
	if owner, current := keys.holder("a", fingerprint); owner != a || !current {
		t.Error("the holder of a key is not found")
	}
	if owner, current := keys.holder("b", fingerprint); owner != b || current {
		t.Error("another client's key is taken for this one's")
	}
	if owner, _ := keys.holder("c", fingerprint); owner != nil {
		t.Error("a client that is none is found")
	}
	// An empty key in the config would let everybody in who sends none.
	if got, _ := newClientKeys([]*Client{{Name: "x", keys: []secret.String{secret.New("")}}}).find(""); got != nil {
		t.Error("an empty key was accepted")
	}
}

func TestIsTrustedLoopback(t *testing.T) {
	t.Parallel()
	for remote, want := range map[string]bool{
		"127.0.0.1:1": true, "127.8.9.1:1": true, "[::1]:1": true, "[::ffff:127.0.0.1]:1": true,
		"192.0.2.1:1": false, "[2001:db8::1]:1": false, "@": false, "": false, "127.0.0.1": false, "localhost:1": false,
	} {
		r := &http.Request{RemoteAddr: remote, Host: "localhost:8090", Header: http.Header{"Accept": {"*/*"}}}
		if got := isTrustedLoopback(r); got != want {
			t.Errorf("%q: got %v", remote, got)
		}
	}
}

// A web page whose name its owner let resolve to 127.0.0.1 is not a program on this machine.
func TestIsOwnHost(t *testing.T) {
	t.Parallel()
	for host, want := range map[string]bool{
		"localhost": true, "LOCALHOST:8090": true, "127.0.0.1": true, "127.0.0.1:8090": true, "[::1]": true, "[::1]:8090": true,
		"api.weixin.qq.com": true, "API2.weixin.qq.com:443": true, "sh.api.weixin.qq.com": true,
		"": false, "evil.example": false, "evil.example:8090": false, "192.0.2.1": false, "[2001:db8::1]:80": false, "0.0.0.0": false,
		"weixin.qq.com.evil.example": false, "evilweixin.qq.com": false, "localhost.evil.example": false, "127.0.0.1.evil.example": false,
	} {
		if got := isOwnHost(host); got != want {
			t.Errorf("%q: got %v", host, got)
		}
	}
}

func TestLiteralClientName(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"crm", "客户", strings.Repeat("c", tokens.MaxOpaqueName)} {
		if err := literalClientName(name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	for name, want := range map[string]string{
		"loopback": "is taken", strings.Repeat("c", tokens.MaxOpaqueName+1): "at most 255", "a\nb": "control", "a\xff": "UTF-8",
	} {
		if err := literalClientName(name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", name, err, want)
		}
	}
}
