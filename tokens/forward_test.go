package tokens

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// receiver is whom events are handed on to.
type receiver struct {
	mu   sync.Mutex
	err  error // what comes of it; not ErrNotForwarded: it gets the event
	got  []Forward
	runs int
}

func (rc *receiver) forward(_ context.Context, f Forward) error {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	rc.runs++
	if !errors.Is(rc.err, ErrNotForwarded) {
		rc.got = append(rc.got, f)
	}
	return rc.err
}

func (rc *receiver) answer(err error) {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	rc.err = err
}

func (rc *receiver) want(t *testing.T, r *rig, got, kept int) {
	t.Helper()
	synctest.Wait()
	rc.mu.Lock()
	defer rc.mu.Unlock()
	if n := r.kept(t); len(rc.got) != got || n != kept {
		t.Errorf("it got %d events in %d attempts, %d are kept; want %d and %d", len(rc.got), rc.runs, n, got, kept)
	}
}

func (r *rig) kept(t *testing.T) int {
	t.Helper()
	names, err := r.store.MemStore.List(context.Background(), forwardFolder)
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

var testForward = Forward{Platform: testPlatform, AppID: testAuthorizer, InfoType: "unauthorized", Event: []byte(`{"message":"bWVzc2FnZQ=="}`)}

// inForward calls test with a manager whose events go to a receiver, which reaches nobody at first.
func inForward(t *testing.T, test func(t *testing.T, r *rig, rc *receiver)) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		rc := &receiver{err: ErrNotForwarded}
		r := newRig(t)
		r.env.Forward = rc.forward
		r.Use(r.env)
		synctest.Wait() // it has looked for what an earlier process has left
		test(t, r, rc)
	})
}

func (r *rig) keepForward(t *testing.T) (id string) {
	t.Helper()
	id, err := r.KeepForward(t.Context(), testForward)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestForwardIsDone(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		for _, err := range []error{nil, errors.New("status 500")} {
			id := r.keepForward(t)
			rc.want(t, r, 0, 1)
			if got := r.HandOn(t.Context(), id, func(context.Context) error { return err }); !errors.Is(got, err) {
				t.Errorf("error %v, want %v", got, err)
			}
			rc.want(t, r, 0, 0)
		}
		if rc.runs > 0 {
			t.Errorf("tried again: %d", rc.runs)
		}
	})
}

// What an earlier process has kept and not handed on is handed on at the start, as it was.
func TestForwardAfterAKill(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		first := r.keepForward(t)
		time.Sleep(time.Second)
		second := r.keepForward(t)
		if first >= second || !forwardTime(second).Equal(time.Now()) {
			t.Errorf("names %s, %s", first, second)
		}
		rc.answer(nil)
		r.restart()
		rc.want(t, r, 2, 0)
		if f := rc.got[0]; f.Platform != testForward.Platform || f.AppID != testForward.AppID || f.InfoType != testForward.InfoType || string(f.Event) != string(testForward.Event) {
			t.Errorf("handed on %+v", f)
		}
		r.restart()
		rc.want(t, r, 2, 0)
	})
}

// While nobody is reached it is tried again, for a week, and then the log says that it is lost.
func TestForwardIsTriedAgain(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		hand := func() {
			id := r.keepForward(t)
			if err := r.HandOn(t.Context(), id, func(context.Context) error { return ErrNotForwarded }); !errors.Is(err, ErrNotForwarded) {
				t.Errorf("error %v", err)
			}
		}
		hand()
		time.Sleep(time.Hour)
		rc.want(t, r, 0, 1)
		if runs := rc.runs; runs < 10 || runs > 200 {
			t.Errorf("%d attempts in an hour", runs)
		}
		rc.answer(nil)
		time.Sleep(10 * time.Minute)
		rc.want(t, r, 1, 0)

		rc.answer(ErrNotForwarded)
		hand()
		time.Sleep(forwardLife - time.Hour)
		rc.want(t, r, 1, 1)
		if r.log.count("an event could not be forwarded; it") != 0 {
			t.Error("given up too early")
		}
		time.Sleep(2 * time.Hour)
		rc.want(t, r, 1, 0)
		if r.log.count("an event could not be forwarded; it") != 1 {
			t.Error("the log does not say that it is lost")
		}
	})
}

