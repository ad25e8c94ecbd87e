package tokens

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// unnamed is an authorizer whose gh_ id is not known, and is "gh_" and the end of its appid.
func (r *rig) unnamed(t *testing.T, platform, appid string) {
	t.Helper()
	refresh := secret.New("refreshtoken@@@" + appid)
	r.wx.set(func(f *fakeWeChat) { f.refresh[appid] = refresh.Reveal() })
	r.seed(t, AuthorizerKey(platform, appid), &record{RefreshToken: refresh, AuthorizedAt: time.Now()})
}

// ended reports whether a channel is closed.
func ended(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// Accounts whose gh_ ids are not known are learned a few a minute while somebody asks, each once an hour at most if WeChat does not tell.
func TestSeekUserName(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const accounts = 3*seekAccounts - 5
		r := started(t)
		for n := range accounts {
			r.unnamed(t, testPlatform, appidOf(n))
		}
		known := func(n int) bool {
			_, appid, err := r.ByUserName(t.Context(), fmt.Sprintf("gh_%s", appidOf(n)[2:]))
			return err == nil && appid == appidOf(n)
		}
		for step := 1; step <= 3; step++ {
			for range 10 {
				r.SeekUserName(testPlatform, "gh_stranger")
			}
			synctest.Wait()
			if got, want := r.wx.count(pathAuthorizerInfo), min(step*seekAccounts, accounts); got != want {
				t.Errorf("step %d: WeChat was asked %d times, want %d", step, got, want)
			}
			time.Sleep(seekEvery)
		}
		for n := range accounts {
			if !known(n) {
				t.Errorf("account %d is not known", n)
			}
		}
		for range 100 {
			r.SeekUserName(testPlatform, "gh_stranger")
			time.Sleep(seekEvery)
		}
		if got := r.wx.count(pathAuthorizerInfo); got != accounts {
			t.Errorf("WeChat was asked %d times about %d accounts", got, accounts)
		}
		r.refuse(pathAuthorizerInfo, 61003, "no")
		for n := range accounts {
			r.unnamed(t, testPlatform, appidOf(accounts+n))
		}
		for range 121 {
			r.SeekUserName(testPlatform, "gh_stranger")
			time.Sleep(seekEvery)
		}
		if got := r.wx.count(pathAuthorizerInfo) - accounts; got < accounts || got > 3*accounts {
			t.Errorf("WeChat, which does not tell, was asked %d times in two hours about %d accounts", got, accounts)
		}
	})
}

// Accounts that brought no refresh token, about which WeChat cannot be asked, do not stand in the way of those behind them.
func TestSeekPassesOverAccountsWithoutRefreshToken(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		for n := range 3 * seekAccounts {
			r.seed(t, AuthorizerKey(testPlatform, appidOf(n)), &record{AuthorizedAt: time.Now()})
		}
		for n := range seekAccounts {
			r.unnamed(t, testPlatform, appidOf(1000+n))
		}
		r.SeekUserName(testPlatform, "gh_stranger")
		synctest.Wait()
		for n := range seekAccounts {
			appid := appidOf(1000 + n)
			if _, found, err := r.ByUserName(t.Context(), "gh_"+appid[2:]); err != nil || found != appid {
				t.Fatalf("account %d: %q, %v", n, found, err)
			}
		}
	})
}

// A search that came to the end rests for an hour. An account that authorises meanwhile is learned at once, and none where nobody looks.
func TestAuthorizedWhileASearchRests(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		authorize := func(appid string) {
			if _, err := r.ExchangeAuthCode(t.Context(), testPlatform, appid, r.newCode(appid)); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		authorize(appidOf(1))
		if got := r.wx.count(pathAuthorizerInfo); got != 0 {
			t.Errorf("WeChat was asked %d times, and nobody looks for an account", got)
		}
		r.SeekUserName(testPlatform, "gh_stranger")
		synctest.Wait()
		authorize(appidOf(2))
		for n := 1; n <= 2; n++ {
			if _, found, err := r.ByUserName(t.Context(), "gh_"+appidOf(n)[2:]); err != nil || found != appidOf(n) {
				t.Errorf("account %d: %q, %v", n, found, err)
			}
		}
		authorize(appidOf(2))
		if got := r.wx.count(pathAuthorizerInfo); got != 2 {
			t.Errorf("WeChat was asked %d times about two accounts", got)
		}
	})
}

