package caddymodule

import (
	"errors"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/rewrite"
)

// appIDHole stands in a link for the appid of an authorizer.
const appIDHole = "{appid}"

// maxQRText bounds what a QR code is made of: more is too fine for a phone to read from a screen.
const maxQRText = 512

// servedFunc is a landing place with the links that lead to it.
type servedFunc struct {
	Key    string   `json:"key"`
	To     string   `json:"to"`
	Scope  string   `json:"scope"`
	AppIDs []string `json:"appids,omitempty"` // none: all
	Links  []string `json:"links"`
}

// funcs lists the landing places of every wechat_oauth, and the pages of every wechat_authorize.
func (o *operations) funcs(w http.ResponseWriter, _ *http.Request) error {
	if o.app == nil {
		return errNoApp
	}
	funcs, pages := o.app.servedFuncs()
	return answerJSON(w, http.StatusOK, map[string]any{"funcs": funcs, "authorize": pages})
}

// qr draws a link that the gateway itself leads somewhere by. Any other text is refused: what a person scans here is
// trusted to be ours.
func (o *operations) qr(w http.ResponseWriter, r *http.Request) error {
	if o.app == nil {
		return errNoApp
	}
	text := r.URL.Query().Get("text")
	if len(text) > maxQRText || !o.app.serves(text) {
		return caddy.APIError{HTTPStatus: http.StatusBadRequest, Err: errors.New("text: want one of the links that /funcs lists, with an appid in the place of {appid}")}
	}
	code, err := qrCode(text, text)
	if err != nil {
		return caddy.APIError{HTTPStatus: http.StatusBadRequest, Err: errors.New("text: too long for a QR code")}
	}
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Type", "image/svg+xml")
	h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
	h.Set("X-Content-Type-Options", "nosniff")
	_, _ = w.Write([]byte(code))
	return nil
}

// serves reports whether a link is one of the gateway's own.
func (a *App) serves(link string) bool {
	funcs, pages := a.servedFuncs()
	if slices.Contains(pages, link) {
		return true
	}
	for _, f := range funcs {
		for _, own := range f.Links {
			before, after, hole := strings.Cut(own, appIDHole)
			if !hole {
				if own == link {
					return true
				}
				continue
			}
			appid, ok := strings.CutPrefix(link, before)
			appid, fits := strings.CutSuffix(appid, after)
			if ok && fits && isAppID(appid) && a.platform(appid) == nil {
				return true
			}
		}
	}
	return false
}

// servedFuncs finds the landing places and the authorization pages of all sites.
func (a *App) servedFuncs() (funcs []servedFunc, pages []string) {
	funcs, pages = []servedFunc{}, []string{}
	s := a.searchSites()
	for _, h := range s.found {
		slices.Sort(s.places[h])
		places := slices.Compact(s.places[h])
		switch h := h.(type) {
		case *OAuth:
			for _, f := range h.Funcs {
				funcs = append(funcs, h.served(f, places))
			}
		case *Authorize:
			for _, place := range places {
				if strings.Count(place, "/") == 2 { // an origin alone
					place += "/"
				}
				pages = append(pages, place)
			}
		}
	}
	slices.SortStableFunc(funcs, func(x, y servedFunc) int { return strings.Compare(x.Key, y.Key) })
	slices.Sort(pages)
	return funcs, slices.Compact(pages)
}

// searchSites finds the handlers of all sites. A handler may not ask for Caddy's app of sites while it is provisioned: this
// is for requests, when everything is.
func (a *App) searchSites() *siteSearch {
	s := &siteSearch{app: a, places: make(map[any][]string)}
	v, err := a.ctx.AppIfConfigured("http")
	sites, ok := v.(*caddyhttp.App)
	if err != nil || !ok {
		return s
	}
	for _, server := range sites.Servers {
		s.server, s.origin, s.invoked = server, originOfServer(sites, server), make(map[string]bool)
		s.collect(server.Routes, site{}, 0)
	}
	return s
}

// served is a func with its links, below each of these addresses.
func (o *OAuth) served(f *Func, places []string) servedFunc {
	served := servedFunc{
		Key: f.Key, To: strings.TrimRight(strings.TrimSuffix(f.prefix, trackingIDParameter+"="), "?&"), Scope: f.Scope, AppIDs: f.AppIDs, Links: []string{},
	}
	appids := f.AppIDs
	if len(appids) == 0 {
		for _, account := range o.app.Accounts {
			appids = append(appids, account.AppID)
		}
		if o.platform != nil {
			appids = append(appids, appIDHole)
		}
	}
	for _, place := range places {
		for _, appid := range appids {
			served.Links = append(served.Links, place+"/authorize/"+appid+"/"+f.Key)
		}
	}
	return served
}

