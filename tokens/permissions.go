package tokens

import (
	"slices"
	"strconv"
	"strings"
)

// permissionSets are the permission sets (权限集) by the ids of func_info, as 公众号权限集 and 小程序权限集 of WeChat's documentation name
// them: by that name the operator finds one in the console. Those that are not there any more (14, 16, 20, 21, 35, 36) have the former one.
var permissionSets = map[int]Text{
	1:  {"messages", "消息管理"},
	2:  {"users", "用户管理"},
	3:  {"account service", "账号服务"},
	4:  {"web service: OAuth, JS-SDK", "网页服务"},
	5:  {"WeChat store", "微信小店"},
	6:  {"customer service", "微信多客服"},
	7:  {"mass messages and notices", "群发与通知"},
	8:  {"cards", "微信卡券"},
	9:  {"scan product", "微信扫一扫"},
	10: {"Wi-Fi", "微信连WIFI"},
	11: {"material", "素材管理"},
	12: {"shake nearby", "微信摇周边"},
	13: {"stores (POI)", "微信门店"},
	14: {"pay (withdrawn)", "微信支付（已停用）"},
	15: {"custom menu", "菜单管理"},
	16: {"verification status", "获取认证状态"},
	17: {"mini program: QR codes", "获取小程序码"},
	18: {"mini program: development and data", "小程序开发与数据分析"},
	19: {"mini program: customer messages", "小程序客服管理"},
	20: {"mini program: login", "小程序登录"},
	21: {"mini program: data analysis", "小程序数据分析"},
	22: {"city service", "城市服务"},
	23: {"ads", "广告管理"},
	24: {"open account", "开放平台账号管理"},
	25: {"mini program: open account", "开放平台账号管理（小程序）"},
	26: {"e-invoice", "微信电子发票"},
	27: {"fast registration of mini programs", "快速注册小程序"},
	30: {"mini program: basic information", "小程序基本信息管理"},
	31: {"mini program: name check for verification", "小程序认证名称检测"},
	33: {"linked mini programs", "小程序关联管理"},
	34: {"goods library", "微信商品库管理"},
	35: {"calories", "卡路里"},
	36: {"mini program: calories", "小程序卡路里"},
	37: {"nearby mini programs", "附近的小程序管理"},
	40: {"plugins", "小程序插件管理"},
	41: {"mini program: good-things circle", "好物圈管理"},
	44: {"good-things circle", "好物圈"},
	45: {"logistics", "微信物流服务"},
	46: {"one item, one code", "微信一物一码"},
	47: {"fiscal e-bill", "微信财政电子票据"},
	48: {"mini program: fiscal e-bill", "微信财政电子票据管理"},
	49: {"cloud development", "小程序云开发管理"},
	51: {"instant delivery", "小程序即时配送"},
	52: {"live", "小程序直播管理"},
	54: {"service-account dialogue", "服务号对话管理"},
	57: {"page push", "页面推送"},
	65: {"mini program: ads", "小程序广告管理"},
	66: {"service market", "微信服务市场管理"},
	67: {"service market", "微信服务市场管理"},
	76: {"violations and complaints", "小程序违规与交易投诉管理"},
	81: {"trial mini program: fast verification", "试用小程序快速认证"},
	88: {"link generation", "链接生成（URL Scheme）"},
	89: {"subscription notices", "服务号订阅通知"},
}

// permissionGroups name the ids of which only the field is known.
var permissionGroups = []struct {
	ids  []int
	name Text
}{
	{[]int{70, 71, 73, 84, 85, 86}, Text{"trade component, decoration", "交易组件、装修"}},
	{[]int{129, 130, 131, 132, 133, 135, 138, 141, 159}, Text{"channels shop", "视频号小店"}},
	{[]int{171, 172, 173, 174}, Text{"message push", "消息推送"}},
}

// PermissionSet returns the name of a permission set. ok is false for one whose name is not known here.
func PermissionSet(id int) (name Text, ok bool) {
	if name, ok = permissionSets[id]; ok {
		return name, true
	}
	for _, g := range permissionGroups {
		if slices.Contains(g.ids, id) {
			return g.name, true
		}
	}
	return Text{}, false
}

