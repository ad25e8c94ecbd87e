package http1

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
)

// heard is what a backend understood of one connection.
type heard struct {
	req  *http.Request
	body string
	err  error
	rest string // what came behind the request
}

// listen reads a request from a connection, answers it, and hears the connection out.
func listen(conn net.Conn) <-chan heard {
	done := make(chan heard, 1)
	go func() {
		defer conn.Close()
		r := bufio.NewReader(conn)
		var h heard
		if h.req, h.err = http.ReadRequest(r); h.err == nil {
			if h.req.Header.Get("Expect") != "" {
				_, _ = io.WriteString(conn, "HTTP/1.1 100 Continue\r\n\r\n")
			}
			var body []byte
			body, h.err = io.ReadAll(h.req.Body)
			h.body = string(body)
		}
		go func() { _, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok") }()
		rest, _ := io.ReadAll(r)
		h.rest = string(rest)
		done <- h
	}()
	return done
}

// FuzzRequest holds what we write against what was asked for: a backend understands one request, no more, whatever
// a caller puts into it, and the same one as when net/http had written it.
func FuzzRequest(f *testing.F) {
	f.Add("GET", "/a?b=c", "backend", "X-Name", "value", "", true, "")
	f.Add("POST", "/", "backend:80", "Content-Length", "7", "GET / HTTP/1.1\r\n\r\n", true, "")
	f.Add("POST", "/", "backend", "Transfer-Encoding", "chunked", "0\r\n\r\n", false, "X-Sum")
	f.Add("PUT", "/%0d%0aHost:x", "[::1%25eth0]:80", "transfer-encoding", "identity", "x", false, "Content-Length")
	f.Add("POST", "/a b", "x\r\ny", "Connection", "X-Name, close", strings.Repeat("x", inlineMax+1), true, "")
	f.Add("GET /x HTTP/1.1\r\nA:", "/", "backend", "X-Name\r\nY: z", "a\r\nContent-Length: 4", "body", true, "")
	f.Add("DELETE", "*", "backend", "Expect", "100-continue", "body", false, "x\r\ny")
	f.Fuzz(func(t *testing.T, method, path, host, name, value, body string, known bool, trailer string) {
		make := func() *http.Request {
			req := &http.Request{
				Method: method, Host: host, Header: http.Header{name: {value}}, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
				URL: &url.URL{Scheme: "http", Host: "backend:80", Path: path},
			}
			if p, query, found := strings.Cut(path, "?"); found {
				req.URL.Path, req.URL.RawQuery = p, query
			}
			if body != "" {
				req.Body = io.NopCloser(strings.NewReader(body))
				if req.ContentLength = -1; known {
					req.ContentLength = int64(len(body))
				}
			}
			if trailer != "" {
				req.Trailer = http.Header{trailer: {"v"}}
			}
			return req
		}
		ours, backend := net.Pipe()
		said := listen(backend)
		c := &Client{NoKeepAlive: true, Dial: func(context.Context, string, string) (net.Conn, error) { return ours, nil }}
		res, err := c.RoundTrip(make(), Target{Network: "tcp", Address: "backend:80"})
		if err == nil {
			_, _ = io.Copy(io.Discard, res.Body)
			_ = res.Body.Close()
		}
		_ = ours.Close()
		got := <-said
		if err != nil {
			if got.req != nil && got.err == nil {
				t.Errorf("RoundTrip: %v, and the backend got a whole request", err)
			}
			return
		}
		var wire bytes.Buffer
		if err := make().Write(&wire); err != nil {
			wire.Reset() // net/http is stricter in places
		}
		var want heard
		if want.req, want.err = http.ReadRequest(bufio.NewReader(&wire)); want.err == nil {
			var all []byte
			all, want.err = io.ReadAll(want.req.Body)
			want.body = string(all)
		}
		switch {
		case got.err != nil && want.err == nil:
			t.Fatalf("the backend does not understand it: %v", got.err)
		case got.err == nil && got.rest != "":
			t.Fatalf("behind the request came %q", got.rest)
		case got.err != nil || want.err != nil:
			return // such as a path without a slash, which net/http writes as it is
		}
		switch {
		case got.req.Method != want.req.Method, got.req.RequestURI != want.req.RequestURI, got.req.Host != want.req.Host, got.body != want.body:
			t.Errorf("got %s %q of %q with %q\nwant %s %q of %q with %q", got.req.Method, got.req.RequestURI, got.req.Host, got.body,
				want.req.Method, want.req.RequestURI, want.req.Host, want.body)
		case got.body != body:
			t.Errorf("the body %q became %q", body, got.body)
		}
		for field, values := range want.req.Header {
			if field != "Connection" && strings.Join(got.req.Header[field], "|") != strings.Join(values, "|") {
				t.Errorf("%s: got %q, want %q", field, got.req.Header[field], values)
			}
		}
		for field, values := range got.req.Header {
			if field != "Connection" && strings.Join(want.req.Header[field], "|") != strings.Join(values, "|") {
				t.Errorf("%s: got %q, want %q", field, values, want.req.Header[field])
			}
		}
	})
}
