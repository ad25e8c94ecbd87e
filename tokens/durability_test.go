package tokens

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// A refresh token that changed is in the store before the access token that came with it is used.
func TestDurableBeforeUsed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		r.wx.set(func(f *fakeWeChat) { f.rotate, f.strict = true, true })
		old := r.get(t, testAuthKey)
		name := testAuthKey.recordName()
		r.store.hold(func(op, n string) {
			if op == "store" && n == name {
				time.Sleep(2 * time.Second)
			}
		})
		written := make(chan struct{})
		go func() {
			defer close(written)
			if _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); err != nil {
				t.Errorf("Renew: %v", err)
			}
		}()
		time.Sleep(time.Second)
		if e := r.cache.Load().get(testAuthKey); !sameToken(e.token, old) {
			t.Error("the token is published while its record is being written")
		}
		<-written
		r.wx.set(func(f *fakeWeChat) {
			if f.refresh[testAuthorizer] != r.stored(t, testAuthKey).RefreshToken.Reveal() {
				t.Error("the store does not have the refresh token that WeChat has")
			}
		})
	})
}

func TestNothingIsLostWithTheProcess(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.wx.set(func(f *fakeWeChat) { f.rotate, f.strict = true, true })
		r.authorize(t, testPlatform, testAuthorizer)
		synctest.Wait() // what the account shows of itself is kept too
		for range 10 {
			// A refresh, and the process dies: its successor has only the store.
			token, err := r.Renew(t.Context(), testAuthKey, secret.String{})
			if err != nil {
				t.Fatalf("Renew: %v", err)
			}
			r.restart()
			if got := r.get(t, testAuthKey); !got.Value.Same(token.Value) || !got.ExpiresAt.Equal(token.ExpiresAt) || got.Generation != token.Generation {
				t.Errorf("after the restart: generation %d, before: %d", got.Generation, token.Generation)
			}
		}
		if n := r.wx.count(pathAuthorizerToken); n != 10 {
			t.Errorf("%d refreshes, want 10", n)
		}
	})
}

func TestUnwrittenTokenServesFromMemory(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]func(op, name string) error{"all fails": failAll, "read-only": failWrites} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			eachKind(t, func(t *testing.T, r *rig, k Key, path string) {
				r.wx.set(func(f *fakeWeChat) { f.rotate, f.strict = true, true })
				r.get(t, ComponentKey(testPlatform))
				r.get(t, k)
				r.store.fail(fault)
				// Six hours without a store: the tokens are renewed all the same.
				seen := make(map[string]bool)
				for range 6 * 12 {
					token := r.get(t, k)
					seen[token.Value.Reveal()] = true
					r.wx.set(func(f *fakeWeChat) {
						if !f.live(token.Value.Reveal()) {
							t.Error("a dead token was served")
						}
					})
					time.Sleep(5 * time.Minute)
					_ = r.PutTicket(t.Context(), testPlatform, Ticket{secret.New("ticket@@@later"), time.Now()})
				}
				if len(seen) < 3 || len(seen) > 5 {
					t.Errorf("%d tokens in six hours", len(seen))
				}
				if r.Unsaved() == 0 || r.log.count("mend the store") == 0 {
					t.Error("nobody is told that a token lives in memory alone")
				}
				last := r.get(t, k)
				r.store.fail(nil)
				time.Sleep(2 * time.Minute)
				if r.Unsaved() != 0 {
					t.Errorf("Unsaved = %d after the store recovered", r.Unsaved())
				}
				calls := r.wx.count(path)
				r.restart()
				if got := r.get(t, k); !got.Value.Same(last.Value) || r.wx.count(path) != calls {
					t.Error("the token did not reach the store")
				}
			})
		})
	}
}

