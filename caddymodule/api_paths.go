package caddymodule

import (
	"errors"
	"strings"
)

// tokenUse is which credential a path of WeChat's API takes.
type tokenUse uint8

const (
	useAccount   tokenUse = iota // the authorizer's token, or the plain account's
	useComponent                 // the platform's
	useEither                    // the one of whom the caller names: an account, an authorizer or a platform
	useUser                      // the user's own, which the caller brings in param
	useNone                      // none
	useLogin                     // the account's secret, or for an authorizer the platform's token: exchanges a login code
)

// answerKind is who answers a path, and with what.
type answerKind uint8

const (
	answerForward answerKind = iota // WeChat
	answerToken                     // the gateway, with an opaque token, as do the next three
	answerStableToken
	answerComponentToken
	answerAuthorizerToken
	answerJSTicket // the gateway, with the ticket that it keeps
	answerNever    // the gateway refuses
)

// Query parameters that carry a credential.
const (
	paramAccess    = "access_token"
	paramComponent = "component_access_token"
	paramRefresh   = "refresh_token" // a user's
)

// apiPath is what the gateway knows about a path of WeChat's API.
type apiPath struct {
	use   tokenUse
	param string // query parameter that carries the token
	// answer is not answerForward for a path that reveals or burns a token of the gateway's: it never goes to WeChat. Of
	// answerJSTicket only the tickets are meant that the gateway keeps.
	answer answerKind
	// singleUse: WeChat takes the request's code only once, or the request undoes something each time. Nobody
	// repeats it, not even with a renewed token.
	singleUse bool
}

// componentRoot is where the calls of third-party platforms live.
const componentRoot = "/cgi-bin/component/"

// exactPaths are the paths that differ from their family, in lower case. Which token each takes is WeChat's table;
// those with an answer are the ones whose request or answer holds a secret of the gateway's.
var exactPaths = map[string]apiPath{
	"/cgi-bin/token":        {use: useNone, answer: answerToken},
	"/cgi-bin/stable_token": {use: useNone, answer: answerStableToken},

	"/cgi-bin/ticket/getticket": {use: useAccount, param: paramAccess, answer: answerJSTicket},

	componentRoot + "api_component_token":     {use: useNone, answer: answerComponentToken},
	componentRoot + "api_authorizer_token":    {use: useComponent, answer: answerAuthorizerToken},
	componentRoot + "api_query_auth":          {use: useComponent, answer: answerNever},
	componentRoot + "api_get_authorizer_list": {use: useComponent, answer: answerNever},
	componentRoot + "api_get_authorizer_info": {use: useComponent, answer: answerNever},
	componentRoot + "api_start_push_ticket":   {use: useComponent, answer: answerNever},
	componentRoot + "clear_quota/v2":          {use: useComponent, answer: answerNever},
	"/cgi-bin/clear_quota/v2":                 {use: useAccount, answer: answerNever},
	"/cgi-bin/account/fastregister":           {use: useAccount, answer: answerNever},
	"/cgi-bin/openapi/rid/get":                {use: useEither, answer: answerNever},
	componentRoot + "setprivacysetting":       {use: useAccount, param: paramAccess},
	componentRoot + "getprivacysetting":       {use: useAccount, param: paramAccess},
	componentRoot + "uploadprivacyextfile":    {use: useAccount, param: paramAccess},
	"/wxa/gettemplatedraftlist":               {use: useComponent, param: paramAccess},
	"/wxa/gettemplatelist":                    {use: useComponent, param: paramAccess},
	"/wxa/addtotemplate":                      {use: useComponent, param: paramAccess},
	"/wxa/deletetemplate":                     {use: useComponent, param: paramAccess},
	"/wxa/security/applysetorderpathinfo":     {use: useComponent, param: paramAccess},
	"/sns/userinfo":                           {use: useUser, param: paramAccess},
	"/sns/auth":                               {use: useUser, param: paramAccess},
	"/sns/oauth2/refresh_token":               {use: useUser, param: paramRefresh},
	"/sns/oauth2/access_token":                {use: useLogin, singleUse: true},
	"/sns/jscode2session":                     {use: useLogin, singleUse: true},
	"/sns/component/jscode2session":           {use: useComponent, param: paramComponent, singleUse: true},
	"/sns/oauth2/component/access_token":      {use: useComponent, param: paramComponent, singleUse: true},
	"/cgi-bin/clear_quota":                    {use: useEither, param: paramAccess},
	"/cgi-bin/openapi/quota/get":              {use: useEither, param: paramAccess},
	"/cgi-bin/openapi/quota/clear":            {use: useEither, param: paramAccess},
	"/cgi-bin/getcallbackip":                  {use: useEither, param: paramAccess},
	"/cgi-bin/get_api_domain_ip":              {use: useEither, param: paramAccess},
	"/wxa/undocodeaudit":                      {use: useAccount, param: paramAccess, singleUse: true},
	"/wxa/revertcoderelease":                  {use: useAccount, param: paramAccess, singleUse: true},
	"/wxa/revertgrayrelease":                  {use: useAccount, param: paramAccess, singleUse: true},
}

// pathFamilies are tried in this order; everything else takes the account's token.
var pathFamilies = []struct {
	prefix string
	path   apiPath
}{
	{componentRoot, apiPath{use: useComponent, param: paramComponent}},
	{"/sns/component/", apiPath{use: useComponent, param: paramComponent}},
	{"/sns/oauth2/component/", apiPath{use: useComponent, param: paramComponent}},
	{"/sns/", apiPath{use: useNone}},
	{"/wxa/component/", apiPath{use: useComponent, param: paramAccess}},
	{"/componenttcb/", apiPath{use: useComponent, param: paramAccess}},
	{"/product/register/", apiPath{use: useComponent, param: paramAccess}},
}

// classify looks a canonical path up. Case is ignored, so that no spelling slips past the exact paths.
func classify(path string) apiPath {
	path = strings.ToLower(path)
	if p, ok := exactPaths[path]; ok {
		return p
	}
	for _, f := range pathFamilies {
		if strings.HasPrefix(path, f.prefix) {
			return f.path
		}
	}
	return apiPath{use: useAccount, param: paramAccess}
}

// maxAPIPath bounds a path, in bytes. WeChat's longest have about sixty.
const maxAPIPath = 256

var errAPIPath = errors.New("path is not one of WeChat's API: only letters, digits and _ - . / in it, no empty, . or .. segment, nothing percent-encoded")

// canonicalPath returns the one spelling of an escaped path: one leading slash, none at the end. A path that another
// server could read differently is refused: WeChat's own paths need nothing but plain characters.
func canonicalPath(escaped string) (string, error) {
	path := strings.Trim(escaped, "/")
	if path == "" || len(path) > maxAPIPath {
		return "", errAPIPath
	}
	for i := 0; i < len(path); i++ {
		c := path[i]
		plain := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '_' || c == '-' || c == '.' || c == '/'
		if !plain {
			return "", errAPIPath
		}
	}
	for segment := range strings.SplitSeq(path, "/") {
		if segment == "" || segment == "." || segment == ".." {
			return "", errAPIPath
		}
	}
	return "/" + path, nil
}

// appIDPrefix splits /wx0123456789abcdef/path. The shape is exact: /wxa/ and /wxaapi/ are roots of WeChat's own.
// Slashes before and behind the prefix collapse, for base URLs that end in one.
func appIDPrefix(escaped string) (appid, rest string) {
	path := strings.TrimLeft(escaped, "/")
	first, rest, found := strings.Cut(path, "/")
	if !found || !isAppID(first) {
		return "", escaped
	}
	return first, rest
}
