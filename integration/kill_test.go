package integration_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

const (
	pathComponentToken  = "/cgi-bin/component/api_component_token"
	pathQueryAuth       = "/cgi-bin/component/api_query_auth"
	pathAuthorizerToken = "/cgi-bin/component/api_authorizer_token"
	pathAuthorizerInfo  = "/cgi-bin/component/api_get_authorizer_info"
	pathAuthorizerList  = "/cgi-bin/component/api_get_authorizer_list"

	codeRefreshTokenVoid = 61023
	codeAuthCodeUsed     = 61009

	healTime  = 30 * time.Second // an app's call works again within it
	reachTime = 30 * time.Second // the lock of a process killed before may be in the way of a kill point
	spinTime  = 2 * time.Second  // what the storage is watched for comes within milliseconds
)

// operation is what is under way when the process is killed.
type operation string

const (
	opAuthorize operation = "authorized"       // of a new account: its code has to be exchanged
	opUpdate    operation = "updateauthorized" // the same for a known one, whose refresh token is void from then on
	opRefresh   operation = "refresh"          // of an authorizer's token, on an app's call
	opComponent operation = "component"        // refresh of the platform's own token, on the same call
)

// call is the path of the operation's call to WeChat.
func (o operation) call() string {
	switch o {
	case opRefresh:
		return pathAuthorizerToken
	case opComponent:
		return pathComponentToken
	default:
		return pathQueryAuth
	}
}

// killPoint is one moment of an operation.
type killPoint struct {
	op   operation
	name string
	step wxsim.Step
	lose bool // WeChat never carries the call out
	// delay is the time from the step to the kill; see also sight.
	delay time.Duration
	sight sight
}

// atPush reports whether the moment is one of the push, not of the call that follows.
func (p killPoint) atPush() bool { return p.step == wxsim.StepPushed || p.step == wxsim.StepReplied }

// sight is what of the process's doing is awaited in its storage between the step and the kill.
type sight uint8

const (
	nothing sight = iota
	newLock       // a lock more: that around the write of the record
	newRecord
)

// The moments of a push and of a call. For a call, in the order in which a process comes through them.
func sent(op operation, delay time.Duration) killPoint {
	return killPoint{op: op, name: "push sent +" + delay.String(), step: wxsim.StepPushed, delay: delay}
}

// acknowledged: after `success`, and before the exchange that it promises, which is kept from happening until then.
func acknowledged(op operation) killPoint {
	return killPoint{op: op, name: "success given, no exchange", step: wxsim.StepReplied}
}

func lost(op operation) killPoint {
	return killPoint{op: op, name: "call under way, lost", step: wxsim.StepArrived, lose: true}
}

func late(op operation) killPoint {
	return killPoint{op: op, name: "call under way, acts later", step: wxsim.StepArrived}
}

func acted(op operation) killPoint {
	return killPoint{op: op, name: "WeChat acted, no answer", step: wxsim.StepActed}
}

func answered(op operation, delay time.Duration) killPoint {
	return killPoint{op: op, name: "answered +" + delay.String(), step: wxsim.StepAnswered, delay: delay}
}

func locked(op operation) killPoint {
	return killPoint{op: op, name: "answered, record locked", step: wxsim.StepAnswered, sight: newLock}
}

func written(op operation) killPoint {
	return killPoint{op: op, name: "answered, record written", step: wxsim.StepAnswered, sight: newRecord}
}

// TestKillAtEveryStep kills the process twenty times, at every step of exchange and refresh, against a WeChat that
// changes the refresh token with each refresh and accepts the old one for five minutes: no account is lost.
//
// The order keeps the test short. A killed process leaves its locks, which count for ten seconds: those of an account
// are in nobody's way, that of the platform's own token is in everybody's, and what follows it needs no call to WeChat.
func TestKillAtEveryStep(t *testing.T) {
	t.Parallel()
	k := newKiller(t, lenient, nil)
	k.wave([]killPoint{
		written(opComponent),
		lost(opRefresh), late(opRefresh), acted(opRefresh), answered(opRefresh, 0), locked(opRefresh), written(opRefresh),
		lost(opAuthorize), acted(opAuthorize), answered(opAuthorize, 0), written(opAuthorize),
		late(opUpdate), acted(opUpdate), locked(opUpdate),
		acted(opComponent),
		sent(opAuthorize, 0), sent(opUpdate, time.Millisecond), sent(opAuthorize, 3*time.Millisecond),
		acknowledged(opAuthorize), acknowledged(opUpdate),
	})
	k.finish()
	if k.kills != 20 {
		t.Errorf("%d kills", k.kills)
	}
}

