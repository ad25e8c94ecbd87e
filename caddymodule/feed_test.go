package caddymodule

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// numbered is the i-th of many entries.
func numbered(i int) *Entry {
	return &Entry{Kind: feedPush, AppID: fmt.Sprintf("wx%016x", i%7), What: fmt.Sprint(i), Outcome: outcomeOK, known: true}
}

func whats(entries []Entry) (list []string) {
	for _, e := range entries {
		list = append(list, e.What)
	}
	return list
}

func TestFeedAfter(t *testing.T) {
	t.Parallel()
	f := newFeed()
	if entries, next, missed := f.after(0, "", 10); len(entries) != 0 || next != f.base || missed != 0 {
		t.Errorf("empty: %v %d %d", entries, next, missed)
	}
	for i := range 5 {
		f.add(numbered(i))
	}
	entries, next, _ := f.after(0, "", 3)
	if got := whats(entries); !reflect.DeepEqual(got, []string{"2", "3", "4"}) {
		t.Errorf("the newest are %q", got)
	}
	f.add(numbered(5))
	f.add(numbered(6))
	entries, next, missed := f.after(next, "", 1)
	if got := whats(entries); !reflect.DeepEqual(got, []string{"5"}) || missed != 0 {
		t.Errorf("then %q, %d missed", got, missed)
	}
	entries, next, _ = f.after(next, "", 10)
	if got := whats(entries); !reflect.DeepEqual(got, []string{"6"}) {
		t.Errorf("then %q", got)
	}
	// More than there is room for.
	for i := range feedEntries + 10 {
		f.add(numbered(7 + i))
	}
	entries, _, missed = f.after(next, "", 2*feedEntries)
	if len(entries) != feedEntries || missed != 10 || entries[0].What != "17" {
		t.Errorf("%d entries from %s on, %d missed", len(entries), entries[0].What, missed)
	}
	// With an account, what belongs to others is passed over, and not asked for again.
	entries, next, _ = f.after(f.seq.Load()-7, numbered(3).AppID, 10)
	if len(entries) != 1 || entries[0].AppID != numbered(3).AppID || next != f.seq.Load() {
		t.Errorf("of one account %v, next %d", entries, next)
	}
	// A seq of an earlier process, and one that is to come.
	if entries, _, missed = f.after(17, "", 5); len(entries) != 5 || missed == 0 || missed > 2*feedEntries {
		t.Errorf("an earlier process's: %d, %d missed", len(entries), missed)
	}
	if entries, next, _ = f.after(1<<60, "", 5); len(entries) != 5 || next != f.seq.Load() {
		t.Errorf("a later one: %d", len(entries))
	}
}

// What is being written is not passed over: it comes with the next answer.
func TestFeedWaitsForTheWriter(t *testing.T) {
	t.Parallel()
	f := newFeed()
	f.add(numbered(0))
	gap := f.seq.Add(1) // somebody is about to write
	f.add(numbered(2))
	for _, after := range []uint64{0, f.base + 0, gap - 1} {
		if _, next, _ := f.after(after, "", 10); next != gap-1 {
			t.Errorf("after %d: next is %d, want %d", after, next, gap-1)
		}
	}
	e := numbered(1)
	e.Seq = gap
	var r record
	f.all.put(gap, &r, r.pack(e, f.epoch))
	if entries, _, _ := f.after(gap-1, "", 10); len(entries) != 2 {
		t.Errorf("then %q", whats(entries))
	}
}

