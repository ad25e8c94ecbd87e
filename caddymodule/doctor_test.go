package caddymodule

import (
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// patient is what a doctor looks at: a config, and a world in which all is well. A test makes something of it ill.
type patient struct {
	config    map[string]any
	addresses map[string]string // of names
	own       http.Handler      // the gateway as it is seen from outside, on both ports
	wechat    http.HandlerFunc
	api       map[string]string // answers of WeChat's through the gateway, by path
	admin     map[string]string // answers of the admin endpoint, by path; nil: there is none
	statuses  map[string]int    // of answers, by path; 200 if it is not there
	ports     map[string]bool   // addresses that take connections, besides those of the servers
	noDNS     bool              // the resolver does not answer
	noRoots   bool
	now       func() time.Time
	offline   bool
}

const doctorFile = "a1B2c3D4e5F6g7H8"

const doctorFileName = "MP_verify_" + doctorFile + ".txt"

func newPatient(t *testing.T) *patient {
	t.Helper()
	var app map[string]any
	if err := json.Unmarshal([]byte(testConfig("")), &app); err != nil {
		t.Fatal(err)
	}
	app["api"] = []any{"https://api.example.com"}
	app["seal_keys"] = []any{moveSealKey}
	app["spill"] = filepath.Join(t.TempDir(), "spill")
	handle := func(h map[string]any, path ...string) map[string]any {
		route := map[string]any{"handle": []any{h}}
		if len(path) > 0 {
			route["match"] = []any{map[string]any{"path": path}}
		}
		return route
	}
	verify := handle(map[string]any{"handler": "wechat_verify", "files": map[string]any{doctorFileName: doctorFile}})
	hosted := func(routes ...any) []any {
		return []any{map[string]any{
			"match": []any{map[string]any{"host": []any{"wechat.example.com"}}}, "terminal": true,
			"handle": []any{map[string]any{"handler": "subroute", "routes": routes}},
		}}
	}
	return &patient{
		config: map[string]any{
			"admin":   map[string]any{"listen": "localhost:2019"},
			"storage": map[string]any{"module": "file_system", "root": t.TempDir()},
			"apps": map[string]any{
				"wechat": app,
				"http": map[string]any{"servers": map[string]any{
					"api": map[string]any{"listen": []any{"127.0.0.1:8090"}, "routes": []any{handle(map[string]any{"handler": "wechat_api"})}},
					"own": map[string]any{"listen": []any{":443"}, "routes": hosted(verify,
						handle(map[string]any{"handler": "wechat_event"}, "/wx/event"),
						handle(map[string]any{"handler": "wechat_oauth", "base": "/wx/login", "funcs": []any{map[string]any{"key": "a", "prefix": "https://shop.example.com/"}}}, "/wx/login/authorize/*", "/wx/login/authUserReceive/*"),
						map[string]any{"match": []any{map[string]any{"path": []any{"/wx/message/*"}}}, "handle": []any{
							map[string]any{"handler": "wechat_message"},
							map[string]any{"handler": "reverse_proxy", "upstreams": []any{map[string]any{"dial": "backend.internal:8080"}}},
						}},
					)},
					"plain": map[string]any{"listen": []any{":80"}, "routes": hosted(verify)},
				}},
			},
		},
		addresses: map[string]string{"wechat.example.com": "203.0.113.1", "api.example.com": "203.0.113.2", "backend.internal": "10.0.0.3"},
		own:       ownGateway(t),
		wechat: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			_, _ = io.WriteString(w, `{"errcode":41001,"errmsg":"access_token missing"}`)
		},
		api: map[string]string{
			"/cgi-bin/getcallbackip":  `{"ip_list":["101.226.103.0","101.226.62.77"]}`,
			"/cgi-bin/callback/check": `{"dns":[{"ip":"203.0.113.1","real_operator":"UNICOM"}],"ping":[{"ip":"203.0.113.1","from_operator":"UNICOM","package_loss":"0%","time":"23.079ms"}]}`,
		},
		admin: map[string]string{
			"/wechat/verify":                      `{"files":[],"auto":[]}`,
			"/wechat/status":                      `{"level":"green","findings":[],"platforms":[{"appid":"` + platformID + `","ticket":{"received":"2026-01-01T00:00:00Z","age_seconds":60}}]}`,
			"/wechat/authorizers":                 `{"authorizers":[{"platform":"` + platformID + `","appid":"` + authorizerID + `","state":"authorized"}],"next":""}`,
			"/wechat/authorizers/" + authorizerID: `{"appid":"` + authorizerID + `","type":{"mini_program":false},"permission_sets":[{"id":1},{"id":4}],"token":{}}`,
		},
		ports: map[string]bool{"10.0.0.3:8080": true},
		now:   time.Now,
	}
}

// ownGateway is a running gateway with the config's handlers.
func ownGateway(t *testing.T) http.Handler {
	t.Helper()
	app, ctx := newTestApp(t, testConfig(""))
	m, e, v := &Message{}, &Event{}, &Verify{Files: map[string]string{doctorFileName: doctorFile}}
	for _, h := range []caddy.Provisioner{m, e, v} {
		if err := h.Provision(ctx); err != nil {
			t.Fatal(err)
		}
	}
	app.inForce()
	backend := caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
		t.Error("the doctor reached a backend")
		return nil
	})
	missing := caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error { w.WriteHeader(http.StatusNotFound); return nil })
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var h caddyhttp.MiddlewareHandler = v
		var next caddyhttp.Handler = missing
		switch {
		case r.URL.Path == "/wx/event":
			h = e
		case strings.HasPrefix(r.URL.Path, "/wx/message/"):
			h, next = m, backend
		}
		r = caddyhttp.PrepareRequest(r, caddy.NewReplacer(), w, &caddyhttp.Server{})
		if err := h.ServeHTTP(w, r, next); err != nil {
			t.Error(err)
		}
	})
}

// part is an object of the config, by its path.
func (p *patient) part(path string) map[string]any {
	var at any = p.config
	for name := range strings.SplitSeq(path, "/") {
		switch here := at.(type) {
		case map[string]any:
			at = here[name]
		case []any:
			at = here[name[0]-'0']
		}
	}
	m, _ := at.(map[string]any)
	return m
}

// examine has the doctor look.
func (p *patient) examine(t *testing.T) *doctorReport {
	t.Helper()
	file := filepath.Join(t.TempDir(), "caddy.json")
	text, err := json.Marshal(p.config)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	servers := map[string]string{}
	roots := x509.NewCertPool()
	start := func(secure bool, h http.Handler, addresses ...string) {
		s := httptest.NewUnstartedServer(h)
		if s.Config.ErrorLog = nil; secure {
			s.StartTLS()
			roots.AddCert(s.Certificate())
		} else {
			s.Start()
		}
		t.Cleanup(s.Close)
		for _, a := range addresses {
			servers[a] = s.Listener.Addr().String()
		}
	}
	byPath := func(answers map[string]string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			path := strings.TrimPrefix(r.URL.Path, "/"+accountID)
			path = strings.TrimPrefix(path, "/"+authorizerID)
			if answer, ok := answers[path]; ok && (r.Header.Get("Authorization") == "Bearer crm-key-0123456789") != strings.HasPrefix(path, "/wechat/") {
				w.WriteHeader(cmp.Or(p.statuses[path], http.StatusOK))
				_, _ = io.WriteString(w, answer)
				return
			}
			w.WriteHeader(http.StatusNotFound)
		}
	}
	start(true, p.own, "203.0.113.1:443")
	start(false, p.own, "203.0.113.1:80")
	start(true, p.wechat, "203.0.113.2:443")
	if p.api != nil {
		start(false, byPath(p.api), "127.0.0.1:8090")
	}
	if p.admin != nil {
		start(false, byPath(p.admin), "localhost:2019")
	}
	start(false, http.NotFoundHandler(), "none")

	d := newDoctor()
	d.resolve = func(_ context.Context, host string) ([]netip.Addr, error) {
		if p.noDNS {
			return nil, &net.DNSError{Err: "server misbehaving", Name: host, IsTemporary: true}
		}
		a, ok := p.addresses[host]
		if !ok {
			return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
		}
		return []netip.Addr{netip.MustParseAddr(a)}, nil
	}
	d.dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		to, ok := servers[address]
		if !ok && p.ports[address] {
			to, ok = servers["none"], true
		}
		if !ok {
			return nil, &net.OpError{Op: "dial", Net: network, Err: syscall.ECONNREFUSED}
		}
		return new(net.Dialer).DialContext(ctx, network, to)
	}
	d.roots = func() (*x509.CertPool, error) {
		if p.noRoots {
			return x509.NewCertPool(), nil
		}
		return roots, nil
	}
	d.interfaces = func() ([]net.Addr, error) {
		return []net.Addr{&net.IPNet{IP: net.IPv4(10, 0, 0, 2), Mask: net.CIDRMask(24, 32)}}, nil
	}
	d.now = p.now
	provisioning.Lock()
	err = d.read(file, "", "")
	provisioning.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	report := d.examine(t.Context(), p.offline)
	var out strings.Builder
	for _, asJSON := range []bool{false, true} {
		if err := report.print(&out, asJSON); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range report.Checks {
		if r.ID == "gateway" && strings.Contains(p.admin["/wechat/status"], r.Text.EN) {
			continue // the running gateway's own words
		}
		speaksBoth(t, r.ID+" "+r.Subject, r.Text)
		if r.Remedy != nil {
			speaksBoth(t, "the remedy of "+r.ID+" "+r.Subject, *r.Remedy)
		}
	}
	for _, secret := range append(commandSecrets, moveSealKey) {
		if strings.Contains(out.String(), secret) {
			t.Errorf("it shows a secret: %s", out.String())
		}
	}
	return report
}

