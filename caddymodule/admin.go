package caddymodule

import (
	"encoding/json"
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

// Admin adds the gateway's own routes to Caddy's admin endpoint. They return state, never a token, a key or a message.
//
//	GET /wechat/orphans[?redirect=<https URL>]
//
// lists the accounts that authorised a platform and whose authorization code was never exchanged, so that WeChat has no
// refresh token of them: each has to authorise again. With redirect, a page on the platform's authorization domain
// (授权发起页域名), the first of them come with a link on which only that account can do so, once, within half an hour;
// WeChat demands that the link be opened from a page on that domain.
//
//	GET /wechat/verify
//	PUT /wechat/verify/<name>
//	DELETE /wechat/verify/<name>
//
// list, add and remove the verification files that wechat_verify serves beside those of its configuration. The body of
// PUT, or of POST, is the file, at most 4 KiB, byte for byte. They are kept in the store: they outlive restarts, and all
// nodes that share the store serve them within a second, on every site that has wechat_verify and below its path.
type Admin struct {
	app    *App
	logger *zap.Logger
}

// CaddyModule returns the Caddy module information.
func (*Admin) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "admin.api.wechat", New: func() caddy.Module { return new(Admin) }}
}

// Provision gets the app, if there is one.
func (a *Admin) Provision(ctx caddy.Context) error {
	a.logger = caddy.Log().Named("admin.api.wechat")
	v, err := ctx.AppIfConfigured("wechat")
	if errors.Is(err, caddy.ErrNotConfigured) {
		return nil
	}
	if err != nil {
		return err
	}
	a.app, _ = v.(*App)
	return nil
}

// Routes implements caddy.AdminRouter.
func (a *Admin) Routes() []caddy.AdminRoute {
	return []caddy.AdminRoute{
		{Pattern: "GET /wechat/orphans", Handler: caddy.AdminHandlerFunc(a.orphans)},
		{Pattern: "GET /wechat/verify", Handler: caddy.AdminHandlerFunc(a.verifyFiles)},
		{Pattern: "PUT /wechat/verify/{name}", Handler: caddy.AdminHandlerFunc(a.addVerifyFile)},
		{Pattern: "POST /wechat/verify/{name}", Handler: caddy.AdminHandlerFunc(a.addVerifyFile)},
		{Pattern: "DELETE /wechat/verify/{name}", Handler: caddy.AdminHandlerFunc(a.deleteVerifyFile)},
	}
}

// orphan is an account that has to authorise its platform again.
type orphan struct {
	Platform string `json:"platform"`
	AppID    string `json:"appid"`
	Link     string `json:"link,omitempty"`
}

func (a *Admin) orphans(w http.ResponseWriter, r *http.Request) error {
	if a.app == nil {
		return caddy.APIError{HTTPStatus: http.StatusNotFound, Err: errors.New("the configuration has no global option wechat")}
	}
	redirect := r.URL.Query().Get("redirect")
	if u, err := url.Parse(redirect); redirect != "" && (err != nil || u.Scheme != "https" || u.Host == "") {
		return caddy.APIError{HTTPStatus: http.StatusBadRequest, Err: errors.New("redirect: want an https URL on the platform's authorization domain (授权发起页域名)")}
	}
	list := []orphan{}
	for _, p := range a.app.Platforms {
		for _, appid := range a.app.manager().Orphans(p.AppID) {
			list = append(list, orphan{Platform: p.AppID, AppID: appid})
		}
	}
	for i := range list[:min(len(list), maxLinks)] {
		if redirect == "" {
			break
		}
		o := &list[i]
		link, err := a.app.manager().AuthorizationLink(r.Context(), tokens.AuthorizationLink{Platform: o.Platform, AppID: o.AppID, Redirect: redirect})
		if err != nil {
			a.logger.Error("no authorization link can be made", zap.String("platform", o.Platform), zap.Error(err))
			return caddy.APIError{HTTPStatus: http.StatusBadGateway, Err: fmt.Errorf("platform %s: WeChat gives no pre-authorization code; the log says why", o.Platform)}
		}
		o.Link = link.Reveal()
	}
	body, err := json.Marshal(map[string]any{"orphans": list})
	if err != nil {
		return err
	}
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(body)
	return nil
}

var (
	_ caddy.AdminRouter = (*Admin)(nil)
	_ caddy.Provisioner = (*Admin)(nil)
)
