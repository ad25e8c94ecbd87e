//go:build !race

package http1

import (
	"context"
	"net"
	"testing"
)

// The race detector allocates on its own account, so this gate is not built with it. It is what was measured: the exchange with its request
// and response, the answer's head, its header (three), and the watch over the context (two).
const maxExchangeAllocs = 7

func TestExchangeAllocations(t *testing.T) {
	for network, dial := range map[string]func(context.Context, string, string) (net.Conn, error){
		"tcp": new(net.Dialer).DialContext, "memory": dialPrompt,
	} {
		rt := newLean(t, func(c *Client) { c.Dial = dial })
		exchange := benchExchange(t, rt, newBackend(t, benchServe).url())
		if n := testing.AllocsPerRun(500, exchange); n > maxExchangeAllocs {
			t.Errorf("%s: %v allocations an exchange, want at most %v", network, n, maxExchangeAllocs)
		}
	}
}
