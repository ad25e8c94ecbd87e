package caddymodule

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
	"github.com/caddy-wechat/caddy-wechat/tokens/redisstore"
)

// statusSecrets are what no status may show.
var statusSecrets = []string{
	"platform-secret", "other-secret", "account-secret", platformToken, platformKey, platformOldKey, otherToken, otherKey, accountToken, accountKey,
	crmKey, crmOldKey, shopKey, panelKey, hashedKey, openID, "REALTOKEN", "refreshtoken@@@", "ticket@@@", "queryauthcode@@@",
}

// look is lookAll without what is found of backends: Caddy counts those of all tests together.
func look(t *testing.T, app *App) Status {
	t.Helper()
	return withoutBackends(lookAll(t, app))
}

func withoutBackends(s Status) Status {
	s.Level = Green
	s.Findings = slices.DeleteFunc(s.Findings, func(f Finding) bool { return f.Code == "backend_failing" })
	for _, f := range s.Findings {
		s.Level = worst(s.Level, f.Level)
	}
	return s
}

// lookAll is the status as the admin endpoint shows it, which must hold no secret.
func lookAll(t *testing.T, app *App) Status {
	t.Helper()
	rec := httptest.NewRecorder()
	ops := operations{app: app, logger: app.logger}
	if err := ops.status(rec, httptest.NewRequest(http.MethodGet, "http://localhost/wechat/status", nil)); err != nil || rec.Code != http.StatusOK {
		t.Fatalf("%d, %v", rec.Code, err)
	}
	for _, s := range statusSecrets {
		if strings.Contains(rec.Body.String(), s) {
			t.Errorf("the status shows %q: %s", s, rec.Body)
		}
	}
	var s Status
	if err := json.Unmarshal(rec.Body.Bytes(), &s); err != nil {
		t.Fatal(err)
	}
	level := Green
	for i, f := range s.Findings {
		level = worst(level, f.Level)
		if f.Text.EN == "" || f.Text.ZH == "" || f.Remedy.EN == "" || f.Remedy.ZH == "" || f.Subject == "" || strings.Contains(f.Text.EN+f.Text.ZH, "%!") {
			t.Errorf("a finding is not complete: %+v", f)
		}
		speaksBoth(t, f.Code, f.Text)
		speaksBoth(t, "the remedy of "+f.Code, f.Remedy)
		if i > 0 && f.Level.rank() > s.Findings[i-1].Level.rank() {
			t.Errorf("%s comes after what is less bad", f.Code)
		}
	}
	for _, p := range s.Platforms {
		if p.Token.Error != nil {
			speaksBoth(t, "the token of "+p.AppID, *p.Token.Error)
		}
	}
	for _, a := range s.Accounts {
		if a.Token.Error != nil {
			speaksBoth(t, "the token of "+a.AppID, *a.Token.Error)
		}
	}
	if s.Level != level {
		t.Errorf("the whole is %s, its worst finding %s", s.Level, level)
	}
	return s
}

// finding returns the finding of a code about an appid or another subject, or nil.
func (s Status) finding(code, subject string) *Finding {
	for _, f := range s.Findings {
		if f.Code == code && strings.HasSuffix(f.Subject, subject) {
			return &f
		}
	}
	return nil
}

// has fails unless a finding is there, with that level and with a text that says something.
func (s Status) has(t *testing.T, level Level, code, subject, says string) {
	t.Helper()
	f := s.finding(code, subject)
	switch {
	case f == nil:
		t.Errorf("no %s of %s: %s", code, subject, s.codes())
	case f.Level != level || !strings.Contains(f.Text.EN, says):
		t.Errorf("%s of %s is %s, %q; want %s, %q", code, subject, f.Level, f.Text.EN, level, says)
	}
}

// hasNot fails if a finding is there.
func (s Status) hasNot(t *testing.T, codes ...string) {
	t.Helper()
	for _, f := range s.Findings {
		if slices.Contains(codes, f.Code) {
			t.Errorf("%s of %s is still there: %s", f.Code, f.Subject, f.Text.EN)
		}
	}
}

func (s Status) codes() (list []string) {
	for _, f := range s.Findings {
		list = append(list, f.Code+" of "+f.Subject)
	}
	return list
}

// isReady asks anew whether an app is ready.
func isReady(app *App) bool {
	v := &app.health().verdict
	v.mu.Lock()
	v.at = time.Time{}
	v.mu.Unlock()
	return len(app.ready(context.Background())) == 0
}

// statusConfig is an app with a platform, and more of its configuration.
func statusConfig(api, more string) string {
	return fmt.Sprintf(`{"platforms": [{"appid": %q, "secret": "platform-secret", "tokens": [%q], "aes_keys": [%q, %q]}],
		"seal_keys": [%q], "api": [%q]%s}`, platformID, platformToken, platformKey, platformOldKey, strings.Repeat("ab", 32), api, more)
}

// eventHandler is a wechat_event of a context.
func eventHandler(t *testing.T, ctx caddy.Context) *Event {
	t.Helper()
	e := new(Event)
	if err := e.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	return e
}

// messageHandler is a wechat_message of a context.
func messageHandler(t *testing.T, ctx caddy.Context) *Message {
	t.Helper()
	m := new(Message)
	if err := m.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	return m
}

// pushTicket has WeChat push a ticket.
func pushTicket(t *testing.T, e *Event) {
	t.Helper()
	if rec := serve(t, e, eventSender(t).push("/wx/event", eventXML("component_verify_ticket", ticketElement)), nil); rec.Code != http.StatusOK {
		t.Fatalf("%d %s", rec.Code, rec.Body)
	}
}

// quiet is a backend that answers nothing.
var quiet = caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { return nil })

