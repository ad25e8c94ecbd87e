package caddymodule

import (
	"context"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"go.uber.org/zap"
)

// forward hands an admitted call to the reverse proxy. What the proxy sees, and may log, is free of secrets: the
// transport has the rest.
func (a *API) forward(w http.ResponseWriter, req *apiRequest, call *apiCall) error {
	call.path, call.client, call.appid, call.sdk = req.path, req.clientName(), req.appid, req.form.sdk()
	call.header = outboundHeader(req.Header)
	call.size = req.ContentLength
	if req.ContentLength != 0 && req.Body != nil && req.Body != http.NoBody {
		call.body = newKeptBody(req.Body, req.ContentLength, a.RepeatBuffer)
		if call.size < 0 {
			call.size = call.body.measure()
			switch {
			case call.size == 0:
				call.body = nil
			case call.body.failed(): // known before WeChat gets the beginning
				return a.refuse(w, req, refuse(http.StatusBadRequest, http.StatusBadRequest, "body", "the request's body broke off"))
			}
		}
	}
	a.announce(req)

	r := req.WithContext(context.WithValue(req.Context(), apiCallKey{}, call))
	r.URL, r.RequestURI, r.Header = &url.URL{Path: call.path}, call.path, call.header
	r.Body, r.ContentLength, r.TransferEncoding, r.Trailer = nil, 0, nil, nil
	err, panicked := error(nil), true
	defer func() { // Caddy's proxy panics to cut off an answer that has begun
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

// undialled explains that no origin could be reached.
func (a *API) undialled(call *apiCall, err error) *apiRefusal {
	if ok, missed := a.notReady.allow(); ok {
		a.logger.Warn("WeChat's API cannot be reached", zap.Inline(call), zap.String("reason", safeReason(err)), zap.Int("not_logged", missed))
	}
	return unreachable(err, "WeChat's API could not be reached")
}

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
		out["User-Agent"] = []string{""} // or net/http adds its own
	}
	return out
}

// staysHere reports whether a header, by canonical name, is not for WeChat.
func staysHere(name string) bool {
	switch name {
	case "Authorization", "Cookie", "Cookie2", "Idempotency-Key", "X-Idempotency-Key", // an idempotency key makes net/http send a POST twice
		"Forwarded", "True-Client-Ip", "X-Cluster-Client-Ip", "X-Remote-Ip", "X-Remote-Addr", "Client-Ip", "X-Host", "X-Scheme", "X-Url-Scheme",
		"Via", "Origin", "Referer", "Early-Data", "Front-End-Https", "X-Method-Override", "X-Http-Method",
		"Accept-Encoding", "Expect", "Content-Length", "Host",
		"Connection", "Keep-Alive", "Upgrade", "Te", "Trailer", "Transfer-Encoding", "Alt-Svc", "Incremental":
		return true
	}
	if name == "" || strings.IndexByte(stayInitials, name[0]) < 0 {
		return false // most headers
	}
	return slices.ContainsFunc(stayPrefixes, func(prefix string) bool { return strings.HasPrefix(name, prefix) })
}

// stayInitials are the first letters of stayPrefixes.
const stayInitials = "XCFAPS:"

// stayPrefixes begin the headers with which proxies and CDNs tell each other where a request came from and what it was
// before they changed it, and the gateway's own.
var stayPrefixes = []string{
	"X-Wechat-", "X-Forward", "X-Origin", "X-Rewrite-", "X-Real-", "X-Client-", "X-Proxy", "X-Http-Method-",
	"X-Envoy-", "X-Amz", "X-Azure-", "X-Appengine-", "Cf-", "Cdn-", "Fastly-", "Fly-", "Akamai-", "X-Akamai-",
	"Proxy-", "Sec-", ":",
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
