package tokens

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// lateExchanges is a rig, in a bubble, whose exchanges take some seconds, and whose list was read: the store has lost nothing.
func lateExchanges(t *testing.T, by time.Duration) *rig {
	t.Helper()
	r := newRig(t)
	client, err := NewClient(ClientOptions{Transport: lateAnswers{r.wx, pathQueryAuth, by}})
	if err != nil {
		t.Fatal(err)
	}
	r.env.API, r.env.RosterEvery = client, 24*time.Hour
	r.Use(r.env)
	for _, p := range []string{testPlatform, testPlatform2} {
		r.ticket(t, p)
	}
	time.Sleep(time.Minute)
	for _, p := range []string{testPlatform, testPlatform2} {
		if r.rosters.incomplete(p) {
			t.Fatal("the list is not read")
		}
	}
	return r
}

// busyQueue keeps the workers of the queue busy, so that no exchange begins.
func (r *rig) busyQueue(by time.Duration) {
	for i := range queueWorkers {
		r.queue.add(fmt.Sprint("busy ", i), 0, func(ctx context.Context) error {
			select {
			case <-time.After(by):
			case <-ctx.Done():
			}
			return nil
		})
	}
	synctest.Wait()
}

// accept has WeChat push a code of the account.
func (r *rig) accept(t *testing.T) Intent {
	t.Helper()
	in := r.push(r.newCode(testAuthorizer))
	if err := r.Accept(t.Context(), in); err != nil {
		t.Fatal(err)
	}
	return in
}

// Whoever asks for an account that is just authorising gets what its code brings, whatever the record says so far, and WeChat is asked for
// nothing else.
func TestCallsWaitForAnExchange(t *testing.T) {
	t.Parallel()
	jsKey := Key{Kind: KindJSAPI, Platform: testPlatform, AppID: testAuthorizer}
	token := func(k Key) func(context.Context, *rig) error {
		return func(ctx context.Context, r *rig) error {
			_, err := r.Get(ctx, k)
			return err
		}
	}
	asks := map[string]func(context.Context, *rig) error{
		"Get":    token(testAuthKey),
		"ticket": token(jsKey),
		"Renew": func(ctx context.Context, r *rig) error {
			_, err := r.Renew(ctx, testAuthKey, secret.New("token of before"))
			return err
		},
		"Renew what is current": func(ctx context.Context, r *rig) error {
			_, err := r.Renew(ctx, testAuthKey, secret.String{})
			return err
		},
		"Authorizer": func(ctx context.Context, r *rig) error {
			a, err := r.Authorizer(ctx, testPlatform, testAuthorizer)
			if err == nil && len(a.FuncInfo) != 2 {
				err = fmt.Errorf("permissions %v", a.FuncInfo)
			}
			return err
		},
		"PlatformOf": func(ctx context.Context, r *rig) error {
			p, err := r.PlatformOf(ctx, testAuthorizer)
			if err == nil && p != testPlatform {
				err = fmt.Errorf("platform %s", p)
			}
			return err
		},
	}
	begins := map[string]struct {
		queued bool // the exchange has not begun
		with   func(*testing.T, *rig)
	}{
		"unknown": {false, func(*testing.T, *rig) {}},
		"revoked": {false, func(t *testing.T, r *rig) {
			r.authorize(t, testPlatform, testAuthorizer)
			r.get(t, jsKey)
			time.Sleep(time.Minute)
			revoke(t, r)
			time.Sleep(time.Minute)
		}},
		"queued": {true, func(_ *testing.T, r *rig) { r.busyQueue(10 * time.Second) }},
	}
	for begin, before := range begins {
		for name, ask := range asks {
			t.Run(begin+"/"+name, func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					r := lateExchanges(t, 4*time.Second)
					before.with(t, r)
					exchanges, renewals := r.wx.count(pathQueryAuth), r.wx.count(pathAuthorizerToken)
					r.accept(t)
					time.Sleep(2 * time.Second)
					if n := r.wx.count(pathQueryAuth) - exchanges; n != 0 == before.queued {
						t.Fatalf("%d exchanges have begun", n)
					}
					began := time.Now()
					if err := ask(t.Context(), r); err != nil {
						t.Errorf("after %v: %v", time.Since(began), err)
					}
					if n := r.wx.count(pathQueryAuth) - exchanges; n != 1 {
						t.Errorf("%d exchanges", n)
					}
					if n := r.wx.count(pathAuthorizerToken) - renewals; n != 0 {
						t.Errorf("%d renewals", n)
					}
				})
			})
		}
	}
}

