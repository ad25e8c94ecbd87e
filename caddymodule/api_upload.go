package caddymodule

import (
	"context"
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
	cancel context.CancelFunc // of the exchange

	mu      sync.Mutex
	timer   *time.Timer // nil until the first part is there
	over    bool
	stalled bool
}

// newUpload returns the context for the exchange as well.
func newUpload(ctx context.Context, limit time.Duration) (*upload, context.Context) {
	u := &upload{limit: limit}
	ctx, u.cancel = context.WithCancel(ctx)
	return u, ctx
}

// given starts the waiting: a part of the body is to be sent.
func (u *upload) given() {
	u.mu.Lock()
	defer u.mu.Unlock()
	switch {
	case u.over:
	case u.timer == nil:
		u.timer = time.AfterFunc(u.limit, u.stall)
	default:
		u.timer.Reset(u.limit)
	}
}

// taken ends the waiting: the next part is asked for, or there is none.
func (u *upload) taken() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.timer != nil {
		u.timer.Stop()
	}
}

// end says that the exchange has an answer or an error, and reports whether that is for want of a taker.
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

// uploadBody is one sending of it: net/http may begin again on another connection.
type uploadBody struct {
	*bodyReader
	upload *upload
}

// Read implements io.Reader.
func (b *uploadBody) Read(p []byte) (int, error) {
	b.upload.taken()
	n, err := b.bodyReader.Read(p)
	if n > 0 {
		b.upload.given()
	}
	return n, err
}

// Close implements io.Closer.
func (b *uploadBody) Close() error {
	b.upload.taken()
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
