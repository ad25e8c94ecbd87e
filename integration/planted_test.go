package integration_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// plantedFault is something that goes wrong between WeChat and a company, with what has to say so: whoever is called in
// the night looks at these and at nothing else.
type plantedFault struct {
	name      string
	configure func(t *testing.T, w *integration.World)
	plant     func(t *testing.T, w *integration.World)
	finding   string // code in GET /wechat/status; empty: the gateway cannot see it
	level     string // of the finding
	remedy    string // part of what it says to do
	log       string // part of a line of the log; empty: there is none
	doctor    string // id of a check of `caddy wechat doctor` that says so beside "gateway", which has the findings
	explain   string // the code that a person sees, for `caddy wechat explain`
	ready     bool   // the gateway can serve all the same
}

func pushText(t *testing.T, w *integration.World, m wxsim.Message) {
	t.Helper()
	m.Platform, m.AppID, m.Content, m.Attempts = integration.PlatformID, integration.AuthorizerID, "words of a user", 1
	m.Tamper = func(*wxsim.Outgoing) {} // whatever is answered is no violation
	if _, err := w.WeChat.PushMessage(t.Context(), m); err != nil {
		t.Fatal(err)
	}
}

// configLines changes the example's configuration.
func configLines(t *testing.T, w *integration.World, oldnew ...string) {
	t.Helper()
	text, err := os.ReadFile(w.Caddyfile)
	if err != nil {
		t.Fatal(err)
	}
	changed := strings.NewReplacer(oldnew...).Replace(string(text))
	if changed == string(text) {
		t.Fatal("the example has no such line")
	}
	w.Caddyfile = filepath.Join(t.TempDir(), "Caddyfile")
	if err := os.WriteFile(w.Caddyfile, []byte(changed), 0o600); err != nil {
		t.Fatal(err)
	}
}

var plantedFaults = []plantedFault{
	{
		name: "wrong token",
		plant: func(t *testing.T, w *integration.World) {
			if err := w.WeChat.SetPushKeys(integration.PlatformID, "another0token", w.Secret("WECHAT_PLATFORM_AES_KEY")); err != nil {
				t.Fatal(err)
			}
			pushText(t, w, wxsim.Message{})
		},
		finding: "push_signature", level: "yellow", remedy: "消息校验Token", log: "fits no configured token", ready: true,
	},
	{
		name: "wrong AES key",
		plant: func(t *testing.T, w *integration.World) {
			if err := w.WeChat.SetPushKeys(integration.PlatformID, w.Secret("WECHAT_PLATFORM_TOKEN"), newKey()); err != nil {
				t.Fatal(err)
			}
			pushText(t, w, wxsim.Message{})
		},
		finding: "push_aes_key", level: "red", remedy: "EncodingAESKey", log: "aes_key", ready: true,
	},
	{
		name: "clock off", // which the answers to what a gateway asks when it starts tell
		plant: func(t *testing.T, w *integration.World) {
			if err := w.Gateway.Stop(); err != nil {
				t.Fatal(err)
			}
			w.WeChat.SetClock(20 * time.Minute)
			w.WeChat.ExpireAll(wxsim.KindComponent, integration.PlatformID)
			if err := w.Gateway.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			awaitTLS(t, w, w.HTTPS)
			pushText(t, w, wxsim.Message{})
		},
		finding: "clock_offset", level: "red", remedy: "chrony", log: "this machine's clock differs from WeChat's", ready: true,
	},
	{
		name: "ticket absent",
		configure: func(_ *testing.T, w *integration.World) {
			w.Config.Lives.Ticket = time.Millisecond // none is at hand
		},
		plant:   func(*testing.T, *integration.World) {},
		finding: "no_ticket", level: "red", remedy: "授权事件接收URL", log: "component_verify_ticket",
	},
	{
		name: "address not listed",
		plant: func(t *testing.T, w *integration.World) {
			w.WeChat.FailNext(wxsim.AnyPath, wxsim.Fault{Errcode: 61004, Errmsg: "access clientip is not registered hint: [x] requestIP: 203.0.113.7", Times: -1})
			callUser(t, w, w.WeChat.NewUser(integration.AuthorizerID))
		},
		finding: "address_refused", level: "red", remedy: "白名单IP地址列表", log: "203.0.113.7", doctor: "egress_ip", ready: true,
	},
	{
		name: "backend down",
		configure: func(t *testing.T, w *integration.World) {
			configLines(t, w, "lb_try_duration 12s", "lb_try_duration 100ms")
		},
		plant: func(t *testing.T, w *integration.World) {
			w.Backend.Close()
			pushText(t, w, wxsim.Message{CreateTime: time.Now().Add(-10 * time.Second)}) // so that this is the last one
		},
		finding: "replies_lost", level: "red", remedy: "start the backend", log: "a push is lost", doctor: "upstreams", ready: true,
	},
	{
		name: "missing permission set",
		plant: func(t *testing.T, w *integration.World) {
			w.WeChat.FailNext("/cgi-bin/menu/get", wxsim.Fault{Errcode: 61007})
			call(t, w, http.MethodGet, "/"+integration.AuthorizerID+"/cgi-bin/menu/get", bearer(w), "")
		},
		finding: "permission_missing", level: "yellow", remedy: "permission set", log: "permission_set", ready: true,
	},
	{
		name: "verification file with a BOM",
		plant: func(t *testing.T, w *integration.World) {
			if err := os.WriteFile(filepath.Join(w.Dir, "verify", integration.VerifyName), []byte("\ufeff"+integration.VerifyContent), 0o600); err != nil {
				t.Fatal(err)
			}
			fetch(t, httpsClient(t, w), http.MethodGet, w.URL("/"+integration.VerifyName), nil, "")
		},
		finding: "verify_file", level: "yellow", remedy: "as WeChat gave it", log: "byte order mark", ready: true,
	},
	{
		name: "rogue refresher",
		plant: func(t *testing.T, w *integration.World) {
			user := w.WeChat.NewUser(integration.AuthorizerID)
			callUser(t, w, user)
			w.WeChat.ReplaceAll(wxsim.KindAuthorizer, integration.AuthorizerID)
			callUser(t, w, user)
		},
		finding: "rogue_refresh", level: "yellow", remedy: "wechat_api", log: "another", ready: true,
	},
	{
		name: "key that ended", // the AppSecret was reset in WeChat's console
		plant: func(t *testing.T, w *integration.World) {
			w.WeChat.SetSecret(integration.AccountID, "another0secret0another0secret")
			w.WeChat.ExpireAll(wxsim.KindAccount, integration.AccountID)
			call(t, w, http.MethodGet, "/"+integration.AccountID+"/cgi-bin/menu/get", bearer(w), "")
		},
		finding: "secret_wrong", level: "red", remedy: "AppSecret", log: "40125", ready: true,
	},
	{
		name: "wrong OAuth domain", // 网页授权域名: nothing of it comes to the gateway, the visitor sees WeChat's code
		plant: func(t *testing.T, w *integration.World) {
			w.WeChat.SetOAuthHosts("elsewhere.example.com")
			resp, _ := fetch(t, httpsClient(t, w), http.MethodGet, w.URL("/wx/thirdParty/authorize/"+integration.AccountID+"/verify"), nil, "")
			if _, err := w.WeChat.Visit(resp.Header.Get("Location"), w.WeChat.NewUser(integration.AccountID)); err == nil || !strings.Contains(err.Error(), "10003") {
				t.Fatalf("WeChat lets the visitor in: %v", err)
			}
		},
		explain: "10003", remedy: "网页授权域名", ready: true,
	},
}

