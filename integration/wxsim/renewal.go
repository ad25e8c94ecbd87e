package wxsim

import (
	"encoding/json"
	"slices"
)

// tokenErrors are the codes after which a caller renews its token.
var tokenErrors = []int64{codeInvalidCredential, codeMalformedToken, codeTokenExpired, codeComponentExpired}

// refuse notes that a prepared fault refused the call's token, so that its holder may renew it.
func (c *call) refuse(errcode int64) {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	for _, parameter := range tokenParameters {
		cred := c.s.creds[c.query.Get(parameter)]
		if cred == nil {
			continue
		}
		c.entry.Kind, c.entry.AppID, c.entry.Platform = cred.kind, cred.appID, cred.platform
		cred.refused = cred.refused || slices.Contains(tokenErrors, errcode)
	}
}

// renewalOf names the token that the call would renew.
func (c *call) renewalOf() (holder, bool) {
	var body struct {
		AppID      string `json:"appid"`
		Component  string `json:"component_appid"`
		Authorizer string `json:"authorizer_appid"`
	}
	_ = json.Unmarshal(c.body, &body) // a broken body renews nothing and is answered later
	switch c.r.URL.Path {
	case "/cgi-bin/token":
		return holder{kind: KindAccount, appID: c.query.Get("appid")}, true
	case "/cgi-bin/stable_token":
		return holder{kind: KindStable, appID: body.AppID}, true
	case "/cgi-bin/component/api_component_token":
		return holder{KindComponent, body.Component, body.Component}, true
	case "/cgi-bin/component/api_authorizer_token":
		return holder{KindAuthorizer, body.Component, body.Authorizer}, true
	default:
		return holder{}, false
	}
}

// beginRenewal notes the start of a call that renews a token and returns its end. Two at once for
// one token is what single flight and locks between nodes are there to prevent.
func (c *call) beginRenewal() (end func()) {
	h, renews := c.renewalOf()
	if !renews {
		return func() {}
	}
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.s.renewing[h]++
	if c.s.renewing[h] > 1 {
		c.violate(RuleTwoRefreshes, "%s token of %s renewed twice at once", h.kind, h.appID)
	}
	return func() {
		c.s.mu.Lock()
		defer c.s.mu.Unlock()
		if c.s.renewing[h]--; c.s.renewing[h] == 0 {
			delete(c.s.renewing, h)
		}
	}
}
