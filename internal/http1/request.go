package http1

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http/httpguts"
)

// bodyMode is how a request's body leaves.
type bodyMode int

const (
	bodiless bodyMode = iota
	inline            // with the head
	streamed          // by a goroutine
	sniffed           // by a goroutine, unless it turns out to be empty
)

// outgoing is a request on its way out.
type outgoing struct {
	req    *http.Request
	method string
	mode   bodyMode
	length int64   // of the body; -1: unknown
	buf    *[]byte // the head, and an inline body
	last   bool    // the request ends its connection
	expect bool    // the body waits for 100 Continue

	touched bool // the body was read from
	wrote   bool // something was written to a connection
	first   *chunk
	chunked []byte // what the head of a sniffed request says if there is a body
	shut    bool   // the body was closed
}

// prepare checks a request and writes its head into a buffer. With closing, its connection is not to be kept.
func (o *outgoing) prepare(req *http.Request, closing bool) error {
	if o.req, o.method = req, req.Method; o.method == "" {
		o.method = http.MethodGet
	}
	switch {
	case req.URL == nil:
		return errors.New("the request has no URL")
	case req.Header == nil:
		return errors.New("the request has no header")
	case !httpguts.ValidHeaderFieldName(o.method): // a method is a token as well
		return fmt.Errorf("invalid method %q", o.method)
	case o.method == http.MethodConnect:
		return errors.New("CONNECT is for tunnels, which this client does not make")
	case req.URL.Host == "":
		return errors.New("the request's URL has no host")
	case req.ContentLength != 0 && req.Body == nil:
		return fmt.Errorf("the request has a length of %d and no body", req.ContentLength)
	}
	o.classify()
	o.buf = buffers.Get().(*[]byte)
	b, err := o.appendHead((*o.buf)[:0], closing)
	*o.buf = b
	if err != nil {
		o.free()
		return err
	}
	return nil
}

// free gives the buffer back.
func (o *outgoing) free() {
	if cap(*o.buf) <= keepBuffer {
		buffers.Put(o.buf)
	}
	o.buf = nil
}

// classify decides how the body leaves.
func (o *outgoing) classify() {
	req := o.req
	if req.Body == nil || req.Body == http.NoBody {
		return
	}
	o.length = req.ContentLength
	if o.length == 0 {
		o.length = -1 // not said
	}
	o.expect = httpguts.HeaderValuesContainsToken(req.Header["Expect"], "100-continue")
	switch {
	case o.length < 0 && lacksBody(o.method):
		o.mode = sniffed
	case o.expect || o.length < 0 || o.length > inlineMax:
		o.mode = streamed
	case req.GetBody != nil || req.ProtoMajor < 2:
		// The body is at hand, or comes over HTTP/1, where a server's answer does not leave before the request is read.
		o.mode = inline
	default:
		o.mode = streamed
	}
}

// lacksBody are methods whose requests have a body so seldom that an empty one is better not mentioned.
func lacksBody(method string) bool {
	switch method {
	case "GET", "HEAD", "DELETE", "OPTIONS", "PROPFIND", "SEARCH":
		return true
	}
	return false
}