func TestExchangedTokensThatCannotBeWritten(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		name := testAuthKey.recordName()
		r.store.fail(func(op, n string) error { // before the exchange, which begins in Accept
			if n == name && op == "store" {
				return errDisk
			}
			return nil
		})
		if err := r.Accept(t.Context(), r.push(r.newCode(testAuthorizer))); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		r.get(t, testAuthKey) // from memory
		time.Sleep(10 * time.Minute)
		if r.intents(t) != 1 {
			t.Error("the intent is gone while its tokens are in memory alone")
		}
		r.store.fail(nil)
		time.Sleep(3 * time.Minute)
		if r.intents(t) != 0 || r.Unsaved() != 0 {
			t.Errorf("after the store recovered: %d intents, %d unsaved", r.intents(t), r.Unsaved())
		}
		if n := r.wx.count(pathQueryAuth); n != 1 {
			t.Errorf("%d exchanges", n)
		}
		if r.stored(t, testAuthKey).RefreshToken.IsZero() {
			t.Error("no refresh token in the store")
		}
	})
}

func TestWaitingRecordYieldsToNews(t *testing.T) {
	t.Parallel()
	now := time.Unix(1_700_000_000, 0)
	before, later := now.Add(-2*time.Hour), now.Add(clockSlack+time.Millisecond)
	base := record{Gen: 5, AuthorizedAt: now, ObtainedAt: now, RefreshToken: secret.New("waiting")}
	with := func(change func(*record)) record {
		r := base
		r.RefreshToken = secret.New("stored")
		change(&r)
		return r
	}
	for _, test := range []struct {
		name   string
		stored record
		want   string
		gen    uint64
		base   time.Time // of the waiting one
	}{
		{"older generation", with(func(r *record) { r.Gen = 4 }), "waiting", 5, time.Time{}},
		{"newer generation", with(func(r *record) { r.Gen = 6 }), "stored", 6, time.Time{}},
		{"newer generation, asked earlier", with(func(r *record) { r.Gen, r.ObtainedAt = 8, now.Add(-time.Second) }), "waiting", 9, time.Time{}},
		{"newer generation, asked earlier by its clock, ranked later", with(func(r *record) { r.Gen, r.ObtainedAt, r.RankedAt = 8, now.Add(-time.Second), now.Add(time.Hour) }), "stored", 8, time.Time{}},
		{"newer generation, asked later", with(func(r *record) { r.Gen, r.ObtainedAt = 8, now.Add(time.Second) }), "stored", 8, time.Time{}},
		{"same generation, asked later", with(func(r *record) { r.ObtainedAt = now.Add(time.Second) }), "stored", 5, time.Time{}},
		{"same generation, asked earlier", with(func(r *record) { r.ObtainedAt = now.Add(-time.Second) }), "waiting", 6, time.Time{}},
		{"authorized since", with(func(r *record) { r.Gen, r.AuthorizedAt = 2, now.Add(time.Hour) }), "stored", 2, time.Time{}},
		{"revoked since", with(func(r *record) { r.Gen, r.RevokedAt = 2, now.Add(time.Hour) }), "stored", 2, time.Time{}},
		{"authorized before, newer generation", with(func(r *record) { r.Gen, r.AuthorizedAt = 9, now.Add(-time.Hour) }), "waiting", 10, time.Time{}},
		// Other nodes renewed less often than this one did while it was cut off, but since.
		{"older generation, asked much later", with(func(r *record) { r.Gen, r.ObtainedAt = 2, later }), "stored", 2, before},
		{"older generation, asked later by what clocks may differ", with(func(r *record) { r.Gen, r.ObtainedAt = 2, now.Add(clockSlack) }), "waiting", 5, before},
		{"older generation, asked much later, made from it", with(func(r *record) { r.Gen, r.ObtainedAt = 4, later }), "waiting", 5, later},
		{"older generation, asked much later, from a clock that is ahead", with(func(r *record) { r.Gen, r.ObtainedAt = 3, later }), "waiting", 5, later.Add(time.Hour)},
		{"older generation, asked much later, made from nobody knows what", with(func(r *record) { r.Gen, r.ObtainedAt = 2, later }), "waiting", 5, time.Time{}},
		{"older generation, asked much later, without a refresh token", with(func(r *record) { r.Gen, r.ObtainedAt, r.RefreshToken = 2, later, secret.String{} }), "waiting", 5, before},
		{"older generation, asked much later, of an earlier authorization", with(func(r *record) { r.Gen, r.ObtainedAt, r.AuthorizedAt = 2, later, now.Add(-time.Hour) }), "waiting", 5, before},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			waiting, stored := base, test.stored
			var p pendingRecords
			p.put(testAuthKey, &waiting, test.base)
			got := p.settle(testAuthKey, &waiting, &stored)
			if got.RefreshToken.Reveal() != test.want || got.Gen != test.gen {
				t.Errorf("%s of generation %d wins, want %s of %d", got.RefreshToken.Reveal(), got.Gen, test.want, test.gen)
			}
			if left := p.get(testAuthKey); (left == nil) != (test.want == "stored") {
				t.Errorf("left waiting: %v", left)
			}
		})
	}
}

