package caddymodule

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// maxLinks bounds the links that one request makes: each costs a call to WeChat.
const maxLinks = 20

// orphan is an account that has to authorise its platform again.
type orphan struct {
	Platform string `json:"platform"`
	AppID    string `json:"appid"`
	Link     string `json:"link,omitempty"`
}

func (o *operations) orphans(w http.ResponseWriter, r *http.Request) error {
	if o.app == nil {
		return errNoApp
	}
	redirect := r.URL.Query().Get("redirect")
	if u, err := url.Parse(redirect); redirect != "" && (err != nil || u.Scheme != "https" || u.Host == "") {
		return caddy.APIError{HTTPStatus: http.StatusBadRequest, Err: errors.New("redirect: want an https URL on the platform's authorization domain (授权发起页域名)")}
	}
	list := []orphan{}
	for _, p := range o.app.Platforms {
		for _, appid := range o.app.manager().Orphans(p.AppID) {
			list = append(list, orphan{Platform: p.AppID, AppID: appid})
		}
	}
	for i := range list[:min(len(list), maxLinks)] {
		if redirect == "" {
			break
		}
		lost := &list[i]
		link, err := o.app.manager().AuthorizationLink(r.Context(), tokens.AuthorizationLink{Platform: lost.Platform, AppID: lost.AppID, Redirect: redirect})
		if err != nil {
			o.logger.Error("no authorization link can be made", zap.String("platform", lost.Platform), zap.Error(err))
			return caddy.APIError{HTTPStatus: http.StatusBadGateway, Err: fmt.Errorf("platform %s: WeChat gives no pre-authorization code; the log says why", lost.Platform)}
		}
		lost.Link = link.Reveal()
	}
	return answerJSON(w, http.StatusOK, map[string]any{"orphans": list})
}
