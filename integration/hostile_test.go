package integration_test

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// TestForgedPushes sends what WeChat never would to a gateway process: each is refused with the right status, one log
// line and a counter, and the backend sees nothing.
func TestForgedPushes(t *testing.T) {
	t.Parallel()
	w := newWorld(t, polite)
	const marker = "forged-content"
	tests := []struct {
		name   string
		m      wxsim.Message
		status int
	}{
		{"wrong signature", wxsim.Message{Tamper: func(o *wxsim.Outgoing) { o.Set("msg_signature", strings.Repeat("0", 40)) }}, 403},
		{"missing signature", wxsim.Message{Tamper: func(o *wxsim.Outgoing) { o.Delete("msg_signature") }}, 403},
		{"empty signature", wxsim.Message{Tamper: func(o *wxsim.Outgoing) { o.Set("msg_signature", "") }}, 403},
		{"no query", wxsim.Message{Tamper: func(o *wxsim.Outgoing) { o.Query = nil }}, 400},
		{"stale", wxsim.Message{Skew: -10 * time.Minute}, 403},
		{"future", wxsim.Message{Skew: 10 * time.Minute}, 403},
		{"wrong receive id", wxsim.Message{Keys: keysOf(w, integration.AuthorizerID)}, 403},
		{"wrong key", wxsim.Message{Keys: &wxsim.PushKeys{Token: w.Secret("WECHAT_PLATFORM_TOKEN"), AESKey: strings.Repeat("a", 43)}}, 403},
		{"body cut short", wxsim.Message{Tamper: func(o *wxsim.Outgoing) { o.Body = o.Body[:len(o.Body)/2] }}, 400},
		{"one byte changed", wxsim.Message{Tamper: func(o *wxsim.Outgoing) {
			i := strings.Index(string(o.Body), "<Encrypt>") + len("<Encrypt><![CDATA[") + 20
			if o.Body[i] == 'A' {
				o.Body[i] = 'B'
			} else {
				o.Body[i] = 'A'
			}
		}}, 403},
		{"url-safe base64", wxsim.Message{Tamper: func(o *wxsim.Outgoing) {
			o.Body = []byte(strings.NewReplacer("+", "-", "/xml", "/xml", "/Enc", "/Enc", "/To", "/To", "/", "_").Replace(string(o.Body)))
		}}, 0},
		{"DOCTYPE", wxsim.Message{Tamper: func(o *wxsim.Outgoing) {
			o.Body = append([]byte(`<!DOCTYPE a [<!ENTITY b "c">]>`), o.Body...)
		}}, 400},
		{"repeated Encrypt", wxsim.Message{Tamper: func(o *wxsim.Outgoing) {
			text := string(o.Body)
			from, to := strings.Index(text, "<Encrypt>"), strings.Index(text, "</Encrypt>")+len("</Encrypt>")
			o.Body = []byte(text[:to] + text[from:to] + text[to:])
		}}, 400},
		{"8 MiB", wxsim.Message{Tamper: func(o *wxsim.Outgoing) { o.Body = make([]byte, 8<<20) }}, 413},
		{"plaintext", wxsim.Message{Tamper: func(o *wxsim.Outgoing) {
			o.Body = []byte("<xml><FromUserName>o</FromUserName><MsgType>text</MsgType><Content>" + marker + "</Content></xml>")
		}}, 403},
		{"another account's path", wxsim.Message{Platform: "-", AppID: integration.AccountID, Tamper: func(o *wxsim.Outgoing) {
			o.URL = strings.Replace(o.URL, integration.AccountID, "wx8888888888888888", 1)
		}}, 403},
		{"method", wxsim.Message{Tamper: func(o *wxsim.Outgoing) { o.Method = http.MethodPut }}, 405},
	}
	for _, tt := range tests {
		m := tt.m
		m.Content, m.Attempts = marker, 1
		switch m.Platform {
		case "":
			m.Platform, m.AppID = integration.PlatformID, integration.AuthorizerID
		case "-":
			m.Platform = ""
		}
		logged := strings.Count(w.Gateway.Log(), `"push refused"`)
		result, err := w.WeChat.PushMessage(t.Context(), m)
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		got := result.Last().Status
		if tt.status == 0 && (got == 400 || got == 403) {
			got = 0
		}
		if got != tt.status {
			t.Errorf("%s: status %d, want %d: %s", tt.name, result.Last().Status, tt.status, result.Last().Body)
		}
		eventually(t, tt.name+": a log line", func() error {
			if n := strings.Count(w.Gateway.Log(), `"push refused"`); n != logged+1 {
				return fmt.Errorf("%d lines", n-logged)
			}
			return nil
		})
		if n := len(w.Backend.Received()); n != 0 {
			t.Fatalf("%s reached the backend", tt.name)
		}
	}
	if strings.Contains(w.Gateway.Log(), marker) {
		t.Error("a push's content was logged")
	}
	_, metrics := fetch(t, plainClient, http.MethodGet, "http://"+w.Admin+"/metrics", nil, "")
	total := 0
	for _, m := range regexp.MustCompile(`caddy_wechat_pushes_total\{endpoint="message",result="(\w+)"\} (\d+)`).FindAllStringSubmatch(metrics, -1) {
		var n int
		_, _ = fmt.Sscan(m[2], &n)
		total += n
	}
	if total != len(tests) {
		t.Errorf("%d pushes counted, want %d", total, len(tests))
	}
	// A good one still goes through.
	result, err := w.WeChat.PushMessage(t.Context(), wxsim.Message{Platform: integration.PlatformID, AppID: integration.AuthorizerID, Content: "good"})
	if err != nil || result.UserSaw != "收到：good" {
		t.Errorf("%q %s %v", result.UserSaw, result.Wrong, err)
	}
}

