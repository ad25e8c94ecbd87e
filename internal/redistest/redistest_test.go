package redistest

import (
	"path/filepath"
	"testing"
)

// TestFreeAddr: no address is given twice, however soon the first one is free again.
func TestFreeAddr(t *testing.T) {
	t.Parallel()
	seen := make(map[string]bool)
	for range 2000 {
		addr := FreeAddr(t)
		if seen[addr] {
			t.Fatalf("%s was given twice", addr)
		}
		seen[addr] = true
	}
}

// TestStartIsOfItsOwnServer: what another server answers on the same port is no answer of the one that is started, whatever its password.
func TestStartIsOfItsOwnServer(t *testing.T) {
	t.Parallel()
	for name, options := range map[string][]string{"open": nil, "guarded": {"--requirepass", "right-password"}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			first := Start(t, options...)
			second := &Server{t: t, Addr: first.Addr, Dir: t.TempDir()}
			second.args = append(append([]string{}, first.args...), "--dir", second.Dir)
			t.Cleanup(second.Kill)
			if said := second.run(); said == "" {
				t.Errorf("a second server on %s is said to have started, with the log in %s", first.Addr, filepath.Join(second.Dir, "redis.log"))
			}
		})
	}
}
