package caddymodule

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-wechat/caddy-wechat/internal/stall"
)

const awaitedSite = `http://a.example.com {
	wechat_event /wx/event
	route /wx/message/* {
		wechat_message
		reverse_proxy BACKEND
	}
}
`

// hang has WeChat not answer what it is asked about accounts, until the test ends or answer is called.
func (s *sites) hang() (answer func()) {
	hangs := make(chan struct{})
	answer = sync.OnceFunc(func() { close(hangs) })
	s.hangs.Store(&hangs)
	s.t.Cleanup(answer)
	return answer
}

// event is the site's wechat_event.
func (s *sites) event() *Event {
	var look func(routes caddyhttp.RouteList) *Event
	look = func(routes caddyhttp.RouteList) *Event {
		for _, route := range routes {
			for _, h := range route.Handlers {
				switch h := h.(type) {
				case *Event:
					return h
				case *caddyhttp.Subroute:
					if e := look(h.Routes); e != nil {
						return e
					}
				}
			}
		}
		return nil
	}
	return look(s.servers["srv0"].Routes)
}

// until waits for something to become true.
func (s *sites) until(what string, is func() bool) {
	s.t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	limit := time.After(20 * time.Second)
	for !is() {
		select {
		case <-tick.C:
		case <-limit:
			s.t.Fatal(what)
		}
	}
}

