package caddymodule

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

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
			res, err := g.Client().Transport.RoundTrip(req)
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
	if n := len(wechat.seen()); n != 1 {
		t.Errorf("SDK: %d calls, want 1: the path is known for refusing a new token", n)
	}
	// The token itself is not taken for bad.
	wechat.answer(nil)
	if a := g.get("/cgi-bin/user/info?access_token=" + opaque); a.Body != `{"errcode":0,"errmsg":"ok"}` {
		t.Errorf("once the path takes the token again: got %d %s", a.Status, a.Body)
	}
	if n := wechat.tokensIssued(authorizerID); n != 2 {
		t.Errorf("WeChat issued %d tokens, want 2", n)
	}
}

// WeChat answers 40001 for the wrong kind of token too. A client that calls such a path again and again does not have
// the token renewed that others use, in whatever spelling it writes the path.
func TestAPIAlwaysRefusingPath(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", `{"repeat_buffer":1024}`)
	core, logs := observer.New(zapcore.DebugLevel)
	g.transport().logger = zap.New(core)
	g.authorize()
	opaque := g.opaque(authorizerID, crmKey)
	wechat.answer(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(strings.ToLower(r.URL.Path), "/cgi-bin/good") {
			io.WriteString(w, `{"errcode":0,"errmsg":"ok"}`)
			return
		}
		lastingRefusal(w, r)
	})
	for i := range 20 {
		path := "/cgi-bin/always/refusing"
		if i%2 == 1 {
			path = "/CGI-bin/Always/refusing/"
		}
		if a := g.get("/"+authorizerID+path, bearer(crmKey)); a.Status != http.StatusOK || a.code(t) != 40001 {
			t.Fatalf("call %d, Bearer: got %d %s, want WeChat's answer", i, a.Status, a.Body)
		}
		if a := g.get(path + "?access_token=" + opaque); a.Status != http.StatusOK || a.code(t) != 48001 {
			t.Fatalf("call %d, SDK: got %d %s, want 48001", i, a.Status, a.Body)
		}
	}
	if n := wechat.tokensIssued(authorizerID); n != 2 {
		t.Errorf("WeChat issued %d tokens, want 2: one before, and one on the first refusal", n)
	}
	// A body that cannot be sent again never shows whether a new token helps: it counts once.
	large := strings.Repeat("x", 2000)
	for range 20 {
		g.post("/"+authorizerID+"/cgi-bin/always/large", large, bearer(crmKey))
	}
	if n := wechat.tokensIssued(authorizerID); n != 3 {
		t.Errorf("WeChat issued %d tokens, want 3", n)
	}
	if a := g.get("/cgi-bin/good?access_token=" + opaque); a.Body != `{"errcode":0,"errmsg":"ok"}` {
		t.Errorf("another path: got %d %s", a.Status, a.Body)
	}
	if n := wechat.tokensIssued(authorizerID); n != 3 {
		t.Errorf("the calls of others had the token renewed: %d tokens", n)
	}
	// Other paths still heal, and so do other accounts on the same path.
	wechat.answer(nil)
	wechat.spoil(authorizerID)
	if a := g.get("/cgi-bin/good?access_token=" + opaque); a.Body != `{"errcode":0,"errmsg":"ok"}` {
		t.Errorf("healing: got %d %s", a.Status, a.Body)
	}
	g.opaque(accountID, crmKey)
	wechat.spoil(accountID)
	if a := g.get("/"+accountID+"/cgi-bin/always/refusing", bearer(crmKey)); a.Body != `{"errcode":0,"errmsg":"ok"}` {
		t.Errorf("another account: got %d %s", a.Status, a.Body)
	}
	// One Error line, however many paths refuse.
	wechat.answer(lastingRefusal)
	for i := range 5 {
		g.get(fmt.Sprintf("/%s/cgi-bin/refusing/%d", accountID, i), bearer(crmKey))
	}
	if n := logs.FilterLevelExact(zapcore.ErrorLevel).Len(); n != 1 {
		t.Errorf("%d Error lines, want 1", n)
	}
}

