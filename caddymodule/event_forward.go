package caddymodule

import (
	"bytes"
	"context"
	"errors"
	"net/http"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/crypto"
)

// maxForwards is how many events are being forwarded at once. They are rare, and a backend that hangs must not pile them
// up.
const maxForwards = 64

// forward hands an event that is durable to the next handler, in the background. Its codes are emptied; a ticket is
// not for anybody, and WeChat's test accounts, which authorise the platform for the acceptance check, are nobody's
// tenants: their tokens are kept, but no backend hears of them. What the next handler answers is ignored, unless it is
// an error, which is logged. While it reaches no backend it is tried again, for backgroundTimeout and over a reload, but not by another process.
func (e *Event) forward(r *http.Request, next caddyhttp.Handler, p *push) {
	f := &p.fields
	platform, infoType := p.platform.AppID, string(f.InfoType)
	if infoType == "component_verify_ticket" {
		return
	}
	appid := string(f.AuthorizerAppID)
	if appid == "" {
		appid = string(f.NotifyAppID)
	}
	if p.platform.releaseCheck() && isReleaseCheckAccount(appid) {
		return
	}
	lost := func(err error) {
		e.app.logger.Error("an event could not be forwarded; it was handled all the same",
			append(whyFields(err), zap.String("platform", platform), zap.String("info_type", infoType))...)
	}
	message, err := withoutCodes(p.opened.Message)
	if err != nil {
		lost(err)
		return
	}
	select {
	case e.forwards <- struct{}{}:
	default:
		lost(errForwardsFull)
		return
	}
	copied := detach(r, f.Format, newFacts(p, appid), message)
	e.app.background(func(ctx context.Context) {
		defer func() { <-e.forwards }()
		if err := copied.serveReached(ctx, next); err != nil {
			lost(err)
		}
	})
}

var errForwardsFull = errors.New("too many events are being forwarded already: the next handler does not answer")

// withoutCodes is an event with its codes emptied.
func withoutCodes(message []byte) ([]byte, error) {
	var f crypto.Fields
	if err := crypto.ScanFields(message, &f); err != nil {
		return nil, err
	}
	out := bytes.Clone(message)
	for _, code := range [...][]byte{f.AuthorizationCode, f.PreAuthCode, f.NotifyAuthCode, f.ComponentVerifyTicket} {
		if len(code) > 0 {
			out = bytes.ReplaceAll(out, code, nil)
		}
	}
	// A code that stands there escaped was not found; then nothing is handed on.
	f = crypto.Fields{}
	if err := crypto.ScanFields(out, &f); err != nil || len(f.AuthorizationCode)+len(f.PreAuthCode)+len(f.NotifyAuthCode)+len(f.ComponentVerifyTicket) > 0 {
		return nil, errors.New("its codes could not be taken out")
	}
	return out, nil
}
