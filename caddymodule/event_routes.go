package caddymodule

import (
	"context"
	"net/http"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// Limits of the search for a site's message route.
const (
	maxRouteDepth   = 16 // subroutes in subroutes
	maxMessagePaths = 16 // to try for one message
)

// messageRoute finds the way to the site's wechat_message. The account is the one that is known to have the message's
// ToUserName. While none is, it is the one that is configured, in the handler or in its path, if there is one only and
// it is not a plain account, whose messages come with its own credentials.
func (e *Event) messageRoute(r *http.Request, p *push) (*detour, error) {
	server, ok := r.Context().Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	if !ok || len(p.fields.MsgType) == 0 {
		return nil, errNoMessageRoute
	}
	ctx, cancel := context.WithTimeout(r.Context(), userNameTimeout)
	defer cancel()
	_, account, unknown := e.app.manager().ByUserName(ctx, string(p.fields.ToUserName))
	if unknown != nil {
		account = ""
	}
	paths := messagePaths{app: e.app, server: server, request: r, account: account}
	paths.collect(server.Routes, nil, 0)
	var found *detour
	for _, path := range paths.list {
		d := &detour{server: server, path: path}
		m := d.reached(r)
		if m == nil {
			continue
		}
		var credentials []candidate
		d.appid, credentials = m.candidates(path)
		switch {
		case !slices.ContainsFunc(credentials, func(c candidate) bool { return c.platform == p.platform }): // the path names another
		case account != "":
			if d.appid == account {
				return d, nil
			}
			if d.appid == "" && found == nil { // the site has one URL for all, and does not name the account
				found = d
			}
		case d.appid == "", e.app.account(d.appid) != nil, e.app.isForAnother(p, d.appid):
		case found == nil:
			found = d
		case found.appid != d.appid:
			return nil, errWhichAccount
		}
	}
	switch {
	case found != nil:
		return found, nil
	case account == "" && paths.any:
		return nil, errWhichAccount
	}
	return nil, errNoMessageRoute
}

// messagePaths collects the paths on which a message may come to a site, by the path matchers before wechat_message.
// Whether it then gets there is for the routes to say.
type messagePaths struct {
	app     *App
	server  *caddyhttp.Server
	request *http.Request
	account string // empty: not known
	list    []string
	any     bool // there is a wechat_message
}

// collect looks through routes; patterns are those of the routes around them, the innermost first.
func (c *messagePaths) collect(routes caddyhttp.RouteList, patterns []string, depth int) {
	if depth > maxRouteDepth {
		return
	}
	for i := range routes {
		own, possible := c.patterns(routes[i].MatcherSets)
		if !possible {
			continue
		}
		around := append(own, patterns...)
		for _, h := range routes[i].Handlers {
			if m, ok := h.(*Message); ok {
				c.add(m, around)
			}
			c.collect(routesOf(c.server, h), around, depth+1)
		}
	}
}

// patterns are the path patterns of a route, which is impossible if it is another host's.
func (c *messagePaths) patterns(sets caddyhttp.MatcherSets) (patterns []string, possible bool) {
	for _, set := range sets {
		var own []string
		hosts := true
		for _, m := range set {
			switch m := m.(type) {
			case *caddyhttp.MatchHost:
				hosts = hosts && m.Match(c.request)
			case *caddyhttp.MatchPath:
				own = append(own, *m...)
			}
		}
		if hosts {
			patterns, possible = append(patterns, own...), true
		}
	}
	return patterns, possible || len(sets) == 0
}

func (c *messagePaths) add(m *Message, patterns []string) {
	c.any = true
	if len(patterns) == 0 {
		patterns = []string{"/*"}
	}
	for _, pattern := range patterns {
		appid := c.account
		if appid == "" {
			appid, _ = m.candidates(pattern)
		}
		path, ok := pathOf(pattern, appid)
		if ok && len(c.list) < maxMessagePaths && !slices.Contains(c.list, path) {
			c.list = append(c.list, path)
		}
	}
}

// pathOf is a path that a pattern of a path matcher matches, with the appid in place of its asterisk. Patterns that cannot
// be read so simply are left out.
func pathOf(pattern, appid string) (string, bool) {
	before, after, wild := strings.Cut(pattern, "*")
	switch {
	case strings.ContainsAny(pattern, "{%?[\\") || strings.Contains(pattern, "//") || strings.Contains(after, "*"):
		return "", false
	case !wild:
		return pattern, strings.HasPrefix(pattern, "/")
	case appid == "":
		return "", false
	}
	if !strings.HasSuffix(before, "/") {
		before += "/"
	}
	return before + appid + after, strings.HasPrefix(before, "/")
}

// routesOf are the routes inside a handler.
func routesOf(server *caddyhttp.Server, h caddyhttp.MiddlewareHandler) caddyhttp.RouteList {
	switch h := h.(type) {
	case *caddyhttp.Subroute:
		return h.Routes
	case *caddyhttp.Invoke:
		if route := server.NamedRoutes[h.Name]; route != nil {
			return caddyhttp.RouteList{*route}
		}
	}
	return nil
}

// reached returns the wechat_message that a push on the path gets to first, or nil if there is none or another handler
// would answer it.
func (d *detour) reached(r *http.Request) *Message {
	r = d.request(r, &ignoredAnswer{header: make(http.Header)}, r.Context())
	m, _ := walk{d.server, r, make(map[string]bool)}.through(d.server.Routes, 0)
	return m
}

// walk goes through routes as a request would, without running their handlers.
type walk struct {
	server *caddyhttp.Server
	r      *http.Request
	groups map[string]bool // of which a route has matched
}

// through returns the wechat_message that the request gets to, and whether it ends here.
func (w walk) through(routes caddyhttp.RouteList, depth int) (found *Message, ends bool) {
	if depth > maxRouteDepth {
		return nil, true
	}
	for i := range routes {
		route := &routes[i]
		if route.Group != "" && w.groups[route.Group] {
			continue
		}
		matches, err := route.MatcherSets.AnyMatchWithError(w.r)
		if err != nil {
			return nil, true
		}
		if !matches {
			continue
		}
		w.groups[route.Group] = true
		for _, h := range route.Handlers {
			switch h := h.(type) {
			case *Message:
				return h, true
			case *Event, *reverseproxy.Handler:
				return nil, true
			}
			if found, ends = w.through(routesOf(w.server, h), depth+1); ends {
				return found, true
			}
		}
		if route.Terminal {
			return nil, true
		}
	}
	return nil, false
}
