package tokens

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

const (
	// renewalLockWait is the longest wait for another node's renewal, where the store cannot tell that the node lives; the
	// lock of one that died is stale after ten seconds in Caddy's file storage.
	renewalLockWait = 12 * time.Second
	// writeLockWait bounds the wait for the lock around one write.
	writeLockWait = 12 * time.Second
	// keepTimeout bounds the wait for this node's own turn to write what must be written. Whoever is before waits for the
	// store's lock and for two of its operations.
	keepTimeout = writeLockWait + 2*storeTimeout
	// sameTokenPause is the wait after WeChat gave back the token that we have, which is not near enough to its end.
	sameTokenPause = 30 * time.Second
	// maxSwaps bounds the attempts to change a record that others change at the same time, in spite of its lock.
	maxSwaps = 5
)

// grant is what WeChat handed out.
type grant struct {
	access  secret.String
	refresh secret.String // authorizers only; absent: unchanged
	asked   time.Time     // when the call began, so that the time on the network is not part of the life
	life    time.Duration
	forced  bool // a plain account's, with force_refresh

	from    secret.String // authorizers only: the refresh token that it was had with
	release func()        // if not nil, to be called once the grant is kept
}

// renewIfStale starts one background renewal of a live token, unless it is fresh or one was tried a moment ago.
func (m *Manager) renewIfStale(env *Environment, e *entry, now instant) {
	if e.fresh(now) || !e.renewable() {
		return
	}
	due := e.renewAt.Load()
	if now.steady < due || !e.renewAt.CompareAndSwap(due, now.steady+int64(renewTimeout)) {
		return
	}
	launch(m, env.flight("renew", e.key), renewTimeout, func(ctx context.Context) (*entry, error) {
		return m.renew(ctx, env, e.key, secret.String{}, false)
	})
}

// awaitRenewal waits for a renewal and returns its token, which is live and not the refused one.
func (m *Manager) awaitRenewal(ctx context.Context, env *Environment, k Key, refused secret.String) (Token, error) {
	return m.awaitRenewalFor(ctx, env, k, refused, false)
}

// awaitRenewalFor is awaitRenewal. Ordered says that the token which is refused works as far as is known, and serves on
// until there is another; that WeChat gives it again is no failure then.
func (m *Manager) awaitRenewalFor(ctx context.Context, env *Environment, k Key, refused secret.String, ordered bool) (Token, error) {
	// A flight that was under way when we joined may have been asked for less than we need: one more goes for us.
	for round := range 2 {
		if account := k.account(); m.troubles.halfway(account) { // news of a record does not end these troubles, what it says may
			if e := m.cache.Load().get(account); e != nil {
				m.upToDate(ctx, env, e)
			} else {
				m.accountOf(ctx, env, k)
			}
		}
		if err := m.barred(k); err != nil {
			return Token{}, err
		}
		e, err := m.renewed(ctx, env, k, refused, ordered)
		switch {
		case err != nil:
			return Token{}, err
		case k.Kind == KindAuthorizer && !e.authorized():
			return Token{}, fmt.Errorf("%s: %w", k.AppID, ErrNotAuthorized)
		case e.live(instantOf(time.Now())) && (refused.IsZero() || !e.token.Value.Same(refused) || ordered && round > 0):
			return e.token, nil
		}
	}
	return Token{}, said(ErrBackoff, fmt.Sprintf("WeChat gave no new %s token for %s", k.Kind, k.owner()), fmt.Sprintf("微信没有为 %s 给出新的 %s 令牌", k.owner(), k.Kind))
}

