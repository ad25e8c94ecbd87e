package tokens

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"
	"time"
)

// Limits of events that are to be handed on, where the environment says no others.
const (
	// DefaultMaxForwards is how many are kept: nobody takes them, and WeChat makes more.
	DefaultMaxForwards = 1000
	// DefaultForwardLife is for how long one is kept that nobody takes: an outage over a long holiday.
	DefaultForwardLife = 7 * 24 * time.Hour
)

const (
	// forwardTimeout bounds one attempt: the lock, the record, and a minute, which is the most that whoever hands it on takes.
	forwardTimeout = time.Minute + writeLockWait + 2*storeTimeout
	// restLeast is how soon an event is tried again of which nobody knows whether somebody has it. Later it rests as long as it is old: for a
	// backend that never answers, a few attempts for each order of magnitude.
	restLeast = 10 * time.Second
	// forgetAfter is when an event that was not accepted is deleted, in case that the store has it all the same: before another node, which has
	// heard of it, looks for what was left behind.
	forgetAfter = takeOverAfter / 2
	// clockAwaited is for how long WeChat's clock is awaited before an event is given up by the clock here alone. One that is ahead takes all
	// tokens for ended, so that the first is renewed at once, and WeChat's answer has the time.
	clockAwaited = 10 * time.Minute
	// adoptLockWait bounds the wait for a node that is just handing on what is to go to another store: the reload waits.
	adoptLockWait = time.Second
)

// Forward is the duty to hand an event on to the site's own handlers, which WeChat has had its `success` for.
type Forward struct {
	Platform string
	AppID    string // may be empty
	InfoType string
	Created  time.Time       // by WeChat's clock; zero: it is not known
	Event    json.RawMessage // what whoever hands it on needs; no codes and no tickets
}

// ErrNotForwarded: nobody can have got the event, or it is not known whether somebody has. It is handed on later.
var ErrNotForwarded = errors.New("the event was not handed on")

// ErrUnanswered is the ErrNotForwarded of an event that somebody may have, and be at work on: it is given a rest.
var ErrUnanswered = fmt.Errorf("%w: no answer to it came", ErrNotForwarded)

// ErrNoPlace is the ErrNotForwarded of an event that nobody has tried to hand on: as many as may be are under way.
var ErrNoPlace = fmt.Errorf("%w: no place is free", ErrNotForwarded)

// ErrForwardsFull: as many events are waiting to be handed on as are kept.
var ErrForwardsFull = errors.New("no more events are kept that wait to be handed on")

// ForwardEnd is what became of an event that was to be handed on.
type ForwardEnd string

// How it can end.
const (
	ForwardAnswered ForwardEnd = "answered" // by whoever it was handed on to
	ForwardFailed   ForwardEnd = "failed"   // so was this, with a failure
	ForwardGivenUp  ForwardEnd = "given_up" // after ForwardLife
	ForwardFull     ForwardEnd = "full"     // not kept: see ErrForwardsFull
	ForwardUnfit    ForwardEnd = "unfit"    // not kept, as it must not leave the gateway; or its record is damaged
	ForwardLeft     ForwardEnd = "left"     // in a store that is used no more
)

// ForwardEnds are all of them.
func ForwardEnds() []ForwardEnd {
	return []ForwardEnd{ForwardAnswered, ForwardFailed, ForwardGivenUp, ForwardFull, ForwardUnfit, ForwardLeft}
}

// errGivenUp: the event is older than ForwardLife.
var errGivenUp = errors.New("given up")

// forwardEnd is how an event has ended, of which nothing more is to be done.
func forwardEnd(err error) ForwardEnd {
	switch {
	case err == nil:
		return ForwardAnswered
	case errors.Is(err, errGivenUp):
		return ForwardGivenUp
	}
	return ForwardFailed
}

type forwardWire struct {
	Platform  string          `json:"platform"`
	AppID     string          `json:"appid,omitempty"`
	InfoType  string          `json:"info_type,omitempty"`
	Event     json.RawMessage `json:"event"`
	Created   int64           `json:"created,omitempty"`    // Unix seconds, by WeChat's clock; 0: it is not known
	NotBefore int64           `json:"not_before,omitempty"` // Unix milliseconds; 0: it rests no more
}

