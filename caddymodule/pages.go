package caddymodule

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"html/template"
	"net/http"
	"strconv"
	"strings"
)

// page is a small page for the person in front of the browser: what happened and what to do now, in the language
// that the browser asks for. It tells no cause that is the operator's business; the log does.
type page struct {
	status int
	zh, en pageText
	again  bool // with a link that loads the same address once more
	// restart is the address where the visitor can begin anew; empty: the page has no such link.
	restart string
}

type pageText struct{ Title, Text string }

// The pages of web authorization.
var (
	pageDenied = page{status: http.StatusForbidden,
		zh: pageText{"未授权登录", "你没有同意授权。如需继续，请返回后重新打开链接并同意。"},
		en: pageText{"Not signed in", "You did not agree to sign in. To go on, open the link again and agree."}}
	pageNotFound = page{status: http.StatusNotFound,
		zh: pageText{"页面不存在", "这个链接没有对应的页面，请向给你链接的人核对。"},
		en: pageText{"No such page", "This link leads nowhere. Please check it with whoever gave it to you."}}
	pageBadRequest = page{status: http.StatusBadRequest,
		zh: pageText{"链接无效", "这个链接不完整或已损坏，请从公众号菜单或原链接重新进入。"},
		en: pageText{"Invalid link", "This link is incomplete or damaged. Please start again from the menu or the original link."}}
	pageForeign = page{status: http.StatusForbidden,
		zh: pageText{"请重新登录", "这次登录不是从这个浏览器开始的，或等待太久了。请从公众号菜单或原链接重新进入。"},
		en: pageText{"Please start again", "This sign-in did not begin in this browser, or took too long. Please start again from the menu or the original link."}}
	pageInvalidCode = page{status: http.StatusBadRequest,
		zh: pageText{"登录无效", "微信不接受这次登录，请从公众号菜单或原链接重新进入。"},
		en: pageText{"Sign-in not valid", "WeChat does not accept this sign-in. Please start again from the menu or the original link."}}
	pageUsedCode = page{status: http.StatusGone,
		zh: pageText{"登录已失效", "这次登录已被使用或已过期，请从公众号菜单或原链接重新进入。"},
		en: pageText{"Sign-in expired", "This sign-in was used already or has expired. Please start again from the menu or the original link."}}
	pageMethod = page{status: http.StatusMethodNotAllowed,
		zh: pageText{"请求方式不支持", "请直接在微信中打开链接。"},
		en: pageText{"Method not allowed", "Please just open the link in WeChat."}}
	pageRefused = page{status: http.StatusBadGateway,
		zh: pageText{"暂时无法登录", "微信拒绝了这个公众号的登录请求，管理员可以在日志中看到原因。"},
		en: pageText{"Cannot sign in", "WeChat refuses sign-ins for this account. The operator finds the reason in the log."}}
	pageUnavailable = page{status: http.StatusServiceUnavailable,
		zh: pageText{"暂时无法登录", "现在联系不上微信，请稍后从公众号菜单或原链接重新进入。"},
		en: pageText{"Cannot sign in now", "WeChat cannot be reached at the moment. Please start again in a little while."}}
	pageTooMany = page{status: http.StatusTooManyRequests, again: true,
		zh: pageText{"操作过于频繁", "来自你所在网络的无效登录过多，请过几分钟再试。"},
		en: pageText{"Too many attempts", "Too many sign-ins that are not valid came from your network. Please try again in a few minutes."}}
	pageTryAgain = page{status: http.StatusServiceUnavailable, again: true,
		zh: pageText{"请再试一次", "刚才没能完成登录，再试一次即可。"},
		en: pageText{"Please try again", "The sign-in could not be completed just now. Trying again should do."}}
)

//go:embed pages/message.html
var pageHTML string

//go:embed pages/style.css
var pageCSS string

var (
	pageTemplate = template.Must(template.New("message").Parse(pageHTML))
	pageStyle    = template.CSS(pageCSS) //nolint:gosec // our own file
	// pageCSP lets a page of ours do nothing but show its own style.
	pageCSP = styleOnly(pageCSS)
)

// styleOnly is the policy of a page that shows this style and nothing else.
func styleOnly(css string) string {
	return "default-src 'none'; style-src 'sha256-" + styleHash(css) + "'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}

func styleHash(css string) string {
	sum := sha256.Sum256([]byte(css))
	return base64.StdEncoding.EncodeToString(sum[:])
}

// setPrivate sets the headers of every answer of the web authorization, pages and redirects alike: nothing of it is
// cached, and the code in the URL goes to nobody as a Referer.
func setPrivate(h http.Header) {
	h.Set("Cache-Control", "no-store")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Content-Security-Policy", pageCSP)
	h.Set("X-Content-Type-Options", "nosniff")
}

// write answers r with the page.
func (p page) write(w http.ResponseWriter, r *http.Request) {
	lang, text, again, restart := "zh-CN", p.zh, "重试", "重新开始"
	if prefersEnglish(r.Header.Values("Accept-Language")) {
		lang, text, again, restart = "en", p.en, "Try again", "Start again"
	}
	link := ""
	switch {
	case p.again:
		link = again
	case p.restart != "":
		link = restart
	}
	setPrivate(w.Header())
	writeHTML(w, r, p.status, lang, pageTemplate, struct {
		Lang string
		pageText
		Link, Address string
		Style         template.CSS
	}{lang, text, link, p.restart, pageStyle})
}

// writeHTML answers r with what a template makes of data.
func writeHTML(w http.ResponseWriter, r *http.Request, status int, lang string, t *template.Template, data any) {
	var body bytes.Buffer
	if err := t.Execute(&body, data); err != nil {
		body.Reset() // the status alone still tells
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Language", lang)
	h.Add("Vary", "Accept-Language")
	h.Set("Content-Length", strconv.Itoa(body.Len()))
	w.WriteHeader(status)
	if r.Method != http.MethodHead {
		_, _ = w.Write(body.Bytes())
	}
}

// prefersEnglish judges Accept-Language. Those who are in WeChat read Chinese, so that is for whoever does not ask;
// who asks, but not for Chinese, gets English.
func prefersEnglish(accept []string) bool {
	zh, asked := 0.0, 0.0
	for entry := range strings.SplitSeq(strings.Join(accept, ","), ",") {
		tag, params, _ := strings.Cut(strings.TrimSpace(entry), ";")
		if tag == "" {
			continue
		}
		q := 1.0
		if v, ok := strings.CutPrefix(strings.TrimSpace(params), "q="); ok {
			var err error
			if q, err = strconv.ParseFloat(v, 64); err != nil || !(q >= 0 && q <= 1) {
				continue
			}
		}
		switch language, _, _ := strings.Cut(strings.ToLower(tag), "-"); language {
		case "zh", "*":
			zh = max(zh, q)
		default:
			asked = max(asked, q)
		}
	}
	return asked > zh
}
