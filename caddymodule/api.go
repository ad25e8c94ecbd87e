package caddymodule

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// Defaults and limits of wechat_api.
const (
	defaultRepeatBuffer = 1 << 20 // bytes

	apiDialTimeout      = 3 * time.Second
	apiHandshakeTimeout = 5 * time.Second
	responseTimeout     = 30 * time.Second      // default of response_header_timeout: committing a mini program's code takes WeChat ten seconds and more
	stallTimeout        = 30 * time.Second      // default of stall_timeout
	maxAPITimeout       = time.Hour             // of both
	freeDials           = 10                    // of one sending of a call: connections after which net/http waits before it begins the next
	firstDialPause      = 10 * time.Millisecond // before that one; it doubles each time
	lastDialPause       = time.Second
	apiIdleTimeout      = time.Minute      // of connections to WeChat
	apiPassiveFail      = 10 * time.Second // for how long an origin is passed over once it could not be reached
	damperInterval      = time.Minute      // between two log lines of the same kind
)

// API lets apps call WeChat's API for an account without ever holding one of its tokens. It admits a call, and hands it
// to Caddy's reverse_proxy, whose transport puts the token in. It needs no upstream: calls go to the API origins of the
// wechat app, and nowhere else.
//
// For whom a call is, a caller says in one of three ways:
//
//   - by path: /wx0123456789abcdef/cgi-bin/user/info?openid=…
//   - by header: X-Wechat-Appid: wx0123456789abcdef, on the plain path;
//   - like an SDK: the gateway is the SDK's base URL, the client's key its secret. /cgi-bin/token and
//     /cgi-bin/stable_token (and api_component_token and api_authorizer_token for a platform) answer with an opaque
//     token of the gateway's own, and access_token=<opaque> is exchanged for the real one on the way.
//
// In the first two ways the client proves itself with Authorization: Bearer <key>, in the third with the opaque token.
// What a client may do is in its entry in the wechat app: appids and paths.
//
// /sns/userinfo, /sns/auth and /sns/oauth2/refresh_token take the user's own token, which the caller brings. They pass
// without a client, because whoever holds such a token could as well ask WeChat; with an Authorization header, which
// must then be right, the client's paths apply. Where no client is configured trust_loopback alone admits them, as it does every other call.
// Without a key, a body has to come within 30 seconds, and to be no larger than 64 KiB.
//
// Paths that would reveal or burn a token of the gateway's are answered by the gateway or refused.
// /cgi-bin/ticket/getticket gives the account's jsapi or card ticket, which the gateway keeps as it does tokens, with
// the life that is left: all callers get the same one. Errors of the
// gateway's own have WeChat's shape, {"errcode":…,"errmsg":"…"}: with HTTP 200 for SDKs, which read no other, and with
// 401 or 403 for Bearer callers. 502, 503 and 504 mean that the gateway, WeChat or the way to it has a problem.
//
// GET /wechat/users/{wxTkId} tells a client who came through wechat_oauth under that tracking id, and
// GET /wechat/users/{wxTkId}/userinfo asks WeChat for that user's profile, if the client may act for the account.
//
// Request and answer bodies stream, byte for byte; an answer with an error's status, up to 64 KiB, follows when all of it
// has come. An answer in gzip, for which nobody asked, is unpacked; with a token of the gateway's, one in another content coding is
// refused with 502. If WeChat says that the token is bad, it is renewed, once for all calls that wait for it, and the call is repeated
// once; a request body larger than RepeatBuffer is not kept for that, and the caller gets WeChat's answer. A path that refuses a token
// just renewed is not believed for ten minutes: WeChat says the same when a path takes another kind of token, and the token is everybody's.
// Renewals for refused tokens are rationed, and a refused token serves on while no other is to be had.
//
// Placeholders:
//
//	{wechat.client}  the name of the client that calls
//	{wechat.appid}   the appid it calls for
type API struct {
	// RepeatBuffer is up to what size a request body is kept so that the call can be repeated with a renewed token,
	// in bytes, at most 1 GiB. Default: 1 MiB.
	RepeatBuffer int64 `json:"repeat_buffer,omitempty"`
	// TrustLoopback admits callers without a credential that connect from this machine: from a loopback address, and
	// with no header that a proxy or a browser adds (Forwarded, X-Forwarded-*, X-Real-IP, Via, Origin, Sec-Fetch-*).
	// The Host they name must be this machine, by localhost or a loopback address, or WeChat's. They may act for all
	// accounts and authorizers, and for no platform, also when clients are configured; an SDK, which has to send some
	// secret, may send any. A key in Authorization must be right all the same. Default: false.
	TrustLoopback bool `json:"trust_loopback,omitempty"`
	// ResponseHeaderTimeout is how long WeChat may take from a request's end to its answer's beginning, at most 1 h. The caller gets 504
	// after that. Default: 30s.
	ResponseHeaderTimeout caddy.Duration `json:"response_header_timeout,omitempty"`
	// StallTimeout is how long an answer may go without a byte more, or a request without WeChat taking one, at most 1 h. Default: 30s.
	StallTimeout caddy.Duration `json:"stall_timeout,omitempty"`

	app      *App
	logger   *zap.Logger
	keys     clientKeys
	proxy    caddyhttp.MiddlewareHandler
	proxyLog *zap.Logger // as the proxy has it
	refused  damper
	notReady damper

	grantWait time.Duration // grantBodyTimeout, but for tests
}

