package tokens

import (
	"context"
	"sync"
)

// keyLocks are mutexes by name that can be waited for with a context. A name costs memory only while it is held or
// waited for.
type keyLocks struct {
	mu    sync.Mutex
	locks map[string]*keyLock
}

type keyLock struct {
	held  chan struct{} // holds one element while locked
	users int           // holder and waiters; guarded by keyLocks.mu
}

// lock waits for the name's lock until ctx ends. A second unlock does nothing.
func (l *keyLocks) lock(ctx context.Context, name string) (unlock func(), err error) {
	l.mu.Lock()
	if l.locks == nil {
		l.locks = make(map[string]*keyLock)
	}
	k := l.locks[name]
	if k == nil {
		k = &keyLock{held: make(chan struct{}, 1)}
		l.locks[name] = k
	}
	k.users++
	l.mu.Unlock()

	leave := func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if k.users--; k.users == 0 {
			delete(l.locks, name)
		}
	}
	var once sync.Once
	unlock = func() { once.Do(func() { <-k.held; leave() }) }
	select {
	case k.held <- struct{}{}:
		return unlock, nil
	default:
	}
	select {
	case k.held <- struct{}{}:
		return unlock, nil
	case <-ctx.Done():
		leave()
		return nil, ctx.Err()
	}
}

// taken reports whether somebody holds the name's lock, or waits for it.
func (l *keyLocks) taken(name string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.locks[name] != nil
}
