package caddymodule

import (
	"errors"
	"io/fs"
	"net/http"
	"slices"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

const (
	// lookEvery is how often a held push looks whether the answer is there: the node that has it says so, but that may get lost.
	lookEvery = 400 * time.Millisecond
	// wantEvery is how often a held push says again that it waits, in looks.
	wantEvery = 5
	// takeOverSlack is how long after WeChat's last push a message may still be taken over from a node that died. What comes
	// later is no retry of WeChat's.
	takeOverSlack = 5 * time.Second
	// forgottenAfter is the age from when on a message that its node does not know was answered, and then forgotten.
	forgottenAfter = answerLife / 2
	// maxMoves is how often a push may be sent from this node's table to another node and back.
	maxMoves = 8
)

var (
	errMoved     = errors.New("another node has it answered by now")
	errNodesDied = errors.New("the node that had it answered died, and so did the one that took it over")
)

// turn is what a push's place among those of its message depends on.
type turn struct {
	id         pushID
	at         time.Time     // when it came
	age        time.Duration // of the message by then, by WeChat's clock
	validUntil int64
	counted    bool   // among the pushes of all nodes
	mark       string // it is counted with; empty: not tried yet
	joined     bool   // it is in the metric, whichever node it goes on to
}

func (t *turn) life() time.Duration { return claimLife(t.validUntil) }

// passShared is pass where pushes of one message come to several nodes.
func (m *Message) passShared(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler, p *push, f *facts, t *turn) error {
	m.app.inForce()
	calls, claims := m.app.calls(), m.app.claims()
	for range maxMoves {
		a := calls.arriveAgain(t, m.pace())
		if a.call == nil {
			writePlain(w, success)
			return nil
		}
		defer calls.leaveNow(a.call)
		if !a.first {
			if err := claims.guard(p.guard); err != nil {
				return err
			}
			if a, moved := m.count(a, t); !moved {
				m.joined(t)
				if err := m.join(w, r, p, f, a); err != errMoved { //nolint:errorlint // our own, never wrapped
					return err
				}
			}
			continue
		}
		held, first, err := claims.claim(t.id, t.life(), p.guard)
		if err == errReplayed { //nolint:errorlint // our own, never wrapped
			calls.withdraw(a.call)
			if first {
				claims.unclaim(t.id)
			}
			return err
		}
		if err == nil && !first {
			held, err = m.countElsewhereOr(t, held)
		}
		switch {
		case err != nil: // for this node alone
			return m.lead(w, r, next, p, f, a)
		case first:
			calls.own(a.call, held.run)
			return m.lead(w, r, next, p, f, a)
		case held.mine(claims.node):
			return m.lead(w, r, next, p, f, calls.adopt(a.call, t, held, m.pace()))
		}
		calls.withdraw(a.call)
		held, err = m.follow(w, r, p, f, t, held)
		if err != errMoved { //nolint:errorlint // our own, never wrapped
			return err
		}
		a = calls.arriveAgain(t, m.pace())
		if a.call == nil {
			continue
		}
		defer calls.leaveNow(a.call)
		if a.first && held.mine(claims.node) {
			return m.lead(w, r, next, p, f, calls.adopt(a.call, t, held, m.pace()))
		}
		if a.first {
			calls.withdraw(a.call)
		}
	}
	return errHeld
}

// joined counts, once, a push that joined an earlier one, here or elsewhere.
func (m *Message) joined(t *turn) {
	if !t.joined {
		t.joined = true
		m.app.metrics().joined.Inc()
	}
}

// count has a push that came again to this node counted among those of all nodes. Moved: the message is another node's.
func (m *Message) count(a arrival, t *turn) (counted arrival, moved bool) {
	calls, claims := m.app.calls(), m.app.claims()
	if owned, _, _ := calls.sharing(a.call); !owned || t.counted {
		return a, false
	}
	held, err := m.countElsewhere(t)
	switch {
	case err != nil:
		return a, false
	case held.owner != claims.node:
		calls.withdraw(a.call)
		return a, true
	}
	return calls.amend(a, t, held, m.pace()), false
}

// countElsewhere counts a push among those of all nodes, once, and returns what its claim says then.
func (m *Message) countElsewhere(t *turn) (standing, error) {
	claims := m.app.claims()
	if t.counted {
		return claims.peek(t.id)
	}
	if t.mark == "" {
		t.mark = newMark()
	}
	held, err := claims.arrive(t.id, t.life(), t.mark)
	if err == nil {
		t.counted = true
	}
	return held, err
}

// countElsewhereOr is countElsewhere of a push whose message has a claim. When the store fails at it, and another node has the message, that
// node's answer is worth waiting for: the backend has it already.
func (m *Message) countElsewhereOr(t *turn, claimed standing) (standing, error) {
	held, err := m.countElsewhere(t)
	if err == nil || claimed.owner == m.app.claims().node || claimed.state == claimFree {
		return held, err
	}
	claimed.left = claimed.life - t.age
	claimed.count++
	return claimed, nil
}

// follow holds a push whose message another node has answered, and gives it that answer. It returns errMoved if this node is to
// have it answered after all.
func (m *Message) follow(w http.ResponseWriter, r *http.Request, p *push, f *facts, t *turn, held standing) (standing, error) {
	claims := m.app.claims()
	m.joined(t)
	signal, stop := claims.await(t.id)
	defer stop()
	last, by := t.ending(held, m.pace())
	timer := time.NewTimer(time.Until(by))
	defer timer.Stop()
	looks := time.NewTicker(lookEvery)
	defer looks.Stop()
	for n := 0; ; n++ {
		if n%wantEvery == 0 && held.state == claimRunning {
			claims.want(held.owner, t.id)
		}
		var done bool
		var err error
		if held, done, err = m.heed(w, r, p, t, held, last); done {
			return held, err
		}
		select {
		case <-signal:
		case <-looks.C:
		case <-r.Context().Done():
			return held, errHeld
		case <-timer.C:
			if !last {
				return held, errHeld
			}
			return held, m.endHere(w, r, p, f, t, held)
		}
		if now, err := claims.look(t.id, held, t.life()); err == nil {
			held = now
		}
	}
}

// ending is whether a push is the last one, and when it ends.
func (t *turn) ending(held standing, pace pace) (last bool, by time.Time) {
	first := time.Now().Add(-held.age())
	if pace.isLast(held.count, t.at.Sub(first), t.age) {
		return true, t.at.Add(pace.replyTimeout)
	}
	return false, t.at.Add(maxHold)
}

// heed does what a claim says about a push that is held here. Done: it is over with it, or errMoved.
func (m *Message) heed(w http.ResponseWriter, r *http.Request, p *push, t *turn, held standing, last bool) (now standing, done bool, err error) {
	claims := m.app.claims()
	switch held.state {
	case claimAnswered, claimDelivered:
		done, err = m.giveElsewhere(w, r, p, t, held)
		return held, done, err
	case claimLate:
		if last {
			m.writeSlow(w, p)
		}
		return held, last, nil
	case claimRunning:
		if held.owner == claims.node {
			return held, true, errMoved
		}
		if !claims.dead(held.owner) || held.run >= maxRuns {
			return held, false, nil
		}
		if held.age() > time.Duration(min(m.Pushes, wechatPushes))*wechatWait+takeOverSlack {
			writePlain(w, success)
			return held, true, nil
		}
	}
	before := held
	if held, err = claims.takeOver(t.id, before); err != nil {
		return before, false, nil //nolint:nilerr // the next look tells
	}
	if held.mine(claims.node) {
		if held.run > before.run {
			m.app.metrics().takenOver.Inc()
			m.app.logger.Warn("a message is taken over from another node, which seems to have died with it: the backend may get it a second time",
				zap.String("node", before.owner))
		}
		return held, true, errMoved
	}
	return held, false, nil
}

// giveElsewhere gives a push the answer that another node got.
func (m *Message) giveElsewhere(w http.ResponseWriter, r *http.Request, p *push, t *turn, held standing) (done bool, err error) {
	claims := m.app.claims()
	answer, err := claims.answer(t.id, held.run)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		writePlain(w, success)
		return true, nil
	case err != nil:
		m.app.logger.Error("another node's answer to a push cannot be read", zap.Error(err))
		return false, nil
	case r.Context().Err() != nil:
		return true, errHeld
	}
	if held.state != claimDelivered {
		now, err := claims.deliver(t.id)
		switch {
		case err != nil && !errors.Is(err, fs.ErrNotExist):
			return false, nil // if the answer went out here now, it could go out by the customer-service API as well
		case err == nil && now.state == claimLate:
			m.writeSlow(w, p)
			return true, nil
		}
	}
	m.writeAnswer(w, p, answer)
	return true, nil
}

