package caddymodule

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/crypto"
)

// Limits of what a push may be.
const (
	defaultMaxBody         = 1 << 20          // bytes of a push's body; WeChat's own are below 100 KB
	defaultTimestampWindow = 5 * time.Minute  // between WeChat's clock and ours
	maxPushQuery           = 8 << 10          // bytes of a push's query
	maxPooledBuffer        = 64 << 10         // a larger buffer is left to the garbage collector
	maxAnnounced           = 16 << 10         // bytes allocated for a body before any of it has come
	bodyTimeout            = 10 * time.Second // for what has not come with a body's first bytes; WeChat itself gives a push 5 s
)

// push is one request of WeChat's: an event, a message or the handshake.
type push struct {
	query    pushQuery
	body     []byte // as received
	buffers  crypto.Buffers
	scratch  []byte        // of identity
	incoming incomingBody  // of readBody
	format   crypto.Format // of the envelope, and so of the reply's
	opened   crypto.Opened
	codec    *crypto.Codec
	platform *Platform // of the two, the one under which it opened
	account  *Account
	fields   crypto.Fields // of the decrypted text
	plain    bool          // it came in plaintext mode: the text is the body, and so is the answer's
	guard    *bodyGuard    // in plaintext mode, if other nodes are to say whether the text is the first
	answered time.Time     // zero until then; see answeredAt
	slow     bool          // it was answered without the backend's answer
	ahead    time.Duration // by how much WeChat's clock is, if its time was judged by that; else 0
	last     bool          // it is known to be the last of its message, although this is the first of them here
	entry    Entry         // of the feed
}

var pushPool = sync.Pool{New: func() any { return &push{body: make([]byte, 0, 4<<10)} }}

func newPush() *push { return pushPool.Get().(*push) }

// release gives the buffers back. Nothing may refer to them any more.
func (p *push) release() {
	body := p.body[:0]
	if cap(body) > maxPooledBuffer || p.buffers.Cap() > maxPooledBuffer {
		return
	}
	*p = push{body: body, buffers: p.buffers, scratch: p.scratch}
	pushPool.Put(p)
}

// apart is a copy of an opened push, for somebody who may have it longer.
func (p *push) apart() *push {
	c := newPush()
	c.query, c.format, c.opened, c.codec, c.platform, c.account, c.plain, c.entry = p.query, p.format, p.opened, p.codec, p.platform, p.account, p.plain, p.entry
	c.body = append(c.body[:0], p.opened.Message...)
	c.opened.Message = c.body
	_ = crypto.ScanFields(c.body, &c.fields) // it could be read before
	return c
}

// replyDate is when it was answered, in Unix seconds by the clock by which it was judged.
func (p *push) replyDate() int64 { return p.answeredAt().Add(p.ahead).Unix() }

// answeredAt is when the push was answered, or now if it was not, so that an answer looks at the clock once.
func (p *push) answeredAt() time.Time {
	if p.answered.IsZero() {
		return time.Now()
	}
	return p.answered
}

// pushQuery are the parameters WeChat sends in the query.
type pushQuery struct {
	signature, msgSignature, timestamp, nonce, openID, encryptType, echoStr string
	hasEcho                                                                 bool
}

// refusal is why a push is not accepted: what WeChat, a log line and a counter get to see. It never holds content.
type refusal struct {
	status int
	result string // the metric's label
	reason string
}

func (r *refusal) Error() string { return r.reason }

