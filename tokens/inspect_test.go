package tokens

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

func TestAuthorizerDetail(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		if _, err := r.AuthorizerDetail(t.Context(), "", testAuthorizer); !errors.Is(err, ErrNotAuthorized) {
			t.Errorf("unknown: %v", err)
		}
		if _, err := r.AuthorizerDetail(t.Context(), "wx00000000000000ff", testAuthorizer); !errors.Is(err, ErrNotConfigured) {
			t.Errorf("of a platform that is not there: %v", err)
		}
		for _, appid := range []string{"", strings.Repeat("a", maxID+1)} {
			if _, err := r.AuthorizerDetail(t.Context(), "", appid); !errors.Is(err, ErrNotAuthorized) {
				t.Errorf("%q: %v", appid, err)
			}
		}
		r.authorize(t, testPlatform2, testAuthorizer)
		r.seed(t, testAuthKey, &record{Gen: 1, RevokedAt: time.Now()})
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(path string, _ map[string]any) (string, error) {
				if path == pathAuthorizerInfo {
					return `{"authorizer_info":{"nick_name":"店","user_name":"gh_1","principal_name":"某公司","MiniProgramInfo":{}},
						"authorization_info":{"authorizer_refresh_token":"refreshtoken@@@1","func_info":[{"funcscope_category":{"id":18}}]}}`, nil
				}
				return "", nil
			}
		})
		// The platform that is authorised goes before the first, which is not.
		for range 3 {
			d, err := r.AuthorizerDetail(t.Context(), "", testAuthorizer)
			if err != nil || d.Platform != testPlatform2 || d.NickName != "店" || d.UserName != "gh_1" || d.State != StateAuthorized || d.AuthorizedAt.IsZero() ||
				!d.Asked || !d.MiniProgram || d.Principal != "某公司" || len(d.FuncInfo) != 1 || d.FuncInfo[0] != 18 ||
				d.Token.Err != nil || time.Until(d.Token.ExpiresAt) < time.Hour || d.Token.ObtainedAt.IsZero() {
				t.Errorf("%+v, %v", d, err)
			}
		}
		if n := r.wx.count(pathAuthorizerInfo); n != 1 {
			t.Errorf("WeChat was asked %d times", n)
		}
		d, err := r.AuthorizerDetail(t.Context(), testPlatform, testAuthorizer)
		if err != nil || d.State != StateRevoked || d.RevokedAt.IsZero() || d.Asked || !d.Token.ExpiresAt.IsZero() {
			t.Errorf("revoked: %+v, %v", d, err)
		}
		// WeChat does not answer: what is known is shown all the same, and soon.
		time.Sleep(shownLife + time.Second)
		r.wx.set(func(f *fakeWeChat) { f.latency = time.Minute })
		for range 5 {
			start := time.Now()
			d, err = r.AuthorizerDetail(t.Context(), testPlatform2, testAuthorizer)
			if took := time.Since(start); err != nil || d.Asked || d.NickName != "店" || took > shownWait {
				t.Errorf("in %v: %+v, %v", took, d, err)
			}
			time.Sleep(10 * time.Second)
		}
		if n := r.wx.count(pathAuthorizerInfo); n != 2 {
			t.Errorf("WeChat was asked %d times", n-1)
		}
		r.wx.set(func(f *fakeWeChat) { f.latency = 0 })
		_ = r.store.Store(t.Context(), AuthorizerKey(testPlatform, appidOf(1)).recordName(), []byte("torn"))
		if d, err = r.AuthorizerDetail(t.Context(), "", appidOf(1)); err != nil || d.State != StateUnreadable {
			t.Errorf("unreadable: %+v, %v", d, err)
		}
		r.store.fail(func(string, string) error { return errDisk })
		if _, err := r.AuthorizerDetail(t.Context(), "", appidOf(2)); !errors.Is(err, ErrStore) {
			t.Errorf("without a store: %v", err)
		}
		r.store.fail(nil)
	})
}

