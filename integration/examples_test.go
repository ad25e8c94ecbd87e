package integration_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-wechat/caddy-wechat/integration"
)

// exampleEnv gives every secret that the documents mention a value of the right shape.
var exampleEnv = []string{
	"WECHAT_PLATFORM_SECRET=s", "WECHAT_PLATFORM_TOKEN=t", "WECHAT_PLATFORM_AES_KEY=abcdefghijklmnopqrstuvwxyz0123456789ABCDEFG",
	"SHOP_SECRET=s", "SHOP_TOKEN=t", "SHOP_AES_KEY=abcdefghijklmnopqrstuvwxyz0123456789ABCDEFG",
	"CRM_KEY=0123456789abcdef", "WECHAT_SEAL_KEY=000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f",
}

var fence = regexp.MustCompile("(?s)```(caddyfile|json|sh)\n(.*?)```")

// TestDocumentExamples: every configuration in the documents is one that Caddy accepts, as the user would have it
// checked; the two READMEs show the same one.
func TestDocumentExamples(t *testing.T) {
	t.Parallel()
	shown := make(map[string][]string)
	seen := make(map[string]bool) // what both languages have is checked once
	docs, err := filepath.Glob("../docs/*.md")
	if err != nil || len(docs) == 0 {
		t.Fatalf("docs: %d, %v", len(docs), err)
	}
	for _, doc := range append([]string{"README.md", "README.zh-CN.md"}, docs...) {
		readme := strings.HasPrefix(doc, "README")
		if doc = strings.TrimPrefix(doc, "../"); doc == "docs/sdk.md" || doc == "docs/sdk.zh-CN.md" {
			continue // its snippets are parts, which the tests of the SDKs put together
		}
		content, err := os.ReadFile("../" + doc)
		if err != nil {
			t.Fatal(err)
		}
		found := 0
		for _, m := range fence.FindAllStringSubmatch(string(content), -1) {
			kind, text := m[1], m[2]
			if kind != "sh" {
				found++
			}
			if readme && kind == "caddyfile" && strings.Contains(text, "wechat {") {
				shown[doc] = append(shown[doc], text)
			}
			switch {
			case seen[m[0]]:
			case kind == "sh":
				checkCommands(t, doc, text)
			default:
				checkExample(t, doc, kind, text)
			}
			seen[m[0]] = true
		}
		if found == 0 && readme {
			t.Errorf("%s has no examples", doc)
		}
	}
	if one, other := shown["README.md"], shown["README.zh-CN.md"]; len(one) == 0 || !slices.Equal(one, other) {
		t.Error("the two READMEs do not show the same configurations")
	}
}

func checkExample(t *testing.T, doc, kind, text string) {
	t.Helper()
	g := commands(t, t.TempDir(), exampleEnv...)
	file := filepath.Join(g.Dir, "config")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"validate", "--config", file}
	if kind == "caddyfile" {
		args = append(args, "--adapter", "caddyfile")
		if string(caddyfile.Format([]byte(text))) != text {
			t.Errorf("%s: an example is not formatted as caddy fmt would:\n%s", doc, text)
		}
	}
	out, err := g.Command(t.Context(), args...)
	if err != nil {
		t.Errorf("%s: %v\n%s\n%s", doc, err, text, out)
	}
	checkWarnings(t, doc, out)
}

// checkWarnings fails for each warning but two: the folder of verification files is production's and absent here, and
// Caddy points out that a site on plain http, which WeChat needs, has no certificate.
func checkWarnings(t *testing.T, where, out string) {
	t.Helper()
	for line := range strings.Lines(out) {
		if !strings.Contains(line, `"level":"warn"`) || strings.Contains(line, "/srv/wechat-verify") || strings.Contains(line, "listening only on the HTTP port") {
			continue
		}
		t.Errorf("%s warns: %s", where, line)
	}
}

// machineTools are programs that are not ours, whose lines set up the machine; the files that they name are checked.
var machineTools = []string{"docker", "install", "journalctl", "kubectl", "mv", "systemctl", "useradd"}

