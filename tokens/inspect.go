package tokens

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

const (
	// shownWait is how long a look at an account waits for what only WeChat knows of it.
	shownWait = 2 * time.Second
	// shownLife is for how long that is believed, and shownRetry how soon WeChat is asked again when it gave no answer.
	shownLife  = 10 * time.Minute
	shownRetry = time.Minute
	// maxShown bounds the accounts of which it is in memory.
	maxShown = 1 << 10
)

// shownInfo is what WeChat said of an account, or that it said nothing.
type shownInfo struct {
	info  AccountInfo
	known bool
}

// TokenState says how a token stands. It does not hold the token.
type TokenState struct {
	ExpiresAt  time.Time // of the last one, dead or alive; zero: there is none
	ObtainedAt time.Time // when it was asked for
	Live       bool      // it can be used
	Refused    bool      // by WeChat, since

	Err      error     // of the last renewal, if none succeeded since; it quotes no secret
	FailedAt time.Time // when that was
	Failures int       // in a row
}

func (m *Manager) tokenState(e *entry) TokenState {
	var s TokenState
	s.FailedAt, s.Failures, s.Err = m.troubles.last(e.key)
	if !e.token.Value.IsZero() {
		s.ExpiresAt, s.ObtainedAt = e.token.ExpiresAt, e.rec.ObtainedAt
		s.Live, s.Refused = e.live(instantOf(time.Now())), e.refused.Load()
	}
	return s
}

// AuthorizerDetail is what is known of one account that authorised a platform. It holds no secrets.
type AuthorizerDetail struct {
	ListedAuthorizer
	AuthorizedAt time.Time // zero if it is not known
	RevokedAt    time.Time // zero unless it was revoked
	FuncInfo     []int     // ids of the permission sets that were granted
	Token        TokenState

	// Asked says that WeChat told what follows, a few minutes ago at most.
	Asked       bool
	MiniProgram bool
	Principal   string // the company or person behind it
}

// AuthorizerDetail returns what is known of an account: by the platform that is named, or else by the first configured
// one that has an authorization of it, or had one. What no record has is asked of WeChat, for a short time, and left out
// if that does not say. The error is ErrNotAuthorized if the account is not known.
func (m *Manager) AuthorizerDetail(ctx context.Context, platform, appid string) (AuthorizerDetail, error) {
	env, err := m.current()
	if err != nil {
		return AuthorizerDetail{}, err
	}
	found, err := m.holders(ctx, env, platform, appid)
	if err != nil {
		return AuthorizerDetail{}, err
	}
	if len(found) == 0 {
		return AuthorizerDetail{}, fmt.Errorf("%s: %w", printable(appid, maxID), ErrNotAuthorized)
	}
	d := AuthorizerDetail{ListedAuthorizer: found[0]}
	if i := slices.IndexFunc(found, func(a ListedAuthorizer) bool { return a.State == StateAuthorized }); i > 0 {
		d.ListedAuthorizer = found[i]
	}
	if d.State == StateUnreadable {
		return d, nil
	}
	k := AuthorizerKey(d.Platform, appid)
	e, err := m.lookup(ctx, env, k)
	switch {
	case err != nil:
		return AuthorizerDetail{}, err
	case e.rec == nil:
		return AuthorizerDetail{}, fmt.Errorf("%s: %w", appid, ErrNotAuthorized) // gone meanwhile
	case e.authorized():
		d.ask(m.shownInfo(ctx, env, k))
		if e, err = m.lookup(ctx, env, k); err != nil { // which may have been completed
			return AuthorizerDetail{}, err
		}
	}
	if e.rec != nil {
		d.NickName, d.UserName, d.FuncInfo = e.rec.NickName, e.rec.UserName, slices.Clone(e.rec.FuncInfo)
		d.AuthorizedAt, d.Token = e.rec.AuthorizedAt, m.tokenState(e)
		if d.State = StateAuthorized; e.rec.revoked() {
			d.State, d.RevokedAt = StateRevoked, e.rec.RevokedAt
		}
	}
	return d, nil
}

func (d *AuthorizerDetail) ask(shown shownInfo) {
	d.Asked, d.MiniProgram, d.Principal = shown.known, shown.info.MiniProgram, shown.info.Principal
}

// Holders returns the platforms that hold an authorization of an account, in the order of the configuration, by the store
// and without asking WeChat.
func (m *Manager) Holders(ctx context.Context, appid string) (platforms []string, err error) {
	env, err := m.current()
	if err != nil {
		return nil, err
	}
	found, err := m.holders(ctx, env, "", appid)
	for _, a := range found {
		if a.State == StateAuthorized {
			platforms = append(platforms, a.Platform)
		}
	}
	return platforms, err
}

// holders are the records of an account, revoked ones too: of one platform, or of all.
func (m *Manager) holders(ctx context.Context, env *Environment, platform, appid string) (found []ListedAuthorizer, err error) {
	for i := range env.Platforms {
		if platform != "" && env.Platforms[i].AppID != platform {
			continue
		}
		k := AuthorizerKey(env.Platforms[i].AppID, appid)
		if err := env.knows(k); err != nil {
			return nil, err
		}
		a, err := m.listed(ctx, env, k)
		if err != nil {
			return nil, err
		}
		if a != nil {
			found = append(found, *a)
		}
	}
	if _, ok := env.platform(platform); platform != "" && !ok {
		return nil, env.knows(ComponentKey(platform))
	}
	return found, nil
}

