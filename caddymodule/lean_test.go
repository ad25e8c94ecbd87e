package caddymodule

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// object is JSON.
type object = map[string]any

// leanPatience is how long these tests wait for what has to happen.
const leanPatience = 10 * time.Second

// eachTransport runs a test with Caddy's transport and with the lean one: behind reverse_proxy they are to be the same.
func eachTransport(t *testing.T, test func(t *testing.T, transport object)) {
	t.Helper()
	t.Run("http", func(t *testing.T) {
		t.Parallel()
		test(t, object{"protocol": "http", "compression": false, "versions": []string{"1.1"}})
	})
	t.Run("wechat_lean", func(t *testing.T) { t.Parallel(); test(t, object{"protocol": "wechat_lean"}) })
}

// proxyFront is a server with Caddy's reverse_proxy as its only handler.
type proxyFront struct {
	*httptest.Server
	failed atomic.Value // the handler's last error
	begun  chan struct{}
	proxy  *reverseproxy.Handler
}

// newProxyFront provisions reverse_proxy from its JSON. The transport's own options are added to those of config["transport"].
func newProxyFront(t *testing.T, transport, config object) *proxyFront {
	t.Helper()
	_, ctx := newTestApp(t, testConfig(""))
	return newProxyFrontIn(t, ctx, transport, config)
}

// newProxyFrontIn is newProxyFront within a configuration.
func newProxyFrontIn(t *testing.T, ctx caddy.Context, transport, config object) *proxyFront {
	t.Helper()
	merged := object{}
	for _, m := range []object{transport, asObject(config["transport"])} {
		for k, v := range m {
			merged[k] = v
		}
	}
	config["transport"] = merged
	raw, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := caddy.NewContext(ctx)
	t.Cleanup(cancel) // which ends health checks, and cleans up
	provisioning.Lock()
	module, err := ctx.LoadModuleByID("http.handlers.reverse_proxy", raw)
	provisioning.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	proxy := module.(*reverseproxy.Handler)
	f := &proxyFront{begun: make(chan struct{}, 1), proxy: proxy}
	f.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength > 0 {
			r.Body = &wholeBody{r.Body, r.ContentLength}
		}
		r = caddyhttp.PrepareRequest(r, caddy.NewReplacer(), w, &caddyhttp.Server{})
		caddyhttp.SetVar(r.Context(), caddyhttp.ClientIPVarKey, "127.0.0.1")
		caddyhttp.SetVar(r.Context(), caddyhttp.TrustedProxyVarKey, false)
		select {
		case f.begun <- struct{}{}:
		default:
		}
		err := proxy.ServeHTTP(w, r, caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { return nil }))
		if err != nil {
			f.failed.Store(err)
			status := http.StatusInternalServerError
			if he, ok := errors.AsType[caddyhttp.HandlerError](err); ok {
				status = he.StatusCode
			}
			w.WriteHeader(status)
		}
	}))
	t.Cleanup(f.Close)
	return f
}

// wholeBody ends with the last of its bytes. net/http's client asks for more than those, and its server may have closed the body by then, since
// the answer has begun: between the two of them an answer breaks off now and then whose backend had the whole request.
type wholeBody struct {
	io.ReadCloser
	left int64
}

func (b *wholeBody) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, io.EOF
	}
	n, err := b.ReadCloser.Read(p)
	b.left -= int64(n)
	return n, err
}

func asObject(v any) object {
	o, _ := v.(object)
	return o
}

func to(dials ...string) []any {
	upstreams := make([]any, len(dials))
	for i, d := range dials {
		upstreams[i] = object{"dial": d}
	}
	return upstreams
}

// deadAddress is one that nobody listens on.
func deadAddress(t *testing.T) string {
	t.Helper()
	address, _ := heldAddress(t)
	return address
}

