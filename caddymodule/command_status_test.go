package caddymodule

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/spf13/cobra"
)

// adminServer answers as a gateway's admin endpoint, and keeps what it was asked.
func adminServer(t *testing.T, answers map[string]string) (address string, asked *[]string) {
	t.Helper()
	asked = new([]string)
	s := httptest.NewServer(adminHandler(answers, asked))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://"), asked
}

// TestAskingEveryInterface: an endpoint that listens on all of one kind is asked at an address of that kind, whatever localhost is.
func TestAskingEveryInterface(t *testing.T) {
	t.Parallel()
	for address, want := range map[string]string{
		":2019": "tcp localhost:2019", "0.0.0.0:2019": "tcp localhost:2019", "[::]:2019": "tcp localhost:2019", "tcp4/:2019": "tcp4 127.0.0.1:2019", "tcp6/:2019": "tcp6 [::1]:2019",
		"tcp6/[::]:2019": "tcp6 [::1]:2019", "tcp6/[fd00::1]:2019": "tcp6 [fd00::1]:2019", "[fd00::1%25eth0]:2019": "tcp [fd00::1%25eth0]:2019", "unix//run/admin.sock|0600": "unix /run/admin.sock",
	} {
		asked := ""
		p := &askParams{address: address, dial: func(_ context.Context, network, to string) (net.Conn, error) {
			asked = network + " " + to
			return nil, syscall.ECONNREFUSED
		}}
		if _, err := p.ask(t.Context(), http.MethodGet, "/wechat/status"); asked != want {
			t.Errorf("%s: asked %q, want %q: %v", address, asked, want, err)
		}
	}
}

func adminHandler(answers map[string]string, asked *[]string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		*asked = append(*asked, r.Method+" "+r.URL.RequestURI())
		text, found := answers[r.Method+" "+r.URL.RequestURI()]
		switch {
		case !found:
			w.WriteHeader(http.StatusNotFound)
		case strings.HasPrefix(text, `{"error"`):
			w.WriteHeader(http.StatusBadGateway)
		}
		_, _ = w.Write([]byte(text))
	})
}

// command runs a subcommand and returns what it printed, what it said, and its exit code as Caddy's main makes it.
func command(cmd *cobra.Command, args ...string) (out, talk string, err error) {
	var stdout, stderr strings.Builder
	cmd.SetOut(&stdout)
	cmd.SetErr(&stderr)
	cmd.SetArgs(args)
	err = cmd.Execute()
	return stdout.String(), stderr.String(), err
}

func TestStatusCommand(t *testing.T) {
	t.Parallel()
	answer := func(level string) string {
		return `{"version":"v1","node":"n1","time":"2026-01-01T12:00:00Z","started":"2026-01-01T10:00:00Z","level":"` + level + `",
			"findings":[{"level":"` + level + `","code":"no_ticket","subject":"platform wx1111111111111111","text":{"en":"no ticket\u001b[2J","zh":"没有票据"},"remedy":{"en":"look","zh":"检查"}}],
			"platforms":[{"appid":"wx1111111111111111","level":"` + level + `","token":{"expires":"2026-01-01T13:00:00Z"},"keys":[{"what":"aes_key","index":0},{"what":"aes_key","index":1,"last_used":"2026-01-01T11:00:00Z"}],"unexchanged":3,"lost":2}],
			"store":{"module":"redis","level":"green"},"clients":[{"name":"crm","appids":["*"]}],"more":1}`
	}
	for _, tt := range []struct {
		level, lang string
		red         bool
		says        []string
	}{
		{"green", "en", false, []string{"GREEN  n1", "wx1111111111111111  green  none    ends in 60m  -          3            2     aes_key 2 of 2", "redis", "crm"}},
		{"yellow", "zh", false, []string{"YELLOW", "没有票据", "-> 检查"}},
		{"red", "en", true, []string{"RED", "no ticket[2J\n", "-> look"}},
		{"red", "zh", true, []string{"red     第三方平台 wx1111111111111111  [no_ticket]"}},
		{"red", "en", true, []string{"red     platform wx1111111111111111  [no_ticket]"}},
	} {
		address, _ := adminServer(t, map[string]string{"GET /wechat/status": answer(tt.level)})
		out, _, err := command(statusCommand(), "--address", address, "--lang", tt.lang)
		if red := err != nil && err.Error() == fmt.Sprintf("exiting with status %d", exitFailed); red != tt.red || err != nil && !red {
			t.Errorf("%s: %v", tt.level, err)
		}
		for _, text := range tt.says {
			if !strings.Contains(out, text) {
				t.Errorf("%s: does not say %q:\n%s", tt.level, text, out)
			}
		}
		out, _, _ = command(statusCommand(), "--address", address, "--json")
		if out != answer(tt.level)+"\n" {
			t.Errorf("%s: the answer is not as it came: %s", tt.level, out)
		}
	}
	if _, _, err := command(statusCommand(), "--lang", "fr"); err == nil || !strings.Contains(err.Error(), "--lang: 'fr' is none") {
		t.Error(err)
	}
}

