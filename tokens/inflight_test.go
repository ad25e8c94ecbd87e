package tokens

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// What changes while it is being read: news that comes meanwhile is no older than the answer.

// slowReads is a node's way to the store on which the answers to reads of one record can be held back.
type slowReads struct {
	*busStore
	mu      sync.Mutex
	name    string        // "": none is
	began   chan struct{} // closed when the first is
	release chan error    // lets it have its answer, which is the error in it if there is one
}

// hold holds the next read of a record back. Its answer is what the store has when it begins.
func (s *slowReads) hold(name string) (began <-chan struct{}, release chan<- error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.name, s.began, s.release = name, make(chan struct{}), make(chan error, 1)
	return s.began, s.release
}

func (s *slowReads) Load(ctx context.Context, name string) ([]byte, error) {
	value, err := s.busStore.Load(ctx, name)
	s.mu.Lock()
	began, release := s.began, s.release
	held := s.name == name
	if held {
		s.name = ""
	}
	s.mu.Unlock()
	if held {
		close(began)
		if failure := <-release; failure != nil {
			return nil, failure
		}
	}
	return value, err
}

// inSlowCluster is inCluster with a node b whose reads can be held back.
func inSlowCluster(t *testing.T, test func(t *testing.T, a, b *rig, h *hub, s *slowReads)) {
	inCluster(t, func(t *testing.T, a, b *rig, h *hub) {
		s := &slowReads{busStore: &busStore{b.store, h}}
		env := *b.env
		env.Store = s
		b.Use(&env)
		synctest.Wait()
		test(t, a, b, h, s)
	})
}

const testAuthorizer9 = "wx9999999999999999"

// Somebody joins a read of an account that began before the account authorised on another node.
func TestAuthorizationDuringARead(t *testing.T) {
	inSlowCluster(t, func(t *testing.T, a, b *rig, _ *hub, s *slowReads) {
		k := AuthorizerKey(testPlatform, testAuthorizer9)
		began, release := s.hold(k.recordName())
		var wg sync.WaitGroup
		wg.Go(func() { _, _ = b.Get(t.Context(), k) })
		<-began
		a.authorize(t, testPlatform, testAuthorizer9)
		wg.Go(func() { b.get(t, k) })
		synctest.Wait()
		close(release)
		wg.Wait()
	})
}

// The same, by a stranger.
func TestAuthorizedDuringARead(t *testing.T) {
	inSlowCluster(t, func(t *testing.T, a, b *rig, _ *hub, s *slowReads) {
		began, release := s.hold(AuthorizerKey(testPlatform, testAuthorizer9).recordName())
		var wg sync.WaitGroup
		wg.Go(func() { _, _ = b.Authorized(t.Context(), testAuthorizer9) })
		<-began
		a.authorize(t, testPlatform, testAuthorizer9)
		wg.Go(func() {
			if !b.authorized(t, testAuthorizer9) {
				t.Error("not known to who asked after it authorised")
			}
		})
		synctest.Wait()
		close(release)
		wg.Wait()
		if !b.authorized(t, testAuthorizer9) {
			t.Error("not known afterwards")
		}
	})
}

// A file that was added on another node is there for who asks for it then, also where a read is under way or fails.
func TestVerifyFileDuringARead(t *testing.T) {
	inSlowCluster(t, func(t *testing.T, a, b *rig, _ *hub, s *slowReads) {
		for content, failure := range map[string]error{"read": nil, "failed": errors.New("connection reset")} {
			began, release := s.hold(verifyShardName(verifyShardOf(testFile)))
			var wg sync.WaitGroup
			wg.Go(func() { _, _, _ = b.VerifyFile(t.Context(), testFile) })
			<-began
			a.put(t, testFile, content)
			if failure == nil {
				wg.Go(func() {
					if got := served(t, b.Manager, testFile); got != content {
						t.Errorf("served %q to who asked while it was being read, want %q", got, content)
					}
				})
			}
			time.Sleep(time.Millisecond) // of the bubble's: the answer is later than the news
			release <- failure
			wg.Wait()
			if got := served(t, b.Manager, testFile); got != content {
				t.Errorf("served %q, want %q", got, content)
			}
			time.Sleep(2 * verifyFresh)
		}
	})
}

