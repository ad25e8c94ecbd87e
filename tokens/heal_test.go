package tokens

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// healing is started with the roster on, after the first reading of the list.
func healing(t *testing.T) *rig {
	t.Helper()
	r := newRig(t)
	r.env.Platforms = r.env.Platforms[:1]
	r.env.RosterEvery = 24 * time.Hour
	r.wx.rotate = true
	r.Use(r.env)
	r.ticket(t, testPlatform)
	time.Sleep(time.Second)
	synctest.Wait()
	if r.wx.count(pathAuthorizerList) == 0 {
		t.Fatal("a new store, and the list was not read")
	}
	return r
}

func appidOf(i int) string { return fmt.Sprintf("wx%016x", i) }

// A refresh token that WeChat calls invalid is replaced by the one that it names, in the same call.
func TestVoidRefreshTokenIsReplaced(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		r.authorize(t, testPlatform, testAuthorizer)
		r.wx.set(func(f *fakeWeChat) { f.strict = true; f.refresh[testAuthorizer] = "refreshtoken@@@elsewhere" })
		r.wx.kill(r.get(t, testAuthKey))
		r.store.hold(func(op, name string) {
			if op == "store" && name == testAuthKey.recordName() && !r.locks.taken(name+exchangeLock) {
				t.Error("a code of the account could be exchanged before what WeChat named is kept")
			}
		})
		got, err := r.Renew(t.Context(), testAuthKey, secret.String{})
		if err != nil {
			t.Fatalf("Renew: %v", err)
		}
		if n := r.wx.count(pathAuthorizerInfo); n != 1 {
			t.Errorf("asked for the current refresh token %d times", n)
		}
		r.wx.set(func(f *fakeWeChat) {
			if s := r.stored(t, testAuthKey); s.RefreshToken.Reveal() != f.refresh[testAuthorizer] || !s.AccessToken.Same(got.Value) {
				t.Error("the store has not what WeChat has")
			}
		})
	})
}

// An account that authorised here while WeChat called its refresh token invalid has the token of that: it is not refreshed once more,
// although the store cannot be read.
func TestVoidRefreshTokenOvertakenWithoutStore(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		r.authorize(t, testPlatform, testAuthorizer)
		r.wx.kill(r.get(t, testAuthKey))
		r.wx.set(func(f *fakeWeChat) {
			f.strict, f.refresh[testAuthorizer] = true, "refreshtoken@@@anew"
			f.hook = func(path string, _ map[string]any) (string, error) {
				if path != pathAuthorizerToken {
					return "", nil
				}
				r.wx.set(func(f *fakeWeChat) { f.hook = nil })
				r.authorize(t, testPlatform, testAuthorizer)
				r.store.fail(func(op, name string) error {
					if op == "load" && name == testAuthKey.recordName() {
						return errors.New("down")
					}
					return nil
				})
				return wxError(codeRefreshTokenInvalid, "refresh_token is invalid"), nil
			}
		})
		refreshed := r.wx.count(pathAuthorizerToken)
		got, err := r.Renew(t.Context(), testAuthKey, secret.String{})
		if err != nil {
			t.Fatalf("Renew: %v", err)
		}
		time.Sleep(time.Minute) // what it began goes on without it
		r.store.fail(nil)
		if !r.stored(t, testAuthKey).AccessToken.Same(got.Value) {
			t.Error("got another token than that of the new authorization")
		}
		if n := r.wx.count(pathAuthorizerToken) - refreshed; n != 1 {
			t.Errorf("refreshed %d times, want the one that came too late alone", n)
		}
	})
}

// Where WeChat names no other refresh token, the error is WeChat's, what is stored stays, and WeChat is not asked more
// often than renewals are tried.
func TestVoidRefreshTokenWithoutAnother(t *testing.T) {
	t.Parallel()
	for _, listed := range []string{"", "the same"} {
		synctest.Test(t, func(t *testing.T) {
			r := healing(t)
			r.authorize(t, testPlatform, testAuthorizer)
			held := r.stored(t, testAuthKey).RefreshToken
			r.wx.kill(r.get(t, testAuthKey))
			r.wx.set(func(f *fakeWeChat) {
				f.strict, f.refresh[testAuthorizer] = true, "refreshtoken@@@elsewhere"
				f.listing = map[string]string{testAuthorizer: listed}
				if listed != "" {
					f.listing[testAuthorizer] = held.Reveal()
				}
			})
			for range 60 {
				if _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); !hasCode(err, codeRefreshTokenInvalid) {
					t.Fatalf("Renew: %v, want 61023", err)
				}
				time.Sleep(10 * time.Second)
			}
			if n := r.wx.count(pathAuthorizerInfo); n < 2 || n > 20 {
				t.Errorf("asked %d times in ten minutes", n)
			}
			if !r.stored(t, testAuthKey).RefreshToken.Same(held) {
				t.Error("an empty refresh token took the place of one")
			}
			if r.locks.taken(testAuthKey.recordName() + exchangeLock) {
				t.Error("codes of the account cannot be exchanged any more")
			}
			if orphans := r.Orphans(testPlatform); (len(orphans) == 1) != (listed == "") {
				t.Errorf("orphans: %v", orphans)
			}
			// WeChat comes to its senses, and so does the account.
			r.wx.set(func(f *fakeWeChat) { f.listing = nil })
			time.Sleep(2 * time.Minute)
			if _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); err != nil {
				t.Errorf("Renew: %v", err)
			}
		})
	}
}

// An emptied store fills itself: accounts in use at once, all others by the list.
func TestEmptiedStoreHeals(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		const accounts = 30
		for i := range accounts {
			r.authorize(t, testPlatform, appidOf(i))
		}
		time.Sleep(time.Minute)
		r.store.empty()
		r.wx.set(func(f *fakeWeChat) { f.page = 7 })
		r.restart()
		time.Sleep(time.Minute)
		if _, err := r.Get(t.Context(), AuthorizerKey(testPlatform, appidOf(0))); err == nil {
			t.Fatal("a token without a ticket")
		}
		r.ticket(t, testPlatform)
		r.get(t, AuthorizerKey(testPlatform, appidOf(accounts-1))) // on the last page
		if platform, err := r.PlatformOf(t.Context(), appidOf(accounts-2)); err != nil || platform != testPlatform {
			t.Errorf("PlatformOf: %q, %v", platform, err)
		}
		time.Sleep(time.Minute)
		infos := r.wx.count(pathAuthorizerInfo)
		for i := range accounts {
			r.get(t, AuthorizerKey(testPlatform, appidOf(i)))
		}
		if n := r.wx.count(pathAuthorizerInfo) - infos; n != 0 {
			t.Errorf("%d accounts were asked for one by one after the list was read", n)
		}
		// The list is not read again before a day has passed.
		lists := r.wx.count(pathAuthorizerList)
		for range 23 * 6 {
			r.ticket(t, testPlatform)
			time.Sleep(10 * time.Minute)
		}
		if n := r.wx.count(pathAuthorizerList); n != lists {
			t.Errorf("the list was read again within a day: %d pages", n-lists)
		}
		for range 2 * 6 {
			r.ticket(t, testPlatform)
			time.Sleep(10 * time.Minute)
		}
		if n := r.wx.count(pathAuthorizerList); n != lists+5 {
			t.Errorf("after a day %d pages were read, want 5", n-lists)
		}
	})
}

// A store that is filled from WeChat's list is not told of account by account: there may be a million.
func TestFillingAStoreIsNotToldOfByAccount(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		const accounts = maxBudgetLines + 30
		for i := range accounts {
			r.authorize(t, testPlatform, appidOf(i))
		}
		r.store.empty()
		r.restart()
		r.ticket(t, testPlatform)
		time.Sleep(2 * time.Minute)
		said := r.log.String()
		if n := strings.Count(said, "was taken over from WeChat"); n != maxBudgetLines {
			t.Errorf("%d lines, want %d", n, maxBudgetLines)
		}
		if !strings.Contains(said, fmt.Sprintf("accounts=%d not_logged=30", accounts)) {
			t.Errorf("the list does not say how many were left out:\n%s", said)
		}
		for i := range accounts {
			r.get(t, AuthorizerKey(testPlatform, appidOf(i)))
		}
	})
}

// lateAnswers delivers WeChat's answers to one path late, as of a slow line: WeChat has done by then what it was asked.
type lateAnswers struct {
	*fakeWeChat
	path string
	by   time.Duration
}

func (l lateAnswers) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := l.fakeWeChat.RoundTrip(r)
	if r.URL.Path == l.path {
		time.Sleep(l.by)
	}
	return resp, err
}

// A call for an account whose code is being exchanged waits for what that brings, although the store may have lost the account: WeChat
// would name the refresh token by now, and give a second token for it.
func TestLostAccountWaitsForItsCode(t *testing.T) {
	t.Parallel()
	for _, where := range []string{"this node", "another node"} {
		t.Run(where, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				client, err := NewClient(ClientOptions{Transport: lateAnswers{r.wx, pathQueryAuth, 2 * time.Second}})
				if err != nil {
					t.Fatal(err)
				}
				r.env.API, r.env.RosterEvery, r.env.Platforms = client, 24*time.Hour, r.env.Platforms[:1]
				r.refuse(pathAuthorizerList, -1, "system busy")
				r.Use(r.env)
				r.ticket(t, testPlatform)
				asks := r.Manager
				if where == "another node" {
					asks = NewManager()
					defer asks.Close()
					asks.Use(r.env)
				}
				time.Sleep(time.Minute)
				if err := r.Accept(t.Context(), r.push(r.newCode(testAuthorizer))); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Second)
				if n := r.wx.count(pathQueryAuth); n != 1 {
					t.Fatalf("%d exchanges have begun", n)
				}
				got, err := asks.Get(t.Context(), testAuthKey)
				if err != nil {
					t.Fatal(err)
				}
				if n := r.wx.count(pathAuthorizerToken); n != 0 {
					t.Errorf("%d tokens were fetched beside the one that the code brought", n)
				}
				time.Sleep(time.Minute)
				if !r.get(t, testAuthKey).Value.Same(got.Value) {
					t.Error("the token is another one than the code brought")
				}
			})
		})
	}
}

