package caddymodule

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/internal/stall"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// servedGateway is a gateway whose calls go to a server of its own, over TLS or not.
type servedGateway struct {
	*gateway
	host string
}

// newServedGateway has serve take the calls that a test sends with call.
func newServedGateway(t testing.TB, how string, serve http.HandlerFunc) *servedGateway {
	t.Helper()
	wechat := newFakeWeChat(t)
	server := httptest.NewUnstartedServer(serve)
	server.EnableHTTP2 = how == "h2"
	scheme := "http"
	if how != "http" {
		scheme = "https"
		server.StartTLS()
	} else {
		server.Start()
	}
	t.Cleanup(server.Close)
	host := server.Listener.Addr().String()
	if scheme == "https" {
		host = fmt.Sprintf("example.com:%d", server.Listener.Addr().(*net.TCPAddr).Port) // the name in httptest's certificate
	}
	u := &servedGateway{newGateway(t, wechat, gatewayConfig(scheme+"://"+host), ""), host}
	rt := u.transport().HTTPTransport.Transport
	if scheme == "https" {
		pool := x509.NewCertPool()
		pool.AddCert(server.Certificate())
		rt.TLSClientConfig.RootCAs = pool
	}
	dial := rt.DialContext
	rt.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return dial(ctx, network, server.Listener.Addr().String())
	}
	return u
}

// call sends a body as an admitted call, and returns the answer's status.
func (u *servedGateway) call(ctx context.Context, t testing.TB, body io.Reader, size int64) (int, *apiCall, error) {
	t.Helper()
	call := &apiCall{
		key: tokens.AccountKey(accountID), token: tokens.Token{Value: secret.New("TOKEN")}, param: paramAccess,
		path: "/cgi-bin/media/upload", header: http.Header{}, body: newKeptBody(body, size, 1<<10), size: size,
	}
	req := httptest.NewRequest(http.MethodPost, "/", nil)
	req = caddyhttp.PrepareRequest(req, caddy.NewReplacer(), httptest.NewRecorder(), &caddyhttp.Server{})
	req = req.WithContext(context.WithValue(ctx, apiCallKey{}, call))
	req.URL = &url.URL{Host: u.host}
	res, err := u.transport().RoundTrip(req)
	if err != nil {
		return 0, call, err
	}
	_, err = io.Copy(io.Discard, res.Body)
	return res.StatusCode, call, errors.Join(err, res.Body.Close())
}

// zeros are a body of any length.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// TestAPIUploadStalls: WeChat's side takes a part of a body and then no more, and does not answer.
func TestAPIUploadStalls(t *testing.T) {
	for _, how := range []string{"http", "https", "h2"} {
		for name, size := range map[string]int64{"known": 64 << 20, "unknown": -1} {
			t.Run(how+", "+name, func(t *testing.T) {
				release, proto := make(chan struct{}), make(chan string, 1)
				u := newServedGateway(t, how, func(w http.ResponseWriter, r *http.Request) {
					proto <- r.Proto
					<-release
				})
				defer close(release)
				u.transport().stall = 100 * time.Millisecond
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				body := io.Reader(zeros{})
				if size > 0 {
					body = io.LimitReader(body, size)
				}
				status, call, err := u.call(ctx, t, body, size)
				if err != nil || status != http.StatusGatewayTimeout || call.outcome != outcomeUnreachable {
					t.Errorf("%s: status %d, outcome %s, %v", <-proto, status, call.outcome, err)
				}
			})
		}
	}
}

// deadlineConn tells the deadlines of its writes.
type deadlineConn struct {
	net.Conn
	set []time.Duration // from now on
}

func (c *deadlineConn) SetWriteDeadline(t time.Time) error {
	c.set = append(c.set, time.Until(t))
	return nil
}

func (*deadlineConn) Write(p []byte) (int, error) { return len(p), nil }

// TestTakenConn: each write has its time, and few set a deadline.
func TestTakenConn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		inner := new(deadlineConn)
		c := newTakenConn(inner, stallTimeout)
		left := time.Duration(0) // of the deadline that is set
		for i := range 1000 {
			pause := 10 * time.Millisecond
			if i%100 == 0 {
				pause = time.Hour // idle meanwhile
			}
			time.Sleep(pause)
			left -= pause
			before := len(inner.set)
			if _, err := c.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if len(inner.set) > before {
				left = inner.set[before]
			}
			if left < stallTimeout || left > stallTimeout*5/4 {
				t.Fatalf("write %d has %v", i, left)
			}
		}
		if n := len(inner.set); n != 10 {
			t.Errorf("%d deadlines were set", n)
		}
		// Somebody else's stays.
		_ = c.SetWriteDeadline(time.Now().Add(time.Second))
		time.Sleep(time.Hour)
		_, _ = c.Write([]byte("x"))
		if n := len(inner.set); n != 11 {
			t.Errorf("another deadline than the one that was asked for")
		}
		_ = c.SetWriteDeadline(time.Time{})
		_, _ = c.Write([]byte("x"))
		if n := len(inner.set); n != 13 {
			t.Errorf("no deadline of its own any more")
		}
	})
}

