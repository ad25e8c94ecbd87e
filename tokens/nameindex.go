package tokens

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// The name index is all accounts of the configured platforms in memory with their names, for who looks for one by a part
// of its name. The first such question has it built, in the background; it goes again when nobody asks. What this node
// reads or writes of an account meanwhile counts at once, and so does an account that is new on another node and heard of.

const (
	// maxNameIndex bounds the index, in bytes. An account takes 20 and its name: a million with names of ten Chinese
	// characters are 48 MiB. The accounts beyond it are not found by name.
	maxNameIndex = 96 << 20
	// nameIndexIdle is for how long the index is kept after the last question.
	nameIndexIdle = 15 * time.Minute
	// nameIndexAge is the age at which it is built anew, behind the one there is: names may have been learned elsewhere.
	nameIndexAge = 30 * time.Minute
	// nameSlice is how long one piece of the building takes, with namePage records in memory, nameWorkers of which are
	// read at the same time.
	nameSlice   = 10 * time.Second
	namePage    = 1000
	nameWorkers = 8

	nameJob = "names"
)

// NameIndexState says how far the index of names is.
type NameIndexState struct {
	State string // absent, building or ready
	Seen  int    // accounts that are in it
	Full  bool   // not all accounts are in it, for want of room
}

// names is the index, if there is one.
type names struct {
	mu    sync.Mutex // held by who puts one in the place of another
	index atomic.Pointer[nameIndex]
}

func (n *names) state() NameIndexState {
	x := n.index.Load()
	switch {
	case x == nil:
		return NameIndexState{State: "absent"}
	case !x.ready.Load():
		return NameIndexState{State: "building", Seen: int(x.seen.Load()), Full: x.full.Load()}
	default:
		return NameIndexState{State: "ready", Seen: int(x.seen.Load()), Full: x.full.Load()}
	}
}

// nameIndex has the accounts of each platform in the folders and in the order in which the store has them.
type nameIndex struct {
	platforms []string // ascending
	shards    map[string]*[shardCount]nameShard

	used  atomic.Int64 // when it was last asked: Unix nanoseconds
	seen  atomic.Int64
	size  atomic.Int64
	ready atomic.Bool
	full  atomic.Bool

	// Of the building, of which there is one at a time.
	at      place
	lines   []byte // of the folder that is read, as far as it was read
	walked  int64  // accounts
	began   time.Time
	builtAt time.Time
	said    time.Time // when the log last heard that it does not go on
}

// nameShard has the accounts of one folder: lines in ascending order, each of them the last part of a record's name, a
// zero byte, and the account's name as it is compared. So a look for a part of a name is one pass over plain text.
type nameShard struct {
	mu      sync.Mutex
	lines   []byte
	touched map[string]bool // while the folder is read: accounts of which more is known by now
}

func newNameIndex(platforms []string) *nameIndex {
	x := &nameIndex{platforms: platforms, shards: make(map[string]*[shardCount]nameShard, len(platforms))}
	for _, p := range platforms {
		x.shards[p] = new([shardCount]nameShard)
	}
	x.rewind()
	return x
}

// rewind has the building begin at the first folder.
func (x *nameIndex) rewind() {
	x.at, x.lines, x.walked, x.began = place{platform: x.platforms[0]}, nil, 0, time.Now()
	x.full.Store(false)
}

// foldName is a name as it is compared: without the difference of capitals, and without what ends a line.
func foldName(name string) string { return strings.ToLower(printable(name, maxNickName)) }

// lineAt returns the start of the line that holds b[i].
func lineAt(b []byte, i int) int { return bytes.LastIndexByte(b[:i], '\n') + 1 }

// findLine returns where the line of an account is, or where it belongs; end is start then.
func findLine(lines []byte, id string) (start, end int) {
	low, high := 0, len(lines)
	for low < high {
		from := lineAt(lines, low+(high-low)/2)
		to := from + bytes.IndexByte(lines[from:], '\n') + 1
		switch have := lines[from : from+bytes.IndexByte(lines[from:to], 0)]; strings.Compare(string(have), id) {
		case 0:
			return from, to
		case -1:
			low = to
		default:
			high = from
		}
	}
	return low, low
}

func appendLine(lines []byte, id, folded string) []byte {
	lines = append(lines, id...)
	lines = append(lines, 0)
	lines = append(lines, folded...)
	return append(lines, '\n')
}

// has reports whether the shard has an account.
func (s *nameShard) has(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	start, end := findLine(s.lines, id)
	return start < end
}

// find returns the accounts whose names have a part, behind one of them, at most n.
func (s *nameShard) find(part []byte, after string, n int) (ids []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	rest := s.lines
	if after != "" {
		start, end := findLine(rest, after)
		if rest = rest[start:]; end > start {
			rest = rest[end-start:]
		}
	}
	for len(ids) < n {
		i := bytes.Index(rest, part)
		if i < 0 {
			break
		}
		start := lineAt(rest, i)
		end := i + bytes.IndexByte(rest[i:], '\n')
		id, name, _ := bytes.Cut(rest[start:end], []byte{0})
		if i > start+len(id) || bytes.Contains(name, part) { // or it is in the appid alone
			ids = append(ids, string(id))
		}
		rest = rest[end+1:]
	}
	return ids
}

