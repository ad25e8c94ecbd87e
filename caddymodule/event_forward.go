package caddymodule

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// owedForward is an event that is to be handed to the next handler, and is kept until it has been.
type owedForward struct {
	manager *tokens.Manager // that keeps it: a reload may put another in its place
	id      string
	appid   string
	message []byte
}

// oweForward keeps what is to be handed to the next handler, so that it gets there even if this process is killed; nil: nothing is. Codes
// are emptied; a ticket is not for anybody, and WeChat's test accounts, which authorise the platform for the acceptance check, are
// nobody's tenants: their tokens are kept, but no backend hears of them.
func (e *Event) oweForward(r *http.Request, p *push) (*owedForward, error) {
	f := &p.fields
	if infoType := string(f.InfoType); !e.Forward || infoType == "component_verify_ticket" || infoType == doctorEvent {
		return nil, nil
	}
	appid := string(f.AuthorizerAppID)
	if appid == "" {
		appid = string(f.NotifyAppID)
	}
	if p.platform.releaseCheck() && isReleaseCheckAccount(appid) {
		return nil, nil
	}
	message, err := withoutCodes(p.opened.Message)
	if err != nil {
		e.app.metrics().ForwardEnded(tokens.ForwardUnfit, 1)
		e.forwardLost(p.platform.AppID, string(f.InfoType), err)
		return nil, nil
	}
	kept, err := json.Marshal(keptEventOf(r, message))
	if err != nil {
		return nil, err
	}
	// The event itself was kept meanwhile: both have the time of one.
	ctx, cancel := context.WithDeadline(context.WithoutCancel(r.Context()), p.entry.Time.Add(eventStoreTimeout))
	defer cancel()
	manager := e.app.manager()
	id, err := manager.KeepForward(ctx, tokens.Forward{
		Platform: p.platform.AppID, AppID: appid, InfoType: string(f.InfoType), Created: createdAt(f.CreateTime), Event: kept,
	})
	if errors.Is(err, tokens.ErrForwardsFull) {
		e.forwardLost(p.platform.AppID, string(f.InfoType), err)
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("keep what is to be forwarded: %w", err)
	}
	return &owedForward{manager, id, appid, message}, nil
}

func (e *Event) forwardLost(platform, infoType string, err error) {
	e.app.logger.Error("an event could not be forwarded; it was handled all the same",
		append(whyFields(err), zap.String("platform", platform), zap.String("info_type", infoType))...)
}

// forwardLater tells that an event waits.
func (e *Event) forwardLater(platform, infoType string, err error) {
	e.app.logger.Warn("an event could not be forwarded yet; it is tried again",
		append(whyFields(err), zap.String("platform", platform), zap.String("info_type", infoType))...)
}

// forward hands an event that is durable to the next handler, in the background. What that answers is ignored, unless it is
// an error, which is logged. While it reaches no backend it is tried again, for backend_timeout and over a reload, and after that, or when
// no answer came, by the manager, also in the next process.
func (e *Event) forward(r *http.Request, next caddyhttp.Handler, p *push, owed *owedForward) {
	platform, infoType := p.platform.AppID, string(p.fields.InfoType)
	select {
	case e.forwards <- struct{}{}:
	default:
		e.forwardLater(platform, infoType, errForwardsFull)
		owed.manager.HandOnLater(owed.id)
		return
	}
	copied := detach(r, p.fields.Format, newFacts(p, owed.appid), owed.message)
	timeout := time.Duration(e.limits.BackendTimeout)
	e.app.backgroundFor(timeout+backgroundTimeout, func(ctx context.Context) { // also for the store
		defer func() { <-e.forwards }()
		err := owed.manager.HandOn(ctx, owed.id, func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, timeout)
			defer cancel()
			return handedOn(ctx, copied.serveReached(ctx, next))
		})
		switch {
		case errors.Is(err, tokens.ErrNotForwarded):
			e.forwardLater(platform, infoType, err)
		case err != nil:
			e.forwardLost(platform, infoType, err)
		}
	})
}

