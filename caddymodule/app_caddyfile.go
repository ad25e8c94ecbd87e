package caddymodule

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
)

// parseApp parses the global option wechat.
func parseApp(d *caddyfile.Dispenser, existing any) (any, error) {
	if existing != nil {
		d.Next()
		return nil, d.Err("the option wechat is given twice: put everything into one wechat { } block")
	}
	app := new(App)
	if err := app.UnmarshalCaddyfile(d); err != nil {
		return nil, err
	}
	return httpcaddyfile.App{Name: "wechat", Value: caddyconfig.JSON(app, nil)}, nil
}

// fitting is a handler that the app may not fit.
type fitting interface {
	// fits refuses what makes no sense with an app, by what its configuration says literally.
	fits(app *App) error
}

// fitsOption is fits for the Caddyfile that is being adapted, so that a mistake is reported with its place. Without the
// global option there is nothing to compare with.
func fitsOption(h httpcaddyfile.Helper, handler fitting) error {
	option, ok := h.Option("wechat").(httpcaddyfile.App)
	if !ok {
		return nil
	}
	app := new(App)
	if err := json.Unmarshal(option.Value, app); err != nil {
		return h.WrapErr(err)
	}
	if err := handler.fits(app); err != nil {
		return h.WrapErr(err)
	}
	return nil
}

// UnmarshalCaddyfile sets up the app from the global option:
//
//	wechat {
//		platform <appid> {
//			secret        <secret>
//			token         <token>...
//			aes_key       <new> [<old>...]
//			release_check on|off
//		}
//		account <appid> {
//			secret  <secret>
//			token   <token>...
//			aes_key <new> [<old>...]
//			mode    plain|compat|safe
//		}
//		client <name> {
//			key        <key>...
//			key_sha256 <hex>...
//			appids     <appid>...|*
//			paths      <pattern>...
//		}
//		store    <module> { ... }
//		seal_key <new> [<old>...]
//		api      <origin> [<backup origin>...]
//		open     <origin>
//		proxy    <url>
//		spill    <folder>
//		max_answers    <size>
//		max_identities <number>
//	}
//
// platform, account and client may be repeated; appids and paths may be repeated within a client and add up.
func (a *App) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if d.NextArg() {
		return d.ArgErr()
	}
	named := make(map[string]string) // appid or client name -> what it is
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		var err error
		switch d.Val() {
		case "platform":
			err = a.unmarshalPlatform(d, named)
		case "account":
			err = a.unmarshalAccount(d, named)
		case "client":
			err = a.unmarshalClient(d, named)
		case "store":
			err = a.unmarshalStore(d)
		case "seal_key":
			err = list(d, &a.SealKeys, once, literalSealKey)
		case "api":
			err = list(d, &a.API, once, literalOrigin)
		case "open":
			err = value(d, &a.Open, literalOrigin)
		case "proxy":
			err = value(d, &a.Proxy, literalProxy)
		case "spill":
			err = value(d, &a.Spill, literalFolder)
		case "max_answers":
			err = size(d, &a.MaxAnswers)
		case "max_identities":
			err = number(d, &a.MaxIdentities)
		default:
			err = d.Errf("unknown subdirective '%s': want platform, account, client, store, seal_key, api, open, proxy, spill, max_answers or max_identities", d.Val())
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// opening reads `<name> <arg> {` of a named block and refuses a name that is taken.
func opening(d *caddyfile.Dispenser, named map[string]string, check func(string) error) (string, error) {
	what := d.Val()
	var name string
	if !d.AllArgs(&name) {
		return "", d.ArgErr()
	}
	if err := check(name); err != nil {
		return "", d.WrapErr(err)
	}
	key := name
	if what == "client" {
		key = "client " + name
	}
	if other, taken := named[key]; taken {
		article := "a"
		if other == "account" {
			article = "an"
		}
		return "", d.Errf("%s %s: there already is %s %s of that name: put everything about it into one block", what, name, article, other)
	}
	named[key] = what
	return name, nil
}

func (a *App) unmarshalPlatform(d *caddyfile.Dispenser, named map[string]string) error {
	appid, err := opening(d, named, literalAppID)
	if err != nil {
		return err
	}
	p := &Platform{AppID: appid}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		switch d.Val() {
		case "secret":
			err = value(d, &p.Secret, literalSecret)
		case "token":
			err = list(d, &p.Tokens, once, literalSecret)
		case "aes_key":
			err = list(d, &p.AESKeys, once, literalAESKey)
		case "release_check":
			err = onOff(d, &p.ReleaseCheck)
		default:
			err = d.Errf("unknown subdirective '%s' of platform: want secret, token, aes_key or release_check", d.Val())
		}
		if err != nil {
			return err
		}
	}
	if err := p.complete(); err != nil {
		return d.Errf("platform %s: %v", appid, err)
	}
	a.Platforms = append(a.Platforms, p)
	return nil
}

