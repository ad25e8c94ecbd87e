package caddymodule

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/crypto"
)

// Limits of forwarded events.
const (
	maxForwards      = 64      // under way at once; events are rare, and a backend that hangs must not pile them up
	maxForwardAnswer = 1 << 20 // bytes of the next handler's answer, which nobody reads
)

// forward hands an event that is durable to the next handler, in the background. Its codes are emptied; a ticket is
// not for anybody, and WeChat's test accounts, which authorise the platform for the acceptance check, are nobody's
// tenants: their tokens are kept, but no backend hears of them. What the next handler answers is ignored, unless it is
// an error, which is logged.
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
	text := &plaintext{data: message}
	reply := newReplyWriter(maxForwardAnswer)
	facts := newFacts(p, appid)
	// Caddy goes on using the replacer and the variables of r for its access log, so the copy gets its own.
	server, ok := r.Context().Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	if !ok {
		server = new(caddyhttp.Server)
	}
	format := push{fields: crypto.Fields{Format: f.Format}}
	original := r.Clone(context.WithoutCancel(r.Context()))
	e.app.shared.background(func(ctx context.Context) {
		defer func() { <-e.forwards }()
		defer reply.release()
		req := caddyhttp.PrepareRequest(original.WithContext(ctx), caddy.NewReplacer(), reply, server)
		makePlaintext(req, &format, facts, text)
		err := runNext(next, reply, req)
		text.detach()
		switch {
		case err != nil:
			lost(err)
		case reply.status >= http.StatusMultipleChoices:
			lost(fmt.Errorf("status %d", reply.status))
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
