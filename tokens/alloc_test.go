//go:build !race

package tokens

import (
	"context"
	"testing"
)

// The race detector allocates on its own account, so this gate is not built with it.
func TestFreshTokenCostsNoAllocation(t *testing.T) {
	r, keys := hotRig(t, 100)
	ctx := context.Background()
	i := 0
	// Ristretto takes a new buffer of 64 reads now and then: AllocsPerRun's average is rounded down.
	if n := testing.AllocsPerRun(10_000, func() {
		if _, err := r.Get(ctx, keys[i%len(keys)]); err != nil {
			t.Fatal(err)
		}
		i++
	}); n != 0 {
		t.Errorf("%v allocations per Get of a fresh token", n)
	}
	if n := r.store.count("lock"); n != 0 {
		t.Errorf("%d locks", n)
	}
}
