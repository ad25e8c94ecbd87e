package caddymodule

import (
	"crypto/sha1"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

const (
	jssdkBase = "/wx/jssdk"
	shopPage  = "https://shop.example.com/cart?id=7&from=wechat"
)

// ticketDesk is the part of a fake WeChat that gives tickets: a new one for each call, named for type and account.
type ticketDesk struct {
	given  atomic.Int64
	life   atomic.Int64
	answer atomic.Pointer[string] // instead of a ticket
}

func newTicketDesk(f *fakeWeChat) *ticketDesk {
	d := new(ticketDesk)
	d.life.Store(7200)
	f.answer(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json; encoding=utf-8")
		if r.URL.Path != "/cgi-bin/ticket/getticket" {
			io.WriteString(w, `{"errcode":0,"errmsg":"ok"}`)
			return
		}
		n := d.given.Add(1)
		if instead := d.answer.Load(); instead != nil {
			io.WriteString(w, *instead)
			return
		}
		q := r.URL.Query()
		appid, _, _ := strings.Cut(strings.TrimPrefix(q.Get("access_token"), "REALTOKEN-"), "-")
		fmt.Fprintf(w, `{"errcode":0,"errmsg":"ok","ticket":%q,"expires_in":%d}`, ticketOf(q.Get("type"), appid, n), d.life.Load())
	})
	return d
}

func ticketOf(kind, appid string, n int64) string {
	return fmt.Sprintf("TICKET_%s_%s_%d", kind, appid, n)
}

func (d *ticketDesk) refuse(answer string) {
	if d.answer.Store(&answer); answer == "" {
		d.answer.Store(nil)
	}
}

// jssdkFixture is a handler of wechat_jssdk in front of a fake WeChat with the account, and the authorizer of one
// platform.
type jssdkFixture struct {
	*JSSDK
	t      *testing.T
	wechat *fakeWeChat
	desk   *ticketDesk
	logs   *observer.ObservedLogs
}

func newJSSDK(t *testing.T, hosts ...string) *jssdkFixture {
	t.Helper()
	wechat := newFakeWeChat(t)
	app, ctx := newTestApp(t, gatewayConfig(wechat.URL))
	f := &jssdkFixture{JSSDK: &JSSDK{Base: jssdkBase, Hosts: hosts}, t: t, wechat: wechat, desk: newTicketDesk(wechat)}
	if err := f.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	if err := f.Validate(); err != nil {
		t.Fatal(err)
	}
	core, logs := observer.New(zapcore.DebugLevel)
	f.logs, f.logger = logs, zap.New(core)
	f.authorize(app)
	return f
}

func (f *jssdkFixture) authorize(app *App) {
	f.t.Helper()
	err := app.manager().PutTicket(f.t.Context(), platformID, tokens.Ticket{Value: secret.New("ticket@@@1"), CreatedAt: time.Now()})
	if err != nil {
		f.t.Fatal(err)
	}
	if _, err := app.manager().ExchangeAuthCode(f.t.Context(), platformID, authorizerID, secret.New("queryauthcode@@@1")); err != nil {
		f.t.Fatal(err)
	}
}

// ask is a request with headers that are "Name: value".
func (f *jssdkFixture) ask(method, target string, headers ...string) *httptest.ResponseRecorder {
	f.t.Helper()
	r := httptest.NewRequest(method, target, nil)
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		r.Header.Add(name, value)
	}
	rec := serve(f.t, f.JSSDK, r, nil)
	if h := rec.Header(); h.Get("Vary") != "Origin" || h.Get("Cache-Control") != "no-store" || h.Get("Access-Control-Allow-Credentials") != "" {
		f.t.Errorf("%s %s: headers %v", method, target, h)
	}
	if strings.Contains(rec.Body.String(), "TICKET") || strings.Contains(rec.Body.String(), "REALTOKEN") {
		f.t.Errorf("the answer shows a secret: %s", rec.Body)
	}
	return rec
}

func (f *jssdkFixture) get(target string, headers ...string) *httptest.ResponseRecorder {
	f.t.Helper()
	return f.ask(http.MethodGet, target, headers...)
}

func signURL(appid, page string) string {
	return jssdkBase + "/" + appid + "?url=" + url.QueryEscape(page)
}

