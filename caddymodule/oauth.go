package caddymodule

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
)

// OAuth leads people through WeChat's web authorization (网页授权) to the landing place that their link names, where
// they arrive under an opaque tracking id. It serves, below Base:
//
//   - GET {base}/authorize/{appid}/{funcKey}[?scope=&state=] redirects to WeChat. appid is a configured account or an
//     authorizer of the platform; scope is snsapi_base, snsapi_userinfo, snsapi_privateinfo or several joined by commas.
//   - GET {base}/authUserReceive/{platformAppid}/{funcKey}?code=&state=&appid= is where WeChat sends the user of an
//     authorizer back. Menus may link to WeChat with this address themselves, so it need not have begun here.
//   - GET {base}/authUserReceive/{accountAppid}/{funcKey}?code=&state= is the same for a plain account.
//   - GET {callback}/{funcKey}?code=&state=&appid= is one more such address for authorizers, if Callback is set.
//
// The callback exchanges the code, keeps who the user is under a fresh tracking id and redirects to
// <prefix>wxTkId=<id>#<state>, with ? or & before wxTkId as the prefix needs it and the state escaped. A client redeems
// the id at GET /wechat/users/{id} of a wechat_api listener. Where people are sent comes from Funcs alone, never from
// the request.
//
// A login that begins at authorize is bound to the browser: a sealed cookie, one for each login, lives half an hour and
// has the link's state, up to 128 bytes of anything, in it. WeChat gets a random state of letters and digits instead. The
// callback of such a login ends on a page, and WeChat is not asked, unless the browser has its cookie and the login has
// not come back before with another code. All nodes on a store know the key of the cookies, and so does the gateway after
// a restart. Over https browsers take the cookie from this host alone (__Host-). It belongs to the name that WeChat sends the
// visitor back to: if that is Origin, and the visitor starts at another name, they are sent to Origin first.
//
// A login that begins in a menu has the state that the menu gave it, which must not begin with wxTkFlow, and no cookie. Anybody can have a person's browser
// open such a callback with a code of their own, and so sign that person in as somebody else. RequireStart refuses these.
//
// WeChat, the back button and prefetching repeat callbacks: the same code, path and appid within five minutes give the
// same redirect, on any node, while the code is exchanged once; where the login began here, to the browser where it did. Later, or
// under another path, the code is used up. No code is sent twice on the gateway's own account: where WeChat refused the
// platform's token before it looked at the code, the token is renewed and the page asks the visitor to try again; where
// WeChat may or may not have taken the code, it counts as used.
//
// Anybody can make codes up, and each is a question to WeChat. So of one visitor, told by address (of IPv6, by its /64),
// the gateway takes so many as BadCodes says that WeChat calls invalid, used or expired; beyond that the answer is 429 until
// some time has passed. Who only brings good codes is never counted, so that any number of people may share an address, and a
// repeated callback is answered as ever. Accounts that have not authorised the platform are counted in the same way by
// themselves; beyond that only those accounts are refused that the gateway does not know. At most MaxInFlight codes are
// with WeChat at a time.
//
// A refusal by the user, a code that is used or not valid, a login of another browser, an unknown funcKey and WeChat's
// errors each end on a small page in Chinese or English and one log line with WeChat's errcode and what to do; neither
// holds a code, a token or a secret. The handler writes these answers itself: an error returned to Caddy would be logged
// with the URI and the code in it.
//
// The users' own tokens never leave the gateway, which keeps at most 100,000 tracking ids at a time, in memory. When
// there are more, the one that was not looked at for longest goes and is counted in
// caddy_wechat_oauth_forgotten_total; caddy_wechat_oauth_users says how many there are. In a Redis that gateways share
// (store redis), sealed, are all that may be needed on another node: tracking ids, codes and flows, each for its time.
//
// Requests for other paths go on to the next handler.
type OAuth struct {
	// Base is the path below which the handler serves, such as /wx/thirdParty. Required.
	Base string `json:"base,omitempty"`
	// Origin is the scheme and host of the callback address given to WeChat, such as https://wx.example.com.
	// Placeholders are resolved when the config is loaded. Default: those of the request.
	Origin string `json:"origin,omitempty"`
	// Platform is the appid of the platform that acts for authorizers. Default: the only platform of the app.
	Platform string `json:"platform,omitempty"`
	// Callback is the path of one more callback address for authorizers, without its funcKey. Default: none.
	Callback string `json:"callback,omitempty"`
	// RequireStart refuses callbacks of logins that did not begin at {base}/authorize in the same browser: those that
	// begin in a menu, and those that somebody puts into another person's browser. Default: false.
	RequireStart bool `json:"require_start,omitempty"`
	// BadCodes is how many codes that WeChat does not take one visitor may bring: so many at once, and so many a minute after
	// that, up to 100,000. A proxy in front must be one of the server's trusted_proxies, with trusted_proxies_strict if it adds to the header that
	// came: what comes from a private address is not counted, and all who come from another one count as one visitor. -1: any number. Default: 60.
	BadCodes int `json:"bad_codes,omitempty"`
	// MaxInFlight is how many codes may be with WeChat at once, at most 1,000,000. As many again wait for a place, for a few seconds; beyond that
	// visitors are asked to try again. Default: 1000.
	MaxInFlight int `json:"max_in_flight,omitempty"`
	// Funcs are the landing places. At least one.
	Funcs []*Func `json:"funcs,omitempty"`

	app      *App
	logger   *zap.Logger
	base     string // without a slash at its end
	origin   string // resolved, or empty
	platform *Platform
	funcs    map[string]*Func
	places   *loginPlaces
}

