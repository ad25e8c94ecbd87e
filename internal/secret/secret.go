// Package secret holds values that must never be printed.
package secret

import (
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"io"
	"log/slog"
)

// redacted is what every printing path shows in a secret's place.
const redacted = "[redacted]"

// String is a secret text: an AppSecret, an access token, a client's key. It prints as "[redacted]" by every
// way Go and our loggers have of printing a value; Reveal is the only way out, so a search for it lists every
// place that handles a secret in the clear. The zero value is the absent secret. Secrets cannot be compared with ==:
// that is what Equal and Same are for.
type String struct {
	_ [0]func() // == would compare addresses
	// A pointer, because fmt calls no methods on unexported fields: of those it then prints an address.
	value *string
}

// New wraps a secret.
func New(value string) String { return String{value: &value} }

// Reveal returns the secret in the clear.
func (s String) Reveal() string {
	if s.value == nil {
		return ""
	}
	return *s.value
}

// IsZero reports whether there is no secret.
func (s String) IsZero() bool { return s.Reveal() == "" }

// Equal compares with a candidate in time that depends on neither value's content nor length. An absent secret
// equals nothing, so that an unset key never lets an empty credential in.
func (s String) Equal(candidate string) bool {
	a, b := sha256.Sum256([]byte(s.Reveal())), sha256.Sum256([]byte(candidate))
	return subtle.ConstantTimeCompare(a[:], b[:]) == 1 && !s.IsZero()
}

// Same reports whether two secrets of our own are alike, absent ones included. For what a caller claims use Equal.
func (s String) Same(o String) bool { return s.Reveal() == o.Reveal() }

// String implements fmt.Stringer.
func (String) String() string { return redacted }

// GoString implements fmt.GoStringer.
func (String) GoString() string { return redacted }

// Format implements fmt.Formatter for all verbs.
func (String) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// MarshalText implements encoding.TextMarshaler, which JSON, XML and zap use too.
func (String) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// LogValue implements slog.LogValuer.
func (String) LogValue() slog.Value { return slog.StringValue(redacted) }
