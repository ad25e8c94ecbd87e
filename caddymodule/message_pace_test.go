package caddymodule

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"
)

// pacer pushes messages as WeChat does: it drops a push that is not answered in 5 s and pushes it again, three times in all.
type pacer struct {
	t    *testing.T
	m    *Message
	next caddyhttp.Handler
	path string
	// proto is the major version of HTTP; 0: 1.
	proto int
	// lose says which of a message's pushes never arrive.
	lose func(attempt int) bool
}

// seen is what came of a message.
type seen struct {
	answer  string        // of the push that was answered, decrypted
	after   time.Duration // from the first push to the answer
	attempt int           // which push was answered; 0: none
}

// newPacer is for use in a bubble of synctest. The account is a plain one, whose pushes need no manager.
func newPacer(t *testing.T, configure func(*Message), next caddyhttp.HandlerFunc) *pacer {
	t.Helper()
	// A bubble's clock starts in the year 2000, when timestamps had nine digits.
	time.Sleep(time.Until(time.Date(2026, 11, 28, 0, 0, 0, 0, time.UTC)))
	m, _ := newMessage(t, configure)
	m.app.logger = zap.NewNop()
	t.Cleanup(synctest.Wait) // an answer is there before its handler is through, and while one is not the app waits for nothing when it ends
	return &pacer{t: t, m: m, next: next, path: "/" + accountID}
}

// paceMessage is a text that is written now.
func paceMessage(id int) string {
	return fmt.Sprintf("<xml><ToUserName>%s</ToUserName><FromUserName>%s</FromUserName><CreateTime>%d</CreateTime>"+
		"<MsgType>text</MsgType><Content>x</Content><MsgId>%d</MsgId></xml>", ghID, openID, time.Now().Unix(), id)
}

// push sends one push and waits at most for 5 s, as WeChat does. It reports false when there was no answer.
func (p *pacer) push(message string) (answer string, answered bool) {
	s := accountSender(p.t)
	r := s.push(p.path, message)
	r.ProtoMajor = max(r.ProtoMajor, p.proto)
	ctx, cancel := context.WithTimeout(r.Context(), wechatWait)
	defer cancel()
	rec := httptest.NewRecorder()
	w := &paceWriter{ResponseRecorder: rec, flushed: make(chan struct{})}
	r = caddyhttp.PrepareRequest(r.WithContext(ctx), caddy.NewReplacer(), w, &caddyhttp.Server{})
	returned := make(chan bool, 1)
	go func() {
		defer func() {
			v := recover()
			if v != nil && v != http.ErrAbortHandler {
				panic(v)
			}
			returned <- v == nil
		}()
		if err := p.m.ServeHTTP(w, r, p.next); err != nil {
			p.t.Errorf("handler returned %v", err)
		}
	}()
	select {
	case ok := <-returned:
		if !ok || ctx.Err() != nil {
			return "", false
		}
	case <-w.flushed:
	case <-ctx.Done():
		return "", false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	body := rec.Body.String()
	if rec.Code != http.StatusOK {
		p.t.Errorf("status %d", rec.Code)
	}
	if body == "" || body == "success" {
		return body, true
	}
	text, err := s.codec.OpenReply([]byte(body))
	if err != nil {
		p.t.Errorf("answer %q: %v", body, err)
	}
	return string(text), true
}

// paceWriter tells when an answer was flushed before the handler returned.
type paceWriter struct {
	*httptest.ResponseRecorder
	mu      sync.Mutex
	flushed chan struct{}
}

func (w *paceWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ResponseRecorder.Write(b)
}

func (w *paceWriter) FlushError() error { close(w.flushed); return nil }

// send pushes a message until it is answered.
func (p *pacer) send(message string) seen {
	began := time.Now()
	for attempt := 1; attempt <= 3; attempt++ {
		if p.lose != nil && p.lose(attempt) {
			time.Sleep(wechatWait)
			continue
		}
		if answer, ok := p.push(message); ok {
			return seen{answer, time.Since(began), attempt}
		}
	}
	return seen{after: time.Since(began)}
}

// slowBackend answers after a time, and counts its runs.
type slowBackend struct {
	after time.Duration
	text  string
	runs  atomic.Int32
}

func (b *slowBackend) ServeHTTP(w http.ResponseWriter, r *http.Request) error {
	b.runs.Add(1)
	select {
	case <-time.After(b.after):
	case <-r.Context().Done():
		return r.Context().Err()
	}
	_, _ = io.WriteString(w, b.text)
	return nil
}

// TestPace: what the user sees and when, by how long the backend takes.
func TestPace(t *testing.T) {
	t.Parallel()
	const slow = "<Content><![CDATA[请稍候]]></Content>"
	for _, tt := range []struct {
		after   time.Duration
		reply   string
		want    string
		attempt int
		by      time.Duration
	}{
		{0, replyXML, replyXML, 1, 0},
		{4900 * time.Millisecond, replyXML, replyXML, 1, 4900 * time.Millisecond},
		{5100 * time.Millisecond, replyXML, replyXML, 2, 5100 * time.Millisecond},
		{9900 * time.Millisecond, replyXML, replyXML, 2, 9900 * time.Millisecond},
		{10100 * time.Millisecond, replyXML, replyXML, 3, 10100 * time.Millisecond},
		{14400 * time.Millisecond, replyXML, replyXML, 3, 14400 * time.Millisecond},
		{14600 * time.Millisecond, replyXML, slow, 3, 14500 * time.Millisecond},
		{30 * time.Second, replyXML, slow, 3, 14500 * time.Millisecond},
		{3 * time.Minute, replyXML, slow, 3, 14500 * time.Millisecond}, // beyond backend_timeout
		{7 * time.Second, "success", "success", 2, 7 * time.Second},
		{12 * time.Second, "<html>", "稍后回复您", 3, 12 * time.Second},
	} {
		t.Run(fmt.Sprint(tt.after, " ", kindOfText([]byte(tt.reply)).EN), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				b := &slowBackend{after: tt.after, text: tt.reply}
				p := newPacer(t, func(m *Message) {
					m.SlowReply, m.SlowReplyText, m.FallbackText = slowText, "请稍候", "稍后回复您"
				}, b.ServeHTTP)
				got := p.send(paceMessage(1))
				if !strings.Contains(got.answer, tt.want) || got.attempt != tt.attempt || got.after != tt.by {
					t.Errorf("saw %q at push %d after %s, want %q at push %d after %s",
						got.answer, got.attempt, got.after, tt.want, tt.attempt, tt.by)
				}
				synctest.Wait()
				time.Sleep(2 * time.Minute) // until the backend is done
				if runs := b.runs.Load(); runs != 1 {
					t.Errorf("backend ran %d times", runs)
				}
				if n := p.m.app.calls().inFlight(); n != 0 || len(p.m.places) != 0 {
					t.Errorf("%d in flight, %d places taken", n, len(p.m.places))
				}
			})
		})
	}
}

