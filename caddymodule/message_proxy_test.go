package caddymodule

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"
)

// behindProxy is a chain of wechat_message, the given handler perhaps, and Caddy's reverse_proxy to a backend.
type behindProxy struct {
	*Message
	proxy caddyhttp.MiddlewareHandler
}

func newBehindProxy(t *testing.T, backend string) *behindProxy {
	return newBehindProxyOver(t, backend, map[string]any{"protocol": "http", "compression": false})
}

func newBehindProxyOver(t *testing.T, backend string, transport map[string]any) *behindProxy {
	t.Helper()
	return newBehindProxyOf(t, object{"upstreams": to(backend), "transport": transport})
}

func newBehindProxyOf(t *testing.T, proxy object) *behindProxy {
	t.Helper()
	_, ctx := newTestApp(t, testConfig(""))
	m := new(Message)
	if err := m.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	config, _ := json.Marshal(proxy)
	ctx, cancel := caddy.NewContext(ctx)
	t.Cleanup(cancel) // or Caddy would know of failures at addresses that are other servers' by then
	provisioning.Lock()
	defer provisioning.Unlock()
	handler, err := ctx.LoadModuleByID("http.handlers.reverse_proxy", config)
	if err != nil {
		t.Fatal(err)
	}
	return &behindProxy{m, handler.(caddyhttp.MiddlewareHandler)}
}

// ServeHTTP implements caddyhttp.Handler: it is what stands behind wechat_message.
func (b *behindProxy) pass(w http.ResponseWriter, r *http.Request) error {
	return b.proxy.ServeHTTP(w, r, caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { return nil }))
}

// TestMessageThroughReverseProxy: what a backend gets through Caddy's own proxy, whatever the caller's headers try.
func TestMessageThroughReverseProxy(t *testing.T) {
	t.Parallel()
	var got http.Header
	var body, query string
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		got, body, query = r.Header, string(b), r.URL.RawQuery
		_, _ = io.WriteString(w, replyXML)
	}))
	defer backend.Close()
	b := newBehindProxy(t, backend.Listener.Addr().String())
	s, message := platformSender(t), textMessage("x")
	r := s.push("/"+authorizerID, message)
	r.Header.Set("Connection", "X-Wechat-Appid, Content-Type, X-Wechat-Openid")
	r.Header.Set("Te", "trailers")
	r.Header.Set("Accept-Encoding", "gzip")
	r.Header.Set("X-Wechat-Openid", "forged")
	r.URL.RawQuery = strings.Replace(r.URL.RawQuery, "openid="+openID, "openid=oVICTIM", 1)
	rec := serve(t, b, r, caddyhttp.HandlerFunc(b.pass))
	if reply, err := s.codec.OpenReply(rec.Body.Bytes()); err != nil || string(reply) != replyXML {
		t.Fatalf("%d %q: %v", rec.Code, rec.Body, err)
	}
	if got.Get("X-Wechat-Appid") != authorizerID || got.Get("X-Wechat-Openid") != openID || got.Get("Content-Type") != xmlType {
		t.Errorf("headers %v", got)
	}
	if got.Get("Accept-Encoding") != "" || got.Get("Content-Length") == "" {
		t.Errorf("headers %v", got)
	}
	if body != message || !strings.Contains(query, "openid="+openID) || strings.Contains(query, "VICTIM") {
		t.Errorf("body %q, query %s", body, query)
	}
}

// TestMessagePlaceholdersOfCaddy: below wechat_message Caddy's own placeholders speak of the plaintext request, and
// above it of what came in.
func TestMessagePlaceholdersOfCaddy(t *testing.T) {
	t.Parallel()
	m, _ := newMessage(t, nil)
	message := textMessage("x")
	r := platformSender(t).push("/"+authorizerID, message)
	r.Header.Set("X-Wechat-Openid", "forged")
	rec := httptest.NewRecorder()
	repl := caddy.NewReplacer()
	r = caddyhttp.PrepareRequest(r, repl, rec, &caddyhttp.Server{})
	const template = "{http.request.uri.query} {http.request.header.X-Wechat-Openid} {http.request.header.Content-Type}"
	before := repl.ReplaceAll(template, "")
	err := m.ServeHTTP(rec, r, caddyhttp.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) error {
		inside := repl.ReplaceAll(template, "")
		if strings.Contains(inside, "msg_signature") || strings.Contains(inside, "forged") || !strings.Contains(inside, openID+" "+xmlType) {
			t.Errorf("inside: %s", inside)
		}
		if body := repl.ReplaceAll("{http.request.body}", ""); body != message {
			t.Errorf("body %q", body)
		}
		if body, err := io.ReadAll(r.Body); string(body) != message {
			t.Errorf("a matcher has read the body, and the backend gets %q, %v", body, err)
		}
		return nil
	}))
	if err != nil {
		t.Fatal(err)
	}
	if after := repl.ReplaceAll(template, ""); after != before {
		t.Errorf("after: %s", after)
	}
	if got := repl.ReplaceAll("{wechat.openid} {http.vars.wechat_push}", ""); got != openID+" a push" {
		t.Errorf("for the log: %s", got)
	}
}

