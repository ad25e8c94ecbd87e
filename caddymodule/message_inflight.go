package caddymodule

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"net/http"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// WeChat's pace, as the protocol has it, and how much of the past is remembered.
const (
	// wechatWait is how long WeChat waits for an answer before it drops the connection and pushes again.
	wechatWait = 5 * time.Second
	// wechatPushes is how often WeChat pushes a message that is not answered. A route may be told another number.
	wechatPushes = 3
	// maxHold is how long a push that is not to be answered is held: something between WeChat and us may keep a
	// connection that WeChat has dropped.
	maxHold = 6 * time.Second
	// lastSlack is by how much a push may be early and still be told by its time to be the last.
	lastSlack = time.Second
	// lastAfter is how long after its message was made, or first pushed, only WeChat's own last push can come, however many a
	// route is told to expect: left unanswered, it would be an error notice to the user.
	lastAfter = (wechatPushes-1)*wechatWait - lastSlack
	// lostMargin is how long before the last push must be answered the waiting for a backend ends.
	lostMargin = 250 * time.Millisecond

	answerLife     = time.Minute      // how long an answer is kept for a push that comes again
	sweptAtOnce    = 100              // of kept answers whose life is over
	retryLife      = 15 * time.Second // for how long WeChat may push a message again
	identityBucket = 16               // seconds; identities are forgotten by the bucket
)

// Bounds of pushLimits.
const (
	defaultMaxAnswers                     = 9 << 20            // those of eleven seconds at 2000 messages a second, in which WeChat pushes again
	leastMaxAnswers, mostMaxAnswers       = 1 << 20, 512 << 20 // see keptChunkSize
	defaultMaxIdentities                  = 1_000_000
	leastMaxIdentities, mostMaxIdentities = 10_000, 10_000_000 // when the clock is set back, a push waits for all to be looked at
)

// pushLimits are how much is remembered of answered pushes.
type pushLimits struct {
	answers    int // bytes of all kept answers together
	identities int // of answered pushes whose answers are gone
}

// What the limits may drop; also the metric's label.
const (
	droppedAnswer   = "answer"
	droppedIdentity = "identity"
)

// pushID tells one push from another: 128 bits of SHA-256.
type pushID [16]byte

// identity is by what a push is known when WeChat pushes it again: receive id, account, route and MsgId, or, for
// events and what else has none, the text itself. WeChat makes timestamp and nonce anew for each push.
func (p *push) identity(appid string, r *http.Request) pushID {
	b := p.scratch[:0]
	for _, part := range [...]string{p.codec.ReceiveID(), appid} {
		b = append(binary.AppendUvarint(b, uint64(len(part))), part...)
	}
	if appid == "" { // one URL for all accounts of a platform: only the text says whose it is
		b = append(binary.AppendUvarint(b, uint64(len(p.fields.ToUserName))), p.fields.ToUserName...)
	}
	b = appendRoute(b, r)
	// The MsgID that events have is another matter's, such as a template message's, and 0 is none.
	if id := p.fields.MsgID; len(id) > 0 && string(id) != "0" && !p.isEvent() {
		b = append(append(b, 'm'), id...)
	} else {
		sum := sha256.Sum256(p.opened.Message)
		b = append(append(b, 'h'), sum[:]...)
	}
	p.scratch = b
	return shortSum(b)
}

func shortSum(b []byte) pushID {
	sum := sha256.Sum256(b)
	return pushID(sum[:len(pushID{})])
}

// appendRoute appends the address that a push came to: WeChat pushes again to the same one, and the same message on another one
// is another application's. It is the path before handlers such as handle_path cut it. Spellings that Caddy's matchers take for
// one are one: nothing signs the address, and somebody could send a push again under each.
func appendRoute(b []byte, r *http.Request) []byte {
	p := r.URL.Path
	if original, ok := r.Context().Value(caddyhttp.OriginalRequestCtxKey).(http.Request); ok && original.URL != nil {
		p = original.URL.Path
	}
	host := r.Host
	if i := strings.LastIndexByte(host, ':'); i > strings.LastIndexByte(host, ']') {
		host = host[:i]
	}
	host, p = strings.ToLower(strings.TrimSuffix(host, ".")), strings.ToLower(path.Clean(p)) // neither is copied as a rule
	b = append(binary.AppendUvarint(b, uint64(len(host))), host...)
	return append(binary.AppendUvarint(b, uint64(len(p))), p...)
}

// passiveReply is what becomes of a push (被动回复).
type passiveReply struct {
	outcome string
	body    []byte // of outcomePlain and outcomeSealed; a copy
}

// call is one message on its way to a backend and back, however often WeChat pushes it. Its fields belong to the table
// that it is in.
type call struct {
	id         pushID
	holders    int       // pushes of it that are not over
	kept       bool      // it was made of one that is kept, and is to be written back
	first      time.Time // when it first came
	arrivals   int
	lastBy     time.Time     // when the last push must be answered; zero until it came
	validUntil int64         // Unix seconds: the last of its pushes could be replayed until then
	ready      chan struct{} // closed once done; nil until somebody waits
	claimed    chan struct{} // closed once an arrival got the answer; nil unless the first push's handler waits for that
	delivered  bool          // an arrival got the answer
	done       bool
	late       bool     // the last push was answered without it
	abandoned  bool     // it was never begun, and is kept for the count of its arrivals
	moved      bool     // another node has it answered; who waited here is to ask there
	owned      bool     // this node has it answered, for all nodes
	run        int      // of the nodes that were to have it answered, this one is the first or the second
	wanted     []string // nodes that wait for the answer
	answer     passiveReply
	answeredAt time.Time
}

