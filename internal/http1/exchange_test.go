package http1

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestRequests: what goes over the wire is what net/http sends, but for the order of the fields.
func TestRequests(t *testing.T) {
	t.Parallel()
	with := func(change func(*http.Request)) func(*http.Request) { return change }
	for _, c := range []struct {
		name, method string
		body         io.Reader
		change       func(*http.Request)
	}{
		{name: "GET", method: "GET"},
		{name: "POST without a body", method: "POST"},
		{name: "PUT without a body", method: "PUT"},
		{name: "DELETE without a body", method: "DELETE"},
		{name: "odd method", method: "M-SEARCH"},
		{name: "POST", method: "POST", body: strings.NewReader("text")},
		{name: "large POST", method: "POST", body: strings.NewReader(strings.Repeat("x", 200_000))},
		{name: "chunked POST", method: "POST", body: io.MultiReader(strings.NewReader("some text"))},
		{name: "empty chunked POST", method: "POST", body: io.MultiReader()},
		{name: "chunked GET", method: "GET", body: io.MultiReader(strings.NewReader("some text"))},
		{name: "empty chunked GET", method: "GET", body: io.MultiReader()},
		{name: "empty chunked DELETE", method: "DELETE", body: io.MultiReader()},
		{name: "length without type", method: "POST", body: io.MultiReader(strings.NewReader("some text")), change: with(func(r *http.Request) { r.ContentLength = 9 })},
		{name: "h2 client", method: "POST", body: io.MultiReader(strings.NewReader("some text")), change: with(func(r *http.Request) { r.ContentLength, r.ProtoMajor = 9, 2 })},
		{name: "no agent", method: "GET", change: with(func(r *http.Request) { delete(r.Header, "User-Agent") })},
		{name: "empty agent", method: "GET", change: with(func(r *http.Request) { r.Header["User-Agent"] = []string{""} })},
		{name: "fields", method: "GET", change: with(func(r *http.Request) {
			r.Header["X-Two"] = []string{"a", " b\t"}
			r.Header["x-raw"] = []string{"ä", ""}
			r.Header["Content-Length"] = []string{"77"}
			r.Header["Transfer-Encoding"] = []string{"gzip"}
			r.Header["Trailer"] = []string{"x"}
			r.Header["Host"] = []string{"elsewhere"}
			r.Header["Te"] = []string{"trailers"}
		})},
		{name: "host", method: "GET", change: with(func(r *http.Request) { r.Host = "example.com:8080" })},
		{name: "host that is none", method: "GET", change: with(func(r *http.Request) { r.Host = "/run/x.sock" })},
		{name: "host with CRLF", method: "GET", change: with(func(r *http.Request) { r.Host = "a\r\nX: y" })},
		{name: "IPv6 zone", method: "GET", change: with(func(r *http.Request) { r.Host = "[fe80::1%25eth0]:80" })},
		{name: "IDN", method: "GET", change: with(func(r *http.Request) { r.Host = "bücher.example" })},
		{name: "URL", method: "GET", change: with(func(r *http.Request) { r.URL.Path, r.URL.RawQuery = "/a b/ä\r\n", "x=%20&y" })},
		{name: "raw query with a space", method: "GET", change: with(func(r *http.Request) { r.URL.RawQuery = "x=\x01" })},
		{name: "closing", method: "GET", change: with(func(r *http.Request) { r.Close = true })},
		{name: "closing in the header", method: "GET", change: with(func(r *http.Request) { r.Header.Set("Connection", "close") })},
		{name: "upgrade", method: "GET", change: with(func(r *http.Request) {
			r.Header.Set("Connection", "Upgrade")
			r.Header.Set("Upgrade", "websocket")
		})},
		{name: "trailer", method: "POST", body: io.MultiReader(strings.NewReader("text")), change: with(func(r *http.Request) {
			r.Trailer = http.Header{"X-Sum": {"1"}, "X-More": nil}
		})},
		{name: "trailer with a length", method: "POST", body: strings.NewReader("text"), change: with(func(r *http.Request) { r.Trailer = http.Header{"X-Sum": {"1"}} })},
		{name: "CRLF in a value", method: "GET", change: with(func(r *http.Request) { r.Header["X"] = []string{"a\r\nY: b"} })},
		{name: "NUL in a value", method: "GET", change: with(func(r *http.Request) { r.Header["X"] = []string{"a\x00"} })},
		{name: "CRLF in the agent", method: "GET", change: with(func(r *http.Request) { r.Header["User-Agent"] = []string{"a\r\nY: b"} })},
		{name: "space in a name", method: "GET", change: with(func(r *http.Request) { r.Header["X Y"] = []string{"a"} })},
		{name: "colon in a name", method: "GET", change: with(func(r *http.Request) { r.Header["X:"] = []string{"a"} })},
		{name: "space in the method", method: "GET", change: with(func(r *http.Request) { r.Method = "GET / HTTP/1.1\r\nX: y\r\n\r\nGET" })},
		{name: "bad trailer", method: "POST", body: io.MultiReader(strings.NewReader("x")), change: with(func(r *http.Request) { r.Trailer = http.Header{"Content-Length": nil} })},
		{name: "CRLF in a trailer", method: "POST", body: io.MultiReader(strings.NewReader("x")), change: with(func(r *http.Request) { r.Trailer = http.Header{"X": {"a\r\nb"}} })},
		{name: "length without a body", method: "POST", change: with(func(r *http.Request) { r.ContentLength = 5 })},
		{name: "no header", method: "GET", change: with(func(r *http.Request) { r.Header = nil })},
		{name: "no host", method: "GET", change: with(func(r *http.Request) { r.URL.Host = "" })},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			var data []byte
			if c.body != nil {
				data, _ = io.ReadAll(c.body)
			}
			var seen []string
			eachClient(t, func(t *testing.T, rt http.RoundTripper) {
				got := make(chan string, 1)
				b := newBackend(t, func(w *wire) {
					var lines []string
					chunked := false
					for {
						line, err := w.ReadString('\n')
						if err != nil {
							return
						}
						if line == "\r\n" {
							break
						}
						chunked = chunked || line == "Transfer-Encoding: chunked\r\n"
						lines = append(lines, strings.ReplaceAll(line, w.LocalAddr().String(), "backend"))
					}
					slices.Sort(lines[1:])
					if !chunked {
						_, _ = io.ReadFull(w, make([]byte, len(data)))
					} else { // where net/http cuts its chunks is its own affair
						body, _ := io.ReadAll(newChunkedReader(w.Reader))
						lines = append(lines, string(body))
						var trailer []string
						for line, err := w.ReadString('\n'); err == nil && line != "\r\n"; line, err = w.ReadString('\n') {
							trailer = append(trailer, line)
						}
						slices.Sort(trailer)
						lines = append(lines, trailer...)
					}
					w.say(okAnswer)
					got <- strings.Join(lines, "|")
				})
				req := newRequest(t, c.method, b.url(), nil)
				body := &told{Reader: bytes.NewReader(data)}
				if c.body != nil {
					req.Body = body
					switch c.body.(type) {
					case *strings.Reader:
						req.ContentLength = int64(len(data))
					default:
						req.ContentLength = -1
					}
				}
				if c.change != nil {
					c.change(req)
				}
				res := roundTrip(rt, req)
				if c.body != nil {
					eventually(t, "the body is closed", func() bool { return body.closed.Load() > 0 })
				}
				if res == "error" {
					seen = append(seen, "refused")
					return
				}
				select {
				case text := <-got:
					seen = append(seen, text)
				case <-time.After(patience):
					t.Fatal("the backend has nothing")
				}
			})
			if len(seen) == 2 && seen[0] != seen[1] {
				t.Errorf("net/http %.600q\nwe       %.600q", seen[0], seen[1])
			}
		})
	}
}