// TestHeaderRulesChangeOnlyTheirRequest: Caddy's header rules change values in place, so no value may be shared.
func TestHeaderRulesChangeOnlyTheirRequest(t *testing.T) {
	t.Parallel()
	m, _ := newMessage(t, nil)
	rules := &headers.Handler{Request: &headers.HeaderOps{Replace: map[string][]headers.Replacement{
		"Content-Type": {{Search: "utf-8", Replace: "gbk"}},
		"X-Tag":        {{Search: "a", Replace: "b"}},
	}}}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			r := platformSender(t).push("/"+authorizerID, textMessage("x"))
			r.Header.Set("X-Tag", "a")
			serve(t, m, r, caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
				return rules.ServeHTTP(w, r, caddyhttp.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) error {
					if got := r.Header.Get("Content-Type"); got != "text/xml; charset=gbk" {
						t.Errorf("in the chain: %s", got)
					}
					return nil
				}))
			}))
			if got := r.Header.Get("X-Tag"); got != "a" {
				t.Errorf("outside: %s", got)
			}
		})
	}
	wg.Wait()
	b := &answering{}
	serve(t, m, platformSender(t).push("/"+authorizerID, textMessage("x")), b)
	if got := b.got.Header.Get("Content-Type"); got != xmlType {
		t.Errorf("another push: %s", got)
	}
}

// TestPushIsNotSentTwice: the backend reads a push on a kept connection and closes it. Whatever the caller's headers
// say, the push is not sent again: it may have been acted upon.
func TestPushIsNotSentTwice(t *testing.T) {
	t.Parallel()
	eachTransport(t, testPushIsNotSentTwice)
}

func testPushIsNotSentTwice(t *testing.T, transport object) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	var requests atomic.Int64
	go func() { // ends with the listener
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = conn.Close() }()
				reader := bufio.NewReader(conn)
				for answered := false; ; answered = true {
					r, err := http.ReadRequest(reader)
					if err != nil {
						return
					}
					_, _ = io.Copy(io.Discard, r.Body)
					requests.Add(1)
					if answered {
						return // the second push on a connection is read, and the connection closed
					}
					_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nsuccess")
				}
			}()
		}
	}()
	b := newBehindProxyOver(t, l.Addr().String(), transport)
	for range 2 {
		r := platformSender(t).push("/"+authorizerID, textMessage("x"))
		r.Header.Set("Idempotency-Key", "1")
		r.Header.Set("X-Idempotency-Key", "1")
		if rec := serve(t, b, r, caddyhttp.HandlerFunc(b.pass)); rec.Body.String() != "success" {
			t.Errorf("%d %q", rec.Code, rec.Body)
		}
	}
	if n := requests.Load(); n != 2 {
		t.Errorf("the backend got %d requests for 2 pushes", n)
	}
}

