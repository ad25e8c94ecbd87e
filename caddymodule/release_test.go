package caddymodule

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap/zapcore"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/internal/stall"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// The official account of the first group.
const (
	testedOriginal = "gh_3c884a361561"
	testedID       = "wx570bc396a51b8ff8"
	historic       = "gh_ea3c04785154"
)

func releasePush(toUser, msgType, rest string) string {
	return "<xml><ToUserName>" + toUser + "</ToUserName><FromUserName>" + openID + "</FromUserName><CreateTime>" + createTime + "</CreateTime><MsgType>" +
		msgType + "</MsgType>" + rest + "</xml>"
}

func queryAuthCode(toUser, code string) string {
	return releasePush(toUser, "text", "<Content><![CDATA[QUERY_AUTH_CODE:"+code+"]]></Content>")
}

// checkingWeChat is WeChat during the acceptance check: it exchanges each code once and counts the messages.
type checkingWeChat struct {
	*httptest.Server

	mu        sync.Mutex
	accounts  map[string]string // by code
	exchanges map[string]int    // by code
	sent      []sentMessage
	entered   chan string // codes whose exchange began, if set
	proceed   chan struct{}
	refuse    []string // what the next calls for messages get instead; "drop" breaks the connection
}

type sentMessage struct{ token, openID, content string }

func newCheckingWeChat(t *testing.T) *checkingWeChat {
	t.Helper()
	f := &checkingWeChat{accounts: map[string]string{}, exchanges: map[string]int{}}
	f.Server = httptest.NewServer(f)
	t.Cleanup(f.Close)
	return f
}

func (f *checkingWeChat) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var body struct {
		Code   string                   `json:"authorization_code"`
		AppID  string                   `json:"authorizer_appid"`
		ToUser string                   `json:"touser"`
		Type   string                   `json:"msgtype"`
		Text   struct{ Content string } `json:"text"`
	}
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
		http.Error(w, "not JSON", http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	switch r.URL.Path {
	case "/cgi-bin/component/api_component_token":
		io.WriteString(w, `{"component_access_token":"component-token","expires_in":7200}`)
	case "/cgi-bin/component/api_query_auth":
		io.WriteString(w, f.exchange(body.Code))
	case "/cgi-bin/component/api_authorizer_token":
		fmt.Fprintf(w, `{"authorizer_access_token":"renewed-of-%s","expires_in":7200,"authorizer_refresh_token":"refresh"}`, body.AppID)
	case customServiceAPI:
		f.mu.Lock()
		defer f.mu.Unlock()
		answer := `{"errcode":0,"errmsg":"ok"}`
		if len(f.refuse) > 0 {
			answer, f.refuse = f.refuse[0], f.refuse[1:]
		}
		if answer == "drop" || strings.Contains(answer, `:0,`) {
			f.sent = append(f.sent, sentMessage{r.URL.Query().Get("access_token"), body.ToUser, body.Text.Content})
		}
		if answer == "drop" {
			panic(http.ErrAbortHandler)
		}
		io.WriteString(w, answer)
	default:
		io.WriteString(w, `{"errcode":0,"errmsg":"ok"}`)
	}
}

func (f *checkingWeChat) exchange(code string) string {
	f.mu.Lock()
	f.exchanges[code]++
	appid, first, entered := f.accounts[code], f.exchanges[code] == 1, f.entered
	f.mu.Unlock()
	if entered != nil {
		entered <- code
		<-f.proceed
	}
	if appid == "" || !first {
		return `{"errcode":61009,"errmsg":"code is invalid"}`
	}
	return fmt.Sprintf(`{"authorization_info":{"authorizer_appid":%q,"authorizer_access_token":"token-of-%s","expires_in":7200,"authorizer_refresh_token":"refresh","func_info":[]}}`, appid, appid)
}

// allow makes a code of an account's; used is one that somebody has exchanged.
func (f *checkingWeChat) allow(code, appid string, used bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.accounts[code] = appid
	if used {
		f.exchanges[code]++
	}
}

// exchanged is how often a code was brought.
func (f *checkingWeChat) exchanged(code string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.exchanges[code]
}

