package tokens

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// modelKeys are what the model's apps use: the platform itself, three authorizers, and an account with a secret.
var modelKeys = []Key{
	AuthorizerKey(testPlatform, "wx0000000000000001"), AuthorizerKey(testPlatform, "wx0000000000000002"),
	AuthorizerKey(testPlatform, "wx0000000000000003"), AccountKey(testAccount), ComponentKey(testPlatform),
}

const modelAuthorizers = 3 // come first in modelKeys

// modelOp is one thing that happens, and how long it is until the next one does; it may still be going on then.
type modelOp struct {
	what string
	who  int // of modelKeys
	gap  time.Duration
}

func (o modelOp) String() string { return fmt.Sprintf("%s(%d) %v", o.what, o.who, o.gap) }

// modelOps has what happens often more than once.
var modelOps = []string{
	"use", "use", "use", "use", "storm", "call", "call", "renew", "late refusal", "kill", "kill", "rogue",
	"authorize", "authorize", "redirect", "repush", "revoke", "ticket", "ticket", "old ticket",
	"crash", "crash", "restart", "reload", "backup", "restore",
	"store fails", "writes fail", "loads fail", "locks fail", "store hangs", "store forgets", "store flaky", "store well", "store well",
	"WeChat lossy", "WeChat lossy", "WeChat gone", "WeChat well", "WeChat well",
}

func modelOpGen() *rapid.Generator[modelOp] {
	gaps := rapid.SampledFrom([]time.Duration{
		0, 0, 10 * time.Millisecond, 100 * time.Millisecond, time.Second, 3 * time.Second, 20 * time.Second, 2 * time.Minute,
		10 * time.Minute, 110 * time.Minute, 5 * time.Hour,
	})
	return rapid.Custom(func(t *rapid.T) modelOp {
		return modelOp{
			what: rapid.SampledFrom(modelOps).Draw(t, "what"),
			who:  rapid.IntRange(0, len(modelKeys)-1).Draw(t, "who"),
			gap:  gaps.Draw(t, "gap"),
		}
	})
}

var modelTime = flag.Duration("model.time", 8*time.Second, "how long TestModel looks for a failure, with -rapid.checks at most")

// What must never happen does not, whatever comes in whatever order: pushes, refusals, renewals, authorizations, crashes,
// and a store, a network and a WeChat that fail. Rapid prints what to run a failure again with.
func TestModel(t *testing.T) {
	t.Parallel()
	end, failed, lives := time.Now().Add(*modelTime), false, 0
	rapid.Check(t, func(rt *rapid.T) {
		// All is drawn before: rapid's T must not be used from within a bubble.
		w := &model{seed: rapid.Uint64().Draw(rt, "seed"), newest: make(map[Key]int64), revoked: make(map[Key]bool)}
		rotates := rapid.Bool().Draw(rt, "rotates")
		grace := rapid.SampledFrom([]time.Duration{0, 5 * time.Minute, untilUsed}).Draw(rt, "grace")
		overlap := rapid.SampledFrom([]time.Duration{0, 5 * time.Minute}).Draw(rt, "overlap")
		latency := rapid.SampledFrom([]time.Duration{0, 5 * time.Millisecond, 200 * time.Millisecond}).Draw(rt, "latency of the store")
		ops := rapid.SliceOfN(modelOpGen(), 10, 60).Draw(rt, "ops")
		if !failed && time.Now().After(end) {
			return // a failure is made small, however long it takes
		}
		lives++
		synctest.Test(t, func(*testing.T) {
			w.wx = newFleetWeChat(w.seed)
			w.wx.rotates, w.wx.grace, w.wx.overlap = func(string) bool { return rotates }, grace, overlap
			w.store = newFleetStore(w.wx)
			w.store.latency = latency
			w.start()
			w.pushTicket(w.wx.newTicket())
			for i := range modelAuthorizers {
				w.do(modelOp{what: "authorize", who: i})
			}
			time.Sleep(time.Minute)
			for _, op := range ops {
				w.do(op)
				time.Sleep(op.gap)
			}
			w.end()
		})
		if wrong := w.wx.violations(); len(wrong) > 0 {
			failed = true
			rt.Fatalf("%s", strings.Join(wrong, "\n"))
		}
	})
	t.Logf("%d interleavings were tried", lives)
}

