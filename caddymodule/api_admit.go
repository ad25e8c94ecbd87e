package caddymodule

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"time"

	"go.opentelemetry.io/otel/trace"
	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

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
	w           http.ResponseWriter // of which the body's deadline is
	bodyWait    time.Duration       // for a body of whom nobody knows yet
	appid       string              // whom the path or the header names
	path        string              // canonical, without the appid
	known       apiPath
	form        callForm
	platform    string // of the authorizer appid, if the caller's token was given out for that one
	client      *Client
	fingerprint string  // of the client's key
	call        apiCall // what admit made of it
	passing     callContext

	// For the feed, and for who traces requests.
	started time.Time
	entry   Entry
	span    trace.Span // nil: this one is not traced
}

// clientName is the client's, or empty while there is none.
func (req *apiRequest) clientName() string {
	if req.client == nil {
		return ""
	}
	return req.client.Name
}

// speaksSDK reports whether the caller does as SDKs do, which read errors from HTTP 200 only.
func (req *apiRequest) speaksSDK() bool {
	if req.form != formNone {
		return req.form.sdk()
	}
	return len(req.Header["Authorization"]) == 0 && (isGrant(req.known.answer) ||
		len(paramValues(req.URL.RawQuery, credentialParams...)) > 0 || len(paramValues(req.URL.RawQuery, secretParams...)) > 0)
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
	claims, err := lasting(a.app, func(m *tokens.Manager) (tokens.OpaqueClaims, error) { return m.OpenOpaque(req.Context(), opaque) })
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
	req.appid, req.platform = claims.AppID, claims.Platform
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
	switch req.known.use {
	case useLogin:
		return a.admitLogin(req)
	case useUser:
		return a.admitUser(req)
	}
	query, refused := a.enter(req)
	if refused != nil {
		return nil, refused
	}
	call := &req.call
	call.query, call.param, call.singleUse = query, req.known.param, req.known.singleUse
	if req.known.use == useNone {
		return call, nil
	}
	if req.appid == "" {
		return nil, missingAppID(req)
	}
	key, refused := a.target(req, req.known.use)
	if refused != nil {
		return nil, refused
	}
	call.key = key
	var err error
	call.token, err = a.app.token(req.Context(), key)
	if err != nil {
		return nil, a.noToken(req, err)
	}
	return call, nil
}

// readQuery reads a call's query and the one credential in it.
func readQuery(req *apiRequest) (query apiQuery, credential string, refused *apiRefusal) {
	query, err := splitQuery(req.URL.RawQuery)
	if err != nil {
		return query, "", refuse(http.StatusBadRequest, codeInvalidArgs, "query", "%v", err)
	}
	credential, sole := query.sole()
	if !sole {
		return query, "", refuse(http.StatusBadRequest, codeInvalidArgs, "query", "query has two different access_tokens")
	}
	return query, credential, nil
}

// enter finds out who makes a call and whether the client may call the path.
func (a *API) enter(req *apiRequest) (apiQuery, *apiRefusal) {
	query, credential, refused := readQuery(req)
	if refused != nil {
		return query, refused
	}
	if refused := a.authenticate(req, credential); refused != nil {
		return query, refused
	}
	return query, a.mayCall(req)
}

func missingAppID(req *apiRequest) *apiRefusal {
	return refuse(http.StatusBadRequest, codeMissingAppID, "appid",
		"appid missing: put it before the path, as in /wx0123456789abcdef%s, or into %s", req.path, headerAppID)
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
			zap.String("api", req.loggedPath()), zap.Error(err), zap.Int("not_logged", missed))
	}
	return tokenRefusal(err, req.appid, req.form.sdk())
}

// admitUser checks a call that brings the user's own token. It needs no client, but who names one must be it. Where there is none at all
// trust_loopback alone opens this listener, as for every other call.
func (a *API) admitUser(req *apiRequest) (*apiCall, *apiRefusal) {
	query, userToken, refused := readQuery(req)
	if refused != nil {
		return nil, refused
	}
	call := &req.call
	call.query = query
	if req.known.param == paramRefresh {
		userToken, _ = soleOf(paramValues(req.URL.RawQuery, paramRefresh))
	} else if userToken != "" {
		if strings.Contains(query.rawCredential, ";") {
			return nil, refuse(http.StatusBadRequest, codeInvalidArgs, "query", "%v", errAPIQuery)
		}
		call.extra = []queryParam{{paramAccess, secret.New(query.rawCredential)}}
	}
	_, err := lasting(a.app, func(m *tokens.Manager) (tokens.OpaqueClaims, error) { return m.OpenOpaque(req.Context(), userToken) })
	switch {
	case errors.Is(err, tokens.ErrOpaqueUnknown):
	case err == nil || errors.Is(err, tokens.ErrOpaqueExpired):
		req.form = formOpaque
		return nil, refuse(http.StatusForbidden, codeUnauthorizedAPI, "token kind",
			"api unauthorized: %s takes the user's own token, from the login, not the account's", req.path)
	default:
		return nil, tokenRefusal(err, "", false)
	}
	if len(req.Header["Authorization"]) > 0 || len(a.keys) == 0 {
		if refused := a.authenticate(req, ""); refused != nil {
			return nil, refused
		}
		if refused := a.mayCall(req); refused != nil {
			return nil, refused
		}
	}
	if userToken == "" {
		return nil, refuse(http.StatusBadRequest, codeMissingToken, "user token", "%s missing: %s takes the user's own", req.known.param, req.path)
	}
	return call, nil
}

