package tokens

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

const (
	confirmTestFile    = "87PweoaRBw.txt"
	confirmTestContent = "0123456789abcdef0123456789abcdef"
	accountTestFile    = "b1C2d3E4f5.txt"
)

// giveConfirmFiles has WeChat give files; an answer of "" is an error that is no answer.
func (r *rig) giveConfirmFiles(platform, account string) {
	r.wx.set(func(f *fakeWeChat) {
		f.hook = func(path string, _ map[string]any) (string, error) {
			answer := ""
			switch path {
			case pathPlatformConfirmFile:
				answer = platform
			case pathAccountConfirmFile:
				answer = account
			default:
				return "", nil
			}
			if answer == "" {
				return "", errors.New("connection refused")
			}
			return answer, nil
		}
	})
}

func confirmAnswer(name, content string) string {
	return fmt.Sprintf(`{"errcode":0,"errmsg":"ok","file_name":%q,"file_content":%q}`, name, content)
}

func confirmed(t *testing.T, m *Manager, name, appid string) string {
	t.Helper()
	content, found, err := m.ConfirmFile(t.Context(), name, appid)
	if err != nil {
		t.Fatalf("ConfirmFile(%s): %v", name, err)
	}
	if found != (content != nil) {
		t.Errorf("found %v, content %q", found, content)
	}
	return string(content)
}

// oneConfirmPlatform starts a rig with one platform.
func oneConfirmPlatform(t *testing.T, ahead bool) *rig {
	t.Helper()
	r := newRig(t)
	r.env.Platforms, r.env.ConfirmFiles = r.env.Platforms[:1], ahead
	r.giveConfirmFiles(confirmAnswer(confirmTestFile, confirmTestContent), confirmAnswer(accountTestFile, confirmTestContent))
	r.Use(r.env)
	return r
}

// The platform's file is fetched ahead once there is a ticket, kept over restarts, and fetched again the day after.
func TestConfirmFileAhead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := oneConfirmPlatform(t, true)
		time.Sleep(time.Minute)
		if n := r.wx.count(pathPlatformConfirmFile); n != 0 {
			t.Errorf("asked %d times without a ticket", n)
		}
		r.ticket(t, testPlatform)
		time.Sleep(confirmNoTicket + time.Second)
		if n := r.wx.count(pathPlatformConfirmFile); n != 1 {
			t.Errorf("asked %d times", n)
		}
		reads := r.store.count("load")
		if got := confirmed(t, r.Manager, confirmTestFile, ""); got != confirmTestContent {
			t.Errorf("serves %q", got)
		}
		if n := r.store.count("load") - reads; n != 0 {
			t.Errorf("%d reads for a file in memory", n)
		}
		if files := r.ConfirmFiles(); files[testPlatform].Name != confirmTestFile {
			t.Errorf("files %v", files)
		}
		r.restart()
		time.Sleep(time.Minute)
		if got := confirmed(t, r.Manager, confirmTestFile, ""); got != confirmTestContent || r.wx.count(pathPlatformConfirmFile) != 1 {
			t.Errorf("after a restart: serves %q, asked %d times", got, r.wx.count(pathPlatformConfirmFile))
		}
		r.giveConfirmFiles(confirmAnswer("newFile123.txt", "new"), "")
		r.ticket(t, testPlatform)
		time.Sleep(confirmRefresh)
		r.ticket(t, testPlatform)
		time.Sleep(time.Minute)
		if n := r.wx.count(pathPlatformConfirmFile); n != 2 {
			t.Errorf("asked %d times by the day after", n)
		}
		if got := confirmed(t, r.Manager, "newFile123.txt", ""); got != "new" {
			t.Errorf("serves %q", got)
		}
		without := *r.env
		without.ConfirmFiles = false
		r.Use(&without)
		time.Sleep(3 * confirmRefresh)
		if n := r.wx.count(pathPlatformConfirmFile); n != 2 {
			t.Errorf("asked %d times, although it is wanted no more", n)
		}
	})
}

