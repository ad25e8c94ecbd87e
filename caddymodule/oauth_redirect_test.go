package caddymodule

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
)

// Known ways to bend the redirect of an OAuth proxy. Whatever a request holds, a redirect goes to the configured
// target, or to WeChat.
func TestOAuthIsNoOpenRedirector(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID})
	evil := []string{
		"https://evil.example", "//evil.example", `/\evil.example`, `\\evil.example`, "https:evil.example", "@evil.example",
		".evil.example", "%2f%2fevil.example", "\r\nLocation: https://evil.example", "%0d%0aLocation:https://evil.example",
		"javascript:alert(1)", "data:text/html,x", "https://shop.example.com@evil.example", "evil\u3002example", "\u2028//evil.example",
		"#@evil.example", "?next=//evil.example", "scan\x00//evil.example", "/../..//evil.example", "\t//evil.example",
	}
	parameters := []string{"state", "redirect", "redirect_uri", "redirect_url", "next", "url", "prefix", "return", "wxTkId", "funcKey", "scope", "host"}
	n := 0
	for _, bad := range evil {
		for _, parameter := range parameters {
			n++
			query := url.Values{"code": {fmt.Sprintf("code%d", n)}, "appid": {authorizerID}, parameter: {bad}}.Encode()
			for _, path := range []string{"/authUserReceive/" + platformID + "/scan", "/authorize/" + authorizerID + "/scan"} {
				r := httptest.NewRequest(http.MethodGet, oauthBase+path+"?"+query, nil)
				r.Header.Set("Referer", bad)
				r.Header.Set("X-Forwarded-Host", "evil.example")
				rec := serve(t, f.OAuth, r, nil)
				location := rec.Header().Get("Location")
				toFunc := strings.HasPrefix(location, "https://shop.example.com/scan?from=wechat&wxTkId=")
				toWeChat := strings.HasPrefix(location, f.wechat.URL+authorizePath+"?appid="+authorizerID+"&redirect_uri=http%3A%2F%2Fexample.com%2Fwx%2FthirdParty%2F")
				if location != "" && !toFunc && !toWeChat {
					t.Errorf("%s?%s redirects to %s", path, query, location)
				}
				if strings.ContainsAny(location, "\r\n\t \"'<>\\") || len(rec.Header().Values("Location")) > 1 {
					t.Errorf("%s?%s: Location %q", path, query, location)
				}
			}
		}
	}
	for _, bad := range evil {
		for _, path := range []string{"/authUserReceive/" + platformID + "/", "/authorize/" + authorizerID + "/"} {
			rec := f.get((&url.URL{Path: oauthBase + path + bad, RawQuery: "code=c&appid=" + authorizerID}).String())
			if location := rec.Header().Get("Location"); location != "" {
				t.Errorf("func %q redirects to %s", bad, location)
			}
		}
	}
}
