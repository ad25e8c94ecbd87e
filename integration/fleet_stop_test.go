package integration_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// TestFleetNodeStopped stops a node in good order while its backend works on a message. WeChat's retries come to another node,
// and get the reply of the one run that there is.
func TestFleetNodeStopped(t *testing.T) {
	t.Parallel()
	f := newFleet(t, fleetOptions{nodes: 2})
	first, second := f.nodes[0], f.nodes[1]
	s := script{"stopped", 11 * time.Second, giveText}
	pushed := make(chan wxsim.PushResult, 1)
	f.only(first)
	go func() {
		r, err := f.wechat.PushMessage(t.Context(), wxsim.Message{AppID: integration.AccountID, Content: s.String(), Attempts: 3})
		if err != nil {
			t.Error(err)
		}
		pushed <- r
	}()
	eventually(t, "the backend is given the message", func() error {
		if n := f.backend.ran(s); n != 1 {
			return fmt.Errorf("%d times", n)
		}
		return nil
	})
	f.only(second)
	if err := first.Stop(); err != nil {
		t.Fatal(err)
	}
	r := <-pushed
	if r.UserSaw != s.repliesWith() || f.backend.ran(s) != 1 {
		t.Errorf("the user saw %q; %s", r.UserSaw, describe(r.Attempts[0].At, f.backend.take(s), r))
	}
}

// only has the balancer give everything to one node.
func (f *fleet) only(one *fleetNode) {
	for _, n := range f.nodes {
		n.mu.Lock()
		n.down, n.changed = n != one, time.Now().Add(-noticed)
		n.mu.Unlock()
	}
}
