package tokens

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// rotating makes WeChat change the refresh token with each refresh and refuse the old one at once: what is lost then is
// lost for good.
func (r *rig) rotating() { r.wx.set(func(f *fakeWeChat) { f.rotate, f.strict = true, true }) }

// wantInStep checks that the store has the refresh token that WeChat takes.
func (r *rig) wantInStep(t *testing.T) {
	t.Helper()
	var at string
	r.wx.set(func(f *fakeWeChat) { at = f.refresh[testAuthorizer] })
	if got := r.stored(t, testAuthKey).RefreshToken.Reveal(); got != at {
		t.Errorf("the store has %s, WeChat takes %s", got, at)
	}
}

func failAuthorizerLoads(op, name string) error {
	if op == "load" && strings.Contains(name, "/authorizer/") {
		return errors.New("cannot be read")
	}
	return nil
}

// A record that waits to be written is written while a refresh that stands on it is under way.
func TestWaitingRecordIsWrittenDuringARefresh(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.rotating()
		r.authorize(t, testPlatform, testAuthorizer)
		r.store.fail(failWrites)
		first, err := r.Renew(t.Context(), testAuthKey, secret.String{})
		if err != nil {
			t.Fatal(err)
		}
		r.store.fail(nil)
		r.wx.set(func(f *fakeWeChat) { f.latency = 5 * time.Second })
		if _, err := r.Renew(t.Context(), testAuthKey, first.Value); err != nil { // the queue writes after a second
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute)
		if n := r.Unsaved(); n != 0 {
			t.Errorf("%d records are not written", n)
		}
		r.wantInStep(t)
	})
}

// What cannot be read is not written over: the new authorization waits, and is merged once the store can be read.
func TestRecordThatCannotBeReadIsNotWrittenOver(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.rotating()
		r.authorize(t, testPlatform, testAuthorizer)
		for range 5 {
			if _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); err != nil {
				t.Fatal(err)
			}
		}
		before := r.stored(t, testAuthKey)
		r.restart() // nothing in the cache
		synctest.Wait()
		r.store.fail(failAuthorizerLoads)
		time.Sleep(time.Minute)
		code := r.newCode(testAuthorizer)
		if _, err := r.ExchangeAuthCode(t.Context(), testPlatform, testAuthorizer, code); err != nil {
			t.Fatal(err)
		}
		r.store.fail(nil)
		if now := r.stored(t, testAuthKey); now.Gen != before.Gen || !now.RefreshToken.Same(before.RefreshToken) {
			t.Errorf("generation %d was written over by %d", before.Gen, now.Gen)
		}
		time.Sleep(2 * time.Minute)
		if now := r.stored(t, testAuthKey); now.Gen <= before.Gen || r.Unsaved() != 0 {
			t.Errorf("generation %d after %d, %d records not written", now.Gen, before.Gen, r.Unsaved())
		}
		r.wantInStep(t)
	})
}

func TestCloseWritesWhatWaits(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.rotating()
		r.authorize(t, testPlatform, testAuthorizer)
		r.store.fail(failWrites)
		if _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); err != nil {
			t.Fatal(err)
		}
		if err := r.PutTicket(t.Context(), testPlatform, Ticket{secret.New("ticket@@@last"), time.Now().Add(time.Second)}); !errors.Is(err, ErrStore) {
			t.Errorf("PutTicket: %v", err)
		}
		time.Sleep(10 * time.Minute) // the next attempt is up to a minute away
		r.store.fail(nil)
		r.restart()
		r.wantInStep(t)
		if got, err := r.Ticket(t.Context(), testPlatform); err != nil || got.Value.Reveal() != "ticket@@@last" {
			t.Errorf("ticket %v", err)
		}
		r.store.fail(failWrites)
		_, _ = r.Renew(t.Context(), testAuthKey, secret.String{})
		r.Close()
		if r.log.count("could not be written; what they stand for may be lost") != 1 {
			t.Error("nobody was told what was lost")
		}
	})
}

