//go:build soak

package integration_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

const (
	// maxMemoryAPush is what a held push may cost the gateway, in KiB: two connections' buffers and six goroutines' stacks.
	maxMemoryAPush = 96
	// maxMemoryTLS is for the state of a TLS connection.
	maxMemoryTLS = 48
	// scheduling is how late the machine may make an answer; the rest of WeChat's five seconds is the network's.
	scheduling = 400 * time.Millisecond
	// forgetting is how long the gateway is left alone before its memory is read once more: answers are kept for a
	// minute, and Go gives memory back to the system slowly.
	forgetting = 100 * time.Second
	// maxHeapKept is what may be left of a message after that, in bytes: its identity, for as long as it could be replayed.
	maxHeapKept = 512
	// heapSlack is for what has nothing to do with the number of messages, in bytes.
	heapSlack = 2 << 20
)

// TestPaceLoadTable holds up to 5,000 pushes at once, over http and https, with a backend that takes 12 s and with one
// that never answers, and prints what that costs. The gateway is the one without the race detector.
func TestPaceLoadTable(t *testing.T) {
	file := plainBinary(t)
	var b strings.Builder
	b.WriteString("| messages in flight | over | backend | RSS before | RSS | a message | goroutines | a message | heap before | after | 100 s later | RSS then | answered after: median | p99 | slowest |\n")
	b.WriteString("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n")
	for _, tt := range []struct {
		n    int
		tls  bool
		give string
	}{
		{500, false, giveText}, {2000, false, giveText}, {5000, false, giveText}, {5000, true, giveText}, {5000, false, giveNever},
	} {
		over := map[bool]string{false: "http", true: "https"}[tt.tls]
		t.Run(fmt.Sprintf("%d %s %s", tt.n, over, tt.give), func(t *testing.T) {
			w, backend := loadWorld(t, tt.tls, func(w *integration.World) {
				w.Binary = file
				w.Config.Pace.Timeout = wechatWait
				w.Env = append(w.Env, "WECHAT_LOG_LEVEL=INFO")
				w.Config.JournalSize = 4 * tt.n
			})
			load := &paceLoad{w: w, backend: backend, n: tt.n, spread: 4 * time.Second, take: 12 * time.Second, give: tt.give}
			if tt.tls {
				load.spread = 9 * time.Second // a handshake costs both sides a millisecond
			}
			load.run(t)
			load.checkGoroutines(t)
			bound := load.before.rss + tt.n*maxMemoryAPush
			if tt.tls {
				bound += tt.n * maxMemoryTLS
			}
			if load.peak.rss > bound {
				t.Errorf("RSS %d KiB with %d messages in flight, want at most %d", load.peak.rss, load.peak.inFlight, bound)
			}
			if _, _, slowest := load.latencies(); slowest > replyTimeout+scheduling {
				t.Errorf("the slowest last push was answered after %v, want at most %v and %v for the machine", slowest, replyTimeout, scheduling)
			}
			if load.peak.inFlight < tt.n*95/100 {
				t.Errorf("only %d messages were in flight at a time", load.peak.inFlight)
			}
			time.Sleep(forgetting)
			// Answers that are over go when the next push comes.
			pushed(t, w, wxsim.Message{AppID: loadAccount, Content: scriptFor(t, 0, giveSuccess).String()})
			later := load.cost(t, 0, true)
			if kept := later.heap - load.before.heap; kept > tt.n*maxHeapKept+heapSlack {
				t.Errorf("%d bytes of heap are left of %d messages", kept, tt.n)
			}
			median, p99, slowest := load.latencies()
			fmt.Fprintf(&b, "| %d | %s | %s | %s | %s | %.0f KiB | %d | %.1f | %s | %s | %s | %s | %.2f s | %.2f s | %.2f s |\n",
				load.peak.inFlight, over, map[string]string{giveText: "takes 12 s", giveNever: "never answers"}[tt.give],
				mib(load.before.rss<<10), mib(load.peak.rss<<10), float64(load.peak.rss-load.before.rss)/float64(load.peak.inFlight),
				load.peak.goroutines, float64(load.peak.goroutines-load.before.goroutines)/float64(load.peak.inFlight),
				mib(load.before.heap), mib(load.after.heap), mib(later.heap), mib(later.rss<<10),
				median.Seconds(), p99.Seconds(), slowest.Seconds())
			checkViolations(t, w)
		})
	}
	t.Logf("\n%s", b.String())
}

func mib(bytes int) string { return fmt.Sprintf("%.1f MiB", float64(bytes)/(1<<20)) }
