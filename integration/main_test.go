package integration_test

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// binary is the gateway, built once for all tests.
var binary string

// quickBinary is the gateway without the race detector, for the many commands that end at once. Where tests run without
// it, it is the same.
var quickBinary = sync.OnceValues(func() (string, error) {
	if !raceEnabled {
		return binary, nil
	}
	dir := filepath.Join(filepath.Dir(binary), "quick")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	return integration.Build("..", dir, false)
})

// commands runs commands of the gateway's in a folder.
func commands(t *testing.T, dir string, env ...string) *integration.Gateway {
	t.Helper()
	path, err := quickBinary()
	if err != nil {
		t.Fatal(err)
	}
	return &integration.Gateway{Binary: path, Dir: dir, Env: env}
}

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if addr := os.Getenv(halfBackendAddr); addr != "" {
		return halfBackend(addr)
	}
	dir, err := os.MkdirTemp("", "caddy-wechat-test")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	if binary, err = integration.Build("..", dir, raceEnabled); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	// Most of a test is waiting, for WeChat's pace above all.
	if err := flag.Set("test.parallel", "4"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// newWorld starts a gateway process with everything around it, and checks at the end of the test what must hold
// after any: WeChat saw nothing that it must never see, no secret came out, no race was detected.
func newWorld(t *testing.T, configure func(*integration.World)) *integration.World {
	t.Helper()
	w := &integration.World{
		Binary: binary, Dir: t.TempDir(), Caddyfile: "../Caddyfile.example",
		Env: []string{"WECHAT_LOG_LEVEL=DEBUG"}, // where Caddy logs requests with their headers and URIs
	}
	w.Config.Seed = 1
	if configure != nil {
		configure(w)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Errorf("closing: %v", err)
		}
		if w.Gateway == nil {
			return
		}
		log := w.Gateway.Log()
		for _, race := range races(log) {
			t.Errorf("the gateway process has a data race:\n%s", race)
		}
		checkNoSecrets(t, w, "log", log)
		if t.Failed() {
			t.Logf("gateway's log:\n%s", log)
		}
	})
	if err := w.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return w
}

// races are the race detector's reports in a log that our code has a part in. Caddy has at least one of its own: its TLS
// app is copied by CaddyModule while Start writes to it.
func races(log string) []string {
	var ours []string
	for _, report := range strings.Split(log, "==================\n") {
		if strings.HasPrefix(report, "WARNING: DATA RACE") && strings.Contains(strings.ReplaceAll(report, "caddy-wechat/cmd/caddy", ""), "github.com/caddy-wechat/caddy-wechat/") {
			ours = append(ours, report)
		}
	}
	return ours
}

// checkViolations fails for each thing WeChat saw that it must never see.
func checkViolations(t *testing.T, w *integration.World) {
	t.Helper()
	for _, e := range w.WeChat.Journal().Violations() {
		t.Errorf("WeChat saw %s %s?%s: %v", e.Method, e.Path, e.Query, e.Violations)
	}
}

func checkNoSecrets(t *testing.T, w *integration.World, where, text string) {
	t.Helper()
	checkAbsent(t, w.Secrets(), where, text)
}

// secretEnd is the length of the ends by which secrets are looked for; all that there are, are longer.
const secretEnd = 12

// checkAbsent fails for each of the secrets that is in the text. Long runs have thousands of secrets and megabytes of logs:
// the text is gone through once.
func checkAbsent(t *testing.T, secrets []string, where, text string) {
	t.Helper()
	byEnd := make(map[string][]string, len(secrets))
	for _, s := range secrets {
		if len(s) < secretEnd {
			t.Fatalf("a secret of %d characters is too short to be looked for", len(s))
		}
		byEnd[s[len(s)-secretEnd:]] = append(byEnd[s[len(s)-secretEnd:]], s)
	}
	found := make(map[string]bool)
	for end := secretEnd; end <= len(text); end++ {
		for _, s := range byEnd[text[end-secretEnd:end]] {
			if strings.HasSuffix(text[:end], s) && !found[s] {
				found[s] = true
				i := end - len(s)
				t.Errorf("a secret of %d characters is in the %s: …%s<HERE>…", len(s), where, text[max(0, i-120):i])
			}
		}
	}
}

// authorize has the platform get a ticket and the account authorise it, and waits until its tokens are there.
func authorize(t *testing.T, w *integration.World) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	result, err := w.WeChat.PushTicket(ctx, integration.PlatformID)
	if err != nil || !result.OK() {
		t.Fatalf("ticket: %s %v", result.Wrong, err)
	}
	a, err := w.WeChat.Authorize(ctx, integration.PlatformID, integration.AuthorizerID)
	if err != nil || !a.Push.OK() {
		t.Fatalf("authorized: %s %v", a.Push.Wrong, err)
	}
	awaitAuthorizer(t, w)
}

// awaitAuthorizer waits until the exchange of the authorization code is done.
func awaitAuthorizer(t *testing.T, w *integration.World) {
	t.Helper()
	user := w.WeChat.NewUser(integration.AuthorizerID)
	eventually(t, "the authorizer's tokens", func() error {
		status, body := call(t, w, http.MethodGet, "/"+integration.AuthorizerID+"/cgi-bin/user/info?openid="+user.OpenID, bearer(w), "")
		if !strings.Contains(body, user.OpenID) && !strings.Contains(body, `"errcode":61007,`) { // so WeChat took the token of a mini program
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})
}

// eventually waits for something that happens in another process.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: %v", what, err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func bearer(w *integration.World) http.Header {
	return http.Header{"Authorization": {"Bearer " + w.ClientKey}}
}

var plainClient = &http.Client{
	Timeout:       30 * time.Second,
	Transport:     http.DefaultTransport.(*http.Transport).Clone(), // closing an httptest.Server ends what the default one does
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

// call sends a request to the wechat_api listener.
func call(t *testing.T, w *integration.World, method, path string, header http.Header, body string) (int, string) {
	t.Helper()
	resp, text := fetch(t, plainClient, method, w.APIURL(path), header, body)
	return resp.StatusCode, text
}

func fetch(t *testing.T, client *http.Client, method, address string, header http.Header, body string) (*http.Response, string) {
	t.Helper()
	return fetchBody(t, client, method, address, header, strings.NewReader(body))
}

// fetchBody is fetch with any body; one without a known length goes in chunks.
func fetchBody(t *testing.T, client *http.Client, method, address string, header http.Header, body io.Reader) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, address, body)
	if err != nil {
		t.Fatal(err)
	}
	maps.Copy(req.Header, header)
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(text)
}

func httpsClient(t *testing.T, w *integration.World) *http.Client {
	t.Helper()
	client, err := w.Client()
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// field reads one value of a JSON answer.
func field(t *testing.T, body, name string) any {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal([]byte(body), &m); err != nil {
		t.Fatalf("%s: %v", body, err)
	}
	return m[name]
}

// polite switches the hostility off, for tests that count.
func polite(w *integration.World) { w.Config.Faults = wxsim.Faults{Polite: true} }
