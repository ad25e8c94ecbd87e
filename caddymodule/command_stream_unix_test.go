//go:build unix

package caddymodule

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// streamPatience bounds every wait for a command.
const streamPatience = 30 * time.Second

func newFIFO(t *testing.T) string {
	t.Helper()
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	return fifo
}

// within is what work brings, unless it takes too long. Work that hangs is let go at the end of the test by release.
func within[T any](t *testing.T, what string, release func(), work func() T) (is T) {
	t.Helper()
	done := make(chan T, 1)
	go func() { done <- work() }()
	select {
	case is = <-done:
		return is
	case <-time.After(streamPatience):
	}
	t.Errorf("%s: it waits without end", what)
	release()
	return <-done
}

// commandProcess is a command as a process of its own.
type commandProcess struct {
	*exec.Cmd
	talk bytes.Buffer
	done chan error // what Wait says
}

func startCommand(t *testing.T, name string, in, out *os.File, args ...string) *commandProcess {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*streamPatience)
	p := &commandProcess{Cmd: exec.CommandContext(ctx, os.Args[0], args...), done: make(chan error, 1)} //nolint:gosec // ourselves
	p.Env = append(os.Environ(), testCommand+"="+name)
	p.Stderr = &p.talk
	if in != nil {
		p.Stdin = in
	}
	if out != nil {
		p.Stdout = out
	}
	if err := p.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		p.done <- p.Wait()
		close(ended)
	}()
	t.Cleanup(func() {
		cancel() // kills it, if it is there
		<-ended
	})
	return p
}

// wantInterrupted sends one signal, and wants the command to end by itself and to say so.
func (p *commandProcess) wantInterrupted(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := p.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-p.done:
		exit, ok := errors.AsType[*exec.ExitError](err)
		if !ok || exit.ExitCode() != 1 || !strings.Contains(p.talk.String(), "signal received") {
			t.Errorf("it ended with %v and says %s", err, p.talk.String())
		}
	case <-time.After(streamPatience):
		t.Error("it does not end")
	}
}

// largeList is a list of which neither the text nor the archive fits into a pipe.
func largeList() []byte {
	var list bytes.Buffer
	list.WriteString("platform,appid,refresh_token\n")
	for i := range 300 {
		_, _ = fmt.Fprintf(&list, "wx1111111111111111,wx%016x,%s%s\n", i, moveRefresh, strings.Repeat("x", 900))
	}
	return list.Bytes()
}

// One signal ends an import whose pipe nobody writes into any more, be it standard input or a named one.
func TestStalledImportIsInterrupted(t *testing.T) {
	t.Parallel()
	for _, named := range []bool{false, true} {
		t.Run(fmt.Sprintf("named %v", named), func(t *testing.T) {
			t.Parallel()
			to := newMoveStore(t, "", moveSealKey)
			args := []string{"--config", to.config, "--format", "csv"}
			var from, into *os.File
			var p *commandProcess
			if named {
				fifo := newFIFO(t)
				p = startCommand(t, "import", nil, nil, append(args, fifo)...)
				into = within(t, "opening the pipe", func() { _ = p.Process.Kill() }, func() *os.File { return openFIFO(t, fifo, os.O_WRONLY) })
			} else {
				var err error
				if from, into, err = os.Pipe(); err != nil {
					t.Fatal(err)
				}
				p = startCommand(t, "import", from, nil, args...)
				_ = from.Close()
			}
			defer func() { _ = into.Close() }()
			// Once this is written, the command has read more than the pipe does not hold.
			_ = into.SetWriteDeadline(time.Now().Add(streamPatience))
			if _, err := into.Write(largeList()); err != nil {
				t.Fatalf("%v; it says %s", err, p.talk.String())
			}
			p.wantInterrupted(t, syscall.SIGINT)
			if n := to.records(t); n != 0 {
				t.Errorf("%d records of a page that did not come to its end", n)
			}
		})
	}
}

func openFIFO(t *testing.T, fifo string, flag int) *os.File {
	t.Helper()
	f, err := os.OpenFile(fifo, flag, 0)
	if err != nil {
		t.Error(err)
	}
	return f
}