// Refusals outlast any traffic, and those that strangers cause do not push the others out.
func TestFeedRefusals(t *testing.T) {
	t.Parallel()
	f := newFeed()
	add := func(n int, e Entry) {
		for range n {
			entry := e
			f.add(&entry)
		}
	}
	add(1, Entry{Kind: feedCall, AppID: accountID, Outcome: outcomeRefused, ErrCode: 61004, RID: "rid-1", wechats: true, known: true})
	add(2*feedEntries, Entry{Kind: feedPush, AppID: accountID, Outcome: outcomeOK, known: true})
	add(2*refusalEntries, Entry{Kind: feedPush, AppID: strangerID, Outcome: outcomeRefused, Reason: "forged", stranger: true})
	all := f.refused(10*refusalEntries, func(*Entry) bool { return true })
	if len(all) != strangerEntries+1 || all[0].Seq <= all[1].Seq {
		t.Fatalf("%d refusals, of %d and %d", len(all), all[0].Seq, all[1].Seq)
	}
	found := f.refused(10, func(e *Entry) bool { return e.RID == "rid-1" })
	if len(found) != 1 || found[0].Meaning == nil || found[0].Remedy.ZH == "" {
		t.Errorf("by its request id: %+v", found)
	}
	lastPush, lastCall, lastError := f.of(accountID)
	if lastPush == nil || lastCall != nil || lastError == nil || lastError.RID != "rid-1" {
		t.Errorf("the account's last: %v %v %v", lastPush, lastCall, lastError)
	}
	if _, _, lastError := f.of(strangerID); lastError != nil {
		t.Error("a stranger made an account up")
	}
}

// The table of accounts is bounded, and what is in use stays in it.
func TestFeedAccountsAreBounded(t *testing.T) {
	t.Parallel()
	f := newFeed()
	busy := fmt.Sprintf("wx%016x", uint64(1)<<60)
	for i := range 3 * maxFeedAccounts {
		f.add(&Entry{Kind: feedPush, AppID: fmt.Sprintf("wx%08x%08x", i, uint64(i)*0x9e3779b1), Outcome: outcomeOK, known: true})
		if i%10 == 0 {
			f.add(&Entry{Kind: feedPush, AppID: busy, Outcome: outcomeOK, known: true})
		}
	}
	n := 0
	for i := range f.shards {
		s := &f.shards[i]
		if n += len(s.byAppID); len(s.byAppID) != len(s.accounts) {
			t.Errorf("%d accounts in %d places", len(s.byAppID), len(s.accounts))
		}
	}
	if n > maxFeedAccounts || n < maxFeedAccounts/2 {
		t.Errorf("%d accounts", n)
	}
	if lastPush, _, _ := f.of(busy); lastPush == nil {
		t.Error("the account in use was forgotten")
	}
}

func TestFeedIsSafe(t *testing.T) {
	t.Parallel()
	f := newFeed()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range 3000 {
				f.add(numbered(i))
			}
		})
	}
	var seen, missed uint64
	after := f.base
	for seen+missed < 4*3000 {
		entries, next, gone := f.after(after, "", 100)
		seen, missed, after = seen+uint64(len(entries)), missed+gone, next
		_, _, _ = f.of(numbered(1).AppID)
	}
	wg.Wait()
	if seen+missed != 4*3000 {
		t.Errorf("%d seen and %d missed of %d", seen, missed, 4*3000)
	}
}

func TestWords(t *testing.T) {
	t.Parallel()
	var words wordTable
	for _, tt := range []struct{ kind, event, want string }{
		{"text", "", "text"}, {"event", "CLICK", "event CLICK"}, {"event", "CLICK", "event CLICK"},
		{"event", "user@example.com", otherWord}, {strings.Repeat("x", maxWord+1), "", otherWord}, {"", "", otherWord}, {"event", "点击", otherWord},
	} {
		if got := words.name(tt.kind, tt.event); got != tt.want {
			t.Errorf("%q %q: %q, want %q", tt.kind, tt.event, got, tt.want)
		}
	}
	for i := range 2 * maxWords {
		words.name("event", fmt.Sprint("e", i))
	}
	if n := len(*words.known.Load()); n != maxWords {
		t.Errorf("%d words", n)
	}
	if got := words.name("event", "CLICK"); got != "event CLICK" {
		t.Errorf("then %q", got)
	}
}

