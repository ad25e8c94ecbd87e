package tokens

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// strangerID is the appid of the n-th account that nobody knows.
func strangerID(n int) string { return fmt.Sprintf("wx%016x", 0xf000000+n) }

func (r *rig) authorized(t *testing.T, appid string) bool {
	t.Helper()
	ok, err := r.Authorized(t.Context(), appid)
	if err != nil {
		t.Fatalf("Authorized(%s): %v", appid, err)
	}
	return ok
}

func TestAuthorized(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform2, testAuthorizer)
		reads, calls := r.store.count("load"), r.calls()
		if !r.authorized(t, testAuthorizer) || r.store.count("load") != reads {
			t.Errorf("an account in use: not known, or %d reads", r.store.count("load")-reads)
		}
		r.restart()
		r.ticket(t, testPlatform)
		synctest.Wait()
		reads = r.store.count("load")
		for range 3 {
			if !r.authorized(t, testAuthorizer) {
				t.Error("after a restart: not known")
			}
		}
		if n := r.store.count("load") - reads; n > 2 { // one for each platform, once
			t.Errorf("after a restart: %d reads", n)
		}
		for _, appid := range []string{strangerID(1), testAccount, testPlatform, "", string(make([]byte, maxID+1))} {
			if r.authorized(t, appid) {
				t.Errorf("%q is known", appid)
			}
		}
		if now := r.calls(); now != calls {
			t.Errorf("WeChat was asked %d times", now-calls)
		}
	})
}

// calls is how often WeChat was asked for anything but by the first jobs of a manager.
func (r *rig) calls() (n int) {
	r.wx.set(func(f *fakeWeChat) {
		for path, count := range f.calls {
			if path != pathStartPush {
				n += count
			}
		}
	})
	return n
}

func TestAuthorizedChangesAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		if r.authorized(t, testAuthorizer) {
			t.Fatal("known before it authorised")
		}
		r.authorize(t, testPlatform, testAuthorizer)
		if !r.authorized(t, testAuthorizer) {
			t.Error("not known although it has just authorised")
		}
		time.Sleep(time.Second)
		if err := r.Revoke(t.Context(), testPlatform, testAuthorizer, time.Now()); err != nil {
			t.Fatal(err)
		}
		if r.authorized(t, testAuthorizer) {
			t.Error("known although it has just revoked")
		}
		time.Sleep(absentRecheck + time.Second)
		if r.authorized(t, testAuthorizer) {
			t.Error("known again, by the store")
		}
	})
}

// An account that authorised on another node is known here five seconds later at the latest.
func TestAuthorizedOnAnotherNode(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		other := NewManager()
		defer other.Close()
		other.Use(r.env)
		if r.authorized(t, testAuthorizer) {
			t.Fatal("known before it authorised")
		}
		if _, err := other.ExchangeAuthCode(t.Context(), testPlatform, testAuthorizer, r.newCode(testAuthorizer)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(absentRecheck + time.Millisecond)
		if !r.authorized(t, testAuthorizer) {
			t.Error("not known")
		}
	})
}

// Names that nobody knows cost the store no more than the bound, however many come; those in memory are answered
// meanwhile, and after it the others too.
func TestAuthorizedFlood(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		reads, started := r.store.count("load"), time.Now()
		refused := 0
		for n := range 10_000 {
			ok, err := r.Authorized(t.Context(), strangerID(n))
			switch {
			case ok:
				t.Fatalf("%s is known", strangerID(n))
			case errors.Is(err, ErrTooMany):
				refused++
			case err != nil:
				t.Fatal(err)
			}
			if n%200 == 0 {
				time.Sleep(100 * time.Millisecond)
				if !r.authorized(t, testAuthorizer) {
					t.Fatal("an account in use is not known during a flood")
				}
			}
		}
		bound := coldReads + int(time.Since(started).Seconds()*coldReadsPerSecond) + 1
		if n := r.store.count("load") - reads; n > bound || n < coldReads {
			t.Errorf("%d reads, the bound is %d", n, bound)
		}
		if refused == 0 {
			t.Error("nothing was refused")
		}
		if n := r.strangers.absent.Len(); n > coldReads+int(absentRecheck.Seconds())*coldReadsPerSecond {
			t.Errorf("%d absent accounts are remembered", n)
		}
		time.Sleep(time.Minute)
		if r.authorized(t, strangerID(1)) {
			t.Error("known")
		}
	})
}

