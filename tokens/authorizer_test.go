package tokens

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

var testAuthKey = AuthorizerKey(testPlatform, testAuthorizer)

// stored reads an authorizer's record from the store.
func (r *rig) stored(t testing.TB, k Key) *record {
	t.Helper()
	var wire recordWire
	if err := r.loadRecord(context.Background(), r.env.prepared(), k.recordName(), &wire); err != nil {
		t.Fatalf("record of %v: %v", k, err)
	}
	return wire.record()
}

func (r *rig) intents(t testing.TB) int {
	t.Helper()
	names, err := r.store.MemStore.List(context.Background(), intentFolder)
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

func (r *rig) push(code secret.String) Intent {
	return Intent{Platform: testPlatform, AppID: testAuthorizer, Code: code, CreatedAt: time.Now(), ExpiresAt: time.Now().Add(time.Hour), InfoType: "authorized"}
}

func TestAcceptedCodeIsExchanged(t *testing.T) {
	t.Parallel()
	for name, appid := range map[string]string{"named": testAuthorizer, "learned": ""} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				in := r.push(r.newCode(testAuthorizer))
				in.AppID = appid
				r.wx.set(func(f *fakeWeChat) { f.latency = time.Second }) // so that the exchange does not end before we look
				if err := r.Accept(t.Context(), in); err != nil {
					t.Fatal(err)
				}
				if r.intents(t) != 1 {
					t.Error("the intent is not durable when Accept returns")
				}
				time.Sleep(10 * time.Second)
				r.get(t, testAuthKey)
				a, err := r.Authorizer(t.Context(), testPlatform, testAuthorizer)
				if err != nil || !slices.Equal(a.FuncInfo, []int{1, 15}) || a.AppID != testAuthorizer || a.AuthorizedAt.Unix() != in.CreatedAt.Unix() {
					t.Errorf("Authorizer = %+v, %v", a, err)
				}
				if r.intents(t) != 0 {
					t.Error("the intent is still there after the exchange")
				}
				// The same push again, and again after a restart.
				for range 2 {
					if err := r.Accept(t.Context(), in); err != nil {
						t.Error(err)
					}
					time.Sleep(time.Minute)
					if appid != "" {
						r.restart()
					}
				}
				if n := r.wx.count(pathQueryAuth); n != 1 {
					t.Errorf("%d exchanges of one code", n)
				}
				if r.intents(t) != 0 {
					t.Error("an intent is left")
				}
			})
		})
	}
}

func TestPushAndRedirectShareOneExchange(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.wx.set(func(f *fakeWeChat) { f.latency = time.Second })
		code := r.newCode(testAuthorizer)
		if err := r.Accept(t.Context(), r.push(code)); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 5 {
			wg.Go(func() {
				a, err := r.ExchangeAuthCode(t.Context(), testPlatform, "", code)
				if err != nil || a.AppID != testAuthorizer {
					t.Errorf("ExchangeAuthCode = %+v, %v", a, err)
				}
			})
		}
		wg.Wait()
		if a, err := r.ExchangeAuthCode(t.Context(), testPlatform, "", code); err != nil || a.AppID != testAuthorizer {
			t.Errorf("a late redirect: %+v, %v", a, err)
		}
		time.Sleep(time.Minute)
		if n := r.wx.count(pathQueryAuth); n != 1 {
			t.Errorf("%d exchanges of one code", n)
		}
		if r.intents(t) != 0 {
			t.Error("the intent is left")
		}
	})
}

