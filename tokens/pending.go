package tokens

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"
)

// clockSlack is by how much the times of two nodes must differ to say which came first. A node whose clock is further off
// refuses WeChat's pushes, and the log says so.
const clockSlack = 5 * time.Minute

// pendingRecords are records that the store did not take. They serve from here until it does.
type pendingRecords struct {
	mu   sync.Mutex
	recs map[Key]*record
	// bases has the ObtainedAt of the record from which the first that waits of a key was made, the last that is known to have
	// been in the store.
	bases  map[Key]time.Time
	folder string          // the spill folder
	safe   map[Key]*record // what it holds
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

// spilled notes what a folder holds of a key, if that is the spill folder still.
func (p *pendingRecords) spilled(folder string, k Key, rec *record) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if folder != p.folder {
		return // a disk that was slow
	}
	if p.safe == nil {
		p.safe = make(map[Key]*record)
	}
	p.safe[k] = rec
}

// moved says which folder the spill folder is from now on. What another one holds is forgotten.
func (p *pendingRecords) moved(folder string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if folder != p.folder {
		p.folder = folder
		clear(p.safe)
	}
}

// isSpilled reports whether the spill folder holds what waits of a key.
func (p *pendingRecords) isSpilled(k Key) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.recs[k].same(p.safe[k])
}

// leftOver reports whether the spill folder, and which, may hold a record of a key of which nothing waits any more.
func (p *pendingRecords) leftOver(k Key) (folder string, left bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.folder, p.safe[k] != nil && p.recs[k] == nil
}

// unneeded reports whether a folder, if that is the spill folder still, holds a record of a key of which nothing waits any
// more, and forgets that.
func (p *pendingRecords) unneeded(folder string, k Key) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if folder != p.folder || p.safe[k] == nil || p.recs[k] != nil {
		return false
	}
	delete(p.safe, k)
	return true
}

// put keeps a record until the store takes it, unless one waits that supersedes it. Base is when the token of the record
// that it was made from was asked for; zero: that is not known.
func (p *pendingRecords) put(k Key, rec *record, base time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	waiting := p.recs[k]
	if waiting.supersedes(rec) {
		return
	}
	if p.recs == nil {
		p.recs, p.bases = make(map[Key]*record), make(map[Key]time.Time)
	}
	p.recs[k] = rec
	switch held := p.bases[k]; {
	case waiting == nil && !base.IsZero():
		p.bases[k] = base
	case waiting != nil && !held.IsZero() && waiting.ObtainedAt.After(held):
		p.bases[k] = waiting.ObtainedAt // which the store may have got, though it did not say so
	}
}

// waiting returns the record that waits of a key, and its base; nil: none does.
func (p *pendingRecords) waiting(k Key) (rec *record, base time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.recs[k], p.bases[k]
}

// forget drops what waits of a key; mu is held.
func (p *pendingRecords) forget(k Key) {
	delete(p.recs, k)
	delete(p.bases, k)
}

// stored drops what waits, unless that supersedes rec, which the store has.
func (p *pendingRecords) stored(k Key, rec *record) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.recs[k].supersedes(rec) {
		p.forget(k)
	}
}

// drop removes exactly this record.
func (p *pendingRecords) drop(k Key, rec *record) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.recs[k] == rec {
		p.forget(k)
	}
}

// settle decides between a waiting record and the one that the store has, and returns the one that counts. A waiting
// one that counts gets a generation above the other's; a stored one stays as it is, also below it. The caller holds the
// key's lock.
//
// The generation of a waiting record follows on what this node knew while the store did not answer. Another node may have
// gone further before that: of one authorization the token that was asked for later is the one that WeChat takes.
func (p *pendingRecords) settle(k Key, waiting, stored *record) *record {
	later := waiting.settledAt().Equal(stored.settledAt()) && waiting.rankedAt().After(stored.rankedAt())
	if stored.supersedes(waiting) && !later || stored.same(waiting) || p.outlived(k, waiting, stored) {
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
	p.put(k, &next, time.Time{})
	return &next
}

// outlived reports whether the stored record counts in spite of a lower generation: other nodes renewed the same
// authorization while this one was cut off, and fewer times than it did.
//
// The times are by two nodes' clocks, and a waiting record may have the only copy of the newest refresh token. So
// they count only if they are far enough apart, and never for the record that the waiting one was made from, or for one of
// before that: then nobody else has renewed, whatever the clocks say.
func (p *pendingRecords) outlived(k Key, waiting, stored *record) bool {
	_, base := p.waiting(k)
	return waiting.settledAt().Equal(stored.settledAt()) && !stored.RefreshToken.IsZero() &&
		!base.IsZero() && stored.ObtainedAt.After(base) &&
		!waiting.ObtainedAt.IsZero() && stored.ObtainedAt.Sub(waiting.ObtainedAt) > clockSlack
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
