package sdk_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// binary is the gateway, built once for all tests.
var binary string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "caddy-wechat-sdk")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	binary = filepath.Join(dir, "caddy")
	// The flags are those of the other builds of the gateway, so that Caddy is compiled once for all of them.
	args, env := []string{"build", "-trimpath", "-buildvcs=false"}, append(os.Environ(), "CGO_ENABLED=0")
	if raceEnabled {
		args, env = []string{"build", "-race"}, append(os.Environ(), "CGO_ENABLED=1")
	}
	build := exec.Command("go", append(args, "-o", binary, "./cmd/caddy")...)
	build.Dir, build.Env = "../..", env
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building the gateway: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}
