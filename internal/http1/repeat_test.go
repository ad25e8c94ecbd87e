package http1

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// TestRepeatedAmongStale: a second time counts when a backend may have seen the first, and is the last one; connections that were closed while
// idle do not count, wherever they come.
func TestRepeatedAmongStale(t *testing.T) {
	t.Parallel()
	const stale, dies = "closed while idle", "dies with the request"
	for _, c := range []struct {
		idle  []string // in the order in which they are tried
		seen  int64
		again bool
	}{
		{idle: []string{stale, dies}, seen: 2, again: true},
		{idle: []string{dies, stale}, seen: 2, again: true},
		{idle: []string{dies, stale, dies}, seen: 2},
		{idle: []string{stale, stale, stale}, seen: 1, again: true},
	} {
		t.Run(strings.Join(c.idle, ", "), func(t *testing.T) {
			t.Parallel()
			kinds := slices.Clone(c.idle)
			slices.Reverse(kinds) // the last one to become idle is the first to be tried
			var seen atomic.Int64
			here, answer := make(chan struct{}), make([]chan struct{}, len(kinds))
			for i := range answer {
				answer[i] = make(chan struct{})
			}
			b := newBackend(t, func(w *wire) {
				if w.nth >= len(kinds) {
					if _, _, err := w.request(); err == nil {
						seen.Add(1)
						w.say(okAnswer)
					}
					return
				}
				if _, _, err := w.request(); err != nil {
					return
				}
				here <- struct{}{}
				<-answer[w.nth]
				w.say(okAnswer)
				if _, _, err := w.request(); err == nil {
					seen.Add(1) // and hangs up
				}
			})
			rt := newLean(t)
			got := make(chan string)
			for range kinds {
				req := newRequest(t, "GET", b.url(), nil)
				go func() { got <- roundTrip(rt, req) }()
				<-here
			}
			for i := range kinds {
				close(answer[i])
				if text := <-got; !strings.Contains(text, `"ok"`) {
					t.Fatal(text)
				}
			}
			b.mu.Lock()
			for i, kind := range kinds {
				if kind == stale {
					_ = b.open[i].(*net.TCPConn).CloseWrite()
				}
			}
			b.mu.Unlock()
			if text := roundTrip(rt, newRequest(t, "GET", b.url(), nil)); (text != "error") != c.again || seen.Load() != c.seen {
				t.Errorf("%s, seen %d times, want %d", text, seen.Load(), c.seen)
			}
		})
	}
}

// TestNoDialErrorAfterTheBody: when there is no connection for a second try and the body is used up, the error is none after which a caller
// may send the request elsewhere.
func TestNoDialErrorAfterTheBody(t *testing.T) {
	t.Parallel()
	refused := errors.New("refused")
	var down atomic.Bool
	b, hangUp := newFickleBackend(t)
	c := newLean(t, func(c *Client) {
		dial := c.Dial
		c.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			if down.Load() {
				return nil, refused
			}
			return dial(ctx, network, address)
		}
	})
	warm(t, c, b.url())
	text := strings.NewReader("text")
	req := newRequest(t, "POST", b.url(), bodyFunc(func(p []byte) (int, error) {
		if !down.Swap(true) {
			hangUp()
			time.Sleep(2 * lookAgain)
		}
		return text.Read(p)
	}))
	req.ContentLength = int64(text.Len())
	if _, err := c.RoundTrip(req); err == nil || errors.Is(err, refused) || !strings.Contains(err.Error(), "refused") {
		t.Errorf("err %v", err)
	}
}

// TestEndedBefore: of a request whose caller has left before it is sent a backend hears nothing, and an idle connection stays.
func TestEndedBefore(t *testing.T) {
	t.Parallel()
	left := errors.New("the caller has left")
	b := newBackend(t, serveSecond(func(w *wire) {
		if _, err := w.ReadByte(); err == nil {
			t.Error("something was sent")
		}
	}))
	c := newLean(t)
	warm(t, c, b.url())
	for kind, cancellable := range cancellable {
		ctx, cancel := cancellable(t.Context())
		cancel(left)
		body := &told{Reader: strings.NewReader("text")}
		req := newRequest(t, "POST", b.url(), body).WithContext(ctx)
		req.ContentLength = 4
		if _, err := c.RoundTrip(req); err != left { //nolint:errorlint // as it is
			t.Errorf("%s: err %v", kind, err)
		}
		if n := body.closed.Load(); n != 1 || c.idleCount() != 1 {
			t.Errorf("%s: the body was closed %d times, %d connections are idle", kind, n, c.idleCount())
		}
	}
}

