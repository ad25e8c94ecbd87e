package tokens

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sync/singleflight"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

const (
	// renewTimeout bounds one renewal: the lock, a component token on the way, WeChat, the store.
	renewTimeout = 45 * time.Second
	// loadTimeout bounds one cold read, another one of the same key before it included.
	loadTimeout = 2 * storeTimeout
	// closeGrace is how long Close lets running renewals finish, since one that is cut off may lose what WeChat
	// has just handed out. After it they are cancelled, and given closeEnd to write what they were given.
	closeGrace = DefaultTimeout + storeTimeout
	closeEnd   = keepTimeout
	// settleLimit is how long a manager waits with what nobody asks it for until its configuration is known to stay, and settleLook how
	// often it looks whether it is.
	settleLimit = time.Minute
	settleLook  = 50 * time.Millisecond
	// flushTimeout bounds the last attempt to write what waits for the store.
	flushTimeout = 2 * storeTimeout
)

// Manager keeps tokens. It is safe for concurrent use, and outlives the configurations that use it.
type Manager struct {
	env    atomic.Pointer[Environment]
	cache  atomic.Pointer[cache] // set before env
	closed atomic.Bool

	flights  singleflight.Group
	arrivals arrivals
	locks    keyLocks // by record name: around each read or write of a record that ends in the cache
	pending  pendingRecords
	unsealed unsealedNames
	sealKeys sealKeys
	troubles troubles
	refusals refusalTable
	failures refusalTable // of the gateway's own, that a log line of theirs tells of

	takenOver   lineBudget // of authorizations that the store did not have
	unresealed  lineBudget // of records that could not be sealed anew
	resealing   atomic.Pointer[resealing]
	tickets     ticketTable
	rosters     rosterTable
	intents     openIntents
	forwards    forwardTable
	done        exchangedCodes
	revocations revocations
	turns       *semaphore.Weighted // of exchanges of codes
	queue       retryQueue
	forced      forcedRefreshes
	opaque      opaqueKeys

	// beat counts what is heard from other nodes, and orders it with what is read here; hearing is nil where the store
	// has no Bus.
	beat    atomic.Uint64
	hearing atomic.Pointer[hearing]
	written recentWrites

	unreadIntents atomic.Bool // the store holds accepted authorizations that could not be read, or whose platform is not configured
	// unreadForwards: the store holds events to forward that could not be read.
	unreadForwards atomic.Bool
	givenUp        atomic.Uint64 // writings of accepted authorizations
	lookedFor      atomic.Uint64 // of those

	shares sharing
	names  names
	seeks  seeks
	shown  *Window[Key, shownInfo]
	orders *Window[Key, time.Time]

	strangers strangers
	verify    [verifyShards]verifyShard
	confirm   confirmFiles

	using  sync.Mutex // one Use after the other; guards unread
	unread bool       // the spill folder holds what could not be read

	mu       sync.Mutex // guards what follows, and the step from open to closed; nobody waits for a disk under it
	started  bool
	since    time.Time // of the first Use
	uses     uint64
	work     sync.WaitGroup
	workCtx  context.Context
	stopWork context.CancelFunc
	loopCtx  context.Context
	stopLoop context.CancelFunc
}

// NewManager returns a manager that answers ErrNotConfigured until Use. It only allocates.
func NewManager() *Manager {
	m := &Manager{
		turns:     semaphore.NewWeighted(allTurns),
		strangers: newStrangers(),
		shown:     NewWindow[Key, shownInfo](shownLife, maxShown),
		orders:    NewWindow[Key, time.Time](RenewNowEvery, maxOrders),
		confirm:   confirmFiles{accounts: NewWindow[Key, confirmState](confirmMemory, maxConfirmStates)},
	}
	m.queue.init()
	return m
}

