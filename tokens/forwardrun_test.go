package tokens

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// keepForwards keeps events of each appid in turn.
func (r *rig) keepForwards(t *testing.T, events int, appids ...string) {
	t.Helper()
	for i := range events {
		f := testForward
		f.AppID = appids[i%len(appids)]
		if _, err := r.KeepForward(t.Context(), f); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
	}
}

// fakeBackends is a backend for each appid. They are busy with at most places of them at once; 0: with any number.
type fakeBackends struct {
	took   map[string]time.Duration
	err    map[string]error
	places int64

	underWay, most, attempts atomic.Int64
	rc                       *receiver
}

func (b *fakeBackends) forward(ctx context.Context, f Forward) error {
	b.attempts.Add(1)
	n := b.underWay.Add(1)
	defer b.underWay.Add(-1)
	if b.places > 0 && n > b.places {
		return ErrNoPlace
	}
	for most := b.most.Load(); n > most && !b.most.CompareAndSwap(most, n); most = b.most.Load() {
	}
	time.Sleep(b.took[f.AppID])
	if err := b.err[f.AppID]; err != nil {
		return err
	}
	return b.rc.forward(ctx, f)
}

// until returns how long it takes until so many events have got to somebody.
func (rc *receiver) until(got int, limit time.Duration) time.Duration {
	began := time.Now()
	for time.Since(began) < limit {
		rc.mu.Lock()
		n := len(rc.got)
		rc.mu.Unlock()
		if n >= got {
			break
		}
		time.Sleep(time.Second)
	}
	return time.Since(began)
}

// However many reasons there are to hand on events, backends that hang have one worker of the queue, and other work has the others.
func TestForwardsLeaveTheOtherWorkersAlone(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		b := &fakeBackends{rc: rc, took: map[string]time.Duration{"hangs": time.Minute}}
		var back atomic.Bool
		r.env.Forward = func(ctx context.Context, f Forward) error {
			if back.Load() {
				return rc.forward(ctx, f)
			}
			return b.forward(ctx, f)
		}
		r.keepForwards(t, 300, "hangs")
		r.restart()
		id := r.keepForward(t)
		r.HandOnLater(id)                                 // another node is about to
		(&hearing{m: r.Manager}).Changed(forwardName(id)) // and another has kept one
		time.Sleep(takeOverAfter)
		for round := range 5 {
			time.Sleep(time.Minute)
			var began atomic.Int64
			for i := range queueWorkers - 1 {
				r.queue.add(fmt.Sprint("other work ", i), 0, func(context.Context) error {
					began.Add(1)
					time.Sleep(30 * time.Second)
					return nil
				})
			}
			synctest.Wait()
			if n := began.Load(); n != queueWorkers-1 || b.underWay.Load() == 0 {
				t.Errorf("round %d: %d of %d other jobs begin while %d events are at a backend that hangs", round, n, queueWorkers-1, b.underWay.Load())
			}
		}
		if n := b.most.Load(); n > forwardsBeside {
			t.Errorf("%d events were under way at once, want at most %d", n, forwardsBeside)
		}
		// All are handed on once somebody answers: those that waited for a turn have had it.
		back.Store(true)
		rc.answer(nil)
		time.Sleep(time.Hour)
		rc.want(t, r, 301, 0)
	})
}

// Nor are all workers kept busy by a store that does not delete what was handed on.
func TestDeletionsOfForwardsLeaveTheOtherWorkersAlone(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, _ *receiver) {
		release := make(chan struct{})
		r.store.hold(func(op, name string) {
			if op == "delete" && strings.HasPrefix(name, forwardFolder) {
				<-release
			}
		})
		for range 3 * queueWorkers {
			r.forgetLater(r.keepForward(t), 0, r.deleteForward(r.Manager.env.Load(), "00"))
		}
		synctest.Wait()
		var began atomic.Bool
		r.queue.add("other work", 0, func(context.Context) error { began.Store(true); return nil })
		synctest.Wait()
		if !began.Load() {
			t.Error("other work waits for the deletions")
		}
		close(release)
		synctest.Wait()
		if n := len(r.forwards.forgetting); n != 0 {
			t.Errorf("%d deletions are left", n)
		}
	})
}

// Nor by events of before a change of store, whose store does not answer.
func TestEventsOfBeforeLeaveTheOtherWorkersAlone(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		rc.answer(nil)
		ids := make([]string, 2*queueWorkers)
		for i := range ids {
			ids[i] = r.keepForward(t)
		}
		next := r.successor(t)
		r.Close()
		next.TakeOver(r.Manager)
		synctest.Wait()
		release := make(chan struct{})
		r.store.hold(func(op, name string) {
			if op == "load" && strings.HasPrefix(name, forwardFolder) {
				<-release
			}
		})
		for _, id := range ids {
			r.HandOnLater(id)
		}
		synctest.Wait()
		var began atomic.Bool
		next.queue.add("other work", 0, func(context.Context) error { began.Store(true); return nil })
		synctest.Wait()
		if !began.Load() {
			t.Error("other work waits for the events")
		}
		close(release)
		rc.want(t, next, len(ids), 0)
	})
}

