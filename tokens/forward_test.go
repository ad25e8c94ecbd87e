package tokens

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/crypto"
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
		time.Sleep(DefaultForwardLife - time.Hour)
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
		for range DefaultMaxForwards {
			r.keepForward(t)
		}
		if _, err := r.KeepForward(t.Context(), testForward); !errors.Is(err, ErrForwardsFull) {
			t.Errorf("error %v", err)
		}
		rc.answer(nil)
		r.restart()
		rc.want(t, r, DefaultMaxForwards, 0)
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

// An event that comes late in a run has a time of its own: a backend that has begun with it is not left.
func TestForwardHasItsTime(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		r.env.Forward = func(ctx context.Context, f Forward) error {
			select {
			case <-time.After(25 * time.Second):
				return rc.forward(ctx, f)
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		rc.answer(nil)
		r.keepForward(t)
		r.keepForward(t)
		r.restart()
		time.Sleep(10 * time.Minute)
		rc.want(t, r, 2, 0)
	})
}

// Whoever is to hand on an event may have a bug: that costs one event, and says so.
func TestForwardPanics(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		r.env.Forward = func(ctx context.Context, f Forward) error {
			if f.AppID == testAuthorizer {
				panic("a bug")
			}
			return rc.forward(ctx, f)
		}
		rc.answer(nil)
		r.keepForward(t)
		other := testForward
		other.AppID = testAccount
		if _, err := r.KeepForward(t.Context(), other); err != nil {
			t.Fatal(err)
		}
		r.restart()
		time.Sleep(time.Hour)
		rc.want(t, r, 1, 0)
		if r.log.count("an event could not be forwarded; it") != 1 {
			t.Error("the log does not say that it is lost")
		}
	})
}

// An event that is older than is promised gets to nobody, wherever it was meanwhile: in a configuration that forwards none, or in an archive.
func TestForwardIsTooOld(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		rc.answer(nil)
		r.keepForward(t)
		with := *r.env
		r.env.Forward = nil
		r.restart()
		time.Sleep(DefaultForwardLife + time.Second)
		r.Use(&with)
		rc.want(t, r, 0, 0)
		if r.log.count("an event could not be forwarded; it") != 1 {
			t.Error("the log does not say that it is lost")
		}
	})
}

// A backend that is down costs a bounded number of attempts, however many events wait for it, and gets all of them soon once it is up.
func TestForwardsCost(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		const events = 20 * forwardTries
		for range events {
			r.keepForward(t)
		}
		r.restart()
		synctest.Wait()
		if n := r.ForwardsWaiting(); n != events { // also those that were not tried yet
			t.Errorf("%d events are known to wait", n)
		}
		time.Sleep(time.Hour)
		rc.want(t, r, 0, events)
		if rc.runs < events || rc.runs > 80*forwardTries {
			t.Errorf("%d attempts in an hour", rc.runs)
		}
		rc.answer(nil)
		time.Sleep(backoffMost)
		rc.want(t, r, events, 0)
		if n := r.ForwardsWaiting(); n != 0 {
			t.Errorf("%d events are known to wait", n)
		}
	})
}

// Events that are sealed with a key that is missing wait for it, and the log does not hear of each of them each time.
func TestForwardsAreSealed(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		rc.answer(nil)
		var err error
		with, without := *r.env, *r.env
		if with.Sealer, err = crypto.NewSealer(bytes.Repeat([]byte{7}, 32)); err != nil {
			t.Fatal(err)
		}
		if without.Sealer, err = crypto.NewSealer(bytes.Repeat([]byte{9}, 32)); err != nil {
			t.Fatal(err)
		}
		r.Use(&with)
		for range 3 {
			r.keepForward(t)
		}
		for name, data := range r.store.MemStore.records {
			if strings.HasPrefix(name, forwardFolder) && strings.Contains(string(data), testAuthorizer) {
				t.Errorf("stored unsealed: %s", data)
			}
		}
		r.env = &without
		r.restart()
		for range 5 {
			time.Sleep(time.Minute)
			r.queue.add("forwards", 0, r.resumeForwards)
			synctest.Wait()
		}
		rc.want(t, r, 0, 3)
		if n := r.log.count("cannot be read and is left alone"); n != 1 {
			t.Errorf("the log has %d lines", n)
		}
		r.Use(&with)
		rc.want(t, r, 3, 0)
	})
}

