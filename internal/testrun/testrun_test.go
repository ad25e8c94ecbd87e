package main

import (
	"bytes"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestReportCounts(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		events string
		line   string
		ok     bool
		says   []string
		hides  []string
	}{
		{
			name: "passes print no output of their own",
			events: `{"Action":"start","Package":"p"}
{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestA","Output":"chatter\n"}
{"Action":"pass","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Output":"PASS\n"}
{"Action":"pass","Package":"p","Elapsed":0.5}
`,
			line: "1 passed, 0 failed, 0 skipped", ok: true, says: []string{"1 tests  p"}, hides: []string{"chatter"},
		},
		{
			name: "a failed subtest is shown and counted",
			events: `{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"run","Package":"p","Test":"TestA/x"}
{"Action":"output","Package":"p","Test":"TestA/x","Output":"got 1, want 2\n"}
{"Action":"fail","Package":"p","Test":"TestA/x"}
{"Action":"fail","Package":"p","Test":"TestA"}
{"Action":"fail","Package":"p"}
`,
			line: "0 passed, 2 failed, 0 skipped", says: []string{"got 1, want 2", "p TestA/x"}, hides: []string{"outside its tests"},
		},
		{
			name: "a skip that nobody allowed",
			events: `{"Action":"output","Package":"p","Test":"TestB","Output":"no redis\n"}
{"Action":"skip","Package":"p","Test":"TestB"}
{"Action":"pass","Package":"p"}
`,
			line: "0 passed, 0 failed, 1 skipped", says: []string{"no redis", "p TestB: skipped"},
		},
		{
			name: "a skip on the list",
			events: `{"Action":"skip","Package":"p","Test":"TestAllowed"}
{"Action":"pass","Package":"p"}
`,
			line: "0 passed, 0 failed, 1 skipped", ok: true,
		},
		{
			name: "a package without test files is no skip",
			events: `{"Action":"pass","Package":"p","Test":"TestA"}
{"Action":"pass","Package":"p"}
{"Action":"skip","Package":"q"}
`,
			line: "1 passed, 0 failed, 0 skipped", ok: true, hides: []string{"  q"},
		},
		{
			name: "a build that failed",
			events: `{"Action":"build-output","ImportPath":"p [p.test]","Output":"x.go:1: undefined: y\n"}
{"Action":"build-fail","ImportPath":"p [p.test]"}
{"Action":"fail","Package":"p","FailedBuild":"p [p.test]"}
`,
			line: "0 passed, 1 failed, 0 skipped", says: []string{"undefined: y", "outside its tests"},
		},
		{
			name: "a time-out names the test that did not end",
			events: `{"Action":"pass","Package":"p","Test":"TestA"}
{"Action":"run","Package":"p","Test":"TestSlow"}
{"Action":"output","Package":"p","Test":"TestSlow","Output":"panic: test timed out\n"}
{"Action":"fail","Package":"p"}
`,
			line: "1 passed, 1 failed, 0 skipped", says: []string{"p TestSlow: did not end", "panic: test timed out"},
		},
		{
			name: "a leak found after the tests",
			events: `{"Action":"pass","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Output":"goleak: Errors on successful test run\n"}
{"Action":"fail","Package":"p"}
`,
			line: "1 passed, 1 failed, 0 skipped", says: []string{"goleak: Errors"},
		},
		{name: "nothing ran", events: "no event\n", line: "0 passed, 0 failed, 0 skipped", says: []string{"no event", "no test ran"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var out bytes.Buffer
			r := newReport(&out, map[testID]bool{{"p", "TestAllowed"}: true})
			if err := r.read(strings.NewReader(tt.events)); err != nil {
				t.Fatal(err)
			}
			line, ok := r.close()
			if line != tt.line || ok != tt.ok {
				t.Errorf("got %q, %v; want %q, %v", line, ok, tt.line, tt.ok)
			}
			if !strings.HasSuffix(out.String(), "\n"+tt.line+"\n") && out.String() != tt.line+"\n" {
				t.Errorf("the counts are not alone on the last line of:\n%s", out.String())
			}
			for _, s := range tt.says {
				if !strings.Contains(out.String(), s) {
					t.Errorf("%q is missing from:\n%s", s, out.String())
				}
			}
			for _, s := range tt.hides {
				if strings.Contains(out.String(), s) {
					t.Errorf("%q is in:\n%s", s, out.String())
				}
			}
		})
	}
}

