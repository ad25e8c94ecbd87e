package integration_test

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
)

// forwarding is a world whose wechat_event forwards to a backend at addr, below handle_path, so that the next process has to find the same way.
func forwarding(t *testing.T, addr string, configure func(config string) string) *integration.World {
	t.Helper()
	example, file, write := exampleFile(t)
	const event = "\twechat_event /wx/event # 授权事件接收URL\n"
	if !strings.Contains(example, event) {
		t.Fatal("Caddyfile.example has no wechat_event of the form that is looked for")
	}
	write(configure(strings.Replace(example, event,
		"\thandle_path /wx/event* {\n\t\twechat_event {\n\t\t\tforward\n\t\t}\n\t\trewrite /heard\n\t\treverse_proxy "+addr+"\n\t}\n", 1)))
	return newWorld(t, func(w *integration.World) {
		polite(w)
		w.Caddyfile = file
	})
}

// hearing is a backend that tells of each event that it got.
func hearing(t *testing.T, addr string, answer http.HandlerFunc) (*integration.Backend, <-chan integration.Received) {
	t.Helper()
	heard := make(chan integration.Received, 16)
	b := &integration.Backend{Answer: answer, Observe: func(r integration.Received) { heard <- r }}
	if err := b.Start(addr); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	return b, heard
}

// awaitForward waits for the event that an account has authorised.
func awaitForward(t *testing.T, heard <-chan integration.Received) {
	t.Helper()
	eventually(t, "the event is forwarded", func() error {
		select {
		case r := <-heard:
			if body := string(r.Body); !strings.Contains(body, integration.AuthorizerID) || !strings.Contains(body, "authorized") || strings.Contains(body, "queryauthcode") {
				t.Errorf("forwarded %s", body)
			}
			if path, _, _ := strings.Cut(r.URI, "?"); path != "/heard" || strings.Contains(r.URI, "msg_signature") {
				t.Errorf("forwarded to %s", r.URI)
			}
			if got := r.Header.Get("X-Wechat-Appid") + " " + r.Header.Get("X-Wechat-Platform"); got != integration.AuthorizerID+" "+integration.PlatformID {
				t.Errorf("forwarded as of %s", got)
			}
			if got := r.Header.Get("X-Forwarded-Proto"); got != "https" {
				t.Errorf("forwarded as come over %q", got)
			}
			return nil
		default:
			return fmt.Errorf("not yet")
		}
	})
}

// nothingLeft waits until no event is kept any more in the file store.
func nothingLeft(t *testing.T, w *integration.World) {
	t.Helper()
	eventually(t, "nothing is left to forward", func() error {
		kept := 0
		err := filepath.WalkDir(w.Dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() && filepath.Base(filepath.Dir(path)) == "forward" {
				kept++
			}
			return nil //nolint:nilerr // the gateway changes files meanwhile
		})
		if err != nil || kept > 0 {
			return fmt.Errorf("%d events are kept: %v", kept, err)
		}
		return nil
	})
}

// TestForwardOutlivesTheProcess: WeChat has its `success` to an event that is to be forwarded, and the process ends before any backend could
// be reached: killed, or in good order. The next process forwards it, once.
func TestForwardOutlivesTheProcess(t *testing.T) {
	t.Parallel()
	asItIs := func(config string) string { return config }
	onRedis := func(t *testing.T) func(string) string {
		server := redistest.Start(t)
		return func(config string) string {
			const at = "\t\tseal_key "
			return strings.Replace(config, at, "\t\tstore redis {\n\t\t\taddress "+server.Addr+"\n\t\t}\n"+at, 1)
		}
	}
	for name, tt := range map[string]struct {
		end   func(*integration.Gateway) error
		redis bool
	}{
		"killed":           {(*integration.Gateway).Kill, false},
		"killed, on redis": {(*integration.Gateway).Kill, true},
		"in good order":    {(*integration.Gateway).Stop, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			configure := asItIs
			if tt.redis {
				configure = onRedis(t)
			}
			addr := freeAddr(t)
			w := forwarding(t, addr, configure)
			authorize(t, w)
			if err := tt.end(w.Gateway); err != nil {
				t.Fatal(err)
			}
			backend, heard := hearing(t, addr, nil)
			if err := w.Gateway.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			awaitForward(t, heard)
			if !tt.redis {
				nothingLeft(t, w)
			}
			restart(t, w)
			w.WeChat.AllowRefresh("component", integration.PlatformID)
			if a, err := w.WeChat.Reauthorize(t.Context(), integration.PlatformID, integration.AuthorizerID); err != nil || !a.Push.OK() {
				t.Fatalf("updateauthorized: %s %v", a.Push.Wrong, err)
			}
			awaitForward(t, heard) // which would come after what the start found
			if n := len(backend.Received()); n != 2 {
				t.Errorf("the backend got %d events, want 2", n)
			}
			all, _ := json.Marshal(backend.Received())
			checkNoSecrets(t, w, "forwarded events", string(all))
			checkViolations(t, w)
		})
	}
}

