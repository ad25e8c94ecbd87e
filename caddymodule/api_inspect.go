package caddymodule

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// inspect looks at the start of an answer. Whatever the call, it must be an answer; one to a call with a secret of the
// gateway's must not repeat the secret, in its head either, and its errcode counts. Error pages repeat URLs anywhere, so of those nothing is
// passed on before all of it has been looked at. Of other texts what is longer than the start is looked at on its way.
func (t *Transport) inspect(req *http.Request, call *apiCall, res *http.Response, answer *answerBody, token secret.String) (*http.Response, bool, error) {
	if !isAnswer(res.StatusCode) {
		_ = res.Body.Close()
		return ownAnswer(req, t.notAPI(call, "it answered HTTP "+strconv.Itoa(res.StatusCode)+", which is the status of no answer")), false, nil
	}
	if inHead(res, call, token) {
		_ = res.Body.Close()
		return ownAnswer(req, t.notAPI(call, "it answered HTTP "+strconv.Itoa(res.StatusCode)+" with the request's credential in it")), false, nil
	}
	html := res.StatusCode == http.StatusOK && isHTML(res.Header)
	if req.Method == http.MethodHead {
		return res, false, nil
	}
	if coding := decode(res, &answer.live); coding != "" && call.sealed() && answer.live.body != http.NoBody {
		_ = res.Body.Close()
		return ownAnswer(req, t.notAPI(call, "it is encoded ("+coding+"), which nobody asked for: is there a proxy on the way?")), false, nil
	}
	switch {
	case res.StatusCode == http.StatusOK && res.ContentLength >= peekSize && !html:
		t.guard(res, call, token)
		return res, false, nil
	}
	body := &answer.peeked
	page := call.sealed() && isErrorPage(res.StatusCode)
	limit := peekSize
	if page {
		limit = maxErrorPage + 1
	}
	within := t.stall
	if !page {
		within += t.answer // WeChat may begin an answer before it has made it
	}
	whole := body.peek(res.Body, limit, within, page)
	head := body.head
	res.Body = body
	start, _ := jsonStart(head)
	isJSON := start == '{'
	switch {
	case body.err != nil && body.err != io.EOF:
		_ = res.Body.Close()
		if err := req.Context().Err(); err != nil {
			return nil, false, err
		}
		return ownAnswer(req, t.halfAnswer(call, body.err)), false, nil
	case html && !isJSON:
		_ = res.Body.Close()
		return ownAnswer(req, t.notAPI(call, "it answered with a web page: is there a proxy or a login page on the way?")), false, nil
	case contains(head, call, token):
		_ = res.Body.Close()
		return ownAnswer(req, t.notAPI(call, "its answer has the request's credential in it")), false, nil
	case page && !whole:
		_ = res.Body.Close()
		return ownAnswer(req, t.notAPI(call, "its error page, HTTP "+strconv.Itoa(res.StatusCode)+", is longer than 64 KiB: is there a proxy or a login page on the way?")), false, nil
	case !whole:
		t.guard(res, call, token)
		return res, false, nil
	case res.StatusCode != http.StatusOK || !isJSON || !call.sealed():
		return res, false, nil
	}
	code, found := scanErrcode(head)
	if !found || code == 0 {
		return res, false, nil
	}
	call.outcome = outcomeError
	call.errcode, call.rid = code, strings.Clone(tokens.RequestID(string(head)))
	t.app.metrics().apiErrors.WithLabelValues(errcodeLabel(code)).Inc()
	t.explain(call, code, head)
	switch {
	case code == codeNotAuthorized && call.key.Kind == tokens.KindAuthorizer:
		t.app.manager().Suspect(call.key)
	case (code == codeNoTicket || code == codeTicketInvalid) && call.key.Platform != "":
		t.app.manager().DoubtTicket(call.key.Platform)
	}
	return res, tokens.IsTokenRefused(code) && call.key.Kind != "", nil
}

