// Command covercheck holds a coverage profile against the thresholds that the repository sets itself.
//
// The profile may come from several test binaries (-coverpkg), each with its own counts of the same
// block: a statement counts as covered when any of them ran it.
package main

import (
	"bufio"
	"flag"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
)

func main() {
	profile := flag.String("profile", "", "coverage profile, as go test -coverprofile writes it")
	thresholds := flag.String("thresholds", "scripts/coverage.txt", "file of lines: import/path percent")
	flag.Parse()
	ok, err := check(*profile, *thresholds, os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "covercheck:", err)
		os.Exit(2)
	}
	if !ok {
		os.Exit(1)
	}
}

func check(profile, thresholds string, out io.Writer) (bool, error) {
	p, err := os.Open(profile)
	if err != nil {
		return false, err
	}
	defer p.Close()
	covered, err := readProfile(p)
	if err != nil {
		return false, fmt.Errorf("%s: %w", profile, err)
	}
	t, err := os.Open(thresholds)
	if err != nil {
		return false, err
	}
	defer t.Close()
	want, err := readThresholds(t)
	if err != nil {
		return false, fmt.Errorf("%s: %w", thresholds, err)
	}
	return compare(covered, want, out), nil
}

// tally is how many statements a package has and how many of them ran.
type tally struct{ statements, ran int }

func (t tally) percent() float64 {
	if t.statements == 0 {
		return 0
	}
	return 100 * float64(t.ran) / float64(t.statements)
}

type threshold struct {
	pkg     string
	percent float64
}

// readProfile sums a profile up by package. A line reads: file:line.column,line.column statements count.
func readProfile(in io.Reader) (map[string]tally, error) {
	type block struct {
		statements int
		ran        bool
	}
	blocks := map[string]block{}
	lines := bufio.NewScanner(in)
	for n := 1; lines.Scan(); n++ {
		line := lines.Text()
		if strings.HasPrefix(line, "mode: ") {
			continue
		}
		f := strings.Fields(line)
		if len(f) != 3 || !strings.Contains(f[0], ":") {
			return nil, fmt.Errorf("line %d: not a block of a coverage profile", n)
		}
		statements, err := strconv.Atoi(f[1])
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		count, err := strconv.ParseUint(f[2], 10, 64)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		blocks[f[0]] = block{statements: statements, ran: blocks[f[0]].ran || count > 0}
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	tallies := map[string]tally{}
	for place, b := range blocks {
		file, _, _ := strings.Cut(place, ":")
		t := tallies[path.Dir(file)]
		t.statements += b.statements
		if b.ran {
			t.ran += b.statements
		}
		tallies[path.Dir(file)] = t
	}
	return tallies, nil
}

func readThresholds(in io.Reader) ([]threshold, error) {
	var want []threshold
	lines := bufio.NewScanner(in)
	for n := 1; lines.Scan(); n++ {
		text, _, _ := strings.Cut(lines.Text(), "#")
		f := strings.Fields(text)
		if len(f) == 0 {
			continue
		}
		if len(f) != 2 {
			return nil, fmt.Errorf("line %d: want: import/path percent", n)
		}
		percent, err := strconv.ParseFloat(f[1], 64)
		if err != nil || percent < 0 || percent > 100 {
			return nil, fmt.Errorf("line %d: %q is no percentage", n, f[1])
		}
		want = append(want, threshold{f[0], percent})
	}
	return want, lines.Err()
}

// compare prints one line per package and says whether every threshold is kept. A package with a
// threshold that the profile does not know is below it.
func compare(covered map[string]tally, want []threshold, out io.Writer) bool {
	ok := true
	seen := map[string]bool{}
	for _, w := range want {
		seen[w.pkg] = true
		t, known := covered[w.pkg]
		verdict := "ok"
		switch {
		case !known:
			verdict, ok = "FAIL: not in the profile", false
		case t.percent() < w.percent:
			verdict, ok = "FAIL", false
		}
		fmt.Fprintf(out, "%6.1f %%  at least %5.1f %%  %s  %s\n", t.percent(), w.percent, w.pkg, verdict)
	}
	var others []string
	for pkg := range covered {
		if !seen[pkg] {
			others = append(others, pkg)
		}
	}
	slices.Sort(others)
	for _, pkg := range others {
		fmt.Fprintf(out, "%6.1f %%  no threshold      %s\n", covered[pkg].percent(), pkg)
	}
	return ok
}