// WeChat delivers one code of an authorization by push and another by redirect, at the same time, and holds what the last one
// brought. A redirect's account is not known before.
func TestRedirectWaitsForPush(t *testing.T) {
	t.Parallel()
	for name, hangs := range map[string]bool{"a second": false, "longer than it can wait": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				r.get(t, ComponentKey(testPlatform))
				pushed, redirected := r.newCode(testAuthorizer), r.newCode(testAuthorizer)
				var mu sync.Mutex
				var order []string
				r.wx.set(func(f *fakeWeChat) {
					f.hook = func(path string, body map[string]any) (string, error) {
						if path != pathQueryAuth {
							return "", nil
						}
						which, slow := "redirect", time.Duration(0)
						if body["authorization_code"] == pushed.Reveal() {
							which, slow = "push", time.Second
							if hangs {
								slow = 2 * exchangeTurn
							}
						}
						time.Sleep(slow)
						mu.Lock()
						defer mu.Unlock()
						order = append(order, which)
						return "", nil
					}
				})
				if err := r.Accept(t.Context(), r.push(pushed)); err != nil {
					t.Fatal(err)
				}
				time.Sleep(10 * time.Millisecond)
				began := time.Now()
				if _, err := r.ExchangeAuthCode(t.Context(), testPlatform, "", redirected); err != nil {
					t.Fatal(err)
				}
				if took := time.Since(began); took > exchangeTurn+time.Second {
					t.Errorf("the redirect took %v", took)
				}
				time.Sleep(time.Minute)
				want := []string{"push", "redirect"}
				if hangs {
					want = []string{"redirect", "push"}
				}
				mu.Lock()
				defer mu.Unlock()
				if !slices.Equal(order, want) {
					t.Errorf("exchanged in the order %v, want %v", order, want)
				}
				if !hangs {
					r.get(t, testAuthKey)
				}
			})
		})
	}
}

func TestIntentSurvivesACrash(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(string, map[string]any) (string, error) { return "", errors.New("no route to host") }
		})
		if err := r.Accept(t.Context(), r.push(r.newCode(testAuthorizer))); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Minute)
		attempts := r.wx.count(pathComponentToken)
		if attempts < 3 || attempts > 20 {
			t.Errorf("%d attempts in five minutes", attempts)
		}
		r.store.fail(failAll)
		r.restart() // with a store that is not up yet
		time.Sleep(time.Minute)
		r.store.fail(nil)
		r.wx.set(func(f *fakeWeChat) { f.hook = nil })
		time.Sleep(3 * time.Minute)
		r.get(t, testAuthKey)
		if r.intents(t) != 0 {
			t.Error("the intent is left")
		}
	})
}

// A store that lists what was accepted and does not give it is asked again: a restart must not lose a code.
func TestIntentThatIsNotGivenAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := startedWithOpenCode(t)
		time.Sleep(time.Minute)
		r.Close()
		r.wx.set(func(f *fakeWeChat) { f.hook = nil })
		refused := 0
		r.store.fail(func(op, name string) error {
			if op == "load" && strings.HasPrefix(name, intentFolder) {
				refused++
				return errDisk
			}
			return nil
		})
		r.Manager = NewManager()
		r.Use(r.env)
		synctest.Wait()
		if refused == 0 {
			t.Fatal("what was accepted was not asked for")
		}
		r.store.fail(nil)
		time.Sleep(5 * time.Minute)
		r.get(t, testAuthKey)
		if r.intents(t) != 0 {
			t.Error("the intent is left")
		}
	})
}

func TestIntentEndsWithItsCode(t *testing.T) {
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
		in := r.push(r.newCode(testAuthorizer))
		in.ExpiresAt = time.Time{}                                       // an hour
		r.wx.set(func(f *fakeWeChat) { f.refresh[testAuthorizer] = "" }) // as long as no code was exchanged
		if err := r.Accept(t.Context(), in); err != nil {
			t.Fatal(err)
		}
		time.Sleep(59 * time.Minute)
		if r.intents(t) != 1 {
			t.Error("given up before the code died")
		}
		time.Sleep(3 * time.Minute)
		if r.intents(t) != 0 {
			t.Error("kept after the code died")
		}
		if r.log.count("level=ERROR msg=\"authorization code died") != 1 {
			t.Error("nobody was told")
		}
		if got := r.Orphans(testPlatform); !slices.Equal(got, []string{testAuthorizer}) {
			t.Errorf("orphans: %v", got)
		}
	})
}