// However many unknown names are asked for, WeChat is asked once in five minutes by all nodes, and the store a little.
func TestConfirmFileFlood(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := oneConfirmPlatform(t, false)
		r.ticket(t, testPlatform)
		other := NewManager()
		defer other.Close()
		other.Use(r.env)
		synctest.Wait()
		before, started := r.store.count("load"), time.Now()
		for second := range 12 * 60 {
			for n := range 5 {
				for _, m := range []*Manager{r.Manager, other} {
					if got := confirmed(t, m, fmt.Sprintf("x%09d.txt", second*100+n), ""); got != "" {
						t.Fatalf("serves %q", got)
					}
				}
			}
			time.Sleep(time.Second)
		}
		if n := r.wx.count(pathPlatformConfirmFile); n != 3 {
			t.Errorf("WeChat was asked %d times in 12 minutes, want 3", n)
		}
		if n, bound := r.store.count("load")-before, int(time.Since(started)/confirmRecheck)*2+50; n > bound {
			t.Errorf("%d reads, the bound is %d", n, bound)
		}
		for _, m := range []*Manager{r.Manager, other} {
			if got := confirmed(t, m, confirmTestFile, ""); got != confirmTestContent {
				t.Errorf("serves %q", got)
			}
		}
	})
}

// All who ask at the same time wait for one answer; who leaves does not end it.
func TestConfirmFileAskedForAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := oneConfirmPlatform(t, false)
		r.ticket(t, testPlatform)
		synctest.Wait()
		r.wx.set(func(f *fakeWeChat) { f.latency = time.Second })
		short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if _, found, err := r.ConfirmFile(short, confirmTestFile, ""); found || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("who cannot wait: %v, %v", found, err)
		}
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				if got := confirmed(t, r.Manager, confirmTestFile, ""); got != confirmTestContent {
					t.Errorf("serves %q", got)
				}
			})
		}
		wg.Wait()
		if n := r.wx.count(pathPlatformConfirmFile); n != 1 {
			t.Errorf("asked %d times", n)
		}
	})
}

// An account's file is had with the account's token, if it granted what that takes, and by its own name alone.
func TestConfirmFileOfAnAccount(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := oneConfirmPlatform(t, false)
		r.ticket(t, testPlatform)
		r.authorize(t, testPlatform, testAuthorizer) // with sets 1 and 15
		for _, appid := range []string{"", testAuthorizer, strangerID(1)} {
			if got := confirmed(t, r.Manager, accountTestFile, appid); got != "" {
				t.Errorf("%q: serves %q", appid, got)
			}
		}
		if n := r.wx.count(pathAccountConfirmFile); n != 0 {
			t.Errorf("asked %d times, although set 18 was not granted", n)
		}
		env, k := r.Manager.env.Load(), AuthorizerKey(testPlatform, testAuthorizer)
		_, err := r.commit(t.Context(), env, k, false, func(cur *record) *record {
			next := *cur
			next.FuncInfo = []int{1, confirmSet}
			return &next
		})
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if got := confirmed(t, r.Manager, accountTestFile, testAuthorizer); got != confirmTestContent {
				t.Errorf("serves %q", got)
			}
			if got := confirmed(t, r.Manager, accountTestFile, ""); got != "" {
				t.Errorf("serves %q on a host that is not the account's", got)
			}
		}
		if n := r.wx.count(pathAccountConfirmFile); n != 1 {
			t.Errorf("asked %d times", n)
		}
		if err := r.Revoke(t.Context(), testPlatform, testAuthorizer, time.Now().Add(time.Second)); err != nil {
			t.Fatal(err)
		}
		if got := confirmed(t, r.Manager, accountTestFile, testAuthorizer); got != "" {
			t.Errorf("serves %q of an account that revoked", got)
		}
	})
}