// A grant that WeChat has given is written whatever becomes of the one who asked for it.
func TestGrantOutlivesTheRenewalsDeadline(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.rotating()
		r.authorize(t, testPlatform, testAuthorizer)
		r.wx.set(func(f *fakeWeChat) { f.latency = 9 * time.Second })
		r.store.hold(func(op, _ string) {
			if op == "store" {
				time.Sleep(2 * time.Second)
			}
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, _ = r.Renew(ctx, testAuthKey, secret.String{})
		time.Sleep(7 * time.Second) // WeChat is about to answer
		r.Close()
		r.store.hold(nil)
		r.wantInStep(t)
	})
}

// WeChat's clock is ahead of ours: a redirect, which has no time of WeChat's, still counts after a revocation.
func TestRedirectAfterARevocationFromTheFuture(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		time.Sleep(time.Minute)
		if err := r.Revoke(t.Context(), testPlatform, testAuthorizer, time.Now().Add(40*time.Second)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Second)
		if _, err := r.ExchangeAuthCode(t.Context(), testPlatform, testAuthorizer, r.newCode(testAuthorizer)); err != nil {
			t.Errorf("authorised again: %v", err)
		}
		r.get(t, testAuthKey)
	})
}

// Of two authorizations the later one counts, whichever is answered last.
func TestLaterAuthorizationCounts(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.wx.set(func(f *fakeWeChat) { f.strict = true })
		first := r.push(r.newCode(testAuthorizer))
		time.Sleep(time.Second)
		second := r.push(r.newCode(testAuthorizer))
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(path string, body map[string]any) (string, error) {
				if path == pathQueryAuth && body["authorization_code"] == first.Code.Reveal() {
					return `{"authorization_info":{"authorizer_appid":"` + testAuthorizer + `","authorizer_access_token":"old-token-1",` +
						`"expires_in":7200,"authorizer_refresh_token":"refreshtoken@@@old"}}`, nil
				}
				return "", nil
			}
		})
		for _, in := range []Intent{second, first} {
			if err := r.Accept(t.Context(), in); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		r.wantInStep(t)
		if r.intents(t) != 0 {
			t.Error("an intent is left")
		}
	})
}

// Two nodes get one code, the one by redirect, the other by push, and the other believes that there is no such account.
func TestOneCodeOnTwoNodes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		other := NewManager()
		other.Use(r.env)
		defer other.Close()
		synctest.Wait()
		if _, err := other.Get(t.Context(), testAuthKey); !errors.Is(err, ErrNotAuthorized) {
			t.Fatalf("Get: %v", err)
		}
		in := r.push(r.newCode(testAuthorizer))
		if _, err := r.ExchangeAuthCode(t.Context(), testPlatform, testAuthorizer, in.Code); err != nil {
			t.Fatal(err)
		}
		if err := other.Accept(t.Context(), in); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Minute)
		if r.log.count("authorization code died") != 0 || r.intents(t) != 0 {
			t.Errorf("%d intents are left; %s", r.intents(t), r.log)
		}
		if _, err := other.Get(t.Context(), testAuthKey); err != nil {
			t.Errorf("Get: %v", err)
		}
	})
}

// Tickets that were not acknowledged may have made WeChat stop pushing.
func TestPushingIsRestartedOnRecovery(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		time.Sleep(pushInterval)
		asked := r.wx.count(pathStartPush)
		r.store.fail(failAll)
		for range 18 { // three hours
			_ = r.PutTicket(t.Context(), testPlatform2, Ticket{secret.New("ticket@@@y"), time.Now()})
			if err := r.PutTicket(t.Context(), testPlatform, Ticket{secret.New("ticket@@@x"), time.Now()}); !errors.Is(err, ErrStore) {
				t.Fatalf("PutTicket: %v", err)
			}
			time.Sleep(pushInterval)
		}
		if n := r.wx.count(pathStartPush); n != asked {
			t.Errorf("asked %d times while a ticket served from memory", n-asked)
		}
		r.store.fail(nil)
		time.Sleep(2 * time.Minute)
		if n := r.wx.count(pathStartPush) - asked; n != 2 {
			t.Errorf("asked %d times on recovery, want once for each platform", n)
		}
	})
}

