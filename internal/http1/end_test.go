package http1

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
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestHalfRead: a connection on which the rest of an answer is to come is not another request's, although nothing of it is there yet.
func TestHalfRead(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]string{
		"length":   "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nok",
		"chunks":   "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\nok",
		"no end":   "HTTP/1.1 200 OK\r\n\r\nok",
		"no start": "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBackend(t, func(w *wire) {
				_, _, _ = w.request()
				w.say(answer)
				w.untilClosed()
			})
			c := newLean(t)
			res, err := c.RoundTrip(newRequest(t, "GET", b.url(), nil))
			if err != nil {
				t.Fatal(err)
			}
			if name != "no start" {
				if _, err := io.ReadFull(res.Body, make([]byte, 2)); err != nil {
					t.Error(err)
				}
			}
			_ = res.Body.Close()
			if n, hosts := c.idleCount(), c.hostCount(); n != 0 || hosts != 0 {
				t.Errorf("%d connections are idle, %d hosts", n, hosts)
			}
		})
	}
}

// TestReadsNoFurther: what comes after a body is no part of it, and a connection on which something did is not kept.
func TestReadsNoFurther(t *testing.T) {
	t.Parallel()
	goOn := make(chan struct{})
	b := newBackend(t, func(w *wire) {
		_, _, _ = w.request()
		w.say("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no")
		<-goOn
		w.say("kX")
		w.untilClosed()
	})
	c := newLean(t)
	res, err := c.RoundTrip(newRequest(t, "GET", b.url(), nil))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	buf := make([]byte, 2)
	n, err := res.Body.Read(buf)
	if string(buf[:n]) != "o" || err != nil {
		t.Fatalf("%q %v", buf[:n], err)
	}
	close(goOn)
	if n, err := res.Body.Read(buf); string(buf[:n]) != "k" || err != io.EOF || c.idleCount() != 0 {
		t.Errorf("%q %v, %d connections are idle", buf[:n], err, c.idleCount())
	}
}

// hookedConn is a connection, without rounds, that has something done before it returns what it has read.
type hookedConn struct {
	*net.TCPConn
	hook func(p []byte, n int, err error) (int, error)
}

func (c *hookedConn) Read(p []byte) (int, error) {
	n, err := c.TCPConn.Read(p)
	return c.hook(p, n, err)
}

func dialHooked(hook func(p []byte, n int, err error) (int, error)) func(*Client) {
	return func(c *Client) {
		dial := c.Dial
		c.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			nc, err := dial(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return &hookedConn{nc.(*net.TCPConn), hook}, nil
		}
	}
}

