package caddymodule

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const (
	orderPlatform = "platform " + platformID + " {\nsecret s\ntoken t\naes_key " + platformKey + "\n}\n"
	orderAccount  = "account " + accountID + " {\nsecret s\ntoken t\n}\n"
	orderMessage  = "route /wx/message/* {\nwechat_message\nreverse_proxy 127.0.0.1:9092\n}\n"
	orderLogin    = " {\nbob $2a$14$Zkx19XLiW6VYouLHR5NmfOFU0z2GTNmpkT/5qqR7hx4IjWJPDhjvG\n}\n"
	orderOAuth    = " {\nfunc a https://shop.example.com/\n}\n"
)

// orderOf is what doctor says of the config of a Caddyfile, but for what is green and for the marks of a short config.
func orderOf(t *testing.T, app, sites string) []doctorResult {
	t.Helper()
	file := filepath.Join(t.TempDir(), "Caddyfile")
	writeFile(t, file, "{\nwechat {\n"+app+"}\n}\n"+sites)
	parsed, adapted, _, err := adaptedApp(file, "caddyfile")
	if err != nil {
		t.Fatalf("%s: %v", sites, err)
	}
	d := newDoctor()
	d.config = doctorConfig{file: file, adapted: adapted, app: parsed}
	if err := d.config.readHTTP(); err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(d.checkConfig(t.Context()), func(r doctorResult) bool {
		speaksBoth(t, r.Subject, r.Text)
		return r.Level == doctorGreen || r.Subject == "seal_key" || strings.Contains(r.Text.EN, "明文模式")
	})
}

// TestDoctorOnTakenAddresses: a handler of ours of whose addresses another one of ours takes some is found, and those that share a
// site in peace are let be.
func TestDoctorOnTakenAddresses(t *testing.T) {
	t.Parallel()
	const red, yellow = doctorRed, doctorYellow
	const hosts = " {\nhosts shop.example.com\n}\n"
	for _, tt := range []struct{ site, subject, level, says string }{ // says: empty: nothing
		{orderMessage + "wechat_oauth /wx" + orderOAuth + "wechat_authorize /wx/authorize", "wechat_authorize", red, "is taken by wechat_oauth"},
		{orderMessage + "wechat_oauth /wx/o" + orderOAuth + "wechat_oauth /wx/o" + orderOAuth, "wechat_oauth", red, "/wx/o/authorize/* is taken by wechat_oauth, which comes before it: nothing gets to it"},
		{orderMessage + "wechat_jssdk /wx" + hosts, "wechat_message", red, "/wx/message/* is taken by wechat_jssdk"},
		{orderMessage + "wechat_ready", "wechat_message", red, "stands behind wechat_ready without a path"},
		{"route /wx/message/* {\nwechat_message\nreverse_proxy 127.0.0.1:9092\n}\nroute /ops/* {\nwechat_api\nwechat_console\n}", "wechat_console", red, "/ops/* is taken by wechat_api"},
		{orderMessage + "wechat_event /wx/*", "wechat_message", yellow, "messages come to wechat_event first"},
		{orderMessage + "wechat_event", "wechat_message", yellow, "messages come to wechat_event first"},
		{orderMessage + "basic_auth" + orderLogin, "wechat_message", red, "a login comes before it"},
		{"handle_path /a/* {\nwechat_ready\n}\nroute /a/message/* {\nwechat_message\nreverse_proxy 127.0.0.1:9092\n}", "wechat_message", red, "/a/message/* is taken by wechat_ready"},
		{"route {\nhandle_path /a/* {\nwechat_api\n}\nroute /a/message/* {\nwechat_message\nreverse_proxy 127.0.0.1:9092\n}\n}", "wechat_message", red, "/a/message/* is taken by wechat_api"},

		{orderMessage + "wechat_event /wx/event\nwechat_oauth /wx/thirdParty" + orderOAuth + "wechat_authorize /wx/authorize\nwechat_jssdk /wx/jssdk" + hosts + "wechat_ready /ready", "", "", ""},
		{orderMessage + "wechat_oauth /wx/a" + orderOAuth + "wechat_oauth /wx/ab" + orderOAuth, "", "", ""},
		{orderMessage + "wechat_authorize /wx\nwechat_jssdk /wx/wxjs" + hosts, "", "", ""}, // wx… is an appid to the first, or not its own
		{orderMessage + "basic_auth /admin/*" + orderLogin, "", "", ""},
		{orderMessage + "wechat_event /wx/event\nwechat_event /wx/other", "", "", ""},
		{"handle /a/* {\nwechat_oauth /a" + orderOAuth + "}\nhandle /b/* {\nwechat_oauth /b" + orderOAuth + "}\n" + orderMessage, "", "", ""},
		{"handle_path /a/* {\nwechat_oauth /o" + orderOAuth + "}\nhandle_path /b/* {\nwechat_oauth /o" + orderOAuth + "}\n" + orderMessage, "", "", ""},
		{"handle_path /a/* {\nwechat_event /e\n}\n" + "route /a/message/* {\nwechat_message\nreverse_proxy 127.0.0.1:9092\n}", "", "", ""},
		{"@m header X-New *\nhandle @m {\nwechat_oauth /o" + orderOAuth + "}\nhandle {\nwechat_oauth /o" + orderOAuth + "}\n" + orderMessage, "", "", ""},
		{"@m header X-New *\nroute @m {\nwechat_event\n}\n" + orderMessage, "", "", ""},
		{"@m not path /wx/*\nwechat_event @m\n" + orderMessage, "", "", ""},
		{"wechat_event /wx/*/event\n" + orderMessage, "", "", ""},
	} {
		found := orderOf(t, orderPlatform, "https://wechat.example.com {\n"+tt.site+"\n}\n")
		switch {
		case tt.says == "" && len(found) == 0:
		case tt.says != "" && len(found) == 1 && found[0].Level == tt.level && found[0].Subject == tt.subject+" of https://wechat.example.com" && strings.Contains(found[0].Text.EN, tt.says):
		default:
			t.Errorf("%s:\n%+v, want %s %q of %s", tt.site, found, tt.level, tt.says, tt.subject)
		}
	}
}

