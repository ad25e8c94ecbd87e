package tokens

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

const (
	// DefaultMaxUsers bounds a UserTable. A user takes about a kilobyte.
	DefaultMaxUsers = 100_000
	// DefaultUserTTL is how long a tracking id can be redeemed unless its func says otherwise.
	DefaultUserTTL = 5 * time.Minute
	// loginWindow is for how long after its exchange began a callback gets the same answer again. WeChat's codes live
	// five minutes.
	loginWindow = 5 * time.Minute
	// usedCodeMemory is for how long after its exchange began a code is known to be used. WeChat would say so too, but
	// of an expired code it says that it is not valid, as of one that never was.
	usedCodeMemory = time.Hour
	// FlowLife is how long a login that began here may take: reading WeChat's page, agreeing, and the repetitions of
	// its callback.
	FlowLife = 30 * time.Minute
	// loginTimeout bounds all that one login asks of WeChat: a component token, the exchange, the profile. It also
	// bounds one question about a user later on.
	loginTimeout = 25 * time.Second
	// sharedFlows are told to the other nodes at once, and then sharedFlowsPerSecond: strangers can end as many as they
	// like, each is kept for FlowLife, and the store must have room for tokens. This node knows the others too.
	sharedFlows          = 2000
	sharedFlowsPerSecond = 100
	// trackingIDBytes of randomness make an id that cannot be guessed: 128 bits.
	trackingIDBytes = 16
)

var (
	// ErrCodeUsed says that a login code was already sent to WeChat from here, and is or may be used up.
	ErrCodeUsed = errors.New("login code already used")
	// ErrFlowUsed says that a login that began here has come back before, with another code.
	ErrFlowUsed = errors.New("login came back with another code")
	// ErrUserUnknown says that a tracking id is unknown, expired, or was to be redeemed once and has been.
	ErrUserUnknown = errors.New("tracking id is unknown, expired or redeemed")
	// ErrUserAway says that the store, which knows who has redeemed a tracking id, does not answer.
	ErrUserAway = errors.New("whose tracking id it is cannot be told now")
	// ErrUserForbidden says that who asks may not know the user of a tracking id.
	ErrUserForbidden = errors.New("not allowed to know this user")
)

// User is who logged in through WeChat's web authorization, as kept under a tracking id.
type User struct {
	AppID    string // the account whose OpenID it is
	Platform string // the platform that acted for the account; empty for a plain account
	OpenID   string
	UnionID  string   // empty unless the account is bound to an open-platform account
	Scope    string   // what the user granted, comma-separated
	FuncKey  string   // the landing place
	State    string   // as it came back from WeChat
	Snapshot bool     // a virtual user of WeChat's snapshot page: keep no account for it
	Profile  *Profile // nil unless the scope includes snsapi_userinfo
}

// UserTable keeps logged-in users for the short time until an app redeems their tracking ids, and makes the callbacks
// of one login share one exchange. It is bounded and safe for concurrent use. It lives in memory, and through Share also in
// the store, for the other nodes on it.
type UserTable struct {
	users  *Window[string, *userEntry]
	logins *Window[[sha256.Size]byte, *login]
	flows  *Window[string, [sha256.Size]byte] // the code that each flow came back with

	nodes  *Manager // through which nodes share; nil: there is this one alone
	ended  budget   // of flows that are shared
	asking keyLocks // by tracking id, of users whom another node keeps
}

type userEntry struct {
	user   User
	once   bool
	shared bool // other nodes know the user too, who is not one to be redeemed once

	mu    sync.Mutex
	taken bool   // with once: redeemed
	by    string // whom

	asking chan struct{} // holds one while WeChat is asked; who has put it there may use grant
	grant  UserGrant     // the user's own tokens
}