// A process that ends does not go on through all that waits.
func TestForwardsEnd(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		rc.answer(nil)
		r.env.Forward = func(ctx context.Context, f Forward) error { time.Sleep(time.Second); return rc.forward(ctx, f) }
		for range 40 {
			r.keepForward(t)
		}
		r.restart()
		synctest.Wait()
		began := time.Now()
		r.Close()
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("it ended after %v", took)
		}
		rc.want(t, r, 1, 39)
	})
}

// An event that the store has taken although it said otherwise is gone before another node, which has heard of it, looks for it.
func TestForwardIsNotLeftToOthers(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		rc.answer(nil)
		r.store.fail(func(op, name string) error {
			if op == "store" && strings.HasPrefix(name, forwardFolder) {
				_ = r.store.MemStore.Store(context.Background(), name, []byte(`{"v":1}`))
				return errors.New("no answer")
			}
			return nil
		})
		if _, err := r.KeepForward(t.Context(), testForward); !errors.Is(err, ErrStore) {
			t.Errorf("error %v", err)
		}
		r.store.fail(nil)
		time.Sleep(takeOverAfter - time.Second)
		rc.want(t, r, 0, 0)
	})
}

// What found no place before the store was changed, and says so after it, goes over, and so does what is under way when the store is changed
// twice.
func TestForwardsAreTakenOverLater(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		rc.answer(nil)
		later, underWay := r.keepForward(t), r.keepForward(t)
		done := make(chan error)
		go func() {
			done <- r.HandOn(context.Background(), underWay, func(context.Context) error { time.Sleep(5 * time.Second); return ErrNotForwarded })
		}()
		synctest.Wait()
		next := r.successor(t)
		r.Close()
		next.TakeOver(r.Manager)
		r.HandOnLater(later)
		rc.want(t, next, 1, 0)
		last := next.successor(t)
		next.Close()
		last.TakeOver(next.Manager)
		if err := <-done; !errors.Is(err, ErrNotForwarded) {
			t.Error(err)
		}
		rc.want(t, last, 2, 0)
		rc.want(t, next, 2, 0)
		rc.want(t, r, 2, 0)
	})
}

// What cannot be taken over in the time that a reload has is told.
func TestForwardsAreLeft(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		const events = 20
		for range events {
			r.HandOnLater(r.keepForward(t))
		}
		next := r.successor(t)
		r.Close()
		r.store.fail(func(op, name string) error {
			if op == "load" && strings.HasPrefix(name, forwardFolder) {
				time.Sleep(time.Second)
			}
			return nil
		})
		next.TakeOver(r.Manager)
		synctest.Wait()
		if got, left := next.kept(t), r.kept(t); got == 0 || left == 0 || got+left != events {
			t.Errorf("%d are taken over, %d are left", got, left)
		}
		if text := next.log.String(); next.log.count("cannot be taken over from the store of before") != 1 || !strings.Contains(text, fmt.Sprintf("events=%d error=\"", r.kept(t))) {
			t.Errorf("the log does not say how many are left:\n%s", text)
		}
	})
}

// Of a store that does not say what it has, those are told that this node knew of; and of none there is nothing to count.
func TestForwardsThatAreNotListedAreLeft(t *testing.T) {
	for _, known := range []int{0, 2} {
		t.Run(fmt.Sprint(known, " known"), func(t *testing.T) {
			inForward(t, func(t *testing.T, r *rig, _ *receiver) {
				for range known {
					r.HandOnLater(r.keepForward(t))
				}
				next := r.successor(t)
				counted := &forwardObserver{}
				env := *next.env
				env.Observer = counted
				next.Use(&env)
				r.Close()
				r.store.fail(func(op, name string) error {
					if op == "list" && strings.HasPrefix(name, forwardFolder) {
						return errors.New("broken")
					}
					return nil
				})
				next.TakeOver(r.Manager)
				synctest.Wait()
				if known == 0 && len(counted.ends) != 0 || known > 0 && !slices.Equal(counted.ends, []int{known}) {
					t.Errorf("counted: %v", counted.ends)
				}
				if text := next.log.String(); next.log.count("does not list the events") != 1 || !strings.Contains(text, fmt.Sprintf("known_events=%d ", known)) || strings.Contains(text, " events=") {
					t.Errorf("the log:\n%s", text)
				}
			})
		})
	}
}

