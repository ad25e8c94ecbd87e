package integration_test

import (
	"fmt"
	"html"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"regexp"
	"strings"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/integration"
)

const authorizePage = "/wx/authorize"

// browser goes from page to page as browsers do: with cookies, through redirects, and with the Referer that the policies
// on the way allow. It has no scripts to run and loads nothing else.
type browser struct {
	t      *testing.T
	client *http.Client

	trail  []string // addresses asked for since the last click
	at     *url.URL
	policy string
	status int
	body   string
}

func newBrowser(t *testing.T, w *integration.World) *browser {
	t.Helper()
	client, err := w.Gateway.Client("")
	if err != nil {
		t.Fatal(err)
	}
	if client.Jar, err = cookiejar.New(nil); err != nil {
		t.Fatal(err)
	}
	return &browser{t: t, client: client}
}

// open goes to an address that was typed or scanned.
func (b *browser) open(address string) {
	b.t.Helper()
	b.at = nil
	b.follow(address)
}

// click follows the link of the page whose address has this in it.
func (b *browser) click(part string) {
	b.t.Helper()
	for _, m := range regexp.MustCompile(`<a [^>]*href="([^"]*)"`).FindAllStringSubmatch(b.body, -1) {
		if href := html.UnescapeString(m[1]); strings.Contains(href, part) {
			u, err := b.at.Parse(href)
			if err != nil {
				b.t.Fatal(err)
			}
			b.follow(u.String())
			return
		}
	}
	b.t.Fatalf("no link with %q at %s:\n%s", part, b.at.Path, b.body)
}

const maxRedirects = 10

func (b *browser) follow(address string) {
	b.t.Helper()
	b.trail = nil
	source, policy, site := b.at, b.policy, "none"
	if source != nil {
		site = "same-origin"
	}
	for range maxRedirects {
		b.trail = append(b.trail, address)
		target, err := url.Parse(address)
		if err != nil {
			b.t.Fatal(err)
		}
		req, err := http.NewRequestWithContext(b.t.Context(), http.MethodGet, address, nil)
		if err != nil {
			b.t.Fatal(err)
		}
		req.Header.Set("Accept-Language", "en")
		if source != nil && origin(source) != origin(target) {
			site = "cross-site" // and so it stays on the way
		}
		req.Header.Set("Sec-Fetch-Site", site)
		req.Header.Set("Sec-Fetch-Mode", "navigate")
		if source != nil && policy == "origin" {
			req.Header.Set("Referer", origin(source)+"/")
		} else if source != nil && policy != "no-referrer" {
			b.t.Fatalf("%s: a policy that this browser does not know: %q", target.Path, policy)
		}
		resp, err := b.client.Do(req)
		if err != nil {
			b.t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil {
			b.t.Fatal(err)
		}
		if p := resp.Header.Get("Referrer-Policy"); p != "" {
			policy = p
		}
		if location := resp.Header.Get("Location"); location != "" {
			next, err := target.Parse(location)
			if err != nil {
				b.t.Fatal(err)
			}
			address = next.String()
			continue
		}
		b.at, b.policy, b.status, b.body = target, policy, resp.StatusCode, string(body)
		return
	}
	b.t.Fatalf("%d redirects: %v", maxRedirects, b.trail)
}

func origin(u *url.URL) string { return u.Scheme + "://" + u.Host }

// TestAuthorizationPages: the owner of an account authorises the platform through the gateway's pages, at a computer and
// with a phone, and WeChat's pages let both in.
func TestAuthorizationPages(t *testing.T) {
	t.Parallel()
	w := newWorld(t, polite)
	if result, err := w.WeChat.PushTicket(t.Context(), integration.PlatformID); err != nil || !result.OK() {
		t.Fatalf("ticket: %s %v", result.Wrong, err)
	}
	exchanges := func() int { return w.WeChat.Journal().Count("/cgi-bin/component/api_query_auth") }
	preAuthCodes := func() int { return w.WeChat.Journal().Count("/cgi-bin/component/api_create_preauthcode") }
	granted := func(b *browser, what string) {
		t.Helper()
		if b.status != http.StatusOK || b.at.Path != authorizePage+"/callback/"+integration.PlatformID || !strings.Contains(b.body, "授权方") || !strings.Contains(b.body, "<li>"+what+"</li>") {
			t.Fatalf("%s: %d %v\n%s", what, b.status, b.trail, b.body)
		}
	}

	desktop := newBrowser(t, w)
	desktop.open(w.URL(authorizePage))
	if desktop.status != http.StatusOK || !strings.Contains(desktop.body, "<svg") || preAuthCodes() != 0 {
		t.Fatalf("the page: %d, %d codes made\n%s", desktop.status, preAuthCodes(), desktop.body)
	}
	desktop.click("kind=pc")
	granted(desktop, "messages")
	awaitAuthorizer(t, w)

	// The phone scans what the page shows.
	phone := newBrowser(t, w)
	phone.open(w.URL(authorizePage + "/go?kind=h5"))
	if phone.status != http.StatusOK || phone.at.Path != authorizePage || preAuthCodes() != 1 {
		t.Fatalf("after scanning: %d at %s, %d codes made", phone.status, phone.at.Path, preAuthCodes())
	}
	phone.click("kind=h5")
	granted(phone, "custom menu")

	// Only what the link asks for is granted, and the rest is named.
	desktop.open(w.URL(authorizePage + "?category=1,999&biz_appid=" + integration.AuthorizerID))
	desktop.click("kind=pc")
	granted(desktop, "permission set 999")
	callback := desktop.trail[len(desktop.trail)-1]

	// Elsewhere the callback is worth nothing, here it shows the same again.
	eventually(t, "three pushes and three callbacks exchanged", func() error {
		if n := exchanges(); n != 6 {
			return fmt.Errorf("%d exchanges", n)
		}
		return nil
	})
	before := exchanges()
	for _, address := range []string{callback, strings.Replace(callback, "s=", "x=", 1)} {
		if phone.open(address); phone.status != http.StatusBadRequest {
			t.Errorf("another browser: %d", phone.status)
		}
	}
	desktop.open(callback)
	granted(desktop, "permission set 999")
	if n := exchanges() - before; n != 0 {
		t.Errorf("%d exchanges", n)
	}

	// WeChat's page does look at the Referer.
	client := httpsClient(t, w)
	resp, _ := fetch(t, client, http.MethodGet, w.URL(authorizePage+"/go?kind=pc"), nil, "")
	resp, body := fetch(t, plainClient, http.MethodGet, resp.Header.Get("Location"), nil, "")
	if resp.StatusCode != http.StatusOK || !strings.Contains(body, "授权发起页域名") {
		t.Errorf("WeChat's page lets in who comes from nowhere: %d", resp.StatusCode)
	}
	checkViolations(t, w)
}
