package caddymodule

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// walkTime is far more than a walk over a configuration takes, even watched for races, and less than one in which each level multiplies the ways.
const walkTime = 30 * time.Second

// inTime runs f, and fails if it takes long.
func inTime(t *testing.T, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	limit := time.NewTimer(walkTime)
	defer limit.Stop()
	select {
	case <-done:
	case <-limit.C:
		t.Fatalf("%s takes more than %s", what, walkTime)
	}
}

// Named routes in which a walk could go in very many ways. Each is called a, and inner is what the innermost has.
var manifoldRoutes = map[string]func(inner string) string{
	"itself": func(inner string) string {
		return "&(a) {\n\troute {\n" + each(120, "\t\troute /p%d/* {\n\t\t\tinvoke a\n\t\t}\n") + inner + "\t}\n}\n"
	},
	"itself after a prefix is taken": func(inner string) string {
		return "&(a) {\n\troute {\n" + each(120, "\t\thandle_path /p%d/* {\n\t\t\tinvoke a\n\t\t}\n") + inner + "\t}\n}\n"
	},
	"each other": func(inner string) string {
		return "&(a) {\n\troute {\n" + each(40, "\t\troute /p%d/* {\n\t\t\tinvoke b\n\t\t}\n") + inner + "\t}\n}\n" +
			"&(b) {\n\troute {\n" + each(40, "\t\troute /q%d/* {\n\t\t\tinvoke a\n\t\t}\n") + "\t}\n}\n"
	},
	"all each other": func(inner string) string {
		var s strings.Builder
		for name := 'a'; name <= 'n'; name++ {
			s.WriteString("&(" + string(name) + ") {\n\troute {\n")
			for other := 'a'; other <= 'n'; other++ {
				s.WriteString("\t\tinvoke /" + string(other) + " " + string(other) + "\n")
			}
			s.WriteString(inner + "\t}\n}\n")
		}
		return s.String()
	},
	"the next after a prefix is taken": func(inner string) string {
		var s strings.Builder
		for name := 'a'; name < 'd'; name++ {
			s.WriteString("&(" + string(name) + ") {\n\troute {\n" + each(22, "\t\thandle_path /p%d/* {\n\t\t\tinvoke "+string(name+1)+"\n\t\t}\n") + inner + "\t}\n}\n")
		}
		return s.String() + "&(d) {\n\troute {\n\t\theader X-Last yes\n" + inner + "\t}\n}\n"
	},
	"the next many times": func(inner string) string {
		var s strings.Builder
		for name := 'a'; name < 'f'; name++ {
			s.WriteString("&(" + string(name) + ") {\n\troute {\n" + strings.Repeat("\t\tinvoke "+string(name+1)+"\n", 60) + "\t}\n}\n")
		}
		return s.String() + "&(f) {\n\troute {\n\t\theader X-Last yes\n" + inner + "\t}\n}\n"
	},
}

func each(n int, format string) string {
	var s strings.Builder
	for i := range n {
		fmt.Fprintf(&s, format, i)
	}
	return s.String()
}

// TestMessageRouteIsFoundSoon: where named routes are invoked in very many ways, the site's wechat_message is found all the same, or known not to be reached.
func TestMessageRouteIsFoundSoon(t *testing.T) {
	const (
		event   = "\twechat_event /wx/event\n"
		message = "\troute /wx/message/* {\n\t\twechat_message\n\t\treverse_proxy BACKEND\n\t}\n"
	)
	site := func(body string) string { return "http://a.example.com {\n" + event + body + "}\n" }
	for name, routes := range manifoldRoutes {
		tests := map[string]struct {
			caddyfile string
			reached   bool
		}{
			"behind them": {routes("") + site("\tinvoke /nowhere a\n"+message), true},
			"in them":     {routes(message) + site("\tinvoke /wx/message/* a\n"), true},
			"nowhere":     {routes("") + site("\troute /wx/message/* {\n\t\tinvoke a\n\t\treverse_proxy OTHER\n\t\twechat_message\n\t}\n"), false},
		}
		if name == "the next many times" {
			delete(tests, "in them") // Caddy itself goes all the ways
		}
		for where, tt := range tests {
			t.Run(name+", "+where, func(t *testing.T) {
				s := newSites(t, filepath.Join(t.TempDir(), "storage"), tt.caddyfile)
				s.know()
				s.logs.TakeAll()
				inTime(t, "the search", func() {
					s.push("a.example.com", platformSender(t).push("/wx/event", textMessage("secret content")))
				})
				path, why := "", "no wechat_message that is reached"
				if tt.reached {
					path, why = "/wx/message/"+authorizerID, ""
				}
				s.checkLog(path, "", why)
			})
		}
	}
}

