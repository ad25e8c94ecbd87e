package caddymodule

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// Limits of what is remembered for the status.
const (
	sightingLife = 10 * time.Minute // for how long what was seen once is told: as long as WeChat takes to push a ticket
	maxSightings = 512              // remembered at once; with more, the oldest is forgotten
	maxRings     = 1 << 14          // keys and tokens remembered at once, those of former configurations included
	maxHosts     = 64               // hosts of WeChat's API, those of former configurations included
)

// health is what the status tells beside the state of tokens: what was seen of pushes, calls, hosts and the store. Reloads
// share it.
type health struct {
	*metrics // hears of tokens and the store first

	started   time.Time
	sightings sightings
	store     storeHealth
	hosts     hostTable
	rings     ringTable
	clock     wechatClock
	verdict   verdict
}

func newHealth(m *metrics) *health { return &health{metrics: m, started: time.Now()} }

// TokenRefreshed is tokens.Observer's, for watcher. What platforms and accounts lack is in their state; authorizers are too many.
func (h *health) TokenRefreshed(kind tokens.Kind, appid string, took time.Duration, err error) {
	h.metrics.TokenRefreshed(kind, appid, took, err)
	if kind == tokens.KindComponent || kind == tokens.KindAccount {
		if err == nil {
			h.sightings.mended(appid, codeAddressRefused)
		}
		return
	}
	if err == nil {
		h.sightings.mended(appid, codeAuthorizerToken)
		return
	}
	h.sightings.saw(codeAuthorizerToken, appid, reasonOf(err))
}

// RogueRefresh is tokens.Observer's, for watcher.
func (h *health) RogueRefresh(kind tokens.Kind, appid string) {
	h.metrics.RogueRefresh(kind, appid)
	h.sightings.saw(codeRogue, appid, texts(string(kind), string(kind)))
}

// StoreOperation is tokens.Observer's, for watcher.
func (h *health) StoreOperation(op string, took time.Duration, err error) {
	h.metrics.StoreOperation(op, took, err)
	h.store.note(op, err)
}

// sightings remembers, for a while, what was seen to go wrong and leaves no other trace. The zero value is ready.
type sightings struct {
	held atomic.Int32 // how many there are, so that what goes well looks at nothing else
	mu   sync.RWMutex
	seen map[sightingKey]*sighting
}

type sightingKey struct{ code, subject string }

type sighting struct {
	sightingKey
	last   time.Time
	count  int
	detail tokens.Text
}

// saw notes that something went wrong. Its detail is for people, and holds no secret.
func (s *sightings) saw(code, subject string, detail tokens.Text) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := sightingKey{code, subject}
	x := s.seen[k]
	if x == nil {
		for old, was := range s.seen { // else what nobody asks about would stay
			if time.Since(was.last) > sightingLife {
				delete(s.seen, old)
			}
		}
		if len(s.seen) >= maxSightings {
			s.dropOldest()
		}
		if s.seen == nil {
			s.seen = make(map[sightingKey]*sighting)
		}
		x = &sighting{sightingKey: k}
		s.seen[k] = x
		s.held.Store(int32(len(s.seen))) //nolint:gosec // at most maxSightings
	}
	x.last, x.detail = time.Now(), detail
	x.count++
}

// dropOldest makes room; mu is held.
func (s *sightings) dropOldest() {
	var oldest *sighting
	for _, x := range s.seen {
		if oldest == nil || x.last.Before(oldest.last) {
			oldest = x
		}
	}
	delete(s.seen, oldest.sightingKey)
}