// TestAPIUploadThatIsSlow: neither a caller that pauses nor a WeChat that is slow makes a call stall, nor does one that answers early.
func TestAPIUploadThatIsSlow(t *testing.T) {
	const limit, pause, parts = 500 * time.Millisecond, 200 * time.Millisecond, 4
	for _, how := range []string{"http", "https", "h2"} {
		for name, c := range map[string]struct {
			streams bool // only where a connection has several
			serve   http.HandlerFunc
			body    func() (io.Reader, int64)
		}{
			"caller": {
				serve: func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) },
				body: func() (io.Reader, int64) {
					return &slowReader{parts: 2, pause: limit * 5 / 4}, -1
				},
			},
			"wechat": {
				serve: func(w http.ResponseWriter, r *http.Request) {
					for range parts {
						time.Sleep(pause)
						_, _ = io.CopyN(io.Discard, r.Body, 8<<20)
					}
					_, _ = io.Copy(io.Discard, r.Body)
				},
				body: func() (io.Reader, int64) { return io.LimitReader(zeros{}, (parts+1)*8<<20), (parts + 1) * 8 << 20 },
			},
			"answers before it has all": {
				streams: true,
				serve: func(w http.ResponseWriter, r *http.Request) {
					_ = http.NewResponseController(w).EnableFullDuplex()
					for i := range parts {
						_, _ = io.WriteString(w, "{}")
						_ = http.NewResponseController(w).Flush()
						if i == 0 {
							_, _ = io.CopyN(io.Discard, r.Body, 1<<20)
						}
						time.Sleep(pause)
					}
				},
				body: func() (io.Reader, int64) { return io.LimitReader(zeros{}, 64<<20), 64 << 20 },
			},
		} {
			if c.streams && how != "h2" {
				continue // the connection itself is at a stop then
			}
			t.Run(how+", "+name, func(t *testing.T) {
				u := newServedGateway(t, how, c.serve)
				u.transport().stall = limit
				for try := range stall.Tries(t, limit/5) {
					body, size := c.body()
					if status, call, err := u.call(t.Context(), t, body, size); err != nil || status != http.StatusOK {
						try.Errorf("status %d, outcome %s, reason %q, %v", status, call.outcome, call.reason, err)
					}
				}
			})
		}
	}
}

// slowReader is a body that comes in parts.
type slowReader struct {
	parts int
	pause time.Duration
}

func (r *slowReader) Read(p []byte) (int, error) {
	if r.parts == 0 {
		return 0, io.EOF
	}
	r.parts--
	time.Sleep(r.pause)
	return copy(p, "part"), nil
}

// TestUploadAfterTheAnswer: what goes on being sent beside an answer is not watched over.
func TestUploadAfterTheAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, ctx := newUpload(t.Context(), time.Second, 0)
		defer u.cancel()
		body := u.body(newKeptBody(zeros{}, -1, 0).open())
		_, _ = body.Read(make([]byte, 8))
		if u.end() {
			t.Error("stalled at once")
		}
		_, _ = body.Read(make([]byte, 8))
		time.Sleep(time.Minute)
		if ctx.Err() != nil || u.end() {
			t.Errorf("ended by %v", ctx.Err())
		}
	})
}

// TestUploadBegunAgain: what was begun on a connection that had died does not end the waiting of what is sent on another one.
func TestUploadBegunAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, ctx := newUpload(t.Context(), time.Second, 0)
		defer u.cancel()
		kept := newKeptBody(io.LimitReader(zeros{}, 8), 8, 8)
		first := u.body(kept.open())
		_, _ = first.Read(make([]byte, 8))
		second := u.body(kept.open())
		_, _ = second.Read(make([]byte, 4))
		_ = first.Close()
		first.upload.given(first, time.Hour) // it was reading still when it was closed
		time.Sleep(time.Minute)
		if ctx.Err() == nil || !u.end() {
			t.Error("nobody waits for it")
		}
	})
}

// endingReader is a body that says with its last bytes that they are the last, as net/http's do.
type endingReader struct{ left int }

func (r *endingReader) Read(p []byte) (int, error) {
	n := min(len(p), r.left)
	clear(p[:n])
	if r.left -= n; r.left == 0 {
		return n, io.EOF
	}
	return n, nil
}

