package caddymodule

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	mathrand "math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// WeChat pushes a message again to whichever node the load balancer chooses. So each message has a claim in the store: which
// node has it answered, and how far that is. A claim costs the first push one exchange, shared with other pushes'; all else is
// for pushes that come again, and for answers that took so long that one may.

const (
	// claimWait is how long a push waits for the store. When it has not answered by then, no push waits for it until it does.
	claimWait = 500 * time.Millisecond
	// claimWork bounds what is written to the store about a push that does not wait for it.
	claimWork = 3 * time.Second
	// minClaimLife is for pushes whose timestamps soon leave the window: they come again all the same.
	minClaimLife = time.Minute
	// answerAfter is from when on a backend's answer is written to the store: WeChat may push again before it has it.
	answerAfter = 3 * time.Second
	// maxSharedAnswer is the largest answer that other nodes get; WeChat's own limits are far below.
	maxSharedAnswer = 1 << 20
	// maxRuns is how often a message may be begun: once, and once more if the node that had it died.
	maxRuns = 2

	beatEvery = time.Second        // a node shows that it lives, or tries to
	beatWait  = 9 * beatEvery / 10 // for so long, so that one beat is over before the next
	beatLife  = 3 * time.Second    // and counts as dead after that, if
	deadAfter = 1200 * time.Millisecond
	// for longer than a beat takes nothing is seen of it: a store that was emptied knows no node at first.
	peerEvery = 300 * time.Millisecond // how often one node is looked for
	maxPeers  = 1024
	// lateBeat is from when on a node whose beats do not arrive reckons with being taken for dead, well before it can be.
	lateBeat = beatLife - beatEvery
	// takeOverTime is how long a node that saw another one dead may take to have a message of it: a look, and a change.
	takeOverTime = 2 * claimWait

	probeFirst = 250 * time.Millisecond // before a store that failed is tried again, with chance; doubled
	probeMost  = 4 * time.Second        // while it fails again within
	probeCalm  = 10 * time.Second

	// What was answered while the store was away is claimed once it is back, since pushes of it may come to other nodes: those of
	// the last catchUpAge, caughtUpAtOnce in one exchange, and maxCaughtUp of them.
	catchUpAge     = 15 * time.Second
	caughtUpAtOnce = 256
	maxCaughtUp    = 20_000

	maxClaimJobs  = 16 // pieces of work that other nodes ask for, at once
	maxClaimTries = 8  // changes of one claim that others come in between
)

// How far a message is. An answer that nobody asked for within answerAfter leaves its claim running: whoever wants to know
// asks the node.
const (
	claimRunning   = 'r'
	claimFree      = 'f' // it was never begun: there was no room
	claimAnswered  = 'a'
	claimDelivered = 'd' // a push that came again got the answer on another node
	claimLate      = 'l' // the last push was answered without it, or the answer goes another way
)

// standing is what a claim says.
type standing struct {
	owner string
	life  time.Duration // the whole time that the claim was given
	count int           // of pushes that came, but for those that joined where nothing else had to be known
	run   int
	state byte
	mark  string // of the push that was counted last; empty: none was

	left time.Duration // of its life; not a part of it
}

// age is how long ago the first push came, whatever the clocks of the nodes say.
func (s *standing) age() time.Duration { return max(0, s.life-s.left) }

// mine reports whether it is a node's to have the message answered.
func (s *standing) mine(node string) bool { return s.owner == node && s.state == claimRunning }

func (s *standing) encode() []byte {
	b := append(make([]byte, 0, 32), s.owner...)
	b = strconv.AppendInt(append(b, ' '), s.life.Milliseconds(), 10)
	if s.count == 1 && s.run == 1 && s.state == claimRunning && s.mark == "" {
		return b // as most are, and stay
	}
	b = strconv.AppendInt(append(b, ' '), int64(s.count), 10)
	b = strconv.AppendInt(append(b, ' '), int64(s.run), 10)
	b = append(b, ' ', s.state)
	if s.mark != "" {
		b = append(append(b, ' '), s.mark...)
	}
	return b
}