// Another system is told of where it has voided a token, and not where a path takes no token of that kind, whichever calls can be repeated.
func TestAPIRogueRefresh(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", `{"repeat_buffer":1024}`)
	g.authorize()
	large := strings.Repeat("x", 2000)
	wechat.answer(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/cgi-bin/good") {
			io.WriteString(w, `{"errcode":0,"errmsg":"ok"}`)
			return
		}
		lastingRefusal(w, r)
	})
	call := func(path, body string) int64 {
		t.Helper()
		return g.post("/"+authorizerID+path, body, bearer(crmKey)).code(t)
	}
	rogues := func() float64 { return counted(t, g.app.metrics().rogues, "authorizer") }
	before := wechat.tokensIssued(authorizerID)
	for i := range 3 {
		for _, body := range []string{"{}", large} {
			if code := call(fmt.Sprintf("/cgi-bin/another/kind%d", i), body); code != 40001 {
				t.Errorf("a path that takes another kind of token answers %d", code)
			}
			if code := call("/cgi-bin/good", body); code != 0 {
				t.Errorf("a path that takes it answers %d", code)
			}
		}
	}
	if n := wechat.tokensIssued(authorizerID) - before; n != 6 {
		t.Errorf("%d renewals, want 6", n)
	}
	g.do(http.MethodHead, "/"+authorizerID+"/cgi-bin/another/kind2", strings.NewReader(large), bearer(crmKey)) // which says nothing
	if n := rogues(); n != 0 {
		t.Errorf("%v refreshes by another system are counted, want none", n)
	}
	for i, body := range []string{"{}", large} {
		wechat.spoil(authorizerID)
		call("/cgi-bin/good", body)
		for range 2 {
			if code := call("/cgi-bin/good", body); code != 0 {
				t.Errorf("a path that takes it answers %d", code)
			}
		}
		if n := rogues(); n != float64(i+1) {
			t.Errorf("%v refreshes by another system are counted, want %d", n, i+1)
		}
	}
}

// An answer which does not tell that WeChat took the next token proves nothing.
func TestAPIRogueRefreshIsInDoubt(t *testing.T) {
	for name, answer := range map[string]func(w http.ResponseWriter){
		"busy":        func(w http.ResponseWriter) { io.WriteString(w, `{"errcode":-1,"errmsg":"system error"}`) },
		"an error":    func(w http.ResponseWriter) { w.WriteHeader(http.StatusNotFound) },
		"its gateway": func(w http.ResponseWriter) { w.WriteHeader(http.StatusBadGateway) },
	} {
		for form, body := range map[string]string{"repeated": "{}", "not repeated": strings.Repeat("x", 2000)} {
			t.Run(name+", "+form, func(t *testing.T) {
				wechat := newFakeWeChat(t)
				g := newGateway(t, wechat, "", `{"repeat_buffer":1024}`)
				g.authorize()
				var calls atomic.Int64
				wechat.answer(func(w http.ResponseWriter, r *http.Request) {
					if calls.Add(1) == 1 {
						lastingRefusal(w, r)
						return
					}
					answer(w)
				})
				for range 2 {
					g.post("/"+authorizerID+"/cgi-bin/another/kind", body, bearer(crmKey))
				}
				if n := counted(t, g.app.metrics().rogues, "authorizer"); n != 0 || calls.Load() < 2 {
					t.Errorf("%v refreshes by another system are counted after %d calls, want none", n, calls.Load())
				}
			})
		}
	}
}

// Nor does such an answer take the proof away, or the doubt whether a path takes tokens of that kind.
func TestAPIRogueRefreshOutlastsDoubt(t *testing.T) {
	for name, doubtful := range map[string]func(w http.ResponseWriter){
		"busy":        func(w http.ResponseWriter) { io.WriteString(w, `{"errcode":-1,"errmsg":"system error"}`) },
		"an error":    func(w http.ResponseWriter) { w.WriteHeader(http.StatusNotFound) },
		"its gateway": func(w http.ResponseWriter) { w.WriteHeader(http.StatusBadGateway) },
		"a page":      func(w http.ResponseWriter) { io.WriteString(w, "<html>") },
		"none":        func(http.ResponseWriter) { panic(http.ErrAbortHandler) },
	} {
		t.Run(name, func(t *testing.T) {
			wechat := newFakeWeChat(t)
			g := newGateway(t, wechat, "", `{"repeat_buffer":1024}`)
			g.authorize()
			upload := func(answer http.HandlerFunc) answer {
				wechat.answer(answer)
				return g.post("/"+authorizerID+"/cgi-bin/upload", strings.Repeat("x", 2000), bearer(crmKey))
			}
			issued := func() int { return wechat.tokensIssued(authorizerID) }
			inDoubt := func(w http.ResponseWriter, _ *http.Request) { doubtful(w) }
			before := issued()
			upload(lastingRefusal)
			upload(inDoubt)
			upload(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, `{"errcode":0,"errmsg":"ok"}`) })
			if n := counted(t, g.app.metrics().rogues, "authorizer"); n != 1 || issued()-before != 1 {
				t.Errorf("%v refreshes by another system are counted after %d renewals, want 1", n, issued()-before)
			}
			before = issued()
			for range 3 {
				if got := upload(lastingRefusal); got.code(t) != 40001 {
					t.Errorf("got %d %s, want WeChat's refusal", got.Status, got.Body)
				}
				upload(inDoubt)
			}
			if n := issued() - before; n != 1 {
				t.Errorf("%d renewals for a path that takes no token of that kind, want 1", n)
			}
		})
	}
}

