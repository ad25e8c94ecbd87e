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
// It reads the backend's answers to the letter: lines that end in LF alone, folded fields, both Content-Length and Transfer-Encoding, and
// whatever else two readers might understand in two ways ends in a 502. Use transport http for a backend that needs leniency.
type LeanTransport struct {
	reverseproxy.HTTPTransport

	client *http1.Client
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
	return nil
}

// handshakeError makes a failed handshake one of dialing, for nothing of the request was sent. Caddy's own transport does not.
func handshakeError(err error) error {
	return reverseproxy.NewDialError(fmt.Errorf("TLS handshake: %w", err))
}

// RoundTrip implements http.RoundTripper.
func (t *LeanTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	return t.client.RoundTrip(req, t.target(req))
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
