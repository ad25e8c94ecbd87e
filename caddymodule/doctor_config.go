package caddymodule

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// doctorConfig is what of a config the checks look at.
type doctorConfig struct {
	file      string
	adapted   []byte
	app       *App         // as it is written, nothing resolved
	sites     []doctorSite // of HTTP
	entrances []uint       // the ports on which pushes and visitors come in
	own       []uint       // http_port and https_port, which 80 and 443 lead to
	upstreams []string
	loadError error // why Caddy would not start with it
	origins   []*url.URL
	proxy     *url.URL
	clients   []apiClient
	unread    bool     // named routes are invoked in more ways than are looked at
	alone     []string // sites with a wechat_message behind which nothing could answer
	hidden    []hiddenHandler
}

// doctorSite is a host of the config's with what of ours it serves.
type doctorSite struct {
	host     string // lower case; empty: any
	any      bool   // it serves any host, and what stands in host is the address that it listens on
	secure   bool
	port     uint
	bound    []string // the addresses that it listens on; empty ones: all
	handlers []siteHandler
}

// siteHandler is one handler of ours.
type siteHandler struct {
	name     string
	patterns []string // of the path matchers around it, the innermost first
	only     []string // the paths of all that comes to it; nil: cannot be told
	behind   string   // the handler that answers all that would come to it; empty: none
	fields   json.RawMessage
}

// origin is scheme and host, with the port if it is not the scheme's own.
func (s *doctorSite) origin() string {
	scheme, own := "http", uint(80)
	if s.secure {
		scheme, own = "https", 443
	}
	if s.port == own {
		host := s.host
		if strings.Contains(host, ":") {
			host = "[" + host + "]"
		}
		return scheme + "://" + host
	}
	return scheme + "://" + net.JoinHostPort(s.host, strconv.FormatUint(uint64(s.port), 10))
}

// isPublic reports whether WeChat could ask for a host: a name with a dot, and no pattern.
func (s *doctorSite) isPublic() bool {
	if _, err := netip.ParseAddr(s.host); err == nil {
		return false
	}
	return strings.Contains(s.host, ".") && !strings.ContainsAny(s.host, "*{") && !strings.HasSuffix(s.host, ".localhost")
}

// apiClient is a way to call WeChat through the running gateway.
type apiClient struct {
	key    string
	appids []string
}

func (c *apiClient) may(appid string) bool {
	return slices.Contains(c.appids, appid) || slices.Contains(c.appids, "*")
}

// read reads a config as Caddy would, without starting any of it. Address is the admin endpoint's, if it is not the config's.
func (d *doctor) read(config, adapter, address string) error {
	app, adapted, file, err := adaptedApp(config, adapter)
	if err != nil {
		return err
	}
	d.config = doctorConfig{file: file, adapted: adapted, app: app}
	admin, err := adminOf(adapted)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	if d.adminOff = admin.Disabled && address == ""; !d.adminOff {
		d.admin, err = caddycmd.DetermineAdminAPIAddress(address, adapted, "config", "")
	}
	if err != nil {
		return err
	}
	c := &d.config
	if err := c.readHTTP(); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	r := resolver{repl: caddy.NewReplacer()}
	for _, text := range app.API {
		if v, err := r.required("api", text); err == nil {
			if u, err := tokens.ParseOrigin(v); err == nil {
				c.origins = append(c.origins, u)
			}
		}
	}
	if len(app.API) == 0 {
		u, _ := tokens.ParseOrigin(tokens.DefaultOrigin)
		c.origins = []*url.URL{u}
	}
	if v, err := r.required("proxy", app.Proxy); err == nil {
		c.proxy, _ = parseProxy(v)
	}
	for _, client := range app.Clients {
		if keys, err := r.newestFirst("key", client.Keys); len(client.Keys) > 0 && err == nil {
			c.clients = append(c.clients, apiClient{keys[0], client.AppIDs})
		}
	}
	c.loadError = c.provision()
	return nil
}

// provision does what `caddy validate` does, and leaves nothing behind. Its log is not the config's, which a gateway is
// writing.
func (c *doctorConfig) provision() error {
	cfg := new(caddy.Config)
	if err := caddy.StrictUnmarshalJSON(c.adapted, cfg); err != nil {
		return err
	}
	cfg.Logging = &caddy.Logging{Logs: map[string]*caddy.CustomLog{caddy.DefaultLoggerName: {BaseLog: caddy.BaseLog{Level: "ERROR"}}}}
	return caddy.Validate(cfg)
}

// httpServers is what of the app http is read, whether or not it would load.
type httpServers struct {
	HTTPPort  uint `json:"http_port"`
	HTTPSPort uint `json:"https_port"`
	Servers   map[string]struct {
		Listen    []string             `json:"listen"`
		Routes    []httpRoute          `json:"routes"`
		Named     map[string]httpRoute `json:"named_routes"`
		Policies  json.RawMessage      `json:"tls_connection_policies"`
		Automatic struct {
			Disable bool     `json:"disable"`
			Skip    []string `json:"skip"`
		} `json:"automatic_https"`
	} `json:"servers"`
}

type httpRoute struct {
	Match []struct {
		Host []string `json:"host"`
		Path []string `json:"path"`
	} `json:"match"`
	matchesMore bool
	Handle      []json.RawMessage `json:"handle"`
	Group       string            `json:"group"`
	Terminal    bool              `json:"terminal"`
}

