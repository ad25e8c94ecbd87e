package caddymodule

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/internal/stall"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// sites is Caddy with a Caddyfile, in front of backends.
type sites struct {
	t       *testing.T
	app     *App
	logs    *observer.ObservedLogs
	servers map[string]*caddyhttp.Server
	server  *httptest.Server
	backend *recorder // BACKEND in the Caddyfile
	other   *recorder // OTHER in the Caddyfile

	infos atomic.Int64                  // how often WeChat was asked about an account
	hangs atomic.Pointer[chan struct{}] // if there, it answers that once this is closed
}

// newSites provisions the sites of a Caddyfile, with its storage in a folder. Tests that use it are not parallel: provisioning Caddy's http app writes
// variables of its packages.
func newSites(t *testing.T, root, caddyfile string) *sites {
	t.Helper()
	wechat := newFakeWeChat(t)
	s := &sites{t: t, backend: newRecorder(t), other: newRecorder(t)}
	wechat.answer(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/api_get_authorizer_info") {
			s.infos.Add(1)
			if hangs := s.hangs.Load(); hangs != nil {
				select {
				case <-*hangs:
				case <-r.Context().Done():
					return
				}
			}
			fmt.Fprintf(w, `{"authorizer_info":{"user_name":%q,"nick_name":"shop"},"authorization_info":{"authorizer_appid":%q}}`, ghID, authorizerID)
		}
	})
	global := fmt.Sprintf(`{
	wechat {
		platform %s {
			secret s
			token %s
			aes_key %s
		}
		platform %s {
			secret s
			token %s
			aes_key %s
		}
		account %s {
			secret s
			token %s
			aes_key %s
		}
		api %s
	}
}
`, platformID, platformToken, platformKey, otherPlatform, otherToken, otherKey, accountID, accountToken, accountKey, wechat.URL)
	text := strings.NewReplacer("BACKEND", s.backend.address(), "OTHER", s.other.address()).Replace(caddyfile)
	adapted, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(global+text), nil)
	if err != nil {
		t.Fatal(err)
	}
	var config struct {
		Apps caddy.ModuleMap `json:"apps"`
	}
	if err := json.Unmarshal(adapted, &config); err != nil {
		t.Fatal(err)
	}
	app, ctx, err := provisionAt(root, string(config.Apps["wechat"]))
	if err != nil {
		t.Fatal(err)
	}
	s.app, s.logs = app, watchLog(app)
	// A context of its own, so that Caddy's modules can be cleaned up.
	ctx, unload := caddy.NewContext(ctx)
	t.Cleanup(func() {
		unload()
		if err := app.Cleanup(); err != nil {
			t.Errorf("cleanup: %v", err)
		}
	})
	v, err := ctx.LoadModuleByID("http", config.Apps["http"])
	if err != nil {
		t.Fatal(err)
	}
	s.servers = v.(*caddyhttp.App).Servers
	s.server = httptest.NewServer(s.servers["srv0"])
	t.Cleanup(s.server.Close)
	return s
}

// authorize makes the authorizer authorize the platform.
func (s *sites) authorize() {
	s.t.Helper()
	m := s.app.manager()
	if err := m.PutTicket(s.t.Context(), platformID, tokens.Ticket{Value: secret.New("ticket@@@1"), CreatedAt: time.Now()}); err != nil {
		s.t.Fatal(err)
	}
	if _, err := m.ExchangeAuthCode(s.t.Context(), platformID, authorizerID, secret.New("queryauthcode@@@1")); err != nil {
		s.t.Fatal(err)
	}
}

// know makes the gateway learn the authorizer's gh_ id.
func (s *sites) know() {
	s.t.Helper()
	s.authorize()
	m := s.app.manager()
	for tick := time.NewTicker(5 * time.Millisecond); ; {
		if _, ok := m.UserName(platformID, authorizerID); ok {
			tick.Stop()
			return
		}
		select {
		case <-tick.C:
		case <-s.t.Context().Done():
			s.t.Fatal("the gh_ id was not learned")
		}
	}
}

