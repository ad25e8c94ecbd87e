package tokens

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

const (
	pathAuthorizerToken = "/cgi-bin/component/api_authorizer_token" //nolint:gosec // a path
	pathQueryAuth       = "/cgi-bin/component/api_query_auth"
)

// Authorizer is what is known of an account that authorised a platform. It holds no secrets.
type Authorizer struct {
	Platform     string
	AppID        string
	FuncInfo     []int // ids of the permission sets that were granted
	AuthorizedAt time.Time
	UserName     string // the gh_ id; empty until it is known
	NickName     string // likewise
}

// Authorizer returns what is known of an account. It is ErrNotAuthorized if the account never authorised the platform,
// or has revoked it.
func (m *Manager) Authorizer(ctx context.Context, platform, appid string) (Authorizer, error) {
	env, err := m.current()
	if err != nil {
		return Authorizer{}, err
	}
	return m.authorizer(ctx, env, platform, appid)
}

// ErrAuthorizing is an ErrNotAuthorized that may be over in a moment.
var ErrAuthorizing = fmt.Errorf("%w yet, its authorization code is being exchanged", ErrNotAuthorized)

// AuthorizerAtOnce is Authorizer, but is ErrAuthorizing where that would wait for the exchange of a code.
func (m *Manager) AuthorizerAtOnce(ctx context.Context, platform, appid string) (Authorizer, error) {
	env, err := m.current()
	if err != nil {
		return Authorizer{}, err
	}
	k := AuthorizerKey(platform, appid)
	if err := env.knows(k); err != nil {
		return Authorizer{}, err
	}
	e, err := m.authorizationAtOnce(ctx, env, k)
	if err != nil {
		return Authorizer{}, err
	}
	return e.authorizer()
}

func (m *Manager) authorizer(ctx context.Context, env *Environment, platform, appid string) (Authorizer, error) {
	k := AuthorizerKey(platform, appid)
	if err := env.knows(k); err != nil {
		return Authorizer{}, err
	}
	e, err := m.authorization(ctx, env, k)
	if err != nil {
		return Authorizer{}, err
	}
	return e.authorizer()
}

func (e *entry) authorizer() (Authorizer, error) {
	if !e.authorized() {
		return Authorizer{}, fmt.Errorf("%s: %w", e.key.AppID, ErrNotAuthorized)
	}
	return Authorizer{
		Platform: e.key.Platform, AppID: e.key.AppID,
		FuncInfo: slices.Clone(e.rec.FuncInfo), AuthorizedAt: e.rec.AuthorizedAt,
		UserName: e.rec.UserName, NickName: e.rec.NickName,
	}, nil
}

// unrenewable returns an error if there is nothing to ask WeChat for a new token with.
func (e *entry) unrenewable() error {
	switch {
	case e.renewable():
		return nil
	case !e.authorized():
		return fmt.Errorf("%s: %w", e.key.AppID, ErrNotAuthorized)
	default:
		return fmt.Errorf("%s: %w", e.key.AppID, said(ErrNotAuthorized,
			"its authorization brought no refresh token; it has to authorise again, with API permissions", "授权没有带来 refresh_token；需要重新授权并勾选接口权限"))
	}
}

// PlatformOf returns the first configured platform, in the order of the configuration, that holds an authorization of
// the account. It is ErrNotAuthorized if none does. For an account in use it costs no access to the store. One for which a code of the account
// is being exchanged is waited for if no other does.
func (m *Manager) PlatformOf(ctx context.Context, appid string) (string, error) {
	env, err := m.current()
	if err != nil {
		return "", err
	}
	var failed error
	var awaited []Key
	for i := range env.Platforms {
		k := AuthorizerKey(env.Platforms[i].AppID, appid)
		if err := env.knows(k); err != nil {
			return "", err
		}
		e, err := m.authorizationAtOnce(ctx, env, k)
		switch {
		case errors.Is(err, ErrAuthorizing):
			awaited = append(awaited, k)
		case err != nil:
			failed = err
		case e.authorized():
			return k.Platform, nil
		}
	}
	for _, k := range awaited {
		e, err := m.authorization(ctx, env, k)
		switch {
		case err != nil:
			failed = err
		case e.authorized():
			return k.Platform, nil
		}
	}
	if failed != nil {
		return "", failed
	}
	return "", fmt.Errorf("%s: %w", printable(appid, maxID), ErrNotAuthorized)
}

