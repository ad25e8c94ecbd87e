package caddymodule

import (
	"encoding/binary"
	"maps"
	"slices"

	"github.com/caddy-wechat/caddy-wechat/internal/offheap"
)

// identities are the answered pushes whose answers are gone, until their timestamps leave the window. They are kept
// in some twenty bytes each: 88 bits of the push's sum, in pages outside of Go's heap. That a new push is taken for one of a million
// has a chance of 1 in 10^20, and nobody can bring it about. Its caller has the table's lock.
//
// The first bits of an identity say in which page it is. A page that is full is split in two, and two that are nearly empty become
// one, so that no push ever has to see to more than a few pages, however many there are.
type identities struct {
	directory []uint32 // the number of the page of all that begin with those bits
	depth     int      // how many bits the directory goes by
	pages     int
	blocks    []*offheap.Block // the pages, by number

	ends    map[int64]int // how many of those that count end with a bucket
	count   int
	floor   int64 // the bucket before which all are over
	dropped int64 // the bucket before which all were let go because there were too many
	tidied  int   // pages that were looked at since the last bucket ended, whether they are worth keeping
	merged  bool  // and one of them was not
}

// identityPage is an open-addressing table of slots, of those with the same first bits. What is kept of the page itself is behind
// them: those bits, how many they are, and how many slots are taken.
type identityPage [identityPageSize]byte

// identitySlot is eleven bytes of the identity, and 24 bits of the bucket with which it ends. Zero is a free one.
type identitySlot [14]byte

const (
	identityPageSize   = 4 << 10
	identityBlockPages = 16
	identitySlots      = (identityPageSize - 8) / len(identitySlot{})
	identityFill       = identitySlots * 9 / 10 // of a page, before it is split
	identityMaxDepth   = 20                     // one page in a million: what has so many bits in common is no sum of anything
	slotBuckets        = 1<<24 - 1              // after which a slot's numbers begin again: eight years

	identityPagePrefix = identityPageSize - 8
	identityPageDepth  = identityPageSize - 4
	identityPageUsed   = identityPageSize - 2
)

func (p *identityPage) slot(i int) *identitySlot { return (*identitySlot)(p[i*len(identitySlot{}):]) }
func (p *identityPage) prefix() int              { return int(binary.LittleEndian.Uint32(p[identityPagePrefix:])) }
func (p *identityPage) depth() int               { return int(p[identityPageDepth]) }
func (p *identityPage) used() int                { return int(binary.LittleEndian.Uint16(p[identityPageUsed:])) }

func (p *identityPage) begin(prefix, depth int) {
	*p = identityPage{}
	binary.LittleEndian.PutUint32(p[identityPagePrefix:], uint32(prefix)) //nolint:gosec // see identityMaxDepth
	p[identityPageDepth] = byte(depth)                                    //nolint:gosec // see identityMaxDepth
}

func (p *identityPage) use() {
	binary.LittleEndian.PutUint16(p[identityPageUsed:], uint16(p.used()+1)) //nolint:gosec // see identitySlots
}

func (s *identitySlot) bucket() uint32 { return binary.LittleEndian.Uint32(s[10:]) >> 8 }

// same reports whether a slot has the identity that begins with these bytes.
func (s *identitySlot) same(id []byte) bool {
	return binary.LittleEndian.Uint64(s[:]) == binary.LittleEndian.Uint64(id) && string(s[8:11]) == string(id[8:11])
}

// firstBits are the first bits of an identity, that many.
func firstBits(id []byte, bits int) int { return int(binary.BigEndian.Uint32(id) >> (32 - bits)) }

// place returns the slot of an identity, or the free one where it would be. There is a free one in every page.
func (p *identityPage) place(id []byte) *identitySlot {
	i := int(uint64(binary.LittleEndian.Uint32(id[4:])) * uint64(identitySlots) >> 32) //nolint:gosec // below identitySlots
	for {
		s := p.slot(i)
		if s.bucket() == 0 || s.same(id) {
			return s
		}
		if i++; i == identitySlots {
			i = 0
		}
	}
}

// put puts a slot of another page, or of what this one was, into this one.
func (p *identityPage) put(s *identitySlot) {
	*p.place(s[:11]) = *s
	p.use()
}