func TestStatusOfAHealthyGateway(t *testing.T) {
	t.Parallel()
	wechat := newFakeWeChat(t)
	app, ctx := newTestApp(t, statusConfig(wechat.URL, `, "clients": [{"name": "crm", "keys": ["`+crmKey+`"], "appids": ["*"], "paths": ["/cgi-bin/user/*"]}]`))
	s := look(t, app)
	s.has(t, Red, "no_ticket", platformID, "no component_verify_ticket")
	if isReady(app) {
		t.Error("ready without a ticket")
	}
	pushTicket(t, eventHandler(t, ctx))
	s = look(t, app)
	if s.Level != Green || len(s.Findings) > 0 || !isReady(app) {
		t.Errorf("%s, %v, ready %t", s.Level, s.codes(), isReady(app))
	}
	if text, err := json.Marshal(s); err != nil || !strings.Contains(string(text), `"findings":[]`) {
		t.Errorf("%v, %s", err, text) // no null: scripts go through the list
	}
	p := s.Platforms[0]
	if p.Level != Green || p.Ticket == nil || p.Ticket.Age > 60 || p.Token.Expires == nil || p.Token.Refreshed == nil || p.LastPush == nil || s.Pushes.Last == nil {
		t.Errorf("%+v", p)
	}
	if c := s.Clients; len(c) != 1 || c[0].Name != "crm" || !slices.Equal(c[0].AppIDs, []string{"*"}) || !slices.Equal(c[0].Paths, []string{"/cgi-bin/user/*"}) {
		t.Errorf("clients %+v", c)
	}
	if h := s.Hosts; len(h) != 1 || h[0].LastOK == nil || h[0].Level != Green || "http://"+h[0].Host != wechat.URL {
		t.Errorf("hosts %+v", h)
	}
	if s.Store.Module != "caddy" || s.Store.Level != Green || s.Node == "" || s.Version == "" {
		t.Errorf("%+v", s.Store)
	}
}

// A ticket grows old: the record that an earlier process left says when it came.
func TestStatusOfOldTickets(t *testing.T) {
	t.Parallel()
	wechat := newFakeWeChat(t)
	root := filepath.Join(t.TempDir(), "storage")
	config := strings.Replace(statusConfig(wechat.URL, ""), fmt.Sprintf(`"seal_keys": [%q],`, strings.Repeat("ab", 32)),
		fmt.Sprintf(`"spill": %q,`, t.TempDir()), 1) // so that the record can be edited
	for _, tt := range []struct {
		age     time.Duration
		code    string
		level   Level
		unready bool
	}{
		{10 * time.Minute, "", Green, false},
		{30 * time.Minute, "ticket_overdue", Yellow, false},
		{3 * time.Hour, "ticket_overdue", Red, false},
		{13 * time.Hour, "ticket_expired", Red, true},
	} {
		first, ctx, err := provisionAt(root, config)
		if err != nil {
			t.Fatal(err)
		}
		pushTicket(t, eventHandler(t, ctx))
		names, err := first.env.Store.List(t.Context(), "wechat/v1/ticket")
		if err != nil || len(names) != 1 {
			t.Fatalf("%v, %v", names, err)
		}
		raw, err := first.env.Store.Load(t.Context(), names[0])
		if err != nil {
			t.Fatal(err)
		}
		var record map[string]any
		if err := json.Unmarshal(raw, &record); err != nil {
			t.Fatalf("%v: %s", err, raw)
		}
		record["received_at"] = time.Now().Add(-tt.age).Unix()
		raw, _ = json.Marshal(record)
		if err := first.Cleanup(); err != nil { // before the write, which it must not undo
			t.Fatal(err)
		}
		if err := first.env.Store.Store(t.Context(), names[0], raw); err != nil {
			t.Fatal(err)
		}
		app, ctx, err := provisionAt(root, config)
		if err != nil {
			t.Fatal(err)
		}
		s := look(t, app)
		if tt.code != "" {
			s.has(t, tt.level, tt.code, platformID, "the newest ticket came")
		} else {
			s.hasNot(t, "no_ticket", "ticket_overdue", "ticket_expired")
		}
		if isReady(app) == tt.unready {
			t.Errorf("%s: ready %t", tt.age, !tt.unready)
		}
		next := strings.Replace(ticketElement, "abcdef", "next", 1)
		if rec := serve(t, eventHandler(t, ctx), eventSender(t).push("/wx/event", eventXML("component_verify_ticket", next)), nil); rec.Code != http.StatusOK {
			t.Fatal(rec.Code)
		}
		look(t, app).hasNot(t, "no_ticket", "ticket_overdue", "ticket_expired")
		if err := app.Cleanup(); err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(root); err != nil {
			t.Fatal(err)
		}
	}
}

func TestStatusOfTokensThatFail(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, answer, code, says, ip string }{
		{"secret", `{"errcode":40125,"errmsg":"invalid appsecret rid: 64f1e2d3-0a1b2c3d-4e5f6071"}`, "secret_wrong", "rid 64f1e2d3", ""},
		{"address", `{"errcode":61004,"errmsg":"access clientip is not registered requestIP: 203.0.113.7 rid: 64f1e2d3-0a1b2c3d-4e5f6071"}`, codeAddressRefused, "203.0.113.7", "203.0.113.7"},
		{"platform", `{"errcode":61011,"errmsg":"invalid component"}`, "token_failing", "61011", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			wechat := newFakeWeChat(t)
			app, ctx := newTestApp(t, statusConfig(wechat.URL, fmt.Sprintf(`, "accounts": [{"appid": %q, "secret": "account-secret"}]`, accountID)))
			wechat.mu.Lock()
			wechat.grantErr = tt.answer
			wechat.mu.Unlock()
			pushTicket(t, eventHandler(t, ctx))
			if _, err := app.manager().Get(t.Context(), tokens.AccountKey(accountID)); err == nil {
				t.Fatal("the account got a token")
			}
			s := look(t, app)
			s.has(t, Red, tt.code, platformID, tt.says)
			s.has(t, Red, tt.code, accountID, tt.says)
			if f := s.finding(tt.code, accountID); f.Remedy.EN == s.finding(tt.code, platformID).Text.EN {
				t.Error("no remedy of its own")
			}
			if s.Platforms[0].Level != Red || s.Accounts[0].Level != Red || s.Platforms[0].Token.Error == nil || s.Hosts[0].EgressIP != tt.ip || isReady(app) {
				t.Errorf("%+v, %+v, ready %t", s.Platforms[0], s.Hosts[0], isReady(app))
			}
			wechat.mu.Lock()
			wechat.grantErr = ""
			wechat.mu.Unlock()
			app.shared.use(app.env) // as a reload does: what failed may be tried at once
			if _, err := app.manager().Get(t.Context(), tokens.AccountKey(accountID)); err != nil {
				t.Fatal(err)
			}
			s = look(t, app)
			s.hasNot(t, tt.code)
			if s.Level != Green || !isReady(app) {
				t.Errorf("%s: %v", s.Level, s.codes())
			}
			app.shared.retire(app.env)
		})
	}
}

