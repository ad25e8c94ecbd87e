package tokens

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// sharedStore is one node's way to a store with values that all nodes share.
type sharedStore struct {
	*busStore
	values *Window[string, sharedValue]
	fault  atomic.Pointer[func(op string) error]
	asked  atomic.Int64
}

type sharedValue struct {
	data []byte
	ends time.Time
}

func (s *sharedStore) check(ctx context.Context, op string) error {
	s.asked.Add(1)
	if fault := s.fault.Load(); fault != nil {
		if err := (*fault)(op); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// fail sets what the values' operations fail with; nil: nothing.
func (s *sharedStore) fail(fault func(op string) error) {
	if fault == nil {
		s.fault.Store(nil)
		return
	}
	s.fault.Store(&fault)
}

func (s *sharedStore) Claim(ctx context.Context, name string, value []byte, ttl time.Duration) ([]byte, bool, error) {
	if err := s.check(ctx, "claim"); err != nil {
		return nil, false, err
	}
	held, found := s.values.GetOrSetFor(name, ttl, func() sharedValue { return sharedValue{value, time.Now().Add(ttl)} })
	return held.data, !found, nil
}

func (s *sharedStore) Put(ctx context.Context, name string, value []byte, ttl time.Duration) error {
	if err := s.check(ctx, "put"); err != nil {
		return err
	}
	s.values.Set(name, sharedValue{value, time.Now().Add(ttl)}, ttl)
	return nil
}

func (s *sharedStore) Replace(ctx context.Context, name string, value []byte) error {
	if err := s.check(ctx, "replace"); err != nil {
		return err
	}
	held, found := s.values.Get(name)
	if !found {
		return fs.ErrNotExist
	}
	s.values.Set(name, sharedValue{value, held.ends}, time.Until(held.ends))
	return nil
}

func (s *sharedStore) Peek(ctx context.Context, name string) ([]byte, error) {
	if err := s.check(ctx, "peek"); err != nil {
		return nil, err
	}
	held, found := s.values.Get(name)
	if !found {
		return nil, fs.ErrNotExist
	}
	return held.data, nil
}

func (s *sharedStore) Take(ctx context.Context, name string) ([]byte, error) {
	if err := s.check(ctx, "take"); err != nil {
		return nil, err
	}
	held, found := s.values.Take(name, nil)
	if !found {
		return nil, fs.ErrNotExist
	}
	return held.data, nil
}

var _ Ephemeral = (*sharedStore)(nil)

// sharer is a node with a table of those who logged in.
type sharer struct {
	*rig
	*UserTable
	values *sharedStore
}

// inSharedCluster runs a test with two nodes, in a bubble, whose logins are shared.
func inSharedCluster(t *testing.T, test func(t *testing.T, a, b *sharer)) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a, b, _ := cluster(t)
		values := NewWindow[string, sharedValue](time.Hour, 1000)
		node := func(r *rig) *sharer {
			env := *r.env
			n := &sharer{rig: r, UserTable: NewUserTable(100), values: &sharedStore{busStore: env.Store.(*busStore), values: values}}
			env.Store, env.Log = n.values, slog.New(slog.NewTextHandler(r.log, nil))
			r.Use(&env)
			n.UserTable.Share(r.Manager)
			return n
		}
		first, second := node(a), node(b)
		synctest.Wait()
		test(t, first, second)
	})
}

func (n *sharer) login(t *testing.T, cb Callback, exchange func(context.Context) (string, error)) (string, error) {
	t.Helper()
	return n.UserTable.Login(t.Context(), cb, exchange)
}

