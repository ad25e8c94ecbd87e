package redisstore

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
	"github.com/caddy-wechat/caddy-wechat/internal/stall"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

const locked = "wechat/v1/account/wx1"

// pair is two nodes on one server, whose locks live for lease.
func pair(t *testing.T, lease time.Duration) (server *redistest.Server, a, b *Store) {
	t.Helper()
	server = redistest.Start(t)
	o := Options{Addresses: []string{server.Addr}}
	a, b = open(t, o), open(t, o)
	a.lease, b.lease = lease, lease
	return server, a, b
}

func mustLock(t *testing.T, s *Store) func() {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	unlock, err := s.Lock(ctx, locked)
	if err != nil {
		t.Fatal(err)
	}
	return unlock
}

// A holder that died has the lock for its lease and no longer.
func TestLockOfADeadHolder(t *testing.T) {
	t.Parallel()
	const lease = 600 * time.Millisecond
	_, a, b := pair(t, lease)
	start := time.Now()
	mustLock(t, a)
	a.held[locked].renewal.Stop()
	mustLock(t, b)()
	if took := time.Since(start); took < lease/2 || took > lease+5*time.Second {
		t.Errorf("the lock was free after %v, want about %v", took, lease)
	}
}

// A lease that ends in an hour is of before the server's clock was put back, or of another server's clock. A holder that died has the lock
// for one lease more, and no longer.
func TestLockOfADeadHolderWhenTheClockIsPutBack(t *testing.T) {
	t.Parallel()
	const lease = 600 * time.Millisecond
	server, a, b := pair(t, lease)
	key := lockKey(a.place(locked))
	later := time.Now().Add(time.Hour)
	server.Do("SET", key, fmt.Sprintf("%d %d dead", later.UnixMicro(), later.UnixMilli()), "PX", 2*time.Hour.Milliseconds())
	start := time.Now()
	mustLock(t, b)()
	if took := time.Since(start); took < lease/2 {
		t.Errorf("the lock was free after %v: its holder may live", took)
	}
	if value, _ := server.Do("GET", key).(string); !strings.HasPrefix(value, fmt.Sprint(later.UnixMicro()+1, " ")) {
		t.Errorf("the lock is %q: the fence of the dead holder is to be below", value)
	}
}

// A holder that lives has it for as long as it takes, also when the server loses it.
func TestLockIsRenewed(t *testing.T) {
	t.Parallel()
	server, a, b := pair(t, shortLease)
	for try := range stall.Tries(t, shortLease/9, server.Turn) {
		unlock := mustLock(t, a)
		server.Do("FLUSHALL")
		redistest.Eventually(t, "the lock is taken again", func() error {
			if n := server.Do("EXISTS", lockKey(a.place(locked))); n != int64(1) {
				return errors.New("gone")
			}
			return nil
		})
		staysHeld(t, try, b)
		if err := a.Store(t.Context(), locked, []byte("under the lock")); err != nil {
			try.Errorf("the holder's write: %v", err)
		}
		unlock()
		mustLock(t, b)()
	}
}

// shortLease is one that a machine may sleep through: the lock is lost then, as it should be.
const shortLease = 900 * time.Millisecond

// staysHeld fails if a node gets a lock that is another's, which is renewed.
func staysHeld(t *testing.T, try *stall.Try, s *Store) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*shortLease)
	defer cancel()
	unlock, err := s.Lock(ctx, locked)
	if err == nil {
		unlock()
	}
	if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, tokens.ErrLockHeld) {
		try.Errorf("Lock of a held lock: %v", err)
	}
}

// heldOnce closes a channel once Redis has said to a store that a lock is another's.
type heldOnce struct {
	said chan struct{}
	once sync.Once
}

func (*heldOnce) DialHook(next redis.DialHook) redis.DialHook { return next }

func (*heldOnce) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (h *heldOnce) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		err := next(ctx, cmd)
		if errors.Is(err, redis.Nil) {
			h.once.Do(func() { close(h.said) })
		}
		return err
	}
}

