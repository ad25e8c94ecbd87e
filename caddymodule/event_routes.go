package caddymodule

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// Limits of walks over a configuration's routes.
const (
	maxRouteDepth   = 16    // subroutes in subroutes
	maxInvocations  = 10000 // of a server's named routes, each from elsewhere: what invokes itself could go on for ever
	maxMessagePaths = 16    // to try for one message
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
	paths := messagePaths{app: e.app, server: server, request: r, account: account, invoked: make(map[invocation]bool), inside: make(map[string][]*Message)}
	paths.collect(server.Routes, nil)
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
			return nil, whichAccount(unknown)
		}
	}
	switch {
	case found != nil:
		return found, nil
	case account == "" && paths.any:
		return nil, whichAccount(unknown)
	}
	return nil, errNoMessageRoute
}

// whichAccount says why a message's account is not known.
func whichAccount(why error) error {
	if errors.Is(why, tokens.ErrNotAuthorized) {
		return errWhichAccount
	}
	return fmt.Errorf("%w: %w", errAccountUnread, why)
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
	invoked map[invocation]bool
	inside  map[string][]*Message // named routes
}

// invocation is what makes one walk through a named route find other paths than another. All others differ in the patterns around it alone.
type invocation struct {
	name string
	bare bool // there is no pattern around it
}

// collect looks through routes; patterns are those of the routes around them, the innermost first.
func (c *messagePaths) collect(routes caddyhttp.RouteList, patterns []string) {
	for i := range routes {
		own, possible := c.patterns(routes[i].MatcherSets)
		if !possible {
			continue
		}
		around := append(own, patterns...)
		for _, h := range routes[i].Handlers {
			if len(c.list) == maxMessagePaths {
				return
			}
			switch h := h.(type) {
			case *Message:
				c.add(h, around)
			case *caddyhttp.Subroute:
				c.collect(h.Routes, around)
			case *caddyhttp.Invoke:
				c.invoke(h.Name, around)
			}
		}
	}
}

// invoke looks through a named route the first time only: when it is invoked again, what is in it may have the patterns around it in addition.
// That keeps the walk short where named routes invoke themselves, or each other many times.
func (c *messagePaths) invoke(name string, around []string) {
	route, as := c.server.NamedRoutes[name], invocation{name, len(around) == 0}
	switch {
	case route == nil:
	case !c.invoked[as]:
		c.invoked[as] = true
		c.collect(caddyhttp.RouteList{*route}, around)
	case !as.bare:
		for _, m := range c.messages(name) {
			c.add(m, around)
		}
	}
}

// messages are those that a named route may lead to.
func (c *messagePaths) messages(name string) []*Message {
	if list, known := c.inside[name]; known {
		return list
	}
	var list []*Message
	seen := make(map[string]bool)
	var look func(routes caddyhttp.RouteList)
	look = func(routes caddyhttp.RouteList) {
		for i := range routes {
			if _, possible := c.patterns(routes[i].MatcherSets); !possible {
				continue
			}
			for _, h := range routes[i].Handlers {
				switch h := h.(type) {
				case *Message:
					list = append(list, h)
				case *caddyhttp.Subroute:
					look(h.Routes)
				case *caddyhttp.Invoke:
					if route := c.server.NamedRoutes[h.Name]; route != nil && !seen[h.Name] {
						seen[h.Name] = true
						look(caddyhttp.RouteList{*route})
					}
				}
			}
		}
	}
	look(caddyhttp.RouteList{*c.server.NamedRoutes[name]})
	c.inside[name] = list
	return list
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

// reached returns the wechat_message that a push on the path gets to first, or nil if there is none or another handler
// would answer it.
func (d *detour) reached(r *http.Request) *Message {
	r = d.request(r, &ignoredAnswer{header: make(http.Header)}, r.Context())
	m, _ := walk{d.server, r, make(map[string]bool), make(map[string]passage)}.through(d.server.Routes)
	return m
}

// walk goes through routes as a request would, without running their handlers.
type walk struct {
	server *caddyhttp.Server
	r      *http.Request
	groups map[string]bool    // of which a route has matched
	named  map[string]passage // routes that were invoked
}

// passage is how a named route was last walked through. A request that got past it once gets past it again. One that comes to it again while it is
// inside is in a loop, unless a group has matched since and now keeps it out of a route.
type passage struct {
	past   bool
	groups int // that had matched
}

// through returns the wechat_message that the request gets to, and whether it ends here.
func (w walk) through(routes caddyhttp.RouteList) (found *Message, ends bool) {
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
			case *caddyhttp.Subroute:
				found, ends = w.through(h.Routes)
			case *caddyhttp.Invoke:
				found, ends = w.invoke(h.Name)
			}
			if ends {
				return found, true
			}
		}
		if route.Terminal {
			return nil, true
		}
	}
	return nil, false
}

// invoke is through a named route.
func (w walk) invoke(name string) (found *Message, ends bool) {
	route := w.server.NamedRoutes[name]
	if route == nil {
		return nil, false
	}
	last, again := w.named[name]
	switch {
	case last.past:
		return nil, false
	case again && last.groups == len(w.groups):
		return nil, true
	}
	w.named[name] = passage{groups: len(w.groups)}
	if found, ends = w.through(caddyhttp.RouteList{*route}); ends {
		return found, true
	}
	w.named[name] = passage{past: true}
	return nil, false
}
