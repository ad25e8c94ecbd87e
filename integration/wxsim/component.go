package wxsim

import (
	"sort"
	"strconv"
	"time"
)

// seconds is a life as expires_in has it: a number, now and then a string.
func (c *call) seconds(d time.Duration) any {
	n := max(1, int64(d/time.Second))
	if c.s.dice.hit(c.s.cfg.Faults.StringNumbers, "expires-in", c.r.URL.Path) {
		return strconv.FormatInt(n, 10)
	}
	return n
}

// give marks a credential as handed out by this call and returns its value.
func (c *call) give(cred *credential) string {
	c.issued = append(c.issued, cred)
	return cred.value
}

// platformBySecret finds the platform of a call that proves itself by its AppSecret.
func (c *call) platformBySecret(secretField, wrongField string) (*platform, int64) {
	id := c.text("component_appid")
	if id == "" {
		c.violate(RuleField, "component_appid missing")
		return nil, 41018
	}
	c.entry.Platform = id
	p := c.s.platforms[id]
	if p == nil {
		return nil, 40013
	}
	given := c.text(secretField)
	if given == "" {
		if c.text(wrongField) != "" {
			c.violate(RuleField, "%s instead of %s", wrongField, secretField)
		}
		return nil, 41004
	}
	if given != p.Secret {
		c.violate(RuleSecret, "wrong secret for %s", id)
		return nil, 40125
	}
	return p, 0
}

func (c *call) startPushTicket() answer {
	p, code := c.platformBySecret("component_secret", "component_appsecret")
	if code != 0 {
		return c.fail(code)
	}
	stopped := p.stopped
	p.stopped, p.failures = false, 0
	if c.s.cfg.TicketEvery > 0 && p.EventURL != "" && !c.s.closed {
		c.s.wg.Go(func() { _, _ = c.s.PushTicket(c.s.ctx, p.AppID) })
	}
	if !stopped {
		return c.ok(errorBody{Errmsg: "in a normal state"})
	}
	return c.done()
}

func (c *call) componentToken() answer {
	p, code := c.platformBySecret("component_appsecret", "component_secret")
	if code != 0 {
		return c.fail(code)
	}
	if code := c.checkTicket(p); code != 0 {
		return c.fail(code)
	}
	h := holder{KindComponent, p.AppID, p.AppID}
	c.s.checkRenewal(c, h)
	lives := c.s.cfg.Lives
	cred := c.s.issueToken(h, lives.Component, lives.ComponentOverlap)
	return c.ok(map[string]any{"component_access_token": c.give(cred), "expires_in": c.seconds(lives.Component)})
}

// checkTicket judges component_verify_ticket.
func (c *call) checkTicket(p *platform) int64 {
	value := c.text("component_verify_ticket")
	newest := c.s.current[holder{KindTicket, p.AppID, p.AppID}]
	if value == "" || newest == nil {
		return 61005
	}
	cred := c.s.creds[value]
	if cred == nil || cred.kind != KindTicket || cred.platform != p.AppID {
		return 61006
	}
	if c.s.dead(cred, time.Now()) != 0 {
		return 61005
	}
	if c.s.cfg.Faults.NewestTicketOnly && cred != newest {
		return 61006
	}
	return 0
}

// ownPlatform checks that the call's component_appid is that of its token.
func (c *call) ownPlatform() int64 {
	switch id := c.text("component_appid"); id {
	case c.cred.platform:
		return 0
	case "":
		return 41018
	default:
		c.violate(RuleTokenOwner, "component token of %s in a call for %s", c.cred.platform, id)
		return 61002
	}
}

func (c *call) createPreAuthCode() answer {
	if code := c.ownPlatform(); code != 0 {
		return c.fail(code)
	}
	life := c.s.cfg.Lives.PreAuthCode
	cred := c.s.issue(holder{KindPreAuthCode, c.cred.platform, c.cred.platform}, life)
	return c.ok(map[string]any{"pre_auth_code": c.give(cred), "expires_in": c.seconds(life)})
}

func (c *call) queryAuth() answer {
	if code := c.ownPlatform(); code != 0 {
		return c.fail(code)
	}
	s := c.s
	code := s.creds[c.text("authorization_code")]
	if code == nil || code.kind != KindAuthCode || code.platform != c.cred.platform {
		return c.fail(61009)
	}
	c.entry.AppID = code.appID
	if s.dead(code, time.Now()) != 0 {
		return c.fail(61010)
	}
	if code.used && !s.cfg.Faults.ReusableAuthCodes {
		// No violation: the release check sends a code that was used for the authorization.
		c.note("authorization code used again")
		return c.fail(61009)
	}
	auth := s.authorizations[pair{code.platform, code.appID}]
	if !auth.live() {
		return c.fail(61003)
	}
	code.used, auth.exchanged = true, true
	lives := s.cfg.Lives
	token := s.issueToken(holder{KindAuthorizer, code.platform, code.appID}, lives.Authorizer, lives.AuthorizerOverlap)
	return c.ok(map[string]any{"authorization_info": map[string]any{
		"authorizer_appid": code.appID, "authorizer_access_token": c.give(token), "expires_in": c.seconds(lives.Authorizer),
		"authorizer_refresh_token": c.give(auth.refresh), "func_info": funcInfo(auth.sets),
	}})
}

