package caddymodule

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap/zapcore"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

func newEvent(t *testing.T) (*Event, *App) {
	t.Helper()
	app, ctx := newTestApp(t, testConfig(""))
	e := new(Event)
	if err := e.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	if err := e.Validate(); err != nil {
		t.Fatal(err)
	}
	return e, app
}

func eventSender(t *testing.T) *sender {
	s := platformSender(t)
	s.idName = "AppId"
	return s
}

// eventXML is an authorization event with these further elements.
func eventXML(infoType, more string) string {
	return fmt.Sprintf("<xml><AppId><![CDATA[%s]]></AppId>\n<CreateTime>%d</CreateTime>\n<InfoType><![CDATA[%s]]></InfoType>\n%s</xml>",
		platformID, time.Now().Unix(), infoType, more)
}

const ticketElement = "<ComponentVerifyTicket><![CDATA[ticket@@@abcdef]]></ComponentVerifyTicket>"

func TestEventKeepsTicket(t *testing.T) {
	t.Parallel()
	e, app := newEvent(t)
	rec := serve(t, e, eventSender(t).push("/wx/event", eventXML("component_verify_ticket", ticketElement)), nil)
	if rec.Code != 200 || rec.Body.String() != "success" {
		t.Fatalf("%d %q", rec.Code, rec.Body)
	}
	got, err := app.manager().Ticket(t.Context(), platformID)
	if err != nil || got.Value.Reveal() != "ticket@@@abcdef" {
		t.Errorf("ticket %v, %v", got.Value.Reveal(), err)
	}
	if _, err := app.manager().Ticket(t.Context(), otherPlatform); !errors.Is(err, tokens.ErrNoTicket) {
		t.Errorf("the other platform's ticket: %v", err)
	}
	// Another process on the same store has it too: it was durable when success was answered.
	other := tokens.NewManager()
	defer other.Close()
	other.Use(app.env)
	if got, err := other.Ticket(t.Context(), platformID); err != nil || got.Value.Reveal() != "ticket@@@abcdef" {
		t.Errorf("after a restart: %v, %v", got.Value.Reveal(), err)
	}
}

func TestEventTicketOutsideWindow(t *testing.T) {
	t.Parallel()
	e, app := newEvent(t)
	logs := watchLog(app)
	s := eventSender(t)
	s.at = time.Now().Add(-2 * time.Hour)
	rec := serve(t, e, s.push("/wx/event", eventXML("component_verify_ticket", ticketElement)), nil)
	if rec.Code != 200 || rec.Body.String() != "success" {
		t.Fatalf("%d %q", rec.Code, rec.Body)
	}
	entries := logs.FilterLevelExact(zapcore.ErrorLevel).All()
	if len(entries) != 1 {
		t.Fatalf("log %v", logs.All())
	}
	offset, _ := entries[0].ContextMap()["wechat_ahead_by"].(time.Duration)
	if offset > -119*time.Minute || offset < -121*time.Minute {
		t.Errorf("offset %v", entries[0].ContextMap())
	}
	rec = serve(t, e, s.push("/wx/event", eventXML("unauthorized", "<AuthorizerAppid>"+authorizerID+"</AuthorizerAppid>")), nil)
	if rec.Code != 403 {
		t.Errorf("a stale unauthorized: %d", rec.Code)
	}
}

// A ticket that is sent again says nothing about a clock that is right by WeChat's.
func TestEventTicketSentAgain(t *testing.T) {
	t.Parallel()
	wechat := newTimeWeChat(t, 0)
	app, ctx := newTestApp(t, testConfig(wechat.URL))
	e := eventHandler(t, ctx)
	logs := watchLog(app)
	s := eventSender(t)
	s.at = time.Now().Add(-2 * time.Hour)
	rec := serve(t, e, s.push("/wx/event", eventXML("component_verify_ticket", ticketElement)), nil)
	if rec.Code != 200 || rec.Body.String() != "success" {
		t.Fatalf("%d %q", rec.Code, rec.Body)
	}
	wechat.times(t, 1)
	entries := logs.FilterLevelExact(zapcore.WarnLevel).FilterMessageSnippet("sent it again").All()
	if len(entries) != 1 || logs.FilterLevelExact(zapcore.ErrorLevel).Len() != 0 || logs.FilterMessageSnippet("this machine's clock").Len() != 0 {
		t.Fatalf("log %v", logs.All())
	}
	if off, _ := entries[0].ContextMap()["timestamp_off_by"].(time.Duration); off > -119*time.Minute || off < -121*time.Minute {
		t.Errorf("offset %v", entries[0].ContextMap())
	}
}