// markLength is that of a push's mark, by which it knows that it was counted when it did not hear so: enough among the pushes of
// one message.
const markLength = 8

func newMark() string { return rand.Text()[:markLength] }

var errClaim = errors.New("a push's claim in the store is none")

func parseStanding(b []byte) (s standing, err error) {
	fields := strings.Fields(string(b))
	if n := len(fields); n != 2 && n != 5 && n != 6 {
		return s, errClaim
	}
	life, err := strconv.ParseInt(fields[1], 10, 64)
	if err != nil {
		return s, errClaim
	}
	s = standing{owner: fields[0], life: time.Duration(life) * time.Millisecond, count: 1, run: 1, state: claimRunning}
	if len(fields) == 2 {
		return s, nil
	}
	var badCount, badRun error
	s.count, badCount = strconv.Atoi(fields[2])
	s.run, badRun = strconv.Atoi(fields[3])
	if badCount != nil || badRun != nil || len(fields[4]) != 1 {
		return s, errClaim
	}
	s.state = fields[4][0]
	if len(fields) == 6 {
		if s.mark = fields[5]; len(s.mark) != markLength {
			return s, errClaim
		}
	}
	return s, nil
}

// name is the push's in the store.
func (id pushID) name() string {
	var b [1 + 22]byte
	b[0] = 'p'
	base64.RawURLEncoding.Encode(b[1:], id[:])
	return string(b[:])
}

func parsePushName(name string) (id pushID, ok bool) {
	if len(name) != 1+22 || name[0] != 'p' {
		return id, false
	}
	n, err := base64.RawURLEncoding.Decode(id[:], []byte(name[1:]))
	return id, err == nil && n == len(id)
}

// bodyName is the name in the store of a timestamp and nonce in plaintext mode.
func bodyName(id pushID) string { return "b" + id.name()[1:] }

// claimStore is what one configuration brings.
type claimStore struct {
	tokens.Claims
	sealer *crypto.Sealer
	log    *slog.Logger
}

// claims are the messages of all nodes. They survive reloads, like the table of calls, whose counterpart they are.
type claims struct {
	node     string // the table's: a message that another state has claimed is this one's as well
	calls    *callTable
	degraded prometheus.Gauge

	store  atomic.Pointer[claimStore] // nil: it keeps nothing for other nodes
	begun  atomic.Bool
	away   atomic.Bool  // the store failed; no push waits for it
	beatAt atomic.Int64 // when this node last showed that it lives, since start
	lateAt atomic.Int64 // when it last did so late, since start; 0: never
	start  time.Time
	kick   chan struct{} // holds one element when the store has failed, so that beat sees it at once

	jobs chan struct{}
	work sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	cancel  context.CancelFunc // of the loops, once begun
	peers   map[string]*peer
	waiting map[pushID][]chan struct{} // pushes held here whose messages other nodes have answered
}

// peer is another node.
type peer struct {
	lookedAt  time.Time
	deadSince time.Time // zero: it lives
}

func newClaims(calls *callTable, degraded prometheus.Gauge) *claims {
	return &claims{
		node: calls.node, calls: calls, start: time.Now(), kick: make(chan struct{}, 1), jobs: make(chan struct{}, maxClaimJobs),
		peers: make(map[string]*peer), waiting: make(map[pushID][]chan struct{}),
		degraded: degraded,
	}
}

// use takes the store of the configuration in force.
func (c *claims) use(env *tokens.Environment) {
	shared, ok := env.Store.(tokens.Claims)
	log := env.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.store.Load()
	if !ok {
		c.store.Store(nil)
		return
	}
	c.store.Store(&claimStore{shared, env.Sealer, log})
	if c.begun.Load() && (before == nil || before.Claims != shared) {
		c.begin(shared)
	}
}

