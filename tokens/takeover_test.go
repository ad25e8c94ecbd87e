package tokens

import (
	"context"
	"errors"
	"strings"
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
		r := startedWithOpenCode(t)
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

// The configuration with the other store may yet be refused: until it is known to stay, or has had time enough, its manager asks WeChat for
// nothing by itself, and for what somebody wants at once.
func TestTakeOverWaitsForTheConfiguration(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct{ settles, begins time.Duration }{
		"it stays": {300 * time.Millisecond, 300 * time.Millisecond}, "nobody knows": {time.Hour, settleLimit},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				r.authorize(t, testPlatform, testAuthorizer)
				env := *r.env
				env.Store, env.RosterEvery = newFaultStore(), rosterEvery
				began := time.Now()
				env.Settled = func() bool { return time.Since(began) >= tt.settles }
				next := &rig{Manager: NewManager(), wx: r.wx, env: &env, log: r.log}
				t.Cleanup(next.Close)
				next.TakeTickets(r.Manager, next.env)
				next.Use(next.env)
				time.Sleep(tt.begins - time.Millisecond)
				synctest.Wait()
				if n := r.wx.count(pathAuthorizerList); n != 0 {
					t.Errorf("WeChat's list was read %d times", n)
				}
				fetched := r.wx.count(pathComponentToken)
				next.get(t, ComponentKey(testPlatform))
				if n := r.wx.count(pathComponentToken) - fetched; n != 1 {
					t.Errorf("%d tokens were fetched for who asked", n)
				}
				time.Sleep(settleLook)
				synctest.Wait()
				if r.wx.count(pathAuthorizerList) == 0 {
					t.Error("WeChat's list is not read")
				}
			})
		})
	}
}

// A manager whose configuration is refused ends at once, with nothing begun.
func TestTakeOverOfTheRefusedBeginsNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		env := *r.env
		env.Store, env.RosterEvery, env.Settled = newFaultStore(), rosterEvery, func() bool { return false }
		next := NewManager()
		next.TakeTickets(r.Manager, &env)
		next.Use(&env)
		time.Sleep(time.Second)
		asked, closed := r.wx.count(pathComponentToken)+r.wx.count(pathStartPush), time.Now()
		next.Close()
		if took := time.Since(closed); took != 0 {
			t.Errorf("its end took %v", took)
		}
		if n := r.wx.count(pathComponentToken) + r.wx.count(pathStartPush) - asked; n != 0 || r.wx.count(pathAuthorizerList) != 0 {
			t.Errorf("WeChat was asked %d times", n)
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

// The old manager ends while it is at an exchange that has not come to WeChat yet.
func TestTakeOverOfWhatIsUnderWay(t *testing.T) {
	t.Parallel()
	for name, in := range map[string]func(r *rig) Intent{
		"push":  func(r *rig) Intent { return r.push(r.newCode(testAuthorizer)) },
		"visit": func(r *rig) Intent { in := r.push(r.newCode(testAuthorizer)); in.Redirected = true; return in },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				next := r.successor(t)
				synctest.Wait()
				held := make(chan struct{})
				r.store.hold(func(op, name string) {
					if op == "lock" && strings.HasPrefix(name, intentFolder) {
						<-held
					}
				})
				if err := r.Accept(t.Context(), in(r)); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				ended := make(chan struct{})
				go func() { r.Close(); close(ended) }()
				synctest.Wait()
				close(held)
				<-ended
				if r.wx.count(pathQueryAuth) != 0 || r.intents(t) != 1 {
					t.Fatal("the code was exchanged")
				}
				next.TakeOver(r.Manager)
				synctest.Wait()
				if next.intents(t) != 0 || next.wx.count(pathQueryAuth) != 1 {
					t.Errorf("the duty is left behind; WeChat was asked %d times", next.wx.count(pathQueryAuth))
				}
				next.get(t, testAuthKey)
			})
		})
	}
}

