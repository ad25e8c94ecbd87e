package caddymodule

import (
	"context"
	"io"
	"math"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// errNotTaken is what a call ends with when WeChat takes nothing more of its body.
var errNotTaken error = notTakenError{}

type notTakenError struct{}

func (notTakenError) Error() string { return "WeChat took nothing more of the request's body in time" }
func (notTakenError) Timeout() bool { return true }

// upload is the sending of a call's body. It ends the exchange when nothing more of the body is asked for, for too long: over h2 each
// request may be kept from sending while its connection goes on. How long the caller takes for a part of it does not count.
type upload struct {
	limit  time.Duration
	last   time.Duration      // the limit once all of the body was asked for: WeChat's time to answer is in it
	cancel context.CancelFunc // of the exchange
	first  uploadBody

	mu      sync.Mutex
	timer   *time.Timer // nil until the first part is there
	of      *uploadBody // the last sending that was begun
	resent  time.Time   // when the second sending was begun, if one was
	over    bool
	stalled bool
}

// newUpload returns the context for the exchange as well. Answer is how long WeChat may take for its answer.
func newUpload(ctx context.Context, limit, answer time.Duration) (*upload, context.Context) {
	u := &upload{limit: limit, last: limit + answer}
	ctx, u.cancel = context.WithCancel(ctx)
	return u, ctx
}

// body is one sending of the body: net/http may begin again on another connection.
func (u *upload) body(of *bodyReader) *uploadBody {
	b := &u.first
	if b.upload != nil {
		b = new(uploadBody)
	}
	b.bodyReader, b.upload = of, u
	u.mu.Lock()
	defer u.mu.Unlock()
	u.of = b
	return b
}

// again is body for a sending that is not the first. WeChat may refuse one after the other over h2, and net/http pauses for longer each
// time: none begins later after the second one than an answer would have had to. What came before was the caller's time too.
func (u *upload) again(of *bodyReader) (io.ReadCloser, error) {
	u.mu.Lock()
	if u.resent.IsZero() {
		u.resent = time.Now()
	}
	late := time.Since(u.resent) > u.last-u.limit
	u.mu.Unlock()
	if late {
		return nil, errNotTaken
	}
	return u.body(of), nil
}

// given starts the waiting: a part of the body is to be sent, or its end.
func (u *upload) given(by *uploadBody, limit time.Duration) {
	u.mu.Lock()
	defer u.mu.Unlock()
	switch {
	case u.over, u.of != by:
	case u.timer == nil:
		u.timer = time.AfterFunc(limit, u.stall)
	default:
		u.timer.Reset(limit)
	}
}

// taken ends the waiting: the next part is asked for, or nothing more.
func (u *upload) taken(by *uploadBody) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.timer != nil && u.of == by {
		u.timer.Stop()
	}
}

// end says that the exchange has an answer or an error, and reports whether it was ended for want of a taker.
func (u *upload) end() (stalled bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.over = true
	if u.timer != nil {
		u.timer.Stop()
	}
	return u.stalled
}

func (u *upload) stall() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if !u.over {
		u.stalled = true
		u.cancel()
	}
}

// uploadPart is how much of a body is given at once, in bytes: in a limit's time so much has to be taken. net/http asks for up to
// 512 KiB.
const uploadPart = 32 << 10

// uploadBody is one sending of a call's body.
type uploadBody struct {
	*bodyReader
	upload *upload
}

// Read implements io.Reader.
func (b *uploadBody) Read(p []byte) (int, error) {
	b.upload.taken(b)
	n, err := b.bodyReader.Read(p[:min(len(p), uploadPart)])
	switch {
	case err == io.EOF: // net/http may have read ahead: over h2 the last part is still to be sent
		b.upload.given(b, b.upload.last)
	case n > 0:
		b.upload.given(b, b.upload.limit)
	}
	return n, err
}

// Close implements io.Closer.
func (b *uploadBody) Close() error {
	b.upload.taken(b)
	return b.bodyReader.Close()
}

// takenConn is a connection to WeChat whose writes fail when nothing is taken of them for the limit, or up to a fourth longer: a
// deadline that is set for each write, as the option write_timeout of Caddy's transport does, costs half a microsecond a call.
type takenConn struct {
	net.Conn
	limit time.Duration
	began time.Time
	until atomic.Int64 // the deadline, in nanoseconds since then
}

func newTakenConn(conn net.Conn, limit time.Duration) *takenConn {
	return &takenConn{Conn: conn, limit: limit, began: time.Now()}
}

// Write implements io.Writer.
func (c *takenConn) Write(p []byte) (int, error) {
	now := time.Since(c.began)
	if until := time.Duration(c.until.Load()); until < now+c.limit {
		until = now + c.limit + c.limit/4
		c.until.Store(int64(until))
		if err := c.Conn.SetWriteDeadline(c.began.Add(until)); err != nil {
			return 0, err
		}
	}
	return c.Conn.Write(p)
}

// SetWriteDeadline implements net.Conn. Whoever has a deadline of their own for a write, as crypto/tls has for its last one, has it.
func (c *takenConn) SetWriteDeadline(t time.Time) error {
	c.leave(t)
	return c.Conn.SetWriteDeadline(t)
}

// SetDeadline implements net.Conn.
func (c *takenConn) SetDeadline(t time.Time) error {
	c.leave(t)
	return c.Conn.SetDeadline(t)
}

func (c *takenConn) leave(t time.Time) {
	var until int64
	if !t.IsZero() {
		until = math.MaxInt64
	}
	c.until.Store(until)
}