// of are the results of one check.
func (r *doctorReport) of(id string) (list []doctorResult) {
	for _, c := range r.Checks {
		if c.ID == id {
			list = append(list, c)
		}
	}
	return list
}

// TestDoctorOfTheHealthy: where all is well every check says so, and none is left out.
func TestDoctorOfTheHealthy(t *testing.T) {
	t.Parallel()
	p := newPatient(t)
	report := p.examine(t)
	for _, c := range doctorChecks {
		results := report.of(c.id)
		if len(results) == 0 {
			t.Errorf("%s: said nothing", c.id)
		}
		for _, r := range results {
			if r.Level != doctorGreen && c.id != "placeholders" {
				t.Errorf("%s %s: %s: %s", c.id, r.Subject, r.Level, r.Text.EN)
			}
		}
	}
	if report.Level != doctorGreen {
		t.Errorf("level is %s", report.Level)
	}
	if r := report.of("config")[0].Text; r.EN != "loads: 2 platforms, 1 account, 1 client" || r.ZH != "可以加载：2 个平台，1 个普通账号，1 个 client" {
		t.Errorf("config: %q %q", r.EN, r.ZH)
	}
	// Two platforms and an account, on the message URL, and the platforms on the event URL.
	if n := len(report.of("push")); n != 5 {
		t.Errorf("%d push URLs were looked at, want 5: %+v", n, report.of("push"))
	}
	if n := len(report.of("verify_files")); n != 2 {
		t.Errorf("%d verification files were looked at, want http and https: %+v", n, report.of("verify_files"))
	}
}

// inPlaceOf is a handler that takes a request's place, or leaves it to the gateway.
func inPlaceOf(own http.Handler, f func(w http.ResponseWriter, r *http.Request) bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !f(w, r) {
			own.ServeHTTP(w, r)
		}
	})
}

