package http1

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// sweepEvery is how often idle connections are looked over, so that what backends have closed does not hold a descriptor for long.
const sweepEvery = 10 * time.Second

// conn is a connection to a backend.
type conn struct {
	host   *host
	nc     net.Conn // what is read and written
	raw    net.Conn // what nc speaks TLS over, or nc
	gate   *gate    // of TLS
	state  *tls.ConnectionState
	reused bool
	unseen bool      // it was idle, and is to be looked at by a round
	asking *exchange // the first read is a round of
	since  time.Time // idle
	kill   func()    // close
	prober
}

// Read implements io.Reader for an exchange's reader.
func (c *conn) Read(p []byte) (int, error) {
	if e := c.asking; e != nil {
		c.asking = nil
		return c.round(e, p)
	}
	return c.nc.Read(p)
}

// close ends the connection; whoever reads or writes finds out. raw and not nc: the farewell of TLS could block.
func (c *conn) close() { _ = c.raw.Close() }

// gate is a connection below TLS that can be told not to be read.
type gate struct {
	net.Conn
	shut atomic.Bool
}

var errShut = error(&timeoutError{"nothing is read here now"})

func (g *gate) Read(p []byte) (int, error) {
	if g.shut.Load() {
		return 0, errShut
	}
	return g.Conn.Read(p)
}

// drained reports whether nothing that was read of a TLS connection is left above its socket.
func (c *conn) drained() bool {
	if c.gate == nil {
		return true
	}
	c.gate.shut.Store(true)
	var one [1]byte
	n, err := c.nc.Read(one[:])
	c.gate.shut.Store(false)
	return n == 0 && errors.Is(err, errShut)
}

// pool has the idle connections, by target. It has no goroutine: a timer looks at it while there are any.
type pool struct {
	mu     sync.Mutex
	hosts  map[Target]*host
	idle   int
	closed bool
	timer  *time.Timer // nil: none is idle
}

// host is a target that is in use or has idle connections.
type host struct {
	target Target
	idle   []*conn // the one that is idle for longest first
	users  int
	slots  chan struct{} // nil: no limit
}

// enter finds or makes the target's host, and keeps it until leave.
func (c *Client) enter(target Target) *host {
	p := &c.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	h := p.hosts[target]
	if h == nil {
		h = &host{target: target}
		if c.MaxPerHost > 0 {
			h.slots = make(chan struct{}, c.MaxPerHost)
		}
		if p.hosts == nil {
			p.hosts = make(map[Target]*host)
		}
		p.hosts[target] = h
	}
	h.users++
	return h
}

// leave gives a host up, which p.mu guards.
func (p *pool) leave(h *host) {
	h.users--
	p.forget(h)
}

func (p *pool) forget(h *host) {
	if h.users == 0 && len(h.idle) == 0 {
		delete(p.hosts, h.target)
	}
}

// take returns the connection that was idle for the shortest time, and nil if there is none.
func (p *pool) take(h *host) *conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := len(h.idle)
	if n == 0 {
		return nil
	}
	c := h.idle[n-1]
	h.idle[n-1] = nil
	h.idle = h.idle[:n-1]
	p.idle--
	return c
}

// connect returns a connection to target: an idle one that is alive or left to be looked at by a round, or a new one.
func (c *Client) connect(ctx context.Context, target Target) (*conn, error) {
	h := c.enter(target)
	if h.slots != nil {
		select {
		case h.slots <- struct{}{}:
		case <-ctx.Done():
			c.pool.mu.Lock()
			c.pool.leave(h)
			c.pool.mu.Unlock()
			return nil, context.Cause(ctx)
		}
	}
	for {
		conn := c.pool.take(h)
		if conn == nil {
			break
		}
		conn.unseen = conn.gate == nil && conn.rounds()
		if (c.IdleTimeout <= 0 || time.Since(conn.since) < c.IdleTimeout) && (conn.unseen || conn.alive()) {
			conn.reused = true
			return conn, nil
		}
		conn.close()
	}
	conn, err := c.dial(ctx, h)
	if err != nil {
		c.vacate(h)
		return nil, err
	}
	return conn, nil
}