func TestUsedCode(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		unknown := secret.New("queryauthcode@@@unknown")
		if _, err := r.ExchangeAuthCode(t.Context(), testPlatform, testAuthorizer, unknown); !hasCode(err, 61009) {
			t.Errorf("a used code without tokens held: %v, want 61009", err)
		}
		if err := r.Accept(t.Context(), r.push(unknown)); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if r.intents(t) != 1 {
			t.Error("given up at once: another node may have used the code, and not written its tokens yet")
		}
		time.Sleep(usedCodeGrace + 2*backoffMost)
		if r.intents(t) != 0 {
			t.Error("a dead code is kept")
		}
		pushed := time.Now()
		time.Sleep(time.Second)
		r.authorize(t, testPlatform, testAuthorizer)
		if a, err := r.ExchangeAuthCode(t.Context(), testPlatform, testAuthorizer, unknown); err != nil || a.AppID != testAuthorizer {
			t.Errorf("a used code with tokens held: %+v, %v", a, err)
		}
		// Tokens obtained since the push count as done, older ones do not; of those of a redirect WeChat is asked whether they work.
		for _, test := range []struct {
			at      time.Time
			instead int
		}{{pushed, 1}, {time.Now().Add(time.Hour), 2}} {
			in := r.push(secret.New("queryauthcode@@@" + test.at.String()))
			in.CreatedAt, in.ExpiresAt = test.at, test.at.Add(time.Hour)
			if err := r.Accept(t.Context(), in); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Until(test.at) + usedCodeGrace + 2*backoffMost)
			if died, instead := r.log.count("authorization code died"), r.log.count("the refresh token that WeChat names is held"); died != 1 || instead != test.instead {
				t.Errorf("pushed at %v: %d codes died, %d were made good, want %d", test.at, died, instead, test.instead)
			}
		}
	})
}

func TestExchangeErrors(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		code := secret.New("queryauthcode@@@1")
		for name, test := range map[string]struct {
			platform, appid string
			code            secret.String
		}{
			"unknown platform": {"wxunknown", testAuthorizer, code},
			"no code":          {testPlatform, testAuthorizer, secret.String{}},
			"long appid":       {testPlatform, strings.Repeat("a", maxID+1), code},
		} {
			if _, err := r.ExchangeAuthCode(t.Context(), test.platform, test.appid, test.code); err == nil {
				t.Errorf("%s: exchanged", name)
			}
			if err := r.Accept(t.Context(), Intent{Platform: test.platform, AppID: test.appid, Code: test.code}); err == nil {
				t.Errorf("%s: accepted", name)
			}
		}
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(path string, _ map[string]any) (string, error) {
				if path == pathQueryAuth {
					return `{"authorization_info":{}}`, nil
				}
				return "", nil
			}
		})
		if _, err := r.ExchangeAuthCode(t.Context(), testPlatform, "", code); !errors.Is(err, ErrUnreachable) {
			t.Errorf("an answer without an account: %v", err)
		}
	})
}

func TestAcceptIsDurableOrFails(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.store.fail(failWrites)
		if err := r.Accept(t.Context(), r.push(r.newCode(testAuthorizer))); !errors.Is(err, ErrStore) {
			t.Errorf("Accept: %v, want ErrStore", err)
		}
		time.Sleep(time.Minute)
		if n := r.wx.count(pathQueryAuth); n != 0 {
			t.Error("a code that was not accepted was exchanged")
		}
	})
}

func TestReauthorizationBeatsARefreshUnderWay(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		old := r.get(t, testAuthKey)
		r.wx.set(func(f *fakeWeChat) {
			f.rotate = true
			f.hook = func(path string, _ map[string]any) (string, error) {
				if path == pathAuthorizerToken {
					time.Sleep(5 * time.Second)
				}
				return "", nil
			}
		})
		refreshed := make(chan Token)
		go func() {
			token, err := r.Renew(t.Context(), testAuthKey, old.Value)
			if err != nil {
				t.Errorf("Renew: %v", err)
			}
			refreshed <- token
		}()
		time.Sleep(time.Second)
		start := time.Now()
		r.authorize(t, testPlatform, testAuthorizer)
		if took := time.Since(start); took > 100*time.Millisecond {
			t.Errorf("the re-authorization waited %v for the refresh", took)
		}
		swapped := r.stored(t, testAuthKey)
		if got := <-refreshed; !got.Value.Same(swapped.AccessToken) {
			t.Error("the refresh with the old refresh token won")
		}
		if now := r.stored(t, testAuthKey); !now.RefreshToken.Same(swapped.RefreshToken) || now.Gen != swapped.Gen {
			t.Error("the record of the re-authorization was overwritten")
		}
	})
}