// nothingLeaks fails if a log line has a secret or a page's query in it.
func (f *jssdkFixture) nothingLeaks() {
	f.t.Helper()
	for _, e := range f.logs.All() {
		text := e.Message + fmt.Sprint(e.ContextMap())
		for _, s := range []string{"TICKET", "REALTOKEN", "-secret", "id=7", "from=wechat"} {
			if strings.Contains(text, s) {
				f.t.Errorf("log shows %q: %s", s, text)
			}
		}
	}
}

// wantSigned checks an answer by WeChat's own words: the parameters in alphabetical order, the page as it is.
func wantSigned(t *testing.T, rec *httptest.ResponseRecorder, appid, ticket, page string) {
	t.Helper()
	var got map[string]any
	if err := json.Unmarshal(rec.Body.Bytes(), &got); err != nil || rec.Code != http.StatusOK || rec.Header().Get("Content-Type") != "application/json" {
		t.Fatalf("%s: got %d %s %q", page, rec.Code, rec.Header().Get("Content-Type"), rec.Body)
	}
	stamp, isNumber := got["timestamp"].(float64)
	nonce, _ := got["nonceStr"].(string)
	if len(got) != 4 || got["appId"] != appid || !isNumber || time.Since(time.Unix(int64(stamp), 0)).Abs() > time.Minute || len(nonce) < 16 {
		t.Fatalf("%s: got %v", page, got)
	}
	sum := sha1.Sum(fmt.Appendf(nil, "jsapi_ticket=%s&noncestr=%s&timestamp=%d&url=%s", ticket, nonce, int64(stamp), page))
	if got["signature"] != hex.EncodeToString(sum[:]) {
		t.Errorf("%s: signature %v is not under %s", page, got["signature"], ticket)
	}
}

func TestJSSDKSigns(t *testing.T) {
	t.Parallel()
	f := newJSSDK(t, "shop.example.com", "*.wx.example.com", "localhost:8080")
	for query, page := range map[string]string{
		url.QueryEscape("https://shop.example.com/"):                       "https://shop.example.com/",
		url.QueryEscape(shopPage):                                          shopPage,
		url.QueryEscape(shopPage + "#/pay?a=b#c"):                          shopPage,
		url.QueryEscape("http://shop.example.com:80/a"):                    "http://shop.example.com:80/a",
		url.QueryEscape("https://shop.example.com:443/a"):                  "https://shop.example.com:443/a",
		url.QueryEscape("https://Shop.Example.com/A"):                      "https://Shop.Example.com/A",
		url.QueryEscape("https://wx0123456789abcdef.wx.example.com/p"):     "https://wx0123456789abcdef.wx.example.com/p",
		url.QueryEscape("http://localhost:8080/?x"):                        "http://localhost:8080/?x",
		url.QueryEscape("https://shop.example.com/%E4%B8%AD?q=%2B+%252F"):  "https://shop.example.com/%E4%B8%AD?q=%2B+%252F",
		url.QueryEscape("https://shop.example.com/a;b?c[]={d}|e^f&g='h';"): "https://shop.example.com/a;b?c[]={d}|e^f&g='h';",
		"https://shop.example.com/plain":                                   "https://shop.example.com/plain",
		"https://shop.example.com/plain?last=1":                            "https://shop.example.com/plain?last=1",
		"https://shop.example.com/%23x":                                    "https://shop.example.com/",
		url.QueryEscape(shopPage) + "&_=1700000000":                        shopPage,
	} {
		rec := f.get(jssdkBase + "/" + accountID + "?url=" + query)
		wantSigned(t, rec, accountID, ticketOf("jsapi", accountID, 1), page)
	}
	wantSigned(t, f.get(signURL(authorizerID, shopPage)), authorizerID, ticketOf("jsapi", authorizerID, 2), shopPage)
	if n := f.desk.given.Load(); n != 2 {
		t.Errorf("%d tickets were fetched, want one for each account", n)
	}
	nonces := map[string]bool{}
	for range 50 {
		nonces[f.get(signURL(accountID, shopPage)).Body.String()] = true
	}
	if len(nonces) != 50 {
		t.Errorf("%d different answers of 50: a nonce came twice", len(nonces))
	}
	if n := counted(t, f.app.metrics().jssdk, "ok"); n != 65 {
		t.Errorf("counted %v, want 65", n)
	}
	f.nothingLeaks()
}

