package tokens

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// kinds are the three kinds of token, with the call that renews each.
var kinds = []struct {
	name string
	key  Key
	path string
}{
	{"component", ComponentKey(testPlatform), pathComponentToken},
	{"authorizer", AuthorizerKey(testPlatform, testAuthorizer), pathAuthorizerToken},
	{"account", AccountKey(testAccount), pathStableToken},
}

// eachKind runs a test for each kind of token, in a bubble, with the key's tokens obtainable.
func eachKind(t *testing.T, test func(t *testing.T, r *rig, k Key, path string)) {
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				if kind.key.Kind == KindAuthorizer {
					r.authorize(t, kind.key.Platform, kind.key.AppID)
					// The exchange brings a token too: wait until it is invalid, so that every kind starts the same.
					time.Sleep(3 * time.Hour)
					r.ticket(t, testPlatform)
				}
				test(t, r, kind.key, kind.path)
			})
		})
	}
}

func TestFiveHoursOfTenCallers(t *testing.T) {
	t.Parallel()
	eachKind(t, func(t *testing.T, r *rig, k Key, path string) {
		before := r.wx.count(path)
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				for range 5 * 60 {
					token, err := r.Get(t.Context(), k)
					if err != nil {
						t.Errorf("Get: %v", err)
						return
					}
					if r.wx.set(func(f *fakeWeChat) {
						if !f.live(token.Value.Reveal()) {
							t.Error("a dead token was served")
						}
					}); t.Failed() {
						return
					}
					time.Sleep(time.Minute)
				}
			})
		}
		wg.Wait()
		synctest.Wait()
		// A life of two hours less its margin, so three refreshes in five hours.
		if n := r.wx.count(path) - before; n != 3 {
			t.Errorf("%d refreshes in five hours, want 3", n)
		}
	})
}

func TestColdCallersShareOneRefresh(t *testing.T) {
	t.Parallel()
	eachKind(t, func(t *testing.T, r *rig, k Key, path string) {
		r.restart() // nothing in the cache
		r.wx.set(func(f *fakeWeChat) { f.latency = 100 * time.Millisecond })
		before, reads := r.wx.count(path), r.store.count("load")
		var wg sync.WaitGroup
		var values sync.Map
		for range 200 {
			wg.Go(func() {
				token, err := r.Get(t.Context(), k)
				if err != nil {
					t.Errorf("Get: %v", err)
				}
				values.Store(token.Value.Reveal(), true)
			})
		}
		wg.Wait()
		if n := r.wx.count(path) - before; n != 1 {
			t.Errorf("%d refreshes for 200 callers", n)
		}
		distinct := 0
		values.Range(func(any, any) bool { distinct++; return true })
		if distinct != 1 {
			t.Errorf("%d different tokens", distinct)
		}
		if n := r.store.count("load") - reads; n > 20 {
			t.Errorf("%d reads of the store for 200 callers", n)
		}
	})
}

func TestCallerThatLeavesCancelsNobody(t *testing.T) {
	t.Parallel()
	eachKind(t, func(t *testing.T, r *rig, k Key, path string) {
		r.wx.set(func(f *fakeWeChat) { f.latency = time.Second })
		first, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		before := r.wx.count(path)
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := r.Get(first, k); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("the caller that leaves: %v", err)
			}
		})
		synctest.Wait()
		wg.Go(func() {
			if _, err := r.Get(t.Context(), k); err != nil {
				t.Errorf("the caller that stays: %v", err)
			}
		})
		wg.Wait()
		if n := r.wx.count(path) - before; n != 1 {
			t.Errorf("%d refreshes, want the one that both callers began with", n)
		}
	})
}

