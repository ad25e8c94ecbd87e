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
	unlock, err := m.locks.lock(ctx, intentRecordLock(hash))
	if err != nil {
		return fmt.Errorf("%w: wait for the code's record: %w", ErrStore, err)
	}
	defer unlock()
	if err := m.storeRecord(ctx, env, intentName(hash), in.wire()); err != nil {
		m.lookForLateIntent()
		return err
	}
	m.queueIntent(hash, in, 0)
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

// queueIntent has a code exchanged in the background, for the first time after a delay. A job for the code that is there already does what is
// known of it when it runs; one that has not failed yet does not keep a push waiting.
func (m *Manager) queueIntent(hash string, in Intent, delay time.Duration) {
	m.intents.add(hash, in)
	m.queue.add(intentJobs+hash, delay, m.intentJob(hash))
	if delay == 0 {
		m.queue.hasten(intentJobs + hash)
	}
}

// intentJob is the job that has a code exchanged.
func (m *Manager) intentJob(hash string) func(context.Context) error {
	return func(ctx context.Context) error {
		open, err := m.knownIntent(ctx, hash)
		if open == nil {
			return err
		}
		defer m.intents.begin(open)()
		if err = m.fulfil(ctx, hash, open); err == nil {
			m.intents.done(hash, open)
		}
		return err
	}
}

// intentRecordLock is the lock, on this node, under which what the store holds of a code is looked at and then changed. No call to WeChat is
// made under it.
func intentRecordLock(hash string) string { return intentName(hash) + " record" }

// knownIntent is the open intent of a code; nil: it is done. In the place of a visitor's it takes up a push of the code that has come since,
// on another node as well, and in the place of one that is done what was written again since. The error is the store's, if it could not be
// asked for that.
func (m *Manager) knownIntent(ctx context.Context, hash string) (*openIntent, error) {
	open := m.intents.get(hash)
	if open != nil && !open.Redirected {
		return open, nil
	}
	env, err := m.current()
	if err != nil {
		return open, nil //nolint:nilerr // closed: the record stays
	}
	kept, err := m.keptIntent(ctx, env, hash)
	if err == nil {
		m.intents.add(hash, kept)
	}
	return m.intents.get(hash), ignoreIf(err, notAnIntent(err))
}

// keptIntent is what the store holds of a code.
func (m *Manager) keptIntent(ctx context.Context, env *Environment, hash string) (Intent, error) {
	var kept intentWire
	err := m.loadRecord(ctx, env, intentName(hash), &kept)
	return kept.intent(), err
}

func ignoreIf(err error, harmless bool) error {
	if harmless {
		return nil
	}
	return err
}

// notAnIntent reports whether the error of keptIntent says that there is none, or none that this node can read.
func notAnIntent(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, errUnreadable) || errors.Is(err, errDamaged)
}

// forgetIntent deletes what the store holds of a code for which nothing more can be done, unless that is another intent's by now.
func (m *Manager) forgetIntent(ctx context.Context, env *Environment, hash string, open *openIntent) error {
	unlock, err := m.locks.lock(ctx, intentRecordLock(hash))
	if err != nil {
		return err
	}
	defer unlock()
	there, err := m.keptIntent(ctx, env, hash)
	switch {
	case notAnIntent(err):
		return nil
	case err != nil:
		return err
	case m.intents.get(hash) != open, open.Redirected && !there.Redirected:
		return errReplaced
	}
	return m.deleteRecord(ctx, env, intentName(hash))
}

// openIntents are the intents that this node is working on.
type openIntents struct {
	mu     sync.Mutex
	byHash map[string]*openIntent // by hash of the code
	ended  bool                   // no attempt begins any more
}

// openIntent is one of them, and what its attempts, of which there is one at a time, leave to the next.
type openIntent struct {
	Intent
	since time.Time   // when it was taken up, by our clock: WeChat's may differ
	said  time.Time   // when the log last heard that it is tried again
	lost  atomic.Bool // nothing more can be done for it

	// attempt is closed once the attempt ends that is under way, or else the first one, and when another intent takes this one's place; nil:
	// between two attempts. Running: it is under way. Both are guarded by openIntents.mu.
	attempt chan struct{}
	running bool
}

// ended wakes who waits for an attempt; openIntents.mu is held.
func (o *openIntent) ended() {
	o.running = false
	if o.attempt != nil {
		close(o.attempt)
		o.attempt = nil
	}
}

