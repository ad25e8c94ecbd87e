package integration_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

const (
	loadAccount  = "wxd000000000000001"
	limitAccount = "wxd000000000000002"

	// maxGoroutinesAPush is what a held push may cost the gateway: of net/http's server a connection's goroutine and the one
	// that notices that WeChat hung up; of its client a connection's two; and the one that has the message answered.
	maxGoroutinesAPush = 6
	// goroutineSlack is for those that have nothing to do with pushes in flight: those of the idle connections that WeChat (64)
	// and reverse_proxy (32, with two goroutines each) keep, and the process's own.
	goroutineSlack = 64 + 2*32 + 60
)

// TestPaceLoad holds a hundred pushes at once; the soak tests hold thousands.
func TestPaceLoad(t *testing.T) {
	t.Parallel()
	w, backend := loadWorld(t, false, nil)
	load := &paceLoad{w: w, backend: backend, n: 100, spread: 2 * time.Second, take: 12 * time.Second, give: giveText}
	load.run(t)
	t.Logf("\n%s", load.table())
	load.checkGoroutines(t)
	checkViolations(t, w)
}

// TestPaceLimit sends more messages than max_in_flight lets to the backend. None of those beyond it is acknowledged before
// WeChat's last push; then they are lost, and counted and logged as such.
func TestPaceLimit(t *testing.T) {
	t.Parallel()
	const limit, n = 100, 260 // some wait for a place, others cannot even wait
	w, backend := loadWorld(t, false, func(w *integration.World) { w.Env = append(w.Env, "WECHAT_LOG_LEVEL=INFO") })
	load := &paceLoad{w: w, backend: backend, account: limitAccount, n: n, spread: 2 * time.Second, give: giveNever}
	load.run(t)

	taken, log := 0, w.Gateway.Log()
	for i, p := range load.pushes {
		if p.result.Kind != wxsim.ReplySuccess || p.result.UserSaw != "" || len(p.result.Attempts) < 2 {
			t.Errorf("message %d was answered %s after %d attempts", i, p.result.Kind, len(p.result.Attempts))
		}
		heldUntilDropped(t, p.result)
		switch ran := backend.ran(p.script); ran {
		case 0:
			id := strconv.FormatInt(p.result.MsgID, 10)
			if !slices.ContainsFunc(strings.Split(log, "\n"), func(line string) bool {
				return strings.Contains(line, `"level":"error"`) && strings.Contains(line, id) && strings.Contains(line, limitAccount)
			}) {
				t.Errorf("message %s was lost, and no error in the log says so", id)
			}
		case 1:
			taken++
		default:
			t.Errorf("the backend was given message %d %d times", i, ran)
		}
	}
	if taken != limit {
		t.Errorf("the backend was given %d messages, want %d", taken, limit)
	}
	if got, want := metric(t, w, `caddy_wechat_replies_total{outcome="lost"}`), strconv.Itoa(n-limit); got != want {
		t.Errorf("%s messages are counted as lost, want %s", got, want)
	}
	checkViolations(t, w)
}

// loadWorld has an account whose pushes come over http or https, and one with a limit of 100 messages in flight.
func loadWorld(t *testing.T, tls bool, configure func(*integration.World)) (*integration.World, *scripted) {
	t.Helper()
	return newPaceWorld(t, &paceSite{
		routes: []paceRoute{{name: "load", options: []string{"backend_timeout 25s"}}, {name: "limit", options: []string{"max_in_flight 100"}}},
		accounts: []paceAccount{
			{appid: loadAccount, route: "load", tls: tls},
			{appid: limitAccount, route: "limit", tls: tls},
		},
	}, configure)
}

// paceLoad is many messages at once, and what they cost the gateway.
type paceLoad struct {
	w       *integration.World
	backend *scripted
	account string // default: loadAccount
	name    string // tells loads of one test apart
	n       int
	spread  time.Duration // over which WeChat sends them
	take    time.Duration // what the backend takes for each
	give    string

	pushes        []loadPush
	late          int // messages that came too late to the backend for it to be in time
	before, after processCost
	peak          processCost
}

type loadPush struct {
	script script
	result wxsim.PushResult
}

// processCost is what the gateway's process holds at one moment.
type processCost struct {
	inFlight   int // messages that WeChat has not had an answer to
	rss        int // KiB
	goroutines int
	heap       int // bytes in use after a collection; 0: not asked
}

// run pushes the messages, and checks that each is answered in time and rightly.
func (l *paceLoad) run(t *testing.T) {
	t.Helper()
	if l.account == "" {
		l.account = loadAccount
	}
	l.before = l.cost(t, 0, true)
	l.pushes = make([]loadPush, l.n)
	var wg sync.WaitGroup
	var mu sync.Mutex
	inFlight := 0
	for i := range l.pushes {
		p := &l.pushes[i]
		p.script = script{fmt.Sprintf("%s/%s/%d", strings.ReplaceAll(t.Name(), " ", "_"), l.name, i), l.take, l.give}
		wg.Go(func() {
			time.Sleep(l.spread * time.Duration(i) / time.Duration(l.n))
			mu.Lock()
			inFlight++
			mu.Unlock()
			var err error
			p.result, err = l.w.WeChat.PushMessage(t.Context(), wxsim.Message{AppID: l.account, Content: p.script.String()})
			mu.Lock()
			inFlight--
			mu.Unlock()
			if err != nil || !p.result.OK() {
				t.Errorf("message %d: %s %v", i, p.result.Wrong, err)
				for _, a := range p.result.Attempts {
					t.Logf("  pushed at %s, %v, status %d", a.At.Format("15:04:05.000"), a.Latency, a.Status)
				}
			}
		})
	}
	over := make(chan struct{})
	go func() {
		wg.Wait()
		close(over)
	}()
	for ticker := time.NewTicker(time.Second); ; {
		select {
		case <-ticker.C:
			mu.Lock()
			now := inFlight
			mu.Unlock()
			if c := l.cost(t, now, false); c.rss > l.peak.rss || c.goroutines > l.peak.goroutines {
				l.peak = processCost{max(now, l.peak.inFlight), max(c.rss, l.peak.rss), max(c.goroutines, l.peak.goroutines), 0}
			}
			continue
		case <-over:
			ticker.Stop()
		}
		break
	}
	l.after = l.cost(t, 0, true)
	l.check(t)
}

