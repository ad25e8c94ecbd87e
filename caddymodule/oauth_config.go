package caddymodule

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// Defaults of a func.
const (
	defaultScope    = "snsapi_base"
	scopeUserInfo   = "snsapi_userinfo" // with which WeChat tells a user's profile
	defaultRedirect = http.StatusFound
	// trackingIDParameter is the query parameter of the tracking id.
	trackingIDParameter = "wxTkId"
)

// Func is a landing place, named in links by its key.
type Func struct {
	// Key is the funcKey of links: up to 64 letters, digits, ".", "_" and "-". Required.
	Key string `json:"key,omitempty"`
	// Prefix is the absolute http or https URL that the tracking id is added to. It has no fragment, because the
	// link's state becomes the fragment. Placeholders are resolved when the config is loaded. Required.
	Prefix string `json:"prefix,omitempty"`
	// Scope is what a link asks the user for if it does not say: snsapi_base, snsapi_userinfo or
	// snsapi_privateinfo, or several joined by commas. Default: snsapi_base.
	Scope string `json:"scope,omitempty"`
	// AppIDs are the accounts and authorizers whose users may come here. Default: all.
	AppIDs []string `json:"appids,omitempty"`
	// TTL is how long a tracking id can be redeemed. Default: 5m.
	TTL caddy.Duration `json:"ttl,omitempty"`
	// Once lets a tracking id be redeemed only once. Default: false, as often as wanted within TTL.
	Once bool `json:"once,omitempty"`
	// RedirectStatus is the status of the redirect to Prefix: 301, 302, 303, 307 or 308. None is cached.
	// Default: 302.
	RedirectStatus int `json:"redirect_status,omitempty"`

	prefix  string             // resolved, ready for the tracking id
	dampers map[string]*damper // by result
}

// provision resolves what the configuration may leave to placeholders and fills in the defaults.
func (f *Func) provision(r resolver) (err error) {
	if f.TTL == 0 {
		f.TTL = caddy.Duration(tokens.DefaultUserTTL)
	}
	if f.RedirectStatus == 0 {
		f.RedirectStatus = defaultRedirect
	}
	if f.Scope == "" {
		f.Scope = defaultScope
	}
	f.dampers = make(map[string]*damper, len(dampedResults))
	for _, result := range dampedResults {
		f.dampers[result] = new(damper)
	}
	prefix, err := r.required("prefix", f.Prefix)
	if err != nil {
		return err
	}
	if err := checkPrefix(prefix); err != nil {
		return err
	}
	switch {
	case strings.HasSuffix(prefix, "?") || strings.HasSuffix(prefix, "&"):
	case strings.Contains(prefix, "?"):
		prefix += "&"
	default:
		prefix += "?"
	}
	f.prefix = prefix + trackingIDParameter + "="
	return nil
}

// check judges all of a func but its prefix, of which a placeholder may hide something.
func (f *Func) check() error {
	if err := checkFuncKey(f.Key); err != nil {
		return err
	}
	if f.Scope != "" && !validScope(f.Scope) {
		return fmt.Errorf("unknown scope '%s': want %s", f.Scope, scopeNames)
	}
	for _, appid := range f.AppIDs {
		if err := literalAppID(appid); err != nil {
			return fmt.Errorf("appids: %w", err)
		}
	}
	if f.TTL < 0 {
		return errors.New("ttl must not be negative")
	}
	if err := checkUnit("ttl", f.TTL); err != nil {
		return err
	}
	if f.RedirectStatus != 0 && !slices.Contains(redirectStatuses, f.RedirectStatus) {
		return fmt.Errorf("redirect_status %d is no redirect: want 301, 302, 303, 307 or 308", f.RedirectStatus)
	}
	return nil
}

var (
	errNoFunc        = errors.New("no func: add a landing place, as in: func scan https://shop.example.com/scan")
	redirectStatuses = []int{301, 302, 303, 307, 308}
	scopes           = []string{defaultScope, scopeUserInfo, "snsapi_privateinfo"}
	scopeNames       = "snsapi_base, snsapi_userinfo, snsapi_privateinfo, or several joined by commas"
	funcKeyShape     = regexp.MustCompile(`^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$`)
	hostShape        = regexp.MustCompile(`^([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?$`)
	urlShape         = regexp.MustCompile("^[!-~]*$") // printable ASCII: nothing that a browser would drop or rewrite
)

