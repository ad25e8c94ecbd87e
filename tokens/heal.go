package tokens

import (
	"context"
	"fmt"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// What the store has lost, or holds wrong, WeChat still knows: the refresh token of each authorizer. It is asked for one
// account at a time when somebody needs it, and for all of them by the roster.

// errNoRefreshToken: WeChat itself has no refresh token of the account, because no authorization code of it was ever
// exchanged.
var errNoRefreshToken = said(nil, "WeChat has no refresh token of the account either: it has to authorise again", "微信也没有该账号的 refresh_token：需要重新授权")

// currentRefreshToken asks WeChat for the refresh token of an account in the place of one that is void.
func (m *Manager) currentRefreshToken(ctx context.Context, env *Environment, k Key, void secret.String) (secret.String, error) {
	info, err := m.authorizerInfo(ctx, env, k)
	switch {
	case err != nil:
		return secret.String{}, err
	case info.refresh.IsZero():
		m.rosters.orphan(k)
		m.settleOrphan(ctx, env, k, void) // as in restore
		return secret.String{}, errNoRefreshToken
	case info.refresh.Same(void):
		return secret.String{}, said(nil, "WeChat names the one that it calls invalid", "微信给出的仍是它称为无效的那个")
	}
	return info.refresh, nil
}

// authorization is lookup for an authorizer, which is had from WeChat if the store may have lost it.
func (m *Manager) authorization(ctx context.Context, env *Environment, k Key) (*entry, error) {
	e, err := m.lookup(ctx, env, k)
	if err != nil || e.authorized() {
		return e, err
	}
	return m.restored(ctx, env, e)
}

// authorizationAtOnce is authorization, but waits for no code to be exchanged: then it is ErrAuthorizing.
func (m *Manager) authorizationAtOnce(ctx context.Context, env *Environment, k Key) (*entry, error) {
	e, err := m.lookup(ctx, env, k)
	if err != nil || e.authorized() {
		return e, err
	}
	if m.intents.attempt(k) != nil {
		return nil, fmt.Errorf("%s: %w", k.AppID, ErrAuthorizing)
	}
	return m.restored(ctx, env, e)
}

// authorizing returns e, or what takes its place since the account has authorised just now: an attempt at its code is under way, or the
// first is still to come. Between two attempts, the next of which may be long in coming, nobody waits, and nobody makes one of their own.
func (m *Manager) authorizing(ctx context.Context, env *Environment, e *entry) (*entry, error) {
	k := e.key
	var limit <-chan time.Time
	for {
		ended := m.intents.attempt(k)
		if ended == nil {
			if held := m.cache.Load().get(k); held != nil && held.renewable() {
				return held, nil // the attempt has ended between the look at the record and the one at the codes
			}
			return e, nil
		}
		if limit == nil {
			limit = time.After(exchangeTimeout)
		}
		select {
		case <-ended:
		case <-limit:
			return e, nil
		case <-m.workCtx.Done():
			return nil, ErrClosed
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for an authorization code to be exchanged: %w", ctx.Err())
		}
		var err error
		if e, err = m.lookup(ctx, env, k); err != nil || e.renewable() {
			return e, err
		}
		if m.closed.Load() {
			return nil, ErrClosed // who takes over the code has it exchanged
		}
	}
}

// unauthorized returns the error of an account that is not authorised, and is not just authorising either.
func (m *Manager) unauthorized(ctx context.Context, env *Environment, e *entry) error {
	if e.authorized() {
		return nil
	}
	e, err := m.authorizing(ctx, env, e)
	if err != nil || e.authorized() {
		return err
	}
	return e.unrenewable()
}

// restored returns e, or what takes its place: when the account is just authorising, and when the store may have lost it: it is missing
// there, and either WeChat's list was never read to its end for this store, or this very record was damaged.
func (m *Manager) restored(ctx context.Context, env *Environment, e *entry) (*entry, error) {
	k := e.key
	if e.renewable() {
		return e, nil
	}
	e, err := m.authorizing(ctx, env, e)
	if err != nil || e.rec != nil {
		return e, err
	}
	if env.RosterEvery < 0 || !m.rosters.lost(k) {
		if held := m.cache.Load().get(k); held != nil && held.rec != nil {
			return held, nil // the reading of the list, which has ended since, brought it
		}
		m.hastenRoster(k.Platform)
		return e, nil
	}
	if err := m.barred(k); err != nil {
		return nil, err // asked a moment ago, or there is no ticket to ask with
	}
	return share(ctx, m, env.flight("restore", k), renewTimeout, func(ctx context.Context) (*entry, error) {
		return m.restore(ctx, env, e)
	})
}

// restore waits for codes of the account, which may have authorised just now: what WeChat names while one is being exchanged would fetch a
// second token, and the first be void.
func (m *Manager) restore(ctx context.Context, env *Environment, e *entry) (*entry, error) {
	k := e.key
	if in, open := m.intents.latest(k); open {
		_, _ = m.exchange(ctx, env, in.authCode()) // its intent says so in the log, and is tried again
	}
	defer m.takeTurn(ctx, authCode{platform: k.Platform, appid: k.AppID})() // as in reconsider
	unlock, err := m.lockAccountExchange(ctx, env, k)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if e, err = m.recall(ctx, env, k); err != nil || e.rec != nil {
		return e, err // exchanged meanwhile, also by another node
	}
	info, err := m.authorizerInfo(ctx, env, k)
	if err == nil && info.refresh.IsZero() {
		m.rosters.orphan(k)
		m.settleOrphan(ctx, env, k, secret.String{}) // its code may have been exchanged meanwhile
		err = errNoRefreshToken
	}
	switch {
	case hasCode(err, codeNotAuthorized):
		m.rosters.found(k)
		m.troubles.failed(k, fmt.Errorf("%w: %w", ErrNotAuthorized, err))
		return e, nil
	case err != nil:
		// Two failures in a row hold the next callers back.
		if _, say := m.troubles.failed(k, err); say {
			env.Log.Warn("an account that the store does not know cannot be asked for", "platform", k.Platform, "appid", k.AppID, "error", err)
		}
		return nil, err
	}
	e, err = m.adopt(ctx, env, k, info, time.Time{}, false)
	if err == nil {
		m.rosters.found(k)
	}
	return e, err
}

// reconsider asks WeChat about an account that the store holds otherwise than a list or a push has it, and takes over
// what it says. Neither a renewal nor an exchange of the account is under way meanwhile: WeChat's answer would be older
// than what they bring. At is WeChat's time of the authorization.
func (m *Manager) reconsider(ctx context.Context, env *Environment, k Key, at time.Time) error {
	lock := k.recordName() + renewalLock
	leave, err := m.locks.lock(ctx, lock)
	if err != nil {
		return fmt.Errorf("wait for a renewal under way: %w", err)
	}
	defer leave()
	unlock, err := m.lockStore(ctx, env, lock, renewalLockWait)
	if err != nil {
		return err
	}
	defer unlock()
	defer m.takeTurn(ctx, authCode{platform: k.Platform, appid: k.AppID})() // a code of nobody knows whom may be this account's
	release, err := m.lockAccountExchange(ctx, env, k)
	if err != nil {
		return err
	}
	defer release()
	info, err := m.authorizerInfo(ctx, env, k)
	if err != nil {
		return err
	}
	if info.refresh.IsZero() {
		m.rosters.orphan(k)
		return errNoRefreshToken
	}
	_, err = m.adopt(ctx, env, k, info, at, true)
	return err
}

// adopt takes over an authorization that WeChat knows and the store does not, or not as it is by now. At is WeChat's
// time of it, or zero. Alone says that nobody can have changed the authorization since WeChat was asked.
func (m *Manager) adopt(ctx context.Context, env *Environment, k Key, info accountInfo, at time.Time, alone bool) (*entry, error) {
	if info.userName != "" && m.keepUserName(ctx, env, k, info.userName) != nil {
		info.userName = "" // it is learned later
	}
	taken := false
	e, err := m.commit(ctx, env, k, false, func(cur *record) *record {
		if taken = m.adoptable(k, cur, info.refresh, at) || alone && cur.undated(info.refresh); !taken {
			return nil
		}
		next := &record{}
		if cur != nil {
			*next = *cur
		}
		if cur.gen() > 0 && !next.RefreshToken.Same(info.refresh) {
			// Which refresh token the access token came from is not known: the next call fetches one.
			next.AccessToken, next.ExpiresAt, next.ObtainedAt, next.RankedAt = secret.String{}, time.Time{}, time.Time{}, time.Time{}
		}
		next.RefreshToken, next.RevokedAt = info.refresh, time.Time{}
		if at.After(next.AuthorizedAt) {
			next.AuthorizedAt, next.AuthorizedHere = at, false
		}
		next.learn(info)
		return next
	})
	if err != nil {
		return nil, err
	}
	if taken {
		m.troubles.over(k, secret.String{})
		if say, missed := m.takenOver.tell(); say {
			env.Log.Warn("an authorization was taken over from WeChat, which the store did not have", notLogged(missed, "platform", k.Platform, "appid", k.AppID)...)
		}
		env.Observer.Happened(Authorized, k, nil)
	}
	return e, nil
}

// adoptable reports whether the refresh token that WeChat names takes the place of what is held: there is nothing, or
// nothing that works, or WeChat dates it later.
func (m *Manager) adoptable(k Key, cur *record, refresh secret.String, at time.Time) bool {
	switch {
	case refresh.IsZero():
		return false
	case cur == nil:
		return true
	case cur.revoked():
		return at.After(cur.RevokedAt)
	case cur.RefreshToken.Same(refresh):
		return false
	case cur.RefreshToken.IsZero(), m.troubles.isVoid(k, cur.RefreshToken):
		return true
	default:
		return !cur.AuthorizedHere && at.After(cur.AuthorizedAt)
	}
}

// undated reports whether WeChat names another refresh token than the one of an authorization whose date says nothing
// beside WeChat's.
func (r *record) undated(refresh secret.String) bool {
	return r != nil && r.AuthorizedHere && !r.revoked() && !refresh.IsZero() && !r.RefreshToken.Same(refresh)
}

// suspect notes that WeChat answered 61003 for an account that is authorised as far as the store knows.
func (m *Manager) suspect(env *Environment, k Key) {
	if env.RosterEvery > 0 && m.rosters.suspect(k) {
		m.wantRoster(k.Platform)
	}
}

// Suspect is called when WeChat said, in a call that an app made with our token, that the account has not authorised
// the platform (61003). The account is marked unauthorized once WeChat's list says so too.
func (m *Manager) Suspect(k Key) {
	env, err := m.current()
	if err == nil && k.Kind == KindAuthorizer && env.knows(k) == nil {
		m.suspect(env, k)
	}
}

// confirmGone marks an account unauthorized that a whole list did not name, if WeChat still says so when asked for it.
func (m *Manager) confirmGone(ctx context.Context, env *Environment, k Key) error {
	asked, err := m.reload(ctx, env, k)
	if err != nil || !asked.authorized() {
		return err
	}
	if _, err := m.authorizerInfo(ctx, env, k); !hasCode(err, codeNotAuthorized) {
		return err // it is back, or it cannot be told
	}
	gone := false
	_, err = m.commit(ctx, env, k, false, func(cur *record) *record {
		// What has come since WeChat was asked is not what WeChat spoke of.
		gone = cur != nil && !cur.revoked() && cur.sameAuthorization(asked.rec) && cur.RefreshToken.Same(asked.rec.RefreshToken)
		if !gone {
			return nil
		}
		// Dated so that whatever WeChat dates later brings it back.
		at := cur.AuthorizedAt
		if at.IsZero() {
			at = time.Now().Truncate(time.Second)
		}
		return &record{AuthorizedAt: cur.AuthorizedAt, AuthorizedHere: cur.AuthorizedHere, RevokedAt: at, UserName: cur.UserName, NickName: cur.NickName}
	})
	if err == nil && gone {
		m.troubles.over(k, secret.String{})
		env.Log.Warn("the account has not authorised the platform any more, by WeChat's list; no push had said so", "platform", k.Platform, "appid", k.AppID)
		env.Observer.Happened(Unauthorized, k, nil)
	}
	return err
}
