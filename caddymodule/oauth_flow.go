package caddymodule

import (
	"context"
	"crypto/rand"
	"errors"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// A flow is a login that began here: at {base}/authorize. Its state on the way to WeChat and back is flowMark and the
// flow's id, letters and digits alone, which WeChat's pages for platforms and for plain accounts both take. What the
// link gave as its state, whatever it is, stays in a sealed cookie of that browser, and so comes back exactly. Each flow
// has a cookie of its own, so that logins in two tabs do not disturb each other; nothing is kept on the server.
const (
	flowMark = "wxTkFlow"
	// flowCookie and a flow's id are the name of its cookie, after hostCookie on https.
	flowCookie  = "wxTkFlow-"
	flowPurpose = "wechat_oauth flow"
	// maxFlows is how many flows one browser has at a time: a cookie has up to 300 bytes, and all of a request's header
	// 16 KiB. One more flow ends the oldest.
	maxFlows = 8
)

// secureCookie went before a flow's cookie on https before hostCookie did.
const secureCookie = "__Secure-"

var (
	flowIDShape     = regexp.MustCompile(`^[A-Z2-7]{26}$`) // of rand.Text: 130 bits
	cookiePathShape = regexp.MustCompile(`^/[A-Za-z0-9/._~-]*$`)
)

// flow is a login that began here.
type flow struct {
	id     string
	cookie string // its name
	path   string // of the callback
	appid  string
	state  string // of the link
}

// bound is what a flow's cookie is bound to: what it does not hold itself, the callback says. The name is part of it, so
// that what was got over http, or is planted under a name that a sibling host can set, is good for nothing on https.
func (f *flow) bound() []string { return []string{flowPurpose, f.cookie, f.path, f.appid} }

// boundBefore is what cookies were bound to when https had secureCookie. They are made no more, so nobody can plant one
// that is fresh; those that visitors under way still have are good until they end, half an hour after an upgrade.
func (f *flow) boundBefore() []string { return []string{flowPurpose, f.id, f.path, f.appid} }

// seal makes the value of a flow's cookie.
func (f *flow) seal(ctx context.Context, m *tokens.Manager, until time.Time) (secret.String, error) {
	return m.SealState(ctx, []byte(f.state), until, f.bound()...)
}

// errNoFlow: the browser has not begun this login, or too long ago.
var errNoFlow = errors.New("no cookie of this flow")

// open checks the values that a browser has for a flow's cookie, and fills in the state of the one that is right.
func (f *flow) open(ctx context.Context, m *tokens.Manager, values, bound []string) error {
	for _, value := range values {
		state, err := m.OpenState(ctx, secret.New(value), bound...)
		switch {
		case err == nil:
			f.state = string(state)
			return nil
		case !errors.Is(err, tokens.ErrOpaqueUnknown) && !errors.Is(err, tokens.ErrOpaqueExpired):
			return err
		}
	}
	return errNoFlow
}

// beginFlow begins a login here: the state for WeChat, and the cookies for the browser.
func (o *OAuth) beginFlow(r *http.Request, to callbackAddress, appid, state string) (wireState string, cookies []*http.Cookie, err error) {
	prefix, id := to.cookiePrefix(), rand.Text()
	f := &flow{id: id, cookie: prefix + id, path: to.path, appid: appid, state: state}
	value, err := f.seal(r.Context(), o.app.manager(), time.Now().Add(tokens.FlowLife))
	if err != nil {
		return "", nil, err
	}
	cookies = endFlows(r.Cookies(), prefix)
	cookies = append(cookies, &http.Cookie{Name: f.cookie, Value: value.Reveal(), MaxAge: int(tokens.FlowLife / time.Second)})
	for _, c := range cookies {
		c.Path, c.Secure, c.HttpOnly, c.SameSite = to.cookiePath(), to.secure(), true, http.SameSiteLaxMode
	}
	return flowMark + f.id, cookies, nil
}

// endFlows makes room for one flow more among a browser's cookies: the oldest beyond maxFlows end. Browsers send the
// oldest first, and none that is over.
func endFlows(sent []*http.Cookie, prefix string) (ended []*http.Cookie) {
	for _, c := range sent {
		if id, ok := strings.CutPrefix(c.Name, prefix); ok && flowIDShape.MatchString(id) {
			ended = append(ended, &http.Cookie{Name: c.Name, MaxAge: -1})
		}
	}
	return ended[:max(0, len(ended)-(maxFlows-1))]
}

// endOfFlow finds out which flow a callback ends: one that the browser can show to have begun here, or none, if the
// state is a menu's own. Nothing else passes.
func (o *OAuth) endOfFlow(r *http.Request, req *oauthRequest, query url.Values) (*flow, *oauthFailure) {
	state := query.Get("state")
	id, ours := strings.CutPrefix(state, flowMark)
	switch {
	case !ours && o.RequireStart:
		return nil, failNotStarted
	case !ours:
		return &flow{state: state}, nil
	case !flowIDShape.MatchString(id):
		return nil, failFlowState
	}
	origin, ok := originOf(o.origin, r)
	if !ok {
		return nil, failQuery
	}
	to := callbackAddress{origin: origin, path: originalPath(r)}
	f := &flow{id: id, cookie: to.cookiePrefix() + id, path: to.path, appid: req.appid}
	err := f.open(r.Context(), o.app.manager(), cookieValues(r, f.cookie, anyValue), f.bound())
	if errors.Is(err, errNoFlow) {
		err = f.open(r.Context(), o.app.manager(), cookieValues(r, to.cookiePrefixBefore()+id, anyValue), f.boundBefore())
	}
	switch {
	case errors.Is(err, errNoFlow):
		return nil, failForeignFlow
	case err != nil:
		return nil, flowFailure(err)
	}
	return f, nil
}

// callbackAddress is where WeChat sends a visitor back to.
type callbackAddress struct {
	origin string
	base   string // of the path; known when a login begins
	path   string
}

func (c callbackAddress) secure() bool { return strings.HasPrefix(c.origin, "https://") }

func (c callbackAddress) cookiePrefix() string {
	if c.secure() {
		return hostCookie + flowCookie
	}
	return flowCookie
}

func (c callbackAddress) cookiePrefixBefore() string {
	if c.secure() {
		return secureCookie + flowCookie
	}
	return flowCookie
}

// cookiePath is all of the site, as hostCookie needs it; over http the base. One that would need an escape, which not all
// programs compare alike, becomes all of the site too.
func (c callbackAddress) cookiePath() string {
	if !c.secure() && cookiePathShape.MatchString(c.base) {
		return c.base
	}
	return "/"
}

func (c callbackAddress) url() string { return c.origin + escapedPath(c.path) }

func escapedPath(path string) string { return (&url.URL{Path: path}).EscapedPath() }