// TestDoctorOfTheSick: each illness is found by its check, and no other check turns red for it.
func TestDoctorOfTheSick(t *testing.T) {
	t.Parallel()
	messages := func(r *http.Request) bool { return strings.HasPrefix(r.URL.Path, "/wx/message/") }
	file := func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, ".txt") }
	for _, tt := range []struct {
		name, id, level, says string
		ill                   func(p *patient)
		also                  string // checks that suffer too
	}{
		{"no such placeholder", "placeholders", doctorRed, "{env.NO_SUCH_SECRET} resolves to nothing", func(p *patient) {
			p.part("apps/wechat/platforms/0")["secret"] = "{env.NO_SUCH_SECRET}"
		}, "config"},
		{"does not load", "config", doctorRed, "Caddy does not load it", func(p *patient) { p.part("apps/wechat/platforms/0")["secret"] = "" }, ""},
		{"bad key", "placeholders", doctorRed, "aes key has 3 characters", func(p *patient) { p.part("apps/wechat/accounts/0")["aes_keys"] = []any{"abc"} }, "config"},
		{"no seal key", "config", doctorYellow, "tickets and refresh tokens are stored", func(p *patient) { delete(p.part("apps/wechat"), "seal_keys") }, ""},
		{"behind the backend", "config", doctorRed, "stands behind reverse_proxy, which answers everything", func(p *patient) {
			slices.Reverse(p.part("apps/http/servers/own/routes/0/handle/0/routes/3")["handle"].([]any))
		}, ""},
		{"behind a catch-all", "config", doctorRed, "stands behind static_response", func(p *patient) {
			p.part("apps/http/servers/own/routes/0/handle/0/routes/0")["handle"] = []any{map[string]any{"handler": "static_response", "body": "hello"}}
		}, "verify_files"},
		{"plain mode", "config", doctorYellow, "明文模式", func(p *patient) {
			a := p.part("apps/wechat/accounts/0")
			a["mode"] = "plain"
		}, ""},
		{"no CA roots", "ca_roots", doctorRed, "no CA roots", func(p *patient) { p.noRoots = true }, "tls wechat_hosts push verify_files"},
		{"name without address", "dns", doctorRed, "no such host", func(p *patient) { delete(p.addresses, "wechat.example.com") }, "tls push verify_files"},
		{"private address", "dns", doctorYellow, "which WeChat cannot reach", func(p *patient) { p.addresses["wechat.example.com"] = "192.168.1.1" }, "tls push verify_files"},
		{"IPv6 alone", "dns", doctorYellow, "has IPv6 addresses alone", func(p *patient) { p.addresses["wechat.example.com"] = "2001:db8::1" }, "tls push verify_files"},
		{"nobody listens", "tls", doctorRed, "no connection to port 443", func(p *patient) { p.addresses["wechat.example.com"] = "203.0.113.9" }, "push verify_files"},
		{"expired", "tls", doctorRed, "expired, or is not valid yet", func(p *patient) { p.now = func() time.Time { return time.Now().AddDate(70, 0, 0) } }, "wechat_hosts push verify_files"},
		{"soon expired", "tls", doctorYellow, "its certificate ends in", func(p *patient) {
			ends := time.Date(2084, time.January, 29, 16, 0, 0, 0, time.UTC) // httptest's
			p.now = func() time.Time { return ends.Add(-time.Hour) }
		}, "clock push"},
		{"upstream is us", "upstreams", doctorRed, "leads back to the gateway itself", func(p *patient) {
			p.part("apps/http/servers/own/routes/0/handle/0/routes/3/handle/1/upstreams/0")["dial"] = "wechat.example.com:443"
		}, ""},
		{"upstream is this machine", "upstreams", doctorRed, "leads back to the gateway itself (10.0.0.2)", func(p *patient) {
			p.addresses["backend.internal"] = "10.0.0.2"
			p.part("apps/http/servers/own/routes/0/handle/0/routes/3/handle/1/upstreams/0")["dial"] = "backend.internal:443"
		}, ""},
		{"upstream unknown", "upstreams", doctorRed, "has no address", func(p *patient) { delete(p.addresses, "backend.internal") }, ""},
		{"upstream down", "upstreams", doctorYellow, "takes no connection", func(p *patient) { p.ports = nil }, ""},
		{"WeChat away", "wechat_hosts", doctorRed, "cannot be reached", func(p *patient) { delete(p.addresses, "api.example.com") }, ""},
		{"a login page instead", "wechat_hosts", doctorRed, "not as WeChat does", func(p *patient) {
			p.wechat = func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "<html>log in</html>") }
		}, ""},
		{"proxy away", "wechat_hosts", doctorRed, "through the proxy proxy.internal:3128", func(p *patient) { p.part("apps/wechat")["proxy"] = "http://proxy.internal:3128" }, ""},
		{"backup away", "wechat_hosts", doctorYellow, "cannot be reached", func(p *patient) {
			p.part("apps/wechat")["api"] = []any{"https://api.example.com", "https://api2.example.com"}
		}, ""},
		{"clock", "clock", doctorRed, "pushes are refused as stale", func(p *patient) { p.now = func() time.Time { return time.Now().Add(10 * time.Minute) } }, "push"},
		{"clock a bit off", "clock", doctorYellow, "ahead of WeChat's", func(p *patient) { p.now = func() time.Time { return time.Now().Add(2 * time.Minute) } }, ""},
		{"another token is running", "push", doctorRed, "refuses the handshake (403)", func(p *patient) { p.part("apps/wechat/platforms/0")["tokens"] = []any{"another"} }, ""},
		{"handshake with a newline", "push", doctorRed, "byte for byte", func(p *patient) {
			p.own = inPlaceOf(p.own, func(w http.ResponseWriter, r *http.Request) bool {
				if messages(r) {
					_, _ = io.WriteString(w, r.URL.Query().Get("echostr")+"\n")
				}
				return messages(r)
			})
		}, ""},
		{"push redirected", "push", doctorRed, "follows no redirect", func(p *patient) {
			p.own = inPlaceOf(p.own, func(w http.ResponseWriter, r *http.Request) bool {
				if messages(r) {
					http.Redirect(w, r, "/x", http.StatusMovedPermanently)
				}
				return messages(r)
			})
		}, ""},
		{"another server", "push", doctorRed, "answers HTTP 502", func(p *patient) {
			p.own = inPlaceOf(p.own, func(w http.ResponseWriter, r *http.Request) bool {
				if messages(r) {
					w.WriteHeader(http.StatusBadGateway)
				}
				return messages(r)
			})
		}, ""},
		{"another key is running", "push", doctorRed, "another token or aes_key", func(p *patient) {
			p.part("apps/wechat/platforms/0")["aes_keys"] = []any{strings.Repeat("k", 42) + "A"}
		}, ""},
		{"pushes cut off", "push", doctorRed, "answers a push with HTTP 413", func(p *patient) {
			p.own = inPlaceOf(p.own, func(w http.ResponseWriter, r *http.Request) bool {
				signed := messages(r) && r.Method == http.MethodPost && !strings.Contains(r.URL.RawQuery, "signature=0000")
				if signed {
					w.WriteHeader(http.StatusRequestEntityTooLarge)
				}
				return signed
			})
		}, ""},
		{"forgeries go in", "push", doctorRed, "a POST with a wrong signature gets HTTP 200, want 403", func(p *patient) {
			p.own = inPlaceOf(p.own, func(w http.ResponseWriter, r *http.Request) bool {
				if messages(r) && r.Method == http.MethodPost {
					_, _ = io.WriteString(w, "success")
					return true
				}
				return false
			})
		}, ""},
		{"file with a BOM", "verify_files", doctorRed, "byte order mark", func(p *patient) {
			p.own = inPlaceOf(p.own, func(w http.ResponseWriter, r *http.Request) bool {
				if file(r) {
					_, _ = io.WriteString(w, "\ufeff"+doctorFile)
				}
				return file(r)
			})
		}, ""},
		{"file in UTF-16", "verify_files", doctorRed, "is in UTF-16", func(p *patient) {
			p.own = inPlaceOf(p.own, func(w http.ResponseWriter, r *http.Request) bool {
				if file(r) {
					_, _ = io.WriteString(w, "\xff\xfea\x00")
				}
				return file(r)
			})
		}, ""},
		{"file is empty", "verify_files", doctorRed, "is empty", func(p *patient) {
			p.own = inPlaceOf(p.own, func(_ http.ResponseWriter, r *http.Request) bool { return file(r) })
		}, ""},
		{"file is a page", "verify_files", doctorRed, "is a web page", func(p *patient) {
			p.own = inPlaceOf(p.own, func(w http.ResponseWriter, r *http.Request) bool {
				if file(r) {
					_, _ = io.WriteString(w, "<!doctype html>")
				}
				return file(r)
			})
		}, ""},
		{"file redirected", "verify_files", doctorRed, "is redirected (HTTP 308)", func(p *patient) {
			p.own = inPlaceOf(p.own, func(w http.ResponseWriter, r *http.Request) bool {
				if file(r) && r.TLS == nil {
					http.Redirect(w, r, "https://x/", http.StatusPermanentRedirect)
					return true
				}
				return false
			})
		}, ""},
		{"file missing", "verify_files", doctorRed, "HTTP 404", func(p *patient) {
			p.own = inPlaceOf(p.own, func(w http.ResponseWriter, r *http.Request) bool {
				if file(r) {
					w.WriteHeader(http.StatusNotFound)
				}
				return file(r)
			})
		}, ""},
		{"another file", "verify_files", doctorRed, "another file is served", func(p *patient) {
			p.own = inPlaceOf(p.own, func(w http.ResponseWriter, r *http.Request) bool {
				if file(r) {
					_, _ = io.WriteString(w, "x")
				}
				return file(r)
			})
		}, ""},
		{"file of another type", "verify_files", doctorYellow, "served as 'application/octet-stream'", func(p *patient) {
			p.own = inPlaceOf(p.own, func(w http.ResponseWriter, r *http.Request) bool {
				if file(r) {
					w.Header().Set("Content-Type", "application/octet-stream")
					_, _ = io.WriteString(w, doctorFile)
				}
				return file(r)
			})
		}, ""},
		{"file added at run time is not served", "verify_files", doctorRed, "HTTP 404", func(p *patient) {
			p.admin["/wechat/verify"] = `{"files":[{"name":"MP_verify_zzzzzzzzzzzzzzzz.txt"}]}`
		}, ""},
		{"OAuth back to an address", "oauth", doctorRed, "wants a name, no IP address", func(p *patient) {
			p.part("apps/http/servers/own/routes/0/handle/0/routes/2/handle/0")["origin"] = "https://203.0.113.1"
		}, ""},
		{"OAuth back to a port", "oauth", doctorRed, "port 8443", func(p *patient) {
			p.part("apps/http/servers/own/routes/0/handle/0/routes/2/handle/0")["origin"] = "https://wechat.example.com:8443"
		}, ""},
		{"OAuth back to another host", "oauth", doctorYellow, "which no site of this config serves", func(p *patient) {
			p.part("apps/http/servers/own/routes/0/handle/0/routes/2/handle/0")["origin"] = "https://other.example.com"
		}, ""},
		{"no ticket", "gateway", doctorRed, "no ticket has come yet", func(p *patient) {
			p.admin["/wechat/status"] = `{"platforms":[{"appid":"` + platformID + `","ticket":{}}]}`
		}, ""},
		{"old ticket", "gateway", doctorYellow, "the ticket is 1h0m0s old", func(p *patient) {
			p.admin["/wechat/status"] = `{"platforms":[{"appid":"` + platformID + `","ticket":{"age_seconds":3600}}]}`
		}, ""},
		{"the gateway's own finding", "gateway", doctorRed, "the ticket is overdue", func(p *patient) {
			p.admin["/wechat/status"] = `{"level":"red","findings":[{"level":"red","code":"ticket_overdue","subject":"platform ` + platformID + `","text":{"en":"the ticket is overdue","zh":"x"},"remedy":{"en":"y","zh":"z"}},{"level":"yellow","code":"a","subject":"b","text":{},"remedy":{}}],"platforms":[{"appid":"` + platformID + `","ticket":{}}]}`
		}, ""},
		{"permission set missing", "accounts", doctorYellow, "it did not grant 4 (web service: OAuth, JS-SDK, 网页服务)", func(p *patient) {
			p.admin["/wechat/authorizers/"+authorizerID] = `{"type":{"mini_program":false},"permission_sets":[{"id":1}]}`
		}, ""},
		{"revoked", "accounts", doctorYellow, "it has revoked its authorization", func(p *patient) {
			p.admin["/wechat/authorizers"] = `{"authorizers":[{"appid":"` + authorizerID + `","state":"revoked"}],"next":"x"}`
		}, ""},
		{"no token", "accounts", doctorRed, "its token cannot be had", func(p *patient) {
			p.admin["/wechat/authorizers/"+authorizerID] = `{"token":{"error":{"en":"61023","zh":"61023"}}}`
		}, ""},
		{"IP not listed", "egress_ip", doctorRed, "WeChat saw 198.51.100.7", func(p *patient) {
			p.api["/cgi-bin/getcallbackip"] = `{"errcode":61004,"errmsg":"access clientip is not registered requestIP: 198.51.100.7 rid: 64f1e2d3-0a1b2c3d-4e5f6071"}`
		}, ""},
		{"IP of the account not listed", "egress_ip", doctorRed, "errcode 40164", func(p *patient) {
			p.api["/cgi-bin/getcallbackip"] = `{"errcode":40164,"errmsg":"invalid ip 198.51.100.7, not in whitelist"}`
		}, ""},
		{"resolver down", "dns", doctorRed, "cannot be looked up here: server misbehaving", func(p *patient) { p.noDNS = true }, "tls upstreams push verify_files wechat_hosts"},
		{"clock behind", "clock", doctorRed, "behind WeChat's: pushes are refused as stale", func(p *patient) { p.now = func() time.Time { return time.Now().Add(-time.Hour) } }, "push"},
		{"admin endpoint refuses", "gateway", doctorYellow, "the admin endpoint answers HTTP 403", func(p *patient) { p.statuses = map[string]int{"/wechat/status": 403} }, ""},
		{"admin endpoint is something else", "gateway", doctorYellow, "not understood", func(p *patient) { p.admin["/wechat/status"] = "hello" }, ""},
		{"admin address misshapen", "gateway", doctorYellow, "is not the address of an admin endpoint", func(p *patient) { p.part("admin")["listen"] = "localhost:2019-2020" }, "config"},
		{"another client key is running", "egress_ip", doctorYellow, "does not take the key of the config: invalid key", func(p *patient) {
			p.api["/cgi-bin/getcallbackip"] = `{"errcode":40125,"errmsg":"invalid key"}`
			p.statuses = map[string]int{"/cgi-bin/getcallbackip": 401}
		}, ""},
		{"gateway without WeChat", "egress_ip", doctorRed, "the gateway has no answer of WeChat's: WeChat's API did not answer", func(p *patient) {
			p.api["/cgi-bin/getcallbackip"] = `{"errcode":502,"errmsg":"WeChat's API did not answer"}`
			p.statuses = map[string]int{"/cgi-bin/getcallbackip": 502}
		}, ""},
		{"OAuth on a port", "oauth", doctorYellow, "visitors come to port 8443", func(p *patient) {
			p.part("apps/http/servers/own")["listen"] = []any{":443", ":8443"}
		}, "tls push verify_files"},
		{"WeChat finds no address", "callback_check", doctorRed, "finds no address", func(p *patient) { p.api["/cgi-bin/callback/check"] = `{"dns":[],"ping":[]}` }, ""},
		{"WeChat loses pings", "callback_check", doctorYellow, "loses 50%", func(p *patient) {
			p.api["/cgi-bin/callback/check"] = `{"dns":[{"ip":"203.0.113.1"}],"ping":[{"ip":"203.0.113.1","package_loss":"50%"}]}`
		}, ""},
		{"WeChat refuses to check", "callback_check", doctorRed, "errcode 48001", func(p *patient) { p.api["/cgi-bin/callback/check"] = `{"errcode":48001,"errmsg":"api unauthorized"}` }, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := newPatient(t)
			tt.ill(p)
			report := p.examine(t)
			found := false
			for _, r := range report.of(tt.id) {
				if r.Level == tt.level && strings.Contains(r.Text.EN, tt.says) {
					found = r.Remedy != nil && r.Remedy.EN != "" && r.Remedy.ZH != "" && r.Text.ZH != ""
				}
			}
			if !found {
				t.Errorf("want %s %s %q, with a remedy, in both languages: %+v", tt.id, tt.level, tt.says, report.of(tt.id))
			}
			if tt.level == doctorRed && report.Level != doctorRed {
				t.Errorf("the whole is %s", report.Level)
			}
			for _, r := range report.Checks {
				if r.Level == doctorRed && r.ID != tt.id && !strings.Contains(tt.also, r.ID) {
					t.Errorf("%s %s is red as well: %s", r.ID, r.Subject, r.Text.EN)
				}
			}
		})
	}
}

