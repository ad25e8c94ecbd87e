package crypto

import "fmt"

// Format is the data format of a push and its reply.
type Format uint8

// The two formats that WeChat's console offers.
const (
	FormatXML Format = iota
	FormatJSON
)

// String returns "xml" or "json".
func (f Format) String() string {
	switch f {
	case FormatXML:
		return "xml"
	case FormatJSON:
		return "json"
	}
	return "unknown"
}

// maxDepth is how deep elements, objects and arrays may nest. WeChat's deepest event nests five.
const maxDepth = 32

// Envelope is the outer body of a push in safe or compatible mode. Its values alias the body unless they had to be
// unescaped. ToUserName and AppID are nil when absent; neither is covered by the signature.
type Envelope struct {
	Format     Format
	Encrypt    []byte // base64, never empty
	ToUserName []byte // gh_ id; of a message
	AppID      []byte // the platform's appid; of a platform's own event
}

// ScanEnvelope reads the outer body of a push. It is strict: one XML root named xml or one JSON object, fields at most
// once, Encrypt once, at top level and nowhere else; names are case-sensitive. Fields it does not know, as compatible
// mode has them, are checked for form and skipped; in their CDATA characters may stand that XML forbids, such as control characters, as
// WeChat escapes none that a user has typed. The format is told by the first byte, not by a Content-Type. The caller
// limits the size. The error is ErrEnvelope.
func ScanEnvelope(body []byte) (Envelope, error) {
	var v [envelopeFields][]byte
	f, err := scanTop(body, envelopeField, v[:], true)
	if err != nil {
		return Envelope{}, err
	}
	if len(v[envelopeEncrypt]) == 0 {
		return Envelope{}, errNoEncrypt
	}
	return Envelope{Format: f, Encrypt: v[envelopeEncrypt], ToUserName: v[envelopeToUserName], AppID: v[envelopeAppID]}, nil
}

const (
	envelopeEncrypt = iota
	envelopeToUserName
	envelopeAppID
	envelopeFields
)

func envelopeField(name []byte) int {
	switch string(name) {
	case "Encrypt":
		return envelopeEncrypt
	case "ToUserName":
		return envelopeToUserName
	case "AppId":
		return envelopeAppID
	}
	return -1
}

// Fields are the top-level fields of a plaintext message or event that the gateway acts on. A value is nil when the field
// is absent, and empty but not nil when it is there and empty. JSON numbers keep their text, so that a MsgId above
// 2^53 stays exact; null is empty, true and false are words.
type Fields struct {
	Format Format

	ToUserName, FromUserName, CreateTime, MsgType, Event, EventKey, Content Text

	// MsgID is MsgId, as messages have it, or else MsgID, as some events do.
	MsgID Text

	// Of a platform's own events. AuthorizerAppID is WeChat's AuthorizerAppid.
	InfoType, AppID, ComponentVerifyTicket, AuthorizerAppID, AuthorizationCode, AuthorizationCodeExpiredTime, PreAuthCode Text

	// NotifyAppID, NotifyAuthCode and NotifyStatus are appid, auth_code and status of notify_third_fasteregister.
	NotifyAppID, NotifyAuthCode, NotifyStatus Text

	// Encrypt is there in the outer body of a push in safe or compatible mode.
	Encrypt Text
}

// Text is the content of a field. It serves as a []byte, but prints redacted by every verb: Fields itself cannot see to
// that, as its Format is a field.
type Text []byte

// Format implements fmt.Formatter for all verbs.
func (Text) Format(f fmt.State, _ rune) { redact(f) }

// String implements fmt.Stringer: content, tickets and codes never print.
func (Fields) String() string { return redacted }

// GoString implements fmt.GoStringer.
func (Fields) GoString() string { return redacted }

// ScanFields reads the top-level fields of a message into f, in one pass and as strictly as ScanEnvelope; unknown fields
// and nested content are skipped, so an Encrypt inside them does not count. Of the fields, only Content may hold characters that XML
// forbids. Values alias the message unless they had to be unescaped, which alone allocates. After an error, ErrEnvelope, f is empty.
func ScanFields(message []byte, f *Fields) error {
	var v [messageFields][]byte
	format, err := scanTop(message, messageField, v[:], false)
	if err != nil {
		*f = Fields{}
		return err
	}
	*f = Fields{
		Format:                       format,
		ToUserName:                   v[fieldToUserName],
		FromUserName:                 v[fieldFromUserName],
		CreateTime:                   v[fieldCreateTime],
		MsgType:                      v[fieldMsgType],
		Event:                        v[fieldEvent],
		EventKey:                     v[fieldEventKey],
		Content:                      v[fieldContent],
		MsgID:                        v[fieldMsgId],
		InfoType:                     v[fieldInfoType],
		AppID:                        v[fieldAppId],
		ComponentVerifyTicket:        v[fieldComponentVerifyTicket],
		AuthorizerAppID:              v[fieldAuthorizerAppid],
		AuthorizationCode:            v[fieldAuthorizationCode],
		AuthorizationCodeExpiredTime: v[fieldAuthorizationCodeExpiredTime],
		PreAuthCode:                  v[fieldPreAuthCode],
		NotifyAppID:                  v[fieldNotifyAppID],
		NotifyAuthCode:               v[fieldNotifyAuthCode],
		NotifyStatus:                 v[fieldNotifyStatus],
		Encrypt:                      v[fieldEncrypt],
	}
	if f.MsgID == nil {
		f.MsgID = v[fieldMsgID]
	}
	return nil
}

