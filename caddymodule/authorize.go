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

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// Authorize is where the owner of an account (公众号, 小程序) authorises a third-party platform. It serves, below Base:
//
//   - GET {base}[/{platform}][?auth_type=&biz_appid=&category=] is the page: a button for the computer, one for the phone,
//     and a QR code that leads a phone there. It asks WeChat for nothing.
//   - GET {base}/go?kind=pc|h5[&platform=&auth_type=&biz_appid=&category=] makes a fresh pre-authorization code and
//     redirects to WeChat's page, for a computer or for WeChat on a phone.
//   - GET {base}/callback/{platform}?auth_code=&expires_in=&s= is where WeChat sends the owner back. The code is exchanged,
//     the tokens are kept, and the owner goes on to Then with ?appid=, or sees what was granted.
//
// WeChat lets nobody in who does not come from the platform's authorization domain (授权发起页域名), and looks at the
// Referer. So the page and the redirect name their origin, and nothing more, in it. A browser that says that it comes
// from elsewhere, such as one that followed the QR code, is led to the page first.
//
// auth_type chooses the sorts of accounts, within what AuthType allows; biz_appid is the only account that may authorise;
// category are the ids of the permission sets to ask for, joined by commas or bars. The page passes them on to its links.
//
// What comes back proves itself by s, which go made: it is sealed, lives 30 minutes, works once, and only in the browser
// that it was made for, told by a cookie, which over https browsers take from this host alone (__Host-). Without it the
// answer is 400 and WeChat is not asked. WeChat, the back button and prefetching repeat callbacks: the same one gives the
// same answer, on any node, while the code is exchanged once. The exchange is durable before WeChat is asked: when WeChat
// does not answer, it goes on in the background.
//
// Each visitor may start ten times at once and then once a minute, told by address (of IPv6, by its /64), and all
// together a hundred times and then every two seconds. Beyond that the answer is 429. HEAD and prefetching start nothing.
//
// Errors end on a small page in Chinese or English and one log line with WeChat's errcode and what to do; neither holds a
// code, a token or a secret. Requests for other paths go on to the next handler.
type Authorize struct {
	// Base is the path below which the handler serves, such as /wx/authorize. Required.
	Base string `json:"base,omitempty"`
	// Platform is the appid of the platform to authorise where the path names none. Default: the only platform of the app;
	// required if there are several.
	Platform string `json:"platform,omitempty"`
	// Then is the absolute http or https URL to which the owner goes on, with appid added to its query. Placeholders are
	// resolved when the config is loaded. Default: none, a page shows the account and what it granted.
	Then string `json:"then,omitempty"`
	// AuthType is which sorts of accounts may authorise: 1 official accounts, 2 mini programs, 3 both, 4 promoters (推客),
	// 5 channels (视频号), 6 all, 8 talents (带货助手). Default: 3.
	AuthType int `json:"auth_type,omitempty"`
	// Origin is the scheme and host of the page and the callback, such as https://wx.example.com, which must be on the
	// platform's authorization domain. Placeholders are resolved when the config is loaded. Default: those of the request.
	Origin string `json:"origin,omitempty"`

	app      *App
	logger   *zap.Logger
	base     string // without a slash at its end
	origin   string // resolved, or empty
	then     string // resolved, or empty
	platform *Platform
}

// CaddyModule returns the Caddy module information.
func (Authorize) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.wechat_authorize", New: func() caddy.Module { return new(Authorize) }}
}

// Provision resolves the configuration and gets the app.
func (a *Authorize) Provision(ctx caddy.Context) (err error) {
	a.logger = ctx.Logger()
	if a.app, err = loadApp(ctx); err != nil {
		return err
	}
	a.base = strings.TrimSuffix(a.Base, "/")
	if a.AuthType == 0 {
		a.AuthType = tokens.DefaultAuthType
	}
	r := resolver{repl: caddy.NewReplacer()}
	if a.Origin != "" {
		if a.origin, err = r.required("origin", a.Origin); err != nil {
			return err
		}
		if err := checkRedirectOrigin(a.origin); err != nil {
			return err
		}
	}
	if a.Then != "" {
		if a.then, err = r.required("then", a.Then); err != nil {
			return err
		}
		if err := checkThen(a.then); err != nil {
			return err
		}
	}
	if err := a.fits(a.app); err != nil {
		return err
	}
	if a.platform = a.app.platform(a.Platform); a.Platform == "" {
		a.platform = a.app.Platforms[0]
	}
	return nil
}

// fits implements fitting.
func (a *Authorize) fits(app *App) error {
	switch {
	case a.Platform != "" && app.listedPlatform(a.Platform) == nil:
		return errNoSuchPlatform(a.Platform)
	case a.Platform != "":
	case len(app.Platforms) == 0:
		return errors.New("there is no platform to authorise: add one to the global option wechat")
	case len(app.Platforms) > 1:
		return errors.New("there are several platforms: say with the subdirective platform which one is meant where the path names none")
	}
	return nil
}

// Validate refuses what makes no sense.
func (a *Authorize) Validate() error {
	if err := checkBase(a.Base); err != nil {
		return err
	}
	if !slices.Contains(authTypes, a.AuthType) {
		return errAuthType(fmt.Sprint(a.AuthType))
	}
	return nil
}

// authTypes are the values of auth_type that WeChat documents.
var authTypes = []int{1, 2, 3, 4, 5, 6, 8}

func errAuthType(s string) error {
	return fmt.Errorf("auth_type '%s' is none of WeChat's: want 1 (official accounts), 2 (mini programs), 3 (both), 4 (promoters), 5 (channels), 6 (all) or 8 (talents)", s)
}

// narrows reports whether a link may ask for one auth_type where another is configured.
func narrows(asked, configured int) bool {
	return asked == configured || configured == 6 && slices.Contains(authTypes, asked) || configured == 3 && (asked == 1 || asked == 2)
}

// checkThen judges where people go on to. Unlike the prefix of a func it may have a fragment.
func checkThen(s string) error {
	address, _, _ := strings.Cut(s, "#")
	if err := checkPrefix(address); err != nil {
		return fmt.Errorf("then: %w", err)
	}
	if !urlShape.MatchString(s) || strings.Contains(s, `\`) {
		return fmt.Errorf("then: '%s' has characters that must be percent-encoded", s)
	}
	return nil
}

// goOn is where the owner of an account that authorised is sent.
func (a *Authorize) goOn(appid string) string {
	address, fragment, hasFragment := strings.Cut(a.then, "#")
	switch {
	case !strings.Contains(address, "?"):
		address += "?"
	case !strings.HasSuffix(address, "?") && !strings.HasSuffix(address, "&"):
		address += "&"
	}
	address += "appid=" + appid
	if hasFragment {
		address += "#" + fragment
	}
	return address
}

var (
	_ caddy.Provisioner           = (*Authorize)(nil)
	_ caddy.Validator             = (*Authorize)(nil)
	_ caddyhttp.MiddlewareHandler = (*Authorize)(nil)
	_ caddyfile.Unmarshaler       = (*Authorize)(nil)
)