func TestEmptyRefreshTokenNeverOverwrites(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		held := r.stored(t, testAuthKey).RefreshToken
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(path string, _ map[string]any) (string, error) {
				switch path {
				case pathAuthorizerToken:
					return `{"authorizer_access_token":"authorizer-token-bare","expires_in":7200,"authorizer_refresh_token":""}`, nil
				case pathQueryAuth:
					return `{"authorization_info":{"authorizer_appid":"` + testAuthorizer + `","func_info":[]}}`, nil
				}
				return "", nil
			}
		})
		if _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); err != nil {
			t.Fatal(err)
		}
		if !r.stored(t, testAuthKey).RefreshToken.Same(held) {
			t.Error("a refresh emptied the refresh token")
		}
		r.authorize(t, testPlatform, testAuthorizer)
		if !r.stored(t, testAuthKey).RefreshToken.Same(held) {
			t.Error("an authorization without tokens emptied the refresh token")
		}
		if token := r.get(t, testAuthKey); token.Value.Reveal() != "authorizer-token-bare" {
			t.Error("an authorization without tokens took the access token away")
		}
	})
}

func TestAuthorizationWithoutAPIPermission(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(path string, _ map[string]any) (string, error) {
				if path == pathQueryAuth {
					return `{"authorization_info":{"authorizer_appid":"` + testAuthorizer + `"}}`, nil
				}
				return "", nil
			}
		})
		r.authorize(t, testPlatform, testAuthorizer)
		if _, err := r.Authorizer(t.Context(), testPlatform, testAuthorizer); err != nil {
			t.Errorf("Authorizer: %v", err)
		}
		if _, err := r.Get(t.Context(), testAuthKey); !errors.Is(err, ErrNotAuthorized) {
			t.Errorf("Get: %v, want ErrNotAuthorized", err)
		}
		if n := r.wx.count(pathAuthorizerToken); n != 0 {
			t.Error("WeChat was asked with an empty refresh token")
		}
	})
}

func TestRevoke(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		time.Sleep(time.Minute)
		r.authorize(t, testPlatform, testAuthorizer)
		r.get(t, testAuthKey)
		revoke := func(at time.Time) {
			t.Helper()
			if err := r.Revoke(t.Context(), testPlatform, testAuthorizer, at); err != nil {
				t.Fatalf("Revoke: %v", err)
			}
		}
		revoke(time.Now().Add(-time.Minute))
		r.get(t, testAuthKey) // older than the authorization: ignored
		time.Sleep(time.Minute)
		revoke(time.Now())
		gone := func() {
			t.Helper()
			if _, err := r.Get(t.Context(), testAuthKey); !errors.Is(err, ErrNotAuthorized) {
				t.Errorf("Get: %v, want ErrNotAuthorized", err)
			}
			if _, err := r.Renew(t.Context(), testAuthKey, secret.New("x")); !errors.Is(err, ErrNotAuthorized) {
				t.Errorf("Renew: %v, want ErrNotAuthorized", err)
			}
			if _, err := r.Authorizer(t.Context(), testPlatform, testAuthorizer); !errors.Is(err, ErrNotAuthorized) {
				t.Errorf("Authorizer: %v, want ErrNotAuthorized", err)
			}
			if _, err := r.PlatformOf(t.Context(), testAuthorizer); !errors.Is(err, ErrNotAuthorized) {
				t.Errorf("PlatformOf: %v, want ErrNotAuthorized", err)
			}
		}
		gone()
		writes := r.store.count("store")
		revoke(time.Now())
		if r.store.count("store") != writes {
			t.Error("a revocation that came twice was written twice")
		}
		r.restart()
		gone()
		if rec := r.stored(t, testAuthKey); !rec.RefreshToken.IsZero() || !rec.AccessToken.IsZero() {
			t.Error("the tokens outlive the authorization")
		}
		// An authorization from before the revocation does not bring the account back, a newer one does.
		late := r.push(r.newCode(testAuthorizer))
		late.CreatedAt = time.Now().Add(-time.Minute)
		if err := r.Accept(t.Context(), late); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		time.Sleep(absentRecheck)
		gone()
		if r.intents(t) != 0 {
			t.Error("the late intent is left")
		}
		r.authorize(t, testPlatform, testAuthorizer)
		r.get(t, testAuthKey)
	})
}