// The code is exchanged at once for such a call, where its turn has not come yet.
func TestLostAccountHasItsCodeExchanged(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.env.RosterEvery, r.env.Platforms = 24*time.Hour, r.env.Platforms[:1]
		var exchanges atomic.Bool
		r.wx.hook = func(path string, _ map[string]any) (string, error) {
			if path == pathAuthorizerList || path == pathQueryAuth && !exchanges.Load() {
				return wxError(-1, "system busy"), nil
			}
			return "", nil
		}
		r.Use(r.env)
		r.ticket(t, testPlatform)
		if err := r.Accept(t.Context(), r.push(r.newCode(testAuthorizer))); err != nil {
			t.Fatal(err)
		}
		time.Sleep(4 * time.Minute)
		exchanges.Store(true)
		r.get(t, testAuthKey)
		if n := r.wx.count(pathAuthorizerToken); n != 0 {
			t.Errorf("%d tokens were fetched beside the one that the code brought", n)
		}
		if n := r.wx.count(pathAuthorizerInfo); n != 0 {
			t.Errorf("WeChat was asked %d times for what its code brings", n)
		}
	})
}

// A store that is emptied under a running gateway is noticed.
func TestStoreEmptiedUnderUs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		for i := range 5 {
			r.authorize(t, testPlatform, appidOf(i))
		}
		r.restart() // nothing is cached
		time.Sleep(time.Minute)
		r.store.empty()
		r.ticket(t, testPlatform)
		time.Sleep(rosterHasten)
		_, _ = r.Get(t.Context(), AuthorizerKey(testPlatform, appidOf(1)))
		time.Sleep(rosterHasten)
		for i := range 5 {
			r.get(t, AuthorizerKey(testPlatform, appidOf(i)))
		}
	})
}

// An appid that WeChat does not know is asked for a few times while the store may have lost accounts, and never after.
func TestUnknownAppIDsAreNotAskedForOften(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.env.Platforms = r.env.Platforms[:1]
		r.env.RosterEvery = 24 * time.Hour
		var mended atomic.Bool
		r.wx.hook = func(path string, _ map[string]any) (string, error) {
			if path == pathAuthorizerList && !mended.Load() {
				return wxError(-1, "system busy"), nil
			}
			return "", nil
		}
		r.Use(r.env)
		r.ticket(t, testPlatform)
		for range 60 {
			if _, err := r.Get(t.Context(), testAuthKey); !errors.Is(err, ErrNotAuthorized) {
				t.Fatalf("Get: %v", err)
			}
			time.Sleep(10 * time.Second)
		}
		n := r.wx.count(pathAuthorizerInfo)
		if n < 1 || n > 20 {
			t.Errorf("asked %d times in ten minutes", n)
		}
		if said := r.log.count("list of authorizers cannot be read"); said < 1 || said > 2 {
			t.Errorf("the log said %d times in ten minutes that the list cannot be read", said)
		}
		mended.Store(true)
		time.Sleep(2 * time.Minute)
		n = r.wx.count(pathAuthorizerInfo)
		for range 60 {
			_, _ = r.Get(t.Context(), testAuthKey)
			time.Sleep(10 * time.Second)
		}
		if got := r.wx.count(pathAuthorizerInfo); got != n {
			t.Errorf("asked %d times although the list was read", got-n)
		}
	})
}

// What is no token in the list, or beside an account's profile, keeps neither the other accounts of the list nor the profile from being read.
func TestListWithWhatIsNoToken(t *testing.T) {
	t.Parallel()
	for name, none := range map[string]string{"number": "12", "null": "null", "spaces": `"  "`, "object": "{}"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				r.env.Platforms = r.env.Platforms[:1]
				r.env.RosterEvery = 24 * time.Hour
				r.wx.set(func(f *fakeWeChat) {
					f.strict, f.refresh[testAuthorizer] = true, "refreshtoken@@@x"
					f.hook = func(path string, _ map[string]any) (string, error) {
						switch path {
						case pathAuthorizerList:
							return `{"total_count":2,"list":[{"authorizer_appid":"` + testAuthorizer9 + `","refresh_token":` + none + `,"auth_time":1},` +
								`{"authorizer_appid":"` + testAuthorizer + `","refresh_token":"refreshtoken@@@x","auth_time":1}]}`, nil
						case pathAuthorizerInfo:
							return `{"authorizer_info":{"user_name":"gh_00000000000d"},"authorization_info":{"authorizer_appid":"` + testAuthorizer +
								`","authorizer_refresh_token":` + none + `}}`, nil
						}
						return "", nil
					}
				})
				r.Use(r.env)
				r.ticket(t, testPlatform)
				time.Sleep(time.Minute)
				r.get(t, testAuthKey)
				if n := r.wx.count(pathAuthorizerList); n != 1 {
					t.Errorf("the list was read %d times", n)
				}
				if _, err := r.store.MemStore.Load(t.Context(), AuthorizerKey(testPlatform, testAuthorizer9).recordName()); err == nil {
					t.Error("it is kept as a token")
				}
				if info, err := r.authorizerInfo(t.Context(), r.Manager.env.Load(), testAuthKey); err != nil || info.userName == "" || !info.refresh.IsZero() {
					t.Errorf("the profile: %q, %v", info.userName, err)
				}
			})
		})
	}
}

// 61003 alone deletes nothing; with a whole list that does not name the account either, it is marked unauthorized.
func TestUnauthorizedIsConfirmedByTheList(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		for i := range 5 {
			r.authorize(t, testPlatform, appidOf(i))
		}
		gone := AuthorizerKey(testPlatform, appidOf(2))
		var whole atomic.Bool // until then the list is cut short: it names a total that its pages do not reach
		r.wx.set(func(f *fakeWeChat) {
			delete(f.refresh, gone.AppID)
			f.hook = func(path string, body map[string]any) (string, error) {
				if path == pathAuthorizerList && !whole.Load() {
					return `{"total_count":5,"list":[]}`, nil
				}
				return "", nil
			}
		})
		r.wx.kill(r.get(t, gone))
		for range 30 {
			if _, err := r.Renew(t.Context(), gone, secret.String{}); !errors.Is(err, ErrNotAuthorized) {
				t.Fatalf("Renew: %v", err)
			}
			time.Sleep(time.Minute)
		}
		if r.stored(t, gone).revoked() {
			t.Fatal("marked unauthorized on the strength of a list that was not whole")
		}
		whole.Store(true)
		time.Sleep(2 * rosterAgain)
		if !r.stored(t, gone).revoked() {
			t.Error("not marked unauthorized")
		}
		if _, err := r.Get(t.Context(), gone); !errors.Is(err, ErrNotAuthorized) {
			t.Errorf("Get: %v", err)
		}
		for _, i := range []int{0, 1, 3, 4} {
			if _, err := r.Renew(t.Context(), AuthorizerKey(testPlatform, appidOf(i)), secret.String{}); err != nil {
				t.Errorf("account %d: %v", i, err)
			}
		}
		// It comes back with its next authorization.
		r.authorize(t, testPlatform, gone.AppID)
		r.get(t, gone)
	})
}

// An app's call that meets 61003 raises the same doubt, and an account that the list names is left alone.
func TestSuspectThatIsListed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		r.authorize(t, testPlatform, testAuthorizer)
		time.Sleep(rosterAgain)
		lists := r.wx.count(pathAuthorizerList)
		for range 100 {
			r.Suspect(testAuthKey)
			r.Suspect(ComponentKey(testPlatform))
			r.Suspect(AuthorizerKey("wx0000000000000099", testAuthorizer))
		}
		time.Sleep(rosterCheck)
		if n := r.wx.count(pathAuthorizerList) - lists; n != 1 {
			t.Errorf("the list was read %d times", n)
		}
		if r.stored(t, testAuthKey).revoked() {
			t.Error("marked unauthorized although the list names it")
		}
		r.get(t, testAuthKey)
		lists = r.wx.count(pathAuthorizerList)
		time.Sleep(5 * rosterAgain)
		if n := r.wx.count(pathAuthorizerList) - lists; n != 0 {
			t.Errorf("the list was read %d times more, with nothing in doubt", n)
		}
	})
}

