package tokens

import (
	"context"
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

// takeOverTimeout bounds TakeOver, for which a reload waits.
const takeOverTimeout = 2 * storeTimeout

// TakeOver makes what a closed manager had accepted and not finished the duty of m: the codes that are still to be exchanged, and tickets
// that came while m was used already. What m does not take stays in the store of the other. WeChat is asked for accounts that m's store
// does not know, since others may have authorised under the store of before.
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
	taken, left := 0, 0
	for _, open := range from.intents.open() {
		if open.lost.Load() {
			continue
		}
		failed := ctx.Err()
		if failed == nil {
			failed = m.Accept(ctx, open.Intent)
		}
		if failed == nil {
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
