package caddymodule

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"unicode"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// Codes of WeChat's that the gateway answers with itself. Those of the 40001 class make SDKs ask for a new token, so
// they are used only where a new one helps.
const (
	codeInvalidCredential = 40001
	codeInvalidGrantType  = 40002
	codeInvalidAppID      = 40013
	codeInvalidArgs       = 40097
	codeInvalidAppSecret  = 40125
	codeMissingToken      = 41001
	codeMissingAppID      = 41002
	codeTokenExpired      = 42001
	codeNeedPOST          = 43002
	codeInvalidJSON       = 47001
	codeUnauthorizedAPI   = 48001
	codeNotAuthorized     = 61003
	codeNoTicket          = 61005
	codeNeedComponent     = 61014
	codeNeedAccount       = 61015
	codeUseComponentToken = 61024
)

// apiRefusal is an answer of the gateway's own that is not a success.
type apiRefusal struct {
	status int    // HTTP status; 401 and 403 become 200 for a caller in an SDK's form
	code   int64  // errcode; for trouble between the gateway and WeChat, the HTTP status
	msg    string // errmsg: what is wrong and what to do, without a secret
	rule   string // which check refused, for the log
}

func (e *apiRefusal) Error() string { return e.msg }

func refuse(status int, code int64, rule, format string, args ...any) *apiRefusal {
	return &apiRefusal{status: status, code: code, rule: rule, msg: fmt.Sprintf(format, args...)}
}

// tokenRefusal explains why there is no token for appid. SDKs get no code of the 40001 class here: a new grant would
// end in the same place, and some of them repeat it without a limit.
func tokenRefusal(err error, appid string, sdk bool) *apiRefusal {
	switch {
	case errors.Is(err, tokens.ErrNoTicket):
		return refuse(http.StatusOK, codeNoTicket, "ticket",
			"component ticket is expired: waiting for WeChat's next component_verify_ticket, pushed every 10 minutes to the authorization event URL")
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
			return refuse(http.StatusOK, codeUnauthorizedAPI, "token", "WeChat gives the gateway no token for %s: %d %s", appid, api.Code, api.Msg)
		}
		return refuse(http.StatusOK, api.Code, "token", "%s", api.Msg)
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

// scanErrcode returns the errcode of a JSON object: the first one at its top level, as a number or as digits in quotes.
// It is a scan, not a parse: what it is asked about was sent by WeChat and goes to the caller as it is.
func scanErrcode(b []byte) (code int64, found bool) {
	depth := 0
	for i := 0; i < len(b); i++ {
		switch b[i] {
		case '{', '[':
			depth++
		case '}', ']':
			depth--
		case '"':
			start := i + 1
			for i = start; i < len(b) && b[i] != '"'; i++ {
				if b[i] == '\\' {
					i++
				}
			}
			if depth == 1 && i < len(b) && string(b[start:i]) == "errcode" {
				if rest, ok := bytes.CutPrefix(bytes.TrimLeft(b[i+1:], " \t\r\n"), []byte(":")); ok {
					return leadingInt(rest)
				}
			}
		}
	}
	return 0, false
}

func leadingInt(b []byte) (int64, bool) {
	b = bytes.TrimLeft(b, " \t\r\n\"")
	end := 0
	for end < len(b) && (b[end] == '-' && end == 0 || '0' <= b[end] && b[end] <= '9') {
		end++
	}
	n, err := strconv.ParseInt(string(b[:end]), 10, 64)
	return n, err == nil
}

// knownErrcodes are the codes that get a label of their own in metrics; callers cannot make more of them.
var knownErrcodes = func() map[int64]string {
	labels := make(map[int64]string)
	for _, code := range []int64{
		-1, 40001, 40002, 40003, 40013, 40014, 40029, 40066, 40090, 40097, 40125, 40132, 40163, 40164, 41001, 41002,
		41004, 41005, 41006, 41008, 41009, 42001, 42002, 42003, 42006, 42007, 43001, 43002, 43003, 44002, 45002, 45009,
		45011, 45015, 45035, 45047, 47001, 48001, 48002, 48004, 48006, 50001, 50002, 50005, 61003, 61004, 61005, 61006,
		61007, 61009, 61010, 61011, 61014, 61015, 61016, 61017, 61023, 89503,
	} {
		labels[code] = strconv.FormatInt(code, 10)
	}
	return labels
}()

func errcodeLabel(code int64) string {
	if label, ok := knownErrcodes[code]; ok {
		return label
	}
	return "other"
}

// peekSize is up to how many bytes an answer is looked at before it is passed on: WeChat's errors are shorter.
const peekSize = 4 << 10

// peekedBody is an answer's body of which the first bytes have been looked at.
type peekedBody struct {
	head []byte // not yet passed on
	rest io.ReadCloser
	err  error // what rest ended with while peeking: nil while it goes on
}

// peek reads the start of a body: all of it if it is a JSON object shorter than peekSize, else what came first.
// whole says which. Anything that does not begin like a JSON object is not waited for.
func peek(body io.ReadCloser) (p *peekedBody, whole bool) {
	buf := make([]byte, 0, 512)
	p = &peekedBody{rest: body}
	for len(buf) < peekSize {
		if len(buf) == cap(buf) {
			buf = append(buf, 0)[:len(buf)]
		}
		n, err := body.Read(buf[len(buf):min(cap(buf), peekSize)])
		buf = buf[:len(buf)+n]
		p.head, p.err = buf, err
		if err != nil {
			return p, err == io.EOF && len(buf) < peekSize
		}
		if first := bytes.TrimLeft(buf, " \t\r\n"); len(first) > 0 && first[0] != '{' {
			return p, false
		}
	}
	return p, false
}

// Read implements io.Reader.
func (p *peekedBody) Read(b []byte) (int, error) {
	if len(p.head) > 0 {
		n := copy(b, p.head)
		p.head = p.head[n:]
		return n, nil
	}
	if p.err != nil {
		return 0, p.err
	}
	return p.rest.Read(b)
}

// Close implements io.Closer.
func (p *peekedBody) Close() error { return p.rest.Close() }
