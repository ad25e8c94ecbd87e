package caddymodule

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-wechat/caddy-wechat/crypto"
)

// testConsole is a console over some operations, which notes what they were asked.
type testConsole struct {
	*Console
	asked []string
}

func newTestConsole() *testConsole {
	c := &testConsole{Console: &Console{logger: zap.NewNop()}}
	note := func(_ http.ResponseWriter, r *http.Request) error {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return caddy.APIError{HTTPStatus: http.StatusRequestEntityTooLarge, Err: err}
		}
		c.asked = append(c.asked, r.Method+" "+r.URL.Path+" "+r.PathValue("name")+" "+string(body))
		return nil
	}
	c.mount([]operation{
		{http.MethodGet, "/status", func(w http.ResponseWriter, r *http.Request) error {
			_ = note(w, r)
			return answerJSON(w, http.StatusOK, map[string]string{"level": "green"})
		}},
		{http.MethodPost, "/refresh/{name}", note},
		{http.MethodGet, "/verify/{name}", note},
		{http.MethodPut, "/verify/{name}", note},
		{http.MethodDelete, "/verify/{name}", note},
		{http.MethodGet, "/refused", func(http.ResponseWriter, *http.Request) error {
			return caddy.APIError{HTTPStatus: http.StatusConflict, Err: errors.New("it is <taken>")}
		}},
		{http.MethodGet, "/broken", func(http.ResponseWriter, *http.Request) error { return errors.New("reason for the log") }},
	})
	return c
}

// own is a request of this machine's own.
func own(method, target, body string, headers ...string) *http.Request {
	r := httptest.NewRequest(method, "http://localhost:2020"+target, strings.NewReader(body))
	r.RemoteAddr = "127.0.0.1:50000"
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		r.Header.Add(name, value)
	}
	return r
}

func (c *testConsole) get(t *testing.T, r *http.Request) *httptest.ResponseRecorder {
	t.Helper()
	return serve(t, c, r, nil)
}

