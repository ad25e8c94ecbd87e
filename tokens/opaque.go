package tokens

import (
	"bytes"
	"cmp"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

const (
	// MaxOpaqueLength bounds an opaque token, in characters: SDKs reserve 512 for an access_token.
	MaxOpaqueLength = 512
	// MaxOpaqueName bounds each name in a token, in bytes: its length is one byte. With a client's name as long as
	// that, and the rest as long as it gets, a token has 484 characters.
	MaxOpaqueName = 255

	// The first byte of what the keys seal says what it is. Keys authenticate it, so that none passes for another.
	opaqueVersion = 2 // an opaque token
	stateVersion  = 3 // a state: see SealState

	opaqueKeyBytes = 32
	opaqueKeyID    = 4 // bytes that name a key in a token
	opaqueHeader   = 1 + opaqueKeyID
	opaqueOverhead = 12 + 16 // GCM's nonce and tag

	// opaqueKeyLife is after what time a new key is made. The one before stays good for as long again, and so for
	// every token made with it; no key makes anywhere near the 2^32 tokens that random nonces allow.
	opaqueKeyLife = 30 * 24 * time.Hour
	// opaqueGenerations of keys are kept: the newest makes tokens, all open them.
	opaqueGenerations = 2
	// opaqueReload is how often at most a key that is not known here makes this node look into the store: another node
	// may have made one, but callers must not be able to read the store, or wait for one that fails, at will. Who comes
	// too soon after the last look waits for the next one: the key may have been made in between.
	opaqueReload = time.Second
	// opaqueLockWait bounds the wait for another node that is making a key, and opaqueTimeout all of the making.
	opaqueLockWait = 5 * time.Second
	opaqueTimeout  = opaqueLockWait + 3*storeTimeout
)

var (
	// ErrOpaqueUnknown: not an opaque token, not one of ours, or altered.
	ErrOpaqueUnknown = errors.New("opaque token is not one of ours")
	// ErrOpaqueExpired: one of ours, and its life is over.
	ErrOpaqueExpired = errors.New("opaque token expired")
)

// OpaqueClaims are what an opaque token says: who got it, for which account, until when. Every use must still check
// the client's present rights: the token says who, not may.
type OpaqueClaims struct {
	Client         string // the client's name
	KeyFingerprint string // of the key that the client proved itself with
	AppID          string // of the account, authorizer or platform
	// Platform is the platform whose authorizer AppID is, where the one who asked named it: an account may have
	// authorised several. Empty: whichever the caller may use.
	Platform  string
	Kind      Kind // of the token it stands for
	ExpiresAt time.Time
}

// opaqueKey makes and opens opaque tokens. It is random, is kept in the store, and has nothing to do with any
// client's key.
type opaqueKey struct {
	id      [opaqueKeyID]byte
	aead    cipher.AEAD
	states  cipher.AEAD // of a key derived from this one
	created time.Time
}

// opaqueKeys are the keys as known on this node.
type opaqueKeys struct {
	known atomic.Pointer[[]opaqueKey] // newest first

	mu      sync.Mutex
	kept    []opaqueKeyRecord // what known was made of
	taken   uint64            // the look that kept is of
	news    chan struct{}     // closed when there is a new key, or another node has changed the record; nil: nobody waits
	looks   uint64            // into the store that have begun; each has its number
	changed uint64            // the last look that had begun when another node's change was heard
	looked  uint64            // the last look that was answered
	loaded  time.Time         // when that began
	failed  time.Time         // when it last failed to give a key, or to keep one
	failure error             // of that time; nil: it has not failed since
}

// opaqueRecord is the keys in the store.
type opaqueRecord struct {
	Keys []opaqueKeyRecord `json:"keys"`
}

type opaqueKeyRecord struct {
	ID      []byte `json:"id"`
	Key     []byte `json:"key"`
	Created int64  `json:"created"` // Unix seconds
}

// opaqueName is where the keys are kept.
var opaqueName = path.Join(root, "mac", "opaque")

// IssueOpaque makes an opaque token: at most MaxOpaqueLength characters of [A-Za-z0-9_-] which say nothing to anybody
// but the gateway and which stand for an access token that never leaves it. The claims are sealed with a key that
// all nodes share and that survives restarts. ExpiresAt is kept in whole seconds.
//
// The error wraps ErrStore if the store holds no key and none can be made, and is ErrClosed after Close.
func (m *Manager) IssueOpaque(ctx context.Context, c OpaqueClaims) (secret.String, error) {
	plain, err := appendClaims(nil, c)
	if err != nil {
		return secret.String{}, err
	}
	text, err := m.sealOpaque(ctx, opaqueVersion, plain, nil)
	if err != nil {
		return secret.String{}, err
	}
	if len(text) > MaxOpaqueLength {
		return secret.String{}, fmt.Errorf("opaque token would have %d characters, more than %d: give the client a shorter name", len(text), MaxOpaqueLength)
	}
	return secret.New(text), nil
}

// of is what seals that version.
func (k *opaqueKey) of(version byte) cipher.AEAD {
	if version == stateVersion {
		return k.states
	}
	return k.aead
}

// sealOpaque seals plain with the newest key as characters of [A-Za-z0-9_-]. Bound is what must be there again when it
// is opened.
func (m *Manager) sealOpaque(ctx context.Context, version byte, plain, bound []byte) (string, error) {
	key, err := m.issuingKey(ctx)
	if err != nil {
		return "", err
	}
	sealed := make([]byte, opaqueHeader, opaqueHeader+len(plain)+opaqueOverhead)
	sealed[0] = version
	copy(sealed[1:], key.id[:])
	sealed = key.of(version).Seal(sealed, nil, plain, append(sealed[:opaqueHeader:opaqueHeader], bound...))
	return base64.RawURLEncoding.EncodeToString(sealed), nil
}

// OpenOpaque returns what an opaque token says. The error is ErrOpaqueUnknown for anything that this gateway did not
// make or that was altered, ErrOpaqueExpired (with the claims) past its life, and wraps ErrStore if that cannot be
// told because the store fails.
func (m *Manager) OpenOpaque(ctx context.Context, token string) (OpaqueClaims, error) {
	plain, err := m.openOpaque(ctx, opaqueVersion, token, nil)
	if err != nil {
		return OpaqueClaims{}, err
	}
	claims, ok := parseClaims(plain)
	if !ok {
		return OpaqueClaims{}, ErrOpaqueUnknown
	}
	if !time.Now().Before(claims.ExpiresAt) {
		return claims, ErrOpaqueExpired
	}
	return claims, nil
}

// openOpaque is the reverse of sealOpaque. The error is ErrOpaqueUnknown for what no key of ours sealed as this version
// and bound so.
func (m *Manager) openOpaque(ctx context.Context, version byte, text string, bound []byte) ([]byte, error) {
	if len(text) > MaxOpaqueLength || strings.ContainsAny(text, "\r\n") { // the decoder would skip these
		return nil, ErrOpaqueUnknown
	}
	sealed, err := base64.RawURLEncoding.Strict().DecodeString(text)
	if err != nil || len(sealed) < opaqueHeader+opaqueOverhead || sealed[0] != version {
		return nil, ErrOpaqueUnknown
	}
	key, err := m.openingKey(ctx, [opaqueKeyID]byte(sealed[1:opaqueHeader]))
	if err != nil {
		return nil, err
	}
	plain, err := key.of(version).Open(nil, nil, sealed[opaqueHeader:], append(sealed[:opaqueHeader:opaqueHeader], bound...))
	if err != nil {
		return nil, ErrOpaqueUnknown
	}
	return plain, nil
}

// issuingKey is the newest key; one is made if there is none or the newest is old.
func (m *Manager) issuingKey(ctx context.Context) (opaqueKey, error) {
	env, err := m.current()
	if err != nil {
		return opaqueKey{}, err
	}
	key, ok := m.opaque.newest()
	if ok && m.opaque.fresh() {
		return key, nil
	}
	failure := m.opaque.failedLately()
	renew := func(ctx context.Context) (opaqueKey, error) { return m.renewOpaqueKeys(ctx, env) }
	switch name := env.flightName("opaque", "renew"); {
	case ok && failure == nil: // the old one serves meanwhile
		launch(m, name, opaqueTimeout, renew)
		return key, nil
	case ok:
		return key, nil
	case failure != nil:
		return opaqueKey{}, failure
	default:
		return share(ctx, m, name, opaqueTimeout, renew)
	}
}

// failedLately returns the store's last failure if it is too young to ask again.
func (k *opaqueKeys) failedLately() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.failure != nil && time.Since(k.failed) < opaqueReload {
		return k.failure
	}
	return nil
}

