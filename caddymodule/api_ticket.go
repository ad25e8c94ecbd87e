package caddymodule

import (
	"encoding/json"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// Values of getticket's parameter type.
const (
	paramType     = "type"
	ticketJSAPI   = "jsapi"
	ticketCard    = "wx_card"
	ticketOpenSDK = "2" // of mobile apps: the gateway keeps none
)

// asksForKeptTicket reports whether a request for a ticket is one that the gateway answers. Only what no reader could
// take for a request for a ticket that it keeps goes to WeChat.
func (req *apiRequest) asksForKeptTicket() bool {
	kind, one := soleOf(paramValues(req.URL.RawQuery, paramType))
	return !one || kind != ticketOpenSDK || strings.Contains(req.URL.RawQuery, ";") || req.hasBody()
}

// serveJSTicket answers getticket with the ticket that the gateway keeps: WeChat gives few of them a day, and none is
// fetched for one app alone. The ticket signs pages or cards of the account, and does nothing else.
func (a *API) serveJSTicket(w http.ResponseWriter, req *apiRequest) error {
	ticket, refused := a.jsTicket(req)
	if refused != nil {
		return a.refuse(w, req, refused)
	}
	a.announce(req)
	a.count(req, outcomeOK)
	writeJSON(w, http.StatusOK, ticketAnswer(ticket, time.Now()))
	return nil
}

// jsTicket gets the ticket, for a client that may call the path for the account.
func (a *API) jsTicket(req *apiRequest) (tokens.Token, *apiRefusal) {
	none := tokens.Token{}
	switch req.Method {
	case http.MethodGet, http.MethodHead, http.MethodPost:
	default:
		return none, refuse(http.StatusOK, codeNeedGET, "method", "require GET method")
	}
	if _, refused := a.enter(req); refused != nil {
		return none, refused
	}
	if req.appid == "" {
		return none, missingAppID(req)
	}
	var js func(platform, appid string) tokens.Key
	switch kind, one := soleOf(paramValues(req.URL.RawQuery, paramType)); {
	case one && kind == ticketJSAPI:
		js = tokens.JSAPIKey
	case one && kind == ticketCard:
		js = tokens.CardKey
	default:
		return none, refuse(http.StatusOK, codeInvalidArgs, "type", "invalid args: want one type, jsapi or wx_card, in the query")
	}
	key, refused := a.target(req, useAccount)
	if refused != nil {
		return none, refused
	}
	ticket, err := lasting(a.app, func(m *tokens.Manager) (tokens.Token, error) {
		return m.GetLasting(req.Context(), js(key.Platform, key.AppID), tokens.JSTicketMargin)
	})
	if err != nil {
		return none, a.noToken(req, err)
	}
	return ticket, nil
}

// ticketAnswer is WeChat's answer to getticket, in one line, with the life that is left.
func ticketAnswer(ticket tokens.Token, now time.Time) []byte {
	value, _ := json.Marshal(ticket.Value.Reveal()) // a string can be encoded
	b := append([]byte(`{"errcode":0,"errmsg":"ok","ticket":`), value...)
	b = append(b, `,"expires_in":`...)
	b = strconv.AppendInt(b, max(1, int64(ticket.ExpiresAt.Sub(now)/time.Second)), 10)
	return append(b, '}')
}
