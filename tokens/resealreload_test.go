package tokens

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// A renewal that is under way while the seal key changes ends with the keys of after: its record is sealed anew meanwhile, and is not damaged;
// and what it writes does not need the key that is said to be needed no more.
func TestRenewalWhileTheSealKeyChanges(t *testing.T) {
	t.Parallel()
	for name, keys := range map[string][]byte{"the new one comes first": {8, 7}, "they changed places before": {8}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				r.authorize(t, testPlatform, testAuthorizer)
				if len(keys) == 1 {
					useSealKeys(t, r, 8, 7)
					time.Sleep(time.Minute)
				}
				answer := make(chan struct{})
				var held atomic.Bool
				r.wx.set(func(f *fakeWeChat) {
					f.hook = func(path string, _ map[string]any) (string, error) {
						if path == pathAuthorizerToken && held.CompareAndSwap(false, true) {
							<-answer
						}
						return "", nil
					}
				})
				done := make(chan error)
				go func() { _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); done <- err }()
				synctest.Wait()
				if !held.Load() {
					t.Fatal("nothing is renewed")
				}
				said := r.log.count("every record is sealed with the first seal_key")
				useSealKeys(t, r, keys...)
				time.Sleep(2 * time.Second)
				if len(keys) > 1 && r.log.count("every record is sealed with the first seal_key") != said+1 {
					t.Fatalf("not all is sealed anew:\n%s", r.log)
				}
				close(answer)
				if err := <-done; err != nil {
					t.Fatal(err)
				}
				if n := r.log.count("damaged"); n != 0 {
					t.Errorf("the record is set aside:\n%s", r.log)
				}
				raw, err := r.store.MemStore.Load(t.Context(), testAuthKey.recordName())
				if err != nil || !r.Manager.env.Load().isSealed(raw) {
					t.Errorf("the renewed record is sealed with the key of before: %v", err)
				}
			})
		})
	}
}

// A configuration that is refused after all, as by a port that is taken, has sealed nothing with a key that the one of before lacks.
func TestRefusedConfigurationSealsNothingAnew(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		if _, err := r.PutVerifyFile(t.Context(), "MP_verify_abcdefgh.txt", []byte("abcdefgh")); err != nil {
			t.Fatal(err)
		}
		before := r.env
		var stays atomic.Bool
		unsure := *r.env
		unsure.Settled = stays.Load
		r.env = &unsure
		useSealKeys(t, r, 8, 7)
		time.Sleep(5 * time.Second)
		r.Use(before)
		time.Sleep(time.Minute)
		if n := r.log.count("every record is sealed"); n != 0 {
			t.Errorf("with the one key of before it is said %d times that all are sealed", n)
		}
		r.restart()
		r.Use(before)
		if _, found, err := r.VerifyFile(t.Context(), "MP_verify_abcdefgh.txt"); err != nil || !found {
			t.Errorf("the file: %v, %v", found, err)
		}
		for name, raw := range r.store.MemStore.records {
			if id, _ := crypto.SealedWith(raw); id != before.Sealer.KeyIDs()[0] {
				t.Errorf("%s is sealed with a key that is not configured", name)
			}
		}

		r.env = &unsure
		useSealKeys(t, r, 8, 7)
		time.Sleep(5 * time.Second)
		stays.Store(true)
		time.Sleep(5 * time.Second)
		if n := r.log.count("every record is sealed"); n != 1 {
			t.Errorf("with a configuration that stays it is said %d times that all are sealed", n)
		}
	})
}