// renewed is the entry that the renewal comes to which all callers share, or that another node has brought before: where it is
// heard, nobody waits for the lock in which that node may have died, or for a store that does not give it. Who finds it there
// already begins no renewal.
func (m *Manager) renewed(ctx context.Context, env *Environment, k Key, refused secret.String, ordered bool) (*entry, error) {
	var renewal <-chan singleflight.Result
	for {
		arrived, leave := m.arrivals.await(k)
		if e := m.cache.Load().get(k); e != nil && !m.outOfDate(e) && e.needless(refused, instantOf(time.Now())) {
			leave()
			return e, nil
		}
		if renewal == nil {
			renewal = launch(m, env.flight("renew", k), renewTimeout, func(ctx context.Context) (*entry, error) {
				return m.renew(ctx, env, k, refused, ordered)
			})
		}
		select {
		case <-arrived:
			leave()
			continue
		case r := <-renewal:
			leave()
			e, _ := r.Val.(*entry)
			return e, r.Err
		case <-ctx.Done():
			leave()
			return nil, fmt.Errorf("wait for a token: %w", ctx.Err())
		}
	}
}

// needless reports whether the entry's token needs no renewal, or at least is another one than the refused and works.
func (e *entry) needless(refused secret.String, now instant) bool {
	if refused.IsZero() {
		return e.fresh(now)
	}
	return e.live(now) && !e.token.Value.Same(refused)
}

// arrivals are those who wait for the next record of a key that this node takes note of.
type arrivals struct {
	mu      sync.Mutex
	waiting map[Key]*arrival
}

type arrival struct {
	come  chan struct{} // closed when the record has
	users int           // who wait; guarded by arrivals.mu
}

// await returns what is closed when the next record comes. Leave ends the waiting.
func (a *arrivals) await(k Key) (come <-chan struct{}, leave func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.waiting == nil {
		a.waiting = make(map[Key]*arrival)
	}
	next := a.waiting[k]
	if next == nil {
		next = &arrival{come: make(chan struct{})}
		a.waiting[k] = next
	}
	next.users++
	return next.come, func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		if next.users--; next.users == 0 && a.waiting[k] == next {
			delete(a.waiting, k)
		}
	}
}

// tell wakes who waits for a record of the key.
func (a *arrivals) tell(k Key) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if next := a.waiting[k]; next != nil {
		close(next.come)
		delete(a.waiting, k)
	}
}

// barred returns the error that a renewal would end with, as far as is known without the store and without WeChat.
func (m *Manager) barred(k Key) error {
	if err := m.troubles.hold(k); err != nil {
		return err
	}
	switch {
	case k.Kind == KindAccount:
		return nil
	case k.isJSTicket():
		if a := m.cache.Load().get(k.account()); a != nil && a.live(instantOf(time.Now())) {
			return nil
		}
		return m.barred(k.account())
	}
	err := m.tickets.missing(k.Platform)
	if err == nil || k.Kind == KindComponent {
		return err
	}
	if c := m.cache.Load().get(ComponentKey(k.Platform)); c != nil && c.live(instantOf(time.Now())) {
		return nil
	}
	return tokenMissing(ComponentKey(k.Platform), err)
}

