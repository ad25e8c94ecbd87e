package caddymodule

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap/zapcore"

	"github.com/caddy-wechat/caddy-wechat/crypto"
)

// proxyTo is the JSON of a reverse_proxy to a server.
func proxyTo(address string) json.RawMessage {
	return json.RawMessage(fmt.Sprintf(`{"handler": "reverse_proxy", "upstreams": [{"dial": %q}]}`, address))
}

// loadMirrored loads a wechat_message with mirrors from JSON, as Caddy does.
func loadMirrored(t *testing.T, ctx caddy.Context, mirrors ...json.RawMessage) *Message {
	t.Helper()
	return loadMessage(t, ctx, map[string]any{"mirrors": mirrors})
}

// loadMessage loads a wechat_message from JSON, as Caddy does.
func loadMessage(t *testing.T, ctx caddy.Context, options map[string]any) *Message {
	t.Helper()
	config, _ := json.Marshal(options)
	provisioning.Lock()
	defer provisioning.Unlock()
	v, err := ctx.LoadModuleByID("http.handlers.wechat_message", config)
	if err != nil {
		t.Fatal(err)
	}
	return v.(*Message)
}

// newMirrored is a wechat_message with a mirror at each address.
func newMirrored(t *testing.T, addresses ...string) (*Message, *App) {
	t.Helper()
	app, ctx := newTestApp(t, testConfig(""))
	var mirrors []json.RawMessage
	for _, address := range addresses {
		mirrors = append(mirrors, proxyTo(address))
	}
	return loadMirrored(t, ctx, mirrors...), app
}

// mirrorTo gives a wechat_message a mirror that is a function.
func mirrorTo(m *Message, places int, f func(http.ResponseWriter, *http.Request) error) {
	m.mirrors = append(m.mirrors, &mirror{
		handler: caddyhttp.HandlerFunc(f), number: len(m.mirrors) + 1, places: make(chan struct{}, places),
	})
}

// copyOf is what a mirror got.
type copyOf struct {
	body, query, path, method string
	header                    http.Header
	length                    int64
}

// recorder is a backend that keeps what it gets and answers something that must not reach WeChat.
type recorder struct {
	*httptest.Server
	mu  sync.Mutex
	got []copyOf
}

func newRecorder(t *testing.T) *recorder {
	t.Helper()
	rec := new(recorder)
	rec.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		rec.mu.Lock()
		rec.got = append(rec.got, copyOf{string(body), r.URL.RawQuery, r.URL.Path, r.Method, r.Header, r.ContentLength})
		rec.mu.Unlock()
		w.Header().Set("X-Mirror", "1")
		_, _ = io.WriteString(w, "<xml><Content>from a mirror</Content></xml>")
	}))
	t.Cleanup(rec.Close)
	return rec
}

func (rec *recorder) address() string { return rec.Listener.Addr().String() }

func (rec *recorder) copies() []copyOf {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	return append([]copyOf(nil), rec.got...)
}

// TestMirrorsGetWhatTheBackendGets: each mirror gets its own copy, and it is the backend's request.
func TestMirrorsGetWhatTheBackendGets(t *testing.T) {
	t.Parallel()
	one, two := newRecorder(t), newRecorder(t)
	m, app := newMirrored(t, one.address(), two.address())
	s := platformSender(t)
	message := textMessage("你好 & <b>\x7f welcome\r\n")
	r := s.push("/wx/message/"+authorizerID, message)
	for _, name := range trustedHeaders {
		r.Header.Set(name, "forged")
	}
	r.Header.Set("Accept-Encoding", "br")
	r.URL.RawQuery = strings.Replace(r.URL.RawQuery, "openid="+openID, "openid=oVICTIM", 1)
	b := &answering{text: replyXML}
	rec := serve(t, m, r, b)
	app.shared.work.Wait()
	if reply, err := s.codec.OpenReply(rec.Body.Bytes()); err != nil || string(reply) != replyXML || rec.Header().Get("X-Mirror") != "" {
		t.Errorf("reply %q with %v: %v", rec.Body, rec.Header(), err)
	}
	for _, mirror := range []*recorder{one, two} {
		copies := mirror.copies()
		if len(copies) != 1 {
			t.Fatalf("%d copies", len(copies))
		}
		c := copies[0]
		if c.body != message || c.body != b.body || c.length != int64(len(message)) {
			t.Errorf("body %q of length %d", c.body, c.length)
		}
		if c.query != b.got.URL.RawQuery || strings.Contains(c.query, "msg_signature") || !strings.Contains(c.query, "openid="+openID) {
			t.Errorf("query %s", c.query)
		}
		if c.path != "/wx/message/"+authorizerID || c.method != http.MethodPost {
			t.Errorf("%s %s", c.method, c.path)
		}
		for _, name := range append(trustedHeaders[:], "Content-Type") {
			if got, want := c.header.Get(name), b.got.Header.Get(name); got != want {
				t.Errorf("%s: %q, the backend got %q", name, got, want)
			}
		}
		if c.header.Get("X-Wechat-Appid") != authorizerID || c.header.Get("Accept-Encoding") == "br" {
			t.Errorf("headers %v", c.header)
		}
	}
	if got := counted(t, app.metrics().mirrors, mirrorOK); got != 2 {
		t.Errorf("ok counted %v times", got)
	}
}

