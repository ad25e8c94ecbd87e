package caddymodule

import (
	"net/http"
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
		"/cgi-bin/ticket/getticket":                  {use: useAccount, param: paramAccess, answer: answerJSTicket},
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

// TestTokenTable is WeChat's table of which token a path takes, row by row, with all that a row names, or one path of
// each family that it names.
func TestTokenTable(t *testing.T) {
	t.Parallel()
	account := apiPath{use: useAccount, param: paramAccess}
	component, componentAccess := apiPath{use: useComponent, param: paramComponent}, apiPath{use: useComponent, param: paramAccess}
	never := func(use tokenUse) apiPath { return apiPath{use: use, answer: answerNever} }
	for _, row := range []struct {
		name  string
		want  apiPath
		paths string
	}{
		{"1 the account's", account, "/cgi-bin/user/info /wxa/commit /wxaapi/newtmpl/gettemplate /datacube/getusersummary /customservice/getkflist /card/create " +
			"/semantic/semproxy/search /channels/ec/basics/info/get /product/spu/get /shop/account/get_info /tcb/invokecloudfunction /bizwxa/x /merchant/get"},
		{"2 the platform's", component, "/cgi-bin/component/api_create_preauthcode /cgi-bin/component/api_get_authorizer_option /cgi-bin/component/fastregisterweapp " +
			"/cgi-bin/component/modify_wxa_server_domain /cgi-bin/component/modify_wxa_jump_domain /cgi-bin/component/get_domain_confirmfile"},
		{"2 the platform's, with a token in the answer", never(useComponent),
			"/cgi-bin/component/api_query_auth /cgi-bin/component/api_get_authorizer_list /cgi-bin/component/api_get_authorizer_info"},
		{"3 the account's although the path says component", account,
			"/cgi-bin/component/setprivacysetting /cgi-bin/component/getprivacysetting /cgi-bin/component/uploadprivacyextfile"},
		{"4 templates", componentAccess, "/wxa/gettemplatedraftlist /wxa/gettemplatelist /wxa/addtotemplate /wxa/deletetemplate"},
		{"5 registrations below wxa", componentAccess, "/wxa/component/fastregisterpersonalweapp /wxa/component/fastregisterbetaweapp"},
		{"6 the platform's elsewhere", componentAccess, "/componenttcb/batchgetenvid /product/register/register_shop /wxa/security/applysetorderpathinfo"},
		{"7 open accounts", account, "/cgi-bin/open/create /cgi-bin/open/bind /cgi-bin/open/unbind /cgi-bin/open/get /cgi-bin/open/have"},
		{"8 reuse of an account, which gives out a code", never(useAccount), "/cgi-bin/account/fastregister"},
		{"9 logins by a platform", apiPath{use: useComponent, param: paramComponent, singleUse: true}, "/sns/component/jscode2session /sns/oauth2/component/access_token"},
		{"9 the renewal of such a login", component, "/sns/oauth2/component/refresh_token"},
		{"10 the user's", apiPath{use: useUser, param: paramAccess}, "/sns/userinfo /sns/auth"},
		{"11 none: a secret", apiPath{use: useLogin, singleUse: true}, "/sns/jscode2session /sns/oauth2/access_token"},
		{"11 none: the user's refresh token", apiPath{use: useUser, param: paramRefresh}, "/sns/oauth2/refresh_token"},
		{"11 none, and only the gateway may", never(useComponent), "/cgi-bin/component/api_start_push_ticket /cgi-bin/component/clear_quota/v2"},
		{"11 none, and only the gateway may, for an account", never(useAccount), "/cgi-bin/clear_quota/v2"},
		{"11 token", apiPath{use: useNone, answer: answerToken}, "/cgi-bin/token"},
		{"11 stable_token", apiPath{use: useNone, answer: answerStableToken}, "/cgi-bin/stable_token"},
		{"11 api_component_token", apiPath{use: useNone, answer: answerComponentToken}, "/cgi-bin/component/api_component_token"},
		{"12 whose, the caller says", apiPath{use: useEither, param: paramAccess}, "/cgi-bin/clear_quota /cgi-bin/openapi/quota/get /cgi-bin/getcallbackip"},
		{"12 whose, the caller says, and it shows others' calls", never(useEither), "/cgi-bin/openapi/rid/get"},
	} {
		t.Run(row.name, func(t *testing.T) {
			for path := range strings.FieldsSeq(row.paths) {
				for _, spelling := range []string{path, strings.ToUpper(path)} {
					if got := classify(spelling); got != row.want {
						t.Errorf("%s: got %+v, want %+v", spelling, got, row.want)
					}
				}
			}
		})
	}
}

// Where the path says component and the token is the account's, WeChat gets the account's, whoever may use the
// platform's: an app with the account, the platform's panel, and an SDK.
func TestAPIComponentPathAccountToken(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.authorize()
	opaque := g.opaque(authorizerID, crmKey)
	wechat.seen()
	for _, path := range []string{"/cgi-bin/component/setprivacysetting", "/cgi-bin/component/getprivacysetting", "/cgi-bin/component/uploadprivacyextfile"} {
		for name, call := range map[string]func() answer{
			"app":   func() answer { return g.post("/"+authorizerID+path, "{}", bearer(crmKey)) },
			"panel": func() answer { return g.post("/"+authorizerID+path, "{}", bearer(panelKey)) },
			"SDK":   func() answer { return g.post(path+"?access_token="+opaque, "{}") },
		} {
			if a := call(); a.Status != http.StatusOK {
				t.Errorf("%s, %s: got %d %s", path, name, a.Status, a.Body)
			}
			if got := wechat.one(t); got.Path != path || got.Query != "access_token=REALTOKEN-"+authorizerID+"-1" {
				t.Errorf("%s, %s: WeChat got %s?%s", path, name, got.Path, got.Query)
			}
		}
		if a := g.post("/"+platformID+path, "{}", bearer(panelKey)); a.code(t) != codeNeedAccount {
			t.Errorf("%s for the platform itself: got %d %s", path, a.Status, a.Body)
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
	// An SDK names it by the token that it has.
	component := g.tokenOf(g.post("/cgi-bin/component/api_component_token",
		`{"component_appid":"`+platformID+`","component_appsecret":"`+panelKey+`","component_verify_ticket":"t"}`), "component_access_token")
	for appid, token := range map[string]string{accountID: g.opaque(accountID, crmKey), authorizerID: g.opaque(authorizerID, crmKey), platformID: component} {
		wechat.seen()
		g.post("/cgi-bin/clear_quota?access_token="+token, `{"appid":"`+appid+`"}`)
		if got := wechat.one(t); got.Query != "access_token=REALTOKEN-"+appid+"-1" {
			t.Errorf("an SDK of %s: WeChat got %s", appid, got.Query)
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

func TestStayPrefixes(t *testing.T) {
	for _, prefix := range stayPrefixes {
		if !staysHere(prefix + "x") {
			t.Errorf("headers that begin with %s would reach WeChat", prefix)
		}
	}
}
