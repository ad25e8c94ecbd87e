// Package offheap has memory that Go's collector does not count. The collector lets the heap grow to twice what lives, so of large tables
// without pointers each byte costs two of the machine's; here it costs one. The price: what does not count does not delay the next
// collection either.
//
// Memory of a Block is bytes, zero at first. Where the system gives none it is on Go's heap.
package offheap

import (
	"runtime"
	"sync/atomic"
)

// pageSize is what the system gives memory by, or a multiple of it.
const pageSize = 4 << 10

// mapped is how much of the system's memory all blocks have.
var mapped atomic.Int64

// Mapped returns how many bytes outside of Go's heap there are in all blocks of this process.
func Mapped() int64 { return mapped.Load() }

// Block is one piece of memory. It belongs to whoever holds the Block, and lives until Free, or until nobody holds the Block any more.
// What Bytes returned must not be used after that: holding those bytes is not holding the Block.
type Block struct {
	bytes   []byte
	cleanup runtime.Cleanup // of what is mapped
	mapped  bool
}

// New returns a block of at least as many bytes, zero all of them.
func New(size int) *Block {
	size = (max(size, 1) + pageSize - 1) &^ (pageSize - 1)
	bytes, err := mapMemory(size)
	if err != nil {
		return &Block{bytes: make([]byte, size)}
	}
	mapped.Add(int64(size))
	b := &Block{bytes: bytes, mapped: true}
	b.cleanup = runtime.AddCleanup(b, unmap, bytes)
	return b
}

// Bytes is the block's memory.
func (b *Block) Bytes() []byte { return b.bytes }

// Size is how many bytes it has.
func (b *Block) Size() int { return len(b.bytes) }

// Free gives the memory back to the system. It may be called again.
func (b *Block) Free() {
	if b.mapped {
		b.cleanup.Stop()
		unmap(b.bytes)
	}
	b.bytes, b.mapped = nil, false
}

func unmap(bytes []byte) {
	unmapMemory(bytes)
	mapped.Add(-int64(len(bytes)))
}