// lenient is a WeChat that accepts a refresh token for a while after it was replaced.
func lenient(c *wxsim.Config) {
	c.Lives.RefreshOverlap = 5 * time.Minute
}

// killer kills a gateway and looks what became of the account that was being served.
type killer struct {
	t        *testing.T
	w        *integration.World
	accounts int
	kills    int
	renewed  int     // component tokens handed out when the process started
	platform *victim // the last one whose operation was the platform's

	mu    sync.Mutex
	tally map[killPoint]*tally
	order []killPoint
}

// tally is what came of the kills at one point.
type tally struct {
	kills   int
	acted   int // WeChat handed out what the dying process asked for, be it after its death
	stored  int // that process had written it
	unaided int // healed from what was stored
	first   int // healed by asking WeChat, which had not acted before
	again   int // healed by asking WeChat a second time
	void    int // WeChat refused the stored refresh token (61023) or the code (61009), as after updateauthorized until the exchange
	listed  int // of these: healed after api_get_authorizer_info or api_get_authorizer_list
	lost    int // no call works
	slowest time.Duration
}

func (a *tally) add(b *tally) {
	a.kills, a.acted, a.stored, a.unaided = a.kills+b.kills, a.acted+b.acted, a.stored+b.stored, a.unaided+b.unaided
	a.first, a.again, a.void, a.listed, a.lost = a.first+b.first, a.again+b.again, a.void+b.void, a.listed+b.listed, a.lost+b.lost
	a.slowest = max(a.slowest, b.slowest)
}

// victim is an account, and what the process did for it when it was killed. Each kill has one of its own.
type victim struct {
	killPoint
	appid    string
	begun    time.Time
	killedAt time.Time
	until    time.Time // when the token that the operation brought was ended, for the next kill; zero: not yet
	stored   bool
	pushed   chan error // gets the outcome of the push, if there is one
}

func newKiller(t *testing.T, wechat func(*wxsim.Config), configure func(*integration.World)) *killer {
	t.Helper()
	w := newWorld(t, func(w *integration.World) {
		polite(w)
		w.Config.Faults.RotateRefreshTokens = true
		// A push that nobody answered comes again until the process is back.
		w.Config.Pace = wxsim.Pace{Attempts: 200, Interval: 100 * time.Millisecond}
		w.Config.JournalSize = 100_000
		wechat(&w.Config)
		w.Env = append(w.Env, "CRM_APPIDS=*")
		if configure != nil {
			configure(w)
		}
	})
	k := &killer{t: t, w: w, tally: map[killPoint]*tally{}}
	if result, err := w.WeChat.PushTicket(t.Context(), integration.PlatformID); err != nil || !result.OK() {
		t.Fatalf("ticket: %s %v", result.Wrong, err)
	}
	k.authorize(integration.AuthorizerID) // no victim: wave probes with it
	return k
}

// wave kills the process once at each of the points, each time while it serves another account, and then looks after
// all these accounts. What the process resumes after one kill may so be under way at the next.
func (k *killer) wave(points []killPoint) {
	k.t.Helper()
	victims := make([]*victim, 0, len(points))
	for _, p := range points {
		k.accounts++
		v := &victim{killPoint: p, appid: fmt.Sprintf("wx5%015x", k.accounts)}
		victims = append(victims, v)
		if p.op != opAuthorize {
			k.authorize(v.appid)
		}
	}
	k.renewed = k.componentTokens()
	probe := false
	for _, v := range victims {
		if probe && v.op != opComponent && !v.atPush() {
			// WeChat would refuse the call for the platform's token: it must be whole before.
			k.w.WeChat.ExpireAll(wxsim.KindAuthorizer, integration.AuthorizerID)
			if err := k.heal(k.t.Context(), integration.AuthorizerID); err != nil {
				k.t.Fatalf("after a kill in the refresh of the platform's token: %v", err)
			}
			probe = false
		}
		k.kill(v)
		probe = probe || v.op == opComponent
	}
	var wg sync.WaitGroup
	for _, v := range victims {
		wg.Go(func() { k.lookAfter(v) })
	}
	wg.Wait()
}

