package wxsim

import (
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"slices"
	"time"
)

// Kind is what sort of credential a value is.
type Kind string

// The kinds. The first four are access tokens of the API.
const (
	KindComponent   Kind = "component"    // component_access_token; its AppID is the platform's
	KindAuthorizer  Kind = "authorizer"   // authorizer_access_token
	KindAccount     Kind = "account"      // from /cgi-bin/token
	KindStable      Kind = "stable"       // from /cgi-bin/stable_token
	KindUser        Kind = "user"         // a user's access_token of web authorization
	KindUserRefresh Kind = "user-refresh" // its refresh_token
	KindUserCode    Kind = "user-code"    // code of web authorization
	KindLoginCode   Kind = "login-code"   // js_code of a mini program
	KindRefresh     Kind = "refresh"      // authorizer_refresh_token
	KindAuthCode    Kind = "auth-code"    // authorization_code
	KindPreAuthCode Kind = "pre-auth-code"
	KindTicket      Kind = "ticket"    // component_verify_ticket
	KindJSTicket    Kind = "js-ticket" // jsapi_ticket
	KindCardTicket  Kind = "card-ticket"
)

// holder is whose credential of which kind.
type holder struct {
	kind     Kind
	platform string // "" for plain accounts
	appID    string // the platform's own for KindComponent, KindTicket, KindPreAuthCode
}

// credential is one issued value with its state. Guarded by Server.mu.
type credential struct {
	holder
	value     string
	user      User   // user kinds
	scope     string // user kinds
	issued    time.Time
	expires   time.Time // zero: never
	dies      time.Time // end of the overlap after being replaced; zero: not replaced
	usesLeft  int       // early death; negative: none
	used      bool      // single-use codes
	refused   bool      // a call with it was refused, so its holder may renew it
	lost      bool      // the answer that carried it never arrived
	expiredBy string    // Server.ExpireToken, Server.ExpireAll
}

// WeChat's codes for credentials.
const (
	codeInvalidCredential = 40001
	codeMalformedToken    = 40014
	codeTokenExpired      = 42001
	codeComponentExpired  = 42006
	codeUnauthorized      = 61003
)

const (
	minTokenChars = 16
	freshLife     = 15 * time.Minute // a token with more life than this needs no renewal
	freshShare    = 3                // nor does one of a short life with more than this part of it, and freshSlack
	freshSlack    = time.Second      // lives are told in whole seconds
	earlyUses     = 6                // an early death comes after at most so many uses
)

// shapes are the forms of values seen in public: prefix and number of characters after it.
var shapes = map[Kind]struct {
	prefix string
	chars  int
}{
	KindComponent: {"97_", 133}, KindAuthorizer: {"97_", 133}, KindAccount: {"97_", 133}, KindStable: {"97_", 133},
	KindUser: {"97_", 86}, KindUserRefresh: {"97_", 86}, KindUserCode: {"0", 31}, KindLoginCode: {"0", 31},
	KindRefresh: {"refreshtoken@@@", 43}, KindAuthCode: {"queryauthcode@@@", 64}, KindPreAuthCode: {"preauthcode@@@", 64},
	KindTicket: {"ticket@@@", 86}, KindJSTicket: {"", 86}, KindCardTicket: {"", 86},
}

func newValue(kind Kind) string {
	shape := shapes[kind]
	raw := make([]byte, shape.chars)
	_, _ = rand.Read(raw) // never fails, by its contract
	return shape.prefix + base64.RawURLEncoding.EncodeToString(raw)[:shape.chars]
}

func newRID(now time.Time) string {
	var raw [8]byte
	_, _ = rand.Read(raw[:])
	return fmt.Sprintf("%08x-%x-%x", uint32(now.Unix()), raw[:4], raw[4:]) //nolint:gosec // 32 bits of a time
}

// issue makes a credential of h that lives for life (0: for ever). The caller holds mu.
func (s *Server) issue(h holder, life time.Duration) *credential {
	now := time.Now()
	c := &credential{holder: h, value: newValue(h.kind), issued: now, usesLeft: -1}
	if life > 0 {
		c.expires = now.Add(life)
	}
	s.creds[c.value] = c
	s.secrets = append(s.secrets, c.value)
	return c
}

// issueToken makes an access token of h the current one; the one before lives on for overlap.
// The caller holds mu.
func (s *Server) issueToken(h holder, life, overlap time.Duration) *credential {
	now := time.Now()
	if old := s.current[h]; old != nil && old.dies.IsZero() {
		old.dies = now.Add(overlap)
	}
	c := s.issue(h, life)
	if s.dice.hit(s.cfg.Faults.EarlyDeath, "early-death", string(h.kind)+h.platform+h.appID) {
		c.usesLeft = 1 + s.dice.throw("early-uses", string(h.kind)+h.platform+h.appID).IntN(earlyUses)
	}
	s.current[h] = c
	s.journal.refreshed(h)
	return c
}

