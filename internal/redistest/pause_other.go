//go:build !unix

package redistest

// Pause would stop the process without ending it, which this system cannot.
func (s *Server) Pause() {
	s.t.Helper()
	s.t.Fatal("redistest: no process can be paused on this system: run the test on Linux or macOS")
}

// Resume has nothing to do.
func (*Server) Resume() {}
