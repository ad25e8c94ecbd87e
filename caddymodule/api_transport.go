package caddymodule

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// Transport is the way of a call that wechat_api has admitted to WeChat's API. It is Caddy's HTTP transport with three
// additions: it puts the access token in where no log sees it; it looks at the headers and trailers of an answer, at the first 4 KiB of
// small JSON answers, at all of an error page, which may repeat the token, and at any other text as it goes by, which breaks off before it
// repeats it; and when WeChat refused the token it has the token renewed, once for all calls that wait for it, and repeats the call once.
// Interim answers (1xx) are not passed on, and gzip, which is never asked for, is taken off.
//
// wechat_api sets it up by itself, and no config has it: in any other reverse_proxy it is refused. It sends nothing that wechat_api has not
// admitted, and nothing to any host but the API origins of the wechat app.
type Transport struct {
	*reverseproxy.HTTPTransport

	app     *App
	origins map[string]*url.URL // by dial address
	hosts   map[*url.URL]*hostHealth
	logger  *zap.Logger
	stall   time.Duration // stall_timeout of wechat_api
	answer  time.Duration // its response_header_timeout
	stalls  stallTimers
	lost    damper

	refusing *tokens.Window[refusingPath, refusedToken]
	twice    damper
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
	api, ok := ctx.Value(apiProxyKey{}).(*API)
	if !ok {
		return errTransport
	}
	t.app = app
	t.stall, t.answer = time.Duration(api.StallTimeout), time.Duration(api.ResponseHeaderTimeout)
	t.refusing = newRefusingPaths()
	t.origins, t.hosts = make(map[string]*url.URL), make(map[*url.URL]*hostHealth)
	for _, origin := range app.apiOrigins() {
		t.origins[dialAddress(origin)] = origin
		t.hosts[origin] = app.health().hosts.at(origin.Host)
	}
	if err := t.HTTPTransport.Provision(ctx); err != nil {
		return err
	}
	rt := t.HTTPTransport.Transport
	rt.Proxy = directInTheClear(rt.Proxy)
	dial := rt.DialContext
	rt.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		if call, ok := ctx.Value(apiCallKey{}).(*apiCall); ok {
			if err := call.mayDial(ctx, t.answer); err != nil {
				return nil, err
			}
		}
		conn, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return newTakenConn(conn, t.stall), nil
	}
	return nil
}

var errTransport = errors.New("the transport wechat serves wechat_api alone: use the handler wechat_api in place of this reverse_proxy")

// apiProxyKey is what has the wechat_api in the context in which that provisions its own reverse_proxy.
type apiProxyKey struct{}

// errTurnedAway is what a call ends with that no connection takes.
var errTurnedAway = errors.New("WeChat closed each connection before it took the call")

// mayDial holds up the dials of a call that net/http takes from one connection to the next, without a pause or an end, because each says
// over h2 that it is going away and has not taken the call. Calls in parallel that find connections full dial several times too, so
// the first dials are free, the others come ever more slowly, and within is how long after the first one the last may come.
func (c *apiCall) mayDial(ctx context.Context, within time.Duration) error {
	n, now := c.dials.Add(1), time.Now()
	if n == 1 {
		c.dialled.Store(now.UnixNano())
	}
	if n <= freeDials {
		return nil
	}
	if now.UnixNano()-c.dialled.Load() > int64(within) {
		return errTurnedAway
	}
	pause := time.NewTimer(min(firstDialPause<<min(n-freeDials-1, 10), lastDialPause))
	defer pause.Stop()
	select {
	case <-pause.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
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
	// unshown: no log shows the header that the proxy has of the call.
	unshown bool

	outcome string     // for the metric
	span    trace.Span // of the caller's request; nil: it is not traced

	watched   bool        // connected is known
	connected atomic.Bool // it got a connection, to the origin that it goes to now

	dials   atomic.Int32 // that net/http has begun for this attempt
	dialled atomic.Int64 // when the first of them was, in Unix nanoseconds

	// Where the proxy is told that the call goes, and where it first goes: here, because each call needs them.
	shown, first url.URL

	// For the feed: WeChat's status, errcode and request id, or why there is no answer of WeChat's.
	status  int
	errcode int64
	rid     string
	reason  string
}

// repeatable reports whether the call may be sent a second time, whole.
func (c *apiCall) repeatable() bool {
	return !c.singleUse && (c.body == nil || c.body.repeatable())
}

// sealed reports whether a secret of the gateway's goes with the call.
func (c *apiCall) sealed() bool {
	return !c.token.Value.IsZero() || slices.ContainsFunc(c.extra, func(p queryParam) bool { return p.name == paramSecret })
}

// MarshalLogObject names the call in a log, without anything that is secret.
func (c *apiCall) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	enc.AddString("client", c.client)
	enc.AddString("appid", c.appid)
	enc.AddString("api", c.path)
	return nil
}