// TestPlantedFaults plants one fault after the other in a gateway that was well, and looks whether what it says is enough to
// mend it: status, console and CLI by the finding, the log, and the doctor. The twelfth, Redis away, is TestPlantedRedis.
func TestPlantedFaults(t *testing.T) {
	t.Parallel()
	for _, fault := range plantedFaults {
		t.Run(fault.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, func(w *integration.World) {
				polite(w)
				if fault.configure != nil {
					fault.configure(t, w)
				}
			})
			if fault.finding != "no_ticket" {
				authorize(t, w)
			}
			fault.plant(t, w)
			out := &plantedOutput{t: t, secrets: w.Secrets()}
			if fault.finding != "" {
				eventually(t, "the status has "+fault.finding, func() error {
					return out.status(w.Admin).has(fault.finding, fault.level, fault.remedy)
				})
			}
			if got := out.admin(w.Admin, "/wechat/ready").StatusCode == http.StatusOK; got != fault.ready {
				t.Errorf("ready %t, want %t", got, fault.ready)
			}
			for _, path := range []string{"/wechat/refusals", "/wechat/feed", "/wechat/authorizers", "/wechat/authorizers/" + integration.AuthorizerID, "/wechat/funcs", "/metrics"} {
				out.admin(w.Admin, path)
			}
			table := out.command(w.Gateway, "wechat", "status", "--address", w.Admin)
			if fault.finding != "" && !strings.Contains(table, fault.remedy) && !strings.Contains(out.command(w.Gateway, "wechat", "status", "--address", w.Admin, "--lang", "zh"), fault.remedy) {
				t.Errorf("`caddy wechat status` does not say %q:\n%s", fault.remedy, table)
			}
			if fault.explain != "" && !strings.Contains(out.command(w.Gateway, "wechat", "explain", fault.explain), fault.remedy) {
				t.Errorf("`caddy wechat explain %s` does not say %q", fault.explain, fault.remedy)
			}
			if fault.log != "" && !strings.Contains(w.Gateway.Log(), fault.log) {
				t.Errorf("the log does not say %q", fault.log)
			}
			for _, path := range []string{"/api/status", "/api/refusals", "/api/feed"} { // what the console shows
				resp, text := fetch(t, plainClient, http.MethodGet, "http://"+w.Console+path, nil, "")
				checkAbsent(t, out.secrets, "console", text)
				if resp.StatusCode != http.StatusOK || path == "/api/status" && !strings.Contains(text, fault.finding) {
					t.Errorf("the console's %s: %d %s", path, resp.StatusCode, text)
				}
			}
			var report struct {
				Checks []struct {
					ID, Level, Subject string
					Remedy             json.RawMessage
				}
			}
			text := out.command(w.Gateway, "wechat", "doctor", "--config", w.Caddyfile, "--json")
			for line := range strings.Lines(text) { // beside Caddy's log
				if strings.Contains(line, `"checks":`) {
					if err := json.Unmarshal([]byte(line), &report); err != nil {
						t.Fatalf("%v: %s", err, line)
					}
				}
			}
			said, also := false, false
			for _, c := range report.Checks {
				bad := (c.Level == "red" || c.Level == "yellow") && len(c.Remedy) > 0
				said = said || bad && c.ID == "gateway" && strings.Contains(c.Subject, fault.finding)
				also = also || bad && c.ID == fault.doctor
			}
			if fault.finding != "" && !said || fault.doctor != "" && !also {
				t.Errorf("the doctor does not say so: %s", text)
			}
		})
	}
}

