package tokens

import (
	"context"
	"crypto/sha256"
	"errors"
	"io/fs"
	"regexp"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// userWire is a user as nodes share one. It is sealed where records are: it has the user's own tokens.
type userWire struct {
	AppID    string   `json:"appid"`
	Platform string   `json:"platform,omitempty"`
	OpenID   string   `json:"openid"`
	UnionID  string   `json:"unionid,omitempty"`
	Scope    string   `json:"scope,omitempty"`
	FuncKey  string   `json:"func,omitempty"`
	State    []byte   `json:"state,omitempty"` // any bytes
	Snapshot bool     `json:"snapshot,omitempty"`
	Profile  *Profile `json:"profile,omitempty"`

	Once bool    `json:"once,omitempty"`
	By   *string `json:"by,omitempty"` // with once: the client that redeemed the user; nil: none has

	Grant grantWire `json:"grant"`
}

// grantWire is a UserGrant.
type grantWire struct {
	OpenID       string `json:"openid,omitempty"`
	UnionID      string `json:"unionid,omitempty"`
	Scope        string `json:"scope,omitempty"`
	Snapshot     bool   `json:"snapshot,omitempty"`
	AccessToken  string `json:"access_token,omitempty"`
	RefreshToken string `json:"refresh_token,omitempty"`
	ExpiresAt    int64  `json:"expires_at,omitempty"`
}

func newUserWire(u User, g UserGrant, once bool) *userWire {
	w := &userWire{
		AppID: u.AppID, Platform: u.Platform, OpenID: u.OpenID, UnionID: u.UnionID, Scope: u.Scope, FuncKey: u.FuncKey,
		State: []byte(u.State), Snapshot: u.Snapshot, Profile: u.Profile, Once: once,
	}
	w.setGrant(g)
	return w
}

func (w *userWire) user() User {
	return User{
		AppID: w.AppID, Platform: w.Platform, OpenID: w.OpenID, UnionID: w.UnionID, Scope: w.Scope, FuncKey: w.FuncKey,
		State: string(w.State), Snapshot: w.Snapshot, Profile: w.Profile,
	}
}

func (w *userWire) setGrant(g UserGrant) {
	w.Grant = grantWire{
		OpenID: g.OpenID, UnionID: g.UnionID, Scope: g.Scope, Snapshot: g.Snapshot,
		AccessToken: g.AccessToken.Reveal(), RefreshToken: g.RefreshToken.Reveal(), ExpiresAt: unix(g.ExpiresAt),
	}
}

func (w *userWire) grant() UserGrant {
	g := w.Grant
	return UserGrant{
		OpenID: g.OpenID, UnionID: g.UnionID, Scope: g.Scope, Snapshot: g.Snapshot,
		AccessToken: secret.New(g.AccessToken), RefreshToken: secret.New(g.RefreshToken), ExpiresAt: fromUnix(g.ExpiresAt),
	}
}

// same reports whether both have the same tokens.
func (g UserGrant) same(o UserGrant) bool {
	return g.AccessToken.Same(o.AccessToken) && g.RefreshToken.Same(o.RefreshToken)
}

// userName is where a user is shared, and onceName what whoever redeems one kept with once must take.
func userName(id string) string { return sharedName("user", id) }
func onceName(id string) string { return sharedName("once", id) }

// shareUser tells the other nodes about a user, and reports whether they know. If it is not certain they may.
func (m *Manager) shareUser(ctx context.Context, id string, u User, g UserGrant, ttl time.Duration, once bool) bool {
	if once && m.sharedPut(ctx, onceName(id), struct{}{}, ttl) != nil {
		return false
	}
	return m.sharedPut(ctx, userName(id), newUserWire(u, g, once), ttl) == nil
}

// trackingIDShape is that of what Keep returns. Nothing else costs a question to the store.
var trackingIDShape = regexp.MustCompile(`^[A-Za-z0-9_-]{22}$`)

// sharedUser is the user of a tracking id, if may allows it.
func (m *Manager) sharedUser(ctx context.Context, id string, may func(User) bool) (*userWire, error) {
	if !trackingIDShape.MatchString(id) {
		return nil, ErrUserUnknown
	}
	w := new(userWire)
	switch err := m.sharedPeek(ctx, userName(id), w); {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, errForeign):
		return nil, ErrUserUnknown
	case err != nil:
		return nil, m.userAway(err)
	case may != nil && !may(w.user()):
		return nil, ErrUserForbidden
	}
	return w, nil
}

// redeemShared redeems a user kept with once for a client.
func (m *Manager) redeemShared(ctx context.Context, id, by string, w *userWire) error {
	switch err := m.sharedTake(ctx, onceName(id)); {
	case errors.Is(err, fs.ErrNotExist):
		return ErrUserUnknown
	case err != nil:
		return m.userAway(err)
	}
	w.By = &by
	_ = m.sharedReplace(ctx, userName(id), w) // without it nobody may ask for the profile
	return nil
}

// userAway is the error of a store that does not answer. One that shares nothing has nobody.
func (m *Manager) userAway(err error) error {
	if env, failed := m.current(); failed == nil {
		if _, shares := env.Store.(Ephemeral); shares {
			return errors.Join(ErrUserAway, err)
		}
	}
	return ErrUserUnknown
}

// endSharedFlow is the key of the code that a flow came back with first, on whichever node: key, if none did.
func (m *Manager) endSharedFlow(ctx context.Context, flow string, key [sha256.Size]byte) [sha256.Size]byte {
	type wire struct {
		Code []byte `json:"code"`
	}
	var held wire
	first, err := m.sharedClaim(ctx, sharedName("flow", flow), wire{key[:]}, FlowLife, &held)
	switch {
	case first || errors.Is(err, errAlone):
		return key
	case err == nil && len(held.Code) == len(key):
		return [sha256.Size]byte(held.Code)
	}
	return [sha256.Size]byte{} // none of ours
}
