package tokens

import (
	"context"
	"errors"
	"hash/maphash"
	"io/fs"
	"math"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// What other nodes change is heard over the store's Bus, if it has one. A record that was changed elsewhere is read again
// before its entry in the cache is used next; that costs the use of a fresh token two loads from memory and nothing else.
// A message may get lost: whenever the bus begins to listen, every entry that was read before is read again before its
// next use, and as long as it does not listen, behind its uses. An entry that cannot be read again counts as it is.

const (
	// deaf is the beat as of when changes are heard while they are not.
	deaf = math.MaxUint64
	// marks is the number of places for the beats at which changes were heard. Two keys may share one, which costs a read.
	marks = 1 << 16
	// checkWait is how long a use of an entry waits for its record to be read again; the read goes on after it.
	checkWait = 300 * time.Millisecond
	// checkEvery is how soon an entry is looked at again where the store did not answer, or nothing is heard.
	checkEvery = time.Second
	// maxCheckers bounds the reads that go on behind uses while nothing is heard.
	maxCheckers = 16
	// takeOverAfter is when a node looks for authorizations that another one accepted and did not finish.
	takeOverAfter = 2 * time.Minute
	// recentLife and maxRecent bound the memory of what this node wrote, for a store that goes back to an older state: a
	// replica takes over that had not got the last writes.
	recentLife = 2 * time.Minute
	maxRecent  = 4096
)

// hearing is what is known of changes on other nodes, over one Bus.
type hearing struct {
	m    *Manager
	bus  Bus
	stop context.CancelFunc

	since    atomic.Uint64 // the beat as of when every change is heard, or deaf
	marks    [marks]atomic.Uint64
	tired    atomic.Bool // the store did not answer: no use waits for it, until it answers a read behind one
	checkers chan struct{}
}

// listen begins to listen on the bus of env's store, if that is another one. Manager.mu is held.
func (m *Manager) listen(old, env *Environment) {
	bus, _ := env.Store.(Bus)
	h := m.hearing.Load()
	if old != nil && (h == nil && bus == nil || h != nil && h.bus == bus) {
		return
	}
	if h != nil {
		h.stop()
	}
	if bus == nil {
		m.hearing.Store(nil)
		return
	}
	ctx, stop := context.WithCancel(m.loopCtx)
	h = &hearing{m: m, bus: bus, stop: stop, checkers: make(chan struct{}, maxCheckers)}
	h.since.Store(deaf)
	m.hearing.Store(h)
	m.work.Go(func() { h.watch(ctx) })
}

// watch listens until ctx ends, also when the bus fails in a way that nobody thought of.
func (h *hearing) watch(ctx context.Context) {
	for ctx.Err() == nil {
		var err error
		func() {
			defer h.m.recovered(&err)
			h.bus.Watch(ctx, h)
		}()
		h.since.Store(deaf)
		pause := time.NewTimer(checkEvery)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
		}
	}
}

// Listening implements Listener.
func (h *hearing) Listening(on bool) {
	if !on {
		h.since.Store(deaf)
		return
	}
	m := h.m
	h.tired.Store(false)
	h.since.Store(m.beat.Add(1))
	for _, platform := range m.Platforms() {
		m.tickets.arrived(platform) // maybe; the next look tells
	}
	// The bus was away, and the store with it, as far as can be told: it may have come back in an older state.
	m.opaque.heard() // maybe as well
	for i := range m.verify {
		m.verify[i].news()
	}
	m.confirm.resumed()
	m.queue.add("written", 0, m.writeAgain)
	m.queue.add("opaque keys", 0, m.keepOpaqueKeys)
	m.lookForIntents()
	m.lookForForwards("forwards of others", takeOverAfter)
}

