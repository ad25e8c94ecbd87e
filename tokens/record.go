package tokens

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"sync"
	"time"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// recordVersion is the version of the records' form. A record of another version is refused, never overwritten.
const recordVersion = 1

// storeTimeout bounds one operation on the store. WeChat waits five seconds for the answer to an event, and that
// answer waits for the store.
const storeTimeout = 3 * time.Second

// errUnreadable is a record that is there and cannot be used: torn, tampered with, sealed with a key that is not
// configured, or of another version. Nothing may write over it.
var errUnreadable = fmt.Errorf("%w: record cannot be read", ErrStore)

// LacksSealKey reports whether an error says that a record waits for a seal_key that is not configured, and puts that into words.
func LacksSealKey(err error) (Text, bool) {
	if own, ok := errors.AsType[*SaidError](err); ok && own.Kind == errUnreadable { //nolint:errorlint // the kind itself, and not a damaged record
		return own.Text, true
	}
	return Text{}, false
}

// errDamaged is one of those that nothing will ever read again: torn, tampered with, or of another version. It is set
// aside, and what it stood for is had from WeChat again.
var errDamaged = fmt.Errorf("%w: it is damaged", errUnreadable)

// errUnsealed is a record that must be sealed and is not.
var errUnsealed = fmt.Errorf("%w: record is not sealed", ErrStore)

// record is what is kept of one token, in memory. Times are whole seconds, ObtainedAt whole milliseconds, as in the
// store, so that a token looks the same before and after a restart.
type record struct {
	Gen         uint64
	AccessToken secret.String
	ExpiresAt   time.Time
	ObtainedAt  time.Time // when AccessToken was asked for: of two that nodes fetched on their own, the later one works
	// RankedAt is what counts in the place of ObtainedAt where the clock says that AccessToken was asked for before the one whose place it took:
	// that one is of a node whose clock is ahead, or of before the clock was set back. Else it is zero.
	RankedAt     time.Time
	RefreshToken secret.String
	FuncInfo     []int
	AuthorizedAt time.Time
	// AuthorizedHere: AuthorizedAt is by a gateway's clock, since no push told WeChat's time. The two cannot be compared.
	AuthorizedHere bool
	RevokedAt      time.Time // after AuthorizedAt, or zero, unless the account has authorised again since
	CodeHash       string    // of the authorization code that the tokens came from

	UserName string // the gh_ id, once it is known
	NickName string

	// ForcedAt is when force_refresh was last used for a plain account, and Forced how often on that day of WeChat's.
	ForcedAt time.Time
	Forced   int
}

// recordWire is a record in the store.
type recordWire struct {
	Gen          uint64 `json:"gen"`
	AccessToken  string `json:"access_token,omitempty"`
	ExpiresAt    int64  `json:"expires_at,omitempty"` // Unix seconds, as all times
	ObtainedAt   int64  `json:"obtained_at,omitempty"`
	ObtainedMs   int64  `json:"obtained_ms,omitempty"` // beyond that second
	RankedMs     int64  `json:"ranked_ms,omitempty"`   // Unix milliseconds
	RefreshToken string `json:"refresh_token,omitempty"`
	FuncInfo     []int  `json:"func_info,omitempty"`
	AuthorizedAt int64  `json:"authorized_at,omitempty"`
	Here         bool   `json:"authorized_here,omitempty"`
	RevokedAt    int64  `json:"revoked_at,omitempty"`
	CodeHash     string `json:"code_hash,omitempty"`
	UserName     string `json:"user_name,omitempty"`
	NickName     string `json:"nick_name,omitempty"`
	ForcedAt     int64  `json:"forced_at,omitempty"`
	Forced       int    `json:"forced,omitempty"`
}