// TestForwardIsKilledAtTheBackend: the process dies while the backend works on an event, of which nobody knows whether it has it. It gets it
// again.
func TestForwardIsKilledAtTheBackend(t *testing.T) {
	t.Parallel()
	addr := freeAddr(t)
	release := make(chan struct{})
	_, heard := hearing(t, addr, func(http.ResponseWriter, *http.Request) { <-release })
	w := forwarding(t, addr, func(config string) string { return config })
	authorize(t, w)
	awaitForward(t, heard)
	if err := w.Gateway.Kill(); err != nil {
		t.Fatal(err)
	}
	close(release)
	if err := w.Gateway.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	awaitForward(t, heard)
	nothingLeft(t, w)
	checkViolations(t, w)
}

// TestForwardIsUnanswered: a backend takes an event and answers nothing, or breaks the connection. Nobody knows whether it has it: it gets it
// again.
func TestForwardIsUnanswered(t *testing.T) {
	t.Parallel()
	for name, fail := range map[string]http.HandlerFunc{
		"hangs":  func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
		"breaks": func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			addr := freeAddr(t)
			var begun atomic.Bool
			backend, heard := hearing(t, addr, func(rw http.ResponseWriter, r *http.Request) {
				if !begun.Swap(true) {
					fail(rw, r)
				}
			})
			w := forwarding(t, addr, func(config string) string {
				const forward = "\t\t\tforward\n"
				if strings.Count(config, forward) != 1 {
					t.Error("there is no forward of the form that is looked for")
				}
				return strings.Replace(config, forward, "\t\t\tforward {\n\t\t\t\tbackend_timeout 1s\n\t\t\t}\n", 1)
			})
			authorize(t, w)
			awaitForward(t, heard)
			awaitForward(t, heard)
			nothingLeft(t, w)
			if n := len(backend.Received()); n != 2 {
				t.Errorf("the backend got %d events, want 2", n)
			}
			log := w.Gateway.Log()
			if strings.Contains(log, "an event could not be forwarded; it was handled all the same") || !strings.Contains(log, "an event could not be forwarded yet; it is tried again") {
				t.Error("the log does not say what became of the event")
			}
			checkViolations(t, w)
		})
	}
}

// TestForwardUnderTheStoreOfBefore: a reload changes the store while an event is under way to a backend that cannot be reached, and the process
// ends before that. The next one, which knows the new store alone, forwards it.
func TestForwardUnderTheStoreOfBefore(t *testing.T) {
	t.Parallel()
	addr, server := freeAddr(t), redistest.Start(t)
	w := forwarding(t, addr, func(config string) string { return config })
	authorize(t, w)
	config, err := os.ReadFile(w.Caddyfile)
	if err != nil {
		t.Fatal(err)
	}
	const at = "\t\tseal_key "
	if err := os.WriteFile(w.Caddyfile, []byte(strings.Replace(string(config), at, "\t\tstore redis {\n\t\t\taddress "+server.Addr+"\n\t\t}\n"+at, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	w.WeChat.AllowRefresh("component", integration.PlatformID) // that store has none
	w.WeChat.AllowRefresh("authorizer", integration.AuthorizerID)
	if err := w.Gateway.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := w.Gateway.Stop(); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, w)
	_, heard := hearing(t, addr, nil)
	if err := w.Gateway.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	awaitForward(t, heard)
	checkViolations(t, w)
}