// renew is one renewal: the cluster's lock, another look, WeChat, the store, the cache. It runs once per key at a
// time on this node, also when the configuration changes meanwhile. Ordered: WeChat has not refused the token.
func (m *Manager) renew(ctx context.Context, env *Environment, k Key, refused secret.String, ordered bool) (*entry, error) {
	lock := k.recordName() + renewalLock
	leave, err := m.locks.lock(ctx, lock)
	if err != nil {
		return nil, fmt.Errorf("wait for a renewal under way: %w", err)
	}
	defer leave()
	// Time for a call is left over: one that is cut off may lose what WeChat has just handed out.
	end := time.Now().Add(renewTimeout - closeGrace)
	unlock, lockErr := m.lockStore(ctx, env, lock, renewalLockWait)
	for errors.Is(lockErr, ErrLockHeld) && ctx.Err() == nil && time.Now().Before(end) {
		unlock, lockErr = m.lockStore(ctx, env, lock, min(renewalLockWait, time.Until(end))) // the holder lives, and WeChat is slow
	}
	if lockErr == nil {
		defer unlock()
	}
	e, err := m.recall(ctx, env, k)
	if err != nil {
		if _, lacks := LacksSealKey(err); lacks && m.env.Load() == env {
			m.heldBack(k, err) // nodes that have the key need the lock, and the log has been told
		}
		return nil, err
	}
	now := instantOf(time.Now())
	if e.refused.Load() {
		refused, ordered = e.token.Value, false // also if the caller's was an earlier one
	}
	isRefused := !refused.IsZero() && e.token.Value.Same(refused)
	switch {
	case !isRefused && (e.fresh(now) || !refused.IsZero() && e.live(now)):
		return e, nil // somebody did it while we waited
	case !e.renewable():
		return nil, e.unrenewable()
	case errors.Is(lockErr, ErrLockHeld), lockErr != nil && ctx.Err() != nil:
		return nil, lockErr
	case lockErr != nil && e.live(now) && !e.refused.Load(): // one that is spared may be dead
		m.renewalFailed(env, k, lockErr)
		return nil, lockErr
	case lockErr != nil:
		env.Log.Error("the store gives no lock; renewing a token without it, another node may do the same",
			"kind", k.Kind, "appid", k.owner(), "error", lockErr)
	}
	if isRefused && !ordered {
		if err := m.troubles.spend(k); err != nil {
			e.spare()
			return nil, err
		}
	}
	g, err := m.fetch(ctx, env, k, e, refused)
	if g.release != nil {
		defer g.release()
	}
	if errors.Is(err, errOvertaken) {
		return m.recall(ctx, env, k)
	}
	if err != nil {
		if k.Kind == KindAccount && errors.Is(err, ErrBackoff) {
			e.spare()
		}
		m.keepRefreshToken(ctx, env, k, e, g)
		if other := m.renewedElsewhere(ctx, env, e); other != nil {
			return other, nil
		}
		if counts(err) {
			m.renewalFailed(env, k, err)
		}
		return nil, err
	}
	if isRefused && !ordered && now.before(e.staleAt) && !g.access.Same(refused) {
		if k.Kind == KindAccount && !g.forced {
			m.rogue(env, k) // stable_token would give the refused one, had nobody replaced it
		} else {
			m.troubles.replaced(k, replacement{refused, g.asked}) // before those who can tell get the token
		}
	}
	return m.keep(ctx, env, k, e, g)
}

// renewedElsewhere returns what another node has put in the place of e while a renewal failed here, or nil: this process
// may have slept for so long that its lock and its call to WeChat ended.
func (m *Manager) renewedElsewhere(ctx context.Context, env *Environment, e *entry) *entry {
	if m.hearing.Load() == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), checkWait)
	defer cancel()
	now, err := m.reread(ctx, env, e.key)
	if err != nil || !now.live(instantOf(time.Now())) || now.token.Value.Same(e.token.Value) {
		return nil
	}
	return now
}

// Healed says that WeChat took k's current token for a call for which it had refused another at that time. So the refusal was of that one,
// and not of its kind, as on a path that takes another: if no node here had replaced it, another system has.
func (m *Manager) Healed(k Key, refused secret.String, at time.Time) {
	if env, err := m.current(); err == nil && m.troubles.confirm(k, refused, at) {
		m.rogue(env, k)
	}
}

// rogue reports a token that WeChat refused although it had life left and no node here renewed it.
func (m *Manager) rogue(env *Environment, k Key) {
	env.Observer.RogueRefresh(k.Kind, k.owner())
	env.Observer.Happened(TokenRogue, k, nil)
	if times, say := m.troubles.rogue(k); say {
		env.Log.Warn("another system is refreshing tokens of "+k.owner()+": WeChat refused one that nobody here had renewed; have it use the gateway instead",
			"kind", k.Kind, "appid", k.owner(), "platform", k.Platform, "times", times)
	}
}

