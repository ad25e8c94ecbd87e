package integration_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// The faults, which are also the rows of the table.
const (
	nothingFails  = "nothing"
	nodeKilled    = "node killed"
	nodeFrozen    = "node frozen 12 s"
	nodeRestarted = "node restarted"
	nodeCutOff    = "node cut off from Redis 8 s"
	redisKilled   = "Redis killed and started"
	redisOver     = "Redis failed over"
)

const (
	fleetApps   = 6 // call all the time
	steadyCount = 5 // accounts that stay as they are
	movingCount = 3 // accounts that authorise again, and no more, and again

	// afterwards is for how long after a fault its consequences may still show: the lock of a node that died is in the way of
	// those who need a token.
	afterwards = leaseLife + 5*time.Second
	// pushLife is for how long WeChat pushes a message.
	pushLife = 15 * time.Second
	// fleetInForce is how soon what one node was told counts on all.
	fleetInForce = time.Second
)

// fleetRow is what happened under one kind of fault.
type fleetRow struct {
	times   int
	lasted  time.Duration
	calls   int
	slowest time.Duration // of the calls
	failed  int           // calls that neither the app's balancer nor the gateways made good
	refused int           // calls that WeChat refused for their token
	seen    int           // of these refusals: those that an app got to see
	voided  int           // of those: during a fault by which nodes void each other's tokens
	renewed int           // tokens that WeChat handed out
	early   int           // of these: in the place of one that had life left and was not refused
	void    int           // refresh tokens that WeChat called invalid
	pushes  int
	retried int // pushes that came more than once
	twice   int // messages that the backend was given again, unexcused
	again   int // the same, when the node that had it died, slept, or was cut off
	unanswered,
	logins, loginsFailed,
	asked, // visitors who were asked to try again
	events, eventsLost int
	recovered time.Duration // the longest, after the end of the fault
}

// fleetFault is one fault.
type fleetFault struct {
	kind     string
	node     *fleetNode // nil: Redis
	from, to time.Time  // zero: not over
}

// fleetLoad is what apps, users and WeChat do with a fleet, and what came of it.
type fleetLoad struct {
	f      *fleet
	steady []wxsim.User
	moving []wxsim.User
	plain  wxsim.User

	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu     sync.Mutex
	rows   map[string]*fleetRow
	order  []string
	faults []*fleetFault
	phase  string
	began  time.Time
	count  int
	early  []earlyRenewal
}

// earlyRenewal is a renewal of a token that needed none.
type earlyRenewal struct {
	at   time.Time
	what string
	row  string
}

func newFleetLoad() *fleetLoad {
	l := &fleetLoad{rows: make(map[string]*fleetRow)}
	l.enter(nothingFails)
	return l
}

// enter begins a row of the table; l.mu is not held.
func (l *fleetLoad) enter(phase string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.phase != "" {
		l.rows[l.phase].lasted += time.Since(l.began)
	}
	if l.rows[phase] == nil {
		l.rows[phase] = &fleetRow{}
		l.order = append(l.order, phase)
	}
	l.phase, l.began = phase, time.Now()
	l.rows[phase].times++
}

// note changes the current row.
func (l *fleetLoad) note(change func(*fleetRow)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change(l.rows[l.phase])
}

// row is the current row, for what begins now and is noted later.
func (l *fleetLoad) row() *fleetRow {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.rows[l.phase]
}

func (l *fleetLoad) noteOn(r *fleetRow, change func(*fleetRow)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change(r)
}

// tokenRefusals are the codes by which WeChat refuses a token.
var tokenRefusals = []int64{40001, 40014, 42001, 42006}

var renewalPaths = []string{pathComponentToken, pathAuthorizerToken, pathQueryAuth, "/cgi-bin/stable_token"}

// observe is given each entry of WeChat's journal.
func (l *fleetLoad) observe(e wxsim.Entry) {
	if e.Direction != wxsim.In {
		return
	}
	for _, v := range e.Violations {
		if v.Rule == wxsim.RuleFreshRefresh || v.Rule == wxsim.RuleTwoRefreshes {
			l.mu.Lock()
			l.rows[l.phase].early++
			l.early = append(l.early, earlyRenewal{e.Time, v.Text, l.phase})
			l.mu.Unlock()
		}
	}
	l.note(func(r *fleetRow) {
		switch {
		case slices.Contains(renewalPaths, e.Path) && e.Errcode == 0 && e.Status == http.StatusOK:
			r.renewed++
		case e.Errcode == codeRefreshTokenVoid:
			r.void++
		case slices.Contains(tokenRefusals, e.Errcode):
			r.refused++
		}
	})
}