func TestStaleIsServedAndRenewedOnce(t *testing.T) {
	t.Parallel()
	eachKind(t, func(t *testing.T, r *rig, k Key, path string) {
		old := r.get(t, k)
		time.Sleep(2*time.Hour - 4*time.Minute) // stale for every kind
		r.ticket(t, testPlatform)
		if k.Kind == KindAuthorizer {
			r.get(t, ComponentKey(testPlatform)) // not part of what is counted and timed
		}
		r.wx.set(func(f *fakeWeChat) { f.latency = 10 * time.Second / 2 })
		before := r.wx.count(path)
		start := time.Now()
		for range 100 {
			if token := r.get(t, k); !sameToken(token, old) {
				t.Fatal("a stale token was not served while it lives")
			}
		}
		if waited := time.Since(start); waited != 0 {
			t.Errorf("callers waited %v for a token that lives", waited)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := r.wx.count(path) - before; n != 1 {
			t.Errorf("%d renewals", n)
		}
		renewed := r.get(t, k)
		if renewed.Value.Same(old.Value) || renewed.Generation <= old.Generation {
			t.Errorf("generation %d after %d", renewed.Generation, old.Generation)
		}
	})
}

func TestFailedRenewalBacksOffAndServesOn(t *testing.T) {
	t.Parallel()
	eachKind(t, func(t *testing.T, r *rig, k Key, path string) {
		old := r.get(t, k)
		time.Sleep(2*time.Hour - 4*time.Minute)
		r.ticket(t, testPlatform)
		if k.Kind == KindAuthorizer {
			r.get(t, ComponentKey(testPlatform))
			synctest.Wait()
		}
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(p string, _ map[string]any) (string, error) {
				if p == path {
					return wxError(-1, "system error"), nil
				}
				return "", nil
			}
		})
		before := r.wx.count(path)
		for range 180 {
			if token := r.get(t, k); !sameToken(token, old) {
				t.Fatal("another token")
			}
			time.Sleep(time.Second)
		}
		// 1, 2, 4 … 60 seconds: eight attempts or so in three minutes, not 180.
		if n := r.wx.count(path) - before; n < 5 || n > 12 {
			t.Errorf("%d attempts in three minutes", n)
		}
		if n := r.log.count("token cannot be renewed"); n != 1 {
			t.Errorf("the failure was logged %d times", n)
		}
		if r.log.count("rid=64f1e2d3-0a1b2c3d-4e5f6071") == 0 {
			t.Error("the request id is not in the log")
		}
		// The end of its life, then recovery.
		time.Sleep(2 * time.Minute)
		if _, err := r.Get(t.Context(), k); !hasCode(err, -1) {
			t.Errorf("after the end: %v, want WeChat's error", err)
		}
		r.wx.set(func(f *fakeWeChat) { f.hook = nil })
		time.Sleep(2 * time.Minute)
		if token := r.get(t, k); token.Value.Same(old.Value) {
			t.Error("the dead token is served")
		}
	})
}

func TestWaitingCallersDoNotHammer(t *testing.T) {
	t.Parallel()
	eachKind(t, func(t *testing.T, r *rig, k Key, path string) {
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(p string, _ map[string]any) (string, error) {
				if p == path {
					return "", errors.New("connection reset")
				}
				return "", nil
			}
		})
		before := r.wx.count(path)
		for range 600 {
			if _, err := r.Get(t.Context(), k); !errors.Is(err, ErrUnreachable) {
				t.Fatalf("Get: %v, want ErrUnreachable", err)
			}
			time.Sleep(100 * time.Millisecond)
		}
		if n := r.wx.count(path) - before; n < 4 || n > 12 {
			t.Errorf("%d attempts for 600 calls in a minute", n)
		}
		// A new configuration is tried at once.
		r.wx.set(func(f *fakeWeChat) { f.hook = nil })
		r.Use(r.env)
		r.get(t, k)
	})
}

func TestStormOfRefusalsIsOneRenewal(t *testing.T) {
	t.Parallel()
	eachKind(t, func(t *testing.T, r *rig, k Key, path string) {
		dead := r.get(t, k)
		r.wx.kill(dead)
		r.wx.set(func(f *fakeWeChat) { f.latency = 50 * time.Millisecond })
		before := r.wx.count(path)
		var wg sync.WaitGroup
		for range 200 {
			wg.Go(func() {
				token, err := r.Renew(t.Context(), k, dead.Value)
				if err != nil || token.Value.Same(dead.Value) {
					t.Errorf("Renew: %v; the same token: %v", err, token.Value.Same(dead.Value))
				}
			})
			wg.Go(func() {
				// Nobody is given the token that is known to be dead, once it is.
				time.Sleep(time.Millisecond)
				token, err := r.Get(t.Context(), k)
				if err != nil || token.Value.Same(dead.Value) {
					t.Errorf("Get: %v; the dead token: %v", err, token.Value.Same(dead.Value))
				}
			})
		}
		wg.Wait()
		if n := r.wx.count(path) - before; n != 1 {
			t.Errorf("%d renewals for 200 refusals", n)
		}
		// Late refusals of the old token change nothing.
		before = r.wx.count(path)
		if _, err := r.Renew(t.Context(), k, dead.Value); err != nil {
			t.Error(err)
		}
		if n := r.wx.count(path) - before; n != 0 {
			t.Errorf("%d renewals for a token that is no longer current", n)
		}
	})
}

