// Command testrun runs every test of this repository the way `make test` and CI want it:
//
//   - all packages of the module and of the modules nested in it, shuffled, with the race detector;
//   - then, without it, the tests whose files the race build leaves out (allocation gates mostly:
//     the race detector allocates on its own account);
//   - a skip that the list of allowed skips does not name is a failure, for a skipped test tests nothing;
//   - the last line counts: "N passed, N failed, N skipped".
//
// With -soak it runs only the tests in files behind the build tag soak.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// stopGrace is how long `go test` has to end its test binaries after an interrupt.
const stopGrace = 15 * time.Second

type options struct {
	root     string
	skips    string
	summary  string
	timeout  time.Duration
	parallel int
	soak     bool
	patterns []string
}

func main() {
	var o options
	flag.StringVar(&o.root, "root", ".", "the repository's root")
	flag.StringVar(&o.skips, "skips", "scripts/allowed-skips.txt", "file that names the skips that are no failure, below the root")
	flag.StringVar(&o.summary, "summary", "", "write the closing line to this file too")
	flag.DurationVar(&o.timeout, "timeout", 20*time.Minute, "longest time for one package's tests") // far beyond what they take: it ends what hangs
	flag.IntVar(&o.parallel, "p", 0, "packages built and tested at a time; 0: as many as there are processors")
	flag.BoolVar(&o.soak, "soak", false, "run only the tests behind the build tag soak")
	flag.Parse()
	if o.patterns = flag.Args(); len(o.patterns) == 0 {
		o.patterns = []string{everything}
	}

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, o, os.Stdout)
	stop()
	os.Exit(code)
}

// run carries out the plan and returns the exit code.
func run(ctx context.Context, o options, out io.Writer) int {
	allowed, err := readAllowed(filepath.Join(o.root, o.skips))
	if err != nil {
		fmt.Fprintln(out, "testrun:", err)
		return 2
	}
	steps, err := plan(ctx, o)
	if err != nil {
		fmt.Fprintln(out, "testrun:", err)
		return 2
	}
	if o.soak && len(steps) == 0 {
		fmt.Fprintln(out, "testrun: no test is behind the build tag soak")
		return 0
	}
	r := newReport(out, allowed)
	for _, s := range steps {
		fmt.Fprintf(out, "== %s: go %s\n", s.title, strings.Join(s.args, " "))
		if err := s.run(ctx, r); err != nil {
			r.problem("%s: %v", s.title, err)
		}
		if ctx.Err() != nil {
			r.problem("interrupted")
			break
		}
	}
	line, ok := r.close()
	if o.summary != "" {
		if err := os.WriteFile(o.summary, []byte(line+"\n"), 0o644); err != nil {
			fmt.Fprintln(out, "testrun:", err)
			return 2
		}
	}
	if !ok {
		return 1
	}
	return 0
}

// step is one `go test -json`.
type step struct {
	title string
	dir   string
	args  []string
}

// plan lists the steps: one per module, then one per package that has tests the race build leaves out.
func plan(ctx context.Context, o options) ([]step, error) {
	modules := []string{o.root}
	if o.patterns[0] == everything {
		var err error
		if modules, err = findModules(o.root); err != nil {
			return nil, err
		}
	}
	common := []string{"test", "-json", "-count=1", "-timeout=" + o.timeout.String()}
	if o.parallel > 0 {
		common = append(common, fmt.Sprintf("-p=%d", o.parallel))
	}
	var raced, left []step
	for _, m := range modules {
		rel, err := filepath.Rel(o.root, m)
		if err != nil {
			return nil, err
		}
		dirs, err := packageDirs(ctx, m, o.patterns)
		if err != nil {
			return nil, err
		}
		if !o.soak {
			args := append(append([]string{}, common...), "-race", "-shuffle=on")
			raced = append(raced, step{title: "race, module " + rel, dir: m, args: append(args, o.patterns...)})
		}
		for _, d := range dirs {
			s, err := leftOut(o, m, d, common)
			if err != nil {
				return nil, err
			}
			if s != nil {
				left = append(left, *s)
			}
		}
	}
	return append(raced, left...), nil
}

// leftOut is the step that runs what the race pass did not compile in the package at dir, or nil.
// With -soak it is what only the build tag soak compiles.
func leftOut(o options, module, dir string, common []string) (*step, error) {
	with, without := []string(nil), []string{"race"}
	if o.soak {
		with, without = []string{"soak", "race"}, []string{"race"}
	}
	names, err := testsOnlyWith(dir, with, without)
	if err != nil || len(names) == 0 {
		return nil, err
	}
	rel, err := filepath.Rel(module, dir)
	if err != nil {
		return nil, err
	}
	args := append([]string{}, common...)
	title := "without race, " + rel
	if o.soak {
		args = append(args, "-race", "-tags=soak")
		title = "soak, " + rel
	}
	args = append(args, "-run=^("+strings.Join(names, "|")+")$", "./"+filepath.ToSlash(rel))
	return &step{title: title, dir: module, args: args}, nil
}

// run starts the step and folds its events into r. The error says what the events could not:
// that the command failed although no test did.
func (s step) run(ctx context.Context, r *report) error {
	cmd := exec.CommandContext(ctx, "go", s.args...)
	cmd.Dir = s.dir
	cmd.Stderr = os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = stopGrace
	events, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	before := r.failed
	ranBefore := r.ran()
	if err := cmd.Start(); err != nil {
		return err
	}
	readErr := r.read(events)
	err = cmd.Wait()
	switch {
	case err != nil && r.failed == before:
		return fmt.Errorf("go test: %w", err)
	case readErr != nil:
		return readErr
	case r.ran() == ranBefore:
		return errors.New("ran no test")
	}
	return nil
}