// recall reads the record again, and falls back on what this node remembers when the store fails.
func (m *Manager) recall(ctx context.Context, env *Environment, k Key) (*entry, error) {
	e, err := m.reload(ctx, env, k)
	if err == nil || errors.Is(err, errUnreadable) {
		return e, err
	}
	if e = m.cache.Load().get(k); e != nil && e.rec != nil {
		return e, nil
	}
	if replaceable(k, err) {
		return newEntry(k, nil, time.Now()), nil
	}
	return nil, err
}

// fetch asks WeChat for a token.
func (m *Manager) fetch(ctx context.Context, env *Environment, k Key, e *entry, refused secret.String) (g grant, err error) {
	start := time.Now()
	switch k.Kind {
	case KindComponent:
		g, err = m.fetchComponent(ctx, env, k.Platform)
	case KindAccount:
		g, err = m.fetchAccount(ctx, env, k.AppID, e.rec, refused)
	case KindJSAPI, KindCard:
		g, err = m.fetchJSTicket(ctx, env, k)
	default:
		g, err = m.fetchAuthorizer(ctx, env, k, e.rec)
	}
	if err == nil && g.access.IsZero() {
		err = said(ErrUnreachable, "the answer has no token", "应答中没有令牌")
	}
	if err == nil || counts(err) {
		env.Observer.TokenRefreshed(k.Kind, k.owner(), time.Since(start), err)
		what := TokenRenewed
		if err != nil {
			what = TokenFailed
		}
		env.Observer.Happened(what, k, err)
	}
	return g, err
}

// keep writes a renewed token and publishes it, unless what stands in the record outdates it: a new authorization, or
// its end, beats a refresh that was under way with the old refresh token. Base is what the renewal started from.
func (m *Manager) keep(ctx context.Context, env *Environment, k Key, base *entry, g grant) (*entry, error) {
	expires := g.asked.Add(g.life).Truncate(time.Second)
	outdated, same := false, false
	e, err := m.commit(ctx, env, k, true, func(cur *record) *record {
		next := &record{}
		back := base.rec.supersedes(cur) // the store was emptied, or put back to an older state, under us
		switch {
		case back:
			*next = *base.rec
		case cur != nil:
			*next = *cur
		}
		if outdated = next.outdates(base.rec, g); outdated {
			return nil
		}
		if g.forced {
			next.ForcedAt, next.Forced = g.asked.Truncate(time.Second), next.forcedOn(g.asked)+1
		}
		same = next.AccessToken.Same(g.access) && expires.Sub(next.ExpiresAt).Abs() <= 2*time.Second &&
			(g.refresh.IsZero() || next.RefreshToken.Same(g.refresh))
		if same && !back && !g.forced {
			return nil
		}
		if same {
			return next
		}
		next.take(g)
		if !g.refresh.IsZero() {
			next.RefreshToken = g.refresh
		}
		return next
	})
	switch {
	case e == nil:
		return nil, err
	case outdated:
		env.Log.Warn("a renewed token is dropped: its record was re-authorised, revoked or renewed meanwhile",
			"kind", k.Kind, "appid", k.owner(), "platform", k.Platform)
		return e, nil
	case same:
		// stable_token gives the same token until its last five minutes: no news, ask again a little later.
		e.renewAt.Store(steady(time.Now().Add(sameTokenPause)))
		return e, nil
	}
	m.troubles.over(k, g.access)
	env.Log.Info("token renewed", "kind", k.Kind, "appid", k.owner(), "platform", k.Platform, "expires_in", int64(g.life/time.Second))
	return e, nil
}

