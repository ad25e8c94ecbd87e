package caddymodule

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

func TestOAuthCallback(t *testing.T) {
	const extra = "/apiWechat/wx/userAuth/callBack"
	f := newOAuth(t, &OAuth{Platform: platformID, Callback: extra})
	tests := []struct {
		name, target string
		status       int
		prefix       string
		fragment     string
		exchange     string
		want         tokens.User
	}{
		{"authorizer", callbackURL("verify", "c1", "scan"), http.StatusFound, "http://wechat.example.com/webVerify/?", "scan",
			"/sns/oauth2/component/access_token " + authorizerID + " c1",
			tokens.User{AppID: authorizerID, Platform: platformID, FuncKey: "verify", State: "scan"}},
		{"authorizer of the other platform", oauthBase + "/authUserReceive/" + otherPlatform + "/scan?code=c2&state=&appid=" + authorizerID,
			http.StatusSeeOther, "https://shop.example.com/scan?from=wechat&", "",
			"/sns/oauth2/component/access_token " + authorizerID + " c2",
			tokens.User{AppID: authorizerID, Platform: otherPlatform, FuncKey: "scan"}},
		{"account", oauthBase + "/authUserReceive/" + accountID + "/vip?code=c3&state=x%22y", http.StatusFound, "https://vip.example.com/?", "x%22y",
			"/sns/oauth2/access_token " + accountID + " c3",
			tokens.User{AppID: accountID, FuncKey: "vip", State: `x"y`}},
		{"extra callback", extra + "/scan?code=c4&state=s&appid=" + authorizerID, http.StatusSeeOther, "https://shop.example.com/scan?from=wechat&", "s",
			"/sns/oauth2/component/access_token " + authorizerID + " c4",
			tokens.User{AppID: authorizerID, Platform: platformID, FuncKey: "scan", State: "s"}},
	}
	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			rec := f.get(tt.target)
			m := landing.FindStringSubmatch(rec.Header().Get("Location"))
			if rec.Code != tt.status || m == nil || m[1] != tt.prefix || m[3] != tt.fragment {
				t.Fatalf("%d to %q", rec.Code, rec.Header().Get("Location"))
			}
			assertPrivate(t, rec.Header())
			if calls := f.wechat.calls(); len(calls) != i+1 || calls[i] != tt.exchange {
				t.Errorf("asked %q, want %q", calls, tt.exchange)
			}
			u, err := f.app.users().Redeem(t.Context(), m[2], "crm", nil)
			if err != nil || u.AppID != tt.want.AppID || u.Platform != tt.want.Platform || u.FuncKey != tt.want.FuncKey || u.State != tt.want.State ||
				u.OpenID != openID || u.Scope != "snsapi_base" || u.Profile != nil {
				t.Errorf("user %+v", u)
			}
			if _, again := f.app.users().Redeem(t.Context(), m[2], "crm", nil); (again != nil) != (tt.want.FuncKey == "vip") {
				t.Errorf("redeemed again: %v", again)
			}
			f.assertNoSecrets(rec, "")
		})
	}
	if f.logs.Len() != 0 {
		t.Errorf("logged %v", f.logs.All())
	}
}

func TestOAuthDoubleCallbacks(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID, Callback: "/cb"})
	locations := make([]string, 20)
	var wg sync.WaitGroup
	for i := range locations {
		wg.Go(func() { locations[i] = f.get(callbackURL("verify", "c1", "s")).Header().Get("Location") })
	}
	wg.Wait()
	for _, location := range locations {
		if location == "" || location != locations[0] {
			t.Fatalf("redirects %q", locations)
		}
	}
	if calls := f.wechat.calls(); len(calls) != 1 {
		t.Errorf("asked %q, want one exchange", calls)
	}
	if n := f.app.users().Len(); n != 1 {
		t.Errorf("%d users", n)
	}
	for name, target := range map[string]string{
		"another func":    callbackURL("scan", "c1", "s"),
		"another address": "/cb/verify?code=c1&state=s&appid=" + authorizerID,
		"another account": strings.Replace(callbackURL("verify", "c1", "s"), authorizerID, strangerID, 1),
	} {
		if rec := f.get(target); rec.Code != http.StatusGone || rec.Header().Get("Location") != "" {
			t.Errorf("%s: answer %d, Location %q", name, rec.Code, rec.Header().Get("Location"))
		}
	}
	if calls := f.wechat.calls(); len(calls) != 1 {
		t.Errorf("asked %q about a code that is known to be used", calls)
	}
}

