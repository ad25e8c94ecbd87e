package tokens

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

var (
	fleetSeed = flag.Uint64("fleet.seed", 1, "what goes wrong, and when, in TestFleet; 0: something new")
	fleetDays = flag.Int("fleet.days", 2, "days of simulated life in TestFleet")
)

const (
	fleetAccounts = 10_000
	fleetPlain    = 500 // of them have a secret of their own
	fleetBusy     = 40  // are never at rest; a third of the others are used for an hour or so
	fleetNodes    = 2
)

// fleet is a cluster of gateways, WeChat, and the apps that use them.
type fleet struct {
	seed  uint64
	wx    *fleetWeChat
	store *fleetStore
	nodes [fleetNodes]atomic.Pointer[fleetNode]
	creds []AccountCredentials

	calls, failed, crashes, stops, authorized atomic.Int64
}

func fleetKey(i int) Key {
	appid := fmt.Sprintf("wx%016x", i)
	if i < fleetPlain {
		return AccountKey(appid)
	}
	return AuthorizerKey(testPlatform, appid)
}

// Days of life of many accounts on two nodes, while WeChat, the network, the store and the nodes fail: no token is
// refreshed twice, none is served that is known to be dead, and no refresh token is lost.
func TestFleet(t *testing.T) {
	t.Parallel()
	seed := *fleetSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	synctest.Test(t, func(t *testing.T) {
		fl := &fleet{seed: seed, wx: newFleetWeChat(seed)}
		fl.store = newFleetStore(fl.wx)
		fl.wx.nodes = fleetNodes
		fl.wx.grace, fl.wx.overlap = 0, 0
		fl.wx.rotates = func(appid string) bool { return dice(seed, "rotates", appid)%2 == 0 }
		for i := range fleetPlain {
			fl.creds = append(fl.creds, AccountCredentials{fleetKey(i).AppID, secret.New(testAccountSecret)})
		}
		fl.settle(t)
		for i := range fl.nodes {
			fl.nodes[i].Store(newFleetNode(fl.wx, fl.store, fl.creds))
		}
		fl.push()
		fl.trouble()

		life, done := time.Duration(*fleetDays)*24*time.Hour, make(chan struct{})
		var apps, rest sync.WaitGroup
		rest.Go(func() { fl.every(10*time.Minute, done, fl.push) })
		rest.Go(func() { fl.every(97*time.Minute, done, fl.breakdown) })
		fl.live(&apps, life)
		apps.Wait()
		close(done)
		rest.Wait()

		fl.wx.mu.Lock()
		fl.wx.fault = nil
		fl.wx.mu.Unlock()
		fl.store.fail(nil)
		time.Sleep(10 * time.Minute) // what waits is written, what was accepted is exchanged
		fl.push()
		fl.inspect(t)
		for i := range fl.nodes {
			fl.nodes[i].Load().stop()
		}
		time.Sleep(2 * time.Minute) // until what died is gone
		fl.report(t)
	})
	if t.Failed() {
		t.Logf("again with: go test -run 'TestFleet$' ./tokens -fleet.seed=%d -fleet.days=%d", seed, *fleetDays)
	}
}

// settle puts the authorizers into the store, as they were authorised long ago.
func (fl *fleet) settle(t *testing.T) {
	n := newFleetNode(fl.wx, fl.store, nil)
	synctest.Wait()
	for i := fleetPlain; i < fleetAccounts; i++ {
		k := fleetKey(i)
		fl.wx.mu.Lock()
		h := fl.wx.holder(k)
		h.authorized, h.authTime = true, time.Now()
		fl.wx.issueRefresh(h, 0)
		wire := recordWire{Gen: 1, RefreshToken: h.refresh.value, AuthorizedAt: time.Now().Unix()}
		fl.wx.mu.Unlock()
		if err := n.storeRecord(t.Context(), n.env.prepared(), k.recordName(), wire); err != nil {
			t.Fatal(err)
		}
	}
	n.stop()
}