// push sends WeChat's push to a host and returns the answer.
func (s *sites) push(host string, r *http.Request) answer {
	s.t.Helper()
	req, err := http.NewRequestWithContext(s.t.Context(), r.Method, s.server.URL+r.URL.RequestURI(), r.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	req.Host, req.Header = host, r.Header
	res, err := s.server.Client().Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return answer{res.StatusCode, res.Header, string(body), res.ContentLength}
}

// backendReply is what the backends of these tests answer.
const backendReply = "<xml><Content>from a mirror</Content></xml>"

func TestMisdirectedMessage(t *testing.T) {
	const (
		withRoute = `
	wechat_event /wx/event
	route /wx/message/* {
		wechat_message
		reverse_proxy BACKEND
	}
`
		here  = "/wx/message/" + authorizerID
		route = "no wechat_message that is reached"
		which = "gh_ id is not known yet"
		taken = "did not let it through"
	)
	site := func(body string) string { return "http://a.example.com {\n" + body + "\n}\n" }
	tests := []struct {
		name      string
		caddyfile string
		unknown   bool   // the account's gh_ id is not known
		path      string // on which the backend gets the message; empty: nobody gets it
		shown     string // the path in the log, if it is not the same with $APPID$
		why       string // in the log
	}{
		{name: "route block", caddyfile: site(withRoute), path: here},
		{name: "directives with matchers", caddyfile: site(`
	wechat_event /wx/event
	wechat_message /wx/message/* {
		max_body 2MiB
	}
	reverse_proxy BACKEND`), path: here},
		{name: "named matcher", caddyfile: site(`
	wechat_event /wx/event
	@push {
		path /other/* /push/*
		method POST
		not path /other/*
	}
	wechat_message @push
	reverse_proxy BACKEND`), path: "/push/" + authorizerID},
		{name: "nested handles", caddyfile: site(`
	handle /wx/* {
		handle /wx/event {
			wechat_event
		}
		handle /wx/message/* {
			route {
				wechat_message
				reverse_proxy BACKEND
			}
		}
		handle {
			respond 404
		}
	}
	handle {
		reverse_proxy OTHER
	}`), path: here},
		{name: "handle_path", caddyfile: site(`
	wechat_event /wx/event
	handle_path /wx/message/* {
		wechat_message
		reverse_proxy BACKEND
	}`), path: "/" + authorizerID, shown: "/wx/message/$APPID$"},
		{name: "encode and headers before it", caddyfile: site(`
	encode gzip
	header X-Site a
	request_body {
		max_size 1MB
	}` + withRoute), path: here},
		{name: "named route", caddyfile: "&(messages) {\n\troute {\n\t\twechat_message\n\t\treverse_proxy BACKEND\n\t}\n}\n" + site(`
	wechat_event /wx/event
	invoke /wx/message/* messages`), path: here},
		{name: "prefix without a slash", caddyfile: site(`
	wechat_event /wx/event
	wechat_message /wx/message*
	reverse_proxy BACKEND`), path: here},
		{name: "asterisk in the middle", caddyfile: site(`
	wechat_event /wx/event
	wechat_message /wx/*/callback
	reverse_proxy BACKEND`), path: "/wx/" + authorizerID + "/callback"},
		{name: "suffix", caddyfile: site(`
	wechat_event /wx/event
	@callback path */callback
	wechat_message @callback
	reverse_proxy BACKEND`), path: "/" + authorizerID + "/callback"},
		{name: "every path", caddyfile: site(`
	wechat_event /wx/event
	wechat_message
	reverse_proxy BACKEND`), path: "/" + authorizerID},
		{name: "asterisk alone", caddyfile: site(`
	wechat_event /wx/event
	wechat_message *
	reverse_proxy BACKEND`), path: "/" + authorizerID},
		{name: "one path for all", caddyfile: site(`
	wechat_event /wx/event
	wechat_message /wx/message
	reverse_proxy BACKEND`), path: "/wx/message"},
		{name: "the account's own path", caddyfile: site(`
	wechat_event /wx/event
	wechat_message /news wx5555555555555555
	wechat_message /shop ` + authorizerID + `
	reverse_proxy /news OTHER
	reverse_proxy BACKEND`), path: "/shop"},
		{name: "a path for each platform", caddyfile: site(`
	wechat_event /wx/event
	wechat_message /wx/` + otherPlatform + `/*
	wechat_message /wx/` + platformID + `/*
	reverse_proxy BACKEND`), path: "/wx/" + platformID + "/" + authorizerID},
		{name: "two sites with routes", caddyfile: "http://b.example.com {" + strings.ReplaceAll(withRoute, "BACKEND", "OTHER") + "}\n" + site(withRoute), path: here},
		{name: "a site for all hosts", caddyfile: "http:// {" + withRoute + "}\n", path: here},

		{name: "only the other site has a route", caddyfile: site("\twechat_event /wx/event") + "http://b.example.com {" + withRoute + "}\n", why: route},
		{name: "a path matcher that names the host too", caddyfile: `http://a.example.com, http://b.example.com {
	wechat_event /wx/event
	@b {
		host b.example.com
		path /wx/message/*
	}
	wechat_message @b
	reverse_proxy BACKEND
}
`, why: route},
		{name: "no message route", caddyfile: site("\twechat_event /wx/event\n\treverse_proxy BACKEND"), why: route},
		{name: "another account's route", caddyfile: site(`
	wechat_event /wx/event
	wechat_message /shop wx5555555555555555
	wechat_message /wx/wx6666666666666666
	reverse_proxy BACKEND`), why: route},
		{name: "another platform's route", caddyfile: site("\twechat_event /wx/event\n\twechat_message /" + otherPlatform + "/*\n\treverse_proxy BACKEND"), why: route},
		{name: "event handler on every path", caddyfile: site("\twechat_event\n\twechat_message /wx/message/*\n\treverse_proxy BACKEND"), why: route},
		{name: "event handler on the message's path too", caddyfile: site("\twechat_event /wx/*\n\twechat_message /wx/message/*\n\treverse_proxy BACKEND"), why: route},
		{name: "backend before it", caddyfile: site(`
	wechat_event /wx/event
	route {
		reverse_proxy /wx/message/* BACKEND
		wechat_message /wx/message/*
	}`), why: route},
		{name: "another handler of the group", caddyfile: site(`
	wechat_event /wx/event
	handle /wx/*33 {
		respond no 200
	}
	handle /wx/* {
		wechat_message
		reverse_proxy BACKEND
	}`), why: route},
		{name: "a handler of the group for another path", caddyfile: site(`
	wechat_event /wx/event
	handle /wx/message/* {
		respond no 200
	}
	handle /wx/* {
		wechat_message
		reverse_proxy BACKEND
	}`), path: "/wx/" + authorizerID},
		{name: "answer before it", caddyfile: site(`
	wechat_event /wx/event
	route {
		header X-Refused yes
		respond /wx/message/* "not for you" 401
		wechat_message /wx/message/*
		reverse_proxy BACKEND
	}`), why: taken},
		{name: "error before it", caddyfile: site(`
	wechat_event /wx/event
	route {
		error /wx/message/* "private" 403
		wechat_message /wx/message/*
		reverse_proxy BACKEND
	}`), why: "403"},
		{name: "rewritten on the way", caddyfile: site(`
	wechat_event /wx/event
	route {
		rewrite /wx/message/* /elsewhere
		wechat_message /wx/message/*
		reverse_proxy BACKEND
	}`), why: taken},
		{name: "rewritten to another account", caddyfile: site(`
	wechat_event /wx/event
	route {
		rewrite /wx/message/* /wx/message/` + strangerID + `
		wechat_message /wx/message/*
		reverse_proxy BACKEND
	}`), why: taken},
		{name: "rewritten to the event handler", caddyfile: site(`
	route {
		rewrite /wx/message/* /wx/event
		wechat_event /wx/event
		wechat_message /wx/message/*
		reverse_proxy BACKEND
	}`), why: taken},
		{name: "patterns that say no path", caddyfile: site(`
	wechat_event /wx/event
	wechat_message /wx/[ab]/*
	wechat_message /wx/{http.request.host}/*
	wechat_message /a%2Fb/*
	reverse_proxy BACKEND`), why: route},

		{name: "unknown account", unknown: true, caddyfile: site(withRoute), why: which},
		{name: "unknown account and its own path", unknown: true, caddyfile: site(`
	wechat_event /wx/event
	wechat_message /shop ` + authorizerID + `
	reverse_proxy BACKEND`), path: "/shop"},
		{name: "unknown account and its own wildcard", unknown: true, caddyfile: site(`
	wechat_event /wx/event
	wechat_message /shop/* ` + authorizerID + `
	reverse_proxy BACKEND`), path: "/shop/" + authorizerID},
		{name: "unknown account in the path", unknown: true, caddyfile: site(`
	wechat_event /wx/event
	wechat_message ` + here + `
	reverse_proxy BACKEND`), path: here},
		{name: "unknown account, two configured", unknown: true, caddyfile: site(`
	wechat_event /wx/event
	wechat_message /news wx5555555555555555
	wechat_message /shop ` + authorizerID + `
	reverse_proxy BACKEND`), why: which},
		{name: "unknown account and a plain account's path", unknown: true, caddyfile: site(`
	wechat_event /wx/event
	wechat_message /shop ` + accountID + `
	reverse_proxy BACKEND`), why: which},
		{name: "unknown account and one path for all", unknown: true, caddyfile: site(`
	wechat_event /wx/event
	wechat_message /wx/message
	reverse_proxy BACKEND`), why: which},
	}
	known := filepath.Join(t.TempDir(), "storage") // where the gh_ id has been learned
	t.Run("learn", func(t *testing.T) { newSites(t, known, site(withRoute)).know() })
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			root := known
			if tt.unknown {
				root = filepath.Join(t.TempDir(), "storage")
			}
			s := newSites(t, root, tt.caddyfile)
			wechat := platformSender(t)
			message := textMessage("secret content")
			got := s.push("a.example.com", wechat.push("/wx/event", message))
			if n := len(s.other.copies()); n != 0 {
				t.Errorf("the other backend got %d messages", n)
			}
			s.checkLog(tt.path, tt.shown, tt.why)
			if tt.path == "" {
				if got.Status != 200 || got.Body != "success" || got.Header.Get("X-Refused") != "" {
					t.Errorf("answer %d %q with %v", got.Status, got.Body, got.Header)
				}
				if c := s.backend.copies(); len(c) != 0 {
					t.Errorf("the backend got %+v", c)
				}
				return
			}
			if reply, err := wechat.codec.OpenReply([]byte(got.Body)); err != nil || string(reply) != backendReply {
				t.Errorf("answer %d %q: %v", got.Status, got.Body, err)
			}
			c := s.backend.copies()
			if len(c) != 1 {
				t.Fatalf("the backend got %d messages", len(c))
			}
			if c[0].body != message || c[0].path != tt.path || strings.Contains(c[0].query, "msg_signature") || !strings.Contains(c[0].query, "openid="+openID) {
				t.Errorf("the backend got %+v", c[0])
			}
			wantAppID := authorizerID
			if tt.path == "/wx/message" {
				wantAppID = "" // as if it had come there
			}
			if h := c[0].header; h.Get("X-Wechat-Appid") != wantAppID || h.Get("X-Wechat-Platform") != platformID {
				t.Errorf("headers %v", h)
			}
			for _, endpoint := range []string{"event", "message"} {
				if n := counted(t, s.app.metrics().pushes, endpoint, "ok"); n != 1 {
					t.Errorf("%s counted %v times", endpoint, n)
				}
			}
		})
	}
}

