package caddymodule

import (
	"context"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

const (
	startTimeout    = 20 * time.Second // a component token on the way, and the pre-authorization code
	callbackTimeout = 40 * time.Second // a component token on the way, the exchange, and what the account shows of itself
)

// authorizeStep is which of its addresses a request is for; the values are the metric's labels.
type authorizeStep string

const (
	authorizePage     authorizeStep = "page"
	authorizeGo       authorizeStep = "go"
	authorizeCallback authorizeStep = "callback"
)

// The two sorts of WeChat's pages, as kind names them.
const (
	kindDesktop = "pc"
	kindMobile  = "h5"
)

// authorizeRequest is a request for one of the addresses, taken apart.
type authorizeRequest struct {
	step  authorizeStep
	below string // the path below the base
	named string // the platform's appid in the path
	// Filled in as the request is understood.
	at       place
	query    url.Values
	platform *Platform
	options  linkOptions
}

// place is where the handler is, as the visitor's browser sees it.
type place struct{ origin, base string }

func (p place) secure() bool { return strings.HasPrefix(p.origin, "https://") }

// linkOptions are what a link says beside the platform.
type linkOptions struct {
	kind       string // pc, h5 or empty
	authType   int    // 0: the one configured
	bizAppID   string
	categories []int
}

// platformID is the appid of the platform that the request is for, as far as that is known.
func (req *authorizeRequest) platformID() string {
	if req.platform == nil {
		return ""
	}
	return req.platform.AppID
}

// parse takes a path apart; nil: it is none of the handler's.
func (a *Authorize) parse(path string) *authorizeRequest {
	below, ok := strings.CutPrefix(path, a.base)
	if !ok {
		return nil
	}
	req := &authorizeRequest{below: below}
	switch {
	case below == "", below == "/":
		req.step = authorizePage
	case below == "/go":
		req.step = authorizeGo
	case strings.HasPrefix(below, "/callback/"):
		req.step, req.named = authorizeCallback, strings.TrimPrefix(below, "/callback/")
	case below[0] == '/' && isAppID(below[1:]):
		req.step, req.named = authorizePage, below[1:]
	default:
		return nil
	}
	return req
}

// ServeHTTP serves the addresses and passes everything else on.
func (a *Authorize) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	req := a.parse(r.URL.Path)
	if req == nil {
		return next.ServeHTTP(w, r)
	}
	started := time.Now()
	result, failure := a.serve(w, r, req)
	a.app.feedStep(feedAuthorization, string(req.step), started, "", req.platformID(), outcomeOK, failure)
	if failure == nil {
		a.count(req.step, result)
		return nil
	}
	a.count(req.step, failure.result)
	a.log(req, failure)
	failure.setHeaders(w.Header())
	p := failure.page
	if req.platform != nil && !p.again {
		p.restart = req.pageAddress(a, false)
	}
	p.write(w, r)
	return nil
}

// serve answers a request and says with what result, unless it fails.
func (a *Authorize) serve(w http.ResponseWriter, r *http.Request, req *authorizeRequest) (result string, failure *oauthFailure) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return "", failMethod
	}
	var ok bool
	if req.query, ok = authorizeQuery(r.URL.RawQuery); !ok {
		return "", failAuthorizeQuery
	}
	if req.at, ok = a.whereabouts(r, req.below); !ok {
		return "", failAuthorizeQuery
	}
	named := req.named
	if req.step == authorizeGo {
		named = req.query.Get("platform")
	}
	if req.platform = a.platform; named != "" || req.step == authorizeCallback {
		if req.platform = a.app.platform(named); req.platform == nil {
			return "", failAuthorizePlatform
		}
	}
	if req.step == authorizeCallback {
		return a.arrive(w, r, req)
	}
	options, ok := a.readOptions(req.query)
	if !ok { // nothing of them goes into the page's link to start again
		return "", failAuthorizeQuery
	}
	req.options = options
	if req.step == authorizePage {
		return a.show(w, r, req)
	}
	return a.start(w, r, req)
}

// authorizeQuery reads a query, in which nothing that we look at may come twice.
func authorizeQuery(raw string) (url.Values, bool) {
	query, err := url.ParseQuery(raw)
	if err != nil {
		return nil, false
	}
	for _, name := range []string{"kind", "platform", "auth_type", "biz_appid", "category", "auth_code", "expires_in", stateParameter} {
		if len(query[name]) > 1 {
			return nil, false
		}
	}
	return query, true
}

// categoryShape is a list of permission sets, joined as in WeChat's own links or by commas, which need no escape.
var categoryShape = regexp.MustCompile(`^[0-9]{1,4}([,|][0-9]{1,4})*$`)