// Pushes are judged by this machine's clock while it is off by less than the window: a ticket may then be late by that alone.
func TestEventTicketLateByOurClockAlone(t *testing.T) {
	t.Parallel()
	const ahead = -(defaultTimestampWindow - 20*time.Second)
	for late, want := range map[time.Duration]struct {
		level zapcore.Level
		says  string
		field string
		off   time.Duration
	}{
		time.Minute:   {zapcore.ErrorLevel, "and not by WeChat's", "wechat_ahead_by", ahead},
		2 * time.Hour: {zapcore.WarnLevel, "also by WeChat's clock", "timestamp_off_by", -2 * time.Hour},
	} {
		wechat := newTimeWeChat(t, ahead)
		app, ctx := newTestApp(t, testConfig(wechat.URL))
		e := eventHandler(t, ctx)
		logs := watchLog(app)
		s := eventSender(t)
		s.at = time.Now().Add(ahead - late)
		rec := serve(t, e, s.push("/wx/event", eventXML("component_verify_ticket", ticketElement)), nil)
		if rec.Code != 200 || rec.Body.String() != "success" {
			t.Fatalf("%d %q", rec.Code, rec.Body)
		}
		wechat.times(t, 1)
		entries := logs.FilterMessageSnippet("a ticket's timestamp").All()
		if len(entries) != 1 || entries[0].Level != want.level || !strings.Contains(entries[0].Message, want.says) {
			t.Fatalf("late by %v: log %v", late, entries)
		}
		if off, _ := entries[0].ContextMap()[want.field].(time.Duration); (off - want.off).Abs() > 5*time.Second {
			t.Errorf("late by %v: %v", late, entries[0].ContextMap())
		}
	}
}

func TestEventAnswersOthers(t *testing.T) {
	t.Parallel()
	e, app := newEvent(t)
	tests := []struct {
		name, message string
		status        int
		body          string
	}{
		{"unknown", eventXML("something_new", ""), 200, "success"},
		{"registration refused", eventXML("notify_third_fasteregister", "<appid>"+authorizerID+"</appid><status>100001</status>"), 200, "success"},
		{"unauthorized", eventXML("unauthorized", "<AuthorizerAppid>"+authorizerID+"</AuthorizerAppid>"), 200, "success"},
		{"a message", textMessage("x"), 200, "success"},
		{"authorized without a code", eventXML("authorized", "<AuthorizerAppid>"+authorizerID+"</AuthorizerAppid>"), 400, ""},
		{"authorized without an appid", eventXML("authorized", "<AuthorizationCode>c</AuthorizationCode>"), 400, ""},
		{"unauthorized without an appid", eventXML("unauthorized", ""), 400, ""},
		{"empty ticket", eventXML("component_verify_ticket", "<ComponentVerifyTicket></ComponentVerifyTicket>"), 400, ""},
	}
	for _, tt := range tests {
		rec := serve(t, e, eventSender(t).push("/wx/event", tt.message), nil)
		if rec.Code != tt.status || (tt.body != "" && rec.Body.String() != tt.body) {
			t.Errorf("%s: %d %q", tt.name, rec.Code, rec.Body)
		}
	}
	if got := counted(t, app.metrics().pushes, "event", "ok"); got != 4 {
		t.Errorf("ok counted %v times", got)
	}
}

