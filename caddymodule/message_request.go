package caddymodule

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/internal/http1"
)

// facts is what the gateway tells others about a push.
type facts struct {
	appid, platform, openID, msgType, event, eventKey, infoType string
	content                                                     []byte // only while the next handler runs
}

// String shows nothing: the facts stand in Caddy's table of variables, which can be logged.
func (*facts) String() string { return "a push" }

// factsVar is the facts' name in Caddy's table of variables.
const factsVar = "wechat_push"

// factsOf returns what wechat_message found out about a request, or nil.
func factsOf(ctx context.Context) *facts { f, _ := caddyhttp.GetVar(ctx, factsVar).(*facts); return f }

func newFacts(p *push, appid string) *facts {
	f := &facts{appid: appid}
	if p.account != nil {
		f.appid = p.account.AppID
	} else {
		f.platform = p.platform.AppID
	}
	// One string for all: they live and die together, and a push costs one allocation instead of five.
	parts := [...][]byte{p.fields.FromUserName, p.fields.MsgType, p.fields.Event, p.fields.EventKey, p.fields.InfoType}
	// What a user writes can end its CDATA, which WeChat does not escape, and go on with elements of any name.
	if isMessageType(p.fields.MsgType) {
		parts[2], parts[3] = nil, nil
	}
	if len(p.fields.MsgType) > 0 {
		parts[4] = nil
	}
	into := [...]*string{&f.openID, &f.msgType, &f.event, &f.eventKey, &f.infoType}
	var all strings.Builder
	length := 0
	for _, part := range parts {
		length += len(part)
	}
	all.Grow(length)
	for _, part := range parts {
		all.Write(part)
	}
	rest := all.String()
	for i, part := range parts {
		*into[i], rest = rest[:len(part)], rest[len(part):]
	}
	return f
}

// placeholder resolves the {wechat.*} placeholders.
func (f *facts) placeholder(key string) (any, bool) {
	name, ours := strings.CutPrefix(key, "wechat.")
	if !ours {
		return nil, false
	}
	switch name {
	case "appid":
		return f.appid, true
	case "platform":
		return f.platform, true
	case "openid":
		return f.openID, true
	case "msg_type":
		return f.msgType, true
	case "event":
		return f.event, true
	case "event_key":
		return f.eventKey, true
	}
	return nil, false
}

// announce puts the facts where matchers and placeholders find them.
func (f *facts) announce(r *http.Request) {
	if factsOf(r.Context()) == f {
		return // a backend is tried again
	}
	caddyhttp.SetVar(r.Context(), factsVar, f)
	if repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok {
		repl.Map(f.placeholder)
	}
}

// plaintextParts is what a plaintext request points to. Whoever sends it may go on looking at them when it was answered.
type plaintextParts struct {
	url  url.URL
	text plaintext
	body plaintextBody // the first reading of the text, by Caddy's placeholders
	sent plaintextBody // and that of the handlers below, who get a copy of the request
}

func (parts *plaintextParts) hold(message []byte) {
	parts.text.data, parts.body.text, parts.sent.text = message, &parts.text, &parts.text
}

// caddyValues are what Caddy's handlers ask a request's context for time and again.
type caddyValues struct{ replacer, vars any }

func caddyValuesOf(ctx context.Context) caddyValues {
	return caddyValues{ctx.Value(caddy.ReplacerCtxKey), ctx.Value(caddyhttp.VarsCtxKey)}
}

func (c *caddyValues) value(key any) (value any, ok bool) {
	switch key {
	case caddy.ReplacerCtxKey:
		return c.replacer, true
	case caddyhttp.VarsCtxKey:
		return c.vars, true
	}
	return nil, false
}

// work is a backend's work on a message: the context of the plaintext request, and what that request points to. It ends by itself
// and not with the push that it was begun for. It has at hand what Caddy's handlers ask a request's context for a dozen times and
// would find a dozen contexts further up.
type work struct {
	context.Context // ends with the work
	cancel          context.CancelCauseFunc
	deadline        time.Time

	mu    sync.Mutex
	onEnd func() // of OnEnd

	of      context.Context // the push's, for its values
	atHand  caddyValues
	parts   plaintextParts
	arrived atomic.Bool // a backend may have the message, says a transport that knows
}

// workKey is under what a work is found in its own context.
type workKey struct{}

// noteArrival notes that a backend may have the message that a request has for a body, after a round trip that failed with err.
func noteArrival(req *http.Request, err error) {
	if _, dialing := errors.AsType[reverseproxy.DialError](err); dialing || req.Body == nil || req.Body == http.NoBody {
		return
	}
	if w, ours := req.Context().Value(workKey{}).(*work); ours {
		w.arrived.Store(true)
	}
}

