//go:build unix

package redistest

import "syscall"

// Pause stops the process without ending it: connections stay, and nothing answers. Resume lets it go on.
func (s *Server) Pause()  { s.signal(syscall.SIGSTOP) }
func (s *Server) Resume() { s.signal(syscall.SIGCONT) }