// What was changed while a node did not hear is read again once it does.
func TestVerifyFileNotHeardOf(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, h *hub) {
		h.set(true)
		if got := served(t, b.Manager, testFile); got != "" {
			t.Fatalf("served %q", got)
		}
		a.put(t, testFile, testContent)
		h.set(false)
		atOnce(t, func() {
			if got := served(t, b.Manager, testFile); got != testContent {
				t.Errorf("served %q", got)
			}
		})
	})
}

// A confirm file that another node was given while this one read that there is none, and that it could not ask for it.
func TestConfirmFileDuringARead(t *testing.T) {
	inSlowCluster(t, func(t *testing.T, a, b *rig, _ *hub, s *slowReads) {
		_, err := a.commit(t.Context(), a.Manager.env.Load(), testAuthKey, false, func(cur *record) *record {
			next := *cur
			next.FuncInfo = []int{confirmSet}
			return &next
		})
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		a.giveConfirmFiles("", confirmAnswer(accountTestFile, confirmTestContent))
		for range 2 {
			b.troubles.failed(testAuthKey, ErrUnreachable)
		}
		began, release := s.hold(confirmName(testAuthKey))
		var wg sync.WaitGroup
		wg.Go(func() { _, _, _ = b.ConfirmFile(t.Context(), accountTestFile, testAuthorizer) })
		<-began
		if got := confirmed(t, a.Manager, accountTestFile, testAuthorizer); got != confirmTestContent {
			t.Fatalf("served %q", got)
		}
		close(release)
		wg.Wait()
		atOnce(t, func() {
			if got := confirmed(t, b.Manager, accountTestFile, testAuthorizer); got != confirmTestContent {
				t.Errorf("the other node served %q", got)
			}
		})
	})
}

// A confirm file that another node was given while this one did not hear is looked for again once it does.
func TestConfirmFileNotHeardOf(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, h *hub) {
		_, err := a.commit(t.Context(), a.Manager.env.Load(), testAuthKey, false, func(cur *record) *record {
			next := *cur
			next.FuncInfo = []int{confirmSet}
			return &next
		})
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		a.giveConfirmFiles("", confirmAnswer(accountTestFile, confirmTestContent))
		h.set(true)
		for range 2 {
			b.troubles.failed(testAuthKey, ErrUnreachable) // it cannot ask
		}
		_, found, err := b.ConfirmFile(t.Context(), accountTestFile, testAuthorizer)
		if found || err == nil {
			t.Fatalf("served, or no error: %v, %v", found, err)
		}
		if got := confirmed(t, a.Manager, accountTestFile, testAuthorizer); got != confirmTestContent {
			t.Fatalf("served %q", got)
		}
		h.set(false)
		synctest.Wait()
		atOnce(t, func() {
			if got := confirmed(t, b.Manager, accountTestFile, testAuthorizer); got != confirmTestContent {
				t.Errorf("the other node served %q", got)
			}
		})
	})
}

// A look that began before a node heard again is not believed.
func TestConfirmLookBeforeHearing(t *testing.T) {
	t.Parallel()
	files := &NewManager().confirm
	for _, k := range []Key{testAuthKey, ComponentKey(testPlatform)} {
		look := files.begin(k)
		files.resumed()
		files.end(k, look, confirmState{until: time.Now().Add(time.Hour)})
		files.leave(k, look)
		if until := files.get(k).until; !until.IsZero() {
			t.Errorf("%v is not looked at for an hour", k)
		}
		look = files.begin(k)
		files.end(k, look, confirmState{until: time.Now().Add(time.Hour)})
		files.leave(k, look)
		if files.get(k).until.IsZero() {
			t.Errorf("%v is looked at again at once", k)
		}
	}
}

