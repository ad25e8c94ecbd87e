package tokens

import (
	"context"
	"io/fs"
	"path"
	"slices"
	"sync"
)

// MemStore is a Store in memory, exact and with working locks, and Claims: for tests, and for what may be lost with the process.
// The zero value is not usable; see NewMemStore.
type MemStore struct {
	locks  keyLocks
	shared memShared

	mu      sync.Mutex
	records map[string][]byte
}

// NewMemStore returns an empty store.
func NewMemStore() *MemStore { return &MemStore{records: make(map[string][]byte)} }

// Load implements Store.
func (s *MemStore) Load(ctx context.Context, name string) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	value, ok := s.records[name]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return slices.Clone(value), nil
}

// Store implements Store.
func (s *MemStore) Store(ctx context.Context, name string, value []byte) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.records[name] = slices.Clone(value)
	return nil
}

// Delete implements Store.
func (s *MemStore) Delete(ctx context.Context, name string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.records, name)
	return nil
}

// List implements Store.
func (s *MemStore) List(ctx context.Context, prefix string) ([]string, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var names []string
	for name := range s.records {
		if path.Dir(name) == path.Clean(prefix) {
			names = append(names, name)
		}
	}
	return names, nil
}

// Lock implements Store.
func (s *MemStore) Lock(ctx context.Context, name string) (unlock func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return s.locks.lock(ctx, name)
}

var _ Store = (*MemStore)(nil)
