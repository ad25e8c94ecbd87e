package caddymodule

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"golang.org/x/net/http2"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/internal/stall"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// refusingH2 is a server over TLS that speaks h2 alone and has each request, once all of it is there, refused.
type refusingH2 struct {
	net.Listener
	certificate *x509.Certificate
	refuse      func(f *http2.Framer, stream uint32) (goOn bool)
	requests    atomic.Int32
	conns       atomic.Int32
	open        []net.Conn // all that were accepted, for who has ended that
}

func newRefusingH2(t *testing.T, refuse func(f *http2.Framer, stream uint32) (goOn bool)) *refusingH2 {
	t.Helper()
	certified := httptest.NewTLSServer(http.NotFoundHandler())
	config := certified.TLS.Clone()
	config.NextProtos = []string{"h2"}
	s := &refusingH2{certificate: certified.Certificate(), refuse: refuse}
	certified.Close()
	var err error
	if s.Listener, err = tls.Listen("tcp", "127.0.0.1:0", config); err != nil {
		t.Fatal(err)
	}
	var accepting, serving sync.WaitGroup
	t.Cleanup(func() {
		_ = s.Close()
		accepting.Wait()
		for _, conn := range s.open { // a client may keep one on which it has sent nothing
			_ = conn.Close()
		}
		serving.Wait()
	})
	accepting.Go(func() {
		for {
			conn, err := s.Accept()
			if err != nil {
				return
			}
			s.conns.Add(1)
			s.open = append(s.open, conn)
			serving.Go(func() { s.serve(conn) })
		}
	})
	return s
}

func (s *refusingH2) serve(conn net.Conn) {
	defer func() { _ = conn.Close() }()
	if _, err := io.ReadFull(conn, make([]byte, len(http2.ClientPreface))); err != nil {
		return
	}
	f := http2.NewFramer(conn, conn)
	if f.WriteSettings() != nil {
		return
	}
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			return
		}
		var ended bool
		switch frame := frame.(type) {
		case *http2.SettingsFrame:
			if !frame.IsAck() {
				_ = f.WriteSettingsAck()
			}
		case *http2.HeadersFrame:
			ended = frame.StreamEnded()
		case *http2.DataFrame:
			ended = frame.StreamEnded()
		}
		if ended {
			s.requests.Add(1)
			if !s.refuse(f, frame.Header().StreamID) {
				_, _ = io.Copy(io.Discard, conn) // until the client has read it
				return
			}
		}
	}
}

// newServedGatewayAt is newServedGateway for a server of another kind.
func newServedGatewayAt(t *testing.T, address string, certificate *x509.Certificate) *servedGateway {
	t.Helper()
	_, port, _ := net.SplitHostPort(address)
	host := net.JoinHostPort("example.com", port) // the name in httptest's certificate
	u := &servedGateway{newGateway(t, newFakeWeChat(t), gatewayConfig("https://"+host), ""), host}
	rt := u.transport().HTTPTransport.Transport
	rt.TLSClientConfig.RootCAs = x509.NewCertPool()
	rt.TLSClientConfig.RootCAs.AddCert(certificate)
	dial := rt.DialContext
	rt.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) { return dial(ctx, network, address) }
	return u
}

// send sends an admitted call, with a body or without one, and returns the answer's status.
func (u *servedGateway) send(ctx context.Context, method string, body io.Reader, size int64) (int, *apiCall, error) {
	call := &apiCall{
		key: tokens.AccountKey(accountID), token: tokens.Token{Value: secret.New("TOKEN")}, param: paramAccess,
		path: "/cgi-bin/x", header: http.Header{}, size: size,
	}
	if body != nil {
		call.body = newKeptBody(body, size, 1<<10)
	}
	req := caddyhttp.PrepareRequest(httptest.NewRequest(method, "/", nil), caddy.NewReplacer(), httptest.NewRecorder(), &caddyhttp.Server{})
	req = req.WithContext(context.WithValue(ctx, apiCallKey{}, call))
	req.URL = &url.URL{Host: u.host}
	res, err := u.transport().RoundTrip(req)
	if err != nil {
		return 0, call, err
	}
	_, err = io.Copy(io.Discard, res.Body)
	return res.StatusCode, call, errors.Join(err, res.Body.Close())
}

