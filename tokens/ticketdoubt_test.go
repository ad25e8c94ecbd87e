package tokens

import (
	"fmt"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// WeChat's word, in a call, that the ticket has expired or is invalid has it asked for another one: once, however many calls say so.
func TestTicketCalledBadInACall(t *testing.T) {
	t.Parallel()
	for _, code := range []int{61005, 61006, 61004, 61007} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				r.get(t, ComponentKey(testPlatform))
				time.Sleep(pushInterval) // since it was asked at the start
				r.ticket(t, testPlatform)
				r.ticket(t, testPlatform2)
				const path = "/cgi-bin/component/api_create_preauthcode"
				r.wx.set(func(f *fakeWeChat) {
					f.hook = func(called string, _ map[string]any) (string, error) {
						if called == path {
							return wxError(code, "component ticket"), nil
						}
						return "", nil
					}
				})
				before := r.wx.count(pathStartPush)
				for range 100 {
					if err := r.Call(t.Context(), ComponentKey(testPlatform), http.MethodPost, path, nil, nil, nil); !hasCode(err, int64(code)) {
						t.Fatal(err)
					}
					time.Sleep(time.Second)
				}
				want := 0
				if code == codeTicketExpired || code == codeTicketInvalid {
					want = 1
				}
				if n := r.wx.count(pathStartPush) - before; n != want || r.log.count("in doubt") != want {
					t.Errorf("asked %d times, want %d:\n%s", n, want, r.log.String())
				}
				r.get(t, ComponentKey(testPlatform)) // the ticket itself stays
				if err := r.barred(ComponentKey(testPlatform)); err != nil {
					t.Error(err)
				}
				time.Sleep(2 * time.Minute)
				r.ticket(t, testPlatform)
				r.ticket(t, testPlatform2)
				time.Sleep(20 * time.Minute)
				if n := r.wx.count(pathStartPush) - before; n != want {
					t.Errorf("asked %d times after a push came", n)
				}
			})
		})
	}
}

// Of two nodes that hear it at the same moment, over and over, one asks.
func TestTicketCalledBadOnTwoNodes(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		time.Sleep(pushInterval) // since they asked at the start
		a.ticket(t, testPlatform)
		a.ticket(t, testPlatform2)
		const path = "/cgi-bin/component/api_create_preauthcode"
		a.wx.set(func(f *fakeWeChat) {
			f.hook = func(called string, _ map[string]any) (string, error) {
				switch called {
				case path:
					return wxError(codeTicketInvalid, "component ticket"), nil
				case pathStartPush:
					time.Sleep(100 * time.Millisecond) // the other asks meanwhile
				}
				return "", nil
			}
		})
		before := a.wx.count(pathStartPush)
		for range 1300 {
			var calls sync.WaitGroup
			for _, r := range []*rig{a, b, a, b} {
				calls.Go(func() {
					if err := r.Call(t.Context(), ComponentKey(testPlatform), http.MethodPost, path, nil, nil, nil); !hasCode(err, codeTicketInvalid) {
						t.Error(err)
					}
				})
			}
			calls.Wait()
			time.Sleep(time.Second)
		}
		if n := a.wx.count(pathStartPush) - before; n != 3 {
			t.Errorf("asked %d times in 22 minutes", n)
		}
	})
}
