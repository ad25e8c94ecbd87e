package caddymodule

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// transport is the one that the gateway provisioned.
func (g *gateway) transport() *Transport {
	return g.api.proxy.(*reverseproxy.Handler).Transport.(*Transport)
}

func TestAPIHeals(t *testing.T) {
	for _, errcode := range []int64{40001, 40014, 42001, 42006} {
		wechat := newFakeWeChat(t)
		wechat.refuseBy = errcode
		g := newGateway(t, wechat, "", "")
		g.authorize()
		opaque := g.opaque(accountID, crmKey)
		wechat.seen()

		wechat.spoil(accountID)
		const body = `{"touser":"o1","text":{"content":"你好 <&>"}}`
		a := g.post("/cgi-bin/message/custom/send?access_token="+opaque+"&x=1", body, "Content-Type: text/plain")
		calls := wechat.seen()
		if a.Body != `{"errcode":0,"errmsg":"ok"}` || len(calls) != 2 {
			t.Fatalf("%d: got %d %s after %d calls", errcode, a.Status, a.Body, len(calls))
		}
		for i, c := range calls {
			if c.Body != body || c.Length != int64(len(body)) || c.Chunked || c.Query != fmt.Sprintf("access_token=REALTOKEN-%s-%d&x=1", accountID, i+1) {
				t.Errorf("%d: attempt %d was %+v", errcode, i+1, c)
			}
		}

		wechat.spoil(authorizerID)
		if a := g.get("/"+authorizerID+"/cgi-bin/user/info", bearer(crmKey)); a.Body != `{"errcode":0,"errmsg":"ok"}` {
			t.Errorf("%d: authorizer: got %d %s", errcode, a.Status, a.Body)
		}
		g.post("/"+platformID+"/cgi-bin/component/api_create_preauthcode", "{}", bearer(panelKey))
		wechat.spoil(platformID)
		if a := g.post("/"+platformID+"/cgi-bin/component/api_create_preauthcode", "{}", bearer(panelKey)); a.Body != `{"errcode":0,"errmsg":"ok"}` {
			t.Errorf("%d: component: got %d %s", errcode, a.Status, a.Body)
		}
		for _, kind := range []string{"account", "authorizer", "component"} {
			if n := counted(t, g.app.metrics().apiRetries, kind); n != 1 {
				t.Errorf("%d: %v repetitions with an %s token are counted", errcode, n, kind)
			}
		}
		if n := counted(t, g.app.metrics().apiErrors, strconv.FormatInt(errcode, 10)); n != 3 {
			t.Errorf("%v errors %d are counted, want 3", n, errcode)
		}
		g.noSecretsLogged(opaque)
	}
}

// A storm of callers who are refused makes one renewal.
func TestAPIHealsStorm(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.opaque(accountID, crmKey)
	wechat.spoil(accountID)
	const callers = 200
	var wg sync.WaitGroup
	var good atomic.Int64
	for i := range callers {
		wg.Go(func() {
			body := fmt.Sprintf(`{"n":%d}`, i)
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, g.URL+"/"+accountID+"/cgi-bin/x", strings.NewReader(body))
			if err != nil {
				t.Error(err)
				return
			}
			req.Header.Set("Authorization", "Bearer "+crmKey)
			res, err := http.DefaultTransport.RoundTrip(req)
			if err != nil {
				t.Error(err)
				return
			}
			defer res.Body.Close()
			if got, _ := io.ReadAll(res.Body); string(got) == `{"errcode":0,"errmsg":"ok"}` {
				good.Add(1)
			}
		})
	}
	wg.Wait()
	if good.Load() != callers {
		t.Errorf("%d of %d callers got an answer", good.Load(), callers)
	}
	if n := wechat.tokensIssued(accountID); n != 2 {
		t.Errorf("WeChat issued %d tokens, want 2: one before and one after", n)
	}
}

// lastingRefusal makes WeChat refuse every token.
func lastingRefusal(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json; encoding=utf-8")
	io.WriteString(w, `{"errcode":40001,"errmsg":"second answer rid: 64f1e2d3-0a1b2c3d-4e5f6071"}`)
}

func TestAPIRefusedTwice(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.authorize()
	opaque := g.opaque(authorizerID, crmKey)
	wechat.seen()
	wechat.answer(lastingRefusal)
	a := g.get("/"+authorizerID+"/cgi-bin/user/info", bearer(crmKey))
	if a.Status != http.StatusOK || a.code(t) != 40001 || !strings.Contains(a.Body, "second answer") {
		t.Errorf("Bearer: got %d %s, want WeChat's own second answer", a.Status, a.Body)
	}
	if n := len(wechat.seen()); n != 2 {
		t.Errorf("Bearer: %d calls, want 2", n)
	}
	a = g.get("/cgi-bin/user/info?access_token=" + opaque)
	if a.Status != http.StatusOK || a.code(t) != 48001 || !strings.Contains(a.Body, "renewed") {
		t.Errorf("SDK: got %d %s, want 48001 and why", a.Status, a.Body)
	}
	if n := len(wechat.seen()); n != 2 {
		t.Errorf("SDK: %d calls, want 2", n)
	}
}