// CaddyModule returns the Caddy module information.
func (OAuth) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.wechat_oauth", New: func() caddy.Module { return new(OAuth) }}
}

// Provision resolves the configuration and gets the app.
func (o *OAuth) Provision(ctx caddy.Context) (err error) {
	o.logger = ctx.Logger()
	if o.app, err = loadApp(ctx); err != nil {
		return err
	}
	o.base = strings.TrimSuffix(o.Base, "/")
	o.provisionLimits()
	r := resolver{repl: caddy.NewReplacer()}
	if o.Origin != "" {
		if o.origin, err = r.required("origin", o.Origin); err != nil {
			return err
		}
		if err := checkRedirectOrigin(o.origin); err != nil {
			return err
		}
	}
	if err := o.fits(o.app); err != nil {
		return err
	}
	o.choosePlatform()
	if o.RequireStart && o.Callback != "" {
		o.logger.Warn("callback serves logins that begin in a menu, and require_start refuses all of them: leave out one of the two", zap.String("callback", o.Callback))
	}
	o.funcs = make(map[string]*Func, len(o.Funcs))
	for i, f := range o.Funcs {
		if f == nil {
			return fmt.Errorf("funcs: entry %d is null: %w", i+1, errNoFunc)
		}
		if f.Key == "" {
			return fmt.Errorf("funcs: entry %d: key is missing: %w", i+1, checkFuncKey(f.Key))
		}
		if err := f.provision(r); err != nil {
			return fmt.Errorf("func %s: %w", f.Key, err)
		}
		if o.funcs[f.Key] != nil {
			return fmt.Errorf("func %s: this key is configured twice", f.Key)
		}
		o.funcs[f.Key] = f
	}
	return nil
}

func (o *OAuth) choosePlatform() {
	switch {
	case o.Platform != "":
		o.platform = o.app.platform(o.Platform)
	case len(o.app.Platforms) == 1:
		o.platform = o.app.Platforms[0]
	}
}

// fits implements fitting.
func (o *OAuth) fits(app *App) error {
	if o.Platform != "" && app.listedPlatform(o.Platform) == nil {
		return errNoSuchPlatform(o.Platform)
	}
	for _, f := range o.Funcs {
		if f == nil {
			continue // refused elsewhere
		}
		if i := slices.IndexFunc(f.AppIDs, func(appid string) bool { return app.listedPlatform(appid) != nil }); i >= 0 {
			return fmt.Errorf("func %s: appids: %s is a platform, which has no users: name the accounts that authorised it, or leave appids out for all", f.Key, f.AppIDs[i])
		}
	}
	switch {
	case o.Platform != "" || o.Callback == "":
	case len(app.Platforms) == 0:
		return errors.New("callback needs a platform in the global option wechat: WeChat names only authorizers in such a callback")
	case len(app.Platforms) > 1:
		return errors.New("callback needs the subdirective platform, because there are several platforms")
	}
	return nil
}

// errNoSuchPlatform refuses a platform that a directive names.
func errNoSuchPlatform(appid string) error {
	return fmt.Errorf("platform '%s' is not configured in the global option wechat", appid)
}

// Validate refuses what makes no sense.
func (o *OAuth) Validate() error {
	if err := checkBase(o.Base); err != nil {
		return err
	}
	if o.Callback != "" {
		if err := checkCallback(o.Callback); err != nil {
			return err
		}
		if err := checkCallbackBeside(o.Base, o.Callback); err != nil {
			return err
		}
	}
	if o.BadCodes < anyBadCodes || o.BadCodes > maxBadCodes {
		return fmt.Errorf("bad_codes: want a number from 1 to %d, or -1 for any number", maxBadCodes)
	}
	if o.MaxInFlight < 0 || o.MaxInFlight > maxMaxInFlight {
		return fmt.Errorf("max_in_flight: want a number from 1 to %d", maxMaxInFlight)
	}
	if len(o.Funcs) == 0 {
		return errNoFunc
	}
	for _, f := range o.Funcs {
		if err := f.check(); err != nil {
			return fmt.Errorf("func %s: %w", f.Key, err)
		}
	}
	return nil
}

var (
	_ caddy.Provisioner           = (*OAuth)(nil)
	_ caddy.Validator             = (*OAuth)(nil)
	_ caddyhttp.MiddlewareHandler = (*OAuth)(nil)
	_ caddyfile.Unmarshaler       = (*OAuth)(nil)
)