// What WeChat took before the token was voided, and answers after it has refused another call, proves nothing and takes no proof away.
func TestAPIRogueRefreshDuringAnUpload(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", `{"repeat_buffer":1024}`)
	g.authorize()
	taken, answer := make(chan struct{}), make(chan struct{})
	wechat.answer(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Has("slow") {
			close(taken)
			<-answer
		}
		io.WriteString(w, `{"errcode":0,"errmsg":"ok"}`)
	})
	upload := func(query string) int64 {
		return g.post("/"+authorizerID+"/cgi-bin/good"+query, strings.Repeat("x", 2000), bearer(crmKey)).code(t)
	}
	slow := make(chan int64)
	go func() { slow <- upload("?slow=1") }()
	<-taken
	wechat.spoil(authorizerID)
	refused := upload("")
	close(answer)
	first := <-slow
	if n := counted(t, g.app.metrics().rogues, "authorizer"); n != 0 {
		t.Errorf("%v refreshes by another system are counted, before WeChat took the next token", n)
	}
	if next := upload(""); refused != 40001 || first != 0 || next != 0 {
		t.Errorf("answers %d, %d and %d", refused, first, next)
	}
	if n := counted(t, g.app.metrics().rogues, "authorizer"); n != 1 {
		t.Errorf("%v refreshes by another system are counted, want 1", n)
	}
}

// However many paths want another kind of token, the calls of others go on: WeChat takes the token there.
func TestAPIManyRefusingPaths(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.authorize()
	wechat.answer(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/cgi-bin/good") {
			io.WriteString(w, `{"errcode":0,"errmsg":"ok"}`)
			return
		}
		lastingRefusal(w, r)
	})
	for _, appid := range []string{accountID, authorizerID} {
		opaque := g.opaque(appid, crmKey)
		for i := range 15 {
			if a := g.get(fmt.Sprintf("/%s/cgi-bin/refusing/%d", appid, i), bearer(crmKey)); a.Status != http.StatusOK || a.code(t) != 40001 {
				t.Errorf("%s, path %d: got %d %s, want WeChat's answer", appid, i, a.Status, a.Body)
			}
			if a := g.get("/"+appid+"/cgi-bin/good", bearer(crmKey)); a.Body != `{"errcode":0,"errmsg":"ok"}` {
				t.Errorf("%s, another path, after %d: got %d %s", appid, i+1, a.Status, a.Body)
			}
			if a := g.get("/cgi-bin/good?access_token=" + opaque); a.Body != `{"errcode":0,"errmsg":"ok"}` {
				t.Errorf("%s, another path by an SDK, after %d: got %d %s", appid, i+1, a.Status, a.Body)
			}
		}
		if a := g.get("/cgi-bin/refusing/0?access_token=" + opaque); a.Status != http.StatusOK || a.code(t) != 48001 {
			t.Errorf("%s, a refusing path by an SDK: got %d %s, want 48001", appid, a.Status, a.Body)
		}
		if n := wechat.tokensIssued(appid); n > 12 {
			t.Errorf("%s: WeChat issued %d tokens", appid, n)
		}
	}
}