// forwardObserver notes how many events end at a time.
type forwardObserver struct {
	noObserver
	ends []int
}

func (o *forwardObserver) ForwardEnded(_ ForwardEnd, events int) { o.ends = append(o.ends, events) }

// undeleted is of how many events something is still to be deleted.
func (r *rig) undeleted() int {
	synctest.Wait()
	r.forwards.mu.Lock()
	defer r.forwards.mu.Unlock()
	return len(r.forwards.forgetting)
}

func (rc *receiver) attempts() int {
	synctest.Wait()
	rc.mu.Lock()
	defer rc.mu.Unlock()
	return rc.runs
}

// failForwards has the store fail to write events, which it takes all the same if taken.
func (r *rig) failForwards(taken bool) {
	r.store.fail(func(op, name string) error {
		if op != "store" || !strings.HasPrefix(name, forwardFolder) {
			return nil
		}
		if taken {
			_ = r.store.MemStore.Store(context.Background(), name, []byte(`{"v":1}`))
		}
		return errors.New("no answer")
	})
}

// Events that the store has not taken are WeChat's to push again: they are no backlog, for which others would be given up. Nor do they pile
// up without bound while the store does not delete what it may have of them either.
func TestForwardsNotKeptAreNoBacklog(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		rc.answer(nil)
		r.failForwards(false)
		for range DefaultMaxForwards + 10 {
			if _, err := r.KeepForward(t.Context(), testForward); !errors.Is(err, ErrStore) || errors.Is(err, ErrForwardsFull) {
				t.Fatalf("error %v", err)
			}
		}
		if n := r.undeleted(); n > DefaultMaxForwards {
			t.Errorf("%d are to be deleted", n)
		}
		if n := r.ForwardsWaiting(); n != 0 {
			t.Errorf("%d events are known to wait", n)
		}
		r.store.fail(nil)
		time.Sleep(forgetAfter + time.Second)
		if n := r.undeleted(); n != 0 {
			t.Errorf("%d are still to be deleted", n)
		}
		if err := r.HandOn(t.Context(), r.keepForward(t), func(context.Context) error { return nil }); err != nil {
			t.Error(err)
		}
		rc.want(t, r, 0, 0)
	})
}

// Half as many as may wait are not taken by the store: that leaves all places to those that are.
func TestForwardsNotKeptTakeNoPlace(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, _ *receiver) {
		r.failForwards(false)
		for range DefaultMaxForwards / 2 {
			_, _ = r.KeepForward(t.Context(), testForward)
		}
		r.store.fail(nil)
		for range DefaultMaxForwards {
			r.keepForward(t)
		}
		if _, err := r.KeepForward(t.Context(), testForward); !errors.Is(err, ErrForwardsFull) {
			t.Errorf("error %v", err)
		}
	})
}

// The store is changed, once or twice, before what it has of an event is deleted: one that it took although it said otherwise, or one that was
// handed on and could not be deleted. Neither is left there, nor handed on by the next.
func TestForwardsAreForgottenAfterTheStoreChanged(t *testing.T) {
	for name, refused := range map[string]bool{"not taken": true, "handed on": false} {
		for changes := 1; changes <= 2; changes++ {
			t.Run(fmt.Sprint(name, changes), func(t *testing.T) {
				inForward(t, func(t *testing.T, r *rig, rc *receiver) {
					rc.answer(nil)
					if refused {
						r.failForwards(true)
						if _, err := r.KeepForward(t.Context(), testForward); !errors.Is(err, ErrStore) {
							t.Errorf("error %v", err)
						}
					} else {
						id := r.keepForward(t)
						r.store.fail(func(op, _ string) error {
							if op == "delete" {
								return errors.New("broken")
							}
							return nil
						})
						_ = r.HandOn(t.Context(), id, func(context.Context) error { return nil })
					}
					next := r.successor(t)
					r.Close()
					next.TakeOver(r.Manager)
					r.store.fail(nil)
					rc.want(t, r, 0, 1)
					if changes == 2 {
						last := next.successor(t)
						next.Close()
						last.TakeOver(next.Manager)
						next = last
					}
					time.Sleep(takeOverAfter + time.Minute)
					rc.want(t, next, 0, 0)
					rc.want(t, r, 0, 0)
				})
			})
		}
	}
}

