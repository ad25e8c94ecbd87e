package caddymodule

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"unicode"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// apiRefusal is an answer of the gateway's own that is not a success.
type apiRefusal struct {
	status int    // HTTP status; below 500 it becomes 200 for an SDK
	code   int64  // errcode; for trouble between the gateway and WeChat, the HTTP status
	msg    string // errmsg: what is wrong and what to do, without a secret
	rule   string // which check refused, for the log
	// wechats: the code is one that WeChat gave for a token, with that request id.
	wechats bool
	rid     string
}

func refuse(status int, code int64, rule, format string, args ...any) *apiRefusal {
	return &apiRefusal{status: status, code: code, rule: rule, msg: fmt.Sprintf(format, args...)}
}

// statusFor is the HTTP status of a refusal for the one who asked. SDKs read errors from HTTP 200 only. Who shows no
// credential at all is told so by 401, in whatever form.
func (req *apiRequest) statusFor(refused *apiRefusal) int {
	switch {
	case refused.status >= http.StatusInternalServerError:
	case refused.status == http.StatusUnauthorized && !req.form.sdk():
	case req.speaksSDK():
		return http.StatusOK
	}
	return refused.status
}

// outcome is how a refusal is counted.
func (req *apiRequest) outcome(refused *apiRefusal) string {
	switch {
	case errors.Is(req.Context().Err(), context.Canceled):
		return outcomeCanceled
	case refused.status >= http.StatusInternalServerError:
		return outcomeUnreachable
	case refused.status == http.StatusOK:
		return outcomeUnavailable
	}
	return outcomeRefused
}

// tokenRefusal explains why there is no token for appid. SDKs get no code of the 40001 class here: a new grant would
// end in the same place, and some of them repeat it without a limit.
func tokenRefusal(err error, appid string, sdk bool) *apiRefusal {
	switch {
	case errors.Is(err, tokens.ErrNoTicket):
		of := ""
		if lacking, ok := errors.AsType[*tokens.NoTicketError](err); ok {
			of = " of " + lacking.Platform
		}
		return refuse(http.StatusOK, codeNoTicket, "ticket",
			"component ticket is expired: waiting for WeChat's next component_verify_ticket%s, pushed every 10 minutes to the authorization event URL", of)
	case errors.Is(err, tokens.ErrNotAuthorized):
		return refuse(http.StatusOK, codeNotAuthorized, "authorization",
			"component is not authorized by this account: %s has not authorized the platform, or has revoked it", appid)
	case errors.Is(err, tokens.ErrNotConfigured):
		return refuse(http.StatusOK, codeInvalidAppID, "appid", "invalid appid: the gateway has no account %s", appid)
	}
	if api, ok := errors.AsType[*tokens.APIError](err); ok {
		if api.Code == -1 { // SDKs send a call again on -1, and this one has not been answered by WeChat at all
			return refuse(http.StatusServiceUnavailable, http.StatusServiceUnavailable, "token", "WeChat is too busy to give a token for %s", appid)
		}
		if sdk && tokens.IsTokenRefused(api.Code) {
			known, _ := tokens.Explain(api.Code)
			return refuse(http.StatusOK, codeUnauthorizedAPI, "token", "WeChat gives the gateway no token for %s: %d %s [gateway: %s]",
				appid, api.Code, api.Msg, known.Remedy.EN)
		}
		refused := refuse(http.StatusOK, api.Code, "token", "%s", withRemedy(api))
		refused.wechats, refused.rid = true, api.RID
		return refused
	}
	switch {
	case errors.Is(err, tokens.ErrStore), errors.Is(err, tokens.ErrClosed):
		return refuse(http.StatusServiceUnavailable, http.StatusServiceUnavailable, "store", "the gateway cannot get at its tokens at the moment")
	case errors.Is(err, tokens.ErrUnreachable):
		return unreachable(err, "WeChat's API was asked for a token and did not answer")
	case errors.Is(err, tokens.ErrBackoff):
		return refuse(http.StatusOK, codeUnauthorizedAPI, "token",
			"WeChat refuses each new token of %s: does another program renew it too? The gateway tries again shortly", appid)
	case errors.Is(err, context.DeadlineExceeded):
		return refuse(http.StatusGatewayTimeout, http.StatusGatewayTimeout, "token", "a token for %s did not come in time", appid)
	default:
		return refuse(http.StatusServiceUnavailable, http.StatusServiceUnavailable, "token", "the gateway has no token for %s at the moment", appid)
	}
}

// unreachable is the refusal for a failed exchange with WeChat. It is never errcode -1, on which some SDKs send again.
func unreachable(err error, msg string) *apiRefusal {
	if isTimeout(err) {
		return refuse(http.StatusGatewayTimeout, http.StatusGatewayTimeout, "timeout", "%s in time", msg)
	}
	return refuse(http.StatusBadGateway, http.StatusBadGateway, "unreachable", "%s", msg)
}

func isTimeout(err error) bool {
	var timeout interface{ Timeout() bool }
	return errors.Is(err, context.DeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout()
}

// errorBody is an error in WeChat's shape: one line, nothing escaped, no newline at the end. Some SDKs replace
// control characters and backslashes before they parse.
func errorBody(code int64, msg string) []byte {
	b := append([]byte(`{"errcode":`), strconv.FormatInt(code, 10)...)
	b = append(b, `,"errmsg":"`...)
	b = append(b, jsonText(msg)...)
	return append(b, `"}`...)
}

// jsonText makes a text that needs no escape in JSON.
func jsonText(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '"':
			return '\''
		case r == '\\':
			return '/'
		case unicode.IsControl(r) || r == '\u2028' || r == '\u2029':
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}

// writeJSON writes an answer of the gateway's own.
func writeJSON(w http.ResponseWriter, status int, body []byte) {
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write(body) // the caller is gone
}