// A path that is not believed gets the token that another node is having renewed: WeChat has voided the one of before, and the
// record of the next one is not written yet.
func TestAPIRefusingPathMeetsARenewal(t *testing.T) {
	wechat := newFakeWeChat(t)
	hold := make(chan chan struct{}, 1) // of what holds an answer with a token back
	acted := make(chan struct{})
	refused := make(chan struct{}, 8)
	wechat.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rec := httptest.NewRecorder()
		wechat.ServeHTTP(rec, r)
		if strings.HasSuffix(r.URL.Path, "/api_authorizer_token") {
			select {
			case answer := <-hold:
				close(acted)
				<-answer
			default:
			}
		}
		maps.Copy(w.Header(), rec.Header())
		_, _ = w.Write(rec.Body.Bytes())
		if strings.Contains(rec.Body.String(), "40001") {
			refused <- struct{}{}
		}
	})
	server := redistest.Start(t)
	nodes := make([]*gateway, 2)
	for i := range nodes {
		store := fmt.Sprintf(`{"store": {"module": "redis", "addresses": [%q]}, "seal_keys": [%q],`,
			redistest.NewRelay(t, server.Addr).Addr, strings.Repeat("07", 32))
		nodes[i] = newGateway(t, wechat, strings.Replace(gatewayConfig(wechat.URL), "{", store, 1), "")
	}
	a, b := nodes[0], nodes[1]
	a.authorize()
	const path = "/" + authorizerID + "/cgi-bin/user/info"
	key := tokens.AuthorizerKey(platformID, authorizerID)
	redistest.Eventually(t, "both nodes hear each other's renewals", func() error {
		renewed, err := a.app.manager().Renew(t.Context(), key, secret.String{})
		if err != nil {
			return err
		}
		got, err := b.app.manager().Replaced(t.Context(), key, secret.New("another"))
		if err == nil && !got.Value.Same(renewed.Value) {
			err = errors.New("an older token")
		}
		return err
	})
	wechat.answer(lastingRefusal)
	if got := b.get(path, bearer(crmKey)); got.code(t) != 40001 {
		t.Fatalf("got %d %s, want WeChat's second refusal", got.Status, got.Body)
	}
	wechat.answer(nil)
	<-refused
	<-refused

	var held tokens.Token
	redistest.Eventually(t, "the first node hears of the token that the second one had for its call", func() (err error) {
		if held, err = a.app.manager().Get(t.Context(), key); err != nil {
			return err
		}
		newest, err := b.app.manager().Get(t.Context(), key)
		if err == nil && !held.Value.Same(newest.Value) {
			err = errors.New("an older token")
		}
		return err
	})
	answer := make(chan struct{})
	hold <- answer
	renewal := make(chan error, 1)
	go func() {
		_, err := a.app.manager().Renew(t.Context(), key, held.Value)
		renewal <- err
	}()
	<-acted
	issued := wechat.tokensIssued(authorizerID)
	go func() {
		<-refused
		close(answer)
	}()
	if got := b.get(path, bearer(crmKey)); got.Body != `{"errcode":0,"errmsg":"ok"}` {
		t.Errorf("while another node renews: got %d %s", got.Status, got.Body)
	}
	if err := <-renewal; err != nil {
		t.Error(err)
	}
	if n := wechat.tokensIssued(authorizerID); n != issued {
		t.Errorf("%d more renewals, want none", n-issued)
	}
}

// A path that was not believed once is believed as far as it takes the token that replaced the refused one meanwhile, by
// another call or on another node.
func TestAPIRefusedWhileReplaced(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.authorize()
	wechat.answer(lastingRefusal)
	const path = "/" + authorizerID + "/cgi-bin/user/info"
	if a := g.get(path, bearer(crmKey)); a.code(t) != 40001 {
		t.Fatalf("got %d %s", a.Status, a.Body)
	}
	wechat.answer(nil)
	key := tokens.AuthorizerKey(platformID, authorizerID)
	var once sync.Once
	wechat.answer(func(w http.ResponseWriter, r *http.Request) {
		refused := false
		once.Do(func() {
			refused = true
			if _, err := g.app.manager().Renew(t.Context(), key, secret.String{}); err != nil {
				t.Error(err)
			}
			lastingRefusal(w, r)
		})
		if !refused {
			io.WriteString(w, `{"errcode":0,"errmsg":"ok"}`)
		}
	})
	before := wechat.tokensIssued(authorizerID)
	if a := g.get(path, bearer(crmKey)); a.Body != `{"errcode":0,"errmsg":"ok"}` {
		t.Errorf("got %d %s", a.Status, a.Body)
	}
	if n := wechat.tokensIssued(authorizerID) - before; n != 1 {
		t.Errorf("%d renewals, want that of the other call alone", n)
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

func TestNotDialing(t *testing.T) {
	t.Parallel()
	if _, dialing := errors.AsType[reverseproxy.DialError](notDialing{reverseproxy.NewDialError(io.EOF)}); dialing {
		t.Error("Caddy would try the next origin")
	}
	if !isTimeout(notDialing{fmt.Errorf("x: %w", context.DeadlineExceeded)}) || isTimeout(notDialing{io.EOF}) {
		t.Error("a timeout is no longer told from another error")
	}
}