// roundTripPlaceholder is what reverse_proxy sets once a backend has answered.
const roundTripPlaceholder = "http.reverse_proxy.upstream.latency"

// begin forgets what proxies have had answered before the message was read: that was not to it. Such are proxies outside of us, and
// those that ask somebody for leave.
func (w *work) begin() {
	if repl, ok := w.atHand.replacer.(*caddy.Replacer); ok {
		repl.Delete(roundTripPlaceholder)
	}
}

// hasArrived reports whether a backend may have the message: a transport says so, or one of the proxies below us had an answer, and
// the message was read.
func (w *work) hasArrived() bool {
	if w.arrived.Load() {
		return true
	}
	repl, ok := w.atHand.replacer.(*caddy.Replacer)
	if !ok || !w.parts.sent.isBegun() {
		return false
	}
	_, answered := repl.Get(roundTripPlaceholder)
	return answered
}

// statusPlaceholder is what reverse_proxy sets to the status of a backend's answer.
const statusPlaceholder = "http.reverse_proxy.status_code"

// hasSwitched reports whether a backend has answered 101, of which reverse_proxy passes nothing on to who did not ask for it.
func (w *work) hasSwitched() bool {
	repl, ok := w.atHand.replacer.(*caddy.Replacer)
	if !ok {
		return false
	}
	status, _ := repl.Get(statusPlaceholder)
	return status == http.StatusSwitchingProtocols
}

func newWork(of context.Context, message []byte, deadline time.Time) *work {
	w := &work{of: of, atHand: caddyValuesOf(of), deadline: deadline}
	w.Context, w.cancel = context.WithCancelCause(context.Background())
	w.parts.hold(message)
	w.parts.sent.of = w
	return w
}

// Value implements context.Context.
func (w *work) Value(key any) any {
	if value, ok := w.atHand.value(key); ok {
		return value
	}
	switch key {
	case workKey{}, http1.EnderKey{}:
		return w
	case caddyhttp.OriginalRequestCtxKey:
		return w.original()
	}
	if own := w.Context.Value(key); own != nil { // by which contexts below find out that this one ends
		return own
	}
	return w.of.Value(key)
}

// original is the request as it came, for those who tell a backend of that one, as fastcgi does in REQUEST_URI: with the query of the
// plaintext request too, or a backend that reads it there thinks that the body is encrypted. Few ask, so it is made anew each time.
func (w *work) original() any {
	value := w.of.Value(caddyhttp.OriginalRequestCtxKey)
	original, ok := value.(http.Request)
	f := factsOf(w)
	if !ok || original.URL == nil || f == nil {
		return value
	}
	u := *original.URL
	original.RequestURI, u.RawQuery = plaintextURI(original.URL, f.openID)
	original.URL = &u
	return original
}

// end ends the work.
func (w *work) end(cause error) {
	w.cancel(cause)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.onEnd != nil {
		go w.onEnd()
		w.onEnd = nil
	}
}

// OnEnd implements http1.Ender.
func (w *work) OnEnd(f func()) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.onEnd != nil || w.Context.Err() != nil {
		return false
	}
	w.onEnd = f
	return true
}

// Forget implements http1.Ender.
func (w *work) Forget() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	waiting := w.onEnd != nil
	w.onEnd = nil
	return waiting
}

// Deadline implements context.Context.
func (w *work) Deadline() (time.Time, bool) { return w.deadline, true }

// Err implements context.Context.
func (w *work) Err() error {
	err := w.Context.Err()
	if err != nil && w.isLate() {
		return context.DeadlineExceeded
	}
	return err
}

// isLate reports whether the work was ended for taking too long.
func (w *work) isLate() bool { return context.Cause(w.Context) == errTooSlow } //nolint:errorlint // our own, never wrapped

// wire is what makePlaintext changes of a request, as it was. Not the Trailer: a transport that is still sending the body reads that.
type wire struct {
	url              *url.URL
	uri              string
	header           http.Header
	body             io.ReadCloser
	length           int64
	transferEncoding []string
	again            func() (io.ReadCloser, error)
}

func wireOf(r *http.Request) wire {
	return wire{r.URL, r.RequestURI, r.Header, r.Body, r.ContentLength, r.TransferEncoding, r.GetBody}
}

func (w *wire) restore(r *http.Request) {
	r.URL, r.RequestURI, r.Header, r.Body, r.ContentLength, r.TransferEncoding, r.GetBody =
		w.url, w.uri, w.header, w.body, w.length, w.transferEncoding, w.again
}

