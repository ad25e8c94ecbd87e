package crypto

import (
	"crypto/sha1" //nolint:gosec // WeChat's protocol
	"encoding/hex"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// replyParts is what stands before, between and after the four values of a reply envelope. The order of the values is
// that of WeChat's own examples.
type replyParts struct{ encrypt, signature, timestamp, nonce, end string }

var (
	xmlReply = replyParts{
		encrypt:   "<xml><Encrypt><![CDATA[",
		signature: "]]></Encrypt><MsgSignature><![CDATA[",
		timestamp: "]]></MsgSignature><TimeStamp>",
		nonce:     "</TimeStamp><Nonce><![CDATA[",
		end:       "]]></Nonce></xml>",
	}
	jsonReply = replyParts{
		encrypt:   `{"Encrypt":"`,
		signature: `","MsgSignature":"`,
		timestamp: `","TimeStamp":`,
		nonce:     `,"Nonce":"`,
		end:       `"}`,
	}
)

// AppendReply appends the encrypted envelope of reply, in format f, to dst: with the key and token that opened o, as WeChat
// demands while they are being rotated, or with the newest for the zero Opened. Timestamp is Unix seconds, any
// current time; nonce should be the push's. o.Message stays intact and may itself be the reply. It fails, dst being returned
// as it was, without a key and for a nonce that the format cannot carry.
func (c *Codec) AppendReply(dst []byte, b *Buffers, o Opened, f Format, timestamp int64, nonce string, reply []byte) ([]byte, error) {
	if o.by == nil {
		o.by, o.token, o.key = c, 0, 0
	}
	return appendReply(dst, b, o, newRandom(), f, timestamp, nonce, reply)
}

// appendReply takes the random bytes, so that known replies can be reproduced. It asks o for the codec: after a
// reload the present one may no longer have the key.
func appendReply(dst []byte, b *Buffers, o Opened, random [randomLength]byte, f Format, timestamp int64, nonce string, reply []byte) ([]byte, error) {
	if len(o.by.keys) == 0 {
		return dst, errNoKey
	}
	if len(nonce) > maxParam || !carries(f, nonce) {
		return dst, errUnwritable
	}
	parts := &xmlReply
	if f == FormatJSON {
		parts = &jsonReply
	}
	var stack [20]byte
	digits := strconv.AppendInt(stack[:0], timestamp, 10)

	out := append(dst, parts.encrypt...)
	start := len(out)
	out, err := b.seal(out, o.by.keys[o.key].s, random, o.by.receiveID, reply)
	if err != nil {
		return dst, err
	}
	encrypt := out[start:]
	out = append(out, parts.signature...)
	out = b.sign(out, o.by.tokens[o.token], string(digits), nonce, encrypt)
	out = append(out, parts.timestamp...)
	out = append(out, digits...)
	out = append(out, parts.nonce...)
	out = appendValue(out, f, nonce)
	return append(out, parts.end...), nil
}

// SealPush makes the envelope of a push as WeChat makes it, with the newest token and key, for simulators and tools. The
// element idName, "ToUserName" or "AppId", carries id: the gh_ id of the account or the platform's appid. The
// body is the caller's. With a timestamp (Unix seconds) and nonce like WeChat's, ten digits each, Open accepts it.
func (c *Codec) SealPush(b *Buffers, f Format, idName, id string, timestamp int64, nonce string, message []byte) (body []byte, msgSignature string, err error) {
	return c.sealPush(b, newRandom(), f, idName, id, timestamp, nonce, message)
}

func (c *Codec) sealPush(b *Buffers, random [randomLength]byte, f Format, idName, id string, timestamp int64, nonce string, message []byte) ([]byte, string, error) {
	switch {
	case len(c.keys) == 0:
		return nil, "", errNoKey
	case idName != "ToUserName" && idName != "AppId":
		return nil, "", errIDName
	case len(nonce) > maxParam || !carries(f, id):
		return nil, "", errUnwritable
	}
	before, between, after := "<xml><"+idName+"><![CDATA[", "]]></"+idName+"><Encrypt><![CDATA[", "]]></Encrypt></xml>"
	if f == FormatJSON {
		before, between, after = `{"`+idName+`":"`, `","Encrypt":"`, `"}`
	}
	body := append(appendValue([]byte(before), f, id), between...)
	start := len(body)
	body, err := b.seal(body, c.keys[0].s, random, c.receiveID, message)
	if err != nil {
		return nil, "", err
	}
	signature := b.sign(nil, c.tokens[0], strconv.FormatInt(timestamp, 10), nonce, body[start:])
	return append(body, after...), string(signature), nil
}

// OpenReply reads what a server answered to a push: an encrypted reply envelope, XML or JSON. It verifies MsgSignature and
// returns the decrypted message, which is the caller's. For simulators and tools. The error is ErrEnvelope,
// ErrSignature, ErrDecrypt or ErrReceiveID.
func (c *Codec) OpenReply(body []byte) (message []byte, err error) {
	var v [replyFields][]byte
	if _, err := scanTop(body, replyField, v[:], true); err != nil {
		return nil, err
	}
	if len(v[replyEncrypt]) == 0 {
		return nil, errNoEncrypt
	}
	if len(v[replySignature]) == 0 || len(v[replyTimestamp]) == 0 || len(v[replyNonce]) == 0 {
		return nil, errReply
	}
	p := Params{
		MsgSignature: string(v[replySignature]),
		Timestamp:    string(v[replyTimestamp]),
		Nonce:        string(v[replyNonce]),
	}
	o, err := c.Open(new(Buffers), p, v[replyEncrypt])
	return o.Message, err
}

// The fields of a reply envelope.
const (
	replyEncrypt = iota
	replySignature
	replyTimestamp
	replyNonce
	replyFields
)

func replyField(name []byte) int {
	switch string(name) {
	case "Encrypt":
		return replyEncrypt
	case "MsgSignature":
		return replySignature
	case "TimeStamp":
		return replyTimestamp
	case "Nonce":
		return replyNonce
	}
	return -1
}

// sign appends the signature over an encrypted text, lower-case hex.
func (b *Buffers) sign(dst []byte, token secret.String, timestamp, nonce string, encrypt []byte) []byte {
	b.join = appendSorted(b.join[:0], token.Reveal(), timestamp, nonce, encrypt)
	sum := sha1.Sum(b.join) //nolint:gosec // WeChat's protocol
	return hex.AppendEncode(dst, sum[:])
}

// carries reports whether a value can be written in a format at all: XML has no way to write a control character.
func carries(f Format, value string) bool {
	if f == FormatJSON {
		return utf8.ValidString(value)
	}
	return validXML([]byte(value)) && !strings.Contains(value, "\r")
}

// appendValue appends a value into a CDATA section or a JSON string. WeChat's nonces are digits; this is for the others.
func appendValue(dst []byte, f Format, value string) []byte {
	const digits = "0123456789abcdef"
	for i := range len(value) {
		c := value[i]
		switch {
		case f == FormatJSON && c < ' ':
			dst = append(dst, '\\', 'u', '0', '0', digits[c>>4], digits[c&15])
		case f == FormatJSON && (c == '"' || c == '\\'):
			dst = append(dst, '\\', c)
		case f != FormatJSON && c == '>' && strings.HasSuffix(value[:i], "]]"):
			dst = append(dst, "]]><![CDATA[>"...)
		default:
			dst = append(dst, c)
		}
	}
	return dst
}