// TestSlowReplyToAMiniProgram: its users would read WeChat's error notice in the place of a text.
func TestSlowReplyToAMiniProgram(t *testing.T) {
	t.Parallel()
	for msgType, want := range map[string]string{"miniprogrampage": "success", "text": "请稍候"} {
		synctest.Test(t, func(t *testing.T) {
			b := &slowBackend{after: 30 * time.Second, text: replyXML}
			p := newPacer(t, func(m *Message) { m.SlowReply, m.SlowReplyText = slowText, "请稍候" }, b.ServeHTTP)
			got := p.send(strings.Replace(paceMessage(1), "<MsgType>text<", "<MsgType>"+msgType+"<", 1))
			if !strings.Contains(got.answer, want) || got.attempt != 3 {
				t.Errorf("%s: saw %q at push %d, want %q", msgType, got.answer, got.attempt, want)
			}
			time.Sleep(time.Minute) // until the backend is done
		})
	}
}

// TestBackendTimeout: what a backend's handler sees of the end of its work, in its own context and in those below it, whether that
// comes before the push ends or long after.
func TestBackendTimeout(t *testing.T) {
	t.Parallel()
	type key struct{}
	for _, limit := range []time.Duration{defaultReplyTimeout, time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			began, ended := time.Time{}, make(chan time.Duration, 1)
			backend := func(_ http.ResponseWriter, r *http.Request) error {
				began = time.Now()
				if by, ok := r.Context().Deadline(); !ok || by.Sub(began) != limit {
					t.Errorf("the deadline is in %v, want %v", by.Sub(began), limit)
				}
				if r.Context().Err() != nil {
					t.Error("it ends before it begins")
				}
				below, cancel := context.WithCancel(context.WithValue(r.Context(), key{}, "value"))
				defer cancel()
				<-below.Done()
				ended <- time.Since(began)
				if err := r.Context().Err(); err != context.DeadlineExceeded { //nolint:errorlint // a context's own
					t.Errorf("it ended with %v", err)
				}
				if r.Context().Err() != context.DeadlineExceeded { //nolint:errorlint // a context's own
					t.Error("it ends otherwise the second time")
				}
				if cause := context.Cause(below); cause != errTooSlow { //nolint:errorlint // our own, never wrapped
					t.Errorf("what is below ended for %v", cause)
				}
				return context.Cause(below)
			}
			p := newPacer(t, func(m *Message) { m.BackendTimeout = caddy.Duration(limit) }, backend)
			p.send(paceMessage(1))
			if took := <-ended; took != limit {
				t.Errorf("it had %v, want %v", took, limit)
			}
			synctest.Wait()
			if n := p.m.app.calls().inFlight(); n != 0 || len(p.m.places) != 0 {
				t.Errorf("%d in flight, %d places taken", n, len(p.m.places))
			}
		})
	}
}

// TestWorkValues: the values of the request are there, and what ends with the push does not end the work.
func TestWorkValues(t *testing.T) {
	type key struct{}
	repl, vars := caddy.NewReplacer(), map[string]any{"a": 1}
	of, hangUp := context.WithCancel(context.WithValue(t.Context(), key{}, "value"))
	of = context.WithValue(context.WithValue(of, caddy.ReplacerCtxKey, repl), caddyhttp.VarsCtxKey, vars)
	w := newWork(of, nil, time.Now().Add(time.Hour))
	hangUp()
	if w.Err() != nil {
		t.Error("it ended with the push")
	}
	below, cancel := context.WithCancel(context.WithValue(w, key{}, "other"))
	defer cancel()
	if got := w.Value(key{}); got != "value" {
		t.Errorf("a value is %v", got)
	}
	if below.Value(caddy.ReplacerCtxKey) != repl || caddyhttp.GetVar(below, "a") != 1 || w.Value("none") != nil {
		t.Error("Caddy's values are others")
	}
	w.cancel(nil)
	if w.Err() != context.Canceled || below.Err() != context.Canceled { //nolint:errorlint // a context's own
		t.Errorf("it ended with %v, and below with %v", w.Err(), below.Err())
	}
}

// TestPaceLostArrivals: the last push is known by its time where arrivals are missing.
func TestPaceLostArrivals(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		lost    []int
		attempt int
		by      time.Duration
		runs    int32
	}{
		"second":           {[]int{2}, 3, 14500 * time.Millisecond, 1},
		"first":            {[]int{1}, 3, 14500 * time.Millisecond, 1},
		"first and second": {[]int{1, 2}, 3, 14500 * time.Millisecond, 1}, // the first to come is the last
		"third":            {[]int{3}, 0, 15 * time.Second, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				b := &slowBackend{after: 30 * time.Second, text: replyXML}
				p := newPacer(t, nil, b.ServeHTTP)
				p.lose = func(attempt int) bool { return slices.Contains(tt.lost, attempt) }
				got := p.send(paceMessage(1))
				if got.attempt != tt.attempt || got.after != tt.by || (tt.attempt > 0 && got.answer != "success") {
					t.Errorf("%+v, want push %d after %s", got, tt.attempt, tt.by)
				}
				time.Sleep(time.Minute)
				if runs := b.runs.Load(); runs != tt.runs {
					t.Errorf("backend ran %d times", runs)
				}
			})
		})
	}
}

// TestPaceLastWhateverPushesSays: WeChat pushes three times, so that a push nine seconds after the first, or after its message was made, is
// the last, and one sooner than that is not but for its number.
func TestPaceLastWhateverPushesSays(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		pushes int
		lost   int // the attempt that does not come
		take   time.Duration
		want   seen
	}{
		"more than WeChat makes":                 {5, 0, 30 * time.Second, seen{"success", 14500 * time.Millisecond, 3}},
		"more than WeChat makes, the first lost": {4, 1, 30 * time.Second, seen{"success", 14500 * time.Millisecond, 3}},
		"fewer, the first lost":                  {2, 1, 8 * time.Second, seen{replyXML, 13 * time.Second, 3}},
		"fewer":                                  {2, 0, 30 * time.Second, seen{"success", 9500 * time.Millisecond, 2}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				b := &slowBackend{after: tt.take, text: replyXML}
				p := newPacer(t, func(m *Message) { m.Pushes = tt.pushes }, b.ServeHTTP)
				p.lose = func(attempt int) bool { return attempt == tt.lost }
				if got := p.send(paceMessage(1)); got != tt.want {
					t.Errorf("%+v, want %+v", got, tt.want)
				}
				time.Sleep(time.Minute)
				if runs := b.runs.Load(); runs != 1 {
					t.Errorf("backend ran %d times", runs)
				}
			})
		})
	}
}

