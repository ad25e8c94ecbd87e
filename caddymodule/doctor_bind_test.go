package caddymodule

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestDoctorOnBinds: a site for apps or for who runs the gateway, whose bind or whose address does not do what it seems to, is found, and
// those that are alone where they listen are let be.
func TestDoctorOnBinds(t *testing.T) {
	t.Parallel()
	const (
		visited = "wechat_event /wx/event\n" + orderMessage
		wechat  = "wechat.example.com {\n" + visited + "}\n"
		api     = "https://api.weixin.qq.com"
		behind  = "http://wechat.example.com:8081 {\nbind 127.0.0.1\n" + visited + "}\nhttp://wechat.example.com {\n" + visited + "}\n" // a proxy
	)
	for _, tt := range []struct{ sites, subject, says string }{ // says: empty: nothing
		// In the way of the others.
		{wechat + "api.weixin.qq.com {\ntls internal\nbind 10.0.0.5\nwechat_api\n}\n", api, "all that comes to 10.0.0.5:443 comes to it, and not to https://wechat.example.com, which"},
		{"api.weixin.qq.com {\ntls internal\nbind 127.0.0.1 10.0.0.5\nwechat_api\n}\n" + wechat, api, "all that comes to 10.0.0.5:443 comes to it"},
		{"api.weixin.qq.com {\ntls internal\nbind 127.0.0.1 203.0.113.5\nwechat_api\n}\n" + wechat, api, "all that comes to 203.0.113.5:443 comes to it"},
		{"wechat.example.com {\nbind 0.0.0.0\n" + visited + "}\nadmin.example.com {\nbind fd00::5\nwechat_console\n}\n", "https://admin.example.com", "all that comes to [fd00::5]:443 comes to it"},
		{"http://wechat.example.com {\n" + visited + "}\nhttp:// {\nbind 10.0.0.5\nwechat_api\n}\n", "http://10.0.0.5", "all that comes to 10.0.0.5:80 comes to it"},
		// In their reach.
		{"wechat.example.com {\nbind 10.0.0.5\n" + visited + "}\napi.weixin.qq.com {\ntls internal\nbind 10.0.0.5\nwechat_api\n}\n", api, "it listens on 10.0.0.5:443 with https://wechat.example.com"},
		{"wechat.example.com {\nbind 10.0.0.5 203.0.113.5\n" + visited + "}\nhttps:// {\ntls internal\nbind 10.0.0.5\nwechat_console\n}\n", "https://10.0.0.5", "it listens on 10.0.0.5:443 with https://wechat.example.com"},
		{"wechat.example.com {\nbind 10.0.0.5 203.0.113.5\n" + visited + "}\nhttps:// {\ntls internal\nbind 203.0.113.5\nwechat_console\n}\n", "https://203.0.113.5", "it listens on 203.0.113.5:443 with https://wechat.example.com"},
		{behind + "http://:8081 {\nbind 127.0.0.1\nwechat_api\n}\n", "http://127.0.0.1:8081", "it listens on 127.0.0.1:8081 with http://wechat.example.com:8081"},
		// Addresses that are Hosts alone.
		{wechat + "http://127.0.0.1:8090 {\nwechat_api\n}\n", "http://127.0.0.1:8090", "the Host that it answers"},
		{wechat + "http://localhost:2020 {\nwechat_console\n}\n", "http://localhost:2020", "the Host that it answers"},
		{wechat + "http://169.254.10.5:8090 {\nwechat_api\n}\n", "http://169.254.10.5:8090", "the Host that it answers"},
		{wechat + "http://10.0.0.5:8090 {\nbind 0.0.0.0\nwechat_api\n}\n", "http://10.0.0.5:8090", "the Host that it answers"},

		{wechat + "api.weixin.qq.com {\ntls internal\nwechat_api\n}\n", "", ""}, // beside the others, and with no bind to rely on
		{wechat + "api.weixin.qq.com {\ntls internal\nbind 127.0.0.1 ::1\nwechat_api\n}\n", "", ""},
		{wechat + "api.weixin.qq.com {\ntls internal\nbind {env.WECHAT_TEST_BIND}\nwechat_api\n}\n", "", ""}, // nobody knows which address
		{wechat + "http://:8090 {\nbind 10.0.0.5\nwechat_api\n}\n", "", ""},
		{wechat + "http://:8090 {\nwechat_api\n}\n", "", ""},
		{wechat + "http://gateway.internal:8090 {\nwechat_api\n}\n", "", ""},
		{"wechat.example.com {\nbind 203.0.113.5\n" + visited + "}\napi.weixin.qq.com {\ntls internal\nbind 10.0.0.5\nwechat_api\n}\n", "", ""},
		{wechat + "http://:8090 {\nbind 10.0.0.5\nwechat_api\n}\nhttp://:2020 {\nbind 10.0.0.5\nwechat_console\n}\n", "", ""},
		{wechat + "http://gw.internal:8090 {\nbind 10.0.0.5\nwechat_api\n}\nhttp://admin.internal:8090 {\nbind 10.0.0.5\nwechat_console\n}\n", "", ""},
		{"wechat.example.com {\nbind 10.0.0.5\n" + visited + "wechat_api /api/*\n}\n", "", ""}, // it is one site
		{wechat + "http://localhost:8080 {\nwechat_ready\n}\n", "", ""},
		{wechat + "http://:8090 {\nbind unix//run/wechat.sock\nwechat_api\n}\n", "", ""},
		{behind + "http://:8090 {\nbind 127.0.0.1 ::1\nwechat_api\n}\n", "", ""},
	} {
		found := orderOf(t, orderPlatform, tt.sites)
		switch {
		case tt.says == "" && len(found) == 0:
		case tt.says != "" && len(found) == 1 && found[0].Level == doctorYellow && found[0].Subject == "site "+tt.subject && strings.Contains(found[0].Text.EN, tt.says):
		default:
			t.Errorf("%s:\n%+v, want %q of %s", tt.sites, found, tt.says, tt.subject)
		}
	}
}

