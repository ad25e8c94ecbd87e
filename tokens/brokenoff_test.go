package tokens

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// breakage is how a store goes wrong at one of its operations.
type breakage string

const (
	breaks      breakage = "the store fails"
	breaksAfter breakage = "the store fails, and has done it all the same"
	breaksDown  breakage = "the process is killed"
	stalls      breakage = "the store takes its time"
	breaksLate  breakage = "the store fails, and does it later"
)

var errBroken = errors.New("the store broke")

// breakingStore is a store that goes wrong once, with nothing but what every store has.
type breakingStore struct {
	records Store

	mu   sync.Mutex
	how  breakage
	then func() // is called when it goes wrong
	left int    // operations until then; negative: it was, or never is
	done int    // operations since it was armed
	dead bool
}

// arm has the store go wrong after so many operations; negative: never.
func (s *breakingStore) arm(how breakage, after int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.how, s.left, s.done, s.dead, s.then = how, after, 0, false, nil
}

// onceBroken has then called when it goes wrong.
func (s *breakingStore) onceBroken(then func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.then = then
}

// killed reports whether the process that uses the store is dead.
func (s *breakingStore) killed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dead
}

func (s *breakingStore) operations() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.done
}

func (s *breakingStore) operate(operation func() error) error {
	s.mu.Lock()
	now := s.left == 0
	s.left, s.done = max(s.left-1, -1), s.done+1
	s.dead = s.dead || now && s.how == breaksDown
	dead, how, then := s.dead, s.how, s.then
	s.mu.Unlock()
	if now && then != nil {
		then()
	}
	if now && how == breaksLate {
		time.AfterFunc(doneAfter, func() { _ = operation() })
		return errBroken
	}
	if now && how == stalls {
		time.Sleep(stallsFor)
		return operation()
	}
	if !dead && (!now || how == breaksAfter) {
		if err := operation(); err != nil || !now {
			return err
		}
	}
	if dead || now {
		return errBroken
	}
	return nil
}

func (s *breakingStore) Load(ctx context.Context, name string) (value []byte, err error) {
	err = s.operate(func() (err error) { value, err = s.records.Load(ctx, name); return err })
	return value, err
}

func (s *breakingStore) Store(ctx context.Context, name string, value []byte) error {
	return s.operate(func() error { return s.records.Store(ctx, name, value) })
}

func (s *breakingStore) Delete(ctx context.Context, name string) error {
	return s.operate(func() error { return s.records.Delete(ctx, name) })
}

func (s *breakingStore) List(ctx context.Context, prefix string) (names []string, err error) {
	err = s.operate(func() (err error) { names, err = s.records.List(ctx, prefix); return err })
	return names, err
}

func (s *breakingStore) Lock(ctx context.Context, name string) (unlock func(), err error) {
	err = s.operate(func() (err error) { unlock, err = s.records.Lock(ctx, name); return err })
	if err != nil && unlock != nil {
		unlock() // as it ends with its holder
		unlock = nil
	}
	return unlock, err
}

// brokenOff is a gateway whose store goes wrong in the middle of an operation.
type brokenOff struct {
	*rig
	breaking *breakingStore
	events   *receiver
	wechat   func(path string, body map[string]any) (string, error) // the hook of an operation; wx.set changes it
}

func newBrokenOff(t *testing.T) *brokenOff {
	t.Helper()
	b := &brokenOff{rig: newRig(t), events: new(receiver)}
	b.breaking = &breakingStore{records: b.store.MemStore, left: -1}
	b.env.Store, b.env.RosterEvery, b.env.Forward = b.breaking, rosterEvery, b.forward
	b.env.Platforms = b.env.Platforms[:1]
	b.wx.rotate, b.wx.strict = true, true
	b.wx.hook = func(path string, body map[string]any) (string, error) {
		if b.breaking.killed() {
			return "", errors.New("nobody is there to ask")
		}
		var hook func(string, map[string]any) (string, error)
		b.wx.set(func(*fakeWeChat) { hook = b.wechat })
		if hook != nil {
			return hook(path, body)
		}
		return "", nil
	}
	b.Use(b.env)
	b.ticket(t, testPlatform)
	b.live(t, 2*time.Minute)
	return b
}