// Parameters of login calls.
const (
	paramSecret         = "secret" // the account's
	paramAppID          = "appid"
	paramComponentAppID = "component_appid"
)

// componentLogin is what a login call is called when a platform makes it for an authorizer.
var componentLogin = map[string]string{
	"/sns/jscode2session":      "/sns/component/jscode2session",
	"/sns/oauth2/access_token": "/sns/oauth2/component/access_token",
}

// admitLogin checks the exchange of a user's login code. The client's key stands in the place of the account's secret.
func (a *API) admitLogin(req *apiRequest) (*apiCall, *apiRefusal) {
	query, appid, key, refused := readLogin(req)
	if refused != nil {
		return nil, refused
	}
	if refused := a.authenticateSecret(req, key); refused != nil {
		return nil, refused
	}
	if refused := a.nameAppID(req, appid); refused != nil {
		return nil, refused
	}
	if refused := a.mayCall(req); refused != nil {
		return nil, refused
	}
	whose, refused := a.target(req, useAccount)
	if refused != nil {
		return nil, refused
	}
	call := &req.call
	call.query, call.singleUse, call.extra = query, true, []queryParam{{paramAppID, secret.New(req.appid)}}
	if whose.Kind == tokens.KindAccount {
		call.extra = append(call.extra, queryParam{paramSecret, a.app.account(req.appid).secret})
		return call, nil
	}
	call.key, call.param = tokens.ComponentKey(whose.Platform), paramComponent
	call.extra = append(call.extra, queryParam{paramComponentAppID, secret.New(whose.Platform)})
	req.path = componentLogin[strings.ToLower(req.path)]
	var err error
	if call.token, err = a.app.token(req.Context(), call.key); err != nil {
		return nil, a.noToken(req, err)
	}
	return call, nil
}

// readLogin reads a login call: the query that is left for WeChat, the appid and the client's key. Whose login it is
// must be in one place, where the gateway checks it: every reading of the request must find the same account.
func readLogin(req *apiRequest) (query apiQuery, appid, key string, refused *apiRefusal) {
	if req.Method != http.MethodGet && req.Method != http.MethodPost || req.hasBody() {
		return query, "", "", refuse(http.StatusOK, codeNeedGET, "method", "require GET method, with all parameters in the query")
	}
	raw := req.URL.RawQuery
	if strings.Contains(raw, ";") {
		return query, "", "", refuse(http.StatusBadRequest, codeInvalidArgs, "query", "query has a semicolon: separate parameters with &")
	}
	query, err := splitQuery(raw, paramAppID, paramComponentAppID)
	if err != nil {
		return query, "", "", refuse(http.StatusBadRequest, codeInvalidArgs, "query", "%v", err)
	}
	appid, one := soleOf(paramValues(raw, paramAppID))
	key, oneKey := soleOf(paramValues(raw, paramSecret))
	if !one || !oneKey {
		return query, "", "", refuse(http.StatusBadRequest, codeInvalidArgs, "query", "query has several appids or secrets")
	}
	return query, ownAppID(req.Request, appid), key, nil
}

// hasBody reports whether a request brings a body. Where no length says so, only its beginning or its end does: over HTTP/3
// no request without a body has one. Of a body that is there, a byte is gone then, and what does not come in time is one.
func (req *apiRequest) hasBody() bool {
	if req.ContentLength >= 0 || req.Body == nil {
		return req.ContentLength > 0
	}
	setBodyDeadline(req.w, req.Request, req.bodyWait) // nobody has proved anything yet
	_, err := io.ReadFull(req.Body, make([]byte, 1))
	if err != io.EOF {
		return true
	}
	endBodyDeadline(req.w, req.Request)
	return false
}

// nameAppID takes the appid that a request has among its parameters; it must be the one of path and header, if any.
func (a *API) nameAppID(req *apiRequest, appid string) *apiRefusal {
	switch {
	case appid == "" && req.appid == "":
		return refuse(http.StatusOK, codeMissingAppID, "appid", "appid missing")
	case appid == "":
		return nil
	case !isAppID(appid):
		return refuse(http.StatusOK, codeInvalidAppID, "appid", "invalid appid: want %s", appIDShape)
	case req.appid != "" && req.appid != appid:
		return refuse(http.StatusOK, codeInvalidAppID, "appid", "invalid appid: path or header and the request's parameters name different ones")
	}
	req.appid = appid
	return nil
}
