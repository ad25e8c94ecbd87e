// Package http1 is an HTTP/1.1 client for proxies that costs little CPU: an exchange is driven by the goroutine that asked for it. net/http's
// has two goroutines for each connection and wakes them, and the caller, several times a request, which is a third of what a proxied request costs.
//
// What it does not do, so that it can do the rest in one goroutine: HTTP/2, forward proxies, decompression, cookies, redirects.
//
// How an exchange goes. A request without a body, or with a small one of known length, leaves in one write, and its answer is read by the
// same goroutine. A body that may have to be waited for is sent by a goroutine that lives as long as the body, so that an answer can come
// before the request is through. An idle connection has no goroutine and no buffers; before it is used again it is looked at whether the
// backend has closed it or said something unasked, and where that can be, look, write and first read are one use of the descriptor (round).
// What is read is held to the letter of RFC 9112, but for what net/http takes and old backends send: heads with bare LFs and folded fields, and a
// Content-Length beside chunks. These mean what they mean to net/http, and end their connection, so that no other answer can be mistaken
// for a part of theirs. What else two readers might understand in two ways is an error.
package http1

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"sync"
	"time"
)

// Defaults and limits.
const (
	defaultMaxHeader  = 10 << 20 // bytes of a head, as net/http
	defaultReadBuffer = 4 << 10
	maxHeaderFields   = 1000
	maxTrailer        = 4 << 10 // bytes
	// inlineMax is how long a body may be to leave in one write with its head. A kernel takes that much without a reader at the other end.
	inlineMax = 16 << 10
	// keepBuffer is the size up to which a buffer of a request is kept for another.
	keepBuffer = 64 << 10
	// sendGrace is how long a request may go on being sent after its answer is complete, or an answer be waited for after sending failed.
	sendGrace = 50 * time.Millisecond
	// closedGrace is how long a write may take to notice that its connection was closed.
	closedGrace = 5 * time.Millisecond
	// lookAgain is how old the look at an idle connection may be when the request is written.
	lookAgain = 10 * time.Millisecond
	// sniffWait is how long a GET and the like wait to see whether their body of unknown length is empty, as in net/http.
	sniffWait = 200 * time.Millisecond
)

// Target is what a connection leads to. A connection serves requests to its own target only.
type Target struct {
	Network, Address string
	// Secure is for TLS, with ServerName as the name that the certificate has to be for.
	Secure     bool
	ServerName string
}

// Client sends requests. Its fields are not changed once it is in use.
type Client struct {
	// Dial opens a connection. Its errors are returned as they are.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// TLS is for targets that are secure; each gets a copy.
	TLS              *tls.Config
	HandshakeTimeout time.Duration
	// HandshakeError, if set, makes what is returned of a failed handshake.
	HandshakeError func(error) error

	NoKeepAlive    bool
	IdleTimeout    time.Duration // 0: forever
	MaxIdle        int           // 0: no limit; negative: none is kept
	MaxIdlePerHost int           // 0: no limit; negative: none is kept
	MaxPerHost     int           // connections to a target; 0: no limit

	HeaderTimeout   time.Duration // from the end of the request to the end of the answer's head; 0: none
	ContinueTimeout time.Duration // how long a request with Expect: 100-continue keeps its body back
	MaxHeader       int           // bytes of an answer's head; 0: 10 MiB
	ReadBuffer      int           // 0: 4 KiB

	pool    pool
	readers sync.Pool
}

// buffers are requests on their way out.
var buffers = sync.Pool{New: func() any { b := make([]byte, 0, 4<<10); return &b }}

// Errors of an exchange that are not the network's.
var (
	ErrHeaderTimeout = error(&timeoutError{"timeout awaiting response headers"})
	ErrHeaderTooLong = errors.New("the answer's head is longer than max_response_header_size")
	ErrTooManyFields = fmt.Errorf("the answer's head has more than %d fields", maxHeaderFields)
	errReadClosed    = errors.New("read on a closed response body")
	errStale         = errors.New("an idle connection was closed, or something was said on it unasked")
)

