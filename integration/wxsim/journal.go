package wxsim

import (
	"context"
	"net/http"
	"slices"
	"sync"
	"time"
)

// Direction tells requests that the simulator received from pushes that it sent.
type Direction string

// The two directions.
const (
	In  Direction = "in"  // an API call or a visit of the OAuth page
	Out Direction = "out" // one attempt of a push
)

// Rule names what a violation breaks.
type Rule string

// What a gateway must never do.
const (
	RuleHeader       Rule = "header"        // Cookie, Authorization, X-Forwarded-*, Via, X-Wechat-* … reached WeChat
	RuleTokenPlace   Rule = "token-place"   // a token in a body or header, twice in the query, or none where one belongs
	RuleTokenKind    Rule = "token-kind"    // a token of a kind that the path does not take
	RuleTokenOwner   Rule = "token-owner"   // a token of another account than the one that the call is about
	RuleUnknownToken Rule = "unknown-token" // a token that was never issued here
	RuleChunked      Rule = "chunked"       // an upload without a length
	RuleFreshRefresh Rule = "fresh-refresh" // a token renewed that was neither refused nor near its end
	RuleTwoRefreshes Rule = "two-refreshes" // two renewals of one token at once
	RuleField        Rule = "field"         // a secret or id in a wrong or missing field
	RuleCodeAgain    Rule = "code-again"    // a single-use code used again
	RuleSecret       Rule = "secret"        // a wrong AppSecret
	RuleAnswer       Rule = "answer"        // a push answered wrongly: see PushResult.Wrong
	RuleDuplicate    Rule = "duplicate"     // a push that came again got another answer than before
)

// Violation is something that a well-behaved gateway never does.
type Violation struct {
	Rule Rule
	Text string // never holds a secret
}

// Entry is one request seen or one push attempt sent. No field holds a token or secret: known
// values are replaced by their kind in angle brackets.
type Entry struct {
	Seq       uint64
	Time      time.Time
	Direction Direction
	Method    string
	Host      string
	Path      string
	Proto     string
	Query     string   // raw query as received, known secret values masked
	QueryKeys []string // in the order received
	Header    http.Header
	Body      []byte // first 4 KiB, masked; nil for calls that carry secrets
	BodySHA   string // hex SHA-256 of the whole body, for byte-for-byte tests
	BodySize  int64

	Kind     Kind   // of the token that the call came with; "" without one
	AppID    string // whose token it was; for a push, the account it is about
	Platform string // platform of that token or push

	Errcode    int64
	Status     int    // sent (In) or received (Out); 0: no answer
	Fault      string // what was done to the call: delay, lost, half, drop, status …; "" nothing
	Violations []Violation
	Notes      []string // odd, but allowed
}

const (
	journalSize = 10000
	bodyKept    = 4 << 10
)

// Journal is everything that the simulator saw and sent: bounded, oldest entries dropped
// first; counts are of all, dropped ones included.
type Journal struct {
	observe func(Entry)

	mu         sync.Mutex
	max        int
	seq        uint64
	entries    []Entry
	violations []Entry // kept apart, so that a long run cannot push one out
	calls      map[string]int
	refreshes  map[holder]int
	changed    chan struct{} // closed and replaced on each entry
}

func newJournal(size int, observe func(Entry)) *Journal {
	if size <= 0 {
		size = journalSize
	}
	return &Journal{
		observe: observe, max: size, changed: make(chan struct{}),
		calls: map[string]int{}, refreshes: map[holder]int{},
	}
}

func (j *Journal) add(e Entry) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.seq++
	e.Seq = j.seq
	if len(j.entries) >= j.max {
		// Drop a tenth at once, so that a full journal does not move itself on every entry.
		j.entries = slices.Delete(j.entries, 0, len(j.entries)-j.max+1+j.max/10)
	}
	j.entries = append(j.entries, e)
	if len(e.Violations) > 0 && len(j.violations) < j.max {
		j.violations = append(j.violations, e)
	}
	if e.Direction == In {
		j.calls[e.Path]++
	}
	if j.observe != nil {
		j.observe(e)
	}
	close(j.changed)
	j.changed = make(chan struct{})
}

func (j *Journal) refreshed(h holder) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.refreshes[holder{kind: h.kind, appID: h.appID}]++
}

// Entries returns a copy of what is kept, oldest first.
func (j *Journal) Entries() []Entry {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.Clone(j.entries)
}

// Calls returns the requests received for a path, oldest first.
func (j *Journal) Calls(path string) []Entry {
	return slices.DeleteFunc(j.Entries(), func(e Entry) bool { return e.Direction != In || e.Path != path })
}

// Count is the number of requests received for a path since the start or the last Reset.
func (j *Journal) Count(path string) int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.calls[path]
}

// Pushes returns the push attempts sent about an account, or all with "".
func (j *Journal) Pushes(appID string) []Entry {
	return slices.DeleteFunc(j.Entries(), func(e Entry) bool {
		return e.Direction != Out || appID != "" && e.AppID != appID
	})
}

// Refreshes counts the access tokens of a kind handed out for an appid (of the platform, for
// KindComponent): first issues and exchanged authorization codes included, a stable token
// given a second time not. KindAuthorizer counts the account's tokens of all platforms.
func (j *Journal) Refreshes(kind Kind, appID string) int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.refreshes[holder{kind: kind, appID: appID}]
}

// Violations returns the entries with at least one violation, oldest first.
func (j *Journal) Violations() []Entry {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.Clone(j.violations)
}

// Reset forgets entries, counts and violations; it does not touch what was issued.
func (j *Journal) Reset() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.entries, j.violations = nil, nil
	clear(j.calls)
	clear(j.refreshes)
}

// Wait returns the first entry, kept or yet to come, for which fits is true, or ctx's error.
func (j *Journal) Wait(ctx context.Context, fits func(Entry) bool) (Entry, error) {
	var seen uint64
	for {
		j.mu.Lock()
		changed, entries := j.changed, j.entries
		at := len(entries)
		for at > 0 && entries[at-1].Seq > seen {
			at--
		}
		fresh := slices.Clone(entries[at:])
		j.mu.Unlock()
		for _, e := range fresh {
			seen = e.Seq
			if fits(e) {
				return e, nil
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return Entry{}, ctx.Err()
		}
	}
}

// WaitCalls waits until a path was called n times since the start or the last Reset.
func (j *Journal) WaitCalls(ctx context.Context, path string, n int) error {
	for {
		j.mu.Lock()
		changed, have := j.changed, j.calls[path]
		j.mu.Unlock()
		if have >= n {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
