package caddymodule

import (
	"encoding/json"
	"io"
	"mime"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

const (
	// opaqueLife is the expires_in of an opaque token, in seconds. SDKs subtract up to 1500 from it, and one that is
	// left with nothing asks for a token before each call.
	opaqueLife = 7200
	// opaqueGrace is for how long an opaque token is good beyond that, as WeChat's own are after a renewal.
	opaqueGrace = 5 * time.Minute
	// maxGrantBody bounds the body of a request for a token, in bytes.
	maxGrantBody = 64 << 10
	// grantBodyTimeout bounds the wait for all of it. Nobody has proved anything before it has come, and a byte now and then is enough
	// for the server's own limit, which is one for what stalls.
	grantBodyTimeout = 30 * time.Second
	// virtualRefreshToken is what a platform's SDK gets for a refresh token, if it has not brought one: the real ones
	// never leave the gateway, and the gateway needs none from the SDK.
	virtualRefreshToken = "virtual"
)

// grant is a request for a token, as SDKs make it. Unknown parameters are of no interest.
type grant struct {
	GrantType          string `json:"grant_type"`
	AppID              string `json:"appid"`
	Secret             string `json:"secret"` // the client's key
	ComponentAppID     string `json:"component_appid"`
	ComponentAppSecret string `json:"component_appsecret"` // the client's key
	AuthorizerAppID    string `json:"authorizer_appid"`
	RefreshToken       string `json:"authorizer_refresh_token"`
}

// isGrant reports whether the gateway answers a path with an opaque token.
func isGrant(k answerKind) bool {
	return k == answerToken || k == answerStableToken || k == answerComponentToken || k == answerAuthorizerToken
}

// serveGrant answers a request for a token with an opaque one.
func (a *API) serveGrant(w http.ResponseWriter, req *apiRequest) error {
	var body []byte
	asked, refused := readGrant(w, req, a.grantWait)
	if refused == nil {
		switch req.known.answer {
		case answerComponentToken:
			body, refused = a.grantComponent(req, asked)
		case answerAuthorizerToken:
			body, refused = a.grantAuthorizer(req, asked)
		default:
			body, refused = a.grantAccount(req, asked)
		}
	}
	if refused != nil {
		return a.refuse(w, req, refused)
	}
	a.announce(req)
	a.count(req, outcomeOK)
	writeJSON(w, http.StatusOK, body)
	return nil
}

// readGrant reads the parameters: of /cgi-bin/token from the query or a form, of all others from a JSON body, whatever
// the body's Content-Type says. The body has to come within so long.
func readGrant(w http.ResponseWriter, req *apiRequest, within time.Duration) (grant, *apiRefusal) {
	var asked grant
	if req.known.answer != answerToken && req.Method != http.MethodPost {
		return asked, refuse(http.StatusOK, codeNeedPOST, "method", "require POST method")
	}
	var body []byte
	if req.Method == http.MethodPost && req.Body != nil {
		began := time.Now()
		within = setBodyDeadline(w, req.Request, within)
		var err error
		body, err = io.ReadAll(http.MaxBytesReader(w, req.Body, maxGrantBody))
		switch {
		case err == nil && !endedEarly(int64(len(body)), req.ContentLength):
			endBodyDeadline(w, req.Request)
		case isTimeout(err):
			return asked, refuse(http.StatusRequestTimeout, http.StatusRequestTimeout, "body", "the request for a token did not come within %v",
				min(time.Since(began).Round(100*time.Millisecond), within)) // less: what stalls
		default:
			return asked, refuse(http.StatusRequestEntityTooLarge, http.StatusRequestEntityTooLarge, "body",
				"the request for a token is larger than %d bytes, or broke off", maxGrantBody)
		}
	}
	if req.known.answer == answerToken {
		params, _ := url.ParseQuery(req.URL.RawQuery) // what cannot be decoded is not a parameter we look for
		if kind, _, _ := mime.ParseMediaType(req.Header.Get("Content-Type")); kind == "application/x-www-form-urlencoded" {
			form, _ := url.ParseQuery(string(body))
			for name, values := range form {
				params[name] = append(params[name], values...)
			}
		}
		appid := strings.Clone(params.Get("appid")) // caches keep it, and not the query or form that it is a part of
		return grant{GrantType: params.Get("grant_type"), AppID: appid, Secret: params.Get(paramSecret)}, nil
	}
	if err := json.Unmarshal(body, &asked); err != nil { // the cause would quote the body
		return asked, refuse(http.StatusOK, codeInvalidJSON, "body", "data format error: want a JSON object")
	}
	return asked, nil
}

// authenticateSecret finds out which client calls when an SDK puts the client's key in the place of a secret. A caller
// that proves itself by Authorization, or by trust_loopback, needs no secret.
func (a *API) authenticateSecret(req *apiRequest, key string) *apiRefusal {
	if len(req.Header["Authorization"]) > 0 || key == "" {
		return a.authenticate(req, "")
	}
	req.form = formKey
	if req.client, req.fingerprint = a.keys.find(key); req.client != nil {
		return nil
	}
	if a.TrustLoopback && isTrustedLoopback(req.Request) {
		req.client = loopbackClient // who may do without a key, but whose SDK has to send some secret
		return nil
	}
	return refuse(http.StatusUnauthorized, codeInvalidAppSecret, "credentials", "invalid appsecret: it is not the key of a client of the gateway")
}

// grantAccount answers /cgi-bin/token and stable_token, for an account or an authorizer.
func (a *API) grantAccount(req *apiRequest, asked grant) ([]byte, *apiRefusal) {
	if refused := a.authenticateSecret(req, asked.Secret); refused != nil {
		return nil, refused
	}
	if asked.GrantType != "client_credential" {
		return nil, refuse(http.StatusOK, codeInvalidGrantType, "grant_type", "invalid grant_type: want client_credential")
	}
	if refused := a.nameAppID(req, asked.AppID); refused != nil {
		return nil, refused
	}
	if a.app.platform(req.appid) != nil {
		return nil, refuse(http.StatusOK, codeUseComponentToken, "token kind", "must use api_component_token to get a token for a component account")
	}
	token, refused := a.grant(req, useAccount)
	if refused != nil {
		return nil, refused
	}
	return tokenAnswer(paramAccess, token, ""), nil
}

// grantComponent answers api_component_token, for a platform that the client lists by name. The ticket that the SDK
// sends is of no interest: the gateway has the newest.
func (a *API) grantComponent(req *apiRequest, asked grant) ([]byte, *apiRefusal) {
	if refused := a.authenticateSecret(req, asked.ComponentAppSecret); refused != nil {
		return nil, refused
	}
	if refused := a.nameAppID(req, asked.ComponentAppID); refused != nil {
		return nil, refused
	}
	token, refused := a.grant(req, useComponent)
	if refused != nil {
		return nil, refused
	}
	return tokenAnswer(paramComponent, token, ""), nil
}

// grantAuthorizer answers api_authorizer_token, to who may act for the authorizer or for its platform.
func (a *API) grantAuthorizer(req *apiRequest, asked grant) ([]byte, *apiRefusal) {
	query, err := splitQuery(req.URL.RawQuery)
	credential, sole := query.sole()
	if err != nil || !sole {
		return nil, refuse(http.StatusBadRequest, codeInvalidArgs, "query", "query has more than one access_token")
	}
	if refused := a.authenticate(req, credential); refused != nil {
		return nil, refused
	}
	if refused := a.nameAppID(req, asked.ComponentAppID); refused != nil {
		return nil, refused
	}
	if a.app.platform(req.appid) == nil || !isAppID(asked.AuthorizerAppID) {
		return nil, refuse(http.StatusOK, codeInvalidAppID, "appid", "invalid appid: want component_appid and authorizer_appid")
	}
	platform := req.appid
	req.appid, req.platform = asked.AuthorizerAppID, platform
	token, refused := a.grant(req, useAccount)
	if refused != nil {
		return nil, refused
	}
	return tokenAnswer("authorizer_access_token", token, plainToken(asked.RefreshToken, virtualRefreshToken)), nil
}

// grant issues an opaque token for the request's appid, if the client may act for it and WeChat gives us a token.
func (a *API) grant(req *apiRequest, use tokenUse) (string, *apiRefusal) {
	key, refused := a.target(req, use)
	if refused != nil {
		return "", refused
	}
	if _, err := a.app.token(req.Context(), key); err != nil {
		return "", a.noToken(req, err)
	}
	claims := tokens.OpaqueClaims{
		Client: req.client.Name, KeyFingerprint: req.fingerprint, AppID: req.appid, Platform: req.platform, Kind: key.Kind,
		ExpiresAt: time.Now().Add(opaqueLife*time.Second + opaqueGrace),
	}
	if req.client == loopbackClient {
		claims.Client = ""
	}
	token, err := lasting(a.app, func(m *tokens.Manager) (secret.String, error) { return m.IssueOpaque(req.Context(), claims) })
	if err != nil {
		return "", a.noToken(req, err)
	}
	return token.Reveal(), nil
}

// tokenAnswer is WeChat's answer to a request for a token, in one line.
func tokenAnswer(name, token, refreshToken string) []byte {
	b := append([]byte(`{"`), name...)
	b = append(b, `":"`...)
	b = append(b, token...)
	b = append(b, `","expires_in":`...)
	b = strconv.AppendInt(b, opaqueLife, 10)
	if refreshToken != "" {
		b = append(b, `,"authorizer_refresh_token":"`...)
		b = append(b, refreshToken...)
		b = append(b, '"')
	}
	return append(b, '}')
}

// plainToken returns s if it could be one of WeChat's refresh tokens, or else a substitute.
func plainToken(s, otherwise string) string {
	if s == "" || len(s) > tokens.MaxOpaqueLength {
		return otherwise
	}
	for i := 0; i < len(s); i++ {
		c := s[i]
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '_' || c == '-' || c == '@' || c == '.' || c == '~') {
			return otherwise
		}
	}
	return s
}
