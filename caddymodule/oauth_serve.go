package caddymodule

import (
	"context"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// What comes with requests.
const (
	authorizePath = "/connect/oauth2/authorize" // of WeChat's pages
	maxState      = 128                         // bytes; WeChat's own limit
	maxCode       = 512                         // bytes; real ones have 32
)

// atParameter says atOrigin in a start that the gateway has sent from another of its names to the one that WeChat will
// send the visitor back to.
const (
	atParameter = "at"
	atOrigin    = "origin"
)

// oauthStep is which of its addresses a request is for; the values are the metric's labels.
type oauthStep string

const (
	stepAuthorize oauthStep = "authorize"
	stepCallback  oauthStep = "callback"
	stepRedeem    oauthStep = "redeem"
	stepUserInfo  oauthStep = "userinfo"
)

// oauthRequest is a request for one of the addresses, taken apart.
type oauthRequest struct {
	step    oauthStep
	named   string // the appid in the path; empty for the extra callback address
	funcKey string
	// Filled in as the request is understood.
	appid    string // the account whose user it is
	platform string // acts for the account; empty for a plain account
	f        *Func
}

// parse takes a path apart; nil: it is none of the handler's.
func (o *OAuth) parse(path string) *oauthRequest {
	if rest, ok := strings.CutPrefix(path, o.base+"/authorize/"); ok {
		named, key, _ := strings.Cut(rest, "/")
		return &oauthRequest{step: stepAuthorize, named: named, funcKey: key}
	}
	if rest, ok := strings.CutPrefix(path, o.base+"/authUserReceive/"); ok {
		named, key, _ := strings.Cut(rest, "/")
		return &oauthRequest{step: stepCallback, named: named, funcKey: key}
	}
	if o.Callback == "" {
		return nil
	}
	if key, ok := strings.CutPrefix(path, strings.TrimSuffix(o.Callback, "/")+"/"); ok {
		return &oauthRequest{step: stepCallback, named: o.platform.AppID, funcKey: key}
	}
	return nil
}

// ServeHTTP serves the addresses and passes everything else on.
func (o *OAuth) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	req := o.parse(r.URL.Path)
	if req == nil {
		return next.ServeHTTP(w, r)
	}
	started := time.Now()
	answer, failure := o.serve(r, req)
	o.app.feedStep(feedLogin, string(req.step), started, req.appid, req.platform, outcomeOK, failure)
	if failure != nil {
		failure.setHeaders(w.Header())
		o.count(req.step, failure.result)
		o.log(req, failure)
		failure.page.write(w, r)
		return nil
	}
	o.count(req.step, "ok")
	setPrivate(w.Header())
	for _, c := range answer.cookies {
		http.SetCookie(w, c)
	}
	if answer.location != "" {
		w.Header().Set("Location", answer.location)
	}
	w.WriteHeader(answer.status) // without a body: http.Redirect's would repeat the location
	return nil
}

// oauthAnswer is an answer that is not a page.
type oauthAnswer struct {
	status   int
	location string // empty: none
	cookies  []*http.Cookie
}

// serve finds out what to answer.
func (o *OAuth) serve(r *http.Request, req *oauthRequest) (oauthAnswer, *oauthFailure) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return oauthAnswer{}, failMethod
	}
	if req.f = o.funcs[req.funcKey]; req.f == nil {
		return oauthAnswer{}, failUnknownFunc
	}
	query, ok := oauthQuery(r.URL.RawQuery)
	if !ok || len(query.Get("state")) > maxState {
		return oauthAnswer{}, failQuery
	}
	if req.step == stepAuthorize {
		return o.authorize(r, req, query)
	}
	if failure := o.whose(req, query); failure != nil {
		return oauthAnswer{}, failure
	}
	if r.Method == http.MethodHead {
		return oauthAnswer{status: http.StatusNoContent}, nil // whoever only looks must not use the code up
	}
	f, failure := o.endOfFlow(r, req, query)
	if failure != nil {
		return oauthAnswer{}, failure
	}
	location, err := o.login(r, req, query.Get("code"), f)
	if err != nil {
		return oauthAnswer{}, loginFailure(err)
	}
	// The flow's cookie stays until it ends: the browser may repeat this request.
	return oauthAnswer{status: req.f.RedirectStatus, location: location}, nil
}

