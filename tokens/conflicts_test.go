package tokens

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// A stored record of a later authorization counts against a cached one of a higher generation.
func TestLaterAuthorizationCountsAgainstAHigherGeneration(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		for range 5 {
			if _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); err != nil {
				t.Fatal(err)
			}
		}
		rec := r.stored(t, testAuthKey)
		rec.Gen, rec.AuthorizedAt, rec.RefreshToken, rec.AccessToken = 1, rec.AuthorizedAt.Add(time.Hour), secret.New("refresh@@@"), secret.New("other-token-1")
		if err := r.storeRecord(t.Context(), r.env.prepared(), testAuthKey.recordName(), rec.wire()); err != nil {
			t.Fatal(err)
		}
		e, err := r.reload(t.Context(), r.env.prepared(), testAuthKey)
		if err != nil || !e.token.Value.Same(rec.AccessToken) {
			t.Errorf("generation %d is kept against the later authorization: %v", e.gen(), err)
		}
	})
}

// Two records of one generation and different content: the store's counts, since every node sees that one.
func TestSameGenerationOtherContent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		rec := r.stored(t, testAuthKey)
		rec.AccessToken = secret.New("other-token-2")
		if err := r.storeRecord(t.Context(), r.env.prepared(), testAuthKey.recordName(), rec.wire()); err != nil {
			t.Fatal(err)
		}
		if e, err := r.reload(t.Context(), r.env.prepared(), testAuthKey); err != nil || !e.token.Value.Same(rec.AccessToken) {
			t.Errorf("the cached token is kept: %v", err)
		}
	})
}

// The end of a context, or a turn that does not come, does not lose what WeChat gave.
func TestGrantThatCannotGetItsTurn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		r.get(t, testAuthKey)
		env, err := r.current()
		if err != nil {
			t.Fatal(err)
		}
		g := grant{access: secret.New("a-token-1"), refresh: secret.New("refresh@@@1"), asked: time.Now(), life: 2 * time.Hour}
		base := r.cache.Load().get(testAuthKey)
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := r.keep(ended, env, testAuthKey, base, g); err != nil {
			t.Errorf("with an ended context: %v", err)
		}
		if got := r.stored(t, testAuthKey); !got.RefreshToken.Same(g.refresh) {
			t.Error("the refresh token is not in the store")
		}
		unlock, err := r.locks.lock(t.Context(), testAuthKey.recordName())
		if err != nil {
			t.Fatal(err)
		}
		g.access, g.refresh = secret.New("a-token-2"), secret.New("refresh@@@2")
		e, err := r.keep(ended, env, testAuthKey, r.cache.Load().get(testAuthKey), g)
		if !errors.Is(err, ErrStore) && err != nil || e == nil || !e.token.Value.Same(g.access) || r.Unsaved() != 1 {
			t.Errorf("without the key's lock: %v, %d unsaved", err, r.Unsaved())
		}
		unlock()
		time.Sleep(2 * time.Minute)
		if got := r.stored(t, testAuthKey); !got.RefreshToken.Same(g.refresh) || r.Unsaved() != 0 {
			t.Errorf("not written later: %d unsaved", r.Unsaved())
		}
	})
}

// A damaged record is not in the way of a code that is exchanged.
func TestExchangeOverADamagedRecord(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		r.restart()
		_ = r.store.MemStore.Store(t.Context(), testAuthKey.recordName(), []byte("torn"))
		time.Sleep(time.Minute)
		r.authorize(t, testPlatform, testAuthorizer)
		r.get(t, testAuthKey)
		if kept := setAsideOf(t, r.store.MemStore, testAuthKey.recordName()); len(kept) != 1 || kept[0] != "torn" || r.Unsaved() != 0 {
			t.Errorf("set aside %q, %d unsaved", kept, r.Unsaved())
		}
		r.wx.set(func(f *fakeWeChat) {
			if got := r.stored(t, testAuthKey); got.RefreshToken.Reveal() != f.refresh[testAuthorizer] {
				t.Error("the store does not have the refresh token that WeChat has")
			}
		})
	})
}

// Whichever of two codes of an account comes in last, WeChat's refresh token is the one in the store.
func TestTwoCodesOfOneAccount(t *testing.T) {
	t.Parallel()
	for _, redirectFirst := range []bool{true, false} {
		t.Run(fmt.Sprint(redirectFirst), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				r.wx.set(func(f *fakeWeChat) { f.strict, f.latency = true, time.Second })
				push := r.push(r.newCode(testAuthorizer)) // the push is dated before the redirect in any case
				code := r.newCode(testAuthorizer)
				time.Sleep(2 * time.Second)
				var wg sync.WaitGroup
				jobs := []func(){func() {
					if _, err := r.ExchangeAuthCode(t.Context(), testPlatform, testAuthorizer, code); err != nil {
						t.Errorf("ExchangeAuthCode: %v", err)
					}
				}, func() {
					if err := r.Accept(t.Context(), push); err != nil {
						t.Errorf("Accept: %v", err)
					}
				}}
				if !redirectFirst {
					jobs[0], jobs[1] = jobs[1], jobs[0]
				}
				for _, job := range jobs {
					wg.Go(job)
					synctest.Wait()
				}
				wg.Wait()
				time.Sleep(time.Minute)
				if _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); err != nil {
					t.Errorf("the refresh token held is not WeChat's: %v", err)
				}
				if r.intents(t) != 0 {
					t.Error("the intent is left")
				}
			})
		})
	}
}