func TestRenewWithoutARefusedToken(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		k := ComponentKey(testPlatform)
		old := r.get(t, k)
		token, err := r.Renew(t.Context(), k, secret.String{})
		if err != nil || token.Value.Same(old.Value) {
			t.Errorf("Renew of whatever is current: %v; the same: %v", err, token.Value.Same(old.Value))
		}
	})
}

func TestEndlessRefusalsAreRationed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		k := AuthorizerKey(testPlatform, testAuthorizer)
		token := r.get(t, k)
		rationed := 0
		for range 100 {
			next, err := r.Renew(t.Context(), k, token.Value)
			if err != nil {
				if !errors.Is(err, ErrBackoff) {
					t.Fatalf("Renew: %v", err)
				}
				rationed++
			} else {
				token = next
			}
			time.Sleep(time.Second)
		}
		if n := r.wx.count(pathAuthorizerToken); n > refusalBurst+5 || rationed == 0 {
			t.Errorf("%d renewals in 100 seconds of refusals", n)
		}
		time.Sleep(time.Hour)
		if _, err := r.Renew(t.Context(), k, token.Value); err != nil {
			t.Errorf("after a rest: %v", err)
		}
	})
}

// WeChat refuses a good token on a path that takes another kind. However many paths do, and whoever calls them, the token serves on for
// all others while another is not to be had, and is replaced when one is.
func TestRefusedTokenServesOnWhileRenewalsAreRationed(t *testing.T) {
	t.Parallel()
	eachKind(t, func(t *testing.T, r *rig, k Key, path string) {
		token := r.get(t, k)
		refuse := func() error {
			next, err := r.Renew(t.Context(), k, token.Value)
			if err == nil {
				token = next
			}
			return err
		}
		for n := 0; ; n++ {
			if err := refuse(); errors.Is(err, ErrBackoff) {
				break
			} else if err != nil || n > refusalBurst {
				t.Fatalf("Renew, time %d: %v", n, err)
			}
		}
		before := r.wx.count(path)
		for range 100 {
			if got, err := r.Get(t.Context(), k); err != nil || !sameToken(got, token) {
				t.Fatalf("Get: %v; the token that is left: %v", err, sameToken(got, token))
			}
		}
		if err := refuse(); !errors.Is(err, ErrBackoff) {
			t.Errorf("Renew: %v, want ErrBackoff", err)
		}
		synctest.Wait()
		if n := r.wx.count(path) - before; n > 2 {
			t.Errorf("WeChat was asked %d times for 100 calls", n)
		}
		// A cache may lose what it holds.
		r.cache.Load().drop(k)
		var callers sync.WaitGroup
		for range 20 {
			callers.Go(func() {
				if got, err := r.Get(t.Context(), k); err != nil || !sameToken(got, token) {
					t.Errorf("Get: %v; the token that is left: %v", err, sameToken(got, token))
				}
			})
		}
		callers.Wait()
		time.Sleep(2 * refusalEvery)
		r.get(t, k)
		synctest.Wait()
		if got := r.get(t, k); sameToken(got, token) {
			t.Error("the refused token is not replaced once it may be")
		}
	})
}

// An account that takes its authorization back is served no more, at once, also where its token served on.
func TestSparedTokenEnds(t *testing.T) {
	t.Parallel()
	var e entry
	e.key, e.deadAt = testAuthKey, instantOf(time.Now().Add(time.Hour))
	now := instantOf(time.Now())
	e.refused.Store(true)
	if e.live(now) {
		t.Error("a refused token is live")
	}
	if e.spare(); !e.live(now) {
		t.Error("a spared token is not live")
	}
	if e.ended.Store(true); e.live(now) {
		t.Error("an ended token is live")
	}
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		r.get(t, testAuthKey)
		held := r.cache.Load().get(testAuthKey)
		held.refused.Store(true)
		held.spare()
		r.store.fail(func(op, _ string) error { return errors.New("store is away") })
		if err := r.Revoke(t.Context(), testPlatform, testAuthorizer, time.Now()); err == nil {
			t.Fatal("the store took it")
		}
		if held.live(instantOf(time.Now())) {
			t.Error("it serves on while its end cannot be written")
		}
	})
}