// TestMirrorsAreLate: copies that are sent after their pushes were answered, when the pushes' buffers are other pushes',
// are right all the same.
func TestMirrorsAreLate(t *testing.T) {
	t.Parallel()
	m, app := newMirrored(t)
	const pushes = 60
	release := make(chan struct{})
	var mu sync.Mutex
	got := make(map[string]int)
	for range 2 {
		mirrorTo(m, pushes, func(_ http.ResponseWriter, r *http.Request) error {
			<-release
			body, err := io.ReadAll(r.Body)
			repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
			content := MessageMatcher{Content: []string{"text *"}}
			if compiled := content.compile(); compiled != nil || err != nil {
				t.Errorf("%v %v", compiled, err)
			}
			if ok, _ := content.MatchWithError(r); !ok {
				t.Error("the content cannot be matched")
			}
			r.Header.Set("Content-Type", "changed by one mirror")
			caddyhttp.SetVar(r.Context(), "anything", 1)
			mu.Lock()
			defer mu.Unlock()
			got[string(body)+repl.ReplaceAll(" {wechat.appid} {wechat.openid} {http.request.uri.path}", "")]++
			return nil
		})
	}
	messages := make([]string, pushes)
	for i := range messages {
		messages[i] = textMessage(fmt.Sprintf("text %d", i))
	}
	var all sync.WaitGroup
	for _, message := range messages {
		all.Go(func() {
			rec := serve(t, m, platformSender(t).push("/"+authorizerID, message), &answering{text: "success"})
			if rec.Body.String() != "success" {
				t.Errorf("%d %q", rec.Code, rec.Body)
			}
		})
	}
	all.Wait()
	close(release)
	app.shared.work.Wait()
	for i := range pushes {
		want := messages[i] + " " + authorizerID + " " + openID + " /" + authorizerID
		if got[want] != 2 {
			t.Errorf("push %d was copied %d times", i, got[want])
		}
	}
	if len(got) != pushes {
		t.Errorf("%d different copies of %d pushes", len(got), pushes)
	}
}

// TestMirrorsChangeNothing: whatever a mirror does, WeChat gets the backend's reply.
func TestMirrorsChangeNothing(t *testing.T) {
	t.Parallel()
	stop := make(chan struct{})
	hangs := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-stop }))
	defer hangs.Close()
	refuses := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }))
	defer refuses.Close()
	breaksOff := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "1000")
		_, _ = io.WriteString(w, "<xml>half")
		panic(http.ErrAbortHandler)
	}))
	defer breaksOff.Close()
	login := httptest.NewServer(http.RedirectHandler("/login", http.StatusFound))
	defer login.Close()
	address := func(s *httptest.Server) string { return s.Listener.Addr().String() }
	m, app := newMirrored(t, address(hangs), address(refuses), address(breaksOff), address(login), deadAddress(t))
	mirrorTo(m, 1, func(http.ResponseWriter, *http.Request) error { panic("secret content") })
	mirrorTo(m, 1, func(http.ResponseWriter, *http.Request) error { return errors.New("an error") })
	logs := watchLog(app)
	s := platformSender(t)
	rec := serve(t, m, s.push("/"+authorizerID, textMessage("secret content")), &answering{text: replyXML})
	if reply, err := s.codec.OpenReply(rec.Body.Bytes()); err != nil || string(reply) != replyXML {
		t.Errorf("reply %q: %v", rec.Body, err)
	}
	if got := counted(t, app.metrics().replies, outcomeSealed); got != 1 {
		t.Errorf("sealed counted %v times", got)
	}
	close(stop) // only now the first mirror answers
	app.shared.work.Wait()
	if ok, failed := counted(t, app.metrics().mirrors, mirrorOK), counted(t, app.metrics().mirrors, mirrorError); ok != 1 || failed != 6 {
		t.Errorf("ok %v times, error %v times", ok, failed)
	}
	warned := logs.FilterLevelExact(zapcore.WarnLevel).All()
	if len(warned) != 6 {
		t.Errorf("%d warnings", len(warned))
	}
	for _, e := range logs.All() {
		if text := fmt.Sprint(e.Message, e.ContextMap()); e.Level > zapcore.WarnLevel || strings.Contains(text, "secret content") || strings.Contains(text, openID) {
			t.Errorf("logged: %s", text)
		}
	}
}