// News of a record comes while a job reads it for the news before.
func TestNewsDuringAJob(t *testing.T) {
	inSlowCluster(t, func(t *testing.T, a, b *rig, _ *hub, s *slowReads) {
		k := AuthorizerKey(testPlatform, testAuthorizer9)
		if !b.rosters.orphan(k) {
			t.Fatal("it is noted already")
		}
		began, release := s.hold(k.recordName())
		a.seed(t, k, &record{AuthorizedAt: time.Now().Truncate(time.Second)})
		b.hearing.Load().Changed(k.recordName())
		<-began
		a.authorize(t, testPlatform, testAuthorizer9)
		synctest.Wait()
		close(release)
		synctest.Wait()
		if b.OrphanCount(testPlatform) != 0 {
			t.Error("it is said to have to authorise again although it has")
		}
	})
}

// A key of opaque tokens is made while a node does not hear, and waited for there.
func TestOpaqueNotHeardOf(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, h *hub) {
		elsewhere := mustIssue(t, opaqueNode(t, NewMemStore(), nil), opaqueClaims())
		if _, err := b.OpenOpaque(t.Context(), elsewhere); !errors.Is(err, ErrOpaqueUnknown) {
			t.Fatalf("got %v, want ErrOpaqueUnknown", err)
		}
		h.set(true)
		token := mustIssue(t, a.Manager, opaqueClaims())
		var wg sync.WaitGroup
		atOnce(t, func() {
			wg.Go(func() {
				if _, err := b.OpenOpaque(t.Context(), token); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait()
			h.set(false)
			wg.Wait()
		})
	})
}

// An older look that fails at last says nothing about the store once a later one was answered.
func TestOpaqueOlderLookFails(t *testing.T) {
	inSlowCluster(t, func(t *testing.T, a, b *rig, _ *hub, s *slowReads) {
		slow, err := b.current()
		if err != nil {
			t.Fatal(err)
		}
		began, release := s.hold(opaqueName)
		var wg sync.WaitGroup
		wg.Go(func() { _, _ = b.loadOpaqueKeys(t.Context(), slow) })
		<-began
		if _, err := b.loadOpaqueKeys(t.Context(), slow); err != nil {
			t.Fatal(err)
		}
		release <- errors.New("connection reset")
		wg.Wait()
		if err := b.opaque.failedLately(); err != nil {
			t.Errorf("the store is not asked: %v", err)
		}
	})
}

// A job that is hastened while it runs, and has chosen to wait, does not: what it is hastened for may be what it did not see.
func TestHastenedWhileRunning(t *testing.T) {
	t.Parallel()
	var q retryQueue
	q.init()
	q.add("job", 0, nil)
	id, j, _ := q.take()
	q.hasten("job")
	q.finish(id, j, retryError{after: time.Hour})
	if _, again, wait := q.take(); again != j {
		t.Errorf("it waits for %v", wait)
	}
	q.finish(id, j, retryError{after: time.Hour})
	if _, again, _ := q.take(); again != nil {
		t.Error("it runs a third time")
	}
}

// A doubt that comes up while the list is read is not settled by it: the account may be on a page before.
func TestDoubtWhileTheListIsRead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		var doubt atomic.Bool
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(path string, _ map[string]any) (string, error) {
				if path == pathAuthorizerList && doubt.CompareAndSwap(true, false) {
					time.Sleep(time.Second)
					r.wantRoster(testPlatform)
				}
				return "", nil
			}
		})
		time.Sleep(rosterAgain)
		lists := r.wx.count(pathAuthorizerList)
		doubt.Store(true)
		r.wantRoster(testPlatform)
		r.ticket(t, testPlatform)
		time.Sleep(rosterHasten)
		if n := r.wx.count(pathAuthorizerList) - lists; n != 1 {
			t.Fatalf("the list was read %d times", n)
		}
		time.Sleep(rosterAgain + rosterCheck)
		if n := r.wx.count(pathAuthorizerList) - lists; n != 2 {
			t.Errorf("the list was read %d times, want 2", n)
		}
		time.Sleep(2 * rosterAgain)
		if n := r.wx.count(pathAuthorizerList) - lists; n != 2 {
			t.Errorf("the list was read %d times, want 2: there is no doubt any more", n)
		}
	})
}

