package caddymodule

import (
	"errors"

	"github.com/caddyserver/caddy/v2"
)

// Admin adds the gateway's own routes to Caddy's admin endpoint. They return state, never a token, a key or a message.
//
// They speak for the configuration that is in force, also after a reload that was refused, when the endpoint itself is already
// where the refused configuration has it. Before the first one is in force they answer 503.
//
//	GET /wechat/status
//
// is the state of platforms, accounts, clients, the store, WeChat's hosts, backends and pushes, with findings: what is
// wrong or worth a look, the worst first, each with its remedy in English and Chinese. The level of the whole is that of
// its worst finding: green, yellow or red.
//
//	GET /wechat/ready
//
// answers 200 if tickets, tokens and the store allow service, and else 503 with the findings that stand in the way; see
// the handler wechat_ready.
//
//	GET /wechat/authorizers[?platform=<appid>][&q=<text>][&limit=<number>][&cursor=<next>]
//
// lists the accounts that authorised a platform, 50 on a page or as many as limit says, at most 200. While next is not
// empty there are more, and cursor goes on from there; a page may be short, even empty, and have a next. With q, an appid, the
// beginning of one or a gh_ id, the store is asked for those accounts. Any other q is a part of the name: it is looked for in an index in
// memory that the first such question has built in the background, so that answers have what was read so far until index.state
// is ready. It is dropped when nobody has looked for a name for 15 minutes, and built anew every 30. Names are those that the
// gateway has learned: of an account that was never used since it was imported or read from WeChat's list, none is known.
//
//	GET /wechat/authorizers/<appid>[?platform=<appid>]
//
// shows one of them: its name, its type and the company or person behind it (which WeChat is asked for, and which are left
// out if it does not answer in two seconds), its permission sets, and how its token stands.
//
//	POST /wechat/refresh/<appid>[?platform=<appid>]
//
// has WeChat give a new token for an authorizer, an account of the configuration or a platform, once a minute at most on one node. The
// old one serves until the new one is there. For an account of the configuration the new one is forced, of which WeChat allows 20 a day and the gateway uses 15.
//
//	POST /wechat/revoke/<appid>[?platform=<appid>]
//
// drops an authorization and its tokens, as when WeChat pushes that the account took it back. For WeChat it goes on; the
// account can authorise again. Platform must be there if the account has authorised several.
//
//	POST /wechat/drain
//
// tries at once to exchange the authorization codes whose exchange failed and that wait for their next attempt, once in ten
// seconds at most, and says after 20 seconds at the latest what came of it.
//
//	GET /wechat/funcs
//	GET /wechat/qr?text=<link>
//
// list the landing places of wechat_oauth with the links that lead to them, {appid} in the place of an authorizer where
// all may come, and the pages of wechat_authorize; and draw one of these links as a QR code, in SVG.
//
//	GET /wechat/feed[?after=<next>][&appid=<appid>][&limit=<number>]
//	GET /wechat/refusals[?appid=<appid>][&code=<errcode>][&rid=<id>][&limit=<number>]
//	GET /wechat/explain?code=<errcode>
//
// tell what happened on this node since next; what was refused or failed, the newest first; and what an errcode means.
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

// Provision gets the app, if there is one. It is not in force yet and may never be: Caddy starts the new endpoint first, and
// does not bring the old one back when it refuses the configuration after that.
func (a *Admin) Provision(ctx caddy.Context) error {
	a.operations.logger, a.operations.running = caddy.Log().Named("admin.api.wechat"), &running
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