// heldAddress is an address that nobody can listen on until it is freed, or the test ends: it is that of a connection's near end. One that
// only was free a moment ago may be somebody else's in the next.
func heldAddress(t *testing.T) (address string, free func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var near net.Conn
	for tries := 0; near == nil; tries++ {
		taken, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		_ = taken.Close()
		// A port that the system chooses for a connection it may choose for others, too.
		if near, err = (&net.Dialer{LocalAddr: taken.Addr()}).DialContext(t.Context(), "tcp", l.Addr().String()); err != nil && tries == 10 {
			t.Fatal(err)
		}
	}
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	free = func() {
		_ = near.(*net.TCPConn).SetLinger(0) // or it would keep its address for a while
		_ = near.Close()
		_ = far.Close()
	}
	t.Cleanup(free)
	return near.LocalAddr().String(), free
}

// ask sends a request to the front and returns status and body.
func (f *proxyFront) ask(t *testing.T, method, path, body string) (int, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), leanPatience)
	defer cancel()
	req, _ := http.NewRequestWithContext(ctx, method, f.URL+path, strings.NewReader(body))
	res, err := f.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	got, _ := io.ReadAll(res.Body)
	return res.StatusCode, string(got)
}

// TestLeanThroughProxy: a backend sees the same request, and a client the same answer, over both transports.
func TestLeanThroughProxy(t *testing.T) {
	t.Parallel()
	var seen [2]string
	for i, transport := range []object{{"protocol": "http", "compression": false}, {"protocol": "wechat_lean"}} {
		backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			r.Header.Del("X-Forwarded-Host") // the front's port
			w.Header()["X-Seen"] = []string{fmt.Sprint(r.Method, r.RequestURI, r.Proto, r.ContentLength, r.TransferEncoding, r.Header, r.Trailer)}
			w.Header().Add("Set-Cookie", "a=b")
			w.Header().Add("Set-Cookie", "c=d")
			w.Header().Set("Connection", "X-Hop")
			w.Header().Set("X-Hop", "1")
			w.Header().Set("Trailer", "X-Sum")
			w.WriteHeader(http.StatusTeapot)
			_, _ = w.Write(body)
			w.Header().Set("X-Sum", "42")
			w.Header().Set(http.TrailerPrefix+"X-More", "43")
		}))
		defer backend.Close()
		f := newProxyFront(t, transport, object{
			"upstreams": to(backend.Listener.Addr().String()),
			"headers": object{
				"request":  object{"set": object{"X-Up": []string{"{http.request.method}"}}, "delete": []string{"X-Gone"}},
				"response": object{"add": object{"X-Down": []string{"1"}}},
			},
		})
		for _, r := range []struct {
			method, body string
			length       int64
		}{{"GET", "", 0}, {"POST", "text", 4}, {"PUT", strings.Repeat("x", 100_000), 100_000}, {"POST", "chunked", -1}, {"HEAD", "", 0}, {"DELETE", "", 0}} {
			req, _ := http.NewRequestWithContext(t.Context(), r.method, f.URL+"/a%20b?x=1&y=%zz", io.MultiReader(strings.NewReader(r.body)))
			req.Host = "site.example"
			req.Header = http.Header{"User-Agent": {"ua"}, "X-Gone": {"1"}, "X-Two": {"1", "2"}, "Te": {"trailers"}, "Accept-Encoding": {"gzip"}, "Connection": {"X-Client-Hop"}, "X-Client-Hop": {"1"}}
			if req.ContentLength = r.length; r.length < 0 {
				req.Trailer = http.Header{"X-Client-Sum": {"7"}}
			} else if r.length == 0 {
				req.Body = nil
			}
			res, err := f.Client().Do(req)
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(res.Body)
			res.Body.Close()
			res.Header.Del("Date")
			seen[i] += fmt.Sprint(r.method, res.Status, res.ContentLength, res.Header, len(body), string(body[:min(10, len(body))]), res.Trailer, "\n")
		}
	}
	if seen[0] != seen[1] {
		t.Errorf("http        %s\nwechat_lean %s", seen[0], seen[1])
	}
	for _, want := range []string{"X-Client-Sum:[7]", "X-Sum:[42]", "X-More:[43]", "X-Up:[POST]", "418"} {
		if !strings.Contains(seen[1], want) {
			t.Errorf("%s is missing in %s", want, seen[1])
		}
	}
}