// begin begins to show other nodes that this one lives, and to hear what they ask. The caller holds mu.
func (c *claims) begin(store tokens.Claims) {
	if c.closed {
		return
	}
	if c.cancel != nil {
		c.cancel()
	} else { // nobody has seen it yet, and so for deadAfter is enough
		c.beatAt.Store(int64(time.Since(c.start) - lateBeat + deadAfter))
	}
	ctx, cancel := context.WithCancel(context.Background())
	c.cancel = cancel
	c.begun.Store(true)
	c.work.Go(func() { store.Hear(ctx, c.node, c.heard) })
	c.work.Go(func() { defer cancel(); c.beat(ctx, store) })
}

// shared returns the store unless it is known to fail.
func (c *claims) shared() *claimStore {
	s := c.store.Load()
	if s == nil || c.away.Load() {
		return nil
	}
	if !c.begun.Load() {
		c.mu.Lock()
		if !c.begun.Load() {
			c.begin(s.Claims)
		}
		c.mu.Unlock()
	}
	return s
}

// close ends everything. While backends still work on messages other nodes see this one alive, for as long as the store
// is there.
func (c *claims) close() {
	c.mu.Lock()
	c.closed = true
	cancel := c.cancel
	c.mu.Unlock()
	switch {
	case cancel == nil:
	case c.calls.inFlight() == 0:
		cancel()
	default: // the calls may be those of another store, and never all be over
		time.AfterFunc(redisGrace, cancel)
	}
	if cancel == nil || c.calls.inFlight() == 0 {
		c.work.Wait()
	}
}

// beat shows that this node lives, and tries a store that failed, until ctx ends. It shows that as often while the store fails:
// others have this node's messages answered again when they do not see it, and only claims are worth backing off from.
func (c *claims) beat(ctx context.Context, store tokens.Claims) {
	ctx, cancel := context.WithCancel(ctx)
	life := &sign{claims: c, store: store}
	defer life.beat.Wait()
	defer cancel()
	var probeAt, backAt time.Time // probeAt is zero while the store is there
	if c.away.Load() {
		probeAt = time.Now() // this may be another store
	}
	beatDue, probe, wasLate := time.Now(), probeFirst, false
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		switch away := c.away.Load(); {
		case !away:
			probeAt = time.Time{}
		case probeAt.IsZero():
			if time.Since(backAt) < probeCalm {
				probe = min(2*probe, probeMost)
			} else {
				probe = probeFirst
			}
			probeAt = nextProbe(probe)
		}
		next := beatDue
		if !probeAt.IsZero() && probeAt.Before(next) {
			next = probeAt
		}
		timer.Reset(time.Until(next))
		select {
		case <-ctx.Done():
			return
		case <-c.kick:
			continue
		case <-timer.C:
		}
		c.mu.Lock()
		done := c.closed && c.calls.inFlight() == 0
		c.mu.Unlock()
		if done {
			return
		}
		beatDue = time.Now().Add(beatEvery)
		err := life.showLife(ctx)
		late := errors.Is(err, context.DeadlineExceeded)
		switch {
		case !c.away.Load():
			if err != nil && ctx.Err() == nil && (wasLate || !late) { // once, it may be this machine that was
				c.failed(err)
			}
		case !probeAt.IsZero() && !time.Now().Before(probeAt):
			if err == nil { // a store that is full takes beats, and no claims
				err = store.ClaimAll([]tokens.Claim{{Name: "n" + c.node, Value: []byte(c.node), TTL: beatLife}}, claimWait)
			}
			if err != nil {
				probeAt = nextProbe(probe)
				break
			}
			probeAt, backAt = time.Time{}, time.Now()
			c.back()
			c.catchUp(ctx, life)
		}
		wasLate = late
	}
}

// nextProbe is when a store that failed is tried again: not when all nodes do.
func nextProbe(probe time.Duration) time.Time {
	return time.Now().Add(probe/2 + mathrand.N(probe)) //nolint:gosec // no secret
}

// sign is how this node shows in a store that it lives, one beat after the other.
type sign struct {
	*claims
	store tokens.Claims
	beat  sync.WaitGroup // the one under way
}