// A doubt that comes up a moment after it was checked whether the list is to be read waits a moment, not for the next check.
func TestDoubtAfterACheck(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := healing(t)
		time.Sleep(rosterAgain)
		checked := make(chan struct{}, 1)
		r.store.hold(func(op, name string) {
			if op == "load" && name == rosterName(testPlatform) {
				select {
				case checked <- struct{}{}:
				default:
				}
			}
		})
		r.ticket(t, testPlatform)
		<-checked
		synctest.Wait()
		lists := r.wx.count(pathAuthorizerList)
		r.Suspect(testAuthKey)
		time.Sleep(rosterHasten + time.Second)
		if n := r.wx.count(pathAuthorizerList) - lists; n != 1 {
			t.Errorf("the list was read %d times", n)
		}
	})
}

// An account authorises while the list, which says that WeChat has no refresh token of it, is compared with the store.
func TestOrphanThatAuthorisesMeanwhile(t *testing.T) {
	inSlowCluster(t, func(t *testing.T, a, b *rig, _ *hub, s *slowReads) {
		k := AuthorizerKey(testPlatform, testAuthorizer9)
		env, err := b.current()
		if err != nil {
			t.Fatal(err)
		}
		began, release := s.hold(k.recordName())
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := b.compare(t.Context(), env, testPlatform, listed{AppID: testAuthorizer9}, new(othersIntents)); err != nil {
				t.Error(err)
			}
		})
		<-began
		a.authorize(t, testPlatform, testAuthorizer9)
		synctest.Wait()
		close(release)
		wg.Wait()
		if orphans := b.Orphans(testPlatform); slices.Contains(orphans, testAuthorizer9) {
			t.Error("it is said to have to authorise again although it has")
		}
	})
}

// killAndLock has WeChat take a token no more, and this node take the lock of its renewal.
func (r *rig) killAndLock(t *testing.T, token Token) (unlock func()) {
	t.Helper()
	r.wx.kill(token)
	unlock, err := r.store.Lock(t.Context(), testAuthKey.recordName()+renewalLock)
	if err != nil {
		t.Fatal(err)
	}
	return unlock
}

// keepRenewed keeps another token, as a renewal does.
func (r *rig) keepRenewed(t *testing.T) {
	t.Helper()
	_, err := r.commit(t.Context(), r.Manager.env.Load(), testAuthKey, false, func(cur *record) *record {
		next := *cur
		next.AccessToken, next.ObtainedAt, next.ExpiresAt = secret.New("token@@@renewed"), time.Now(), time.Now().Add(2*time.Hour)
		return &next
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Another node has renewed a token and gives the lock of that back late, as one that dies over it does: who waits here for the
// renewal has the token as soon as it is heard of.
func TestRenewedElsewhereAndStillLocked(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		old := b.get(t, testAuthKey)
		defer a.killAndLock(t, old)()
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				got, err := b.Renew(t.Context(), testAuthKey, old.Value)
				if err != nil || got.Value.Same(old.Value) {
					t.Errorf("Renew: %v", err)
				}
			})
		}
		synctest.Wait()
		a.keepRenewed(t)
		atOnce(t, wg.Wait)
		if n := len(b.arrivals.waiting); n != 0 {
			t.Errorf("%d keys are still waited for", n)
		}
	})
}