// What net/http sends again by itself, because WeChat has not taken it, has an end, and what WeChat may have taken is sent once.
func TestAPITurnedAway(t *testing.T) {
	reset := func(code http2.ErrCode) func(*http2.Framer, uint32) bool {
		return func(f *http2.Framer, stream uint32) bool { return f.WriteRSTStream(stream, code) == nil }
	}
	away := func(last uint32) func(*http2.Framer, uint32) bool {
		return func(f *http2.Framer, _ uint32) bool { _ = f.WriteGoAway(last, http2.ErrCodeNo, nil); return false }
	}
	for _, test := range []struct {
		name, method, body string
		refuse             func(f *http2.Framer, stream uint32) (goOn bool)
		status             int
		least, most        int32 // requests
	}{
		{"goes away", http.MethodGet, "", away(0), http.StatusBadGateway, freeDials + 2, freeDials + 9},
		{"goes away", http.MethodPost, "", away(0), http.StatusBadGateway, freeDials + 2, freeDials + 9},
		{"goes away", http.MethodPost, "a body", away(0), http.StatusBadGateway, freeDials + 2, freeDials + 9},
		{"refuses", http.MethodPost, "a body", reset(http2.ErrCodeRefusedStream), http.StatusGatewayTimeout, 3, 3},
		{"breaks off", http.MethodPost, "a body", reset(http2.ErrCodeProtocol), http.StatusBadGateway, 1, 1},
		{"breaks off", http.MethodPost, "", reset(http2.ErrCodeProtocol), http.StatusBadGateway, 1, 1},
		{"cancels", http.MethodPost, "a body", reset(http2.ErrCodeCancel), http.StatusBadGateway, 1, 1},
	} {
		t.Run(fmt.Sprintf("%s %s %q", test.name, test.method, test.body), func(t *testing.T) {
			s := newRefusingH2(t, test.refuse)
			u := newServedGatewayAt(t, s.Addr().String(), s.certificate)
			t.Parallel()                                  // not before: Caddy's proxies are set up one at a time
			u.transport().answer = 500 * time.Millisecond // two of net/http's sendings
			if test.most > freeDials {
				u.transport().answer = 2 * time.Second // nine pauses before dials, and time for the others where all is slow
			}
			var body io.Reader
			if test.body != "" {
				body = strings.NewReader(test.body)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			status, call, err := u.send(ctx, test.method, body, int64(len(test.body)))
			if test.body != "" && test.most > freeDials && status == http.StatusGatewayTimeout {
				status = test.status // whichever of the two limits comes first
			}
			if err != nil || status != test.status || call.outcome != outcomeUnreachable {
				t.Errorf("status %d, outcome %s, %v", status, call.outcome, err)
			}
			if n := s.requests.Load(); n < test.least || n > test.most {
				t.Errorf("sent %d times over %d connections, want %d to %d", n, s.conns.Load(), test.least, test.most)
			}
		})
	}
}

// Calls in parallel that find each connection full go on to further ones, however few calls WeChat's side takes at a time on each.
func TestAPIManyCallsOnFullConnections(t *testing.T) {
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, `{}`) }))
	server.EnableHTTP2 = true
	server.Config.HTTP2 = &http.HTTP2Config{MaxConcurrentStreams: 1}
	server.StartTLS()
	t.Cleanup(server.Close)
	u := newServedGatewayAt(t, server.Listener.Addr().String(), server.Certificate())
	for range 4 {
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				if status, call, err := u.send(t.Context(), http.MethodPost, strings.NewReader("a body"), 6); err != nil || status != http.StatusOK {
					t.Errorf("status %d, %s, %v", status, call.reason, err)
				}
			})
		}
		wg.Wait()
	}
}

// readerFunc is a body that a function gives.
type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// How long the caller takes for its body does not count against a sending that WeChat's side has not taken.
func TestAPITurnedAwayAfterASlowBody(t *testing.T) {
	away := func(f *http2.Framer, last uint32) bool { _ = f.WriteGoAway(last, http2.ErrCodeNo, nil); return false }
	for name, refuse := range map[string]func(*http2.Framer, uint32) bool{
		"refuses": func(f *http2.Framer, stream uint32) bool {
			return f.WriteRSTStream(stream, http2.ErrCodeRefusedStream) == nil
		},
		"goes away": func(f *http2.Framer, _ uint32) bool { return away(f, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			const answer = 200 * time.Millisecond
			var refused atomic.Bool
			s := newRefusingH2(t, func(f *http2.Framer, stream uint32) bool {
				if refused.CompareAndSwap(false, true) {
					return refuse(f, stream)
				}
				const statusOK = 0x88 // of HPACK's table
				_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: []byte{statusOK}, EndStream: true, EndHeaders: true})
				return away(f, stream) // has the client close the connection
			})
			u := newServedGatewayAt(t, s.Addr().String(), s.certificate)
			u.transport().answer = answer
			body := readerFunc(func(p []byte) (int, error) {
				time.Sleep(2 * answer)
				return copy(p, "a body"), io.EOF
			})
			for try := range stall.Tries(t, answer/8) {
				refused.Store(false)
				before := s.requests.Load()
				status, call, err := u.send(t.Context(), http.MethodPost, body, 6)
				if n := s.requests.Load() - before; err != nil || status != http.StatusOK || n != 2 {
					try.Errorf("status %d after %d requests, %s, %v", status, n, call.reason, err)
				}
			}
		})
	}
}