// appendHead writes the request line and the header.
func (o *outgoing) appendHead(b []byte, closing bool) ([]byte, error) {
	req := o.req
	host, err := hostOf(req)
	if err != nil {
		return b, err
	}
	uri := req.URL.RequestURI()
	for i := range len(uri) {
		if uri[i] <= ' ' || uri[i] == 0x7f {
			return b, errors.New("the request's URL has a space or a control character")
		}
	}
	b = append(b, o.method...)
	b = append(b, ' ')
	b = append(b, uri...)
	b = append(b, " HTTP/1.1\r\nHost: "...)
	b = append(b, host...)
	b = append(b, '\r', '\n')
	if _, said := req.Header["User-Agent"]; !said {
		b = append(b, "User-Agent: Go-http-client/1.1\r\n"...)
	}
	if b, err = o.appendFraming(b); err != nil {
		return b, err
	}
	for name, values := range req.Header {
		if framing(name) {
			continue
		}
		if !httpguts.ValidHeaderFieldName(name) {
			return b, fmt.Errorf("invalid header field name %q", name)
		}
		if name == "User-Agent" && len(values) > 0 {
			if values = values[:1]; values[0] == "" {
				continue
			}
		}
		for _, v := range values {
			if !httpguts.ValidHeaderFieldValue(v) {
				return b, fmt.Errorf("invalid header field value for %q", name) // the value may be a secret
			}
			b = append(b, name...)
			b = append(b, ':', ' ')
			b = append(b, trimOWS(v)...)
			b = append(b, '\r', '\n')
		}
	}
	said := httpguts.HeaderValuesContainsToken(req.Header["Connection"], "close")
	o.last = said || req.Close
	if !said && (req.Close || closing && !httpguts.HeaderValuesContainsToken(req.Header["Connection"], "upgrade")) {
		b = append(b, "Connection: close\r\n"...)
	}
	if o.mode == sniffed { // which of the two is said is found out later, when the body's trailer may be written to
		o.chunked, err = o.appendChunked(nil)
		return b, err
	}
	return append(b, '\r', '\n'), nil
}

// appendFraming writes what says where the body ends.
func (o *outgoing) appendFraming(b []byte) ([]byte, error) {
	switch {
	case o.mode == sniffed:
		return b, nil
	case o.mode == bodiless:
		if o.method == "POST" || o.method == "PUT" || o.method == "PATCH" {
			b = append(b, "Content-Length: 0\r\n"...)
		}
		return b, nil
	case o.length >= 0:
		b = append(b, "Content-Length: "...)
		b = strconv.AppendInt(b, o.length, 10)
		return append(b, '\r', '\n'), nil
	}
	return o.appendChunked(b)
}

func (o *outgoing) appendChunked(b []byte) ([]byte, error) {
	b = append(b, "Transfer-Encoding: chunked\r\n"...)
	if len(o.req.Trailer) == 0 {
		return b, nil
	}
	names := make([]string, 0, len(o.req.Trailer))
	for name, values := range o.req.Trailer {
		if err := checkTrailer(name, values); err != nil {
			return b, err
		}
		names = append(names, http.CanonicalHeaderKey(name))
	}
	slices.Sort(names)
	b = append(b, "Trailer: "...)
	b = append(b, strings.Join(names, ",")...)
	return append(b, '\r', '\n'), nil
}

// checkTrailer reports what is wrong with a field of a trailer.
func checkTrailer(name string, values []string) error {
	if !httpguts.ValidHeaderFieldName(name) || framing(name) {
		return fmt.Errorf("invalid trailer field name %q", name)
	}
	for _, v := range values {
		if !httpguts.ValidHeaderFieldValue(v) {
			return fmt.Errorf("invalid trailer field value for %q", name)
		}
	}
	return nil
}

// framing are fields that the client writes itself, in whatever case others spell them.
func framing(name string) bool {
	switch len(name) {
	case len("Host"):
		return strings.EqualFold(name, "Host")
	case len("Trailer"):
		return strings.EqualFold(name, "Trailer")
	case len("Content-Length"):
		return strings.EqualFold(name, "Content-Length")
	case len("Transfer-Encoding"):
		return strings.EqualFold(name, "Transfer-Encoding")
	}
	return false
}

// hostOf is what goes into the Host field. As with net/http, one that is no host is left empty: a path of a Unix socket is none.
func hostOf(req *http.Request) (string, error) {
	host := req.Host
	if host == "" {
		host = req.URL.Host
	}
	host, err := httpguts.PunycodeHostPort(host)
	if err != nil {
		return "", fmt.Errorf("invalid host: %w", err)
	}
	if !httpguts.ValidHostHeader(host) {
		return "", nil
	}
	return withoutZone(host), nil
}