// showLife is one beat. It is late when it has not arrived within claimWait, and goes on then for beatWait in all: a store that is slow is
// to see this node live, or others would have its messages answered again.
func (s *sign) showLife(ctx context.Context) error {
	s.beat.Wait()
	done := make(chan error, 1)
	s.beat.Go(func() {
		limited, cancel := context.WithTimeout(ctx, beatWait)
		defer cancel()
		began := time.Since(s.start)
		err := s.store.Beat(limited, s.node, beatLife)
		if err == nil {
			s.beaten(began)
		}
		done <- err
	})
	timer := time.NewTimer(claimWait)
	defer timer.Stop()
	select {
	case err := <-done:
		return err
	case <-timer.C:
		return context.DeadlineExceeded
	}
}

// beaten notes that a beat has arrived, which began then.
func (c *claims) beaten(began time.Duration) {
	if now := time.Since(c.start); now-time.Duration(c.beatAt.Load()) >= lateBeat {
		c.lateAt.Store(int64(now)) // before beatAt, or steady would miss it
	}
	c.beatAt.Store(int64(began))
}

// failed says that the store does not do what it should.
func (c *claims) failed(err error) {
	if errors.Is(err, context.Canceled) || !c.away.CompareAndSwap(false, true) {
		return
	}
	c.degraded.Set(1)
	c.mu.Lock()
	clear(c.peers) // who was not seen may have been there
	c.mu.Unlock()
	if s := c.store.Load(); s != nil {
		s.log.Error("the store does not answer for pushes: they are answered all the same, but one that comes again to another node is not known there",
			slog.String("error", err.Error()))
	}
	select {
	case c.kick <- struct{}{}:
	default:
	}
}

func (c *claims) back() {
	if !c.away.CompareAndSwap(true, false) {
		return
	}
	c.degraded.Set(0)
	if s := c.store.Load(); s != nil {
		s.log.Info("pushes that come again are known on all nodes again")
	}
}

// catchUp claims the messages that this node has taken on while the store was away. A store that is slow at that sees it live.
func (c *claims) catchUp(ctx context.Context, life *sign) {
	for batch := range slices.Chunk(c.calls.unclaimed(time.Now()), caughtUpAtOnce) {
		if time.Since(c.start)-time.Duration(c.beatAt.Load()) >= beatEvery {
			_ = life.showLife(ctx) // the claims show whether the store fails
		}
		store := c.shared()
		if store == nil {
			return
		}
		list := make([]tokens.Claim, len(batch))
		for i, u := range batch {
			life := claimLife(u.validUntil)
			own := standing{owner: c.node, life: life + u.age, count: u.arrivals, run: 1, state: claimRunning}
			list[i] = tokens.Claim{Name: u.id.name(), Value: own.encode(), TTL: life}
		}
		if err := store.ClaimAll(list, claimWait); err != nil {
			c.failed(err)
			return
		}
		for i := range list {
			held, err := parseStanding(list[i].Held)
			if list[i].First || err == nil && held.mine(c.node) { // else it was begun on another node too
				c.calls.claimed(batch[i].id)
			}
		}
	}
}

// steady reports whether this node has shown in time that it lives, also while it had a message for so long: nobody can have
// taken that over.
func (c *claims) steady(took time.Duration) bool {
	now := time.Since(c.start)
	if now-time.Duration(c.beatAt.Load()) >= lateBeat {
		return false
	}
	late := time.Duration(c.lateAt.Load())
	return late == 0 || now-took > late+takeOverTime
}

// errStoreAway: the store is known to fail, or keeps nothing for other nodes.
var errStoreAway = errors.New("the store does not answer")

