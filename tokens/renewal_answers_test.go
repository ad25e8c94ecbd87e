package tokens

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// wireWeChat is a fakeWeChat behind connections, which answers calls of one path as write says.
type wireWeChat struct {
	fake *fakeWeChat

	mu    sync.Mutex
	path  string
	write func(conn net.Conn, answer string) // what goes out in the place of the answer; the connection is closed then
	conns []net.Conn
}

func (w *wireWeChat) set(path string, write func(conn net.Conn, answer string)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.path, w.write = path, write
}

func (w *wireWeChat) dial(context.Context, string, string) (net.Conn, error) {
	here, there := net.Pipe()
	w.mu.Lock()
	w.conns = append(w.conns, there)
	w.mu.Unlock()
	go w.serve(there)
	return here, nil
}

func (w *wireWeChat) serve(conn net.Conn) {
	defer func() { _ = conn.Close() }()
	in := bufio.NewReader(conn)
	for {
		req, err := http.ReadRequest(in)
		if err != nil {
			return
		}
		w.mu.Lock()
		write := w.write
		if req.URL.Path != w.path {
			write = nil
		}
		w.mu.Unlock()
		res, err := w.fake.RoundTrip(req)
		if err != nil {
			return
		}
		answer, _ := io.ReadAll(res.Body)
		if write != nil {
			write(conn, string(answer))
			return
		}
		_, _ = io.WriteString(conn, lengthAnswer(string(answer)))
	}
}

func (w *wireWeChat) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.conns {
		_ = c.Close()
	}
}

func lengthAnswer(body string) string {
	return fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
}

func chunkedAnswer(body string) string {
	half := len(body) / 2
	return fmt.Sprintf("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-End\r\n\r\n%x\r\n%s\r\n%x\r\n%s\r\n0\r\nX-End: 1\r\n\r\n", half, body[:half], len(body)-half, body[half:])
}

func closedAnswer(body string) string { return "HTTP/1.0 200 OK\r\n\r\n" + body }

func gzipAnswer(body string) string {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, _ = io.WriteString(z, body)
	_ = z.Close()
	return fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%s", b.Len(), b.String())
}