func (r *record) wire() recordWire {
	return recordWire{
		Gen: r.Gen, AccessToken: r.AccessToken.Reveal(), ExpiresAt: unix(r.ExpiresAt),
		ObtainedAt: unix(r.ObtainedAt), ObtainedMs: int64(r.ObtainedAt.Nanosecond()) / int64(time.Millisecond),
		RankedMs: unixMilli(r.RankedAt), RefreshToken: r.RefreshToken.Reveal(), FuncInfo: r.FuncInfo, AuthorizedAt: unix(r.AuthorizedAt),
		Here: r.AuthorizedHere, RevokedAt: unix(r.RevokedAt), CodeHash: r.CodeHash,
		UserName: r.UserName, NickName: r.NickName, ForcedAt: unix(r.ForcedAt), Forced: r.Forced,
	}
}

func (w *recordWire) record() *record {
	return &record{
		Gen: w.Gen, AccessToken: secret.New(w.AccessToken), ExpiresAt: fromUnix(w.ExpiresAt),
		ObtainedAt: fromUnix(w.ObtainedAt).Add(time.Duration(w.ObtainedMs) * time.Millisecond),
		RankedAt:   fromUnixMilli(w.RankedMs), RefreshToken: secret.New(w.RefreshToken), FuncInfo: w.FuncInfo, AuthorizedAt: fromUnix(w.AuthorizedAt),
		AuthorizedHere: w.Here, RevokedAt: fromUnix(w.RevokedAt), CodeHash: w.CodeHash,
		UserName: w.UserName, NickName: w.NickName, ForcedAt: fromUnix(w.ForcedAt), Forced: w.Forced,
	}
}

// revoked reports whether the account took its authorization back and has not given it again.
func (r *record) revoked() bool { return !r.RevokedAt.IsZero() && !r.RevokedAt.Before(r.AuthorizedAt) }

// supersedes is the one rule for which of two records of a key counts, in the store, in the cache and among those that
// wait to be written. The later authorization or its end comes first, since it makes earlier refresh tokens void; then
// the higher generation; then, of two that were made without knowing of each other, the token that was asked for
// later. A record, whatever is in it, counts more than none.
func (r *record) supersedes(o *record) bool {
	if r == nil || o == nil {
		return r != nil
	}
	rs, os := r.settledAt(), o.settledAt()
	switch {
	case !rs.Equal(os):
		return rs.After(os)
	case r.RefreshToken.IsZero() && o.RefreshToken.IsZero() && !r.rankedAt().Equal(o.rankedAt()):
		// No refresh token can be lost, and the later one may have been fetched while the store could not tell its
		// generation.
		return r.rankedAt().After(o.rankedAt())
	case r.Gen != o.Gen:
		return r.Gen > o.Gen
	default:
		return r.rankedAt().After(o.rankedAt())
	}
}

// rankedAt is by when the token counts beside another node's.
func (r *record) rankedAt() time.Time {
	if r.RankedAt.After(r.ObtainedAt) {
		return r.RankedAt
	}
	return r.ObtainedAt
}

// take puts a token that WeChat has just given in the place of the record's, after which it ranks whatever the clocks say.
func (r *record) take(g grant) {
	asked, last := g.asked.Truncate(time.Millisecond), r.rankedAt()
	if r.RankedAt = (time.Time{}); !asked.After(last) {
		r.RankedAt = last.Add(time.Millisecond)
	}
	r.AccessToken, r.ExpiresAt, r.ObtainedAt = g.access, g.asked.Add(g.life).Truncate(time.Second), asked
}

// same reports whether both say the same, whatever their generations.
func (r *record) same(o *record) bool {
	if r == nil || o == nil {
		return r == o
	}
	return r.AccessToken.Same(o.AccessToken) && r.ExpiresAt.Equal(o.ExpiresAt) && r.ObtainedAt.Equal(o.ObtainedAt) &&
		r.RefreshToken.Same(o.RefreshToken) && slices.Equal(r.FuncInfo, o.FuncInfo) && r.sameAuthorization(o) &&
		r.UserName == o.UserName && r.NickName == o.NickName && r.ForcedAt.Equal(o.ForcedAt) && r.Forced == o.Forced
}