// TestPaceLastByTheClock: nine seconds after the first push, or after the message was made, and not a second sooner.
func TestPaceLastByTheClock(t *testing.T) {
	t.Parallel()
	now, pace := time.Unix(1_800_000_000, 0), pace{3, defaultReplyTimeout}
	for n, tt := range []struct {
		after, age time.Duration // of the second push to come
		last       bool
	}{
		{8999 * time.Millisecond, 8 * time.Second, false},
		{9 * time.Second, 8 * time.Second, true},
		{5 * time.Second, 9 * time.Second, true},
	} {
		table, id := newCallTable(func(string) {}), pushID{byte(n)}
		if a := table.arrive(id, now, 0, now.Unix()+300, pace); a.last || !a.by.Equal(now.Add(6*time.Second)) {
			t.Errorf("the first: %+v", a)
		}
		at := now.Add(tt.after)
		a := table.arrive(id, at, tt.age, now.Unix()+300, pace)
		if wait := a.by.Sub(at); a.last != tt.last || tt.last && wait != 4500*time.Millisecond || !tt.last && wait != 6*time.Second {
			t.Errorf("%s after the first, %s old: last %v, until %s", tt.after, tt.age, a.last, wait)
		}
	}
}

// TestPaceUnreachableUntilTheLastPush: where the last push does not come, a backend is dialled for as long as it could have come, and no longer.
func TestPaceUnreachableUntilTheLastPush(t *testing.T) {
	t.Parallel()
	for _, pushes := range []int{2, 3, 5} {
		synctest.Test(t, func(t *testing.T) {
			var began, last time.Time
			p := newPacer(t, func(m *Message) { m.Pushes = pushes }, func(http.ResponseWriter, *http.Request) error {
				last = time.Now()
				return reverseproxy.NewDialError(errors.New("refused"))
			})
			began = time.Now()
			p.lose = func(attempt int) bool { return attempt > 1 }
			if got := p.send(paceMessage(1)); got.attempt != 0 {
				t.Errorf("pushes %d: %+v", pushes, got)
			}
			time.Sleep(time.Minute)
			synctest.Wait()
			want := time.Duration(min(pushes, 3)-1)*wechatWait + defaultReplyTimeout - lostMargin
			if tried := last.Sub(began); tried != want {
				t.Errorf("pushes %d: dialled for %s, want %s", pushes, tried, want)
			}
		})
	}
}

// TestPaceClockSkew: a gateway's clock that is four minutes off changes nothing, for the age of a message is WeChat's own.
func TestPaceClockSkew(t *testing.T) {
	t.Parallel()
	for _, skew := range []time.Duration{-4 * time.Minute, 4 * time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			b := &slowBackend{after: 12 * time.Second, text: replyXML}
			p := newPacer(t, nil, b.ServeHTTP)
			wechat := time.Now().Add(skew)
			message := strings.Replace(paceMessage(1), fmt.Sprint(time.Now().Unix()), fmt.Sprint(wechat.Unix()), 1)
			for attempt := range 3 {
				s := accountSender(t)
				s.at = time.Now().Add(skew)
				ctx, cancel := context.WithTimeout(t.Context(), wechatWait)
				rec := httptest.NewRecorder()
				r := caddyhttp.PrepareRequest(s.push(p.path, message).WithContext(ctx), caddy.NewReplacer(), rec, &caddyhttp.Server{})
				done := make(chan struct{})
				go func() {
					defer close(done)
					defer func() {
						if v := recover(); v != nil && v != http.ErrAbortHandler {
							panic(v)
						}
					}()
					_ = p.m.ServeHTTP(rec, r, p.next)
				}()
				<-ctx.Done()
				cancel()
				synctest.Wait()
				select {
				case <-done:
					reply, err := s.codec.OpenReply(rec.Body.Bytes())
					if attempt == 1 && rec.Body.Len() > 0 {
						t.Errorf("skew %s: push 2 was answered %q", skew, rec.Body)
					}
					if attempt == 2 && (err != nil || string(reply) != replyXML) {
						t.Errorf("skew %s: %q %v", skew, reply, err)
					}
				default:
					if attempt > 0 {
						t.Errorf("skew %s: push %d is still held", skew, attempt+1)
					}
				}
			}
			time.Sleep(time.Minute)
			if b.runs.Load() != 1 {
				t.Errorf("skew %s: %d runs", skew, b.runs.Load())
			}
		})
	}
}

// TestPaceUnreachable: a backend that cannot be dialled is dialled again until the last push, and is not acknowledged before.
func TestPaceUnreachable(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		up      time.Duration // when the backend can be reached
		err     error
		want    string
		attempt int
		lost    float64
	}{
		"back at once":   {300 * time.Millisecond, reverseproxy.NewDialError(errors.New("refused")), replyXML, 1, 0},
		"back after 8 s": {8 * time.Second, reverseproxy.NewDialError(errors.New("refused")), replyXML, 2, 0},
		"back in time":   {14 * time.Second, caddyhttp.Error(http.StatusBadGateway, reverseproxy.NewDialError(errors.New("refused"))), replyXML, 3, 0},
		"no upstreams":   {6 * time.Second, caddyhttp.Error(http.StatusServiceUnavailable, errors.New("no upstreams available")), replyXML, 2, 0},
		"down":           {time.Hour, caddyhttp.Error(http.StatusBadGateway, reverseproxy.NewDialError(errors.New("refused"))), "稍后回复您", 3, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				var began time.Time
				runs := 0
				p := newPacer(t, func(m *Message) { m.FallbackText = "稍后回复您" }, func(w http.ResponseWriter, r *http.Request) error {
					if got, _ := io.ReadAll(r.Body); !strings.Contains(string(got), "<MsgId>1</MsgId>") {
						t.Errorf("backend got %q", got)
					}
					if time.Since(began) < tt.up {
						return tt.err
					}
					runs++
					_, _ = io.WriteString(w, replyXML)
					return nil
				})
				logs := watchLog(p.m.app)
				began = time.Now()
				got := p.send(paceMessage(1))
				if !strings.Contains(got.answer, tt.want) || got.attempt != tt.attempt || got.after > 14500*time.Millisecond {
					t.Errorf("%+v, want %q at push %d", got, tt.want, tt.attempt)
				}
				if n := counted(t, p.m.app.metrics().replies, outcomeLost); n != tt.lost {
					t.Errorf("%v lost", n)
				}
				time.Sleep(time.Minute)
				if wanted := 1 - int(tt.lost); runs != wanted {
					t.Errorf("backend ran %d times, want %d", runs, wanted)
				}
				synctest.Wait()
				lines := logs.FilterMessageSnippet("a push is lost").All()
				if float64(len(lines)) != tt.lost {
					t.Errorf("%d lines about lost pushes", len(lines))
				}
				for _, line := range lines {
					if f := line.ContextMap(); f["appid"] != accountID || f["msg_id"] != "1" {
						t.Errorf("fields %v", f)
					}
				}
			})
		})
	}
}

