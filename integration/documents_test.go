package integration_test

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// operatorDocs are the documents of docs/ whose lines are to be typed as they stand.
var operatorDocs = []string{"quickstart", "operations", "troubleshooting", "security", "upgrade"}

// pairedDocs are the documents of docs/ that are there in English and in Chinese.
var pairedDocs = append(slices.Clone(operatorDocs), "pushes", "monitoring", "clustering", "sdk", "commands", "transport")

// goSource is the text of the Go files below a folder that end with suffix and not with but.
func goSource(t *testing.T, root, suffix, but string) string {
	t.Helper()
	var text strings.Builder
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, suffix+".go") || (but != "" && strings.HasSuffix(path, but)) {
			return err
		}
		content, err := os.ReadFile(path) //nolint:gosec // a path of our own
		text.Write(content)
		return err
	})
	if err != nil || text.Len() == 0 {
		t.Fatalf("%s: %d bytes, %v", root, text.Len(), err)
	}
	return text.String()
}

// document reads a document, and the file's name in the repository.
func document(t *testing.T, name string) string {
	t.Helper()
	content, err := os.ReadFile("../" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// allDocs are the names of all documents.
func allDocs(t *testing.T) []string {
	t.Helper()
	names, err := filepath.Glob("../docs/*.md")
	if err != nil || len(names) < 2*len(pairedDocs) {
		t.Fatalf("%q, %v", names, err)
	}
	for i := range names {
		names[i] = strings.TrimPrefix(names[i], "../")
	}
	return append(names, "README.md", "README.zh-CN.md", "SECURITY.md", "CHANGELOG.md")
}

// bothDocs are the names of all operators' documents.
func bothDocs() (names []string) {
	for _, name := range operatorDocs {
		names = append(names, "docs/"+name+".md", "docs/"+name+".zh-CN.md")
	}
	return names
}

var (
	anyFence   = regexp.MustCompile("(?s)```.*?```")
	heading    = regexp.MustCompile(`(?m)^(#+) (.+)$`)
	codeSpan   = regexp.MustCompile("`([^`\n]+)`")
	comment    = regexp.MustCompile(`(?m)(^|[ \t]+)# .*$`)
	tableRow   = regexp.MustCompile(`(?m)^\|.*\|$`)
	tableCode  = regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\|")
	link       = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	metricName = regexp.MustCompile(`caddy_wechat_([a-z_]+[a-z])`)
	testName   = regexp.MustCompile("`((?:Test|Fuzz)[A-Za-z]+)`")
)

// TestDocumentsInTwoLanguages: both have the same headings, tables and code; comments in it may differ.
func TestDocumentsInTwoLanguages(t *testing.T) {
	t.Parallel()
	for _, name := range append([]string{"README"}, pairedDocs...) {
		folder := "docs/"
		if name == "README" {
			folder = ""
		}
		en, zh := document(t, folder+name+".md"), document(t, folder+name+".zh-CN.md")
		code := func(text string) (blocks []string) {
			for _, block := range anyFence.FindAllString(text, -1) {
				blocks = append(blocks, comment.ReplaceAllString(block, ""))
			}
			return blocks
		}
		if a, b := code(en), code(zh); !slices.Equal(a, b) {
			t.Errorf("%s: the code differs:\n%q\n%q", name, a, b)
		}
		shape := func(text string) (levels []string, rows []int) {
			text = anyFence.ReplaceAllString(text, "")
			for _, m := range heading.FindAllStringSubmatch(text, -1) {
				levels = append(levels, m[1])
			}
			for _, row := range tableRow.FindAllString(text, -1) {
				rows = append(rows, strings.Count(strings.ReplaceAll(row, `\|`, ""), "|"))
			}
			return levels, rows
		}
		enLevels, enRows := shape(en)
		zhLevels, zhRows := shape(zh)
		if !slices.Equal(enLevels, zhLevels) || len(enLevels) < 3 {
			t.Errorf("%s: the headings differ: %v, %v", name, enLevels, zhLevels)
		}
		if !slices.Equal(enRows, zhRows) {
			t.Errorf("%s: the tables differ: %v, %v", name, enRows, zhRows)
		}
		if a, b := metricName.FindAllString(en, -1), metricName.FindAllString(zh, -1); !slices.Equal(a, b) {
			t.Errorf("%s: other metrics: %v, %v", name, a, b)
		}
	}
}

// TestDocumentPairs: every Chinese document has its English one and is held to it, each leads to the other in its first lines, and
// the README of its language lists it; a Chinese document leads to Chinese ones where there are any, and calls none English.
func TestDocumentPairs(t *testing.T) {
	t.Parallel()
	for _, doc := range allDocs(t) {
		base, chinese := strings.CutSuffix(doc, ".zh-CN.md")
		if !chinese {
			continue
		}
		name := filepath.Base(base)
		if name != "README" && !slices.Contains(pairedDocs, name) {
			t.Errorf("%s is not in pairedDocs", doc)
		}
		for file, to := range map[string]string{base + ".md": "[中文](" + name + ".zh-CN.md)", doc: "[English](" + name + ".md)"} {
			if before, _, _ := strings.Cut(document(t, file), "\n## "); strings.Count(before, to) != 1 {
				t.Errorf("%s does not begin with %s", file, to)
			}
		}
		for file, to := range map[string]string{"README.md": base + ".md", "README.zh-CN.md": doc} {
			if name != "README" && !regexp.MustCompile(`(?m)^\| \[[^\]]+\]\(`+regexp.QuoteMeta(to)+`\) \|`).MatchString(document(t, file)) {
				t.Errorf("%s does not list %s", file, to)
			}
		}
		text := anyFence.ReplaceAllString(document(t, doc), "")
		for _, m := range link.FindAllStringSubmatchIndex(text, -1) {
			target, _, _ := strings.Cut(text[m[2]:m[3]], "#")
			ours, english := strings.CutSuffix(target, ".md")
			_, err := os.Stat("../" + filepath.Join(filepath.Dir(doc), ours+".zh-CN.md"))
			switch twin := strings.HasSuffix(text[:m[0]], "[English"); {
			case strings.Contains(target, "://"), twin:
			case english && !strings.HasSuffix(ours, ".zh-CN") && err == nil:
				t.Errorf("%s leads to the English %s", doc, target)
			case strings.HasSuffix(ours, ".zh-CN") && strings.HasPrefix(text[m[1]:], "（英文）"):
				t.Errorf("%s calls %s English", doc, target)
			}
		}
	}
}

var (
	linkTarget  = regexp.MustCompile(`\]\([^)\s]+\)`)
	placeholder = regexp.MustCompile(`<[^<>]*>`)
	figure      = regexp.MustCompile(`\d+(?:[.,]\d+)*`)
)

// TestDocumentFigures: section by section, and in each row of a table, both languages have the same code spans and the same figures;
// what a placeholder is called may differ, and numbers that are spelled out are not compared.
func TestDocumentFigures(t *testing.T) {
	t.Parallel()
	parts := func(name string) (all []string) {
		text := anyFence.ReplaceAllString(document(t, "docs/"+name), "")
		for section := range strings.SplitSeq("\n"+text, "\n#") {
			all = append(all, tableRow.FindAllString(section, -1)...)
			all = append(all, tableRow.ReplaceAllString(section, ""))
		}
		return all
	}
	named := func(text string) []string {
		text = linkTarget.ReplaceAllString(text, "]")
		var all []string
		for _, m := range codeSpan.FindAllStringSubmatch(text, -1) {
			all = append(all, "`"+placeholder.ReplaceAllString(m[1], "<>")+"`")
		}
		for _, n := range figure.FindAllString(codeSpan.ReplaceAllString(text, ""), -1) {
			all = append(all, strings.ReplaceAll(n, ",", ""))
		}
		slices.Sort(all)
		return slices.Compact(all)
	}
	for _, name := range pairedDocs {
		en, zh := parts(name+".md"), parts(name+".zh-CN.md")
		if len(en) != len(zh) || len(en) < 7 {
			t.Fatalf("%s: %d parts, %d in Chinese", name, len(en), len(zh))
		}
		for i := range en {
			if a, b := named(en[i]), named(zh[i]); !slices.Equal(a, b) {
				t.Errorf("%s: the names and figures differ:\n%q\n%q\n%s\n%s", name, a, b, en[i], zh[i])
			}
		}
	}
}

// slug is the anchor that GitHub gives a heading.
func slug(text string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == ' ':
			return '-'
		case r == '-', r == '_', unicode.IsLetter(r), unicode.IsDigit(r):
			return unicode.ToLower(r)
		}
		return -1
	}, text)
}

