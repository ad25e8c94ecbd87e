package caddymodule

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// trickled sends the head of a request, and then a part now and then until there is an answer, which it returns. An empty part is nothing more.
func trickled(t *testing.T, g *gateway, head, part string) (status int, body string) {
	t.Helper()
	conn, err := net.Dial("tcp", g.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	io.WriteString(conn, head)
	answered := make(chan struct{})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-answered:
				return
			case <-tick.C:
				io.WriteString(conn, part)
			}
		}
	}()
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	close(answered)
	<-ended
	if err != nil {
		t.Fatalf("%.30s: not answered while it trickles: %v", head, err)
	}
	answer, _ := io.ReadAll(res.Body)
	return res.StatusCode, string(answer)
}

// Whoever asks for a token proves who they are in the body: one that comes a byte now and then holds nothing for long.
func TestAPISlowGrant(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.api.grantWait = 300 * time.Millisecond
	for _, head := range []string{
		"POST /cgi-bin/stable_token HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n",
		"POST /cgi-bin/stable_token HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
		"POST /cgi-bin/token HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\nContent-Type: application/x-www-form-urlencoded\r\n\r\n",
	} {
		part := "x"
		if strings.Contains(head, "chunked") {
			part = "1\r\nx\r\n"
		}
		if status, body := trickled(t, g, head, part); !strings.Contains(body, "did not come within 300ms") {
			t.Errorf("%.30s: got %d %s", head, status, body)
		}
	}
}

// Nor has anybody proved anything who brings a user's token: whatever that is, WeChat alone can tell.
func TestAPISlowUserCall(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.api.grantWait = 300 * time.Millisecond
	const chunk = "1\r\nx\r\n"
	const chunked = " HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
	for _, c := range []struct{ head, part, want string }{
		{"POST /sns/userinfo?access_token=theirs&openid=o1" + chunked, chunk, "did not come within 300ms"},
		{"GET /sns/auth?access_token=theirs&openid=o1" + chunked, chunk, "did not come within 300ms"},
		{"POST /sns/oauth2/refresh_token?refresh_token=theirs HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n", "x", "did not come within 300ms"},
		{"POST /sns/userinfo?access_token=theirs&openid=o1 HTTP/1.1\r\nHost: x\r\nContent-Length: 65537\r\n\r\n", "x", "larger than 65536 bytes"},
		{"POST /sns/jscode2session?appid=" + accountID + "&secret=" + strangerKey + "&js_code=x" + chunked, "", "require GET method"},
		{"POST /cgi-bin/ticket/getticket?type=2&access_token=theirs" + chunked, "", "invalid credential"},
	} {
		if status, body := trickled(t, g, c.head, c.part); !strings.Contains(body, c.want) {
			t.Errorf("%.40s: got %d %s, want %s", c.head, status, body, c.want)
		}
	}
	if calls := wechat.seen(); len(calls) != 0 {
		t.Errorf("WeChat was called: %+v", calls)
	}
	// What comes in time goes on, and has the time that its answer takes.
	wechat.answer(func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(2 * g.api.grantWait)
		io.WriteString(w, `{"openid":"o1"}`)
	})
	conn, err := net.Dial("tcp", g.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	in := bufio.NewReader(conn)
	for _, sent := range []string{"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", "Content-Length: 2\r\n\r\n{}"} { // by one connection
		io.WriteString(conn, "POST /sns/userinfo?access_token=theirs&openid=o1 HTTP/1.1\r\nHost: x\r\n"+sent)
		res, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(res.Body)
		if call := wechat.one(t); string(body) != `{"openid":"o1"}` || call.Body != "{}" || call.Length != 2 {
			t.Errorf("got %d %s, WeChat %+v", res.StatusCode, body, call)
		}
	}
}

