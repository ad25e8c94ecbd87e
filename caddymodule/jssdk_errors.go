package caddymodule

import (
	"context"
	"errors"
	"net/http"
	"strconv"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// jssdkFailure is why a page is not signed: what the page, the log and a counter get to see.
type jssdkFailure struct {
	status int
	text   string // for whoever writes the page
	result string // the metric's label
	level  zapcore.Level
	remedy string
	cause  error // of WeChat's or the store's; nil otherwise
}

// jssdkResults are the labels of failures.
var jssdkResults = []string{"malformed", "host", "origin", "unknown", "method", "refused", "unavailable", "canceled"}

const (
	remedyEncode  = "have the page pass url=encodeURIComponent(location.href.split('#')[0])"
	remedyHosts   = "add the host to hosts of wechat_jssdk if its pages should be signed"
	remedyReach   = "check the way to api.weixin.qq.com and the store"
	remedyUnsure  = "none needed: WeChat's list of authorizers is read as soon as there is a ticket"
	remedyFlood   = "look in the access log for who asks for appids that nobody knows"
	remedyUnknown = "compare the appid in the path with the global option wechat, or have the account authorise the platform"
)

// The ways in which a page is turned away before WeChat or the store is asked.
var (
	jssdkMethod = &jssdkFailure{status: http.StatusMethodNotAllowed, result: "method", level: zapcore.InfoLevel,
		text: "only GET is answered", remedy: "have the page fetch the address, not post to it"}
	jssdkUnknown = &jssdkFailure{status: http.StatusNotFound, result: "unknown", level: zapcore.InfoLevel,
		text: "no such account", remedy: remedyUnknown}
	jssdkOrigin = &jssdkFailure{status: http.StatusForbidden, result: "origin", level: zapcore.InfoLevel,
		text: "pages of this origin are not signed", remedy: remedyHosts}
	jssdkHost = &jssdkFailure{status: http.StatusForbidden, result: "host", level: zapcore.InfoLevel,
		text: "pages of this host are not signed", remedy: remedyHosts}
	jssdkNoURL = &jssdkFailure{status: http.StatusBadRequest, result: "malformed", level: zapcore.InfoLevel,
		text: "url is missing: give the page's address, percent-encoded", remedy: remedyEncode}
	jssdkTwoURLs = &jssdkFailure{status: http.StatusBadRequest, result: "malformed", level: zapcore.InfoLevel,
		text: "url is given twice", remedy: remedyEncode}
	jssdkNotEncoded = &jssdkFailure{status: http.StatusBadRequest, result: "malformed", level: zapcore.InfoLevel,
		text: "url is not percent-encoded: its own query cannot be told from what follows", remedy: remedyEncode}
	jssdkLongURL = &jssdkFailure{status: http.StatusBadRequest, result: "malformed", level: zapcore.InfoLevel,
		text: "url is longer than " + strconv.Itoa(maxPageURL) + " bytes", remedy: "give the page a shorter address"}
	jssdkNotPage = &jssdkFailure{status: http.StatusBadRequest, result: "malformed", level: zapcore.InfoLevel,
		text: "url is not the address of a page as location.href has it: http or https, without user name, spaces, backslashes or anything that must be percent-encoded", remedy: remedyEncode}
)

// ticketFailure says what it means that there is no ticket.
func ticketFailure(err error) *jssdkFailure {
	f := &jssdkFailure{cause: err, result: "unavailable", level: zapcore.WarnLevel,
		status: http.StatusServiceUnavailable, text: "there is no ticket for this account at the moment", remedy: remedyReach}
	refusal, isRefusal := errors.AsType[*tokens.APIError](err)
	switch {
	case errors.Is(err, context.Canceled):
		f.result, f.level, f.remedy = "canceled", zapcore.DebugLevel, "none needed: the visitor left"
	case errors.Is(err, tokens.ErrNotAuthorized), errors.Is(err, tokens.ErrNotConfigured):
		f.status, f.text, f.result, f.level, f.remedy = http.StatusNotFound, jssdkUnknown.text, "unknown", zapcore.InfoLevel, remedyUnknown
	case isRefusal:
		known, _ := tokens.Explain(refusal.Code)
		f.remedy = known.Remedy.EN
		if refusal.Code != -1 && known.Class != tokens.ClassBackoff && known.Class != tokens.ClassTicket {
			f.status, f.result, f.level = http.StatusBadGateway, "refused", zapcore.ErrorLevel
			f.text = "WeChat refuses this account a ticket (errcode " + strconv.FormatInt(refusal.Code, 10) + "): the log of the gateway has the remedy"
		}
	case errors.Is(err, tokens.ErrNoTicket):
		known, _ := tokens.Explain(codeNoTicket)
		f.remedy = known.Remedy.EN
	case errors.Is(err, tokens.ErrUnsure):
		f.level, f.remedy = zapcore.InfoLevel, remedyUnsure
	case errors.Is(err, tokens.ErrTooMany):
		f.remedy = remedyFlood
	case isTimeout(err):
		f.status = http.StatusGatewayTimeout
	case errors.Is(err, tokens.ErrUnreachable):
		f.status = http.StatusBadGateway
	}
	return f
}

// log writes the one line of a page that was not signed, unless the like of it was said a moment ago. The page's
// address stays out of it: it may have a login code in its query.
func (j *JSSDK) log(req *jssdkRequest, f *jssdkFailure) {
	fields, say := j.explain(req, f)
	if !say {
		return
	}
	fields = append(fields, zap.String("reason", f.text))
	if req.appid != "" {
		fields = append(fields, zap.String("appid", req.appid))
	}
	if req.key.Platform != "" {
		fields = append(fields, zap.String("platform", req.key.Platform))
	}
	if req.host != "" {
		fields = append(fields, zap.String("host", req.host))
	}
	j.logger.Log(f.level, "page not signed", fields...)
}

// explain returns what the log says of a failure's cause, and whether to say anything: of what an account's owner or
// who runs the gateway has to mend, for each account by itself.
func (j *JSSDK) explain(req *jssdkRequest, f *jssdkFailure) (fields []zap.Field, say bool) {
	if refusal, ok := errors.AsType[*tokens.APIError](f.cause); ok && f.result == "refused" {
		if known, _ := tokens.Explain(refusal.Code); known.Reported() {
			r, say := j.app.manager().ExplainRefusal(req.key, refusal.API, refusal.Code, refusal.Msg)
			r.RID = refusal.RID // the text may be cut off before it
			return append(refusalFields(r), zap.String("meaning", r.Meaning.EN)), say
		}
	}
	ok, missed := j.dampers[f.result].allow()
	if !ok {
		return nil, false
	}
	fields = append(fields, zap.String("remedy", f.remedy), zap.Int("not_logged", missed))
	if f.cause != nil {
		fields = append(fields, causeFields(f.cause)...)
	}
	return fields, true
}