// The console answers this machine and those who logged in, and nobody else.
func TestConsoleAccess(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, peer, host, header, user string
		admitted                       bool
	}{
		{name: "localhost", peer: "127.0.0.1:1", host: "localhost:2020", admitted: true},
		{name: "no port", peer: "127.0.0.1:1", host: "localhost", admitted: true},
		{name: "forwarded port", peer: "127.0.0.1:1", host: "localhost:9000", admitted: true},
		{name: "upper case", peer: "127.0.0.1:1", host: "LocalHost:9000", admitted: true},
		{name: "127.0.0.1", peer: "127.0.0.1:1", host: "127.0.0.1:2020", admitted: true},
		{name: "[::1]", peer: "[::1]:1", host: "[::1]:2020", admitted: true},
		{name: "[::1] without a port", peer: "[::1]:1", host: "[::1]", admitted: true},
		{name: "IPv4 in IPv6", peer: "[::ffff:127.0.0.1]:1", host: "127.0.0.1", admitted: true},
		{name: "another loopback address", peer: "127.8.8.8:1", host: "localhost", admitted: true},
		{name: "loopback with a zone", peer: "[::1%lo]:1", host: "localhost", admitted: true},

		{name: "remote peer", peer: "192.0.2.1:1", host: "localhost:2020"},
		{name: "remote peer, IPv6", peer: "[2001:db8::1]:1", host: "localhost:2020"},
		{name: "link-local with a zone", peer: "[fe80::1%eth0]:1", host: "localhost:2020"},
		{name: "IPv4 in IPv6, remote", peer: "[::ffff:192.0.2.1]:1", host: "localhost"},
		{name: "unspecified", peer: "0.0.0.0:1", host: "localhost"},
		{name: "unix socket", peer: "@", host: "localhost"},
		{name: "no peer", peer: "", host: "localhost"},

		{name: "rebound name", peer: "127.0.0.1:1", host: "evil.example:2020"},
		{name: "WeChat's name", peer: "127.0.0.1:1", host: "api.weixin.qq.com"},
		{name: "name that begins alike", peer: "127.0.0.1:1", host: "localhost.evil.example"},
		{name: "name that ends alike", peer: "127.0.0.1:1", host: "evillocalhost"},
		{name: "subdomain of localhost", peer: "127.0.0.1:1", host: "evil.localhost:2020"},
		{name: "final dot", peer: "127.0.0.1:1", host: "localhost."},
		{name: "user before the host", peer: "127.0.0.1:1", host: "localhost@evil.example"},
		{name: "port that is none", peer: "127.0.0.1:1", host: "localhost:evil.example"},
		{name: "two ports", peer: "127.0.0.1:1", host: "localhost:1:2"},
		{name: "other loopback host", peer: "127.0.0.1:1", host: "127.0.0.2"},
		{name: "0.0.0.0", peer: "127.0.0.1:1", host: "0.0.0.0:2020"},
		{name: "decimal", peer: "127.0.0.1:1", host: "2130706433"},
		{name: "octal", peer: "127.0.0.1:1", host: "0177.0.0.1"},
		{name: "long IPv6", peer: "[::1]:1", host: "[0:0:0:0:0:0:0:1]"},
		{name: "IPv6 with a zone", peer: "[::1]:1", host: "[::1%25lo]"},
		{name: "bare IPv6", peer: "[::1]:1", host: "::1"},
		{name: "bracketed name", peer: "127.0.0.1:1", host: "[localhost]"},
		{name: "full-width", peer: "127.0.0.1:1", host: "\uff4cocalhost"},
		{name: "folds to localhost", peer: "127.0.0.1:1", host: "localho\u017ft"},
		{name: "no host", peer: "127.0.0.1:1", host: ""},

		{name: "Forwarded", peer: "127.0.0.1:1", host: "localhost", header: "Forwarded: for=127.0.0.1"},
		{name: "empty Forwarded", peer: "127.0.0.1:1", host: "localhost", header: "Forwarded: "},
		{name: "X-Forwarded-For", peer: "127.0.0.1:1", host: "localhost", header: "X-Forwarded-For: 127.0.0.1"},
		{name: "X-Forwarded-Host", peer: "127.0.0.1:1", host: "localhost", header: "x-forwarded-host: localhost"},
		{name: "X-Real-IP", peer: "127.0.0.1:1", host: "localhost", header: "X-Real-IP: 127.0.0.1"},
		{name: "Via", peer: "127.0.0.1:1", host: "localhost", header: "Via: 1.1 Caddy"},

		{name: "logged in", peer: "192.0.2.1:1", host: "ops.example.com", user: "bob", admitted: true},
		{name: "logged in, through a proxy", peer: "192.0.2.1:1", host: "ops.example.com", header: "X-Forwarded-For: 192.0.2.9", user: "bob", admitted: true},
		{name: "logged in, through a proxy that replaces the Host", peer: "192.0.2.1:1", host: "upstream:2020", header: "Origin: https://ops.example.com", user: "bob", admitted: true},
		{name: "says it is logged in", peer: "192.0.2.1:1", host: "ops.example.com", header: "Authorization: Basic Ym9iOg=="},
		{name: "login without a name", peer: "192.0.2.1:1", host: "ops.example.com", user: ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for path, refusal := range map[string]string{"/": "text/html; charset=utf-8", "/console.js": "text/html; charset=utf-8", "/api/status": "application/json"} {
				c := newTestConsole()
				r := httptest.NewRequest(http.MethodGet, path, nil)
				r.Host, r.RemoteAddr = tt.host, tt.peer
				if name, value, ok := strings.Cut(tt.header, ": "); ok {
					r.Header.Set(name, value)
				}
				rec := httptest.NewRecorder()
				repl := caddy.NewReplacer()
				repl.Set("http.auth.user.id", tt.user)
				if err := c.ServeHTTP(rec, caddyhttp.PrepareRequest(r, repl, rec, &caddyhttp.Server{}), nil); err != nil {
					t.Fatal(err)
				}
				if tt.admitted {
					if rec.Code != http.StatusOK {
						t.Errorf("%s: refused with %d %s", path, rec.Code, rec.Body)
					}
					continue
				}
				if rec.Code != http.StatusForbidden || rec.Header().Get("Content-Type") != refusal || !strings.Contains(rec.Body.String(), "ssh -L 9000") || len(c.asked) > 0 {
					t.Errorf("%s: admitted: %d %v %.200s", path, rec.Code, rec.Header(), rec.Body)
				}
				if host := tt.host; strings.Contains(host, "evil") && strings.Contains(rec.Body.String(), host) {
					t.Errorf("%s: the answer repeats the host", path)
				}
			}
		})
	}
}