func newForwardWire(f Forward) forwardWire {
	w := forwardWire{Platform: f.Platform, AppID: f.AppID, InfoType: f.InfoType, Event: f.Event}
	if !f.Created.IsZero() {
		w.Created = f.Created.Unix()
	}
	return w
}

func (w *forwardWire) forward() Forward {
	f := Forward{Platform: w.Platform, AppID: w.AppID, InfoType: w.InfoType, Event: w.Event}
	if w.Created != 0 {
		f.Created = time.Unix(w.Created, 0)
	}
	return f
}

// forwardTable are the events that this node has to hand on.
type forwardTable struct {
	mu   sync.Mutex
	byID map[string]forwardState
	// forgetting are the deletions that are still to be done: of what was handed on, and of what the store would not take and may have all the
	// same. Nothing else is done with these, and they are nobody's who waits.
	forgetting map[string]func(context.Context) error
	heir       *Manager  // has what waits here from now on; nil: nobody has
	said       time.Time // when the log last heard that one is tried again
	shut       time.Time // when it last heard that one cannot be read
	unwanted   unwantedForwards
	doubted    time.Time // since when one would be given up, and WeChat's clock is not known
	next       string    // with which the next run begins: the last one had no time for it; empty: with the first
}

// forwardState is what this node knows of an event.
type forwardState struct {
	made     time.Time // by the clock here, as far as is known; zero: as its name says
	underWay bool      // it is being handed on, or is about to be
	first    bool      // for the first time, by whoever kept it
	rest     time.Time // not before is it tried again
}

// add notes an event that is about to be handed on, unless there are too many. A store that cannot do away with what is done is not to be
// given more: it is no backlog, and WeChat pushes again.
func (t *forwardTable) add(id string, most int) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case len(t.byID) >= most:
		return fmt.Errorf("%w: there are %d", ErrForwardsFull, len(t.byID))
	case len(t.forgetting) >= max(most, DefaultMaxForwards): // a store that failed once is none of those
		return fmt.Errorf("%w: what it has of %d events that were handed on, or not taken, is still to be deleted", ErrStore, len(t.forgetting))
	}
	t.set(id, forwardState{underWay: true, first: true})
	return nil
}

// set is for who has the lock.
func (t *forwardTable) set(id string, s forwardState) {
	if t.byID == nil {
		t.byID = make(map[string]forwardState)
	}
	t.byID[id] = s
}

// take notes that an event that waits is being handed on, unless it is already, or done with.
func (t *forwardTable) take(id string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.byID[id]
	if s.underWay || t.forgetting[id] != nil {
		return false
	}
	s.underWay = true
	t.set(id, s)
	return true
}

// wait notes that an event waits again, and says who has it from now on; nil: this node.
func (t *forwardTable) wait(id string) *Manager {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.byID[id]
	s.underWay, s.first = false, false
	t.set(id, s)
	return t.heir
}

// rest notes until when an event is left alone.
func (t *forwardTable) rest(id string, until time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.byID[id]
	s.rest = until
	t.set(id, s)
}

// madeAt is when an event was made, by the clock here.
func (t *forwardTable) madeAt(id string) time.Time {
	t.mu.Lock()
	defer t.mu.Unlock()
	if made := t.byID[id].made; !made.IsZero() {
		return made
	}
	return forwardTime(id)
}

// dated notes when an event was made, by the clock here.
func (t *forwardTable) dated(id string, made time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.byID[id]
	s.made = made
	t.set(id, s)
}

// doubtful reports whether it is for less than clockAwaited that WeChat's clock is awaited, as it has been since the last call with known.
func (t *forwardTable) doubtful(known bool) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	switch {
	case known:
		t.doubted = time.Time{}
		return false
	case t.doubted.IsZero():
		t.doubted = now
	}
	return now.Sub(t.doubted) < clockAwaited
}

