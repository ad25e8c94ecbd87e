//go:build unix

package integration_test

import "syscall"

func (n *fleetNode) halt() { n.signal(syscall.SIGSTOP) }
func (n *fleetNode) goOn() { n.signal(syscall.SIGCONT) }

func (n *fleetNode) signal(sig syscall.Signal) {
	if pid := n.PID(); pid != 0 {
		_ = syscall.Kill(pid, sig) // it may be dead
	}
}