// TestLeanBalancing: retries, and what reverse_proxy takes for a failed dial, are the same.
func TestLeanBalancing(t *testing.T) {
	t.Parallel()
	eachTransport(t, func(t *testing.T, transport object) {
		var bodies atomic.Int64
		backend := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			if b, _ := io.ReadAll(r.Body); string(b) == "text" {
				bodies.Add(1)
			}
		}))
		defer backend.Close()
		f := newProxyFront(t, transport, object{
			"upstreams":      to(deadAddress(t), backend.Listener.Addr().String()),
			"load_balancing": object{"selection_policy": object{"policy": "round_robin"}, "retries": 1},
		})
		for range 6 { // a body that was not read survives the dead upstream
			if status, _ := f.ask(t, "POST", "/", "text"); status != 200 {
				t.Errorf("status %d", status)
			}
		}
		if bodies.Load() != 6 {
			t.Errorf("%d bodies arrived", bodies.Load())
		}
		dead := newProxyFront(t, transport, object{"upstreams": to(deadAddress(t))})
		if status, _ := dead.ask(t, "POST", "/", "text"); status != http.StatusBadGateway {
			t.Errorf("status %d", status)
		}
		if err, _ := dead.failed.Load().(error); !notReached(err) {
			t.Errorf("not taken for a failed dial: %v", err)
		}
	})
}

// TestLeanPostIsNotRepeated: reverse_proxy's retries do not repeat a POST that a backend has seen.
func TestLeanPostIsNotRepeated(t *testing.T) {
	t.Parallel()
	eachTransport(t, func(t *testing.T, transport object) {
		var posts, gets atomic.Int64
		hangUp := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			if r.Method == "POST" {
				posts.Add(1)
			} else {
				gets.Add(1)
			}
			panic(http.ErrAbortHandler)
		}))
		defer hangUp.Close()
		f := newProxyFront(t, transport, object{
			"upstreams":      to(hangUp.Listener.Addr().String()),
			"load_balancing": object{"retries": 2, "try_interval": "1ms", "retry_match": []any{object{"method": []string{"GET"}}}},
		})
		if status, _ := f.ask(t, "POST", "/", "text"); status != http.StatusBadGateway || posts.Load() != 1 {
			t.Errorf("status %d, seen %d times", status, posts.Load())
		}
		if err, _ := f.failed.Load().(error); notReached(err) {
			t.Errorf("taken for a failed dial: %v", err)
		}
		if status, _ := f.ask(t, "GET", "/", ""); status != http.StatusBadGateway || gets.Load() != 3 {
			t.Errorf("status %d, seen %d times", status, gets.Load())
		}
	})
}

// TestLeanRetryMatchesHeader: what reverse_proxy looks at once an answer is there, the request's header, is still there.
func TestLeanRetryMatchesHeader(t *testing.T) {
	t.Parallel()
	eachTransport(t, func(t *testing.T, transport object) {
		var asked atomic.Int64
		backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			if asked.Add(1)%2 == 1 {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
		}))
		defer backend.Close()
		f := newProxyFront(t, transport, object{
			"upstreams": to(backend.Listener.Addr().String()),
			"load_balancing": object{"retries": 1, "try_interval": "1ms", "retry_match": []any{
				object{"expression": "{http.reverse_proxy.status_code} == 503 && header({'User-Agent': 'Go-http-client/1.1'})"},
			}},
		})
		if status, _ := f.ask(t, "GET", "/", ""); status != http.StatusOK || asked.Load() != 2 {
			t.Errorf("status %d, seen %d times", status, asked.Load())
		}
	})
}

