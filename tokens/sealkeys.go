package tokens

import (
	"context"
	"encoding/hex"
	"errors"
	"io/fs"
	"sync"
	"time"

	"github.com/caddy-wechat/caddy-wechat/crypto"
)

// missingSealKeyLife is for how long it is told that another node has a seal key which this one lacks.
const missingSealKeyLife = 10 * time.Minute

const (
	// sealingLife is for how long nodes take it that another seals with a key, after that one has said so.
	sealingLife = time.Minute
	// sealingEvery is how often it says so.
	sealingEvery = 20 * time.Second
)

// sealKeys knows the seal keys that this process has had, and what it met of others.
//
// A record that does not open with any key, while others do, is one that was left behind when its key was taken out: it is set
// aside. But where another node seals with that key, or where this node has held the record and never had the key, another node has
// written it: it is the newer one, and nothing of this node's must take its place. So it is while seal_key is changed on one node
// after the other.
type sealKeys struct {
	mu      sync.Mutex
	sealing time.Time        // when the other nodes last heard what this one seals with
	sealsBy crypto.SealKeyID // which that was
	had     map[crypto.SealKeyID]struct{}
	missing error // what was said of the last record of another node's that does not open here
	at      time.Time
	said    time.Time // when the log last heard of it
}

// use notes the keys of a configuration, which may have the one that was missing.
func (s *sealKeys) use(sealer *crypto.Sealer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.missing, s.said, s.sealing = nil, time.Time{}, time.Time{}
	if sealer == nil {
		return
	}
	if s.had == nil {
		s.had = make(map[crypto.SealKeyID]struct{})
	}
	for _, id := range sealer.KeyIDs() {
		s.had[id] = struct{}{}
	}
}

// keyring is the environment with the keys for records: the newest. An operation that goes on while the keys change meets records that are sealed
// anew by then, and must leave none that needs a key of before. One that is about to be put in force has keys of its own.
func (m *Manager) keyring(env *Environment) *Environment {
	if now := m.env.Load(); now != nil && env.serial > 0 {
		return now
	}
	return env
}

// foreign reports whether a record is sealed with a key that this process never had.
func (s *sealKeys) foreign(raw []byte) bool {
	id, sealed := crypto.SealedWith(raw)
	s.mu.Lock()
	defer s.mu.Unlock()
	_, had := s.had[id]
	return sealed && !had
}

// miss notes that a record needs a key of another node's, and says whether to say so in the log.
func (s *sealKeys) miss(why error) (say bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	s.missing, s.at = why, now
	if say = s.said.IsZero() || now.Sub(s.said) >= troubleLogEvery; say {
		s.said = now
	}
	return say
}

// MissingSealKey returns why a record that another node wrote lately does not open here, see [LacksSealKey]; nil: none was met.
func (m *Manager) MissingSealKey() error {
	s := &m.sealKeys
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.missing == nil || time.Since(s.at) >= missingSealKeyLife {
		return nil
	}
	return s.missing
}

// sealingName is what nodes share while one of them seals with a key.
func sealingName(id crypto.SealKeyID) string { return "sealing/" + hex.EncodeToString(id[:]) }

// saySealing lets the other nodes know what this one seals with, which is before its first record with that key is there. A store that does
// not take it will hardly take the record.
func (m *Manager) saySealing(ctx context.Context, env *Environment) {
	values, ok := env.Store.(Ephemeral)
	sealer := m.keyring(env).Sealer
	if sealer == nil || !ok {
		return
	}
	s := &m.sealKeys
	id := sealer.KeyIDs()[0]
	s.mu.Lock()
	lately := s.sealsBy == id && time.Since(s.sealing) < sealingEvery
	s.mu.Unlock()
	if lately {
		return
	}
	name := sealingName(id)
	if env.operate(ctx, "share", sharedWait, func(ctx context.Context) error { return values.Put(ctx, name, nil, sealingLife) }) != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sealing, s.sealsBy = time.Now(), id
}

// keepSaying is the job that repeats saySealing.
func (m *Manager) keepSaying(ctx context.Context) error {
	env, err := m.current()
	if err != nil || env.Sealer == nil {
		return nil
	}
	if _, ok := env.Store.(Ephemeral); !ok {
		return nil
	}
	m.saySealing(ctx, env)
	return retryError{after: sealingEvery}
}

// othersSealWith reports whether another node seals with a key, or may: the store does not say.
func (m *Manager) othersSealWith(ctx context.Context, env *Environment, id crypto.SealKeyID) bool {
	values, ok := env.Store.(Ephemeral)
	if !ok {
		return false
	}
	return !errors.Is(env.operate(ctx, "share", sharedWait, func(ctx context.Context) error {
		_, err := values.Peek(ctx, sealingName(id))
		return err
	}, fs.ErrNotExist), fs.ErrNotExist)
}

// sealedElsewhere returns the error of a record that another node has sealed with a key which this one lacks; nil: that is not why it
// cannot be read.
func (m *Manager) sealedElsewhere(ctx context.Context, env *Environment, name string, raw []byte) error {
	if m.hearing.Load() == nil {
		return nil // no other node writes there
	}
	id, sealed := crypto.SealedWith(raw)
	if m.isHeld(name) || sealed && m.othersSealWith(ctx, env, id) {
		return m.lacksKeyOf(env, name, raw)
	}
	return nil
}

// isHeld reports whether a record was read here, or written in full.
func (m *Manager) isHeld(name string) bool {
	k, ok := keyOf(name)
	if !ok {
		return false
	}
	held := m.cache.Load().get(k)
	return held != nil && held.rec != nil && m.pending.get(k) == nil
}

// lacksKeyOf returns the error of a record that is sealed with a key which this process never had, and takes note of it; nil: it is not.
func (m *Manager) lacksKeyOf(env *Environment, name string, raw []byte) error {
	if !m.sealKeys.foreign(raw) {
		return nil
	}
	err := said(errUnreadable, name+" was sealed by another node with a seal_key that this one does not have: add it here",
		name+" 由其他节点用本节点没有的 seal_key 加密：请在本节点补上该密钥")
	if m.sealKeys.miss(err) {
		env.Log.Error("another node seals records with a seal_key that this one does not have: add it here; until then this one goes on with what it remembers, and renews nothing of theirs",
			"record", name)
	}
	return err
}
