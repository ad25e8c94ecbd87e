package tokens

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"time"
)

// HeldToken returns how a token stands as far as this node knows without asking anybody. It neither waits nor counts as a
// use of the token.
func (m *Manager) HeldToken(k Key) TokenState {
	if c := m.cache.Load(); c != nil {
		if e := c.get(k); e != nil {
			return m.tokenState(e)
		}
	}
	return m.tokenState(&entry{key: k})
}

// LastTicket returns when the newest ticket of a platform came, alive or not, to this node or, by the store, to another
// one or before a restart; the zero time: never. The error says that the store was not read.
func (m *Manager) LastTicket(ctx context.Context, platform string) (time.Time, error) {
	held := m.tickets.get(platform)
	env, err := m.current()
	if err != nil {
		return held.receivedAt, err
	}
	var stored ticketWire
	name := ticketName(platform)
	raw, err := m.loadRaw(ctx, env, name)
	if err == nil {
		_, err = m.decode(env, name, raw, &stored)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return held.receivedAt, nil
	case errors.Is(err, errDamaged): // the next push is kept in its place
		if m.hearing.Load() != nil {
			_ = m.lacksKeyOf(env, name, raw) // which MissingSealKey tells
		}
		return held.receivedAt, nil
	case err != nil:
		return held.receivedAt, err
	case fromUnix(stored.CreatedAt).After(held.CreatedAt):
		return stored.held().receivedAt, nil
	}
	return held.receivedAt, nil
}

// Unreadable returns why the stored record of a key cannot be read; nil: it can be, or there is none.
func (m *Manager) Unreadable(ctx context.Context, k Key) error {
	env, err := m.current()
	if err != nil {
		return err
	}
	if err := m.loadRecord(ctx, env, k.recordName(), new(recordWire)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// PushRefusal returns why WeChat could not be asked, when it last was, to push a platform's tickets; nil: it could, or was
// not asked.
func (m *Manager) PushRefusal(platform string) error {
	m.tickets.mu.Lock()
	defer m.tickets.mu.Unlock()
	return m.tickets.push[platform].askErr
}

// TicketRefusal returns why WeChat refused the newest ticket of a platform that this node knows; nil: it did not.
func (m *Manager) TicketRefusal(platform string) error {
	m.tickets.mu.Lock()
	defer m.tickets.mu.Unlock()
	if s := m.tickets.push[platform]; !s.refused.Value.IsZero() && m.tickets.held[platform].same(s.refused) {
		return s.refusal
	}
	return nil
}

// Unexchanged returns how many authorization codes of a platform, pushed to this node, or to another and taken up by it, are not exchanged
// yet, and when WeChat made the oldest of them.
func (m *Manager) Unexchanged(platform string) (n int, oldest time.Time) {
	o := &m.intents
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, open := range o.byHash {
		if open.Platform != platform || open.AppID == "" {
			continue
		}
		n++
		if oldest.IsZero() || open.CreatedAt.Before(oldest) {
			oldest = open.CreatedAt
		}
	}
	return n, oldest
}

// CheckStore reads from the store and returns its error, wrapping ErrStore, if it does not answer before ctx ends. Those who
// ask at the same time share one read.
func (m *Manager) CheckStore(ctx context.Context) error {
	env, err := m.current()
	if err != nil {
		return err
	}
	_, err = share(ctx, m, env.flightName("check", ""), storeTimeout, func(ctx context.Context) (struct{}, error) {
		_, err := m.loadRaw(ctx, env, path.Join(root, "check")) // there is none: that is an answer too
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return struct{}{}, err
	})
	if err != nil && !errors.Is(err, ErrStore) {
		err = fmt.Errorf("%w: it does not answer: %w", ErrStore, err)
	}
	return err
}