// TestMessagePathsOfNamedRoutes: a named route has as many paths as there are ways to it.
func TestMessagePathsOfNamedRoutes(t *testing.T) {
	for _, tt := range []struct{ name, site, path string }{
		{"the second way to it", "reverse_proxy /never/* OTHER; invoke /never/* a; invoke /wx/message/* a", "/wx/message/" + authorizerID},
		{"the way with no pattern", "reverse_proxy /never/* OTHER; invoke /never/* a; invoke a", "/" + authorizerID},
		{"a loop that a group ends", "handle /never/* {; }; handle /wx/* {; invoke loop; }", "/wx/" + authorizerID},
		{"a way in a group", "reverse_proxy /never/* OTHER; invoke /never/* a; handle /wx/* {; invoke a; }", "/wx/" + authorizerID},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSites(t, filepath.Join(t.TempDir(), "storage"),
				"&(a) {\n\troute {\n\t\twechat_message\n\t\treverse_proxy BACKEND\n\t}\n}\n"+
					"&(loop) {\n\troute {\n\t\thandle /never/* {\n\t\t}\n\t\thandle /wx/* {\n\t\t\tinvoke loop\n\t\t}\n\t\tinvoke a\n\t}\n}\nhttp://a.example.com {\n\twechat_event /wx/event\n\troute {\n"+strings.ReplaceAll(tt.site, "; ", "\n")+"\n\t}\n}\n")
			s.know()
			s.logs.TakeAll()
			s.push("a.example.com", platformSender(t).push("/wx/event", textMessage("secret content")))
			s.checkLog(tt.path, "", "")
		})
	}
}

// TestLandingPlacesAreFoundSoon: so are the links of wechat_oauth, once each, and the verification files.
func TestLandingPlacesAreFoundSoon(t *testing.T) {
	const inner = "\t\twechat_oauth /wx/login {\n\t\t\tfunc shop https://shop.example.com/\n\t\t}\n"
	for name, routes := range manifoldRoutes {
		t.Run(name, func(t *testing.T) {
			config, _, err := adapt(`{
	admin off
	wechat {
		account ` + accountID + ` {
			secret account-secret
		}
		api http://127.0.0.1:1
	}
}
` + routes(inner) + "http://a.example.com {\n\tinvoke a\n}\n")
			if err != nil {
				t.Fatal(err)
			}
			app, _ := provisionAll(t, config)
			inTime(t, "the search", func() {
				funcs, _ := app.servedFuncs()
				link := "http://a.example.com/wx/login/authorize/" + accountID + "/shop"
				if !slices.ContainsFunc(funcs, func(f servedFunc) bool { return slices.Contains(f.Links, link) }) {
					t.Errorf("%s is not among %d funcs", link, len(funcs))
				}
			})
		})
	}
}

// provisionAll provisions all of a JSON configuration, with its storage in a folder.
func provisionAll(t *testing.T, config string) (*App, caddy.Context) {
	t.Helper()
	var loaded caddy.Config
	if err := json.Unmarshal([]byte(config), &loaded); err != nil {
		t.Fatal(err)
	}
	loaded.StorageRaw, _ = json.Marshal(map[string]string{"module": "file_system", "root": t.TempDir()})
	provisioning.Lock()
	ctx, err := caddy.ProvisionContext(&loaded)
	provisioning.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	app, err := loadApp(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := app.Cleanup(); err != nil {
			t.Errorf("cleanup: %v", err)
		}
		if certificates, err := ctx.AppIfConfigured("tls"); err == nil { // which every http app brings along
			if err := certificates.(caddy.CleanerUpper).Cleanup(); err != nil {
				t.Errorf("cleanup: %v", err)
			}
		}
	})
	return app, ctx
}

// TestDoctorReadsSoon: so does doctor.
func TestDoctorReadsSoon(t *testing.T) {
	t.Parallel()
	for name, routes := range manifoldRoutes {
		t.Run(name, func(t *testing.T) {
			config, _, err := adapt(routes("\t\twechat_event /wx/event\n") + "http://a.example.com {\n\tinvoke a\n}\n")
			if err != nil {
				t.Fatal(err)
			}
			c := doctorConfig{adapted: []byte(config), app: new(App)}
			inTime(t, "the reading", func() {
				if err := c.readHTTP(); err != nil {
					t.Error(err)
				}
			})
			said := slices.ContainsFunc((&doctor{config: c}).checkConfig(t.Context()), func(r doctorResult) bool { return r.Subject == "named_routes" })
			if tooMany := name == "the next after a prefix is taken"; said != tooMany {
				t.Errorf("it says that not all was looked at: %t", said)
			}
			if len(c.sites) == 0 || !slices.ContainsFunc(c.sites[0].handlers, func(h siteHandler) bool {
				return h.name == "wechat_event" && slices.Equal(h.patterns, []string{"/wx/event"})
			}) {
				t.Errorf("the handler was not read: %d sites", len(c.sites))
			}
		})
	}
}