// Use makes env current for every operation that starts from now on. The first call starts the background loop,
// which resumes the intents in the store and asks WeChat for tickets where there is none. After Close it does nothing.
//
// It waits for the disk of a spill folder that is a new one, for storeTimeout or twice that; what goes on with the
// environment of before does not.
func (m *Manager) Use(env *Environment) {
	env = env.prepared()
	m.using.Lock()
	defer m.using.Unlock()
	if m.closed.Load() {
		return
	}
	old := m.env.Load()
	m.pending.moved(env.Spill)
	if old == nil || old.Spill != env.Spill || m.unread {
		m.unread = !m.loadSpill(env) // before anybody reads an older record from the store
	}
	if !m.swap(old, env) || m.pending.len() == 0 {
		return
	}
	m.queue.add("pending", 0, m.writePending)
	if old != nil && old.Spill != env.Spill {
		ctx, cancel := context.WithTimeout(m.workCtx, storeTimeout)
		defer cancel()
		m.spillWaiting(ctx, env) // what it does not come to, that job does
	}
}

// swap puts env in the place of old, which is nil at the first time. It is false once the manager is closed.
func (m *Manager) swap(old, env *Environment) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed.Load() {
		return false
	}
	if !m.started {
		c, err := newCache()
		if err != nil { // only for sizes that are wrong, and ours are constant
			env.Log.Error("read cache cannot be made; tokens stay unavailable", "error", err)
			return false
		}
		m.started, m.since = true, time.Now()
		m.cache.Store(c)
		m.workCtx, m.stopWork = context.WithCancel(context.Background())
		m.loopCtx, m.stopLoop = context.WithCancel(m.workCtx)
		m.work.Go(func() {
			env.settle(m.loopCtx)
			m.runQueue(m.loopCtx)
		})
	}
	if env.Sealer == nil && (old == nil || old.Sealer != nil) {
		env.Log.Warn("no seal_key: tokens are stored as Caddy stores private keys, unsealed")
	}
	m.uses++
	env.serial = m.uses
	m.sealKeys.use(env.Sealer)
	m.listen(old, env)
	m.env.Store(env)
	m.useResealing(env)
	if m.unreadIntents.Swap(false) || old == nil { // after env is there: who leaves one looks whether it still is
		m.queue.add("resume", 0, m.resumeIntents)
	}
	if env.Forward != nil && (m.unreadForwards.Swap(false) || old == nil || old.Forward == nil) {
		m.lookForForwards("forwards", 0)
	}
	if env.Forward == nil && (old == nil || old.Forward != nil) {
		m.forwards.setUnwanted(unwantedForwards{})
		m.queue.add("unwanted forwards", 0, m.watchUnwanted)
		m.queue.hasten("unwanted forwards") // it may wait for the next look at those of before
	}
	m.queue.add("sealing", 0, m.keepSaying)
	m.troubles.forgive()
	for _, p := range env.Platforms {
		m.queue.add(pushJob(p.AppID), 0, m.watchTicket(p.AppID))
		if env.RosterEvery > 0 {
			m.queue.add(rosterJob(p.AppID), 0, m.watchRoster(p.AppID))
		}
		if env.ConfirmFiles {
			m.queue.add(confirmJob(p.AppID), 0, m.watchConfirmFile(p.AppID))
		}
	}
	return true
}

// settle waits until the configuration stays.
func (e *Environment) settle(ctx context.Context) {
	if e.Settled == nil {
		return
	}
	limit := time.After(settleLimit)
	look := time.NewTicker(settleLook)
	defer look.Stop()
	for !e.Settled() {
		select {
		case <-look.C:
		case <-limit:
			return
		case <-ctx.Done():
			return
		}
	}
}

// Close stops the background loop, lets running renewals finish for a bounded time, tries once more to write what waits
// for the store, and releases everything. Later calls answer ErrClosed.
func (m *Manager) Close() {
	m.mu.Lock()
	was := m.closed.Swap(true)
	started := m.started
	m.mu.Unlock()
	if was || !started {
		return
	}
	m.stopLoop()
	m.intents.end() // what waits for one may be work that is waited for here
	m.seeks.close()
	finished := make(chan struct{})
	go func() { m.work.Wait(); close(finished) }()
	if !waitFor(finished, closeGrace) {
		m.stopWork()
		waitFor(finished, closeEnd)
	}
	m.stopWork()
	m.flush()
	m.cache.Load().close()
}

