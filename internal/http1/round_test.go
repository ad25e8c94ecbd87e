package http1

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// The exchanges of most tests are the first of their connections. Here are second ones, which begin with a look at the connection.

// warm has an exchange leave an idle connection.
func warm(t *testing.T, rt http.RoundTripper, url string) {
	t.Helper()
	if got := roundTrip(rt, newRequest(t, "GET", url, nil)); !strings.Contains(got, `"ok"`) {
		t.Fatal(got)
	}
}

// serveSecond answers the first request of each connection, and leaves the second to another.
func serveSecond(second func(w *wire)) func(*wire) {
	return func(w *wire) {
		if _, _, err := w.request(); err != nil {
			return
		}
		w.say(okAnswer)
		second(w)
	}
}

// TestSecondAnswers: an answer is read as it would be on a new connection.
func TestSecondAnswers(t *testing.T) {
	t.Parallel()
	for _, a := range answers {
		t.Run(a.name, func(t *testing.T) {
			t.Parallel()
			text, eof := strings.CutSuffix(a.answer, "EOF")
			say := func(w *wire) {
				if _, _, err := w.request(); err != nil {
					return
				}
				w.say(text)
				if !eof {
					w.untilClosed()
				}
			}
			method := a.method
			if method == "" {
				method = http.MethodPost // which is not repeated
			}
			first, second := newBackend(t, say), newBackend(t, serveSecond(say))
			c := newLean(t)
			within(t, a.name, func() {
				want := roundTrip(c, newRequest(t, method, first.url(), nil))
				warm(t, c, second.url())
				if got := roundTrip(c, newRequest(t, method, second.url(), nil)); got != want || a.refused && got != "error" {
					t.Errorf("got  %.600s\nwant %.600s", got, want)
				}
			})
			if n := second.conns.Load(); n != 1 {
				t.Errorf("%d connections", n)
			}
		})
	}
}

// TestSecondCancel: a caller that leaves an exchange on a connection that was idle gets its answer at once.
func TestSecondCancel(t *testing.T) {
	t.Parallel()
	left := errors.New("the caller has left")
	for name, said := range map[string]string{"waiting for the head": "", "in the middle of the head": "HTTP/1.1 200 OK\r\nX: "} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			eachClient(t, func(t *testing.T, rt http.RoundTripper) {
				reached, closed := make(chan struct{}), make(chan struct{})
				b := newBackend(t, serveSecond(func(w *wire) {
					defer close(closed)
					_, _, _ = w.request()
					w.say(said)
					close(reached)
					w.untilClosed()
				}))
				warm(t, rt, b.url())
				ctx, cancel := context.WithCancelCause(t.Context())
				go func() { <-reached; cancel(left) }()
				within(t, name, func() {
					if _, err := rt.RoundTrip(newRequest(t, "POST", b.url(), strings.NewReader("text")).WithContext(ctx)); !errors.Is(err, left) {
						t.Errorf("err %v", err)
					}
				})
				hasClosed(t, closed)
				if n := b.conns.Load(); n != 1 {
					t.Errorf("%d connections", n)
				}
			})
		})
	}
}

// TestSecondHeaderTimeout: HeaderTimeout holds there too, and does not count the time that the request's body takes.
func TestSecondHeaderTimeout(t *testing.T) {
	t.Parallel()
	closed := make(chan struct{})
	b := newBackend(t, serveSecond(func(w *wire) {
		_, _, _ = w.request()
		w.say(okAnswer)
		_, _, _ = w.request()
		w.untilClosed()
		close(closed)
	}))
	const begun = 2 * time.Second // for an answer that is to begin in time, on a busy machine too
	c := newLean(t, func(c *Client) { c.HeaderTimeout = begun })
	warm(t, c, b.url())
	pr, pw := io.Pipe()
	slow := newRequest(t, "POST", b.url(), pr)
	slow.ContentLength = 4
	go func() {
		<-time.After(begun + soon)
		_, _ = io.WriteString(pw, "text")
		_ = pw.Close()
	}()
	if got := roundTrip(c, slow); !strings.Contains(got, `"ok"`) {
		t.Error(got)
	}
	within(t, "timeout", func() {
		if _, err := c.RoundTrip(newRequest(t, "GET", b.url(), nil)); err != ErrHeaderTimeout {
			t.Errorf("err %v", err)
		}
	})
	hasClosed(t, closed)
	if n := b.conns.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
}

// TestSecondBody: a body that fails, or is not as long as it should be, is not sent, and what it failed with is what comes back.
func TestSecondBody(t *testing.T) {
	t.Parallel()
	broken := errors.New("the client has left")
	for name, body := range map[string]io.Reader{
		"fails": io.MultiReader(strings.NewReader("x"), errorReader{broken}), "short": strings.NewReader("x"), "long": strings.NewReader("0123456789"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			heard := make(chan bool, 1)
			b := newBackend(t, serveSecond(func(w *wire) {
				_, err := w.ReadByte()
				heard <- err == nil
			}))
			c := newLean(t)
			warm(t, c, b.url())
			told := &told{Reader: body}
			req := newRequest(t, "POST", b.url(), told)
			req.ContentLength = 5
			within(t, name, func() {
				_, err := c.RoundTrip(req)
				if err == nil || name == "fails" && err != broken { //nolint:errorlint // as it is
					t.Errorf("err %v", err)
				}
			})
			if <-heard || told.closed.Load() != 1 || b.conns.Load() != 1 {
				t.Errorf("something was sent, or the body was closed %d times, or there were %d connections", told.closed.Load(), b.conns.Load())
			}
			if c.idleCount() != 0 || c.hostCount() != 0 {
				t.Error("something is left")
			}
		})
	}
}