// siteDoctor is a doctor that has read a Caddyfile with a platform and the sites, and nothing else.
func siteDoctor(t *testing.T, sites string) *doctor {
	t.Helper()
	file := filepath.Join(t.TempDir(), "Caddyfile")
	writeFile(t, file, "{\nwechat {\nplatform "+platformID+" {\nsecret s\ntoken t\naes_key "+platformKey+"\n}\n}\n}\n"+sites)
	_, adapted, _, err := adaptedApp(file, "caddyfile")
	if err != nil {
		t.Fatalf("%s: %v", sites, err)
	}
	d := newDoctor()
	d.config = doctorConfig{file: file, adapted: adapted, app: new(App)}
	if err := d.config.readHTTP(); err != nil {
		t.Fatal(err)
	}
	return d
}

// TestDoctorOnOrder: what is behind a handler that goes on with the next is reached, and of what is not no more is said than is true.
func TestDoctorOnOrder(t *testing.T) {
	t.Parallel()
	const auth, proxy = "forward_auth 127.0.0.1:9091 {\nuri /auth\n}\n", "reverse_proxy 127.0.0.1:9092"
	const nothing, unverified = "answers everything: nothing gets to it", ", and pushes get to the backend unverified"
	for _, tt := range []struct{ site, want string }{ // want: empty: nothing
		{auth + "wechat_api", ""},
		{auth + "wechat_console", ""},
		{"handle {\n" + auth + "wechat_api\n}", ""},
		{"handle /console* {\n" + auth + "wechat_console\n}", ""},
		{"route {\nrespond 103\nwechat_api\n}", ""},
		{"route {\n" + proxy + " {\nhandle_response {\nrespond 404\n}\n}\nwechat_api\n}", ""},
		{"route {\n" + proxy + " {\n@down status 502\nhandle_response @down {\nrespond 503\n}\n}\nwechat_message\n}", ""},
		{"route {\n" + proxy + "\nwechat_message\n}", "reverse_proxy, which " + nothing + unverified},
		{"route {\n" + proxy + "\nwechat_event\n}", "reverse_proxy, which " + nothing + unverified},
		{"route {\n" + proxy + "\nwechat_api\n}", "reverse_proxy, which " + nothing},
		{"route {\n" + proxy + "\nwechat_console\n}", "reverse_proxy, which " + nothing},
		{"redir https://example.com\nwechat_message", "static_response, which " + nothing},
		{"route {\nrespond 200\nwechat_event\n}", "static_response, which " + nothing},
	} {
		d := siteDoctor(t, "http://:8090 {\n"+tt.site+"\n}\n")
		said := ""
		for _, r := range d.checkConfig(t.Context()) {
			if what, ok := strings.CutPrefix(r.Text.EN, "stands behind "); ok {
				said += what
				if r.Level != doctorRed || strings.Contains(r.Text.ZH, "未经验证") != strings.Contains(what, "unverified") {
					t.Errorf("%s: %+v", tt.site, r)
				}
			}
		}
		if said != tt.want {
			t.Errorf("%s:\nsaid %q, want %q", tt.site, said, tt.want)
		}
	}
}

