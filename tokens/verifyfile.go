package tokens

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"regexp"
	"slices"
	"sync"
	"time"
)

// The verification files that were added at run time are in a few records, each with many files. So a name that nobody
// registered costs no read of its own, and a flood of such names costs a read of each record a second.
const (
	verifyShards = 16
	// verifyFresh is for how long a record is believed: another node may have changed it.
	verifyFresh = time.Second
	// verifyTimeout bounds one read of a record: WeChat's request for a file waits for it.
	verifyTimeout = 1500 * time.Millisecond

	// MaxVerifyContent bounds a file that is added at run time, in bytes. WeChat's have 16 or 32.
	MaxVerifyContent = 4 << 10
	// maxShardFiles bounds the files in one record. At WeChat's sizes such a record has some 50 KiB.
	maxShardFiles = 512
)

var (
	// ErrVerifyFile: the name or the content is not that of a verification file.
	ErrVerifyFile = errors.New("no verification file")
	// ErrVerifyFull: too many verification files were added at run time.
	ErrVerifyFull = errors.New("too many verification files: delete those that are needed no more, or put them into the folder of wechat_verify")
)

// verifyFileName is the shape of the names of WeChat's verification files. All are of 10 or 26 characters so far.
var verifyFileName = regexp.MustCompile(`^[A-Za-z0-9_]{8,40}\.txt$`)

// IsVerifyFileName reports whether a name has the shape of those of WeChat's verification files, such as
// MP_verify_a1B2c3D4e5F6g7H8.txt and 87PweoaRBw.txt.
func IsVerifyFileName(name string) bool { return verifyFileName.MatchString(name) }

// VerifyFile is a verification file that was added at run time.
type VerifyFile struct {
	Name    string
	Content []byte
	AddedAt time.Time
}

// check refuses what is no verification file.
func (f VerifyFile) check() error {
	switch {
	case !IsVerifyFileName(f.Name):
		return fmt.Errorf("'%s': %w: want a name like MP_verify_a1B2c3D4e5F6g7H8.txt or 87PweoaRBw.txt", printable(f.Name, maxID), ErrVerifyFile)
	case len(f.Content) == 0:
		return fmt.Errorf("'%s': %w: it is empty", f.Name, ErrVerifyFile)
	case len(f.Content) > MaxVerifyContent:
		return fmt.Errorf("'%s': %w: it is larger than %d bytes", f.Name, ErrVerifyFile, MaxVerifyContent)
	}
	return nil
}

// verifyShard is one of the records as this node has it.
type verifyShard struct {
	mu    sync.Mutex
	files map[string]VerifyFile // by name; never changed in place
	asked time.Time             // when the store was last asked
	heard time.Time             // when another node last said that it changed the record
}

func (s *verifyShard) get() (known verifyRead, fresh bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return verifyRead{s.files, s.asked}, s.asked.After(s.heard) && time.Since(s.asked) < verifyFresh
}

// verifyRead is what the store had when it was asked.
type verifyRead struct {
	files map[string]VerifyFile
	asked time.Time
}

// news notes that another node has changed the record.
func (s *verifyShard) news() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.heard = time.Now()
}

// read takes what the store had when it was asked, unless a change of this node's own came in between.
func (s *verifyShard) read(r verifyRead) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.asked.After(s.asked) {
		s.files, s.asked = r.files, r.asked
	}
}

// failed notes that the store did not answer what it was asked then: it is not asked again at once, unless there was news since,
// and what is known stays.
func (s *verifyShard) failed(asked time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if asked.After(s.heard) {
		s.asked = time.Now()
	}
}

// overtaken reports whether there was news since the store was asked.
func (s *verifyShard) overtaken(asked time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !asked.After(s.heard)
}

// changed takes what this node has just written.
func (s *verifyShard) changed(files map[string]VerifyFile) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.files, s.asked = files, time.Now()
}

// verifyWire is one of the records.
type verifyWire struct {
	Files map[string]verifyFileWire `json:"files,omitempty"`
}

type verifyFileWire struct {
	Content []byte `json:"content"`
	AddedAt int64  `json:"added_at,omitempty"`
}

func (w verifyWire) files() map[string]VerifyFile {
	files := make(map[string]VerifyFile, len(w.Files))
	for name, f := range w.Files {
		files[name] = VerifyFile{Name: name, Content: f.Content, AddedAt: fromUnix(f.AddedAt)}
	}
	return files
}

func verifyWireOf(files map[string]VerifyFile) verifyWire {
	w := verifyWire{Files: make(map[string]verifyFileWire, len(files))}
	for name, f := range files {
		w.Files[name] = verifyFileWire{Content: f.Content, AddedAt: unix(f.AddedAt)}
	}
	return w
}

// verifyFolder is where the records are kept.
const verifyFolder = root + "/verify/files"

// verifyShardOf is the number of the record that a name belongs to.
func verifyShardOf(name string) int { return int(sha256.Sum256([]byte(name))[0]) % verifyShards }

// verifyShardNamed is the number of the record of that name; false: it is none of them.
func verifyShardNamed(name string) (shard int, ok bool) {
	if path.Dir(name) != verifyFolder {
		return 0, false
	}
	for shard = range verifyShards {
		if verifyShardName(shard) == name {
			return shard, true
		}
	}
	return 0, false
}

