//go:build unix

package http1

import (
	"context"
	"io"
	"syscall"
	"testing"
	"time"
)

// TestDescriptors: whatever happens to exchanges, no descriptor is left.
func TestDescriptors(t *testing.T) {
	before := descriptors(t)
	t.Run("exchanges", func(t *testing.T) {
		b := newBackend(t, func(w *wire) {
			for n := 0; ; n++ {
				req, _, err := w.request()
				if err != nil {
					return
				}
				switch req.Header.Get("X-Do") {
				case "hang up":
					return
				case "wait":
					w.untilClosed()
				case "lie":
					w.say("HTTP/1.1 200\n\n")
				case "long":
					w.say("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
				default:
					w.say(okAnswer)
				}
			}
		})
		c := newLean(t)
		for i := range 200 {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
			if i%5 == 0 {
				cancel()
				ctx, cancel = context.WithCancel(t.Context())
			}
			size := []int64{0, 10, 20_000}[i%3]
			req := newRequest(t, "POST", b.url(), io.LimitReader(endless{}, size)).WithContext(ctx)
			if req.ContentLength = size; size == 0 {
				req.Body = nil
			}
			do := []string{"", "hang up", "wait", "lie", "long"}[i%5]
			req.Header.Set("X-Do", do)
			if res, err := c.RoundTrip(req); err == nil {
				if do != "long" {
					_, _ = io.Copy(io.Discard, res.Body)
				}
				res.Body.Close()
			}
			cancel()
		}
		c.Close()
		if c.hostCount() != 0 {
			t.Errorf("%d hosts are left", c.hostCount())
		}
	})
	eventually(t, "all are closed", func() bool { return descriptors(t) <= before })
}

// descriptors counts the process's open descriptors below 1024.
func descriptors(t *testing.T) int {
	t.Helper()
	n := 0
	for fd := range 1024 {
		var st syscall.Stat_t
		if syscall.Fstat(fd, &st) == nil && st.Mode&syscall.S_IFMT == syscall.S_IFSOCK {
			n++
		}
	}
	return n
}
