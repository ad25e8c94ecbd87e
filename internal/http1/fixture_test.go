package http1

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what has to happen, and soon is long enough for what must not.
const (
	patience = time.Minute // two heads of 10 MiB take seven seconds with the race detector, and longer beside other tests
	soon     = 100 * time.Millisecond
)

// lean is a Client as an http.RoundTripper.
type lean struct{ *Client }

func (l lean) RoundTrip(req *http.Request) (*http.Response, error) {
	return l.Client.RoundTrip(req, Target{Network: "tcp", Address: req.URL.Host})
}

func newLean(t testing.TB, options ...func(*Client)) lean {
	t.Helper()
	c := &Client{Dial: new(net.Dialer).DialContext, IdleTimeout: time.Minute, MaxIdlePerHost: 32}
	for _, o := range options {
		o(c)
	}
	t.Cleanup(c.Close)
	return lean{c}
}

// eachClient runs a test with net/http's transport and with ours: what holds for one has to hold for the other.
func eachClient(t *testing.T, test func(t *testing.T, rt http.RoundTripper)) {
	t.Helper()
	t.Run("stock", func(t *testing.T) {
		stock := &http.Transport{DisableCompression: true}
		defer stock.CloseIdleConnections()
		test(t, stock)
	})
	t.Run("lean", func(t *testing.T) { test(t, newLean(t)) })
}

// wire is a backend's end of a connection.
type wire struct {
	net.Conn
	*bufio.Reader
	nth int // connection, from 0
}

func (w *wire) Read(p []byte) (int, error) { return w.Reader.Read(p) }

func (w *wire) say(text string) { _, _ = io.WriteString(w.Conn, text) }

// request reads a request and its body.
func (w *wire) request() (*http.Request, string, error) {
	req, err := http.ReadRequest(w.Reader)
	if err != nil {
		return nil, "", err
	}
	body, err := io.ReadAll(req.Body)
	return req, string(body), err
}

// backend is a server that a test writes by hand.
type backend struct {
	net.Listener
	conns atomic.Int64
	wg    sync.WaitGroup
	mu    sync.Mutex
	open  []net.Conn
}

// newBackend serves each connection with serve, and closes it then.
func newBackend(t testing.TB, serve func(*wire)) *backend {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return serveOn(t, l, serve)
}

// newFickleBackend answers every request, and has closed its first connection, after an answer, when hangUp returns.
func newFickleBackend(t testing.TB) (b *backend, hangUp func()) {
	t.Helper()
	end, gone := make(chan struct{}), make(chan struct{})
	b = newBackend(t, func(w *wire) {
		for {
			if _, _, err := w.request(); err != nil {
				return
			}
			w.say(okAnswer)
			if w.nth == 0 {
				<-end
				_ = w.Close()
				close(gone)
				return
			}
		}
	})
	return b, func() { close(end); <-gone }
}

func serveOn(t testing.TB, l net.Listener, serve func(*wire)) *backend {
	t.Helper()
	b := &backend{Listener: l}
	b.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			nth := int(b.conns.Add(1)) - 1
			b.mu.Lock()
			b.open = append(b.open, c)
			b.mu.Unlock()
			b.wg.Go(func() {
				defer c.Close()
				serve(&wire{c, bufio.NewReader(c), nth})
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		b.mu.Lock()
		for _, c := range b.open {
			_ = c.Close()
		}
		b.mu.Unlock()
		b.wg.Wait()
	})
	return b
}

func (b *backend) url() string { return "http://" + b.Addr().String() + "/" }

// untilClosed waits for the client to close the connection.
func (w *wire) untilClosed() { _, _ = io.Copy(io.Discard, w.Reader) }

const okAnswer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

// newRequest is a request as reverse_proxy makes it: from an HTTP/1.1 client.
func newRequest(t *testing.T, method, url string, body io.Reader) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, body)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("User-Agent", "test")
	return req
}

// told is a body that says how often it was closed, and hides what kind of reader it is.
type told struct {
	io.Reader
	closed atomic.Int64
}

func (b *told) Close() error {
	b.closed.Add(1)
	return nil
}

// outcome is all of an answer that its reader can see.
func outcome(res *http.Response, err error) string {
	if err != nil {
		return "error"
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	var b strings.Builder
	fmt.Fprintf(&b, "%s %q %d length %d %v", res.Proto, res.Status, res.StatusCode, res.ContentLength, res.TransferEncoding)
	fmt.Fprintf(&b, " header %s body %q trailer %s", show(res.Header), body, show(res.Trailer))
	if err != nil {
		b.WriteString(" broken off")
	}
	return b.String()
}

func show(h http.Header) string {
	var b bytes.Buffer
	for _, k := range slices.Sorted(maps.Keys(h)) {
		fmt.Fprintf(&b, "[%q %q]", k, h[k])
	}
	return b.String()
}

// roundTrip sends req and returns what came of it.
func roundTrip(rt http.RoundTripper, req *http.Request) string {
	return outcome(rt.RoundTrip(req))
}

// within fails the test if f takes too long.
func within(t *testing.T, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("%s: still waiting after %s", what, patience)
	}
}

// hasClosed waits until the client has closed a connection that was handed over.
func hasClosed(t *testing.T, closed <-chan struct{}) {
	t.Helper()
	select {
	case <-closed:
	case <-time.After(patience):
		t.Fatal("the connection was not closed")
	}
}

// idle is how many connections the client has idle.
func (c *Client) idleCount() int {
	c.pool.mu.Lock()
	defer c.pool.mu.Unlock()
	n := 0
	for _, h := range c.pool.hosts {
		n += len(h.idle)
	}
	if n != c.pool.idle {
		panic("the pool has miscounted")
	}
	return n
}

// hostCount is how many targets the client remembers.
func (c *Client) hostCount() int {
	c.pool.mu.Lock()
	defer c.pool.mu.Unlock()
	return len(c.pool.hosts)
}

// eventually waits for something that another goroutine brings about.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%s: not within %s", what, patience)
		}
	}
}