// TestDocumentLinks follows the links of all documents to files and headings.
func TestDocumentLinks(t *testing.T) {
	t.Parallel()
	for _, doc := range allDocs(t) {
		text := anyFence.ReplaceAllString(document(t, doc), "")
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			target, anchor, _ := strings.Cut(m[1], "#")
			if strings.Contains(target, "://") {
				continue
			}
			file := doc
			if target != "" {
				file = filepath.Join(filepath.Dir(doc), target)
			}
			if _, err := os.Stat("../" + file); err != nil {
				t.Errorf("%s: %v", doc, err)
				continue
			}
			if anchor == "" {
				continue
			}
			if !slices.ContainsFunc(heading.FindAllStringSubmatch(anyFence.ReplaceAllString(document(t, file), ""), -1), func(h []string) bool { return slug(h[2]) == anchor }) {
				t.Errorf("%s: %s has no heading %s", doc, file, anchor)
			}
		}
	}
}

// TestDocumentNames: metrics, commands, and the tests that the documents name are there.
func TestDocumentNames(t *testing.T) {
	t.Parallel()
	source := goSource(t, "../caddymodule", "", "_test.go")
	tests := goSource(t, "..", "_test", "")
	for _, doc := range allDocs(t) {
		text := document(t, doc)
		for _, m := range metricName.FindAllStringSubmatch(text, -1) {
			if !strings.Contains(source, `"`+m[1]+`"`) && !strings.Contains(source, `"`+m[0]+`"`) {
				t.Errorf("%s: there is no metric %s", doc, m[0])
			}
		}
		for _, m := range testName.FindAllStringSubmatch(text, -1) {
			if !strings.Contains(tests, "\nfunc "+m[1]+"(") {
				t.Errorf("%s: there is no test %s", doc, m[1])
			}
		}
		for _, m := range codeSpan.FindAllStringSubmatch(anyFence.ReplaceAllString(text, ""), -1) {
			if words := strings.Fields(m[1]); len(words) > 2 && words[0] == "caddy" && words[1] == "wechat" && !slices.Contains([]string{"help", "…"}, words[2]) {
				checkCommand(t, doc, words)
			}
		}
	}
	if n := len(testName.FindAllString(document(t, "docs/security.md"), -1)); n < 30 {
		t.Errorf("security.md names %d tests", n)
	}
}