// halfAnswer refuses an answer that began and did not end.
func (t *Transport) halfAnswer(call *apiCall, err error) *apiRefusal {
	if bad, ok := errors.AsType[badGzipError](err); ok {
		return t.notAPI(call, bad.Error()+": is there a proxy on the way?")
	}
	if !isTimeout(err) {
		return t.notAPI(call, "its answer broke off")
	}
	call.outcome = outcomeUnreachable
	if ok, missed := t.lost.allow(); ok {
		t.logger.Warn("WeChat began to answer and fell silent", zap.Inline(call), zap.Duration("waited", t.stall), zap.Int("not_logged", missed))
	}
	call.reason = "WeChat began to answer and did not go on"
	return unreachable(err, call.reason)
}

// notAPI refuses an answer that cannot be WeChat's API speaking.
func (t *Transport) notAPI(call *apiCall, what string) *apiRefusal {
	call.outcome, call.reason = outcomeUnreachable, "WeChat's host gave no usable answer: "+what
	if ok, missed := t.lost.allow(); ok {
		t.logger.Warn("answer from WeChat's host is not its API's", zap.String("reason", what), zap.Inline(call), zap.Int("not_logged", missed))
	}
	return refuse(http.StatusBadGateway, http.StatusBadGateway, "answer", "WeChat's host gave no usable answer: %s", what)
}

// inspectTrailer leaves a trailer out that repeats a secret of the call's: all that it is the end of was passed on, and is good.
func (t *Transport) inspectTrailer(trailer http.Header, call *apiCall, token secret.String) {
	if !echoes(trailer, call, token) {
		return
	}
	clear(trailer)
	if ok, missed := t.lost.allow(); ok {
		t.logger.Warn("a trailer of the answer from WeChat's host has the request's credential in it and is left out: is there a proxy on the way?",
			zap.Inline(call), zap.Int("not_logged", missed))
	}
}

// isHTML reports whether an answer says it is a web page.
func isHTML(h http.Header) bool {
	const html = "text/html"
	types := h["Content-Type"]
	return len(types) > 0 && len(types[0]) >= len(html) && strings.EqualFold(types[0][:len(html)], html)
}

// isAnswer reports whether a status is one that an answer may have: 101 is not asked for, and with what has other than three digits Go's
// server would panic.
func isAnswer(status int) bool { return status >= http.StatusOK && status <= 999 }

// inHead reports whether an answer repeats a credential of the request before its body: in a header, in the name of a trailer that it
// announces, or in the text of its status, which {http.reverse_proxy.status_text} shows.
func inHead(res *http.Response, call *apiCall, token secret.String) bool {
	return call.anySecret(token, func(s secret.String) bool {
		return inHeader(res.Header, s) || inHeader(res.Trailer, s) || !s.IsZero() && strings.Contains(res.Status, s.Reveal())
	})
}

// echoes reports whether a header, or a trailer, repeats a credential of the request, as redirects do.
func echoes(h http.Header, call *apiCall, token secret.String) bool {
	return call.anySecret(token, func(s secret.String) bool { return inHeader(h, s) })
}

// anySecret reports whether one of the secrets that go with the call is as asked.
func (c *apiCall) anySecret(token secret.String, is func(secret.String) bool) bool {
	if is(token) {
		return true
	}
	for _, p := range c.extra {
		if p.name == paramSecret && is(p.value) {
			return true
		}
	}
	return false
}

// inHeader reports whether a secret is in a header, in its values or, in whatever case, in its names. Most of those are shorter than it.
func inHeader(h http.Header, s secret.String) bool {
	value := s.Reveal()
	if value == "" {
		return false
	}
	for name, values := range h {
		if len(name) >= len(value) && containsFold(name, value) {
			return true
		}
		for _, v := range values {
			if len(v) >= len(value) && strings.Contains(v, value) {
				return true
			}
		}
	}
	return false
}

// containsFold reports whether a value is in a name, which has been brought to another case on its way.
func containsFold(name, value string) bool {
	for ; len(name) >= len(value); name = name[1:] {
		if strings.EqualFold(name[:len(value)], value) {
			return true
		}
	}
	return false
}