// The list brings what no push did: an account that authorised again, one that did so for the first time, one whose
// refresh token is another; and what it brings is never older than what is held.
func TestListIsComparedWithTheStore(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		for i := range 4 {
			r.authorize(t, testPlatform, appidOf(i))
		}
		key := func(i int) Key { return AuthorizerKey(testPlatform, appidOf(i)) }
		in := r.push(r.newCode(appidOf(4)))
		in.AppID = appidOf(4)
		if err := r.Accept(t.Context(), in); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if err := r.Revoke(t.Context(), testPlatform, appidOf(0), time.Now()); err != nil {
			t.Fatal(err)
		}
		if err := r.Revoke(t.Context(), testPlatform, appidOf(1), time.Now()); err != nil {
			t.Fatal(err)
		}
		before := map[int]string{}
		r.wx.set(func(f *fakeWeChat) {
			later := time.Now().Add(time.Hour).Unix()
			f.authAt = map[string]int64{appidOf(0): later, appidOf(1): 1, appidOf(4): later}
			f.refresh[appidOf(0)] = "refreshtoken@@@again"
			f.refresh[appidOf(3)] = "refreshtoken@@@older" // not dated later than ours
			f.refresh[appidOf(4)] = "refreshtoken@@@newer" // dated later
			f.refresh[appidOf(9)] = "refreshtoken@@@first"
			f.refresh[appidOf(8)] = "" // never exchanged
		})
		for _, i := range []int{2, 3} {
			before[i] = r.stored(t, key(i)).RefreshToken.Reveal()
		}
		time.Sleep(25 * time.Hour)
		r.ticket(t, testPlatform)
		time.Sleep(time.Minute)
		for i, want := range map[int]string{
			0: "refreshtoken@@@again", 2: before[2], 3: before[3], 4: "refreshtoken@@@newer", 9: "refreshtoken@@@first",
		} {
			if got := r.stored(t, key(i)).RefreshToken.Reveal(); got != want {
				t.Errorf("account %d: %q, want %q", i, got, want)
			}
		}
		if !r.stored(t, key(1)).revoked() {
			t.Error("an authorization from before the revocation came back")
		}
		if got := r.Orphans(testPlatform); !slices.Equal(got, []string{appidOf(8)}) {
			t.Errorf("orphans: %v", got)
		}
		if r.log.count("has to authorise again, on a link") == 0 || !strings.Contains(r.log.String(), appidOf(8)) {
			t.Error("the log does not name the account that has to authorise again")
		}
		// Its link, and the end of the trouble.
		link, err := r.AuthorizationLink(t.Context(), AuthorizationLink{Platform: testPlatform, AppID: appidOf(8), Redirect: "https://wx.example.com/back?a=b"})
		if err != nil {
			t.Fatal(err)
		}
		u, err := url.Parse(link.Reveal())
		if err != nil || u.Host != "mp.weixin.qq.com" || u.Query().Get("pre_auth_code") == "" || u.Query().Get("biz_appid") != appidOf(8) ||
			u.Query().Get("component_appid") != testPlatform || u.Query().Get("redirect_uri") != "https://wx.example.com/back?a=b" {
			t.Errorf("link: %s", link.Reveal())
		}
		r.authorize(t, testPlatform, appidOf(8))
		r.get(t, key(8))
		time.Sleep(25 * time.Hour)
		r.ticket(t, testPlatform)
		time.Sleep(time.Minute)
		if got := r.Orphans(testPlatform); len(got) != 0 {
			t.Errorf("still orphans: %v", got)
		}
	})
}

// An account whose code is still to be exchanged is not one that has to authorise again, until that has failed for good.
func TestListedBeforeItsCodeIsExchanged(t *testing.T) {
	t.Parallel()
	for _, dies := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			r := healing(t)
			time.Sleep(rosterAgain)
			r.ticket(t, testPlatform)
			r.refuseExchanges()
			r.wx.set(func(f *fakeWeChat) { f.refresh[testAuthorizer] = "" })
			if err := r.Accept(t.Context(), r.push(r.newCode(testAuthorizer))); err != nil {
				t.Fatal(err)
			}
			read := r.wx.count(pathAuthorizerList)
			r.wantRoster(testPlatform)
			time.Sleep(rosterCheck)
			if r.wx.count(pathAuthorizerList) == read || r.intents(t) != 1 {
				t.Fatal("the list was not read while the code waited")
			}
			if got := r.Orphans(testPlatform); len(got) != 0 || r.log.count("has to authorise again") != 0 {
				t.Errorf("orphans: %v; log: %s", got, r.log)
			}
			r.wx.set(func(f *fakeWeChat) {
				f.hook = nil
				if dies {
					clear(f.codes)
				}
			})
			time.Sleep(time.Hour)
			r.ticket(t, testPlatform)
			time.Sleep(time.Hour)
			want := []string(nil)
			if dies {
				want = []string{testAuthorizer}
			}
			if got := r.Orphans(testPlatform); !slices.Equal(got, want) {
				t.Errorf("dies %v: orphans: %v, want %v", dies, got, want)
			}
		})
	}
}

// readsTheList has a node of a cluster read WeChat's list, as the store has never been compared with it.
func readsTheList(t *testing.T, r *rig) {
	t.Helper()
	read := r.wx.count(pathAuthorizerList)
	env := *r.env
	env.Platforms, env.RosterEvery = env.Platforms[:1], 24*time.Hour
	r.Use(&env)
	time.Sleep(time.Second)
	synctest.Wait()
	if r.wx.count(pathAuthorizerList) == read {
		t.Fatal("the list was not read")
	}
}

// Nor is one whose code another node is exchanging.
func TestListedWhileAnotherNodeExchangesItsCode(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a, b, _ := cluster(t)
		a.refuseExchanges()
		const other = "wx00000000000000ee" // of which no code came
		a.wx.set(func(f *fakeWeChat) { f.refresh[testAuthorizer], f.refresh[other] = "", "" })
		if err := a.Accept(t.Context(), a.push(a.newCode(testAuthorizer))); err != nil {
			t.Fatal(err)
		}
		lists := b.store.count("list")
		readsTheList(t, b)
		if len(b.Manager.intents.open()) != 0 {
			t.Fatal("it is the node's own by now")
		}
		if got := b.Orphans(testPlatform); !slices.Equal(got, []string{other}) {
			t.Errorf("orphans: %v", got)
		}
		if n := b.store.count("list") - lists; n > 1 {
			t.Errorf("the intents were listed %d times", n)
		}
		a.wx.set(func(f *fakeWeChat) { f.hook = nil })
		time.Sleep(time.Hour)
		if got := b.Orphans(testPlatform); !slices.Equal(got, []string{other}) {
			t.Errorf("orphans once the code is exchanged: %v", got)
		}
	})
}

// A store that does not tell which codes are being exchanged holds the list up for nobody, and no account is called what it may not be.
func TestListedWhileIntentsCannotBeRead(t *testing.T) {
	t.Parallel()
	for _, op := range []string{"load", "list"} {
		t.Run(op, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				a, b, _ := cluster(t)
				a.refuseExchanges()
				const other, known = "wx00000000000000ee", "wx00000000000000ff"
				a.wx.set(func(f *fakeWeChat) {
					f.refresh[testAuthorizer], f.refresh[other], f.refresh[known] = "", "", "refreshtoken@@@known"
				})
				if err := a.Accept(t.Context(), a.push(a.newCode(testAuthorizer))); err != nil {
					t.Fatal(err)
				}
				b.store.fail(func(did, name string) error {
					if did == op && strings.Contains(name, "intent") {
						return errors.New("permission denied")
					}
					return nil
				})
				readsTheList(t, b)
				if got := b.Orphans(testPlatform); len(got) != 0 {
					t.Errorf("orphans: %v", got)
				}
				b.get(t, AuthorizerKey(testPlatform, known))
				lists := b.wx.count(pathAuthorizerList)
				time.Sleep(2 * time.Hour)
				if n := b.wx.count(pathAuthorizerList) - lists; n != 0 {
					t.Errorf("the list was asked for %d times more", n)
				}
			})
		})
	}
}

// An orphan is none any more once it has authorised again, on whichever node.
func TestOrphanAuthorisesOnAnotherNode(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a, b, _ := cluster(t)
		a.wx.set(func(f *fakeWeChat) { f.refresh[testAuthorizer] = "" })
		readsTheList(t, b)
		if got := b.Orphans(testPlatform); !slices.Equal(got, []string{testAuthorizer}) {
			t.Fatalf("orphans: %v", got)
		}
		a.authorize(t, testPlatform, testAuthorizer)
		synctest.Wait()
		if got := b.Orphans(testPlatform); len(got) != 0 {
			t.Errorf("orphans once it has authorised: %v", got)
		}
	})
}

// A dead code is replaced by the refresh token that WeChat names.
func TestDeadCodeIsMadeGood(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		r.wx.set(func(f *fakeWeChat) {
			f.refresh[testAuthorizer] = "refreshtoken@@@known"
			f.hook = func(path string, _ map[string]any) (string, error) {
				if path == pathQueryAuth {
					return wxError(codeAuthCodeExpired, "code expired"), nil
				}
				return "", nil
			}
		})
		if err := r.Accept(t.Context(), r.push(r.newCode(testAuthorizer))); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if r.intents(t) != 0 {
			t.Error("the intent is left")
		}
		r.get(t, testAuthKey)
	})
}

// While WeChat cannot be asked, the intent stays: also beyond the end of its code.
func TestDeadCodeWaitsForWeChat(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		r.wx.set(func(f *fakeWeChat) {
			f.refresh[testAuthorizer] = "refreshtoken@@@known"
			f.hook = func(string, map[string]any) (string, error) { return "", errors.New("connection refused") }
		})
		if err := r.Accept(t.Context(), r.push(r.newCode(testAuthorizer))); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Hour)
		if r.intents(t) != 1 {
			t.Fatal("given up")
		}
		r.wx.set(func(f *fakeWeChat) {
			f.hook = nil
			clear(f.codes)
		})
		r.ticket(t, testPlatform)
		time.Sleep(3 * time.Minute)
		if r.intents(t) != 0 {
			t.Error("the intent is left")
		}
		r.get(t, testAuthKey)
	})
}

