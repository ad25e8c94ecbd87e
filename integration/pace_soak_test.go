//go:build soak

package integration_test

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

const (
	paceRounds = 5
	// paceSpread is the time over which a round's messages are sent, so that they do not all come at the same instant.
	paceSpread = 8 * time.Second
	// lateSlack is how long after the slowest backend a customer-service message may come.
	lateSlack = 5 * time.Second
)

var paceLatencies = []time.Duration{
	0, time.Second, 3 * time.Second, 4400 * time.Millisecond, 4900 * time.Millisecond, 5100 * time.Millisecond, 7 * time.Second,
	9900 * time.Millisecond, 10100 * time.Millisecond, 12 * time.Second, 14 * time.Second, 14400 * time.Millisecond,
	14900 * time.Millisecond, 16 * time.Second, 20 * time.Second,
}

// The kinds of answers that the table tells apart.
const (
	goodAnswer    = "good"
	successAnswer = "`success`"
	badAnswer     = "bad"
	neverAnswered = "accepts, never answers"
	refusedCall   = "connection refused"
)

// paceAnswers are what a backend is told to give, by the table's kinds.
var paceAnswers = map[string]string{
	giveText: goodAnswer, giveSuccess: successAnswer, give500: badAnswer, giveHTML: badAnswer, giveGarbage: badAnswer, giveHalf: badAnswer,
}

// What a user sees.
const (
	sawReply   = "the reply"
	sawSlow    = "the slow text"
	sawNothing = "nothing"
	sawSent    = "the reply, sent"
	sawFault   = "WeChat's fault notice"
)

var paceModesOfSlowReply = []string{"success", "text", "customer_service"}

// paceCell is a cell of the table.
type paceCell struct {
	take time.Duration
	kind string
	slow string
}

// paceOutcome is what became of one message.
type paceOutcome struct {
	saw    string
	at     time.Duration // when the user saw it, or WeChat was content
	pushes int
	runs   int
}

// TestPaceTable goes through how long a backend can take, what it can answer and what a slow reply can be, in real time and
// all at once, and prints what the users saw.
func TestPaceTable(t *testing.T) {
	file := plainBinary(t) // the race detector's time is not the gateway's
	refused := freeAddr(t)
	site := &paceSite{}
	for i, slow := range paceModesOfSlowReply {
		options := []string{"slow_reply " + slow}
		if slow == "text" {
			options[0] += ` "` + slowText + `"`
		}
		site.routes = append(site.routes, paceRoute{name: slow, options: options}, paceRoute{name: slow + "-refused", options: options, backend: refused})
		site.accounts = append(site.accounts, paceAccount{appid: tableAccount(i, false), route: slow}, paceAccount{appid: tableAccount(i, true), route: slow + "-refused"})
	}
	w, backend := newPaceWorld(t, site, func(w *integration.World) {
		w.Binary = file
		w.Env = append(w.Env, "WECHAT_LOG_LEVEL=INFO")
		w.Config.Pace.Timeout = wechatWait
	})
	var mu sync.Mutex
	table := make(map[paceCell][]paceOutcome)
	for round := range paceRounds {
		var all []*tablePush
		for i := range paceModesOfSlowReply {
			all = append(all, tablePushes(round, i)...)
		}
		var wg sync.WaitGroup
		for n, p := range all {
			wg.Go(func() {
				time.Sleep(paceSpread * time.Duration(n) / time.Duration(len(all)))
				p.push(t, w)
			})
		}
		wg.Wait()
		// Those that were answered last have waited for less than the slowest backends take.
		time.Sleep(slices.Max(paceLatencies) - lastAnswer + lateSlack)
		for _, p := range all {
			o := p.outcome(t, w, backend)
			mu.Lock()
			table[p.cell] = append(table[p.cell], o)
			mu.Unlock()
		}
	}
	t.Logf("%d messages in %d rounds\n%s", paceRounds*len(tablePushes(0, 0))*len(paceModesOfSlowReply), paceRounds, printTable(table))
	if lost, want := metric(t, w, `caddy_wechat_replies_total{outcome="lost"}`), fmt.Sprint(paceRounds*len(paceModesOfSlowReply)); lost != want {
		t.Errorf("%s messages are counted as lost, want %s", lost, want)
	}
	checkViolations(t, w)
}

func tableAccount(slow int, refused bool) string {
	if refused {
		return fmt.Sprintf("wxc00000000000001%d", slow)
	}
	return fmt.Sprintf("wxc00000000000000%d", slow)
}

// tablePush is one message of the table.
type tablePush struct {
	cell    paceCell
	account string
	script  script
	begun   time.Time
	ended   time.Time
	result  wxsim.PushResult
	err     error
}

// tablePushes are the messages of a round to the accounts of one slow reply.
func tablePushes(round, slow int) []*tablePush {
	mode := paceModesOfSlowReply[slow]
	var list []*tablePush
	add := func(kind, give string, take time.Duration) {
		account := tableAccount(slow, kind == refusedCall)
		list = append(list, &tablePush{
			cell: paceCell{take, kind, mode}, account: account, script: script{fmt.Sprintf("%d/%s", round, account), take, give},
		})
	}
	for _, take := range paceLatencies {
		for give, kind := range paceAnswers {
			add(kind, give, take)
		}
	}
	add(neverAnswered, giveNever, 0)
	add(refusedCall, giveText, 0)
	return list
}