// A Redis that said that a lock is held and then fell silent has failed, once its answer was due. A wait that ends before that
// tells nothing new.
func TestRedisFallsSilentInAWaitForALock(t *testing.T) {
	t.Parallel()
	server, a, _ := pair(t, time.Minute)
	t.Cleanup(mustLock(t, a))
	for name, tt := range map[string]struct {
		timeout, wait time.Duration
		held          bool
	}{
		"the answer was due":     {1400 * time.Millisecond, 2700 * time.Millisecond, false}, // less than two exchanges
		"the answer was not due": {operationLimit, time.Second, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for try := range stall.Tries(t, 100*time.Millisecond, server.Turn) {
				relay := redistest.NewRelay(t, server.Addr)
				b := open(t, Options{Addresses: []string{relay.Addr}, Timeout: tt.timeout})
				hook := &heldOnce{said: make(chan struct{})}
				b.client.AddHook(hook)
				ctx, cancel := context.WithTimeout(t.Context(), tt.wait)
				defer cancel()
				result := make(chan error, 1)
				go func() {
					_, err := b.Lock(ctx, locked)
					result <- err
				}()
				select {
				case <-hook.said:
				case err := <-result:
					try.Errorf("Redis did not say that the lock is held: %v", err)
					continue
				}
				relay.HangAnswers()
				err := <-result
				if ctx.Err() == nil {
					t.Fatalf("it ended before the wait: %v", err)
				}
				if !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, tokens.ErrLockHeld) != tt.held {
					try.Errorf("Lock: %v", err)
				}
			}
		})
	}
}

// What is written under a lock that another had since is refused, whatever the writer believes.
func TestWriteUnderALostLock(t *testing.T) {
	t.Parallel()
	server, a, b := pair(t, time.Minute)
	defer mustLock(t, a)()
	first := a.fence(locked)
	server.Do("DEL", lockKey(a.place(locked)))
	mustLock(t, b)() // and gone again
	if err := b.Store(t.Context(), locked, []byte("newer")); err != nil {
		t.Fatal(err)
	}
	for what, write := range map[string]func() error{
		"Store":  func() error { return a.Store(t.Context(), locked, []byte("older")) },
		"Swap":   func() error { return a.Swap(t.Context(), locked, []byte("newer"), []byte("older")) },
		"Delete": func() error { return a.Delete(t.Context(), locked) },
	} {
		if err := write(); !errors.Is(err, tokens.ErrLockLost) {
			t.Errorf("%s: %v, want tokens.ErrLockLost", what, err)
		}
	}
	if got, err := a.Load(t.Context(), locked); err != nil || string(got) != "newer" {
		t.Errorf("the record: %q, %v", got, err)
	}
	unlock := mustLock(t, b)
	defer unlock()
	before, _ := strconv.ParseUint(first, 10, 64)
	if after, err := strconv.ParseUint(b.fence(locked), 10, 64); err != nil || after <= before {
		t.Errorf("number %d after %d (%v)", after, before, err)
	}
}

// Who has given a lock back writes without it: others may have had it since.
func TestWriteAfterALock(t *testing.T) {
	t.Parallel()
	_, a, b := pair(t, time.Minute)
	unlock := mustLock(t, a)
	l := a.held[locked]
	unlock()
	mustLock(t, b)()
	if err := a.Store(t.Context(), locked, []byte("x")); err != nil {
		t.Error(err)
	}
	if l.renewal.Stop() {
		t.Error("a lock that was given back is to be renewed")
	}
	// A renewal that was under way took it again.
	a.renew(locked, mustHave(t, a))
	mustLock(t, b)()
}

// mustHave is a lock that was given back, and that nobody else has had.
func mustHave(t *testing.T, s *Store) *lock {
	t.Helper()
	unlock := mustLock(t, s)
	l := s.held[locked]
	unlock()
	return l
}

// A lock that Redis may have granted, and whose answer was lost, is nobody's: others do not wait for its lease to end.
func TestLockWhoseAnswerIsLost(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	relay := redistest.NewRelay(t, server.Addr)
	a, b := open(t, Options{Addresses: []string{relay.Addr}}), open(t, Options{Addresses: []string{server.Addr}})
	a.lease = time.Minute
	mustLock(t, a)() // Redis knows the script, and there is a connection
	relay.HangAnswers()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := a.Lock(ctx, locked); err == nil || errors.Is(err, tokens.ErrLockHeld) {
		t.Fatalf("Lock: %v", err)
	}
	relay.Pass()
	mustLock(t, b)()
}

