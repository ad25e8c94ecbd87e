package caddymodule

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/dustin/go-humanize"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// Message is middleware for the message-and-event URL (消息与事件接收URL). It verifies and decrypts a push, hands it
// to the next handler as a plaintext request, and encrypts what that handler answers.
//
// The account is the configured appid, or else the last segment of the path that has the shape of an appid and is
// not a platform's. The credentials of the plain account of that appid and of every platform (only of the one named
// in the path, if one is) are tried; the first whose signature and receive id fit wins.
//
// What the next handler gets:
//
//   - as body the decrypted bytes, unchanged, XML or JSON as they came, with the right Content-Type and length and
//     without the caller's Accept-Encoding;
//   - the query as in 明文模式: signature, timestamp, nonce and openid, without encrypt_type and msg_signature;
//   - the headers X-Wechat-Appid, X-Wechat-Platform (of a platform's push), X-Wechat-Openid, X-Wechat-Msg-Type and
//     X-Wechat-Event; a caller's own copies are removed.
//
// Placeholders, for handlers after this one and for logs:
//
//	{wechat.appid}      the account
//	{wechat.platform}   the platform, empty for a plain account
//	{wechat.openid}     the sender
//	{wechat.msg_type}   MsgType
//	{wechat.event}      Event
//	{wechat.event_key}  EventKey
//
// The answer is judged by its first bytes, never by its Content-Type: it must be of the push's format; a BOM, spaces
// and an XML declaration before it are fine. It is encrypted with the key that opened the push. An empty answer and
// `success` go back as they are. Anything else (a status other than 2xx, HTML, half an answer, a panic) becomes
// `success`, or the fallback text, at once, and is logged and counted: WeChat's users never see an error notice.
//
// A push that opens under a platform is taken for the account that the path names, whether or not that is known to have
// authorised the platform; once its gh_ id is known, a push with another ToUserName is refused.
//
// A forged or stale push gets 403, a malformed one 400, an oversized one 413, another method than GET and POST 405; none reaches the next
// handler, and each is logged with its reason and counted. An authorization event that comes to this URL is handled as wechat_event
// would. WeChat's acceptance check (全网发布) is answered without the next handler.
//
// Each mirror gets a copy of every message that the next handler gets, as that gets it: one account, several environments.
// Copies are sent in the background, once however often WeChat pushes the message, at most 256 at a time to one mirror and
// for at most 15 s each; what a mirror answers, or that it does not, is counted and changes nothing. WeChat's acceptance
// check, and a text that begins with QUERY_AUTH_CODE:, are never mirrored.
type Message struct {
	// AppID is the account whose pushes come to this route. Default: read from the path.
	AppID string `json:"appid,omitempty"`
	// TimestampWindow is how far a push's timestamp may be from this machine's clock. Default: 5m.
	TimestampWindow caddy.Duration `json:"timestamp_window,omitempty"`
	// MaxBody is the largest push accepted, in bytes; the next handler's answer may be as large. Default: 1 MiB.
	MaxBody int64 `json:"max_body,omitempty"`
	// FallbackText is what the sender is answered when the backend's answer cannot be used. Default: nothing.
	FallbackText string `json:"fallback_text,omitempty"`
	// MirrorsRaw are handlers, such as reverse_proxy, that each get a copy of every message. Default: none.
	MirrorsRaw []json.RawMessage `json:"mirrors,omitempty" caddy:"namespace=http.handlers inline_key=handler"`

	app     *App
	mirrors []*mirror
}

// CaddyModule returns the Caddy module information.
func (*Message) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.wechat_message", New: func() caddy.Module { return new(Message) }}
}

// Provision gets the app.
func (m *Message) Provision(ctx caddy.Context) (err error) {
	if m.TimestampWindow == 0 {
		m.TimestampWindow = caddy.Duration(defaultTimestampWindow)
	}
	if m.MaxBody == 0 {
		m.MaxBody = defaultMaxBody
	}
	if m.app, err = loadApp(ctx); err != nil {
		return err
	}
	if err := m.provisionMirrors(ctx); err != nil {
		return err
	}
	if m.AppID == "" {
		return nil
	}
	if err := literalAppID(m.AppID); err != nil {
		return err
	}
	if m.app.platform(m.AppID) != nil {
		return fmt.Errorf("%s is a platform: messages are for the accounts that authorised it; leave the appid out and let the path say which", m.AppID)
	}
	return nil
}

// Validate refuses settings that make no sense.
func (m *Message) Validate() error {
	if m.TimestampWindow < 0 {
		return errors.New("timestamp_window must not be negative")
	}
	if m.MaxBody < 0 || m.MaxBody > maxSize {
		return errors.New("max_body: want a number of bytes up to 1 GiB")
	}
	return nil
}

