package integration

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Deadlines of the gateway process.
const (
	startTimeout = 30 * time.Second
	stopTimeout  = 20 * time.Second
)

// Gateway is a gateway process: the built Caddy with the gateway's modules.
type Gateway struct {
	// Binary is the caddy binary.
	Binary string
	// Dir is the process's home: its storage, its autosaved config and its Caddyfile are below it.
	Dir string
	// Caddyfile is the path of the configuration.
	Caddyfile string
	// Env are further environment variables, as NAME=value. The process inherits PATH and nothing else.
	Env []string
	// Admin is the address of the admin endpoint that the configuration names, such as 127.0.0.1:2019.
	Admin string
	// Output receives what the process prints, beside Log.
	Output io.Writer

	mu     sync.Mutex
	log    bytes.Buffer
	cmd    *exec.Cmd
	exited chan struct{}
	err    error
}

// Build builds the gateway's program from the project in the folder root, and returns its path in the folder dir. The
// flags are those of `make build` and, with race, of `go test -race`, so that Caddy is compiled once for all of them.
func Build(root, dir string, race bool) (binary string, err error) {
	if binary, err = filepath.Abs(filepath.Join(dir, "caddy")); err != nil {
		return "", err
	}
	args, cgo := []string{"build", "-trimpath", "-buildvcs=false"}, "CGO_ENABLED=0"
	if race {
		args, cgo = []string{"build", "-race"}, "CGO_ENABLED=1"
	}
	cmd := exec.Command("go", append(args, "-o", binary, "./cmd/caddy")...) //nolint:gosec // arguments of our own
	cmd.Dir, cmd.Env = root, append(os.Environ(), cgo)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building the gateway: %w\n%s", err, out)
	}
	return binary, nil
}

// Start starts the process and returns once its admin endpoint answers, which is after its sites do.
func (g *Gateway) Start(ctx context.Context) error {
	cmd := exec.Command(g.Binary, "run", "--adapter", "caddyfile", "--config", g.Caddyfile)
	cmd.Dir, cmd.Env = g.Dir, g.environment()
	cmd.Stdout, cmd.Stderr = g, g
	if err := cmd.Start(); err != nil {
		return err
	}
	exited := make(chan struct{})
	g.mu.Lock()
	g.cmd, g.exited, g.err = cmd, exited, nil
	g.mu.Unlock()
	go func() {
		err := cmd.Wait()
		g.mu.Lock()
		g.err = err
		g.mu.Unlock()
		close(exited)
	}()
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		select {
		case <-exited:
			return fmt.Errorf("gateway ended at start: %w\n%s", errors.Join(g.err, errEnded), g.Log())
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("gateway does not answer on its admin endpoint: %w\n%s", ctx.Err(), g.Log()), g.Kill())
		case <-time.After(20 * time.Millisecond):
		}
		req, _ := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+g.Admin+"/config/", nil)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			continue
		}
		body, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if resp.StatusCode == http.StatusOK && len(bytes.TrimSpace(body)) > len("null") {
			return nil
		}
	}
}

var errEnded = errors.New("process ended")

// environment keeps everything the process writes below Dir.
func (g *Gateway) environment() []string {
	return append([]string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + g.Dir,
		"XDG_DATA_HOME=" + filepath.Join(g.Dir, "data"), "XDG_CONFIG_HOME=" + filepath.Join(g.Dir, "config"),
		"GORACE=atexit_sleep_ms=0", // else what was built with -race waits a second before it ends
	}, g.Env...)
}

// Command runs another caddy command, such as reload or validate, in the gateway's environment.
func (g *Gateway) Command(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, g.Binary, args...)
	cmd.Dir, cmd.Env = g.Dir, g.environment()
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// Reload puts the Caddyfile in force again.
func (g *Gateway) Reload(ctx context.Context) error {
	out, err := g.Command(ctx, "reload", "--adapter", "caddyfile", "--config", g.Caddyfile, "--address", g.Admin, "--force")
	if err != nil {
		return fmt.Errorf("reload: %w\n%s", err, out)
	}
	return nil
}