// trouble decides what fails when: now and then a call to WeChat, and some minutes of some hours WeChat or the store as
// a whole.
func (fl *fleet) trouble() {
	hour := func(what string, minutes time.Duration, oneIn uint64) bool {
		now := time.Now()
		start := now.Truncate(time.Hour)
		return now.Sub(start) < minutes*time.Minute && dice(fl.seed, what, start.Unix())%oneIn == 0
	}
	fl.wx.mu.Lock()
	fl.wx.fault = func(_, _ string, roll func(string) uint64) wxFault {
		percent := uint64(4)
		if hour("WeChat is down", 8, 5) {
			percent = 90
		}
		if roll("fault")%100 < percent {
			return wxFaults[roll("kind")%uint64(len(wxFaults))]
		}
		return faultNone
	}
	fl.wx.mu.Unlock()
	fl.store.fail(func(op, name string) storeFault {
		if !hour("the store is down", 6, 5) {
			return storeWell
		}
		switch roll := dice(fl.seed, op, name, time.Now().UnixNano()); {
		case hour("all of it", 6, 2):
			return storeFails + storeFault(roll%2)
		default:
			return storeFault(roll % 4)
		}
	})
}

func (fl *fleet) every(pause time.Duration, done <-chan struct{}, act func()) {
	for {
		select {
		case <-time.After(pause):
			act()
		case <-done:
			return
		}
	}
}

// node is the one that a load balancer chooses.
func (fl *fleet) node(parts ...any) *fleetNode {
	return fl.nodes[dice(fl.seed, append(parts, time.Now().UnixNano())...)%fleetNodes].Load()
}

func (fl *fleet) push() {
	_ = fl.node("push").PutTicket(context.Background(), testPlatform, fl.wx.newTicket())
}

// breakdown ends a node, in good order or not, and starts its successor.
func (fl *fleet) breakdown() {
	roll := dice(fl.seed, "breakdown", time.Now().UnixNano())
	time.Sleep(time.Duration(roll % uint64(time.Hour)))
	slot := &fl.nodes[roll>>32%fleetNodes]
	old := slot.Load()
	if roll>>40%4 == 0 {
		old.stop()
		fl.stops.Add(1)
	} else {
		old.crash()
		fl.crashes.Add(1)
	}
	slot.Store(newFleetNode(fl.wx, fl.store, fl.creds))
}

// live starts the accounts' sessions: every third account has its hour, a few are always in use.
func (fl *fleet) live(apps *sync.WaitGroup, life time.Duration) {
	begin := time.Now()
	start := func(i int) time.Time {
		if i%(fleetAccounts/fleetBusy) == 0 {
			return begin
		}
		return begin.Add(time.Duration(dice(fl.seed, "start", i) % uint64(life-2*time.Hour)))
	}
	order := make([]int, fleetAccounts)
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int { return start(a).Compare(start(b)) })
	for _, i := range order {
		if i%3 != 0 && i%(fleetAccounts/fleetBusy) != 0 {
			continue
		}
		end := start(i).Add(10*time.Minute + time.Duration(dice(fl.seed, "length", i)%uint64(90*time.Minute)))
		if i%(fleetAccounts/fleetBusy) == 0 {
			end = begin.Add(life)
		}
		time.Sleep(time.Until(start(i)))
		apps.Go(func() { fl.session(i, end) })
	}
}