// TestMirrorsAreBounded: a mirror that hangs loses copies of its own, not of others, and fills no log.
func TestMirrorsAreBounded(t *testing.T) {
	t.Parallel()
	m, app := newMirrored(t)
	logs := watchLog(app)
	release := make(chan struct{})
	mirrorTo(m, 2, func(http.ResponseWriter, *http.Request) error { <-release; return nil })
	arrived := make(chan struct{}, 10)
	mirrorTo(m, 10, func(http.ResponseWriter, *http.Request) error { arrived <- struct{}{}; return nil })
	for i := range 10 {
		rec := serve(t, m, platformSender(t).push("/"+authorizerID, textMessage(fmt.Sprint(i))), &answering{text: "success"})
		if rec.Body.String() != "success" {
			t.Errorf("%d %q", rec.Code, rec.Body)
		}
	}
	for range 10 {
		<-arrived
	}
	if got := counted(t, app.metrics().mirrors, mirrorFull); got != 8 {
		t.Errorf("full counted %v times", got)
	}
	if n := logs.FilterLevelExact(zapcore.WarnLevel).Len(); n != 1 {
		t.Errorf("%d warnings, want one: %v", n, logs.All())
	}
	close(release)
	app.shared.work.Wait()
	if got := counted(t, app.metrics().mirrors, mirrorOK); got != 12 {
		t.Errorf("ok counted %v times", got)
	}
	serve(t, m, platformSender(t).push("/"+authorizerID, textMessage("again")), &answering{text: "success"})
	app.shared.work.Wait()
	if got := counted(t, app.metrics().mirrors, mirrorOK); got != 14 {
		t.Errorf("places were not given back: ok counted %v times", got)
	}
	real, _ := newMirrored(t, "127.0.0.1:1")
	if got := cap(real.mirrors[0].places); got != maxMirrorCopies {
		t.Errorf("%d copies may be under way", got)
	}
	_, ctx := newTestApp(t, testConfig(""))
	if got := cap(loadMessage(t, ctx, map[string]any{"mirrors": []json.RawMessage{proxyTo("127.0.0.1:1")}, "mirror_max_in_flight": 7}).mirrors[0].places); got != 7 {
		t.Errorf("%d copies may be under way, where 7 are configured", got)
	}
}

// TestMirrorsKnowTheConnection: what a handler may ask about the connection that a push came on, it may ask of a copy too.
func TestMirrorsKnowTheConnection(t *testing.T) {
	t.Parallel()
	m, app := newMirrored(t)
	got := make(chan string, 1)
	mirrorTo(m, 1, func(_ http.ResponseWriter, r *http.Request) error {
		repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
		got <- repl.ReplaceAll("{http.request.local} {http.request.local.port} {http.request.remote.host}", "")
		return nil
	})
	r := platformSender(t).push("/"+authorizerID, textMessage("x"))
	local := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 8443}
	serve(t, m, r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, local)), &answering{text: "success"})
	app.shared.work.Wait()
	close(got)
	if text := <-got; text != "127.0.0.1:8443 8443 192.0.2.1" {
		t.Errorf("%q", text)
	}
}

// TestMirrorsFailQuietly: a mirror that is gone costs a log line now and then.
func TestMirrorsFailQuietly(t *testing.T) {
	t.Parallel()
	m, app := newMirrored(t)
	logs := watchLog(app)
	mirrorTo(m, 1, func(http.ResponseWriter, *http.Request) error { return errors.New("gone") })
	for range 20 {
		serve(t, m, platformSender(t).push("/"+authorizerID, textMessage("x")), &answering{text: "success"})
		app.shared.work.Wait()
	}
	if n := logs.FilterLevelExact(zapcore.WarnLevel).Len(); n != 1 || counted(t, app.metrics().mirrors, mirrorError) != 20 {
		t.Errorf("%d warnings", n)
	}
}