// TestPaceAgain: a push after the answer gets the same answer for a minute, then success, and never a second run.
func TestPaceAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := &slowBackend{after: time.Second, text: replyXML}
		p := newPacer(t, nil, b.ServeHTTP)
		message := paceMessage(1)
		first, _ := p.push(message)
		for _, tt := range []struct {
			wait time.Duration
			want string
		}{{0, first}, {50 * time.Second, first}, {20 * time.Second, "success"}, {4 * time.Minute, "success"}} {
			time.Sleep(tt.wait)
			if again, ok := p.push(message); !ok || again != tt.want {
				t.Errorf("after %s more: %q, want %q", tt.wait, again, tt.want)
			}
		}
		if b.runs.Load() != 1 {
			t.Errorf("%d runs", b.runs.Load())
		}
		if n := testutil.ToFloat64(p.m.app.metrics().joined); n != 2 {
			t.Errorf("%v joined", n)
		}
	})
}

// TestPaceIdentity: what is another push is never taken for one that came before.
func TestPaceIdentity(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var got []string
		p := newPacer(t, nil, func(_ http.ResponseWriter, r *http.Request) error {
			body, _ := io.ReadAll(r.Body)
			got = append(got, string(body))
			return nil
		})
		event := func(key string) string {
			return fmt.Sprintf("<xml><ToUserName>%s</ToUserName><FromUserName>%s</FromUserName><CreateTime>%d</CreateTime>"+
				"<MsgType>event</MsgType><Event>TEMPLATESENDJOBFINISH</Event><Status>%s</Status><MsgID>7</MsgID></xml>", ghID, openID, time.Now().Unix(), key)
		}
		messages := []string{paceMessage(1), paceMessage(2), event("success"), event("failed"), strings.Replace(paceMessage(1), "<MsgId>1</MsgId>", "", 1)}
		for range 3 {
			for _, message := range messages {
				if _, ok := p.push(message); !ok {
					t.Error("no answer")
				}
			}
		}
		if !slices.Equal(got, messages) {
			t.Errorf("backend got %d: %q", len(got), got)
		}
		// However the address is spelled, as matchers take it.
		for _, address := range []string{"//" + accountID, "/./" + accountID, "http://EXAMPLE.com:8443/" + accountID, "http://example.com./" + accountID} {
			p.path = address
			if _, ok := p.push(messages[0]); !ok || len(got) != len(messages) {
				t.Errorf("%s: backend got %d", address, len(got))
			}
		}
		// Another route is another application's.
		p.path = "/other/" + accountID
		if _, ok := p.push(messages[0]); !ok || len(got) != len(messages)+1 {
			t.Errorf("backend got %d", len(got))
		}
	})
}

// TestPaceInFlight: beyond max_in_flight messages wait, beyond twice that they are held until WeChat pushes them again, beyond
// three times the connection is closed.
func TestPaceInFlight(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := &slowBackend{after: 4 * time.Second, text: replyXML}
		p := newPacer(t, func(m *Message) { m.MaxInFlight = 2 }, b.ServeHTTP)
		var wg sync.WaitGroup
		results := make([]seen, 6)
		for i := range results {
			message := paceMessage(i + 1)
			wg.Go(func() { results[i] = p.send(message) })
			synctest.Wait()
		}
		time.Sleep(time.Second)
		if n := p.m.app.calls().inFlight(); n != 4 {
			t.Errorf("%d in flight, want 2 at the backend and 2 that wait", n)
		}
		began := time.Now()
		crowded := paceMessage(100)
		for range 2 {
			if answer, ok := p.push(crowded); ok || time.Since(began) > 0 {
				t.Errorf("beyond three times max_in_flight: %q after %s", answer, time.Since(began))
			}
		}
		// WeChat may push again at once what was closed. The third is the last all the same.
		if answer, ok := p.push(crowded); !ok || answer != "success" {
			t.Errorf("the last push beyond three times max_in_flight: %q", answer)
		}
		if n := counted(t, p.m.app.metrics().replies, outcomeLost); n != 1 {
			t.Errorf("%v lost", n)
		}
		wg.Wait()
		served, lost := 0, 0
		for i, got := range results {
			switch {
			case got.answer == replyXML:
				served++
			case got.answer == "success" && got.attempt == 3:
				lost++
			default:
				t.Errorf("message %d: %+v", i, got)
			}
		}
		// Two at a time, four seconds each: the third pair's turn comes with its second push.
		if served != len(results) || int(b.runs.Load()) != served {
			t.Errorf("%d served, %d lost, %d runs", served, lost, b.runs.Load())
		}
		time.Sleep(time.Minute)
		if n := p.m.app.calls().inFlight(); n != 0 || len(p.m.places) != 0 || p.m.waiting.Load() != 0 {
			t.Errorf("%d in flight, %d places, %d waiting", n, len(p.m.places), p.m.waiting.Load())
		}
		total := counted(t, p.m.app.metrics().replies, outcomeLost) + counted(t, p.m.app.metrics().replies, outcomeSealed) +
			counted(t, p.m.app.metrics().replies, outcomeLate)
		if want := len(results) + 1; total != float64(want) {
			t.Errorf("%v messages counted, want %d", total, want)
		}
	})
}

