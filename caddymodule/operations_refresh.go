package caddymodule

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// refresh has WeChat give a new token for an account or a platform.
func (o *operations) refresh(w http.ResponseWriter, r *http.Request) error {
	if o.app == nil {
		return errNoApp
	}
	q, err := operationQuery(r, "platform")
	if err != nil {
		return err
	}
	appid, platform := r.PathValue("appid"), q.Get("platform")
	var k tokens.Key
	switch o.app.byAppID[appid].(type) {
	case *Platform:
		k = tokens.ComponentKey(appid)
	case *Account:
		k = tokens.AccountKey(appid)
	default:
		if platform, err = o.holder(r.Context(), w, platform, appid); err != nil {
			return err
		}
		k = tokens.AuthorizerKey(platform, appid)
	}
	if platform != "" && platform != k.Platform {
		return badRequest("platform: %s is in the configuration, and has no other platform: leave it out", appid)
	}
	expires, err := o.app.manager().RenewNow(r.Context(), k)
	if err != nil {
		return o.refused(w, "the token cannot be renewed", err)
	}
	o.logger.Info("token renewed on demand", zap.String("kind", string(k.Kind)), zap.String("appid", appid), zap.String("platform", k.Platform))
	return answerJSON(w, http.StatusOK, struct {
		Platform string     `json:"platform,omitempty"`
		AppID    string     `json:"appid"`
		Kind     string     `json:"kind"`
		Expires  *time.Time `json:"expires"`
	}{k.Platform, appid, string(k.Kind), timeOf(expires)})
}

// holder is the platform by which an authorizer is meant: the one that is named, or else the only one that holds an
// authorization of it.
func (o *operations) holder(ctx context.Context, w http.ResponseWriter, named, appid string) (string, error) {
	if named != "" {
		return named, nil
	}
	platforms, err := o.app.manager().Holders(ctx, appid)
	switch {
	case err != nil:
		return "", o.refused(w, "the account cannot be looked up", err)
	case len(platforms) == 0:
		return "", caddy.APIError{HTTPStatus: http.StatusNotFound, Err: fmt.Errorf("%q is not in the configuration, and no platform holds an authorization of it", appid)}
	case len(platforms) > 1:
		return "", badRequest("platform: %s has authorised %s: say which one is meant", appid, strings.Join(platforms, " and "))
	}
	return platforms[0], nil
}

// revoke drops the authorization of an account, as if WeChat had pushed that it took it back.
func (o *operations) revoke(w http.ResponseWriter, r *http.Request) error {
	appid, named, err := o.oneAuthorizer(r)
	if err != nil {
		return err
	}
	platform, err := o.holder(r.Context(), w, named, appid)
	if err != nil {
		return err
	}
	dropped, err := o.app.manager().Forget(r.Context(), platform, appid)
	if err != nil {
		return o.refused(w, "the authorization cannot be dropped", err)
	}
	if dropped {
		o.logger.Warn("authorization dropped on demand: for WeChat it goes on until the account cancels it there", zap.String("platform", platform), zap.String("appid", appid))
	}
	return answerJSON(w, http.StatusOK, struct {
		Platform string `json:"platform"`
		AppID    string `json:"appid"`
		State    string `json:"state"`
	}{platform, appid, string(tokens.StateRevoked)})
}

// failedExchange is an authorization code that could not be exchanged.
type failedExchange struct {
	Platform string `json:"platform"`
	AppID    string `json:"appid,omitempty"`
	Reason   string `json:"reason"`
	// Text is the reason in both languages.
	Text tokens.Text `json:"text"`
}

// drain tries at once to exchange the authorization codes that wait for their next attempt.
func (o *operations) drain(w http.ResponseWriter, r *http.Request) error {
	if o.app == nil {
		return errNoApp
	}
	d, err := o.app.manager().Drain(r.Context())
	if err != nil {
		return o.refused(w, "accepted authorizations cannot be listed", err)
	}
	failed := []failedExchange{}
	for _, f := range d.Failed {
		reason := reasonOf(f.Err)
		failed = append(failed, failedExchange{f.Platform, f.AppID, reason.EN, reason})
	}
	o.logger.Info("authorization codes tried on demand", zap.Int("waiting", d.Waiting), zap.Int("done", d.Done))
	return answerJSON(w, http.StatusOK, struct {
		Waiting int              `json:"waiting"`
		Tried   int              `json:"tried"`
		Done    int              `json:"done"`
		Failed  []failedExchange `json:"failed"`
	}{d.Waiting, d.Tried, d.Done, failed})
}
