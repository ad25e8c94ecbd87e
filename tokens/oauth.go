package tokens

import (
	"context"
	"errors"
	"fmt"
	"net/http/httptrace"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// Calls of web authorization (网页授权).
const (
	pathUserCode             = "/sns/oauth2/access_token"
	pathComponentUserCode    = "/sns/oauth2/component/access_token"
	pathUserRefresh          = "/sns/oauth2/refresh_token"
	pathComponentUserRefresh = "/sns/oauth2/component/refresh_token"
	pathUserInfo             = "/sns/userinfo"
)

// DefaultUserLang is the language in which a profile names places unless another one is asked for.
const DefaultUserLang = "zh_CN"

// UserLangs are the languages that WeChat has for profiles.
var UserLangs = []string{DefaultUserLang, "zh_TW", "en"}

// maxProfileText bounds each text of a profile, in bytes. WeChat's are far shorter.
const maxProfileText = 1024

// UserCode is the code of a web authorization callback. It lives five minutes and can be exchanged once.
type UserCode struct {
	Platform string // the platform that acts for the account; empty for a plain account
	AppID    string // the account whose user logs in
	Code     secret.String
}

// UserGrant is what WeChat gives for a code: who the user is to the account, and the user's own tokens.
type UserGrant struct {
	OpenID, UnionID, Scope    string
	Snapshot                  bool // is_snapshotuser: a virtual user of the snapshot page
	AccessToken, RefreshToken secret.String
	ExpiresAt                 time.Time // of the access token
}

// Profile is a user's public profile (snsapi_userinfo). Since 2021 WeChat leaves all but the name and picture mostly
// empty.
type Profile struct {
	Nickname   string
	HeadImgURL string
	UnionID    string
	Sex        int
	Language   string
	Province   string
	City       string
	Country    string
	Privilege  []string
}

// How an exchange of a user's code ends without a grant, beside refusals of WeChat's (*APIError) and failures before it
// was asked.
var (
	// ErrCodeInDoubt: the code went out and no usable answer came back. Nobody knows whether it is used up, so it must
	// not be sent again.
	ErrCodeInDoubt = errors.New("login code may be used up")
	// ErrTokenRenewed: WeChat refused the component token before it looked at the code, and there is a new one by now.
	// Whoever brought the code may bring it once more.
	ErrTokenRenewed = errors.New("a refused component token was renewed")
)

// ExchangeUserCode exchanges the code of a callback, with the component token of its platform or, for a plain account,
// with the account's secret. WeChat takes a code once, so the call is never repeated. A refused component token is
// renewed all the same, for the next call.
//
// Errors: ErrNotConfigured; *APIError, of which 40029, 40163 and 42003 mean the code and 61003 an account that has not
// authorised the platform; ErrTokenRenewed, which wraps WeChat's refusal; ErrUnreachable, with ErrCodeInDoubt unless it
// is certain that the code was not sent; and those of Get and Renew for the component token.
func (m *Manager) ExchangeUserCode(ctx context.Context, c UserCode) (UserGrant, error) {
	env, err := m.current()
	if err != nil {
		return UserGrant{}, err
	}
	query := url.Values{
		"appid":      {c.AppID},
		"code":       {c.Code.Reveal()},
		"grant_type": {"authorization_code"},
	}
	if c.Platform == "" {
		account, ok := env.account(c.AppID)
		if !ok {
			return UserGrant{}, fmt.Errorf("account %s: %w", c.AppID, ErrNotConfigured)
		}
		query.Set("secret", account.Secret.Reveal())
		return exchangeUserCode(ctx, env.API, pathUserCode, query)
	}
	key := ComponentKey(c.Platform)
	token, err := m.token(ctx, env, key)
	if err != nil {
		return UserGrant{}, fmt.Errorf("component token: %w", err)
	}
	query.Set("component_appid", c.Platform)
	query.Set("component_access_token", token.Value.Reveal())
	grant, err := exchangeUserCode(ctx, env.API, pathComponentUserCode, query)
	refusal, ok := errors.AsType[*APIError](err)
	if !ok || !IsTokenRefused(refusal.Code) {
		return grant, err
	}
	at := time.Now()
	if _, err = m.renewRefused(ctx, env, key, token.Value); err != nil {
		return UserGrant{}, fmt.Errorf("renewal of the component token that WeChat refused: %w", err)
	}
	m.Healed(key, token.Value, at) // no other kind of token is taken here, and there is no code to try the new one with
	return UserGrant{}, fmt.Errorf("%w: %w", ErrTokenRenewed, refusal)
}

// exchangeUserCode makes the one call that a code allows, and finds out whether a failure may have used the code up.
func exchangeUserCode(ctx context.Context, api *Client, path string, query url.Values) (UserGrant, error) {
	if err := ctx.Err(); err != nil {
		return UserGrant{}, fmt.Errorf("%s: %w", path, err)
	}
	var dialling, connected atomic.Bool // a transport that reports no connections leaves both unset
	traced := httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GetConn: func(string) { dialling.Store(true) },
		GotConn: func(httptrace.GotConnInfo) { connected.Store(true) },
	})
	var answer userAnswer
	asked := time.Now()
	err := api.Get(traced, path, query, &answer)
	if err == nil {
		return answer.grant(asked)
	}
	_, refused := errors.AsType[*APIError](err)
	if refused || !connected.Load() && (dialling.Load() || isDialError(err)) {
		return UserGrant{}, err
	}
	return UserGrant{}, fmt.Errorf("%w: %w", ErrCodeInDoubt, err)
}