// A node that was cut off from the store for hours comes back with a record of a higher generation than that of what other
// nodes have renewed since: theirs stays, in the store and on that node.
func TestNodeThatWasCutOffYieldsToNews(t *testing.T) {
	t.Parallel()
	for _, restarted := range []bool{false, true} {
		t.Run(fmt.Sprintf("restarted %v", restarted), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				r.env.Spill = t.TempDir()
				r.Use(r.env)
				r.rotating()
				r.authorize(t, testPlatform, testAuthorizer)
				r.get(t, testAuthKey)
				env := *r.env
				env.Store, env.Spill = &faultStore{MemStore: r.store.MemStore, counts: make(map[string]int)}, ""
				other := NewManager()
				other.Use(&env)
				defer other.Close()
				if _, err := other.Get(t.Context(), testAuthKey); err != nil {
					t.Fatal(err)
				}
				r.store.fail(failAll)
				for range 3 {
					if _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); err != nil {
						t.Fatal(err)
					}
					time.Sleep(10 * time.Minute)
				}
				if restarted {
					r.crash(t, failAll)
				}
				theirs, err := other.Renew(t.Context(), testAuthKey, secret.String{})
				if err != nil {
					t.Fatal(err)
				}
				if waiting := r.pending.get(testAuthKey); waiting == nil || waiting.Gen <= theirs.Generation {
					t.Fatalf("what waits is not of a higher generation than %d", theirs.Generation)
				}
				r.store.fail(nil)
				time.Sleep(2 * time.Minute)
				r.wantInStep(t)
				if got := r.get(t, testAuthKey); !got.Value.Same(theirs.Value) || !r.stored(t, testAuthKey).AccessToken.Same(theirs.Value) {
					t.Error("an earlier token counts, or is served")
				}
				if files := r.files(t); r.Waiting() != 0 || len(files) != 0 {
					t.Errorf("%d records wait, spilled: %v", r.Waiting(), files)
				}
				// From here on both go by what the store has.
				if _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); err != nil {
					t.Fatal(err)
				}
				r.wantInStep(t)
			})
		})
	}
}

func TestTwoNodesMakeOneRefresh(t *testing.T) {
	t.Parallel()
	eachKind(t, func(t *testing.T, r *rig, k Key, path string) {
		nodes := []*Manager{r.Manager, NewManager(), NewManager()}
		for _, n := range nodes[1:] {
			n.Use(r.env)
			defer n.Close()
		}
		for range 5 {
			r.wx.set(func(f *fakeWeChat) { f.latency = time.Second })
			before := r.wx.count(path)
			var wg sync.WaitGroup
			for i := range 30 {
				wg.Go(func() {
					if _, err := nodes[i%len(nodes)].Get(t.Context(), k); err != nil {
						t.Errorf("Get: %v", err)
					}
				})
			}
			wg.Wait()
			if n := r.wx.count(path) - before; n != 1 {
				t.Errorf("%d refreshes by three nodes", n)
			}
			r.wx.set(func(f *fakeWeChat) { f.latency = 0 })
			time.Sleep(3 * time.Hour)
			r.ticket(t, testPlatform)
		}
	})
}