// TestDoctorOnTakenAddressesInJSON: a handler that has a base takes no more than what is below it, with a matcher before it or without, as
// somebody writes it who writes JSON by hand.
func TestDoctorOnTakenAddressesInJSON(t *testing.T) {
	t.Parallel()
	const (
		oauth   = `{"handler": "wechat_oauth", "base": "/wx/o", "callback": "/wx/cb", "funcs": [{"key": "a", "prefix": "https://shop.example.com/"}]}`
		jssdk   = `{"handler": "wechat_jssdk", "base": "/wx/jssdk", "hosts": ["shop.example.com"]}`
		grant   = `{"handler": "wechat_authorize", "base": "/wx/authorize"}`
		message = `{"match": [{"path": ["/wx/message/*"]}], "handle": [{"handler": "wechat_message"}, {"handler": "reverse_proxy", "upstreams": [{"dial": "127.0.0.1:1"}]}]}`
		event   = `{"match": [{"path": ["/wx/event"]}], "handle": [{"handler": "wechat_event"}]}`
	)
	route := func(handlers ...string) string { return `{"handle": [` + strings.Join(handlers, ", ") + `]}` }
	at := func(path string, handlers ...string) string {
		return `{"match": [{"path": ["` + path + `"]}], "handle": [` + strings.Join(handlers, ", ") + `]}`
	}
	everything := route(`{"handler": "wechat_event"}`)
	for _, tt := range []struct{ routes, subject, says string }{ // says: empty: nothing
		{route(oauth) + "," + route(jssdk, grant) + "," + event + "," + message + "," + route(`{"handler": "wechat_ready"}`), "", ""},
		{route(grant) + "," + message + "," + event + "," + route(jssdk, oauth), "", ""},
		{at("/wx/*", oauth, jssdk) + "," + event + "," + message, "", ""},
		{route(`{"handler": "subroute", "routes": [` + route(oauth) + "," + event + "," + message + `]}`), "", ""},
		{at("/elsewhere", oauth) + "," + event + "," + message, "", ""},
		{route(`{"handler": "rewrite", "uri": "/wx/jssdk/a"}`) + "," + route(oauth, jssdk) + "," + event + "," + message, "", ""},
		{event + "," + route(oauth) + "," + message + "," + route(oauth), "wechat_oauth", "/wx/o/authorize/* is taken by wechat_oauth, which comes before it: nothing gets to it"},
		{event + "," + at("/wx/o/authorize/*", oauth) + "," + message + "," + route(oauth), "wechat_oauth", "/wx/o/authorize/* is taken by wechat_oauth, which comes before it"},
		{route(strings.Replace(oauth, "/wx/cb", "/wx/message", 1)) + "," + event + "," + message, "wechat_message", "/wx/message/* is taken by wechat_oauth"},
		{event + "," + route(strings.Replace(jssdk, "/wx/jssdk", "/wx", 1)) + "," + message, "wechat_message", "/wx/message/* is taken by wechat_jssdk"},
		{message + "," + everything + "," + route(oauth), "wechat_oauth", "stands behind wechat_event without a path"},
	} {
		d := newDoctor()
		d.config = doctorConfig{file: "caddy.json", app: &App{Platforms: []*Platform{{AppID: platformID}}}, adapted: []byte(
			`{"apps": {"http": {"servers": {"a": {"listen": [":443"], "routes": [{"match": [{"host": ["wechat.example.com"]}], "handle": [{"handler": "subroute", "routes": [` + tt.routes + `]}]}]}}}}}`)}
		if err := d.config.readHTTP(); err != nil {
			t.Fatal(err)
		}
		switch found := d.config.checkHidden(); {
		case tt.says == "" && len(found) == 0:
		case tt.says != "" && len(found) == 1 && found[0].Subject == tt.subject+" of https://wechat.example.com" && strings.Contains(found[0].Text.EN, tt.says):
		default:
			t.Errorf("%s:\n%+v, want %q of %s", tt.routes, found, tt.says, tt.subject)
		}
	}
}

