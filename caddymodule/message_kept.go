package caddymodule

import (
	"encoding/binary"
	"slices"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/offheap"
)

// keptCalls are done calls that nobody holds any more, with their answers, oldest first. They lie in chunks outside of Go's heap:
// tens of thousands of them cost the garbage collector nothing and the machine no more than their own bytes, and the memory of those that
// go is that of those that come. Its caller has the table's lock.
type keptCalls struct {
	epoch  time.Time // times are kept as the distance from it
	index  [keptShards]keptIndex
	chunks []keptChunk
	first  uint16         // number of chunks[0]; numbers begin again at 0
	spare  *offheap.Block // of a chunk that is gone, for the next one
	bytes  int            // of all chunks, and of the index
	count  int
}

// keptAt is the place of a kept call: the chunk's number, and the offset in it.
type keptAt uint32

// keptChunk holds calls one after the other. Those before head are gone.
type keptChunk struct {
	memory *offheap.Block
	data   []byte // in it
	head   int
}

// keptChunkSize is that of a chunk; a call that would fill a quarter of one has a chunk of its own. The limit on all bytes keeps
// the chunks far below the numbers that there are.
const keptChunkSize = 64 << 10

// keptIndexBytes is what a call costs in the index.
const keptIndexBytes = 12

// Where things are in a kept call, in front of the answer's text.
const (
	keptID         = 0
	keptAnsweredAt = 16
	keptFirst      = 24
	keptValidUntil = 32
	keptLength     = 40 // of the text
	keptArrivals   = 44
	keptRun        = 45
	keptOutcome    = 46
	keptFlags      = 47
	keptHeader     = 48
)

const (
	keptDelivered = 1 << iota
	keptLate
	keptAbandoned
	keptOwned
)

// keptOutcomes are what an outcome's number stands for.
var keptOutcomes = [...]string{"", outcomePlain, outcomeSealed, outcomeUnusable, outcomeLost}

func newKeptCalls() keptCalls { return keptCalls{epoch: time.Now()} }

// keptCall is one kept call, valid until the next one is added or removed.
type keptCall []byte

func (k keptCall) id() pushID               { return pushID(k[keptID:]) }
func (k keptCall) validUntil() int64        { return int64(binary.LittleEndian.Uint64(k[keptValidUntil:])) } //nolint:gosec // as it was stored
func (k keptCall) arrivals() int            { return int(k[keptArrivals]) }
func (k keptCall) is(flag byte) bool        { return k[keptFlags]&flag != 0 }
func (k keptCall) size() int                { return keptHeader + int(binary.LittleEndian.Uint32(k[keptLength:])) }
func (k keptCall) offset(at int) (d int64)  { return int64(binary.LittleEndian.Uint64(k[at:])) }      //nolint:gosec // as it was stored
func (k keptCall) put(at int, offset int64) { binary.LittleEndian.PutUint64(k[at:], uint64(offset)) } //nolint:gosec // as it is read

func (k keptCall) set(flag byte, is bool) {
	if is {
		k[keptFlags] |= flag
	}
}

func (s *keptCalls) time(k keptCall, at int) time.Time {
	return s.epoch.Add(time.Duration(k.offset(at)))
}

// at returns the kept call at a place that the index has.
func (s *keptCalls) at(place keptAt) keptCall {
	return s.chunks[uint16(place>>16)-s.first].data[place&0xffff:] //nolint:gosec // the number is 16 bits of it
}

// find returns what is kept of a push, or nil.
func (s *keptCalls) find(id pushID) keptCall {
	if x, i := s.slot(&id); i >= 0 {
		return s.at(x.slots[i].place())
	}
	return nil
}

// has reports whether a kept call is the one that find finds.
func (s *keptCalls) has(k keptCall) bool {
	found := s.find(k.id())
	return found != nil && &found[0] == &k[0]
}