// Over a real connection: no Host at all, two of them, an absolute target that names another host.
func TestConsoleAccessRaw(t *testing.T) {
	t.Parallel()
	c := newTestConsole()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = c.ServeHTTP(w, caddyhttp.PrepareRequest(r, caddy.NewReplacer(), w, &caddyhttp.Server{}), nil)
	}))
	defer server.Close()
	for request, want := range map[string]int{
		"GET / HTTP/1.1\r\nHost: localhost:9000\r\n":                                        200,
		"GET / HTTP/1.0\r\nHost: 127.0.0.1\r\n":                                             403, // a quiet proxy
		"GET /api/status HTTP/1.0\r\nHost: 127.0.0.1:2020\r\n":                              403,
		"GET / HTTP/1.0\r\n":                                                                403,
		"GET / HTTP/1.1\r\nHost:\r\n":                                                       403,
		"GET / HTTP/1.1\r\nHost: evil.example\r\n":                                          403,
		"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n":                          403,
		"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n":                       400,
		"GET / HTTP/1.1\r\nHost: evil.example\r\nX-Forwarded-Host: localhost\r\n":           403,
		"GET / HTTP/1.1\r\nHost: localhost\r\nX-FORWARDED-FOR: 127.0.0.1\r\n":               403,
		"GET /api/status HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\n":       200,
		"GET /api/status HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\n":    403,
		"GET /api/status HTTP/1.1\r\nHost: evil.example\r\nOrigin: http://evil.example\r\n": 403,
	} {
		conn, err := net.Dial("tcp", server.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, request+"Connection: close\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatalf("%q: %v", request, err)
		}
		if resp.StatusCode != want {
			t.Errorf("%q: got %d, want %d", request, resp.StatusCode, want)
		}
		_ = resp.Body.Close()
		_ = conn.Close()
	}
}

// Another site's page in the same browser can neither change nor read.
func TestConsoleOtherOrigins(t *testing.T) {
	t.Parallel()
	const isJSON, isFile = "Content-Type: application/json", "Content-Type: application/octet-stream"
	for _, tt := range []struct {
		method, path string
		status       int
		headers      []string
	}{
		{"POST", "/api/refresh/wx1", 200, []string{isJSON, "Origin: http://localhost:2020", "Sec-Fetch-Site: same-origin"}},
		{"POST", "/api/refresh/wx1", 200, []string{isJSON, "Origin: http://localhost:2020"}},
		{"POST", "/api/refresh/wx1", 200, []string{"Content-Type: application/json; charset=utf-8"}}, // curl
		{"PUT", "/api/verify/a.txt", 200, []string{isFile}},
		{"DELETE", "/api/verify/a.txt", 200, []string{isJSON, "Sec-Fetch-Site: same-origin"}},
		{"GET", "/api/status", 200, []string{"Sec-Fetch-Site: none"}}, // typed
		{"GET", "/api/status", 200, []string{"Sec-Fetch-Site: same-origin"}},
		{"HEAD", "/api/status", 200, nil},

		{"POST", "/api/refresh/wx1", 403, []string{isJSON, "Origin: http://evil.example", "Sec-Fetch-Site: cross-site"}},
		{"POST", "/api/refresh/wx1", 403, []string{isJSON, "Origin: http://localhost:3000", "Sec-Fetch-Site: same-site"}},
		{"POST", "/api/refresh/wx1", 403, []string{isJSON, "Origin: http://localhost:3000"}},
		{"POST", "/api/refresh/wx1", 403, []string{isJSON, "Origin: null"}},
		{"DELETE", "/api/verify/a.txt", 403, []string{isJSON, "Origin: http://evil.example"}},
		{"PUT", "/api/verify/a.txt", 403, []string{isFile, "Sec-Fetch-Site: cross-site"}},
		{"GET", "/api/status", 403, []string{"Sec-Fetch-Site: cross-site"}},
		{"GET", "/api/status", 403, []string{"Sec-Fetch-Site: same-site"}},
		{"GET", "/api/status", 403, []string{"Origin: https://ops.example.com"}}, // through a proxy that replaces the Host
		{"GET", "/api/status", 403, []string{"Origin: http://localhost:3000"}},
		{"GET", "/api/status", 403, []string{"Origin: null"}},
		{"POST", "/api/refresh/wx1", 415, nil},
		{"POST", "/api/refresh/wx1", 415, []string{"Content-Type: text/plain"}},
		{"POST", "/api/refresh/wx1", 415, []string{"Content-Type: application/x-www-form-urlencoded"}},
		{"POST", "/api/refresh/wx1", 415, []string{"Content-Type: multipart/form-data; boundary=x"}},
		{"POST", "/api/refresh/wx1", 415, []string{"Content-Type: text/plain; application/json"}},

		{"GET", "/api/refresh/wx1", 405, nil},
		{"PATCH", "/api/verify/a.txt", 405, []string{isJSON}},
		{"POST", "/api/status", 405, []string{isJSON}},
		{"GET", "/api/nothing", 404, nil},
		{"GET", "/api//status", 404, nil},
		{"GET", "/api/./status", 404, nil},
		{"GET", "/api/x/../status", 404, nil},
		{"GET", "/api/refused", 409, nil},
		{"GET", "/api/broken", 500, nil},
		{"POST", "/", 405, []string{isJSON}},
		{"OPTIONS", "/api/status", 405, nil},
		{"OPTIONS", "/api/status", 403, []string{"Origin: http://evil.example", "Access-Control-Request-Method: GET"}},
	} {
		c := newTestConsole()
		rec := c.get(t, own(tt.method, tt.path, "", tt.headers...))
		if rec.Code != tt.status {
			t.Errorf("%s %s %v: got %d %s, want %d", tt.method, tt.path, tt.headers, rec.Code, rec.Body, tt.status)
		}
		if want := tt.status == http.StatusOK; (len(c.asked) == 1) != want {
			t.Errorf("%s %s %v: the operations were asked %q", tt.method, tt.path, tt.headers, c.asked)
		}
		for name := range rec.Header() {
			if strings.HasPrefix(name, "Access-Control-") {
				t.Errorf("%s %s: has %s", tt.method, tt.path, name)
			}
		}
		if tt.status >= 400 {
			var failure struct {
				Error string `json:"error"`
			}
			if err := json.Unmarshal(rec.Body.Bytes(), &failure); err != nil || failure.Error == "" || strings.Contains(failure.Error, "reason for the log") {
				t.Errorf("%s %s: %s %v", tt.method, tt.path, rec.Body, err)
			}
		}
		if tt.status == http.StatusMethodNotAllowed && rec.Header().Get("Allow") == "" {
			t.Errorf("%s %s: no Allow", tt.method, tt.path)
		}
	}
	c := newTestConsole()
	if rec := c.get(t, own("PUT", "/api/verify/a.txt", strings.Repeat("x", maxConsoleBody+1), isFile)); rec.Code != http.StatusRequestEntityTooLarge {
		t.Errorf("a body beyond all bounds: %d", rec.Code)
	}
}

