package tokens

// codeDailyQuota is the one code that asks for patience and is reported all the same: until midnight nothing goes.
const codeDailyQuota = 45009

// errcodeRow is a code, or all codes from one to another that mean the same to the gateway.
type errcodeRow struct {
	from, to int64
	class    Class
	meaning  Text
	remedy   Text
}

// accountIPList is where WeChat's consoles have the IP白名单 of plain accounts.
var accountIPList = Text{
	"of 公众号 in 微信开发者平台 (developers.weixin.qq.com/platform) > 我的业务 > 公众号/服务号 > 基础信息, of 小程序 in mp.weixin.qq.com > 开发管理 > 开发设置",
	"公众号、服务号在微信开发者平台（developers.weixin.qq.com/platform）> 我的业务 > 公众号/服务号 > 基础信息，小程序在公众平台 > 开发管理 > 开发设置",
}

// Meanings and remedies that several codes share. Console pages have the names they have there.
var (
	meaningUnknown = Text{"not in the gateway's table", "不在网关的错误码表中"}
	remedyUnknown  = Text{"look the errcode up in WeChat's documentation", "查阅微信官方文档中的错误码"}

	remedyNone   = Text{"none needed", "无需处理"}
	remedyCaller = Text{"mend the call: WeChat refused what the caller sent", "修正调用参数：微信拒绝的是调用方提交的内容"}
	remedyRenew  = Text{"none needed: the gateway renews the token and repeats the call; if it happens often, another program renews it too",
		"无需处理：网关会刷新令牌并重试一次；如频繁出现，说明有其他程序也在刷新同一令牌"}
	remedyLogin = Text{"none needed: the visitor starts again; if it happens to everybody, compare appid and component_appid of the link with the callback's path",
		"无需处理：用户重新进入即可；若人人如此，核对链接中的 appid、component_appid 与回调路径"}
	remedyUserToken  = Text{"have the user log in again", "让用户重新授权登录"}
	remedySecret     = Text{"compare appid and secret of the global option wechat with WeChat's console", "核对全局选项 wechat 中的 appid、secret 与微信后台"}
	remedyAppID      = Text{"compare the appid with WeChat's console; in a call that names one, it must be the token's", "核对 appid 与微信后台；参数中的 appid 须与令牌所属账号一致"}
	remedyPlatformIP = Text{"add the egress IP address to the platform's whitelist: open.weixin.qq.com > 管理中心 > 第三方平台 > 白名单IP地址列表",
		"把出口 IP 加入第三方平台白名单：微信开放平台 > 管理中心 > 第三方平台 > 白名单IP地址列表"}
	remedyAccountIP = Text{"add the egress IP address to the account's IP白名单: " + accountIPList.EN + "; it takes up to ten minutes",
		"把出口 IP 加入账号的 IP白名单：" + accountIPList.ZH + "；约 10 分钟生效"}
	remedyEitherIP = Text{"add the egress IP address to the whitelist: for a platform open.weixin.qq.com > 管理中心 > 第三方平台 > 白名单IP地址列表; for a plain account its IP白名单, " + accountIPList.EN,
		"把出口 IP 加入白名单：第三方平台在微信开放平台 > 管理中心 > 第三方平台 > 白名单IP地址列表；普通账号在其 IP白名单，" + accountIPList.ZH}
	remedyTicket = Text{"wait for the component_verify_ticket that WeChat pushes every ten minutes, and check that it reaches wechat_event (授权事件接收URL)",
		"等待微信每 10 分钟推送的 component_verify_ticket，并检查授权事件接收URL 是否到达 wechat_event"}
	remedyWait  = Text{"WeChat is busy: wait and try again", "微信系统繁忙：稍候重试"}
	remedyQuota = Text{"the day's quota is used up: wait for midnight in Beijing, or clear it (clear_quota, ten times a month); look for a caller that polls",
		"当日额度用尽：等到北京时间零点，或调用 clear_quota（每月 10 次）；检查是否有轮询的调用方"}
	remedyMinute    = Text{"wait for the next minute; call less often", "等到下一分钟；降低调用频率"}
	remedyAuthorize = Text{"let the account's owner authorise the platform", "请账号管理员授权第三方平台"}
	remedySet       = Text{"select the permission set (权限集) for the platform in 微信开发者平台 (developers.weixin.qq.com/platform) > 我的业务 > 第三方平台 > 权限集, then let the account's owner authorise it again with that set",
		"在微信开发者平台（developers.weixin.qq.com/platform）> 我的业务 > 第三方平台 > 权限集 为平台勾选所需权限集，再请账号管理员带该权限集重新授权"}
	remedyRight = Text{"look up the account's 接口权限 (of a 公众号 in 微信开发者平台 > 接口管理): the account may lack the right (kind, verification); with a platform the permission set (权限集) must be granted too",
		"查看账号的接口权限（公众号、服务号在微信开发者平台 > 接口管理）：账号类型或认证状态可能不满足；第三方平台还须获得对应权限集"}
	remedyOtherToken = Text{"call the path for the right kind of appid: a platform's for component calls, an account's for all others", "为该路径使用正确的 appid：component 接口用第三方平台的，其余接口用账号的"}
	remedyPath       = Text{"write cgi_path with a / first and without the host, as in /cgi-bin/user/info", "cgi_path 须以 / 开头且不含域名，如 /cgi-bin/user/info"}
	remedyBug        = Text{"report it to who maintains the gateway, unless the caller made the request by itself", "若不是调用方自行拼的请求，请向网关维护者反馈"}
	remedySecurity   = Text{"the account has API security on (服务端API签名加密): have the app sign and encrypt, with keys as in mp.weixin.qq.com > API安全",
		"账号启用了服务端API签名加密：应用须按公众平台 > API安全 中的密钥签名并加密"}
	remedyConfirm   = Text{"let the account's administrator confirm the call in WeChat (风险调用确认)", "请账号管理员在微信中确认风险调用"}
	remedyComponent = Text{"look at the state of the platform in open.weixin.qq.com > 管理中心 > 第三方平台", "查看微信开放平台 > 管理中心 > 第三方平台 的状态"}
	remedyCode      = Text{"follow the order of the code flow: commit, submit_audit, release; see WeChat's page on the call", "按 commit、submit_audit、release 的顺序操作；详见微信该接口的文档"}
	remedyBinding   = Text{"look at which open account (开放平台账号) each appid is bound to", "检查各 appid 绑定的开放平台账号"}
	remedyDomain    = Text{"compare the domains with those of the platform in open.weixin.qq.com", "核对域名与第三方平台登记的域名"}
	remedyStart     = Text{"follow the registration's notices to the person who is to confirm", "按注册流程的通知，由相关人员完成确认"}
)