var errForwardsFull = errors.New("too many events are being forwarded already, the next handler does not answer: this one is tried again in a few minutes")

// handedOn says of the error of a handler whether the event is to be handed on once more: if nobody was reached, if this process ends
// while somebody may have it, and, some time later, if whoever may have it has not answered. As with WeChat's own pushes an answer of any
// kind is the end of it.
func handedOn(ctx context.Context, err error) error {
	_, unsent := errors.AsType[unsentError](err)
	_, unanswered := errors.AsType[unansweredError](err)
	switch {
	case err == nil:
		return nil
	case notReached(err), unsent, errors.Is(ctx.Err(), context.Canceled):
		return fmt.Errorf("%w: %w", tokens.ErrNotForwarded, err)
	case unanswered:
		return fmt.Errorf("%w: %w", tokens.ErrUnanswered, err)
	}
	return err
}

// keptEvent is what another process needs to hand an event on as if it had just come: the request, and the event with its codes emptied.
type keptEvent struct {
	Server  string      `json:"server,omitempty"`
	Host    string      `json:"host"`
	URI     string      `json:"uri"`
	TLS     bool        `json:"tls,omitempty"`
	Proto   string      `json:"proto,omitempty"`
	Remote  string      `json:"remote,omitempty"`
	Local   string      `json:"local,omitempty"`
	Header  http.Header `json:"header,omitempty"`
	Message []byte      `json:"message"`
}

func keptEventOf(r *http.Request, message []byte) keptEvent {
	k := keptEvent{Host: r.Host, URI: r.URL.RequestURI(), TLS: r.TLS != nil, Proto: r.Proto, Remote: r.RemoteAddr, Header: r.Header, Message: message}
	if original, ok := r.Context().Value(caddyhttp.OriginalRequestCtxKey).(http.Request); ok && original.URL != nil {
		k.URI = original.URL.RequestURI() // as it was before handlers such as handle_path
	}
	if server, ok := r.Context().Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server); ok {
		k.Server = server.Name()
	}
	if local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok {
		k.Local = local.String()
	}
	return k
}

// request is the request that the event came with, on its way through the routes of a server.
func (k *keptEvent) request(ctx context.Context, u *url.URL) *http.Request {
	r := &http.Request{
		Method: http.MethodPost, URL: u, Host: k.Host, RemoteAddr: k.Remote, Header: k.Header, Proto: k.Proto, RequestURI: k.URI, Body: http.NoBody,
	}
	r.ProtoMajor, r.ProtoMinor, _ = http.ParseHTTPVersion(k.Proto)
	if r.Header == nil {
		r.Header = make(http.Header)
	}
	if k.TLS {
		name, _, err := net.SplitHostPort(k.Host)
		if err != nil {
			name = k.Host
		}
		r.TLS = &tls.ConnectionState{HandshakeComplete: true, ServerName: name}
	}
	// Caddy's placeholders of the connection panic without it.
	var local net.Addr = &net.UnixAddr{Net: "unix", Name: k.Local}
	if addr, err := netip.ParseAddrPort(k.Local); err == nil {
		local = net.TCPAddrFromAddrPort(addr)
	}
	return r.WithContext(context.WithValue(ctx, http.LocalAddrContextKey, local))
}

// resumed is an event on its way to a wechat_event that forwards, whose next handler is to get it.
type resumed struct {
	detour  // no handler before that one can send it anywhere
	ctx     context.Context
	push    *push
	appid   string
	outcome error // of the next handler
}

type resumedKey struct{}

// resumedForward is the event that a request stands for, which is no push; nil: it is one.
func resumedForward(r *http.Request) *resumed {
	f, _ := r.Context().Value(resumedKey{}).(*resumed)
	return f
}

// run has it go through the routes. What handlers around the next one make of its end, such as a panic, is not the event's.
func (f *resumed) run(w http.ResponseWriter, r *http.Request) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &panicError{value: v, stack: zap.Stack("").String}
		}
	}()
	return f.serve(w, r)
}