// TestSecondReset: a connection that is reset while an answer is waited for gives the error that reading it gives.
func TestSecondReset(t *testing.T) {
	t.Parallel()
	eachClient(t, func(t *testing.T, rt http.RoundTripper) {
		b := newBackend(t, serveSecond(func(w *wire) {
			_, _, _ = w.request()
			_ = w.Conn.(*net.TCPConn).SetLinger(0)
		}))
		warm(t, rt, b.url())
		within(t, "reset", func() {
			_, err := rt.RoundTrip(newRequest(t, "POST", b.url(), strings.NewReader("text")))
			op, ok := errors.AsType[*net.OpError](err)
			if !ok || op.Op != "read" || op.Net != "tcp" || op.Addr.String() != b.Addr().String() || !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("err %v", err)
			}
		})
		if n := b.conns.Load(); n != 1 {
			t.Errorf("%d connections", n)
		}
	})
}

// TestSecondInPieces: an answer may come byte by byte, over TCP and over a Unix socket.
func TestSecondInPieces(t *testing.T) {
	t.Parallel()
	serve := serveSecond(func(w *wire) {
		for {
			if _, _, err := w.request(); err != nil {
				return
			}
			for i := range okAnswer {
				w.say(okAnswer[i : i+1])
			}
		}
	})
	socket := filepath.Join(t.TempDir(), "s")
	for _, network := range []string{"tcp", "unix"} {
		var dials atomic.Int64
		b := newBackend(t, serve)
		if network == "unix" {
			l, err := net.Listen("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			b = serveOn(t, l, serve)
		}
		c := newLean(t, func(c *Client) {
			c.Dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
				dials.Add(1)
				return new(net.Dialer).DialContext(ctx, network, b.Addr().String())
			}
		})
		for range 5 {
			warm(t, c, "http://backend/")
		}
		if n := dials.Load(); n != 1 {
			t.Errorf("%s: %d connections", network, n)
		}
	}
}

// TestStaleBeforeTheBody: connections that were closed while idle are found before a request's body is touched, however many there are, so
// that what is returned is the error of dialing, after which a caller may try elsewhere.
func TestStaleBeforeTheBody(t *testing.T) {
	t.Parallel()
	const idle = 3
	var gone atomic.Int64
	here, hangUp := make(chan struct{}), make(chan struct{})
	b := newBackend(t, func(w *wire) {
		if _, _, err := w.request(); err != nil {
			return
		}
		here <- struct{}{}
		<-hangUp
		w.say(okAnswer)
		_, _, _ = w.request()
		_ = w.Close()
		gone.Add(1)
	})
	refused := errors.New("refused")
	var down atomic.Bool
	c := newLean(t, func(c *Client) {
		c.MaxPerHost = idle
		dial := c.Dial
		c.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			if down.Load() {
				return nil, refused
			}
			return dial(ctx, network, address)
		}
	})
	done := make(chan string)
	for range idle {
		go func() { done <- roundTrip(c, newRequest(t, "GET", b.url(), nil)) }()
		<-here
	}
	close(hangUp)
	for range idle {
		if got := <-done; !strings.Contains(got, `"ok"`) {
			t.Fatal(got)
		}
	}
	if n := c.idleCount(); n != idle {
		t.Fatalf("%d idle", n)
	}
	b.mu.Lock()
	for _, conn := range b.open {
		_ = conn.(*net.TCPConn).CloseWrite()
	}
	b.mu.Unlock()
	down.Store(true)
	body := &told{Reader: strings.NewReader("text")}
	req := newRequest(t, "POST", b.url(), body)
	req.ContentLength = 4
	within(t, "error", func() {
		if _, err := c.RoundTrip(req); err != refused { //nolint:errorlint // as it is
			t.Errorf("err %v", err)
		}
	})
	if left := body.Reader.(*strings.Reader).Len(); left != 4 || body.closed.Load() != 1 {
		t.Errorf("%d bytes left, closed %d times", left, body.closed.Load())
	}
	if c.idleCount() != 0 || c.hostCount() != 0 {
		t.Error("something is left")
	}
	eventually(t, "all connections are closed", func() bool { return gone.Load() == idle })
}

// countingConn is a connection that does more than read where it reads, as one that sets deadlines.
type countingConn struct {
	*net.TCPConn
	reads *atomic.Int64
}

func (c countingConn) Read(p []byte) (int, error) {
	c.reads.Add(1)
	return c.TCPConn.Read(p)
}

// TestOtherConnections: a connection of another type is read by its own Read.
func TestOtherConnections(t *testing.T) {
	t.Parallel()
	b := newBackend(t, func(w *wire) {
		for {
			if _, _, err := w.request(); err != nil {
				return
			}
			w.say(okAnswer)
		}
	})
	var reads atomic.Int64
	c := newLean(t, func(c *Client) {
		dial := c.Dial
		c.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			nc, err := dial(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return countingConn{nc.(*net.TCPConn), &reads}, nil
		}
	})
	for range 3 {
		before := reads.Load()
		if warm(t, c, b.url()); reads.Load() == before {
			t.Error("its Read was not called")
		}
	}
	if n := b.conns.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
}
