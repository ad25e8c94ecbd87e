package redisstore

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

const (
	// tokenLength is that of rand.Text.
	tokenLength = 26
	// takenLife is how long a value that was taken is kept for who took it, whose answer may have got lost. An app that was
	// told to try again does so within that time.
	takenLife = time.Minute
	// maxDoubts bounds the values of which a store does not know whether it took them. Callers ask an absent Redis rarely.
	maxDoubts = 10_000
	// maxDoubtsOfOne bounds the calls for one value that are in doubt at the same time.
	maxDoubtsOfOne = 4
)

// Claim implements tokens.Ephemeral.
func (s *Store) Claim(ctx context.Context, name string, value []byte, ttl time.Duration) (held []byte, first bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, operationLimit)
	defer cancel()
	answer, err := s.run(ctx, claimScript, []string{s.onceKey(name)}, rand.Text(), value, milliseconds(ttl)).Slice()
	if err != nil {
		return nil, false, s.failure(ctx, err)
	}
	if len(answer) == 2 {
		n, isNumber := answer[0].(int64)
		text, isText := answer[1].(string)
		if isNumber && isText {
			return []byte(text), n == 1, nil
		}
	}
	return nil, false, errors.New("redis: the answer to a claim is none")
}

// Put implements tokens.Ephemeral.
func (s *Store) Put(ctx context.Context, name string, value []byte, ttl time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, operationLimit)
	defer cancel()
	ttl = time.Duration(milliseconds(ttl)) * time.Millisecond
	return s.failure(ctx, s.client.Set(ctx, s.onceKey(name), rand.Text()+string(value), ttl).Err())
}

// Replace implements tokens.Ephemeral.
func (s *Store) Replace(ctx context.Context, name string, value []byte) error {
	ctx, cancel := context.WithTimeout(ctx, operationLimit)
	defer cancel()
	replaced, err := s.client.SetXX(ctx, s.onceKey(name), rand.Text()+string(value), redis.KeepTTL).Result()
	if err == nil && !replaced {
		return fs.ErrNotExist
	}
	return s.failure(ctx, err)
}

// Peek implements tokens.Ephemeral.
func (s *Store) Peek(ctx context.Context, name string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, operationLimit)
	defer cancel()
	held, err := s.client.Get(ctx, s.onceKey(name)).Bytes()
	switch {
	case isNil(err):
		return nil, fs.ErrNotExist
	case err != nil:
		return nil, s.failure(ctx, err)
	case len(held) < tokenLength:
		return nil, fmt.Errorf("redis: the value of %q is not one of ours", name)
	}
	return held[tokenLength:], nil
}

// Take implements tokens.Ephemeral. If Redis' answer got lost, nobody was given what may have been taken: the next call asks
// by the same token, to which Redis then gives it, whenever what was asked first arrives. One call at a time has that token.
func (s *Store) Take(ctx context.Context, name string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, operationLimit)
	defer cancel()
	doubts, _ := s.doubts.Take(name, nil)
	if len(doubts) == 0 {
		doubts = []string{rand.Text()}
	}
	key := s.onceKey(name)
	for i, token := range doubts {
		value, err := s.run(ctx, takeScript, []string{key, key + ":taken"}, token, takenLife.Milliseconds()).Text()
		switch {
		case err == nil:
			return []byte(value), nil
		case !isNil(err):
			s.doubt(name, doubts[i:])
			return nil, s.failure(ctx, err)
		}
	}
	return nil, fs.ErrNotExist
}

// doubt remembers tokens by one of which a value may have been taken. Calls at the same time have one each.
func (s *Store) doubt(name string, by []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	more, _ := s.doubts.Take(name, nil)
	by = append(slices.Clip(by), more...)
	s.doubts.Set(name, by[:min(len(by), maxDoubtsOfOne)], takenLife)
}

func (s *Store) onceKey(name string) string { return s.prefix + "once:{" + braces.Replace(name) + "}" }

// milliseconds is a ttl for Redis, which knows nothing shorter.
func milliseconds(ttl time.Duration) int64 { return max(1, ttl.Milliseconds()) }

var _ tokens.Ephemeral = (*Store)(nil)
