package tokens

import (
	"errors"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// A call that is not repeated leaves it to a later one to find out whether the next token helps, also once that one was renewed in its turn.
func TestRogueIsFoundOutLater(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		renewed, asked time.Duration
		want           int
	}{
		"in time":                       {0, replacementDoubt - time.Second, 1},
		"too late":                      {0, replacementDoubt, 0},
		"in time and renewed meanwhile": {refusalBurst * refusalEvery, replacementDoubt - time.Second, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				r.authorize(t, testPlatform, testAuthorizer)
				token, at := r.get(t, testAuthKey), time.Now()
				if _, err := r.Renew(t.Context(), testAuthKey, token.Value); err != nil {
					t.Fatal(err)
				}
				if tt.renewed > 0 {
					time.Sleep(tt.renewed)
					if _, err := r.RenewNow(t.Context(), testAuthKey); err != nil {
						t.Fatal(err)
					}
				}
				time.Sleep(tt.asked - tt.renewed)
				r.Healed(testAuthKey, token.Value, at)
				r.Healed(testAuthKey, token.Value, at)
				if n := r.log.count("another system is refreshing tokens of " + testAuthorizer); n != tt.want {
					t.Errorf("said %d times, want %d", n, tt.want)
				}
			})
		})
	}
}

// That a call went through with another token says nothing of any but the one that was refused for it.
func TestRogueIsOfTheRefusedToken(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		renew := func() (secret.String, time.Time) {
			token, at := r.get(t, testAuthKey), time.Now()
			if _, err := r.Renew(t.Context(), testAuthKey, token.Value); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			return token.Value, at
		}
		first, at := renew()
		second, later := renew()
		if r.Healed(testAuthKey, first, at); r.log.count("another system") != 0 {
			t.Error("reported for a token that another refusal had replaced already")
		}
		if r.Healed(testAuthKey, second, later); r.log.count("another system") != 1 {
			t.Error("not reported")
		}
	})
}

// WeChat refuses a token before it looks at the rest of a call: whatever else it finds wrong, it has taken the token.
func TestRogueIsToldByAnyAnswer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		r.get(t, testAuthKey)
		codes := []int{40001, 45009}
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(p string, _ map[string]any) (string, error) {
				if p != pathBusiness {
					return "", nil
				}
				code := codes[0]
				codes = codes[1:]
				return wxError(code, "no"), nil
			}
		})
		if err := r.Call(t.Context(), testAuthKey, http.MethodGet, pathBusiness, nil, nil, nil); !hasCode(err, 45009) {
			t.Fatalf("err = %v, want 45009", err)
		}
		if n := r.log.count("another system is refreshing tokens of " + testAuthorizer); n != 1 {
			t.Errorf("said %d times", n)
		}
	})
}

// A platform's token that is refused where no other is taken is given up. Its successor, whoever brings it, is not given up with it: one
// refusal on a path of another kind is none on those that authorizers need.
func TestGivenUpTokenIsNotItsSuccessor(t *testing.T) {
	t.Parallel()
	for _, elsewhere := range []bool{false, true} {
		t.Run(map[bool]string{false: "renewed here", true: "renewed by another node"}[elsewhere], func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				k, path := ComponentKey(testPlatform), "/cgi-bin/component/another"
				r.refuse(path, 40001, "invalid credential")
				var err error
				for n := 0; !errors.Is(err, ErrBackoff); n++ {
					if n > 2*refusalBurst {
						t.Fatalf("renewals are not rationed: %v", err)
					}
					err = r.Call(t.Context(), k, http.MethodPost, path, nil, nil, nil)
				}
				if _, err := r.Get(t.Context(), k); !errors.Is(err, ErrBackoff) {
					t.Fatalf("Get: %v, want ErrBackoff: the token is to be given up", err)
				}
				if elsewhere {
					other := NewManager()
					other.Use(r.env)
					defer other.Close()
					if _, err := other.Renew(t.Context(), k, secret.String{}); err != nil {
						t.Fatal(err)
					}
				} else {
					time.Sleep(refusalEvery)
				}
				token := r.get(t, k)
				if _, err := r.Renew(t.Context(), k, token.Value); !errors.Is(err, ErrBackoff) {
					t.Fatalf("Renew: %v, want ErrBackoff", err)
				}
				for _, cache := range []string{"held", "dropped"} { // what it holds a cache may lose
					if got, err := r.Get(t.Context(), k); err != nil || !sameToken(got, token) {
						t.Errorf("%s: %v; the same token: %v", cache, err, sameToken(got, token))
					}
					r.cache.Load().drop(k)
				}
			})
		})
	}
}
