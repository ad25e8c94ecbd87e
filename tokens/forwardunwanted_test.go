package tokens

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

const unwantedLine = "events wait to be forwarded, and no wechat_event has forward"

func (r *rig) wantUnwanted(t *testing.T, events, lines int) {
	t.Helper()
	synctest.Wait()
	if n := r.ForwardsUnwanted(); n != events {
		t.Errorf("%d events are known to be unwanted, want %d", n, events)
	}
	if n := r.log.count(unwantedLine); n != lines {
		t.Errorf("the log has %d lines, want %d", n, lines)
	}
}

// Events that wait while the configuration hands on none are told, at the start and after a reload, until one does or they are gone; and the
// store is not listed for that all the time.
func TestForwardsThatNobodyWants(t *testing.T) {
	for name, restart := range map[string]bool{"at the start": true, "after a reload": false} {
		t.Run(name, func(t *testing.T) {
			inForward(t, func(t *testing.T, r *rig, rc *receiver) {
				for range 3 {
					_ = r.HandOn(t.Context(), r.keepForward(t), func(context.Context) error { return ErrNotForwarded })
				}
				time.Sleep(time.Hour)
				_ = r.HandOn(t.Context(), r.keepForward(t), func(context.Context) error { return ErrNotForwarded })
				with := *r.env
				r.env.Forward = nil
				if restart {
					r.restart()
				} else {
					r.Use(r.env)
				}
				r.wantUnwanted(t, 3, 1)
				time.Sleep(takeOverAfter)
				r.wantUnwanted(t, 4, 2)
				var lists atomic.Int64
				r.store.fail(func(op, name string) error {
					if op == "list" && name == forwardFolder {
						lists.Add(1)
					}
					return nil
				})
				time.Sleep(48 * time.Hour)
				r.wantUnwanted(t, 4, 2)
				if n := lists.Load(); n != 0 {
					t.Errorf("they were listed %d times in two days", n)
				}

				names, err := r.store.MemStore.List(t.Context(), forwardFolder)
				if err != nil {
					t.Fatal(err)
				}
				slices.Sort(names) // the oldest is the one that is looked at
				for _, name := range names[:2] {
					if err := r.store.MemStore.Delete(t.Context(), name); err != nil {
						t.Fatal(err)
					}
				}
				time.Sleep(unwantedEvery + time.Minute)
				r.wantUnwanted(t, 2, 2)
				if n := lists.Load(); n != 1 {
					t.Errorf("they were listed %d times", n)
				}
				rc.answer(nil)
				r.Use(&with)
				rc.want(t, r, 2, 0)
				r.wantUnwanted(t, 0, 2)

				rc.answer(ErrNotForwarded)
				_ = r.HandOn(t.Context(), r.keepForward(t), func(context.Context) error { return ErrNotForwarded })
				time.Sleep(takeOverAfter)
				without := *r.env
				without.Forward = nil
				r.Use(&without)
				r.wantUnwanted(t, 1, 3)
			})
		})
	}
}

// One that is under way while a reload takes forward away is told, too; one that is done by then is none.
func TestForwardsUnderWayThatNobodyWants(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, _ *receiver) {
		for _, end := range []error{nil, ErrNotForwarded} {
			id := r.keepForward(t)
			go func() {
				_ = r.HandOn(context.Background(), id, func(context.Context) error { time.Sleep(30 * time.Second); return end })
			}()
		}
		synctest.Wait()
		without := *r.env
		without.Forward = nil
		r.Use(&without)
		r.wantUnwanted(t, 0, 0)
		time.Sleep(5 * time.Minute)
		r.wantUnwanted(t, 1, 1)
	})
}

// A store that cannot be listed at the start can be later. Where nothing waits nothing is told.
func TestForwardsThatNobodyWantsInABrokenStore(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, _ *receiver) {
		r.keepForward(t)
		time.Sleep(takeOverAfter)
		r.env.Forward = nil
		r.store.fail(func(op, name string) error {
			if op == "list" && name == forwardFolder {
				return errors.New("broken")
			}
			return nil
		})
		r.restart()
		time.Sleep(time.Minute)
		r.wantUnwanted(t, 0, 0)
		r.store.fail(nil)
		time.Sleep(2 * time.Minute)
		r.wantUnwanted(t, 1, 1)
	})
}

// What waits under a store that a configuration without forward has replaced stays there, which is told.
func TestForwardsThatNobodyWantsAreLeft(t *testing.T) {
	inForward(t, func(t *testing.T, r *rig, _ *receiver) {
		_ = r.HandOn(t.Context(), r.keepForward(t), func(context.Context) error { return ErrNotForwarded })
		env := *r.env
		r.env.Forward = nil
		next := r.successor(t)
		r.env = &env
		r.Close()
		next.TakeOver(r.Manager)
		if next.log.count("cannot be taken over from the store of before") != 1 {
			t.Errorf("the log does not say that it is left:\n%s", next.log)
		}
	})
}
