package tokens

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

func TestRecordNames(t *testing.T) {
	t.Parallel()
	for key, want := range map[Key]string{
		ComponentKey(testPlatform): "wechat/v1/component/" + testPlatform,
		AccountKey(testAccount):    "wechat/v1/account/" + testAccount,
	} {
		if got := key.recordName(); got != want {
			t.Errorf("%v is kept at %s, want %s", key, got, want)
		}
	}
	name := AuthorizerKey(testPlatform, testAuthorizer).recordName()
	if !strings.HasPrefix(name, "wechat/v1/authorizer/"+testPlatform+"/") || !strings.HasSuffix(name, "/"+testAuthorizer) {
		t.Errorf("an authorizer is kept at %s", name)
	}
	shards := make(map[string]int)
	for i := range 5000 {
		shards[strings.Split(AuthorizerKey(testPlatform, fmt.Sprintf("wx%016x", i)).recordName(), "/")[4]]++
	}
	if len(shards) != 256 {
		t.Errorf("5000 accounts are spread over %d folders, want 256", len(shards))
	}
	ids := []string{"", ".", "..", "a", "A", "a/b", "../a", "x-41", "h-41", "a b", "é", strings.Repeat("a", 64), strings.Repeat("a", 65), strings.Repeat("A", 300)}
	seen := make(map[string]string)
	for _, id := range ids {
		segment := recordID(id)
		if strings.ContainsAny(segment, "/.") || segment == "" || segment != strings.ToLower(segment) || len(segment) > 140 {
			t.Errorf("id %q makes the segment %q", id, segment)
		}
		if other, ok := seen[segment]; ok {
			t.Errorf("%q and %q are one record", id, other)
		}
		seen[segment] = id
	}
	if a, b := codeHash("p1", "code"), codeHash("p2", "code"); a == b || !isCodeHash(a) {
		t.Errorf("codes of two platforms: %s, %s", a, b)
	}
	for _, stray := range []string{"", "tmp", ".tmp123", strings.Repeat("g", 32)} {
		if isCodeHash(stray) {
			t.Errorf("%q passes for an intent", stray)
		}
	}
}

func TestKeyLocks(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var l keyLocks
		unlock, err := l.lock(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := l.lock(ctx, "a"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a held lock: %v", err)
		}
		other, err := l.lock(t.Context(), "b")
		if err != nil {
			t.Error(err)
		}
		other()
		got := make(chan struct{})
		go func() {
			second, err := l.lock(t.Context(), "a")
			if err == nil {
				second()
			}
			close(got)
		}()
		synctest.Wait()
		unlock()
		unlock()
		<-got
		if n := len(l.locks); n != 0 {
			t.Errorf("%d locks are remembered", n)
		}
	})
}

func TestQueueRepeatsWithGrowingPauses(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.env.Platforms = nil
		r.Use(r.env)
		var at []time.Duration
		start := time.Now()
		r.queue.add("test", time.Second, func(context.Context) error {
			at = append(at, time.Since(start))
			if len(at) < 10 {
				return errors.New("not yet")
			}
			return nil
		})
		r.queue.add("test", 0, func(context.Context) error { t.Error("two jobs of one id"); return nil })
		time.Sleep(time.Hour)
		synctest.Wait()
		if len(at) != 10 || at[0] != time.Second {
			t.Fatalf("attempts at %v", at)
		}
		for i := 2; i < len(at); i++ {
			pause, before := at[i]-at[i-1], at[i-1]-at[i-2]
			if pause > backoffMost || pause < before && before < backoffMost*4/5 {
				t.Errorf("a pause of %v after one of %v", pause, before)
			}
		}
	})
}

func TestQueueRunsAgainWhatIsAddedWhileRunning(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.env.Platforms = nil
		r.Use(r.env)
		runs := 0
		var run func(context.Context) error
		run = func(context.Context) error {
			if runs++; runs == 1 {
				r.queue.add("test", 0, run)
			}
			return nil
		}
		r.queue.add("test", 0, run)
		synctest.Wait()
		if runs != 2 {
			t.Errorf("%d runs", runs)
		}
		// A job that panics is one that failed.
		r.queue.add("panics", 0, func(context.Context) error {
			if runs++; runs == 3 {
				panic("bug")
			}
			return nil
		})
		time.Sleep(time.Minute)
		synctest.Wait()
		if runs != 4 {
			t.Errorf("%d runs", runs)
		}
	})
}

func TestQueueBoundsItsWorkers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.env.Platforms = nil
		r.Use(r.env)
		release := make(chan struct{})
		running := make(chan struct{}, 100)
		for i := range 50 {
			r.queue.add(fmt.Sprint(i), 0, func(context.Context) error {
				running <- struct{}{}
				<-release
				return nil
			})
		}
		synctest.Wait()
		if n := len(running); n != queueWorkers {
			t.Errorf("%d jobs at once", n)
		}
		close(release)
		synctest.Wait()
		if n := len(running); n != 50 {
			t.Errorf("%d of 50 jobs ran", n)
		}
	})
}

func TestExchangedCodesAreBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var x exchangedCodes
		for i := range maxExchanged + 10 {
			x.put(fmt.Sprint(i), "wx")
			time.Sleep(time.Millisecond)
		}
		if len(x.codes) > maxExchanged {
			t.Errorf("%d codes are remembered", len(x.codes))
		}
		if _, ok := x.get("0"); ok {
			t.Error("the oldest is remembered, a newer one was dropped")
		}
		if appid, ok := x.get(fmt.Sprint(maxExchanged)); !ok || appid != "wx" {
			t.Error("a new one is forgotten")
		}
		time.Sleep(codeLife)
		if _, ok := x.get(fmt.Sprint(maxExchanged)); ok {
			t.Error("remembered for longer than a code lives")
		}
		x.put("new", "wx")
		if len(x.codes) != 1 {
			t.Errorf("%d codes after an hour", len(x.codes))
		}
	})
}

func TestTroublesAreBounded(t *testing.T) {
	t.Parallel()
	var x troubles
	for i := range maxTroubles + 10 {
		x.failed(AccountKey(fmt.Sprint(i)), errDisk)
	}
	if n := len(x.keys); n != maxTroubles {
		t.Errorf("%d troubles are remembered", n)
	}
	x.over(AccountKey(fmt.Sprint(maxTroubles+9)), secret.String{})
	if n := len(x.keys); n != maxTroubles-1 {
		t.Errorf("%d troubles after one was over", n)
	}
}

func TestSecretsOfTypesDoNotPrint(t *testing.T) {
	t.Parallel()
	s := secret.New(clearSecret)
	var b logBuffer
	log := slog.New(slog.NewJSONHandler(&b, nil))
	for _, v := range []any{
		Token{Value: s}, Ticket{Value: s}, Intent{Code: s}, record{AccessToken: s, RefreshToken: s}, grant{access: s, refresh: s},
		PlatformCredentials{Secret: s}, AccountCredentials{Secret: s}, authCode{code: s}, &entry{token: Token{Value: s}},
		Environment{Platforms: []PlatformCredentials{{Secret: s}}},
	} {
		fmt.Fprintf(&b, "%v %+v %#v %s\n", v, v, v, v)
		log.Info("value", "v", v)
	}
	if strings.Contains(b.String(), clearSecret) {
		t.Errorf("a secret was printed")
	}
}
