package tokens

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// What WeChat names takes the place of what is held only where that is nothing, or does not work, or is older by WeChat's own time.
func TestAdoptable(t *testing.T) {
	t.Parallel()
	at := time.Unix(1_700_000_000, 0)
	named, held := secret.New("named"), secret.New("held")
	for name, tt := range map[string]struct {
		cur             *record
		named           secret.String
		at              time.Time
		void            bool
		adopted, undate bool
	}{
		"nothing is named":        {cur: nil},
		"nothing is named either": {cur: &record{AuthorizedHere: true}, at: at},
		"nothing is held":         {cur: nil, named: named, adopted: true},
		"revoked then":            {cur: &record{RevokedAt: at, AuthorizedHere: true}, named: named, at: at},
		"revoked before":          {cur: &record{RevokedAt: at}, named: named, at: at.Add(time.Second), adopted: true},
		"the same":                {cur: &record{RefreshToken: named, AuthorizedAt: at, AuthorizedHere: true}, named: named, at: at.Add(time.Hour)},
		"the same, by a push":     {cur: &record{RefreshToken: named, AuthorizedAt: at}, named: named, at: at.Add(time.Hour)},
		"no refresh token":        {cur: &record{AuthorizedAt: at}, named: named, adopted: true},
		"a void one":              {cur: &record{RefreshToken: held, AuthorizedAt: at}, named: named, void: true, adopted: true},
		"dated the same":          {cur: &record{RefreshToken: held, AuthorizedAt: at}, named: named, at: at},
		"dated later":             {cur: &record{RefreshToken: held, AuthorizedAt: at}, named: named, at: at.Add(time.Second), adopted: true},
		"dated by our clock":      {cur: &record{RefreshToken: held, AuthorizedAt: at, AuthorizedHere: true}, named: named, at: at.Add(time.Second), undate: true},
	} {
		m := NewManager()
		if tt.void {
			m.troubles.setVoid(testAuthKey, held)
		}
		if got := m.adoptable(testAuthKey, tt.cur, tt.named, tt.at); got != tt.adopted {
			t.Errorf("%s: adoptable %v", name, got)
		}
		if got := tt.cur.undated(tt.named); got != tt.undate {
			t.Errorf("%s: undated %v", name, got)
		}
		m.Close()
	}
}

// A refresh token that a visitor's code brought gives way to another one that WeChat names only to who knows that nothing has come since;
// what else is known of the account stays, but for the access token, which may be void.
func TestAdoptionOfAnUndatedAuthorization(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		r.authorize(t, testPlatform, testAuthorizer)
		env := r.Manager.env.Load()
		_, err := r.commit(t.Context(), env, testAuthKey, false, func(cur *record) *record {
			next := *cur
			next.NickName = "name"
			return &next
		})
		if err != nil {
			t.Fatal(err)
		}
		before := r.stored(t, testAuthKey)
		info := accountInfo{refresh: secret.New("refreshtoken@@@named")}
		adopt := func(at time.Time, alone bool) *record {
			t.Helper()
			if _, err := r.adopt(t.Context(), env, testAuthKey, info, at, alone); err != nil {
				t.Fatal(err)
			}
			return r.stored(t, testAuthKey)
		}
		if got := adopt(before.AuthorizedAt.Add(time.Hour), false); !got.same(before) {
			t.Error("taken although a code may have been exchanged meanwhile")
		}
		for range 2 {
			r.troubles.failed(testAuthKey, errors.New("refused"))
		}
		got := adopt(before.AuthorizedAt.Add(-time.Hour), true)
		switch {
		case !got.RefreshToken.Same(info.refresh):
			t.Error("not taken")
		case !got.AccessToken.IsZero():
			t.Error("the access token of the one before is held")
		case got.NickName != before.NickName || !slices.Equal(got.FuncInfo, before.FuncInfo):
			t.Error("what else was known is lost")
		case !got.AuthorizedAt.Equal(before.AuthorizedAt) || !got.AuthorizedHere:
			t.Errorf("dated %v, before it was %v", got.AuthorizedAt, before.AuthorizedAt)
		}
		if err := r.troubles.hold(testAuthKey); err != nil {
			t.Errorf("the troubles of before hold it back: %v", err)
		}
	})
}

