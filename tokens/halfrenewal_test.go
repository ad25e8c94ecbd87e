package tokens

import (
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// halfRenewals has WeChat answer each renewal of an authorizer's token with a new refresh token and no access token.
func (r *rig) halfRenewals() {
	var serial atomic.Int64
	r.wx.set(func(f *fakeWeChat) {
		f.strict = true
		f.hook = func(path string, body map[string]any) (string, error) {
			if path != pathAuthorizerToken {
				return "", nil
			}
			refresh := fmt.Sprintf("refreshtoken@@@half%d", serial.Add(1))
			f.mu.Lock()
			defer f.mu.Unlock()
			if body["authorizer_refresh_token"] != f.refresh[testAuthorizer] {
				return wxError(61023, "refresh_token is invalid"), nil
			}
			f.refresh[testAuthorizer] = refresh
			return fmt.Sprintf(`{"expires_in":7200,"authorizer_refresh_token":%q}`, refresh), nil
		}
	})
}

func (r *rig) renewals() int {
	r.wx.mu.Lock()
	defer r.wx.mu.Unlock()
	return r.wx.calls[pathAuthorizerToken]
}

// afterHalfRenewals calls test when the token has ended and two nodes with steady callers have got halves for two minutes.
func afterHalfRenewals(t *testing.T, test func(t *testing.T, a, b *rig, h *hub)) {
	inCluster(t, func(t *testing.T, a, b *rig, h *hub) {
		a.halfRenewals()
		time.Sleep(3 * time.Hour)
		before := a.renewals()
		for range 1200 {
			for _, r := range []*rig{a, b} {
				if _, err := r.Get(t.Context(), testAuthKey); err == nil {
					t.Fatal("there is a token")
				}
			}
			time.Sleep(100 * time.Millisecond)
		}
		if n := a.renewals() - before; n > 40 {
			t.Errorf("%d calls in two minutes by two nodes", n)
		}
		test(t, a, b, h)
	})
}

// What one node keeps of such a renewal is no news that ends the other's wait.
func TestHalfRenewalsInACluster(t *testing.T) {
	afterHalfRenewals(t, func(t *testing.T, a, b *rig, _ *hub) {
		// Whoever comes first once WeChat has recovered brings the token to both.
		a.wx.set(func(f *fakeWeChat) { f.hook = nil })
		time.Sleep(backoffMost)
		want := a.get(t, testAuthKey)
		atOnce(t, func() {
			if got := b.get(t, testAuthKey); !sameToken(got, want) {
				t.Errorf("generation %d on the other node, want %d", got.Generation, want.Generation)
			}
		})
		for _, r := range []*rig{a, b} {
			if _, failures, err := r.troubles.last(testAuthKey); failures != 0 || err != nil {
				t.Errorf("%d failures are left: %v", failures, err)
			}
		}
	})
}

// Another node's renewal, and a new authorization there, end the wait at once: also before the record has been read that was
// heard of, and for who has no entry of it any more.
func TestHalfRenewalIsMadeGoodElsewhere(t *testing.T) {
	for name, mend := range map[string]func(t *testing.T, a *rig){
		"renewed":    func(t *testing.T, a *rig) { a.troubles.forgive(); a.get(t, testAuthKey) },
		"authorized": func(t *testing.T, a *rig) { a.authorize(t, testPlatform, testAuthorizer) },
	} {
		for _, forgotten := range []bool{false, true} {
			t.Run(fmt.Sprint(name, " forgotten ", forgotten), func(t *testing.T) {
				afterHalfRenewals(t, func(t *testing.T, a, b *rig, _ *hub) {
					b.troubles.failed(testAuthKey, ErrUnreachable) // as late as can be
					if _, err := b.Get(t.Context(), testAuthKey); !errors.Is(err, ErrBackoff) {
						t.Fatalf("it does not wait: %v", err)
					}
					a.wx.set(func(f *fakeWeChat) { f.hook = nil })
					if forgotten {
						b.cache.Load().drop(testAuthKey)
					}
					mend(t, a)
					atOnce(t, func() { b.get(t, testAuthKey) })
					synctest.Wait()
					if _, failures, _ := b.troubles.last(testAuthKey); failures != 0 {
						t.Errorf("%d failures are left", failures)
					}
				})
			})
		}
	}
}

// News for which no job had room are read by the next use.
func TestHalfRenewalIsMadeGoodUnread(t *testing.T) {
	afterHalfRenewals(t, func(t *testing.T, a, b *rig, h *hub) {
		b.troubles.failed(testAuthKey, ErrUnreachable)
		a.wx.set(func(f *fakeWeChat) { f.hook = nil })
		a.troubles.forgive()
		h.mu.Lock()
		h.cut = true // the message itself is given below, without the job
		h.mu.Unlock()
		want := a.get(t, testAuthKey)
		c := b.cache.Load()
		b.hearing.Load().marks[c.place(testAuthKey)].Store(b.beat.Add(1))
		atOnce(t, func() {
			if got := b.get(t, testAuthKey); !sameToken(got, want) {
				t.Errorf("generation %d, want %d", got.Generation, want.Generation)
			}
		})
	})
}

// So do those for an account's ticket, which is had with its token, also where nothing of the account is in memory any more.
func TestHalfRenewalIsMadeGoodForATicket(t *testing.T) {
	for _, forgotten := range []bool{false, true} {
		t.Run(fmt.Sprint("forgotten ", forgotten), func(t *testing.T) {
			afterHalfRenewals(t, func(t *testing.T, a, b *rig, h *hub) {
				b.troubles.failed(testAuthKey, ErrUnreachable)
				key := JSAPIKey(testPlatform, testAuthorizer)
				if _, err := b.Get(t.Context(), key); !errors.Is(err, ErrBackoff) {
					t.Fatalf("it does not wait: %v", err)
				}
				a.wx.set(func(f *fakeWeChat) { f.hook = nil })
				a.troubles.forgive()
				if forgotten {
					b.cache.Load().drop(testAuthKey)
				} else { // no job has room
					h.mu.Lock()
					h.cut = true
					h.mu.Unlock()
				}
				want := a.get(t, testAuthKey)
				b.hearing.Load().marks[b.cache.Load().place(testAuthKey)].Store(b.beat.Add(1))
				before := a.renewals()
				atOnce(t, func() { b.get(t, key) })
				if got := b.get(t, testAuthKey); !sameToken(got, want) || a.renewals() != before {
					t.Errorf("generation %d after %d renewals, want %d", got.Generation, a.renewals()-before, want.Generation)
				}
			})
		})
	}
}
