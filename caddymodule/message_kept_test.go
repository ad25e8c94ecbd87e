package caddymodule

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"reflect"
	"testing"
	"time"
)

// TestKeptCalls: what is kept of calls of all sizes comes back as it was, and goes in the order in which it came.
func TestKeptCalls(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(1, 2))
	s := newKeptCalls()
	var want []*call
	add := func(n int) {
		c := &call{
			id: shortSum([]byte(fmt.Sprint(n))), done: true, first: s.epoch.Add(-time.Duration(n)), answeredAt: s.epoch.Add(time.Duration(n)),
			validUntil: int64(n), arrivals: n % 5, run: n % 3, delivered: n%2 == 0, late: n%3 == 0, abandoned: n%7 == 0, owned: n%5 == 0,
			answer: passiveReply{outcome: keptOutcomes[n%len(keptOutcomes)]},
		}
		length := random.IntN(400)
		if n%50 == 0 {
			length = random.IntN(2 * keptChunkSize)
		}
		for range length {
			c.answer.body = append(c.answer.body, byte(n))
		}
		if !s.keep(c) {
			t.Fatal("a new call is not kept")
		}
		c.kept = true
		want = append(want, c)
	}
	same := func(c *call) {
		t.Helper()
		if got := s.call(s.find(c.id)); !reflect.DeepEqual(got, c) {
			t.Fatalf("got %+v\nwant %+v", got, c)
		}
	}
	for n := range 20_000 {
		add(n)
		if changed := want[random.IntN(len(want))]; n%10 == 0 {
			changed.arrivals, changed.late = 9, !changed.late
			if s.find(changed.id); !s.keep(changed) {
				t.Fatal("a kept call's change is not kept")
			}
		}
		for s.count > 1000 || s.count > 0 && random.IntN(2000) == 0 {
			gone := want[0]
			if k := s.oldest(); k.id() != gone.id {
				t.Fatal("not the oldest goes")
			}
			same(gone)
			s.removeOldest()
			if s.find(gone.id) != nil || s.keep(gone) {
				t.Fatal("what is gone is there")
			}
			want = want[1:]
		}
		same(want[random.IntN(len(want))])
	}
	for s.oldest() != nil {
		s.removeOldest()
	}
	if s.count != 0 || s.bytes != 0 || s.index.used != 0 || len(s.chunks) != 0 {
		t.Errorf("%d calls in %d bytes, %d in the index, %d chunks", s.count, s.bytes, s.index.used, len(s.chunks))
	}
}

// TestKeptCallFollowed: a call that was begun again after it had been abandoned outlives what was kept of the one before.
func TestKeptCallFollowed(t *testing.T) {
	t.Parallel()
	s := newKeptCalls()
	id := pushID{1}
	s.keep(&call{id: id, abandoned: true, answeredAt: s.epoch})
	s.keep(&call{id: id, answeredAt: s.epoch.Add(1), answer: passiveReply{outcome: outcomePlain}})
	s.removeOldest()
	if k := s.find(id); k == nil || k.is(keptAbandoned) {
		t.Error("what is kept of the second call went with the first")
	}
	s.removeOldest()
	if s.find(id) != nil || s.bytes != 0 {
		t.Error("something is left")
	}
}

// TestIdentities holds them against a map, while the clock goes on and is set back.
func TestIdentities(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(3, 4))
	table := identities{ends: map[int64]int{}}
	want := map[pushID]int64{}
	now := int64(slotBuckets) * 6 // where the numbers in the slots begin again, before long
	now -= 40
	table.forgetBefore(now)
	id := func() (id pushID) {
		binary.LittleEndian.PutUint64(id[:], random.Uint64N(200_000)*0x9e3779b97f4a7c15)
		return id
	}
	for n := range 400_000 {
		if n%4000 == 0 {
			now++
			if n%100_000 == 0 {
				now -= 10
			}
			table.forgetBefore(now)
			for id, end := range want {
				if end < now {
					delete(want, id)
				}
			}
		}
		table.forgetBefore(now)
		add, ask := id(), id()
		end := now + 1 + random.Int64N(20)
		table.add(&add, end)
		want[add] = max(want[add], end)
		if end, there := want[ask]; table.has(&ask) != there {
			t.Fatalf("round %d: has an identity that ends with %d at %d: %v", n, end, now, !there)
		}
		if table.count != len(want) {
			t.Fatalf("round %d: %d identities, want %d", n, table.count, len(want))
		}
	}
	if n := table.forgetOldest(); n <= maxIdentities/64 || n+table.count != len(want) {
		t.Errorf("%d of %d went, %d stay", n, len(want), table.count)
	}
	first := now + 21
	for id, end := range want {
		if table.has(&id) {
			first = min(first, end)
		}
	}
	for id, end := range want {
		if table.has(&id) != (end >= first) {
			t.Fatalf("%d: forgotten, but not those that end with %d", end, first)
		}
	}
	table.forgetBefore(now + 100)
	for range identityShards {
		table.forgetBefore(now + 100)
	}
	slots := 0
	for i := range table.shards {
		slots += len(table.shards[i].slots)
	}
	if table.count != 0 || len(table.ends) != 0 || slots != 0 {
		t.Errorf("%d identities, %d buckets, %d slots", table.count, len(table.ends), slots)
	}
}