// findingCodes are the codes of all findings, by the source.
func findingCodes(t *testing.T) (codes []string) {
	t.Helper()
	find := func(file, pattern, prefix string) {
		found := regexp.MustCompile(pattern).FindAllStringSubmatch(document(t, file), -1)
		if len(found) == 0 {
			t.Fatalf("%s has no codes", file)
		}
		for _, m := range found {
			codes = append(codes, prefix+m[1])
		}
	}
	find("caddymodule/status_findings.go", `Code(?:: | = )"([a-z_]+)"(?:,|\n)`, "")
	find("caddymodule/status_findings.go", `(?m)^const code[A-Za-z]+ = "([a-z_]+)"$`, "")
	find("caddymodule/status_sightings.go", `(?m)^\tcode[A-Za-z]+ += "([a-z_]+)"$`, "")
	find("caddymodule/health.go", `(?m)^\tclass[A-Za-z]+ += "([a-z_]+)"`, "host_")
	slices.Sort(codes)
	return slices.Compact(codes)
}

// TestTroubleshooting: every line that is quoted as the log's is in the source, every finding's code has a symptom or is in
// the table at the end, there are no other codes, and each symptom has a cause and a remedy.
func TestTroubleshooting(t *testing.T) {
	t.Parallel()
	codes := findingCodes(t)
	logged := goSource(t, "../caddymodule", "", "_test.go") + goSource(t, "../tokens", "", "_test.go") + goSource(t, "../crypto", "", "_test.go")
	var quoted [][]string
	for _, language := range []struct{ file, log, status, cause, remedy string }{
		{"docs/troubleshooting.md", "- Log: ", "- Status: ", "- Cause: ", "- Remedy: "},
		{"docs/troubleshooting.zh-CN.md", "- 日志：", "- 状态：", "- 原因：", "- 处理："},
	} {
		text := document(t, language.file)
		symptoms := strings.Split(text, "\n### ")[1:]
		if len(symptoms) < 30 {
			t.Errorf("%s has %d symptoms", language.file, len(symptoms))
		}
		var quotes, named []string
		for _, symptom := range symptoms {
			title, _, _ := strings.Cut(symptom, "\n")
			if strings.Count(symptom, "\n"+language.cause) != 1 || strings.Count(symptom, "\n"+language.remedy) != 1 {
				t.Errorf("%s: %s lacks a cause or a remedy", language.file, title)
			}
			for line := range strings.Lines(symptom) {
				spans := codeSpan.FindAllStringSubmatch(line, -1)
				switch {
				case strings.HasPrefix(line, language.log):
					for _, m := range spans {
						quotes = append(quotes, m[1])
						if !strings.Contains(logged, m[1]) {
							t.Errorf("%s: %s: nothing logs %q", language.file, title, m[1])
						}
					}
				case strings.HasPrefix(line, language.status):
					for _, m := range spans {
						quotes = append(quotes, m[1])
						named = append(named, m[1])
					}
				default:
					continue
				}
				if len(spans) == 0 {
					t.Errorf("%s: %s quotes nothing: %s", language.file, title, line)
				}
			}
		}
		for _, m := range tableCode.FindAllStringSubmatch(text, -1) {
			named = append(named, m[1])
		}
		slices.Sort(named)
		if named = slices.Compact(named); !slices.Equal(named, codes) {
			t.Errorf("%s has the codes\n%q, findings\n%q", language.file, named, codes)
		}
		quoted = append(quoted, quotes)
	}
	if !slices.Equal(quoted[0], quoted[1]) {
		t.Errorf("the two languages quote other lines:\n%q\n%q", quoted[0], quoted[1])
	}
}

