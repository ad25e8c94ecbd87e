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
