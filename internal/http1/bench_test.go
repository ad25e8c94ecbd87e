package http1

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"strings"
	"syscall"
	"testing"
	"time"
)

// What an exchange is measured with: a push as reverse_proxy sends it, and a reply.
const (
	benchSent  = 700 // bytes of the body
	benchReply = "HTTP/1.1 200 OK\r\nDate: Sat, 03 Jan 2026 10:00:00 GMT\r\nContent-Type: text/xml; charset=utf-8\r\nServer: app\r\n" +
		"X-Request-Id: 0123456789abcdef\r\nContent-Length: 320\r\n\r\n"
)

var benchAnswer = []byte(benchReply + strings.Repeat("a", 320))

// benchServe answers requests as long as they come. It looks at nothing but where they end, so that it costs next to nothing.
func benchServe(w *wire) {
	buf := make([]byte, 0, 8<<10)
	for {
		n, err := w.Conn.Read(buf[len(buf):cap(buf)])
		if err != nil {
			return
		}
		buf = buf[:len(buf)+n]
		if end := bytes.Index(buf, []byte("\r\n\r\n")); end >= 0 && len(buf) == end+4+benchSent {
			buf = buf[:0]
			if _, err := w.Conn.Write(benchAnswer); err != nil {
				return
			}
		}
	}
}

// promptConn is a connection whose backend answers as soon as it has a request, without a network. What it is looked at for when it
// is idle is a socket that nothing comes to.
type promptConn struct {
	net.Conn
	silent *net.UDPConn
	answer []byte
}

func (c *promptConn) SyscallConn() (syscall.RawConn, error) { return c.silent.SyscallConn() }

func (c *promptConn) Write(p []byte) (int, error) {
	c.answer = benchAnswer
	return len(p), nil
}

func (c *promptConn) Read(p []byte) (int, error) {
	n := copy(p, c.answer)
	c.answer = c.answer[n:]
	if n == 0 {
		return 0, io.EOF
	}
	return n, nil
}

func (c *promptConn) Close() error                   { return c.silent.Close() }
func (*promptConn) SetReadDeadline(time.Time) error  { return nil }
func (*promptConn) SetWriteDeadline(time.Time) error { return nil }

func dialPrompt(context.Context, string, string) (net.Conn, error) {
	silent, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	return &promptConn{silent: silent}, err
}

// benchBody is a body that can be read again.
type benchBody struct{ bytes.Reader }

func (*benchBody) Close() error { return nil }

// benchExchange makes a function that sends a request and reads the answer to its end. The request is what reverse_proxy
// makes of a push: ten fields, a context that can be cancelled and carries a trace.
func benchExchange(tb testing.TB, rt http.RoundTripper, url string) func() {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	tb.Cleanup(cancel)
	ctx = httptrace.WithClientTrace(context.WithValue(ctx, new(int), "dial"), &httptrace.ClientTrace{})
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, nil)
	if err != nil {
		tb.Fatal(err)
	}
	for i := range 5 {
		req.Header.Set(fmt.Sprintf("X-Wechat-Field-%d", i), strings.Repeat("v", 20))
	}
	for name, value := range map[string]string{
		"Content-Type": "text/xml", "User-Agent": "Mozilla/4.0", "Via": "1.1 Caddy", "X-Forwarded-For": "127.0.0.1", "X-Forwarded-Host": "gateway.example",
	} {
		req.Header.Set(name, value)
	}
	data, body := bytes.Repeat([]byte("x"), benchSent), new(benchBody)
	req.Body, req.ContentLength = body, benchSent
	buf := make([]byte, 32<<10)
	return func() {
		body.Reset(data)
		res, err := rt.RoundTrip(req)
		if err != nil {
			tb.Fatal(err)
		}
		n := 0
		for err == nil {
			var m int
			m, err = res.Body.Read(buf)
			n += m
		}
		if err != io.EOF || n != 320 || res.StatusCode != http.StatusOK {
			tb.Fatalf("%d bytes, %v, status %d", n, err, res.StatusCode)
		}
		_ = res.Body.Close()
	}
}

// BenchmarkExchange is an exchange, with and without a network, beside net/http's.
func BenchmarkExchange(b *testing.B) {
	for network, dial := range map[string]func(context.Context, string, string) (net.Conn, error){
		"tcp": new(net.Dialer).DialContext, "memory": dialPrompt,
	} {
		lean := newLean(b, func(c *Client) { c.Dial = dial })
		stock := &http.Transport{DisableCompression: true, DialContext: dial, MaxIdleConnsPerHost: 32, IdleConnTimeout: time.Minute}
		for name, rt := range map[string]http.RoundTripper{"lean": lean, "stock": stock} {
			if network == "memory" && name == "stock" {
				continue // its reader reads before there is a request
			}
			b.Run(network+"/"+name, func(b *testing.B) {
				exchange := benchExchange(b, rt, newBackend(b, benchServe).url())
				b.ReportAllocs()
				for b.Loop() {
					exchange()
				}
				stock.CloseIdleConnections()
			})
		}
	}
}
