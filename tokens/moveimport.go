package tokens

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"reflect"
	"slices"
	"time"
)

// maxMovedKeys bounds the keys of opaque tokens of two stores that became one. Every one of them still opens tokens.
const maxMovedKeys = 2 * opaqueGenerations

// Import puts the records of an archive, which next gives until io.EOF, into the store. A record is written only in the
// place of an older one, under the same rules as a gateway's, and gateways that run on the store hear of it. It may be
// made again, and begun again where it failed. With dry nothing is written, and the counts are what would be.
func (mv *Mover) Import(ctx context.Context, next func() ([]byte, error), dry bool) (Moved, error) {
	var t tally
	for {
		page, end, err := mv.importPage(next)
		if failed := mv.putAll(ctx, page, dry, &t); failed != nil {
			return t.moved(), failed
		}
		if err != nil || end {
			return t.moved(), err
		}
	}
}

// movedRecord is a record on its way into a store.
type movedRecord struct {
	name string
	data []byte
}

// importPage reads a page. A list of authorizers is not on a page with anything else: it is written once all else is.
func (*Mover) importPage(next func() ([]byte, error)) (page []movedRecord, end bool, err error) {
	for len(page) < movePage {
		packed, err := next()
		if errors.Is(err, io.EOF) {
			return page, true, nil
		}
		if err != nil {
			return page, true, err
		}
		name, data, err := unpackRecord(packed)
		if err != nil {
			return page, true, err
		}
		page = append(page, movedRecord{name, data})
		if class, _ := classOf(name); class == classRoster {
			break
		}
	}
	return page, false, nil
}

func (mv *Mover) putAll(ctx context.Context, page []movedRecord, dry bool, t *tally) error {
	put := func(ctx context.Context, i int) error {
		class, known := classOf(page[i].name)
		if !known {
			t.count("others", moveRefuse, printable(page[i].name, maxPrintedName)+": this gateway knows no such record")
			return nil
		}
		v, err := mv.put(ctx, class, page[i], dry)
		if refused(err) {
			t.count(class, moveRefuse, err.Error())
			return nil
		}
		if err == nil {
			t.count(class, v, "")
		}
		return err
	}
	last := len(page)
	if last > 0 {
		if class, _ := classOf(page[last-1].name); class == classRoster {
			last--
		}
	}
	if err := each(ctx, last, put); err != nil || last == len(page) {
		return err
	}
	return put(ctx, last)
}

// maxPrintedName bounds a name from an archive in a message.
const maxPrintedName = 128

// refused reports whether an error is about one record. Others would fail alike, or be sealed with the wrong key.
func refused(err error) bool {
	return errors.Is(err, errDamaged) || errors.Is(err, ErrVerifyFull)
}

// put puts one record into the store.
func (mv *Mover) put(ctx context.Context, class recordClass, r movedRecord, dry bool) (verdict, error) {
	switch class {
	case classTicket:
		return putAs(ctx, mv, r, dry, keepLater(func(w *ticketWire) int64 { return w.CreatedAt }))
	case classIntent:
		return mv.putIntent(ctx, r, dry)
	case classForward:
		return putAs(ctx, mv, r, dry, keepLater(func(*forwardWire) int64 { return 0 }))
	case classOpaque:
		return putAs(ctx, mv, r, dry, mergeOpaque)
	case classVerify:
		return putAs(ctx, mv, r, dry, mergeVerify)
	case classConfirm:
		return putAs(ctx, mv, r, dry, keepLater(func(w *confirmWire) int64 { return w.AskedAt }))
	case classUserName:
		return putAs(ctx, mv, r, dry, keepLater(func(*userNameWire) int64 { return 0 }))
	case classPushAsked:
		return putAs(ctx, mv, r, dry, keepLater(func(w *askedWire) int64 { return w.AskedAt }))
	case classRoster:
		return putAs(ctx, mv, r, dry, mergeRoster)
	default:
		return putAs(ctx, mv, r, dry, mergeToken)
	}
}