// NewUserTable returns a table for at most limit users (0: DefaultMaxUsers). When it is full, the user who was
// untouched for longest is dropped, and counted.
func NewUserTable(limit int) *UserTable {
	if limit <= 0 {
		limit = DefaultMaxUsers
	}
	return &UserTable{
		users:  NewWindow[string, *userEntry](DefaultUserTTL, limit),
		logins: NewWindow[[sha256.Size]byte, *login](usedCodeMemory, limit),
		flows:  NewWindow[string, [sha256.Size]byte](FlowLife, limit),
	}
}

// Share makes the tables of all nodes on m's store one, as far as that store can. It must come before any use.
func (t *UserTable) Share(m *Manager) { t.nodes = m }

// Keep stores u for ttl (0: DefaultUserTTL) under a fresh tracking id: 128 random bits as 22 characters of
// [A-Za-z0-9_-]. With once, the first redemption is the only one. The grant has the user's own tokens, which nobody
// gets to see: they serve AskProfile. If the store does not take the user, only this node knows the id.
func (t *UserTable) Keep(ctx context.Context, u User, grant UserGrant, ttl time.Duration, once bool) (trackingID string) {
	trackingID = newTrackingID()
	if ttl <= 0 {
		ttl = DefaultUserTTL
	}
	for _, s := range []*string{&u.AppID, &u.Platform, &u.State} {
		*s = strings.Clone(*s) // or they would keep the request that they are parts of
	}
	shared := t.nodes != nil && t.nodes.shareUser(ctx, trackingID, u, grant, ttl, once)
	switch {
	case shared && once:
		return trackingID // only the store can tell who is first
	case !shared && t.nodes != nil:
		trackingID = newTrackingID() // the store may have taken the other one after all
	}
	t.users.Set(trackingID, &userEntry{user: u, grant: grant, once: once, shared: shared, asking: make(chan struct{}, 1)}, ttl)
	return trackingID
}

func newTrackingID() string {
	var id [trackingIDBytes]byte
	_, _ = rand.Read(id[:]) // never fails since Go 1.24
	return base64.RawURLEncoding.EncodeToString(id[:])
}

// Redeem returns the user of a tracking id to a client, named by, if may allows it; a refusal uses nothing up. Of
// several who redeem a user kept with once, on whichever nodes, exactly one gets it. may must only look at what it is
// given; nil allows everybody. The error is ErrUserUnknown, ErrUserForbidden, or ErrUserAway if the store does not say.
func (t *UserTable) Redeem(ctx context.Context, id, by string, may func(User) bool) (User, error) {
	e, err := t.find(id, may)
	switch {
	case err == nil:
		if first, _ := e.claim(by); !first && e.once {
			return User{}, ErrUserUnknown
		}
		return e.user, nil
	case t.nodes == nil || !errors.Is(err, ErrUserUnknown):
		return User{}, err
	}
	w, err := t.nodes.sharedUser(ctx, id, may)
	if err == nil && w.Once {
		if w.By != nil {
			return User{}, ErrUserUnknown
		}
		err = t.nodes.redeemShared(ctx, id, by, w)
	}
	if err != nil {
		return User{}, err
	}
	return w.user(), nil
}

// AskProfile has ask get the user's profile from WeChat with the user's own tokens, for a client as with Redeem, and
// keeps the tokens that ask returns: it may have had to renew them. Users kept with once are told to one client: the
// question redeems the tracking id, and who redeemed it may go on to ask until it ends.
//
// ask runs once at a time for a tracking id on each node, detached from the caller's cancellation (renewed tokens would
// be lost), with a deadline of its own.
func (t *UserTable) AskProfile(ctx context.Context, id, by string, may func(User) bool, ask func(context.Context, User, UserGrant) (Profile, UserGrant, error)) (Profile, error) {
	e, err := t.find(id, may)
	if t.nodes != nil && errors.Is(err, ErrUserUnknown) {
		return t.askShared(ctx, id, by, may, ask)
	}
	if err != nil {
		return Profile{}, err
	}
	if _, theirs := e.claim(by); !theirs && e.once {
		return Profile{}, ErrUserUnknown
	}
	select {
	case e.asking <- struct{}{}:
		defer func() { <-e.asking }()
	case <-ctx.Done():
		return Profile{}, ctx.Err()
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), loginTimeout)
	defer cancel()
	before := e.grant
	var profile Profile
	profile, e.grant, err = ask(ctx, e.user, e.grant)
	if e.shared && !before.same(e.grant) {
		_ = t.nodes.sharedReplace(ctx, userName(id), newUserWire(e.user, e.grant, false)) // else the others renew for themselves
	}
	return profile, err
}