func (f *checkingWeChat) messages() []sentMessage {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.sent)
}

// newReleaseCheck is a gateway with a ticket, whose WeChat is f.
func newReleaseCheck(t *testing.T, f *checkingWeChat) (*Message, *App, *Event) {
	t.Helper()
	app, ctx := newTestApp(t, testConfig(f.URL))
	m, e := new(Message), new(Event)
	if err := m.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	if err := e.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	err := app.manager().PutTicket(t.Context(), platformID, tokens.Ticket{Value: secret.New("ticket"), CreatedAt: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	return m, app, e
}

// openRelease is the text of an answer to a push of the check, "" for one without.
func openRelease(t *testing.T, s *sender, original string, rec *httptest.ResponseRecorder) string {
	t.Helper()
	if rec.Code != http.StatusOK {
		t.Errorf("%s: %d %q", original, rec.Code, rec.Body)
	}
	if rec.Body.Len() == 0 || rec.Body.String() == "success" {
		return ""
	}
	reply, err := s.codec.OpenReply(rec.Body.Bytes()) // fails for another receive id than the platform's
	if err != nil {
		t.Fatalf("%s: %v", original, err)
	}
	var f crypto.Fields
	if err := crypto.ScanFields(reply, &f); err != nil {
		t.Fatal(err)
	}
	if string(f.ToUserName) != openID || string(f.FromUserName) != original || string(f.MsgType) != "text" {
		t.Errorf("%s: reply %s", original, reply)
	}
	return string(f.Content)
}

func TestReleaseCheckText(t *testing.T) {
	t.Parallel()
	m, app := newMessage(t, nil)
	for original, appid := range releaseCheckAccounts {
		// What the path says does not matter: WeChat puts the appid there, the operator may have left it out.
		for _, path := range []string{"/wx/message/" + appid, "/wx/message/", "/wx/message/" + strangerID, "/wx/message/" + accountID, "/" + platformID + "/" + appid} {
			for _, tt := range []struct{ message, want string }{
				{releasePush(original, "text", "<Content>TESTCOMPONENT_MSG_TYPE_TEXT</Content>"), "TESTCOMPONENT_MSG_TYPE_TEXT_callback"},
				{releasePush(original, "event", "<Event>LOCATION</Event>"), "LOCATIONfrom_callback"},
			} {
				s := platformSender(t)
				if got := openRelease(t, s, original, serve(t, m, s.push(path, tt.message), nil)); got != tt.want {
					t.Errorf("%s at %s: %q, want %q", original, path, got, tt.want)
				}
			}
		}
	}
	if got, want := counted(t, app.metrics().replies, outcomeReleaseCheck), float64(2*5*len(releaseCheckAccounts)); got != want {
		t.Errorf("counted %v, want %v", got, want)
	}
}

// TestReleaseCheckIsExact: what only looks like a case of the check is answered with nothing, and reaches nobody.
func TestReleaseCheckIsExact(t *testing.T) {
	t.Parallel()
	m, _ := newMessage(t, nil)
	s := platformSender(t)
	for _, message := range []string{
		releasePush(testedOriginal, "text", "<Content>hello</Content>"),
		releasePush(testedOriginal, "text", "<Content> TESTCOMPONENT_MSG_TYPE_TEXT</Content>"),
		releasePush(testedOriginal, "text", "<Content>TESTCOMPONENT_MSG_TYPE_TEXT\n</Content>"),
		releasePush(testedOriginal, "text", "<Content>testcomponent_msg_type_text</Content>"),
		releasePush(testedOriginal, "text", "<Content>QUERY_AUTH_CODE:</Content>"),
		releasePush(testedOriginal, "text", "<Content>query_auth_code:c</Content>"),
		releasePush(testedOriginal, "image", "<Content>TESTCOMPONENT_MSG_TYPE_TEXT</Content>"),
		releasePush(testedOriginal, "text", ""),
	} {
		if rec := serve(t, m, s.push("/"+testedID, message), nil); rec.Code != 200 || rec.Body.String() != "success" {
			t.Errorf("%s: %d %q", message, rec.Code, rec.Body)
		}
	}
}

func TestReleaseCheckOnlyForWeChatsAccounts(t *testing.T) {
	t.Parallel()
	text := "<Content>TESTCOMPONENT_MSG_TYPE_TEXT</Content>"
	m, _ := newMessage(t, nil)
	b := &answering{}
	serve(t, m, platformSender(t).push("/"+authorizerID, releasePush(ghID, "text", text)), b)
	if !strings.Contains(b.body, "TESTCOMPONENT") {
		t.Error("a customer's message was taken for the check")
	}
	// A plain account is nobody's to publish, whatever its messages say.
	b = &answering{}
	serve(t, m, accountSender(t).push("/"+accountID, releasePush(testedOriginal, "text", text)), b)
	if b.got == nil {
		t.Error("a plain account's message was taken for the check")
	}
	off := false
	m.app.Platforms[0].ReleaseCheck = &off
	for original := range releaseCheckAccounts {
		for _, message := range []string{releasePush(original, "text", text), queryAuthCode(original, "c"), releasePush(original, "event", "<Event>LOCATION</Event>")} {
			b = &answering{}
			if serve(t, m, platformSender(t).push("/"+authorizerID, message), b); b.got == nil {
				t.Errorf("release_check off has no effect on %s", message)
			}
		}
	}
}

// TestReleaseCheckKeys: WeChat checks what is about to be published while the published credentials are in use, so both
// tokens and keys are configured; each answer is sealed with the key that opened the push.
func TestReleaseCheckKeys(t *testing.T) {
	t.Parallel()
	var config map[string]any
	if err := json.Unmarshal([]byte(testConfig("")), &config); err != nil {
		t.Fatal(err)
	}
	first := config["platforms"].([]any)[0].(map[string]any)
	first["tokens"] = []string{platformToken, "token-to-publish"}
	text, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	_, ctx := newTestApp(t, string(text))
	m := new(Message)
	if err := m.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	for _, token := range []string{platformToken, "token-to-publish"} {
		for _, key := range []string{platformKey, platformOldKey} {
			s := newSender(t, platformID, token, key) // opens with this pair alone
			rec := serve(t, m, s.push("/"+testedID, releasePush(testedOriginal, "text", "<Content>TESTCOMPONENT_MSG_TYPE_TEXT</Content>")), nil)
			if got := openRelease(t, s, testedOriginal, rec); got != "TESTCOMPONENT_MSG_TYPE_TEXT_callback" {
				t.Errorf("%s, %.4s…: %q", token, key, got)
			}
		}
	}
}

// TestReleaseCheckMessage: every account's QUERY_AUTH_CODE, with and without an appid in the path.
func TestReleaseCheckMessage(t *testing.T) {
	t.Parallel()
	f := newCheckingWeChat(t)
	m, app, _ := newReleaseCheck(t, f)
	logs := watchLog(app)
	var want []sentMessage
	for original, appid := range releaseCheckAccounts {
		if original == historic {
			appid = strangerID
		}
		for i, path := range []string{"/wx/message/" + appid, "/wx/message/"} {
			code := fmt.Sprintf("queryauthcode@@@%s_%d", original, i)
			f.allow(code, appid, false)
			rec := serve(t, m, platformSender(t).push(path, queryAuthCode(original, code)), nil)
			if rec.Code != 200 || rec.Body.Len() != 0 || !rec.Flushed || rec.Header().Get("Content-Length") != "0" {
				t.Errorf("%s: %d %q", original, rec.Code, rec.Body)
			}
			app.shared.work.Wait()
			want = append(want, sentMessage{"token-of-" + appid, openID, code + "_from_api"})
		}
	}
	if got := f.messages(); !slices.Equal(got, want) {
		t.Errorf("sent %v\nwant %v", got, want)
	}
	for _, entry := range logs.All() {
		if text := fmt.Sprint(entry.Message, entry.ContextMap()); strings.Contains(text, "queryauthcode") || strings.Contains(text, "token-of") || strings.Contains(text, openID) {
			t.Errorf("logged: %s", text)
		}
	}
}

// TestReleaseCheckUsedCode: the code came with authorized and was exchanged by that, by us or by another node.
func TestReleaseCheckUsedCode(t *testing.T) {
	t.Parallel()
	f := newCheckingWeChat(t)
	m, app, e := newReleaseCheck(t, f)
	f.allow("ours", testedID, false)
	f.allow("theirs", testedID, true)
	rec := serve(t, e, eventSender(t).push("/wx/event", authorizedXML(testedID, "ours")), nil)
	if rec.Body.String() != "success" {
		t.Fatalf("%d %q", rec.Code, rec.Body)
	}
	serve(t, m, platformSender(t).push("/", queryAuthCode(testedOriginal, "ours")), nil)
	app.shared.work.Wait()
	serve(t, m, platformSender(t).push("/", queryAuthCode(testedOriginal, "theirs")), nil)
	app.shared.work.Wait()
	want := []sentMessage{{"token-of-" + testedID, openID, "ours_from_api"}, {"token-of-" + testedID, openID, "theirs_from_api"}}
	if got := f.messages(); !slices.Equal(got, want) {
		t.Errorf("sent %v, want %v", got, want)
	}
	if n := f.exchanged("ours"); n != 1 {
		t.Errorf("the code was exchanged %d times", n)
	}
}

func authorizedXML(appid, code string) string {
	return eventXML("authorized", "<AuthorizerAppid>"+appid+"</AuthorizerAppid><AuthorizationCode>"+code+"</AuthorizationCode>")
}

// TestReleaseCheckExchangeUnderWay: WeChat is slow to exchange the code that came with authorized. QUERY_AUTH_CODE is
// answered all the same; it shares that exchange, and its message follows.
func TestReleaseCheckExchangeUnderWay(t *testing.T) {
	t.Parallel()
	f := newCheckingWeChat(t)
	f.entered, f.proceed = make(chan string), make(chan struct{})
	m, app, e := newReleaseCheck(t, f)
	f.allow("c", testedID, false)
	serve(t, e, eventSender(t).push("/wx/event", authorizedXML(testedID, "c")), nil)
	<-f.entered
	rec := serve(t, m, platformSender(t).push("/"+testedID, queryAuthCode(testedOriginal, "c")), nil)
	if rec.Code != 200 || rec.Body.Len() != 0 {
		t.Errorf("%d %q", rec.Code, rec.Body)
	}
	if got := f.messages(); len(got) != 0 {
		t.Errorf("sent before there was a token: %v", got)
	}
	close(f.proceed)
	app.shared.work.Wait()
	if got := f.messages(); !slices.Equal(got, []sentMessage{{"token-of-" + testedID, openID, "c_from_api"}}) {
		t.Errorf("sent %v", got)
	}
	if n := f.exchanged("c"); n != 1 {
		t.Errorf("exchanged %d times", n)
	}
}

// TestReleaseCheckExchangedElsewhere: another node has used the code, and its tokens come into the store only later.
func TestReleaseCheckExchangedElsewhere(t *testing.T) {
	t.Parallel()
	f := newCheckingWeChat(t)
	f.entered, f.proceed = make(chan string, 64), make(chan struct{})
	close(f.proceed)
	m, app, _ := newReleaseCheck(t, f)
	f.allow("other", testedID, false)
	f.allow("c", testedID, true)
	serve(t, m, platformSender(t).push("/", queryAuthCode(testedOriginal, "c")), nil)
	for range 2 { // refused with 61009 at least once
		if code := <-f.entered; code != "c" {
			t.Errorf("exchange of %s", code)
		}
	}
	other := tokens.NewManager()
	defer other.Close()
	other.Use(app.env)
	if _, err := other.ExchangeAuthCode(t.Context(), platformID, testedID, secret.New("other")); err != nil {
		t.Fatal(err)
	}
	app.shared.work.Wait()
	if got := f.messages(); len(got) != 1 || got[0].content != "c_from_api" {
		t.Errorf("sent %v", got)
	}
}

// TestReleaseCheckWithoutWeChat: nothing of WeChat's API answers; the push is answered at once all the same.
func TestReleaseCheckWithoutWeChat(t *testing.T) {
	t.Parallel()
	m, app := newMessage(t, nil)
	logs := watchLog(app)
	s := platformSender(t)
	r := s.push("/", queryAuthCode(testedOriginal, "c"))
	w, began := stall.New(t), time.Now()
	rec := serve(t, m, r, nil)
	if took := w.Since(began); rec.Code != 200 || rec.Body.Len() != 0 || took > time.Second {
		t.Errorf("%d %q after %v", rec.Code, rec.Body, took)
	}
	app.shared.cancel() // as after backgroundTimeout
	app.shared.work.Wait()
	if got := logs.FilterLevelExact(zapcore.ErrorLevel).Len(); got != 1 {
		t.Errorf("%d errors logged: %v", got, logs.All())
	}
	if got := app.shared.releaseChecks.Len(); got != 0 {
		t.Errorf("what was not sent is remembered as sent: %d", got)
	}
}

// TestReleaseCheckMessageOnce: WeChat pushes the same again, at the same time and later, and one message is sent.
func TestReleaseCheckMessageOnce(t *testing.T) {
	t.Parallel()
	f := newCheckingWeChat(t)
	m, app, _ := newReleaseCheck(t, f)
	f.allow("c", testedID, false)
	f.allow("d", testedID, false)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if rec := serve(t, m, platformSender(t).push("/", queryAuthCode(testedOriginal, "c")), nil); rec.Body.Len() != 0 {
				t.Errorf("%d %q", rec.Code, rec.Body)
			}
		})
	}
	wg.Wait()
	app.shared.work.Wait()
	serve(t, m, platformSender(t).push("/", queryAuthCode(testedOriginal, "c")), nil)
	serve(t, m, platformSender(t).push("/", queryAuthCode(testedOriginal, "d")), nil) // another one
	app.shared.work.Wait()
	got := map[string]int{}
	for _, sent := range f.messages() {
		got[sent.content]++
	}
	if want := map[string]int{"c_from_api": 1, "d_from_api": 1}; !maps.Equal(got, want) {
		t.Errorf("sent %v, want %v", got, want)
	}
	// A reply is the same when the push comes again, to the second in it.
	s := platformSender(t)
	message := releasePush(testedOriginal, "text", "<Content>TESTCOMPONENT_MSG_TYPE_TEXT</Content>")
	var replies []string
	for range 2 {
		reply, err := s.codec.OpenReply(serve(t, m, s.push("/", message), nil).Body.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		replies = append(replies, string(reply))
		key := releaseCheckKey(platformID, message)
		if kept, ok := app.shared.releaseChecks.Get(key); !ok || string(kept) != replies[0] {
			t.Errorf("kept %q, answered %q", kept, replies[0])
		}
	}
	if replies[0] != replies[1] {
		t.Errorf("answered %s, then %s", replies[0], replies[1])
	}
}