// TestNamesInOtherCases: fields that frame a request do not get past us in another spelling, which net/http would send.
func TestNamesInOtherCases(t *testing.T) {
	t.Parallel()
	heads := make(chan http.Header, 1)
	b := newBackend(t, func(w *wire) {
		req, _, err := w.request()
		if err != nil {
			return
		}
		heads <- req.Header
		w.say(okAnswer)
	})
	req := newRequest(t, "POST", b.url(), strings.NewReader("text"))
	req.Header["transfer-encoding"] = []string{"chunked"}
	req.Header["CONTENT-LENGTH"] = []string{"0"}
	req.Header["host"] = []string{"elsewhere"}
	if got := roundTrip(newLean(t), req); !strings.Contains(got, "200") {
		t.Fatal(got)
	}
	if h := <-heads; h.Get("Content-Length") != "4" || len(h["Content-Length"]) != 1 {
		t.Errorf("header %v", h)
	}
}

// TestStreaming: bodies of any size pass in both directions, an answer while its request is still under way.
func TestStreaming(t *testing.T) {
	t.Parallel()
	eachClient(t, func(t *testing.T, rt http.RoundTripper) {
		b := newBackend(t, func(w *wire) {
			for w.echo() == nil {
			}
		})
		for _, length := range []int64{-1, 5 << 20} {
			pr, pw := io.Pipe()
			req := newRequest(t, "POST", b.url(), pr)
			req.ContentLength = length
			want := ""
			if length < 0 {
				want = "42"
				req.Trailer = http.Header{"X-Sum": nil}
			}
			within(t, "echo", func() {
				res, err := rt.RoundTrip(req) // before the body has begun: nobody writes yet
				if err != nil {
					t.Error(err)
					return
				}
				defer res.Body.Close()
				block := bytes.Repeat([]byte("abcdefgh"), 8<<10)
				in := make([]byte, len(block))
				for range (5 << 20) / len(block) {
					go func() { _, _ = pw.Write(block) }()
					if _, err := io.ReadFull(res.Body, in); err != nil || !bytes.Equal(in, block) {
						t.Errorf("block: %v", err)
						return
					}
				}
				if length < 0 {
					req.Trailer.Set("X-Sum", want)
				}
				_ = pw.Close()
				if rest, err := io.ReadAll(res.Body); len(rest) > 0 || err != nil {
					t.Errorf("%d bytes too many, %v", len(rest), err)
				}
				if got := res.Trailer.Get("X-Sum"); got != want {
					t.Errorf("trailer %q", got)
				}
			})
		}
	})
}

