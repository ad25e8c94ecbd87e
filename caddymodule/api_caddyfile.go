package caddymodule

import (
	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// parseAPI parses the directive wechat_api.
func parseAPI(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	a := new(API)
	if err := a.UnmarshalCaddyfile(h.Dispenser); err != nil {
		return nil, err
	}
	return a, nil
}

// UnmarshalCaddyfile sets up the handler from the directive:
//
//	wechat_api [<matcher>] {
//		repeat_buffer           <size>
//		trust_loopback
//		response_header_timeout <duration>
//		stall_timeout           <duration>
//	}
func (a *API) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the directive's name
	if d.NextArg() {
		return d.ArgErr()
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		switch d.Val() {
		case "repeat_buffer":
			if err := size(d, &a.RepeatBuffer); err != nil {
				return err
			}
		case "trust_loopback":
			if a.TrustLoopback {
				return d.Err("trust_loopback is given twice")
			}
			if d.NextArg() {
				return d.ArgErr()
			}
			a.TrustLoopback = true
		case "response_header_timeout":
			if err := apiTimeout(d, &a.ResponseHeaderTimeout); err != nil {
				return err
			}
		case "stall_timeout":
			if err := apiTimeout(d, &a.StallTimeout); err != nil {
				return err
			}
		default:
			return d.Errf("unknown subdirective '%s': want repeat_buffer, trust_loopback, response_header_timeout or stall_timeout", d.Val())
		}
	}
	return nil
}

func apiTimeout(d *caddyfile.Dispenser, into *caddy.Duration) error {
	name := d.Val()
	if err := duration(d, into); err != nil {
		return err
	}
	if err := checkAPITimeout(name, *into); err != nil {
		return d.WrapErr(err)
	}
	return nil
}

var _ caddyfile.Unmarshaler = (*API)(nil)
