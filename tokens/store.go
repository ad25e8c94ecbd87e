package tokens

import "context"

// Store is where what must last is kept. Names are paths of segments joined by slashes; record bytes are opaque
// (and sealed, if the configuration has a seal key). Implementations are safe for concurrent use. Package storetest
// holds the tests that each of them must pass.
type Store interface {
	// Load returns the bytes of a record; the error is fs.ErrNotExist if there is none.
	Load(ctx context.Context, name string) ([]byte, error)
	// Store writes a record. It is durable when nil is returned.
	Store(ctx context.Context, name string, value []byte) error
	// Delete removes a record; it is no error if there is none.
	Delete(ctx context.Context, name string) error
	// List returns the full names of the records directly in a folder, in any order. It is for small folders only.
	// A folder that does not exist is empty.
	List(ctx context.Context, prefix string) ([]string, error)
	// Lock takes a lock that all nodes sharing the store respect, and waits for it until ctx ends. The lock is not a
	// fence: its holder reads again what it is about to change. Unlock must be called once, works after ctx ended,
	// and does not block for long.
	Lock(ctx context.Context, name string) (unlock func(), err error)
}