// drop pushes until WeChat's patience ends, which it does at once: as soon as the push waits. It reports whether there was an answer.
func (s *sites) drop(r *http.Request) (answered bool) {
	s.t.Helper()
	ctx, hangUp := context.WithCancel(s.t.Context())
	defer hangUp()
	req, err := http.NewRequestWithContext(ctx, r.Method, s.server.URL+r.URL.RequestURI(), r.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	req.Host, req.Header = "a.example.com", r.Header
	e := s.event()
	before := e.awaiting.Load()
	var end sync.WaitGroup
	end.Go(func() {
		res, err := s.server.Client().Do(req)
		if err == nil {
			answered = true
			_ = res.Body.Close()
		} else if !errors.Is(err, context.Canceled) {
			s.t.Errorf("it was not the client that ended it: %v", err)
		}
	})
	s.until("no push waits", func() bool { return e.awaiting.Load() > before })
	hangUp()
	end.Wait()
	s.until("the push waits on", func() bool { return e.awaiting.Load() == before })
	return answered
}

// madeAgo is a text message to an account that was made so long ago; negative: it does not say when.
func madeAgo(to string, ago time.Duration, content string) string {
	m := strings.Replace(textMessage(content), ghID, to, 1)
	made := ""
	if ago >= 0 {
		made = strconv.FormatInt(time.Now().Add(-ago).Unix(), 10)
	}
	return strings.Replace(m, createTime, made, 1)
}

// TestMisdirectedUnknown: no message ever came to the right URL, so that the gateway knows no account by its gh_ id. Messages wait for the
// search, of which there is one for all, and are delivered, the first of them too.
func TestMisdirectedUnknown(t *testing.T) {
	s := newSites(t, filepath.Join(t.TempDir(), "storage"), awaitedSite)
	s.authorize()
	answer, e := s.hang(), s.event()
	const messages = 20
	var all sync.WaitGroup
	for n := range messages {
		all.Go(func() {
			wechat := platformSender(t)
			wechat.nonce = fmt.Sprint(n)
			got := s.push("a.example.com", wechat.push("/wx/event", madeAgo(ghID, 0, fmt.Sprintf("text %d", n))))
			if reply, err := wechat.codec.OpenReply([]byte(got.Body)); err != nil || string(reply) != backendReply {
				t.Errorf("answer %d %q: %v", got.Status, got.Body, err)
			}
		})
	}
	s.until("not all of them wait", func() bool { return e.awaiting.Load() == messages })
	if n := len(s.backend.copies()); n != 0 {
		t.Errorf("the backend got %d messages whose account is not known", n)
	}
	answer()
	all.Wait()
	seen := make(map[string]bool)
	for _, c := range s.backend.copies() {
		if seen[c.body] = true; c.path != "/wx/message/"+authorizerID {
			t.Errorf("delivered to %s", c.path)
		}
	}
	if len(seen) != messages || s.infos.Load() != 1 || e.awaiting.Load() != 0 {
		t.Errorf("%d messages were delivered, WeChat was asked %d times, %d wait", len(seen), s.infos.Load(), e.awaiting.Load())
	}
	if n := s.app.calls().inFlight(); n != 0 {
		t.Errorf("%d messages are in flight", n)
	}
	look(t, s.app).has(t, Yellow, codeMessageMisdirected, platformID, "they are handled")
	// An account that nobody knows: the search, which has come to its end, cannot tell it, and nobody waits.
	start, watch := time.Now(), stall.New(t)
	if got := s.push("a.example.com", platformSender(t).push("/wx/event", madeAgo("gh_stranger", 0, "lost"))); got.Body != "success" {
		t.Errorf("a stranger's: %d %q", got.Status, got.Body)
	}
	if took := watch.Since(start); took > learnWait/2 {
		t.Errorf("a stranger's message waited for %s", took)
	}
	if n := s.logs.FilterMessageSnippet("was not delivered").Len(); n != 1 {
		t.Errorf("the log says %d times that a message was not delivered", n)
	}
	look(t, s.app).has(t, Yellow, codeMessageMisdirected, platformID, "not delivered")
}

// TestMisdirectedHeld: a message whose account is not learned in time is left unanswered, as often as WeChat pushes it again. The last of its
// pushes is answered, whether its number or its time tells. Once the account is known the message is delivered.
func TestMisdirectedHeld(t *testing.T) {
	s := newSites(t, filepath.Join(t.TempDir(), "storage"), awaitedSite)
	s.authorize()
	answer := s.hang()
	wechat := platformSender(t)
	first, undated := madeAgo(ghID, 0, "first"), madeAgo(ghID, -1, "undated")
	for _, message := range []string{first, undated, undated} {
		if s.drop(wechat.push("/wx/event", message)) {
			t.Error("a push was answered while its account is looked for")
		}
	}
	s.until("a push was not counted as held", func() bool { return counted(t, s.app.metrics().pushes, "event", "held") == 3 })
	look(t, s.app).has(t, Yellow, codeMessageMisdirected, platformID, "WeChat pushes them again")
	if n := s.logs.FilterMessageSnippet("was not delivered").Len(); n != 0 {
		t.Errorf("the log says %d times that a message was not delivered, which WeChat pushes again", n)
	}
	start, watch := time.Now(), stall.New(t)
	var lasts sync.WaitGroup
	for name, message := range map[string]string{"by its number": undated, "by its time": madeAgo(ghID, lastAfter+time.Second, "late")} {
		lasts.Go(func() {
			if got := s.push("a.example.com", platformSender(t).push("/wx/event", message)); got.Status != http.StatusOK || got.Body != "success" {
				t.Errorf("the last push %s: %d %q", name, got.Status, got.Body)
			}
		})
	}
	lasts.Wait()
	if took := time.Since(start); took < learnWait || watch.Since(start) > wechatWait-time.Second {
		t.Errorf("the last pushes were answered after %s", took)
	}
	if n := s.logs.FilterMessageSnippet("was not delivered").Len(); n != 2 {
		t.Errorf("the log says %d times that a message was not delivered, want 2", n)
	}
	_, entries := feedJSON(t, s.app, "/wechat/feed")
	outcomes := make(map[string]int)
	for _, e := range entries {
		if e.Kind == feedEvent && e.What == "text" {
			outcomes[e.Outcome]++
		}
	}
	if outcomes[outcomeHeld] != 3 || outcomes[outcomeFailed] != 2 || len(outcomes) != 2 {
		t.Errorf("the feed says %v", outcomes)
	}
	answer()
	if got := s.push("a.example.com", wechat.push("/wx/event", first)); got.Status != http.StatusOK || got.Body == "success" {
		t.Errorf("the second push: %d %q", got.Status, got.Body)
	}
	if c := s.backend.copies(); len(c) != 1 || c[0].body != first {
		t.Errorf("the backend got %+v", c)
	}
}

// newSlowSites is a site whose backend says when a message has come, and answers it once the test is over.
func newSlowSites(t *testing.T, replyTimeout string) (s *sites, entered chan struct{}) {
	t.Helper()
	entered, over := make(chan struct{}, 2), make(chan struct{})
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		entered <- struct{}{}
		<-over
		_, _ = io.WriteString(w, backendReply)
	}))
	t.Cleanup(backend.Close)
	s = newSites(t, filepath.Join(t.TempDir(), "storage"), strings.NewReplacer(
		"BACKEND", backend.Listener.Addr().String(), "wechat_message", "wechat_message {\n\t\t\treply_timeout "+replyTimeout+"\n\t\t}").Replace(awaitedSite))
	s.authorize()
	t.Cleanup(func() { close(over) }) // before the servers are closed, which wait for their handlers
	return s, entered
}

