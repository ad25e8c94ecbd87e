package tokens

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// dated has the record of a key say the times of a clock that is ahead, as another node's may be, or this one's was before it was set
// back. Nobody has read the record since.
func (r *rig) dated(t *testing.T, k Key, ahead time.Duration) {
	t.Helper()
	wire := r.stored(t, k).wire()
	wire.ObtainedAt += int64(ahead / time.Second)
	wire.ExpiresAt += int64(ahead / time.Second)
	if wire.ForcedAt != 0 {
		wire.ForcedAt += int64(ahead / time.Second)
	}
	if err := r.storeRecord(t.Context(), r.env.prepared(), k.recordName(), wire); err != nil {
		t.Fatal(err)
	}
	r.restart()
	synctest.Wait()
}

// clockKeys are keys whose records are of each kind. The token of the platform is had anew for the others.
var clockKeys = []Key{ComponentKey(testPlatform), AccountKey(testAccount), testAuthKey, JSAPIKey("", testAccount)}

// A token of a node whose clock is ahead is served no longer than it lives.
func TestTokenByAClockThatIsAheadEnds(t *testing.T) {
	t.Parallel()
	for _, k := range clockKeys {
		t.Run(string(k.Kind), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				r.authorize(t, testPlatform, testAuthorizer)
				first := r.get(t, k)
				r.dated(t, k, 24*time.Hour)
				if got := r.get(t, k); !got.Value.Same(first.Value) || time.Until(got.ExpiresAt) > 2*time.Hour {
					t.Errorf("another token, or one that ends in %v", time.Until(got.ExpiresAt))
				}
				for range 4 * 60 {
					time.Sleep(time.Minute)
					if got := r.get(t, k); !r.wx.lives(got) {
						t.Fatal("a token is served that has ended")
					}
				}
			})
		})
	}
}

// One that WeChat refuses gives way to the next, which ranks after it whatever the clocks say: here, in the store, and on other nodes,
// those too that have the former in memory.
func TestTokenByAClockThatIsAheadGivesWay(t *testing.T) {
	t.Parallel()
	for _, k := range clockKeys {
		t.Run(string(k.Kind), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				r.authorize(t, testPlatform, testAuthorizer)
				r.get(t, k)
				r.dated(t, k, 24*time.Hour)
				refused := r.get(t, k)
				env := *r.env
				other := NewManager()
				other.Use(&env)
				defer other.Close()
				if _, err := other.Get(t.Context(), k); err != nil {
					t.Fatal(err)
				}
				r.wx.kill(refused)
				for range 3 { // each a little later, and all before the time that the first one says
					time.Sleep(time.Minute)
					next, err := r.Renew(t.Context(), k, refused.Value)
					if err != nil || next.Value.Same(refused.Value) {
						t.Fatalf("renewed: the refused one: %v, %v", next.Value.Same(refused.Value), err)
					}
					if got := r.get(t, k); !got.Value.Same(next.Value) {
						t.Error("another token is served than the one that was fetched")
					}
					if got := r.stored(t, k); !got.AccessToken.Same(next.Value) || got.ObtainedAt.After(time.Now()) {
						t.Errorf("the store has another token, or one of %v", got.ObtainedAt)
					}
					if got, err := other.Renew(t.Context(), k, refused.Value); err != nil || !got.Value.Same(next.Value) {
						t.Errorf("on the other node: %v", err)
					}
					refused = next
					r.wx.kill(refused)
				}
			})
		})
	}
}

// A forced refresh by a clock that was ahead does not keep the next from being made until that time comes.
func TestForcedByAClockThatIsAhead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		k := AccountKey(testAccount)
		force := func() error {
			t.Helper()
			_, err := r.Renew(t.Context(), k, r.get(t, k).Value)
			return err
		}
		if err := force(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		r.dated(t, k, 8*time.Hour)
		if err := force(); err != nil {
			t.Errorf("eight hours before the last one, by its clock: %v", err)
		}
		// By a clock that is a little ahead it was just now.
		time.Sleep(time.Hour)
		if err := force(); err != nil {
			t.Fatal(err)
		}
		r.dated(t, k, forceInterval/2)
		if err := force(); !errors.Is(err, ErrBackoff) {
			t.Errorf("again at once: %v, want ErrBackoff", err)
		}
	})
}

