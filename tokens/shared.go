package tokens

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"time"

	"github.com/caddy-wechat/caddy-wechat/crypto"
)

// What nodes share of logins is kept in the store's Ephemeral, if it has one, sealed as records are. A visitor or an app
// waits for each step, so that none takes long, and a store that does not answer is asked once in a while and not by
// each of them: meanwhile this node goes on alone.

const (
	// sharedWait bounds one step.
	sharedWait = 500 * time.Millisecond
	// sharedPause is for how long nobody waits for the store after a step that it did not answer.
	sharedPause = time.Second
	// sharedLogEvery is how rarely the log hears of it again.
	sharedLogEvery = 10 * time.Minute
)

var (
	// errAlone: nothing is shared now. The store has no Ephemeral, or does not answer.
	errAlone = errors.New("not shared with other nodes")
	// errForeign: another node shares something that this one cannot read.
	errForeign = errors.New("a value that nodes share does not open with any seal_key")
)

// sharing is what is known of how the store answers. One that is full can still be read.
type sharing struct{ reads, writes gate }

// gate keeps callers from waiting one after the other for a store that does not answer.
type gate struct {
	mu    sync.Mutex
	away  bool
	again time.Time // while away: when one caller may look
	said  time.Time
}

// enter reports whether the store may be asked.
func (g *gate) enter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.away {
		return true
	}
	now := time.Now()
	if now.Before(g.again) {
		return false
	}
	g.again = now.Add(sharedPause)
	return true
}

// settle notes how the store answered. Say is for the log: it has not heard of that lately.
func (g *gate) settle(ok bool) (say bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	if ok {
		say, g.away = g.away && !g.said.IsZero(), false
		if say {
			g.said = time.Time{}
		}
		return say
	}
	g.away, g.again = true, now.Add(sharedPause)
	if say = g.said.IsZero() || now.Sub(g.said) >= sharedLogEvery; say {
		g.said = now
	}
	return say
}

// sharedStep is one step in the store. The error is fs.ErrNotExist or errForeign if the store says so, and otherwise
// wraps errAlone.
func (m *Manager) sharedStep(ctx context.Context, g *gate, step func(context.Context, *Environment, Ephemeral) error) error {
	env, err := m.current()
	if err != nil {
		return fmt.Errorf("%w: %w", errAlone, err)
	}
	values, ok := env.Store.(Ephemeral)
	if !ok || !g.enter() {
		return errAlone
	}
	err = env.operate(ctx, "share", sharedWait, func(ctx context.Context) error { return step(ctx, env, values) }, fs.ErrNotExist, errForeign)
	switch {
	case err == nil, errors.Is(err, fs.ErrNotExist), errors.Is(err, errForeign):
		if g.settle(true) {
			env.Log.Info("logins are shared with the other nodes again")
		}
		return err
	case ctx.Err() == nil && g.settle(false):
		env.Log.Warn("logins are not shared with other nodes for now: the store does not answer in time, or is full; they go on here, and only here", "error", err)
	}
	return fmt.Errorf("%w: %w: %w", errAlone, ErrStore, err)
}

// sharedPut keeps in, a struct, for ttl.
func (m *Manager) sharedPut(ctx context.Context, name string, in any, ttl time.Duration) error {
	return m.sharedStep(ctx, &m.shares.writes, func(ctx context.Context, env *Environment, values Ephemeral) error {
		data, err := sealShared(env, name, in)
		if err != nil {
			return err
		}
		return values.Put(ctx, name, data, ttl)
	})
}

// sharedReplace changes what is kept, for as long as that is.
func (m *Manager) sharedReplace(ctx context.Context, name string, in any) error {
	return m.sharedStep(ctx, &m.shares.writes, func(ctx context.Context, env *Environment, values Ephemeral) error {
		data, err := sealShared(env, name, in)
		if err != nil {
			return err
		}
		return values.Replace(ctx, name, data)
	})
}

// sharedClaim keeps in for ttl unless there is something already, which it then reads into held, a pointer.
func (m *Manager) sharedClaim(ctx context.Context, name string, in any, ttl time.Duration, held any) (first bool, err error) {
	err = m.sharedStep(ctx, &m.shares.writes, func(ctx context.Context, env *Environment, values Ephemeral) error {
		data, err := sealShared(env, name, in)
		if err != nil {
			return err
		}
		there, mine, err := values.Claim(ctx, name, data, ttl)
		if first = mine; err != nil || mine {
			return err
		}
		return openShared(env, name, there, held)
	})
	return first && err == nil, err
}

// sharedPeek reads into out, a pointer.
func (m *Manager) sharedPeek(ctx context.Context, name string, out any) error {
	return m.sharedStep(ctx, &m.shares.reads, func(ctx context.Context, env *Environment, values Ephemeral) error {
		data, err := values.Peek(ctx, name)
		if err != nil {
			return err
		}
		return openShared(env, name, data, out)
	})
}

// sharedTake removes what is kept; of all who do one gets nil, the others fs.ErrNotExist.
func (m *Manager) sharedTake(ctx context.Context, name string) error {
	return m.sharedStep(ctx, &m.shares.reads, func(ctx context.Context, _ *Environment, values Ephemeral) error {
		_, err := values.Take(ctx, name)
		return err
	})
}

// sharedName names what nodes share. What it is about may be a secret, such as a code.
func sharedName(kind, about string) string {
	sum := sha256.Sum256([]byte(about))
	return "login/" + kind + "/" + hex.EncodeToString(sum[:])
}

func sealShared(env *Environment, name string, in any) ([]byte, error) {
	data, err := json.Marshal(in)
	if err != nil || env.Sealer == nil {
		return data, err
	}
	return env.Sealer.Seal(name, data)
}

// openShared is the reverse. Where there is a seal key, what is not sealed was not shared by a node of ours.
func openShared(env *Environment, name string, data []byte, out any) error {
	switch {
	case env.Sealer != nil:
		var err error
		if data, _, err = env.Sealer.Open(name, data); err != nil {
			return errForeign
		}
	case crypto.IsSealed(data):
		return errForeign
	}
	if json.Unmarshal(data, out) != nil { // its error quotes the value
		return errForeign
	}
	return nil
}
