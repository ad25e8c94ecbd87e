package main

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// Names between a running demo and the release check that uses it.
const (
	controlFile   = "control" // in the demo's folder: the address and the key, as only this user can read them
	releasePath   = "/release-check"
	resultHeader  = "X-Release-Check"
	resultPassed  = "passed"
	resultFailed  = "failed"
	releaseLimit  = time.Minute // for the start of a gateway and the check
	headerTimeout = 5 * time.Second
)

var errNotPassed = errors.New("the release check is not passed: README.md says what to do on each item (全网发布)")

// rehearse has the example go through WeChat's acceptance check: the demo that runs in a folder, or else an example of
// its own, started for this alone.
func rehearse(ctx context.Context, binary, config, dir string, out io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, releaseLimit)
	defer cancel()
	running, err := rehearseRunning(ctx, dir, out)
	if running {
		return err
	}
	if binary, err = filepath.Abs(binary); err != nil {
		return err
	}
	own, err := os.MkdirTemp("", "caddy-wechat-release-check")
	if err != nil {
		return err
	}
	if err := rehearseOwn(ctx, binary, config, own, out); err != nil {
		if errors.Is(err, errNotPassed) {
			return fmt.Errorf("%w\nthe gateway's log is in %s", err, own)
		}
		return errors.Join(err, os.RemoveAll(own))
	}
	return os.RemoveAll(own)
}

func rehearseOwn(ctx context.Context, binary, config, dir string, out io.Writer) (err error) {
	log, err := os.OpenFile(filepath.Join(dir, "gateway.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	// WeChat is as hostile as it is by default: what is lost or comes twice here is lost or comes twice there.
	w := &integration.World{Binary: binary, Dir: dir, Caddyfile: config, Log: log}
	defer func() { err = errors.Join(err, w.Close()) }()
	_, _ = fmt.Fprintf(out, "rehearsing WeChat's release check (全网发布接入检测) with a gateway started from %s for it\n", config)
	if err := w.Start(ctx); err != nil {
		return err
	}
	return releaseCheck(ctx, w, out)
}

// releaseCheck goes through the check with all groups of test accounts at the same time, because an item that fails is
// waited for, and prints a report of each.
func releaseCheck(ctx context.Context, w *integration.World, out io.Writer) error {
	backend, violations := len(w.Backend.Received()), len(w.WeChat.Journal().Violations())
	var reports [wxsim.ReleaseGroups]wxsim.ReleaseReport
	var errs [wxsim.ReleaseGroups]error
	var groups sync.WaitGroup
	for i := range reports {
		groups.Go(func() { reports[i], errs[i] = w.WeChat.ReleaseCheck(ctx, integration.PlatformID, i+1) })
	}
	groups.Wait()
	passed := true
	for i, report := range reports {
		_, _ = fmt.Fprintf(out, "\ngroup %d\n%s", i+1, indent(report.String()))
		if errs[i] != nil {
			return fmt.Errorf("group %d: %w", i+1, errs[i])
		}
		passed = passed && report.Passed()
	}
	_, _ = fmt.Fprintln(out)
	if n := len(w.Backend.Received()) - backend; n > 0 {
		passed = false
		_, _ = fmt.Fprintf(out, "FAIL the backend got %d of the check's messages; the test accounts are not its customers\n", n)
	}
	for _, e := range w.WeChat.Journal().Violations()[violations:] {
		passed = false
		_, _ = fmt.Fprintf(out, "FAIL WeChat saw what it must never see, %s: %v\n", e.Path, e.Violations)
	}
	if !passed {
		return errNotPassed
	}
	_, _ = fmt.Fprintln(out, "passed")
	return nil
}

func indent(text string) string {
	return "  " + strings.ReplaceAll(strings.TrimSuffix(text, "\n"), "\n", "\n  ") + "\n"
}

// control lets a release check that is started while the demo runs use the demo's gateway. It returns at once; what it
// began ends with stop.
func control(w *integration.World, dir string) (stop func(), err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	key := rand.Text()
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+releasePath, func(rw http.ResponseWriter, r *http.Request) {
		given := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
		if subtle.ConstantTimeCompare([]byte(given), []byte(key)) != 1 {
			http.Error(rw, "another demo's key", http.StatusUnauthorized)
			return
		}
		var report strings.Builder
		err := releaseCheck(r.Context(), w, &report)
		if err != nil && !errors.Is(err, errNotPassed) {
			http.Error(rw, report.String()+err.Error(), http.StatusInternalServerError)
			return
		}
		result := resultPassed
		if err != nil {
			result = resultFailed
		}
		rw.Header().Set(resultHeader, result)
		_, _ = io.WriteString(rw, report.String())
	})
	server := &http.Server{Handler: mux, ReadHeaderTimeout: headerTimeout}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(l) }() // ends with ErrServerClosed
	file := filepath.Join(dir, controlFile)
	stop = func() {
		_ = os.Remove(file)
		_ = server.Close()
		<-done
	}
	if err := os.WriteFile(file, []byte(l.Addr().String()+"\n"+key+"\n"), 0o600); err != nil {
		stop()
		return nil, err
	}
	return stop, nil
}

// rehearseRunning has the demo that runs in a folder do the check; running is false if none does.
func rehearseRunning(ctx context.Context, dir string, out io.Writer) (running bool, err error) {
	content, err := os.ReadFile(filepath.Join(dir, controlFile))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return true, err
	}
	address, key, _ := strings.Cut(strings.TrimSpace(string(content)), "\n")
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+address+releasePath, nil)
	if err != nil {
		return false, nil //nolint:nilerr // half a file: its demo did not get to the end of it
	}
	req.Header.Set("Authorization", "Bearer "+key)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "dial" {
			return false, nil // left by a demo that was killed
		}
		return true, fmt.Errorf("the running demo does not answer: %w", err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	switch {
	case err != nil:
		return true, fmt.Errorf("the running demo broke off: %w", err)
	case resp.StatusCode == http.StatusInternalServerError:
		return true, errors.New(string(body))
	case resp.Header.Get(resultHeader) == "":
		return false, nil // something else listens there now
	}
	_, _ = fmt.Fprintf(out, "rehearsing WeChat's release check (全网发布接入检测) with the gateway of the running demonstration, in %s\n%s", dir, body)
	if resp.Header.Get(resultHeader) != resultPassed {
		return true, errNotPassed
	}
	return true, nil
}