// Changed implements Listener.
func (h *hearing) Changed(name string) {
	m := h.m
	if name == opaqueName {
		m.opaque.heard()
		m.queue.addNews("opaque", func(ctx context.Context) {
			if env, err := m.current(); err == nil {
				_, _ = m.loadOpaqueKeys(ctx, env) // the next token with a key that is not known has it read otherwise
			}
		})
		return
	}
	if shard, ok := verifyShardNamed(name); ok {
		m.verify[shard].news()
		return
	}
	if k, ok := confirmKey(name); ok {
		m.confirm.news(k)
		return
	}
	if strings.HasPrefix(name, userNameFolder+"/") {
		m.seeks.learned(name)
		return
	}
	if path.Dir(name) == intentFolder {
		m.lookForIntents()
		return
	}
	if path.Dir(name) == forwardFolder {
		if env := m.env.Load(); env == nil || env.Forward == nil {
			return
		}
		m.lookForForwards("forwards of others", takeOverAfter)
		return
	}
	if platform, ok := ticketPlatform(name); ok {
		m.tickets.arrived(platform)
		m.queue.addNews("ticket of "+platform, func(ctx context.Context) { // or its age here would be that of the one before
			if env, err := m.current(); err == nil {
				if _, ours := env.platform(platform); ours {
					_, _ = m.ticket(ctx, env, platform) // whoever needs it reads it otherwise
				}
			}
		})
		m.troubles.retry(ComponentKey(platform))
		if m.rosters.incomplete(platform) {
			m.queue.hasten(rosterJob(platform))
		}
		return
	}
	k, ok := keyOf(name)
	if !ok {
		return
	}
	m.doubt(k)
	m.troubles.retry(k)
	m.hearName(k)
	m.heardOrphan(k)
	if env := m.env.Load(); k.Kind == KindAuthorizer && env != nil {
		m.strangers.absent.Delete(absentAccount{env.serial, h.since.Load(), k.AppID})
	}
	if m.cache.Load().get(k) != nil {
		// So that no use has to wait for it. If there is no room for it, the next use does.
		m.queue.addNews("check "+name, func(ctx context.Context) {
			if env, err := m.current(); err == nil {
				_, _ = m.reread(ctx, env, k) // the next use reads it otherwise
			}
		})
	}
}

// doubt has a key's record read again before its entry in the cache is used next.
func (m *Manager) doubt(k Key) {
	if h := m.hearing.Load(); h != nil {
		h.marks[m.cache.Load().place(k)].Store(m.beat.Add(1))
	}
}

// hearingSince is the beat as of when every change on other nodes is heard; 0: there are none to be heard.
func (m *Manager) hearingSince() uint64 {
	if h := m.hearing.Load(); h != nil {
		return h.since.Load()
	}
	return 0
}

// outOfDate reports whether another node may have changed the record of an entry since it was read.
func (m *Manager) outOfDate(e *entry) bool {
	h := m.hearing.Load()
	return h != nil && e.readAt.Load() < max(h.since.Load(), h.marks[e.place].Load())
}

// upToDate returns the entry of e's key as it is by the store if another node may have changed that, and as it was if
// the store does not say in time.
func (m *Manager) upToDate(ctx context.Context, env *Environment, e *entry) *entry {
	if !m.outOfDate(e) {
		return e
	}
	h := m.hearing.Load()
	if h == nil {
		return e
	}
	now := steady(time.Now())
	due := e.checkAt.Load()
	if h.since.Load() == deaf || h.tired.Load() {
		if now >= due && e.checkAt.CompareAndSwap(due, now+int64(checkEvery)) {
			m.checkBehind(env, h, e.key)
		}
		return e
	}
	if now < due && e.unread.Load() {
		return e
	}
	wait, cancel := context.WithTimeout(ctx, checkWait)
	defer cancel()
	for range 2 { // a read that was under way may be of before the change
		read, err := share(wait, m, env.flight("check", e.key), loadTimeout, func(ctx context.Context) (*entry, error) {
			return m.reread(ctx, env, e.key)
		})
		switch {
		case ctx.Err() != nil:
			return e
		case err != nil:
			// What cannot be read says nothing about the store: other records are read before their uses as ever.
			unreadable := errors.Is(err, errUnreadable)
			e.checkAt.Store(steady(time.Now().Add(checkEvery)))
			e.unread.Store(unreadable)
			if !unreadable {
				h.tired.Store(true)
			}
			return e
		}
		if e = read; !m.outOfDate(e) {
			break
		}
	}
	return e
}

// accountOf is the entry of the account that a ticket is of, read from the store; nil if the store does not say in time.
func (m *Manager) accountOf(ctx context.Context, env *Environment, k Key) *entry {
	if h := m.hearing.Load(); h == nil || h.tired.Load() || h.since.Load() == deaf {
		return nil // no use waits for it
	}
	ctx, cancel := context.WithTimeout(ctx, checkWait)
	defer cancel()
	e, err := m.lookup(ctx, env, k.account())
	if err != nil {
		return nil
	}
	return e
}

// errBusy: as many checks as may be are under way.
var errBusy = errors.New("too many records are being read again")