// dead says with which errcode a credential is refused at now, 0 when it is good. The caller holds mu.
func (s *Server) dead(c *credential, now time.Time) int64 {
	switch {
	case !c.dies.IsZero() && !now.Before(c.dies), c.usesLeft == 0:
		return codeInvalidCredential
	case c.expiredBy != "", !c.expires.IsZero() && !now.Before(c.expires):
		return codeTokenExpired
	default:
		return 0
	}
}

// tokenByValue finds a live access token and counts its use. The caller holds mu.
func (s *Server) tokenByValue(value string) (*credential, int64) {
	c := s.creds[value]
	if c == nil {
		if len(value) < minTokenChars {
			return nil, codeMalformedToken
		}
		return nil, codeInvalidCredential
	}
	if c.kind == KindAuthorizer && !s.authorizations[pair{c.platform, c.appID}].live() {
		c.refused = true
		return c, codeUnauthorized
	}
	if code := s.dead(c, time.Now()); code != 0 {
		c.refused = true
		if code == codeTokenExpired && c.kind == KindComponent && s.dice.hit(s.cfg.Faults.ComponentExpired, "expired", c.appID) {
			code = codeComponentExpired
		}
		return c, code
	}
	if c.usesLeft > 0 {
		c.usesLeft--
	}
	return c, 0
}

// checkRenewal looks whether the current token of h may be renewed now: it is near its end,
// was refused, was never received or was forgiven. The caller holds mu.
func (s *Server) checkRenewal(c *call, h holder) {
	cur := s.current[h]
	if cur == nil || cur.refused || cur.lost || s.dead(cur, time.Now()) != 0 {
		return
	}
	if left := time.Until(cur.expires); left > min(freshLife, cur.expires.Sub(cur.issued)/freshShare+freshSlack) {
		if id := (whose{h.kind, h.appID}); s.forgiven[id] {
			delete(s.forgiven, id)
			return
		}
		c.violate(RuleFreshRefresh, "%s token of %s renewed with %s of life left", h.kind, h.appID, left.Round(time.Second))
	}
}

// ExpireToken ends the life of one issued value; calls with it get 42001 from then on. It
// reports whether the value was known.
func (s *Server) ExpireToken(value string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.creds[value]
	if c == nil {
		return false
	}
	c.expiredBy = "test"
	return true
}

// ExpireAll ends the life of all credentials of a kind held for an appid ("": all), and
// returns how many were live. Calls with such a token get 42001.
func (s *Server) ExpireAll(kind Kind, appID string) int {
	return s.endAll(kind, appID, func(c *credential) { c.expiredBy = "test" })
}

// ReplaceAll acts as another holder of the same credentials that renewed them: calls with a
// token of that kind and appid ("": all) get 40001. It returns how many were live.
func (s *Server) ReplaceAll(kind Kind, appID string) int {
	return s.endAll(kind, appID, func(c *credential) { c.dies = time.Now() })
}

func (s *Server) endAll(kind Kind, appID string, end func(*credential)) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, c := range s.creds {
		if c.kind == kind && (appID == "" || c.appID == appID) && s.dead(c, time.Now()) == 0 {
			end(c)
			n++
		}
	}
	return n
}

// AllowRefresh forgives the next renewal of a fresh token, for tests in which the gateway has
// a good reason that the simulator cannot see: an operator's request, a crash. It need not be
// of the token that is current now: a call of the process that died may still be carried out.
func (s *Server) AllowRefresh(kind Kind, appID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forgiven[whose{kind, appID}] = true
}

// whose names the tokens of a kind of one appid, whatever the platform.
type whose struct {
	kind  Kind
	appID string
}

// Current returns the newest value of a kind held for an appid (the platform's for
// KindComponent and KindTicket) and whether a call with it would be accepted now. With
// several platforms holding the account, platform says which; "" for a plain account or any.
func (s *Server) Current(kind Kind, platform, appID string) (value string, live bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for h, c := range s.current {
		if h.kind == kind && h.appID == appID && (platform == "" || h.platform == platform) {
			return c.value, s.dead(c, time.Now()) == 0
		}
	}
	return "", false
}

// Secrets returns every secret value configured here or issued so far: AppSecrets, push
// tokens and keys, access and refresh tokens, tickets, codes, session keys. None of them may
// occur in anything that the gateway writes.
func (s *Server) Secrets() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.secrets)
}

// Issued returns the values of these kinds that were handed out and are still known here, dead ones included.
func (s *Server) Issued(kinds ...Kind) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var values []string
	for _, c := range s.creds {
		if slices.Contains(kinds, c.kind) {
			values = append(values, c.value)
		}
	}
	return values
}
