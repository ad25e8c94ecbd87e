package caddymodule

import (
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
//		repeat_buffer  <size>
//		trust_loopback
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
		default:
			return d.Errf("unknown subdirective '%s': want repeat_buffer or trust_loopback", d.Val())
		}
	}
	return nil
}

var _ caddyfile.Unmarshaler = (*API)(nil)