// contains reports whether a text repeats a credential of the request.
func contains(text []byte, call *apiCall, token secret.String) bool {
	return call.anySecret(token, func(s secret.String) bool { return hasSecret(text, s) })
}

// hasSecret reports whether a secret is in a text.
func hasSecret(text []byte, s secret.String) bool {
	value := s.Reveal()
	return value != "" && indexSecret(text, value) >= 0
}

// indexSecret is where a secret's value is in a text, or -1. It makes no copy of it.
func indexSecret(text []byte, value string) int {
	for from := 0; len(text)-from >= len(value); {
		at := bytes.IndexByte(text[from:len(text)-len(value)+1], value[0])
		if at < 0 {
			return -1
		}
		from += at
		if string(text[from:from+len(value)]) == value {
			return from
		}
		from++
	}
	return -1
}

// peekSize is up to how many bytes an answer is looked at before it is passed on: WeChat's errors are shorter.
const peekSize = 4 << 10

// firstPeek is the size of the buffer for that to begin with: most answers are shorter.
const firstPeek = 512

// maxErrorPage is up to how many bytes an answer with an error's status may have if the call carried a secret: it is
// read to its end before any of it is passed on. Error pages of WeChat, and of proxies on the way, are shorter.
const maxErrorPage = 64 << 10

// isErrorPage reports whether what comes with a status is no content that was asked for. A part of a file, which a
// Range gets, is, and may be long.
func isErrorPage(status int) bool {
	return status != http.StatusOK && status != http.StatusPartialContent
}

// answerBody is all that stands between an answer's body and Caddy, in one piece, because each call needs it.
type answerBody struct {
	live   liveBody
	peeked peekedBody // over live, once peek has been called
}

// peekedBody is an answer's body of which the first bytes have been looked at.
type peekedBody struct {
	head  []byte           // not yet passed on
	first *[firstPeek]byte // where head is; nil: in memory of its own
	rest  io.ReadCloser
	err   error // what rest ended with while peeking: nil while it goes on
}

var firstPeeks = sync.Pool{New: func() any { return new([firstPeek]byte) }}

// peek reads the start of a body: all of it if it is a JSON object shorter than limit, else what came first. whole says
// which. It is waited for for so long, and for one Read more, at most; anything that does not begin like a JSON object only if all
// of it is wanted.
func (p *peekedBody) peek(body io.ReadCloser, limit int, within time.Duration, all bool) (whole bool) {
	began := time.Now()
	p.rest, p.first = body, firstPeeks.Get().(*[firstPeek]byte)
	buf := p.first[:0]
	for len(buf) < limit {
		if len(buf) == cap(buf) {
			buf = append(buf, 0)[:len(buf)]
			p.head = buf
			p.giveBack()
		}
		n, err := body.Read(buf[len(buf):min(cap(buf), limit)])
		buf = buf[:len(buf)+n]
		p.head, p.err = buf, err
		if err != nil {
			return err == io.EOF && len(buf) < limit
		}
		if first, known := jsonStart(buf); !all && known && first != '{' {
			return false
		}
		if time.Since(began) > within {
			p.err = context.DeadlineExceeded
			return false
		}
	}
	return false
}

// jsonStart is the first byte of a text behind byte order marks and spaces, if it has come yet.
func jsonStart(b []byte) (first byte, known bool) {
	for len(b) > 0 {
		switch n := min(len(b), len(byteOrderMark)); {
		case b[0] == ' ' || b[0] == '\t' || b[0] == '\r' || b[0] == '\n':
			b = b[1:]
		case !bytes.HasPrefix(byteOrderMark, b[:n]):
			return b[0], true
		default:
			b = b[n:]
		}
	}
	return 0, false
}