// An older push never replaces the authorization held, and is not exchanged.
func TestOlderPushIsNotExchanged(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.wx.set(func(f *fakeWeChat) { f.strict = true })
		older := r.push(r.newCode(testAuthorizer))
		time.Sleep(time.Minute)
		if err := r.Accept(t.Context(), r.push(r.newCode(testAuthorizer))); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		held := r.stored(t, testAuthKey)
		if err := r.Accept(t.Context(), older); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if now := r.stored(t, testAuthKey); now.CodeHash != held.CodeHash || !now.RefreshToken.Same(held.RefreshToken) || !now.AuthorizedAt.Equal(held.AuthorizedAt) {
			t.Error("the older authorization replaced the newer one")
		}
		if n := r.wx.count(pathQueryAuth); n != 1 {
			t.Errorf("%d exchanges", n)
		}
		if _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); err != nil || r.intents(t) != 0 {
			t.Errorf("Renew: %v; %d intents", err, r.intents(t))
		}
	})
}

// The same revocation, pushed again, does not end what was authorised after it, whatever our clock says.
func TestRevocationPushedAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		ahead := time.Now().Add(5 * time.Minute)
		r.authorize(t, testPlatform, testAuthorizer)
		for range 2 {
			if err := r.Revoke(t.Context(), testPlatform, testAuthorizer, ahead); err != nil {
				t.Fatal(err)
			}
			if r.stored(t, testAuthKey).revoked() {
				r.authorize(t, testPlatform, testAuthorizer)
			}
		}
		r.get(t, testAuthKey)
	})
}

// What the configuration of before fails for is neither shared with callers of the next nor held against them.
func TestUseDuringARenewal(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		wrong := *r.env
		wrong.Accounts = []AccountCredentials{{testAccount, secret.New("wrong-secret")}}
		r.Use(&wrong)
		r.wx.set(func(f *fakeWeChat) { f.latency = time.Second })
		k := AccountKey(testAccount)
		done := make(chan error)
		go func() { _, err := r.Get(t.Context(), k); done <- err }()
		time.Sleep(500 * time.Millisecond)
		r.Use(r.env)
		if _, err := r.Get(t.Context(), k); err != nil {
			t.Errorf("Get with the mended secret: %v", err)
		}
		if err := <-done; !hasCode(err, 40125) {
			t.Errorf("Get with the wrong secret: %v", err)
		}
		if n := r.log.count("token cannot be renewed"); n != 0 {
			t.Error("the failure is held against the new configuration")
		}
	})
}

// WeChat gives a refused token again for a call that names an earlier one: it is forced, and stays refused till then.
func TestRefusedTokenThatComesBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		k := AccountKey(testAccount)
		first := r.get(t, k)
		time.Sleep(3 * time.Hour)
		second := r.get(t, k)
		e := r.cache.Load().get(k)
		r.troubles.refuse(k, second.Value)
		e.refused.Store(true)
		third, err := r.Renew(t.Context(), k, first.Value)
		if err != nil || third.Value.Same(second.Value) {
			t.Errorf("Renew: %v, the refused token: %v", err, third.Value.Same(second.Value))
		}
	})
}

func TestRefusalOutlivesTheSameTokenAgain(t *testing.T) {
	t.Parallel()
	var x troubles
	k, token := AccountKey(testAccount), secret.New("t")
	x.refuse(k, token)
	x.over(k, token)
	e := newEntry(k, &record{Gen: 1, AccessToken: token}, time.Now())
	if x.adopt(e); !e.refused.Load() {
		t.Error("a token that WeChat refused and gave again counts as good")
	}
	x.over(k, secret.New("another"))
	if len(x.keys) != 0 {
		t.Error("the refusal outlives the token")
	}
}

// A clock that is a day ahead of WeChat's.
func TestClockFarAhead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.Use(r.env)
		synctest.Wait()
		pushed := Ticket{secret.New("ticket@@@old"), time.Now().Add(-24 * time.Hour)}
		for range 12 {
			if err := r.PutTicket(t.Context(), testPlatform, pushed); err != nil {
				t.Fatal(err)
			}
			if _, err := r.Ticket(t.Context(), testPlatform); err != nil {
				t.Fatalf("Ticket: %v", err)
			}
			r.restart() // its receipt is durable
			time.Sleep(time.Hour)
		}
		// Replayed, it does not live for ever.
		if err := r.PutTicket(t.Context(), testPlatform, pushed); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Ticket(t.Context(), testPlatform); !errors.Is(err, ErrNoTicket) {
			t.Errorf("twelve hours after its receipt: %v, want ErrNoTicket", err)
		}
		pushed = Ticket{secret.New("ticket@@@new"), time.Now().Add(-23 * time.Hour)}
		_ = r.PutTicket(t.Context(), testPlatform, pushed)
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(string, map[string]any) (string, error) { return "", errors.New("no route to host") }
		})
		in := r.push(r.newCode(testAuthorizer))
		in.CreatedAt, in.ExpiresAt = in.CreatedAt.Add(-24*time.Hour), in.ExpiresAt.Add(-24*time.Hour)
		if err := r.Accept(t.Context(), in); err != nil {
			t.Fatal(err)
		}
		time.Sleep(30 * time.Minute)
		r.wx.set(func(f *fakeWeChat) { f.hook = nil })
		time.Sleep(2 * time.Minute)
		if _, err := r.Get(t.Context(), testAuthKey); err != nil {
			t.Errorf("the code was given up: %v", err)
		}
	})
}