func (a *App) unmarshalAccount(d *caddyfile.Dispenser, named map[string]string) error {
	appid, err := opening(d, named, literalAppID)
	if err != nil {
		return err
	}
	acc := &Account{AppID: appid}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		switch d.Val() {
		case "secret":
			err = value(d, &acc.Secret, literalSecret)
		case "token":
			err = list(d, &acc.Tokens, once, literalSecret)
		case "aes_key":
			err = list(d, &acc.AESKeys, once, literalAESKey)
		case "mode":
			err = value(d, &acc.Mode, nil)
		default:
			err = d.Errf("unknown subdirective '%s' of account: want secret, token, aes_key or mode", d.Val())
		}
		if err != nil {
			return err
		}
	}
	if err := acc.complete(); err != nil {
		return d.Errf("account %s: %v", appid, err)
	}
	a.Accounts = append(a.Accounts, acc)
	return nil
}

func (a *App) unmarshalClient(d *caddyfile.Dispenser, named map[string]string) error {
	name, err := opening(d, named, literalClientName)
	if err != nil {
		return err
	}
	c := &Client{Name: name}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		switch d.Val() {
		case "key":
			err = list(d, &c.Keys, once, literalKey)
		case "key_sha256":
			err = list(d, &c.KeySHA256, once, literalKeySHA256)
		case "appids":
			err = list(d, &c.AppIDs, adding, func(s string) error {
				if s == "*" {
					return nil
				}
				return literalAppID(s)
			})
		case "paths":
			err = list(d, &c.Paths, adding, literalPathPattern)
		default:
			err = d.Errf("unknown subdirective '%s' of client: want key, key_sha256, appids or paths", d.Val())
		}
		if err != nil {
			return err
		}
	}
	if err := c.complete(); err != nil {
		return d.Errf("client %s: %v", name, err)
	}
	for _, other := range a.Clients {
		if shareLiteralKey(c, other) {
			return d.WrapErr(errSharedKey(name, other.Name))
		}
	}
	a.Clients = append(a.Clients, c)
	return nil
}

// shareLiteralKey reports whether two clients have a key that both write out, be it as its sum. A placeholder that is in both may
// resolve to nothing in both.
func shareLiteralKey(c, other *Client) bool {
	sums := c.literalSums()
	return slices.ContainsFunc(other.literalSums(), func(sum [sha256.Size]byte) bool { return slices.Contains(sums, sum) })
}

// literalSums are the sums of the keys that no placeholder hides, which have been found to be of the right form.
func (c *Client) literalSums() (sums [][sha256.Size]byte) {
	for _, key := range c.Keys {
		if !hasPlaceholder(key) {
			sums = append(sums, sha256.Sum256([]byte(key)))
		}
	}
	for _, text := range c.KeySHA256 {
		if !hasPlaceholder(text) {
			var sum [sha256.Size]byte
			_, _ = hex.Decode(sum[:], []byte(text))
			sums = append(sums, sum)
		}
	}
	return sums
}

func (a *App) unmarshalStore(d *caddyfile.Dispenser) error {
	if a.StoreRaw != nil {
		return d.Err("store is given twice")
	}
	if !d.NextArg() {
		return d.ArgErr()
	}
	name := d.Val()
	unm, err := caddyfile.UnmarshalModule(d, "wechat.stores."+name)
	switch {
	case err != nil && name != "caddy" && name != "redis":
		return fmt.Errorf("store: want caddy or redis, or the name of a module: %w", err)
	case err != nil:
		return err
	}
	store, ok := unm.(StoreModule)
	if !ok {
		return d.Errf("module wechat.stores.%s is a %T, not a store", name, unm)
	}
	a.StoreRaw = caddyconfig.JSONModuleObject(store, "module", name, nil)
	return nil
}

// A subdirective with a list may be given once, or its occurrences add up.
const (
	once   = false
	adding = true
)

// list parses a subdirective of one or more arguments, each of which check accepts.
func list(d *caddyfile.Dispenser, into *[]string, repeats bool, check func(string) error) error {
	name := d.Val()
	if len(*into) > 0 && !repeats {
		return d.Errf("%s is given twice: write all values on one line, the newest first", name)
	}
	args := d.RemainingArgs()
	if len(args) == 0 {
		return d.ArgErr()
	}
	for _, arg := range args {
		if arg == "" {
			return d.Errf("%s: an empty value: write a value or a placeholder such as {env.NAME}", name)
		}
		if check == nil {
			continue
		}
		if err := check(arg); err != nil {
			return d.Errf("%s: %v", name, err)
		}
	}
	*into = append(*into, args...)
	return nil
}

// value parses a subdirective of exactly one argument that check accepts.
func value(d *caddyfile.Dispenser, into *string, check func(string) error) error {
	name := d.Val()
	if *into != "" {
		return d.Errf("%s is given twice", name)
	}
	if !d.AllArgs(into) {
		return d.ArgErr()
	}
	if *into == "" {
		return d.Errf("%s: an empty value: write a value or a placeholder such as {env.NAME}", name)
	}
	if check == nil {
		return nil
	}
	if err := check(*into); err != nil {
		return d.Errf("%s: %v", name, err)
	}
	return nil
}

// onOff parses a subdirective that is on or off.
func onOff(d *caddyfile.Dispenser, into **bool) error {
	name := d.Val()
	if *into != nil {
		return d.Errf("%s is given twice", name)
	}
	var arg string
	if !d.AllArgs(&arg) {
		return d.ArgErr()
	}
	on := arg == "on"
	if !on && arg != "off" {
		return d.Errf("%s: '%s' is neither on nor off", name, arg)
	}
	*into = &on
	return nil
}

var _ caddyfile.Unmarshaler = (*App)(nil)
