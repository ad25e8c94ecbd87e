package caddymodule

import (
	"strings"
	"testing"
)

func TestClassify(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]apiPath{
		"/cgi-bin/user/info":                         {use: useAccount, param: paramAccess},
		"/cgi-bin/message/custom/send":               {use: useAccount, param: paramAccess},
		"/wxa/commit":                                {use: useAccount, param: paramAccess},
		"/wxaapi/newtmpl/addtemplate":                {use: useAccount, param: paramAccess},
		"/datacube/getusersummary":                   {use: useAccount, param: paramAccess},
		"/card/create":                               {use: useAccount, param: paramAccess},
		"/cgi-bin/open/create":                       {use: useAccount, param: paramAccess},
		"/anything/new":                              {use: useAccount, param: paramAccess},
		"/cgi-bin/ticket/getticket":                  {use: useAccount, param: paramAccess},
		"/cgi-bin/component/api_create_preauthcode":  {use: useComponent, param: paramComponent},
		"/cgi-bin/component/fastregisterweapp":       {use: useComponent, param: paramComponent},
		"/cgi-bin/component/get_domain_confirmfile":  {use: useComponent, param: paramComponent},
		"/cgi-bin/component/setprivacysetting":       {use: useAccount, param: paramAccess},
		"/cgi-bin/component/getprivacysetting":       {use: useAccount, param: paramAccess},
		"/cgi-bin/component/uploadprivacyextfile":    {use: useAccount, param: paramAccess},
		"/wxa/gettemplatedraftlist":                  {use: useComponent, param: paramAccess},
		"/wxa/gettemplatelist":                       {use: useComponent, param: paramAccess},
		"/wxa/addtotemplate":                         {use: useComponent, param: paramAccess},
		"/wxa/deletetemplate":                        {use: useComponent, param: paramAccess},
		"/wxa/component/fastregisterpersonalweapp":   {use: useComponent, param: paramAccess},
		"/wxa/component/fastregisterbetaweapp":       {use: useComponent, param: paramAccess},
		"/componenttcb/batchgetenvid":                {use: useComponent, param: paramAccess},
		"/product/register/register_shop":            {use: useComponent, param: paramAccess},
		"/product/spu/add":                           {use: useAccount, param: paramAccess},
		"/wxa/security/applysetorderpathinfo":        {use: useComponent, param: paramAccess},
		"/wxa/security/get_code_privacy_info":        {use: useAccount, param: paramAccess},
		"/sns/component/jscode2session":              {use: useComponent, param: paramComponent, singleUse: true},
		"/sns/oauth2/component/access_token":         {use: useComponent, param: paramComponent, singleUse: true},
		"/sns/oauth2/component/refresh_token":        {use: useComponent, param: paramComponent},
		"/sns/oauth2/access_token":                   {use: useLogin, singleUse: true},
		"/sns/jscode2session":                        {use: useLogin, singleUse: true},
		"/sns/oauth2/refresh_token":                  {use: useUser, param: paramRefresh},
		"/sns/anything/else":                         {use: useNone},
		"/sns/userinfo":                              {use: useUser, param: paramAccess},
		"/sns/auth":                                  {use: useUser, param: paramAccess},
		"/cgi-bin/clear_quota":                       {use: useEither, param: paramAccess},
		"/cgi-bin/openapi/quota/get":                 {use: useEither, param: paramAccess},
		"/cgi-bin/getcallbackip":                     {use: useEither, param: paramAccess},
		"/cgi-bin/token":                             {use: useNone, answer: answerToken},
		"/cgi-bin/stable_token":                      {use: useNone, answer: answerStableToken},
		"/cgi-bin/component/api_component_token":     {use: useNone, answer: answerComponentToken},
		"/cgi-bin/component/api_authorizer_token":    {use: useComponent, answer: answerAuthorizerToken},
		"/cgi-bin/component/api_query_auth":          {use: useComponent, answer: answerNever},
		"/cgi-bin/component/api_get_authorizer_list": {use: useComponent, answer: answerNever},
		"/cgi-bin/component/api_get_authorizer_info": {use: useComponent, answer: answerNever},
		"/cgi-bin/account/fastregister":              {use: useAccount, answer: answerNever},
		"/cgi-bin/openapi/rid/get":                   {use: useEither, answer: answerNever},
		"/cgi-bin/clear_quota/v2":                    {use: useAccount, answer: answerNever},
	} {
		for _, spelling := range []string{path, strings.ToUpper(path)} {
			if got := classify(spelling); got != want {
				t.Errorf("%s: got %+v, want %+v", spelling, got, want)
			}
		}
	}
}

// The ambiguous row of WeChat's table is decided by whom the caller names.
func TestAPIEitherToken(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.authorize()
	for appid, key := range map[string]string{accountID: crmKey, authorizerID: crmKey, platformID: panelKey} {
		wechat.seen()
		for _, path := range []string{"/cgi-bin/clear_quota", "/cgi-bin/openapi/quota/get", "/cgi-bin/getcallbackip"} {
			g.post("/"+appid+path, "{}", bearer(key))
			if got := wechat.one(t); got.Query != "access_token=REALTOKEN-"+appid+"-1" {
				t.Errorf("%s for %s: WeChat got %s", path, appid, got.Query)
			}
		}
	}
}

func TestCanonicalPath(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]string{
		"/cgi-bin/user/info": "/cgi-bin/user/info", "//cgi-bin/user": "/cgi-bin/user", "cgi-bin/user": "/cgi-bin/user", "/a.b/c_d/": "/a.b/c_d",
		"": "", "/": "", "///": "", "/a//b": "", "/../a": "", "/a/..": "", "/a/.": "", "/a%2fb": "", "/a;b": "", "/a b": "", "/a\\b": "",
		"/a\x00": "", "/é": "", "/a:b": "", "/a?b": "", "/a*": "", "/" + strings.Repeat("a", maxAPIPath+1): "",
	} {
		got, err := canonicalPath(path)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: got %q, %v; want %q", path, got, err, want)
		}
	}
}

func TestAppIDPrefix(t *testing.T) {
	t.Parallel()
	for path, want := range map[string][2]string{
		"/wx0123456789abcdef/cgi-bin/x":  {"wx0123456789abcdef", "cgi-bin/x"},
		"//wx0123456789abcdef//x":        {"wx0123456789abcdef", "/x"},
		"/wx0123456789abcdef":            {"", "/wx0123456789abcdef"},
		"/wx0123456789ABCDEF/x":          {"", "/wx0123456789ABCDEF/x"},
		"/wx0123456789abcdef0/x":         {"", "/wx0123456789abcdef0/x"},
		"/wxa/x":                         {"", "/wxa/x"},
		"/wxaapi/x":                      {"", "/wxaapi/x"},
		"/x/wx0123456789abcdef/x":        {"", "/x/wx0123456789abcdef/x"},
		"/wx0123456789abcdef%2fcgi-bin/": {"", "/wx0123456789abcdef%2fcgi-bin/"},
	} {
		appid, rest := appIDPrefix(path)
		if appid != want[0] || rest != want[1] {
			t.Errorf("%q: got %q, %q; want %q", path, appid, rest, want)
		}
	}
}