// TestSubjectsInChinese: whatever a finding is about has a word in each language, on the console too.
func TestSubjectsInChinese(t *testing.T) {
	t.Parallel()
	text := string(consoleAssets["text.js"].content)
	_, zh, _ := strings.Cut(text, "\n\tzh: {")
	for _, subject := range []string{
		thisMachine, subjectPlatform("wx1"), subjectAccount("wx1"), "store redis", "host api.weixin.qq.com", "backend 10.0.0.1:80", "file MP_verify_a.txt",
	} {
		kind, name, _ := strings.Cut(subject, " ")
		word := subjectWords[kind]
		if subject == thisMachine {
			kind, name, word = "machine", "", "本机"
		}
		if got := subjectIn(true, subject); got != strings.TrimSpace(word+" "+name) || word == "" || subjectIn(false, subject) != subject {
			t.Errorf("%s: %q", subject, got)
		}
		if !strings.Contains(zh, `subject_`+kind+`: "`+word+`"`) {
			t.Errorf("%s: the console has no such word", subject)
		}
	}
	if !strings.Contains(string(consoleAssets["console.js"].content), `whom(f.subject`) {
		t.Error("the console does not use them")
	}
	if got := subjectIn(true, "wx1"); got != "wx1" {
		t.Error(got)
	}
	if first := noTicket("wx1", nil).Remedy; !strings.Contains(first.EN, "ten minutes from the start") || !strings.Contains(first.ZH, "先等十分钟") || !strings.Contains(first.ZH, "须已全网发布") {
		t.Errorf("%+v", first)
	}
}