// shownInfo is what WeChat says of an account, once in a while and within a short time.
func (m *Manager) shownInfo(ctx context.Context, env *Environment, k Key) shownInfo {
	if held, ok := m.shown.Get(k); ok {
		return held
	}
	if m.barred(k) != nil {
		return shownInfo{} // WeChat would not be asked
	}
	ctx, cancel := context.WithTimeout(ctx, shownWait)
	defer cancel()
	shown, err := share(ctx, m, env.flight("shown", k), renewTimeout, func(ctx context.Context) (shownInfo, error) {
		info, err := m.FetchAccountInfo(ctx, k.Platform, k.AppID)
		if err != nil {
			m.shown.Set(k, shownInfo{}, shownRetry)
			return shownInfo{}, err
		}
		shown := shownInfo{info, true}
		m.shown.Set(k, shown, 0)
		return shown, nil
	})
	if err != nil {
		env.Log.Debug("WeChat does not say more of an account now", "platform", k.Platform, "appid", k.AppID, "error", err)
	}
	return shown
}

const (
	// RenewNowEvery is how often one token may be renewed because somebody says so, on one node.
	RenewNowEvery = time.Minute
	maxOrders     = 1 << 12
)

// TooSoonError: what is asked for was done a moment ago, and may be done again after this time.
type TooSoonError struct {
	After time.Duration
	what  string
}

func (e *TooSoonError) Error() string {
	return fmt.Sprintf("%s a moment ago: wait for %v", e.what, max(e.After.Round(time.Second), time.Second))
}

// RenewNow has WeChat give a new token in the place of one that works as far as is known, because who runs the gateway says
// so, and returns when the new one ends. All who wait for a renewal share it, and the old token serves on if it fails.
// The error is a TooSoonError more often than every RenewNowEvery.
func (m *Manager) RenewNow(ctx context.Context, k Key) (expires time.Time, err error) {
	env, err := m.current()
	if err != nil {
		return time.Time{}, err
	}
	if err := env.knows(k); err != nil {
		return time.Time{}, err
	}
	e, err := m.lookup(ctx, env, k)
	if err == nil {
		e, err = m.restored(ctx, env, e)
	}
	if err == nil {
		err = e.unrenewable()
	}
	if err == nil {
		err = m.barred(k)
	}
	if err != nil {
		return time.Time{}, err
	}
	now := time.Now()
	if at, found := m.orders.GetOrSet(k, func() time.Time { return now }); found {
		return time.Time{}, &TooSoonError{at.Add(RenewNowEvery).Sub(now), "somebody had this token renewed"}
	}
	token, err := m.awaitRenewalFor(ctx, env, k, e.token.Value, true)
	if errors.Is(err, ErrUnreachable) || errors.Is(err, ErrStore) {
		m.orders.Delete(k) // WeChat has not been asked
	}
	return token.ExpiresAt, err
}

const (
	// DrainEvery is how often exchanges may be tried at once because somebody says so, on one node.
	DrainEvery = 10 * time.Second
	// drainWait is how long it is waited for the attempts.
	drainWait = 20 * time.Second
	// maxDrainFailures bounds those that are told one by one.
	maxDrainFailures = 100
)

// Drained is what came of exchanges that were tried at once.
type Drained struct {
	Waiting int // when it began
	Tried   int // and ended, well or not
	Done    int
	Failed  []FailedExchange // the first of them
}

// FailedExchange is an authorization code that is still to be exchanged, or that is lost.
type FailedExchange struct {
	Platform, AppID string // AppID may be empty
	Err             error  // it quotes no secret
}

var (
	errExchangeRuns = said(nil, "the attempt is still under way", "仍在换取中")
	errExchangeEnds = said(nil, "nothing more can be done for the code: the log says why", "这个授权码已无法换取，原因见日志")
)

// Drain tries at once to exchange each authorization code that waits for its next attempt, those too that another node
// has accepted and left, and waits for a while for what comes of it. The error is a TooSoonError more often than every
// DrainEvery.
func (m *Manager) Drain(ctx context.Context) (d Drained, err error) {
	if _, err := m.current(); err != nil {
		return Drained{}, err
	}
	now := time.Now()
	if at, found := m.orders.GetOrSetFor(drainKey, DrainEvery, func() time.Time { return now }); found {
		return Drained{}, &TooSoonError{at.Add(DrainEvery).Sub(now), "the exchanges were tried"}
	}
	ctx, cancel := context.WithTimeout(ctx, drainWait)
	defer cancel()
	since := m.queue.tried()   // what other nodes have left may be tried as soon as it is found
	err = m.resumeIntents(ctx) // what waits on this node is tried in any case
	opens := m.intents.open()  // before one ends
	attempts := m.queue.tryNow(intentJobs, since)
	if d.Waiting = len(attempts); d.Waiting > 0 {
		err = nil
	}
	fail := func(open *openIntent, err error) {
		if len(d.Failed) < maxDrainFailures {
			d.Failed = append(d.Failed, FailedExchange{open.Platform, open.AppID, err})
		}
	}
	for _, a := range attempts {
		open := opens[a.id[len(intentJobs):]]
		if open == nil {
			open = &openIntent{} // it came just now
		}
		select {
		case err := <-a.ended:
			d.Tried++
			switch {
			case err == nil && !open.lost.Load():
				d.Done++
			case err == nil:
				fail(open, errExchangeEnds)
			default:
				fail(open, err)
			}
		case <-ctx.Done():
			fail(open, errExchangeRuns)
		}
	}
	return d, err
}

// drainKey is where it is kept when Drain was last called, beside the tokens that were renewed on demand.
var drainKey = Key{Kind: "drain"}
