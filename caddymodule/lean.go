package caddymodule

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap/zapcore"

	"github.com/caddy-wechat/caddy-wechat/internal/http1"
)

// LeanTransport is a transport for reverse_proxy that speaks HTTP/1.1 to the backend and costs about half the CPU of Caddy's own: the
// goroutine that serves a request sends it and reads the answer, where Go's HTTP client has two goroutines for every connection.
//
// Its options are those of Caddy's transport http, with the same names, meanings and defaults, and so are TLS, Unix sockets, dynamic
// upstreams, trailers, 1xx answers and WebSockets. Refused, each with a message, is what it does not do: HTTP/2 and HTTP/3, the PROXY protocol
// and forward proxies. Answers are never decompressed, and no compression is asked for that the client did not ask for. HTTP_PROXY and its
// kin are not looked at.
//
// In the heads of answers it takes lines that end in LF alone, folded fields, and both Content-Length and Transfer-Encoding: chunked, as
// Caddy's own transport does, but their connection is closed after the answer. Whatever else two readers might understand in two ways ends in a
// 502. Use transport http for a backend that needs more leniency.
type LeanTransport struct {
	reverseproxy.HTTPTransport

	client *http1.Client
	spent  bool // the request's header is of no use once the answer is there; see headerSpent
}

// CaddyModule returns the Caddy module information.
func (*LeanTransport) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.reverse_proxy.transport.wechat_lean",
		New: func() caddy.Module { return new(LeanTransport) },
	}
}

// UnmarshalCaddyfile reads the options as Caddy's transport http does.
//
//	transport wechat_lean {
//		<options of transport http, but for versions, compression, proxy_protocol, network_proxy and forward_proxy_url>
//	}
func (t *LeanTransport) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	if err := refuseLean(d); err != nil {
		return err
	}
	d.Reset()
	return t.HTTPTransport.UnmarshalCaddyfile(d)
}

// notLean are options of transport http that this one does not have, and why.
var notLean = map[string]string{
	"versions":          "it speaks HTTP/1.1 alone",
	"compression":       "it neither asks for compression nor undoes it",
	"proxy_protocol":    "it does not speak the PROXY protocol",
	"network_proxy":     "it uses no forward proxy",
	"forward_proxy_url": "it uses no forward proxy",
}

// refuseLean looks for options that are not there, so that the error has their place.
func refuseLean(d *caddyfile.Dispenser) error {
	d.Next()
	for d.NextBlock(0) {
		option := d.Val()
		if why, ok := notLean[option]; ok {
			return d.Errf("transport wechat_lean has no %s: %s; use transport http", option, why)
		}
		d.RemainingArgs()
		for nesting := d.Nesting(); d.NextBlock(nesting); {
		}
	}
	return nil
}

// Provision sets up the transport.
func (t *LeanTransport) Provision(ctx caddy.Context) error {
	for option, set := range map[string]bool{
		"versions": len(t.Versions) > 0, "compression": t.Compression != nil, "proxy_protocol": t.ProxyProtocol != "",
		"network_proxy": len(t.NetworkProxyRaw) > 0, "forward_proxy_url": t.ForwardProxyURL != "",
	} {
		if set {
			return fmt.Errorf("transport wechat_lean has no %s: %s; use transport http", option, notLean[option])
		}
	}
	t.Versions = []string{"1.1"}
	std, err := t.NewTransport(ctx) // for what it sets up: dialing, deadlines, TLS
	if err != nil {
		return err
	}
	t.client = &http1.Client{
		Dial:             std.DialContext,
		TLS:              std.TLSClientConfig,
		HandshakeTimeout: std.TLSHandshakeTimeout,
		HandshakeError:   handshakeError,
		NoKeepAlive:      std.DisableKeepAlives,
		IdleTimeout:      std.IdleConnTimeout,
		MaxIdle:          std.MaxIdleConns,
		MaxIdlePerHost:   std.MaxIdleConnsPerHost,
		MaxPerHost:       std.MaxConnsPerHost,
		HeaderTimeout:    std.ResponseHeaderTimeout,
		ContinueTimeout:  std.ExpectContinueTimeout,
		MaxHeader:        int(std.MaxResponseHeaderBytes),
		ReadBuffer:       std.ReadBufferSize,
	}
	if t.client.TLS == nil {
		t.client.TLS = new(tls.Config)
	}
	t.spent = headerSpent(ctx)
	return nil
}