// oauthQuery reads a query, in which nothing that we look at may come twice. A semicolon is a character of a value, as
// it is to browsers: a menu's state may have one.
func oauthQuery(raw string) (url.Values, bool) {
	query, err := url.ParseQuery(strings.ReplaceAll(raw, ";", "%3B"))
	if err != nil {
		return nil, false
	}
	for _, name := range []string{"appid", "code", "scope", "state"} {
		if len(query[name]) > 1 {
			return nil, false
		}
	}
	return query, true
}

// authorize begins a login and sends the visitor to WeChat's page. WeChat documents the order of the parameters, and
// that they are compared, so the URL is built as text.
func (o *OAuth) authorize(r *http.Request, req *oauthRequest, query url.Values) (answer oauthAnswer, failure *oauthFailure) {
	if failure = o.starts(req); failure != nil {
		return answer, failure
	}
	scope, state := query.Get("scope"), query.Get("state")
	if scope == "" {
		scope = req.f.Scope
	}
	if !validScope(scope) {
		return answer, failQuery
	}
	to, ok := o.callbackFor(r, req)
	if !ok {
		return answer, failQuery
	}
	answer.status = http.StatusFound
	if seen, ok := visitorOrigin(r); (!ok || !strings.EqualFold(seen, to.origin)) && query.Get(atParameter) != atOrigin {
		// The cookie would stay behind at this name. Asked once: a proxy may show us another name than the browser sees.
		start := callbackAddress{origin: to.origin, path: to.base + "/authorize/" + req.named + "/" + req.funcKey}
		answer.location = start.url() + "?" + url.Values{"scope": {scope}, "state": {state}, atParameter: {atOrigin}}.Encode()
		return answer, nil
	}
	wireState, cookies, err := o.beginFlow(r, to, req.appid, state)
	if err != nil {
		return answer, flowFailure(err)
	}
	answer.cookies = cookies

	var b strings.Builder
	b.WriteString(o.app.openOrigin() + authorizePath)
	b.WriteString("?appid=" + req.appid)
	b.WriteString("&redirect_uri=" + url.QueryEscape(to.url()))
	b.WriteString("&response_type=code&scope=" + scope)
	b.WriteString("&state=" + wireState)
	if req.platform != "" {
		b.WriteString("&component_appid=" + req.platform)
	}
	b.WriteString("#wechat_redirect")
	answer.location = b.String()
	return answer, nil
}

// starts finds out which account a login is to begin for, and who acts for it.
func (o *OAuth) starts(req *oauthRequest) *oauthFailure {
	if !isAppID(req.named) {
		return failUnknownAppID
	}
	req.appid = req.named
	switch {
	case o.app.account(req.appid) != nil:
	case o.app.platform(req.appid) != nil:
		return failPlatformLink
	case o.platform == nil && len(o.app.Platforms) > 0:
		return failWhichPlatform
	case o.platform == nil:
		return failUnknownAppID
	default:
		req.platform = o.platform.AppID
	}
	if !req.f.allows(req.appid) {
		return failNotAllowed
	}
	return nil
}

// callbackFor is the callback address to give to WeChat: what the visitor's browser must ask for, so the path is the
// one of the original request, before handle_path or a rewrite took something away.
func (o *OAuth) callbackFor(r *http.Request, req *oauthRequest) (to callbackAddress, ok bool) {
	if to.origin, ok = originOf(o.origin, r); !ok {
		return to, false
	}
	to.base = o.base
	if outer, ok := strings.CutSuffix(originalPath(r), "/authorize/"+req.named+"/"+req.funcKey); ok {
		to.base = outer
	}
	receiver := req.platform
	if receiver == "" {
		receiver = req.appid
	}
	to.path = to.base + "/authUserReceive/" + receiver + "/" + req.funcKey
	return to, true
}

// originOf is the origin of callback addresses: the configured one, or else the visitor's.
func originOf(configured string, r *http.Request) (origin string, ok bool) {
	if configured != "" {
		return configured, true
	}
	return visitorOrigin(r)
}

// visitorOrigin is the scheme and host that the visitor's browser sees, as far as can be told here.
func visitorOrigin(r *http.Request) (origin string, ok bool) {
	return visitorScheme(r) + "://" + r.Host, hostShape.MatchString(r.Host)
}

// originalPath is the path of the request as it came in.
func originalPath(r *http.Request) string {
	if original, ok := r.Context().Value(caddyhttp.OriginalRequestCtxKey).(http.Request); ok && original.URL != nil {
		return original.URL.Path
	}
	return r.URL.Path
}

