package caddymodule

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"unicode"

	"github.com/caddyserver/caddy/v2"
)

// bypasses are known ways to bend the redirect of an OAuth proxy, or to have a browser read a URL in another way than
// the program that checked it.
var bypasses = []string{
	// Scheme-relative, and what browsers take for it.
	"//evil.example", "///evil.example", "////evil.example", `/\evil.example`, `\\evil.example`, `\/evil.example`, `/\/evil.example`, `//\evil.example`,
	`\/\/evil.example`, "/\t/evil.example", "/\n/evil.example", "/\r\n/evil.example", "\t//evil.example", " //evil.example", "/ /evil.example", "//evil.example/%2f..",
	"/.//evil.example", "/..//evil.example", "/../..//evil.example", "/;//evil.example", "//;@evil.example", "/evil.example/..;/", "//evil%E3%80%82example",
	"%2f%2fevil.example", "/%2fevil.example", "/%5cevil.example", "%5c%5cevil.example", "/%09/evil.example", "%252f%252fevil.example", "%c0%af%c0%afevil.example",
	// A host of our own that is none.
	"https://shop.example.com@evil.example", "https://shop.example.com:443@evil.example", "https://shop.example.com%40evil.example", "https://shop.example.com.evil.example",
	"https://evil.example#shop.example.com", "https://evil.example?shop.example.com", "https://evil.example/shop.example.com", `https://evil.example\@shop.example.com`,
	`https://shop.example.com\.evil.example`, "https://evil.example%00.shop.example.com", "https://evil.example%23.shop.example.com", "https://shop.example.com;evil.example",
	"@evil.example", ".evil.example", ":80@evil.example", "?@evil.example", "#@evil.example", `\@evil.example`, "%40evil.example", "-evil.example", "x@evil.example:443",
	// Schemes.
	"https://evil.example", "https:evil.example", "https:/evil.example", "https:///evil.example", `https:\\evil.example`, "hTTps://evil.example", "http://0x7f000001/", "http://[::1]/",
	"javascript:alert(1)", "java\tscript:alert(1)", "javascript://shop.example.com/%0aalert(1)", "data:text/html;base64,PHNjcmlwdD4=", "vbscript:x", "blob:https://evil.example/x", "file:///etc/passwd",
	// Header splitting.
	"\r\nLocation: https://evil.example", "%0d%0aLocation:%20https://evil.example", "%250d%250aLocation:x", "\nLocation: //evil.example", "\rLocation: //evil.example", "%u000d%u000aLocation:x",
	"嘊嘍Location: https://evil.example", "%E5%98%8A%E5%98%8DLocation:x", "x\r\n\r\n<script>alert(1)</script>", "\u2028Location: //evil.example", "\u0085Location: //evil.example",
	// Unicode that is, or becomes, something else.
	"//evil\u3002example", "//evil\uff0eexample", "//evil\uff61example", "\uff0f\uff0fevil.example", "\uff20evil.example", "\ufe6bevil.example", "\u2044\u2044evil.example", "\u2215\u2215evil.example",
	"\ufeff//evil.example", "\u200b//evil.example", "\u202e//elpmaxe.live", "//\u24d4vil.example", "\u29f5\u29f5evil.example", "\xff\xfe//evil.example", "\x00//evil.example", "scan\x00//evil.example",
	// Templates and traversal.
	"{env.WECHAT_PLATFORM_SECRET}", "{http.request.host}", "../../../evil", "..%2f..%2fevil", "..\\..\\evil", "verify/../../authorize", "${jndi:ldap://evil.example}", "<a href=//evil.example>", `"><script>`,
}