// The callbacks of one login are one on all nodes, for exactly as long as on one.
func TestLoginIsOneOnAllNodes(t *testing.T) {
	with := func(code, path, appid, flow string) Callback {
		return Callback{Code: secret.New(code), Path: path, AppID: appid, Flow: flow}
	}
	tests := []struct {
		name      string
		first     Callback
		second    Callback
		after     time.Duration
		want      string
		wantErr   error
		exchanges int
	}{
		{"same callback", with("c1", "/f", "wxa", ""), with("c1", "/f", "wxa", ""), 0, "first", nil, 1},
		{"same, just within five minutes", with("c1", "/f", "wxa", ""), with("c1", "/f", "wxa", ""), loginWindow - 1, "first", nil, 1},
		{"same, after five minutes", with("c1", "/f", "wxa", ""), with("c1", "/f", "wxa", ""), loginWindow + 1, "", ErrCodeUsed, 1},
		{"same, just before it is forgotten", with("c1", "/f", "wxa", ""), with("c1", "/f", "wxa", ""), usedCodeMemory - 1, "", ErrCodeUsed, 1},
		{"same, when it is forgotten", with("c1", "/f", "wxa", ""), with("c1", "/f", "wxa", ""), usedCodeMemory + 1, "second", nil, 2},
		{"another path", with("c1", "/f", "wxa", ""), with("c1", "/g", "wxa", ""), 0, "", ErrCodeUsed, 1},
		{"another path, later", with("c1", "/f", "wxa", ""), with("c1", "/g", "wxa", ""), loginWindow + 1, "", ErrCodeUsed, 1},
		{"another account", with("c1", "/f", "wxa", ""), with("c1", "/f", "wxb", ""), 0, "", ErrCodeUsed, 1},
		{"another code", with("c1", "/f", "wxa", ""), with("c2", "/f", "wxa", ""), 0, "second", nil, 2},
		{"a flow, repeated", with("c1", "/f", "wxa", "f1"), with("c1", "/f", "wxa", "f1"), 0, "first", nil, 1},
		{"a flow, another code", with("c1", "/f", "wxa", "f1"), with("c2", "/f", "wxa", "f1"), FlowLife - 1, "", ErrFlowUsed, 1},
		{"another flow", with("c1", "/f", "wxa", "f1"), with("c1", "/f", "wxa", "f2"), 0, "", ErrCodeUsed, 1},
		{"no flow", with("c1", "/f", "wxa", "f1"), with("c1", "/f", "wxa", ""), 0, "", ErrCodeUsed, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			inSharedCluster(t, func(t *testing.T, a, b *sharer) {
				exchanges := 0
				exchange := func(location string) func(context.Context) (string, error) {
					return func(context.Context) (string, error) { exchanges++; return location, nil }
				}
				if got, err := a.login(t, tt.first, exchange("first")); got != "first" || err != nil {
					t.Fatalf("first login = %q, %v", got, err)
				}
				time.Sleep(tt.after)
				for range 2 { // what the node was told it may not keep longer
					got, err := b.login(t, tt.second, exchange("second"))
					if got != tt.want || !errors.Is(err, tt.wantErr) || exchanges != tt.exchanges {
						t.Errorf("on the other node = %q, %v after %d exchanges; want %q, %v, %d", got, err, exchanges, tt.want, tt.wantErr, tt.exchanges)
					}
				}
			})
		})
	}
}

func TestLoginOnAllNodesAtOnce(t *testing.T) {
	for name, tt := range map[string]struct {
		err       error
		exchanges int64 // a refusal ends nothing: each node that waited tries for itself
		want      error
	}{
		"succeeds": {nil, 1, nil},
		"refused":  {&APIError{Code: 40029}, 2, &APIError{Code: 40029}},
		"in doubt": {fmt.Errorf("%w: %w", ErrCodeInDoubt, ErrUnreachable), 1, nil},
	} {
		t.Run(name, func(t *testing.T) {
			inSharedCluster(t, func(t *testing.T, a, b *sharer) {
				var exchanges, doubts, used atomic.Int64
				var wg sync.WaitGroup
				for range 5 {
					for _, n := range []*sharer{a, b} {
						wg.Go(func() {
							got, err := n.login(t, callback("c1", "/f", "wxa"), func(context.Context) (string, error) {
								exchanges.Add(1)
								time.Sleep(3 * time.Second)
								if tt.err != nil {
									return "", tt.err
								}
								return "there", nil
							})
							switch {
							case name == "in doubt" && errors.Is(err, ErrCodeInDoubt):
								doubts.Add(1)
							case name == "in doubt" && errors.Is(err, ErrCodeUsed):
								used.Add(1)
							case tt.want == nil && (got != "there" || err != nil), tt.want != nil && err == nil:
								t.Errorf("Login = %q, %v", got, err)
							}
						})
					}
				}
				wg.Wait()
				if n := exchanges.Load(); n != tt.exchanges {
					t.Errorf("%d exchanges, want %d", n, tt.exchanges)
				}
				if name == "in doubt" && (doubts.Load() != 5 || used.Load() != 5) {
					t.Errorf("%d heard of the doubt, %d that the code is used; want 5 and 5", doubts.Load(), used.Load())
				}
			})
		})
	}
}

