package caddymodule

import (
	"encoding/json"
	"slices"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// UnmarshalCaddyfile parses the directive:
//
//	wechat_authorize <base> {
//		platform  <appid>
//		then      <url>
//		auth_type <type>
//		origin    <url>
//	}
//
// The base is a path, not a matcher.
func (a *Authorize) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if !d.AllArgs(&a.Base) {
		return d.Err("want exactly one argument, the base path, as in: wechat_authorize /wx/authorize { … }")
	}
	if err := checkBase(a.Base); err != nil {
		return d.WrapErr(err)
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		var err error
		switch option := d.Val(); option {
		case "platform":
			err = argumentOnce(d, &a.Platform, literalAppID)
		case "then":
			err = argumentOnce(d, &a.Then, unlessPlaceholder(checkThen))
		case "auth_type":
			err = a.unmarshalAuthType(d)
		case "origin":
			err = argumentOnce(d, &a.Origin, unlessPlaceholder(checkRedirectOrigin))
		default:
			err = d.Errf("unknown subdirective '%s': want platform, then, auth_type or origin", option)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (a *Authorize) unmarshalAuthType(d *caddyfile.Dispenser) error {
	var text string
	if a.AuthType != 0 {
		return d.Err("auth_type is given twice")
	}
	if !d.AllArgs(&text) {
		return d.ArgErr()
	}
	n, err := strconv.Atoi(text)
	if err != nil || !slices.Contains(authTypes, n) {
		return d.WrapErr(errAuthType(text))
	}
	a.AuthType = n
	return nil
}

// addresses are the paths of which the handler serves some; what comes on others it passes on.
func (a *Authorize) addresses() caddyhttp.MatchPath {
	base := strings.TrimSuffix(a.Base, "/")
	paths := caddyhttp.MatchPath{base + "/", base + "/wx*", base + "/go", base + "/callback/*"}
	if base != "" {
		paths = append(caddyhttp.MatchPath{base}, paths...)
	}
	return paths
}

// parseAuthorize sets up wechat_authorize as one route for the addresses below its base.
func parseAuthorize(h httpcaddyfile.Helper) ([]httpcaddyfile.ConfigValue, error) {
	a := new(Authorize)
	if err := a.UnmarshalCaddyfile(h.Dispenser); err != nil {
		return nil, err
	}
	if err := fitsOption(h, a); err != nil {
		return nil, err
	}
	return []httpcaddyfile.ConfigValue{{Class: "route", Value: caddyhttp.Route{
		MatcherSetsRaw: caddyhttp.RawMatcherSets{caddy.ModuleMap{"path": h.JSON(a.addresses())}},
		HandlersRaw:    []json.RawMessage{caddyconfig.JSONModuleObject(a, "handler", "wechat_authorize", nil)},
	}}}, nil
}
