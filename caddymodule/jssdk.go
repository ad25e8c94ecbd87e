package caddymodule

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

const (
	// jssdkTimeout is how long a page waits for an account's first ticket.
	jssdkTimeout = 10 * time.Second
	// ticketLeast is what a ticket still lives when a page gets a signature, which WeChat's client checks in a moment.
	ticketLeast = time.Minute
	// preflightAge is for how long a browser may remember what it was told of other origins, in seconds.
	preflightAge = "600"
)

// JSSDK signs pages for WeChat's JS-SDK, with the jsapi_ticket of an account that the gateway keeps. It answers
//
//	GET {base}/{appid}?url=<the page's address, percent-encoded>
//
// with what wx.config wants: {"appId":"wx…","timestamp":1700000000,"nonceStr":"…","signature":"…"}. The appid is a
// configured account or one that has authorized a configured platform. In the page:
//
//	const page = encodeURIComponent(location.href.split('#')[0]);
//	const answer = await fetch('https://wechat.example.com/wx/jssdk/wx3333333333333333?url=' + page);
//	const signed = await answer.json();
//	if (!answer.ok) throw new Error(signed.error);
//	wx.config({ ...signed, jsApiList: ['updateAppMessageShareData', 'scanQRCode'] });
//
// Signed are the very bytes of url, once decoded, without a fragment. WeChat's client compares them with the address
// that it sees, so the page gives its own address, and the domain must be a JS接口安全域名 of the account or one of
// the platform's own domains.
//
// Only pages on Hosts are signed. A page anywhere else gets 403, and so does a request that a script of another origin
// makes; the origins of Hosts are named in Access-Control-Allow-Origin, one by one and without credentials. A host
// without a port stands for http and https at their own ports, and for no other port.
//
// Nothing is cached. A ticket is fetched once for all who wait for it, kept like a token, and renewed ahead of its
// end. An appid that nobody knows costs no call to WeChat. Other answers are {"error":"…"}:
//
//	400       the url is missing, malformed or not percent-encoded
//	403       the page's host, or the origin of the script that asks, is not among Hosts
//	404       there is no such account
//	405       not GET, HEAD or OPTIONS
//	502       WeChat refuses the account a ticket, or was not reached; the log has the reason and the remedy
//	503, 504  there is no ticket for now
//
// Requests for paths that are not below Base go on to the next handler. They are counted in
// caddy_wechat_jssdk_total{result}.
type JSSDK struct {
	// Base is the path below which the handler serves, such as /wx/jssdk. Required.
	Base string `json:"base,omitempty"`
	// Hosts are the hosts whose pages are signed: a name such as shop.example.com, or with * for one whole label, such
	// as *.wx.example.com; either with a port, such as localhost:8080, if the pages are not at the port of their scheme.
	// Placeholders are resolved when the config is loaded. At least one.
	Hosts []string `json:"hosts,omitempty"`

	app     *App
	logger  *zap.Logger
	base    string // without a slash at its end
	hosts   []hostPattern
	dampers map[string]*damper // by result
}

// CaddyModule returns the Caddy module information.
func (JSSDK) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.wechat_jssdk", New: func() caddy.Module { return new(JSSDK) }}
}

// Provision resolves the configuration and gets the app.
func (j *JSSDK) Provision(ctx caddy.Context) (err error) {
	j.logger = ctx.Logger()
	if j.app, err = loadApp(ctx); err != nil {
		return err
	}
	j.base = strings.TrimSuffix(j.Base, "/")
	r := resolver{repl: caddy.NewReplacer()}
	j.hosts = nil
	for _, s := range j.Hosts {
		s, err := r.required("hosts", s)
		if err != nil {
			return err
		}
		pattern, err := parseHostPattern(s)
		if err != nil {
			return fmt.Errorf("hosts: %w", err)
		}
		j.hosts = append(j.hosts, pattern)
	}
	j.dampers = make(map[string]*damper, len(jssdkResults))
	for _, result := range jssdkResults {
		j.dampers[result] = new(damper)
	}
	return nil
}

// Validate refuses what makes no sense.
func (j *JSSDK) Validate() error {
	if err := checkJSSDKBase(j.Base); err != nil {
		return err
	}
	if len(j.Hosts) == 0 {
		return errNoHosts
	}
	return nil
}

var errNoHosts = errors.New("hosts is missing: list the hosts whose pages are signed, as in: hosts shop.example.com")

func checkJSSDKBase(base string) error {
	if base == "/" {
		return errors.New("base '/' would take every path of the site: give one of its own, as in /wx/jssdk")
	}
	return checkBase(base)
}

// jssdkRequest is a request and what was made out of it so far.
type jssdkRequest struct {
	*http.Request
	appid string     // empty unless it has the shape of one
	host  string     // of the page or the origin, once that is one
	key   tokens.Key // of the ticket
}

