package tokens

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

func TestUserTableTrackingIDs(t *testing.T) {
	t.Parallel()
	table := NewUserTable(0)
	shape := regexp.MustCompile(`^[A-Za-z0-9_-]{22}$`)
	seen := make(map[string]bool)
	for i := range 1000 {
		id := table.Keep(t.Context(), User{OpenID: string(rune('a' + i%26))}, UserGrant{}, 0, false)
		if !shape.MatchString(id) {
			t.Fatalf("id %q is not 128 bits as URL-safe text", id)
		}
		if seen[id] {
			t.Fatalf("id %q given twice", id)
		}
		seen[id] = true
	}
	if table.Len() != 1000 {
		t.Errorf("Len = %d", table.Len())
	}
}

func TestUserTableRedeem(t *testing.T) {
	t.Parallel()
	no := func(User) bool { return false }
	only := func(appid string) func(User) bool { return func(u User) bool { return u.AppID == appid } }
	tests := []struct {
		name  string
		once  bool
		after time.Duration
		calls []func(User) bool
		want  []error
	}{
		{"as often as wanted", false, 0, []func(User) bool{nil, nil, only("wxa")}, []error{nil, nil, nil}},
		{"once", true, 0, []func(User) bool{nil, nil}, []error{nil, ErrUserUnknown}},
		{"a refusal uses nothing up", true, 0, []func(User) bool{no, only("wxb"), only("wxa"), nil}, []error{ErrUserForbidden, ErrUserForbidden, nil, ErrUserUnknown}},
		{"just before its end", false, time.Minute - 1, []func(User) bool{nil}, []error{nil}},
		{"after its end", false, time.Minute + 1, []func(User) bool{nil}, []error{ErrUserUnknown}},
		{"once after its end", true, time.Minute + 1, []func(User) bool{nil}, []error{ErrUserUnknown}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				table := NewUserTable(10)
				id := table.Keep(t.Context(), User{AppID: "wxa", OpenID: "o1"}, UserGrant{}, time.Minute, tt.once)
				time.Sleep(tt.after)
				for i, may := range tt.calls {
					u, err := table.Redeem(t.Context(), id, "crm", may)
					if !errors.Is(err, tt.want[i]) {
						t.Errorf("redemption %d: %v, want %v", i, err, tt.want[i])
					}
					if err == nil && u.OpenID != "o1" || err != nil && u.OpenID != "" {
						t.Errorf("redemption %d: user %q", i, u.OpenID)
					}
				}
			})
		})
	}
}

func TestUserTableUnknownIDs(t *testing.T) {
	t.Parallel()
	table := NewUserTable(10)
	table.Keep(t.Context(), User{OpenID: "o1"}, UserGrant{}, 0, false)
	for _, id := range []string{"", "AAAAAAAAAAAAAAAAAAAAAA", "../x", "\x00"} {
		if _, err := table.Redeem(t.Context(), id, "crm", nil); !errors.Is(err, ErrUserUnknown) {
			t.Errorf("id %q: %v", id, err)
		}
	}
}

func TestUserTableOnceIsAtomic(t *testing.T) {
	t.Parallel()
	table := NewUserTable(10)
	for range 100 {
		id := table.Keep(t.Context(), User{OpenID: "o1"}, UserGrant{}, 0, true)
		var got atomic.Int32
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				if _, err := table.Redeem(t.Context(), id, "crm", nil); err == nil {
					got.Add(1)
				}
			})
		}
		wg.Wait()
		if got.Load() != 1 {
			t.Fatalf("redeemed %d times", got.Load())
		}
	}
}

func TestUserTableBoundAndClose(t *testing.T) {
	t.Parallel()
	table := NewUserTable(2)
	ids := []string{table.Keep(t.Context(), User{}, UserGrant{}, 0, false), table.Keep(t.Context(), User{}, UserGrant{}, 0, false), table.Keep(t.Context(), User{}, UserGrant{}, 0, false)}
	if _, err := table.Redeem(t.Context(), ids[0], "crm", nil); err == nil || table.Len() != 2 {
		t.Errorf("the oldest of three was kept by a table for two (Len %d)", table.Len())
	}
	table.Close()
	if _, err := table.Redeem(t.Context(), ids[2], "crm", nil); err == nil {
		t.Error("a closed table knows a user")
	}
	if _, err := table.Redeem(t.Context(), table.Keep(t.Context(), User{}, UserGrant{}, 0, false), "crm", nil); err == nil {
		t.Error("a closed table kept a user")
	}
	location, err := table.Login(t.Context(), Callback{Code: secret.New("c")}, func(context.Context) (string, error) { return "there", nil })
	if location != "there" || err != nil {
		t.Errorf("Login on a closed table = %q, %v", location, err)
	}
}