// A node that died with the lock in its hand: the others wait no longer than they must, and only for a dead token.
func TestLockThatIsNeverFreed(t *testing.T) {
	t.Parallel()
	eachKind(t, func(t *testing.T, r *rig, k Key, path string) {
		r.get(t, k)
		unlock, err := r.store.MemStore.Lock(t.Context(), k.recordName()+renewalLock)
		if err != nil {
			t.Fatal(err)
		}
		defer unlock()
		time.Sleep(2*time.Hour - 4*time.Minute)
		r.ticket(t, testPlatform)
		start := time.Now()
		r.get(t, k)
		if time.Since(start) != 0 {
			t.Error("a caller waited for a lock while the token lives")
		}
		time.Sleep(time.Hour)
		start = time.Now()
		r.get(t, k)
		if took := time.Since(start); took < renewalLockWait || took > 2*renewalLockWait {
			t.Errorf("got a token after %v", took)
		}
		if r.log.count("renewing a token without it") == 0 {
			t.Error("nobody is told")
		}
	})
}

// heldLocks says of a lock that is not had that its holder lives, as Redis does.
type heldLocks struct{ *faultStore }

func (s heldLocks) Lock(ctx context.Context, name string) (func(), error) {
	unlock, err := s.faultStore.Lock(ctx, name)
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("%w: %w", ErrLockHeld, err)
	}
	return unlock, err
}

// A holder that lives is waited for, however slow WeChat is to it: two nodes do not refresh one token.
func TestLockOfALiveHolder(t *testing.T) {
	t.Parallel()
	eachKind(t, func(t *testing.T, r *rig, k Key, path string) {
		r.env.Store = heldLocks{r.store}
		r.Use(r.env)
		before := r.get(t, k)
		unlock, err := r.store.MemStore.Lock(t.Context(), k.recordName()+renewalLock)
		if err != nil {
			t.Fatal(err)
		}
		const slow = 2*renewalLockWait + time.Second
		release := time.AfterFunc(slow, unlock)
		asked, early := r.wx.count(path), atomic.Int64{}
		time.AfterFunc(slow-time.Second, func() { early.Store(int64(r.wx.count(path))) })
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		token, err := r.Renew(ctx, k, before.Value)
		if err != nil || token.Value.Same(before.Value) {
			t.Fatalf("Renew: %v", err)
		}
		if n := int(early.Load()) - asked; n != 0 || r.log.count("renewing a token without it") != 0 {
			t.Errorf("%d calls beside those of the holder", n)
		}
		// No call is begun for which there is no time.
		if release.Stop() {
			t.Error("the lock was not freed")
		}
		if unlock, err = r.store.MemStore.Lock(t.Context(), k.recordName()+renewalLock); err != nil {
			t.Fatal(err)
		}
		asked = r.wx.count(path)
		start := time.Now()
		if _, err := r.Renew(ctx, k, token.Value); !errors.Is(err, ErrLockHeld) || time.Since(start) > renewTimeout-closeGrace {
			t.Errorf("Renew: %v after %v", err, time.Since(start))
		}
		unlock()
		if _, err := r.Renew(t.Context(), k, secret.String{}); r.wx.count(path) == asked || err != nil {
			t.Errorf("once the lock is free: %v", err)
		}
	})
}

