package caddymodule

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"rsc.io/qr"
)

func TestAuthorizePage(t *testing.T) {
	f := newAuthorize(t, &Authorize{})
	for _, tt := range []struct {
		name, target, accept string
		want                 []string
	}{
		{"zh", "", "", []string{`lang="zh-CN"`, "在电脑上授权", `href="/wx/authorize/go?kind=pc"`, `href="/wx/authorize/go?kind=h5"`, "<svg", `referrerpolicy="origin"`}},
		{"en", "/", "en-GB,en;q=0.9", []string{`lang="en"`, "Authorize on this computer", `href="/wx/authorize/go?kind=pc"`}},
		{"the chosen platform", "/" + platformID, "en", []string{`href="/wx/authorize/go?kind=pc"`}},
		{"another platform", "/" + otherPlatform, "en", []string{`href="/wx/authorize/go?kind=pc&amp;platform=` + otherPlatform + `"`, "<code>" + otherPlatform}},
		{"options", "?auth_type=1&biz_appid=" + authorizerID + "&category=1%7C15,1", "en",
			[]string{`href="/wx/authorize/go?kind=h5&amp;auth_type=1&amp;biz_appid=` + authorizerID + `&amp;category=1,15"`, "<code>" + authorizerID}},
		{"for the phone", "?kind=h5", "en", []string{`<main class="h5">`}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rec := f.get(authorizeBase+tt.target, "Accept-Language", tt.accept)
			body := rec.Body.String()
			for _, s := range tt.want {
				if !strings.Contains(body, s) {
					t.Errorf("body lacks %q:\n%s", s, body)
				}
			}
			h := rec.Header()
			if rec.Code != http.StatusOK || h.Get("Referrer-Policy") != "origin" || h.Get("Cache-Control") != "no-store" || h.Get("Vary") != "Accept-Language" || len(h.Values("Set-Cookie")) > 0 {
				t.Errorf("answer %d %v", rec.Code, h)
			}
			assertSelfContained(t, rec)
		})
	}
	if n := f.wechat.count(preAuthPath); n != 0 {
		t.Errorf("the page made %d codes", n)
	}
	if got := counted(t, f.app.metrics().authorize, "page", "ok"); got != 6 {
		t.Errorf("counted %v", got)
	}
}

// assertSelfContained fails for a page that a browser would load anything for, or whose style its policy forbids.
func assertSelfContained(t *testing.T, rec *httptest.ResponseRecorder) {
	t.Helper()
	body, csp := rec.Body.String(), rec.Header().Get("Content-Security-Policy")
	if m := regexp.MustCompile(`(?i)<(script|link|iframe|object|form)\b|\b(src|style|on\w+)=`).FindString(body); m != "" {
		t.Errorf("the page has %q", m)
	}
	_, rest, _ := strings.Cut(body, "<style>")
	style, _, _ := strings.Cut(rest, "</style>")
	if !strings.HasPrefix(csp, "default-src 'none'; style-src 'sha256-"+styleHash(style)+"'; ") || strings.Contains(csp, "unsafe") {
		t.Errorf("Content-Security-Policy %q", csp)
	}
}

