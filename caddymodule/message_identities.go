package caddymodule

import (
	"encoding/binary"
	"maps"
	"slices"
)

// identities are the answered pushes whose answers are gone, until their timestamps leave the window. A million of them are kept
// in twenty bytes each: 96 bits of the push's sum, in tables without pointers or lists. That a new push is taken for one of a million
// has a chance of 1 in 10^22, and nobody can bring it about. Its caller has the table's lock.
type identities struct {
	shards [identityShards]identityShard
	ends   map[int64]int // how many of those that count end with a bucket
	count  int
	floor  int64 // the bucket before which all are over
	tidied int   // shards whose memory was looked at since the last bucket ended
}

// identityShard is an open-addressing table of those whose first byte is the same, so that no table is large: it is made anew when
// it has grown, and when most of it is over.
type identityShard struct {
	slots []identitySlot
	used  int
}

// identitySlot is eleven bytes of the identity after the first, and 24 bits of the bucket with which it ends. Zero is a free one.
type identitySlot [14]byte

const (
	identityShards   = 1 << 8
	identityMinSlots = 16
	slotBuckets      = 1<<24 - 1 // after which a slot's numbers begin again: eight years
)

func (s *identitySlot) bucket() uint32 {
	return uint32(s[11]) | uint32(s[12])<<8 | uint32(s[13])<<16
}

// slotBucket is what a slot has of a bucket: never zero.
func slotBucket(bucket int64) uint32 {
	return uint32(bucket%slotBuckets) + 1 //nolint:gosec // 24 bits
}

// ahead is how many buckets after the floor a slot's identity ends; very many if it ended before.
func (t *identities) ahead(s *identitySlot) int64 {
	return int64((s.bucket() + slotBuckets - slotBucket(t.floor)) % slotBuckets)
}

// over reports whether a slot's identity counts no more.
func (t *identities) over(s *identitySlot) bool { return t.ahead(s) >= slotBuckets/2 }

// place returns the slot of an identity, or the free one where it would be; nil without slots.
func (sh *identityShard) place(id []byte) *identitySlot {
	if len(sh.slots) == 0 {
		return nil
	}
	i := uint64(binary.LittleEndian.Uint32(id)) * uint64(len(sh.slots)) >> 32
	for {
		s := &sh.slots[i]
		if s.bucket() == 0 || string(s[:11]) == string(id[:11]) {
			return s
		}
		if i++; i == uint64(len(sh.slots)) {
			i = 0
		}
	}
}

// has reports whether an identity is among them.
func (t *identities) has(id *pushID) bool {
	s := t.shards[id[0]].place(id[1:12])
	return s != nil && s.bucket() != 0 && !t.over(s)
}

// add keeps an identity until a bucket is over.
func (t *identities) add(id *pushID, bucket int64) {
	if bucket < t.floor {
		return
	}
	sh := &t.shards[id[0]]
	if (sh.used+1)*5 > len(sh.slots)*4 {
		t.rebuild(sh, 1)
	}
	s := sh.place(id[1:12])
	switch {
	case s.bucket() == 0:
		sh.used++
	case !t.over(s):
		was := t.floor + t.ahead(s)
		if was >= bucket {
			return
		}
		t.uncount(was, 1)
	}
	copy(s[:], id[1:12])
	b := slotBucket(bucket)
	s[11], s[12], s[13] = byte(b), byte(b>>8), byte(b>>16) //nolint:gosec // its bytes
	t.ends[bucket]++
	t.count++
}

func (t *identities) uncount(bucket int64, n int) {
	t.count -= n
	if t.ends[bucket] -= n; t.ends[bucket] <= 0 {
		delete(t.ends, bucket)
	}
}

// rebuild makes a shard's table anew, with room for some more.
func (t *identities) rebuild(sh *identityShard, more int) {
	old, live := sh.slots, 0
	for i := range old {
		if old[i].bucket() != 0 && !t.over(&old[i]) {
			live++
		}
	}
	sh.slots, sh.used = nil, live
	if live+more == 0 {
		return
	}
	sh.slots = make([]identitySlot, max(identityMinSlots, (live+more)*25/16))
	for i := range old {
		if old[i].bucket() != 0 && !t.over(&old[i]) {
			*sh.place(old[i][:11]) = old[i]
		}
	}
}

// forgetBefore lets those go that ended before a bucket, which may be an earlier one than before: the clock was set back.
func (t *identities) forgetBefore(bucket int64) {
	if bucket == t.floor {
		if t.tidied < identityShards {
			t.tidy()
		}
		return
	}
	if bucket < t.floor {
		for i := range t.shards { // or what is over would count again
			t.rebuild(&t.shards[i], 0)
		}
	}
	for b, n := range t.ends {
		if b < bucket {
			t.uncount(b, n)
		}
	}
	if bucket-t.floor >= slotBuckets/4 { // years: slots would take the past for the future
		t.shards = [identityShards]identityShard{}
		t.count = 0
		clear(t.ends)
	}
	t.floor, t.tidied = bucket, 0
}

// tidy looks at one shard, whether it is worth making it smaller: no push has to wait for all of them.
func (t *identities) tidy() {
	sh := &t.shards[t.tidied]
	t.tidied++
	if len(sh.slots) > 4*identityMinSlots && sh.used*identityShards > 2*t.count {
		t.rebuild(sh, 0)
	}
}

// forgetOldest lets those go that end first, enough of them for the work to be worth it, and returns how many they were.
func (t *identities) forgetOldest() int {
	before, floor := t.count, t.floor
	buckets := slices.Sorted(maps.Keys(t.ends))
	for _, b := range buckets {
		if before-t.count > maxIdentities/64 {
			break
		}
		t.uncount(b, t.ends[b])
		t.floor = b + 1
	}
	for i := range t.shards {
		t.rebuild(&t.shards[i], 0)
	}
	t.floor = floor // the clock is not that far, and what comes may end before those that stay
	return before - t.count
}