// echo answers a request with its body, as it comes.
func (w *wire) echo() error {
	req, err := http.ReadRequest(w.Reader)
	if err != nil {
		return err
	}
	w.say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n")
	buf := make([]byte, 8000)
	for err == nil {
		var n int
		if n, err = req.Body.Read(buf); n > 0 {
			w.say(fmt.Sprintf("%x\r\n%s\r\n", n, buf[:n]))
		}
	}
	w.say("0\r\nX-Sum: " + req.Trailer.Get("X-Sum") + "\r\n\r\n")
	return nil
}

// TestEarlyAnswer: a backend that refuses a body before it has it is heard, and the connection is not used again.
func TestEarlyAnswer(t *testing.T) {
	t.Parallel()
	eachClient(t, func(t *testing.T, rt http.RoundTripper) {
		closed := make(chan struct{}, 1)
		b := newBackend(t, func(w *wire) {
			if _, err := http.ReadRequest(w.Reader); err != nil {
				return
			}
			w.say("HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
			// And it does not read on: the body has nowhere to go.
			buf := make([]byte, 1)
			for {
				if _, err := w.Conn.Read(buf); err != nil {
					closed <- struct{}{}
					return
				}
				<-time.After(time.Millisecond) // a slow reader
			}
		})
		body := &told{Reader: io.LimitReader(endless{}, 1<<30)}
		req := newRequest(t, "POST", b.url(), body)
		req.ContentLength = 1 << 30
		within(t, "413", func() {
			if got := roundTrip(rt, req); !strings.Contains(got, `413 length 2`) || !strings.Contains(got, `"no"`) {
				t.Error(got)
			}
		})
		eventually(t, "the request's body is closed", func() bool { return body.closed.Load() > 0 })
	})
}

// endless is a body without an end.
type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// TestBodyOfAnotherLength: a body that is not as long as it should be fails the request.
func TestBodyOfAnotherLength(t *testing.T) {
	t.Parallel()
	eachClient(t, func(t *testing.T, rt http.RoundTripper) {
		for _, c := range []struct{ size, length int64 }{{4, 5}, {6, 5}, {0, 5}, {99_999, 100_000}, {100_001, 100_000}} {
			complete := make(chan bool, 1)
			b := newBackend(t, func(w *wire) {
				_, _, err := w.request()
				complete <- err == nil
				w.untilClosed()
			})
			body := &told{Reader: io.LimitReader(endless{}, c.size)}
			req := newRequest(t, "POST", b.url(), body)
			req.ContentLength = c.length
			within(t, "error", func() {
				if res, err := rt.RoundTrip(req); err == nil {
					res.Body.Close()
					t.Errorf("%+v: no error", c)
				}
			})
			eventually(t, "the body is closed", func() bool { return body.closed.Load() > 0 })
		}
	})
}

// TestBodyFails: the error of a request's body is that of the exchange.
func TestBodyFails(t *testing.T) {
	t.Parallel()
	broken := errors.New("the client has left")
	eachClient(t, func(t *testing.T, rt http.RoundTripper) {
		for _, length := range []int64{-1, 100, 100_000} {
			b := newBackend(t, func(w *wire) { _, _, _ = w.request() })
			req := newRequest(t, "POST", b.url(), io.MultiReader(strings.NewReader("x"), errorReader{broken}))
			req.ContentLength = length
			within(t, "error", func() {
				if _, err := rt.RoundTrip(req); !errors.Is(err, broken) {
					t.Errorf("length %d: %v", length, err)
				}
			})
		}
	})
}

type errorReader struct{ err error }

func (r errorReader) Read([]byte) (int, error) { return 0, r.err }

// TestExpectContinue: the body stays where it is until the backend asks for it or time is up.
func TestExpectContinue(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		wait   time.Duration
		first  string
		answer string
		body   bool
	}{
		"asked for": {time.Hour, "HTTP/1.1 100 Continue\r\n\r\n", okAnswer, true},
		"refused":   {time.Hour, "", "HTTP/1.1 417 No\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", false},
		"refused after hints": {
			time.Hour, "HTTP/1.1 103 Early Hints\r\n\r\n", "HTTP/1.1 417 No\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", false,
		},
		"not asked for":      {10 * time.Millisecond, "", okAnswer, true},
		"without a deadline": {0, "", okAnswer, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test := func(t *testing.T, rt http.RoundTripper) {
				b := newBackend(t, func(w *wire) {
					req, err := http.ReadRequest(w.Reader)
					if err != nil || req.Header.Get("Expect") != "100-continue" {
						return
					}
					w.say(c.first)
					if c.body {
						_, _ = io.ReadAll(req.Body)
					}
					w.say(c.answer)
					w.untilClosed()
				})
				body := &told{Reader: strings.NewReader("text")}
				req := newRequest(t, "POST", b.url(), body)
				req.ContentLength = 4
				req.Header.Set("Expect", "100-continue")
				within(t, name, func() {
					if got := roundTrip(rt, req); got == "error" {
						t.Error(got)
					}
				})
				eventually(t, "the body is closed", func() bool { return body.closed.Load() > 0 })
				if left := body.Reader.(*strings.Reader).Len(); c.body != (left == 0) {
					t.Errorf("%d bytes of the body are left", left)
				}
			}
			t.Run("stock", func(t *testing.T) {
				stock := &http.Transport{ExpectContinueTimeout: c.wait}
				defer stock.CloseIdleConnections()
				test(t, stock)
			})
			t.Run("lean", func(t *testing.T) { test(t, newLean(t, func(l *Client) { l.ContinueTimeout = c.wait })) })
		})
	}
}