// News of a token that another node has renewed, and news of its record once more, which says the same: whoever waits takes the
// token when the record was read for the last of it.
func TestRenewedElsewhereHeardTwice(t *testing.T) {
	inSlowCluster(t, func(t *testing.T, a, b *rig, _ *hub, s *slowReads) {
		old := b.get(t, testAuthKey)
		defer a.killAndLock(t, old)()
		var wg sync.WaitGroup
		wg.Go(func() {
			got, err := b.Renew(t.Context(), testAuthKey, old.Value)
			if err != nil || got.Value.Same(old.Value) {
				t.Errorf("Renew: %v", err)
			}
		})
		synctest.Wait()
		began, release := s.hold(testAuthKey.recordName())
		a.keepRenewed(t)
		<-began
		b.hearing.Load().Changed(testAuthKey.recordName())
		_, again := s.hold(testAuthKey.recordName())
		close(release)
		synctest.Wait() // whoever waits has seen the token, and that it may be out of date
		close(again)
		atOnce(t, wg.Wait)
	})
}

// No renewal begins for a token that is there by the time somebody would wait for it.
func TestNoRenewalOfWhatIsThere(t *testing.T) {
	t.Parallel()
	eachKind(t, func(t *testing.T, r *rig, k Key, _ string) {
		token := r.get(t, k)
		env, err := r.current()
		if err != nil {
			t.Fatal(err)
		}
		var asked atomic.Int32
		r.store.hold(func(string, string) { asked.Add(1) })
		for _, refused := range []secret.String{{}, secret.New("token@@@before")} {
			got, err := r.awaitRenewal(t.Context(), env, k, refused)
			if err != nil || !got.Value.Same(token.Value) {
				t.Errorf("got another token, or %v", err)
			}
		}
		synctest.Wait()
		if n := asked.Load(); n != 0 {
			t.Errorf("the store was asked %d times", n)
		}
	})
}

// Whoever looks for a record a moment before somebody else's read of it is over does not read it again.
func TestColdLookupsShareOneRead(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.Use(r.env)
	env, err := r.current()
	if err != nil {
		t.Fatal(err)
	}
	const accounts = 100
	var reads atomic.Int32
	r.store.hold(func(op, name string) {
		if _, ok := keyOf(name); ok && op == "load" {
			reads.Add(1)
		}
	})
	for i := range accounts {
		var wg sync.WaitGroup
		begin := make(chan struct{})
		for range 100 {
			wg.Go(func() {
				<-begin
				if _, err := r.lookup(t.Context(), env, AuthorizerKey(testPlatform, appidOf(i))); err != nil {
					t.Error(err)
				}
			})
		}
		close(begin)
		wg.Wait()
	}
	if n := reads.Load(); n != accounts {
		t.Errorf("%d reads for %d accounts", n, accounts)
	}
}

// Two configurations look at a confirm file at the same time, and both reads are of before another node's change.
func TestConfirmFileDuringTwoReads(t *testing.T) {
	inSlowCluster(t, func(t *testing.T, a, b *rig, _ *hub, s *slowReads) {
		k := ComponentKey(testPlatform)
		a.giveConfirmFiles(confirmAnswer(testFile, confirmTestContent), "")
		b.confirm.put(ComponentKey(testPlatform2), confirmState{until: time.Now().Add(time.Hour)})
		for range 2 {
			b.troubles.failed(k, ErrUnreachable)
		}
		var wg sync.WaitGroup
		look := func() chan<- error {
			began, release := s.hold(confirmName(k))
			wg.Go(func() { _, _, _ = b.ConfirmFile(t.Context(), testFile, "") })
			<-began
			return release
		}
		first := look()
		again := *b.Manager.env.Load()
		b.Use(&again)
		synctest.Wait()
		for range 2 {
			b.troubles.failed(k, ErrUnreachable) // the new configuration forgave it
		}
		second := look()
		if got := confirmed(t, a.Manager, testFile, ""); got != confirmTestContent {
			t.Fatalf("served %q", got)
		}
		close(first)
		synctest.Wait()
		close(second)
		wg.Wait()
		atOnce(t, func() {
			if got := confirmed(t, b.Manager, testFile, ""); got != confirmTestContent {
				t.Errorf("the other node served %q", got)
			}
		})
		if n := len(b.confirm.looking); n != 0 {
			t.Errorf("%d records are still looked at", n)
		}
	})
}

