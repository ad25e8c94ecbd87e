package caddymodule

import (
	"net/http"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// Ready says to load balancers and orchestrators whether the gateway can serve: 200 or 503 to GET and HEAD, with an empty
// body and no detail, so that it may stand on a public site. GET /wechat/ready on the admin endpoint says why.
//
// The gateway is ready if the store answers within a second, no record or ticket lives in this process's memory alone, and
// each platform has a ticket that WeChat takes and a component token, which is fetched if there is none. Plain accounts
// count only where there is no platform: then one of them at least must not be without a token in vain. What is wrong with
// single authorizers, backends or clients does not count, nor does a ticket that is late but alive.
//
// A ticket comes by WeChat's push to wechat_event, so a new gateway is not ready before that: what passes requests on must
// let pushes through to one that is not. When the store is away no node that shares it is ready, though live tokens serve
// on; a load balancer that then sends requests to all nodes rather than to none serves WeChat best.
//
// Once the process was told to end it is not ready, at once: with Caddy's shutdown_delay it serves on while a load balancer takes note.
//
// A verdict is kept for a second, so that being asked often costs nothing.
type Ready struct {
	app *App
}

// CaddyModule returns the Caddy module information.
func (*Ready) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.wechat_ready", New: func() caddy.Module { return new(Ready) }}
}

// Provision gets the app.
func (h *Ready) Provision(ctx caddy.Context) (err error) {
	h.app, err = loadApp(ctx)
	return err
}

func parseReady(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	ready := new(Ready)
	return ready, ready.UnmarshalCaddyfile(h.Dispenser)
}

// UnmarshalCaddyfile sets up the handler:
//
//	wechat_ready [<matcher>]
func (*Ready) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if d.NextArg() {
		return d.ArgErr()
	}
	if d.NextBlock(d.Nesting()) {
		return d.Errf("unknown subdirective '%s': wechat_ready has none", d.Val())
	}
	return nil
}

// ServeHTTP answers.
func (h *Ready) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	header := w.Header()
	header.Set("Cache-Control", "no-store")
	header.Set("Content-Length", "0")
	status := http.StatusOK
	switch {
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		header.Set("Allow", "GET, HEAD")
		status = http.StatusMethodNotAllowed
	case len(h.app.ready(r.Context())) > 0:
		status = http.StatusServiceUnavailable
	}
	w.WriteHeader(status)
	return nil
}

var (
	_ caddy.Provisioner           = (*Ready)(nil)
	_ caddyhttp.MiddlewareHandler = (*Ready)(nil)
	_ caddyfile.Unmarshaler       = (*Ready)(nil)
)