// feedJSON asks an operation for entries.
func feedJSON(t *testing.T, app *App, path string) (text string, entries []Entry) {
	t.Helper()
	rec := adminCall(adminMux(t, app), http.MethodGet, path, "")
	var answer struct{ Entries, Refusals []Entry }
	if err := json.Unmarshal(rec.Body.Bytes(), &answer); rec.Code != http.StatusOK || err != nil {
		t.Fatalf("%s: %d %s %v", path, rec.Code, rec.Body, err)
	}
	return rec.Body.String(), append(answer.Entries, answer.Refusals...)
}

// find returns the only entry that is as wanted.
func find(t *testing.T, entries []Entry, want func(e Entry) bool) Entry {
	t.Helper()
	var found []Entry
	for _, e := range entries {
		if want(e) {
			found = append(found, e)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d entries of %+v", len(found), entries)
	}
	return found[0]
}

// What is pushed is in the feed by its name and its end, and nothing of what it says.
func TestFeedOfPushes(t *testing.T) {
	t.Parallel()
	app, ctx := newTestApp(t, testConfig(""))
	m := &Message{FallbackText: "hidden fallback"}
	if err := m.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	path := "/wx/message/" + authorizerID
	s := platformSender(t)
	ok := caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
		_, err := io.WriteString(w, replyXML)
		return err
	})
	broken := caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
		_, err := io.WriteString(w, "<html>hidden page")
		return err
	})
	event := strings.Replace(strings.Replace(textMessage("hidden words"), "<![CDATA[text]]>", "<![CDATA[event]]>", 1),
		"</xml>", "<Event><![CDATA[CLICK]]></Event><EventKey><![CDATA[hidden-key]]></EventKey></xml>", 1)
	serve(t, m, s.push(path, textMessage("hidden words")), ok)
	serve(t, m, s.push(path, event), ok)
	serve(t, m, s.push(path, textMessage("hidden words")), broken)
	forged := s.push(path, textMessage("hidden words"))
	forged.URL.RawQuery = strings.Replace(forged.URL.RawQuery, "msg_signature=", "msg_signature=0", 1)
	serve(t, m, forged, nil)
	late := platformSender(t)
	late.at = late.at.Add(-time.Hour)
	serve(t, m, late.push(path, textMessage("hidden words")), nil)

	e := &Event{}
	if err := e.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	serve(t, e, s.push("/wx/event", "<xml><AppId>"+platformID+"</AppId><CreateTime>"+createTime+
		"</CreateTime><InfoType>component_verify_ticket</InfoType><ComponentVerifyTicket>ticket@@@hidden</ComponentVerifyTicket></xml>"), nil)

	text, entries := feedJSON(t, app, "/wechat/feed")
	for _, secret := range []string{"hidden", openID, ghID, platformToken, platformKey, "signature=", "1372623149"} {
		if strings.Contains(text, secret) {
			t.Errorf("the feed shows %q: %s", secret, text)
		}
	}
	entries = slices.DeleteFunc(entries, func(e Entry) bool { return e.Kind == feedCall }) // the gateway's own, of which there is nobody to answer
	if len(entries) != 6 {
		t.Fatalf("%d entries: %s", len(entries), text)
	}
	for i, want := range []Entry{
		{Kind: "push", AppID: authorizerID, Platform: platformID, What: "text", Outcome: "ok"},
		{Kind: "push", AppID: authorizerID, Platform: platformID, What: "event CLICK", Outcome: "ok"},
		{Kind: "push", AppID: authorizerID, Platform: platformID, What: "text", Outcome: "failed", Reason: "it is neither empty, nor success, nor xml: it begins with an HTML page"},
		{Kind: "push", AppID: authorizerID, Outcome: "refused", Status: 403, Reason: errSignature.reason},
		{Kind: "push", AppID: authorizerID, Platform: platformID, Outcome: "refused", Status: 403, Reason: errStale.reason},
		{Kind: "event", Platform: platformID, What: "component_verify_ticket", Outcome: "ok"},
	} {
		got := entries[i]
		if got.Time.IsZero() || time.Since(got.Time) > time.Minute || got.Seq == 0 {
			t.Errorf("%d: at %v", i, got.Time)
		}
		got.Seq, got.Time, got.TookMS = 0, time.Time{}, 0
		if got != want {
			t.Errorf("%d is %+v, want %+v", i, got, want)
		}
	}
	if _, refused := feedJSON(t, app, "/wechat/refusals?appid="+authorizerID); len(refused) != 3 {
		t.Errorf("refusals %+v", refused)
	}
	lastPush, _, lastError := app.shared.feed.of(authorizerID)
	if lastPush.What != "event CLICK" || lastError.Reason != errStale.reason {
		t.Errorf("last push %+v, last error %+v", lastPush, lastError)
	}
}

