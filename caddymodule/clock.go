package caddymodule

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

const (
	// clockDoubt is a difference between WeChat's clock and ours that is pointed out; at defaultTimestampWindow ours would refuse all pushes.
	clockDoubt = time.Minute
	// clockEvery is how often an app's call is looked at for it, and clockLogEvery how rarely the log hears of it.
	clockEvery    = time.Minute
	clockLogEvery = 10 * time.Minute
	// clockMemory is for how long an answer is believed: each renewal of a token brings the next.
	clockMemory = 3 * time.Hour
	// clockMost is the largest difference that is believed. With a clock that is further off no certificate of WeChat's is good here.
	clockMost = 366 * 24 * time.Hour
	// clockAskEvery is how rarely WeChat is asked for its time: whoever sends old pushes again must not have us ask much.
	clockAskEvery = 10 * time.Second
	// clockAskWait is how long pushes wait to hear it. With eventStoreTimeout after that, what must be durable is within WeChat's 5 s.
	clockAskWait = 1500 * time.Millisecond
	// clockAskTimeout leaves time for a second origin where the first cannot be reached; pushes that come later have the answer.
	clockAskTimeout = 4 * time.Second
)

// wechatClock is how far WeChat's clock is from this machine's, by the Date of its answers. The zero value is ready.
type wechatClock struct {
	due     atomic.Int64 // when an app's call is looked at next, since health.started
	differs atomic.Bool  // by the last answer, by clockDoubt or more

	mu    sync.Mutex
	at    time.Time // when the last answer came
	ahead time.Duration
	said  time.Time
	asked time.Time     // when WeChat was last asked for it
	told  chan struct{} // closed when that is over; nil: it was never asked
}

// sawAnswer looks at the answer to an app's call, now and then. It is on the way of each call.
func (h *health) sawAnswer(header http.Header, log *zap.Logger) {
	now := time.Now()
	since, due := int64(now.Sub(h.started)), h.clock.due.Load()
	if since >= due && h.clock.due.CompareAndSwap(due, since+int64(clockEvery)) {
		h.dated(header.Get("Date"), now, log)
	}
}

// dated notes the Date of an answer of WeChat's, which came at a time by the clock here. It has whole seconds, and is half of one late on
// average; what the answer took to come does not matter beside a minute.
func (h *health) dated(date string, at time.Time, log *zap.Logger) {
	theirs, err := http.ParseTime(date)
	if err != nil {
		return
	}
	ahead := theirs.Add(time.Second / 2).Sub(at).Round(time.Second)
	if ahead.Abs() > clockMost {
		return
	}
	c := &h.clock
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at, c.ahead = at, ahead
	c.differs.Store(c.ahead.Abs() >= clockDoubt)
	if c.ahead.Abs() < clockDoubt {
		c.said = time.Time{}
		return
	}
	if c.said.IsZero() || at.Sub(c.said) >= clockLogEvery {
		c.said = at
		log.Error("this machine's clock differs from WeChat's, by the Date of its answers: correct this machine's clock", zap.Duration("wechat_ahead_by", c.ahead))
	}
}

// offset is how far WeChat's clock is ahead, as far as is known: not any more once this machine's was set since, or it has slept, which is
// alike from here.
func (c *wechatClock) offset(now time.Time) (ahead time.Duration, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.at.IsZero() {
		return 0, false
	}
	return c.ahead, stillKnown(now.Round(0).Sub(c.at.Round(0)), now.Sub(c.at))
}

// judges returns how far WeChat's clock is ahead if pushes are to be judged by that: if ours is off by so much that it would refuse what
// WeChat has just sent; else 0. It is on the way of each push.
func (c *wechatClock) judges(now time.Time, window time.Duration) time.Duration {
	if !c.differs.Load() {
		return 0
	}
	if ahead, known := c.offset(now); known && ahead.Abs() >= window {
		return ahead
	}
	return 0
}

// ask has WeChat asked for its time, and returns when that is over, or clockAskWait. Pushes that wait at once share one request, and none is
// made within clockAskEvery of the last. Request returns at once, and calls done in the end.
func (c *wechatClock) ask(now time.Time, request func(done func())) {
	c.mu.Lock()
	if c.told == nil || now.Sub(c.asked) >= clockAskEvery {
		told := make(chan struct{})
		c.asked, c.told = now, told
		request(func() { close(told) })
	}
	told := c.told
	c.mu.Unlock()
	wait := time.NewTimer(clockAskWait)
	defer wait.Stop()
	select {
	case <-told:
	case <-wait.C:
	}
}

// learnClock has WeChat's clock known, if it answers in time. What it is asked is refused for want of a token: the Date counts of an answer that
// is WeChat's, as of all calls, so that nothing in between that answers in its place can say by whose clock pushes are judged. The request is
// no push's own: one whose sender has hung up is kept all the same.
func (a *App) learnClock() (known bool) {
	c := &a.health().clock
	if _, known = c.offset(time.Now()); known {
		return true
	}
	c.ask(time.Now(), func(done func()) {
		a.shared.current().background(clockAskTimeout, func(ctx context.Context) {
			defer done()
			_ = a.env.API.Get(ctx, probePath, nil, nil) // that it cannot be reached is in the status as of any call
		})
	})
	_, known = c.offset(time.Now())
	return known
}

// stillKnown reports whether a difference of clocks holds after so much time by the wall clock, and by one that nobody sets.
func stillKnown(wall, steady time.Duration) bool {
	return steady <= clockMemory && (wall-steady).Abs() < clockDoubt/2
}

// aheadText says how far WeChat's clock is ahead of this machine's, or behind it.
func aheadText(ahead time.Duration) tokens.Text {
	if ahead < 0 {
		return texts(fmt.Sprintf("%s behind this machine's", -ahead), fmt.Sprintf("比本机慢 %s", -ahead))
	}
	return texts(fmt.Sprintf("%s ahead of this machine's", ahead), fmt.Sprintf("比本机快 %s", ahead))
}

// clock looks at this machine's clock, unless pushes that are refused say what is wrong with it.
func (x *examination) clock() {
	if ahead, known := x.app.health().clock.offset(x.now); known && ahead.Abs() >= clockDoubt && !x.has(codeClock) {
		x.found(clockDiffers(ahead))
	}
}