// withoutZone removes the zone of an IPv6 address, which means nothing elsewhere.
func withoutZone(host string) string {
	if !strings.HasPrefix(host, "[") {
		return host
	}
	end := strings.LastIndexByte(host, ']')
	if end < 0 {
		return host
	}
	if zone := strings.LastIndexByte(host[:end], '%'); zone >= 0 {
		return host[:zone] + host[end:]
	}
	return host
}

func trimOWS(s string) string {
	for len(s) > 0 && (s[0] == ' ' || s[0] == '\t') {
		s = s[1:]
	}
	for len(s) > 0 && (s[len(s)-1] == ' ' || s[len(s)-1] == '\t') {
		s = s[:len(s)-1]
	}
	return s
}

// harmless reports whether the request may be sent a second time although a backend may have seen it.
func (o *outgoing) harmless() bool {
	if o.mode != bodiless && o.req.GetBody == nil || o.mode == streamed || o.mode == sniffed {
		return false
	}
	switch o.method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace:
		return true
	}
	// Whoever sets one of these says that the backend knows a second time for what it is.
	return o.req.Header["Idempotency-Key"] != nil || o.req.Header["X-Idempotency-Key"] != nil
}

// closeBody closes the request's body, once.
func (o *outgoing) closeBody() {
	if !o.shut {
		o.shut = true
		closeBody(o.req)
	}
}

// leave ends the use of the request's body: whoever gets an error may send the request once more.
func (o *outgoing) leave() {
	if o.first != nil {
		<-o.first.done
	}
	o.closeBody()
}

// readInline puts an inline body behind the head.
func (o *outgoing) readInline() error {
	o.touched = true
	b := *o.buf
	head := len(b)
	b = slices.Grow(b, int(o.length)+1)
	// One byte more than there should be, so that the body is read to its end, which is when a trailer is known.
	n, err := io.ReadFull(o.req.Body, b[head:head+int(o.length)+1])
	*o.buf = b[:head+n]
	o.closeBody()
	switch {
	case err == nil:
		return fmt.Errorf("the request's body is longer than its length of %d", o.length)
	case err != io.EOF && err != io.ErrUnexpectedEOF:
		return err
	case int64(n) != o.length:
		return fmt.Errorf("the request's body has %d bytes where its length is %d", n, o.length)
	}
	return nil
}

// chunk is the first read from a body.
type chunk struct {
	data []byte
	err  error
	n    int
	done chan struct{}
}

// sniff waits a little for a body of unknown length, and makes a request without a body of it if it is empty.
func (o *outgoing) sniff(ctx context.Context) error {
	o.touched = true
	first := &chunk{data: make([]byte, defaultReadBuffer), done: make(chan struct{})}
	o.first = first
	go func(body io.Reader) {
		defer close(first.done)
		for first.n == 0 && first.err == nil {
			first.n, first.err = body.Read(first.data)
		}
	}(o.req.Body)
	timer := time.NewTimer(sniffWait)
	defer timer.Stop()
	select {
	case <-first.done:
		if first.n == 0 && first.err == io.EOF {
			o.mode, o.length = bodiless, 0
			o.closeBody()
			*o.buf = append(*o.buf, '\r', '\n')
			return nil
		}
	case <-timer.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	*o.buf = append(append(*o.buf, o.chunked...), '\r', '\n')
	return nil
}

// reader is the body from its beginning.
func (o *outgoing) reader() io.Reader {
	if o.first == nil {
		return o.req.Body
	}
	return &sniffedReader{first: o.first, rest: o.req.Body}
}

// sniffedReader gives the first read of a body once more.
type sniffedReader struct {
	first *chunk
	data  *bytes.Reader
	rest  io.Reader
}

func (r *sniffedReader) Read(p []byte) (int, error) {
	if r.data == nil {
		<-r.first.done
		r.data = bytes.NewReader(r.first.data[:r.first.n])
	}
	if r.data.Len() > 0 {
		return r.data.Read(p)
	}
	if r.first.err != nil {
		return 0, r.first.err
	}
	return r.rest.Read(p)
}