func TestJSSDKRefuses(t *testing.T) {
	t.Parallel()
	f := newJSSDK(t, "shop.example.com", "*.wx.example.com", "localhost:8080")
	page := func(p string) string { return "/" + accountID + "?url=" + url.QueryEscape(p) }
	for target, c := range map[string]struct {
		status int
		result string
	}{
		"/" + accountID:           {400, "malformed"},
		"/" + accountID + "?url=": {400, "malformed"},
		"/" + accountID + "?URL=" + url.QueryEscape(shopPage):                   {400, "malformed"},
		page(shopPage) + "&url=" + url.QueryEscape(shopPage):                    {400, "malformed"},
		"/" + accountID + "?url=https://shop.example.com/cart?id=7&from=wechat": {400, "malformed"},
		"/" + accountID + "?url=https://shop.example.com/%zz":                   {400, "malformed"},
		page("https://shop.example.com/" + strings.Repeat("a", maxPageURL)):     {400, "malformed"},
		"/" + accountID + "?url=" + strings.Repeat("%61", maxPageURL+1):         {400, "malformed"},
		page("ftp://shop.example.com/"):                                         {400, "malformed"},
		page("javascript:alert(1)"):                                             {400, "malformed"},
		page("//shop.example.com/"):                                             {400, "malformed"},
		page("/cart"):                                                           {400, "malformed"},
		page("HTTPS://shop.example.com/"):                                       {400, "malformed"},
		page("https://shop.example.com@evil.example/"):                          {400, "malformed"},
		page("https://user:pass@shop.example.com/"):                             {400, "malformed"},
		page("https://evil.example\\@shop.example.com/"):                        {400, "malformed"},
		page("https://shop.example.com/a\\b"):                                   {400, "malformed"},
		page("https://shop.example.com/a b"):                                    {400, "malformed"},
		page("https://shop.example.com/a\nb"):                                   {400, "malformed"},
		page("https://shop.example.com/a\x00"):                                  {400, "malformed"},
		page("https://shop.example.com\t/"):                                     {400, "malformed"},
		page("https://shop.example.com/中"):                                      {400, "malformed"},
		page("https://shop.example.com%2f@evil.example/"):                       {400, "malformed"},
		page("https://[::1]/"):                                                  {400, "malformed"},
		page("https://shop.example.com:/"):                                      {400, "malformed"},
		page("https://:443/"):                                                   {400, "malformed"},
		page("https:///shop.example.com/"):                                      {400, "malformed"},
		page("https://evil.example/"):                                           {403, "host"},
		page("https://shop.example.com.evil.example/"):                          {403, "host"},
		page("https://evilshop.example.com/"):                                   {403, "host"},
		page("https://shop.example.com./"):                                      {403, "host"},
		page("https://evil.example/?https://shop.example.com/"):                 {403, "host"},
		page("https://evil.example?@shop.example.com/"):                         {403, "host"},
		page("https://evil.example#@shop.example.com/"):                         {403, "host"},
		page("https://shop.example.com:8443/"):                                  {403, "host"},
		page("http://shop.example.com:443/"):                                    {403, "host"},
		page("https://wx.example.com/"):                                         {403, "host"},
		page("https://a.b.wx.example.com/"):                                     {403, "host"},
		page("https://.wx.example.com/"):                                        {403, "host"},
		page("http://localhost/"):                                               {403, "host"},
		"/?url=" + url.QueryEscape(shopPage):                                    {404, "unknown"},
		"/wx0123456789ABCDEF?url=" + url.QueryEscape(shopPage):                  {404, "unknown"},
		"/" + accountID + "/?url=" + url.QueryEscape(shopPage):                  {404, "unknown"},
		"/x/" + accountID + "?url=" + url.QueryEscape(shopPage):                 {404, "unknown"},
		"/" + accountID + "%2fx?url=" + url.QueryEscape(shopPage):               {404, "unknown"},
	} {
		before := counted(t, f.app.metrics().jssdk, c.result)
		rec := f.get(jssdkBase + target)
		var body struct{ Error string }
		if err := json.Unmarshal(rec.Body.Bytes(), &body); rec.Code != c.status || err != nil || body.Error == "" {
			t.Errorf("%s: got %d %s, want %d", target, rec.Code, rec.Body, c.status)
		}
		if n := counted(t, f.app.metrics().jssdk, c.result) - before; n != 1 {
			t.Errorf("%s: counted %v as %s", target, n, c.result)
		}
	}
	if n := f.desk.given.Load(); n != 0 {
		t.Errorf("%d tickets were fetched", n)
	}
	f.nothingLeaks()
	for _, e := range f.logs.All() {
		if fields := e.ContextMap(); fields["remedy"] == "" || fields["reason"] == "" {
			t.Errorf("logged %s %v", e.Message, fields)
		}
	}
	if n := f.logs.FilterMessage("page not signed").Len(); n != 3 {
		t.Errorf("%d log lines, want one of each kind", n)
	}
	longest := shopPage + "&" + strings.Repeat("a", maxPageURL-len(shopPage)-1)
	for address, want := range map[string]int{longest: 200, longest + "a": 400} {
		if rec := f.get(signURL(accountID, address)); rec.Code != want {
			t.Errorf("a page with an address of %d bytes: got %d, want %d", len(address), rec.Code, want)
		}
	}
}