// What a list says of an account is old by the time it is compared: of one that is held otherwise WeChat is asked again.
func TestListedIsAskedForAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		r.authorize(t, testPlatform, testAuthorizer)
		time.Sleep(time.Minute)
		if err := r.Revoke(t.Context(), testPlatform, testAuthorizer, time.Now()); err != nil {
			t.Fatal(err)
		}
		again := time.Now().Add(time.Minute).Truncate(time.Second)
		r.wx.set(func(f *fakeWeChat) {
			f.refresh[testAuthorizer] = "refreshtoken@@@current"
			f.hook = func(path string, _ map[string]any) (string, error) {
				if path != pathAuthorizerList {
					return "", nil
				}
				return fmt.Sprintf(`{"total_count":1,"list":[{"authorizer_appid":%q,"refresh_token":"refreshtoken@@@before","auth_time":%d}]}`,
					testAuthorizer, again.Unix()), nil
			}
		})
		time.Sleep(25 * time.Hour) // the next list
		r.ticket(t, testPlatform)
		time.Sleep(time.Minute)
		if rec := r.stored(t, testAuthKey); rec.RefreshToken.Reveal() != "refreshtoken@@@current" || !rec.AuthorizedAt.Equal(again) || rec.AuthorizedHere {
			t.Errorf("held since the list: the current refresh token: %v, authorized %v, by our clock: %v",
				rec.RefreshToken.Reveal() == "refreshtoken@@@current", rec.AuthorizedAt, rec.AuthorizedHere)
		}
	})
}

// An account whose record was damaged is had from WeChat by whoever asks for it next, not only by the next list.
func TestDamagedRecordIsHadAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		r.authorize(t, testPlatform, testAuthorizer)
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(path string, _ map[string]any) (string, error) {
				if path == pathAuthorizerList {
					return "", errors.New("no route to host")
				}
				return "", nil
			}
		})
		r.restart()
		time.Sleep(time.Minute)
		if r.rosters.incomplete(testPlatform) {
			t.Fatal("it is not known that the list was read to its end")
		}
		_ = r.store.MemStore.Store(t.Context(), testAuthKey.recordName(), []byte(`{"v":1,"gen`))
		r.get(t, testAuthKey)
	})
}

// That a damaged record was set aside is known to the next process and to other nodes too: WeChat is asked for the account, and the list is read
// soon, and then no more than otherwise.
func TestDamagedRecordOutlivesTheProcess(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		r.authorize(t, testPlatform, testAuthorizer)
		r.restart()
		time.Sleep(time.Minute)
		other := NewManager()
		other.Use(r.env)
		defer other.Close()
		time.Sleep(time.Minute)
		away := func(path string, _ map[string]any) (string, error) { return "", errors.New("no route to host") }
		r.wx.set(func(f *fakeWeChat) { f.hook = away })
		_ = r.store.MemStore.Store(t.Context(), testAuthKey.recordName(), []byte(`{"v":1,"gen`))
		if _, err := r.Get(t.Context(), testAuthKey); err == nil {
			t.Fatal("a token without a record")
		}
		r.restart()
		time.Sleep(rosterCheck + time.Minute) // both have looked
		for name, m := range map[string]*Manager{"the next process": r.Manager, "another node": other} {
			if _, err := m.StoredPlatformOf(t.Context(), testAuthorizer); !errors.Is(err, ErrUnsure) {
				t.Errorf("%s: %v, want ErrUnsure", name, err)
			}
		}
		r.refuse(pathAuthorizerList, 48001, "no list")
		if _, err := other.Get(t.Context(), testAuthKey); err != nil {
			t.Errorf("another node: %v", err)
		}
		r.get(t, testAuthKey)
		r.wx.set(func(f *fakeWeChat) { f.hook = nil })
		time.Sleep(time.Hour)
		r.ticket(t, testPlatform)
		time.Sleep(rosterAgain)
		if r.rosters.incomplete(testPlatform) {
			t.Error("the list has not been read since")
		}
		lists := r.wx.count(pathAuthorizerList)
		time.Sleep(10 * time.Hour)
		if n := r.wx.count(pathAuthorizerList) - lists; n != 0 {
			t.Errorf("the list was read %d times more", n)
		}
	})
}

// A doubt that the store tells of is one of all nodes: one of them reads the list for it, and none again but the node that had the doubt itself.
func TestListIsReadOnceForADoubtInTheStore(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		r.authorize(t, testPlatform, testAuthorizer)
		r.restart()
		time.Sleep(time.Minute)
		for range 3 {
			other := NewManager()
			other.Use(r.env)
			defer other.Close()
		}
		time.Sleep(time.Hour)
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(string, map[string]any) (string, error) { return "", errors.New("no route to host") }
		})
		_ = r.store.MemStore.Store(t.Context(), testAuthKey.recordName(), []byte(`{"v":1,"gen`))
		if _, err := r.Get(t.Context(), testAuthKey); err == nil {
			t.Fatal("a token without a record")
		}
		time.Sleep(rosterCheck + time.Minute) // all have looked
		lists := r.wx.count(pathAuthorizerList)
		r.wx.set(func(f *fakeWeChat) { f.hook = nil })
		for range 10 {
			r.ticket(t, testPlatform)
			time.Sleep(time.Hour)
		}
		r.get(t, testAuthKey)
		if n := r.wx.count(pathAuthorizerList) - lists; n < 1 || n > 2 {
			t.Errorf("the list was read %d times by four nodes", n)
		}
	})
}

// A token that dies although nobody here renewed it is another system's doing; one that WeChat refuses since we renewed
// it is not.
func TestRogueRefresher(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		rogues := &rogueObserver{}
		r.env.Observer = rogues
		r.Use(r.env)
		r.authorize(t, testPlatform, testAuthorizer)
		for range 4 {
			token, at := r.get(t, testAuthKey), time.Now()
			r.wx.kill(token)
			if err := r.Call(t.Context(), testAuthKey, http.MethodGet, pathBusiness, nil, nil, nil); err != nil {
				t.Fatal(err)
			}
			if _, err := r.Renew(t.Context(), testAuthKey, token.Value); err != nil { // a call that was under way
				t.Fatal(err)
			}
			r.Healed(testAuthKey, token.Value, at)
			time.Sleep(time.Minute)
		}
		if got := strings.Join(rogues.seen, " "); got != strings.TrimSpace(strings.Repeat("authorizer:"+testAuthorizer+" ", 4)) {
			t.Errorf("reported: %s", got)
		}
		if n := r.log.count("another system is refreshing tokens of " + testAuthorizer); n != 1 {
			t.Errorf("said %d times within ten minutes", n)
		}
		// A token at its end, and one that was re-authorised away, are no reason to complain.
		rogues.seen = nil
		token := r.get(t, testAuthKey)
		time.Sleep(2*time.Hour - time.Minute)
		r.wx.kill(token)
		if _, err := r.Renew(t.Context(), testAuthKey, token.Value); err != nil {
			t.Fatal(err)
		}
		r.Healed(testAuthKey, token.Value, time.Now())
		token = r.get(t, testAuthKey)
		r.authorize(t, testPlatform, testAuthorizer)
		r.wx.kill(token)
		if _, err := r.Renew(t.Context(), testAuthKey, token.Value); err != nil {
			t.Fatal(err)
		}
		r.Healed(testAuthKey, token.Value, time.Now())
		if len(rogues.seen) != 0 {
			t.Errorf("reported without a reason: %v", rogues.seen)
		}
	})
}

// A path that takes another kind of token refuses the next one too: then nobody else has replaced the first.
func TestPathOfAnotherKindIsNoRogue(t *testing.T) {
	t.Parallel()
	eachKind(t, func(t *testing.T, r *rig, k Key, _ string) {
		rogues := &rogueObserver{}
		env := *r.env
		env.Observer = rogues
		r.Use(&env)
		refusing := func(path string, refuses bool) {
			r.wx.set(func(f *fakeWeChat) {
				f.hook = func(p string, _ map[string]any) (string, error) {
					if p == path && refuses {
						return wxError(40001, "invalid credential"), nil
					}
					return "", nil
				}
			})
		}
		call := func(path string) (code int64) {
			t.Helper()
			err := r.Call(t.Context(), k, http.MethodGet, path, nil, nil, nil)
			if api, ok := errors.AsType[*APIError](err); ok {
				return api.Code
			}
			if err != nil {
				t.Fatal(err)
			}
			return 0
		}
		for i := range 3 {
			path := fmt.Sprint("/cgi-bin/another/kind", i)
			refusing(path, true)
			if code := call(path); code != 40001 {
				t.Fatalf("the path answers %d", code)
			}
			if code := call(pathBusiness); code != 0 {
				t.Fatalf("another path answers %d", code)
			}
			time.Sleep(time.Minute)
		}
		// Nor is it news that WeChat does not answer, or is busy.
		for _, answer := range []func() (string, error){
			func() (string, error) { return "", errors.New("away") },
			func() (string, error) { return wxError(-1, "system error"), nil },
		} {
			refusals := 0
			r.wx.set(func(f *fakeWeChat) {
				f.hook = func(p string, _ map[string]any) (string, error) {
					if p != "/cgi-bin/another" {
						return "", nil
					}
					if refusals++; refusals == 1 {
						return wxError(40001, "invalid credential"), nil
					}
					return answer()
				}
			})
			if err := r.Call(t.Context(), k, http.MethodGet, "/cgi-bin/another", nil, nil, nil); err == nil || refusals != 2 {
				t.Fatalf("%v after %d calls", err, refusals)
			}
			time.Sleep(time.Minute)
		}
		if len(rogues.seen) != 0 || r.log.count("another system") != 0 {
			t.Errorf("reported without a reason: %v", rogues.seen)
		}
		refusing("", false)
		token := r.get(t, k)
		r.wx.kill(token)
		if code := call(pathBusiness); code != 0 {
			t.Fatalf("answers %d", code)
		}
		if got, want := strings.Join(rogues.seen, " "), string(k.Kind)+":"+k.owner(); got != want {
			t.Errorf("reported: %q, want %q", got, want)
		}
	})
}