// Events go out one after another, in the order in which they came, while answers come.
func TestForwardsGoOutInOrder(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		rc.answer(nil)
		b := &fakeBackends{rc: rc, took: map[string]time.Duration{"a": 100 * time.Millisecond, "b": 200 * time.Millisecond}}
		r.env.Forward = b.forward
		r.keepForwards(t, 200, "a", "b")
		r.restart()
		if took := rc.until(200, time.Hour); took > 40*time.Second {
			t.Errorf("200 events took %v", took)
		}
		for i, f := range rc.got {
			if f.AppID != []string{"a", "b"}[i%2] {
				t.Fatalf("event %d is out of order", i)
			}
		}
		if b.most.Load() != 1 {
			t.Errorf("%d were under way at once", b.most.Load())
		}
	})
}

// A backend that takes its time has all events soon after it is back, and no more of them at once than a run hands on.
func TestForwardsToASlowBackend(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		rc.answer(nil)
		b := &fakeBackends{rc: rc, took: map[string]time.Duration{"a": 5 * time.Second}}
		r.env.Forward = b.forward
		r.keepForwards(t, 200, "a")
		r.restart()
		if took := rc.until(200, time.Hour); took > 5*time.Minute {
			t.Errorf("200 events took %v", took)
		}
		if b.most.Load() > forwardsBeside || b.attempts.Load() != 200 {
			t.Errorf("%d were under way at once, in %d attempts", b.most.Load(), b.attempts.Load())
		}
	})
}

// A backend that hangs does not hold up the events of others, and neither gets more of them at once than a run hands on.
func TestForwardsOfABackendThatHangs(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		rc.answer(nil)
		b := &fakeBackends{
			rc:   rc,
			took: map[string]time.Duration{"hangs": 30 * time.Second, "answers": 10 * time.Millisecond},
			err:  map[string]error{"hangs": ErrUnanswered},
		}
		r.env.Forward = b.forward
		r.keepForwards(t, 200, "hangs", "answers")
		r.restart()
		if took := rc.until(100, 12*time.Hour); took > 3*time.Minute {
			t.Errorf("100 events of the one that answers took %v", took)
		}
		if b.most.Load() > forwardsBeside {
			t.Errorf("%d were under way at once", b.most.Load())
		}
		rc.want(t, r, 100, 100)
	})
}

// Where the site has one place and others find none they wait for it: nothing fails, and few attempts are in vain.
func TestForwardsWaitForAPlace(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		rc.answer(nil)
		const events = 60
		b := &fakeBackends{rc: rc, places: 1, took: map[string]time.Duration{"a": 3 * time.Second}}
		r.env.Forward = b.forward
		r.keepForwards(t, events, "a")
		r.restart()
		if took := rc.until(events, time.Hour); took > events*3*time.Second+time.Minute {
			t.Errorf("%d events took %v", events, took)
		}
		if n := b.attempts.Load(); b.most.Load() != 1 || n > 4*events {
			t.Errorf("%d were under way at once, in %d attempts", b.most.Load(), n)
		}
	})
}

// Events of a backend that has no place do not hold up those of others.
func TestForwardsWithoutAPlaceGiveWay(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		rc.answer(nil)
		b := &fakeBackends{rc: rc, err: map[string]error{"full": ErrNoPlace}}
		r.env.Forward = b.forward
		r.keepForwards(t, 200, slices.Repeat([]string{"full"}, 100)...)
		r.keepForwards(t, 1, "answers")
		r.restart()
		if took := rc.until(1, time.Hour); took > 5*time.Minute {
			t.Errorf("it took %v", took)
		}
		if n := b.attempts.Load(); n > 1000 {
			t.Errorf("%d attempts", n)
		}
	})
}

// After a reload events are handed on by the new configuration, also those of a run that is under way.
func TestForwardsOfARunAfterAReload(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		rc.answer(nil)
		before := errors.New("by the configuration of before")
		b := &fakeBackends{rc: rc, took: map[string]time.Duration{"a": 5 * time.Second}, err: map[string]error{"a": before}}
		r.env.Forward = b.forward
		r.keepForwards(t, 100, "a")
		r.restart()
		time.Sleep(time.Second / 2)
		with := *r.env
		with.Forward = rc.forward
		r.Use(&with)
		time.Sleep(30 * time.Second)
		rc.want(t, r, 99, 0)
	})
}

// A bug on the way costs neither the run nor the process, nor an event.
func TestForwardsRunSurvivesAPanic(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, rc *receiver) {
		rc.answer(nil)
		r.keepForwards(t, 3, "a")
		var broken atomic.Bool
		broken.Store(true)
		r.store.fail(func(op, name string) error {
			if op == "load" && strings.HasPrefix(name, forwardFolder) && broken.Swap(false) {
				panic("a bug")
			}
			return nil
		})
		r.restart()
		time.Sleep(time.Minute)
		rc.want(t, r, 3, 0)
	})
}
