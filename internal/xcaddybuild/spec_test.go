package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestProxiesThenOff(t *testing.T) {
	t.Parallel()
	tests := []struct{ name, goproxy, want string }{
		{"usual list", "https://proxy.example,direct\n", "https://proxy.example|off"},
		{"several", "https://a.example,https://b.example|https://c.example,direct", "https://a.example,https://b.example|https://c.example|off"},
		{"direct in the middle", "https://a.example,direct|https://b.example", "https://a.example,https://b.example|off"},
		{"ends in off already", "https://a.example,off", "https://a.example|off"},
		{"one proxy", "https://a.example", "https://a.example|off"},
		{"direct first", "direct,https://a.example", "https://a.example|off"},
		{"direct alone", "direct", "off"},
		{"empty", "\n", "off"},
		{"spaces", " https://a.example , direct ", "https://a.example|off"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got := proxiesThenOff(tt.goproxy); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestBuildArgs(t *testing.T) {
	t.Parallel()
	s := spec{
		CaddyVersion: "v2.1.0",
		Plugins:      []plugin{{ModulePath: "example.test/ours", Version: "v1.0.0"}, {ModulePath: "example.test/other", Version: "v3.0.0"}},
		Replacements: []replacement{{Old: "example.test/dep", New: "example.test/fork@v0.1.0"}},
	}
	want := []string{
		"build", "v2.1.0", "--output", "out/caddy",
		"--with", "example.test/ours=.", "--with", "example.test/other@v3.0.0",
		"--replace", "example.test/dep=example.test/fork@v0.1.0",
	}
	if got := s.buildArgs(".", "out/caddy"); !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func TestMissingModules(t *testing.T) {
	t.Parallel()
	listing := "admin.api.load\n\n  Standard modules: 1\n\nwechat\nhttp.handlers.wechat_api\n"
	got := missingModules(listing, []string{"wechat", "http.handlers.wechat", "http.handlers.wechat_api"})
	if !slices.Equal(got, []string{"http.handlers.wechat"}) {
		t.Errorf("got %q", got)
	}
}

func TestReadSpecRefuses(t *testing.T) {
	t.Parallel()
	const rest = `"plugins":[{"module_path":"example.test/ours"}],"modules":["wechat"]`
	tests := []struct{ name, text, says string }{
		{"misspelt field", `{"caddy_versoin":"v2.1.0",` + rest + `}`, "unknown field"},
		{"no version", `{` + rest + `}`, "caddy_version"},
		{"no plugin", `{"caddy_version":"v2.1.0","modules":["wechat"]}`, "plugins"},
		{"no module", `{"caddy_version":"v2.1.0","plugins":[{"module_path":"example.test/ours"}]}`, "modules"},
		{"two values", `{"caddy_version":"v2.1.0",` + rest + `} {}`, "more than one"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "xcaddy.json")
			if err := os.WriteFile(path, []byte(tt.text), 0o644); err != nil {
				t.Fatal(err)
			}
			if _, err := readSpec(path); err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got error %v, want one that says %q", err, tt.says)
			}
		})
	}
}
