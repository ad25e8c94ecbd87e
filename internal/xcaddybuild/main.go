// Command xcaddybuild builds Caddy from xcaddy.json as a user of xcaddy would, with this checkout in
// the place of the published module, and looks whether the modules that the file promises are in it.
//
// It runs from the repository's root, uses the xcaddy that tools/go.mod pins, and writes below one
// folder only.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
)

func main() {
	file := flag.String("spec", "xcaddy.json", "the build's description")
	folder := flag.String("folder", ".run/xcaddy", "folder for the binary and for xcaddy's temporary files")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := build(ctx, *file, *folder)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "xcaddybuild:", err)
		os.Exit(1)
	}
}

func build(ctx context.Context, file, folder string) error {
	s, err := readSpec(file)
	if err != nil {
		return err
	}
	if folder, err = filepath.Abs(folder); err != nil {
		return err
	}
	temporary := filepath.Join(folder, "tmp")
	if err := os.MkdirAll(temporary, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(temporary)
	goproxy, err := output(ctx, "go", "env", "GOPROXY")
	if err != nil {
		return err
	}

	binary := filepath.Join(folder, "caddy")
	args := append([]string{"tool", "-modfile=tools/go.mod", "xcaddy"}, s.buildArgs(".", binary)...)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "GOPROXY="+proxiesThenOff(goproxy), "GOWORK=off", "TMPDIR="+temporary)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("xcaddy: %w", err)
	}
	return verify(ctx, s, binary)
}

// verify asks the built binary what it is.
func verify(ctx context.Context, s spec, binary string) error {
	version, err := output(ctx, binary, "version")
	if err != nil {
		return err
	}
	if got, _, _ := strings.Cut(strings.TrimSpace(version), " "); got != s.CaddyVersion {
		return fmt.Errorf("the build says that it is Caddy %s, want %s", got, s.CaddyVersion)
	}
	listing, err := output(ctx, binary, "list-modules")
	if err != nil {
		return err
	}
	if missing := missingModules(listing, s.Modules); len(missing) > 0 {
		return fmt.Errorf("the build lacks the modules %s", strings.Join(missing, ", "))
	}
	fmt.Printf("%s: Caddy %s with %s\n", binary, s.CaddyVersion, strings.Join(s.Modules, ", "))
	return nil
}

func output(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err)
	}
	return string(out), nil
}