// errcodes are the codes that matter to a gateway which holds tokens.
var errcodes = []errcodeRow{
	{-1, -1, ClassPass, Text{"system busy", "系统繁忙"}, remedyWait},
	{0, 0, ClassPass, Text{"ok", "成功"}, remedyNone},
	// These are on a page of WeChat's that the visitor sees, and never come to the gateway.
	{10003, 10003, ClassPass, Text{"on WeChat's login page: the host of redirect_uri is not registered", "微信登录页：redirect_uri 的域名未登记"},
		Text{"enter the gateway's host: for a platform among its 公众号开发域名, for a plain account as its 网页授权域名; compare origin of wechat_oauth with it",
			"登记网关的域名：第三方平台填公众号开发域名，普通账号填网页授权域名；并核对 wechat_oauth 的 origin"}},
	{10004, 10004, ClassPass, Text{"on WeChat's login page: the account is banned", "微信登录页：账号被封禁"}, Text{"look up the account in WeChat's console", "在公众平台查看账号状态"}},
	{10005, 10005, ClassPass, Text{"on WeChat's login page: the account may not use that scope", "微信登录页：账号没有该 scope 的权限"},
		Text{"only verified service accounts (已认证服务号) have web authorization; look up 网页服务 in the account's 接口权限", "只有已认证服务号有网页授权；查看账号接口权限中的网页服务"}},
	{10006, 10006, ClassPass, Text{"on WeChat's login page: the visitor must follow the test account first", "微信登录页：须先关注测试号"}, Text{"let the visitor follow the test account", "让用户先关注测试号"}},
	{10009, 10009, ClassPass, Text{"on WeChat's login page: too often", "微信登录页：操作过于频繁"}, remedyWait},
	{10010, 10013, ClassPass, Text{"on WeChat's login page: scope, redirect_uri, appid or state is empty", "微信登录页：scope、redirect_uri、appid 或 state 为空"},
		Text{"use the links that the gateway makes, or compare the menu's link with WeChat's documentation", "使用网关生成的链接，或对照微信文档检查菜单链接"}},
	{10015, 10015, ClassPass, Text{"on WeChat's login page: the account has not authorised the platform of component_appid", "微信登录页：账号未授权该第三方平台"}, remedyAuthorize},
	{10016, 10016, ClassPass, Text{"on WeChat's login page: the appid is that of an open platform, not of an account", "微信登录页：appid 是开放平台的，不是公众号的"}, remedyAppID},

	{40001, 40001, ClassRenew, Text{"access token refused, or the secret is wrong", "access_token 无效，或 secret 错误"},
		Text{"none needed in API calls: the gateway renews the token. Where the gateway asks for a token: " + remedySecret.EN, "接口调用无需处理，网关会刷新令牌。获取令牌时出现：" + remedySecret.ZH}},
	{40002, 40002, ClassPass, Text{"invalid grant_type", "grant_type 无效"}, remedyCaller},
	{40003, 40003, ClassPass, Text{"invalid openid", "openid 无效"}, Text{"use an openid of this very account", "使用该账号自己的 openid"}},
	{40013, 40013, ClassOperator, Text{"invalid appid", "appid 无效"}, remedyAppID},
	{40014, 40014, ClassRenew, Text{"access token invalid", "access_token 不合法"}, remedyRenew},
	{40029, 40029, ClassPass, Text{"login code invalid", "登录 code 无效"}, remedyLogin},
	{40030, 40030, ClassPass, Text{"user's refresh_token invalid", "用户 refresh_token 无效"}, remedyUserToken},
	{40066, 40066, ClassPass, Text{"invalid url", "url 无效"}, Text{"compare the path with WeChat's documentation, upper and lower case too", "核对接口路径与微信文档，包括大小写"}},
	{40090, 40090, ClassOperator, Text{"the call's source address is refused", "请求来源 IP 不被接受"}, remedyEitherIP},
	{40097, 40097, ClassPass, Text{"invalid arguments", "参数错误"}, remedyCaller},
	{40125, 40125, ClassOperator, Text{"invalid secret", "AppSecret 无效"},
		Text{"the secret is wrong or was reset: " + remedySecret.EN, "AppSecret 错误或已被重置：" + remedySecret.ZH}},
	{40132, 40132, ClassPass, Text{"invalid WeChat id", "微信号无效"}, remedyCaller},
	{40163, 40163, ClassPass, Text{"login code used before", "登录 code 已被使用"}, remedyLogin},
	{40164, 40164, ClassOperator, Text{"address not in the account's whitelist", "IP 不在账号白名单中"}, remedyAccountIP},
	{40170, 40170, ClassPass, Text{"count too large", "count 过大"}, remedyBug},
	{40226, 40226, ClassPass, Text{"the user is a risk: no login with that code", "高风险用户，拒绝登录"},
		Text{"none needed: WeChat keeps out a user whom it takes for a risk; have the app say that the login is not possible", "无需处理：微信拦截了其判定的高风险用户；由应用提示无法登录"}},
	{40230, 40240, ClassOperator, Text{"API security: signature, encryption or key missing or wrong", "API 安全：签名、加密或密钥缺失或错误"}, remedySecurity},
	{40243, 40243, ClassOperator, Text{"secret frozen", "AppSecret 已冻结"}, Text{"unfreeze the AppSecret in WeChat's console", "在微信后台解冻 AppSecret"}},

	{41001, 41001, ClassPass, Text{"access_token missing", "缺少 access_token"}, Text{"send the call through wechat_api, with an appid", "通过 wechat_api 调用并指明 appid"}},
	{41002, 41002, ClassPass, Text{"appid missing", "缺少 appid"}, remedyCaller},
	{41003, 41003, ClassPass, Text{"refresh_token missing", "缺少 refresh_token"}, remedyCaller},
	{41004, 41004, ClassPass, Text{"secret missing", "缺少 secret"},
		Text{"where the gateway asks for a token: " + remedySecret.EN + "; in a call of an app: send it through wechat_api, which puts the account's secret into logins and takes every other one out of the query",
			"获取令牌时出现：" + remedySecret.ZH + "；应用的调用：请通过 wechat_api，登录接口由网关填入账号的 secret，其余接口查询串中的 secret 会被去掉"}},
	{41005, 41005, ClassPass, Text{"media missing", "缺少多媒体数据"}, Text{"send the file as multipart, with a Content-Length", "用 multipart 上传文件，并带 Content-Length"}},
	{41006, 41006, ClassPass, Text{"media_id missing", "缺少 media_id"}, remedyCaller},
	{41007, 41007, ClassPass, Text{"menu missing", "缺少菜单数据"}, remedyCaller},
	{41008, 41008, ClassPass, Text{"code missing", "缺少 code"}, remedyLogin},
	{41009, 41009, ClassPass, Text{"openid missing", "缺少 openid"}, remedyCaller},
	{41018, 41018, ClassPass, Text{"component_appid missing", "缺少 component_appid"}, remedyBug},
	{41021, 41021, ClassPass, Text{"component_access_token missing", "缺少 component_access_token"}, remedyBug},

	{42001, 42001, ClassRenew, Text{"access token expired", "access_token 已过期"}, remedyRenew},
	{42002, 42002, ClassPass, Text{"user's refresh_token expired", "用户 refresh_token 已过期"}, remedyUserToken},
	{42003, 42003, ClassPass, Text{"login code expired", "登录 code 已过期"}, remedyLogin},
	{42006, 42006, ClassRenew, Text{"component_access_token expired", "component_access_token 已过期"}, remedyRenew},
	{42007, 42007, ClassOperator, Text{"tokens void since a password was changed", "修改密码后令牌失效"},
		Text{"a user logs in again; an account's owner authorises the platform again", "用户重新登录；账号则请管理员重新授权"}},

	{43001, 43001, ClassPass, Text{"must be GET", "须用 GET"}, remedyCaller},
	{43002, 43002, ClassPass, Text{"must be POST", "须用 POST"}, remedyCaller},
	{43003, 43003, ClassPass, Text{"must be https", "须用 https"}, Text{"set the option api to https origins", "将 api 选项设为 https 地址"}},
	{44002, 44002, ClassPass, Text{"empty body", "POST 数据为空"}, Text{"send a body; some calls want {}", "提交请求体；部分接口要求 {}"}},

	{45002, 45002, ClassPass, Text{"content too long", "内容过长"}, remedyCaller},
	{45009, 45009, ClassBackoff, Text{"daily quota used up", "当日调用额度用尽"}, remedyQuota},
	{45011, 45011, ClassBackoff, Text{"too many calls this minute", "每分钟调用过于频繁"}, remedyMinute},
	{45015, 45015, ClassPass, Text{"reply window is over", "超过可回复时间"}, Text{"answer sooner after the user's last message", "在用户最后一次互动后的时限内回复"}},
	{45035, 45035, ClassOperator, Text{"address not in the whitelist", "IP 不在白名单中"}, remedyEitherIP},
	{45047, 45047, ClassPass, Text{"too many service messages", "客服消息条数超限"}, Text{"wait until the user writes again", "等用户再次互动"}},
	{45072, 45072, ClassPass, Text{"command out of range", "command 取值不在范围内"}, remedyCaller},
	{47001, 47001, ClassPass, Text{"body is not valid JSON or XML", "JSON 或 XML 解析错误"}, Text{"mend the body: UTF-8, and the format the call wants", "修正请求体：UTF-8 编码及接口要求的格式"}},

	{48001, 48001, ClassOperator, Text{"the account has no right to this API", "账号没有该接口权限"}, remedyRight},
	{48002, 48002, ClassPass, Text{"the user blocks messages", "用户拒收消息"}, remedyNone},
	{48004, 48004, ClassPass, Text{"the API is banned for this account", "接口被封禁"}, Text{"read the notice in mp.weixin.qq.com > 通知中心", "登录公众平台查看通知中心"}},
	{48006, 48006, ClassPass, Text{"clear_quota used up", "清零次数用尽"}, Text{"wait for the next month", "等到下个月"}},

	{50001, 50004, ClassPass, Text{"the user did not authorise this, or is limited", "用户未授权或受限"}, remedyCaller},
	{50005, 50005, ClassPass, Text{"the user does not follow the account", "用户未关注该账号"}, remedyNone},
	{50007, 50007, ClassOperator, Text{"account frozen", "账号已冻结"}, Text{"log in to mp.weixin.qq.com and see why", "登录公众平台查看冻结原因"}},

	{61000, 61000, ClassOperator, Text{"wrong type of platform", "第三方平台类型不符"}, remedyComponent},
	{61001, 61001, ClassOperator, Text{"platform and account do not match", "第三方平台与账号不匹配"}, remedyComponent},
	{61002, 61002, ClassOperator, Text{"no customer service there", "未开通客服"}, remedyComponent},
	{61003, 61003, ClassOperator, Text{"the account has not authorised the platform, or no longer does", "账号未授权该第三方平台，或已取消授权"}, remedyAuthorize},
	{61004, 61004, ClassOperator, Text{"address not in the platform's whitelist", "IP 不在第三方平台白名单中"}, remedyPlatformIP},
	{61005, 61005, ClassTicket, Text{"component_verify_ticket expired", "component_verify_ticket 已过期"}, remedyTicket},
	{61006, 61006, ClassTicket, Text{"component_verify_ticket invalid", "component_verify_ticket 无效"},
		Text{remedyTicket.EN + "; compare the platform's secret too", remedyTicket.ZH + "；并核对第三方平台的 secret"}},
	{61007, 61007, ClassOperator, Text{"the platform has no right to this API", "第三方平台没有该接口权限"}, remedySet},
	{61008, 61008, ClassPass, Text{"a key twice in the body", "请求体中有重复的键"}, remedyCaller},
	{61009, 61009, ClassPass, Text{"authorization code invalid", "授权码无效"}, Text{"none needed if the gateway holds the account's tokens; else the owner authorises again", "网关已持有令牌则无需处理；否则请账号管理员重新授权"}},
	{61010, 61010, ClassPass, Text{"authorization code expired", "授权码已过期"}, Text{"none needed if the gateway holds the account's tokens; else the owner authorises again", "网关已持有令牌则无需处理；否则请账号管理员重新授权"}},
	{61011, 61011, ClassOperator, Text{"invalid platform", "第三方平台无效"}, remedyComponent},
	{61012, 61012, ClassPass, Text{"invalid option name", "选项名无效"}, remedyCaller},
	{61013, 61013, ClassPass, Text{"invalid option value", "选项值无效"}, remedyCaller},
	{61014, 61014, ClassPass, Text{"the API wants the platform's token", "该接口须用 component_access_token"}, remedyOtherToken},
	{61015, 61015, ClassPass, Text{"the API wants the account's token", "该接口须用账号的 access_token"}, remedyOtherToken},
	{61016, 61016, ClassOperator, Text{"permission set not confirmed", "权限集尚未确认"}, remedySet},
	{61017, 61017, ClassOperator, Text{"permission set not granted", "权限集未授权"}, remedySet},
	{61018, 61022, ClassPass, Text{"confirmation of permission sets under way", "权限集确认流程进行中"}, remedyCaller},
	{61023, 61023, ClassOperator, Text{"refresh token invalid", "授权方 refresh_token 无效"},
		Text{"none needed if the gateway says that it fetched the current one; else let the account's owner authorise again", "网关若已取回新的 refresh_token 则无需处理；否则请账号管理员重新授权"}},
	{61024, 61024, ClassOperator, Text{"a platform's account takes another way to its token", "第三方平台账号须以 component 方式取令牌"},
		Text{"configure the appid as platform, not as account", "把该 appid 配置为 platform，而非 account"}},
	{61025, 61025, ClassPass, Text{"option is read-only", "选项只读"}, remedyCaller},
	{61028, 61028, ClassOperator, Text{"platform not published", "第三方平台未全网发布"}, remedyComponent},
	{61029, 61029, ClassOperator, Text{"platform must be published again", "第三方平台须重新全网发布"}, remedyComponent},
	{61030, 61030, ClassOperator, Text{"the platform must not cancel this", "第三方平台不允许取消"}, remedyComponent},
	{61039, 61039, ClassPass, Text{"privacy check of the code unfinished", "代码隐私接口检测未完成"}, Text{"wait a minute, then submit; do not commit again meanwhile", "等一分钟再提交审核，期间不要重新上传代码"}},
	{61040, 61040, ClassPass, Text{"a privacy API is not configured", "隐私接口未配置"}, remedyCaller},

	{76003, 76003, ClassPass, Text{"cgi_path is no API path", "cgi_path 不是接口路径"}, remedyPath},
	{76021, 76021, ClassPass, Text{"there is no such cgi_path", "cgi_path 不存在"}, remedyPath},
	{76022, 76022, ClassPass, Text{"no quota of that cgi_path for the token's account", "令牌所属账号查不到该 cgi_path 的额度"},
		Text{"ask with the token of the kind of account that may call that path, a platform for component calls; of sns/* WeChat keeps no quota",
			"用有权调用该接口的那类账号的令牌查询，component 接口用第三方平台的；sns/* 不支持查询额度"}},

	{85004, 85004, ClassPass, Text{"tester bound already", "体验者已绑定"}, remedyNone},
	{85009, 85009, ClassPass, Text{"an audit is running", "已有版本在审核中"}, Text{"wait for its end or withdraw it", "等待审核结束或撤回"}},
	{85013, 85013, ClassPass, Text{"ext_json is wrong", "ext_json 错误"}, remedyCaller},
	{85014, 85014, ClassPass, Text{"template missing", "模板不存在"}, remedyCaller},
	{85017, 85017, ClassPass, Text{"domain not among the platform's", "域名不在第三方平台域名内"}, remedyDomain},
	{85019, 85020, ClassPass, Text{"nothing to release", "没有可发布的版本"}, remedyCode},
	{85044, 85044, ClassPass, Text{"package too large", "代码包过大"}, remedyCaller},
	{85052, 85052, ClassPass, Text{"released already", "已发布"}, remedyNone},
	{85064, 85064, ClassPass, Text{"template missing", "模板不存在"}, remedyCaller},
	{85065, 85065, ClassPass, Text{"template library full", "模板库已满"}, Text{"delete templates that are not used", "删除不用的模板"}},
	{85069, 85069, ClassPass, Text{"verification file wrong", "校验文件有误"}, Text{"compare the file that wechat_verify serves with WeChat's", "核对 wechat_verify 提供的文件与微信给出的文件"}},
	{85085, 85085, ClassPass, Text{"audit quota used up", "提审额度用尽"}, Text{"ask for more, or wait for the next month", "申请额度或等到下个月"}},
	{85086, 85086, ClassPass, Text{"no code committed", "尚未上传代码"}, remedyCode},
	{85001, 85094, ClassPass, Text{"testers, audits and code of mini programs", "小程序体验者、审核与代码管理"}, remedyCode},
	{86000, 86010, ClassPass, Text{"code of mini programs: platforms only, nothing committed, profile incomplete, too many submissions",
		"小程序代码管理：仅限第三方、未上传代码、资料不全或提审受限"}, remedyCode},
	{86103, 86103, ClassOperator, Text{"verification file not found", "校验文件检查失败"}, Text{"put the very file, byte for byte, where wechat_verify serves it", "把文件原样（逐字节）放到 wechat_verify 的目录"}},
	{87006, 87013, ClassPass, Text{"mini programs: limits of games, reverts and withdrawals, or a bad signature", "小程序：小游戏、回退、撤回受限或签名错误"}, remedyCode},

	{89000, 89004, ClassPass, Text{"binding to an open account", "开放平台账号绑定"}, remedyBinding},
	{89019, 89022, ClassPass, Text{"webview domains", "业务域名"}, remedyDomain},
	{89029, 89029, ClassPass, Text{"too many webview domains", "业务域名过多"}, remedyDomain},
	{89231, 89231, ClassPass, Text{"not for individuals' mini programs", "个人小程序不支持"}, remedyCaller},
	{89236, 89244, ClassPass, Text{"state of a plugin", "插件状态"}, remedyCaller},
	{89247, 89256, ClassPass, Text{"fast registration of a mini program", "快速注册小程序"}, remedyStart},
	{89401, 89405, ClassPass, Text{"urgent audit", "加急审核"}, Text{"see speedupaudit's limits", "参见 speedupaudit 的限制"}},
	{89501, 89501, ClassOperator, Text{"this address awaits the administrator's word", "该 IP 等待管理员确认"}, remedyConfirm},
	{89502, 89502, ClassOperator, Text{"this address must be confirmed", "该 IP 须经确认"}, remedyConfirm},
	{89503, 89503, ClassOperator, Text{"a call from a new address needs the administrator's word", "新 IP 的调用须管理员确认"}, remedyConfirm},
	{89504, 89505, ClassOperator, Text{"this address must be confirmed", "该 IP 须经确认"}, remedyConfirm},
	{89506, 89506, ClassOperator, Text{"the administrator refused this address", "管理员拒绝了该 IP"}, Text{"wait 24 hours, then let the administrator confirm", "24 小时后重试，并请管理员确认"}},
	{89507, 89507, ClassOperator, Text{"the administrator refused this address", "管理员拒绝了该 IP"}, Text{"wait an hour, then let the administrator confirm", "1 小时后重试，并请管理员确认"}},

	{9001001, 9001036, ClassPass, Text{"shake nearby", "摇一摇周边"}, remedyCaller},
	{9402202, 9402202, ClassPass, Text{"too many commits at once", "代码上传并发超限"}, Text{"commit one after the other", "依次上传"}},
}