// heard notes that another node has changed the record: whoever waits to read it need wait no longer.
func (k *opaqueKeys) heard() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.changed = k.looks
	k.tell()
}

// tell wakes all who wait. The caller holds mu.
func (k *opaqueKeys) tell() {
	if k.news != nil {
		close(k.news)
		k.news = nil
	}
}

// awaitReload waits until the store may be read again, or there is a new key: at once if it is that one. The error is
// ctx's.
func (k *opaqueKeys) awaitReload(ctx context.Context, id [opaqueKeyID]byte) error {
	k.mu.Lock()
	wait := opaqueReload - time.Since(k.loaded)
	if _, known := k.find(id); known || k.looked <= k.changed { // it was changed since, be it while it was being read
		wait = 0
	}
	if k.news == nil {
		k.news = make(chan struct{})
	}
	news := k.news
	k.mu.Unlock()
	if wait <= 0 {
		return nil
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-news:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// look is the number of a look into the store that begins.
func (k *opaqueKeys) look() uint64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.looks++
	return k.looks
}

// lastLook is the number of the last look that has begun.
func (k *opaqueKeys) lastLook() uint64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.looks
}

// lookedSince reports whether a look has been answered that began after that one.
func (k *opaqueKeys) lookedSince(look uint64) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.looked > look
}