// checkLog looks for the one line that tells the operator what to mend.
func (s *sites) checkLog(path, shown, why string) {
	s.t.Helper()
	warnings := s.logs.FilterLevelExact(zapcore.WarnLevel).All()
	if len(warnings) != 1 || !strings.Contains(warnings[0].Message, "authorization-event URL") {
		s.t.Fatalf("log %v", s.logs.All())
	}
	line, fields := warnings[0].Message, warnings[0].ContextMap()
	if !strings.Contains(line, "消息与事件接收URL") || !strings.Contains(line, "授权事件接收URL") || fields["platform"] != platformID {
		s.t.Errorf("log %q %v", line, fields)
	}
	if shown == "" {
		shown = strings.ReplaceAll(path, authorizerID, "$APPID$")
	}
	if path != "" && fields["message_path"] != shown {
		s.t.Errorf("path %v, want %s", fields["message_path"], shown)
	}
	if path == "" && (!strings.Contains(line, "not delivered") || !strings.Contains(fmt.Sprint(fields["error"]), why)) {
		s.t.Errorf("log %q %v, want %s", line, fields, why)
	}
	for _, e := range s.logs.All() {
		if text := fmt.Sprint(e.Message, e.ContextMap()); strings.Contains(text, "secret content") || strings.Contains(text, openID) {
			s.t.Errorf("logged: %s", text)
		}
	}
}