// rests is for how long an event is still left alone; 0: it is not.
func (t *forwardTable) rests(id string) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	return max(time.Until(t.byID[id].rest), 0)
}

// forget notes how what is done with is deleted, or says who does it from now on.
func (t *forwardTable) forget(id string, how func(context.Context) error) *Manager {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.byID, id)
	if t.heir != nil {
		return t.heir
	}
	if t.forgetting == nil {
		t.forgetting = make(map[string]func(context.Context) error)
	}
	t.forgetting[id] = how
	return nil
}

func (t *forwardTable) done(id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.byID, id)
	delete(t.forgetting, id)
}

// stored notes that ids, which are in order, are all that there are: others that wait another node has handed on.
func (t *forwardTable) stored(ids []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, id := range ids {
		if _, known := t.byID[id]; !known && t.forgetting[id] == nil {
			t.set(id, forwardState{})
		}
	}
	for id, s := range t.byID {
		if _, there := slices.BinarySearch(ids, id); !s.underWay && !there {
			delete(t.byID, id)
		}
	}
}

// waiting counts those that are just tried again too: an alert would end with each attempt.
func (t *forwardTable) waiting() (n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range t.byID {
		if !s.first {
			n++
		}
	}
	return n
}

// inherit notes who takes the place of this node, and gives away what is still to be deleted.
func (t *forwardTable) inherit(heir *Manager) (forgetting map[string]func(context.Context) error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.heir = heir
	forgetting, t.forgetting = t.forgetting, nil
	return forgetting
}

func (t *forwardTable) inheritor() *Manager {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.heir
}

// turn orders ids for a run: who is not reached takes so long to tell that others are not to wait for it time and again.
func (t *forwardTable) turn(ids []string) []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	i, _ := slices.BinarySearch(ids, t.next)
	t.next = ""
	return slices.Concat(ids[i:], ids[:i])
}

func (t *forwardTable) interrupted(next string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.next = next
}

// mayLog reports whether the log is to hear of one of the two once more.
func (t *forwardTable) mayLog(last *time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if !last.IsZero() && now.Sub(*last) < troubleLogEvery {
		return false
	}
	*last = now
	return true
}

// newForwardID names an event. Names are in the order in which they were made.
func newForwardID(now time.Time) string {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:], uint64(now.UnixNano())) //nolint:gosec // it is after 1970
	_, _ = rand.Read(b[8:])                                  // never fails
	return hex.EncodeToString(b[:])
}

// forwardTime is when an id was made.
func forwardTime(id string) time.Time {
	b, err := hex.DecodeString(id)
	if err != nil || len(b) < 8 {
		return time.Time{}
	}
	return time.Unix(0, int64(binary.BigEndian.Uint64(b))) //nolint:gosec // it was one
}

// KeepForward takes the duty to hand an event on. It is durable when nil is returned, and whoever has the id then owes a HandOn or a
// HandOnLater.
func (m *Manager) KeepForward(ctx context.Context, f Forward) (id string, err error) {
	env, err := m.current()
	if err != nil {
		return "", err
	}
	id = newForwardID(time.Now())
	if err := m.forwards.add(id, env.MaxForwards); err != nil {
		if errors.Is(err, ErrForwardsFull) {
			env.Observer.ForwardEnded(ForwardFull, 1)
		}
		return "", err
	}
	if err := m.storeRecord(ctx, env, forwardName(id), newForwardWire(f)); err != nil {
		// Writing it may take effect yet, and WeChat pushes again: nobody is to get it twice, the second time after days.
		m.forgetLater(id, forgetAfter, m.deleteForward(env, id))
		return "", err
	}
	return id, nil
}

// ForwardsWaiting is how many events wait to be handed on, as far as this node knows: nobody could be reached with them, or nobody answered.
func (m *Manager) ForwardsWaiting() int {
	if env := m.env.Load(); env == nil || env.Forward == nil {
		return 0
	}
	return m.forwards.waiting()
}

