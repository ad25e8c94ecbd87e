package tokens

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"path"
	"slices"
	"sync/atomic"
	"time"

	"github.com/caddy-wechat/caddy-wechat/crypto"
)

// A record is sealed with the first seal key when it is written. Those of accounts that are idle, and those that are read and hardly ever
// written, would not open any more once the old key is taken out. So all are gone through, and sealed anew.

const (
	// resealPage bounds the records that a step of resealAll looks at, resealStep its time, and resealPause is the rest after it: pushes and
	// calls need the store too.
	resealPage  = 100
	resealStep  = 5 * time.Second
	resealPause = 50 * time.Millisecond
	// resealAgain is after how long all records are gone through once more when some could not be sealed anew. It doubles each time, up to
	// resealMost. That is also how long none is looked for after all were found sealed, whatever is read.
	resealAgain = time.Minute
	resealMost  = time.Hour
)

// resealing is how far the records are sealed with the first of a configuration's keys. What has no lock belongs to the job.
type resealing struct {
	keys   []crypto.SealKeyID
	since  time.Time
	wanted atomic.Bool  // the job is queued
	doneAt atomic.Int64 // the steady time when each record was found sealed with the first key; 0: never

	passes  int      // that left some
	folders []string // of this pass, still to be listed: the first one behind cursor
	cursor  string
	names   []string // listed, still to be looked at
	pass    resealPass
}

// resealPass is what was met among all records.
type resealPass struct {
	began      bool
	records    int
	sealed     int // anew
	left       int // that could not be, or are not for us to seal
	unreadable int // that no key opens
}

// useResealing has all records gone through when there are other seal keys than before, and old ones among them, which will be taken out.
func (m *Manager) useResealing(env *Environment) {
	var keys []crypto.SealKeyID
	if env.Sealer != nil {
		keys = env.Sealer.KeyIDs()
	}
	if old := m.resealing.Load(); old != nil && slices.Equal(old.keys, keys) {
		return
	}
	m.resealing.Store(&resealing{keys: keys, since: time.Now()})
	if len(keys) > 1 {
		m.wantReseal()
	}
}

// wantReseal has all records gone through: one was met that is not sealed with the first key.
func (m *Manager) wantReseal() {
	s := m.resealing.Load()
	if s == nil || len(s.keys) == 0 {
		return
	}
	if at := s.doneAt.Load(); at != 0 && steady(time.Now())-at < int64(resealMost) || !s.wanted.CompareAndSwap(false, true) {
		return
	}
	m.queue.add("reseal", 0, m.resealAll)
	m.queue.hasten("reseal") // it may wait for the next pass with the keys of before
}

// resealAll is the job that goes through all records, a few at a time, until each is sealed with the first key.
func (m *Manager) resealAll(ctx context.Context) error {
	env, err := m.current()
	s := m.resealing.Load()
	switch {
	case err != nil || !s.wanted.Load():
		return nil //nolint:nilerr // closed, or the keys of before wanted it
	case env.Sealer == nil || !slices.Equal(env.Sealer.KeyIDs(), s.keys):
		return retryError{after: resealPause} // they are just being changed
	case env.Settled != nil && !env.Settled() && time.Since(s.since) < settleLimit:
		return retryError{after: settleLook} // the configuration of before may come back, without the new key
	}
	// While the keys change places on one node after the other, each would seal anew what the other has just sealed.
	for _, id := range s.keys[1:] {
		if m.hearing.Load() != nil && m.othersSealWith(ctx, env, id) {
			s.pass = resealPass{}
			return retryError{after: sealingEvery}
		}
	}
	if !s.pass.began {
		if err := s.begin(ctx, env); err != nil {
			return m.unsealedAnew(env, "", err)
		}
	}
	start := time.Now()
	for steps := 0; len(s.names)+len(s.folders) > 0; steps++ {
		if m.resealing.Load() != s {
			return nil // other keys, which have queued it anew if they want it
		}
		if steps == resealPage || time.Since(start) >= resealStep {
			return retryError{after: resealPause}
		}
		if len(s.names) == 0 {
			if err := s.list(ctx, env); err != nil {
				return m.unsealedAnew(env, "", err)
			}
			continue
		}
		name := s.names[0]
		s.names = s.names[1:]
		if err := m.resealOne(ctx, env, name, &s.pass); err != nil {
			return m.unsealedAnew(env, name, err)
		}
	}
	pass := s.pass
	s.pass = resealPass{}
	if m.resealing.Load() != s {
		return nil // what would be said is of the keys of before
	}
	if pass.left > 0 {
		pause := min(resealAgain<<min(s.passes, 10), resealMost)
		s.passes++
		env.Log.Warn("records are still sealed with an old seal_key: leave it where it is; they are looked at again",
			"left", pass.left, "records", pass.records, "again_in", pause)
		return retryError{after: pause}
	}
	s.passes = 0
	s.doneAt.Store(steady(time.Now()))
	s.wanted.Store(false)
	env.Log.Info("every record is sealed with the first seal_key", "records", pass.records, "sealed_anew", pass.sealed, "unreadable", pass.unreadable)
	return nil
}