func TestAPIRenewalFails(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	opaque := g.opaque(accountID, crmKey)
	wechat.spoil(accountID)
	wechat.grantErr = `{"errcode":40164,"errmsg":"invalid ip 192.0.2.7, not in whitelist"}`
	if a := g.get("/"+accountID+"/cgi-bin/user/info", bearer(crmKey)); a.Status != http.StatusOK || a.code(t) != 40001 {
		t.Errorf("Bearer: got %d %s, want WeChat's answer", a.Status, a.Body)
	}
	a := g.get("/cgi-bin/user/info?access_token=" + opaque)
	if code := a.code(t); a.Status != http.StatusOK || code != 40164 {
		t.Errorf("SDK: got %d %s, want the reason", a.Status, a.Body)
	}
}

// A body that cannot be kept surfaces WeChat's error, whole; the next call works.
func TestAPIBodyTooLargeToRepeat(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", `{"repeat_buffer":1024}`)
	opaque := g.opaque(accountID, crmKey)
	for name, size := range map[string]int{"fits exactly": 1024, "one too many": 1025} {
		for form, reader := range map[string]func(string) io.Reader{
			"length":  func(s string) io.Reader { return strings.NewReader(s) },
			"chunked": func(s string) io.Reader { return onlyReader{strings.NewReader(s)} },
		} {
			wechat.spoil(accountID)
			wechat.seen()
			body := strings.Repeat("x", size)
			a := g.do(http.MethodPost, "/cgi-bin/x?access_token="+opaque, reader(body))
			calls := wechat.seen()
			if size > 1024 {
				if a.Status != http.StatusOK || a.code(t) != 40001 || len(calls) != 1 || calls[0].Body != body {
					t.Errorf("%s, %s: got %d %s after %d calls", name, form, a.Status, a.Body, len(calls))
				}
				if a := g.post("/cgi-bin/x?access_token="+opaque, body); a.Body != `{"errcode":0,"errmsg":"ok"}` {
					t.Errorf("%s, %s: the next call got %d %s", name, form, a.Status, a.Body)
				}
				continue
			}
			if a.Body != `{"errcode":0,"errmsg":"ok"}` || len(calls) != 2 || calls[1].Body != body || calls[1].Chunked || calls[1].Length != int64(size) {
				t.Errorf("%s, %s: got %d %s after %d calls", name, form, a.Status, a.Body, len(calls))
			}
		}
	}
}

// WeChat may refuse the token before it has read the body; the rest of the body still goes with the repetition.
func TestAPIHealsEarlyRefusal(t *testing.T) {
	body := make([]byte, 600<<10)
	_, _ = rand.Read(body)
	refused := make(chan struct{})
	var second atomic.Pointer[[]byte]
	var calls atomic.Int64
	wechat := newFakeWeChat(t)
	early := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/cgi-bin/media/upload" {
			wechat.ServeHTTP(w, r)
			return
		}
		if calls.Add(1) == 1 {
			w.Header().Set("Connection", "close")
			io.WriteString(w, `{"errcode":42001,"errmsg":"access_token expired"}`)
			close(refused)
			return
		}
		got, _ := io.ReadAll(r.Body)
		second.Store(&got)
		io.WriteString(w, `{"media_id":"m1"}`)
	}))
	defer early.Close()
	g := newGateway(t, wechat, gatewayConfig(early.URL), "")
	g.opaque(accountID, crmKey)
	wechat.spoil(accountID)
	first, rest := io.Pipe()
	go func() { // the caller sends half, and the other half only once WeChat has refused
		_, _ = rest.Write(body[:300<<10])
		<-refused
		_, _ = rest.Write(body[300<<10:])
		_ = rest.Close()
	}()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, g.URL+"/"+accountID+"/cgi-bin/media/upload", first)
	if err != nil {
		t.Fatal(err)
	}
	req.ContentLength = int64(len(body))
	req.Header.Set("Authorization", "Bearer "+crmKey)
	a := g.send(req)
	if a.Body != `{"media_id":"m1"}` || second.Load() == nil || !bytes.Equal(*second.Load(), body) {
		t.Errorf("got %d %s; the repetition was not whole", a.Status, a.Body)
	}
}