// HandOnLater leaves an event to a later attempt.
func (m *Manager) HandOnLater(id string) {
	if heir := m.forwards.wait(id); heir != nil {
		for next := heir.forwards.inheritor(); next != nil; next = heir.forwards.inheritor() {
			heir = next // the jobs of the one before have ended
		}
		heir.queue.addIn(laneForwardRecords, "taken forward "+id, 0, func(ctx context.Context) error {
			var stores hiccup
			if err := heir.takeForward(ctx, m, id, &stores); err != nil {
				heir.forwardsLeft(1, err)
			}
			return nil
		})
		return
	}
	m.lookForForwards("forwards later", takeOverAfter)
}

// HandOn hands on an event that is kept: forward does it. It is done with unless the error wraps ErrNotForwarded: then it is tried again in
// the background, by another process if need be. Other nodes keep out of the way meanwhile.
func (m *Manager) HandOn(ctx context.Context, id string, forward func(context.Context) error) error {
	env := m.env.Load() // what was kept under a store goes on when another one has taken its place
	unlock, err := m.lockStore(ctx, env, forwardName(id), writeLockWait)
	switch {
	case err == nil:
		defer unlock()
	case errors.Is(err, ErrLockHeld):
		m.HandOnLater(id)
		return fmt.Errorf("%w: another node is about to: %w", ErrNotForwarded, err)
	}
	// Without the lock another node may do the same: twice is better than never.
	err = m.handOn(ctx, env, id, forward)
	if errors.Is(err, ErrNotForwarded) {
		m.lookForForwards("forwards", 0)
	}
	return err
}

// handOn is HandOn under the lock.
func (m *Manager) handOn(ctx context.Context, env *Environment, id string, forward func(context.Context) error) error {
	err := forward(ctx)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*storeTimeout)
	defer cancel()
	if errors.Is(err, ErrUnanswered) {
		m.restForward(ctx, env, id)
	}
	if errors.Is(err, ErrNotForwarded) {
		if heir := m.forwards.wait(id); heir != nil {
			if left := heir.adoptForward(ctx, m, env, id); left != nil {
				heir.forwardsLeft(1, left)
			}
		}
		return err
	}
	env.Observer.ForwardEnded(forwardEnd(err), 1)
	forget := m.deleteForward(env, id)
	if forget(ctx) == nil {
		m.forwards.done(id)
	} else {
		m.forgetLater(id, 0, forget)
	}
	return err
}

// restForward has an event left alone for as long as it is old by now, on all nodes. Where the store does not take that, the others try it
// sooner.
func (m *Manager) restForward(ctx context.Context, env *Environment, id string) {
	now, made := time.Now(), m.forwards.madeAt(id)
	until := now.Add(max(now.Sub(made), restLeast))
	if end := made.Add(env.ForwardLife); until.After(end) {
		until = end
	}
	m.forwards.rest(id, until)
	var wire forwardWire
	if m.loadRecord(ctx, env, forwardName(id), &wire) == nil {
		wire.NotBefore = until.UnixMilli()
		_ = m.storeRecord(ctx, env, forwardName(id), wire)
	}
}

var errClockUnknown = errors.New("an event would be too old by the clock here, and it is not known yet how far that is off")

// forwardMade is when an event was made, by the clock here, and whether it may be given up by that. Its name has the time of the node that kept
// it, whose clock may be off, as may ours: an event is as young as either that or WeChat's clock says.
func (m *Manager) forwardMade(env *Environment, id string, created int64) (made time.Time, sure bool) {
	made = forwardTime(id)
	if env.WeChatAhead == nil || created == 0 {
		return made, true
	}
	ahead, known := env.WeChatAhead()
	if by := time.Unix(created, 0).Add(-ahead); known && (by.After(made) || made.After(time.Now())) {
		made = by
	}
	tooOld := time.Since(made) >= env.ForwardLife
	doubtful := (known || tooOld) && m.forwards.doubtful(known) // one that is known ends all doubts
	return made, !tooOld || !doubtful
}

func (m *Manager) deleteForward(env *Environment, id string) func(context.Context) error {
	return func(ctx context.Context) error { return m.deleteRecord(ctx, env, forwardName(id)) }
}

