package http1

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// bodyFunc is a request's body.
type bodyFunc func(p []byte) (int, error)

func (f bodyFunc) Read(p []byte) (int, error) { return f(p) }

// TestNothingIsSentAfterTheAnswer: who has the answer may use the memory of the request's body for another request.
func TestNothingIsSentAfterTheAnswer(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]string{
		"in one piece":   "HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno",
		"in chunks":      "HTTP/1.1 401 Unauthorized\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n",
		"without a body": "HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			over, all := make(chan struct{}), make(chan []byte, 1)
			b := newBackend(t, func(w *wire) {
				if _, err := http.ReadRequest(w.Reader); err != nil {
					return
				}
				w.say(answer)
				select {
				case <-over:
				case <-t.Context().Done():
				}
				got, _ := io.ReadAll(w)
				all <- got
			})
			memory := bytes.Repeat([]byte("a"), 32<<20) // more than the kernel takes
			req := newRequest(t, "POST", b.url(), bytes.NewReader(memory))
			within(t, "the answer", func() {
				if got := roundTrip(newLean(t), req); !strings.Contains(got, "401") {
					t.Error(got)
				}
			})
			copy(memory, bytes.Repeat([]byte("X"), len(memory)))
			close(over)
			if got := <-all; len(got) == 0 || bytes.ContainsRune(got, 'X') {
				t.Errorf("of %d bytes %d are another request's", len(got), bytes.Count(got, []byte("X")))
			}
		})
	}
}

// TestEarlyAnswerLeavesItsPlace: a client that stops in the middle of its request does not keep others from a backend that has answered.
func TestEarlyAnswerLeavesItsPlace(t *testing.T) {
	t.Parallel()
	b := newBackend(t, func(w *wire) {
		for {
			req, err := http.ReadRequest(w.Reader)
			if err != nil {
				return
			}
			w.say(okAnswer)
			if req.Method == "POST" {
				_, _ = io.Copy(io.Discard, w)
			}
		}
	})
	c := newLean(t, func(c *Client) { c.MaxPerHost = 1 })
	goOn := make(chan struct{})
	defer close(goOn)
	req := newRequest(t, "POST", b.url(), bodyFunc(func([]byte) (int, error) { <-goOn; return 0, io.EOF }))
	req.ContentLength = 1 << 20
	for _, req := range []*http.Request{req, newRequest(t, "GET", b.url(), nil)} {
		within(t, req.Method, func() {
			if got := roundTrip(c, req); !strings.Contains(got, `"ok"`) {
				t.Error(got)
			}
		})
	}
}

// slowConn is a connection for which there are no rounds.
type slowConn struct{ *net.TCPConn }

// TestClosedDuringTheBody: an idle connection is looked at again when the request's body has kept it waiting.
func TestClosedDuringTheBody(t *testing.T) {
	t.Parallel()
	dialers := map[string]func(context.Context, string, string) (net.Conn, error){
		"round": new(net.Dialer).DialContext,
		"no round": func(ctx context.Context, network, address string) (net.Conn, error) {
			nc, err := new(net.Dialer).DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return slowConn{nc.(*net.TCPConn)}, nil
		},
	}
	for name, dial := range dialers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, hangUp := newFickleBackend(t)
			c := newLean(t, func(c *Client) { c.Dial = dial })
			roundTrip(c, newRequest(t, "GET", b.url(), nil))
			text := strings.NewReader("text")
			req := newRequest(t, "POST", b.url(), bodyFunc(func(p []byte) (int, error) {
				if text.Len() > 0 {
					hangUp()
					time.Sleep(2 * lookAgain)
				}
				return text.Read(p)
			}))
			req.ContentLength = int64(text.Len())
			if got := roundTrip(c, req); !strings.Contains(got, `"ok"`) || b.conns.Load() != 2 {
				t.Errorf("%s, %d connections", got, b.conns.Load())
			}
		})
	}
}

// TestTrailerOfALateBody: a body that begins after the wait for it may end, and set its trailer, at any moment.
func TestTrailerOfALateBody(t *testing.T) {
	t.Parallel()
	b := newBackend(t, func(w *wire) {
		req, body, err := w.request()
		if err != nil || body != "late" || req.Trailer.Get("X-Sum") != "1" {
			t.Errorf("%q, trailer %v, %v", body, req.Trailer, err)
		}
		w.say(okAnswer)
	})
	req := newRequest(t, "DELETE", b.url(), nil)
	req.Trailer = http.Header{"X-Sum": nil}
	req.Body = io.NopCloser(bodyFunc(func(p []byte) (int, error) {
		time.Sleep(sniffWait)
		req.Trailer["X-Sum"] = []string{"1"}
		return copy(p, "late"), io.EOF
	}))
	if got := roundTrip(newLean(t), req); !strings.Contains(got, `"ok"`) {
		t.Error(got)
	}
}