// TestPlantedRedis: the store goes away.
func TestPlantedRedis(t *testing.T) {
	t.Parallel()
	f := newFleet(t, fleetOptions{nodes: 1})
	f.authorize("wx6000000000000000")
	n := f.nodes[0]
	out := &plantedOutput{t: t, secrets: append(f.wechat.Secrets(), f.secrets...)}
	if problem := out.status(n.Admin).has("store_down", "red", ""); problem == nil {
		t.Fatal("the store is away before it is")
	}
	n.relay.Cut()
	eventually(t, "the status says so", func() error { return out.status(n.Admin).has("store_down", "red", "") })
	if out.admin(n.Admin, "/wechat/ready").StatusCode != http.StatusServiceUnavailable {
		t.Error("it is ready")
	}
	if text := out.command(n.Gateway, "wechat", "status", "--address", n.Admin); !strings.Contains(text, "store") {
		t.Errorf("`caddy wechat status` does not say so:\n%s", text)
	}
	n.relay.Pass()
	eventually(t, "it is well again", func() error {
		if out.status(n.Admin).has("store_down", "red", "") == nil {
			return fmt.Errorf("the finding stays")
		}
		return nil
	})
}

// plantedOutput asks a gateway, and looks for secrets in all that comes out.
type plantedOutput struct {
	t       *testing.T
	secrets []string
}

type plantedStatus struct {
	text     string
	Findings []struct {
		Level, Code, Subject string
		Text, Remedy         struct{ EN, ZH string }
	}
}

// has reports why there is no such finding.
func (s plantedStatus) has(code, level, remedy string) error {
	i := slices.IndexFunc(s.Findings, func(f struct {
		Level, Code, Subject string
		Text, Remedy         struct{ EN, ZH string }
	},
	) bool {
		return f.Code == code
	})
	switch {
	case i < 0:
		return fmt.Errorf("no %s in %s", code, s.text)
	case s.Findings[i].Level != level:
		return fmt.Errorf("%s is %s, want %s", code, s.Findings[i].Level, level)
	case s.Findings[i].Text.EN == "" || s.Findings[i].Text.ZH == "" || s.Findings[i].Remedy.ZH == "":
		return fmt.Errorf("%s says too little: %s", code, s.text)
	case !strings.Contains(s.Findings[i].Remedy.EN+s.Findings[i].Remedy.ZH, remedy):
		return fmt.Errorf("%s does not say %q: %s", code, remedy, s.Findings[i].Remedy.EN)
	}
	return nil
}

func (o *plantedOutput) status(admin string) (s plantedStatus) {
	o.t.Helper()
	_, s.text = fetch(o.t, plainClient, http.MethodGet, "http://"+admin+"/wechat/status", nil, "")
	checkAbsent(o.t, o.secrets, "status", s.text)
	if err := json.Unmarshal([]byte(s.text), &s); err != nil {
		o.t.Fatalf("%v: %s", err, s.text)
	}
	return s
}

func (o *plantedOutput) admin(admin, path string) *http.Response {
	o.t.Helper()
	resp, text := fetch(o.t, plainClient, http.MethodGet, "http://"+admin+path, nil, "")
	checkAbsent(o.t, o.secrets, path, text)
	return resp
}

func (o *plantedOutput) command(g *integration.Gateway, args ...string) string {
	o.t.Helper()
	out, _ := commands(o.t, g.Dir, g.Env...).Command(o.t.Context(), args...) // its exit code says that something is wrong
	checkAbsent(o.t, o.secrets, strings.Join(args, " "), out)
	return out
}