// begin and end mark a fault.
func (l *fleetLoad) begin(kind string, n *fleetNode) *fleetFault {
	l.enter(kind)
	l.mu.Lock()
	defer l.mu.Unlock()
	x := &fleetFault{kind: kind, node: n, from: time.Now()}
	l.faults = append(l.faults, x)
	return x
}

func (l *fleetLoad) end(x *fleetFault) {
	l.mu.Lock()
	defer l.mu.Unlock()
	x.to = time.Now()
}

// excused reports whether a fault of those was under way between the two times, or over for less than after.
func (l *fleetLoad) excused(from, to time.Time, after time.Duration, excuses func(*fleetFault) bool) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.ContainsFunc(l.faults, func(x *fleetFault) bool {
		return x.from.Before(to) && (x.to.IsZero() || x.to.Add(after).After(from)) && excuses(x)
	})
}

// locksGone: no two nodes can agree while Redis is away from one of them, or has forgotten who has which lock.
func locksGone(x *fleetFault) bool {
	return x.kind == nodeCutOff || x.kind == redisKilled || x.kind == redisOver
}

// voided reports whether a call that ends now can have been refused twice: nodes that cannot agree void each other's tokens. It stands in the
// row of that, or it began before and the fault came while it ran.
func (l *fleetLoad) voided(row *fleetRow, start time.Time) bool {
	l.mu.Lock()
	during := row == l.rows[nodeCutOff] || row == l.rows[redisKilled]
	l.mu.Unlock()
	return during || l.excused(start, time.Now(), 0, func(x *fleetFault) bool { return x.kind == nodeCutOff || x.kind == redisKilled })
}

// nodeGone: a node died or slept, perhaps with a token that WeChat had just handed to it.
func nodeGone(x *fleetFault) bool { return x.kind == nodeKilled || x.kind == nodeFrozen }

// hurts: all but a node that is restarted in good order, which nobody must notice.
func hurts(x *fleetFault) bool { return x.kind != nodeRestarted }

// start begins the load.
func (l *fleetLoad) start(f *fleet) {
	f.t.Helper()
	l.f = f
	var names []string
	for i := range steadyCount + movingCount {
		names = append(names, fmt.Sprintf("wx6%015x", i))
	}
	users := f.authorize(names...)
	l.steady, l.moving, l.plain = users[:steadyCount], users[steadyCount:], f.wechat.NewUser(integration.AccountID)
	var ctx context.Context
	ctx, l.cancel = context.WithCancel(f.t.Context())
	for range fleetApps {
		l.wg.Go(func() { l.every(ctx, 40*time.Millisecond, func() { l.call(ctx) }) })
	}
	l.wg.Go(func() { l.every(ctx, 200*time.Millisecond, func() { l.push(ctx) }) })
	l.wg.Go(func() { l.every(ctx, 500*time.Millisecond, func() { l.login(ctx) }) })
	l.wg.Go(func() { l.every(ctx, 3*time.Second, func() { l.tickets(ctx) }) })
	for _, u := range l.moving {
		l.wg.Go(func() { l.every(ctx, 2*time.Second, func() { l.move(ctx, u) }) })
	}
}

// every does something again and again, at irregular times.
func (l *fleetLoad) every(ctx context.Context, mean time.Duration, do func()) {
	for {
		t := time.NewTimer(mean/2 + mathrand.N(mean)) //nolint:gosec // no secret
		select {
		case <-t.C:
			do()
		case <-ctx.Done():
			t.Stop()
			return
		}
	}
}

// stop ends the load, and waits for what is under way.
func (l *fleetLoad) stop() {
	l.cancel()
	l.wg.Wait()
}

