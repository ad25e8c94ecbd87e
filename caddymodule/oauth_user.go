package caddymodule

import (
	"bytes"
	"encoding/json"
	"net/http"
	"strings"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// usersPath is where clients redeem tracking ids, on a wechat_api listener.
const usersPath = "/wechat/users/"

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

// serveUsers answers GET /wechat/users/{wxTkId} for a client that proved itself: who came under that tracking id. A
// client that lists the platform may act for all its authorizers, so it may redeem their users too. One that may not act
// for the user's account gets 403 and uses nothing up; an id that is unknown, expired or was to be redeemed once and has
// been gets 404. The id is told to no log: errors are answered here, because Caddy would log the URI with them.
func (a *API) serveUsers(w http.ResponseWriter, r *http.Request, client *Client) error {
	if r.Method != http.MethodGet {
		w.Header().Set("Allow", "GET")
		a.redeemed(w, "method", http.StatusMethodNotAllowed, errorBody(http.StatusMethodNotAllowed, "only GET is allowed"))
		return nil
	}
	forbidden := false
	user, ok := a.app.users().Redeem(strings.TrimPrefix(r.URL.Path, usersPath), func(u tokens.User) bool {
		forbidden = !client.mayUse(u.AppID, false) && (u.Platform == "" || !client.mayUse(u.Platform, true))
		return !forbidden
	})
	switch {
	case forbidden:
		a.redeemed(w, "forbidden", http.StatusForbidden, errorBody(codeUnauthorizedAPI,
			"api unauthorized: the client may not act for this user's account: add it to the client's appids"))
	case !ok:
		a.redeemed(w, "unknown", http.StatusNotFound, errorBody(http.StatusNotFound, "tracking id is unknown, expired or redeemed"))
	default:
		a.redeemed(w, "ok", http.StatusOK, userBody(user))
	}
	return nil
}

// userBody is a redeemed user in JSON.
func userBody(u tokens.User) []byte {
	var body bytes.Buffer
	enc := json.NewEncoder(&body)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(newRedeemedUser(u)) // texts and numbers always encode
	return body.Bytes()
}

// redeemed answers and counts the result.
func (a *API) redeemed(w http.ResponseWriter, result string, status int, body []byte) {
	a.app.metrics().oauth.WithLabelValues(string(stepRedeem), result).Inc()
	w.Header().Set("X-Content-Type-Options", "nosniff") // people choose their names
	writeJSON(w, status, body)
}
