package caddymodule

import (
	"errors"

	"github.com/caddyserver/caddy/v2"
)

// Admin adds the gateway's own routes to Caddy's admin endpoint. They return state, never a token, a key or a message.
//
//	GET /wechat/funcs
//	GET /wechat/qr?text=<link>
//
// list the landing places of wechat_oauth with the links that lead to them, {appid} in the place of an authorizer where
// all may come, and the pages of wechat_authorize; and draw one of these links as a QR code, in SVG.
//
//	GET /wechat/orphans[?redirect=<https URL>]
//
// lists the accounts that authorised a platform and whose authorization code was never exchanged, so that WeChat has no
// refresh token of them: each has to authorise again. With redirect, a page on the platform's authorization domain
// (授权发起页域名), the first of them come with a link on which only that account can do so, once, within half an hour;
// WeChat demands that the link be opened from a page on that domain.
//
//	GET /wechat/verify
//	PUT /wechat/verify/<name>
//	DELETE /wechat/verify/<name>
//
// list, add and remove the verification files that wechat_verify serves beside those of its configuration. The body of
// PUT, or of POST, is the file, at most 4 KiB, byte for byte. They are kept in the store: they outlive restarts, and all
// nodes that share the store serve them within a second, on every site that has wechat_verify and below its path.
type Admin struct{ operations operations }

// CaddyModule returns the Caddy module information.
func (*Admin) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "admin.api.wechat", New: func() caddy.Module { return new(Admin) }}
}

// Provision gets the app, if there is one.
func (a *Admin) Provision(ctx caddy.Context) error {
	a.operations.logger = caddy.Log().Named("admin.api.wechat")
	v, err := ctx.AppIfConfigured("wechat")
	if errors.Is(err, caddy.ErrNotConfigured) {
		return nil
	}
	if err != nil {
		return err
	}
	a.operations.app, _ = v.(*App)
	return nil
}

// Routes implements caddy.AdminRouter.
func (a *Admin) Routes() (routes []caddy.AdminRoute) {
	for _, op := range a.operations.list() {
		routes = append(routes, caddy.AdminRoute{Pattern: op.method + " /wechat" + op.path, Handler: caddy.AdminHandlerFunc(op.handle)})
	}
	return routes
}

var (
	_ caddy.AdminRouter = (*Admin)(nil)
	_ caddy.Provisioner = (*Admin)(nil)
)