// keepRefreshToken keeps what a failed renewal brought all the same: an answer without an access token may have a new refresh
// token, which made the one before it void. Base is what the renewal started from.
func (m *Manager) keepRefreshToken(ctx context.Context, env *Environment, k Key, base *entry, g grant) {
	if g.refresh.IsZero() || base.rec != nil && base.rec.RefreshToken.Same(g.refresh) {
		return
	}
	e, _ := m.commit(ctx, env, k, true, func(cur *record) *record { // which logs what fails
		next := &record{}
		switch {
		case base.rec.supersedes(cur):
			*next = *base.rec
		case cur != nil:
			*next = *cur
		}
		if next.outdates(base.rec, g) {
			return nil
		}
		next.RefreshToken = g.refresh
		return next
	})
	if e != nil && e.rec != nil && e.rec.RefreshToken.Same(g.refresh) {
		m.troubles.halved(k, e.token.Value)
	}
}

// outdates reports whether a grant, of a renewal that started from base, comes too late for r, the record as it is by
// now. Generations do not tell: a record can be written again without a change.
func (r *record) outdates(base *record, g grant) bool {
	if base == nil {
		base = &record{}
	}
	if r.revoked() {
		return true
	}
	if !r.RefreshToken.Same(g.from) {
		// A re-authorization makes the refresh token void that the grant came from.
		return !r.sameAuthorization(base) || r.ObtainedAt.After(g.asked)
	}
	rotated := !g.refresh.IsZero() && !g.refresh.Same(g.from)
	if rotated || r.AccessToken.IsZero() || r.AccessToken.Same(base.AccessToken) {
		return false
	}
	return !r.sameAuthorization(base) || r.ObtainedAt.After(g.asked)
}

// renewalFailed notes a failure: the next attempt waits, and the log hears of it once and then rarely.
func (m *Manager) renewalFailed(env *Environment, k Key, err error) {
	if m.env.Load() != env {
		return // what failed was the configuration of before
	}
	if !m.heldBack(k, err) {
		return
	}
	args := []any{"kind", k.Kind, "appid", k.owner(), "platform", k.Platform, "error", err}
	if api, ok := errors.AsType[*APIError](err); ok {
		args = append(args, m.explained(k, api)...)
	}
	env.Log.Error("token cannot be renewed; the old one serves as long as it lives", args...)
}

// heldBack has the next attempt at a renewal wait, and reports whether the log should hear of the failure.
func (m *Manager) heldBack(k Key, err error) (say bool) {
	retryAt, say := m.troubles.failed(k, err)
	if e := m.cache.Load().get(k); e != nil {
		e.renewAt.Store(steady(retryAt))
	}
	return say
}

// reload reads a key's record from the store into the cache and returns its entry.
func (m *Manager) reload(ctx context.Context, env *Environment, k Key) (*entry, error) {
	unlock, err := m.locks.lock(ctx, k.recordName())
	if err != nil {
		return nil, fmt.Errorf("%w: read of %s: %w", ErrStore, k.recordName(), err)
	}
	defer unlock()
	r, err := m.readSound(ctx, env, k, false)
	if err != nil && r.rec == nil {
		return nil, err
	}
	return m.publish(k, r.rec, r.beat), nil
}

// readSound is readRecord that sets a damaged record aside. What this node still knows of it takes its place; an
// authorizer of which it knows nothing is had from WeChat, by whoever asks for it next or by the next reading of the list.
// Locked says that the caller has the store's lock on the record.
func (m *Manager) readSound(ctx context.Context, env *Environment, k Key, locked bool) (reading, error) {
	r, err := m.readRecord(ctx, env, k)
	if !errors.Is(err, errDamaged) {
		return r, err
	}
	if aside := m.setAside(ctx, env, k.recordName(), new(recordWire), locked); aside != nil {
		env.Log.Error("a damaged record cannot be set aside; tried again", "kind", k.Kind, "appid", k.owner(), "error", aside)
		return r, err
	}
	if held := m.cache.Load().get(k); held != nil && held.rec != nil {
		m.pending.put(k, held.rec, time.Time{})
		_ = m.spill(env, k) // Unsaved counts it otherwise
		m.queue.add("pending", 0, m.writePending)
	} else if k.Kind == KindAuthorizer {
		m.rosters.miss(k)
		m.wantRoster(k.Platform)
	}
	return m.readRecord(ctx, env, k)
}

