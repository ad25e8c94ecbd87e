package tokens

import (
	"context"
	"io/fs"
	"slices"
	"sync"
	"time"
)

// memShared is the part of a MemStore that is Ephemeral and Claims. Its zero value is ready.
type memShared struct {
	mu     sync.Mutex
	values map[string]memValue
	ears   map[string][]chan string
}

type memValue struct {
	data []byte
	ends time.Time
}

// maxUnheard bounds the messages that wait for a listener; later ones get lost.
const maxUnheard = 256

// get returns a live value; mu is held.
func (s *memShared) get(key string) (memValue, bool) {
	v, ok := s.values[key]
	if ok && !time.Now().Before(v.ends) {
		delete(s.values, key)
		return memValue{}, false
	}
	return v, ok
}

// set keeps a value; mu is held.
func (s *memShared) set(key string, data []byte, ttl time.Duration) {
	if s.values == nil {
		s.values = make(map[string]memValue)
	}
	s.values[key] = memValue{append(make([]byte, 0, len(data)), data...), time.Now().Add(ttl)}
}

// claim is one claim; mu is held.
func (s *memShared) claim(key string, data []byte, ttl time.Duration) (held []byte, first bool) {
	if v, ok := s.get(key); ok {
		return slices.Clone(v.data), false
	}
	s.set(key, data, ttl)
	return slices.Clone(data), true
}

// The names of values, claims and nodes stay apart by their first byte.
func onceKey(name string) string  { return "o" + name }
func claimKey(name string) string { return "c" + name }
func nodeKey(name string) string  { return "n" + name }

// Claim implements Ephemeral.
func (s *MemStore) Claim(ctx context.Context, name string, value []byte, ttl time.Duration) (held []byte, first bool, err error) {
	if err := ctx.Err(); err != nil {
		return nil, false, err
	}
	s.shared.mu.Lock()
	defer s.shared.mu.Unlock()
	held, first = s.shared.claim(onceKey(name), value, ttl)
	return held, first, nil
}

// Put implements Ephemeral.
func (s *MemStore) Put(ctx context.Context, name string, value []byte, ttl time.Duration) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s.shared.mu.Lock()
	defer s.shared.mu.Unlock()
	s.shared.set(onceKey(name), value, ttl)
	return nil
}

// Peek implements Ephemeral.
func (s *MemStore) Peek(ctx context.Context, name string) ([]byte, error) {
	value, _, err := s.peek(ctx, onceKey(name))
	return value, err
}

func (s *MemStore) peek(ctx context.Context, key string) ([]byte, time.Duration, error) {
	if err := ctx.Err(); err != nil {
		return nil, 0, err
	}
	s.shared.mu.Lock()
	defer s.shared.mu.Unlock()
	v, ok := s.shared.get(key)
	if !ok {
		return nil, 0, fs.ErrNotExist
	}
	return slices.Clone(v.data), time.Until(v.ends), nil
}

// Take implements Ephemeral.
func (s *MemStore) Take(ctx context.Context, name string) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.shared.mu.Lock()
	defer s.shared.mu.Unlock()
	v, ok := s.shared.get(onceKey(name))
	if !ok {
		return nil, fs.ErrNotExist
	}
	delete(s.shared.values, onceKey(name))
	return v.data, nil
}

// Replace implements Ephemeral.
func (s *MemStore) Replace(ctx context.Context, name string, value []byte) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s.shared.mu.Lock()
	defer s.shared.mu.Unlock()
	v, ok := s.shared.get(onceKey(name))
	if !ok {
		return fs.ErrNotExist
	}
	s.shared.set(onceKey(name), value, time.Until(v.ends))
	return nil
}

// ClaimAll implements Claims.
func (s *MemStore) ClaimAll(claims []Claim, _ time.Duration) error {
	s.shared.mu.Lock()
	defer s.shared.mu.Unlock()
	for i := range claims {
		c := &claims[i]
		if held, first := s.shared.claim(claimKey(c.Name), c.Value, c.TTL); first {
			c.First = true
		} else {
			c.Held = held
		}
	}
	return nil
}

// PeekClaim implements Claims.
func (s *MemStore) PeekClaim(ctx context.Context, name string) ([]byte, time.Duration, error) {
	return s.peek(ctx, claimKey(name))
}

// SwapClaim implements Claims.
func (s *MemStore) SwapClaim(ctx context.Context, name string, old, next []byte, ttl time.Duration) (bool, error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	s.shared.mu.Lock()
	defer s.shared.mu.Unlock()
	v, ok := s.shared.get(claimKey(name))
	if !ok || !slices.Equal(v.data, old) {
		return false, nil
	}
	if ttl == 0 {
		ttl = time.Until(v.ends)
	}
	s.shared.set(claimKey(name), next, ttl)
	return true, nil
}

// Beat implements Claims.
func (s *MemStore) Beat(ctx context.Context, node string, ttl time.Duration) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s.shared.mu.Lock()
	defer s.shared.mu.Unlock()
	s.shared.set(nodeKey(node), nil, ttl)
	return nil
}

// Lives implements Claims.
func (s *MemStore) Lives(ctx context.Context, node string) (bool, error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	s.shared.mu.Lock()
	defer s.shared.mu.Unlock()
	_, ok := s.shared.get(nodeKey(node))
	return ok, nil
}

// Tell implements Claims.
func (s *MemStore) Tell(ctx context.Context, node, message string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s.shared.mu.Lock()
	defer s.shared.mu.Unlock()
	for _, ear := range s.shared.ears[node] {
		select {
		case ear <- message:
		default:
		}
	}
	return nil
}

// Hear implements Claims.
func (s *MemStore) Hear(ctx context.Context, node string, heard func(message string)) {
	ear := make(chan string, maxUnheard)
	s.shared.mu.Lock()
	if s.shared.ears == nil {
		s.shared.ears = make(map[string][]chan string)
	}
	s.shared.ears[node] = append(s.shared.ears[node], ear)
	s.shared.mu.Unlock()
	defer func() {
		s.shared.mu.Lock()
		defer s.shared.mu.Unlock()
		s.shared.ears[node] = slices.DeleteFunc(s.shared.ears[node], func(c chan string) bool { return c == ear })
	}()
	for {
		select {
		case m := <-ear:
			heard(m)
		case <-ctx.Done():
			return
		}
	}
}

var _ Claims = (*MemStore)(nil)
