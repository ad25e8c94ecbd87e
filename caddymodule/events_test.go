package caddymodule

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

func init() { caddy.RegisterModule(new(eventWatch)) }

// eventWatch is a handler of events that passes them on to the test.
type eventWatch struct {
	Generation int `json:"generation"`
}

// heardEvent is an event as a handler got it.
type heardEvent struct {
	generation int
	name       string
	origin     string
	data       map[string]any
}

var (
	heardEvents = make(chan heardEvent, 100)
	holdEvents  atomic.Pointer[chan struct{}] // handlers wait until it is closed
)

func (*eventWatch) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "events.handlers.wechat_test", New: func() caddy.Module { return new(eventWatch) }}
}

func (e *eventWatch) Handle(ctx context.Context, event caddy.Event) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	<-*holdEvents.Load()
	heardEvents <- heardEvent{e.Generation, event.Name(), string(event.Origin().CaddyModule().ID), event.Data}
	return nil
}

var _ caddyevents.Handler = (*eventWatch)(nil)

// loadEvents has Caddy load a configuration whose handler hears the gateway's events, and returns the app.
func loadEvents(t *testing.T, root string, generation int) *App {
	t.Helper()
	config, _ := json.Marshal(map[string]any{
		"admin":   map[string]any{"disabled": true, "config": map[string]any{"persist": false}},
		"storage": map[string]any{"module": "file_system", "root": root},
		"apps": map[string]any{
			"wechat": json.RawMessage(testConfig("")),
			"events": map[string]any{"subscriptions": []any{map[string]any{
				"handlers": []any{map[string]any{"handler": "wechat_test", "generation": generation}},
				"events":   []string{eventTicketReceived, eventAuthorized, eventUnauthorized, eventTokenFailed, eventRogueRefresh, eventReleaseCheck},
			}}},
		},
	})
	provisioning.Lock()
	defer provisioning.Unlock()
	if err := caddy.Load(config, true); err != nil {
		t.Fatal(err)
	}
	app, err := loadApp(caddy.ActiveContext())
	if err != nil {
		t.Fatal(err)
	}
	return app
}

func heard(t *testing.T, generation int, name string) heardEvent {
	t.Helper()
	for {
		select {
		case e := <-heardEvents:
			if e.name != name { // the gateway's own, such as a token that it cannot get
				continue
			}
			if e.generation != generation || e.origin != "wechat" {
				t.Errorf("%s was heard by configuration %d, want %d, from %s", name, e.generation, generation, e.origin)
			}
			return e
		case <-time.After(20 * time.Second):
			t.Fatalf("%s was not heard", name)
		}
	}
}

// Events go to the handlers of the configuration that is in force, also from what an earlier one began, and who emits
// them does not wait for a handler.
func TestEventsOverAReload(t *testing.T) {
	held := make(chan struct{})
	holdEvents.Store(&held)
	root := filepath.Join(t.TempDir(), "storage")
	first := loadEvents(t, root, 1)
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
	})
	push := func(app *App, i int) {
		t.Helper()
		began := time.Now()
		ticket := tokens.Ticket{Value: secret.New(fmt.Sprint("ticket@@@hidden", i)), CreatedAt: time.Now().Add(time.Duration(i) * time.Second)}
		if err := app.manager().PutTicket(t.Context(), platformID, ticket); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("a ticket took %s while a handler was busy", took)
		}
	}
	push(first, 1) // its handler is stuck until
	close(held)
	if e := heard(t, 1, eventTicketReceived); e.data["platform"] != platformID || strings.Contains(fmt.Sprint(e.data), "hidden") {
		t.Errorf("data %v", e.data)
	}
	second := loadEvents(t, root, 2)
	if first.shared != second.shared {
		t.Fatal("the reload split the state")
	}
	push(first, 2) // a request of the former configuration
	heard(t, 2, eventTicketReceived)
	w := &watcher{second.shared.health, second.shared}
	k := tokens.AuthorizerKey(platformID, authorizerID)
	w.Happened(tokens.TokenFailed, k, fmt.Errorf("renew: %w", &tokens.APIError{Code: 61023, Msg: "hidden", API: "/x"}))
	for {
		e := heard(t, 2, eventTokenFailed)
		if e.data["appid"] != authorizerID { // the gateway's own
			continue
		}
		if e.data["errcode"] != int64(61023) || e.data["kind"] != "authorizer" || strings.Contains(fmt.Sprint(e.data), "hidden") {
			t.Errorf("data %v", e.data)
		}
		break
	}
	for what, name := range map[tokens.Happening]string{tokens.Authorized: eventAuthorized, tokens.Unauthorized: eventUnauthorized, tokens.TokenRogue: eventRogueRefresh} {
		w.Happened(what, k, nil)
		if e := heard(t, 2, name); e.data["appid"] != authorizerID || e.data["platform"] != platformID {
			t.Errorf("%s: %v", name, e.data)
		}
	}
}

// A queue that is full drops and counts, and never waits.
func TestEventsAreDropped(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	dropped := 0
	q := newEventQueue(ctx, func() { dropped++ })
	q.emit(happening{name: eventAuthorized}) // nobody is there yet
	q.current.Store(new(emitter))
	q.begin.Do(func() { close(q.done) }) // nobody reads
	for range maxEventsWaiting + 3 {
		q.emit(happening{name: eventAuthorized})
	}
	if dropped != 3 {
		t.Errorf("%d dropped", dropped)
	}
	cancel()
	q.emit(happening{name: eventAuthorized})
	if dropped != 3 || !errors.Is(ctx.Err(), context.Canceled) {
		t.Error("emitted after the end")
	}
	q.close(time.Second)
}