// mended forgets what was seen of a subject: it goes well again.
func (s *sightings) mended(subject string, codes ...string) {
	if s.held.Load() == 0 {
		return
	}
	s.mu.RLock()
	there := slices.ContainsFunc(codes, func(code string) bool { return s.seen[sightingKey{code, subject}] != nil })
	s.mu.RUnlock()
	if !there {
		return // what there is concerns somebody else, and this is on the way of each push
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, code := range codes {
		delete(s.seen, sightingKey{code, subject})
	}
	s.held.Store(int32(len(s.seen))) //nolint:gosec // at most maxSightings
}

// recent returns what was seen lately, in the order of codes and subjects.
func (s *sightings) recent(now time.Time) (list []sighting) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k, x := range s.seen {
		if now.Sub(x.last) > sightingLife {
			delete(s.seen, k)
			continue
		}
		list = append(list, *x)
	}
	s.held.Store(int32(len(s.seen))) //nolint:gosec // at most maxSightings
	slices.SortFunc(list, func(a, b sighting) int {
		if c := strings.Compare(a.code, b.code); c != 0 {
			return c
		}
		return strings.Compare(a.subject, b.subject)
	})
	return list
}

// storeHealth is how the store did. The zero value is ready.
type storeHealth struct {
	mu       sync.Mutex
	failedAt time.Time
	reason   string
	failing  [3]bool // the last read, lock, write
}

func (s *storeHealth) note(op string, err error) {
	if op == "share" { // what nodes share for a short time is told by itself
		return
	}
	kind := 2
	switch op {
	case "load", "list":
		kind = 0
	case "lock":
		kind = 1
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failing[kind] = err != nil; err != nil {
		s.failedAt, s.reason = time.Now(), safeReason(err)
	}
}

// last returns whether the last write failed, or its lock, and how the last operation that did went wrong.
func (s *storeHealth) last() (writeFails bool, failedAt time.Time, reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failing[1] || s.failing[2], s.failedAt, s.reason
}

// hostTable is how WeChat's hosts did. The zero value is ready.
type hostTable struct {
	mu    sync.Mutex
	hosts map[string]*hostHealth
}

// hostHealth is how one of them did.
type hostHealth struct {
	okAt    atomic.Int64 // Unix seconds
	failing atomic.Bool  // it did the last time

	mu       sync.Mutex
	failedAt time.Time
	class    string
	reason   string
	egressIP string
}

// at returns a host's place, host[:port] as in its origin.
func (t *hostTable) at(host string) *hostHealth {
	t.mu.Lock()
	defer t.mu.Unlock()
	h := t.hosts[host]
	if h == nil {
		h = new(hostHealth)
		if t.hosts == nil {
			t.hosts = make(map[string]*hostHealth)
		}
		if len(t.hosts) < maxHosts {
			t.hosts[host] = h
		}
	}
	return h
}

// note takes what the gateway's own call came to.
func (t *hostTable) note(host string, err error) {
	h := t.at(host)
	api, answered := errors.AsType[*tokens.APIError](err)
	if answered {
		if known, _ := tokens.Explain(api.Code); known.NamesEgressIP() {
			h.sawAddress(tokens.EgressIP(api.Msg))
		}
	}
	if err == nil || answered {
		h.ok()
		return
	}
	h.failed(err)
}

// ok notes that the host answered. It is on the way of each call.
func (h *hostHealth) ok() {
	touch(&h.okAt)
	if h.failing.Load() {
		h.failing.Store(false)
	}
}

func (h *hostHealth) failed(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.failedAt, h.class, h.reason = time.Now(), classOf(err), safeReason(rootOf(err))
	h.failing.Store(true)
}

// sawAddress notes the address that WeChat sees calls come from.
func (h *hostHealth) sawAddress(ip string) {
	if ip == "" {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.egressIP = ip
}

// touch sets a time to now, and does not write when that changes nothing.
func touch(t *atomic.Int64) { touchAt(t, time.Now().Unix()) }

func touchAt(t *atomic.Int64, now int64) {
	if t.Load() != now {
		t.Store(now)
	}
}

// when reads such a time.
func when(t *atomic.Int64) time.Time {
	if at := t.Load(); at != 0 {
		return time.Unix(at, 0).UTC()
	}
	return time.Time{}
}

// The ways in which a host cannot be reached.
const (
	classDNS     = "dns"
	classDial    = "connect"
	classTimeout = "timeout"
	classTLS     = "tls"
	classProxy   = "proxy"
	classAnswer  = "answer" // it answered something that is not WeChat's
)

// classOf says in which way a host was not reached.
func classOf(err error) string {
	if op, ok := errors.AsType[*net.OpError](err); ok && (op.Op == "proxyconnect" || op.Op == "socks connect") {
		return classProxy
	}
	if _, ok := errors.AsType[*net.DNSError](err); ok {
		return classDNS
	}
	if dial, ok := errors.AsType[reverseproxy.DialError](err); ok { // which does not say what it wraps
		switch text := dial.Error(); {
		case strings.Contains(text, "lookup "):
			return classDNS
		case strings.Contains(text, "timeout"):
			return classTimeout
		}
		return classDial
	}
	if isTLSError(err) {
		return classTLS
	}
	if isTimeout(err) {
		return classTimeout
	}
	if _, ok := errors.AsType[*net.OpError](err); ok {
		return classDial
	}
	return classAnswer
}

func isTLSError(err error) bool {
	_, verify := errors.AsType[*tls.CertificateVerificationError](err)
	_, record := errors.AsType[tls.RecordHeaderError](err)
	_, alert := errors.AsType[tls.AlertError](err)
	_, authority := errors.AsType[x509.UnknownAuthorityError](err)
	text := err.Error() // net/http has no types for these
	return verify || record || alert || authority || strings.Contains(text, "TLS handshake") || strings.Contains(text, "HTTP response to HTTPS client")
}

// rootOf is the part of an error that says why there is no connection: what is around it may name a URL.
func rootOf(err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		err = u.Err
	}
	if op, ok := errors.AsType[*net.OpError](err); ok {
		return op
	}
	return err
}

// ringTable remembers when each key and token last opened a push, by its fingerprint. The zero value is ready.
type ringTable struct {
	mu   sync.Mutex
	used map[fingerprint]*atomic.Int64
}

// fingerprint names a key or a token; what is for one receive id is not for another.
type fingerprint = [sha256.Size]byte

func ringPrint(receiveID, what, text string) fingerprint {
	return sha256.Sum256([]byte(what + "\x00" + receiveID + "\x00" + text))
}

// fingerprints are those of a codec's tokens and keys, in its order.
type fingerprints struct{ tokens, keys []fingerprint }

// at returns the place of a key or a token.
func (t *ringTable) at(sum fingerprint) *atomic.Int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	at := t.used[sum]
	if at == nil {
		at = new(atomic.Int64)
		if t.used == nil || len(t.used) >= maxRings {
			t.used = make(map[fingerprint]*atomic.Int64)
		}
		t.used[sum] = at
	}
	return at
}