// A node that dies over an exchange takes the code with it, and holds nobody longer than an exchange may take.
func TestNodeDiesOverAnExchange(t *testing.T) {
	inSharedCluster(t, func(t *testing.T, a, b *sharer) {
		var dead sync.WaitGroup
		dead.Go(func() {
			_, _ = a.login(t, callback("c1", "/f", "wxa"), func(context.Context) (string, error) {
				a.values.fail(func(string) error { return errDisk }) // nothing of it reaches the store any more
				time.Sleep(2 * time.Minute)
				return "there", nil
			})
		})
		synctest.Wait()
		start := time.Now()
		_, err := b.login(t, callback("c1", "/f", "wxa"), nil)
		if took := time.Since(start); !errors.Is(err, ErrCodeUsed) || took > loginTimeout+workSlack+workPoll || took < loginTimeout {
			t.Errorf("after %v: %v", took, err)
		}
		time.Sleep(workPoll)
		atOnce(t, func() {
			if _, err := b.login(t, callback("c1", "/f", "wxa"), nil); !errors.Is(err, ErrCodeUsed) {
				t.Errorf("again: %v", err)
			}
		})
		dead.Wait()
		a.values.fail(nil)
	})
}

// A node whose store fails once the others know that it is at a login tells them what came of it as soon as the store is there again. They
// wait for that, and do not send the code a second time.
func TestLoginIsToldLate(t *testing.T) {
	for name, works := range map[string]int32{"the store fails at the note of it": 1, "the store fails at the end of it": 2} {
		for _, away := range []time.Duration{3 * time.Second, 20 * time.Second, time.Minute} {
			t.Run(fmt.Sprint(name, " for ", away), func(t *testing.T) {
				inSharedCluster(t, func(t *testing.T, a, b *sharer) {
					var asked atomic.Int32
					a.values.fail(func(string) error {
						if asked.Add(1) <= works {
							return nil
						}
						return errDisk
					})
					cb := Callback{Code: secret.New("c1"), Path: "/f", AppID: "wxa"}
					var exchanges atomic.Int32
					exchange := func(context.Context) (string, error) {
						exchanges.Add(1)
						time.Sleep(2 * time.Second)
						return "there", nil
					}
					var wg sync.WaitGroup
					wg.Go(func() {
						if got, err := a.login(t, cb, exchange); got != "there" || err != nil {
							t.Errorf("the login: %q, %v", got, err)
						}
					})
					time.Sleep(time.Second)
					wg.Go(func() {
						time.Sleep(away)
						a.values.fail(nil)
					})
					got, err := b.login(t, cb, exchange)
					switch late := away > loginTimeout; {
					case late && works == 1: // nobody can tell this one that it was done
					case late && !errors.Is(err, ErrCodeUsed), !late && (got != "there" || err != nil):
						t.Errorf("on the other node: %q, %v", got, err)
					case exchanges.Load() != 1:
						t.Errorf("%d exchanges", exchanges.Load())
					}
					wg.Wait()
					time.Sleep(5 * time.Second)
					if got, err := b.login(t, cb, exchange); works == 2 && !(got == "there" && err == nil || away > loginTimeout && errors.Is(err, ErrCodeUsed)) {
						t.Errorf("on the other node, later: %q, %v", got, err)
					}
				})
			})
		}
	}
}

