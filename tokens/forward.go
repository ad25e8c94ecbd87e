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
	"path"
	"slices"
	"sync"
	"time"
)

// Limits of events that are to be handed on.
const (
	// maxForwards is how many a node keeps: nobody takes them, and WeChat makes more.
	maxForwards = 1000
	// forwardLife is for how long one is kept that nobody takes: an outage over a long holiday.
	forwardLife = 7 * 24 * time.Hour
	// adoptLockWait bounds the wait for a node that is just handing on what is to go to another store: the reload waits.
	adoptLockWait = time.Second
)

// Forward is the duty to hand an event on to the site's own handlers, which WeChat has had its `success` for.
type Forward struct {
	Platform string
	AppID    string // may be empty
	InfoType string
	Event    json.RawMessage // what whoever hands it on needs; no codes and no tickets
}

// ErrNotForwarded: nobody can have got the event, or it is not known whether somebody has. It is handed on later.
var ErrNotForwarded = errors.New("the event was not handed on")

// ErrForwardsFull: as many events are waiting to be handed on as are kept.
var ErrForwardsFull = fmt.Errorf("%d events are waiting to be handed on, and no more are kept", maxForwards)

type forwardWire struct {
	Platform string          `json:"platform"`
	AppID    string          `json:"appid,omitempty"`
	InfoType string          `json:"info_type,omitempty"`
	Event    json.RawMessage `json:"event"`
}

// forwardTable are the events that this node has to hand on.
type forwardTable struct {
	mu   sync.Mutex
	byID map[string]bool // whether it is being handed on, or is about to be
	heir *Manager        // has what waits here from now on; nil: nobody has
	said time.Time       // when the log last heard that one is tried again
	next string          // with which the next run begins: the last one had no time for it; empty: with the first
}

// add notes an event that is about to be handed on, unless there are too many.
func (t *forwardTable) add(id string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.byID) >= maxForwards {
		return false
	}
	if t.byID == nil {
		t.byID = make(map[string]bool)
	}
	t.byID[id] = true
	return true
}

// take notes that an event that waits is being handed on, unless it is already.
func (t *forwardTable) take(id string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.byID[id] {
		return false
	}
	if t.byID == nil {
		t.byID = make(map[string]bool)
	}
	t.byID[id] = true
	return true
}

// wait notes that an event waits again, and says who has it from now on; nil: this node.
func (t *forwardTable) wait(id string) *Manager {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.byID[id] = false
	return t.heir
}

func (t *forwardTable) done(id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.byID, id)
}

// keepOnly forgets what waits and is not among ids: another node has handed it on.
func (t *forwardTable) keepOnly(ids []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for id, underWay := range t.byID {
		if !underWay && !slices.Contains(ids, id) {
			delete(t.byID, id)
		}
	}
}

func (t *forwardTable) inherit(heir *Manager) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.heir = heir
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

// mayLog reports whether the log is to hear once more that events are tried again.
func (t *forwardTable) mayLog() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if !t.said.IsZero() && now.Sub(t.said) < troubleLogEvery {
		return false
	}
	t.said = now
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
	if !m.forwards.add(id) {
		return "", ErrForwardsFull
	}
	if err := m.storeRecord(ctx, env, forwardName(id), forwardWire(f)); err != nil {
		// Writing it may take effect yet, and WeChat pushes again: nobody is to get it twice, the second time after days.
		m.queue.add("forwarded "+id, takeOverAfter, m.forgetForward(env, id))
		return "", err
	}
	return id, nil
}

// HandOnLater leaves an event to a later attempt.
func (m *Manager) HandOnLater(id string) {
	m.forwards.wait(id)
	m.queue.add("forwards later", takeOverAfter, m.resumeForwards)
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
		m.queue.add("forwards", 0, m.resumeForwards)
	}
	return err
}

// handOn is HandOn under the lock.
func (m *Manager) handOn(ctx context.Context, env *Environment, id string, forward func(context.Context) error) error {
	err := forward(ctx)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*storeTimeout)
	defer cancel()
	if errors.Is(err, ErrNotForwarded) {
		if heir := m.forwards.wait(id); heir != nil {
			return errors.Join(err, heir.adoptForward(ctx, m, env, id))
		}
		return err
	}
	forget := m.forgetForward(env, id)
	if forget(ctx) != nil {
		m.queue.add("forwarded "+id, 0, forget)
	}
	return err
}

