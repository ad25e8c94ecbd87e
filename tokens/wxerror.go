package tokens

import (
	"encoding/json"
	"errors"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// What callers branch on. Every error of this package that is not a caller's own context ending wraps one of
// these or an *APIError.
var (
	// ErrNotConfigured: the configuration has no such platform or account.
	ErrNotConfigured = errors.New("not configured")
	// ErrNoTicket: the platform has no live component_verify_ticket; WeChat pushes one every ten minutes.
	ErrNoTicket = errors.New("no component_verify_ticket yet: WeChat pushes one every ten minutes to the authorization event URL")
	// ErrNotAuthorized: the account has not authorised the platform, or has revoked it.
	ErrNotAuthorized = errors.New("the account has not authorised the platform")
	// ErrUnsure: the store does not know the account and may have lost it.
	ErrUnsure = errors.New("WeChat's list of authorizers is not compared with the store yet")
	// ErrStore: the store failed, timed out, or holds a record that cannot be read.
	ErrStore = errors.New("token store")
	// ErrUnreachable: WeChat was not reached, did not answer in time, or answered something other than JSON.
	ErrUnreachable = errors.New("WeChat not reached")
	// ErrBackoff: a renewal failed a moment ago and is not tried again yet. It wraps the failure where there is one.
	ErrBackoff = errors.New("renewal held back after a failure")
	// ErrClosed: the manager was closed.
	ErrClosed = errors.New("token manager closed")
)

// SaidError is an error in the gateway's own words, for people of both languages.
type SaidError struct {
	Text Text
	Kind error // one of those above, if that is what callers branch on
}

func said(kind error, en, zh string) error { return &SaidError{Text{en, zh}, kind} }

// Error gives the English text.
func (e *SaidError) Error() string {
	if e.Kind == nil {
		return e.Text.EN
	}
	return e.Kind.Error() + ": " + e.Text.EN
}

// Unwrap returns the kind.
func (e *SaidError) Unwrap() error { return e.Kind }

// Codes of WeChat that this package acts on one by one; errcodes has them all.
const (
	codeNotAuthorized       = 61003
	codeTicketExpired       = 61005
	codeTicketInvalid       = 61006
	codeSystemBusy          = -1
	codeAuthCodeInvalid     = 61009
	codeAuthCodeExpired     = 61010
	codeRefreshTokenInvalid = 61023
)

// maxErrorText bounds the part of an errmsg that is kept, in bytes.
const maxErrorText = 256

// APIError is an answer of WeChat's with an errcode other than 0.
type APIError struct {
	Code int64
	Msg  string // errmsg, capped and without control characters
	RID  string // the request id that WeChat's support asks for; empty if none was given
	API  string // path of the call, without its query
}

// Error gives the call, the code and WeChat's text, never the request.
func (e *APIError) Error() string {
	text := strconv.FormatInt(e.Code, 10)
	if e.API != "" {
		text = e.API + ": " + text
	}
	if e.Msg != "" {
		text += " " + e.Msg
	}
	if e.RID != "" && !strings.Contains(e.Msg, e.RID) { // the text was cut off before it, or left out
		text += " rid: " + e.RID
	}
	return text
}

// IsTokenRefused reports whether an errcode says that the access token of the call was refused. WeChat refuses it
// before it acts, so the call may be repeated with another token.
func IsTokenRefused(code int64) bool {
	row := errcodeByCode[code]
	return row != nil && row.class == ClassRenew
}

// tookToken reports whether what a call came to shows that WeChat took its token.
func tookToken(err error) bool {
	if err == nil {
		return true
	}
	api, ok := errors.AsType[*APIError](err)
	return ok && TookToken(api.Code)
}

// TookToken reports whether an answer with an errcode, or 0, shows that WeChat took the access token of the call.
func TookToken(code int64) bool { return !IsTokenRefused(code) && code != codeSystemBusy }

// hasCode reports whether err is WeChat's answer with one of these codes.
func hasCode(err error, codes ...int64) bool {
	api, ok := errors.AsType[*APIError](err)
	if !ok {
		return false
	}
	for _, code := range codes {
		if api.Code == code {
			return true
		}
	}
	return false
}

// ridPattern is the request id that WeChat appends to an errmsg: three groups of eight hex digits.
var ridPattern = regexp.MustCompile(`\brid: ([0-9a-fA-F]{8}-[0-9a-fA-F]{8}-[0-9a-fA-F]{8})`)

// echoed stands in an errmsg for what the request held.
const echoed = "[redacted]"

// newAPIError builds the error for an errcode and errmsg as they were received. WeChat quotes the request in some of
// them: the values given are taken out.
func newAPIError(api string, code int64, msg string, secrets ...string) *APIError {
	e := &APIError{Code: code, API: api, RID: RequestID(msg)}
	msg = printable(msg, len(msg)) // first, so that nothing hides a value
	for _, s := range secrets {
		msg = strings.ReplaceAll(msg, s, echoed)
		msg = strings.ReplaceAll(msg, url.QueryEscape(s), echoed)
	}
	e.Msg = printable(msg, maxErrorText)
	return e
}

// shortestSecret is the length of the shortest text that is taken for a secret, in bytes: WeChat's have 32 and more.
const shortestSecret = 8

// secretsOf are the values of a request that must not come back in an error, the longest first: all of the query and
// all texts of the body, but for appids, which say what an error is about.
func secretsOf(query url.Values, payload []byte) (secrets []string) {
	var add func(name string, value any)
	add = func(name string, value any) {
		switch value := value.(type) {
		case string:
			if len(value) >= shortestSecret && !strings.HasSuffix(strings.ToLower(name), "appid") {
				secrets = append(secrets, value)
			}
		case map[string]any:
			for name, v := range value {
				add(name, v)
			}
		case []any:
			for _, v := range value {
				add(name, v)
			}
		}
	}
	for name, values := range query {
		for _, value := range values {
			add(name, value)
		}
	}
	var body map[string]any
	if json.Unmarshal(payload, &body) == nil {
		add("", body)
	}
	slices.SortFunc(secrets, func(a, b string) int { return len(b) - len(a) })
	return secrets
}

// printable drops control characters and what is not UTF-8, and caps the text to max bytes at a rune's border.
func printable(s string, max int) string {
	var b strings.Builder
	for _, r := range s {
		if r == utf8.RuneError || unicode.IsControl(r) {
			continue
		}
		if b.Len()+utf8.RuneLen(r) > max {
			break
		}
		b.WriteRune(r)
	}
	return b.String()
}
