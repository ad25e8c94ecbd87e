package caddymodule

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// inspect looks at the start of an answer. Whatever the call, it must be an answer; one to a call with a secret of the
// gateway's must not repeat the secret, and its errcode counts.
func (t *Transport) inspect(req *http.Request, call *apiCall, res *http.Response, answer *answerBody, token secret.String) (*http.Response, bool, error) {
	if res.StatusCode != http.StatusOK && echoes(res.Header, call, token) {
		_ = res.Body.Close()
		return ownAnswer(req, t.notAPI(call, "it answered HTTP "+strconv.Itoa(res.StatusCode)+" with the request's credential in it")), false, nil
	}
	html := res.StatusCode == http.StatusOK && isHTML(res.Header)
	if req.Method == http.MethodHead || res.StatusCode == http.StatusOK && res.ContentLength >= peekSize && !html {
		return res, false, nil
	}
	body := &answer.peeked
	whole := body.peek(&answer.live, answer.first[:0])
	head := body.head
	res.Body = body
	isJSON := bytes.HasPrefix(bytes.TrimLeft(head, " \t\r\n"), []byte("{"))
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
	case (res.StatusCode != http.StatusOK || isJSON) && contains(head, call, token):
		_ = res.Body.Close()
		return ownAnswer(req, t.notAPI(call, "its answer has the request's credential in it")), false, nil
	case res.StatusCode != http.StatusOK || !isJSON || !whole || !call.sealed():
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
	if code == codeNotAuthorized && call.key.Kind == tokens.KindAuthorizer {
		t.app.manager().Suspect(call.key)
	}
	return res, tokens.IsTokenRefused(code) && call.key.Kind != "", nil
}

// halfAnswer refuses an answer that began and did not end.
func (t *Transport) halfAnswer(call *apiCall, err error) *apiRefusal {
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

// isHTML reports whether an answer says it is a web page.
func isHTML(h http.Header) bool {
	const html = "text/html"
	types := h["Content-Type"]
	return len(types) > 0 && len(types[0]) >= len(html) && strings.EqualFold(types[0][:len(html)], html)
}

// echoes reports whether a header repeats a credential of the request, as redirects do.
func echoes(h http.Header, call *apiCall, token secret.String) bool {
	for _, values := range h {
		for _, v := range values {
			if contains([]byte(v), call, token) {
				return true
			}
		}
	}
	return false
}

// contains reports whether a text repeats a credential of the request.
func contains(text []byte, call *apiCall, token secret.String) bool {
	if hasSecret(text, token) {
		return true
	}
	for _, p := range call.extra {
		if p.name == paramSecret && hasSecret(text, p.value) {
			return true
		}
	}
	return false
}

// hasSecret reports whether a secret is in a text, without a copy of it.
func hasSecret(text []byte, s secret.String) bool {
	value := s.Reveal()
	if value == "" {
		return false
	}
	for len(text) >= len(value) {
		at := bytes.IndexByte(text[:len(text)-len(value)+1], value[0])
		if at < 0 {
			return false
		}
		if string(text[at:at+len(value)]) == value {
			return true
		}
		text = text[at+1:]
	}
	return false
}

// peekSize is up to how many bytes an answer is looked at before it is passed on: WeChat's errors are shorter.
const peekSize = 4 << 10

// firstPeek is the size of the buffer for that to begin with: most answers are shorter.
const firstPeek = 512

// answerBody is all that stands between an answer's body and Caddy, in one piece, because each call needs it.
type answerBody struct {
	live   liveBody
	peeked peekedBody // over live, once peek has been called
	first  [firstPeek]byte
}

// peekedBody is an answer's body of which the first bytes have been looked at.
type peekedBody struct {
	head []byte // not yet passed on
	rest io.ReadCloser
	err  error // what rest ended with while peeking: nil while it goes on
}

// peek reads the start of a body into buf, which it lets grow: all of it if it is a JSON object shorter than peekSize,
// else what came first. whole says which. Anything that does not begin like a JSON object is not waited for.
func (p *peekedBody) peek(body io.ReadCloser, buf []byte) (whole bool) {
	p.rest = body
	for len(buf) < peekSize {
		if len(buf) == cap(buf) {
			buf = append(buf, 0)[:len(buf)]
		}
		n, err := body.Read(buf[len(buf):min(cap(buf), peekSize)])
		buf = buf[:len(buf)+n]
		p.head, p.err = buf, err
		if err != nil {
			return err == io.EOF && len(buf) < peekSize
		}
		if first := bytes.TrimLeft(buf, " \t\r\n"); len(first) > 0 && first[0] != '{' {
			return false
		}
	}
	return false
}

// Read implements io.Reader. It says that the body ends with the last bytes: one more Read through Caddy's proxy costs
// more than this one.
func (p *peekedBody) Read(b []byte) (int, error) {
	if len(p.head) > 0 {
		n := copy(b, p.head)
		if p.head = p.head[n:]; len(p.head) == 0 {
			return n, p.err
		}
		return n, nil
	}
	if p.err != nil {
		return 0, p.err
	}
	return p.rest.Read(b)
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

	timer   *time.Timer
	stalled atomic.Bool
}

// Read implements io.Reader.
func (b *liveBody) Read(p []byte) (int, error) {
	if b.timer == nil {
		b.timer = time.AfterFunc(b.limit, b.stall)
	} else {
		b.timer.Reset(b.limit)
	}
	n, err := b.body.Read(p)
	b.timer.Stop()
	if err == nil || err == io.EOF && !b.stalled.Load() {
		return n, err
	}
	b.call.outcome = outcomeUnreachable
	switch {
	case b.caller.Err() != nil:
		b.call.outcome = outcomeCanceled
	case b.stalled.Load():
		err = errStalled
	}
	return n, err
}

// stall ends a Read that waits for too long: net/http's bodies may be closed meanwhile, which breaks the connection off.
func (b *liveBody) stall() {
	b.stalled.Store(true)
	_ = b.body.Close()
}

// Close implements io.Closer.
func (b *liveBody) Close() error {
	if b.timer != nil {
		b.timer.Stop()
	}
	return b.body.Close()
}
