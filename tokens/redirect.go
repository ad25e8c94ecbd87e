package tokens

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// ExchangeRedirected exchanges the authorization code that a visitor brought back from WeChat's page; it lives for life
// (0: an hour). The duty to exchange it is durable before WeChat is asked, as far as the store takes it, and survives a
// crash. If WeChat or the store does not answer, the exchange is repeated in the background for as long as the code
// lives, and bringing the code again joins it. A code that WeChat calls invalid or expired is not tried again: anybody
// could have made it up.
func (m *Manager) ExchangeRedirected(ctx context.Context, platform string, code secret.String, life time.Duration) (Authorizer, error) {
	env, err := m.current()
	if err != nil {
		return Authorizer{}, err
	}
	c := authCode{platform: platform, code: code}
	if err := env.knows(ComponentKey(platform)); err != nil {
		return Authorizer{}, err
	}
	hash := c.hash()
	now := time.Now()
	in := Intent{Platform: platform, Code: code, CreatedAt: now, ExpiresAt: now.Add(life), Redirected: true}.received(now)
	in = in.wire().intent() // as it would be read back
	in, kept := m.keepRedirected(ctx, env, hash, in)
	a, err := m.exchange(ctx, env, in.authCode())
	settled := hasCode(err, codeAuthCodeInvalid, codeAuthCodeExpired) ||
		err == nil && m.pending.get(AuthorizerKey(a.Platform, a.AppID)) == nil
	switch {
	case !settled:
		m.queueIntent(hash, in)
	case kept:
		if failed := m.deleteRecord(context.WithoutCancel(ctx), env, intentName(hash)); failed != nil {
			env.Log.Warn("an authorization code that is done with cannot be forgotten; it is looked at again at the next start",
				"platform", platform, "error", failed)
		}
	}
	if err != nil {
		return Authorizer{}, fmt.Errorf("authorization code of a visitor: %w", err)
	}
	return a, nil
}

// keepRedirected makes the duty to exchange a visitor's code durable, and reports whether it wrote it. If WeChat has pushed
// the same code, that push's duty stands, which knows WeChat's time.
func (m *Manager) keepRedirected(ctx context.Context, env *Environment, hash string, in Intent) (Intent, bool) {
	var pushed intentWire
	err := m.loadRecord(ctx, env, intentName(hash), &pushed)
	if err == nil {
		return pushed.intent(), false
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = m.storeRecord(ctx, env, intentName(hash), in.wire())
	}
	if err != nil {
		env.Log.Warn("a visitor's authorization code cannot be kept; it is exchanged all the same", "platform", in.Platform, "error", err)
	}
	return in, err == nil
}
