package caddymodule

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// tunnels is an egress proxy that opens each tunnel to one address, or answers in the place of what is behind it.
func tunnels(t *testing.T, to, instead string) *url.URL {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, in, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\n\r\n")
		if instead != "" {
			_, _ = in.Peek(1)
			_, _ = io.WriteString(conn, instead)
			return
		}
		behind, err := net.Dial("tcp", to)
		if err != nil {
			t.Error(err)
			return
		}
		go func() {
			_, _ = io.Copy(behind, in)
			_ = behind.Close()
		}()
		_, _ = io.Copy(conn, behind)
	}))
	t.Cleanup(server.Close)
	u, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// backedUp is a servedGateway at an address, through a proxy if one is given, whose api has a backup origin.
func backedUp(t *testing.T, address string, certificate *x509.Certificate, proxy *url.URL) *servedGateway {
	t.Helper()
	_, port, _ := net.SplitHostPort(address)
	host := net.JoinHostPort("example.com", port) // the name in httptest's certificate
	u := &servedGateway{newGateway(t, newFakeWeChat(t), gatewayConfig("https://"+host, "http://127.0.0.1:9"), ""), host}
	rt := u.transport().HTTPTransport.Transport
	if certificate != nil {
		rt.TLSClientConfig.RootCAs = x509.NewCertPool()
		rt.TLSClientConfig.RootCAs.AddCert(certificate)
	}
	if proxy != nil {
		rt.Proxy = http.ProxyURL(proxy)
		return u
	}
	dial := rt.DialContext
	rt.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) { return dial(ctx, network, address) }
	return u
}

// asProxied is a context as Caddy's proxy has it.
func asProxied(t *testing.T) context.Context {
	return httptrace.WithClientTrace(t.Context(), new(httptrace.ClientTrace))
}

// What had a connection goes to no other origin, however the connection was had and ends: only an error sends Caddy there. Not parallel;
// see newGateway.
func TestAPISentToOneOrigin(t *testing.T) {
	for _, version := range []string{"h1", "h2"} {
		for _, proxied := range []bool{false, true} {
			var calls atomic.Int32
			var whole atomic.Bool // the connection ends, not the request alone
			server := httptest.NewUnstartedServer(nil)
			server.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				_, _ = io.Copy(io.Discard, r.Body)
				switch {
				case r.Method == http.MethodHead:
					return
				case (r.ProtoMajor == 2) != (version == "h2"):
					t.Errorf("it was %s", r.Proto)
				}
				calls.Add(1)
				if whole.Load() {
					go server.CloseClientConnections()
					<-r.Context().Done()
				}
				panic(http.ErrAbortHandler)
			})
			server.Config.ErrorLog = log.New(io.Discard, "", 0)
			server.EnableHTTP2 = version == "h2"
			server.StartTLS()
			t.Cleanup(server.Close)
			address := server.Listener.Addr().String()
			var proxy *url.URL
			if proxied {
				proxy = tunnels(t, address, "")
			}
			u := backedUp(t, address, server.Certificate(), proxy)
			for n := range 8 {
				reused, method, body := n&1 > 0, http.MethodPost, io.Reader(strings.NewReader("a body"))
				whole.Store(n&2 > 0)
				if n&4 > 0 {
					method, body = http.MethodPut, onlyReader{strings.NewReader("a body")}
				}
				u.transport().HTTPTransport.Transport.CloseIdleConnections()
				if reused {
					if status, _, err := u.send(asProxied(t), http.MethodHead, nil, 0); err != nil || status != http.StatusOK {
						t.Fatal(status, err)
					}
				}
				calls.Store(0)
				status, _, err := u.send(asProxied(t), method, body, 6)
				if err != nil || status != http.StatusBadGateway || calls.Load() != 1 {
					t.Errorf("%s, proxied %v, reused %v, whole %v, %s: status %d, %v after %d calls", version, proxied, reused, whole.Load(), method, status, err, calls.Load())
				}
			}
		}
	}
}

// What had none is whole for the next origin, be it larger than what is kept for a repetition.
func TestAPIUnsentIsWhole(t *testing.T) {
	const size = 100 << 10
	halfway, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = halfway.Close() })
	go func() { // TCP is had, and the handshake begun
		for {
			conn, err := halfway.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Read(make([]byte, 1))
			_ = conn.Close()
		}
	}()
	for name, proxy := range map[string]*url.URL{
		"handshake": nil, "handshake through a proxy": tunnels(t, halfway.Addr().String(), ""), "the proxy's 502 in the tunnel": tunnels(t, "", "HTTP/1.1 502 Bad Gateway\r\n\r\n"),
	} {
		u := backedUp(t, halfway.Addr().String(), nil, proxy)
		_, call, err := u.send(asProxied(t), http.MethodPost, io.LimitReader(zeros{}, size), size)
		if _, dialing := errors.AsType[reverseproxy.DialError](err); !dialing {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if n, err := io.Copy(io.Discard, call.body.open()); n != size || err != nil {
			t.Errorf("%s: %d bytes are left, %v", name, n, err)
		}
	}
}