func (p *tablePush) push(t *testing.T, w *integration.World) {
	p.begun = time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	p.result, p.err = w.WeChat.PushMessage(ctx, wxsim.Message{AppID: p.account, Content: p.script.String()})
	p.ended = time.Now()
}

// outcome says what became of the message, and holds it against what must become of it.
func (p *tablePush) outcome(t *testing.T, w *integration.World, backend *scripted) paceOutcome {
	t.Helper()
	o := paceOutcome{saw: p.result.UserSaw, at: p.ended.Sub(p.begun), pushes: len(p.result.Attempts), runs: backend.ran(p.script)}
	switch {
	case p.err != nil || !p.result.OK():
		o.saw = sawFault
	case o.saw == p.script.repliesWith():
		o.saw = sawReply
	case o.saw == slowText:
		o.saw = sawSlow
	case o.saw == "":
		o.saw = sawNothing
	}
	if sent := w.WeChat.SentTo(p.result.OpenID); len(sent) > 0 {
		if o.saw != sawNothing || len(sent) > 1 || sent[0].Content != p.script.repliesWith() {
			t.Errorf("%v: the user saw %s, and then was sent %d messages, %q", p.cell, o.saw, len(sent), sent[0].Content)
		}
		o.saw, o.at = sawSent, sent[0].At.Sub(p.begun)
	}
	saw, from, to := p.want()
	if !slices.Contains(saw, o.saw) || o.at < from-100*time.Millisecond || o.at > to+slack {
		t.Errorf("%v: the user saw %s after %v (%s %v), want %v after %v to %v", p.cell, o.saw, o.at, p.result.Wrong, p.err, saw, from, to)
		for _, a := range p.result.Attempts {
			t.Logf("  pushed at %s, %v, status %d", a.At.Format("15:04:05.000"), a.Latency, a.Status)
		}
	}
	runs := 1
	if p.cell.kind == refusedCall {
		runs = 0
	}
	if o.runs != runs {
		t.Errorf("%v: the backend was given it %d times, want %d", p.cell, o.runs, runs)
	}
	for _, a := range p.result.Attempts[:max(0, len(p.result.Attempts)-1)] {
		if !a.TimedOut {
			t.Errorf("%v: a push before the last ended after %v with status %d: %v", p.cell, a.Latency, a.Status, a.Err)
		}
	}
	return o
}

// want is what the user may see, and between which times.
func (p *tablePush) want() (saw []string, from, to time.Duration) {
	take, inTime, late := p.cell.take, sawNothing, sawNothing
	switch {
	case p.cell.kind == refusedCall: // lost, which is neither slow nor late; it is given up before the last push's end
		return []string{sawNothing}, 2 * wechatWait, lastAnswer
	case p.cell.kind == neverAnswered:
		take = time.Hour
	case p.cell.kind == goodAnswer:
		inTime = sawReply
	}
	lateAt := lastAnswer
	switch {
	case p.cell.slow == "text":
		late = sawSlow
	case p.cell.slow == "customer_service" && p.cell.kind == goodAnswer:
		late, lateAt = sawSent, take
	}
	switch {
	case take < lastAnswer-unsure:
		return []string{inTime}, take, take
	case take < lastAnswer+unsure:
		return []string{inTime, late}, min(take, lateAt), max(take, lateAt)
	}
	return []string{late}, lateAt, lateAt
}

// printTable writes the table as Markdown.
func printTable(table map[paceCell][]paceOutcome) string {
	var b strings.Builder
	b.WriteString("| backend takes | answers | slow_reply success | slow_reply text | slow_reply customer_service | backend runs |\n")
	b.WriteString("| --- | --- | --- | --- | --- | --- |\n")
	row := func(takes string, take time.Duration, kind string) {
		fmt.Fprintf(&b, "| %s | %s |", takes, kind)
		runs := make(map[int]int)
		for _, slow := range paceModesOfSlowReply {
			outcomes := table[paceCell{take, kind, slow}]
			for _, o := range outcomes {
				runs[o.runs]++
			}
			fmt.Fprintf(&b, " %s |", summary(outcomes))
		}
		fmt.Fprintf(&b, " %s |\n", strings.Trim(fmt.Sprint(slices.Sorted(maps.Keys(runs))), "[]"))
	}
	for _, take := range paceLatencies {
		for _, kind := range []string{goodAnswer, successAnswer, badAnswer} {
			row(fmt.Sprintf("%v s", take.Seconds()), take, kind)
		}
	}
	row("", 0, neverAnswered)
	row("", 0, refusedCall)
	return b.String()
}

// summary is what several messages of one cell came to.
func summary(outcomes []paceOutcome) string {
	by := make(map[string][]paceOutcome)
	for _, o := range outcomes {
		by[o.saw] = append(by[o.saw], o)
	}
	var parts []string
	for _, saw := range slices.Sorted(maps.Keys(by)) {
		list := by[saw]
		from, to := list[0], list[0]
		for _, o := range list {
			if o.at < from.at {
				from = o
			}
			if o.at > to.at {
				to = o
			}
		}
		part := fmt.Sprintf("%s, %.1f s", saw, from.at.Seconds())
		if first, last := fmt.Sprintf("%.1f", from.at.Seconds()), fmt.Sprintf("%.1f", to.at.Seconds()); first != last {
			part = fmt.Sprintf("%s, %s to %s s", saw, first, last)
		}
		if len(by) > 1 {
			part = fmt.Sprintf("%d: %s", len(list), part)
		}
		parts = append(parts, part+fmt.Sprintf(" (push %d)", to.pushes))
	}
	return strings.Join(parts, "; ")
}