// askShared is AskProfile for a user whom this node does not keep.
func (t *UserTable) askShared(ctx context.Context, id, by string, may func(User) bool, ask func(context.Context, User, UserGrant) (Profile, UserGrant, error)) (Profile, error) {
	leave, err := t.asking.lock(ctx, id)
	if err != nil {
		return Profile{}, err
	}
	defer leave()
	w, err := t.nodes.sharedUser(ctx, id, may)
	switch {
	case err != nil:
		return Profile{}, err
	case w.Once && w.By == nil:
		if err := t.nodes.redeemShared(ctx, id, by, w); err != nil {
			return Profile{}, err
		}
	case w.Once && *w.By != by:
		return Profile{}, ErrUserUnknown
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), loginTimeout)
	defer cancel()
	before := w.grant()
	profile, after, err := ask(ctx, w.user(), before)
	if !before.same(after) {
		w.setGrant(after)
		_ = t.nodes.sharedReplace(ctx, userName(id), w) // else it is renewed again next time
	}
	return profile, err
}

// find is what this node keeps under a tracking id, if may allows it.
func (t *UserTable) find(id string, may func(User) bool) (*userEntry, error) {
	e, found := t.users.Get(id)
	switch {
	case !found:
		return nil, ErrUserUnknown
	case may != nil && !may(e.user):
		return nil, ErrUserForbidden
	}
	return e, nil
}

// claim marks a user as redeemed, and reports whether that was the first time and whether it was by the same client.
func (e *userEntry) claim(by string) (first, theirs bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.taken {
		e.taken, e.by = true, by
		return true, true
	}
	return false, e.by == by
}

// Len returns the number of users that this node keeps.
func (t *UserTable) Len() int { return t.users.Len() }

// Forgotten are what a UserTable dropped before its time because it was full.
type Forgotten struct{ Users, Codes, Flows uint64 }

// Forgotten counts what was dropped so far.
func (t *UserTable) Forgotten() Forgotten {
	return Forgotten{Users: t.users.Early(), Codes: t.logins.Early(), Flows: t.flows.Early()}
}

// Close forgets everybody. A closed table keeps nobody, so ids it hands out afterwards are unknown.
func (t *UserTable) Close() {
	t.users.Close()
	t.logins.Close()
	t.flows.Close()
}

// Callback names one login as WeChat calls it back.
type Callback struct {
	Code  secret.String
	Path  string // of the callback, so that a code cannot be moved to another func
	AppID string
	Flow  string // names the flow that began here and that this callback was shown to end; empty: it began elsewhere
}

// login is one exchange; the fields below done are written before it is closed and read after.
type login struct {
	path, appID string
	flow        string
	repeatUntil time.Time

	done     chan struct{}
	location string
	err      error
}