// TestMirrorsHaveADeadline: a copy is given up, also when the push that it is of was hung up long ago.
func TestMirrorsHaveADeadline(t *testing.T) {
	t.Parallel()
	for name, limit := range map[string]time.Duration{"": mirrorTimeout, "4s": 4 * time.Second} {
		options := map[string]any{}
		if name != "" {
			options["mirror_timeout"], options["mirrors"] = name, []json.RawMessage{proxyTo("127.0.0.1:1")}
		}
		app, ctx := newTestApp(t, testConfig(""))
		m := loadMessage(t, ctx, options)
		m.mirrors = nil // the test's own is in its place
		testMirrorDeadline(t, m, app, limit)
	}
}

func testMirrorDeadline(t *testing.T, m *Message, app *App, limit time.Duration) {
	t.Helper()
	mirrorTo(m, 1, func(_ http.ResponseWriter, r *http.Request) error {
		deadline, ok := r.Context().Deadline()
		if left := time.Until(deadline); !ok || left > limit || left < limit/2 {
			t.Errorf("deadline in %v, of %v", left, limit)
		}
		return r.Context().Err()
	})
	ctx, hangUp := context.WithCancel(t.Context())
	hangUp()
	func() {
		defer func() {
			if v := recover(); v != http.ErrAbortHandler {
				t.Errorf("ended with %v", v)
			}
		}()
		serve(t, m, platformSender(t).push("/"+authorizerID, textMessage("x")).WithContext(ctx), &answering{text: "success"})
	}()
	app.shared.work.Wait()
	if got := counted(t, app.metrics().mirrors, mirrorOK); got != 1 {
		t.Errorf("ok counted %v times", got)
	}
}

// messageTo is a message to an account, as XML.
func messageTo(toUser, msgType, rest string) string {
	return "<xml><ToUserName>" + toUser + "</ToUserName><FromUserName>" + openID + "</FromUserName><CreateTime>1</CreateTime><MsgType>" +
		msgType + "</MsgType>" + rest + "</xml>"
}

// TestNotMirrored: what must stay between WeChat and whoever answers, and what never gets to a backend.
func TestNotMirrored(t *testing.T) {
	t.Parallel()
	for _, releaseCheck := range []bool{true, false} {
		m, app := newMirrored(t)
		mirrorTo(m, 10, func(_ http.ResponseWriter, r *http.Request) error {
			body, _ := io.ReadAll(r.Body)
			t.Errorf("mirrored: %s", body)
			return nil
		})
		for _, p := range app.Platforms {
			p.ReleaseCheck = &releaseCheck
		}
		s := platformSender(t)
		b := &answering{text: "success"}
		for _, message := range []string{
			textMessage("QUERY_AUTH_CODE:queryauthcode@@@1"),
			textMessage("QUERY_AUTH_CODE:"),
			textMessage(" \n QUERY_AUTH_CODE:queryauthcode@@@1"),
			messageTo(ghID, "text", "<Content>QUERY&#95;AUTH_CODE:queryauthcode@@@1</Content>"),
			messageTo("gh_3c884a361561", "text", "<Content>TESTCOMPONENT_MSG_TYPE_TEXT</Content>"),
			messageTo("gh_3c884a361561", "text", "<Content>anything</Content>"),
			messageTo("gh_3c884a361561", "event", "<Event>LOCATION</Event>"),
			eventXML("something_new", ""),
		} {
			if rec := serve(t, m, s.push("/"+authorizerID, message), b); rec.Code != http.StatusOK {
				t.Errorf("%d %q", rec.Code, rec.Body)
			}
		}
		s.format = crypto.FormatJSON
		serve(t, m, s.push("/"+authorizerID, `{"ToUserName":"`+ghID+`","FromUserName":"o","MsgType":"text","Content":"QUERY_AUTH_CODE:c"}`), b)
		forged := newSender(t, platformID, "another-token", platformKey)
		if rec := serve(t, m, forged.push("/"+authorizerID, textMessage("x")), nil); rec.Code != http.StatusForbidden {
			t.Errorf("forged: %d", rec.Code)
		}
		app.shared.work.Wait()
	}
	// A plain account may be called anything in a message of its own.
	m, app := newMirrored(t)
	got := make(chan struct{}, 1)
	mirrorTo(m, 1, func(http.ResponseWriter, *http.Request) error { got <- struct{}{}; return nil })
	serve(t, m, accountSender(t).push("/"+accountID, messageTo("gh_3c884a361561", "text", "<Content>x</Content>")), &answering{})
	app.shared.work.Wait()
	if len(got) != 1 {
		t.Error("a message of a plain account was not mirrored")
	}
}