// Once an attempt has failed, calls make none of their own, and wait for none but the one that is under way.
func TestCallsMakeNoExchange(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := lateExchanges(t, time.Millisecond)
		r.refuseExchanges()
		r.accept(t)
		time.Sleep(10 * time.Second)
		for range 5 * 60 {
			time.Sleep(990 * time.Millisecond)
			before, began := r.wx.count(pathQueryAuth), time.Now()
			if _, err := r.Get(t.Context(), testAuthKey); !errors.Is(err, ErrNotAuthorized) {
				t.Fatalf("Get: %v", err)
			}
			if _, err := r.PlatformOf(t.Context(), testAuthorizer); !errors.Is(err, ErrNotAuthorized) {
				t.Fatalf("PlatformOf: %v", err)
			}
			if n := r.wx.count(pathQueryAuth) - before; n > 0 {
				t.Fatalf("%d exchanges during a call", n)
			}
			if took := time.Since(began); took > time.Millisecond {
				t.Fatalf("a call waited for %v", took)
			}
		}
		r.wx.set(func(f *fakeWeChat) { f.hook = nil })
		time.Sleep(backoffMost)
		r.get(t, testAuthKey)
	})
}

// While WeChat hangs, a call waits no longer than for the attempt that is under way, or than its caller does.
func TestCallDuringAnExchangeThatHangs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := lateExchanges(t, time.Millisecond)
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(path string, _ map[string]any) (string, error) {
				if path == pathQueryAuth {
					time.Sleep(DefaultTimeout)
					return "", errors.New("no answer")
				}
				return "", nil
			}
		})
		r.accept(t)
		time.Sleep(time.Second)
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := r.Get(ctx, testAuthKey); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != time.Second {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
		if _, err := r.Get(t.Context(), testAuthKey); !errors.Is(err, ErrNotAuthorized) {
			t.Errorf("Get: %v", err)
		}
		if took := time.Since(began); took < 2*time.Second || took > DefaultTimeout {
			t.Errorf("the attempt had failed before the call, or the call waited for another: %v", took)
		}
	})
}

// A first attempt that does not begin is waited for as long as one may take, no longer than the gateway runs, and also while another push of the
// same code takes the first one's place.
func TestCallBeforeAnExchangeThatDoesNotBegin(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		then func(r *rig, hash string, in Intent)
		want error
		took time.Duration
	}{
		"limit": {func(*rig, string, Intent) {}, ErrNotAuthorized, exchangeTimeout},
		"close": {func(r *rig, _ string, _ Intent) { r.Close() }, ErrClosed, 0},
		"replaced": {func(r *rig, hash string, in Intent) {
			in.CreatedAt = in.CreatedAt.Add(time.Second)
			r.Manager.intents.add(hash, in)
			synctest.Wait()
			r.queueIntent(hash, in, 0)
		}, nil, 4 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := lateExchanges(t, 4*time.Second)
				in := r.push(r.newCode(testAuthorizer))
				hash := in.authCode().hash()
				r.Manager.intents.add(hash, in) // without its job
				got := make(chan error, 1)
				began := time.Now()
				go func() {
					_, err := r.Get(t.Context(), testAuthKey)
					got <- err
				}()
				synctest.Wait()
				tt.then(r, hash, in)
				if err := <-got; !errors.Is(err, tt.want) || time.Since(began) != tt.took {
					t.Errorf("after %v: %v; want after %v: %v", time.Since(began), err, tt.took, tt.want)
				}
			})
		})
	}
}

// An exchange that ends between the look at the record and the one at the codes is not missed.
func TestExchangeThatEndsUnderACall(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := lateExchanges(t, time.Millisecond)
		env := r.Manager.env.Load()
		looked, err := r.lookup(t.Context(), env, testAuthKey)
		if err != nil || looked.authorized() {
			t.Fatalf("the record before: %v", err)
		}
		r.accept(t)
		time.Sleep(time.Second)
		if e, err := r.restored(t.Context(), env, looked); err != nil || !e.renewable() {
			t.Errorf("%v", err)
		}
	})
}

