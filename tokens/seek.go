package tokens

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"
)

// Limits of a search for whose a gh_ id is.
const (
	seekEvery     = time.Minute // between two steps of one for a platform
	seekAccounts  = 20          // that WeChat is asked about in a step
	seekPages     = 20          // that are read of the store in a step
	seekAgain     = time.Hour   // until a search that came to the end begins anew: WeChat may not have told of some
	seekQueueFull = time.Second // until who waits asks for a step again that the queue did not take
	seekUnheard   = time.Minute // until an account is asked about again if WeChat gave no answer, or the store none about it
)

// seeks are the searches of platforms.
type seeks struct {
	mu     sync.Mutex
	of     map[string]*seek
	closed bool
}

// seek is how far the search of a platform is.
type seek struct {
	at     string    // cursor of the page to read next
	next   time.Time // when the next step may be
	put    time.Time // when the first of the accounts that were passed over may be asked about; zero: none was
	sought bool      // there has been a step
	// busy counts what may learn a gh_ id by now: a step, and accounts that are asked about for another reason.
	busy    int
	awaited map[string]chan struct{} // gh_ ids that somebody waits for, by the names of their records
}

// search returns a platform's; the lock is held.
func (s *seeks) search(platform string) *seek {
	k := s.of[platform]
	if k == nil {
		k = new(seek)
		if s.of == nil {
			s.of = make(map[string]*seek)
		}
		s.of[platform] = k
	}
	return k
}

// await returns what is closed once a gh_ id is learned, or nothing is under way any more that could; nil: nothing is. The caller is to run
// the step that begins.
func (s *seeks) await(platform, userName string, now time.Time) (learned chan struct{}, begins bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, false
	}
	k := s.search(platform)
	if begins = !now.Before(k.next); begins { // or waits for its turn, or is under way for long: it is queued once
		k.sought = true
		k.busy++
	}
	if k.busy == 0 {
		return nil, false
	}
	name := userNameName(userName)
	if learned = k.awaited[name]; learned == nil {
		learned = make(chan struct{})
		if k.awaited == nil {
			k.awaited = make(map[string]chan struct{})
		}
		k.awaited[name] = learned
	}
	return learned, begins
}

// asks notes that an account is asked about outside a step, until answered is called.
func (s *seeks) asks(platform string) (answered func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.search(platform).busy++
	return func() { s.end(platform) }
}

// begin returns the page where a step begins.
func (s *seeks) begin(platform string) (cursor string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.of[platform]
	k.next = time.Now().Add(seekEvery)
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

// end notes that a step has ended, or an account has been asked about.
func (s *seeks) end(platform string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.of[platform].left()
}

// left notes that something has ended that could learn a gh_ id; the lock is held.
func (k *seek) left() {
	if k.busy--; k.busy == 0 {
		k.wake()
	}
}

// wake wakes those who wait for what was not learned; the lock is held.
func (k *seek) wake() {
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
		k.wake()
	}
}

// sought reports whether there has been a step.
func (s *seeks) sought(platform string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.of[platform]
	return k != nil && k.sought
}

// awaits reports whether somebody waits for a gh_ id.
func (s *seeks) awaits(platform, userName string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.of[platform]
	return k != nil && k.awaited[userNameName(userName)] != nil
}

// SeekUserName has the gh_ ids learned of accounts of a platform of which none is known, a few a minute, for as long as it is called: a
// message came whose account only this gh_ id could tell. It does not wait. It returns what is closed once the gh_ id is known, which another
// node may tell, or it may be asked for again; nil: nothing is under way that could tell it. The platform is one that is configured.
func (m *Manager) SeekUserName(platform, userName string) <-chan struct{} {
	learned, begins := m.seeks.await(platform, userName, time.Now())
	if begins && !m.queue.addLight("gh_ ids of "+platform, func(ctx context.Context) {
		defer m.seeks.end(platform)
		m.seekUserNames(ctx, platform)
	}) {
		m.seeks.end(platform) // it is queued already, or too much is
		select {
		case <-learned: // nothing is under way
			later := make(chan struct{})
			time.AfterFunc(seekQueueFull, func() { close(later) })
			return later
		default:
		}
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
			k := AuthorizerKey(platform, a.AppID)
			if a.State != StateAuthorized {
				continue
			}
			if a.UserName != "" {
				if m.seeks.awaits(platform, a.UserName) { // it is the way back alone that the store has lost
					if env, err := m.current(); err != nil || m.keepUserName(ctx, env, k, a.UserName) != nil {
						return
					}
				}
				continue
			}
			if e := m.cache.Load().get(k); e != nil {
				if e.rec.userName() != "" { // the store has lost what this node knows of the account, and has had it back from WeChat
					env, err := m.current()
					if err == nil {
						_, err = m.commit(ctx, env, k, false, func(*record) *record { return nil })
					}
					if err != nil {
						return
					}
					continue
				}
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
		m.learnSoon(k)
	}
}
