package tokens

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

const (
	// renewalLockWait is the longest wait for another node's renewal; the lock of a node that died is stale after ten
	// seconds in Caddy's file storage.
	renewalLockWait = 12 * time.Second
	// writeLockWait bounds the wait for the lock around one write.
	writeLockWait = 12 * time.Second
	// sameTokenPause is the wait after WeChat gave back the token that we have, which is not near enough to its end.
	sameTokenPause = 30 * time.Second
)

// grant is what WeChat handed out.
type grant struct {
	access  secret.String
	refresh secret.String // authorizers only; absent: unchanged
	asked   time.Time     // when the call began, so that the time on the network is not part of the life
	life    time.Duration
}

// renewIfStale starts one background renewal of a live token, unless it is fresh or one was tried a moment ago.
func (m *Manager) renewIfStale(env *Environment, e *entry, now int64) {
	if e.fresh(now) {
		return
	}
	due := e.renewAt.Load()
	if now < due || !e.renewAt.CompareAndSwap(due, now+int64(renewTimeout)) {
		return
	}
	launch(m, "renew\x00"+e.key.flight(), renewTimeout, func(ctx context.Context) (*entry, error) {
		return m.renew(ctx, env, e.key, secret.String{})
	})
}

// awaitRenewal waits for a renewal and returns its token, which is live and not the refused one.
func (m *Manager) awaitRenewal(ctx context.Context, env *Environment, k Key, refused secret.String) (Token, error) {
	// A flight that was under way when we joined may have been asked for less than we need: one more goes for us.
	for range 2 {
		if err := m.troubles.hold(k); err != nil {
			return Token{}, err
		}
		e, err := share(ctx, m, "renew\x00"+k.flight(), renewTimeout, func(ctx context.Context) (*entry, error) {
			return m.renew(ctx, env, k, refused)
		})
		switch {
		case err != nil:
			return Token{}, err
		case k.Kind == KindAuthorizer && !e.authorized():
			return Token{}, fmt.Errorf("%s: %w", k.AppID, ErrNotAuthorized)
		case e.live(time.Now().UnixNano()) && (refused.IsZero() || !e.token.Value.Same(refused)):
			return e.token, nil
		}
	}
	return Token{}, fmt.Errorf("%w: WeChat gave no new %s token for %s", ErrBackoff, k.Kind, k.owner())
}

// renew is one renewal: the cluster's lock, another look, WeChat, the store, the cache. It runs once per key at a
// time on this node.
func (m *Manager) renew(ctx context.Context, env *Environment, k Key, refused secret.String) (*entry, error) {
	unlock, lockErr := m.lockStore(ctx, env, k.recordName()+renewalLock, renewalLockWait)
	if lockErr == nil {
		defer unlock()
	}
	e, err := m.recall(ctx, env, k)
	if err != nil {
		return nil, err
	}
	if e.refused.Load() {
		refused = e.token.Value // whichever token the caller speaks of, this is the one not to get again
	}
	now := time.Now().UnixNano()
	another := !refused.IsZero() && !e.token.Value.Same(refused) && e.live(now)
	switch {
	case another || e.fresh(now):
		return e, nil // somebody did it while we waited
	case k.Kind == KindAuthorizer && !e.authorized():
		return nil, fmt.Errorf("%s: %w", k.AppID, ErrNotAuthorized)
	case lockErr != nil && e.live(now):
		m.renewalFailed(env, k, lockErr)
		return nil, lockErr
	case lockErr != nil:
		env.Log.Error("the store gives no lock; renewing a token without it, another node may do the same",
			"kind", k.Kind, "appid", k.owner(), "error", lockErr)
	}
	if e.refused.Load() {
		if err := m.troubles.spend(k); err != nil {
			return nil, err
		}
	}
	g, err := m.fetch(ctx, env, k, e, refused)
	if err != nil {
		if counts(err) {
			m.renewalFailed(env, k, err)
		}
		return nil, err
	}
	return m.keep(ctx, env, k, e, g)
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
		g, err = m.fetchAccount(ctx, env, k.AppID, refused)
	default:
		g, err = m.fetchAuthorizer(ctx, env, k, e.rec.RefreshToken)
	}
	if err == nil && g.access.IsZero() {
		err = fmt.Errorf("%w: the answer has no token", ErrUnreachable)
	}
	if err == nil || counts(err) {
		env.Observer.TokenRefreshed(k.Kind, k.owner(), time.Since(start), err)
	}
	return g, err
}

// keep writes a renewed token and publishes it, unless the record has moved on from base meanwhile: a new
// authorization, or its end, beats a refresh that was under way with the old refresh token; so does a refresh that was
// begun later.
func (m *Manager) keep(ctx context.Context, env *Environment, k Key, base *entry, g grant) (*entry, error) {
	expires := g.asked.Add(g.life).Truncate(time.Second)
	same := false
	e, err := m.commit(ctx, env, k, true, func(cur *record) *record {
		if !cur.supersedes(base.rec) {
			cur = base.rec // nothing new, or the store was emptied, or put back to an older state, under us
		}
		next := &record{}
		if cur != nil {
			if !cur.sameAuthorization(base.rec) || cur.ObtainedAt.After(g.asked) {
				return nil
			}
			*next = *cur
		}
		if same = next.AccessToken.Same(g.access) && expires.Sub(next.ExpiresAt).Abs() <= 2*time.Second; same {
			return nil
		}
		next.AccessToken, next.ExpiresAt, next.ObtainedAt = g.access, expires, g.asked.Truncate(time.Second)
		if !g.refresh.IsZero() {
			next.RefreshToken = g.refresh
		}
		return next
	})
	if e == nil {
		return nil, err
	}
	if same {
		// stable_token gives the same token until its last five minutes: no news, ask again a little later.
		e.renewAt.Store(time.Now().Add(sameTokenPause).UnixNano())
		return e, nil
	}
	m.troubles.over(k)
	env.Log.Info("token renewed", "kind", k.Kind, "appid", k.owner(), "platform", k.Platform, "expires_in", int64(g.life/time.Second))
	return e, nil
}