// A lock that Redis granted, and whose answer was lost with its connection, is had by who asks again for it: it would wait for itself.
func TestLockWhoseConnectionBreaks(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	relay := redistest.NewRelay(t, server.Addr)
	s := open(t, Options{Addresses: []string{relay.Addr}})
	s.lease = time.Minute
	mustLock(t, s)() // Redis knows the script, and there is a connection
	server.Do("DEL", lockKey(s.place(locked)))
	relay.HangAnswers()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	result := make(chan error, 1)
	go func() {
		_, err := s.Lock(ctx, locked)
		result <- err
	}()
	redistest.Eventually(t, "it is granted", func() error {
		if n := server.Do("EXISTS", lockKey(s.place(locked))); n != int64(1) {
			return errors.New("not yet")
		}
		return nil
	})
	relay.Break()
	relay.Pass()
	if err := <-result; err != nil {
		t.Fatal(err)
	}
	if err := s.Store(t.Context(), locked, []byte("x")); err != nil {
		t.Errorf("Store under it: %v", err)
	}
}

// What stands in a lock's place and is none is waited for, as a lock is.
func TestLockInThePlaceOfAnotherProgramsValue(t *testing.T) {
	t.Parallel()
	server, a, _ := pair(t, time.Minute)
	server.Do("SET", lockKey(a.place(locked)), "of another program", "PX", 300)
	mustLock(t, a)()
}

// Who had a lock last is remembered when it was given back, too: a holder that slept does not take it for its own again.
func TestLockThatWasGivenBackIsRemembered(t *testing.T) {
	t.Parallel()
	server, a, b := pair(t, time.Minute)
	defer mustLock(t, a)()
	l := a.held[locked]
	if err := a.release(l); err != nil { // as its lease would end
		t.Fatal(err)
	}
	mustLock(t, b)()
	if ms, _ := server.Do("PTTL", lockKey(a.place(locked))).(int64); ms < (fenceLife - time.Minute).Milliseconds() {
		t.Errorf("it is remembered for %d ms, want about %v", ms, fenceLife)
	}
	a.renew(locked, l)
	if err := a.Store(t.Context(), locked, []byte("x")); !errors.Is(err, tokens.ErrLockLost) {
		t.Errorf("Store by a holder that slept: %v", err)
	}
}

// news are the names that are heard.
type news chan string

func (news) Listening(bool)        {}
func (n news) Changed(name string) { n <- name }

// What was not there is no news when it is deleted.
func TestDeletionOfNothing(t *testing.T) {
	t.Parallel()
	_, a, b := pair(t, time.Minute)
	heard := make(news, 100)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { b.Watch(ctx, heard) })
	defer wg.Wait()
	defer cancel()
	redistest.Eventually(t, "changes are heard", func() error {
		if err := errors.Join(a.Delete(t.Context(), "wechat/v1/account/absent"), a.Store(t.Context(), locked, nil)); err != nil || len(heard) == 0 {
			return fmt.Errorf("not yet: %w", err)
		}
		return nil
	})
	if name := <-heard; name != locked {
		t.Errorf("heard of %s", name)
	}
}

// failures counts the scripts that fail.
type failures struct {
	heldOnce
	want atomic.Int32
}

func (f *failures) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		err := next(ctx, cmd)
		if err != nil && cmd.Name() == "evalsha" && f.want.Add(-1) == 0 {
			close(f.said)
		}
		return err
	}
}

// A holder that cannot renew its lock tries again until its lease is over, and soon.
func TestLockIsRenewedAgain(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	const lease = 3 * time.Second
	for try := range stall.Tries(t, lease/10, server.Turn) {
		relay := redistest.NewRelay(t, server.Addr)
		a, b := open(t, Options{Addresses: []string{relay.Addr}}), open(t, Options{Addresses: []string{server.Addr}})
		a.lease, b.lease = lease, lease
		unlock := mustLock(t, a)
		hook := &failures{heldOnce: heldOnce{said: make(chan struct{})}}
		hook.want.Store(3)
		a.client.AddHook(hook)
		relay.Cut()
		ctx, cancel := context.WithTimeout(t.Context(), lease*3/2)
		result := make(chan error, 1)
		go func() {
			_, err := b.Lock(ctx, locked)
			result <- err
		}()
		<-hook.said
		relay.Pass()
		if err := <-result; !errors.Is(err, tokens.ErrLockHeld) {
			try.Errorf("another has the lock: %v", err)
		}
		cancel()
		unlock()
		a.Close()
		b.Close()
	}
}

