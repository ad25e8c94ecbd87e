package tokens

import (
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	// A manager makes a cache, and the race detector has to shadow all of it: a fifth of the tests' time went there.
	cacheCounters = 1 << 12
	goleak.VerifyTestMain(m)
}
