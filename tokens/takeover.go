package tokens

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"
)

// TakeTickets gives m the tickets that another manager holds for the platforms of env, with which m is about to be used in its place: m's
// store may have none, or an older one, and WeChat pushes the next in ten minutes. They are written in the background.
func (m *Manager) TakeTickets(from *Manager, env *Environment) {
	for _, p := range env.Platforms {
		held := from.tickets.get(p.AppID)
		if held.Value.IsZero() {
			continue
		}
		held.durable = false // in m's store
		if m.tickets.offer(p.AppID, held).same(held.Ticket) {
			m.queue.add("taken ticket "+p.AppID, 0, m.saveHeldTicket(p.AppID, func() {}))
		}
	}
}

const (
	// takeOverTimeout bounds TakeOver, for which a reload waits.
	takeOverTimeout = 2 * storeTimeout
	// hiccupPause lies between two attempts at one step of it.
	hiccupPause = 100 * time.Millisecond
	// maxRevocations is how many of the last revocations are remembered for a manager that takes the place of this one.
	maxRevocations = 256
)

// TakeOver makes what a closed manager had accepted and not finished the duty of m: the codes that are still to be exchanged, and tickets
// that came while m was used already. What m does not take stays in the store of the other, and nothing else does, which may be used again.
// WeChat is asked for accounts that m's store does not know, since others may have authorised under the store of before; those that were
// revoked there are so here.
func (m *Manager) TakeOver(from *Manager) {
	env, err := m.current()
	if err != nil || from.env.Load() == nil {
		return // it was never in use
	}
	m.TakeTickets(from, env)
	for _, p := range env.Platforms {
		if env.RosterEvery > 0 && !m.outlasted(from) {
			m.queue.add("moved "+rosterJob(p.AppID), 0, m.moveRoster(p.AppID))
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), takeOverTimeout)
	defer cancel()
	defer m.takeForwards(ctx, env, from) // after codes, which die
	if lately := from.revocations.all(); len(lately) > 0 {
		m.queue.add("taken revocations", 0, m.takeRevocations(from, lately))
	}
	taken, left := 0, 0
	var here, there hiccup
	for hash, open := range from.intents.open() {
		if open.lost.Load() {
			continue
		}
		failed := ctx.Err()
		if failed == nil {
			failed = here.over(ctx, func() error { return m.Accept(ctx, open.Intent) })
		}
		if failed == nil {
			_ = there.over(ctx, func() error { return from.deleteRecord(ctx, from.env.Load(), intentName(hash)) }) // else it is tried in vain when that store is used again
			taken++
			continue
		}
		left, err = left+1, failed
	}
	if taken > 0 {
		env.Log.Warn("authorizations that were accepted under the store of before, and not exchanged yet, are taken over", "authorizations", taken)
	}
	if left > 0 {
		env.Log.Error("authorizations that were accepted under the store of before cannot be taken over: export them from there, and import them here",
			"authorizations", left, "error", err)
	}
}

// hiccup is what one failure of a store may be: what failed is tried once more, until that is in vain.
type hiccup struct{ away bool }

// over makes one step, which may be made twice.
func (h *hiccup) over(ctx context.Context, step func() error) error {
	err := step()
	if _, done := errors.AsType[undeletedError](err); err == nil || done || h.away || ctx.Err() != nil {
		return err
	}
	pause := time.NewTimer(hiccupPause)
	defer pause.Stop()
	select {
	case <-pause.C:
	case <-ctx.Done():
		return err
	}
	err = step()
	h.away = err != nil
	return err
}

// outlasted reports whether another manager was to take the place of m, was refused, and exchanged no code meanwhile: nothing was
// authorised that m does not know.
func (m *Manager) outlasted(other *Manager) bool {
	began, otherBegan := m.firstUse(), other.firstUse()
	return began.Before(otherBegan) && !other.done.any()
}

// moveRoster is the job that takes back that WeChat's list was read to its end, which says nothing of the time in which another store was in
// use. The list is read as after an import, and from its beginning: an account that authorised meanwhile may stand on a page that was read.
func (m *Manager) moveRoster(platform string) func(context.Context) error {
	return func(ctx context.Context) error {
		env, err := m.current()
		if err != nil {
			return nil //nolint:nilerr // closed
		}
		if _, ok := env.platform(platform); !ok {
			return nil // no longer configured
		}
		unlock, err := m.lockStore(ctx, env, rosterName(platform), writeLockWait)
		if err != nil {
			return err
		}
		defer unlock()
		state, err := m.loadRoster(ctx, env, platform)
		if err != nil {
			return err
		}
		if state.CompletedAt == 0 && state.Walk == nil {
			return nil // it is read anyhow
		}
		state = &rosterWire{MovedAt: time.Now().Unix()}
		if err := m.storeRecord(ctx, env, rosterName(platform), state); err != nil {
			return err
		}
		m.rosters.change(platform, func(r *roster) { r.complete = false })
		m.hastenRoster(platform)
		return nil
	}
}

// revocations are the last that this node has noted, the oldest first.
type revocations struct {
	mu   sync.Mutex
	keys []Key
}

func (l *revocations) note(k Key) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.keys = slices.DeleteFunc(l.keys, func(there Key) bool { return there == k })
	if len(l.keys) == maxRevocations {
		l.keys = slices.Delete(l.keys, 0, 1)
	}
	l.keys = append(l.keys, k)
}

func (l *revocations) all() []Key {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.keys)
}

// takeRevocations is the job that notes in m's store what was revoked under the store of before, and is still so there.
func (m *Manager) takeRevocations(from *Manager, keys []Key) func(context.Context) error {
	by := time.Now().Add(takeOverAfter)
	return func(ctx context.Context) error {
		for len(keys) > 0 {
			k := keys[0]
			var wire recordWire
			err := from.loadRecord(ctx, from.env.Load(), k.recordName(), &wire)
			if errors.Is(err, ErrStore) && time.Now().Before(by) {
				return err // later, that store may be gone; WeChat tells of the account at its first use
			}
			if err == nil && wire.record().revoked() {
				if err := m.Revoke(ctx, k.Platform, k.AppID, wire.record().RevokedAt); errors.Is(err, ErrStore) {
					return err
				}
			}
			keys = keys[1:]
		}
		return nil
	}
}