// TestPushThatArrivedIsNotSentAgain: a backend has the message, and the one that the route would give it to then cannot be dialled.
func TestPushThatArrivedIsNotSentAgain(t *testing.T) {
	t.Parallel()
	eachTransport(t, func(t *testing.T, transport object) {
		var arrived atomic.Int64
		backend := func() string { // one for each case: Caddy knows by its address that it failed
			b := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if b, _ := io.ReadAll(r.Body); len(b) == 0 {
					return
				}
				arrived.Add(1)
				if r.Header.Get("X-Hang-Up") != "" {
					panic(http.ErrAbortHandler)
				}
				w.WriteHeader(http.StatusServiceUnavailable)
			}))
			t.Cleanup(b.Close)
			return b.Listener.Addr().String()
		}
		fallback := object{"handler": "reverse_proxy", "upstreams": to(deadAddress(t)), "transport": transport}
		on503 := []any{object{"match": object{"status_code": []int{503}}, "routes": []any{object{"handle": []any{fallback}}}}}
		balanced := func(expression string) object {
			return object{
				"selection_policy": object{"policy": "first"}, "retries": 1, "retry_match": []any{object{"expression": expression}},
			}
		}
		down := object{"passive": object{"fail_duration": "1m", "max_fails": 1, "unhealthy_status": []int{503}}} // so that the second one is chosen
		configs := map[string]object{
			"answered":           {"upstreams": to(backend()), "handle_response": on503},
			"answered, buffered": {"upstreams": to(backend()), "handle_response": on503, "request_buffers": 1 << 20},
			"retry_match": {
				"upstreams": to(backend(), deadAddress(t)), "request_buffers": 1 << 20, "load_balancing": balanced("{http.reverse_proxy.status_code} == 503"),
				"health_checks": down,
			},
		}
		if transport["protocol"] == "wechat_lean" { // of Caddy's own nobody can tell; docs/pushes.md says so
			configs["retry_match of a broken connection"] = object{
				"upstreams": to(backend(), deadAddress(t)), "request_buffers": 1 << 20, "load_balancing": balanced("{http.reverse_proxy.is_transport_error} == true"),
				"health_checks": down, "headers": object{"request": object{"set": object{"X-Hang-Up": []string{"1"}}}},
			}
		}
		for name, config := range configs {
			config["transport"] = transport
			b := newBehindProxyOf(t, config)
			logs := watchLog(b.app)
			arrived.Store(0)
			chains := 0
			rec := serve(t, b, platformSender(t).push("/"+authorizerID, textMessage("x")), caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
				if chains++; chains > 2 {
					return errors.New("enough")
				}
				return b.pass(w, r)
			}))
			if rec.Body.String() != "success" || arrived.Load() != 1 || chains != 1 {
				t.Errorf("%s: %q, the backend got it %d times, in %d runs", name, rec.Body, arrived.Load(), chains)
			}
			if logs.FilterMessageSnippet("cannot be used").Len() != 1 {
				t.Errorf("%s: the log says %v", name, logs.All())
			}
		}
	})
}

// TestUnreachedBackendIsTriedAgain: also one that the message was read for before it was dialled, and after a proxy outside of
// wechat_message had an answer.
func TestUnreachedBackendIsTriedAgain(t *testing.T) {
	t.Parallel()
	eachTransport(t, func(t *testing.T, transport object) {
		address, free := heldAddress(t)
		var arrived atomic.Int64
		backend := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if b, _ := io.ReadAll(r.Body); len(b) > 0 {
				arrived.Add(1)
			}
			_, _ = io.WriteString(w, replyXML)
		})}
		defer func() { _ = backend.Close() }()
		b := newBehindProxyOf(t, object{"upstreams": to(address), "transport": transport, "request_buffers": 1 << 20})
		chains := 0
		s := platformSender(t)
		rec, repl := httptest.NewRecorder(), caddy.NewReplacer()
		repl.Set(roundTripPlaceholder, time.Second)
		r := caddyhttp.PrepareRequest(s.push("/"+authorizerID, textMessage("x")), repl, rec, &caddyhttp.Server{})
		err := b.ServeHTTP(rec, r, caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
			if chains++; chains == 2 {
				free()
				l, err := net.Listen("tcp", address)
				if err != nil {
					return err
				}
				go func() { _ = backend.Serve(l) }() // ends with the test
			}
			return b.pass(w, r)
		}))
		if err != nil || chains != 2 || arrived.Load() != 1 {
			t.Errorf("%v, %d runs, the backend got it %d times", err, chains, arrived.Load())
		}
		if reply, err := s.codec.OpenReply(rec.Body.Bytes()); err != nil || string(reply) != replyXML {
			t.Errorf("%q, %v", rec.Body, err)
		}
	})
}