// What an operation could not do is in the log.
func TestConsoleLogsFailures(t *testing.T) {
	t.Parallel()
	c := newTestConsole()
	core, logs := observer.New(zapcore.DebugLevel)
	c.logger = zap.New(core)
	c.get(t, own("GET", "/api/broken", ""))
	if logs.FilterField(zap.Error(errors.New("reason for the log"))).Len() != 1 {
		t.Errorf("log: %v", logs.All())
	}
}

// Wherever the console is mounted, the page is at a path that ends with a slash and everything else beside it.
func TestConsolePaths(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ asked, seen, answer string }{
		{"/", "/", "page"},
		{"/api/", "/api/", "page"},
		{"/api/console/", "/api/console/", "page"},
		{"/api/console/console.js", "/api/console/console.js", "js"},
		{"/api/console.css", "/api/console.css", "css"},
		{"/api/status/", "/api/status/", "page"},
		{"/wx.console/", "/wx.console/", "page"},
		{"/wx.console", "/", "./wx.console/"},
		{"/wx.console/api/status", "/wx.console/api/status", "api"},
		{"/api/api/status", "/api/api/status", "api"},
		{"/console/", "/console/", "page"},
		{"/a/b/", "/a/b/", "page"},
		{"/console/", "/", "page"}, // handle_path
		{"/console", "/", "./console/"},
		{"/a/console", "", "./console/"},
		{"/console", "/console", "./console/"},
		{"/a/con%20sole", "/a/con%20sole", "./con%20sole/"},
		{"/a/console?x=//evil.example", "/a/console", "./console/"},
		{"//evil.example", "//evil.example", "404"},
		{"/https:evil", "/https:evil", "./https:evil/"},
		{"/%5Cevil", "/%5Cevil", "./%5Cevil/"},
		{"/console.css", "/console.css", "css"},
		{"/console/console.js", "/console.js", "js"},
		{"/console/console.js", "/console/console.js", "js"},
		{"/console/icon.svg", "/console/icon.svg", "icon"},
		{"/index.html", "/index.html", "page"},
		{"/favicon.ico", "/favicon.ico", "404"},
		{"/console/..%2fconsole.go", "/console/..%2fconsole.go", "404"},
		{"/api/status", "/api/status", "api"},
		{"/console/api/status", "/api/status", "api"},
		{"/console/api/status", "/console/api/status", "api"},
		{"/api/console/api/status", "/api/console/api/status", "api"},
		{"/api/verify/a%2fapi%2fstatus", "/api/verify/a%2fapi%2fstatus", "file a/api/status"},
		{"/api/verify/index.html", "/api/verify/index.html", "file index.html"},
		{"/api/nothing", "/api/nothing", "404"},

		// As an address that somebody typed.
		{"typed /wx.console", "/wx.console", "./wx.console/"},
		{"typed /api/console", "/api/console", "./console/"},
		{"typed /api/wx.console", "/api/wx.console", "./wx.console/"},
		{"typed /api/status", "/api/status", "api"},
	} {
		c := newTestConsole()
		asked, typed := strings.CutPrefix(tt.asked, "typed ")
		r := own("GET", asked, "")
		if typed {
			r.Header.Set("Accept", "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8")
		}
		rec := httptest.NewRecorder()
		r = caddyhttp.PrepareRequest(r, caddy.NewReplacer(), rec, &caddyhttp.Server{})
		seen, err := url.PathUnescape(tt.seen)
		if err != nil {
			t.Fatal(err)
		}
		r.URL = &url.URL{Path: seen, RawPath: tt.seen, RawQuery: r.URL.RawQuery}
		if err := c.ServeHTTP(rec, r, nil); err != nil {
			t.Fatal(err)
		}
		got := fmt.Sprint(rec.Code)
		switch kind := rec.Header().Get("Content-Type"); {
		case rec.Code == http.StatusFound:
			got = rec.Header().Get("Location")
		case rec.Code != http.StatusOK:
		case len(c.asked) > 0 && strings.HasPrefix(c.asked[0], "GET /status"):
			got = "api"
		case len(c.asked) > 0:
			got = "file " + strings.Fields(c.asked[0])[2]
		case strings.HasPrefix(kind, "text/html"):
			got = "page"
		case strings.HasPrefix(kind, "text/css"):
			got = "css"
		case strings.HasPrefix(kind, "text/javascript"):
			got = "js"
		case kind == "image/svg+xml":
			got = "icon"
		}
		if got != tt.answer {
			t.Errorf("%s, seen as %s: got %s, want %s", tt.asked, tt.seen, got, tt.answer)
		}
	}
}

