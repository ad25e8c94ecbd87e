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
	// forceDaily is how often force_refresh is used for one account on one day. WeChat allows 20; the rest is for the
	// account's people.
	forceDaily = 15
)

// weChatDay is where WeChat's day of quotas begins: at midnight in Beijing.
var weChatDay = time.FixedZone("UTC+8", 8*60*60)

// forcedOn is how often force_refresh was used, by this record, on the day of at.
func (r *record) forcedOn(at time.Time) int {
	if r == nil || r.ForcedAt.IsZero() || r.ForcedAt.In(weChatDay).Format(time.DateOnly) != at.In(weChatDay).Format(time.DateOnly) {
		return 0
	}
	return r.Forced
}

// forcedRefreshes remembers how force_refresh was used, per configured account, by this process: also the attempts that
// failed, which no record tells.
type forcedRefreshes struct {
	mu   sync.Mutex
	last map[string]*record // only ForcedAt and Forced
}

// allow returns an error if a forced refresh must not be made now, and else notes it. Rec is the account's record.
func (f *forcedRefreshes) allow(appid string, rec *record) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	lately := false
	for _, r := range []*record{rec, f.last[appid]} {
		// Further ahead is of a clock that was wrong, and would hold it back until that time comes.
		lately = lately || r != nil && !r.ForcedAt.IsZero() && now.Sub(r.ForcedAt).Abs() < forceInterval
	}
	used := max(f.last[appid].forcedOn(now), rec.forcedOn(now))
	switch {
	case lately:
		return said(ErrBackoff, fmt.Sprintf("account %s: WeChat refused the token that stable_token still gives, and a new one was forced less than %v ago", appid, forceInterval),
			fmt.Sprintf("账号 %s：微信拒绝了 stable_token 仍在返回的令牌，而 %v 内已强制换过新令牌", appid, forceInterval))
	case used >= forceDaily:
		return said(ErrBackoff, fmt.Sprintf("account %s: WeChat refused the token that stable_token still gives, and a new one was forced %d times today; is another system forcing them too?", appid, used),
			fmt.Sprintf("账号 %s：微信拒绝了 stable_token 仍在返回的令牌，而今天已强制换过 %d 次；是否有其他系统也在强制刷新？", appid, used))
	}
	if f.last == nil {
		f.last = make(map[string]*record)
	}
	f.last[appid] = &record{ForcedAt: now, Forced: used + 1}
	return nil
}

// fetchAccount gets a plain account's token. In normal mode WeChat gives the same token until its last five minutes;
// only if that is the refused one is a new one forced, which kills the old one at once and is rationed.
func (m *Manager) fetchAccount(ctx context.Context, env *Environment, appid string, rec *record, refused secret.String) (grant, error) {
	a, ok := env.account(appid)
	if !ok {
		return grant{}, fmt.Errorf("account %s: %w", appid, ErrNotConfigured)
	}
	g, err := stableToken(ctx, env, a, false)
	if err != nil || refused.IsZero() || !g.access.Same(refused) {
		return g, err
	}
	if err := m.forced.allow(appid, rec); err != nil {
		return grant{}, err
	}
	g, err = stableToken(ctx, env, a, true)
	g.forced = err == nil
	return g, err
}

func stableToken(ctx context.Context, env *Environment, a AccountCredentials, force bool) (grant, error) {
	body := struct {
		GrantType string `json:"grant_type"`
		AppID     string `json:"appid"`
		Secret    string `json:"secret"`
		Force     bool   `json:"force_refresh"`
	}{"client_credential", a.AppID, a.Secret.Reveal(), force}
	var answer struct {
		Token     wireToken   `json:"access_token"`
		ExpiresIn wireSeconds `json:"expires_in"`
	}
	asked := time.Now()
	if err := env.API.Post(ctx, pathStableToken, nil, body, &answer); err != nil {
		return grant{}, err
	}
	return grant{access: secret.New(string(answer.Token)), asked: asked, life: lifeOf(int64(answer.ExpiresIn))}, nil
}
