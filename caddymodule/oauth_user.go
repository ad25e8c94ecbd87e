package caddymodule

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

const (
	// usersPath is where clients redeem tracking ids, on a wechat_api listener.
	usersPath = "/wechat/users/"
	// userInfoPath follows a tracking id.
	userInfoPath = "/userinfo"
	langParam    = "lang" // of userInfoPath
)

// redeemedUser is what a client gets for a tracking id. The user's tokens are not part of it.
type redeemedUser struct {
	AppID      string   `json:"appid"`
	Platform   string   `json:"platform,omitempty"`
	OpenID     string   `json:"openid"`
	UnionID    string   `json:"unionid"`
	Scope      string   `json:"scope"`
	FuncKey    string   `json:"funcKey"`
	State      string   `json:"state"`
	Snapshot   bool     `json:"is_snapshotuser,omitempty"`
	Nickname   string   `json:"nickname,omitempty"`
	HeadImgURL string   `json:"headimgurl,omitempty"`
	Sex        int      `json:"sex,omitempty"`
	Language   string   `json:"language,omitempty"`
	Province   string   `json:"province,omitempty"`
	City       string   `json:"city,omitempty"`
	Country    string   `json:"country,omitempty"`
	Privilege  []string `json:"privilege,omitempty"`
}

func newRedeemedUser(u tokens.User) redeemedUser {
	out := redeemedUser{
		AppID: u.AppID, Platform: u.Platform, OpenID: u.OpenID, UnionID: u.UnionID, Scope: u.Scope,
		FuncKey: u.FuncKey, State: u.State, Snapshot: u.Snapshot,
	}
	if p := u.Profile; p != nil {
		out.Nickname, out.HeadImgURL, out.Sex, out.Language = p.Nickname, p.HeadImgURL, p.Sex, p.Language
		out.Province, out.City, out.Country, out.Privilege = p.Province, p.City, p.Country, p.Privilege
	}
	return out
}

// serveUsers answers a client that proved itself:
//
//   - GET /wechat/users/{wxTkId}: who came under that tracking id;
//   - GET /wechat/users/{wxTkId}/userinfo[?lang=zh_CN|zh_TW|en]: the user's profile as it is now, in the form of
//     WeChat's /sns/userinfo. The gateway asks WeChat with the user's own token, which it renews as need be.
//
// A client that lists the platform may act for all its authorizers, so it may redeem their users too. One that may not
// act for the user's account gets 403 and uses nothing up; an id that is unknown, expired or was to be redeemed once and
// has been gets 404, and one that another node may know, while the store they share does not answer, 503. Either request redeems an id; whoever redeemed one may ask for the userinfo again. The id is told to
// no log: errors are answered here, because Caddy would log the URI with them.
func (a *API) serveUsers(w http.ResponseWriter, r *http.Request, client *Client) error {
	id, asksWeChat := strings.CutSuffix(strings.TrimPrefix(r.URL.Path, usersPath), userInfoPath)
	step := stepRedeem
	if asksWeChat {
		step = stepUserInfo
	}
	if r.Method != http.MethodGet {
		w.Header().Set("Allow", "GET")
		a.told(w, step, "method", http.StatusMethodNotAllowed, errorBody(http.StatusMethodNotAllowed, "only GET is allowed"))
		return nil
	}
	may := func(u tokens.User) bool {
		return client.mayUse(u.AppID, false) || u.Platform != "" && client.mayUse(u.Platform, true)
	}
	var body []byte
	var err error
	if asksWeChat {
		body, err = a.userInfo(r, id, client, may)
	} else {
		var user tokens.User
		user, err = a.app.users().Redeem(r.Context(), id, client.Name, may)
		body = jsonBody(newRedeemedUser(user))
	}
	refused, isRefusal := errors.AsType[*userInfoError](err)
	switch {
	case err == nil:
		a.told(w, step, "ok", http.StatusOK, body)
	case isRefusal:
		a.told(w, step, refused.result(), refused.status, errorBody(refused.code, refused.msg))
	case errors.Is(err, tokens.ErrUserForbidden):
		a.told(w, step, "forbidden", http.StatusForbidden, errorBody(codeUnauthorizedAPI,
			"api unauthorized: the client may not act for this user's account: add it to the client's appids"))
	case errors.Is(err, tokens.ErrUserAway):
		a.told(w, step, "unavailable", http.StatusServiceUnavailable, errorBody(http.StatusServiceUnavailable,
			"the store that the gateway's nodes share does not answer: try again"))
	default:
		a.told(w, step, "unknown", http.StatusNotFound, errorBody(http.StatusNotFound, tokens.ErrUserUnknown.Error()))
	}
	return nil
}