// sameAuthorization reports whether both stand on one authorization, or on the same end of it.
func (r *record) sameAuthorization(o *record) bool {
	return r.AuthorizedAt.Equal(o.AuthorizedAt) && r.AuthorizedHere == o.AuthorizedHere && r.RevokedAt.Equal(o.RevokedAt) &&
		r.CodeHash == o.CodeHash
}

// settledAt is when the account last gave or took its authorization.
func (r *record) settledAt() time.Time {
	if r.RevokedAt.After(r.AuthorizedAt) {
		return r.RevokedAt
	}
	return r.AuthorizedAt
}

// unix is 0 for the zero time, which has no seconds worth keeping.
func unix(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

func fromUnix(seconds int64) time.Time {
	if seconds == 0 {
		return time.Time{}
	}
	return time.Unix(seconds, 0)
}

// unixMilli and fromUnixMilli are the same in milliseconds, which is how fine ObtainedAt is.
func unixMilli(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

func fromUnixMilli(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms)
}

// loadRecord reads a record into out, a pointer to a struct. The error is fs.ErrNotExist if there is none, and wraps
// ErrStore otherwise. Where records are sealed, one that was stored before the seal key was configured is still read, and the log
// says so: adding a key must not lose an authorizer. But anybody who can write to the store can make such a record,
// so the keys of opaque tokens are not taken from one: that is errUnsealed.
func (m *Manager) loadRecord(ctx context.Context, env *Environment, name string, out any) error {
	data, err := m.loadRaw(ctx, env, name)
	if err != nil {
		return err
	}
	return m.decodeStored(ctx, env, name, data, out)
}

// decodeStored is decode of what the store has: a record that only another node can open is not damaged, and one that is not sealed with the
// newest key is to be.
func (m *Manager) decodeStored(ctx context.Context, env *Environment, name string, data []byte, out any) error {
	reseal, err := m.decode(env, name, data, out)
	if errors.Is(err, errDamaged) {
		if other := m.sealedElsewhere(ctx, env, name, data); other != nil {
			return other
		}
	}
	if reseal {
		m.wantReseal()
	}
	return err
}

// loadRaw reads the bytes of a record. The error is fs.ErrNotExist if there is none, and wraps ErrStore otherwise.
func (m *Manager) loadRaw(ctx context.Context, env *Environment, name string) ([]byte, error) {
	var data []byte
	err := env.operate(ctx, "load", storeTimeout, func(ctx context.Context) (err error) {
		data, err = env.Store.Load(ctx, name)
		return err
	}, fs.ErrNotExist)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fs.ErrNotExist
	case err != nil:
		return nil, fmt.Errorf("%w: load %s: %w", ErrStore, name, err)
	}
	return data, nil
}

// decode opens and reads the bytes of a record.
func (m *Manager) decode(env *Environment, name string, data []byte, out any) (reseal bool, err error) {
	env = m.keyring(env)
	switch {
	case env.Sealer == nil:
	case !isPlain(data):
		data, reseal, err = env.Sealer.Open(name, data)
		switch {
		case err == nil:
			env.opens.Store(true)
		case errors.Is(err, crypto.ErrSealKey) && (!env.opens.Load() || !hadFromWeChat(name)):
			// As long as nothing opened, it is more likely that the configuration has the wrong key. And what nobody
			// else knows waits for it in any case.
			return false, said(errUnreadable, name+" does not open with any seal_key: add the one that was removed, or mend the one that is wrong",
				name+" 用任何 seal_key 都打不开：请补上被去掉的密钥，或改正写错的密钥")
		default:
			return false, fmt.Errorf("%w: %s does not open with any seal_key, and others do", errDamaged, name)
		}
	case name == opaqueName:
		return false, fmt.Errorf("%w: %s", errUnsealed, name)
	default:
		reseal = true
		if m.unsealed.first(name) {
			env.Log.Warn("a record is not sealed although there is a seal_key; it is believed, and is sealed when it is next written",
				"record", name)
		}
	}
	return reseal, decodeRecord(name, data, out)
}

