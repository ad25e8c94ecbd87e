package caddymodule

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// Transport is the way of a call that wechat_api has admitted to WeChat's API. It is Caddy's HTTP transport with three
// additions: it puts the access token in where no log sees it, it looks at the first 4 KiB of small JSON answers, and
// when WeChat refused the token it has the token renewed, once for all calls that wait for it, and repeats the call
// once.
//
// wechat_api sets it up by itself. Used in any other reverse_proxy it refuses every request: it sends nothing that
// wechat_api has not admitted, and nothing to any host but the API origins of the wechat app.
type Transport struct {
	*reverseproxy.HTTPTransport

	app     *App
	origins map[string]*url.URL // by dial address
	logger  *zap.Logger
	lost    damper
}

// CaddyModule returns the Caddy module information.
func (*Transport) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.reverse_proxy.transport.wechat",
		New: func() caddy.Module { return &Transport{HTTPTransport: new(reverseproxy.HTTPTransport)} },
	}
}

// Provision sets up the transport.
func (t *Transport) Provision(ctx caddy.Context) error {
	t.logger = ctx.Logger()
	app, err := loadApp(ctx)
	if err != nil {
		return err
	}
	t.app = app
	t.origins = make(map[string]*url.URL)
	for _, origin := range app.apiOrigins() {
		t.origins[dialAddress(origin)] = origin
	}
	return t.HTTPTransport.Provision(ctx)
}

// RequestHeaderOps implements reverseproxy.RequestHeaderOpsTransport: there are none, RoundTrip sets the Host itself.
func (*Transport) RequestHeaderOps() *headers.HeaderOps { return nil }

// Cleanup closes idle connections.
func (t *Transport) Cleanup() error { return t.HTTPTransport.Cleanup() }

// dialAddress is host:port of an origin.
func dialAddress(origin *url.URL) string {
	if origin.Port() != "" {
		return origin.Host
	}
	if origin.Scheme == "http" {
		return origin.Host + ":80"
	}
	return origin.Host + ":443"
}

// apiCall is an admitted call: all that Transport needs to know, and the only thing it believes. It belongs to one
// request and its goroutine.
type apiCall struct {
	key    tokens.Key   // whose token goes in; the zero key: none
	token  tokens.Token // of key
	param  string       // query parameter for the token
	extra  []queryParam // further parameters of the gateway's
	path   string
	query  apiQuery
	header http.Header
	body   *keptBody // nil: none
	size   int64     // of body; -1: unknown
	// singleUse calls are never repeated, by nobody.
	singleUse bool
	// sdk: the caller holds an opaque token, and gets no answer that would make an SDK ask for another in vain.
	sdk    bool
	client string
	appid  string

	outcome string // for the metric
}

// MarshalLogObject names the call in a log, without anything that is secret.
func (c *apiCall) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	enc.AddString("client", c.client)
	enc.AddString("appid", c.appid)
	enc.AddString("api", c.path)
	return nil
}

type apiCallKey struct{}

// Outcomes of a call, as in metrics.
const (
	outcomeOK          = "ok"
	outcomeError       = "error"       // WeChat answered with an errcode or a status other than 200
	outcomeRefused     = "refused"     // by the gateway
	outcomeUnavailable = "unavailable" // there is no token
	outcomeUnreachable = "unreachable"
)

// RoundTrip implements http.RoundTripper. Its error is always one of dialing, upon which Caddy may try another origin:
// nothing of the request was sent. Whatever happens later becomes an answer.
func (t *Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Body != nil {
		_ = req.Body.Close() // the body that counts is the call's
	}
	call, admitted := req.Context().Value(apiCallKey{}).(*apiCall)
	origin := t.origins[req.URL.Host]
	if !admitted || origin == nil {
		return ownAnswer(req, refuse(http.StatusInternalServerError, http.StatusInternalServerError, "transport",
			"the transport wechat serves wechat_api alone: use the directive wechat_api in place of this reverse_proxy")), nil
	}
	call.outcome = outcomeOK
	res, refused, err := t.attempt(req, call, origin, call.token.Value)
	if err != nil {
		return t.failed(req, call, err)
	}
	if !refused {
		return res, nil
	}
	return t.heal(req, call, origin, res)
}