// vacate ends the use of a host.
func (c *Client) vacate(h *host) {
	if h.slots != nil {
		<-h.slots
	}
	c.pool.mu.Lock()
	defer c.pool.mu.Unlock()
	c.pool.leave(h)
}

func (c *Client) dial(ctx context.Context, h *host) (*conn, error) {
	nc, err := c.Dial(ctx, h.target.Network, h.target.Address)
	if err != nil {
		return nil, err
	}
	conn := &conn{host: h, nc: nc, raw: nc}
	conn.kill = conn.close
	conn.prepare(nc)
	if !h.target.Secure {
		return conn, nil
	}
	if err := c.handshake(ctx, conn); err != nil {
		conn.close()
		if c.HandshakeError != nil {
			err = c.HandshakeError(err)
		}
		return nil, err
	}
	return conn, nil
}

// handshake puts TLS on top of a connection.
func (c *Client) handshake(ctx context.Context, conn *conn) error {
	cfg := c.TLS.Clone()
	cfg.ServerName = conn.host.target.ServerName
	cfg.NextProtos = []string{"http/1.1"}
	if c.HandshakeTimeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.HandshakeTimeout)
		defer cancel()
	}
	conn.gate = &gate{Conn: conn.raw}
	tc := tls.Client(conn.gate, cfg)
	if err := tc.HandshakeContext(ctx); err != nil {
		return err
	}
	state := tc.ConnectionState()
	conn.nc, conn.state = tc, &state
	return nil
}

// release ends an exchange's use of a connection. A clean one waits for another.
func (c *Client) release(conn *conn, clean bool) {
	h := conn.host
	if !clean || !conn.drained() || !conn.visible() {
		conn.close()
		c.vacate(h)
		return
	}
	conn.since = time.Now()
	if h.slots != nil {
		defer func() { <-h.slots }() // last: whoever waits is to find the connection
	}
	p := &c.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	defer p.leave(h)
	if p.closed || c.MaxIdle < 0 || c.MaxIdlePerHost < 0 || c.MaxIdlePerHost > 0 && len(h.idle) >= c.MaxIdlePerHost {
		conn.close()
		return
	}
	h.idle = append(h.idle, conn)
	p.idle++
	if c.MaxIdle > 0 && p.idle > c.MaxIdle {
		p.dropOldest()
	}
	if p.timer == nil {
		p.timer = time.AfterFunc(c.sweepEvery(), c.sweep)
	}
}

// dropOldest closes the connection that has been idle for longest.
func (p *pool) dropOldest() {
	var oldest *host
	for _, h := range p.hosts {
		if len(h.idle) > 0 && (oldest == nil || h.idle[0].since.Before(oldest.idle[0].since)) {
			oldest = h
		}
	}
	oldest.idle[0].close()
	oldest.idle = slices.Delete(oldest.idle, 0, 1)
	p.idle--
	p.forget(oldest)
}

func (c *Client) sweepEvery() time.Duration {
	if c.IdleTimeout > 0 {
		return min(c.IdleTimeout, sweepEvery)
	}
	return sweepEvery
}

// sweep closes what has been idle for too long, and what the backend has closed.
func (c *Client) sweep() {
	p := &c.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	for _, h := range p.hosts {
		n := len(h.idle)
		h.idle = slices.DeleteFunc(h.idle, func(conn *conn) bool {
			if (c.IdleTimeout <= 0 || time.Since(conn.since) < c.IdleTimeout) && conn.alive() {
				return false
			}
			conn.close()
			return true
		})
		p.idle -= n - len(h.idle)
		p.forget(h)
	}
	p.timer = nil
	if p.idle > 0 {
		p.timer = time.AfterFunc(c.sweepEvery(), c.sweep)
	}
}

// Close closes idle connections. Those in use are closed after use, and later ones too.
func (c *Client) Close() {
	p := &c.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	if p.timer != nil {
		p.timer.Stop()
		p.timer = nil
	}
	for _, h := range p.hosts {
		for _, conn := range h.idle {
			conn.close()
		}
		p.idle -= len(h.idle)
		h.idle = nil
		p.forget(h)
	}
}
