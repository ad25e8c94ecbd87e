package tokens

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// TestReplacedWaitsForAnotherNode: WeChat has voided the token for another node, which does not have the next one yet.
func TestReplacedWaitsForAnotherNode(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		const answering = 300 * time.Millisecond
		before := b.get(t, testAuthKey)
		type result struct {
			token Token
			err   error
			took  time.Duration
		}
		results := make(chan result, 1)
		a.wx.set(func(f *fakeWeChat) {
			f.hook = func(path string, _ map[string]any) (string, error) {
				if path == pathAuthorizerToken {
					go func() {
						start := time.Now()
						token, err := b.Replaced(t.Context(), testAuthKey, before.Value)
						results <- result{token, err, time.Since(start)}
					}()
					time.Sleep(answering)
				}
				return "", nil
			}
		})
		asked := a.wx.count(pathAuthorizerToken)
		renewed, err := a.Renew(t.Context(), testAuthKey, before.Value)
		if err != nil {
			t.Fatal(err)
		}
		if r := <-results; r.err != nil || !sameToken(r.token, renewed) || r.took > answering+2*replacedEvery {
			t.Errorf("got generation %d, %v after %v, want generation %d", r.token.Generation, r.err, r.took, renewed.Generation)
		}
		start := time.Now()
		if _, err := b.Replaced(t.Context(), testAuthKey, renewed.Value); !errors.Is(err, ErrNotReplaced) || time.Since(start) != replacedWait {
			t.Errorf("of the token in force: %v after %v", err, time.Since(start))
		}
		if n := a.wx.count(pathAuthorizerToken) - asked; n != 1 {
			t.Errorf("%d renewals, want 1", n)
		}
	})
}

// TestReplacedWithoutABus: with nobody to hear, only a renewal on this node is waited for.
func TestReplacedWithoutABus(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.Use(r.env)
		r.ticket(t, testPlatform)
		r.authorize(t, testPlatform, testAuthorizer)
		before := r.get(t, testAuthKey)
		atOnce(t, func() {
			if _, err := r.Replaced(t.Context(), testAuthKey, before.Value); !errors.Is(err, ErrNotReplaced) {
				t.Errorf("of the token in force: %v", err)
			}
		})
		r.wx.set(func(f *fakeWeChat) { f.latency = 300 * time.Millisecond })
		time.Sleep(time.Until(before.ExpiresAt) - time.Minute)
		r.ticket(t, testPlatform)
		r.get(t, ComponentKey(testPlatform))
		if got := r.get(t, testAuthKey); !sameToken(got, before) { // stale, so that it is renewed behind this use
			t.Fatalf("generation %d, want the stale token of generation %d", got.Generation, before.Generation)
		}
		synctest.Wait()
		if got, err := r.Replaced(t.Context(), testAuthKey, before.Value); err != nil || sameToken(got, before) {
			t.Errorf("while it is renewed: generation %d, %v", got.Generation, err)
		}
	})
}