// While WeChat is asked for what the store holds otherwise, or has lost, no code of the account is exchanged, on any node, nor one of nobody
// knows whom here; and no token of it is renewed in the former case.
func TestNothingChangesWhileWeChatIsAsked(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		asks   func(*testing.T, *rig) error
		renews bool
	}{
		"reconsider": {func(t *testing.T, r *rig) error {
			return r.reconsider(t.Context(), r.Manager.env.Load(), testAuthKey, time.Now())
		}, false},
		"restore": {func(t *testing.T, r *rig) error {
			_, err := r.restore(t.Context(), r.Manager.env.Load(), newEntry(testAuthKey, nil, time.Now()))
			return err
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := healing(t)
				asked := false
				held := func(lock string) bool { return r.locks.taken(lock) && r.store.MemStore.locks.taken(lock) }
				r.wx.set(func(f *fakeWeChat) {
					f.refresh[testAuthorizer] = "refreshtoken@@@named"
					f.hook = func(path string, _ map[string]any) (string, error) {
						if path != pathAuthorizerInfo || asked {
							return "", nil
						}
						asked = true
						name := testAuthKey.recordName()
						if !held(name + exchangeLock) {
							t.Error("a code of the account could be exchanged")
						}
						if got := held(name + renewalLock); got == tt.renews {
							t.Errorf("the lock for renewals is held: %v", got)
						}
						if r.turns.TryAcquire(allTurns) {
							t.Error("a code of nobody knows whom could be exchanged")
							r.turns.Release(allTurns)
						}
						return "", nil
					}
				})
				if err := tt.asks(t, r); err != nil || !asked {
					t.Errorf("asked %v: %v", asked, err)
				}
				if !r.turns.TryAcquire(allTurns) || r.locks.taken(testAuthKey.recordName()+exchangeLock) {
					t.Error("codes are not exchanged any more")
				}
			})
		})
	}
}

// A lost account of which WeChat has no refresh token either has to authorise again, and is told as one; what else keeps it from being had is
// said rarely.
func TestLostAccountThatWeChatDoesNotGive(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.env.Platforms, r.env.RosterEvery = r.env.Platforms[:1], 24*time.Hour
		r.wx.refresh[testAuthorizer] = "refreshtoken@@@named"
		r.wx.listing = map[string]string{testAuthorizer: ""}
		busy := false
		r.wx.hook = func(path string, _ map[string]any) (string, error) {
			if path == pathAuthorizerList || busy && path == pathAuthorizerInfo {
				return wxError(-1, "system busy"), nil
			}
			return "", nil
		}
		r.Use(r.env)
		r.ticket(t, testPlatform)
		if _, err := r.Get(t.Context(), testAuthKey); !errors.Is(err, errNoRefreshToken) {
			t.Errorf("Get: %v", err)
		}
		if got := r.Orphans(testPlatform); !slices.Equal(got, []string{testAuthorizer}) {
			t.Errorf("orphans: %v", got)
		}
		r.wx.set(func(*fakeWeChat) { busy = true })
		before := r.log.count("cannot be asked for")
		for range 60 {
			time.Sleep(10 * time.Second)
			if _, err := r.Get(t.Context(), testAuthKey); err == nil {
				t.Fatal("it has a token")
			}
		}
		if n := r.log.count("cannot be asked for") - before; n > 1 {
			t.Errorf("said %d times in ten minutes", n)
		}
	})
}

// An account whose record was damaged, and that WeChat does not know, is asked for once.
func TestDamagedAccountThatWeChatDoesNotKnow(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		time.Sleep(time.Minute)
		r.rosters.miss(testAuthKey)
		for range 20 {
			if _, err := r.Get(t.Context(), testAuthKey); !errors.Is(err, ErrNotAuthorized) {
				t.Fatalf("Get: %v", err)
			}
			time.Sleep(time.Minute)
		}
		if n := r.wx.count(pathAuthorizerInfo); n != 1 {
			t.Errorf("asked %d times", n)
		}
	})
}

// A refresh token that WeChat called void gives way to whatever its list names later, whenever that was authorised.
func TestVoidRefreshTokenIsReplacedByTheList(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		if err := r.Accept(t.Context(), r.push(r.newCode(testAuthorizer))); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		r.wx.kill(r.get(t, testAuthKey))
		lists := r.wx.count(pathAuthorizerList)
		r.wx.set(func(f *fakeWeChat) {
			f.strict, f.refresh[testAuthorizer] = true, "refreshtoken@@@elsewhere"
			f.listing = map[string]string{testAuthorizer: ""}
		})
		if _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); !hasCode(err, codeRefreshTokenInvalid) {
			t.Fatalf("Renew: %v", err)
		}
		r.wx.set(func(f *fakeWeChat) { f.listing = nil })
		time.Sleep(15 * time.Minute)
		if n := r.wx.count(pathAuthorizerList) - lists; n != 1 {
			t.Errorf("the list was read %d times for it", n)
		}
		if got := r.stored(t, testAuthKey).RefreshToken.Reveal(); got != "refreshtoken@@@elsewhere" {
			t.Errorf("held: %s", got)
		}
	})
}

// What WeChat names in the place of a void refresh token is kept also where the answer to it has none.
func TestNamedRefreshTokenIsKept(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		r.authorize(t, testPlatform, testAuthorizer)
		r.wx.kill(r.get(t, testAuthKey))
		r.wx.set(func(f *fakeWeChat) {
			f.strict, f.refresh[testAuthorizer] = true, "refreshtoken@@@elsewhere"
			f.hook = func(path string, body map[string]any) (answer string, err error) {
				if path == pathAuthorizerToken && body["authorizer_refresh_token"] == "refreshtoken@@@elsewhere" {
					r.wx.set(func(f *fakeWeChat) {
						answer = `{"authorizer_access_token":"` + f.issue("authorizer") + `","expires_in":7200}`
					})
				}
				return answer, nil
			}
		})
		if _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); err != nil {
			t.Fatal(err)
		}
		if got := r.stored(t, testAuthKey).RefreshToken.Reveal(); got != "refreshtoken@@@elsewhere" {
			t.Errorf("held: %s", got)
		}
	})
}

