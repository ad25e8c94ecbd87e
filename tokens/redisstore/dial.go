package redisstore

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"
)

// errPlain: the server means no TLS. A Redis waits for the rest of what it takes for a command then.
var errPlain = errors.New("the server does not speak TLS on this port: leave out the option tls, or give the port for TLS (tls-port)")

// errHungUp is said of a server that hangs up before it says a thing, as one does that means TLS.
var errHungUp = errors.New("it hung up at the first command: if this is its port for TLS, store redis needs the option tls")

// dial makes a connection, in TLS if that is wanted, within DialTimeout.
func (o *Options) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	limited, cancel := context.WithTimeout(ctx, o.DialTimeout)
	defer cancel()
	conn, err := dialer.DialContext(limited, network, addr)
	if err != nil {
		return nil, err
	}
	if o.TLS == nil {
		if c, ok := conn.(*net.TCPConn); ok {
			return &plainConn{TCPConn: c}, nil
		}
		return conn, nil
	}
	config := o.TLS
	if config.ServerName == "" {
		config = config.Clone()
		config.ServerName, _, _ = net.SplitHostPort(addr)
	}
	shaking, found := context.WithCancelCause(limited)
	defer found(nil)
	probed := make(chan struct{})
	probe := time.AfterFunc(o.DialTimeout/2, func() {
		defer close(probed)
		if isPlain(shaking, network, addr) {
			found(errPlain)
		}
	})
	secured := tls.Client(conn, config)
	err = secured.HandshakeContext(shaking)
	if _, foreign := errors.AsType[tls.RecordHeaderError](err); foreign {
		found(errPlain)
	}
	found(nil) // unless it was errPlain
	if !probe.Stop() {
		<-probed
	}
	if err == nil {
		return secured, nil
	}
	_ = conn.Close()
	if cause := context.Cause(shaking); cause == errPlain { //nolint:errorlint // our own, never wrapped
		err = cause
	}
	return nil, err
}

// isPlain reports whether a server that does not answer a handshake is a Redis without TLS.
func isPlain(ctx context.Context, network, addr string) bool {
	conn, err := dialer.DialContext(ctx, network, addr)
	if err != nil {
		return false
	}
	defer func() { _ = conn.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	said := make([]byte, 1)
	if _, err = conn.Write([]byte("PING\r\n")); err == nil {
		_, err = conn.Read(said)
	}
	return err == nil && (said[0] == '+' || said[0] == '-')
}

// dialer is as go-redis' own.
var dialer = net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 5 * time.Second, Count: 3}}

// plainConn is a connection in the clear. It remains a TCP connection, at which go-redis looks for whether it still stands.
type plainConn struct {
	*net.TCPConn
	heard bool // something came; a connection has one reader at a time
}

// alertType begins what TLS has to say of what is none of it.
const alertType = 0x15

// Read implements net.Conn.
func (c *plainConn) Read(b []byte) (int, error) {
	n, err := c.TCPConn.Read(b)
	if c.heard {
		return n, err
	}
	c.heard = n > 0
	switch {
	case n > 0 && b[0] == alertType:
		return 0, fmt.Errorf("%w: %w", io.EOF, errHungUp)
	case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET):
		err = fmt.Errorf("%w: %w", err, errHungUp)
	}
	return n, err
}
