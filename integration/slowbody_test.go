package integration_test

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// TestPushBodyThatTrickles: who has proved nothing yet does not hold a request by a byte now and then, which is enough for Caddy's own
// limit; a push whose body takes its time is answered, and so is the next on its connection.
func TestPushBodyThatTrickles(t *testing.T) {
	t.Parallel()
	w := newWorld(t, polite)
	authorize(t, w)
	const query = "?signature=da39a3ee5e6b4b0d3255bfef95601890afd80709&msg_signature=da39a3ee5e6b4b0d3255bfef95601890afd80709&timestamp=1700000000&nonce=1"
	client, err := w.Client()
	if err != nil {
		t.Fatal(err)
	}
	dial := func(t *testing.T) net.Conn {
		t.Helper()
		config := client.Transport.(*http.Transport).TLSClientConfig.Clone()
		config.ServerName, config.NextProtos = integration.Host, []string{"http/1.1"}
		conn, err := tls.Dial("tcp", "127.0.0.1:"+integration.Port(w.HTTPS), config)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		_ = conn.SetDeadline(time.Now().Add(time.Minute))
		return conn
	}
	late := func(t *testing.T, began time.Time, status int) {
		t.Helper()
		if took := time.Since(began); status != http.StatusRequestTimeout || took < 9*time.Second || took > 40*time.Second {
			t.Errorf("%d after %s", status, took)
		}
	}
	for _, path := range []string{"/wx/event", "/wx/message/" + integration.AuthorizerID} {
		for version, config := range map[string]string{"h1": "Content-Length: 60000", "h1 in chunks": "Transfer-Encoding: chunked"} {
			t.Run(version+path, func(t *testing.T) {
				t.Parallel()
				conn, began := dial(t), time.Now()
				part := "x"
				if strings.Contains(config, "chunked") {
					part = "1\r\nx\r\n"
				}
				fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: %s\r\n%s\r\n\r\n", path+query, integration.Host, config)
				done := make(chan struct{})
				defer close(done)
				go trickle(done, func() { _, _ = io.WriteString(conn, part) })
				resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
				if err != nil {
					t.Fatal(err)
				}
				late(t, began, resp.StatusCode)
			})
		}
		for version, major := range map[string]int{"h2": 2, "h3": 3} {
			t.Run(version+path, func(t *testing.T) {
				t.Parallel()
				in, out := io.Pipe()
				defer in.Close()
				done := make(chan struct{})
				defer close(done)
				own, err := w.Client()
				if err != nil {
					t.Fatal(err)
				}
				if major == 3 {
					own.Transport = http3Transport(t, w)
				}
				own.Timeout = time.Minute
				began := time.Now()
				go trickle(done, func() { _, _ = io.WriteString(out, "x") })
				resp, err := own.Post(w.URL(path+query), "text/xml", in)
				if err != nil {
					t.Fatal(err)
				}
				_ = resp.Body.Close()
				if resp.ProtoMajor != major {
					t.Errorf("it was %s", resp.Proto)
				}
				late(t, began, resp.StatusCode)
			})
		}
	}
	t.Run("takes its time", func(t *testing.T) {
		t.Parallel()
		result, err := w.WeChat.PushMessage(t.Context(), wxsim.Message{Platform: integration.PlatformID, AppID: integration.AuthorizerID, Content: "quick"})
		if err != nil || !result.OK() {
			t.Fatal(result.Wrong, err)
		}
		to, err := url.Parse(result.Attempts[0].URL)
		if err != nil {
			t.Fatal(err)
		}
		conn := dial(t)
		in := bufio.NewReader(conn)
		for _, pause := range []time.Duration{2 * time.Second, 0} { // in the second round on a connection that had a deadline
			sent := result.Attempts[0].Sent
			fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: text/xml\r\nContent-Length: %d\r\n\r\n%s", to.RequestURI(), integration.Host, len(sent), sent[:9])
			time.Sleep(pause)
			_, _ = conn.Write(sent[9:])
			resp, err := http.ReadResponse(in, nil)
			if err != nil {
				t.Fatalf("after %s: %v", pause, err)
			}
			body, _ := io.ReadAll(resp.Body)
			if resp.StatusCode != http.StatusOK || !strings.Contains(string(body), "<Encrypt>") {
				t.Errorf("after %s: %d %s", pause, resp.StatusCode, body)
			}
		}
	})
}

// trickle calls send five times a second until done.
func trickle(done <-chan struct{}, send func()) {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return
		case <-tick.C:
			send()
		}
	}
}
