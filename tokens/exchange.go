package tokens

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

const (
	// codeLife is how long an authorization code can be exchanged when WeChat does not say.
	codeLife = time.Hour
	// maxExchanged bounds the memory of exchanged codes. One that is forgotten costs a call that WeChat answers with
	// 61009, which counts as done.
	maxExchanged = 4096
	// exchangeTimeout bounds one exchange: a component token on the way, WeChat, the store.
	exchangeTimeout = renewTimeout
	// exchangeTurn is how long an exchange waits for its turn; see takeTurn.
	exchangeTurn = 2 * time.Second
	// allTurns is more exchanges than there are at once.
	allTurns = 1 << 30
)

// authCode is an authorization code and what is known of where it came from.
type authCode struct {
	platform  string
	appid     string // "" if it is only learned by the exchange
	code      secret.String
	createdAt time.Time // zero: now, from a redirect
}

func (c authCode) hash() string { return codeHash(c.platform, c.code.Reveal()) }

// exchangedCodes remembers which account each code of the last hour belonged to: WeChat may deliver one code by push
// and by redirect.
type exchangedCodes struct {
	mu    sync.Mutex
	codes map[string]exchanged
}

type exchanged struct {
	appid string
	at    time.Time
}

func (x *exchangedCodes) get(hash string) (appid string, ok bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	c, ok := x.codes[hash]
	return c.appid, ok && time.Since(c.at) < codeLife
}

func (x *exchangedCodes) put(hash, appid string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.codes == nil {
		x.codes = make(map[string]exchanged)
	}
	now := time.Now()
	if len(x.codes) >= maxExchanged {
		oldest, at := "", now
		for h, c := range x.codes {
			if now.Sub(c.at) >= codeLife {
				delete(x.codes, h)
			} else if c.at.Before(at) {
				oldest, at = h, c.at
			}
		}
		if len(x.codes) >= maxExchanged {
			delete(x.codes, oldest)
		}
	}
	x.codes[hash] = exchanged{appid: appid, at: now}
}

// any reports whether a code was exchanged here.
func (x *exchangedCodes) any() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return len(x.codes) > 0
}

// exchangedName is where nodes share which account a code belonged to.
func exchangedName(hash string) string { return sharedName("exchanged", hash) }

type exchangedWire struct {
	AppID string `json:"appid"`
}

// ExchangeAuthCode exchanges an authorization code for the account's tokens and keeps them. Appid may be empty: it is
// learned then. The same code may come again, by push or by redirect: it is exchanged once, and WeChat's answer that a
// code was used counts as success if tokens of appid are held. If the store fails the tokens are held and served from
// memory, the log says so at level error, and Unsaved counts them until they are written.
func (m *Manager) ExchangeAuthCode(ctx context.Context, platform, appid string, code secret.String) (Authorizer, error) {
	env, err := m.current()
	if err != nil {
		return Authorizer{}, err
	}
	return m.exchange(ctx, env, authCode{platform: platform, appid: appid, code: code})
}

// exchange is the one way to exchange a code: all who bring the same one at the same time share it.
func (m *Manager) exchange(ctx context.Context, env *Environment, c authCode) (Authorizer, error) {
	if err := env.knows(ComponentKey(c.platform)); err != nil {
		return Authorizer{}, err
	}
	if c.code.IsZero() || len(c.appid) > maxID {
		return Authorizer{}, errors.New("exchange: there is no authorization code, or the appid has no appid's form")
	}
	return share(ctx, m, env.flightName("code", c.hash()), exchangeTimeout, func(ctx context.Context) (Authorizer, error) {
		return m.exchangeOnce(ctx, env, c)
	})
}

func (m *Manager) exchangeOnce(ctx context.Context, env *Environment, c authCode) (Authorizer, error) {
	if a, ok := m.alreadyExchanged(ctx, env, c, m.lookup); ok {
		return a, nil
	}
	unlock, err := m.lockExchange(ctx, env, c)
	if err != nil {
		return Authorizer{}, err
	}
	defer unlock()
	if a, ok := m.alreadyExchanged(ctx, env, c, m.reload); ok {
		return a, nil // by somebody while we waited
	}
	g, err := m.queryAuth(ctx, env, c)
	if hasCode(err, codeAuthCodeInvalid) {
		if a, ok := m.heldSince(ctx, env, c); ok {
			return a, nil
		}
	}
	if err != nil {
		return Authorizer{}, fmt.Errorf("exchange authorization code: %w", err)
	}
	if c.appid != "" && c.appid != g.appid {
		env.Log.Warn("the authorization code belongs to another account than the one named", "platform", c.platform, "appid", g.appid, "named", c.appid)
	}
	e, err := m.keepAuthorization(ctx, env, c, g)
	if e == nil { // else an error was logged, and the record waits to be written
		return Authorizer{}, err
	}
	durable := err == nil // else other nodes must not take the duty for done
	a, err := e.authorizer()
	if err != nil {
		return Authorizer{}, err
	}
	m.done.put(c.hash(), g.appid)
	if durable {
		_ = m.sharedPut(ctx, exchangedName(c.hash()), exchangedWire{g.appid}, codeLife) // else WeChat says that it is used
	}
	env.Log.Info("account authorised", "platform", c.platform, "appid", g.appid)
	env.Observer.Happened(Authorized, AuthorizerKey(c.platform, g.appid), nil)
	m.seekAuthorized(AuthorizerKey(c.platform, g.appid))
	return a, nil
}

