package tokens

import (
	"hash/maphash"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dgraph-io/ristretto/v2"
)

const (
	// cacheEntries bounds the read cache. What does not fit costs one read of the store per use.
	cacheEntries = 1 << 16
	cacheBuffer  = 64
	// cacheSweep is the period of the cache's own clean-up of expired entries, in seconds. Ours carry no expiry
	// there, so it has nothing to do.
	cacheSweep = 24 * 60 * 60
	// cacheGuards is the number of locks that readers spread over; see cache.
	cacheGuards = 32
	// absentRecheck is how long it is believed that an account has no authorization, or none with a refresh token:
	// another node may have been told otherwise.
	absentRecheck = 5 * time.Second
)

// cacheCounters is the size of the admission policy's sketch, which takes some 1.3 MiB from the start. It matters when the cache is
// full: which accounts are in it then is guessed from how often they are asked for. Only tests, which make thousands of caches, change it.
var cacheCounters int64 = 4 * cacheEntries

// entry is what the cache holds of one key. It is immutable but for its atomics.
type entry struct {
	key   Key
	place uint16  // of the key's mark; see hearing
	rec   *record // nil: the store has no record
	token Token   // zero if the record has no access token
	// Before staleAt the token is fresh, before deadAt it still works.
	staleAt, deadAt instant
	// recheckAt, if not 0, is when an entry without a token, or without the means to renew it, is read again. It is steady time, as
	// the others below are.
	recheckAt int64
	// refused is set once WeChat refused the token.
	refused atomic.Bool
	// spared is set once a refused token serves all the same, because no other is to be had for now, and ended once it serves no more,
	// whatever else is known of it.
	spared, ended atomic.Bool
	// unread is set while what the store has of it cannot be read, though the store answers.
	unread atomic.Bool
	// renewAt is when a background renewal may start next.
	renewAt atomic.Int64
	// infoAt is when WeChat may be asked next for the account's gh_ id.
	infoAt atomic.Int64
	// readAt is the manager's beat when the record was read or written here, and checkAt when it may be looked at next
	// after that could not be done. See hearing.
	readAt  atomic.Uint64
	checkAt atomic.Int64
}

// instant is a moment by two clocks, in nanoseconds: the wall clock, which somebody may set, and a steady one, which stands still while
// the machine sleeps. What ends has ended once either says so.
type instant struct{ wall, steady int64 }

// before reports whether it is before o by both clocks.
func (i instant) before(o instant) bool { return i.wall < o.wall && i.steady < o.steady }

// steadyBegin is when steady time was steadyLead: 0 is before whatever time there can be, also in the tests that run in the year 2000.
var steadyBegin = time.Now()

const steadyLead = 100 * 365 * 24 * time.Hour

func instantOf(t time.Time) instant { return instant{t.UnixNano(), steady(t)} }

// steady is the steady time of t, which time.Now has returned, or what was added to that.
func steady(t time.Time) int64 { return int64(t.Sub(steadyBegin) + steadyLead) }

// newEntry works out the states of a record as of now; rec is nil if there is none.
//
// Its times may be by another node's clock, or by this one's before it was set. No token lives longer than it does from its birth: of one that
// was asked for in the future, that is counted from now.
func newEntry(k Key, rec *record, now time.Time) *entry {
	e := &entry{key: k, rec: rec}
	if rec == nil || rec.revoked() {
		e.recheckAt = steady(now.Add(absentRecheck))
		return e
	}
	if k.Kind == KindAuthorizer && rec.RefreshToken.IsZero() {
		e.recheckAt = steady(now.Add(absentRecheck)) // nothing can be renewed, unless it authorised again elsewhere
	}
	if rec.AccessToken.IsZero() {
		return e
	}
	life := rec.ExpiresAt.Sub(rec.ObtainedAt)
	ends := now.Add(min(rec.ExpiresAt.Sub(now), max(life, 0)))
	e.token = Token{Value: rec.AccessToken, ExpiresAt: ends, Generation: rec.Gen}
	// A short life gets a margin in proportion, or its token would be stale from the start.
	e.staleAt = instantOf(ends.Add(-min(k.margin(), life/4)))
	e.deadAt = instantOf(ends.Add(-min(deadSkew, life/10)))
	return e
}

func (e *entry) gen() uint64 {
	if e == nil || e.rec == nil {
		return 0
	}
	return e.rec.Gen
}

// authorized reports whether there is a record that was not revoked.
func (e *entry) authorized() bool { return e.rec != nil && !e.rec.revoked() }

// live reports whether the token can be used.
func (e *entry) live(now instant) bool {
	return now.before(e.deadAt) && (!e.refused.Load() || e.spared.Load() && !e.ended.Load())
}

