package integration_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// fakeTools is a folder of shell scripts by name, to be a PATH.
func fakeTools(t *testing.T, scripts map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, script := range scripts {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil { //nolint:gosec // is run
			t.Fatal(err)
		}
	}
	return dir
}

// TestOldGo: whoever has a Go that cannot build this is told by make what to do, before anything is built.
func TestOldGo(t *testing.T) {
	t.Parallel()
	const own = "go: errors parsing go.mod: invalid go version" // what Go 1.19 says
	tools := fakeTools(t, map[string]string{"go": `echo "` + own + `" >&2; exit 1`})
	wanted := regexp.MustCompile(`(?m)^go (\S+)$`).FindStringSubmatch(document(t, "go.mod"))
	if wanted == nil {
		t.Fatal("go.mod names no version")
	}
	for _, target := range []string{"build", "run", "test"} {
		cmd := exec.CommandContext(t.Context(), "make", "--no-print-directory", "-C", "..", target, "GO="+filepath.Join(tools, "go")) //nolint:gosec // ours
		cmd.Env = append(os.Environ(), "MAKEFLAGS=")                                                                                  // of a make that runs the tests
		out, err := cmd.CombinedOutput()
		if err == nil {
			t.Errorf("make %s does not fail", target)
		}
		for _, words := range []string{own, "Go " + wanted[1] + " or newer", "https://go.dev/dl/", "GOTOOLCHAIN=auto"} {
			if !strings.Contains(string(out), words) {
				t.Errorf("make %s does not say %q:\n%s", target, words, out)
			}
		}
		if strings.Contains(string(out), "building") || strings.Contains(string(out), "Debian") {
			t.Errorf("make %s goes on:\n%s", target, out)
		}
	}
}

// TestNeedsWithoutRoot: who may not install what the tests need gets a line that does, as far as the system has apt.
func TestNeedsWithoutRoot(t *testing.T) {
	t.Parallel()
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	for _, apt := range []bool{true, false} {
		scripts := map[string]string{"go": "echo no-such-compiler", "id": "echo 1000", "sh": `exec ` + sh + ` "$@"`}
		want := "The tests need what these Debian packages hold: gcc libc6-dev redis-server nodejs npm chromium fonts-wqy-zenhei\n"
		if apt {
			scripts["apt-get"] = "echo apt-get ran"
			want = "sudo apt-get update && sudo apt-get install -y --no-install-recommends gcc libc6-dev redis-server nodejs npm chromium fonts-wqy-zenhei\n"
		}
		cmd := exec.CommandContext(t.Context(), sh, "../scripts/install-test-needs.sh") //nolint:gosec // ours
		cmd.Env = []string{"PATH=" + fakeTools(t, scripts)}
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), want) || strings.Contains(string(out), "apt-get ran") {
			t.Errorf("with apt %v: %v\n%s", apt, err, out)
		}
	}
}