// forget has find find nothing of a push. What is kept of it goes when it is the oldest.
func (s *keptCalls) forget(id pushID) {
	if x, i := s.slot(&id); i >= 0 {
		x.remove(i)
	}
}

// slot is where the index has a push, or -1.
func (s *keptCalls) slot(id *pushID) (*keptIndex, int) {
	x, tag := s.indexOf(id), keptTag(id)
	if x.used == 0 {
		return x, -1
	}
	for i := x.home(tag); x.slots[i] != 0; i = x.next(i) {
		if x.slots[i].tag() == tag && s.at(x.slots[i].place()).id() == *id {
			return x, i
		}
	}
	return x, -1
}

// indexOf is the part of the index that a push is in.
func (s *keptCalls) indexOf(id *pushID) *keptIndex { return &s.index[id[0]%keptShards] }

// all are those that find finds.
func (s *keptCalls) all(yield func(keptCall) bool) {
	for i := range s.index {
		for _, slot := range s.index[i].slots {
			if slot != 0 && !yield(s.at(slot.place())) {
				return
			}
		}
	}
}

// keptIndex is an open-addressing table of places. The ids are in the calls; a slot has a part of them, so that few are looked at.
// There are several, so that none is large when it is made anew, which a push waits for.
type keptIndex struct {
	slots []keptSlot
	used  int
}

// keptSlot is a tag, and a place plus one. Zero is a free one.
type keptSlot uint64

const (
	keptShards   = 64
	keptMinSlots = 8
)

func newKeptSlot(tag uint32, place keptAt) keptSlot { return keptSlot(tag)<<32 | keptSlot(place+1) }

func (x keptSlot) tag() uint32   { return uint32(x >> 32) }
func (x keptSlot) place() keptAt { return keptAt(x&(1<<32-1)) - 1 }

func keptTag(id *pushID) uint32 { return binary.LittleEndian.Uint32(id[4:]) }

func (x *keptIndex) home(tag uint32) int { return int(uint64(tag) * uint64(len(x.slots)) >> 32) } //nolint:gosec // below the length

func (x *keptIndex) next(i int) int {
	if i++; i < len(x.slots) {
		return i
	}
	return 0
}

func (x *keptIndex) add(slot keptSlot) {
	if (x.used+1)*5 > len(x.slots)*4 || len(x.slots) > keptMinSlots && x.used < len(x.slots)/8 {
		old := x.slots
		x.slots, x.used = make([]keptSlot, max(keptMinSlots, (x.used+1)*25/16)), 0
		for _, s := range old {
			if s != 0 {
				x.put(s)
			}
		}
	}
	x.put(slot)
}

func (x *keptIndex) put(slot keptSlot) {
	i := x.home(slot.tag())
	for x.slots[i] != 0 {
		i = x.next(i)
	}
	x.slots[i] = slot
	x.used++
}

// remove frees a slot, and moves those behind it that it was in the way of.
func (x *keptIndex) remove(i int) {
	x.used--
	distance := func(from, to int) int { return (to - from + len(x.slots)) % len(x.slots) }
	for j := x.next(i); x.slots[j] != 0; j = x.next(j) {
		if distance(x.home(x.slots[j].tag()), j) >= distance(i, j) {
			x.slots[i], i = x.slots[j], j
		}
	}
	x.slots[i] = 0
}

// oldest returns the kept call that goes next, or nil.
func (s *keptCalls) oldest() keptCall {
	if len(s.chunks) == 0 {
		return nil
	}
	return s.chunks[0].data[s.chunks[0].head:]
}

// removeOldest lets the oldest one go.
func (s *keptCalls) removeOldest() {
	c, k := &s.chunks[0], s.oldest()
	id, place := k.id(), keptAt(s.first)<<16|keptAt(c.head) //nolint:gosec // a chunk with more than one call is small
	if x, i := s.slot(&id); i >= 0 && x.slots[i].place() == place {
		x.remove(i) // and not the one that followed on it
	}
	s.count--
	s.bytes -= keptIndexBytes
	if c.head += k.size(); c.head < len(c.data) {
		return
	}
	s.bytes -= c.memory.Size()
	if s.spare == nil && cap(c.data) == keptChunkSize {
		s.spare = c.memory
	} else {
		c.memory.Free()
	}
	s.chunks = slices.Delete(s.chunks, 0, 1)
	s.first++
}

