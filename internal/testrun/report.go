package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
)

// event is one line of `go test -json`; see `go doc cmd/test2json`, and `go help buildjson` for the
// two actions build-output and build-fail.
type event struct {
	Action      string
	Package     string
	Test        string
	Output      string
	ImportPath  string
	FailedBuild string
	Elapsed     float64 // seconds
}

type testID struct{ pkg, test string }

// report folds the events of one or more runs into counts and says what failed, and how, as it happens.
type report struct {
	out      io.Writer
	allowed  map[testID]bool
	passed   int
	failed   int
	skipped  int
	problems []string

	output map[testID]*bytes.Buffer // what tests that have not ended have printed; test "" is the package itself
	builds map[string]*bytes.Buffer // the compiler's output
	count  map[string]*packageCount // of packages that have not ended
}

type packageCount struct{ ran, failed int }

func newReport(out io.Writer, allowed map[testID]bool) *report {
	return &report{
		out:     out,
		allowed: allowed,
		output:  map[testID]*bytes.Buffer{},
		builds:  map[string]*bytes.Buffer{},
		count:   map[string]*packageCount{},
	}
}

func (r *report) ran() int { return r.passed + r.failed + r.skipped }

func (r *report) problem(format string, args ...any) {
	r.problems = append(r.problems, fmt.Sprintf(format, args...))
}

// read folds events until in ends. Lines that are no events are printed as they are.
func (r *report) read(in io.Reader) error {
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if json.Unmarshal(line, &e) == nil && e.Action != "" {
				r.fold(e)
			} else {
				r.out.Write(line)
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read test events: %w", err)
		}
	}
}

func (r *report) fold(e event) {
	id := testID{e.Package, e.Test}
	switch e.Action {
	case "build-output":
		buffer(r.builds, e.ImportPath).WriteString(e.Output)
	case "run":
		buffer(r.output, id)
	case "output":
		buffer(r.output, id).WriteString(e.Output)
	case "pass", "skip", "fail":
		if e.Test == "" {
			r.endPackage(e)
		} else {
			r.endTest(e, id)
		}
	}
}

func (r *report) endTest(e event, id testID) {
	c := r.counts(e.Package)
	c.ran++
	switch e.Action {
	case "pass":
		r.passed++
	case "skip":
		r.skipped++
		if !r.allowed[id] {
			r.problem("%s %s: skipped, and not on the list of allowed skips", e.Package, e.Test)
			r.dump(id)
		}
	case "fail":
		r.failed++
		c.failed++
		r.problem("%s %s", e.Package, e.Test)
		r.dump(id)
	}
	delete(r.output, id)
}

// endPackage also accounts for failures that belong to no test: a build that failed, an exit in
// TestMain, a leaked goroutine found there, a time-out.
func (r *report) endPackage(e event) {
	c := r.counts(e.Package)
	if e.Action == "fail" {
		if b := r.builds[e.FailedBuild]; b != nil {
			r.out.Write(b.Bytes())
		}
		for _, id := range r.unfinished(e.Package) {
			r.problem("%s %s: did not end", id.pkg, id.test)
			r.dump(id)
		}
		r.dump(testID{pkg: e.Package})
		if c.failed == 0 {
			r.failed++
			r.problem("%s: the package failed outside its tests", e.Package)
		}
	}
	if c.ran > 0 || e.Action == "fail" {
		fmt.Fprintf(r.out, "%-4s %7.2fs %5d tests  %s\n", e.Action, e.Elapsed, c.ran, e.Package)
	}
	maps.DeleteFunc(r.output, func(id testID, _ *bytes.Buffer) bool { return id.pkg == e.Package })
	delete(r.count, e.Package)
}

func (r *report) unfinished(pkg string) []testID {
	var ids []testID
	for id := range r.output {
		if id.pkg == pkg && id.test != "" {
			ids = append(ids, id)
		}
	}
	slices.SortFunc(ids, func(a, b testID) int { return strings.Compare(a.test, b.test) })
	return ids
}

func (r *report) dump(id testID) {
	if b := r.output[id]; b != nil {
		r.out.Write(b.Bytes())
	}
}

func (r *report) counts(pkg string) *packageCount {
	c := r.count[pkg]
	if c == nil {
		c = &packageCount{}
		r.count[pkg] = c
	}
	return c
}

// close prints what went wrong and, last, the counts. ok is false when anything did.
func (r *report) close() (line string, ok bool) {
	if r.ran() == 0 {
		r.problem("no test ran")
	}
	if len(r.problems) > 0 {
		fmt.Fprintf(r.out, "\nwhat went wrong:\n")
		for _, p := range r.problems {
			fmt.Fprintln(r.out, "  "+p)
		}
	}
	line = fmt.Sprintf("%d passed, %d failed, %d skipped", r.passed, r.failed, r.skipped)
	fmt.Fprintln(r.out, line)
	return line, len(r.problems) == 0
}

func buffer[K comparable](m map[K]*bytes.Buffer, k K) *bytes.Buffer {
	b := m[k]
	if b == nil {
		b = &bytes.Buffer{}
		m[k] = b
	}
	return b
}

// readAllowed reads the list of allowed skips: "import/path TestName/sub  # reason" a line.
// The reason is demanded, for a skip without one is how tests die.
func readAllowed(path string) (map[testID]bool, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	allowed := map[testID]bool{}
	n := 0
	for line := range strings.Lines(string(text)) {
		n++
		entry, reason, _ := strings.Cut(line, "#")
		f := strings.Fields(entry)
		if len(f) == 0 {
			continue
		}
		if len(f) != 2 || strings.TrimSpace(reason) == "" {
			return nil, fmt.Errorf("%s:%d: want: import/path TestName  # reason", path, n)
		}
		allowed[testID{f[0], f[1]}] = true
	}
	return allowed, nil
}