// slotBucket is what a slot has of a bucket: never zero.
func slotBucket(bucket int64) uint32 {
	return uint32(bucket%slotBuckets) + 1 //nolint:gosec // 24 bits
}

// from is the first bucket that has not ended.
func (t *identities) from() int64 { return max(t.floor, t.dropped) }

// ahead is how many buckets after that a slot's identity ends; very many if it ended before.
func (t *identities) ahead(s *identitySlot) int64 {
	return int64((s.bucket() + slotBuckets - slotBucket(t.from())) % slotBuckets)
}

// over reports whether a slot's identity counts no more.
func (t *identities) over(s *identitySlot) bool { return t.ahead(s) >= slotBuckets/2 }

func (t *identities) page(n int) *identityPage {
	return (*identityPage)(t.blocks[n/identityBlockPages].Bytes()[n%identityBlockPages*identityPageSize:])
}

// of is the number of an identity's page.
func (t *identities) of(id *pushID) int { return int(t.directory[firstBits(id[:], t.depth)]) }

// has reports whether an identity is among them.
func (t *identities) has(id *pushID) bool {
	if t.pages == 0 {
		return false
	}
	s := t.page(t.of(id)).place(id[:])
	return s.bucket() != 0 && !t.over(s)
}

// add keeps an identity until a bucket is over. It is false if there is no room for it.
func (t *identities) add(id *pushID, bucket int64) bool {
	if bucket < t.floor {
		return true
	}
	// What was let go because there were too many is told by its bucket from what stays.
	bucket = max(bucket, t.dropped)
	p := t.roomFor(id)
	if p == nil {
		return false
	}
	s := p.place(id[:])
	switch {
	case s.bucket() == 0:
		p.use()
	case !t.over(s):
		was := t.from() + t.ahead(s)
		if was >= bucket {
			return true
		}
		t.uncount(was, 1)
	}
	copy(s[:11], id[:])
	b := slotBucket(bucket)
	s[11], s[12], s[13] = byte(b), byte(b>>8), byte(b>>16) //nolint:gosec // its bytes
	t.ends[bucket]++
	t.count++
	return true
}

func (t *identities) uncount(bucket int64, n int) {
	t.count -= n
	if t.ends[bucket] -= n; t.ends[bucket] <= 0 {
		delete(t.ends, bucket)
	}
}

// roomFor returns an identity's page, which has a slot for it, or nil.
func (t *identities) roomFor(id *pushID) *identityPage {
	if t.pages == 0 {
		t.directory, t.depth = []uint32{0}, 0
		t.newPage(0, 0)
	}
	for {
		n := t.of(id)
		p := t.page(n)
		if p.used() < identityFill {
			return p
		}
		if t.purge(p); p.used() <= identityFill*3/4 { // or it would be full again soon
			return p
		}
		if t.split(n) {
			continue
		}
		if p.used() < identityFill {
			return p
		}
		return nil
	}
}

func (t *identities) newPage(prefix, depth int) (n int) {
	n = t.pages
	if t.pages++; n == len(t.blocks)*identityBlockPages {
		t.blocks = append(t.blocks, offheap.New(identityBlockPages*identityPageSize))
	}
	t.page(n).begin(prefix, depth)
	return n
}

// point has the directory have a page where it belongs.
func (t *identities) point(n int) {
	p := t.page(n)
	width := t.depth - p.depth()
	for i := p.prefix() << width; i < (p.prefix()+1)<<width; i++ {
		t.directory[i] = uint32(n) //nolint:gosec // see identityMaxDepth
	}
}

// purge frees the slots of those that are over.
func (t *identities) purge(p *identityPage) {
	was := *p
	p.begin(was.prefix(), was.depth())
	t.pour(&was, func(*identitySlot) *identityPage { return p })
}

// pour puts what counts of a page into others.
func (t *identities) pour(was *identityPage, into func(*identitySlot) *identityPage) {
	for i := range identitySlots {
		if s := was.slot(i); s.bucket() != 0 && !t.over(s) {
			into(s).put(s)
		}
	}
}

