package caddymodule

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddytls"
)

// Permission lets on-demand TLS get certificates for <appid>.<suffix>, where the appid is that of an account which
// authorised one of the platforms of the app wechat and has not taken that back; for nothing else. Neither the suffix
// itself nor any name of more labels, under another suffix, or with an appid that is not known is allowed; nor is the
// appid of a plain account or of a platform, which nobody authorises.
//
// WeChat calls such names the $APPID$ form of a platform's domain (公众号开发域名): one account's violation then does not
// block the whole domain.
//
// It is asked at TLS handshakes and never asks WeChat. Accounts in use are answered from memory, so that an account that
// takes its authorization back gets no certificate from then on; one that Caddy has in memory serves until it has to be
// renewed. Others cost one bounded read of the store per platform;
// names that are not known are remembered for five seconds. A flood of them is held to 100 reads of the store a second:
// beyond that, and when the store does not answer within 1.5 s, the answer is an error other than "not allowed", since it
// cannot be told.
type Permission struct {
	// Suffix is the domain below which accounts have their names, such as wx.example.com; without a wildcard.
	// Placeholders are resolved when the config is loaded. Required.
	Suffix string `json:"suffix"`

	app    *App
	suffix string // resolved, in lower case, with a dot before it
}

// CaddyModule returns the Caddy module information.
func (Permission) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "tls.permission.wechat", New: func() caddy.Module { return new(Permission) }}
}

// Provision resolves the suffix.
func (p *Permission) Provision(ctx caddy.Context) error {
	suffix, err := (resolver{repl: caddy.NewReplacer()}).required("suffix", p.Suffix)
	if err != nil {
		return err
	}
	if err := checkSuffix(suffix); err != nil {
		return err
	}
	p.suffix = "." + strings.ToLower(suffix)
	p.app, err = loadApp(ctx)
	return err
}

// domainName matches names of labels that DNS and certificates take.
var domainName = regexp.MustCompile(`^(?i:[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)(\.(?i:[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?))*$`)

// maxDomainName is the longest name that still has room for an appid and a dot before it.
const maxDomainName = 253 - len("wx0123456789abcdef.")

// checkSuffix refuses what is no domain.
func checkSuffix(s string) error {
	_, err := netip.ParseAddr(s)
	switch {
	case strings.HasPrefix(s, "*.") || strings.HasPrefix(s, "."):
		return fmt.Errorf("suffix '%s': write the domain alone, like wx.example.com; what stands before it is always one appid", s)
	case err == nil || len(s) > maxDomainName || !domainName.MatchString(s):
		return fmt.Errorf("suffix '%s' is not a domain: want one like wx.example.com, in letters, digits and - (an international one in its xn-- form)", s)
	}
	return nil
}

// CertificateAllowed implements caddytls.OnDemandPermission.
func (p *Permission) CertificateAllowed(ctx context.Context, name string) error {
	appid, ok := strings.CutSuffix(strings.ToLower(name), p.suffix)
	if !ok || !isAppID(appid) {
		return fmt.Errorf("%w: it is not <appid>%s", caddytls.ErrPermissionDenied, p.suffix)
	}
	switch known, err := p.app.manager().Authorized(ctx, appid); {
	case err != nil:
		return fmt.Errorf("whether %s has authorised a platform cannot be told: %w", appid, err)
	case !known:
		return fmt.Errorf("%w: %s has not authorised a platform", caddytls.ErrPermissionDenied, appid)
	}
	return nil
}

// UnmarshalCaddyfile parses the permission of the global option on_demand_tls:
//
//	on_demand_tls {
//		permission wechat <suffix>
//	}
func (p *Permission) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if !d.AllArgs(&p.Suffix) {
		return d.ArgErr()
	}
	if !hasPlaceholder(p.Suffix) {
		if err := checkSuffix(p.Suffix); err != nil {
			return d.WrapErr(err)
		}
	}
	if d.NextBlock(d.Nesting()) {
		return d.Err("the permission wechat takes no block, only the suffix")
	}
	return nil
}

// Validate refuses a permission that could never be given.
func (p *Permission) Validate() error {
	if len(p.app.Platforms) == 0 {
		return errors.New("no account could ever be allowed: the global option wechat has no platform that it could authorise")
	}
	return nil
}

var (
	_ caddy.Provisioner           = (*Permission)(nil)
	_ caddy.Validator             = (*Permission)(nil)
	_ caddyfile.Unmarshaler       = (*Permission)(nil)
	_ caddytls.OnDemandPermission = (*Permission)(nil)
)