func TestHeldToken(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		k := AccountKey(testAccount)
		if s := r.HeldToken(k); s != (TokenState{}) {
			t.Errorf("before the first use: %+v", s)
		}
		token := r.get(t, k)
		if s := r.HeldToken(k); !s.ExpiresAt.Equal(token.ExpiresAt) || !s.Live || s.Err != nil || s.Refused {
			t.Errorf("%+v", s)
		}
		time.Sleep(2*time.Hour - time.Minute)
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(string, map[string]any) (string, error) { return wxError(40164, "invalid ip 203.0.113.9"), nil }
		})
		r.get(t, k) // stale
		synctest.Wait()
		s := r.HeldToken(k)
		if !hasCode(s.Err, 40164) || s.Failures == 0 || s.FailedAt.IsZero() || !s.ExpiresAt.Equal(token.ExpiresAt) {
			t.Errorf("%+v", s)
		}
		if text := fmt.Sprintf("%+v", s); strings.Contains(text, token.Value.Reveal()) {
			t.Errorf("the token is shown: %s", text)
		}
	})
}

// A token that works is renewed because somebody says so: once for all who say so or wait, no more often than every so
// often, and nobody takes it for another system's doing.
func TestRenewNow(t *testing.T) {
	t.Parallel()
	for _, k := range []Key{testAuthKey, AccountKey(testAccount), ComponentKey(testPlatform)} {
		t.Run(string(k.Kind), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				r.authorize(t, testPlatform, testAuthorizer)
				before := r.get(t, k)
				time.Sleep(time.Second)
				var wg sync.WaitGroup
				soon := make(chan error, 10)
				for range 10 {
					wg.Go(func() {
						expires, err := r.RenewNow(t.Context(), k)
						if err == nil && !expires.After(before.ExpiresAt) {
							t.Errorf("the new token ends at %v, the old one at %v", expires, before.ExpiresAt)
						}
						soon <- err
					})
				}
				wg.Wait()
				refused := 0
				for range 10 {
					if err, ok := errors.AsType[*TooSoonError](<-soon); ok && err.After <= RenewNowEvery {
						refused++
					}
				}
				if refused != 9 {
					t.Errorf("%d of 10 at once were refused", refused)
				}
				after := r.get(t, k)
				if after.Value.Same(before.Value) || after.Generation != before.Generation+1 {
					t.Errorf("generation %d follows on %d", after.Generation, before.Generation)
				}
				if r.log.count("another system") != 0 {
					t.Error("a rogue refresher was made up")
				}
				time.Sleep(RenewNowEvery + time.Second)
				if _, err := r.RenewNow(t.Context(), k); err != nil {
					t.Errorf("a minute later: %v", err)
				}
				// Across a restart, with a token that has ended.
				time.Sleep(3 * time.Hour)
				r.restart()
				r.ticket(t, testPlatform)
				if _, err := r.RenewNow(t.Context(), k); err != nil {
					t.Errorf("of one that has ended: %v", err)
				}
			})
		})
	}
}

// WeChat may give the token that it gave: that is no failure where nobody says that it does not work.
func TestRenewNowGivesTheSame(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		before := r.get(t, testAuthKey)
		r.wx.set(func(f *fakeWeChat) {
			same := fmt.Sprintf(`{"authorizer_access_token":%q,"expires_in":7200,"authorizer_refresh_token":%q}`, before.Value.Reveal(), f.refresh[testAuthorizer])
			f.hook = func(path string, _ map[string]any) (string, error) {
				if path == pathAuthorizerToken {
					return same, nil
				}
				return "", nil
			}
		})
		time.Sleep(time.Minute)
		if expires, err := r.RenewNow(t.Context(), testAuthKey); err != nil || !expires.After(before.ExpiresAt) {
			t.Errorf("ends at %v, %v; it ended at %v", expires, err, before.ExpiresAt)
		}
		if _, err := r.Renew(t.Context(), testAuthKey, before.Value); !errors.Is(err, ErrBackoff) {
			t.Errorf("one that is refused: %v, want ErrBackoff", err)
		}
	})
}

