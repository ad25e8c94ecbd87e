//go:build !unix

package http1

import "net"

// prober would look at an idle connection without waiting, and cannot on this system: what it cannot look at it takes for dead, so
// that no request is lost on a connection that the backend has closed, and nothing said on one is taken for an answer.
type prober struct{}

func (*prober) prepare(net.Conn) {}

func (*prober) alive() bool { return false }

func (*prober) visible() bool { return false }

func (*prober) rounds() bool { return false }

func (*prober) round(*exchange, []byte) (int, error) { return 0, errStale }