// set notes the name of an account, or that it is there no more.
func (x *nameIndex) set(s *nameShard, id, folded string, gone bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.touched != nil {
		s.touched[id] = true
	}
	start, end := findLine(s.lines, id)
	var line []byte
	if !gone {
		line = appendLine(nil, id, folded)
	}
	if bytes.Equal(s.lines[start:end], line) {
		return
	}
	if more := len(line) - (end - start); more > 0 && !x.room(more) {
		return
	}
	x.size.Add(int64(len(line) - (end - start)))
	s.lines = slices.Replace(s.lines, start, end, line...)
}

// room reports whether so many more bytes may be kept.
func (x *nameIndex) room(more int) bool {
	if x.size.Load()+int64(more) <= maxNameIndex {
		return true
	}
	x.full.Store(true)
	return false
}

// begin notes that a folder is being read.
func (s *nameShard) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.touched = make(map[string]bool)
}

// replace puts what was read of a folder in the place of what there was, but for what has become known since.
func (x *nameIndex) replace(s *nameShard, lines []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id := range s.touched {
		from, to := findLine(s.lines, id)
		start, end := findLine(lines, id)
		lines = slices.Replace(lines, start, end, s.lines[from:to]...)
	}
	s.touched = nil
	if more := len(lines) - len(s.lines); more > 0 && !x.room(more) {
		// As many as there is room for, which may be none.
		left := max(0, int(maxNameIndex-x.size.Load())+len(s.lines))
		lines = lines[:lineAt(lines, min(left, len(lines)))]
	}
	x.size.Add(int64(len(lines) - len(s.lines)))
	s.lines = slices.Clone(lines) // without the room to grow that building it took
}

// shardOf is where an account of a platform belongs; nil: nowhere, since the platform is new.
func (x *nameIndex) shardOf(k Key) *nameShard {
	shards := x.shards[k.Platform]
	if shards == nil {
		return nil
	}
	sum := sha256.Sum256([]byte(k.AppID))
	return &shards[sum[0]]
}

// learnName tells the index what the store has of an account by now; rec is nil if it has nothing.
func (m *Manager) learnName(k Key, rec *record) {
	x := m.names.index.Load()
	if x == nil || k.Kind != KindAuthorizer {
		return
	}
	if s := x.shardOf(k); s != nil {
		name := ""
		if rec != nil {
			name = foldName(rec.NickName)
		}
		x.set(s, recordID(k.AppID), name, rec == nil)
	}
}

// hearName has an account read for the index that another node has changed and that is not in it. A change of one that is
// there, of which there are many, is most likely of its token.
func (m *Manager) hearName(k Key) {
	x := m.names.index.Load()
	if x == nil || k.Kind != KindAuthorizer {
		return
	}
	if s := x.shardOf(k); s == nil || s.has(recordID(k.AppID)) {
		return
	}
	m.queue.addNews("name "+k.recordName(), func(ctx context.Context) {
		if env, err := m.current(); err == nil {
			if rec, err := m.look(ctx, env, k); err == nil {
				m.learnName(k, rec)
			}
		}
	})
}

// nameIndex returns the index of the platforms that are configured. The first call has it built.
func (m *Manager) nameIndex(env *Environment) *nameIndex {
	x, begin := m.names.of(sortedPlatforms(env))
	if begin {
		m.queue.add(nameJob, 0, m.keepNameIndex)
		m.queue.hasten(nameJob) // one that waits for the end of an index before this one
	}
	return x
}

// of is the index of some platforms, of which there is at least one, and whether it is a new one.
func (n *names) of(platforms []string) (x *nameIndex, begin bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	x = n.index.Load()
	if begin = x == nil || !slices.Equal(x.platforms, platforms); begin {
		x = newNameIndex(platforms)
	}
	x.used.Store(time.Now().UnixNano())
	n.index.Store(x)
	return x, begin
}