// keep adds a call, or writes down what has changed of one that is kept. It is false if it was kept and is no longer.
func (s *keptCalls) keep(c *call) bool {
	if c.kept {
		k := s.find(c.id)
		if k == nil || !s.time(k, keptAnsweredAt).Equal(c.answeredAt) {
			return false
		}
		s.write(k, c)
		return true
	}
	size := keptHeader + len(c.answer.body)
	last := len(s.chunks) - 1
	if last < 0 || cap(s.chunks[last].data)-len(s.chunks[last].data) < size || size > keptChunkSize/4 {
		s.chunks = append(s.chunks, s.newChunk(size))
		last++
		s.bytes += s.chunks[last].memory.Size()
	}
	chunk := &s.chunks[last]
	offset := len(chunk.data)
	s.forget(c.id)                                             // one that was abandoned
	place := keptAt(s.first+uint16(last))<<16 | keptAt(offset) //nolint:gosec // see keptChunkSize
	s.indexOf(&c.id).add(newKeptSlot(keptTag(&c.id), place))
	chunk.data = chunk.data[:offset+size]
	k := keptCall(chunk.data[offset:])
	copy(k[keptID:], c.id[:])
	binary.LittleEndian.PutUint32(k[keptLength:], uint32(len(c.answer.body))) //nolint:gosec // max_body is at most 1 GiB
	k[keptOutcome] = byte(max(0, slices.Index(keptOutcomes[:], c.answer.outcome)))
	copy(k[keptHeader:], c.answer.body)
	s.write(k, c)
	s.count++
	s.bytes += keptIndexBytes
	return true
}

// newChunk returns an empty chunk: as a rule the one that is spare, for asking the system takes a while, under the table's lock. One for
// a call of its own has room for nothing else, whose offset might be beyond a keptAt.
func (s *keptCalls) newChunk(size int) keptChunk {
	memory := s.spare
	switch {
	case size > keptChunkSize/4:
		memory = offheap.New(size)
	case memory != nil:
		size, s.spare = keptChunkSize, nil
	default:
		size = keptChunkSize
		memory = offheap.New(size)
	}
	return keptChunk{memory: memory, data: memory.Bytes()[:0:size]}
}

// write writes down what may change of a kept call.
func (s *keptCalls) write(k keptCall, c *call) {
	k.put(keptAnsweredAt, int64(c.answeredAt.Sub(s.epoch)))
	k.put(keptFirst, int64(c.first.Sub(s.epoch)))
	k.put(keptValidUntil, c.validUntil)
	k[keptArrivals], k[keptRun] = byte(min(c.arrivals, 255)), byte(min(c.run, 255)) //nolint:gosec // bounded
	k[keptFlags] = 0
	k.set(keptDelivered, c.delivered)
	k.set(keptLate, c.late)
	k.set(keptAbandoned, c.abandoned)
	k.set(keptOwned, c.owned)
}

// call makes a call of a kept one. Its answer is a copy.
func (s *keptCalls) call(k keptCall) *call {
	return &call{
		id: k.id(), kept: true, done: true, first: s.time(k, keptFirst), answeredAt: s.time(k, keptAnsweredAt), validUntil: k.validUntil(),
		arrivals: k.arrivals(), run: int(k[keptRun]),
		delivered: k.is(keptDelivered), late: k.is(keptLate), abandoned: k.is(keptAbandoned), owned: k.is(keptOwned),
		answer: passiveReply{outcome: keptOutcomes[k[keptOutcome]], body: append([]byte(nil), k[keptHeader:k.size()]...)},
	}
}
