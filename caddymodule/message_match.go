package caddymodule

import (
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// MessageMatcher matches pushes by what they say. It works behind wechat_message, which verified and decrypted the
// push; in front of it, or for a request that is no push, it matches nothing.
//
// A value matches exactly; with * in it, it is a glob in which * stands for any text; with ~ in front it is a regular
// expression (RE2), which may match anywhere in the text. Of the values of one field one must match; of several
// fields, each. A field without values does not count, but one at least has some.
//
// The matcher needs the app wechat.
type MessageMatcher struct {
	// AppID is the account. Default: any.
	AppID []string `json:"appid,omitempty"`
	// Platform is the platform the account authorised; empty for a plain account. Default: any, or none.
	Platform []string `json:"platform,omitempty"`
	// Type is the MsgType: text, image, event …. Default: any.
	Type []string `json:"type,omitempty"`
	// Event is the Event of a push that is no message of a user: CLICK, SCAN, LOCATION …. Default: any, or none.
	Event []string `json:"event,omitempty"`
	// EventKey is the event's EventKey. Default: any, or none.
	EventKey []string `json:"event_key,omitempty"`
	// InfoType is the InfoType of an authorization event, which wechat_event forwards. Default: any, or none.
	InfoType []string `json:"info_type,omitempty"`
	// From is the sender's openid. Default: any.
	From []string `json:"from,omitempty"`
	// Content is a text message's text. Default: any, or none.
	Content []string `json:"content,omitempty"`

	conditions []condition
}

// condition is one field with its values.
type condition struct {
	of       func(*facts) string
	exact    []string
	patterns []*regexp.Regexp
}

// CaddyModule returns the Caddy module information.
func (MessageMatcher) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.matchers.wechat_message", New: func() caddy.Module { return new(MessageMatcher) }}
}

// matchField names a field and says where its values and its text are.
type matchField struct {
	name   string
	values *[]string
	word   bool // it is one word of WeChat's, in ASCII
	of     func(*facts) string
}

func (m *MessageMatcher) fields() []matchField {
	return []matchField{
		{"appid", &m.AppID, true, func(f *facts) string { return f.appid }},
		{"platform", &m.Platform, true, func(f *facts) string { return f.platform }},
		{"type", &m.Type, true, func(f *facts) string { return f.msgType }},
		{"event", &m.Event, true, func(f *facts) string { return f.event }},
		{"event_key", &m.EventKey, false, func(f *facts) string { return f.eventKey }},
		{"info_type", &m.InfoType, true, func(f *facts) string { return f.infoType }},
		{"from", &m.From, false, func(f *facts) string { return f.openID }},
		{"content", &m.Content, false, func(f *facts) string { return string(f.content) }},
	}
}

const matchFieldNames = "appid, platform, type, event, event_key, info_type, from or content"

// UnmarshalCaddyfile sets up the matcher:
//
//	@name wechat_message <field> <value>...
//
//	@name wechat_message {
//		<field> <value>...
//	}
func (m *MessageMatcher) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	for d.Next() {
		onLine := d.NextArg()
		if onLine {
			if err := m.unmarshalField(d); err != nil {
				return err
			}
		}
		for nesting := d.Nesting(); d.NextBlock(nesting); {
			if onLine {
				return d.Err("give the fields either on the line or in a block, not both")
			}
			if err := m.unmarshalField(d); err != nil {
				return err
			}
		}
	}
	if err := m.compile(); err != nil {
		return d.WrapErr(err)
	}
	return nil
}

func (m *MessageMatcher) unmarshalField(d *caddyfile.Dispenser) error {
	name := d.Val()
	for _, field := range m.fields() {
		if field.name != name {
			continue
		}
		values := d.RemainingArgs()
		if len(values) == 0 {
			return d.Errf("%s: give at least one value", name)
		}
		*field.values = append(*field.values, values...)
		return nil
	}
	return d.Errf("unknown field '%s': want %s", name, matchFieldNames)
}

// Provision compiles the values. Without the app there is no wechat_message either, and the matcher would match nothing for ever.
func (m *MessageMatcher) Provision(ctx caddy.Context) error {
	if err := m.compile(); err != nil {
		return err
	}
	_, err := loadApp(ctx)
	return err
}

func (m *MessageMatcher) compile() error {
	m.conditions = nil
	for _, field := range m.fields() {
		if len(*field.values) == 0 {
			continue
		}
		c := condition{of: field.of}
		for _, value := range *field.values {
			expr, isRE := strings.CutPrefix(value, "~")
			switch {
			case isRE:
			case field.word && strings.Contains(value, ";"):
				return fmt.Errorf("%s: '%s' matches nothing: leave the semicolon out, for a line of a Caddyfile ends without one", field.name, value)
			case field.word && strings.ContainsFunc(value, func(c rune) bool { return c == ',' || c <= ' ' || c > '~' }):
				return fmt.Errorf("%s: '%s' matches nothing: write several values with blanks between them", field.name, value)
			case strings.Contains(value, "*"):
				expr = glob(value)
			default:
				c.exact = append(c.exact, value)
				continue
			}
			re, err := regexp.Compile(expr)
			if err != nil {
				return fmt.Errorf("%s: '%s' is not a regular expression: %w", field.name, value, err)
			}
			c.patterns = append(c.patterns, re)
		}
		m.conditions = append(m.conditions, c)
	}
	if len(m.conditions) == 0 {
		return errors.New("name a field and its values: " + matchFieldNames)
	}
	return nil
}

// glob is the regular expression for a value with * in it.
func glob(value string) string {
	parts := strings.Split(value, "*")
	for i := range parts {
		parts[i] = regexp.QuoteMeta(parts[i])
	}
	return `(?s)\A` + strings.Join(parts, `.*`) + `\z`
}

// MatchWithError reports whether the request is a push that fits. It never returns an error.
func (m *MessageMatcher) MatchWithError(r *http.Request) (bool, error) {
	f := factsOf(r.Context())
	if f == nil {
		return false, nil
	}
	for i := range m.conditions {
		if !m.conditions[i].met(f) {
			return false, nil
		}
	}
	return true, nil
}

func (c *condition) met(f *facts) bool {
	got := c.of(f)
	for _, v := range c.exact {
		if v == got {
			return true
		}
	}
	for _, re := range c.patterns {
		if re.MatchString(got) {
			return true
		}
	}
	return false
}

var (
	_ caddy.Provisioner                 = (*MessageMatcher)(nil)
	_ caddyhttp.RequestMatcherWithError = (*MessageMatcher)(nil)
	_ caddyfile.Unmarshaler             = (*MessageMatcher)(nil)
)
