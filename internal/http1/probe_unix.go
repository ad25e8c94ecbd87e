//go:build unix

package http1

import "syscall"

// prober looks at an idle connection without waiting.
type prober struct {
	rc    syscall.RawConn
	look  func(fd uintptr) bool
	quiet bool
	one   [1]byte
}

func (p *prober) prepare(sc syscall.Conn) {
	rc, err := sc.SyscallConn()
	if err != nil {
		return
	}
	p.rc = rc
	p.look = func(fd uintptr) bool {
		_, err := syscall.Read(int(fd), p.one[:])
		p.quiet = err == syscall.EAGAIN
		return true
	}
}

// alive reports whether an idle connection is open and silent. What a backend says unasked would be taken for the next answer.
func (p *prober) alive() bool {
	if p.rc == nil {
		return true
	}
	p.quiet = false
	return p.rc.Read(p.look) == nil && p.quiet
}