// note remembers how the store answered a look that began then; 0: it was not asked for the keys. That an older look failed says
// nothing once a later one was answered.
func (k *opaqueKeys) note(look uint64, began time.Time, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err != nil && look != 0 && look < k.looked {
		return
	}
	k.answered(look, began)
	k.failed, k.failure = time.Now(), err
}

// answered notes that a look that began then is over. The caller holds mu.
func (k *opaqueKeys) answered(look uint64, began time.Time) {
	if look > k.looked {
		k.looked, k.loaded = look, began
	}
}

// fresh reports whether the newest key may make tokens.
func (k *opaqueKeys) fresh() bool {
	key, ok := k.newest()
	return ok && time.Since(key.created) < opaqueKeyLife
}

func (k *opaqueKeys) newest() (opaqueKey, bool) {
	if known := k.known.Load(); known != nil && len(*known) > 0 {
		return (*known)[0], true
	}
	return opaqueKey{}, false
}

// renewOpaqueKeys returns the newest key, and makes it unless this or another node did so meanwhile. It runs once at a
// time.
func (m *Manager) renewOpaqueKeys(ctx context.Context, env *Environment) (opaqueKey, error) {
	err := m.makeOpaqueKey(ctx, env)
	m.opaque.note(0, time.Time{}, err)
	key, ok := m.opaque.newest()
	if ok && err != nil {
		env.Log.Warn("a new key for opaque tokens cannot be kept, the old one stays in use", "error", err)
		err = nil
	}
	return key, err
}

func (m *Manager) makeOpaqueKey(ctx context.Context, env *Environment) error {
	if m.opaque.fresh() {
		return nil
	}
	if _, err := m.loadOpaqueKeys(ctx, env); err != nil && !errors.Is(err, errDamaged) || m.opaque.fresh() {
		return err
	}
	unlock, err := m.lockStore(ctx, env, opaqueName, opaqueLockWait)
	if err != nil {
		return err
	}
	defer unlock()
	kept, err := m.loadOpaqueKeys(ctx, env)
	if errors.Is(err, errDamaged) {
		if err = m.setAside(ctx, env, opaqueName, new(opaqueRecord), true); err == nil {
			kept, err = m.loadOpaqueKeys(ctx, env)
		}
	}
	if err != nil || m.opaque.fresh() {
		return err
	}
	made := opaqueKeyRecord{ID: make([]byte, opaqueKeyID), Key: make([]byte, opaqueKeyBytes), Created: time.Now().Unix()}
	_, _ = rand.Read(made.ID) // never fails since Go 1.24
	_, _ = rand.Read(made.Key)
	kept.Keys = append([]opaqueKeyRecord{made}, kept.Keys...)
	kept.Keys = kept.Keys[:min(len(kept.Keys), opaqueGenerations)]
	// Durable first: a token must still open after a restart.
	if err := m.storeRecord(ctx, env, opaqueName, kept); err != nil {
		return err
	}
	return m.opaque.take(kept, m.opaque.look(), time.Now())
}

