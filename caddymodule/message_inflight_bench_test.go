package caddymodule

import (
	"encoding/binary"
	"slices"
	"testing"
	"time"
)

// BenchmarkCallTable is what the table of calls costs a push, whose answers have 300 bytes, at so many pushes a second by a clock that goes
// on with them: the table is first filled with those of five minutes, which is how long identities are kept. More than a million are
// beyond the limit. It also says how long the slowest push held the table's lock, and the slowest but one in ten thousand.
func BenchmarkCallTable(b *testing.B) {
	for _, bench := range []struct {
		name string
		rate int
	}{{"20 a second", 20}, {"2000 a second", 2000}, {"5000 a second", 5000}} {
		b.Run(bench.name, func(b *testing.B) {
			table := newCallTable(func(string) {})
			start, n := time.Now(), 0
			body := make([]byte, 300)
			push := func() {
				n++
				now := start.Add(time.Duration(n) * time.Second / time.Duration(bench.rate))
				var text [8]byte
				binary.LittleEndian.PutUint64(text[:], uint64(n))
				a := table.arrive(shortSum(text[:]), now, 0, now.Unix()+300, pace{3, defaultReplyTimeout})
				table.finish(a.call, passiveReply{outcome: outcomeSealed, body: body}, now)
				table.leave(a.call, now)
			}
			for range 400 * bench.rate {
				push()
			}
			took := make([]time.Duration, 0, 1<<22)
			b.ReportAllocs()
			for b.Loop() {
				before := time.Now()
				push()
				if len(took) < cap(took) {
					took = append(took, time.Since(before))
				}
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)-1].Nanoseconds())/1000, "slowest-µs")
			b.ReportMetric(float64(took[len(took)-1-len(took)/10_000].Nanoseconds())/1000, "p99.99-µs")
		})
	}
}