// StoredPlatformOf is PlatformOf for those whom anybody can have ask: an appid that may be made up costs no call to
// WeChat, no place in memory, and of the store what Authorized costs it, with the same errors. It is ErrUnsure where
// PlatformOf would ask WeChat, because the store may have lost the account; WeChat's list, which is read soon then,
// settles it.
func (m *Manager) StoredPlatformOf(ctx context.Context, appid string) (string, error) {
	env, err := m.current()
	if err != nil {
		return "", err
	}
	e, err := m.holder(ctx, env, appid)
	switch {
	case err != nil:
		return "", err
	case e != nil:
		return e.key.Platform, nil
	}
	for i := range env.Platforms {
		k := AuthorizerKey(env.Platforms[i].AppID, appid)
		held := m.cache.Load().get(k) // a revocation is there, and not lost
		if env.RosterEvery >= 0 && m.rosters.lost(k) && (held == nil || held.rec == nil) {
			m.hastenRoster(k.Platform)
			return "", fmt.Errorf("%s: %w", printable(appid, maxID), ErrUnsure)
		}
	}
	return "", fmt.Errorf("%s: %w", printable(appid, maxID), ErrNotAuthorized)
}

// fetchAuthorizer gets an access token with the refresh token of rec. If WeChat calls that invalid, the current one is
// had from WeChat, and tried once.
func (m *Manager) fetchAuthorizer(ctx context.Context, env *Environment, k Key, rec *record) (g grant, err error) {
	g, err = m.refresh(ctx, env, k, rec.RefreshToken)
	switch {
	case hasCode(err, codeRefreshTokenInvalid, codeNotAuthorized) && m.overtaken(ctx, env, k, rec.RefreshToken) != nil:
		return grant{}, errOvertaken
	case hasCode(err, codeRefreshTokenInvalid):
		m.troubles.setVoid(k, rec.RefreshToken)
		// What WeChat names must not be on its way into the record by an exchange meanwhile.
		unlock, failed := m.lockAccountExchange(ctx, env, k)
		if failed != nil {
			return grant{}, fmt.Errorf("%w (%w)", err, failed)
		}
		defer func() {
			if g.release = unlock; err != nil {
				unlock()
				g.release = nil
			}
		}()
		if now, failed := m.recall(ctx, env, k); failed == nil && (!now.renewable() || !now.rec.RefreshToken.Same(rec.RefreshToken)) {
			return grant{}, errOvertaken // by one that was exchanged meanwhile, or revoked
		}
		current, failed := m.currentRefreshToken(ctx, env, k, rec.RefreshToken)
		if failed != nil {
			if hasCode(failed, codeNotAuthorized) {
				m.suspect(env, k)
			}
			m.rosters.miss(k)
			m.wantRoster(k.Platform)
			return grant{}, fmt.Errorf("%w (and the current one cannot be had: %w)", err, failed)
		}
		if g, err = m.refresh(ctx, env, k, current); err == nil && g.refresh.IsZero() {
			g.refresh = current
		}
		if err == nil {
			env.Log.Warn("the refresh token had become invalid; the current one was fetched from WeChat", "platform", k.Platform, "appid", k.AppID)
		}
	case hasCode(err, codeNotAuthorized):
		// WeChat's word alone does not delete what is stored: the list has to say so too.
		m.suspect(env, k)
	}
	if hasCode(err, codeNotAuthorized) {
		err = fmt.Errorf("%w: %w", ErrNotAuthorized, err)
	}
	return g, err
}