// flush is Close's last attempt to write what the store did not take.
func (m *Manager) flush() {
	env := m.env.Load()
	if m.Waiting() > 0 || m.Unsaved() > 0 {
		done := make(chan struct{})
		ctx, cancel := context.WithTimeout(context.Background(), flushTimeout)
		defer cancel()
		go func() {
			defer close(done)
			var err error
			defer m.recovered(&err)
			for _, platform := range m.tickets.waiting() {
				_ = m.saveTicket(ctx, env, platform) // what fails is counted below
			}
			_ = m.writeWaiting(ctx, env)
		}()
		waitFor(done, flushTimeout) // the store may ignore the context
	}
	if n := m.Unsaved(); n > 0 {
		env.Log.Error("the gateway ends with tokens that could not be written; what they stand for may be lost", "records", n)
	}
}

// waitFor reports whether c was closed in time.
func waitFor(c <-chan struct{}, limit time.Duration) bool {
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-c:
		return true
	case <-t.C:
		return false
	}
}

// firstUse is when the manager was first used.
func (m *Manager) firstUse() time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.since
}

// Platforms are the appids of the platforms that are configured.
func (m *Manager) Platforms() (appids []string) {
	if env := m.env.Load(); env != nil {
		for i := range env.Platforms {
			appids = append(appids, env.Platforms[i].AppID)
		}
	}
	return appids
}

// begin counts one piece of background work, which must end with m.work.Done; it reports false once closed.
func (m *Manager) begin() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed.Load() || !m.started {
		return false
	}
	m.work.Add(1)
	return true
}

// current returns the environment to use for one whole operation.
func (m *Manager) current() (*Environment, error) {
	if m.closed.Load() {
		return nil, ErrClosed
	}
	env := m.env.Load()
	if env == nil {
		return nil, fmt.Errorf("token manager: %w", ErrNotConfigured)
	}
	return env, nil
}

// knows returns an error unless the configuration has the credentials that a key stands on.
func (e *Environment) knows(k Key) error {
	ok := false
	switch k.Kind {
	case KindComponent, KindAuthorizer:
		_, ok = e.platform(k.Platform)
		if !ok {
			return fmt.Errorf("platform %q: %w", printable(k.Platform, maxID), ErrNotConfigured)
		}
		if k.Kind == KindAuthorizer && (k.AppID == "" || len(k.AppID) > maxID) {
			return fmt.Errorf("appid %q: %w", printable(k.AppID, maxID), ErrNotAuthorized)
		}
		return nil
	case KindAccount:
		if _, ok = e.account(k.AppID); ok {
			return nil
		}
	case KindJSAPI, KindCard:
		return e.knows(k.account())
	}
	return fmt.Errorf("%s %q: %w", printable(string(k.Kind), maxID), printable(k.AppID, maxID), ErrNotConfigured)
}

// Get returns a token that works, as far as is known. A fresh one comes from memory; a stale one too, and is renewed
// in the background; otherwise Get waits for the one renewal that all callers share, until ctx ends.
func (m *Manager) Get(ctx context.Context, k Key) (Token, error) {
	env, err := m.current()
	if err != nil {
		return Token{}, err
	}
	return m.token(ctx, env, k)
}

// lastingWait is for how long GetLasting waits while there is a token at hand: SDKs give up after 3 seconds.
const lastingWait = 2 * time.Second

// GetLasting is Get for who passes the token on, or what is made with it, and wants it to live for a while yet: a token
// with less than least left is renewed first, and is returned all the same if that does not succeed soon. Least is not
// more than the margin at which the kind of token turns stale.
func (m *Manager) GetLasting(ctx context.Context, k Key, least time.Duration) (Token, error) {
	env, err := m.current()
	if err != nil {
		return Token{}, err
	}
	held, err := m.token(ctx, env, k)
	if err != nil || time.Until(held.ExpiresAt) >= least {
		return held, err
	}
	ctx, cancel := context.WithTimeout(ctx, lastingWait)
	defer cancel()
	if renewed, err := m.awaitRenewal(ctx, env, k, secret.String{}); err == nil {
		return renewed, nil
	}
	return held, nil
}

