package tokens

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
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
	// loginTimeout bounds all that one login asks of WeChat: a component token, the exchange, the profile.
	loginTimeout = 25 * time.Second
	// trackingIDBytes of randomness make an id that cannot be guessed: 128 bits.
	trackingIDBytes = 16
)

// ErrCodeUsed says that a login code was already sent to WeChat from here, and is or may be used up.
var ErrCodeUsed = errors.New("login code already used")

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
// of one login share one exchange. It is bounded, lives in memory only and is safe for concurrent use.
type UserTable struct {
	users  *Window[string, userEntry]
	logins *Window[[sha256.Size]byte, *login]
}

type userEntry struct {
	user User
	once bool
}

// NewUserTable returns a table for at most limit users (0: DefaultMaxUsers). When it is full, the user who was
// untouched for longest is dropped.
func NewUserTable(limit int) *UserTable {
	if limit <= 0 {
		limit = DefaultMaxUsers
	}
	return &UserTable{
		users:  NewWindow[string, userEntry](DefaultUserTTL, limit),
		logins: NewWindow[[sha256.Size]byte, *login](usedCodeMemory, limit),
	}
}

// Keep stores u for ttl (0: DefaultUserTTL) under a fresh tracking id: 128 random bits as 22 characters of
// [A-Za-z0-9_-]. With once, the first redemption is the only one.
func (t *UserTable) Keep(u User, ttl time.Duration, once bool) (trackingID string) {
	var id [trackingIDBytes]byte
	_, _ = rand.Read(id[:]) // never fails since Go 1.24
	trackingID = base64.RawURLEncoding.EncodeToString(id[:])
	t.users.Set(trackingID, userEntry{user: u, once: once}, ttl)
	return trackingID
}

// Redeem returns the user of a tracking id, if may allows it; a refusal uses nothing up. Of several who redeem a user
// kept with once, exactly one gets it. may must only look at what it is given; nil allows everybody.
func (t *UserTable) Redeem(id string, may func(User) bool) (User, bool) {
	var kept userEntry
	found := false
	t.users.Take(id, func(e userEntry) bool {
		if may == nil || may(e.user) {
			kept, found = e, true
		}
		return found && e.once
	})
	return kept.user, found
}

// Len returns the number of users that can still be redeemed.
func (t *UserTable) Len() int { return t.users.Len() }

// Close forgets everybody. A closed table keeps nobody, so ids it hands out afterwards are unknown.
func (t *UserTable) Close() {
	t.users.Close()
	t.logins.Close()
}

// Callback names one login as WeChat calls it back.
type Callback struct {
	Code  secret.String
	Path  string // of the callback, so that a code cannot be moved to another func
	AppID string
}

// login is one exchange; the fields below done are written before it is closed and read after.
type login struct {
	path, appID string
	repeatUntil time.Time

	done     chan struct{}
	location string
	err      error
}

// Login runs exchange at most once for a code that succeeds: browsers repeat callbacks (WeChat's own double redirect,
// the back button, prefetching), while WeChat takes a code only once. The same callback within five minutes gets the
// same location, waiting for it if need be. Later, or under another path or appid, the code gets ErrCodeUsed, without
// a question to WeChat for the first hour.
//
// A failed exchange is told to all who wait for it. Then it is forgotten, so that a reload tries again, unless the code
// is in doubt (ErrCodeInDoubt, or a panic): that code counts as used.
//
// exchange runs on the caller's goroutine, detached from the caller's cancellation (the code would be lost), with
// a deadline of its own.
func (t *UserTable) Login(ctx context.Context, cb Callback, exchange func(context.Context) (location string, err error)) (string, error) {
	key := sha256.Sum256([]byte(cb.Code.Reveal()))
	l, found := t.logins.GetOrSet(key, func() *login {
		return &login{
			path: cb.Path, appID: cb.AppID, repeatUntil: time.Now().Add(loginWindow),
			done: make(chan struct{}), err: errUnfinished,
		}
	})
	if found {
		return l.repeat(ctx, cb)
	}

	defer func() {
		if l.err != nil && !errors.Is(l.err, ErrCodeInDoubt) {
			t.logins.Take(key, func(now *login) bool { return now == l })
		}
		close(l.done)
	}()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), loginTimeout)
	defer cancel()
	l.location, l.err = exchange(ctx)
	return l.location, l.err
}

// errUnfinished is how a login stands until its exchange returns, which one that panics does not.
var errUnfinished = fmt.Errorf("login did not finish: %w", ErrCodeInDoubt)

// repeat answers a callback whose code has been here before.
func (l *login) repeat(ctx context.Context, cb Callback) (string, error) {
	if l.path != cb.Path || l.appID != cb.AppID {
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
