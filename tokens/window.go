package tokens

import (
	"sync"
	"time"

	"github.com/jellydator/ttlcache/v3"
)

// Window remembers values for an exact time: replay guards, one-time codes, tracking ids, calls in flight. Unlike
// an admission-based cache it never loses a value early, with one exception: it holds at most a fixed number of
// values, and one more drops the value that was not looked at for longest.
//
// Expired values are never returned; they are freed when the next value comes in, so a Window needs no goroutine.
// It is safe for concurrent use and each method is one atomic step. A closed Window is empty and stays empty.
type Window[K comparable, V any] struct {
	// ttlcache updates its items in place, so a value read after its lock was released may already be a later
	// one. A lock around both makes every method a single step.
	mu     sync.Mutex
	values *ttlcache.Cache[K, V]
	limit  int
	closed bool
	early  uint64
}

// NewWindow returns a window that keeps a value for ttl, unless Set says otherwise, and at most limit values (at
// least one).
func NewWindow[K comparable, V any](ttl time.Duration, limit int) *Window[K, V] {
	limit = max(limit, 1)
	return &Window[K, V]{limit: limit, values: ttlcache.New(
		ttlcache.WithTTL[K, V](ttl),
		ttlcache.WithCapacity[K, V](uint64(limit)),
		ttlcache.WithDisableTouchOnHit[K, V](), // by default reading a value would prolong its life
	)}
}

// Get returns the live value of key.
func (w *Window[K, V]) Get(key K) (value V, found bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.get(key)
}

func (w *Window[K, V]) get(key K) (value V, found bool) {
	if item := w.values.Get(key); item != nil {
		return item.Value(), true
	}
	return value, false
}

// GetOrSet returns the live value of key, or else keeps and returns what create makes. Of any number of callers
// with one key exactly one has found == false. create runs under the window's lock: it must only allocate.
func (w *Window[K, V]) GetOrSet(key K, create func() V) (value V, found bool) {
	return w.GetOrSetFor(key, ttlcache.DefaultTTL, create)
}

// GetOrSetFor is GetOrSet with a time of its own for a value that is new.
func (w *Window[K, V]) GetOrSetFor(key K, ttl time.Duration, create func() V) (value V, found bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if value, found = w.get(key); found {
		return value, true
	}
	value = create()
	w.set(key, value, ttl)
	return value, false
}

// Set keeps value for ttl (0: the window's own), in place of any earlier value of key.
func (w *Window[K, V]) Set(key K, value V, ttl time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.set(key, value, max(ttl, ttlcache.DefaultTTL))
}

func (w *Window[K, V]) set(key K, value V, ttl time.Duration) {
	if w.closed {
		return
	}
	w.values.DeleteExpired() // first, so that at capacity the dead make room before the living
	if !w.values.Has(key) && w.values.Len() >= w.limit {
		w.early++
	}
	w.values.Set(key, value, ttl)
}

// Take removes the live value of key and returns it, if want accepts it; a nil want accepts every value. want runs
// under the window's lock: it must only look.
func (w *Window[K, V]) Take(key K, want func(V) bool) (value V, taken bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	value, found := w.get(key)
	if !found || (want != nil && !want(value)) {
		var none V
		return none, false
	}
	w.values.Delete(key)
	return value, true
}

// Delete forgets the value of key.
func (w *Window[K, V]) Delete(key K) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.values.Delete(key)
}

// Len returns the number of live values.
func (w *Window[K, V]) Len() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.values.Len()
}

// Early returns how many values were dropped before their time, to make room.
func (w *Window[K, V]) Early() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.early
}

// Close forgets all values; later ones are not kept.
func (w *Window[K, V]) Close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	w.values.DeleteAll()
}