// Who waits for a gh_ id hears of it as soon as it is known, and of others when the step that could have learned them has ended. One search
// is for all, and where none can tell, nobody waits.
func TestSeekWakesWhoWaits(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		for n := range seekAccounts {
			r.unnamed(t, testPlatform, appidOf(n))
		}
		r.get(t, ComponentKey(testPlatform))
		r.wx.set(func(f *fakeWeChat) { f.latency = 100 * time.Millisecond })
		began := time.Now()
		stranger := r.SeekUserName(testPlatform, "gh_stranger")
		if again := r.SeekUserName(testPlatform, "gh_stranger"); again != stranger {
			t.Error("two wait for one id in two ways")
		}
		var waiting sync.WaitGroup
		woken := make([]time.Duration, seekAccounts)
		for n := range woken {
			waits := r.SeekUserName(testPlatform, "gh_"+appidOf(n)[2:])
			waiting.Go(func() {
				<-waits
				woken[n] = time.Since(began)
			})
		}
		for n := range seekAccounts {
			<-r.SeekUserName(testPlatform, "gh_"+appidOf(n)[2:])
			if _, appid, err := r.ByUserName(t.Context(), "gh_"+appidOf(n)[2:]); err != nil || appid != appidOf(n) {
				t.Errorf("account %d: %q, %v", n, appid, err)
			}
			if left := seekAccounts - r.wx.count(pathAuthorizerInfo); left > 0 && ended(stranger) {
				t.Fatalf("the step has ended, and was to ask %d times more", left)
			}
			if r.wx.count(pathAuthorizerInfo) == seekAccounts {
				break // those who come later find the others known
			}
		}
		<-stranger
		if took := time.Since(began); took != seekAccounts*100*time.Millisecond {
			t.Errorf("the step took %s", took)
		}
		waiting.Wait()
		slices.Sort(woken)
		for n, after := range woken {
			if want := time.Duration(n+1) * 100 * time.Millisecond; after != want {
				t.Errorf("who waits for the id that is learned after %s is woken after %s", want, after)
			}
		}
		if got := r.wx.count(pathAuthorizerInfo); got != seekAccounts {
			t.Errorf("WeChat was asked %d times", got)
		}
		time.Sleep(seekEvery) // it came to the end, and rests
		if r.SeekUserName(testPlatform, "gh_stranger") != nil {
			t.Error("somebody waits for a search that rests")
		}
		time.Sleep(seekAgain)
		last := r.SeekUserName(testPlatform, "gh_stranger")
		if last == nil {
			t.Fatal("no search begins after the rest")
		}
		synctest.Wait()
		if !ended(last) {
			t.Error("a search that found nothing to ask did not end")
		}
	})
}

