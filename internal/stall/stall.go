// Package stall has tests tell code that is slow from a machine that stood still. What a test measures by the clock says nothing of
// the code while the test's process, or a server that it talks to, had no turn: another process had the processor, or the disk was busy.
package stall

import (
	"fmt"
	"iter"
	"sync"
	"testing"
	"time"
)

const (
	// period is between two looks at the clock, and what one may be late by without having stood still.
	period = 5 * time.Millisecond
	// maxTries is how often a machine that stands still again and again is given another try.
	maxTries = 20
	// maxStops is how many stops are remembered: fuzzing takes hours, and asks for the last moment only.
	maxStops = 10_000
)

// Watch sees for how long the machine stood still.
type Watch struct {
	mu    sync.Mutex
	last  time.Time // the watching was at work
	stops []stop
}

// stop is a time in which the machine stood still.
type stop struct {
	end  time.Time
	took time.Duration
}

// New watches until the test ends. Each of turns returns once somebody else had its turn, as a server that answers: it is watched, too.
func New(t testing.TB, turns ...func()) *Watch {
	w, end := begin(turns)
	t.Cleanup(end)
	return w
}

func begin(turns []func()) (w *Watch, end func()) {
	w = &Watch{last: time.Now()}
	quit := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() {
		tick := time.NewTimer(period)
		defer tick.Stop()
		for {
			select {
			case <-quit:
				return
			case <-tick.C:
			}
			for _, turn := range turns {
				turn()
			}
			w.turn(time.Now())
			tick.Reset(period)
		}
	})
	return w, func() { close(quit); watching.Wait() }
}

// turn notes that all had their turn.
func (w *Watch) turn(now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if late := now.Sub(w.last) - period; late > period {
		if len(w.stops) == 2*maxStops {
			w.stops = append(w.stops[:0], w.stops[maxStops:]...)
		}
		w.stops = append(w.stops, stop{now, late})
	}
	w.last = now
}

// between are all the stops since a time, and the longest of them, one that goes on among them.
func (w *Watch) between(start, now time.Time) (all, longest time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	add := func(s stop) {
		took := min(s.took, s.end.Sub(start))
		all, longest = all+took, max(longest, took)
	}
	if late := now.Sub(w.last) - period; late > period {
		add(stop{now, late})
	}
	for i := len(w.stops) - 1; i >= 0 && w.stops[i].end.After(start); i-- {
		add(w.stops[i])
	}
	return all, longest
}

// Stopped is the time since start in which the machine stood still.
func (w *Watch) Stopped(start time.Time) time.Duration {
	all, _ := w.between(start, time.Now())
	return all
}

// Longest is for how long it stood still at a time.
func (w *Watch) Longest(start time.Time) time.Duration {
	_, longest := w.between(start, time.Now())
	return longest
}

// Since is the time since start in which it did not.
func (w *Watch) Since(start time.Time) time.Duration {
	now := time.Now()
	all, _ := w.between(start, now)
	return now.Sub(start) - all
}

// Try is one try at what is measured by the clock.
type Try struct {
	*Watch

	mu       sync.Mutex
	failures []string
}

// Errorf notes what fails the test, unless the machine stood still in this try.
func (t *Try) Errorf(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.failures = append(t.failures, fmt.Sprintf(format, args...))
}

// Failed reports whether something was noted.
func (t *Try) Failed() bool { return len(t.noted()) > 0 }

func (t *Try) noted() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.failures
}

// Tries gives a test tries at something until one shows what it wants. It fails as soon as one does not in which the machine never stood
// still for longer than most; one in which it did says nothing. Between the tries nothing is left over but what the test itself leaves.
func Tries(t testing.TB, most time.Duration, turns ...func()) iter.Seq[*Try] {
	return func(yield func(*Try) bool) {
		t.Helper()
		w, end := begin(turns)
		defer end()
		for n := 1; ; n++ {
			try, start := &Try{Watch: w}, time.Now()
			if !yield(try) || !try.Failed() {
				return
			}
			all, longest := w.between(start, time.Now())
			if longest <= most || n == maxTries {
				for _, f := range try.noted() {
					t.Errorf("%s (try %d; the machine stood still for %v, for %v at a time)", f, n, all, longest)
				}
				return
			}
			t.Logf("the machine stood still for %v, for %v at a time: another try, for this one says nothing: %q", all, longest, try.noted())
		}
	}
}