func TestEventRefusals(t *testing.T) {
	t.Parallel()
	e, app := newEvent(t)
	forged := newSender(t, platformID, "another-token", platformKey).push("/wx/event", eventXML("component_verify_ticket", ticketElement))
	put := eventSender(t).push("/wx/event", eventXML("component_verify_ticket", ticketElement))
	put.Method = http.MethodPut
	for _, tt := range []struct {
		r      *http.Request
		status int
		result string
	}{
		{forged, 403, "signature"},
		{put, 405, "method"},
		{newSender(t, accountID, platformToken, platformKey).push("/wx/event", textMessage("x")), 403, "receive_id"},
		{httptest.NewRequest(http.MethodGet, "/wx/event", nil), 400, "malformed"},
	} {
		if rec := serve(t, e, tt.r, nil); rec.Code != tt.status {
			t.Errorf("%s: %d", tt.result, rec.Code)
		}
		if got := counted(t, app.metrics().pushes, "event", tt.result); got != 1 {
			t.Errorf("%s counted %v times", tt.result, got)
		}
	}
	if _, err := app.manager().Ticket(t.Context(), platformID); err == nil {
		t.Error("a forged ticket was kept")
	}
}

// An event that lacks what it is about says so: it has been decrypted, and nothing is wrong with the keys.
func TestEventLacks(t *testing.T) {
	t.Parallel()
	for infoType, more := range map[string]string{
		"component_verify_ticket":    "<ComponentVerifyTicket></ComponentVerifyTicket>",
		"authorized":                 "<AuthorizerAppid>" + authorizerID + "</AuthorizerAppid>",
		"updateauthorized":           "<AuthorizationCode>c</AuthorizationCode>",
		"notify_third_fasteregister": "<auth_code>c</auth_code>",
		"unauthorized":               "",
	} {
		e, app := newEvent(t)
		logs := watchLog(app)
		rec := serve(t, e, eventSender(t).push("/wx/event", eventXML(infoType, more)), nil)
		if refused := logs.FilterMessage("push refused").All(); rec.Code != http.StatusBadRequest || len(refused) != 1 || refused[0].ContextMap()["reason"] != errLacking.reason {
			t.Errorf("%s: %d, %v", infoType, rec.Code, refused)
		}
	}
}

// TestEventStoreFails: what arrived could not be made durable, so it is not acknowledged; the ticket serves anyway.
func TestEventStoreFails(t *testing.T) {
	t.Parallel()
	e, app := newEvent(t)
	logs := watchLog(app)
	app.manager()
	blockStorage(t, app)
	for _, message := range []string{
		eventXML("component_verify_ticket", ticketElement),
		eventXML("authorized", "<AuthorizerAppid>"+authorizerID+"</AuthorizerAppid><AuthorizationCode>code-secret</AuthorizationCode>"),
	} {
		rec := serve(t, e, eventSender(t).push("/wx/event", message), nil)
		if rec.Code != http.StatusServiceUnavailable {
			t.Errorf("%d %q", rec.Code, rec.Body)
		}
	}
	if got, err := app.manager().Ticket(t.Context(), platformID); err != nil || got.Value.Reveal() != "ticket@@@abcdef" {
		t.Errorf("the ticket does not serve from memory: %v", err)
	}
	for _, entry := range logs.All() {
		if text := fmt.Sprint(entry.Message, entry.ContextMap()); strings.Contains(text, "code-secret") || strings.Contains(text, "ticket@@@") {
			t.Errorf("secret logged: %s", text)
		}
	}
	if got := counted(t, app.metrics().pushes, "event", "store"); got != 2 {
		t.Errorf("store counted %v times", got)
	}
}

// hungStore is a store that answers nothing, until the caller's time is up.
type hungStore struct{ *tokens.MemStore }

func (hungStore) Load(ctx context.Context, _ string) ([]byte, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func (hungStore) Store(ctx context.Context, _ string, _ []byte) error {
	<-ctx.Done()
	return ctx.Err()
}

func (hungStore) Delete(ctx context.Context, _ string) error {
	<-ctx.Done()
	return ctx.Err()
}

func (hungStore) List(ctx context.Context, _ string) ([]string, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func (hungStore) Lock(ctx context.Context, _ string) (func(), error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// TestEventStoreHangs: a store that does not answer has three seconds for all that an event asks of it, so that WeChat gets its 503 in time.
func TestEventStoreHangs(t *testing.T) {
	t.Parallel()
	for infoType, more := range map[string]string{
		"component_verify_ticket":    ticketElement,
		"authorized":                 "<AuthorizerAppid>" + authorizerID + "</AuthorizerAppid><AuthorizationCode>code-secret</AuthorizationCode>",
		"updateauthorized":           "<AuthorizerAppid>" + authorizerID + "</AuthorizerAppid><AuthorizationCode>code-secret</AuthorizationCode>",
		"notify_third_fasteregister": "<appid>" + authorizerID + "</appid><status>0</status><auth_code>code-secret</auth_code>",
		"unauthorized":               "<AuthorizerAppid>" + authorizerID + "</AuthorizerAppid>",
	} {
		t.Run(infoType, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				time.Sleep(time.Until(time.Date(2026, 11, 28, 0, 0, 0, 0, time.UTC))) // timestamps have ten digits
				e, app := newEvent(t)
				app.env.Store = hungStore{tokens.NewMemStore()}
				began := time.Now()
				rec := serve(t, e, eventSender(t).push("/wx/event", eventXML(infoType, more)), nil)
				if took := time.Since(began); rec.Code != http.StatusServiceUnavailable || took != 3*time.Second {
					t.Errorf("%d %q after %s, want 503 after 3 s", rec.Code, rec.Body, took)
				}
			})
		})
	}
}

