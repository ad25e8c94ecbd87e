package caddymodule

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// TestBodyDeadlineBesideTheServers: the server's own limit for a whole body, which may be shorter, stays, and is for the body alone: what
// waits for an answer is not cut off by it. Not parallel; see newGateway.
func TestBodyDeadlineBesideTheServers(t *testing.T) {
	const limit = time.Second
	wechat := newFakeWeChat(t)
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(2 * limit)
		_, _ = io.WriteString(w, replyXML)
	}))
	defer backend.Close()
	config, _, err := adapt(fmt.Sprintf(`{
		admin off
		auto_https off
		wechat {
			account %s {
				secret account-secret
				token %s
				aes_key %s
			}
			client crm {
				key %s
				appids *
			}
			api %s
		}
	}
	http://push.example.com {
		route {
			wechat_message
			reverse_proxy %s
		}
	}
	http://api.example.com {
		wechat_api
	}`, accountID, accountToken, accountKey, crmKey, wechat.URL, backend.URL))
	if err != nil {
		t.Fatal(err)
	}
	_, ctx := provisionAll(t, config)
	module, err := ctx.App("http")
	if err != nil {
		t.Fatal(err)
	}
	caddys := module.(*caddyhttp.App).Servers["srv0"]
	caddys.ReadTimeout = caddy.Duration(limit)
	server := httptest.NewUnstartedServer(caddys)
	server.Config.ReadTimeout = limit // as Caddy does when it starts
	server.Start()
	defer server.Close()
	wechat.mu.Lock()
	wechat.slow = 2 * limit
	wechat.mu.Unlock()

	pushed := accountSender(t).push("/"+accountID, paceMessage(1))
	push, _ := io.ReadAll(pushed.Body)
	grant := fmt.Sprintf(`{"grant_type":"client_credential","appid":%q,"secret":%q}`, accountID, crmKey)
	for _, tt := range []struct {
		name, host, target, body, want string
		idle                           caddy.Duration // negative: none
	}{
		{"push", "push.example.com", pushed.URL.RequestURI(), string(push), "<Encrypt>", caddy.Duration(time.Minute)},
		{"grant", "api.example.com", "/cgi-bin/stable_token", grant, "access_token", caddy.Duration(time.Minute)},
		{"push without read_body_idle", "push.example.com", pushed.URL.RequestURI(), string(push), "<Encrypt>", -1},
	} {
		caddys.ReadIdleTimeout = tt.idle
		for whole, want := range map[bool]string{true: tt.want, false: "did not come "} {
			conn, err := net.Dial("tcp", server.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
			began := time.Now()
			fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n%s", tt.target, tt.host, len(tt.body), tt.body[:9])
			if whole {
				time.Sleep(limit / 10) // so that it comes in two parts
				_, _ = io.WriteString(conn, tt.body[9:])
			}
			res, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatalf("%s, whole %v: after %s: %v", tt.name, whole, time.Since(began), err)
			}
			answer, _ := io.ReadAll(res.Body)
			if got := string(answer); whole == strings.Contains(got, "did not come ") || !strings.Contains(got, want) || !whole && time.Since(began) > bodyTimeout/2 {
				t.Errorf("%s, whole %v: after %s: %d %s", tt.name, whole, time.Since(began), res.StatusCode, got)
			}
		}
	}
}