// checkCommands holds the shell lines to what exists: make targets, paths of the API listener, the program's own commands
// and flags.
func checkCommands(t *testing.T, doc, text string) {
	t.Helper()
	makefile, err := os.ReadFile("../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(text) {
		words := strings.Fields(strings.Replace(line, "(umask 077; $run ", "$run ", 1))
		switch {
		case len(words) == 0:
		case strings.HasPrefix(line, "run="):
			// TestDocumentRun holds it to the unit.
		case strings.HasPrefix(line, "CRM_KEY="):
			// TestQuickstartKey runs it.
		case words[0] == "$run" && len(words) > 2:
			program, _, _ := strings.Cut(strings.Join(words[1:], " "), " - ") // what follows are redirections
			checkCommand(t, doc, strings.Fields(program))
		case len(words) == 2 && words[0] == "make":
			if !regexp.MustCompile(`(?m)^` + words[1] + `:`).Match(makefile) {
				t.Errorf("%s: the Makefile has no target %s", doc, words[1])
			}
		case words[0] == "curl", words[0] == "xcaddy", strings.HasPrefix(line, "ssh -L 9000:127.0.0.1:2020 "):
			// The curl lines are run by TestDocumentCalls, the xcaddy line by `make xcaddy`. The ssh line forwards to the console's
			// address in Caddyfile.example, and the console's tests come by another port.
		case len(words) > 2 && words[0] == "caddy" && words[1] == "wechat" && (doc == "docs/commands.md" || doc == "docs/commands.zh-CN.md"):
			// TestCommandDocument of caddymodule runs them.
		case strings.HasPrefix(path.Base(words[0]), "caddy"):
			checkCommand(t, doc, words)
		case slices.Contains(machineTools, words[0]):
			for _, word := range words {
				if _, err := os.Stat("../" + word); err != nil && strings.HasPrefix(word, "contrib/") {
					t.Errorf("%s: %v", doc, err)
				}
			}
		default:
			t.Errorf("%s: nothing runs this line: %s", doc, line)
		}
	}
}

// checkCommand has the program parse a line of its own.
func checkCommand(t *testing.T, doc string, words []string) {
	t.Helper()
	usage := "caddy " + words[1]
	if words[1] == "wechat" {
		if len(words) < 3 {
			return
		}
		usage += " " + words[2]
	}
	g := commands(t, t.TempDir())
	out, err := g.Command(t.Context(), append(slices.Clone(words[1:]), "--help")...)
	if err != nil || !strings.Contains(out, "Usage:\n  "+usage) {
		t.Errorf("%s: %q is not understood: %v\n%s", doc, strings.Join(words, " "), err, out)
	}
}

// TestDocumentCalls runs the curl lines of the README and of the operators' documents against a gateway, with curl's part
// played by our client.
func TestDocumentCalls(t *testing.T) {
	t.Parallel()
	w := newWorld(t, polite)
	authorize(t, w)
	user := w.WeChat.NewUser(integration.AuthorizerID)
	content, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range operatorDocs {
		more, err := os.ReadFile("../docs/" + name + ".md")
		if err != nil {
			t.Fatal(err)
		}
		content = append(content, more...)
	}
	header := regexp.MustCompile(`-H "([^:]+): ([^"]*)"`)
	address := regexp.MustCompile(`(http://(?:127.0.0.1:8090|localhost:2019)[^"\n]*)`)
	lines := 0
	for line := range strings.Lines(string(content)) {
		if !strings.HasPrefix(line, "curl ") {
			continue
		}
		lines++
		fill := strings.NewReplacer("$CRM_KEY", w.ClientKey, "oXYZ", user.OpenID, "$wxTkId", strings.Repeat("A", 22), "http://127.0.0.1:8090", "http://"+w.API, "http://localhost:2019", "http://"+w.Gateway.Admin)
		target := address.FindStringSubmatch(line)
		if target == nil {
			t.Errorf("no address in %s", line)
			continue
		}
		headers := make(map[string][]string)
		for _, h := range header.FindAllStringSubmatch(line, -1) {
			headers[h[1]] = []string{fill.Replace(h[2])}
		}
		resp, body := fetch(t, plainClient, "GET", fill.Replace(target[1]), headers, "")
		want := user.OpenID
		switch {
		case strings.Contains(line, "/cgi-bin/token"):
			want = `"access_token"`
		case strings.Contains(line, "/wechat/users/"):
			want = "tracking id is unknown" // what a real one gives is seen in TestJobs
		case strings.Contains(line, "localhost:2019"):
			want = "{"
		}
		if !strings.Contains(body, want) {
			t.Errorf("%s-> %d %s", line, resp.StatusCode, body)
		}
	}
	if lines < 7 {
		t.Errorf("the documents have %d curl lines", lines)
	}
	checkViolations(t, w)
}