// Ten megabytes go up and come down as they are, with their lengths, and not through memory.
func TestAPIStreams(t *testing.T) {
	big := make([]byte, 10<<20)
	_, _ = rand.Read(big)
	big[0] = '{' // what begins like JSON is not waited for either
	sum := sha256.Sum256(big)
	wechat := newFakeWeChat(t)
	wechat.answer(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			got, _ := io.ReadAll(r.Body)
			fmt.Fprintf(w, `{"sum":"%x"}`, sha256.Sum256(got))
			return
		}
		w.Header().Set("Content-Type", "image/jpeg")
		w.Header().Set("Content-Disposition", `attachment; filename="a.jpg"`)
		if r.URL.Query().Get("chunked") == "" {
			w.Header().Set("Content-Length", strconv.Itoa(len(big)))
		}
		_, _ = w.Write(big)
	})
	g := newGateway(t, wechat, "", "")
	opaque := g.opaque(accountID, crmKey)
	wechat.seen()
	for name, body := range map[string]io.Reader{"length": bytes.NewReader(big), "chunked": io.MultiReader(bytes.NewReader(big))} {
		a := g.do(http.MethodPost, "/cgi-bin/media/upload?access_token="+opaque+"&type=image", body, "Content-Type: multipart/form-data; boundary=b")
		if want := fmt.Sprintf(`{"sum":"%x"}`, sum); a.Body != want {
			t.Errorf("%s, up: got %d %s, want %s", name, a.Status, a.Body, want)
		}
		got := wechat.one(t)
		if (got.Length == int64(len(big))) != (name == "length") || got.Header.Get("Content-Type") != "multipart/form-data; boundary=b" {
			t.Errorf("%s, up: WeChat got length %d, Content-Type %s", name, got.Length, got.Header.Get("Content-Type"))
		}
	}
	for name, query := range map[string]string{"length": "", "chunked": "&chunked=1"} {
		a := g.get("/cgi-bin/media/get?access_token=" + opaque + query)
		if sha256.Sum256([]byte(a.Body)) != sum || a.Header.Get("Content-Type") != "image/jpeg" || a.Header.Get("Content-Disposition") != `attachment; filename="a.jpg"` {
			t.Errorf("%s, down: %d bytes, %v", name, len(a.Body), a.Header)
		}
		if name == "length" && a.Length != int64(len(big)) {
			t.Errorf("%s, down: length %d", name, a.Length)
		}
	}
}

// The first bytes of an answer arrive before the last are sent, and those of a request too.
func TestAPIDoesNotWait(t *testing.T) {
	arrived, proceed := make(chan string, 1), make(chan struct{})
	wechat := newFakeWeChat(t)
	slow := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/cgi-bin/up":
			first := make([]byte, 5)
			_, _ = io.ReadFull(r.Body, first)
			arrived <- string(first)
			rest, _ := io.ReadAll(r.Body)
			fmt.Fprintf(w, `{"rest":%q}`, rest)
		case "/cgi-bin/down":
			io.WriteString(w, "first")
			_ = http.NewResponseController(w).Flush()
			<-proceed
			io.WriteString(w, "last")
		default:
			wechat.ServeHTTP(w, r)
		}
	}))
	defer slow.Close()
	g := newGateway(t, wechat, gatewayConfig(slow.URL), "")

	body, writer := io.Pipe()
	go func() {
		_, _ = io.WriteString(writer, "first")
		if got := <-arrived; got != "first" {
			t.Errorf("WeChat got %q", got)
		}
		_, _ = io.WriteString(writer, "last")
		_ = writer.Close()
	}()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, g.URL+"/"+accountID+"/cgi-bin/up", body)
	if err != nil {
		t.Fatal(err)
	}
	req.ContentLength = 9
	req.Header.Set("Authorization", "Bearer "+crmKey)
	if a := g.send(req); a.Body != `{"rest":"last"}` {
		t.Errorf("up: got %d %s", a.Status, a.Body)
	}

	req, err = http.NewRequestWithContext(t.Context(), http.MethodGet, g.URL+"/"+accountID+"/cgi-bin/down", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+crmKey)
	res, err := g.Client().Transport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	first := make([]byte, 5)
	if _, err := io.ReadFull(res.Body, first); err != nil || string(first) != "first" {
		t.Errorf("down: got %q, %v", first, err)
	}
	close(proceed)
	if rest, _ := io.ReadAll(res.Body); string(rest) != "last" {
		t.Errorf("down: the rest is %q", rest)
	}
}

