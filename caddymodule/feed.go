package caddymodule

import (
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// Limits of the feed.
const (
	feedEntries     = 2000   // the newest of all
	refusalEntries  = 1000   // the newest that were refused or failed, so that traffic does not push them out
	strangerEntries = 500    // of those, the ones of callers who proved nothing: anybody can cause them
	maxFeedAccounts = 10_000 // accounts whose last push, call and error are remembered: those of the most recent use
	maxFeedText     = 300    // bytes of a reason
	maxWord         = 48     // bytes of a MsgType, Event or InfoType that is shown; WeChat's have up to 40
	maxWords        = 512    // different ones

	feedShards = 64
)

// Kinds of entries.
const (
	feedPush          = "push"
	feedEvent         = "event"
	feedCall          = "call"
	feedLogin         = "login"
	feedAuthorization = "authorization"
)

// Outcomes of entries beside those of API calls and of passive replies: ok, refused, canceled.
const (
	outcomeFailed = "failed"
	outcomeHeld   = "held" // not answered, so that WeChat pushes again
	outcomeSlow   = "slow" // the last push was answered without the backend
)

// Entry is one thing that happened at the gateway, for who runs it: a push, a call, a login. It never holds content, an
// openid, an event key, a query or a token.
type Entry struct {
	Seq      uint64       `json:"seq"`
	Time     time.Time    `json:"time"`
	Kind     string       `json:"kind"`
	AppID    string       `json:"appid,omitempty"`
	Platform string       `json:"platform,omitempty"`
	Client   string       `json:"client,omitempty"`
	What     string       `json:"what,omitempty"`
	Outcome  string       `json:"outcome"`
	Status   int          `json:"status,omitempty"`
	TookMS   float64      `json:"took_ms,omitempty"`
	ErrCode  int64        `json:"errcode,omitempty"`
	RID      string       `json:"rid,omitempty"`
	Reason   string       `json:"reason,omitempty"`
	Meaning  *tokens.Text `json:"meaning,omitempty"`
	Remedy   *tokens.Text `json:"remedy,omitempty"`

	took time.Duration
	// known: the account is one of ours, as far as the caller proved. One that is not takes no place in the table.
	known bool
	// stranger: the caller proved nothing.
	stranger bool
	// wechats: the errcode is WeChat's, not one that the gateway answers with in its place.
	wechats bool
}

// bad reports whether an entry is one of what was refused or failed.
func (e *Entry) bad() bool { return e.Outcome == outcomeRefused || e.Outcome == outcomeFailed }

// shown is an entry as it is told.
func (e Entry) shown() Entry {
	now := time.Now()
	e.Time = now.Add(e.Time.Sub(now)).Round(0).UTC().Truncate(time.Millisecond) // by the clock that both have, which nobody sets
	e.TookMS = math.Round(float64(e.took)/float64(time.Millisecond/10)) / 10
	if e.ErrCode == 0 || !e.wechats {
		return e
	}
	if known, ok := tokens.Explain(e.ErrCode); ok {
		e.Meaning, e.Remedy = &known.Meaning, &known.Remedy
	}
	return e
}

// feed remembers what happened last. It belongs to what reloads share, and is not shared with other nodes. To add what
// went well takes no memory: every place in it is there from the start, or is the account's.
type feed struct {
	epoch time.Time
	base  uint64 // of seq: a later process counts from a higher one
	seq   atomic.Uint64
	all   feedRing // an entry of seq n is in place n
	bad   feedRing
	odd   feedRing // of strangers
	words wordTable

	shards [feedShards]feedShard
}

func newFeed() *feed {
	// Up to a million entries a second, and exact as a number in JavaScript.
	now := time.Now()
	f := &feed{epoch: now, base: uint64(now.Unix()) << 20}
	f.seq.Store(f.base)
	f.all, f.bad, f.odd = newFeedRing(now, feedEntries), newFeedRing(now, refusalEntries), newFeedRing(now, strangerEntries)
	return f
}

// now is the time at half the cost of time.Now, which reads two clocks. What it says of the day is put right when it is shown.
func (f *feed) now() time.Time { return f.epoch.Add(time.Since(f.epoch)) }

// add remembers an entry. Of one that is long its strings are kept as they are, but for the appid: they must be small, and not part of
// anything large.
func (f *feed) add(e *Entry) {
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	e.Seq = f.seq.Add(1)
	var r record
	whole := r.pack(e, f.epoch)
	if e.AppID != "" {
		f.note(e, &r, whole)
	}
	f.all.put(e.Seq, &r, whole)
	switch {
	case !e.bad():
	case e.stranger:
		f.odd.put(f.odd.next.Add(1), &r, whole)
	default:
		f.bad.put(f.bad.next.Add(1), &r, whole)
	}
}

// feedRing has the newest entries. Each place has a lock of its own, so that those who write meet only those who read.
type feedRing struct {
	epoch time.Time
	next  *atomic.Uint64
	slots []feedSlot
	whole []*Entry // of the slot in the same place, if it has no room for the entry
}

type feedSlot struct {
	mu     sync.Mutex
	place  uint64 // 0: empty
	record record
}

func newFeedRing(epoch time.Time, entries int) feedRing {
	return feedRing{epoch: epoch, next: new(atomic.Uint64), slots: make([]feedSlot, entries), whole: make([]*Entry, entries)}
}

func (r *feedRing) put(place uint64, e *record, whole *Entry) {
	i := place % uint64(len(r.slots))
	s := &r.slots[i]
	s.mu.Lock()
	if s.place < place {
		s.place = place
		s.record.set(e)
		if r.whole[i] != whole {
			r.whole[i] = whole
		}
	}
	s.mu.Unlock()
}

// get returns the entry in a place, if it is there yet and still.
func (r *feedRing) get(place uint64) (e Entry, ok bool) {
	i := place % uint64(len(r.slots))
	s := &r.slots[i]
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.place != place {
		return Entry{}, false
	}
	return s.record.entry(r.epoch, r.whole[i]), true
}

// newest returns all that is there, in no order.
func (r *feedRing) newest() (list []Entry) {
	for i := range r.slots {
		s := &r.slots[i]
		s.mu.Lock()
		if s.place != 0 {
			list = append(list, s.record.entry(r.epoch, r.whole[i]))
		}
		s.mu.Unlock()
	}
	return list
}

// after returns the entries after seq, oldest first, and where to go on. An appid that is not empty chooses among them.
// Missed is how many are gone already. After 0, or with a seq that nobody gave out, it returns the newest.
func (f *feed) after(seq uint64, appid string, limit int) (entries []Entry, next uint64, missed uint64) {
	last := f.seq.Load()
	oldest := max(last, f.base+feedEntries) - feedEntries // before the oldest
	if seq == 0 || seq > last {
		next = last
		for place := last; place > oldest && len(entries) < limit; place-- {
			e, ok := f.all.get(place)
			switch {
			case !ok: // it is being written: what is newer is for the next time
				entries, next = entries[:0], place-1
			case appid == "" || e.AppID == appid:
				entries = append(entries, e.shown())
			}
		}
		slices.Reverse(entries)
		return entries, next, 0
	}
	seq = max(seq, f.base)
	if seq < oldest {
		seq, missed = oldest, oldest-seq
	}
	for next = seq; next < last && len(entries) < limit; next++ {
		e, ok := f.all.get(next + 1)
		if !ok {
			if f.seq.Load() < next+1+feedEntries {
				break // it is being written
			}
			missed++ // it was overwritten meanwhile
			continue
		}
		if appid == "" || e.AppID == appid {
			entries = append(entries, e.shown())
		}
	}
	return entries, next, missed
}

// refused returns what was refused or failed, newest first, as far as want says so.
func (f *feed) refused(limit int, want func(*Entry) bool) (entries []Entry) {
	all := append(f.bad.newest(), f.odd.newest()...)
	slices.SortFunc(all, func(a, b Entry) int { return int(int64(b.Seq - a.Seq)) })
	for i := range all {
		if len(entries) == limit {
			break
		}
		if want(&all[i]) {
			entries = append(entries, all[i].shown())
		}
	}
	return entries
}

// feedShard has some of the accounts. What was not used for longest makes room, or nearly that: a hand goes round and
// spares once what was used since it came by.
type feedShard struct {
	mu       sync.Mutex
	byAppID  map[string]*accountFeed
	accounts []*accountFeed
	hand     int
}

// accountFeed is what happened last to an account.
type accountFeed struct {
	appid string
	whole [accountEntries]*Entry // as in a feedRing
	used  bool
	last  [accountEntries]record
}

// What of an account is remembered.
const (
	accountPush = iota
	accountCall
	accountError

	accountEntries
)

// remember keeps an entry as the account's last of those.
func (a *accountFeed) remember(which int, r *record, whole *Entry) {
	a.last[which].set(r)
	if a.whole[which] != whole {
		a.whole[which] = whole
	}
}

// shard is where an account is: the end of an appid is random.
func (f *feed) shard(appid string) *feedShard {
	return &f.shards[(uint(appid[len(appid)-1])*31+uint(appid[len(appid)/2]))%feedShards]
}

// note remembers an entry as its account's last.
func (f *feed) note(e *Entry, r *record, whole *Entry) {
	s := f.shard(e.AppID)
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.byAppID[e.AppID]
	if a == nil {
		if !e.known {
			return
		}
		a = s.room()
		*a = accountFeed{appid: strings.Clone(e.AppID)}
		s.byAppID[a.appid] = a
	}
	a.used = true
	switch {
	case e.bad():
		a.remember(accountError, r, whole)
	case e.Kind == feedPush:
		a.remember(accountPush, r, whole)
	case e.Kind == feedCall:
		a.remember(accountCall, r, whole)
	}
}

// room returns a place for one more account. The caller holds mu.
func (s *feedShard) room() *accountFeed {
	if s.byAppID == nil {
		s.byAppID = make(map[string]*accountFeed)
	}
	if len(s.accounts) < maxFeedAccounts/feedShards {
		a := new(accountFeed)
		s.accounts = append(s.accounts, a)
		return a
	}
	for {
		a := s.accounts[s.hand]
		s.hand = (s.hand + 1) % len(s.accounts)
		if !a.used {
			delete(s.byAppID, a.appid)
			return a
		}
		a.used = false
	}
}

// of returns an account's last push, call and error, as far as there were such.
func (f *feed) of(appid string) (lastPush, lastCall, lastError *Entry) {
	if appid == "" {
		return nil, nil, nil
	}
	s := f.shard(appid)
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.byAppID[appid]
	if a == nil {
		return nil, nil, nil
	}
	told := func(which int) *Entry {
		e := a.last[which].entry(f.epoch, a.whole[which])
		if e.Seq == 0 {
			return nil
		}
		e = e.shown()
		return &e
	}
	return told(accountPush), told(accountCall), told(accountError)
}

// wordTable has the names of what is pushed, once each, so that an entry does not keep the push that it came in. They are read
// without a lock. The zero value is ready.
type wordTable struct {
	mu    sync.Mutex
	known atomic.Pointer[map[[2]string]string]
}

// otherWord stands for what WeChat has no such name for, and for what finds no place in the table.
const otherWord = "other"

// name is what a push of that MsgType and Event, or of that InfoType, is called.
func (t *wordTable) name(kind, event string) string {
	if known := t.known.Load(); known != nil {
		if name, ok := (*known)[[2]string{kind, event}]; ok {
			return name
		}
	}
	if !isWord(kind) || event != "" && !isWord(event) {
		return otherWord
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	next := make(map[[2]string]string)
	if known := t.known.Load(); known != nil {
		if len(*known) >= maxWords {
			return otherWord
		}
		for k, v := range *known {
			next[k] = v
		}
	}
	name := strings.Clone(kind)
	key := [2]string{name, ""}
	if event != "" {
		name += " " + event
		key[1] = name[len(kind)+1:]
	}
	next[key] = name
	t.known.Store(&next)
	return name
}

// isWord reports whether a name is like WeChat's: what a user or a forger writes is not shown.
func isWord(s string) bool {
	if s == "" || len(s) > maxWord {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '_' {
			return false
		}
	}
	return true
}