// CaddyModule returns the Caddy module information.
func (*API) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.wechat_api", New: func() caddy.Module { return new(API) }}
}

// Provision sets up the handler and the reverse proxy behind it.
func (a *API) Provision(ctx caddy.Context) error {
	a.logger, a.grantWait = ctx.Logger(), grantBodyTimeout
	if a.RepeatBuffer == 0 {
		a.RepeatBuffer = defaultRepeatBuffer
	}
	if a.ResponseHeaderTimeout == 0 {
		a.ResponseHeaderTimeout = caddy.Duration(responseTimeout)
	}
	if a.StallTimeout == 0 {
		a.StallTimeout = caddy.Duration(stallTimeout)
	}
	var err error
	if a.app, err = loadApp(ctx); err != nil {
		return err
	}
	a.warnOfNobody(a.logger)
	a.keys = newClientKeys(a.app.Clients)
	config, err := json.Marshal(a.proxyConfig())
	if err != nil {
		return err
	}
	own := ctx.WithValue(apiProxyKey{}, a)
	proxy, err := own.LoadModuleByID("http.handlers.reverse_proxy", config)
	if err != nil {
		return err
	}
	a.proxy = proxy.(caddyhttp.MiddlewareHandler)
	a.proxyLog = ctx.Logger(proxy.(caddy.Module))
	return nil
}

// warnOfNobody tells a log if every call will be refused.
func (a *API) warnOfNobody(log *zap.Logger) {
	if len(a.app.Clients) == 0 && !a.TrustLoopback {
		log.Warn("wechat_api admits nobody here: there is no client; add one to the global option wechat, or trust_loopback for callers on this machine")
	}
}

// Validate checks the settings.
func (a *API) Validate() error {
	if a.RepeatBuffer < 0 || a.RepeatBuffer > maxSize {
		return errors.New("repeat_buffer: want a number of bytes up to 1 GiB")
	}
	if err := checkAPITimeout("response_header_timeout", a.ResponseHeaderTimeout); err != nil {
		return err
	}
	return checkAPITimeout("stall_timeout", a.StallTimeout)
}

// checkAPITimeout refuses a time in which WeChat cannot answer, or in which nobody waits any more.
func checkAPITimeout(field string, t caddy.Duration) error {
	if t <= 0 || time.Duration(t) > maxAPITimeout {
		return fmt.Errorf("%s: want more than 0 and at most %s", field, maxAPITimeout)
	}
	return checkUnit(field, t)
}

// proxyConfig is the reverse_proxy that carries the calls.
func (a *API) proxyConfig() map[string]any {
	type object = map[string]any
	transport := object{
		"protocol":                "wechat",
		"compression":             false, // an answer has to be readable, and keep its length
		"dial_timeout":            caddy.Duration(apiDialTimeout),
		"response_header_timeout": a.ResponseHeaderTimeout,
		"keep_alive":              object{"idle_timeout": caddy.Duration(apiIdleTimeout), "max_idle_conns_per_host": 64},
		"network_proxy":           object{"from": "none"},
	}
	if proxy := a.app.proxyURL(); proxy != nil {
		transport["network_proxy"] = object{"from": "url", "url": proxy.String()}
	}
	var upstreams []object
	for _, origin := range a.app.apiOrigins() {
		upstreams = append(upstreams, object{"dial": dialAddress(origin)})
		if origin.Scheme == "https" {
			transport["tls"] = object{"handshake_timeout": caddy.Duration(apiHandshakeTimeout)}
		}
	}
	config := object{
		"transport":      transport,
		"upstreams":      upstreams,
		"load_balancing": object{"selection_policy": object{"policy": "first"}, "retries": len(upstreams) - 1},
	}
	if len(upstreams) > 1 {
		// The transport reports nothing but calls that had no connection as errors, so this counts nothing else.
		config["health_checks"] = object{"passive": object{"fail_duration": caddy.Duration(apiPassiveFail), "max_fails": 1}}
	}
	return config
}

