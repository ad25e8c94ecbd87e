package wxsim

// needs says which token a path takes.
type needs uint8

const (
	needNone      needs = iota
	needComponent       // component_access_token, under either parameter name
	needAccount         // an authorizer's or a plain account's
	needEither          // any of these, by whom the call is about
	needUser            // a user's, of web authorization
)

type method uint8

const (
	either method = iota
	get
	post
)

// route is what is known about one API path.
type route struct {
	method   method
	needs    needs
	json     bool // wants a JSON object as its body
	text     bool // answers as text/plain
	named    bool // takes a component's token as component_access_token alone
	secret   bool // takes an AppSecret in its query
	binary   bool // answers with a file, or with an error as JSON
	precious bool // hands out tokens or uses up a code: bodies are secret, answers not lost by default
	page     bool // for browsers
	probed   bool // may be asked for without a token, to see that WeChat is there, or what time it is
	handle   func(*call) answer
}

// apiRoutes is the table of every path that the simulator knows. Handlers run under Server.mu,
// except those of pages.
func apiRoutes() map[string]route {
	component := func(h func(*call) answer) route {
		return route{method: post, needs: needComponent, json: true, handle: h}
	}
	exchange := func(h func(*call) answer) route {
		return route{method: post, needs: needComponent, json: true, precious: true, handle: h}
	}
	secret := func(h func(*call) answer) route {
		return route{method: post, needs: needNone, json: true, precious: true, handle: h}
	}
	reads := func(h func(*call) answer) route { return route{method: get, needs: needAccount, handle: h} }
	writes := func(h func(*call) answer) route {
		return route{method: post, needs: needAccount, json: true, handle: h}
	}
	login := func(n needs, h func(*call) answer) route {
		return route{method: get, needs: n, text: true, precious: true, handle: h}
	}
	bySecret := func(h func(*call) answer) route {
		return route{method: get, needs: needNone, text: true, precious: true, secret: true, handle: h}
	}
	named := func(h func(*call) answer) route {
		return route{method: get, needs: needComponent, text: true, precious: true, named: true, handle: h}
	}
	return map[string]route{
		"/cgi-bin/component/api_start_push_ticket":   secret((*call).startPushTicket),
		"/cgi-bin/component/api_component_token":     secret((*call).componentToken),
		"/cgi-bin/component/api_create_preauthcode":  exchange((*call).createPreAuthCode),
		"/cgi-bin/component/api_query_auth":          exchange((*call).queryAuth),
		"/cgi-bin/component/api_authorizer_token":    exchange((*call).authorizerToken),
		"/cgi-bin/component/api_get_authorizer_info": exchange((*call).authorizerInfo),
		"/cgi-bin/component/api_get_authorizer_list": exchange((*call).authorizerList),
		"/cgi-bin/component/get_domain_confirmfile":  {method: post, needs: needComponent, handle: (*call).platformConfirmFile},

		"/cgi-bin/token":                 {method: get, needs: needNone, precious: true, secret: true, handle: (*call).plainToken},
		"/cgi-bin/stable_token":          secret((*call).stableToken),
		"/cgi-bin/ticket/getticket":      {needs: needAccount, precious: true, handle: (*call).jsTicket},
		"/cgi-bin/getcallbackip":         {method: get, needs: needEither, probed: true, handle: (*call).ipList},
		"/cgi-bin/get_api_domain_ip":     {method: get, needs: needEither, handle: (*call).ipList},
		"/cgi-bin/clear_quota":           {method: post, needs: needEither, json: true, handle: (*call).clearQuota},
		"/cgi-bin/openapi/quota/get":     {method: post, needs: needEither, json: true, handle: (*call).quota},
		"/cgi-bin/user/info":             reads((*call).userInfo),
		"/cgi-bin/user/get":              reads((*call).userList),
		"/cgi-bin/menu/get":              reads((*call).menuGet),
		"/cgi-bin/menu/create":           writes((*call).menuCreate),
		"/cgi-bin/menu/delete":           reads((*call).menuDelete),
		"/cgi-bin/message/custom/send":   writes((*call).customSend),
		"/cgi-bin/message/template/send": writes((*call).templateSend),
		"/cgi-bin/qrcode/create":         writes((*call).qrcodeCreate),
		"/cgi-bin/media/upload":          {method: post, needs: needAccount, handle: (*call).mediaUpload},
		"/cgi-bin/media/get":             {needs: needAccount, binary: true, handle: (*call).mediaGet},

		"/wxa/getwxacodeunlimit":    {method: post, needs: needAccount, json: true, binary: true, handle: (*call).wxaCode},
		"/wxa/gettemplatedraftlist": {method: get, needs: needComponent, handle: (*call).draftList},
		"/wxa/gettemplatelist":      {method: get, needs: needComponent, handle: (*call).templateList},
		"/wxa/addtotemplate":        component((*call).addToTemplate),
		"/wxa/commit":               writes((*call).commit),
		"/wxa/submit_audit":         writes((*call).submitAudit),
		"/wxa/get_auditstatus":      writes((*call).auditStatus),
		"/wxa/release":              writes((*call).release),
		"/wxa/deletetemplate":       component((*call).deleteTemplate),
		"/wxa/undocodeaudit":        reads((*call).undoAudit),
		"/wxa/revertcoderelease":    reads((*call).revert),
		"/wxa/getversioninfo":       writes((*call).versionInfo),

		"/wxa/get_webviewdomain_confirmfile": writes((*call).accountConfirmFile),

		"/sns/jscode2session":                 bySecret((*call).plainLogin),
		"/sns/component/jscode2session":       login(needComponent, (*call).componentLogin),
		"/sns/oauth2/access_token":            bySecret((*call).plainUserToken),
		"/sns/oauth2/refresh_token":           login(needNone, (*call).plainUserRefresh),
		"/sns/oauth2/component/access_token":  named((*call).componentUserToken),
		"/sns/oauth2/component/refresh_token": named((*call).componentUserRefresh),
		"/sns/userinfo":                       {method: get, needs: needUser, text: true, handle: (*call).snsUserInfo},
		"/sns/auth":                           {method: get, needs: needUser, text: true, handle: (*call).snsAuth},

		authorizePath:   {page: true, handle: (*call).authorizePage},
		desktopLinkPath: {page: true, handle: (*call).bindPage},
		mobileLinkPath:  {page: true, handle: (*call).bindPage},
		choicePath:      {page: true, handle: (*call).choose},
	}
}