// What is not the store's fault is not counted as its error: a lock that is held, or a caller who left. A deadline is.
func TestNotTheStoresErrors(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		o := &observed{refreshes: make(map[Kind]int), failures: make(map[Kind]int), ops: make(map[string]int)}
		env := *r.env
		env.Store, env.Observer = heldLocks{r.store}, o
		hang := make(chan struct{})
		free := sync.OnceFunc(func() { close(hang) })
		defer free()
		operations := map[string]func(context.Context) error{
			"load":   func(ctx context.Context) error { _, err := r.loadRaw(ctx, &env, "wechat/v1/x"); return err },
			"store":  func(ctx context.Context) error { return r.storeRaw(ctx, &env, "wechat/v1/x", []byte("{}")) },
			"delete": func(ctx context.Context) error { return r.deleteRecord(ctx, &env, "wechat/v1/x") },
			"list": func(ctx context.Context) error {
				_, _, err := r.scanAuthorizers(ctx, &env, place{platform: testPlatform}, "", 1)
				return err
			},
		}
		unlock, err := r.store.MemStore.Lock(t.Context(), "wechat/v1/held")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.lockStore(t.Context(), &env, "wechat/v1/held", time.Second); !errors.Is(err, ErrLockHeld) {
			t.Fatal(err)
		}
		unlock()
		if o.ops["lock failed"] != 0 || o.ops["lock"] != 1 {
			t.Errorf("a lock that another holds: %v", o.ops)
		}
		r.store.fail(func(op, _ string) error {
			<-hang
			return errors.New("cut off")
		})
		for op, operate := range operations {
			ctx, leave := context.WithCancel(t.Context())
			done := make(chan error)
			go func() { done <- operate(ctx) }()
			synctest.Wait()
			leave()
			hang <- struct{}{}
			if err := <-done; err == nil {
				t.Errorf("%s succeeded", op)
			}
			if o.ops[op+" failed"] != 0 || o.ops[op] != 0 {
				t.Errorf("%s of a caller who left: %v", op, o.ops)
			}
			ctx, leave = context.WithTimeout(t.Context(), time.Second)
			go func() { done <- operate(ctx) }()
			<-ctx.Done()
			hang <- struct{}{}
			if err := <-done; err == nil || o.ops[op+" failed"] != 1 {
				t.Errorf("%s beyond a deadline: %v, %v", op, err, o.ops)
			}
			leave()
		}
	})
}

func TestStorePutBackToAnOlderState(t *testing.T) {
	t.Parallel()
	eachKind(t, func(t *testing.T, r *rig, k Key, path string) {
		r.wx.set(func(f *fakeWeChat) { f.rotate, f.strict = true, true })
		r.get(t, k)
		backup, err := r.store.MemStore.Load(t.Context(), k.recordName())
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if _, err := r.Renew(t.Context(), k, secret.String{}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Minute)
		}
		newest := r.get(t, k)
		if err := r.store.MemStore.Store(t.Context(), k.recordName(), backup); err != nil {
			t.Fatal(err)
		}
		if got := r.get(t, k); !sameToken(got, newest) {
			t.Error("an older generation is served")
		}
		time.Sleep(3 * time.Hour)
		r.ticket(t, testPlatform)
		if got := r.get(t, k); got.Generation <= newest.Generation {
			t.Errorf("generation %d after %d", got.Generation, newest.Generation)
		}
		// And the store emptied.
		if err := r.store.MemStore.Delete(t.Context(), k.recordName()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Hour)
		r.ticket(t, testPlatform)
		r.get(t, k)
	})
}

// setAsideOf returns what was set aside of a record.
func setAsideOf(t *testing.T, store *MemStore, name string) (kept []string) {
	t.Helper()
	names, err := store.List(t.Context(), path.Dir(asideName(name, time.Now())))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		data, err := store.Load(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		kept = append(kept, string(data))
	}
	return kept
}