// arrival is one push of a call.
type arrival struct {
	call  *call // nil: it was answered, and the answer is no longer kept
	first bool  // this handler has the message answered; others wait
	last  bool  // WeChat will not push it again
	by    time.Time
	at    time.Time
}

// pace is how a route treats WeChat's pushes.
type pace struct {
	pushes       int           // how often WeChat pushes a message
	replyTimeout time.Duration // from the last push to its answer
}

// isLast reports whether WeChat will not push a message again: so many pushes came, the first of them and the message's making so
// long ago.
func (p pace) isLast(arrivals int, first, made time.Duration) bool {
	return arrivals >= p.pushes || first >= lastAfter || made >= lastAfter
}

// callTable joins the pushes of one message. It is exact: nothing is forgotten early, but for the two limits, and what those
// drop is counted. It lives in memory and survives reloads, not the process.
type callTable struct {
	node     string            // this process, among those that share a store, whichever it is
	dropped  func(what string) // told of what the limits drop; called under the lock
	promises atomic.Int64      // see promised

	mu      sync.Mutex
	calls   map[pushID]*call // running, or held by a push's handler
	running int
	limits  pushLimits
	kept    keptCalls  // the others that are answered, or abandoned
	known   identities // of answered pushes whose answers are gone
}

func newCallTable(dropped func(what string)) *callTable {
	return &callTable{
		node: rand.Text()[:10], dropped: dropped, calls: map[pushID]*call{}, limits: pushLimits{defaultMaxAnswers, defaultMaxIdentities},
		kept: newKeptCalls(), known: identities{ends: map[int64]int{}},
	}
}

// limit has other limits hold from now on. Answers for which there is no room any more go first, some at a time, so that no push waits
// for all of them.
func (t *callTable) limit(l pushLimits) {
	for done := false; !done; {
		done = t.shrink(l, time.Now())
	}
}

// shrink is a part of limit, and reports whether it was the last one.
func (t *callTable) shrink(l pushLimits, now time.Time) (done bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for range sweptAtOnce {
		k := t.kept.oldest()
		if k == nil || t.kept.bytes <= l.answers {
			t.limits = l
			return true
		}
		t.letGo(k, true, now)
	}
	return false
}

// arrive notes a push that came at a time, age after its message was made by WeChat's own clock. When the push is over, leave or leaveNow is
// to be called with its call.
func (t *callTable) arrive(id pushID, at time.Time, age time.Duration, validUntil int64, p pace) arrival {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.enter(id, at, age, validUntil, p, 1)
}

// enter is arrive of a push that counts for so many. The caller holds mu.
func (t *callTable) enter(id pushID, at time.Time, age time.Duration, validUntil int64, p pace, pushes int) arrival {
	t.sweep(at)
	before := t.find(id)
	if before == nil && t.known.has(&id) {
		return arrival{at: at}
	}
	c, first := before, before == nil || before.abandoned
	if first {
		c = &call{id: id, first: at}
		if before != nil {
			c.first, c.arrivals, c.validUntil = before.first, before.arrivals, before.validUntil
		}
		t.calls[id] = c
		t.running++
	}
	c.holders++
	c.arrivals += pushes
	c.validUntil = max(c.validUntil, validUntil)
	a := arrival{call: c, first: first, at: at, by: at.Add(maxHold)}
	if p.isLast(c.arrivals, at.Sub(c.first), age) {
		a.last, a.by = true, at.Add(p.replyTimeout)
		c.lastBy = a.by
	}
	return a
}

// wouldBeLast reports whether a push is the last of its message, which it is not noted for.
func (t *callTable) wouldBeLast(id pushID, at time.Time, age time.Duration, p pace) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	c := t.find(id)
	if c == nil {
		return p.isLast(1, 0, age)
	}
	defer t.putBack(c, at)
	return p.isLast(c.arrivals+1, at.Sub(c.first), age)
}

// find returns the call of a push, which it has from now on among those that are held, or nil. The caller holds mu.
func (t *callTable) find(id pushID) *call {
	if c := t.calls[id]; c != nil {
		return c
	}
	k := t.kept.find(id)
	if k == nil {
		return nil
	}
	c := t.kept.call(k)
	t.calls[id] = c
	return c
}

// hold says that a call has one more who is to leave it.
func (t *callTable) hold(c *call) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c.holders++
}

// leave says that a push is over. Of a call that is done and that nobody holds any more only what is needed is kept.
func (t *callTable) leave(c *call, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c.holders--
	t.putBack(c, now)
}

func (t *callTable) leaveNow(c *call) { t.leave(c, time.Now()) }