// While WeChat does not give a new token, the old one serves on.
func TestRenewNowFails(t *testing.T) {
	t.Parallel()
	for _, k := range []Key{testAuthKey, AccountKey(testAccount), ComponentKey(testPlatform)} {
		t.Run(string(k.Kind), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				r.authorize(t, testPlatform, testAuthorizer)
				before := r.get(t, k)
				r.wx.set(func(f *fakeWeChat) {
					f.hook = func(string, map[string]any) (string, error) { return wxError(-1, "system error"), nil }
				})
				if _, err := r.RenewNow(t.Context(), k); !hasCode(err, -1) {
					t.Errorf("%v", err)
				}
				atOnce(t, func() {
					if now := r.get(t, k); !sameToken(now, before) {
						t.Error("the old token does not serve")
					}
				})
				if s := r.HeldToken(k); s.Refused || !hasCode(s.Err, -1) {
					t.Errorf("%+v", s)
				}
				r.store.fail(func(op, _ string) error {
					if op == "lock" {
						return errDisk
					}
					return nil
				})
				time.Sleep(RenewNowEvery + time.Second)
				if _, err := r.RenewNow(t.Context(), k); !errors.Is(err, ErrStore) {
					t.Errorf("without the store's lock: %v", err)
				}
				r.store.fail(nil)
			})
		})
	}
}

func TestRenewNowRefuses(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.Use(r.env)
		r.seed(t, testAuthKey, &record{Gen: 1, RefreshToken: secret.New("refreshtoken@@@1")})
		r.seed(t, AuthorizerKey(testPlatform, appidOf(1)), &record{Gen: 1})
		r.seed(t, AuthorizerKey(testPlatform, appidOf(2)), &record{Gen: 1, RevokedAt: time.Now()})
		for k, want := range map[Key]error{
			testAuthKey:                             ErrNoTicket,
			ComponentKey(testPlatform):              ErrNoTicket,
			ComponentKey("wx0"):                     ErrNotConfigured,
			AccountKey("wx0"):                       ErrNotConfigured,
			AuthorizerKey(testPlatform, "wx0"):      ErrNotAuthorized,
			AuthorizerKey(testPlatform, ""):         ErrNotAuthorized,
			AuthorizerKey("wx0", testAuthorizer):    ErrNotConfigured,
			AuthorizerKey(testPlatform, appidOf(1)): ErrNotAuthorized,
			AuthorizerKey(testPlatform, appidOf(2)): ErrNotAuthorized,
		} {
			for range 2 {
				if _, err := r.RenewNow(t.Context(), k); !errors.Is(err, want) {
					t.Errorf("%v: %v, want %v", k, err, want)
				}
			}
		}
	})
}