func (c *call) authorizerToken() answer {
	if code := c.ownPlatform(); code != 0 {
		return c.fail(code)
	}
	s, appID := c.s, c.text("authorizer_appid")
	if appID == "" {
		c.violate(RuleField, "authorizer_appid missing")
		return c.fail(41002)
	}
	c.entry.AppID = appID
	auth := s.authorizations[pair{c.cred.platform, appID}]
	if !auth.live() {
		return c.fail(61003)
	}
	refresh := s.creds[c.text("authorizer_refresh_token")]
	if refresh == nil || refresh.holder != auth.refresh.holder || s.dead(refresh, time.Now()) != 0 {
		if refresh != nil && refresh.holder != auth.refresh.holder {
			c.violate(RuleTokenOwner, "refresh token of %s in a call for %s", refresh.appID, appID)
		}
		return c.fail(61023)
	}
	h := holder{KindAuthorizer, c.cred.platform, appID}
	s.checkRenewal(c, h)
	lives := s.cfg.Lives
	token := s.issueToken(h, lives.Authorizer, lives.AuthorizerOverlap)
	if s.cfg.Faults.RotateRefreshTokens {
		s.newRefresh(auth, h, lives.RefreshOverlap)
	}
	auth.exchanged = true
	return c.ok(map[string]any{
		"authorizer_access_token": c.give(token), "expires_in": c.seconds(lives.Authorizer),
		"authorizer_refresh_token": c.give(auth.refresh),
	})
}

// newRefresh replaces the refresh token of an authorization. The caller holds mu.
func (s *Server) newRefresh(auth *authorization, of holder, overlap time.Duration) {
	if auth.refresh != nil {
		auth.refresh.dies = time.Now().Add(overlap)
	}
	h := holder{KindRefresh, of.platform, of.appID}
	auth.refresh = s.issue(h, 0)
	s.current[h] = auth.refresh
}

func funcInfo(sets []int) []any {
	list := make([]any, 0, len(sets))
	for _, id := range sets {
		list = append(list, map[string]any{"funcscope_category": map[string]int{"id": id}})
	}
	return list
}

func (c *call) authorizerInfo() answer {
	if code := c.ownPlatform(); code != 0 {
		return c.fail(code)
	}
	appID := c.text("authorizer_appid")
	c.entry.AppID = appID
	auth := c.s.authorizations[pair{c.cred.platform, appID}]
	if !auth.live() {
		return c.fail(61003)
	}
	acc := c.s.accounts[appID]
	info := map[string]any{
		"nick_name": acc.NickName, "head_img": "https://wx.qlogo.cn/mmopen/0", "user_name": acc.OriginalID, "alias": "",
		"service_type_info": map[string]int{"id": 2}, "verify_type_info": map[string]int{"id": 0},
		"principal_name": acc.NickName, "signature": "", "qrcode_url": "https://mmbiz.qpic.cn/mmbiz_jpg/0",
		"business_info":  map[string]int{"open_pay": 0, "open_shake": 0, "open_scan": 0, "open_card": 0, "open_store": 0},
		"account_status": 1,
	}
	if acc.MiniProgram {
		info["service_type_info"] = map[string]int{"id": 0}
		info["MiniProgramInfo"] = map[string]any{"network": map[string]any{}, "categories": []any{}, "visit_status": 0}
	}
	return c.ok(map[string]any{"authorizer_info": info, "authorization_info": map[string]any{
		"authorizer_appid": appID, "authorizer_refresh_token": c.known(auth), "func_info": funcInfo(auth.sets),
	}})
}

// known is the refresh token as lists show it: empty until a code was exchanged.
func (c *call) known(auth *authorization) string {
	if !auth.exchanged {
		return ""
	}
	return auth.refresh.value
}

const maxListCount = 500

func (c *call) authorizerList() answer {
	if code := c.ownPlatform(); code != 0 {
		return c.fail(code)
	}
	offset, err1 := strconv.Atoi(c.text("offset"))
	count, err2 := strconv.Atoi(c.text("count"))
	if err1 != nil || err2 != nil || offset < 0 || count < 1 {
		return c.fail(40097)
	}
	if count > maxListCount {
		c.violate(RuleField, "count of %d", count)
		return c.fail(40170)
	}
	var ids []string
	for p, auth := range c.s.authorizations {
		if p.platform == c.cred.platform && auth.active {
			ids = append(ids, p.appID)
		}
	}
	sort.Strings(ids)
	total := len(ids)
	ids = ids[min(offset, total):min(offset+count, total)]
	list := make([]any, 0, len(ids))
	for _, id := range ids {
		auth := c.s.authorizations[pair{c.cred.platform, id}]
		list = append(list, map[string]any{"authorizer_appid": id, "refresh_token": c.known(auth), "auth_time": auth.at.Unix()})
	}
	return c.ok(map[string]any{"total_count": total, "list": list})
}
