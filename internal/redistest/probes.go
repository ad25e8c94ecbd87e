package redistest

import (
	"bytes"
	"runtime"
	"testing"
	"time"
)

// probePatience is how long go-redis may take to see that the pool it looks for a server for is closed: it sleeps for a
// second between two attempts, each of which has the store's timeout to connect.
const probePatience = 10 * time.Second

// Tests is a package's tests for [go.uber.org/goleak.VerifyTestMain], where they break connections to Redis. goleak
// waits for half a second. A probe that go-redis began ends with its pool, but only once it has slept, and a dial that nobody waits for
// any more may begin one; what is still there after that belongs to a client that was not closed, and goleak says so.
type Tests struct {
	*testing.M
	// End closes what the tests could not: a client that is open may begin a probe at any time. Nil: nothing.
	End func()
}

// Run runs the tests and waits for what they left to go-redis.
func (m Tests) Run() int {
	defer awaitProbes()
	if m.End != nil {
		defer m.End()
	}
	return m.M.Run()
}

func awaitProbes() {
	for end := time.Now().Add(probePatience); probing() && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
}

// probing reports whether any goroutine is in a pool of go-redis's: one that waits there for a connection may dial yet, and one that dials
// may begin a probe.
func probing() bool {
	stacks := make([]byte, 4<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	return bytes.Contains(stacks, []byte("pool.(*ConnPool)."))
}
