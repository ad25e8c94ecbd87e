package tokens

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

func TestExchangeRedirected(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.wx.set(func(f *fakeWeChat) { f.latency = time.Second })
		code := r.newCode(testAuthorizer)
		var wg sync.WaitGroup
		for range 5 {
			wg.Go(func() {
				a, err := r.ExchangeRedirected(t.Context(), testPlatform, code, time.Hour)
				if err != nil || a.AppID != testAuthorizer {
					t.Errorf("ExchangeRedirected = %+v, %v", a, err)
				}
			})
		}
		time.Sleep(time.Millisecond)
		if r.intents(t) != 1 {
			t.Error("the duty is not durable before WeChat answers")
		}
		wg.Wait()
		synctest.Wait()
		if n := r.intents(t); n != 0 {
			t.Errorf("%d duties are left", n)
		}
		if !r.stored(t, testAuthKey).AuthorizedHere {
			t.Error("our time is taken for WeChat's")
		}
		if n := r.wx.count(pathQueryAuth); n != 1 {
			t.Errorf("%d exchanges of one code", n)
		}
	})
}

// A code that WeChat does not know may be anybody's invention: it costs one call and leaves nothing behind.
func TestExchangeRedirectedRefusesInventions(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.env.RosterEvery = 0
		r.Use(r.env)
		time.Sleep(10 * time.Minute)
		lists := r.wx.count(pathAuthorizerList)
		_, err := r.ExchangeRedirected(t.Context(), testPlatform, secret.New("queryauthcode@@@made-up"), 0)
		if !hasCode(err, codeAuthCodeInvalid) {
			t.Errorf("error %v", err)
		}
		time.Sleep(10 * time.Minute)
		if n, l := r.wx.count(pathQueryAuth), r.wx.count(pathAuthorizerList)-lists; n != 1 || l != 0 || r.intents(t) != 0 {
			t.Errorf("%d exchanges, %d pages of the list, %d duties", n, l, r.intents(t))
		}
		if _, err := r.ExchangeRedirected(t.Context(), "wx00000000000000ee", secret.New("x"), 0); !errors.Is(err, ErrNotConfigured) {
			t.Errorf("unknown platform: %v", err)
		}
	})
}

// failedRedirect is a code whose exchange has failed when a visitor brought it, as further ones do until hook is set again.
func (r *rig) failedRedirect(t *testing.T) secret.String {
	t.Helper()
	r.refuseExchanges()
	code := r.newCode(testAuthorizer)
	if _, err := r.ExchangeRedirected(t.Context(), testPlatform, code, time.Hour); !errors.Is(err, ErrUnreachable) {
		t.Fatalf("error %v", err)
	}
	return code
}

// What WeChat does not answer goes on in the background, over a restart too, for as long as the code lives.
func TestExchangeRedirectedGoesOn(t *testing.T) {
	t.Parallel()
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprint("restart ", restart), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				code := r.failedRedirect(t)
				if r.intents(t) != 1 {
					t.Fatal("the duty is gone")
				}
				time.Sleep(backoffFirst - time.Millisecond)
				if n := r.wx.count(pathQueryAuth); n != 1 {
					t.Errorf("WeChat was asked %d times at once", n)
				}
				if restart {
					r.restart()
				}
				r.wx.set(func(f *fakeWeChat) { f.hook = nil })
				time.Sleep(5 * time.Minute)
				r.get(t, testAuthKey)
				if n := r.intents(t); n != 0 {
					t.Errorf("%d duties are left", n)
				}
				if a, err := r.ExchangeRedirected(t.Context(), testPlatform, code, time.Hour); err != nil && !restart || err == nil && a.AppID != testAuthorizer {
					t.Errorf("the code once more: %+v, %v", a, err)
				}
			})
		})
	}
}

// A push of the same code knows WeChat's time; the redirect does not take its place.
func TestExchangeRedirectedLeavesThePushedDuty(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.wx.set(func(f *fakeWeChat) { f.latency = time.Second })
		code := r.newCode(testAuthorizer)
		if err := r.Accept(t.Context(), r.push(code)); err != nil {
			t.Fatal(err)
		}
		if _, err := r.ExchangeRedirected(t.Context(), testPlatform, code, time.Hour); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if r.stored(t, testAuthKey).AuthorizedHere || r.intents(t) != 0 || r.wx.count(pathQueryAuth) != 1 {
			t.Errorf("record %+v, %d duties", r.stored(t, testAuthKey), r.intents(t))
		}
	})
}