func callback(code, path, appid string) Callback {
	return Callback{Code: secret.New(code), Path: path, AppID: appid}
}

func TestLoginOncePerCallback(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name      string
		second    Callback
		after     time.Duration
		want      string
		wantErr   error
		exchanges int
	}{
		{"same callback", callback("c1", "/cb/f", "wxa"), 0, "first", nil, 1},
		{"same, just within five minutes", callback("c1", "/cb/f", "wxa"), 5*time.Minute - 1, "first", nil, 1},
		{"same, after five minutes", callback("c1", "/cb/f", "wxa"), 5*time.Minute + 1, "", ErrCodeUsed, 1},
		{"same, when WeChat has long forgotten it", callback("c1", "/cb/f", "wxa"), usedCodeMemory - 1, "", ErrCodeUsed, 1},
		{"same, when it is forgotten here too", callback("c1", "/cb/f", "wxa"), usedCodeMemory + 1, "second", nil, 2},
		{"another path", callback("c1", "/cb/g", "wxa"), 0, "", ErrCodeUsed, 1},
		{"another account", callback("c1", "/cb/f", "wxb"), 0, "", ErrCodeUsed, 1},
		{"another code", callback("c2", "/cb/f", "wxa"), 0, "second", nil, 2},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				table, exchanges := NewUserTable(10), 0
				exchange := func(location string) func(context.Context) (string, error) {
					return func(context.Context) (string, error) { exchanges++; return location, nil }
				}
				if got, err := table.Login(t.Context(), callback("c1", "/cb/f", "wxa"), exchange("first")); got != "first" || err != nil {
					t.Fatalf("first login = %q, %v", got, err)
				}
				time.Sleep(tt.after)
				got, err := table.Login(t.Context(), tt.second, exchange("second"))
				if got != tt.want || !errors.Is(err, tt.wantErr) || exchanges != tt.exchanges {
					t.Errorf("second login = %q, %v after %d exchanges; want %q, %v, %d", got, err, exchanges, tt.want, tt.wantErr, tt.exchanges)
				}
			})
		})
	}
}

func TestLoginFailureIsForgotten(t *testing.T) {
	t.Parallel()
	table := NewUserTable(10)
	cb := callback("c1", "/cb/f", "wxa")
	refusal := &APIError{Code: 40029}
	if _, err := table.Login(t.Context(), cb, func(context.Context) (string, error) { return "", refusal }); !errors.Is(err, refusal) {
		t.Fatalf("err = %v", err)
	}
	got, err := table.Login(t.Context(), callback("c1", "/cb/g", "wxa"), func(context.Context) (string, error) { return "there", nil })
	if got != "there" || err != nil {
		t.Errorf("a code that failed elsewhere: %q, %v, want it tried", got, err)
	}
}

func TestLoginJoinsTheRunningExchange(t *testing.T) {
	t.Parallel()
	for _, fails := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			table, exchanges := NewUserTable(10), 0
			refusal := errors.New("refused")
			exchange := func(context.Context) (string, error) {
				exchanges++
				time.Sleep(3 * time.Second)
				if fails {
					return "", refusal
				}
				return "there", nil
			}
			var wg sync.WaitGroup
			for range 20 {
				wg.Go(func() {
					got, err := table.Login(t.Context(), callback("c1", "/cb/f", "wxa"), exchange)
					if fails && !errors.Is(err, refusal) || !fails && (got != "there" || err != nil) {
						t.Errorf("Login = %q, %v", got, err)
					}
				})
			}
			wg.Wait()
			if exchanges != 1 {
				t.Errorf("%d exchanges", exchanges)
			}
		})
	}
}

// A visitor who closes the page while the code is being exchanged comes back with the same code.
func TestLoginOutlivesItsFirstCaller(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		table := NewUserTable(10)
		first, leave := context.WithCancel(t.Context())
		var seen error
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = table.Login(first, callback("c1", "/cb/f", "wxa"), func(ctx context.Context) (string, error) {
				time.Sleep(time.Second)
				seen = ctx.Err()
				_, bounded := ctx.Deadline()
				if !bounded {
					t.Error("the exchange has no deadline")
				}
				return "there", nil
			})
		}()
		synctest.Wait()
		leave()

		impatient, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, err := table.Login(impatient, callback("c1", "/cb/f", "wxa"), nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a caller without time got %v", err)
		}
		got, err := table.Login(t.Context(), callback("c1", "/cb/f", "wxa"), nil)
		<-done
		if got != "there" || err != nil || seen != nil {
			t.Errorf("Login = %q, %v; the exchange saw %v", got, err, seen)
		}
	})
}