func TestJSSDKMethods(t *testing.T) {
	t.Parallel()
	f := newJSSDK(t, "shop.example.com")
	if rec := f.ask(http.MethodHead, signURL(accountID, shopPage)); rec.Code != http.StatusOK {
		t.Errorf("HEAD: got %d", rec.Code)
	}
	for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodDelete, "PROPFIND"} {
		rec := f.ask(method, signURL(accountID, shopPage))
		if rec.Code != http.StatusMethodNotAllowed || rec.Header().Get("Allow") != "GET, HEAD, OPTIONS" {
			t.Errorf("%s: got %d %v", method, rec.Code, rec.Header())
		}
	}
	passed := false
	next := caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { passed = true; return nil })
	for _, path := range []string{"/", "/wx/jssdk", "/wx/jssdkx/" + accountID, "/other"} {
		if passed = false; serve(t, f.JSSDK, httptest.NewRequest(http.MethodGet, path, nil), next).Header().Get("Vary") != "" || !passed {
			t.Errorf("%s is none of the handler's", path)
		}
	}
}

func TestJSSDKOrigins(t *testing.T) {
	t.Parallel()
	f := newJSSDK(t, "shop.example.com", "*.wx.example.com", "localhost:8080")
	for _, origin := range []string{
		"https://shop.example.com", "http://shop.example.com", "https://a.wx.example.com", "http://localhost:8080", "https://shop.example.com:443",
	} {
		rec := f.get(signURL(accountID, shopPage), "Origin: "+origin)
		if got := rec.Header().Values("Access-Control-Allow-Origin"); rec.Code != http.StatusOK || len(got) != 1 || got[0] != origin {
			t.Errorf("%s: got %d, allowed %q", origin, rec.Code, got)
		}
		// What went wrong, a page can read too.
		rec = f.get(signURL(accountID, "https://evil.example/"), "Origin: "+origin)
		if rec.Code != http.StatusForbidden || rec.Header().Get("Access-Control-Allow-Origin") != origin {
			t.Errorf("%s: got %d %v", origin, rec.Code, rec.Header())
		}
		rec = f.ask(http.MethodOptions, signURL(accountID, shopPage), "Origin: "+origin, "Access-Control-Request-Method: GET")
		h := rec.Header()
		if rec.Code != http.StatusNoContent || h.Get("Access-Control-Allow-Origin") != origin || h.Get("Access-Control-Allow-Methods") != "GET" || rec.Body.Len() != 0 {
			t.Errorf("preflight of %s: got %d %v", origin, rec.Code, h)
		}
	}
	for _, origin := range []string{
		"https://evil.example", "null", "", "*", "https://shop.example.com.evil.example", "https://shop.example.com/", "https://shop.example.com/x",
		"https://shop.example.com@evil.example", "https://shop.example.com:8443", "https://wx.example.com", "https://a.b.wx.example.com",
		"http://localhost", "file://", "shop.example.com", "https://shop.example.com\\", "https://shop.example.com https://evil.example",
	} {
		for _, method := range []string{http.MethodGet, http.MethodOptions, http.MethodPost} {
			rec := f.ask(method, signURL(accountID, shopPage), "Origin: "+origin)
			if _, allowed := rec.Header()["Access-Control-Allow-Origin"]; rec.Code != http.StatusForbidden || allowed {
				t.Errorf("%s from %q: got %d %v", method, origin, rec.Code, rec.Header())
			}
		}
	}
	rec := f.get(signURL(accountID, shopPage), "Origin: https://shop.example.com", "Origin: https://evil.example")
	if rec.Code != http.StatusForbidden {
		t.Errorf("two origins: got %d", rec.Code)
	}
	rec = f.get(signURL(accountID, shopPage))
	if _, allowed := rec.Header()["Access-Control-Allow-Origin"]; rec.Code != http.StatusOK || allowed {
		t.Errorf("no origin: got %d %v", rec.Code, rec.Header())
	}
}

