package caddymodule

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// Message is middleware for the message-and-event URL (消息与事件接收URL). It verifies and decrypts a push, hands it
// to the next handler as a plaintext request, and encrypts what that handler answers.
//
// The account is the configured appid, or else the last segment of the path that has the shape of an appid and is
// not a platform's; where a handler such as handle_path has taken that away, of the path as it came. The credentials of the plain account of that appid and of every platform (only of the one named
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
// WeChat waits 5 seconds for an answer and pushes a message up to three times, but only an unanswered push again. So a
// push whose answer is not ready is held until WeChat drops it, and the next one joins the backend's work: the backend
// runs once and has close to 15 seconds. Only the last push is answered come what may, ReplyTimeout after it came: the
// Pushes-th, or one that comes 9 seconds or more after the first, or after the message was made by WeChat's clock. What
// it gets then is SlowReply's to say. A push after the answer gets the same answer again, for a minute; after that
// `success`, for as long as its timestamp is accepted. A backend that cannot be reached is tried again until the last
// push. All of this is remembered in memory: it survives a reload, not the process, so that a push that comes again after
// a crash is a new one. With a store that nodes share, all of it holds on whichever node a push comes: one node has the
// message answered, and another one takes it over, once, if that one dies. While such a store does not answer, each node
// knows its own pushes.
//
// A push that opens under a platform is taken for the account that the path names, whether or not that is known to have
// authorised the platform; once its gh_ id is known, a push with another ToUserName is refused. For a plain account in
// 明文模式, whose pushes have no signature over the text, a timestamp and nonce that came before with another text are refused.
//
// A forged or stale push gets 403, a malformed one 400, an oversized one 413, one whose body is not there 10 s after it has begun 408,
// another method than GET and POST 405; none reaches the next handler, and each is logged with its reason and counted. An authorization
// event that comes to this URL is handled as wechat_event would, but is forwarded to nobody: the forward of that is of what comes to it. WeChat's acceptance check (全网发布) is answered without the next handler.
//
// Each mirror gets a copy of every message that the next handler gets, as that gets it: one account, several environments.
// Copies are sent in the background, once however often WeChat pushes the message, at most MirrorMaxInFlight at a time to one mirror
// and for at most MirrorTimeout each; what a mirror answers, or that it does not, is counted and changes nothing. WeChat's acceptance
// check, and a text that begins with QUERY_AUTH_CODE:, are never mirrored.
type Message struct {
	// AppID is the account whose pushes come to this route. Default: read from the path.
	AppID string `json:"appid,omitempty"`
	// Pushes is how often WeChat pushes a message that is not answered, from 1 to 10. Whatever it is, a push 9 seconds after the first is the last. Default: 3.
	Pushes int `json:"pushes,omitempty"`
	// ReplyTimeout is the time from the last push to its answer, below WeChat's 5 s. Default: 4.5s.
	ReplyTimeout caddy.Duration `json:"reply_timeout,omitempty"`
	// SlowReply is what the last push gets when the backend's answer is still not there: success; text, which is
	// SlowReplyText; or customer_service: success, and the answer is sent through the customer-service API when it comes,
	// once. Default: success.
	SlowReply string `json:"slow_reply,omitempty"`
	// SlowReplyText is what SlowReply text answers. Required with it. What is known to be a mini program's gets success: it has no text
	// replies.
	SlowReplyText string `json:"slow_reply_text,omitempty"`
	// FallbackText is what the sender is answered when the backend's answer cannot be used; in a mini program, nothing, as with
	// SlowReplyText. Default: nothing.
	FallbackText string `json:"fallback_text,omitempty"`
	// BackendTimeout ends the backend's work on a message, answered or not: at least ReplyTimeout, and at most 1 h. Default: 1m.
	BackendTimeout caddy.Duration `json:"backend_timeout,omitempty"`
	// TimestampWindow is how far a push's timestamp may be from this machine's clock, or, where that is off by as much by WeChat's answers,
	// from WeChat's, which is asked for before a push is refused. Default: 5m.
	TimestampWindow caddy.Duration `json:"timestamp_window,omitempty"`
	// MaxBody is the largest push accepted, in bytes, at most 1 GiB; the next handler's answer may be as large. Default: 1 MiB.
	MaxBody int64 `json:"max_body,omitempty"`
	// MaxInFlight is how many messages may be at the next handler at once, at most 1,000,000. As many again wait for a place, and as many
	// again are held until WeChat drops them and pushes them again; of what comes then the connection is closed. Default: 10000.
	MaxInFlight int `json:"max_in_flight,omitempty"`
	// Deduplication is where pushes of one message meet: cluster, on whichever nodes they come, which takes a store that nodes
	// share, such as redis; or local, on this node. Default: cluster with such a store, else local.
	Deduplication string `json:"deduplication,omitempty"`
	// MirrorsRaw are handlers, such as reverse_proxy, that each get a copy of every message; none of them twice. Default: none.
	MirrorsRaw []json.RawMessage `json:"mirrors,omitempty" caddy:"namespace=http.handlers inline_key=handler"`
	// MirrorTimeout is how long one copy may take, at most 30 s. Default: 15s.
	MirrorTimeout caddy.Duration `json:"mirror_timeout,omitempty"`
	// MirrorMaxInFlight is how many copies may be under way to one mirror at once, at most 1,000,000; it gets none of the messages that come
	// then. Default: 256.
	MirrorMaxInFlight int `json:"mirror_max_in_flight,omitempty"`

	app       *App
	clustered bool
	mirrors   []*mirror
	places    chan struct{} // one for each message at the next handler
	waiting   atomic.Int64  // messages that wait for a place
	crowd     atomic.Int64  // pushes that are held because too many wait
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
	if m.Pushes == 0 {
		m.Pushes = defaultPushes
	}
	if m.ReplyTimeout == 0 {
		m.ReplyTimeout = caddy.Duration(defaultReplyTimeout)
	}
	if m.BackendTimeout == 0 {
		m.BackendTimeout = caddy.Duration(defaultBackendTimeout)
	}
	if m.SlowReply == "" {
		m.SlowReply = slowSuccess
	}
	if m.MaxInFlight == 0 {
		m.MaxInFlight = defaultMaxInFlight
	}
	if m.MaxInFlight > 0 && m.MaxInFlight <= maxMaxInFlight {
		m.places = make(chan struct{}, m.MaxInFlight)
	}
	if m.app, err = loadApp(ctx); err != nil {
		return err
	}
	if m.AppID != "" {
		if err := literalAppID(m.AppID); err != nil {
			return err
		}
	}
	if err := m.fits(m.app); err != nil {
		return err
	}
	if err := m.provisionDeduplication(); err != nil {
		return err
	}
	if err := m.provisionMirrors(ctx); err != nil {
		return err
	}
	if !m.app.receives(m.AppID) {
		m.app.logger.Warn("wechat_message can take no push here: there is no platform, and no such account with a token; give the account its token and aes_key in the global option wechat",
			zap.String("appid", m.AppID))
	}
	return nil
}

