package caddymodule

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
)

func TestAPITrustLoopback(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", `{"trust_loopback":true}`)
	g.authorize()
	wechat.seen()
	const target = "/" + accountID + "/cgi-bin/user/info"
	if a := g.get(target); a.Status != http.StatusOK || a.Body != `{"errcode":0,"errmsg":"ok"}` {
		t.Fatalf("got %d %s", a.Status, a.Body)
	}
	if a := g.get("/" + authorizerID + "/cgi-bin/user/info"); a.Status != http.StatusOK {
		t.Errorf("authorizer: got %d %s", a.Status, a.Body)
	}
	wechat.seen()
	for _, header := range []string{
		"Forwarded: for=1", "X-Forwarded-For: 127.0.0.1", "X-Forwarded-Proto: https", "X-Forwarded-Anything: x", "X-Real-IP: 127.0.0.1",
		"Via: 1.1 proxy", "Origin: null", "Sec-Fetch-Site: none", "Sec-Fetch-Mode: navigate",
	} {
		if a := g.get(target, header); a.Status != http.StatusUnauthorized || a.code(t) != 41001 {
			t.Errorf("%s: got %d %s, want 401", header, a.Status, a.Body)
		}
	}
	for name, a := range map[string]answer{
		"a wrong key stays wrong": g.get(target, bearer(strangerKey)),
		"a platform":              g.get("/" + platformID + "/cgi-bin/component/get_authorizer_option"),
	} {
		if code := a.code(t); code != 40125 && code != 48001 {
			t.Errorf("%s: got %d %s", name, a.Status, a.Body)
		}
	}
	if calls := wechat.seen(); len(calls) != 0 {
		t.Errorf("WeChat was called: %+v", calls)
	}
	// Clients are configured, and yet an SDK may send any secret, as it may send no key at all in the other ways.
	token := g.opaque(accountID, "whatever")
	if a := g.get("/cgi-bin/user/info?access_token=" + token); a.Status != http.StatusOK || a.Body != `{"errcode":0,"errmsg":"ok"}` {
		t.Errorf("SDK: got %d %s", a.Status, a.Body)
	}
}

// A web page can let its own name resolve to 127.0.0.1 and call the gateway from a browser on this machine. What gives
// it away is the name, in Host or in an absolute target.
func TestAPITrustLoopbackNamesOwnHost(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", `{"trust_loopback":true}`)
	token := g.opaque(accountID, "whatever")
	wechat.seen()
	const path = "/" + accountID + "/cgi-bin/user/info"
	for host, want := range map[string]int{
		"evil.example:8090": 401, "evil.example": 401, "192.0.2.1": 401, "": 401,
		"localhost:8090": 200, "127.0.0.1": 200, "[::1]:8090": 200, "api.weixin.qq.com": 200,
	} {
		requests := map[string]string{"host": "GET " + path + " HTTP/1.1\r\nHost: " + host + "\r\n"}
		if host != "" {
			requests["absolute target"] = "GET http://" + host + path + " HTTP/1.1\r\nHost: localhost\r\n"
		}
		for name, request := range requests {
			if status, body := g.raw(t, request+"Connection: close\r\n\r\n"); status != want {
				t.Errorf("%s, %q: got %d %s, want %d", name, host, status, body, want)
			}
		}
	}
	wechat.seen()
	for name, target := range map[string]string{
		"its token": "/cgi-bin/user/info?access_token=" + token, "a grant": "/cgi-bin/token?grant_type=client_credential&secret=x&appid=" + accountID,
	} {
		_, body := g.raw(t, "GET "+target+" HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
		if !strings.Contains(body, `"errcode":48001`) && !strings.Contains(body, `"errcode":40125`) {
			t.Errorf("%s, under a foreign name: got %s", name, body)
		}
	}
	if calls := wechat.seen(); len(calls) != 0 {
		t.Errorf("WeChat was called: %+v", calls)
	}
}

// Without any client, trust_loopback serves SDKs too: they have to send some secret.
func TestAPITrustLoopbackForSDKs(t *testing.T) {
	wechat := newFakeWeChat(t)
	config := fmt.Sprintf(`{"accounts":[{"appid":%q,"secret":"account-secret"}],"api":[%q]}`, accountID, wechat.URL)
	g := newGateway(t, wechat, config, `{"trust_loopback":true}`)
	token := g.opaque(accountID, "whatever")
	if a := g.get("/cgi-bin/user/info?access_token=" + token); a.Status != http.StatusOK || a.Body != `{"errcode":0,"errmsg":"ok"}` {
		t.Errorf("got %d %s", a.Status, a.Body)
	}
	if a := g.get("/cgi-bin/user/info?access_token="+token, "Via: 1.1 proxy"); a.code(t) != 48001 {
		t.Errorf("through a proxy: got %d %s", a.Status, a.Body)
	}
	g.api.TrustLoopback = false
	if a := g.get("/cgi-bin/user/info?access_token=" + token); a.code(t) != 48001 {
		t.Errorf("no longer trusted: got %d %s", a.Status, a.Body)
	}
	if a := g.get("/cgi-bin/token?grant_type=client_credential&secret=x&appid=" + accountID); a.code(t) != 40125 {
		t.Errorf("no longer trusted: got %d %s", a.Status, a.Body)
	}
}

// Without any client trust_loopback alone opens the listener, for users' own tokens too.
func TestAPIWithoutAnyClient(t *testing.T) {
	wechat := newFakeWeChat(t)
	config, _ := json.Marshal(map[string]any{
		"accounts": []any{map[string]string{"appid": accountID, "secret": "account-secret"}}, "api": []string{wechat.URL},
	})
	targets := []string{
		"/" + accountID + "/cgi-bin/user/info", "/cgi-bin/user/info?access_token=abc", "/cgi-bin/token", "/cgi-bin/ticket/getticket?type=jsapi", "/wechat/users/x",
		"/sns/userinfo?access_token=USER&openid=o1", "/sns/auth?access_token=USER&openid=o1", "/sns/oauth2/refresh_token?appid=" + accountID + "&refresh_token=USER",
	}
	g := newGateway(t, wechat, string(config), "")
	for _, target := range targets {
		if a := g.get(target); a.Status != http.StatusUnauthorized && a.code(t) != 40001 { // as an SDK is told of a token
			t.Errorf("%s: got %d %s, want 401", target, a.Status, a.Body)
		}
		if a := g.get(target, bearer(strangerKey)); a.Status != http.StatusUnauthorized {
			t.Errorf("%s, with a key: got %d %s, want 401", target, a.Status, a.Body)
		}
	}
	g = newGateway(t, wechat, string(config), `{"trust_loopback":true}`)
	for _, target := range targets {
		if a := g.get(target, "X-Forwarded-For: 192.0.2.1"); a.Status != http.StatusUnauthorized && a.code(t) != 40001 {
			t.Errorf("%s, through a proxy: got %d %s, want 401", target, a.Status, a.Body)
		}
	}
	if calls := wechat.seen(); len(calls) != 0 {
		t.Errorf("WeChat was called: %+v", calls)
	}
	for _, target := range targets[5:] {
		if a := g.get(target); a.Status != http.StatusOK {
			t.Errorf("%s, from this machine: got %d %s", target, a.Status, a.Body)
		}
	}
	if calls := wechat.seen(); len(calls) != 3 {
		t.Errorf("WeChat was called: %+v", calls)
	}
}