// TestPaceLatePanic: a backend that breaks off late, or a handler that panics, is an answer that cannot be used.
func TestPaceLatePanic(t *testing.T) {
	t.Parallel()
	for _, v := range []any{http.ErrAbortHandler, "bug"} {
		synctest.Test(t, func(t *testing.T) {
			p := newPacer(t, nil, func(w http.ResponseWriter, _ *http.Request) error {
				_, _ = io.WriteString(w, replyXML[:20])
				time.Sleep(7 * time.Second)
				panic(v)
			})
			if got := p.send(paceMessage(1)); got.answer != "success" || got.after != 7*time.Second {
				t.Errorf("%v: %+v", v, got)
			}
		})
	}
}

// TestPaceHeldNoLongerThanSixSeconds: something between WeChat and the gateway may keep a connection that WeChat dropped.
func TestPaceHeldNoLongerThanSixSeconds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := &slowBackend{after: 13 * time.Second, text: replyXML}
		p := newPacer(t, nil, b.ServeHTTP)
		message := paceMessage(1)
		p.push(message) // dropped after 5 s
		s := accountSender(t)
		rec := httptest.NewRecorder()
		r := caddyhttp.PrepareRequest(s.push(p.path, message), caddy.NewReplacer(), rec, &caddyhttp.Server{})
		began := time.Now()
		func() {
			defer func() {
				if v := recover(); v != http.ErrAbortHandler {
					t.Errorf("ended with %v", v)
				}
			}()
			_ = p.m.ServeHTTP(rec, r, p.next)
		}()
		if held := time.Since(began); held != 6*time.Second || rec.Body.Len() > 0 {
			t.Errorf("held for %s, answered %q", held, rec.Body)
		}
		if got, ok := p.push(message); !ok || got != replyXML {
			t.Errorf("last push: %q", got)
		}
	})
}

// TestPaceFirstIsDroppedAfterSixSeconds: the first push's handler goes on with the backend, but its connection ends.
func TestPaceFirstIsDroppedAfterSixSeconds(t *testing.T) {
	t.Parallel()
	m, _ := newMessage(t, nil)
	release := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = m.ServeHTTP(w, caddyhttp.PrepareRequest(r, caddy.NewReplacer(), w, &caddyhttp.Server{}),
			caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
				<-release
				_, _ = io.WriteString(w, replyXML)
				return nil
			}))
	}))
	defer server.Close()
	s := accountSender(t)
	pushed := s.push("/"+accountID, paceMessage(1))
	body, _ := io.ReadAll(pushed.Body)
	client := &http.Client{Timeout: 20 * time.Second, Transport: new(http.Transport)}
	defer client.CloseIdleConnections()
	began := time.Now()
	resp, err := client.Post(server.URL+pushed.URL.String(), "text/xml", strings.NewReader(string(body)))
	if err == nil {
		_ = resp.Body.Close()
		t.Fatalf("status %d", resp.StatusCode)
	}
	if held := time.Since(began); held < 5*time.Second || held > 8*time.Second {
		t.Errorf("held for %s: %v", held, err)
	}
	close(release)
	resp, err = client.Post(server.URL+pushed.URL.String(), "text/xml", strings.NewReader(string(body)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	answer, _ := io.ReadAll(resp.Body)
	if reply, err := s.codec.OpenReply(answer); err != nil || string(reply) != replyXML {
		t.Errorf("the next push got %q, %v", answer, err)
	}
}

// TestPaceLateIsLateForAll: once the last push was answered without the backend's answer, which then goes out by the
// customer-service API, no other push gets it.
func TestPaceLateIsLateForAll(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := &slowBackend{after: 4800 * time.Millisecond, text: replyXML}
		p := newPacer(t, func(m *Message) { m.SlowReply = slowCustomerService }, b.ServeHTTP)
		message := paceMessage(1)
		var wg sync.WaitGroup
		began := time.Now()
		for i := range 3 { // at once, as through something that sends twice
			wg.Go(func() {
				if answer, ok := p.push(message); !ok || answer != "success" {
					t.Errorf("push %d got %q after %s", i+1, answer, time.Since(began))
				}
			})
			synctest.Wait()
		}
		wg.Wait()
		time.Sleep(time.Minute)
		if n := counted(t, p.m.app.metrics().lateReplies, "error"); n != 1 { // there is no WeChat here
			t.Errorf("%v sent late", n)
		}
	})
}

// TestPaceDeliveredOtherwise: an answer that waited for a push in vain goes out by the customer-service API, and a push that
// comes after all does not get it again.
func TestPaceDeliveredOtherwise(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := &slowBackend{after: 5100 * time.Millisecond, text: replyXML}
		p := newPacer(t, func(m *Message) { m.SlowReply = slowCustomerService }, b.ServeHTTP)
		message := paceMessage(1)
		p.push(message)
		time.Sleep(7 * time.Second)
		if n := counted(t, p.m.app.metrics().lateReplies, "error"); n != 1 { // there is no WeChat here
			t.Errorf("%v sent late", n)
		}
		if answer, ok := p.push(message); !ok || answer != "success" {
			t.Errorf("got %q", answer)
		}
	})
}

// TestPaceDuration: what is measured is the time to the answer, not to the backend's.
func TestPaceDuration(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := &slowBackend{after: 30 * time.Second, text: replyXML}
		p := newPacer(t, func(m *Message) { m.Pushes = 1 }, b.ServeHTTP)
		if got := p.send(paceMessage(1)); got.after != defaultReplyTimeout {
			t.Errorf("%+v", got)
		}
		time.Sleep(time.Minute)
		if err := testutil.CollectAndCompare(p.m.app.metrics().pushDuration, strings.NewReader(`
# HELP caddy_wechat_push_duration_seconds Time from a push to its answer.
# TYPE caddy_wechat_push_duration_seconds histogram
caddy_wechat_push_duration_seconds_bucket{endpoint="message",le="0.005"} 0
caddy_wechat_push_duration_seconds_bucket{endpoint="message",le="0.025"} 0
caddy_wechat_push_duration_seconds_bucket{endpoint="message",le="0.1"} 0
caddy_wechat_push_duration_seconds_bucket{endpoint="message",le="0.25"} 0
caddy_wechat_push_duration_seconds_bucket{endpoint="message",le="0.5"} 0
caddy_wechat_push_duration_seconds_bucket{endpoint="message",le="1"} 0
caddy_wechat_push_duration_seconds_bucket{endpoint="message",le="2"} 0
caddy_wechat_push_duration_seconds_bucket{endpoint="message",le="3"} 0
caddy_wechat_push_duration_seconds_bucket{endpoint="message",le="4"} 0
caddy_wechat_push_duration_seconds_bucket{endpoint="message",le="4.5"} 1
caddy_wechat_push_duration_seconds_bucket{endpoint="message",le="5"} 1
caddy_wechat_push_duration_seconds_bucket{endpoint="message",le="10"} 1
caddy_wechat_push_duration_seconds_bucket{endpoint="message",le="+Inf"} 1
caddy_wechat_push_duration_seconds_sum{endpoint="message"} 4.5
caddy_wechat_push_duration_seconds_count{endpoint="message"} 1
`)); err != nil {
			t.Error(err)
		}
	})
}

