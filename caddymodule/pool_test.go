package caddymodule

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// A reload that changes the store ends the state of before. What was taken in under it goes on: its tokens are the new state's, and what was
// begun in the background is not cut off.
func TestAnotherStore(t *testing.T) {
	held := make(chan struct{})
	close(held)
	holdEvents.Store(&held)
	folder := t.TempDir()
	before := loadEvents(t, filepath.Join(folder, "before"), 1)
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
	})
	release, ended := make(chan struct{}), make(chan error, 2)
	work := func(ctx context.Context) { <-release; ended <- ctx.Err() }
	before.background(work)
	calls, replies := before.calls(), before.shared.metrics.forgotten

	now := loadEvents(t, filepath.Join(folder, "now"), 2)
	if now.shared == before.shared {
		t.Fatal("the two stores share their state")
	}
	if before.manager() != now.shared.manager || before.users() != now.users() || before.authorizations() != now.authorizations() || before.logins() != now.logins() {
		t.Error("what was taken in before goes to a state that has ended")
	}
	if now.calls() != calls || now.shared.bodies != before.shared.bodies || now.shared.metrics.forgotten != replies {
		t.Error("pushes of before are not known")
	}
	before.background(work)
	now = loadEvents(t, filepath.Join(folder, "before"), 3) // another state again
	if before.manager() != now.shared.manager || now.calls() != calls {
		t.Error("two reloads on, what was taken in before goes to a state that has ended")
	}

	// While the new configuration is in force and the old one serves on, tokens are the new one's, and if it is refused after all, the old one's.
	refused, _, err := provisionAt(filepath.Join(folder, "refused"), testConfig(""))
	if err != nil {
		t.Fatal(err)
	}
	if now.manager() != now.shared.manager {
		t.Error("a configuration that is not in force yet has taken over")
	}
	if refused.manager() != refused.shared.manager || now.manager() != refused.shared.manager || before.manager() != refused.shared.manager {
		t.Error("two states in force renew tokens")
	}
	if err := refused.Cleanup(); err != nil {
		t.Fatal(err)
	}
	if now.manager() != now.shared.manager || before.manager() != now.shared.manager || refused.manager() != now.shared.manager {
		t.Error("a configuration that was refused stays in force")
	}
	close(release)
	for range 2 {
		if err := <-ended; err != nil {
			t.Errorf("work of before was cut off: %v", err)
		}
	}
	if n := now.shared.holders.Load(); n != 1 {
		t.Errorf("%d states hold what is known of pushes", n)
	}
}

// What is remembered of pushes has the limits of the configuration in force, also where one that is refused after all was in force for a
// moment, with the same store or another one.
func TestLimitsOfPushesInForce(t *testing.T) {
	folder := t.TempDir()
	now := loadEvents(t, filepath.Join(folder, "now"), 1)
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
	})
	limits := func() pushLimits {
		calls := now.calls()
		calls.mu.Lock()
		defer calls.mu.Unlock()
		return calls.limits
	}
	defaults := pushLimits{defaultMaxAnswers, defaultMaxIdentities}
	if got := limits(); got != defaults {
		t.Fatalf("limits without a word: %+v", got)
	}
	for _, store := range []string{"now", "other"} {
		refused, _, err := provisionAt(filepath.Join(folder, store), strings.Replace(testConfig(""), "{", `{"max_answers": 2097152, "max_identities": 20000,`, 1))
		if err != nil {
			t.Fatal(err)
		}
		if got := limits(); got != defaults {
			t.Errorf("store %s: limits of a configuration that is not in force yet: %+v", store, got)
		}
		refused.inForce()
		if got := limits(); got != (pushLimits{2 << 20, 20_000}) {
			t.Errorf("store %s: limits of a configuration in force: %+v", store, got)
		}
		if err := refused.Cleanup(); err != nil {
			t.Fatal(err)
		}
		if got := limits(); got != defaults {
			t.Errorf("store %s: limits after one was refused: %+v", store, got)
		}
	}
}