// A pushed authorization counts if it is not older than the latest revocation, whatever came in which order.
func TestAuthorizationAfterRevocations(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		revoked    []time.Duration // after the authorization that is held
		authorized time.Duration
		back       bool
	}{
		"later":                     {[]time.Duration{time.Minute}, 2 * time.Minute, true},
		"in the same second":        {[]time.Duration{time.Minute}, time.Minute, true},
		"earlier":                   {[]time.Duration{2 * time.Minute}, time.Minute, false},
		"between two":               {[]time.Duration{time.Minute, 3 * time.Minute}, 2 * time.Minute, false},
		"between two that overtook": {[]time.Duration{3 * time.Minute, time.Minute}, 2 * time.Minute, false},
		"after two":                 {[]time.Duration{time.Minute, 3 * time.Minute}, 4 * time.Minute, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				r.authorize(t, testPlatform, testAuthorizer)
				begin := time.Now()
				time.Sleep(time.Hour)
				for _, d := range tt.revoked {
					if err := r.Revoke(t.Context(), testPlatform, testAuthorizer, begin.Add(d)); err != nil {
						t.Fatal(err)
					}
				}
				in := r.push(r.newCode(testAuthorizer))
				in.CreatedAt = begin.Add(tt.authorized)
				if err := r.Accept(t.Context(), in); err != nil {
					t.Fatal(err)
				}
				time.Sleep(absentRecheck)
				if _, err := r.Get(t.Context(), testAuthKey); (err == nil) != tt.back || err != nil && !errors.Is(err, ErrNotAuthorized) {
					t.Errorf("Get: %v, want it back: %v", err, tt.back)
				}
			})
		})
	}
}

func TestRevokeBeatsARefreshUnderWay(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		r.get(t, testAuthKey)
		r.wx.set(func(f *fakeWeChat) { f.latency = 5 * time.Second })
		done := make(chan error)
		go func() { _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); done <- err }()
		time.Sleep(time.Second)
		if err := r.Revoke(t.Context(), testPlatform, testAuthorizer, time.Now()); err != nil {
			t.Fatal(err)
		}
		if err := <-done; !errors.Is(err, ErrNotAuthorized) {
			t.Errorf("the refresh: %v, want ErrNotAuthorized", err)
		}
		if !r.stored(t, testAuthKey).revoked() {
			t.Error("the refresh brought the account back")
		}
	})
}

func TestRevokeIsDurableOrFails(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		for name, fault := range map[string]func(op, name string) error{"all": failAll, "writes": failWrites, "store": func(op, _ string) error {
			if op == "store" {
				return errDisk
			}
			return nil
		}} {
			r.store.fail(fault)
			if err := r.Revoke(t.Context(), testPlatform, testAuthorizer, time.Now()); !errors.Is(err, ErrStore) {
				t.Errorf("%s: Revoke: %v, want ErrStore", name, err)
			}
		}
		if err := r.Revoke(t.Context(), "wxunknown", testAuthorizer, time.Now()); !errors.Is(err, ErrNotConfigured) {
			t.Errorf("unknown platform: %v", err)
		}
	})
}