// Events that get to nobody, which takes a while to tell, do not keep the others from whom they are for.
func TestForwardsTakeTurns(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		r.env.Forward = func(ctx context.Context, f Forward) error {
			if f.AppID == testAuthorizer {
				time.Sleep(20 * time.Second)
				return ErrNotForwarded
			}
			return rc.forward(ctx, f)
		}
		rc.answer(nil)
		for range 5 {
			r.keepForward(t)
			time.Sleep(time.Millisecond)
		}
		other := testForward
		other.AppID = testAccount
		if _, err := r.KeepForward(t.Context(), other); err != nil {
			t.Fatal(err)
		}
		r.restart()
		time.Sleep(10 * time.Minute)
		rc.want(t, r, 1, 5)
	})
}

// One that found no place is not lost.
func TestForwardLater(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		rc.answer(nil)
		r.HandOnLater(r.keepForward(t))
		rc.want(t, r, 0, 1)
		time.Sleep(takeOverAfter)
		rc.want(t, r, 1, 0)
	})
}

// Of two nodes one hands an event on, whichever has it; and one that is under way here is nobody's at this node.
func TestForwardOnce(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		rc.answer(nil)
		id := r.keepForward(t)
		other := *r
		other.Manager = NewManager()
		t.Cleanup(other.Close)
		done := make(chan error)
		go func() {
			done <- r.HandOn(context.Background(), id, func(context.Context) error { time.Sleep(5 * time.Second); return nil })
		}()
		synctest.Wait()
		other.Use(other.env)
		if err := r.resumeForwards(t.Context()); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
		time.Sleep(time.Hour)
		rc.want(t, r, 0, 0)
	})
}

// A store that does not take the event has WeChat push it again. If it has it nevertheless, that is no second event.
func TestForwardIsNotKept(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		rc.answer(nil)
		failed := errors.New("no answer")
		r.store.fail(func(op, name string) error {
			if op == "store" && strings.HasPrefix(name, forwardFolder) {
				_ = r.store.MemStore.Store(context.Background(), name, []byte(`{"v":1}`)) // as it turns out
				return failed
			}
			return nil
		})
		if _, err := r.KeepForward(t.Context(), testForward); !errors.Is(err, ErrStore) {
			t.Errorf("error %v", err)
		}
		r.store.fail(nil)
		time.Sleep(time.Hour)
		rc.want(t, r, 0, 0)
	})
}

// A record that cannot be deleted once the event was handed on is deleted later, and the event is not handed on twice.
func TestForwardIsForgotten(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		rc.answer(nil)
		id := r.keepForward(t)
		r.store.fail(func(op, _ string) error {
			if op == "delete" {
				return errors.New("broken")
			}
			return nil
		})
		if err := r.HandOn(t.Context(), id, func(context.Context) error { return nil }); err != nil {
			t.Error(err)
		}
		rc.want(t, r, 0, 1)
		r.store.fail(nil)
		time.Sleep(time.Hour)
		rc.want(t, r, 0, 0)
	})
}

func TestForwardsAreBounded(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		for range maxForwards {
			r.keepForward(t)
		}
		if _, err := r.KeepForward(t.Context(), testForward); !errors.Is(err, ErrForwardsFull) {
			t.Errorf("error %v", err)
		}
		rc.answer(nil)
		r.restart()
		rc.want(t, r, maxForwards, 0)
		r.keepForward(t)
	})
}

// A configuration without forward leaves alone what is there, and the next one with it takes it up.
func TestForwardsWaitForAConfiguration(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		rc.answer(nil)
		r.keepForward(t)
		with := *r.env
		r.env.Forward = nil
		r.restart()
		time.Sleep(time.Hour)
		rc.want(t, r, 0, 1)
		r.Use(&with)
		rc.want(t, r, 1, 0)
	})
}

// The store is another one from now on: what waits under the old one, and what is under way there and gets to nobody, goes over, and nothing
// stays behind that would be handed on again when the old store comes back.
func TestForwardsAreTakenOver(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		waits, underWay := r.keepForward(t), r.keepForward(t)
		_ = r.HandOn(t.Context(), waits, func(context.Context) error { return ErrNotForwarded })
		done := make(chan error)
		go func() {
			done <- r.HandOn(context.Background(), underWay, func(context.Context) error { time.Sleep(5 * time.Second); return ErrNotForwarded })
		}()
		synctest.Wait()
		next := r.successor(t)
		r.Close()
		next.TakeOver(r.Manager)
		rc.want(t, next, 0, 1)
		<-done
		rc.want(t, next, 0, 2)
		rc.want(t, r, 0, 0)
		rc.answer(nil)
		time.Sleep(time.Hour)
		rc.want(t, next, 2, 0)
	})
}