// split makes two pages of one, unless its identities have too many bits in common.
func (t *identities) split(n int) bool {
	was := *t.page(n)
	depth := was.depth() + 1
	if depth > identityMaxDepth {
		return false
	}
	if depth > t.depth {
		old := t.directory
		t.directory = make([]uint32, 2*len(old))
		for i, n := range old {
			t.directory[2*i], t.directory[2*i+1] = n, n
		}
		t.depth++
	}
	t.page(n).begin(was.prefix()<<1, depth)
	more := t.newPage(was.prefix()<<1|1, depth)
	t.point(more)
	halves := [2]*identityPage{t.page(n), t.page(more)}
	t.pour(&was, func(s *identitySlot) *identityPage { return halves[firstBits(s[:], depth)&1] })
	return true
}

// merge makes one page of one and that from which it was split, if both are nearly empty.
func (t *identities) merge(n int) bool {
	p := t.page(n)
	if p.depth() == 0 {
		return false
	}
	other := int(t.directory[(p.prefix()^1)<<(t.depth-p.depth())])
	o := t.page(other)
	if o.depth() != p.depth() {
		return false
	}
	t.purge(p)
	t.purge(o)
	if p.used()+o.used() > identityFill/2 {
		return false
	}
	if n > other {
		n, other, p, o = other, n, o, p
	}
	was := *p
	p.begin(was.prefix()>>1, was.depth()-1)
	t.pour(&was, func(*identitySlot) *identityPage { return p })
	t.pour(o, func(*identitySlot) *identityPage { return p })
	t.point(n)
	t.removePage(other)
	return true
}

// removePage gives a page's number to the last one, so that the last block is empty at some time.
func (t *identities) removePage(n int) {
	t.pages--
	if n != t.pages {
		*t.page(n) = *t.page(t.pages)
		t.point(n)
	}
	if last := len(t.blocks) - 1; t.pages <= last*identityBlockPages {
		t.blocks[last].Free()
		t.blocks = slices.Delete(t.blocks, last, last+1)
	}
}

// clear lets all go.
func (t *identities) clear() {
	for _, b := range t.blocks {
		b.Free()
	}
	t.blocks, t.pages, t.directory, t.depth, t.count = nil, 0, nil, 0, 0
	clear(t.ends)
}

// forgetBefore lets those go that ended before a bucket, which may be an earlier one than before: the clock was set back. One bucket back
// is none: somebody has looked at the clock before the bucket's end and comes after it. None of what is over by then counts again,
// for an identity is kept to the end of the bucket after the one that it ends in.
func (t *identities) forgetBefore(bucket int64) {
	if bucket == t.floor || bucket == t.floor-1 {
		if t.tidied < t.pages {
			t.tidy()
		}
		return
	}
	if bucket < t.floor {
		for n := range t.pages { // or what is over would count again
			t.purge(t.page(n))
		}
		t.dropped = 0
	}
	for b, n := range t.ends {
		if b < bucket {
			t.uncount(b, n)
		}
	}
	if bucket-t.floor >= slotBuckets/4 { // years: slots would take the past for the future
		t.clear()
	}
	t.floor, t.tidied, t.merged = bucket, 0, false
}

// tidy looks at one page, whether it is worth keeping: no push has to wait for all of them.
func (t *identities) tidy() {
	switch {
	case t.count*4 > t.pages*identityFill: // no page is nearly empty
		t.tidied = t.pages
		return
	case t.pages == 1 && t.count == 0:
		t.clear()
		return
	case t.merge(t.tidied):
		t.merged = true
		t.tidied = min(t.tidied, t.pages-1)
	default:
		t.tidied++
	}
	if t.tidied >= t.pages && t.merged {
		t.tidied, t.merged = 0, false
	}
}

// forgetOldest lets those go that end first, more than some, for the work to be worth it, and returns how many they were. Their slots
// are freed when their pages are full.
func (t *identities) forgetOldest(some int) int {
	before := t.count
	for _, b := range slices.Sorted(maps.Keys(t.ends)) {
		if before-t.count > some {
			break
		}
		t.uncount(b, t.ends[b])
		t.dropped = b + 1
	}
	return before - t.count
}
