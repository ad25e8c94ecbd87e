package tokens

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// The authorizers as a list, for who runs the gateway. There may be a million: a page costs what is on it, and nothing of
// it takes a place in the cache, where it would drive out what is in use.

const (
	// MaxAuthorizers bounds the accounts on one page.
	MaxAuthorizers = 200
	// browseTimeout bounds one page. One that is not full by then ends early, with a cursor to go on from.
	browseTimeout = 3 * time.Second
	// browseChunk is the number of records that are read between two looks at the clock.
	browseChunk = 50
	// browseShards is the most folders that are read at the same time. A page begins with one and doubles the number with
	// each that did not fill it, so that neither a few accounts in many folders nor a million take long.
	browseShards = 32
	// maxBrowseText and maxBrowseCursor bound what is asked for, in bytes.
	maxBrowseText   = 128
	maxBrowseCursor = 1024
)

// QueryError says what is wrong with a question, and what is to be asked instead.
type QueryError string

func (e QueryError) Error() string { return string(e) }

// AuthorizerQuery asks for a page of the accounts that authorised platforms.
type AuthorizerQuery struct {
	Platform string // empty: all that are configured
	// Text is an appid, the beginning of one, or a gh_ id, of which the store knows; anything else is looked for in the
	// accounts' names, in an index that the first such question has built. Empty: all.
	Text   string
	Cursor string // Next of the page before; empty: the first one
	Limit  int    // 1 to MaxAuthorizers; an appid or a gh_ id has one page, with a line for each platform
}

// AuthorizerState says how an account stands.
type AuthorizerState string

// The states of an account's authorization.
const (
	StateAuthorized AuthorizerState = "authorized"
	StateRevoked    AuthorizerState = "revoked"
	// StateUnreadable: the record is there and cannot be read; the log says why when the account is used.
	StateUnreadable AuthorizerState = "unreadable"
)

// ListedAuthorizer is an account on a page.
type ListedAuthorizer struct {
	Platform, AppID    string
	NickName, UserName string // empty until they are known
	State              AuthorizerState
}

// AuthorizerPage is a page of accounts: those of one platform after those of another, each account once.
type AuthorizerPage struct {
	Authorizers []ListedAuthorizer
	// Next is the cursor of the page after this one; empty: there is none. Pages may be short, or empty, and have one. It
	// says by itself where it is: it is good on every node and after a restart, whatever comes and goes meanwhile.
	Next  string
	Index NameIndexState
}