// Without platforms the gateway is not ready once no account gets a token.
func TestReadyWithAccountsAlone(t *testing.T) {
	t.Parallel()
	wechat := newFakeWeChat(t)
	app, _ := newTestApp(t, fmt.Sprintf(`{"accounts": [{"appid": %q, "secret": "account-secret"}, {"appid": %q, "secret": "account-secret"}], "api": [%q]}`, accountID, strangerID, wechat.URL))
	if !isReady(app) {
		t.Error("not ready before anybody needed a token")
	}
	wechat.mu.Lock()
	wechat.grantErr = `{"errcode":40125,"errmsg":"invalid appsecret"}`
	wechat.mu.Unlock()
	for i, appid := range []string{accountID, strangerID} {
		if _, err := app.manager().Get(t.Context(), tokens.AccountKey(appid)); err == nil {
			t.Fatal("got a token")
		}
		if ready := isReady(app); ready != (i == 0) {
			t.Errorf("after %d accounts: ready %t", i+1, ready)
		}
	}
}

func TestStatusOfRefusedPushes(t *testing.T) {
	t.Parallel()
	app, ctx := newTestApp(t, fmt.Sprintf(`{
		"platforms": [{"appid": %q, "secret": "platform-secret", "tokens": [%q], "aes_keys": [%q]}],
		"accounts": [{"appid": %q, "secret": "account-secret", "tokens": [%q], "aes_keys": [%q]},
			{"appid": %q, "secret": "account-secret", "tokens": [%q]}], "api": ["http://127.0.0.1:1"]}`,
		platformID, platformToken, platformKey, accountID, accountToken, accountKey, strangerID, accountToken))
	m := messageHandler(t, ctx)
	account, plain := "/wx/message/"+accountID, "/wx/message/"+strangerID
	refused := func(path string, s *sender) {
		t.Helper()
		if rec := serve(t, m, s.push(path, textMessage("hello")), nil); rec.Code < 400 {
			t.Errorf("%s: %d", path, rec.Code)
		}
	}
	refused(account, newSender(t, accountID, "wrong-token", accountKey))
	look(t, app).has(t, Yellow, codePushSignature, accountID, "fits no configured token")
	refused(account, newSender(t, accountID, accountToken, otherKey))
	look(t, app).has(t, Red, codePushKey, accountID, "no configured aes_key opens")
	refused(account, newSender(t, strangerID, accountToken, accountKey))
	look(t, app).has(t, Red, codePushReceiveID, accountID, "another appid")
	refused(plain, newSender(t, strangerID, accountToken, accountKey))
	look(t, app).has(t, Red, codePushNoKey, strangerID, "has no aes_key")
	plainPush := platformSender(t).push("/wx/event", "")
	plainPush.Body = io.NopCloser(strings.NewReader(eventXML("authorized", "")))
	plainPush.ContentLength = -1
	serve(t, eventHandler(t, ctx), plainPush, nil)
	look(t, app).has(t, Yellow, codePushNotEncrypted, platformID, "not encrypted")
	large := accountSender(t).push(account, textMessage("hello"))
	large.ContentLength = defaultMaxBody + 1
	serve(t, m, large, nil)
	look(t, app).has(t, Yellow, codePushTooLarge, accountID, "larger than max_body")
	// What anybody can send says nothing.
	pushFindings := func() (n int) {
		for _, code := range look(t, app).codes() {
			if strings.HasPrefix(code, "push_") {
				n++
			}
		}
		return n
	}
	before := pushFindings()
	serve(t, m, httptest.NewRequest(http.MethodPost, account, strings.NewReader("x")), nil)
	if after := pushFindings(); after != before {
		t.Errorf("%d findings after garbage, %d before", after, before)
	}
	// Nor does what doctor pushes, whoever's keys it has.
	doctored := "<xml><ToUserName>gh_x</ToUserName><FromUserName>doctor</FromUserName><CreateTime>" + createTime + "</CreateTime><MsgType>event</MsgType><Event>" + doctorEvent + "</Event></xml>"
	if rec := serve(t, m, accountSender(t).push(account, doctored), quiet); rec.Code != http.StatusOK {
		t.Fatal(rec.Code)
	}
	s := look(t, app)
	if after := pushFindings(); after != before || s.Accounts[0].LastPush != nil || s.Accounts[0].Keys[0].LastUsed != nil {
		t.Errorf("%d findings after a push of doctor, %d before; %+v", after, before, s.Accounts[0])
	}
	// One push that opens shows it mended, for that account.
	if rec := serve(t, m, accountSender(t).push(account, textMessage("hello")), quiet); rec.Code != http.StatusOK {
		t.Fatal(rec.Code)
	}
	s = look(t, app)
	s.hasNot(t, codePushSignature, codePushKey, codePushReceiveID)
	s.has(t, Red, codePushNoKey, strangerID, "has no aes_key")
	if s.Accounts[0].LastPush == nil || s.Accounts[1].LastPush != nil || s.Accounts[0].Mode != modeSafe || s.Accounts[1].Mode != modePlain {
		t.Errorf("%+v", s.Accounts)
	}
	// What is not seen any more is forgotten.
	for _, x := range app.health().sightings.seen {
		x.last = x.last.Add(-2 * sightingLife)
	}
	look(t, app).hasNot(t, codePushNoKey, codePushTooLarge, codePushNotEncrypted)
}

func TestStatusOfAClockThatIsOff(t *testing.T) {
	t.Parallel()
	app, ctx := newTestApp(t, statusConfig("http://127.0.0.1:1", "")) // a WeChat that does not tell its time
	m, e := messageHandler(t, ctx), eventHandler(t, ctx)
	late := platformSender(t)
	late.at = time.Now().Add(-2 * time.Hour)
	if rec := serve(t, m, late.push("/wx/message/"+authorizerID, textMessage("hello")), nil); rec.Code != http.StatusForbidden {
		t.Fatal(rec.Code)
	}
	look(t, app).has(t, Red, codeClock, thisMachine, "behind this machine's")
	pushTicket(t, e)
	look(t, app).hasNot(t, codeClock)
	early := eventSender(t)
	early.at = time.Now().Add(time.Hour)
	serve(t, e, early.push("/wx/event", eventXML("component_verify_ticket", ticketElement)), nil)
	look(t, app).has(t, Red, codeClock, thisMachine, "ahead of this machine's")
	if rec := serve(t, m, platformSender(t).push("/wx/message/"+authorizerID, textMessage("hello")), quiet); rec.Code != http.StatusOK {
		t.Fatal(rec.Code)
	}
	look(t, app).hasNot(t, codeClock)
}