// TestMisdirectedMessages: many at once, each with its own reply, and few log lines; what is no message is an event.
func TestMisdirectedMessages(t *testing.T) {
	s := newSites(t, filepath.Join(t.TempDir(), "storage"), `http://a.example.com {
	wechat_event /wx/event
	route /wx/message/* {
		wechat_message
		reverse_proxy BACKEND
	}
}
`)
	s.know()
	s.logs.TakeAll()
	var all sync.WaitGroup
	const pushes = 40
	for i := range pushes {
		all.Go(func() {
			wechat := platformSender(t)
			wechat.nonce = fmt.Sprint(i)
			got := s.push("a.example.com", wechat.push("/wx/event", textMessage(fmt.Sprintf("text %d", i))))
			if reply, err := wechat.codec.OpenReply([]byte(got.Body)); err != nil || string(reply) != backendReply {
				t.Errorf("answer %d %q: %v", got.Status, got.Body, err)
			}
		})
	}
	all.Wait()
	seen := make(map[string]bool)
	for _, c := range s.backend.copies() {
		seen[c.body] = true
	}
	if len(seen) != pushes {
		t.Errorf("%d different messages of %d", len(seen), pushes)
	}
	if n := s.logs.FilterLevelExact(zapcore.WarnLevel).Len(); n != 1 {
		t.Errorf("%d warnings", n)
	}
	if got := s.push("a.example.com", eventSender(t).push("/wx/event", eventXML("component_verify_ticket", ticketElement))); got.Body != "success" {
		t.Errorf("ticket: %d %q", got.Status, got.Body)
	}
	forged := newSender(t, platformID, "another-token", platformKey)
	if got := s.push("a.example.com", forged.push("/wx/event", textMessage("x"))); got.Status != 403 {
		t.Errorf("forged: %d %q", got.Status, got.Body)
	}
	stale := platformSender(t)
	stale.at = time.Now().Add(-time.Hour)
	if got := s.push("a.example.com", stale.push("/wx/event", textMessage("x"))); got.Status != 403 {
		t.Errorf("stale: %d %q", got.Status, got.Body)
	}
	if n := len(s.backend.copies()); n != pushes {
		t.Errorf("the backend got %d requests", n)
	}
}