// Every answer keeps the browser from doing anything with it but what the page is for.
func TestConsoleHeaders(t *testing.T) {
	t.Parallel()
	c := newTestConsole()
	for _, path := range []string{"/", "/console.css", "/console.js", "/text.js", "/icon.svg", "/api/status", "/api/nothing", "/nothing.txt"} {
		h := c.get(t, own("GET", path, "")).Header()
		for name, want := range map[string]string{
			"Content-Security-Policy": consoleCSP, "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
			"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
		} {
			if h.Get(name) != want {
				t.Errorf("%s: %s is %q", path, name, h.Get(name))
			}
		}
		cache, asset := "no-store", path == "/" || strings.Contains(path, ".") && path != "/nothing.txt"
		if asset {
			cache = "no-cache"
		}
		if h.Get("Cache-Control") != cache {
			t.Errorf("%s: Cache-Control is %q", path, h.Get("Cache-Control"))
		}
		if !asset {
			continue
		}
		etag := h.Get("ETag")
		if !regexp.MustCompile(`^"[0-9a-f]{32}"$`).MatchString(etag) {
			t.Errorf("%s: ETag %s", path, etag)
		}
		if rec := c.get(t, own("GET", path, "", "If-None-Match: "+etag)); rec.Code != http.StatusNotModified || rec.Body.Len() > 0 {
			t.Errorf("%s again: %d", path, rec.Code)
		}
		if rec := c.get(t, own("HEAD", path, "")); rec.Code != http.StatusOK || rec.Body.Len() > 0 || rec.Header().Get("ETag") != etag {
			t.Errorf("HEAD %s: %d", path, rec.Code)
		}
	}
	for _, part := range []string{"default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "frame-ancestors 'none'", "form-action 'none'", "base-uri 'none'"} {
		if !slices.Contains(strings.Split(consoleCSP, "; "), part) {
			t.Errorf("the policy lacks %s", part)
		}
	}
}

// The page has nothing in it that its policy forbids, refers to nothing outside, and never makes HTML of data.
func TestConsolePage(t *testing.T) {
	t.Parallel()
	if len(consoleAssets) != 5 {
		t.Errorf("%d files", len(consoleAssets))
	}
	forbidden := map[string]*regexp.Regexp{
		".html": regexp.MustCompile(`(?i)<style|style=|\son\w+=|<script>|javascript:|https?://|(src|href)="/`),
		".css":  regexp.MustCompile(`(?i)https?://|@import|url\(`),
		".js":   regexp.MustCompile(`innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser|setTimeout\("|["'` + "`" + `]https?://`),
	}
	for name, asset := range consoleAssets {
		if pattern := forbidden[name[strings.LastIndexByte(name, '.'):]]; pattern != nil {
			if found := pattern.Find(asset.content); found != nil {
				t.Errorf("%s has %q", name, found)
			}
		}
		if asset.contentType == "" {
			t.Errorf("%s has no content type", name)
		}
	}
	page := string(consoleAssets["index.html"].content)
	for _, m := range regexp.MustCompile(`(?:src|href)="([^"#][^"]*)"`).FindAllStringSubmatch(page, -1) {
		if _, ok := consoleAssets[m[1]]; !ok {
			t.Errorf("the page refers to %s", m[1])
		}
	}
	// Both languages say the same things.
	words := regexp.MustCompile(`(?m)(\w+): "`)
	text := string(consoleAssets["text.js"].content)
	en, zh, _ := strings.Cut(text, "\n\tzh: {")
	names := func(s string) (list []string) {
		for _, m := range words.FindAllStringSubmatch(s, -1) {
			list = append(list, m[1])
		}
		return list
	}
	if e, z := names(en), names(zh); !slices.Equal(e, z) {
		t.Errorf("the languages differ:\n%q\n%q", e, z)
	}
	for _, m := range regexp.MustCompile(`data-(?:t|place|label)="(\w+)"`).FindAllStringSubmatch(page, -1) {
		if !strings.Contains(en, m[1]+": \"") {
			t.Errorf("no text %s", m[1])
		}
	}
	for _, m := range regexp.MustCompile(`\bt\("(\w+)"[,)]`).FindAllStringSubmatch(string(consoleAssets["console.js"].content), -1) {
		if !strings.Contains(en, m[1]+": \"") {
			t.Errorf("no text %s", m[1])
		}
	}
}

