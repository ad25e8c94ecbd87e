package wxsim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	authorizePath  = "/connect/oauth2/authorize"
	scopeBase      = "snsapi_base"
	scopeUserInfo  = "snsapi_userinfo"
	scopePrivate   = "snsapi_privateinfo"
	wechatFragment = "wechat_redirect"
	webServiceSet  = 4 // permission set of web authorization
	maxState       = 128
)

// PageError is what WeChat's own page shows instead of redirecting; the site never learns of it.
type PageError struct {
	Code int // WeChat's number, such as 10003; 0 for rules that have none
	Text string
}

func (e *PageError) Error() string { return fmt.Sprintf("wechat page %d: %s", e.Code, e.Text) }

// Visit opens a web-authorization link as the WeChat client does, with u as the person who
// opens it (the zero User: the account's standing visitor), and returns the address that WeChat
// redirects to. The link is the Location that the gateway sent, fragment included: everything
// about it is checked as strictly as documented. A link that WeChat would not follow is a
// *PageError.
func (s *Server) Visit(link string, u User) (callback string, err error) {
	address, fragment, _ := strings.Cut(link, "#")
	if fragment != wechatFragment {
		return "", &PageError{0, "the link does not end in #" + wechatFragment}
	}
	parsed, err := url.Parse(address)
	if err != nil {
		return "", &PageError{0, "the link cannot be parsed"}
	}
	origin := parsed.Scheme + "://" + parsed.Host
	if origin != "https://open.weixin.qq.com" && origin != s.URL() && origin != s.TLSURL() || parsed.Path != authorizePath {
		return "", &PageError{0, "not a link to https://open.weixin.qq.com" + authorizePath}
	}
	callback, pageErr := s.authorize(parsed.RawQuery, u, false)
	if pageErr != nil {
		return "", pageErr
	}
	return callback, nil
}

// RefuseNext makes the next user of a web-authorization link refuse; WeChat then redirects
// with state alone.
func (s *Server) RefuseNext() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refuseNext = true
}

// authorizePage is Visit for a browser; browsers keep the fragment to themselves.
func (c *call) authorizePage() answer {
	if c.r.Method != http.MethodGet {
		return answer{status: http.StatusMethodNotAllowed, contentType: "text/plain"}
	}
	s, query := c.s, c.r.URL.RawQuery
	if s.cfg.Ask {
		return c.ask(func() *PageError {
			s.mu.Lock()
			defer s.mu.Unlock()
			_, err := s.checkedLink(query)
			return err
		}, choice{"同意", func() (string, *PageError) { return s.authorize(query, User{}, false) }},
			choice{"拒绝", func() (string, *PageError) { return s.authorize(query, User{}, true) }})
	}
	return c.sendOn(s.authorize(query, User{}, false))
}

// linkParameters are the parameters of a link in the only order that is documented.
var linkParameters = []string{"appid", "redirect_uri", "response_type", "scope", "state", "component_appid", "forcePopup", "forceSnapShot"}

// connectRedirect is a parameter that no document has and WeChat takes: WxJava and the socialite libraries send it with each login, in
// different places.
const connectRedirect = "connect_redirect"

// readLink checks order and case of a link's parameters and returns their values.
func readLink(rawQuery string) (map[string]string, *PageError) {
	values, at := map[string]string{}, 0
	for part := range strings.SplitSeq(rawQuery, "&") {
		key, value, _ := strings.Cut(part, "=")
		if key == connectRedirect {
			if _, again := values[key]; again || value != "1" || at == 0 {
				return nil, &PageError{0, key + " is not 1, is there twice, or before the appid"}
			}
			values[key] = value
			continue
		}
		i := slices.Index(linkParameters, key)
		if i < 0 {
			return nil, &PageError{0, fmt.Sprintf("unknown parameter %q", key)}
		}
		if i < at {
			return nil, &PageError{0, fmt.Sprintf("parameter %s after %s", key, linkParameters[at-1])}
		}
		at = i + 1
		plain, err := url.QueryUnescape(value)
		if err != nil {
			return nil, &PageError{0, "parameter " + key + " is not percent-encoded"}
		}
		if key == "redirect_uri" && strings.ContainsAny(value, ":/?#+ ") {
			return nil, &PageError{0, "redirect_uri is not percent-encoded"}
		}
		values[key] = plain
	}
	return values, nil
}

// authorize checks a link and returns where to redirect whoever agrees, or refuses.
func (s *Server) authorize(rawQuery string, u User, refused bool) (string, *PageError) {
	s.mu.Lock()
	defer s.mu.Unlock()
	link, err := s.checkedLink(rawQuery)
	if err != nil {
		return "", err
	}
	platformID, inComponent := link["component_appid"]
	if u.OpenID == "" {
		u = s.visitor(link["appid"])
	}
	if u.AppID != link["appid"] {
		return "", &PageError{0, "the user is one of another account"}
	}
	var params []string
	refused = refused || s.refuseNext
	s.refuseNext = false
	if !refused {
		params = append(params, "code="+s.userCode(u, platformID, link["scope"]).value)
	}
	if state, given := link["state"]; given {
		params = append(params, "state="+url.QueryEscape(state))
	}
	if inComponent && !refused {
		params = append(params, "appid="+link["appid"])
	}
	return withParameters(link["redirect_uri"], params), nil
}

