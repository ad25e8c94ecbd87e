package caddymodule

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/internal/stall"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// gatewayNode is the app of one of several gateways on a Redis, which it reaches by a relay of its own.
type gatewayNode struct {
	*App
	ctx   caddy.Context
	relay *redistest.Relay
}

// newGateways starts gateways on a Redis, with tickets.
func newGateways(t *testing.T, api string, n int) (nodes []*gatewayNode, server *redistest.Server) {
	t.Helper()
	server = redistest.Start(t)
	for range n {
		node := &gatewayNode{relay: redistest.NewRelay(t, server.Addr)}
		store := fmt.Sprintf(`{"store": {"module": "redis", "addresses": [%q]}, "seal_keys": [%q],`, node.relay.Addr, strings.Repeat("07", 32))
		node.App, node.ctx = newTestApp(t, strings.Replace(testConfig(api), "{", store, 1))
		for _, p := range []string{platformID, otherPlatform} {
			if err := node.manager().PutTicket(t.Context(), p, tokens.Ticket{Value: secret.New("ticket"), CreatedAt: time.Now()}); err != nil {
				t.Fatal(err)
			}
		}
		nodes = append(nodes, node)
	}
	return nodes, server
}

// redeem asks a node for the user of a tracking id.
func (n *gatewayNode) redeem(t *testing.T, id string) *httptest.ResponseRecorder {
	t.Helper()
	rec := httptest.NewRecorder()
	a := &API{app: n.App, logger: zap.NewNop()}
	if err := a.serveUsers(rec, httptest.NewRequest(http.MethodGet, usersPath+id, nil), &Client{Name: "crm", AppIDs: []string{"*", platformID}}); err != nil {
		t.Error(err)
	}
	return rec
}

// TestOAuthOnSeveralNodes: each step of a login on another node.
func TestOAuthOnSeveralNodes(t *testing.T) {
	t.Parallel()
	wechat := newLoginWeChat(t)
	nodes, _ := newGateways(t, wechat.URL, 3)
	handlers := make([]*OAuth, len(nodes))
	for i, n := range nodes {
		handlers[i] = provisionOAuth(t, &OAuth{Platform: platformID}, n.ctx).OAuth
	}
	v := newVisitor(t, handlers[0])
	callback, state := v.start(oauthBase + "/authorize/" + authorizerID + "/verify?state=mine")
	wechat.takeCalls()
	var wg sync.WaitGroup
	locations := make([]string, 2*len(nodes))
	for i := range locations {
		wg.Go(func() {
			// Each has the browser's cookies, as the repetitions of one request have.
			other := &visitor{t: t, h: handlers[i%len(handlers)], jar: v.jar}
			rec := other.get(wechatCalls(callback, "code-1", state))
			locations[i] = rec.Header().Get("Location")
			assertLanded(t, rec, "mine")
		})
	}
	wg.Wait()
	for _, l := range locations[1:] {
		if l != locations[0] {
			t.Errorf("redirects to %s and %s", locations[0], l)
		}
	}
	if calls := wechat.takeCalls(); len(calls) != 1 {
		t.Errorf("WeChat was asked %q", calls)
	}
	for _, h := range handlers {
		v.h = h
		for what, target := range map[string]string{
			"another code of the flow": wechatCalls(callback, "code-2", state),
			"the code without a flow":  callbackURL("verify", "code-1", "menu"),
			"the code of another func": callbackURL("scan", "code-1", "menu"),
		} {
			if rec := v.get(target); rec.Code == http.StatusFound || rec.Code >= http.StatusInternalServerError {
				t.Errorf("%s: %d", what, rec.Code)
			}
		}
	}
	if calls := wechat.takeCalls(); len(calls) != 0 {
		t.Errorf("WeChat was asked %q", calls)
	}
	id := landing.FindStringSubmatch(locations[0])[2]
	for _, n := range nodes {
		if rec := n.redeem(t, id); rec.Code != http.StatusOK || !strings.Contains(rec.Body.String(), openID) || !strings.Contains(rec.Body.String(), `"state":"mine"`) {
			t.Errorf("%d %s", rec.Code, rec.Body)
		}
	}

	// A func whose users are redeemed once.
	v.h = handlers[1]
	rec := v.get(oauthBase + "/authUserReceive/" + accountID + "/vip?code=code-3&state=s")
	id = landing.FindStringSubmatch(rec.Header().Get("Location"))[2]
	nodes[0].relay.Cut()
	if rec := nodes[0].redeem(t, id); rec.Code != http.StatusServiceUnavailable || strings.Contains(rec.Body.String(), openID) {
		t.Errorf("while Redis is away: %d %s", rec.Code, rec.Body)
	}
	nodes[0].relay.Pass()
	codes := make(map[int]int)
	for i := range 6 {
		codes[nodes[(i+1)%len(nodes)].redeem(t, id).Code]++
	}
	if codes[http.StatusOK] != 1 {
		t.Errorf("redeemed once: %v", codes)
	}
	if n := counted(t, nodes[0].metrics().storeErrors, "redis", "share"); n == 0 {
		t.Error("no metric says that nothing was shared")
	}
}