// A real gateway's status is what the command reads.
func TestStatusCommandReadsTheStatus(t *testing.T) {
	t.Parallel()
	app, _ := newTestApp(t, testConfig(""))
	body, err := json.Marshal(app.status(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	address, _ := adminServer(t, map[string]string{"GET /wechat/status": string(body)})
	out, _, err := command(statusCommand(), "--address", address, "--lang", "en")
	if err == nil || !strings.Contains(out, "[no_ticket]") || !strings.Contains(out, accountID) {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestAskingWhoIsNotThere(t *testing.T) {
	t.Parallel()
	closed := deadAddress(t)
	empty, _ := adminServer(t, nil)
	noApp, _ := adminServer(t, map[string]string{"GET /wechat/status": `{"error":"the configuration has no global option wechat"}`})
	page, _ := adminServer(t, map[string]string{"GET /wechat/status": `<html>`})
	elsewhere := httptest.NewServer(http.RedirectHandler("https://127.0.0.1:1/", http.StatusPermanentRedirect))
	t.Cleanup(elsewhere.Close)
	off := filepath.Join(t.TempDir(), "off.json")
	if err := os.WriteFile(off, []byte(`{"admin":{"disabled":true}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"--address", closed}, "no Caddy listens at " + closed},
		{[]string{"--address", "unix//no/such.sock"}, "no Caddy listens at unix//no/such.sock"},
		{[]string{"--address", empty}, "has no such WeChat gateway"},
		{[]string{"--address", noApp}, "no global option wechat"},
		{[]string{"--address", page}, "is not Caddy's admin endpoint"},
		{[]string{"--address", strings.TrimPrefix(elsewhere.URL, "http://")}, "is not Caddy's admin endpoint: HTTP 308"},
		{[]string{"--address", "localhost"}, "'localhost' is not the address of an admin endpoint"},
		{[]string{"--address", "http://localhost:2019"}, "'http://localhost:2019' is not the address of an admin endpoint"},
		{[]string{"--address", "bad address"}, "'bad address' is not the address of an admin endpoint"},
		{[]string{"--address", "bad address:1"}, "is not the address of an admin endpoint"},
		{[]string{"--address", "user@localhost:1"}, "is not the address of an admin endpoint"},
		{[]string{"--address", "udp/localhost:1"}, "is not the address of an admin endpoint"},
		{[]string{"--address", "a:1-9"}, "is not the address of an admin endpoint"},
		{[]string{"--config", off}, "admin is off"},
		{[]string{"--config", "/no/such/Caddyfile"}, "no such file"},
	} {
		if _, _, err := command(statusCommand(), tt.args...); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v: %v, want %q", tt.args, err, tt.want)
		}
	}
}

// The address is that of the config, a unix socket with permissions too.
func TestAskingBySocket(t *testing.T) {
	t.Parallel()
	folder, err := os.MkdirTemp("", "sock") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(folder) })
	socket := filepath.Join(folder, "admin.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	asked := new([]string)
	s := &httptest.Server{Listener: listener, Config: &http.Server{Handler: adminHandler(map[string]string{"GET /wechat/status": `{"level":"green"}`}, asked)}} //nolint:gosec // a test's
	s.Start()
	t.Cleanup(s.Close)
	config := filepath.Join(folder, "config.json")
	if err := os.WriteFile(config, []byte(`{"admin":{"listen":"unix/`+socket+`|0220"}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, _, err := command(statusCommand(), "--config", config, "--json"); err != nil || out != `{"level":"green"}`+"\n" {
		t.Errorf("%v, %s", err, out)
	}
}

func TestAuthorizersCommand(t *testing.T) {
	t.Parallel()
	one := `{"authorizers":[{"platform":"wx1111111111111111","appid":"wx3333333333333333","name":"测试小店","user_name":"gh_0123456789ab","state":"authorized"},
		{"platform":"wx1111111111111111","appid":"wx4444444444444444","name":"Shop","state":"revoked"}],"next":"c1","index":{"state":"ready"}}`
	two := `{"authorizers":[{"platform":"wx1111111111111111","appid":"wx5555555555555555","name":"Last","state":"authorized"}],"next":"","index":{"state":"building","seen":7}}`
	detail := `{"platform":"wx1111111111111111","appid":"wx3333333333333333","name":"测试小店","state":"authorized","type":{"mini_program":true},"principal":"某公司",
		"permission_sets":[{"id":1,"name":{"en":"messages","zh":"消息管理"}}],"token":{"error":{"en":"61023 refresh token invalid","zh":"无效"}},
		"last_error":{"time":"2026-01-01T12:00:00Z","kind":"call","what":"/cgi-bin/user/info","outcome":"refused","errcode":48001,"rid":"64f1e2d3-0a1b2c3d-4e5f6071"}}`
	address, asked := adminServer(t, map[string]string{
		"GET /wechat/authorizers?limit=50":                                        one,
		"GET /wechat/authorizers?limit=200&platform=wx1111111111111111":           one,
		"GET /wechat/authorizers?cursor=c1&limit=200&platform=wx1111111111111111": two,
		"GET /wechat/authorizers?limit=50&q=%E5%B0%8F":                            two,
		"GET /wechat/authorizers?limit=20&q=wx3":                                  one,
		"GET /wechat/authorizers/wx3333333333333333":                              detail,
		"POST /wechat/refresh/wx3333333333333333":                                 `{"platform":"wx1111111111111111","appid":"wx3333333333333333","kind":"authorizer","expires":"2036-01-01T12:00:00Z"}`,
		"POST /wechat/refresh/wx4444444444444444":                                 `{"error":"WeChat refuses: 61023"}`,
		"GET /wechat/status":                                                      `{"platforms":[{"appid":"wx1111111111111111"}]}`,
	})
	out, talk, err := command(authorizersCommand(), "--address", address)
	if err != nil || !strings.Contains(talk, "--all shows them") ||
		!strings.Contains(out, "PLATFORM            APPID               STATE       GH_ID            NAME\n") ||
		!strings.Contains(out, "wx1111111111111111  wx3333333333333333  authorized  gh_0123456789ab  测试小店\n") ||
		!strings.Contains(out, "wx1111111111111111  wx4444444444444444  revoked     -                Shop\n") {
		t.Errorf("%v %s\n%s", err, talk, out)
	}
	out, talk, err = command(authorizersCommand(), "--address", address, "--platform", "wx1111111111111111", "--all")
	if err != nil || strings.Count(out, "\n") != 4 || !strings.Contains(out, "wx5555555555555555") || !strings.Contains(talk, "7 accounts so far") {
		t.Errorf("%v %s\n%s", err, talk, out)
	}
	if out, _, err = command(authorizersCommand(), "--address", address, "--json", "小"); err != nil || out != two+"\n" {
		t.Errorf("%v\n%s", err, out)
	}
	for _, args := range [][]string{{"wx3333333333333333"}, {"show", "wx3333333333333333"}} {
		out, _, err = command(authorizersCommand(), append(args, "--address", address)...)
		for _, text := range []string{"测试小店", "mini program", "61023 refresh token invalid", "1 消息管理 messages", "errcode 48001  rid 64f1e2d3"} {
			if err != nil || !strings.Contains(out, text) {
				t.Errorf("%v: %v, no %q\n%s", args, err, text, out)
			}
		}
	}
	if out, _, err = command(refreshCommand(), "--address", address, "wx3333333333333333"); err != nil || !strings.Contains(out, "the authorizer token of wx3333333333333333 was renewed") {
		t.Errorf("%v\n%s", err, out)
	}
	if _, _, err = command(refreshCommand(), "--address", address, "wx4444444444444444"); err == nil || err.Error() != "WeChat refuses: 61023" {
		t.Error(err)
	}
	before := len(*asked)
	for _, args := range [][]string{{"--limit", "0"}, {"--limit", "201"}, {"show", "x"}} {
		if _, _, err = command(authorizersCommand(), append(args, "--address", address)...); err == nil {
			t.Errorf("%v: no error", args)
		}
	}
	if _, _, err = command(refreshCommand(), "x"); err == nil || len(*asked) != before {
		t.Errorf("%v, asked %v", err, (*asked)[before:])
	}
	// Completion.
	p := &authorizersParams{askParams: askParams{address: address}}
	if words, _ := p.completeAppID(nil, nil, "wx3"); len(words) != 2 || !strings.HasPrefix(string(words[0]), "wx3333333333333333\t") {
		t.Errorf("%q", words)
	}
	if words, _ := p.completePlatform(nil, nil, ""); !slices.Equal(words, []string{"wx1111111111111111"}) {
		t.Errorf("%q", words)
	}
}

func TestTable(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]int{"abc": 3, "公众号": 6, "e\u0301": 1, "ＡＢ": 4, "👍": 2, "ｱ": 1, "é": 1} {
		if got := displayWidth(text); got != want {
			t.Errorf("%q takes %d places, want %d", text, got, want)
		}
	}
	var b strings.Builder
	table{{"NAME", "X"}, {"小店", "1"}, {"a", "2"}}.write(&b)
	if want := "NAME  X\n小店  1\na     2\n"; b.String() != want {
		t.Errorf("%q", b.String())
	}
	if got := shown("a\x1b[31m\n\u202eb"); got != "a[31mb" {
		t.Errorf("%q", got)
	}
}
