package main

import (
	"errors"
	"slices"
	"time"
)

var errNothing = errors.New("nothing to complain of")

// latencies are those of many requests.
type latencies struct {
	all    []time.Duration
	sorted bool
}

func (l *latencies) add(more []time.Duration) { l.all, l.sorted = append(l.all, more...), false }

// at is the quantile q, by nearest rank.
func (l *latencies) at(q float64) time.Duration {
	if len(l.all) == 0 {
		return 0
	}
	if !l.sorted {
		slices.Sort(l.all)
		l.sorted = true
	}
	return l.all[min(len(l.all)-1, int(q*float64(len(l.all))))]
}

// spread is a figure over the rounds.
type spread struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

func spreadOf(values []float64) spread {
	if len(values) == 0 {
		return spread{}
	}
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	return spread{Median: (sorted[(n-1)/2] + sorted[n/2]) / 2, Min: sorted[0], Max: sorted[n-1]}
}

// over is a figure of two targets' rounds that were run together, such as a ratio.
func over(a, b []round, figure func(a, b round) float64) spread {
	values := make([]float64, min(len(a), len(b)))
	for i := range values {
		values[i] = figure(a[i], b[i])
	}
	return spreadOf(values)
}

// each is a figure of one target's rounds.
func each(a []round, figure func(round) float64) spread {
	return over(a, a, func(r, _ round) float64 { return figure(r) })
}

func cpuOf(r round) float64       { return r.CPU }
func paceOf(r round) float64      { return float64(r.Requests) / r.Seconds }
func cpuRatio(a, b round) float64 { return a.CPU / b.CPU }
func cpuMore(a, b round) float64  { return a.CPU - b.CPU }
func p99Ratio(a, b round) float64 { return a.P99 / b.P99 }