// WeChat may have taken a code whose exchange gave no usable answer: it must not go out again.
func TestLoginInDoubtCountsAsUsed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		table, cb := NewUserTable(10), callback("c1", "/cb/f", "wxa")
		var wg sync.WaitGroup
		for range 3 { // one asks, two wait for it
			wg.Go(func() {
				_, err := table.Login(t.Context(), cb, func(context.Context) (string, error) {
					time.Sleep(time.Second)
					return "", fmt.Errorf("%w: %w", ErrCodeInDoubt, ErrUnreachable)
				})
				if !errors.Is(err, ErrUnreachable) {
					t.Errorf("err = %v, want the failure itself", err)
				}
			})
		}
		wg.Wait()
		for _, after := range []time.Duration{0, loginWindow - time.Second, time.Minute} {
			time.Sleep(after)
			if _, err := table.Login(t.Context(), cb, nil); !errors.Is(err, ErrCodeUsed) {
				t.Errorf("again: %v, want ErrCodeUsed", err)
			}
		}
	})
}

// A panic leaves the code in doubt, and keeps nobody waiting.
func TestLoginPanicFreesTheOthers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		table, cb := NewUserTable(10), callback("c1", "/cb/f", "wxa")
		var wg sync.WaitGroup
		wg.Go(func() {
			defer func() {
				if recover() == nil {
					t.Error("the panic was swallowed")
				}
			}()
			_, _ = table.Login(t.Context(), cb, func(context.Context) (string, error) {
				time.Sleep(time.Second)
				panic("bug")
			})
		})
		synctest.Wait()
		if _, err := table.Login(t.Context(), cb, nil); !errors.Is(err, ErrCodeInDoubt) {
			t.Errorf("who waited got %v", err)
		}
		wg.Wait()
		if _, err := table.Login(t.Context(), cb, nil); !errors.Is(err, ErrCodeUsed) {
			t.Errorf("who came later got %v", err)
		}
	})
}

// A full table drops who was not looked at for longest, and counts it; who has expired makes room uncounted.
func TestUserTableForgets(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		table := NewUserTable(3)
		keep := func(ttl time.Duration) string { return table.Keep(t.Context(), User{}, UserGrant{}, ttl, false) }
		known := func(id string) bool { _, err := table.Redeem(t.Context(), id, "crm", nil); return err == nil }
		brief, old, looked := keep(time.Second), keep(time.Hour), keep(time.Hour)
		time.Sleep(2 * time.Second)
		first := keep(time.Hour)
		if got := table.Forgotten(); known(brief) || !known(old) || !known(looked) || got != (Forgotten{}) {
			t.Errorf("the room of the expired was not enough: forgotten %+v", got)
		}
		if !known(first) || !known(looked) {
			t.Fatal("forgotten too early")
		}
		second := keep(time.Hour)
		if known(old) || !known(first) || !known(looked) || !known(second) || table.Len() != 3 {
			t.Errorf("not the one went that was not looked at for longest (%d kept)", table.Len())
		}
		for i := range 5 {
			cb := Callback{Code: secret.New(fmt.Sprint("c", i)), Flow: fmt.Sprint("f", i)}
			if _, err := table.Login(t.Context(), cb, func(context.Context) (string, error) { return "there", nil }); err != nil {
				t.Error(err)
			}
		}
		if got := table.Forgotten(); got != (Forgotten{Users: 1, Codes: 2, Flows: 2}) {
			t.Errorf("forgotten %+v", got)
		}
	})
}

// A flow that began here comes back with one code; the code is then no other flow's and no menu's.
func TestLoginOfAFlow(t *testing.T) {
	t.Parallel()
	with := func(code, flow string) Callback {
		return Callback{Code: secret.New(code), Path: "/cb/f", AppID: "wxa", Flow: flow}
	}
	tests := []struct {
		name   string
		second Callback
		after  time.Duration
		want   error
	}{
		{"repeated", with("c1", "f1"), 0, nil},
		{"another code", with("c2", "f1"), 0, ErrFlowUsed},
		{"another code, just before its end", with("c2", "f1"), FlowLife - 1, ErrFlowUsed},
		{"another flow", with("c1", "f2"), 0, ErrCodeUsed},
		{"no flow", with("c1", ""), 0, ErrCodeUsed},
		{"another flow with another code", with("c2", "f2"), 0, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				table := NewUserTable(10)
				exchange := func(context.Context) (string, error) { return "there", nil }
				if _, err := table.Login(t.Context(), with("c1", "f1"), exchange); err != nil {
					t.Fatal(err)
				}
				time.Sleep(tt.after)
				if _, err := table.Login(t.Context(), tt.second, exchange); !errors.Is(err, tt.want) {
					t.Errorf("err = %v, want %v", err, tt.want)
				}
			})
		})
	}
}

