package caddymodule

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// Names of the events that are emitted through Caddy's events app. See App for what they carry.
const (
	eventTicketReceived = "wechat_ticket_received"
	eventTicketOverdue  = "wechat_ticket_overdue"
	eventAuthorized     = "wechat_authorized"
	eventUnauthorized   = "wechat_unauthorized"
	eventTokenRefreshed = "wechat_token_refreshed"
	eventTokenFailed    = "wechat_token_failed"
	eventRogueRefresh   = "wechat_rogue_refresh"
	eventReleaseCheck   = "wechat_release_check"
)

// eventNames are those of what a manager reports.
var eventNames = map[tokens.Happening]string{
	tokens.TicketReceived: eventTicketReceived, tokens.TicketOverdue: eventTicketOverdue,
	tokens.Authorized: eventAuthorized, tokens.Unauthorized: eventUnauthorized,
	tokens.TokenRenewed: eventTokenRefreshed, tokens.TokenFailed: eventTokenFailed, tokens.TokenRogue: eventRogueRefresh,
}

// Limits of events.
const (
	maxEventsWaiting = 1024             // for subscribers; what comes then is dropped, counted and said
	eventsReadyWait  = 10 * time.Second // for a configuration that begins: its subscribers are there once all its apps have started
	eventsReadyLook  = 20 * time.Millisecond
)

// happening is an event on its way to subscribers.
type happening struct {
	name                  string
	platform, appid, kind string
	errcode               int64
	reason                string
}

// data is what subscribers get. It holds no token, code or text of WeChat's.
func (h *happening) data() map[string]any {
	data := make(map[string]any, 5)
	for name, value := range map[string]string{"platform": h.platform, "appid": h.appid, "kind": h.kind, "reason": h.reason} {
		if value != "" {
			data[name] = value
		}
	}
	if h.errcode != 0 {
		data["errcode"] = h.errcode
	}
	return data
}

// emitter is a configuration's way to its events app.
type emitter struct {
	ctx   caddy.Context
	app   *caddyevents.App
	ready atomic.Bool
}

// isReady reports whether all apps of the configuration have started, the events app among them.
func (e *emitter) isReady() bool {
	if !e.ready.Load() && caddy.ActiveContext().Context == e.ctx.Context {
		e.ready.Store(true)
	}
	return e.ready.Load()
}

// eventQueue hands events to the subscribers of the configuration in force, one after the other, on a goroutine of its own:
// Caddy has who emits wait for the subscribers, and swallows what is emitted with the context of a former configuration.
type eventQueue struct {
	current atomic.Pointer[emitter]
	waiting chan *happening // not the things themselves: the collector looks into the places, taken or not
	dropped func()
	full    damper

	begin sync.Once
	ctx   context.Context
	done  chan struct{}
}

// newEventQueue makes a queue that works until ctx ends.
func newEventQueue(ctx context.Context, dropped func()) *eventQueue {
	return &eventQueue{waiting: make(chan *happening, maxEventsWaiting), dropped: dropped, ctx: ctx, done: make(chan struct{})}
}

// emit has subscribers told. It never waits.
func (q *eventQueue) emit(h happening) {
	if q.current.Load() == nil || q.ctx.Err() != nil {
		return
	}
	q.begin.Do(func() { go q.run() })
	select {
	case q.waiting <- &h:
	default:
		q.dropped()
		if ok, missed := q.full.allow(); ok {
			caddy.Log().Named("wechat").Warn("events are dropped: a handler that is subscribed to them is too slow",
				zap.String("event", h.name), zap.Int("not_logged", missed))
		}
	}
}

// close waits, no longer than limit, until the handler that is being called returns. The queue's context has ended.
func (q *eventQueue) close(limit time.Duration) {
	q.begin.Do(func() { close(q.done) }) // it never ran
	select {
	case <-q.done:
	case <-time.After(limit):
	}
}

func (q *eventQueue) run() {
	defer close(q.done)
	for {
		select {
		case <-q.ctx.Done():
			return
		case h := <-q.waiting:
			q.deliver(h)
		}
	}
}

// deliver emits an event in the configuration that is in force once its subscribers are there.
func (q *eventQueue) deliver(h *happening) {
	defer func() {
		if v := recover(); v != nil { // a handler's bug
			caddy.Log().Named("wechat").Error("a handler of an event panicked", zap.String("event", h.name), zap.Stack("stack"))
		}
	}()
	limit := time.NewTimer(eventsReadyWait)
	defer limit.Stop()
	look := time.NewTicker(eventsReadyLook)
	defer look.Stop()
	for {
		e := q.current.Load()
		if e == nil {
			return
		}
		if e.isReady() {
			e.emit(h)
			return
		}
		select {
		case <-q.ctx.Done():
			return
		case <-look.C:
		case <-limit.C: // a configuration that was not loaded by Caddy itself
			e.ready.Store(true)
		}
	}
}

func (e *emitter) emit(h *happening) {
	if e.app.ShouldEmit(h.name) {
		e.app.Emit(e.ctx, h.name, h.data())
	}
}

// watcher hears what the manager reports, for metrics, the feed and events.
type watcher struct {
	*health
	shared *shared
}

// Happened implements tokens.Observer.
func (w *watcher) Happened(what tokens.Happening, k tokens.Key, err error) {
	w.shared.feedHappening(what, k, err)
	name, ok := eventNames[what]
	if !ok {
		return
	}
	h := happening{name: name, platform: k.Platform, appid: k.AppID, kind: string(k.Kind)}
	if err != nil && what == tokens.TokenFailed {
		h.reason = "WeChat was not reached"
		if api := apiErrorOf(err); api != nil {
			h.errcode, h.reason = api.Code, "WeChat refused"
		}
	}
	w.shared.events.emit(h)
}

var _ tokens.Observer = (*watcher)(nil)