// Close does not wait for locks that a Redis that hangs does not take back.
func TestCloseLeavesLocksToTheirLeases(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	for try := range stall.Tries(t, releaseLimit/4, server.Turn) {
		relay := redistest.NewRelay(t, server.Addr)
		s := open(t, Options{Addresses: []string{relay.Addr}})
		l := mustHave(t, s)
		relay.Hang()
		end := time.Now().Add(time.Minute)
		s.mu.Lock()
		s.freeLocked(freedLock{l, end})
		s.freeLocked(freedLock{l, end}, freedLock{l, end}, freedLock{l, end}, freedLock{l, end})
		s.mu.Unlock()
		start := time.Now()
		s.Close()
		if took := try.Since(start); took > releaseLimit*3/2 {
			try.Errorf("Close took %v", took)
		}
	}
}

// What Redis did not hear of an unlock, it hears when it is back: the others do not wait for the lease to end.
func TestUnlockThatIsLost(t *testing.T) {
	t.Parallel()
	for name, fail := range map[string]func(*redistest.Relay){"down": (*redistest.Relay).Cut, "hangs": (*redistest.Relay).Hang} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := redistest.Start(t)
			relay := redistest.NewRelay(t, server.Addr)
			a, b := open(t, Options{Addresses: []string{relay.Addr}}), open(t, Options{Addresses: []string{server.Addr}})
			a.lease = time.Minute
			unlock := mustLock(t, a)
			fail(relay)
			unlock()
			relay.Pass()
			mustLock(t, b)()
		})
	}
}

// A replica that took over may have got a lock and not its end.
func TestUnlockThatTheReplicaDidNotGet(t *testing.T) {
	t.Parallel()
	server, a, b := pair(t, time.Minute)
	ctx, cancel := context.WithCancel(t.Context())
	on := make(listening, 1)
	var wg sync.WaitGroup
	wg.Go(func() { a.Watch(ctx, on) })
	defer wg.Wait()
	defer cancel()
	if !<-on {
		t.Fatal("does not listen")
	}
	unlock := mustLock(t, a)
	key := lockKey(a.place(locked))
	owner := server.Do("GET", key)
	unlock()
	server.Do("SET", key, owner, "PX", time.Minute.Milliseconds())
	server.Do("CLIENT", "KILL", "TYPE", "pubsub")
	mustLock(t, b)()
}

// What is remembered of locks that were given back is bounded, in time and number, and costs an unlock nothing.
func TestFreedLocksAreBounded(t *testing.T) {
	t.Parallel()
	s := open(t, Options{Addresses: []string{"127.0.0.1:1"}})
	for range 2 * maxFreed {
		s.freed(new(lock))
	}
	if n := len(s.free); n != maxFreed {
		t.Errorf("%d are remembered", n)
	}
	s.lease = -time.Second
	for range maxFreed {
		s.freed(new(lock))
	}
	for i := range s.free {
		s.free[i].end = time.Now().Add(-time.Second)
	}
	s.freed(new(lock))
	if n := len(s.free); n != 1 {
		t.Errorf("%d are remembered when their time is over", n)
	}
}

// A waiter hears of a free lock in a fraction of a second.
func TestLockPassesOnSoon(t *testing.T) {
	t.Parallel()
	server, a, b := pair(t, time.Minute)
	asks := new(failures)
	b.client.AddHook(asks) // "held" is an error there
	for try := range stall.Tries(t, 100*time.Millisecond, server.Turn) {
		asks.want.Store(0)
		unlock := mustLock(t, a)
		freed := make(chan time.Time, 1)
		time.AfterFunc(500*time.Millisecond, func() { freed <- time.Now(); unlock() })
		mustLock(t, b)()
		if took := try.Since(<-freed); took > 2*time.Second {
			try.Errorf("the waiter got it %v after it was free", took)
		}
		if n := -asks.want.Load(); n < 2 || n > 25 { // a quarter of a tenth of a second and more for each, but for the first
			try.Errorf("it asked %d times in half a second", n)
		}
	}
}

// Locks are to be had, and held, while the server is full: two nodes would refresh one token otherwise.
func TestLockInAFullServer(t *testing.T) {
	t.Parallel()
	server, a, b := pair(t, shortLease)
	server.Do("CONFIG", "SET", "maxmemory", "1")
	for try := range stall.Tries(t, shortLease/9, server.Turn) {
		unlock := mustLock(t, a)
		staysHeld(t, try, b)
		if err := a.Store(t.Context(), locked, []byte("x")); err == nil || errors.Is(err, tokens.ErrLockLost) {
			try.Errorf("a write in a full server: %v", err)
		}
		unlock()
		mustLock(t, b)()
	}
}