func TestAPIExpectContinue(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.opaque(accountID, crmKey)
	wechat.seen()
	conn, err := net.Dial("tcp", g.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "POST /%s/cgi-bin/media/upload HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n", accountID, crmKey)
	r := bufio.NewReader(conn)
	if line, err := r.ReadString('\n'); err != nil || !strings.HasPrefix(line, "HTTP/1.1 100 ") {
		t.Fatalf("got %q, %v; want 100 Continue", line, err)
	}
	_, _ = r.ReadString('\n')
	io.WriteString(conn, "data")
	res, err := http.ReadResponse(r, nil)
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("got %v, %v", res, err)
	}
	res.Body.Close()
	if got := wechat.one(t); got.Body != "data" || got.Length != 4 || got.Header.Get("Expect") != "" {
		t.Errorf("WeChat got %+v", got)
	}
	// Who may not, is told before the body is asked for.
	fmt.Fprintf(conn, "POST /%s/cgi-bin/media/upload HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer x\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n", accountID)
	if res, err := http.ReadResponse(r, nil); err != nil || res.StatusCode != http.StatusUnauthorized {
		t.Errorf("got %v, %v; want 401 without 100 Continue", res, err)
	}
}

func TestAPIAnswersThatAreNone(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.opaque(accountID, crmKey)
	hijack := func(w http.ResponseWriter, raw string) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		io.WriteString(conn, raw)
		conn.Close()
	}
	for _, c := range []struct {
		name   string
		answer http.HandlerFunc
		status int
		body   string // empty: an error of the gateway's own
	}{
		{"web page", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
			fmt.Fprintf(w, "<html>log in to reach %s</html>", r.URL)
		}, 502, ""},
		{"web page that is long", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			w.Header().Set("Content-Length", "10000")
			io.WriteString(w, "<html>"+r.URL.String()+strings.Repeat(" ", 10000-6-len(r.URL.String())))
		}, 502, ""},
		{"JSON called a web page", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			io.WriteString(w, ` {"ok":1}`)
		}, 200, ` {"ok":1}`},
		{"half an answer", func(w http.ResponseWriter, r *http.Request) {
			hijack(w, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{\"errcode\":")
		}, 502, ""},
		{"half a chunked answer", func(w http.ResponseWriter, r *http.Request) {
			hijack(w, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"err")
		}, 502, ""},
		{"no answer", func(w http.ResponseWriter, r *http.Request) { hijack(w, "") }, 502, ""},
		{"not HTTP", func(w http.ResponseWriter, r *http.Request) { hijack(w, "SSH-2.0-x REALTOKEN\r\n") }, 502, ""},
		{"redirect that repeats the token", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://login.example"+r.URL.String(), http.StatusFound)
		}, 502, ""},
		{"error page that repeats the token", func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusRequestURITooLong)
			io.WriteString(w, "too long: "+r.URL.String())
		}, 502, ""},
		{"JSON that repeats the token", func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, `{"errcode":40097,"errmsg":"bad url %s"}`, r.URL)
		}, 502, ""},
		{"its own 502", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			w.WriteHeader(http.StatusBadGateway)
			io.WriteString(w, "<html>502 Bad Gateway</html>")
		}, 502, "<html>502 Bad Gateway</html>"},
		{"a refusal with another status is none", func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusForbidden)
			io.WriteString(w, `{"errcode":40001}`)
		}, 403, `{"errcode":40001}`},
		{"busy", func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, `{"errcode":-1,"errmsg":"system error"}`)
		},
			200, `{"errcode":-1,"errmsg":"system error"}`},
		{"errcode of something within", func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, `{"list":[{"errcode":40001}],"a":"\"errcode\":40001"}`)
		}, 200, `{"list":[{"errcode":40001}],"a":"\"errcode\":40001"}`},
		{"a refusal too long to be one", func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, `{"errcode":40001,"pad":"`+strings.Repeat("x", peekSize)+`"}`)
		}, 200, `{"errcode":40001,"pad":"` + strings.Repeat("x", peekSize) + `"}`},
		{"nothing", func(w http.ResponseWriter, r *http.Request) {}, 200, ""},
	} {
		wechat.answer(c.answer)
		wechat.seen()
		a := g.post("/"+accountID+"/cgi-bin/x", "{}", bearer(crmKey))
		if n := len(wechat.seen()); n != 1 {
			t.Errorf("%s: WeChat was called %d times", c.name, n)
		}
		if a.Status != c.status || a.Body != c.body && c.body != "" {
			t.Errorf("%s: got %d %q", c.name, a.Status, a.Body)
			continue
		}
		if c.body == "" && c.status != http.StatusOK && a.code(t) != 502 {
			t.Errorf("%s: got %d %q", c.name, a.Status, a.Body)
		}
		if strings.Contains(fmt.Sprint(a.Header), "REALTOKEN") {
			t.Errorf("%s: the headers show the token: %v", c.name, a.Header)
		}
	}
	if n := wechat.tokensIssued(accountID); n != 1 {
		t.Errorf("WeChat issued %d tokens", n)
	}
}