// ServeHTTP admits a call and passes it on, or answers it. It never returns an error while the request's URI may carry
// a secret, because Caddy would log that URI.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	req := &apiRequest{Request: r, w: w, bodyWait: a.grantWait, started: a.app.shared.feed.now(), span: spanOf(r.Context())}
	if refused := a.read(req); refused != nil {
		return a.refuse(w, req, refused)
	}
	if isGatewayPath(req.path) {
		return a.serveGateway(w, req)
	}
	if isGrant(req.known.answer) {
		return a.serveGrant(w, req)
	}
	if req.known.answer == answerJSTicket && req.asksForKeptTicket() {
		return a.serveJSTicket(w, req)
	}
	call, refused := a.admit(req)
	if refused != nil {
		return a.refuse(w, req, refused)
	}
	return a.forward(w, req, call)
}

// read makes out the path and whom it is for.
func (a *API) read(req *apiRequest) *apiRefusal {
	switch req.Method {
	case http.MethodGet, http.MethodPost, http.MethodHead, http.MethodPut, http.MethodPatch, http.MethodDelete:
	default:
		return refuse(http.StatusMethodNotAllowed, http.StatusMethodNotAllowed, "method", "method is not one of WeChat's API: use GET or POST")
	}
	appid, rest := appIDPrefix(req.URL.EscapedPath())
	path, err := canonicalPath(rest)
	if err != nil {
		return refuse(http.StatusBadRequest, http.StatusBadRequest, "path", "%v", err)
	}
	if first, below, _ := strings.Cut(path[1:], "/"); !isAppID(first) && isAppID(strings.ToLower(first)) { // no path of WeChat's own begins so
		return refuse(http.StatusBadRequest, codeInvalidAppID, "appid", "invalid appid: it is written in lower case: /%s/%s", strings.ToLower(first), below)
	}
	if again, _ := appIDPrefix(path); again != "" {
		return refuse(http.StatusBadRequest, http.StatusBadRequest, "path", "path names two appids")
	}
	req.path, req.known, req.appid = path, classify(path), ownAppID(req.Request, appid)
	for _, named := range req.Header[headerAppID] {
		switch {
		case !isAppID(named):
			return refuse(http.StatusBadRequest, codeInvalidAppID, "appid", "invalid appid in %s: want %s", headerAppID, appIDShape)
		case req.appid != "" && req.appid != named:
			return refuse(http.StatusBadRequest, codeInvalidAppID, "appid", "path and %s name different appids", headerAppID)
		}
		req.appid = named
	}
	return nil
}

// maxPinnedLine is up to how many bytes a request line may stay in memory for as long as an appid out of it does.
const maxPinnedLine = 512

// ownAppID is an appid out of a request's path or query, apart from the request line if that is long: caches keep
// appids, and would keep the whole line with each.
func ownAppID(r *http.Request, appid string) string {
	if len(r.RequestURI) > maxPinnedLine {
		return strings.Clone(appid)
	}
	return appid
}

// gatewayRoot is where the gateway's own routes are; WeChat has none there.
const gatewayRoot = "/wechat/"

// isGatewayPath reports whether a path is not for WeChat. Case is ignored: a misspelt tracking id is none of WeChat's
// business either.
func isGatewayPath(path string) bool {
	return len(path) >= len(gatewayRoot) && strings.EqualFold(path[:len(gatewayRoot)], gatewayRoot)
}

// loggedPath is what a log may show of a request's path: no tracking id.
func (req *apiRequest) loggedPath() string {
	switch {
	case !isGatewayPath(req.path):
		return req.path
	case len(req.path) >= len(usersPath) && strings.EqualFold(req.path[:len(usersPath)], usersPath):
		return usersPath + "…"
	}
	return gatewayRoot + "…"
}