// While the store does not answer, a step waits for it once a second at most, and logins go on.
func TestLoginsWithoutTheStore(t *testing.T) {
	hangs := func(string) error { time.Sleep(sharedWait); return context.DeadlineExceeded }
	for name, fault := range map[string]func(string) error{
		"fails": func(string) error { return errDisk },
		"hangs": hangs,
		"full": func(op string) error {
			if op == "peek" || op == "take" {
				return nil
			}
			return errors.New("OOM command not allowed")
		},
	} {
		t.Run(name, func(t *testing.T) {
			inSharedCluster(t, func(t *testing.T, a, b *sharer) {
				before := a.UserTable.Keep(t.Context(), User{OpenID: "before"}, UserGrant{}, time.Hour, false)
				once := a.UserTable.Keep(t.Context(), User{OpenID: "once"}, UserGrant{}, time.Hour, true)
				a.values.fail(fault)
				ids := make(map[bool]string)
				start, asked := time.Now(), a.values.asked.Load()
				for i := range 20 {
					ids[i%2 == 0] = a.UserTable.Keep(t.Context(), User{OpenID: "during"}, UserGrant{}, time.Hour, i%2 == 0)
					cb := Callback{Code: secret.New(fmt.Sprint("c", i)), Path: "/f", AppID: "wxa", Flow: fmt.Sprint("f", i)}
					for range 2 {
						if got, err := a.login(t, cb, func(context.Context) (string, error) { return "there", nil }); got != "there" || err != nil {
							t.Fatalf("Login = %q, %v", got, err)
						}
					}
					cb.Code = secret.New("other")
					if _, err := a.login(t, cb, nil); !errors.Is(err, ErrFlowUsed) {
						t.Errorf("the flow on this node: %v", err)
					}
				}
				if took, n := time.Since(start), a.values.asked.Load()-asked; took > 2*sharedWait || n > 4 {
					t.Errorf("twenty logins waited %v in all, for %d steps", took, n)
				}
				if u, err := a.UserTable.Redeem(t.Context(), before, "crm", nil); err != nil || u.OpenID != "before" {
					t.Errorf("of before: %v", err)
				}
				if _, err := a.UserTable.Redeem(t.Context(), once, "crm", nil); name == "full" != (err == nil) || err != nil && !errors.Is(err, ErrUserAway) {
					t.Errorf("once, of before: %v", err)
				}
				time.Sleep(2 * sharedPause)
				a.values.fail(nil)
				for once, id := range ids {
					if u, err := a.UserTable.Redeem(t.Context(), id, "crm", nil); err != nil || u.OpenID != "during" {
						t.Errorf("once %v, after it: %v", once, err)
					}
					if _, err := a.UserTable.Redeem(t.Context(), id, "crm", nil); once != errors.Is(err, ErrUserUnknown) {
						t.Errorf("once %v, again: %v", once, err)
					}
					if _, err := b.UserTable.Redeem(t.Context(), id, "crm", nil); !errors.Is(err, ErrUserUnknown) {
						t.Errorf("on the other node: %v", err)
					}
				}
				if _, err := a.UserTable.Redeem(t.Context(), once, "crm", nil); name == "full" != errors.Is(err, ErrUserUnknown) {
					t.Errorf("once, in the end: %v", err)
				}
				shared := a.UserTable.Keep(t.Context(), User{OpenID: "after"}, UserGrant{}, time.Hour, true)
				if u, err := b.UserTable.Redeem(t.Context(), shared, "crm", nil); err != nil || u.OpenID != "after" {
					t.Errorf("after it, on the other node: %v", err)
				}
				log := a.log.String()
				if n := strings.Count(log, "logins are not shared"); n == 0 || n > 2 { // one for what is read, one for what is written
					t.Errorf("the log says it %d times", n)
				}
				if !strings.Contains(log, "logins are shared with the other nodes again") {
					t.Error("the log does not say that it is over")
				}
			})
		})
	}
}

// A user who is gone is gone on all nodes at once, and whoever asks for the profile changes nothing about it.
func TestSharedUserEnds(t *testing.T) {
	for _, once := range []bool{false, true} {
		t.Run(fmt.Sprint("once ", once), func(t *testing.T) {
			inSharedCluster(t, func(t *testing.T, a, b *sharer) {
				grant := UserGrant{AccessToken: secret.New("t")}
				ask := func(_ context.Context, u User, g UserGrant) (Profile, UserGrant, error) {
					next := UserGrant{AccessToken: secret.New(g.AccessToken.Reveal() + "+")}
					return Profile{Nickname: u.OpenID + " " + g.AccessToken.Reveal()}, next, nil
				}
				id := a.UserTable.Keep(t.Context(), User{OpenID: "o1"}, grant, time.Hour, once)
				time.Sleep(time.Hour - time.Second)
				for i, n := range []*sharer{b, a, b} {
					want := "o1 t" + strings.Repeat("+", i)
					if !once && n == a {
						want = "o1 t" // it keeps the user itself, and finds out from WeChat when a token has ended
					}
					if !once && i == 2 {
						want = "o1 t+"
					}
					if p, err := n.UserTable.AskProfile(t.Context(), id, "crm", nil, ask); err != nil || p.Nickname != want {
						t.Errorf("question %d: %q, %v; want %q", i, p.Nickname, err, want)
					}
				}
				if _, err := a.UserTable.AskProfile(t.Context(), id, "other", nil, ask); once != errors.Is(err, ErrUserUnknown) {
					t.Errorf("another client: %v", err)
				}
				if _, err := a.UserTable.Redeem(t.Context(), id, "crm", nil); once != errors.Is(err, ErrUserUnknown) {
					t.Errorf("redeemed after the question: %v", err)
				}
				time.Sleep(time.Second + 1)
				for _, n := range []*sharer{a, b} {
					if _, err := n.UserTable.Redeem(t.Context(), id, "crm", nil); !errors.Is(err, ErrUserUnknown) {
						t.Errorf("after its end: %v", err)
					}
				}
			})
		})
	}
}

