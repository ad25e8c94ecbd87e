package caddymodule

import (
	"net/http"
	"strings"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// forward hands an admitted call to the reverse proxy. What the proxy sees, and may log, is free of secrets: the
// transport has the rest.
func (a *API) forward(w http.ResponseWriter, req *apiRequest, call *apiCall) error {
	call.path, call.client, call.appid, call.sdk = req.path, req.clientName(), req.appid, req.form.sdk()
	call.header, call.span = outboundHeader(req.Header), req.span
	call.size = req.ContentLength
	if req.ContentLength != 0 && req.Body != nil && req.Body != http.NoBody {
		if refused := a.takeBody(req, call); refused != nil {
			return a.refuse(w, req, refused)
		}
	}
	a.announce(req)

	req.passing = newCallContext(req.Context(), call)
	r := req.WithContext(&req.passing)
	call.shown.Path = call.path
	r.URL, r.RequestURI, r.Header = &call.shown, call.path, call.header
	if call.unshown = !a.proxyLog.Core().Enabled(zapcore.DebugLevel); call.unshown {
		r.Header = unshownHeader
	}
	r.Body, r.ContentLength, r.TransferEncoding, r.Trailer = nil, 0, nil, nil
	err, panicked := error(nil), true
	defer func() { // Caddy's proxy panics to cut off an answer that has begun
		call.enter(&req.entry)
		switch {
		case panicked && call.outcome != outcomeUnreachable:
			a.count(req, outcomeCanceled) // it was the caller to whom nothing more could be written
		case err == nil:
			a.count(req, call.outcome)
		}
	}()
	err = a.proxy.ServeHTTP(w, r, nil)
	panicked = false
	if err != nil {
		return a.refuse(w, req, a.undialled(call, err))
	}
	return nil
}

// takeBody has a call bring its body, and finds out how long it is. Who brings a user's token alone has proved nothing: the body, for which
// those paths have no use, has to come as that of a request for a token does.
func (a *API) takeBody(req *apiRequest, call *apiCall) *apiRefusal {
	proved, limit, within := req.client != nil, a.RepeatBuffer, time.Duration(0)
	if !proved {
		limit, within = maxGrantBody, setBodyDeadline(req.w, req.Request, req.bodyWait)
	}
	call.body = newKeptBody(req.Body, req.ContentLength, limit)
	if proved && call.size >= 0 {
		return nil
	}
	call.size = call.body.measure()
	switch err := call.body.broke(); { // known before WeChat gets the beginning
	case !proved && isTimeout(err):
		return refuse(http.StatusRequestTimeout, http.StatusRequestTimeout, "body", "the request's body did not come within %v", within)
	case err != nil:
		return refuse(http.StatusBadRequest, http.StatusBadRequest, "body", "the request's body broke off")
	case !proved && call.size < 0:
		return refuse(http.StatusRequestEntityTooLarge, http.StatusRequestEntityTooLarge, "body",
			"the request's body is larger than %d bytes: %s takes none", limit, req.path)
	case call.size == 0:
		call.body = nil
	}
	if !proved {
		endBodyDeadline(req.w, req.Request)
	}
	return nil
}

// undialled explains that no origin could be reached.
func (a *API) undialled(call *apiCall, err error) *apiRefusal {
	if ok, missed := a.notReady.allow(); ok {
		a.logger.Warn("WeChat's API cannot be reached", zap.Inline(call), zap.String("reason", safeReason(err)), zap.Int("not_logged", missed))
	}
	return unreachable(err, "WeChat's API could not be reached")
}

// noUserAgent keeps net/http from adding its own.
var noUserAgent = []string{""}

// outboundHeader is what goes to WeChat of a caller's header: not its credentials, nor what tells of the machines on
// the way, nor anything by which a program in between would treat the call in another way.
func outboundHeader(in http.Header) http.Header {
	out := make(http.Header, len(in))
	connection := in["Connection"]
	for name, values := range in {
		if staysHere(name) || len(connection) > 0 && nominated(connection, name) {
			continue
		}
		out[name] = values
	}
	if out["User-Agent"] == nil {
		out["User-Agent"] = noUserAgent
	}
	return out
}

// unshownHeader is what the proxy gets in the place of a call's header unless a log takes debug lines, which show it. It copies what it gets and
// adds where the call came from, for the log alone, since the transport has the header; a name without a value says that
// it shall not. One for all calls: the proxy changes its copy.
var unshownHeader = http.Header{"User-Agent": noUserAgent, "X-Forwarded-For": nil, "X-Forwarded-Proto": nil, "X-Forwarded-Host": nil}

// staysHere reports whether a header, by canonical name, is not for WeChat.
func staysHere(name string) bool {
	switch name {
	case "Authorization", "Cookie", "Cookie2", "Idempotency-Key", "X-Idempotency-Key", // an idempotency key makes net/http send a POST twice
		"Forwarded", "True-Client-Ip", "X-Cluster-Client-Ip", "X-Remote-Ip", "X-Remote-Addr", "Client-Ip", "X-Host", "X-Scheme", "X-Url-Scheme",
		"Via", "Origin", "Referer", "Early-Data", "Front-End-Https", "X-Method-Override", "X-Http-Method",
		"Traceparent", "Tracestate", "Baggage", "B3", "Uber-Trace-Id", "Sentry-Trace", "X-Cloud-Trace-Context",
		"Accept-Encoding", "Expect", "Content-Length", "Host",
		"Connection", "Keep-Alive", "Upgrade", "Te", "Trailer", "Transfer-Encoding", "Alt-Svc", "Incremental":
		return true
	}
	if name == "" {
		return false
	}
	for _, prefix := range stayPrefixes {
		if prefix[0] == name[0] && strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

// stayPrefixes begin the headers with which proxies and CDNs tell each other where a request came from and what it was
// before they changed it, the gateway's own, and those of tracing, which Caddy's handler of that name adds: WeChat is no part
// of anybody's trace.
var stayPrefixes = []string{
	"X-Wechat-", "X-Forward", "X-Origin", "X-Rewrite-", "X-Real-", "X-Client-", "X-Proxy", "X-Http-Method-",
	"X-Envoy-", "X-Amz", "X-Azure-", "X-Appengine-", "Cf-", "Cdn-", "Fastly-", "Fly-", "Akamai-", "X-Akamai-",
	"Proxy-", "Sec-", ":",
	"X-B3-", "Uberctx-", "Ot-Tracer-", "Ot-Baggage-", "X-Ot-", "X-Datadog-",
}

// nominated reports whether a Connection header names a header as being for this hop only.
func nominated(connection []string, name string) bool {
	for _, line := range connection {
		for field := range strings.SplitSeq(line, ",") {
			if strings.EqualFold(strings.TrimSpace(field), name) {
				return true
			}
		}
	}
	return false
}
