package tokens

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// brokenImport is a way of what a gateway has into another store.
type brokenImport struct {
	running bool // a gateway is on the store, which does all that Redis does
	list    bool // of refresh tokens, in the place of an archive
}

// gateway is a gateway on a store, not in use yet.
func (r *rig) gateway(t *testing.T, s Store, into *faultStore, events *receiver) *brokenOff {
	t.Helper()
	g := &brokenOff{rig: &rig{Manager: NewManager(), wx: r.wx, store: into, log: &logBuffer{}}, breaking: &breakingStore{left: -1}, events: events}
	env := *r.env
	env.Store, env.Sealer, env.RosterEvery, env.Forward = s, moverFor(t, s, 9).env.Sealer, rosterEvery, g.forward
	env.Log = slog.New(slog.NewTextHandler(g.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	g.env = &env
	t.Cleanup(func() {
		g.Close()
		g.noSecretLogged(t)
	})
	return g
}

// inBrokenImport has all that a gateway left come into another store, broken off after so many operations and begun again.
func inBrokenImport(t *testing.T, op brokenImport, how breakage, after int) (operations int) {
	synctest.Test(t, func(t *testing.T) {
		old := lived(t)
		opaque, err := old.IssueOpaque(t.Context(), OpaqueClaims{Client: "crm", AppID: testAuthorizer, ExpiresAt: time.Now().Add(24 * time.Hour)})
		if err != nil {
			t.Fatal(err)
		}
		old.refuseExchanges()
		code := old.newCode(moveOther)
		in := old.push(code)
		in.AppID, in.Platform = moveOther, testPlatform2
		if !op.list {
			if err := old.Accept(t.Context(), in); err != nil {
				t.Fatal(err)
			}
		}
		old.Close()
		old.rotating()
		records, _ := exported(t, moverFor(t, old.store, 7))
		list := "platform,appid,refresh_token\n"
		old.wx.set(func(f *fakeWeChat) {
			list += fmt.Sprintf("%s,%s,%s\n%s,%s,%s\n", testPlatform, testAuthorizer, f.refresh[testAuthorizer], testPlatform2, moveOther, f.refresh[moveOther])
		})

		into := newFaultStore()
		h, f := &hub{ear: make(map[*busStore]Listener)}, new(fences)
		var way, ways Store = into, into
		breaking := &breakingStore{records: into.MemStore, left: -1}
		way = breaking
		if op.running {
			node := newBreakingNode(into, h, f)
			way, breaking, ways = node, node.breakingStore, newBreakingNode(into, h, f)
		}
		events := new(receiver)
		g := old.gateway(t, ways, into, events)
		if op.running {
			g.Use(g.env)
			synctest.Wait()
			if op.list {
				g.ticket(t, testPlatform)
				g.ticket(t, testPlatform2)
			}
		}
		breaking.arm(how, after)
		for attempt := range 10 {
			mv := moverFor(t, way, 9)
			if op.list {
				_, err = mv.ImportCSV(t.Context(), strings.NewReader(list), false)
			} else {
				_, err = mv.Import(t.Context(), inTurn(records), false)
			}
			if attempt == 0 {
				operations = breaking.operations()
			}
			if breaking.killed() {
				breaking.arm(breaks, -1)
			}
			if err == nil {
				break
			}
			if op.running {
				_, _ = g.Get(t.Context(), testAuthKey)
				_, _ = g.Renew(t.Context(), testAuthKey, secret.String{})
			}
			time.Sleep(5 * time.Second)
		}
		if err != nil {
			t.Errorf("it is refused: %v", err)
		}
		time.Sleep(time.Second)
		if !op.running {
			g.Use(g.env)
		}
		g.wx.set(func(f *fakeWeChat) { f.hook = nil })
		g.moved(t, op, opaque)
		g.revive()
		g.moved(t, op, opaque)
		if t.Failed() {
			t.Log(g.log.String())
		}
	})
	return operations
}

// moved checks that all came.
func (b *brokenOff) moved(t *testing.T, op brokenImport, opaque secret.String) {
	t.Helper()
	for end := time.Now().Add(70 * time.Minute); time.Now().Before(end); time.Sleep(5 * time.Minute) {
		b.UserName(testPlatform, testAuthorizer)
		if op.list {
			b.ticket(t, testPlatform)
			b.ticket(t, testPlatform2)
		}
	}
	synctest.Wait()
	ctx := t.Context()
	for _, k := range []Key{testAuthKey, AuthorizerKey(testPlatform2, moveOther), ComponentKey(testPlatform), AccountKey(testAccount)} {
		token, err := b.Get(ctx, k)
		if err != nil {
			t.Errorf("%v: %v", k, err)
			continue
		}
		b.wx.set(func(f *fakeWeChat) {
			if !f.live(token.Value.Reveal()) {
				t.Errorf("%v: the token is dead", k)
			}
			if k.Kind != KindAuthorizer {
				return
			}
			if rec := b.stored(t, k); rec.RefreshToken.Reveal() != f.refresh[k.AppID] {
				t.Errorf("%v: the store has another refresh token than WeChat", k)
			}
		})
		if _, err := b.Renew(ctx, k, secret.String{}); err != nil {
			t.Errorf("%v: renewal: %v", k, err)
		}
	}
	for _, k := range []Key{testAuthKey, AuthorizerKey(testPlatform2, moveOther)} { // the fake's list is that of both platforms
		page, err := b.Authorizers(ctx, AuthorizerQuery{Platform: k.Platform, Limit: MaxAuthorizers})
		if err != nil || !slices.ContainsFunc(page.Authorizers, func(a ListedAuthorizer) bool { return a.AppID == k.AppID && a.State == StateAuthorized }) {
			t.Errorf("the list: %+v, %v", page.Authorizers, err)
		}
	}
	if n := b.intents(t); n != 0 || b.Unsaved() != 0 || b.Waiting() != 0 || len(b.Orphans(testPlatform)) != 0 {
		t.Errorf("%d codes are still to be exchanged, %d unsaved, %d waiting, orphans: %v", n, b.Unsaved(), b.Waiting(), b.Orphans(testPlatform))
	}
	if name, known := b.UserName(testPlatform, testAuthorizer); name != testUserName || !known {
		t.Errorf("the gh_ id: %q", name)
	}
	if p, appid, err := b.ByUserName(ctx, testUserName); p != testPlatform || appid != testAuthorizer {
		t.Errorf("by its gh_ id: %q %q %v", p, appid, err)
	}
	if op.list {
		return
	}
	if _, err := b.OpenOpaque(ctx, opaque.Reveal()); err != nil {
		t.Errorf("an opaque token: %v", err)
	}
	if content, found, err := b.VerifyFile(ctx, "MP_verify_a1B2c3D4e5F6g7H8.txt"); !found || err != nil || string(content) != "a1B2c3D4e5F6g7H8" {
		t.Errorf("a verification file: %q %v %v", content, found, err)
	}
	if n := len(b.events.got); n == 0 || b.kept(t) != 0 {
		t.Errorf("%d events came, %d are kept", n, b.kept(t))
	}
}

// What comes into a store by an archive or a list is all there once the import is done, wherever an earlier one was broken off.
func TestBrokenImport(t *testing.T) {
	t.Parallel()
	for name, op := range map[string]brokenImport{
		"an archive":                                 {},
		"an archive, while a gateway is running":     {running: true},
		"a list of tokens":                           {list: true},
		"a list of tokens, and a gateway is running": {running: true, list: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			hows := []breakage{breaksDown, breaks, breaksAfter}
			if op.running {
				hows = append(hows, breaksLate, stalls)
			}
			breakAt(t, 5, func(t *testing.T, how breakage, after int) int { return inBrokenImport(t, op, how, after) }, hows...)
		})
	}
}

// inBrokenTakeOver has a gateway go over from one store to another, of which one goes wrong after so many operations.
func inBrokenTakeOver(t *testing.T, newStore bool, how breakage, after int) (operations int) {
	synctest.Test(t, func(t *testing.T) {
		from := newBrokenOff(t)
		from.known(t)
		from.authorize(t, testPlatform, moveOther)
		records, _ := exported(t, moverFor(t, from.store, 7)) // of a while ago
		events := from.events
		into := newFaultStore()
		imported(t, moverFor(t, into, 9), records, false)
		way := &breakingStore{records: into.MemStore, left: -1}
		next := from.gateway(t, way, into, events)
		next.breaking = way
		from.wx.set(func(*fakeWeChat) {
			from.wechat = func(path string, _ map[string]any) (string, error) {
				if path == pathQueryAuth {
					return "", errors.New("connection refused")
				}
				return "", nil
			}
		})
		time.Sleep(time.Minute)
		if err := from.Accept(t.Context(), from.push(from.newCode(testAuthorizer))); err != nil {
			t.Fatal(err)
		}
		revokedAt := time.Now()
		if err := from.Revoke(t.Context(), testPlatform, moveOther, revokedAt); err != nil {
			t.Fatal(err)
		}
		from.wx.set(func(f *fakeWeChat) { delete(f.refresh, moveOther) })
		events.answer(ErrNotForwarded)
		id, err := from.KeepForward(t.Context(), testForward)
		if err != nil {
			t.Fatal(err)
		}
		from.HandOnLater(id)
		time.Sleep(time.Second)
		newest := Ticket{secret.New("ticket@@@newest"), time.Now()}
		if err := from.PutTicket(t.Context(), testPlatform, newest); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()

		broken := from.breaking
		if newStore {
			broken = way
		}
		broken.arm(how, after)
		next.TakeTickets(from.Manager, next.env)
		next.Use(next.env)
		from.Close()
		next.TakeOver(from.Manager)
		time.Sleep(time.Minute)
		synctest.Wait()
		operations = broken.operations()
		from.wx.set(func(*fakeWeChat) { from.wechat = nil })
		events.answer(nil)
		time.Sleep(10 * time.Minute)
		if got, err := next.Ticket(t.Context(), testPlatform); err != nil || !got.same(newest) {
			t.Errorf("the ticket: %v %v", got.CreatedAt, err)
		}
		if next.live(t, time.Hour); next.Unsaved() != 0 || next.Waiting() != 0 || next.intents(t) != 0 || next.kept(t) != 0 {
			t.Errorf("%d unsaved, %d waiting, %d codes, %d events", next.Unsaved(), next.Waiting(), next.intents(t), next.kept(t))
		}
		if from.intents(t) != 0 || from.kept(t) != 0 || len(events.got) == 0 {
			t.Errorf("left behind: %d codes, %d events; %d came", from.intents(t), from.kept(t), len(events.got))
		}
		for range 2 {
			if _, err := next.Get(t.Context(), testAuthKey); err != nil {
				t.Errorf("token: %v", err)
			}
			if _, err := next.Renew(t.Context(), testAuthKey, secret.String{}); err != nil {
				t.Errorf("renewal: %v", err)
			}
			if _, err := next.Get(t.Context(), AuthorizerKey(testPlatform, moveOther)); !errors.Is(err, ErrNotAuthorized) {
				t.Errorf("who has revoked: %v", err)
			}
			if p, err := next.PlatformOf(t.Context(), moveOther); !errors.Is(err, ErrNotAuthorized) {
				t.Errorf("platform of who has revoked: %q %v", p, err)
			}
			next.revive()
			next.live(t, time.Minute)
		}
		if t.Failed() {
			t.Log(from.log.String())
			t.Log(next.log.String())
		}
	})
	return operations
}

// What a gateway has accepted goes over to the store that takes the place of its own.
func TestBrokenTakeOver(t *testing.T) {
	t.Parallel()
	for name, newStore := range map[string]bool{"the store of before": false, "the new store": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			breakAt(t, 0, func(t *testing.T, how breakage, after int) int { return inBrokenTakeOver(t, newStore, how, after) }, breaks, breaksAfter)
		})
	}
}