// One signal ends an export into a pipe that nobody reads any more, be it standard output or a named one.
func TestStalledExportIsInterrupted(t *testing.T) {
	t.Parallel()
	store := newMoveStore(t, "", moveSealKey)
	if _, _, err := moveRun(t, importCommand(), largeList(), "--config", store.config, "--format", "csv"); err != nil {
		t.Fatal(err)
	}
	for _, named := range []bool{false, true} {
		t.Run(fmt.Sprintf("named %v", named), func(t *testing.T) {
			t.Parallel()
			var from, into *os.File
			var p *commandProcess
			args := []string{"--config", store.config}
			if named {
				fifo := newFIFO(t)
				p = startCommand(t, "export", nil, nil, append(args, fifo)...)
				from = within(t, "opening the pipe", func() { _ = p.Process.Kill() }, func() *os.File { return openFIFO(t, fifo, os.O_RDONLY) })
			} else {
				var err error
				if from, into, err = os.Pipe(); err != nil {
					t.Fatal(err)
				}
				p = startCommand(t, "export", nil, into, args...)
				_ = into.Close()
			}
			defer func() { _ = from.Close() }()
			_ = from.SetReadDeadline(time.Now().Add(streamPatience))
			// What comes first is written together with more than the pipe holds.
			if _, err := io.ReadFull(from, make([]byte, 1)); err != nil {
				t.Fatalf("%v; it says %s", err, p.talk.String())
			}
			p.wantInterrupted(t, syscall.SIGTERM)
		})
	}
}

// Where a command waits for something else than its file, a second signal ends it.
func TestSecondSignalKills(t *testing.T) {
	t.Parallel()
	from, into, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = from.Close() }()
	p := startCommand(t, "stuck", nil, into)
	_ = into.Close()
	said := bufio.NewScanner(from)
	for _, want := range []string{"ready", "stuck"} {
		if !said.Scan() || said.Text() != want {
			t.Fatalf("it says %q, want %q", said.Text(), want)
		}
		if err := p.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
	}
	// That the first one was taken in is seen a moment before the second one is let through.
	again, end := time.NewTicker(100*time.Millisecond), time.After(streamPatience)
	defer again.Stop()
	for {
		select {
		case err := <-p.done:
			if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGTERM {
				t.Errorf("it ended with %v", err)
			}
			return
		case <-again.C:
			_ = p.Process.Signal(syscall.SIGTERM)
		case <-end:
			t.Fatal("it does not end")
		}
	}
}

// A named pipe that nobody opens at its other end is not waited for after a signal either.
func TestUnopenedPipeIsInterrupted(t *testing.T) {
	t.Parallel()
	store := newMoveStore(t, "", moveSealKey).fill(t, 1)
	for name, run := range map[string]func(ctx context.Context, p *moveParams, fifo string) error{
		"import": func(ctx context.Context, p *moveParams, fifo string) error {
			p.format = formatCSV
			return p.importInto(ctx, []string{fifo}, nil, io.Discard)
		},
		"export": func(ctx context.Context, p *moveParams, fifo string) error {
			return p.export(ctx, []string{fifo}, io.Discard, io.Discard)
		},
	} {
		t.Run(name, func(t *testing.T) {
			fifo := newFIFO(t)
			ctx, cancel := context.WithCancelCause(t.Context())
			stop := errors.New("a signal came")
			time.AfterFunc(50*time.Millisecond, func() { cancel(stop) }) // before the pipe is opened or while it is: both must do
			release := func() {
				if f, err := os.OpenFile(fifo, os.O_RDWR, 0); err == nil { // which does not wait
					time.AfterFunc(time.Second, func() { _ = f.Close() })
				}
			}
			err := within(t, name, release, func() error {
				provisioning.Lock()
				defer provisioning.Unlock()
				return run(ctx, &moveParams{config: store.config}, fifo)
			})
			if !errors.Is(err, stop) {
				t.Errorf("%v", err)
			}
			release()
		})
	}
}