type timeoutError struct{ text string }

func (e *timeoutError) Error() string { return e.text }
func (*timeoutError) Timeout() bool   { return true }
func (*timeoutError) Temporary() bool { return true }

// RoundTrip sends req to target and returns the answer as soon as its head is there. It keeps http.RoundTripper's contract.
func (c *Client) RoundTrip(req *http.Request, target Target) (*http.Response, error) {
	e := &exchange{client: c, ctx: req.Context()}
	if err := e.out.prepare(req, c.NoKeepAlive); err != nil {
		closeBody(req)
		return nil, err
	}
	for again := false; ; {
		res, err := e.try(target)
		if err == nil {
			e.out.free()
			return res, nil
		}
		if e.conn == nil || !e.conn.reused || !e.mayRepeat(err) || e.out.wrote && again {
			e.out.leave()
			e.out.free()
			return nil, err
		}
		again = again || e.out.wrote // once: a request that brings connections down is not to have them all
		e = &exchange{client: c, ctx: e.ctx, out: e.out}
		e.out.wrote = false
	}
}

// try gets a connection for the exchange and runs it there.
func (e *exchange) try(target Target) (*http.Response, error) {
	if e.ctx.Err() != nil {
		return nil, context.Cause(e.ctx)
	}
	conn, err := e.client.connect(e.ctx, target)
	switch {
	case err == nil:
		e.conn = conn
		return e.run()
	case e.ctx.Err() != nil:
		return nil, context.Cause(e.ctx)
	case e.out.touched:
		// The body is used up: whoever tries again after an error of dialing would send half a request.
		return nil, fmt.Errorf("no connection for a second try: %v", err) //nolint:errorlint // see above
	}
	return nil, err
}

// exchange is a request on a connection, and its answer. It is the answer's body as well.
type exchange struct {
	res    http.Response
	client *Client
	out    outgoing
	ctx    context.Context
	conn   *conn
	br     *bufio.Reader
	ender  Ender       // which watches over ctx, or
	unhook func() bool // ends the watch over it
	sender *sender     // nil: all was sent before anything was read

	sent bool // what leaves in the first write
	last bool // the connection ends with this exchange

	mu       sync.Mutex
	gotHead  bool
	timer    *time.Timer // of HeaderTimeout
	timedOut bool
	reading  bool
	closed   bool
	err      error // what Read has ended with

	// What is left of the body.
	kind    bodyKind
	left    int64
	chunked io.Reader
	landed  bool // the body is in br, all of it, and the connection has gone on
}

// run sends the request and reads the answer's head. After an error the connection is closed.
func (e *exchange) run() (*http.Response, error) {
	e.hook()
	e.last = e.out.last || e.client.NoKeepAlive
	var err error
	if e.conn.unseen {
		err = e.ask()
	} else {
		err = e.gather(func() bool { return !e.conn.reused || e.conn.alive() })
		if err == nil {
			err = e.send()
		}
	}
	if err == nil {
		err = e.readHead()
	}
	if err != nil {
		return nil, e.fail(err)
	}
	return &e.res, nil
}

// Ender is a context that has something done when it ends. It does so for one at a time, and for less than context.AfterFunc takes.
type Ender interface {
	context.Context
	// OnEnd has f called, on a goroutine of its own, when the context ends. False: it has ended, or there is another f.
	OnEnd(f func()) bool
	// Forget reports whether it was in time for f not to be called.
	Forget() bool
}

// EnderKey is under what contexts that are made of an Ender have it.
type EnderKey struct{}

// hook has the connection closed when the context ends.
func (e *exchange) hook() {
	done := e.ctx.Done()
	if done == nil {
		return
	}
	// One that ends later than ctx does not help.
	if ender, ok := e.ctx.Value(EnderKey{}).(Ender); ok && ender.Done() == done && ender.OnEnd(e.conn.kill) {
		e.ender = ender
		return
	}
	e.unhook = context.AfterFunc(e.ctx, e.conn.kill)
}