// An account that is asked about for another reason is waited for too: while the search rests, and when a step passes it over.
func TestSeekWaitsForWhatIsUnderWay(t *testing.T) {
	t.Parallel()
	for name, begin := range map[string]func(t *testing.T, r *rig){
		"just authorised, while the search rests": func(t *testing.T, r *rig) {
			<-r.SeekUserName(testPlatform, "gh_stranger")
			code := r.newCode(testAuthorizer)
			r.wx.set(func(f *fakeWeChat) { f.latency = time.Second })
			if _, err := r.ExchangeAuthCode(t.Context(), testPlatform, testAuthorizer, code); err != nil {
				t.Fatal(err)
			}
		},
		"by a message on its own path, while a step passes it over": func(_ *testing.T, r *rig) {
			r.unnamed(t, testPlatform, testAuthorizer)
			r.get(t, testAuthKey)
			r.wx.set(func(f *fakeWeChat) { f.latency = time.Second })
			_, _ = r.UserName(testPlatform, testAuthorizer)
		},
		"by two messages on its own path, of an account that is not in memory": func(_ *testing.T, r *rig) {
			<-r.SeekUserName(testPlatform, "gh_stranger") // now the search rests
			r.unnamed(t, testPlatform, testAuthorizer)
			r.wx.set(func(f *fakeWeChat) { f.latency = time.Second })
			for range 2 {
				_, _ = r.UserName(testPlatform, testAuthorizer)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				r.get(t, ComponentKey(testPlatform))
				begin(t, r)
				asked := r.wx.count(pathAuthorizerInfo)
				time.Sleep(100 * time.Millisecond)
				began := time.Now()
				waits := r.SeekUserName(testPlatform, "gh_"+testAuthorizer[2:])
				if waits == nil {
					t.Fatal("nobody waits for what is under way")
				}
				<-waits
				if took := time.Since(began); took != 900*time.Millisecond {
					t.Errorf("it was waited for %s", took)
				}
				if _, appid, err := r.ByUserName(t.Context(), "gh_"+testAuthorizer[2:]); err != nil || appid != testAuthorizer {
					t.Errorf("%q, %v", appid, err)
				}
				synctest.Wait()
				if got := r.wx.count(pathAuthorizerInfo) - asked; got > 1 {
					t.Errorf("WeChat was asked %d times about one account", got)
				}
				if r.SeekUserName(testPlatform, "gh_stranger") != nil {
					t.Error("somebody waits, and nothing is under way")
				}
			})
		})
	}
}

// An account's record that names its gh_ id, without a way back from it, is found by the search, and WeChat is not asked.
func TestSeekMendsTheWayBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		for n := range 3 * seekAccounts {
			refresh := secret.New("refreshtoken@@@" + appidOf(n))
			r.seed(t, AuthorizerKey(testPlatform, appidOf(n)), &record{RefreshToken: refresh, AuthorizedAt: time.Now(), UserName: "gh_" + appidOf(n)[2:]})
		}
		appid := appidOf(2 * seekAccounts)
		<-r.SeekUserName(testPlatform, "gh_"+appid[2:])
		if _, found, err := r.ByUserName(t.Context(), "gh_"+appid[2:]); err != nil || found != appid {
			t.Errorf("%q, %v", found, err)
		}
		if got := r.wx.count(pathAuthorizerInfo); got != 0 {
			t.Errorf("WeChat was asked about %d accounts", got)
		}
	})
}

// A search between two steps can tell nothing, nor can one that has ended with the manager: it wakes who waits.
func TestSeekBetweenStepsAndAfterTheEnd(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		for n := range 2*seekAccounts + 1 {
			r.unnamed(t, testPlatform, appidOf(n))
		}
		<-r.SeekUserName(testPlatform, "gh_stranger")
		if r.SeekUserName(testPlatform, "gh_stranger") != nil {
			t.Error("somebody waits between two steps")
		}
		time.Sleep(seekEvery)
		r.wx.set(func(f *fakeWeChat) { f.latency = time.Second })
		waits := r.SeekUserName(testPlatform, "gh_stranger")
		time.Sleep(time.Millisecond)
		if ended(waits) {
			t.Fatal("the second step has ended")
		}
		began := time.Now()
		var end sync.WaitGroup
		defer end.Wait()
		end.Go(r.Close)
		<-waits
		if took := time.Since(began); took != 0 {
			t.Errorf("who waited was woken %s after the end", took)
		}
		if r.SeekUserName(testPlatform, "gh_stranger") != nil || r.SeekUserName(testPlatform2, "gh_stranger") != nil {
			t.Error("a search begins after the end")
		}
	})
}