// live lets time pass in which WeChat pushes tickets, and messages of the account come to the authorization-event URL.
func (b *brokenOff) live(t *testing.T, long time.Duration) {
	t.Helper()
	for end := time.Now().Add(long); time.Now().Before(end); time.Sleep(min(5*time.Minute, time.Until(end))) {
		_ = b.PutTicket(t.Context(), testPlatform, Ticket{secret.New("ticket@@@" + time.Now().String()), time.Now()})
		_, _ = b.UserName(testPlatform, testAuthorizer)
		if _, _, err := b.ByUserName(t.Context(), testUserName); errors.Is(err, ErrNotAuthorized) {
			b.SeekUserName(testPlatform, testUserName)
		}
	}
	synctest.Wait()
}

// known has WeChat answer as it does of an account that has authorised, and the store know it, with its gh_ id.
func (b *brokenOff) known(t *testing.T) {
	t.Helper()
	b.authorize(t, testPlatform, testAuthorizer)
	b.live(t, 3*time.Minute)
	if _, known := b.UserName(testPlatform, testAuthorizer); !known {
		t.Fatal("the gh_ id is not known")
	}
}

// forward hands an event on, as a process does that lives.
func (b *brokenOff) forward(ctx context.Context, f Forward) error {
	if b.breaking.killed() {
		return ErrNotForwarded
	}
	return b.events.forward(ctx, f)
}

// revive ends what is dead and begins anew over the same store.
func (b *brokenOff) revive() {
	b.Close()
	b.breaking.arm(breaks, -1)
	b.Manager = NewManager()
	b.Use(b.env)
}

var testUserName = "gh_" + testAuthorizer[2:]

// brokenOperation is one that is broken off.
type brokenOperation struct {
	before func(t *testing.T, b *brokenOff)
	// act is repeated, by who asked for it, until it returns nil.
	act     func(t *testing.T, b *brokenOff) error
	revoked bool // is what the account is in the end
	after   func(t *testing.T, b *brokenOff)
}

// pushed is a code that WeChat pushes until it is taken.
func pushed() func(t *testing.T, b *brokenOff) error {
	var in *Intent
	return func(t *testing.T, b *brokenOff) error {
		if in == nil {
			made := b.push(b.newCode(testAuthorizer))
			in = &made
		}
		return b.Accept(t.Context(), *in)
	}
}