// What WeChat refuses since a renewal was asked for is refused because of that.
func TestOurOwnRenewalIsNoRogue(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		token := r.get(t, testAuthKey)
		refusals := 0
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(p string, _ map[string]any) (string, error) {
				switch p {
				case pathAuthorizerToken: // WeChat voids the token, and takes its time to answer
					r.wx.kill(token)
					time.Sleep(time.Second)
				case pathBusiness: // on its way for as long
					time.Sleep(time.Second)
				case "/cgi-bin/another/kind":
					refusals++
					time.Sleep(500 * time.Millisecond)
					return wxError(40001, "invalid credential"), nil
				}
				return "", nil
			}
		})
		var wg sync.WaitGroup
		wg.Go(func() { _ = r.Call(t.Context(), testAuthKey, http.MethodGet, "/cgi-bin/another/kind", nil, nil, nil) })
		if err := r.Call(t.Context(), testAuthKey, http.MethodGet, pathBusiness, nil, nil, nil); err != nil {
			t.Error(err)
		}
		wg.Wait()
		if n := r.wx.count(pathBusiness); n != 2 || refusals != 2 {
			t.Fatalf("%d calls, and %d of the other path: want 2 and 2", n, refusals)
		}
		if r.log.count("another system") != 0 {
			t.Error("the gateway takes itself for a rogue")
		}
	})
}

// stable_token gives a plain account the same token until shortly before its end: if it gives another, somebody has replaced it.
func TestRogueOfAPlainAccountNeedsNoProof(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		k := AccountKey(testAccount)
		token := r.get(t, k)
		r.wx.set(func(f *fakeWeChat) { delete(f.alive, f.stable[testAccount]); delete(f.stable, testAccount) })
		refused := time.Now()
		if _, err := r.Renew(t.Context(), k, token.Value); err != nil {
			t.Fatal(err)
		}
		for _, when := range []string{"at once", "once WeChat took the new one"} {
			if n := r.log.count("another system is refreshing tokens of " + testAccount); n != 1 {
				t.Errorf("said %d times %s", n, when)
			}
			r.Healed(k, token.Value, refused)
		}
	})
}

// happenings is an Observer of what happened to accounts, and of who waits for tokens.
type happenings struct {
	noObserver
	mu      sync.Mutex
	seen    []string
	waiting int
	most    int
}

func (o *happenings) Happened(what Happening, k Key, _ error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch what {
	case Authorized:
		o.seen = append(o.seen, "authorized "+k.AppID)
	case Unauthorized:
		o.seen = append(o.seen, "unauthorized "+k.AppID)
	}
}

func (o *happenings) TokenAwaited(callers int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.waiting += callers
	o.most = max(o.most, o.waiting)
}

func (o *happenings) take() (seen []string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	seen, o.seen = o.seen, nil
	return seen
}

// Each end of an authorization is told once, whoever says so: a push, who runs the gateway, or WeChat's list.
func TestUnauthorizedIsTold(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		o := &happenings{}
		r.env.Observer = o
		r.Use(r.env)
		for i := range 3 {
			r.authorize(t, testPlatform, appidOf(i))
		}
		if got := o.take(); len(got) != 3 || got[0] != "authorized "+appidOf(0) {
			t.Errorf("authorized: %v", got)
		}
		time.Sleep(time.Minute)
		if err := r.Revoke(t.Context(), testPlatform, appidOf(0), time.Now()); err != nil {
			t.Fatal(err)
		}
		if got := o.take(); !slices.Equal(got, []string{"unauthorized " + appidOf(0)}) {
			t.Errorf("revoked: %v", got)
		}
		r.wx.set(func(f *fakeWeChat) { delete(f.refresh, appidOf(1)); delete(f.refresh, appidOf(0)) })
		r.Suspect(AuthorizerKey(testPlatform, appidOf(1)))
		time.Sleep(2 * rosterAgain)
		if got := o.take(); !slices.Equal(got, []string{"unauthorized " + appidOf(1)}) {
			t.Errorf("gone from the list: %v", got)
		}
		if n := r.log.count("the account has not authorised the platform any more, by WeChat's list"); n != 1 {
			t.Errorf("said %d times", n)
		}
	})
}

// Who waits for a token is counted for as long.
func TestAwaitedTokensAreCounted(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		o := &happenings{}
		r.env.Observer = o
		r.Use(r.env)
		r.wx.set(func(f *fakeWeChat) { f.latency = time.Second })
		var wg sync.WaitGroup
		for range 5 {
			wg.Go(func() { r.get(t, AccountKey(testAccount)) })
		}
		wg.Wait()
		r.get(t, AccountKey(testAccount)) // it is at hand now
		o.mu.Lock()
		defer o.mu.Unlock()
		if o.most != 5 || o.waiting != 0 {
			t.Errorf("at most %d waited, and %d do still", o.most, o.waiting)
		}
	})
}

type rogueObserver struct {
	noObserver
	seen []string
}

func (o *rogueObserver) RogueRefresh(kind Kind, appid string) {
	o.seen = append(o.seen, string(kind)+":"+appid)
}

// force_refresh is rationed over restarts, and again from midnight in Beijing.
func TestForcedRefreshesAreRationed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.env.Platforms = nil
		r.Use(r.env)
		k := AccountKey(testAccount)
		forced := 0
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(_ string, body map[string]any) (string, error) {
				if body["force_refresh"] == true {
					forced++
				}
				return "", nil
			}
		})
		refuse := func() error {
			token, err := r.Get(context.Background(), k)
			if err != nil {
				return err
			}
			_, err = r.Renew(context.Background(), k, token.Value)
			return err
		}
		time.Sleep(20 * time.Hour) // bubbles begin at midnight UTC; it is four in the morning in Beijing
		for range 40 {
			_ = refuse()
			time.Sleep(5 * time.Minute)
			if forced == 7 {
				r.restart()
			}
		}
		if forced != forceDaily {
			t.Errorf("forced %d times on one day", forced)
		}
		if err := refuse(); !errors.Is(err, ErrBackoff) {
			t.Errorf("beyond the ration: %v, want ErrBackoff", err)
		}
		r.restart()
		if _ = refuse(); forced != forceDaily {
			t.Errorf("forced %d times after a restart", forced)
		}
		time.Sleep(20 * time.Hour)
		if err := refuse(); err != nil || forced != forceDaily+1 {
			t.Errorf("the next day: %v, forced %d times", err, forced)
		}
	})
}

// The tickets of an account are tokens like others, and worth nothing once the account is gone.
func TestJSTickets(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		keys := []Key{
			JSAPIKey("", testAccount), CardKey("", testAccount), JSAPIKey(testPlatform, testAuthorizer), CardKey(testPlatform, testAuthorizer),
		}
		seen := map[string]bool{}
		for _, k := range keys {
			first := r.get(t, k)
			if want := map[Kind]string{KindJSAPI: "jsapi", KindCard: "wx_card"}[k.Kind]; !strings.HasPrefix(first.Value.Reveal(), want) {
				t.Errorf("%v: a ticket of another type", k)
			}
			if seen[first.Value.Reveal()] {
				t.Errorf("%v: another key's ticket", k)
			}
			seen[first.Value.Reveal()] = true
		}
		calls := r.wx.count(pathGetTicket)
		if calls != 4 {
			t.Errorf("%d tickets were fetched", calls)
		}
		r.restart()
		for _, k := range keys {
			if !seen[r.get(t, k).Value.Reveal()] {
				t.Errorf("%v: not the stored ticket", k)
			}
		}
		if n := r.wx.count(pathGetTicket); n != calls {
			t.Errorf("fetched again after a restart")
		}
		time.Sleep(2 * time.Hour)
		r.ticket(t, testPlatform)
		for _, k := range keys {
			if seen[r.get(t, k).Value.Reveal()] {
				t.Errorf("%v: a ticket at its end", k)
			}
		}
		// The access token that it is fetched with is renewed on the way.
		r.wx.kill(r.get(t, AccountKey(testAccount)))
		time.Sleep(2 * time.Hour)
		r.get(t, keys[0])
		if err := r.Revoke(t.Context(), testPlatform, testAuthorizer, time.Now()); err != nil {
			t.Fatal(err)
		}
		for _, k := range keys[2:] {
			if _, err := r.Get(t.Context(), k); !errors.Is(err, ErrNotAuthorized) {
				t.Errorf("%v: %v, want ErrNotAuthorized", k, err)
			}
		}
		for _, k := range []Key{JSAPIKey("", "wx0000000000000099"), JSAPIKey("wx0000000000000099", testAuthorizer)} {
			if _, err := r.Get(t.Context(), k); !errors.Is(err, ErrNotConfigured) {
				t.Errorf("%v: %v, want ErrNotConfigured", k, err)
			}
		}
	})
}

