package tokens

import (
	"context"
	"errors"
	"maps"
	"sync"
)

// pendingRecords are records that the store did not take. They serve from here until it does.
type pendingRecords struct {
	mu   sync.Mutex
	recs map[Key]*record
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

func (p *pendingRecords) put(k Key, rec *record) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.recs == nil {
		p.recs = make(map[Key]*record)
	}
	p.recs[k] = rec
}

func (p *pendingRecords) drop(k Key) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.recs, k)
}

// settle decides between a waiting record and the one that another node stored meanwhile, and returns the one that
// counts. The caller holds the key's lock.
func (p *pendingRecords) settle(k Key, waiting, stored *record) *record {
	if stored.supersedes(waiting) {
		p.drop(k)
		return stored
	}
	if stored.Gen >= waiting.Gen {
		next := *waiting
		next.Gen = stored.Gen + 1 // so that other nodes take it for what it is: later than what they have
		waiting = &next
		p.put(k, waiting)
	}
	return waiting
}

func (p *pendingRecords) all() map[Key]*record {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.recs)
}

// Unsaved returns the number of token records and tickets that live in this process's memory alone, because the store
// did not take them. It is 0 in a healthy gateway; readiness depends on it.
func (m *Manager) Unsaved() int { return m.pending.len() + m.tickets.unsaved() }

// writePending is the job that tries to write what waits, and reports an error while something still does.
func (m *Manager) writePending(ctx context.Context) error {
	env, err := m.current()
	if err != nil {
		return nil //nolint:nilerr // closed: Close writes what it can
	}
	return m.flushRecords(ctx, env)
}

func (m *Manager) flushRecords(ctx context.Context, env *Environment) error {
	var unreadable error
	for k := range m.pending.all() {
		_, err := m.commit(ctx, env, k, false, func(cur *record) *record {
			if waiting := m.pending.get(k); waiting == nil || waiting != cur {
				return nil // written, or superseded, meanwhile
			}
			return cur // as it is: it is no news to this node, and a refresh under way stands on it
		})
		switch {
		case errors.Is(err, errUnreadable):
			unreadable = err
		case err != nil:
			return err // the others would fail alike
		}
	}
	return unreadable
}
