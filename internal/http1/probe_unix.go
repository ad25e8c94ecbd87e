//go:build unix

package http1

import (
	"io"
	"net"
	"os"
	"syscall"
)

// prober looks at an idle connection without waiting, and makes a round on it.
type prober struct {
	rc    syscall.RawConn
	look  func(fd uintptr) bool
	quiet bool
	one   [1]byte

	// Of a round.
	step func(fd uintptr) bool // nil: the connection makes none
	sock net.Conn
	e    *exchange // nil: its request has been sent
	into []byte
	n    int
	err  error
}

func (p *prober) prepare(nc net.Conn) {
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return
	}
	p.rc = rc
	p.look = func(fd uintptr) bool {
		p.quiet = p.silent(fd)
		return true
	}
	switch nc.(type) {
	case *net.TCPConn, *net.UnixConn: // others may do more in Read than read, such as setting a deadline
		p.sock, p.step = nc, p.next
	}
}

// silent reports whether a socket is open and has nothing to read.
func (p *prober) silent(fd uintptr) bool {
	_, err := syscall.Read(int(fd), p.one[:])
	return err == syscall.EAGAIN
}

// alive reports whether an idle connection is open and silent. What a backend says unasked would be taken for the next answer. What it cannot
// look at it takes for dead.
func (p *prober) alive() bool {
	if p.rc == nil {
		return false
	}
	p.quiet = false
	return p.rc.Read(p.look) == nil && p.quiet
}

// visible reports whether alive can look at the connection.
func (p *prober) visible() bool { return p.rc != nil }

// rounds reports whether round can be used.
func (p *prober) rounds() bool { return p.step != nil }

// round looks whether an idle connection is alive, has e send its request there, waits for the answer and reads its beginning. It is what
// alive, Write and Read are one after the other, but as one read of the descriptor: Read alone would first try, and find nothing, since no
// backend is that quick, and that is a call of the kernel for each request.
func (p *prober) round(e *exchange, into []byte) (int, error) {
	p.e, p.into, p.n, p.err = e, into, 0, nil
	err := p.rc.Read(p.step)
	unasked := p.e != nil // it was closed before
	p.e, p.into = nil, nil
	switch {
	case unasked:
		return 0, errStale
	case p.err != nil:
		return 0, p.err
	case err != nil:
		return 0, err
	case p.n == 0:
		return 0, io.EOF
	}
	return p.n, nil
}

// next is called by rc.Read: at first, and then whenever there is something to read. Nothing that comes after the look is missed, for
// rc.Read takes note of what comes from before it calls next for the first time.
func (p *prober) next(fd uintptr) (done bool) {
	if e := p.e; e != nil {
		p.e = nil
		if !p.silent(fd) {
			p.err = errStale
		} else if p.err = e.gather(func() bool { return p.silent(fd) }); p.err == nil {
			p.err = e.send()
		}
		return p.err != nil
	}
	n, err := syscall.Read(int(fd), p.into)
	for err == syscall.EINTR {
		n, err = syscall.Read(int(fd), p.into)
	}
	switch err {
	case syscall.EAGAIN:
		return false
	case nil:
		p.n = n
	default:
		local := p.sock.LocalAddr()
		p.err = &net.OpError{Op: "read", Net: local.Network(), Source: local, Addr: p.sock.RemoteAddr(), Err: os.NewSyscallError("read", err)}
	}
	return true
}