// TestPaceUnansweredIsSilent: net/http takes a client that closed its half of the connection for one that hung up. It may
// still listen, and an empty 200 would tell WeChat not to push again.
func TestPaceUnansweredIsSilent(t *testing.T) {
	t.Parallel()
	m, _ := newMessage(t, nil)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = m.ServeHTTP(w, caddyhttp.PrepareRequest(r, caddy.NewReplacer(), w, &caddyhttp.Server{}),
			caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
				<-r.Context().Done()
				return nil
			}))
	}))
	defer server.Close()
	conn, err := net.Dial("tcp", server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	if err := accountSender(t).push("/"+accountID, paceMessage(1)).Write(conn); err != nil {
		t.Fatal(err)
	}
	_ = conn.(*net.TCPConn).CloseWrite()
	if got, err := io.ReadAll(conn); len(got) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %q, %v", got, err)
	}
}

// outerWriter stands for what a handler outside of ours puts around the response.
type outerWriter struct {
	http.ResponseWriter
	used *atomic.Bool
}

func (w outerWriter) WriteHeader(int)             { w.used.Store(true) }
func (w outerWriter) Write(b []byte) (int, error) { w.used.Store(true); return len(b), nil }
func (w outerWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// TestPaceTimedAnswerPassesOuterHandlers: they belong to the goroutine that is busy with the backend.
func TestPaceTimedAnswerPassesOuterHandlers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := &slowBackend{after: 20 * time.Second, text: replyXML}
		p := newPacer(t, func(m *Message) { m.Pushes = 1 }, b.ServeHTTP)
		inner := &paceWriter{ResponseRecorder: httptest.NewRecorder(), flushed: make(chan struct{})}
		var used atomic.Bool
		w := outerWriter{outerWriter{inner, &used}, &used}
		r := caddyhttp.PrepareRequest(accountSender(t).push(p.path, paceMessage(1)), caddy.NewReplacer(), w, &caddyhttp.Server{})
		began := time.Now()
		done := make(chan error, 1)
		go func() { done <- p.m.ServeHTTP(w, r, p.next) }()
		<-inner.flushed
		if after := time.Since(began); after != defaultReplyTimeout || inner.Body.String() != "success" || used.Load() {
			t.Errorf("%q after %s, outer handlers used: %v", inner.Body, after, used.Load())
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// TestPlainMode: 明文模式, and the account's other modes, which take no plaintext.
func TestPlainMode(t *testing.T) {
	t.Parallel()
	app, ctx := newTestApp(t, fmt.Sprintf(`{"accounts": [{"appid": %q, "secret": "s", "tokens": [%q]}]}`, accountID, accountToken))
	m := new(Message)
	if err := m.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	at := time.Now() // of all pushes, or a second may end between two of them
	plain := func(message, nonce string) *http.Request {
		s := accountSender(t)
		s.nonce, s.at = nonce, at
		r := s.push("/"+accountID, message)
		q := r.URL.Query()
		q.Del("msg_signature")
		q.Del("encrypt_type")
		r.URL.RawQuery = q.Encode()
		r.Body, r.ContentLength = io.NopCloser(strings.NewReader(message)), int64(len(message))
		return r
	}
	b := &answering{text: replyXML}
	message := textMessage("x")
	rec := serve(t, m, plain(message, "1"), b)
	if rec.Body.String() != replyXML || rec.Header().Get("Content-Type") != xmlType || b.body != message {
		t.Errorf("%q, backend got %q", rec.Body, b.body)
	}
	// A retry is no replay; another text under the same signature is.
	if rec := serve(t, m, plain(message, "1"), nil); rec.Body.String() != replyXML {
		t.Errorf("again: %q", rec.Body)
	}
	if rec := serve(t, m, plain(textMessage("y"), "1"), nil); rec.Code != http.StatusForbidden {
		t.Errorf("another text: %d %q", rec.Code, rec.Body)
	}
	if n := counted(t, app.metrics().pushes, "message", "replay"); n != 1 {
		t.Errorf("%v replays", n)
	}
	// JSON is answered with JSON.
	b = &answering{text: `{"MsgType":"text"}`}
	if rec := serve(t, m, plain(`{"ToUserName":"g","FromUserName":"o","CreateTime":1,"MsgType":"text","MsgId":5}`, "2"), b); rec.Body.String() != b.text || rec.Header().Get("Content-Type") != jsonType {
		t.Errorf("JSON: %q", rec.Body)
	}
	forged := plain(textMessage("x"), "3")
	forged.URL.RawQuery = strings.Replace(forged.URL.RawQuery, "nonce=3", "nonce=4", 1)
	if rec := serve(t, m, forged, nil); rec.Code != http.StatusForbidden {
		t.Errorf("forged: %d", rec.Code)
	}
	// Encrypted without a key: said so, not passed on.
	if rec := serve(t, m, accountSender(t).push("/"+accountID, message), nil); rec.Code != http.StatusForbidden || !strings.Contains(rec.Body.String(), "aes_key") {
		t.Errorf("encrypted: %d %q", rec.Code, rec.Body)
	}
	// The handshake.
	s := accountSender(t)
	stamp := fmt.Sprint(s.at.Unix())
	get := httptest.NewRequest(http.MethodGet, "/"+accountID+"?echostr=abc&timestamp="+stamp+"&nonce=9&signature="+s.codec.Signature(stamp, "9"), nil)
	if rec := serve(t, m, get, nil); rec.Body.String() != "abc" {
		t.Errorf("handshake: %d %q", rec.Code, rec.Body)
	}
}

// TestCompatMode: of a push in 兼容模式 the encrypted part alone counts, and one without it is refused.
func TestCompatMode(t *testing.T) {
	t.Parallel()
	_, ctx := newTestApp(t, fmt.Sprintf(`{"accounts": [{"appid": %q, "secret": "s", "tokens": [%q], "aes_keys": [%q], "mode": "compat"}]}`, accountID, accountToken, accountKey))
	m := new(Message)
	if err := m.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	message := textMessage("sealed")
	s := accountSender(t)
	r := s.push("/"+accountID, message)
	envelope, _ := io.ReadAll(r.Body)
	outer := strings.Replace(textMessage("forged"), "</xml>", "", 1) + strings.TrimPrefix(strings.Replace(string(envelope), "<ToUserName><![CDATA["+ghID+"]]></ToUserName>", "", 1), "<xml>")
	r.Body, r.ContentLength = io.NopCloser(strings.NewReader(outer)), int64(len(outer))
	b := &answering{text: replyXML}
	rec := serve(t, m, r, b)
	if reply, err := s.codec.OpenReply(rec.Body.Bytes()); err != nil || string(reply) != replyXML || b.body != message {
		t.Errorf("%d %q, backend got %q", rec.Code, reply, b.body)
	}
	for _, body := range []string{textMessage("forged"), outer} {
		r := s.push("/"+accountID, message)
		q := r.URL.Query()
		q.Del("msg_signature")
		r.URL.RawQuery = q.Encode()
		r.Body, r.ContentLength = io.NopCloser(strings.NewReader(body)), int64(len(body))
		if rec := serve(t, m, r, nil); rec.Code != http.StatusForbidden {
			t.Errorf("without msg_signature: %d", rec.Code)
		}
	}
}

// TestCallTableBounds: what is remembered has limits, the oldest goes first, and it is counted.
func TestCallTableBounds(t *testing.T) {
	t.Parallel()
	dropped := map[string]int{}
	table := newCallTable(func(what string) { dropped[what]++ })
	now := time.Now()
	add := func(n int, at time.Time, size int) pushID {
		id := shortSum([]byte(fmt.Sprint(n)))
		a := table.arrive(id, at, 0, at.Unix()+300, pace{3, defaultReplyTimeout})
		if a.call != nil && a.first {
			table.finish(a.call, passiveReply{outcome: outcomeSealed, body: make([]byte, size)}, at)
			table.leave(a.call, at)
		}
		return id
	}
	const big = defaultMaxAnswers / 4
	ids := make([]pushID, 6)
	for i := range ids {
		ids[i] = add(i, now, big)
	}
	if dropped["answer"] != 3 || table.kept.bytes > defaultMaxAnswers || table.kept.count != 3 || table.known.count != 3 {
		t.Errorf("dropped %v, %d bytes, %d answers, %d identities", dropped, table.kept.bytes, table.kept.count, table.known.count)
	}
	if a := table.arrive(ids[0], now, 0, now.Unix()+300, pace{3, defaultReplyTimeout}); a.call != nil {
		t.Error("an answered push is taken for a new one")
	}
	later := now.Add(2 * time.Minute)
	add(100, later, 1)
	if table.kept.count != 1 || len(table.calls) != 0 || table.kept.bytes != keptChunkSize+keptIndexBytes || table.known.count != 6 || dropped["answer"] != 3 {
		t.Errorf("%d answers, %d bytes, %d identities, dropped %v", table.kept.count, table.kept.bytes, table.known.count, dropped)
	}
	add(101, now.Add(10*time.Minute), 1)
	if table.known.count != 0 || len(table.known.ends) != 0 {
		t.Errorf("%d identities in %d buckets", table.known.count, len(table.known.ends))
	}
}

// TestCallTableOtherLimits: limits may become others at any time. What there is no room for any more goes, the oldest first, and is known by its
// identity.
func TestCallTableOtherLimits(t *testing.T) {
	t.Parallel()
	dropped := map[string]int{}
	table := newCallTable(func(what string) { dropped[what]++ })
	now := time.Now()
	const each, answers = 1 << 10, 20_000
	add := func(n int) {
		a := table.arrive(shortSum([]byte(fmt.Sprint(n))), now, 0, now.Unix()+300, pace{3, defaultReplyTimeout})
		table.finish(a.call, passiveReply{outcome: outcomeSealed, body: make([]byte, each)}, now)
		table.leave(a.call, now)
	}
	table.limit(pushLimits{64 << 20, 30_000})
	for n := range answers {
		add(n)
	}
	if table.kept.count != answers || len(dropped) != 0 {
		t.Fatalf("%d answers, dropped %v", table.kept.count, dropped)
	}
	table.limit(pushLimits{2 << 20, 30_000})
	left := table.kept.count
	if table.kept.bytes > 2<<20 || table.kept.bytes < 2<<20-2*keptChunkSize || dropped[droppedAnswer] != answers-left || table.known.count != answers-left || dropped[droppedIdentity] != 0 {
		t.Errorf("%d answers in %d bytes, %d identities, dropped %v", left, table.kept.bytes, table.known.count, dropped)
	}
	if a := table.arrive(shortSum([]byte("0")), now, 0, now.Unix()+300, pace{3, defaultReplyTimeout}); a.call != nil {
		t.Error("an answered push is taken for a new one")
	}
	table.limit(pushLimits{2 << 20, 10_000})
	for n := answers; n < answers+100; n++ {
		add(n)
	}
	if n := table.known.count; n > 10_000 || dropped[droppedIdentity] == 0 {
		t.Errorf("%d identities, dropped %v", n, dropped)
	}
	table.limit(pushLimits{64 << 20, 30_000})
	before := dropped[droppedAnswer]
	for n := answers + 100; n < 2*answers; n++ {
		add(n)
	}
	if dropped[droppedAnswer] != before {
		t.Errorf("%d answers dropped although there is room again", dropped[droppedAnswer]-before)
	}
}

// TestCallTableClockJumps: identities go when their time is over, however the clock got there.
func TestCallTableClockJumps(t *testing.T) {
	t.Parallel()
	for name, jumps := range map[string][]time.Duration{
		"idle for weeks":   {30 * 24 * time.Hour},
		"ahead and back":   {time.Hour, -time.Hour},
		"back and forward": {-time.Hour, time.Hour},
	} {
		table := newCallTable(func(what string) { t.Errorf("%s: dropped an %s", name, what) })
		n, now := 0, time.Now().Round(0)
		add := func() {
			n++
			a := table.arrive(shortSum([]byte(fmt.Sprint(n))), now, 0, now.Unix()+300, pace{3, defaultReplyTimeout})
			table.finish(a.call, passiveReply{}, now)
			table.leave(a.call, now)
			now = now.Add(2 * answerLife)
			table.arrive(pushID{}, now, 0, 0, pace{3, defaultReplyTimeout}) // sweeps
		}
		add()
		for _, jump := range jumps {
			now = now.Add(jump)
			add()
		}
		now = now.Add(2 * time.Hour)
		add()
		if table.known.count != 1 || len(table.known.ends) != 1 {
			t.Errorf("%s: %d identities in %d buckets, want the last one", name, table.known.count, len(table.known.ends))
		}
	}
}

// TestCallTableAbandoned: a call that was never begun goes on counting with the next push, is no answered one, and goes.
func TestCallTableAbandoned(t *testing.T) {
	t.Parallel()
	table := newCallTable(func(what string) { t.Errorf("dropped an %s", what) })
	now, id, p := time.Now(), pushID{1}, pace{3, defaultReplyTimeout}
	for i := range 5 {
		a := table.arrive(id, now, 0, now.Unix()+300, p)
		if a.call == nil || !a.first || a.last != (i >= 2) {
			t.Errorf("arrival %d: %+v", i+1, a)
		}
		table.abandon(a.call, now)
		table.leave(a.call, now)
	}
	now = now.Add(2 * answerLife)
	a := table.arrive(id, now, 0, now.Unix()+300, p)
	table.finish(a.call, passiveReply{}, now)
	table.leave(a.call, now)
	if !a.first || a.last || table.kept.count != 1 || table.known.count != 0 || len(table.calls) != 0 || table.running != 0 {
		t.Errorf("%+v, %d calls, %d identities, %d bytes, %d running", a, table.kept.count, table.known.count, table.kept.bytes, table.running)
	}
}

// TestPaceBackendsOwn503: a backend that has the message and says 503, which the route passes on, has it once.
func TestPaceBackendsOwn503(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		runs := 0
		p := newPacer(t, func(m *Message) { m.FallbackText = "稍后回复您" }, func(http.ResponseWriter, *http.Request) error {
			runs++
			return caddyhttp.Error(http.StatusServiceUnavailable, errors.New("the backend said so"))
		})
		if got := p.send(paceMessage(1)); !strings.Contains(got.answer, "稍后回复您") || got.attempt != 1 || runs != 1 {
			t.Errorf("%+v, the backend ran %d times", got, runs)
		}
	})
	if reason := backendReason(outcomeUnusable, caddyhttp.Error(http.StatusServiceUnavailable, errors.New("x"))); !strings.Contains(reason, "HTTP 503") {
		t.Errorf("the feed says %q", reason)
	}
	if reason := backendReason(outcomeLost, caddyhttp.Error(http.StatusServiceUnavailable, errors.New(noUpstreams))); reason != "no backend is available" {
		t.Errorf("the feed says %q", reason)
	}
}