// visitorScheme is the scheme that the visitor's browser sees. A proxy in front that ends TLS says so, and is believed
// if it is one of the server's trusted_proxies. Several of them make a list, which begins with what the visitor's browser speaks.
func visitorScheme(r *http.Request) string {
	if r.TLS != nil {
		return "https"
	}
	if trusted, _ := caddyhttp.GetVar(r.Context(), caddyhttp.TrustedProxyVarKey).(bool); trusted {
		if first, _, _ := strings.Cut(r.Header.Get("X-Forwarded-Proto"), ","); strings.EqualFold(strings.TrimSpace(first), "https") {
			return "https"
		}
	}
	return "http"
}

// whose finds out which account a callback is for, and whether it brings a code.
func (o *OAuth) whose(req *oauthRequest, query url.Values) *oauthFailure {
	switch {
	case o.app.platform(req.named) != nil:
		req.platform = req.named
		if appid := query.Get("appid"); isAppID(appid) {
			req.appid = appid
		}
	case o.app.account(req.named) != nil:
		req.appid = req.named
	default:
		return failUnknownAppID
	}
	switch code := query.Get("code"); {
	case code == "":
		return failDenied // WeChat then sends the state alone, without the account
	case len(code) > maxCode:
		return failQuery
	case req.appid == "":
		return failCallbackAppID
	case !req.f.allows(req.appid):
		return failNotAllowed
	}
	return nil
}

// login exchanges the code of a callback, or joins the same callback's exchange, and returns where to send the visitor.
func (o *OAuth) login(r *http.Request, req *oauthRequest, code string, f *flow) (location string, err error) {
	callback := tokens.Callback{Code: secret.New(code), Path: originalPath(r), AppID: req.appid, Flow: f.id}
	visitor := oneVisitorOf(r)
	return o.app.users().Login(r.Context(), callback, func(ctx context.Context) (string, error) {
		leave, err := o.admit(ctx, visitor, req)
		if err != nil {
			return "", err
		}
		defer leave()
		grant, err := o.app.manager().ExchangeUserCode(ctx, tokens.UserCode{Platform: req.platform, AppID: req.appid, Code: callback.Code})
		if err != nil {
			o.charge(visitor, req, err)
			return "", o.blamed(ctx, req, err)
		}
		user := tokens.User{
			AppID: req.appid, Platform: req.platform, OpenID: grant.OpenID, UnionID: grant.UnionID, Scope: grant.Scope,
			FuncKey: req.f.Key, State: f.state, Snapshot: grant.Snapshot,
		}
		if hasScope(grant.Scope, scopeUserInfo) {
			o.addProfile(ctx, req, grant, &user)
		}
		id := o.app.users().Keep(ctx, user, grant, time.Duration(req.f.TTL), req.f.Once)
		return req.f.target(id, user.State), nil
	})
}

// addProfile fetches what the user agreed to show. A login without it is still a login.
func (o *OAuth) addProfile(ctx context.Context, req *oauthRequest, grant tokens.UserGrant, user *tokens.User) {
	profile, err := o.app.manager().UserInfo(ctx, grant, tokens.DefaultUserLang)
	if err != nil {
		o.logger.Warn("the user's profile is missing: WeChat did not give it",
			append(causeFields(err), zap.String("appid", req.appid), zap.String("func", req.f.Key))...)
		return
	}
	user.Profile = &profile
	if user.UnionID == "" {
		user.UnionID = profile.UnionID
	}
}

func (o *OAuth) count(step oauthStep, result string) {
	o.app.metrics().oauth.WithLabelValues(string(step), result).Inc()
}

// log writes the one line of a login that ended on a page, unless there was one a moment ago of what strangers can cause
// without end. The code, the state and a funcKey that nobody configured stay out of it.
func (o *OAuth) log(req *oauthRequest, failure *oauthFailure) {
	fields := []zap.Field{zap.String("step", string(req.step)), zap.String("reason", failure.reason), zap.String("remedy", failure.remedy)}
	if failure.damped && req.f != nil {
		ok, missed := req.f.dampers[failure.result].allow()
		if !ok {
			return
		}
		fields = append(fields, zap.Int("not_logged", missed))
	}
	if req.appid != "" {
		fields = append(fields, zap.String("appid", req.appid))
	}
	if req.platform != "" {
		fields = append(fields, zap.String("platform", req.platform))
	}
	if req.f != nil {
		fields = append(fields, zap.String("func", req.f.Key))
	}
	if failure.cause != nil {
		fields = append(fields, causeFields(failure.cause)...)
	}
	o.logger.Log(failure.level, "web authorization ended on an error page", fields...)
}