// A push that comes when the redirect of the same code has failed knows more than that: the account, and WeChat's time. It takes the
// redirect's place, and does not wait for the redirect's next attempt.
func TestExchangeRedirectedGivesWayToThePush(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		code := r.failedRedirect(t)
		r.wx.set(func(f *fakeWeChat) { f.hook = nil })
		time.Sleep(backoffFirst / 2)
		asked := r.wx.count(pathQueryAuth)
		if err := r.Accept(t.Context(), r.push(code)); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if n := r.wx.count(pathQueryAuth); n != asked+1 || r.intents(t) != 0 {
			t.Errorf("%d exchanges after %d, %d duties are left", n, asked, r.intents(t))
		}
		if rec := r.stored(t, testAuthKey); rec.AuthorizedHere || rec.RefreshToken.IsZero() {
			t.Errorf("record %+v", rec)
		}
		if _, open := r.Manager.intents.latest(testAuthKey); open || len(r.Manager.intents.open()) != 0 {
			t.Error("the intent is remembered")
		}
	})
}

// A push comes while the redirect of the same code is being exchanged, at first or in the background, which WeChat then refuses for good: the
// push's duty outlives it, and the account's refresh token is had by that.
func TestExchangeRedirectedDeadLeavesThePush(t *testing.T) {
	t.Parallel()
	for _, background := range []bool{false, true} {
		t.Run(fmt.Sprint("background ", background), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				var down, deaf atomic.Bool
				r.wx.set(func(f *fakeWeChat) {
					f.refresh[testAuthorizer] = "refreshtoken@@@of_the_account"
					f.hook = func(path string, _ map[string]any) (string, error) {
						switch {
						case path == pathQueryAuth && !down.Load():
							return `{"errcode":61010,"errmsg":"code expired"}`, nil
						case path == pathQueryAuth, path != pathComponentToken && deaf.Load():
							return "", errors.New("connection refused")
						}
						return "", nil
					}
				})
				code := r.newCode(testAuthorizer)
				ended := make(chan error, 1)
				visit := func() {
					_, err := r.ExchangeRedirected(t.Context(), testPlatform, code, time.Hour)
					ended <- err
				}
				deaf.Store(true)
				if background {
					down.Store(true)
					visit()
					if err := <-ended; !errors.Is(err, ErrUnreachable) {
						t.Fatalf("error %v", err)
					}
					down.Store(false)
				}
				r.wx.set(func(f *fakeWeChat) { f.latency = 2 * time.Second })
				if !background {
					go visit()
				}
				time.Sleep(backoffFirst + time.Second) // an attempt waits for WeChat's answer
				if err := r.Accept(t.Context(), r.push(code)); err != nil {
					t.Fatal(err)
				}
				for range 20 {
					time.Sleep(time.Second)
					if r.intents(t) != 1 {
						t.Fatal("the push's duty is gone")
					}
				}
				deaf.Store(false)
				time.Sleep(5 * time.Minute)
				if rec := r.stored(t, testAuthKey); rec.RefreshToken.IsZero() || r.intents(t) != 0 {
					t.Errorf("record %+v, %d duties", rec, r.intents(t))
				}
			})
		})
	}
}

// A push comes while the redirect's duty is being written: the push's is what the store holds then.
func TestExchangeRedirectedDoesNotOverwriteThePush(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.refuseExchanges()
		code := r.newCode(testAuthorizer)
		in := r.push(code)
		name := intentName(in.authCode().hash())
		accepted := make(chan error, 1)
		var came atomic.Bool
		r.store.mu.Lock()
		r.store.before = func(op, at string) {
			if op == "store" && at == name && !came.Swap(true) {
				go func() { accepted <- r.Accept(t.Context(), in) }()
				synctest.Wait()
			}
		}
		r.store.mu.Unlock()
		if _, err := r.ExchangeRedirected(t.Context(), testPlatform, code, time.Hour); !errors.Is(err, ErrUnreachable) {
			t.Fatalf("error %v", err)
		}
		if err := <-accepted; err != nil {
			t.Fatal(err)
		}
		var there intentWire
		if err := r.loadRecord(t.Context(), r.env.prepared(), name, &there); err != nil || there.Redirect || there.AppID != testAuthorizer {
			t.Errorf("the store holds %+v, %v", there, err)
		}
	})
}

// What is written again when its code is done, as after a store's loss, is cleared away, and WeChat is not asked again.
func TestIntentWrittenAgainWhenDone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		in := r.push(r.newCode(testAuthorizer))
		if err := r.Accept(t.Context(), in); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		hash := in.authCode().hash()
		asked := r.wx.count(pathQueryAuth)
		if err := r.storeRecord(t.Context(), r.env.prepared(), intentName(hash), in.wire()); err != nil || r.intents(t) != 1 {
			t.Fatalf("%d duties, %v", r.intents(t), err)
		}
		r.Manager.queue.add(intentJobs+hash, 0, r.Manager.intentJob(hash))
		synctest.Wait()
		if n := r.wx.count(pathQueryAuth); n != asked || r.intents(t) != 0 || len(r.Manager.intents.open()) != 0 {
			t.Errorf("%d exchanges after %d, %d duties", n, asked, r.intents(t))
		}
	})
}