func brokenOperations() map[string]func() brokenOperation {
	known := func(t *testing.T, b *brokenOff) { b.known(t) }
	fails := func(path string) func(string, map[string]any) (string, error) {
		return func(p string, _ map[string]any) (string, error) {
			if p == path {
				return "", errors.New("connection refused")
			}
			return "", nil
		}
	}
	return map[string]func() brokenOperation{
		"a pushed code": func() brokenOperation { return brokenOperation{act: pushed()} },
		"a pushed code of a known account": func() brokenOperation {
			return brokenOperation{before: known, act: pushed()}
		},
		"a pushed code of an account that was revoked": func() brokenOperation {
			return brokenOperation{before: func(t *testing.T, b *brokenOff) {
				b.known(t)
				if err := b.Revoke(t.Context(), testPlatform, testAuthorizer, time.Now()); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Minute)
			}, act: pushed()}
		},
		"a visitor's code": func() brokenOperation {
			var code secret.String
			return brokenOperation{act: func(t *testing.T, b *brokenOff) error {
				if code.IsZero() {
					code = b.newCode(testAuthorizer)
				}
				_, err := b.ExchangeRedirected(t.Context(), testPlatform, code, 0)
				if hasCode(err, codeAuthCodeInvalid) {
					err = nil // the visitor is told to begin anew
				}
				return err
			}}
		},
		"a code by push and visitor": func() brokenOperation {
			var code secret.String
			var pushedAt time.Time
			return brokenOperation{act: func(t *testing.T, b *brokenOff) error {
				if code.IsZero() {
					code, pushedAt = b.newCode(testAuthorizer), time.Now()
				}
				in := b.push(code)
				in.CreatedAt, in.ExpiresAt = pushedAt, pushedAt.Add(time.Hour)
				_, _ = b.ExchangeRedirected(t.Context(), testPlatform, code, 0)
				return b.Accept(t.Context(), in)
			}}
		},
		"a revocation": func() brokenOperation {
			var at time.Time
			return brokenOperation{before: known, revoked: true, act: func(t *testing.T, b *brokenOff) error {
				if at.IsZero() {
					at = time.Now()
					b.wx.set(func(f *fakeWeChat) { delete(f.refresh, testAuthorizer) })
				}
				return b.Revoke(t.Context(), testPlatform, testAuthorizer, at)
			}}
		},
		"a revocation of who has a JS ticket": func() brokenOperation {
			var at time.Time
			return brokenOperation{before: func(t *testing.T, b *brokenOff) {
				b.known(t)
				b.get(t, JSAPIKey(testPlatform, testAuthorizer))
			}, revoked: true, act: func(t *testing.T, b *brokenOff) error {
				if at.IsZero() {
					at = time.Now()
					b.wx.set(func(f *fakeWeChat) { delete(f.refresh, testAuthorizer) })
				}
				return b.Revoke(t.Context(), testPlatform, testAuthorizer, at)
			}}
		},
		"a revocation that no push tells": func() brokenOperation {
			return brokenOperation{before: known, revoked: true, act: func(t *testing.T, b *brokenOff) error {
				b.wx.set(func(f *fakeWeChat) { delete(f.refresh, testAuthorizer) })
				_, err := b.Renew(t.Context(), testAuthKey, secret.String{})
				time.Sleep(15 * time.Minute)
				_, _ = b.Renew(t.Context(), testAuthKey, secret.String{})
				if errors.Is(err, ErrStore) || b.breaking.killed() {
					return err
				}
				return nil
			}}
		},
		"a renewal": func() brokenOperation {
			return brokenOperation{before: known, act: func(t *testing.T, b *brokenOff) error {
				_, err := b.Renew(t.Context(), testAuthKey, secret.String{})
				return err
			}}
		},
		"a renewal with a void refresh token": func() brokenOperation {
			return brokenOperation{before: known, act: func(t *testing.T, b *brokenOff) error {
				b.wx.set(func(f *fakeWeChat) { f.refresh[testAuthorizer] = "refreshtoken@@@other" })
				_, err := b.Renew(t.Context(), testAuthKey, secret.String{})
				return err
			}}
		},
		"the first gh_ id": func() brokenOperation {
			return brokenOperation{before: func(t *testing.T, b *brokenOff) { b.authorize(t, testPlatform, testAuthorizer) },
				act: func(t *testing.T, b *brokenOff) error {
					_, err := b.FetchAccountInfo(t.Context(), testPlatform, testAuthorizer)
					return err
				}}
		},
		"an emptied store, by use": func() brokenOperation {
			return brokenOperation{before: func(t *testing.T, b *brokenOff) {
				b.known(t)
				b.store.empty()
				b.revive()
				b.wx.set(func(*fakeWeChat) { b.wechat = fails(pathAuthorizerList) })
				b.ticket(t, testPlatform)
			}, act: func(t *testing.T, b *brokenOff) error {
				_, err := b.Get(t.Context(), testAuthKey)
				return err
			}}
		},
		"an emptied store, by the list": func() brokenOperation {
			return brokenOperation{before: func(t *testing.T, b *brokenOff) {
				b.known(t)
				b.store.empty()
				b.revive()
			}, act: func(t *testing.T, b *brokenOff) error {
				err := b.PutTicket(t.Context(), testPlatform, Ticket{secret.New("ticket@@@new"), time.Now()})
				time.Sleep(time.Minute)
				return err
			}}
		},
		"a store that is emptied under a node": func() brokenOperation {
			empty := sync.OnceFunc(func() {})
			return brokenOperation{before: func(t *testing.T, b *brokenOff) {
				b.known(t)
				empty = sync.OnceFunc(b.store.empty)
			}, act: func(t *testing.T, b *brokenOff) error {
				empty()
				_ = b.PutTicket(t.Context(), testPlatform, Ticket{secret.New("ticket@@@" + time.Now().String()), time.Now()})
				_, err := b.Renew(t.Context(), testAuthKey, secret.String{})
				return err
			}}
		},
		"a damaged record": func() brokenOperation {
			return brokenOperation{before: func(t *testing.T, b *brokenOff) {
				b.known(t)
				b.revive()
				time.Sleep(time.Minute) // it is known here that the list was read to its end
				_ = b.store.MemStore.Store(t.Context(), testAuthKey.recordName(), []byte(`{"v":1,"gen`))
			}, act: func(t *testing.T, b *brokenOff) error {
				_, err := b.Get(t.Context(), testAuthKey)
				return err
			}}
		},
		"a damaged way back": func() brokenOperation {
			return brokenOperation{before: known, act: func(t *testing.T, b *brokenOff) error {
				_ = b.store.MemStore.Store(t.Context(), userNameName(testUserName), []byte(`{"v":1,"platf`))
				_, _, _ = b.ByUserName(t.Context(), testUserName)
				return nil
			}}
		},
		"a damaged intent": func() brokenOperation {
			return brokenOperation{before: func(t *testing.T, b *brokenOff) {
				b.known(t)
				_ = b.store.MemStore.Store(t.Context(), intentName(codeHash(testPlatform, "x")), []byte(`{"v":1,"platf`))
			}, act: func(t *testing.T, b *brokenOff) error {
				b.revive0()
				return nil
			}}
		},
		"an event to hand on": func() brokenOperation {
			return brokenOperation{before: known, act: func(t *testing.T, b *brokenOff) error {
				id, err := b.KeepForward(t.Context(), testForward)
				if err != nil {
					return err
				}
				_ = b.HandOn(t.Context(), id, func(ctx context.Context) error { return b.forward(ctx, testForward) })
				return nil
			}, after: func(t *testing.T, b *brokenOff) {
				if len(b.events.got) == 0 || b.kept(t) != 0 {
					t.Errorf("%d events came, %d are kept", len(b.events.got), b.kept(t))
				}
			}}
		},
		"a verification file": func() brokenOperation {
			return brokenOperation{before: known, act: func(t *testing.T, b *brokenOff) error {
				_, err := b.PutVerifyFile(t.Context(), "MP_verify_abcdefgh.txt", []byte("abcdefgh"))
				return err
			}, after: func(t *testing.T, b *brokenOff) {
				if got, found, err := b.VerifyFile(t.Context(), "MP_verify_abcdefgh.txt"); string(got) != "abcdefgh" || !found || err != nil {
					t.Errorf("the file: %q, %v, %v", got, found, err)
				}
			}}
		},
	}
}