// Calls are in the feed by their path, with what WeChat said to them, and refusals can be found by its request id.
func TestFeedOfCalls(t *testing.T) {
	wechat := newFakeWeChat(t)
	const rid = "64f1e2d3-0a1b2c3d-4e5f6071"
	wechat.answer(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.RawQuery, "next") {
			_, _ = io.WriteString(w, `{"errcode":48001,"errmsg":"api unauthorized hidden-errmsg rid: `+rid+`"}`)
			return
		}
		_, _ = io.WriteString(w, `{"errcode":0,"nickname":"hidden-name"}`)
	})
	g := newGateway(t, wechat, "", "")
	call := func(path, key string) {
		r := httptest.NewRequest(http.MethodGet, path, nil)
		r.Header.Set("Authorization", "Bearer "+key)
		serve(t, g.api, r, nil)
	}
	call("/"+accountID+"/cgi-bin/user/info?openid="+openID+"&lang=hidden-lang", crmKey)
	call("/"+accountID+"/cgi-bin/user/get?next_openid="+openID, crmKey)
	call("/"+accountID+"/cgi-bin/user/info?openid="+openID, "hidden-wrong-key-0123456")
	call("/"+platformID+"/cgi-bin/component/api_query_auth", panelKey)
	call("/wechat/users/hidden-tracking-id", crmKey)
	call("/"+authorizerID+"/cgi-bin/user/info", hashedKey) // there is no ticket

	text, entries := feedJSON(t, g.app, "/wechat/feed")
	for _, secret := range []string{"hidden", openID, "REALTOKEN", crmKey, panelKey, hashedKey, "account-secret", "platform-secret"} {
		if strings.Contains(text, secret) {
			t.Errorf("the feed shows %q: %s", secret, text)
		}
	}
	wants := []Entry{
		{AppID: accountID, Client: "crm", What: "/cgi-bin/user/info", Outcome: "ok", Status: 200},
		{AppID: accountID, Client: "crm", What: "/cgi-bin/user/get", Outcome: "refused", Status: 200, ErrCode: 48001, RID: rid},
		{AppID: accountID, What: "/cgi-bin/user/info", Outcome: "refused", Status: 401, ErrCode: codeInvalidAppSecret},
		{AppID: platformID, Client: "panel", What: "/cgi-bin/component/api_query_auth", Outcome: "refused", Status: 403, ErrCode: codeUnauthorizedAPI},
		{Client: "crm", What: "/wechat/users/…", Outcome: "refused", Status: 404},
		{AppID: authorizerID, Client: "hashed", What: "/cgi-bin/user/info", Outcome: "failed", Status: 200, ErrCode: codeNoTicket},
	}
	if len(entries) != len(wants) {
		t.Fatalf("%d entries: %s", len(entries), text)
	}
	for i, want := range wants {
		got := entries[i]
		if explained := got.Meaning != nil && got.Remedy != nil; explained != (want.RID != "") {
			t.Errorf("%d is explained: %v", i, explained)
		}
		if said := got.Reason != ""; said != (i >= 2 && i != 4) {
			t.Errorf("%d has the reason %q", i, got.Reason)
		}
		got.Seq, got.Time, got.TookMS, got.Reason, got.Meaning, got.Remedy = 0, time.Time{}, 0, "", nil, nil
		want.Kind = "call"
		if got != want {
			t.Errorf("%d is %+v, want %+v", i, got, want)
		}
	}
	for query, n := range map[string]int{"rid=" + rid: 1, "rid=other": 0, "code=48001": 2, "code=61005": 1, "limit=1": 1, "appid=" + strangerID: 0} {
		if _, found := feedJSON(t, g.app, "/wechat/refusals?"+query); len(found) != n {
			t.Errorf("%s: %d refusals, want %d", query, len(found), n)
		}
	}
	_, lastCall, lastError := g.app.shared.feed.of(accountID)
	if lastCall.What != "/cgi-bin/user/info" || lastError.Status != 401 {
		t.Errorf("last call %+v, last error %+v", lastCall, lastError)
	}
}

