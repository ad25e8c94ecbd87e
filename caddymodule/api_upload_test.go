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
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// uploads is a gateway whose calls go to a server of its own, over TLS or not.
type uploads struct {
	*gateway
	host string
}

// newUploads has serve take the calls that a test sends with call.
func newUploads(t *testing.T, how string, serve http.HandlerFunc) *uploads {
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
	u := &uploads{newGateway(t, wechat, gatewayConfig(scheme+"://"+host), ""), host}
	rt := u.transport().HTTPTransport.Transport
	if scheme == "https" {
		pool := x509.NewCertPool()
		pool.AddCert(server.Certificate())
		rt.TLSClientConfig.RootCAs = pool
		rt.ForceAttemptHTTP2 = how == "h2"
	}
	dial := rt.DialContext
	rt.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return dial(ctx, network, server.Listener.Addr().String())
	}
	return u
}

// call sends a body as an admitted call, and returns the answer's status.
func (u *uploads) call(ctx context.Context, t *testing.T, body io.Reader, size int64) (int, *apiCall, error) {
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
				u := newUploads(t, how, func(w http.ResponseWriter, r *http.Request) {
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
	const limit, pause, parts = 300 * time.Millisecond, 200 * time.Millisecond, 4
	for _, how := range []string{"http", "https", "h2"} {
		for name, c := range map[string]struct {
			streams bool // only where a connection has several
			serve   http.HandlerFunc
			body    func() (io.Reader, int64)
		}{
			"caller": {
				serve: func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) },
				body: func() (io.Reader, int64) {
					return &slowReader{parts: 2, pause: 2 * limit}, -1
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
				u := newUploads(t, how, c.serve)
				u.transport().stall = limit
				body, size := c.body()
				if status, call, err := u.call(t.Context(), t, body, size); err != nil || status != http.StatusOK {
					t.Errorf("status %d, outcome %s, reason %q, %v", status, call.outcome, call.reason, err)
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
		u, ctx := newUpload(t.Context(), time.Second)
		defer u.cancel()
		body := &uploadBody{newKeptBody(zeros{}, -1, 0).open(), u}
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
