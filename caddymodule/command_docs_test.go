package caddymodule

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/spf13/cobra"
)

// shellWords splits a line as a shell does, as far as the documents go.
func shellWords(line string) (words []string) {
	for i, part := range strings.Split(line, "'") {
		if i%2 == 1 {
			words = append(words, part)
			continue
		}
		words = append(words, strings.Fields(part)...)
	}
	return words
}

// TestCommandDocument: each command line of docs/commands.md does what it is there for, and it names all checks and verdicts; in
// both languages.
func TestCommandDocument(t *testing.T) {
	t.Parallel()
	documents := make(map[string]string)
	for _, file := range []string{"docs/commands.md", "docs/commands.zh-CN.md"} {
		content, err := os.ReadFile("../" + file)
		if err != nil {
			t.Fatal(err)
		}
		documents[file] = string(content)
	}
	folder := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(folder, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	whole, query, body := captured(t, platformSender(t), textMessage("x"))
	write("request.txt", whole)
	write("body.xml", body)
	write("token", platformToken+"\n")
	write("key", platformKey+"\n")
	write("message.xml", textMessage("x"))
	write("Caddyfile", fmt.Sprintf(`{
	storage file_system %s
	wechat {
		platform %s {
			secret s
			token %s
			aes_key %s
		}
		seal_key %s
		spill %s
		api http://127.0.0.1:1
	}
}
`, filepath.Join(folder, "storage"), platformID, platformToken, platformKey, moveSealKey, filepath.Join(folder, "spill")))
	if _, _, err := moveRun(t, importCommand(), moveList(1), "--config", filepath.Join(folder, "Caddyfile"), "--format", "csv"); err != nil {
		t.Fatal(err)
	}

	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "success") }))
	t.Cleanup(backend.Close)
	app, ctx := newTestApp(t, testConfig(""))
	m := &Message{}
	if err := m.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	e := &Event{app: app}
	if err := e.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	gateway := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var h caddyhttp.MiddlewareHandler = m
		if r.URL.Path == "/wx/event" {
			h = e
		}
		r = caddyhttp.PrepareRequest(r, caddy.NewReplacer(), w, &caddyhttp.Server{})
		_ = h.ServeHTTP(w, r, caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { return nil }))
	}))
	t.Cleanup(gateway.Close)

	commands := map[string]func() *cobra.Command{
		"decrypt": decryptCommand, "send": sendCommand, "doctor": doctorCommand, "explain": explainCommand, "export": exportCommand, "import": importCommand,
	}
	file := regexp.MustCompile(`^@?(Caddyfile|request\.txt|body\.xml|token|key|message\.xml|gateway\.archive)$`)
	ran := make(map[string]int)
	seen := make(map[string]bool) // what both languages have is run once
	for line := range strings.Lines(documents["docs/commands.md"] + documents["docs/commands.zh-CN.md"]) {
		line, isCommand := strings.CutPrefix(line, "caddy wechat ")
		if !isCommand || seen[line] {
			continue
		}
		seen[line] = true
		words := shellWords(line)
		for i, word := range words {
			if name := strings.TrimPrefix(word, "@"); file.MatchString(word) {
				words[i] = strings.TrimSuffix(word, name) + filepath.Join(folder, name)
			}
			words[i] = strings.NewReplacer("http://127.0.0.1:8080", backend.URL, "$QUERY", query).Replace(words[i])
			if words[0] == "send" {
				words[i] = strings.Replace(words[i], "https://wechat.example.com", gateway.URL, 1)
			}
		}
		make, known := commands[words[0]]
		if !known {
			t.Errorf("nothing runs this line: %s", line)
			continue
		}
		ran[words[0]]++
		provisioning.Lock()
		out, _, code, err := runCommand(t, make(), nil, words[1:]...)
		provisioning.Unlock()
		want := 0
		if words[0] == "doctor" && !strings.Contains(line, "--offline") {
			want = exitFailed // WeChat cannot be reached from a test
		}
		if code != want || err != nil {
			t.Errorf("%s: %d %v\n%s", line, code, err, out)
		}
	}
	for name := range commands {
		if ran[name] == 0 {
			t.Errorf("no example of %s", name)
		}
	}
	for file, document := range documents {
		for _, c := range doctorChecks {
			if !strings.Contains(document, "`"+c.id+"`") {
				t.Errorf("the check %s is not in %s", c.id, file)
			}
		}
		for _, verdict := range []string{verdictToken, verdictKey, verdictReceiveID, verdictQuery, verdictBody, verdictBase64, verdictStranger, verdictMixed} {
			if !strings.Contains(document, "| `"+verdict+"` |") {
				t.Errorf("the verdict %s is not in %s", verdict, file)
			}
		}
	}
}