// check holds the answers against what was to be given.
func (l *paceLoad) check(t *testing.T) {
	t.Helper()
	for i, p := range l.pushes {
		want := ""
		if l.give == giveText {
			want = p.script.repliesWith()
		}
		if p.result.UserSaw != want {
			// A busy machine, or one whose queue of new connections was full, can bring a message to the backend so late that
			// the last push cannot wait for it.
			late := l.backend.began(p.script).Sub(p.result.Attempts[0].At)
			if p.result.Kind != wxsim.ReplySuccess || l.give != giveText || late+l.take < lastAnswer-unsure {
				t.Errorf("message %d: the user saw %q, want %q; the backend was given it after %v", i, p.result.UserSaw, want, late)
			}
			l.late++
		}
		if ran := l.backend.ran(p.script); ran != 1 && l.account != limitAccount {
			t.Errorf("message %d: the backend was given it %d times", i, ran)
		}
		heldUntilDropped(t, p.result)
	}
	if l.late*100 > l.n {
		t.Errorf("%d of %d messages came late to the backend: the machine is too busy for this test", l.late, l.n)
	}
}

// unsure is how near to the last push's end a reply may come or not.
const unsure = 250 * time.Millisecond

// latencies are those of the pushes that were answered.
func (l *paceLoad) latencies() (median, p99, slowest time.Duration) {
	var all []time.Duration
	for _, p := range l.pushes {
		all = append(all, p.result.Last().Latency)
	}
	slices.Sort(all)
	return all[len(all)/2], all[len(all)*99/100], all[len(all)-1]
}

// cost reads what the process holds; with collect after a garbage collection.
func (l *paceLoad) cost(t *testing.T, inFlight int, collect bool) processCost {
	t.Helper()
	c := processCost{inFlight: inFlight}
	if collect {
		c.heap = heapInUse(t, l.w)
	}
	c.rss = memory(t, l.w, "VmRSS")
	c.goroutines = goroutines(t, l.w)
	return c
}

// goroutines is how many the gateway's process has. It asks for the number alone: a profile of tens of thousands of them
// stops the process for long enough to make pushes late.
func goroutines(t *testing.T, w *integration.World) int {
	t.Helper()
	value := metric(t, w, "go_goroutines")
	n, err := strconv.Atoi(value)
	if err != nil {
		t.Fatalf("go_goroutines is %q", value)
	}
	return n
}

// heapInUse is the gateway's heap in bytes after a garbage collection.
func heapInUse(t *testing.T, w *integration.World) int {
	t.Helper()
	// A collection finishes what the one before it found dead in pools.
	for range 2 {
		fetch(t, plainClient, http.MethodGet, "http://"+w.Admin+"/debug/pprof/heap?gc=1", nil, "")
	}
	_, page := fetch(t, plainClient, http.MethodGet, "http://"+w.Admin+"/debug/vars", nil, "")
	var vars struct{ Memstats struct{ HeapAlloc int } }
	if err := json.Unmarshal([]byte(page), &vars); err != nil || vars.Memstats.HeapAlloc == 0 {
		t.Fatalf("no heap in %.200q: %v", page, err)
	}
	return vars.Memstats.HeapAlloc
}

// checkGoroutines holds the number of goroutines against what net/http needs for a push and its backend call.
func (l *paceLoad) checkGoroutines(t *testing.T) {
	t.Helper()
	if bound := l.before.goroutines + maxGoroutinesAPush*l.n + goroutineSlack; l.peak.goroutines > bound {
		t.Errorf("%d goroutines with %d messages in flight, want at most %d", l.peak.goroutines, l.peak.inFlight, bound)
	}
	eventually(t, "goroutines end with the pushes", func() error {
		if now := goroutines(t, l.w); now > l.before.goroutines+goroutineSlack {
			return fmt.Errorf("%d goroutines, before the load %d", now, l.before.goroutines)
		}
		return nil
	})
}

// table shows the load as Markdown.
func (l *paceLoad) table() string {
	var b strings.Builder
	b.WriteString("| | messages in flight | RSS | heap after a collection | goroutines |\n| --- | --- | --- | --- | --- |\n")
	for _, row := range []struct {
		name string
		processCost
	}{{"before", l.before}, {"most at any time", l.peak}, {"right after the last answer", l.after}} {
		heap := ""
		if row.heap > 0 {
			heap = fmt.Sprintf("%.1f MiB", float64(row.heap)/(1<<20))
		}
		fmt.Fprintf(&b, "| %s | %d | %.0f MiB | %s | %d |\n", row.name, row.inFlight, float64(row.rss)/(1<<10), heap, row.goroutines)
	}
	median, p99, slowest := l.latencies()
	fmt.Fprintf(&b, "\nThe push that was answered: after %v (median), %v (p99), %v (slowest).\n",
		median.Round(time.Millisecond), p99.Round(time.Millisecond), slowest.Round(time.Millisecond))
	return b.String()
}