func (m *Manager) token(ctx context.Context, env *Environment, k Key) (Token, error) {
	if err := env.knows(k); err != nil {
		return Token{}, err
	}
	e := m.cache.Load().get(k)
	now := instantOf(time.Now())
	if e == nil || !e.live(now) {
		return m.awaitToken(ctx, env, k, e)
	}
	if m.outOfDate(e) {
		if e = m.upToDate(ctx, env, e); !e.live(now) {
			return m.awaitToken(ctx, env, k, e)
		}
	}
	if k.isJSTicket() && k.Platform != "" {
		// The ticket of an account that took its authorization back is worth nothing.
		a := m.cache.Load().get(k.account())
		if a != nil {
			a = m.upToDate(ctx, env, a)
		} else if m.hearing.Load() != nil {
			a = m.accountOf(ctx, env, k) // nothing would say here that it went on another node
		}
		if a != nil {
			if err := m.unauthorized(ctx, env, a); err != nil {
				return Token{}, err
			}
		}
	}
	m.renewIfStale(env, e, now)
	return e.token, nil
}

// awaitToken is the slow path of token: e, the cached entry, is nil or has no live token.
func (m *Manager) awaitToken(ctx context.Context, env *Environment, k Key, e *entry) (Token, error) {
	env.Observer.TokenAwaited(1)
	defer env.Observer.TokenAwaited(-1)
	var err error
	if e == nil || !e.believed(instantOf(time.Now())) {
		if e, err = m.lookup(ctx, env, k); err != nil {
			return Token{}, err
		}
	}
	if now := instantOf(time.Now()); e.live(now) {
		if k.isJSTicket() && k.Platform != "" { // as in token, and the account may not have been met since it revoked
			if a, err := m.lookup(ctx, env, k.account()); err == nil && a.rec != nil {
				if err := m.unauthorized(ctx, env, a); err != nil {
					return Token{}, err
				}
			}
		}
		m.renewIfStale(env, e, now)
		return e.token, nil
	}
	if e, err = m.restored(ctx, env, e); err != nil {
		return Token{}, err
	}
	if err := e.unrenewable(); err != nil {
		return Token{}, err
	}
	var refused secret.String
	if e.refused.Load() {
		refused = e.token.Value
	}
	token, err := m.awaitRenewal(ctx, env, k, refused)
	if err != nil && !refused.IsZero() {
		if e := m.cache.Load().get(k); e != nil && e.live(instantOf(time.Now())) {
			return e.token, nil // spared
		}
	}
	return token, err
}

// Renew is called when WeChat refused a token. If the current token is another one already, that is returned and
// nothing is refreshed; otherwise Renew waits for the one renewal that all callers share. An absent refused means
// whatever is current.
func (m *Manager) Renew(ctx context.Context, k Key, refused secret.String) (Token, error) {
	env, err := m.current()
	if err != nil {
		return Token{}, err
	}
	return m.renewRefused(ctx, env, k, refused)
}

func (m *Manager) renewRefused(ctx context.Context, env *Environment, k Key, refused secret.String) (Token, error) {
	if err := env.knows(k); err != nil {
		return Token{}, err
	}
	e, err := m.lookup(ctx, env, k)
	if err != nil {
		return Token{}, err
	}
	if k.Kind == KindAuthorizer && !e.authorized() {
		if e, err = m.authorizing(ctx, env, e); err != nil {
			return Token{}, err
		}
		switch {
		case !e.authorized():
			return Token{}, e.unrenewable()
		case e.live(instantOf(time.Now())) && !e.token.Value.Same(refused):
			return e.token, nil // of the authorization that came just now
		}
	}
	if refused.IsZero() {
		refused = e.token.Value
	}
	switch {
	case !e.token.Value.Same(refused) && e.live(instantOf(time.Now())):
		return e.token, nil
	case e.token.Value.Same(refused) && !refused.IsZero():
		m.troubles.refuse(k, refused)
		e.refused.Store(true)
	case e.rec == nil:
		m.troubles.refuse(k, refused) // the record, when it can be read again, may hold it
	}
	if err := e.unrenewable(); err != nil {
		return Token{}, err
	}
	return m.awaitRenewal(ctx, env, k, refused)
}

const (
	// replacedWait is for how long Replaced waits: from the moment in which WeChat voids a token to the record of the next one it
	// takes WeChat's answer and one write.
	replacedWait = time.Second
	// replacedEvery is how often it looks meanwhile, at what is in memory.
	replacedEvery = 20 * time.Millisecond
)

// ErrNotReplaced means that the token which WeChat refused is the current one.
var ErrNotReplaced = errors.New("the token was not replaced")

