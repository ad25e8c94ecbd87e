package sdk_test

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// source is where the lines of a section of docs/sdk.md were run.
var source = map[string]string{
	"silenceper/wechat": "silenceper_test.go",
	"PowerWeChat":       "powerwechat_test.go",
	"co-wechat-api":     "node/co-wechat-api.js",
	"wechat-api":        "node/wechat-api.js",
	"node-easywechat":   "node/node-easywechat.js",
}

var fence = regexp.MustCompile("(?s)```([a-z]+)\n(.*?)```")

// document is docs/sdk.md by its headings.
func document(t *testing.T) map[string]string {
	t.Helper()
	content, err := os.ReadFile("../../docs/sdk.md")
	if err != nil {
		t.Fatal(err)
	}
	sections := map[string]string{}
	for section := range strings.SplitSeq(string(content), "\n## ") {
		heading, text, _ := strings.Cut(section, "\n")
		sections[heading] = text
	}
	return sections
}

// TestDocument: the lines that docs/sdk.md has users change are lines that the tests ran, and it names the versions that
// they ran.
func TestDocument(t *testing.T) {
	t.Parallel()
	sections := document(t)
	for _, sdk := range sdks {
		ran, err := os.ReadFile(source[sdk.name])
		if err != nil {
			t.Fatal(err)
		}
		lines := 0
		for _, block := range fence.FindAllStringSubmatch(sections[sdk.name], -1) {
			for line := range strings.Lines(block[2]) {
				if line = strings.TrimSpace(line); line == "" {
					continue
				}
				lines++
				if !strings.Contains(string(ran), line) {
					t.Errorf("%s: nothing ran the line %s", sdk.name, line)
				}
			}
		}
		if lines < 2 {
			t.Errorf("%s: %d lines to change, want two", sdk.name, lines)
		}
	}
	versions := map[string]string{
		"go.mod":       `github.com/(?:ArtisanCloud/|silenceper/)(PowerWeChat|wechat)/v\d (v[0-9.]+)`,
		"package.json": `"(co-wechat-api|wechat-api|node-easywechat)": "([0-9.]+)"`,
	}
	found := 0
	for file, pattern := range versions {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(string(content), -1) {
			found++
			row := regexp.MustCompile(`(?m)^\| \[(silenceper/)?` + m[1] + `\]\([^)]*\) ` + regexp.QuoteMeta(m[2]) + ` \|`)
			if !row.MatchString(sections["# Any WeChat SDK, without a token"]) {
				t.Errorf("the document does not say that %s %s was run", m[1], m[2])
			}
		}
	}
	if found != len(sdks) {
		t.Errorf("%d versions found, want %d", found, len(sdks))
	}
}