// TestCloseInTheLastRead: a connection that Close has closed under a Read is not kept, although that has come to the end.
func TestCloseInTheLastRead(t *testing.T) {
	t.Parallel()
	goOn := make(chan struct{})
	b := newBackend(t, func(w *wire) {
		_, _, _ = w.request()
		w.say("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
		<-goOn
		w.say("ok")
		w.untilClosed()
	})
	var body io.Closer
	c := newLean(t, dialHooked(func(_ []byte, n int, err error) (int, error) {
		if body != nil {
			_ = body.Close()
		}
		return n, err
	}))
	res, err := c.RoundTrip(newRequest(t, "GET", b.url(), nil))
	if err != nil {
		t.Fatal(err)
	}
	body = res.Body
	close(goOn)
	if _, err := io.ReadAll(res.Body); err != nil {
		t.Error(err)
	}
	if n := c.idleCount(); n != 0 {
		t.Errorf("%d connections are idle", n)
	}
}

// TestHeadAfterTheTimeout: an answer that comes while HeaderTimeout closes its connection is late.
func TestHeadAfterTheTimeout(t *testing.T) {
	t.Parallel()
	b := newBackend(t, func(w *wire) { w.untilClosed() })
	c := newLean(t, dialHooked(func(p []byte, _ int, _ error) (int, error) { return copy(p, okAnswer), nil }))
	c.HeaderTimeout = time.Millisecond
	within(t, "timeout", func() {
		if res, err := c.RoundTrip(newRequest(t, "GET", b.url(), nil)); err != ErrHeaderTimeout {
			t.Errorf("%v, err %v", res, err)
		}
	})
	if n := c.idleCount(); n != 0 {
		t.Errorf("%d connections are idle", n)
	}
}

// firingEnder is about to call what it was given when it is told to forget it.
type firingEnder struct{ *testEnder }

func (e firingEnder) Value(key any) any {
	if key == (EnderKey{}) {
		return e
	}
	return e.testEnder.Value(key)
}

func (e firingEnder) Forget() bool {
	e.testEnder.Forget()
	return false
}

// TestEndsAtTheEnd: a connection that is about to be closed, since its request's context has ended, is not kept for another request.
func TestEndsAtTheEnd(t *testing.T) {
	t.Parallel()
	for _, answer := range []string{okAnswer, "HTTP/1.1 204 No Content\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"} {
		b := newBackend(t, func(w *wire) {
			_, _, _ = w.request()
			w.say(answer)
			w.untilClosed()
		})
		c := newLean(t)
		ctx := firingEnder{newTestEnder(t.Context())}
		if got := roundTrip(c, newRequest(t, "GET", b.url(), nil).WithContext(ctx)); got == "error" || c.idleCount() != 0 {
			t.Errorf("%s, %d connections are idle", got, c.idleCount())
		}
	}
}

// TestAnswerAtTheEndOfTheBody: a sender that has sent all, and is about to notice, does not cost the connection.
func TestAnswerAtTheEndOfTheBody(t *testing.T) {
	t.Parallel()
	for _, answer := range []string{
		okAnswer, "HTTP/1.1 204 No Content\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
	} {
		said := make(chan struct{}, 1)
		b := newBackend(t, func(w *wire) {
			for {
				if _, _, err := w.request(); err != nil {
					return
				}
				w.say(answer)
				said <- struct{}{}
			}
		})
		c := newLean(t)
		eventually(t, "a connection that is kept", func() bool { // a busy machine may take longer than sendGrace
			text := strings.NewReader(strings.Repeat("x", inlineMax+1))
			req := newRequest(t, "POST", b.url(), bodyFunc(func(p []byte) (int, error) {
				if text.Len() == 0 {
					<-said
					time.Sleep(sendGrace / 10)
				}
				return text.Read(p)
			}))
			req.ContentLength = int64(text.Len())
			if got := roundTrip(c, req); got == "error" {
				t.Error(got)
			}
			return c.idleCount() == 1
		})
	}
}

// TestBodyAfterTheAnswer: a body that was kept back for 100 Continue is sent after an answer that keeps the connection, which waits for it.
func TestBodyAfterTheAnswer(t *testing.T) {
	t.Parallel()
	b := newBackend(t, func(w *wire) {
		for {
			req, err := http.ReadRequest(w.Reader)
			if err != nil {
				return
			}
			w.say(okAnswer)
			_, _ = io.Copy(io.Discard, req.Body)
		}
	})
	c := newLean(t, func(c *Client) { c.ContinueTimeout = time.Hour })
	eventually(t, "a connection that is kept", func() bool {
		text := strings.NewReader("text")
		req := newRequest(t, "POST", b.url(), text)
		req.Header.Set("Expect", "100-continue")
		if got := roundTrip(c, req); !strings.Contains(got, `"ok"`) {
			t.Error(got)
		}
		return c.idleCount() == 1 && text.Len() == 0
	})
}

// TestSwitched: a connection that has gone over to something else is not kept, however the backend puts it, and has one place to give back.
func TestSwitched(t *testing.T) {
	t.Parallel()
	for _, connection := range []string{"", "Connection: Upgrade\r\n"} {
		b := newBackend(t, func(w *wire) {
			_, _, _ = w.request()
			w.say("HTTP/1.1 101 Switching Protocols\r\n" + connection + "Upgrade: echo\r\n\r\n")
			w.untilClosed()
		})
		c := newLean(t, func(c *Client) { c.MaxPerHost = 1 })
		within(t, "two", func() {
			for range 2 {
				res, err := c.RoundTrip(newRequest(t, "GET", b.url(), nil))
				if err != nil {
					t.Error(err)
					return
				}
				_ = res.Body.Close()
				_ = res.Body.Close()
				if n, hosts := c.idleCount(), c.hostCount(); n != 0 || hosts != 0 {
					t.Errorf("%d connections are idle, %d hosts", n, hosts)
				}
			}
		})
	}
}

// TestInformationalLimit: answers before the answer are limited together, unless there is someone who takes them.
func TestInformationalLimit(t *testing.T) {
	t.Parallel()
	hint := "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
	b := newBackend(t, func(w *wire) {
		for {
			if _, _, err := w.request(); err != nil {
				return
			}
			w.say(strings.Repeat(hint, 10) + okAnswer)
		}
	})
	c := newLean(t, func(c *Client) { c.MaxHeader = 5 * len(hint) })
	if _, err := c.RoundTrip(newRequest(t, "GET", b.url(), nil)); !errors.Is(err, ErrHeaderTooLong) {
		t.Errorf("err %v", err)
	}
	taken := 0
	ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
		Got1xxResponse: func(int, textproto.MIMEHeader) error { taken++; return nil },
	})
	if got := roundTrip(c, newRequest(t, "GET", b.url(), nil).WithContext(ctx)); !strings.Contains(got, `"ok"`) || taken != 10 {
		t.Errorf("%s, %d taken", got, taken)
	}
}