// consoleSites are sites of every shape that a link has to be found on.
const consoleSites = `
wechat.example.com, www.example.com {
	wechat_oauth /wx/thirdParty {
		platform wx1111111111111111
		func scan https://shop.example.com/scan?from=wechat
		func verify https://shop.example.com/verify {
			appids wx2222222222222222 wx3333333333333333
			scope snsapi_userinfo
		}
	}
	wechat_authorize /wx/authorize {
		platform wx1111111111111111
	}
}
https://in.example.com:8443 {
	handle_path /below/* {
		route /deeper/* {
			uri strip_prefix /deeper
			wechat_oauth / {
				platform wx4444444444444444
				func deep https://shop.example.com/deep
			}
		}
	}
}
http://plain.example.com {
	wechat_authorize / {
		platform wx4444444444444444
	}
}
*.wild.example.com {
	wechat_oauth /wild {
		func wild https://shop.example.com/wild
	}
	wechat_oauth /named {
		origin https://named.example.com
		func named https://shop.example.com/named
	}
}
http://:2020 {
	bind 127.0.0.1
	wechat_console
}
`

// TestConsoleReasons: the console has a Chinese word for each reason that the source has for what is refused or fails, and for no other.
func TestConsoleReasons(t *testing.T) {
	t.Parallel()
	reasons := map[string]bool{outcomeUnusable: true, outcomeLost: true}
	literal := regexp.MustCompile(`"((?:[^"\\]|\\.)+)"`)
	for file, pattern := range map[string]string{
		"push.go":             `&refusal\{http\.\w+, "\w+", ("[^"]+")\}`,
		"event.go":            `entry\.Reason = ("[^"]+")`,
		"feed_call.go":        `e\.Reason = (?:feedCall, outcomeRefused, )?("[^"]+"(?: \+ string\(k\.Kind\) \+ "[^"]+")?)`,
		"feed_push.go":        `return ("[^"]+"(?: \+ (?:strconv|safeReason).*)?)\n`,
		"message_pace.go":     `err\w+ += said\(("[^"]+")|fmt\.(?:Errorf|Sprintf)\(("[^"]+%[vT]")`,
		"message_reply.go":    `err\w+ = said\(("[^"]+")`,
		"message_shared.go":   `errNodesDied = errors\.New\(("[^"]+")\)`,
		"oauth_errors.go":     `reason: +("[^"]+")|f\.reason = .*(?:InfoLevel|WarnLevel|DebugLevel), ("[^"]+")`,
		"oauth_limit.go":      `reason: +("[^"]+")`,
		"authorize_errors.go": `reason: +("[^"]+")|f\.reason(?:, f\.remedy)? = (?:.*Level, )?("[^"]+")`,
	} {
		source, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		found := regexp.MustCompile(pattern).FindAllStringSubmatch(string(source), -1)
		if len(found) == 0 {
			t.Errorf("%s has no reasons", file)
		}
		for _, m := range found {
			words := literal.FindAllStringSubmatch(strings.Join(m[1:], ""), -1)
			reason := words[0][1]
			switch { // what is put together
			case len(words) > 1:
				reason += "x" + words[1][1]
			case strings.HasSuffix(reason, ": "):
				reason += "x"
			case strings.HasSuffix(reason, "%v"), strings.HasSuffix(reason, "%T"):
				reason = reason[:len(reason)-2] + "x"
			case strings.HasSuffix(reason, " HTTP "):
				reason += "502"
			}
			reasons[reason] = true
		}
	}
	if len(reasons) < 65 {
		t.Errorf("%d reasons: %v", len(reasons), reasons)
	}
	text := string(consoleAssets["text.js"].content)
	_, table, _ := strings.Cut(text, "const REASONS = {\n")
	table, forms, _ := strings.Cut(table, "\n};")
	known := make(map[string]string)
	for line := range strings.Lines(table) {
		m := regexp.MustCompile(`^\t"([^"]+)": "([^"]+)",$`).FindStringSubmatch(strings.TrimRight(line, "\n"))
		if m == nil || !regexp.MustCompile(`\p{Han}`).MatchString(m[2]) || known[m[1]] != "" {
			t.Errorf("no reason: %s", line)
			continue
		}
		if known[m[1]] = m[2]; !reasons[m[1]] {
			t.Errorf("nothing says %q", m[1])
		}
	}
	type form struct {
		pattern *regexp.Regexp
		words   string
	}
	var patterns []form
	for _, m := range regexp.MustCompile(`(?m)^\t\[/(\^.*\$)/, "([^"]+)"\],$`).FindAllStringSubmatch(forms, -1) {
		patterns = append(patterns, form{regexp.MustCompile(m[1]), m[2]})
	}
	if lines := strings.Count(forms, "\n\t["); lines != len(patterns) {
		t.Errorf("%d forms of %d are of the kind that can be tested", len(patterns), lines)
	}
	because := func(reason string) string { // as the page has it
		if words := known[reason]; words != "" {
			return words
		}
		for _, f := range patterns {
			if f.pattern.MatchString(reason) {
				return f.pattern.ReplaceAllString(reason, f.words)
			}
		}
		return ""
	}
	for reason := range reasons {
		if because(reason) == "" {
			t.Errorf("there is no Chinese for %q", reason)
		}
	}

	// What the gateway itself has in Chinese elsewhere is the same here.
	unusable := []error{errBusy, errCrowded, errTooSlow, errBrokenOff, errReplyTooLong, errBadGzip, errNoEnd, errEncrypted}
	for _, text := range []string{"<!DOCTYPE html><p>", "<html><p>", "<error/>", `{"a":1}`, "Fatal error"} {
		w := newReplyWriter(1 << 10)
		if _, err := w.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
		_, _, why := w.judge(crypto.FormatXML, nil)
		unusable = append(unusable, why)
		w.release()
	}
	for _, coding := range []string{"br", strings.Repeat("x-compress,", maxCodings-1) + strings.Repeat("x", maxCodingName)} {
		w := newReplyWriter(1 << 10)
		w.Header().Set("Content-Encoding", coding)
		if _, err := w.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		_, _, why := w.judge(crypto.FormatJSON, nil)
		unusable = append(unusable, why)
		w.release()
	}
	w := newReplyWriter(1 << 10)
	w.WriteHeader(http.StatusInternalServerError)
	_, _, why := w.judge(crypto.FormatXML, nil)
	for _, why := range append(unusable, why) {
		if got, want := because(backendReason(outcomeUnusable, why)), textOf(why).ZH; got != want {
			t.Errorf("the console says %q of %q, and the findings %q", got, why, want)
		}
	}
	w.release()
}