// fits implements fitting.
func (m *Message) fits(app *App) error {
	switch {
	case m.AppID != "" && app.listedPlatform(m.AppID) != nil:
		return fmt.Errorf("%s is a platform: messages are for the accounts that authorised it; leave the appid out and let the path say which", m.AppID)
	case m.Deduplication == deduplicateCluster && app.storesAlone():
		return errors.New("deduplication cluster: the store keeps nothing that other nodes see: configure store redis in the global option wechat, or leave deduplication out")
	}
	return nil
}

// provisionDeduplication decides where pushes of one message meet.
func (m *Message) provisionDeduplication() error {
	switch m.Deduplication {
	case "":
		m.Deduplication = deduplicateCluster
		if m.app.storesAlone() {
			m.Deduplication = deduplicateLocal
		}
	case deduplicateLocal, deduplicateCluster:
	default:
		return fmt.Errorf("deduplication: '%s' is none: want cluster or local", m.Deduplication)
	}
	m.clustered = m.Deduplication == deduplicateCluster
	return nil
}

// Validate refuses settings that make no sense.
func (m *Message) Validate() error {
	if err := checkWindow(m.TimestampWindow); err != nil {
		return err
	}
	if m.MaxBody < 0 || m.MaxBody > maxSize {
		return errors.New("max_body: want a number of bytes up to 1 GiB")
	}
	if err := literalPushes(m.Pushes); err != nil {
		return err
	}
	if err := literalReplyTimeout(m.ReplyTimeout); err != nil {
		return err
	}
	if err := checkBackendTimeout(m.BackendTimeout, m.ReplyTimeout); err != nil {
		return err
	}
	if m.MaxInFlight < 0 || m.MaxInFlight > maxMaxInFlight {
		return fmt.Errorf("max_in_flight: want a number from 1 to %d", maxMaxInFlight)
	}
	switch m.SlowReply {
	case slowSuccess, slowCustomerService:
		if m.SlowReplyText != "" {
			return errors.New("slow_reply_text is there without slow_reply text")
		}
	case slowText:
		if m.SlowReplyText == "" {
			return errors.New("slow_reply text: the text is missing")
		}
	default:
		return fmt.Errorf("slow_reply: '%s' is none: %s", m.SlowReply, wantSlowReply)
	}
	return nil
}

// maxSize is the largest size that any option accepts.
const maxSize = 1 << 30