// TestDoctorOnNothingBehind: a wechat_message behind which nothing could answer is found, wherever it stands, and one that may have a
// backend is let be.
func TestDoctorOnNothingBehind(t *testing.T) {
	t.Parallel()
	const proxy = "reverse_proxy 127.0.0.1:9092"
	for _, tt := range []struct {
		named, site string
		alone       bool
	}{
		{"", "route {\nwechat_message\n}", true},
		{"", "route /wx/message/* {\nencode\nwechat_message\nheader -Server\n}", true},
		{"", "route /wx/message/* {\nwechat_message\n}\nroute /app/* {\n" + proxy + "\n}", true},
		{"", "route {\nwechat_event\nwechat_message\n}", true},
		{"&(m) {\nwechat_message\n" + proxy + "\n}", "route /wx/message/* {\ninvoke m\n}", true}, // Caddy drops the proxy
		{"&(m) {\nwechat_message\n" + proxy + "\n}", "route /wx/message/* {\ninvoke m\n" + proxy + "\n}", false},
		{"&(m) {\nroute {\nwechat_message\n" + proxy + "\n}\n}", "route /wx/message/* {\ninvoke m\n}", false},
		{"&(b) {\n" + proxy + "\n}", "route {\nwechat_message\ninvoke b\n}\nroute {\nwechat_message\ninvoke b\n}", false},
		{"", "wechat_message\n" + proxy, false},
		{"", "route {\nwechat_message\nphp_fastcgi 127.0.0.1:9000\n}", false},
		{"", "route {\nwechat_message\nrespond success\n}", false},
		{"", "handle_path /wx/* {\nroute /message/* {\nwechat_message\n}\n}\nroute /wx/message* {\n" + proxy + "\n}", false},
		{"", "route /wx/message/* {\nwechat_message\n}\n" + proxy, false},
		{"", "route /WX/message/* {\nwechat_message\n}\n@m path /wx/*\n" + proxy + " @m", false},
		{"", "route /wx/* {\nroute /wx/message/* {\nwechat_message\nrewrite * /in{uri}\n}\nroute /in/* {\n" + proxy + "\n}\n}", false},

		// A prefix that is taken is taken for what comes after too, and from those paths alone that have it.
		{"", "handle_path /wx/* {\nwechat_message\n}\nreverse_proxy /message/* 127.0.0.1:9092", false},
		{"", "route {\nroute /message/* {\nwechat_message\n}\nuri strip_prefix /api\nreverse_proxy /message/* 127.0.0.1:9092\n}", false},
		{"", "route {\nroute /wx/* {\nwechat_message\n}\nuri /wx/* strip_prefix /wx\nreverse_proxy /message/* 127.0.0.1:9092\n}", false},
		{"", "route /wx/* {\nuri /wx/* strip_prefix /wx\nroute /message/* {\nwechat_message\n}\n" + proxy + "\n}", false},
		{"", "rewrite /wx/* /message{uri}\nroute /message/* {\nwechat_message\nrewrite * /in\n}\nreverse_proxy /in 127.0.0.1:9092", false},
		{"", "handle_path /static/* {\nfile_server\n}\nroute /wx/message/* {\nwechat_message\n}\nreverse_proxy /shop/* 127.0.0.1:9092", true},
		{"", "handle_path /wx/* {\nroute /message/* {\nwechat_message\n}\n}\nhandle_path /app/* {\n" + proxy + "\n}", true},

		{"", "route /wx/message/* {\nwechat_message\n}\nreverse_proxy /wx/[lm]essage/* 127.0.0.1:9092", false},
		{"", "route /wx/message/* {\nwechat_message\n}\nreverse_proxy /wx/?essage/* 127.0.0.1:9092", false},
		{"", "route /wx//message/* {\nwechat_message\n}\nreverse_proxy /wx/message/* 127.0.0.1:9092", false},
		{"", "route /wx/message/* {\nwechat_message {\nmirror 127.0.0.1:9092\n}\n}", false}, // it reads along
		{"", "route {\nwechat_message\n" + strings.Repeat("route {\n", 20) + proxy + strings.Repeat("\n}", 20) + "\n}", false},
		{"", "route {\nforward_auth 127.0.0.1:9091 {\nuri /auth\n}\nroute /wx/message/* {\nwechat_message\n}\nreverse_proxy /wx/* 127.0.0.1:9092\n}", false},
		{"", "@m not path /app/*\nroute @m {\nwechat_message\n}\nreverse_proxy /wx/* 127.0.0.1:9092", false},
		{"", "@h host GW.example.com other.example.com\nroute {\nwechat_message\nreverse_proxy @h 127.0.0.1:9092\n}", false},
		{"", "route {\nwechat_message\ntimeouts {\nread_timeout 1m\n}\n}", true},

		// Of handles one alone has its turn.
		{"", "handle /wx/message/* {\nwechat_message\n}\nhandle {\n" + proxy + "\n}", true},
		{"", "handle /wx/message/* {\nwechat_message\n}\n" + proxy, false},
		{"", "handle /wx/* {\nhandle /wx/message/* {\nwechat_message\n}\nroute {\n" + proxy + "\n}\n}\nhandle {\nrespond 404\n}", false},
	} {
		d := siteDoctor(t, tt.named+"\nhttp://gw.example.com:8090 {\n"+tt.site+"\n}\nhttp://app.example.com:8090 {\n"+proxy+"\n}\n")
		alone := 0
		for _, r := range d.checkConfig(t.Context()) {
			if r.Level == doctorRed && r.Subject == "wechat_message of http://gw.example.com:8090" && strings.Contains(r.Text.EN, "get to no backend") {
				alone++
			}
		}
		if alone != map[bool]int{true: 1}[tt.alone] {
			t.Errorf("%s %s: said %d times", tt.named, tt.site, alone)
		}
	}
}

// TestDoctorOnNothingBehindInJSON: of what a Caddyfile cannot have, or only with several sites.
func TestDoctorOnNothingBehindInJSON(t *testing.T) {
	t.Parallel()
	const message, proxy = `{"handler":"wechat_message"}`, `{"handler":"reverse_proxy","upstreams":[{"dial":"127.0.0.1:9092"}]}`
	for _, tt := range []struct {
		routes string
		alone  []string
	}{
		{`{"match":[{"host":["a.example.com"]}],"handle":[` + message + `]},{"handle":[` + proxy + `]}`, nil},
		{`{"match":[{"host":["a.example.com"]}],"handle":[` + message + `],"terminal":true},{"handle":[` + proxy + `]}`, []string{"http://a.example.com:8090"}},
		{`{"match":[{"host":["a.example.com"]}],"handle":[{"handler":"subroute","routes":[{"handle":[` + message + `]},{"handle":[` + proxy + `]}]}],"terminal":true}`, nil},
		{`{"match":[{"host":["a.example.com"]}],"handle":[` + message + `],"group":"g"},{"handle":[` + proxy + `],"group":"g"}`, []string{"http://a.example.com:8090"}},
		{`{"match":[{"host":["a.example.com"]}],"handle":[` + message + `],"group":"g"},{"handle":[` + proxy + `],"group":"h"}`, nil},
		{`{"match":[{"host":["a.example.com"]}],"handle":[` + message + `]},{"match":[{"host":["b.example.com"]}],"handle":[` + proxy + `]}`, []string{"http://a.example.com:8090"}},
		{`{"match":[{"host":["a.example.com"]}],"handle":[` + message + `]},{"match":[{"host":["b.example.com"]},{"path":["/wx/*"]}],"handle":[` + proxy + `]}`, nil}, // of any host
		{`{"match":[{"host":["bücher.example.com"]}],"handle":[` + message + `]},{"match":[{"host":["xn--bcher-kva.example.com"]}],"handle":[` + proxy + `]}`, nil},
		{`{"handle":[{"handler":"wechat_message","mirrors":[]}]}`, []string{"http://:8090"}},
		{`{"handle":[{"handler":"wechat_message","mirrors":[` + proxy + `]}]}`, nil},
	} {
		var c doctorConfig
		c.adapted = []byte(`{"apps":{"http":{"servers":{"s":{"listen":[":8090"],"automatic_https":{"disable":true},"routes":[` + tt.routes + `]}}}}}`)
		if err := c.readHTTP(); err != nil || !slices.Equal(c.alone, tt.alone) {
			t.Errorf("%s: %v, %q, want %q", tt.routes, err, c.alone, tt.alone)
		}
	}
}

// TestDoctorKnowsHandlers: each handler of Caddy's is known to answer pushes, or to leave them to the next.
func TestDoctorKnowsHandlers(t *testing.T) {
	t.Parallel()
	answering := []string{"acme_server", "copy_response", "copy_response_headers", "error", "file_server", "metrics", "reverse_proxy", "static_response"}
	for _, m := range caddy.GetModules("http.handlers") {
		own := strings.HasPrefix(reflect.TypeOf(m.New()).Elem().PkgPath(), "github.com/caddyserver/caddy/")
		if name := m.ID.Name(); own && slices.Contains(passing, name) == slices.Contains(answering, name) {
			t.Errorf("%s: does it answer?", name)
		}
	}
}

