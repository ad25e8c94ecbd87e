package sdk_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// wechatHost is what every SDK calls when nobody tells it otherwise.
const wechatHost = "api.weixin.qq.com"

// newWorld starts a gateway process that has a plain account and an authorised one, and serves wechat_api on a plain
// listener and as WeChat's own host over TLS.
func newWorld(t *testing.T) *integration.World {
	t.Helper()
	example, err := os.ReadFile("../../Caddyfile.example")
	if err != nil {
		t.Fatal(err)
	}
	site := fence.FindStringSubmatch(document(t, "sdk.md")["In the place of WeChat's host"])
	if site == nil {
		t.Fatal("docs/sdk.md does not show the site that stands in for WeChat's host")
	}
	caddyfile := filepath.Join(t.TempDir(), "Caddyfile")
	if err := os.WriteFile(caddyfile, append(example, site[2]...), 0o600); err != nil {
		t.Fatal(err)
	}
	w := &integration.World{
		Binary: binary, Dir: t.TempDir(), Caddyfile: caddyfile,
		Env: []string{"WECHAT_LOG_LEVEL=DEBUG"}, // where Caddy logs requests with their headers and URIs
	}
	w.Config.Faults = wxsim.Faults{Polite: true} // a lost answer is an error to an SDK, as it is without a gateway
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Errorf("closing: %v", err)
		}
		if w.Gateway == nil {
			return
		}
		log := w.Gateway.Log()
		for _, s := range w.Secrets() {
			if strings.Contains(log, s) {
				t.Errorf("a secret of %d characters is in the gateway's log", len(s))
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
	})
	if err := w.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if result, err := w.WeChat.PushTicket(ctx, integration.PlatformID); err != nil || !result.OK() {
		t.Fatalf("ticket: %s %v", result.Wrong, err)
	}
	if a, err := w.WeChat.Authorize(ctx, integration.PlatformID, integration.AuthorizerID); err != nil || !a.Push.OK() {
		t.Fatalf("authorized: %s %v", a.Push.Wrong, err)
	}
	await(ctx, t, w)
	return w
}

// await waits until the authorizer's tokens are there and both ways to the gateway answer.
func await(ctx context.Context, t *testing.T, w *integration.World) {
	t.Helper()
	client, err := w.Client()
	if err != nil {
		t.Fatal(err)
	}
	user := w.WeChat.NewUser(integration.AuthorizerID)
	path := "/" + integration.AuthorizerID + "/cgi-bin/user/info?openid=" + user.OpenID
	for _, address := range []string{w.APIURL(path), "https://" + wechatHost + path} {
		for {
			body, err := get(ctx, client, address, w)
			if err == nil && strings.Contains(body, user.OpenID) {
				break
			}
			select {
			case <-ctx.Done():
				t.Fatalf("%s: %s %v", address, body, err)
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
}

func get(ctx context.Context, client *http.Client, address string, w *integration.World) (string, error) {
	if !strings.HasPrefix(address, "https:") {
		client = http.DefaultClient
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return "", err
	}
	req.Header.Set("Authorization", "Bearer "+w.ClientKey)
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}

// tap remembers every byte that the gateway sent to an SDK.
type tap struct {
	mu   sync.Mutex
	seen bytes.Buffer
}

func (p *tap) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.seen.Write(b)
}

func (p *tap) String() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.seen.String()
}

// listen gives an address that leads to another and remembers what comes back from there.
func (p *tap) listen(t *testing.T, to string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			app, err := l.Accept()
			if err != nil {
				return
			}
			gateway, err := net.Dial("tcp", to)
			if err != nil {
				_ = app.Close()
				continue
			}
			go func() {
				_, _ = io.Copy(gateway, app)
				_ = gateway.Close()
			}()
			go func() {
				_, _ = io.Copy(app, io.TeeReader(gateway, p))
				_ = app.Close()
			}()
		}
	}()
	return l.Addr().String()
}

// tapped remembers what comes back through a transport: for TLS, where the wire shows nothing.
type tapped struct {
	http.RoundTripper
	tap *tap
}

func (r tapped) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := r.RoundTripper.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	dump, err := httputil.DumpResponse(resp, true)
	if err != nil {
		return nil, err
	}
	_, _ = r.tap.Write(dump)
	return resp, nil
}

// unleaked fails for each secret of the gateway's that an SDK was sent. The client's key is the app's own, and a
// jsapi_ticket is what it asks for.
func (p *tap) unleaked(t *testing.T, w *integration.World) {
	t.Helper()
	seen := p.String()
	tickets := w.WeChat.Issued(wxsim.KindJSTicket)
	for _, s := range w.Secrets() {
		if s != w.ClientKey && !slices.Contains(tickets, s) && strings.Contains(seen, s) {
			t.Errorf("a secret of %d characters left the gateway", len(s))
		}
	}
}