// What is in memory ends when it should although the clock was set back, and when the machine has slept, which the steady clock does not see.
func TestEntriesEndByBothClocks(t *testing.T) {
	t.Parallel()
	now := time.Now()
	e := newEntry(AccountKey(testAccount), &record{Gen: 1, AccessToken: secret.New("t"), ObtainedAt: now, ExpiresAt: now.Add(2 * time.Hour)}, now)
	at := func(wall, steady time.Duration) instant {
		i := instantOf(now)
		return instant{i.wall + int64(wall), i.steady + int64(steady)}
	}
	for _, c := range []struct {
		what        string
		at          instant
		fresh, live bool
	}{
		{"at once", at(0, 0), true, true},
		{"an hour later", at(time.Hour, time.Hour), true, true},
		{"near its end", at(119*time.Minute, 119*time.Minute), false, true},
		{"at its end", at(2*time.Hour, 2*time.Hour), false, false},
		{"at its end, the clock set back", at(-6*time.Hour, 2*time.Hour), false, false},
		{"near its end, the clock set back", at(-6*time.Hour, 119*time.Minute), false, true},
		{"at its end, asleep most of the time", at(2*time.Hour, time.Minute), false, false},
		{"the clock set back", at(-24*time.Hour, time.Minute), true, true},
	} {
		if e.fresh(c.at) != c.fresh || e.live(c.at) != c.live {
			t.Errorf("%s: fresh %v, live %v", c.what, e.fresh(c.at), e.live(c.at))
		}
	}
	absent := newEntry(testAuthKey, nil, now)
	if absent.believed(at(-8*time.Hour, absentRecheck)) || !absent.believed(at(8*time.Hour, 0)) {
		t.Error("how long it is believed that there is no record depends on the wall clock")
	}
	if at := steady(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)); at <= 0 {
		t.Errorf("steady time is %d where tests run", at)
	}
}

// A node whose clock is more than a day ahead, and which reads WeChat's list when this one has, does not have this one read it all the time.
func TestListOfANodeWhoseClockIsAhead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.env.Platforms = r.env.Platforms[:1]
		r.env.RosterEvery = 24 * time.Hour
		r.wx.refresh[testAuthorizer] = "refreshtoken@@@1"
		other := func() {
			t.Helper()
			if err := r.storeRecord(t.Context(), r.env.prepared(), rosterName(testPlatform), rosterWire{CompletedAt: time.Now().Add(25 * time.Hour).Unix(), Took: 60}); err != nil {
				t.Fatal(err)
			}
		}
		other()
		r.Use(r.env)
		r.ticket(t, testPlatform)
		time.Sleep(10 * time.Minute) // that the clock here was not set back cannot be known
		for range 23 {
			r.ticket(t, testPlatform)
			other()
			time.Sleep(time.Hour)
		}
		if n := r.wx.count(pathAuthorizerList); n != 1 {
			t.Errorf("the list is read %d times on the first day", n)
		}
		other()
		time.Sleep(2 * time.Hour)
		if n := r.wx.count(pathAuthorizerList); n != 2 {
			t.Errorf("the list is read %d times by the second day", n)
		}
	})
}

// lives reports whether WeChat takes a token.
func (f *fakeWeChat) lives(token Token) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.live(token.Value.Reveal())
}

// The Date of an answer counts if the answer is WeChat's, one that refuses too.
func TestDateOfAnswers(t *testing.T) {
	t.Parallel()
	const date = "Tue, 15 Nov 1994 08:12:31 GMT"
	for answer, want := range map[string]int{`{"errcode":0}`: 1, `{"errcode":40001,"errmsg":"invalid"}`: 1, `<html>sign in</html>`: 0} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Date", date)
			_, _ = w.Write([]byte(answer))
		}))
		defer server.Close()
		told := 0
		client, err := NewClient(ClientOptions{Origins: []string{server.URL}, Dated: func(got string, at time.Time) {
			if told++; got != date || time.Since(at) > time.Minute {
				t.Errorf("%s: %q at %v", answer, got, at)
			}
		}})
		if err != nil {
			t.Fatal(err)
		}
		_ = client.Post(t.Context(), "/x", nil, nil, nil) // what comes of it is not asked here
		if told != want {
			t.Errorf("%s: told %d times, want %d", answer, told, want)
		}
		client.Close()
	}
}
