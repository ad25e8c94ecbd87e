package tokens

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
)

// pendingRecords are records that the store did not take. They serve from here until it does.
type pendingRecords struct {
	mu   sync.Mutex
	recs map[Key]*record
	safe map[Key]*record // what the spill folder holds
}

func (p *pendingRecords) get(k Key) *record {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.recs[k]
}

func (p *pendingRecords) len() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.recs)
}

// inMemory is the number of records that live in memory alone.
func (p *pendingRecords) inMemory() (n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for k, rec := range p.recs {
		if !rec.same(p.safe[k]) {
			n++
		}
	}
	return n
}

// spilled notes what the spill folder holds of a key.
func (p *pendingRecords) spilled(k Key, rec *record) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.safe == nil {
		p.safe = make(map[Key]*record)
	}
	p.safe[k] = rec
}

// moved forgets what the spill folder holds: it is another one from now on.
func (p *pendingRecords) moved() {
	p.mu.Lock()
	defer p.mu.Unlock()
	clear(p.safe)
}

// isSpilled reports whether the spill folder holds what waits of a key.
func (p *pendingRecords) isSpilled(k Key) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.recs[k].same(p.safe[k])
}

// leftOver reports whether the spill folder may hold a record of a key of which nothing waits any more.
func (p *pendingRecords) leftOver(k Key) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.safe[k] != nil && p.recs[k] == nil
}

// unneeded reports whether the spill folder holds a record of a key of which nothing waits any more, and forgets that.
func (p *pendingRecords) unneeded(k Key) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.safe[k] == nil || p.recs[k] != nil {
		return false
	}
	delete(p.safe, k)
	return true
}

// put keeps a record until the store takes it, unless one waits that supersedes it.
func (p *pendingRecords) put(k Key, rec *record) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.recs[k].supersedes(rec) {
		return
	}
	if p.recs == nil {
		p.recs = make(map[Key]*record)
	}
	p.recs[k] = rec
}

// stored drops what waits, unless that supersedes rec, which the store has.
func (p *pendingRecords) stored(k Key, rec *record) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.recs[k].supersedes(rec) {
		delete(p.recs, k)
	}
}

// drop removes exactly this record.
func (p *pendingRecords) drop(k Key, rec *record) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.recs[k] == rec {
		delete(p.recs, k)
	}
}

// settle decides between a waiting record and the one that the store has, and returns the one that counts. A waiting
// one that counts gets a generation above the other's. The caller holds the key's lock.
//
// The generation of a waiting record follows on what this node knew while the store did not answer. Another node may have
// gone further before that: of one authorization the token that was asked for later is the one that WeChat takes.
func (p *pendingRecords) settle(k Key, waiting, stored *record) *record {
	later := waiting.settledAt().Equal(stored.settledAt()) && waiting.ObtainedAt.After(stored.ObtainedAt)
	if stored.supersedes(waiting) && !later || stored.same(waiting) {
		p.drop(k, waiting)
		return stored
	}
	// An authorization that brought no refresh token leaves the one that is there.
	tokenless := waiting.RefreshToken.IsZero() && !waiting.revoked() && !stored.RefreshToken.IsZero()
	if waiting.Gen > stored.Gen && !tokenless {
		return waiting
	}
	next := *waiting
	next.Gen = max(next.Gen, stored.Gen+1)
	if tokenless {
		next.RefreshToken = stored.RefreshToken
	}
	p.put(k, &next)
	return &next
}

func (p *pendingRecords) all() map[Key]*record {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.recs)
}

// Unsaved returns the number of token records and tickets that live in this process's memory alone, because neither the
// store nor the spill folder took them. It is 0 in a healthy gateway; readiness depends on it.
func (m *Manager) Unsaved() int { return m.pending.inMemory() + m.tickets.unsaved() }

// Waiting returns the number of token records that wait to be written to the store, in the spill folder or in memory.
func (m *Manager) Waiting() int { return m.pending.len() }

// writePending is the job that writes what waits; it fails while something still does.
func (m *Manager) writePending(ctx context.Context) error {
	env, err := m.current()
	if err != nil {
		return nil //nolint:nilerr // closed: Close writes what waits
	}
	return m.writeWaiting(ctx, env)
}

// writeWaiting tries to write what waits, as it is.
func (m *Manager) writeWaiting(ctx context.Context, env *Environment) error {
	var unreadable error
	for k := range m.pending.all() {
		_, err := m.commit(ctx, env, k, false, func(cur *record) *record {
			if waiting := m.pending.get(k); waiting == nil || waiting.supersedes(cur) {
				return nil // written meanwhile, or its turn comes again
			}
			return cur
		})
		switch {
		case errors.Is(err, errUnreadable):
			unreadable = err
		case err != nil:
			m.spillWaiting(ctx, env)
			return err // the others would fail alike
		}
	}
	m.spillWaiting(ctx, env)
	if unreadable == nil && m.pending.len() > 0 {
		return fmt.Errorf("%w: records still wait to be written", ErrStore)
	}
	return unreadable
}