// openingKey is the key of that id.
func (m *Manager) openingKey(ctx context.Context, id [opaqueKeyID]byte) (opaqueKey, error) {
	env, err := m.current()
	if err != nil {
		return opaqueKey{}, err
	}
	if key, ok := m.opaque.find(id); ok {
		return key, nil
	}
	last := m.opaque.lastLook()
	for {
		over := m.opaque.lookedSince(last) // before find: a look may end in between
		if key, ok := m.opaque.find(id); ok {
			return key, nil
		}
		if failure := m.opaque.failedLately(); failure != nil { // be it of somebody's look meanwhile
			return opaqueKey{}, failure
		}
		if over {
			return opaqueKey{}, ErrOpaqueUnknown
		}
		if err := m.opaque.awaitReload(ctx, id); err != nil {
			return opaqueKey{}, err
		}
		if _, ok := m.opaque.find(id); ok || m.opaque.lookedSince(last) {
			continue
		}
		// A look that is under way may have begun before the key was made: then there is another one.
		_, err = share(ctx, m, env.flightName("opaque", "load"), loadTimeout, func(ctx context.Context) (opaqueRecord, error) {
			return m.loadOpaqueKeys(ctx, env)
		})
		if key, ok := m.opaque.find(id); ok {
			return key, nil
		}
		if err != nil {
			return opaqueKey{}, err
		}
	}
}

func (k *opaqueKeys) find(id [opaqueKeyID]byte) (opaqueKey, bool) {
	known := k.known.Load()
	if known == nil {
		return opaqueKey{}, false
	}
	for _, key := range *known {
		if key.id == id {
			return key, true
		}
	}
	return opaqueKey{}, false
}

// loadOpaqueKeys reads the keys from the store; none is no error. Keys that are not sealed although there is a seal key
// count as none: whoever can write to the store could have put them there, to make tokens of their own.
func (m *Manager) loadOpaqueKeys(ctx context.Context, env *Environment) (kept opaqueRecord, err error) {
	look, began := m.opaque.look(), time.Now()
	err = m.loadRecord(ctx, env, opaqueName, &kept)
	switch {
	case errors.Is(err, errUnsealed):
		env.Log.Warn("the keys of opaque tokens are not sealed although there is a seal_key: they are not used, new ones are made",
			"record", opaqueName)
		err = nil
	case errors.Is(err, fs.ErrNotExist):
		err = nil
	case err == nil:
		err = m.opaque.take(kept, look, began)
	}
	m.opaque.note(look, began, err)
	return kept, err
}

// take puts keys in force that a look found which began then, unless a later one has found some.
func (k *opaqueKeys) take(kept opaqueRecord, look uint64, began time.Time) error {
	known := make([]opaqueKey, 0, len(kept.Keys))
	for _, r := range kept.Keys {
		key, err := newOpaqueKey(r)
		if err != nil {
			return fmt.Errorf("%w: %s holds no usable key", errUnreadable, opaqueName)
		}
		known = append(known, key)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if look < k.taken {
		return nil
	}
	// Only a new key is news: who waits for one that is not there must not make the store be read at once.
	news := slices.ContainsFunc(known, func(key opaqueKey) bool { _, ok := k.find(key.id); return !ok })
	k.kept, k.taken = kept.Keys, look
	k.known.Store(&known)
	k.answered(look, began)
	if news { // at last: whoever that wakes finds the key, and need not look again
		k.tell()
	}
	return nil
}

// keepOpaqueKeys is the job that writes the keys again that this node has and the store has lost: it was emptied, or an
// older replica took over. Tokens made with them would be refused by nodes that start from now on.
func (m *Manager) keepOpaqueKeys(ctx context.Context) error {
	env, err := m.current()
	if err != nil {
		return nil //nolint:nilerr // closed
	}
	m.opaque.mu.Lock()
	mine := m.opaque.kept
	m.opaque.mu.Unlock()
	if len(mine) == 0 || m.hearing.Load() == nil {
		return nil
	}
	var kept opaqueRecord
	err = m.loadRecord(ctx, env, opaqueName, &kept)
	if err != nil && !errors.Is(err, fs.ErrNotExist) || len(missingKeys(kept, mine)) == 0 {
		return unlessUnreadable(err)
	}
	unlock, err := m.lockStore(ctx, env, opaqueName, opaqueLockWait)
	if err != nil {
		return err
	}
	defer unlock()
	kept = opaqueRecord{}
	if err = m.loadRecord(ctx, env, opaqueName, &kept); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return unlessUnreadable(err)
	}
	missing := missingKeys(kept, mine)
	if len(missing) == 0 {
		return nil
	}
	kept.Keys = append(slices.Clone(kept.Keys), missing...)
	slices.SortStableFunc(kept.Keys, func(a, b opaqueKeyRecord) int { return cmp.Compare(b.Created, a.Created) })
	kept.Keys = kept.Keys[:min(len(kept.Keys), opaqueGenerations)]
	if err := m.storeRecord(ctx, env, opaqueName, kept); err != nil {
		return err
	}
	return m.opaque.take(kept, m.opaque.look(), time.Now())
}