// spare lets a refused token serve on where its renewals are rationed. WeChat answers so on a path that takes another kind of token too:
// then it is as good as before on all others. If it is not, WeChat says so to each call.
func (e *entry) spare() {
	if e.refused.Load() { // else it serves anyway, until it is refused
		e.spared.Store(true)
	}
}

// fresh reports whether the token needs no renewal.
func (e *entry) fresh(now instant) bool { return now.before(e.staleAt) && !e.refused.Load() }

// renewable reports whether there is something to ask WeChat for a new token with.
func (e *entry) renewable() bool {
	return e.key.Kind != KindAuthorizer || e.authorized() && !e.rec.RefreshToken.IsZero()
}

// read notes that the entry's record counted as of that beat.
func (e *entry) read(beat uint64) {
	e.unread.Store(false)
	for {
		held := e.readAt.Load()
		if held >= beat || e.readAt.CompareAndSwap(held, beat) {
			return
		}
	}
}

// believed reports whether an entry may be believed without another look into the store.
func (e *entry) believed(now instant) bool { return e.recheckAt == 0 || now.steady < e.recheckAt }

// cache is the read cache in front of the store. It may lose any entry at any time, but never goes back to a record
// that another one superseded: put is called under the key's lock and leaves nothing in the cache's buffers.
//
// Ristretto must not be read while it is being closed. Readers hold one of many read locks; close takes them all.
type cache struct {
	entries *ristretto.Cache[uint64, *entry]
	seed    maphash.Seed
	guards  [cacheGuards]struct {
		sync.RWMutex
		_ [40]byte // a cache line each
	}
	closed bool                        // guarded by all guards
	tokens [len(allKinds)]atomic.Int64 // that are in it, as far as ristretto says
}

func newCache() (*cache, error) {
	c := &cache{seed: maphash.MakeSeed()}
	entries, err := ristretto.NewCache(&ristretto.Config[uint64, *entry]{
		NumCounters:            cacheCounters,
		MaxCost:                cacheEntries,
		BufferItems:            cacheBuffer,
		IgnoreInternalCost:     true,
		TtlTickerDurationInSec: cacheSweep,
		KeyToHash:              func(h uint64) (uint64, uint64) { return h, 0 },
		ShouldUpdate: func(next, held *entry) bool {
			return next.key != held.key || !held.rec.supersedes(next.rec)
		},
		OnExit: func(e *entry) { c.count(e, -1) },
	})
	if err != nil {
		return nil, err
	}
	c.entries = entries
	return c, nil
}

// count notes that an entry came in or went.
func (c *cache) count(e *entry, n int64) {
	if e == nil || e.token.Value.IsZero() {
		return
	}
	if i := slices.Index(allKinds[:], e.key.Kind); i >= 0 {
		c.tokens[i].Add(n)
	}
}

// Cached is how many tokens of each kind are in memory.
func (m *Manager) Cached() map[Kind]int {
	cached := make(map[Kind]int, len(allKinds))
	if c := m.cache.Load(); c != nil {
		for i, kind := range allKinds {
			cached[kind] = int(c.tokens[i].Load())
		}
	}
	return cached
}

// get returns the key's entry, or nil.
func (c *cache) get(k Key) *entry {
	h := maphash.Comparable(c.seed, k)
	g := &c.guards[h%cacheGuards]
	g.RLock()
	defer g.RUnlock()
	if c.closed {
		return nil
	}
	e, ok := c.entries.Get(h)
	if !ok || e.key != k { // another key with the same hash
		return nil
	}
	return e
}

// put offers an entry to the cache, unless that holds a record of the key that supersedes it, and returns once every
// later get sees it, or something newer, or nothing. The caller holds the key's lock.
func (c *cache) put(e *entry) {
	h := maphash.Comparable(c.seed, e.key)
	g := &c.guards[h%cacheGuards]
	g.RLock()
	defer g.RUnlock()
	if c.closed {
		return
	}
	c.count(e, 1)
	if !c.entries.Set(h, e, 1) {
		c.count(e, -1) // dropped, without a word to OnExit
	}
	// A new item waits in a buffer and is dropped there if an item of the key arrived before it.
	c.entries.Wait()
	if held, ok := c.entries.Get(h); ok && held != e && held.key == e.key && !held.rec.supersedes(e.rec) {
		c.entries.Del(h)
		c.entries.Wait()
	}
}

// drop removes a key's entry. The caller holds the key's lock.
func (c *cache) drop(k Key) {
	h := maphash.Comparable(c.seed, k)
	g := &c.guards[h%cacheGuards]
	g.RLock()
	defer g.RUnlock()
	if c.closed {
		return
	}
	c.entries.Del(h)
	c.entries.Wait()
}

// close stops the cache's goroutines; it is empty from then on.
func (c *cache) close() {
	for i := range c.guards {
		c.guards[i].Lock()
		defer c.guards[i].Unlock()
	}
	if !c.closed {
		c.closed = true
		c.entries.Close()
	}
}
