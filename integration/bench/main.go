// Command bench holds the gateway against stock Caddy: the same Caddy, built by the same Go from the same go.mod, does
// the same job as far as it can, in the same rounds, under the same load. `make bench` builds and runs it; docs/performance.md
// has the method and the figures.
//
// The generator and the far ends (backend, WeChat) are in this process, on other processors than the server's, and judge
// every reply: a wrong one ends the run with an error, for a wrong answer has no speed.
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
	"regexp"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"time"
)

// generatorGC is the generator's GOGC: what it has prepared has no pointers, and it is not the one to be measured.
const generatorGC = 400

type options struct {
	plan
	world
	only     string // a regular expression of scenarios
	json     string
	baseline string
	update   bool
	memory   bool
	pin      bool
	scale    int // the memory cases are divided by it
}

func main() {
	o := options{scale: 1, plan: plan{pause: idlePause}}
	flag.StringVar(&o.stock, "stock", "bin/caddy-stock", "stock Caddy's binary")
	flag.StringVar(&o.gateway, "gateway", "bin/caddy", "the gateway's binary")
	flag.Func("also", "a further build of the gateway, as name=binary; may come again", o.also)
	flag.StringVar(&o.dir, "dir", ".run/bench", "the folder to which everything is written; emptied first")
	flag.StringVar(&o.json, "json", ".run/bench.json", "the file for all figures")
	flag.StringVar(&o.baseline, "baseline", "integration/bench/baseline.json", "ratios to compare with")
	flag.BoolVar(&o.update, "update", false, "write the baseline")
	flag.StringVar(&o.only, "run", "", "regular expression: which scenarios, or, for memory, which cases and the series; all by default")
	flag.IntVar(&o.rounds, "rounds", 11, "rounds of each target")
	flag.IntVar(&o.turns, "turns", 6, "turns that a round is cut into, for the targets to take by turns")
	flag.DurationVar(&o.time, "time", 3*time.Second, "how long a round takes at the pace of stock Caddy")
	flag.IntVar(&o.requests, "requests", 0, "requests in a round, in place of its time")
	flag.IntVar(&o.connections, "connections", 32, "keep-alive connections")
	flag.Float64Var(&o.rate, "rate", 2000, "requests a second in the rounds at a fixed rate; 0: no such rounds")
	flag.Float64Var(&o.sample, "sample", 0.01, "share of the encrypted replies that are decrypted and compared")
	flag.BoolVar(&o.profile, "profile", false, "take a CPU profile of each target after the rounds")
	flag.BoolVar(&o.memory, "memory", false, "measure memory in place of speed")
	flag.BoolVar(&o.pin, "pin", true, "keep server and generator on processors of their own")
	list := flag.String("variants", "", "further configurations of the gateway, separated by commas: all, "+strings.Join(variantKeys(), ", "))
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := o.check(*list)
	if err == nil {
		err = o.run(ctx, os.Stdout)
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func (o *options) also(value string) error {
	name, binary, ok := strings.Cut(value, "=")
	if !ok || name == "" || binary == "" {
		return errors.New("want name=binary")
	}
	binary, err := filepath.Abs(binary)
	o.others = append(o.others, program{name, binary})
	return err
}

// check completes the options.
func (o *options) check(list string) (err error) {
	if o.variants, err = chooseVariants(list); err != nil {
		return err
	}
	switch {
	case flag.NArg() > 0:
		return fmt.Errorf("argument %q: want flags only", flag.Arg(0))
	case o.rounds < 1 || o.turns < 1 || o.connections < 1 || o.requests < 0 || o.rate < 0 || o.sample < 0 || o.sample > 1 || o.time < 0:
		return errors.New("rounds, turns and connections must be positive, sample between 0 and 1, and nothing negative")
	case o.requests == 0 && o.time == 0:
		return errors.New("want -time or -requests")
	}
	for _, path := range []*string{&o.stock, &o.gateway, &o.dir} {
		if *path, err = filepath.Abs(*path); err != nil {
			return err
		}
	}
	return nil
}

// run measures and prints.
func (o *options) run(ctx context.Context, out io.Writer) (err error) {
	only, err := regexp.Compile(o.only)
	if err != nil {
		return fmt.Errorf("-run: %w", err)
	}
	defer debug.SetGCPercent(debug.SetGCPercent(generatorGC))
	r := &report{
		Time: time.Now().UTC().Format(time.RFC3339), Machine: machine(), Load: load(), Go: runtime.Version(), Rate: o.rate,
		Figures: map[string]*figures{}, Ratios: map[string]spread{},
	}
	if r.Caddy, err = version(ctx, o.stock); err != nil {
		return err
	}
	if ours, err := version(ctx, o.gateway); err != nil || ours != r.Caddy {
		return fmt.Errorf("stock is Caddy %s, the gateway %s %w", r.Caddy, ours, orNothing(err))
	}
	if r.Servers, r.Generator, err = o.place(out); err != nil {
		return err
	}
	r.head(out)
	if err := o.prepare(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, o.Close()) }()
	if o.memory {
		return o.measureMemory(ctx, only, out)
	}
	if err := o.keepPossible(ctx, out); err != nil {
		return err
	}
	scenarios, err := o.scenarios()
	if err != nil {
		return err
	}
	ran := 0
	for _, s := range scenarios {
		if !only.MatchString(s.name) {
			continue
		}
		ran++
		if err := o.measure(ctx, &o.world, s, out); err != nil {
			return err
		}
		r.add(s)
		tables(out, s, o.rate)
		goals(out, s)
		fmt.Fprintln(out)
	}
	if ran == 0 {
		return fmt.Errorf("-run %q: no such scenario", o.only)
	}
	if err := r.write(o.json); err != nil {
		return err
	}
	if err := r.compare(out, o.baseline); err != nil {
		return err
	}
	if o.update {
		return r.update(o.baseline)
	}
	return nil
}

// place gives the servers the first processor and the generator all others.
func (o *options) place(out io.Writer) (servers, generator []int, err error) {
	cpus, err := allowedCPUs()
	if err != nil {
		return nil, nil, err
	}
	if len(cpus) < 2 || !o.pin {
		fmt.Fprintln(out, "not pinned: server and generator share processors")
		return cpus, cpus, nil
	}
	o.cpus = cpus[:1]
	return cpus[:1], cpus[1:], pinSelf(cpus[1:])
}

func version(ctx context.Context, binary string) (string, error) {
	out, err := exec.CommandContext(ctx, binary, "version").Output()
	if err != nil {
		return "", fmt.Errorf("%s version: %w (make bench builds it)", binary, err)
	}
	return firstWord(string(out)), nil
}
