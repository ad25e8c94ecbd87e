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
// lives; bringing the code again joins an attempt that is under way. A code that WeChat calls invalid or expired is not tried again: anybody
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
		m.queueIntent(hash, in, backoffFirst) // this was the first attempt
	case kept:
		failed := m.forgetRedirected(context.WithoutCancel(ctx), env, hash, err == nil)
		switch {
		case failed == nil:
		case err == nil:
			m.queueIntent(hash, in, backoffFirst) // finds the tokens, and nothing but the record to be deleted
		default:
			env.Log.Warn("an authorization code that is done with cannot be forgotten; it is looked at again at the next start",
				"platform", platform, "error", failed)
		}
	}
	if err != nil {
		return Authorizer{}, fmt.Errorf("authorization code of a visitor: %w", err)
	}
	return a, nil
}

// forgetRedirected deletes what the store holds of a visitor's code that is settled. If it was not exchanged and a push has come meanwhile,
// that is the push's, whose job asks for what the code stood for.
func (m *Manager) forgetRedirected(ctx context.Context, env *Environment, hash string, exchanged bool) error {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	unlock, err := m.locks.lock(ctx, intentRecordLock(hash))
	if err != nil {
		return err
	}
	defer unlock()
	if !exchanged {
		there, err := m.keptIntent(ctx, env, hash)
		if err != nil || !there.Redirected {
			return ignoreIf(err, notAnIntent(err))
		}
	}
	return m.deleteRecord(ctx, env, intentName(hash))
}

// keepRedirected makes the duty to exchange a visitor's code durable, and reports whether it wrote it. If WeChat has pushed
// the same code, that push's duty stands, which knows WeChat's time.
func (m *Manager) keepRedirected(ctx context.Context, env *Environment, hash string, in Intent) (Intent, bool) {
	there, kept, err := m.writeRedirected(ctx, env, hash, in)
	if err != nil {
		m.lookForLateIntent()
		env.Log.Warn("a visitor's authorization code cannot be kept; it is exchanged all the same", "platform", in.Platform, "error", err)
		return in, false
	}
	return there, kept
}

func (m *Manager) writeRedirected(ctx context.Context, env *Environment, hash string, in Intent) (there Intent, kept bool, err error) {
	unlock, err := m.locks.lock(ctx, intentRecordLock(hash))
	if err != nil {
		return in, false, err
	}
	defer unlock()
	if there, err = m.keptIntent(ctx, env, hash); !errors.Is(err, fs.ErrNotExist) {
		return there, false, err
	}
	if err = m.swapRecord(ctx, env, intentName(hash), nil, in.wire()); !errors.Is(err, ErrSwapped) {
		return in, err == nil, err
	}
	there, err = m.keptIntent(ctx, env, hash) // another node's
	return there, false, err
}