// TestMisdirectedLastPushInTime: what the last push of a message waited is not the backend's any more, for WeChat does not wait longer.
func TestMisdirectedLastPushInTime(t *testing.T) {
	s, entered := newSlowSites(t, "2s")
	answer := s.hang()
	learned := time.AfterFunc(1500*time.Millisecond, answer)
	defer learned.Stop()
	start, watch := time.Now(), stall.New(t)
	if got := s.push("a.example.com", platformSender(t).push("/wx/event", madeAgo(ghID, lastAfter+time.Second, "late"))); got.Body != "success" {
		t.Errorf("%d %q", got.Status, got.Body)
	}
	if took := watch.Since(start); took > 2800*time.Millisecond {
		t.Errorf("WeChat waited for %s, want 2 s", took)
	}
	<-entered // it is delivered
}

// TestMisdirectedLastPushByItsNumber: wechat_message sees one push of a message of which two were left unanswered. It is the last all the same,
// whether its account became known before it came or while it waits: left unanswered, it would be an error notice to the user.
func TestMisdirectedLastPushByItsNumber(t *testing.T) {
	s, _ := newSlowSites(t, "1s")
	told := s.hang()
	messages := []string{madeAgo(ghID, -1, "undated"), madeAgo(ghID, -1, "undated")}
	for _, message := range messages {
		for range wechatPushes - 1 {
			if s.drop(platformSender(t).push("/wx/event", message)) {
				t.Fatal("a push was answered while its account is looked for")
			}
		}
	}
	for n, message := range messages {
		pushed, request := make(chan answer, 1), platformSender(t).push("/wx/event", message)
		go func() {
			defer close(pushed) // where it fails
			pushed <- s.push("a.example.com", request)
		}()
		if n == 0 {
			s.until("the push does not wait", func() bool { return s.event().awaiting.Load() == 1 })
			told()
		}
		if got := <-pushed; got.Status != http.StatusOK || got.Body != "success" {
			t.Errorf("the last push of message %d: %d %q", n, got.Status, got.Body)
		}
	}
}

