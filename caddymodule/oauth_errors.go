package caddymodule

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// oauthFailure is why a login ends on a page: what the visitor, the log and a counter get to see.
type oauthFailure struct {
	page   page
	result string // the metric's label
	level  zapcore.Level
	reason string
	remedy string
	cause  error // of WeChat's or the store's; nil otherwise

	retryAfter time.Duration // when to come again; 0: nothing is said
	madeUp     bool          // the account may be anybody's invention
	damped     bool          // strangers can cause it as often as they like: of each func and result one line a minute is logged
}

// setHeaders sets what goes with the page.
func (f *oauthFailure) setHeaders(h http.Header) {
	if f.page.status == http.StatusMethodNotAllowed {
		h.Set("Allow", "GET, HEAD")
	}
	if f.retryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(int((f.retryAfter+time.Second-1)/time.Second)))
	}
}

// byVisitor reports whether WeChat's answer is about what the visitor brought, which anybody can make up.
func (f *oauthFailure) byVisitor() bool {
	return f.result == "invalid" || f.result == "used" || f.madeUp
}

// The ways in which a login ends before WeChat is asked.
var (
	failMethod = &oauthFailure{page: pageMethod, result: "method", level: zapcore.InfoLevel,
		reason: "the method is not GET", remedy: "link to the address, do not post to it"}
	failUnknownFunc = &oauthFailure{page: pageNotFound, result: "unknown", level: zapcore.InfoLevel,
		reason: "no such func", remedy: "compare the end of the link's path with the funcs of wechat_oauth"}
	failUnknownAppID = &oauthFailure{page: pageNotFound, result: "unknown", level: zapcore.InfoLevel,
		reason: "no such platform or account", remedy: "compare the appid in the link's path with the global option wechat"}
	failPlatformLink = &oauthFailure{page: pageNotFound, result: "unknown", level: zapcore.InfoLevel,
		reason: "the link names a platform", remedy: "put the appid of the account into the link, not the platform's"}
	failWhichPlatform = &oauthFailure{page: pageNotFound, result: "unknown", level: zapcore.ErrorLevel,
		reason: "there are several platforms and none is chosen", remedy: "add the subdirective platform to wechat_oauth"}
	failNotAllowed = &oauthFailure{page: pageNotFound, result: "unknown", level: zapcore.InfoLevel,
		reason: "the func is not for this account", remedy: "add the account to the func's appids if it should be"}
	failQuery = &oauthFailure{page: pageBadRequest, result: "malformed", level: zapcore.InfoLevel,
		reason: "the query or the host is malformed", remedy: "a link may have scope (" + scopeNames + ") and state (up to 128 bytes), each once"}
	failCallbackAppID = &oauthFailure{page: pageBadRequest, result: "malformed", level: zapcore.InfoLevel,
		reason: "the callback for a platform names no account in its query", remedy: "add component_appid to the link to WeChat: WeChat adds the account's appid only then"}
	failDenied = &oauthFailure{page: pageDenied, result: "denied", level: zapcore.InfoLevel,
		reason: "the callback has no code: the user did not agree", remedy: "none needed"}
	failNotStarted = &oauthFailure{page: pageForeign, result: "foreign", level: zapcore.InfoLevel,
		reason: "the login did not begin here, and require_start is set", remedy: "link to {base}/authorize/{appid}/{funcKey} instead of WeChat's page, or leave out require_start"}
	failFlowState = &oauthFailure{page: pageBadRequest, result: "foreign", level: zapcore.WarnLevel,
		reason: "the state looks like that of a login which began here, but is none", remedy: "none needed: somebody altered it"}
	failForeignFlow = &oauthFailure{page: pageForeign, result: "foreign", level: zapcore.InfoLevel,
		reason: "this browser has no cookie of the login: it began in another one, for another address, or more than half an hour ago",
		remedy: "link to {base}/authorize/{appid}/{funcKey}, not to where that redirects; with several names for the site set origin"}
	failUsedFlow = &oauthFailure{page: pageForeign, result: "foreign", level: zapcore.WarnLevel,
		reason: "the login has come back before, with another code", remedy: "none needed: the visitor starts again"}
)

// Remedies that are a login's own. All others are those of the table of codes.
const (
	remedyReload = "none needed: the visitor tries again; if it happens often, another program renews the platform's token too"
	remedyRight  = "the account needs the right 网页授权, and with a platform the permission set 4"
)