// headerSpent reports whether the handler for which ctx provisions a transport is a reverse_proxy that has no use for a request's header any
// more once the answer is there: it has some for lines of level debug, and for conditions on which it sends the request again. Otherwise it
// encodes the header all the same, for a warning that the answer broke off, and that costs more than sending it does.
func headerSpent(ctx caddy.Context) bool {
	lineage := ctx.Modules() // which ends with the transport
	if len(lineage) < 2 {
		return false
	}
	proxy, ok := lineage[len(lineage)-2].(*reverseproxy.Handler)
	return ok && !proxy.VerboseLogs && !ctx.Logger(proxy).Core().Enabled(zapcore.DebugLevel) &&
		(proxy.LoadBalancing == nil || len(proxy.LoadBalancing.RetryMatchRaw)+len(proxy.LoadBalancing.RetryMatch) == 0)
}

// handshakeError makes a failed handshake one of dialing, for nothing of the request was sent. Caddy's own transport does not.
func handshakeError(err error) error {
	return reverseproxy.NewDialError(fmt.Errorf("TLS handshake: %w", err))
}

// RoundTrip implements http.RoundTripper.
func (t *LeanTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	res, err := t.client.RoundTrip(req, t.target(req))
	if err != nil {
		noteArrival(req, err)
	}
	if t.spent && err == nil && res.StatusCode != http.StatusSwitchingProtocols {
		req.Header = nil // req is reverse_proxy's own, made for this call
	}
	return res, err
}

// target is where reverse_proxy wants the request to go.
func (t *LeanTransport) target(req *http.Request) http1.Target {
	target := http1.Target{Network: "tcp"}
	target.Secure = t.TLS != nil && !slices.Contains(t.TLS.ExceptPorts, req.URL.Port())
	if info, ok := reverseproxy.GetDialInfo(req.Context()); ok {
		target.Network, target.Address = info.Network, info.Address
	} else {
		target.Address = addressOf(req, target.Secure)
	}
	if target.Secure {
		target.ServerName = t.serverName(req)
	}
	return target
}

// addressOf is host and port of a request's URL.
func addressOf(req *http.Request, secure bool) string {
	switch {
	case req.URL.Port() != "":
		return req.URL.Host
	case secure:
		return net.JoinHostPort(req.URL.Hostname(), "443")
	}
	return net.JoinHostPort(req.URL.Hostname(), "80")
}

// serverName is the name that the backend's certificate has to be for.
func (t *LeanTransport) serverName(req *http.Request) string {
	switch {
	case strings.Contains(t.TLS.ServerName, "{"):
		if repl, ok := req.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok {
			return repl.ReplaceAll(t.TLS.ServerName, "")
		}
		return ""
	case t.TLS.ServerName != "":
		return t.TLS.ServerName
	}
	return req.URL.Hostname()
}

// EnableH2C implements reverseproxy.H2CTransport: there is none.
func (*LeanTransport) EnableH2C() error {
	return errors.New("transport wechat_lean speaks HTTP/1.1 alone: use transport http for h2c:// upstreams")
}

// RequestHeaderOps implements reverseproxy.RequestHeaderOpsTransport, as Caddy's transport does.
func (t *LeanTransport) RequestHeaderOps() *headers.HeaderOps {
	return t.HTTPTransport.RequestHeaderOps()
}

// Cleanup closes idle connections. Requests that are still running finish.
func (t *LeanTransport) Cleanup() error {
	if t.client != nil {
		t.client.Close()
	}
	return nil
}

var (
	_ caddy.Provisioner                                = (*LeanTransport)(nil)
	_ caddy.CleanerUpper                               = (*LeanTransport)(nil)
	_ caddyfile.Unmarshaler                            = (*LeanTransport)(nil)
	_ http.RoundTripper                                = (*LeanTransport)(nil)
	_ reverseproxy.TLSTransport                        = (*LeanTransport)(nil)
	_ reverseproxy.H2CTransport                        = (*LeanTransport)(nil)
	_ reverseproxy.RequestHeaderOpsTransport           = (*LeanTransport)(nil)
	_ reverseproxy.HealthCheckSchemeOverriderTransport = (*LeanTransport)(nil)
)
