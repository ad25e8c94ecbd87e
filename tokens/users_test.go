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
		id := table.Keep(User{OpenID: string(rune('a' + i%26))}, 0, false)
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
		want  []bool
	}{
		{"as often as wanted", false, 0, []func(User) bool{nil, nil, only("wxa")}, []bool{true, true, true}},
		{"once", true, 0, []func(User) bool{nil, nil}, []bool{true, false}},
		{"a refusal uses nothing up", true, 0, []func(User) bool{no, only("wxb"), only("wxa"), nil}, []bool{false, false, true, false}},
		{"just before its end", false, time.Minute - 1, []func(User) bool{nil}, []bool{true}},
		{"after its end", false, time.Minute + 1, []func(User) bool{nil}, []bool{false}},
		{"once after its end", true, time.Minute + 1, []func(User) bool{nil}, []bool{false}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				table := NewUserTable(10)
				id := table.Keep(User{AppID: "wxa", OpenID: "o1"}, time.Minute, tt.once)
				time.Sleep(tt.after)
				for i, may := range tt.calls {
					u, ok := table.Redeem(id, may)
					if ok != tt.want[i] {
						t.Errorf("redemption %d: ok %v, want %v", i, ok, tt.want[i])
					}
					if ok && u.OpenID != "o1" || !ok && u.OpenID != "" {
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
	table.Keep(User{OpenID: "o1"}, 0, false)
	for _, id := range []string{"", "AAAAAAAAAAAAAAAAAAAAAA", "../x", "\x00"} {
		if _, ok := table.Redeem(id, nil); ok {
			t.Errorf("id %q redeemed", id)
		}
	}
}

func TestUserTableOnceIsAtomic(t *testing.T) {
	t.Parallel()
	table := NewUserTable(10)
	for range 100 {
		id := table.Keep(User{OpenID: "o1"}, 0, true)
		var got atomic.Int32
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				if _, ok := table.Redeem(id, nil); ok {
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
	ids := []string{table.Keep(User{}, 0, false), table.Keep(User{}, 0, false), table.Keep(User{}, 0, false)}
	if _, ok := table.Redeem(ids[0], nil); ok || table.Len() != 2 {
		t.Errorf("the oldest of three was kept by a table for two (Len %d)", table.Len())
	}
	table.Close()
	if _, ok := table.Redeem(ids[2], nil); ok {
		t.Error("a closed table knows a user")
	}
	if _, ok := table.Redeem(table.Keep(User{}, 0, false), nil); ok {
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
