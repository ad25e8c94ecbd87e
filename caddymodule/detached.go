package caddymodule

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-wechat/caddy-wechat/crypto"
)

// detached is a push as handlers in the background may have it, after it was answered. Caddy goes on using the replacer
// and the variables of the request for its access log, and the buffers will be another push's, so it has its own.
type detached struct {
	request *http.Request // as it came in
	server  *caddyhttp.Server
	facts   *facts
	format  crypto.Format // of the message
	message []byte
}

// detach makes a copy of a request that came with a push. The facts and the message become the copy's.
func detach(r *http.Request, format crypto.Format, f *facts, message []byte) *detached {
	server, ok := r.Context().Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	if !ok {
		server = new(caddyhttp.Server)
	}
	return &detached{
		request: r.Clone(context.WithoutCancel(r.Context())), server: server, facts: f, format: format, message: message,
	}
}

// routeGroups is under what Caddy keeps in a request's context which groups of routes have matched.
const routeGroups = caddy.CtxKey("route_group")

// apart is a request for whoever goes on with it after its handler has returned, as if its client had hung up. Caddy's variables and
// placeholders have the values that they have now, and what becomes of them is not seen by the access log, which is being written meanwhile.
func apart(r *http.Request) *http.Request {
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.Context()))
	cancel()
	server, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	if !ok {
		server = new(caddyhttp.Server)
	}
	repl := caddy.NewReplacer()
	c := caddyhttp.PrepareRequest(r.Clone(ctx), repl, &ignoredAnswer{header: make(http.Header)}, server)
	if before, ok := ctx.Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok {
		before.Delete(roundTripPlaceholder) // see work.begin
		asItIs := *before                   // handlers around may map more, with no lock
		repl.Map(asItIs.Get)
	}
	// All else is as the routes before have left it.
	vars := make(map[string]any)
	if before, ok := ctx.Value(caddyhttp.VarsCtxKey).(map[string]any); ok {
		maps.Copy(vars, before)
	}
	ctx = context.WithValue(ctx, caddy.ReplacerCtxKey, repl)
	groups, _ := ctx.Value(routeGroups).(map[string]struct{})
	ctx = caddyhttp.ContextWithIdleTimeouts(ctx, nil, nil) // those are of a connection that others use by now
	ctx = context.WithValue(ctx, routeGroups, maps.Clone(groups))
	ctx = context.WithValue(ctx, caddyhttp.VarsCtxKey, vars)
	ctx = context.WithValue(ctx, caddyhttp.ExtraLogFieldsCtxKey, new(caddyhttp.ExtraLogFields))
	*c = *c.WithContext(ctx) // the placeholders are of c
	return c
}

// serve gives a handler the push in plaintext and returns what went wrong: its error, a panic, or a status other than
// 2xx. What else it answers is ignored. Several may run at the same time.
func (d *detached) serve(ctx context.Context, h caddyhttp.Handler) error {
	repl := caddy.NewReplacer()
	seen := &work{atHand: caddyValues{replacer: repl}} // for hasArrived
	seen.parts.hold(d.message)
	seen.parts.sent.of = seen
	defer seen.parts.text.detach()
	ctx = context.WithValue(ctx, workKey{}, seen)
	answer := &ignoredAnswer{header: make(http.Header)}
	// Caddy's placeholders of the connection panic without it.
	if local := d.request.Context().Value(http.LocalAddrContextKey); local != nil {
		ctx = context.WithValue(ctx, http.LocalAddrContextKey, local)
	}
	// What Caddy takes for the original request is that one, as it was before handlers such as handle_path, in plaintext too: see work.original.
	r := d.request.WithContext(ctx)
	u := *r.URL
	if original, ok := d.request.Context().Value(caddyhttp.OriginalRequestCtxKey).(http.Request); ok && original.URL != nil {
		u = *original.URL
	}
	r.RequestURI, u.RawQuery = plaintextURI(&u, d.facts.openID)
	r.URL = &u
	r = caddyhttp.PrepareRequest(r, repl, answer, d.server)
	r.URL = d.request.URL
	makePlaintext(r, &push{fields: crypto.Fields{Format: d.format}}, d.facts, &seen.parts)
	r.Body = &seen.parts.sent
	err := runNext(h, answer, r)
	lost := unanswered(ctx, err, answer.status)
	if notReached(err) && seen.hasArrived() { // at another backend than the one that was not reached
		err = fmt.Errorf("a backend may have it, and the one that was to get it then was not reached: %v", err) //nolint:errorlint // it is not to be tried again at once
		lost = seen.arrived.Load()
	}
	if err == nil && answer.status >= http.StatusMultipleChoices {
		err = fmt.Errorf("status %d", answer.status)
	}
	switch {
	case err != nil && ctx.Err() != nil && !seen.parts.sent.isBegun():
		err = unsentError{err}
	case lost:
		err = unansweredError{err}
	}
	return err
}

// unanswered reports whether a backend may have a push, and its answer did not come: its time is over, the connection broke, or nobody can
// be talked to at its other end.
func unanswered(ctx context.Context, err error, status int) bool {
	if err == nil {
		return status == statusCanceled && ctx.Err() != nil
	}
	if _, bug := errors.AsType[*panicError](err); bug || status != 0 || notReached(err) {
		return false
	}
	he, ok := errors.AsType[caddyhttp.HandlerError](err)
	return ctx.Err() != nil || ok && (he.StatusCode == http.StatusBadGateway || he.StatusCode == http.StatusGatewayTimeout)
}

// unansweredError is of a push that a backend may have, and has not answered.
type unansweredError struct{ error }

// Unwrap is for errors.Is and errors.As.
func (e unansweredError) Unwrap() error { return e.error }

// unsentError is of a push whose time was over before any of it was sent: reverse_proxy was dialling, which with a machine that is down
// takes longer than a refusal.
type unsentError struct{ error }

// Unwrap is for errors.Is and errors.As.
func (e unsentError) Unwrap() error { return e.error }

// serveReached is serve, again and again until ctx ends while no backend can be reached: reverse_proxy gives up what it tries when its
// configuration ends.
func (d *detached) serveReached(ctx context.Context, h caddyhttp.Handler) error {
	for {
		err := d.serve(ctx, h)
		if !notReached(err) {
			return err
		}
		timer := time.NewTimer(redialEvery)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return err
		}
	}
}

// ignoredAnswer takes an answer of which only the status is of interest.
type ignoredAnswer struct {
	header http.Header
	status int
}

// Header implements http.ResponseWriter.
func (a *ignoredAnswer) Header() http.Header { return a.header }

// WriteHeader implements http.ResponseWriter.
func (a *ignoredAnswer) WriteHeader(status int) {
	if a.status == 0 && status >= 200 {
		a.status = status
	}
}

// Write implements http.ResponseWriter.
func (a *ignoredAnswer) Write(b []byte) (int, error) {
	a.WriteHeader(http.StatusOK)
	return len(b), nil
}

// FlushError lets handlers flush, which means nothing here.
func (*ignoredAnswer) FlushError() error { return nil }

// nothing stands at the end of a chain and answers nothing.
var nothing = caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { return nil })
