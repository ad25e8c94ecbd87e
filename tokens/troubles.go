package tokens

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

const (
	backoffFirst = time.Second
	backoffMost  = time.Minute
	// troubleLogEvery is how rarely a trouble that lasts is said again.
	troubleLogEvery = 10 * time.Minute
	// maxTroubles bounds the table. One that is forgotten costs an attempt too early.
	maxTroubles = 1 << 16
	// replacementDoubt is for how long it may be found out why WeChat refused a token: the call may be one that is not repeated at once.
	replacementDoubt = 10 * time.Minute

	// refusalBurst and refusalEvery bound the renewals of one token that WeChat keeps refusing: one that is refused
	// at birth would otherwise be fetched anew with each call.
	refusalBurst = 10
	refusalEvery = 30 * time.Second
)

// backoff is the wait after the n-th failure in a row, n from 1, with a jitter of a fifth.
func backoff(n int) time.Duration {
	wait := backoffMost
	if n < 7 { // 2^6 seconds is beyond the most
		wait = min(backoffFirst<<max(n-1, 0), backoffMost)
	}
	return wait - rand.N(wait/5)
}

// troubles remembers, per key, failures in a row and the token that WeChat refused. A key without trouble has no
// place in it.
type troubles struct {
	mu   sync.Mutex
	keys map[Key]*trouble
}

type trouble struct {
	failures int
	failedAt time.Time
	retryAt  time.Time
	err      error
	loggedAt time.Time
	refused  secret.String
	ended    bool          // the refused one is not to be spared
	void     secret.String // a refresh token that WeChat called invalid
	rogues   int           // tokens that died although nobody here renewed them
	rogueAt  time.Time     // when the log last heard of them
	early    replacement   // of what may be one more
	budget   float64       // renewals for refused tokens that are left
	budgetAt time.Time

	half bool          // one of the failures brought a new refresh token and no access token, and so wrote the record
	held secret.String // half: the access token that the record had
}

// replacement is of a token that was replaced long before its end since WeChat refused it: either another system has voided it, or the path that
// it was refused on takes another kind of token. It is the former if WeChat takes the next one there.
type replacement struct {
	token secret.String
	asked time.Time // when the next one was asked for: it is our own doing that WeChat refuses this one since; zero: there is none
}

// lives reports whether somebody may still find out.
func (r replacement) lives() bool { return time.Since(r.asked) < replacementDoubt }

// forget lets the key be tried again at once; mu is held.
func (x *trouble) forget() {
	x.failures, x.err, x.retryAt = 0, nil, time.Time{}
	x.half, x.held = false, secret.String{}
}

// at returns the key's trouble, making one; mu is held.
func (t *troubles) at(k Key) *trouble {
	if t.keys == nil {
		t.keys = make(map[Key]*trouble)
	}
	x := t.keys[k]
	if x == nil {
		if len(t.keys) >= maxTroubles {
			for old := range t.keys {
				delete(t.keys, old)
				break
			}
		}
		x = &trouble{budget: refusalBurst, budgetAt: time.Now()}
		t.keys[k] = x
	}
	return x
}

// failed notes a failure and returns when to try again, and whether to say so in the log.
func (t *troubles) failed(k Key, err error) (retryAt time.Time, say bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	x, now := t.at(k), time.Now()
	x.failures++
	x.err, x.failedAt = err, now
	x.retryAt = now.Add(backoff(x.failures))
	if say = x.failures == 1 || now.Sub(x.loggedAt) >= troubleLogEvery; say {
		x.loggedAt = now
	}
	return x.retryAt, say
}

// halved notes that the failure to come wrote the record, with a new refresh token beside the access token held. What another
// node writes in the same way is no reason to try again: each would end the other's wait, for as long as WeChat answers so.
func (t *troubles) halved(k Key, held secret.String) {
	t.mu.Lock()
	defer t.mu.Unlock()
	x := t.at(k)
	x.half, x.held = true, held
}

// refuse notes that WeChat refused a token.
func (t *troubles) refuse(k Key, token secret.String) {
	t.mu.Lock()
	defer t.mu.Unlock()
	x := t.at(k)
	if !x.refused.Same(token) {
		x.refused, x.ended = token, false
	}
}

// end notes that a refused token is not to be spared, also once the cache has lost its entry.
func (t *troubles) end(k Key, token secret.String) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if x := t.keys[k]; x != nil && x.refused.Same(token) {
		x.ended = true
	}
}

// replaced notes a token that was replaced since WeChat refused it.
func (t *troubles) replaced(k Key, r replacement) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.at(k).early = r
}

