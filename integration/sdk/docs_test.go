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

// documents are the titles of docs/sdk.md, by file.
var documents = map[string]string{"sdk.md": "# Any WeChat SDK, without a token", "sdk.zh-CN.md": "# 任何微信 SDK，都不持有 token"}

// document is docs/sdk.md, or its Chinese twin, by its headings.
func document(t *testing.T, file string) map[string]string {
	t.Helper()
	content, err := os.ReadFile("../../docs/" + file)
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
// they ran; in both languages.
func TestDocument(t *testing.T) {
	t.Parallel()
	for file, title := range documents {
		t.Run(file, func(t *testing.T) {
			t.Parallel()
			sections := document(t, file)
			checkDocument(t, sections, sections[title])
		})
	}
}

func checkDocument(t *testing.T, sections map[string]string, beginning string) {
	t.Helper()
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
			if !row.MatchString(beginning) {
				t.Errorf("the document does not say that %s %s was run", m[1], m[2])
			}
		}
	}
	if found != len(sdks) {
		t.Errorf("%d versions found, want %d", found, len(sdks))
	}
}
