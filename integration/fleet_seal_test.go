package integration_test

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// TestFleetSealKey changes the seal_key on one node after the other: first without the round in which all learn to read what will
// be sealed with the new one, and then as docs/operations.md has it.
func TestFleetSealKey(t *testing.T) {
	t.Parallel()
	f := newFleet(t, fleetOptions{nodes: 2, env: []string{"SEAL_SECOND="}})
	text, err := os.ReadFile(f.config)
	if err != nil {
		t.Fatal(err)
	}
	const first = "seal_key {env.WECHAT_SEAL_KEY}"
	if !strings.Contains(string(text), first) {
		t.Fatal("the config has another seal_key")
	}
	if err := os.WriteFile(f.config, []byte(strings.Replace(string(text), first, first+" {env.SEAL_SECOND}", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	old, fresh := "", strings.Repeat("0123456789abcdef", 4)
	for _, e := range f.env {
		if value, ok := strings.CutPrefix(e, "WECHAT_SEAL_KEY="); ok {
			old = value
		}
	}
	keys := func(n *fleetNode, first, second string) {
		t.Helper()
		n.Env = append(n.Env, "WECHAT_SEAL_KEY="+first, "SEAL_SECOND="+second)
		killed := n.Kill()
		said, _ := f.redis.Do("KEYS", "*sealing/*").([]any) // by the process before: it would be believed for a minute
		for _, key := range said {
			f.redis.Do("DEL", key)
		}
		if err := errors.Join(killed, n.Start(t.Context())); err != nil {
			t.Fatal(err)
		}
	}
	idle := f.authorize("wx7000000000000003")[0]
	users := f.authorize(integration.AuthorizerID, "wx7000000000000001", "wx7000000000000002")
	a, b := f.nodes[0], f.nodes[1]
	serve := func(when string, n *fleetNode, users []wxsim.User) {
		t.Helper()
		for _, u := range users {
			if got := f.user(t.Context(), n, u); !got.good(u) {
				t.Errorf("%s, node %s: %s", when, n.name, got)
			}
		}
	}
	nothingAside := func(when string) {
		t.Helper()
		if found, _ := f.redis.Do("KEYS", "*wechat/v1/aside/*").([]any); len(found) > 0 {
			t.Errorf("%s: set aside: %v", when, found)
		}
	}

	// Node A seals with a key that node B lacks.
	keys(a, fresh, old)
	for _, u := range users {
		f.wechat.ExpireAll(wxsim.KindAuthorizer, u.AppID)
	}
	serve("the token ended", a, users)
	gone := users[len(users)-1]
	if r, err := f.wechat.PushEvent(on(t.Context(), a), integration.PlatformID, gone.AppID, "unauthorized", wxsim.Field{Name: "AuthorizerAppid", Value: gone.AppID}); err != nil || !r.OK() {
		t.Fatalf("unauthorized: %s %v", r.Wrong, err)
	}
	start := time.Now()
	for range 3 {
		for _, u := range users {
			f.user(t.Context(), b, u) // it cannot know the token, and must not have one of its own
		}
	}
	for _, u := range users {
		if got := f.renewals(u, start); len(got) > 0 {
			t.Errorf("%s: renewed by the node without the key: %v", u.AppID, got)
		}
	}
	eventually(t, "node B says what it lacks", func() error {
		if _, status := fetch(t, plainClient, http.MethodGet, "http://"+b.Admin+"/wechat/status", nil, ""); !strings.Contains(status, `"seal_key_missing"`) {
			return fmt.Errorf("status: %s", status)
		}
		return nil
	})
	nothingAside("while node B lacks the key")
	if err := b.settled(t); err != nil {
		t.Error(err)
	}

	// The rounds: the old one first, the new one first, the new one alone.
	keys(b, old, fresh)
	present := users[:len(users)-1]
	serve("node B can read", b, present)
	serve("node B can read", a, present)
	if got := f.user(t.Context(), b, gone); !strings.Contains(got.body, `"errcode":61003,`) {
		t.Errorf("node B still serves an account that took its authorization back: %s", got)
	}
	keys(b, fresh, old)
	serve("both seal with the new one", b, present)
	for _, n := range f.nodes {
		for _, u := range present {
			if err := f.untilGood(t.Context(), n, u, healTime); err != nil {
				t.Error(err)
			}
		}
	}
	for _, n := range f.nodes {
		for start := time.Now(); !strings.Contains(n.Log(), "every record is sealed with the first seal_key"); time.Sleep(50 * time.Millisecond) {
			if time.Since(start) > time.Minute { // it looks each 20 s whether the other still seals with the old one
				t.Fatalf("node %s does not say that all records are sealed with the new one", n.name)
			}
		}
	}
	for _, n := range f.nodes {
		keys(n, fresh, "")
	}
	present = append(present, idle) // which nobody has used since
	for _, n := range f.nodes {
		serve("the old one is taken out", n, present)
	}
	nothingAside("at the end")
	for _, u := range present {
		if got := f.renewals(u, start); len(got) > 0 {
			t.Errorf("%s was renewed for the rotation: %v", u.AppID, got)
		}
	}
}