// Of one flow that comes back with many codes at once, one goes on.
func TestLoginOfAFlowIsAtomic(t *testing.T) {
	t.Parallel()
	table := NewUserTable(1000)
	for round := range 50 {
		var ok atomic.Int32
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				cb := Callback{Code: secret.New(fmt.Sprint(round, "/", i)), Path: "/cb", AppID: "wxa", Flow: fmt.Sprint(round)}
				_, err := table.Login(t.Context(), cb, func(context.Context) (string, error) { return "there", nil })
				switch {
				case err == nil:
					ok.Add(1)
				case !errors.Is(err, ErrFlowUsed):
					t.Errorf("err = %v", err)
				}
			})
		}
		wg.Wait()
		if ok.Load() != 1 {
			t.Fatalf("%d logins", ok.Load())
		}
	}
}

func TestAskProfile(t *testing.T) {
	t.Parallel()
	grantOf := func(token string) UserGrant { return UserGrant{AccessToken: secret.New(token)} }
	ask := func(_ context.Context, u User, g UserGrant) (Profile, UserGrant, error) {
		return Profile{Nickname: u.OpenID + " " + g.AccessToken.Reveal()}, grantOf(g.AccessToken.Reveal() + "+"), nil
	}
	no := func(User) bool { return false }
	t.Run("once", func(t *testing.T) {
		t.Parallel()
		table := NewUserTable(10)
		id := table.Keep(t.Context(), User{OpenID: "o1"}, grantOf("t"), 0, true)
		if _, err := table.AskProfile(t.Context(), id, "other", no, nil); !errors.Is(err, ErrUserForbidden) {
			t.Errorf("forbidden: %v", err)
		}
		for _, want := range []string{"o1 t", "o1 t+", "o1 t++"} {
			if p, err := table.AskProfile(t.Context(), id, "crm", nil, ask); err != nil || p.Nickname != want {
				t.Errorf("asked with %q, %v; want %q", p.Nickname, err, want)
			}
		}
		if _, err := table.Redeem(t.Context(), id, "crm", nil); !errors.Is(err, ErrUserUnknown) {
			t.Errorf("redeemed after it was: %v", err)
		}
		if _, err := table.AskProfile(t.Context(), id, "other", nil, nil); !errors.Is(err, ErrUserUnknown) {
			t.Errorf("another client: %v", err)
		}
	})
	t.Run("after the redemption", func(t *testing.T) {
		t.Parallel()
		table := NewUserTable(10)
		for _, once := range []bool{true, false} {
			id := table.Keep(t.Context(), User{OpenID: "o1"}, grantOf("t"), 0, once)
			if _, err := table.Redeem(t.Context(), id, "crm", nil); err != nil {
				t.Fatal(err)
			}
			if p, err := table.AskProfile(t.Context(), id, "crm", nil, ask); err != nil || p.Nickname != "o1 t" {
				t.Errorf("once %v: %q, %v", once, p.Nickname, err)
			}
			_, err := table.AskProfile(t.Context(), id, "other", nil, ask)
			if want := ErrUserUnknown; once && !errors.Is(err, want) || !once && err != nil {
				t.Errorf("once %v, another client: %v", once, err)
			}
		}
	})
	t.Run("one at a time, and it outlives its caller", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			table := NewUserTable(10)
			id := table.Keep(t.Context(), User{OpenID: "o1"}, grantOf("t"), 0, false)
			slow := func(ctx context.Context, u User, g UserGrant) (Profile, UserGrant, error) {
				time.Sleep(time.Second)
				if ctx.Err() != nil {
					t.Errorf("cut off: %v", ctx.Err())
				}
				return ask(ctx, u, g)
			}
			ctx, leave := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			for range 3 {
				wg.Go(func() { _, _ = table.AskProfile(ctx, id, "crm", nil, slow) })
			}
			synctest.Wait()
			leave() // one has begun to ask; the others wait, and go
			wg.Wait()
			if p, err := table.AskProfile(t.Context(), id, "crm", nil, slow); err != nil || p.Nickname != "o1 t+" {
				t.Errorf("then asked with %q, %v", p.Nickname, err)
			}
		})
	})
}