// renewalFailed notes a failure: the next attempt waits, and the log hears of it once and then rarely.
func (m *Manager) renewalFailed(env *Environment, k Key, err error) {
	retryAt, say := m.troubles.failed(k, err)
	if e := m.cache.Load().get(k); e != nil {
		e.renewAt.Store(retryAt.UnixNano())
	}
	if !say {
		return
	}
	args := []any{"kind", k.Kind, "appid", k.owner(), "platform", k.Platform, "error", err}
	if api, ok := errors.AsType[*APIError](err); ok {
		args = append(args, "api", api.API, "errcode", api.Code, "rid", api.RID)
	}
	env.Log.Error("token cannot be renewed; the old one serves as long as it lives", args...)
}

// reload reads a key's record from the store into the cache and returns its entry.
func (m *Manager) reload(ctx context.Context, env *Environment, k Key) (*entry, error) {
	unlock, err := m.locks.lock(ctx, k.recordName())
	if err != nil {
		return nil, fmt.Errorf("%w: read of %s: %w", ErrStore, k.recordName(), err)
	}
	defer unlock()
	rec, err := m.readRecord(ctx, env, k)
	if err != nil {
		return nil, err
	}
	return m.publish(k, rec), nil
}

// readRecord returns a key's record, nil if there is none. A record that waits to be written is newer than the
// store's. The caller holds the key's lock.
func (m *Manager) readRecord(ctx context.Context, env *Environment, k Key) (*record, error) {
	var wire recordWire
	err := m.loadRecord(ctx, env, k.recordName(), &wire)
	waiting := m.pending.get(k)
	switch {
	case err == nil && waiting == nil:
		return wire.record(), nil
	case err == nil:
		return m.pending.settle(k, waiting, wire.record()), nil
	case waiting != nil && !errors.Is(err, errUnreadable):
		return waiting, nil
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	default:
		return nil, err
	}
}

// publish puts a record into the cache. The caller holds the key's lock.
func (m *Manager) publish(k Key, rec *record) *entry {
	c := m.cache.Load()
	e := newEntry(k, rec, time.Now())
	held := c.get(k)
	switch {
	case held == nil:
	case held.gen() > e.gen() && held.rec.supersedes(e.rec):
		return held // the store was put back to an older state
	case held.gen() == e.gen() && held.rec != nil && e.recheckAt == 0 && !e.rec.supersedes(held.rec):
		return held // it knows what WeChat refused
	}
	m.troubles.adopt(e)
	c.put(e)
	return e
}

// commitTimeout bounds a commit of what cannot be had again: the key's lock, the store's, a read and a write.
const commitTimeout = writeLockWait + 4*storeTimeout

// commit changes a key's record: it reads it under the key's lock, asks change for the next one (nil: leave it as it
// is; cur itself: write it as it is), writes that durably and only then publishes it. Must says that the next record
// cannot be had again: then no caller's deadline cuts the writing short, and when the store fails the record is kept in
// memory and written later; the entry is returned beside the error then.
func (m *Manager) commit(ctx context.Context, env *Environment, k Key, must bool, change func(cur *record) *record) (*entry, error) {
	if must {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), commitTimeout)
		defer cancel()
	}
	name := k.recordName()
	unlock, err := m.locks.lock(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("%w: write of %s: %w", ErrStore, name, err)
	}
	defer unlock()
	// Component and account records are only written by the holder of their renewal lock.
	if k.Kind == KindAuthorizer {
		release, err := m.lockStore(ctx, env, name, writeLockWait)
		switch {
		case err == nil:
			defer release()
		case !must:
			return nil, err
		}
	}
	cur, readErr := m.readRecord(ctx, env, k)
	held := m.cache.Load().get(k)
	switch {
	case readErr == nil:
	case !must, errors.Is(readErr, errUnreadable):
		return nil, readErr
	case held != nil:
		cur = held.rec
	}
	next := change(cur)
	if next == nil {
		return m.publish(k, cur), nil
	}
	if next != cur {
		next.Gen = max(held.gen(), genOf(cur)) + 1
	}
	// What could not be read is not written over: it may be another node's news, and settle decides once it can be read.
	err = readErr
	if err == nil {
		err = m.storeRecord(ctx, env, name, next.wire())
	}
	switch {
	case err == nil:
		m.pending.drop(k)
	case must:
		m.pending.put(k, next)
		m.queue.add("pending", backoffFirst, m.writePending)
		env.Log.Error("a token record cannot be written: it serves from memory and would be lost with the process; mend the store",
			"kind", k.Kind, "appid", k.owner(), "platform", k.Platform, "error", err)
	default:
		return nil, err
	}
	return m.publish(k, next), err
}

func genOf(r *record) uint64 {
	if r == nil {
		return 0
	}
	return r.Gen
}
