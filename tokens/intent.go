package tokens

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"path"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// usedCodeGrace is for how long a code that WeChat calls used is tried again before it counts as dead: another node may
// have used it, whose tokens are not in the store yet.
const usedCodeGrace = 2 * time.Minute

// deadCodeGrace is for how long WeChat is asked for what a dead code stood for, when it cannot be asked.
const deadCodeGrace = 24 * time.Hour

// Intent is the duty to exchange an authorization code that WeChat pushed.
type Intent struct {
	Platform  string
	AppID     string // may be empty: it is learned by the exchange
	Code      secret.String
	CreatedAt time.Time // CreateTime of the push; zero: now
	ExpiresAt time.Time // when the code dies; zero: an hour after CreatedAt. What counts is the time between the two
	InfoType  string    // of the push, for the log
	// Redirected: the code came with a visitor, not by a push, so CreatedAt is by our clock and dates nothing.
	Redirected bool
}

type intentWire struct {
	Platform  string `json:"platform"`
	AppID     string `json:"appid,omitempty"`
	Code      string `json:"code"`
	CreatedAt int64  `json:"created_at"`
	ExpiresAt int64  `json:"expires_at"`
	InfoType  string `json:"info_type,omitempty"`
	Redirect  bool   `json:"redirect,omitempty"`
}

func (in Intent) wire() intentWire {
	return intentWire{in.Platform, in.AppID, in.Code.Reveal(), unix(in.CreatedAt), unix(in.ExpiresAt), in.InfoType, in.Redirected}
}

func (w intentWire) intent() Intent {
	return Intent{w.Platform, w.AppID, secret.New(w.Code), fromUnix(w.CreatedAt), fromUnix(w.ExpiresAt), w.InfoType, w.Redirect}
}

func (in Intent) authCode() authCode {
	c := authCode{platform: in.Platform, appid: in.AppID, code: in.Code, createdAt: in.CreatedAt}
	if in.Redirected {
		c.createdAt = time.Time{}
	}
	return c
}

// Accept takes the duty to exchange a code. It is durable when nil is returned: the exchange follows in the
// background, is repeated for as long as the code lives, and is resumed after a crash. A code that comes twice is
// exchanged once.
func (m *Manager) Accept(ctx context.Context, in Intent) error {
	env, err := m.current()
	if err != nil {
		return err
	}
	if err := env.knows(ComponentKey(in.Platform)); err != nil {
		return err
	}
	if in.Code.IsZero() || len(in.AppID) > maxID {
		return fmt.Errorf("platform %s: %s: the push has no authorization code, or no appid", in.Platform, printable(in.InfoType, maxID))
	}
	in = in.received(time.Now())
	in = in.wire().intent() // as it will be read back
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	hash := in.authCode().hash()
	// Tokens that are held in memory alone do not make the duty done.
	if a, done := m.alreadyExchanged(ctx, env, in.authCode(), m.lookup); done && m.pending.len() == 0 {
		// Nor do those that the store has lost since: they are written again.
		_, err := m.commit(ctx, env, AuthorizerKey(a.Platform, a.AppID), false, func(*record) *record { return nil })
		return err
	}
	if err := m.storeRecord(ctx, env, intentName(hash), in.wire()); err != nil {
		return err
	}
	m.queueIntent(hash, in)
	return nil
}

// received fills in the times of an intent that was pushed just now. The code's end is by our clock, counted from now:
// WeChat's may differ by more than a code lives.
func (in Intent) received(now time.Time) Intent {
	if in.CreatedAt.IsZero() {
		in.CreatedAt = now
	}
	life := in.ExpiresAt.Sub(in.CreatedAt)
	if in.ExpiresAt.IsZero() || life <= 0 || life > codeLife {
		life = codeLife
	}
	in.ExpiresAt = now.Add(life)
	return in
}

// intentJobs is how the names of the jobs begin that exchange codes.
const intentJobs = "intent "