func TestStatusOfARotation(t *testing.T) {
	t.Parallel()
	wechat := newFakeWeChat(t)
	root := filepath.Join(t.TempDir(), "storage")
	app, ctx, err := provisionAt(root, statusConfig(wechat.URL, ""))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = app.Cleanup() }()
	e := eventHandler(t, ctx)
	old := newSender(t, platformID, platformToken, platformOldKey)
	old.idName = "AppId"
	serve(t, e, old.push("/wx/event", eventXML("component_verify_ticket", ticketElement)), nil)
	doctored := "<xml><AppId>" + platformID + "</AppId><CreateTime>" + createTime + "</CreateTime><InfoType>" + doctorEvent + "</InfoType></xml>"
	serve(t, e, platformSender(t).push("/wx/event", doctored), nil) // which does not tell whether WeChat has the new key
	s := look(t, app)
	s.has(t, Yellow, "rotation_unfinished", platformID, "older aes_key")
	keys := s.Platforms[0].Keys
	if len(keys) != 3 || keys[0].LastUsed != nil || keys[1].LastUsed == nil || keys[1].What != "aes_key" || keys[1].Index != 1 || keys[2].What != "token" || keys[2].LastUsed == nil {
		t.Errorf("%+v", keys)
	}
	// A reload keeps what is known.
	reloaded, ctx, err := provisionAt(root, statusConfig(wechat.URL, ""))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = reloaded.Cleanup() }()
	look(t, reloaded).has(t, Yellow, "rotation_unfinished", platformID, "older aes_key")
	pushTicket(t, eventHandler(t, ctx))
	s = look(t, reloaded)
	s.hasNot(t, "rotation_unfinished", "rotation_finished")
	// An hour later nothing has come with the older one.
	reloaded.Platforms[0].ring.keys[1].Add(-int64(2 * rotationSettle / time.Second))
	s = look(t, reloaded)
	s.has(t, Green, "rotation_finished", platformID, "newest aes_key")
	if s.Level != Green {
		t.Errorf("the whole is %s for what is no trouble", s.Level)
	}
}

// flakyStore is a store in memory that can fail.
type flakyStore struct {
	*tokens.MemStore
	down, full atomic.Bool
}

var errFlaky = errors.New("the disk is gone")

func (s *flakyStore) Load(ctx context.Context, name string) ([]byte, error) {
	if s.down.Load() {
		return nil, errFlaky
	}
	return s.MemStore.Load(ctx, name)
}

func (s *flakyStore) Store(ctx context.Context, name string, value []byte) error {
	if s.down.Load() || s.full.Load() {
		return errFlaky
	}
	return s.MemStore.Store(ctx, name, value)
}

func (s *flakyStore) Lock(ctx context.Context, name string) (func(), error) {
	if s.down.Load() {
		return nil, errFlaky
	}
	return s.MemStore.Lock(ctx, name)
}

func (s *flakyStore) ClaimAll(claims []tokens.Claim, timeout time.Duration) error {
	if s.down.Load() {
		return errFlaky
	}
	return s.MemStore.ClaimAll(claims, timeout)
}

func (s *flakyStore) Beat(ctx context.Context, node string, ttl time.Duration) error {
	if s.down.Load() {
		return errFlaky
	}
	return s.MemStore.Beat(ctx, node, ttl)
}

// eventually waits until a status is as it should be.
func eventually(t *testing.T, app *App, what string, is func(Status) bool) {
	t.Helper()
	end := time.After(20 * time.Second)
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for {
		s := look(t, app)
		if is(s) {
			return
		}
		select {
		case <-again.C:
		case <-end:
			t.Fatalf("%s: %v", what, s.codes())
		}
	}
}

func TestStatusOfAStoreThatFails(t *testing.T) {
	t.Parallel()
	wechat := newFakeWeChat(t)
	spill := t.TempDir()
	app, ctx := newTestApp(t, statusConfig(wechat.URL, fmt.Sprintf(`, "spill": %q`, spill)))
	store := &flakyStore{MemStore: tokens.NewMemStore()}
	app.env.Store = store
	e, m := eventHandler(t, ctx), messageHandler(t, ctx)
	pushTicket(t, e)
	if s := look(t, app); s.Level != Green || !isReady(app) {
		t.Fatalf("%v", s.codes())
	}
	// It can be read, and takes nothing: what WeChat grants waits in the spill folder.
	store.full.Store(true)
	if _, err := app.manager().ExchangeAuthCode(t.Context(), platformID, authorizerID, secret.New("queryauthcode@@@1")); err != nil {
		t.Fatal(err)
	}
	s := look(t, app)
	s.has(t, Red, "store_not_writing", "store caddy", errFlaky.Error())
	s.has(t, Yellow, "spill_in_use", thisMachine, "records wait")
	if s.Store.Waiting == 0 || s.Store.Unsaved != 0 || s.Store.LastError == nil || !isReady(app) {
		t.Errorf("%+v, ready %t", s.Store, isReady(app))
	}
	// A ticket goes into no spill folder.
	later := eventSender(t)
	rec := serve(t, e, later.push("/wx/event", eventXML("component_verify_ticket", "<ComponentVerifyTicket><![CDATA[ticket@@@next]]></ComponentVerifyTicket>")), nil)
	if rec.Code != http.StatusServiceUnavailable {
		t.Fatal(rec.Code)
	}
	s = look(t, app)
	s.has(t, Red, "records_unsaved", thisMachine, "memory alone")
	s.has(t, Red, codePushNotKept, platformID, "503")
	if isReady(app) {
		t.Error("ready, with a ticket in memory alone")
	}
	// It does not answer at all.
	store.down.Store(true)
	serve(t, m, platformSender(t).push("/wx/message/"+authorizerID, textMessage("hello")), quiet)
	s = look(t, app)
	s.has(t, Red, "store_down", "store caddy", errFlaky.Error())
	s.has(t, Yellow, "deduplication_degraded", thisMachine, "another node")
	if s.Store.Level != Red || !s.Store.Degraded || isReady(app) {
		t.Errorf("%+v", s.Store)
	}
	store.down.Store(false)
	store.full.Store(false)
	pushTicket(t, e)
	eventually(t, app, "the store is back", func(s Status) bool {
		for _, code := range []string{"store_down", "store_not_writing", "records_unsaved", "spill_in_use", "deduplication_degraded"} {
			if slices.ContainsFunc(s.Findings, func(f Finding) bool { return f.Code == code }) {
				return false
			}
		}
		return s.Store.Level == Green
	})
	if !isReady(app) {
		t.Error("not ready")
	}
}