// TestDoctorOnBackendsNeverReached: a backend for other paths than come to a wechat_message is none.
func TestDoctorOnBackendsNeverReached(t *testing.T) {
	t.Parallel()
	for site, alone := range map[string]bool{
		"route /wx/message/* {\nwechat_message\nreverse_proxy /other/* 127.0.0.1:9092\n}":                               true,
		"route /wx/message/* {\nwechat_message\nroute /other/* {\nreverse_proxy 127.0.0.1:9092\n}\n}":                   true,
		"route /wx/message/* {\nwechat_message\nreverse_proxy /wx/* 127.0.0.1:9092\n}":                                  false,
		"route /wx/message/* {\nwechat_message\nreverse_proxy *.php 127.0.0.1:9092\n}":                                  false,
		"route /wx/message/* {\nwechat_message\nreverse_proxy /other/* 127.0.0.1:9092\nreverse_proxy 127.0.0.1:9093\n}": false,
		"route /wx/message/* {\nwechat_message\nrewrite * /other{uri}\nreverse_proxy /other/* 127.0.0.1:9092\n}":        false,
		"handle_path /wx/* {\nroute /message/* {\nwechat_message\nreverse_proxy /message/* 127.0.0.1:9092\n}\n}":        false,
		"route /wx/message/* {\nreverse_proxy /other/* 127.0.0.1:9091\nwechat_message\nreverse_proxy 127.0.0.1:9092\n}": false,
		"uri path_regexp ^/wx /other\nroute /wx/message/* {\nwechat_message\nreverse_proxy /other/* 127.0.0.1:9092\n}":  false,
	} {
		found := orderOf(t, orderPlatform, "https://wechat.example.com {\nwechat_event /wx/event\n"+site+"\n}\n")
		said := slices.ContainsFunc(found, func(r doctorResult) bool { return strings.Contains(r.Text.EN, "get to no backend") })
		if said != alone {
			t.Errorf("%s: %+v", site, found)
		}
	}
}

