package caddymodule

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// Defaults and limits of wechat_api.
const (
	defaultRepeatBuffer    = 1 << 20          // bytes
	defaultResponseTimeout = 30 * time.Second // committing a mini program's code takes WeChat ten seconds and more

	apiDialTimeout      = 3 * time.Second
	apiHandshakeTimeout = 5 * time.Second
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
// Paths that would reveal or burn a token of the gateway's are answered by the gateway or refused. Errors of the
// gateway's own have WeChat's shape, {"errcode":…,"errmsg":"…"}: with HTTP 200 for SDKs, which read no other, and with
// 401 or 403 for Bearer callers. 502, 503 and 504 mean that the gateway, WeChat or the way to it has a problem.
//
// Request and answer bodies stream, byte for byte. If WeChat says that the token is bad, it is renewed, once for all
// calls that wait for it, and the call is repeated once; a request body larger than RepeatBuffer is not kept for that,
// and the caller gets WeChat's answer.
//
// Placeholders:
//
// Placeholder | Description
// ------------|-------------
// `{wechat.client}` | The name of the client that calls
// `{wechat.appid}` | The appid it calls for
type API struct {
	// RepeatBuffer is up to what size a request body is kept so that the call can be repeated with a renewed token,
	// in bytes. Default: 1 MiB.
	RepeatBuffer int64 `json:"repeat_buffer,omitempty"`
	// TrustLoopback admits callers without a credential that connect from this machine: from a loopback address, and
	// with no header that a proxy or a browser adds (Forwarded, X-Forwarded-*, X-Real-IP, Via, Origin, Sec-Fetch-*).
	// They may act for all accounts and authorizers, and for no platform. Default: false.
	TrustLoopback bool `json:"trust_loopback,omitempty"`
	// ResponseTimeout is how long WeChat may take from the end of a request to the beginning of its answer.
	// Default: 30s.
	ResponseTimeout caddy.Duration `json:"response_timeout,omitempty"`

	app      *App
	logger   *zap.Logger
	keys     clientKeys
	proxy    caddyhttp.MiddlewareHandler
	refused  damper
	notReady damper
}

// CaddyModule returns the Caddy module information.
func (*API) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.wechat_api", New: func() caddy.Module { return new(API) }}
}

// Provision sets up the handler and the reverse proxy behind it.
func (a *API) Provision(ctx caddy.Context) error {
	a.logger = ctx.Logger()
	if a.RepeatBuffer == 0 {
		a.RepeatBuffer = defaultRepeatBuffer
	}
	if a.ResponseTimeout == 0 {
		a.ResponseTimeout = caddy.Duration(defaultResponseTimeout)
	}
	var err error
	if a.app, err = loadApp(ctx); err != nil {
		return err
	}
	a.keys = newClientKeys(a.app.Clients)
	config, err := json.Marshal(a.proxyConfig())
	if err != nil {
		return err
	}
	proxy, err := ctx.LoadModuleByID("http.handlers.reverse_proxy", config)
	if err != nil {
		return err
	}
	a.proxy = proxy.(caddyhttp.MiddlewareHandler)
	return nil
}

// Validate checks the settings.
func (a *API) Validate() error {
	if a.RepeatBuffer < 0 || a.RepeatBuffer > maxSize {
		return errors.New("repeat_buffer: want a number of bytes up to 1 GiB")
	}
	if a.ResponseTimeout < 0 {
		return errors.New("response_timeout is negative: give a duration such as 30s")
	}
	return nil
}

// proxyConfig is the reverse_proxy that carries the calls.
func (a *API) proxyConfig() map[string]any {
	type object = map[string]any
	transport := object{
		"protocol":                "wechat",
		"compression":             false, // an answer has to be readable, and keep its length
		"dial_timeout":            caddy.Duration(apiDialTimeout),
		"response_header_timeout": a.ResponseTimeout,
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
		// The transport reports nothing but failed dials as errors, so this counts nothing else.
		config["health_checks"] = object{"passive": object{"fail_duration": caddy.Duration(apiPassiveFail), "max_fails": 1}}
	}
	return config
}

// callForm is how a caller proves itself.
type callForm uint8

const (
	formNone     callForm = iota
	formBearer            // Authorization: Bearer <key>
	formLoopback          // trust_loopback
	formOpaque            // access_token=<opaque token>
	formKey               // the client's key in the place of the account's secret
)

// sdk reports whether an SDK made the call. SDKs read errors from HTTP 200 only.
func (f callForm) sdk() bool { return f == formOpaque || f == formKey }

