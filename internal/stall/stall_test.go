package stall

import (
	"fmt"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// told is a test that keeps what it is told.
type told struct {
	testing.TB
	errors, logs []string
}

func (t *told) Helper()                   {}
func (t *told) Errorf(f string, a ...any) { t.errors = append(t.errors, fmt.Sprintf(f, a...)) }
func (t *told) Logf(f string, a ...any)   { t.logs = append(t.logs, fmt.Sprintf(f, a...)) }

// still is somebody whose turn does not come for a while.
type still struct{ left atomic.Int64 }

func (s *still) stand(d time.Duration) { s.left.Store(int64(d)) }
func (s *still) turn()                 { time.Sleep(time.Duration(s.left.Swap(0))) }

// TestSince: the stops are taken from what a clock shows, also one that began before, and one that goes on.
func TestSince(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(still)
		w := New(t, s.turn)
		near := func(what string, got, want time.Duration) {
			t.Helper()
			if d := (got - want).Abs(); d > 2*period {
				t.Errorf("%s: %v, want %v", what, got, want)
			}
		}
		start := time.Now()
		time.Sleep(time.Second)
		if took := w.Since(start); took != time.Second {
			t.Errorf("nothing stood still: %v", took)
		}
		s.stand(10 * time.Second)
		time.Sleep(4 * time.Second)
		near("in a stop", w.Since(start), time.Second)
		within := time.Now()
		time.Sleep(7 * time.Second)
		near("after it", w.Since(start), 2*time.Second)
		near("since a time in it", w.Since(within), time.Second)
		near("the stop", w.Stopped(start), 10*time.Second)
		near("the longest stop", w.Longest(start), 10*time.Second)
		later := time.Now()
		time.Sleep(time.Second)
		if took := w.Since(later); took != time.Second {
			t.Errorf("since after it: %v", took)
		}
	})
}

// TestStopsAreForgotten: the oldest, when there are very many.
func TestStopsAreForgotten(t *testing.T) {
	w, start := &Watch{last: time.Now()}, time.Now()
	const each = 3 * period // of which one is no stop
	for i := range 5 * maxStops {
		w.turn(start.Add(time.Duration(i+1) * each))
	}
	end := start.Add(5 * maxStops * each)
	if n := len(w.stops); n < maxStops || n > 2*maxStops {
		t.Errorf("%d stops are remembered", n)
	}
	if all, longest := w.between(end.Add(-100*each), end); all != 100*2*period || longest != 2*period {
		t.Errorf("the last of them took %v, and %v at a time", all, longest)
	}
}

// TestTries: what fails is tried again if it failed in a stop, and only then.
func TestTries(t *testing.T) {
	const most = 100 * time.Millisecond
	for name, tt := range map[string]struct {
		stops  []time.Duration // of each try that fails
		fails  bool            // after them, too
		tries  int
		errors int
	}{
		"at once":                {nil, false, 1, 0},
		"fails":                  {nil, true, 1, 2},
		"fails in a short stop":  {[]time.Duration{most / 2}, false, 1, 2},
		"fails in a stop":        {[]time.Duration{time.Second}, false, 2, 0},
		"fails in stops":         {[]time.Duration{time.Second, 2 * most, time.Second}, false, 4, 0},
		"fails after a stop":     {[]time.Duration{time.Second}, true, 2, 2},
		"stands still very much": {slowly(2 * maxTries), false, maxTries, 2},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, test, tries := new(still), &told{TB: t}, 0
				for try := range Tries(test, most, s.turn) {
					if tries++; tries <= len(tt.stops) {
						s.stand(tt.stops[tries-1])
					}
					time.Sleep(2 * time.Second)
					if tries <= len(tt.stops) || tt.fails {
						try.Errorf("failure %d", 1)
						try.Errorf("failure %d", 2)
					}
				}
				if tries != tt.tries || len(test.errors) != tt.errors || len(test.logs) != tt.tries-1 {
					t.Errorf("%d tries, %d logged, errors %q", tries, len(test.logs), test.errors)
				}
				if tt.errors > 0 && !strings.HasPrefix(test.errors[1], "failure 2 (") {
					t.Errorf("errors %q", test.errors)
				}
			})
		})
	}
}

func slowly(n int) []time.Duration {
	stops := make([]time.Duration, n)
	for i := range stops {
		stops[i] = time.Second
	}
	return stops
}

// TestTriesEndWithTheTest: also with one that ends in the middle of a try.
func TestTriesEndWithTheTest(t *testing.T) {
	for range Tries(t, 0) {
		break
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for range Tries(t, 0) {
			runtime.Goexit() // as t.Fatal does
		}
	}()
	<-ended
	goleak.VerifyNone(t)
}
