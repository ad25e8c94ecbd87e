package tokens

import (
	"bytes"
	"encoding/hex"
	"path"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/crypto"
)

// everyRecord are names of records of each class, and of many idle accounts.
func everyRecord() (names []string) {
	hash := hex.EncodeToString(make([]byte, 16))
	names = []string{
		opaqueName, ticketName(testPlatform2), intentName(hash), forwardName(hash), verifyShardName(3), confirmName(ComponentKey(testPlatform)),
		confirmName(testAuthKey), rosterName(testPlatform), pushAskedName(testPlatform), userNameName("gh_1"), ComponentKey(testPlatform).recordName(),
		AccountKey(testAuthorizer).recordName(), Key{Kind: KindJSAPI, AppID: testAuthorizer}.recordName(), Key{Kind: KindCard, Platform: testPlatform, AppID: testAuthorizer}.recordName(),
	}
	for n := range 3 * resealPage {
		names = append(names, AuthorizerKey(testPlatform, appidOf(n)).recordName(), userNameName("gh_"+appidOf(n)[2:]))
	}
	return names
}

// What no process touches any more, as the records of accounts that are idle, is sealed anew all the same, and says the same afterwards. The log
// says when it is, and not before.
func TestIdleRecordsAreSealedAnew(t *testing.T) {
	t.Parallel()
	for name, swaps := range map[string]bool{"with compare and swap": true, "without": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { testIdleRecords(t, swaps) })
		})
	}
}

func testIdleRecords(t *testing.T, swaps bool) {
	r := newRig(t)
	if swaps {
		r.env.Store = &busStore{r.store, &hub{ear: make(map[*busStore]Listener)}}
	}
	r.env.Platforms = nil // nothing is done but what is looked at here
	useSealKeys(t, r, 7)
	names := everyRecord()
	classes := make(map[recordClass]bool)
	for _, name := range names {
		if err := r.storeRecord(t.Context(), r.Manager.env.Load(), name, map[string]any{"is": name, "platform": testPlatform, "expires_at": time.Now().Add(time.Hour).Unix()}); err != nil {
			t.Fatal(err)
		}
		class, _ := classOf(name)
		classes[class] = true
	}
	if len(classes) != 13 {
		t.Fatalf("%d classes of records, want all", len(classes))
	}
	const stray, torn, foreign = root + "/ticket/stray.tmp", root + "/component/torn", root + "/account/foreign"
	strange := map[string][]byte{stray: []byte("x"), torn: []byte("\x01torn")}
	sealer, err := crypto.NewSealer(bytes.Repeat([]byte{9}, 32))
	if err != nil {
		t.Fatal(err)
	}
	if strange[foreign], err = sealer.Seal(foreign, []byte(`{"v":1}`)); err != nil {
		t.Fatal(err)
	}
	for name, data := range strange {
		if err := r.store.MemStore.Store(t.Context(), name, data); err != nil {
			t.Fatal(err)
		}
	}
	const says = "every record is sealed with the first seal_key"
	time.Sleep(time.Minute)
	if r.log.count(says) != 0 {
		t.Error("with one key it is said that all are sealed")
	}

	useSealKeys(t, r, 8, 7)
	if !swaps { // these are deleted without a lock, and could be brought back
		time.Sleep(5 * time.Minute)
		if r.log.count(says) != 0 || r.log.count("records are still sealed with an old seal_key") == 0 {
			t.Errorf("with records left, the log:\n%s", r.log)
		}
		names = slices.DeleteFunc(names, func(name string) bool {
			ends := path.Dir(name) == intentFolder || path.Dir(name) == forwardFolder
			if ends {
				_ = r.store.MemStore.Delete(t.Context(), name)
			}
			return ends
		})
	}
	time.Sleep(10 * time.Minute)
	if n := r.log.count(says); n != 1 || r.log.count("unreadable=2") != 1 {
		t.Errorf("the log says %d times that all are sealed, of which two that no key opens:\n%s", n, r.log)
	}
	useSealKeys(t, r, 8)
	for _, name := range names {
		var is map[string]any
		if err := r.loadRecord(t.Context(), r.Manager.env.Load(), name, &is); err != nil || is["is"] != name {
			t.Errorf("with the new key alone, %s: %v, %v", name, is, err)
		}
	}
	for name, data := range strange {
		if now, err := r.store.MemStore.Load(t.Context(), name); err != nil || !bytes.Equal(now, data) {
			t.Errorf("%s was changed: %v", name, err)
		}
	}
}

