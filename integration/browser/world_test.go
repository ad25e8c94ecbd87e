package browser_test

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"html/template"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/chromedp"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

const (
	// accountHost is the authorised account's own host, and foreignHost one that nobody has listed.
	accountHost = integration.AuthorizerID + "." + integration.Pages
	foreignHost = "foreign.example.net"
	pictureHost = "wx.qlogo.cn"

	startLimit = time.Minute // for the browser and the authorization before the first test
)

// world is a gateway with everything around it, and a browser that reaches nothing else.
type world struct {
	*integration.World
	chromium context.Context // of the browser, whose tabs are made from it
	outside  *httptest.Server
	web      string   // the origin of the web application, behind the gateway
	more     []string // further origins that a browser may ask
}

// more is what the tests want beside what Caddyfile.example has.
const more = `
	wechat_authorize /wx/then {
		then {$WECHAT_WEB}/accounts?from=gateway
	}
	wechat_oauth /wx/strict {
		require_start
		func verify {$WECHAT_WEB}/webVerify/
	}
	handle_path /console* {
		basic_auth {
			bob $2a$04$U/1vaQzI3l01TcGT/pCCoeNkgx47lC9qmgfY50mqzd46GXHMurjRy
		}
		wechat_console
	}
`

func newWorld(t *testing.T) *world {
	t.Helper()
	example, err := os.ReadFile("../../Caddyfile.example")
	if err != nil {
		t.Fatal(err)
	}
	const before = "\twechat_authorize /wx/authorize "
	config := strings.Replace(string(example), before, more+before, 1)
	if config == string(example) {
		t.Fatal("Caddyfile.example has no wechat_authorize of the form that is looked for")
	}
	file := filepath.Join(t.TempDir(), "Caddyfile")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	https, err := integration.FreeAddr("")
	if err != nil {
		t.Fatal(err)
	}
	w := &world{web: "https://" + accountHost + ":" + integration.Port(https)}
	w.World = &integration.World{
		Binary: binary, Dir: t.TempDir(), Caddyfile: file, TLS: true,
		Ports:   map[string]string{"https": https},
		Backend: &integration.Backend{Answer: w.serveWeb},
		// Level debug is where Caddy logs requests with their headers and URIs.
		Env: []string{"WECHAT_LOG_LEVEL=DEBUG", "WECHAT_WEB=" + w.web},
	}
	w.Config.Ask = true
	w.Config.Faults = wxsim.Faults{Polite: true}
	w.outside = httptest.NewTLSServer(http.HandlerFunc(w.serveOutside))
	t.Cleanup(w.outside.Close)
	t.Cleanup(func() { w.end(t) })
	if err := w.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if w.HTTPS != https {
		t.Fatalf("the address %s was taken in between", https)
	}
	w.startBrowser(t)
	ctx, cancel := context.WithTimeout(t.Context(), startLimit)
	defer cancel()
	if result, err := w.WeChat.PushTicket(ctx, integration.PlatformID); err != nil || !result.OK() {
		t.Fatalf("ticket: %s %v", result.Wrong, err)
	}
	return w
}

// end closes the world and looks at what must hold after any test.
func (w *world) end(t *testing.T) {
	t.Helper()
	if err := w.Close(); err != nil {
		t.Errorf("closing: %v", err)
	}
	if w.Gateway == nil {
		return
	}
	for _, e := range w.WeChat.Journal().Violations() {
		t.Errorf("WeChat saw %s %s?%s: %v", e.Method, e.Path, e.Query, e.Violations)
	}
	log := w.Gateway.Log()
	for _, s := range w.Secrets() {
		if i := strings.Index(log, s); i >= 0 {
			t.Errorf("a secret of %d characters is in the gateway's log: …%s<HERE>…", len(s), log[max(0, i-120):i])
		}
	}
	for report := range strings.SplitSeq(log, "==================\n") {
		// Caddy has races of its own, and our main calls it.
		frames := strings.ReplaceAll(report, "caddy-wechat/cmd/caddy", "")
		if strings.HasPrefix(report, "WARNING: DATA RACE") && strings.Contains(frames, "github.com/caddy-wechat/caddy-wechat/") {
			t.Errorf("the gateway process has a data race:\n%s", report)
		}
	}
	if t.Failed() {
		t.Logf("gateway's log:\n%s", log)
	}
}

