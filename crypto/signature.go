package crypto

import (
	"crypto/sha1" //nolint:gosec // WeChat's protocol
	"crypto/subtle"
	"encoding/hex"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

const (
	signatureLength = 2 * sha1.Size
	timestampLength = 10

	// maxParam bounds timestamp and nonce, in bytes. WeChat sends ten digits each; the bound keeps bytes of the
	// cipher text from being signed as a part of the nonce (see the threat notes), and the work per push small.
	maxParam = 64
)

// Fresh reports whether timestamp, a push's query parameter in Unix seconds, lies within window of now, on either side.
// It must be exactly ten digits, which is every second from 2001 to 2286. That refuses most other splits of the signed
// bytes, but a nonce of digits may still change places with the timestamp: a caller that must refuse replays also looks
// at the CreateTime of the decrypted text.
func Fresh(timestamp string, now time.Time, window time.Duration) bool {
	if len(timestamp) != timestampLength {
		return false
	}
	var seconds int64
	for i := range timestampLength {
		c := timestamp[i]
		if c < '0' || c > '9' {
			return false
		}
		seconds = seconds*10 + int64(c-'0')
	}
	return now.Sub(time.Unix(seconds, 0)).Abs() <= window
}

// VerifySignature checks the signature of a handshake (GET with echostr) or of a push in plaintext mode against every
// token, in constant time. It says nothing about a body.
func (c *Codec) VerifySignature(signature, timestamp, nonce string) bool {
	want, ok := parseSignature(signature)
	if !ok || len(timestamp) > maxParam || len(nonce) > maxParam {
		return false
	}
	var stack [256]byte
	_, _, ok = matchToken(stack[:0], c.tokens, want, timestamp, nonce, nil)
	return ok
}

// Signature returns the signature of a handshake or plaintext push, lower-case hex, made with the newest token.
func (c *Codec) Signature(timestamp, nonce string) string {
	var stack [256]byte
	sum := sha1.Sum(appendSorted(stack[:0], c.tokens[0].Reveal(), timestamp, nonce, nil)) //nolint:gosec // protocol
	return hex.EncodeToString(sum[:])
}

// matchToken finds the token that made the signature want, and returns its index. It computes the signature of each
// token whatever fits, so that time tells neither how near a forgery came nor which token is in use. The grown join
// buffer is returned for the next use.
func matchToken(join []byte, tokens []secret.String, want [sha1.Size]byte, timestamp, nonce string, encrypt []byte) ([]byte, int, bool) {
	found, index := 0, 0
	for i := range tokens {
		join = appendSorted(join[:0], tokens[i].Reveal(), timestamp, nonce, encrypt)
		sum := sha1.Sum(join) //nolint:gosec // WeChat's protocol
		equal := subtle.ConstantTimeCompare(sum[:], want[:])
		index = subtle.ConstantTimeSelect(equal&^found, i, index)
		found |= equal
	}
	return join, index, found == 1
}

// appendSorted appends its four texts in ascending byte order. Without d it sorts three, an empty text adding nothing.
func appendSorted(dst []byte, a, b, c string, d []byte) []byte {
	if b < a {
		a, b = b, a
	}
	if c < b {
		b, c = c, b
	}
	if b < a {
		a, b = b, a
	}
	switch {
	case string(d) < a:
		dst = append(append(append(append(dst, d...), a...), b...), c...)
	case string(d) < b:
		dst = append(append(append(append(dst, a...), d...), b...), c...)
	case string(d) < c:
		dst = append(append(append(append(dst, a...), b...), d...), c...)
	default:
		dst = append(append(append(append(dst, a...), b...), c...), d...)
	}
	return dst
}

// parseSignature reads exactly 40 lower-case hex digits. WeChat writes lower case; a second spelling of a valid signature
// has no use but to get past something that compares texts.
func parseSignature(signature string) (sum [sha1.Size]byte, ok bool) {
	if len(signature) != signatureLength {
		return sum, false
	}
	for i := range sum {
		hi, lo := hexDigit(signature[2*i]), hexDigit(signature[2*i+1])
		if hi > 15 || lo > 15 {
			return sum, false
		}
		sum[i] = hi<<4 | lo
	}
	return sum, true
}

// hexDigit returns the value of a lower-case hex digit, or 255.
func hexDigit(c byte) byte {
	switch {
	case '0' <= c && c <= '9':
		return c - '0'
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10
	}
	return 255
}