// A call waits for a later attempt as well, while that is under way, and for the one attempt at any of an account's codes.
func TestCallDuringALaterAttempt(t *testing.T) {
	t.Parallel()
	for name, codes := range map[string]int{"one code": 1, "and a code that rests": 2} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := lateExchanges(t, 4*time.Second)
				var refused atomic.Pointer[string] // nil: all
				r.wx.set(func(f *fakeWeChat) {
					f.hook = func(path string, body map[string]any) (string, error) {
						if code, _ := body["authorization_code"].(string); path == pathQueryAuth && (refused.Load() == nil || code == *refused.Load()) {
							return wxError(-1, "system busy"), nil
						}
						return "", nil
					}
				})
				r.accept(t)
				time.Sleep(time.Minute)
				if codes == 2 { // pushed later, and never exchanged
					in := r.push(r.newCode(testAuthorizer))
					if err := r.Accept(t.Context(), in); err != nil {
						t.Fatal(err)
					}
					time.Sleep(time.Minute)
					refused.Store(new(in.Code.Reveal()))
				} else {
					refused.Store(new("none"))
				}
				exchanged := func() bool {
					r.wx.mu.Lock()
					defer r.wx.mu.Unlock()
					return len(r.wx.codes) < codes
				}
				for !exchanged() {
					time.Sleep(100 * time.Millisecond)
				}
				if _, err := r.Get(t.Context(), testAuthKey); err != nil {
					t.Errorf("Get: %v", err)
				}
			})
		})
	}
}

// A call for an account that one platform has does not wait for the code of another platform.
func TestPlatformOfWhileAnotherIsAuthorized(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := lateExchanges(t, 4*time.Second)
		r.authorize(t, testPlatform2, testAuthorizer)
		r.accept(t)
		time.Sleep(time.Second)
		began := time.Now()
		if p, err := r.PlatformOf(t.Context(), testAuthorizer); err != nil || p != testPlatform2 || time.Since(began) > time.Millisecond {
			t.Errorf("during the exchange: %q, %v after %v", p, err, time.Since(began))
		}
		if _, err := r.AuthorizerAtOnce(t.Context(), testPlatform, testAuthorizer); !errors.Is(err, ErrAuthorizing) || time.Since(began) > time.Millisecond {
			t.Errorf("the other one at once: %v after %v", err, time.Since(began))
		}
		if a, err := r.Authorizer(t.Context(), testPlatform, testAuthorizer); err != nil || a.Platform != testPlatform {
			t.Errorf("the other one: %+v, %v", a, err)
		}
	})
}

// A push of a code that a visitor brought, and whose next attempt is long in coming, keeps no call waiting for that.
func TestCallAfterAPushOfACodeThatFailed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := lateExchanges(t, time.Millisecond)
		code := r.failedRedirect(t)
		time.Sleep(10 * time.Minute)
		if err := r.Accept(t.Context(), r.push(code)); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		began := time.Now()
		if _, err := r.Get(t.Context(), testAuthKey); !errors.Is(err, ErrNotAuthorized) || time.Since(began) > time.Millisecond {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
	})
}

// A manager that closes does not wait for work that waits for an attempt which does not begin any more, and lets one that is under way end.
func TestCloseDuringCallsThatWait(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		queued bool
		want   error
	}{"queued": {true, ErrClosed}, "under way": {false, nil}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := lateExchanges(t, 4*time.Second)
				if in := r.push(r.newCode(testAuthorizer)); tt.queued {
					r.Manager.intents.add(in.authCode().hash(), in) // without its job
				} else if err := r.Accept(t.Context(), in); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Second)
				call, work := make(chan error, 1), make(chan error, 1) // Close waits for what a ticket's renewal does
				for k, got := range map[Key]chan error{testAuthKey: call, {Kind: KindJSAPI, Platform: testPlatform, AppID: testAuthorizer}: work} {
					go func() {
						_, err := r.Get(t.Context(), k)
						got <- err
					}()
				}
				synctest.Wait()
				began := time.Now()
				r.Close()
				if took := time.Since(began); tt.queued && took > 0 || took > 4*time.Second {
					t.Errorf("it took %v", took)
				}
				if err := <-work; !errors.Is(err, tt.want) {
					t.Errorf("work that Close waits for: %v", err)
				}
				// The ends of the attempt and of the manager may reach a call together: with ErrClosed whoever takes over is asked.
				if err := <-call; !errors.Is(err, tt.want) && !errors.Is(err, ErrClosed) {
					t.Errorf("a call: %v", err)
				}
				if !tt.queued && r.stored(t, testAuthKey).RefreshToken.IsZero() {
					t.Error("the attempt under way did not end")
				}
			})
		})
	}
}
