package caddymodule

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"net/http"
	"regexp"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

const (
	stateLife      = 30 * time.Minute // as long as a pre-authorization code
	stateParameter = "s"
	stateIDBytes   = 12
	cookieBytes    = 16
	// maxCategories bounds the permission sets that a link may ask for, so that a state stays short.
	maxCategories = 100

	browserCookie = "wechat_authorize"
	statePurpose  = "wechat_authorize start"
)

// stateID tells one start from all others.
type stateID [stateIDBytes]byte

// authorizeState is what a callback must bring back of its start. The text of one is bound to the platform and to the
// browser's cookie.
type authorizeState struct {
	id         stateID
	categories []int // permission sets that were asked for; none: those that the platform published
}

// payload writes a state as its id, and two bytes for each category.
func (s *authorizeState) payload() []byte {
	b := s.id[:]
	for _, id := range s.categories {
		b = binary.BigEndian.AppendUint16(b, uint16(id)) //nolint:gosec // categoryShape has four digits
	}
	return b
}

func parseState(b []byte) (s authorizeState, ok bool) {
	if len(b) < stateIDBytes || (len(b)-stateIDBytes)%2 != 0 {
		return s, false
	}
	copy(s.id[:], b)
	for b = b[stateIDBytes:]; len(b) > 0; b = b[2:] {
		s.categories = append(s.categories, int(binary.BigEndian.Uint16(b)))
	}
	return s, true
}

// newState makes the state of a start, for the browser with that cookie.
func (a *Authorize) newState(ctx context.Context, cookie string, req *authorizeRequest) (secret.String, error) {
	s := authorizeState{categories: req.options.categories}
	_, _ = rand.Read(s.id[:]) // never fails since Go 1.24
	return a.app.manager().SealState(ctx, s.payload(), time.Now().Add(stateLife), statePurpose, req.platform.AppID, cookie)
}

// readState opens the state of a callback, for the browser that brings it.
func (a *Authorize) readState(r *http.Request, platform string, text secret.String) (authorizeState, *oauthFailure) {
	cookie := readBrowser(r)
	if text.IsZero() || cookie == "" {
		return authorizeState{}, failState
	}
	payload, err := a.app.manager().OpenState(r.Context(), text, statePurpose, platform, cookie)
	switch {
	case errors.Is(err, tokens.ErrOpaqueExpired):
		return authorizeState{}, failStateExpired
	case errors.Is(err, tokens.ErrOpaqueUnknown):
		return authorizeState{}, failState
	case err != nil:
		return authorizeState{}, startFailure(err)
	}
	s, ok := parseState(payload)
	if !ok {
		return authorizeState{}, failState
	}
	return s, nil
}

// cookieShape is 128 bits as base64.
var cookieShape = regexp.MustCompile(`^[A-Za-z0-9_-]{22}$`)

// readBrowser returns the cookie of a browser that started here, or nothing. Of several a browser sends the one with the
// longest path first.
func readBrowser(r *http.Request) string {
	if c, err := r.Cookie(browserCookie); err == nil && cookieShape.MatchString(c.Value) {
		return c.Value
	}
	return ""
}

// markBrowser gives the browser its cookie, or prolongs the one it has: authorizations may be under way in several tabs.
func markBrowser(w http.ResponseWriter, r *http.Request, at place) (cookie string) {
	if cookie = readBrowser(r); cookie == "" {
		var b [cookieBytes]byte
		_, _ = rand.Read(b[:]) // never fails since Go 1.24
		cookie = base64.RawURLEncoding.EncodeToString(b[:])
	}
	path := at.base
	if path == "" {
		path = "/"
	}
	http.SetCookie(w, &http.Cookie{
		Name: browserCookie, Value: cookie, Path: path, MaxAge: int(stateLife / time.Second),
		Secure: at.secure(), HttpOnly: true,
		SameSite: http.SameSiteLaxMode, // WeChat's page leads back here from another site
	})
	return cookie
}