func TestAuthorizePageRefuses(t *testing.T) {
	f := newAuthorize(t, &Authorize{AuthType: 1})
	for _, tt := range []struct {
		name, target string
		status       int
	}{
		{"unknown platform", "/" + strangerID, 404},
		{"an account for a platform", "/" + accountID, 404},
		{"unknown platform at go", "/go?kind=pc&platform=" + strangerID, 404},
		{"no kind", "/go", 400},
		{"unknown kind", "/go?kind=app", 400},
		{"kind twice", "/go?kind=pc&kind=h5", 400},
		{"kind of another case", "/go?kind=PC", 400},
		{"wider auth_type", "/go?kind=pc&auth_type=3", 400},
		{"auth_type that is none", "?auth_type=x", 400},
		{"biz_appid", "/go?kind=pc&biz_appid=gh_1", 400},
		{"biz_appid with a parameter in it", "?biz_appid=" + authorizerID + "%26auth_type%3D6", 400},
		{"category", "?category=1;2", 400},
		{"category with a parameter in it", "/go?kind=h5&category=1%26a%3Db", 400},
		{"too many categories", "?category=" + manyCategories(maxCategories+1), 400},
		{"query that is none", "?auth_type=%zz", 400},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := f.logs.Len()
			rec := f.get(authorizeBase + tt.target)
			if rec.Code != tt.status || rec.Header().Get("Location") != "" || !strings.Contains(rec.Body.String(), "<h1>") {
				t.Errorf("answer %d\n%s", rec.Code, rec.Body)
			}
			if n := f.logs.Len() - before; n != 1 {
				t.Errorf("%d log lines, want 1", n)
			}
			assertPrivate(t, rec.Header())
		})
	}
	for _, host := range []string{"", "evil.example/x", "user@evil.example", `example.com\x`} {
		r := visit(http.MethodGet, authorizeBase)
		r.Host = host
		if rec := serve(t, f.Authorize, r, nil); rec.Code != http.StatusBadRequest {
			t.Errorf("Host %q: %d", host, rec.Code)
		}
	}
	rec := serve(t, f.Authorize, visit(http.MethodPost, authorizeBase+"/go?kind=pc"), nil)
	if rec.Code != http.StatusMethodNotAllowed || rec.Header().Get("Allow") != "GET, HEAD" {
		t.Errorf("POST: %d %v", rec.Code, rec.Header())
	}
	if n := f.wechat.count(preAuthPath); n != 0 {
		t.Errorf("%d codes were made", n)
	}
}

func manyCategories(n int) string {
	ids := make([]string, n)
	for i := range ids {
		ids[i] = string(rune('1'+i/100)) + string(rune('0'+i/10%10)) + string(rune('0'+i%10))
	}
	return strings.Join(ids, ",")
}

func TestAuthorizeGo(t *testing.T) {
	f := newAuthorize(t, &Authorize{})
	desktop := f.begin("kind=pc")
	if q := desktop.link.Query(); desktop.link.Scheme+"://"+desktop.link.Host != f.wechat.URL || desktop.link.Path != "/cgi-bin/componentloginpage" ||
		q.Get("component_appid") != platformID || q.Get("pre_auth_code") != "preauthcode@@@1" || q.Get("auth_type") != "3" || q.Has("biz_appid") || q.Has("category_id_list") {
		t.Errorf("link %s", desktop.link)
	}
	if got := desktop.callback.Scheme + "://" + desktop.callback.Host + desktop.callback.Path; got != "http://example.com"+authorizeBase+"/callback/"+platformID {
		t.Errorf("redirect_uri %s", got)
	}
	mobile := f.begin("kind=h5&auth_type=2&biz_appid=" + authorizerID + "&category=18,19&platform=" + otherPlatform)
	if mobile.link.Path != "/wxaopen/safe/bindcomponent" || mobile.link.Fragment != "wechat_redirect" ||
		!strings.HasPrefix(mobile.link.RawQuery, "action=bindcomponent&no_scan=1&component_appid="+otherPlatform+"&pre_auth_code=preauthcode%40%40%402&redirect_uri=") ||
		!strings.HasSuffix(mobile.link.RawQuery, "&auth_type=2&biz_appid="+authorizerID+"&category_id_list=18%7C19") {
		t.Errorf("link %s", mobile.link)
	}
	if !strings.HasSuffix(mobile.callback.Path, "/callback/"+otherPlatform) || mobile.state() == desktop.state() || mobile.cookie == desktop.cookie {
		t.Errorf("callback %s, cookie %s", mobile.callback, mobile.cookie)
	}
	rec := f.get(authorizeBase+"/go?kind=pc", "Cookie", desktop.cookie)
	c := rec.Result().Cookies()[0]
	if c.Name+"="+c.Value != desktop.cookie || c.Path != authorizeBase || !c.HttpOnly || c.Secure || c.SameSite != http.SameSiteLaxMode || c.MaxAge != 1800 {
		t.Errorf("cookie %+v", c)
	}
	if h := rec.Header(); rec.Code != http.StatusFound || h.Get("Referrer-Policy") != "origin" || h.Get("Cache-Control") != "no-store" || rec.Body.Len() > 0 {
		t.Errorf("answer %d %v", rec.Code, h)
	}
	if n := f.wechat.count(preAuthPath); n != 3 {
		t.Errorf("%d codes for 3 clicks", n)
	}
	if len(f.logs.All()) != 0 {
		t.Errorf("log %v", f.logs.All())
	}
}