// An event that could not be kept is told of the platform that it is for, also where its URL names none, until the next is kept.
func TestStatusOfAnEventThatIsNotKept(t *testing.T) {
	t.Parallel()
	app, ctx := newTestApp(t, testConfig("")) // two platforms
	store := &flakyStore{MemStore: tokens.NewMemStore()}
	app.env.Store = store
	e := eventHandler(t, ctx)
	store.full.Store(true)
	if rec := serve(t, e, eventSender(t).push("/wx/event", eventXML("component_verify_ticket", ticketElement)), nil); rec.Code != http.StatusServiceUnavailable {
		t.Fatal(rec.Code)
	}
	look(t, app).has(t, Red, codePushNotKept, platformID, "503")
	store.full.Store(false)
	pushTicket(t, e)
	look(t, app).hasNot(t, codePushNotKept)
}

func TestStatusOfHosts(t *testing.T) {
	t.Parallel()
	host, free := heldAddress(t)
	app, ctx := newTestApp(t, statusConfig("http://"+host, ""))
	pushTicket(t, eventHandler(t, ctx))
	s := look(t, app)
	s.has(t, Red, "host_connect", "host "+host, "refused")
	if h := s.Hosts[0]; h.Level != Red || h.LastError == nil || !strings.HasPrefix(h.Error, "connect: ") {
		t.Errorf("%+v", h)
	}
	free()
	listener, err := net.Listen("tcp", host)
	if err != nil {
		t.Fatal(err)
	}
	wechat := &fakeWeChat{issued: map[string]int{}, current: map[string]string{}, refuseBy: 40001}
	wechat.Server = &httptest.Server{Listener: listener, Config: &http.Server{Handler: wechat}} //nolint:gosec // a test's
	wechat.Start()
	t.Cleanup(wechat.Close)
	eventually(t, app, "the host answers", func(s Status) bool { return s.Level == Green && s.Hosts[0].LastOK != nil })
}

// TestWordsOfAnOutage: of a call that reached a host and was not answered is not said that it did not reach it, and whose token cannot be
// renewed because of that is not sent to look for an errcode.
func TestWordsOfAnOutage(t *testing.T) {
	t.Parallel()
	for class, reached := range map[string]bool{classAnswer: true, classDial: false, classTimeout: false} {
		f := hostFails("api.weixin.qq.com", class, "EOF", false)
		if strings.Contains(f.Text.EN, "did not reach it") == reached || strings.Contains(f.Text.ZH, "未能到达") == reached {
			t.Errorf("%s: %+v", class, f.Text)
		}
	}
	if r := sightedTexts[codeAuthorizerToken].remedy; !strings.Contains(r.EN, "where WeChat was not reached") || !strings.Contains(r.ZH, "未能连接微信") {
		t.Errorf("%+v", r)
	}
}

func TestClassOf(t *testing.T) {
	t.Parallel()
	plain := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(plain.Close)
	secure := httptest.NewUnstartedServer(http.NotFoundHandler())
	secure.Config.ErrorLog = nil
	secure.StartTLS()
	t.Cleanup(secure.Close)
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = silent.Close() })
	for _, tt := range []struct{ name, origin, proxy, want string }{
		{"port closed", "http://127.0.0.1:1", "", classDial},
		{"no TLS", strings.Replace(plain.URL, "http:", "https:", 1), "", classTLS},
		{"unknown authority", secure.URL, "", classTLS},
		{"proxy", "https://api.weixin.qq.com", "http://127.0.0.1:1", classProxy},
		{"not WeChat", plain.URL, "", classAnswer},
		{"silent", "http://" + silent.Addr().String(), "", classTimeout},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			hosts := new(hostTable)
			o := tokens.ClientOptions{Origins: []string{tt.origin}, Heard: hosts.note}
			if tt.want == classTimeout {
				o.Timeout = 200 * time.Millisecond
			}
			if tt.proxy != "" {
				u, err := parseProxy(tt.proxy)
				if err != nil {
					t.Fatal(err)
				}
				o.Proxy = http.ProxyURL(u)
			}
			client, err := tokens.NewClient(o)
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			if err := client.Get(t.Context(), "/cgi-bin/x", map[string][]string{"access_token": {"REALTOKEN"}}, nil); err == nil {
				t.Fatal("it answered")
			}
			_, host, _ := strings.Cut(tt.origin, "://")
			h := hosts.at(host)
			if h.class != tt.want || strings.Contains(h.reason, "REALTOKEN") || !when(&h.okAt).IsZero() {
				t.Errorf("%q: %s", h.class, h.reason)
			}
		})
	}
	dns := &net.OpError{Op: "dial", Err: &net.DNSError{Err: "no such host", Name: "api.weixin.qq.com", IsNotFound: true}}
	if got := classOf(dns); got != classDNS {
		t.Errorf("a name that does not resolve: %s", got)
	}
}

// Calls of apps tell of hosts, addresses and permissions too. Not parallel; see newGateway.
func TestStatusOfCalls(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.authorize()
	call := func() {
		g.do(http.MethodGet, "/"+authorizerID+"/cgi-bin/user/info?openid=o1", nil, "Authorization: Bearer "+crmKey)
	}
	answering := func(text string) {
		wechat.answer(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			_, _ = io.WriteString(w, text)
		})
	}
	answering(`{"errcode":48001,"errmsg":"api unauthorized rid: 64f1e2d3-0a1b2c3d-4e5f6071"}`)
	call()
	look(t, g.app).has(t, Yellow, codePermission, authorizerID, "/cgi-bin/user/info: 48001")
	answering(`{"errcode":61004,"errmsg":"access clientip is not registered requestIP: 203.0.113.9"}`)
	call()
	s := look(t, g.app)
	s.has(t, Red, codeAddressRefused, platformID, "203.0.113.9")
	if s.Hosts[0].EgressIP != "203.0.113.9" {
		t.Errorf("%+v", s.Hosts)
	}
	if _, err := g.app.manager().Renew(t.Context(), tokens.ComponentKey(platformID), secret.String{}); err != nil {
		t.Fatal(err)
	}
	look(t, g.app).hasNot(t, codeAddressRefused)
	answering(`{"errcode":45009,"errmsg":"reach max api daily quota limit"}`)
	call()
	look(t, g.app).has(t, Yellow, codeQuota, authorizerID, "45009")
	// Another system takes the token away.
	answering(`{"errcode":0}`)
	wechat.spoil(authorizerID)
	call()
	look(t, g.app).has(t, Yellow, codeRogue, authorizerID, "another system")
	// WeChat is gone.
	wechat.Close()
	call()
	look(t, g.app).has(t, Red, "host_connect", strings.TrimPrefix(wechat.URL, "http://"), "")
}