func TestAPIUnreachable(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	opaque := g.opaque(accountID, crmKey)
	wechat.Close()
	for _, a := range []answer{
		g.get("/"+accountID+"/cgi-bin/x", bearer(crmKey)),
		g.post("/cgi-bin/x?access_token="+opaque, "{}"),
	} {
		if a.Status != http.StatusBadGateway || a.code(t) != 502 {
			t.Errorf("got %d %s", a.Status, a.Body)
		}
	}
	if n := counted(t, g.app.metrics().apiRequests, "crm", outcomeUnreachable); n != 2 {
		t.Errorf("%v unreachable calls are counted", n)
	}
	g.noSecretsLogged(opaque)
}

func TestAPISlow(t *testing.T) {
	release := make(chan struct{})
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", `{"response_timeout":50000000}`)
	g.opaque(accountID, crmKey)
	wechat.answer(func(w http.ResponseWriter, r *http.Request) { <-release })
	defer close(release)
	wechat.seen()
	a := g.get("/"+accountID+"/cgi-bin/x", bearer(crmKey))
	if a.Status != http.StatusGatewayTimeout || a.code(t) != 504 {
		t.Errorf("got %d %s", a.Status, a.Body)
	}
	wechat.one(t) // and not once more
}

// The next origin is tried if no connection to the first can be made, with the whole body; the first is then passed
// over for a while.
func TestAPIBackupOrigin(t *testing.T) {
	wechat := newFakeWeChat(t)
	dead := httptest.NewServer(http.NotFoundHandler())
	dead.Close()
	g := newGateway(t, wechat, gatewayConfig(dead.URL, wechat.URL), "")
	for _, body := range []io.Reader{strings.NewReader("whole body"), onlyReader{strings.NewReader("whole body")}} {
		if a := g.do(http.MethodPost, "/"+accountID+"/cgi-bin/x", body, bearer(crmKey)); a.Status != http.StatusOK {
			t.Errorf("got %d %s", a.Status, a.Body)
		}
		if got := wechat.one(t); got.Body != "whole body" || got.Host != wechat.Listener.Addr().String() {
			t.Errorf("WeChat got %+v", got)
		}
	}
}

// dropping is a WeChat whose connections die after their first answer.
func dropping(t *testing.T, wechat *fakeWeChat) (server *httptest.Server, calls *atomic.Int64) {
	calls = new(atomic.Int64)
	server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/cgi-bin/stable_token") || r.URL.Path == "/cgi-bin/warm" {
			wechat.ServeHTTP(w, r)
			return
		}
		// The request has arrived and may have been acted on; the connection dies without an answer.
		calls.Add(1)
		_, _ = io.ReadAll(r.Body)
		conn, _, err := http.NewResponseController(w).Hijack()
		if err == nil {
			conn.Close()
		}
	}))
	server.Start()
	t.Cleanup(server.Close)
	return server, calls
}

// Neither Caddy nor net/http sends a POST again, or a request that can be made only once, when a pooled connection dies.
func TestAPINeverSendsTwice(t *testing.T) {
	wechat := newFakeWeChat(t)
	server, calls := dropping(t, wechat)
	backup := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { calls.Add(1) }))
	defer backup.Close()
	g := newGateway(t, wechat, gatewayConfig(server.URL, backup.URL), "")
	for _, c := range []struct{ name, method, target, body string }{
		{"POST", "POST", "/cgi-bin/message/custom/send", "{}"},
		{"POST without a body", "POST", "/cgi-bin/ticket/getticket", ""},
		{"PUT", "PUT", "/cgi-bin/x", "{}"},
		{"js_code", "GET", "/sns/jscode2session?js_code=c1", ""},
		{"code", "GET", "/sns/oauth2/access_token?code=c1", ""},
		{"a GET that undoes", "GET", "/wxa/revertcoderelease", ""},
	} {
		// A connection in the pool is what tempts net/http.
		if a := g.get("/"+accountID+"/cgi-bin/warm", bearer(crmKey)); a.Status != http.StatusOK {
			t.Fatalf("%s: got %d %s", c.name, a.Status, a.Body)
		}
		calls.Store(0)
		a := g.do(c.method, "/"+accountID+c.target, strings.NewReader(c.body), bearer(crmKey), "Idempotency-Key: k")
		if a.Status != http.StatusBadGateway || a.code(t) != 502 || calls.Load() != 1 {
			t.Errorf("%s: got %d %s after %d calls", c.name, a.Status, a.Body, calls.Load())
		}
	}
}