func (m *Manager) queueIntent(hash string, in Intent) {
	d := &duty{since: time.Now()} // by our clock: WeChat's may differ
	open := m.intents.add(hash, in)
	m.queue.add(intentJobs+hash, 0, func(ctx context.Context) error {
		err := m.fulfil(ctx, hash, in, d)
		open.lost.Store(err == nil && d.lost)
		if err == nil {
			m.intents.done(hash, in)
		}
		return err
	})
}

// openIntents are the intents that this node is working on.
type openIntents struct {
	mu     sync.Mutex
	byHash map[string]*openIntent    // by hash of the code
	byKey  map[Key]map[string]Intent // likewise, below the account if that is known
}

// openIntent is one of them.
type openIntent struct {
	Intent
	lost atomic.Bool // nothing more can be done for it
}

func (o *openIntents) add(hash string, in Intent) *openIntent {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.byHash == nil {
		o.byHash = make(map[string]*openIntent)
		o.byKey = make(map[Key]map[string]Intent)
	}
	open := o.byHash[hash]
	if open == nil { // else there is a job for it
		open = &openIntent{Intent: in}
		o.byHash[hash] = open
	}
	if in.AppID == "" {
		return open
	}
	k := AuthorizerKey(in.Platform, in.AppID)
	if o.byKey[k] == nil {
		o.byKey[k] = make(map[string]Intent)
	}
	o.byKey[k][hash] = in
	return open
}

func (o *openIntents) done(hash string, in Intent) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.byHash, hash)
	k := AuthorizerKey(in.Platform, in.AppID)
	delete(o.byKey[k], hash)
	if len(o.byKey[k]) == 0 {
		delete(o.byKey, k)
	}
}

// open returns them by the hashes of their codes.
func (o *openIntents) open() map[string]*openIntent {
	o.mu.Lock()
	defer o.mu.Unlock()
	return maps.Clone(o.byHash)
}

// latest is the intent of an account that WeChat pushed last.
func (o *openIntents) latest(k Key) (latest Intent, found bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, in := range o.byKey[k] {
		if !found || in.CreatedAt.After(latest.CreatedAt) {
			latest, found = in, true
		}
	}
	return latest, found
}

// errOvertaken ends a renewal whose account has authorised again: the tokens of that are there, or on their way.
var errOvertaken = errors.New("overtaken by another authorization of the account")

// overtaken is asked when WeChat calls a refresh token invalid, or the account unauthorized, of which a newer
// authorization is still to be exchanged: that is done first, and the error is errOvertaken once it is.
func (m *Manager) overtaken(ctx context.Context, env *Environment, k Key) error {
	in, open := m.intents.latest(k)
	if !open {
		return nil
	}
	if _, err := m.exchange(ctx, env, in.authCode()); err != nil {
		return nil //nolint:nilerr // the intent says so in the log, and is tried again
	}
	return errOvertaken
}

// duty is what an intent's attempts, of which there is one at a time, leave to the next.
type duty struct {
	since time.Time // when it was taken up
	said  time.Time // when the log last heard that it is tried again
	lost  bool      // the code stands for nothing any more
}

// triedAgain tells the log about an attempt that failed, once and then rarely.
func (d *duty) triedAgain(log *slog.Logger, text string, args ...any) {
	if now := time.Now(); d.said.IsZero() || now.Sub(d.said) >= troubleLogEvery {
		d.said = now
		log.Warn(text, args...)
	}
}