// apiRequest is a call on its way through the checks.
type apiRequest struct {
	*http.Request
	appid       string // whom the path or the header names
	path        string // canonical, without the appid
	known       apiPath
	form        callForm
	client      *Client
	fingerprint string // of the client's key
}

// ServeHTTP admits a call and passes it on, or answers it. It never returns an error while the request's URI may carry
// a secret, because Caddy would log that URI.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	req := &apiRequest{Request: r}
	if refused := a.read(req); refused != nil {
		return a.refuse(w, req, refused)
	}
	if strings.HasPrefix(req.path, gatewayRoot) {
		return a.serveGateway(w, req)
	}
	if isGrant(req.known.answer) {
		return a.serveGrant(w, req)
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
	if again, _ := appIDPrefix(path); again != "" {
		return refuse(http.StatusBadRequest, http.StatusBadRequest, "path", "path names two appids")
	}
	req.path, req.known, req.appid = path, classify(path), appid
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

// gatewayRoot is where the gateway's own routes are; WeChat has none there.
const gatewayRoot = "/wechat/"

// serveGateway serves the gateway's own routes.
func (a *API) serveGateway(w http.ResponseWriter, req *apiRequest) error {
	if refused := a.authenticate(req, ""); refused != nil {
		return a.refuse(w, req, refused)
	}
	if !strings.HasPrefix(req.path, gatewayRoot+"users/") || req.appid != "" {
		return a.refuse(w, req, refuse(http.StatusNotFound, http.StatusNotFound, "path", "no such path"))
	}
	r := req.WithContext(req.Context())
	r.URL = &url.URL{Path: req.path, RawQuery: req.URL.RawQuery}
	return a.serveUsers(w, r, req.client)
}

// authenticate finds out which client calls: by Authorization, or else by the opaque token, or else by trust_loopback.
func (a *API) authenticate(req *apiRequest, opaque string) *apiRefusal {
	if auth := req.Header["Authorization"]; len(auth) > 0 {
		req.form = formBearer
		scheme, key, _ := strings.Cut(auth[0], " ")
		if len(auth) == 1 && strings.EqualFold(scheme, "Bearer") {
			req.client, req.fingerprint = a.keys.find(strings.TrimSpace(key))
		}
		if req.client == nil {
			return refuse(http.StatusUnauthorized, codeInvalidAppSecret, "credentials", "invalid key: Authorization names no client of the gateway")
		}
		return nil
	}
	if opaque != "" {
		return a.authenticateOpaque(req, opaque)
	}
	if a.TrustLoopback && isTrustedLoopback(req.Request) {
		req.form, req.client = formLoopback, loopbackClient
		return nil
	}
	return refuse(http.StatusUnauthorized, codeMissingToken, "credentials",
		"access_token missing: send Authorization: Bearer with the client's key, or an access_token that the gateway gave out")
}

// authenticateOpaque takes an opaque token for what it says.
func (a *API) authenticateOpaque(req *apiRequest, opaque string) *apiRefusal {
	req.form = formOpaque
	claims, err := a.app.manager().OpenOpaque(req.Context(), opaque)
	switch {
	case errors.Is(err, tokens.ErrOpaqueExpired):
		return refuse(http.StatusUnauthorized, codeTokenExpired, "expired", "access_token expired")
	case errors.Is(err, tokens.ErrOpaqueUnknown):
		return refuse(http.StatusUnauthorized, codeInvalidCredential, "credentials",
			"invalid credential, access_token is invalid or not latest")
	case err != nil:
		return tokenRefusal(err, "", true)
	}
	if refused := a.holder(req, claims); refused != nil {
		return refused
	}
	if req.appid != "" && req.appid != claims.AppID {
		return refuse(http.StatusForbidden, codeUnauthorizedAPI, "appid",
			"api unauthorized: the access_token is for %s, not for %s", claims.AppID, req.appid)
	}
	req.appid = claims.AppID
	return nil
}

// holder finds the client that an opaque token was given to.
func (a *API) holder(req *apiRequest, claims tokens.OpaqueClaims) *apiRefusal {
	if claims.Client == "" { // given out under trust_loopback
		if !a.TrustLoopback || !isTrustedLoopback(req.Request) {
			return refuse(http.StatusForbidden, codeUnauthorizedAPI, "credentials", "api unauthorized: the access_token was for a caller on the gateway's machine")
		}
		req.client = loopbackClient
		return nil
	}
	owner, current := a.keys.holder(claims.Client, claims.KeyFingerprint)
	switch {
	case owner == nil:
		return refuse(http.StatusForbidden, codeUnauthorizedAPI, "credentials", "api unauthorized: there is no client %s any more", claims.Client)
	case !current:
		return refuse(http.StatusUnauthorized, codeTokenExpired, "credentials", "access_token expired: the key it was given for is no longer valid")
	}
	req.client, req.fingerprint = owner, claims.KeyFingerprint
	return nil
}

// admit checks a call that is for WeChat and gathers what the transport needs.
func (a *API) admit(req *apiRequest) (*apiCall, *apiRefusal) {
	if req.known.use == useLogin {
		return a.admitLogin(req)
	}
	query, err := splitQuery(req.URL.RawQuery)
	if err != nil {
		return nil, refuse(http.StatusBadRequest, codeInvalidArgs, "query", "%v", err)
	}
	credential, sole := query.sole()
	if !sole {
		return nil, refuse(http.StatusBadRequest, codeInvalidArgs, "query", "query has two different access_tokens")
	}
	if req.known.use == useUser {
		return a.admitUser(req, credential)
	}
	if refused := a.authenticate(req, credential); refused != nil {
		return nil, refused
	}
	if refused := a.mayCall(req); refused != nil {
		return nil, refused
	}
	call := &apiCall{query: query, param: req.known.param, singleUse: req.known.singleUse}
	if req.known.use == useNone {
		return call, nil
	}
	if req.appid == "" {
		return nil, refuse(http.StatusBadRequest, codeMissingAppID, "appid",
			"appid missing: put it before the path, as in /wx0123456789abcdef%s, or into %s", req.path, headerAppID)
	}
	key, refused := a.target(req.Context(), req.client, req.appid, req.known.use)
	if refused != nil {
		return nil, refused
	}
	call.key = key
	call.token, err = a.app.manager().Get(req.Context(), key)
	if err != nil {
		return nil, a.noToken(req, err)
	}
	return call, nil
}

// mayCall checks the path against the client's rules.
func (a *API) mayCall(req *apiRequest) *apiRefusal {
	switch {
	case req.known.answer == answerNever:
		return refuse(http.StatusForbidden, codeUnauthorizedAPI, "never forwarded",
			"api unauthorized: %s shows or uses up a secret that only the gateway holds, so the gateway calls it alone", req.path)
	case !req.client.mayCall(req.path):
		return forbiddenPath(req.client, req.path)
	}
	return nil
}

// noToken explains why a call gets no token, to the caller and, for who runs the gateway, in the log.
func (a *API) noToken(req *apiRequest, err error) *apiRefusal {
	if ok, missed := a.notReady.allow(); ok && req.Context().Err() == nil {
		a.logger.Warn("no token for a call", zap.String("client", req.client.Name), zap.String("appid", req.appid),
			zap.String("api", req.path), zap.Error(err), zap.Int("not_logged", missed))
	}
	return tokenRefusal(err, req.appid, req.form.sdk())
}

// admitUser checks a call that brings the user's own token, which stays where it is.
func (a *API) admitUser(req *apiRequest, userToken string) (*apiCall, *apiRefusal) {
	_, err := a.app.manager().OpenOpaque(req.Context(), userToken)
	switch {
	case errors.Is(err, tokens.ErrOpaqueUnknown):
	case err == nil || errors.Is(err, tokens.ErrOpaqueExpired):
		req.form = formOpaque
		return nil, refuse(http.StatusForbidden, codeUnauthorizedAPI, "token kind",
			"api unauthorized: %s takes the user's own access_token, from the login, not the account's", req.path)
	default:
		return nil, tokenRefusal(err, "", false)
	}
	if refused := a.authenticate(req, ""); refused != nil {
		return nil, refused
	}
	if refused := a.mayCall(req); refused != nil {
		return nil, refused
	}
	return &apiCall{query: apiQuery{before: req.URL.RawQuery}}, nil
}

// paramSecret is the parameter in which login calls take the account's secret.
const paramSecret = "secret"

// componentLogin is what a login call is called when a platform makes it for an authorizer.
var componentLogin = map[string]string{
	"/sns/jscode2session":      "/sns/component/jscode2session",
	"/sns/oauth2/access_token": "/sns/oauth2/component/access_token",
}

// admitLogin checks the exchange of a user's login code. The client's key stands in the place of the account's secret.
func (a *API) admitLogin(req *apiRequest) (*apiCall, *apiRefusal) {
	params, _ := url.ParseQuery(req.URL.RawQuery) // what cannot be decoded is not a parameter we look for
	query, err := splitQuery(req.URL.RawQuery, paramSecret, "component_appid")
	if err != nil {
		return nil, refuse(http.StatusBadRequest, codeInvalidArgs, "query", "%v", err)
	}
	if refused := a.authenticateSecret(req, params.Get(paramSecret)); refused != nil {
		return nil, refused
	}
	if refused := a.nameAppID(req, params.Get("appid")); refused != nil {
		return nil, refused
	}
	if refused := a.mayCall(req); refused != nil {
		return nil, refused
	}
	key, refused := a.target(req.Context(), req.client, req.appid, useAccount)
	if refused != nil {
		return nil, refused
	}
	call := &apiCall{query: query, singleUse: true}
	if params.Get("appid") == "" {
		call.extra = append(call.extra, queryParam{"appid", secret.New(req.appid)})
	}
	if key.Kind == tokens.KindAccount {
		call.extra = append(call.extra, queryParam{paramSecret, a.app.account(req.appid).secret})
		return call, nil
	}
	call.key, call.param = tokens.ComponentKey(key.Platform), paramComponent
	call.extra = append(call.extra, queryParam{"component_appid", secret.New(key.Platform)})
	req.path = componentLogin[strings.ToLower(req.path)]
	if call.token, err = a.app.manager().Get(req.Context(), call.key); err != nil {
		return nil, a.noToken(req, err)
	}
	return call, nil
}

// nameAppID takes the appid that a request has among its parameters; it must be the one of path and header, if any.
func (a *API) nameAppID(req *apiRequest, appid string) *apiRefusal {
	switch {
	case appid == "" && req.appid == "":
		return refuse(http.StatusOK, codeMissingAppID, "appid", "appid missing")
	case appid == "":
		return nil
	case !isAppID(appid), req.appid != "" && req.appid != appid:
		return refuse(http.StatusOK, codeInvalidAppID, "appid", "invalid appid")
	}
	req.appid = appid
	return nil
}

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

// announce tells placeholders and the access log who calls for whom.
func (a *API) announce(req *apiRequest) {
	ctx := req.Context()
	if repl, ok := ctx.Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok {
		repl.Set("wechat.client", req.client.Name)
		repl.Set("wechat.appid", req.appid)
	}
	if extra, ok := ctx.Value(caddyhttp.ExtraLogFieldsCtxKey).(*caddyhttp.ExtraLogFields); ok {
		extra.Add(zap.String("client", req.client.Name))
		extra.Add(zap.String("appid", req.appid))
	}
}

// refuse writes a refusal, counts it and logs it.
func (a *API) refuse(w http.ResponseWriter, req *apiRequest, refused *apiRefusal) error {
	status, name, outcome := refused.status, "", outcomeRefused
	if req.client != nil {
		name = req.client.Name
	}
	switch {
	case status == http.StatusUnauthorized || status == http.StatusForbidden:
		if req.form.sdk() {
			status = http.StatusOK
		} else if status == http.StatusUnauthorized {
			w.Header().Set("WWW-Authenticate", "Bearer")
		}
	case status == http.StatusMethodNotAllowed:
		w.Header().Set("Allow", "GET, HEAD, POST, PUT, PATCH, DELETE")
	case status >= http.StatusInternalServerError:
		outcome = outcomeUnreachable
	case status == http.StatusOK:
		outcome = outcomeUnavailable
	}
	a.app.metrics().apiRequests.WithLabelValues(name, outcome).Inc()
	level := zapcore.DebugLevel
	missed := 0
	if refused.rule == "credentials" {
		var ok bool
		if ok, missed = a.refused.allow(); ok {
			level = zapcore.WarnLevel
		}
	}
	if c := a.logger.Check(level, "call refused"); c != nil {
		c.Write(zap.String("client", name), zap.String("appid", req.appid), zap.String("api", req.path), zap.String("rule", refused.rule),
			zap.Int64("errcode", refused.code), zap.String("reason", refused.msg), zap.String("remote", req.RemoteAddr), zap.Int("not_logged", missed))
	}
	writeJSON(w, status, errorBody(refused.code, refused.msg))
	return nil
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

// damper lets one log line of a kind through per damperInterval and counts the others. The zero value is ready.
type damper struct {
	mu     sync.Mutex
	last   time.Time
	missed int
}

// allow reports whether to log, and how many lines were held back before.
func (d *damper) allow() (ok bool, missed int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if now := time.Now(); d.last.IsZero() || now.Sub(d.last) >= damperInterval {
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
