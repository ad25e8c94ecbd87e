package http1

import (
	"context"
	"io"
	"net"
	"testing"
	"time"
)

// only is the client's only host.
func (c *Client) only(t *testing.T) *host {
	t.Helper()
	c.pool.mu.Lock()
	defer c.pool.mu.Unlock()
	for _, h := range c.pool.hosts {
		return h
	}
	t.Fatal("there is no host")
	return nil
}

// TestIdleForTooLong: a connection whose time is up is not used, whether the sweep has come by or not.
func TestIdleForTooLong(t *testing.T) {
	t.Parallel()
	b := newBackend(t, func(w *wire) {
		for {
			if _, _, err := w.request(); err != nil {
				return
			}
			w.say(okAnswer)
		}
	})
	c := newLean(t, func(c *Client) { c.IdleTimeout = time.Hour })
	warm(t, c, b.url())
	h := c.only(t)
	c.pool.mu.Lock()
	h.idle[0].since = time.Now().Add(-time.Hour)
	c.pool.mu.Unlock()
	warm(t, c, b.url())
	if n := b.conns.Load(); n != 2 || c.idleCount() != 1 {
		t.Errorf("%d connections, %d idle", n, c.idleCount())
	}
}

// TestSweep: what the backend has closed does not wait for its time to be up.
func TestSweep(t *testing.T) {
	t.Parallel()
	b, hangUp := newFickleBackend(t)
	c := newLean(t, func(c *Client) { c.IdleTimeout = time.Hour })
	warm(t, c, b.url())
	if c.sweep(); c.idleCount() != 1 {
		t.Error("a connection that is alive was closed")
	}
	hangUp()
	eventually(t, "it is forgotten", func() bool { c.sweep(); return c.idleCount() == 0 && c.hostCount() == 0 })
}

// TestNotKeptUnseen: a connection that cannot be looked at is not kept: what is said on it unasked would be the next answer.
func TestNotKeptUnseen(t *testing.T) {
	t.Parallel()
	b, hangUp := newFickleBackend(t)
	defer hangUp()
	c := newLean(t, func(c *Client) {
		dial := c.Dial
		c.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			nc, err := dial(ctx, network, address)
			return struct{ net.Conn }{nc}, err
		}
	})
	warm(t, c, b.url())
	if c.idleCount() != 0 || c.hostCount() != 0 {
		t.Errorf("%d connections are idle, %d hosts", c.idleCount(), c.hostCount())
	}
}

// TestPlaceAfterTheConnection: the place of an exchange is given up once its connection is idle, so that whoever waits for it makes no other.
func TestPlaceAfterTheConnection(t *testing.T) {
	t.Parallel()
	goOn := make(chan struct{})
	b := newBackend(t, func(w *wire) {
		_, _, _ = w.request()
		w.say("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
		<-goOn
		w.say("ok")
		w.untilClosed()
	})
	c := newLean(t, func(c *Client) { c.MaxPerHost = 1 })
	res, err := c.RoundTrip(newRequest(t, "GET", b.url(), nil))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	h := c.only(t)
	c.pool.mu.Lock() // the connection cannot become idle
	close(goOn)
	read := make(chan error)
	go func() { _, err := io.ReadAll(res.Body); read <- err }()
	time.Sleep(soon)
	if len(h.slots) != 1 {
		t.Error("the place was given up before")
	}
	c.pool.mu.Unlock()
	if err := <-read; err != nil || len(h.slots) != 0 || c.idleCount() != 1 {
		t.Errorf("err %v, %d places are taken, %d connections idle", err, len(h.slots), c.idleCount())
	}
}
