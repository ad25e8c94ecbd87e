package caddymodule

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// TestCallWhileTheStoreChanges: a reload changes the store while a call of the configuration of before waits for its token: the manager ends
// between two steps of the renewal. The call gets the token of the manager that has taken its place.
func TestCallWhileTheStoreChanges(t *testing.T) {
	wechat := newFakeWeChat(t)
	behind, err := url.Parse(wechat.URL)
	if err != nil {
		t.Fatal(err)
	}
	var old, next *gateway
	var once sync.Once
	proxy := httputil.NewSingleHostReverseProxy(behind)
	// The component token is refused, so that the renewal needs another one.
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		refused := false
		if strings.HasSuffix(r.URL.Path, "/api_authorizer_token") {
			once.Do(func() {
				refused = true
				old.app.shared.heir.Store(next.app.shared)
				go old.app.shared.manager.Close()
				for tick := time.NewTicker(time.Millisecond); ; <-tick.C {
					if _, err := old.app.shared.manager.Get(t.Context(), tokens.AccountKey(accountID)); errors.Is(err, tokens.ErrClosed) {
						tick.Stop()
						return
					}
				}
			})
		}
		if refused {
			io.WriteString(w, `{"errcode":42001,"errmsg":"access_token expired"}`)
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(front.Close)
	old, next = newGateway(t, wechat, gatewayConfig(front.URL), ""), newGateway(t, wechat, gatewayConfig(wechat.URL), "")
	old.authorize()
	key := tokens.AuthorizerKey(platformID, authorizerID)
	held, err := old.app.manager().Get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	next.authorize()
	if _, err := next.app.manager().Renew(t.Context(), key, secret.String{}); err != nil {
		t.Fatal(err)
	}
	if got, err := old.app.manager().Get(t.Context(), key); err != nil || !got.Value.Same(held.Value) {
		t.Fatalf("the old one has another token: %v", err)
	}
	if got := old.get("/"+authorizerID+"/cgi-bin/user/info", bearer(crmKey)); got.Body != `{"errcode":0,"errmsg":"ok"}` {
		t.Errorf("got %d %s", got.Status, got.Body)
	}
}