// Login runs exchange at most once for a code that succeeds: browsers repeat callbacks (WeChat's own double redirect,
// the back button, prefetching), while WeChat takes a code only once. The same callback within five minutes gets the
// same location on any node, waiting for it if need be. Later, or under another path or appid, the code gets ErrCodeUsed,
// without a question to WeChat for the first hour; and so it does when the node that exchanges it dies over it.
//
// A flow that began here ends once, with one code: with another it gets ErrFlowUsed. Its code is no other flow's, nor
// of a callback without one.
//
// A failed exchange is told to all who wait for it. Then it is forgotten, so that a reload tries again, unless the code
// is in doubt (ErrCodeInDoubt, or a panic): that code counts as used.
//
// Of the callback nothing is kept but copies: its strings are parts of a request's.
//
// exchange runs on the caller's goroutine, detached from the caller's cancellation (the code would be lost), with
// a deadline of its own.
func (t *UserTable) Login(ctx context.Context, cb Callback, exchange func(context.Context) (location string, err error)) (string, error) {
	key := sha256.Sum256([]byte(cb.Code.Reveal()))
	if cb.Flow != "" && !t.endFlow(ctx, cb.Flow, key) {
		return "", ErrFlowUsed
	}
	l, found := t.logins.GetOrSet(key, func() *login {
		return &login{
			path: strings.Clone(cb.Path), appID: strings.Clone(cb.AppID), flow: strings.Clone(cb.Flow), repeatUntil: time.Now().Add(loginWindow),
			done: make(chan struct{}), err: errUnfinished,
		}
	})
	if found {
		return l.repeat(ctx, cb)
	}

	keep := true // also if exchange panics
	defer func() {
		if !keep {
			t.logins.Take(key, func(now *login) bool { return now == l })
		}
		close(l.done)
	}()
	l.location, keep, l.err = t.exchange(context.WithoutCancel(ctx), cb, exchange)
	return l.location, l.err
}

// exchange runs the exchange of a callback, or has its result from another node. Keep says that this node is to remember
// the code.
func (t *UserTable) exchange(ctx context.Context, cb Callback, exchange func(context.Context) (string, error)) (location string, keep bool, err error) {
	here := func(ctx context.Context) (location string, keep bool, err error) {
		ctx, cancel := context.WithTimeout(ctx, loginTimeout)
		defer cancel()
		location, err = exchange(ctx)
		return location, err == nil || errors.Is(err, ErrCodeInDoubt), err
	}
	if t.nodes == nil {
		return here(ctx)
	}
	work := Work{
		Name: "code " + cb.Code.Reveal(), Match: boundTo([]string{cb.Path, cb.AppID, cb.Flow}),
		Limit: loginTimeout, Repeat: loginWindow, Memory: usedCodeMemory,
	}
	result, ran, err := t.nodes.DoOnce(ctx, work, func(ctx context.Context) (_ []byte, keep bool, err error) {
		location, keep, err = here(ctx)
		return []byte(location), keep, err
	})
	switch {
	case ran:
		return location, err == nil || errors.Is(err, ErrCodeInDoubt), err
	case errors.Is(err, ErrWorkDone):
		return "", false, ErrCodeUsed
	}
	return string(result), false, err // the other node's time counts
}

// endFlow reports whether a flow ends with the code of that key: the first that it comes back with.
func (t *UserTable) endFlow(ctx context.Context, flow string, key [sha256.Size]byte) bool {
	first, known := t.flows.Get(flow)
	if !known {
		mine := key
		if t.nodes != nil && t.ended.spend(sharedFlows, sharedFlowsPerSecond) {
			mine = t.nodes.endSharedFlow(ctx, flow, key)
		}
		first, _ = t.flows.GetOrSet(strings.Clone(flow), func() [sha256.Size]byte { return mine })
	}
	return first == key
}

// errUnfinished is how a login stands until its exchange returns, which one that panics does not.
var errUnfinished = fmt.Errorf("login did not finish: %w", ErrCodeInDoubt)

// repeat answers a callback whose code has been here before.
func (l *login) repeat(ctx context.Context, cb Callback) (string, error) {
	if l.path != cb.Path || l.appID != cb.AppID || l.flow != cb.Flow {
		return "", ErrCodeUsed
	}
	select {
	case <-l.done:
		if errors.Is(l.err, ErrCodeInDoubt) || !time.Now().Before(l.repeatUntil) {
			return "", ErrCodeUsed
		}
		return l.location, l.err
	default:
	}
	select {
	case <-l.done:
		return l.location, l.err
	case <-ctx.Done():
		return "", ctx.Err()
	}
}