// heal is called with an answer that refused the token. It returns the answer of the one repetition, or else an answer
// that says why there was none.
func (t *Transport) heal(req *http.Request, call *apiCall, origin *url.URL, first *http.Response) (*http.Response, error) {
	token, err := t.app.manager().Renew(req.Context(), call.key, call.token.Value)
	switch {
	case err != nil && call.sdk:
		_ = first.Body.Close()
		call.outcome = outcomeUnavailable
		return ownAnswer(req, tokenRefusal(err, call.appid, true)), nil
	case err != nil, call.singleUse, call.body != nil && !call.body.repeatable():
		return first, nil // the next call has the new token
	}
	_ = first.Body.Close()
	t.app.metrics().apiRetries.WithLabelValues(string(call.key.Kind)).Inc()
	call.outcome = outcomeOK
	res, refused, err := t.attempt(req, call, origin, token.Value)
	switch {
	case err != nil:
		return t.failed(req, call, notDialing{err})
	case refused:
		t.logger.Error("WeChat refused a token that was just renewed: does another program renew it too?",
			zap.Inline(call), zap.String("kind", string(call.key.Kind)))
		if call.sdk {
			_ = res.Body.Close()
			res = ownAnswer(req, refuse(http.StatusOK, codeUnauthorizedAPI, "token",
				"WeChat refused the token of %s twice, also after it was renewed: does another program renew it too?", call.appid))
		}
	}
	return res, nil
}

// notDialing hides that an error is one of dialing: part of the body may be gone, so Caddy must not try again.
type notDialing struct{ cause error }

func (e notDialing) Error() string { return e.cause.Error() }
func (e notDialing) Timeout() bool { return isTimeout(e.cause) }

// attempt sends the call once. refused says that WeChat took the token for invalid; the answer is complete then.
func (t *Transport) attempt(req *http.Request, call *apiCall, origin *url.URL, token secret.String) (res *http.Response, refused bool, err error) {
	out := call.request(req.Context(), req.Method, origin, token)
	res, err = t.HTTPTransport.RoundTrip(out)
	if err != nil {
		return nil, false, err
	}
	if res.StatusCode != http.StatusOK {
		call.outcome = outcomeError
	}
	if token.IsZero() && len(call.extra) == 0 {
		return res, false, nil
	}
	return t.inspect(req, call, res, token)
}

// request builds what goes to WeChat.
func (c *apiCall) request(ctx context.Context, method string, origin *url.URL, token secret.String) *http.Request {
	params := c.extra
	if !token.IsZero() {
		params = append([]queryParam{{c.param, token}}, c.extra...)
	}
	out := (&http.Request{
		Method: method,
		URL:    &url.URL{Scheme: origin.Scheme, Host: origin.Host, Path: c.path, RawQuery: c.query.with(params)},
		Host:   origin.Host,
		Proto:  "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: c.header,
	}).WithContext(ctx)
	switch {
	case c.body != nil:
		out.Body, out.ContentLength = c.body.open(), c.size
		if method != http.MethodGet && method != http.MethodHead && c.size >= 0 && c.body.repeatable() {
			// With it net/http takes another connection when the one from its pool had died before a single byte
			// was written to it. It sends nothing twice that is not a GET.
			out.GetBody = func() (io.ReadCloser, error) { return c.body.open(), nil }
		}
	case c.singleUse:
		// net/http sends a GET again by itself if a pooled connection dies, unless it has a body that cannot be had
		// again. This one is empty, and net/http finds out before it writes.
		out.Body = io.NopCloser(strings.NewReader(""))
	}
	return out
}

