package browser_test

import (
	"bytes"
	"image/png"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
	"github.com/makiuchi-d/gozxing"
	"github.com/makiuchi-d/gozxing/qrcode"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

const (
	authorizePage = "/wx/authorize"
	preAuthAPI    = "/cgi-bin/component/api_create_preauthcode"
	queryAuthAPI  = "/cgi-bin/component/api_query_auth"

	agree  = "a:first-of-type" // on WeChat's pages
	refuse = "a:last-of-type"
)

// scan reads the QR code that the page shows, from the screen.
func (v *visitor) scan() string {
	v.t.Helper()
	return v.scanOf("figure svg")
}

func (v *visitor) scanOf(selector string) string {
	v.t.Helper()
	picture, err := png.Decode(bytes.NewReader(get(v, chromedp.Screenshot(chromedp.CSS(selector)))))
	if err != nil {
		v.t.Fatal(err)
	}
	bitmap, err := gozxing.NewBinaryBitmapFromImage(picture)
	if err != nil {
		v.t.Fatal(err)
	}
	code, err := qrcode.NewQRCodeReader().Decode(bitmap, nil)
	if err != nil {
		v.t.Fatalf("the QR code cannot be read: %v", err)
	}
	return code.GetText()
}

// meetWeChat fails unless WeChat's page asks the visitor.
func (v *visitor) meetWeChat() {
	v.t.Helper()
	if text := get(v, chromedp.Text(chromedp.CSS("body"))); !strings.HasPrefix(v.at, v.w.WeChat.URL()+"/") || strings.Contains(get(v, chromedp.InnerHTML(chromedp.CSS("body"))), `class="error"`) {
		v.t.Fatalf("not asked by WeChat, at %s: %s", v.at, text)
	}
}

// stops fails unless the tab key stops at these words.
func (v *visitor) stops(want ...string) {
	v.t.Helper()
	if got := v.tab(); !slices.Equal(got, want) {
		v.t.Errorf("%s: the tab key stops at %q, want %q", v.at, got, want)
	}
}

// authorization has owners of accounts authorise the platform.
func authorization(t *testing.T, w *world) {
	owner := newVisitor(t, w, desktop, chinese)
	owner.open(w.URL(authorizePage))
	owner.see("authorize", http.StatusOK, "公众号 / 小程序授权", "在电脑上授权", "或用手机微信扫码授权", integration.PlatformID)
	owner.stops("在电脑上授权")
	link := owner.scan()
	if want := w.URL(authorizePage + "/go?kind=h5"); link != want {
		t.Fatalf("the QR code says %s, want %s", link, want)
	}
	owner.click(".desktop a")
	owner.meetWeChat()
	owner.click(agree)
	result := owner.at
	owner.see("authorized", http.StatusOK, "授权成功", "授权方", integration.AuthorizerID, "已授权的权限", "消息管理")
	if width := get(owner, chromedp.Evaluate[int](`document.querySelector("img").naturalWidth`)); width != 96 {
		t.Errorf("the account's picture is %d pixels wide", width)
	}
	if strings.Contains(get(owner, chromedp.OuterHTML(chromedp.CSS("html"))), "auth_code") {
		t.Error("the page about the account has the code in it")
	}

	t.Run("phone", func(t *testing.T) {
		v := newVisitor(t, w, phone, english)
		v.open(link)
		if u, err := url.Parse(v.at); err != nil || u.Path != authorizePage {
			t.Fatalf("scanning leads to %s", v.at)
		}
		v.see("authorize", http.StatusOK, "Authorize your WeChat account", "Authorize in WeChat")
		v.stops("Authorize in WeChat")
		v.click(".phone a")
		v.meetWeChat()
		v.click(agree)
		v.see("authorized", http.StatusOK, "Authorized", "授权方", "Permissions granted")
		first := v.at

		other, err := w.WeChat.AuthCode(integration.PlatformID, integration.AuthorizerID)
		if err != nil {
			t.Fatal(err)
		}
		v.open(regexp.MustCompile(`auth_code=[^&]*`).ReplaceAllLiteralString(first, "auth_code="+url.QueryEscape(other)))
		v.see("authorize-used", http.StatusGone, "Authorization expired", "Start again")
		v.stops("Start again")
		v.click("main a")
		v.see("authorize", http.StatusOK, "Authorize in WeChat")
		v.back()
		v.back() // to the page about the account
		if v.at != first {
			t.Errorf("two pages back is %s", v.at)
		}
		v.see("authorized", http.StatusOK, "Authorized", "授权方")
	})
	t.Run("phone in Chinese", func(t *testing.T) {
		v := newVisitor(t, w, phone, chinese)
		v.open(w.URL(authorizePage + "?category=1,999&biz_appid=" + integration.AuthorizerID))
		v.see("authorize-narrow", http.StatusOK, "在微信中授权", "仅限授权该账号", integration.AuthorizerID)
		v.click(".phone a")
		v.meetWeChat()
		v.click(agree)
		v.see("authorized-narrow", http.StatusOK, "授权成功", "权限集 999")
		v.open(result)
		v.see("authorize-foreign", http.StatusBadRequest, "授权未完成", "重新开始")
		v.click("main a")
		v.see("authorize", http.StatusOK, "在微信中授权")
		v.open(w.URL(authorizePage + "?kind=fax"))
		v.see("authorize-bad-link", http.StatusBadRequest, "链接无效")
	})
	t.Run("keyboard", func(t *testing.T) {
		v := newVisitor(t, w, desktop, english)
		v.open(w.URL("/wx/then"))
		v.see("authorize", http.StatusOK, "Authorize on this computer", "or scan with WeChat on your phone")
		get(v, chromedp.KeyEvent(kb.Tab))
		v.follow(chromedp.KeyEvent(kb.Enter))
		v.meetWeChat()
		get(v, chromedp.KeyEvent(kb.Tab))
		v.follow(chromedp.KeyEvent(kb.Enter))
		if want := w.web + "/accounts?from=gateway&appid=" + integration.AuthorizerID; v.at != want || v.status != http.StatusOK {
			t.Errorf("landed at %s with status %d, want %s", v.at, v.status, want)
		}
		v.content("then")
		v.open(w.URL(authorizePage + "/wx9999999999999999"))
		v.see("authorize-unknown", http.StatusNotFound, "No such page")
		v.stops()
	})
	t.Run("WeChat fails", func(t *testing.T) {
		v := newVisitor(t, w, desktop, chinese)
		for _, tt := range []struct {
			name, says string
			status     int64
			fault      wxsim.Fault
		}{
			{"authorize-refused", "微信拒绝了这个第三方平台的请求", http.StatusBadGateway, wxsim.Fault{Errcode: 48001, Times: -1}},
			{"authorize-unavailable", "现在联系不上微信", http.StatusServiceUnavailable, wxsim.Fault{Status: http.StatusBadGateway, Times: -1}},
		} {
			w.WeChat.FailNext(preAuthAPI, tt.fault)
			v.open(w.URL(authorizePage))
			v.click(".desktop a")
			w.WeChat.ClearFaults()
			v.see(tt.name, tt.status, "暂时无法授权", tt.says, "重新开始")
		}
		v.click("main a")
		v.click(".desktop a")
		v.meetWeChat()
		w.WeChat.FailNext(queryAuthAPI, wxsim.Fault{Status: http.StatusBadGateway, Times: -1})
		v.click(agree)
		w.WeChat.ClearFaults()
		v.see("authorize-pending", http.StatusServiceUnavailable, "授权尚未完成", "重试")
		v.stops("重试")
		v.click("main a")
		v.see("authorized-missing", http.StatusOK, "授权成功", "授权方", "未授权的权限", "网页服务") // the owner granted little before
	})
	t.Run("too often", func(t *testing.T) {
		v := newVisitor(t, w, desktop, english)
		const starts = 10 // of one visitor at once
		for range starts {
			v.open(w.URL(authorizePage))
			v.click(".desktop a")
			if v.status != http.StatusOK {
				break
			}
			v.meetWeChat()
		}
		v.see("authorize-too-many", http.StatusTooManyRequests, "Too many attempts")
	})
}
