package caddymodule

import (
	"errors"
	"net/url"
	"strings"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// credentialParams are the query parameters by which a caller may bring a token. None of them ever goes to WeChat as
// it came, except a user's own token on the paths that are made for it.
var credentialParams = []string{paramAccess, paramComponent, "cloudbase_access_token"}

// secretParams are the query parameters in which an SDK may send what it takes for the account's secret, and what is
// the client's key. WeChat gets none of them from a caller.
var secretParams = []string{paramSecret, "appsecret", "component_appsecret"}

// apiQuery is a caller's query without its credentials, in two parts: a token goes back in where the first one stood.
// The rest is kept byte for byte, in its order: WeChat has readers that differ in what they decode.
type apiQuery struct {
	before, after queryPart
	credentials   []string // decoded values, in the order in which they came
	rawCredential string   // the first one as it came
}

// queryPart is a run of segments, the empty ones between two & included.
type queryPart struct {
	text     string
	segments int
}

// queryRun gathers a queryPart from a raw query. It copies nothing unless something was dropped in between.
type queryRun struct {
	start, end int // in the raw query
	segments   int
	joined     []byte // nil: all of it stands together in the raw query
}

// add takes the segment from start to end.
func (r *queryRun) add(raw string, start, end int) {
	switch {
	case r.segments == 0:
		r.start, r.end = start, end
	case r.joined == nil && r.end+1 == start:
		r.end = end
	default:
		if r.joined == nil {
			r.joined = append(make([]byte, 0, len(raw)), raw[r.start:r.end]...)
		}
		r.joined = append(append(r.joined, '&'), raw[start:end]...)
	}
	r.segments++
}

func (r *queryRun) part(raw string) queryPart {
	if r.joined != nil {
		return queryPart{string(r.joined), r.segments}
	}
	return queryPart{raw[r.start:r.end], r.segments}
}

// queryParam is a parameter that the gateway adds. Names and values need no escaping: they are WeChat's tokens,
// secrets and appids, or came escaped.
type queryParam struct {
	name  string
	value secret.String
}

var (
	errAPIQuery     = errors.New("query hides a credential beside a semicolon: separate parameters with &")
	errAPIQueryByte = errors.New("query has a space, a control character or a # in it: percent-encode it")
)

// splitQuery takes the credentials and secrets out of a raw query, and the parameters of these names with them. It
// refuses what would end the query, or the request line, before its end.
func splitQuery(raw string, alsoDrop ...string) (apiQuery, error) {
	var q apiQuery
	if !isQueryText(raw) {
		return q, errAPIQueryByte
	}
	if raw == "" {
		return q, nil
	}
	var before, after queryRun
	run, next := &before, 0
	for segment := range strings.SplitSeq(raw, "&") {
		start := next
		next += len(segment) + 1
		name, value, _ := strings.Cut(segment, "=")
		switch {
		case isParam(name, credentialParams...):
			if value != "" { // an empty one is none, and says nothing against another
				if q.credentials == nil {
					q.rawCredential = value
				}
				q.credentials = append(q.credentials, queryUnescape(value))
			}
			run = &after
		case isParam(name, secretParams...), isParam(name, alsoDrop...):
		case hidesCredential(segment, alsoDrop):
			return apiQuery{}, errAPIQuery
		default:
			run.add(raw, start, next-1)
		}
	}
	q.before, q.after = before.part(raw), after.part(raw)
	return q, nil
}

// isQueryText reports whether a raw query can stand in a request line and is all query.
func isQueryText(raw string) bool {
	for i := 0; i < len(raw); i++ {
		if c := raw[i]; c <= ' ' || c == 0x7f || c == '#' {
			return false
		}
	}
	return true
}

// hidesCredential reports whether a reader that splits parameters at semicolons too would find one that is dropped.
func hidesCredential(segment string, alsoDrop []string) bool {
	if !strings.Contains(segment, ";") {
		return false
	}
	for part := range strings.SplitSeq(segment, ";") {
		name, _, _ := strings.Cut(part, "=")
		if isParam(name, credentialParams...) || isParam(name, secretParams...) || isParam(name, alsoDrop...) {
			return true
		}
	}
	return false
}

// paramValues returns the decoded values of all parameters that some reader could take for one of these names.
func paramValues(raw string, names ...string) (values []string) {
	for segment := range strings.SplitSeq(raw, "&") {
		if name, value, _ := strings.Cut(segment, "="); isParam(name, names...) {
			values = append(values, queryUnescape(value))
		}
	}
	return values
}

// isParam reports whether an escaped parameter name is one of these. It is generous: a name that some reader could
// take for one of them counts.
func isParam(escaped string, names ...string) bool {
	name := escaped
	if !isPlainName(name) {
		name = strings.Trim(queryUnescape(name), " \t\r\n\v\f\x00")
	}
	for _, n := range names {
		if len(name) >= len(n) && strings.EqualFold(name, n) { // a letter that folds to one of ASCII is longer
			return true
		}
	}
	return false
}

// isPlainName reports whether a parameter name is nothing but letters, digits and _, as nearly all are: there is nothing to
// decode in it, or to trim.
func isPlainName(name string) bool {
	for i := range len(name) {
		c := name[i] | 0x20
		if (c < 'a' || c > 'z') && (name[i] < '0' || name[i] > '9') && name[i] != '_' {
			return false
		}
	}
	return true
}

// queryUnescape decodes a part of a query; what cannot be decoded stays as it is.
func queryUnescape(s string) string {
	if decoded, err := url.QueryUnescape(s); err == nil {
		return decoded
	}
	return s
}

// with returns the query with the gateway's parameters in it.
func (q apiQuery) with(params []queryParam) string {
	n := len(q.before.text) + len(q.after.text) + 2
	for _, p := range params {
		n += len(p.name) + len(p.value.Reveal()) + 2
	}
	var b strings.Builder
	b.Grow(n)
	b.WriteString(q.before.text)
	for i, p := range params {
		if i > 0 || q.before.segments > 0 {
			b.WriteByte('&')
		}
		b.WriteString(p.name)
		b.WriteByte('=')
		b.WriteString(p.value.Reveal())
	}
	if q.after.segments > 0 && (q.before.segments > 0 || len(params) > 0) {
		b.WriteByte('&')
	}
	b.WriteString(q.after.text)
	return b.String()
}

// sole returns the one credential of a query. Several that differ are ambiguous: ok is false.
func (q apiQuery) sole() (credential string, ok bool) { return soleOf(q.credentials) }

// soleOf returns the one value of a list; none is the empty one. Several that differ are ambiguous: ok is false.
func soleOf(values []string) (value string, ok bool) {
	for i, v := range values {
		if i > 0 && v != values[0] {
			return "", false
		}
	}
	if len(values) == 0 {
		return "", true
	}
	return values[0], true
}
