package redisstore

import (
	"context"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

const (
	// A heartbeat is published every beatEvery on the way that changes go. When none of one's own has come back for
	// silenceMost, changes may go by unheard, whatever the connection looks like: it may be dead without a sign, or lead to
	// a server that is the master no more.
	beatEvery   = 300 * time.Millisecond
	silenceMost = time.Second
	// againFirst and againMost are the pauses before another attempt to listen, less half by chance: all nodes lose
	// their server at the same time.
	againFirst = 50 * time.Millisecond
	againMost  = time.Second
	// reportEvery is how rarely a trouble that lasts is reported again.
	reportEvery = 10 * time.Minute
	// maxHeard bounds the messages that wait for the listener.
	maxHeard = 64
	// leastVersion of Redis, the first number of it, runs our scripts.
	leastVersion = 7
)

var (
	// ErrEvicts: the server is set up to throw away records when it is full.
	ErrEvicts = errors.New("redis may throw away refresh tokens when its memory is full: set maxmemory-policy to noeviction")
	// ErrTooOld: the server is of before Redis 7.0, and refuses locks and claims.
	ErrTooOld = errors.New("redis is too old: version 7.0 or later is needed")

	errSilent = errors.New("nothing that is published comes back")
)

// Watch implements tokens.Bus.
func (s *Store) Watch(ctx context.Context, l tokens.Listener) {
	pause := againFirst
	var reported time.Time // zero: all is well
	for {
		well := false
		err := s.listen(ctx, l, func() {
			well, pause = true, againFirst
			if !reported.IsZero() {
				s.report(nil)
				reported = time.Time{}
			}
		})
		if well {
			l.Listening(false)
		}
		if ctx.Err() != nil {
			return
		}
		if now := time.Now(); reported.IsZero() || now.Sub(reported) >= reportEvery {
			reported = now
			s.report(failure(ctx, err))
		}
		t := time.NewTimer(pause/2 + mathrand.N(pause/2)) //nolint:gosec // no secret
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return
		}
		pause = min(2*pause, againMost)
	}
}

// listen subscribes and passes on what it hears until that fails or ctx ends. Begun is called when it listens, and
// again when the client has subscribed anew by itself.
func (s *Store) listen(ctx context.Context, l tokens.Listener, begun func()) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	sub := s.client.Subscribe(ctx, s.channel)
	defer func() { _ = sub.Close() }() // which ends Receive

	heard := make(chan any, maxHeard)
	failed := make(chan error, 1)
	begin := func() {
		l.Listening(true)
		begun()
		wg.Go(func() { s.checkServer(ctx) })
	}
	wg.Go(func() {
		for {
			msg, err := sub.Receive(ctx)
			if err != nil {
				failed <- err
				return
			}
			select {
			case heard <- msg:
			case <-ctx.Done():
				return
			}
		}
	})
	beats := time.NewTicker(beatEvery)
	defer beats.Stop()
	beating := make(chan struct{}, 1) // holds one element while a heartbeat is sent
	last := time.Now()
	for {
		select {
		case msg := <-heard:
			switch msg := msg.(type) {
			case *redis.Subscription:
				last = time.Now()
				begin()
			case *redis.Message:
				origin, name, _ := strings.Cut(msg.Payload, " ")
				switch {
				case origin == s.origin:
					last = time.Now()
				case name != "":
					l.Changed(name)
				}
			}
		case err := <-failed:
			return err
		case <-ctx.Done():
			return ctx.Err()
		case <-beats.C:
			if time.Since(last) > silenceMost {
				return errSilent
			}
			select {
			case beating <- struct{}{}:
				wg.Go(func() {
					defer func() { <-beating }()
					ctx, cancel := context.WithTimeout(ctx, silenceMost)
					defer cancel()
					_ = s.client.Publish(ctx, s.channel, s.origin+" ").Err() // it will not come back
				})
			default: // the one before is still on its way
			}
		}
	}
}

// checkServer reports a server that is not fit for what it is to keep. One that does not tell is taken to be.
func (s *Store) checkServer(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, silenceMost/2)
	defer cancel()
	for _, section := range []string{"server", "memory"} { // of two at once Redis knows nothing before 7.0
		info, err := s.client.Info(ctx, section).Result()
		if err != nil {
			return
		}
		if err := unfit(info); err != nil {
			s.report(err)
		}
	}
}

// unfit is what is wrong with a server by what it says of itself.
func unfit(info string) error {
	for line := range strings.Lines(info) {
		switch name, value, _ := strings.Cut(strings.TrimSpace(line), ":"); name {
		case "redis_version":
			major, _, _ := strings.Cut(value, ".")
			if n, err := strconv.Atoi(major); err == nil && n < leastVersion {
				return fmt.Errorf("%w; it is %.32s", ErrTooOld, value)
			}
		case "maxmemory_policy":
			if value != "noeviction" {
				return fmt.Errorf("%w; it is %.32s", ErrEvicts, value)
			}
		}
	}
	return nil
}

var _ tokens.Bus = (*Store)(nil)