// TestLeanDebugLog: at level debug Caddy shows a request's header; at a higher one it need not have it any more.
func TestLeanDebugLog(t *testing.T) {
	backend := httptest.NewServer(http.NotFoundHandler())
	defer backend.Close()
	for level, want := range map[string]int{"DEBUG": 1, "INFO": 0} {
		logFile := filepath.Join(t.TempDir(), "caddy.log")
		config := new(caddy.Config)
		if err := json.Unmarshal(fmt.Appendf(nil, `{"logging":{"logs":{"default":{"level":%q,"writer":{"output":"file","filename":%q}}}},"admin":{"disabled":true}}`,
			level, logFile), config); err != nil {
			t.Fatal(err)
		}
		provisioning.Lock()
		ctx, err := caddy.ProvisionContext(config)
		provisioning.Unlock()
		if err != nil {
			t.Fatal(err)
		}
		f := newProxyFrontIn(t, ctx, object{"protocol": "wechat_lean"}, object{"upstreams": to(backend.Listener.Addr().String())})
		if status, _ := f.ask(t, "GET", "/", ""); status != http.StatusNotFound {
			t.Errorf("%s: status %d", level, status)
		}
		logged, err := os.ReadFile(logFile)
		if err != nil && want > 0 {
			t.Fatal(err)
		}
		if n := bytes.Count(logged, []byte(`"User-Agent":["Go-http-client/1.1"]`)); n != want {
			t.Errorf("%s: the header is shown %d times, want %d: %s", level, n, want, logged)
		}
		if spent := f.proxy.Transport.(*LeanTransport).spent; spent != (want == 0) {
			t.Errorf("%s: spent is %t", level, spent)
		}
	}
}

// twiceTransport sends each request twice over a wechat_lean of its own: it has a use for the header after the first answer.
type twiceTransport struct{ lean *LeanTransport }

func init() { caddy.RegisterModule(new(twiceTransport)) }

func (*twiceTransport) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.reverse_proxy.transport.test_twice", New: func() caddy.Module { return new(twiceTransport) }}
}

func (t *twiceTransport) Provision(ctx caddy.Context) error {
	lean, err := ctx.LoadModuleByID("http.reverse_proxy.transport.wechat_lean", nil)
	t.lean, _ = lean.(*LeanTransport)
	return err
}

func (t *twiceTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	res, err := t.lean.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	res.Body.Close()
	return t.lean.RoundTrip(req)
}

// TestLeanHeaderIsKept: whoever else sends requests over the transport keeps their header.
func TestLeanHeaderIsKept(t *testing.T) {
	t.Parallel()
	var asked atomic.Int64
	backend := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
	defer backend.Close()
	f := newProxyFront(t, object{"protocol": "test_twice"}, object{"upstreams": to(backend.Listener.Addr().String())})
	if status, _ := f.ask(t, "GET", "/", ""); status != http.StatusOK || asked.Load() != 2 {
		t.Errorf("status %d, seen %d times: %v", status, asked.Load(), f.failed.Load())
	}
	for _, config := range []object{{"verbose_logs": true}, {"load_balancing": object{"retry_match": []any{object{"method": []string{"GET"}}}}}} {
		config["upstreams"] = to(backend.Listener.Addr().String())
		if f := newProxyFront(t, object{"protocol": "wechat_lean"}, config); f.proxy.Transport.(*LeanTransport).spent {
			t.Errorf("%v: the header is dropped", config)
		}
	}
}

// TestLeanPassiveHealth: an upstream that fails is left alone for a while.
func TestLeanPassiveHealth(t *testing.T) {
	t.Parallel()
	eachTransport(t, func(t *testing.T, transport object) {
		bad := newRawBackend(t, "HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n")
		good := newRawBackend(t, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		f := newProxyFront(t, transport, object{
			"upstreams":      to(bad, good),
			"load_balancing": object{"selection_policy": object{"policy": "first"}},
			"health_checks":  object{"passive": object{"fail_duration": "10m", "max_fails": 1}},
		})
		if status, _ := f.ask(t, "POST", "/", "text"); status != http.StatusBadGateway {
			t.Errorf("status %d", status)
		}
		for range 3 {
			if status, body := f.ask(t, "POST", "/", "text"); status != 200 || body != "ok" {
				t.Errorf("%d %q", status, body)
			}
		}
	})
}

// TestLeanActiveHealth: Caddy's health checks go over the transport, and decide who is asked.
func TestLeanActiveHealth(t *testing.T) {
	t.Parallel()
	eachTransport(t, func(t *testing.T, transport object) {
		var sick atomic.Bool
		serve := func(name string, health func() int) string {
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/health" {
					w.WriteHeader(health())
				}
				_, _ = io.WriteString(w, name)
			}))
			t.Cleanup(s.Close)
			return s.Listener.Addr().String()
		}
		one := serve("one", func() int {
			if sick.Load() {
				return http.StatusInternalServerError
			}
			return http.StatusOK
		})
		two := serve("two", func() int { return http.StatusOK })
		f := newProxyFront(t, transport, object{
			"upstreams":      to(one, two),
			"load_balancing": object{"selection_policy": object{"policy": "first"}},
			"health_checks":  object{"active": object{"uri": "/health", "interval": "10ms", "timeout": "5s"}},
		})
		for _, want := range []string{"one", "two", "one"} {
			sick.Store(want == "two")
			deadline := time.Now().Add(leanPatience)
			for _, body := f.ask(t, "GET", "/", ""); body != want; _, body = f.ask(t, "GET", "/", "") {
				if time.Now().After(deadline) {
					t.Fatalf("still %q, not %q", body, want)
				}
			}
		}
	})
}

