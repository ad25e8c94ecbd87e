package tokens

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// The spill folder holds one file for each record that the store did not take, named by a hash of the record's name. A
// file is written beside its place, synced and moved there, and the folder is synced, so that after a crash it is there
// whole or not at all.

const (
	spillSuffix = ".record"
	spillBroken = ".broken" // added to the name of a file that cannot be read
	spillFolder = 0o700
	spillFile   = 0o600
)

// errNoSpill: the node has no spill folder.
var errNoSpill = errors.New("no spill folder")

// errSpillHangs: the disk of the spill folder does not answer.
var errSpillHangs = errors.New("spill folder: its disk does not answer")

// spillLock is the lock of this node around what is done in a spill folder. No record has this name. Each folder has one of
// its own: where a disk hangs, another folder is the remedy.
func spillLock(folder string) string { return "spill " + folder }

// onSpill does something in a spill folder. A disk that hangs costs one goroutine, and nobody waits for it longer than
// for the store.
func (m *Manager) onSpill(folder string, do func() error) error {
	ctx, cancel := context.WithTimeout(context.Background(), storeTimeout)
	defer cancel()
	unlock, err := m.locks.lock(ctx, spillLock(folder))
	if err != nil {
		return errSpillHangs
	}
	done := make(chan error, 1)
	go func() {
		var err error
		defer func() { done <- err }()
		defer unlock()
		defer m.recovered(&err)
		err = do()
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return errSpillHangs
	}
}

// spillWire is a record in a spill file, with the key that its file name does not tell.
type spillWire struct {
	Kind     Kind       `json:"kind"`
	Platform string     `json:"platform,omitempty"`
	AppID    string     `json:"appid,omitempty"`
	Record   recordWire `json:"record"`
	BaseMs   int64      `json:"base_ms,omitempty"` // its base, in Unix milliseconds
}

func spillName(k Key) string {
	sum := sha256.Sum256([]byte(k.recordName()))
	return hex.EncodeToString(sum[:16]) + spillSuffix
}

// spillRecordName is what a spill file is sealed as, so that it cannot be passed off as a record of the store.
func spillRecordName(file string) string { return path.Join(root, "spill", file) }

// spill writes the record of k that waits for the store into the node's spill folder.
func (m *Manager) spill(env *Environment, k Key) error {
	for {
		if now := m.env.Load(); now.Spill != "" {
			env = now // the folder may have changed while the operation went on
		}
		if env.Spill == "" {
			return errNoSpill
		}
		err := m.onSpill(env.Spill, func() error { return m.spillNow(env, k) })
		if now := m.env.Load(); now.Spill == "" || now.Spill == env.Spill {
			return err
		}
	}
}

func (m *Manager) spillNow(env *Environment, k Key) error {
	rec, base := m.pending.waiting(k)
	if rec == nil {
		return nil // written meanwhile
	}
	file := spillName(k)
	data, err := encodeRecord(m.keyring(env), spillRecordName(file), spillWire{k.Kind, k.Platform, k.AppID, rec.wire(), unixMilli(base)})
	if err != nil {
		return err
	}
	if err := writeSynced(env.Spill, file, data); err != nil {
		return fmt.Errorf("spill folder: %w", withoutPath(err))
	}
	m.pending.spilled(env.Spill, k, rec)
	return nil
}