func checkFuncKey(key string) error {
	if !funcKeyShape.MatchString(key) {
		return fmt.Errorf("'%s' is not a funcKey: want up to 64 letters, digits, '.', '_' and '-'", key)
	}
	return nil
}

func checkBase(base string) error {
	if base == "" {
		return errors.New("base is missing: give the path to serve below, as in /wx/thirdParty")
	}
	if strings.Contains(base, "*") {
		return fmt.Errorf("'%s': a base is a path, not a matcher: leave out the '*', everything below it is served", base)
	}
	return checkPath("base", base)
}

func checkCallback(callback string) error {
	before, withKey := strings.CutSuffix(callback, "/{funcKey}")
	switch {
	case callback == "/" || withKey && before == "":
		return errors.New("callback '/' would take every path of the site: give the path before the funcKey")
	case withKey:
		return fmt.Errorf("callback '%s': leave out /{funcKey}, and give the path before it: callback %s", callback, before)
	}
	return checkPath("callback", callback)
}

// checkCallbackBeside refuses a callback whose addresses are taken for others of the base.
func checkCallbackBeside(base, callback string) error {
	base, callback = strings.TrimSuffix(base, "/"), strings.TrimSuffix(callback, "/")
	for _, taken := range []string{base + "/authorize", base + "/authUserReceive"} {
		if callback == taken || strings.HasPrefix(callback, taken+"/") {
			return fmt.Errorf("callback '%s' is among the addresses below %s, which are not called back like that: give a path of its own", callback, taken)
		}
	}
	return nil
}

// checkRedirectOrigin judges the origin of callback addresses.
func checkRedirectOrigin(s string) error {
	u, err := url.Parse(s)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || s != u.Scheme+"://"+u.Host || !hostShape.MatchString(u.Host) {
		return fmt.Errorf("origin '%s' is not a scheme and host alone: write it like https://wx.example.com", s)
	}
	return nil
}

// checkPrefix judges where people are sent to.
func checkPrefix(s string) error {
	u, err := url.Parse(s)
	switch {
	case !urlShape.MatchString(s) || strings.Contains(s, `\`):
		return fmt.Errorf("redirect target '%s' has characters that must be percent-encoded", s)
	case err != nil:
		return fmt.Errorf("redirect target '%s' is not a URL", s)
	case u.Scheme == "" || u.Opaque != "":
		return fmt.Errorf("relative redirect target '%s': want an absolute URL, as in https://shop.example.com/scan", s)
	case u.Scheme != "http" && u.Scheme != "https":
		return fmt.Errorf("redirect target '%s' has the scheme '%s': want http or https", s, u.Scheme)
	case u.User != nil:
		return errors.New("redirect target has a user name or password in it: leave it out, visitors would see it")
	case !hostShape.MatchString(u.Host):
		return fmt.Errorf("redirect target '%s' has no host: want an absolute URL, as in https://shop.example.com/scan", s)
	case strings.Contains(s, "#"):
		return fmt.Errorf("redirect target '%s' has a fragment: leave it out, the state of the link becomes the fragment", s)
	}
	return nil
}

// validScope reports whether s is a scope or several different ones joined by commas.
func validScope(s string) bool {
	seen := make(map[string]bool, len(scopes))
	for one := range strings.SplitSeq(s, ",") {
		if !slices.Contains(scopes, one) || seen[one] {
			return false
		}
		seen[one] = true
	}
	return true
}

// hasScope reports whether one scope is among those of a comma-separated list.
func hasScope(list, one string) bool { return slices.Contains(strings.Split(list, ","), one) }

// target is where a visitor is sent. State is whatever a menu's link said, so it is escaped and kept to the fragment.
// The # is there even without a state: a browser would otherwise carry the fragment of this request over.
func (f *Func) target(trackingID, state string) string {
	return f.prefix + trackingID + "#" + url.PathEscape(state)
}

// allows reports whether users of that account may come here.
func (f *Func) allows(appid string) bool {
	return len(f.AppIDs) == 0 || slices.Contains(f.AppIDs, appid)
}