type apiCallKey struct{}

// callContext is the context of an admitted call on its way through Caddy's proxy.
type callContext struct {
	context.Context // the request's

	call   *apiCall
	atHand caddyValues
}

func newCallContext(of context.Context, call *apiCall) callContext {
	return callContext{of, call, caddyValuesOf(of)}
}

// Value implements context.Context.
func (c *callContext) Value(key any) any {
	if key == (apiCallKey{}) {
		return c.call
	}
	if value, ok := c.atHand.value(key); ok {
		return value
	}
	return c.Context.Value(key)
}

// Outcomes of a call, as in metrics.
const (
	outcomeOK          = "ok"
	outcomeError       = "error"       // WeChat answered with an errcode or a status other than 200
	outcomeRefused     = "refused"     // by the gateway
	outcomeUnavailable = "unavailable" // there is no token
	outcomeUnreachable = "unreachable"
	outcomeCanceled    = "canceled" // the caller left
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
	trace := httptrace.ContextClientTrace(req.Context())
	dropInterim(trace)
	if len(t.origins) > 1 { // else nobody asks
		call.watch(trace)
	}
	if call.unshown {
		req.Header = nil // the proxy would encode it for its log after the exchange; req is its own, made for this exchange
	}
	call.outcome = outcomeOK
	res, refused, err := t.attempt(req, call, origin, call.token.Value)
	if err != nil {
		return t.failed(req, call, err)
	}
	if !refused {
		t.accepted(req, call)
		return res, nil
	}
	return t.heal(req, call, origin, res)
}

// dropInterim keeps interim answers (1xx) from the caller. WeChat has none, and Caddy's proxy would pass their headers on unread, and over
// h2 a 101 as the answer itself. Nobody else has the trace that is changed: the proxy makes one for each exchange.
func dropInterim(trace *httptrace.ClientTrace) {
	if trace != nil {
		trace.Got1xxResponse = nil
	}
}

// watch has the call notice when it gets a connection. The trace is dropInterim's.
func (c *apiCall) watch(trace *httptrace.ClientTrace) {
	c.watched = trace != nil
	c.connected.Store(false)
	if !c.watched {
		return
	}
	then := trace.GotConn
	trace.GotConn = func(info httptrace.GotConnInfo) {
		c.connected.Store(true)
		if then != nil {
			then(info)
		}
	}
}

// asDialing is the error of an exchange, as one of dialing if the call had no connection: an egress proxy may not reach the origin, or a
// handshake fail. Then nothing of the call was sent, and it may go to another origin, as the gateway's own calls do.
func (c *apiCall) asDialing(err error) error {
	if err == nil || !c.watched || c.connected.Load() {
		return err
	}
	if _, dialing := errors.AsType[reverseproxy.DialError](err); dialing {
		return err
	}
	return reverseproxy.NewDialError(err)
}

