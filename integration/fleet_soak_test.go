//go:build soak

package integration_test

import (
	"flag"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"
)

var fleetSoak = flag.Duration("fleet.soak", time.Hour, "how long TestFleetSoak lasts")

// TestFleetSoak does for an hour what TestFleet does for a minute, with a node more and the faults in any order. It leaves
// the table beside what else `make` writes.
func TestFleetSoak(t *testing.T) {
	run := newFleetRun(t, 4)
	for end := time.Now().Add(*fleetSoak); time.Now().Before(end); {
		for _, i := range rand.Perm(len(fleetFaults)) {
			run.quiet(15 * time.Second)
			fleetFaults[i](run)
		}
	}
	table := run.finish(20 * time.Second)
	t.Logf("\n%s", table)
	folder := filepath.Join("..", ".run")
	if err := os.MkdirAll(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(folder, t.Name()+".txt"), []byte(table), 0o600); err != nil {
		t.Fatal(err)
	}
}