// decodeRecord reads an opened record. The cause is left out of its errors: it quotes the record.
func decodeRecord(name string, data []byte, out any) error {
	var version struct {
		V int `json:"v"`
	}
	if err := json.Unmarshal(data, &version); err != nil {
		if crypto.IsSealed(data) {
			return said(errUnreadable, name+" is sealed, and no seal_key is configured", name+" 是加密的，而没有配置 seal_key")
		}
		return fmt.Errorf("%w: %s is torn", errDamaged, name)
	}
	if version.V != recordVersion {
		return fmt.Errorf("%w: %s has version %d, this gateway knows %d", errDamaged, name, version.V, recordVersion)
	}
	if err := json.Unmarshal(data, out); err != nil {
		return fmt.Errorf("%w: %s is not of the form expected", errDamaged, name)
	}
	return nil
}

// hadFromWeChat reports whether WeChat knows what is in the record of that name: all but accepted codes, events that are to be
// forwarded, the keys of opaque tokens, and the verification files that were added by hand.
func hadFromWeChat(name string) bool {
	return name != opaqueName && path.Dir(name) != intentFolder && path.Dir(name) != forwardFolder && path.Dir(name) != verifyFolder
}

// setAside moves a damaged record out of the way, so that what it stood for can be kept again. When nil is returned the
// record is there no more, or is another one by now. Nothing is thrown away: it is copied below wechat/v1/aside first.
// Out is a pointer to what the record should hold. Locked says that the caller has the store's lock on the name;
// otherwise setAside takes it, so that no other node's new record is taken for the damaged one.
func (m *Manager) setAside(ctx context.Context, env *Environment, name string, out any, locked bool) error {
	if !locked {
		unlock, err := m.lockStore(ctx, env, name, writeLockWait)
		if err != nil {
			return err
		}
		defer unlock()
	}
	data, err := m.loadRaw(ctx, env, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := m.decodeStored(ctx, env, name, data, out); !errors.Is(err, errDamaged) {
		return err // another node has put it right
	}
	aside := asideName(name, time.Now())
	if err := m.storeRaw(ctx, env, aside, data); err != nil {
		return err
	}
	if err := m.keepDoubt(ctx, env, name); err != nil {
		return err
	}
	if err := m.deleteRecord(ctx, env, name); err != nil {
		return err
	}
	text := "a record is damaged: it was set aside, and what it stood for is fetched from WeChat again"
	switch path.Dir(name) {
	case forwardFolder:
		text = "a record is damaged: it was set aside; no backend hears of the event in it"
	case verifyFolder:
		text = "a record is damaged: it was set aside; the verification files in it have to be added again"
	}
	env.Log.Error(text, "record", name, "aside", aside)
	return nil
}

// maxUnsealed bounds the names that are remembered. Beyond it the log is silent: it has said enough.
const maxUnsealed = 1 << 12

// unsealedNames remembers which unsealed records the log has heard of.
type unsealedNames struct {
	mu    sync.Mutex
	names map[string]bool
}

// first reports whether a name is a new one.
func (u *unsealedNames) first(name string) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.names[name] || len(u.names) >= maxUnsealed {
		return false
	}
	if u.names == nil {
		u.names = make(map[string]bool)
	}
	u.names[name] = true
	return true
}

// isPlain tells an unsealed record.
func isPlain(data []byte) bool { return len(data) > 0 && data[0] == '{' && json.Valid(data) }

// storeRecord writes in, a struct without a field "v", as a versioned and sealed record. It is durable when nil is
// returned; the error wraps ErrStore.
func (m *Manager) storeRecord(ctx context.Context, env *Environment, name string, in any) error {
	data, err := encodeRecord(m.keyring(env), name, in)
	if err != nil {
		return err
	}
	m.saySealing(ctx, env)
	return m.storeRaw(ctx, env, name, data)
}