// Pages are signed for whoever asks: made-up accounts cost no more here either, and take no account's place in memory.
func TestStoredPlatformOfFlood(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		reads, began, refused := r.store.count("load"), time.Now(), 0
		for n := range 10_000 {
			_, err := r.StoredPlatformOf(t.Context(), strangerID(n))
			switch {
			case errors.Is(err, ErrTooMany):
				refused++
			case !errors.Is(err, ErrNotAuthorized) && !errors.Is(err, ErrUnsure):
				t.Fatal(err)
			}
			if e := r.cache.Load().get(AuthorizerKey(testPlatform, strangerID(n))); e != nil {
				t.Fatal("an account that nobody knows has a place in memory")
			}
			if n%200 == 0 {
				time.Sleep(100 * time.Millisecond)
				if platform, err := r.StoredPlatformOf(t.Context(), testAuthorizer); platform != testPlatform {
					t.Fatalf("an account in use during a flood: %v", err)
				}
			}
		}
		bound := coldReads + int(time.Since(began).Seconds()*coldReadsPerSecond) + 1
		if n := r.store.count("load") - reads; n > bound || refused == 0 {
			t.Errorf("%d reads, the bound is %d; %d were refused", n, bound, refused)
		}
	})
}

// A damaged record is no sign that the account is made up: it is set aside, and WeChat's list brings the account back.
func TestStoredPlatformOfDamaged(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		r.authorize(t, testPlatform, testAuthorizer)
		r.restart()
		if err := r.store.Store(t.Context(), testAuthKey.recordName(), []byte("torn")); err != nil {
			t.Fatal(err)
		}
		if _, err := r.StoredPlatformOf(t.Context(), testAuthorizer); !errors.Is(err, ErrUnsure) {
			t.Errorf("damaged: %v, want ErrUnsure", err)
		}
		r.ticket(t, testPlatform)
		time.Sleep(time.Hour)
		if platform, err := r.StoredPlatformOf(t.Context(), testAuthorizer); platform != testPlatform || err != nil {
			t.Errorf("after the list was read: %q, %v", platform, err)
		}
	})
}

// The same name again and again, from everywhere at once, costs one read for each platform in five seconds.
func TestAuthorizedSameNameAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.store.hold(func(op, _ string) {
			if op == "load" {
				time.Sleep(100 * time.Millisecond)
			}
		})
		reads := r.store.count("load")
		var wg sync.WaitGroup
		for range 500 {
			wg.Go(func() {
				if ok, err := r.Authorized(t.Context(), strangerID(1)); ok || err != nil {
					t.Errorf("known %v, %v", ok, err)
				}
			})
		}
		wg.Wait()
		if n := r.store.count("load") - reads; n != 2 {
			t.Errorf("%d reads for two platforms", n)
		}
	})
}

// A store that hangs or fails makes it impossible to tell, in bounded time, and says so; nothing is remembered of it.
func TestAuthorizedWithoutTheStore(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		r.restart()
		synctest.Wait()
		hang := make(chan struct{})
		r.store.hold(func(op, _ string) {
			if op == "load" {
				<-hang
			}
		})
		start := time.Now()
		if ok, err := r.Authorized(t.Context(), testAuthorizer); ok || err == nil {
			t.Errorf("a store that hangs: %v, %v", ok, err)
		}
		if took := time.Since(start); took > authorizedTimeout {
			t.Errorf("took %v", took)
		}
		close(hang)
		r.store.hold(nil)
		synctest.Wait()
		r.restart()
		synctest.Wait()
		r.store.fail(func(op, _ string) error {
			if op == "load" {
				return errors.New("broken")
			}
			return nil
		})
		if ok, err := r.Authorized(t.Context(), testAuthorizer); ok || !errors.Is(err, ErrStore) {
			t.Errorf("a store that fails: %v, %v", ok, err)
		}
		r.store.fail(nil)
		if !r.authorized(t, testAuthorizer) {
			t.Error("not known after the store came back")
		}
	})
}

// A configuration with another platform asks again at once.
func TestAuthorizedAfterReload(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform2, testAuthorizer)
		one := *r.env
		one.Platforms = one.Platforms[:1]
		r.Use(&one)
		if r.authorized(t, testAuthorizer) {
			t.Error("known by a platform that is not configured")
		}
		r.Use(r.env)
		if !r.authorized(t, testAuthorizer) {
			t.Error("not known by the platform that is configured again")
		}
		r.Close()
		if _, err := r.Authorized(context.Background(), testAuthorizer); !errors.Is(err, ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
	})
}

// A burst goes through at once, and no more than that after however long; then so many a second.
func TestBudget(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var b budget
		granted := func(asked int) (n int) {
			for range asked {
				if b.spend(3, 2) {
					n++
				}
			}
			return n
		}
		for i, tt := range []struct {
			after time.Duration
			want  int
		}{{0, 3}, {0, 0}, {499 * time.Millisecond, 0}, {time.Millisecond, 1}, {time.Second, 2}, {time.Hour, 3}, {500 * time.Millisecond, 1}} {
			time.Sleep(tt.after)
			if got := granted(10); got != tt.want {
				t.Errorf("%d: %d granted after %v, want %d", i, got, tt.after, tt.want)
			}
		}
	})
}
