package crypto

import (
	"errors"
	"fmt"
	"io"
)

var (
	// ErrEnvelope says that a body or message is not of the form we accept: broken XML or JSON, a DOCTYPE, a field
	// given twice, Encrypt nested or missing. Errors that wrap it name the rule that was broken, never content.
	ErrEnvelope = errors.New("not a WeChat envelope or message")

	// ErrSignature says that a signature is missing, malformed or fits none of the tokens.
	ErrSignature = errors.New("signature fits none of the tokens")

	// ErrDecrypt says that a text does not open with any of the keys. Base64, block size, padding and length are not
	// told apart.
	ErrDecrypt = errors.New("text opens with none of the keys")

	// ErrReceiveID says that a push opened but is meant for another receive id: one of another account or platform
	// that shares key and token. It is also an ErrDecrypt.
	ErrReceiveID = fmt.Errorf("%w for this receive id", ErrDecrypt)
)

// What ErrEnvelope was about. They are values, so that a flood of bad pushes allocates nothing for its errors.
var (
	errSyntax        = envelopeError("syntax error or cut short")
	errEncoding      = envelopeError("invalid UTF-8 or a control character")
	errUnknown       = envelopeError("neither XML nor a JSON object")
	errFormat        = envelopeError("not of the expected format")
	errRoot          = envelopeError("root element is not <xml>")
	errMarkup        = envelopeError("DOCTYPE, processing instruction or other declaration")
	errAttribute     = envelopeError("element with attributes or a prefix")
	errEntity        = envelopeError("unknown entity or character reference")
	errDuplicate     = envelopeError("field given twice")
	errNested        = envelopeError("field with nested content")
	errNestedEncrypt = envelopeError("Encrypt below the top level")
	errNestedText    = envelopeError("text between the fields")
	errDeep          = envelopeError("nested too deep")
	errTrailing      = envelopeError("something after the end")
	errNoEncrypt     = envelopeError("no Encrypt, or an empty one")
	errReply         = envelopeError("reply without MsgSignature, TimeStamp or Nonce")
	errIDName        = envelopeError("id element must be ToUserName or AppId")
	errUnwritable    = envelopeError("value that the format cannot carry")
	errTooLong       = envelopeError("message too long")
)

var errNoKey = errors.New("no aes key to seal with, configure the one of the WeChat console")

func envelopeError(rule string) error { return fmt.Errorf("%w: %s", ErrEnvelope, rule) }

// redacted is what stands where a key, token or plaintext would print.
const redacted = "[redacted]"

// redact is how types that hold keys, tokens or plaintext print.
func redact(f fmt.State) { _, _ = io.WriteString(f, redacted) }
