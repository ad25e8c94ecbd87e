package caddymodule

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/caddyserver/caddy/v2"
)

// A reload that changes the store ends the state of before. What was taken in under it goes on: its tokens are the new state's, and what was
// begun in the background is not cut off.
func TestAnotherStore(t *testing.T) {
	held := make(chan struct{})
	close(held)
	holdEvents.Store(&held)
	folder := t.TempDir()
	before := loadEvents(t, filepath.Join(folder, "before"), 1)
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
	})
	release, ended := make(chan struct{}), make(chan error, 2)
	work := func(ctx context.Context) { <-release; ended <- ctx.Err() }
	before.background(work)
	calls, replies := before.calls(), before.shared.metrics.forgotten

	now := loadEvents(t, filepath.Join(folder, "now"), 2)
	if now.shared == before.shared {
		t.Fatal("the two stores share their state")
	}
	if before.manager() != now.shared.manager || before.users() != now.users() || before.authorizations() != now.authorizations() || before.logins() != now.logins() {
		t.Error("what was taken in before goes to a state that has ended")
	}
	if now.calls() != calls || now.shared.bodies != before.shared.bodies || now.shared.metrics.forgotten != replies {
		t.Error("pushes of before are not known")
	}
	before.background(work)
	now = loadEvents(t, filepath.Join(folder, "before"), 3) // another state again
	if before.manager() != now.shared.manager || now.calls() != calls {
		t.Error("two reloads on, what was taken in before goes to a state that has ended")
	}

	// While the new configuration is in force and the old one serves on, tokens are the new one's, and if it is refused after all, the old one's.
	refused, _, err := provisionAt(filepath.Join(folder, "refused"), testConfig(""))
	if err != nil {
		t.Fatal(err)
	}
	if now.manager() != now.shared.manager {
		t.Error("a configuration that is not in force yet has taken over")
	}
	if refused.manager() != refused.shared.manager || now.manager() != refused.shared.manager || before.manager() != refused.shared.manager {
		t.Error("two states in force renew tokens")
	}
	if err := refused.Cleanup(); err != nil {
		t.Fatal(err)
	}
	if now.manager() != now.shared.manager || before.manager() != now.shared.manager || refused.manager() != now.shared.manager {
		t.Error("a configuration that was refused stays in force")
	}
	close(release)
	for range 2 {
		if err := <-ended; err != nil {
			t.Errorf("work of before was cut off: %v", err)
		}
	}
	if n := now.shared.holders.Load(); n != 1 {
		t.Errorf("%d states hold what is known of pushes", n)
	}
}
