package caddymodule

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// Over HTTP/2 the answer to a push that comes first and last ends while the backend is still at work, whoever reads it to its end.
func TestLastPushOverHTTP2(t *testing.T) {
	t.Parallel()
	m, app := newMessage(t, func(m *Message) {
		m.Pushes, m.ReplyTimeout, m.SlowReply, m.SlowReplyText = 1, caddy.Duration(50*time.Millisecond), slowText, "later"
	})
	answered := make(chan struct{})
	backend := caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
		<-answered
		caddyhttp.SetVar(r.Context(), "below", true)
		_, _ = io.WriteString(w, replyXML)
		return nil
	})
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r = caddyhttp.PrepareRequest(r, caddy.NewReplacer(), w, &caddyhttp.Server{})
		if err := m.ServeHTTP(w, r, backend); err != nil {
			t.Error(err)
		}
		if caddyhttp.GetVar(r.Context(), "below") != nil { // the access log is being written
			t.Error("the backend's part of the route has the variables of the push")
		}
	}))
	server.EnableHTTP2 = true
	server.StartTLS()
	defer server.Close()
	s := platformSender(t)
	pushed := s.push("/"+authorizerID, textMessage("x"))
	client := server.Client()
	client.Timeout = 10 * time.Second
	res, err := client.Post(server.URL+pushed.URL.String(), "text/xml", pushed.Body)
	if err != nil {
		close(answered)
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	close(answered)
	if reply, wrong := s.codec.OpenReply(body); res.ProtoMajor != 2 || err != nil || wrong != nil || !strings.Contains(string(reply), "later") {
		t.Errorf("%s %q, %v, %v", res.Proto, reply, err, wrong)
	}
	app.shared.work.Wait()
	if late := counted(t, app.metrics().replies, outcomeLate); late != 1 {
		t.Errorf("late counted %v times", late)
	}
}

// TestPaceApart: a push that comes first and last over HTTP/2 gets what it would get over HTTP/1.1, and its handler ends with its answer.
func TestPaceApart(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		after   time.Duration
		reply   string
		want    string
		by      time.Duration
		outcome string
		entry   string // in the feed
	}{
		{0, replyXML, replyXML, 0, outcomeSealed, outcomeOK},
		{4400 * time.Millisecond, replyXML, replyXML, 4400 * time.Millisecond, outcomeSealed, outcomeOK},
		{5 * time.Second, replyXML, "请稍候", defaultReplyTimeout, outcomeLate, outcomeSlow},
		{30 * time.Second, replyXML, "请稍候", defaultReplyTimeout, outcomeLate, outcomeSlow},
		{3 * time.Minute, replyXML, "请稍候", defaultReplyTimeout, outcomeUnusable, outcomeSlow}, // beyond backend_timeout
		{time.Second, "<html>", "稍后回复您", time.Second, outcomeUnusable, outcomeFailed},
		{time.Second, "success", "success", time.Second, outcomePlain, outcomeOK},
	} {
		t.Run(fmt.Sprint(tt.after, " ", kindOfText([]byte(tt.reply)).EN), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				b := &slowBackend{after: tt.after, text: tt.reply}
				var seen string
				p := newPacer(t, func(m *Message) {
					m.Pushes, m.SlowReply, m.SlowReplyText, m.FallbackText = 1, slowText, "请稍候", "稍后回复您"
				}, func(w http.ResponseWriter, r *http.Request) error {
					repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
					seen = repl.ReplaceAll("{before} {http.vars.also} {http.request.header.X-Wechat-Openid}", "")
					return b.ServeHTTP(w, r)
				})
				message := paceMessage(1)
				push := func() (answer string, took time.Duration) {
					s := accountSender(t)
					r := s.push(p.path, message)
					r.ProtoMajor = 2
					rec, repl := httptest.NewRecorder(), caddy.NewReplacer()
					r = caddyhttp.PrepareRequest(r, repl, rec, &caddyhttp.Server{})
					repl.Set("before", "as set")
					caddyhttp.SetVar(r.Context(), "also", "this")
					began := time.Now()
					if err := p.m.ServeHTTP(rec, r, p.next); err != nil {
						t.Error(err)
					}
					took = time.Since(began)
					if got := repl.ReplaceAll("{wechat.openid} {http.request.header.Content-Type}", ""); got != openID+" text/xml" {
						t.Errorf("for the log: %s", got)
					}
					if rec.Body.String() == "success" {
						return "success", took
					}
					text, err := s.codec.OpenReply(rec.Body.Bytes())
					if err != nil {
						t.Errorf("answer %q: %v", rec.Body, err)
					}
					return string(text), took
				}
				if got, took := push(); !strings.Contains(got, tt.want) || took != tt.by {
					t.Errorf("saw %q after %s, want %q after %s", got, took, tt.want, tt.by)
				}
				if entries, _, _ := p.m.app.shared.feed.after(0, accountID, 10); len(entries) != 1 || entries[0].Outcome != tt.entry {
					t.Errorf("in the feed: %+v, want one that is %s", entries, tt.entry)
				}
				time.Sleep(2 * time.Minute) // until the backend is done
				synctest.Wait()
				if n := counted(t, p.m.app.metrics().replies, tt.outcome); tt.outcome != outcomeSealed && n != 1 {
					t.Errorf("%s counted %v times", tt.outcome, n)
				}
				if n := p.m.app.calls().inFlight(); n != 0 || len(p.m.places) != 0 || b.runs.Load() != 1 {
					t.Errorf("%d in flight, %d places taken, backend ran %d times", n, len(p.m.places), b.runs.Load())
				}
				if want := "as set this " + openID; seen != want {
					t.Errorf("the backend's part of the route saw %q, want %q", seen, want)
				}
			})
		})
	}
}