// putAs puts a record of one form. Merge decides between what is there (nil: nothing) and what comes.
func putAs[T any](ctx context.Context, mv *Mover, r movedRecord, dry bool, merge func(there, comes *T) (*T, verdict, error)) (verdict, error) {
	comes := new(T)
	if err := decodeRecord(r.name, r.data, comes); err != nil {
		return moveRefuse, err
	}
	return edit(ctx, mv, r.name, dry, func(there *T) (*T, verdict, error) { return merge(there, comes) })
}

// edit changes a record as decide says, in one step for all nodes: under its lock, and where the store can tell, only in
// the place of what was read.
func edit[T any](ctx context.Context, mv *Mover, name string, dry bool, decide func(there *T) (*T, verdict, error)) (verdict, error) {
	for range maxSwaps {
		v, again, err := editOnce(ctx, mv, name, dry, decide)
		if !again {
			return v, err
		}
	}
	return moveRefuse, fmt.Errorf("%w: %s: %w", ErrStore, name, ErrSwapped)
}

func editOnce[T any](ctx context.Context, mv *Mover, name string, dry bool, decide func(there *T) (*T, verdict, error)) (v verdict, again bool, err error) {
	look := func() (raw []byte, next *T, v verdict, err error) {
		raw, there, err := readThere[T](ctx, mv, name)
		if err == nil {
			next, v, err = decide(there)
		}
		return raw, next, v, err
	}
	// Most of what a second import brings is there already, which needs no lock.
	raw, next, v, err := look()
	if err != nil || next == nil || dry {
		return v, false, err
	}
	unlock, err := mv.m.lockStore(ctx, mv.env, name, writeLockWait)
	if err != nil {
		return moveRefuse, false, err
	}
	defer unlock()
	if _, tells := mv.env.Store.(Swapper); !tells {
		if raw, next, v, err = look(); err != nil || next == nil {
			return v, false, err
		}
	}
	err = mv.m.swapRecord(ctx, mv.env, name, raw, next)
	return v, errors.Is(err, ErrSwapped) || errors.Is(err, ErrLockLost), err
}

