package caddymodule

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// Limits of events.
const (
	// eventStoreTimeout bounds what must be durable before the answer: WeChat gives up after 5 s.
	eventStoreTimeout = 3 * time.Second
	// authCodeLife is how long an authorization code lives when the push does not say: observed codes live an hour.
	authCodeLife = time.Hour
)

// Event serves the platforms' authorization-event URL (授权事件接收URL): the component_verify_ticket, which WeChat
// pushes every ten minutes, and authorized, updateauthorized, unauthorized and the notices about fast registration.
//
// A push is verified and decrypted with the credentials of each platform of the app. It is answered with exactly
// `success` only once what arrived is durable: the ticket, or the intent to exchange the authorization code. The
// exchange itself follows at once in the background, is repeated for as long as the code lives, and is resumed after
// a crash. If the store does not take it within 3 s the answer is 503 and WeChat pushes again; the ticket then still
// serves from memory. A GET with echostr is verified and answered.
//
// A push that is not WeChat's gets 403, one that makes no sense 400, an oversized one 413, one whose body is not there
// 10 s after it has begun 408; each is logged with its reason and counted, never with its content. A ticket that opens is
// accepted even with a timestamp outside the window, with an error that names the clock's offset: without tickets everything stops.
//
// A message that comes to this URL, because the platform's console has it as 消息与事件接收URL too, goes through the
// wechat_message route of the same site, which answers it as if it had come there, and the log names the field to mend. The
// route is found by the path matchers before it: an asterisk in one stands for the account's appid, which is known by the
// gh_ id in the message. An account that is not known is looked for, among those of the platform, and its message waits for
// that; if the search takes longer, it goes unanswered, so that WeChat pushes it again. If there is no such route, or the account cannot
// be told for now, the answer is `success` and an entry in the log. Messages of WeChat's acceptance check are answered here.
//
// The handler answers every request that reaches it. With Forward, events other than tickets also go to the next
// handler as wechat_message would pass them on, in the background and once they are durable, with their codes emptied;
// what it answers is ignored. What is to be forwarded is durable too before the answer: until a backend has answered, whatever that is, it is
// forwarded again, by the next process if need be, so that a backend gets each event at least once, and may get it twice. Events about the test accounts of WeChat's acceptance check (全网发布) are not forwarded,
// unless the platform has release_check off.
type Event struct {
	// TimestampWindow is how far a push's timestamp may be from this machine's clock, or, where that is off by as much by WeChat's answers,
	// from WeChat's, which is asked for before a push is refused. Default: 5m.
	TimestampWindow caddy.Duration `json:"timestamp_window,omitempty"`
	// Forward hands events to the next handler too. Default: false.
	Forward bool `json:"forward,omitempty"`
	// ForwardLimits bound that. Default: those of its fields.
	ForwardLimits *ForwardLimits `json:"forward_limits,omitempty"`

	app      *App
	limits   ForwardLimits // with all defaults filled in
	forwards chan struct{} // a place for each forward under way
	detours  map[*Platform]*damper
	awaiting atomic.Int64 // messages that wait until it is known whose they are
}

// CaddyModule returns the Caddy module information.
func (*Event) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.wechat_event", New: func() caddy.Module { return new(Event) }}
}

// Provision gets the app.
func (e *Event) Provision(ctx caddy.Context) (err error) {
	if e.TimestampWindow == 0 {
		e.TimestampWindow = caddy.Duration(defaultTimestampWindow)
	}
	if e.ForwardLimits != nil {
		e.limits = *e.ForwardLimits
	}
	if err := e.limits.check(); err != nil {
		return fmt.Errorf("forward_limits: %w", err)
	}
	e.limits.provision()
	e.forwards = make(chan struct{}, e.limits.MaxInFlight)
	if e.app, err = loadApp(ctx); err != nil {
		return err
	}
	if err := e.fits(e.app); err != nil {
		return err
	}
	if e.Forward {
		e.app.wantForwards(&e.limits)
	}
	e.detours = make(map[*Platform]*damper, len(e.app.Platforms))
	for _, platform := range e.app.Platforms {
		e.detours[platform] = new(damper)
	}
	return nil
}