func keysOf(w *integration.World, receiveID string) *wxsim.PushKeys {
	return &wxsim.PushKeys{Token: w.Secret("WECHAT_PLATFORM_TOKEN"), AESKey: w.Secret("WECHAT_PLATFORM_AES_KEY"), ReceiveID: receiveID}
}

// TestHostileCalls goes against the API listener of a gateway process.
func TestHostileCalls(t *testing.T) {
	t.Parallel()
	w := newWorld(t, polite)
	if status, body := call(t, w, http.MethodGet, "/"+integration.AuthorizerID+"/cgi-bin/user/info?openid=o", bearer(w), ""); !strings.Contains(body, "61003") && !strings.Contains(body, "61005") {
		t.Errorf("before any ticket: %d %s", status, body)
	}
	authorize(t, w)
	other := func(change func(http.Header)) http.Header {
		h := bearer(w)
		change(h)
		return h
	}
	before := len(w.WeChat.Journal().Entries())
	for _, tt := range []struct {
		name, path string
		header     http.Header
		status     int
		contains   string
	}{
		{"no key", "/" + integration.AuthorizerID + "/cgi-bin/user/info", nil, 401, ""},
		{"wrong key", "/" + integration.AuthorizerID + "/cgi-bin/user/info", http.Header{"Authorization": {"Bearer nobody"}}, 401, ""},
		{"no appid", "/cgi-bin/user/info", bearer(w), 0, ""},
		{"appid not allowed", "/wx8888888888888888/cgi-bin/user/info", bearer(w), 0, ""},
		{"platform not named", "/" + integration.PlatformID + "/cgi-bin/component/api_create_preauthcode", bearer(w), 0, ""},
		{"traversal", "/" + integration.AuthorizerID + "/cgi-bin/../cgi-bin/user/info", bearer(w), 400, ""},
		{"encoded traversal", "/" + integration.AuthorizerID + "/cgi-bin/%2e%2e/token", bearer(w), 400, ""},
		{"encoded slash", "/" + integration.AuthorizerID + "/cgi-bin%2fuser/info", bearer(w), 400, ""},
		{"burning path", "/" + integration.AuthorizerID + "/cgi-bin/component/api_query_auth", bearer(w), 0, ""},
		{"forged opaque token", "/cgi-bin/user/info?access_token=" + strings.Repeat("A", 120), nil, 200, "40001"},
		{"wrong key as secret", "/cgi-bin/token?grant_type=client_credential&appid=" + integration.AuthorizerID + "&secret=wrong", nil, 200, "40125"},
		{"unknown appid for a token", "/cgi-bin/token?grant_type=client_credential&appid=wx8888888888888888&secret=" + w.ClientKey, nil, 200, "errcode"},
		{"loopback is not trusted by itself", "/" + integration.AuthorizerID + "/cgi-bin/user/info", other(func(h http.Header) { h.Del("Authorization") }), 401, ""},
	} {
		status, body := call(t, w, http.MethodGet, tt.path, tt.header, "")
		if (tt.status != 0 && status != tt.status) || !strings.Contains(body, tt.contains) || !strings.Contains(body, "errcode") {
			t.Errorf("%s: %d %s", tt.name, status, body)
		}
		checkNoSecrets(t, w, tt.name, body)
	}
	if got := w.WeChat.Journal().Entries()[before:]; len(got) > 0 {
		t.Errorf("WeChat saw %s %s", got[0].Method, got[0].Path)
	}
	checkViolations(t, w)
}