// attempt sends the call once. refused says that WeChat took the token for invalid; the answer is complete then.
func (t *Transport) attempt(req *http.Request, call *apiCall, origin *url.URL, token secret.String) (res *http.Response, refused bool, err error) {
	traced, end := traceCall(req.Context(), call, req.Method)
	defer func() { end(res) }()
	call.status, call.errcode, call.rid, call.reason = 0, 0, "", ""
	call.dials.Store(0)
	var up *upload
	if call.body != nil {
		up, traced = newUpload(traced, t.stall, t.answer)
	}
	res, err = t.HTTPTransport.RoundTrip(call.request(traced, req.Method, origin, token, up))
	if up != nil && up.end() {
		if err == nil {
			_ = res.Body.Close()
		}
		res, err = nil, errNotTaken
	}
	why := err // which an error of dialing would not say
	err = call.asDialing(err)
	if _, dialing := errors.AsType[reverseproxy.DialError](err); !dialing {
		t.countToday(call) // without an answer too: WeChat may have counted it
	}
	if err != nil {
		if req.Context().Err() == nil && (call.body == nil || !call.body.failed()) { // else it was the caller
			t.hosts[origin].failed(why)
		}
		return nil, false, err
	}
	t.hosts[origin].ok()
	call.status = res.StatusCode
	body := &answerBody{live: liveBody{
		body: res.Body, call: call, caller: req.Context(), limit: t.stall, timers: &t.stalls, of: res, token: token, by: t,
	}}
	res.Body = &body.live
	if res.StatusCode != http.StatusOK {
		call.outcome = outcomeError
	} else {
		t.app.health().sawAnswer(res.Header, t.logger)
	}
	return t.inspect(req, call, res, body, token)
}

// request builds what goes to WeChat. Up is the sending of the call's body, if it has one.
func (c *apiCall) request(ctx context.Context, method string, origin *url.URL, token secret.String, up *upload) *http.Request {
	params := c.extra
	if !token.IsZero() {
		params = append([]queryParam{{c.param, token}}, c.extra...)
	}
	target := &c.first
	if target.Host != "" { // net/http may still look at it
		target = new(url.URL)
	}
	*target = url.URL{Scheme: origin.Scheme, Host: origin.Host, Path: c.path, RawQuery: c.query.with(params)}
	out := (&http.Request{
		Method: method,
		URL:    target,
		Host:   origin.Host,
		Proto:  "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: c.header,
	}).WithContext(ctx)
	switch {
	case c.body != nil:
		out.Body, out.ContentLength = up.body(c.body.open()), c.size
		if method != http.MethodGet && method != http.MethodHead && c.size >= 0 && c.body.repeatable() {
			// With it net/http takes another connection when the one from its pool had died before a single byte
			// was written to it. What is not a GET it sends again only if WeChat says over h2 that it has not taken it.
			out.GetBody = func() (io.ReadCloser, error) { return up.again(c.body.open()) }
		}
	case c.singleUse && (method == http.MethodGet || method == http.MethodHead):
		// net/http sends a GET again by itself if a pooled connection dies, unless it has a body that cannot be had
		// again. This one is empty, and net/http finds out before it writes. With other methods it would leave in
		// chunks, and net/http repeats them only if not a byte was written.
		out.Body = io.NopCloser(strings.NewReader(""))
	}
	return out
}

// failed turns an error of the exchange into an answer, unless the request never left: then Caddy may go on to the
// next origin. So a call that may have reached WeChat is never repeated, whatever its method.
func (t *Transport) failed(req *http.Request, call *apiCall, err error) (*http.Response, error) {
	if cause := req.Context().Err(); cause != nil {
		call.outcome = outcomeCanceled
		return nil, cause // the caller has left
	}
	call.outcome = outcomeUnreachable
	if call.body != nil && call.body.failed() {
		call.reason = "the request's body broke off"
		return ownAnswer(req, refuse(http.StatusBadRequest, http.StatusBadRequest, "body", "the request's body broke off")), nil
	}
	if _, dialing := errors.AsType[reverseproxy.DialError](err); dialing {
		return nil, err
	}
	if ok, missed := t.lost.allow(); ok {
		t.logger.Warn("exchange with WeChat failed; it is not repeated", zap.Inline(call),
			zap.String("reason", safeReason(err)), zap.Int("not_logged", missed))
	}
	refused := unreachable(err, "WeChat was called but did not answer")
	call.reason = refused.msg
	return ownAnswer(req, refused), nil
}

// safeReason is the text of an error of net/http's, unless it may quote an answer or a URL. Not each Go of 1.26 puts what it quotes of a
// header or a trailer between quotation marks.
func safeReason(err error) string {
	_, quotes := errors.AsType[textproto.ProtocolError](err)
	if text := err.Error(); !quotes && len(text) <= 200 && !strings.ContainsAny(text, `?&="`) {
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