// readOptions judges what a link says.
func (a *Authorize) readOptions(query url.Values) (o linkOptions, ok bool) {
	o.kind, o.bizAppID = query.Get("kind"), query.Get("biz_appid")
	if o.kind != "" && o.kind != kindDesktop && o.kind != kindMobile || o.bizAppID != "" && !isAppID(o.bizAppID) {
		return o, false
	}
	if text := query.Get("auth_type"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil || !narrows(n, a.AuthType) {
			return o, false
		}
		o.authType = n
	}
	if text := query.Get("category"); text != "" {
		if !categoryShape.MatchString(text) {
			return o, false
		}
		for one := range strings.FieldsFuncSeq(text, func(c rune) bool { return c == ',' || c == '|' }) {
			id, _ := strconv.Atoi(one) // of the shape
			if !slices.Contains(o.categories, id) {
				o.categories = append(o.categories, id)
			}
		}
	}
	return o, len(o.categories) <= maxCategories
}

// whereabouts is where the handler is: the path is the one of the original request, before handle_path or a rewrite took
// something away.
func (a *Authorize) whereabouts(r *http.Request, below string) (at place, ok bool) {
	at.base = a.base
	if at.origin, ok = originOf(a.origin, r); !ok {
		return at, false
	}
	if original := originalPath(r); strings.HasSuffix(original, a.base+below) {
		// Two slashes at the beginning would make a host of what follows, in links of ours.
		base := "/" + strings.TrimLeft(strings.TrimSuffix(original, below), "/")
		at.base = (&url.URL{Path: strings.TrimSuffix(base, "/")}).EscapedPath()
	}
	return at, true
}

// optionsQuery writes the options of a link as they were read.
func (req *authorizeRequest) optionsQuery() string {
	o := req.options
	var b strings.Builder
	if o.authType != 0 {
		b.WriteString("&auth_type=" + strconv.Itoa(o.authType))
	}
	if o.bizAppID != "" {
		b.WriteString("&biz_appid=" + o.bizAppID)
	}
	for i, id := range o.categories {
		if i == 0 {
			b.WriteString("&category=")
		} else {
			b.WriteString(",")
		}
		b.WriteString(strconv.Itoa(id))
	}
	return b.String()
}

// startAddress is the link that starts an authorization, without an origin.
func (req *authorizeRequest) startAddress(a *Authorize, kind string) string {
	address := req.at.base + "/go?kind=" + kind
	if req.platform != a.platform {
		address += "&platform=" + req.platform.AppID
	}
	return address + req.optionsQuery()
}

// pageAddress is the page on which one can start, without the request's host unless another one is configured. Keep
// says that the page is to show the request's kind alone.
func (req *authorizeRequest) pageAddress(a *Authorize, keep bool) string {
	address := a.origin + req.at.base
	if req.platform != a.platform {
		address += "/" + req.platform.AppID
	} else if req.at.base == "" {
		address += "/"
	}
	query := req.optionsQuery()
	if keep && req.options.kind != "" {
		query += "&kind=" + req.options.kind
	}
	if query != "" {
		address += "?" + query[1:]
	}
	return address
}

// start makes a fresh link and redirects to it.
func (a *Authorize) start(w http.ResponseWriter, r *http.Request, req *authorizeRequest) (result string, failure *oauthFailure) {
	if req.options.kind == "" {
		return "", failAuthorizeQuery
	}
	if answerLook(w, r) {
		return "look", nil
	}
	h := w.Header()
	if !fromHere(r, req.at.origin) {
		setPrivate(h)
		h.Set("Location", req.pageAddress(a, true))
		w.WriteHeader(http.StatusSeeOther)
		return "to_page", nil
	}
	if failure := a.app.authorizations().admit(r); failure != nil {
		return "", failure
	}
	ctx, cancel := context.WithTimeout(r.Context(), startTimeout)
	defer cancel()
	cookie := markBrowser(w, r, req.at)
	state, err := a.newState(ctx, cookie, req)
	if err != nil {
		return "", startFailure(err)
	}
	link, err := a.app.manager().AuthorizationLink(ctx, tokens.AuthorizationLink{
		Platform: req.platform.AppID, Mobile: req.options.kind == kindMobile, AuthType: a.authType(req.options),
		AppID: req.options.bizAppID, Categories: req.options.categories,
		Redirect: req.at.origin + req.at.base + "/callback/" + req.platform.AppID + "?" + stateParameter + "=" + state.Reveal(),
	})
	if err != nil {
		return "", startFailure(err)
	}
	setPrivate(h)
	// A redirect goes on with the Referer of the page that was left, as far as this policy lets it.
	h.Set("Referrer-Policy", showOrigin)
	h.Set("Location", link.Reveal())
	w.WriteHeader(http.StatusFound) // without a body: http.Redirect's would repeat the location
	return "ok", nil
}

