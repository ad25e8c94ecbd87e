package wxsim

import (
	"strings"
	"time"
)

// plainAccount finds the account of a call that proves itself by AppSecret.
func (c *call) plainAccount(appID, secret string) (*account, int64) {
	if appID == "" {
		return nil, 41002
	}
	c.entry.AppID = appID
	if c.s.platforms[appID] != nil {
		return nil, 61024
	}
	acc := c.s.accounts[appID]
	switch {
	case acc == nil:
		return nil, 40013
	case secret == "":
		c.violate(RuleField, "secret missing")
		return nil, 41004
	case !acc.plain || secret != acc.Secret:
		c.violate(RuleSecret, "wrong secret for %s", appID)
		return nil, 40125
	}
	return acc, 0
}

func (c *call) plainToken() answer {
	if c.query.Get("grant_type") != "client_credential" {
		return c.fail(40002)
	}
	acc, code := c.plainAccount(c.query.Get("appid"), c.query.Get("secret"))
	if code != 0 {
		return c.fail(code)
	}
	if c.s.count(c.r.URL.Path, acc.AppID) {
		return c.fail(45009)
	}
	h := holder{kind: KindAccount, appID: acc.AppID}
	c.s.checkRenewal(c, h)
	lives := c.s.cfg.Lives
	cred := c.s.issueToken(h, lives.Account, lives.AccountOverlap)
	return c.ok(map[string]any{"access_token": c.give(cred), "expires_in": c.seconds(lives.Account)})
}

// forcing is what an account used of its forced renewals.
type forcing struct {
	last  time.Time
	day   int // of the year
	today int
}

const forcedPerDay = 20

func (c *call) stableToken() answer {
	if c.text("grant_type") != "client_credential" {
		return c.fail(40002)
	}
	acc, code := c.plainAccount(c.text("appid"), c.text("secret"))
	if code != 0 {
		return c.fail(code)
	}
	s := c.s
	if s.count(c.r.URL.Path, acc.AppID) {
		return c.fail(45009)
	}
	h := holder{kind: KindStable, appID: acc.AppID}
	s.checkRenewal(c, h)
	lives, cur, now := s.cfg.Lives, s.current[h], time.Now()
	alive := cur != nil && s.dead(cur, now) == 0
	forced, _ := c.fields["force_refresh"].(bool)
	if forced && alive {
		ok, code := s.mayForce(acc.AppID, now)
		if code != 0 {
			return c.fail(code)
		}
		forced = ok
	}
	switch {
	case !alive:
		cur = s.issueToken(h, lives.Stable, 0)
	case forced:
		cur = s.issueToken(h, lives.Stable, 0)
	case cur.expires.Sub(now) <= lives.StableOverlap:
		cur = s.issueToken(h, lives.Stable, lives.StableOverlap)
	}
	return c.ok(map[string]any{"access_token": c.give(cur), "expires_in": c.seconds(cur.expires.Sub(now))})
}

// mayForce reports whether a forced renewal takes effect now; one too soon after the last
// changes nothing. The caller holds mu.
func (s *Server) mayForce(appID string, now time.Time) (bool, int64) {
	f := s.forced[appID]
	if f == nil {
		f = &forcing{}
		s.forced[appID] = f
	}
	if f.day != now.YearDay() {
		f.day, f.today = now.YearDay(), 0
	}
	if now.Sub(f.last) < s.cfg.Lives.ForceGap {
		return false, 0
	}
	if f.today >= forcedPerDay {
		return false, 45009
	}
	f.last = now
	f.today++
	return true, 0
}

func (c *call) jsTicket() answer {
	kinds := map[string]Kind{"jsapi": KindJSTicket, "wx_card": KindCardTicket}
	kind, known := kinds[c.query.Get("type")]
	if !known {
		return c.fail(40097)
	}
	life := c.s.cfg.Lives.JSTicket
	h := holder{kind, c.cred.platform, c.cred.appID}
	cred := c.s.issue(h, life)
	c.s.current[h] = cred
	return c.ok(map[string]any{"errcode": 0, "errmsg": "ok", "ticket": c.give(cred), "expires_in": c.seconds(life)})
}

// CheckJSSDK reports whether signature is right for a page of the account, with any of its
// live jsapi tickets: what the WeChat client does with wx.config.
func (s *Server) CheckJSSDK(appID, nonce, timestamp, pageURL, signature string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.creds {
		if c.kind == KindJSTicket && c.appID == appID && s.dead(c, time.Now()) == 0 &&
			signature == jsSignature(c.value, nonce, timestamp, pageURL) {
			return true
		}
	}
	return false
}

func jsSignature(ticket, nonce, timestamp, pageURL string) string {
	for i, ch := range pageURL {
		if ch == '#' {
			pageURL = pageURL[:i]
			break
		}
	}
	return signSorted("jsapi_ticket=" + ticket + "&noncestr=" + nonce + "&timestamp=" + timestamp + "&url=" + pageURL)
}

const clearsPerMonth = 10

func (c *call) clearQuota() answer {
	appID := c.text("appid")
	if appID == "" {
		return c.fail(41002)
	}
	if appID != c.cred.appID {
		c.violate(RuleTokenOwner, "token of %s in a call for %s", c.cred.appID, appID)
		return c.fail(40013)
	}
	if c.s.used[[2]string{c.r.URL.Path, appID}] > clearsPerMonth {
		return c.fail(48006)
	}
	for key := range c.s.used {
		if key[1] == appID && key[0] != c.r.URL.Path {
			delete(c.s.used, key)
		}
	}
	return c.done()
}

const (
	quotaWithoutLimit  = 100_000
	codeInvalidCGIPath = 76003
	codeNoQuota        = 76022 // of sns/*
)

func (c *call) quota() answer {
	path := c.text("cgi_path")
	if path == "" || path[0] != '/' {
		return c.fail(codeInvalidCGIPath)
	}
	if strings.HasPrefix(path, "/sns/") {
		return c.fail(codeNoQuota)
	}
	limit := c.s.cfg.Quotas[path]
	if limit == 0 {
		limit = quotaWithoutLimit
	}
	used := c.s.used[[2]string{path, c.cred.appID}]
	return c.ok(map[string]any{"errcode": 0, "errmsg": "ok", "quota": map[string]int{
		"daily_limit": limit, "used": used, "remain": max(0, limit-used),
	}})
}

func (c *call) ipList() answer {
	return c.ok(map[string]any{"ip_list": []string{"127.0.0.1", "101.226.103.0/25"}})
}
