package integration_test

import "testing"

func TestRaces(t *testing.T) {
	t.Parallel()
	const line = "==================\n"
	caddys := line + "WARNING: DATA RACE\n  github.com/caddyserver/caddy/v2.run()\n  main.main()\n      github.com/caddy-wechat/caddy-wechat/cmd/caddy/main.go:11\n" + line
	ours := line + "WARNING: DATA RACE\n  github.com/caddy-wechat/caddy-wechat/tokens.(*Manager).Get()\n" + line
	if got := races("{}\n" + caddys + "{}\n"); len(got) != 0 {
		t.Errorf("Caddy's race is taken for ours: %q", got)
	}
	if got := races("{}\n" + caddys + "{}\n" + ours); len(got) != 1 {
		t.Errorf("%d races of ours, want 1", len(got))
	}
}