// TestDoctorOnPaths: a matcher that lets no appid through is found, and nothing is said of one that cannot be judged.
func TestDoctorOnPaths(t *testing.T) {
	t.Parallel()
	const platform = "platform " + platformID + " {\nsecret s\ntoken t\naes_key " + platformKey + "\n}\n"
	const red, yellow = doctorRed, doctorYellow
	for _, tt := range []struct{ app, site, level, path string }{ // level: empty: nothing is said
		{platform, "route /wx/message {\nwechat_message\nreverse_proxy 127.0.0.1:9092\n}", yellow, "/wx/message"},
		{platform, "route /wx/message/ {\nwechat_message\n}", yellow, "/wx/message/"},
		{platform, "handle /wx/message {\nwechat_message\n}", yellow, "/wx/message"},
		{platform, "handle_path /wx/message {\nwechat_message\n}", yellow, "/wx/message"},
		{platform, "wechat_message /wx/message", yellow, "/wx/message"},
		{platform, "@m path /a /b\nroute @m {\nwechat_message\n}", yellow, "/a"},
		{platform, "@m {\nmethod POST\npath /a\n}\nroute @m {\nwechat_message\n}", yellow, "/a"},
		{platform, "route /wx/* {\nroute /wx/message {\nwechat_message\n}\n}", yellow, "/wx/message"},
		{platform, "route /wx/message/" + platformID + " {\nwechat_message\n}", yellow, "/wx/message/" + platformID},
		{platform, "timeouts {\nread_timeout 1m\n}\nroute /wx/message {\nwechat_message\n}", yellow, "/wx/message"},
		{platform, "rewrite /a /b\nroute /wx/message {\nencode\nheader -Server\nwechat_message\n}", yellow, "/wx/message"},
		{platform, "wechat_message /wx/message\nwechat_message /shop " + accountID, yellow, "/wx/message"},
		{"", "route /wx/message {\nwechat_message\n}", red, "/wx/message"},
		{platform, "handle_path /wx/* {\nroute /message {\nwechat_message\n}\n}", yellow, "/wx/message"},
		{platform, "route /wx/* {\nuri strip_prefix wx/\nwechat_message /message\n}", yellow, "/wx/message"},
		{platform, "bind 127.0.0.1 ::1\nwechat_message /wx/message", yellow, "/wx/message"}, // said once

		{platform, "wechat_message", "", ""},
		{platform, "route /wx/message/* {\nwechat_message\n}", "", ""},
		{platform, "route /wx/message* {\nwechat_message\n}", "", ""},
		{platform, "route /wx/message {\nwechat_message " + accountID + "\n}", "", ""},
		{platform, "route /wx/message/" + accountID + " {\nwechat_message\n}", "", ""},
		{platform, "route /wx/message/{query.appid} {\nwechat_message\n}", "", ""},
		{platform, "@m path /a /a/*\nroute @m {\nwechat_message\n}", "", ""},
		{platform, "@m path_regexp ^/wx/message/wx[0-9a-f]{16}$\nroute @m {\nwechat_message\n}", "", ""},
		{platform, "@m expression `path('/a') || path('/a/*')`\nroute @m {\nwechat_message\n}", "", ""},
		{platform, "@m not path /a\nroute @m {\nwechat_message\n}", "", ""},
		{platform, "route /wx/message {\nrewrite * /{query.appid}\nwechat_message\n}", "", ""},
		{platform, "route /wx/message {\nhandle {\nuri path_regexp ^/(.*)$ /$1/{query.appid}\n}\nwechat_message\n}", "", ""},
		{platform, "wechat_message /wx/message\nwechat_message /wx/message/*", "", ""},
		{platform, "route /wx/message {\nrespond 200\nwechat_message\n}", "", ""}, // of which something else is said
	} {
		file := filepath.Join(t.TempDir(), "Caddyfile")
		writeFile(t, file, "{\nwechat {\n"+tt.app+"}\n}\nhttps://wechat.example.com {\n"+tt.site+"\n}\n")
		app, adapted, _, err := adaptedApp(file, "caddyfile")
		if err != nil {
			t.Fatalf("%s: %v", tt.site, err)
		}
		d := newDoctor()
		d.config = doctorConfig{file: file, adapted: adapted, app: app}
		if err := d.config.readHTTP(); err != nil {
			t.Fatal(err)
		}
		level, path := "", ""
		for _, r := range d.checkConfig(t.Context()) {
			if _, rest, ok := strings.Cut(r.Text.EN, "only what comes to "); ok {
				level, path = level+r.Level, path+strings.Fields(rest)[0]
				if r.Subject != "wechat_message of https://wechat.example.com" || !strings.Contains(r.Remedy.EN, "wechat.example.com"+strings.TrimSuffix(tt.path, "/")+"/$APPID$") {
					t.Errorf("%s: %+v", tt.site, r)
				}
			}
		}
		if level != tt.level || path != tt.path {
			t.Errorf("%s:\n%s of %s, want %s of %s", tt.site, level, path, tt.level, tt.path)
		}
	}
}

// TestDoctorOnSwappedSecrets: an AppSecret in the place of the token, and the token in its, is worth a word; two values of either form are not.
func TestDoctorOnSwappedSecrets(t *testing.T) {
	t.Setenv("SWAPPED_SECRET", "0123456789abcdef0123456789abcdef")
	for _, tt := range []struct {
		secret, token string
		want          bool
	}{
		{"mytoken", "0123456789abcdef0123456789abcdef", true},
		{"mytoken", "{env.SWAPPED_SECRET}", true},
		{"{env.SWAPPED_SECRET}", "mytoken", false},
		{"fedcba9876543210fedcba9876543210", "{env.SWAPPED_SECRET}", false},
		{"secret-of-a-test", "mytoken", false},
		{"{env.SWAPPED_NOTHING}", "{env.SWAPPED_SECRET}", false},
	} {
		for _, part := range []string{"apps/wechat/platforms/0", "apps/wechat/accounts/0"} {
			p := newPatient(t)
			p.part(part)["secret"], p.part(part)["tokens"] = tt.secret, []any{tt.token}
			p.offline = true
			found := slices.ContainsFunc(p.examine(t).of("placeholders"), func(r doctorResult) bool {
				speaksBoth(t, r.Subject, r.Text)
				return r.Level == doctorYellow && strings.Contains(r.Text.EN, "each other's place") && r.Subject != "" && !strings.Contains(r.Text.EN+r.Text.ZH, "0123456789")
			})
			if found != tt.want {
				t.Errorf("%s: %+v: found: %t", part, tt, found)
			}
		}
	}
}

// TestDoctorOnOldSecrets: one that is left out is worth a word, and is no reason for anything to be red.
func TestDoctorOnOldSecrets(t *testing.T) {
	t.Setenv("OLD_TOKEN", "old \n")
	p := newPatient(t)
	p.part("apps/wechat/platforms/0")["tokens"] = append(p.part("apps/wechat/platforms/0")["tokens"].([]any), "{env.OLD_TOKEN}")
	report := p.examine(t)
	if report.Level != doctorYellow {
		t.Errorf("level is %s: %+v", report.Level, report.Checks)
	}
	if !slices.ContainsFunc(report.of("placeholders"), func(r doctorResult) bool {
		return r.Level == doctorYellow && strings.Contains(r.Text.EN, "token: {env.OLD_TOKEN} cannot be right and is left out")
	}) {
		t.Errorf("%+v", report.of("placeholders"))
	}
}

// TestDoctorOnShortKeys: a key that can be guessed is worth a word that does not show it.
func TestDoctorOnShortKeys(t *testing.T) {
	t.Setenv("SHORT_CLIENT_KEY", "hunter2")
	for key, level := range map[string]string{"{env.SHORT_CLIENT_KEY}": doctorYellow, "密码密码密码": doctorYellow, "0123456789abcdef": doctorGreen} {
		p := newPatient(t)
		p.part("apps/wechat/clients/0")["keys"] = []any{key}
		report := p.examine(t)
		said := slices.ContainsFunc(report.of("config"), func(r doctorResult) bool {
			return r.Level == doctorYellow && strings.HasPrefix(r.Subject, "client ") && strings.Contains(r.Text.EN, "could guess")
		})
		text, err := json.Marshal(report)
		if err != nil {
			t.Fatal(err)
		}
		if said != (level == doctorYellow) || bytes.Contains(text, []byte("hunter2")) || bytes.Contains(text, []byte("密码密码")) {
			t.Errorf("%s: %+v", key, report.of("config"))
		}
	}
}

