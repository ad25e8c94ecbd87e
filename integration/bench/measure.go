package main

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// plan is how much is measured.
type plan struct {
	rounds      int
	turns       int           // that a round of a target is cut into, for others' to come between them
	time        time.Duration // of a round, by the reference's pace
	requests    int           // in a round; 0: as many as fit into its time
	connections int
	rate        float64 // of the rounds at a fixed rate; 0: none of these
	sample      float64
	profile     bool
	pause       time.Duration // between two looks at a server's memory, for whether it is idle
}

// Bounds of a round that is given as a time.
const (
	warmUp       = 2000
	leastAtOnce  = 500
	mostAtOnce   = 100_000 // pushes are some 2 KB each, and all are in memory
	readRSSEvery = 200 * time.Millisecond
	idlePause    = 500 * time.Millisecond
	profileTime  = 15 * time.Second
)

// figures are what was measured of a target, round by round.
type figures struct {
	IdleRSS int64     `json:"rss_idle"`
	LoadRSS int64     `json:"rss_load"` // the most that was seen while it worked
	Peak    int64     `json:"rss_peak"` // the most that it ever had
	Full    []round   `json:"full"`     // as fast as it goes
	Rated   []round   `json:"rated"`    // at the fixed rate
	full    latencies // of all rounds
	atRate  latencies
}

// round is one round of a target.
type round struct {
	Requests int     `json:"requests"`
	Seconds  float64 `json:"seconds"`
	CPU      float64 `json:"cpu_us"` // a request
	P50      float64 `json:"p50_us"`
	P99      float64 `json:"p99_us"`
	P999     float64 `json:"p999_us"`
	Others   float64 `json:"others"` // processors that others kept busy meanwhile
}

// measure takes a scenario through its rounds, with all of its servers up.
func (p plan) measure(ctx context.Context, w *world, s *scenario, out io.Writer) error {
	for _, t := range s.targets {
		if err := w.start(ctx, t); err != nil {
			return err
		}
		if err := t.settle(ctx, p.pause); err != nil {
			return err
		}
	}
	n, err := p.warm(ctx, s)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "%s: %d rounds of %d requests for each of %s\n", s.name, p.rounds, n, strings.Join(s.names(), "; "))
	if err := p.rotate(ctx, s.targets, n, 0, func(t *target, r *result) {
		t.Full = append(t.Full, r.round())
		t.full.add(r.latencies)
	}); err != nil {
		return err
	}
	if p.rate > 0 {
		n := p.requests
		if n == 0 {
			n = max(leastAtOnce, int(p.rate*p.time.Seconds()))
		}
		fmt.Fprintf(out, "%s: %d rounds of %d requests at %g a second\n", s.name, p.rounds, n, p.rate)
		var rated []*target
		for _, t := range s.targets {
			if t.rated {
				rated = append(rated, t)
			}
		}
		if err := p.rotate(ctx, rated, n, p.rate, func(t *target, r *result) {
			t.Rated = append(t.Rated, r.round())
			t.atRate.add(r.latencies)
		}); err != nil {
			return err
		}
	}
	if p.profile {
		if err := p.profiles(ctx, w, s, n, out); err != nil {
			return err
		}
	}
	for _, t := range s.targets {
		_, peak, err := memory(t.gateway.PID())
		if err != nil {
			return err
		}
		t.Peak = max(peak, t.LoadRSS) // the kernel keeps both roughly
		if err := w.stop(t); err != nil {
			return err
		}
	}
	return nil
}

func (s *scenario) names() []string {
	var names []string
	for _, t := range s.targets {
		names = append(names, t.name)
	}
	return names
}

// warm has every target at work before anything counts, and returns the number of requests in a round.
func (p plan) warm(ctx context.Context, s *scenario) (int, error) {
	n := p.requests
	for i, t := range s.targets {
		first := warmUp
		if p.requests > 0 {
			first = min(warmUp, max(p.requests, p.connections))
		}
		r, err := p.volley(first, 0)(ctx, t)
		if err != nil {
			return 0, err
		}
		if i == 0 && n == 0 {
			n = min(mostAtOnce, max(leastAtOnce, int(float64(r.Requests)/r.Elapsed.Seconds()*p.time.Seconds())))
		}
	}
	return n, nil
}