// TestInformational: answers before the answer go to whoever wants them.
func TestInformational(t *testing.T) {
	t.Parallel()
	eachClient(t, func(t *testing.T, rt http.RoundTripper) {
		b := newBackend(t, func(w *wire) {
			for {
				if _, _, err := w.request(); err != nil {
					return
				}
				w.say("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </b>\r\n\r\n" + okAnswer)
			}
		})
		var seen []string
		refuse := errors.New("too many")
		trace := func(err error) context.Context {
			return httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
				Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
					seen = append(seen, fmt.Sprint(code, h))
					return err
				},
			})
		}
		if got := roundTrip(rt, newRequest(t, "GET", b.url(), nil).WithContext(trace(nil))); !strings.Contains(got, `"ok"`) {
			t.Error(got)
		}
		if len(seen) != 2 || seen[0] != "103 map[Link:[</a>]]" {
			t.Errorf("%v", seen)
		}
		if _, err := rt.RoundTrip(newRequest(t, "GET", b.url(), nil).WithContext(trace(refuse))); !errors.Is(err, refuse) {
			t.Errorf("err %v", err)
		}
	})
}

// TestUpgrade: after a 101 the body is the connection, in both directions, from the first byte after the head.
func TestUpgrade(t *testing.T) {
	t.Parallel()
	eachClient(t, func(t *testing.T, rt http.RoundTripper) {
		closed := make(chan struct{})
		b := newBackend(t, func(w *wire) {
			defer close(closed)
			if _, _, err := w.request(); err != nil {
				return
			}
			w.say("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\nhello")
			_, _ = io.Copy(w.Conn, w.Reader)
		})
		req := newRequest(t, "GET", b.url(), nil)
		req.Header.Set("Connection", "Upgrade")
		req.Header.Set("Upgrade", "echo")
		res, err := rt.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		rwc, ok := res.Body.(io.ReadWriteCloser)
		if !ok || res.StatusCode != 101 || res.Header.Get("Upgrade") != "echo" {
			t.Fatalf("%T %v", res.Body, res)
		}
		within(t, "echo", func() {
			buf := make([]byte, 10)
			if _, err := io.ReadFull(rwc, buf[:5]); err != nil || string(buf[:5]) != "hello" {
				t.Errorf("%q %v", buf[:5], err)
			}
			_, _ = io.WriteString(rwc, "there")
			if _, err := io.ReadFull(rwc, buf[:5]); err != nil || string(buf[:5]) != "there" {
				t.Errorf("%q %v", buf[:5], err)
			}
			if err := rwc.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
				t.Error(err)
			}
			if n, err := rwc.Read(buf); n != 0 || err != io.EOF {
				t.Errorf("%d %v", n, err)
			}
		})
		_ = rwc.Close()
		_ = rwc.Close()
		hasClosed(t, closed)
	})
}

