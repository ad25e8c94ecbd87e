package caddymodule

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// anyAppID in a client's appids means all accounts and authorizers, and no platform.
const anyAppID = "*"

// guardedPaths are not covered by the default of a client without paths: they change a platform, and so all of its
// authorizers at once. A client that needs one lists it.
var guardedPaths = []string{
	componentRoot + "api_confirm_authorization",
	componentRoot + "modify_wxa_server_domain",
	componentRoot + "modify_wxa_jump_domain",
}

// loopbackClient is who calls from this machine without a credential, where trust_loopback allows it.
var loopbackClient = &Client{Name: "loopback", AppIDs: []string{anyAppID}}

// literalClientName refuses a client's name that could not be told from callers without one, that does not fit into
// the tokens given out to the client, or that cannot stand in a log line and a metric's label.
func literalClientName(name string) error {
	switch {
	case name == loopbackClient.Name:
		return fmt.Errorf("the name %s is taken: it stands for callers that trust_loopback admits", name)
	case len(name) > tokens.MaxOpaqueName:
		return fmt.Errorf("the name has %d bytes: give one of at most %d", len(name), tokens.MaxOpaqueName)
	case !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl):
		return errors.New("the name has control characters in it, or is not UTF-8")
	}
	return nil
}

// mayUse reports whether the client may act for an appid. A platform must be listed by name.
func (c *Client) mayUse(appid string, platform bool) bool {
	return slices.Contains(c.AppIDs, appid) || !platform && slices.Contains(c.AppIDs, anyAppID)
}

// mayCall reports whether the client may call a path of WeChat's API. In a pattern, * stands for any text.
func (c *Client) mayCall(path string) bool {
	if len(c.Paths) == 0 {
		return !slices.Contains(guardedPaths, strings.ToLower(path))
	}
	return slices.ContainsFunc(c.Paths, func(pattern string) bool { return matchPattern(pattern, path) })
}

// literalPathPattern refuses a pattern that matches no path in the one spelling in which paths are matched: who wrote
// it meant to allow something.
func literalPathPattern(pattern string) error {
	if !strings.HasPrefix(pattern, "/") {
		return fmt.Errorf("'%s' must begin with /", pattern)
	}
	example := strings.ReplaceAll(pattern, "*", "x")
	appid, _ := appIDPrefix(pattern)
	canonical, err := canonicalPath(example)
	switch {
	case err != nil:
		return fmt.Errorf("'%s' matches nothing: %w", pattern, err)
	case strings.HasSuffix(pattern, "/"):
		return fmt.Errorf("'%s' matches nothing, since paths are matched without a / at their end: '%s*' is all below it", pattern, pattern)
	case canonical != example:
		return fmt.Errorf("'%s' matches nothing, since paths are matched with one / at their start", pattern)
	case appid != "":
		return fmt.Errorf("'%s' matches nothing, since paths are matched without the appid: list that in appids", pattern)
	}
	return nil
}

// matchPattern reports whether path is pattern, with each * in it standing for any text, slashes too.
func matchPattern(pattern, path string) bool {
	start, rest, found := strings.Cut(pattern, "*")
	if !found {
		return path == pattern
	}
	path, ok := strings.CutPrefix(path, start)
	for ok {
		var part string
		if part, rest, found = strings.Cut(rest, "*"); !found {
			return strings.HasSuffix(path, part)
		}
		_, path, ok = strings.Cut(path, part)
	}
	return false
}

// clientKeys are all keys of all clients, as hashes.
type clientKeys []clientKey

type clientKey struct {
	hash        [sha256.Size]byte
	fingerprint string
	client      *Client
}

func newClientKeys(clients []*Client) clientKeys {
	var keys clientKeys
	for _, c := range clients {
		for _, k := range c.keys {
			hash := sha256.Sum256([]byte(k.Reveal()))
			keys = append(keys, clientKey{hash, fingerprintOf(hash), c})
		}
		for _, hash := range c.keyHashes {
			keys = append(keys, clientKey{hash, fingerprintOf(hash), c})
		}
	}
	return keys
}