// The ticket of an account that revoked is worth nothing after a restart either, when it is the first that is asked for.
func TestJSTicketOfARevokedAccountAfterARestart(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		k := JSAPIKey(testPlatform, testAuthorizer)
		r.get(t, k)
		if err := r.Revoke(t.Context(), testPlatform, testAuthorizer, time.Now().Add(time.Second)); err != nil {
			t.Fatal(err)
		}
		r.restart()
		for range 2 {
			if _, err := r.Get(t.Context(), k); !errors.Is(err, ErrNotAuthorized) {
				t.Errorf("%v, want ErrNotAuthorized", err)
			}
		}
	})
}

// Who passes a ticket on gets one with enough life left, for one renewal, and while WeChat gives none the one at hand.
func TestGetLasting(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		k := JSAPIKey("", testAccount)
		lasting := func() Token {
			t.Helper()
			got, err := r.GetLasting(t.Context(), k, JSTicketMargin)
			if err != nil {
				t.Fatalf("GetLasting: %v", err)
			}
			return got
		}
		first := lasting()
		time.Sleep(2*time.Hour - JSTicketMargin - jsTicketJitter - time.Minute)
		if got := lasting(); !got.Value.Same(first.Value) || r.wx.count(pathGetTicket) != 1 {
			t.Error("a fresh ticket was renewed")
		}
		time.Sleep(jsTicketJitter + 10*time.Minute)
		r.wx.set(func(f *fakeWeChat) { f.latency = 100 * time.Millisecond })
		calls := r.wx.count(pathGetTicket)
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				if got, err := r.GetLasting(t.Context(), k, JSTicketMargin); err != nil || time.Until(got.ExpiresAt) < JSTicketMargin {
					t.Errorf("a ticket with %v left, %v", time.Until(got.ExpiresAt), err)
				}
			})
		}
		wg.Wait()
		if n := r.wx.count(pathGetTicket) - calls; n != 1 {
			t.Errorf("%d tickets were fetched", n)
		}
		// Nothing better is to be had, or not in time.
		second := lasting()
		time.Sleep(2*time.Hour - JSTicketMargin + time.Minute)
		r.get(t, AccountKey(testAccount))
		r.wx.set(func(f *fakeWeChat) { f.latency = 20 * time.Second })
		began := time.Now()
		if got := lasting(); !got.Value.Same(second.Value) || time.Since(began) != lastingWait {
			t.Errorf("another ticket after %v", time.Since(began))
		}
		synctest.Wait()
		time.Sleep(30 * time.Second)
		r.wx.set(func(f *fakeWeChat) { f.latency = 0 })
		third := lasting()
		if third.Value.Same(second.Value) {
			t.Error("the renewal that took long is lost")
		}
		time.Sleep(2*time.Hour - JSTicketMargin + time.Minute)
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(path string, _ map[string]any) (string, error) {
				if path == pathGetTicket {
					return wxError(48001, "api unauthorized"), nil
				}
				return "", nil
			}
		})
		for range 5 {
			if got := lasting(); !got.Value.Same(third.Value) {
				t.Error("not the ticket at hand")
			}
		}
		time.Sleep(JSTicketMargin)
		if _, err := r.GetLasting(t.Context(), k, JSTicketMargin); !hasCode(err, 48001) {
			t.Errorf("a dead ticket: %v", err)
		}
	})
}

// An appid that anybody may have made up is looked up, and WeChat is not asked; what the store may have lost is not denied.
func TestStoredPlatformOf(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		r.authorize(t, testPlatform, testAuthorizer)
		if platform, err := r.StoredPlatformOf(t.Context(), testAuthorizer); platform != testPlatform || err != nil {
			t.Errorf("%q, %v", platform, err)
		}
		infos := func() int { return r.wx.count(pathAuthorizerInfo) }
		before := infos()
		if _, err := r.StoredPlatformOf(t.Context(), appidOf(1)); !errors.Is(err, ErrNotAuthorized) {
			t.Errorf("a stranger: %v, want ErrNotAuthorized", err)
		}
		time.Sleep(time.Minute)
		r.store.empty()
		r.wx.set(func(f *fakeWeChat) { f.latency = 10 * time.Second })
		r.restart()
		for range 3 {
			if _, err := r.StoredPlatformOf(t.Context(), testAuthorizer); !errors.Is(err, ErrUnsure) {
				t.Errorf("lost: %v, want ErrUnsure", err)
			}
			if _, err := r.StoredPlatformOf(t.Context(), appidOf(1)); !errors.Is(err, ErrUnsure) {
				t.Errorf("a stranger to a new store: %v, want ErrUnsure", err)
			}
		}
		r.ticket(t, testPlatform)
		time.Sleep(time.Minute) // the list is read
		if platform, err := r.StoredPlatformOf(t.Context(), testAuthorizer); platform != testPlatform || err != nil {
			t.Errorf("found again: %q, %v", platform, err)
		}
		if _, err := r.StoredPlatformOf(t.Context(), appidOf(1)); !errors.Is(err, ErrNotAuthorized) {
			t.Errorf("a stranger: %v, want ErrNotAuthorized", err)
		}
		if n := infos() - before; n != 0 {
			t.Errorf("WeChat was asked about %d accounts", n)
		}
		if err := r.Revoke(t.Context(), testPlatform, testAuthorizer, time.Now()); err != nil {
			t.Fatal(err)
		}
		if _, err := r.StoredPlatformOf(t.Context(), testAuthorizer); !errors.Is(err, ErrNotAuthorized) {
			t.Errorf("revoked: %v, want ErrNotAuthorized", err)
		}
	})
}

// An account that WeChat is asked for because the store has lost it is found by its gh_ id too, for good or by the next question.
func TestUserNameOfAnAdoptedAccount(t *testing.T) {
	t.Parallel()
	for name, storeFails := range map[string]bool{"kept": false, "the store does not take the way back": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := healing(t)
				r.authorize(t, testPlatform, testAuthorizer)
				time.Sleep(time.Minute)
				r.store.empty()
				r.restart()
				r.refuse(pathAuthorizerList, 48001, "no list")
				r.ticket(t, testPlatform)
				want := "gh_" + testAuthorizer[2:]
				r.store.fail(func(op, name string) error {
					if storeFails && op == "store" && name == userNameName(want) {
						return errors.New("store away")
					}
					return nil
				})
				r.get(t, testAuthKey)
				r.store.fail(nil)
				if _, known := r.UserName(testPlatform, testAuthorizer); known == storeFails {
					t.Errorf("the gh_ id is known: %v", known)
				}
				time.Sleep(time.Minute)
				if _, appid, err := r.ByUserName(t.Context(), want); err != nil || appid != testAuthorizer {
					t.Errorf("by its gh_ id: %q, %v", appid, err)
				}
			})
		})
	}
}

// A record that a node writes once more, since the store has lost it, is found by its gh_ id as before.
func TestUserNameInAStoreEmptiedUnderUs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		if _, err := r.FetchAccountInfo(t.Context(), testPlatform, testAuthorizer); err != nil {
			t.Fatal(err)
		}
		r.store.empty()
		if _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); err != nil {
			t.Fatal(err)
		}
		if _, appid, err := r.ByUserName(t.Context(), "gh_"+testAuthorizer[2:]); err != nil || appid != testAuthorizer {
			t.Errorf("by its gh_ id: %q, %v", appid, err)
		}
	})
}

// A damaged way back from a gh_ id is set aside, so that the next search finds the account.
func TestDamagedWayBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		want := "gh_" + testAuthorizer[2:]
		if _, err := r.FetchAccountInfo(t.Context(), testPlatform, testAuthorizer); err != nil {
			t.Fatal(err)
		}
		_ = r.store.MemStore.Store(t.Context(), userNameName(want), []byte(`{"v":1,"platf`))
		if _, _, err := r.ByUserName(t.Context(), want); !errors.Is(err, ErrNotAuthorized) {
			t.Fatalf("by its gh_ id: %v", err)
		}
		<-r.SeekUserName(testPlatform, want)
		if _, appid, err := r.ByUserName(t.Context(), want); err != nil || appid != testAuthorizer {
			t.Errorf("by its gh_ id: %q, %v", appid, err)
		}
		if aside, err := r.store.MemStore.List(t.Context(), path.Dir(asideName(userNameName(want), time.Time{}))); len(aside) != 1 {
			t.Errorf("set aside: %v, %v", aside, err)
		}
	})
}

// No way back is kept from an id that WeChat does not tell.
func TestUserNameThatWeChatDoesNotTell(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		r.authorize(t, testPlatform, testAuthorizer)
		r.store.empty()
		r.restart()
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(p string, _ map[string]any) (string, error) {
				switch p {
				case pathAuthorizerInfo:
					return fmt.Sprintf(`{"authorizer_info":{},"authorization_info":{"authorizer_appid":%q,"authorizer_refresh_token":%q}}`, testAuthorizer, f.refresh[testAuthorizer]), nil
				case pathAuthorizerList:
					return wxError(48001, "no list"), nil
				}
				return "", nil
			}
		})
		r.ticket(t, testPlatform)
		r.store.hold(func(op, name string) {
			if op == "store" && strings.HasPrefix(name, userNameFolder) {
				t.Errorf("the way back from an id that is not known is kept: %s", name)
			}
		})
		r.get(t, testAuthKey)
	})
}