// A damaged record is set aside, byte for byte, and what it stood for is had from WeChat again. One that is sealed with
// a key that is not configured is no such record while nothing else opens either: then it is the configuration that is
// wrong.
func TestDamagedRecordIsSetAside(t *testing.T) {
	t.Parallel()
	other, err := crypto.NewSealer(bytes.Repeat([]byte{9}, 32))
	if err != nil {
		t.Fatal(err)
	}
	sealedBy := func(name, text string) []byte {
		data, err := other.Seal(name, []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	for name, spoil := range map[string]func(name string, good []byte) []byte{
		"torn":          func(_ string, good []byte) []byte { return good[:len(good)/2] },
		"empty":         func(string, []byte) []byte { return nil },
		"bit flipped":   func(_ string, good []byte) []byte { good[len(good)-1] ^= 1; return good },
		"foreign key":   func(name string, _ []byte) []byte { return sealedBy(name, `{"v":1}`) },
		"future":        func(string, []byte) []byte { return []byte(`{"v":2,"gen":1}`) },
		"no version":    func(string, []byte) []byte { return []byte(`{"gen":1}`) },
		"another shape": func(string, []byte) []byte { return []byte(`{"v":1,"gen":"x","ticket":7,"created_at":"x"}`) },
		"half of JSON":  func(string, []byte) []byte { return []byte(`{"v":1,"gen"`) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			eachKind(t, func(t *testing.T, r *rig, k Key, path string) {
				r.env.RosterEvery = 24 * time.Hour
				r.get(t, k)
				r.Close()
				foreign := name == "foreign key"
				for _, name := range []string{k.recordName(), ticketName(testPlatform)} {
					good, err := r.store.MemStore.Load(t.Context(), name)
					if err != nil {
						t.Fatal(err)
					}
					_ = r.store.MemStore.Store(t.Context(), name, spoil(name, good))
				}
				if foreign { // nothing that opens is left
					for _, p := range []string{testPlatform, testPlatform2} {
						_ = r.store.MemStore.Delete(t.Context(), pushAskedName(p))
						if p != testPlatform {
							_ = r.store.MemStore.Delete(t.Context(), ticketName(p))
						}
					}
					if k.Kind == KindAuthorizer {
						_ = r.store.MemStore.Delete(t.Context(), ComponentKey(testPlatform).recordName())
					}
				}
				spoilt, _ := r.store.MemStore.Load(t.Context(), k.recordName())
				r.Manager = NewManager()
				r.Use(r.env)
				err := r.PutTicket(t.Context(), testPlatform, Ticket{secret.New("ticket@@@x"), time.Now()})
				if errors.Is(err, ErrStore) != foreign {
					t.Errorf("PutTicket: %v", err)
				}
				_, err = r.Get(t.Context(), k)
				if errors.Is(err, ErrStore) != foreign || err != nil && !foreign {
					t.Errorf("Get: %v", err)
				}
				now, _ := r.store.MemStore.Load(t.Context(), k.recordName())
				kept := setAsideOf(t, r.store.MemStore, k.recordName())
				switch {
				case foreign && (!bytes.Equal(now, spoilt) || len(kept) > 0):
					t.Error("a record was touched that another key may open")
				case !foreign && (len(kept) != 1 || kept[0] != string(spoilt)):
					t.Errorf("set aside: %d records", len(kept))
				case !foreign && bytes.Equal(now, spoilt):
					t.Error("the damaged record is still there")
				}
				if foreign && k.Kind == KindAuthorizer {
					if err := r.Revoke(t.Context(), k.Platform, k.AppID, time.Now()); !errors.Is(err, ErrStore) {
						t.Errorf("Revoke: %v, want ErrStore", err)
					}
				}
			})
		})
	}
}

// A damaged record that cannot be copied, or not be removed, stays where it is: nothing is thrown away.
func TestDamagedRecordThatCannotBeSetAside(t *testing.T) {
	t.Parallel()
	for _, op := range []string{"store", "delete"} {
		t.Run(op, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				r.authorize(t, testPlatform, testAuthorizer)
				r.Close()
				name := testAuthKey.recordName()
				const torn = `{"v":1,"gen`
				_ = r.store.MemStore.Store(t.Context(), name, []byte(torn))
				r.Manager = NewManager()
				r.Use(r.env)
				r.store.fail(func(o, n string) error {
					if o == op && (op == "delete" || strings.Contains(n, "/aside/")) {
						return errDisk
					}
					return nil
				})
				if _, err := r.Get(t.Context(), testAuthKey); !errors.Is(err, ErrStore) {
					t.Errorf("Get: %v, want ErrStore", err)
				}
				if now, err := r.store.MemStore.Load(t.Context(), name); err != nil || string(now) != torn {
					t.Errorf("the record is now %q, %v", now, err)
				}
				if r.log.count("a damaged record cannot be set aside") == 0 || r.log.count("a record is damaged: it was set aside") != 0 {
					t.Errorf("the log:\n%s", r.log)
				}
			})
		})
	}
}