// endHere answers the last push when its time is up.
func (m *Message) endHere(w http.ResponseWriter, r *http.Request, p *push, f *facts, t *turn, held standing) error {
	claims := m.app.claims()
	if held.state == claimRunning && held.run >= maxRuns && claims.dead(held.owner) {
		answer := passiveReply{outcome: outcomeLost}
		m.note(p, f, answer, errNodesDied)
		m.writeAnswer(w, p, answer)
		return nil
	}
	if now, err := claims.giveUp(t.id); err == nil && (now.state == claimAnswered || now.state == claimDelivered) {
		if done, err := m.giveElsewhere(w, r, p, t, now); done {
			return err
		}
	}
	m.writeSlow(w, p)
	return nil
}

// release lets another node have a message answered that was not begun here.
func (m *Message) release(c *call) {
	if owned, _, _ := m.app.calls().sharing(c); owned {
		m.app.claims().release(c.id)
	}
}

// tellLatecomers tells nodes that asked for an answer while it was being noted down.
func (m *Message) tellLatecomers(c *call) {
	claims := m.app.claims()
	for _, node := range m.app.calls().takeWanted(c) {
		claims.wantedBy(c.id, node)
	}
}

// bodyGuard is the text that came with a timestamp and nonce in plaintext mode, to be known on all nodes.
type bodyGuard struct {
	id, text pushID
	life     time.Duration
	shared   *shared
}

