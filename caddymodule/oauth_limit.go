package caddymodule

import (
	"context"
	"net/netip"
	"sync/atomic"
	"time"

	"go.uber.org/zap/zapcore"
)

// Bounds of what callbacks of logins ask of WeChat.
const (
	defaultBadCodes = 60
	maxBadCodes     = 100_000
	anyBadCodes     = -1
	// badCodesDebt is how long a visitor is refused at most, after codes that were all on their way before the first was
	// answered: those who share the address must not pay for it for ever.
	badCodesDebt = 5 * time.Minute
	// defaultMaxLogins at a tenth of a second each are ten thousand logins a second.
	defaultMaxLogins = 1000
	// placeWait is well within the time that a login has.
	placeWait = 5 * time.Second
	// busyRetry is when to come again after that.
	busyRetry = 5 * time.Second
)

// dampedResults are those of failures that are damped.
var dampedResults = []string{"invalid", "limited", "busy", "refused"}

// The ways in which a login ends because WeChat is not to be asked now.
var (
	failBadCodes = oauthFailure{page: pageTooMany, result: "limited", level: zapcore.WarnLevel, damped: true,
		reason: "the visitor brought too many codes that WeChat does not take",
		remedy: "none needed; if it happens to everybody, name the proxy in front in trusted_proxies, or set bad_codes"}
	failBadAccounts = oauthFailure{page: pageTooMany, result: "limited", level: zapcore.WarnLevel, damped: true,
		reason: "the visitor came for too many accounts that have not authorised the platform, and this one is not known",
		remedy: "none needed; if it happens to everybody, name the proxy in front in trusted_proxies, or set bad_codes"}
	failBusy = &oauthFailure{page: pageTryAgain, result: "busy", level: zapcore.WarnLevel, damped: true, retryAfter: busyRetry,
		reason: "max_in_flight codes are with WeChat already",
		remedy: "check the way to api.weixin.qq.com; if WeChat answers as fast as ever, raise max_in_flight"}
)

// notAsked says why WeChat was not asked about a code. The code is as good as before.
type notAsked struct{ failure *oauthFailure }

func (e *notAsked) Error() string { return e.failure.reason }

func (o *OAuth) provisionLimits() {
	if o.BadCodes == 0 {
		o.BadCodes = defaultBadCodes
	}
	if o.MaxInFlight == 0 {
		o.MaxInFlight = defaultMaxLogins
	}
	o.places = newLoginPlaces(o.MaxInFlight)
}

// allowance is what one visitor may bring that WeChat does not take.
func (o *OAuth) allowance(what string) allowance {
	every := time.Minute / time.Duration(o.BadCodes)
	return allowance{what: what, atOnce: o.BadCodes, every: every, debt: max(0, int(badCodesDebt/every)-2)} // one may come beyond it, and one more is waited for
}

const (
	badCode    = "codes"
	badAccount = "accounts"
)

// admit lets a code go to WeChat, and returns what must be called after that.
func (o *OAuth) admit(ctx context.Context, visitor netip.Prefix, req *oauthRequest) (leave func(), err error) {
	if err := o.tooMany(ctx, visitor, req); err != nil {
		return nil, err
	}
	if !o.places.take(ctx) {
		return nil, &notAsked{failBusy}
	}
	if err := o.tooMany(ctx, visitor, req); err != nil { // others of the visitor's may have been answered meanwhile
		o.places.leave()
		return nil, err
	}
	return o.places.leave, nil
}

// tooMany is an error if the visitor has brought too much that WeChat does not take.
func (o *OAuth) tooMany(ctx context.Context, visitor netip.Prefix, req *oauthRequest) error {
	if !o.counts(visitor) {
		return nil
	}
	if wait := o.app.logins().wait(visitor, o.allowance(badCode)); wait > 0 {
		return refusedFor(failBadCodes, wait)
	}
	if req.platform == "" {
		return nil
	}
	if wait := o.app.logins().wait(visitor, o.allowance(badAccount)); wait > 0 {
		if known, err := o.app.manager().Authorized(ctx, req.appid); err != nil || !known {
			return refusedFor(failBadAccounts, wait)
		}
	}
	return nil
}

func refusedFor(f oauthFailure, wait time.Duration) error {
	f.retryAfter = wait
	return &notAsked{&f}
}

// counts reports whether what a visitor brings is counted.
func (o *OAuth) counts(visitor netip.Prefix) bool {
	return o.BadCodes != anyBadCodes && visitor.IsValid()
}

// charge counts what WeChat said of a visitor's code, if that is the visitor's doing.
func (o *OAuth) charge(visitor netip.Prefix, req *oauthRequest, err error) {
	refusal := apiErrorOf(err)
	if refusal == nil || !o.counts(visitor) {
		return
	}
	f := codeFailure(refusal.Code)
	switch {
	case f.byVisitor():
		o.app.logins().charge(visitor, o.allowance(badCode))
	case req.platform != "" && aboutAccount(refusal.Code):
		o.app.logins().charge(visitor, o.allowance(badAccount))
	}
}

// aboutAccount reports whether a refusal is about the account that a callback named.
func aboutAccount(code int64) bool { return code == 40013 || code == 61003 }

// unknownAccount is WeChat's refusal of an account that the gateway does not know either: anybody can make one up.
type unknownAccount struct{ error }

func (e unknownAccount) Unwrap() error { return e.error }

// blamed is the error of an exchange, as unknownAccount if it is that.
func (o *OAuth) blamed(ctx context.Context, req *oauthRequest, err error) error {
	refusal := apiErrorOf(err)
	if refusal == nil || req.platform == "" || !aboutAccount(refusal.Code) {
		return err
	}
	if known, unsure := o.app.manager().Authorized(ctx, req.appid); known || unsure != nil {
		return err
	}
	return unknownAccount{err}
}

// loginPlaces bounds the codes that are with WeChat, and those that wait for it.
type loginPlaces struct {
	taken   chan struct{}
	waiting atomic.Int64
}

func newLoginPlaces(n int) *loginPlaces {
	if n < 0 || n > maxMaxInFlight {
		n = 0 // is not valid
	}
	return &loginPlaces{taken: make(chan struct{}, n)}
}

// take waits for a place, and not at all when as many wait as there are places.
func (p *loginPlaces) take(ctx context.Context) bool {
	select {
	case p.taken <- struct{}{}:
		return true
	default:
	}
	defer p.waiting.Add(-1)
	if p.waiting.Add(1) > int64(cap(p.taken)) {
		return false
	}
	timer := time.NewTimer(placeWait)
	defer timer.Stop()
	select {
	case p.taken <- struct{}{}:
		return true
	case <-timer.C:
	case <-ctx.Done():
	}
	return false
}

func (p *loginPlaces) leave() { <-p.taken }