// TestPaceApartTouchesNothing: what goes on after the push's handler has returned shares nothing with the handlers around that one, which may still
// be at work, as intercept's are.
func TestPaceApartTouchesNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		over := make(chan struct{})
		in := func(group string) caddyhttp.Handler {
			return caddyhttp.RouteList{{Group: group, Terminal: true}}.Compile(caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
				_, err := io.WriteString(w, "<xml>not "+group+"</xml>")
				return err
			}))
		}
		reply := newReplyWriter(defaultMaxBody)
		p := newPacer(t, func(m *Message) { m.Pushes = 1 }, func(_ http.ResponseWriter, r *http.Request) error {
			<-over
			if reader, writer := caddyhttp.IdleTimeoutsFromContext(r.Context()); reader != nil || writer != nil {
				t.Error("the timeouts of the push's connection can be changed")
			}
			if value, known := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer).Get("later"); known {
				t.Errorf("a placeholder that the handlers around have made since is %v", value)
			}
			_ = in("below").ServeHTTP(reply, r)
			return in("before").ServeHTTP(reply, r)
		})
		rec, repl := httptest.NewRecorder(), caddy.NewReplacer()
		r := accountSender(t).push(p.path, paceMessage(1))
		r.ProtoMajor = 2
		r = caddyhttp.PrepareRequest(r, repl, rec, &caddyhttp.Server{})
		r = r.WithContext(caddyhttp.ContextWithIdleTimeouts(r.Context(), new(caddyhttp.IdleTimeoutReader), new(caddyhttp.IdleTimeoutWriter)))
		_ = in("before").ServeHTTP(rec, r)
		if err := p.m.ServeHTTP(rec, r, p.next); err != nil {
			t.Error(err)
		}
		repl.Map(func(key string) (any, bool) { return key, key == "later" })
		_ = in("after").ServeHTTP(rec, r)
		close(over)
		synctest.Wait()
		if got := reply.body.String(); got != "<xml>not before</xml>" {
			t.Errorf("of the routes below, %q ran", got)
		}
		if got := slices.Sorted(maps.Keys(r.Context().Value(routeGroups).(map[string]struct{}))); !slices.Equal(got, []string{"after", "before"}) {
			t.Errorf("around it, routes of %q have matched", got)
		}
	})
}

// TestPaceApartAgain: what comes again gets the same, and a backend that is not there at first is tried again.
func TestPaceApartAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		tries := 0
		p := newPacer(t, func(m *Message) { m.Pushes = 1 }, func(w http.ResponseWriter, _ *http.Request) error {
			if tries++; tries < 3 {
				return reverseproxy.NewDialError(errors.New("refused"))
			}
			_, _ = io.WriteString(w, replyXML)
			return nil
		})
		message := paceMessage(1)
		for range 2 {
			s := accountSender(t)
			r := s.push(p.path, message)
			r.ProtoMajor = 2
			rec := serve(t, p.m, r, p.next)
			if got, err := s.codec.OpenReply(rec.Body.Bytes()); err != nil || string(got) != replyXML {
				t.Errorf("%q, %v", rec.Body, err)
			}
		}
		if synctest.Wait(); tries != 3 {
			t.Errorf("tried %d times", tries)
		}
	})
}

// TestSharedApart: a push that comes first and last over HTTP/2 is answered in time where nodes share a store, and what comes to another node gets the same.
func TestSharedApart(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		after time.Duration
		reply string
		want  string
		by    time.Duration
	}{
		{0, replyXML, replyXML, 0},
		{4 * time.Second, replyXML, replyXML, 4 * time.Second},
		{10 * time.Second, replyXML, "请稍候", defaultReplyTimeout},
		{time.Second, "<html>", "稍后回复您", time.Second},
	} {
		t.Run(fmt.Sprint(tt.after, " ", kindOfText([]byte(tt.reply)).EN), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t, 2, func(m *Message) {
					m.Pushes, m.SlowReply, m.SlowReplyText, m.FallbackText = 1, slowText, "请稍候", "稍后回复您"
				}, after(tt.after, tt.reply))
				for _, p := range f.nodes {
					p.proto = 2
				}
				message := paceMessage(1)
				if got := f.send(message, 0); !strings.Contains(got.answer, tt.want) || got.after != tt.by {
					t.Errorf("saw %q after %s, want %q after %s", got.answer, got.after, tt.want, tt.by)
				}
				time.Sleep(20 * time.Second)
				for node := range f.nodes {
					if got := f.send(message, node); !strings.Contains(got.answer, tt.want) {
						t.Errorf("again, at node %d: %q, want %q", node, got.answer, tt.want)
					}
				}
				if n := f.runs.Load(); n != 1 {
					t.Errorf("the backend ran %d times", n)
				}
			})
		})
	}
}