// putBack keeps a call in brief unless it is running or held. The caller holds mu.
func (t *callTable) putBack(c *call, now time.Time) {
	if c.holders > 0 || !c.done || t.calls[c.id] != c {
		return
	}
	delete(t.calls, c.id)
	if !t.kept.keep(c) && !c.abandoned { // its time was over meanwhile
		t.remember(c.id, c.validUntil, now)
	}
	t.sweep(now)
}

// wait returns what is closed once the call is done, and whether it is already.
func (t *callTable) wait(c *call) (ready <-chan struct{}, done bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c.ready == nil {
		c.ready = make(chan struct{})
		if c.done {
			close(c.ready)
		}
	}
	return c.ready, c.done
}

// giveUp says that the last push is being answered without the backend's answer, unless that has come meanwhile.
func (t *callTable) giveUp(c *call) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c.done {
		return false
	}
	c.late = true
	return true
}

// outcome returns a done call's answer, and whether the last push was answered without it.
func (t *callTable) outcome(c *call) (a passiveReply, late, abandoned bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return c.answer, c.late, c.abandoned
}

// worthTrying is until when a backend that was not reached may still be tried.
func (t *callTable) worthTrying(c *call, p pace) time.Time {
	t.mu.Lock()
	defer t.mu.Unlock()
	by := c.lastBy
	if by.IsZero() {
		by = c.first.Add(time.Duration(min(p.pushes, wechatPushes)-1)*wechatWait + p.replyTimeout)
	}
	return by.Add(-lostMargin)
}

// finish keeps a call's answer, wakes those who wait, and reports whether the last push was answered without it.
func (t *callTable) finish(c *call, a passiveReply, at time.Time) (late bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c.done {
		return c.late // it was withdrawn meanwhile
	}
	c.done, c.answer, c.answeredAt = true, a, at
	t.running--
	if c.ready != nil {
		close(c.ready)
	}
	t.sweep(at)
	return c.late
}

// abandon ends a call that was never begun. The next push of the message begins another one, which goes on counting: WeChat
// may push again at once what was closed.
func (t *callTable) abandon(c *call, at time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c.done {
		return // it was withdrawn meanwhile
	}
	c.done, c.abandoned, c.answeredAt = true, true, at
	t.running--
	if c.ready != nil {
		close(c.ready)
	}
}

// deliver says that an arrival gets the call's answer, and reports whether that is late.
func (t *callTable) deliver(c *call) (late bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.delivers(c)
}

// delivers is deliver. The caller holds mu.
func (*callTable) delivers(c *call) (late bool) {
	if c.delivered || c.late {
		return c.late
	}
	c.delivered = true
	if c.claimed != nil {
		close(c.claimed)
	}
	return false
}

// forsake says that the call's answer is delivered otherwise from now on, unless an arrival got it.
func (t *callTable) forsake(c *call) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c.delivered {
		return false
	}
	c.late = true
	return true
}

// delivery returns what is closed once an arrival got the answer, nil when one has.
func (t *callTable) delivery(c *call) <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c.delivered {
		return nil
	}
	if c.claimed == nil {
		c.claimed = make(chan struct{})
	}
	return c.claimed
}

// promised counts an answer that goes out by the customer-service API if no push gets it, until kept is called.
func (t *callTable) promised() (kept func()) {
	t.promises.Add(1)
	return func() { t.promises.Add(-1) }
}

// inFlight is how many messages wait for a backend's answer.
func (t *callTable) inFlight() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.running
}

// sweep lets go of what is over: answers whose time it is not all at once, as the push that comes after a quiet minute would have to
// wait for. The caller holds mu.
func (t *callTable) sweep(now time.Time) {
	t.known.forgetBefore(now.Unix() / identityBucket)
	over := 0
	for k := t.kept.oldest(); k != nil; k = t.kept.oldest() {
		full, age := t.kept.bytes > t.limits.answers, now.Sub(t.kept.time(k, keptAnsweredAt))
		if !full && age < answerLife {
			return
		}
		if !full {
			if over == sweptAtOnce {
				return
			}
			over++
		}
		t.letGo(k, full, now)
	}
}

// letGo removes the oldest answer, because there is no room for it or because its life is over. The caller holds mu.
func (t *callTable) letGo(k keptCall, full bool, now time.Time) {
	if !k.is(keptAbandoned) && t.kept.has(k) { // else it was withdrawn, and is another node's
		if full && now.Sub(t.kept.time(k, keptAnsweredAt)) < retryLife {
			t.dropped(droppedAnswer)
		}
		t.remember(k.id(), k.validUntil(), now)
	}
	t.kept.removeOldest()
}

// remember keeps the identity of a call whose answer goes. The caller holds mu.
func (t *callTable) remember(id pushID, validUntil int64, now time.Time) {
	if validUntil < now.Unix() {
		return
	}
	if t.known.count >= t.limits.identities {
		for range t.known.forgetOldest(t.limits.identities / 64) {
			t.dropped(droppedIdentity)
		}
	}
	if !t.known.add(&id, validUntil/identityBucket+1) {
		t.dropped(droppedIdentity)
	}
}
