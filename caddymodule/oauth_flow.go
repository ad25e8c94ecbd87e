package caddymodule

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// A flow is a login that began here: at {base}/authorize. Its state on the way to WeChat and back is flowMark and the
// flow's id, letters and digits alone, which WeChat's pages for platforms and for plain accounts both take. What the
// link gave as its state, whatever it is, stays in a signed cookie of that browser, and so comes back exactly. Each flow
// has a cookie of its own, so that logins in two tabs do not disturb each other; nothing is kept on the server.
const (
	flowMark = "wxTkFlow"
	// flowCookie and a flow's id are the name of its cookie; secureCookie goes before it on https, where browsers then
	// take it from https alone.
	flowCookie   = "wxTkFlow-"
	secureCookie = "__Secure-"
	flowPurpose  = "wechat_oauth flow"
	// maxFlows is how many flows one browser has at a time: a cookie has up to 300 bytes, and all of a request's header
	// 16 KiB. One more flow ends the oldest.
	maxFlows = 8
	// maxFlowCopies of one cookie are looked at: a browser sends those of other paths and of the parent domain too.
	maxFlowCopies = 4
	flowExpiry    = 8 // bytes, Unix seconds
)

var (
	flowIDShape     = regexp.MustCompile(`^[A-Z2-7]{26}$`) // of rand.Text: 130 bits
	cookiePathShape = regexp.MustCompile(`^/[A-Za-z0-9/._~-]*$`)
)

// flow is a login that began here.
type flow struct {
	id      string
	path    string // of the callback
	appid   string
	state   string // of the link
	expires time.Time
}

// message is what a flow's cookie signs.
func (f *flow) message() []byte {
	b := binary.BigEndian.AppendUint64(nil, uint64(f.expires.Unix()))
	for _, s := range [...]string{f.id, f.path, f.appid, f.state} {
		b = binary.BigEndian.AppendUint64(b, uint64(len(s)))
		b = append(b, s...)
	}
	return b
}

// seal makes the value of a flow's cookie: its end, the signature and the state. What else is signed, the callback says.
func (f *flow) seal(ctx context.Context, m *tokens.Manager) (string, error) {
	signature, err := m.Sign(ctx, flowPurpose, f.message())
	if err != nil {
		return "", err
	}
	b := binary.BigEndian.AppendUint64(nil, uint64(f.expires.Unix()))
	b = append(b, byte(len(signature)))
	b = append(b, signature...)
	return base64.RawURLEncoding.EncodeToString(append(b, f.state...)), nil
}

// parseFlow reads the value of a cookie; nothing in it is proven yet.
func parseFlow(value string) (expires time.Time, signature []byte, state string, ok bool) {
	b, err := base64.RawURLEncoding.Strict().DecodeString(value)
	if err != nil || strings.ContainsAny(value, "\r\n") || len(b) <= flowExpiry || len(b)-flowExpiry-1 < int(b[flowExpiry]) {
		return time.Time{}, nil, "", false
	}
	expires = time.Unix(int64(binary.BigEndian.Uint64(b)), 0)
	rest := b[flowExpiry+1:]
	signature, rest = rest[:b[flowExpiry]], rest[b[flowExpiry]:]
	return expires, signature, string(rest), len(rest) <= maxState
}

// errNoFlow: the browser has not begun this login, or too long ago.
var errNoFlow = errors.New("no cookie of this flow")

// open checks the values that a browser has for a flow's cookie, and fills in the state of the one that is right.
func (f *flow) open(ctx context.Context, m *tokens.Manager, values []string) error {
	for _, value := range values[:min(len(values), maxFlowCopies)] {
		expires, signature, state, ok := parseFlow(value)
		if !ok || !time.Now().Before(expires) {
			continue
		}
		candidate := *f
		candidate.expires, candidate.state = expires, state
		switch err := m.Verify(ctx, flowPurpose, candidate.message(), signature); {
		case err == nil:
			*f = candidate
			return nil
		case !errors.Is(err, tokens.ErrNotSigned):
			return err
		}
	}
	return errNoFlow
}

// beginFlow begins a login here: the state for WeChat, and the cookies for the browser.
func (o *OAuth) beginFlow(r *http.Request, to callbackAddress, appid, state string) (wireState string, cookies []*http.Cookie, err error) {
	f := &flow{id: rand.Text(), path: to.path, appid: appid, state: state, expires: time.Now().Add(tokens.FlowLife)}
	value, err := f.seal(r.Context(), o.app.manager())
	if err != nil {
		return "", nil, err
	}
	prefix := to.cookiePrefix()
	cookies = endFlows(r.Cookies(), prefix)
	cookies = append(cookies, &http.Cookie{Name: prefix + f.id, Value: value, MaxAge: int(tokens.FlowLife / time.Second)})
	for _, c := range cookies {
		c.Path, c.Secure, c.HttpOnly, c.SameSite = to.cookiePath(), to.secure(), true, http.SameSiteLaxMode
	}
	return flowMark + f.id, cookies, nil
}

// endFlows makes room for one flow more among a browser's cookies: what is over goes, and the oldest beyond maxFlows.
func endFlows(sent []*http.Cookie, prefix string) (ended []*http.Cookie) {
	type running struct {
		name    string
		expires time.Time
	}
	var live []running
	for _, c := range sent {
		if id, ok := strings.CutPrefix(c.Name, prefix); !ok || !flowIDShape.MatchString(id) {
			continue
		}
		expires, _, _, ok := parseFlow(c.Value)
		if !ok || !time.Now().Before(expires) {
			expires = time.Time{}
		}
		live = append(live, running{c.Name, expires})
	}
	slices.Reverse(live) // browsers send the oldest first
	slices.SortStableFunc(live, func(a, b running) int { return cmp.Compare(b.expires.Unix(), a.expires.Unix()) })
	for i, one := range live {
		if i >= maxFlows-1 || one.expires.IsZero() {
			ended = append(ended, &http.Cookie{Name: one.name, MaxAge: -1})
		}
	}
	return ended
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
	origin, ok := o.originOf(r)
	if !ok {
		return nil, failQuery
	}
	to := callbackAddress{origin: origin, path: originalPath(r)}
	f := &flow{id: id, path: to.path, appid: req.appid}
	var values []string
	for _, c := range r.CookiesNamed(to.cookiePrefix() + id) {
		values = append(values, c.Value)
	}
	switch err := f.open(r.Context(), o.app.manager(), values); {
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
		return secureCookie + flowCookie
	}
	return flowCookie
}

// cookiePath is the base. One that would need an escape, which not all programs compare alike, becomes all of the site.
func (c callbackAddress) cookiePath() string {
	if cookiePathShape.MatchString(c.base) {
		return c.base
	}
	return "/"
}

func (c callbackAddress) url() string { return c.origin + escapedPath(c.path) }

func escapedPath(path string) string { return (&url.URL{Path: path}).EscapedPath() }
