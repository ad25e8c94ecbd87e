package tokens

import (
	"context"
	"sync"
	"time"
)

// Limits of a search for whose a gh_ id is.
const (
	seekEvery    = time.Minute // between two steps of one for a platform
	seekAccounts = 20          // that WeChat is asked about in a step
	seekPages    = 20          // that are read of the store in a step
	seekAgain    = time.Hour   // until a search that came to the end begins anew: WeChat may not have told of some
)

// seeks are how far the searches of platforms are.
type seeks struct {
	mu   sync.Mutex
	at   map[string]string    // cursor of the page to read next
	next map[string]time.Time // when the next step may be
}

// due reports whether a step may be now, and says that there is one.
func (s *seeks) due(platform string, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.next == nil {
		s.at, s.next = make(map[string]string), make(map[string]time.Time)
	}
	if now.Before(s.next[platform]) {
		return false
	}
	s.next[platform] = now.Add(seekEvery)
	return true
}

func (s *seeks) cursor(platform string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.at[platform]
}

// move notes the page to read next; empty: that was the last one.
func (s *seeks) move(platform, cursor string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.at[platform] = cursor; cursor == "" {
		s.next[platform] = time.Now().Add(seekAgain)
	}
}

// sought reports whether there has been a step.
func (s *seeks) sought(platform string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.next[platform].IsZero()
}

// SeekUserNames has the gh_ ids learned of accounts of a platform of which none is known, a few a minute, for as long as it is called: a
// message came whose account only its gh_ id could tell. It does not wait. The platform is one that is configured.
func (m *Manager) SeekUserNames(platform string) {
	if m.seeks.due(platform, time.Now()) {
		m.queue.addLight("gh_ ids of "+platform, func(ctx context.Context) { m.seekUserNames(ctx, platform) })
	}
}

func (m *Manager) seekUserNames(ctx context.Context, platform string) {
	asked := 0
	for range seekPages {
		page, err := m.Authorizers(ctx, AuthorizerQuery{Platform: platform, Cursor: m.seeks.cursor(platform), Limit: MaxAuthorizers})
		if err != nil {
			return // the next step begins here
		}
		for _, a := range page.Authorizers {
			k := AuthorizerKey(platform, a.AppID)
			if e := m.cache.Load().get(k); a.State != StateAuthorized || a.UserName != "" || e != nil && time.Now().UnixNano() < e.infoAt.Load() {
				continue
			}
			if asked == seekAccounts || ctx.Err() != nil {
				return // those that are known by then are passed over
			}
			if m.learn(ctx, k) { // not of one without a refresh token: there may be a page full of them
				asked++
			}
		}
		if m.seeks.move(platform, page.Next); page.Next == "" {
			return
		}
	}
}

// seekAuthorized has the gh_ id learned of an account that has just authorised a platform whose accounts are looked for: the search may
// rest, or be past it.
func (m *Manager) seekAuthorized(k Key) {
	if m.seeks.sought(k.Platform) {
		m.queue.addLight("info "+k.recordName(), func(ctx context.Context) { m.learn(ctx, k) })
	}
}