// What another node writes while a record is being sealed anew stays.
func TestResealingLeavesNewerRecords(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		k, other := testAuthKey, AuthorizerKey(testPlatform2, testAuthorizer)
		if err := a.keepUserName(t.Context(), a.Manager.env.Load(), k, "gh_1"); err != nil {
			t.Fatal(err)
		}
		b.Close()
		useSealKeys(t, a, 8, 7)
		var once atomic.Bool
		a.store.hold(func(op, name string) {
			if op == "store" && name == userNameName("gh_1") && once.CompareAndSwap(false, true) {
				if err := a.keepUserName(t.Context(), a.Manager.env.Load(), other, "gh_1"); err != nil {
					t.Error(err)
				}
			}
		})
		time.Sleep(5 * time.Minute)
		if !once.Load() || a.log.count("every record is sealed") != 1 {
			t.Fatalf("it was not sealed anew:\n%s", a.log)
		}
		if platform, _, err := a.ByUserName(t.Context(), "gh_1"); err != nil || platform != testPlatform2 {
			t.Errorf("what was written meanwhile is gone: %q, %v", platform, err)
		}
	})
}

// A store that cannot read one record, and does not take another, holds the others up little; both are sealed anew when it can.
func TestResealingPastWhatFails(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.env.Platforms = nil
		useSealKeys(t, r, 7)
		names := everyRecord()[len(everyRecord())-3*resealPage:]
		for _, name := range names {
			if err := r.storeRecord(t.Context(), r.Manager.env.Load(), name, struct{}{}); err != nil {
				t.Fatal(err)
			}
		}
		r.store.fail(func(op, name string) error {
			if op == "load" && name == names[0] || op == "store" && name == names[1] {
				return errDisk
			}
			return nil
		})
		old := func() (n int) {
			for _, name := range names {
				if raw, _ := r.store.MemStore.Load(t.Context(), name); !r.Manager.env.Load().isSealed(raw) {
					n++
				}
			}
			return n
		}
		// With Caddy's storage, the platform is known by a record of its own.
		if err := r.storeRecord(t.Context(), r.Manager.env.Load(), ComponentKey(testPlatform).recordName(), struct{}{}); err != nil {
			t.Fatal(err)
		}
		useSealKeys(t, r, 8, 7)
		time.Sleep(time.Minute)
		if n := old(); n != 2 {
			t.Errorf("%d records are not sealed anew, want the two that fail", n)
		}
		lists := r.store.count("list")
		time.Sleep(24 * time.Hour)
		if n := r.log.count("records are still sealed with an old seal_key"); n < 24 || n > 32 || r.log.count("left=2") != n {
			t.Errorf("in a day it is said %d times that two are left, or not with how many", n)
		}
		if n := r.log.count("cannot be sealed with the newest seal_key"); n == 0 || n > 64 {
			t.Errorf("in a day it is said %d times what fails", n)
		}
		if n := r.store.count("list") - lists; n > 32*5 { // the platforms' folders
			t.Errorf("the folders were listed %d times", n)
		}
		r.store.fail(func(op, _ string) error {
			if op == "list" {
				return errDisk
			}
			return nil
		})
		time.Sleep(resealMost + time.Minute)
		if n := r.log.count("records cannot be listed"); n == 0 || n > 90 { // one for each attempt, of which there is one in some 50 s at most
			t.Errorf("within two passes it is said %d times that nothing can be listed", n)
		}
		r.store.fail(nil)
		time.Sleep(resealMost + time.Minute)
		if n := old(); n != 0 || r.log.count("every record is sealed with the first seal_key") != 1 {
			t.Errorf("when nothing fails any more, %d records are not sealed anew", n)
		}
	})
}

