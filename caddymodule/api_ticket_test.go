package caddymodule

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// givenTicket is getticket's answer, taken apart.
type givenTicket struct {
	Code    *int64 `json:"errcode"`
	Msg     string `json:"errmsg"`
	Ticket  string `json:"ticket"`
	Expires int64  `json:"expires_in"`
}

func ticketIn(t *testing.T, a answer) givenTicket {
	t.Helper()
	var got givenTicket
	err := json.Unmarshal([]byte(a.Body), &got)
	if err != nil || a.Status != http.StatusOK || a.Header.Get("Content-Type") != "application/json" || got.Code == nil || *got.Code != 0 || got.Msg != "ok" ||
		strings.ContainsAny(a.Body, "\n\\ ") {
		t.Fatalf("got %d %q", a.Status, a.Body)
	}
	return got
}

const getTicket = "/cgi-bin/ticket/getticket"

// Every caller gets the one ticket that the gateway keeps, in whatever way it asks.
func TestAPITicket(t *testing.T) {
	wechat := newFakeWeChat(t)
	desk := newTicketDesk(wechat)
	g := newGateway(t, wechat, "", "")
	g.authorize()
	opaque, ofAuthorizer := g.opaque(accountID, crmKey), g.opaque(authorizerID, hashedKey)
	wechat.seen()
	for name, a := range map[string]answer{
		"SDK":            g.get(getTicket + "?access_token=" + opaque + "&type=jsapi"),
		"SDK, order":     g.get(getTicket + "?type=jsapi&access_token=" + opaque),
		"SDK, POST":      g.post(getTicket+"?type=jsapi&access_token="+opaque, ""),
		"SDK, extras":    g.get("/" + getTicket + "?x=%zz&type=jsapi&access_token=" + opaque),
		"path":           g.get("/"+accountID+getTicket+"?type=jsapi", bearer(crmKey)),
		"header":         g.get(getTicket+"?type=jsapi", bearer(crmKey), "X-Wechat-Appid: "+accountID),
		"other spelling": g.get("/"+accountID+"/cgi-bin/Ticket/getTicket?type=jsapi", bearer(crmKey)),
	} {
		if got := ticketIn(t, a); got.Ticket != ticketOf("jsapi", accountID, 1) || got.Expires > 7200 || got.Expires < 7190 {
			t.Errorf("%s: got %+v", name, got)
		}
	}
	if n := desk.given.Load(); n != 1 {
		t.Errorf("%d tickets were fetched, want 1", n)
	}
	if got := ticketIn(t, g.get(getTicket+"?access_token="+opaque+"&type=wx_card")); got.Ticket != ticketOf("wx_card", accountID, 2) {
		t.Errorf("for cards: got %+v", got)
	}
	if got := ticketIn(t, g.get(getTicket+"?access_token="+ofAuthorizer+"&type=jsapi")); got.Ticket != ticketOf("jsapi", authorizerID, 3) {
		t.Errorf("the authorizer's: got %+v", got)
	}
	for _, c := range wechat.seen() {
		if c.Path != getTicket || c.Method != http.MethodGet {
			t.Errorf("WeChat got %s %s", c.Method, c.Path)
		}
	}
	if a := g.do(http.MethodHead, "/"+accountID+getTicket+"?type=jsapi", nil, bearer(crmKey)); a.Status != http.StatusOK || a.Body != "" {
		t.Errorf("HEAD: got %d %q", a.Status, a.Body)
	}
	g.noSecretsLogged("TICKET")
}