// The ways in which a push is refused.
var (
	errQuery     = &refusal{http.StatusBadRequest, "malformed", "query is not WeChat's: timestamp, nonce and a signature, each once"}
	errBody      = &refusal{http.StatusBadRequest, "malformed", "body could not be read"}
	errSlowBody  = &refusal{http.StatusRequestTimeout, "malformed", "body did not come in time, of which WeChat itself gives a push five seconds"}
	errEnvelope  = &refusal{http.StatusBadRequest, "malformed", "body is not an envelope with one Encrypt element"}
	errPlaintext = &refusal{http.StatusBadRequest, "malformed", "decrypted text is neither a message nor an event"}
	errLacking   = &refusal{http.StatusBadRequest, "malformed", "event lacks its ComponentVerifyTicket, the account's appid, or the code"}
	errTooLarge  = &refusal{http.StatusRequestEntityTooLarge, "too_large", "body is larger than max_body"}
	errMethod    = &refusal{http.StatusMethodNotAllowed, "method", "method is neither GET nor POST"}
	errSignature = &refusal{http.StatusForbidden, "signature", "signature fits no configured token: compare the token with WeChat's console, and the path with the account"}
	errDecrypt   = &refusal{http.StatusForbidden, "decrypt", "no configured aes_key opens it: compare the aes_key with WeChat's console"}
	errReceiveID = &refusal{http.StatusForbidden, "receive_id", "it was encrypted for another appid"}
	errAddressee = &refusal{http.StatusForbidden, "addressee", "it is for another account than the path names, by its ToUserName: the path is not signed"}
	errStale     = &refusal{http.StatusForbidden, "timestamp", "timestamp is outside timestamp_window: compare this machine's clock"}
	errUnknown   = &refusal{http.StatusForbidden, "unknown", "path names no account that is configured to receive pushes, and there is no platform"}
	errNotKept   = &refusal{http.StatusServiceUnavailable, "store", "what arrived could not be made durable"}
	errPlainPush = &refusal{http.StatusForbidden, "not_encrypted", "push is not encrypted: choose 安全模式 in WeChat's console, or give the account mode plain"}
	errSealed    = &refusal{http.StatusForbidden, "no_key", "push is encrypted and the account has no aes_key: give the EncodingAESKey, or choose 明文模式 in WeChat's console"}
	errReplayed  = &refusal{http.StatusForbidden, "replay", "its timestamp and nonce came before with another body"}
)

// parse reads the query. The parameters that the signatures cover must not come twice.
func (q *pushQuery) parse(raw string) error {
	*q = pushQuery{}
	if len(raw) > maxPushQuery {
		return errQuery
	}
	var seen uint8
	for raw != "" {
		var pair string
		pair, raw, _ = strings.Cut(raw, "&")
		name, value, _ := strings.Cut(pair, "=")
		if isEscaped(name) {
			return errQuery // a backend would read it as a name that we did not see
		}
		var into *string
		var bit uint8
		switch name {
		case "signature":
			into, bit = &q.signature, 1
		case "msg_signature":
			into, bit = &q.msgSignature, 2
		case "timestamp":
			into, bit = &q.timestamp, 4
		case "nonce":
			into, bit = &q.nonce, 8
		case "openid":
			into, bit = &q.openID, 16
		case "encrypt_type":
			into, bit = &q.encryptType, 32
		case "echostr":
			into, bit, q.hasEcho = &q.echoStr, 64, true
		default:
			continue // WeChat adds parameters as it likes
		}
		if seen&bit != 0 {
			return errQuery
		}
		seen |= bit
		if isEscaped(value) {
			var err error
			if value, err = url.QueryUnescape(value); err != nil {
				return errQuery
			}
		}
		*into = value
	}
	if q.timestamp == "" || !isNonce(q.nonce) || (q.signature == "" && q.msgSignature == "") {
		return errQuery
	}
	return nil
}

// isEscaped reports whether a part of a query stands for something else than itself.
func isEscaped(s string) bool {
	for i := range len(s) {
		if s[i] == '%' || s[i] == '+' {
			return true
		}
	}
	return false
}

// isNonce accepts what can stand in a reply's envelope as it is; WeChat's own are digits or letters.
func isNonce(s string) bool {
	if s == "" || len(s) > 128 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if (c < '0' || c > '9') && (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') && c != '-' && c != '_' && c != '.' {
			return false
		}
	}
	return true
}

// inWindow refuses a push whose timestamp is too far from the time, or has not the form that WeChat's have.
func (q *pushQuery) inWindow(now time.Time, window time.Duration) error {
	if !crypto.Fresh(q.timestamp, now, window) {
		return errStale
	}
	return nil
}