// TestLeanReload: a transport that is cleaned up while it serves finishes what it has begun, and leaves nothing open.
func TestLeanReload(t *testing.T) {
	t.Parallel()
	eachTransport(t, func(t *testing.T, transport object) {
		here, on := make(chan struct{}), make(chan struct{})
		backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			here <- struct{}{}
			<-on
			_, _ = io.WriteString(w, "done")
		}))
		f := newProxyFront(t, transport, object{"upstreams": to(backend.Listener.Addr().String())})
		answered := make(chan string, 1)
		go func() {
			_, body := f.ask(t, "POST", "/", "text")
			answered <- body
		}()
		<-here
		if err := f.proxy.Transport.(caddy.CleanerUpper).Cleanup(); err != nil {
			t.Error(err)
		}
		close(on)
		if body := <-answered; body != "done" {
			t.Errorf("got %q", body)
		}
		backend.Close() // waits until its connections are closed or idle
	})
}

// newRawBackend answers every request with the same bytes.
func newRawBackend(t *testing.T, answer string) string {
	t.Helper()
	return listenRaw(t, "tcp", "127.0.0.1:0", answer)
}

func listenRaw(t *testing.T, network, address, answer string) string {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() { // ends with the listener
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				reader := bufio.NewReader(conn)
				for {
					r, err := http.ReadRequest(reader)
					if err != nil {
						return
					}
					_, _ = io.Copy(io.Discard, r.Body)
					_, _ = io.WriteString(conn, answer)
				}
			}()
		}
	}()
	return l.Addr().String()
}

// TestLeanSmuggling: what could be read in two ways is a 502, and so are answers too large.
func TestLeanSmuggling(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]string{
		"two lengths":        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 0\r\n\r\n",
		"chunks in HTTP/1.0": "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"folded first":       "HTTP/1.1 200 OK\r\n X: 1\r\nContent-Length: 0\r\n\r\n",
		"NUL":                "HTTP/1.1 200 OK\r\nX: \x00\r\nContent-Length: 0\r\n\r\n",
		"large":              "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 5000) + "\r\nContent-Length: 0\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newProxyFront(t, object{"protocol": "wechat_lean", "max_response_header_size": 4096}, object{"upstreams": to(newRawBackend(t, answer))})
			if status, _ := f.ask(t, "GET", "/", ""); status != http.StatusBadGateway {
				t.Errorf("status %d", status)
			}
		})
	}
}