// ask asks a node by chance, and another one as long as the one asked turns out to be away, as an app's balancer does.
func (l *fleetLoad) ask(ctx context.Context, get func(context.Context, *fleetNode) fleetAnswer) (a fleetAnswer) {
	a.err = errors.New("the balancer has no node")
	for _, i := range mathrand.Perm(len(l.f.nodes)) { //nolint:gosec // no secret
		n, start := l.f.nodes[i], time.Now()
		if n.away() {
			continue
		}
		limited, cancel := context.WithTimeout(ctx, appWait)
		a = get(limited, n)
		cancel()
		if a.err == nil || !n.troubled(start.Add(-noticed)) {
			return a
		}
	}
	return a
}

// call is an app's call for an account that nothing happens to.
func (l *fleetLoad) call(ctx context.Context) {
	users := append([]wxsim.User{l.plain}, l.steady...)
	u := users[mathrand.IntN(len(users))] //nolint:gosec // no secret
	row, start := l.row(), time.Now()
	a := l.ask(ctx, func(ctx context.Context, n *fleetNode) fleetAnswer { return l.f.user(ctx, n, u) })
	if ctx.Err() != nil {
		return
	}
	refused := !a.good(u) && slices.ContainsFunc(tokenRefusals, func(code int64) bool { return strings.Contains(a.body, fmt.Sprintf(`"errcode":%d,`, code)) })
	voided := refused && l.voided(row, start)
	l.noteOn(row, func(r *fleetRow) {
		r.calls++
		r.slowest = max(r.slowest, time.Since(start))
		if !a.good(u) {
			r.failed++
		}
		if refused {
			r.seen++
		}
		if voided {
			r.voided++
		}
	})
	if !a.good(u) {
		l.complain(start, afterwards, "a call for %s: %s", u.AppID, a)
	}
}

// complain is an error of the test, unless a fault that hurts was under way since at, or over for less than after.
func (l *fleetLoad) complain(at time.Time, after time.Duration, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if l.excused(at, time.Now(), after, hurts) {
		l.f.t.Logf("under a fault: %s", text)
		return
	}
	l.f.errorf("%s", text)
}

// takes is how long the backend takes for a message: now and then longer than WeChat waits.
var takes = []time.Duration{0, 0, 0, 0, 300 * time.Millisecond, 300 * time.Millisecond, time.Second, 6 * time.Second, 11 * time.Second}

// push has a user send a message, and looks afterwards what came of it.
func (l *fleetLoad) push(ctx context.Context) {
	l.mu.Lock()
	l.count++
	s := script{fmt.Sprintf("m%d", l.count), takes[mathrand.IntN(len(takes))], giveText} //nolint:gosec // no secret
	l.mu.Unlock()
	m := wxsim.Message{AppID: integration.AccountID, Content: s.String(), Attempts: 3}
	if u := mathrand.IntN(len(l.steady) + 1); u < len(l.steady) { //nolint:gosec // no secret
		m.Platform, m.AppID = integration.PlatformID, l.steady[u].AppID
	}
	row := l.row()
	l.wg.Go(func() {
		begun := time.Now()
		result, err := l.f.wechat.PushMessage(context.WithoutCancel(ctx), m) // WeChat does not care that the test is over
		runs := l.f.backend.take(s)
		twice, again := 0, 0
		if len(runs) > 1 {
			if l.excusesRuns(begun, runs) {
				again = 1
				l.f.t.Logf("under a fault: the backend was given %q twice: %s", s.name, describe(begun, runs, result))
			} else {
				twice = len(runs) - 1
				l.f.errorf("the backend was given %q %d times: %s", s.name, len(runs), describe(begun, runs, result))
			}
		}
		lost := err != nil || !result.OK() || result.UserSaw != s.repliesWith()
		l.noteOn(row, func(r *fleetRow) {
			r.pushes++
			r.twice, r.again = r.twice+twice, r.again+again
			if len(result.Attempts) > 1 {
				r.retried++
			}
			if lost {
				r.unanswered++
			}
		})
		switch {
		case lost && again > 0 && tooLate(result, err): // the second run began late for the same reason that there is one
			l.f.t.Logf("under a fault: the user of %q saw %q: %s, %v; %s", s.name, result.UserSaw, result.Wrong, err, describe(begun, runs, result))
		case lost:
			l.complain(begun, 0, "the user of %q saw %q: %s, %v; %s", s.name, result.UserSaw, result.Wrong, err, describe(begun, runs, result))
		}
	})
}

