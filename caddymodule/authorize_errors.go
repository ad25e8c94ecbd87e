package caddymodule

import (
	"context"
	"errors"
	"net/http"

	"go.uber.org/zap/zapcore"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// The pages on which an authorization of a platform ends without one.
var (
	pageAuthorizeLink = page{status: http.StatusBadRequest,
		zh: pageText{"链接无效", "这个授权链接不完整或已损坏，请重新开始授权。"},
		en: pageText{"Invalid link", "This authorization link is incomplete or damaged. Please start again."}}
	pageAuthorizeState = page{status: http.StatusBadRequest,
		zh: pageText{"授权未完成", "这次授权不是在这个浏览器中发起的，或距发起已超过 30 分钟。请重新开始授权。"},
		en: pageText{"Not authorized", "This authorization was not started in this browser, or more than 30 minutes ago. Please start again."}}
	pageAuthorizeUsed = page{status: http.StatusGone,
		zh: pageText{"授权已失效", "这次授权已被使用或已过期，请重新开始授权。"},
		en: pageText{"Authorization expired", "This authorization was used already or has expired. Please start again."}}
	pageAuthorizeTooMany = page{status: http.StatusTooManyRequests,
		zh: pageText{"操作过于频繁", "发起授权的次数过多，请过几分钟再试。"},
		en: pageText{"Too many attempts", "Authorizations were started too often. Please try again in a few minutes."}}
	pageAuthorizeRefused = page{status: http.StatusBadGateway,
		zh: pageText{"暂时无法授权", "微信拒绝了这个第三方平台的请求，管理员可以在日志中看到原因。"},
		en: pageText{"Cannot authorize", "WeChat refuses this platform's request. The operator finds the reason in the log."}}
	pageAuthorizeUnavailable = page{status: http.StatusServiceUnavailable,
		zh: pageText{"暂时无法授权", "现在联系不上微信，请稍后重新开始授权。"},
		en: pageText{"Cannot authorize now", "WeChat cannot be reached at the moment. Please start again in a little while."}}
	pageAuthorizePending = page{status: http.StatusServiceUnavailable, again: true,
		zh: pageText{"授权尚未完成", "你已同意授权，但现在联系不上微信。系统会继续处理，你也可以稍后重试查看结果。"},
		en: pageText{"Almost done", "You agreed, but WeChat cannot be reached at the moment. This goes on by itself; try again in a little while to see the result."}}
)

// The ways in which an authorization ends before WeChat is asked.
var (
	failAuthorizePlatform = &oauthFailure{page: pageNotFound, result: "unknown", level: zapcore.InfoLevel,
		reason: "no such platform", remedy: "compare the platform's appid in the link with the global option wechat"}
	failAuthorizeQuery = &oauthFailure{page: pageAuthorizeLink, result: "malformed", level: zapcore.InfoLevel,
		reason: "the query or the host is malformed", remedy: "a link may have kind (pc or h5), platform, auth_type (within the one configured), biz_appid and category (ids joined by commas), each once"}
	failVisitorTooMany = &oauthFailure{page: pageAuthorizeTooMany, result: "limited", level: zapcore.InfoLevel, retryAfter: visitorStartEvery,
		reason: "the visitor started too often", remedy: "none needed"}
	failAllTooMany = &oauthFailure{page: pageAuthorizeTooMany, result: "limited", level: zapcore.WarnLevel, retryAfter: visitorStartEvery,
		reason: "all visitors together started too often", remedy: "look in the access log for who starts authorizations"}
	failState = &oauthFailure{page: pageAuthorizeState, result: "state", level: zapcore.InfoLevel,
		reason: "the callback does not prove that it was started in this browser", remedy: "none needed; if it happens to everybody, compare the subdirective origin with the address that visitors see"}
	failStateExpired = &oauthFailure{page: pageAuthorizeState, result: "state", level: zapcore.InfoLevel,
		reason: "the callback was started more than 30 minutes ago", remedy: "none needed"}
	failStateUsed = &oauthFailure{page: pageAuthorizeUsed, result: "used", level: zapcore.InfoLevel,
		reason: "the callback's start was used for another authorization code", remedy: "none needed"}
	failNoAuthCode = &oauthFailure{page: pageAuthorizeLink, result: "malformed", level: zapcore.InfoLevel,
		reason: "the callback has no authorization code", remedy: "none needed"}
	failUnfinished = &oauthFailure{page: pageAuthorizePending, result: "unavailable", level: zapcore.ErrorLevel,
		reason: "the exchange did not finish", remedy: "report it to who maintains the gateway"}
)

// isFinal reports whether asking WeChat again would not help.
func isFinal(f *oauthFailure) bool { return f.result == "invalid" }

// authorizeFailure says what an error on the way to WeChat means; unavailable is the page for one that may pass.
func authorizeFailure(err error, unavailable page) *oauthFailure {
	f := &oauthFailure{page: unavailable, result: "unavailable", level: zapcore.WarnLevel, cause: err,
		reason: "WeChat or the store did not answer", remedy: "check the way to api.weixin.qq.com and the store"}
	refusal, isRefusal := errors.AsType[*tokens.APIError](err)
	code := int64(0)
	switch {
	case isRefusal:
		code = refusal.Code
	case errors.Is(err, tokens.ErrNoTicket):
		code = codeNoTicket
	}
	known, _ := tokens.Explain(code)
	switch {
	case code == 0:
	case code == 61009, code == 61010:
		f.page, f.result, f.level, f.reason, f.remedy = pageAuthorizeUsed, "invalid", zapcore.InfoLevel, "the authorization code is not valid", known.Remedy.EN
	case code == -1, known.Class == tokens.ClassTicket, known.Class == tokens.ClassBackoff:
		f.reason, f.remedy = "WeChat cannot be asked for now", known.Remedy.EN
	default:
		f.page, f.result, f.level, f.reason, f.remedy = pageAuthorizeRefused, "refused", zapcore.ErrorLevel, "WeChat refused", known.Remedy.EN
	}
	if errors.Is(err, context.Canceled) {
		f.level, f.reason = zapcore.DebugLevel, "the visitor left"
	}
	return f
}

// startFailure says what an error before the visitor leaves for WeChat means.
func startFailure(err error) *oauthFailure { return authorizeFailure(err, pageAuthorizeUnavailable) }

// exchangeFailure says what an error of the exchange means.
func exchangeFailure(err error) *oauthFailure { return authorizeFailure(err, pageAuthorizePending) }