// hasEnded reports whether the context has ended, and the connection is being closed for that; from now on it is not. It is called once, for
// the Ender may be another exchange's then.
func (e *exchange) hasEnded() bool {
	if e.ender != nil {
		return !e.ender.Forget()
	}
	return e.unhook != nil && !e.unhook()
}

// fail ends an exchange that has no answer, and says why.
func (e *exchange) fail(err error) error {
	e.client.release(e.conn, false)
	if e.sender != nil {
		// Whoever gets the error may do with the request what he likes, so the sender has to be done with it.
		e.sender.stop()
		<-e.sender.done
		if cause := e.sender.cause(); cause != nil {
			err = cause
		}
	}
	if e.br != nil {
		e.client.putReader(e.br)
		e.br = nil
	}
	timedOut := e.stopTimer()
	e.hasEnded()
	switch {
	case e.ctx.Err() != nil:
		return context.Cause(e.ctx)
	case timedOut:
		return ErrHeaderTimeout
	}
	return err
}

// ask makes a round: it sends the request, and returns when there is something of an answer.
func (e *exchange) ask() error {
	e.conn.asking = e
	e.br = e.client.getReader(e.conn)
	_, err := e.br.Peek(1)
	if err != nil && e.sent {
		return &noAnswerError{err}
	}
	return err
}

// gather reads the body that goes with the head, or looks whether there is one. If that takes its time, whether the connection is still alive
// is asked again.
func (e *exchange) gather(alive func() bool) error {
	var read func() error
	switch o := &e.out; {
	case o.touched:
		return nil
	case o.mode == inline:
		read = o.readInline
	case o.mode == sniffed:
		read = func() error { return o.sniff(e.ctx) }
	default:
		return nil
	}
	began := time.Now()
	if err := read(); err != nil {
		return err
	}
	if time.Since(began) > lookAgain && !alive() {
		return errStale
	}
	return nil
}

// send sends the head, and as much of the body as goes with it.
func (e *exchange) send() error {
	o := &e.out
	n, err := e.conn.nc.Write(*o.buf)
	if err != nil {
		o.wrote = n > 0
		return &writeError{err}
	}
	o.wrote, e.sent = true, true
	switch o.mode {
	case streamed, sniffed:
		e.sender = o.startSender(e)
	default:
		e.watch()
	}
	return nil
}

// writeError is a failed write of a request's head.
type writeError struct{ err error }

func (e *writeError) Error() string { return "write the request: " + e.err.Error() }
func (e *writeError) Unwrap() error { return e.err }