// model is one gateway, WeChat, and those who use them.
type model struct {
	seed  uint64
	wx    *fleetWeChat
	store *fleetStore
	node  *fleetNode
	runs  int
	going sync.WaitGroup

	backup map[string][]byte
	events []*modelEvent

	mu        sync.Mutex
	newest    map[Key]int64 // Unix seconds of the account's last event: WeChat's times have no more
	served    []Token       // each with its key in servedFor
	servedFor []Key
	tickets   []Ticket
	acked     time.Time    // CreatedAt of the newest ticket that was acknowledged
	revoked   map[Key]bool // the revocation was acknowledged, and the account has not come back
	redirects int          // exchanges under way, whose codes have no date
}

// modelEvent is an authorization or its end. WeChat pushes it until it is answered, and then perhaps again.
type modelEvent struct {
	key   Key
	at    time.Time
	code  secret.String // none: the end
	acked bool          // guarded by model.mu
}

func (w *model) start() {
	w.node = newFleetNode(w.wx, w.store, []AccountCredentials{{testAccount, secret.New(testAccountSecret)}})
}

func (w *model) wrong(format string, args ...any) { w.wx.wronged(format, args...) }

// roll is a number that is another one each time, and the same one in each run.
func (w *model) roll(n int) int {
	w.runs++
	return int(dice(w.seed, "roll", w.runs) % uint64(n))
}

func modelContext() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), 20*time.Second)
}

// do lets one thing begin.
func (w *model) do(op modelOp) {
	k, n := modelKeys[op.who], w.node
	switch op.what {
	case "use":
		w.going.Go(func() { _ = w.use(n, k) })
	case "storm":
		for range 20 {
			w.going.Go(func() { _ = w.use(n, k) })
		}
	case "call":
		w.going.Go(func() {
			ctx, cancel := modelContext()
			defer cancel()
			_ = n.Call(ctx, k, http.MethodGet, pathBusiness, nil, nil, nil)
		})
	case "renew":
		w.going.Go(func() {
			ctx, cancel := modelContext()
			defer cancel()
			_, _ = n.renew(ctx, k, secret.String{})
		})
	case "late refusal":
		if k, old, ok := w.earlier(); ok {
			w.going.Go(func() {
				ctx, cancel := modelContext()
				defer cancel()
				_, _ = n.renew(ctx, k, old)
			})
		}
	case "kill":
		w.wx.kill(k)
	case "rogue":
		w.wx.rogue(k)
	case "authorize", "redirect", "revoke":
		w.event(op.what, modelKeys[op.who%modelAuthorizers])
	case "repush":
		if len(w.events) > 0 {
			e := w.events[w.roll(len(w.events))]
			w.going.Go(func() { _ = w.deliver(n, e) })
		}
	case "ticket":
		w.pushTicket(w.wx.newTicket())
	case "old ticket":
		w.pushTicket(w.tickets[w.roll(len(w.tickets))])
	case "crash":
		n.crash()
		w.start()
	case "restart":
		n.stop()
		w.start()
	case "reload":
		n.Use(n.env)
	case "backup":
		w.backup = w.store.snapshot()
	case "restore":
		w.restore()
	default:
		if !w.fault(op.what) {
			panic(op.what)
		}
	}
}

// fault begins or ends a trouble of the store or of WeChat.
func (w *model) fault(what string) bool {
	store := map[string]func(op, name string) storeFault{
		"store well":    nil,
		"store fails":   func(string, string) storeFault { return storeFails },
		"store hangs":   func(string, string) storeFault { return storeHangs },
		"writes fail":   failOp(storeFails, "store", "delete"),
		"loads fail":    failOp(storeFails, "load"),
		"locks fail":    failOp(storeFails, "lock"),
		"store forgets": failOp(storeForgets, "store", "delete"),
		"store flaky": func(op, name string) storeFault {
			if roll := dice(w.seed, op, name, time.Now().UnixNano()); roll%3 == 0 {
				return storeFault(roll >> 8 % 4)
			}
			return storeWell
		},
	}
	if fault, ok := store[what]; ok {
		w.store.fail(fault)
		return true
	}
	wx := map[string]func(path, owner string, roll func(string) uint64) wxFault{
		"WeChat well": nil,
		"WeChat gone": func(string, string, func(string) uint64) wxFault { return faultDial },
		"WeChat lossy": func(_, _ string, roll func(string) uint64) wxFault {
			if roll("fault")%3 == 0 {
				return wxFaults[roll("kind")%uint64(len(wxFaults))]
			}
			return faultNone
		},
	}
	fault, ok := wx[what]
	w.wx.mu.Lock()
	defer w.wx.mu.Unlock()
	w.wx.fault = fault
	return ok
}

