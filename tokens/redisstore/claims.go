package redisstore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

const (
	// maxBatch is how many callers' claims one pipeline takes. As many that wait do not wait for the one under way, up to
	// maxPipelines at once.
	maxBatch     = 64
	maxPipelines = 4
	// pipelineLimit bounds a pipeline, with all its attempts. Callers have limits of their own.
	pipelineLimit = time.Second
	// quietMost is how long nothing is told before a connection that is listened to is tested.
	quietMost = 5 * time.Second
)

// errSlow: the store has not answered in time.
var errSlow = errors.New("redis did not answer in time")

// batcher sends claims of many callers together: at once when nothing is under way, and else with all that come until
// the pipeline before is over. A system call costs more than a claim, so that load makes claims cheaper.
type batcher struct {
	mu      sync.Mutex
	closed  bool
	running int
	waiting []*claimant
}

// claimant is a caller of ClaimAll.
type claimant struct {
	claims []tokens.Claim
	done   chan error
	timer  *time.Timer
	gone   bool // it did not wait so long; under the batcher's mu
}

var claimants = sync.Pool{New: func() any {
	c := &claimant{done: make(chan error, 1), timer: time.NewTimer(time.Hour)}
	c.timer.Stop()
	return c
}}

// ClaimAll implements tokens.Claims.
func (s *Store) ClaimAll(claims []tokens.Claim, within time.Duration) error {
	c := claimants.Get().(*claimant)
	c.claims = claims
	b := &s.claims
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return fmt.Errorf("redis: %w", tokens.ErrClosed)
	}
	b.waiting = append(b.waiting, c)
	if b.running == 0 || len(b.waiting) >= maxBatch && b.running < maxPipelines {
		b.running++
		s.work.Go(s.sendClaims)
	}
	b.mu.Unlock()
	c.timer.Reset(within)
	select {
	case err := <-c.done:
		c.timer.Stop()
		c.claims = nil
		claimants.Put(c)
		return err
	case <-c.timer.C:
		b.mu.Lock()
		c.gone = true // c may still be written to
		b.mu.Unlock()
		return errSlow
	}
}

// sendClaims sends pipelines until nobody waits.
func (s *Store) sendClaims() {
	b := &s.claims
	batch := make([]*claimant, 0, maxBatch)
	for {
		runtime.Gosched() // who is about to claim does so first; on an idle machine that is nobody, and takes no time
		b.mu.Lock()
		n := 0
		batch = batch[:0]
		for n < len(b.waiting) && len(batch) < maxBatch {
			if c := b.waiting[n]; !c.gone { // a store that comes back is spared what nobody waits for any more
				batch = append(batch, c)
			}
			n++
		}
		rest := copy(b.waiting, b.waiting[n:])
		clear(b.waiting[rest:])
		b.waiting = b.waiting[:rest]
		if len(batch) == 0 {
			b.running--
			b.mu.Unlock()
			return
		}
		b.mu.Unlock()
		s.sendBatch(batch)
	}
}

func (s *Store) sendBatch(batch []*claimant) {
	ctx, cancel := context.WithTimeout(context.Background(), pipelineLimit)
	defer cancel()
	pipe := s.client.Pipeline()
	var room [maxBatch]*redis.StringCmd
	cmds := room[:0]
	for _, c := range batch {
		for i := range c.claims {
			claim := &c.claims[i]
			cmd := redis.NewStringCmd(ctx, "set", s.claimKey(claim.Name), claim.Value, "nx", "get", "px", milliseconds(claim.TTL))
			_ = pipe.Process(ctx, cmd) // only queued
			cmds = append(cmds, cmd)
		}
	}
	// Each command has its error, but for what a server says to a new connection, such as that the password is wrong: go-redis
	// leaves the commands, none of which was sent, without any.
	if _, err := pipe.Exec(ctx); err != nil && !slices.ContainsFunc(cmds, func(c *redis.StringCmd) bool { return c.Err() != nil }) {
		for _, cmd := range cmds {
			cmd.SetErr(err)
		}
	}
	for _, c := range batch {
		var failed error
		for i := range c.claims {
			held, err := cmds[0].Bytes()
			cmds = cmds[1:]
			switch {
			case err == nil:
				c.claims[i].Held = held
			case isNil(err):
				c.claims[i].First = true
			default:
				failed = s.failure(ctx, err)
			}
		}
		c.done <- failed
	}
}