// userInfo asks WeChat for a user's profile.
func (a *API) userInfo(r *http.Request, id string, client *Client, may func(tokens.User) bool) ([]byte, error) {
	lang, sole := soleOf(paramValues(r.URL.RawQuery, langParam))
	if lang == "" {
		lang = tokens.DefaultUserLang
	}
	if !sole || !slices.Contains(tokens.UserLangs, lang) {
		return nil, &userInfoError{refuse(http.StatusBadRequest, codeInvalidArgs, "query",
			"invalid args: %s is one of %s", langParam, strings.Join(tokens.UserLangs, ", "))}
	}
	var openID string
	profile, err := a.app.users().AskProfile(r.Context(), id, client.Name, may, func(ctx context.Context, u tokens.User, g tokens.UserGrant) (tokens.Profile, tokens.UserGrant, error) {
		openID = u.OpenID
		p, g, err := a.app.manager().UserInfoLater(ctx, u, g, lang)
		if err != nil {
			err = &userInfoError{userInfoRefusal(err, u.AppID)}
		}
		return p, g, err
	})
	switch {
	case err != nil && r.Context().Err() != nil:
		return nil, &userInfoError{unreachable(err, "WeChat was not asked")}
	case err != nil:
		return nil, err
	}
	return jsonBody(newUserInfo(openID, profile)), nil
}

// userInfoError is a refusal of WeChat's, or of the way there.
type userInfoError struct{ *apiRefusal }

func (e *userInfoError) Error() string { return e.msg }

// result is the metric's label.
func (e *userInfoError) result() string {
	switch {
	case e.status >= http.StatusInternalServerError:
		return "unavailable"
	case e.status == http.StatusOK:
		return "refused"
	}
	return "malformed"
}

// userInfoRefusal says what an error of the question to WeChat means for the client. WeChat's own refusals come as they
// would from WeChat, with HTTP 200.
func userInfoRefusal(err error, appid string) *apiRefusal {
	api, ok := errors.AsType[*tokens.APIError](err)
	switch {
	case ok && api.Code != -1:
		return refuse(http.StatusOK, api.Code, "userinfo", "%s", withRemedy(api))
	case !ok && errors.Is(err, tokens.ErrUnreachable):
		return unreachable(err, "WeChat was asked for the user's profile and did not answer")
	}
	return tokenRefusal(err, appid, false)
}

// userInfo is a profile in the form of WeChat's /sns/userinfo, in which every field is always there.
type userInfo struct {
	OpenID     string   `json:"openid"`
	Nickname   string   `json:"nickname"`
	Sex        int      `json:"sex"`
	Language   string   `json:"language"`
	City       string   `json:"city"`
	Province   string   `json:"province"`
	Country    string   `json:"country"`
	HeadImgURL string   `json:"headimgurl"`
	Privilege  []string `json:"privilege"`
	UnionID    string   `json:"unionid"`
}

func newUserInfo(openID string, p tokens.Profile) userInfo {
	privilege := p.Privilege
	if privilege == nil {
		privilege = []string{}
	}
	return userInfo{
		OpenID: openID, Nickname: p.Nickname, Sex: p.Sex, Language: p.Language, City: p.City, Province: p.Province,
		Country: p.Country, HeadImgURL: p.HeadImgURL, Privilege: privilege, UnionID: p.UnionID,
	}
}

// jsonBody is a value in JSON. People choose their names, which stay as they are.
func jsonBody(v any) []byte {
	var body bytes.Buffer
	enc := json.NewEncoder(&body)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(v) // texts and numbers always encode
	return body.Bytes()
}

// told answers and counts the result.
func (a *API) told(w http.ResponseWriter, step oauthStep, result string, status int, body []byte) {
	a.app.metrics().oauth.WithLabelValues(string(step), result).Inc()
	w.Header().Set("X-Content-Type-Options", "nosniff") // people choose their names
	writeJSON(w, status, body)
}