// readThere reads what the store has; nil: nothing.
func readThere[T any](ctx context.Context, mv *Mover, name string) (raw []byte, there *T, err error) {
	raw, err = mv.m.loadRaw(ctx, mv.env, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	there = new(T)
	_, err = mv.m.decode(mv.env, name, raw, there)
	if errors.Is(err, errUnsealed) { // counts as none, and is written over
		return raw, nil, nil
	}
	return raw, there, err
}

// keepLater writes what comes if it is dated later than what is there.
func keepLater[T any](date func(*T) int64) func(there, comes *T) (*T, verdict, error) {
	return func(there, comes *T) (*T, verdict, error) {
		switch {
		case there == nil || date(comes) > date(there):
			return comes, moveWrite, nil
		case reflect.DeepEqual(there, comes):
			return nil, moveSame, nil
		default:
			return nil, moveNewer, nil
		}
	}
}

// mergeToken decides between two records of a token that two stores have. Each counted its generations by itself: of two
// that stand on one authorization the one whose token was asked for later counts.
func mergeToken(there, comes *recordWire) (*recordWire, verdict, error) {
	if there == nil {
		return comes, moveWrite, nil
	}
	held, moved := there.record(), comes.record()
	next := *moved
	switch {
	case moved.same(held):
		return nil, moveSame, nil
	case moved.after(held):
		// An authorization that brought no refresh token leaves the one that is there.
		if next.RefreshToken.IsZero() && !next.revoked() {
			next.RefreshToken = held.RefreshToken
		}
		if next.UserName == "" {
			next.UserName, next.NickName = held.UserName, held.NickName
		}
	case held.RefreshToken.IsZero() && !held.revoked() && !moved.RefreshToken.IsZero() && !moved.revoked():
		next = *held
		next.RefreshToken = moved.RefreshToken
	default:
		return nil, moveNewer, nil
	}
	next.Gen = max(moved.Gen, held.Gen+1) // so that who has the other one in memory takes it
	wire := next.wire()
	return &wire, moveWrite, nil
}

// after is supersedes for records of two stores.
func (r *record) after(o *record) bool {
	rs, os := r.settledAt(), o.settledAt()
	switch {
	case !rs.Equal(os):
		return rs.After(os)
	case !r.ObtainedAt.IsZero() && !o.ObtainedAt.IsZero() && !r.ObtainedAt.Equal(o.ObtainedAt):
		return r.ObtainedAt.After(o.ObtainedAt)
	case r.Gen != o.Gen:
		return r.Gen > o.Gen
	default:
		return r.ObtainedAt.After(o.ObtainedAt)
	}
}

// putIntent puts an accepted authorization into the store, unless its code was exchanged by now.
func (mv *Mover) putIntent(ctx context.Context, r movedRecord, dry bool) (verdict, error) {
	var wire intentWire
	if err := decodeRecord(r.name, r.data, &wire); err != nil {
		return moveRefuse, err
	}
	in := wire.intent()
	if in.AppID != "" {
		_, there, err := readThere[recordWire](ctx, mv, AuthorizerKey(in.Platform, in.AppID).recordName())
		if err != nil && !errors.Is(err, errDamaged) {
			return moveRefuse, err
		}
		if err == nil && there != nil && there.CodeHash == path.Base(r.name) {
			return moveNewer, nil
		}
	}
	return putAs(ctx, mv, r, dry, keepLater(func(*intentWire) int64 { return 0 }))
}

// mergeOpaque keeps the keys of both stores: SDKs hold tokens of either.
func mergeOpaque(there, comes *opaqueRecord) (*opaqueRecord, verdict, error) {
	if there == nil {
		return comes, moveWrite, nil
	}
	keys := slices.Clone(there.Keys)
	for _, key := range comes.Keys {
		if !slices.ContainsFunc(keys, func(k opaqueKeyRecord) bool { return string(k.ID) == string(key.ID) }) {
			keys = append(keys, key)
		}
	}
	slices.SortStableFunc(keys, func(a, b opaqueKeyRecord) int { return cmp.Compare(b.Created, a.Created) })
	keys = keys[:min(len(keys), maxMovedKeys)]
	if slices.EqualFunc(keys, there.Keys, func(a, b opaqueKeyRecord) bool { return string(a.ID) == string(b.ID) }) {
		return nil, moveSame, nil
	}
	return &opaqueRecord{Keys: keys}, moveWrite, nil
}

// mergeVerify keeps the files of both stores, of each the one that was added later.
func mergeVerify(there, comes *verifyWire) (*verifyWire, verdict, error) {
	if there == nil {
		return comes, moveWrite, nil
	}
	files, changed, newer := there.files(), false, false
	for name, f := range comes.files() {
		held, found := files[name]
		switch {
		case found && string(held.Content) == string(f.Content):
			continue
		case found && !f.AddedAt.After(held.AddedAt):
			newer = true
			continue
		case !found && len(files) >= maxShardFiles:
			return nil, moveRefuse, fmt.Errorf("%s: %w", name, ErrVerifyFull)
		}
		files[name], changed = f, true
	}
	switch {
	case changed:
		next := verifyWireOf(files)
		return &next, moveWrite, nil
	case newer:
		return nil, moveNewer, nil
	default:
		return nil, moveSame, nil
	}
}

// mergeRoster never takes over that WeChat's list was read to its end, nor how far: that was for the other store, and who
// authorised after the archive was made, or whose record was refused, is in neither. So a store that has no list, or whose
// list was read before the archive's, counts as one that may lack accounts until its own gateways have read the list.
func mergeRoster(there, comes *rosterWire) (*rosterWire, verdict, error) {
	switch {
	case there == nil && comes.CompletedAt > 0:
		return &rosterWire{MovedAt: time.Now().Unix()}, moveWrite, nil
	case there == nil, there.CompletedAt == 0, there.CompletedAt == comes.CompletedAt:
		return nil, moveSame, nil
	case comes.CompletedAt < there.CompletedAt:
		return nil, moveNewer, nil
	default:
		return &rosterWire{MovedAt: time.Now().Unix(), Walk: there.Walk}, moveWrite, nil
	}
}