// claim claims a message that is new to this node, or was never begun on it, with one exchange. The push's body is claimed with
// it where nothing else has signed that. It returns what is held, zero if this node is the first.
func (c *claims) claim(id pushID, life time.Duration, guard *bodyGuard) (held standing, first bool, err error) {
	store := c.shared()
	if store == nil {
		return held, false, errStoreAway
	}
	own := standing{owner: c.node, life: life, count: 1, run: 1, state: claimRunning}
	list := append(make([]tokens.Claim, 0, 2), tokens.Claim{Name: id.name(), Value: own.encode(), TTL: life})
	if guard != nil {
		list = append(list, guard.claim())
	}
	if err := store.ClaimAll(list, claimWait); err != nil {
		c.failed(err)
		return held, false, err
	}
	// A claim whose answer got lost is made once more, and meets itself.
	first = list[0].First || bytes.Equal(list[0].Held, list[0].Value)
	if guard != nil {
		if err = guard.judge(&list[1]); err != nil {
			return held, first, err
		}
	}
	if first {
		return own, true, nil
	}
	held, err = parseStanding(list[0].Held)
	return held, false, err
}

// guard claims a push's body alone.
func (c *claims) guard(g *bodyGuard) error {
	store := c.shared()
	if g == nil || store == nil {
		return nil
	}
	list := []tokens.Claim{g.claim()}
	if err := store.ClaimAll(list, claimWait); err != nil {
		c.failed(err)
		return nil // this node's own table has said yes
	}
	return g.judge(&list[0])
}

// change changes a claim: step makes the next standing of the one that there is, or says no. It returns the standing that the
// claim has in the end. A claim that is gone is fs.ErrNotExist.
func (c *claims) change(ctx context.Context, id pushID, longer time.Duration, step func(*standing) bool) (standing, error) {
	return c.changeIn(ctx, c.shared(), id, longer, step)
}

// changeIn is change in a store, nil for one that fails.
func (c *claims) changeIn(ctx context.Context, store *claimStore, id pushID, longer time.Duration, step func(*standing) bool) (standing, error) {
	if store == nil {
		return standing{}, errStoreAway
	}
	name := id.name()
	for range maxClaimTries {
		held, left, err := store.PeekClaim(ctx, name)
		if errors.Is(err, fs.ErrNotExist) {
			return standing{}, err
		}
		if err != nil {
			c.failed(err)
			return standing{}, err
		}
		now, err := parseStanding(held)
		if err != nil {
			return now, err
		}
		now.left = left
		next := now
		if !step(&next) {
			return now, nil
		}
		ttl := time.Duration(0)
		if longer > left {
			next.life += longer - left
			next.left, ttl = longer, longer
		}
		swapped, err := store.SwapClaim(ctx, name, held, next.encode(), ttl)
		if err != nil {
			c.failed(err)
			return now, err
		}
		if swapped {
			return next, nil
		}
	}
	return standing{}, errors.New("a push's claim changes all the time")
}

// arrive counts a push that came again, with a mark of its own: once, also if the store did so and its answer got lost, unless
// another push was counted before that is seen. A message that is gone or was never begun becomes this node's.
func (c *claims) arrive(id pushID, life time.Duration, mark string) (standing, error) {
	ctx, cancel := context.WithTimeout(context.Background(), claimWait)
	defer cancel()
	s, err := c.change(ctx, id, life, func(s *standing) bool {
		if s.mark == mark {
			return false
		}
		s.count++
		s.mark = mark
		if s.state == claimFree {
			s.owner, s.state = c.node, claimRunning
		}
		return true
	})
	if errors.Is(err, fs.ErrNotExist) { // it ended just now
		s, _, err = c.claim(id, life, nil)
		s.left = s.life
	}
	return s, err
}

// look is how a held push sees how far its message is. It claims what a store that was emptied does not know any more, one run
// later.
func (c *claims) look(id pushID, last standing, life time.Duration) (now standing, err error) {
	store := c.shared()
	if store == nil {
		return last, errStoreAway
	}
	own := standing{owner: c.node, life: life + last.age(), count: last.count, run: last.run + 1, state: claimRunning, left: life}
	list := []tokens.Claim{{Name: id.name(), Value: own.encode(), TTL: life}}
	if err := store.ClaimAll(list, claimWait); err != nil {
		c.failed(err)
		return last, err
	}
	if list[0].First {
		return own, nil
	}
	now, err = parseStanding(list[0].Held)
	now.left = now.life - last.age() // which lags behind, and says no more than that
	return now, err
}

