package browser_test

import (
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/chromedp/chromedp"

	"github.com/caddy-wechat/caddy-wechat/integration"
)

// signing is what became of a page that uses WeChat's JS-SDK.
type signing struct {
	Failed, Page string
	Signed       struct {
		AppID     string `json:"appId"`
		Timestamp int64  `json:"timestamp"`
		NonceStr  string `json:"nonceStr"`
		Signature string `json:"signature"`
	}
}

func (v *visitor) sign(address string) signing {
	v.t.Helper()
	v.open(address)
	get(v, chromedp.Poll[bool]("!!(window.signed || window.failed)", chromedp.WithPollingTimeout(stepLimit)))
	return get(v, chromedp.Evaluate[signing](`({Failed: window.failed || "", Page: location.href.split("#")[0], Signed: window.signed || {}})`))
}

// jssdk has pages run the lines of the README.
func jssdk(t *testing.T, w *world) {
	v := newVisitor(t, w, phone, chinese)
	got := v.sign(w.web + "/sdk?from=朋友圈&x=1#/home")
	if s := got.Signed; got.Failed != "" || s.AppID != integration.AuthorizerID ||
		!w.WeChat.CheckJSSDK(integration.AuthorizerID, s.NonceStr, strconv.FormatInt(s.Timestamp, 10), got.Page, s.Signature) {
		t.Errorf("WeChat would refuse the page: %+v", got)
	}
	v.content("a page on a host of the list")

	got = v.sign("https://" + foreignHost + "/sdk")
	if !strings.Contains(got.Failed, "Failed to fetch") || got.Signed.Signature != "" {
		t.Errorf("a page on another host: %+v", got)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	refused := false
	for address, status := range v.answered {
		refused = refused || strings.HasPrefix(address, w.URL("/wx/jssdk/")) && strings.Contains(address, foreignHost) && status == http.StatusForbidden
	}
	blocked := false
	for _, c := range v.complaints {
		blocked = blocked || strings.Contains(c.text, "CORS")
	}
	if !refused || !blocked {
		t.Errorf("refused %v, blocked %v: %v", refused, blocked, v.complaints)
	}
}
