package tokens

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// exhaust has a token refused until no more renewals of it are allowed, and returns the one that is left.
func exhaust(t *testing.T, r *rig, k Key) Token {
	t.Helper()
	token := r.get(t, k)
	for range refusalBurst + 1 {
		next, err := r.Renew(t.Context(), k, token.Value)
		if errors.Is(err, ErrBackoff) {
			return token
		}
		if err != nil {
			t.Fatal(err)
		}
		token = next
	}
	t.Fatal("renewals are not rationed")
	return Token{}
}

// A token that WeChat refuses is renewed once that is allowed again, as any refused one is where the store gives no lock: that it served on
// meanwhile does not make it good.
func TestSparedTokenIsRenewedWithoutTheStore(t *testing.T) {
	t.Parallel()
	eachKind(t, func(t *testing.T, r *rig, k Key, _ string) {
		token := exhaust(t, r, k)
		r.store.fail(func(string, string) error { return errors.New("store is away") })
		time.Sleep(2 * refusalEvery)
		if next, err := r.Renew(t.Context(), k, token.Value); err != nil || sameToken(next, token) {
			t.Errorf("Renew: %v; the refused token: %v", err, sameToken(next, token))
		}
		if next, err := r.Get(t.Context(), k); err != nil || sameToken(next, token) {
			t.Errorf("Get: %v; the refused token: %v", err, sameToken(next, token))
		}
	})
}

// A platform's token that WeChat takes no more serves apps' calls on, but the gateway does not ask WeChat for authorizers' tokens with it time
// and again, as often as apps call.
func TestDeadComponentTokenIsNotTriedWithEachCall(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		time.Sleep(3 * time.Hour) // the authorizer's token has ended
		r.ticket(t, testPlatform)
		token := exhaust(t, r, ComponentKey(testPlatform))
		r.wx.kill(token)
		before := r.wx.count(pathAuthorizerToken)
		for range 100 {
			if _, err := r.Get(t.Context(), testAuthKey); !errors.Is(err, ErrBackoff) {
				t.Fatalf("Get: %v, want ErrBackoff", err)
			}
		}
		if n := r.wx.count(pathAuthorizerToken) - before; n > 3 {
			t.Errorf("WeChat was asked %d times for 100 calls with a token that it refuses", n)
		}
		time.Sleep(2 * refusalEvery)
		r.get(t, testAuthKey)
	})
}

// The cache may forget the entry of a dead token at any time: that it is dead is known all the same.
func TestDeadComponentTokenStaysDead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		time.Sleep(3 * time.Hour)
		r.ticket(t, testPlatform)
		k := ComponentKey(testPlatform)
		r.wx.kill(exhaust(t, r, k))
		if _, err := r.Get(t.Context(), testAuthKey); !errors.Is(err, ErrBackoff) {
			t.Fatalf("Get: %v, want ErrBackoff", err)
		}
		before := r.wx.count(pathAuthorizerToken)
		for range 5 {
			r.cache.Load().drop(k)
			if _, err := r.Get(t.Context(), testAuthKey); !errors.Is(err, ErrBackoff) {
				t.Fatalf("Get: %v, want ErrBackoff", err)
			}
		}
		if n := r.wx.count(pathAuthorizerToken) - before; n != 0 {
			t.Errorf("WeChat was asked %d times with a token that it refuses", n)
		}
	})
}

// A token serves on that WeChat refused while no other is to be had. That somebody had one renewed too often, of which nobody had complained,
// does not make the token good that is refused later.
func TestRationedOrderSparesNoToken(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		k := AccountKey(testAccount)
		if _, err := r.Renew(t.Context(), k, r.get(t, k).Value); err != nil {
			t.Fatal(err)
		}
		if _, err := r.RenewNow(t.Context(), k); !errors.Is(err, ErrBackoff) {
			t.Fatalf("RenewNow: %v, want ErrBackoff", err)
		}
		time.Sleep(time.Minute)
		token := r.get(t, k)
		r.wx.kill(token)
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(string, map[string]any) (string, error) { return "", errors.New("away") }
		})
		if _, err := r.Renew(t.Context(), k, token.Value); !errors.Is(err, ErrUnreachable) {
			t.Errorf("Renew: %v, want ErrUnreachable", err)
		}
		if _, err := r.Get(t.Context(), k); !errors.Is(err, ErrUnreachable) {
			t.Errorf("Get: %v, want ErrUnreachable", err)
		}
	})
}
