package integration_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// egress is an HTTP proxy that is the gateway's only way out, and notes where it wants to go. It leads to WeChat alone.
type egress struct {
	net.Listener
	wechat func() string // host and port

	mu     sync.Mutex
	wanted map[string]int
}

func newEgress(t *testing.T) *egress {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e := &egress{Listener: l, wanted: make(map[string]int)}
	server := &http.Server{Handler: e, ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = server.Serve(l) }() // ends with Close
	t.Cleanup(func() { _ = server.Close() })
	return e
}

// ServeHTTP implements http.Handler: it makes tunnels to WeChat, and nothing else.
func (e *egress) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	host := r.URL.Host
	e.mu.Lock()
	e.wanted[host]++
	e.mu.Unlock()
	if r.Method != http.MethodConnect || host != e.wechat() || r.Host != e.wechat() {
		w.WriteHeader(http.StatusForbidden)
		return
	}
	there, err := net.Dial("tcp", host)
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	w.WriteHeader(http.StatusOK)
	here, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		_ = there.Close()
		return
	}
	go func() { // ends with either
		_, _ = io.Copy(there, buffered)
		_ = there.Close()
	}()
	_, _ = io.Copy(here, there)
	_ = here.Close()
}

func (e *egress) hosts() (list []string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for host := range e.wanted {
		list = append(list, host)
	}
	return list
}

// canary is a host that nobody should connect to.
func canary(t *testing.T) (addr string, touched func() int) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	n := 0
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_ = conn.Close()
			mu.Lock()
			n++
			mu.Unlock()
		}
	}()
	t.Cleanup(func() { _ = l.Close() })
	return l.Addr().String(), func() int { mu.Lock(); defer mu.Unlock(); return n }
}

// raw sends bytes as they are and returns the answers to all requests that the gateway found in them.
func raw(t *testing.T, addr, request string) (answers []*http.Response, bodies []string) {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	_, _ = io.WriteString(conn, request) // the gateway may hang up before the end
	r := bufio.NewReader(conn)
	for {
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			return answers, bodies
		}
		body, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		answers, bodies = append(answers, resp), append(bodies, string(body))
		_ = conn.SetDeadline(time.Now().Add(300 * time.Millisecond)) // a second answer comes at once
	}
}