// That a body broke off is known before WeChat gets its beginning, where no length says how much there is to come, and of whom nothing is proved.
func TestAPIBodyThatBreaksOff(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	const chunked = " HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
	for name, head := range map[string]string{
		"a client's":            "POST /" + accountID + "/cgi-bin/x" + chunked + "Authorization: Bearer " + crmKey + "\r\n\r\n2\r\n{}\r\n",
		"a user's":              "POST /sns/userinfo?access_token=theirs&openid=o1" + chunked + "\r\n2\r\n{}\r\n",
		"a user's, of a length": "POST /sns/userinfo?access_token=theirs&openid=o1 HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{}",
	} {
		conn, err := net.Dial("tcp", g.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		io.WriteString(conn, head)
		if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if body, _ := io.ReadAll(res.Body); string(body) != `{"errcode":400,"errmsg":"the request's body broke off"}` {
			t.Errorf("%s: got %d %s", name, res.StatusCode, body)
		}
	}
	if calls := wechat.seen(); len(calls) != 0 {
		t.Errorf("WeChat was called: %+v", calls)
	}
}

// The limit is the body's alone: a request that is there has the time that its answer takes.
func TestAPISlowAnswerToAGrant(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.api.grantWait = 100 * time.Millisecond
	conn, err := net.Dial("tcp", g.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	in := bufio.NewReader(conn)
	ask := func() {
		t.Helper()
		body := fmt.Sprintf(`{"grant_type":"client_credential","appid":%q,"secret":%q}`, accountID, crmKey)
		fmt.Fprintf(conn, "POST /cgi-bin/stable_token HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
		res, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatal(err)
		}
		if answer, _ := io.ReadAll(res.Body); !strings.Contains(string(answer), "access_token") {
			t.Errorf("got %d %s", res.StatusCode, answer)
		}
	}
	wechat.mu.Lock()
	wechat.slow = 3 * g.api.grantWait
	wechat.mu.Unlock()
	ask()
	ask() // by the same connection
}

// It is also where a handler before has read the body, as the placeholder http.request.body does: net/http reads on by then, and
// would take the deadline that passes for a caller who has left.
func TestAPISlowAnswerToABodyReadAhead(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.api.grantWait = 300 * time.Millisecond
	slow := 2 * g.api.grantWait
	wechat.answer(func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(slow)
		io.WriteString(w, `{"openid":"o1"}`)
	})
	wechat.mu.Lock()
	wechat.slow = slow
	wechat.mu.Unlock()
	api := g.Config.Handler
	g.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		api.ServeHTTP(w, r)
	})
	grant := fmt.Sprintf(`{"grant_type":"client_credential","appid":%q,"secret":%q}`, accountID, crmKey)
	const end = "0\r\n\r\n"
	for name, c := range map[string]struct{ target, sent, want string }{
		"a user's":              {"/sns/userinfo?access_token=theirs&openid=o1", "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n" + end, "openid"},
		"a user's, of a length": {"/sns/userinfo?access_token=theirs&openid=o1", "Content-Length: 2\r\n\r\n{}", "openid"},
		"a login":               {"/sns/jscode2session?appid=" + accountID + "&secret=" + crmKey + "&js_code=x", "Transfer-Encoding: chunked\r\n\r\n" + end, "openid"},
		"a grant":               {"/cgi-bin/stable_token", fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(grant), grant), "access_token"},
	} {
		conn, err := net.Dial("tcp", g.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		io.WriteString(conn, "POST "+c.target+" HTTP/1.1\r\nHost: x\r\n"+c.sent)
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if body, _ := io.ReadAll(res.Body); !strings.Contains(string(body), c.want) {
			t.Errorf("%s: got %d %s", name, res.StatusCode, body)
		}
	}
}

// What Caddy's server itself limits is limited as there, and said so.
func TestAPISlowGrantWithServerLimits(t *testing.T) {
	t.Parallel()
	const within = 400 * time.Millisecond
	for _, c := range []struct {
		server  time.Duration
		stalled bool
		within  time.Duration
		limited string
	}{
		{200 * time.Millisecond, false, within, "200ms"},
		{time.Minute, false, within, "400ms"},
		{0, false, within, "400ms"},
		{0, true, time.Hour, "less"},
	} {
		gateway := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if c.stalled {
				r.Body = stalledBody{r.Body}
			}
			server := &caddyhttp.Server{ReadTimeout: caddy.Duration(c.server)}
			r = r.WithContext(context.WithValue(r.Context(), caddyhttp.ServerCtxKey, server))
			_, refused := readGrant(w, &apiRequest{Request: r, known: classify("/cgi-bin/stable_token")}, c.within)
			if refused == nil {
				refused = &apiRefusal{msg: "it came"}
			}
			io.WriteString(w, refused.msg)
		}))
		defer gateway.Close()
		conn, err := net.Dial("tcp", gateway.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		length := 9
		if c.stalled {
			length = 1 // or the server would wait for the rest itself
		}
		fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n{", length)
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(res.Body)
		said, ok := strings.CutPrefix(string(body), "the request for a token did not come within ")
		if !ok || !c.stalled && said != c.limited || c.stalled && said == "1h0m0s" {
			t.Errorf("%s: got %s", c.limited, body)
		}
	}
}

// stalledBody ends as Caddy's does for what stalls, of which nothing is known here.
type stalledBody struct{ io.ReadCloser }

func (stalledBody) Read([]byte) (int, error) {
	<-time.After(100 * time.Millisecond)
	return 0, os.ErrDeadlineExceeded
}