// blockStorage puts a file where the storage wants its folder.
func blockStorage(t *testing.T, app *App) {
	t.Helper()
	_, root, _ := strings.Cut(app.poolKey, "FileStorage:")
	if root == "" {
		t.Fatalf("storage %q", app.poolKey)
	}
	if err := os.RemoveAll(root); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(root), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(root, []byte("in the way"), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestEventOnMessageURL(t *testing.T) {
	t.Parallel()
	m, app := newMessage(t, nil)
	rec := serve(t, m, eventSender(t).push("/wx/message/"+authorizerID, eventXML("component_verify_ticket", ticketElement)), nil)
	if rec.Code != 200 || rec.Body.String() != "success" {
		t.Fatalf("%d %q", rec.Code, rec.Body)
	}
	if _, err := app.manager().Ticket(t.Context(), platformID); err != nil {
		t.Errorf("ticket: %v", err)
	}
}

// TestEventForward: what is durable also goes to the next handler, without its codes, and a ticket never.
func TestEventForward(t *testing.T) {
	t.Parallel()
	e, app := newEvent(t)
	e.Forward = true
	type seen struct{ body, appid, header string }
	got := make(chan seen, 8)
	next := caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
		body, _ := io.ReadAll(r.Body)
		repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
		m := MessageMatcher{InfoType: []string{"authorized", "notify_third_fasteregister"}}
		if err := m.compile(); err != nil {
			t.Error(err)
		}
		if ok, _ := m.MatchWithError(r); !ok {
			t.Error("the matcher does not see the info type")
		}
		caddyhttp.SetVar(r.Context(), "anything", 1)
		got <- seen{body: string(body), appid: repl.ReplaceAll("{wechat.appid}", ""), header: r.Header.Get("X-Wechat-Appid")}
		panic("the next handler's trouble")
	})
	for _, message := range []string{
		eventXML("component_verify_ticket", ticketElement),
		eventXML("authorized", "<AuthorizerAppid>"+authorizerID+"</AuthorizerAppid><AuthorizationCode><![CDATA[queryauthcode@@@1]]></AuthorizationCode><PreAuthCode>preauthcode@@@2</PreAuthCode>"),
		eventXML("notify_third_fasteregister", "<appid>"+authorizerID+"</appid><status>0</status><auth_code>queryauthcode@@@3</auth_code>"),
	} {
		if rec := serve(t, e, eventSender(t).push("/wx/event", message), next); rec.Body.String() != "success" {
			t.Fatalf("%d %q", rec.Code, rec.Body)
		}
	}
	for range 2 {
		s := <-got
		if strings.Contains(s.body, "authcode@@@") || strings.Contains(s.body, "ticket@@@") || !strings.Contains(s.body, authorizerID) {
			t.Errorf("forwarded %s", s.body)
		}
		if s.appid != authorizerID || s.header != authorizerID {
			t.Errorf("appid %q, header %q", s.appid, s.header)
		}
	}
	app.shared.work.Wait()
	select {
	case s := <-got:
		t.Errorf("forwarded too: %s", s.body)
	default:
	}
}