// A single-use call whose token is refused is not repeated either, but the token is renewed.
func TestAPISingleUseRefused(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.authorize()
	g.get("/"+platformID+"/wxa/gettemplatelist", bearer(panelKey))
	wechat.spoil(platformID)
	wechat.seen()
	target := "/sns/jscode2session?js_code=c1&appid=" + authorizerID + "&secret=" + crmKey
	if a := g.get(target); a.code(t) != 40001 {
		t.Errorf("got %d %s", a.Status, a.Body)
	}
	if got := wechat.one(t); got.Length != 0 || got.Chunked {
		t.Errorf("WeChat got a body: %+v", got)
	}
	if a := g.get(target); a.Body != `{"errcode":0,"errmsg":"ok"}` {
		t.Errorf("the next call got %d %s", a.Status, a.Body)
	}
}

func TestAPICallerBreaksOff(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.opaque(accountID, crmKey)
	wechat.seen()
	conn, err := net.Dial("tcp", g.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "POST /%s/cgi-bin/x HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: 40\r\n\r\nhalf", accountID, crmKey)
	_ = conn.(*net.TCPConn).CloseWrite()
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err == nil {
		if res.StatusCode != http.StatusBadRequest && res.StatusCode != 499 {
			t.Errorf("got %d", res.StatusCode)
		}
		res.Body.Close()
	}
	conn.Close()
	if calls := wechat.seen(); len(calls) != 0 {
		t.Errorf("WeChat got %+v as a whole request", calls)
	}
}

func TestTransportFailsClosed(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	tr := g.transport()
	req := httptest.NewRequest(http.MethodPost, "/cgi-bin/user/info?access_token=x", strings.NewReader("x"))
	req.URL.Host = wechat.Listener.Addr().String()
	for name, r := range map[string]*http.Request{
		"nobody admitted it": req,
		"another host": func() *http.Request {
			r := req.WithContext(context.WithValue(req.Context(), apiCallKey{}, &apiCall{path: "/x"}))
			u := *req.URL
			u.Host = "evil.example:443"
			r.URL = &u
			return r
		}(),
	} {
		res, err := tr.RoundTrip(r)
		if err != nil || res.StatusCode != http.StatusInternalServerError {
			t.Errorf("%s: got %v, %v", name, res, err)
		}
	}
	if calls := wechat.seen(); len(calls) != 0 {
		t.Errorf("WeChat was called: %+v", calls)
	}
}

// Over TLS the certificate is checked for the origin's name, h2 is spoken, and single-use calls carry no body.
func TestAPITLS(t *testing.T) {
	var protos sync.Map
	wechat := newFakeWeChat(t)
	secure := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		protos.Store(r.Proto+" "+r.TLS.ServerName+" "+r.Host, true)
		wechat.ServeHTTP(w, r)
	}))
	secure.EnableHTTP2 = true
	secure.StartTLS()
	defer secure.Close()
	port := secure.Listener.Addr().(*net.TCPAddr).Port
	origin := fmt.Sprintf("https://example.com:%d", port) // the name in httptest's certificate
	g := newGateway(t, wechat, gatewayConfig(origin), "")
	tr := g.transport()
	if tr.HTTPTransport.TLS == nil || tr.HTTPTransport.TLS.InsecureSkipVerify {
		t.Fatal("TLS is not on")
	}
	pool := x509.NewCertPool()
	pool.AddCert(secure.Certificate())
	rt := tr.HTTPTransport.Transport.Clone()
	rt.TLSClientConfig.RootCAs = pool
	rt.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, secure.Listener.Addr().String())
	}
	rt.ForceAttemptHTTP2 = true
	tr.HTTPTransport.Transport = rt

	for _, singleUse := range []bool{false, true} {
		call := &apiCall{
			key: tokens.AccountKey(accountID), token: tokens.Token{Value: secret.New("T")}, param: paramAccess,
			path: "/cgi-bin/user/info", header: http.Header{}, singleUse: singleUse,
		}
		req := httptest.NewRequest(http.MethodGet, "/", nil)
		req = caddyhttp.PrepareRequest(req, caddy.NewReplacer(), httptest.NewRecorder(), &caddyhttp.Server{})
		req = req.WithContext(context.WithValue(req.Context(), apiCallKey{}, call))
		req.URL = &url.URL{Host: fmt.Sprintf("example.com:%d", port)}
		res, err := tr.RoundTrip(req)
		if err != nil || res.StatusCode != http.StatusOK {
			t.Fatalf("got %v, %v", res, err)
		}
		res.Body.Close()
		if got := wechat.one(t); got.Query != "access_token=T" || got.Body != "" || got.Length > 0 {
			t.Errorf("WeChat got %+v", got)
		}
	}
	want := fmt.Sprintf("HTTP/2.0 example.com example.com:%d", port)
	protos.Range(func(got, _ any) bool {
		if got != want {
			t.Errorf("WeChat was spoken to as %v, want %s", got, want)
		}
		return true
	})
}