func TestAccountForcesOnlyWhatIsRefused(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		var forced atomic.Int32
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(_ string, body map[string]any) (string, error) {
				if body["force_refresh"] == true {
					forced.Add(1)
				}
				return "", nil
			}
		})
		k := AccountKey(testAccount)
		first := r.get(t, k)
		r.wx.kill(first)
		// WeChat still has the dead token in its normal mode.
		r.wx.set(func(f *fakeWeChat) { f.alive[first.Value.Reveal()] = time.Now().Add(time.Hour) })
		second, err := r.Renew(t.Context(), k, first.Value)
		if err != nil || forced.Load() != 1 {
			t.Fatalf("Renew: %v, %d forced", err, forced.Load())
		}
		if _, err := r.Renew(t.Context(), k, second.Value); !errors.Is(err, ErrBackoff) || forced.Load() != 1 {
			t.Errorf("a second force within %v: %v, %d forced", forceInterval, err, forced.Load())
		}
		time.Sleep(forceInterval)
		if _, err := r.Renew(t.Context(), k, second.Value); err != nil || forced.Load() != 2 {
			t.Errorf("after %v: %v, %d forced", forceInterval, err, forced.Load())
		}
	})
}

func TestSameStableTokenIsNoNews(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		k := AccountKey(testAccount)
		first := r.get(t, k)
		written := func() string { // sealed anew by each write
			data, err := r.store.MemStore.Load(t.Context(), k.recordName())
			if err != nil {
				t.Fatal(err)
			}
			return string(data)
		}
		before := written()
		time.Sleep(2*time.Hour - 301*time.Second)
		// WeChat's clock is a little behind: it still gives the same token when ours says five minutes.
		r.wx.set(func(f *fakeWeChat) { f.alive[first.Value.Reveal()] = time.Now().Add(320 * time.Second) })
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(string, map[string]any) (string, error) {
				return fmt.Sprintf(`{"access_token":%q,"expires_in":%d}`, first.Value.Reveal(), int(time.Until(first.ExpiresAt).Seconds())), nil
			}
		})
		time.Sleep(2 * time.Second)
		calls := r.wx.count(pathStableToken)
		for range 60 {
			if got := r.get(t, k); !sameToken(got, first) {
				t.Fatal("another token")
			}
			time.Sleep(time.Second)
		}
		if n := r.wx.count(pathStableToken) - calls; n < 1 || n > 3 {
			t.Errorf("asked %d times in a minute for the same token", n)
		}
		if written() != before {
			t.Error("a token that did not change was written")
		}
	})
}

func TestExpiresInAsReceived(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		raw  string
		life time.Duration
	}{
		{"7200", 2 * time.Hour},
		{`"7200"`, 2 * time.Hour},
		{"600", 10 * time.Minute},
		{"0", shortestLife},
		{"-1", shortestLife},
		{`""`, shortestLife},
		{"null", shortestLife},
		{`"soon"`, shortestLife},
		{"{}", shortestLife},
		{"1e30", longestLife},
		{"1e999", longestLife},
		{"99999999999999999999999", longestLife},
		{"7200.9", 2 * time.Hour},
	} {
		t.Run(test.raw, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				r.wx.set(func(f *fakeWeChat) { f.expires = test.raw })
				start := time.Now()
				token := r.get(t, AccountKey(testAccount))
				if life := token.ExpiresAt.Sub(start); life != test.life {
					t.Errorf("a life of %v, want %v", life, test.life)
				}
				for range 20 { // neither a refresh per call nor a dead token
					r.get(t, AccountKey(testAccount))
				}
				synctest.Wait()
				if n := r.wx.count(pathStableToken); n != 1 {
					t.Errorf("%d calls for one token", n)
				}
			})
		})
	}
}