// checkedLink reads a link and applies the page's rules. The caller holds mu.
func (s *Server) checkedLink(rawQuery string) (map[string]string, *PageError) {
	link, err := readLink(rawQuery)
	if err != nil {
		return nil, err
	}
	_, inComponent := link["component_appid"]
	if err := s.checkLink(link, inComponent); err != nil {
		return nil, err
	}
	return link, nil
}

// withParameters puts parameters behind the query of a URL and before its fragment.
func withParameters(address string, params []string) string {
	if len(params) == 0 {
		return address
	}
	base, fragment, hasFragment := strings.Cut(address, "#")
	switch {
	case !strings.Contains(base, "?"):
		base += "?"
	case !strings.HasSuffix(base, "?") && !strings.HasSuffix(base, "&"):
		base += "&"
	}
	base += strings.Join(params, "&")
	if hasFragment {
		base += "#" + fragment
	}
	return base
}

// checkLink applies the page's rules. The caller holds mu.
func (s *Server) checkLink(link map[string]string, inComponent bool) *PageError {
	appID := link["appid"]
	acc := s.accounts[appID]
	switch {
	case appID == "":
		return &PageError{10012, "appid is empty"}
	case s.platforms[appID] != nil:
		return &PageError{10016, "appid is a platform's, use the account's"}
	case acc == nil:
		return &PageError{0, "no such appid"}
	case link["redirect_uri"] == "":
		return &PageError{10011, "redirect_uri is empty"}
	case link["response_type"] != "code":
		return &PageError{0, "response_type is not code"}
	case link["scope"] == "":
		return &PageError{10010, "scope is empty"}
	}
	sets := acc.FuncInfo
	if inComponent {
		if s.platforms[link["component_appid"]] == nil {
			return &PageError{0, "no such component_appid"}
		}
		auth := s.authorizations[pair{link["component_appid"], appID}]
		if !auth.live() {
			return &PageError{10015, "the account has not authorized this platform"}
		}
		sets = auth.sets
	} else if !acc.plain {
		return &PageError{0, "component_appid is missing"}
	}
	if acc.MiniProgram {
		return &PageError{10005, "a mini program has no web authorization"}
	}
	for scope := range strings.SplitSeq(link["scope"], ",") {
		known := scope == scopeBase || slices.Contains(sets, webServiceSet) && (scope == scopeUserInfo || scope == scopePrivate)
		if !known {
			return &PageError{10005, "the account lacks scope " + scope}
		}
	}
	if err := checkState(link, inComponent); err != nil {
		return err
	}
	return s.checkRedirect(link["redirect_uri"], appID, inComponent)
}

func checkState(link map[string]string, inComponent bool) *PageError {
	state, given := link["state"]
	switch {
	case given && state == "":
		return &PageError{10013, "state is empty"}
	case len(state) > maxState:
		return &PageError{0, "state is longer than 128 bytes"}
	case !inComponent && strings.ContainsFunc(state, func(r rune) bool {
		return !('0' <= r && r <= '9' || 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z')
	}):
		return &PageError{0, "state has other characters than a-zA-Z0-9"}
	}
	return nil
}

// checkRedirect looks for the host of redirect_uri among the registered domains.
func (s *Server) checkRedirect(redirect, appID string, inComponent bool) *PageError {
	u, err := url.Parse(redirect)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil {
		return &PageError{10003, "redirect_uri is not an http(s) URL: is it encoded once?"}
	}
	for _, host := range s.cfg.OAuthHosts {
		if u.Host == host || inComponent && u.Host == appID+"."+host {
			return nil
		}
	}
	return &PageError{10003, "redirect_uri's host " + u.Host + " is not registered"}
}

// Landing is what a browser got when it followed WeChat's redirect.
type Landing struct {
	Status   int
	Location string // where the gateway sends the browser next; not followed
	Header   http.Header
	Body     []byte
	Err      error
}

// Land follows a callback address as the user's client does, times times at once: some
// clients request it twice, and the gateway must not show the second an error.
func (s *Server) Land(ctx context.Context, callback string, times int) []Landing {
	landings := make([]Landing, times)
	var wg sync.WaitGroup
	for i := range landings {
		wg.Go(func() { landings[i] = s.land(ctx, callback) })
	}
	wg.Wait()
	return landings
}

const (
	browserTimeout = 30 * time.Second
	maxPage        = 1 << 20
)

func (s *Server) land(ctx context.Context, callback string) Landing {
	ctx, cancel := context.WithTimeout(ctx, browserTimeout)
	defer cancel()
	callback, _, _ = strings.Cut(callback, "#") // never sent by a client
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, callback, nil)
	if err != nil {
		return Landing{Err: errors.New("callback is not a URL")}
	}
	req.Header.Set("User-Agent", "Mozilla/5.0 (Linux; Android 14) MicroMessenger/8.0.50")
	resp, err := s.pushing.Do(req)
	if err != nil {
		return Landing{Err: err}
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxPage))
	return Landing{Status: resp.StatusCode, Location: resp.Header.Get("Location"), Header: resp.Header, Body: body, Err: err}
}