// unspill removes the file, if there is one, of a record that the store has by now, unless another one of the key waits.
func (m *Manager) unspill(env *Environment, k Key) {
	folder, left := m.pending.leftOver(k)
	if folder == "" || !left {
		return
	}
	err := m.onSpill(folder, func() error {
		if !m.pending.unneeded(folder, k) {
			return nil
		}
		return os.Remove(filepath.Join(folder, spillName(k)))
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) {
		// It is read at the next start, and found to be older than what the store has.
		env.Log.Warn("a spill file that is no longer needed cannot be removed", "appid", k.owner(), "error", withoutPath(err))
	}
}

// errSpillUnread: the spill folder holds what cannot be read.
var errSpillUnread = errors.New("spill folder: it cannot be read, or not all of it")

// loadSpill takes up the records that an earlier process could not write to the store. It is false if another
// configuration, or another attempt, may be able to read more of them.
//
// A disk that does not answer in time is not waited for: what it has is taken up once it does. Who reads an older record
// from the store before that finds the spilled one among those that wait, and they are settled as any two are.
func (m *Manager) loadSpill(env *Environment) (whole bool) {
	if env.Spill == "" {
		return true
	}
	var late atomic.Bool
	err := m.onSpill(env.Spill, func() error {
		err := m.loadSpillNow(env)
		if late.Load() && m.pending.len() > 0 { // else Use does this, once env is current
			m.queue.add("pending", 0, m.writePending)
		}
		return err
	})
	if errors.Is(err, errSpillHangs) {
		late.Store(true)
		env.Log.Error("the disk of the spill folder does not answer; what it holds may be newer than the store, and is taken up once it does")
	}
	return err == nil
}

func (m *Manager) loadSpillNow(env *Environment) error {
	files, err := os.ReadDir(env.Spill)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		env.Log.Error("the spill folder cannot be read; what it holds may be newer than the store", "error", withoutPath(err))
		return errSpillUnread
	}
	whole := true
	found := 0
	for _, f := range files {
		if !strings.HasSuffix(f.Name(), spillSuffix) {
			continue // a file that was being written when the process died, or one set aside
		}
		k, rec, base, err := m.readSpill(env, f.Name())
		if err != nil {
			env.Log.Error("a spill file cannot be read and is left alone", "file", f.Name(), "error", err)
			whole = whole && errors.Is(err, errDamaged)
			continue
		}
		m.pending.put(k, rec, base)
		m.pending.spilled(env.Spill, k, rec)
		found++
	}
	if found > 0 {
		env.Log.Warn("records that an earlier process could not write are taken up from the spill folder", "records", found)
	}
	if !whole {
		return errSpillUnread
	}
	return nil
}

func (m *Manager) readSpill(env *Environment, file string) (k Key, rec *record, base time.Time, err error) {
	full := filepath.Join(env.Spill, file)
	data, err := os.ReadFile(full)
	if err != nil {
		return Key{}, nil, time.Time{}, withoutPath(err)
	}
	var wire spillWire
	if _, err = m.decode(env, spillRecordName(file), data, &wire); err != nil {
		if errors.Is(err, errDamaged) {
			_ = os.Rename(full, full+spillBroken) // else the next start says the same again
		}
		return Key{}, nil, time.Time{}, err
	}
	k = Key{wire.Kind, wire.Platform, wire.AppID}
	if spillName(k) != file {
		return Key{}, nil, time.Time{}, errors.New("it holds the record of another file")
	}
	return k, wire.Record.record(), fromUnixMilli(wire.BaseMs), nil
}

// writeSynced writes a file so that it is there whole, and stays, once nil is returned.
func writeSynced(folder, name string, data []byte) (err error) {
	if err := os.MkdirAll(folder, spillFolder); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(folder, name+".tmp"), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, spillFile)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(folder, name))
	}
	if err != nil {
		return err
	}
	d, err := os.Open(folder)
	if err != nil {
		return err
	}
	err = d.Sync()
	if closed := d.Close(); err == nil {
		err = closed
	}
	return err
}

// withoutPath keeps the cause of an error of the file system.
func withoutPath(err error) error {
	if p, ok := errors.AsType[*fs.PathError](err); ok {
		return p.Err
	}
	if l, ok := errors.AsType[*os.LinkError](err); ok {
		return l.Err
	}
	return err
}

// spillWaiting tries once more to spill what lives in memory alone.
func (m *Manager) spillWaiting(ctx context.Context, env *Environment) {
	for k := range m.pending.all() {
		if ctx.Err() != nil {
			return
		}
		if !m.pending.isSpilled(k) && errors.Is(m.spill(env, k), errSpillHangs) { // Unsaved counts it still
			return
		}
	}
}