// userAnswer is WeChat's answer to an exchange. The code is used up by it: what stands beside the openid and the token, and
// cannot be read, must not cost the login.
type userAnswer struct {
	AccessToken  string      `json:"access_token"`
	ExpiresIn    wireSeconds `json:"expires_in"`
	RefreshToken wireText    `json:"refresh_token"`
	OpenID       string      `json:"openid"`
	Scope        wireText    `json:"scope"`
	UnionID      wireText    `json:"unionid"`
	Snapshot     wireFlag    `json:"is_snapshotuser"`
}

func (a *userAnswer) grant(asked time.Time) (UserGrant, error) {
	if a.OpenID == "" || a.AccessToken == "" {
		return UserGrant{}, fmt.Errorf("%w: %w: the answer has no openid or no access_token", ErrCodeInDoubt, ErrUnreachable)
	}
	return UserGrant{
		OpenID: a.OpenID, UnionID: string(a.UnionID), Scope: string(a.Scope), Snapshot: bool(a.Snapshot),
		AccessToken: secret.New(a.AccessToken), RefreshToken: secret.New(string(a.RefreshToken)),
		ExpiresAt: asked.Add(lifeOf(int64(a.ExpiresIn))),
	}, nil
}

// UserInfo fetches the profile of a user who granted snsapi_userinfo, with the user's own token. The call is the same
// for platforms and plain accounts. lang is one of UserLangs.
func (m *Manager) UserInfo(ctx context.Context, g UserGrant, lang string) (Profile, error) {
	env, err := m.current()
	if err != nil {
		return Profile{}, err
	}
	var answer struct {
		OpenID     string   `json:"openid"`
		Nickname   string   `json:"nickname"`
		HeadImgURL string   `json:"headimgurl"`
		UnionID    string   `json:"unionid"`
		Sex        wireInt  `json:"sex"`
		Language   string   `json:"language"`
		Province   string   `json:"province"`
		City       string   `json:"city"`
		Country    string   `json:"country"`
		Privilege  []string `json:"privilege"`
	}
	query := url.Values{
		"access_token": {g.AccessToken.Reveal()},
		"openid":       {g.OpenID},
		"lang":         {lang},
	}
	if err := env.API.Get(ctx, pathUserInfo, query, &answer); err != nil {
		return Profile{}, err
	}
	if answer.OpenID != g.OpenID {
		return Profile{}, fmt.Errorf("%s: %w: the answer is about another openid", pathUserInfo, ErrUnreachable)
	}
	text := func(s string) string { return printable(s, maxProfileText) }
	p := Profile{
		Nickname: text(answer.Nickname), HeadImgURL: text(answer.HeadImgURL), UnionID: text(answer.UnionID),
		Sex: int(answer.Sex), Language: text(answer.Language),
		Province: text(answer.Province), City: text(answer.City), Country: text(answer.Country),
	}
	for _, one := range answer.Privilege[:min(len(answer.Privilege), maxPrivileges)] {
		p.Privilege = append(p.Privilege, text(one))
	}
	return p, nil
}