// unsealedAnew says why a record, or those of a folder where it is empty, could not be sealed anew, and returns it.
func (m *Manager) unsealedAnew(env *Environment, record string, why error) error {
	say, missed := m.unresealed.tell()
	switch {
	case !say:
	case record == "":
		env.Log.Warn("records cannot be listed, to be sealed with the newest seal_key; tried again", notLogged(missed, "error", why)...)
	default:
		env.Log.Warn("a record cannot be sealed with the newest seal_key; tried again", notLogged(missed, "record", record, "error", why)...)
	}
	return why
}

// begin begins a pass.
func (s *resealing) begin(ctx context.Context, env *Environment) error {
	var platforms []string
	err := env.operate(ctx, "list", storeTimeout, func(ctx context.Context) (err error) {
		platforms, err = storedPlatforms(ctx, env)
		return err
	})
	if err != nil {
		return fmt.Errorf("%w: list of platforms: %w", ErrStore, err)
	}
	s.folders, s.cursor, s.names, s.pass = recordFolders(platforms), "", nil, resealPass{began: true}
	rand.Shuffle(len(s.folders), func(i, j int) { // nodes that do so at the same time are seldom at the same record
		s.folders[i], s.folders[j] = s.folders[j], s.folders[i]
	})
	return nil
}

// list lists the next records.
func (s *resealing) list(ctx context.Context, env *Environment) error {
	folder := s.folders[0]
	err := env.operate(ctx, "list", storeTimeout, func(ctx context.Context) (err error) {
		s.names, s.cursor, err = Scan(ctx, env.Store, folder+"/", s.cursor, resealPage)
		return err
	})
	if err != nil {
		return fmt.Errorf("%w: list %s: %w", ErrStore, folder, err)
	}
	if s.cursor == "" {
		s.folders = s.folders[1:]
	}
	return nil
}

// resealOne looks at a record, and seals what it holds with the first key if another one has sealed it, or none.
func (m *Manager) resealOne(ctx context.Context, env *Environment, name string, pass *resealPass) error {
	if _, known := classOf(name); !known {
		return nil // a stray file, or a folder
	}
	raw, err := m.loadRaw(ctx, env, name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		pass.records++
		pass.left++
		return err
	}
	pass.records++
	if env.isSealed(raw) {
		return nil
	}
	if _, swaps := env.Store.(Swapper); !swaps && (path.Dir(name) == intentFolder || path.Dir(name) == forwardFolder) {
		pass.left++ // it is deleted soon, without a lock, and could come back
		return nil
	}
	switch sealed, err := m.reseal(ctx, env, name); {
	case err == nil && sealed:
		pass.sealed++
	case errors.Is(err, errDamaged):
		pass.unreadable++
	case err != nil:
		pass.left++
		return err
	}
	return nil
}

// reseal seals what a record holds with the first key, and changes nothing else; false: there was nothing to do any more.
func (m *Manager) reseal(ctx context.Context, env *Environment, name string) (sealed bool, err error) {
	unlock, err := m.locks.lock(ctx, name) // what must be written here is, without the store's lock if need be
	if err != nil {
		return false, fmt.Errorf("%w: write of %s: %w", ErrStore, name, err)
	}
	defer unlock()
	release, err := m.lockStore(ctx, env, name, writeLockWait)
	if err != nil {
		return false, err
	}
	defer release()
	raw, err := m.loadRaw(ctx, env, name)
	if errors.Is(err, fs.ErrNotExist) || err == nil && env.isSealed(raw) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	plain := raw
	if !isPlain(raw) {
		if plain, _, err = env.Sealer.Open(name, raw); err != nil {
			return false, fmt.Errorf("%w: %w", errDamaged, err)
		}
	} else if name == opaqueName {
		return false, fmt.Errorf("%w: %s", errDamaged, name) // anybody can have put it there
	}
	if err := decodeRecord(name, plain, new(struct{})); err != nil {
		return false, err
	}
	next, err := env.Sealer.Seal(name, plain)
	if err != nil {
		return false, fmt.Errorf("%w: %w", ErrStore, err)
	}
	switch err = m.swapRaw(ctx, env, name, raw, next); {
	case errors.Is(err, ErrSwapped):
		return false, nil // another node has written it
	case err != nil:
		return false, err
	}
	return true, nil
}

// isSealed reports whether a record is sealed with the first key.
func (e *Environment) isSealed(raw []byte) bool {
	id, sealed := crypto.SealedWith(raw)
	return sealed && id == e.Sealer.KeyIDs()[0]
}