// TestCancel: a caller that leaves gets its answer at once, and the connection is closed, wherever the exchange was.
func TestCancel(t *testing.T) {
	t.Parallel()
	left := errors.New("the caller has left")
	for name, c := range map[string]struct {
		serve func(w *wire, reached chan<- struct{})
		body  func() io.Reader
		read  bool // the answer has begun
	}{
		"waiting for the head": {serve: func(w *wire, reached chan<- struct{}) { _, _, _ = w.request(); reached <- struct{}{} }},
		"in the middle of the head": {serve: func(w *wire, reached chan<- struct{}) {
			_, _, _ = w.request()
			w.say("HTTP/1.1 200 OK\r\nX: ")
			reached <- struct{}{}
		}},
		"writing": {
			serve: func(w *wire, reached chan<- struct{}) { _, _ = w.Reader.ReadByte(); reached <- struct{}{} },
			body:  func() io.Reader { return io.LimitReader(endless{}, 1<<30) },
		},
		"reading": {read: true, serve: func(w *wire, reached chan<- struct{}) {
			_, _, _ = w.request()
			w.say("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nx")
			reached <- struct{}{}
		}},
		"reading chunks": {read: true, serve: func(w *wire, reached chan<- struct{}) {
			_, _, _ = w.request()
			w.say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nx")
			reached <- struct{}{}
		}},
	} {
		for kind, cancellable := range cancellable {
			t.Run(name+"/"+kind, func(t *testing.T) {
				t.Parallel()
				eachClient(t, func(t *testing.T, rt http.RoundTripper) {
					reached, cancelled, closed := make(chan struct{}, 1), make(chan struct{}), make(chan struct{})
					b := newBackend(t, func(w *wire) {
						defer close(closed)
						c.serve(w, reached)
						<-cancelled // a write that is blocked stays so until then
						w.untilClosed()
					})
					ctx, cancel := cancellable(t.Context())
					var body io.Reader
					method := "GET"
					if c.body != nil {
						body, method = c.body(), "POST"
					}
					req := newRequest(t, method, b.url(), body).WithContext(ctx)
					if body != nil {
						req.ContentLength = 1 << 30
					}
					go func() {
						<-reached
						if !c.read {
							cancel(left)
							close(cancelled)
						}
					}()
					within(t, name, func() {
						res, err := rt.RoundTrip(req)
						if c.read && err == nil {
							go func() { cancel(left); close(cancelled) }()
							_, err = io.ReadAll(res.Body)
							res.Body.Close()
						}
						if !errors.Is(err, left) {
							t.Errorf("err %v", err)
						}
					})
					hasClosed(t, closed)
				})
			})
		}
	}
}