// Any number of pages that open at once cost one ticket, and one access token.
func TestJSSDKStorm(t *testing.T) {
	t.Parallel()
	f := newJSSDK(t, "shop.example.com")
	const callers = 100
	begin, wg := make(chan struct{}), sync.WaitGroup{}
	var answers [callers]*httptest.ResponseRecorder
	for i := range callers {
		wg.Go(func() {
			<-begin
			answers[i] = f.get(signURL(accountID, shopPage))
		})
	}
	close(begin)
	wg.Wait()
	for _, rec := range answers {
		wantSigned(t, rec, accountID, ticketOf("jsapi", accountID, 1), shopPage)
	}
	if n, m := f.desk.given.Load(), f.wechat.tokensIssued(accountID); n != 1 || m != 1 {
		t.Errorf("%d tickets and %d tokens were fetched for %d callers, want one of each", n, m, callers)
	}
}

// An appid that somebody made up costs WeChat nothing, before the list of authorizers was read as well as after.
func TestJSSDKUnknownAccount(t *testing.T) {
	t.Parallel()
	wechat := newFakeWeChat(t)
	var asked atomic.Int64
	infos := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasSuffix(r.URL.Path, "/api_start_push_ticket") && !strings.HasSuffix(r.URL.Path, "/api_component_token") && !strings.HasSuffix(r.URL.Path, "/api_get_authorizer_list") {
			asked.Add(1)
		}
		wechat.ServeHTTP(w, r)
	}))
	defer infos.Close()
	app, ctx := newTestApp(t, testConfig(infos.URL))
	j := &JSSDK{Base: jssdkBase, Hosts: []string{"shop.example.com"}}
	if err := j.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	get := func(appid string) int {
		return serve(t, j, httptest.NewRequest(http.MethodGet, signURL(appid, shopPage), nil), nil).Code
	}
	if status := get(strangerID); status != http.StatusServiceUnavailable {
		t.Errorf("before any list was read: got %d", status)
	}
	if status := get(platformID); status != http.StatusNotFound {
		t.Errorf("a platform: got %d", status)
	}
	for _, platform := range []string{platformID, otherPlatform} {
		if err := app.manager().PutTicket(t.Context(), platform, tokens.Ticket{Value: secret.New("ticket"), CreatedAt: time.Now()}); err != nil {
			t.Fatal(err)
		}
	}
	deadline := time.Now().Add(30 * time.Second)
	status := 0
	for status != http.StatusNotFound && time.Now().Before(deadline) {
		status = get(strangerID)
	}
	if status != http.StatusNotFound {
		t.Errorf("with the list read: got %d", status)
	}
	if n := asked.Load(); n != 0 {
		t.Errorf("WeChat was asked %d times", n)
	}

	alone, ctx := newTestApp(t, `{"accounts": [{"appid": "`+accountID+`", "secret": "account-secret"}], "api": ["`+infos.URL+`"]}`)
	if j = (&JSSDK{Base: jssdkBase, Hosts: []string{"shop.example.com"}}); j.Provision(ctx) != nil || alone.account(accountID) == nil {
		t.Fatal("not provisioned")
	}
	if status := get(strangerID); status != http.StatusNotFound {
		t.Errorf("without platforms: got %d", status)
	}
}