// PermissionSetsInUse are the permission sets that the gateway's own parts stand on: without them an account gets no
// messages, no login and no replies through it. The login of a mini program needs none (thirdpartyCode2Session): 20, which was once for
// it, can be neither offered nor granted any more.
func PermissionSetsInUse(miniProgram bool) []int {
	if miniProgram {
		return []int{setMiniMessages}
	}
	return []int{setMessages, 4}
}

// The permission sets that bring a platform the messages of an official account and of a mini program.
const (
	setMessages     = 1
	setMiniMessages = 19
)

// IsMiniProgram reports whether an account that authorised a platform is a mini program or, if not, an official account, by the
// messages that it granted. It is not known of one that granted neither or both, or that this node does not have in memory: it
// never waits.
func (m *Manager) IsMiniProgram(platform, appid string) (mini, known bool) {
	c := m.cache.Load()
	if c == nil {
		return false, false
	}
	e := c.get(AuthorizerKey(platform, appid))
	if e == nil || !e.authorized() {
		return false, false
	}
	mini = slices.Contains(e.rec.FuncInfo, setMiniMessages)
	return mini, mini != slices.Contains(e.rec.FuncInfo, setMessages)
}

// DescribePermissionSets writes ids with their names, for a log.
func DescribePermissionSets(ids []int) string { return PermissionSetNames(ids).EN }

// PermissionSetNames are ids with their names; the console knows them by the Chinese ones alone.
func PermissionSetNames(ids []int) Text {
	en, zh := make([]string, len(ids)), make([]string, len(ids))
	for i, id := range ids {
		en[i] = strconv.Itoa(id)
		zh[i] = en[i]
		if name, ok := PermissionSet(id); ok {
			en[i] += " (" + name.EN + ", " + name.ZH + ")"
			zh[i] += "（" + name.ZH + "）"
		}
	}
	return Text{strings.Join(en, " or "), strings.Join(zh, " 或 ")}
}

// pathPermissions say which permission sets open a path, in lower case: any of them does. A name that ends in / covers
// all below it.
var pathPermissions = func() map[string][]int {
	paths := map[string][]int{
		"/cgi-bin/message/custom/":               {setMessages, setMiniMessages},
		"/cgi-bin/message/mass/":                 {7},
		"/cgi-bin/message/template/":             {7},
		"/cgi-bin/template/":                     {7},
		"/cgi-bin/user/":                         {2},
		"/cgi-bin/tags/":                         {2},
		"/cgi-bin/groups/":                       {2},
		"/cgi-bin/qrcode/":                       {3},
		"/cgi-bin/ticket/":                       {4},
		"/sns/oauth2/component/":                 {4},
		"/customservice/":                        {6},
		"/cgi-bin/material/":                     {11},
		"/cgi-bin/menu/":                         {15},
		"/cgi-bin/get_current_selfmenu_info":     {15},
		"/cgi-bin/wxopen/getweappsupportversion": {18},
		"/cgi-bin/wxopen/setweappsupportversion": {18},
		"/wxa/security/get_code_privacy_info":    {18},
	}
	for _, name := range []string{
		"commit", "get_qrcode", "get_category", "get_page", "submit_audit", "get_auditstatus", "get_latest_auditstatus",
		"release", "undocodeaudit", "speedupaudit", "queryquota", "revertcoderelease", "grayrelease",
		"getgrayreleaseplan", "revertgrayrelease", "change_visitstatus", "getvisitstatus", "getversioninfo",
		"get_webviewdomain_confirmfile",
	} {
		paths["/wxa/"+name] = []int{18}
	}
	return paths
}()

// PermissionSetsFor returns the permission sets of which one is needed to call a path of WeChat's API; none if that is
// not known here.
func PermissionSetsFor(path string) []int {
	path = strings.ToLower(path)
	if ids, ok := pathPermissions[path]; ok {
		return ids
	}
	for end := strings.LastIndexByte(path, '/'); end > 0; end = strings.LastIndexByte(path[:end], '/') {
		if ids, ok := pathPermissions[path[:end+1]]; ok {
			return ids
		}
	}
	return nil
}