// serveGateway serves the gateway's own routes.
func (a *API) serveGateway(w http.ResponseWriter, req *apiRequest) error {
	if refused := a.authenticate(req, ""); refused != nil {
		return a.refuse(w, req, refused)
	}
	if !strings.HasPrefix(req.path, usersPath) || req.appid != "" {
		return a.refuse(w, req, refuse(http.StatusNotFound, http.StatusNotFound, "path", "no such path"))
	}
	r := req.WithContext(req.Context())
	r.URL = &url.URL{Path: req.path, RawQuery: req.URL.RawQuery}
	a.announce(req)
	rec := caddyhttp.NewResponseRecorder(w, nil, nil)
	err := a.serveUsers(rec, r, req.client)
	outcome := outcomeOK
	req.entry.Status = rec.Status()
	if rec.Status() != http.StatusOK {
		outcome = outcomeRefused
	}
	a.count(req, outcome)
	return err
}

// count counts a call and enters it into the feed.
func (a *API) count(req *apiRequest, outcome string) {
	m := a.app.metrics()
	if outcome == outcomeOK {
		m.apiServed.of(req.clientName()).Inc()
	} else {
		m.apiRequests.WithLabelValues(req.clientName(), outcome).Inc()
	}
	a.feedCall(req, outcome)
}

// announce tells placeholders and the access log who calls for whom, as far as that is known.
func (a *API) announce(req *apiRequest) {
	ctx := req.Context()
	if repl, ok := ctx.Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok {
		repl.Map(req.placeholder)
	}
	if server, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server); ok && server.Logs == nil {
		return // no access log, and each field costs allocations
	}
	if extra, ok := ctx.Value(caddyhttp.ExtraLogFieldsCtxKey).(*caddyhttp.ExtraLogFields); ok {
		extra.Set(zap.String("client", req.clientName()))
		extra.Set(zap.String("appid", req.appid))
	}
}

// placeholder is a caddy.ReplacerFunc.
func (req *apiRequest) placeholder(key string) (any, bool) {
	switch key {
	case "wechat.client":
		return req.clientName(), true
	case "wechat.appid":
		return req.appid, true
	}
	return nil, false
}

// refuse writes a refusal, counts it and logs it.
func (a *API) refuse(w http.ResponseWriter, req *apiRequest, refused *apiRefusal) error {
	a.announce(req)
	status := req.statusFor(refused)
	req.entry.Status, req.entry.ErrCode, req.entry.Reason, req.entry.wechats = status, refused.code, refused.msg, refused.wechats
	req.entry.RID = refused.rid
	a.count(req, req.outcome(refused))
	level := zapcore.DebugLevel
	missed := 0
	if refused.rule == "credentials" {
		var ok bool
		if ok, missed = a.refused.allow(); ok {
			level = zapcore.WarnLevel
		}
	}
	if c := a.logger.Check(level, "call refused"); c != nil {
		c.Write(zap.String("client", req.clientName()), zap.String("appid", req.appid), zap.String("api", req.loggedPath()),
			zap.String("rule", refused.rule), zap.Int64("errcode", refused.code), zap.String("reason", refused.msg),
			zap.String("remote", req.RemoteAddr), zap.String("client_ip", visitorText(req.Request)), zap.Int("not_logged", missed))
	}
	switch status {
	case http.StatusUnauthorized:
		w.Header().Set("WWW-Authenticate", "Bearer")
	case http.StatusMethodNotAllowed:
		w.Header().Set("Allow", "GET, HEAD, POST, PUT, PATCH, DELETE")
	}
	writeJSON(w, status, errorBody(refused.code, refused.msg))
	return nil
}

// damper lets one log line of a kind through per interval and counts the others. The zero value is ready.
type damper struct {
	mu     sync.Mutex
	last   time.Time
	missed int
}

// allow reports whether to log, once per damperInterval, and how many lines were held back before.
func (d *damper) allow() (ok bool, missed int) { return d.allowEvery(damperInterval) }

// allowEvery is allow with another interval.
func (d *damper) allowEvery(interval time.Duration) (ok bool, missed int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if now := time.Now(); d.last.IsZero() || now.Sub(d.last) >= interval {
		missed, d.last, d.missed = d.missed, now, 0
		return true, missed
	}
	d.missed++
	return false, 0
}

var (
	_ caddy.Provisioner           = (*API)(nil)
	_ caddy.Validator             = (*API)(nil)
	_ caddyhttp.MiddlewareHandler = (*API)(nil)
)