// The longest links that are accepted still give a state that opens.
func TestAuthorizeGoWithManyCategories(t *testing.T) {
	f := newAuthorize(t, &Authorize{})
	b := f.begin("kind=pc&category=" + manyCategories(maxCategories))
	rec := f.get(b.back("queryauthcode@@@1"), "Cookie", b.cookie, "Accept-Language", "en")
	if rec.Code != http.StatusOK || strings.Count(rec.Body.String(), "<li>permission set ") < 50 {
		t.Errorf("answer %d\n%s", rec.Code, rec.Body)
	}
	if rec := f.get(authorizeBase + "?category=" + manyCategories(maxCategories)); rec.Code != http.StatusOK || !strings.Contains(rec.Body.String(), "<svg") {
		t.Errorf("page %d", rec.Code)
	}
}

// WeChat looks at the Referer. Who, by the browser's word, brings none of this host is shown the page first, at no cost.
func TestAuthorizeGoLeadsToThePage(t *testing.T) {
	f := newAuthorize(t, &Authorize{})
	for _, tt := range []struct {
		name    string
		headers []string
		direct  bool
	}{
		{"no word", nil, true},
		{"click on the page", []string{"Referer", "http://example.com/", "Sec-Fetch-Site", "same-origin"}, true},
		{"browser that never tells", []string{"Sec-Fetch-Site", "same-origin"}, true},
		{"QR code", []string{"Sec-Fetch-Site", "none"}, false},
		{"another site", []string{"Referer", "https://evil.example/", "Sec-Fetch-Site", "cross-site"}, false},
		{"another site that hides", []string{"Sec-Fetch-Site", "cross-site"}, false},
		{"image of another site", []string{"Sec-Fetch-Site", "cross-site", "Sec-Fetch-Dest", "image"}, false},
		{"host with ours in it", []string{"Referer", "https://example.com.evil.example/"}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := f.wechat.count(preAuthPath)
			rec := f.get(authorizeBase+"/go?kind=h5&biz_appid="+authorizerID+"&platform="+otherPlatform, tt.headers...)
			made := f.wechat.count(preAuthPath) - before
			if tt.direct {
				if rec.Code != http.StatusFound || made != 1 {
					t.Errorf("answer %d, %d codes", rec.Code, made)
				}
				return
			}
			want := authorizeBase + "/" + otherPlatform + "?biz_appid=" + authorizerID + "&kind=h5"
			if rec.Code != http.StatusSeeOther || rec.Header().Get("Location") != want || made != 0 || len(rec.Header().Values("Set-Cookie")) > 0 {
				t.Errorf("answer %d to %s, %d codes", rec.Code, rec.Header().Get("Location"), made)
			}
			if page := f.get(want); !strings.Contains(page.Body.String(), `<main class="h5">`) {
				t.Errorf("the page:\n%s", page.Body)
			}
		})
	}
}

// Browsers leave out the port that a scheme has anyway.
func TestAuthorizeGoWithTheSchemesPort(t *testing.T) {
	for origin, referer := range map[string]string{
		"https://wx.example.com:443": "https://wx.example.com/", "http://wx.example.com:80": "http://wx.example.com/",
		"https://wx.example.com:8443": "https://wx.example.com:8443/", "http://wx.example.com:443": "http://wx.example.com:443/",
	} {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.Header.Set("Referer", referer)
		if !fromHere(r, origin) {
			t.Errorf("a click at %s does not come from %s", referer, origin)
		}
	}
}

func TestAuthorizeLooksUseNothingUp(t *testing.T) {
	f := newAuthorize(t, &Authorize{})
	b := f.begin("kind=pc")
	for _, target := range []string{authorizeBase + "/go?kind=pc", b.back("queryauthcode@@@1")} {
		if rec := serve(t, f.Authorize, visit(http.MethodHead, target, "Cookie", b.cookie), nil); rec.Code != http.StatusNoContent {
			t.Errorf("HEAD: %d", rec.Code)
		}
		for _, header := range [][]string{
			{"Sec-Purpose", "prefetch;prerender"}, {"Purpose", "prefetch"}, {"X-Moz", "prefetch"}, {"X-Purpose", "preview"},
		} {
			rec := f.get(target, header[0], header[1], "Cookie", b.cookie)
			if rec.Code != http.StatusServiceUnavailable || rec.Header().Get("Location") != "" {
				t.Errorf("%v: %d", header, rec.Code)
			}
		}
	}
	if a, b := f.wechat.count(preAuthPath), f.wechat.count(queryAuthPath); a != 1 || b != 0 {
		t.Errorf("WeChat was asked for %d codes and %d exchanges", a, b)
	}
}