// takeOver makes a message this node's, of one that is dead or gave it up. It returns what the claim says after it.
func (c *claims) takeOver(id pushID, from standing) (standing, error) {
	ctx, cancel := context.WithTimeout(context.Background(), claimWait)
	defer cancel()
	return c.change(ctx, id, 0, func(s *standing) bool {
		switch {
		case s.state == claimFree:
		case s.owner == from.owner && s.run == from.run && s.state == claimRunning && s.run < maxRuns:
			s.run++
		default:
			return false
		}
		s.owner, s.state = c.node, claimRunning
		return true
	})
}

// release gives up a message that was not begun.
func (c *claims) release(id pushID) {
	ctx, cancel := context.WithTimeout(context.Background(), claimWait)
	defer cancel()
	_, _ = c.change(ctx, id, 0, c.freeing(id)) // a push that is held elsewhere asks for it otherwise
}

// freeing is the change of a claim that release makes.
func (c *claims) freeing(id pushID) func(*standing) bool {
	return func(s *standing) bool {
		free := s.mine(c.node) && c.calls.unbegun(id)
		s.state = claimFree
		return free
	}
}

// unclaim gives up a message whose first push was none of WeChat's.
func (c *claims) unclaim(id pushID) {
	ctx, cancel := context.WithTimeout(context.Background(), claimWait)
	defer cancel()
	_, _ = c.change(ctx, id, 0, func(s *standing) bool { // it would be taken for a node's that does not know it
		first := s.mine(c.node) && s.count == 1
		s.state, s.count, s.life = claimFree, 0, s.left
		return first
	})
}

// peek returns what a claim says; one that is gone is fs.ErrNotExist.
func (c *claims) peek(id pushID) (standing, error) {
	ctx, cancel := context.WithTimeout(context.Background(), claimWait)
	defer cancel()
	return c.change(ctx, id, 0, func(*standing) bool { return false })
}

// giveUp says that the last push is answered without the backend's answer, unless that is there.
func (c *claims) giveUp(id pushID) (standing, error) {
	ctx, cancel := context.WithTimeout(context.Background(), claimWait)
	defer cancel()
	return c.change(ctx, id, 0, func(s *standing) bool {
		running := s.state == claimRunning
		s.state = claimLate
		return running
	})
}

// deliver says that a push on this node gets another node's answer.
func (c *claims) deliver(id pushID) (standing, error) {
	ctx, cancel := context.WithTimeout(context.Background(), claimWait)
	defer cancel()
	s, err := c.change(ctx, id, 0, func(s *standing) bool {
		answered := s.state == claimAnswered
		s.state = claimDelivered
		return answered
	})
	if err == nil {
		c.tell(s.owner, "d "+id.name())
	}
	return s, err
}

// forsake says that this node's answer to a message goes another way, unless a push got it elsewhere. With commit false it only
// looks. Taken means that the message is another node's by now.
func (c *claims) forsake(call *call, commit bool) (delivered, taken bool) {
	owned, run, _ := c.calls.sharing(call)
	if !owned {
		return false, false
	}
	ctx, cancel := context.WithTimeout(context.Background(), claimWork)
	defer cancel()
	s, err := c.change(ctx, call.id, 0, func(s *standing) bool {
		change := commit && s.owner == c.node && s.run == run && (s.state == claimRunning || s.state == claimAnswered)
		s.state = claimLate
		return change
	})
	if err != nil {
		return false, false // this node knows no better
	}
	return s.state == claimDelivered, s.owner != c.node || s.run != run
}