// TestAuthorizeOnSeveralNodes: it begins on one node and comes back on another, and then on all.
func TestAuthorizeOnSeveralNodes(t *testing.T) {
	t.Parallel()
	for _, then := range []string{"", "https://admin.example.com/accounts"} {
		wechat := newPlatformWeChat(t)
		nodes, _ := newGateways(t, wechat.URL, 3)
		fixtures := make([]*authorizeFixture, len(nodes))
		for i, n := range nodes {
			fixtures[i] = &authorizeFixture{Authorize: &Authorize{Platform: platformID, Then: then}, t: t, wechat: wechat}
			fixtures[i].provision(n.ctx)
		}
		b := fixtures[0].begin("kind=pc")
		var wg sync.WaitGroup
		answers := make([]string, 2*len(nodes))
		ask := func(i int) {
			rec := fixtures[i%len(fixtures)].get(b.back("queryauthcode@@@1"), "Cookie", b.cookie)
			answers[i] = fmt.Sprint(rec.Code, rec.Header().Get("Location"), rec.Body)
		}
		for i := 1; i < len(answers); i++ {
			wg.Go(func() { ask(i) })
		}
		wg.Wait()
		ask(0)
		for _, a := range answers {
			if want := answers[0]; a != want || !strings.Contains(a, authorizerID) {
				t.Errorf("answers\n%s\nand\n%s", want, a)
			}
		}
		if n := wechat.count(queryAuthPath); n != 1 {
			t.Errorf("%d exchanges", n)
		}
		for _, f := range fixtures {
			if rec := f.get(b.back("queryauthcode@@@2"), "Cookie", b.cookie); rec.Code != http.StatusGone {
				t.Errorf("another code: %d", rec.Code)
			}
			if _, err := f.app.manager().Get(t.Context(), tokens.AuthorizerKey(platformID, authorizerID)); err != nil {
				t.Error(err)
			}
		}
		if n := wechat.count(queryAuthPath); n != 1 {
			t.Errorf("%d exchanges", n)
		}
	}
}

// TestAuthorizeMeetsThePush: WeChat pushes the code to one node before the browser brings it to another.
func TestAuthorizeMeetsThePush(t *testing.T) {
	t.Parallel()
	wechat := newPlatformWeChat(t)
	nodes, _ := newGateways(t, wechat.URL, 2)
	f := &authorizeFixture{Authorize: &Authorize{Platform: platformID}, t: t, wechat: wechat}
	f.provision(nodes[1].ctx)
	b := f.begin("kind=pc")
	if _, err := nodes[0].manager().ExchangeAuthCode(t.Context(), platformID, authorizerID, secret.New("queryauthcode@@@1")); err != nil {
		t.Fatal(err)
	}
	if rec := f.get(b.back("queryauthcode@@@1"), "Cookie", b.cookie); rec.Code != http.StatusOK || !strings.Contains(rec.Body.String(), authorizerID) {
		t.Errorf("%d %s", rec.Code, rec.Body)
	}
	if n := wechat.count(queryAuthPath); n != 1 {
		t.Errorf("%d exchanges", n)
	}
}

// TestVerifyFileAddedOnAnotherNode: by the admin endpoint.
func TestVerifyFileAddedOnAnotherNode(t *testing.T) {
	t.Parallel()
	nodes, server := newGateways(t, "", 2)
	v := verifyOf(t, nodes[1].ctx, &Verify{})
	files := 0
	for try := range stall.Tries(t, 200*time.Millisecond, server.Turn) { // a read that had no answer in time is repeated a second later
		name := fmt.Sprintf("/MP_verify_a1B2c3D4e5F6g7%02d.txt", files)
		files++
		if got := file(t, v, http.MethodGet, name); got != "" {
			t.Fatalf("serves %q", got)
		}
		if rec := adminCall(adminMux(t, nodes[0].App), http.MethodPut, "/wechat/verify"+name, "content"); rec.Code != http.StatusCreated {
			t.Fatalf("%d %s", rec.Code, rec.Body)
		}
		start := time.Now()
		redistest.Eventually(t, "the other node serves it", func() error {
			if got := file(t, v, http.MethodGet, name); got != "content" {
				return fmt.Errorf("serves %q", got)
			}
			return nil
		})
		if took := try.Since(start); took > 1300*time.Millisecond {
			try.Errorf("after %v", took)
		}
	}
}