// add notes an intent. A push takes the place of a visitor's for the same code, who knows neither whose it is nor WeChat's time, and of
// another push that says otherwise.
func (o *openIntents) add(hash string, in Intent) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.byHash == nil {
		o.byHash = make(map[string]*openIntent)
	}
	old := o.byHash[hash]
	if old == nil || !in.Redirected && (old.Redirected || old.AppID != in.AppID || !old.CreatedAt.Equal(in.CreatedAt)) {
		next := &openIntent{Intent: in, since: time.Now()}
		if !o.ended && (old == nil || old.attempt != nil) { // else the job waits, because it failed
			next.attempt = make(chan struct{})
		}
		if old != nil {
			old.ended()
		}
		o.byHash[hash] = next
	}
}

// end wakes who waits for an attempt that has not begun: none does any more.
func (o *openIntents) end() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ended = true
	for _, open := range o.byHash {
		if !open.running {
			open.ended()
		}
	}
}

// begin notes that an attempt at an intent begins. Ended must be called when it has.
func (o *openIntents) begin(open *openIntent) (ended func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if open.attempt == nil {
		open.attempt = make(chan struct{})
	}
	open.running = true
	return func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		open.ended()
	}
}

func (o *openIntents) get(hash string) *openIntent {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.byHash[hash]
}

// done forgets an intent, unless another one has taken its place since: the job runs once more for that.
func (o *openIntents) done(hash string, open *openIntent) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.byHash[hash] == open {
		delete(o.byHash, hash)
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
	for _, open := range o.byHash {
		if AuthorizerKey(open.Platform, open.AppID) == k && (!found || open.CreatedAt.After(latest.CreatedAt)) {
			latest, found = open.Intent, true
		}
	}
	return latest, found
}

// attempt returns what is closed once an attempt at a code of an account ends that is under way, or else the first one; nil: there is none.
// Of several codes it is that of the one which WeChat pushed last.
func (o *openIntents) attempt(k Key) (ended <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	var pushed time.Time
	for _, open := range o.byHash {
		if open.attempt != nil && AuthorizerKey(open.Platform, open.AppID) == k && (ended == nil || open.CreatedAt.After(pushed)) {
			ended, pushed = open.attempt, open.CreatedAt
		}
	}
	return ended
}

// errOvertaken ends a renewal whose account has authorised again: the tokens of that are there, or on their way.
var errOvertaken = errors.New("overtaken by another authorization of the account")

// overtaken is asked when WeChat calls a refresh token invalid, or the account unauthorized, of which a newer
// authorization is still to be exchanged: that is done first, and the error is errOvertaken once it is. An intent stays open
// until its tokens are written, so that refused may be what it brought.
func (m *Manager) overtaken(ctx context.Context, env *Environment, k Key, refused secret.String) error {
	in, open := m.intents.latest(k)
	if !open {
		return nil
	}
	if _, err := m.exchange(ctx, env, in.authCode()); err != nil {
		return nil //nolint:nilerr // the intent says so in the log, and is tried again
	}
	if e, err := m.recall(ctx, env, k); err == nil && e.renewable() && e.rec.RefreshToken.Same(refused) {
		return nil
	}
	return errOvertaken
}

// errReplaced has the job of an intent run once more.
var errReplaced = errors.New("a push of the same code, or another configuration, has come meanwhile")

// triedAgain tells the log about an attempt that failed, once and then rarely.
func (o *openIntent) triedAgain(log *slog.Logger, text string, args ...any) {
	if now := time.Now(); o.said.IsZero() || now.Sub(o.said) >= troubleLogEvery {
		o.said = now
		log.Warn(text, args...)
	}
}