// TestNotReachedByReverseProxy: what Caddy's own handler returns is told apart.
func TestNotReachedByReverseProxy(t *testing.T) {
	t.Parallel()
	busy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) }))
	t.Cleanup(busy.Close)
	passedOn := []any{object{"match": object{"status_code": []int{503}}, "routes": []any{object{"handle": []any{object{"handler": "error", "status_code": 503}}}}}}
	for name, tt := range map[string]struct {
		config object
		want   []bool // by request
	}{
		"refused, then marked as down": {object{"upstreams": to(deadAddress(t)), "health_checks": object{"passive": object{"fail_duration": "1m", "max_fails": 1}}}, []bool{true, true}},
		"answered, and passed on":      {object{"upstreams": to(busy.Listener.Addr().String()), "handle_response": passedOn}, []bool{false}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newProxyFront(t, object{"protocol": "http"}, tt.config)
			for i, want := range tt.want {
				res, err := f.Client().Post(f.URL, "text/xml", strings.NewReader("<xml/>")) // closing another test's server ends what the default one does
				if err != nil {
					t.Fatal(err)
				}
				_ = res.Body.Close()
				if err, _ := f.failed.Load().(error); notReached(err) != want {
					t.Errorf("request %d: %v counts as not reached: %v", i+1, err, !want)
				}
			}
		})
	}
}