// reading is a record, what the store has of it, and the manager's beat when that was asked for.
type reading struct {
	rec  *record // nil: there is none
	raw  []byte  // nil: the store has none
	beat uint64
}

// readRecord returns a key's record as it stands by the store and by what waits to be written. An error beside a record
// says that the store was not read, and that the record is the one that waits. The caller holds the key's lock.
func (m *Manager) readRecord(ctx context.Context, env *Environment, k Key) (reading, error) {
	var wire recordWire
	beat := m.beat.Load()
	raw, err := m.loadRaw(ctx, env, k.recordName())
	if err == nil {
		err = m.decodeStored(ctx, env, k.recordName(), raw, &wire)
	}
	waiting := m.pending.get(k)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return reading{waiting, nil, beat}, nil
	case err != nil:
		return reading{waiting, nil, beat}, err
	}
	stored := wire.record()
	if waiting == nil {
		return reading{stored, raw, beat}, nil
	}
	rec := m.pending.settle(k, waiting, stored)
	m.unspill(env, k)
	if rec == stored && !stored.same(waiting) {
		held := m.cache.Load().get(k)
		if waiting.supersedes(stored) && held != nil && !held.rec.supersedes(waiting) {
			m.cache.Load().drop(k) // it came from what waited, and would be taken for newer than the store
		}
		env.Log.Warn("a record that waited to be written is dropped: another node's is newer",
			"kind", k.Kind, "appid", k.owner(), "platform", k.Platform)
	}
	return reading{rec, raw, beat}, nil
}

// publish puts a record, which was read at that beat, into the cache, unless the one there supersedes it: the store was
// put back to an older state then. The caller holds the key's lock.
func (m *Manager) publish(k Key, rec *record, beat uint64) *entry {
	defer m.arrivals.tell(k) // also of a record that is known, which counts as of now
	c := m.cache.Load()
	held := c.get(k)
	if held != nil && held.rec.supersedes(rec) {
		held.read(beat)
		return held
	}
	e := newEntry(k, rec, time.Now())
	if held != nil && held.rec != nil && held.gen() == e.gen() && held.rec.same(rec) && e.recheckAt == 0 {
		held.read(beat)
		return held // it knows what WeChat refused
	}
	e.place = c.place(k)
	e.readAt.Store(beat)
	m.troubles.adopt(e)
	c.put(e)
	m.learnName(k, rec)
	return e
}

// commit changes a key's record: it reads it under the key's lock, asks change for the next one (nil: leave it as it
// is; the same: write it as it is), writes that durably and only then publishes it.
//
// Must says that the next record cannot be had again. Nobody's context cuts such a write off, and when the store
// cannot be locked, read or written, the record is kept in memory and written later; the entry is returned beside the
// error then. Nothing is ever written over a record that could not be read.
func (m *Manager) commit(ctx context.Context, env *Environment, k Key, must bool, change func(cur *record) *record) (*entry, error) {
	name := k.recordName()
	lockCtx := ctx
	if must {
		ctx = context.WithoutCancel(ctx) // each step below has its own deadline
		var cancel context.CancelFunc
		lockCtx, cancel = context.WithTimeout(ctx, keepTimeout)
		defer cancel()
	}
	unlock, err := m.locks.lock(lockCtx, name)
	if err != nil {
		err = fmt.Errorf("%w: write of %s: %w", ErrStore, name, err)
		if !must {
			return nil, err
		}
		held := m.cache.Load().get(k)
		cur := newest(m.pending.get(k), held)
		next := following(cur, held, change)
		if next == nil {
			return held, nil
		}
		m.keepWaiting(env, k, next, cur, err)
		return newEntry(k, next, time.Now()), err // not published: that needs the lock
	}
	defer unlock()
	for attempt := 1; ; attempt++ {
		e, again, err := m.commitOnce(ctx, env, k, must, attempt == maxSwaps, change)
		if !again {
			return e, err
		}
	}
}

