package caddymodule

import "net/http"

// Cookies bind logins and authorizations to the browser where they began. Over https their names begin with hostCookie:
// browsers then take them from this very host, over https and for all of its paths alone, so that no page and no server of
// a sibling host can plant one or put its own in front of ours. Whatever told apart what paths cannot is in the name. Over
// http there is nothing of the kind.
const (
	hostCookie = "__Host-"
	// maxCookieCopies of one cookie are looked at: a browser also sends those of other paths and of the parent domain.
	maxCookieCopies = 4
)

// cookieValues are the values that a browser has for a cookie, as far as they are looked at.
func cookieValues(r *http.Request, name string, ok func(string) bool) (values []string) {
	for _, c := range r.CookiesNamed(name) {
		if ok(c.Value) && len(values) < maxCookieCopies {
			values = append(values, c.Value)
		}
	}
	return values
}

// anyValue is for cookies whose values say themselves whether they are ours.
func anyValue(string) bool { return true }