// behindProxy is a Caddyfile whose servers believe a proxy on this machine who the visitor is.
func behindProxy(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	const options = "\n{\n"
	if strings.Count(string(text), options) != 1 {
		t.Fatalf("%s: no global options", file)
	}
	changed := filepath.Join(t.TempDir(), "Caddyfile")
	if err := os.WriteFile(changed, []byte(strings.Replace(string(text), options, options+"servers {\ntrusted_proxies static 127.0.0.1/8 ::1\ntrusted_proxies_strict\n}\n", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	return changed
}

// TestHostileLogins goes against the OAuth callback of a gateway process.
func TestHostileLogins(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(w *integration.World) {
		polite(w)
		w.Caddyfile = behindProxy(t, w.Caddyfile)
	})
	authorize(t, w)
	client := httpsClient(t, w)
	base := "/wx/thirdParty/authUserReceive/" + integration.PlatformID
	for _, tt := range []struct{ name, path string }{
		{"unknown funcKey", base + "/nothing?code=c&appid=" + integration.AuthorizerID},
		{"no code", base + "/scan?appid=" + integration.AuthorizerID + "&state=s"},
		{"made-up code", base + "/scan?code=made-up&appid=" + integration.AuthorizerID},
		{"redirect target of the caller's", base + "/scan?code=x&redirect_uri=https://evil.example&appid=" + integration.AuthorizerID},
		{"unknown account", base + "/scan?code=x&appid=wx8888888888888888"},
		{"target in the path", base + "/https:%2f%2fevil.example?code=x&appid=" + integration.AuthorizerID},
		{"start for nobody", "/wx/thirdParty/authorize/evil/scan"},
	} {
		resp, body := fetch(t, client, http.MethodGet, w.URL(tt.path), http.Header{"Accept-Language": {"en"}}, "")
		if resp.StatusCode < 400 || resp.Header.Get("Location") != "" {
			t.Errorf("%s: %d %s", tt.name, resp.StatusCode, resp.Header.Get("Location"))
		}
		if !strings.Contains(body, "<html") || strings.Contains(body, "evil.example") {
			t.Errorf("%s: page %s", tt.name, body)
		}
		checkNoSecrets(t, w, tt.name, body)
	}
	statuses, began := make(map[int]int), time.Now()
	for i := range 100 {
		resp, _ := fetch(t, client, http.MethodGet, w.URL(fmt.Sprintf("%s/scan?code=made-up-%d&appid=%s", base, i, integration.AuthorizerID)), http.Header{"X-Forwarded-For": {fmt.Sprintf("10.0.0.%d, 203.0.113.7", i)}}, "")
		if statuses[resp.StatusCode]++; resp.StatusCode == http.StatusTooManyRequests && resp.Header.Get("Retry-After") == "" {
			t.Errorf("429 without a time: %v", resp.Header)
		}
	}
	since := int(time.Since(began)/time.Second) + 1 // each second brings one more
	if asked := statuses[http.StatusBadRequest]; asked > 60+since || statuses[http.StatusTooManyRequests] != 100-asked {
		t.Errorf("made-up codes were answered with %v in %d seconds", statuses, since)
	}
	if strings.Contains(w.Gateway.Log(), "made-up") {
		t.Error("a code was logged")
	}
}