// forgetLater has what a store holds of an event deleted in the background, by whoever has taken the place of m: the jobs of m have ended then.
func (m *Manager) forgetLater(id string, delay time.Duration, how func(context.Context) error) {
	if heir := m.forwards.forget(id, how); heir != nil {
		heir.forgetLater(id, delay, how)
		return
	}
	m.queue.addIn(laneForwardRecords, "forwarded "+id, delay, func(ctx context.Context) error {
		err := how(ctx)
		if err == nil {
			m.forwards.done(id)
		}
		return err
	})
}

// storedForwards are the ids of the events that the store has, in the order in which they came.
func (m *Manager) storedForwards(ctx context.Context, env *Environment) ([]string, error) {
	ids, err := m.storedIn(ctx, env, forwardFolder)
	slices.Sort(ids)
	return ids, err
}

// resumeForward is one attempt. The error says that there is to be another. It has a time of its own: a backend that has the event is not to be
// left since others took most of the run's.
func (m *Manager) resumeForward(env *Environment, id string) error {
	ctx, cancel := context.WithTimeout(m.workCtx, forwardTimeout)
	defer cancel()
	name := forwardName(id)
	unlock, err := m.lockStore(ctx, env, name, writeLockWait)
	if err != nil {
		m.forwards.wait(id)
		return err
	}
	defer unlock()
	var wire forwardWire
	switch err := m.loadRecord(ctx, env, name, &wire); {
	case errors.Is(err, fs.ErrNotExist): // another node has
		m.forwards.done(id)
		return nil
	case errors.Is(err, errDamaged):
		m.forwards.done(id)
		if err := m.setAside(ctx, env, name, new(forwardWire), true); err != nil {
			return err
		}
		env.Observer.ForwardEnded(ForwardUnfit, 1)
		return nil
	case errors.Is(err, errUnreadable):
		m.forwards.done(id)
		m.unreadForwards.Store(true)
		if m.forwards.mayLog(&m.forwards.shut) {
			env.Log.Error("an event that is to be forwarded cannot be read and is left alone", "record", name, "error", err)
		}
		if m.env.Load() != env {
			return err // the keys may be there by now
		}
		return nil
	case err != nil:
		m.forwards.wait(id)
		return err
	}
	made, sure := m.forwardMade(env, id, wire.Created)
	m.forwards.dated(id, made)
	tooOld := time.Since(made) >= env.ForwardLife
	if tooOld && !sure {
		m.forwards.wait(id)
		return errClockUnknown
	}
	rest := time.UnixMilli(wire.NotBefore)
	if end := made.Add(env.ForwardLife); rest.After(end) {
		rest = end
	}
	// None rests longer than it is old: else whoever said so had a clock that is ahead.
	by := time.Now().Add(max(time.Since(made), restLeast) + time.Minute)
	if wire.NotBefore > 0 && time.Now().Before(rest) && rest.Before(by) { // by another node, or an earlier process
		m.forwards.rest(id, rest)
		m.forwards.wait(id)
		return ErrUnanswered
	}
	args := []any{"platform", wire.Platform, "appid", printable(wire.AppID, maxID), "info_type", printable(wire.InfoType, maxID)}
	err = m.handOn(ctx, env, id, func(ctx context.Context) (err error) {
		if tooOld { // also what waited for a configuration that forwards, or in an archive
			return fmt.Errorf("%w after %v", errGivenUp, env.ForwardLife)
		}
		defer m.recovered(&err)
		return env.Forward(ctx, wire.forward())
	})
	switch {
	case errors.Is(err, ErrNotForwarded):
		if m.forwards.mayLog(&m.forwards.said) {
			env.Log.Warn("an event could not be forwarded yet; it is tried again", append(args, "error", err)...)
		}
		return err
	case err != nil:
		env.Log.Error("an event could not be forwarded; it was handled all the same", append(args, "error", err)...)
	default:
		env.Log.Info("event forwarded at a later attempt", args...)
	}
	return nil
}

