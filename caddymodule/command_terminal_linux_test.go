package caddymodule

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// terminal is both ends of one, until the test's end.
func terminal(t *testing.T) (far, near *os.File) {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	far = os.NewFile(uintptr(fd), "ptmx") // with deadlines
	t.Cleanup(func() { _ = far.Close() })
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	near, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = near.Close() })
	return far, near
}

// What a stranger wrote does not steer the terminal on which it is read, and a pipe gets it as it is.
func TestNothingSteersTheTerminal(t *testing.T) {
	t.Parallel()
	const hostile = "你好\t\x1b]0;pwn\x07\u009b31m\u202e\rx\ny\x7f"
	far, near := terminal(t)
	if got := forTerminal(new(strings.Builder), hostile); got != hostile {
		t.Errorf("a pipe gets %q", got)
	}
	_, _ = near.WriteString(forTerminal(near, hostile) + "end\n")
	_ = far.SetReadDeadline(time.Now().Add(10 * time.Second))
	var got strings.Builder
	for buf := make([]byte, 1024); !strings.Contains(got.String(), "end"); {
		n, err := far.Read(buf)
		if err != nil {
			t.Fatalf("%v after %q", err, got.String())
		}
		got.Write(buf[:n])
	}
	text := strings.ReplaceAll(got.String(), "\r\n", "\n")
	if want := "你好\t\\u001b]0;pwn\\u0007\\u009b31m\\u202e\\u000dx\ny\\u007fend"; strings.TrimSuffix(text, "\n") != want {
		t.Errorf("the terminal gets %q, want %q", text, want)
	}
}