// TestDoctorOnBindsOfDocuments: no configuration that we show is one to warn of.
func TestDoctorOnBindsOfDocuments(t *testing.T) {
	t.Parallel()
	const app = "{\nwechat {\n" + orderPlatform + "client crm {\nkey 0123456789abcdef\nappids *\n}\n}\n}\n"
	block := regexp.MustCompile("(?s)```caddyfile\n(.*?)```")
	texts := make(map[string]string)
	read := func(name string) string {
		text, err := os.ReadFile(filepath.Join("..", name))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	texts["Caddyfile.example"] = read("Caddyfile.example")
	texts["Caddyfile.example, and WeChat's host"] = texts["Caddyfile.example"] + block.FindStringSubmatch(read("docs/sdk.md"))[1]
	docs, err := filepath.Glob("../docs/*.md")
	if err != nil || len(docs) == 0 {
		t.Fatal(docs, err)
	}
	for _, doc := range append([]string{"../README.md"}, docs...) {
		for _, m := range block.FindAllStringSubmatch(read(strings.TrimPrefix(doc, "../")), -1) {
			if text := m[1]; strings.HasPrefix(text, "{\n") {
				texts[doc+" "+text] = text
			} else {
				texts[doc+" "+text] = app + text
			}
		}
	}
	binds := 0
	for name, text := range texts {
		file := filepath.Join(t.TempDir(), "Caddyfile")
		writeFile(t, file, text)
		parsed, adapted, _, err := adaptedApp(file, "caddyfile")
		if err != nil {
			if strings.Contains(text, "bind ") {
				t.Errorf("%s: %v", name, err)
			}
			continue // a part
		}
		c := doctorConfig{file: file, adapted: adapted, app: parsed}
		if err := c.readHTTP(); err != nil {
			t.Fatal(err)
		}
		if found := c.checkBinds(); len(found) > 0 {
			t.Errorf("%s:\n%+v", name, found)
		}
		binds += strings.Count(text, "bind ")
	}
	if binds < 10 {
		t.Errorf("only %d binds were looked at", binds)
	}
}
