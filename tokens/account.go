package tokens

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

const (
	pathStableToken = "/cgi-bin/stable_token"
	// forceInterval is how often WeChat acts on force_refresh for one account.
	forceInterval = 30 * time.Second
)

// forcedRefreshes remembers when force_refresh was last used, per configured account.
type forcedRefreshes struct {
	mu   sync.Mutex
	last map[string]time.Time
}

// allow reports whether a forced refresh may be made now, and notes it.
func (f *forcedRefreshes) allow(appid string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	if last, ok := f.last[appid]; ok && now.Sub(last) < forceInterval {
		return false
	}
	if f.last == nil {
		f.last = make(map[string]time.Time)
	}
	f.last[appid] = now
	return true
}

// fetchAccount gets a plain account's token. In normal mode WeChat gives the same token until its last five minutes;
// only if that is the refused one is a new one forced, which kills the old one at once and is rationed.
func (m *Manager) fetchAccount(ctx context.Context, env *Environment, appid string, refused secret.String) (grant, error) {
	a, ok := env.account(appid)
	if !ok {
		return grant{}, fmt.Errorf("account %s: %w", appid, ErrNotConfigured)
	}
	g, err := stableToken(ctx, env, a, false)
	if err != nil || refused.IsZero() || !g.access.Same(refused) {
		return g, err
	}
	if !m.forced.allow(appid) {
		return grant{}, fmt.Errorf("%w: account %s: WeChat refused the token that stable_token still gives, and a new one was forced less than %v ago",
			ErrBackoff, appid, forceInterval)
	}
	return stableToken(ctx, env, a, true)
}

func stableToken(ctx context.Context, env *Environment, a AccountCredentials, force bool) (grant, error) {
	body := struct {
		GrantType string `json:"grant_type"`
		AppID     string `json:"appid"`
		Secret    string `json:"secret"`
		Force     bool   `json:"force_refresh"`
	}{"client_credential", a.AppID, a.Secret.Reveal(), force}
	var answer struct {
		Token     string      `json:"access_token"`
		ExpiresIn wireSeconds `json:"expires_in"`
	}
	asked := time.Now()
	if err := env.API.Post(ctx, pathStableToken, nil, body, &answer); err != nil {
		return grant{}, err
	}
	return grant{access: secret.New(answer.Token), asked: asked, life: lifeOf(int64(answer.ExpiresIn))}, nil
}