// A record that names the gh_ id of its account would keep the way back from being asked for again.
func TestUserNameWhoseWayBackIsNotKept(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		r.authorize(t, testPlatform, testAuthorizer)
		r.store.fail(func(op, name string) error {
			if op == "store" && strings.HasPrefix(name, userNameFolder) {
				return errors.New("store away")
			}
			return nil
		})
		r.get(t, testAuthKey)
		_, _ = r.UserName(testPlatform, testAuthorizer)
		time.Sleep(time.Second)
		if _, known := r.UserName(testPlatform, testAuthorizer); known || r.wx.count(pathAuthorizerInfo) == 0 {
			t.Errorf("the gh_ id is known: %v, asked %d times", known, r.wx.count(pathAuthorizerInfo))
		}
		r.store.fail(nil)
		time.Sleep(infoEvery)
		_, _ = r.UserName(testPlatform, testAuthorizer)
		time.Sleep(time.Second)
		if _, appid, err := r.ByUserName(t.Context(), "gh_"+testAuthorizer[2:]); err != nil || appid != testAuthorizer {
			t.Errorf("by its gh_ id: %q, %v", appid, err)
		}
	})
}

// The gh_ id is learned on first need, without waiting, and kept with the record.
func TestUserNameIsLearned(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		r.authorize(t, testPlatform, testAuthorizer)
		r.restart()
		r.wx.latency = 3 * time.Second
		want := "gh_" + testAuthorizer[2:]
		began := time.Now()
		for range 100 {
			if _, known := r.UserName(testPlatform, testAuthorizer); known {
				t.Fatal("known before anybody asked WeChat")
			}
		}
		if time.Since(began) != 0 {
			t.Error("it waited")
		}
		time.Sleep(10 * time.Second) // a component token, and the account
		_, _ = r.UserName(testPlatform, testAuthorizer)
		time.Sleep(10 * time.Second)
		if got, known := r.UserName(testPlatform, testAuthorizer); !known || got != want {
			t.Errorf("%q, %v", got, known)
		}
		if n := r.wx.count(pathAuthorizerInfo); n != 1 {
			t.Errorf("asked %d times", n)
		}
		platform, appid, err := r.ByUserName(t.Context(), want)
		if err != nil || platform != testPlatform || appid != testAuthorizer {
			t.Errorf("%s %s %v", platform, appid, err)
		}
		if _, _, err := r.ByUserName(t.Context(), "gh_nobody"); !errors.Is(err, ErrNotAuthorized) {
			t.Errorf("an unknown one: %v", err)
		}
		a, err := r.Authorizer(t.Context(), testPlatform, testAuthorizer)
		if err != nil || a.UserName != want || a.NickName != "N" || !slices.Equal(a.FuncInfo, []int{7}) {
			t.Errorf("%+v %v", a, err)
		}
		// It outlives renewals, restarts and re-authorizations.
		r.restart()
		if _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); err != nil {
			t.Fatal(err)
		}
		r.authorize(t, testPlatform, testAuthorizer)
		if got, known := r.UserName(testPlatform, testAuthorizer); !known || got != want {
			t.Errorf("%q, %v", got, known)
		}
		// Of an account that never authorised, nothing is asked.
		for range 20 {
			_, _ = r.UserName(testPlatform, "wx0000000000000077")
			_, _ = r.UserName("wx0000000000000099", testAuthorizer)
			time.Sleep(time.Minute)
		}
		if n := r.wx.count(pathAuthorizerInfo); n != 1 {
			t.Errorf("asked %d times", n)
		}
	})
}

// An app calls while an authorization that makes the refresh token void is accepted and not exchanged yet, as after a
// crash: the exchange is made first, and the call gets its token.
func TestCallWaitsForAPendingExchange(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		r.authorize(t, testPlatform, testAuthorizer)
		token := r.get(t, testAuthKey)
		var down atomic.Bool
		down.Store(true)
		r.wx.set(func(f *fakeWeChat) {
			f.strict = true
			f.hook = func(path string, _ map[string]any) (string, error) {
				if path == pathQueryAuth && down.Load() {
					return "", errors.New("connection refused")
				}
				return "", nil
			}
		})
		in := r.push(r.newCode(testAuthorizer))
		if err := r.Accept(t.Context(), in); err != nil {
			t.Fatal(err)
		}
		r.wx.kill(token)
		r.wx.set(func(f *fakeWeChat) {
			f.refresh[testAuthorizer] = "refreshtoken@@@of the new authorization"
			f.listing = map[string]string{testAuthorizer: ""} // no code of it was exchanged yet
		})
		time.Sleep(10 * time.Second) // the next attempt of the exchange is some seconds away
		down.Store(false)
		got, err := r.Renew(t.Context(), testAuthKey, token.Value)
		if err != nil {
			t.Fatalf("Renew: %v", err)
		}
		if got.Value.Same(token.Value) {
			t.Error("the old token")
		}
		if orphans := r.Orphans(testPlatform); len(orphans) != 0 {
			t.Errorf("orphans: %v", orphans)
		}
		time.Sleep(time.Minute)
		if r.intents(t) != 0 {
			t.Error("the intent is left")
		}
		if _, open := r.Manager.intents.latest(testAuthKey); open {
			t.Error("the intent is remembered")
		}
	})
}

// An account that authorises again while WeChat is asked whether it is gone is not marked unauthorized: what WeChat
// answers is about the authorization of before.
func TestAuthorizationDuringTheLastQuestion(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		r.authorize(t, testPlatform, testAuthorizer)
		time.Sleep(rosterAgain)
		var once atomic.Bool
		r.wx.set(func(f *fakeWeChat) {
			delete(f.refresh, testAuthorizer)
			f.hook = func(path string, body map[string]any) (string, error) {
				if path == pathAuthorizerInfo && once.CompareAndSwap(false, true) {
					r.authorize(t, testPlatform, testAuthorizer)
					return wxError(codeNotAuthorized, "component is not authorized by this account"), nil
				}
				return "", nil
			}
		})
		r.Suspect(testAuthKey)
		time.Sleep(2 * rosterAgain)
		if !once.Load() {
			t.Fatal("never asked")
		}
		if r.stored(t, testAuthKey).revoked() {
			t.Error("the new authorization was taken for the old one, which ended")
		}
		r.get(t, testAuthKey)
	})
}

// A code that is used up, as after a crash between WeChat's answer and the store, is made good also where the account
// had come by a redirect, whose time is ours and not WeChat's.
func TestUsedCodeIsMadeGoodAfterARedirect(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		r.authorize(t, testPlatform, testAuthorizer)
		time.Sleep(time.Hour)
		r.ticket(t, testPlatform)
		r.wx.set(func(f *fakeWeChat) { f.refresh[testAuthorizer] = "refreshtoken@@@new"; f.strict = true })
		in := r.push(secret.New("queryauthcode@@@used"))
		if err := r.Accept(t.Context(), in); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Minute)
		if r.intents(t) != 0 {
			t.Error("intent left")
		}
		if got := r.stored(t, testAuthKey).RefreshToken.Reveal(); got != "refreshtoken@@@new" {
			t.Errorf("held: %s; the log says %d times that WeChat's is", got, r.log.count("is held in its place"))
		}
	})
}

// The answer to the exchange of a pushed code is lost after a code from a redirect was exchanged. That the push is dated
// before the redirect says nothing: what WeChat exchanged last makes the tokens of before void.
func TestLostAnswerAfterARedirect(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		r.wx.set(func(f *fakeWeChat) { f.strict = true })
		in := r.push(r.newCode(testAuthorizer))
		time.Sleep(time.Second)
		r.authorize(t, testPlatform, testAuthorizer)
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(path string, body map[string]any) (string, error) {
				code, _ := body["authorization_code"].(string)
				var lost error
				f.set(func(f *fakeWeChat) {
					if path == pathQueryAuth && f.codes[code] != "" {
						delete(f.codes, code)
						f.refresh[testAuthorizer] = "refreshtoken@@@lost"
						lost = errors.New("connection reset")
					}
				})
				return "", lost
			}
		})
		if err := r.Accept(t.Context(), in); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Minute)
		if r.intents(t) != 0 {
			t.Error("intent left")
		}
		r.wantInStep(t)
	})
}

// While the store does not take the tokens of an authorization its intent stays open. When WeChat calls the refresh token
// that it brought invalid, that is no newer one on its way: the current one is had from WeChat.
func TestVoidRefreshTokenBehindAnOpenIntent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		r.wx.set(func(f *fakeWeChat) { f.strict = true })
		r.store.fail(noAuthorizers)
		if err := r.Accept(t.Context(), r.push(r.newCode(testAuthorizer))); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		token := r.get(t, testAuthKey)
		if r.intents(t) != 1 {
			t.Fatal("the intent is not open")
		}
		r.wx.kill(token)
		r.wx.set(func(f *fakeWeChat) { f.refresh[testAuthorizer] = "refreshtoken@@@elsewhere" })
		if _, err := r.Renew(t.Context(), testAuthKey, token.Value); err != nil {
			t.Errorf("Renew: %v", err)
		}
		r.store.fail(nil)
		time.Sleep(10 * time.Minute)
		r.wantInStep(t)
		if n := r.intents(t); n != 0 {
			t.Errorf("%d intents are left", n)
		}
	})
}