// tooLate reports whether all that is wrong with a message is that its answer did not come in time: WeChat dropped the last push, or got
// success for it.
func tooLate(result wxsim.PushResult, err error) bool {
	return err == nil && (result.Last().TimedOut || result.OK() && result.UserSaw == "")
}

// TestTooLate: a wrong answer or a refusal is not a late one.
func TestTooLate(t *testing.T) {
	t.Parallel()
	dropped := []wxsim.Attempt{{TimedOut: true}}
	answered := []wxsim.Attempt{{TimedOut: true}, {Status: http.StatusOK}}
	for name, tt := range map[string]struct {
		result wxsim.PushResult
		err    error
		want   bool
	}{
		"dropped":          {wxsim.PushResult{Attempts: dropped, UserSaw: wxsim.FaultText, Wrong: "no answer"}, nil, true},
		"success":          {wxsim.PushResult{Attempts: answered}, nil, true},
		"answer of others": {wxsim.PushResult{Attempts: answered, UserSaw: "another's"}, nil, false},
		"not sealed":       {wxsim.PushResult{Attempts: answered, UserSaw: wxsim.FaultText, Wrong: "unencrypted"}, nil, false},
		"refused":          {wxsim.PushResult{Attempts: []wxsim.Attempt{{Status: http.StatusForbidden}}, UserSaw: wxsim.FaultText, Wrong: "status 403"}, nil, false},
		"not pushed":       {wxsim.PushResult{}, errors.New("no such account"), false},
	} {
		if got := tooLate(tt.result, tt.err); got != tt.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// excusesRuns: a backend gets a message once more, and no more than that, only if between its first push and its second run one
// of the nodes that had it run was gone or out of Redis' reach, or Redis was away from all. WeChat pushes for 15 s, so no
// fault of before or after counts. Nodes need noticed to find that Redis is back. On a machine with too much to do Redis may take
// longer than a node waits for a claim, which is half a second: that is as good as away, and the node says so in its log.
func (l *fleetLoad) excusesRuns(begun time.Time, runs []backendRun) bool {
	if len(runs) > 2 {
		return false
	}
	ran := func(n *fleetNode) bool {
		return n != nil && slices.ContainsFunc(runs, func(r backendRun) bool { return r.node == n.name })
	}
	second := runs[1].at
	gone := l.excused(begun, second, 0, func(x *fleetFault) bool { return nodeGone(x) && x.node.name == runs[0].node })
	apart := l.excused(begun, second, noticed, func(x *fleetFault) bool { return locksGone(x) && (x.node == nil || ran(x.node)) })
	return gone || apart || slices.ContainsFunc(l.f.nodes, func(n *fleetNode) bool { return ran(n) && n.withoutClaims(begun, second) })
}

// What a node logs when Redis fails it for claims, and when it does so no more.
const (
	claimsEnd   = "the store does not answer for pushes"
	claimsBegin = "pushes that come again are known on all nodes again"
)

// withoutClaims reports whether the node said between two times, or before and not taken back, that Redis does not answer.
func (n *fleetNode) withoutClaims(from, to time.Time) bool {
	without := false
	for line := range strings.Lines(n.Log()) {
		ends := strings.Contains(line, claimsEnd)
		if !ends && !strings.Contains(line, claimsBegin) {
			continue
		}
		var entry struct{ TS float64 }
		if json.Unmarshal([]byte(line), &entry) != nil {
			continue
		}
		at := time.UnixMilli(int64(entry.TS * 1000))
		if at.After(to) {
			break
		}
		if ends && !at.Before(from) {
			return true
		}
		if !ends && without && !at.Before(from) {
			return true
		}
		without = ends
	}
	return without
}

func describe(begun time.Time, runs []backendRun, result wxsim.PushResult) string {
	var b strings.Builder
	for i, a := range result.Attempts {
		fmt.Fprintf(&b, "push %d at %v took %v, status %d; ", i+1, a.At.Sub(begun).Round(time.Millisecond), a.Latency.Round(time.Millisecond), a.Status)
	}
	for _, r := range runs {
		fmt.Fprintf(&b, "run on %s at %v; ", r.node, r.at.Sub(begun).Round(time.Millisecond))
	}
	return b.String()
}

// tickets has WeChat push a ticket.
func (l *fleetLoad) tickets(ctx context.Context) {
	start := time.Now()
	if err := l.f.ticket(ctx); err != nil && ctx.Err() == nil {
		l.complain(start, 0, "a ticket: %v", err)
	}
}

// move has an account authorise again, or end its authorization and authorise anew. What is acknowledged must be in force.
func (l *fleetLoad) move(ctx context.Context, u wxsim.User) {
	row, start := l.row(), time.Now()
	lost := 0
	stopped := ctx
	ctx = context.WithoutCancel(ctx) // an account whose authorization has ended must not be left so: it would count as lost
	if mathrand.IntN(3) == 0 {       //nolint:gosec // no secret
		result, err := l.f.wechat.Unauthorize(ctx, integration.PlatformID, u.AppID)
		if err != nil || !result.OK() {
			l.complain(start, 0, "unauthorized: %s %v", result.Wrong, err)
		}
	}
	a, err := l.f.wechat.Reauthorize(ctx, integration.PlatformID, u.AppID)
	if err != nil || !a.Push.OK() {
		l.complain(start, 0, "authorized: %s %v", a.Push.Wrong, err)
		return
	}
	ctx = stopped
	// Another node may have to take over: what it needs for that is a few minutes, but a call goes to WeChat at once.
	err = errors.New("no node")
	for deadline := time.Now().Add(healTime); err != nil && time.Now().Before(deadline) && ctx.Err() == nil; {
		err = l.f.untilGood(ctx, l.f.any(), u, 3*time.Second)
	}
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		lost = 1
		l.f.errorf("an authorization that was acknowledged is lost: %v", err)
	}
	l.noteOn(row, func(r *fleetRow) { r.events++; r.eventsLost += lost })
}

// login brings a browser through a login, each step on another node by chance.
func (l *fleetLoad) login(ctx context.Context) {
	row, start := l.row(), time.Now()
	u := l.plain
	if i := mathrand.IntN(len(l.steady) + 1); i < len(l.steady) { //nolint:gosec // no secret
		u = l.steady[i]
	}
	l.wg.Go(func() {
		err := l.loginOf(ctx, u)
		if ctx.Err() != nil {
			return
		}
		l.noteOn(row, func(r *fleetRow) {
			r.logins++
			if err != nil {
				r.loginsFailed++
			}
		})
		if err != nil {
			l.complain(start, 2*noticed, "a login: %v", err)
		}
	})
}

// asksAgain reports whether the page has the visitor press a button to try again. It is what there is when another node renewed
// the component token a moment ago, and this one's, which WeChat voids at once here, was sent along with the code: the
// gateway never sends a code twice by itself.
func (a fleetAnswer) asksAgain() bool {
	return a.status == http.StatusServiceUnavailable && strings.Contains(a.body, `href="">重试</a>`)
}

func (l *fleetLoad) loginOf(ctx context.Context, u wxsim.User) error {
	const state = "s1"
	begun := l.ask(ctx, func(ctx context.Context, n *fleetNode) fleetAnswer {
		return l.f.get(ctx, n, "http://"+fleetHost+"/wx/thirdParty/authorize/"+u.AppID+"/verify?state="+state, nil)
	})
	if begun.err != nil || begun.status != http.StatusFound {
		return fmt.Errorf("begin: %s", begun)
	}
	callback, err := l.f.wechat.Visit(begun.header.Get("Location"), u)
	if err != nil {
		return err
	}
	cookies := (&http.Response{Header: begun.header}).Cookies()
	land := func() fleetAnswer {
		return l.ask(ctx, func(ctx context.Context, n *fleetNode) fleetAnswer { return l.f.get(ctx, n, callback, cookies) })
	}
	landed := land()
	if landed.asksAgain() {
		l.note(func(r *fleetRow) { r.asked++ })
		landed = land()
	}
	to, err := url.Parse(landed.header.Get("Location"))
	if err != nil || landed.err != nil || landed.status != http.StatusFound || !strings.HasPrefix(to.String(), fleetWeb) || to.Fragment != state {
		return fmt.Errorf("callback: %s", landed)
	}
	redeemed := l.ask(ctx, func(ctx context.Context, n *fleetNode) fleetAnswer {
		return l.f.get(ctx, n, "http://"+fleetAPI+"/wechat/users/"+to.Query().Get("wxTkId"), nil)
	})
	if !redeemed.good(u) {
		return fmt.Errorf("redeem: %d, %v", redeemed.status, redeemed.err)
	}
	return nil
}

// recover waits until all nodes serve all accounts and take events again, and notes how long that took since the fault
// was over.
func (l *fleetLoad) recover(since time.Time) {
	t := l.f.t
	var wg sync.WaitGroup
	for _, n := range l.f.nodes {
		wg.Go(func() {
			for _, u := range append([]wxsim.User{l.plain}, l.steady...) {
				if err := l.f.untilGood(t.Context(), n, u, healTime); err != nil {
					l.f.errorf("after a fault: %v", err)
					return
				}
			}
		})
	}
	wg.Wait()
	for _, n := range l.f.nodes {
		if err := l.f.ticket(on(t.Context(), n)); err != nil {
			l.f.errorf("after a fault, node %s: a ticket: %v", n.name, err)
		}
	}
	took := time.Since(since)
	l.note(func(r *fleetRow) { r.recovered = max(r.recovered, took) })
}

// judge holds what happened against the guarantees, once the load has stopped, and returns the table.
func (l *fleetLoad) judge() string {
	t, f := l.f.t, l.f
	t.Helper()
	l.enter(nothingFails)
	l.note(func(r *fleetRow) { r.times = 0 })
	lost := l.lostRecords()
	l.mu.Lock()
	early := slices.Clone(l.early)
	l.mu.Unlock()
	for _, e := range early {
		if !l.excused(e.at.Add(-time.Second), e.at.Add(time.Second), afterwards, func(x *fleetFault) bool { return locksGone(x) || nodeGone(x) }) {
			f.errorf("%s, at %s, under %q", e.what, e.at.Format("15:04:05.000"), e.row)
		}
	}
	for _, e := range f.wechat.Journal().Violations() {
		for _, v := range e.Violations {
			switch {
			case v.Rule == wxsim.RuleFreshRefresh, v.Rule == wxsim.RuleTwoRefreshes: // counted above
			case v.Rule == wxsim.RuleAnswer && e.Path == "/wx/event" && e.Status == http.StatusServiceUnavailable:
				// Not acknowledged, so that WeChat pushes it again. The record's lock may be that of a node that died with it.
				if !l.excused(e.Time, e.Time.Add(appWait), noticed, locksGone) && !l.excused(e.Time, e.Time.Add(appWait), afterwards, nodeGone) {
					f.errorf("an event got 503 at %s, while nothing failed", e.Time.Format("15:04:05.000"))
				}
			default:
				f.errorf("WeChat saw %s %s?%s at %s: %s: %s", e.Method, e.Path, e.Query, e.Time.Format("15:04:05.000"), v.Rule, v.Text)
			}
		}
	}
	l.mu.Lock() // the gateways go on
	defer l.mu.Unlock()
	if r := l.rows[nothingFails]; r.asked*20 > r.logins+20 {
		f.errorf("%d of %d visitors were asked to try again while nothing failed", r.asked, r.logins)
	}
	total := &fleetRow{}
	for _, name := range l.order {
		total.add(l.rows[name])
	}
	seen := total.seen - total.voided
	if seen > 0 {
		f.errorf("apps got to see %d answers of WeChat that refuse a token", seen)
	}
	var b strings.Builder
	out := tabwriter.NewWriter(&b, 0, 0, 1, ' ', 0)
	fmt.Fprintln(out, "| fault\t| times\t| lasted\t| calls\t| slowest\t| failed\t| refused by WeChat\t| seen by apps\t| tokens\t| for each life\t| void\t| pushes\t| more than once\t| run twice\t| excused\t| unanswered\t| logins\t| failed\t| authorizations\t| lost\t| recovered in\t|")
	fmt.Fprintln(out, "|"+strings.Repeat(" ---\t|", 21))
	for _, name := range append(l.order, "all") {
		r := l.rows[name]
		if name == "all" {
			r = total
		}
		perLife := "–"
		if lives := r.renewed - r.early; lives > 0 {
			perLife = fmt.Sprintf("%.2f", float64(r.renewed)/float64(lives))
		}
		fmt.Fprintf(out, "| %s\t| %d\t| %.0f s\t| %d\t| %.1f s\t| %d\t| %d\t| %d\t| %d\t| %s\t| %d\t| %d\t| %d\t| %d\t| %d\t| %d\t| %d\t| %d\t| %d\t| %d\t| %.1f s\t|\n",
			name, r.times, r.lasted.Seconds(), r.calls, r.slowest.Seconds(), r.failed, r.refused, r.seen, r.renewed, perLife, r.void,
			r.pushes, r.retried, r.twice, r.again, r.unanswered, r.logins, r.loginsFailed, r.events, r.eventsLost, r.recovered.Seconds())
	}
	_ = out.Flush()
	fmt.Fprintf(&b, "\n%d nodes, records lost: %d of %d\n", len(f.nodes), lost, len(l.steady)+len(l.moving)+2)
	return b.String()
}

func (r *fleetRow) add(o *fleetRow) {
	r.times, r.lasted, r.calls, r.failed = r.times+o.times, r.lasted+o.lasted, r.calls+o.calls, r.failed+o.failed
	r.voided += o.voided
	r.refused, r.seen, r.renewed, r.early, r.void = r.refused+o.refused, r.seen+o.seen, r.renewed+o.renewed, r.early+o.early, r.void+o.void
	r.pushes, r.retried, r.twice, r.again, r.unanswered = r.pushes+o.pushes, r.retried+o.retried, r.twice+o.twice, r.again+o.again, r.unanswered+o.unanswered
	r.logins, r.loginsFailed, r.events, r.eventsLost = r.logins+o.logins, r.loginsFailed+o.loginsFailed, r.events+o.events, r.eventsLost+o.eventsLost
	r.slowest, r.recovered = max(r.slowest, o.slowest), max(r.recovered, o.recovered)
}

// lostRecords ends all tokens and looks which accounts a node that knows nothing cannot serve by what is in Redis: by a
// refresh token that WeChat takes.
func (l *fleetLoad) lostRecords() (lost int) {
	t, f := l.f.t, l.f
	t.Helper()
	eventually(t, "nothing waits for Redis", func() error {
		for _, n := range f.nodes {
			if err := n.settled(t); err != nil {
				return err
			}
		}
		return nil
	})
	n := f.nodes[0]
	if err := errors.Join(n.Kill(), n.Start(t.Context())); err != nil {
		t.Fatal(err)
	}
	f.wechat.ExpireAll(wxsim.KindAuthorizer, "")
	f.wechat.ExpireAll(wxsim.KindComponent, "")
	voids := func() (n int) {
		l.note(func(r *fleetRow) { n = r.void })
		return n
	}
	before := voids()
	for _, u := range slices.Concat(l.steady, l.moving, []wxsim.User{l.plain}) {
		if err := f.untilGood(t.Context(), n, u, healTime); err != nil {
			lost++
			f.errorf("lost: %v", err)
		}
	}
	if void := voids() - before; void > 0 {
		lost += void
		f.errorf("%d refresh tokens in Redis are not WeChat's", void)
	}
	f.checkNoSecrets("dump of Redis", dump(t, f))
	return lost
}

// dump is all that is in Redis, keys and values.
func dump(t *testing.T, f *fleet) string {
	t.Helper()
	ctx, client := t.Context(), f.redis.Client()
	keys, err := client.Keys(ctx, "*").Result()
	if err != nil {
		t.Fatal(err)
	}
	if len(keys) == 0 {
		t.Fatal("Redis is empty")
	}
	var b strings.Builder
	for _, key := range keys {
		b.WriteString(key + "\n")
		switch kind := client.Type(ctx, key).Val(); kind {
		case "hash":
			for field, value := range client.HGetAll(ctx, key).Val() {
				b.WriteString(field + " " + value + "\n")
			}
		case "string":
			b.WriteString(client.Get(ctx, key).Val() + "\n")
		case "none": // it has just ended
		default:
			f.errorf("%s is a %s, which this test cannot read", key, kind)
		}
	}
	return b.String()
}