// fits implements fitting.
func (*Event) fits(app *App) error {
	if len(app.Platforms) == 0 {
		return errors.New("needs a platform in the global option wechat: only platforms have an authorization-event URL")
	}
	return nil
}

// Validate refuses settings that make no sense.
func (e *Event) Validate() error {
	if e.ForwardLimits != nil && !e.Forward {
		return errLimitsWithoutForward
	}
	return checkWindow(e.TimestampWindow)
}

func parseEvent(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	e := new(Event)
	if err := e.UnmarshalCaddyfile(h.Dispenser); err != nil {
		return nil, err
	}
	return e, fitsOption(h, e)
}

// UnmarshalCaddyfile sets up the handler:
//
//	wechat_event [<matcher>] {
//		timestamp_window <duration>
//		forward {
//			backend_timeout <duration>
//			max_in_flight   <number>
//			max_waiting     <number>
//			try_duration    <duration>
//		}
//	}
//
// The block of forward may be left out.
func (e *Event) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if d.NextArg() {
		return d.ArgErr()
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		switch d.Val() {
		case "timestamp_window":
			if err := windowOption(d, &e.TimestampWindow); err != nil {
				return err
			}
		case "forward":
			if err := e.unmarshalForward(d); err != nil {
				return err
			}
		default:
			return d.Errf("unknown subdirective '%s': want timestamp_window or forward", d.Val())
		}
	}
	return nil
}

// duration parses a subdirective that is a positive duration.
func duration(d *caddyfile.Dispenser, into *caddy.Duration) error {
	name := d.Val()
	if *into != 0 {
		return d.Errf("%s is given twice", name)
	}
	var arg string
	if !d.AllArgs(&arg) {
		return d.ArgErr()
	}
	v, err := caddy.ParseDuration(arg)
	if err != nil || v <= 0 {
		return d.Errf("%s: '%s' is not a duration: write it like 5m", name, arg)
	}
	if err := checkUnit(name, caddy.Duration(v)); err != nil {
		return d.WrapErr(err)
	}
	*into = caddy.Duration(v)
	return nil
}

// windowOption parses timestamp_window.
func windowOption(d *caddyfile.Dispenser, into *caddy.Duration) error {
	if err := duration(d, into); err != nil {
		return err
	}
	if err := checkWindow(*into); err != nil {
		return d.WrapErr(err)
	}
	return nil
}

const (
	// leastDuration is below what any duration of the configuration can mean. In JSON a number is of nanoseconds, and who writes one means
	// seconds or milliseconds.
	leastDuration = time.Millisecond
	// maxTimestampWindow lets any recorded push pass, and twice as long, for which pushes are remembered, is still a time.Duration.
	maxTimestampWindow = 100 * 365 * 24 * time.Hour
)

// checkUnit refuses a duration whose unit was left out.
func checkUnit(field string, v caddy.Duration) error {
	if v > 0 && time.Duration(v) < leastDuration {
		return fmt.Errorf(`%s: %s is too short to be meant: give the unit, as in 5m; in JSON "5m", for a number there is of nanoseconds`, field, time.Duration(v))
	}
	return nil
}

// checkWindow refuses a timestamp_window that accepts nothing, or hardly anything but what it should not.
func checkWindow(v caddy.Duration) error {
	switch {
	case v < 0:
		return errors.New("timestamp_window must not be negative")
	case time.Duration(v) > maxTimestampWindow:
		return fmt.Errorf("timestamp_window: want at most %d years", maxTimestampWindow/(365*24*time.Hour))
	}
	return checkUnit("timestamp_window", v)
}

