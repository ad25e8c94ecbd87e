package caddymodule

import (
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"
)

// An app's call, too, that WeChat answers with the ticket's being expired or invalid has it asked to push one; the app gets the answer.
func TestAPIDoubtsTheTicket(t *testing.T) {
	for _, c := range []struct {
		name, path, key string
		code            int
		asks            bool
	}{
		{"an authorizer's, expired", "/" + authorizerID + "/cgi-bin/x", crmKey, 61005, true},
		{"an authorizer's, invalid", "/" + authorizerID + "/cgi-bin/x", crmKey, 61006, true},
		{"a platform's", "/" + platformID + "/cgi-bin/component/api_get_authorizer_option", panelKey, 61006, true},
		{"an account's", "/" + accountID + "/cgi-bin/x", crmKey, 61006, false},
		{"address", "/" + authorizerID + "/cgi-bin/x", crmKey, 61004, false},
		{"permission", "/" + authorizerID + "/cgi-bin/x", crmKey, 61007, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			wechat := newFakeWeChat(t)
			root := t.TempDir()
			wechat.pushErr = `{"errcode":-1,"errmsg":"system error"}` // or the next would not ask for ten minutes
			t.Run("before", func(t *testing.T) { newGatewayAt(t, root, gatewayConfig(wechat.URL), "").authorize() })
			wechat.mu.Lock()
			wechat.pushErr, wechat.pushes = "", make(chan struct{}, 9)
			wechat.mu.Unlock()

			g := newGatewayAt(t, root, gatewayConfig(wechat.URL), "")
			want := fmt.Sprintf(`{"errcode":%d,"errmsg":"no"}`, c.code)
			wechat.answer(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, want) })
			for range 3 {
				if a := g.post(c.path, "{}", bearer(c.key)); a.Body != want {
					t.Fatalf("got %d %s", a.Status, a.Body)
				}
			}
			if !c.asks {
				select {
				case <-wechat.pushes:
					t.Error("WeChat was asked to push a ticket")
				case <-time.After(100 * time.Millisecond):
				}
				return
			}
			select {
			case <-wechat.pushes:
			case <-time.After(10 * time.Second):
				t.Fatal("WeChat is not asked to push a ticket")
			}
			select {
			case <-wechat.pushes:
				t.Error("WeChat was asked twice")
			case <-time.After(100 * time.Millisecond):
			}
		})
	}
}