// Read implements io.Reader. It says that the body ends with the last bytes: one more Read through Caddy's proxy costs
// more than this one.
func (p *peekedBody) Read(b []byte) (int, error) {
	if len(p.head) > 0 {
		n := copy(b, p.head)
		if p.head = p.head[n:]; len(p.head) > 0 {
			return n, nil
		}
		p.head = nil
		p.giveBack()
		return n, p.err
	}
	if p.err != nil {
		return 0, p.err
	}
	return p.rest.Read(b)
}

// giveBack lets another answer have the first buffer.
func (p *peekedBody) giveBack() {
	if p.first != nil {
		firstPeeks.Put(p.first)
		p.first = nil
	}
}

// Close implements io.Closer.
func (p *peekedBody) Close() error { return p.rest.Close() }

// errStalled is what reading an answer ends with when nothing more of it comes.
var errStalled error = stalledError{}

type stalledError struct{}

func (stalledError) Error() string { return "WeChat sent nothing more of its answer in time" }
func (stalledError) Timeout() bool { return true }

// liveBody is an answer's body that ends when nothing comes for too long, or when it breaks off, and then says so in
// the call's outcome. A deadline on the connection would not do: it would also run, from the end of one call, while
// the connection waits in the pool, and cut the next call short.
type liveBody struct {
	body   io.ReadCloser
	call   *apiCall
	caller context.Context
	limit  time.Duration
	timers *stallTimers

	// For its trailer, which is there when the body has ended.
	of    *http.Response // nil: there is none
	token secret.String  // that went with the call
	by    *Transport

	timer   *stallTimer // nil: none is needed yet, or any more
	stalled atomic.Bool
}

// Read implements io.Reader.
func (b *liveBody) Read(p []byte) (int, error) {
	if b.timer == nil {
		b.timer = b.timers.start(b)
	} else {
		b.timer.Reset(b.limit)
	}
	n, err := b.body.Read(p)
	switch inTime := b.timer.Stop(); {
	case !inTime:
		b.timer = nil // it is busy with this body for a while yet, whatever the Read has brought
	case err != nil:
		b.timers.end(b.timer)
		b.timer = nil
	}
	if err == nil || err == io.EOF && !b.stalled.Load() {
		if err != nil && b.of != nil && len(b.of.Trailer) > 0 {
			b.by.inspectTrailer(b.of.Trailer, b.call, b.token)
		}
		return n, err
	}
	b.call.outcome = outcomeUnreachable
	switch {
	case b.caller.Err() != nil:
		b.call.outcome = outcomeCanceled
	case b.stalled.Load():
		err = errStalled
	}
	return n, unquoted(err)
}

// unquoted is an error of net/http's without what it quotes of an answer: a line that is no trailer, or what h2 has for debugging. Caddy
// logs with what an answer broke off.
func unquoted(err error) error {
	if reason := safeReason(err); reason != err.Error() {
		return brokenAnswerError{reason, isTimeout(err)}
	}
	return err
}

type brokenAnswerError struct {
	reason  string
	timeout bool
}

func (e brokenAnswerError) Error() string { return "the answer broke off: " + e.reason }
func (e brokenAnswerError) Timeout() bool { return e.timeout }

// stall ends a Read that waits for too long: net/http's bodies may be closed meanwhile, which breaks the connection off.
func (b *liveBody) stall() {
	b.stalled.Store(true)
	_ = b.body.Close()
}

// Close implements io.Closer.
func (b *liveBody) Close() error { return b.body.Close() }

// stallTimer ends a Read that waits for too long.
type stallTimer struct {
	*time.Timer

	body *liveBody
}

// stallTimers are timers that never fired, for further bodies.
type stallTimers struct{ idle sync.Pool }

func (t *stallTimers) start(b *liveBody) *stallTimer {
	if s, ok := t.idle.Get().(*stallTimer); ok {
		s.body = b
		s.Reset(b.limit)
		return s
	}
	s := &stallTimer{body: b}
	s.Timer = time.AfterFunc(b.limit, func() { s.body.stall() })
	return s
}

// end takes back a timer that was stopped before it fired.
func (t *stallTimers) end(s *stallTimer) {
	s.body = nil
	t.idle.Put(s)
}