func (a *Authorize) authType(o linkOptions) int {
	if o.authType != 0 {
		return o.authType
	}
	return a.AuthType
}

// answerLook answers who only looks, and must use no code up: HEAD, and a browser that fetches what may be clicked. The
// latter is refused, so that it asks again at the click.
func answerLook(w http.ResponseWriter, r *http.Request) bool {
	status := http.StatusServiceUnavailable
	switch {
	case r.Method == http.MethodHead:
		status = http.StatusNoContent
	case isPrefetch(r.Header):
	default:
		return false
	}
	setPrivate(w.Header())
	w.WriteHeader(status)
	return true
}

// isPrefetch tells requests that nobody clicked for, by the headers that browsers have had for it.
func isPrefetch(h http.Header) bool {
	for _, name := range []string{"Sec-Purpose", "Purpose", "X-Purpose", "X-Moz"} {
		if v := strings.ToLower(h.Get(name)); strings.HasPrefix(v, "prefetch") || strings.HasPrefix(v, "prerender") || strings.HasPrefix(v, "preview") {
			return true
		}
	}
	return false
}

// fromHere reports whether WeChat will see that the visitor comes from here, as far as the browser says. One that says
// nothing is believed.
func fromHere(r *http.Request, origin string) bool {
	if u, err := url.Parse(r.Referer()); err == nil && u.Host != "" {
		return strings.EqualFold(u.Host, hostInReferer(origin))
	}
	site := r.Header.Get("Sec-Fetch-Site")
	return site == "" || site == "same-origin"
}

// hostInReferer is an origin's host as browsers have it, without the scheme's own port.
func hostInReferer(origin string) string {
	if host, ok := strings.CutPrefix(origin, "https://"); ok {
		return strings.TrimSuffix(host, ":443")
	}
	return strings.TrimSuffix(strings.TrimPrefix(origin, "http://"), ":80")
}

// arrive takes what WeChat sends the owner back with.
func (a *Authorize) arrive(w http.ResponseWriter, r *http.Request, req *authorizeRequest) (result string, failure *oauthFailure) {
	if answerLook(w, r) {
		return "look", nil
	}
	state, failure := a.readState(r, req, secret.New(req.query.Get(stateParameter)))
	if failure != nil {
		return "", failure
	}
	code := secret.New(req.query.Get("auth_code"))
	if code.IsZero() || len(code.Reveal()) > maxCode {
		return "", failNoAuthCode
	}
	got, failure := a.app.authorizations().once(r.Context(), state.id, code, func(ctx context.Context) (*authorized, *oauthFailure) {
		return a.exchange(ctx, req, state, code)
	})
	if failure != nil {
		return "", failure
	}
	if a.then == "" {
		got.write(w, r)
		return "ok", nil
	}
	setPrivate(w.Header())
	w.Header().Set("Location", a.goOn(got.appid))
	w.WriteHeader(http.StatusFound)
	return "ok", nil
}

// exchange exchanges the code of a callback, and learns about the account where it will be shown.
func (a *Authorize) exchange(ctx context.Context, req *authorizeRequest, state authorizeState, code secret.String) (*authorized, *oauthFailure) {
	life, _ := strconv.Atoi(req.query.Get("expires_in")) // what is no number of seconds is the usual hour
	life = min(max(life, 0), int(time.Hour/time.Second))
	account, err := a.app.manager().ExchangeRedirected(ctx, req.platform.AppID, code, time.Duration(life)*time.Second)
	if err != nil {
		return nil, exchangeFailure(err)
	}
	got := &authorized{appid: account.AppID, asked: state.categories, granted: account.FuncInfo}
	if a.then != "" {
		return got, nil
	}
	info, err := a.app.manager().FetchAccountInfo(ctx, req.platform.AppID, account.AppID)
	if err != nil {
		a.logger.Warn("the account's name and picture are missing: WeChat did not give them",
			append(causeFields(err), zap.String("platform", req.platform.AppID), zap.String("appid", account.AppID))...)
		return got, nil
	}
	got.learn(info)
	return got, nil
}

func (a *Authorize) count(step authorizeStep, result string) {
	a.app.metrics().authorize.WithLabelValues(string(step), result).Inc()
}

// log writes the one line of an authorization that ended on a page. Codes and states stay out of it.
func (a *Authorize) log(req *authorizeRequest, failure *oauthFailure) {
	fields := []zap.Field{zap.String("step", string(req.step)), zap.String("reason", failure.reason), zap.String("remedy", failure.remedy)}
	if req.platform != nil {
		fields = append(fields, zap.String("platform", req.platform.AppID))
	}
	if failure.cause != nil {
		fields = append(fields, causeFields(failure.cause)...)
	}
	a.logger.Log(failure.level, "authorization of a platform ended on an error page", fields...)
}