// fulfil is one attempt at an intent. It returns nil once there is nothing left to do here. With ErrClosed it is left to the next manager: by
// its record, or by TakeOver.
func (m *Manager) fulfil(ctx context.Context, hash string, open *openIntent) error {
	in := open.Intent
	open.lost.Store(false)
	env, err := m.current()
	if err != nil {
		return err
	}
	if env.knows(ComponentKey(in.Platform)) != nil && time.Now().Before(in.ExpiresAt.Add(deadCodeGrace)) {
		// Another node may have the platform, or the next configuration: the record stays for them, and is not this one's to give up.
		m.unreadIntents.Store(true)
		if m.env.Load() != env {
			return errReplaced // which is there by now
		}
		return nil
	}
	a, err := m.exchange(ctx, env, in.authCode())
	switch {
	case err == nil && m.pending.get(AuthorizerKey(a.Platform, a.AppID)) == nil:
		return m.deleteRecord(ctx, env, intentName(hash))
	case err == nil:
		return fmt.Errorf("intent %s: %w: its tokens are not written yet", hash, ErrStore)
	case errors.Is(err, ErrClosed):
		return err
	}
	used := hasCode(err, codeAuthCodeInvalid)
	dead := used && time.Since(open.since) > usedCodeGrace || hasCode(err, codeAuthCodeExpired) || errors.Is(err, ErrNotAuthorized) ||
		!time.Now().Before(in.ExpiresAt)
	if !dead && !used {
		open.triedAgain(env.Log, "authorization code not exchanged yet; it is tried again", "platform", in.Platform, "appid", in.AppID,
			"info_type", printable(in.InfoType, maxID), "error", err)
		if in.Redirected {
			_, _, _ = m.writeRedirected(ctx, env, hash, in) // if the store did not take it at first, or lost it since
		}
		return err
	}
	if dead {
		switch known, err := m.knownIntent(ctx, hash); {
		case err != nil:
			return err
		case known != open:
			return errReplaced
		}
	}
	instead := m.insteadOfCode(ctx, env, in)
	_, hopeless := errors.AsType[hopelessError](instead)
	args := []any{"platform", in.Platform, "appid", in.AppID, "info_type", printable(in.InfoType, maxID), "error", err}
	switch {
	case instead == nil:
		env.Log.Warn("authorization code could not be exchanged; the refresh token that WeChat names is held in its place", args...)
	case !dead:
		open.triedAgain(env.Log, "authorization code not exchanged yet; it is tried again", args...)
		return err
	case hopeless:
		open.lost.Store(true)
		env.Log.Error("authorization code died before it was exchanged: "+instead.Error(), args...)
	case time.Now().Before(in.ExpiresAt.Add(deadCodeGrace)):
		open.triedAgain(env.Log, "authorization code died before it was exchanged, and WeChat cannot be asked for what it stood for; tried again", append(args, "instead", instead)...)
		return instead
	default:
		open.lost.Store(true)
		env.Log.Error("authorization code died before it was exchanged: the account has to authorise again, or update its authorization", append(args, "instead", instead)...)
	}
	return m.forgetIntent(ctx, env, hash, open)
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

// lookForIntents has the store looked at, after a while, for duties of another node that died.
func (m *Manager) lookForIntents() { m.queue.add("take over", takeOverAfter, m.resumeIntents) }

// lookForLateIntent has the store looked at, after a while, for a duty whose writing was given up: it may take effect yet.
func (m *Manager) lookForLateIntent() {
	m.givenUp.Add(1)
	m.queue.add("late duties", takeOverAfter, m.resumeLateIntents)
}

// resumeLateIntents looks once more if another writing has been given up since it was asked for.
func (m *Manager) resumeLateIntents(ctx context.Context) error {
	now := m.givenUp.Load()
	if err := m.resumeIntents(ctx); err != nil {
		return err
	}
	if m.lookedFor.Swap(now) != now {
		return retryError{after: takeOverAfter}
	}
	return nil
}

// storedIntents are the hashes of the codes that the store has intents of.
func (m *Manager) storedIntents(ctx context.Context, env *Environment) ([]string, error) {
	return m.storedIn(ctx, env, intentFolder)
}

// storedIn are the last parts of the names that the store has in the folder of intents or of events.
func (m *Manager) storedIn(ctx context.Context, env *Environment, folder string) (found []string, err error) {
	var names []string
	err = env.operate(ctx, "list", storeTimeout, func(ctx context.Context) (err error) {
		names, err = env.Store.List(ctx, folder)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%w: list %s: %w", ErrStore, folder, err)
	}
	for _, name := range names {
		if id := path.Base(name); isCodeHash(id) { // else a store's temporary file
			found = append(found, id)
		}
	}
	return found, nil
}

// resumeIntents is the job that takes up what was accepted and not finished, by an earlier process at the first Use.
func (m *Manager) resumeIntents(ctx context.Context) error {
	env, err := m.current()
	if err != nil {
		if errors.Is(err, ErrClosed) {
			return nil
		}
		return err
	}
	hashes, err := m.storedIntents(ctx, env)
	if err != nil {
		env.Log.Error("accepted authorizations cannot be listed; tried again", "error", err)
		return err
	}
	var failed error
	for _, hash := range hashes {
		var wire intentWire
		switch err := m.loadRecord(ctx, env, intentName(hash), &wire); {
		case err == nil:
			m.queueIntent(hash, wire.intent(), 0)
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
			m.unreadIntents.Store(true)
			env.Log.Error("an accepted authorization cannot be read and is left alone", "record", intentName(hash), "error", err)
		default:
			failed = err
		}
	}
	return failed
}
