package tokens

import (
	"bytes"
	"errors"
	"io/fs"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// The log says to add the seal key that was removed. A reload with it is enough: codes die, and nobody restarts for them.
func TestUnreadableIntentIsTakenUpWithItsKey(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := startedWithOpenCode(t)
		other, err := crypto.NewSealer(bytes.Repeat([]byte{8}, 32))
		if err != nil {
			t.Fatal(err)
		}
		with := *r.env
		r.env.Sealer = other
		r.restart()
		r.wx.set(func(f *fakeWeChat) { f.hook = nil })
		time.Sleep(time.Minute)
		if r.log.count("an accepted authorization cannot be read") != 1 || r.intents(t) != 1 {
			t.Fatalf("%d duties, the log:\n%s", r.intents(t), r.log)
		}
		both, err := crypto.NewSealer(bytes.Repeat([]byte{8}, 32), bytes.Repeat([]byte{7}, 32))
		if err != nil {
			t.Fatal(err)
		}
		with.Sealer = both
		r.env = &with
		r.Use(r.env)
		r.ticket(t, testPlatform)
		time.Sleep(time.Minute)
		r.get(t, testAuthKey)
		if r.intents(t) != 0 {
			t.Error("the duty is left")
		}
		lists := r.store.count("list")
		r.Use(r.env)
		synctest.Wait()
		if n := r.store.count("list") - lists; n != 0 {
			t.Errorf("a reload lists %d folders, with nothing that could not be read", n)
		}
	})
}

// A write that was given up may take effect when the disk answers again. The push was refused then, and does not come again after the third;
// of a redirect that is exchanged, nothing must stay.
func TestDutyWhoseWriteTakesEffectLate(t *testing.T) {
	t.Parallel()
	for name, redirected := range map[string]bool{"push": false, "redirect": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				in := r.push(r.newCode(testAuthorizer))
				hash := in.authCode().hash()
				r.store.fail(func(op, name string) error {
					if op == "store" && name == intentName(hash) {
						return errors.New("given up")
					}
					return nil
				})
				if redirected {
					in.Redirected, in.AppID = true, ""
					if _, err := r.ExchangeRedirected(t.Context(), testPlatform, in.Code, time.Hour); err != nil {
						t.Fatal(err)
					}
				} else if err := r.Accept(t.Context(), in); !errors.Is(err, ErrStore) {
					t.Fatalf("Accept: %v", err)
				}
				time.Sleep(takeOverAfter - time.Second)
				if err := r.Accept(t.Context(), in); !redirected && !errors.Is(err, ErrStore) {
					t.Fatalf("Accept: %v", err)
				}
				r.store.fail(nil)
				time.Sleep(20 * time.Second)
				if err := r.storeRecord(t.Context(), r.env.prepared(), intentName(hash), in.wire()); err != nil {
					t.Fatal(err)
				}
				time.Sleep(takeOverAfter)
				r.get(t, testAuthKey)
				if n := r.wx.count(pathQueryAuth); n != 1 || r.intents(t) != 0 {
					t.Errorf("%d exchanges, %d duties are left", n, r.intents(t))
				}
			})
		})
	}
}

// A visitor's code that the store did not take at first is kept as soon as it does: the process may die before WeChat answers.
func TestRedirectedDutyIsWrittenLater(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.store.fail(failWrites)
		r.failedRedirect(t)
		if r.intents(t) != 0 {
			t.Fatal("the store took it")
		}
		r.store.fail(nil)
		time.Sleep(time.Minute)
		if r.intents(t) != 1 {
			t.Error("the duty is in memory only")
		}
		r.restart()
		r.wx.set(func(f *fakeWeChat) { f.hook = nil })
		r.ticket(t, testPlatform)
		time.Sleep(time.Minute)
		r.get(t, testAuthKey)
		if r.intents(t) != 0 {
			t.Error("the duty is left")
		}
	})
}

// Another node must not take a code for done whose tokens are on this node alone.
func TestOthersHearOfAnExchangeOnceItsTokensAreWritten(t *testing.T) {
	inSharedCluster(t, func(t *testing.T, a, b *sharer) {
		told := func(code secret.String) error {
			hash := authCode{platform: testPlatform, code: code}.hash()
			return b.sharedPeek(t.Context(), exchangedName(hash), new(exchangedWire))
		}
		code := a.newCode(testAuthorizer)
		if _, err := a.ExchangeRedirected(t.Context(), testPlatform, code, time.Hour); err != nil || told(code) != nil {
			t.Errorf("%v; the other node: %v", err, told(code))
		}
		a.store.fail(func(op, name string) error {
			if op != "load" && strings.Contains(name, "/authorizer/") {
				return errors.New("refused")
			}
			return nil
		})
		code = a.newCode(testAuthorizer)
		if _, err := a.ExchangeRedirected(t.Context(), testPlatform, code, time.Hour); err != nil || a.Unsaved() != 1 {
			t.Fatalf("%v, %d records wait", err, a.Unsaved())
		}
		if err := told(code); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the other node: %v", err)
		}
		a.store.fail(nil)
	})
}

