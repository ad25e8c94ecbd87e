package crypto

import "fmt"

// Diagnosis is what about a push fits a [Codec], each thing by itself, so that a tool can tell a wrong token from a wrong
// key. It prints redacted.
type Diagnosis struct {
	// Token is which token made msg_signature, -1 for none.
	Token int
	// Encoded: Encrypt is the base64 of whole blocks. No key can open what is not.
	Encoded bool
	// Key is which key opens it, whoever it is for and whatever the signature says; -1 for none.
	Key int
	// ReceiveID is whom it was encrypted for, once a key opens it.
	ReceiveID string
	// Message is the plaintext, once a key opens it. It lies in the Buffers.
	Message []byte
}

// Format implements fmt.Formatter: messages never print.
func (Diagnosis) Format(f fmt.State, _ rune) { redact(f) }

// Diagnose looks at a push as Open does, but goes on where Open refuses. It is for tools, offline: to a server everything
// that Open refuses is a forgery, and what tells the reasons apart is an oracle.
func (c *Codec) Diagnose(b *Buffers, p Params, encrypt []byte) Diagnosis {
	d := Diagnosis{Token: -1, Key: -1}
	if want, ok := parseSignature(p.MsgSignature); ok && len(p.Timestamp) <= maxParam && len(p.Nonce) <= maxParam {
		var token int
		if b.join, token, ok = matchToken(b.join, c.tokens, want, p.Timestamp, p.Nonce, encrypt); ok {
			d.Token = token
		}
	}
	text, err := b.decode(encrypt)
	if err != nil || len(text)%padBlock != 0 {
		return d
	}
	d.Encoded = true
	for i, k := range c.keys {
		b.plain = resize(b.plain, len(text))
		k.s.decrypt(b.plain, text)
		message, receiveID, err := split(b.plain)
		// One wrong key in a few thousand leaves sound padding and length, but hardly text as well.
		if err == nil && isID(receiveID) {
			d.Key, d.ReceiveID, d.Message = i, string(receiveID), message
			return d
		}
	}
	return d
}

// isID reports whether a receive id is one that anybody could have: what a wrong key makes is not.
func isID(id []byte) bool {
	if len(id) == 0 || len(id) > maxParam {
		return false
	}
	for _, c := range id {
		if !isBase64(c) && c != '-' && c != '_' || c == '+' || c == '/' {
			return false
		}
	}
	return true
}

// FieldNames are the names of a message's top-level fields, in its order. The error is ErrEnvelope.
func FieldNames(message []byte) (names []string, err error) {
	_, err = scanTop(message, func(name []byte) int { names = append(names, string(name)); return -1 }, nil, false)
	if err != nil {
		return nil, err
	}
	return names, nil
}