// An event that was taken over, and that the store of before does not delete, is handed on once.
func TestTakenForwardThatStaysBehind(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		_ = r.HandOn(t.Context(), r.keepForward(t), func(context.Context) error { return ErrNotForwarded })
		next := r.successor(t)
		rc.answer(nil)
		deletes := 0
		r.store.fail(func(op, name string) error {
			if op == "delete" && path.Dir(name) == forwardFolder {
				if deletes++; deletes <= 2 {
					return errDisk
				}
			}
			return nil
		})
		r.Close()
		next.TakeOver(r.Manager)
		time.Sleep(time.Minute)
		rc.want(t, next, 1, 0)
		if deletes == 0 {
			t.Error("nothing was to be deleted")
		}
	})
}

// Of the store of before nothing is deleted any more once it may be gone.
func TestForwardsAreForgottenForAWhile(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, _ *receiver) {
		r.failForwards(true)
		_, _ = r.KeepForward(t.Context(), testForward)
		next := r.successor(t)
		r.Close()
		r.store.fail(func(string, string) error { return errors.New("closed") })
		next.TakeOver(r.Manager)
		time.Sleep(takeOverAfter + 5*time.Minute)
		if n := next.undeleted(); n != 0 {
			t.Errorf("%d are still tried", n)
		}
	})
}

// What found no place goes over to whoever has the store now, also if that was changed twice meanwhile.
func TestForwardLaterGoesToTheLast(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		rc.answer(nil)
		later := r.keepForward(t)
		next := r.successor(t)
		r.Close()
		next.TakeOver(r.Manager)
		last := next.successor(t)
		next.Close()
		last.TakeOver(next.Manager)
		r.HandOnLater(later)
		rc.want(t, last, 1, 0)
		rc.want(t, r, 1, 0)
	})
}

// What nobody is reached with, and cannot go over to the store of now, is told.
func TestForwardUnderWayIsLeft(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		id := r.keepForward(t)
		next := r.successor(t)
		done := make(chan error)
		go func() {
			done <- r.HandOn(context.Background(), id, func(context.Context) error { time.Sleep(5 * time.Second); return ErrNotForwarded })
		}()
		synctest.Wait()
		r.Close()
		next.TakeOver(r.Manager)
		next.failForwards(false)
		if err := <-done; !errors.Is(err, ErrNotForwarded) {
			t.Error(err)
		}
		if next.log.count("cannot be taken over from the store of before") != 1 {
			t.Errorf("the log does not say that it is left:\n%s", next.log)
		}
		rc.want(t, r, 0, 1)
	})
}