// maxMessageAge is how long before or after its push a message may have been created.
const maxMessageAge = 24 * time.Hour

// inTime refuses a push that is stale. The signature covers timestamp and nonce without saying where one ends, so a
// nonce of digits can be passed off as a timestamp; the CreateTime inside cannot be changed. WeChat may deliver late,
// and some events have no such time, so that bound is wide.
func (p *push) inTime(now time.Time, window time.Duration) error {
	if err := p.query.inWindow(now, window); err != nil {
		return err
	}
	if created := string(p.fields.CreateTime); len(created) == len("1700000000") && !crypto.Fresh(created, now, maxMessageAge) {
		return errStale
	}
	return nil
}

// validUntil is until when, in Unix seconds by our clock, the push could be taken for one in time: by that clock, or by WeChat's.
func (p *push) validUntil(window time.Duration) int64 {
	return p.query.unix() + int64((window+max(-p.ahead, 0))/time.Second)
}

// clockOffset is how far WeChat's clock is ahead of ours; timestamp has been found to be of the right form.
func (q *pushQuery) clockOffset() time.Duration {
	sec, _ := strconv.ParseInt(q.timestamp, 10, 64)
	return time.Until(time.Unix(sec, 0))
}

// incomingBody is a body while it is read. The sender has proved nothing yet, and a byte now and then is enough for the server's own limit,
// which is one for what stalls. So the body has a deadline, unless it comes at once, as WeChat's do.
type incomingBody struct {
	io.LimitedReader
	w     http.ResponseWriter
	r     *http.Request
	all   int64 // what N is once all that was announced has come
	begun bool  // something has come
	bound bool  // the deadline is set
}

func (b *incomingBody) Read(p []byte) (int, error) {
	if b.begun && !b.bound && b.N != b.all { // else its end alone is to come, which is there over h2 as well
		b.bound = true
		setBodyDeadline(b.w, b.r, bodyTimeout)
	}
	b.begun = true
	return b.LimitedReader.Read(p)
}

// done is for when all of the body is there.
func (b *incomingBody) done() {
	if b.bound {
		endBodyDeadline(b.w, b.r)
	}
	*b = incomingBody{}
}

// readBody reads the whole body, at most max bytes of it.
func (p *push) readBody(w http.ResponseWriter, r *http.Request, max int64) error {
	if r.ContentLength > max {
		return errTooLarge
	}
	if r.Body == nil {
		return errEnvelope
	}
	buf := bytes.NewBuffer(p.body[:0])
	if r.ContentLength > 0 {
		// Of what is only announced no more than this: the sender has proved nothing yet.
		buf.Grow(int(min(r.ContentLength, maxAnnounced)) + bytes.MinRead)
	}
	p.incoming = incomingBody{LimitedReader: io.LimitedReader{R: r.Body, N: max + 1}, w: w, r: r, all: max + 1 - r.ContentLength}
	n, err := buf.ReadFrom(&p.incoming)
	p.body = buf.Bytes()
	switch {
	case isTooLarge(err):
		return errTooLarge
	case p.incoming.bound && isTimeout(err):
		return errSlowBody
	case err != nil || endedEarly(n, r.ContentLength):
		return errBody
	case n > max:
		return errTooLarge
	}
	p.incoming.done()
	return nil
}

// endedEarly reports whether a body that has come to its end is shorter than its Content-Length. net/http makes an error of that,
// quic-go, which brings what comes over HTTP/3, does not.
func endedEarly(read, length int64) bool { return read < length }

// isTooLarge reports whether an outer handler's limit cut a body off.
func isTooLarge(err error) bool {
	_, ok := errors.AsType[*http.MaxBytesError](err)
	return ok
}

// candidate is one set of push credentials to try.
type candidate struct {
	codec    *crypto.Codec
	platform *Platform
	account  *Account
}