// TestMirrorsOutliveTheirConfiguration: copies under way when a configuration goes still arrive.
func TestMirrorsOutliveTheirConfiguration(t *testing.T) {
	t.Parallel()
	entered, release := make(chan struct{}, 2), make(chan struct{})
	var arrived sync.WaitGroup
	arrived.Add(2)
	slow := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		entered <- struct{}{}
		<-release
		if body, err := io.ReadAll(r.Body); err != nil || !strings.Contains(string(body), "<Content><![CDATA[x]]></Content>") {
			t.Errorf("copy %q: %v", body, err)
		}
		arrived.Done()
	}))
	defer slow.Close()
	root := filepath.Join(t.TempDir(), "storage")
	load := func() (*App, *Message, context.CancelFunc) {
		app, ctx, err := provisionAt(root, testConfig(""))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := caddy.NewContext(ctx)
		return app, loadMirrored(t, ctx, proxyTo(slow.Listener.Addr().String())), cancel
	}
	send := func(m *Message) {
		if rec := serve(t, m, platformSender(t).push("/"+authorizerID, textMessage("x")), &answering{text: "success"}); rec.Body.String() != "success" {
			t.Errorf("%d %q", rec.Code, rec.Body)
		}
		<-entered
	}
	first, m, unload := load()
	send(m)
	second, next, unloadNext := load()
	unload() // cleans up the handlers of the first configuration
	if err := first.Cleanup(); err != nil {
		t.Fatal(err)
	}
	send(next)
	unloadNext()
	metrics := second.metrics()
	ended := make(chan error)
	go func() { ended <- second.Cleanup() }() // the process ends: it waits for the copies
	close(release)
	arrived.Wait()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if ok := counted(t, metrics.mirrors, mirrorOK); ok != 2 {
		t.Errorf("ok counted %v times", ok)
	}
}

// TestMirrorsFromJSON: any handler, with all its options; a mistake is said to be of the mirrors.
func TestMirrorsFromJSON(t *testing.T) {
	t.Parallel()
	app, ctx := newTestApp(t, testConfig(""))
	one, two := newRecorder(t), newRecorder(t)
	m := loadMirrored(t, ctx,
		json.RawMessage(`{"handler": "reverse_proxy", "upstreams": [{"dial": "`+one.address()+`"}],
			"headers": {"request": {"set": {"X-Environment": ["staging {wechat.msg_type}"]}}}, "rewrite": {"uri": "/staging{http.request.uri.path}"}}`),
		json.RawMessage(`{"handler": "subroute", "routes": [
			{"match": [{"wechat_message": {"content": ["hello*"]}}], "handle": [`+string(proxyTo(two.address()))+`]}]}`))
	for _, content := range []string{"hello you", "other"} {
		serve(t, m, platformSender(t).push("/"+authorizerID, textMessage(content)), &answering{text: "success"})
	}
	app.shared.work.Wait()
	if c := one.copies(); len(c) != 2 || c[0].header.Get("X-Environment") != "staging text" || c[0].path != "/staging/"+authorizerID {
		t.Errorf("with options: %+v", c)
	}
	if c := two.copies(); len(c) != 1 || !strings.Contains(c[0].body, "[hello you]") {
		t.Errorf("with a matcher: %+v", c)
	}
	for config, want := range map[string]string{
		`{"mirrors": [{"handler": "no_such_handler"}]}`:                                         "mirrors: ",
		`{"mirrors": [{"upstreams": []}]}`:                                                      "mirrors: ",
		`{"mirrors": [{"handler": "reverse_proxy", "upstream": []}]}`:                           "unknown field",
		`{"mirrors": [{"handler": "reverse_proxy", "transport": {"protocol": "no_such_one"}}]}`: "no_such_one",
	} {
		provisioning.Lock()
		_, err := ctx.LoadModuleByID("http.handlers.wechat_message", json.RawMessage(config))
		provisioning.Unlock()
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", config, err)
		}
	}
}