// News of a confirm file that comes while what a look brought is being kept makes it be looked at again.
func TestConfirmNewsAtTheEndOfALook(t *testing.T) {
	t.Parallel()
	files := &NewManager().confirm
	for range 20_000 {
		look := files.begin(testAuthKey)
		var wg sync.WaitGroup
		wg.Go(func() { files.news(testAuthKey) })
		files.end(testAuthKey, look, confirmState{until: time.Now().Add(time.Hour)})
		files.leave(testAuthKey, look)
		wg.Wait()
		if until := files.get(testAuthKey).until; !until.IsZero() {
			t.Fatal("it is not looked at for an hour")
		}
	}
}

// A job that is hastened twice while it runs is run at the earlier time.
func TestHastenedTwiceWhileRunning(t *testing.T) {
	t.Parallel()
	var q retryQueue
	q.init()
	q.add("job", 0, nil)
	id, j, _ := q.take()
	q.hasten("job")
	q.hastenTo("job", time.Now().Add(time.Minute))
	q.finish(id, j, retryError{after: time.Hour})
	if _, again, wait := q.take(); again != j {
		t.Errorf("it waits for %v", wait)
	}
}

// An account authorises on another node while WeChat is asked for the refresh token in the place of a void one.
func TestOrphanOfARenewalThatAuthorisesMeanwhile(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		env, err := b.current()
		if err != nil {
			t.Fatal(err)
		}
		void := b.stored(t, testAuthKey).RefreshToken
		var elsewhere atomic.Bool
		a.wx.set(func(f *fakeWeChat) {
			f.listing = map[string]string{testAuthorizer: ""}
			f.hook = func(path string, _ map[string]any) (string, error) {
				if path == pathAuthorizerInfo && elsewhere.CompareAndSwap(true, false) {
					a.wx.set(func(f *fakeWeChat) { f.refresh[testAuthorizer] = "refreshtoken@@@anew" })
					a.authorize(t, testPlatform, testAuthorizer)
					time.Sleep(time.Second) // it is heard of before the answer comes
				}
				return "", nil
			}
		})
		for _, authorises := range []bool{false, true} {
			elsewhere.Store(authorises)
			if _, err := b.currentRefreshToken(t.Context(), env, testAuthKey, void); !errors.Is(err, errNoRefreshToken) {
				t.Fatalf("got %v, want errNoRefreshToken", err)
			}
			if n := b.OrphanCount(testPlatform); (n == 0) != authorises {
				t.Errorf("%d accounts have to authorise again; another node's did: %v", n, authorises)
			}
		}
	})
}

// Whoever asks for accounts that are not known cannot have it looked at will whether the list can be read, as long as it cannot
// for want of a ticket.
func TestUnknownAccountsWithoutATicket(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.env.Platforms = r.env.Platforms[:1]
		r.env.RosterEvery = rosterEvery
		r.Use(r.env)
		synctest.Wait()
		var looks atomic.Int32
		r.store.hold(func(op, name string) {
			if op == "load" && name == ticketName(testPlatform) {
				looks.Add(1)
			}
		})
		begin := time.Now()
		for time.Since(begin) < rosterHasten-time.Second {
			if _, err := r.StoredPlatformOf(t.Context(), testAuthorizer); !errors.Is(err, ErrUnsure) {
				t.Fatalf("got %v, want ErrUnsure", err)
			}
			synctest.Wait()
			time.Sleep(100 * time.Millisecond)
		}
		if n := looks.Load(); n > 2 {
			t.Errorf("the ticket was read %d times", n)
		}
		r.ticket(t, testPlatform)
		synctest.Wait()
		if r.wx.count(pathAuthorizerList) == 0 {
			t.Error("the list is not read although there is a ticket")
		}
	})
}