// The operations of the console find every landing place, and draw nothing but its links.
func TestConsoleFuncs(t *testing.T) {
	s := newSites(t, t.TempDir(), consoleSites)
	c := &Console{operations: operations{app: s.app, logger: zap.NewNop()}, logger: zap.NewNop()}
	c.mount(c.operations.list())
	var got struct {
		Funcs     []servedFunc `json:"funcs"`
		Authorize []string     `json:"authorize"`
	}
	answer := serve(t, c, own("GET", "/api/funcs", ""), nil)
	if err := json.Unmarshal(answer.Body.Bytes(), &got); err != nil {
		t.Fatalf("%d %s", answer.Code, answer.Body)
	}
	var lines []string
	for _, f := range got.Funcs {
		lines = append(lines, fmt.Sprintf("%s %s %s %v", f.Key, f.To, f.Scope, f.AppIDs))
		for _, link := range f.Links {
			lines = append(lines, " "+link)
		}
	}
	want := []string{
		"deep https://shop.example.com/deep snsapi_base []",
		" https://in.example.com:8443/below/deeper/authorize/wx2222222222222222/deep",
		" https://in.example.com:8443/below/deeper/authorize/{appid}/deep",
		"named https://shop.example.com/named snsapi_base []",
		" https://named.example.com/named/authorize/wx2222222222222222/named",
		"scan https://shop.example.com/scan?from=wechat snsapi_base []",
		" https://wechat.example.com/wx/thirdParty/authorize/wx2222222222222222/scan",
		" https://wechat.example.com/wx/thirdParty/authorize/{appid}/scan",
		" https://www.example.com/wx/thirdParty/authorize/wx2222222222222222/scan",
		" https://www.example.com/wx/thirdParty/authorize/{appid}/scan",
		"verify https://shop.example.com/verify snsapi_userinfo [wx2222222222222222 wx3333333333333333]",
		" https://wechat.example.com/wx/thirdParty/authorize/wx2222222222222222/verify",
		" https://wechat.example.com/wx/thirdParty/authorize/wx3333333333333333/verify",
		" https://www.example.com/wx/thirdParty/authorize/wx2222222222222222/verify",
		" https://www.example.com/wx/thirdParty/authorize/wx3333333333333333/verify",
		"wild https://shop.example.com/wild snsapi_base []",
	}
	if !slices.Equal(lines, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(lines, "\n"), strings.Join(want, "\n"))
	}
	if pages := []string{"http://plain.example.com/", "https://wechat.example.com/wx/authorize", "https://www.example.com/wx/authorize"}; !slices.Equal(got.Authorize, pages) {
		t.Errorf("pages: %q", got.Authorize)
	}
	for text, status := range map[string]int{
		"https://wechat.example.com/wx/thirdParty/authorize/wx2222222222222222/scan":            200,
		"https://wechat.example.com/wx/thirdParty/authorize/wx3333333333333333/scan":            200,
		"https://wechat.example.com/wx/authorize":                                               200,
		"https://wechat.example.com/wx/thirdParty/authorize/{appid}/scan":                       400,
		"https://wechat.example.com/wx/thirdParty/authorize/wx1111111111111111/scan":            400, // a platform
		"https://wechat.example.com/wx/thirdParty/authorize/wx9999999999999999/verify":          400, // not for all
		"https://wechat.example.com/wx/thirdParty/authorize/wx3333333333333333/scan?x":          400,
		"https://wechat.example.com/wx/thirdParty/authorize/wx3333333333333333/../../../x/scan": 400,
		"https://evil.example/": 400,
		"javascript:alert(1)":   400,
		"":                      400,
		"https://wechat.example.com/wx/thirdParty/authorize/wx" + strings.Repeat("3", maxQRText) + "/scan":       400,
		"https://wechat.example.com/wx/thirdParty/authorize/scan":                                                400,
		"https://wechat.example.com/wx/thirdParty/authorize/WX3333333333333333/scan":                             400,
		"https://wechat.example.com/wx/thirdParty/authorize/wx3333333333333333/scan/authorize/wx3333333333/scan": 400,
	} {
		rec := serve(t, c, own("GET", "/api/qr?text="+url.QueryEscape(text), ""), nil)
		drawn := strings.HasPrefix(rec.Body.String(), "<svg ") && rec.Header().Get("Content-Type") == "image/svg+xml"
		if rec.Code != status || drawn != (status == http.StatusOK) || status != http.StatusOK && text != "" && strings.Contains(rec.Body.String(), text) {
			t.Errorf("%q: %d %.100s", text, rec.Code, rec.Body)
		}
	}
	// No answer has a secret of the configuration in it.
	for _, path := range []string{"/", "/api/funcs", "/api/orphans", "/api/verify", "/api/nothing", "/api/qr"} {
		body := serve(t, c, own("GET", path, ""), nil).Body.String()
		for _, s := range []string{platformToken, platformKey, otherToken, otherKey, accountToken, accountKey} {
			if strings.Contains(body, s) {
				t.Errorf("%s shows a secret", path)
			}
		}
	}
}