// commitOnce is one attempt of commit; again: the record changed under it, or the lock was lost. The last attempt takes
// that for a failure of the store. The caller holds the key's lock.
func (m *Manager) commitOnce(ctx context.Context, env *Environment, k Key, must, last bool, change func(cur *record) *record) (e *entry, again bool, err error) {
	name := k.recordName()
	// What is read below and what is written are one step for all nodes: compare and swap.
	release, err := m.lockStore(ctx, env, name, writeLockWait)
	held := err == nil
	switch {
	case held:
		defer release()
	case !must:
		return nil, false, err
	default:
		env.Log.Error("the store gives no lock; writing a record without it", "kind", k.Kind, "appid", k.owner(), "error", err)
	}
	r, err := m.readSound(ctx, env, k, held)
	if err != nil && !must {
		return nil, false, err
	}
	cached, read := m.cache.Load().get(k), r.rec
	cur := newest(read, cached)
	next := following(cur, cached, change)
	if next == nil && cur != read && err == nil {
		next = cur // the store was emptied, or put back to an older state
	}
	if next == nil {
		return m.publish(k, cur, r.beat), false, nil
	}
	if known := cur.userName(); err == nil && known != "" && next.UserName == known && (r.raw == nil || read.userName() != known) {
		err = m.keepUserName(ctx, env, k, next.UserName) // which the store has lost as well
	}
	if err == nil {
		err = m.swapRecord(ctx, env, name, r.raw, next.wire())
	}
	switch {
	case err == nil:
		m.pending.stored(k, next)
		m.unspill(env, k)
		m.written.note(k, next)
	case !last && (errors.Is(err, ErrSwapped) || errors.Is(err, ErrLockLost)):
		return nil, true, nil
	case must:
		m.keepWaiting(env, k, next, cur, err)
	default:
		m.doubt(k) // the store may have taken it, and nobody tells a node of its own changes
		return nil, false, err
	}
	return m.publish(k, next, r.beat), false, err
}

// newest is the record that counts of one that was read and the one in the cache.
func newest(read *record, held *entry) *record {
	if held != nil && held.rec.supersedes(read) {
		return held.rec
	}
	return read
}

// following is the record that change makes of cur, with the next generation if it says anything new.
func following(cur *record, held *entry, change func(*record) *record) *record {
	next := change(cur)
	if next == nil {
		return nil
	}
	if !next.same(cur) {
		next.Gen = max(held.gen(), cur.gen(), next.Gen) + 1
	}
	return next
}

// keepWaiting keeps a record that the store did not take: on the node's own disk, or else in memory alone. It was made
// from base; nil: from none.
func (m *Manager) keepWaiting(env *Environment, k Key, rec, base *record, err error) {
	var obtained time.Time
	if base != nil {
		obtained = base.ObtainedAt
	}
	m.pending.put(k, rec, obtained)
	spilled := m.spill(env, k)
	m.queue.add("pending", backoffFirst, m.writePending)
	args := []any{"kind", k.Kind, "appid", k.owner(), "platform", k.Platform, "error", err}
	switch {
	case spilled == nil:
		env.Log.Error("a token record cannot be written: it waits in this node's spill folder; mend the store", args...)
	case errors.Is(spilled, errNoSpill):
		env.Log.Error("a token record cannot be written: it serves from memory and would be lost with the process; mend the store", args...)
	default:
		env.Log.Error("a token record can be written neither to the store nor to the spill folder: it serves from memory and would be lost with the process; mend the store",
			append(args, "spill_error", spilled)...)
	}
}

func (r *record) userName() string {
	if r == nil {
		return ""
	}
	return r.UserName
}

func (r *record) gen() uint64 {
	if r == nil {
		return 0
	}
	return r.Gen
}