// What WeChat refuses is explained in the log once, and told to the page without WeChat's words.
func TestJSSDKWeChatRefuses(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, answer, appid string
		status              int
		result              string
		want                map[string]any
	}{
		{"right missing", `{"errcode":48001,"errmsg":"api unauthorized rid: 64f1e2d3-0a1b2c3d-4e5f6071"}`, authorizerID, 502, "refused",
			map[string]any{"errcode": int64(48001), "rid": "64f1e2d3-0a1b2c3d-4e5f6071", "platform": platformID, "appid": authorizerID, "api": "/cgi-bin/ticket/getticket"}},
		{"egress address", `{"errcode":40164,"errmsg":"invalid ip 192.0.2.7, not in whitelist"}`, accountID, 502, "refused",
			map[string]any{"errcode": int64(40164), "egress_ip": "192.0.2.7"}},
		{"busy", `{"errcode":-1,"errmsg":"system error"}`, accountID, 503, "unavailable", map[string]any{"errcode": int64(-1)}},
		{"quota", `{"errcode":45009,"errmsg":"reach max api daily quota limit"}`, accountID, 503, "unavailable", map[string]any{"errcode": int64(45009)}},
		{"page of a proxy", `<html>`, accountID, 502, "unavailable", nil},
		{"no ticket in it", `{"errcode":0,"errmsg":"ok"}`, accountID, 502, "unavailable", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newJSSDK(t, "shop.example.com")
			f.desk.refuse(c.answer)
			for range 5 {
				rec := f.get(signURL(c.appid, shopPage), "Origin: https://shop.example.com")
				if rec.Code != c.status || strings.Contains(rec.Body.String(), "rid") || rec.Header().Get("Access-Control-Allow-Origin") == "" {
					t.Errorf("got %d %s", rec.Code, rec.Body)
				}
			}
			if n := f.desk.given.Load(); n > 3 {
				t.Errorf("WeChat was asked %d times", n)
			}
			lines := f.logs.FilterMessage("page not signed").All()
			if len(lines) != 1 {
				t.Fatalf("%d log lines, want 1: %v", len(lines), lines)
			}
			fields := lines[0].ContextMap()
			for name, want := range c.want {
				if fields[name] != want {
					t.Errorf("%s is %v, want %v", name, fields[name], want)
				}
			}
			if fields["remedy"] == "" || fields["host"] != "shop.example.com" {
				t.Errorf("logged %v", fields)
			}
			if n := counted(t, f.app.metrics().jssdk, c.result); n != 5 {
				t.Errorf("counted %v as %s, want 5", n, c.result)
			}
			f.nothingLeaks()
		})
	}
}

