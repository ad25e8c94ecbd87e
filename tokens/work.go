package tokens

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"time"
)

const (
	// workPoll is how often a node looks whether another one has finished.
	workPoll = 50 * time.Millisecond
	// workRetry is how soon a node whose store failed tells the others again how a work ended.
	workRetry = time.Second
	// workSlack is what a node may take beyond a work's limit before the others take it for dead.
	workSlack = 2 * time.Second
)

// ErrWorkDone says that a work was done before and that there is no result to tell: it is too old, it is another's, or
// nobody knows how it ended.
var ErrWorkDone = errors.New("it was done before")

// Work is what one node does for all.
type Work struct {
	Name   string        // of it among all works
	Match  []byte        // what who wants the result must bring, beside the name
	Limit  time.Duration // that the work keeps
	Repeat time.Duration // for how long its result is told, from when it began
	Memory time.Duration // for how long it is known that it was done
}

// workWire is how a work stands.
type workWire struct {
	Match  string `json:"match,omitempty"`
	Done   bool   `json:"done,omitempty"`
	Result []byte `json:"result,omitempty"`
}

// workNames are where nodes share a work: that it was done, for as long as that is known, and what came of it. Two
// names have two exact ends, by the store's one clock.
type workNames struct{ done, result string }

func (w Work) names() workNames {
	return workNames{done: sharedName("done", w.Name), result: sharedName("result", w.Name)}
}

// DoOnce runs do on one of the nodes that bring the same work, and returns its result on all of them: here says that it
// ran here, so that its error is the one returned. The others wait for it while it runs; then, when another Match is
// brought, and when a node dies over it, the error is ErrWorkDone.
//
// A work that fails is forgotten, so that whoever comes next does it again, unless do says that it is to be kept: then
// it counts as done, as after a panic.
//
// Where nodes share nothing, do runs: the callers on this node must have come together before.
func (m *Manager) DoOnce(ctx context.Context, w Work, do func(context.Context) (result []byte, keep bool, err error)) (result []byte, here bool, err error) {
	held, claim, err := m.claimWork(ctx, w)
	switch {
	case err != nil:
		return nil, false, err
	case held != nil:
		return held.Result, false, nil
	}
	begun := time.Now()
	keep := true // also if do panics
	var told *workWire
	defer func() { m.endWork(context.WithoutCancel(ctx), w, begun, claim, keep, told) }()
	result, keep, err = do(ctx)
	if err == nil {
		keep, told = true, &workWire{Match: w.match(), Done: true, Result: result}
	}
	return result, true, err
}

func (w Work) match() string {
	sum := sha256.Sum256(w.Match)
	return hex.EncodeToString(sum[:])
}

// workClaim is what the other nodes know of a work that is done here.
type workClaim struct {
	mine  bool // that it is at work
	noted bool // that it was done, once they find no result
}

// claimWork finds out whether to do a work, or else returns what came of it elsewhere.
func (m *Manager) claimWork(ctx context.Context, w Work) (held *workWire, claim workClaim, err error) {
	names, pending := w.names(), workWire{Match: w.match()}
	waiting := false
	for deadline := time.Now().Add(w.Limit + workSlack); ; {
		var there workWire
		first, err := m.sharedClaim(ctx, names.result, pending, w.Limit+workSlack, &there)
		switch {
		case errors.Is(err, errForeign):
			return nil, workClaim{}, ErrWorkDone
		case err != nil && !waiting:
			return nil, workClaim{}, nil
		case err != nil: // another node is at it, or was
		case first:
			noted, err := m.beginWork(ctx, w)
			return nil, workClaim{mine: true, noted: noted}, err
		case there.Match != pending.Match:
			return nil, workClaim{}, ErrWorkDone
		case there.Done:
			return &there, workClaim{}, nil
		}
		waiting = true
		if !time.Now().Before(deadline) {
			return nil, workClaim{}, ErrWorkDone
		}
		pause := time.NewTimer(workPoll)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			return nil, workClaim{}, ctx.Err()
		}
	}
}

// beginWork notes that a work is done, before it is. Where that cannot be noted now, it is done all the same.
func (m *Manager) beginWork(ctx context.Context, w Work) (noted bool, err error) {
	first, err := m.sharedClaim(ctx, w.names().done, workWire{}, w.Memory, new(workWire))
	if first || errors.Is(err, errAlone) {
		return first, nil
	}
	_ = m.sharedTake(ctx, w.names().result) // nobody is at it; else it ends by itself
	return false, ErrWorkDone
}

// endWork tells the other nodes how a work ended.
func (m *Manager) endWork(ctx context.Context, w Work, begun time.Time, claim workClaim, keep bool, told *workWire) {
	names := w.names()
	switch {
	case told == nil && !claim.mine:
		return
	case told == nil && !keep:
		_ = m.sharedTake(ctx, names.done) // first, so that who finds no result may begin
		_ = m.sharedTake(ctx, names.result)
		return
	}
	if m.tellWork(ctx, w, begun, claim, told) == nil || !claim.mine {
		return
	}
	// The others know that this node is at work, and wait for what comes of it.
	m.queue.add("tell "+names.result, workRetry, func(ctx context.Context) error {
		if time.Since(begun) >= w.Repeat {
			return nil
		}
		if m.tellWork(ctx, w, begun, claim, told) != nil {
			return retryError{after: workRetry}
		}
		return nil
	})
}

// tellWork tells the other nodes that a work was done, and what came of it, if told says that. The error is that they may not have heard of
// it.
func (m *Manager) tellWork(ctx context.Context, w Work, begun time.Time, claim workClaim, told *workWire) error {
	names := w.names()
	if !claim.noted {
		if _, err := m.sharedClaim(ctx, names.done, workWire{}, w.Memory, new(workWire)); errors.Is(err, errAlone) {
			return err
		}
	}
	left := w.Repeat - time.Since(begun)
	if told != nil && left > 0 {
		return m.sharedPut(ctx, names.result, told, left)
	}
	if claim.mine && time.Since(begun) < w.Limit {
		_ = m.sharedTake(ctx, names.result) // nobody is at it; else it ends by itself
	}
	return nil
}