// TestHostileClient is what a client with few rights, or somebody with none, may send to a gateway process to get at an
// account, an API path or a host that is not theirs. Nothing of it reaches WeChat as anything but the caller's own call,
// and no other host is ever connected to: the gateway's one way out notes where it wants to go.
func TestHostileClient(t *testing.T) {
	t.Parallel()
	example, err := os.ReadFile("../Caddyfile.example")
	if err != nil {
		t.Fatal(err)
	}
	out := newEgress(t)
	evil, touched := canary(t)
	text := strings.Replace(string(example), "\t\tclient crm {", "\t\tproxy http://"+out.Addr().String()+"\n\t\tclient bi {\n\t\t\tkey {env.BI_KEY}\n\t\t\tappids "+
		integration.AccountID+"\n\t\t\tpaths /cgi-bin/user/* /sns/*\n\t\t}\n\t\tclient crm {", 1)
	config := filepath.Join(t.TempDir(), "Caddyfile")
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, func(w *integration.World) {
		polite(w)
		w.TLS = true // plain http to this machine does not use the proxy
		w.Caddyfile = config
		w.Env = append(w.Env, "BI_KEY="+biKey)
		out.wechat = func() string { return strings.TrimPrefix(w.WeChat.TLSURL(), "https://") }
	})
	authorize(t, w)
	s := &sdkWorld{World: w}
	const mine, other = integration.AccountID, integration.AuthorizerID
	user := w.WeChat.NewUser(mine)
	victim := w.WeChat.NewUser(other)
	myToken, otherToken := s.token(t, mine, biKey), s.token(t, other, w.ClientKey)
	key := "Authorization: Bearer " + biKey + "\r\n"
	const host = "Host: api.weixin.qq.com\r\n"
	const end = "Connection: close\r\n\r\n"
	get := func(target string, headers ...string) string {
		return "GET " + target + " HTTP/1.1\r\n" + strings.Join(headers, "") + host + end
	}
	post := func(target, framing, body string, headers ...string) string {
		return "POST " + target + " HTTP/1.1\r\n" + strings.Join(headers, "") + host + framing + "\r\n" + body
	}
	info := "/cgi-bin/user/info?openid=" + victim.OpenID
	mineInfo := "/cgi-bin/user/info?openid=" + user.OpenID
	at := func(path string) string { return "/" + mine + path }

	t.Run("refused", func(t *testing.T) {
		for name, request := range map[string]string{
			// Traversal and spelling.
			"dots": get(at("/cgi-bin/user/../menu/get"), key), "dots out of the appid": get("/"+mine+"/../"+other+info, key),
			"encoded dots": get(at("/cgi-bin/user/%2e%2e/menu/get"), key), "dots encoded twice": get(at("/cgi-bin/user/%252e%252e/menu/get"), key),
			"overlong dots": get(at("/cgi-bin/user/%c0%ae%c0%ae/menu/get"), key), "encoded slash": get(at("/cgi-bin/user%2f..%2fmenu/get"), key),
			"encoded slash for the prefix": get("/"+mine+"%2fcgi-bin/menu/get", key), "backslash": get(at("/cgi-bin/user\\..\\menu/get"), key),
			"encoded backslash": get(at("/cgi-bin/user/..%5cmenu/get"), key), "NUL": get(at("/cgi-bin/user/%00/../menu/get"), key), "semicolon": get(at("/cgi-bin/user/..;/menu/get"), key),
			"two prefixes": get("/"+mine+"/"+other+info, key), "capitals": get(at("/cgi-bin/MENU/get"), key), "path not listed": get(at("/cgi-bin/menu/get"), key),
			"a path that burns": get("/"+mine+"/cgi-bin/user/../openapi/rid/get", key), "the platform": get("/"+integration.PlatformID+"/cgi-bin/component/api_create_preauthcode", key),
			// Parameters twice.
			"two tokens": get(mineInfo + "&access_token=" + myToken + "&access_token=" + otherToken), "two tokens, the other first": get(mineInfo + "&access_token=" + otherToken + "x&access_token=" + myToken),
			"two names": get(mineInfo + "&access_token=" + myToken + "&component_access_token=" + otherToken), "behind a semicolon": get(mineInfo+"&a=1;access_token="+otherToken, key),
			"encoded name":          get(mineInfo + "&access_token=" + myToken + "&%61ccess_token=" + otherToken),
			"two appids in a login": get("/sns/jscode2session?js_code=c&appid=" + mine + "&appid=" + other + "&secret=" + biKey),
			// Headers of the gateway's own.
			"another appid by header": get(info, key, "X-Wechat-Appid: "+other+"\r\n"), "two appids by header": get(mineInfo, key, "X-Wechat-Appid: "+mine+"\r\nX-Wechat-Appid: "+other+"\r\n"),
			"header against prefix": get(at(info), key, "x-wechat-appid: "+other+"\r\n"), "header against token": get(info+"&access_token="+myToken, "X-Wechat-Appid: "+other+"\r\n"),
			"a list by header": get(mineInfo, key, "X-Wechat-Appid: "+mine+","+other+"\r\n"), "underscores": get(info, key, "X_Wechat_Appid: "+other+"\r\n"),
			"a client by header": get("/"+other+info, "X-Wechat-Client: crm\r\n", "X-Wechat-Platform: "+integration.PlatformID+"\r\n"),
			// Tokens of others.
			"another account's prefix": get("/" + other + info + "&access_token=" + myToken), "my key for another's account": get("/"+other+info, key),
			"my key beside another's token": get("/"+other+info+"&access_token="+otherToken, key), "half a token": get(info + "&access_token=" + otherToken[:len(otherToken)/2]),
			"an altered token": get(info + "&access_token=" + myToken[:len(myToken)-30] + strings.Repeat("A", 30)), "two halves": get(info + "&access_token=" + otherToken[:40] + myToken[40:]),
			"a key as a token": get(info + "&access_token=" + w.ClientKey), "a token as a key": get("/"+other+info, "Authorization: Bearer "+otherToken+"\r\n"),
			"a user's token's place": get("/sns/userinfo?openid=x&access_token=" + otherToken), "this machine, it says": get("/"+other+info, "X-Forwarded-For: 127.0.0.1\r\n", "X-Real-Ip: ::1\r\n"),
			"two keys": get("/"+other+info, key, "Authorization: Bearer "+w.ClientKey+"x\r\n"),
			// Targets of other forms, without a right.
			"absolute": get("http://"+evil+"/"+other+info, key), "CONNECT": "CONNECT " + evil + " HTTP/1.1\r\n" + key + "Host: " + evil + "\r\n" + end,
			"asterisk": "GET * HTTP/1.1\r\n" + key + host + end, "a scheme in the path": get("/"+mine+"/http://"+evil+"/x", key), "an authority in the path": get("/"+mine+"/@"+evil+"/x", key),
			// What would end a line.
			"CRLF in the path": get(at("/cgi-bin/user/info%0d%0aX-Evil:1"), key), "CRLF in the appid": get(info, key, "X-Wechat-Appid: "+mine+"%0d%0aHost: "+evil+"\r\n"),
			"a bare CR": get(at("/cgi-bin/user/info"), key, "X-A: a\rX-Wechat-Appid: "+other+"\r\n"), "a NUL in a header": get(at("/cgi-bin/user/info"), key, "X-A: a\x00b\r\n"),
			"a space in a name": get(at("/cgi-bin/user/info"), key, "X-A : b\r\n"), "a space in the target": "GET " + at(mineInfo) + " /x HTTP/1.1\r\n" + key + host + end,
			"no such version": "GET " + at(mineInfo) + " HTTP/9.9\r\n" + key + host + end, "two hosts": get(at(mineInfo), key, "Host: "+evil+"\r\n"),
			// Lengths that two readers take in two ways.
			"two lengths": post(at("/cgi-bin/user/tag/get"), "Content-Length: 2\r\nContent-Length: 3\r\n", "{}x", key), "a signed length": post(at("/cgi-bin/user/tag/get"), "Content-Length: +2\r\n", "{}", key),
			"a length in hex": post(at("/cgi-bin/user/tag/get"), "Content-Length: 0x2\r\n", "{}", key), "a list of lengths": post(at("/cgi-bin/user/tag/get"), "Content-Length: 2, 3\r\n", "{}x", key),
			"an unknown coding": post(at("/cgi-bin/user/tag/get"), "Transfer-Encoding: xchunked\r\n", "0\r\n\r\n", key), "chunked is not last": post(at("/cgi-bin/user/tag/get"), "Transfer-Encoding: chunked, identity\r\n", "0\r\n\r\n", key),
			"two codings": post(at("/cgi-bin/user/tag/get"), "Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n", "0\r\n\r\n", key), "a coding with a tab": post(at("/cgi-bin/user/tag/get"), "Transfer-Encoding:\x0bchunked\r\n", "0\r\n\r\n", key),
			"a space before the colon":   post(at("/cgi-bin/user/tag/get"), "Transfer-Encoding : chunked\r\n", "0\r\n\r\n", key),
			"a chunk too large to count": post(at("/cgi-bin/user/tag/get"), "Transfer-Encoding: chunked\r\n", "FFFFFFFFFFFFFFFFF\r\n{}\r\n0\r\n\r\n", key),
			"a chunk that does not end":  post(at("/cgi-bin/user/tag/get"), "Transfer-Encoding: chunked\r\n", "2\r\n{}XX0\r\n\r\n", key),
		} {
			before := w.WeChat.Journal().Entries()
			answers, bodies := raw(t, w.API, request)
			if len(answers) != 1 {
				t.Errorf("%s: %d answers", name, len(answers))
				continue
			}
			status, body := answers[0].StatusCode, bodies[0]
			if refused := strings.Contains(body, `"errcode":`) && !strings.Contains(body, `"errcode":0`); status < 400 && !refused || status >= 500 && status != http.StatusNotImplemented && status != http.StatusHTTPVersionNotSupported {
				t.Errorf("%s: %d %s", name, status, body)
			}
			checkNoSecrets(t, w, name, body+fmt.Sprint(answers[0].Header))
			if after := w.WeChat.Journal().Entries(); len(after) != len(before) {
				e := after[len(after)-1]
				t.Errorf("%s: WeChat saw %s %s?%s", name, e.Method, e.Path, e.Query)
			}
		}
	})

	// Calls that are within the client's rights go through, and only as what they are, whatever else they say.
	t.Run("passed", func(t *testing.T) {
		for name, request := range map[string]string{
			"Host of its own choice": "GET " + at(mineInfo) + " HTTP/1.1\r\n" + key + "Host: " + evil + "\r\n" + end,
			"absolute target":        "GET http://" + evil + at(mineInfo) + " HTTP/1.1\r\n" + key + "Host: " + evil + "\r\n" + end,
			"absolute https target":  "GET https://user@" + evil + at(mineInfo) + " HTTP/1.1\r\n" + key + host + end,
			"two leading slashes":    get("//"+mine+mineInfo, key),
			"told to go elsewhere": get(at(mineInfo), key, "X-Forwarded-Host: "+evil+"\r\n", "X-Original-Url: /cgi-bin/menu/get\r\n", "X-Rewrite-Url: http://"+evil+"/\r\n", "X-Http-Method-Override: DELETE\r\n",
				"Forwarded: host="+evil+"\r\n", "X-Wechat-Openid: x\r\n", "X-Wechat-Platform: "+integration.PlatformID+"\r\n", "Cookie: a=b\r\n", "Via: 1.1 x\r\n", "Proxy-Authorization: Basic eA==\r\n"),
			"nominated headers":    get(at(mineInfo), key, "Connection: X-Wechat-Appid, Authorization, Content-Length, Host\r\n"),
			"both tokens the same": get(mineInfo + "&access_token=" + myToken + "&access_token=" + myToken + "&component_access_token=" + myToken),
		} {
			before := w.WeChat.Journal().Entries()
			answers, bodies := raw(t, w.API, request)
			if len(answers) != 1 || answers[0].StatusCode != 200 || !strings.Contains(bodies[0], user.OpenID) {
				t.Errorf("%s: %d answers, %s", name, len(answers), bodies)
			}
			seen := w.WeChat.Journal().Entries()[len(before):]
			if len(seen) != 1 || seen[0].Path != "/cgi-bin/user/info" || seen[0].Host != out.wechat() || seen[0].AppID != mine || seen[0].Method != http.MethodGet {
				t.Errorf("%s: WeChat saw %+v", name, seen)
			}
		}
	})

	// A second request hidden in the body of a first is either part of that body or a request of its own to the gateway,
	// with no right of the first's.
	t.Run("smuggled", func(t *testing.T) {
		hidden := "GET /" + other + "/cgi-bin/menu/get HTTP/1.1\r\nHost: x\r\n\r\n"
		tags := at("/cgi-bin/user/tag/get")
		for name, request := range map[string]string{
			"CL.TE":             post(tags, fmt.Sprintf("Content-Length: %d\r\nTransfer-Encoding: chunked\r\n", 5+len(hidden)), "0\r\n\r\n"+hidden, key),
			"TE.CL":             post(tags, "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(hidden), hidden), key),
			"TE in capitals":    post(tags, "Content-Length: 4\r\nTRANSFER-ENCODING: CHUNKED\r\n", fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(hidden), hidden), key),
			"a folded TE":       post(tags, "X-A: b\r\n Transfer-Encoding: chunked\r\nContent-Length: 2\r\n", "{}"+hidden, key),
			"CL.0":              post(tags, "Content-Length: 0\r\n", hidden, key),
			"GET with a body":   "GET " + at(mineInfo) + " HTTP/1.1\r\n" + key + host + fmt.Sprintf("Content-Length: %d\r\n\r\n", len(hidden)) + hidden,
			"in a chunk's name": post(tags, "Transfer-Encoding: chunked\r\n", "2;a=\"\r\n{}\r\n0\r\n\r\n"+hidden, key),
			"in a trailer":      post(tags, "Transfer-Encoding: chunked\r\nTrailer: X-Wechat-Appid\r\n", "2\r\n{}\r\n0\r\nX-Wechat-Appid: "+other+"\r\nHost: "+evil+"\r\n\r\n"+hidden, key),
			"HTTP/1.0":          "POST " + tags + " HTTP/1.0\r\n" + key + "Connection: keep-alive\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n" + "{}" + hidden,
			"a CRLF too many":   post(tags, "Content-Length: 2\r\n", "{}\r\n\r\n"+hidden, key),
		} {
			before := w.WeChat.Journal().Entries()
			answers, bodies := raw(t, w.API, request)
			for _, e := range w.WeChat.Journal().Entries()[len(before):] {
				first := e.Path == "/cgi-bin/user/tag/get" || e.Path == "/cgi-bin/user/info"
				if !first || e.AppID != "" && e.AppID != mine || e.Header.Get("Trailer") != "" || e.Host != out.wechat() {
					t.Errorf("%s: WeChat saw %s %s of %s", name, e.Method, e.Path, e.AppID)
				}
			}
			if n := len(w.WeChat.Journal().Entries()) - len(before); n > 1 {
				t.Errorf("%s: one request became %d", name, n)
			}
			for i, a := range answers[min(1, len(answers)):] {
				if a.StatusCode < 400 {
					t.Errorf("%s: what was hidden got %d %s", name, a.StatusCode, bodies[i+1])
				}
			}
		}
	})

	if got := out.hosts(); !slices.Equal(got, []string{out.wechat()}) {
		t.Errorf("the gateway wanted to go to %v, want only %s", got, out.wechat())
	}
	if n := touched(); n != 0 {
		t.Errorf("the host of the caller's choice got %d connections", n)
	}
	for _, v := range w.WeChat.Journal().Violations() {
		if v.Direction == wxsim.In {
			t.Errorf("WeChat saw %s %s?%s: %v", v.Method, v.Path, v.Query, v.Violations)
		}
	}
	for _, token := range []string{myToken, otherToken, biKey} {
		if i := strings.Index(w.Gateway.Log(), token); i >= 0 {
			t.Errorf("a client's credential is in the log: …%s<HERE>…", w.Gateway.Log()[max(0, i-200):i])
		}
	}
	// And it still works for who has the right.
	if _, body := call(t, w, http.MethodGet, info+"&access_token="+otherToken, nil, ""); !strings.Contains(body, victim.OpenID) {
		t.Errorf("a good call: %s", body)
	}
}