// A step for which the queue has no place is waited for, and asked for again once a second.
func TestSeekWhileTheQueueIsFull(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.unnamed(t, testPlatform, testAuthorizer)
		r.get(t, ComponentKey(testPlatform))
		free := make(chan struct{})
		for n := range maxLight {
			if !r.queue.addLight(fmt.Sprintf("filler %d", n), func(context.Context) { <-free }) {
				t.Fatalf("%d jobs fill the queue", n)
			}
		}
		began := time.Now()
		for range 3 {
			waits := r.SeekUserName(testPlatform, "gh_"+testAuthorizer[2:])
			if waits == nil {
				t.Fatal("a step that may soon be queued is not waited for")
			}
			<-waits
		}
		if took := time.Since(began); took != 3*seekQueueFull {
			t.Errorf("it was asked for three times in %s", took)
		}
		close(free)
		synctest.Wait()
		<-r.SeekUserName(testPlatform, "gh_"+testAuthorizer[2:])
		if _, appid, err := r.ByUserName(t.Context(), "gh_"+testAuthorizer[2:]); err != nil || appid != testAuthorizer {
			t.Errorf("%q, %v", appid, err)
		}
	})
}

// While WeChat hangs, searches for many platforms leave workers to what must be done, and each ends with its first question.
func TestSeekLeavesWorkersToOthers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const platforms = 2 * queueWorkers
		r := newRig(t)
		for n := range platforms {
			r.env.Platforms = append(r.env.Platforms, PlatformCredentials{appidOf(1000 + n), secret.New(testPlatformSecret)})
		}
		r.Use(r.env)
		for _, p := range r.env.Platforms {
			r.ticket(t, p.AppID)
			r.get(t, ComponentKey(p.AppID))
		}
		synctest.Wait()
		for n := range platforms {
			for a := range 3 {
				r.unnamed(t, appidOf(1000+n), appidOf(10*n+a))
			}
		}
		code := r.newCode(testAuthorizer)
		r.wx.set(func(f *fakeWeChat) { f.latency = time.Hour })
		var searches []<-chan struct{}
		for n := range platforms {
			searches = append(searches, r.SeekUserName(appidOf(1000+n), "gh_stranger"))
		}
		synctest.Wait()
		if got := r.wx.count(pathAuthorizerInfo); got == 0 {
			t.Fatal("no search has begun")
		}
		if err := r.Accept(t.Context(), r.push(code)); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if got := r.wx.count(pathQueryAuth); got != 1 {
			t.Errorf("the code of an event was tried %d times while WeChat hangs, want at once", got)
		}
		began := time.Now()
		for _, s := range searches {
			<-s
		}
		if took, want := time.Since(began), platforms/maxAsking*DefaultTimeout; took > want {
			t.Errorf("the searches ended after %s, want within %s", took, want)
		}
		if got := r.wx.count(pathAuthorizerInfo); got != platforms {
			t.Errorf("WeChat, which hangs, was asked %d times by %d searches", got, platforms)
		}
	})
}

// A question that WeChat does not answer, or for which there is no token of the platform's, puts nobody off for long.
func TestSeekWhileWeChatIsAway(t *testing.T) {
	t.Parallel()
	for name, away := range map[string]func(r *rig) (back func()){
		"WeChat not reached": func(r *rig) func() {
			r.ticket(t, testPlatform)
			r.wx.set(func(f *fakeWeChat) {
				f.hook = func(path string, _ map[string]any) (string, error) {
					if path == pathAuthorizerInfo {
						return "", errors.New("connection refused")
					}
					return "", nil
				}
			})
			return func() { r.wx.set(func(f *fakeWeChat) { f.hook = nil }) }
		},
		"no ticket": func(r *rig) func() { return func() { r.ticket(t, testPlatform) } },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				r.Use(r.env)
				back := away(r)
				synctest.Wait()
				const accounts = 5
				for n := range accounts {
					r.unnamed(t, testPlatform, appidOf(n))
				}
				for range 10 {
					asked := r.wx.count(pathAuthorizerInfo)
					if s := r.SeekUserName(testPlatform, "gh_stranger"); s != nil {
						<-s
					}
					if got := r.wx.count(pathAuthorizerInfo) - asked; got > 1 {
						t.Errorf("a step asked %d times in vain", got)
					}
					time.Sleep(seekEvery)
				}
				back()
				for range 3 {
					r.SeekUserName(testPlatform, "gh_stranger")
					time.Sleep(seekEvery)
				}
				for n := range accounts {
					if _, appid, err := r.ByUserName(t.Context(), "gh_"+appidOf(n)[2:]); err != nil || appid != appidOf(n) {
						t.Errorf("account %d: %q, %v", n, appid, err)
					}
				}
			})
		})
	}
}