func verifyShardName(shard int) string {
	return path.Join(verifyFolder, hex.EncodeToString([]byte{byte(shard)}))
}

// VerifyFile returns the verification file of that name that was added at run time, on whichever node: what another node
// changed is seen at once where that is heard, and a second later elsewhere. A file that is known here is also returned beside an error, which says that the store
// was not read. The content must not be changed.
func (m *Manager) VerifyFile(ctx context.Context, name string) (content []byte, found bool, err error) {
	env, err := m.current()
	if err != nil || !IsVerifyFileName(name) {
		return nil, false, err
	}
	shard := verifyShardOf(name)
	known, fresh := m.verify[shard].get()
	if !fresh {
		ctx, cancel := context.WithTimeout(ctx, verifyTimeout)
		defer cancel()
		for range 2 { // a read that was under way may be of before a change
			read, failed := share(ctx, m, env.flightName("verify", verifyShardName(shard)), verifyTimeout, func(ctx context.Context) (verifyRead, error) {
				if known, fresh := m.verify[shard].get(); fresh {
					return known, nil // read between the look and the turn
				}
				return m.readVerify(ctx, env, shard)
			})
			if err = failed; err != nil {
				break
			}
			if known = read; !m.verify[shard].overtaken(known.asked) {
				break
			}
		}
	}
	f, found := known.files[name]
	return f.Content, found, err
}

// VerifyFiles returns all of the verification files that were added at run time, by name.
func (m *Manager) VerifyFiles(ctx context.Context) ([]VerifyFile, error) {
	env, err := m.current()
	if err != nil {
		return nil, err
	}
	var all []VerifyFile
	for shard := range verifyShards {
		read, err := m.readVerify(ctx, env, shard)
		if err != nil {
			return nil, err
		}
		all = slices.AppendSeq(all, maps.Values(read.files))
	}
	slices.SortFunc(all, func(a, b VerifyFile) int { return cmp.Compare(a.Name, b.Name) })
	return all, nil
}

// readVerify reads one of the records.
func (m *Manager) readVerify(ctx context.Context, env *Environment, shard int) (read verifyRead, err error) {
	read.asked = time.Now()
	if read.files, err = m.loadVerify(ctx, env, shard); err != nil {
		m.verify[shard].failed(read.asked)
		return verifyRead{}, err
	}
	m.verify[shard].read(read)
	return read, nil
}

func (m *Manager) loadVerify(ctx context.Context, env *Environment, shard int) (map[string]VerifyFile, error) {
	var wire verifyWire
	if err := m.loadRecord(ctx, env, verifyShardName(shard), &wire); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return wire.files(), nil
}

// PutVerifyFile adds a verification file, or replaces the one of that name; added says which. It lasts, and all nodes
// serve it, when nil is returned: here at once, elsewhere within a second. The error wraps ErrVerifyFile for what is no
// such file, and is ErrVerifyFull when there are too many.
func (m *Manager) PutVerifyFile(ctx context.Context, name string, content []byte) (added bool, err error) {
	f := VerifyFile{Name: name, Content: slices.Clone(content), AddedAt: fromUnix(unix(time.Now()))}
	if err := f.check(); err != nil {
		return false, err
	}
	err = m.changeVerify(ctx, verifyShardOf(name), func(files map[string]VerifyFile) error {
		if _, there := files[name]; !there {
			added = true
			if len(files) >= maxShardFiles {
				return ErrVerifyFull
			}
		}
		files[name] = f
		return nil
	})
	return added, err
}

// errUnchanged ends a change that changes nothing.
var errUnchanged = errors.New("nothing to change")

// DeleteVerifyFile removes a verification file that was added at run time; found: there was one.
func (m *Manager) DeleteVerifyFile(ctx context.Context, name string) (found bool, err error) {
	err = m.changeVerify(ctx, verifyShardOf(name), func(files map[string]VerifyFile) error {
		if _, found = files[name]; !found {
			return errUnchanged
		}
		delete(files, name)
		return nil
	})
	if errors.Is(err, errUnchanged) {
		err = nil
	}
	return found, err
}

// changeVerify changes one of the records, as one step for all nodes.
func (m *Manager) changeVerify(ctx context.Context, shard int, change func(map[string]VerifyFile) error) error {
	env, err := m.current()
	if err != nil {
		return err
	}
	name := verifyShardName(shard)
	here, err := m.locks.lock(ctx, name)
	if err != nil {
		return fmt.Errorf("%w: write of %s: %w", ErrStore, name, err)
	}
	defer here()
	unlock, err := m.lockStore(ctx, env, name, writeLockWait)
	if err != nil {
		return err
	}
	defer unlock()
	files, err := m.loadVerify(ctx, env, shard)
	if errors.Is(err, errDamaged) {
		if err = m.setAside(ctx, env, name, new(verifyWire), true); err == nil {
			files, err = m.loadVerify(ctx, env, shard)
		}
	}
	if err != nil {
		return err
	}
	if err := change(files); err != nil {
		return err
	}
	if err := m.storeRecord(ctx, env, name, verifyWireOf(files)); err != nil {
		return err
	}
	m.verify[shard].changed(files)
	return nil
}