// takeTurn has a code whose account is not known yet exchanged while no other one is, here: it may be any account's, and WeChat
// delivers a code of the same account by push and another one by redirect, at the same time. It waits no longer than
// exchangeTurn, so that one call to WeChat that hangs does not keep all accounts from being authorised.
func (m *Manager) takeTurn(ctx context.Context, c authCode) (done func()) {
	turns := int64(1)
	if c.appid == "" {
		turns = allTurns
	}
	ctx, cancel := context.WithTimeout(ctx, exchangeTurn)
	defer cancel()
	if m.turns.Acquire(ctx, turns) != nil {
		return func() {} // what WeChat is then known to hold may not be what it holds; a call that it refuses has that mended
	}
	return func() { m.turns.Release(turns) }
}

// lockExchange keeps every other node from exchanging the same code, and, where the account is known, another code of
// it: which of two is exchanged last decides what WeChat holds. A refresh is not kept waiting. Without the store's
// locks the exchange goes on: the code dies otherwise.
func (m *Manager) lockExchange(ctx context.Context, env *Environment, c authCode) (unlock func(), err error) {
	turn := m.takeTurn(ctx, c)
	defer func() {
		if err != nil {
			turn()
		}
	}()
	account := func() {}
	if c.appid != "" {
		if account, err = m.lockAccountExchange(ctx, env, AuthorizerKey(c.platform, c.appid)); err != nil {
			return nil, err
		}
	}
	code, err := m.lockBoth(ctx, env, intentName(c.hash()))
	if err != nil {
		account()
		return nil, err
	}
	return func() { code(); account(); turn() }, nil
}

// lockAccountExchange keeps everybody from exchanging a code of an account. Who has the account's lock for renewals too
// takes that one first.
func (m *Manager) lockAccountExchange(ctx context.Context, env *Environment, k Key) (unlock func(), err error) {
	return m.lockBoth(ctx, env, k.recordName()+exchangeLock)
}

// lockBoth takes a lock on this node, and in the store if that gives it.
func (m *Manager) lockBoth(ctx context.Context, env *Environment, name string) (unlock func(), err error) {
	here, err := m.locks.lock(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("wait for another exchange of the account: %w", err)
	}
	stored, err := m.lockStore(ctx, env, name, renewalLockWait)
	if err != nil {
		env.Log.Warn("the store gives no lock; going on without it", "lock", name, "error", err)
		return here, nil
	}
	return func() { stored(); here() }, nil
}

// alreadyExchanged finds the tokens that make an exchange needless: those that the code brought when it came before,
// also before a restart, or those of a later authorization of the same account. Look reads the account's record.
func (m *Manager) alreadyExchanged(ctx context.Context, env *Environment, c authCode,
	look func(context.Context, *Environment, Key) (*entry, error),
) (Authorizer, bool) {
	appid, done := m.done.get(c.hash())
	if !done {
		appid = c.appid
	}
	if appid == "" {
		// A redirect does not say whose code it is. Another node may know, whose news of the record may still be on its way.
		var there exchangedWire
		if m.sharedPeek(ctx, exchangedName(c.hash()), &there) != nil {
			return Authorizer{}, false
		}
		appid, done, look = there.AppID, true, m.reload
	}
	e, err := look(ctx, env, AuthorizerKey(c.platform, appid))
	if err != nil || !e.authorized() || !done && e.rec.CodeHash != c.hash() && (!c.before(e.rec) || !e.renewable()) {
		return Authorizer{}, false
	}
	a, err := e.authorizer()
	return a, err == nil
}