// only are the paths that a route takes, if its matchers take those and no others; nil if that cannot be told.
func (r *httpRoute) only() (paths []string) {
	for _, set := range r.Match {
		if len(set.Path) == 0 || slices.ContainsFunc(set.Path, func(pattern string) bool { return strings.ContainsAny(pattern, `*{%?[\`) }) {
			return nil
		}
		paths = append(paths, set.Path...)
	}
	return paths
}

// within are the patterns of the paths, and the hosts, that a route takes; nil if it takes any.
func (r *httpRoute) within() (patterns, hosts []string) {
	anyPath, anyHost := false, false
	for _, set := range r.Match { // of which one is enough
		anyPath, anyHost = anyPath || len(set.Path) == 0, anyHost || len(set.Host) == 0
		patterns, hosts = append(patterns, set.Path...), append(hosts, set.Host...)
	}
	if anyPath {
		patterns = nil
	}
	if anyHost {
		hosts = nil
	}
	return patterns, hosts
}

func (c *doctorConfig) readHTTP() error {
	var parts struct {
		Apps struct {
			HTTP httpServers `json:"http"`
		} `json:"apps"`
	}
	if err := json.Unmarshal(c.adapted, &parts); err != nil {
		return err
	}
	h := &parts.Apps.HTTP
	if h.HTTPPort == 0 {
		h.HTTPPort = 80
	}
	if h.HTTPSPort == 0 {
		h.HTTPSPort = 443
	}
	c.own = []uint{h.HTTPPort, h.HTTPSPort}
	for _, name := range slices.Sorted(maps.Keys(h.Servers)) {
		s := h.Servers[name]
		var ports []uint
		for _, listen := range s.Listen {
			addr, err := caddy.ParseNetworkAddress(listen)
			if err != nil || addr.IsUnixNetwork() {
				continue
			}
			r := siteReader{
				config: c, port: addr.StartPort, bound: strings.Trim(addr.Host, "[]"), again: slices.Contains(ports, addr.StartPort),
				named: s.Named, invoked: make(map[string]bool), texts: make(map[string]*handlerText),
			}
			ports = append(ports, addr.StartPort)
			r.secure = func(host string) bool {
				switch {
				case addr.StartPort == h.HTTPSPort:
					return true
				case addr.StartPort == h.HTTPPort:
					return false
				}
				return len(s.Policies) > 0 || host != "" && !s.Automatic.Disable && !slices.Contains(s.Automatic.Skip, host)
			}
			r.routes(s.Routes, siteSpot{hosts: []string{""}, reach: []string{""}, moved: []string{}})
			for _, origin := range r.alone() {
				if !slices.Contains(c.alone, origin) {
					c.alone = append(c.alone, origin)
				}
			}
			if addr.StartPort == h.HTTPPort || addr.StartPort == h.HTTPSPort || c.isVisitedOn(addr.StartPort) {
				c.entrances = append(c.entrances, addr.StartPort)
			}
		}
	}
	return nil
}

// siteReader goes through the routes of a server.
type siteReader struct {
	config *doctorConfig
	port   uint
	bound  string // the address it listens on
	again  bool   // its hosts are known: the server listens on this port of another address too
	named  map[string]httpRoute
	secure func(host string) bool

	invoked map[string]bool         // named routes, each with the spot that it was invoked from
	texts   map[string]*handlerText // what was read of handlers

	takers   []taker // so far, in the order in which they run
	messages []messageSpot
	answers  []siteSpot // of the handlers that could answer, in the order in which they run
	turns    int        // routes that end others, so far
}

// messageSpot is a wechat_message, and how many handlers that could answer stand before it.
type messageSpot struct {
	siteSpot
	before int
}

// passing are Caddy's handlers that answer no push: they leave it to the next.
var passing = []string{
	"authentication", "encode", "headers", "intercept", "invoke", "log_append", "map", "push", "request_body", "rewrite", "subroute", "templates", "timeouts", "tracing",
	"vars",
}

// alone are the sites with a wechat_message behind which nothing could answer what comes to it.
func (r *siteReader) alone() (origins []string) {
	for _, m := range r.messages {
		for _, host := range m.hosts {
			if r.again && host != "" || slices.ContainsFunc(r.answers[m.before:], func(at siteSpot) bool { return m.mayGoOn(host, at) }) {
				continue
			}
			if origin := r.config.site(strings.ToLower(host), r.port, r.secure(host), r.bound).origin(); !slices.Contains(origins, origin) {
				origins = append(origins, origin)
			}
		}
	}
	return origins
}

// mayGoOn reports whether what comes to one place for a host could get to another that stands behind it.
func (s *siteSpot) mayGoOn(host string, to siteSpot) bool {
	if !mayMeet(host, to.reach) || !mayOverlap(s.within, to.within) && !mayOverlap(s.within, to.moved) {
		return false
	}
	return !slices.ContainsFunc(s.turns, func(own routeTurn) bool {
		if own.group == "" {
			return !slices.Contains(to.turns, own)
		}
		return slices.ContainsFunc(to.turns, func(other routeTurn) bool { return other.group == own.group && other.route != own.route })
	})
}

// mayMeet reports whether requests for a host could come to a place for some hosts; the empty one is any.
func mayMeet(host string, hosts []string) bool {
	// Caddy compares the ASCII forms of names.
	vague := func(host string) bool {
		return host == "" || strings.ContainsFunc(host, func(c rune) bool { return c == '*' || c == '{' || c > unicode.MaxASCII })
	}
	return vague(host) || slices.ContainsFunc(hosts, func(other string) bool { return vague(other) || strings.EqualFold(host, other) })
}

// mayOverlap reports whether a path could have a pattern of each; nil is any, and without a pattern there is no path.
func mayOverlap(a, b []string) bool {
	return a == nil || b == nil || slices.ContainsFunc(a, func(one string) bool {
		return slices.ContainsFunc(b, func(other string) bool {
			one, other := fixedPart(one), fixedPart(other)
			return strings.HasPrefix(one, other) || strings.HasPrefix(other, one)
		})
	})
}

// fixedPart is what all paths begin with that have a pattern. Caddy tells no case, and no slash from several unless a pattern has several.
func fixedPart(pattern string) string {
	if i := strings.IndexAny(pattern, `*{%?[\`); i >= 0 {
		pattern = pattern[:i]
	}
	for strings.Contains(pattern, "//") {
		pattern = strings.ReplaceAll(pattern, "//", "/")
	}
	return strings.ToLower(pattern)
}

// routeTurn is a route behind which others have no turn: those of its group, or, if it is terminal, all.
type routeTurn struct {
	group string // empty: terminal
	route int
}

// siteSpot is a place among the routes, by what comes to it.
type siteSpot struct {
	hosts    []string
	patterns []string // of the path matchers around it, the innermost first
	only     []string // the paths of all that comes here; nil: cannot be told
	reach    []string // hosts, one of which all is for that comes here: hosts may lack some
	within   []string // patterns, one of which each path has that comes here as it was asked for; nil: cannot be told
	moved    []string // patterns of the paths asked for that may have been rewritten before; never nil
	lost     bool     // all paths may have been rewritten: patterns say no more what was asked for
	choosy   bool     // not all that has a path of within, or, without it, not all for the hosts, comes here; or that cannot be told
	never    bool     // nothing comes here: the patterns around it have no path in common
	turns    []routeTurn
	stripped string   // what was taken from the paths: the patterns have it, for they are what is asked for
	behind   string   // the handler that answers before it is reached; empty: none
	invoked  []string // the named routes that it is in
	depth    int
}

// routes reads a list of routes.
func (r *siteReader) routes(routes []httpRoute, at siteSpot) {
	if at.depth > maxRouteDepth {
		r.answers = append(r.answers, at) // perhaps
		return
	}
	at.moved = slices.Clip(at.moved)
	for _, route := range routes {
		inside := at
		inside.moved, inside.turns = slices.Clip(at.moved), slices.Clip(at.turns)
		if own := route.only(); own != nil {
			inside.only = putBack(at.stripped, own)
		}
		within, reach := route.within()
		switch {
		case within == nil || at.lost:
		case mayOverlap(within, at.within):
			inside.within = within
		case len(at.moved) == 0:
			inside.never = true
		}
		inside.choosy = at.choosy || route.isChoosy() || len(within) > 0 && (at.lost || !coversAll(at.within, within))
		if reach != nil {
			inside.reach = reach
		}
		r.turns++
		if route.Group != "" {
			inside.turns = append(inside.turns, routeTurn{route.Group, r.turns})
		}
		if route.Terminal {
			inside.turns = append(inside.turns, routeTurn{"", r.turns})
		}
		var hosts, patterns []string
		for _, set := range route.Match {
			hosts, patterns = append(hosts, set.Host...), append(patterns, set.Path...)
		}
		if len(hosts) > 0 {
			inside.hosts = hosts
		}
		inside.patterns = append(putBack(at.stripped, patterns), at.patterns...)
		for _, raw := range route.Handle {
			if all := r.handler(raw, inside); inside.behind == "" {
				inside.behind = all
			}
			does := r.text(raw)
			if !does.keeps {
				inside.only, at.only = nil, nil // of the routes after this one too
			}
			if !does.leaves {
				moved := inside.within
				if moved == nil {
					moved = []string{"*"}
				}
				inside.moved, at.moved = withOthers(inside.moved, moved), withOthers(at.moved, moved)
				inside.lost, at.lost = true, at.lost || len(route.Match) == 0
			}
			if inside.stripped += does.takes; len(route.Match) == 0 { // as handle_path has it
				at.stripped += does.takes
			}
		}
		if len(route.Match) == 0 {
			at.behind = inside.behind
		}
	}
}

// withOthers are patterns with others, each of them once.
func withOthers(patterns, others []string) []string {
	for _, other := range others {
		if !slices.Contains(patterns, other) {
			patterns = append(patterns, other)
		}
	}
	return patterns
}

// putBack puts what was taken from paths before the patterns that what was left is matched with. One that can begin anywhere stays.
func putBack(stripped string, patterns []string) []string {
	list := make([]string, 0, len(patterns))
	for _, pattern := range patterns {
		if strings.HasPrefix(pattern, "/") {
			pattern = stripped + pattern
		}
		list = append(list, pattern)
	}
	return list
}

// handlerText is what a handler's text says.
type handlerText struct {
	Handler   string      `json:"handler"`
	Name      string      `json:"name"` // of the route that invoke runs
	Routes    []httpRoute `json:"routes"`
	Upstreams []struct {
		Dial string `json:"dial"`
	} `json:"upstreams"`
	Responses json.RawMessage `json:"handle_response"` // of whatever shape another handler has
	Mirrors   json.RawMessage `json:"mirrors"`
	Status    json.RawMessage `json:"status_code"` // a number or a string

	unread bool   // it has another form
	keeps  bool   // see keepsPath
	leaves bool   // see leavesPath
	takes  string // see prefixTaken
}

// text reads a handler's text, which a walk comes to by many ways, and which it takes a while to read.
func (r *siteReader) text(raw json.RawMessage) *handlerText {
	h := r.texts[string(raw)]
	if h == nil {
		h = &handlerText{keeps: keepsPath(raw, 0), leaves: leavesPath(raw), takes: prefixTaken(raw)}
		h.unread = json.Unmarshal(raw, h) != nil
		r.texts[string(raw)] = h
	}
	return h
}

// prefixTaken is what a handler takes from the beginning of paths.
func prefixTaken(raw json.RawMessage) string {
	var h struct {
		Handler string `json:"handler"`
		Prefix  string `json:"strip_path_prefix"`
	}
	if json.Unmarshal(raw, &h) != nil || h.Handler != "rewrite" || h.Prefix == "" || hasPlaceholder(h.Prefix) {
		return ""
	}
	return "/" + strings.Trim(h.Prefix, "/")
}

// pathKeepers are the handlers that leave a request's path alone, unless there is a rewrite in them.
var pathKeepers = []string{
	"acme_server", "authentication", "copy_response", "copy_response_headers", "encode", "error", "file_server", "headers", "intercept", "log_append", "map",
	"metrics", "push", "request_body", "reverse_proxy", "static_response", "templates", "timeouts", "tracing", "vars",
}

// keepsPath reports whether requests that get past a handler certainly have the path that they had, or the end of it.
func keepsPath(raw json.RawMessage, depth int) bool {
	var h struct {
		Handler string      `json:"handler"`
		Routes  []httpRoute `json:"routes"`
	}
	if depth > maxRouteDepth || json.Unmarshal(raw, &h) != nil {
		return false
	}
	switch {
	case h.Handler == "rewrite":
		var fields map[string]json.RawMessage
		return json.Unmarshal(raw, &fields) == nil && len(fields) == 2 && fields["strip_path_prefix"] != nil // as handle_path does
	case h.Handler == "subroute":
		return !slices.ContainsFunc(h.Routes, func(route httpRoute) bool {
			return slices.ContainsFunc(route.Handle, func(raw json.RawMessage) bool { return !keepsPath(raw, depth+1) })
		})
	case strings.HasPrefix(h.Handler, "wechat_"):
		return true
	}
	return slices.Contains(pathKeepers, h.Handler) && !strings.Contains(string(raw), `"rewrite"`)
}

// leavesPath reports whether requests that get past a handler certainly have the whole path that they had.
func leavesPath(raw json.RawMessage) bool {
	return keepsPath(raw, 0) && !strings.Contains(string(raw), `"strip_path_prefix"`)
}

// isEmptyJSON reports whether a list is missing or has nothing in it.
func isEmptyJSON(list json.RawMessage) bool {
	var items []json.RawMessage
	return len(list) == 0 || json.Unmarshal(list, &items) == nil && len(items) == 0
}

// handler reads one and returns its name if nothing gets past it. A proxy that handles responses may go on with the next, as
// forward_auth does, and so does an early hint.
func (r *siteReader) handler(raw json.RawMessage, at siteSpot) string {
	h := r.text(raw)
	if h.unread {
		r.answers = append(r.answers, at)
		return ""
	}
	switch {
	case at.never:
	case h.Handler == "wechat_message" && at.behind == "" && isEmptyJSON(h.Mirrors): // to read copies of messages may be all that is wanted
		r.messages = append(r.messages, messageSpot{at, len(r.answers)})
	case !strings.HasPrefix(h.Handler, "wechat_") && !slices.Contains(passing, h.Handler):
		r.answers = append(r.answers, at)
	}
	r.look(h.Handler, at.narrowed(h.Handler, raw))
	for _, host := range at.hosts {
		s := r.config.site(strings.ToLower(host), r.port, r.secure(host), r.bound)
		if strings.HasPrefix(h.Handler, "wechat_") && (host == "" || !r.again) {
			s.handlers = append(s.handlers, siteHandler{h.Handler, at.patterns, at.only, at.behind, raw})
		}
	}
	for _, u := range h.Upstreams {
		if u.Dial != "" && !slices.Contains(r.config.upstreams, u.Dial) {
			r.config.upstreams = append(r.config.upstreams, u.Dial)
		}
	}
	at.depth++
	routes := h.Routes
	if h.Handler == "invoke" {
		if route, ok := r.named[h.Name]; ok && !slices.Contains(at.invoked, h.Name) && r.isNew(h.Name, at) { // else it runs itself
			routes, at.invoked = []httpRoute{route}, append(slices.Clip(at.invoked), h.Name)
		} else { // what it has is not looked at again
			r.answers = append(r.answers, at)
		}
	}
	r.routes(routes, at)
	switch {
	case at.never:
	case h.Handler == "reverse_proxy" && isEmptyJSON(h.Responses):
		return h.Handler
	case h.Handler == "static_response" && strings.Trim(string(h.Status), `"`) != strconv.Itoa(http.StatusEarlyHints):
		return h.Handler
	}
	return ""
}

// isNew reports whether a named route is invoked here for the first time from such a spot. Routes that invoke each other many times lead to very
// many spots that are alike.
func (r *siteReader) isNew(name string, at siteSpot) bool {
	as := fmt.Sprintf("%q %q %q %q %q %q", name, at.hosts, at.patterns[:min(1, len(at.patterns))], at.only, at.stripped, at.behind)
	switch {
	case r.invoked[as]:
		return false
	case len(r.invoked) == maxInvocations:
		r.config.unread = true
		return false
	}
	r.invoked[as] = true
	return true
}

// site is that of a host and port. A site for any host is known by the address that it listens on.
func (c *doctorConfig) site(host string, port uint, secure bool, bound string) *doctorSite {
	anyHost := host == ""
	if anyHost {
		host = bound
	}
	for i := range c.sites {
		if s := &c.sites[i]; s.host == host && s.port == port {
			if !slices.Contains(s.bound, bound) {
				s.bound = append(s.bound, bound)
			}
			return s
		}
	}
	c.sites = append(c.sites, doctorSite{host: host, any: anyHost, port: port, secure: secure, bound: []string{bound}})
	return &c.sites[len(c.sites)-1]
}

// public are the sites that WeChat can reach.
func (c *doctorConfig) public() (list []*doctorSite) {
	for i := range c.sites {
		if c.sites[i].isPublic() {
			list = append(list, &c.sites[i])
		}
	}
	return list
}

// visited are the public sites that WeChat or visitors come to: other sites of the same config are none of the gateway's.
func (c *doctorConfig) visited() (list []*doctorSite) {
	for _, s := range c.public() {
		if s.isVisited() {
			list = append(list, s)
		}
	}
	return list
}

// isVisited reports whether WeChat or visitors come to a site, rather than those who run the gateway and their apps.
func (s *doctorSite) isVisited() bool {
	return slices.ContainsFunc(s.handlers, func(h siteHandler) bool {
		return h.name != "wechat_api" && h.name != "wechat_console" && h.name != "wechat_ready"
	})
}

func (c *doctorConfig) isVisitedOn(port uint) bool {
	return slices.ContainsFunc(c.sites, func(s doctorSite) bool { return s.port == port && s.isVisited() })
}

// siteNames are the names of sites, once each.
func siteNames(sites []*doctorSite) (list []string) {
	for _, s := range sites {
		if !slices.Contains(list, s.host) {
			list = append(list, s.host)
		}
	}
	return list
}

// checkConfig says whether Caddy would load the config.
func (d *doctor) checkConfig(context.Context) []doctorResult {
	c := &d.config
	if c.loadError != nil {
		return []doctorResult{redOf(c.file, texts("Caddy does not load it: "+withoutWay(c.loadError.Error()), "Caddy 无法加载："+quotedZH(withoutWay(c.loadError.Error()))),
			texts("mend what it says, then try `caddy validate`; as the gateway's user and with its environment, as doctor too wants to be run", "按提示修正，然后用 `caddy validate` 验证；二者与 doctor 一样，须以网关的用户及其环境变量运行"))}
	}
	results := []doctorResult{greenOf(c.file, "loads: "+countOf(len(c.app.Platforms), "platform")+", "+countOf(len(c.app.Accounts), "account")+", "+countOf(len(c.app.Clients), "client"),
		fmt.Sprintf("可以加载：%d 个平台，%d 个普通账号，%d 个 client", len(c.app.Platforms), len(c.app.Accounts), len(c.app.Clients)))}
	if len(c.app.Platforms)+len(c.app.Accounts) == 0 {
		results = append(results, redOf("wechat", texts("there is neither a platform nor an account", "没有配置任何 platform 或 account"),
			texts("add platform or account to the global option wechat", "在全局选项 wechat 中添加 platform 或 account")))
	}
	for i := range c.sites {
		results = append(results, c.checkPaths(&c.sites[i])...)
		for _, h := range c.sites[i].handlers {
			if h.behind != "" {
				en, zh := "stands behind "+h.behind+", which answers everything: nothing gets to it", "位于 "+h.behind+" 之后，而后者会应答所有请求：请求到不了它"
				if h.behind == "reverse_proxy" && (h.name == "wechat_message" || h.name == "wechat_event") {
					en, zh = en+", and pushes get to the backend unverified", zh+"，推送未经验证就到后端"
				}
				results = append(results, redOf(h.name+" of "+c.sites[i].origin(), texts(en, zh),
					texts("put it first: in a route directives run in the order in which they are written", "请写在前面：route 内的指令按书写顺序执行")))
			}
		}
	}
	results = append(results, c.checkHidden()...)
	results = append(results, c.checkReach()...)
	results = append(results, c.checkBinds()...)
	results = append(results, c.checkSemicolons()...)
	for _, origin := range c.alone {
		results = append(results, redOf("wechat_message of "+origin, texts("nothing that could answer stands behind it: messages get to no backend", "后面没有能应答的处理器：消息到不了任何后端"),
			texts("write reverse_proxy behind it, in the same route; in a named route put both into route { … }, for of &(name) { … } without that Caddy keeps the first directive alone",
				"在同一个 route 内把 reverse_proxy 写在它后面；具名路由里请用 route { … } 包住这两条，否则 Caddy 只保留 &(name) { … } 的第一条指令")))
	}
	if c.unread {
		results = append(results, yellowOf("named_routes", texts(fmt.Sprintf("named routes invoke others in more than %d ways: doctor has not looked at all of them", maxInvocations), fmt.Sprintf("具名路由互相 invoke 的方式超过 %d 种：doctor 未逐一检查", maxInvocations)),
			texts("let named routes invoke no others, and see whether one invokes itself", "具名路由内请勿再 invoke 其他具名路由，并检查是否有路由 invoke 自身")))
	}
	if len(c.app.SealKeys) == 0 {
		results = append(results, yellowOf("seal_key", texts("there is none: tickets and refresh tokens are stored as Caddy stores private keys, readable by whoever reads its storage", "未配置：票据与 refresh token 以 Caddy 存储私钥的方式保存，能读取存储者即可读取"),
			texts("add seal_key {env.WECHAT_SEAL_KEY} with what `openssl rand -hex 32` prints", "添加 seal_key {env.WECHAT_SEAL_KEY}，值用 `openssl rand -hex 32` 生成")))
	}
	for _, acc := range c.app.Accounts {
		if acc != nil && len(acc.Tokens) > 0 && (acc.Mode == modePlain || acc.Mode == "" && len(acc.AESKeys) == 0) {
			results = append(results, yellowOf("account "+acc.AppID, texts("its pushes are in 明文模式, in which WeChat signs no text", "推送为明文模式，微信不对内容签名"),
				texts("choose 安全模式 in its server configuration and give the aes_key", "在服务器配置中选择安全模式并填写 aes_key")))
		}
	}
	r := resolver{repl: caddy.NewReplacer()}
	for _, client := range c.app.Clients {
		if client == nil || len(client.Keys) == 0 {
			continue
		}
		if keys, err := r.secrets("key", client.Keys, ofClient); err == nil && slices.ContainsFunc(keys, isShortKey) {
			results = append(results, yellowOf("client "+client.Name, texts(fmt.Sprintf("a key of it has fewer than %d characters: whoever reaches wechat_api could guess it", fairKey),
				fmt.Sprintf("有 key 不足 %d 个字符，能访问 wechat_api 的人可能猜出", fairKey)), texts("take what `openssl rand -hex 32` prints", "改用 `openssl rand -hex 32` 生成的值")))
		}
	}
	return results
}

// checkPaths looks for a wechat_message to which no path leads from which an account can be read, as in `route /wx/message`. If
// another one of the site has such paths, all may be as it is meant.
func (c *doctorConfig) checkPaths(s *doctorSite) (results []doctorResult) {
	for _, h := range s.handlers {
		var fields struct {
			AppID string `json:"appid"`
		}
		if h.name != "wechat_message" || h.behind != "" || json.Unmarshal(h.fields, &fields) != nil || fields.AppID != "" {
			continue
		}
		if len(h.only) == 0 || slices.ContainsFunc(h.only, c.app.namesAccount) {
			return nil
		}
		results = append(results, c.nobodyResult(s, h.only[0]))
	}
	return results
}

// namesAccount reports whether an account can be read from a path, as wechat_message does.
func (a *App) namesAccount(path string) bool {
	return slices.ContainsFunc(strings.Split(path, "/"), func(segment string) bool {
		return isAppID(segment) && !slices.ContainsFunc(a.Platforms, func(p *Platform) bool { return p != nil && p.AppID == segment })
	})
}

// nobodyResult says that a path names no account. To a platform's wechat_message all pushes may come on one path: it takes them, and
// cannot say whose they are.
func (c *doctorConfig) nobodyResult(s *doctorSite, path string) doctorResult {
	subject, below := "wechat_message of "+s.origin(), strings.TrimSuffix(path, "/")
	remedy := texts(fmt.Sprintf("let the matcher end in /*, as in %s/*, and enter %s/$APPID$ in the platform's console; or, for one plain account, give wechat_message its appid", below, s.origin()+below),
		fmt.Sprintf("匹配器请以 /* 结尾，如 %s/*，并在第三方平台的后台填写 %s/$APPID$；若只有一个普通账号，请给 wechat_message 写上其 appid", below, s.origin()+below))
	if len(c.app.Platforms) == 0 {
		return redOf(subject, texts(fmt.Sprintf("only what comes to %s gets to it, and nothing below that: no account can be read from this path, so that each push is refused", path),
			fmt.Sprintf("只有发往 %s 的请求能到达它，其下的路径都不能：从该路径读不出账号，所有推送都会被拒绝", path)), remedy)
	}
	return yellowOf(subject, texts(fmt.Sprintf("only what comes to %s gets to it, and nothing below that: a push whose path ends in the account's appid does not, and of one that does backends cannot be told whose it is", path),
		fmt.Sprintf("只有发往 %s 的请求能到达它，其下的路径都不能：路径以账号 appid 结尾的推送到不了它；能到达的推送，后端无法得知属于哪个账号", path)), remedy)
}

// mayBeLeftOut judges the later values that a config loads without.
var mayBeLeftOut = map[string]func(string) error{"token": ofWeChat.text, "key": ofClient.text}

// valueShapes judge what a placeholder stands for. A value that is wrong is not said to resolve: a config with several such values would
// else name the first alone.
var valueShapes = map[string]func(string) error{
	"secret":   plainText,
	"token":    plainText,
	"key":      keyText,
	"aes_key":  func(v string) error { _, err := crypto.ParseKey(v); return err },
	"seal_key": saidAs(func(v string) error { _, err := crypto.ParseSealKey(v); return err }, said("it is not 32 bytes in hex or base64: make one with openssl rand -hex 32", "不是 32 字节的 hex 或 base64：可用 openssl rand -hex 32 生成")),
	"api":      saidAs(func(v string) error { _, err := tokens.ParseOrigin(v); return err }, said("it is not an origin that may be called: write it like "+tokens.DefaultOrigin, "不是可以调用的地址：请写作 "+tokens.DefaultOrigin)),
	"proxy":    saidAs(func(v string) error { _, err := parseProxy(v); return err }, said("it is not a proxy address: write it like http://proxy.internal:3128", "不是代理地址：请写作 http://proxy.internal:3128")),
}

// saidAs judges as another does, in other words: those do not show the value, and are in both languages.
func saidAs(judge func(string) error, wrong error) func(string) error {
	return func(v string) error {
		if judge(v) != nil {
			return wrong
		}
		return nil
	}
}

var wrongValueRemedy = texts("set it right before starting Caddy: it was read, and cannot be what is wanted", "请在启动 Caddy 前改正：已读到值，但不可能正确")

// appSecretShape is that of the AppSecrets that WeChat gives out. A Token, which people choose, may have it too.
var appSecretShape = regexp.MustCompile(`^[0-9a-f]{32}$`)

// lookSwapped reports whether a secret looks like no AppSecret and the newest token like one.
func lookSwapped(secret string, tokens []string) bool {
	r := resolver{repl: caddy.NewReplacer()}
	if len(tokens) == 0 {
		return false
	}
	s, err := r.required("secret", secret)
	if err != nil || appSecretShape.MatchString(s) {
		return false
	}
	t, err := r.required("token", tokens[0])
	return err == nil && appSecretShape.MatchString(t)
}

// checkPlaceholders says of each secret whether it resolves, here and as this user.
func (d *doctor) checkPlaceholders(context.Context) []doctorResult {
	var results []doctorResult
	repl := caddy.NewReplacer()
	exchanged := func(subject, secret string, tokens []string) {
		if lookSwapped(secret, tokens) {
			results = append(results, yellowOf(subject, texts("secret is no AppSecret of WeChat's, and token looks like one: do they stand in each other's place?", "secret 不像微信的 AppSecret，而 token 像：两者是否填反了？"),
				texts("secret is the AppSecret, of 32 hexadecimal digits; token is what somebody has typed in beside the URL", "secret 填 AppSecret（32 位十六进制），token 填在 URL 旁自行填写的 Token")))
		}
	}
	look := func(subject, field, text string, needed bool) {
		if !hasPlaceholder(text) {
			return
		}
		name := placeholderIn(text)
		nameZH := strings.Replace(name, inBraces.EN, inBraces.ZH, 1)
		v, err := repl.ReplaceOrErr(text, true, true)
		judge, leftOut := mayBeLeftOut[field]
		switch {
		case err == nil && !needed && leftOut && judge(v) != nil:
			results = append(results, yellowOf(subject, texts(fmt.Sprintf("%s: %s cannot be right and is left out: %v", field, name, judge(v)), fmt.Sprintf("%s：%s 不可能正确，已被忽略：%s", field, nameZH, textOf(judge(v)).ZH)),
				texts("mend it, or take it out if the rotation is over", "请修正；轮换已结束则删掉")))
		case err == nil && strings.TrimSpace(v) != v:
			results = append(results, redOf(subject, texts(fmt.Sprintf("%s: %s has spaces or a line break around it", field, name), fmt.Sprintf("%s：%s 首尾有空白或换行", field, nameZH)),
				texts("set it without them; one line break at the end of a file does not count", "去掉首尾空白；文件末尾的一个换行不算在内")))
		case err == nil && (needed || v != "") && valueShapes[field] != nil && valueShapes[field](v) != nil:
			if field == "token" || field == "aes_key" {
				return // said below, with the place in the list
			}
			results = append(results, redOf(subject, texts(fmt.Sprintf("%s: %s: %v", field, name, valueShapes[field](v)), fmt.Sprintf("%s：%s：%s", field, nameZH, textOf(valueShapes[field](v)).ZH)), wrongValueRemedy))
		case err == nil:
			results = append(results, greenOf(subject, fmt.Sprintf("%s: %s resolves", field, name), fmt.Sprintf("%s：%s 可以解析", field, nameZH)))
		case needed:
			results = append(results, redOf(subject, texts(fmt.Sprintf("%s: %s resolves to nothing", field, name), fmt.Sprintf("%s：%s 解析为空", field, nameZH)),
				texts("set what it refers to before starting Caddy, and run doctor with the gateway's environment", "启动 Caddy 前设置它所引用的值；并在网关的环境变量下运行 doctor")))
		default:
			results = append(results, greenOf(subject, fmt.Sprintf("%s: %s is not set, as after a rotation", field, name), fmt.Sprintf("%s：%s 未设置（轮换已结束）", field, nameZH)))
		}
	}
	list := func(subject, field string, texts []string) {
		for i, text := range texts {
			look(subject, field, text, i == 0)
		}
	}
	for _, p := range d.config.app.Platforms {
		if p == nil {
			continue
		}
		subject := "platform " + p.AppID
		exchanged(subject, p.Secret, p.Tokens)
		look(subject, "secret", p.Secret, true)
		list(subject, "token", p.Tokens)
		list(subject, "aes_key", p.AESKeys)
	}
	for _, a := range d.config.app.Accounts {
		if a == nil {
			continue
		}
		subject := "account " + a.AppID
		exchanged(subject, a.Secret, a.Tokens)
		look(subject, "secret", a.Secret, true)
		list(subject, "token", a.Tokens)
		list(subject, "aes_key", a.AESKeys)
	}
	for _, c := range d.config.app.Clients {
		if c != nil {
			list("client "+c.Name, "key", c.Keys)
		}
	}
	list("wechat", "seal_key", d.config.app.SealKeys)
	look("wechat", "proxy", d.config.app.Proxy, true)
	for _, origin := range d.config.app.API {
		look("wechat", "api", origin, true)
	}
	for _, p := range d.config.app.keyProblems() {
		if !strings.Contains(p.err.Error(), "resolves to nothing") {
			results = append(results, redOf(p.what+" "+p.appid, textOf(p.err), texts("compare with WeChat's console", "与微信后台核对")))
		}
	}
	if len(results) == 0 {
		return []doctorResult{skippedOf("", "the config has no placeholders", "配置中没有占位符")}
	}
	return results
}

// checkOAuth looks at the domains to which WeChat sends users back.
func (d *doctor) checkOAuth(context.Context) []doctorResult {
	var results []doctorResult
	hosts := siteNames(d.config.public())
	for i := range d.config.sites {
		s := &d.config.sites[i]
		for _, h := range s.handlers {
			if h.name != "wechat_oauth" && h.name != "wechat_authorize" {
				continue
			}
			var fields struct{ Base, Origin string }
			_ = json.Unmarshal(h.fields, &fields)
			results = append(results, oauthResult(s, h.name, fields.Base, fields.Origin, hosts))
		}
	}
	if len(results) == 0 {
		return []doctorResult{skippedOf("", "the config has neither wechat_oauth nor wechat_authorize", "未配置 wechat_oauth 或 wechat_authorize")}
	}
	return results
}

func oauthResult(s *doctorSite, name, base, origin string, hosts []string) doctorResult {
	subject := name + " " + base
	if origin != "" {
		var err error
		if origin, err = (resolver{repl: caddy.NewReplacer()}).required("origin", origin); err != nil {
			return skippedOf(subject, err.Error(), "在此无法解析："+textOf(err).ZH)
		}
	} else if s.any {
		return skippedOf(subject, "redirects come back to the host that the visitor came to, which the config does not name; origin would", "回调域名即访客所用的域名，配置中未指明；可用 origin 指定")
	}
	host, port, err := redirectHost(s, origin)
	remedy := texts("serve it on a host name with a certificate, and enter that name in WeChat's console", "请在有证书的域名上提供服务，并把该域名填入微信后台")
	named := doctorSite{host: host}
	switch {
	case err != nil:
		return redOf(subject, texts("origin: "+err.Error(), "origin 的写法不对：应为协议加域名，如 https://wechat.example.com"), remedy)
	case strings.HasPrefix(host, "*."):
		return greenOf(subject, "redirects come back to "+host+": enter the domain behind the asterisk as 公众号开发域名, in the form $APPID$"+host[1:], "回调域名为 "+host+"：请以 $APPID$"+host[1:]+" 的形式填为公众号开发域名")
	case !named.isPublic():
		return redOf(subject, texts(fmt.Sprintf("redirects come back to '%s', which WeChat accepts as no domain: it wants a name, no IP address", host), fmt.Sprintf("回调地址“%s”不是微信接受的域名：需要域名，不能是 IP", host)), remedy)
	case origin == "" && port != "":
		return yellowOf(subject, texts("visitors come to port "+port+", and redirects come back there unless something leads another port to it: a domain of WeChat's has none", "访客使用端口 "+port+"，若无端口转发则回调也使用该端口：微信域名不能带端口"),
			texts("serve it on the usual ports, or set origin to what visitors see", "请使用默认端口，或将 origin 设为访客看到的协议和域名"))
	case port != "" && port != "80" && port != "443":
		return redOf(subject, texts("redirects come back to port "+port+": a domain of WeChat's has none", "回调使用端口 "+port+"：微信域名不能带端口"), remedy)
	case !slices.Contains(hosts, host):
		return yellowOf(subject, texts("redirects come back to "+host+", which no site of this config serves", "回调域名 "+host+" 不在此配置的站点中"),
			texts("add a site for it, or mend origin; if another server passes it on to here, all is well", "添加该站点或修正 origin；若由其他服务器转发到此则无妨"))
	}
	if name == "wechat_authorize" {
		return greenOf(subject, host+": it must be the platform's 授权发起页域名", host+"：须与平台的授权发起页域名一致")
	}
	return greenOf(subject, host+": it must be in 公众号开发域名 of the platform, or 网页授权域名 of the account", host+"：须填入平台的公众号开发域名，或普通账号的网页授权域名")
}

func redirectHost(s *doctorSite, origin string) (host, port string, err error) {
	if origin == "" {
		if s.port != 80 && s.port != 443 {
			port = strconv.FormatUint(uint64(s.port), 10)
		}
		return s.host, port, nil
	}
	u, err := url.Parse(origin)
	if err != nil || u.Host == "" {
		return "", "", errors.New("not an origin")
	}
	return strings.ToLower(u.Hostname()), u.Port(), nil
}