// maxPrivileges bounds how many of a profile's privileges are kept.
const maxPrivileges = 16

// UserInfoLater is UserInfo for some time after the login of a user of u's account: the token is renewed first if it has
// ended, and once if WeChat refuses it. The grant returned is the one to keep, also beside an error.
func (m *Manager) UserInfoLater(ctx context.Context, u User, g UserGrant, lang string) (Profile, UserGrant, error) {
	renewed := false
	renew := func() (err error) {
		renewed = true
		g, err = m.renewUser(ctx, u, g)
		return err
	}
	if !time.Now().Before(g.ExpiresAt) {
		if err := renew(); err != nil {
			return Profile{}, g, err
		}
	}
	p, err := m.UserInfo(ctx, g, lang)
	if !renewed && hasCode(err, codesOfUserToken...) {
		if err := renew(); err != nil {
			return Profile{}, g, err
		}
		p, err = m.UserInfo(ctx, g, lang)
	}
	return p, g, err
}

// codesOfUserToken are those with which WeChat refuses a user's own access token.
var codesOfUserToken = []int64{40001, 40014, 42001}

// renewUser gets a new access token for a user's refresh token, which lives 30 days. It goes the way that the code went.
// A refresh token is good for any number of calls, so a refused component token is renewed and the call repeated once.
// On an error the grant is the old one.
func (m *Manager) renewUser(ctx context.Context, u User, g UserGrant) (UserGrant, error) {
	env, err := m.current()
	if err != nil {
		return g, err
	}
	query := url.Values{
		"appid":         {u.AppID},
		"grant_type":    {"refresh_token"},
		"refresh_token": {g.RefreshToken.Reveal()},
	}
	if u.Platform == "" {
		return refreshUser(ctx, env.API, pathUserRefresh, query, g)
	}
	key := ComponentKey(u.Platform)
	token, err := m.token(ctx, env, key)
	if err != nil {
		return g, fmt.Errorf("component token: %w", err)
	}
	query.Set("component_appid", u.Platform)
	query.Set("component_access_token", token.Value.Reveal())
	renewed, err := refreshUser(ctx, env.API, pathComponentUserRefresh, query, g)
	refusal, ok := errors.AsType[*APIError](err)
	if !ok || !IsTokenRefused(refusal.Code) {
		return renewed, err
	}
	held, at := token, time.Now()
	if token, err = m.renewRefused(ctx, env, key, held.Value); err != nil {
		return g, fmt.Errorf("renewal of the component token that WeChat refused: %w", err)
	}
	query.Set("component_access_token", token.Value.Reveal())
	renewed, err = refreshUser(ctx, env.API, pathComponentUserRefresh, query, g)
	if tookToken(err) {
		m.Healed(key, held.Value, at)
	}
	return renewed, err
}

func refreshUser(ctx context.Context, api *Client, path string, query url.Values, old UserGrant) (UserGrant, error) {
	var answer userAnswer
	asked := time.Now()
	if err := api.Get(ctx, path, query, &answer); err != nil {
		return old, err
	}
	if answer.AccessToken == "" || answer.OpenID != old.OpenID {
		return old, fmt.Errorf("%s: %w: the answer has no access_token, or is about another openid", path, ErrUnreachable)
	}
	renewed := old
	renewed.AccessToken, renewed.ExpiresAt = secret.New(answer.AccessToken), asked.Add(lifeOf(int64(answer.ExpiresIn)))
	if answer.RefreshToken != "" {
		renewed.RefreshToken = secret.New(string(answer.RefreshToken))
	}
	return renewed, nil
}
