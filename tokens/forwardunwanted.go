package tokens

import (
	"context"
	"errors"
	"io/fs"
	"time"
)

// unwantedEvery is how often it is looked whether events that nobody hands on are still there: at one of them, which costs a read. They are
// listed when a configuration begins to hand on none, once more if some were too young then, and when that one is gone.
const unwantedEvery = time.Hour

var errNoForward = errors.New("the configuration forwards none")

// unwantedForwards are the events that wait while the configuration hands on none, as of the last look.
type unwantedForwards struct {
	events int
	first  string
}

func (t *forwardTable) setUnwanted(u unwantedForwards) (before unwantedForwards) {
	t.mu.Lock()
	defer t.mu.Unlock()
	before, t.unwanted = t.unwanted, u
	return before
}

func (t *forwardTable) unwantedOnes() unwantedForwards {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.unwanted
}

// ForwardsUnwanted is how many events wait to be handed on by a configuration that hands on some: this one does not.
func (m *Manager) ForwardsUnwanted() int {
	if env := m.env.Load(); env == nil || env.Forward != nil {
		return 0
	}
	return m.forwards.unwantedOnes().events
}

// watchUnwanted is the job that keeps an eye on them.
func (m *Manager) watchUnwanted(ctx context.Context) error {
	env, err := m.current()
	if err != nil || env.Forward != nil {
		return nil //nolint:nilerr // closed, or they are handed on again
	}
	if u := m.forwards.unwantedOnes(); u.events > 0 {
		var wire forwardWire
		if err := m.loadRecord(ctx, env, forwardName(u.first), &wire); !errors.Is(err, fs.ErrNotExist) {
			return retryError{after: unwantedEvery} // also one that cannot be read
		}
	}
	young, err := m.listUnwanted(ctx, env)
	if err != nil {
		return err
	}
	if young {
		m.queue.add("unwanted forwards later", takeOverAfter, m.countUnwanted)
	}
	if m.ForwardsUnwanted() > 0 {
		return retryError{after: unwantedEvery}
	}
	return nil
}

// countUnwanted is the job that looks at those that were too young.
func (m *Manager) countUnwanted(ctx context.Context) error {
	env, err := m.current()
	if err != nil || env.Forward != nil {
		return nil //nolint:nilerr // as above
	}
	if _, err := m.listUnwanted(ctx, env); err != nil {
		return err
	}
	if m.ForwardsUnwanted() > 0 {
		m.queue.add("unwanted forwards", unwantedEvery, m.watchUnwanted)
	}
	return nil
}

// listUnwanted looks for them. Young ones do not count: another node may be handing them on, or this one under the configuration of before.
func (m *Manager) listUnwanted(ctx context.Context, env *Environment) (young bool, err error) {
	ids, err := m.storedForwards(ctx, env)
	if err != nil {
		return false, err
	}
	var u unwantedForwards
	for _, id := range ids {
		if time.Since(forwardTime(id)).Abs() < takeOverAfter {
			young = true
			continue
		}
		if u.events == 0 {
			u.first = id
		}
		u.events++
	}
	if before := m.forwards.setUnwanted(u); u.events > before.events {
		env.Log.Warn("events wait to be forwarded, and no wechat_event has forward: they stay in the store until one has", "events", u.events)
	}
	return young, nil
}