func (k *killer) componentTokens() int {
	return k.w.WeChat.Journal().Refreshes(wxsim.KindComponent, integration.PlatformID)
}

// authorize makes an account known to the gateway.
func (k *killer) authorize(appid string) {
	k.t.Helper()
	a, err := k.w.WeChat.Authorize(k.t.Context(), integration.PlatformID, appid)
	if err != nil || !a.Push.OK() {
		k.t.Fatalf("authorized: %s %v", a.Push.Wrong, err)
	}
	if err := k.heal(k.t.Context(), appid); err != nil {
		k.t.Fatalf("%s, before the kill: %v", appid, err)
	}
}

// begin starts the operation. Its calls end with ctx; a push goes on after the kill.
func (k *killer) begin(ctx context.Context, v *victim) {
	wechat := k.w.WeChat
	push := func(push func(context.Context, string, string, ...int) (wxsim.Authorization, error)) {
		v.pushed = make(chan error, 1)
		go func() {
			a, err := push(k.t.Context(), integration.PlatformID, v.appid)
			if err == nil && !a.Push.OK() {
				err = errors.New(a.Push.Wrong)
			}
			v.pushed <- err
		}()
	}
	if v.op != opAuthorize {
		// Only what the operation brings may serve afterwards.
		wechat.ExpireAll(wxsim.KindAuthorizer, v.appid)
	}
	switch v.op {
	case opAuthorize:
		push(wechat.Authorize)
		return
	case opUpdate:
		push(wechat.Reauthorize)
		return
	case opComponent:
		wechat.ExpireAll(wxsim.KindComponent, integration.PlatformID)
	}
	go func() { _ = k.heal(ctx, v.appid) }() // more than one call: the lock of a process killed before may be in the way
}

// kill brings the process to the point, kills it there and starts it again.
func (k *killer) kill(v *victim) {
	k.t.Helper()
	ctx, cancel := context.WithTimeout(k.t.Context(), reachTime)
	defer cancel()
	wechat := k.w.WeChat
	before := k.look(v)
	about := v.appid
	if v.op == opComponent {
		about = integration.PlatformID
	}
	path := v.op.call()
	if v.atPush() {
		path = ""
	}
	var once sync.Once
	var killErr error
	dead := make(chan struct{})
	lose := func() { wechat.FailNext(v.op.call(), wxsim.Fault{DropConnection: true}) }
	wechat.Watch(func(p wxsim.Progress) {
		switch {
		case p.AppID != about || p.Errcode != 0 || ctx.Err() != nil:
		case v.step == wxsim.StepReplied && p.Step == wxsim.StepArrived && p.Path == v.op.call():
			select {
			case <-dead:
				lose()
			case <-ctx.Done():
			}
		case v.sight == newLock && p.Step == wxsim.StepActed && p.Path == path:
			before.locks = k.look(v).locks // those of the call itself are held by now
		case p.Step == v.step && p.Path == path:
			once.Do(func() {
				defer close(dead)
				killErr = errors.Join(k.await(v, before), k.w.Gateway.Kill())
				if v.lose {
					lose()
				}
			})
		}
	})
	v.begun = time.Now()
	if v.op == opComponent {
		if k.platform != nil {
			k.platform.until = v.begun
		}
		k.platform = v
	}
	calls, hangUp := context.WithCancel(ctx)
	defer hangUp()
	k.begin(calls, v)
	select {
	case <-dead:
		hangUp()
	case <-ctx.Done():
		k.t.Fatalf("%s, %s: not reached within %v", v.op, v.name, reachTime)
	}
	v.killedAt = time.Now()
	k.kills++
	if killErr != nil {
		k.t.Errorf("%s, %s: %v", v.op, v.name, killErr)
	}
	now := k.look(v)
	v.stored = changed(before.record(v.op), now.record(v.op))
	k.forgivePlatform(v, before, now) // at once: what is resumed renews it
	wechat.Watch(nil)
	if err := k.w.Gateway.Start(k.t.Context()); err != nil {
		k.t.Fatal(err)
	}
	wechat.ClearFaults()             // of a call that did not come
	k.forgiveAccount(v, before, now) // not sooner: WeChat may have acted on what it received before the kill
	k.renewed = k.componentTokens()
}