// keepNameIndex is the job that builds the index, piece by piece, and drops it when it is not used any more.
func (m *Manager) keepNameIndex(ctx context.Context) error {
	x := m.names.index.Load()
	env, err := m.current()
	if err != nil || x == nil {
		return nil //nolint:nilerr // closed
	}
	now := time.Now()
	if m.dropNameIndex(x, now) {
		env.Log.Debug("the index of account names is dropped: nobody has looked for a name", "unused_for", nameIndexIdle)
		return nil
	}
	if x.ready.Load() && x.at == (place{}) {
		if age := now.Sub(x.builtAt); age < nameIndexAge {
			idle := time.Unix(0, x.used.Load()).Add(nameIndexIdle).Sub(now)
			return retryError{max(min(idle, nameIndexAge-age), time.Second)}
		}
		x.rewind()
	}
	sliceCtx, cancel := context.WithTimeout(ctx, nameSlice)
	defer cancel()
	err = m.walkNames(sliceCtx, env, x)
	switch {
	case err != nil && sliceCtx.Err() == nil:
		if x.said.IsZero() || now.Sub(x.said) >= troubleLogEvery {
			x.said = now
			env.Log.Warn("accounts cannot be read for a search by name; tried again", "error", err)
		}
		return err
	case err != nil || x.at != (place{}):
		return retryError{0} // its time is up: others' turn
	}
	if !x.ready.Swap(true) {
		env.Log.Info("the index of account names is built", "accounts", x.walked, "bytes", x.size.Load(), "took", time.Since(x.began).Round(time.Millisecond))
	}
	x.seen.Store(x.walked)
	x.builtAt = time.Now()
	return retryError{nameIndexIdle}
}

// dropNameIndex forgets an index that nobody has used for a while.
func (m *Manager) dropNameIndex(x *nameIndex, now time.Time) bool {
	m.names.mu.Lock()
	defer m.names.mu.Unlock()
	if now.Sub(time.Unix(0, x.used.Load())) < nameIndexIdle {
		return false
	}
	return m.names.index.CompareAndSwap(x, nil)
}

// walkNames goes on with the building until ctx ends. Where it is the zero place, it came to the end.
func (m *Manager) walkNames(ctx context.Context, env *Environment, x *nameIndex) error {
	for x.at != (place{}) {
		s := &x.shards[x.at.platform][x.at.shard]
		if x.at.after == "" {
			s.begin()
		}
		names, next, err := m.scanAuthorizers(ctx, env, x.at, "", namePage)
		if err != nil {
			return err
		}
		read := make([]*record, len(names))
		err = eachOn(ctx, len(names), nameWorkers, func(ctx context.Context, i int) error {
			k, ok := keyOf(names[i])
			if !ok {
				return nil // a stray file
			}
			rec, err := m.look(ctx, env, k)
			if errors.Is(err, errUnreadable) {
				return nil
			}
			read[i] = rec
			return err
		})
		if err != nil {
			return err
		}
		for i, rec := range read {
			if rec != nil {
				x.lines = appendLine(x.lines, path.Base(names[i]), foldName(rec.NickName))
				x.walked++
			}
		}
		if x.walked > x.seen.Load() {
			x.seen.Store(x.walked)
		}
		if next != "" {
			x.at.after = next
			continue
		}
		x.replace(s, x.lines)
		x.lines = x.lines[:0]
		x.at = x.behind()
	}
	x.lines = nil
	return nil
}

// behind is the folder after the one that was read; the zero place: there is none.
func (x *nameIndex) behind() place {
	if x.at.shard+1 < shardCount {
		return place{x.at.platform, x.at.shard + 1, ""}
	}
	if i := slices.Index(x.platforms, x.at.platform) + 1; i < len(x.platforms) {
		return place{platform: x.platforms[i]}
	}
	return place{}
}

// byName looks for accounts by a part of their name, as far as the index has them by now.
func (b *browser) byName(ctx context.Context) error {
	at, more := b.begin()
	if !more {
		return nil
	}
	x := b.m.nameIndex(b.env)
	first := at
	for more && len(b.found) < b.limit {
		reached, err := b.namesIn(ctx, x, at)
		if err == nil {
			err = ctx.Err()
		}
		if err != nil && (at == first || !errors.Is(ctx.Err(), context.DeadlineExceeded)) {
			return err
		}
		if err != nil {
			break // out of time: the next page goes on from here
		}
		if at = reached; at.after == "" {
			at, more = b.following(at)
		}
	}
	if more {
		b.next = b.cursor(at)
	}
	return nil
}

// namesIn adds accounts of one folder to the page. Where it came to is behind the last of them if there may be more.
func (b *browser) namesIn(ctx context.Context, x *nameIndex, at place) (reached place, err error) {
	ids := x.shards[at.platform][at.shard].find([]byte(b.text), at.after, b.limit-len(b.found))
	hits := make([]*ListedAuthorizer, len(ids))
	err = each(ctx, len(ids), func(ctx context.Context, i int) (err error) {
		hits[i], err = b.m.listed(ctx, b.env, AuthorizerKey(at.platform, idOf(ids[i])))
		return err
	})
	if err != nil {
		return at, err
	}
	for _, a := range hits {
		if a != nil && strings.Contains(foldName(a.NickName), b.text) { // it may have got another name since
			b.found = append(b.found, *a)
		}
	}
	if len(ids) == 0 {
		return place{platform: at.platform, shard: at.shard}, nil
	}
	return place{at.platform, at.shard, ids[len(ids)-1]}, nil
}