// An account that took its authorization back is signed for no more, although its ticket lives.
func TestJSSDKRevoked(t *testing.T) {
	t.Parallel()
	f := newJSSDK(t, "shop.example.com")
	wantSigned(t, f.get(signURL(authorizerID, shopPage)), authorizerID, ticketOf("jsapi", authorizerID, 1), shopPage)
	if err := f.app.manager().Revoke(t.Context(), platformID, authorizerID, time.Now().Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	if rec := f.get(signURL(authorizerID, shopPage)); rec.Code != http.StatusNotFound {
		t.Errorf("got %d %s", rec.Code, rec.Body)
	}
}

func TestJSSDKConfig(t *testing.T) {
	t.Setenv("JSSDK_HOST", "hidden.example.com")
	_, ctx := newTestApp(t, testConfig(""))
	for _, c := range []struct{ name, config, want string }{
		{"good", `{"base": "/wx/jssdk/", "hosts": ["shop.example.com", "*.wx.example.com", "{env.JSSDK_HOST}"]}`, ""},
		{"no base", `{"hosts": ["shop.example.com"]}`, "base is missing"},
		{"base of all", `{"base": "/", "hosts": ["shop.example.com"]}`, "would take every path"},
		{"matcher", `{"base": "/wx/*", "hosts": ["shop.example.com"]}`, "a base is a path, not a matcher"},
		{"no hosts", `{"base": "/wx"}`, "hosts is missing"},
		{"bad host", `{"base": "/wx", "hosts": ["*.com"]}`, "hosts: '*.com' would take in everybody's domains"},
		{"nothing behind it", `{"base": "/wx", "hosts": ["{env.JSSDK_NOTHING}"]}`, "hosts: {env.JSSDK_NOTHING} resolves to nothing"},
		{"unknown field", `{"base": "/wx", "host": ["a.example.com"]}`, "unknown field"},
	} {
		provisioning.Lock()
		module, err := ctx.LoadModuleByID("http.handlers.wechat_jssdk", json.RawMessage(c.config))
		provisioning.Unlock()
		switch {
		case c.want == "" && err != nil, c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: got %v, want %q", c.name, err, c.want)
		case err == nil && !module.(*JSSDK).covers(pageParts{scheme: "https", host: "hidden.example.com"}):
			t.Errorf("%s: the placeholder's host is not covered", c.name)
		}
	}
}

func TestHostPatterns(t *testing.T) {
	t.Parallel()
	for pattern, want := range map[string]string{
		"shop.example.com": "", "*.example.com": "", "*.*.example.com": "", "a.*.example.com": "", "localhost": "", "localhost:8080": "",
		"192.0.2.1": "", "*.example.com:8443": "", "商店.example.com": "", "SHOP.example.com": "", "a_b.example.com": "",
		"":                         "is not a host",
		"*":                        "everybody's domains",
		"*.com":                    "everybody's domains",
		"shop.*.com":               "everybody's domains",
		"shop.example.*":           "everybody's domains",
		"shop*.example.com":        "one whole label",
		"**.example.com":           "one whole label",
		"https://shop.example.com": "leave out scheme and path",
		"shop.example.com/":        "leave out scheme and path",
		"shop.example.com.":        "is not a host",
		".example.com":             "is not a host",
		"a..example.com":           "is not a host",
		"shop.example.com:":        "no port after its colon",
		"shop.example.com:0":       "no port after its colon",
		"shop.example.com:065":     "no port after its colon",
		"shop.example.com:65536":   "no port after its colon",
		"shop.example.com:x":       "no port after its colon",
		"[::1]":                    "no port after its colon",
		"user@example.com":         "is not a host",
		"a b.example.com":          "is not a host",
		"-a.example.com":           "is not a host",
		"ファイル・名.jp":                "",
		"paral·lel.cat":            "",
		"نامه\u200cای.com":         "",
		"i❤.ws":                    "",
		"a.com，b.com":              "it has '，' in it",
		"a.com、b.com":              "it has '、' in it",
		"shop。example。com":         "it has '。' in it",
		"shop｡example.com":         "it has '｡' in it",
		"a.com；b.com":              "it has '；' in it",
		"localhost：8080":           "it has '：' in it",
		"shop．example.com":         "it has '．' in it",
		"“shop.example.com”":       "it has '“' in it",
	} {
		_, err := parseHostPattern(pattern)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", pattern, err, want)
		}
	}
	p, err := parseHostPattern("商店.Example.com")
	if page, ok := parsePage("https://xn--czrs0t.example.com/"); err != nil || !ok || !p.covers(page) {
		t.Errorf("%v %v: a host of other letters is not found under its ASCII form", p, err)
	}
}

