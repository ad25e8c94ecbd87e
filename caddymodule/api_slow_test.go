package caddymodule

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
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