// TestMisdirectedPanics: a panic before wechat_message is that handler's; one of wechat_message's is how it leaves a push
// unanswered.
func TestMisdirectedPanics(t *testing.T) {
	s := newSites(t, filepath.Join(t.TempDir(), "storage"), `http://a.example.com {
	wechat_event /wx/event
	route /wx/message/* {
		test_before_message
		wechat_message `+authorizerID+`
		reverse_proxy BACKEND
	}
}
`)
	before := func(taken bool) {
		beforeMessage = func(w http.ResponseWriter, r *http.Request) {
			if _, err := r.Body.Read(make([]byte, 1)); !errors.Is(err, errNotForYou) {
				t.Errorf("the sealed push can be read: %v", err)
			}
			if err := http.NewResponseController(w).Flush(); !errors.Is(err, http.ErrNotSupported) {
				t.Errorf("an answer can be sent: %v", err)
			}
			if _, err := w.Write([]byte("an answer")); err != nil {
				t.Error(err)
			}
			if onDetour(r).taken.Store(taken); taken != (r.Context().Err() == nil) {
				t.Errorf("context: %v", r.Context().Err())
			}
			panic(http.ErrAbortHandler)
		}
	}
	push := func() *http.Request {
		r := platformSender(t).push("/wx/event", textMessage("x"))
		req, err := http.NewRequestWithContext(t.Context(), r.Method, s.server.URL+r.URL.RequestURI(), r.Body)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = "a.example.com"
		return req
	}
	before(false)
	if got := s.push("a.example.com", push()); got.Body != "success" {
		t.Errorf("%d %q", got.Status, got.Body)
	}
	before(true)
	res, err := s.server.Client().Do(push())
	if err == nil {
		_ = res.Body.Close()
		t.Errorf("answered with %d", res.StatusCode)
	}
	if n := len(s.backend.copies()); n != 0 {
		t.Errorf("the backend got %d messages", n)
	}
}