// TestReleaseCheckMessageOnceOnAllNodes: WeChat pushes the same again to another node, and one message is sent.
func TestReleaseCheckMessageOnceOnAllNodes(t *testing.T) {
	t.Parallel()
	f := newCheckingWeChat(t)
	store := tokens.NewMemStore()
	f.allow("c", testedID, false)
	for range 2 {
		m, app, _ := newReleaseCheck(t, f)
		app.env.Store = store
		serve(t, m, platformSender(t).push("/", queryAuthCode(testedOriginal, "c")), nil)
		app.shared.work.Wait()
	}
	if sent := f.messages(); len(sent) != 1 {
		t.Errorf("sent %v", sent)
	}
}

// TestReleaseCheckBrokenOff: a store that goes wrong at the claim, however, keeps no message from being sent, at once; where the claim was
// made all the same, another node sends none.
func TestReleaseCheckBrokenOff(t *testing.T) {
	t.Parallel()
	for _, how := range breakages {
		t.Run(string(how), func(t *testing.T) {
			t.Parallel()
			f := newCheckingWeChat(t)
			store := tokens.NewMemStore()
			f.allow("c", testedID, false)
			m, app, _ := newReleaseCheck(t, f)
			app.env.Store = &brokenClaims{MemStore: store, how: how}
			w, began := stall.New(t), time.Now()
			serve(t, m, platformSender(t).push("/", queryAuthCode(testedOriginal, "c")), nil)
			app.shared.work.Wait()
			if took := w.Since(began); len(f.messages()) != 1 || took > claimWait+2*time.Second {
				t.Errorf("sent %v after %v", f.messages(), took)
			}
			if how != failsAfter && how != hangsAfter {
				return
			}
			m, app, _ = newReleaseCheck(t, f)
			app.env.Store = store
			serve(t, m, platformSender(t).push("/", queryAuthCode(testedOriginal, "c")), nil)
			app.shared.work.Wait()
			if sent := f.messages(); len(sent) != 1 {
				t.Errorf("another node: sent %v", sent)
			}
		})
	}
}