// A record with an old key that comes later, as with a backup, has all gone through again; but not over and over, whoever puts it there.
func TestOldRecordsThatComeLater(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		userName := "gh_" + testAuthorizer[2:]
		if err := r.keepUserName(t.Context(), r.Manager.env.Load(), testAuthKey, userName); err != nil {
			t.Fatal(err)
		}
		backup, err := r.store.MemStore.Load(t.Context(), userNameName(userName))
		if err != nil {
			t.Fatal(err)
		}
		useSealKeys(t, r, 8, 7)
		const says = "every record is sealed with the first seal_key"
		time.Sleep(time.Minute)
		for hour := 1; hour <= 3; hour++ {
			if n := r.log.count(says); n != hour {
				t.Fatalf("in hour %d all have been gone through %d times", hour, n)
			}
			for range 50 {
				if err := r.store.MemStore.Store(t.Context(), userNameName(userName), backup); err != nil {
					t.Fatal(err)
				}
				if _, appid, err := r.ByUserName(t.Context(), userName); err != nil || appid != testAuthorizer {
					t.Fatalf("%q, %v", appid, err)
				}
				time.Sleep(time.Minute)
			}
			time.Sleep(15 * time.Minute)
			if _, _, err := r.ByUserName(t.Context(), userName); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Minute)
		}
	})
}

// Without records of an old key, nothing is gone through.
func TestNothingToSealAnew(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		r.restart()
		r.get(t, testAuthKey)
		time.Sleep(time.Hour)
		if r.log.count("every record is sealed") != 0 {
			t.Error("all records were gone through")
		}
	})
}

// Records that are read and hardly ever written are sealed with the new key once they are read under it, and open when the old one is gone.
func TestRecordsThatAreOnlyReadAreSealedAnew(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		const file = "MP_verify_abcdefgh.txt"
		userName := "gh_" + testAuthorizer[2:]
		if _, err := r.FetchAccountInfo(t.Context(), testPlatform, testAuthorizer); err != nil {
			t.Fatal(err)
		}
		if _, err := r.PutVerifyFile(t.Context(), file, []byte("abcdefgh")); err != nil {
			t.Fatal(err)
		}
		issued, err := r.IssueOpaque(t.Context(), OpaqueClaims{AppID: testAuthorizer, ExpiresAt: time.Now().Add(time.Hour)})
		if err != nil {
			t.Fatal(err)
		}
		for _, keys := range [][]byte{{9, 7}, {9}} {
			r.Close()
			r.Manager = NewManager()
			useSealKeys(t, r, keys...)
			time.Sleep(time.Minute)
			if _, appid, err := r.ByUserName(t.Context(), userName); err != nil || appid != testAuthorizer {
				t.Errorf("with %d keys, by its gh_ id: %q, %v", len(keys), appid, err)
			}
			if _, found, err := r.VerifyFile(t.Context(), file); err != nil || !found {
				t.Errorf("with %d keys, the file: %v, %v", len(keys), found, err)
			}
			if _, err := r.OpenOpaque(t.Context(), issued.Reveal()); err != nil {
				t.Errorf("with %d keys, the opaque token: %v", len(keys), err)
			}
			time.Sleep(time.Minute)
		}
	})
}