func TestSealing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		sealed := r.env.Sealer
		oldKey, newKey := bytes.Repeat([]byte{7}, 32), bytes.Repeat([]byte{8}, 32)
		r.env.Sealer = nil
		r.Use(r.env)
		r.Use(r.env)
		if n := r.log.count("no seal_key"); n != 1 {
			t.Errorf("a missing seal key was mentioned %d times", n)
		}
		r.ticket(t, testPlatform)
		r.authorize(t, testPlatform, testAuthorizer)
		name := testAuthKey.recordName()
		raw := func() string {
			data, err := r.store.MemStore.Load(t.Context(), name)
			if err != nil {
				t.Fatal(err)
			}
			return string(data)
		}
		if !strings.HasPrefix(raw(), `{"v":1,"gen":1,`) {
			t.Errorf("an unsealed record: %.20s", raw())
		}
		// A seal key is added: nothing is lost, and what is written from now on is sealed.
		r.env.Sealer = sealed
		r.restart()
		r.get(t, testAuthKey)
		if _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(raw(), "token") {
			t.Error("a record is not sealed")
		}
		// The key is changed, with the old one kept.
		r.env.Sealer, _ = crypto.NewSealer(newKey, oldKey)
		r.restart()
		r.get(t, testAuthKey)
		if _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); err != nil {
			t.Fatal(err)
		}
		r.env.Sealer, _ = crypto.NewSealer(newKey)
		r.restart()
		r.get(t, testAuthKey)
		// A record cannot be moved to another account.
		moved := AuthorizerKey(testPlatform, "wx00000000000000ff")
		_ = r.store.MemStore.Store(t.Context(), moved.recordName(), []byte(raw()))
		if _, err := r.Get(t.Context(), moved); !errors.Is(err, ErrNotAuthorized) {
			t.Errorf("a record that was moved: %v, want ErrNotAuthorized", err)
		}
		if kept := setAsideOf(t, r.store.MemStore, moved.recordName()); len(kept) != 1 {
			t.Errorf("a record that was moved: %d set aside", len(kept))
		}
		// Without the key nothing opens, and nothing is overwritten.
		r.env.Sealer = nil
		r.restart()
		if _, err := r.Get(t.Context(), testAuthKey); !errors.Is(err, ErrStore) {
			t.Errorf("without the seal key: %v, want ErrStore", err)
		}
	})
}