// TestCancelDialing: a caller that leaves does not wait for a connection.
func TestCancelDialing(t *testing.T) {
	t.Parallel()
	c := newLean(t, func(c *Client) {
		c.Dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
			<-ctx.Done()
			return nil, errors.New("some error of dialing")
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	within(t, "dial", func() {
		body := &told{Reader: strings.NewReader("x")}
		if _, err := c.RoundTrip(newRequest(t, "POST", "http://backend/", body).WithContext(ctx)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("err %v", err)
		}
		if body.closed.Load() != 1 {
			t.Error("the body is open")
		}
	})
	if c.hostCount() != 0 {
		t.Error("a host is left")
	}
}

// TestDialError: it comes back as it is, and the body was not touched.
func TestDialError(t *testing.T) {
	t.Parallel()
	refused := errors.New("refused")
	c := newLean(t, func(c *Client) {
		c.Dial = func(context.Context, string, string) (net.Conn, error) { return nil, refused }
	})
	body := &told{Reader: strings.NewReader("text")}
	req := newRequest(t, "POST", "http://backend/", body)
	req.ContentLength = 4
	if _, err := c.RoundTrip(req); err != refused { //nolint:errorlint // as it is
		t.Errorf("err %v", err)
	}
	if n := body.Reader.(*strings.Reader).Len(); n != 4 || body.closed.Load() != 1 {
		t.Errorf("%d bytes left, closed %d times", n, body.closed.Load())
	}
}

// TestHeaderTimeout: a backend that does not begin its answer in time is given up, one that is slow in the middle is not.
func TestHeaderTimeout(t *testing.T) {
	t.Parallel()
	for _, size := range []int64{10, 100_000} {
		closed := make(chan struct{})
		b := newBackend(t, func(w *wire) {
			defer close(closed)
			if _, _, err := w.request(); err == nil && w.nth == 0 {
				w.untilClosed()
			}
		})
		c := newLean(t, func(c *Client) { c.HeaderTimeout = 50 * time.Millisecond })
		req := newRequest(t, "POST", b.url(), io.LimitReader(endless{}, size))
		req.ContentLength = size
		within(t, "timeout", func() {
			_, err := c.RoundTrip(req)
			if e, ok := errors.AsType[net.Error](err); !ok || !e.Timeout() {
				t.Errorf("err %v", err)
			}
		})
		hasClosed(t, closed)
	}
	const begun = 2 * time.Second // for an answer that is to begin in time, on a busy machine too
	b := newBackend(t, func(w *wire) {
		if _, _, err := w.request(); err == nil {
			w.say("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no")
			<-time.After(begun + soon)
			w.say("k")
		}
		w.untilClosed()
	})
	c := newLean(t, func(c *Client) { c.HeaderTimeout = begun })
	if got := roundTrip(c, newRequest(t, "GET", b.url(), nil)); !strings.Contains(got, `body "ok" trailer`) || strings.Contains(got, "broken") {
		t.Error(got)
	}
}

// TestRepeating: on a connection that was idle and turns out to be dead, what may be repeated is, once on a new one; nothing else.
func TestRepeating(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, method string
		body         string
		kept         bool // GetBody
		key          bool
		again        bool
	}{
		{name: "GET", method: "GET", again: true},
		{name: "HEAD", method: "HEAD", again: true},
		{name: "OPTIONS", method: "OPTIONS", again: true},
		{name: "POST", method: "POST"},
		{name: "PUT", method: "PUT"},
		{name: "DELETE", method: "DELETE"},
		{name: "POST with a body", method: "POST", body: "text"},
		{name: "POST with a kept body", method: "POST", body: "text", kept: true},
		{name: "GET with a body", method: "GET", body: "text"},
		{name: "GET with a kept body", method: "GET", body: "text", kept: true, again: true},
		{name: "POST with a key", method: "POST", body: "text", kept: true, key: true, again: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			eachClient(t, func(t *testing.T, rt http.RoundTripper) {
				var seen atomic.Int64
				b := newBackend(t, func(w *wire) {
					for n := 0; ; n++ {
						if _, _, err := w.request(); err != nil {
							return
						}
						if w.nth == 0 && n == 1 {
							seen.Add(1)
							return // without a word
						}
						if n > 0 || w.nth > 0 {
							seen.Add(1)
						}
						w.say("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
					}
				})
				if got := roundTrip(rt, newRequest(t, "GET", b.url(), nil)); got == "error" {
					t.Fatal(got)
				}
				var body io.Reader
				if c.body != "" {
					body = strings.NewReader(c.body)
				}
				req := newRequest(t, c.method, b.url(), body)
				if !c.kept {
					req.GetBody = nil
				}
				if c.key {
					req.Header.Set("Idempotency-Key", "1")
				}
				got := roundTrip(rt, req)
				if want := map[bool]int64{true: 2, false: 1}[c.again]; (got != "error") != c.again || seen.Load() != want {
					t.Errorf("%s, seen %d times", got, seen.Load())
				}
			})
		})
	}
}

// TestRepeatedOnce: a request that a backend has seen twice does not go on to the next idle connection.
func TestRepeatedOnce(t *testing.T) {
	t.Parallel()
	const idle = 4
	var seen atomic.Int64
	all := make(chan struct{})
	b := newBackend(t, func(w *wire) {
		if _, _, err := w.request(); err != nil {
			return
		}
		if w.nth == idle-1 {
			close(all)
		}
		<-all // so that each has a connection of its own
		w.say("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		if _, _, err := w.request(); err == nil {
			seen.Add(1) // and hangs up
		}
	})
	rt := newLean(t)
	var wg sync.WaitGroup
	for range idle {
		req := newRequest(t, "GET", b.url(), nil)
		wg.Go(func() { roundTrip(rt, req) })
	}
	wg.Wait()
	if got := roundTrip(rt, newRequest(t, "GET", b.url(), nil)); got != "error" || seen.Load() != 2 {
		t.Errorf("%s, seen %d times", got, seen.Load())
	}
}

// TestFreshConnection: a backend that hangs up on a new connection is not asked again.
func TestFreshConnection(t *testing.T) {
	t.Parallel()
	eachClient(t, func(t *testing.T, rt http.RoundTripper) {
		var seen atomic.Int64
		b := newBackend(t, func(w *wire) {
			_, _, _ = w.request()
			seen.Add(1)
		})
		if got := roundTrip(rt, newRequest(t, "GET", b.url(), nil)); got != "error" || seen.Load() != 1 {
			t.Errorf("%s, seen %d times", got, seen.Load())
		}
	})
}

// TestClosedWhileIdle: a connection that the backend has closed is not used, so that a POST does not depend on chance.
func TestClosedWhileIdle(t *testing.T) {
	t.Parallel()
	b, hangUp := newFickleBackend(t)
	c := newLean(t)
	roundTrip(c, newRequest(t, "GET", b.url(), nil))
	if c.idleCount() != 1 {
		t.Fatal("the connection was not kept")
	}
	hangUp()
	for range 50 {
		if got := roundTrip(c, newRequest(t, "POST", b.url(), strings.NewReader("text"))); !strings.Contains(got, `"ok"`) {
			t.Fatal(got)
		}
	}
	if n := b.conns.Load(); n != 2 {
		t.Errorf("%d connections", n)
	}
}

// TestCloseEarly: a body that is not read to its end takes its connection along; one that is does not.
func TestCloseEarly(t *testing.T) {
	t.Parallel()
	closed := make(chan struct{}, 10)
	b := newBackend(t, func(w *wire) {
		defer func() { closed <- struct{}{} }()
		for {
			if _, _, err := w.request(); err != nil {
				return
			}
			w.say("HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + strings.Repeat("x", 100_000))
		}
	})
	c := newLean(t)
	for _, read := range []int{0, 1, 99_999} {
		res, err := c.RoundTrip(newRequest(t, "GET", b.url(), nil))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.ReadFull(res.Body, make([]byte, read))
		_ = res.Body.Close()
		_ = res.Body.Close()
		if _, err := res.Body.Read(make([]byte, 1)); err == nil || err == io.EOF {
			t.Errorf("a read after Close: %v", err)
		}
		hasClosed(t, closed)
	}
	for range 3 {
		roundTrip(c, newRequest(t, "GET", b.url(), nil))
	}
	if n := b.conns.Load(); n != 4 {
		t.Errorf("%d connections", n)
	}
}

// TestCloseWhileReading: Close from elsewhere ends a Read that waits.
func TestCloseWhileReading(t *testing.T) {
	t.Parallel()
	eachClient(t, func(t *testing.T, rt http.RoundTripper) {
		b := newBackend(t, func(w *wire) {
			if _, _, err := w.request(); err == nil {
				w.say("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nx")
			}
			w.untilClosed()
		})
		res, err := rt.RoundTrip(newRequest(t, "GET", b.url(), nil))
		if err != nil {
			t.Fatal(err)
		}
		within(t, "read", func() {
			_, _ = io.ReadFull(res.Body, make([]byte, 1))
			go res.Body.Close()
			if _, err := res.Body.Read(make([]byte, 1)); err == nil || err == io.EOF {
				t.Errorf("err %v", err)
			}
		})
	})
}

// TestLimits: how many connections there are, and how many stay.
func TestLimits(t *testing.T) {
	t.Parallel()
	var now, most atomic.Int64
	release := make(chan struct{})
	b := newBackend(t, func(w *wire) {
		for {
			if _, _, err := w.request(); err != nil {
				return
			}
			most.Store(max(most.Load(), now.Add(1)))
			<-release
			now.Add(-1)
			w.say(okAnswer)
		}
	})
	c := newLean(t, func(c *Client) { c.MaxPerHost, c.MaxIdlePerHost = 4, 2 })
	done := make(chan string)
	for range 20 {
		go func() { done <- roundTrip(c, newRequest(t, "GET", b.url(), nil)) }()
	}
	eventually(t, "four at a time", func() bool { return now.Load() == 4 })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := c.RoundTrip(newRequest(t, "GET", b.url(), nil).WithContext(ctx)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the fifth: %v", err)
	}
	close(release)
	for range 20 {
		if got := <-done; !strings.Contains(got, `"ok"`) {
			t.Error(got)
		}
	}
	if n := most.Load(); n > 4 {
		t.Errorf("%d at a time", n)
	}
	if n := c.idleCount(); n > 2 || n == 0 {
		t.Errorf("%d idle", n)
	}
	c.Close()
	if c.idleCount() != 0 || c.hostCount() != 0 {
		t.Error("something is left")
	}
	if got := roundTrip(c, newRequest(t, "GET", b.url(), nil)); !strings.Contains(got, `"ok"`) || c.idleCount() != 0 {
		t.Errorf("after Close: %s, %d idle", got, c.idleCount())
	}
}

// TestCloseInFlight: what is under way when the client is closed ends well, and its connection is closed then.
func TestCloseInFlight(t *testing.T) {
	t.Parallel()
	here, on, closed := make(chan struct{}), make(chan struct{}), make(chan struct{})
	b := newBackend(t, func(w *wire) {
		defer close(closed)
		if _, _, err := w.request(); err == nil {
			close(here)
			<-on
			w.say(okAnswer)
		}
		w.untilClosed()
	})
	c := newLean(t)
	got := make(chan string, 1)
	go func() { got <- roundTrip(c, newRequest(t, "POST", b.url(), strings.NewReader("text"))) }()
	<-here
	c.Close()
	close(on)
	if text := <-got; !strings.Contains(text, `"ok"`) {
		t.Error(text)
	}
	hasClosed(t, closed)
}

// TestMaxIdle: the connection that has been idle for longest goes.
func TestMaxIdle(t *testing.T) {
	t.Parallel()
	serve := func(w *wire) {
		for {
			if _, _, err := w.request(); err != nil {
				return
			}
			w.say(okAnswer)
		}
	}
	one, two := newBackend(t, serve), newBackend(t, serve)
	c := newLean(t, func(c *Client) { c.MaxIdle = 1 })
	for _, b := range []*backend{one, two, one, two, two} {
		roundTrip(c, newRequest(t, "GET", b.url(), nil))
	}
	if c.idleCount() != 1 || c.hostCount() != 1 || one.conns.Load() != 2 || two.conns.Load() != 2 {
		t.Errorf("%d idle of %d hosts; %d and %d connections", c.idleCount(), c.hostCount(), one.conns.Load(), two.conns.Load())
	}
	for name, option := range map[string]func(*Client){
		"in all": func(c *Client) { c.MaxIdle = -1 }, "of a target": func(c *Client) { c.MaxIdlePerHost = -1 },
	} {
		c := newLean(t, option)
		roundTrip(c, newRequest(t, "GET", one.url(), nil))
		if c.idleCount() != 0 || c.hostCount() != 0 {
			t.Errorf("fewer than none %s: %d idle of %d hosts", name, c.idleCount(), c.hostCount())
		}
	}
}

// TestIdle: idle connections have no goroutine, and end when their time is up or the backend closes them.
func TestIdle(t *testing.T) { // alone, for it looks at all goroutines
	closed := make(chan struct{}, 10)
	b := newBackend(t, func(w *wire) {
		defer func() { closed <- struct{}{} }()
		for {
			if _, _, err := w.request(); err != nil {
				return
			}
			w.say(okAnswer)
		}
	})
	c := newLean(t, func(c *Client) { c.IdleTimeout = 50 * time.Millisecond })
	roundTrip(c, newRequest(t, "GET", b.url(), nil))
	buf := make([]byte, 1<<20)
	if stacks := string(buf[:runtime.Stack(buf, true)]); strings.Contains(stacks, "http1.(*sender)") || strings.Contains(stacks, "http1.(*exchange)") {
		t.Errorf("a goroutine is left: %s", stacks)
	}
	hasClosed(t, closed)
	eventually(t, "it is forgotten", func() bool { return c.idleCount() == 0 && c.hostCount() == 0 })
}

// TestNoKeepAlive: every connection serves once, and says so.
func TestNoKeepAlive(t *testing.T) {
	t.Parallel()
	b := newBackend(t, func(w *wire) {
		if req, _, err := w.request(); err == nil && req.Close {
			w.say(okAnswer)
		}
		w.untilClosed()
	})
	c := newLean(t, func(c *Client) { c.NoKeepAlive = true })
	for range 3 {
		if got := roundTrip(c, newRequest(t, "GET", b.url(), nil)); !strings.Contains(got, `"ok"`) {
			t.Error(got)
		}
	}
	if b.conns.Load() != 3 {
		t.Errorf("%d connections", b.conns.Load())
	}
}