// With a seal key, nobody makes opaque tokens who can only write to the store.
func TestOpaquePlantedKeys(t *testing.T) {
	t.Parallel()
	store := NewMemStore()
	attacker := opaqueNode(t, store, nil)
	forged := mustIssue(t, attacker, opaqueClaims())
	victim := opaqueNode(t, store, opaqueSealer(t))
	if _, err := victim.OpenOpaque(t.Context(), forged); !errors.Is(err, ErrOpaqueUnknown) {
		t.Errorf("a forged token: %v, want ErrOpaqueUnknown", err)
	}
	token := mustIssue(t, victim, opaqueClaims())
	if _, err := victim.OpenOpaque(t.Context(), token); err != nil {
		t.Errorf("the victim's own: %v", err)
	}
	if kept, err := store.Load(t.Context(), opaqueName); err != nil || bytes.Contains(kept, []byte(`"key"`)) {
		t.Errorf("the planted keys are still there: %v", err)
	}
}

// A record that is not sealed with the newest key is sealed soon after it is read, without a change.
func TestRecordsAreSealedWhenRead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		sealed := r.env.Sealer
		r.env.Sealer = nil
		r.Use(r.env)
		r.ticket(t, testPlatform)
		r.authorize(t, testPlatform, testAuthorizer)
		before := r.stored(t, testAuthKey)
		newer, err := crypto.NewSealer(bytes.Repeat([]byte{8}, 32), bytes.Repeat([]byte{7}, 32))
		if err != nil {
			t.Fatal(err)
		}
		for i, sealer := range []*crypto.Sealer{sealed, newer} {
			r.env.Sealer = sealer
			r.restart()
			r.get(t, testAuthKey)
			time.Sleep(time.Minute)
			raw, err := r.store.MemStore.Load(t.Context(), testAuthKey.recordName())
			if err != nil {
				t.Fatal(err)
			}
			if _, old, err := sealer.Open(testAuthKey.recordName(), raw); err != nil || old {
				t.Errorf("%d: not sealed with the newest key: %v", i, err)
			}
			if now := r.stored(t, testAuthKey); now.Gen != before.Gen || !now.same(before) {
				t.Error("the record was changed")
			}
		}
		if n := r.log.count("record=" + testAuthKey.recordName()); n != 1 {
			t.Errorf("the unsealed record was mentioned %d times", n)
		}
	})
}

// A store that hangs holds up nobody longer than the caller's own deadline, and an old key serves meanwhile.
func TestOpaqueStoreThatHangs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.store.hold(func(string, string) { time.Sleep(storeTimeout) })
		start := time.Now()
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
				defer cancel()
				if _, err := r.IssueOpaque(ctx, opaqueClaims()); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("IssueOpaque: %v", err)
				}
			})
		}
		wg.Wait()
		if took := time.Since(start); took != 100*time.Millisecond {
			t.Errorf("twenty callers waited %v", took)
		}
		time.Sleep(time.Minute)
		r.store.hold(nil)
		if _, err := r.IssueOpaque(t.Context(), opaqueClaims()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(opaqueKeyLife)
		r.store.hold(func(string, string) { time.Sleep(time.Second) })
		start = time.Now()
		token, err := r.IssueOpaque(t.Context(), opaqueClaims())
		if err != nil || time.Since(start) != 0 {
			t.Errorf("with an old key: %v, %v", time.Since(start), err)
		}
		time.Sleep(time.Minute)
		next, err := r.IssueOpaque(t.Context(), opaqueClaims())
		if err != nil || strings.HasPrefix(next.Reveal(), token.Reveal()[:6]) {
			t.Errorf("no new key was made in the background: %v", err)
		}
	})
}

// A job that is added again while an attempt fails is tried again soon, whatever its back-off had come to.
func TestQueueHonoursWhatIsAddedWhileFailing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.env.Platforms = nil
		r.Use(r.env)
		var at []time.Time
		var run func(context.Context) error
		run = func(context.Context) error {
			at = append(at, time.Now())
			if len(at) == 1 {
				r.queue.add("test", 0, run)
				return retryError{after: time.Hour}
			}
			return nil
		}
		r.queue.add("test", 0, run)
		time.Sleep(time.Minute)
		synctest.Wait()
		if len(at) != 2 {
			t.Errorf("%d attempts", len(at))
		}
	})
}