// forgetForward is the job that deletes what the store holds of an event. Until it is done nothing else is done with that.
func (m *Manager) forgetForward(env *Environment, id string) func(context.Context) error {
	return func(ctx context.Context) error {
		err := m.deleteRecord(ctx, env, forwardName(id))
		if err == nil {
			m.forwards.done(id)
		}
		return err
	}
}

// storedForwards are the ids of the events that the store has, in the order in which they came.
func (m *Manager) storedForwards(ctx context.Context, env *Environment) (ids []string, err error) {
	var names []string
	err = env.operate(ctx, "list", storeTimeout, func(ctx context.Context) (err error) {
		names, err = env.Store.List(ctx, forwardFolder)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%w: list %s: %w", ErrStore, forwardFolder, err)
	}
	for _, name := range names {
		if id := path.Base(name); isCodeHash(id) { // else a store's temporary file
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids, nil
}

// resumeForwards is the job that hands on what an earlier process, another node or an earlier attempt has not: at the first Use, when another
// node has kept one a while ago, and for as long as there is any.
func (m *Manager) resumeForwards(ctx context.Context) error {
	env, err := m.current()
	if err != nil || env.Forward == nil {
		return nil //nolint:nilerr // closed, or they wait for a configuration that forwards
	}
	ids, err := m.storedForwards(ctx, env)
	if err != nil {
		return err
	}
	m.forwards.keepOnly(ids)
	var failed error
	for _, id := range m.forwards.turn(ids) {
		if ctx.Err() != nil {
			m.forwards.interrupted(id)
			return ErrNotForwarded // the others next time
		}
		if !m.forwards.take(id) {
			continue // it is under way
		}
		if err := m.resumeForward(ctx, env, id); err != nil {
			failed = err
		}
	}
	return failed
}

// resumeForward is one attempt. The error says that there is to be another.
func (m *Manager) resumeForward(ctx context.Context, env *Environment, id string) error {
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
		return m.setAside(ctx, env, name, new(forwardWire), true)
	case errors.Is(err, errUnreadable):
		m.forwards.done(id)
		env.Log.Error("an event that is to be forwarded cannot be read and is left alone", "record", name, "error", err)
		return nil
	case err != nil:
		m.forwards.wait(id)
		return err
	}
	args := []any{"platform", wire.Platform, "appid", wire.AppID, "info_type", printable(wire.InfoType, maxID)}
	err = m.handOn(ctx, env, id, func(ctx context.Context) error {
		err := env.Forward(ctx, Forward(wire))
		if errors.Is(err, ErrNotForwarded) && time.Since(forwardTime(id)) > forwardLife {
			return fmt.Errorf("given up after %v: %v", forwardLife, err) //nolint:errorlint // it is not to be tried again
		}
		return err
	})
	switch {
	case errors.Is(err, ErrNotForwarded):
		if m.forwards.mayLog() {
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
	if env.Forward == nil || old.Forward == nil {
		return
	}
	from.forwards.inherit(m)
	ids, err := from.storedForwards(ctx, old)
	for _, id := range ids {
		if !from.forwards.take(id) {
			continue
		}
		unlock, locked := from.lockStore(ctx, old, forwardName(id), adoptLockWait)
		if locked != nil {
			continue // it stays with the node that has it
		}
		err = errors.Join(err, m.adoptForward(ctx, from, old, id))
		unlock()
	}
	if err != nil {
		env.Log.Error("events that wait to be forwarded cannot be taken over from the store of before: they stay there", "error", err)
	}
}

// adoptForward moves an event from the store of another manager, under its lock there.
func (m *Manager) adoptForward(ctx context.Context, from *Manager, old *Environment, id string) error {
	env, err := m.current()
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
	m.queue.add("forwards", 0, m.resumeForwards)
	return from.deleteRecord(ctx, old, forwardName(id))
}