// Nor does an account that the store did not give when its turn came, at the end of a search.
func TestSeekWhileTheStoreIsAway(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.unnamed(t, testPlatform, appidOf(1))
		name, loads := AuthorizerKey(testPlatform, appidOf(1)).recordName(), 0
		r.store.fail(func(op, of string) error {
			if op == "load" && of == name {
				if loads++; loads > 1 { // it is there while the page is read
					return errors.New("store away")
				}
			}
			return nil
		})
		r.SeekUserName(testPlatform, "gh_stranger")
		synctest.Wait()
		if asked := r.wx.count(pathAuthorizerInfo); loads < 2 || asked > 0 {
			t.Fatalf("loaded %d times, asked %d times", loads, asked)
		}
		r.store.fail(nil)
		for range 3 {
			time.Sleep(seekEvery)
			r.SeekUserName(testPlatform, "gh_stranger")
			synctest.Wait()
		}
		if _, appid, err := r.ByUserName(t.Context(), "gh_"+appidOf(1)[2:]); err != nil || appid != appidOf(1) {
			t.Errorf("after three minutes: %q, %v", appid, err)
		}
	})
}

// Nodes that search at the same time hear of each other what they learn: WeChat is not asked about an account by each of them.
func TestSeekOnTwoNodes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const accounts = 3 * seekAccounts
		a, b, _ := cluster(t)
		for n := range accounts {
			a.unnamed(t, testPlatform, appidOf(n))
		}
		for _, r := range []*rig{a, b} {
			r.get(t, ComponentKey(testPlatform))
		}
		a.wx.set(func(f *fakeWeChat) { f.latency = 50 * time.Millisecond })
		for step := range 3 {
			first, second := a.SeekUserName(testPlatform, "gh_stranger"), b.SeekUserName(testPlatform, "gh_stranger")
			if first == nil || second == nil {
				break
			}
			<-first
			<-second
			known := 0
			for n := range accounts {
				if _, _, err := b.ByUserName(t.Context(), "gh_"+appidOf(n)[2:]); err == nil {
					known++
				}
			}
			// By chance both ask about the same one at the same moment: with each question one of the sixty, and later of the last.
			if asked := a.wx.count(pathAuthorizerInfo); asked > known+10 || step == 0 && known < 3*seekAccounts/2 {
				t.Errorf("after step %d WeChat was asked %d times, and %d accounts are known", step+1, asked, known)
			}
			time.Sleep(seekEvery)
		}
		for n := range accounts {
			if _, _, err := b.ByUserName(t.Context(), "gh_"+appidOf(n)[2:]); err != nil {
				t.Errorf("account %d: %v", n, err)
			}
		}
	})
}

// A node on which somebody waits hears what another node has learned.
func TestSeekHearsOtherNodes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a, b, _ := cluster(t)
		a.unnamed(t, testPlatform, testAuthorizer)
		a.get(t, ComponentKey(testPlatform))
		b.get(t, ComponentKey(testPlatform))
		a.wx.set(func(f *fakeWeChat) { f.latency = 5 * time.Second })
		waits := b.SeekUserName(testPlatform, "gh_"+testAuthorizer[2:])
		time.Sleep(time.Second)
		a.wx.set(func(f *fakeWeChat) { f.latency = 0 })
		began := time.Now()
		a.SeekUserName(testPlatform, "gh_stranger")
		<-waits
		if took := time.Since(began); took != 0 {
			t.Errorf("it was heard of after %s", took)
		}
		if _, appid, err := b.ByUserName(t.Context(), "gh_"+testAuthorizer[2:]); err != nil || appid != testAuthorizer {
			t.Errorf("%q, %v", appid, err)
		}
	})
}
