package wxsim

import (
	"slices"
	"strings"
	"time"
)

// miniLoginSet is the permission set of mini-program login.
const miniLoginSet = 20

// componentPair checks the parameters of a component's sns call and returns its account.
func (c *call) componentPair() (string, int64) {
	switch id := c.query.Get("component_appid"); id {
	case c.cred.platform:
	case "":
		return "", 41018
	default:
		c.violate(RuleTokenOwner, "component token of %s in a call for %s", c.cred.platform, id)
		return "", 61002
	}
	appID := c.query.Get("appid")
	if appID == "" {
		return "", 41002
	}
	c.entry.AppID = appID
	if !c.s.authorizations[pair{c.cred.platform, appID}].live() {
		return "", 61003
	}
	return appID, 0
}

// redeem uses up a user's code of kind for the account (and platform).
func (c *call) redeem(kind Kind, parameter, platformID, appID string) (*credential, int64) {
	if c.query.Get("grant_type") != "authorization_code" {
		return nil, 40002
	}
	value := c.query.Get(parameter)
	if value == "" {
		return nil, 41008
	}
	cred := c.s.creds[value]
	if cred == nil || cred.kind != kind || cred.appID != appID || kind == KindUserCode && cred.platform != platformID {
		return nil, 40029
	}
	if cred.used {
		c.violate(RuleCodeAgain, "%s used again, %s after it was issued", kind, ageOf(cred))
		return nil, 40163
	}
	cred.used = true
	if c.s.dead(cred, time.Now()) != 0 {
		return nil, 42003
	}
	return cred, 0
}

func (c *call) plainLogin() answer {
	acc, code := c.plainAccount(c.query.Get("appid"), c.query.Get("secret"))
	if code != 0 {
		return c.fail(code)
	}
	return c.session("", acc.AppID)
}

func (c *call) componentLogin() answer {
	appID, code := c.componentPair()
	if code != 0 {
		return c.fail(code)
	}
	if !slices.Contains(c.s.authorizations[pair{c.cred.platform, appID}].sets, miniLoginSet) {
		return c.fail(61007)
	}
	return c.session(c.cred.platform, appID)
}

func (c *call) session(platformID, appID string) answer {
	cred, code := c.redeem(KindLoginCode, "js_code", platformID, appID)
	if code != 0 {
		return c.fail(code)
	}
	out := map[string]any{"session_key": cred.user.SessionKey, "openid": cred.user.OpenID}
	if cred.user.UnionID != "" {
		out["unionid"] = cred.user.UnionID
	}
	return c.ok(out)
}

func (c *call) plainUserToken() answer {
	acc, code := c.plainAccount(c.query.Get("appid"), c.query.Get("secret"))
	if code != 0 {
		return c.fail(code)
	}
	return c.userToken("", acc.AppID)
}

func (c *call) componentUserToken() answer {
	appID, code := c.componentPair()
	if code != 0 {
		return c.fail(code)
	}
	return c.userToken(c.cred.platform, appID)
}

func (c *call) userToken(platformID, appID string) answer {
	code, errcode := c.redeem(KindUserCode, "code", platformID, appID)
	if errcode != 0 {
		return c.fail(errcode)
	}
	refresh := c.s.issue(holder{KindUserRefresh, platformID, appID}, c.s.cfg.Lives.UserRefresh)
	refresh.user, refresh.scope = code.user, code.scope
	return c.grant(refresh)
}

// grant answers with a new access token beside the refresh token.
func (c *call) grant(refresh *credential) answer {
	life := c.s.cfg.Lives.UserToken
	token := c.s.issue(holder{KindUser, refresh.platform, refresh.appID}, life)
	token.user, token.scope = refresh.user, refresh.scope
	out := map[string]any{
		"access_token": c.give(token), "expires_in": c.seconds(life), "refresh_token": c.give(refresh),
		"openid": token.user.OpenID, "scope": token.scope,
	}
	if token.user.UnionID != "" && strings.Contains(token.scope, scopeUserInfo) {
		out["unionid"] = token.user.UnionID
	}
	if token.user.Snapshot {
		out["is_snapshotuser"] = 1
	}
	return c.ok(out)
}

func (c *call) plainUserRefresh() answer {
	appID := c.query.Get("appid")
	if appID == "" {
		return c.fail(41002)
	}
	return c.refreshUser("", appID)
}

func (c *call) componentUserRefresh() answer {
	appID, code := c.componentPair()
	if code != 0 {
		return c.fail(code)
	}
	return c.refreshUser(c.cred.platform, appID)
}

func (c *call) refreshUser(platformID, appID string) answer {
	if c.query.Get("grant_type") != "refresh_token" {
		return c.fail(40002)
	}
	value := c.query.Get("refresh_token")
	if value == "" {
		return c.fail(41003)
	}
	refresh := c.s.creds[value]
	if refresh == nil || refresh.holder != (holder{KindUserRefresh, platformID, appID}) {
		return c.fail(40030)
	}
	if c.s.dead(refresh, time.Now()) != 0 {
		return c.fail(42002)
	}
	return c.grant(refresh)
}

func (c *call) snsUserInfo() answer {
	if !strings.Contains(c.cred.scope, scopeUserInfo) {
		return c.fail(48001)
	}
	u := c.cred.user
	if code := c.ownOpenID(); code != 0 {
		return c.fail(code)
	}
	if lang := c.query.Get("lang"); lang != "" && !slices.Contains([]string{"zh_CN", "zh_TW", "en"}, lang) {
		return c.fail(40097)
	}
	return c.ok(map[string]any{
		"openid": u.OpenID, "nickname": u.NickName, "sex": 0, "province": "", "city": "", "country": "",
		"headimgurl": "https://thirdwx.qlogo.cn/mmopen/vi_32/0/132", "privilege": []string{}, "unionid": u.UnionID,
	})
}

func (c *call) snsAuth() answer {
	if code := c.ownOpenID(); code != 0 {
		return c.fail(code)
	}
	return c.done()
}

// ownOpenID checks that the call is about the user whose token it has.
func (c *call) ownOpenID() int64 {
	switch c.query.Get("openid") {
	case "":
		return 41009
	case c.cred.user.OpenID:
		return 0
	}
	return 40003
}
