package integration_test

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
)

// exampleFile is Caddyfile.example in a file that a test may write anew before it reloads.
func exampleFile(t *testing.T) (example, file string, write func(config string)) {
	t.Helper()
	text, err := os.ReadFile("../Caddyfile.example")
	if err != nil {
		t.Fatal(err)
	}
	file = filepath.Join(t.TempDir(), "Caddyfile")
	write = func(config string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(string(text))
	return string(text), file, write
}

// TestReloadToAnotherStore: a reload changes the store, to Redis and back, and nothing was moved before. What WeChat has had its `success`
// for is not lost: the ticket serves at once, and a code that waits is exchanged under the new store. A message at the backend is answered,
// and the push of it that comes under the new store joins the work that was begun under the old one.
func TestReloadToAnotherStore(t *testing.T) {
	t.Parallel()
	const later = "wx8888888888888888"
	example, file, write := exampleFile(t)
	release, arrived := make(chan struct{}), make(chan struct{}, 4)
	w := newWorld(t, func(w *integration.World) {
		polite(w)
		w.Caddyfile = file
		w.Config.Authorizers = []wxsim.Authorizer{{AppID: later}}
		w.Env = append(w.Env, "CRM_APPIDS=*")
		w.Backend = &integration.Backend{Answer: func(rw http.ResponseWriter, r *http.Request) {
			arrived <- struct{}{}
			<-release
			integration.Echo(rw, r)
		}}
	})
	authorize(t, w)
	user := w.WeChat.NewUser(integration.AuthorizerID)
	server := redistest.Start(t)
	const at = "\t\tseal_key "
	redis := strings.Replace(example, at, "\t\tstore redis {\n\t\t\taddress "+server.Addr+"\n\t\t}\n"+at, 1)
	// Another store begins with tokens of its own.
	reload := func(config string) {
		t.Helper()
		write(config)
		for _, appid := range []string{integration.AuthorizerID, later} {
			w.WeChat.AllowRefresh(wxsim.KindAuthorizer, appid)
		}
		w.WeChat.AllowRefresh(wxsim.KindComponent, integration.PlatformID)
		if err := w.Gateway.Reload(t.Context()); err != nil {
			t.Fatal(err)
		}
	}

	pushed := make(chan wxsim.PushResult, 1)
	go func() {
		r, err := w.WeChat.PushMessage(t.Context(), wxsim.Message{Platform: integration.PlatformID, AppID: integration.AuthorizerID, Content: "slow"})
		if err != nil {
			t.Error(err)
		}
		pushed <- r
	}()
	<-arrived
	w.WeChat.FailNext(pathQueryAuth, wxsim.Fault{DropConnection: true, Times: -1})
	if a, err := w.WeChat.Authorize(t.Context(), integration.PlatformID, later); err != nil || !a.Push.OK() {
		t.Fatalf("authorized: %s %v", a.Push.Wrong, err)
	}
	for _, config := range []string{redis, example, redis} {
		reload(config)
		if body := callUser(t, w, user); !strings.Contains(body, user.OpenID) {
			t.Fatalf("a call under another store: %s", body)
		}
	}
	if n := w.WeChat.Journal().Count("/cgi-bin/component/api_start_push_ticket"); n > 1 { // before there was any
		t.Errorf("WeChat was asked %d times to push a ticket", n)
	}
	eventually(t, "WeChat's second push joins", func() error {
		if got := metric(t, w, "caddy_wechat_push_retries_joined_total"); got != "1" {
			return fmt.Errorf("%q joined", got)
		}
		return nil
	})
	close(release)
	if r := <-pushed; r.UserSaw != "收到：slow" || len(w.Backend.Received()) != 1 {
		t.Errorf("the user saw %q after %d attempts (%s), the backend was given the message %d times", r.UserSaw, len(r.Attempts), r.Wrong, len(w.Backend.Received()))
	}

	w.WeChat.ClearFaults()
	customer := w.WeChat.NewUser(later)
	eventually(t, "the code is exchanged", func() error {
		if _, body := call(t, w, http.MethodGet, "/"+later+"/cgi-bin/user/info?openid="+customer.OpenID, bearer(w), ""); !strings.Contains(body, customer.OpenID) {
			return fmt.Errorf("%s", body)
		}
		return nil
	})
	checkViolations(t, w)
}

// TestForwardOverReload: wechat_event forwards to a backend that is down, and the configuration is reloaded before it is back. The event
// gets there, and once.
func TestForwardOverReload(t *testing.T) {
	t.Parallel()
	example, file, write := exampleFile(t)
	addr := freeAddr(t)
	event := "\twechat_event /wx/event # 授权事件接收URL\n"
	if !strings.Contains(example, event) {
		t.Fatal("Caddyfile.example has no wechat_event of the form that is looked for")
	}
	write(strings.Replace(example, event, "\troute /wx/event {\n\t\twechat_event {\n\t\t\tforward\n\t\t}\n\t\treverse_proxy "+addr+" {\n\t\t\tlb_try_duration 12s\n\t\t}\n\t}\n", 1))
	w := newWorld(t, func(w *integration.World) {
		polite(w)
		w.Caddyfile = file
	})
	authorize(t, w)
	if err := w.Gateway.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	forwarded := make(chan string, 4)
	backend := &integration.Backend{Observe: func(r integration.Received) { forwarded <- string(r.Body) }}
	if err := backend.Start(addr); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(backend.Close)
	eventually(t, "the event is forwarded", func() error {
		select {
		case body := <-forwarded:
			if !strings.Contains(body, integration.AuthorizerID) || !strings.Contains(body, "authorized") || strings.Contains(body, "queryauthcode") {
				t.Errorf("forwarded %s", body)
			}
			return nil
		default:
			return fmt.Errorf("not yet")
		}
	})
	if err := w.Gateway.Stop(); err != nil { // which waits for what is still under way
		t.Fatal(err)
	}
	if n := len(backend.Received()); n != 1 {
		t.Errorf("it was forwarded %d times", n)
	}
	checkNoSecrets(t, w, "forwarded events", fmt.Sprint(backend.Received()))
	checkViolations(t, w)
}