// A state that something else holds, such as a configuration that is only looked at, is there still when a reload comes back to its store.
func TestBackToAStateThatIsHeld(t *testing.T) {
	folder := t.TempDir()
	first := loadEvents(t, filepath.Join(folder, "first"), 1)
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
	})
	held, _, err := provisionAt(filepath.Join(folder, "first"), testConfig(""))
	if err != nil {
		t.Fatal(err)
	}
	if held.shared != first.shared {
		t.Fatal("two states of one store")
	}
	other := loadEvents(t, filepath.Join(folder, "other"), 2)
	back, _, err := provisionAt(filepath.Join(folder, "first"), testConfig("")) // and its first request comes before the other one has ended
	if err != nil {
		t.Fatal(err)
	}
	if back.shared != first.shared {
		t.Fatal("the state is another one")
	}
	goOnWith := func(state *shared) {
		t.Helper()
		found := make(chan bool, 1)
		go func() {
			found <- back.manager() == state.manager && other.manager() == state.manager && first.manager() == state.manager
		}()
		select {
		case ok := <-found:
			if !ok {
				t.Error("not all go on with the state in force")
			}
		case <-time.After(10 * time.Second):
			t.Fatal("the state in force is looked for without end")
		}
	}
	goOnWith(back.shared)
	if err := back.Cleanup(); err != nil {
		t.Fatal(err)
	}
	if other.manager() != other.shared.manager {
		t.Error("a configuration that was refused stays in force")
	}
	if err := held.Cleanup(); err != nil {
		t.Fatal(err)
	}
	goOnWith(other.shared)
}

// A reload to another store is refused because a site cannot be served, before or after it came in force, and Caddy goes on as before.
func TestAnotherStoreIsRefused(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close() //nolint:errcheck // a test's
	folder := t.TempDir()
	app := loadEvents(t, filepath.Join(folder, "in force"), 1)
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
	})
	for i := range 10 { // apps start in random order
		config, _ := json.Marshal(map[string]any{
			"admin":   map[string]any{"disabled": true, "config": map[string]any{"persist": false}},
			"storage": map[string]any{"module": "file_system", "root": filepath.Join(folder, fmt.Sprint(i))},
			"apps": map[string]any{
				"wechat": json.RawMessage(testConfig("")),
				"http":   map[string]any{"servers": map[string]any{"s": map[string]any{"listen": []string{taken.Addr().String()}}}},
			},
		})
		provisioning.Lock()
		err := caddy.Load(config, true)
		provisioning.Unlock()
		if err == nil {
			t.Fatal("it was not refused")
		}
		if app.manager() != app.shared.manager || app.shared.heir.Load() != nil || app.shared.holders.Load() != 1 {
			t.Fatal("what was refused is in force, or held")
		}
		if _, err := app.manager().Ticket(t.Context(), platformID); !errors.Is(err, tokens.ErrNoTicket) {
			t.Errorf("the manager in force: %v", err)
		}
	}
	if now := loadEvents(t, filepath.Join(folder, "0"), 2); app.manager() != now.shared.manager || now.shared.holders.Load() != 1 {
		t.Error("a reload after it does not take over")
	}
}

func init() { caddy.RegisterModule(new(lateApp)) }

// lateApp is an app that starts slowly after a site has had its first request, and may then refuse to.
type lateApp struct {
	Refuses bool `json:"refuses"`
	app     *App
}

func (*lateApp) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "wechat_late_test", New: func() caddy.Module { return new(lateApp) }}
}

func (l *lateApp) Provision(ctx caddy.Context) (err error) { l.app, err = loadApp(ctx); return err }

func (l *lateApp) Start() error {
	l.app.inForce()
	time.Sleep(500 * time.Millisecond)
	if l.Refuses {
		return errors.New("a port cannot be had")
	}
	return nil
}

func (*lateApp) Stop() error { return nil }