func TestRevokeOnAnotherNode(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		other := NewManager()
		defer other.Close()
		other.Use(r.env)
		if _, err := other.Get(t.Context(), testAuthKey); !errors.Is(err, ErrNotAuthorized) {
			t.Fatalf("Get: %v", err)
		}
		r.authorize(t, testPlatform, testAuthorizer)
		time.Sleep(absentRecheck)
		token, err := other.Get(t.Context(), testAuthKey)
		if err != nil {
			t.Fatalf("the authorization is not seen on the other node: %v", err)
		}
		time.Sleep(time.Minute)
		if err := r.Revoke(t.Context(), testPlatform, testAuthorizer, time.Now()); err != nil {
			t.Fatal(err)
		}
		if _, err := other.Renew(t.Context(), testAuthKey, token.Value); !errors.Is(err, ErrNotAuthorized) {
			t.Errorf("Renew on the other node: %v, want ErrNotAuthorized", err)
		}
	})
}

func TestUnauthorizedSaysWeChat(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		r.wx.set(func(f *fakeWeChat) { delete(f.refresh, testAuthorizer) })
		_, err := r.Renew(t.Context(), testAuthKey, secret.String{})
		if !errors.Is(err, ErrNotAuthorized) || !hasCode(err, 61003) {
			t.Errorf("Renew: %v, want ErrNotAuthorized and 61003", err)
		}
		if r.stored(t, testAuthKey).RefreshToken.IsZero() {
			t.Error("WeChat's word alone deleted the refresh token")
		}
	})
}

func TestComponentTokenIsHealedOnTheWay(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		r.wx.kill(r.get(t, ComponentKey(testPlatform)))
		if _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); err != nil {
			t.Errorf("refresh with a dead component token: %v", err)
		}
		r.wx.kill(r.get(t, ComponentKey(testPlatform)))
		r.authorize(t, testPlatform, testAuthorizer)
		if n := r.wx.count(pathComponentToken); n != 3 {
			t.Errorf("%d component tokens, want 3", n)
		}
	})
}

// What is wrong with the platform is not held against each of its accounts.
func TestPlatformTroubleIsNotTheAuthorizers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		time.Sleep(3 * time.Hour)
		r.ticket(t, testPlatform)
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(path string, _ map[string]any) (string, error) {
				if path == pathComponentToken {
					return wxError(61004, "access clientip is not registered"), nil
				}
				return "", nil
			}
		})
		for range 10 {
			if _, err := r.Get(t.Context(), testAuthKey); !hasCode(err, 61004) {
				t.Errorf("Get: %v, want 61004", err)
			}
			time.Sleep(time.Second)
		}
		r.wx.set(func(f *fakeWeChat) { f.hook = nil })
		r.ticket(t, testPlatform) // the platform's back-off is over with a new ticket
		r.get(t, testAuthKey)
	})
}

func TestPlatformOf(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		want := func(platform string) {
			t.Helper()
			if got, err := r.PlatformOf(t.Context(), testAuthorizer); err != nil || got != platform {
				t.Errorf("PlatformOf = %q, %v; want %q", got, err, platform)
			}
		}
		r.authorize(t, testPlatform2, testAuthorizer)
		want(testPlatform2)
		reads := r.store.count("load")
		for range 100 {
			want(testPlatform2)
		}
		if n := r.store.count("load") - reads; n != 0 {
			t.Errorf("%d reads of the store for an account in use", n)
		}
		r.authorize(t, testPlatform, testAuthorizer)
		want(testPlatform) // the order of the configuration
		r.store.fail(failAll)
		if _, err := r.PlatformOf(t.Context(), "wx00000000000000ff"); !errors.Is(err, ErrStore) {
			t.Errorf("while the store fails: %v, want ErrStore", err)
		}
		if _, err := r.PlatformOf(t.Context(), ""); !errors.Is(err, ErrNotAuthorized) {
			t.Errorf("no appid: %v", err)
		}
		want(testPlatform)
	})
}

