package tokens

import (
	"context"
	"errors"
	"slices"
	"time"
)

const (
	// forwardTries is how many attempts of a run may reach nobody: a thousand events for a backend that is down, on every node, are not to be
	// looked at every minute. The next run begins where this one ended.
	forwardTries = 20
	// forwardPatience is how long an attempt takes before the next begins beside it. Events go out one after another, in the order in which they
	// came, while answers come; who does not answer holds up nobody else's by more than this.
	forwardPatience = time.Second
	// forwardsBeside bounds the attempts of a run that are under way: as many as begin while a backend hangs for as long as it usually may.
	forwardsBeside = 32
	// forwardRunTime is for how long a run begins attempts: what came meanwhile is to have its turn.
	forwardRunTime = 5 * time.Minute
)

// lookForForwards queues resumeForwards, under an id of those who want it.
func (m *Manager) lookForForwards(id string, delay time.Duration) {
	m.queue.addIn(laneForwards, id, delay, m.resumeForwards)
}

// resumeForwards is the job that hands on what an earlier process, another node or an earlier attempt has not: at the first Use, when another
// node has kept one a while ago, and for as long as there is any.
func (m *Manager) resumeForwards(ctx context.Context) error {
	env, err := m.current()
	if err != nil {
		return nil //nolint:nilerr // closed
	}
	if env.Forward == nil { // a reload took it away while an event was under way
		m.queue.add("unwanted forwards later", takeOverAfter, m.countUnwanted)
		return nil
	}
	ids, err := m.storedForwards(ctx, env)
	if err != nil {
		return err
	}
	m.forwards.stored(ids)
	r := &forwardRun{m: m, env: env, left: m.forwards.turn(ids), end: time.Now().Add(forwardRunTime), ended: make(chan forwardAttempt)}
	r.run()
	return r.outcome()
}

// forwardRun is one run through the events that wait.
type forwardRun struct {
	m        *Manager
	env      *Environment
	left     []string  // that are to be tried
	busy     []string  // that found no place, and are to be tried when there may be one
	end      time.Time // after it none begins
	ended    chan forwardAttempt
	underWay int
	settled  int           // got somewhere: they are done with, or rest
	failures int           // got nowhere
	failed   error         // of the last of those
	rest     time.Duration // until the first of those that rest is to be tried; 0: none does
}

// forwardAttempt is what came of one.
type forwardAttempt struct {
	id  string
	err error
}

// run returns when no attempt of it is under way.
func (r *forwardRun) run() {
	patience := time.NewTimer(forwardPatience)
	defer patience.Stop()
	for {
		if r.begin() {
			patience.Reset(forwardPatience)
		}
		if r.underWay == 0 {
			return
		}
		select {
		case a := <-r.ended:
			r.note(a)
		case <-patience.C:
		}
	}
}

// begin begins an attempt, if there is to be one.
func (r *forwardRun) begin() bool {
	for len(r.left) > 0 && r.underWay < forwardsBeside && r.failures+len(r.busy) < forwardTries && !r.over() {
		id := r.left[0]
		r.left = r.left[1:]
		if r.resting(id) || !r.m.forwards.take(id) {
			continue // or it is under way, or done with
		}
		r.underWay++
		go func() {
			a := forwardAttempt{id: id}
			defer func() {
				if errors.Is(a.err, errPanic) {
					r.m.forwards.wait(id)
				}
				r.ended <- a
			}()
			defer r.m.recovered(&a.err)
			a.err = r.m.resumeForward(r.env, id)
		}()
		return true
	}
	return false
}

// over reports whether no more attempts are to begin: after a reload others hand on.
func (r *forwardRun) over() bool {
	return r.m.closed.Load() || r.replaced() || !time.Now().Before(r.end)
}

func (r *forwardRun) replaced() bool { return r.m.env.Load() != r.env }

func (r *forwardRun) note(a forwardAttempt) {
	r.underWay--
	switch {
	case errors.Is(a.err, ErrNoPlace):
		r.busy = append(r.busy, a.id)
		return
	case a.err != nil && !r.resting(a.id):
		r.failures, r.failed = r.failures+1, a.err
	default:
		r.settled++
	}
	if len(r.busy) > 0 { // the place of this one
		r.left, r.busy = slices.Insert(r.left, 0, r.busy[0]), r.busy[1:]
	}
}

// resting reports whether an event is left alone for now.
func (r *forwardRun) resting(id string) bool {
	left := min(r.m.forwards.rests(id), max(time.Until(r.m.forwards.madeAt(id).Add(r.env.ForwardLife)), 0)) // a reload may have shortened its life
	if left > 0 && (r.rest == 0 || left < r.rest) {
		r.rest = left
	}
	return left > 0
}

// outcome is what the run came to: nil if there is nothing left to do.
func (r *forwardRun) outcome() error {
	others := slices.Concat(r.left, r.busy)
	switch {
	case len(others) == 0:
	case r.replaced(), r.failures < forwardTries && r.settled > 0: // there was no time, or no place, for all
		r.m.forwards.interrupted(others[0])
		return retryError{after: backoffFirst}
	default:
		r.m.forwards.interrupted(others[0])
		return ErrNotForwarded
	}
	if r.failed == nil && r.rest > 0 {
		return retryError{after: min(max(r.rest, backoffFirst), backoffMost)}
	}
	return r.failed
}