// A revocation that is older than the authorization leaves the token as it is.
func TestOlderRevocationCostsNoRenewal(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		want := r.get(t, testAuthKey)
		if err := r.Revoke(t.Context(), testPlatform, testAuthorizer, time.Now().Add(-time.Hour)); err != nil {
			t.Fatal(err)
		}
		if got := r.get(t, testAuthKey); !sameToken(got, want) || r.wx.count(pathAuthorizerToken) != 0 {
			t.Errorf("%d renewals", r.wx.count(pathAuthorizerToken))
		}
	})
}

// The token of an account that took its authorization back is not served while the store does not take the note of it, though it is one that
// serves on after a refusal; and WeChat, which waits five seconds, hears in time that it was not taken.
func TestRevocationThatIsNotWrittenYet(t *testing.T) {
	t.Parallel()
	for name, spared := range map[string]bool{"token": false, "spared token": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				r.authorize(t, testPlatform, testAuthorizer)
				r.get(t, testAuthKey)
				e := r.cache.Load().get(testAuthKey)
				if spared {
					e.refused.Store(true)
					e.spare()
				}
				unlock, err := r.store.MemStore.Lock(t.Context(), testAuthKey.recordName())
				if err != nil {
					t.Fatal(err)
				}
				defer unlock()
				done := make(chan error, 1)
				began := time.Now()
				go func() { done <- r.Revoke(t.Context(), testPlatform, testAuthorizer, time.Now()) }()
				synctest.Wait()
				if e.live(instantOf(time.Now())) {
					t.Error("it is served meanwhile")
				}
				if err := <-done; !errors.Is(err, ErrStore) || time.Since(began) > storeTimeout {
					t.Errorf("after %v: %v", time.Since(began), err)
				}
			})
		})
	}
}

// PlatformOf passes over a platform whose record cannot be read if another one holds the account, and what it tells is the caller's own.
func TestPlatformOfPastAFailure(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform2, testAuthorizer)
		r.store.fail(func(op, name string) error {
			if op == "load" && name == testAuthKey.recordName() {
				return errors.New("down")
			}
			return nil
		})
		if got, err := r.PlatformOf(t.Context(), testAuthorizer); got != testPlatform2 || err != nil {
			t.Errorf("%s, %v", got, err)
		}
		for range 2 {
			a, err := r.Authorizer(t.Context(), testPlatform2, testAuthorizer)
			if err != nil || !slices.Equal(a.FuncInfo, []int{1, 15}) {
				t.Fatalf("%v, %v", a.FuncInfo, err)
			}
			a.FuncInfo[0] = 99
		}
	})
}

// Of an account without API permissions it is said what is missing; where lists are not read, nothing can be lost.
func TestWhyAnAccountHasNoToken(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		e := newEntry(testAuthKey, &record{AuthorizedAt: time.Now()}, time.Now())
		if err := e.unrenewable(); err == nil || !strings.Contains(err.Error(), "API permissions") {
			t.Errorf("without a refresh token: %v", err)
		}
		if _, err := r.StoredPlatformOf(t.Context(), testAuthorizer); !errors.Is(err, ErrNotAuthorized) || errors.Is(err, ErrUnsure) {
			t.Errorf("without lists: %v", err)
		}
		r.authorize(t, testPlatform, testAuthorizer)
		revoke(t, r)
		env := *r.env
		env.RosterEvery, env.Platforms = 24*time.Hour, env.Platforms[:1]
		r.refuse(pathAuthorizerList, -1, "system busy")
		r.Use(&env)
		time.Sleep(time.Second)
		if _, err := r.StoredPlatformOf(t.Context(), testAuthorizer); !errors.Is(err, ErrNotAuthorized) || errors.Is(err, ErrUnsure) {
			t.Errorf("revoked: %v", err)
		}
	})
}

// That a refused token is not to be spared is known of that one alone, and for as long as WeChat gives it.
func TestEndOfARefusedToken(t *testing.T) {
	t.Parallel()
	var x troubles
	of := func(text string) *entry {
		e := newEntry(testAuthKey, &record{AccessToken: secret.New(text)}, time.Now())
		x.adopt(e)
		return e
	}
	x.refuse(testAuthKey, secret.New("second"))
	x.end(testAuthKey, secret.New("first"))
	if e := of("second"); !e.refused.Load() || e.ended.Load() {
		t.Error("the end of the first is held against the second")
	}
	x.end(testAuthKey, secret.New("second"))
	x.over(testAuthKey, secret.New("second")) // WeChat gave it again
	if e := of("second"); !e.refused.Load() || !e.ended.Load() {
		t.Error("the end of the one that WeChat gave again is forgotten")
	}
	x.over(testAuthKey, secret.New("third"))
	if e := of("third"); e.refused.Load() || e.ended.Load() {
		t.Error("the end of the second is held against the third")
	}
}
