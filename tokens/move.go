package tokens

import (
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
)

const (
	// movePage is the number of records that are in memory at a time, and moveWorkers of them are read or written at
	// the same time.
	movePage    = 1000
	moveWorkers = 32
)

// ErrNothingToMove: the store has no records at all.
var ErrNothingToMove = errors.New("the store holds no records")

// Mover takes what must last out of a store, and puts it into one, while gateways may be running on it: it starts
// nothing, and no gateway needs to know of it.
type Mover struct {
	m   *Manager
	env *Environment
}

// NewMover returns a mover for the store of an environment, of which it also uses the sealer, the platforms' appids and
// the spill folder.
func NewMover(env *Environment) *Mover { return &Mover{m: NewManager(), env: env.prepared()} }

// Moved is what became of records. It holds no secrets.
type Moved struct {
	Classes []MovedClass // in the order of their names
	// Refusals say of the first records that were left out, or were not written, why.
	Refusals []string
}

// MovedClass is what became of the records of one kind.
type MovedClass struct {
	Name    string
	Written int // or read, for an archive
	Same    int // were there already
	Newer   int // what was there is newer, and stays
	Refused int
}

// Total is the sum of all kinds.
func (r Moved) Total() (sum MovedClass) {
	for _, c := range r.Classes {
		sum.Written, sum.Same, sum.Newer, sum.Refused = sum.Written+c.Written, sum.Same+c.Same, sum.Newer+c.Newer, sum.Refused+c.Refused
	}
	return sum
}

// verdict is what becomes of a record.
type verdict int

const (
	moveWrite verdict = iota
	moveSame
	moveNewer
	moveRefuse
)

// tally counts. It is safe for concurrent use.
type tally struct {
	mu       sync.Mutex
	classes  map[recordClass]*MovedClass
	refusals []string
}

func (t *tally) count(class recordClass, v verdict, refusal string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.classes == nil {
		t.classes = make(map[recordClass]*MovedClass)
	}
	c := t.classes[class]
	if c == nil {
		c = &MovedClass{Name: string(class)}
		t.classes[class] = c
	}
	switch v {
	case moveWrite:
		c.Written++
	case moveSame:
		c.Same++
	case moveNewer:
		c.Newer++
	default:
		if c.Refused++; len(t.refusals) < maxNamed {
			t.refusals = append(t.refusals, refusal)
		}
	}
}

func (t *tally) moved() (r Moved) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for c := range maps.Values(t.classes) {
		r.Classes = append(r.Classes, *c)
	}
	slices.SortFunc(r.Classes, func(a, b MovedClass) int { return cmp.Compare(a.Name, b.Name) })
	r.Refusals = slices.Clone(t.refusals)
	return r
}

// each calls work for 0 to n-1 on a few goroutines, until one fails.
func each(ctx context.Context, n int, work func(ctx context.Context, i int) error) error {
	return eachOn(ctx, n, moveWorkers, work)
}