// ServeHTTP verifies and opens a push, has it answered, and seals the answer.
func (m *Message) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	d := onDetour(r)
	if !m.admit(d, r) {
		return nil
	}
	started := time.Now()
	if d != nil {
		started = d.came // WeChat has been waiting since
	}
	p := newPush()
	defer p.release()
	p.entry.Time, p.last = started, d != nil && d.last
	switch err := m.serve(w, r, next, p, started); {
	case errors.Is(err, errHeld), errors.Is(err, errDropped):
		m.app.metrics().pushes.WithLabelValues("message", "held").Inc()
		m.app.feedPush(r.Context(), p, feedPush, outcomeHeld)
		if errors.Is(err, errHeld) {
			panic(http.ErrAbortHandler) // ends without an answer: who seems to have hung up may listen all the same
		}
		if d != nil {
			d.dropped = true
		}
		return nil
	case err != nil:
		why := m.app.refuse(w, r, "message", p, err)
		if d != nil {
			d.refused = why
		}
		return nil
	}
	m.app.metrics().messageOK.Inc()
	p.answered = p.answeredAt()
	if d != nil {
		d.answered = p.answered
	}
	m.app.metrics().messageDuration.Observe(p.answered.Sub(started).Seconds())
	m.app.feedPush(r.Context(), p, feedPush, outcomeOK)
	return nil
}

// Why a push goes unanswered, so that WeChat pushes it again.
var (
	errHeld    = errors.New("not answered")
	errDropped = errors.New("not answered, and its connection is closed already")
)

func (m *Message) serve(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler, p *push, started time.Time) error {
	if err := p.query.parse(r.URL.RawQuery); err != nil {
		return err
	}
	window := time.Duration(m.TimestampWindow)
	appid, candidates := m.whose(r)
	p.entry.AppID = appid
	switch r.Method {
	case http.MethodGet:
		return m.app.handshake(w, p, candidates, window)
	case http.MethodPost:
	default:
		return errMethod
	}
	if err := p.readBody(w, r, m.MaxBody); err != nil {
		return err
	}
	if err := p.open(candidates); err != nil {
		return err
	}
	if len(p.fields.InfoType) > 0 && len(p.fields.MsgType) == 0 && p.platform != nil {
		m.app.logger.Warn("an authorization event came to a message URL and was handled: in the platform's console, compare 授权事件接收URL with 消息与事件接收URL",
			zap.String("platform", p.platform.AppID), zap.ByteString("info_type", p.fields.InfoType))
		m.app.health().sightings.saw(codeEventMisdirected, p.platform.AppID, tokens.Text{})
		if err := m.app.keepEvent(r.Context(), p, window); err != nil {
			return err
		}
		writePlain(w, success)
		return nil
	}
	if len(p.fields.MsgType) == 0 {
		return errPlaintext
	}
	if err := m.app.inTime(p, window); err != nil {
		return err
	}
	if p.isDoctors() {
		writePlain(w, success)
		return nil
	}
	if m.app.answerReleaseCheck(w, p, appid) { // for the account that it names, whatever the path says
		return nil
	}
	if p.platform != nil && m.app.isForAnother(p, appid) {
		return errAddressee
	}
	if p.plain && !m.app.shared.firstBody(p, window, m.clustered) {
		return errReplayed
	}
	f := newFacts(p, appid)
	m.app.nameMessage(p, f)
	return m.pass(w, r, next, p, f, started)
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

// whose is candidates for a request. What its path does not name, handlers such as handle_path may have taken away: of that the path as it
// came counts.
func (m *Message) whose(r *http.Request) (appid string, list []candidate) {
	appid, named := m.namedIn(r.URL.Path)
	if appid == "" {
		before, platform := m.namedIn(originalPath(r))
		appid = before
		if named == nil {
			named = platform
		}
	}
	return appid, m.keys(appid, named)
}

// candidates reads from the path which account a push is for, and which credentials may open it.
func (m *Message) candidates(path string) (appid string, list []candidate) {
	appid, named := m.namedIn(path)
	return appid, m.keys(appid, named)
}

// namedIn reads from the path which account a push is for, and which platform's it is to be.
func (m *Message) namedIn(path string) (appid string, named *Platform) {
	appid = m.AppID
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
	return appid, named
}

// keys are the credentials that may open a push for an account; named is the platform that it must come from, if one is.
func (m *Message) keys(appid string, named *Platform) []candidate {
	list := m.app.platformCandidates(named)
	if acc := m.app.account(appid); acc != nil && acc.codec != nil {
		own := candidate{codec: acc.codec, account: acc}
		list = append([]candidate{own}, list...)
	}
	return list
}

var (
	_ caddy.Provisioner           = (*Message)(nil)
	_ caddy.Validator             = (*Message)(nil)
	_ caddyhttp.MiddlewareHandler = (*Message)(nil)
	_ caddyfile.Unmarshaler       = (*Message)(nil)
)