// The fields of a message by WeChat's names.
const (
	fieldToUserName = iota
	fieldFromUserName
	fieldCreateTime
	fieldMsgType
	fieldEvent
	fieldEventKey
	fieldContent
	fieldMsgId //nolint:revive // WeChat has both spellings
	fieldMsgID
	fieldInfoType
	fieldAppId //nolint:revive // the spelling tells it from appid
	fieldComponentVerifyTicket
	fieldAuthorizerAppid
	fieldAuthorizationCode
	fieldAuthorizationCodeExpiredTime
	fieldPreAuthCode
	fieldNotifyAppID
	fieldNotifyAuthCode
	fieldNotifyStatus
	fieldEncrypt
	messageFields
)

func messageField(name []byte) int {
	switch string(name) {
	case "ToUserName":
		return fieldToUserName
	case "FromUserName":
		return fieldFromUserName
	case "CreateTime":
		return fieldCreateTime
	case "MsgType":
		return fieldMsgType
	case "Event":
		return fieldEvent
	case "EventKey":
		return fieldEventKey
	case "Content":
		return fieldContent
	case "MsgId":
		return fieldMsgId
	case "MsgID":
		return fieldMsgID
	case "InfoType":
		return fieldInfoType
	case "AppId":
		return fieldAppId
	case "ComponentVerifyTicket":
		return fieldComponentVerifyTicket
	case "AuthorizerAppid":
		return fieldAuthorizerAppid
	case "AuthorizationCode":
		return fieldAuthorizationCode
	case "AuthorizationCodeExpiredTime":
		return fieldAuthorizationCodeExpiredTime
	case "PreAuthCode":
		return fieldPreAuthCode
	case "appid":
		return fieldNotifyAppID
	case "auth_code":
		return fieldNotifyAuthCode
	case "status":
		return fieldNotifyStatus
	case "Encrypt":
		return fieldEncrypt
	}
	return -1
}

// scanner walks the top-level fields of one body. It keeps a position and no copies.
type scanner struct {
	src       []byte
	pos       int
	format    Format
	envelope  bool // an Encrypt below the top level is an error
	written   bool // it is WeChat's, which lets characters pass that a user has typed and XML forbids
	forbidden bool // XML: there are some, for which CDATA is the only place

	// Of the field that next returned.
	name   []byte
	closed bool // XML: <name/>, there is no content to read

	rootClosed bool // XML: <xml/>, there are no fields
	begun      bool // JSON: a member was read, the next one needs a comma
}

const byteOrderMark = "\ufeff"

// scanTop reads a body's top-level fields. Those for which index gives 0 or more are stored in values there, never as nil,
// which is how a second occurrence is noticed.
func scanTop(body []byte, index func(name []byte) int, values [][]byte, envelope bool) (Format, error) {
	s := scanner{src: body, envelope: envelope, written: true}
	if err := s.begin(); err != nil {
		return s.format, err
	}
	for {
		more, err := s.next()
		if err != nil || !more {
			return s.format, err
		}
		i := index(s.name)
		switch {
		case i < 0:
			err = s.skip(1)
		case values[i] != nil:
			err = errDuplicate
		default:
			values[i], err = s.value()
			if s.forbidden && (envelope || i != fieldContent) && !validXML(values[i]) {
				err = errEncoding
			}
		}
		if err != nil {
			return s.format, err
		}
	}
}

// begin tells the format by the first byte after spaces, and goes to the first field.
func (s *scanner) begin() error {
	if s.has(byteOrderMark) {
		s.pos = len(byteOrderMark)
	}
	s.skipSpace()
	first := s.peek()
	s.pos = 0
	switch first {
	case '<':
		s.format = FormatXML
		return s.beginXML()
	case '{':
		s.format = FormatJSON
		return s.beginJSON()
	}
	return errUnknown
}

// next goes to the next field and sets s.name, or reports false at the end of the body, which it has checked.
func (s *scanner) next() (bool, error) {
	if s.format == FormatJSON {
		return s.nextJSON()
	}
	return s.nextXML()
}

// value reads the content of the field that was found; it is not nil.
func (s *scanner) value() ([]byte, error) {
	if s.format == FormatJSON {
		return s.valueJSON()
	}
	if s.closed {
		return s.empty(), nil
	}
	return s.contentXML(s.name, 1, true)
}

// skip reads over the content of the field that was found, checking its form; depth is how many elements lie around
// the content.
func (s *scanner) skip(depth int) error {
	if s.format == FormatJSON {
		return s.skipJSON(depth)
	}
	if s.closed {
		return nil
	}
	_, err := s.contentXML(s.name, depth, false)
	return err
}

// empty returns an empty value that is not nil.
func (s *scanner) empty() []byte { return s.src[:0:0] }

// peek returns the byte at the position, 0 at the end.
func (s *scanner) peek() byte {
	if s.pos < len(s.src) {
		return s.src[s.pos]
	}
	return 0
}

// has reports whether prefix comes next.
func (s *scanner) has(prefix string) bool {
	return len(s.src)-s.pos >= len(prefix) && string(s.src[s.pos:s.pos+len(prefix)]) == prefix
}

func (s *scanner) skipSpace() {
	for s.pos < len(s.src) {
		switch s.src[s.pos] {
		case ' ', '\t', '\r', '\n':
			s.pos++
		default:
			return
		}
	}
}

// isEncrypt reports whether a nested name is one that an envelope must not have.
func (s *scanner) isEncrypt(name []byte) bool { return s.envelope && string(name) == "Encrypt" }