// TestDoctorOnLineBreaks: one at the end of a file, as echo writes it, does not count, and the remedy for more of them says so.
func TestDoctorOnLineBreaks(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ content, level string }{{"secret\n", doctorGreen}, {"secret\r\n", doctorGreen}, {"secret\n\n", doctorRed}} {
		p := newPatient(t)
		file := filepath.Join(t.TempDir(), "secret")
		writeFile(t, file, tt.content)
		p.part("apps/wechat/platforms/0")["secret"] = "{file." + file + "}"
		report := p.examine(t)
		results := append(report.of("placeholders"), report.of("config")...)
		if report.Level != tt.level && (tt.level == doctorRed || report.Level == doctorRed) {
			t.Errorf("%q: %s: %+v", tt.content, report.Level, results)
		}
		said := 0
		for _, r := range results {
			if r.Level != doctorRed || !strings.Contains(r.Text.EN, "a line break around it") {
				continue
			}
			if said++; !strings.Contains(r.Remedy.EN, "one line break at the end of a file does not count") {
				t.Errorf("%q: remedy: %s", tt.content, r.Remedy.EN)
			}
		}
		if (said == 1) != (tt.level == doctorRed) || said > 1 {
			t.Errorf("%q: said %d times: %+v", tt.content, said, results)
		}
	}
}

// TestDoctorLeavesOut: what cannot be looked at is said, with the reason, and is no fault.
func TestDoctorLeavesOut(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		ill  func(p *patient)
		says map[string]string
	}{
		{"no gateway", func(p *patient) { p.admin, p.api = nil, nil }, map[string]string{
			"gateway": "no gateway is running", "accounts": "no gateway is running", "egress_ip": "does not answer", "callback_check": "does not answer",
		}},
		{"an older gateway", func(p *patient) { p.admin = map[string]string{} }, map[string]string{"gateway": "the running gateway has no /wechat/status", "accounts": "has no /wechat/authorizers"}},
		{"no client", func(p *patient) { p.part("apps/wechat")["clients"] = []any{} }, map[string]string{"egress_ip": "no client of the config with a key"}},
		{"no API", func(p *patient) { delete(p.part("apps/http/servers"), "api") }, map[string]string{"egress_ip": "no wechat_api on plain http"}},
		{"no sites", func(p *patient) { delete(p.part("apps"), "http") }, map[string]string{
			"dns": "no site", "tls": "no HTTPS site", "push": "no wechat_event", "verify_files": "no verification files", "oauth": "neither", "upstreams": "no reverse_proxy",
		}},
		{"admin off", func(p *patient) { p.config["admin"] = map[string]any{"disabled": true} }, map[string]string{"gateway": "the config has admin off", "accounts": "the config has admin off"}},
		{"client may not", func(p *patient) {
			p.api["/cgi-bin/getcallbackip"] = `{"errcode":48001,"errmsg":"client crm may not call this path"}`
			p.statuses = map[string]int{"/cgi-bin/getcallbackip": 403}
		}, map[string]string{"egress_ip": "wechat_api answers HTTP 403: client crm may not call this path"}},
		{"any host", func(p *patient) {
			routes := p.part("apps/http/servers/own")["routes"].([]any)
			delete(routes[0].(map[string]any), "match")
			delete(p.part("apps/http/servers"), "plain")
		}, map[string]string{"dns": "no site with a public name", "oauth": "the host that the visitor came to"}},
		{"offline", func(p *patient) { p.offline = true; p.own = http.NotFoundHandler() }, map[string]string{"dns": "--offline", "push": "--offline", "wechat_hosts": "--offline", "gateway": "--offline"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := newPatient(t)
			tt.ill(p)
			report := p.examine(t)
			for id, says := range tt.says {
				for _, r := range report.of(id) {
					if tt.name == "admin off" && r.Subject != "" {
						t.Errorf("%s is about an endpoint that the config does not have: %s", id, r.Subject)
					}
					if r.Level != doctorSkipped || !strings.Contains(r.Text.EN, says) {
						t.Errorf("%s: %s %q, want skipped %q", id, r.Level, r.Text.EN, says)
					}
				}
			}
			if report.Level != doctorGreen {
				t.Errorf("the whole is %s: %+v", report.Level, report.Checks)
			}
		})
	}
}

// TestDoctorHasAnEnd: whatever hangs, a run ends.
func TestDoctorHasAnEnd(t *testing.T) {
	t.Parallel()
	d := newDoctor()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	d.resolve = func(ctx context.Context, _ string) ([]netip.Addr, error) { <-ctx.Done(); return nil, ctx.Err() }
	d.dial = func(ctx context.Context, _, _ string) (net.Conn, error) { <-ctx.Done(); return nil, ctx.Err() }
	d.admin = "localhost:2019"
	d.config = doctorConfig{
		app: &App{}, origins: []*url.URL{{Scheme: "https", Host: "api.example.com"}}, upstreams: []string{"a:1", "b:1"},
		sites: []doctorSite{{host: "wechat.example.com", port: 443, secure: true}},
	}
	if report := d.examine(ctx, false); len(report.Checks) < len(doctorChecks) {
		t.Errorf("%d checks", len(report.Checks))
	}
	for range doctorAtOnce {
		d.places <- struct{}{}
	}
	for _, r := range doctorEach(d, ctx, []int{1}, func(context.Context, int) doctorResult { return greenOf("", "", "") }) {
		if r.Level != doctorSkipped {
			t.Errorf("without time: %s", r.Level)
		}
	}
}

// TestDoctorCommand: exit codes, and what is printed.
func TestDoctorCommand(t *testing.T) {
	config := commandConfig(t) // whose secrets do not resolve
	for _, tt := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"--config", config, "--offline"}, exitFailed, "red     placeholders platform " + platformID + ": secret: {env.NO_SUCH_SECRET} resolves to nothing"},
		{[]string{"--config", config, "--offline", "--json"}, exitFailed, `{"level":"red"`},
		{[]string{"--config", "/nonexistent/Caddyfile"}, 1, ""},
		{[]string{"x"}, 1, ""},
	} {
		provisioning.Lock()
		out, _, code, err := runCommand(t, doctorCommand(), nil, tt.args...)
		provisioning.Unlock()
		if code != tt.code || !strings.Contains(out, tt.says) {
			t.Errorf("%q: %d %v\n%s", tt.args, code, err, out)
		}
		var report doctorReport
		if len(tt.args) == 4 && (json.Unmarshal([]byte(out), &report) != nil || len(report.Checks) < len(doctorChecks)) {
			t.Errorf("--json: %s", out)
		}
	}
}

// TestDoctorOnOtherSites: what else the same Caddy serves is no illness: a backend on another of its ports, a host of no concern to
// WeChat, handlers in a named route.
func TestDoctorOnOtherSites(t *testing.T) {
	t.Setenv("DOCTOR_ORIGIN", "https://wechat.example.com")
	p := newPatient(t)
	p.part("apps/http/servers")["backend"] = map[string]any{"listen": []any{"127.0.0.1:8081"}, "routes": []any{map[string]any{
		"match": []any{map[string]any{"host": []any{"grafana.internal"}}}, "handle": []any{map[string]any{"handler": "wechat_api"}},
	}}}
	p.ports["127.0.0.1:8081"] = true
	p.part("apps/http/servers/own/routes/0/handle/0/routes/3/handle/1/upstreams/0")["dial"] = "127.0.0.1:8081"
	p.part("apps/http/servers/own/routes/0/handle/0/routes/2/handle/0")["origin"] = "{env.DOCTOR_ORIGIN}"
	own := p.part("apps/http/servers/own")
	event := p.part("apps/http/servers/own/routes/0/handle/0/routes/1")
	own["named_routes"] = map[string]any{"events": map[string]any{"handle": event["handle"]}}
	event["handle"] = []any{map[string]any{"handler": "invoke", "name": "events"}}
	report := p.examine(t)
	for _, r := range report.Checks {
		if r.Level != doctorGreen && r.ID != "placeholders" {
			t.Errorf("%s %s: %s: %s", r.ID, r.Subject, r.Level, r.Text.EN)
		}
	}
	if n := len(report.of("push")); n != 5 {
		t.Errorf("%d push URLs were looked at, want 5: %+v", n, report.of("push"))
	}
}