// TestDoctorOnSemicolons: one at the end of a line, as another server's config has it, is found wherever the grammar lets it pass.
func TestDoctorOnSemicolons(t *testing.T) {
	t.Parallel()
	message := func(proxy string) string { return "route /wx/message/* {\nwechat_message\n" + proxy + "\n}\n" }
	const authorize, oauth, backend = "wechat_authorize /wx/authorize {\nthen ", "wechat_oauth /wx/o {\nfunc a ", "reverse_proxy 127.0.0.1:9092"
	folder := t.TempDir() + "/files;"
	for _, tt := range []struct{ site, subject string }{ // subject: empty: nothing
		{orderMessage + authorize + "https://a.example.com/x;\n}\n", "then https://a.example.com/x;"},
		{orderMessage + authorize + "https://a.example.com/x?a;b=;c\n}\n", ""},
		{orderMessage + oauth + "https://shop.example.com/;\n}\n", "func a https://shop.example.com/;"},
		{orderMessage + oauth + "https://shop.example.com/?from=wechat; {\nonce\n}\n}\n", "func a https://shop.example.com/?from=wechat;"},
		{orderMessage + oauth + "https://shop.example.com/;a/\n}\n", ""},
		{orderMessage + "wechat_verify " + folder + "\n", "folder " + folder},
		{message("reverse_proxy legacy.internal;"), "upstream legacy.internal;:80"},
		{message("reverse_proxy http://legacy.internal;"), "upstream legacy.internal;:80"},
		{message("reverse_proxy legacy.internal;:8080"), "upstream legacy.internal;:8080"},
		{message("reverse_proxy 后端.internal:8080"), ""},
		{message(backend+"\n") + "@a path /a\nreverse_proxy @a other.internal；:80", "upstream other.internal；:80"},
		{"route /wx/message/* {\nwechat_message {\nmirror a.internal;\n}\n" + backend + "\n}\n", "upstream a.internal;:80"},
		// Sockets are files.
		{message("reverse_proxy unix//run/shop;1（一）.sock"), ""},
		{message("reverse_proxy unix+h2c//run/shop;1.sock"), ""},
		{message("reverse_proxy unix//run/shop.sock;"), "upstream unix//run/shop.sock;"},
		{message("reverse_proxy unix.internal;"), "upstream unix.internal;:80"},
		{"route /wx/message/* {\nwechat_message {\nmirror unix//run/a；b.sock\n}\n" + backend + "\n}\n", ""},
		{orderMessage + "wechat_verify {\nfile MP_verify_a.txt a;\n}\n", "file MP_verify_a.txt"},
		{orderMessage + "wechat_verify {\nfile MP_verify_a.txt a;b\n}\n", ""},
	} {
		found := orderOf(t, orderPlatform, "https://wechat.example.com, https://www.example.com {\nwechat_event /wx/event\n"+tt.site+"\n}\n")
		found = slices.DeleteFunc(found, func(r doctorResult) bool { return strings.HasPrefix(r.Subject, "/") }) // whether the folder is there
		switch {
		case tt.subject == "" && len(found) == 0:
		case tt.subject != "" && len(found) == 1 && found[0].Level == doctorRed && found[0].Subject == tt.subject && strings.Contains(found[0].Text.EN, "semicolon"):
		default:
			t.Errorf("%s:\n%+v, want %q", tt.site, found, tt.subject)
		}
	}
}