func TestAPIProxyConfig(t *testing.T) {
	app, ctx := newTestApp(t, `{"accounts":[{"appid":"`+accountID+`","secret":"s"}],
		"api":["https://api.weixin.qq.com","https://api2.weixin.qq.com:8443","http://127.0.0.1:8080"],"proxy":"http://user:pw@proxy.internal:3128"}`)
	module, err := ctx.LoadModuleByID("http.handlers.wechat_api", nil)
	if err != nil {
		t.Fatal(err)
	}
	a := module.(*API)
	handler := a.proxy.(*reverseproxy.Handler)
	var dials []string
	for _, u := range handler.Upstreams {
		dials = append(dials, u.Dial)
	}
	if got := strings.Join(dials, " "); got != "api.weixin.qq.com:443 api2.weixin.qq.com:8443 127.0.0.1:8080" {
		t.Errorf("upstreams are %s", got)
	}
	tr := handler.Transport.(*Transport)
	if len(tr.origins) != 3 || tr.RequestHeaderOps() != nil || !tr.HTTPTransport.Transport.DisableCompression {
		t.Errorf("transport is %+v", tr)
	}
	req := httptest.NewRequest(http.MethodGet, "https://api.weixin.qq.com/", nil)
	req = caddyhttp.PrepareRequest(req, caddy.NewReplacer(), httptest.NewRecorder(), &caddyhttp.Server{})
	if proxy, err := tr.HTTPTransport.Transport.Proxy(req); err != nil || proxy.Host != "proxy.internal:3128" {
		t.Errorf("egress is %v, %v", proxy, err)
	}
	if app.apiOrigins()[0].Host != "api.weixin.qq.com" {
		t.Error("origins are out of order")
	}
}

// With everything at debug level, nothing that Caddy's proxy logs shows a token, a key or a query.
func TestAPICaddyLogsNoSecret(t *testing.T) {
	logFile := filepath.Join(t.TempDir(), "caddy.log")
	wechat := newFakeWeChat(t)
	storage, _ := json.Marshal(map[string]string{"module": "file_system", "root": t.TempDir()})
	logging := fmt.Sprintf(`{"logs":{"default":{"level":"DEBUG","writer":{"output":"file","filename":%q}}}}`, logFile)
	config := new(caddy.Config)
	if err := json.Unmarshal([]byte(`{"logging":`+logging+`}`), config); err != nil {
		t.Fatal(err)
	}
	config.Admin = &caddy.AdminConfig{Disabled: true}
	config.StorageRaw = storage
	config.AppsRaw = caddy.ModuleMap{"wechat": json.RawMessage(gatewayConfig(wechat.URL))}
	g := provisionGateway(t, config, "")
	opaque := g.opaque(accountID, crmKey)
	g.get("/cgi-bin/user/info?openid=oSecretUser&access_token=" + opaque)
	g.get("/"+accountID+"/cgi-bin/user/info?access_token="+opaque, bearer(crmKey), "Cookie: session=secret-session")
	g.get("/sns/jscode2session?appid=" + accountID + "&secret=" + crmKey + "&js_code=secret-code")
	g.get("/"+accountID+"/cgi-bin/user/info", bearer(strangerKey))
	wechat.spoil(accountID)
	g.post("/cgi-bin/x?access_token="+opaque, "{}")
	wechat.Close()
	g.get("/cgi-bin/user/info?access_token=" + opaque)

	logged, err := os.ReadFile(logFile)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(logged, []byte("upstream roundtrip")) {
		t.Fatal("the proxy logged nothing")
	}
	for _, s := range []string{"REALTOKEN", opaque, crmKey, strangerKey, "account-secret", "secret-session", "secret-code", "oSecretUser"} {
		if i := bytes.Index(logged, []byte(s)); i >= 0 {
			t.Errorf("log shows %q: …%s", s, logged[max(0, i-300):min(len(logged), i+50)])
		}
	}
}

func TestTransportLogsRefusedTwice(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.authorize()
	core, logs := observer.New(zapcore.DebugLevel)
	g.transport().logger = zap.New(core)
	wechat.answer(lastingRefusal)
	g.get("/"+authorizerID+"/cgi-bin/user/info", bearer(crmKey))
	entries := logs.FilterLevelExact(zapcore.ErrorLevel).All()
	if len(entries) != 1 || entries[0].ContextMap()["appid"] != authorizerID || entries[0].ContextMap()["client"] != "crm" {
		t.Errorf("logged %+v", entries)
	}
}

func TestSafeReason(t *testing.T) {
	t.Parallel()
	for text, safe := range map[string]bool{
		"dial tcp 192.0.2.1:443: connection refused": true, "EOF": true,
		"Get https://x/?access_token=T: EOF": false, `malformed HTTP response "T"`: false, strings.Repeat("x", 300): false,
	} {
		if got := safeReason(errors.New(text)); (got == text) != safe {
			t.Errorf("%q became %q", text, got)
		}
	}
}