// Without the global option there is nothing to list, and without an http app no site.
func TestFuncsWithoutSites(t *testing.T) {
	t.Parallel()
	none := &operations{logger: zap.NewNop()}
	for _, op := range []func(http.ResponseWriter, *http.Request) error{none.funcs, none.qr} {
		if err, ok := errors.AsType[caddy.APIError](op(httptest.NewRecorder(), own("GET", "/", ""))); !ok || err.HTTPStatus != http.StatusNotFound {
			t.Errorf("got %v", err)
		}
	}
	app, _ := newTestApp(t, testConfig(""))
	rec := httptest.NewRecorder()
	if err := (&operations{app: app, logger: zap.NewNop()}).funcs(rec, own("GET", "/", "")); err != nil || rec.Body.String() != `{"authorize":[],"funcs":[]}` {
		t.Errorf("%s %v", rec.Body, err)
	}
}

func TestConsoleNeedsApp(t *testing.T) {
	t.Parallel()
	provisioning.Lock()
	defer provisioning.Unlock()
	ctx, err := caddy.ProvisionContext(&caddy.Config{Admin: &caddy.AdminConfig{Disabled: true}})
	if err != nil {
		t.Fatal(err)
	}
	if err := new(Console).Provision(ctx); err == nil || !strings.Contains(err.Error(), "global option wechat") {
		t.Errorf("got %v", err)
	}
}
