package wxsim

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Field is one element of a message.
type Field struct {
	Name, Value string
	Number      bool // written bare: neither CDATA nor quotes
	Raw         bool // Value is XML or JSON of its own (nested elements)
}

// Message is a message or event of a user, to be pushed to the message URL.
type Message struct {
	Platform string // appid of the platform that it is pushed to; "": AppID is a plain account
	AppID    string // the account that the user wrote to
	To       string // default: the account's gh_ id
	From     string // openid; default: a new user. A new openid becomes a user of the account
	Type     string // MsgType; default text, or event with an Event
	Content  string
	Event    string
	EventKey string
	Fields   []Field // further elements, in order
	MsgID    int64   // default: a new one; negative: none. Events have none unless it is set
	// CreateTime defaults to now.
	CreateTime time.Time
	// Raw is the whole plaintext instead of all fields from To to CreateTime; From is still
	// the openid parameter.
	Raw []byte

	Keys     *PushKeys       // other credentials than the current ones: before a rotation is over, or another's
	Skew     time.Duration   // added to the timestamp of the query
	Attempts int             // default Pace.Attempts
	Tamper   func(*Outgoing) // last word on each attempt; answers are then no violations
}

// PushKeys are credentials of a push. An empty ReceiveID is the right one.
type PushKeys struct{ Token, AESKey, ReceiveID string }

// ErrNoURL means that no push URL is set for the target.
var ErrNoURL = errors.New("no push URL is set")

// PushMessage pushes a message with WeChat's time limit and retries, judges what comes back
// and now and then pushes the same again. The error is nil whatever the answer is; it says that
// the push could not be made, or that ctx ended. Whether an authorizer's account has authorized
// the platform does not matter: queued messages arrive after that has ended.
func (s *Server) PushMessage(ctx context.Context, m Message) (PushResult, error) {
	d, err := s.prepare(&m)
	if err != nil {
		return PushResult{}, err
	}
	r, err := d.run(ctx)
	r.OpenID, r.MsgID = m.From, m.MsgID
	if err != nil {
		return r, err
	}
	if r.OK() && m.Tamper == nil && s.dice.hit(s.cfg.Faults.DuplicatePushes, "duplicate", m.Platform+m.AppID) {
		err = d.again(ctx, &r)
	}
	return r, err
}

