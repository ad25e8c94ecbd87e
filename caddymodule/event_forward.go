package caddymodule

import (
	"bytes"
	"context"
	"errors"
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
// not for anybody. What the next handler answers is ignored, unless it is an error, which is logged.
func (e *Event) forward(r *http.Request, next caddyhttp.Handler, p *push) {
	f := &p.fields
	platform, infoType := p.platform.AppID, string(f.InfoType)
	if infoType == "component_verify_ticket" {
		return
	}
	lost := func(err error) {
		e.app.logger.Error("an event could not be forwarded; it was handled all the same",
			zap.String("platform", platform), zap.String("info_type", infoType), zap.Error(err))
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
	appid := string(f.AuthorizerAppID)
	if appid == "" {
		appid = string(f.NotifyAppID)
	}
	text := &plaintext{data: message}
	req := plaintextRequest(r, p, newFacts(p, appid), text)
	e.app.shared.background(func(ctx context.Context) {
		defer func() { <-e.forwards }()
		reply := newReplyWriter(maxForwardAnswer)
		defer reply.release()
		err := runNext(next, reply, detachedRequest(ctx, req, reply))
		text.detach()
		switch {
		case err != nil:
			lost(err)
		case reply.status >= http.StatusMultipleChoices:
			lost(errors.New(http.StatusText(reply.status)))
		}
	})
}

var errForwardsFull = errors.New("too many events are being forwarded already: the next handler does not answer")

// detachedRequest is a request that outlives the one it came from. It has a replacer and a table of variables of its
// own: Caddy still reads those of the other one, for its access log.
func detachedRequest(ctx context.Context, r *http.Request, w http.ResponseWriter) *http.Request {
	ctx = context.WithValue(ctx, factsKey{}, factsOf(r.Context()))
	server, _ := r.Context().Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	if server == nil {
		server = new(caddyhttp.Server)
	}
	repl := caddy.NewReplacer()
	req := caddyhttp.PrepareRequest(r.WithContext(ctx), repl, w, server)
	repl.Map(factsOf(ctx).placeholder)
	return req
}

// withoutCodes is an event with its codes emptied.
func withoutCodes(message []byte) ([]byte, error) {
	var f crypto.Fields
	if err := crypto.ScanFields(message, &f); err != nil {
		return nil, err
	}
	out := bytes.Clone(message)
	for _, code := range [...][]byte{f.AuthorizationCode, f.PreAuthCode, f.NotifyAuthCode} {
		if len(code) > 0 {
			out = bytes.ReplaceAll(out, code, nil)
		}
	}
	// A code that stands there escaped was not found; then nothing is handed on.
	f = crypto.Fields{}
	if err := crypto.ScanFields(out, &f); err != nil || len(f.AuthorizationCode)+len(f.PreAuthCode)+len(f.NotifyAuthCode) > 0 {
		return nil, errors.New("its codes could not be taken out")
	}
	return out, nil
}