// open finds the credentials that fit, and decrypts. Of several failures it reports the one that got furthest.
func (p *push) open(candidates []candidate) error {
	if len(candidates) == 0 {
		return errUnknown
	}
	env, err := crypto.ScanEnvelope(p.body)
	if err != nil {
		return p.openPlain(candidates)
	}
	if p.query.msgSignature == "" {
		return errPlainPush
	}
	p.format = env.Format
	params := crypto.Params{MsgSignature: p.query.msgSignature, Timestamp: p.query.timestamp, Nonce: p.query.nonce}
	worst := errSignature
	for _, c := range candidates {
		opened, err := c.codec.Open(&p.buffers, params, env.Encrypt)
		switch {
		case err == nil:
			if q := &p.query; q.signature != "" && !c.codec.VerifySignature(q.signature, q.timestamp, q.nonce) {
				return errSignature
			}
			p.opened, p.codec, p.platform, p.account = opened, c.codec, c.platform, c.account
			return p.scan()
		case errors.Is(err, crypto.ErrReceiveID):
			worst = errReceiveID
		case errors.Is(err, crypto.ErrDecrypt) && c.account != nil && len(c.account.AESKeys) == 0:
			worst = errSealed
		case errors.Is(err, crypto.ErrDecrypt) && worst == errSignature:
			worst = errDecrypt
		}
	}
	return worst
}

// scan reads the fields of a push that was opened, and notes that it was. What doctor pushes says nothing of WeChat.
func (p *push) scan() error {
	err := crypto.ScanFields(p.opened.Message, &p.fields)
	if !p.isDoctors() {
		p.ring().opened(p.opened, p.plain)
	}
	if err != nil {
		return errPlaintext
	}
	return nil
}

// isEvent reports whether it is an event of a message URL's. Devices (微信硬件平台) have a type of their own for theirs. WeChat writes the
// types in lower case.
func (p *push) isEvent() bool {
	return bytes.EqualFold(p.fields.MsgType, []byte("event")) || bytes.EqualFold(p.fields.MsgType, []byte("device_event"))
}

// isMessageType reports whether pushes of a type are messages, in which users write, and which are no events. Types that nobody has told
// us of may be either.
func isMessageType(msgType []byte) bool {
	switch string(msgType) {
	case "text", "image", "voice", "video", "shortvideo", "location", "link", "miniprogrampage", "file", "emoji", "device_text":
		return true
	}
	return false
}

// isDoctors reports whether `caddy wechat doctor` made it. A message is never that, whatever its user wrote.
func (p *push) isDoctors() bool {
	f := &p.fields
	return p.isEvent() && string(f.Event) == doctorEvent || len(f.MsgType) == 0 && string(f.InfoType) == doctorEvent
}

// ring is that of the credentials that opened the push.
func (p *push) ring() *ring {
	if p.platform != nil {
		return p.platform.ring
	}
	return p.account.ring
}

// openPlain accepts a push in plaintext, whose signature covers timestamp and nonce alone, for an account in plaintext
// mode. No other account takes one, or whoever saw one signature could have us believe any text.
func (p *push) openPlain(candidates []candidate) error {
	err := p.notAnEnvelope()
	if err != errPlainPush || p.query.msgSignature != "" {
		return err
	}
	q := &p.query
	for _, c := range candidates {
		if c.account == nil || c.account.mode != modePlain {
			continue
		}
		if !c.codec.VerifySignature(q.signature, q.timestamp, q.nonce) {
			return errSignature
		}
		p.plain, p.codec, p.account = true, c.codec, c.account
		p.opened = crypto.Opened{Message: p.body}
		err := p.scan()
		p.format = p.fields.Format
		return err
	}
	return errPlainPush
}

// notAnEnvelope tells a push in plaintext from garbage, because the remedy is another one.
func (p *push) notAnEnvelope() *refusal {
	var f crypto.Fields
	if crypto.ScanFields(p.body, &f) == nil && (len(f.MsgType) > 0 || len(f.InfoType) > 0) && len(f.Encrypt) == 0 {
		return errPlainPush
	}
	return errEnvelope
}

