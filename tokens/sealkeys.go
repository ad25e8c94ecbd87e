package tokens

import (
	"sync"
	"time"

	"github.com/caddy-wechat/caddy-wechat/crypto"
)

// missingSealKeyLife is for how long it is told that another node has a seal key which this one lacks.
const missingSealKeyLife = 10 * time.Minute

// sealKeys knows the seal keys that this process has had, and what it met of others.
//
// A record that does not open with any key, while others do, is one that was left behind when its key was taken out: it is set
// aside. But one that this node has held, and that now is sealed with a key which was never here, another node has written since: it
// is the newer one, and what this node remembers must not take its place. So it is while seal_key is changed on one node
// after the other.
type sealKeys struct {
	mu      sync.Mutex
	had     map[crypto.SealKeyID]struct{}
	missing error // what was said of the last record of another node's that does not open here
	at      time.Time
	said    time.Time // when the log last heard of it
}

// use notes the keys of a configuration, which may have the one that was missing.
func (s *sealKeys) use(sealer *crypto.Sealer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.missing, s.said = nil, time.Time{}
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

// sealedElsewhere returns the error of a record that was held here, and that another node has sealed since with a key which this
// one lacks; nil: that is not why it cannot be read.
func (m *Manager) sealedElsewhere(env *Environment, name string, raw []byte) error {
	k, ok := keyOf(name)
	if !ok || m.hearing.Load() == nil {
		return nil // no other node writes there
	}
	held := m.cache.Load().get(k)
	if held == nil || held.rec == nil || m.pending.get(k) != nil {
		return nil
	}
	return m.lacksKeyOf(env, name, raw)
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
