package caddymodule

import (
	"bufio"
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
		conn, err := net.Dial("tcp", g.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		io.WriteString(conn, head)
		answered := make(chan struct{})
		trickled := make(chan struct{})
		go func() {
			defer close(trickled)
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
		<-trickled
		if err != nil {
			t.Fatalf("%.30s: not answered while it trickles: %v", head, err)
		}
		body, _ := io.ReadAll(res.Body)
		if !strings.Contains(string(body), "did not come within 300ms") {
			t.Errorf("%.30s: got %d %s", head, res.StatusCode, body)
		}
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