// TestLastRequest: a connection ends with a request that says so, whatever the backend thinks of it.
func TestLastRequest(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*http.Request){
		"field":  func(r *http.Request) { r.Close = true },
		"header": func(r *http.Request) { r.Header.Set("Connection", "Close") },
		"field of a body": func(r *http.Request) {
			r.Close, r.Body, r.ContentLength = true, io.NopCloser(strings.NewReader("text")), -1
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			closed := make(chan struct{})
			b := newBackend(t, func(w *wire) {
				defer close(closed)
				if _, _, err := w.request(); err == nil {
					w.say(okAnswer)
				}
				w.untilClosed()
			})
			c := newLean(t)
			req := newRequest(t, "POST", b.url(), nil)
			change(req)
			if got := roundTrip(c, req); !strings.Contains(got, `"ok"`) || c.idleCount() != 0 {
				t.Errorf("%s, %d connections are idle", got, c.idleCount())
			}
			hasClosed(t, closed)
		})
	}
}

// TestAnswerBeforeTheBody: on a new connection a backend may answer while a small body is still waited for, as one that is overloaded does.
func TestAnswerBeforeTheBody(t *testing.T) {
	t.Parallel()
	said := make(chan struct{})
	b := newBackend(t, func(w *wire) {
		w.say("HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 4\r\n\r\nbusy")
		close(said)
		w.untilClosed()
	})
	text := strings.NewReader("text")
	req := newRequest(t, "POST", b.url(), bodyFunc(func(p []byte) (int, error) {
		if text.Len() > 0 {
			<-said
			time.Sleep(2 * lookAgain)
		}
		return text.Read(p)
	}))
	req.ContentLength = int64(text.Len())
	if got := roundTrip(newLean(t), req); !strings.Contains(got, "503") || !strings.Contains(got, `"busy"`) {
		t.Error(got)
	}
}

// brittleConn is a connection that breaks after some bytes, once it is told to. There are no rounds for it.
type brittleConn struct {
	*net.TCPConn
	left *atomic.Int64
}

func (c brittleConn) Write(p []byte) (int, error) {
	n := int(min(c.left.Load(), int64(len(p))))
	if n == len(p) {
		return c.TCPConn.Write(p)
	}
	_, _ = c.TCPConn.Write(p[:n])
	return n, errBroken
}

var errBroken = errors.New("broken")

// TestBrokenWhileWriting: a POST of which a connection took a byte is not sent again, and one of which it took none is.
func TestBrokenWhileWriting(t *testing.T) {
	t.Parallel()
	for taken, again := range map[int64]bool{0: true, 1: false, 40: false} {
		for method, body := range map[string]io.Reader{"POST": strings.NewReader("text"), "PUT": nil, "GET": nil} {
			var left, dials atomic.Int64
			left.Store(1 << 30)
			b := newBackend(t, func(w *wire) {
				for {
					if _, _, err := w.request(); err != nil {
						return
					}
					w.say(okAnswer)
				}
			})
			c := newLean(t, func(c *Client) {
				dial := c.Dial
				c.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
					nc, err := dial(ctx, network, address)
					if err != nil {
						return nil, err
					}
					if dials.Add(1) > 1 {
						return nc, nil
					}
					return brittleConn{nc.(*net.TCPConn), &left}, nil
				}
			})
			warm(t, c, b.url())
			left.Store(taken)
			_, err := c.RoundTrip(newRequest(t, method, b.url(), body))
			want := int64(1)
			if again {
				want = 2
			}
			if again != (err == nil) || !again && !errors.Is(err, errBroken) || dials.Load() != want {
				t.Errorf("%s, %d bytes taken: err %v, %d connections", method, taken, err, dials.Load())
			}
		}
	}
}