// TestReleaseCheckGivenUp: a message that could not be sent is tried again on whichever node WeChat pushes next, also on one that left it
// to another before. A node gives up its own claim alone.
func TestReleaseCheckGivenUp(t *testing.T) {
	t.Parallel()
	const forbidden = `{"errcode":48001,"errmsg":"api unauthorized"}`
	key := releaseCheckKey(platformID, testedOriginal, openID, "c")
	name, other := "release/"+hex.EncodeToString(key[:]), []byte("other")
	for _, tt := range []struct {
		name    string
		how     breakage
		claimed bool // by another node, before the push
		refuse  []string
		held    string // by whom it is claimed after the push; "": nobody
		first   int    // messages
		free    bool   // the other node gives it up
		then    int    // after the next push
	}{
		{"by the other node", "", true, nil, "other", 0, true, 1},
		{"by this node", "", false, []string{forbidden}, "", 0, false, 1},
		{"by this node, whose claim failed and was made", failsAfter, false, []string{forbidden}, "", 0, false, 1},
		{"by this node, of the other's", fails, true, []string{forbidden}, "other", 0, false, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			f := newCheckingWeChat(t)
			f.refuse = tt.refuse
			f.allow("c", testedID, false)
			store := tokens.NewMemStore()
			if tt.claimed {
				if _, first, err := store.Claim(t.Context(), name, other, time.Hour); !first || err != nil {
					t.Fatal(first, err)
				}
			}
			m, app, _ := newReleaseCheck(t, f)
			broken := &brokenClaims{MemStore: store, how: tt.how, left: -1}
			if tt.how != "" {
				broken.left = 0
			}
			app.env.Store = broken
			push := func() int {
				serve(t, m, platformSender(t).push("/", queryAuthCode(testedOriginal, "c")), nil)
				app.shared.work.Wait()
				return len(f.messages())
			}
			if n := push(); n != tt.first {
				t.Errorf("%d messages, want %d", n, tt.first)
			}
			if held, _ := store.Peek(t.Context(), name); string(held) != tt.held {
				t.Errorf("claimed by %q, want %q", held, tt.held)
			}
			if tt.free {
				if _, err := store.Take(t.Context(), name); err != nil {
					t.Fatal(err)
				}
			}
			if n := push(); n != tt.then {
				t.Errorf("then %d messages, want %d", n, tt.then)
			}
		})
	}
}

