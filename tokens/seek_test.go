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
