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
	// loadSpread is the time over which a load's messages are sent, so that making the connections and sealing the pushes, which the
	// simulator does on the same processors, is not what is measured. It is shorter than what the backend takes.
	loadSpread = 11 * time.Second
	// maxMemoryAPush is what a held push may cost the gateway in KiB of RSS: two connections' buffers, six goroutines' stacks, the
	// message, and as much again that the garbage collector lets lie. maxMemoryTLS comes to it for a TLS connection.
	maxMemoryAPush = 160
	maxMemoryTLS   = 64
	// memorySlack is for what does not depend on the number of messages, in KiB.
	memorySlack = 96 << 10
	// scheduling is how late the machine may make an answer; the rest of WeChat's five seconds is the network's.
	scheduling = 400 * time.Millisecond
	// forgetting is how long the gateway is left alone before its memory is read once more: answers are kept for a
	// minute, and Go gives memory back to the system slowly.
	forgetting = 70 * time.Second
	// maxHeapKept is what may be left of a message after that, in bytes: its identity, for as long as it could be pushed again.
	maxHeapKept = 512
	// maxHeapPeak is what Go itself keeps of each message that was in flight at the peak, in bytes: it reuses the records of
	// goroutines that ended, and never frees them.
	maxHeapPeak = 6 * 512
	// heapSlack is for what has nothing to do with the number of messages, such as the buffers of idle connections, in bytes.
	heapSlack = 4 << 20
)

// TestPaceLoadTable holds up to 5,000 pushes at once with a backend that takes 12 s, and fewer over https and with one that
// never answers, which cost this test more, and prints what that costs. The gateway is the one without the race detector.
func TestPaceLoadTable(t *testing.T) {
	file := plainBinary(t)
	var b strings.Builder
	b.WriteString("| messages in flight | over | backend | RSS before | RSS | a message | goroutines | a message | heap before | after | later | RSS later | answered after: median | p99 | slowest | late |\n")
	b.WriteString("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n")
	for _, tt := range []struct {
		n     int
		tls   bool
		give  string
		twice bool
	}{
		{n: 1000, give: giveText}, {n: 5000, give: giveText, twice: true}, {n: 1000, tls: true, give: giveText}, {n: 2000, give: giveNever},
	} {
		over := map[bool]string{false: "http", true: "https"}[tt.tls]
		t.Run(fmt.Sprintf("%d %s %s", tt.n, over, tt.give), func(t *testing.T) {
			w, backend := loadWorld(t, tt.tls, func(w *integration.World) {
				w.Binary = file
				w.Config.Pace.Timeout = wechatWait
				w.Env = append(w.Env, "WECHAT_LOG_LEVEL=INFO")
				w.Config.JournalSize = 4 * tt.n
			})
			load := &paceLoad{w: w, backend: backend, name: "first", n: tt.n, spread: loadSpread, take: 12 * time.Second, give: tt.give}
			later := load.row(t, &b, over)
			if kept := later.heap - load.before.heap; kept > tt.n*(maxHeapKept+maxHeapPeak)+heapSlack {
				t.Errorf("%d bytes of heap are left of %d messages", kept, tt.n)
			}
			if tt.twice { // Go has its records now: what is left of these is what the gateway keeps
				again := &paceLoad{w: w, backend: backend, name: "second", n: tt.n, spread: loadSpread, take: 12 * time.Second, give: tt.give}
				if kept := again.row(t, &b, over).heap - later.heap; kept > tt.n*maxHeapKept+heapSlack/4 {
					t.Errorf("%d bytes of heap are left of %d more messages", kept, tt.n)
				}
			}
			checkViolations(t, w)
		})
	}
	t.Logf("\n%s", b.String())
}

// row runs a load, holds it against the bounds, and writes its row of the table.
func (l *paceLoad) row(t *testing.T, b *strings.Builder, over string) (later processCost) {
	t.Helper()
	l.run(t)
	l.checkGoroutines(t)
	bound := l.before.rss + memorySlack + l.n*maxMemoryAPush
	if over == "https" {
		bound += l.n * maxMemoryTLS
	}
	if l.peak.rss > bound {
		t.Errorf("RSS %d KiB with %d messages in flight, want at most %d", l.peak.rss, l.peak.inFlight, bound)
	}
	median, p99, slowest := l.latencies()
	if slowest > replyTimeout+scheduling {
		t.Errorf("the slowest last push was answered after %v, want at most %v and %v for the machine", slowest, replyTimeout, scheduling)
	}
	if l.peak.inFlight < l.n*95/100 {
		t.Errorf("only %d messages were in flight at a time", l.peak.inFlight)
	}
	time.Sleep(forgetting)
	// Answers that are over go when the next push comes.
	pushed(t, l.w, wxsim.Message{AppID: loadAccount, Content: script{strings.ReplaceAll(t.Name(), " ", "_") + l.name, 0, giveSuccess}.String()})
	later = l.cost(t, 0, true)
	fmt.Fprintf(b, "| %d | %s | %s | %s | %s | %.0f KiB | %d | %.1f | %s | %s | %s | %s | %.2f s | %.2f s | %.2f s | %d |\n",
		l.peak.inFlight, over, map[string]string{giveText: "takes 12 s", giveNever: "never answers"}[l.give],
		mib(l.before.rss<<10), mib(l.peak.rss<<10), float64(l.peak.rss-l.before.rss)/float64(l.peak.inFlight),
		l.peak.goroutines, float64(l.peak.goroutines-l.before.goroutines)/float64(l.peak.inFlight),
		mib(l.before.heap), mib(l.after.heap), mib(later.heap), mib(later.rss<<10),
		median.Seconds(), p99.Seconds(), slowest.Seconds(), l.late)
	return later
}

func mib(bytes int) string { return fmt.Sprintf("%.1f MiB", float64(bytes)/(1<<20)) }