// An event that somebody may have is tried again until an answer comes, ever more rarely, and not after a week. All nodes, and the next
// process, leave it alone meanwhile.
func TestForwardIsUnanswered(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		hang := func(context.Context) error { time.Sleep(30 * time.Second); return ErrUnanswered }
		id := r.keepForward(t)
		if err := r.HandOn(t.Context(), id, hang); !errors.Is(err, ErrNotForwarded) {
			t.Errorf("error %v", err)
		}
		rc.answer(ErrUnanswered)
		other := *r
		other.Manager = NewManager()
		t.Cleanup(other.Close)
		other.Use(other.env)
		r.restart()
		time.Sleep(25 * time.Second)
		if rc.attempts() != 0 || r.ForwardsWaiting() != 1 || other.ForwardsWaiting() != 1 {
			t.Errorf("it was tried %d times within 55 s; %d and %d are known to wait", rc.attempts(), r.ForwardsWaiting(), other.ForwardsWaiting())
		}
		time.Sleep(time.Hour)
		if rc.attempts() < 4 || rc.attempts() > 8 {
			t.Errorf("tried %d times in an hour, by two nodes", rc.attempts())
		}
		time.Sleep(DefaultForwardLife - 2*time.Hour)
		if rc.attempts() < 8 || rc.attempts() > 16 {
			t.Errorf("tried %d times in a week", rc.attempts())
		}
		if r.log.count("an event could not be forwarded; it") != 0 {
			t.Error("given up too early")
		}
		time.Sleep(2 * time.Hour)
		rc.want(t, r, 0, 0)
		if r.log.count("an event could not be forwarded; it") != 1 {
			t.Error("the log does not say that it is lost")
		}

		rc.answer(nil)
		_ = r.HandOn(t.Context(), r.keepForward(t), hang)
		time.Sleep(3 * time.Minute)
		rc.want(t, r, 1, 0)
	})
}

// A backend that hangs does not keep others' events, which nobody was reached with, from being tried.
func TestForwardsThatRestAreNoFailures(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		for range 3 * forwardTries {
			_ = r.HandOn(t.Context(), r.keepForward(t), func(context.Context) error { return ErrUnanswered })
		}
		rc.answer(nil)
		time.Sleep(time.Millisecond)
		r.keepForward(t)
		r.restart() // as of which it has to read that they rest
		rc.want(t, r, 1, 3*forwardTries)
		time.Sleep(2 * time.Minute)
		rc.want(t, r, 1+3*forwardTries, 0)
	})
}

// The environment has other limits.
func TestForwardLimits(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		r.env.MaxForwards, r.env.ForwardLife = 2, time.Hour
		r.Use(r.env)
		for range 2 {
			_ = r.HandOn(t.Context(), r.keepForward(t), func(context.Context) error { return ErrNotForwarded })
		}
		if _, err := r.KeepForward(t.Context(), testForward); !errors.Is(err, ErrForwardsFull) {
			t.Errorf("error %v", err)
		}
		time.Sleep(time.Hour - time.Minute)
		rc.want(t, r, 0, 2)
		time.Sleep(3 * time.Minute)
		rc.want(t, r, 0, 0)
		if r.log.count("an event could not be forwarded; it") != 2 {
			t.Error("the log does not say that they are lost")
		}
	})
}

// An event that is just tried again waits all the same: with a backend that takes its time to refuse, an alert would end with each attempt. One
// that is with a backend for the first time does not wait yet.
func TestForwardsWaitWhileTheyAreTried(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, _ *receiver) {
		r.env.Forward = func(context.Context, Forward) error { time.Sleep(5 * time.Second); return ErrNotForwarded }
		r.Use(r.env)
		id := r.keepForward(t)
		if n := r.ForwardsWaiting(); n != 0 {
			t.Errorf("%d are known to wait, and one is about to be handed on", n)
		}
		_ = r.HandOn(t.Context(), id, func(context.Context) error { return ErrNotForwarded })
		for at := range 10 * 60 {
			synctest.Wait()
			if n := r.ForwardsWaiting(); n != 1 {
				t.Fatalf("after %d s %d are known to wait", at, n)
			}
			time.Sleep(time.Second)
		}
	})
}

// A store that failed a few times has room for what it takes now, also where few may wait.
func TestForwardsNotKeptLeaveRoom(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, _ *receiver) {
		r.env.MaxForwards = 2
		r.Use(r.env)
		r.failForwards(false)
		for range 3 {
			if _, err := r.KeepForward(t.Context(), testForward); !errors.Is(err, ErrStore) {
				t.Errorf("error %v", err)
			}
		}
		r.store.fail(nil)
		r.keepForward(t)
	})
}

