package redistest

import (
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// Relay is a TCP relay to a server: what stands between a gateway and its Redis, and can fail.
type Relay struct {
	Addr string

	listener net.Listener
	wg       sync.WaitGroup

	mu     sync.Mutex
	target string
	asked  chan struct{} // closed while what is asked may pass
	told   chan struct{} // closed while answers may
	closed bool          // no connection is made
	slow   time.Duration // each piece waits for so long
	conns  map[net.Conn]bool
}

// NewRelay starts a relay to target.
func NewRelay(t testing.TB, target string) *Relay {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &Relay{Addr: l.Addr().String(), listener: l, target: target, asked: make(chan struct{}), told: make(chan struct{}), conns: make(map[net.Conn]bool)}
	close(r.asked)
	close(r.told)
	r.wg.Go(r.accept)
	t.Cleanup(func() {
		_ = l.Close()
		r.Pass()
		r.Cut()
		r.wg.Wait()
	})
	return r
}

// Cut breaks all connections, and those that are made from now on.
func (r *Relay) Cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	r.breakAll()
}

// Break breaks all connections; new ones are made.
func (r *Relay) Break() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.breakAll()
}

func (r *Relay) breakAll() {
	for c := range r.conns {
		_ = c.Close()
	}
}

// Hang lets connections be made and nothing pass on any, until Pass.
func (r *Relay) Hang() {
	r.mu.Lock()
	defer r.mu.Unlock()
	bar(&r.asked)
	bar(&r.told)
}

// HangAnswers lets what is asked pass, and no answer, until Pass.
func (r *Relay) HangAnswers() {
	r.mu.Lock()
	defer r.mu.Unlock()
	bar(&r.told)
}

// Pass ends Hang, HangAnswers and Cut.
func (r *Relay) Pass() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = false
	for _, gate := range []chan struct{}{r.asked, r.told} {
		if !isOpen(gate) {
			close(gate)
		}
	}
}

func bar(gate *chan struct{}) {
	if isOpen(*gate) {
		*gate = make(chan struct{})
	}
}

func isOpen(gate chan struct{}) bool {
	select {
	case <-gate:
		return true
	default:
		return false
	}
}

// Slow has everything that passes wait for a while; 0 ends that.
func (r *Relay) Slow(by time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.slow = by
}

// Retarget leads new connections to another server, and breaks those that there are.
func (r *Relay) Retarget(target string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.target = target
	r.breakAll()
}

func (r *Relay) accept() {
	for {
		near, err := r.listener.Accept()
		if err != nil {
			return
		}
		r.mu.Lock()
		target, closed := r.target, r.closed
		r.conns[near] = true
		r.mu.Unlock()
		r.wg.Go(func() {
			defer r.end(near)
			if closed {
				return
			}
			far, err := net.Dial("tcp", target)
			if err != nil {
				return
			}
			r.mu.Lock()
			r.conns[far] = true
			r.mu.Unlock()
			defer r.end(far)
			r.wg.Go(func() { r.copy(far, near, &r.asked); _ = far.Close(); _ = near.Close() })
			r.copy(near, far, &r.told)
		})
	}
}

func (r *Relay) end(c net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	_ = c.Close()
	delete(r.conns, c)
}

func (r *Relay) copy(to io.Writer, from io.Reader, which *chan struct{}) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			r.mu.Lock()
			gate, slow := *which, r.slow
			r.mu.Unlock()
			<-gate
			time.Sleep(slow)
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}