// refresh exchanges a refresh token for an access token.
func (m *Manager) refresh(ctx context.Context, env *Environment, k Key, refresh secret.String) (grant, error) {
	body := struct {
		Platform string `json:"component_appid"`
		AppID    string `json:"authorizer_appid"`
		Refresh  string `json:"authorizer_refresh_token"`
	}{k.Platform, k.AppID, refresh.Reveal()}
	var answer struct {
		Token     wireToken   `json:"authorizer_access_token"`
		ExpiresIn wireSeconds `json:"expires_in"`
		Refresh   wireToken   `json:"authorizer_refresh_token"`
	}
	asked := time.Now()
	if err := m.componentCall(ctx, env, k.Platform, pathAuthorizerToken, body, &answer); err != nil {
		return grant{}, err
	}
	return grant{
		access: secret.New(string(answer.Token)), refresh: secret.New(string(answer.Refresh)),
		asked: asked, life: lifeOf(int64(answer.ExpiresIn)), from: refresh,
	}, nil
}

// Revoke notes that an account took its authorization back at a time given by WeChat. The tokens are dropped at once;
// the note is durable when nil is returned. If the authorization held is newer, nothing happens.
func (m *Manager) Revoke(ctx context.Context, platform, appid string, at time.Time) error {
	at = fromUnix(unix(at))
	e, dropped, err := m.end(ctx, AuthorizerKey(platform, appid), func(cur *record) (time.Time, bool) {
		return at, cur == nil || !at.Before(cur.AuthorizedAt) && !(cur.revoked() && !at.After(cur.RevokedAt))
	})
	switch {
	case err != nil:
		return err
	case dropped:
		m.env.Load().Log.Info("authorization revoked", "platform", platform, "appid", appid)
	case e.authorized():
		m.env.Load().Log.Info("revocation is older than the authorization held: ignored", "platform", platform, "appid", appid)
	}
	return nil
}

// Forget drops an authorization as Revoke does, because who runs the gateway says so. WeChat still has it, and the account
// can authorise again. Dropped is false for one that was revoked before. The error is ErrNotAuthorized if none is held.
func (m *Manager) Forget(ctx context.Context, platform, appid string) (dropped bool, err error) {
	known := false
	_, dropped, err = m.end(ctx, AuthorizerKey(platform, appid), func(cur *record) (time.Time, bool) {
		if known = cur != nil; !known || cur.revoked() {
			return time.Time{}, false
		}
		at := time.Now().Truncate(time.Second)
		if at.Before(cur.AuthorizedAt) {
			at = cur.AuthorizedAt // by WeChat's clock, which is ahead
		}
		return at, true
	})
	if err == nil && !known {
		err = fmt.Errorf("%s: %w", printable(appid, maxID), ErrNotAuthorized)
	}
	return dropped, err
}

// end notes the end of an authorization. When is asked for its time, and whether there is anything to note.
func (m *Manager) end(ctx context.Context, k Key, when func(cur *record) (at time.Time, ends bool)) (e *entry, dropped bool, err error) {
	env, err := m.current()
	if err != nil {
		return nil, false, err
	}
	if err := env.knows(k); err != nil {
		return nil, false, err
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	if e := m.cache.Load().get(k); e != nil && e.authorized() {
		if _, ends := when(e.rec); ends {
			e.ended.Store(true) // not served while the note is being written
			e.refused.Store(true)
		}
	}
	e, err = m.commit(ctx, env, k, false, func(cur *record) *record {
		at, ends := when(cur)
		if dropped = ends; !ends {
			return nil
		}
		next := &record{RevokedAt: at}
		if cur != nil {
			next.AuthorizedAt, next.UserName, next.NickName = cur.AuthorizedAt, cur.UserName, cur.NickName
		}
		return next
	})
	if err != nil {
		return nil, false, err
	}
	if dropped {
		m.revocations.note(k)
		m.troubles.over(k, secret.String{})
		m.rosters.settled(k)
		m.shown.Delete(k)
		env.Observer.Happened(Unauthorized, k, nil)
	}
	return e, dropped, nil
}