func TestUnusableAnswers(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]string{
		"no token":       `{"expires_in":7200}`,
		"token empty":    `{"access_token":"","expires_in":7200}`,
		"html":           `<html>busy</html>`,
		"half an answer": `{"access_token":"half-`,
		"a list":         `[]`,
		"nothing":        ` `,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				good := r.get(t, AccountKey(testAccount))
				r.wx.set(func(f *fakeWeChat) {
					f.hook = func(string, map[string]any) (string, error) { return answer, nil }
				})
				time.Sleep(2*time.Hour - time.Minute)
				if token := r.get(t, AccountKey(testAccount)); !sameToken(token, good) {
					t.Error("a good token was replaced")
				}
				time.Sleep(time.Hour)
				if _, err := r.Get(t.Context(), AccountKey(testAccount)); !errors.Is(err, ErrUnreachable) {
					t.Errorf("Get: %v, want ErrUnreachable", err)
				}
			})
		})
	}
}

func TestKeysThatNobodyHas(t *testing.T) {
	t.Parallel()
	r := startedAwake(t)
	long := make([]byte, maxID+1)
	for _, test := range []struct {
		key  Key
		want error
	}{
		{ComponentKey("wxunknown"), ErrNotConfigured},
		{ComponentKey(""), ErrNotConfigured},
		{AccountKey("wxunknown"), ErrNotConfigured},
		{AccountKey(testPlatform), ErrNotConfigured},
		{AuthorizerKey("wxunknown", testAuthorizer), ErrNotConfigured},
		{AuthorizerKey(testPlatform, ""), ErrNotAuthorized},
		{AuthorizerKey(testPlatform, string(long)), ErrNotAuthorized},
		{AuthorizerKey(testPlatform, testAuthorizer), ErrNotAuthorized},
		{AuthorizerKey(testPlatform, "../../ticket/"+testPlatform), ErrNotAuthorized},
		{Key{Kind: "other", AppID: testAccount}, ErrNotConfigured},
		{Key{}, ErrNotConfigured},
	} {
		if _, err := r.Get(t.Context(), test.key); !errors.Is(err, test.want) {
			t.Errorf("Get(%q): %v, want %v", test.key, err, test.want)
		}
		if _, err := r.Renew(t.Context(), test.key, secret.New("x")); !errors.Is(err, test.want) {
			t.Errorf("Renew(%q): %v, want %v", test.key, err, test.want)
		}
		if err := r.Call(t.Context(), test.key, http.MethodGet, "/cgi-bin/x", nil, nil, nil); !errors.Is(err, test.want) {
			t.Errorf("Call(%q): %v, want %v", test.key, err, test.want)
		}
	}
}

func TestReloadKeepsTokensAndDropsWhatIsNotConfigured(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		k := AccountKey(testAccount)
		before := r.get(t, k)
		next := *r.env
		next.Accounts = append([]AccountCredentials{{"wx00000000000000ee", secret.New(testAccountSecret)}}, r.env.Accounts...)
		r.Use(&next)
		if after := r.get(t, k); !sameToken(after, before) {
			t.Error("a reload changed a token")
		}
		r.get(t, AccountKey("wx00000000000000ee"))
		if n := r.wx.count(pathStableToken); n != 2 {
			t.Errorf("%d refreshes for two accounts", n)
		}
		next.Accounts = nil
		r.Use(&next)
		if _, err := r.Get(t.Context(), k); !errors.Is(err, ErrNotConfigured) {
			t.Errorf("Get of an account that was removed: %v", err)
		}
	})
}

func TestBeforeUseAndAfterClose(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	operations := map[string]func() error{
		"Get":       func() error { _, err := r.Get(t.Context(), AccountKey(testAccount)); return err },
		"Renew":     func() error { _, err := r.Renew(t.Context(), AccountKey(testAccount), secret.New("x")); return err },
		"PutTicket": func() error { return r.PutTicket(t.Context(), testPlatform, Ticket{Value: secret.New("t")}) },
		"Ticket":    func() error { _, err := r.Ticket(t.Context(), testPlatform); return err },
		"Accept": func() error {
			return r.Accept(t.Context(), Intent{Platform: testPlatform, Code: secret.New("c")})
		},
		"Exchange": func() error {
			_, err := r.ExchangeAuthCode(t.Context(), testPlatform, "", secret.New("c"))
			return err
		},
		"Revoke":     func() error { return r.Revoke(t.Context(), testPlatform, testAuthorizer, time.Now()) },
		"Authorizer": func() error { _, err := r.Authorizer(t.Context(), testPlatform, testAuthorizer); return err },
		"PlatformOf": func() error { _, err := r.PlatformOf(t.Context(), testAuthorizer); return err },
		"Call": func() error {
			return r.Call(t.Context(), AccountKey(testAccount), http.MethodGet, "/x", nil, nil, nil)
		},
	}
	for name, operation := range operations {
		if err := operation(); !errors.Is(err, ErrNotConfigured) {
			t.Errorf("%s before Use: %v, want ErrNotConfigured", name, err)
		}
	}
	r.Use(r.env)
	r.get(t, AccountKey(testAccount))
	r.Close()
	r.Close()
	r.Use(r.env)
	for name, operation := range operations {
		if err := operation(); !errors.Is(err, ErrClosed) {
			t.Errorf("%s after Close: %v, want ErrClosed", name, err)
		}
	}
}