func parseMessage(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	m := new(Message)
	return m, m.UnmarshalCaddyfile(h.Dispenser)
}

// UnmarshalCaddyfile sets up the handler:
//
//	wechat_message [<matcher>] [<appid>] {
//		timestamp_window <duration>
//		max_body         <size>
//		fallback         text <text>
//		mirror           <upstream>...
//	}
func (m *Message) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if d.NextArg() {
		m.AppID = d.Val()
		if err := literalAppID(m.AppID); err != nil {
			return d.WrapErr(err)
		}
		if d.NextArg() {
			return d.ArgErr()
		}
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		switch d.Val() {
		case "timestamp_window":
			if err := duration(d, &m.TimestampWindow); err != nil {
				return err
			}
		case "max_body":
			if err := size(d, &m.MaxBody); err != nil {
				return err
			}
		case "fallback":
			if m.FallbackText != "" {
				return d.Err("fallback is given twice")
			}
			var kind, text string
			if !d.AllArgs(&kind, &text) {
				return d.ArgErr()
			}
			if kind != "text" || text == "" {
				return d.Errf("fallback: want text and a text, such as: fallback text \"稍后回复您\"")
			}
			m.FallbackText = text
		case "mirror":
			if err := m.unmarshalMirror(d); err != nil {
				return err
			}
		default:
			return d.Errf("unknown subdirective '%s': want timestamp_window, max_body, fallback or mirror", d.Val())
		}
	}
	return nil
}

// size parses a subdirective that is a number of bytes.
func size(d *caddyfile.Dispenser, into *int64) error {
	name := d.Val()
	if *into != 0 {
		return d.Errf("%s is given twice", name)
	}
	var arg string
	if !d.AllArgs(&arg) {
		return d.ArgErr()
	}
	n, err := humanize.ParseBytes(arg)
	if err != nil || n == 0 || n > maxSize {
		return d.Errf("%s: '%s' is not a size from 1 B to 1 GiB: write it like 1MiB", name, arg)
	}
	*into = int64(n)
	return nil
}

// maxSize is the largest size that any option accepts.
const maxSize = 1 << 30

// ServeHTTP verifies and opens a push, has it answered, and seals the answer.
func (m *Message) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	if !m.admit(r) {
		return nil
	}
	started := time.Now()
	p := newPush()
	defer p.release()
	if err := m.serve(w, r, next, p); err != nil {
		m.app.refuse(w, r, "message", err)
		return nil
	}
	m.app.metrics().pushes.WithLabelValues("message", "ok").Inc()
	m.app.metrics().pushDuration.WithLabelValues("message").Observe(time.Since(started).Seconds())
	return nil
}

func (m *Message) serve(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler, p *push) error {
	if err := p.query.parse(r.URL.RawQuery); err != nil {
		return err
	}
	window := time.Duration(m.TimestampWindow)
	appid, candidates := m.candidates(r.URL.Path)
	switch r.Method {
	case http.MethodGet:
		return p.handshake(w, candidates, window)
	case http.MethodPost:
	default:
		return errMethod
	}
	if err := p.readBody(r, m.MaxBody); err != nil {
		return err
	}
	if err := p.open(candidates); err != nil {
		return err
	}
	if len(p.fields.InfoType) > 0 && len(p.fields.MsgType) == 0 && p.platform != nil {
		m.app.logger.Warn("an authorization event came to a message URL and was handled: in the platform's console, compare 授权事件接收URL with 消息与事件接收URL",
			zap.String("platform", p.platform.AppID), zap.ByteString("info_type", p.fields.InfoType))
		if err := m.app.keepEvent(r.Context(), p, window); err != nil {
			return err
		}
		writePlain(w, success)
		return nil
	}
	if len(p.fields.MsgType) == 0 {
		return errPlaintext
	}
	if err := p.inTime(window); err != nil {
		return err
	}
	if p.platform != nil && m.app.isForAnother(p, appid) {
		return errAddressee
	}
	if m.app.answerReleaseCheck(w, p, appid) {
		return nil
	}
	m.pass(w, r, next, p, newFacts(p, appid))
	return nil
}

// isForAnother reports whether a platform's push names another account than the path does. The path is not signed, so
// that a push could be sent again on another account's; the gh_ id inside it is. Until the gateway has learned which one
// the account has, which it does in the background, the path is believed.
func (a *App) isForAnother(p *push, appid string) bool {
	if len(p.fields.ToUserName) == 0 || appid == "" {
		return false
	}
	known, ok := a.manager().UserName(p.platform.AppID, appid)
	return ok && string(p.fields.ToUserName) != known
}