// site is where a route is: its hosts, and what handle_path or a rewrite takes from paths before it.
type site struct {
	hosts    []string
	stripped string
}

// siteSearch collects the addresses of handlers.
type siteSearch struct {
	app    *App
	server *caddyhttp.Server
	origin func(host string) string
	found  []any            // handlers, in the order of the configuration
	places map[any][]string // their addresses
	verify []*Verify

	invoked map[string]bool // named routes of the server, each with the site that it was invoked from
}

func (s *siteSearch) collect(routes caddyhttp.RouteList, at site, depth int) {
	if depth > maxRouteDepth {
		return
	}
	for i := range routes {
		inside := at
		if hosts := hostsOf(routes[i].MatcherSets); len(hosts) > 0 {
			inside.hosts = hosts
		}
		for _, h := range routes[i].Handlers {
			switch h := h.(type) {
			case *rewrite.Rewrite:
				inside.stripped += h.StripPathPrefix
				if len(routes[i].MatcherSets) == 0 { // as handle_path has it: for the routes after this one too
					at.stripped += h.StripPathPrefix
				}
			case *OAuth:
				s.add(h, h.app, h.origin, inside.stripped+h.base, inside.hosts)
			case *Authorize:
				s.add(h, h.app, h.origin, inside.stripped+h.base, inside.hosts)
			case *Verify:
				if !slices.Contains(s.verify, h) {
					s.verify = append(s.verify, h)
				}
			case *caddyhttp.Subroute:
				s.collect(h.Routes, inside, depth+1)
			case *caddyhttp.Invoke:
				s.invoke(h.Name, inside, depth+1)
			}
		}
	}
}

// invoke looks through a named route, once for each site: it may be invoked by itself, or in very many ways.
func (s *siteSearch) invoke(name string, at site, depth int) {
	route := s.server.NamedRoutes[name]
	as := strings.Join(append([]string{name, at.stripped}, at.hosts...), "\n")
	if route == nil || s.invoked[as] || len(s.invoked) == maxInvocations {
		return
	}
	s.invoked[as] = true
	s.collect(caddyhttp.RouteList{*route}, at, depth)
}

// add notes a handler's addresses: below its own origin if it has one, else on each host that can be named.
func (s *siteSearch) add(h any, app *App, origin, base string, hosts []string) {
	if app != s.app {
		return
	}
	if _, known := s.places[h]; !known {
		s.found = append(s.found, h)
		s.places[h] = nil
	}
	if origin != "" {
		s.places[h] = append(s.places[h], origin+base)
		return
	}
	for _, host := range hosts {
		if !strings.ContainsAny(host, "*{") {
			s.places[h] = append(s.places[h], s.origin(host)+base)
		}
	}
}

// hostsOf are the hosts that a route's matchers name.
func hostsOf(sets caddyhttp.MatcherSets) (hosts []string) {
	for _, set := range sets {
		for _, m := range set {
			if m, ok := m.(*caddyhttp.MatchHost); ok {
				hosts = append(hosts, *m...)
			}
		}
	}
	return hosts
}

// originOfServer makes origins of a server's hosts.
func originOfServer(sites *caddyhttp.App, server *caddyhttp.Server) func(host string) string {
	plain, secure := portOr(sites.HTTPPort, caddyhttp.DefaultHTTPPort), portOr(sites.HTTPSPort, caddyhttp.DefaultHTTPSPort)
	scheme, usual, port := "http", caddyhttp.DefaultHTTPPort, plain
	if len(server.TLSConnPolicies) > 0 {
		scheme, usual, port = "https", caddyhttp.DefaultHTTPSPort, secure
	}
	for _, listen := range server.Listen {
		addr, err := caddy.ParseNetworkAddress(listen)
		// Even on a server with TLS this port speaks none.
		if err == nil && addr.StartPort != 0 && (scheme == "http" || addr.StartPort != uint(plain)) { //nolint:gosec // a port
			port = int(addr.StartPort) //nolint:gosec // a port
			break
		}
	}
	return func(host string) string {
		if port == usual {
			if strings.Contains(host, ":") {
				host = "[" + host + "]"
			}
			return scheme + "://" + host
		}
		return scheme + "://" + net.JoinHostPort(host, strconv.Itoa(port))
	}
}

func portOr(port, usual int) int {
	if port == 0 {
		return usual
	}
	return port
}