// TestReleaseCheckRefusedMessage: what is done depends on whether a message may have gone out.
func TestReleaseCheckRefusedMessage(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name        string
		refuse      []string
		first, then int // messages after the push, and after the push again
		errors      int
	}{
		{"busy", []string{`{"errcode":-1,"errmsg":"system error"}`}, 1, 1, 0},
		{"token refused", []string{`{"errcode":40001,"errmsg":"invalid credential"}`}, 1, 1, 0},
		{"forbidden", []string{`{"errcode":48001,"errmsg":"api unauthorized"}`}, 0, 1, 1},
		{"connection broken", []string{"drop"}, 1, 1, 1},
		{"not JSON", []string{"<html>:0,</html>"}, 1, 1, 1}, // a proxy's page, after WeChat has sent it
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			f := newCheckingWeChat(t)
			m, app, _ := newReleaseCheck(t, f)
			logs := watchLog(app)
			f.refuse = tt.refuse
			f.allow("c", testedID, false)
			for i, want := range []int{tt.first, tt.then} {
				serve(t, m, platformSender(t).push("/", queryAuthCode(testedOriginal, "c")), nil)
				app.shared.work.Wait()
				if got := f.messages(); len(got) != want {
					t.Errorf("push %d: %d messages, want %d", i+1, len(got), want)
				}
			}
			if got := logs.FilterLevelExact(zapcore.ErrorLevel).Len(); got != tt.errors {
				t.Errorf("%d errors logged, want %d: %v", got, tt.errors, logs.All())
			}
		})
	}
}