// Who may know a user is asked on the node that keeps the user and on the others alike, and a refusal uses nothing up.
func TestSharedUserIsForTheAllowed(t *testing.T) {
	for _, once := range []bool{false, true} {
		t.Run(fmt.Sprint("once ", once), func(t *testing.T) {
			inSharedCluster(t, func(t *testing.T, a, b *sharer) {
				id := a.UserTable.Keep(t.Context(), User{AppID: "wx1", OpenID: "o1"}, UserGrant{}, time.Hour, once)
				of := func(appid string) func(User) bool { return func(u User) bool { return u.AppID == appid } }
				ask := func(context.Context, User, UserGrant) (Profile, UserGrant, error) {
					return Profile{Nickname: "n"}, UserGrant{}, nil
				}
				for i, n := range []*sharer{a, b} {
					if _, err := n.UserTable.Redeem(t.Context(), id, "crm", of("wx2")); !errors.Is(err, ErrUserForbidden) {
						t.Errorf("node %d: redeemed by a client for another account: %v", i, err)
					}
					if _, err := n.UserTable.AskProfile(t.Context(), id, "crm", of("wx2"), ask); !errors.Is(err, ErrUserForbidden) {
						t.Errorf("node %d: profile for a client for another account: %v", i, err)
					}
				}
				if p, err := b.UserTable.AskProfile(t.Context(), id, "crm", of("wx1"), ask); err != nil || p.Nickname != "n" {
					t.Errorf("profile for one that may: %+v, %v", p, err)
				}
				if !once {
					if u, err := b.UserTable.Redeem(t.Context(), id, "crm", of("wx1")); err != nil || u.OpenID != "o1" {
						t.Errorf("redeemed by one that may: %+v, %v", u, err)
					}
				}
			})
		})
	}
}

// What cannot be a tracking id costs no question to the store: anybody can make such requests.
func TestSharedUserOfNoTrackingID(t *testing.T) {
	inSharedCluster(t, func(t *testing.T, a, b *sharer) {
		id := a.UserTable.Keep(t.Context(), User{OpenID: "o1"}, UserGrant{}, time.Hour, false)
		before := b.values.asked.Load()
		for _, id := range []string{"", "x", id[1:], id + "A", id[1:] + "+", id[1:] + "\n", id + "\n"} {
			if _, err := b.UserTable.Redeem(t.Context(), id, "crm", nil); !errors.Is(err, ErrUserUnknown) {
				t.Errorf("%q: %v", id, err)
			}
		}
		if n := b.values.asked.Load() - before; n != 0 {
			t.Errorf("the store was asked %d times", n)
		}
		if _, err := b.UserTable.Redeem(t.Context(), id, "crm", nil); err != nil || b.values.asked.Load() == before {
			t.Errorf("a tracking id: %v", err)
		}
	})
}

// Where nothing is shared nothing is asked.
func TestLoginsOfOneNodeCostNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		table := NewUserTable(10)
		table.Share(r.Manager)
		before := r.store.count("load") + r.store.count("store") + r.store.count("lock")
		id := table.Keep(t.Context(), User{OpenID: "o1"}, UserGrant{}, 0, true)
		if _, err := table.Login(t.Context(), Callback{Code: secret.New("c"), Flow: "f"}, func(context.Context) (string, error) { return "there", nil }); err != nil {
			t.Error(err)
		}
		if _, err := table.Redeem(t.Context(), id, "crm", nil); err != nil {
			t.Error(err)
		}
		if _, err := table.Redeem(t.Context(), newTrackingID(), "crm", nil); !errors.Is(err, ErrUserUnknown) {
			t.Errorf("unknown: %v", err)
		}
		if n := r.store.count("load") + r.store.count("store") + r.store.count("lock") - before; n != 0 {
			t.Errorf("%d operations on the store", n)
		}
	})
}