// A list that was being read when another store took its place is read from its beginning: nobody knows at which place an account that
// authorised meanwhile stands in it.
func TestTakeOverBeginsTheListAnew(t *testing.T) {
	t.Parallel()
	for name, state := range map[string]rosterWire{
		"first": {},
		"daily": {CompletedAt: time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC).Add(-rosterEvery).Unix(), Took: 60},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				next := r.successor(t)
				state.Walk = &walkWire{Node: "before", At: time.Now().Add(-time.Hour).Unix(), StartedAt: time.Now().Add(-48 * time.Hour).Unix(), Offset: 1, Total: 2}
				if err := next.storeRecord(t.Context(), next.env.prepared(), rosterName(testPlatform), state); err != nil {
					t.Fatal(err)
				}
				next.env.RosterEvery = 0
				r.authorize(t, testPlatform, testAuthorizer)
				r.authorize(t, testPlatform, "wx00000000000000ee")
				r.Close()
				next.Use(next.env)
				next.TakeOver(r.Manager)
				time.Sleep(rosterSettle + rosterHasten + rosterCheck)
				if next.rosters.incomplete(testPlatform) {
					t.Fatal("the list is not read")
				}
				next.get(t, testAuthKey)
				next.get(t, AuthorizerKey(testPlatform, "wx00000000000000ee"))
				next.stored(t, testAuthKey)
				got, err := next.loadRoster(t.Context(), next.env.prepared(), testPlatform)
				if err != nil || got.Took >= 3600 {
					t.Errorf("it took %d s, %v", got.Took, err)
				}
			})
		})
	}
}

// A configuration that is refused after all was to take the place of the one in use, which goes on: what that knows of WeChat's list holds.
func TestTakeOverFromTheRefused(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct{ used, authorized bool }{"never in use": {}, "in use": {used: true}, "exchanged": {true, true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				r.env.RosterEvery = 0
				r.Use(r.env)
				r.ticket(t, testPlatform)
				time.Sleep(rosterSettle)
				refused := &rig{Manager: NewManager(), wx: r.wx, store: newFaultStore(), log: r.log}
				env := *r.env
				env.Store, env.RosterEvery = refused.store, -1
				if refused.env = &env; tt.used {
					refused.TakeTickets(r.Manager, refused.env)
					refused.Use(refused.env)
				}
				if tt.authorized {
					refused.authorize(t, testPlatform, testAuthorizer)
				}
				refused.Close()
				lists := r.wx.count(pathAuthorizerList)
				r.TakeOver(refused.Manager)
				time.Sleep(rosterSettle + rosterHasten + rosterCheck)
				if got := r.wx.count(pathAuthorizerList) > lists; got != tt.authorized {
					t.Errorf("the list is read again: %v, want %v", got, tt.authorized)
				}
				if tt.authorized {
					r.get(t, testAuthKey)
				}
			})
		})
	}
}

// The store of before comes back: what another one has taken over is done there too, and nothing of it is found again. What was revoked while
// the other one was in use is revoked in it, unless the account has authorised again meanwhile.
func TestTakeOverAndBack(t *testing.T) {
	t.Parallel()
	for name, again := range map[string]bool{"revoked": false, "and authorised again": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				const other = "wx00000000000000ee"
				r := started(t)
				r.authorize(t, testPlatform, other)
				r.get(t, AuthorizerKey(testPlatform, other))
				r.refuseExchanges()
				if err := r.Accept(t.Context(), r.push(r.newCode(testAuthorizer))); err != nil {
					t.Fatal(err)
				}
				next := r.successor(t)
				r.Close()
				next.TakeOver(r.Manager)
				next.wx.set(func(f *fakeWeChat) { f.hook = nil })
				time.Sleep(10 * time.Minute)
				next.get(t, testAuthKey)
				if r.intents(t)+next.intents(t) != 0 {
					t.Errorf("%d duties are left in the store of before, %d in the other", r.intents(t), next.intents(t))
				}
				if err := next.Revoke(t.Context(), testPlatform, other, time.Now()); err != nil {
					t.Fatal(err)
				}
				if again {
					time.Sleep(time.Minute)
					next.authorize(t, testPlatform, other)
				}
				time.Sleep(2 * time.Hour)

				r.Manager = NewManager()
				r.TakeTickets(next.Manager, r.env)
				r.Use(r.env)
				next.Close()
				r.TakeOver(next.Manager)
				time.Sleep(10 * time.Minute)
				synctest.Wait()
				if got := r.stored(t, AuthorizerKey(testPlatform, other)).revoked(); got == again {
					t.Errorf("revoked in the store of before: %v", got)
				}
				if n := r.log.count("died before it was exchanged") + r.log.count("could not be exchanged"); n != 0 {
					t.Errorf("the log has %d lines about a code that was exchanged under the other store", n)
				}
			})
		})
	}
}