// TestReleaseCheckMakesNoTenants: the test accounts' tokens are kept, but no backend hears that they have authorised the
// platform or left it.
func TestReleaseCheckMakesNoTenants(t *testing.T) {
	t.Parallel()
	f := newCheckingWeChat(t)
	_, app, e := newReleaseCheck(t, f)
	e.Forward = true
	forwarded := make(chan string, 64)
	next := caddyhttp.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) error {
		forwarded <- r.Header.Get("X-Wechat-Appid")
		return nil
	})
	events := func(appid string) (list []string) {
		f.allow("code-"+appid, appid, false)
		return []string{authorizedXML(appid, "code-"+appid), eventXML("unauthorized", "<AuthorizerAppid>"+appid+"</AuthorizerAppid>")}
	}
	for _, appid := range releaseCheckAccounts {
		if appid == "" {
			continue
		}
		list := events(appid)
		serve(t, e, eventSender(t).push("/wx/event", list[0]), next)
		if token, err := app.manager().Get(t.Context(), awaitExchange(t, app, appid)); err != nil || token.Value.Reveal() != "token-of-"+appid {
			t.Errorf("%s: no token: %v", appid, err)
		}
		serve(t, e, eventSender(t).push("/wx/event", list[1]), next)
	}
	app.shared.work.Wait()
	if len(forwarded) != 0 {
		t.Errorf("%d events forwarded", len(forwarded))
	}
	off := false
	app.Platforms[0].ReleaseCheck = &off
	for _, appid := range []string{testedID, authorizerID} {
		for _, message := range events(appid) {
			serve(t, e, eventSender(t).push("/wx/event", message), next)
		}
	}
	app.shared.work.Wait()
	if len(forwarded) != 4 {
		t.Errorf("%d events forwarded with release_check off, want 4", len(forwarded))
	}
}