func (g *bodyGuard) claim() tokens.Claim {
	return tokens.Claim{Name: bodyName(g.id), Value: g.text[:], TTL: g.life}
}

// judge refuses another text than the one that came first.
func (g *bodyGuard) judge(c *tokens.Claim) error {
	if c.First || string(c.Held) == string(g.text[:]) {
		return nil
	}
	if len(c.Held) == len(g.text) {
		g.shared.bodies.Set(g.id, pushID(c.Held), g.life) // that one may come here
	}
	return errReplayed
}

// What follows is the table's part.

// arriveAgain is arrive of a push that may be counted already.
func (t *callTable) arriveAgain(u *turn, p pace) arrival {
	t.mu.Lock()
	defer t.mu.Unlock()
	pushes := 1
	if u.counted {
		pushes = 0
	}
	return t.enter(u.id, u.at, u.age, u.validUntil, p, pushes)
}

// own says that this node has a call answered for all nodes.
func (t *callTable) own(c *call, run int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c.owned, c.run = true, run
}

// unclaimedCall is a message that other nodes know nothing of.
type unclaimedCall struct {
	id         pushID
	age        time.Duration // since its first push
	arrivals   int
	validUntil int64
}

// unclaimed are the messages that this node has answered, or is having answered, for itself alone, and that may be pushed again.
func (t *callTable) unclaimed(now time.Time) (list []unclaimedCall) {
	t.mu.Lock()
	defer t.mu.Unlock()
	add := func(u unclaimedCall) {
		if u.age < catchUpAge && len(list) < maxCaughtUp {
			list = append(list, u)
		}
	}
	for _, c := range t.calls {
		if !c.owned && !c.abandoned {
			add(unclaimedCall{c.id, now.Sub(c.first), c.arrivals, c.validUntil})
		}
	}
	for k := range t.kept.all {
		if !k.is(keptOwned|keptAbandoned) && t.calls[k.id()] == nil {
			add(unclaimedCall{k.id(), now.Sub(t.kept.time(k, keptFirst)), k.arrivals(), k.validUntil()})
		}
	}
	return list
}