// A repetition that fails on the way is not repeated again, nor is it tried at the next origin with half a body.
func TestAPIRepetitionBreaks(t *testing.T) {
	wechat := newFakeWeChat(t)
	var calls atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/cgi-bin/x" {
			wechat.ServeHTTP(w, r)
			return
		}
		body, _ := io.ReadAll(r.Body)
		if calls.Add(1) == 1 {
			io.WriteString(w, `{"errcode":40001,"errmsg":"invalid credential"}`)
			return
		}
		if string(body) != "whole" {
			t.Errorf("the repetition had the body %q", body)
		}
		if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
			conn.Close()
		}
	}))
	defer server.Close()
	g := newGateway(t, wechat, gatewayConfig(server.URL, wechat.URL), "")
	g.opaque(accountID, crmKey)
	if a := g.post("/"+accountID+"/cgi-bin/x", "whole", bearer(crmKey)); a.Status != http.StatusBadGateway || a.code(t) != 502 {
		t.Errorf("got %d %s", a.Status, a.Body)
	}
	if calls.Load() != 2 || len(wechat.seen()) != 0 {
		t.Errorf("%d calls to the first origin, and some to the second", calls.Load())
	}
}

func TestNotDialing(t *testing.T) {
	t.Parallel()
	if _, dialing := errors.AsType[reverseproxy.DialError](notDialing{reverseproxy.NewDialError(io.EOF)}); dialing {
		t.Error("Caddy would try the next origin")
	}
	if !isTimeout(notDialing{fmt.Errorf("x: %w", context.DeadlineExceeded)}) || isTimeout(notDialing{io.EOF}) {
		t.Error("a timeout is no longer told from another error")
	}
}

func TestTokenRefusal(t *testing.T) {
	t.Parallel()
	api := func(code int64) error { return &tokens.APIError{Code: code, Msg: "text of WeChat's"} }
	for _, c := range []struct {
		name   string
		err    error
		sdk    bool
		status int
		code   int64
	}{
		{"no ticket", fmt.Errorf("%w: %w", tokens.ErrNoTicket, api(61006)), true, 200, 61005},
		{"revoked", fmt.Errorf("x: %w", tokens.ErrNotAuthorized), true, 200, 61003},
		{"unknown", tokens.ErrNotConfigured, false, 200, 40013},
		{"answer", api(61004), true, 200, 61004},
		{"refused", api(40001), false, 200, 40001},
		{"refused, SDK", api(40001), true, 200, 48001},
		{"refused, held back, SDK", fmt.Errorf("%w: %w", tokens.ErrBackoff, api(42001)), true, 200, 48001},
		{"busy", api(-1), false, 503, 503},
		{"store", fmt.Errorf("%w: %w", tokens.ErrStore, context.DeadlineExceeded), true, 503, 503},
		{"closed", tokens.ErrClosed, true, 503, 503},
		{"unreachable", fmt.Errorf("%w: connection refused", tokens.ErrUnreachable), true, 502, 502},
		{"slow", fmt.Errorf("%w: %w", tokens.ErrUnreachable, context.DeadlineExceeded), true, 504, 504},
		{"held back", tokens.ErrBackoff, true, 200, 48001},
		{"late", context.DeadlineExceeded, true, 504, 504},
		{"anything", errors.New("x"), true, 503, 503},
	} {
		got := tokenRefusal(c.err, accountID, c.sdk)
		if got.status != c.status || got.code != c.code || got.msg == "" || got.Error() != got.msg {
			t.Errorf("%s: got %+v", c.name, got)
		}
		if got.code == -1 {
			t.Errorf("%s: errcode -1 makes SDKs send again", c.name)
		}
	}
}

func TestDamper(t *testing.T) {
	t.Parallel()
	var d damper
	if ok, missed := d.allow(); !ok || missed != 0 {
		t.Error("the first line is held back")
	}
	for range 3 {
		if ok, _ := d.allow(); ok {
			t.Error("a second line is let through at once")
		}
	}
	d.last = d.last.Add(-damperInterval)
	if ok, missed := d.allow(); !ok || missed != 3 {
		t.Errorf("got %v, %d missed; want 3", ok, missed)
	}
}

func TestAPINeedsTheApp(t *testing.T) {
	ctx, err := caddy.ProvisionContext(&caddy.Config{Admin: &caddy.AdminConfig{Disabled: true}, StorageRaw: json.RawMessage(`{"module":"file_system","root":` + strconv.Quote(t.TempDir()) + `}`)})
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"http.handlers.wechat_api", "http.reverse_proxy.transport.wechat"} {
		if _, err := ctx.LoadModuleByID(id, nil); err == nil || !strings.Contains(err.Error(), "global option wechat") {
			t.Errorf("%s: got %v", id, err)
		}
	}
}