// While the new key is the first on one node and still the second on another, neither seals anew what the other has sealed: they would do so in
// turn for ever. Once it is the first on all nodes, what is read at the start alone is sealed with it too.
func TestSealKeysThatChangePlaces(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		const file = "MP_verify_abcdefgh.txt"
		if _, err := a.PutVerifyFile(t.Context(), file, []byte("abcdefgh")); err != nil {
			t.Fatal(err)
		}
		issued, err := a.IssueOpaque(t.Context(), OpaqueClaims{AppID: testAuthorizer, ExpiresAt: time.Now().Add(time.Hour)})
		if err != nil {
			t.Fatal(err)
		}
		var writes atomic.Int64
		a.store.hold(func(op, name string) {
			if _, shard := verifyShardNamed(name); (shard || name == opaqueName) && op == "store" && writes.Add(1) > 100 {
				time.Sleep(time.Minute) // or this test would never end
			}
		})
		useSealKeys(t, a, 7, 8)
		useSealKeys(t, b, 7, 8)
		for _, r := range []*rig{a, b} {
			useSealKeys(t, r, 8, 7)
			for range 10 {
				for _, r := range []*rig{a, b} {
					if _, err := r.loadOpaqueKeys(t.Context(), r.Manager.env.Load()); err != nil {
						t.Error(err)
					}
					if _, found, err := r.VerifyFile(t.Context(), file); err != nil || !found {
						t.Errorf("the file: %v, %v", found, err)
					}
				}
				time.Sleep(2 * verifyFresh)
			}
			time.Sleep(5 * time.Minute)
			if n := writes.Load(); n > 2 {
				t.Errorf("two records were written %d times", n)
			}
		}
		time.Sleep(2 * sealingLife)
		_, _, _ = b.VerifyFile(t.Context(), file)
		time.Sleep(time.Second)
		if n := writes.Load(); n != 2 {
			t.Errorf("two records were sealed anew %d times in all", n)
		}
		for _, r := range []*rig{a, b} {
			r.Close()
			r.Manager = NewManager()
			useSealKeys(t, r, 8)
			if _, err := r.OpenOpaque(t.Context(), issued.Reveal()); err != nil {
				t.Errorf("without the old key, the opaque token: %v", err)
			}
			if _, found, err := r.VerifyFile(t.Context(), file); err != nil || !found {
				t.Errorf("without the old key, the file: %v, %v", found, err)
			}
		}
	})
}

// Records that wait to be sealed anew while the store is slow to take them, as many as were read, leave the other workers to what must be done.
func TestResealingLeavesWorkersToOthers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		const accounts = 10 * queueWorkers
		for n := range accounts {
			if err := r.keepUserName(t.Context(), r.Manager.env.Load(), AuthorizerKey(testPlatform, appidOf(n)), "gh_"+appidOf(n)[2:]); err != nil {
				t.Fatal(err)
			}
		}
		r.store.hold(func(op, name string) {
			if op == "store" && strings.HasPrefix(name, userNameFolder) {
				time.Sleep(storeTimeout / 2)
			}
		})
		useSealKeys(t, r, 8, 7)
		r.get(t, ComponentKey(testPlatform))
		time.Sleep(time.Minute)
		for n := range accounts {
			if _, appid, err := r.ByUserName(t.Context(), "gh_"+appidOf(n)[2:]); err != nil || appid != appidOf(n) {
				t.Fatalf("%q, %v", appid, err)
			}
		}
		synctest.Wait()
		if err := r.Accept(t.Context(), r.push(r.newCode(testAuthorizer))); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if got := r.wx.count(pathQueryAuth); got != 1 {
			t.Errorf("the code of an event was tried %d times, want at once", got)
		}
		time.Sleep(accounts * storeTimeout)
		for n := range accounts {
			raw, err := r.store.MemStore.Load(t.Context(), userNameName("gh_"+appidOf(n)[2:]))
			if err != nil || !r.Manager.env.Load().isSealed(raw) {
				t.Errorf("account %d is not sealed anew: %v", n, err)
			}
		}
	})
}

// A store that takes nothing is not told of with each record that is read.
func TestResealingThatFailsIsSaidRarely(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		if err := r.keepUserName(t.Context(), r.Manager.env.Load(), testAuthKey, "gh_1"); err != nil {
			t.Fatal(err)
		}
		useSealKeys(t, r, 8, 7)
		r.store.fail(func(op, _ string) error {
			if op == "store" {
				return errDisk
			}
			return nil
		})
		for range 3 * maxBudgetLines {
			if _, _, err := r.ByUserName(t.Context(), "gh_1"); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		if n := r.log.count("cannot be sealed with the newest seal_key"); n == 0 || n > maxBudgetLines {
			t.Errorf("it is said %d times", n)
		}
	})
}