// A configuration with another store that is refused once it is in force has asked WeChat for nothing; one that stays reads WeChat's lists then.
func TestAnotherStoreWaitsForTheOtherApps(t *testing.T) {
	held := make(chan struct{})
	close(held)
	holdEvents.Store(&held)
	asked := make(chan string, 100)
	wechat := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- r.URL.Path
		w.WriteHeader(http.StatusServiceUnavailable)
	}))
	defer wechat.Close()
	folder := t.TempDir()
	app := loadEvents(t, filepath.Join(folder, "in force"), 1)
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
	})
	if err := app.manager().PutTicket(t.Context(), platformID, tokens.Ticket{Value: secret.New("ticket@@@1"), CreatedAt: time.Now()}); err != nil {
		t.Fatal(err)
	}
	heard(t, 1, eventTicketReceived) // or another test would
	load := func(refuses bool) error {
		config, _ := json.Marshal(map[string]any{
			"admin":   map[string]any{"disabled": true, "config": map[string]any{"persist": false}},
			"storage": map[string]any{"module": "file_system", "root": filepath.Join(folder, "other")},
			"apps":    map[string]any{"wechat": json.RawMessage(testConfig(wechat.URL)), "wechat_late_test": lateApp{Refuses: refuses}},
		})
		provisioning.Lock()
		defer provisioning.Unlock()
		return caddy.Load(config, true)
	}
	if err := load(true); err == nil {
		t.Fatal("it was not refused")
	}
	select {
	case path := <-asked:
		t.Errorf("the refused configuration asked for %s", path)
	default:
	}
	if err := load(false); err != nil {
		t.Fatal(err)
	}
	select {
	case <-asked:
	case <-time.After(10 * time.Second):
		t.Error("the configuration that stays asks for nothing")
	}
}

// A configuration with a new seal_key that is refused once it is in force has sealed nothing anew, which the one of before could not open; one
// that stays does.
func TestNewSealKeyWaitsForTheOtherApps(t *testing.T) {
	folder := t.TempDir()
	load := func(refuses bool, keys ...string) error {
		var wechat map[string]any
		if err := json.Unmarshal([]byte(testConfig("")), &wechat); err != nil {
			t.Fatal(err)
		}
		wechat["seal_keys"] = keys
		config, _ := json.Marshal(map[string]any{
			"admin":   map[string]any{"disabled": true, "config": map[string]any{"persist": false}},
			"storage": map[string]any{"module": "file_system", "root": folder},
			"apps":    map[string]any{"wechat": wechat, "wechat_late_test": lateApp{Refuses: refuses}},
		})
		provisioning.Lock()
		defer provisioning.Unlock()
		return caddy.Load(config, true)
	}
	before, after := strings.Repeat("a1", 32), strings.Repeat("b2", 32)
	if err := load(false, before); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
	})
	app := inForceNow()
	if err := app.manager().PutTicket(t.Context(), platformID, tokens.Ticket{Value: secret.New("ticket@@@1"), CreatedAt: time.Now()}); err != nil {
		t.Fatal(err)
	}
	name := "wechat/v1/ticket/" + platformID
	sealed, err := app.env.Store.Load(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	anew := func() bool {
		now, err := inForceNow().env.Store.Load(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		return !bytes.Equal(now, sealed)
	}
	if err := load(true, after, before); err == nil {
		t.Fatal("it was not refused")
	}
	if anew() {
		t.Error("the refused configuration has sealed a record with its key")
	}
	if err := load(false, after, before); err != nil {
		t.Fatal(err)
	}
	for start := time.Now(); !anew(); time.Sleep(20 * time.Millisecond) {
		if time.Since(start) > 20*time.Second {
			t.Fatal("the configuration that stays seals nothing anew")
		}
	}
}

// A process that ends cuts off the work that was begun, also under a store of before, and waits until that has told the store what is left of
// it; but no longer than it says.
func TestDrain(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct{ takes, want time.Duration }{
		"ends":  {endTimeout / 2, drainTimeout + endTimeout/2},
		"hangs": {time.Minute, drainTimeout + endTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				var states []*shared
				ended := make(chan int, 3)
				for i := range cap(ended) {
					s := new(shared)
					s.ctx, s.cancel = context.WithCancel(t.Context())
					s.background(time.Hour, func(ctx context.Context) {
						<-ctx.Done()
						time.Sleep(tt.takes)
						ended <- i
					})
					if i > 0 {
						states[i-1].drain(s)
					}
					states = append(states, s)
				}
				began := time.Now()
				states[2].drain(nil)
				synctest.Wait()
				if took := time.Since(began); took != tt.want {
					t.Errorf("it took %v, want %v", took, tt.want)
				}
				if n := len(ended); (n == cap(ended)) != (name == "ends") {
					t.Errorf("%d pieces of work have ended", n)
				}
				time.Sleep(tt.takes)
			})
		})
	}
}
