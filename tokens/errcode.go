package tokens

import (
	"net/netip"
	"regexp"
	"strings"
)

// Text is a text in the two languages of the gateway's users.
type Text struct {
	EN string `json:"en"`
	ZH string `json:"zh"`
}

// Class is what an errcode of WeChat's asks of the gateway.
type Class string

// The classes of errcodes.
const (
	// ClassRenew: the access token was refused, before WeChat acted. A new one may help.
	ClassRenew Class = "renew"
	// ClassTicket: the platform needs a newer component_verify_ticket.
	ClassTicket Class = "ticket"
	// ClassOperator: somebody has to change something, at WeChat or in the configuration.
	ClassOperator Class = "operator"
	// ClassBackoff: a quota is used up. Later the same call may pass.
	ClassBackoff Class = "backoff"
	// ClassPass: it is between the caller and WeChat.
	ClassPass Class = "pass"
)

// Errcode is what is known of an errcode of WeChat's. The log, the pages and docs/errors.md all speak from it.
type Errcode struct {
	Code    int64
	Class   Class
	Meaning Text
	Remedy  Text
}

// Reported reports whether who runs the gateway hears of the code.
func (e Errcode) Reported() bool {
	return e.Class == ClassOperator || e.Code == codeDailyQuota
}

// NamesEgressIP reports whether WeChat refuses the address that the call came from, and its errmsg says which.
func (e Errcode) NamesEgressIP() bool {
	return e.Code == 61004 || e.Code == 40164 || e.Code == 40090 || e.Code == 45035
}

// MissesPermission reports whether the code may mean a permission set (权限集) that was not granted.
func (e Errcode) MissesPermission() bool {
	return e.Code == 48001 || e.Code == 61007 || e.Code == 61016 || e.Code == 61017
}

// Explain returns what is known of an errcode.
func Explain(code int64) (Errcode, bool) {
	row, ok := errcodeByCode[code]
	if !ok {
		for i := range errcodes {
			if r := &errcodes[i]; r.from <= code && code <= r.to {
				row, ok = r, true
				break
			}
		}
	}
	if !ok {
		return Errcode{Code: code, Class: ClassPass, Meaning: meaningUnknown, Remedy: remedyUnknown}, false
	}
	return Errcode{Code: code, Class: row.class, Meaning: row.meaning, Remedy: row.remedy}, true
}

// errcodeByCode are the rows of one code each; they go before ranges.
var errcodeByCode = func() map[int64]*errcodeRow {
	rows := make(map[int64]*errcodeRow, len(errcodes))
	for i := range errcodes {
		if r := &errcodes[i]; r.from == r.to {
			rows[r.from] = r
		}
	}
	return rows
}()

// egressPattern is how an errmsg names the address that WeChat saw.
var egressPattern = regexp.MustCompile(`(?i)\b(?:requestIP:|invalid ip)\s*([0-9a-f:.]+)`)

// EgressIP returns the address that WeChat saw a call come from, if an errmsg names it.
func EgressIP(errmsg string) string {
	m := egressPattern.FindStringSubmatch(errmsg)
	if m == nil {
		return ""
	}
	ip, err := netip.ParseAddr(strings.TrimRight(m[1], ".:"))
	if err != nil {
		return ""
	}
	return ip.Unmap().String()
}

// RequestID returns the request id that an errmsg ends in, which WeChat's support asks for.
func RequestID(errmsg string) string {
	if m := ridPattern.FindStringSubmatch(errmsg); m != nil {
		return m[1]
	}
	return ""
}

// Explained are the fields of a log line on e: the call, the code, and what to do about it.
func (e *APIError) Explained() []any {
	r := newRefusal(e.API, e.Code, e.Msg)
	r.RID = e.RID // the text may be cut off before it
	return r.Args()
}
