package tokens

import (
	"context"
	"errors"
	"time"
)

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

var (
	// ErrSwapped: the record is not what the writer took it for.
	ErrSwapped = errors.New("another node has changed the record meanwhile")
	// ErrLockHeld: a lock was not had, for somebody else holds it who is known to live. Only a store that can tell says so, and
	// not if it has failed since.
	ErrLockHeld = errors.New("another holds the lock")
	// ErrLockLost: the write was refused because the lock that it was made under is another's by now.
	ErrLockLost = errors.New("the lock was lost before the write")
)

// Swapper is what a Store may do beside, so that no write undoes one that its maker did not know of, be there a lock or
// not. A store without it relies on its locks.
type Swapper interface {
	// Swap writes a record if it is still what it was when it was read: old, or absent if that is nil. Otherwise nothing
	// changes, and the error wraps ErrSwapped. A record that has the next value already counts as written. It is durable
	// when nil is returned.
	Swap(ctx context.Context, name string, old, next []byte) error
}

// Bus is what a Store may do beside, so that nodes hear of each other's changes.
type Bus interface {
	// Watch tells l of what other nodes change, until ctx ends. Its calls of l come one after the other, and it returns
	// when the last has ended.
	Watch(ctx context.Context, l Listener)
}

// Listener is told by a Bus. Its methods must be quick.
type Listener interface {
	// Listening says on once every change from then on will be heard, also when that was so before and some may have
	// been missed in between; and off as soon as changes may go by unheard. At first it is off.
	Listening(on bool)
	// Changed names a record that another node has stored or deleted. It can be read as it is by now.
	Changed(name string)
}

// Ephemeral is what a Store may do beside: values that all nodes share for an exact time. They are gone when the store
// is emptied; no List names them, and no record has their names. Each method is one atomic step for all nodes. A ttl is
// more than zero.
type Ephemeral interface {
	// Claim keeps a value under a name for ttl, unless there is one. Of any number of callers with one name exactly one is
	// first; the others get its value.
	Claim(ctx context.Context, name string, value []byte, ttl time.Duration) (held []byte, first bool, err error)
	// Put keeps a value for ttl, in place of any earlier one.
	Put(ctx context.Context, name string, value []byte, ttl time.Duration) error
	// Replace keeps a value in place of one that there is, for as long as that was to be kept; the error is fs.ErrNotExist
	// if there is none.
	Replace(ctx context.Context, name string, value []byte) error
	// Peek returns a value; the error is fs.ErrNotExist if there is none.
	Peek(ctx context.Context, name string) ([]byte, error)
	// Take removes a value and returns it: of any number of callers one gets it, the others get fs.ErrNotExist. If the
	// error is another one, the value may be gone.
	Take(ctx context.Context, name string) ([]byte, error)
}

// Claims is what a Store may do beside, so that of work that may come to any node each piece is done by one: a claim says
// which node does it and how far that is, and nodes hear of each other and know who lives. Claims have names of their own.
type Claims interface {
	Ephemeral
	// ClaimAll is a claim of each name for its time, unless there is one: First, or else Held, the value that is there. It is
	// one exchange with the store for all of them, and for those of other callers at that moment. After an error, also that of
	// a store that has not answered within a time, any of the claims may have been made, and the slice is not to be used again.
	ClaimAll(claims []Claim, within time.Duration) error
	// PeekClaim returns a claim's value and how much of its time is left; the error is fs.ErrNotExist if there is none.
	PeekClaim(ctx context.Context, name string) (value []byte, left time.Duration, err error)
	// SwapClaim replaces a claim's value if it is still the old one, and its time too unless ttl is 0. It works in a store
	// that is full. After an error the value may have been replaced; also where swapped is false, if an answer got lost on the
	// way: a caller to whom it matters who did it looks for something of its own in the value.
	SwapClaim(ctx context.Context, name string, old, next []byte, ttl time.Duration) (swapped bool, err error)
	// Beat shows for ttl that a node lives, also in a store that is full. Lives reports whether it does.
	Beat(ctx context.Context, node string, ttl time.Duration) error
	Lives(ctx context.Context, node string) (bool, error)
	// Tell sends a message to a node. It may get lost, or be overtaken by another. Hear passes on what others tell a node, one
	// message after the other, until ctx ends; heard must be quick.
	Tell(ctx context.Context, node, message string) error
	Hear(ctx context.Context, node string, heard func(message string))
}

// Claim is one claim of Claims.
type Claim struct {
	Name  string
	Value []byte
	TTL   time.Duration

	First bool
	Held  []byte
}
