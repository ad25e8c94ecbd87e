package tokens

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// Accounts whose gh_ ids are not known are learned a few a minute while somebody asks, each once an hour at most if WeChat does not tell.
func TestSeekUserNames(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const accounts = 3*seekAccounts - 5
		r := started(t)
		has := func(appid string) {
			refresh := secret.New("refreshtoken@@@" + appid)
			r.wx.set(func(f *fakeWeChat) { f.refresh[appid] = refresh.Reveal() })
			r.seed(t, AuthorizerKey(testPlatform, appid), &record{RefreshToken: refresh, AuthorizedAt: time.Now()})
		}
		for n := range accounts {
			has(appidOf(n))
		}
		known := func(n int) bool {
			_, appid, err := r.ByUserName(t.Context(), fmt.Sprintf("gh_%s", appidOf(n)[2:]))
			return err == nil && appid == appidOf(n)
		}
		for step := 1; step <= 3; step++ {
			for range 10 {
				r.SeekUserNames(testPlatform)
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
			r.SeekUserNames(testPlatform)
			time.Sleep(seekEvery)
		}
		if got := r.wx.count(pathAuthorizerInfo); got != accounts {
			t.Errorf("WeChat was asked %d times about %d accounts", got, accounts)
		}
		r.refuse(pathAuthorizerInfo, 61003, "no")
		for n := range accounts {
			has(appidOf(accounts + n))
		}
		for range 121 {
			r.SeekUserNames(testPlatform)
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
			appid := appidOf(1000 + n)
			refresh := secret.New("refreshtoken@@@" + appid)
			r.wx.set(func(f *fakeWeChat) { f.refresh[appid] = refresh.Reveal() })
			r.seed(t, AuthorizerKey(testPlatform, appid), &record{RefreshToken: refresh, AuthorizedAt: time.Now()})
		}
		r.SeekUserNames(testPlatform)
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
		r.SeekUserNames(testPlatform)
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
