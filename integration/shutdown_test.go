package integration_test

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// TestShutdownDelay: a process that is told to end is not ready from then on, and serves all that comes until the balancer in front of it has had
// the time of shutdown_delay to notice.
func TestShutdownDelay(t *testing.T) {
	t.Parallel()
	const delay = 5 * time.Second
	example := document(t, "Caddyfile.example")
	config := strings.Replace(example, "{\n\thttp_port ", fmt.Sprintf("{\n\tshutdown_delay %v\n\tgrace_period 5s\n\thttp_port ", delay), 1)
	config = strings.Replace(config, "\twechat_api\n", "\twechat_ready /ready\n\twechat_api\n", 1)
	if strings.Count(config, "shutdown_delay") != 1 || strings.Count(config, "wechat_ready /ready") != 1 {
		t.Fatal("the example has changed its form")
	}
	file := filepath.Join(t.TempDir(), "Caddyfile")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, func(w *integration.World) { polite(w); w.Caddyfile = file })
	authorize(t, w)
	ready := func(want int) func() error {
		return func() error {
			if resp, _ := fetch(t, plainClient, http.MethodGet, w.APIURL("/ready"), nil, ""); resp.StatusCode != want {
				return fmt.Errorf("ready: %d, want %d", resp.StatusCode, want)
			}
			return nil
		}
	}
	eventually(t, "the gateway is ready", ready(http.StatusOK))
	told, stopped := time.Now(), make(chan error, 1)
	go func() { stopped <- w.Gateway.Stop() }()
	eventually(t, "the gateway is ready no more", ready(http.StatusServiceUnavailable))
	for _, path := range []string{"ready", "status"} {
		if _, body := fetch(t, adminClient, http.MethodGet, "http://"+w.Admin+"/wechat/"+path, nil, ""); !strings.Contains(body, `"shutting_down"`) {
			t.Errorf("%s: %s", path, body)
		}
	}
	result, err := w.WeChat.PushMessage(t.Context(), wxsim.Message{Platform: integration.PlatformID, AppID: integration.AuthorizerID, Content: "last"})
	if err != nil || result.UserSaw != "收到：last" {
		t.Errorf("push: %q %s %v", result.UserSaw, result.Wrong, err)
	}
	if status, body := call(t, w, http.MethodGet, "/"+integration.AuthorizerID+"/cgi-bin/getcallbackip", bearer(w), ""); status != http.StatusOK || !strings.Contains(body, "ip_list") {
		t.Errorf("call: %d %s", status, body)
	}
	if took := time.Since(told); took > delay {
		t.Fatalf("this took %v: nothing of it shows that the gateway serves", took)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	if took := time.Since(told); took < delay {
		t.Errorf("the process ended after %v", took)
	}
	checkViolations(t, w)
}
