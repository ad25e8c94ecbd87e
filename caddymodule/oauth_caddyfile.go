package caddymodule

import (
	"encoding/json"
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
//	wechat_oauth <base> {
//		origin        <url>
//		platform      <appid>
//		callback      <path>
//		require_start
//		bad_codes     <number>|off
//		max_in_flight <number>
//		func <key> <prefix> {
//			scope           <scope>
//			appids          <appid>...
//			ttl             <duration>
//			once
//			redirect_status <status>
//		}
//	}
//
// The base is a path, not a matcher.
func (o *OAuth) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if !d.AllArgs(&o.Base) {
		return d.Err("want exactly one argument, the base path, as in: wechat_oauth /wx/thirdParty { … }")
	}
	if err := checkBase(o.Base); err != nil {
		return d.WrapErr(err)
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		var err error
		switch option := d.Val(); option {
		case "origin":
			err = argumentOnce(d, &o.Origin, unlessPlaceholder(checkRedirectOrigin))
		case "platform":
			err = argumentOnce(d, &o.Platform, literalAppID)
		case "callback":
			err = argumentOnce(d, &o.Callback, checkCallback)
		case "require_start":
			err = flagOnce(d, &o.RequireStart)
		case "bad_codes":
			err = o.unmarshalBadCodes(d)
		case "max_in_flight":
			if err = number(d, &o.MaxInFlight); err == nil && o.MaxInFlight > maxMaxInFlight {
				err = d.Errf("max_in_flight: at most %d", maxMaxInFlight)
			}
		case "func":
			err = o.unmarshalFunc(d)
		default:
			err = d.Errf("unknown subdirective '%s': want origin, platform, callback, require_start, bad_codes, max_in_flight or func", option)
		}
		if err != nil {
			return err
		}
	}
	if len(o.Funcs) == 0 {
		return d.WrapErr(errNoFunc)
	}
	if o.Callback == "" {
		return nil
	}
	if err := checkCallbackBeside(o.Base, o.Callback); err != nil {
		return d.WrapErr(err)
	}
	return nil
}

func (o *OAuth) unmarshalBadCodes(d *caddyfile.Dispenser) error {
	var text string
	if o.BadCodes != 0 {
		return d.Err("bad_codes is given twice")
	}
	if !d.AllArgs(&text) {
		return d.ArgErr()
	}
	if text == "off" {
		o.BadCodes = anyBadCodes
		return nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 || n > maxBadCodes {
		return d.Errf("bad_codes: '%s' is neither a number from 1 to %d nor off", text, maxBadCodes)
	}
	o.BadCodes = n
	return nil
}

// argumentOnce parses a subdirective with one argument.
func argumentOnce(d *caddyfile.Dispenser, into *string, check func(string) error) error {
	name := d.Val()
	if *into != "" {
		return d.Errf("%s is given twice", name)
	}
	if !d.AllArgs(into) {
		return d.ArgErr()
	}
	if err := check(*into); err != nil {
		return d.WrapErr(err)
	}
	return nil
}

// flagOnce parses a subdirective without arguments.
func flagOnce(d *caddyfile.Dispenser, into *bool) error {
	name := d.Val()
	if *into {
		return d.Errf("%s is given twice", name)
	}
	if d.NextArg() {
		return d.ArgErr()
	}
	*into = true
	return nil
}

// unlessPlaceholder leaves to the time of loading what cannot be judged before.
func unlessPlaceholder(check func(string) error) func(string) error {
	return func(s string) error {
		if hasPlaceholder(s) {
			return nil
		}
		return check(s)
	}
}

func (o *OAuth) unmarshalFunc(d *caddyfile.Dispenser) error {
	f := new(Func)
	if !d.AllArgs(&f.Key, &f.Prefix) {
		return d.Err("func wants a key and a redirect target, as in: func scan https://shop.example.com/scan")
	}
	for _, other := range o.Funcs {
		if other.Key == f.Key {
			return d.Errf("func '%s' is given twice", f.Key)
		}
	}
	if err := f.check(); err != nil {
		return d.WrapErr(err)
	}
	if err := unlessPlaceholder(checkPrefix)(f.Prefix); err != nil {
		return d.WrapErr(err)
	}
	o.Funcs = append(o.Funcs, f)
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		if err := f.unmarshalOption(d); err != nil {
			return err
		}
		if err := f.check(); err != nil {
			return d.WrapErr(err)
		}
	}
	return nil
}

func (f *Func) unmarshalOption(d *caddyfile.Dispenser) error {
	switch option := d.Val(); option {
	case "scope":
		if f.Scope != "" {
			return d.Err("scope is given twice: join several with commas")
		}
		if !d.AllArgs(&f.Scope) {
			return d.ArgErr()
		}
	case "appids":
		if len(f.AppIDs) > 0 {
			return d.Err("appids is given twice: list all in one line")
		}
		if f.AppIDs = d.RemainingArgs(); len(f.AppIDs) == 0 {
			return d.ArgErr()
		}
	case "ttl":
		return duration(d, &f.TTL)
	case "once":
		return flagOnce(d, &f.Once)
	case "redirect_status":
		var text string
		if f.RedirectStatus != 0 {
			return d.Err("redirect_status is given twice")
		}
		if !d.AllArgs(&text) {
			return d.ArgErr()
		}
		status, err := strconv.Atoi(text)
		if err != nil || status == 0 {
			return d.Errf("redirect_status '%s' is not a status: write it like 302", text)
		}
		f.RedirectStatus = status
	default:
		return d.Errf("unknown subdirective '%s' of func: want scope, appids, ttl, once or redirect_status", option)
	}
	return nil
}

// addresses are the paths that the handler serves; what comes on others it passes on.
func (o *OAuth) addresses() caddyhttp.MatchPath {
	base := strings.TrimSuffix(o.Base, "/")
	paths := caddyhttp.MatchPath{base + "/authorize/*", base + "/authUserReceive/*"}
	if o.Callback != "" {
		paths = append(paths, strings.TrimSuffix(o.Callback, "/")+"/*")
	}
	return paths
}

// parseOAuth sets up wechat_oauth as one route for the addresses below its base and, if there is one, the callback.
func parseOAuth(h httpcaddyfile.Helper) ([]httpcaddyfile.ConfigValue, error) {
	o := new(OAuth)
	if err := o.UnmarshalCaddyfile(h.Dispenser); err != nil {
		return nil, err
	}
	if err := fitsOption(h, o); err != nil {
		return nil, err
	}
	return []httpcaddyfile.ConfigValue{{Class: "route", Value: caddyhttp.Route{
		MatcherSetsRaw: caddyhttp.RawMatcherSets{caddy.ModuleMap{"path": h.JSON(o.addresses())}},
		HandlersRaw:    []json.RawMessage{caddyconfig.JSONModuleObject(o, "handler", "wechat_oauth", nil)},
	}}}, nil
}
