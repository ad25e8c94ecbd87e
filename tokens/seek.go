package tokens

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"
)

// Limits of a search for whose a gh_ id is.
const (
	seekEvery    = time.Minute // between two steps of one for a platform
	seekAccounts = 20          // that WeChat is asked about in a step
	seekPages    = 20          // that are read of the store in a step
	seekAgain    = time.Hour   // until a search that came to the end begins anew: WeChat may not have told of some
	seekUnheard  = time.Minute // until an account is asked about again if WeChat gave no answer, or the store none about it
)

// seeks are the searches of platforms.
type seeks struct {
	mu     sync.Mutex
	of     map[string]*seek
	closed bool
}

// seek is how far the search of a platform is.
type seek struct {
	at   string    // cursor of the page to read next
	next time.Time // when the next step may be
	put  time.Time // when the first of the accounts that were passed over may be asked about; zero: none was
	// awaited are the gh_ ids that somebody waits for, by the names of their records; nil: no step is under way.
	awaited map[string]chan struct{}
}

// await returns what is closed once a step has learned a gh_ id, or has ended; nil: none is under way. The caller is to run the step that
// begins.
func (s *seeks) await(platform, userName string, now time.Time) (learned chan struct{}, begins bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.of[platform]
	switch {
	case s.closed:
		return nil, false
	case k == nil:
		k = new(seek)
		if s.of == nil {
			s.of = make(map[string]*seek)
		}
		s.of[platform] = k
	}
	if k.awaited == nil {
		if now.Before(k.next) {
			return nil, false
		}
		begins, k.awaited = true, make(map[string]chan struct{})
		k.next = now.Add(seekEvery)
	}
	name := userNameName(userName)
	if learned = k.awaited[name]; learned == nil {
		learned = make(chan struct{})
		k.awaited[name] = learned
	}
	return learned, begins
}

// begin returns the page where a step begins.
func (s *seeks) begin(platform string) (cursor string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.of[platform]
	k.next = time.Now().Add(seekEvery) // it may have waited for its turn
	return k.at
}

// move notes the page to read next; empty: that was the last one.
func (s *seeks) move(platform, cursor string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.of[platform]
	if k.at = cursor; cursor != "" {
		return
	}
	if rested := time.Now().Add(seekAgain); k.put.IsZero() || rested.Before(k.put) {
		k.next = rested
	} else if k.next.Before(k.put) {
		k.next = k.put
	}
	k.put = time.Time{}
}

// passOver notes when an account may be asked about that was passed over.
func (s *seeks) passOver(platform string, until time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if k := s.of[platform]; k.put.IsZero() || until.Before(k.put) {
		k.put = until
	}
}

// learned wakes those who wait for a gh_ id, by the name of its record.
func (s *seeks) learned(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range s.of {
		if awaited := k.awaited[name]; awaited != nil {
			close(awaited)
			delete(k.awaited, name)
		}
	}
}

// end wakes those who wait for what a step has not learned.
func (s *seeks) end(platform string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.of[platform].end()
}

// end is seeks.end; the lock is held.
func (k *seek) end() {
	for _, awaited := range k.awaited {
		close(awaited)
	}
	k.awaited = nil
}

// close ends all steps, those that have not begun too, and lets no other begin.
func (s *seeks) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for _, k := range s.of {
		k.end()
	}
}

// sought reports whether there has been a step.
func (s *seeks) sought(platform string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.of[platform] != nil
}

// SeekUserName has the gh_ ids learned of accounts of a platform of which none is known, a few a minute, for as long as it is called: a
// message came whose account only this gh_ id could tell. It does not wait. It returns what is closed once the gh_ id is known, which another
// node may tell, or the search cannot tell it for now; nil: it cannot from the start. The platform is one that is configured.
func (m *Manager) SeekUserName(platform, userName string) <-chan struct{} {
	learned, begins := m.seeks.await(platform, userName, time.Now())
	if begins && !m.queue.addLight("gh_ ids of "+platform, func(ctx context.Context) {
		defer m.seeks.end(platform)
		m.seekUserNames(ctx, platform)
	}) {
		m.seeks.end(platform) // too much is queued
	}
	return learned
}

// seekUserNames is a step. It ends early when WeChat does not answer: it may hang, and others need the worker.
func (m *Manager) seekUserNames(ctx context.Context, platform string) {
	asked := 0
	cursor := m.seeks.begin(platform)
	for range seekPages {
		page, err := m.Authorizers(ctx, AuthorizerQuery{Platform: platform, Cursor: cursor, Limit: MaxAuthorizers})
		if err != nil {
			return // the next step begins here
		}
		// Other nodes may be at the same page: in another order they learn of each other what they would ask.
		rand.Shuffle(len(page.Authorizers), func(i, j int) {
			page.Authorizers[i], page.Authorizers[j] = page.Authorizers[j], page.Authorizers[i]
		})
		for _, a := range page.Authorizers {
			if a.State != StateAuthorized || a.UserName != "" {
				continue
			}
			k := AuthorizerKey(platform, a.AppID)
			if e := m.cache.Load().get(k); e != nil {
				now := time.Now()
				if left := time.Duration(e.infoAt.Load() - steady(now)); left > 0 {
					m.seeks.passOver(platform, now.Add(left))
					continue
				}
			}
			if asked == seekAccounts || ctx.Err() != nil || m.closed.Load() {
				return // those that are known by then are passed over
			}
			switch isAsked, isAnswered, err := m.learn(ctx, k); {
			case err != nil:
				m.seeks.passOver(platform, time.Now().Add(seekUnheard))
			case !isAsked: // it has no refresh token, and there may be a page full of them; or another node has learned it
			case !isAnswered:
				if e := m.cache.Load().get(k); e != nil {
					e.infoAt.Store(steady(time.Now().Add(seekUnheard)))
				}
				return
			default:
				asked++
			}
		}
		cursor = page.Next
		if m.seeks.move(platform, cursor); cursor == "" {
			return
		}
	}
}

// seekAuthorized has the gh_ id learned of an account that has just authorised a platform whose accounts are looked for: the search may
// rest, or be past it.
func (m *Manager) seekAuthorized(k Key) {
	if m.seeks.sought(k.Platform) {
		m.queue.addLight("info "+k.recordName(), func(ctx context.Context) { _, _, _ = m.learn(ctx, k) })
	}
}