// Replaced returns the current token if it is another one than the refused, and takes the refusal for no reason to renew. WeChat
// voids a token before the next one is known here: so Replaced waits for a moment while a renewal is under way, or may be on
// another node.
func (m *Manager) Replaced(ctx context.Context, k Key, refused secret.String) (Token, error) {
	env, err := m.current()
	if err != nil {
		return Token{}, err
	}
	limit := time.NewTimer(replacedWait)
	defer limit.Stop()
	look := time.NewTicker(replacedEvery)
	defer look.Stop()
	for {
		renewing := m.mayBeRenewed(k) // asked first, or one that ends in between would be missed
		token, err := m.token(ctx, env, k)
		switch {
		case err != nil:
			return Token{}, err
		case !token.Value.Same(refused):
			return token, nil
		case !renewing:
			return Token{}, ErrNotReplaced
		}
		select {
		case <-look.C:
		case <-limit.C:
			return Token{}, ErrNotReplaced
		case <-ctx.Done():
			return Token{}, fmt.Errorf("wait for a token: %w", ctx.Err())
		}
	}
}

// mayBeRenewed reports whether a renewal is under way on this node, or may be on one that is heard.
func (m *Manager) mayBeRenewed(k Key) bool {
	h := m.hearing.Load()
	return h != nil && h.since.Load() != deaf || m.locks.taken(k.recordName()+renewalLock)
}

// lookup returns the entry of a key from the cache or else from the store, read once for all who ask at the same
// time; its token may have ended.
func (m *Manager) lookup(ctx context.Context, env *Environment, k Key) (*entry, error) {
	if e := m.cache.Load().get(k); e != nil && e.believed(instantOf(time.Now())) {
		return m.upToDate(ctx, env, e), nil
	}
	e, err := share(ctx, m, env.flight("load", k), loadTimeout, func(ctx context.Context) (*entry, error) {
		if e := m.cache.Load().get(k); e != nil && e.believed(instantOf(time.Now())) && !m.outOfDate(e) {
			return e, nil // read between the look and the turn
		}
		return m.reload(ctx, env, k)
	})
	if replaceable(k, err) {
		return newEntry(k, nil, time.Now()), nil
	}
	if err == nil && m.hearingSince() != deaf {
		e = m.upToDate(ctx, env, e) // a read that was under way may be of before a change
	}
	return e, err
}

// replaceable reports whether a record that the store does not give can do without: WeChat gives a new token for an
// appid and its secret, but not for an authorizer whose refresh token is in the record.
func replaceable(k Key, err error) bool {
	return k.Kind != KindAuthorizer && errors.Is(err, ErrStore) && !errors.Is(err, errUnreadable)
}

// share runs fn once for all callers that give the same name at the same time. It runs on the manager's time, not
// on a caller's: a caller whose context ends leaves, and the others still get their result.
func share[T any](ctx context.Context, m *Manager, name string, limit time.Duration, fn func(context.Context) (T, error)) (T, error) {
	var zero T
	select {
	case r := <-launch(m, name, limit, fn):
		if r.Err != nil {
			return zero, r.Err
		}
		v, _ := r.Val.(T)
		return v, nil
	case <-ctx.Done():
		return zero, fmt.Errorf("wait for a token: %w", ctx.Err())
	}
}

// launch is share without the waiting. The channel is buffered: nobody needs to read it.
func launch[T any](m *Manager, name string, limit time.Duration, fn func(context.Context) (T, error)) <-chan singleflight.Result {
	return m.flights.DoChan(name, func() (v any, err error) {
		if !m.begin() {
			return nil, ErrClosed
		}
		defer m.work.Done()
		defer m.recovered(&err)
		ctx, cancel := context.WithTimeout(m.workCtx, limit)
		defer cancel()
		return fn(ctx)
	})
}

// errPanic is a bug that must cost one operation, not the process.
var errPanic = errors.New("internal error; the log has the stack")

// recovered is deferred by background work.
func (m *Manager) recovered(err *error) {
	if r := recover(); r != nil {
		*err = errPanic
		if env := m.env.Load(); env != nil {
			// The value may quote what it failed on; its type does not.
			env.Log.Error("background work panicked", "panic_type", fmt.Sprintf("%T", r), "stack", string(debug.Stack()))
		}
	}
}