// Calls that cannot come to anything cost the store next to nothing, however often they are made.
func TestHopelessCallsCostNoStoreWork(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.Use(r.env)
		synctest.Wait()
		try := func(what string, k Key, want error) {
			_, _ = r.Get(t.Context(), k)
			locks, loads := r.store.count("lock"), r.store.count("load")
			for range 100 {
				if _, err := r.Get(t.Context(), k); !errors.Is(err, want) {
					t.Fatalf("%s: %v, want %v", what, err, want)
				}
			}
			if n, l := r.store.count("lock")-locks, r.store.count("load")-loads; n > 2 || l > 4 {
				t.Errorf("%s: %d locks and %d reads for 100 calls", what, n, l)
			}
		}
		try("no ticket", ComponentKey(testPlatform), ErrNoTicket)
		r.ticket(t, testPlatform)
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(path string, _ map[string]any) (string, error) {
				if path == pathQueryAuth { // an account without API permission
					return `{"authorization_info":{"authorizer_appid":"` + testAuthorizer + `","func_info":[]}}`, nil
				}
				return "", nil
			}
		})
		if _, err := r.ExchangeAuthCode(t.Context(), testPlatform, testAuthorizer, r.newCode(testAuthorizer)); err != nil {
			t.Fatal(err)
		}
		try("no refresh token", testAuthKey, ErrNotAuthorized)
	})
}

// The refusal of a token from before does not hide that the present one is refused.
func TestLateRefusalOfAnEarlierToken(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		k := AccountKey(testAccount)
		first := r.get(t, k)
		r.wx.kill(first)
		second, err := r.Renew(t.Context(), k, first.Value)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		r.cache.Load().get(k).refused.Store(true) // though WeChat still gives it out in normal mode
		third, err := r.Renew(t.Context(), k, first.Value)
		if err != nil || third.Value.Same(second.Value) || third.Value.Same(first.Value) {
			t.Errorf("Renew: %v, the refused token again: %v", err, third.Value.Same(second.Value))
		}
	})
}

// A slow store costs each caller no more than it is ready to wait, however many there are.
func TestIssueOpaqueKeepsTheCallersDeadline(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.store.hold(func(string, string) { time.Sleep(100 * time.Millisecond) })
		start := time.Now()
		var callers sync.WaitGroup
		for range 20 {
			callers.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), 150*time.Millisecond)
				defer cancel()
				_, _ = r.IssueOpaque(ctx, OpaqueClaims{Client: "crm", AppID: testAccount, Kind: KindAccount, ExpiresAt: time.Now().Add(time.Hour)})
			})
		}
		callers.Wait()
		if took := time.Since(start); took > 200*time.Millisecond {
			t.Errorf("the slowest of 20 callers waited %v", took)
		}
	})
}

// Keys that were stored unsealed are not believed once there is a seal key.
func TestUnsealedOpaqueKeysAreMadeAnew(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		plain := *r.env
		plain.Sealer = nil
		r.Use(&plain)
		claims := OpaqueClaims{Client: "crm", AppID: testAccount, Kind: KindAccount, ExpiresAt: time.Now().Add(time.Hour)}
		before, err := r.IssueOpaque(t.Context(), claims)
		if err != nil {
			t.Fatal(err)
		}
		r.restart() // with the sealer
		if _, err := r.OpenOpaque(t.Context(), before.Reveal()); !errors.Is(err, ErrOpaqueUnknown) {
			t.Errorf("a token of an unsealed key: %v", err)
		}
		after, err := r.IssueOpaque(t.Context(), claims)
		if err != nil {
			t.Fatal(err)
		}
		r.restart()
		if _, err := r.OpenOpaque(t.Context(), after.Reveal()); err != nil {
			t.Errorf("a token of the new, sealed key: %v", err)
		}
	})
}