// TestDoctorOnClocksOfOthers: what answers in WeChat's place tells nothing of WeChat's clock.
func TestDoctorOnClocksOfOthers(t *testing.T) {
	t.Parallel()
	p := newPatient(t)
	p.wechat = func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "<html>log in</html>") }
	if r := p.examine(t).of("clock"); len(r) != 1 || r[0].Level != doctorSkipped {
		t.Errorf("%+v", r)
	}
}

// TestDoctorOnTheWayToWeChat: what to do about WeChat's hosts depends on how they fail.
func TestDoctorOnTheWayToWeChat(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		ill    func(p *patient)
		remedy string
	}{
		"resolver":   {func(p *patient) { p.noDNS = true }, "/etc/resolv.conf"},
		"TLS opened": {func(p *patient) { p.noRoots = true }, "whether something in between opens TLS"},
		"firewall":   {func(p *patient) { p.addresses["api.example.com"] = "203.0.113.9" }, "look at the firewall"},
		"proxy": {func(p *patient) {
			p.part("apps/wechat")["proxy"] = "http://10.0.0.9:3128"
		}, "look at the egress proxy"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPatient(t)
			tt.ill(p)
			for _, r := range p.examine(t).of("wechat_hosts") {
				if r.Level != doctorRed || !strings.Contains(r.Remedy.EN, tt.remedy) {
					t.Errorf("%s %s: %s", r.Level, r.Text.EN, r.Remedy.EN)
				}
			}
		})
	}
}

// TestDoctorOnAPathThatSomeMayCall: if one client may not make a call, another one that may is asked for.
func TestDoctorOnAPathThatSomeMayCall(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer second" {
			w.WriteHeader(http.StatusForbidden)
			_, _ = io.WriteString(w, `{"errcode":48001,"errmsg":"may not"}`)
			return
		}
		_, _ = io.WriteString(w, `{"ip_list":["1.1.1.1"]}`)
	}))
	t.Cleanup(server.Close)
	d := newDoctor()
	d.dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, server.Listener.Addr().String())
	}
	d.config = doctorConfig{
		sites:   []doctorSite{{host: "127.0.0.1", port: 8090, handlers: []siteHandler{{name: "wechat_api"}}}},
		clients: []apiClient{{"first", []string{"*"}}, {"second", []string{"*"}}},
	}
	var said struct {
		List []string `json:"ip_list"`
	}
	if err := d.callThrough(t.Context(), accountID, http.MethodGet, probePath, "", &said); err != nil || len(said.List) != 1 {
		t.Errorf("%v %v", said, err)
	}
}

// TestDoctorDialsAsWeChat: over IPv4 first, and an address that swallows what is sent to it leaves time for the next.
func TestDoctorDialsAsWeChat(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := newDoctor()
		d.resolve = func(context.Context, string) ([]netip.Addr, error) {
			return []netip.Addr{netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("203.0.113.2")}, nil
		}
		var tried []string
		d.dial = func(ctx context.Context, _, address string) (net.Conn, error) {
			if tried = append(tried, address); address == "203.0.113.2:443" {
				here, there := net.Pipe()
				_ = there.Close()
				return here, nil
			}
			<-ctx.Done()
			return nil, ctx.Err()
		}
		ctx, cancel := context.WithTimeout(t.Context(), doctorRequestTimeout)
		defer cancel()
		conn, err := d.dialHost(ctx, "tcp", "wechat.example.com:443")
		if err != nil || !slices.Equal(tried, []string{"203.0.113.1:443", "203.0.113.2:443"}) {
			t.Fatalf("%v %v", tried, err)
		}
		_ = conn.Close()
	})
}

// TestDoctorPushesByWeChatsClock: as WeChat would, so that a clock that is off is said to be, and not that pushes are refused.
func TestDoctorPushesByWeChatsClock(t *testing.T) {
	t.Parallel()
	for _, off := range []time.Duration{20 * time.Minute, -20 * time.Minute} {
		p := newPatient(t)
		p.now = func() time.Time { return time.Now().Add(off) }
		report := p.examine(t)
		for _, r := range append(report.of("push"), report.of("clock")...) {
			if want := map[string]string{"push": doctorGreen, "clock": doctorRed}[r.ID]; r.Level != want {
				t.Errorf("%v: %s %s: %s, want %s: %s", off, r.ID, r.Subject, r.Level, want, r.Text.EN)
			}
		}
	}
}

// TestDoctorOnAddressesOfIPv6: they are bracketed in a URL, also without a port.
func TestDoctorOnAddressesOfIPv6(t *testing.T) {
	t.Parallel()
	for port, want := range map[uint]string{80: "http://[::1]", 8090: "http://[::1]:8090"} {
		if got := (&doctorSite{host: "::1", port: port}).origin(); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

// TestDoctorOnUpstreams: a port alone is on this machine, and a name with several addresses takes connections if one of them does.
func TestDoctorOnUpstreams(t *testing.T) {
	t.Parallel()
	d := newDoctor()
	d.interfaces = func() ([]net.Addr, error) { return nil, nil }
	d.resolve = func(_ context.Context, host string) ([]netip.Addr, error) {
		if host != "localhost" {
			return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
		}
		return []netip.Addr{netip.IPv6Loopback(), netip.MustParseAddr("127.0.0.1")}, nil
	}
	d.dial = func(_ context.Context, network, address string) (net.Conn, error) {
		if address != "127.0.0.1:9000" && address != "[::1]:9001" {
			return nil, &net.OpError{Op: "dial", Net: network, Err: syscall.ECONNREFUSED}
		}
		here, there := net.Pipe()
		_ = there.Close()
		return here, nil
	}
	d.config = doctorConfig{entrances: []uint{8080}, upstreams: []string{":9000", "localhost:9000", "localhost:9001", ":9002", ":8080", "0.0.0.0:8080"}}
	var levels []string
	for _, r := range d.checkUpstreams(t.Context()) {
		levels = append(levels, r.Level)
	}
	if want := []string{doctorGreen, doctorGreen, doctorGreen, doctorYellow, doctorRed, doctorRed}; !slices.Equal(levels, want) {
		t.Errorf("%v, want %v", levels, want)
	}
}

// TestDoctorOnPushURLs: what handle_path takes from a path is in the URL that WeChat pushes to, and what runs itself ends.
func TestDoctorOnPushURLs(t *testing.T) {
	t.Parallel()
	p := newPatient(t)
	own := p.part("apps/http/servers/own")
	own["listen"] = []any{"203.0.113.1:443", "203.0.113.7:443"} // one site all the same
	event := p.part("apps/http/servers/own/routes/0/handle/0/routes/1")
	again := map[string]any{"handler": "invoke", "name": "events"}
	own["named_routes"] = map[string]any{"events": map[string]any{"handle": append(event["handle"].([]any), again, again, again)}}
	event["match"] = []any{map[string]any{"path": []any{"/wx/*"}}}
	event["handle"] = []any{map[string]any{"handler": "subroute", "routes": []any{
		map[string]any{"handle": []any{map[string]any{"handler": "rewrite", "strip_path_prefix": "/wx"}}},
		map[string]any{"match": []any{map[string]any{"path": []any{"/event"}}}, "handle": []any{again}},
	}}}
	report := p.examine(t)
	if n := len(report.of("push")); n != 5 {
		t.Errorf("%d push URLs were looked at, want 5: %+v", n, report.of("push"))
	}
	for _, r := range report.of("push") {
		if r.Level != doctorGreen {
			t.Errorf("%s: %s: %s", r.Subject, r.Level, r.Text.EN)
		}
	}
}