// codeFailure is what an errcode of WeChat's means for a login.
func codeFailure(code int64) oauthFailure {
	known, _ := tokens.Explain(code)
	f := oauthFailure{page: pageRefused, result: "refused", level: zapcore.ErrorLevel, reason: "WeChat refused", remedy: known.Remedy.EN}
	switch {
	case code == 40163, code == 42003:
		f.page, f.result, f.level, f.reason = pageUsedCode, "used", zapcore.InfoLevel, "the code is used or expired"
	case code == 40029, code == 41008:
		f.page, f.result, f.level, f.reason = pageInvalidCode, "invalid", zapcore.WarnLevel, "the code is not valid"
		f.damped = code == 40029 // a callback without a code does not come that far
	case code == -1, known.Class == tokens.ClassTicket, known.Class == tokens.ClassBackoff:
		f.page, f.result, f.level, f.reason = pageUnavailable, "unavailable", zapcore.WarnLevel, "WeChat cannot be asked for now"
	case code == 40001: // of the account's secret: a refused token has been dealt with
		secret, _ := tokens.Explain(codeInvalidAppSecret)
		f.remedy = secret.Remedy.EN
	case known.MissesPermission():
		f.remedy = remedyRight
	}
	return f
}

// loginFailure says what an error of the exchange means.
func loginFailure(err error) *oauthFailure {
	var f oauthFailure
	refusal, isRefusal := errors.AsType[*tokens.APIError](err)
	held, isHeld := errors.AsType[*notAsked](err)
	switch {
	case isHeld:
		return held.failure
	case errors.Is(err, tokens.ErrFlowUsed):
		return failUsedFlow
	case errors.Is(err, tokens.ErrCodeUsed):
		f = codeFailure(40163)
	case errors.Is(err, tokens.ErrTokenRenewed):
		f = oauthFailure{page: pageTryAgain, result: "unavailable", level: zapcore.WarnLevel,
			reason: "WeChat refused the component token, which is renewed now", remedy: remedyReload}
	case errors.Is(err, tokens.ErrCodeInDoubt):
		f = oauthFailure{page: pageUnavailable, result: "unavailable", level: zapcore.WarnLevel,
			reason: "WeChat was asked and gave no usable answer: the code counts as used", remedy: "check the way to api.weixin.qq.com"}
	case isRefusal:
		f = codeFailure(refusal.Code)
	case errors.Is(err, tokens.ErrNoTicket):
		f = codeFailure(codeNoTicket)
	case errors.Is(err, tokens.ErrNotAuthorized):
		f = codeFailure(61003)
	default:
		f = oauthFailure{page: pageUnavailable, result: "unavailable", level: zapcore.WarnLevel,
			reason: "WeChat or the store did not answer", remedy: "check the way to api.weixin.qq.com and the store"}
	}
	if errors.Is(err, context.Canceled) {
		f.level, f.reason = zapcore.DebugLevel, "the visitor left"
	}
	if _, f.madeUp = errors.AsType[unknownAccount](err); f.madeUp {
		f.damped = true
	}
	f.cause = err
	return &f
}

// flowFailure says what it means that the key for flows is not to be had. Logins that begin in a menu need none.
func flowFailure(err error) *oauthFailure {
	f := &oauthFailure{page: pageUnavailable, result: "unavailable", level: zapcore.WarnLevel, cause: err,
		reason: "the key that binds logins to browsers could not be read", remedy: "check the store"}
	if errors.Is(err, context.Canceled) {
		f.level, f.reason = zapcore.DebugLevel, "the visitor left"
	}
	return f
}

// causeFields are the log fields of an error. Of WeChat's refusals the text is left out: it may quote the request.
func causeFields(err error) []zap.Field {
	if refusal, ok := errors.AsType[*tokens.APIError](err); ok {
		fields := []zap.Field{zap.Int64("errcode", refusal.Code), zap.String("rid", refusal.RID), zap.String("api", refusal.API)}
		if known, _ := tokens.Explain(refusal.Code); known.NamesEgressIP() {
			fields = append(fields, zap.String("egress_ip", tokens.EgressIP(refusal.Msg)))
		}
		return fields
	}
	return []zap.Field{zap.Error(err)}
}