// bodies are what ends with its last bytes, and what does so after them.
var bodies = map[string]func(size int) io.Reader{
	"end with the last bytes": func(size int) io.Reader { return &endingReader{size} },
	"end after them":          func(size int) io.Reader { return io.LimitReader(zeros{}, int64(size)) },
}

// TestAPIUploadStallsAtItsEnd: WeChat's side has all but the last part of a body, which it does not let in.
func TestAPIUploadStallsAtItsEnd(t *testing.T) {
	const size = 1<<20 + uploadPart/2 // Go's server lets in a MiB of a request that nobody reads
	for name, body := range bodies {
		t.Run(name, func(t *testing.T) {
			release := make(chan struct{})
			u := newServedGateway(t, "h2", func(_ http.ResponseWriter, r *http.Request) {
				if r.ContentLength == size {
					<-release
				}
			})
			defer close(release)
			if status, _, err := u.call(t.Context(), t, body(8), 8); status != http.StatusOK { // the connection's settings are known then
				t.Fatal(status, err)
			}
			u.transport().stall, u.transport().answer = 50*time.Millisecond, 50*time.Millisecond
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			if status, call, err := u.call(ctx, t, body(size), size); err != nil || status != http.StatusGatewayTimeout {
				t.Errorf("status %d, outcome %s, %v", status, call.outcome, err)
			}
		})
	}
}

// TestAPIUploadIsTaken: an answer that takes its time is no body that is not taken, and neither is one that is taken slowly.
func TestAPIUploadIsTaken(t *testing.T) {
	const limit = 200 * time.Millisecond
	for _, how := range []string{"http", "https", "h2"} {
		for name, body := range bodies {
			t.Run(how+", "+name, func(t *testing.T) {
				u := newServedGateway(t, how, func(_ http.ResponseWriter, r *http.Request) {
					part := make([]byte, uploadPart)
					for {
						if _, err := io.ReadFull(r.Body, part); err != nil {
							break
						}
						time.Sleep(limit * 3 / 40) // 16 parts take longer than the limit, and net/http reads as many at once
					}
					time.Sleep(2 * limit)
				})
				u.transport().stall = limit
				sizes := []int{1000}
				if how == "h2" {
					sizes = append(sizes, 3<<20) // Go's server lets in a MiB that nobody reads
				}
				for _, size := range sizes {
					for try := range stall.Tries(t, limit/5) {
						if status, call, err := u.call(t.Context(), t, body(size), int64(size)); status != http.StatusOK {
							try.Errorf("%d bytes: status %d, %s %s, %v", size, status, call.outcome, call.reason, err)
						}
					}
				}
			})
		}
	}
}

// TestAPIConnectionsLast: a connection's deadline for writes is no bound for its life, nor for an answer.
func TestAPIConnectionsLast(t *testing.T) {
	const limit = 300 * time.Millisecond
	for _, how := range []string{"http", "https", "h2"} {
		t.Run(how, func(t *testing.T) {
			var from sync.Map
			u := newServedGateway(t, how, func(w http.ResponseWriter, r *http.Request) {
				from.Store(r.RemoteAddr, true)
				_, _ = io.Copy(io.Discard, r.Body)
				for range 8 {
					_, _ = io.WriteString(w, "<x/>")
					_ = http.NewResponseController(w).Flush()
					time.Sleep(limit / 6) // longer than the limit in all
				}
			})
			u.transport().stall = limit
			for try := range stall.Tries(t, limit/5) {
				from.Clear()
				for range 2 {
					if status, call, err := u.call(t.Context(), t, io.LimitReader(zeros{}, 100), 100); status != http.StatusOK || err != nil {
						try.Errorf("status %d, %s %s, %v", status, call.outcome, call.reason, err)
					}
					time.Sleep(2 * limit)
				}
				n := 0
				from.Range(func(any, any) bool { n++; return true })
				if n != 1 {
					try.Errorf("%d connections", n)
				}
			}
		})
	}
}

// TestAPIWriteStalls: a write of which nothing is taken ends, and the connections that wechat_api dials have that.
func TestAPIWriteStalls(t *testing.T) {
	const limit = 50 * time.Millisecond
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	began := time.Now()
	_, err := newTakenConn(near, limit).Write([]byte("x"))
	if took := time.Since(began); !errors.Is(err, os.ErrDeadlineExceeded) || took < limit {
		t.Errorf("after %v: %v", took, err)
	}
	u := newServedGateway(t, "http", func(http.ResponseWriter, *http.Request) {})
	u.transport().stall = limit
	conn, err := u.transport().HTTPTransport.Transport.DialContext(t.Context(), "tcp", u.host)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if taken, ok := conn.(*takenConn); !ok || taken.limit != limit {
		t.Errorf("it dials a %T", conn)
	}
}
