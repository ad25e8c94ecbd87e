package caddymodule

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
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

	// browserCookie is the name of a browser's cookie; on https hostCookie goes before it and the base after it.
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

// boundTo is what a state is bound to: the platform, and the browser's cookie. Its name is part of that, so that a state
// that was got over http is good for nothing on https, where a sibling host can plant a cookie of the other name.
func (p place) boundTo(platform, cookie string) []string {
	return []string{statePurpose, p.browserCookie(), platform, cookie}
}

// boundBefore is what states were bound to when the cookie had the one name. None is made any more, so nobody can plant
// the cookie of a fresh one; those that visitors under way still bring are good until they end, half an hour after an
// upgrade.
func boundBefore(platform, cookie string) []string { return []string{statePurpose, platform, cookie} }

// newState makes the state of a start, for the browser with that cookie.
func (a *Authorize) newState(ctx context.Context, cookie string, req *authorizeRequest) (secret.String, error) {
	s := authorizeState{categories: req.options.categories}
	_, _ = rand.Read(s.id[:]) // never fails since Go 1.24
	return a.app.manager().SealState(ctx, s.payload(), time.Now().Add(stateLife), req.at.boundTo(req.platform.AppID, cookie)...)
}

// readState opens the state of a callback, for the browser that brings it.
func (a *Authorize) readState(r *http.Request, req *authorizeRequest, text secret.String) (authorizeState, *oauthFailure) {
	failure := failState
	if text.IsZero() {
		return authorizeState{}, failure
	}
	var candidates [][]string
	for _, cookie := range browserValues(r, req.at.browserCookie()) {
		candidates = append(candidates, req.at.boundTo(req.platform.AppID, cookie))
	}
	for _, cookie := range browserValues(r, browserCookie) {
		candidates = append(candidates, boundBefore(req.platform.AppID, cookie))
	}
	for _, bound := range candidates {
		payload, err := a.app.manager().OpenState(r.Context(), text, bound...)
		switch {
		case err == nil:
			if s, ok := parseState(payload); ok {
				return s, nil
			}
		case errors.Is(err, tokens.ErrOpaqueExpired):
			failure = failStateExpired
		case !errors.Is(err, tokens.ErrOpaqueUnknown):
			return authorizeState{}, startFailure(err)
		}
	}
	return authorizeState{}, failure
}

// cookieShape is 128 bits as base64.
var cookieShape = regexp.MustCompile(`^[A-Za-z0-9_-]{22}$`)

// browserValues are the values of that name that a browser brings: one where it started here, and whatever was planted.
func browserValues(r *http.Request, name string) []string {
	return cookieValues(r, name, cookieShape.MatchString)
}

// browserCookie is the name of a browser's cookie. On https the base, which is its path over http, is in the name: routes
// on one host have cookies of their own.
func (p place) browserCookie() string {
	if !p.secure() {
		return browserCookie
	}
	base := sha256.Sum256([]byte(p.base))
	return hostCookie + browserCookie + "-" + hex.EncodeToString(base[:8])
}

func (p place) cookiePath() string {
	if p.secure() || p.base == "" {
		return "/"
	}
	return p.base
}

// markBrowser gives the browser its cookie, or prolongs the one it has: authorizations may be under way in several tabs.
func markBrowser(w http.ResponseWriter, r *http.Request, at place) (cookie string) {
	if values := browserValues(r, at.browserCookie()); len(values) > 0 {
		cookie = values[0] // over http a browser sends the one with the longest path first
	} else {
		var b [cookieBytes]byte
		_, _ = rand.Read(b[:]) // never fails since Go 1.24
		cookie = base64.RawURLEncoding.EncodeToString(b[:])
	}
	http.SetCookie(w, &http.Cookie{
		Name: at.browserCookie(), Value: cookie, Path: at.cookiePath(), MaxAge: int(stateLife / time.Second),
		Secure: at.secure(), HttpOnly: true,
		SameSite: http.SameSiteLaxMode, // WeChat's page leads back here from another site
	})
	return cookie
}