// TestDoctorOnSemicolonsInOptions: so it is in the global options.
func TestDoctorOnSemicolonsInOptions(t *testing.T) {
	t.Parallel()
	const key = "0123456789abcdef0123456789abcdef"
	for _, tt := range []struct{ option, subject, level string }{
		{"spill /var/lib/spill", "", ""},
		{"spill /var/lib/spill;", "spill /var/lib/spill;", doctorRed},
		{"client a {\nkey " + key + "\nappids *\n}", "", ""},
		{"client a {\nkey a;" + key + "\nappids *\n}", "", ""},
		{"client a {\nkey " + key + " b" + key + ";\nappids *\n}", "client a", doctorYellow},
	} {
		found := orderOf(t, orderPlatform+tt.option+"\n", "https://wechat.example.com {\nwechat_event /wx/event\n"+orderMessage+"}\n")
		switch {
		case tt.subject == "" && len(found) == 0:
		case tt.subject != "" && len(found) == 1 && found[0].Level == tt.level && found[0].Subject == tt.subject && strings.Contains(found[0].Text.EN, "semicolon") &&
			!strings.Contains(found[0].Text.EN, key):
		default:
			t.Errorf("%s:\n%+v, want %q", tt.option, found, tt.subject)
		}
	}
}

// TestDoctorOnReach: what cannot be right with names, ports and accounts is found without the network.
func TestDoctorOnReach(t *testing.T) {
	t.Parallel()
	const red, yellow, event = doctorRed, doctorYellow, "wechat_event /wx/event\n"
	const proxy = "reverse_proxy 127.0.0.1:9092\n"
	for _, tt := range []struct{ app, sites, subject, level, says string }{ // says: empty: nothing
		{orderPlatform, "wechat.example.com ｛\n" + event + orderMessage + "}\n", "site ｛", red, "no host has '｛' in its name"},
		{orderPlatform, "wechat.example.com，www.example.com {\n" + event + orderMessage + "}\n", "site wechat.example.com，www.example.com", red, "no host has '，'"},
		{orderPlatform, "https://微信.example.com {\n" + event + orderMessage + "}\n", "", "", ""},
		{orderPlatform, "wechat.example.com {\nwechat_event /wx/event;\n" + orderMessage + "}\n", "path /wx/event;", yellow, "a semicolon"},
		{orderPlatform, "wechat.example.com:8443 {\n" + event + orderMessage + "}\n", "site https://wechat.example.com:8443", yellow, "ports 80 and 443 alone"},
		{orderPlatform, "i❤.example.com, 👍🏽.example.com, l·l.example.com, 日本・語.example.com {\n" + event + orderMessage + "}\n", "", "", ""},
		{orderPlatform, "wechat。example.com {\n" + event + orderMessage + "}\n", "site wechat。example.com", red, "no host has '。'"},
		{orderPlatform, "wechat.example.com, https://wechat.example.com:8443 {\n" + event + orderMessage + "}\n", "", "", ""},
		{orderPlatform, "wechat.example.com, https://www.example.com:8443 {\n" + event + orderMessage + "}\n", "site https://www.example.com:8443", yellow, "ports 80 and 443 alone"},
		{orderPlatform + "}\nhttp_port 8080\nhttps_port 8443\nservers {\n", "http://wechat.example.com, https://www.example.com {\n" + event + orderMessage + "}\n", "", "", ""},
		{orderPlatform, "http://wechat.example.com {\n" + event + orderMessage + "}\n", "", "", ""},
		{orderPlatform, "http://localhost:8080 {\n" + event + orderMessage + "}\n", "", "", ""},
		{orderPlatform, "wechat.example.com {\n" + proxy + "}\n", "wechat_event", yellow, "no ticket comes to this gateway"},
		{orderPlatform, "wechat.example.com {\n" + event + proxy + "}\n", "", "", ""},
		{orderPlatform, "wechat.example.com {\n" + orderMessage + "}\n", "", "", ""}, // which takes events too
		{orderPlatform, "http://:8090 {\nbind 127.0.0.1\nwechat_api\n}\n", "", "", ""},
		{orderAccount, "wechat.example.com {\n" + proxy + "}\n", "account " + accountID, yellow, "no site has wechat_message"},
		{orderAccount, "wechat.example.com {\n" + orderMessage + "}\n", "", "", ""},
		{orderAccount, "wechat.example.com {\nroute /wx/* {\nwechat_message wx9999999999999999\n" + proxy + "}\n}\n", "wechat_message of https://wechat.example.com", red, "no account of that appid with a token"},
		{orderAccount, "wechat.example.com {\nroute /wx/message/wx9999999999999999 {\nwechat_message\n" + proxy + "}\n}\n", "wechat_message of https://wechat.example.com", red, "it is for wx9999999999999999"},
		{orderAccount, "wechat.example.com {\nroute /wx/message/" + accountID + " {\nwechat_message\n" + proxy + "}\n}\n", "", "", ""},
		{orderPlatform, "wechat.example.com {\n" + event + "route /wx/message/wx9999999999999999 {\nwechat_message\n" + proxy + "}\n}\n", "", "", ""}, // an authorizer
	} {
		found := orderOf(t, tt.app, tt.sites)
		switch {
		case tt.says == "" && len(found) == 0:
		case tt.says != "" && len(found) == 1 && found[0].Level == tt.level && found[0].Subject == tt.subject && strings.Contains(found[0].Text.EN, tt.says):
		default:
			t.Errorf("%s:\n%+v, want %s %q of %s", tt.sites, found, tt.level, tt.says, tt.subject)
		}
	}
}