// TestLeanOdd: what Caddy's own transport takes of old backends is taken, and a client gets the same.
func TestLeanOdd(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]string{
		"LF alone":          "HTTP/1.1 200 OK\nX-Odd: 1\nContent-Length: 2\n\nok",
		"LF at the end":     "HTTP/1.1 200 OK\r\nX-Odd: 1\r\nContent-Length: 2\r\n\nok",
		"folded":            "HTTP/1.1 200 OK\r\nX-Odd: 1\r\n\t2\r\n  3\r\nContent-Length: 2\r\n\r\nok",
		"length and chunks": "HTTP/1.1 200 OK\r\nX-Odd: 1\r\nContent-Type: text/plain\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
		"LF in a 1xx":       "HTTP/1.1 103 Early Hints\nLink: </x>\n\nHTTP/1.1 200 OK\r\nX-Odd: 1\r\nContent-Length: 2\r\n\r\nok",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			backend := newRawBackend(t, answer)
			var seen [2]string
			for i, transport := range []object{{"protocol": "http", "compression": false}, {"protocol": "wechat_lean"}} {
				f := newProxyFront(t, transport, object{"upstreams": to(backend)})
				for range 2 {
					res, err := f.Client().Get(f.URL + "/")
					if err != nil {
						t.Fatal(err)
					}
					body, err := io.ReadAll(res.Body)
					res.Body.Close()
					res.Header.Del("Date")
					seen[i] += fmt.Sprintln(res.Status, res.Header, string(body), err)
				}
			}
			if seen[0] != seen[1] || strings.Count(seen[1], "200 OK") != 2 || strings.Count(seen[1], "ok <nil>") != 2 {
				t.Errorf("http        %s\nwechat_lean %s", seen[0], seen[1])
			}
		})
	}
}

// TestLeanUpstreams: Unix sockets, and upstreams that the request names.
func TestLeanUpstreams(t *testing.T) {
	t.Parallel()
	eachTransport(t, func(t *testing.T, transport object) {
		socket := listenRaw(t, "unix", filepath.Join(t.TempDir(), "s"), "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nunix")
		one := newRawBackend(t, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\none")
		two := newRawBackend(t, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\ntwo")
		unix := newProxyFront(t, transport, object{"upstreams": to("unix/" + socket)})
		named := newProxyFront(t, transport, object{"upstreams": to("{http.request.uri.query.up}")})
		for range 2 {
			if status, body := unix.ask(t, "POST", "/", "x"); status != 200 || body != "unix" {
				t.Errorf("%d %q", status, body)
			}
			for want, at := range map[string]string{"one": one, "two": two} {
				if status, body := named.ask(t, "POST", "/?up="+at, "x"); status != 200 || body != want {
					t.Errorf("%d %q, want %s", status, body, want)
				}
			}
		}
	})
}

// TestLeanTLS: TLS with Caddy's options for it; a certificate that is not good is a failed dial.
func TestLeanTLS(t *testing.T) {
	t.Parallel()
	eachTransport(t, func(t *testing.T, transport object) {
		backend := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body) // an answer before that would have the front's server take the rest of the body away
			_, _ = w.Write(body)
		}))
		defer backend.Close()
		at := backend.Listener.Addr().String()
		f := newProxyFront(t, transport, object{"upstreams": to(at), "transport": object{"tls": object{"insecure_skip_verify": true}}})
		large := strings.Repeat("text", 100_000)
		for range 3 {
			if status, body := f.ask(t, "POST", "/", large); status != 200 || body != large {
				t.Errorf("%d, %d bytes", status, len(body))
			}
			if status, body := f.ask(t, "POST", "/", "text"); status != 200 || body != "text" {
				t.Errorf("%d %q", status, body)
			}
		}
		strict := newProxyFront(t, transport, object{"upstreams": to(at), "transport": object{"tls": object{}}})
		if status, _ := strict.ask(t, "POST", "/", "text"); status != http.StatusBadGateway {
			t.Errorf("status %d", status)
		}
		if err, _ := strict.failed.Load().(error); transport["protocol"] == "wechat_lean" && !notReached(err) {
			t.Errorf("not taken for a failed dial: %v", err)
		}
	})
}

// TestLeanInformational: early hints reach the client.
func TestLeanInformational(t *testing.T) {
	t.Parallel()
	eachTransport(t, func(t *testing.T, transport object) {
		f := newProxyFront(t, transport, object{"upstreams": to(newRawBackend(t,
			"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"))})
		var hints []string
		ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
			hints = append(hints, fmt.Sprint(code, h.Get("Link")))
			return nil
		}})
		req, _ := http.NewRequestWithContext(ctx, "GET", f.URL, nil)
		res, err := f.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if len(hints) != 1 || hints[0] != "103</x>" || res.Header.Get("Link") != "" {
			t.Errorf("%v %v", hints, res.Header)
		}
	})
}