// TestEventForwardIsTriedAgain: while no backend is reached, and only until one may have the event. Who was asked before it was read, as
// forward_auth does, has none.
func TestEventForwardIsTriedAgain(t *testing.T) {
	t.Parallel()
	unreached := reverseproxy.NewDialError(errors.New("connection refused"))
	read := func(r *http.Request) {
		if b, _ := io.ReadAll(r.Body); !strings.Contains(string(b), authorizerID) {
			t.Errorf("the event is %q", b)
		}
	}
	answered := func(r *http.Request) {
		r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer).Set(roundTripPlaceholder, time.Second)
	}
	for name, tt := range map[string]struct {
		first func(r *http.Request)
		runs  int
	}{
		"not reached":                      {func(*http.Request) {}, 2},
		"read, and not reached":            {read, 2},
		"asked for leave, and not reached": {func(r *http.Request) { answered(r); read(r) }, 2},
		"another one answered":             {func(r *http.Request) { read(r); answered(r) }, 1},
		"another one broke off":            {func(r *http.Request) { read(r); noteArrival(r, io.ErrUnexpectedEOF) }, 1},
		"another one was not reached":      {func(r *http.Request) { read(r); noteArrival(r, unreached) }, 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				event := &facts{appid: authorizerID, platform: platformID}
				copied := detach(httptest.NewRequest(http.MethodPost, "/wx/event", nil), crypto.FormatXML, event, []byte(eventXML("unauthorized", authorizerID)))
				ctx, cancel := context.WithTimeout(t.Context(), backgroundTimeout)
				defer cancel()
				runs := 0
				err := copied.serveReached(ctx, caddyhttp.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) error {
					if runs++; runs > 1 {
						read(r)
						return nil
					}
					tt.first(r)
					return unreached
				}))
				if runs != tt.runs || (err == nil) != (tt.runs > 1) {
					t.Errorf("%d runs, want %d: %v", runs, tt.runs, err)
				}
			})
		})
	}
}

func TestWithoutCodes(t *testing.T) {
	t.Parallel()
	if _, err := withoutCodes([]byte(eventXML("authorized", "<AuthorizationCode>a&#64;b&#64;code</AuthorizationCode>"))); err == nil {
		t.Error("an escaped code was passed on")
	}
	if _, err := withoutCodes([]byte("not XML")); err == nil {
		t.Error("garbage was passed on")
	}
}

func TestEventForwardIsBounded(t *testing.T) {
	t.Parallel()
	e, app := newEvent(t)
	e.Forward, e.forwards = true, make(chan struct{}, 1)
	logs := watchLog(app)
	release := make(chan struct{})
	next := caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { <-release; return nil })
	for range 3 {
		if rec := serve(t, e, eventSender(t).push("/wx/event", eventXML("something_new", "")), next); rec.Body.String() != "success" {
			t.Errorf("%d %q", rec.Code, rec.Body)
		}
	}
	close(release)
	app.shared.work.Wait()
	if got := logs.FilterLevelExact(zapcore.ErrorLevel).Len(); got != 0 { // they are tried again
		t.Errorf("%d errors logged", got)
	}
	if got := logs.FilterMessage("an event could not be forwarded yet; it is tried again").FilterLevelExact(zapcore.WarnLevel).Len(); got != 2 {
		t.Errorf("the log says of %d events that they are tried again, want 2", got)
	}
}

func TestEventNeedsPlatform(t *testing.T) {
	t.Parallel()
	_, ctx := newTestApp(t, `{"accounts": [{"appid": "`+accountID+`", "secret": "s"}]}`)
	if err := new(Event).Provision(ctx); err == nil || !strings.Contains(err.Error(), "platform") {
		t.Errorf("error %v", err)
	}
	if err := (&Event{TimestampWindow: -1}).Validate(); err == nil {
		t.Error("a negative window is accepted")
	}
}

func TestCodeExpiry(t *testing.T) {
	t.Parallel()
	created := time.Unix(1572001402, 0)
	for in, want := range map[int64]time.Time{
		1572005002: time.Unix(1572005002, 0), // as it is really sent
		600:        created.Add(10 * time.Minute),
		0:          created, -5: created,
	} {
		if got := codeExpiry(created, in); !got.Equal(want) {
			t.Errorf("%d: %v, want %v", in, got, want)
		}
	}
}

var _ caddyhttp.Handler = (*answering)(nil)