func failOp(how storeFault, ops ...string) func(op, name string) storeFault {
	return func(op, _ string) storeFault {
		for _, o := range ops {
			if o == op {
				return how
			}
		}
		return storeWell
	}
}

// use is an app's call. An account whose revocation was acknowledged is not served.
func (w *model) use(n *fleetNode, k Key) error {
	w.mu.Lock()
	revoked := w.revoked[k]
	w.mu.Unlock()
	ctx, cancel := modelContext()
	defer cancel()
	token, err := n.get(ctx, k)
	if err == nil {
		w.mu.Lock()
		if revoked && w.revoked[k] && !n.gone() {
			w.wrong("%s was served after its revocation was acknowledged", k.owner())
		}
		w.served, w.servedFor = append(w.served, token), append(w.servedFor, k)
		w.mu.Unlock()
		err = n.use(ctx, k)
	}
	return err
}

// earlier is a token that was served before, and may still be current.
func (w *model) earlier() (Key, secret.String, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.served) == 0 {
		return Key{}, secret.String{}, false
	}
	i := w.roll(len(w.served))
	return w.servedFor[i], w.served[i].Value, true
}

func (w *model) pushTicket(ticket Ticket) {
	w.mu.Lock()
	w.tickets = append(w.tickets, ticket)
	w.mu.Unlock()
	n := w.node
	w.going.Go(func() {
		ctx, cancel := modelContext()
		defer cancel()
		if err := n.PutTicket(ctx, testPlatform, ticket); err != nil || n.gone() {
			return
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		if ticket.CreatedAt.After(w.acked) {
			w.acked = ticket.CreatedAt
		}
	})
}

// event is an account that authorises, by push alone or by a redirect that comes before the push, or takes its
// authorization back.
func (w *model) event(what string, k Key) {
	w.mu.Lock()
	now := time.Now().Unix()
	later := now > w.newest[k]
	w.newest[k] = now
	w.mu.Unlock()
	if !later {
		return
	}
	n, e := w.node, &modelEvent{key: k, at: time.Now()}
	w.events = append(w.events, e)
	if what == "revoke" {
		w.wx.revoke(k.AppID)
		w.going.Go(func() { _ = w.deliver(n, e) })
		return
	}
	w.mu.Lock()
	w.revoked[k] = false
	w.mu.Unlock()
	e.code, _ = w.wx.newCode(k.AppID)
	if what == "authorize" {
		w.going.Go(func() { _ = w.deliver(n, e) })
		return
	}
	w.mu.Lock()
	w.redirects++
	w.mu.Unlock()
	w.going.Go(func() {
		ctx, cancel := modelContext()
		defer cancel()
		_, _ = n.ExchangeAuthCode(ctx, testPlatform, k.AppID, e.code)
		time.Sleep(exchangeTimeout) // what it began goes on without it
		w.mu.Lock()
		w.redirects--
		w.mu.Unlock()
	})
}

// deliver is one push of an event.
func (w *model) deliver(n *fleetNode, e *modelEvent) error {
	ctx, cancel := modelContext()
	defer cancel()
	if e.code.IsZero() {
		if err := n.Revoke(ctx, e.key.Platform, e.key.AppID, e.at); err != nil || n.gone() {
			return err
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		e.acked = true
		if w.redirects == 0 && w.newest[e.key] == e.at.Unix() {
			w.revoked[e.key] = true
		}
		return nil
	}
	err := n.Accept(ctx, Intent{
		Platform: e.key.Platform, AppID: e.key.AppID, Code: e.code, CreatedAt: e.at, ExpiresAt: e.at.Add(codeLife), InfoType: "authorized",
	})
	if err != nil || n.gone() {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	e.acked = true
	return nil
}

// restore puts the store back to the backup under the running gateway. What came since may be lost with the process.
func (w *model) restore() {
	if w.backup == nil {
		return
	}
	w.store.restore(w.backup)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.acked = time.Time{}
	clear(w.revoked)
	for _, e := range w.events {
		e.acked = false
	}
}

// end lets all troubles pass, and looks whether everything is whole again.
func (w *model) end() {
	w.going.Wait()
	w.fault("store well")
	w.fault("WeChat well")
	time.Sleep(2 * time.Minute)
	w.checkTicket()
	w.pushTicket(w.wx.newTicket())
	time.Sleep(time.Second)
	for _, e := range w.events {
		if e.acked {
			continue
		}
		if err := w.deliver(w.node, e); err != nil {
			w.wrong("an event of %s is not taken by a gateway whose store works: %v", e.key.owner(), err)
		}
	}
	time.Sleep(10 * time.Minute)
	if n := w.node.Unsaved(); n != 0 {
		w.wrong("%d records are not written although the store works", n)
	}
	w.inspect(true)
	w.node.crash() // and all that counts is in the store
	w.start()
	w.checkTicket()
	w.inspect(false)
	time.Sleep(5 * time.Minute) // a store that was put back may have intents of before
	if names, err := w.store.MemStore.List(context.Background(), intentFolder); err != nil || len(names) != 0 {
		w.wrong("%d intents are left (%v)", len(names), err)
	}
	w.node.stop()
	w.going.Wait()
	time.Sleep(2 * time.Minute) // until what died is gone
}

func (w *model) checkTicket() {
	ctx, cancel := modelContext()
	defer cancel()
	w.mu.Lock()
	acked := w.acked
	w.mu.Unlock()
	if acked.IsZero() || time.Since(acked) > ticketLife-time.Minute {
		return
	}
	ticket, err := w.node.Ticket(ctx, testPlatform)
	if err != nil || ticket.CreatedAt.Before(fromUnix(acked.Unix())) {
		w.wrong("a ticket that was acknowledged is lost: %v", err)
	}
}

// inspect uses every account. Renewing shows that the refresh token works.
func (w *model) inspect(renew bool) {
	ctx := context.Background()
	for i, k := range modelKeys {
		err := w.use(w.node, k)
		if renew && err == nil && k.Kind != KindAccount {
			_, err = w.node.renew(ctx, k, secret.String{})
		}
		switch {
		case i < modelAuthorizers:
			w.inspectAuthorizer(k, err)
		case err != nil && k.Kind == KindComponent, err != nil && !w.rationed(k):
			w.wrong("%s has no token: %v", k.owner(), err)
		}
	}
}

// rationed: WeChat forces 20 new tokens of an account a day.
func (w *model) rationed(k Key) bool {
	w.wx.mu.Lock()
	defer w.wx.mu.Unlock()
	return len(w.wx.holder(k).forced) >= 15
}

func (w *model) inspectAuthorizer(k Key, err error) {
	works := w.wx.whole(k.AppID)
	w.wx.mu.Lock()
	authorized := w.wx.holder(k).authorized
	var left bool
	for value, c := range w.wx.codes {
		last := w.events[len(w.events)-1]
		for _, e := range w.events {
			if e.key == k && !e.code.IsZero() {
				last = e
			}
		}
		left = left || c.appid == k.AppID && !c.used && time.Now().Before(c.end) && last.code.Reveal() == value
	}
	w.wx.mu.Unlock()
	switch {
	case !authorized && !errors.Is(err, ErrNotAuthorized):
		w.wrong("%s is not authorized, and the gateway says: %v", k.AppID, err)
	case authorized && left:
		w.wrong("%s: its last code was accepted, lives, and is not exchanged", k.AppID)
	case works && err != nil:
		w.wrong("%s does not work: %v", k.AppID, err)
	}
}