// TestDoctorNamesAllWrongValues: one value that is missing hides no other that is wrong, and of what is wrong is not said that it
// resolves.
func TestDoctorNamesAllWrongValues(t *testing.T) {
	t.Setenv("ALL_LONG", strings.Repeat("a", 44))
	t.Setenv("ALL_BLANK", "a b")
	t.Setenv("ALL_SEAL", "short")
	p := newPatient(t)
	p.offline = true
	platform := p.part("apps/wechat/platforms/0")
	platform["secret"], platform["tokens"], platform["aes_keys"] = "{env.ALL_BLANK}", []any{"{env.ALL_NOTHING}"}, []any{"{env.ALL_LONG}", "{env.ALL_BLANK}"}
	p.part("apps/wechat")["seal_keys"] = []any{"{env.ALL_SEAL}"}
	said := ""
	for _, r := range p.examine(t).of("placeholders") {
		if r.Level == doctorRed {
			said += r.Subject + ": " + r.Text.EN + "\n"
		} else if strings.Contains(r.Text.EN, "ALL_") {
			t.Errorf("%s: %s", r.Level, r.Text.EN)
		}
	}
	for _, want := range []string{
		"secret: {env.ALL_BLANK}: it has a space", "token: {env.ALL_NOTHING} resolves to nothing", "aes_key 1: aes key has 44 characters", "aes_key 2: aes key has 3 characters",
		"seal_key: {env.ALL_SEAL}: it is not 32 bytes",
	} {
		if strings.Count(said, want) != 1 {
			t.Errorf("%q is not said once:\n%s", want, said)
		}
	}
}

// TestDoctorOnLoadErrors: what Caddy was about when a module failed is left out, for it hides what is to be mended.
func TestDoctorOnLoadErrors(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"loading http app module: provision http: server srv0: setting up route handlers: route 0: loading handler modules: position 0: loading module 'wechat_event': provision http.handlers.wechat_event: loading wechat app module: provision wechat: account wx2: secret: is missing": "wechat: account wx2: secret: is missing",
		"loading http app module: provision http: server srv0: setting up route handlers: route 0: loading handler modules: position 0: loading module 'wechat_event': provision http.handlers.wechat_event: needs the global option wechat":                                               "wechat_event: needs the global option wechat",
		"loading wechat app module: provision wechat: account wx2: secret: is missing": "wechat: account wx2: secret: is missing",
		"something else": "something else",
	} {
		if got := withoutWay(text); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