// After five minutes WeChat says of a code that it is not valid, as of one that never was. Of a code that was used here
// the visitor hears that it was used, and WeChat is not asked.
func TestOAuthLaterTheCodeIsUsed(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID})
	synctest.Test(t, func(t *testing.T) {
		client, err := tokens.NewClient(tokens.ClientOptions{Transport: f.wechat})
		if err != nil {
			t.Fatal(err)
		}
		o := *f.OAuth
		o.app = withinBubble(t, f.app, client)
		get := func() *httptest.ResponseRecorder {
			return serve(t, &o, httptest.NewRequest(http.MethodGet, oauthBase+"/authUserReceive/"+accountID+"/verify?code=c1&state=s", nil), nil)
		}
		first := get()
		f.wechat.answer("c1", `{"errcode":40029,"errmsg":"invalid code"}`)
		time.Sleep(5*time.Minute - time.Second)
		if rec := get(); first.Code != http.StatusFound || rec.Header().Get("Location") != first.Header().Get("Location") {
			t.Errorf("within five minutes: answers %d and %d to %s", first.Code, rec.Code, rec.Header().Get("Location"))
		}
		for _, later := range []time.Duration{2 * time.Second, 50 * time.Minute} {
			time.Sleep(later)
			if rec := get(); rec.Code != http.StatusGone || !strings.Contains(rec.Body.String(), pageUsedCode.zh.Title) {
				t.Errorf("later: answer %d", rec.Code)
			}
		}
		if calls := f.wechat.calls(); len(calls) != 1 {
			t.Errorf("asked %q", calls)
		}
	})
}

// Whatever a menu's link gave as its state comes back in the fragment, and nowhere else.
func TestOAuthCallbackState(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID})
	tests := []struct{ name, state, fragment string }{ // state as in the query
		{"underscore", "a_b", "a_b"},
		{"JSON", "%7B%22a%22%3A%5B1%5D%7D", "%7B%22a%22:%5B1%5D%7D"},
		{"parameters", "a%3D1%26wxTkId%3Dx%23y", "a=1&wxTkId=x%23y"},
		{"semicolon", "a;b", "a%3Bb"},
		{"semicolon, escaped", "a%3Bb", "a%3Bb"},
		{"slash and question mark", "/a?b", "%2Fa%3Fb"},
		{"Chinese", "%E6%89%AB%E7%A0%81", "%E6%89%AB%E7%A0%81"},
		{"spaces", "a+b%20c", "a%20b%20c"},
		{"control characters", "a%0d%0a%00b", "a%0D%0A%00b"},
		{"no UTF-8", "%ff%fe", "%FF%FE"},
		{"as long as it may be", strings.Repeat("%5F", maxState), strings.Repeat("_", maxState)},
	}
	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, receiver := range []string{platformID, accountID} {
				rec := f.get(fmt.Sprintf("%s/authUserReceive/%s/verify?code=%s%d&state=%s&appid=%s", oauthBase, receiver, receiver, i, tt.state, authorizerID))
				m := landing.FindStringSubmatch(rec.Header().Get("Location"))
				if rec.Code != http.StatusFound || m == nil || m[1] != "http://wechat.example.com/webVerify/?" || m[3] != tt.fragment {
					t.Fatalf("%d to %q", rec.Code, rec.Header().Get("Location"))
				}
				want, _ := url.PathUnescape(tt.fragment)
				if u, _ := f.app.users().Redeem(t.Context(), m[2], "", nil); u.State != want {
					t.Errorf("kept %q, want %q", u.State, want)
				}
			}
		})
	}
}