// TestQuickstartReply: the line with which the quick start has Caddy answer in a backend's place reaches the sender.
func TestQuickstartReply(t *testing.T) {
	t.Parallel()
	respond := regexp.MustCompile("(?m)^\t\trespond .*$").FindString(document(t, "docs/quickstart.md"))
	if respond == "" {
		t.Fatal("no such line")
	}
	config := document(t, "Caddyfile.example")
	proxies := regexp.MustCompile(`(?s)\t\t@gps wechat_message.*?\n\t\t\}\n`)
	if len(proxies.FindAllString(config, -1)) != 1 {
		t.Fatalf("Caddyfile.example: what goes to backends is not where it was:\n%s", config)
	}
	w := newWorld(t, func(w *integration.World) {
		polite(w)
		w.Caddyfile = filepath.Join(w.Dir, "Quickstart.Caddyfile")
		if err := os.WriteFile(w.Caddyfile, []byte(proxies.ReplaceAllLiteralString(config, respond+"\n")), 0o600); err != nil {
			t.Fatal(err)
		}
	})
	result, err := w.WeChat.PushMessage(t.Context(), wxsim.Message{AppID: integration.AccountID, To: "gh_0123456789ab", Content: "hello"})
	if err != nil || !result.OK() || result.UserSaw != "It works." {
		t.Errorf("the user saw %q; %s; %v", result.UserSaw, result.Wrong, err)
	}
}