// browserHost is the host that a browser goes to for an absolute http or https URL: it drops tabs and line ends, takes a
// backslash for a slash, any number of slashes for two, and what is before the last @ for a name and password.
func browserHost(location string) string {
	location = strings.Trim(strings.NewReplacer("\t", "", "\r", "", "\n", "", `\`, "/").Replace(location), " \x00")
	_, rest, _ := strings.Cut(location, ":")
	rest = strings.TrimLeft(rest, "/")
	if end := strings.IndexAny(rest, "/?#"); end >= 0 {
		rest = rest[:end]
	}
	return strings.ToLower(rest[strings.LastIndexByte(rest, '@')+1:])
}

// plainFragment is a fragment with every character in it that could mean something escaped.
var plainFragment = regexp.MustCompile(`^([A-Za-z0-9._~$&+=:@-]|%[0-9A-F]{2})*$`)

// assertHome fails if a redirect leads anywhere but to the func scan, to WeChat's page, or to nowhere.
func assertHome(t *testing.T, f *oauthFixture, what string, rec *httptest.ResponseRecorder) {
	t.Helper()
	locations := rec.Header().Values("Location")
	if len(locations) > 1 || rec.Header().Get("Refresh") != "" {
		t.Errorf("%s: headers %q", what, rec.Header())
	}
	for _, header := range []string{"Set-Cookie", "Location"} {
		for _, value := range rec.Header().Values(header) {
			if strings.ContainsFunc(value, func(r rune) bool {
				return r > unicode.MaxASCII || unicode.IsControl(r) || strings.ContainsRune(`"'<>\`, r)
			}) {
				t.Errorf("%s: %s %q", what, header, value)
			}
		}
	}
	if body := rec.Body.String(); strings.Contains(body, "evil") || strings.Contains(body, "alert(1)") {
		t.Errorf("%s: the page repeats it:\n%s", what, body)
	}
	if len(locations) == 0 {
		return
	}
	location := locations[0]
	if rest, ok := strings.CutPrefix(location, "https://shop.example.com/scan?from=wechat&wxTkId="); ok {
		id, fragment, hasFragment := strings.Cut(rest, "#")
		if len(id) != 22 || !hasFragment || !plainFragment.MatchString(fragment) || browserHost(location) != "shop.example.com" {
			t.Errorf("%s: lands at %s", what, location)
		}
		return
	}
	page, err := url.Parse(location)
	if err != nil || !strings.HasPrefix(location, f.wechat.URL+authorizePath+"?appid="+authorizerID+"&redirect_uri=http%3A%2F%2Fexample.com%2Fwx%2FthirdParty%2FauthUserReceive%2F") ||
		page.Fragment != "wechat_redirect" || browserHost(location) != page.Host || browserHost(page.Query().Get("redirect_uri")) != "example.com" {
		t.Errorf("%s: redirects to %s", what, location)
	}
}