// startedOnWire is started, in a bubble, with a WeChat behind connections.
func startedOnWire(t *testing.T) (*rig, *wireWeChat) {
	t.Helper()
	r := newRig(t)
	w := &wireWeChat{fake: r.wx}
	client, err := NewClient(ClientOptions{
		Origins:   []string{"http://localhost"},
		Transport: &http.Transport{DialContext: w.dial, DisableKeepAlives: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	r.env.API = client
	r.Use(r.env)
	r.ticket(t, testPlatform)
	synctest.Wait()
	return r, w
}

// renewals are the kinds of tokens, and the call that renews them.
var renewals = []struct {
	name string
	key  Key
	path string
}{
	{"authorizer", AuthorizerKey(testPlatform, testAuthorizer), pathAuthorizerToken},
	{"component", ComponentKey(testPlatform), pathComponentToken},
	{"account", AccountKey(testAccount), pathStableToken},
	{"jsapi", JSAPIKey("", testAccount), pathGetTicket},
}

// refreshTokens says how a WeChat deals with an authorizer's refresh token at a renewal.
type refreshTokens int

const (
	isListed refreshTokens = iota // there is a new one, which its list tells too
	isTold                        // there is a new one, which the answer alone tells
	isKept                        // it stays, and the list does not tell it
)

// spoiltRenewal has the answer to one renewal spoilt, and checks that the old token serves while it lives, that a working one is
// there soon after WeChat answers well again, also after a restart, and that the authorization stays. Later is how long the answer may
// have a token taken to live; without that all tokens have short lives, so that less has to pass for the old one to be stale.
func spoiltRenewal(t *testing.T, k Key, path string, refresh refreshTokens, later time.Duration, write func(conn net.Conn, answer string)) {
	synctest.Test(t, func(t *testing.T) {
		r, w := startedOnWire(t)
		defer w.close()
		if later == 0 {
			r.wx.set(func(f *fakeWeChat) { f.expires = "1200" })
		}
		r.authorize(t, testPlatform, testAuthorizer)
		r.wx.set(func(f *fakeWeChat) {
			f.rotate, f.strict = refresh != isKept, true
			if refresh != isListed {
				f.listing = map[string]string{testAuthorizer: ""}
			}
		})
		was := r.get(t, k)
		time.Sleep(time.Until(was.ExpiresAt) - time.Minute) // stale
		if k.Kind == KindJSAPI {
			r.get(t, k.account())
			synctest.Wait()
		}
		w.set(path, write)
		if got := r.get(t, k); !got.Value.Same(was.Value) {
			t.Errorf("the old token does not serve: %v", got.ExpiresAt)
		}
		synctest.Wait()
		got := r.get(t, k)
		if !r.wx.alive[got.Value.Reveal()].After(time.Now()) {
			t.Errorf("a token that is none serves: %q", got.Value.Reveal())
		}
		w.set("", nil)
		time.Sleep(10 * time.Minute)
		r.ticket(t, testPlatform)
		check := func(when string) {
			t.Helper()
			got, err := r.Get(t.Context(), k)
			if err != nil {
				t.Errorf("%s: %v", when, err)
			} else if !r.wx.alive[got.Value.Reveal()].After(time.Now()) {
				t.Errorf("%s: a token that is none serves: %q", when, got.Value.Reveal())
			}
		}
		check("afterwards")
		r.restart()
		check("after a restart")
		time.Sleep(later)
		r.ticket(t, testPlatform)
		check("later")
		if a, err := r.Authorizer(t.Context(), testPlatform, testAuthorizer); err != nil || a.AppID != testAuthorizer {
			t.Errorf("the authorization: %v", err)
		}
		r.noSecretLogged(t)
	})
}

func TestSpoiltRenewals(t *testing.T) {
	t.Parallel()
	say := func(answer string) func(net.Conn, string) {
		return func(c net.Conn, _ string) { _, _ = io.WriteString(c, answer) }
	}
	with := func(change func(body string) string) func(net.Conn, string) {
		return func(c net.Conn, body string) { _, _ = io.WriteString(c, lengthAnswer(change(body))) }
	}
	expires := func(value string) func(net.Conn, string) {
		return with(func(body string) string { return strings.Replace(body, `"expires_in":7200`, `"expires_in":`+value, 1) })
	}
	access := func(value string) func(net.Conn, string) {
		return with(func(body string) string {
			for _, name := range []string{`"authorizer_access_token":`, `"component_access_token":`, `"access_token":`, `"ticket":`} {
				if at := strings.Index(body, name); at >= 0 {
					end := strings.Index(body[at+len(name)+1:], `"`)
					return body[:at+len(name)] + value + body[at+len(name)+1+end+1:]
				}
			}
			return body
		})
	}
	refresh := func(value string) func(net.Conn, string) {
		return with(func(body string) string {
			return regexp.MustCompile(`"authorizer_refresh_token":"[^"]*"`).ReplaceAllLiteralString(body, value)
		})
	}
	for _, test := range []struct {
		name    string
		refresh refreshTokens
		write   func(net.Conn, string)
	}{
		{"fine", isTold, with(func(body string) string { return body })},
		{"chunked", isTold, func(c net.Conn, body string) { _, _ = io.WriteString(c, chunkedAnswer(body)) }},
		{"until closed", isTold, func(c net.Conn, body string) { _, _ = io.WriteString(c, closedAnswer(body)) }},
		{"gzip", isTold, func(c net.Conn, body string) { _, _ = io.WriteString(c, gzipAnswer(body)) }},
		{"byte order mark", isTold, with(func(body string) string { return "\xef\xbb\xbf" + body })},
		{"expires 0", isTold, expires("0")},
		{"expires -1", isTold, expires("-1")},
		{"expires huge", isTold, expires("99999999999999999999999")},
		{"expires beyond float", isTold, expires("1e999")},
		{"expires text", isTold, expires(`"7200"`)},
		{"expires float", isTold, expires("7199.9")},
		{"expires word", isTold, expires(`"soon"`)},
		{"expires null", isTold, expires("null")},
		{"expires object", isTold, expires("{}")},
		{"expires missing", isTold, with(func(body string) string { return strings.Replace(body, `"expires_in":7200`, `"x":1`, 1) })},
		{"access empty", isTold, access(`""`)},
		{"access null", isTold, access(`null`)},
		{"access number", isTold, access(`12`)},
		{"access spaces", isTold, access(`"  "`)},
		{"access missing", isTold, with(func(body string) string {
			return strings.NewReplacer(`"authorizer_access_token"`, `"a"`, `"component_access_token"`, `"a"`, `"access_token"`, `"a"`, `"ticket"`, `"a"`).Replace(body)
		})},
		{"refresh missing", isKept, refresh(`"x":1`)},
		{"refresh empty", isKept, refresh(`"authorizer_refresh_token":""`)},
		{"refresh null", isKept, refresh(`"authorizer_refresh_token":null`)},
		{"refresh number", isKept, refresh(`"authorizer_refresh_token":12`)},
		{"refresh spaces", isKept, refresh(`"authorizer_refresh_token":" \n "`)},
		{"refresh too long", isKept, refresh(`"authorizer_refresh_token":"` + strings.Repeat("x", maxToken+1) + `"`)},
		{"access too long", isTold, access(`"` + strings.Repeat("x", maxToken+1) + `"`)},
		{"errcode text", isListed, with(func(string) string { return `{"errcode":"-1","errmsg":"system error"}` })},
		{"errcode beside a token", isListed, with(func(string) string {
			return `{"errcode":-1,"errmsg":"system error","authorizer_access_token":"rubbish","component_access_token":"rubbish","access_token":"rubbish","ticket":"rubbish"}`
		})},
		{"html", isListed, say("HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 13\r\n\r\n<html></html>")},
		{"502", isListed, say("HTTP/1.1 502 Bad Gateway\r\nContent-Length: 2\r\n\r\n{}")},
		{"redirect", isListed, say("HTTP/1.1 302 Found\r\nLocation: http://localhost/elsewhere\r\nContent-Length: 0\r\n\r\n")},
		{"interim", isTold, func(c net.Conn, body string) {
			_, _ = io.WriteString(c, "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n"+lengthAnswer(body))
		}},
		{"101", isListed, say("HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n{}")},
		{"nothing", isListed, say("")},
		{"no HTTP", isListed, say("\x15\x03\x01\x00\x02\x02\x28")},
	} {
		later := time.Duration(0)
		if strings.HasPrefix(test.name, "expires") {
			later = longestLife
		}
		for _, k := range renewals {
			if k.path != pathAuthorizerToken && strings.HasPrefix(test.name, "refresh") {
				continue // only its answer has one
			}
			t.Run(k.name+" "+test.name, func(t *testing.T) {
				t.Parallel()
				spoiltRenewal(t, k.key, k.path, test.refresh, later, test.write)
			})
		}
	}
}

func TestCutRenewals(t *testing.T) {
	t.Parallel()
	for _, form := range []struct {
		name string
		of   func(string) string
	}{{"length", lengthAnswer}, {"chunked", chunkedAnswer}, {"closed", closedAnswer}, {"gzip", gzipAnswer}} {
		for _, k := range renewals {
			if k.path != pathAuthorizerToken && form.name != "length" {
				continue // only its answer has two tokens
			}
			t.Run(k.name+" "+form.name, func(t *testing.T) {
				t.Parallel()
				for cut, size := 0, 1; cut < size && !t.Failed(); cut++ {
					spoiltRenewal(t, k.key, k.path, isListed, 0, func(c net.Conn, body string) {
						whole := form.of(body)
						size = len(whole)
						_, _ = io.WriteString(c, whole[:cut])
					})
					if t.Failed() {
						t.Logf("cut at %d", cut)
					}
				}
			})
		}
	}
}

// A code is good for one exchange: what is wrong with one of the tokens must not cost the other.
func TestSpoiltExchanges(t *testing.T) {
	t.Parallel()
	for name, access := range map[string]string{"number": "12", "null": "null", "spaces": `"  "`, "empty": `""`, "object": "{}"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				r.wx.set(func(f *fakeWeChat) {
					f.strict, f.refresh[testAuthorizer] = true, "refreshtoken@@@x"
					f.hook = func(path string, _ map[string]any) (string, error) {
						if path != pathQueryAuth {
							return "", nil
						}
						return `{"authorization_info":{"authorizer_appid":"` + testAuthorizer + `","authorizer_access_token":` + access +
							`,"expires_in":7200,"authorizer_refresh_token":"refreshtoken@@@x","func_info":[]}}`, nil
					}
				})
				r.authorize(t, testPlatform, testAuthorizer)
				if got := r.get(t, AuthorizerKey(testPlatform, testAuthorizer)); !r.wx.live(got.Value.Reveal()) {
					t.Error("a token that is none serves")
				}
			})
		})
	}
}