// WeChat's answer to one code is lost; while it is asked for what the account's refresh token is, a visitor brings another code of the same
// account. What that brings is not written over by the older answer.
func TestAnotherCodeWhileTheAccountIsAskedFor(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.rotating()
		lost, other := r.newCode(testAuthorizer), r.newCode(testAuthorizer)
		asked := make(chan struct{})
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(path string, body map[string]any) (answer string, err error) {
				switch {
				case path == pathQueryAuth && body["authorization_code"] == lost.Reveal():
					r.wx.set(func(f *fakeWeChat) {
						if _, ok := f.codes[lost.Reveal()]; ok {
							delete(f.codes, lost.Reveal())
							f.refresh[testAuthorizer] = "refreshtoken@@@of the lost answer"
							err = errors.New("connection reset")
						}
					})
				case path == pathAuthorizerInfo:
					r.wx.set(func(f *fakeWeChat) {
						answer = `{"authorizer_info":{"user_name":"gh_1"},"authorization_info":{"authorizer_appid":"` + testAuthorizer +
							`","authorizer_refresh_token":"` + f.refresh[testAuthorizer] + `","func_info":[]}}`
					})
					close(asked)
					time.Sleep(exchangeTurn / 2)
				}
				return answer, err
			}
		})
		if err := r.Accept(t.Context(), r.push(lost)); err != nil {
			t.Fatal(err)
		}
		<-asked
		r.wx.set(func(f *fakeWeChat) { f.hook, f.latency = nil, time.Millisecond })
		if _, err := r.ExchangeRedirected(t.Context(), testPlatform, other, time.Hour); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		r.wantInStep(t)
		if r.intents(t) != 0 {
			t.Error("a duty is left")
		}
	})
}

// A platform is added on one node after the other. An authorization of it that the first one accepted, and could not finish before it
// ended, is none of the other's to give up: it is there when a node comes that has the platform.
func TestIntentOfAPlatformThatOnlyAnotherNodeHas(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a, b, _ := cluster(t)
		env := *b.env
		env.Platforms = env.Platforms[1:]
		b.env = &env
		b.Use(b.env)
		a.refuseExchanges()
		if err := a.Accept(t.Context(), a.push(a.newCode(testAuthorizer))); err != nil {
			t.Fatal(err)
		}
		a.Close()
		time.Sleep(3 * time.Hour) // longer than the code lives
		if n := a.intents(t); n != 1 {
			t.Errorf("%d duties are left", n)
		}
		if log := b.log.String(); strings.Contains(log, "authorization code") {
			t.Errorf("the node without the platform says: %s", log)
		}
		if n := b.wx.count(pathQueryAuth); n > 2 {
			t.Errorf("WeChat was asked %d times", n)
		}

		a.wx.set(func(f *fakeWeChat) { f.hook, f.refresh[testAuthorizer] = nil, "refreshtoken@@@of-wechat" })
		env.Platforms = a.env.Platforms
		b.Use(&env)
		b.ticket(t, testPlatform)
		time.Sleep(time.Minute)
		if _, err := b.Get(t.Context(), testAuthKey); err != nil {
			t.Errorf("with the platform: %v", err)
		}
		if n := a.intents(t); n != 0 {
			t.Errorf("with the platform: %d duties are left", n)
		}
	})
}

// Of a platform that is gone for good nothing stays.
func TestIntentOfAPlatformThatIsGone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := startedWithOpenCode(t)
		r.env.Platforms = r.env.Platforms[1:]
		r.restart()
		time.Sleep(2 * time.Hour)
		if n := r.intents(t); n != 1 {
			t.Errorf("%d duties are left", n)
		}
		time.Sleep(codeLife + deadCodeGrace)
		r.restart()
		time.Sleep(time.Hour)
		if n := r.intents(t); n != 0 {
			t.Errorf("%d duties are left of a platform that was taken out more than a day ago", n)
		}
	})
}

// A visitor's code that was exchanged is done with when the store deletes its record, be it later: the next process would take it for one that
// died.
func TestExchangedCodeIsForgottenLater(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.store.fail(func(op, _ string) error {
			if op == "delete" {
				return errDisk
			}
			return nil
		})
		if _, err := r.ExchangeRedirected(t.Context(), testPlatform, r.newCode(testAuthorizer), 0); err != nil {
			t.Fatal(err)
		}
		if r.intents(t) != 1 {
			t.Fatal("there is nothing left to be deleted")
		}
		r.store.fail(nil)
		time.Sleep(time.Minute)
		if n, calls := r.intents(t), r.wx.count(pathQueryAuth); n != 0 || calls != 1 {
			t.Errorf("%d codes are still to be exchanged, %d exchanges", n, calls)
		}
	})
}