// Which messages an account granted tells what it is.
func TestIsMiniProgram(t *testing.T) {
	t.Parallel()
	type kind struct{ mini, known bool }
	unknown, mini, official := kind{}, kind{true, true}, kind{false, true}
	of := func(m *Manager) kind {
		is, known := m.IsMiniProgram(testPlatform, testAuthorizer)
		return kind{is && known, known}
	}
	if got := of(NewManager()); got != unknown {
		t.Errorf("before there is a configuration: %+v", got)
	}
	for sets, want := range map[string]kind{"19": mini, "17,19,20": mini, "1,19": unknown, "1": official, "7,1": official, "18": unknown, "": unknown} {
		synctest.Test(t, func(t *testing.T) {
			r := started(t)
			var list []string
			for id := range strings.SplitSeq(sets, ",") {
				list = append(list, `{"funcscope_category":{"id":"`+id+`"}}`)
			}
			r.wx.set(func(f *fakeWeChat) {
				f.hook = func(path string, _ map[string]any) (string, error) {
					if path != pathQueryAuth {
						return "", nil
					}
					return fmt.Sprintf(`{"authorization_info":{"authorizer_appid":%q,"authorizer_access_token":"authorizer-token-x","expires_in":7200,"authorizer_refresh_token":"refreshtoken@@@x","func_info":[%s]}}`,
						testAuthorizer, strings.Join(list, ",")), nil
				}
			})
			if got := of(r.Manager); got != unknown {
				t.Errorf("%q: before it authorised: %+v", sets, got)
			}
			if _, err := r.Authorizer(t.Context(), testPlatform, testAuthorizer); !errors.Is(err, ErrNotAuthorized) || of(r.Manager) != unknown {
				t.Errorf("%q: when it is known that it did not: %v", sets, err)
			}
			r.authorize(t, testPlatform, testAuthorizer)
			if got := of(r.Manager); got != want {
				t.Errorf("%q: got %+v, want %+v", sets, got, want)
			}
			if err := r.Revoke(t.Context(), testPlatform, testAuthorizer, time.Now().Add(time.Second)); err != nil || of(r.Manager) != unknown {
				t.Errorf("%q: after it revoked (%v)", sets, err)
			}
		})
	}
}

// What holds no permission set is none: with the id 0 an account of which none is known would count as one that granted
// nothing that is needed.
func TestFuncInfo(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]funcInfo{
		`[{"funcscope_category":{"id":1}},{"funcscope_category":{"id":"15"},"confirm_info":{"need_confirm":0}}]`: {1, 15},
		`[{"funcscope_category":{"id":7}},{"funcscope_category":{}},{},null,{"funcscope_category":null}]`:        {7},
		`[{"funcscope_category":{"id":0}},{"funcscope_category":{"id":-3}},{"funcscope_category":{"id":""}}]`:    nil,
		`[]`: nil, `null`: nil, `""`: nil, `{"funcscope_category":{"id":1}}`: nil,
	} {
		var got funcInfo
		if err := json.Unmarshal([]byte(text), &got); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: got %v, %v, want %v", text, got, err, want)
		}
	}
}

// A code is used up by the answer that brings its tokens: nothing beside them may make that unreadable.
func TestOddPermissionSetsCostNoTokens(t *testing.T) {
	t.Parallel()
	for _, odd := range []string{`""`, `{}`, `[{"funcscope_category":{"id":"x"}},{"funcscope_category":{"id":7}}]`, `[{"funcscope_category":[]}]`, `[1]`} {
		synctest.Test(t, func(t *testing.T) {
			r := started(t)
			r.wx.set(func(f *fakeWeChat) {
				f.hook = func(path string, body map[string]any) (string, error) {
					if path == pathQueryAuth {
						return fmt.Sprintf(`{"authorization_info":{"authorizer_appid":%q,"authorizer_access_token":"authorizer-token-x","expires_in":7200,"authorizer_refresh_token":"refreshtoken@@@x","func_info":%s}}`, testAuthorizer, odd), nil
					}
					return "", nil
				}
			})
			if _, err := r.ExchangeAuthCode(t.Context(), testPlatform, testAuthorizer, secret.New("queryauthcode@@@1")); err != nil {
				t.Errorf("%s: the tokens are lost: %v", odd, err)
			}
		})
	}
}
