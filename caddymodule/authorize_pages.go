package caddymodule

import (
	_ "embed"
	"html/template"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// showOrigin is the policy of what leads to WeChat: it learns which host the visitor comes from, and not the path.
const showOrigin = "origin"

// authorizeText is what the page to start on says.
type authorizeText struct{ Title, Lead, Only, Desktop, Scan, Mobile, InWeChat, Platform, QRCode string }

// authorizedText is what the page about an account that authorised says.
type authorizedText struct{ Title, Granted, Nothing, Missing, MissingHint string }

var (
	authorizeZH = authorizeText{
		Title: "公众号 / 小程序授权", Lead: "请由账号管理员确认授权。每次点击会打开一个新的授权页，30 分钟内有效。", Only: "仅限授权该账号：",
		Desktop: "在电脑上授权", Scan: "或用手机微信扫码授权", Mobile: "在微信中授权", InWeChat: "请在微信中打开本页面。", Platform: "第三方平台",
		QRCode: "手机授权二维码",
	}
	authorizeEN = authorizeText{
		Title: "Authorize your WeChat account", Lead: "An administrator of the account has to confirm. Each click opens a fresh page, valid for 30 minutes.", Only: "Only this account can authorize here:",
		Desktop: "Authorize on this computer", Scan: "or scan with WeChat on your phone", Mobile: "Authorize in WeChat", InWeChat: "Open this page in WeChat.", Platform: "Platform",
		QRCode: "QR code for the phone",
	}
	authorizedZH = authorizedText{
		Title: "授权成功", Granted: "已授权的权限", Nothing: "没有授权任何权限。", Missing: "未授权的权限",
		MissingHint: "缺少这些权限时，相应功能无法使用。可重新授权并勾选它们。",
	}
	authorizedEN = authorizedText{
		Title: "Authorized", Granted: "Permissions granted", Nothing: "No permission was granted.", Missing: "Permissions not granted",
		MissingHint: "What needs them will not work. Authorize again and select them to add them.",
	}
)

//go:embed pages/authorize.html
var authorizeHTML string

//go:embed pages/authorized.html
var authorizedHTML string

//go:embed pages/authorize.css
var authorizeCSS string

// pictureHosts are where WeChat keeps pictures of accounts, and all that a page of ours may load anything from.
var pictureHosts = []string{".qlogo.cn", ".qpic.cn"}

var (
	authorizeTemplate  = template.Must(template.New("authorize").Parse(authorizeHTML))
	authorizedTemplate = template.Must(template.New("authorized").Parse(authorizedHTML))
	authorizeStyle     = template.CSS(pageCSS + authorizeCSS) //nolint:gosec // our own files
	authorizeCSP       = styleOnly(pageCSS + authorizeCSS)
	authorizedCSP      = authorizeCSP + "; img-src https://*" + strings.Join(pictureHosts, " https://*")
)

// show answers with the page to start on.
func (a *Authorize) show(w http.ResponseWriter, r *http.Request, req *authorizeRequest) (result string, failure *oauthFailure) {
	lang, text := "zh-CN", authorizeZH
	if prefersEnglish(r.Header.Values("Accept-Language")) {
		lang, text = "en", authorizeEN
	}
	mobile := req.startAddress(a, kindMobile)
	code, err := qrCode(req.at.origin+mobile, text.QRCode)
	if err != nil {
		return "", failAuthorizeQuery // the options are too long
	}
	h := w.Header()
	setPrivate(h)
	h.Set("Referrer-Policy", showOrigin)
	h.Set("Content-Security-Policy", authorizeCSP)
	writeHTML(w, r, http.StatusOK, lang, authorizeTemplate, struct {
		Lang, Kind                          string
		Text                                authorizeText
		Desktop, Mobile, Platform, BizAppID string
		QR                                  template.HTML
		Style                               template.CSS
	}{
		lang, req.options.kind, text, a.origin + req.startAddress(a, kindDesktop), a.origin + mobile,
		req.platform.AppID, req.options.bizAppID, code, authorizeStyle,
	})
	return "ok", nil
}

// authorized is what a page tells about an account that authorised.
type authorized struct {
	appid           string
	name, principal string
	picture         string // an https address of WeChat's pictures, or empty
	mini            bool
	known           bool // what it shows of itself was learned
	granted         []int
	asked           []int
}

// learn takes over what the account shows of itself.
func (g *authorized) learn(info tokens.AccountInfo) {
	g.known, g.mini = true, info.MiniProgram
	g.name, g.principal, g.picture = info.NickName, info.Principal, pictureOf(info.HeadImg)
	if len(info.FuncInfo) > 0 {
		g.granted = info.FuncInfo
	}
}

// missing are the permission sets that were asked for, or else those that the gateway's own parts stand on, and not
// granted.
func (g *authorized) missing() []int {
	wanted := g.asked
	if len(wanted) == 0 && g.known {
		wanted = tokens.PermissionSetsInUse(g.mini)
	}
	return slices.DeleteFunc(slices.Clone(wanted), func(id int) bool { return slices.Contains(g.granted, id) })
}

// pictureOf returns the address of a picture with https if it is one of WeChat's, and nothing otherwise.
func pictureOf(address string) string {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.User != nil || u.Port() != "" ||
		!slices.ContainsFunc(pictureHosts, func(host string) bool { return strings.HasSuffix(u.Hostname(), host) }) {
		return ""
	}
	u.Scheme = "https"
	return u.String()
}

// write answers r with the page about the account.
func (g *authorized) write(w http.ResponseWriter, r *http.Request) {
	lang, text := "zh-CN", authorizedZH
	if prefersEnglish(r.Header.Values("Accept-Language")) {
		lang, text = "en", authorizedEN
	}
	words := func(ids []int) (names []string) {
		for _, id := range ids {
			names = append(names, setName(id, lang))
		}
		return names
	}
	setPrivate(w.Header())
	w.Header().Set("Content-Security-Policy", authorizedCSP)
	writeHTML(w, r, http.StatusOK, lang, authorizedTemplate, struct {
		Lang                            string
		Text                            authorizedText
		AppID, Name, Principal, Picture string
		Granted, Missing                []string
		Style                           template.CSS
	}{lang, text, g.appid, g.name, g.principal, g.picture, words(g.granted), words(g.missing()), authorizeStyle})
}

// setName is a permission set in words.
func setName(id int, lang string) string {
	name, ok := tokens.PermissionSet(id)
	switch {
	case ok && lang == "en":
		return name.EN
	case ok:
		return name.ZH
	case lang == "en":
		return "permission set " + strconv.Itoa(id)
	default:
		return "权限集 " + strconv.Itoa(id)
	}
}