// tlsRecords is a backend's answer in records of TLS, which arrive together.
type tlsRecords struct {
	net.Conn
	mu   sync.Mutex
	held []byte
	hold bool
}

func (c *tlsRecords) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.hold {
		c.held = append(c.held, p...)
		return len(p), nil
	}
	return c.Conn.Write(p)
}

func (c *tlsRecords) flush() {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, _ = c.Conn.Write(c.held)
	c.hold, c.held = false, nil
}

// TestTLS: an answer says whose it is and how its connection is secured; the connection is kept, unless a record that nobody has asked for has
// come with the answer's.
func TestTLS(t *testing.T) {
	t.Parallel()
	server := httptest.NewTLSServer(nil) // for its certificate
	server.Close()
	roots := x509.NewCertPool()
	roots.AddCert(server.Certificate())
	for _, forged := range []bool{false, true} {
		b := newBackend(t, func(w *wire) {
			records := &tlsRecords{Conn: w.Conn}
			tc := tls.Server(records, server.TLS)
			w = &wire{tc, w.Reader, w.nth}
			w.Reader.Reset(tc)
			for {
				if _, _, err := w.request(); err != nil {
					return
				}
				records.mu.Lock()
				records.hold = true
				records.mu.Unlock()
				w.say(fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n%02d", w.nth))
				if forged {
					w.say("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged")
				}
				records.flush()
			}
		})
		c := newLean(t, func(c *Client) { c.TLS = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12} })
		for i := range 3 {
			req := newRequest(t, "GET", b.url(), nil)
			res, err := c.Client.RoundTrip(req, Target{Network: "tcp", Address: req.URL.Host, Secure: true, ServerName: "example.com"})
			if err != nil {
				t.Fatal(err)
			}
			want := map[bool]int{false: 0, true: i}[forged]
			if got := outcome(res, nil); !strings.Contains(got, fmt.Sprintf(`body "%02d"`, want)) {
				t.Errorf("forged %v, answer %d: %s", forged, i, got)
			}
			if res.Request != req || res.TLS == nil || res.TLS.ServerName != "example.com" {
				t.Errorf("request %p of %p, %v", res.Request, req, res.TLS)
			}
		}
		c.Close()
	}
}

// TestHandshakeFails: a connection without a handshake that is trusted is closed, and gives up its place.
func TestHandshakeFails(t *testing.T) {
	t.Parallel()
	closed := make(chan struct{})
	server := httptest.NewTLSServer(nil) // for its certificate
	server.Close()
	b := newBackend(t, func(w *wire) {
		_ = tls.Server(w.Conn, server.TLS).Handshake()
		w.untilClosed()
		close(closed)
	})
	c := newLean(t, func(c *Client) { c.TLS = &tls.Config{RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS12} })
	req := newRequest(t, "GET", b.url(), nil)
	if _, err := c.Client.RoundTrip(req, Target{Network: "tcp", Address: req.URL.Host, Secure: true, ServerName: "example.com"}); err == nil || c.hostCount() != 0 {
		t.Errorf("err %v, %d hosts", err, c.hostCount())
	}
	hasClosed(t, closed)
}