// What the gateway was told to forget stays forgotten, also for the list and for a code that was pushed before; the
// account can come back.
func TestForget(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		if _, err := r.Forget(t.Context(), testPlatform, testAuthorizer); !errors.Is(err, ErrNotAuthorized) {
			t.Errorf("unknown: %v", err)
		}
		if _, err := r.Forget(t.Context(), "wx0", testAuthorizer); !errors.Is(err, ErrNotConfigured) {
			t.Errorf("of no platform: %v", err)
		}
		r.authorize(t, testPlatform, testAuthorizer)
		if _, err := r.FetchAccountInfo(t.Context(), testPlatform, testAuthorizer); err != nil {
			t.Fatal(err)
		}
		r.get(t, testAuthKey)
		late := r.push(r.newCode(testAuthorizer))
		time.Sleep(time.Minute)
		for _, first := range []bool{true, false} {
			if dropped, err := r.Forget(t.Context(), testPlatform, testAuthorizer); err != nil || dropped != first {
				t.Fatalf("dropped %t, %v", dropped, err)
			}
		}
		forgotten := func(when string) {
			t.Helper()
			if _, err := r.Get(t.Context(), testAuthKey); !errors.Is(err, ErrNotAuthorized) {
				t.Errorf("%s: Get: %v", when, err)
			}
			if rec := r.stored(t, testAuthKey); !rec.revoked() || !rec.RefreshToken.IsZero() || !rec.AccessToken.IsZero() || rec.NickName != "N" {
				t.Errorf("%s: %+v", when, rec)
			}
		}
		forgotten("at once")
		if platforms, err := r.Holders(t.Context(), testAuthorizer); err != nil || platforms != nil {
			t.Errorf("Holders: %v, %v", platforms, err)
		}
		_ = r.Accept(t.Context(), late)
		time.Sleep(25 * time.Hour) // the list is read again
		r.ticket(t, testPlatform)
		time.Sleep(time.Minute)
		forgotten("a day later")
		r.restart()
		r.ticket(t, testPlatform)
		forgotten("after a restart")
		if err := r.Accept(t.Context(), r.push(r.newCode(testAuthorizer))); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		r.get(t, testAuthKey)
		// By WeChat's clock, which is ahead, it has authorised in the future.
		ahead := r.push(r.newCode(testAuthorizer))
		ahead.CreatedAt, ahead.ExpiresAt = time.Now().Add(10*time.Minute), time.Now().Add(70*time.Minute)
		if err := r.Accept(t.Context(), ahead); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if _, err := r.Forget(t.Context(), testPlatform, testAuthorizer); err != nil {
			t.Fatal(err)
		}
		forgotten("by a clock that is behind")
		r.authorize(t, testPlatform, testAuthorizer)
		r.store.fail(func(string, string) error { return errDisk })
		if _, err := r.Forget(t.Context(), testPlatform, testAuthorizer); !errors.Is(err, ErrStore) {
			t.Errorf("without a store: %v", err)
		}
		r.store.fail(nil)
		r.get(t, testAuthKey)
	})
}

// Exchanges that wait for their next attempt are tried when somebody says so, those too that another node has left.
func TestDrain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		if d, err := r.Drain(t.Context()); err != nil || d.Waiting != 0 || d.Failed != nil {
			t.Errorf("nothing to do: %+v, %v", d, err)
		}
		if _, err := r.Drain(t.Context()); err == nil {
			t.Error("again at once")
		} else if soon, ok := errors.AsType[*TooSoonError](err); !ok || soon.After != DrainEvery {
			t.Errorf("again at once: %v", err)
		}
		failing := func(fail func(path string) bool) {
			r.wx.set(func(f *fakeWeChat) {
				f.hook = func(path string, _ map[string]any) (string, error) {
					if fail(path) {
						return wxError(-1, "system error"), nil
					}
					return "", nil
				}
			})
		}
		failing(func(path string) bool { return path == pathQueryAuth })
		named, learned := r.push(r.newCode(testAuthorizer)), r.push(r.newCode(appidOf(1)))
		named.ExpiresAt, learned.AppID = time.Time{}, ""
		for _, in := range []Intent{named, learned} {
			if err := r.Accept(t.Context(), in); err != nil {
				t.Fatal(err)
			}
		}
		left := Intent{Platform: testPlatform, AppID: appidOf(2), Code: r.newCode(appidOf(2))}.received(time.Now())
		if err := r.storeRecord(t.Context(), r.env.prepared(), intentName(left.authCode().hash()), left.wire()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Minute)
		tried := r.wx.count(pathQueryAuth)
		start := time.Now()
		d, err := r.Drain(t.Context())
		if took := time.Since(start); took > time.Second {
			t.Errorf("it took %v", took)
		}
		if err != nil || d.Waiting != 3 || d.Tried != 3 || d.Done != 0 || len(d.Failed) != 3 || r.wx.count(pathQueryAuth) != tried+3 {
			t.Errorf("%+v, %v, %d calls", d, err, r.wx.count(pathQueryAuth)-tried)
		}
		appids := ""
		for _, f := range d.Failed {
			if appids += f.AppID; f.Platform != testPlatform || !hasCode(f.Err, -1) {
				t.Errorf("%+v", f)
			}
			if text := fmt.Sprint(f.Err); strings.Contains(text, "@@@") {
				t.Errorf("the code is told: %s", text)
			}
		}
		if !strings.Contains(appids, testAuthorizer) || !strings.Contains(appids, appidOf(2)) {
			t.Errorf("of %q", appids)
		}
		failing(func(string) bool { return false })
		time.Sleep(DrainEvery + time.Second)
		// One of the codes was used elsewhere, and stands for nothing.
		r.wx.set(func(f *fakeWeChat) {
			delete(f.codes, learned.Code.Reveal())
			f.latency = time.Second
		})
		d, err = r.Drain(t.Context())
		if err != nil || d.Tried > 3 || d.Done+len(d.Failed) != d.Waiting {
			t.Errorf("%+v, %v", d, err)
		}
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		for _, appid := range []string{testAuthorizer, appidOf(2)} {
			r.get(t, AuthorizerKey(testPlatform, appid))
		}
		if n := r.intents(t); n != 0 {
			t.Errorf("%d are left", n)
		}
		if n := len(r.Manager.intents.open()); n != 0 {
			t.Errorf("%d are remembered", n)
		}
	})
}