// The gateway's rules hold for a ticket as for any call, and no request for a ticket that it keeps reaches WeChat as
// it came.
func TestAPITicketRefusals(t *testing.T) {
	wechat := newFakeWeChat(t)
	desk := newTicketDesk(wechat)
	g := newGateway(t, wechat, "", "")
	g.authorize()
	opaque := g.opaque(accountID, crmKey)
	desk.given.Store(0)
	wechat.seen()
	for name, c := range map[string]struct {
		a      answer
		status int
		code   int64
	}{
		"nobody":                  {g.get(getTicket + "?type=jsapi"), 401, 41001},
		"wrong key":               {g.get("/"+accountID+getTicket+"?type=jsapi", bearer(strangerKey)), 401, 40125},
		"unknown token":           {g.get(getTicket + "?type=jsapi&access_token=x"), 200, 40001},
		"two tokens":              {g.get(getTicket + "?type=jsapi&access_token=x&access_token=" + opaque), 200, 40097},
		"path not allowed":        {g.get("/"+accountID+getTicket+"?type=jsapi", bearer(shopKey)), 403, 48001},
		"account not allowed":     {g.get("/"+accountID+getTicket+"?type=jsapi", bearer(hashedKey)), 403, 48001},
		"another account's token": {g.get("/" + authorizerID + getTicket + "?type=jsapi&access_token=" + opaque), 200, 48001},
		"a platform":              {g.get("/"+platformID+getTicket+"?type=jsapi", bearer(panelKey)), 200, 61015},
		"no account":              {g.get(getTicket+"?type=jsapi", bearer(crmKey)), 400, 41002},
		"no type":                 {g.get(getTicket + "?access_token=" + opaque), 200, 40097},
		"unknown type":            {g.get(getTicket + "?type=9&access_token=" + opaque), 200, 40097},
		"two types":               {g.get(getTicket + "?type=2&type=jsapi&access_token=" + opaque), 200, 40097},
		"type in another case":    {g.get(getTicket + "?TYPE=jsapi&type=2&access_token=" + opaque), 200, 40097},
		"type behind a semicolon": {g.get(getTicket + "?a=1;type=jsapi&type=2&access_token=" + opaque), 200, 40097},
		"type in a body":          {g.post(getTicket+"?type=2&access_token="+opaque, "type=jsapi", "Content-Type: application/x-www-form-urlencoded"), 200, 40097},
		"PUT":                     {g.do(http.MethodPut, "/"+accountID+getTicket+"?type=jsapi", nil, bearer(crmKey)), 200, 43001},
	} {
		if code := c.a.code(t); c.a.Status != c.status || code != c.code {
			t.Errorf("%s: got %d, errcode %d (%s); want %d, %d", name, c.a.Status, code, c.a.Body, c.status, c.code)
		}
	}
	if calls := wechat.seen(); len(calls) != 0 || desk.given.Load() != 0 {
		t.Errorf("WeChat was called: %+v", calls)
	}
	// A ticket of a kind that the gateway does not keep is WeChat's to give.
	if a := g.get(getTicket + "?type=2&access_token=" + opaque); a.Status != http.StatusOK || !strings.Contains(a.Body, `"TICKET_2_`) {
		t.Errorf("type 2: got %d %s", a.Status, a.Body)
	}
	if c := wechat.one(t); c.Query != "type=2&access_token=REALTOKEN-"+accountID+"-1" {
		t.Errorf("WeChat got %s", c.Query)
	}
	g.noSecretsLogged("TICKET")
}

// WeChat's refusals reach the app, without its SDK asking for ever.
func TestAPITicketTroubleAtWeChat(t *testing.T) {
	for _, c := range []struct {
		name, answer string
		status       int
		code         int64
	}{
		{"no right", `{"errcode":48001,"errmsg":"api unauthorized"}`, 200, 48001},
		{"token refused twice", `{"errcode":40001,"errmsg":"invalid credential"}`, 200, 48001},
		{"busy", `{"errcode":-1,"errmsg":"system error"}`, 503, 503},
		{"html", `<html>`, 502, 502},
	} {
		wechat := newFakeWeChat(t)
		desk := newTicketDesk(wechat)
		g := newGateway(t, wechat, "", "")
		opaque := g.opaque(accountID, crmKey)
		desk.refuse(c.answer)
		if a := g.get(getTicket + "?type=jsapi&access_token=" + opaque); a.Status != c.status || a.code(t) != c.code {
			t.Errorf("%s: got %d %s", c.name, a.Status, a.Body)
		}
		if desk.refuse(""); strings.Contains(c.answer, "40001") {
			continue // the account's token rests for a while
		}
		if a := g.get(getTicket + "?type=jsapi&access_token=" + opaque); ticketIn(t, a).Ticket == "" {
			t.Errorf("%s, and then not: got %d %s", c.name, a.Status, a.Body)
		}
	}
}

func TestAPITicketStorm(t *testing.T) {
	wechat := newFakeWeChat(t)
	desk := newTicketDesk(wechat)
	g := newGateway(t, wechat, "", "")
	opaque := g.opaque(accountID, crmKey)
	begin, wg := make(chan struct{}), sync.WaitGroup{}
	var answers [60]answer
	for i := range answers {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, g.URL+getTicket+"?type=jsapi&access_token="+opaque, nil)
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			<-begin
			res, err := g.Client().Do(req)
			if err != nil {
				t.Error(err)
				return
			}
			defer res.Body.Close()
			body, _ := io.ReadAll(res.Body)
			answers[i] = answer{Status: res.StatusCode, Header: res.Header, Body: string(body)}
		})
	}
	close(begin)
	wg.Wait()
	for _, a := range answers {
		if got := ticketIn(t, a); got.Ticket != ticketOf("jsapi", accountID, 1) {
			t.Errorf("got %+v", got)
		}
	}
	if n := desk.given.Load(); n != 1 {
		t.Errorf("%d tickets were fetched, want 1", n)
	}
}

func TestTicketAnswer(t *testing.T) {
	t.Parallel()
	now := time.Now()
	for life, want := range map[time.Duration]string{
		7200 * time.Second: `7200}`, 90*time.Second + 999*time.Millisecond: `90}`, time.Millisecond: `1}`, -time.Second: `1}`,
	} {
		got := string(ticketAnswer(tokens.Token{Value: secret.New("kgt8ON7yVITDhtdwci0qeQ-_"), ExpiresAt: now.Add(life)}, now))
		if got != `{"errcode":0,"errmsg":"ok","ticket":"kgt8ON7yVITDhtdwci0qeQ-_","expires_in":`+want {
			t.Errorf("%v: got %s", life, got)
		}
	}
}