// prepare fills in m's defaults and finds out how it is pushed.
func (s *Server) prepare(m *Message) (*delivery, error) {
	if s.err != nil {
		return nil, s.err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	d := &delivery{s: s, platform: m.Platform, appID: m.AppID, idName: "ToUserName", skew: m.Skew, tamper: m.Tamper, attempts: m.Attempts}
	if d.attempts <= 0 {
		d.attempts = s.cfg.Pace.Attempts
	}
	acc := s.accounts[m.AppID]
	receiveID := m.AppID
	if m.Platform == "" {
		if acc == nil || !acc.plain {
			return nil, fmt.Errorf("no plain account %s", m.AppID)
		}
		d.url, d.crypt, d.mode, d.format = acc.MessageURL, acc.crypt, acc.Mode, acc.Format
	} else {
		p := s.platforms[m.Platform]
		if p == nil {
			return nil, fmt.Errorf("no platform %s", m.Platform)
		}
		if acc == nil {
			acc = s.addAuthorizer(Authorizer{AppID: m.AppID})
		}
		d.url, d.crypt, d.mode, d.format = strings.ReplaceAll(p.MessageURL, "$APPID$", m.AppID), p.crypt, ModeSafe, FormatXML
		receiveID = m.Platform
	}
	if d.url == "" {
		return nil, ErrNoURL
	}
	if m.Keys != nil {
		if m.Keys.ReceiveID != "" {
			receiveID = m.Keys.ReceiveID
		}
		var err error
		if d.crypt, err = NewCrypt(m.Keys.Token, m.Keys.AESKey, receiveID); err != nil {
			return nil, err
		}
	}
	s.fill(m, acc)
	d.openID, d.id = m.From, m.To
	if d.plain = m.Raw; d.plain == nil {
		d.plain = s.plaintext(m, d.format)
	}
	j := judging{crypt: d.crypt, mode: d.mode, format: d.format, user: m.From, account: m.To, mini: acc.MiniProgram, articles: articleLimit(m), ownBody: wantsOwnBody(m.Event), ahead: time.Duration(s.ahead.Load())}
	d.judge = j.verdict
	return d, nil
}

// fill sets what m leaves open. The caller holds mu.
func (s *Server) fill(m *Message, acc *account) {
	if m.To == "" {
		m.To = acc.OriginalID
	}
	if m.From == "" {
		m.From = s.addUser(User{AppID: m.AppID, UnionID: "o6" + randomText(26), NickName: "user"}).OpenID
	} else if _, known := s.users[m.From]; !known {
		s.addUser(User{AppID: m.AppID, OpenID: m.From})
	}
	if m.Type == "" {
		m.Type = "text"
		if m.Event != "" {
			m.Type = "event"
		}
	}
	if m.CreateTime.IsZero() {
		m.CreateTime = s.now()
	}
	if m.MsgID == 0 && m.Type != "event" {
		m.MsgID = s.nextMsgID()
	}
}

// plaintext is the message as the account would get it in plain mode. The caller holds mu.
func (s *Server) plaintext(m *Message, format Format) []byte {
	name := m.Platform + m.AppID
	fields := []Field{
		{Name: "ToUserName", Value: m.To}, {Name: "FromUserName", Value: m.From},
		{Name: "CreateTime", Value: strconv.FormatInt(m.CreateTime.Unix(), 10), Number: true}, {Name: "MsgType", Value: m.Type},
	}
	if m.Type == "event" {
		fields = append(fields, Field{Name: "Event", Value: m.Event}, Field{Name: "EventKey", Value: m.EventKey})
	}
	if m.Type == "text" {
		fields = append(fields, Field{Name: "Content", Value: m.Content})
	}
	fields = append(fields, m.Fields...)
	if m.MsgID > 0 {
		number := format == FormatXML || !s.dice.hit(s.cfg.Faults.StringNumbers, "msgid-string", name)
		fields = append(fields, Field{Name: "MsgId", Value: strconv.FormatInt(m.MsgID, 10), Number: number})
	}
	b := builder{
		format: format, bare: s.dice.hit(s.cfg.Faults.NoCDATA, "message-cdata", name),
		lines: s.dice.hit(s.cfg.Faults.StrayBytes, "message-lines", name),
	}
	return b.build(fields)
}

// nextMsgID counts up from a number that no earlier run used. The caller holds mu.
func (s *Server) nextMsgID() int64 {
	s.msgID++
	return s.msgID
}

// wantsOwnBody reports whether an event is answered with a body of its own kind.
func wantsOwnBody(event string) bool {
	return strings.HasPrefix(event, "xpay_") || event == "add_express_path" || strings.HasPrefix(event, "transport_")
}

const (
	oneArticle   = 1
	manyArticles = 8
)

// articleLimit is how many articles a news reply to m may have.
func articleLimit(m *Message) int {
	if slices.Contains([]string{"text", "image", "voice", "video", "news", "location"}, m.Type) {
		return oneArticle
	}
	return manyArticles
}

// builder writes messages and envelopes.
type builder struct {
	format Format
	bare   bool // XML values escaped instead of in CDATA
	lines  bool // a line break between elements
}

func (b builder) build(fields []Field) []byte {
	var out bytes.Buffer
	if b.format == FormatJSON {
		out.WriteByte('{')
		for i, f := range fields {
			if i > 0 {
				out.WriteByte(',')
			}
			if b.lines {
				out.WriteString("\n  ")
			}
			out.Write(quote(f.Name))
			out.WriteByte(':')
			out.Write(f.json())
		}
		out.WriteByte('}')
		return out.Bytes()
	}
	out.WriteString("<xml>")
	for _, f := range fields {
		if b.lines {
			out.WriteByte('\n')
		}
		out.WriteString(f.xml(b.bare))
	}
	if b.lines {
		out.WriteByte('\n')
	}
	out.WriteString("</xml>")
	return out.Bytes()
}

// quote is text as a JSON string, without HTML escaping.
func quote(text string) []byte {
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	e.SetEscapeHTML(false)
	_ = e.Encode(text) // a string always encodes
	return bytes.TrimSuffix(out.Bytes(), []byte("\n"))
}

func (f Field) json() []byte {
	if f.Number || f.Raw {
		return []byte(f.Value)
	}
	return quote(f.Value)
}

var xmlEscaper = strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;")

func (f Field) xml(bare bool) string {
	value := f.Value
	switch {
	case f.Number || f.Raw:
	case bare || strings.Contains(value, "]]>"):
		value = xmlEscaper.Replace(value)
	default:
		value = "<![CDATA[" + value + "]]>"
	}
	return "<" + f.Name + ">" + value + "</" + f.Name + ">"
}

// appendField adds an element to a finished message, as compatible mode does with Encrypt.
func appendField(message []byte, format Format, f Field) []byte {
	if format == FormatJSON {
		body := bytes.TrimSuffix(bytes.TrimSpace(message), []byte("}"))
		return slices.Concat(body, []byte(","), quote(f.Name), []byte(":"), f.json(), []byte("}"))
	}
	body := bytes.TrimSuffix(bytes.TrimSpace(message), []byte("</xml>"))
	return slices.Concat(body, []byte(f.xml(false)), []byte("</xml>"))
}