// candidates reads from the path which account a push is for, and which credentials may open it.
func (m *Message) candidates(path string) (appid string, list []candidate) {
	appid = m.AppID
	var named *Platform
	for rest := path; rest != ""; {
		var segment string
		segment, rest, _ = strings.Cut(rest, "/")
		if !isAppID(segment) {
			continue
		}
		if p := m.app.platform(segment); p != nil {
			named = p
		} else if m.AppID == "" {
			appid = segment
		}
	}
	list = m.app.platformCandidates(named)
	if acc := m.app.account(appid); acc != nil && acc.codec != nil {
		own := candidate{codec: acc.codec, account: acc}
		list = append([]candidate{own}, list...)
	}
	return appid, list
}

// pass has the next handler answer the push.
func (m *Message) pass(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler, p *push, f *facts) {
	m.sendMirrors(r, p, f)
	reply := newReplyWriter(m.MaxBody)
	defer reply.release()
	text := &plaintext{data: p.opened.Message}
	f.content = p.fields.Content
	// Until next returns, r itself is the plaintext request: Caddy's placeholders and variables belong to this r, and a
	// copy would leave them with what the caller sent.
	outer := *r
	makePlaintext(r, p, f, text)
	err := runNext(next, reply, r)
	r.URL, r.RequestURI, r.Header = outer.URL, outer.RequestURI, outer.Header
	r.Body, r.ContentLength, r.TransferEncoding, r.GetBody = outer.Body, outer.ContentLength, outer.TransferEncoding, outer.GetBody
	// Not the Trailer: a transport that is still sending the body reads that field.
	text.detach()
	f.content = nil // its buffer will be another push's
	if err != nil && r.Context().Err() != nil {
		err = errHungUp
	}
	m.answer(w, p, f, reply, err)
}

// errHungUp is an answer that nobody waits for any more.
var errHungUp = errors.New("WeChat hung up before the backend answered")

// runNext runs the rest of the chain. A backend that breaks off in the middle of its answer makes reverse_proxy panic;
// that is an answer that cannot be used, and no more.
func runNext(next caddyhttp.Handler, w http.ResponseWriter, r *http.Request) (err error) {
	defer func() {
		switch v := recover(); v {
		case nil:
		case http.ErrAbortHandler:
			err = errors.New("backend broke off in the middle of its answer")
		default:
			err = &panicError{value: v, stack: zap.Stack("").String}
		}
	}()
	return next.ServeHTTP(w, r)
}

// panicError is a panic below us. Its value may hold anything, so only its kind is told.
type panicError struct {
	value any
	stack string
}

func (e *panicError) Error() string { return fmt.Sprintf("a handler panicked with a %T", e.value) }

// whyFields are an error's fields in the log.
func whyFields(err error) []zap.Field {
	fields := []zap.Field{zap.Error(err)}
	if pe, ok := errors.AsType[*panicError](err); ok {
		fields = append(fields, zap.String("stack", pe.stack))
	}
	return fields
}

// answer judges what the next handler answered and sends WeChat something legal.
func (m *Message) answer(w http.ResponseWriter, p *push, f *facts, reply *replyWriter, err error) {
	body, outcome, why := reply.judge(p.fields.Format, err)
	switch outcome {
	case outcomePlain:
		writePlain(w, body)
	case outcomeSealed:
		if err := m.app.writeSealed(w, p, body); err != nil {
			outcome, why = outcomeUnusable, err
			writePlain(w, success)
		}
	case outcomeUnusable:
		if m.FallbackText == "" || m.app.writeSealed(w, p, textReply(p, m.FallbackText)) != nil {
			writePlain(w, success)
		}
	}
	m.app.metrics().replies.WithLabelValues(outcome).Inc()
	if outcome == outcomeUnusable {
		fields := append(whyFields(why), zap.String("appid", f.appid), zap.ByteString("msg_id", p.fields.MsgID),
			zap.String("msg_type", f.msgType), zap.String("event", f.event))
		if errors.Is(why, errHungUp) {
			m.app.logger.Warn("WeChat hung up before the backend answered; it pushes the message again", fields...)
			return
		}
		m.app.logger.Error("the backend's answer to a push cannot be used; the sender sees the fallback or nothing", fields...)
		return
	}
	if c := m.app.logger.Check(zapcore.DebugLevel, "push answered"); c != nil {
		c.Write(zap.String("appid", f.appid), zap.String("msg_type", f.msgType), zap.String("event", f.event),
			zap.String("outcome", outcome))
	}
}

var (
	_ caddy.Provisioner           = (*Message)(nil)
	_ caddy.Validator             = (*Message)(nil)
	_ caddyhttp.MiddlewareHandler = (*Message)(nil)
	_ caddyfile.Unmarshaler       = (*Message)(nil)
)