// TestAnswersAreNotLogged: net/http's errors quote what is no HTTP, which may be a part of an answer.
func TestAnswersAreNotLogged(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPacer(t, nil, func(http.ResponseWriter, *http.Request) error {
			return caddyhttp.Error(http.StatusBadGateway, fmt.Errorf("transport broken: malformed HTTP response %q", `<xml a="1">private`))
		})
		logs := watchLog(p.m.app)
		p.send(paceMessage(1))
		lines := logs.FilterMessageSnippet("cannot be used").All()
		if len(lines) != 1 {
			t.Fatalf("%d lines", len(lines))
		}
		if said := fmt.Sprint(lines[0].ContextMap()); strings.Contains(said, "private") || !strings.Contains(said, "malformed HTTP response") {
			t.Errorf("the log says %s", said)
		}
	})
}

// TestEndWaitsForLateReplies: a process that ends sends what it has promised, before it gives up the means to.
func TestEndWaitsForLateReplies(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := &slowBackend{after: 5100 * time.Millisecond, text: replyXML}
		p := newPacer(t, func(m *Message) { m.SlowReply = slowCustomerService }, b.ServeHTTP)
		if answer, ok := p.push(paceMessage(1)); ok {
			t.Fatalf("answered %q", answer)
		}
		time.Sleep(time.Second)
		p.m.app.shared.runOut()
		if n := counted(t, p.m.app.metrics().lateReplies, "error"); n != 1 { // there is no WeChat here
			t.Errorf("%v sent late", n)
		}
	})
}

// TestIdentityWithoutAnAccount: where one URL is for all accounts, the text says whose message it is.
func TestIdentityWithoutAnAccount(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		runs := 0
		p := newPacer(t, nil, func(w http.ResponseWriter, _ *http.Request) error {
			runs++
			_, _ = io.WriteString(w, "success")
			return nil
		})
		message := paceMessage(1)
		sender := platformSender(t)
		for _, m := range []string{message, message, strings.Replace(message, ghID, "gh_another00000", 1)} {
			rec := httptest.NewRecorder()
			r := caddyhttp.PrepareRequest(sender.push("/", m), caddy.NewReplacer(), rec, &caddyhttp.Server{})
			if err := p.m.ServeHTTP(rec, r, p.next); err != nil || rec.Code != http.StatusOK {
				t.Errorf("%d, %v", rec.Code, err)
			}
		}
		if runs != 2 {
			t.Errorf("the backend ran %d times for two accounts' messages", runs)
		}
	})
}
