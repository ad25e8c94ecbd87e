package caddymodule

import (
	"context"
	"errors"

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
		reason: "the query or the host is malformed", remedy: "a link may have scope (" + scopeNames + ") and state (up to 128 letters and digits, through a platform also . _ ~ -), each once"}
	failCallbackAppID = &oauthFailure{page: pageBadRequest, result: "malformed", level: zapcore.InfoLevel,
		reason: "the callback for a platform names no account in its query", remedy: "add component_appid to the link to WeChat: WeChat adds the account's appid only then"}
	failDenied = &oauthFailure{page: pageDenied, result: "denied", level: zapcore.InfoLevel,
		reason: "the callback has no code: the user did not agree", remedy: "none needed"}
)

// Remedies that several codes share.
const (
	remedyRestart   = "none needed: the visitor starts again; if it happens to everybody, compare appid and component_appid of the link with the callback's path"
	remedyReload    = "none needed: the visitor tries again; if it happens often, another program renews the platform's token too"
	remedyWhitelist = "add this machine's egress IP address to the whitelist (白名单IP地址) in WeChat's console"
	remedyWait      = "WeChat is busy or a quota is used up: wait, then look at the quota in WeChat's console"
	remedySecret    = "compare appid and secret of the global option wechat with WeChat's console"
	remedyTicket    = "wait for the component_verify_ticket that WeChat pushes every ten minutes, and check that it reaches wechat_event"
	remedyRight     = "the account needs the right 网页授权, and with a platform the permission set 4"
	remedyOther     = "look the errcode up in WeChat's documentation"
)

// codeFailure is what an errcode of WeChat's means for a login.
func codeFailure(code int64) oauthFailure {
	refused := func(remedy string) oauthFailure {
		return oauthFailure{page: pageRefused, result: "refused", level: zapcore.ErrorLevel, reason: "WeChat refused", remedy: remedy}
	}
	unavailable := func(remedy string) oauthFailure {
		return oauthFailure{page: pageUnavailable, result: "unavailable", level: zapcore.WarnLevel, reason: "WeChat cannot be asked for now", remedy: remedy}
	}
	switch code {
	case 40163, 42003:
		return oauthFailure{page: pageUsedCode, result: "used", level: zapcore.InfoLevel, reason: "the code is used or expired", remedy: remedyRestart}
	case 40029, 41008:
		return oauthFailure{page: pageInvalidCode, result: "invalid", level: zapcore.WarnLevel, reason: "the code is not valid", remedy: remedyRestart}
	case 61003:
		return refused("the account has not authorised the platform, or no longer does: let its owner authorise it")
	case 61004, 40164, 40090, 45035:
		return refused(remedyWhitelist)
	case 61005, 61006:
		return unavailable(remedyTicket)
	case -1, 45009, 45011:
		return unavailable(remedyWait)
	case 40001, 40013, 40125:
		return refused(remedySecret)
	case 48001, 61007:
		return refused(remedyRight)
	default:
		return refused(remedyOther)
	}
}

// loginFailure says what an error of the exchange means.
func loginFailure(err error) *oauthFailure {
	var f oauthFailure
	refusal, isRefusal := errors.AsType[*tokens.APIError](err)
	switch {
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
		f = codeFailure(61005)
	case errors.Is(err, tokens.ErrNotAuthorized):
		f = codeFailure(61003)
	default:
		f = oauthFailure{page: pageUnavailable, result: "unavailable", level: zapcore.WarnLevel,
			reason: "WeChat or the store did not answer", remedy: "check the way to api.weixin.qq.com and the store"}
	}
	if errors.Is(err, context.Canceled) {
		f.level, f.reason = zapcore.DebugLevel, "the visitor left"
	}
	f.cause = err
	return &f
}

// causeFields are the log fields of an error. Of WeChat's refusals the text is left out: it may quote the request.
func causeFields(err error) []zap.Field {
	if refusal, ok := errors.AsType[*tokens.APIError](err); ok {
		return []zap.Field{zap.Int64("errcode", refusal.Code), zap.String("rid", refusal.RID), zap.String("api", refusal.API)}
	}
	return []zap.Field{zap.Error(err)}
}