func TestStatusOfAuthorizations(t *testing.T) {
	t.Parallel()
	broken := atomic.Bool{}
	broken.Store(true)
	inner := newFakeWeChat(t)
	wechat := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.HasSuffix(r.URL.Path, "api_query_auth") && broken.Load():
			http.Error(w, "busy", http.StatusBadGateway)
		case strings.HasSuffix(r.URL.Path, "api_get_authorizer_list"):
			_, _ = io.WriteString(w, `{"total_count":1,"list":[{"authorizer_appid":"`+strangerID+`","auth_time":1700000000}]}`)
		case strings.HasSuffix(r.URL.Path, "api_get_authorizer_info"):
			_, _ = io.WriteString(w, `{"authorizer_info":{"nick_name":"x"},"authorization_info":{"authorizer_appid":"`+strangerID+`","func_info":[]}}`)
		default:
			inner.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(wechat.Close)
	app, ctx := newTestApp(t, statusConfig(wechat.URL, ""))
	e := eventHandler(t, ctx)
	pushTicket(t, e)
	older := fmt.Sprintf("<xml><AppId><![CDATA[%s]]></AppId><CreateTime>%d</CreateTime><InfoType><![CDATA[authorized]]></InfoType><AuthorizerAppid><![CDATA[%s]]></AuthorizerAppid><AuthorizationCode><![CDATA[queryauthcode@@@2]]></AuthorizationCode></xml>",
		platformID, time.Now().Add(-3*time.Minute).Unix(), authorizerID)
	if rec := serve(t, e, eventSender(t).push("/wx/event", older), nil); rec.Code != http.StatusOK {
		t.Fatalf("%d %s", rec.Code, rec.Body)
	}
	eventually(t, app, "an account that was never exchanged", func(s Status) bool { return s.finding("authorizations_lost", platformID) != nil })
	s := look(t, app)
	s.has(t, Yellow, "authorizations_waiting", platformID, "1 accepted")
	s.has(t, Yellow, "authorizations_lost", platformID, "1 accounts")
	if s.Platforms[0].Unexchanged != 1 || s.Platforms[0].Lost != 1 || s.Platforms[0].Level != Yellow {
		t.Errorf("%+v", s.Platforms[0])
	}
	broken.Store(false)
	eventually(t, app, "the code is exchanged", func(s Status) bool { return s.finding("authorizations_waiting", platformID) == nil })
}

func TestStatusOfReplies(t *testing.T) {
	t.Parallel()
	app, ctx := newTestApp(t, testConfig(""))
	m := &Message{Pushes: 1, ReplyTimeout: caddy.Duration(50 * time.Millisecond)}
	if err := m.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	path := "/wx/message/" + accountID
	down := caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
		return caddyhttp.Error(http.StatusServiceUnavailable, errors.New("no upstreams available"))
	})
	serve(t, m, accountSender(t).push(path, textMessage("hello")), down)
	look(t, app).has(t, Red, codeRepliesLost, accountID, "no upstreams available")
	serve(t, m, accountSender(t).push(path, textMessage("hello")), caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
		_, _ = io.WriteString(w, "<html>")
		return nil
	}))
	look(t, app).has(t, Yellow, codeRepliesUnusable, accountID, "")
	if f := look(t, app).finding(codeRepliesUnusable, accountID); f == nil || !strings.Contains(f.Text.EN, "it begins with an HTML page") || !strings.Contains(f.Text.ZH, "开头是 HTML 页面") || strings.Contains(f.Text.ZH, "begins") {
		t.Errorf("%+v", f)
	}
	serve(t, m, accountSender(t).push(path, textMessage("hello")), quiet)
	look(t, app).hasNot(t, codeRepliesLost, codeRepliesUnusable)
}

// Misdirected events and messages are handled, and their form field has to be mended.
func TestStatusOfMisdirectedPushes(t *testing.T) {
	t.Parallel()
	wechat := newFakeWeChat(t)
	app, ctx := newTestApp(t, statusConfig(wechat.URL, ""))
	s := platformSender(t)
	s.idName = "AppId"
	serve(t, messageHandler(t, ctx), s.push("/wx/message/"+authorizerID, eventXML("component_verify_ticket", ticketElement)), nil)
	look(t, app).has(t, Yellow, codeEventMisdirected, platformID, "message URL")
	serve(t, eventHandler(t, ctx), platformSender(t).push("/wx/event", textMessage("hello")), nil)
	look(t, app).has(t, Yellow, codeMessageMisdirected, platformID, "authorization-event URL")
}

func TestStatusOfTheConfiguration(t *testing.T) {
	t.Parallel()
	app, _ := newTestApp(t, fmt.Sprintf(`{"accounts": [{"appid": %q, "secret": "account-secret", "tokens": [%q]}], "api": ["http://127.0.0.1:1"]}`, accountID, accountToken))
	if _, err := app.manager().PutVerifyFile(t.Context(), "MP_verify_a1B2c3D4e5F6g7H8.txt", []byte("\xef\xbb\xbfa1B2c3D4e5F6g7H8")); err != nil {
		t.Fatal(err)
	}
	s := look(t, app)
	s.has(t, Yellow, "plain_mode", accountID, "明文模式")
	s.has(t, Yellow, "no_seal_key", thisMachine, "no seal_key")
	s.has(t, Yellow, "verify_file", "MP_verify_a1B2c3D4e5F6g7H8.txt", "byte order mark")
	if _, err := app.manager().PutVerifyFile(t.Context(), "MP_verify_a1B2c3D4e5F6g7H8.txt", []byte("a1B2c3D4e5F6g7H8")); err != nil {
		t.Fatal(err)
	}
	look(t, app).hasNot(t, "verify_file")
	empty, _ := newTestApp(t, `{}`)
	look(t, empty).has(t, Yellow, "nothing_configured", thisMachine, "neither")
}

