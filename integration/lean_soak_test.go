//go:build soak

package integration_test

import (
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"
)

var leanSoak = flag.Duration("lean.soak", time.Hour, "how long TestLeanSoak lasts")

// TestLeanSoak has hostile backends behind transport wechat_lean and behind transport http, and compares what clients get. It leaves
// the tables beside what else `make` writes.
func TestLeanSoak(t *testing.T) {
	run := newLeanRun(t, 16)
	run.load(time.Minute, max(2, int(*leanSoak/time.Minute)))
	table := run.finish()
	t.Logf("\n%s", table)
	folder := filepath.Join("..", ".run")
	if err := os.MkdirAll(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(folder, t.Name()+".txt"), []byte(table), 0o600); err != nil {
		t.Fatal(err)
	}
}