// A code that died is told as lost, an attempt that takes too long as under way, and a store that cannot be listed as that.
func TestDrainTells(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(path string, _ map[string]any) (string, error) {
				if path == pathQueryAuth {
					return wxError(-1, "system error"), nil
				}
				return "", nil
			}
		})
		if err := r.Accept(t.Context(), r.push(r.newCode(testAuthorizer))); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Minute)
		r.store.hold(func(op, _ string) {
			if op == "lock" {
				time.Sleep(30 * time.Second)
			}
		})
		start := time.Now()
		d, err := r.Drain(t.Context())
		if took := time.Since(start); err != nil || took != drainWait || d.Tried != 0 || len(d.Failed) != 1 || !errors.Is(d.Failed[0].Err, errExchangeRuns) {
			t.Errorf("in %v: %+v, %v", took, d, err)
		}
		r.store.hold(nil)
		time.Sleep(5 * time.Minute)
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(path string, _ map[string]any) (string, error) {
				switch path {
				case pathQueryAuth:
					return wxError(61010, "code is expired"), nil
				case pathAuthorizerInfo:
					return wxError(61003, "not authorized"), nil
				}
				return "", nil
			}
		})
		if d, err = r.Drain(t.Context()); err != nil || d.Tried != 1 || d.Done != 0 || len(d.Failed) != 1 || d.Failed[0].AppID != testAuthorizer ||
			!errors.Is(d.Failed[0].Err, errExchangeEnds) {
			t.Errorf("%+v, %v", d, err)
		}
		time.Sleep(time.Minute)
		r.store.fail(func(string, string) error { return errDisk })
		if _, err := r.Drain(t.Context()); !errors.Is(err, ErrStore) {
			t.Errorf("without a store: %v", err)
		}
		r.store.fail(nil)
	})
}

// Nothing waits for an attempt after the manager is closed, and nothing is done.
func TestOperationsAfterClose(t *testing.T) {
	t.Parallel()
	r := startedAwake(t)
	r.page(t, AuthorizerQuery{Text: "n"})
	r.Close()
	ctx := context.Background()
	for what, call := range map[string]func() error{
		"Authorizers":      func() error { _, err := r.Authorizers(ctx, AuthorizerQuery{Limit: 1}); return err },
		"AuthorizerDetail": func() error { _, err := r.AuthorizerDetail(ctx, "", testAuthorizer); return err },
		"Holders":          func() error { _, err := r.Holders(ctx, testAuthorizer); return err },
		"RenewNow":         func() error { _, err := r.RenewNow(ctx, testAuthKey); return err },
		"Forget":           func() error { _, err := r.Forget(ctx, testPlatform, testAuthorizer); return err },
		"Drain":            func() error { _, err := r.Drain(ctx); return err },
	} {
		if err := call(); !errors.Is(err, ErrClosed) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