// ServeHTTP signs pages and passes everything that is not below the base on. It never returns an error: Caddy would
// log the request's URI, and a page's address may have a login code in it.
func (j *JSSDK) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	named, ok := strings.CutPrefix(r.URL.Path, j.base+"/")
	if !ok {
		return next.ServeHTTP(w, r)
	}
	req := &jssdkRequest{Request: r}
	if isAppID(named) {
		req.appid = named
	}
	h := w.Header()
	h.Add("Vary", "Origin")
	h.Set("X-Content-Type-Options", "nosniff")
	failure := j.admitOrigin(h, req)
	if failure == nil && r.Method == http.MethodOptions {
		j.count("preflight")
		answerPreflight(w)
		return nil
	}
	var signed signedPage
	if failure == nil {
		signed, failure = j.sign(req)
	}
	if failure != nil {
		j.count(failure.result)
		j.log(req, failure)
		if failure == jssdkMethod {
			h.Set("Allow", "GET, HEAD, OPTIONS")
		}
		writeJSON(w, failure.status, jsonBody(map[string]string{"error": failure.text}))
		return nil
	}
	j.count("ok")
	writeJSON(w, http.StatusOK, jsonBody(signed))
	return nil
}

// admitOrigin checks where the script is from that asks, if a browser says so, and lets it read the answer.
func (j *JSSDK) admitOrigin(h http.Header, req *jssdkRequest) *jssdkFailure {
	origins := req.Header["Origin"]
	if len(origins) == 0 {
		return nil // a page of the same origin, or no browser
	}
	page, ok := parsePage(origins[0])
	if len(origins) > 1 || !ok || page.rest != "" {
		return jssdkOrigin
	}
	if req.host = page.hostPort(); !j.covers(page) {
		return jssdkOrigin
	}
	h.Set("Access-Control-Allow-Origin", origins[0])
	return nil
}

func answerPreflight(w http.ResponseWriter) {
	h := w.Header()
	h.Set("Access-Control-Allow-Methods", http.MethodGet)
	h.Set("Access-Control-Max-Age", preflightAge)
	h.Set("Allow", "GET, HEAD, OPTIONS")
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusNoContent)
}

// signedPage is what wx.config takes.
type signedPage struct {
	AppID     string `json:"appId"`
	Timestamp int64  `json:"timestamp"`
	NonceStr  string `json:"nonceStr"`
	Signature string `json:"signature"`
}

// sign checks the page and the account, in the order of what it costs, and signs.
func (j *JSSDK) sign(req *jssdkRequest) (signedPage, *jssdkFailure) {
	if req.Method != http.MethodGet && req.Method != http.MethodHead {
		return signedPage{}, jssdkMethod
	}
	if req.appid == "" || j.app.platform(req.appid) != nil { // a platform has no pages
		return signedPage{}, jssdkUnknown
	}
	address, failure := pageAddress(req.URL.RawQuery)
	if failure != nil {
		return signedPage{}, failure
	}
	page, ok := parsePage(address)
	if !ok {
		return signedPage{}, jssdkNotPage
	}
	if req.host = page.hostPort(); !j.covers(page) {
		return signedPage{}, jssdkHost
	}
	ctx, cancel := context.WithTimeout(req.Context(), jssdkTimeout)
	defer cancel()
	ticket, err := j.ticket(ctx, req)
	if err != nil {
		return signedPage{}, ticketFailure(err)
	}
	signed := signedPage{AppID: req.appid, Timestamp: time.Now().Unix(), NonceStr: rand.Text()}
	signed.Signature = crypto.JSSDKSignature(ticket.Value.Reveal(), signed.NonceStr, signed.Timestamp, address)
	return signed, nil
}

// ticket gets the account's ticket. An appid may be anybody's invention, so it is looked up before WeChat is asked.
func (j *JSSDK) ticket(ctx context.Context, req *jssdkRequest) (tokens.Token, error) {
	platform := ""
	if j.app.account(req.appid) == nil {
		var err error
		if platform, err = j.app.manager().StoredPlatformOf(ctx, req.appid); err != nil {
			return tokens.Token{}, err
		}
	}
	req.key = tokens.JSAPIKey(platform, req.appid)
	return j.app.manager().GetLasting(ctx, req.key, ticketLeast)
}

// covers reports whether a page is on one of the hosts.
func (j *JSSDK) covers(page pageParts) bool {
	return slices.ContainsFunc(j.hosts, func(p hostPattern) bool { return p.covers(page) })
}

func (j *JSSDK) count(result string) { j.app.metrics().jssdk.WithLabelValues(result).Inc() }

var (
	_ caddy.Provisioner           = (*JSSDK)(nil)
	_ caddy.Validator             = (*JSSDK)(nil)
	_ caddyhttp.MiddlewareHandler = (*JSSDK)(nil)
	_ caddyfile.Unmarshaler       = (*JSSDK)(nil)
)