func TestSightedCounts(t *testing.T) {
	t.Parallel()
	app, _ := newTestApp(t, testConfig(""))
	x := &examination{app: app}
	for n, want := range map[int]string{1: "(1 time, last at", 2: "(2 times, last at"} {
		if got := x.sighted(sighting{sightingKey: sightingKey{codePushKey, platformID}, count: n}); !strings.Contains(got.Text.EN, want) {
			t.Errorf("%s, want %s", got.Text.EN, want)
		}
	}
}

// Caddy counts failures of upstreams where passive health checks are on. Not parallel: it provisions a reverse_proxy.
func TestStatusOfBackends(t *testing.T) {
	app, ctx := newTestApp(t, testConfig(""))
	address := deadAddress(t)
	module, err := ctx.LoadModuleByID("http.handlers.reverse_proxy", json.RawMessage(fmt.Sprintf(
		`{"upstreams": [{"dial": %q}], "health_checks": {"passive": {"fail_duration": "2s", "max_fails": 1}}}`, address)))
	if err != nil {
		t.Fatal(err)
	}
	proxy := module.(*reverseproxy.Handler)
	t.Cleanup(func() { _ = proxy.Cleanup() })
	s := look(t, app)
	if !slices.Contains(s.Backends, BackendStatus{Address: address, Level: Green}) {
		t.Fatalf("%+v", s.Backends)
	}
	rec := httptest.NewRecorder()
	r := caddyhttp.PrepareRequest(httptest.NewRequest(http.MethodGet, "/", nil), caddy.NewReplacer(), rec, &caddyhttp.Server{})
	if err := proxy.ServeHTTP(rec, r, quiet); err == nil {
		t.Fatal("the backend answered")
	}
	lookAll(t, app).has(t, Yellow, "backend_failing", address, "1 requests")
	eventually(t, app, "the failure is forgotten", func(s Status) bool {
		return slices.Contains(s.Backends, BackendStatus{Address: address, Level: Green}) && lookAll(t, app).finding("backend_failing", address) == nil
	})
}

// Reloads come while the status is asked for.
func TestStatusDuringReloads(t *testing.T) {
	t.Parallel()
	wechat := newFakeWeChat(t)
	root := filepath.Join(t.TempDir(), "storage")
	app, ctx, err := provisionAt(root, statusConfig(wechat.URL, ""))
	if err != nil {
		t.Fatal(err)
	}
	pushTicket(t, eventHandler(t, ctx))
	var asking sync.WaitGroup
	stop := make(chan struct{})
	for range 2 {
		asking.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if s := withoutBackends(app.status(context.Background())); s.Level != Green {
					t.Errorf("%v", s.codes())
				}
				if !isReady(app) {
					t.Error("not ready")
				}
			}
		})
	}
	for range 10 {
		next, ctx, err := provisionAt(root, statusConfig(wechat.URL, ""))
		if err != nil {
			t.Fatal(err)
		}
		if err := next.Start(); err != nil {
			t.Fatal(err)
		}
		pushTicket(t, eventHandler(t, ctx))
		look(t, next)
		if err := next.Cleanup(); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	asking.Wait()
	if err := app.Cleanup(); err != nil {
		t.Fatal(err)
	}
}

func TestSightingsAreBounded(t *testing.T) {
	t.Parallel()
	var s sightings
	for i := range 2 * maxSightings {
		s.saw(codeCallRefused, fmt.Sprint(i), tokens.Text{})
	}
	if n := len(s.recent(time.Now())); n != maxSightings {
		t.Errorf("%d are remembered", n)
	}
	for _, x := range s.recent(time.Now()) {
		s.mended(x.subject, x.code)
	}
	if s.held.Load() != 0 {
		t.Errorf("%d are left", s.held.Load())
	}
}