// ServeHTTP verifies, keeps and acknowledges an event.
func (e *Event) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	if f := resumedForward(r); f != nil {
		if e.Forward {
			e.handOn(f, r, next)
		}
		return nil
	}
	if onDetour(r) != nil {
		return nil // a message that came here once already
	}
	started := time.Now()
	p := newPush()
	defer p.release()
	p.entry.Time = started
	err := e.serve(w, r, next, p)
	detour, refused := errors.AsType[refusedDetour](err)
	switch {
	case refused: // a message, by wechat_message, which has answered it and told the log
		e.app.feedRefused(r.Context(), "event", p, detour.why)
		e.app.metrics().pushes.WithLabelValues("event", detour.why.result).Inc()
		return nil
	case errors.Is(err, errHeld), errors.Is(err, errDropped): // likewise
		e.app.metrics().pushes.WithLabelValues("event", "held").Inc()
		e.app.feedPush(r.Context(), p, feedEvent, outcomeHeld)
		if errors.Is(err, errHeld) {
			panic(http.ErrAbortHandler) // as wechat_message does
		}
		return nil
	case err != nil:
		e.app.refuse(w, r, "event", p, err)
		return nil
	}
	p.answered = p.answeredAt()
	e.app.feedPush(r.Context(), p, feedEvent, outcomeOK)
	e.app.metrics().pushes.WithLabelValues("event", "ok").Inc()
	e.app.metrics().pushDuration.WithLabelValues("event").Observe(p.answered.Sub(started).Seconds())
	return nil
}

func (e *Event) serve(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler, p *push) error {
	if err := p.query.parse(r.URL.RawQuery); err != nil {
		return err
	}
	window := time.Duration(e.TimestampWindow)
	candidates := e.app.platformCodecs
	switch r.Method {
	case http.MethodGet:
		return e.app.handshake(w, p, candidates, window)
	case http.MethodPost:
	default:
		return errMethod
	}
	if err := p.readBody(w, r, defaultMaxBody); err != nil {
		return err
	}
	if err := p.open(candidates); err != nil {
		return err
	}
	if len(p.fields.InfoType) == 0 || len(p.fields.MsgType) > 0 {
		if err := e.app.inTime(p, window); err != nil {
			return err
		}
		p.entry.Platform, p.entry.What = p.platform.AppID, e.app.shared.feed.words.name(string(p.fields.MsgType), "")
		p.entry.Reason = "a message came to the authorization-event URL"
		return e.misdirected(w, r, p)
	}
	if err := e.app.keepEvent(r.Context(), p, window); err != nil {
		return err
	}
	owed, err := e.oweForward(r, p)
	if err != nil {
		return err
	}
	writePlain(w, success)
	if owed != nil {
		e.forward(r, next, p, owed)
	}
	return nil
}

// keepEvent makes an event durable. It returns nil once `success` may be answered.
func (a *App) keepEvent(ctx context.Context, p *push, window time.Duration) error {
	f := &p.fields
	infoType := string(f.InfoType)
	a.nameEvent(p)
	if err := a.inTime(p, window); err != nil {
		if infoType != "component_verify_ticket" || p.query.inWindow(time.Now(), math.MaxInt64) != nil {
			return err
		}
		a.lateTicket(p, window)
	}
	// What WeChat sent must be kept even if it hangs up: only our own deadline ends this.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), eventStoreTimeout)
	defer cancel()
	platform, created := p.platform.AppID, unixTime(f.CreateTime)
	var err error
	switch infoType {
	case "component_verify_ticket":
		if len(f.ComponentVerifyTicket) == 0 {
			return errLacking
		}
		err = a.manager().PutTicket(ctx, platform, tokens.Ticket{
			Value: secret.New(string(f.ComponentVerifyTicket)), CreatedAt: created,
		})
	case "authorized", "updateauthorized":
		err = a.acceptCode(ctx, p, infoType, f.AuthorizerAppID, f.AuthorizationCode)
	case "notify_third_fasteregister":
		if len(f.NotifyAuthCode) > 0 { // absent when the registration was refused
			err = a.acceptCode(ctx, p, infoType, f.NotifyAppID, f.NotifyAuthCode)
		}
	case "unauthorized":
		if !isAppID(string(f.AuthorizerAppID)) {
			return errLacking
		}
		err = a.manager().Revoke(ctx, platform, string(f.AuthorizerAppID), created)
	}
	if err != nil {
		return err
	}
	if infoType != doctorEvent {
		a.health().sightings.mended(platform, codePushNotKept)
	}
	a.logger.Info("event received", zap.String("platform", platform), zap.String("info_type", infoType),
		zap.ByteString("appid", f.AuthorizerAppID))
	return nil
}