// fulfil is one attempt at an intent. It returns nil once there is nothing left to do.
func (m *Manager) fulfil(ctx context.Context, hash string, in Intent, d *duty) error {
	env, err := m.current()
	if err != nil {
		return nil //nolint:nilerr // closed: the record stays, and is resumed by the next manager
	}
	a, err := m.exchange(ctx, env, in.authCode())
	switch {
	case err == nil && m.pending.get(AuthorizerKey(a.Platform, a.AppID)) == nil:
		return m.deleteRecord(ctx, env, intentName(hash))
	case err == nil:
		return fmt.Errorf("intent %s: %w: its tokens are not written yet", hash, ErrStore)
	case errors.Is(err, ErrClosed):
		return nil
	}
	used := hasCode(err, codeAuthCodeInvalid)
	dead := used && time.Since(d.since) > usedCodeGrace || hasCode(err, codeAuthCodeExpired) || errors.Is(err, ErrNotAuthorized) ||
		!time.Now().Before(in.ExpiresAt)
	if !dead && !used {
		d.triedAgain(env.Log, "authorization code not exchanged yet; it is tried again", "platform", in.Platform, "appid", in.AppID,
			"info_type", printable(in.InfoType, maxID), "error", err)
		return err
	}
	instead := m.insteadOfCode(ctx, env, in)
	_, hopeless := errors.AsType[hopelessError](instead)
	args := []any{"platform", in.Platform, "appid", in.AppID, "info_type", printable(in.InfoType, maxID), "error", err}
	switch {
	case instead == nil:
		env.Log.Warn("authorization code could not be exchanged; the refresh token that WeChat names is held in its place", args...)
	case !dead:
		d.triedAgain(env.Log, "authorization code not exchanged yet; it is tried again", args...)
		return err
	case hopeless:
		d.lost = true
		env.Log.Error("authorization code died before it was exchanged: "+instead.Error(), args...)
	case time.Now().Before(in.ExpiresAt.Add(deadCodeGrace)):
		d.triedAgain(env.Log, "authorization code died before it was exchanged, and WeChat cannot be asked for what it stood for; tried again", append(args, "instead", instead)...)
		return instead
	default:
		d.lost = true
		env.Log.Error("authorization code died before it was exchanged: the account has to authorise again, or update its authorization", append(args, "instead", instead)...)
	}
	return m.deleteRecord(ctx, env, intentName(hash))
}

// hopelessError says why nothing more can be done for a dead code.
type hopelessError string

func (e hopelessError) Error() string { return string(e) }

// insteadOfCode takes over from WeChat what an authorization code stood for that cannot be exchanged any more: the
// account's refresh token. WeChat has it if the code, or another one of the account, was exchanged, whoever did it and
// whether or not the answer arrived. The error is a hopelessError if asking again would not help.
func (m *Manager) insteadOfCode(ctx context.Context, env *Environment, in Intent) error {
	if in.AppID == "" {
		m.wantRoster(in.Platform)
		return hopelessError("nothing says of which account it was; WeChat's list is compared with the store")
	}
	k := AuthorizerKey(in.Platform, in.AppID)
	if err := env.knows(k); err != nil {
		return hopelessError("its platform is no longer configured")
	}
	err := m.reconsider(ctx, env, k, in.CreatedAt)
	switch {
	case hasCode(err, codeNotAuthorized):
		return hopelessError("the account has not authorised the platform any more")
	case errors.Is(err, errNoRefreshToken):
		return hopelessError("WeChat has no refresh token of the account, which has to authorise again")
	default:
		return err
	}
}

// resumeIntents is the job that takes up, at the first Use, what an earlier process accepted and did not finish.
func (m *Manager) resumeIntents(ctx context.Context) error {
	env, err := m.current()
	if err != nil {
		if errors.Is(err, ErrClosed) {
			return nil
		}
		return err
	}
	listCtx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	start := time.Now()
	names, err := env.Store.List(listCtx, intentFolder)
	env.observe("list", start, err)
	if err != nil {
		env.Log.Error("accepted authorizations cannot be listed; tried again", "error", err)
		return fmt.Errorf("%w: list %s: %w", ErrStore, intentFolder, err)
	}
	var failed error
	for _, name := range names {
		hash := path.Base(name)
		if !isCodeHash(hash) {
			continue // a store's temporary file
		}
		var wire intentWire
		switch err := m.loadRecord(ctx, env, intentName(hash), &wire); {
		case err == nil:
			m.queueIntent(hash, wire.intent())
		case errors.Is(err, fs.ErrNotExist): // done meanwhile
		case errors.Is(err, errDamaged):
			if err := m.setAside(ctx, env, intentName(hash), new(intentWire), false); err != nil {
				failed = err
				continue
			}
			for _, p := range env.Platforms {
				m.wantRoster(p.AppID) // WeChat's list has the account that it was about
			}
		case errors.Is(err, errUnreadable):
			env.Log.Error("an accepted authorization cannot be read and is left alone", "record", name, "error", err)
		default:
			failed = err
		}
	}
	return failed
}