// claimed is own of a call that may be over by now.
func (t *callTable) claimed(id pushID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c := t.find(id); c != nil {
		c.owned, c.run = true, 1
		t.putBack(c, time.Now())
	}
}

// adopt is own of a call of which pushes came elsewhere before.
func (t *callTable) adopt(c *call, u *turn, held standing, p pace) arrival {
	t.own(c, held.run)
	return t.amend(arrival{call: c, first: true, at: u.at, by: u.at.Add(maxHold)}, u, held, p)
}

// amend brings into a push's arrival what is known of those on other nodes.
func (t *callTable) amend(a arrival, u *turn, held standing, p pace) arrival {
	t.mu.Lock()
	defer t.mu.Unlock()
	c := a.call
	if first := time.Now().Add(-held.age()); first.Before(c.first) {
		c.first = first
	}
	c.arrivals = max(c.arrivals, held.count)
	if !a.last && p.isLast(c.arrivals, a.at.Sub(c.first), u.age) {
		a.last, a.by = true, a.at.Add(p.replyTimeout)
		c.lastBy = a.by
	}
	return a
}

// withdraw takes a call out of the table that another node has answered: who waits for it is to ask there.
func (t *callTable) withdraw(c *call) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c.moved = true
	if t.calls[c.id] == c {
		delete(t.calls, c.id)
		t.kept.forget(c.id)
	}
	if c.done {
		return
	}
	c.done = true
	t.running--
	if c.ready != nil {
		close(c.ready)
	}
}

func (t *callTable) hasMoved(c *call) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return c.moved
}

// sharing is what other nodes have to do with a call: whether this one has it answered for all, and which of them it is to try.
// Late says that the last push here was answered without it.
func (t *callTable) sharing(c *call) (owned bool, run int, late bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return c.owned, c.run, c.late
}

// takeWanted returns the nodes that have asked for a call's answer since it was called last.
func (t *callTable) takeWanted(c *call) []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	wanted := c.wanted
	c.wanted = nil
	return wanted
}

// wantedCall is a message that another node asks for.
type wantedCall struct {
	running   bool // it will hear
	forgotten bool // nothing is known of it
	abandoned bool
	delivered bool
	late      bool
	run       int
	answer    passiveReply
}

// want notes that another node waits for a message's answer, or returns how far the message is.
func (t *callTable) want(id pushID, node string) wantedCall {
	t.mu.Lock()
	defer t.mu.Unlock()
	c := t.find(id)
	if c == nil {
		return wantedCall{forgotten: true}
	}
	defer func() { t.putBack(c, time.Now()) }()
	if !c.owned {
		c.owned, c.run = true, max(c.run, 1) // the claim was made after all, although nobody heard that
	}
	if !c.done {
		if !slices.Contains(c.wanted, node) {
			c.wanted = append(c.wanted, node)
		}
		return wantedCall{running: true}
	}
	return wantedCall{abandoned: c.abandoned, delivered: c.delivered, late: c.late, run: c.run, answer: c.answer}
}

// unbegun reports whether a message waits for a push that has it begun.
func (t *callTable) unbegun(id pushID) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c := t.calls[id]; c != nil {
		return c.abandoned
	}
	k := t.kept.find(id)
	return k == nil || k.is(keptAbandoned)
}

// deliveredElsewhere says that a push on another node got a message's answer.
func (t *callTable) deliveredElsewhere(id pushID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c := t.find(id); c != nil {
		t.delivers(c)
		t.putBack(c, time.Now())
	}
}