// find returns whose key that is, and the key's fingerprint; nil if nobody's. The time it takes does not depend on the
// key: all are compared, always.
func (keys clientKeys) find(key string) (owner *Client, fingerprint string) {
	hash := sha256.Sum256([]byte(key))
	for i := range keys {
		if subtle.ConstantTimeCompare(hash[:], keys[i].hash[:]) == 1 && key != "" {
			owner, fingerprint = keys[i].client, keys[i].fingerprint
		}
	}
	return owner, fingerprint
}

// holder returns the client of that name. current is false if the key of that fingerprint is not one of its keys, any
// more; the client is nil if there is none of that name.
func (keys clientKeys) holder(name, fingerprint string) (owner *Client, current bool) {
	for i := range keys {
		if keys[i].client.Name != name {
			continue
		}
		owner = keys[i].client
		current = current || keys[i].fingerprint == fingerprint
	}
	return owner, current
}

// fingerprintOf names a key within the gateway. It travels only inside sealed tokens.
func fingerprintOf(hash [sha256.Size]byte) string { return hex.EncodeToString(hash[:8]) }

// isTrustedLoopback reports whether a request comes from a program on this machine: straight from a loopback address,
// not through a proxy on it, and not from a web page in a browser on it.
func isTrustedLoopback(r *http.Request) bool {
	if !isOwnHost(r.Host) || !isDirectLoopback(r) {
		return false
	}
	for name := range r.Header {
		if name == "Origin" || strings.HasPrefix(name, "Sec-Fetch-") {
			return false
		}
	}
	return true
}

// isDirectLoopback reports whether a request comes straight from a loopback address: not through a proxy on this machine,
// which says so in a header.
func isDirectLoopback(r *http.Request) bool {
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil || !peer.Addr().Unmap().IsLoopback() {
		return false
	}
	for name := range r.Header {
		if name == "Forwarded" || name == "X-Real-Ip" || name == "Via" || strings.HasPrefix(name, "X-Forwarded-") {
			return false
		}
	}
	return true
}

// wechatHosts ends the names of WeChat's API hosts, which an SDK keeps that is led here by a hosts file.
const wechatHosts = ".weixin.qq.com"

// isOwnHost reports whether a Host, with or without a port, is this machine or WeChat's. A web page's own name, which
// its owner let resolve to this machine, is neither.
func isOwnHost(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	host = strings.ToLower(strings.TrimSuffix(strings.TrimPrefix(host, "["), "]"))
	return tokens.IsLoopbackHost(host) || strings.HasSuffix(host, wechatHosts)
}

// target decides whose token a call takes and whether the client may have it used, for the appid that the caller names.
func (a *API) target(req *apiRequest, use tokenUse) (tokens.Key, *apiRefusal) {
	c, appid := req.client, req.appid
	if a.app.platform(appid) != nil {
		switch {
		case !c.mayUse(appid, true):
			return tokens.Key{}, forbiddenAppID(c, appid)
		case use == useComponent, use == useEither:
			return tokens.ComponentKey(appid), nil
		}
		return tokens.Key{}, refuse(http.StatusOK, codeNeedAccount, "token kind",
			"must use biz account token, not component: this API is for an account, and %s is a platform", appid)
	}
	if a.app.account(appid) != nil && req.platform == "" {
		switch {
		case !c.mayUse(appid, false):
			return tokens.Key{}, forbiddenAppID(c, appid)
		case use == useComponent:
			return tokens.Key{}, refuse(http.StatusOK, codeNeedComponent, "token kind",
				"must use component token for component api: %s is a plain account", appid)
		}
		return tokens.AccountKey(appid), nil
	}
	platform, refused := a.platformFor(req)
	switch {
	case refused != nil:
		return tokens.Key{}, refused
	case use != useComponent:
		return tokens.AuthorizerKey(platform, appid), nil
	case !c.mayUse(platform, true):
		return tokens.Key{}, refuse(http.StatusForbidden, codeUnauthorizedAPI, "platform",
			"api unauthorized: this API takes the token of platform %s, which the appids of client %s do not list", platform, c.Name)
	}
	return tokens.ComponentKey(platform), nil
}