// TestUnit holds the systemd unit to what the documents say of it, and to systemd's own judgement where that is at hand.
func TestUnit(t *testing.T) {
	t.Parallel()
	unit := document(t, "contrib/caddy-wechat.service")
	values := make(map[string][]string)
	section := ""
	for line := range strings.Lines(unit) {
		switch line = strings.TrimSpace(line); {
		case line == "", strings.HasPrefix(line, "#"):
		case strings.HasPrefix(line, "["):
			section = strings.Trim(line, "[]")
		default:
			name, value, ok := strings.Cut(line, "=")
			if !ok {
				t.Errorf("no assignment: %s", line)
			}
			values[section+"."+name] = append(values[section+"."+name], value)
		}
	}
	one := func(name string) string {
		if len(values[name]) != 1 {
			t.Fatalf("%s: %q", name, values[name])
		}
		return values[name][0]
	}
	for name, want := range map[string]string{
		"Service.Type": "notify", "Service.EnvironmentFile": "/etc/caddy/wechat.env", "Install.WantedBy": "multi-user.target",
		"Service.ExecStart":  "/usr/local/bin/caddy run --config /etc/caddy/Caddyfile", // --environ would print the secrets
		"Service.ExecReload": "/usr/local/bin/caddy reload --config /etc/caddy/Caddyfile --force",
		// As operations.md says: a gateway that cannot start is not given up, and a module of another's takes a line back by its name.
		"Service.Restart": "on-failure", "Service.RestartSec": "1s", "Unit.StartLimitIntervalSec": "0", "Service.MemoryDenyWriteExecute": "yes",
		"Service.SystemCallFilter": "@system-service",
	} {
		if got := one(name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if user := one("Service.User"); user == "" || user == "root" {
		t.Errorf("the user is %q", user)
	}
	if d, err := time.ParseDuration(one("Service.TimeoutStopSec")); err != nil || d < 10*time.Second+20*time.Second { // grace_period, then the gateway's own
		t.Errorf("TimeoutStopSec: %v, %v", d, err)
	}
	for _, doc := range []string{"docs/commands.md", "docs/commands.zh-CN.md", "docs/operations.md", "docs/operations.zh-CN.md"} { // the user cannot make a socket elsewhere below /run
		sockets := regexp.MustCompile(`unix/(/run/[^`+"`"+` ]*)`).FindAllStringSubmatch(document(t, doc), -1)
		for _, m := range sockets {
			if !strings.HasPrefix(m[1], "/run/"+one("Service.RuntimeDirectory")+"/") {
				t.Errorf("%s: the unit's user cannot make %s", doc, m[1])
			}
		}
		if len(sockets) == 0 {
			t.Errorf("%s names no socket", doc)
		}
	}
	checkCommand(t, "caddy-wechat.service", strings.Fields(one("Service.ExecStart")))
	checkCommand(t, "caddy-wechat.service", strings.Fields(one("Service.ExecReload")))
	limit := regexp.MustCompile(`GOMEMLIMIT=(\d+)MiB`).FindStringSubmatch(unit)
	most := regexp.MustCompile(`(?m)^MemoryMax=(\d+)G$`).FindStringSubmatch(unit)
	if limit == nil || most == nil {
		t.Fatalf("GOMEMLIMIT %q, MemoryMax %q", limit, most)
	}
	soft, _ := strconv.Atoi(limit[1])
	hard, _ := strconv.Atoi(most[1])
	if soft > hard*1024*85/100 {
		t.Errorf("GOMEMLIMIT of %d MiB leaves too little of %d GiB", soft, hard)
	}
	if analyze, err := exec.LookPath("systemd-analyze"); err == nil {
		file := filepath.Join(t.TempDir(), "caddy-wechat.service")
		if err := os.WriteFile(file, []byte(strings.ReplaceAll(unit, "/usr/local/bin/caddy", binary)), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.CommandContext(t.Context(), analyze, "verify", file).CombinedOutput(); err != nil || len(out) > 0 { //nolint:gosec // systemd's
			t.Errorf("systemd-analyze: %v\n%s", err, out)
		}
		// Of 100, at which a process may do all that its user may.
		security := exec.CommandContext(t.Context(), analyze, "security", "--no-pager", "--offline=yes", "--threshold=20", file) //nolint:gosec // systemd's
		if out, err := security.CombinedOutput(); err != nil && !strings.Contains(string(out), "unrecognized option") {          // before systemd 250
			t.Errorf("systemd-analyze security: %v\n%s", err, out)
		}
	}
}

// TestDocumentRun: commands that open the config or the store are run as the unit runs the gateway, and $run is said to be
// the same wherever it is.
func TestDocumentRun(t *testing.T) {
	t.Parallel()
	unit := document(t, "contrib/caddy-wechat.service")
	defined := regexp.MustCompile(`(?m)^run="(systemd-run .*)"$`)
	asOperator := regexp.MustCompile(`(?m)^\s*(\S*caddy\S* (?:validate|wechat (?:export|import|doctor)) .*)$`)
	for _, doc := range bothDocs() {
		text := document(t, doc)
		for _, block := range anyFence.FindAllString(text, -1) {
			for _, m := range asOperator.FindAllStringSubmatch(block, -1) {
				t.Errorf("%s: not as the gateway's user: %s", doc, m[1])
			}
		}
		definitions := defined.FindAllStringSubmatch(text, -1)
		if strings.Contains(text, "\n$run ") && len(definitions) == 0 && !strings.Contains(text, "`$run`") {
			t.Errorf("%s does not say what $run is", doc)
		}
		if len(definitions) == 0 && (strings.Contains(doc, "operations") || strings.Contains(doc, "quickstart")) {
			t.Errorf("%s does not define $run", doc)
		}
		for _, m := range definitions {
			var settings, environment []string
			words := strings.Fields(m[1])
			for i, word := range words {
				name, value, _ := strings.Cut(word, "=")
				switch {
				case name == "--uid":
					settings = append(settings, "User="+value)
				case name == "--gid":
					settings = append(settings, "Group="+value)
				case i > 0 && words[i-1] == "-p":
					settings = append(settings, word)
				case i > 0 && words[i-1] == "-E":
					environment = append(environment, word)
				case !slices.Contains([]string{"systemd-run", "--quiet", "--collect", "--pipe", "--wait", "-p", "-E"}, word):
					t.Errorf("%s: %s is not known", doc, word)
				}
			}
			if len(settings) != 4 || len(environment) != 3 {
				t.Errorf("%s: %q, %q", doc, settings, environment)
			}
			for _, line := range append(settings, "Environment="+strings.Join(environment, " ")) {
				if !strings.Contains(unit, "\n"+line+"\n") {
					t.Errorf("%s: the unit does not have %s", doc, line)
				}
			}
		}
	}
}

// TestQuickstartKey: the shell in which the quick start calls the API has the client's key, which is in the service's environment
// alone.
func TestQuickstartKey(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "wechat.env")
	if err := os.WriteFile(file, []byte("OLD_CRM_KEY=another\nCRM_KEY=the=key\nSHOP_SECRET=s\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, doc := range []string{"docs/quickstart.md", "docs/quickstart.zh-CN.md"} {
		block := ""
		for _, fence := range anyFence.FindAllString(document(t, doc), -1) {
			if strings.Contains(fence, "$CRM_KEY") {
				block = fence
			}
		}
		line, _, found := strings.Cut(strings.TrimPrefix(block, "```sh\n"), "\ncurl ")
		if !found {
			t.Errorf("%s calls nothing with a key", doc)
			continue
		}
		script := strings.ReplaceAll(line, "/etc/caddy/wechat.env", file) + "\nprintf %s \"$CRM_KEY\"\n"
		out, err := exec.CommandContext(t.Context(), "sh", "-c", script).CombinedOutput() //nolint:gosec // of our own document
		if err != nil || string(out) != "the=key" {
			t.Errorf("%s: the key is %q, %v", doc, out, err)
		}
	}
}

// TestDocumentBackups: an export that fails leaves the archive of the time before, which the shell would have emptied. The file
// that the shell makes is its owner's alone, as security.md says of archives, and the umask of what comes after is as it was.
func TestDocumentBackups(t *testing.T) {
	t.Parallel()
	exports := regexp.MustCompile(`(?m)^.*wechat export .* - > (\S+)(.*)$`)
	found := 0
	for _, doc := range bothDocs() {
		for _, m := range exports.FindAllStringSubmatch(document(t, doc), -1) {
			found++
			if !strings.HasPrefix(m[2], " && mv "+m[1]+" ") {
				t.Errorf("%s writes over an archive: %s", doc, m[0])
			}
			if !strings.HasPrefix(m[0], "(umask 077; ") || !strings.HasSuffix(m[0], ")") {
				t.Errorf("%s: others may read the archive: %s", doc, m[0])
			}
		}
	}
	if found < 4 {
		t.Errorf("%d exports", found)
	}
}

// TestDocumentBinds: a machine without IPv6 has no ::1, and Caddy does not start with a listener there: whoever is told to bind
// to it is told that too.
func TestDocumentBinds(t *testing.T) {
	t.Parallel()
	for doc, words := range map[string]string{
		"docs/troubleshooting.md": "cannot assign requested address", "docs/troubleshooting.zh-CN.md": "cannot assign requested address",
		"docs/quickstart.md": "On a machine without IPv6", "docs/quickstart.zh-CN.md": "没有 IPv6 的机器", "Caddyfile.example": "without IPv6",
	} {
		if text := document(t, doc); strings.Contains(text, "::1") && !strings.Contains(text, words) || strings.Contains(doc, "troubleshooting") && !strings.Contains(text, words) {
			t.Errorf("%s does not say what to do without IPv6", doc)
		}
	}
}

// TestAdminDocument: operations.md lists each operation of the admin endpoint, and no other.
func TestAdminDocument(t *testing.T) {
	t.Parallel()
	operation := regexp.MustCompile(`\{http\.Method(\w+), "/([^"]+)", (?:o\.\w+|ask\(\(\*operations\)\.\w+\))\}`)
	row := regexp.MustCompile("(?m)^\\| `([A-Z]+) ([^`?]+)(?:\\?[^`]*)?`(?:[^|]* `([A-Z]+)`)? \\|")
	var want []string
	for _, m := range operation.FindAllStringSubmatch(document(t, "caddymodule/operations.go"), -1) {
		want = append(want, strings.ToUpper(m[1])+" "+strings.NewReplacer("{", "<", "}", ">").Replace(m[2]))
	}
	slices.Sort(want)
	if len(want) < 17 {
		t.Fatalf("operations: %q", want)
	}
	for _, doc := range []string{"docs/operations.md", "docs/operations.zh-CN.md"} {
		var got []string
		for _, m := range row.FindAllStringSubmatch(document(t, doc), -1) {
			got = append(got, m[1]+" "+m[2])
			if m[3] != "" {
				got = append(got, m[3]+" "+m[2])
			}
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", doc, got, want)
		}
	}
}

// TestContainerFiles: the image is built by the Go of go.mod from what there is, and does not run as root.
func TestContainerFiles(t *testing.T) {
	t.Parallel()
	file := document(t, "contrib/Dockerfile")
	goVersion := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindStringSubmatch(document(t, "go.mod"))
	base := regexp.MustCompile(`(?m)^FROM golang:(\d+\.\d+)(?:\.\d+)? AS build$`).FindStringSubmatch(file)
	if goVersion == nil || base == nil || base[1] != goVersion[1] {
		t.Errorf("built by Go %q, go.mod says %q", base, goVersion)
	}
	builds := regexp.MustCompile(`go build .* -o (\S+) (\./\S+)`).FindAllStringSubmatch(file, -1)
	if len(builds) != 1 {
		t.Fatalf("builds: %q", builds)
	}
	if out, err := exec.CommandContext(t.Context(), "go", "list", "-f", "{{.Name}}", "../"+builds[0][2]).CombinedOutput(); err != nil || string(out) != "main\n" { //nolint:gosec // of our own file
		t.Errorf("%s: %v %s", builds[0][2], err, out)
	}
	_, last, staged := strings.Cut(file, "\nFROM scratch\n")
	if !staged || !strings.Contains(last, "COPY --from=build "+builds[0][1]+" /usr/bin/caddy\n") || !strings.Contains(last, `ENTRYPOINT ["/usr/bin/caddy"]`) {
		t.Errorf("the program is not what the image runs:\n%s", last)
	}
	user := regexp.MustCompile(`(?m)^USER (\d+):(\d+)$`).FindStringSubmatch(last)
	if user == nil || user[1] == "0" || user[2] == "0" {
		t.Fatalf("the user is %q", user)
	}
	for _, folder := range []string{"data", "config"} {
		if want := fmt.Sprintf("COPY --from=build --chown=%s:%s /out/%s /%s\n", user[1], user[2], folder, folder); !strings.Contains(last, want) {
			t.Errorf("the user cannot write /%s", folder)
		}
	}
	if !strings.Contains(last, "ca-certificates.crt") {
		t.Error("there are no CA roots in the image")
	}
	// What is left out of the build's context must not be part of the program.
	deps, err := exec.CommandContext(t.Context(), "go", "list", "-deps", "../cmd/caddy").Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(document(t, "contrib/Dockerfile.dockerignore")) {
		if line = strings.TrimSpace(line); strings.Contains(string(deps), "caddy-wechat/caddy-wechat/"+line+"/") || strings.Contains(string(deps), "caddy-wechat/caddy-wechat/"+line+"\n") {
			t.Errorf("%s is ignored and needed", line)
		}
	}
	compose := document(t, "contrib/compose.yaml")
	grace := regexp.MustCompile(`(?m)^    stop_grace_period: (\S+)$`).FindStringSubmatch(compose)
	if grace == nil {
		t.Fatal("compose.yaml has no stop_grace_period")
	}
	if d, err := time.ParseDuration(grace[1]); err != nil || d < 30*time.Second {
		t.Errorf("stop_grace_period: %v, %v", d, err)
	}
	if !strings.Contains(compose, "dockerfile: contrib/Dockerfile\n") || !strings.Contains(compose, "- data:/data\n") {
		t.Error("compose.yaml does not build contrib/Dockerfile, or keeps no data")
	}
	// A container that is given a file alone sees the old one for ever, once an editor has put another in its place.
	config := regexp.MustCompile(`"--config", "(\S+)/Caddyfile"\]`).FindStringSubmatch(last)
	if config == nil || !strings.Contains(compose, ":"+config[1]+":ro\n") {
		t.Errorf("compose.yaml does not mount the folder of the configuration: %q", config)
	}
	ignored := document(t, ".gitignore")
	for _, m := range regexp.MustCompile(`(?m)^      - \./([^:]+):(\S+):ro$`).FindAllStringSubmatch(compose, -1) {
		if !strings.Contains(ignored, "\n/contrib/"+m[1]+"/\n") {
			t.Errorf("git would take contrib/%s along", m[1])
		}
		if !strings.Contains(document(t, "docs/operations.md"), "`"+m[1]+"`") {
			t.Errorf("operations.md does not say what contrib/%s is", m[1])
		}
	}
}