// lateTicket tells of a ticket that is outside the window. Where WeChat has told its time, and that does not account for it, nothing is wrong
// with the clocks.
func (a *App) lateTicket(p *push, window time.Duration) {
	now, platform, off := time.Now(), zap.String("platform", p.platform.AppID), p.query.clockOffset()
	ahead, known := a.health().clock.offset(now)
	switch {
	case !known:
		a.logger.Error("a ticket's timestamp is outside timestamp_window, and WeChat does not tell its time; it was accepted, but a message would be refused: unless somebody sent it again, correct this machine's clock",
			platform, zap.Duration("wechat_ahead_by", off))
	case p.inTime(now.Add(ahead), window) == nil: // pushes are judged by WeChat's clock only where the difference is the window or more
		a.logger.Error("a ticket's timestamp is outside timestamp_window by this machine's clock, and not by WeChat's; it was accepted, but a message would be refused: correct this machine's clock",
			platform, zap.Duration("wechat_ahead_by", ahead))
	default:
		a.logger.Warn("a ticket's timestamp is outside timestamp_window, also by WeChat's clock: somebody sent it again, or it was long on its way; it was accepted, as any ticket is",
			platform, zap.Duration("timestamp_off_by", off-ahead))
	}
}

func (a *App) acceptCode(ctx context.Context, p *push, infoType string, appid, code []byte) error {
	if len(code) == 0 || !isAppID(string(appid)) {
		return errLacking
	}
	created := unixTime(p.fields.CreateTime)
	expires := created.Add(authCodeLife)
	if len(p.fields.AuthorizationCodeExpiredTime) > 0 {
		if t, err := strconv.ParseInt(string(p.fields.AuthorizationCodeExpiredTime), 10, 64); err == nil {
			expires = codeExpiry(created, t)
		}
	}
	return a.manager().Accept(ctx, tokens.Intent{
		Platform: p.platform.AppID, AppID: string(appid), Code: secret.New(string(code)),
		CreatedAt: created, ExpiresAt: expires, InfoType: infoType,
	})
}

// codeExpiry reads AuthorizationCodeExpiredTime, documented as seconds but sent as an absolute time.
func codeExpiry(created time.Time, t int64) time.Time {
	const year2001 = 1_000_000_000
	if t < year2001 {
		return created.Add(time.Duration(max(t, 0)) * time.Second)
	}
	return time.Unix(t, 0)
}

// unixTime is createdAt, or now.
func unixTime(text []byte) time.Time {
	if t := createdAt(text); !t.IsZero() {
		return t
	}
	return time.Now()
}

// createdAt reads a CreateTime; one that makes no sense is the zero time.
func createdAt(text []byte) time.Time {
	sec, err := strconv.ParseInt(string(text), 10, 64)
	if err != nil || sec <= 0 || sec > 1<<40 {
		return time.Time{}
	}
	return time.Unix(sec, 0)
}

var (
	_ caddy.Provisioner           = (*Event)(nil)
	_ caddy.Validator             = (*Event)(nil)
	_ caddyhttp.MiddlewareHandler = (*Event)(nil)
	_ caddyfile.Unmarshaler       = (*Event)(nil)
)