// finish makes an answer known to other nodes if they may need it. Late: the last push was answered without it, elsewhere.
// Taken: another node has the message by now, because this one seemed to be dead.
func (c *claims) finish(call *call, a passiveReply, took time.Duration) (late, taken bool) {
	owned, run, lateHere := c.calls.sharing(call)
	if !owned {
		return false, false
	}
	wanted := c.calls.takeWanted(call)
	if took < answerAfter && len(wanted) == 0 && c.steady(took) {
		return false, false
	}
	state := byte(claimAnswered)
	if lateHere {
		state = claimLate
	}
	s, err := c.publish(c.shared(), call.id, run, a, state, claimWait) // this node's own pushes wait meanwhile
	if err != nil {
		for _, node := range wanted { // they are told as soon as the store takes it
			c.calls.want(call.id, node)
		}
		return false, false
	}
	c.tellAll(wanted, "a "+call.id.name())
	return s.state == claimLate && !lateHere, s.owner != c.node || s.run != run
}

// publish writes an answer to a store, and that it is there, unless the message is another node's by now.
func (c *claims) publish(store *claimStore, id pushID, run int, a passiveReply, state byte, wait time.Duration) (standing, error) {
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	if state != claimLate && a.outcome != "" {
		if err := c.keepAnswer(ctx, store, id, run, a); err != nil {
			return standing{}, err
		}
	}
	return c.changeIn(ctx, store, id, 0, func(s *standing) bool {
		change := s.mine(c.node) && s.run == run
		s.state = state
		return change
	})
}

// answerName is the name of a run's answer in the store: one node's never replaces another's.
func answerName(id pushID, run int) string { return "a" + id.name()[1:] + "/" + strconv.Itoa(run) }

func (c *claims) keepAnswer(ctx context.Context, store *claimStore, id pushID, run int, a passiveReply) error {
	if store == nil {
		return errStoreAway
	}
	if len(a.body) > maxSharedAnswer {
		return nil // other nodes say success
	}
	name := answerName(id, run)
	data := append([]byte(a.outcome+" "), a.body...)
	if store.sealer != nil {
		var err error
		if data, err = store.sealer.Seal(name, data); err != nil {
			return err
		}
	}
	err := store.Put(ctx, name, data, answerLife)
	if err != nil {
		c.failed(err)
	}
	return err
}

// answer reads another node's answer; the error is fs.ErrNotExist if it is no longer kept.
func (c *claims) answer(id pushID, run int) (passiveReply, error) {
	store := c.shared()
	if store == nil {
		return passiveReply{}, errStoreAway
	}
	ctx, cancel := context.WithTimeout(context.Background(), claimWait)
	defer cancel()
	name := answerName(id, run)
	data, err := store.Peek(ctx, name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return passiveReply{}, err
	case err != nil:
		c.failed(err)
		return passiveReply{}, err
	case store.sealer != nil:
		if data, _, err = store.sealer.Open(name, data); err != nil {
			return passiveReply{}, fmt.Errorf("another node's answer to a push: %w", err)
		}
	case crypto.IsSealed(data):
		return passiveReply{}, fmt.Errorf("another node's answer to a push: %w", crypto.ErrSealKey)
	}
	outcome, body, _ := strings.Cut(string(data), " ")
	return passiveReply{outcome: outcome, body: []byte(body)}, nil
}

// dead reports whether a node is gone: nothing has been seen of it for a while.
func (c *claims) dead(node string) bool {
	store := c.shared()
	if store == nil || node == c.node {
		return false
	}
	c.mu.Lock()
	p := c.peers[node]
	if p == nil {
		if len(c.peers) >= maxPeers {
			clear(c.peers)
		}
		p = new(peer)
		c.peers[node] = p
	}
	now := time.Now()
	since := now.Sub(p.lookedAt)
	if since > deadAfter {
		p.deadSince = time.Time{} // what it did between then and now nobody has seen
	}
	// Who is said to be dead is looked for once more: it may be back, and have begun what is asked about.
	look := since >= peerEvery || !p.deadSince.IsZero() && now.Sub(p.deadSince) >= deadAfter
	if look {
		p.lookedAt = now
	}
	c.mu.Unlock()
	if !look {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), claimWait)
	defer cancel()
	alive, err := store.Lives(ctx, node)
	if err != nil {
		c.failed(err)
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if alive {
		p.deadSince = time.Time{}
		return false
	}
	if p.deadSince.IsZero() {
		p.deadSince = now
	}
	return now.Sub(p.deadSince) >= deadAfter
}