// Authorizers returns a page of accounts. It never asks WeChat, and does not see a record that waits to be written, but for
// one whose appid is asked for. The error is a QueryError if the question is not in order.
func (m *Manager) Authorizers(ctx context.Context, q AuthorizerQuery) (AuthorizerPage, error) {
	env, err := m.current()
	if err != nil {
		return AuthorizerPage{}, err
	}
	b, err := newBrowser(m, env, q)
	if err != nil {
		return AuthorizerPage{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, browseTimeout)
	defer cancel()
	if b.kind == searchName && len(b.platforms) > 0 {
		m.nameIndex(env) // begins
	}
	index := m.names.state() // as the search finds it: what that misses must not look complete
	switch b.kind {
	case searchName:
		err = b.byName(ctx)
	case searchAppID, searchUserName:
		err = b.exact(ctx)
	default:
		err = b.walk(ctx)
	}
	if err != nil {
		return AuthorizerPage{}, err
	}
	return AuthorizerPage{Authorizers: b.found, Next: b.next, Index: index}, nil
}

// searchKind is what is looked for.
type searchKind int

const (
	searchAll searchKind = iota
	searchAppID
	searchPrefix
	searchUserName
	searchName
)

// browser is one page under way.
type browser struct {
	m   *Manager
	env *Environment

	platforms []string // to look at, in ascending order
	kind      searchKind
	text      string // in lower case
	limit     int
	mark      string // of the question, in its cursors

	at    place
	found []ListedAuthorizer
	next  string
}

// place is where a page begins: behind a name in one of the folders of a platform.
type place struct {
	platform string
	shard    int
	after    string // the store's own cursor, or the last name found in the index
}

func newBrowser(m *Manager, env *Environment, q AuthorizerQuery) (*browser, error) {
	b := &browser{m: m, env: env, limit: q.Limit}
	if q.Limit < 1 || q.Limit > MaxAuthorizers {
		return nil, QueryError(fmt.Sprintf("limit: want a number from 1 to %d", MaxAuthorizers))
	}
	if q.Platform == "" {
		b.platforms = sortedPlatforms(env)
	} else if _, ok := env.platform(q.Platform); ok {
		b.platforms = []string{q.Platform}
	} else {
		return nil, QueryError(fmt.Sprintf("platform: the configuration has no platform %q", printable(q.Platform, maxID)))
	}
	text := strings.TrimSpace(q.Text)
	switch {
	case len(text) > maxBrowseText:
		return nil, QueryError(fmt.Sprintf("q: longer than %d bytes", maxBrowseText))
	case !utf8.ValidString(text):
		return nil, QueryError("q: not UTF-8")
	case strings.ContainsFunc(text, unicode.IsControl):
		return nil, QueryError("q: has a control character")
	}
	b.text = foldName(text)
	b.kind = kindOfSearch(b.text)
	sum := sha256.Sum256([]byte(q.Platform + "\x00" + b.text))
	b.mark = hex.EncodeToString(sum[:4])
	if q.Cursor == "" {
		return b, nil
	}
	var err error
	b.at, err = b.parseCursor(q.Cursor)
	return b, err
}

func sortedPlatforms(env *Environment) (appids []string) {
	for i := range env.Platforms {
		appids = append(appids, env.Platforms[i].AppID)
	}
	slices.Sort(appids)
	return appids
}

// kindOfSearch tells what a text in lower case is. No name has the form of the others but by accident.
func kindOfSearch(text string) searchKind {
	digits, isID := strings.CutPrefix(text, "wx")
	userName, isUserName := strings.CutPrefix(text, "gh_")
	switch {
	case text == "":
		return searchAll
	case isAppID(text):
		return searchAppID
	case isID && len(digits) < 16 && strings.Trim(digits, "0123456789abcdef") == "":
		return searchPrefix
	case isUserName && userName != "" && strings.Trim(userName, "0123456789abcdefghijklmnopqrstuvwxyz_-") == "":
		return searchUserName
	default:
		return searchName
	}
}

// cursorWire is a cursor before it is coded.
type cursorWire struct {
	Mark     string `json:"q"`
	Platform string `json:"p"`
	Shard    int    `json:"s"`
	After    []byte `json:"a,omitempty"`
}

func (b *browser) cursor(at place) string {
	wire, err := json.Marshal(cursorWire{b.mark, at.platform, at.shard, []byte(at.after)})
	if err != nil {
		return "" // it has only texts and a number
	}
	return base64.RawURLEncoding.EncodeToString(wire)
}

var errCursor = QueryError("cursor: not one that this list has given: begin without it")

func (b *browser) parseCursor(text string) (at place, err error) {
	raw, err := base64.RawURLEncoding.DecodeString(text)
	if err != nil || len(text) > maxBrowseCursor {
		return place{}, errCursor
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	var wire cursorWire
	switch {
	case dec.Decode(&wire) != nil || dec.More(), wire.Shard < 0 || wire.Shard >= shardCount, wire.Platform == "" || len(wire.Platform) > maxID:
		return place{}, errCursor
	case wire.Mark != b.mark:
		return place{}, QueryError("cursor: it was given for another platform or q: begin without it")
	case b.kind == searchAppID || b.kind == searchUserName:
		return place{}, errCursor // these have one page
	}
	return place{wire.Platform, wire.Shard, string(wire.After)}, nil
}

// begin is where the page begins, in one of the platforms there are by now; false: behind the last of them.
func (b *browser) begin() (at place, ok bool) {
	i, found := slices.BinarySearch(b.platforms, b.at.platform)
	switch {
	case i == len(b.platforms):
		return place{}, false
	case found:
		return b.at, true
	default:
		return place{platform: b.platforms[i]}, true
	}
}

// following is the folder after that of a place; false: it is the last one.
func (b *browser) following(at place) (next place, ok bool) {
	if at.shard+1 < shardCount {
		return place{at.platform, at.shard + 1, ""}, true
	}
	i, found := slices.BinarySearch(b.platforms, at.platform)
	if found {
		i++
	}
	if i == len(b.platforms) {
		return place{}, false
	}
	return place{platform: b.platforms[i]}, true
}

// exact looks for one account: by its appid, or by its gh_ id.
func (b *browser) exact(ctx context.Context) error {
	appid := b.text
	if b.kind == searchUserName {
		var err error
		_, appid, err = b.m.ByUserName(ctx, b.text)
		if errors.Is(err, ErrNotAuthorized) {
			return nil
		}
		if err != nil {
			return err
		}
	}
	for _, platform := range b.platforms {
		a, err := b.m.listed(ctx, b.env, AuthorizerKey(platform, appid))
		if err != nil {
			return err
		}
		if a != nil && (b.kind == searchAppID || a.UserName == b.text || a.UserName == "") {
			b.found = append(b.found, *a)
		}
	}
	return nil
}

// walk reads folder after folder.
func (b *browser) walk(ctx context.Context) error {
	at, more := b.begin()
	first, width := at, 1
	for more && len(b.found) < b.limit {
		group := []place{at}
		for len(group) < width {
			next, ok := b.following(group[len(group)-1])
			if !ok {
				break
			}
			group = append(group, next)
		}
		reached, end, err := b.folders(ctx, group)
		if err != nil && (reached == first || !errors.Is(ctx.Err(), context.DeadlineExceeded)) {
			return err
		}
		at, more = reached, !end
		if err != nil {
			break // out of time: the next page goes on from here
		}
		if width *= 2; at.after != "" {
			width = 1
		}
		width = min(width, browseShards)
	}
	if more {
		b.next = b.cursor(at)
	}
	return nil
}

// folders adds what is in a few folders to the page, in their order, and returns where it came to; end: all was read.
// After an error that is where it did not come further.
func (b *browser) folders(ctx context.Context, group []place) (reached place, end bool, err error) {
	type scanned struct {
		names []string
		next  string
		err   error
	}
	scans := make([]scanned, len(group))
	scan := func(ctx context.Context, at place, n int) (s scanned) {
		s.names, s.next, s.err = b.m.scanAuthorizers(ctx, b.env, at, b.prefix(), n)
		return s
	}
	_ = each(ctx, len(group), func(ctx context.Context, i int) error { // one that fails does not end those before it
		scans[i] = scan(ctx, group[i], min(b.limit-len(b.found), browseChunk))
		return nil
	})
	for i, at := range group {
		s, left := scans[i], b.limit-len(b.found)
		switch {
		case left == 0:
			return at, false, nil
		case ctx.Err() != nil:
			return at, false, fmt.Errorf("%w: %w", ErrStore, ctx.Err())
		case len(s.names) > left:
			s = scan(ctx, at, left) // a store's cursor is that of a page's end
		}
		if s.err != nil {
			return at, false, s.err
		}
		page := make([]*ListedAuthorizer, len(s.names))
		err := each(ctx, len(s.names), func(ctx context.Context, i int) (err error) {
			if k, ok := keyOf(s.names[i]); ok {
				page[i], err = b.m.listed(ctx, b.env, k)
			}
			return err // a stray file is none
		})
		if err != nil {
			return at, false, err
		}
		for _, a := range page {
			if a != nil {
				b.found = append(b.found, *a)
			}
		}
		if s.next != "" {
			return place{at.platform, at.shard, s.next}, false, nil
		}
	}
	reached, more := b.following(group[len(group)-1])
	return reached, !more, nil
}

// prefix is how the names begin that are looked for in each folder.
func (b *browser) prefix() string {
	if b.kind == searchPrefix {
		return b.text
	}
	return ""
}

// scanAuthorizers is a page of the names in one of the folders of a platform's authorizers.
func (m *Manager) scanAuthorizers(ctx context.Context, env *Environment, at place, prefix string, n int) (names []string, next string, err error) {
	folder := authorizerFolder(at.platform, at.shard)
	err = env.operate(ctx, "list", storeTimeout, func(ctx context.Context) (err error) {
		names, next, err = Scan(ctx, env.Store, folder+"/"+prefix, at.after, n)
		return err
	})
	if err != nil {
		return nil, "", fmt.Errorf("%w: list %s: %w", ErrStore, folder, err)
	}
	return names, next, nil
}

// authorizerFolder is one of the folders over which a platform's authorizers are spread.
func authorizerFolder(platform string, shard int) string {
	return path.Join(root, string(KindAuthorizer), recordID(platform), hex.EncodeToString([]byte{byte(shard)})) //nolint:gosec // below shardCount
}

// listed is an account as a list shows it; nil: there is none.
func (m *Manager) listed(ctx context.Context, env *Environment, k Key) (*ListedAuthorizer, error) {
	rec, err := m.look(ctx, env, k)
	switch {
	case errors.Is(err, errUnreadable):
		return &ListedAuthorizer{Platform: k.Platform, AppID: k.AppID, State: StateUnreadable}, nil
	case err != nil || rec == nil:
		return nil, err
	}
	a := &ListedAuthorizer{Platform: k.Platform, AppID: k.AppID, NickName: rec.NickName, UserName: rec.UserName, State: StateAuthorized}
	if rec.revoked() {
		a.State = StateRevoked
	}
	return a, nil
}

// look reads a record as it is by the store and by what waits to be written, past the cache; nil: there is none. Nothing
// that is amiss with it is put right.
func (m *Manager) look(ctx context.Context, env *Environment, k Key) (*record, error) {
	var wire recordWire
	var stored *record
	switch err := m.loadRecord(ctx, env, k.recordName(), &wire); {
	case err == nil:
		stored = wire.record()
	case !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	if waiting := m.pending.get(k); waiting.supersedes(stored) {
		return waiting, nil
	}
	return stored, nil
}