// makePlaintext turns a push into the request that a backend which knows nothing of encryption expects. What the fields
// of r pointed to is left as it is.
func makePlaintext(r *http.Request, p *push, f *facts, parts *plaintextParts) {
	parts.url = *r.URL
	r.RequestURI, parts.url.RawQuery = plaintextURI(r.URL, f.openID)
	r.URL = &parts.url

	text := &parts.text
	r.Body, r.ContentLength, r.TransferEncoding, r.Trailer = &parts.body, int64(len(text.data)), nil, nil
	// With GetBody net/http sends the push again when a kept connection turns out to be closed before a byte was
	// written; once anything was written it does not, because a POST is not idempotent.
	r.GetBody = text.again

	r.Header = plaintextHeader(r.Header, p, f)
	f.announce(r)
}

// plaintextHeader is a push's header as a backend gets it. A header rule below us may change values in place, so they are copies;
// all of them share one array.
func plaintextHeader(from http.Header, p *push, f *facts) http.Header {
	trusted := [...]struct{ name, value string }{
		{headerAppID, f.appid}, {headerPlatform, f.platform}, {headerOpenID, f.openID}, {headerMsgType, f.msgType},
		{headerEvent, f.event}, {"Content-Type", contentType(p.fields.Format)},
	}
	// A map and an array of the right size: eight headers, which most pushes have no more of, take half of what nine take.
	// Nor is a name assigned twice: a map of eight would grow for it.
	var stack [16]string
	names, further, count := stack[:0], 0, 0
	for name, values := range from {
		if isPassedOn(name) {
			names = append(names, name)
			count += len(values)
		}
	}
	for i := range trusted {
		t := &trusted[i]
		if !isTrusted(t.value) {
			t.value = ""
			continue
		}
		further++
	}
	all := make([]string, 0, count+further)
	add := func(values ...string) []string {
		start := len(all)
		all = append(all, values...)
		return all[start:len(all):len(all)]
	}
	h := make(http.Header, len(names)+further)
	for _, name := range names {
		h[name] = add(from[name]...)
	}
	for i := range trusted {
		if t := &trusted[i]; t.value != "" {
			h[t.name] = add(t.value)
		}
	}
	return h
}

// isPassedOn reports whether a backend gets a caller's header. It does not get the gateway's own, those that describe the encrypted
// push or the connection it came on, and those that would have net/http send a push twice. What a Connection header names is
// removed by proxies, our own headers included.
func isPassedOn(name string) bool {
	switch name {
	case "Accept-Encoding", "Content-Encoding", "Content-Length", "Content-Type", "Transfer-Encoding", "Expect", "Trailer",
		"Connection", "Proxy-Connection", "Keep-Alive", "Te", "Upgrade",
		"Idempotency-Key", "X-Idempotency-Key":
		return false
	}
	return !standsForTrusted(name)
}

// plaintextURI is a push's URI, and the query in it, as it would be in 明文模式: a plaintext SDK behind us checks signature, timestamp and
// nonce, and must not think that the body is encrypted. The openid, which no signature covers, becomes the sender's. Nor does a backend get
// what it could read as one of these by another spelling.
func plaintextURI(u *url.URL, openID string) (uri, query string) {
	bare := *u
	bare.RawQuery, bare.ForceQuery = "", false
	path := bare.RequestURI()
	var b strings.Builder
	b.Grow(len(path) + len("?") + len(u.RawQuery) + len("&openid=") + len(openID))
	b.WriteString(path)
	for raw := u.RawQuery; raw != ""; {
		var pair string
		pair, raw, _ = strings.Cut(raw, "&")
		name, _, _ := strings.Cut(pair, "=")
		separator := byte('&')
		if b.Len() == len(path) {
			separator = '?'
		}
		switch {
		case name == "encrypt_type", name == "msg_signature":
			continue
		case name == "openid" && openID != "":
			b.WriteByte(separator)
			b.WriteString("openid=")
			b.WriteString(url.QueryEscape(openID))
		case isMisspelt(name):
			continue
		default:
			b.WriteByte(separator)
			b.WriteString(pair)
		}
	}
	uri = b.String()
	return uri, strings.TrimPrefix(uri[len(path):], "?")
}

// pushParameters are those of WeChat's that say something to a backend.
var pushParameters = [...]string{"signature", "timestamp", "nonce", "openid", "encrypt_type", "msg_signature", "echostr"}

// isMisspelt reports whether a backend could take a parameter for one of WeChat's whose name it has not: PHP reads openid[] as openid and
// encrypt.type as encrypt_type, ASP.NET does not tell OpenID from openid.
func isMisspelt(name string) bool {
	base, _, _ := strings.Cut(name, "[")
	for _, known := range pushParameters {
		if len(base) == len(known) && name != known && isOneVariable(base, known) {
			return true
		}
	}
	return false
}

// contentType is the media type of a message format. A header's value is always a slice of its own: header rules of
// the configuration change values in place.
func contentType(f crypto.Format) string {
	if f == crypto.FormatJSON {
		return jsonType
	}
	return xmlType
}