// encodeRecord is the reverse of decode.
func encodeRecord(env *Environment, name string, in any) ([]byte, error) {
	body, err := json.Marshal(in)
	if err != nil || len(body) < 2 || body[0] != '{' {
		return nil, fmt.Errorf("%w: %s is not a record", ErrStore, name)
	}
	data := fmt.Appendf(make([]byte, 0, len(body)+16), `{"v":%d`, recordVersion)
	if !bytes.Equal(body, []byte("{}")) {
		data = append(data, ',')
	}
	data = append(data, body[1:]...)
	if env.Sealer != nil {
		if data, err = env.Sealer.Seal(name, data); err != nil {
			return nil, fmt.Errorf("%w: seal %s: %w", ErrStore, name, err)
		}
	}
	return data, nil
}

// swapRecord is storeRecord if the store still holds old, which was read before; nil: it held nothing. A store that cannot
// tell writes it in any case.
func (m *Manager) swapRecord(ctx context.Context, env *Environment, name string, old []byte, in any) error {
	data, err := encodeRecord(m.keyring(env), name, in)
	if err != nil {
		return err
	}
	return m.swapRaw(ctx, env, name, old, data)
}

// swapRaw is swapRecord of a record that is sealed.
func (m *Manager) swapRaw(ctx context.Context, env *Environment, name string, old, data []byte) error {
	m.saySealing(ctx, env)
	swapper, ok := env.Store.(Swapper)
	if !ok {
		return m.storeRaw(ctx, env, name, data)
	}
	err := env.operate(ctx, "store", storeTimeout, func(ctx context.Context) error {
		return swapper.Swap(ctx, name, old, data)
	}, ErrSwapped)
	if err != nil {
		return fmt.Errorf("%w: write %s: %w", ErrStore, name, err)
	}
	return nil
}

func (m *Manager) storeRaw(ctx context.Context, env *Environment, name string, data []byte) error {
	err := env.operate(ctx, "store", storeTimeout, func(ctx context.Context) error { return env.Store.Store(ctx, name, data) })
	if err != nil {
		return fmt.Errorf("%w: write %s: %w", ErrStore, name, err)
	}
	return nil
}

// deleteRecord removes a record.
func (m *Manager) deleteRecord(ctx context.Context, env *Environment, name string) error {
	err := env.operate(ctx, "delete", storeTimeout, func(ctx context.Context) error { return env.Store.Delete(ctx, name) })
	if err != nil {
		return fmt.Errorf("%w: delete %s: %w", ErrStore, name, err)
	}
	return nil
}

// lockStore takes a lock that all nodes respect and waits for it no longer than wait.
func (m *Manager) lockStore(ctx context.Context, env *Environment, name string, wait time.Duration) (unlock func(), err error) {
	err = env.operate(ctx, "lock", wait, func(ctx context.Context) (err error) {
		unlock, err = env.Store.Lock(ctx, name)
		return err
	}, ErrLockHeld)
	if err != nil {
		return nil, fmt.Errorf("%w: lock %s: %w", ErrStore, name, err)
	}
	return unlock, nil
}

// operate makes one operation on the store, within limit, and reports it. Answers are errors with which the store does its work:
// they are none of its failures. Neither is one of an operation whose caller left. A deadline is, whoever set it: the gateway
// sets those.
func (e *Environment) operate(ctx context.Context, op string, limit time.Duration, operation func(context.Context) error, answers ...error) error {
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	start := time.Now()
	err := operation(limited)
	took := time.Since(start)
	switch {
	case slices.ContainsFunc(answers, func(answer error) bool { return errors.Is(err, answer) }):
		e.Observer.StoreOperation(op, took, nil)
	case err == nil || !errors.Is(ctx.Err(), context.Canceled):
		e.Observer.StoreOperation(op, took, err)
	}
	return err
}
