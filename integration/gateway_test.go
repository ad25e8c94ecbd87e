package integration_test

import (
	"net"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/integration"
)

// TestFreeAddr: no address is given twice, and none that somebody listens on, on whichever of the machine's addresses.
func TestFreeAddr(t *testing.T) {
	seen := make(map[string]bool)
	for range 200 {
		addr, err := integration.FreeAddr("")
		if err != nil {
			t.Fatal(err)
		}
		if seen[addr] {
			t.Fatalf("%s was given twice", addr)
		}
		seen[addr] = true
	}
	for _, on := range []string{"", "127.0.0.1", "127.0.0.2", "[::1]"} {
		taken, err := net.Listen("tcp", on+":0")
		if err != nil {
			if on == "" || on == "127.0.0.1" { // the others are not on every machine
				t.Fatal(err)
			}
			continue
		}
		port := integration.Port(taken.Addr().String())
		got, err := integration.FreeAddr("127.0.0.1:" + port)
		if err != nil || integration.Port(got) == port {
			t.Errorf("gave %s, whose port is taken on %q: %v", got, on, err)
		}
		_ = taken.Close()
	}
}