func TestAuthorizeWhereabouts(t *testing.T) {
	f := newAuthorize(t, &Authorize{})
	start := func(h caddyhttp.MiddlewareHandler, target string, change func(*http.Request)) begun {
		t.Helper()
		r := visit(http.MethodGet, target)
		change(r)
		return readStart(t, serve(t, h, r, nil))
	}
	plain := func(*http.Request) {}
	t.Run("https", func(t *testing.T) {
		r := visit(http.MethodGet, authorizeBase+"/go?kind=pc")
		r.TLS = new(tls.ConnectionState)
		rec := serve(t, f.Authorize, r, nil)
		if b := readStart(t, rec); b.callback.Scheme != "https" || !rec.Result().Cookies()[0].Secure {
			t.Errorf("callback %s, cookie %v", b.callback, rec.Result().Cookies()[0])
		}
	})
	t.Run("forwarded by nobody we trust", func(t *testing.T) {
		b := start(f.Authorize, authorizeBase+"/go?kind=pc", func(r *http.Request) { r.Header.Set("X-Forwarded-Proto", "https") })
		if b.callback.Scheme != "http" {
			t.Errorf("callback %s", b.callback)
		}
	})
	inside := middleware(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
		r.URL.Path = strings.TrimPrefix(r.URL.Path, "/out side")
		r.URL.RawPath = ""
		return f.ServeHTTP(w, r, next)
	})
	t.Run("handle_path", func(t *testing.T) {
		rec := serve(t, inside, visit(http.MethodGet, "/out%20side"+authorizeBase+"/go?kind=pc"), nil)
		b := readStart(t, rec)
		if b.callback.EscapedPath() != "/out%20side"+authorizeBase+"/callback/"+platformID || rec.Result().Cookies()[0].Path != "/out%20side"+authorizeBase {
			t.Errorf("callback %s, cookie %v", b.callback, rec.Result().Cookies()[0])
		}
		page := serve(t, inside, visit(http.MethodGet, "/out%20side"+authorizeBase), nil).Body.String()
		if !strings.Contains(page, `href="/out%20side/wx/authorize/go?kind=pc"`) {
			t.Errorf("page:\n%s", page)
		}
	})
	t.Run("rewritten", func(t *testing.T) {
		h := middleware(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
			r.URL.Path = authorizeBase
			return f.ServeHTTP(w, r, next)
		})
		if page := serve(t, h, visit(http.MethodGet, "/menu"), nil).Body.String(); !strings.Contains(page, `href="/wx/authorize/go?kind=pc"`) {
			t.Errorf("page:\n%s", page)
		}
	})
	t.Run("origin", func(t *testing.T) {
		f.origin = "https://wx.example.com"
		defer func() { f.origin = "" }()
		b := start(f.Authorize, authorizeBase+"/go?kind=pc", plain)
		if b.callback.Scheme+"://"+b.callback.Host != f.origin {
			t.Errorf("callback %s", b.callback)
		}
		if page := f.get(authorizeBase).Body.String(); !strings.Contains(page, `href="https://wx.example.com/wx/authorize/go?kind=pc"`) {
			t.Errorf("page:\n%s", page)
		}
		// A page on another host is no page of this platform's: the visitor is led to the right one.
		rec := f.get(authorizeBase+"/go?kind=pc", "Referer", "http://example.com/")
		if rec.Code != http.StatusSeeOther || rec.Header().Get("Location") != "https://wx.example.com"+authorizeBase+"?kind=pc" {
			t.Errorf("answer %d to %s", rec.Code, rec.Header().Get("Location"))
		}
	})
	t.Run("at the root", func(t *testing.T) {
		root := newAuthorize(t, &Authorize{Base: "/"})
		rec := root.get("/go?kind=pc")
		b := readStart(t, rec)
		if b.callback.Path != "/callback/"+platformID || rec.Result().Cookies()[0].Path != "/" {
			t.Errorf("callback %s", b.callback)
		}
		if rec := root.get("/go?kind=pc", "Sec-Fetch-Site", "none"); rec.Header().Get("Location") != "/?kind=pc" {
			t.Errorf("led to %s", rec.Header().Get("Location"))
		}
		if page := root.get("/"); !strings.Contains(page.Body.String(), `href="/go?kind=pc"`) {
			t.Errorf("page:\n%s", page.Body)
		}
	})
}