// revive0 is revive of a process that is stopped in good order, with the store as it is.
func (b *brokenOff) revive0() {
	b.Close()
	b.Manager = NewManager()
	b.Use(b.env)
}

// inBrokenOff runs an operation that is broken off after so many operations of the store, and returns how many there were.
func inBrokenOff(t *testing.T, op brokenOperation, how breakage, after int) (operations int) {
	synctest.Test(t, func(t *testing.T) {
		b := newBrokenOff(t)
		if op.before != nil {
			op.before(t, b)
		}
		synctest.Wait()
		b.breaking.arm(how, after)
		err := op.act(t, b)
		time.Sleep(time.Second)
		synctest.Wait()
		operations = b.breaking.operations()
		for range 10 {
			if b.breaking.killed() {
				b.revive()
			}
			if err == nil {
				break
			}
			time.Sleep(5 * time.Second)
			err = op.act(t, b)
		}
		if err != nil {
			t.Errorf("it is refused: %v", err)
		}
		if b.breaking.killed() {
			b.revive()
		}
		b.wx.set(func(*fakeWeChat) { b.wechat = nil })
		b.live(t, 70*time.Minute)
		if b.breaking.killed() {
			b.revive()
			b.live(t, 70*time.Minute)
		}
		b.agree(t, op)
		if op.after != nil {
			op.after(t, b)
		}
		b.revive()
		b.live(t, time.Minute)
		b.agree(t, op)
		if t.Failed() {
			t.Log(b.log.String())
		}
	})
	return operations
}

