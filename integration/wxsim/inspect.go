package wxsim

import (
	"encoding/json"
	"net/url"
	"strings"
)

// forbiddenHeaders must not leave the gateway towards WeChat.
var forbiddenHeaders = []string{
	"Cookie", "Authorization", "Proxy-Authorization", "Forwarded", "Via", "X-Real-Ip", "Idempotency-Key", "Access-Token",
}

// forbiddenPrefixes are the same, for families of headers.
var forbiddenPrefixes = []string{"X-Forwarded-", "X-Wechat-"}

// tokenParameters carry an access token in the query.
var tokenParameters = []string{"access_token", "component_access_token"}

// identityParameters say who and by what right: of two, WeChat may take either.
var identityParameters = []string{"appid", "secret", "component_appid", "code", "js_code", "refresh_token", "grant_type"}

// inspect looks at what the request carries besides its meaning.
func (c *call) inspect() {
	c.query = c.readQuery()
	if c.route.page {
		return // a browser's request
	}
	for name := range c.r.Header {
		for _, prefix := range forbiddenPrefixes {
			if strings.HasPrefix(name, prefix) {
				c.violate(RuleHeader, "header %s", name)
			}
		}
	}
	for _, name := range forbiddenHeaders {
		if len(c.r.Header[name]) > 0 {
			c.violate(RuleHeader, "header %s", name)
		}
	}
	if ae := c.r.Header.Get("Accept-Encoding"); ae != "" && ae != "identity" {
		c.note("Accept-Encoding: %s", ae)
	}
	if strings.Contains(c.r.URL.EscapedPath(), "%") || strings.Contains(c.r.URL.Path, "..") || strings.HasPrefix(c.r.URL.Path, "//") {
		c.note("path not in plain form")
	}
	given := len(c.query["access_token"]) + len(c.query["component_access_token"])
	if given > 1 {
		c.violate(RuleTokenPlace, "%d token parameters in the query", given)
	}
	if len(c.query["secret"]) > 0 && !c.route.secret {
		c.violate(RuleTokenPlace, "secret on a path that takes none")
	}
	for _, name := range identityParameters {
		if len(c.query[name]) > 1 {
			c.violate(RuleField, "%s %d times in the query", name, len(c.query[name]))
		}
	}
	c.inspectBody()
}

// readQuery reads the query leniently, noting keys in their order.
func (c *call) readQuery() url.Values {
	values := url.Values{}
	for part := range strings.SplitSeq(c.r.URL.RawQuery, "&") {
		if part == "" {
			continue
		}
		key, value, _ := strings.Cut(part, "=")
		k, err1 := url.QueryUnescape(key)
		v, err2 := url.QueryUnescape(value)
		if err1 != nil || err2 != nil {
			c.note("bad escape in query")
			continue
		}
		c.entry.QueryKeys = append(c.entry.QueryKeys, k)
		values.Add(k, v)
	}
	return values
}

// inspectBody looks for access tokens where none belongs.
func (c *call) inspectBody() {
	if len(c.body) == 0 || c.body[0] != '{' {
		return
	}
	var v any
	if json.Unmarshal(c.body, &v) != nil {
		return // answered with 47001 where JSON is wanted
	}
	if object, ok := v.(map[string]any); ok {
		for _, key := range tokenParameters {
			if _, present := object[key]; present {
				c.violate(RuleTokenPlace, "%s in the body", key)
			}
		}
	}
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.walk(v)
}

func (c *call) walk(v any) {
	switch v := v.(type) {
	case map[string]any:
		for _, child := range v {
			c.walk(child)
		}
	case []any:
		for _, child := range v {
			c.walk(child)
		}
	case string:
		if !c.route.precious && c.s.isAppSecret(v) {
			c.violate(RuleTokenPlace, "an AppSecret in the body of a call that takes none")
		}
		cred := c.s.creds[v]
		if cred == nil {
			return
		}
		switch cred.kind {
		case KindComponent, KindAuthorizer, KindAccount, KindStable, KindUser, KindUserRefresh:
			c.violate(RuleTokenPlace, "%s token in the body", cred.kind)
		case KindTicket, KindRefresh:
			if !c.route.precious {
				c.violate(RuleTokenPlace, "%s in the body of a call that takes none", cred.kind)
			}
		default:
		}
	}
}

// authenticate takes the token out of the query and checks that the path takes it, returning
// an errcode. The caller holds mu.
func (c *call) authenticate() int64 {
	rt := c.route
	value := c.query.Get("access_token")
	parameter := "access_token"
	if rt.named {
		value = ""
	}
	if v := c.query.Get("component_access_token"); v != "" && (value == "" || rt.needs == needComponent) {
		value, parameter = v, "component_access_token"
	}
	if rt.needs == needNone {
		if value != "" {
			c.violate(RuleTokenPlace, "%s on a path that takes none", parameter)
		}
		return 0
	}
	// A user's token is the app's own: what is wrong with it is the app's doing.
	own := rt.needs != needUser
	if value == "" && (!own || rt.probed) {
		return 41001
	}
	if value == "" {
		c.violate(RuleTokenPlace, "no token on a path that takes one")
		if rt.needs == needComponent {
			return 41021
		}
		return 41001
	}
	if parameter == "component_access_token" && rt.needs != needComponent && rt.needs != needEither {
		c.violate(RuleTokenPlace, "component_access_token on a path that takes access_token")
		return 41001
	}
	cred, code := c.s.tokenByValue(value)
	if cred == nil {
		if own {
			c.violate(RuleUnknownToken, "token never issued")
		}
		return code
	}
	c.cred = cred
	c.entry.Kind, c.entry.AppID, c.entry.Platform = cred.kind, cred.appID, cred.platform
	if wrong := rt.wrongKind(cred.kind); wrong != 0 {
		c.violate(RuleTokenKind, "%s token", cred.kind)
		return wrong
	}
	return code
}

// wrongKind returns the errcode for a token of this kind on the path, 0 when it is right.
func (rt route) wrongKind(kind Kind) int64 {
	biz := kind == KindAuthorizer || kind == KindAccount || kind == KindStable
	switch {
	case rt.needs == needComponent && kind == KindComponent,
		rt.needs == needAccount && biz,
		rt.needs == needEither && (biz || kind == KindComponent),
		rt.needs == needUser && kind == KindUser:
		return 0
	case rt.needs == needComponent && biz && !rt.text:
		return 61014
	case rt.needs == needAccount && kind == KindComponent:
		return 61015
	default:
		return codeInvalidCredential
	}
}

// overQuota counts the call. The caller holds mu.
func (c *call) overQuota() bool { return c.s.count(c.r.URL.Path, c.cred.appID) }

// count adds one call of path for appID and reports whether the quota is used up. The caller holds mu.
func (s *Server) count(path, appID string) bool {
	key := [2]string{path, appID}
	s.used[key]++
	quota := s.cfg.Quotas[path]
	return quota > 0 && s.used[key] > quota
}

// isAppSecret reports whether a text is the AppSecret of a platform or an account. The caller holds mu.
func (s *Server) isAppSecret(text string) bool {
	for _, p := range s.platforms {
		if p.Secret != "" && p.Secret == text {
			return true
		}
	}
	for _, a := range s.accounts {
		if a.Secret != "" && a.Secret == text {
			return true
		}
	}
	return false
}