func TestAuthorizePassesOtherPathsOn(t *testing.T) {
	f := newAuthorize(t, &Authorize{})
	for _, path := range []string{"/", authorizeBase + "X", authorizeBase + "/go/", authorizeBase + "/callback", authorizeBase + "/GO", authorizeBase + "/gh_1", "/x" + authorizeBase, authorizeBase + "/" + platformID + "/x"} {
		passed := false
		serve(t, f.Authorize, visit(http.MethodGet, path), caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
			passed = true
			return nil
		}))
		if !passed {
			t.Errorf("%s was not passed on", path)
		}
	}
}

func TestAuthorizeConfig(t *testing.T) {
	t.Setenv("WECHAT_AUTHORIZE_TEST", "/relative")
	one := `{"platforms":[` + platformJSON(platformID) + `],"api":["http://127.0.0.1:1"]}`
	none := `{"accounts":[{"appid":"` + accountID + `","secret":"s"}],"api":["http://127.0.0.1:1"]}`
	for _, tt := range []struct{ name, app, config, wantErr string }{
		{"least", one, `{"base":"/wx"}`, ""},
		{"complete", testConfig(""), `{"base":"/wx","platform":"` + otherPlatform + `","then":"https://a.example.com/#/x","auth_type":8,"origin":"https://wx.example.com"}`, ""},
		{"no base", one, `{}`, "base is missing"},
		{"base with a star", one, `{"base":"/wx/*"}`, "a base is a path, not a matcher"},
		{"no platform", none, `{"base":"/wx"}`, "there is no platform to authorise"},
		{"several platforms", testConfig(""), `{"base":"/wx"}`, "say with the subdirective platform which one"},
		{"unknown platform", one, `{"base":"/wx","platform":"` + strangerID + `"}`, "platform '" + strangerID + "' is not configured"},
		{"auth_type", one, `{"base":"/wx","auth_type":7}`, "auth_type '7' is none of WeChat's"},
		{"relative then", one, `{"base":"/wx","then":"/x"}`, "then: relative redirect target '/x'"},
		{"hidden relative then", one, `{"base":"/wx","then":"{env.WECHAT_AUTHORIZE_TEST}"}`, "then: relative redirect target '/relative'"},
		{"then of nothing", one, `{"base":"/wx","then":"{env.WECHAT_NO_SUCH_VARIABLE}"}`, "then: {env.WECHAT_NO_SUCH_VARIABLE} resolves to nothing"},
		{"then with a line end in its fragment", one, `{"base":"/wx","then":"https://a.example.com/#\r\nX: y"}`, "percent-encoded"},
		{"origin with a path", one, `{"base":"/wx","origin":"https://a.example.com/x"}`, "is not a scheme and host alone"},
		{"unknown field", one, `{"base":"/wx","redirect":"https://evil.example"}`, "unknown field"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, ctx := newTestApp(t, tt.app)
			_, err := ctx.LoadModuleByID("http.handlers.wechat_authorize", json.RawMessage(tt.config))
			if tt.wantErr == "" && err != nil || tt.wantErr != "" && (err == nil || !strings.Contains(err.Error(), tt.wantErr)) {
				t.Errorf("err = %v, want %q in it", err, tt.wantErr)
			}
		})
	}
}

func TestAuthorizeGoOn(t *testing.T) {
	t.Parallel()
	for then, want := range map[string]string{
		"https://a.example.com":           "https://a.example.com?appid=wx1",
		"https://a.example.com/x?b=c":     "https://a.example.com/x?b=c&appid=wx1",
		"https://a.example.com/x?b=c&":    "https://a.example.com/x?b=c&appid=wx1",
		"https://a.example.com/?":         "https://a.example.com/?appid=wx1",
		"https://a.example.com/#/list?d=": "https://a.example.com/?appid=wx1#/list?d=",
	} {
		if got := (&Authorize{then: then}).goOn("wx1"); got != want {
			t.Errorf("%s leads to %s, want %s", then, got, want)
		}
	}
}