// session is what the apps of one account do.
func (fl *fleet) session(i int, end time.Time) {
	k := fleetKey(i)
	if k.Kind == KindAuthorizer && dice(fl.seed, "authorises again", i)%40 == 0 {
		fl.authorize(k.AppID)
	}
	for n := 0; time.Now().Before(end); n++ {
		roll := dice(fl.seed, "use", i, n)
		switch {
		case roll%97 == 0:
			fl.wx.kill(k)
		case roll%97 == 1:
			fl.wx.rogue(k)
		}
		callers := 1
		if roll>>8%8 == 0 {
			callers = 4
		}
		var wg sync.WaitGroup
		for c := range callers {
			wg.Go(func() {
				node := fl.node("use", i, n, c)
				ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
				defer cancel()
				fl.calls.Add(1)
				if err := node.use(ctx, k); err != nil && !node.gone() {
					fl.failed.Add(1)
				}
			})
		}
		wg.Wait()
		time.Sleep(time.Minute + time.Duration(roll>>16%uint64(30*time.Minute)))
	}
}

// authorize is an account that authorises again. WeChat pushes until it is answered.
func (fl *fleet) authorize(appid string) {
	code, at := fl.wx.newCode(appid)
	in := Intent{Platform: testPlatform, AppID: appid, Code: code, CreatedAt: at, ExpiresAt: at.Add(codeLife), InfoType: "updateauthorized"}
	for fl.node("authorize", appid).Accept(context.Background(), in) != nil {
		time.Sleep(5 * time.Second)
	}
	fl.authorized.Add(1)
}

// inspect looks at what is left once everything works again.
func (fl *fleet) inspect(t *testing.T) {
	lost := 0
	for i := range fleetAccounts {
		k := fleetKey(i)
		if k.Kind == KindAuthorizer && !fl.wx.inStep(k) {
			_ = fl.node("heal", i).use(t.Context(), k) // an account heals when it is used
		}
		works := k.Kind == KindAccount || fl.wx.whole(k.AppID)
		if !works {
			lost++
		}
		if i%10 == 0 {
			if err := fl.node("inspect", i).use(t.Context(), k); works && err != nil {
				t.Errorf("%s does not work: %v", k.owner(), err)
			}
		}
	}
	// A node that dies between WeChat's answer to a code and the store's takes the code with it.
	if lost > int(fl.crashes.Load()) {
		t.Errorf("%d accounts have to authorise again after %d crashes", lost, fl.crashes.Load())
	} else if lost > 0 {
		t.Logf("%d accounts have to authorise again: their code was burnt", lost)
	}
	for i := range fl.nodes {
		if n := fl.nodes[i].Load().Unsaved(); n != 0 {
			t.Errorf("node %d has %d records that are not written", i, n)
		}
	}
	if names, err := fl.store.MemStore.List(t.Context(), intentFolder); err != nil || len(names) != 0 {
		t.Errorf("%d intents are left (%v)", len(names), err)
	}
}

// report counts what happened, and fails if it was too little to mean anything.
func (fl *fleet) report(t *testing.T) {
	for _, v := range fl.wx.violations() {
		t.Error(v)
	}
	fl.wx.mu.Lock()
	defer fl.wx.mu.Unlock()
	renewed := make(map[Kind]int)
	for k, h := range fl.wx.holders {
		renewed[k.Kind] += h.renewed
	}
	t.Logf("%d days, %d calls of apps, %d failed; %d crashes, %d stops, %d authorizations", *fleetDays, fl.calls.Load(), fl.failed.Load(),
		fl.crashes.Load(), fl.stops.Load(), fl.authorized.Load())
	t.Logf("tokens given: %v; calls to WeChat: %v", renewed, fl.wx.calls)
	t.Logf("faults of WeChat: %v; of the store: %v", fl.wx.faults, fl.store.faults)
	if calls := fl.calls.Load(); fl.failed.Load()*25 > calls {
		t.Errorf("%d of %d calls failed", fl.failed.Load(), calls)
	}
	for _, fault := range append(wxFaults, faultBroken) {
		if fl.wx.faults[fault] == 0 {
			t.Errorf("a fault of WeChat never happened: %s", fault)
		}
	}
	for _, fault := range []storeFault{storeFails, storeHangs, storeForgets} {
		if fl.store.faults[fault] == 0 {
			t.Errorf("store fault %d never happened", fault)
		}
	}
}