// await returns a channel that has an element when another node says that a message's answer is there.
func (c *claims) await(id pushID) (signal <-chan struct{}, stop func()) {
	ch := make(chan struct{}, 1)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.waiting[id] = append(c.waiting[id], ch)
	return ch, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		list := c.waiting[id]
		for i := range list {
			if list[i] == ch {
				list = append(list[:i], list[i+1:]...)
				break
			}
		}
		if c.waiting[id] = list; len(list) == 0 {
			delete(c.waiting, id)
		}
	}
}

// want tells the node that has a message that a push of it is held here.
func (c *claims) want(owner string, id pushID) { c.tell(owner, "w "+id.name()+" "+c.node) }

func (c *claims) tell(node, message string) { c.tellBy(c.shared(), node, message) }

func (c *claims) tellBy(store *claimStore, node, message string) {
	if store == nil || node == c.node {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), claimWait)
	defer cancel()
	if err := store.Tell(ctx, node, message); err != nil {
		c.failed(err)
	}
}

func (c *claims) tellAll(nodes []string, message string) {
	for _, node := range nodes {
		c.tell(node, message)
	}
}

// heard is told what other nodes say: that they hold a push (w), that an answer is there (a), that a push got this node's (d).
func (c *claims) heard(message string) {
	what, rest, _ := strings.Cut(message, " ")
	name, node, _ := strings.Cut(rest, " ")
	id, ok := parsePushName(name)
	if !ok {
		return
	}
	switch what {
	case "a":
		c.mu.Lock()
		for _, ch := range c.waiting[id] {
			select {
			case ch <- struct{}{}:
			default:
			}
		}
		c.mu.Unlock()
	case "d":
		c.calls.deliveredElsewhere(id)
	case "w":
		c.wantedBy(id, node)
	}
}

// wantedBy sees to it that a node hears of a message that it holds a push of.
func (c *claims) wantedBy(id pushID, node string) {
	if w := c.calls.want(id, node); !w.running {
		c.job(func() { c.serveWanted(id, node, w) })
	}
}

// job does what another node asked for, unless there is too much of it: it asks again.
func (c *claims) job(do func()) {
	select {
	case c.jobs <- struct{}{}:
	default:
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		<-c.jobs
		return
	}
	c.work.Go(func() {
		defer func() { <-c.jobs }()
		do()
	})
}

// serveWanted writes what another node wants to know of a message that is not running here. It does so also where the store is
// known to fail: nobody waits for it here, the other node heard and was heard by way of that store, and it sees this node live.
func (c *claims) serveWanted(id pushID, node string, w wantedCall) {
	store, state := c.store.Load(), byte(claimAnswered)
	switch {
	case w.abandoned:
		ctx, cancel := context.WithTimeout(context.Background(), claimWork)
		defer cancel()
		if _, err := c.changeIn(ctx, store, id, 0, c.freeing(id)); err == nil {
			c.tellBy(store, node, "a "+id.name())
		}
		return
	case w.late:
		state = claimLate
	case w.delivered:
		state = claimDelivered
	}
	var err error
	if w.forgotten {
		ctx, cancel := context.WithTimeout(context.Background(), claimWork)
		defer cancel()
		_, err = c.changeIn(ctx, store, id, 0, func(s *standing) bool {
			change := s.mine(c.node) && s.age() > forgottenAfter
			s.state = state
			return change
		})
	} else {
		_, err = c.publish(store, id, w.run, w.answer, state, claimWork)
	}
	if err == nil {
		c.tellBy(store, node, "a "+id.name())
	}
}

// claimLife is for how long a claim is needed: as long as the push could be replayed.
func claimLife(validUntil int64) time.Duration {
	return max(time.Until(time.Unix(validUntil, 0)), minClaimLife).Truncate(time.Millisecond)
}