// ring is the tokens and keys of one platform or account, in the order of its codec, and when they last opened a push.
// The nil ring remembers nothing.
type ring struct {
	receiveID    string
	tokens, keys []*atomic.Int64
	last         *atomic.Int64 // push of any kind
	release      *atomic.Int64 // push of WeChat's acceptance check
	sightings    *sightings
}

// ring makes the ring of a receive id.
func (h *health) ring(receiveID string, of fingerprints) *ring {
	at := func(what string) *atomic.Int64 { return h.rings.at(ringPrint(receiveID, what, "")) }
	r := &ring{receiveID: receiveID, sightings: &h.sightings, last: at("last"), release: at("release")}
	for _, sum := range of.tokens {
		r.tokens = append(r.tokens, h.rings.at(sum))
	}
	for _, sum := range of.keys {
		r.keys = append(r.keys, h.rings.at(sum))
	}
	return r
}

// opened notes that a push opened. It is on the way of each push.
func (r *ring) opened(o crypto.Opened, plain bool) {
	if r == nil {
		return
	}
	now := time.Now().Unix()
	touchAt(r.last, now)
	if !plain && o.TokenIndex() < len(r.tokens) && o.KeyIndex() < len(r.keys) {
		touchAt(r.tokens[o.TokenIndex()], now)
		touchAt(r.keys[o.KeyIndex()], now)
	}
	r.sightings.mended(r.receiveID, pushCodes...)
}