// handshake answers WeChat's check of a URL (服务器配置校验): the echostr, byte for byte, to a right signature that is in time.
func (a *App) handshake(w http.ResponseWriter, p *push, candidates []candidate, window time.Duration) error {
	echo, err := p.echo(candidates)
	if err == nil {
		err = a.inTime(p, window)
	}
	if err != nil {
		return err
	}
	writePlain(w, echo)
	return nil
}

// echo is what a handshake with a right signature is answered. With msg_signature the echostr itself is encrypted and signed. So is a push, by
// the same signature: only what cannot be one is answered, or whoever has seen a push could have it decrypted.
func (p *push) echo(candidates []candidate) ([]byte, error) {
	q := &p.query
	if !q.hasEcho {
		return nil, errQuery
	}
	if len(candidates) == 0 {
		return nil, errUnknown
	}
	for _, c := range candidates {
		if q.msgSignature != "" {
			params := crypto.Params{MsgSignature: q.msgSignature, Timestamp: q.timestamp, Nonce: q.nonce}
			if opened, err := c.codec.Open(&p.buffers, params, []byte(q.echoStr)); err == nil && isNonce(string(opened.Message)) {
				return opened.Message, nil
			}
			continue
		}
		if c.codec.VerifySignature(q.signature, q.timestamp, q.nonce) {
			return []byte(q.echoStr), nil
		}
	}
	return nil, errSignature
}

// platformCandidates are the credentials of all platforms, or of the one that the path names.
func (a *App) platformCandidates(named *Platform) []candidate {
	if named != nil {
		return []candidate{{codec: named.codec, platform: named}}
	}
	return a.platformCodecs
}

// doctorEvent is the Event, and on the URL of wechat_event the InfoType, of what `caddy wechat doctor` pushes. WeChat has none of
// that name. The gateway answers it itself.
const doctorEvent = "caddy_wechat_doctor"

// success is the answer that tells WeChat that nothing more is to come.
var success = []byte("success")

// writePlain answers WeChat with exactly these bytes.
func writePlain(w http.ResponseWriter, body []byte) {
	h := w.Header()
	h["Content-Type"] = []string{plainType}
	h["Content-Length"] = []string{strconv.Itoa(len(body))}
	h["X-Content-Type-Options"] = []string{"nosniff"}
	w.WriteHeader(http.StatusOK)
	_, _ = w.Write(body)
}

// The media types of answers and of what backends get.
const (
	plainType = "text/plain; charset=utf-8"
	xmlType   = "text/xml; charset=utf-8"
	jsonType  = "application/json; charset=utf-8"
)

// refuse answers a push that is not accepted, counts it, and logs why. It does not return the error to Caddy, which
// would log the URI and with it signatures and openids; it returns what was answered.
func (a *App) refuse(w http.ResponseWriter, r *http.Request, endpoint string, p *push, err error) *refusal {
	why, ok := errors.AsType[*refusal](err)
	if !ok {
		why = errNotKept
	}
	a.feedRefused(r.Context(), endpoint, p, why)
	a.metrics().pushes.WithLabelValues(endpoint, why.result).Inc()
	a.sawRefused(r, endpoint, p, why)
	fields := []zap.Field{
		zap.String("endpoint", endpoint), zap.String("reason", why.reason), zap.Int("status", why.status),
		zap.String("path", r.URL.Path), zap.String("remote", r.RemoteAddr), zap.String("client_ip", visitorText(r)),
	}
	if why == errNotKept {
		a.logger.Error("push not acknowledged, WeChat will push again", append(fields, zap.Error(err))...)
	} else {
		a.logger.Warn("push refused", fields...)
	}
	h := w.Header()
	h["Content-Type"] = []string{plainType}
	h["X-Content-Type-Options"] = []string{"nosniff"}
	if why == errMethod {
		h["Allow"] = []string{"GET, POST"}
	}
	w.WriteHeader(why.status)
	_, _ = io.WriteString(w, why.reason+"\n")
	return why
}