// handOn gives it to the next handler, in a place of those for events that have just come.
func (e *Event) handOn(f *resumed, r *http.Request, next caddyhttp.Handler) {
	if !f.taken.CompareAndSwap(false, true) {
		return
	}
	select {
	case e.forwards <- struct{}{}:
		defer func() { <-e.forwards }()
	default:
		f.outcome = fmt.Errorf("%w: %w", tokens.ErrNoPlace, errForwardsFull)
		return
	}
	copied := detach(r, f.push.fields.Format, newFacts(f.push, f.appid), f.body)
	ctx, cancel := context.WithTimeout(f.ctx, time.Duration(e.limits.BackendTimeout))
	defer cancel()
	f.outcome = handedOn(ctx, copied.serve(ctx, next))
}

// wantForwards has events forwarded that were kept and not forwarded yet. It is for Provision, as wantConfirmFiles is.
func (a *App) wantForwards(l *ForwardLimits) {
	a.env.Forward = a.forwardKept
	a.env.WeChatAhead = func() (time.Duration, bool) { return a.health().clock.offset(time.Now()) }
	a.env.MaxForwards = max(a.env.MaxForwards, l.MaxWaiting)
	a.env.ForwardLife = max(a.env.ForwardLife, time.Duration(l.TryDuration))
}

// unquotedError is an error as the log may have it: see whyFields.
type unquotedError struct{ error }

func (e unquotedError) Error() string { return unquotedText(e.error) }

// Unwrap is for errors.Is and errors.As.
func (e unquotedError) Unwrap() error { return e.error }

// forwardKept hands on an event that another process has accepted, through the routes of the site that it came to.
func (a *App) forwardKept(ctx context.Context, f tokens.Forward) error {
	v, err := a.ctx.AppIfConfigured("http")
	sites, ok := v.(*caddyhttp.App)
	if err != nil || !ok {
		return fmt.Errorf("%w: there is no site", tokens.ErrNotForwarded)
	}
	return a.forwardThrough(ctx, sites.Servers, f)
}

// forwardThrough is forwardKept through the routes of these servers.
func (a *App) forwardThrough(ctx context.Context, servers map[string]*caddyhttp.Server, f tokens.Forward) error {
	if err := a.sendThrough(ctx, servers, f); err != nil {
		return unquotedError{err} // the manager logs it
	}
	return nil
}

func (a *App) sendThrough(ctx context.Context, servers map[string]*caddyhttp.Server, f tokens.Forward) error {
	ctx, cancel := context.WithTimeout(ctx, maxForwardTimeout)
	defer cancel()
	var kept keptEvent
	if err := json.Unmarshal(f.Event, &kept); err != nil {
		return errors.New("what was kept of it is not of the form expected")
	}
	u, err := url.ParseRequestURI(kept.URI)
	if err != nil {
		return errors.New("what was kept of it names no path")
	}
	p := &push{platform: a.platform(f.Platform)}
	if p.platform == nil {
		return fmt.Errorf("%w: its platform is not configured", tokens.ErrNotForwarded)
	}
	if err := crypto.ScanFields(kept.Message, &p.fields); err != nil {
		return errors.New("what was kept of it is no event")
	}
	unfound := fmt.Errorf("%w: no site has a wechat_event with forward at %s%s", tokens.ErrNotForwarded, kept.Host, u.Path)
	names := slices.Sorted(maps.Keys(servers))
	if i := slices.Index(names, kept.Server); i > 0 { // to which it came
		names[0], names[i] = names[i], names[0]
	}
	for _, name := range names {
		server := servers[name]
		way := &resumed{detour: detour{server: server, path: u.Path, body: kept.Message}, ctx: ctx, push: p, appid: f.AppID}
		answer := &detourAnswer{&ignoredAnswer{header: make(http.Header)}, &way.detour}
		r := kept.request(context.WithValue(ctx, resumedKey{}, way), u)
		err := way.run(answer, way.request(r, answer, detourContext{r.Context(), &way.detour}))
		if way.taken.Load() {
			return way.outcome
		}
		if err != nil {
			unfound = fmt.Errorf("%w: %w", unfound, err)
		}
	}
	return unfound
}

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