// A reload shortens for how long events are tried: one that rests, as this node or another has noted, rests no longer than that.
func TestForwardsRestNoLongerThanTheyLive(t *testing.T) {
	for name, another := range map[string]bool{"here": false, "by another process": true} {
		t.Run(name, func(t *testing.T) {
			inForward(t, func(t *testing.T, r *rig, rc *receiver) {
				id := r.keepForward(t)
				time.Sleep(24 * time.Hour)
				_ = r.HandOn(t.Context(), id, func(context.Context) error { return ErrUnanswered })
				with := *r.env
				with.ForwardLife = 25 * time.Hour
				if r.env = &with; another {
					r.restart()
				} else {
					r.Use(r.env)
				}
				time.Sleep(time.Hour - time.Second)
				rc.want(t, r, 0, 1)
				time.Sleep(2 * time.Minute)
				rc.want(t, r, 0, 0)
				if rc.runs != 0 || r.log.count("an event could not be forwarded; it") != 1 {
					t.Errorf("%d attempts, and the log does not say that it is lost", rc.runs)
				}
			})
		})
	}
}

// Each event that is to be handed on is counted once, by what has become of it in the end.
func TestForwardEndsAreCounted(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		o := &observed{refreshes: make(map[Kind]int), failures: make(map[Kind]int), ops: make(map[string]int)}
		r.env.Observer, r.env.MaxForwards = o, 3
		r.Use(r.env)
		want := func(what string, ends map[ForwardEnd]int) {
			t.Helper()
			synctest.Wait()
			o.mu.Lock()
			defer o.mu.Unlock()
			if !maps.Equal(o.forwards, ends) {
				t.Errorf("%s: counted %v, want %v", what, o.forwards, ends)
			}
			o.forwards = nil
		}
		hand := func(err error) {
			_ = r.HandOn(t.Context(), r.keepForward(t), func(context.Context) error { return err })
		}
		r.failForwards(false)
		_, _ = r.KeepForward(t.Context(), testForward)
		r.store.fail(nil)
		hand(ErrNotForwarded)
		hand(ErrUnanswered)
		time.Sleep(time.Hour)
		want("they wait, or WeChat pushes it again", nil)
		rc.answer(nil)
		time.Sleep(2 * time.Hour)
		want("answered at a later attempt", map[ForwardEnd]int{ForwardAnswered: 2})
		hand(nil)
		hand(errors.New("status 500"))
		want("answered at once", map[ForwardEnd]int{ForwardAnswered: 1, ForwardFailed: 1})

		rc.answer(ErrNotForwarded)
		for range 3 {
			hand(ErrNotForwarded)
		}
		_, _ = r.KeepForward(t.Context(), testForward)
		want("too many", map[ForwardEnd]int{ForwardFull: 1})
		for name := range r.store.MemStore.records {
			if strings.HasPrefix(name, forwardFolder) {
				if err := r.store.MemStore.Store(t.Context(), name, []byte("{")); err != nil {
					t.Fatal(err)
				}
				break
			}
		}
		r.store.fail(func(op, name string) error {
			if op == "store" && strings.HasPrefix(name, path.Join(root, "aside")) {
				return errors.New("full")
			}
			return nil
		})
		time.Sleep(time.Hour)
		want("damaged, and it cannot be set aside", nil)
		r.store.fail(nil)
		time.Sleep(time.Hour)
		want("damaged", map[ForwardEnd]int{ForwardUnfit: 1})
		time.Sleep(DefaultForwardLife)
		want("too old", map[ForwardEnd]int{ForwardGivenUp: 2})

		hand(ErrNotForwarded)
		next := r.successor(t)
		r.Close()
		r.store.fail(func(op, name string) error {
			if op == "load" && strings.HasPrefix(name, forwardFolder) {
				return errors.New("broken")
			}
			return nil
		})
		next.TakeOver(r.Manager)
		want("left in the store of before", map[ForwardEnd]int{ForwardLeft: 1})
	})
}