// TestMisdirectedDoesNotWait: where waiting is of no use, or too many do, the answer is there at once.
func TestMisdirectedDoesNotWait(t *testing.T) {
	s := newSites(t, filepath.Join(t.TempDir(), "storage"), awaitedSite+`http://b.example.com {
	wechat_event /wx/event
	reverse_proxy BACKEND
}
`)
	s.authorize()
	s.hang()
	at := func(host, message string) answer {
		t.Helper()
		start, watch := time.Now(), stall.New(t)
		got := s.push(host, platformSender(t).push("/wx/event", message))
		if took := watch.Since(start); took > learnWait/2 {
			t.Errorf("the answer came after %s", took)
		}
		return got
	}
	xml := func(to, more string) string {
		return "<xml><ToUserName>" + to + "</ToUserName><FromUserName>" + openID + "</FromUserName><CreateTime>" + strconv.FormatInt(time.Now().Unix(), 10) + "</CreateTime>" + more + "</xml>"
	}
	for name, tt := range map[string]struct{ host, message string }{
		"no ToUserName":    {"a.example.com", xml("", "<MsgType>event</MsgType><Event>x</Event>")},
		"doctor's":         {"a.example.com", xml("gh_000000000000", "<MsgType>event</MsgType><Event>"+doctorEvent+"</Event>")},
		"no message route": {"b.example.com", madeAgo(ghID, 0, "x")},
	} {
		if got := at(tt.host, tt.message); got.Body != "success" {
			t.Errorf("%s: %d %q", name, got.Status, got.Body)
		}
	}
	for _, host := range []string{"a.example.com", "b.example.com"} {
		wechat := platformSender(t)
		got := at(host, strings.Replace(madeAgo(testedOriginal, 0, releaseCheckText), "<MsgId>", "<MsgId>1", 1))
		if reply, err := wechat.codec.OpenReply([]byte(got.Body)); err != nil || !strings.Contains(string(reply), releaseCheckText+"_callback") {
			t.Errorf("release check on %s: %d %q: %v", host, got.Status, got.Body, err)
		}
	}
	if n := s.infos.Load(); n != 0 {
		t.Errorf("a search asked %d times", n)
	}
	s.event().awaiting.Add(maxAwaiting)
	if got := at("a.example.com", madeAgo(ghID, 0, "x")); got.Body != "success" {
		t.Errorf("too many wait: %d %q", got.Status, got.Body)
	}
	if n := s.event().awaiting.Add(-maxAwaiting); n != 0 || s.infos.Load() != 0 {
		t.Errorf("%d wait, a search asked %d times", n, s.infos.Load())
	}
}

// TestMisdirectedWhileTheStoreIsAway: whose a message is may be known, and only the store does not say. It is left to WeChat's next push.
func TestMisdirectedWhileTheStoreIsAway(t *testing.T) {
	root := filepath.Join(t.TempDir(), "storage")
	s := newSites(t, root, awaitedSite)
	s.authorize()
	sum := sha256.Sum256([]byte(ghID))
	record := filepath.Join(root, "wechat", "v1", "username", hex.EncodeToString(sum[:1]), "x-"+hex.EncodeToString([]byte(ghID)))
	if err := os.MkdirAll(record, 0o700); err != nil { // so that it can be neither read nor written
		t.Fatal(err)
	}
	wechat := platformSender(t)
	message := madeAgo(ghID, 0, "hello")
	if s.drop(wechat.push("/wx/event", message)) {
		t.Error("a push was answered though its account may be known")
	}
	if n := s.logs.FilterMessageSnippet("was not delivered").Len() + int(s.infos.Load()); n != 0 {
		t.Errorf("log %v, and WeChat was asked %d times", s.logs.All(), s.infos.Load())
	}
	// The last push has no next one, and looks again.
	last, pushed := wechat.push("/wx/event", madeAgo(ghID, lastAfter+time.Second, "late")), make(chan answer, 1)
	go func() { pushed <- s.push("a.example.com", last) }()
	s.until("the last push does not wait", func() bool { return s.event().awaiting.Load() == 1 })
	if err := os.Remove(record); err != nil {
		t.Fatal(err)
	}
	if got := <-pushed; got.Body == "success" || len(s.backend.copies()) != 1 {
		t.Errorf("the last push: %d %q, the backend got %d messages", got.Status, got.Body, len(s.backend.copies()))
	}
	if got := s.push("a.example.com", wechat.push("/wx/event", message)); got.Body == "success" || len(s.backend.copies()) != 2 {
		t.Errorf("the second push: %d %q, the backend got %d messages", got.Status, got.Body, len(s.backend.copies()))
	}
}