// The push went to another node, which wrote it down: the attempts for the redirect, here, are for the push then.
func TestExchangeRedirectedHearsOfThePush(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		code := r.failedRedirect(t)
		in := r.push(code)
		if err := r.storeRecord(t.Context(), r.env.prepared(), intentName(in.authCode().hash()), in.wire()); err != nil {
			t.Fatal(err)
		}
		r.wx.set(func(f *fakeWeChat) { f.hook = nil })
		time.Sleep(time.Minute)
		if rec := r.stored(t, testAuthKey); rec.AuthorizedHere || r.intents(t) != 0 || len(r.Manager.intents.open()) != 0 {
			t.Errorf("record %+v, %d duties", rec, r.intents(t))
		}
	})
}

// A store that takes nothing keeps nobody from authorising.
func TestExchangeRedirectedWithoutStore(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		code := r.newCode(testAuthorizer)
		r.store.fail(func(op, _ string) error {
			if op == "store" {
				return errors.New("disk full")
			}
			return nil
		})
		if a, err := r.ExchangeRedirected(t.Context(), testPlatform, code, time.Hour); err != nil || a.AppID != testAuthorizer {
			t.Errorf("ExchangeRedirected = %+v, %v", a, err)
		}
		r.store.fail(nil)
		time.Sleep(10 * time.Minute)
		if r.stored(t, testAuthKey).RefreshToken.IsZero() || r.intents(t) != 0 {
			t.Error("the tokens did not reach the store")
		}
	})
}

func TestFetchAccountInfo(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		if _, err := r.FetchAccountInfo(t.Context(), testPlatform, testAuthorizer); !hasCode(err, codeNotAuthorized) {
			t.Errorf("an account that has not authorised: %v", err)
		}
		r.authorize(t, testPlatform, testAuthorizer)
		info, err := r.FetchAccountInfo(t.Context(), testPlatform, testAuthorizer)
		if err != nil || info.AppID != testAuthorizer || info.NickName != "N" || info.UserName == "" || info.MiniProgram || len(info.FuncInfo) != 1 {
			t.Errorf("FetchAccountInfo = %+v, %v", info, err)
		}
		if r.stored(t, testAuthKey).UserName != info.UserName {
			t.Error("the gh_ id is not kept")
		}
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(path string, _ map[string]any) (string, error) {
				if path != pathAuthorizerInfo {
					return "", nil
				}
				return `{"authorizer_info":{"nick_name":"M\u0000","user_name":"gh_1","head_img":"https://wx.qlogo.cn/0","principal_name":"P","MiniProgramInfo":{"network":{}}}}`, nil
			}
		})
		info, err = r.FetchAccountInfo(t.Context(), testPlatform, testAuthorizer)
		if err != nil || info.NickName != "M" || info.HeadImg != "https://wx.qlogo.cn/0" || info.Principal != "P" || !info.MiniProgram {
			t.Errorf("a mini program: %+v, %v", info, err)
		}
	})
}

func TestAuthorizationLink(t *testing.T) {
	t.Parallel()
	const redirect = "https://wx.example.com/back?s=a_b"
	for _, tt := range []struct {
		name, pages string
		link        AuthorizationLink
		want        string
	}{
		{"computer", "", AuthorizationLink{}, "https://mp.weixin.qq.com/cgi-bin/componentloginpage?component_appid=P&pre_auth_code=c%40%401&redirect_uri=R&auth_type=3"},
		{"phone", "", AuthorizationLink{Mobile: true, AuthType: 6}, "https://open.weixin.qq.com/wxaopen/safe/bindcomponent?action=bindcomponent&no_scan=1&component_appid=P&pre_auth_code=c%40%401&redirect_uri=R&auth_type=6#wechat_redirect"},
		{"all", "http://127.0.0.1:1", AuthorizationLink{AppID: testAuthorizer, Categories: []int{1, 15}},
			"http://127.0.0.1:1/cgi-bin/componentloginpage?component_appid=P&pre_auth_code=c%40%401&redirect_uri=R&auth_type=3&biz_appid=" + testAuthorizer + "&category_id_list=1%7C15"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			tt.link.Platform, tt.link.Redirect = testPlatform, redirect
			want := strings.NewReplacer("=P&", "="+testPlatform+"&", "=R&", "="+url.QueryEscape(redirect)+"&").Replace(tt.want)
			if got := tt.link.text(tt.pages, secret.New("c@@1")); got != want {
				t.Errorf("link %s\nwant %s", got, want)
			}
		})
	}
}