// What WeChat says of another account than the one it was asked about is not taken over.
func TestInfoOfAnotherAccount(t *testing.T) {
	t.Parallel()
	for _, field := range []string{"authorizer_appid", "appid", "authorization_appid"} {
		synctest.Test(t, func(t *testing.T) {
			r := healing(t)
			r.authorize(t, testPlatform, testAuthorizer)
			r.wx.set(func(f *fakeWeChat) {
				f.strict = true
				f.refresh[testAuthorizer] = "refreshtoken@@@elsewhere"
				f.hook = func(path string, body map[string]any) (string, error) {
					if path == pathAuthorizerInfo {
						return fmt.Sprintf(`{"authorizer_info":{"user_name":"gh_x"},"authorization_info":{%q:"wx0000000000000099","authorizer_refresh_token":"refreshtoken@@@elsewhere"}}`, field), nil
					}
					return "", nil
				}
			})
			r.wx.kill(r.get(t, testAuthKey))
			if _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); err == nil {
				t.Errorf("%s: another account's refresh token was taken", field)
			}
		})
	}
}

// An account that has to authorise again is not asked to once it took its authorization back.
func TestOrphanThatRevokes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		r.wx.set(func(f *fakeWeChat) { f.refresh[testAuthorizer] = "" })
		time.Sleep(25 * time.Hour)
		r.ticket(t, testPlatform)
		time.Sleep(time.Minute)
		if len(r.Orphans(testPlatform)) != 1 {
			t.Fatal("no orphan")
		}
		r.wx.set(func(f *fakeWeChat) { delete(f.refresh, testAuthorizer) })
		if err := r.Revoke(t.Context(), testPlatform, testAuthorizer, time.Now()); err != nil {
			t.Fatal(err)
		}
		if len(r.Orphans(testPlatform)) != 0 {
			t.Error("an account that took its authorization back is still asked to authorise again")
		}
	})
}

// A node that read the list and died while its clock was ahead keeps nobody from reading it.
func TestListIsReadWhateverTheClock(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.env.Platforms = r.env.Platforms[:1]
		r.env.RosterEvery = 24 * time.Hour
		r.wx.refresh[testAuthorizer] = "refreshtoken@@@1"
		if err := r.storeRecord(t.Context(), r.env.prepared(), rosterName(testPlatform), rosterWire{
			Walk: &walkWire{Node: "dead", At: time.Now().Add(48 * time.Hour).Unix(), StartedAt: 1, Steady: true},
		}); err != nil {
			t.Fatal(err)
		}
		r.Use(r.env)
		r.ticket(t, testPlatform)
		time.Sleep(10 * time.Minute)
		if r.wx.count(pathAuthorizerList) == 0 {
			t.Error("the list is not read")
		}
	})
}

// Nor does one that read it to its end then, and whose clock was set back, itself among others.
func TestListIsReadAfterTheClockWasSetBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.env.Platforms = r.env.Platforms[:1]
		r.env.RosterEvery = 24 * time.Hour
		r.wx.refresh[testAuthorizer] = "refreshtoken@@@1"
		if err := r.storeRecord(t.Context(), r.env.prepared(), rosterName(testPlatform), rosterWire{CompletedAt: time.Now().AddDate(3, 0, 0).Unix(), Took: 60}); err != nil {
			t.Fatal(err)
		}
		r.Use(r.env)
		r.ticket(t, testPlatform)
		time.Sleep(10 * time.Minute)
		if n := r.wx.count(pathAuthorizerList); n != 1 {
			t.Errorf("the list is read %d times", n)
		}
		// Clocks of two nodes may differ a little.
		if err := r.storeRecord(t.Context(), r.env.prepared(), rosterName(testPlatform), rosterWire{CompletedAt: time.Now().Add(time.Minute).Unix(), Took: 60}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Hour)
		if n := r.wx.count(pathAuthorizerList); n != 1 {
			t.Errorf("the list is read %d times although another node has just read it", n)
		}
	})
}

// A doubt is looked after as soon as any, also while the list was read, by what the store says, at a time that has not come yet.
func TestDoubtBesideAClockThatWasAhead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		r.authorize(t, testPlatform, testAuthorizer)
		r.restart()
		time.Sleep(time.Minute)
		other := NewManager()
		other.Use(r.env)
		defer other.Close()
		for range 3 { // one node reads the list, and then the other, after which both take it for new
			if err := r.storeRecord(t.Context(), r.env.prepared(), rosterName(testPlatform), rosterWire{CompletedAt: time.Now().AddDate(3, 0, 0).Unix(), Took: 60}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Hour)
		}
		if state, err := r.loadRoster(t.Context(), r.env.prepared(), testPlatform); err != nil || !state.ahead(time.Now()) {
			t.Fatalf("%+v, %v: the list has been read already", state, err)
		}
		away := func(string, map[string]any) (string, error) { return "", errors.New("no route to host") }
		r.wx.set(func(f *fakeWeChat) { f.hook = away })
		_ = r.store.MemStore.Store(t.Context(), testAuthKey.recordName(), []byte(`{"v":1,"gen`))
		if _, err := r.Get(t.Context(), testAuthKey); err == nil {
			t.Fatal("a token without a record")
		}
		time.Sleep(rosterCheck + time.Minute) // both have looked
		for name, m := range map[string]*Manager{"the node that has it": r.Manager, "another node": other} {
			if _, err := m.StoredPlatformOf(t.Context(), testAuthorizer); !errors.Is(err, ErrUnsure) {
				t.Errorf("%s: %v, want ErrUnsure", name, err)
			}
		}
		lists := r.wx.count(pathAuthorizerList)
		r.wx.set(func(f *fakeWeChat) { f.hook = nil })
		r.ticket(t, testPlatform)
		time.Sleep(rosterAgain + rosterCheck)
		if r.wx.count(pathAuthorizerList) == lists || r.stored(t, testAuthKey).RefreshToken.IsZero() {
			t.Error("the list has not been read since")
		}
		time.Sleep(10 * time.Hour)
		if n := r.wx.count(pathAuthorizerList) - lists; n > 2 {
			t.Errorf("the list was read %d times by two nodes", n)
		}
	})
}

// A list that takes 17 minutes to read is not read all day for one account in doubt.
func TestLongListRests(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.env.Platforms = r.env.Platforms[:1]
		r.env.RosterEvery = 24 * time.Hour
		const pages = 2000
		r.wx.set(func(f *fakeWeChat) {
			f.strict = true
			f.refresh[testAuthorizer] = "refreshtoken@@@1"
			f.hook = func(path string, _ map[string]any) (string, error) {
				if path != pathAuthorizerList {
					return "", nil
				}
				return fmt.Sprintf(`{"total_count":%d,"list":[{"authorizer_appid":%q,"refresh_token":"refreshtoken@@@1","auth_time":1}]}`, pages, testAuthorizer), nil
			}
		})
		r.Use(r.env)
		for range 6 {
			r.ticket(t, testPlatform)
			time.Sleep(10 * time.Minute)
		}
		r.get(t, testAuthKey)
		r.wx.set(func(f *fakeWeChat) {
			f.refresh[testAuthorizer] = "refreshtoken@@@elsewhere"
			f.listing = map[string]string{testAuthorizer: "refreshtoken@@@1"} // nothing heals it
		})
		before := r.wx.count(pathAuthorizerList)
		for range 6 * 6 {
			r.ticket(t, testPlatform)
			_, _ = r.Renew(t.Context(), testAuthKey, secret.String{})
			time.Sleep(10 * time.Minute)
		}
		if n := (r.wx.count(pathAuthorizerList) - before) / pages; n < 2 || n > 5 {
			t.Errorf("the list was read %d times in six hours", n)
		}
	})
}

// A page that is empty before the end, once, is not the end of the list.
func TestListThatBreaksOff(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]string{
		"empty page": `{"total_count":20,"list":[]}`,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				r.env.Platforms = r.env.Platforms[:1]
				r.env.RosterEvery = 24 * time.Hour
				var once atomic.Bool
				r.wx.set(func(f *fakeWeChat) {
					f.page = 7
					for i := range 20 {
						f.refresh[appidOf(i)] = fmt.Sprintf("refreshtoken@@@%d", i)
					}
					f.hook = func(path string, body map[string]any) (string, error) {
						if path == pathAuthorizerList && body["offset"].(float64) == 7 && once.CompareAndSwap(false, true) {
							return answer, nil
						}
						return "", nil
					}
				})
				r.Use(r.env)
				r.ticket(t, testPlatform)
				time.Sleep(time.Hour)
				for i := range 20 {
					if _, err := r.Get(t.Context(), AuthorizerKey(testPlatform, appidOf(i))); err != nil && !errors.Is(err, ErrNoTicket) {
						t.Errorf("account %d: %v", i, err)
					}
				}
			})
		})
	}
}

// A code that cannot be exchanged for hours is tried all the time, and told of rarely.
func TestIntentIsSaidRarely(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(string, map[string]any) (string, error) { return "", errors.New("connection refused") }
		})
		if err := r.Accept(t.Context(), r.push(r.newCode(testAuthorizer))); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Hour)
		if n := r.log.count("authorization code not exchanged") + r.log.count("authorization code died"); n < 20 || n > 20*6 {
			t.Errorf("said %d times in 20 hours", n)
		}
	})
}