// forgivePlatform and forgiveAccount allow the renewal that the crash excuses: of a token that WeChat may have handed out
// and that is not in the store. A token that is there must not be renewed.
func (k *killer) forgivePlatform(v *victim, before, now footprint) {
	// Another operation, resumed after an earlier kill, may have had the platform's own token under way.
	underWay := v.op == opComponent || k.componentTokens() != k.renewed
	if underWay && !changed(before.platform, now.platform) {
		k.w.WeChat.AllowRefresh(wxsim.KindComponent, integration.PlatformID)
	}
}

func (k *killer) forgiveAccount(v *victim, before, now footprint) {
	if !changed(before.account, now.account) {
		k.w.WeChat.AllowRefresh(wxsim.KindAuthorizer, v.appid)
	}
}

// footprint is what shows in the storage of an operation.
type footprint struct {
	account, platform fs.FileInfo // of the records; nil: none
	locks             []string
}

func (k *killer) look(v *victim) footprint {
	records := filepath.Join(k.w.Dir, "data", "caddy", "wechat", "v1")
	var f footprint
	if found, _ := filepath.Glob(filepath.Join(records, "authorizer", integration.PlatformID, "*", v.appid)); len(found) == 1 {
		f.account, _ = os.Stat(found[0])
	}
	f.platform, _ = os.Stat(filepath.Join(records, "component", integration.PlatformID))
	f.locks, _ = lockFiles(k.w) // none yet
	return f
}

// record is the record that the operation writes.
func (f footprint) record(op operation) fs.FileInfo {
	if op == opComponent {
		return f.platform
	}
	return f.account
}

// changed reports whether a record was written between two looks.
func changed(before, now fs.FileInfo) bool {
	return now != nil && (before == nil || !os.SameFile(before, now) || !before.ModTime().Equal(now.ModTime()))
}

// await waits, from the step on, until the process is where it is to be killed. It spins: what is awaited lasts for
// less than a sleep.
func (k *killer) await(v *victim, before footprint) error {
	start := time.Now()
	for ; time.Since(start) < spinTime; runtime.Gosched() {
		switch v.sight {
		case nothing:
			if time.Since(start) >= v.delay {
				return nil
			}
		case newLock:
			now := k.look(v)
			more := slices.ContainsFunc(now.locks, func(l string) bool { return !slices.Contains(before.locks, l) })
			if more || changed(before.record(v.op), now.record(v.op)) { // the lock may have come and gone between two looks
				return nil
			}
		case newRecord:
			if changed(before.record(v.op), k.look(v).record(v.op)) {
				return nil
			}
		}
	}
	return fmt.Errorf("nothing of it in the storage for %v", spinTime)
}