func TestNarrows(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		asked, configured int
		want              bool
	}{{3, 3, true}, {1, 3, true}, {2, 3, true}, {4, 3, false}, {6, 3, false}, {3, 1, false}, {2, 1, false}, {8, 6, true}, {7, 6, false}, {0, 6, false}} {
		if got := narrows(tt.asked, tt.configured); got != tt.want {
			t.Errorf("narrows(%d, %d) = %v", tt.asked, tt.configured, got)
		}
	}
}

// The drawing has the very modules of the code, inside a quiet zone.
func TestAuthorizeQRCode(t *testing.T) {
	t.Parallel()
	const address = "https://wx.example.com/wx/authorize/go?kind=h5&biz_appid=wx3333333333333333"
	svg, err := qrCode(address, `"><b>`)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(svg), "<b>") {
		t.Errorf("the label is not escaped: %.200s", svg)
	}
	want, err := qr.Encode(address, qr.M)
	if err != nil {
		t.Fatal(err)
	}
	black := make(map[[2]int]bool)
	for _, m := range regexp.MustCompile(`M(\d+) (\d+)h(\d+)v1h-(\d+)z`).FindAllStringSubmatch(string(svg), -1) {
		n := make([]int, 4)
		for i := range n {
			n[i], _ = strconv.Atoi(m[i+1])
		}
		if n[2] != n[3] {
			t.Errorf("a run that does not close: %s", m[0])
		}
		for x := range n[2] {
			black[[2]int{n[0] + x, n[1]}] = true
		}
	}
	side := want.Size + 8
	if !strings.Contains(string(svg), fmt.Sprintf(`viewBox="0 0 %d %d"`, side, side)) {
		t.Errorf("not %d modules wide: %.100s", side, svg)
	}
	for y := range side {
		for x := range side {
			if black[[2]int{x, y}] != want.Black(x-4, y-4) {
				t.Fatalf("module %d,%d is wrong", x, y)
			}
		}
	}
	if _, err := qrCode(strings.Repeat("x", 3000), ""); err == nil {
		t.Error("a text that fits in no code was drawn")
	}
}

func TestPictureOf(t *testing.T) {
	t.Parallel()
	for address, want := range map[string]string{
		"http://wx.qlogo.cn/mmopen/a/0":        "https://wx.qlogo.cn/mmopen/a/0",
		"https://mmbiz.qpic.cn/x?wx_fmt=png":   "https://mmbiz.qpic.cn/x?wx_fmt=png",
		"https://wx.qlogo.cn.evil.example/":    "",
		"https://evilqlogo.cn/":                "",
		"https://u@wx.qlogo.cn/":               "",
		"https://wx.qlogo.cn:8443/":            "",
		"javascript:alert(1)//wx.qlogo.cn":     "",
		"data:image/png;base64,AAAA.qlogo.cn/": "",
		"":                                     "",
	} {
		if got := pictureOf(address); got != want {
			t.Errorf("%s: %q", address, got)
		}
	}
}

// The page's links stay on this host, and lead to a start that works, whatever the request was like.
func TestAuthorizeLinksBack(t *testing.T) {
	f := newAuthorize(t, &Authorize{})
	h := middleware(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
		r.URL.Path, r.URL.RawPath = strings.TrimPrefix(r.URL.Path, "//evil.example"), "" // as handle_path may
		return f.ServeHTTP(w, r, next)
	})
	r := visit(http.MethodGet, "/", "Sec-Fetch-Site", "none")
	r.URL.Path, r.URL.RawQuery = "//evil.example"+authorizeBase+"/go", "kind=pc"
	if location := serve(t, h, r, nil).Header().Get("Location"); location != "/evil.example"+authorizeBase+"?kind=pc" {
		t.Errorf("led to %q", location)
	}
	rec := f.get(authorizeBase + "?biz_appid=wxbad&auth_type=1")
	if body := rec.Body.String(); rec.Code != http.StatusBadRequest || !strings.Contains(body, `href="/wx/authorize">`) {
		t.Errorf("a malformed link: %d\n%s", rec.Code, body)
	}
}