// TestStatusOfAWrongSealKey: records that no seal_key opens are no store that does not answer, nor a ticket that has not come.
func TestStatusOfAWrongSealKey(t *testing.T) {
	t.Parallel()
	wechat := newFakeWeChat(t)
	storage := filepath.Join(t.TempDir(), "storage")
	config := statusConfig(wechat.URL, "")
	start := func(config string) (*App, caddy.Context) {
		t.Helper()
		app, ctx, err := provisionAt(storage, config)
		if err != nil {
			t.Fatal(err)
		}
		return app, ctx
	}
	before, ctx := start(config)
	pushTicket(t, eventHandler(t, ctx))
	look(t, before).hasNot(t, codeSealKey, "no_ticket")
	if err := before.Cleanup(); err != nil {
		t.Fatal(err)
	}
	keys := fmt.Sprintf(`"seal_keys": [%q],`, strings.Repeat("ab", 32))
	for name, seal := range map[string]string{"another": fmt.Sprintf(`"seal_keys": [%q],`, strings.Repeat("cd", 32)), "none": ""} {
		app, ctx := start(strings.Replace(config, keys, seal, 1))
		s := look(t, app)
		s.has(t, Red, codeSealKey, "store caddy", "v1/ticket/"+platformID)
		s.has(t, Red, "no_ticket", "platform "+platformID, "cannot be opened")
		s.hasNot(t, "store_down")
		for _, f := range s.Findings {
			if (f.Code == codeSealKey || f.Code == "no_ticket") && (!strings.Contains(f.Remedy.EN, "seal_key") || !strings.Contains(f.Remedy.ZH, "seal_key")) {
				t.Errorf("%s: %s: %+v", name, f.Code, f.Remedy)
			}
		}
		if isReady(app) {
			t.Errorf("%s: ready", name)
		}
		// Nor is it WeChat that does not answer once a ticket has come.
		if rec := serve(t, eventHandler(t, ctx), eventSender(t).push("/wx/event", eventXML("component_verify_ticket", ticketElement)), nil); rec.Code != http.StatusServiceUnavailable {
			t.Errorf("%s: the ticket is answered with %d", name, rec.Code)
		}
		s = look(t, app)
		s.has(t, Red, codeSealKey, "store caddy", "wechat/v1/")
		s.hasNot(t, "store_down", "no_ticket")
		for _, f := range s.Findings {
			if f.Code == "token_failing" && !strings.Contains(f.Remedy.EN, "seal_key") {
				t.Errorf("%s: %s: %+v", name, f.Code, f.Remedy)
			}
		}
		if isReady(app) {
			t.Errorf("%s: ready with a ticket", name)
		}
		if err := app.Cleanup(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestStatusOfAWrongSealKeyWithoutAPlatform: nor do plain accounts wait for WeChat then.
func TestStatusOfAWrongSealKeyWithoutAPlatform(t *testing.T) {
	t.Parallel()
	wechat := newFakeWeChat(t)
	storage := filepath.Join(t.TempDir(), "storage")
	for i, key := range []string{"ab", "cd"} {
		app, _, err := provisionAt(storage, fmt.Sprintf(`{"accounts": [{"appid": %q, "secret": "account-secret"}], "seal_keys": [%q], "api": [%q]}`,
			accountID, strings.Repeat(key, 32), wechat.URL))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := app.manager().Get(t.Context(), tokens.AccountKey(accountID)); (err != nil) != (i > 0) {
			t.Errorf("with key %d: %v", i, err)
		}
		s := look(t, app)
		if i == 0 {
			s.hasNot(t, codeSealKey, "token_failing")
		} else {
			s.has(t, Red, codeSealKey, "store caddy", "wechat/v1/account/"+accountID)
			s.has(t, Red, "token_failing", "account "+accountID, "does not open")
		}
		if isReady(app) != (i == 0) {
			t.Errorf("with key %d: ready %t", i, isReady(app))
		}
		if err := app.Cleanup(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestStatusOfASealKeyThatAnotherNodeHas: a node that lacks the seal_key of another one serves on with what it has, and says what is
// missing; once the platform's token is gone that cannot be renewed, it is out of service.
func TestStatusOfASealKeyThatAnotherNodeHas(t *testing.T) {
	t.Parallel()
	wechat := newFakeWeChat(t)
	server := redistest.Start(t)
	start := func(keys string) (*App, caddy.Context) {
		t.Helper()
		store := fmt.Sprintf(`{"store": {"module": "redis", "addresses": [%q]},`, redistest.NewRelay(t, server.Addr).Addr)
		config := strings.Replace(statusConfig(wechat.URL, ""), "{", store, 1)
		return newTestApp(t, strings.Replace(config, fmt.Sprintf(`"seal_keys": [%q]`, strings.Repeat("ab", 32)), `"seal_keys": [`+keys+`]`, 1))
	}
	old, fresh := fmt.Sprintf("%q", strings.Repeat("ab", 32)), fmt.Sprintf("%q", strings.Repeat("cd", 32))
	behind, ctx := start(old)
	pushTicket(t, eventHandler(t, ctx))
	key := tokens.ComponentKey(platformID)
	token, err := behind.manager().Get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	ahead, _ := start(fresh + ", " + old)
	if _, err := ahead.manager().Renew(t.Context(), key, token.Value); err != nil {
		t.Fatal(err)
	}
	if _, err := behind.manager().RenewNow(t.Context(), key); err == nil {
		t.Error("a token was renewed that another node has renewed")
	}
	s := look(t, behind)
	s.has(t, Red, codeSealKey, "store redis", "was sealed by another node")
	s.has(t, Yellow, "token_failing", "platform "+platformID, "the present one lives")
	if !isReady(behind) {
		t.Error("not ready while the token lives")
	}
	look(t, ahead).hasNot(t, codeSealKey, "token_failing")

	if _, err := behind.manager().Renew(t.Context(), key, token.Value); err == nil {
		t.Error("a token was renewed that another node has renewed")
	}
	s = look(t, behind)
	s.has(t, Red, codeSealKey, "store redis", "was sealed by another node")
	s.has(t, Red, "token_failing", "platform "+platformID, "was sealed by another node")
	s.hasNot(t, "store_down")
	if isReady(behind) {
		t.Error("ready without a token")
	}
}

// TestReasonsInBothLanguages: what the gateway itself says of why a token cannot be renewed is no name of a Go type, and is said in Chinese.
func TestReasonsInBothLanguages(t *testing.T) {
	t.Parallel()
	long := &tokens.SaidError{Kind: tokens.ErrBackoff, Text: texts("account wx2222222222222222: WeChat refused the token that stable_token still gives, "+
		"and a new one was forced 20 times today; is another system forcing them too?", "是否有其他系统也在强制刷新？")}
	for _, tt := range []struct {
		err    error
		en, zh string
	}{
		{long, "is another system forcing them too?", "是否有其他系统也在强制刷新？"},
		{fmt.Errorf("%w: %w", tokens.ErrBackoff, long), "is another system forcing them too?", "是否有其他系统也在强制刷新？"},
		{fmt.Errorf("wx3333333333333333: %w", tokens.ErrNotAuthorized), "has not authorised", "该账号未授权第三方平台"},
		{fmt.Errorf("/cgi-bin/stable_token: %w", &tokens.SaidError{Kind: tokens.ErrUnreachable, Text: texts("answered HTTP 502", "应答 HTTP 502")}), "answered HTTP 502", "微信的应答不可用：应答 HTTP 502"},
		{fmt.Errorf("/cgi-bin/stable_token: %w: %w", tokens.ErrUnreachable, &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}), "connection refused", "未能连接微信：连接被拒绝"},
		{fmt.Errorf("%w: read of x: %w", tokens.ErrStore, errors.New("disk")), "the store does not answer", "存储没有响应"},
	} {
		reason := reasonOf(tt.err)
		speaksBoth(t, tt.err.Error(), reason)
		if !strings.Contains(reason.EN, tt.en) || !strings.Contains(reason.ZH, tt.zh) {
			t.Errorf("%v: %+v", tt.err, reason)
		}
	}
	unfit := errors.Join(&tokens.SaidError{Kind: redisstore.ErrTooOld, Text: texts("it is 6.0", "Redis 是 6.0")}, errors.New("whatever\"a plugin says"))
	f := storeUnfit("redis", unfit)
	speaksBoth(t, f.Code, f.Text)
	if strings.Contains(f.Text.EN, "\n") || !strings.Contains(f.Text.EN, "it is 6.0; whatever") || !strings.Contains(f.Text.ZH, "：Redis 是 6.0；“whatever") {
		t.Errorf("%+v", f.Text)
	}
}