// lookAfter brings the account's app back to work, as far as calling does that, and counts how it went.
func (k *killer) lookAfter(v *victim) {
	start := time.Now()
	err := k.heal(k.t.Context(), v.appid)
	row := &tally{kills: 1, slowest: time.Since(start)}
	k.read(v, row, err == nil)
	if err != nil {
		k.t.Errorf("%s, %s: lost: no call works for %v: %v", v.op, v.name, healTime, err)
	} else {
		// The refresh token that is held is good as well.
		k.w.WeChat.ExpireAll(wxsim.KindAuthorizer, v.appid)
		if err := k.heal(k.t.Context(), v.appid); err != nil {
			row.lost++
			k.t.Errorf("%s, %s: lost with the next refresh: %v", v.op, v.name, err)
		}
	}
	if v.pushed != nil && row.lost == 0 {
		select {
		case err := <-v.pushed:
			if err != nil {
				k.t.Errorf("%s, %s: the push: %v", v.op, v.name, err)
			}
		case <-time.After(healTime):
			k.t.Errorf("%s, %s: the push is not acknowledged", v.op, v.name)
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.tally[v.killPoint] == nil {
		k.tally[v.killPoint] = &tally{}
		k.order = append(k.order, v.killPoint)
	}
	k.tally[v.killPoint].add(row)
}

// read fills in what the journal knows.
func (k *killer) read(v *victim, row *tally, healed bool) {
	var before, after int
	var refusedAt time.Time
	for _, e := range k.w.WeChat.Journal().Entries() {
		mine := e.AppID == v.appid && (e.Path == pathQueryAuth || e.Path == pathAuthorizerToken)
		if v.op == opComponent {
			mine = e.Path == pathComponentToken
		}
		refused := e.Errcode == codeRefreshTokenVoid || e.Errcode == codeAuthCodeUsed
		switch {
		case e.Direction != wxsim.In || e.Time.Before(v.begun) || !v.until.IsZero() && e.Time.After(v.until):
		case mine && e.Errcode == 0 && e.Fault == "" && e.Time.Before(v.killedAt):
			before++
		case mine && e.Errcode == 0 && e.Fault == "":
			after++
		case e.AppID == v.appid && refused && e.Time.After(v.killedAt):
			row.void, refusedAt = 1, e.Time
		case row.void > 0 && e.Time.After(refusedAt) && (e.Path == pathAuthorizerInfo && e.AppID == v.appid || e.Path == pathAuthorizerList):
			row.listed = 1
		}
	}
	if before > 0 {
		row.acted = 1
	}
	if v.stored {
		row.stored = 1
	}
	switch {
	case !healed:
		row.lost, row.listed = 1, 0
	case after == 0:
		row.unaided = 1
	case v.stored:
		k.t.Errorf("%s, %s: WeChat was asked %d times after the restart, although the answer was stored", v.op, v.name, after)
		row.again = 1
	case before > 0:
		row.again = 1
	default:
		row.first = 1
	}
}

// heal calls for the account until a call works.
func (k *killer) heal(ctx context.Context, appid string) error {
	ctx, cancel := context.WithTimeout(ctx, healTime)
	defer cancel()
	openID := k.w.WeChat.NewUser(appid).OpenID
	var last error
	for {
		err := k.call(ctx, appid, openID)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil || last == nil {
			last = err // that of a call which the end of the time cut short says nothing
		}
		select {
		case <-ctx.Done():
			return last
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// call is an app's call for the account.
func (k *killer) call(ctx context.Context, appid, openID string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, k.w.APIURL("/"+appid+"/cgi-bin/user/info?openid="+openID), nil)
	if err != nil {
		return err
	}
	req.Header = bearer(k.w)
	resp, err := plainClient.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK || !strings.Contains(string(body), openID) {
		return fmt.Errorf("%d %s", resp.StatusCode, body)
	}
	return nil
}

// finish checks what must hold in the end, and returns what came of it all, as a table.
func (k *killer) finish() (total tally, table string) {
	k.t.Helper()
	checkViolations(k.t, k.w)
	var b strings.Builder
	out := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	line := func(op, name string, r *tally) {
		fmt.Fprintf(out, "%s, %s\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%.1fs\t\n", op, name,
			r.kills, r.acted, r.stored, r.unaided, r.first, r.again, r.void, r.listed, r.lost, r.slowest.Seconds())
	}
	fmt.Fprintln(out, "kill point\tkills\tWeChat acted\tstored\tunaided\tasked first\tasked again\tvoid\tby list\tlost\tslowest\t")
	slices.SortStableFunc(k.order, func(a, b killPoint) int { return cmp.Compare(a.op, b.op) })
	for _, p := range k.order {
		total.add(k.tally[p])
		line(string(p.op), p.name, k.tally[p])
	}
	line("all", "together", &total)
	_ = out.Flush()
	k.t.Logf("%d kills, %d accounts lost\n%s", total.kills, total.lost, b.String())
	return total, b.String()
}
