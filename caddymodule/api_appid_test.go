package caddymodule

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"unsafe"
)

// isPartOf reports whether two strings share memory.
func isPartOf(part, whole string) bool {
	at, start := uintptr(unsafe.Pointer(unsafe.StringData(part))), uintptr(unsafe.Pointer(unsafe.StringData(whole)))
	return start <= at && at < start+uintptr(len(whole))
}

// Caches keep appids. The request line that one came in goes, if it is long, and a short one costs no copy.
func TestAppIDLeavesLongRequestLine(t *testing.T) {
	t.Parallel()
	inPath := func(t *testing.T, r *http.Request) string {
		req := &apiRequest{Request: r}
		if refused := new(API).read(req); refused != nil {
			t.Fatalf("refused: %s", refused.msg)
		}
		return req.appid
	}
	inLogin := func(t *testing.T, r *http.Request) string {
		_, appid, _, refused := readLogin(&apiRequest{Request: r})
		if refused != nil {
			t.Fatalf("refused: %s", refused.msg)
		}
		return appid
	}
	for name, c := range map[string]struct {
		target string
		appid  func(*testing.T, *http.Request) string
	}{
		"path":  {"/" + accountID + "/cgi-bin/x?pad=", inPath},
		"login": {"/sns/jscode2session?appid=" + accountID + "&js_code=", inLogin},
	} {
		for length, pinned := range map[int]bool{maxPinnedLine: true, maxPinnedLine + 1: false} {
			r := httptest.NewRequest(http.MethodGet, c.target+strings.Repeat("x", length-len(c.target)), nil)
			appid := c.appid(t, r)
			if appid != accountID || isPartOf(appid, r.RequestURI) != pinned {
				t.Errorf("%s of %d bytes: got %q, part of it: %v, want %v", name, length, appid, isPartOf(appid, r.RequestURI), pinned)
			}
		}
	}
}

// The form of a request for a token is not kept either.
func TestAppIDLeavesForm(t *testing.T) {
	t.Parallel()
	r := httptest.NewRequest(http.MethodGet, "/cgi-bin/token?appid="+accountID, nil)
	asked, refused := readGrant(httptest.NewRecorder(), &apiRequest{Request: r, known: classify("/cgi-bin/token")}, grantBodyTimeout)
	if refused != nil || asked.AppID != accountID || isPartOf(asked.AppID, r.RequestURI) {
		t.Errorf("got %q, part of the query: %v, %v", asked.AppID, isPartOf(asked.AppID, r.RequestURI), refused)
	}
	if params, _ := url.ParseQuery(r.URL.RawQuery); !isPartOf(params.Get("appid"), r.RequestURI) {
		t.Error("net/url copies values by itself: the copy in readGrant can go")
	}
}

// An appid in another case is none of anybody's, and a path of WeChat's may be in another case than a client's: whoever wrote one is told what to
// write.
func TestAPIWrongCase(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	opaque := g.opaque(accountID, crmKey)
	wechat.seen()
	upper := strings.ToUpper(accountID)
	for _, c := range []struct {
		target, key string
		status      int
		code        int64
		want        string
	}{
		{"/" + upper + "/cgi-bin/user/info", crmKey, 400, 40013, "lower case: /" + accountID + "/cgi-bin/user/info"},
		{"/WX" + accountID[2:] + "//", crmKey, 400, 40013, "lower case: /" + accountID},
		{"/" + upper + "/cgi-bin/user/info?access_token=" + opaque, "", 200, 40013, "lower case: /" + accountID + "/cgi-bin/user/info"},
		{"/" + upper + "/cgi-bin/token?grant_type=client_credential&appid=" + accountID + "&secret=" + crmKey, "", 200, 40013, "/" + accountID + "/cgi-bin/token"},
		{"/cgi-bin/token?grant_type=client_credential&appid=" + upper + "&secret=" + crmKey, "", 200, 40013, appIDShape},
		{"/" + authorizerID + "/cgi-bin/token?grant_type=client_credential&appid=" + accountID + "&secret=" + crmKey, "", 200, 40013, "different"},
		{"/" + accountID + "/CGI-BIN/USER/info", shopKey, 403, 48001, "cover /cgi-bin/user/info, in that case alone"},
		{"/" + accountID + "/CGI-BIN/MENU/GET", shopKey, 403, 48001, "do not cover /CGI-BIN/MENU/GET"},
	} {
		var headers []string
		if c.key != "" {
			headers = []string{bearer(c.key)}
		}
		if a := g.get(c.target, headers...); a.Status != c.status || a.code(t) != c.code || !strings.Contains(string(a.Body), c.want) {
			t.Errorf("%.40s: got %d %s, want %d, %d and %s", c.target, a.Status, a.Body, c.status, c.code, c.want)
		}
	}
	if calls := wechat.seen(); len(calls) != 0 {
		t.Errorf("WeChat was called: %+v", calls)
	}
	// Which case WeChat takes of a path is WeChat's to say.
	if a := g.get("/"+accountID+"/CGI-BIN/USER/info", bearer(crmKey)); a.Status != 200 || wechat.one(t).Path != "/CGI-BIN/USER/info" {
		t.Errorf("got %d %s", a.Status, a.Body)
	}
}