// startBrowser starts the one browser process. It knows no host but ours, and trusts the CAs of the gateway, of WeChat
// and of the world outside by their keys alone.
func (w *world) startBrowser(t *testing.T) {
	t.Helper()
	program, err := findChromium()
	if err != nil {
		t.Fatal(err)
	}
	intermediate, err := os.ReadFile(filepath.Join(w.Dir, "data", "caddy", "pki", "authorities", "local", "intermediate.crt"))
	if err != nil {
		t.Fatal(err)
	}
	keys := []string{keyHash(t, intermediate), keyHash(t, w.WeChatCA), hashOf(w.outside.Certificate())}
	outside := w.outside.Listener.Addr().String()
	options := append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(program),
		chromedp.DisableGPU,
		chromedp.Flag("hide-scrollbars", true),
		// A page that is kept for whoever comes back to it answers without an event that one could wait for.
		chromedp.Flag("disable-features", "Translate,BackForwardCache"),
		chromedp.Flag("ignore-certificate-errors-spki-list", strings.Join(keys, ",")),
		chromedp.Flag("host-resolver-rules", strings.Join([]string{
			"MAP localhost 127.0.0.1", "MAP *." + integration.Pages + " 127.0.0.1",
			"MAP " + pictureHost + " " + outside, "MAP " + foreignHost + " " + outside,
			"EXCLUDE 127.0.0.1", "MAP * ~NOTFOUND",
		}, ", ")),
	)
	allocator, cancel := chromedp.NewExecAllocator(context.WithoutCancel(t.Context()), options...)
	t.Cleanup(cancel)
	browser, cancel := chromedp.NewContext(allocator)
	t.Cleanup(cancel)
	began := make(chan error, 1)
	go func() { began <- chromedp.Do(browser) }()
	select {
	case err := <-began:
		if err != nil {
			t.Fatalf("%s does not start: %v", program, err)
		}
	case <-time.After(startLimit):
		t.Fatalf("%s does not start within %v", program, startLimit)
	}
	w.chromium = browser
}

// findChromium finds the browser: what Debian calls it, or others.
func findChromium() (string, error) {
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome", "google-chrome-stable"} {
		if program, err := exec.LookPath(name); err == nil {
			return program, nil
		}
	}
	return "", errors.New("no Chromium on this machine: sh scripts/install-test-needs.sh installs it")
}

func keyHash(t *testing.T, certificate []byte) string {
	t.Helper()
	block, _ := pem.Decode(certificate)
	if block == nil {
		t.Fatal("the certificate is not PEM")
	}
	parsed, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return hashOf(parsed)
}

func hashOf(c *x509.Certificate) string {
	sum := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	return base64.StdEncoding.EncodeToString(sum[:])
}

var webPage = template.Must(template.New("web").Parse(`<!doctype html>
<html lang="zh-CN">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>The web application</title>
<link rel="icon" href="data:,">
</head>
<body>
<h1>The web application</h1>
<p id="landed">{{.Path}}</p>
{{- if .Menu}}
<p><a id="menu" href="{{.Menu}}">menu</a></p>
{{- end}}
{{- if .Script}}
<script type="module">
window.wx = { config: c => { window.signed = c } };
try {
{{.Script}}
} catch (e) {
	window.failed = String(e);
}
</script>
{{- end}}
</body>
</html>
`))

type webData struct {
	Path, Menu string
	Script     template.JS
}

// serveWeb is the web application: whatever it is asked for, it has a page, and /sdk uses WeChat's JS-SDK.
func (w *world) serveWeb(rw http.ResponseWriter, r *http.Request) {
	data := webData{Path: r.URL.Path, Menu: r.URL.Query().Get("menu")}
	if r.URL.Path == "/sdk" {
		data.Script = w.signingScript()
	}
	rw.Header().Set("Content-Type", "text/html; charset=utf-8")
	_ = webPage.Execute(rw, data) // the browser may be gone
}

// serveOutside is the rest of the world: the host with the accounts' pictures, and somebody else's site.
func (w *world) serveOutside(rw http.ResponseWriter, r *http.Request) {
	if !strings.HasPrefix(r.Host, pictureHost) {
		w.serveWeb(rw, r)
		return
	}
	picture := image.NewRGBA(image.Rect(0, 0, 96, 96))
	draw.Draw(picture, picture.Bounds(), image.NewUniform(color.RGBA{0x10, 0x60, 0xc0, 0xff}), image.Point{}, draw.Src)
	rw.Header().Set("Content-Type", "image/png")
	_ = png.Encode(rw, picture)
}

// signingScript is what the README has pages do, with this gateway's address.
func (w *world) signingScript() template.JS {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		return template.JS(fmt.Sprintf("throw new Error(%q)", err)) //nolint:gosec // our own words
	}
	_, script, _ := strings.Cut(string(readme), "```js\n")
	script, _, _ = strings.Cut(script, "```")
	return template.JS(strings.Replace(script, "https://wechat.example.com", w.URL(""), 1)) //nolint:gosec // the README's
}
