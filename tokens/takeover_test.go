package tokens

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// successor is the manager of another store, in use in the place of the rig's, which serves on.
func (r *rig) successor(t *testing.T) (next *rig) {
	t.Helper()
	env, store := *r.env, newFaultStore()
	env.Store = store
	next = &rig{Manager: NewManager(), wx: r.wx, store: store, env: &env, log: r.log}
	t.Cleanup(func() { next.Close() }) // whichever it has then
	next.TakeTickets(r.Manager, next.env)
	next.Use(next.env)
	return next
}

// The store of the configuration is another one from now on. WeChat has had its `success` to tickets and codes: these are not left behind.
func TestTakeOver(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.refuseExchanges()
		if err := r.Accept(t.Context(), r.push(r.newCode(testAuthorizer))); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		r.ticket(t, testPlatform) // the newest
		asked := r.wx.count(pathStartPush)
		next := r.successor(t)
		next.get(t, ComponentKey(testPlatform))
		synctest.Wait()
		if next.Unsaved() != 0 || r.wx.count(pathStartPush) != asked {
			t.Errorf("%d tickets are not written, WeChat was asked %d times to push", next.Unsaved(), r.wx.count(pathStartPush)-asked)
		}
		r.Close()
		next.TakeOver(r.Manager)
		if next.intents(t) != 1 {
			t.Fatal("the duty is left behind")
		}
		next.restart()
		next.wx.set(func(f *fakeWeChat) { f.hook = nil })
		time.Sleep(10 * time.Minute)
		next.get(t, testAuthKey)
		if n := next.intents(t); n != 0 {
			t.Errorf("%d duties are left", n)
		}
		if got, err := next.Ticket(t.Context(), testPlatform); err != nil || got.Value.IsZero() {
			t.Errorf("ticket: %v", err)
		}
	})
}

// A ticket that the store has already and that is newer stands; one of a platform that is not configured any more is not written.
func TestTakeTicketsOfBefore(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		next := r.successor(t)
		time.Sleep(time.Minute)
		next.ticket(t, testPlatform)
		newest, err := next.Ticket(t.Context(), testPlatform)
		if err != nil {
			t.Fatal(err)
		}
		next.Close()
		next.env.Platforms = next.env.Platforms[:1]
		next.Manager = NewManager()
		next.TakeTickets(r.Manager, next.env)
		next.Use(next.env)
		synctest.Wait()
		if got, err := next.Ticket(t.Context(), testPlatform); err != nil || !got.same(newest) || next.Unsaved() != 0 {
			t.Errorf("the ticket of %v, want that of %v: %v; %d are not written", got.CreatedAt, newest.CreatedAt, err, next.Unsaved())
		}
		if err := next.loadRecord(t.Context(), next.env.prepared(), ticketName(testPlatform2), new(ticketWire)); err != nil {
			t.Errorf("what the store had: %v", err) // of the first successor, which had the platform
		}
	})
}

// A store that does not take a duty does not hold the reload up for long, and the store of before keeps it.
func TestTakeOverIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.refuseExchanges()
		const duties = 20
		for range duties {
			if err := r.Accept(t.Context(), r.push(r.newCode(testAuthorizer))); err != nil {
				t.Fatal(err)
			}
		}
		next := r.successor(t)
		synctest.Wait()
		next.store.fail(func(op, _ string) error {
			if op == "store" {
				time.Sleep(storeTimeout)
				return context.DeadlineExceeded
			}
			return nil
		})
		r.Close()
		began := time.Now()
		next.TakeOver(r.Manager)
		if took := time.Since(began); took > takeOverTimeout+storeTimeout {
			t.Errorf("it took %v", took)
		}
		if r.intents(t) != duties || r.log.count("cannot be taken over") != 1 {
			t.Errorf("%d duties are kept, the log:\n%s", r.intents(t), r.log)
		}
	})
}

// An account authorised while the other store was in use. The store that is used again was whole before, and does not know it.
func TestTakeOverKnowsOfAccountsMeanwhile(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		next := r.successor(t)
		next.env.RosterEvery = 0
		next.Use(next.env)
		next.ticket(t, testPlatform)
		time.Sleep(time.Minute)
		if next.rosters.incomplete(testPlatform) {
			t.Fatal("the list was not read")
		}
		r.authorize(t, testPlatform, testAuthorizer)
		if _, err := next.Get(t.Context(), testAuthKey); !errors.Is(err, ErrNotAuthorized) {
			t.Fatalf("before: %v", err)
		}
		r.Close()
		next.TakeOver(r.Manager)
		synctest.Wait()
		next.get(t, testAuthKey)
		lists := next.wx.count(pathAuthorizerList)
		time.Sleep(rosterSettle + rosterHasten + rosterCheck)
		if next.wx.count(pathAuthorizerList) == lists || next.rosters.incomplete(testPlatform) {
			t.Error("the list is not read again")
		}
	})
}