// before reports whether a pushed code is of an earlier authorization than the one in a record. Only WeChat's times
// can tell.
func (c authCode) before(r *record) bool {
	return !c.createdAt.IsZero() && !r.AuthorizedHere && fromUnix(unix(c.createdAt)).Before(r.AuthorizedAt)
}

// heldSince finds tokens that stand in for a code which WeChat calls used. Those of another code that has no time of WeChat's do
// not stand in for a pushed one: which of the two was exchanged last, and so which tokens work, only WeChat can tell.
func (m *Manager) heldSince(ctx context.Context, env *Environment, c authCode) (Authorizer, bool) {
	if c.appid == "" {
		return Authorizer{}, false
	}
	e, err := m.reload(ctx, env, AuthorizerKey(c.platform, c.appid)) // another node may have got them just now
	if err != nil || !e.renewable() || e.rec.AuthorizedAt.Before(fromUnix(unix(c.createdAt))) ||
		e.rec.AuthorizedHere && !c.createdAt.IsZero() {
		return Authorizer{}, false
	}
	a, err := e.authorizer()
	return a, err == nil
}

// authGrant is what WeChat gives for a code. The token fields are absent for an account without API permission.
type authGrant struct {
	grant
	appid    string
	funcInfo []int
}

func (m *Manager) queryAuth(ctx context.Context, env *Environment, c authCode) (authGrant, error) {
	body := struct {
		Platform string `json:"component_appid"`
		Code     string `json:"authorization_code"`
	}{c.platform, c.code.Reveal()}
	var answer struct {
		Info struct {
			AppID     string      `json:"authorizer_appid"`
			Token     wireToken   `json:"authorizer_access_token"`
			ExpiresIn wireSeconds `json:"expires_in"`
			Refresh   wireToken   `json:"authorizer_refresh_token"`
			FuncInfo  funcInfo    `json:"func_info"`
		} `json:"authorization_info"`
	}
	asked := time.Now()
	if err := m.componentCall(ctx, env, c.platform, pathQueryAuth, body, &answer); err != nil {
		return authGrant{}, err
	}
	info := &answer.Info
	if info.AppID == "" || len(info.AppID) > maxID {
		return authGrant{}, fmt.Errorf("%s: %w: the answer names no account", pathQueryAuth, ErrUnreachable)
	}
	g := authGrant{
		grant: grant{
			access: secret.New(string(info.Token)), refresh: secret.New(string(info.Refresh)),
			asked: asked, life: lifeOf(int64(info.ExpiresIn)),
		},
		appid: info.AppID, funcInfo: info.FuncInfo,
	}
	return g, nil
}

// keepAuthorization swaps refresh and access token in one step. A refresh under way with the old refresh token loses.
//
// A pushed code is dated by WeChat: an authorization older than the account's revocation does not bring it back, and
// one older than the authorization held does not replace that. A code from a redirect has no date but ours, which says
// nothing beside WeChat's: that WeChat exchanged it just now makes it the newest.
func (m *Manager) keepAuthorization(ctx context.Context, env *Environment, c authCode, g authGrant) (*entry, error) {
	pushed := !c.createdAt.IsZero()
	k := AuthorizerKey(c.platform, g.appid)
	taken := false
	e, err := m.commit(ctx, env, k, true, func(cur *record) *record {
		taken = false // an earlier attempt may have been for nothing
		next := &record{}
		if cur != nil {
			*next = *cur
		}
		older := cur != nil && c.before(cur)
		since := fromUnix(unix(c.createdAt))
		switch {
		case !pushed:
			since = g.asked.Truncate(time.Second)
			if next.revoked() && !since.After(next.RevokedAt) {
				since = next.RevokedAt.Add(time.Second) // so that the same revocation, pushed again, is the older one
			}
		case next.revoked() && since.Before(next.RevokedAt), older && !next.RefreshToken.IsZero():
			return nil
		}
		taken = true
		next.RevokedAt = time.Time{}
		if next.AuthorizedAt.Before(since) {
			next.AuthorizedAt, next.AuthorizedHere = since, !pushed
		}
		if !older {
			next.FuncInfo, next.CodeHash = g.funcInfo, c.hash()
		}
		if !g.refresh.IsZero() {
			next.RefreshToken = g.refresh
		}
		if !g.access.IsZero() {
			next.take(g.grant)
		}
		return next
	})
	switch {
	case e == nil:
	case taken:
		m.troubles.over(k, g.access)
		if !g.refresh.IsZero() {
			m.rosters.settled(k)
		}
	default:
		env.Log.Warn("an authorization is not taken: the account has authorised again or revoked since",
			"platform", c.platform, "appid", g.appid)
	}
	return e, err
}