// rotate has each target send n requests in each of p.rounds rounds. In a round they take turns, so that what disturbs the machine for
// a second or more disturbs all alike, in an order that is drawn anew each time: whom one follows on is worth a per cent.
func (p plan) rotate(ctx context.Context, targets []*target, n int, rate float64, keep func(*target, *result)) error {
	turns := max(1, min(p.turns, n/p.connections))
	for range p.rounds {
		sums := make([]result, len(targets))
		for turn := range turns {
			some := n*(turn+1)/turns - n*turn/turns
			for _, k := range rand.Perm(len(targets)) {
				r, err := p.volley(some, rate)(ctx, targets[k])
				if err != nil {
					return err
				}
				sums[k].add(r)
			}
		}
		for k, t := range targets {
			keep(t, &sums[k])
		}
	}
	return nil
}

// volley is n requests: prepared, sent, judged. Any wrong reply, and anything wrong at the far end, is an error.
func (p plan) volley(n int, rate float64) func(context.Context, *target) (*result, error) {
	return func(ctx context.Context, t *target) (*result, error) {
		b, err := t.traffic.prepare(n, t.addr)
		if err != nil {
			return nil, err
		}
		runtime.GC() // what earlier rounds left is not swept up in this one
		pid := t.gateway.PID()
		v := volley{
			addr: t.addr, batch: b, traffic: t.traffic, connections: p.connections, rate: rate, sample: p.sample,
			cpu: func() (time.Duration, error) { return cpuTime(pid) },
		}
		seen := t.watchRSS(pid)
		r, err := v.fire(ctx)
		t.LoadRSS = max(t.LoadRSS, seen())
		if err == nil {
			err = r.wrong.take(n)
		}
		if t.far != nil {
			if wrong := t.far.wrong.take(n); wrong != nil {
				err = fmt.Errorf("at the far end %w; the client had: %w", wrong, orNothing(err))
			}
		}
		if err != nil {
			return nil, fmt.Errorf("%s, %s: %w", t.scenario, t.name, err)
		}
		return r, nil
	}
}

func orNothing(err error) error {
	if err == nil {
		return errNothing
	}
	return err
}

// watchRSS watches the process's memory until the returned function is called, which returns the most that was seen.
func (t *target) watchRSS(pid int) func() int64 {
	stop, most := make(chan struct{}), make(chan int64)
	go func() {
		ticker := time.NewTicker(readRSSEvery)
		defer ticker.Stop()
		var seen int64
		for {
			if rss, _, err := memory(pid); err == nil {
				seen = max(seen, rss)
			}
			select {
			case <-ticker.C:
			case <-stop:
				most <- seen
				return
			}
		}
	}()
	return func() int64 { close(stop); return <-most }
}

// settle waits until the process's memory no longer grows, and notes it.
func (t *target) settle(ctx context.Context, pause time.Duration) error {
	const (
		atMost = 10
		still  = 256 << 10
	)
	last := int64(0)
	for range atMost {
		rss, _, err := memory(t.gateway.PID())
		if err != nil {
			return err
		}
		t.IdleRSS = rss
		if last > 0 && rss-last < still {
			return nil
		}
		last = rss
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// profiles has each target that is the gateway, and the reference, work once more while its CPU profile is taken.
func (p plan) profiles(ctx context.Context, w *world, s *scenario, n int, out io.Writer) error {
	fire := p.volley(n, 0)
	for _, t := range s.targets {
		if !t.rated { // it only passes on
			continue
		}
		path := filepath.Join(w.dir, strings.NewReplacer(" ", "-", ",", "").Replace(s.name+"-"+t.name)+".pprof")
		file, err := os.Create(path)
		if err != nil {
			return err
		}
		done := make(chan error, 1)
		go func() {
			done <- fetch(ctx, fmt.Sprintf("http://%s/debug/pprof/profile?seconds=%d", t.gateway.Admin, int(profileTime.Seconds())), profileTime+roundGrace, file)
		}()
		for working := true; working; {
			if _, err = fire(ctx, t); err != nil {
				return err
			}
			select {
			case err = <-done:
				working = false
			default:
			}
		}
		if closed := file.Close(); err != nil || closed != nil {
			return fmt.Errorf("profile of %s: %w", t.name, firstOf(err, closed))
		}
		fmt.Fprintf(out, "profile: %s\n", path)
	}
	return nil
}

func firstOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// round sums a result up.
func (r *result) round() round {
	var l latencies
	l.add(r.latencies)
	return round{
		Requests: r.Requests, Seconds: r.Elapsed.Seconds(), CPU: micros(r.CPU) / float64(r.Requests),
		P50: micros(l.at(0.5)), P99: micros(l.at(0.99)), P999: micros(l.at(0.999)), Others: r.Others,
	}
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
