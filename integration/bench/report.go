package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// report is what a run showed, as the JSON file has it.
type report struct {
	Time      string              `json:"time"`
	Machine   string              `json:"machine"`
	Load      string              `json:"load_before"` // of the machine, before: what others take is in the figures
	Go        string              `json:"go"`
	Caddy     string              `json:"caddy"`
	Servers   []int               `json:"server_cpus"`
	Generator []int               `json:"generator_cpus"`
	Rate      float64             `json:"rate"`
	Figures   map[string]*figures `json:"figures"` // by scenario and target
	Ratios    map[string]spread   `json:"ratios"`  // CPU of the reference ÷ CPU of the target, likewise
}

func (r *report) add(s *scenario) {
	for i, t := range s.targets {
		key := s.name + ": " + t.name
		r.Figures[key] = &t.figures
		if i > 0 {
			r.Ratios[key] = over(s.targets[0].Full, t.Full, cpuRatio)
		}
	}
}

func (r *report) write(path string) error { return writeJSON(path, r) }

func writeJSON(path string, v any) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	text, err := json.MarshalIndent(v, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}

// head says what was measured where.
func (r *report) head(out io.Writer) {
	fmt.Fprintf(out, "%s, load %s\n%s, Caddy %s; servers on CPU %v, generator and far ends on %v\n", r.Machine, r.Load, r.Go, r.Caddy, r.Servers, r.Generator)
}

// tables print a scenario in Markdown.
func tables(out io.Writer, s *scenario, rate float64) {
	ref := s.targets[0]
	fmt.Fprintf(out, "\n### %s: %s\n\n", s.name, s.what)
	fmt.Fprintf(out, "| target | req/s | CPU µs/req | stock ÷ it (min to max) | it − same program, in the same way, µs (min to max) | p50, p99, p99.9 ms | RSS idle, at work MiB |\n| --- | --- | --- | --- | --- | --- | --- |\n")
	for _, t := range s.targets {
		ratio, more := "1", "–"
		if t != ref {
			v := over(ref.Full, t.Full, cpuRatio)
			ratio = fmt.Sprintf("**%.3f** (%.3f to %.3f)", v.Median, v.Min, v.Max)
		}
		if passing := s.target(t.passing); passing != nil {
			v := over(t.Full, passing.Full, cpuMore)
			more = fmt.Sprintf("%.1f (%.1f to %.1f)", v.Median, v.Min, v.Max)
		}
		fmt.Fprintf(out, "| %s | %.0f | %.1f | %s | %s | %s | %s, %s |\n", t.name, each(t.Full, paceOf).Median, each(t.Full, cpuOf).Median,
			ratio, more, quantiles(&t.full), mib(t.IdleRSS), mib(t.LoadRSS))
	}
	others(out, s)
	if rate == 0 {
		return
	}
	fmt.Fprintf(out, "\nAt %g req/s, from when each request was due:\n\n| target | p50, p99, p99.9 ms | p99 ÷ stock (min to max) | CPU µs/req |\n| --- | --- | --- | --- |\n", rate)
	for _, t := range s.targets {
		if len(t.Rated) == 0 {
			continue
		}
		ratio := "1"
		if t != ref {
			v := over(t.Rated, ref.Rated, p99Ratio)
			ratio = fmt.Sprintf("**%.2f** (%.2f to %.2f)", v.Median, v.Min, v.Max)
		}
		fmt.Fprintf(out, "| %s | %s | %s | %.1f |\n", t.name, quantiles(&t.atRate), ratio, each(t.Rated, cpuOf).Median)
	}
}

// quiet is how many processors others may keep busy for figures to be worth keeping.
const quiet = 0.05

// others says how much else the machine did: what others take is in every figure, in wrong shares.
func others(out io.Writer, s *scenario) {
	var all []float64
	for _, t := range s.targets {
		for _, r := range t.Full {
			all = append(all, r.Others)
		}
	}
	v := spreadOf(all)
	note := ""
	if v.Median > quiet {
		note = ": **too much, run it again on a quiet machine**"
	}
	fmt.Fprintf(out, "\nMeanwhile others kept %.2f processors busy (%.2f to %.2f)%s.\n", v.Median, v.Min, v.Max, note)
}

func quantiles(l *latencies) string {
	return fmt.Sprintf("%s, %s, %s", millis(l.at(0.5)), millis(l.at(0.99)), millis(l.at(0.999)))
}

func millis(d time.Duration) string { return fmt.Sprintf("%.2f", micros(d)/1000) }

func mib(n int64) string { return fmt.Sprintf("%.1f", float64(n)/(1<<20)) }

// baseline are the ratios of an earlier run, to be compared with.
type baseline struct {
	Machine string            `json:"machine"`
	Go      string            `json:"go"`
	Caddy   string            `json:"caddy"`
	Ratios  map[string]spread `json:"ratios"`
}

// moved is how far a median must be from the earlier one to count, unless the earlier rounds had it among them.
const moved = 0.03

// compare says what moved against a baseline. A machine's ratios are its own: another one's are shown all the same, and named.
func (r *report) compare(out io.Writer, path string) error {
	var b baseline
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		fmt.Fprintf(out, "\nno baseline in %s; BASELINE=update writes one\n", path)
		return nil
	}
	if err != nil {
		return err
	}
	if err := json.Unmarshal(text, &b); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	fmt.Fprintf(out, "\nagainst the baseline (%s; %s, Caddy %s):\n", b.Machine, b.Go, b.Caddy)
	still := 0
	for _, key := range slices.Sorted(maps.Keys(r.Ratios)) {
		now := r.Ratios[key]
		then, known := b.Ratios[key]
		switch {
		case !known:
			fmt.Fprintf(out, "- %s: %.3f, new\n", key, now.Median)
		case then.moved(now):
			way := "cheaper"
			if now.Median < then.Median {
				way = "dearer"
			}
			fmt.Fprintf(out, "- %s: %.3f, was %.3f (%.3f to %.3f): **%.1f %% %s**\n", key, now.Median, then.Median, then.Min, then.Max,
				100*math.Abs(now.Median/then.Median-1), way)
		default:
			still++
		}
	}
	fmt.Fprintf(out, "- %d did not move by more than %g %% and out of the baseline's own rounds\n", still, moved*100)
	return nil
}

// moved reports whether a later figure is another one.
func (s spread) moved(now spread) bool {
	return math.Abs(now.Median/s.Median-1) > moved && (now.Median < s.Min || now.Median > s.Max)
}

// update writes this run's ratios over those of the baseline; scenarios that did not run keep theirs.
func (r *report) update(path string) error {
	b := baseline{Ratios: map[string]spread{}}
	text, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(text, &b)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: %w", path, err)
	}
	b.Machine, b.Go, b.Caddy = r.Machine, r.Go, r.Caddy
	for key, s := range r.Ratios {
		b.Ratios[key] = spread{thousandths(s.Median), thousandths(s.Min), thousandths(s.Max)}
	}
	return writeJSON(path, b)
}

func thousandths(f float64) float64 { return math.Round(f*1000) / 1000 }

// firstWord is what `caddy version` begins with.
func firstWord(s string) string {
	word, _, _ := strings.Cut(strings.TrimSpace(s), " ")
	return cmp.Or(word, "unknown")
}
