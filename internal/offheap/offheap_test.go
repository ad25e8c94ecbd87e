package offheap

import (
	"errors"
	"runtime"
	"slices"
	"testing"
	"time"
)

// TestBlock: memory is whole pages of zeros that can be written to, of the system's or, if it gives none, of Go's.
func TestBlock(t *testing.T) {
	system := mapMemory
	t.Cleanup(func() { mapMemory = system })
	for name, from := range map[string]func(int) ([]byte, error){
		"the system's": system,
		"Go's":         func(int) ([]byte, error) { return nil, errors.ErrUnsupported },
	} {
		mapMemory = from
		for _, size := range []int{0, 1, pageSize, pageSize + 1, 1 << 20} {
			b := New(size)
			if b.Size() < max(size, 1) || b.Size()%pageSize != 0 || b.Size() >= size+2*pageSize || len(b.Bytes()) != b.Size() {
				t.Errorf("%s: %d bytes for %d", name, b.Size(), size)
			}
			if slices.ContainsFunc(b.Bytes(), func(c byte) bool { return c != 0 }) {
				t.Errorf("%s: %d bytes are not zero", name, size)
			}
			for i := range b.Bytes() {
				b.Bytes()[i] = byte(i)
			}
			for range 2 {
				if b.Free(); b.Bytes() != nil || b.Size() != 0 {
					t.Errorf("%s: %d bytes are there after they were freed", name, b.Size())
				}
			}
		}
	}
}

// TestBlockThrownAway: a block that nobody holds gives its memory back, and one that was freed does so once.
func TestBlockThrownAway(t *testing.T) {
	const blocks, size = 1000, 64 << 10
	before := Mapped()
	held := New(size)
	one := Mapped() - before
	for i := range blocks {
		b := New(size)
		b.Bytes()[i] = 1
		if i%2 == 0 {
			b.Free()
		}
	}
	deadline := time.Now().Add(30 * time.Second)
	for Mapped() > before+one {
		if runtime.GC(); time.Now().After(deadline) {
			t.Fatalf("%d bytes are mapped for one block", Mapped())
		}
		runtime.Gosched()
	}
	if Mapped() != before+one || held.Bytes()[0] != 0 {
		t.Errorf("%d bytes are mapped for one block", Mapped())
	}
	held.Free()
	held.Free()
	if Mapped() != before {
		t.Errorf("%d bytes are mapped for no block", Mapped())
	}
}