// Whatever a request holds, a redirect goes to the configured target, or to WeChat.
func TestOAuthIsNoOpenRedirector(t *testing.T) {
	if len(bypasses) < 90 {
		t.Errorf("only %d bypasses", len(bypasses))
	}
	for _, require := range []bool{false, true} {
		f := newOAuth(t, &OAuth{Platform: platformID, Callback: "/cb", RequireStart: require})
		endpoints := []string{oauthBase + "/authUserReceive/" + platformID + "/scan", "/cb/scan", oauthBase + "/authorize/" + authorizerID + "/scan"}
		parameters := []string{"state", "redirect", "redirect_uri", "redirect_url", "next", "url", "prefix", "return", "rd", "wxTkId", "funcKey", "scope", "host", "at", "appid", "code"}
		n := 0
		ask := func(what string, r *http.Request) *httptest.ResponseRecorder {
			t.Helper()
			rec := serve(t, f.OAuth, r, nil)
			assertHome(t, f, what, rec)
			return rec
		}
		for _, bad := range bypasses {
			for _, endpoint := range endpoints {
				for _, parameter := range parameters {
					n++
					query := url.Values{"code": {fmt.Sprintf("code%d", n)}, "appid": {authorizerID}}
					query.Set(parameter, bad)
					r := httptest.NewRequest(http.MethodGet, endpoint+"?"+query.Encode(), nil)
					for _, header := range []string{"Referer", "Origin", "X-Forwarded-Host", "X-Forwarded-Prefix", "X-Original-URL", "X-Rewrite-URL", "Forwarded"} {
						r.Header.Set(header, bad)
					}
					rec := ask(fmt.Sprintf("%s?%s=%q", endpoint, parameter, bad), r)
					// A menu's state arrives as it is, in the fragment.
					if m := landing.FindStringSubmatch(rec.Header().Get("Location")); parameter == "state" && m != nil {
						if plain, err := url.PathUnescape(m[3]); err != nil || plain != bad {
							t.Errorf("state %q arrives as %q", bad, m[3])
						}
					}
				}
				n++
				r := httptest.NewRequest(http.MethodGet, endpoint, nil) // not escaped, as a client that is no browser may send it
				r.URL.RawQuery = fmt.Sprintf("code=code%d&appid=%s&state=%s", n, authorizerID, bad)
				ask(fmt.Sprintf("%s?state=%q as it is", endpoint, bad), r)

				r = httptest.NewRequest(http.MethodGet, endpoint+fmt.Sprintf("?code=host%d&appid=%s", n, authorizerID), nil)
				r.Host = bad
				rec := serve(t, f.OAuth, r, nil)
				location := rec.Header().Get("Location")
				told := location // without the tracking id, which is random and may spell anything
				if m := landing.FindStringSubmatch(location); m != nil {
					told = m[1] + m[3]
				}
				if strings.Contains(told, "evil") && !hostShape.MatchString(bad) {
					t.Errorf("%s, Host %q: redirects to %s", endpoint, bad, location)
				}
			}
			for _, folder := range []string{oauthBase + "/authUserReceive/" + platformID + "/", "/cb/", oauthBase + "/authorize/" + authorizerID + "/", oauthBase + "/authorize/", oauthBase + "/authUserReceive/"} {
				for _, path := range []string{folder + bad, folder + "scan/" + bad, folder + bad + "/scan"} {
					r := httptest.NewRequest(http.MethodGet, "/", nil)
					r.URL = &url.URL{Path: path, RawQuery: "code=c&appid=" + authorizerID}
					if rec := ask(fmt.Sprintf("path %q", path), r); rec.Header().Get("Location") != "" {
						t.Errorf("path %q redirects to %s", path, rec.Header().Get("Location"))
					}
				}
			}
		}
	}
}

// The same, by a login that begins here: the state goes out, comes back, and leads nowhere else.
func TestOAuthStateIsNoRedirect(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID, RequireStart: true})
	for i, bad := range bypasses {
		v := newVisitor(t, f.OAuth)
		rec := v.get(oauthBase + "/authorize/" + authorizerID + "/scan?state=" + url.QueryEscape(bad))
		assertHome(t, f, fmt.Sprintf("start with %q", bad), rec)
		page, err := url.Parse(rec.Header().Get("Location"))
		if err != nil {
			t.Fatal(err)
		}
		rec = v.get(wechatCalls(page.Query().Get("redirect_uri"), fmt.Sprint("c", i), page.Query().Get("state")))
		assertHome(t, f, fmt.Sprintf("landing with %q", bad), rec)
		m := landing.FindStringSubmatch(rec.Header().Get("Location"))
		if m == nil {
			t.Errorf("state %q: %d", bad, rec.Code)
		} else if plain, err := url.PathUnescape(m[3]); err != nil || plain != bad {
			t.Errorf("state %q arrives as %q", bad, m[3])
		}
	}
}

// A prefix that passes goes to the host that Go and a browser both read in it, with the tracking id in its query and the
// state in its fragment; everything else is refused when the configuration is loaded.
func TestOAuthPrefixesAreReadAlike(t *testing.T) {
	t.Parallel()
	passed := 0
	for _, bad := range bypasses {
		for _, prefix := range []string{bad, "https://shop.example.com" + bad, "https://shop.example.com/" + bad, "https:" + bad} {
			f := &Func{Key: "a", Prefix: prefix}
			if f.provision(resolver{repl: caddy.NewReplacer()}) != nil {
				continue
			}
			passed++
			for _, state := range []string{"", bad} {
				target := f.target("ID", state)
				u, err := url.Parse(target)
				if err != nil || !strings.EqualFold(u.Host, browserHost(target)) || u.User != nil || u.Query().Get("wxTkId") != "ID" || u.Fragment != state {
					t.Errorf("prefix %q: a browser reads the host %q in %s (%v)", prefix, browserHost(target), target, err)
				}
			}
		}
	}
	if passed == 0 {
		t.Error("no prefix passed: nothing was compared")
	}
}