// What goes wrong with the gateway's own calls is there too, and so are authorizations.
func TestFeedOfTheGatewaysOwn(t *testing.T) {
	t.Parallel()
	app, _ := newTestApp(t, testConfig(""))
	w := &watcher{app.shared.health, app.shared}
	k := tokens.AuthorizerKey(platformID, authorizerID)
	api := &tokens.APIError{Code: 61004, Msg: "hidden", RID: "rid-1", API: "/cgi-bin/component/api_authorizer_token"}
	for what, err := range map[tokens.Happening]error{
		tokens.TicketReceived: nil, tokens.TokenRenewed: nil, tokens.Authorized: nil, tokens.Unauthorized: nil, tokens.TokenRogue: nil,
		tokens.TokenFailed: fmt.Errorf("wrapped: %w", api), tokens.CallFailed: tokens.ErrUnreachable,
	} {
		w.Happened(what, k, err)
	}
	text, entries := feedJSON(t, app, "/wechat/feed?appid="+authorizerID)
	if len(entries) != 5 || strings.Contains(text, "hidden") {
		t.Errorf("%s", text)
	}
	failed := find(t, entries, func(e Entry) bool { return e.RID == "rid-1" })
	if failed.What != api.API || failed.Outcome != "refused" || failed.Remedy == nil || !strings.Contains(failed.Reason, "authorizer token") {
		t.Errorf("%+v", failed)
	}
}

func TestFeedOperationsRefuse(t *testing.T) {
	t.Parallel()
	app, _ := newTestApp(t, testConfig(""))
	mux := adminMux(t, app)
	for path, want := range map[string]string{
		"/wechat/feed?after=x": "after: want a number", "/wechat/feed?after=-1": "after: want the next", "/wechat/feed?limit=0": "limit: want a number from 1 to 500",
		"/wechat/feed?limit=501": "limit", "/wechat/feed?appid=x": "appid: want wx", "/wechat/refusals?code=x": "code: want a number",
		"/wechat/explain": "code: want an errcode", "/wechat/explain?code=x": "code: want an errcode",
	} {
		if rec := adminCall(mux, http.MethodGet, path, ""); rec.Code != http.StatusBadRequest || !strings.Contains(rec.Body.String(), want) {
			t.Errorf("%s: %d %s", path, rec.Code, rec.Body)
		}
	}
	if rec := adminCall(adminMux(t, nil), http.MethodGet, "/wechat/feed", ""); rec.Code != http.StatusNotFound {
		t.Errorf("without the app: %d", rec.Code)
	}
	rec := adminCall(mux, http.MethodGet, "/wechat/explain?code=61004", "")
	var out strings.Builder
	if err := explain(&out, []string{"61004"}, true); err != nil || strings.TrimSpace(out.String()) != rec.Body.String() {
		t.Errorf("the command says %s, the operation %s", out.String(), rec.Body)
	}
}