// inspect looks at the start of an answer to a call with a secret in it.
func (t *Transport) inspect(req *http.Request, call *apiCall, res *http.Response, token secret.String) (*http.Response, bool, error) {
	if res.StatusCode != http.StatusOK && echoes(res.Header, call, token) {
		_ = res.Body.Close()
		return ownAnswer(req, t.notAPI(call, "it answered HTTP "+strconv.Itoa(res.StatusCode)+" with the request's credential in it")), false, nil
	}
	if req.Method == http.MethodHead || res.StatusCode == http.StatusOK && res.ContentLength >= peekSize && !isHTML(res.Header) {
		return res, false, nil
	}
	body, whole := peek(res.Body)
	head := body.head
	res.Body = body
	isJSON := bytes.HasPrefix(bytes.TrimLeft(head, " \t\r\n"), []byte("{"))
	switch {
	case res.StatusCode == http.StatusOK && isHTML(res.Header) && !isJSON:
		_ = res.Body.Close()
		return ownAnswer(req, t.notAPI(call, "it answered with a web page: is there a proxy or a login page on the way?")), false, nil
	case isJSON && !whole && body.err != nil:
		_ = res.Body.Close()
		if err := req.Context().Err(); err != nil {
			return nil, false, err
		}
		return ownAnswer(req, t.notAPI(call, "its answer broke off")), false, nil
	case (res.StatusCode != http.StatusOK || isJSON) && contains(head, call, token):
		_ = res.Body.Close()
		return ownAnswer(req, t.notAPI(call, "its answer has the request's credential in it")), false, nil
	case res.StatusCode != http.StatusOK || !isJSON || !whole:
		return res, false, nil
	}
	code, found := scanErrcode(head)
	if !found || code == 0 {
		return res, false, nil
	}
	call.outcome = outcomeError
	t.app.metrics().apiErrors.WithLabelValues(errcodeLabel(code)).Inc()
	return res, tokens.IsTokenRefused(code) && call.key.Kind != "", nil
}

// notAPI refuses an answer that cannot be WeChat's API speaking.
func (t *Transport) notAPI(call *apiCall, what string) *apiRefusal {
	call.outcome = outcomeUnreachable
	if ok, missed := t.lost.allow(); ok {
		t.logger.Warn("answer from WeChat's host is not its API's", zap.String("reason", what), zap.Inline(call), zap.Int("not_logged", missed))
	}
	return refuse(http.StatusBadGateway, http.StatusBadGateway, "answer", "WeChat's host gave no usable answer: %s", what)
}

// isHTML reports whether an answer says it is a web page.
func isHTML(h http.Header) bool {
	return strings.HasPrefix(strings.ToLower(h.Get("Content-Type")), "text/html")
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
	if !token.IsZero() && bytes.Contains(text, []byte(token.Reveal())) {
		return true
	}
	for _, p := range call.extra {
		if p.name == paramSecret && bytes.Contains(text, []byte(p.value.Reveal())) {
			return true
		}
	}
	return false
}

// failed turns an error of the exchange into an answer, unless the request never left: then Caddy may go on to the
// next origin. So a call that may have reached WeChat is never repeated, whatever its method.
func (t *Transport) failed(req *http.Request, call *apiCall, err error) (*http.Response, error) {
	if cause := req.Context().Err(); cause != nil {
		return nil, cause // the caller has left
	}
	call.outcome = outcomeUnreachable
	if call.body != nil && call.body.failed() {
		return ownAnswer(req, refuse(http.StatusBadRequest, http.StatusBadRequest, "body", "the request's body broke off")), nil
	}
	if _, dialing := errors.AsType[reverseproxy.DialError](err); dialing {
		return nil, err
	}
	if ok, missed := t.lost.allow(); ok {
		t.logger.Warn("exchange with WeChat failed; it is not repeated", zap.Inline(call),
			zap.String("reason", safeReason(err)), zap.Int("not_logged", missed))
	}
	return ownAnswer(req, unreachable(err, "WeChat was called but did not answer")), nil
}

// safeReason is the text of an error of net/http's, unless it may quote an answer or a URL.
func safeReason(err error) string {
	if text := err.Error(); len(text) <= 200 && !strings.ContainsAny(text, `?&="`) {
		return text
	}
	return fmt.Sprintf("%T", err)
}

// ownAnswer is an answer of the gateway's own in the place of WeChat's.
func ownAnswer(req *http.Request, r *apiRefusal) *http.Response {
	body := errorBody(r.code, r.msg)
	return &http.Response{
		Status: strconv.Itoa(r.status) + " " + http.StatusText(r.status), StatusCode: r.status,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{
			"Content-Type":   {"application/json"},
			"Content-Length": {strconv.Itoa(len(body))},
			"Cache-Control":  {"no-store"},
		},
		Body:          io.NopCloser(bytes.NewReader(body)),
		ContentLength: int64(len(body)),
		Request:       req,
	}
}

var (
	_ caddy.Provisioner                      = (*Transport)(nil)
	_ caddy.CleanerUpper                     = (*Transport)(nil)
	_ http.RoundTripper                      = (*Transport)(nil)
	_ reverseproxy.TLSTransport              = (*Transport)(nil)
	_ reverseproxy.RequestHeaderOpsTransport = (*Transport)(nil)
	_ zapcore.ObjectMarshaler                = (*apiCall)(nil)
)