// platformFor returns the platform through which the client may act for an authorizer: the one that the caller's token
// is for, or else the first that the client lists and that holds an authorization, or else the first of all. A client
// that lists a platform may act for each of its authorizers, as a component token can. One for which a
// code of the account is being exchanged is waited for only if no other will do.
func (a *API) platformFor(req *apiRequest) (string, *apiRefusal) {
	ctx, c, appid := req.Context(), req.client, req.appid
	listed := c.mayUse(appid, false)
	if req.platform != "" {
		if !listed && !c.mayUse(req.platform, true) {
			return "", forbiddenAppID(c, appid)
		}
		if err := a.holds(ctx, req.platform, appid); err != nil {
			return "", tokenRefusal(err, appid, req.form.sdk())
		}
		return req.platform, nil
	}
	var awaited []string
	for _, p := range a.app.Platforms {
		if !c.mayUse(p.AppID, true) {
			continue
		}
		err := a.holdsAtOnce(ctx, p.AppID, appid)
		switch {
		case err == nil:
			return p.AppID, nil
		case errors.Is(err, tokens.ErrAuthorizing):
			awaited = append(awaited, p.AppID)
		case !errors.Is(err, tokens.ErrNotAuthorized):
			return "", tokenRefusal(err, appid, false)
		}
	}
	if !listed {
		for _, platform := range awaited {
			err := a.holds(ctx, platform, appid)
			switch {
			case err == nil:
				return platform, nil
			case !errors.Is(err, tokens.ErrNotAuthorized):
				return "", tokenRefusal(err, appid, false)
			}
		}
		return "", forbiddenAppID(c, appid)
	}
	platform, err := lasting(a.app, func(m *tokens.Manager) (string, error) { return m.PlatformOf(ctx, appid) })
	switch {
	case err == nil:
		return platform, nil
	case len(a.app.Platforms) == 0 && errors.Is(err, tokens.ErrNotAuthorized):
		return "", tokenRefusal(tokens.ErrNotConfigured, appid, false)
	}
	return "", tokenRefusal(err, appid, false)
}

// holds returns no error if a platform holds an authorization of the account.
func (a *API) holds(ctx context.Context, platform, appid string) error {
	_, err := lasting(a.app, func(m *tokens.Manager) (tokens.Authorizer, error) { return m.Authorizer(ctx, platform, appid) })
	return err
}

// holdsAtOnce is holds, but waits for no exchange of a code.
func (a *API) holdsAtOnce(ctx context.Context, platform, appid string) error {
	_, err := lasting(a.app, func(m *tokens.Manager) (tokens.Authorizer, error) { return m.AuthorizerAtOnce(ctx, platform, appid) })
	return err
}

func forbiddenAppID(c *Client, appid string) *apiRefusal {
	return refuse(http.StatusForbidden, codeUnauthorizedAPI, "appids",
		"api unauthorized: the appids of client %s do not list %s", c.Name, appid)
}

func forbiddenPath(c *Client, path string) *apiRefusal {
	if len(c.Paths) == 0 {
		return refuse(http.StatusForbidden, codeUnauthorizedAPI, "paths",
			"api unauthorized: %s changes a whole platform; add it to the paths of client %s to allow it", path, c.Name)
	}
	if lower := strings.ToLower(path); lower != path && c.mayCall(lower) {
		return refuse(http.StatusForbidden, codeUnauthorizedAPI, "paths",
			"api unauthorized: the paths of client %s cover %s, in that case alone", c.Name, lower)
	}
	return refuse(http.StatusForbidden, codeUnauthorizedAPI, "paths",
		"api unauthorized: the paths of client %s do not cover %s", c.Name, path)
}