// watch starts HeaderTimeout, unless the head is there.
func (e *exchange) watch() {
	d := e.client.HeaderTimeout
	if d <= 0 {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.gotHead {
		e.timer = time.AfterFunc(d, func() {
			e.mu.Lock()
			late := !e.gotHead
			e.timedOut = late
			e.mu.Unlock()
			if late {
				e.conn.close()
			}
		})
	}
}

// stopTimer ends HeaderTimeout and reports whether it was over already.
func (e *exchange) stopTimer() bool {
	if e.client.HeaderTimeout <= 0 {
		return false
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.gotHead = true
	if e.timer != nil {
		e.timer.Stop()
	}
	return e.timedOut
}

// readHead reads heads until one is the answer's.
func (e *exchange) readHead() error {
	c := e.client
	if e.br == nil {
		e.br = c.getReader(e.conn)
	}
	trace := httptrace.ContextClientTrace(e.ctx)
	most := c.MaxHeader
	if most <= 0 {
		most = defaultMaxHeader
	}
	limit := most
	for first := true; ; first = false {
		block, fields, odd, err := readBlock(e.br, limit, true)
		if err != nil {
			if !first {
				err = unanswered(err)
			}
			return err
		}
		if odd, err = parseHead(&e.res, block, fields, odd); err != nil {
			return err
		}
		e.last = e.last || odd
		code := e.res.StatusCode
		if code >= 200 || code == http.StatusSwitchingProtocols {
			break
		}
		// It has no body, but one that could be read in two ways is refused as in any other head, and one that is announced might come.
		if _, err := frame(&e.res, e.out.method); err != nil {
			return err
		}
		e.last = e.last || e.res.ContentLength > 0 || e.res.TransferEncoding != nil
		if code == http.StatusContinue && e.sender != nil && e.sender.proceed != nil {
			if trace != nil && trace.Got100Continue != nil {
				trace.Got100Continue()
			}
			e.sender.goOn(true)
		}
		limit -= len(block)
		if trace != nil && trace.Got1xxResponse != nil {
			if err := trace.Got1xxResponse(code, textproto.MIMEHeader(e.res.Header)); err != nil {
				return err
			}
			limit = most // whoever takes them limits them
		}
		e.res = http.Response{}
	}
	if e.stopTimer() {
		return ErrHeaderTimeout
	}
	return e.start()
}

// start makes the answer's body.
func (e *exchange) start() error {
	res := &e.res
	res.Request = e.out.req
	res.TLS = e.conn.state
	kind, err := frame(res, e.out.method)
	if err != nil {
		return err
	}
	e.last = e.last || res.Close || res.StatusCode == http.StatusSwitchingProtocols
	if e.sender != nil && e.sender.proceed != nil {
		e.sender.goOn(!e.last)
	}
	e.kind, e.left = kind, res.ContentLength
	switch {
	case kind == bodyUpgrade:
		res.Body = &upgraded{e: e}
	case kind == bodyNone:
		res.Body = http.NoBody
		e.finish(e.settle())
		e.freeReader()
	case kind == bodyLength && e.left <= int64(e.br.Buffered()) && (e.sender == nil || e.sender.isDone()):
		res.Body = e
		e.landed = true
		e.finish(e.left == int64(e.br.Buffered()))
	default:
		if kind == bodyChunked {
			e.chunked = newChunkedReader(e.br)
		}
		res.Body = e
	}
	return nil
}

// settle has the sender settled, if there is one, which may wait for e.mu, and reports whether the connection is still open.
func (e *exchange) settle() bool { return e.sender == nil || e.sender.settle(e.last) }

// finish ends the exchange on the connection, once: clean says that the answer was read to its end, and nothing after it.
func (e *exchange) finish(clean bool) {
	if e.hasEnded() {
		clean = false
	}
	if e.last || !e.landed && e.br.Buffered() > 0 {
		clean = false
	}
	if e.sender != nil {
		e.sender.answered(clean)
		return
	}
	e.client.release(e.conn, clean)
}

func (e *exchange) freeReader() {
	if e.br != nil {
		e.client.putReader(e.br)
		e.br = nil
	}
}

// mayRepeat reports whether a request that failed on a connection that was idle may go to another one: when nothing of it was
// written, or, as RFC 9110 has it in 9.2.2, when the connection ended without a byte of an answer and repeating does no harm.
func (e *exchange) mayRepeat(err error) bool {
	if err == errStale { //nolint:errorlint // it is not wrapped
		return true
	}
	if _, ok := errors.AsType[*writeError](err); ok && !e.out.wrote {
		return true
	}
	if _, ok := errors.AsType[*noAnswerError](err); !ok {
		return false
	}
	return e.out.harmless()
}

func (c *Client) getReader(r io.Reader) *bufio.Reader {
	if br, ok := c.readers.Get().(*bufio.Reader); ok {
		br.Reset(r)
		return br
	}
	size := c.ReadBuffer
	if size <= 0 {
		size = defaultReadBuffer
	}
	return bufio.NewReaderSize(r, size)
}

func (c *Client) putReader(br *bufio.Reader) {
	br.Reset(nil)
	c.readers.Put(br)
}

func closeBody(req *http.Request) {
	if req.Body != nil {
		_ = req.Body.Close()
	}
}