// deadConn takes nothing.
type deadConn struct{ net.Conn }

func (deadConn) Write([]byte) (int, error) { return 0, errors.New("broken") }

// TestErrorLeavesTheBody: who gets an error may send the body to another backend, so nobody reads it any more.
func TestErrorLeavesTheBody(t *testing.T) {
	t.Parallel()
	b := newBackend(t, func(w *wire) { _, _ = io.Copy(io.Discard, w) })
	c := newLean(t, func(c *Client) {
		c.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			nc, err := new(net.Dialer).DialContext(ctx, network, address)
			return deadConn{nc}, err
		}
	})
	var reading atomic.Bool
	req := newRequest(t, "GET", b.url(), nil)
	req.Body = io.NopCloser(bodyFunc(func([]byte) (int, error) {
		reading.Store(true)
		defer reading.Store(false)
		time.Sleep(sniffWait + soon)
		return 0, io.EOF
	}))
	if _, err := c.RoundTrip(req); err == nil || reading.Load() {
		t.Errorf("error %v, the body is still read: %v", err, reading.Load())
	}
}

// fullConn takes one write, the head.
type fullConn struct {
	net.Conn
	writes atomic.Int64
}

var errFull = errors.New("the backend takes no more")

func (c *fullConn) Write(p []byte) (int, error) {
	if c.writes.Add(1) > 1 {
		return 0, errFull
	}
	return c.Conn.Write(p)
}

// TestSendingFails: when nothing is heard of a backend that takes no more, the error says that, and not that the connection was closed for it.
func TestSendingFails(t *testing.T) {
	t.Parallel()
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		nc, err := new(net.Dialer).DialContext(ctx, network, address)
		return &fullConn{Conn: nc}, err
	}
	test := func(t *testing.T, rt http.RoundTripper) {
		closed := make(chan struct{})
		b := newBackend(t, func(w *wire) { w.untilClosed(); close(closed) })
		req := newRequest(t, "POST", b.url(), io.LimitReader(endless{}, 1<<20))
		req.ContentLength = 1 << 20
		within(t, "error", func() {
			if _, err := rt.RoundTrip(req); !errors.Is(err, errFull) {
				t.Errorf("err %v", err)
			}
		})
		hasClosed(t, closed)
	}
	t.Run("stock", func(t *testing.T) { test(t, &http.Transport{DialContext: dial, WriteBufferSize: 1}) })
	t.Run("lean", func(t *testing.T) { test(t, newLean(t, func(c *Client) { c.Dial = dial })) })
}

// TestFailureWhileSending: whoever gets the error of a connection that has ended has the request's body for himself, and does not wait for a
// backend to ask for it.
func TestFailureWhileSending(t *testing.T) {
	t.Parallel()
	eachClient(t, func(t *testing.T, rt http.RoundTripper) {
		b := newBackend(t, func(w *wire) { _, _ = http.ReadRequest(w.Reader) })
		var reading atomic.Bool
		req := newRequest(t, "POST", b.url(), bodyFunc(func([]byte) (int, error) {
			reading.Store(true)
			defer reading.Store(false)
			time.Sleep(soon)
			return 0, io.EOF
		}))
		req.ContentLength = 1 << 20
		if _, err := rt.RoundTrip(req); err == nil || reading.Load() {
			t.Errorf("error %v, the body is still read: %v", err, reading.Load())
		}
	})
	t.Run("kept back", func(t *testing.T) {
		b := newBackend(t, func(w *wire) { _, _ = http.ReadRequest(w.Reader) })
		body := &told{Reader: strings.NewReader("text")}
		req := newRequest(t, "POST", b.url(), body)
		req.ContentLength = 4
		req.Header.Set("Expect", "100-continue")
		within(t, "error", func() {
			if _, err := newLean(t, func(c *Client) { c.ContinueTimeout = time.Hour }).RoundTrip(req); err == nil {
				t.Error("no error")
			}
		})
		if left := body.Reader.(*strings.Reader).Len(); left != 4 || body.closed.Load() != 1 {
			t.Errorf("%d bytes left, closed %d times", left, body.closed.Load())
		}
	})
}
