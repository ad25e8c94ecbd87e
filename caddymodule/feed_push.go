package caddymodule

import (
	"context"
	"errors"
	"strconv"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// What an entry is called that is no push: WeChat's check of a URL, and its acceptance check.
const (
	whatHandshake    = "URL check"
	whatReleaseCheck = "release check"
)

// nameMessage says in a push's entry which message it is.
func (a *App) nameMessage(p *push, f *facts) {
	e := &p.entry
	e.AppID, e.Platform, e.known = f.appid, f.platform, true
	e.What = a.shared.feed.words.name(f.msgType, f.event)
}

// nameEvent says in a push's entry which authorization event it is.
func (a *App) nameEvent(p *push) {
	e, f := &p.entry, &p.fields
	e.Kind, e.Platform, e.What = feedEvent, p.platform.AppID, a.shared.feed.words.name(string(f.InfoType), "")
	e.AppID = string(f.AuthorizerAppID)
	if e.AppID == "" {
		e.AppID = string(f.NotifyAppID)
	}
	if !isAppID(e.AppID) {
		e.AppID = ""
	}
}

// feedPush enters a push that was accepted. Kind is what it is unless it turned out to be something else.
func (a *App) feedPush(ctx context.Context, p *push, kind, outcome string) {
	e := &p.entry
	switch {
	case e.Outcome != "": // of the backend
	case p.slow:
		e.Outcome = outcomeSlow
	default:
		e.Outcome = outcome
	}
	if e.Kind == "" {
		e.Kind = kind
	}
	if p.codec == nil {
		e.What = whatHandshake
	}
	e.took = p.answeredAt().Sub(e.Time)
	traceEntry(spanOf(ctx), e)
	a.shared.feed.add(e)
}

// feedRefused enters a push that was refused.
func (a *App) feedRefused(ctx context.Context, endpoint string, p *push, why *refusal) {
	e := &p.entry
	if e.Kind == "" {
		e.Kind = feedPush
		if endpoint == "event" {
			e.Kind = feedEvent
		}
	}
	e.Outcome = outcomeRefused
	if why == errNotKept {
		e.Outcome = outcomeFailed
	}
	e.known, e.stranger = false, p.codec == nil
	if p.platform != nil {
		e.Platform = p.platform.AppID
	}
	e.Status, e.Reason, e.took = why.status, why.reason, time.Since(e.Time)
	traceEntry(spanOf(ctx), e)
	a.shared.feed.add(e)
}

// backendReason is why a backend's answer does not serve, without anything of the answer.
func backendReason(outcome string, why error) string {
	if why == nil {
		return outcome
	}
	if outcome == outcomeLost {
		if dial, ok := errors.AsType[reverseproxy.DialError](why); ok {
			return "no backend could be reached: " + safeReason(dial)
		}
		if notReached(why) {
			return "no backend is available"
		}
	}
	if he, ok := errors.AsType[caddyhttp.HandlerError](why); ok {
		return "the backend's part of the route ended with HTTP " + strconv.Itoa(he.StatusCode)
	}
	return safeReason(why)
}
