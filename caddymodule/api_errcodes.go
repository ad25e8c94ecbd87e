package caddymodule

import (
	"bytes"
	"strconv"

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
	codeNeedGET           = 43001
	codeNeedPOST          = 43002
	codeInvalidJSON       = 47001
	codeUnauthorizedAPI   = 48001
	codeNotAuthorized     = 61003
	codeNoTicket          = 61005
	codeTicketInvalid     = 61006
	codeNeedComponent     = 61014
	codeNeedAccount       = 61015
	codeUseComponentToken = 61024
)

// errcodeLabel is a code as a metric's label. Those in the table of codes have one of their own; callers cannot make
// more of them.
func errcodeLabel(code int64) string {
	if _, known := tokens.Explain(code); known {
		return strconv.FormatInt(code, 10)
	}
	return "other"
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
