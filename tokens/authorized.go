package tokens

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// Strangers can have it asked, as often as they like and for whatever appid, whether an account is known here: each name
// in a TLS handshake does. What is not in memory costs the store at most these reads.
const (
	// authorizedTimeout bounds one such question, all platforms together.
	authorizedTimeout = 1500 * time.Millisecond
	// coldReads are let through at once, and then coldReadsPerSecond of them. A node that starts with thousands of
	// accounts in use has them in memory within a minute.
	coldReads          = 200
	coldReadsPerSecond = 100
	// coldReaders bounds those that run at the same time: a store that hangs must be left room for the tokens.
	coldReaders = 16
	// maxAbsent bounds the memory of accounts that are not known. They are forgotten after absentRecheck, so that the
	// bound on reads keeps them far below it.
	maxAbsent = 1 << 12
)

// ErrTooMany: too many accounts that are not in memory are asked for at once; whether this one is known cannot be told.
var ErrTooMany = errors.New("too many accounts that are not in memory are asked for")

// strangers is what bounds the questions that strangers can have asked.
type strangers struct {
	absent  *Window[absentAccount, struct{}]
	reads   budget
	readers chan struct{} // one element for each that runs
}

// absentAccount is an account that no platform of a configuration knows.
type absentAccount struct {
	serial uint64 // of the configuration
	since  uint64 // as of when changes on other nodes are heard
	appid  string
}

func newStrangers() strangers {
	return strangers{
		absent:  NewWindow[absentAccount, struct{}](absentRecheck, maxAbsent),
		readers: make(chan struct{}, coldReaders),
	}
}

// Authorized reports whether an account has authorised one of the configured platforms and has not taken that back. It
// never asks WeChat. What this node has in memory costs nothing, so a revocation that arrived here counts at once; of
// any other account the store is asked, once for all who ask at the same time, and that an account is not known is
// believed for five seconds. An error says that it cannot be told: the store failed, or it is ErrTooMany.
func (m *Manager) Authorized(ctx context.Context, appid string) (bool, error) {
	env, err := m.current()
	if err != nil {
		return false, err
	}
	e, err := m.holder(ctx, env, appid)
	return e != nil, err
}

// holder returns what is known of an account by the first configured platform that holds an authorization of it; nil:
// none does. It asks the store at most, never WeChat.
func (m *Manager) holder(ctx context.Context, env *Environment, appid string) (*entry, error) {
	if appid == "" || len(appid) > maxID {
		return nil, nil
	}
	cold, now := false, instantOf(time.Now())
	for i := range env.Platforms {
		e := m.cache.Load().get(AuthorizerKey(env.Platforms[i].AppID, appid))
		switch {
		case e == nil || !e.believed(now):
			cold = true
		default:
			if e = m.upToDate(ctx, env, e); e.authorized() {
				return e, nil
			}
		}
	}
	if !cold {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, authorizedTimeout)
	defer cancel()
	for range 2 { // a read that was under way may be of before a change
		absent := absentAccount{env.serial, m.hearingSince(), appid}
		if _, known := m.strangers.absent.Get(absent); known {
			return nil, nil
		}
		found, err := share(ctx, m, env.flightName("holder", appid), authorizedTimeout, func(ctx context.Context) (holding, error) {
			beat := m.beat.Load()
			if _, known := m.strangers.absent.Get(absent); known {
				return holding{beat: beat}, nil // found out between the look and the turn
			}
			e, err := m.findHolder(ctx, env, appid)
			if e == nil && err == nil {
				m.rememberAbsent(env, absent, beat)
			}
			return holding{e, beat}, err
		})
		if err != nil || found.entry != nil || !m.heardOf(env, appid, found.beat) {
			return found.entry, err
		}
	}
	return nil, nil
}

// holding is what was found of an account, if anything, and the manager's beat when it was looked for.
type holding struct {
	entry *entry
	beat  uint64
}

// rememberAbsent notes that an account was looked for in vain as of that beat, unless another node has been told about it since.
func (m *Manager) rememberAbsent(env *Environment, absent absentAccount, beat uint64) {
	ttl := absentRecheck
	if absent.since == deaf {
		ttl = checkEvery
	}
	m.strangers.absent.Set(absent, struct{}{}, ttl)
	if m.heardOf(env, absent.appid, beat) { // looked at last: what is heard from now on deletes it
		m.strangers.absent.Delete(absent)
	}
}

// heardOf reports whether another node may have changed what is known of an account since that beat, as far as such is heard.
func (m *Manager) heardOf(env *Environment, appid string, beat uint64) bool {
	h := m.hearing.Load()
	if h == nil {
		return false
	}
	since := h.since.Load()
	if since == deaf {
		return false
	}
	c := m.cache.Load()
	for i := range env.Platforms {
		since = max(since, h.marks[c.place(AuthorizerKey(env.Platforms[i].AppID, appid))].Load())
	}
	return beat < since
}

// findHolder is holder by the store.
func (m *Manager) findHolder(ctx context.Context, env *Environment, appid string) (*entry, error) {
	var failed error
	for i := range env.Platforms {
		k := AuthorizerKey(env.Platforms[i].AppID, appid)
		e, err := m.peek(ctx, env, k)
		if errors.Is(err, errDamaged) { // so nobody made the account up: the record is set aside, and had from WeChat's list
			if e, err = m.lookup(ctx, env, k); err == nil && e.rec == nil {
				err = fmt.Errorf("%s: %w", k.AppID, ErrUnsure)
			}
		}
		switch {
		case errors.Is(err, ErrTooMany):
			return nil, err
		case err != nil:
			failed = err
		case e != nil && e.authorized():
			return e, nil
		}
	}
	return nil, failed
}

// peek reads a key's record, as it is, if strangers may have the store read by now. What is not there takes no place in
// the cache: strangers would fill it.
func (m *Manager) peek(ctx context.Context, env *Environment, k Key) (*entry, error) {
	if !m.strangers.reads.spend(coldReads, coldReadsPerSecond) {
		return nil, fmt.Errorf("account %s: %w", printable(k.AppID, maxID), ErrTooMany)
	}
	select {
	case m.strangers.readers <- struct{}{}:
		defer func() { <-m.strangers.readers }()
	case <-ctx.Done():
		return nil, fmt.Errorf("account %s: %w: %w", printable(k.AppID, maxID), ErrTooMany, ctx.Err())
	}
	unlock, err := m.locks.lock(ctx, k.recordName())
	if err != nil {
		return nil, fmt.Errorf("%w: read of %s: %w", ErrStore, k.recordName(), err)
	}
	defer unlock()
	r, err := m.readRecord(ctx, env, k)
	if r.rec == nil {
		return nil, err
	}
	return m.publish(k, r.rec, r.beat), nil
}

// budget lets a burst through at once, and then so many a second.
type budget struct {
	mu    sync.Mutex
	spent float64 // of the burst
	at    time.Time
}

// spend takes one from the budget, if one is left.
func (b *budget) spend(burst, perSecond float64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	b.spent = max(0, b.spent-now.Sub(b.at).Seconds()*perSecond)
	b.at = now
	if b.spent+1 > burst {
		return false
	}
	b.spent++
	return true
}
