package caddymodule

import (
	"encoding/json"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// UnmarshalCaddyfile parses the directive:
//
//	wechat_jssdk <base> {
//		hosts <pattern>...
//	}
//
// The base is a path, not a matcher.
func (j *JSSDK) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if !d.AllArgs(&j.Base) {
		return d.Err("want exactly one argument, the base path, as in: wechat_jssdk /wx/jssdk { … }")
	}
	if err := checkJSSDKBase(j.Base); err != nil {
		return d.WrapErr(err)
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		switch option := d.Val(); option {
		case "hosts":
			if len(j.Hosts) > 0 {
				return d.Err("hosts is given twice: list all in one line")
			}
			if j.Hosts = d.RemainingArgs(); len(j.Hosts) == 0 {
				return d.ArgErr()
			}
			for i, host := range j.Hosts {
				if err := unlessPlaceholder(literalHostPattern)(host); err != nil {
					return d.WrapErr(err)
				}
				if slices.Contains(j.Hosts[:i], host) {
					return d.Errf("host '%s' is listed twice", host)
				}
			}
		default:
			return d.Errf("unknown subdirective '%s': want hosts", option)
		}
		if d.NextBlock(d.Nesting()) {
			return d.Err("hosts takes no block")
		}
	}
	if len(j.Hosts) == 0 {
		return d.WrapErr(errNoHosts)
	}
	return nil
}

// addresses are the paths that the handler serves; what comes on others it passes on.
func (j *JSSDK) addresses() caddyhttp.MatchPath {
	return caddyhttp.MatchPath{strings.TrimSuffix(j.Base, "/") + "/*"}
}

// parseJSSDK sets up wechat_jssdk as one route for all below its base.
func parseJSSDK(h httpcaddyfile.Helper) ([]httpcaddyfile.ConfigValue, error) {
	j := new(JSSDK)
	if err := j.UnmarshalCaddyfile(h.Dispenser); err != nil {
		return nil, err
	}
	return []httpcaddyfile.ConfigValue{{Class: "route", Value: caddyhttp.Route{
		MatcherSetsRaw: caddyhttp.RawMatcherSets{caddy.ModuleMap{"path": h.JSON(j.addresses())}},
		HandlersRaw:    []json.RawMessage{caddyconfig.JSONModuleObject(j, "handler", "wechat_jssdk", nil)},
	}}}, nil
}