func TestCloseWithoutUse(t *testing.T) {
	t.Parallel()
	NewManager().Close()
}

func TestCloseLetsARenewalFinish(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		r.wx.set(func(f *fakeWeChat) { f.latency, f.rotate, f.strict = 5*time.Second, true, true })
		k := AuthorizerKey(testPlatform, testAuthorizer)
		old := r.get(t, k)
		done := make(chan error)
		go func() { _, err := r.Renew(context.Background(), k, old.Value); done <- err }()
		synctest.Wait()
		r.Close()
		if err := <-done; err != nil {
			t.Errorf("the renewal that was under way: %v", err)
		}
		r.wx.set(func(f *fakeWeChat) { f.latency = 0 })
		r.Manager = NewManager()
		r.Use(r.env)
		time.Sleep(3 * time.Hour)
		r.ticket(t, testPlatform)
		r.get(t, k) // with the refresh token that arrived while closing
	})
}

func TestCloseIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		never := make(chan struct{})
		r.store.hold(func(string, string) { <-never }) // ignores its context
		go func() { _, _ = r.Get(context.Background(), AccountKey(testAccount)) }()
		synctest.Wait()
		start := time.Now()
		r.Close()
		if took := time.Since(start); took > closeGrace+closeEnd {
			t.Errorf("Close took %v", took)
		}
		close(never)
		synctest.Wait()
	})
}

// The read cache is closed while it is read: nothing panics and nothing races.
func TestCloseUnderLoad(t *testing.T) {
	t.Parallel()
	r := startedAwake(t)
	r.get(t, AccountKey(testAccount))
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				if _, err := r.Get(context.Background(), AccountKey(testAccount)); err != nil {
					if !errors.Is(err, ErrClosed) {
						t.Errorf("Get: %v", err)
					}
					return
				}
			}
		})
	}
	r.Close()
	wg.Wait()
}

func TestPanicCostsOneOperation(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(string, map[string]any) (string, error) { panic(testAccountSecret) }
		})
		if _, err := r.Get(t.Context(), AccountKey(testAccount)); !errors.Is(err, errPanic) {
			t.Errorf("Get: %v", err)
		}
		r.wx.set(func(f *fakeWeChat) { f.hook = nil })
		r.get(t, AccountKey(testAccount))
	})
}

func TestCallRenewsARefusedTokenOnce(t *testing.T) {
	t.Parallel()
	eachKind(t, func(t *testing.T, r *rig, k Key, path string) {
		token := r.get(t, k)
		var answer struct{ Token string }
		call := func() error {
			return r.Call(t.Context(), k, http.MethodPost, "/cgi-bin/message/custom/send", nil, map[string]string{"a": "<b>"}, &answer)
		}
		if err := call(); err != nil || answer.Token != token.Value.Reveal() {
			t.Fatalf("Call: %v", err)
		}
		r.wx.kill(token)
		if err := call(); err != nil || answer.Token == token.Value.Reveal() {
			t.Errorf("Call with a token that died: %v", err)
		}
		const api = "/cgi-bin/always/refused"
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(p string, _ map[string]any) (string, error) {
				if p == api {
					return wxError(40001, "invalid credential"), nil
				}
				return "", nil
			}
		})
		if k.Kind == KindAccount {
			time.Sleep(forceInterval)
		}
		if err := r.Call(t.Context(), k, http.MethodGet, api, nil, nil, nil); !hasCode(err, 40001) {
			t.Errorf("Call that is always refused: %v", err)
		}
		if n := r.wx.count(api); n != 2 {
			t.Errorf("%d calls, want the first and one repeat", n)
		}
		if err := r.Call(t.Context(), k, http.MethodPut, "/x", nil, nil, nil); err == nil {
			t.Error("PUT was accepted")
		}
	})
}
