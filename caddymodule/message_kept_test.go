package caddymodule

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"reflect"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/offheap"
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
	used := 0
	for i := range s.index {
		used += s.index[i].used
	}
	if s.count != 0 || s.bytes != 0 || used != 0 || len(s.chunks) != 0 {
		t.Errorf("%d calls in %d bytes, %d in the index, %d chunks", s.count, s.bytes, used, len(s.chunks))
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
	if n := table.forgetOldest(defaultMaxIdentities / 64); n <= defaultMaxIdentities/64 || n+table.count != len(want) {
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
	most := table.pages
	table.forgetBefore(now + 100)
	for range 3 * most {
		table.forgetBefore(now + 100)
	}
	if most == 0 || table.count != 0 || len(table.ends) != 0 || table.pages != 0 || len(table.blocks) != 0 {
		t.Errorf("of %d pages there are %d in %d blocks, %d identities, %d buckets", most, table.pages, len(table.blocks), table.count, len(table.ends))
	}
}

// TestIdentitiesAlike: identities that no page can tell apart have room in one page, and no others suffer from it.
func TestIdentitiesAlike(t *testing.T) {
	t.Parallel()
	table := identities{ends: map[int64]int{}}
	other := pushID{0xff}
	table.add(&other, 9)
	kept := 0
	for n := range 2 * identitySlots {
		id := pushID{1, 2, 3, 4}
		binary.LittleEndian.PutUint32(id[4:], uint32(n)*0x9e3779b9)
		added := table.add(&id, 1)
		if added {
			kept++
		}
		if table.has(&id) != added {
			t.Fatalf("identity %d: added %v", n, added)
		}
	}
	if kept != identityFill || table.count != kept+1 || !table.has(&other) {
		t.Errorf("%d of %d fit into a page for %d, %d in all", kept, 2*identitySlots, identityFill, table.count)
	}
	table.forgetBefore(2)
	if id := (pushID{1, 2, 3, 4, 5}); !table.add(&id, 9) || !table.has(&id) || table.count != 2 {
		t.Errorf("no room after the others were over; %d identities", table.count)
	}
	for range 10 * identityMaxDepth {
		table.forgetBefore(2)
	}
	if table.pages != 1 || !table.has(&other) {
		t.Errorf("%d pages for two identities", table.pages)
	}
}

// TestIdentitiesTooMany: what is let go because there are too many does not come back, what comes after it stays.
func TestIdentitiesTooMany(t *testing.T) {
	t.Parallel()
	table := identities{ends: map[int64]int{}}
	id := func(n int) pushID { return shortSum([]byte(fmt.Sprint(n))) }
	add := func(n int, bucket int64) {
		t.Helper()
		if id := id(n); !table.add(&id, bucket) || !table.has(&id) {
			t.Fatalf("%d was not added", n)
		}
	}
	const each = defaultMaxIdentities/64 + 1
	for n := range 2 * each {
		add(n, int64(10+n/each))
	}
	if n := table.forgetOldest(defaultMaxIdentities / 64); n != each || table.count != each {
		t.Fatalf("%d went, %d stay", n, table.count)
	}
	add(3*each, 5) // ends before what stays
	add(0, 5)      // is one of those that went
	for n := range 2 * each {
		if id := id(n); table.has(&id) != (n >= each || n == 0) {
			t.Fatalf("has %d: %v", n, n < each)
		}
	}
	if table.count != each+2 || table.ends[11] != each+2 {
		t.Errorf("%d identities, %v", table.count, table.ends)
	}
	table.forgetBefore(9)
	table.forgetBefore(7) // the clock is set back
	add(4*each, 9)
	if id := id(1); table.has(&id) || table.count != each+3 || table.ends[9] != 1 {
		t.Errorf("%d identities, %v after the clock was set back", table.count, table.ends)
	}
}

// TestIdentitiesBucketEdge: who looked at the clock before a bucket's end and comes after it has no page looked through.
func TestIdentitiesBucketEdge(t *testing.T) {
	t.Parallel()
	table := identities{ends: map[int64]int{}}
	over, stays := shortSum([]byte("over")), shortSum([]byte("stays"))
	table.forgetBefore(1)
	if !table.add(&over, 2) || !table.add(&stays, 9) {
		t.Fatal("not added")
	}
	table.forgetBefore(3)
	table.forgetBefore(2)
	if table.floor != 3 || table.has(&over) || !table.has(&stays) || table.count != 1 {
		t.Errorf("the floor is %d, %d identities", table.floor, table.count)
	}
	table.forgetBefore(1)
	if table.floor != 1 || !table.has(&stays) {
		t.Errorf("the clock was set back, and the floor is %d", table.floor)
	}
}

// TestCallTableThrownAway: what a table keeps outside of Go's heap goes back to the system when nobody has the table any more; nothing
// else may make tables meanwhile.
func TestCallTableThrownAway(t *testing.T) {
	// What tests before this one threw away goes first, or it would go while this one measures.
	before, deadline := offheap.Mapped(), time.Now().Add(30*time.Second)
	for same := 0; same < 3; same++ {
		var collected atomic.Bool
		runtime.AddCleanup(new([64]byte), func(c *atomic.Bool) { c.Store(true) }, &collected)
		for !collected.Load() {
			if runtime.GC(); time.Now().After(deadline) {
				t.Fatal("what the collector finds is not cleaned up")
			}
			runtime.Gosched()
		}
		if now := offheap.Mapped(); now != before {
			before, same = now, -1
		}
	}
	fill := func() (most int64) {
		table := newCallTable(func(string) {})
		now, p := time.Now(), pace{3, defaultReplyTimeout}
		for n := range 60_000 {
			a := table.arrive(shortSum([]byte(fmt.Sprint(n))), now, 0, now.Unix()+300, p)
			table.finish(a.call, passiveReply{outcome: outcomeSealed, body: make([]byte, 300)}, now)
			table.leave(a.call, now)
		}
		a := table.arrive(pushID{}, now, 0, now.Unix()+300, p)
		table.finish(a.call, passiveReply{outcome: outcomeSealed, body: make([]byte, 1<<20)}, now)
		table.leave(a.call, now)
		if k := table.kept.find(pushID{}); k == nil || k.size() != keptHeader+1<<20 {
			t.Error("an answer of 1 MiB is not kept")
		}
		most = offheap.Mapped()
		runtime.KeepAlive(table)
		return most
	}
	if most := fill() - before; most < defaultMaxAnswers*3/4 || most > defaultMaxAnswers+4<<20 {
		t.Errorf("a full table of answers, and some 30,000 identities, have %d bytes", most)
	}
	deadline = time.Now().Add(30 * time.Second)
	for offheap.Mapped() > before {
		if runtime.GC(); time.Now().After(deadline) {
			t.Fatalf("%d bytes are mapped, %d were before", offheap.Mapped(), before)
		}
		runtime.Gosched()
	}
}