// TestUnreachedBackendBehindAQuestion: what answered before the message was read, such as forward_auth, had no message.
func TestUnreachedBackendBehindAQuestion(t *testing.T) {
	t.Parallel()
	eachTransport(t, func(t *testing.T, transport object) {
		asked := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
		defer asked.Close()
		leave := newBehindProxyOf(t, object{
			"upstreams": to(strings.TrimPrefix(asked.URL, "http://")), "transport": transport, "rewrite": object{"method": "GET", "uri": "/leave"},
			"handle_response": []object{{"match": object{"status_code": []int{2}}, "routes": []object{{"handle": []object{}}}}},
		})
		var arrived atomic.Int64
		address, free := heldAddress(t)
		backend := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			arrived.Add(1)
			_, _ = io.WriteString(w, replyXML)
		})}
		defer func() { _ = backend.Close() }()
		b := newBehindProxyOf(t, object{"upstreams": to(address), "transport": transport, "request_buffers": 1 << 20})
		chains := 0
		s := platformSender(t)
		rec := serve(t, b, s.push("/"+authorizerID, textMessage("x")), caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
			if chains++; chains == 2 {
				free()
				l, err := net.Listen("tcp", address)
				if err != nil {
					return err
				}
				go func() { _ = backend.Serve(l) }() // ends with the test
			}
			return leave.proxy.ServeHTTP(w, r, caddyhttp.HandlerFunc(b.pass))
		}))
		if chains != 2 || arrived.Load() != 1 {
			t.Errorf("%d runs, the backend got it %d times", chains, arrived.Load())
		}
		if reply, err := s.codec.OpenReply(rec.Body.Bytes()); err != nil || string(reply) != replyXML {
			t.Errorf("%q, %v", rec.Body, err)
		}
	})
}

// TestAnnouncedBodiesCostLittle: a length is a claim, not a reason to allocate.
func TestAnnouncedBodiesCostLittle(t *testing.T) {
	m, _ := newMessage(t, nil)
	const clients = 200
	release := make(chan struct{})
	var started, ended sync.WaitGroup
	started.Add(clients)
	for range clients {
		ended.Go(func() {
			r := platformSender(t).push("/"+authorizerID, textMessage("x"))
			r.ContentLength = defaultMaxBody
			r.Body = io.NopCloser(&stuckReader{started: &started, release: release})
			rec := httptest.NewRecorder()
			_ = m.ServeHTTP(rec, caddyhttp.PrepareRequest(r, caddy.NewReplacer(), rec, &caddyhttp.Server{}), nil)
			if rec.Code != http.StatusBadRequest {
				t.Errorf("status %d", rec.Code)
			}
		})
	}
	var before, during runtime.MemStats
	runtime.ReadMemStats(&before)
	started.Wait()
	runtime.GC()
	runtime.ReadMemStats(&during)
	close(release)
	ended.Wait()
	if used := during.HeapAlloc; used > before.HeapAlloc+clients*(maxAnnounced*4) {
		t.Errorf("%d connections hold %d KiB", clients, (used-before.HeapAlloc)>>10)
	}
}

// stuckReader is a sender that announced a body and sends nothing.
type stuckReader struct {
	started *sync.WaitGroup
	release chan struct{}
	once    sync.Once
}

func (s *stuckReader) Read([]byte) (int, error) {
	s.once.Do(s.started.Done)
	<-s.release
	return 0, errors.New("connection reset")
}

// TestMessageOuterLimit: a limit of an outer request_body is told as such.
func TestMessageOuterLimit(t *testing.T) {
	t.Parallel()
	m, _ := newMessage(t, nil)
	r := platformSender(t).push("/"+authorizerID, textMessage("x"))
	r.Body = http.MaxBytesReader(nil, r.Body, 10)
	if rec := serve(t, m, r, nil); rec.Code != http.StatusRequestEntityTooLarge {
		t.Errorf("status %d", rec.Code)
	}
}

// TestMessageEndsTheBackendsWork: a backend that takes longer than backend_timeout has its connection closed.
func TestMessageEndsTheBackendsWork(t *testing.T) {
	t.Parallel()
	for _, protocol := range []string{"http", "wechat_lean"} {
		t.Run(protocol, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			_ = l.(*net.TCPListener).SetDeadline(time.Now().Add(10 * time.Second))
			closed := make(chan error, 1)
			go func() {
				c, err := l.Accept()
				if err != nil {
					closed <- err
					return
				}
				defer c.Close()
				_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
				if _, err = io.Copy(io.Discard, c); !errors.Is(err, os.ErrDeadlineExceeded) {
					err = nil
				}
				closed <- err
			}()
			b := newBehindProxyOver(t, l.Addr().String(), object{"protocol": protocol})
			b.Message.BackendTimeout = caddy.Duration(300 * time.Millisecond)
			w := httptest.NewRecorder()
			r := caddyhttp.PrepareRequest(platformSender(t).push("/"+authorizerID, textMessage("x")), caddy.NewReplacer(), w, &caddyhttp.Server{})
			_ = b.ServeHTTP(w, r, caddyhttp.HandlerFunc(b.pass))
			if err := <-closed; err != nil {
				t.Errorf("the backend was not asked, or is still busy: %v", err)
			}
		})
	}
}
