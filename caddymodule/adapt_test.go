package caddymodule

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite the expected JSON of testdata/adapt")

// TestAdapt adapts each file of testdata/adapt. Below the line of dashes stands the JSON that must come out, or
// lines `error: …`, each of which must be part of the error.
func TestAdapt(t *testing.T) {
	files, err := filepath.Glob("testdata/adapt/*.caddyfiletest")
	if err != nil || len(files) == 0 {
		t.Fatalf("no test files: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".caddyfiletest"), func(t *testing.T) {
			content, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			input, want, ok := strings.Cut(string(content), "----------\n")
			if !ok {
				t.Fatal("no line of dashes")
			}
			got, warnings, err := adapt(input)
			if strings.HasPrefix(want, "error: ") {
				checkAdaptError(t, err, want)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, w := range warnings {
				t.Errorf("warning: %s", w)
			}
			if *update {
				if err := os.WriteFile(file, []byte(input+"----------\n"+got+"\n"), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if diff := cmp.Diff(strings.TrimSpace(want), got); diff != "" {
				t.Errorf("adapted JSON (-want +got):\n%s", diff)
			}
		})
	}
}

func checkAdaptError(t *testing.T, err error, want string) {
	t.Helper()
	if err == nil {
		t.Fatal("adapted, want an error")
	}
	for line := range strings.Lines(want) {
		part, ok := strings.CutPrefix(strings.TrimSpace(line), "error: ")
		if !ok {
			t.Fatalf("not an error line: %s", line)
		}
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %q\ndoes not contain %q", err, part)
		}
	}
}

// adapt turns a Caddyfile into indented JSON.
func adapt(input string) (string, []string, error) {
	adapter := caddyconfig.GetAdapter("caddyfile")
	out, warnings, err := adapter.Adapt(caddyfile.Format([]byte(input)), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		return "", nil, err
	}
	var v any
	if err := json.Unmarshal(out, &v); err != nil {
		return "", nil, err
	}
	pretty, err := json.MarshalIndent(v, "", "\t")
	var texts []string
	for _, w := range warnings {
		texts = append(texts, w.String())
	}
	return string(pretty), texts, err
}
