package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
)

// redisVariable is the environment variable with the address of the Redis that the benchmark starts.
const redisVariable = "BENCH_REDIS"

// variant is a further configuration of the gateway in a scenario: lines for the blocks of its Caddyfile.
type variant struct {
	Name     string
	Scenario string
	Redis    bool   // needs redis-server
	Wechat   string // lines of the global option wechat
	Message  string // lines of wechat_message
	Proxy    string // lines of reverse_proxy behind wechat_message; empty: transport wechat_lean
	API      string // lines of wechat_api
}

// variants are those that can be asked for by name. What is measured without them is the gateway's defaults.
var variants = []variant{
	{
		Name: "redis, cluster", Scenario: "inbound", Redis: true,
		Wechat:  "store redis {\n\taddress {$" + redisVariable + "}\n}",
		Message: "deduplication cluster",
	},
	{
		Name: "redis, local", Scenario: "inbound", Redis: true,
		Wechat:  "store redis {\n\taddress {$" + redisVariable + "}\n}",
		Message: "deduplication local",
	},
	{
		Name: "redis", Scenario: "outbound", Redis: true,
		Wechat: "store redis {\n\taddress {$" + redisVariable + "}\n}",
	},
	{
		Name: "http, request buffers", Scenario: "inbound",
		Proxy: overHTTP + "\nrequest_buffers 64KiB",
	},
	{
		Name: "http, no compression", Scenario: "inbound",
		Proxy: overHTTP + " {\n\tcompression off\n}",
	},
	{
		Name: "http, request buffers, no compression", Scenario: "inbound",
		Proxy: overHTTP + " {\n\tcompression off\n}\nrequest_buffers 64KiB",
	},
}

// chooseVariants finds those named, each without blanks and commas as a part of the list; "all" are all.
func chooseVariants(list string) ([]variant, error) {
	var chosen []variant
	for name := range strings.SplitSeq(list, ",") {
		name = strings.TrimSpace(name)
		if name == "" {
			continue
		}
		before := len(chosen)
		for _, v := range variants {
			if name == "all" || name == v.key() {
				chosen = append(chosen, v)
			}
		}
		if len(chosen) == before {
			return nil, fmt.Errorf("no variant %q: there are all, %s", name, strings.Join(variantKeys(), ", "))
		}
	}
	return chosen, nil
}

// key is the variant's name on the command line.
func (v variant) key() string {
	return strings.ReplaceAll(strings.ReplaceAll(v.Name, ",", ""), " ", "-")
}

func variantKeys() []string {
	var keys []string
	for _, v := range variants {
		if !slices.Contains(keys, v.key()) {
			keys = append(keys, v.key())
		}
	}
	return keys
}

// keepPossible says which variants cannot run here, and keeps the others: those that need a Redis where none is installed, and
// those with an option that this build does not have.
func (w *world) keepPossible(ctx context.Context, out io.Writer) error {
	var possible []variant
	needRedis := false
	for _, v := range w.variants {
		if v.Redis {
			if _, err := exec.LookPath("redis-server"); err != nil {
				fmt.Fprintf(out, "skipped: variant %q, for redis-server is not installed\n", v.Name)
				continue
			}
		}
		if refusal := w.refusal(ctx, v); refusal != "" {
			fmt.Fprintf(out, "skipped: variant %q, which this build does not take: %s\n", v.Name, refusal)
			continue
		}
		needRedis = needRedis || v.Redis
		possible = append(possible, v)
	}
	w.variants = possible
	if !needRedis {
		return nil
	}
	var err error
	w.redis, err = startRedis(ctx, filepath.Join(w.dir, "redis"))
	return err
}

// refusal is what the gateway's adapter has against a variant's Caddyfile.
func (w *world) refusal(ctx context.Context, v variant) string {
	t := target{
		global: w.wechat(nil, v),
		site:   block("wechat_message", v.Message) + block("reverse_proxy http://127.0.0.1:9", v.Proxy) + block("wechat_api /", v.API),
	}
	file := filepath.Join(w.dir, "variant.Caddyfile")
	if err := os.WriteFile(file, []byte(t.caddyfile("off", "127.0.0.1:9")), 0o600); err != nil {
		return err.Error()
	}
	cmd := exec.CommandContext(ctx, w.gateway, "adapt", "--adapter", "caddyfile", "--config", file) //nolint:gosec // a program of ours
	cmd.Env = append(os.Environ(), redisVariable+"=127.0.0.1:9")
	out, err := cmd.CombinedOutput()
	if err == nil {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return lines[len(lines)-1]
}

// redisServer is a Redis of the benchmark's own. It runs on the generator's processor, as another machine's would.
type redisServer struct {
	addr   string
	cmd    *exec.Cmd
	exited chan struct{}
}

func (r *redisServer) address() string {
	if r == nil {
		return ""
	}
	return r.addr
}

// startRedis starts a redis-server that keeps nothing on disk.
func startRedis(ctx context.Context, dir string) (*redisServer, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	addr, err := integration.FreeAddr("")
	if err != nil {
		return nil, err
	}
	r := &redisServer{addr: addr, exited: make(chan struct{})}
	r.cmd = exec.Command("redis-server", "--port", integration.Port(addr), "--bind", "127.0.0.1", "--dir", dir, //nolint:gosec // arguments of our own
		"--save", "", "--appendonly", "no", "--daemonize", "no", "--logfile", "redis.log")
	if err := r.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { _ = r.cmd.Wait(); close(r.exited) }()
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	for {
		conn, err := net.DialTimeout("tcp", addr, time.Second)
		if err == nil {
			return r, conn.Close()
		}
		select {
		case <-r.exited:
			return nil, errors.New("redis-server ended at its start: " + filepath.Join(dir, "redis.log") + " says why")
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), r.Close())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Close ends the server.
func (r *redisServer) Close() error {
	if err := r.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-r.exited:
		return nil
	case <-time.After(dialTimeout):
		return r.cmd.Process.Kill()
	}
}
