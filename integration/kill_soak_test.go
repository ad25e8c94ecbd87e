//go:build soak

package integration_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// TestKillSoakGrace kills the process at every point again and again, against a WeChat that changes the refresh token
// with each refresh and accepts the old one for five minutes: no account is lost.
func TestKillSoakGrace(t *testing.T) {
	killSoak(t, lenient)
}

// TestKillSoakNoGrace does the same against the harshest WeChat: a refresh token is void the moment it is replaced, and
// a code is exchanged once. What the process had not written when it was killed is lost for it, and the account heals
// only by what WeChat tells of its authorizers: by itself, when its app calls next.
func TestKillSoakNoGrace(t *testing.T) {
	total := killSoak(t, func(*wxsim.Config) {})
	if total.void == 0 || total.listed == 0 {
		t.Errorf("%d refresh tokens and codes were void, %d accounts healed by WeChat's list: the kills do not hit what they are for",
			total.void, total.listed)
	}
}

// soakRounds is how often each point is taken.
const soakRounds = 4

// soakPoints is every point, in waves ordered much as TestKillAtEveryStep is.
func soakPoints() [][]killPoint {
	// On a slow disk the record is written tens of milliseconds after the answer, on a fast one in less than one.
	delays := []time.Duration{
		0, 300 * time.Microsecond, time.Millisecond, 3 * time.Millisecond, 10 * time.Millisecond, 30 * time.Millisecond, 100 * time.Millisecond,
	}
	var accounts, platform, pushes []killPoint
	for _, delay := range delays {
		for _, op := range []operation{opRefresh, opAuthorize, opUpdate} {
			accounts = append(accounts, answered(op, delay))
		}
		platform = append(platform, answered(opComponent, delay))
		pushes = append(pushes, sent(opAuthorize, delay), sent(opUpdate, delay))
	}
	for _, point := range []func(operation) killPoint{lost, late, acted, locked, written} {
		accounts = append(accounts, point(opRefresh), point(opAuthorize), point(opUpdate))
	}
	platform = append(platform, lost(opComponent), late(opComponent), acted(opComponent), written(opComponent))
	pushes = append(pushes, acknowledged(opAuthorize), acknowledged(opUpdate))

	waves := make([][]killPoint, (len(platform)+1)/2)
	for i := range waves {
		part := func(points []killPoint) []killPoint {
			return points[i*len(points)/len(waves) : (i+1)*len(points)/len(waves)]
		}
		first, second := part(platform)[:1], part(platform)[1:]
		waves[i] = slices.Concat(first, part(accounts), second, part(pushes))
	}
	return waves
}

// killSoak takes every point soakRounds times, and leaves the table beside what else `make` writes.
func killSoak(t *testing.T, wechat func(*wxsim.Config)) tally {
	t.Helper()
	k := newKiller(t, wechat, func(w *integration.World) {
		w.Env = append(w.Env, "WECHAT_LOG_LEVEL=INFO") // hundreds of processes' logs are kept and searched for secrets
	})
	for range soakRounds {
		for _, wave := range soakPoints() {
			k.wave(wave)
		}
	}
	total, table := k.finish()
	if total.kills < 200 {
		t.Errorf("%d kills, want at least 200", total.kills)
	}
	folder := filepath.Join("..", ".run")
	if err := os.MkdirAll(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(folder, t.Name()+".txt"), []byte(table), 0o600); err != nil {
		t.Fatal(err)
	}
	return total
}