// TestMisdirectedMetrics: what a message on a detour was answered, and when, is what counts for the event URL too, and not that its
// handler was done with it at last.
func TestMisdirectedMetrics(t *testing.T) {
	entered, release := make(chan struct{}, 2), make(chan struct{})
	slow := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		entered <- struct{}{}
		<-release
		_, _ = io.WriteString(w, backendReply)
	}))
	t.Cleanup(slow.Close)
	s := newSites(t, filepath.Join(t.TempDir(), "storage"), strings.ReplaceAll(`http://a.example.com {
	wechat_event /wx/event
	route /wx/message/* {
		wechat_message {
			pushes 1
			reply_timeout 50ms
		}
		reverse_proxy SLOW
	}
}
http://b.example.com {
	wechat_event /wx/event
	route /wx/message/* {
		wechat_message
		reverse_proxy SLOW
	}
}
`, "SLOW", slow.Listener.Addr().String()))
	s.know()
	start, watch := time.Now(), stall.New(t)
	free := sync.OnceFunc(func() { close(release) })
	t.Cleanup(free) // before the server is closed, which waits for its handlers
	metrics := s.app.metrics()
	until := func(what string, is func() bool) {
		t.Helper()
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		limit := time.After(10 * time.Second)
		for !is() {
			select {
			case <-tick.C:
			case <-limit:
				t.Fatal(what)
			}
		}
	}
	if got := s.push("a.example.com", platformSender(t).push("/wx/event", textMessage("slow"))); got.Body != "success" {
		t.Errorf("%d %q", got.Status, got.Body)
	}
	<-entered
	message := textMessage("held")
	var first sync.WaitGroup
	first.Go(func() {
		if got := s.push("b.example.com", platformSender(t).push("/wx/event", message)); got.Status != http.StatusOK {
			t.Errorf("%d %q", got.Status, got.Body)
		}
	})
	<-entered
	ctx, hangUp := context.WithCancel(t.Context())
	r := platformSender(t).push("/wx/event", message)
	again, err := http.NewRequestWithContext(ctx, r.Method, s.server.URL+r.URL.RequestURI(), r.Body)
	if err != nil {
		t.Fatal(err)
	}
	again.Host = "b.example.com"
	var second sync.WaitGroup
	second.Go(func() {
		if res, err := s.server.Client().Do(again); err == nil {
			_ = res.Body.Close()
			t.Errorf("answered with %d", res.StatusCode)
		}
	})
	until("it did not join", func() bool { return testutil.ToFloat64(metrics.joined) == 1 })
	hangUp()
	second.Wait()
	until("a push was not counted as held", func() bool {
		return counted(t, metrics.pushes, "message", "held") == 1 && counted(t, metrics.pushes, "event", "held") == 1
	})
	began := time.Now()
	time.AfterFunc(300*time.Millisecond, free)
	first.Wait()
	s.server.Close() // which waits for the handlers
	if ok := counted(t, metrics.pushes, "event", "ok"); ok != 2 {
		t.Errorf("%v pushes to the event URL were answered", ok)
	}
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(metrics.pushDuration)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	took := make(map[string]float64)
	for _, m := range families[0].GetMetric() {
		took[m.GetLabel()[0].GetValue()] = m.GetHistogram().GetSampleSum()
	}
	if more := took["event"] - took["message"]; more > time.Since(began).Seconds()/2+watch.Stopped(start).Seconds() {
		t.Errorf("the event URL took %v s longer", more)
	}
}