// A node whose clock is ahead by longer than events live does not give up those of others: it learns WeChat's clock, and tries them as any
// other does. Once they are too old by that they are given up; and by its own clock if WeChat's stays unknown.
func TestForwardsOfAClockThatIsAhead(t *testing.T) {
	for name, learns := range map[string]bool{"and WeChat's is known soon": true, "and WeChat's stays unknown": false} {
		t.Run(name, func(t *testing.T) {
			inForward(t, func(t *testing.T, r *rig, rc *receiver) {
				var known atomic.Bool
				const ahead = DefaultForwardLife + time.Hour
				of := testForward
				of.Created = time.Now() // by WeChat's clock, and by that of the node that keeps it
				if _, err := r.KeepForward(t.Context(), of); err != nil {
					t.Fatal(err)
				}
				time.Sleep(ahead) // as the clock here has it, which is set
				r.env.WeChatAhead = func() (time.Duration, bool) { return -ahead, known.Load() }
				r.restart()
				time.Sleep(clockAwaited - 2*time.Minute)
				rc.want(t, r, 0, 1)
				if rc.attempts() != 0 {
					t.Error("tried before it was known whether it is too old")
				}
				if !learns {
					time.Sleep(5 * time.Minute)
					rc.want(t, r, 0, 0)
					return
				}
				known.Store(true)
				time.Sleep(time.Hour)
				rc.want(t, r, 0, 1)
				if rc.attempts() < 10 {
					t.Errorf("tried %d times", rc.attempts())
				}
				rc.answer(ErrUnanswered)
				time.Sleep(24 * time.Hour)
				tried := rc.attempts()
				time.Sleep(5 * 24 * time.Hour)
				if n := rc.attempts() - tried; n > 4 {
					t.Errorf("tried %d times in five days, with no answer", n)
				}
				rc.want(t, r, 0, 1)
				time.Sleep(24 * time.Hour)
				rc.want(t, r, 0, 0)
				if r.log.count("an event could not be forwarded; it") != 1 {
					t.Error("the log does not say that it is lost")
				}
			})
		})
	}
}

// WeChat's clock is awaited anew each time that it is not known: that it was awaited once, days ago, is no reason to give up.
func TestForwardsAwaitTheClockAnew(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		var known atomic.Bool
		const ahead = DefaultForwardLife + time.Hour
		r.env.WeChatAhead = func() (time.Duration, bool) { return -ahead, known.Load() }
		of := testForward
		of.Created = time.Now()
		if _, err := r.KeepForward(t.Context(), of); err != nil {
			t.Fatal(err)
		}
		time.Sleep(ahead)
		r.restart()
		time.Sleep(time.Minute)
		known.Store(true)
		time.Sleep(time.Hour)
		rc.want(t, r, 0, 1)
		known.Store(false)
		time.Sleep(5 * time.Minute)
		rc.want(t, r, 0, 1)
	})
}

// A node whose clock is ahead has an event rest until a time that others do not reach for a week: they do not wait for that.
func TestForwardThatRestsByAClockThatIsAhead(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		id := r.keepForward(t)
		var wire forwardWire
		env := r.env.prepared()
		if err := r.loadRecord(t.Context(), env, forwardName(id), &wire); err != nil {
			t.Fatal(err)
		}
		wire.NotBefore = time.Now().Add(5 * 24 * time.Hour).UnixMilli()
		if err := r.storeRecord(t.Context(), env, forwardName(id), wire); err != nil {
			t.Fatal(err)
		}
		rc.answer(nil)
		r.restart()
		time.Sleep(5 * time.Minute)
		rc.want(t, r, 1, 0)
	})
}

// An event keeps when it was made, and one whose CreateTime makes no sense lives as long as others.
func TestForwardKeepsItsTime(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		r.env.WeChatAhead = func() (time.Duration, bool) { return 0, true }
		r.Use(r.env)
		f := testForward
		f.Created = time.Unix(1413192605, 0)
		id, err := r.KeepForward(t.Context(), f)
		if err != nil {
			t.Fatal(err)
		}
		r.HandOnLater(id)
		time.Sleep(24 * time.Hour)
		rc.want(t, r, 0, 1)
		rc.answer(nil)
		time.Sleep(2 * time.Minute)
		rc.want(t, r, 1, 0)
		if !rc.got[0].Created.Equal(f.Created) {
			t.Errorf("made at %v", rc.got[0].Created)
		}
	})
}