// TestExportTo: an archive goes where its name leads, and takes the place of nothing but a file.
func TestExportTo(t *testing.T) {
	t.Parallel()
	store, into := newMoveStore(t, "", moveSealKey).fill(t, 3), newMoveStore(t, "", moveSealKey)
	export := func(t *testing.T, file string) error {
		t.Helper()
		_, _, err := moveRun(t, exportCommand(), nil, "--config", store.config, file)
		return err
	}
	holds := func(t *testing.T, archive []byte) {
		t.Helper()
		if _, _, err := moveRun(t, importCommand(), archive, "--config", into.config, "--dry-run"); err != nil {
			t.Errorf("what was written: %v", err)
		}
	}
	mode := func(t *testing.T, file string, want fs.FileMode) {
		t.Helper()
		if info, err := os.Lstat(file); err != nil || info.Mode().Type() != want {
			t.Errorf("%s is now %v %v, want %v", filepath.Base(file), info, err, want)
		}
	}
	for name, there := range map[string]bool{"link to a file": true, "link to a file that is not there yet": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			disk, folder := t.TempDir(), t.TempDir()
			target, link := filepath.Join(disk, "of tonight"), filepath.Join(folder, "archive")
			if there {
				if err := os.WriteFile(target, []byte("of before"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			for _, l := range [][2]string{{disk, filepath.Join(folder, "disk")}, {"disk/../" + filepath.Base(disk) + "/of tonight", filepath.Join(folder, "first")}, {"first", link}} {
				if err := os.Symlink(l[0], l[1]); err != nil {
					t.Fatal(err)
				}
			}
			if err := export(t, link); err != nil {
				t.Fatal(err)
			}
			mode(t, link, fs.ModeSymlink)
			mode(t, filepath.Join(folder, "first"), fs.ModeSymlink)
			mode(t, target, 0)
			holds(t, mustRead(t, target))
			for _, f := range []string{disk, folder} {
				if left, _ := filepath.Glob(filepath.Join(f, ".*.tmp")); len(left) > 0 {
					t.Errorf("left behind: %q", left)
				}
			}
		})
	}
	for _, linked := range []bool{false, true} {
		t.Run(fmt.Sprintf("pipe, linked %v", linked), func(t *testing.T) {
			t.Parallel()
			fifo := newFIFO(t)
			name := fifo
			if linked {
				name = filepath.Join(t.TempDir(), "link")
				if err := os.Symlink(fifo, name); err != nil {
					t.Fatal(err)
				}
			}
			reader := openFIFO(t, fifo, os.O_RDWR) // does not wait, and keeps what is written
			defer func() { _ = reader.Close() }()
			if err := export(t, name); err != nil {
				t.Fatal(err)
			}
			mode(t, fifo, fs.ModeNamedPipe)
			archive := make([]byte, 1<<16)
			_ = reader.SetReadDeadline(time.Now().Add(streamPatience))
			n, err := reader.Read(archive)
			if err != nil {
				t.Fatal(err)
			}
			holds(t, archive[:n])
		})
	}
	t.Run("another name of standard output", func(t *testing.T) {
		t.Parallel()
		name := filepath.Join(t.TempDir(), "stdout")
		if err := os.Symlink("/dev/fd/1", name); err != nil { // a link of ours: a mistake in the command must not cost the machine its own
			t.Fatal(err)
		}
		out, err := os.OpenFile(filepath.Join(t.TempDir(), "out"), os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = out.Close() }()
		p := startCommand(t, "export", nil, out, "--config", store.config, name)
		select {
		case err = <-p.done:
		case <-time.After(streamPatience):
			err = errors.New("it does not end")
		}
		if err != nil {
			t.Errorf("%v: %s", err, p.talk.String())
		}
		holds(t, mustRead(t, out.Name()))
		mode(t, name, fs.ModeSymlink)
		if info, err := out.Stat(); err != nil || info.Size() == 0 {
			t.Error("the file that the shell has opened was replaced")
		}
	})
	t.Run("refused", func(t *testing.T) {
		t.Parallel()
		folder := t.TempDir()
		loop := filepath.Join(folder, "loop")
		if err := os.Symlink("loop", loop); err != nil {
			t.Fatal(err)
		}
		for name, want := range map[string]string{
			folder:                           "an archive cannot be written there: it is neither a file, nor a pipe or character device (d",
			loop:                             "loop",
			filepath.Join(folder, "a", "b"):  "no such file or directory",
			filepath.Join(folder, "a") + "/": "no such file or directory",
		} {
			if err := export(t, name); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want %q", name, err, want)
			}
		}
	})
}