// agree checks all that must.
func (b *brokenOff) agree(t *testing.T, op brokenOperation) {
	t.Helper()
	ctx := t.Context()
	platform, err := b.PlatformOf(ctx, testAuthorizer)
	stored, failed := b.StoredPlatformOf(ctx, testAuthorizer)
	if op.revoked {
		for _, k := range []Key{testAuthKey, JSAPIKey(testPlatform, testAuthorizer)} {
			if _, err := b.Get(ctx, k); !errors.Is(err, ErrNotAuthorized) {
				t.Errorf("%v of who has revoked: %v", k.Kind, err)
			}
		}
		if !errors.Is(err, ErrNotAuthorized) || !errors.Is(failed, ErrNotAuthorized) {
			t.Errorf("platform of who has revoked: %q %v, %q %v", platform, err, stored, failed)
		}
	} else {
		token, failure := b.Get(ctx, testAuthKey)
		if failure != nil {
			t.Errorf("token: %v", failure)
		} else {
			b.wx.set(func(f *fakeWeChat) {
				if !f.live(token.Value.Reveal()) {
					t.Error("the token is dead")
				}
			})
		}
		if _, err := b.Renew(ctx, testAuthKey, secret.String{}); err != nil {
			t.Errorf("renewal: %v", err)
		}
		if platform != testPlatform || stored != testPlatform {
			t.Errorf("platform: %q %v, %q %v", platform, err, stored, failed)
		}
		if name, known := b.UserName(testPlatform, testAuthorizer); name != testUserName || !known {
			t.Errorf("the gh_ id: %q", name)
		}
		if p, appid, err := b.ByUserName(ctx, testUserName); p != testPlatform || appid != testAuthorizer {
			t.Errorf("by its gh_ id: %q %q %v", p, appid, err)
		}
		if n := b.intents(t); n != 0 {
			t.Errorf("%d codes are still to be exchanged", n)
		}
	}
	page, err := b.Authorizers(ctx, AuthorizerQuery{Limit: MaxAuthorizers})
	want := StateAuthorized
	if op.revoked {
		want = StateRevoked
	}
	if err != nil || len(page.Authorizers) != 1 || page.Authorizers[0].State != want || page.Authorizers[0].UserName != testUserName {
		t.Errorf("the list: %+v, %v", page.Authorizers, err)
	}
	if b.Unsaved() != 0 || b.Waiting() != 0 || len(b.Orphans(testPlatform)) != 0 {
		t.Errorf("%d unsaved, %d waiting, orphans: %v", b.Unsaved(), b.Waiting(), b.Orphans(testPlatform))
	}
}

var brokenOffEvery = flag.Int("broken.every", 5, "how many of the operations of the store TestBrokenOff breaks at: one in so many, and with 1 each")

// breakAt runs what is broken off at each place that -broken.every names, or at fewer by that factor where it takes long; 0: at each.
func breakAt(t *testing.T, fewer int, run func(t *testing.T, how breakage, after int) (operations int), hows ...breakage) {
	t.Helper()
	operations := run(t, breaks, -1)
	if t.Failed() {
		return
	}
	every := *brokenOffEvery
	if every > 1 {
		every = max(1, every*fewer)
	}
	for i, how := range hows {
		for after := (operations + i) % min(every, max(1, operations)); after < operations; after += every {
			t.Run(fmt.Sprintf("%s at operation %d of %d", how, after, operations), func(t *testing.T) { run(t, how, after) })
		}
	}
}

// What an operation writes in several steps agrees in the end, wherever it was broken off.
func TestBrokenOff(t *testing.T) {
	t.Parallel()
	for name, op := range brokenOperations() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			breakAt(t, 1, func(t *testing.T, how breakage, after int) int { return inBrokenOff(t, op(), how, after) }, breaksDown, breaks, breaksAfter)
		})
	}
}