// unlessUnreadable is err unless it says that the record is there: then there is nothing to write again.
func unlessUnreadable(err error) error {
	if errors.Is(err, errUnreadable) || errors.Is(err, errUnsealed) || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// missingKeys are those of mine that a record does not have and that are newer than its oldest, or fit in beside it.
func missingKeys(kept opaqueRecord, mine []opaqueKeyRecord) (missing []opaqueKeyRecord) {
	for _, key := range mine {
		there := slices.ContainsFunc(kept.Keys, func(k opaqueKeyRecord) bool { return bytes.Equal(k.ID, key.ID) })
		fits := len(kept.Keys) < opaqueGenerations || key.Created > kept.Keys[len(kept.Keys)-1].Created
		if !there && fits {
			missing = append(missing, key)
		}
	}
	return missing
}

func newOpaqueKey(r opaqueKeyRecord) (opaqueKey, error) {
	if len(r.Key) != opaqueKeyBytes || len(r.ID) != opaqueKeyID {
		return opaqueKey{}, errUnreadable
	}
	derived, err := hkdf.Key(sha256.New, r.Key, nil, stateLabel, opaqueKeyBytes)
	if err != nil {
		return opaqueKey{}, err
	}
	key := opaqueKey{id: [opaqueKeyID]byte(r.ID), created: time.Unix(r.Created, 0)}
	if key.aead, err = newAEAD(r.Key); err != nil {
		return opaqueKey{}, err
	}
	key.states, err = newAEAD(derived)
	return key, err
}

func newAEAD(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

// appendClaims writes claims as an expiry in Unix seconds and five strings, each behind a byte with its length.
func appendClaims(dst []byte, c OpaqueClaims) ([]byte, error) {
	dst = binary.BigEndian.AppendUint64(dst, uint64(c.ExpiresAt.Unix()))
	for _, s := range [...]string{c.Client, c.KeyFingerprint, c.AppID, c.Platform, string(c.Kind)} {
		if len(s) > MaxOpaqueName {
			return nil, fmt.Errorf("opaque token: a name of %d bytes is too long, the limit is %d", len(s), MaxOpaqueName)
		}
		dst = append(dst, byte(len(s)))
		dst = append(dst, s...)
	}
	return dst, nil
}

// parseClaims reads what appendClaims wrote, and nothing else.
func parseClaims(b []byte) (OpaqueClaims, bool) {
	const expiry = 8
	if len(b) < expiry {
		return OpaqueClaims{}, false
	}
	expires := int64(binary.BigEndian.Uint64(b))
	b = b[expiry:]
	var fields [5]string
	for i := range fields {
		if len(b) == 0 || len(b)-1 < int(b[0]) {
			return OpaqueClaims{}, false
		}
		n := int(b[0])
		fields[i], b = string(b[1:1+n]), b[1+n:]
	}
	return OpaqueClaims{
		Client: fields[0], KeyFingerprint: fields[1], AppID: fields[2], Platform: fields[3], Kind: Kind(fields[4]),
		ExpiresAt: time.Unix(expires, 0),
	}, len(b) == 0
}