// TestMisdirectedRefused: a message on a detour that wechat_message refuses counts and is told as refused for the event URL too.
func TestMisdirectedRefused(t *testing.T) {
	s := newSites(t, filepath.Join(t.TempDir(), "storage"), `http://a.example.com {
	wechat_event /wx/event
	route /wx/message/* {
		wechat_message {
			max_body 100
		}
		reverse_proxy BACKEND
	}
}
`)
	s.know()
	if got := s.push("a.example.com", platformSender(t).push("/wx/event", textMessage("hello"))); got.Status != http.StatusRequestEntityTooLarge {
		t.Errorf("%d %q", got.Status, got.Body)
	}
	s.server.Close() // which waits for the handlers
	pushes := s.app.metrics().pushes
	for _, endpoint := range []string{"message", "event"} {
		if refused, ok := counted(t, pushes, endpoint, "too_large"), counted(t, pushes, endpoint, "ok"); refused != 1 || ok != 0 {
			t.Errorf("%s: %v refused, %v ok", endpoint, refused, ok)
		}
	}
	text, entries := feedJSON(t, s.app, "/wechat/feed")
	told := 0
	for _, e := range entries {
		if e.Kind != feedEvent && e.Kind != feedPush {
			continue
		}
		if told++; e.Outcome != outcomeRefused || e.Status != http.StatusRequestEntityTooLarge {
			t.Errorf("the feed says %s %s %d", e.Kind, e.Outcome, e.Status)
		}
	}
	if told != 2 {
		t.Errorf("the feed has %d pushes: %s", told, text)
	}
	if n := s.logs.FilterMessage("push refused").Len(); n != 1 {
		t.Errorf("the log says %d times that it was refused", n)
	}
	if n := s.logs.FilterMessageSnippet("was not delivered").Len(); n != 0 {
		t.Errorf("the log says %d times that no wechat_message was found", n)
	}
}

func init() {
	caddy.RegisterModule(new(testBeforeMessage))
	httpcaddyfile.RegisterHandlerDirective("test_before_message", func(httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		return new(testBeforeMessage), nil
	})
}

// testBeforeMessage is a handler before wechat_message, which does beforeMessage.
type testBeforeMessage struct{}

var beforeMessage func(http.ResponseWriter, *http.Request)

// CaddyModule returns the Caddy module information.
func (*testBeforeMessage) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.test_before_message", New: func() caddy.Module { return new(testBeforeMessage) }}
}

// ServeHTTP implements caddyhttp.MiddlewareHandler.
func (*testBeforeMessage) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	beforeMessage(w, r)
	return next.ServeHTTP(w, r)
}

func TestPathOf(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ pattern, appid, want string }{
		{"/wx/message/*", authorizerID, "/wx/message/" + authorizerID},
		{"/wx/message*", authorizerID, "/wx/message/" + authorizerID},
		{"/wx/*/callback", authorizerID, "/wx/" + authorizerID + "/callback"},
		{"*/callback", authorizerID, "/" + authorizerID + "/callback"},
		{"*", authorizerID, "/" + authorizerID},
		{"/wx/message", authorizerID, "/wx/message"},
		{"/wx/message", "", "/wx/message"},
		{"/wx/message/*", "", ""},
		{"message", authorizerID, ""},
		{"message/*", authorizerID, ""},
		{"*/wx/*", authorizerID, ""},
		{"/wx/{path}/*", authorizerID, ""},
		{"/wx/%2f/*", authorizerID, ""},
		{"/wx//*", authorizerID, ""},
		{"/wx/?/*", authorizerID, ""},
		{"", authorizerID, ""},
	} {
		if got, ok := pathOf(tt.pattern, tt.appid); ok != (tt.want != "") || ok && got != tt.want {
			t.Errorf("%s with %q: %s", tt.pattern, tt.appid, got)
		}
	}
}

func TestDamperWithAnInterval(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var d damper
		for i, want := range []bool{true, false, false, true} {
			ok, missed := d.allowEvery(misdirectedLogEvery)
			if ok != want || ok && missed != max(0, i-1) {
				t.Errorf("line %d: %v, %d missed", i, ok, missed)
			}
			time.Sleep(misdirectedLogEvery/3 + time.Second)
		}
	})
}