// A reload between the visitor's arrival and the app's question is nobody's business.
func TestOAuthSurvivesAReload(t *testing.T) {
	root := filepath.Join(t.TempDir(), "storage")
	wechat := newLoginWeChat(t)
	generation := func() (*App, *oauthFixture) {
		app, ctx, err := provisionAt(root, testConfig(wechat.URL))
		if err != nil {
			t.Fatal(err)
		}
		if err := app.Start(); err != nil {
			t.Fatal(err)
		}
		return app, provisionOAuth(t, &OAuth{Platform: platformID}, ctx)
	}
	target := oauthBase + "/authUserReceive/" + accountID + "/verify?code=c1&state=s"
	first, before := generation()
	location := before.get(target).Header().Get("Location")
	m := landing.FindStringSubmatch(location)
	if m == nil {
		t.Fatalf("redirect to %q", location)
	}
	second, after := generation()
	defer func() { _ = second.Cleanup() }()
	if err := first.Cleanup(); err != nil {
		t.Fatal(err)
	}
	rec := httptest.NewRecorder()
	err := (&API{app: second}).serveUsers(rec, httptest.NewRequest(http.MethodGet, usersPath+m[2], nil), second.Clients[0])
	if err != nil || rec.Code != http.StatusOK || !strings.Contains(rec.Body.String(), openID) {
		t.Errorf("after a reload: %d %s, %v", rec.Code, rec.Body, err)
	}
	if again := after.get(target).Header().Get("Location"); again != location || len(wechat.calls()) != 1 {
		t.Errorf("the same callback after a reload goes to %q, not %q; asked %q", again, location, wechat.calls())
	}
}

func TestOAuthMethods(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID})
	head := serve(t, f.OAuth, httptest.NewRequest(http.MethodHead, callbackURL("verify", "c1", "s"), nil), nil)
	if head.Code != http.StatusNoContent || head.Header().Get("Location") != "" || len(f.wechat.calls()) != 0 {
		t.Errorf("HEAD of a callback: answer %d, asked %q", head.Code, f.wechat.calls())
	}
	if head = serve(t, f.OAuth, httptest.NewRequest(http.MethodHead, oauthBase+"/authorize/"+authorizerID+"/verify", nil), nil); head.Code != http.StatusFound {
		t.Errorf("HEAD of a start: answer %d", head.Code)
	}
	for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodOptions, "PROPFIND"} {
		rec := serve(t, f.OAuth, httptest.NewRequest(method, callbackURL("verify", "c1", "s"), strings.NewReader("code=c1")), nil)
		if rec.Code != http.StatusMethodNotAllowed || rec.Header().Get("Allow") != "GET, HEAD" {
			t.Errorf("%s: answer %d, Allow %q", method, rec.Code, rec.Header().Get("Allow"))
		}
	}
	if len(f.wechat.calls()) != 0 {
		t.Errorf("asked %q", f.wechat.calls())
	}
}

func TestOAuthProfile(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID})
	f.wechat.scope = "snsapi_base,snsapi_userinfo"
	redeem := func(code string) tokens.User {
		t.Helper()
		m := landing.FindStringSubmatch(f.get(callbackURL("scan", code, "s")).Header().Get("Location"))
		if m == nil {
			t.Fatal("no redirect")
		}
		u, _ := f.app.users().Redeem(t.Context(), m[2], "", nil)
		return u
	}
	if u := redeem("c1"); u.Profile == nil || u.Profile.Nickname != "张三 <b>" || u.UnionID != "u-profile" {
		t.Errorf("user %+v", u)
	}
	f.wechat.profile = `{"errcode":48001,"errmsg":"api unauthorized"}`
	if u := redeem("c2"); u.Profile != nil || u.OpenID != openID {
		t.Errorf("user %+v", u)
	}
	if logs := f.logs.All(); len(logs) != 1 || logs[0].ContextMap()["errcode"] != int64(48001) {
		t.Errorf("logged %v", logs)
	}
}