// takeForwards makes the events that wait in the store of a closed manager the duty of m. Those that are just being handed on come later, if
// nobody takes them.
func (m *Manager) takeForwards(ctx context.Context, env *Environment, from *Manager) {
	old := from.env.Load()
	if n := from.forwards.waiting(); env.Forward == nil && old.Forward != nil && n > 0 {
		m.forwardsLeft(n, errNoForward)
	}
	if env.Forward == nil || old.Forward == nil {
		return
	}
	by := time.Now().Add(takeOverAfter)
	forgetting := from.forwards.inherit(m)
	for id, how := range forgetting {
		m.forgetLater(id, forgetAfter, func(ctx context.Context) error {
			err := how(ctx)
			if time.Now().After(by) { // that store may be gone; if it is used again, somebody gets the event twice
				return nil
			}
			return err
		})
	}
	var ids []string
	var stores hiccup
	err := stores.over(ctx, func() (err error) { ids, err = from.storedForwards(ctx, old); return err })
	if err != nil {
		m.forwardsUnlisted(from.forwards.waiting(), err)
		return
	}
	left := 0
	for _, id := range ids {
		if forgetting[id] != nil {
			continue
		}
		if failed := m.takeForward(ctx, from, id, &stores); failed != nil {
			left, err = left+1, failed
		}
	}
	if left > 0 {
		m.forwardsLeft(left, err)
	}
}

// forwardsUnlisted is forwardsLeft of a store that does not say what it has. Known is how many of those that wait there this node knew of.
func (m *Manager) forwardsUnlisted(known int, why error) {
	env := m.env.Load()
	if env == nil {
		return
	}
	if known > 0 {
		env.Observer.ForwardEnded(ForwardLeft, known)
	}
	env.Log.Error("the store of before does not list the events that wait to be forwarded, which cannot be taken over: any stay there, and are forwarded if it is used again before they are too old",
		"known_events", known, "error", why)
}

func (m *Manager) forwardsLeft(events int, why error) {
	if env := m.env.Load(); env != nil {
		env.Observer.ForwardEnded(ForwardLeft, events)
		env.Log.Error("events that wait to be forwarded cannot be taken over from the store of before: they stay there, and are forwarded if it is used again before they are too old",
			"events", events, "error", why)
	}
}

// takeForward is takeForwards of one that waits.
func (m *Manager) takeForward(ctx context.Context, from *Manager, id string, stores *hiccup) error {
	if !from.forwards.take(id) {
		return nil // it is under way
	}
	return stores.over(ctx, func() error { return m.takeForwardOnce(ctx, from, id) })
}

func (m *Manager) takeForwardOnce(ctx context.Context, from *Manager, id string) error {
	old := from.env.Load()
	unlock, err := from.lockStore(ctx, old, forwardName(id), adoptLockWait)
	switch {
	case errors.Is(err, ErrLockHeld) && ctx.Err() == nil:
		return nil // it stays with the node that has it
	case err != nil:
		return err
	}
	defer unlock()
	return m.adoptForward(ctx, from, old, id)
}

// adoptForward moves an event from the store of another manager, under its lock there.
func (m *Manager) adoptForward(ctx context.Context, from *Manager, old *Environment, id string) error {
	env, err := m.current()
	if heir := m.forwards.inheritor(); err != nil && heir != nil {
		return heir.adoptForward(ctx, from, old, id) // the store was changed once more
	}
	if err != nil {
		return err
	}
	var wire forwardWire
	switch err := from.loadRecord(ctx, old, forwardName(id), &wire); {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	}
	if err := m.storeRecord(ctx, env, forwardName(id), wire); err != nil {
		return err
	}
	m.lookForForwards("forwards", 0)
	var again hiccup // of its own: it may be handed on by now, and would be so twice
	if err := again.over(ctx, func() error { return from.deleteRecord(ctx, old, forwardName(id)) }); err != nil {
		return undeletedError{err}
	}
	return nil
}

// undeletedError is of an event that was taken over, and that the store of before has as well.
type undeletedError struct{ why error }

func (e undeletedError) Error() string { return e.why.Error() }
func (e undeletedError) Unwrap() error { return e.why }
