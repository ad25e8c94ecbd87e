package caddymodule

import (
	"errors"
	"strings"
	"time"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// enter puts what became of a call into its entry.
func (c *apiCall) enter(e *Entry) {
	e.Status, e.ErrCode, e.RID, e.Reason = c.status, c.errcode, c.rid, c.reason
	e.Platform, e.wechats = c.key.Platform, true
	e.known = c.key.Kind != "" || len(c.extra) > 0
}

// feedCall enters an app's call. Outcome is the metric's.
func (a *API) feedCall(req *apiRequest, outcome string) {
	e := &req.entry
	e.Kind, e.Time, e.took = feedCall, req.started, time.Since(req.started)
	e.AppID, e.Client = req.appid, req.clientName()
	if req.path != "" { // it is a string of its own, and short
		e.What = req.loggedPath()
	}
	switch outcome {
	case outcomeError:
		if e.Outcome = outcomeRefused; e.ErrCode == 0 {
			e.Outcome = outcomeFailed
		}
	case outcomeUnavailable, outcomeUnreachable:
		e.Outcome = outcomeFailed
	default:
		e.Outcome = outcome
	}
	e.stranger = req.client == nil
	e.known = e.known && !e.stranger
	if e.Platform != "" { // the key's may be part of an opaque token
		if p := a.app.platform(e.Platform); p != nil {
			e.Platform = p.AppID
		} else {
			e.Platform = ""
		}
	}
	if len(e.Reason) > maxFeedText {
		e.Reason = strings.ToValidUTF8(e.Reason[:maxFeedText], "")
	}
	a.app.shared.feed.add(e)
	traceEntry(req.span, e)
}

// feedStep enters a step of a login or of an authorization. Failure is nil if it went well.
func (a *App) feedStep(kind, step string, started time.Time, appid, platform, result string, failure *oauthFailure) {
	e := Entry{Kind: kind, Time: started, took: time.Since(started), AppID: appid, What: step, Outcome: result}
	if p := a.platform(platform); p != nil { // what came may be part of the request's line, with the code in it
		e.Platform = p.AppID
	}
	if failure != nil {
		e.Outcome, e.stranger = outcomeRefused, true
		e.Status, e.Reason = failure.page.status, failure.reason
		if failure.cause != nil && !failure.byVisitor() { // WeChat's, or the store's: no stranger's doing
			e.stranger = false
			if failure.result == "unavailable" {
				e.Outcome = outcomeFailed
			}
		}
		e.blame(failure.cause)
	}
	a.shared.feed.add(&e)
}

// blame puts WeChat's errcode and request id into an entry, if the error is an answer of WeChat's.
func (e *Entry) blame(err error) {
	if api := apiErrorOf(err); api != nil {
		e.ErrCode, e.RID, e.wechats = api.Code, strings.Clone(api.RID), true
	}
}

// apiErrorOf is WeChat's answer in an error, or nil.
func apiErrorOf(err error) *tokens.APIError {
	api, _ := errors.AsType[*tokens.APIError](err)
	return api
}

// feedHappening enters what went wrong with the gateway's own calls, and what became of authorizations.
func (s *shared) feedHappening(what tokens.Happening, k tokens.Key, err error) {
	e := Entry{AppID: k.AppID, Platform: k.Platform, Outcome: outcomeOK, known: true}
	if e.AppID == "" {
		e.AppID = k.Platform
	}
	switch what {
	case tokens.Authorized:
		e.Kind, e.What = feedAuthorization, "authorized"
	case tokens.Unauthorized:
		e.Kind, e.What = feedAuthorization, "unauthorized"
	case tokens.TokenFailed, tokens.CallFailed:
		e.Kind, e.Outcome, e.Reason = feedCall, outcomeRefused, "a call of the gateway's own"
		if what == tokens.TokenFailed {
			e.Reason = "the gateway's own: it could not renew the " + string(k.Kind) + " token"
		}
		if api := apiErrorOf(err); api != nil {
			e.What = api.API
		} else {
			e.What, e.Outcome = "token", outcomeFailed
		}
		e.blame(err)
	case tokens.TokenRogue:
		e.Kind, e.Outcome, e.What = feedCall, outcomeFailed, "token"
		e.Reason = "another system is refreshing the " + string(k.Kind) + " token"
	default:
		return
	}
	s.feed.add(&e)
}
