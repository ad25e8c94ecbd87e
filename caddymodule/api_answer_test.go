package caddymodule

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

func TestTokenRefusal(t *testing.T) {
	t.Parallel()
	api := func(code int64) error { return &tokens.APIError{Code: code, Msg: "text of WeChat's"} }
	for _, c := range []struct {
		name   string
		err    error
		sdk    bool
		status int
		code   int64
	}{
		{"no ticket", fmt.Errorf("%w: %w", tokens.ErrNoTicket, api(61006)), true, 200, 61005},
		{"revoked", fmt.Errorf("x: %w", tokens.ErrNotAuthorized), true, 200, 61003},
		{"unknown", tokens.ErrNotConfigured, false, 200, 40013},
		{"answer", api(61004), true, 200, 61004},
		{"refused", api(40001), false, 200, 40001},
		{"refused, SDK", api(40001), true, 200, 48001},
		{"refused, held back, SDK", fmt.Errorf("%w: %w", tokens.ErrBackoff, api(42001)), true, 200, 48001},
		{"busy", api(-1), false, 503, 503},
		{"store", fmt.Errorf("%w: %w", tokens.ErrStore, context.DeadlineExceeded), true, 503, 503},
		{"closed", tokens.ErrClosed, true, 503, 503},
		{"unreachable", fmt.Errorf("%w: connection refused", tokens.ErrUnreachable), true, 502, 502},
		{"slow", fmt.Errorf("%w: %w", tokens.ErrUnreachable, context.DeadlineExceeded), true, 504, 504},
		{"held back", tokens.ErrBackoff, true, 200, 48001},
		{"late", context.DeadlineExceeded, true, 504, 504},
		{"anything", errors.New("x"), true, 503, 503},
	} {
		got := tokenRefusal(c.err, accountID, c.sdk)
		if got.status != c.status || got.code != c.code || got.msg == "" {
			t.Errorf("%s: got %+v", c.name, got)
		}
		if got.code == -1 {
			t.Errorf("%s: errcode -1 makes SDKs send again", c.name)
		}
	}
}

func TestDamper(t *testing.T) {
	t.Parallel()
	var d damper
	if ok, missed := d.allow(); !ok || missed != 0 {
		t.Error("the first line is held back")
	}
	for range 3 {
		if ok, _ := d.allow(); ok {
			t.Error("a second line is let through at once")
		}
	}
	d.last = d.last.Add(-damperInterval)
	if ok, missed := d.allow(); !ok || missed != 3 {
		t.Errorf("got %v, %d missed; want 3", ok, missed)
	}
}