func TestReadAllowed(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, text string
		want       []testID
		bad        bool
	}{
		{name: "comments and blank lines", text: "# why\n\n"},
		{name: "entry", text: "a/b TestC/d # the kernel lacks it\n", want: []testID{{"a/b", "TestC/d"}}},
		{name: "no reason", text: "a/b TestC\n", bad: true},
		{name: "empty reason", text: "a/b TestC #\n", bad: true},
		{name: "package alone", text: "a/b # all of it\n", bad: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			path := write(t, t.TempDir(), "skips.txt", tt.text)
			got, err := readAllowed(path)
			if (err != nil) != tt.bad {
				t.Fatalf("error %v, want one: %v", err, tt.bad)
			}
			if ids := slices.Collect(maps.Keys(got)); !slices.Equal(ids, tt.want) {
				t.Errorf("got %v, want %v", ids, tt.want)
			}
		})
	}
}

// TestRun runs the whole plan on a module made for it: a nested module, a test that only a build
// without the race detector has, a soak test, and the tools module, which is none of its business.
func TestRun(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name  string
		test  string // body of an extra test of the root package
		soak  bool
		line  string
		code  int
		says  []string
		hides []string
	}{
		{
			name: "all", test: "",
			line: "4 passed, 0 failed, 0 skipped", says: []string{"without race, .", "module nested"}, hides: []string{"tools", "testdata"},
		},
		{name: "failure", test: `t.Error("broken on purpose")`, line: "4 passed, 1 failed, 0 skipped", code: 1, says: []string{"broken on purpose"}},
		{name: "skip", test: `t.Skip("too lazy")`, line: "4 passed, 0 failed, 1 skipped", code: 1, says: []string{"too lazy"}},
		{name: "build", test: `undefined()`, line: "1 passed, 2 failed, 0 skipped", code: 1, says: []string{"undefined: undefined"}},
		{name: "soak", test: `t.Error("not asked for")`, soak: true, line: "1 passed, 0 failed, 0 skipped", says: []string{"soak, ."}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			root := t.TempDir()
			write(t, root, "go.mod", "module example.test/sample\n\ngo 1.26.0\n")
			write(t, root, "sample_test.go", "package sample\n\nimport \"testing\"\n\nfunc TestA(t *testing.T) { t.Run(\"sub\", func(*testing.T) {}) }\n")
			if tt.test != "" {
				write(t, root, "extra_test.go", "package sample\n\nimport \"testing\"\n\nfunc TestExtra(t *testing.T) { "+tt.test+" }\n")
			}
			write(t, root, "alloc_test.go", "//go:build !race\n\npackage sample\n\nimport \"testing\"\n\nfunc TestAlloc(*testing.T) {}\n")
			write(t, root, "soak_test.go", "//go:build soak\n\npackage sample\n\nimport \"testing\"\n\nfunc TestSoak(*testing.T) {}\n")
			write(t, root, "nested/go.mod", "module example.test/nested\n\ngo 1.26.0\n")
			write(t, root, "nested/nested_test.go", "package nested\n\nimport \"testing\"\n\nfunc TestNested(*testing.T) {}\n")
			write(t, root, "tools/go.mod", "module example.test/tools\n\ngo 1.26.0\n")
			write(t, root, "testdata/go.mod", "module example.test/testdata\n")
			write(t, root, "skips.txt", "")

			var out bytes.Buffer
			summary := filepath.Join(t.TempDir(), "summary")
			o := options{root: root, skips: "skips.txt", summary: summary, timeout: time.Minute, soak: tt.soak, patterns: []string{everything}}
			code := run(t.Context(), o, &out)
			line, err := os.ReadFile(summary)
			if err != nil {
				t.Fatalf("%v; output:\n%s", err, out.String())
			}
			if got := strings.TrimSpace(string(line)); got != tt.line || code != tt.code {
				t.Errorf("got %q, code %d; want %q, code %d; output:\n%s", got, code, tt.line, tt.code, out.String())
			}
			for _, s := range tt.says {
				if !strings.Contains(out.String(), s) {
					t.Errorf("%q is missing from:\n%s", s, out.String())
				}
			}
			for _, s := range tt.hides {
				if strings.Contains(out.String(), s) {
					t.Errorf("%q is in:\n%s", s, out.String())
				}
			}
		})
	}
}

func write(t *testing.T, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, filepath.FromSlash(name))
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}