// Kill ends the process at once, as kill -9 does.
func (g *Gateway) Kill() error { return g.end(syscall.SIGKILL) }

// Stop ends the process in good order.
func (g *Gateway) Stop() error { return g.end(syscall.SIGTERM) }

func (g *Gateway) end(sig syscall.Signal) error {
	g.mu.Lock()
	cmd, exited := g.cmd, g.exited
	g.mu.Unlock()
	if cmd == nil {
		return nil
	}
	select {
	case <-exited:
		return nil
	default:
	}
	if err := cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-exited:
		return nil
	case <-time.After(stopTimeout):
		_ = cmd.Process.Kill()
		<-exited
		return fmt.Errorf("gateway did not end within %v of %v", stopTimeout, sig)
	}
}

// PID is the process id of the process that Start started last; 0 before.
func (g *Gateway) PID() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.cmd == nil {
		return 0
	}
	return g.cmd.Process.Pid
}

// Exited is closed when the process that Start started has ended.
func (g *Gateway) Exited() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.exited
}

// Write takes the process's output; it is not for callers.
func (g *Gateway) Write(b []byte) (int, error) {
	g.mu.Lock()
	g.log.Write(b)
	g.mu.Unlock()
	if g.Output != nil {
		return g.Output.Write(b)
	}
	return len(b), nil
}

// Log is all that the process has printed.
func (g *Gateway) Log() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.log.String()
}

// CACert is the certificate of Caddy's internal CA in the gateway's storage, as PEM.
func (g *Gateway) CACert() ([]byte, error) {
	return os.ReadFile(filepath.Join(g.Dir, "data", "caddy", "pki", "authorities", "local", "root.crt"))
}

// Client is an HTTP client that trusts the gateway's internal CA, follows no redirect, and reaches addr whatever the
// name in the URL is; with addr empty it goes where the URL says.
func (g *Gateway) Client(addr string) (*http.Client, error) {
	pem, err := g.CACert()
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, errors.New("the internal CA's certificate is not PEM")
	}
	dialer := &net.Dialer{Timeout: 5 * time.Second}
	return &http.Client{
		Timeout:       30 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			TLSClientConfig: &tls.Config{RootCAs: pool}, MaxIdleConnsPerHost: 64, ForceAttemptHTTP2: true,
			DialContext: func(ctx context.Context, network, target string) (net.Conn, error) {
				if addr != "" {
					target = addr
				}
				return dialer.DialContext(ctx, network, target)
			},
		},
	}, nil
}

// The ports that FreeAddr gives are below those that systems give to outgoing connections and to listeners on port 0
// (32768 and up on Linux, 49152 on others), so that nothing takes one between FreeAddr and the gateway's own listening,
// or while a killed gateway is started again.
const (
	firstPort = 20000
	ports     = 12000
)

var (
	portMu sync.Mutex
	port   = rand.IntN(ports) // of the last one given, so that none is given twice; other processes begin elsewhere
)

// FreeAddr is a loopback address on which nothing listens, on no other address of the machine either: the wanted one if
// it is free. No other call in this process is given the same: Caddy's listeners share ports with each other without
// an error (SO_REUSEPORT), so that a port given twice would show as answers of the wrong gateway.
func FreeAddr(wanted string) (string, error) {
	if wanted != "" && freeOnAll(wanted) {
		return wanted, nil
	}
	portMu.Lock()
	defer portMu.Unlock()
	for range ports {
		port = (port + 1) % ports
		if addr := "127.0.0.1:" + strconv.Itoa(firstPort+port); freeOnAll(addr) {
			return addr, nil
		}
	}
	return "", errors.New("no free port on the loopback interface")
}

// freeOnAll: sites listen on all addresses, and a browser asks [::1] first for localhost, where a development server may be.
func freeOnAll(addr string) bool { return free(addr) && free(":"+Port(addr)) }

func free(addr string) bool {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return false
	}
	_ = l.Close()
	return true
}

// Port is the port of an address.
func Port(addr string) string { return addr[strings.LastIndexByte(addr, ':')+1:] }
