package redisstore

import (
	"context"
	"crypto/rand"
	"fmt"
	mathrand "math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

const (
	// leaseLife is how long a lock outlives its holder. While it is held it is renewed three times as often.
	leaseLife = 10 * time.Second
	// fenceLife is how long it is remembered who had a lock last. Of a holder that slept for longer, no write is taken.
	fenceLife = 10 * time.Minute
	// lockLimit bounds a Lock whose context has no end.
	lockLimit = 30 * time.Second
	// A lock that is another's is tried again after pauseFirst, and then after up to pauseMost, less half by chance.
	pauseFirst = 10 * time.Millisecond
	pauseMost  = 100 * time.Millisecond
	// releaseLimit bounds an unlock. One that fails is tried again every releaseEvery, until the lease has ended by itself.
	releaseLimit = time.Second
	releaseEvery = 200 * time.Millisecond
	// maxFreed bounds the locks given back of late that are released again when a server comes back.
	maxFreed = 10_000
)

// lock is a lock that this store holds, or takes it that it does.
type lock struct {
	folder, field string
	owner, fence  string
	renewal       *time.Timer
}

func (l *lock) keys() []string { return []string{lockKey(l.folder, l.field)} }

// Lock implements tokens.Store. The lock has a random owner, a lease that is renewed until unlock, and a number that is
// higher than that of every owner before: see Store.Store.
func (s *Store) Lock(ctx context.Context, name string) (unlock func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, lockLimit)
	defer cancel()
	folder, field := s.place(name)
	l := &lock{folder: folder, field: field, owner: rand.Text()}
	if err := s.acquire(ctx, l); err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.held[name] = l
	l.renewal = time.AfterFunc(s.lease/3, func() { s.renew(name, l) })
	s.mu.Unlock()
	var once sync.Once
	return func() { once.Do(func() { s.unlock(name, l) }) }, nil
}

// acquire tries until the lock is had or ctx ends. That it is another's is what Redis said last, not what it said before it
// fell silent: a question that ctx cuts off while an answer may still come takes nothing back, and one that had its time does.
func (s *Store) acquire(ctx context.Context, l *lock) error {
	pause := pauseFirst
	for held := false; ; held = true {
		asked := time.Now()
		attempt, cancel := context.WithTimeout(ctx, operationLimit)
		fence, err := s.run(attempt, lockScript, l.keys(), l.owner, s.lease.Milliseconds(), fenceLife.Milliseconds()).Text()
		another := isNil(err) // it is held
		err = s.failure(attempt, err)
		cancel()
		switch {
		case err == nil:
			l.fence = fence
			return nil
		case !another:
			s.abandon(l) // it may have been granted, and the answer lost
			if held && ctx.Err() != nil && time.Since(asked) < s.timeout {
				return fmt.Errorf("%w: %w", tokens.ErrLockHeld, err)
			}
			return err
		}
		t := time.NewTimer(pause/2 + mathrand.N(pause/2)) //nolint:gosec // no secret
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return fmt.Errorf("%w: %w", tokens.ErrLockHeld, ctx.Err())
		}
		pause = min(2*pause, pauseMost)
	}
}

// abandon releases in the background what nobody may hold.
func (s *Store) abandon(l *lock) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.abandonLocked(l)
}

// abandonLocked is abandon where mu is held.
func (s *Store) abandonLocked(l *lock) { s.freeLocked(freedLock{l, time.Now().Add(s.lease)}) }

// freeLocked releases locks in the background, each until that is done or its lease has ended. The caller holds mu.
func (s *Store) freeLocked(locks ...freedLock) {
	if s.closed {
		return
	}
	s.work.Go(func() {
		for _, l := range locks {
			select {
			case <-s.closing:
				return
			default:
			}
			for time.Now().Before(l.end) && s.release(l.lock) != nil {
				select {
				case <-s.closing:
					return
				case <-time.After(releaseEvery):
				}
			}
		}
	})
}

func (s *Store) release(l *lock) error {
	ctx, cancel := context.WithTimeout(context.Background(), releaseLimit)
	defer cancel()
	return unlockScript.Run(ctx, s.client, l.keys(), l.owner).Err()
}

// freedLock is a lock that was given back, and when its lease ends if a server does not know that.
type freedLock struct {
	*lock
	end time.Time
}

// freed notes a lock that a server has taken back.
func (s *Store) freed(l *lock) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	for len(s.free) > 0 && (now.After(s.free[0].end) || len(s.free) >= maxFreed) {
		s.free = s.free[1:]
	}
	s.free = append(s.free, freedLock{l, now.Add(s.lease)})
}

// freeAgain releases once more, in the background, what was given back of late: the server that the store has come back to
// may have got the locks, and not their ends.
func (s *Store) freeAgain() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.freeLocked(slices.Clone(s.free)...)
}

func (s *Store) unlock(name string, l *lock) {
	s.mu.Lock()
	if s.held[name] == l {
		delete(s.held, name)
	}
	l.renewal.Stop()
	s.mu.Unlock()
	if s.release(l) != nil {
		s.abandon(l)
		return
	}
	s.freed(l)
}

// renew prolongs the lease of a lock that is held, and plans the next time.
func (s *Store) renew(name string, l *lock) {
	ctx, cancel := context.WithTimeout(context.Background(), s.lease/3)
	defer cancel()
	ours, err := s.run(ctx, renewScript, l.keys(), l.owner, s.lease.Milliseconds(), fenceLife.Milliseconds(), l.fence).Bool()
	if err == nil && !ours {
		return // lost; the fence refuses what is still written under it
	}
	next := s.lease / 3
	if err != nil {
		next = s.lease / 10
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held[name] == l {
		l.renewal.Reset(next)
		return
	}
	// It was unlocked meanwhile, and this may have taken it again.
	s.abandonLocked(l)
}

// fence is the number of the lock of that name if this store holds it, else "".
func (s *Store) fence(name string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.held[name]; l != nil {
		return l.fence
	}
	return ""
}