// TestExampleFile: Caddyfile.example is formatted, adapts without a warning, and validating it in production's
// defaults neither writes a file nor needs the network.
func TestExampleFile(t *testing.T) {
	t.Parallel()
	content, err := os.ReadFile("../Caddyfile.example")
	if err != nil {
		t.Fatal(err)
	}
	if string(caddyfile.Format(content)) != string(content) {
		t.Error("Caddyfile.example is not formatted as caddy fmt would")
	}
	file, _ := filepath.Abs("../Caddyfile.example")
	g := commands(t, t.TempDir(), exampleEnv...)
	for _, command := range []string{"adapt", "validate"} {
		out, err := g.Command(t.Context(), command, "--config", file, "--adapter", "caddyfile")
		if err != nil {
			t.Errorf("%s: %v\n%s", command, err, out)
		}
		checkWarnings(t, command, out)
		for _, pair := range exampleEnv {
			if _, value, _ := strings.Cut(pair, "="); len(value) > 8 && strings.Contains(out, value) {
				t.Errorf("%s shows a secret", command)
			}
		}
	}
	// Caddy itself makes its internal CA and notes who it is; nothing else may be written.
	err = filepath.WalkDir(g.Dir, func(path string, d fs.DirEntry, err error) error {
		caddys := strings.Contains(path, "/caddy/pki/") || strings.HasSuffix(path, "instance.uuid") || strings.HasSuffix(path, "last_clean.json")
		if err == nil && !d.IsDir() && !caddys {
			t.Errorf("adapt and validate wrote %s", path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestAccessLogFilter switches access logs on as the README says, on every site, and looks for secrets in them after
// logins and calls in every form.
func TestAccessLogFilter(t *testing.T) {
	t.Parallel()
	content, err := os.ReadFile("../Caddyfile.example")
	if err != nil {
		t.Fatal(err)
	}
	logged := regexp.MustCompile(`(?m)^(\{\$WECHAT_HOST.*|http://.*) \{$`).ReplaceAllString(string(content), "$0\n\timport wechat_log")
	if strings.Count(logged, "import wechat_log") != 4+1 { // once in a comment
		t.Fatalf("sites:\n%s", logged)
	}
	file := filepath.Join(t.TempDir(), "Caddyfile")
	if err := os.WriteFile(file, []byte(logged), 0o600); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, func(w *integration.World) { polite(w); w.Caddyfile = file })
	authorize(t, w)
	t.Run("api", func(t *testing.T) { jobAPI(t, w) })
	t.Run("oauth", func(t *testing.T) { jobOAuth(t, w) })
	t.Run("message", func(t *testing.T) { jobMessage(t, w) })
	_, grant := call(t, w, "GET", "/cgi-bin/token?grant_type=client_credential&appid="+integration.AccountID+"&secret="+w.ClientKey, nil, "")
	opaque, _ := field(t, grant, "access_token").(string)
	user := w.WeChat.NewUser(integration.AccountID)
	call(t, w, "GET", "/cgi-bin/user/info?access_token="+opaque+"&openid="+user.OpenID, nil, "")
	call(t, w, "GET", "/sns/jscode2session?appid="+integration.AccountID+"&secret="+w.ClientKey+"&js_code=js-code-secret&grant_type=authorization_code", nil, "")
	call(t, w, "GET", "/wechat/users/tracking-id-12345678901", bearer(w), "")
	for _, name := range []string{"ACCESS_TOKEN", "%61ccess_token", "+access_token", "access%5ftoken", "x=1;access_token"} { // the gateway finds it by each
		call(t, w, "GET", "/cgi-bin/user/info?openid=x&"+name+"="+opaque, nil, "")
	}
	call(t, w, "GET", "/cgi-bin/user/info?appsecret="+w.ClientKey+"&Component_AppSecret="+w.ClientKey, nil, "")
	fetch(t, httpsClient(t, w), "GET", w.URL("/a/landing/place?from=wechat&wxTkId=tracking-id-of-a-visitor"), nil, "")
	const page = "https://shop.example.com/cart"
	fetch(t, httpsClient(t, w), "GET", w.URL("/wx/jssdk/"+integration.AccountID+"?url="+url.QueryEscape(page+"?code=login-code-of-a-page")), nil, "")
	log := w.Gateway.Log()
	if n := strings.Count(log, `"handled request"`); n < 40 {
		t.Fatalf("%d lines of access log", n)
	}
	checkNoSecrets(t, w, "access log", log)
	for _, hidden := range []string{opaque, user.OpenID, "js-code-secret", "tracking-id-12345678901", "tracking-id-of-a-visitor", "login-code-of-a-page", url.QueryEscape(page)} {
		if strings.Contains(log, hidden) {
			t.Errorf("the access log shows %.8s…", hidden)
		}
	}
}

// TestDemo runs what `make run` shows, to its end.
func TestDemo(t *testing.T) {
	t.Parallel()
	demo := filepath.Join(t.TempDir(), "demo")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", demo, "./demo").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	dir := filepath.Join(t.TempDir(), "a run") // as a checkout may lie in a folder with a blank in its name
	for round := range 2 {                     // the second one finds what the first one left
		cmd := exec.CommandContext(t.Context(), demo, "-caddy", binary, "-config", "../Caddyfile.example", "-dir", dir, "-once")
		cmd.WaitDelay = 10 * time.Second
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("round %d: %v\n%s", round, err, out)
		}
		for _, want := range []string{"1  TLS", "2  Domain", "3a", "3b", "收到：你好", "4  An app", "5  An OAuth", "wxTkId="} {
			if !strings.Contains(string(out), want) {
				t.Errorf("round %d does not show %q:\n%s", round, want, out)
			}
		}
	}
	demoReleaseCheck(t, demo, dir)
	demoEnds(t, demo, dir)
	other := t.TempDir()
	if err := os.WriteFile(filepath.Join(other, "precious"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), demo, "-caddy", binary, "-config", "../Caddyfile.example", "-dir", other, "-once").CombinedOutput(); err == nil {
		t.Errorf("the demo took over a folder that is not its own:\n%s", out)
	}
}

// demoEnds: a demo keeps its folder from another one, shows lines that any shell takes, stays when those leave who are connected to
// it, and takes its gateway with it when the terminal is closed, and when nobody reads what it shows.
func demoEnds(t *testing.T, demo, dir string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	start := func() (*exec.Cmd, *bufio.Scanner, io.Closer) {
		t.Helper()
		running := exec.CommandContext(ctx, demo, "-caddy", binary, "-config", "../Caddyfile.example", "-dir", dir)
		running.WaitDelay = 10 * time.Second
		out, err := running.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := running.Start(); err != nil {
			t.Fatal(err)
		}
		return running, bufio.NewScanner(out), out
	}
	// ended waits for the demo, and fails if its gateway stays.
	ended := func(how string, running *exec.Cmd) {
		t.Helper()
		var saved struct{ Admin struct{ Listen string } }
		content, err := os.ReadFile(filepath.Join(dir, "config", "caddy", "autosave.json"))
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(content, &saved); err != nil {
			t.Fatal(err)
		}
		if err := running.Wait(); err != nil {
			t.Errorf("%s: the demo ended with %v", how, err)
		}
		resp, err := plainClient.Get("http://" + saved.Admin.Listen + "/config/")
		if err != nil {
			return
		}
		config, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if !bytes.Contains(config, []byte(dir)) {
			return // another one has the port by now
		}
		t.Errorf("%s: its gateway stayed at %s", how, saved.Admin.Listen)
		if resp, err := plainClient.Post("http://"+saved.Admin.Listen+"/stop", "", nil); err == nil {
			_ = resp.Body.Close()
		}
	}

	running, lines, _ := start()
	quoted := regexp.MustCompile(`'[^']*'`)
	commands, forged := 0, false
	for lines.Scan() {
		if strings.HasPrefix(lines.Text(), "The gateway's log is ") {
			break
		}
		if _, command, ok := strings.Cut(lines.Text(), ": "); ok && strings.HasPrefix(strings.TrimSpace(command), "curl ") {
			commands++
			if bare := quoted.ReplaceAllString(command, ""); strings.ContainsAny(bare, "?*[]()#&;<>=") { // zsh takes none of them as it stands
				t.Errorf("not for every shell: %s", command)
			}
			if strings.Contains(lines.Text(), "a forged push: ") {
				forged = true
				checkForged(t, quoted.FindAllString(command, -1))
			}
		}
	}
	if commands < 7 || !forged {
		t.Errorf("the demo shows %d commands to try, a forged push among them: %v", commands, forged)
	}
	leaveUnanswered(t, filepath.Join(dir, "control"))
	out, err := exec.CommandContext(ctx, demo, "-caddy", binary, "-config", "../Caddyfile.example", "-dir", dir, "-once").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "another demonstration runs in "+dir) {
		t.Errorf("a second demo in the same folder: %v\n%s", err, out)
	}
	if _, err := os.Stat(filepath.Join(dir, "control")); err != nil {
		t.Errorf("the second demo took the first one's folder: %v", err)
	}
	if err := running.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	for lines.Scan() { // to the end
	}
	ended("closed terminal", running)

	running, lines, output := start()
	for lines.Scan() && !strings.Contains(lines.Text(), "1  TLS") { // the gateway is up
	}
	if err := output.Close(); err != nil {
		t.Fatal(err)
	}
	ended("no reader", running)
}

// checkForged does what the demo's line about a forged push has to try, its quoted arguments being body and address: it is refused as
// the documents say of forged pushes, not as one that makes no sense.
func checkForged(t *testing.T, quoted []string) {
	t.Helper()
	if len(quoted) != 2 {
		t.Fatalf("a forged push is %q", quoted)
	}
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // as curl -k
	}}
	resp, err := client.Post(strings.Trim(quoted[1], "'"), "text/xml", strings.NewReader(strings.Trim(quoted[0], "'")))
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusForbidden {
		t.Errorf("the forged push gets %d", resp.StatusCode)
	}
}

// leaveUnanswered asks a demo many things and does not wait for the answers, which then cannot be written.
func leaveUnanswered(t *testing.T, control string) {
	t.Helper()
	content, err := os.ReadFile(control)
	if err != nil {
		t.Fatal(err)
	}
	address, _, _ := strings.Cut(string(content), "\n")
	for range 20 {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.WriteString(conn, strings.Repeat("GET / HTTP/1.1\r\nHost: demo\r\n\r\n", 64))
		if err := errors.Join(err, conn.Close()); err != nil {
			t.Fatal(err)
		}
	}
	resp, err := plainClient.Get("http://" + address) // it still answers
	if err != nil {
		t.Fatalf("the demo ended when others left: %v", err)
	}
	_ = resp.Body.Close()
}