// PeekClaim implements tokens.Claims.
func (s *Store) PeekClaim(ctx context.Context, name string) (value []byte, left time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, operationLimit)
	defer cancel()
	answer, err := s.run(ctx, peekClaimScript, []string{s.claimKey(name)}).Slice()
	switch {
	case isNil(err):
		return nil, 0, fs.ErrNotExist
	case err != nil:
		return nil, 0, s.failure(ctx, err)
	}
	if len(answer) == 2 {
		text, isText := answer[0].(string)
		n, isNumber := answer[1].(int64)
		if isText && isNumber {
			return []byte(text), time.Duration(n) * time.Millisecond, nil
		}
	}
	return nil, 0, errors.New("redis: the claim is none")
}

// SwapClaim implements tokens.Claims.
func (s *Store) SwapClaim(ctx context.Context, name string, old, next []byte, ttl time.Duration) (swapped bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, operationLimit)
	defer cancel()
	var keep int64 // 0: the time stays
	if ttl > 0 {
		keep = milliseconds(ttl)
	}
	n, err := s.run(ctx, swapClaimScript, []string{s.claimKey(name)}, old, next, keep).Int()
	return n == 1, s.failure(ctx, err)
}

// Beat implements tokens.Claims.
func (s *Store) Beat(ctx context.Context, node string, ttl time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, operationLimit)
	defer cancel()
	return s.failure(ctx, s.run(ctx, beatScript, []string{s.nodeKey(node)}, milliseconds(ttl)).Err())
}

// Lives implements tokens.Claims.
func (s *Store) Lives(ctx context.Context, node string) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, operationLimit)
	defer cancel()
	err := s.client.Get(ctx, s.nodeKey(node)).Err()
	if isNil(err) {
		return false, nil
	}
	return err == nil, s.failure(ctx, err)
}

// Tell implements tokens.Claims.
func (s *Store) Tell(ctx context.Context, node, message string) error {
	ctx, cancel := context.WithTimeout(ctx, operationLimit)
	defer cancel()
	return s.failure(ctx, s.client.Publish(ctx, s.nodeKey(node), message).Err())
}

// Hear implements tokens.Claims.
func (s *Store) Hear(ctx context.Context, node string, heard func(message string)) {
	pause := againFirst
	for ctx.Err() == nil {
		if s.hear(ctx, node, heard) {
			pause = againFirst
		}
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
		pause = min(2*pause, againMost)
	}
}

// hear listens until its connection fails, and reports whether there was one.
func (s *Store) hear(ctx context.Context, node string, heard func(message string)) (well bool) {
	sub := s.client.Subscribe(ctx, s.nodeKey(node))
	defer func() { _ = sub.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = sub.Close() }) // which ends the receiving
	defer stop()
	tested := false
	for {
		msg, err := sub.ReceiveTimeout(ctx, s.quiet)
		if err != nil {
			timeout, ok := errors.AsType[net.Error](err)
			if !ok || !timeout.Timeout() || tested || ctx.Err() != nil || sub.Ping(ctx) != nil {
				return well
			}
			tested = true
			continue
		}
		well, tested = true, false
		if m, ok := msg.(*redis.Message); ok {
			heard(m.Payload)
		}
	}
}

func (s *Store) claimKey(name string) string { return s.prefix + "claim:" + name }
func (s *Store) nodeKey(node string) string  { return s.prefix + "node:" + node }

var _ tokens.Claims = (*Store)(nil)
