package caddymodule

import (
	"context"
	"net/http"
	"net/url"
	"strings"

	"go.uber.org/zap"
)

// forward hands an admitted call to the reverse proxy. What the proxy sees, and may log, is free of secrets: the
// transport has the rest.
func (a *API) forward(w http.ResponseWriter, req *apiRequest, call *apiCall) error {
	call.path, call.client, call.appid, call.sdk = req.path, req.client.Name, req.appid, req.form.sdk()
	call.header = outboundHeader(req.Header)
	call.size = req.ContentLength
	if req.ContentLength != 0 && req.Body != nil && req.Body != http.NoBody {
		call.body = newKeptBody(req.Body, req.ContentLength, a.RepeatBuffer)
		if call.size < 0 {
			if call.size = call.body.measure(); call.size == 0 {
				call.body = nil
			}
		}
	}
	a.announce(req)

	r := req.WithContext(context.WithValue(req.Context(), apiCallKey{}, call))
	r.URL, r.RequestURI, r.Header = &url.URL{Path: call.path}, call.path, call.header
	r.Body, r.ContentLength, r.TransferEncoding, r.Trailer = nil, 0, nil, nil
	if err := a.proxy.ServeHTTP(w, r, nil); err != nil {
		call.outcome = outcomeUnreachable
		return a.refuse(w, req, a.undialled(call, err))
	}
	a.app.metrics().apiRequests.WithLabelValues(call.client, call.outcome).Inc()
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
		"Forwarded", "X-Real-Ip", "X-Client-Ip", "True-Client-Ip", "Via", "Origin", "Referer", "Early-Data",
		"Accept-Encoding", "Expect", "Content-Length", "Host",
		"Connection", "Keep-Alive", "Upgrade", "Te", "Trailer", "Transfer-Encoding", "Alt-Svc", "Incremental":
		return true
	}
	return strings.HasPrefix(name, "X-Forwarded-") || strings.HasPrefix(name, "X-Wechat-") ||
		strings.HasPrefix(name, "Proxy-") || strings.HasPrefix(name, "Sec-") || strings.HasPrefix(name, ":")
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
