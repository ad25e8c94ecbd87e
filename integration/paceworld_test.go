package integration_test

import (
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// secondPlatform is another platform whose messages come to the same address.
const secondPlatform = "wx4444444444444444"

// paceSite is what a test of WeChat's pace adds to a gateway: routes, and plain accounts whose pushes go to them.
type paceSite struct {
	routes   []paceRoute
	accounts []paceAccount
}

// paceRoute is the folder /wx/<name>/: wechat_message with some options, and the backend.
type paceRoute struct {
	name    string
	options []string // lines of the wechat_message block
	backend string   // default: the world's own
	proxy   []string // lines of the reverse_proxy block
}

// paceAccount is a plain account. Its push credentials are made up.
type paceAccount struct {
	appid  string
	mode   wxsim.Mode // default: safe
	format wxsim.Format
	route  string
	tls    bool // WeChat pushes over https

	token, key string
}

// newKey makes an EncodingAESKey.
func newKey() string { return (rand.Text() + rand.Text())[:43] }

// caddyfile is the configuration: two platforms with a second set of credentials each, the accounts and the routes.
func (s *paceSite) caddyfile() string {
	var accounts, routes strings.Builder
	for _, a := range s.accounts {
		fmt.Fprintf(&accounts, "\t\taccount %s {\n\t\t\tsecret {env.SECRET_%[1]s}\n\t\t\ttoken {env.TOKEN_%[1]s}\n", a.appid)
		if a.key != "" {
			fmt.Fprintf(&accounts, "\t\t\taes_key {env.KEY_%s}\n", a.appid)
		}
		fmt.Fprintf(&accounts, "\t\t\tmode %s\n\t\t}\n", a.mode)
	}
	for _, r := range s.routes {
		backend := r.backend
		if backend == "" {
			backend = "{$WECHAT_BACKEND}"
		}
		fmt.Fprintf(&routes, "\troute /wx/%s/* {\n\t\twechat_message {\n%s\t\t}\n\t\treverse_proxy %s {\n%s\t\t}\n\t}\n",
			r.name, block(r.options), backend, block(r.proxy))
	}
	return `{
	http_port {$WECHAT_HTTP_PORT}
	https_port {$WECHAT_HTTPS_PORT}
	admin {$WECHAT_ADMIN}
	skip_install_trust
	auto_https disable_redirects
	log {
		level {$WECHAT_LOG_LEVEL}
	}

	wechat {
		platform ` + integration.PlatformID + ` {
			secret {env.WECHAT_PLATFORM_SECRET}
			token {env.WECHAT_PLATFORM_TOKEN} {env.PUBLISHED_TOKEN}
			aes_key {env.WECHAT_PLATFORM_AES_KEY} {env.PUBLISHED_KEY}
		}
		platform ` + secondPlatform + ` {
			secret {env.SECOND_SECRET}
			token {env.SECOND_TOKEN} {env.SECOND_PUBLISHED_TOKEN}
			aes_key {env.SECOND_KEY} {env.SECOND_PUBLISHED_KEY}
		}
` + accounts.String() + `		client crm {
			key {env.CRM_KEY}
			appids *
		}
		seal_key {env.WECHAT_SEAL_KEY}
		api {$WECHAT_API}
	}
}

(routes) {
	wechat_event /wx/event
` + routes.String() + `}

{$WECHAT_HOST} {
	tls internal
	import routes
}

http://{$WECHAT_HOST} {
	import routes
}
`
}

func block(lines []string) string {
	var b strings.Builder
	for _, line := range lines {
		b.WriteString("\t\t\t" + line + "\n")
	}
	return b.String()
}

// newPaceWorld starts a gateway with a site, on which both platforms push to the route named message, and a simulated
// WeChat that does nothing strange. It pushes over http where nothing else is said: with the race detector, handshakes
// would be most of the work.
func newPaceWorld(t *testing.T, site *paceSite, configure func(*integration.World)) (*integration.World, *scripted) {
	t.Helper()
	backend := newScripted()
	env := map[string]string{
		"PUBLISHED_TOKEN": rand.Text(), "PUBLISHED_KEY": newKey(),
		"SECOND_SECRET": rand.Text(), "SECOND_TOKEN": rand.Text(), "SECOND_KEY": newKey(),
		"SECOND_PUBLISHED_TOKEN": rand.Text(), "SECOND_PUBLISHED_KEY": newKey(),
	}
	w := newWorld(t, func(w *integration.World) {
		polite(w)
		w.Config.Pace.Timeout = wechatWait + patience
		w.Backend = &integration.Backend{Answer: backend.ServeHTTP}
		w.Config.Platforms = []wxsim.Platform{{AppID: integration.PlatformID}, {
			AppID: secondPlatform, Secret: env["SECOND_SECRET"], Token: env["SECOND_TOKEN"], AESKey: env["SECOND_KEY"],
		}}
		for i := range site.accounts {
			a := &site.accounts[i]
			a.token = rand.Text()
			if a.mode == "" {
				a.mode = wxsim.ModeSafe
			}
			if a.mode != wxsim.ModePlain {
				a.key = newKey()
			}
			secret := rand.Text()
			env["SECRET_"+a.appid], env["TOKEN_"+a.appid], env["KEY_"+a.appid] = secret, a.token, a.key
			w.Config.Accounts = append(w.Config.Accounts, wxsim.Account{
				AppID: a.appid, Secret: secret, Token: a.token, AESKey: a.key, Mode: a.mode, Format: a.format,
			})
		}
		for name, value := range env {
			w.Env = append(w.Env, name+"="+value)
		}
		w.Caddyfile = filepath.Join(t.TempDir(), "Caddyfile")
		if err := os.WriteFile(w.Caddyfile, []byte(site.caddyfile()), 0o600); err != nil {
			t.Fatal(err)
		}
		if configure != nil {
			configure(w)
		}
	})
	t.Cleanup(func() { close(backend.over) }) // before the gateway is stopped
	for _, id := range []string{integration.PlatformID, secondPlatform} {
		w.WeChat.SetURLs(id, w.HTTPURL("/wx/event"), w.HTTPURL("/wx/message/$APPID$"))
	}
	for _, a := range site.accounts {
		url := w.HTTPURL
		if a.tls {
			url = w.URL
		}
		w.WeChat.SetMessageURL(a.appid, url("/wx/"+a.route+"/"+a.appid))
	}
	return w, backend
}

// published are the credentials of a platform's published configuration, while those that WeChat has are the test one's.
func published(w *integration.World, platform string) *wxsim.PushKeys {
	token, key := "PUBLISHED_TOKEN", "PUBLISHED_KEY"
	if platform == secondPlatform {
		token, key = "SECOND_PUBLISHED_TOKEN", "SECOND_PUBLISHED_KEY"
	}
	return &wxsim.PushKeys{Token: setting(w, token), AESKey: setting(w, key)}
}

// setting is one of the gateway's environment variables.
func setting(w *integration.World, name string) string {
	for _, e := range w.Env {
		if value, ok := strings.CutPrefix(e, name+"="); ok {
			return value
		}
	}
	return ""
}
