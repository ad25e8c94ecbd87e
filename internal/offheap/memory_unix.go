//go:build unix

package offheap

import "golang.org/x/sys/unix"

// mapMemory asks the system for memory. It is a variable for tests of what is done without.
var mapMemory = func(size int) ([]byte, error) {
	return unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
}

func unmapMemory(bytes []byte) {
	_ = unix.Munmap(bytes) // fails for what is not mapped alone
}