// awaitExchange waits for the exchange of a code that an event brought, which it shares.
func awaitExchange(t *testing.T, app *App, appid string) tokens.Key {
	t.Helper()
	if _, err := app.manager().ExchangeAuthCode(t.Context(), platformID, appid, secret.New("code-"+appid)); err != nil {
		t.Fatal(err)
	}
	return tokens.AuthorizerKey(platformID, appid)
}

// TestReleaseCheckAccounts: five pairs and the historic one, none of them twice.
func TestReleaseCheckAccounts(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for original, appid := range releaseCheckAccounts {
		if !strings.HasPrefix(original, "gh_") || (appid == "") != (original == historic) || appid != "" && (!isAppID(appid) || seen[appid]) {
			t.Errorf("%s is %s", original, appid)
		}
		if appid != "" && !isReleaseCheckAccount(appid) {
			t.Errorf("%s is not known", appid)
		}
		seen[appid] = true
	}
	if len(seen) != 11 || isReleaseCheckAccount("") || isReleaseCheckAccount(authorizerID) {
		t.Errorf("%d accounts", len(seen))
	}
}

func TestSentNothing(t *testing.T) {
	t.Parallel()
	_, dial := (&http.Client{}).Get("http://127.0.0.1:1/")
	for _, tt := range []struct {
		err  error
		want bool
	}{
		{dial.(*url.Error).Err, true},
		{&tokens.APIError{Code: 61023, API: "/cgi-bin/component/api_authorizer_token"}, true},
		{&tokens.APIError{Code: 45015, API: customServiceAPI}, false},
		{&tokens.APIError{Code: 42001, API: customServiceAPI}, true},
		{fmt.Errorf("%w: %w", tokens.ErrUnreachable, io.ErrUnexpectedEOF), false},
	} {
		if got := sentNothing(tt.err); got != tt.want {
			t.Errorf("%v: %v", tt.err, got)
		}
	}
}