// Accounts' files are fetched at a bounded rate, whoever asks.
func TestConfirmFileOfManyAccounts(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := oneConfirmPlatform(t, false)
		r.ticket(t, testPlatform)
		const accounts = 100
		for n := range accounts {
			r.authorize(t, testPlatform, strangerID(n))
			synctest.Wait() // WeChat tells the permission sets once more
			_, err := r.commit(t.Context(), r.Manager.env.Load(), AuthorizerKey(testPlatform, strangerID(n)), false, func(cur *record) *record {
				next := *cur
				next.FuncInfo = []int{confirmSet}
				return &next
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		for range 10 {
			for n := range accounts {
				_ = confirmed(t, r.Manager, "unknown1234.txt", strangerID(n))
			}
			time.Sleep(time.Second)
		}
		if n := r.wx.count(pathAccountConfirmFile); n > confirmAccounts+11*confirmAccountsPerSecond || n < confirmAccounts {
			t.Errorf("asked %d times", n)
		}
	})
}

// What WeChat refuses is asked again after five minutes, and when it is not reached, after one; what is known serves on, and
// the log hears of it once in a while. What is no verification file is not taken.
func TestConfirmFileFailures(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, answer string
		every        time.Duration
	}{
		{"refused", wxError(61007, "api is unauthorized to component"), confirmEvery},
		{"not reached", "", confirmRetry},
		{"no file", `{"errcode":0}`, confirmRetry},
		{"a path for a name", confirmAnswer("../../x.txt", "x"), confirmRetry},
		{"a name that sites have", confirmAnswer("robots.txt", "x"), confirmRetry},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := oneConfirmPlatform(t, false)
				r.ticket(t, testPlatform)
				if got := confirmed(t, r.Manager, confirmTestFile, ""); got != confirmTestContent {
					t.Fatalf("serves %q", got)
				}
				r.giveConfirmFiles(tt.answer, "")
				time.Sleep(confirmEvery)
				before, said := r.wx.count(pathPlatformConfirmFile), r.log.count("gives no verification file")
				for range 600 {
					if _, found, _ := r.ConfirmFile(t.Context(), "unknown1234.txt", ""); found {
						t.Fatal("an unknown name is served")
					}
					if got := confirmed(t, r.Manager, confirmTestFile, ""); got != confirmTestContent {
						t.Fatalf("serves %q", got)
					}
					time.Sleep(time.Second)
				}
				if n, want := r.wx.count(pathPlatformConfirmFile)-before, int(10*time.Minute/tt.every); n < want-1 || n > want+1 {
					t.Errorf("asked %d times in ten minutes, want %d", n, want)
				}
				if n := r.log.count("gives no verification file") - said; n != 1 {
					t.Errorf("%d lines in the log", n)
				}
			})
		})
	}
}

// What the store has is served by a process that has just begun, also while WeChat is slow, and when it gives nothing.
func TestConfirmFileAfterARestart(t *testing.T) {
	t.Parallel()
	for name, slow := range map[string]bool{"slow": true, "not reached": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := oneConfirmPlatform(t, false)
				r.ticket(t, testPlatform)
				if got := confirmed(t, r.Manager, confirmTestFile, ""); got != confirmTestContent {
					t.Fatalf("serves %q", got)
				}
				time.Sleep(2 * confirmEvery)
				r.restart()
				if slow {
					r.wx.set(func(f *fakeWeChat) { f.latency = 8 * time.Second })
				} else {
					r.giveConfirmFiles("", "")
				}
				ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
				defer cancel()
				if content, found, err := r.ConfirmFile(ctx, confirmTestFile, ""); !found || string(content) != confirmTestContent {
					t.Errorf("found %v, %v", found, err)
				}
			})
		})
	}
}

// What one node had from WeChat the others serve at once, also one that WeChat has just not answered.
func TestConfirmFileOfAnotherNode(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		_, err := a.commit(t.Context(), a.Manager.env.Load(), testAuthKey, false, func(cur *record) *record {
			next := *cur
			next.FuncInfo = []int{confirmSet}
			return &next
		})
		if err != nil {
			t.Fatal(err)
		}
		a.giveConfirmFiles("", "")
		if _, found, err := b.ConfirmFile(t.Context(), accountTestFile, testAuthorizer); found || err == nil {
			t.Fatalf("found %v, %v", found, err)
		}
		a.giveConfirmFiles("", confirmAnswer(accountTestFile, confirmTestContent))
		if got := confirmed(t, a.Manager, accountTestFile, testAuthorizer); got != confirmTestContent {
			t.Fatalf("served %q", got)
		}
		atOnce(t, func() {
			if got := confirmed(t, b.Manager, accountTestFile, testAuthorizer); got != confirmTestContent {
				t.Errorf("the other node served %q", got)
			}
		})
		revoke(t, a)
		if _, found, _ := b.ConfirmFile(t.Context(), accountTestFile, testAuthorizer); found {
			t.Error("served for an account that is gone")
		}
	})
}