// eachOn is each on so many goroutines.
func eachOn(ctx context.Context, n, workers int, work func(ctx context.Context, i int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	todo := make(chan int)
	var wg sync.WaitGroup
	for range min(n, workers) {
		wg.Go(func() {
			for i := range todo {
				if err := work(ctx, i); err != nil {
					cancel(err)
					return
				}
			}
		})
	}
send:
	for i := range n {
		select {
		case todo <- i:
		case <-ctx.Done():
			break send
		}
	}
	close(todo)
	wg.Wait()
	return context.Cause(ctx)
}

// Export passes each record of the store, opened, to write: at most a page of them is in memory. Records that wait in the
// node's spill folder come after those of the store. What cannot be read is counted as refused and left out. Nothing is
// locked: a record that changes meanwhile comes as it was or as it is. The error is ErrNothingToMove if there are none.
func (mv *Mover) Export(ctx context.Context, write func(record []byte) error) (Moved, error) {
	var t tally
	platforms, err := storedPlatforms(ctx, mv.env)
	if err != nil {
		return Moved{}, fmt.Errorf("%w: %w", ErrStore, err)
	}
	folders := recordFolders(platforms)
	for i, folder := range folders {
		if i == len(folders)-1 {
			if err := mv.exportSpill(&t, write); err != nil { // before the lists
				return t.moved(), err
			}
		}
		if err := mv.exportFolder(ctx, folder, &t, write); err != nil {
			return t.moved(), err
		}
	}
	moved := t.moved()
	switch sum := moved.Total(); {
	case sum.Written > 0:
		return moved, nil
	case sum.Refused > 0:
		return moved, fmt.Errorf("none of %d records can be read: %s", sum.Refused, moved.Refusals[0])
	default:
		return moved, ErrNothingToMove
	}
}

func (mv *Mover) exportFolder(ctx context.Context, folder string, t *tally, write func([]byte) error) error {
	for cursor := ""; ; {
		names, next, err := Scan(ctx, mv.env.Store, folder+"/", cursor, movePage)
		if err != nil {
			return fmt.Errorf("%w: list %s: %w", ErrStore, folder, err)
		}
		records := make([]json.RawMessage, len(names))
		err = each(ctx, len(names), func(ctx context.Context, i int) error {
			class, known := classOf(names[i])
			if !known {
				return nil // a stray file, or a folder
			}
			err := mv.m.loadRecord(ctx, mv.env, names[i], &records[i])
			switch {
			case errors.Is(err, fs.ErrNotExist):
				return nil // gone meanwhile
			case errors.Is(err, errUnreadable), errors.Is(err, errUnsealed):
				t.count(class, moveRefuse, err.Error())
				return nil
			}
			return err
		})
		if err != nil {
			return err
		}
		for i, record := range records {
			if record == nil {
				continue
			}
			if err := write(packRecord(names[i], record)); err != nil {
				return err
			}
			class, _ := classOf(names[i])
			t.count(class, moveWrite, "")
		}
		if next == "" {
			return nil
		}
		cursor = next
	}
}

// exportSpill passes on the records that wait in the node's spill folder.
func (mv *Mover) exportSpill(t *tally, write func([]byte) error) error {
	if mv.env.Spill == "" {
		return nil
	}
	files, err := os.ReadDir(mv.env.Spill)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("spill folder: %w", withoutPath(err))
	}
	for _, f := range files {
		if !strings.HasSuffix(f.Name(), spillSuffix) {
			continue
		}
		data, err := os.ReadFile(filepath.Join(mv.env.Spill, f.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // the store has it by now
		}
		if err != nil {
			return fmt.Errorf("spill folder: %w", withoutPath(err))
		}
		var wire spillWire
		if _, err := mv.m.decode(mv.env, spillRecordName(f.Name()), data, &wire); err != nil {
			t.count(classSpilled, moveRefuse, err.Error())
			continue
		}
		k := Key{wire.Kind, wire.Platform, wire.AppID}
		plain := *mv.env
		plain.Sealer = nil
		record, err := encodeRecord(&plain, k.recordName(), wire.Record)
		if err != nil {
			return err
		}
		if err := write(packRecord(k.recordName(), record)); err != nil {
			return err
		}
		t.count(classSpilled, moveWrite, "")
	}
	return nil
}

// classSpilled are records that an export finds outside of the store.
const classSpilled recordClass = "records that wait in the spill folder"

// packRecord is a record as it is in an archive: the length of its name, its name, and what the store has, opened.
func packRecord(name string, record []byte) []byte {
	b := binary.AppendUvarint(make([]byte, 0, len(name)+len(record)+2), uint64(len(name)))
	return append(append(b, name...), record...)
}

var errNoRecord = errors.New("the archive holds what is no record")

func unpackRecord(b []byte) (name string, record []byte, err error) {
	n, used := binary.Uvarint(b)
	if used <= 0 || n > uint64(len(b)-used) {
		return "", nil, errNoRecord
	}
	return string(b[used : used+int(n)]), b[used+int(n):], nil //nolint:gosec // bounded
}