// checkBehind has a record read again and waits for nothing.
func (m *Manager) checkBehind(env *Environment, h *hearing, k Key) {
	launch(m, env.flight("check behind", k), loadTimeout, func(ctx context.Context) (*entry, error) {
		select {
		case h.checkers <- struct{}{}:
			defer func() { <-h.checkers }()
		default:
			return nil, errBusy
		}
		e, err := m.reread(ctx, env, k)
		if err == nil || errors.Is(err, errUnreadable) {
			h.tired.Store(false)
		}
		return e, err
	})
}

// reread is reload of a record that another node may have changed. What it brings is news: what failed may be tried again.
func (m *Manager) reread(ctx context.Context, env *Environment, k Key) (*entry, error) {
	before := m.cache.Load().get(k)
	e, err := m.reload(ctx, env, k)
	if err != nil || e.rec == nil || before != nil && e.rec.same(before.rec) {
		return e, err
	}
	authorized := k.Kind == KindAuthorizer && (before == nil || before.rec == nil || !e.rec.sameAuthorization(before.rec))
	if authorized || !m.troubles.remain(k, e.token.Value) {
		m.troubles.over(k, e.token.Value)
	}
	if authorized {
		m.rosters.settled(k)
	}
	return e, nil
}

// place is where the beats of a key's changes are kept.
func (c *cache) place(k Key) uint16 { return uint16(maphash.Comparable(c.seed, k)) } //nolint:gosec // cut off on purpose

// recentWrites remembers the records that this node wrote a moment ago.
type recentWrites struct {
	mu   sync.Mutex
	recs map[Key]recentWrite
}

type recentWrite struct {
	rec *record
	at  time.Time
}

func (w *recentWrites) note(k Key, rec *record) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.recs == nil {
		w.recs = make(map[Key]recentWrite)
	}
	if len(w.recs) >= maxRecent {
		w.prune()
	}
	if len(w.recs) < maxRecent { // else the cache has it, most likely, and WeChat does
		w.recs[k] = recentWrite{rec, time.Now()}
	}
}

// prune forgets what is too old; mu is held.
func (w *recentWrites) prune() {
	for k, r := range w.recs {
		if time.Since(r.at) >= recentLife {
			delete(w.recs, k)
		}
	}
}

func (w *recentWrites) all() map[Key]*record {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.prune()
	recs := make(map[Key]*record, len(w.recs))
	for k, r := range w.recs {
		recs[k] = r.rec
	}
	return recs
}

// writeAgain is the job that writes what this node wrote a moment ago and the store has lost since: tickets, accepted
// authorizations and token records. What is there, or was overtaken, stays as it is.
func (m *Manager) writeAgain(ctx context.Context) error {
	env, err := m.current()
	if err != nil {
		return nil //nolint:nilerr // closed
	}
	if m.hearing.Load() == nil {
		return nil
	}
	for _, p := range env.Platforms {
		if m.tickets.get(p.AppID).durable {
			if err := m.saveTicket(ctx, env, p.AppID); err != nil {
				return err
			}
		}
	}
	for hash := range m.intents.open() {
		_, err := m.loadRaw(ctx, env, intentName(hash))
		if errors.Is(err, fs.ErrNotExist) {
			open := m.intents.get(hash)
			if open == nil {
				continue // it was done meanwhile
			}
			err = m.swapRecord(ctx, env, intentName(hash), nil, open.wire())
			if errors.Is(err, ErrSwapped) {
				continue // another node has written it
			}
			m.queue.add(intentJobs+hash, 0, m.intentJob(hash)) // clears it away if it was done meanwhile
		}
		if err != nil {
			return err
		}
	}
	for k, rec := range m.written.all() {
		_, err := m.commit(ctx, env, k, false, func(cur *record) *record {
			if !rec.supersedes(cur) || rec.same(cur) {
				return nil
			}
			next := *rec
			return &next
		})
		if err != nil && !errors.Is(err, errUnreadable) {
			return err
		}
	}
	return nil
}

// arrived notes that another node was given a ticket.
func (t *ticketTable) arrived(platform string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.change(platform, func(s *pushState) { s.missing, s.news = nil, s.news+1 })
}

// news is how often it was heard that another node may have been given a ticket.
func (t *ticketTable) news(platform string) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.push[platform].news
}

// retry lets a key's renewal be tried again at once, or once the record has been read that brings more than a refresh token.
// What WeChat refused stays refused.
func (t *troubles) retry(k Key) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if x := t.keys[k]; x != nil && !x.half {
		x.forget()
	}
}

var _ Listener = (*hearing)(nil)