func TestRecordsOfOthers(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	env := r.env.prepared()
	type thing struct {
		A string `json:"a,omitempty"`
	}
	for _, want := range []thing{{"x"}, {}} {
		if err := r.storeRecord(t.Context(), env, "wechat/v1/mac/keys", want); err != nil {
			t.Fatal(err)
		}
		var got thing
		if err := r.loadRecord(t.Context(), env, "wechat/v1/mac/keys", &got); err != nil || got != want {
			t.Errorf("got %+v, %v; want %+v", got, err, want)
		}
	}
	if err := r.storeRecord(t.Context(), env, "wechat/v1/mac/keys", "no struct"); !errors.Is(err, ErrStore) {
		t.Errorf("storeRecord of a string: %v", err)
	}
	if err := r.loadRecord(t.Context(), env, "wechat/v1/mac/none", new(thing)); !errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrStore) {
		t.Errorf("loadRecord of nothing: %v, want fs.ErrNotExist alone", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.loadRecord(ctx, env, "wechat/v1/mac/keys", new(thing)); !errors.Is(err, ErrStore) || !errors.Is(err, context.Canceled) {
		t.Errorf("loadRecord with an ended context: %v", err)
	}
}

// A store that hangs and ignores contexts, behind kvstore's deadline, is one that fails after three seconds.
func TestSlowStoreNeverDelaysALiveToken(t *testing.T) {
	t.Parallel()
	eachKind(t, func(t *testing.T, r *rig, k Key, path string) {
		r.get(t, k)
		r.store.hold(func(string, string) { time.Sleep(3 * time.Second) })
		start := time.Now()
		for range 100 {
			r.get(t, k)
		}
		if took := time.Since(start); took != 0 {
			t.Errorf("calls with a live token took %v", took)
		}
	})
}

type observed struct {
	mu        sync.Mutex
	refreshes map[Kind]int
	failures  map[Kind]int
	ops       map[string]int
	forwards  map[ForwardEnd]int
}

func (o *observed) TokenRefreshed(kind Kind, _ string, _ time.Duration, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.refreshes[kind]++
	if err != nil {
		o.failures[kind]++
	}
}

func (o *observed) RogueRefresh(Kind, string)      {}
func (o *observed) TokenAwaited(int)               {}
func (o *observed) Happened(Happening, Key, error) {}

func (o *observed) ForwardEnded(how ForwardEnd, events int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.forwards == nil {
		o.forwards = make(map[ForwardEnd]int)
	}
	o.forwards[how] += events
}

func (o *observed) StoreOperation(op string, _ time.Duration, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if err != nil {
		op += " failed"
	}
	o.ops[op]++
}

func TestObserver(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		o := &observed{refreshes: make(map[Kind]int), failures: make(map[Kind]int), ops: make(map[string]int)}
		r.env.Observer = o
		r.Use(r.env)
		synctest.Wait() // the loop's first jobs
		r.ticket(t, testPlatform)
		r.get(t, ComponentKey(testPlatform))
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(string, map[string]any) (string, error) { return wxError(45009, "quota"), nil }
		})
		_, _ = r.Get(t.Context(), AccountKey(testAccount))
		r.store.fail(failAll)
		_, _ = r.PlatformOf(t.Context(), testAuthorizer)
		synctest.Wait()
		o.mu.Lock()
		defer o.mu.Unlock()
		if o.refreshes[KindComponent] != 1 || o.failures[KindComponent] != 0 || o.refreshes[KindAccount] != 1 || o.failures[KindAccount] != 1 {
			t.Errorf("refreshes %v, failures %v", o.refreshes, o.failures)
		}
		for _, op := range []string{"load", "store", "lock", "list", "load failed"} {
			if o.ops[op] == 0 {
				t.Errorf("no %q among %v", op, o.ops)
			}
		}
	})
}

// A record of this very node does not count as another's because the clock was set right while the store was away.
func TestWaitingRecordAfterAClockSetBack(t *testing.T) {
	t.Parallel()
	now := time.Unix(1_700_000_000, 0)
	at := func(gen uint64, after time.Duration, refresh string) *record {
		return &record{Gen: gen, AuthorizedAt: now, ObtainedAt: now.Add(after), RefreshToken: secret.New(refresh)}
	}
	var p pendingRecords
	ahead := at(6, clockSlack+10*time.Minute, "of the clock that was ahead") // the store has it, and did not say so
	next := at(7, 2*time.Minute, "the newest")
	p.put(testAuthKey, ahead, now)
	p.put(testAuthKey, next, ahead.ObtainedAt)
	if got := p.settle(testAuthKey, next, ahead); !got.RefreshToken.Same(next.RefreshToken) {
		t.Errorf("%s counts", got.RefreshToken.Reveal())
	}
}