// Whatever is signed is, to another reader of addresses too, on a host of the configuration.
func TestPageAddressIsReadOneWay(t *testing.T) {
	t.Parallel()
	var j JSSDK
	for _, host := range []string{"shop.example.com", "*.wx.example.com"} {
		p, err := parseHostPattern(host)
		if err != nil {
			t.Fatal(err)
		}
		j.hosts = append(j.hosts, p)
	}
	pieces := []string{
		"https://", "http://", "HTTPS:", "//", "/", "\\", "@", ":", ":443", ":80", "?", "#", "%2f", "%40", "%23", "%5c", "%25", "%00", "+", "&", "&url=", ";", "=",
		"shop.example.com", "a.wx.example.com", "wx.example.com", "evil.example", ".", "user", " ", "\t", "[::1]", "中", "%", "x",
	}
	random := rand.New(rand.NewPCG(1, 2))
	signed := 0
	for range 200_000 {
		raw := "url=" + pieces[random.IntN(2)]
		for range 1 + random.IntN(5) {
			raw += pieces[random.IntN(len(pieces))]
		}
		address, failure := pageAddress(raw)
		if failure != nil {
			continue
		}
		page, ok := parsePage(address)
		if !ok || !j.covers(page) {
			continue
		}
		signed++
		u, err := url.Parse(address)
		if _, stray := errors.AsType[url.EscapeError](err); stray {
			continue // a percent sign that escapes nothing, which browsers leave alone
		}
		if err != nil {
			t.Fatalf("%q: %v", address, err)
		}
		host := strings.ToLower(u.Hostname())
		if host != "shop.example.com" && !strings.HasSuffix(host, ".wx.example.com") || u.User != nil || u.Fragment != "" {
			t.Fatalf("%q became %q, which was taken for a page of ours", raw, address)
		}
	}
	if signed < 1000 {
		t.Errorf("only %d of the addresses were pages of ours", signed)
	}
}

// In a whole configuration: before a login and a catch-all, below handle_path, and nothing else of the site.
func TestJSSDKInCaddy(t *testing.T) {
	wechat := newFakeWeChat(t)
	desk := newTicketDesk(wechat)
	config, warnings, err := adapt(`{
		admin off
		auto_https off
		wechat {
			account ` + accountID + ` {
				secret account-secret
			}
			api ` + wechat.URL + `
		}
	}
	http:// {
		respond "catch-all"
		redir * /login
		basic_auth {
			bob $2a$14$Zkx19XLiW6VYouLHR5NmfOFU0z2GTNmpkT/5qqR7hx4IjWJPDhjvG
		}
		wechat_jssdk /wx/jssdk {
			hosts shop.example.com
		}
	}
	http://below.example.com {
		handle_path /outside/* {
			wechat_jssdk /js {
				hosts shop.example.com
			}
			respond "beside it" 418
		}
	}`)
	if err != nil || len(warnings) > 0 {
		t.Fatal(err, warnings)
	}
	_, ctx := provisionAll(t, config)
	module, err := ctx.App("http")
	if err != nil {
		t.Fatal(err)
	}
	server := module.(*caddyhttp.App).Servers["srv0"]
	ask := func(method, target string) *httptest.ResponseRecorder {
		rec := httptest.NewRecorder()
		server.ServeHTTP(rec, httptest.NewRequest(method, target, nil))
		return rec
	}
	query := accountID + "?url=" + url.QueryEscape(shopPage)
	wantSigned(t, ask(http.MethodGet, "http://example.com/wx/jssdk/"+query), accountID, ticketOf("jsapi", accountID, 1), shopPage)
	wantSigned(t, ask(http.MethodGet, "http://below.example.com/outside/js/"+query), accountID, ticketOf("jsapi", accountID, 1), shopPage)
	for _, c := range []struct {
		method, target string
		status         int
	}{
		{http.MethodHead, "http://example.com/wx/jssdk/" + query, 200},
		{http.MethodOptions, "http://example.com/wx/jssdk/" + query, 204},
		{http.MethodPost, "http://example.com/wx/jssdk/" + query, 405},
		{http.MethodGet, "http://example.com/wx/jssdk/" + strangerID + "?url=" + url.QueryEscape(shopPage), 404},
		{http.MethodGet, "http://example.com/wx/jssdk/x/y", 404},
		{http.MethodGet, "http://example.com/wx/jssdk", 302},
		{http.MethodGet, "http://example.com/other", 302},
		{http.MethodPost, "http://below.example.com/outside/js/" + query, 405},
		{http.MethodGet, "http://below.example.com/outside/other", 418},
		{http.MethodGet, "http://below.example.com/js/" + query, 200}, // Caddy's empty answer
	} {
		rec := ask(c.method, c.target)
		if rec.Code != c.status || strings.Contains(c.target, "/js/") && !strings.Contains(c.target, "outside") && rec.Body.Len() > 0 {
			t.Errorf("%s %s: got %d %s, want %d", c.method, c.target, rec.Code, rec.Body, c.status)
		}
	}
	if n := desk.given.Load(); n != 1 {
		t.Errorf("%d tickets were fetched", n)
	}
}