// TestLeanUpgrade: a WebSocket's handshake turns both connections into a tunnel.
func TestLeanUpgrade(t *testing.T) {
	t.Parallel()
	eachTransport(t, func(t *testing.T, transport object) {
		ended := make(chan struct{})
		backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			conn, brw, err := http.NewResponseController(w).Hijack()
			if err != nil {
				return
			}
			defer close(ended)
			defer conn.Close()
			_, _ = brw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + r.Header.Get("Upgrade") + "\r\n\r\nhello")
			_ = brw.Flush()
			_, _ = io.Copy(conn, brw)
		}))
		defer backend.Close()
		f := newProxyFront(t, transport, object{"upstreams": to(backend.Listener.Addr().String())})
		conn, err := net.Dial("tcp", f.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(leanPatience))
		_, _ = io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		reader := bufio.NewReader(conn)
		res, err := http.ReadResponse(reader, nil)
		if err != nil || res.StatusCode != 101 || res.Header.Get("Upgrade") != "websocket" {
			t.Fatalf("%v %v", res, err)
		}
		got := make([]byte, len("hellothere"))
		_, _ = io.WriteString(conn, "there")
		if _, err := io.ReadFull(reader, got); err != nil || string(got) != "hellothere" {
			t.Errorf("%q %v", got, err)
		}
		_ = conn.Close()
		select {
		case <-ended:
		case <-time.After(leanPatience):
			t.Error("the backend's end is still open")
		}
	})
}

// TestLeanStreaming: an answer of unknown length reaches the client piece by piece, and a client that leaves ends the backend's work.
func TestLeanStreaming(t *testing.T) {
	t.Parallel()
	eachTransport(t, func(t *testing.T, transport object) {
		next, left := make(chan struct{}), make(chan struct{})
		backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/event-stream")
			for range 3 {
				_, _ = io.WriteString(w, "data: x\n\n")
				_ = http.NewResponseController(w).Flush()
				<-next
			}
			<-r.Context().Done()
			close(left)
		}))
		defer backend.Close()
		f := newProxyFront(t, transport, object{"upstreams": to(backend.Listener.Addr().String())})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		req, _ := http.NewRequestWithContext(ctx, "GET", f.URL, nil)
		res, err := f.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		for range 3 {
			got := make([]byte, len("data: x\n\n"))
			if _, err := io.ReadFull(res.Body, got); err != nil {
				t.Fatal(err)
			}
			next <- struct{}{}
		}
		cancel()
		select {
		case <-left:
		case <-time.After(leanPatience):
			t.Error("the backend still works")
		}
	})
}

// TestLeanClientLeavesWhileSending: half a body, then nobody: the handler ends, and the backend is not left waiting.
func TestLeanClientLeavesWhileSending(t *testing.T) {
	t.Parallel()
	eachTransport(t, func(t *testing.T, transport object) {
		for _, length := range []int{100, 100_000} {
			ended := make(chan error, 1)
			backend := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				_, err := io.Copy(io.Discard, r.Body)
				ended <- err
			}))
			f := newProxyFront(t, transport, object{"upstreams": to(backend.Listener.Addr().String())})
			conn, err := net.Dial("tcp", f.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			_, _ = fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", length, bytes.Repeat([]byte("x"), length/2))
			<-f.begun
			_ = conn.Close()
			f.Close() // waits for the handler
			if length > 1000 {
				select {
				case err := <-ended:
					if err == nil {
						t.Error("half a body was taken for a whole")
					}
				case <-time.After(leanPatience):
					t.Error("the backend still waits")
				}
			}
			backend.Close()
		}
	})
}

// TestLeanRefused: JSON has no way around what the transport does not do.
func TestLeanRefused(t *testing.T) {
	t.Parallel()
	for option, value := range map[string]any{
		"versions": []string{"2"}, "compression": true, "proxy_protocol": "v2",
		"network_proxy": object{"from": "none"}, "forward_proxy_url": "http://proxy",
	} {
		raw, _ := json.Marshal(object{option: value})
		_, ctx := newTestApp(t, testConfig(""))
		if _, err := ctx.LoadModuleByID("http.reverse_proxy.transport.wechat_lean", raw); err == nil || !strings.Contains(err.Error(), option) {
			t.Errorf("%s: %v", option, err)
		}
	}
}