// confirm reports, once, whether a token that WeChat refused at that time, and not its successor for the same call, is one that another
// system has voided.
func (t *troubles) confirm(k Key, token secret.String, at time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	x := t.keys[k]
	if x == nil || !x.early.lives() || !x.early.token.Same(token) || at.After(x.early.asked) {
		return false
	}
	x.early = replacement{}
	return true
}

// rogue counts a token that another system made invalid, and says whether to say so in the log.
func (t *troubles) rogue(k Key) (times int, say bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	x, now := t.at(k), time.Now()
	x.rogues++
	if say = x.rogues == 1 || now.Sub(x.rogueAt) >= troubleLogEvery; say {
		x.rogueAt = now
	}
	return x.rogues, say
}

// setVoid notes a refresh token that WeChat called invalid.
func (t *troubles) setVoid(k Key, refresh secret.String) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.at(k).void = refresh
}

// isVoid reports whether WeChat called a refresh token invalid.
func (t *troubles) isVoid(k Key, refresh secret.String) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	x := t.keys[k]
	return x != nil && !x.void.IsZero() && x.void.Same(refresh)
}

// spend takes one renewal for a refused token from the key's budget.
func (t *troubles) spend(k Key) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	x, now := t.at(k), time.Now()
	x.budget = min(refusalBurst, x.budget+now.Sub(x.budgetAt).Seconds()/refusalEvery.Seconds())
	x.budgetAt = now
	if x.budget < 1 {
		return said(ErrBackoff, fmt.Sprintf("WeChat refuses each new %s token of %s; is another system refreshing it?", k.Kind, k.owner()),
			fmt.Sprintf("微信拒绝了 %s 的每个新 %s 令牌；是否有其他系统也在刷新？", k.owner(), k.Kind))
	}
	x.budget--
	return nil
}

// hold returns the last failure while a renewal for a waiting caller must not be tried again. After a first failure
// the next caller may try at once.
func (t *troubles) hold(k Key) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	x := t.keys[k]
	if x == nil || x.failures < 2 || !time.Now().Before(x.retryAt) {
		return nil
	}
	return fmt.Errorf("%w: %w", ErrBackoff, x.err)
}

// last returns when the last failure was, how many there were in a row and the failure itself, if it was not made good since.
func (t *troubles) last(k Key) (at time.Time, failures int, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if x := t.keys[k]; x != nil && x.failures > 0 {
		return x.failedAt, x.failures, x.err
	}
	return time.Time{}, 0, nil
}

// adopt gives a new entry of the cache what is known of its key's troubles, which another node's access token ends.
func (t *troubles) adopt(e *entry) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if x := t.keys[e.key]; x != nil {
		if x.half && !e.token.Value.Same(x.held) {
			x.forget()
		}
		e.ended.Store(x.ended && e.token.Value.Same(x.refused))
		e.refused.Store(!x.refused.IsZero() && e.token.Value.Same(x.refused))
		if x.failures > 0 {
			e.renewAt.Store(steady(x.retryAt))
		}
	}
}

// over forgets a key's troubles, but for the budget while that is not full again, and for the refusal of the token
// that is current by now: WeChat may give a refused one again.
func (t *troubles) over(k Key, current secret.String) {
	t.mu.Lock()
	defer t.mu.Unlock()
	x := t.keys[k]
	if x == nil {
		return
	}
	still := trouble{budget: x.budget, budgetAt: x.budgetAt, rogues: x.rogues, rogueAt: x.rogueAt, early: x.early}
	if x.refused.Same(current) {
		still.refused, still.ended = x.refused, x.ended
	}
	switch {
	case !still.refused.IsZero(), x.early.lives(), x.budget < refusalBurst && time.Since(x.budgetAt) < refusalBurst*refusalEvery,
		time.Since(x.rogueAt) < troubleLogEvery:
		*x = still
	default:
		delete(t.keys, k)
	}
}

// halfway reports whether a renewal of the key brought half of what it should have.
func (t *troubles) halfway(k Key) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	x := t.keys[k]
	return x != nil && x.half
}

// remain reports whether a key's troubles outlast the news of a record with that access token, in the same authorization.
func (t *troubles) remain(k Key, access secret.String) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	x := t.keys[k]
	return x != nil && x.half && x.held.Same(access)
}

// forgive lets every key be tried again at once: a new configuration may mend what was wrong. What WeChat refused
// stays refused.
func (t *troubles) forgive() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, x := range t.keys {
		x.forget()
	}
}

// counts reports whether an error of a renewal says that this key's own call to WeChat failed.
func counts(err error) bool {
	_, api := errors.AsType[*APIError](err)
	return (api || errors.Is(err, ErrUnreachable)) && !errors.Is(err, errNoComponentToken)
}
