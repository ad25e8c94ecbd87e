package crypto

import (
	"errors"
	"fmt"
	"slices"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// Codec opens pushes to one receive id, an account's or platform's appid, and seals the replies. It holds that id's
// tokens (消息校验Token) and keys, newest first; each may have made a push. It is immutable, safe for concurrent use and
// prints redacted.
type Codec struct {
	receiveID string
	tokens    []secret.String
	keys      []Key
}

// NewCodec makes a Codec of at least one token. Without keys it serves plaintext mode: signatures can be checked,
// pushes cannot be opened. A token or key given twice counts once.
func NewCodec(receiveID string, tokens []secret.String, keys []Key) (*Codec, error) {
	if receiveID == "" {
		return nil, errors.New("receive id is empty, want the appid that pushes are encrypted for")
	}
	c := &Codec{receiveID: receiveID}
	for i, t := range tokens {
		if t.IsZero() {
			return nil, fmt.Errorf("token %d is empty, want the token of the WeChat console", i+1)
		}
		if !slices.ContainsFunc(c.tokens, func(o secret.String) bool { return o.Equal(t.Reveal()) }) {
			c.tokens = append(c.tokens, t)
		}
	}
	if len(c.tokens) == 0 {
		return nil, errors.New("no token, want at least the token of the WeChat console")
	}
	for i, k := range keys {
		if k.s == nil {
			return nil, fmt.Errorf("aes key %d is empty, want one made by ParseKey", i+1)
		}
		if !slices.ContainsFunc(c.keys, k.Same) {
			c.keys = append(c.keys, k)
		}
	}
	return c, nil
}

// ReceiveID returns the appid that pushes must be encrypted for.
func (c *Codec) ReceiveID() string { return c.receiveID }

// Format implements fmt.Formatter: tokens and keys never print.
func (Codec) Format(f fmt.State, _ rune) { redact(f) }

// Params are the query parameters of a push in safe mode, unescaped.
type Params struct{ MsgSignature, Timestamp, Nonce string }

// Opened is a push that was opened.
type Opened struct {
	// Message is the plaintext, XML or JSON. It lies in the Buffers and is valid until they next open a push; sealing a
	// reply leaves it alone.
	Message []byte

	by         *Codec // behind a pointer, so that no print reaches its secrets
	token, key int
}

// TokenIndex returns which token signed the push: 0 for the newest.
func (o Opened) TokenIndex() int { return o.token }

// KeyIndex returns which key opened the push: 0 for the newest.
func (o Opened) KeyIndex() int { return o.key }

// Format implements fmt.Formatter: messages never print.
func (Opened) Format(f fmt.State, _ rune) { redact(f) }

// Open checks the signature of encrypt, the base64 text as the envelope had it, and then decrypts it: the first key that
// gives sound padding, length and receive id wins. The time window is the caller's to check, with [Fresh]. The error
// is ErrSignature, ErrDecrypt or ErrReceiveID.
func (c *Codec) Open(b *Buffers, p Params, encrypt []byte) (Opened, error) {
	want, ok := parseSignature(p.MsgSignature)
	if !ok || len(p.Timestamp) > maxParam || len(p.Nonce) > maxParam {
		return Opened{}, ErrSignature
	}
	var token int
	b.join, token, ok = matchToken(b.join, c.tokens, want, p.Timestamp, p.Nonce, encrypt)
	if !ok {
		return Opened{}, ErrSignature
	}
	text, err := b.decode(encrypt)
	if err != nil {
		return Opened{}, err
	}
	failure := ErrDecrypt
	for i, k := range c.keys {
		message, err := b.open(k.s, text, c.receiveID)
		if err == nil {
			return Opened{Message: message, by: c, token: token, key: i}, nil
		}
		if err == ErrReceiveID { //nolint:errorlint // our own value, and the hot path
			failure = err
		}
	}
	return Opened{}, failure
}
