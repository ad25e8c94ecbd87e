package tokens

import (
	"context"
	"errors"
	"testing"
	"time"
)

// stuckStore does not answer while it is stuck.
type stuckStore struct {
	*MemStore
	stuck chan struct{} // closed: it answers
}

func (s *stuckStore) Load(ctx context.Context, name string) ([]byte, error) {
	select {
	case <-s.stuck:
		return s.MemStore.Load(ctx, name)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func TestCheckStore(t *testing.T) {
	t.Parallel()
	store := &stuckStore{NewMemStore(), make(chan struct{})}
	m := NewManager()
	defer m.Close()
	if err := m.CheckStore(t.Context()); !errors.Is(err, ErrNotConfigured) {
		t.Errorf("before Use: %v", err)
	}
	api, err := NewClient(ClientOptions{Origins: []string{"http://127.0.0.1:1"}})
	if err != nil {
		t.Fatal(err)
	}
	m.Use(&Environment{Store: store, API: api, RosterEvery: -1})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := m.CheckStore(ctx); !errors.Is(err, ErrStore) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a store that hangs: %v", err)
	}
	close(store.stuck)
	if err := m.CheckStore(t.Context()); err != nil {
		t.Errorf("a store without that record: %v", err)
	}
}
