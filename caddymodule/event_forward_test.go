package caddymodule

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// TestEventForwardIsDurableFirst: an event that is to be forwarded and cannot be kept is not acknowledged, nor forwarded, also if the gateway
// itself keeps nothing of it. A ticket, which nobody gets, needs no more than before.
func TestEventForwardIsDurableFirst(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(time.Until(time.Date(2026, 11, 28, 0, 0, 0, 0, time.UTC))) // timestamps have ten digits
		e, app := newEvent(t)
		e.Forward = true
		store := app.env.Store
		app.env.Store = hungStore{tokens.NewMemStore()}
		next := caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
			t.Error("forwarded")
			return nil
		})
		began := time.Now()
		rec := serve(t, e, eventSender(t).push("/wx/event", eventXML("something_new", "")), next)
		if took := time.Since(began); rec.Code != http.StatusServiceUnavailable || took != eventStoreTimeout {
			t.Errorf("%d %q after %s, want 503 after 3 s", rec.Code, rec.Body, took)
		}
		app.env.Store = store
	})
}

// TestForwardKept: an event that another process has accepted goes through the site's routes to the handler after wechat_event, as it went when
// it came, and nowhere else.
func TestForwardKept(t *testing.T) {
	const forward = "wechat_event {\nforward\n}\n"
	tests := []struct {
		name, site string
		path       string // of which the backend hears; empty: it hears of nothing
	}{
		{"as it came", "route /wx/event {\n" + forward + "reverse_proxy BACKEND\n}", "/wx/event"},
		{"below handle_path", "handle_path /wx/* {\n" + forward + "reverse_proxy BACKEND\n}", "/event"},
		{"by what it is", "route /wx/event {\n" + forward + "@gone wechat_message info_type unauthorized\nreverse_proxy @gone BACKEND\nreverse_proxy OTHER\n}", "/wx/event"},
		{"from whom it came", "@others not remote_ip 101.226.103.0/24\nrespond @others 403\nroute /wx/event {\n" + forward + "reverse_proxy BACKEND\n}", "/wx/event"},
		{"over TLS alone", "@tls protocol https\nroute @tls {\n" + forward + "reverse_proxy BACKEND\n}", "/wx/event"},
		{"no forward any more", "route /wx/event {\nwechat_event\nreverse_proxy BACKEND\n}", ""},
		{"no wechat_event any more", "route /wx/event {\nreverse_proxy OTHER\n}\nroute /other {\n" + forward + "reverse_proxy OTHER\n}", ""},
		{"another handler before it", "route /wx/event {\nreverse_proxy OTHER\n" + forward + "reverse_proxy OTHER\n}", ""},
		{"another host", "@host host other.example\nroute @host {\n" + forward + "reverse_proxy OTHER\n}", ""},
	}
	event, err := json.Marshal(keptEvent{
		Server: "srv0", Host: "wechat.example.com", URI: "/wx/event?signature=s&timestamp=1&nonce=2&encrypt_type=aes&msg_signature=m",
		TLS: true, Proto: "HTTP/1.1", Remote: "101.226.103.1:1234", Local: "127.0.0.1:443", Header: http.Header{"User-Agent": {"Mozilla/4.0"}},
		Message: []byte(eventXML("unauthorized", "<AuthorizerAppid>"+authorizerID+"</AuthorizerAppid>")),
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newSites(t, t.TempDir(), ":8080 {\n"+tt.site+"\n}\n")
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			err := s.app.forwardThrough(ctx, s.servers, tokens.Forward{Platform: platformID, AppID: authorizerID, InfoType: "unauthorized", Event: event})
			if (err == nil) != (tt.path != "") || err != nil && !errors.Is(err, tokens.ErrNotForwarded) {
				t.Errorf("error %v", err)
			}
			if n := len(s.other.copies()); n != 0 {
				t.Errorf("the other backend got %d requests", n)
			}
			got := s.backend.copies()
			if tt.path == "" {
				if len(got) != 0 {
					t.Errorf("the backend got %d requests", len(got))
				}
				return
			}
			if len(got) != 1 {
				t.Fatalf("the backend got %d requests", len(got))
			}
			r := got[0]
			if r.path+"?"+r.query != tt.path+"?signature=s&timestamp=1&nonce=2" || !strings.Contains(r.body, authorizerID) {
				t.Errorf("%s %s", r.path, r.body)
			}
			if a, p := r.header.Get("X-Wechat-Appid"), r.header.Get("X-Wechat-Platform"); a != authorizerID || p != platformID {
				t.Errorf("of %s, %s", a, p)
			}
			if proto, of := r.header.Get("X-Forwarded-Proto"), r.header.Get("X-Forwarded-For"); proto != "https" || of != "101.226.103.1" {
				t.Errorf("over %q, from %q", proto, of)
			}
		})
	}
}

// TestForwardRunsOutOfTime: a backend whose machine is down is being dialled when the time is up. Nobody has the event, so that it is tried
// again; and if it was read by then somebody may have it, who has not answered: that is tried again later.
func TestForwardRunsOutOfTime(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		read  bool
		err   error // with which the next handler returns
		again error
	}{
		"dialling":                              {false, caddyhttp.Error(http.StatusGatewayTimeout, context.DeadlineExceeded), tokens.ErrNotForwarded},
		"dialling, with no error":               {false, nil, tokens.ErrNotForwarded},
		"waiting for the answer":                {true, caddyhttp.Error(http.StatusGatewayTimeout, context.DeadlineExceeded), tokens.ErrUnanswered},
		"waiting for the answer, with no error": {true, nil, tokens.ErrUnanswered},
		"in time, and not reached":              {false, reverseproxy.NewDialError(errors.New("connection refused")), tokens.ErrNotForwarded},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				copied := detach(httptest.NewRequest(http.MethodPost, "/wx/event", nil), crypto.FormatXML, &facts{platform: platformID}, []byte(eventXML("unauthorized", "")))
				ctx, cancel := context.WithTimeout(t.Context(), backgroundTimeout)
				defer cancel()
				err := handedOn(ctx, copied.serveReached(ctx, caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
					if tt.read {
						_, _ = io.Copy(io.Discard, r.Body)
					}
					<-r.Context().Done()
					if tt.err == nil {
						w.WriteHeader(statusCanceled)
					}
					return tt.err
				})))
				if !errors.Is(err, tt.again) || errors.Is(err, tokens.ErrUnanswered) != (tt.again == tokens.ErrUnanswered) { //nolint:errorlint // the value in the table
					t.Errorf("%v, want %v", err, tt.again)
				}
			})
		})
	}
}

// TestForwardStaysWithItsManager: a reload changes the store just when WeChat has its `success`. What the manager of before keeps of the event
// is done with when the event is.
func TestForwardStaysWithItsManager(t *testing.T) {
	t.Parallel()
	e, app := newEvent(t)
	_, next := newEvent(t)
	next.manager() // in use
	e.Forward = true
	r := eventSender(t).push("/wx/event", eventXML("something_new", ""))
	rec := &hookedRecorder{httptest.NewRecorder(), func() { app.shared.heir.Store(next.shared) }}
	r = caddyhttp.PrepareRequest(r, caddy.NewReplacer(), rec, &caddyhttp.Server{})
	forwarded := make(chan struct{})
	if err := e.ServeHTTP(rec, r, caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { close(forwarded); return nil })); err != nil {
		t.Fatal(err)
	}
	<-forwarded
	next.shared.work.Wait()
	if left, err := app.env.Store.List(t.Context(), "wechat/v1/forward"); err != nil || len(left) != 0 || rec.Body.String() != string(success) {
		t.Errorf("answered %q, and %d events are kept: %v", rec.Body, len(left), err)
	}
}

// hookedRecorder tells of an answer.
type hookedRecorder struct {
	*httptest.ResponseRecorder
	written func()
}

func (r *hookedRecorder) Write(b []byte) (int, error) {
	r.written()
	return r.ResponseRecorder.Write(b)
}

// TestForwardKeptRequest: handlers find of the request what they need not to panic.
func TestForwardKeptRequest(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ host, local, name, at string }{
		{"wechat.example.com:8443", "127.0.0.1:8443", "wechat.example.com", "127.0.0.1:8443"},
		{"wechat.example.com", "/run/caddy.sock", "wechat.example.com", "/run/caddy.sock"},
	} {
		k := keptEvent{Host: tt.host, URI: "/wx/event", TLS: true, Proto: "HTTP/1.1", Local: tt.local}
		r := k.request(t.Context(), &url.URL{Path: "/wx/event"})
		repl := caddy.NewReplacer()
		r = caddyhttp.PrepareRequest(r, repl, httptest.NewRecorder(), &caddyhttp.Server{})
		r.Header.Set("X-A", "b")
		if got := repl.ReplaceAll("{http.request.tls.server_name} {http.request.local}", ""); got != tt.name+" "+tt.at {
			t.Errorf("%s: %s", tt.host, got)
		}
	}
}

func init() {
	caddy.RegisterModule(panicsAfter{})
	httpcaddyfile.RegisterHandlerDirective("test_panics_after", func(httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		return panicsAfter{}, nil
	})
}

// panicsAfter is a handler that panics when what comes after it is done.
type panicsAfter struct{}

// CaddyModule implements caddy.Module.
func (panicsAfter) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.test_panics_after", New: func() caddy.Module { return new(panicsAfter) }}
}

// ServeHTTP implements caddyhttp.MiddlewareHandler.
func (panicsAfter) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	_ = next.ServeHTTP(w, r)
	panic("a bug")
}

// TestForwardKeptAndPanic: a handler around wechat_event panics once the event is with the backend, which has it.
func TestForwardKeptAndPanic(t *testing.T) {
	s := newSites(t, t.TempDir(), ":8080 {\nroute /wx/event {\ntest_panics_after\nwechat_event {\nforward\n}\nreverse_proxy BACKEND\n}\n}\n")
	event, err := json.Marshal(keptEvent{Server: "srv0", Host: "a.example.com", URI: "/wx/event", Proto: "HTTP/1.1", Message: []byte(eventXML("unauthorized", ""))})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.app.forwardThrough(t.Context(), s.servers, tokens.Forward{Platform: platformID, InfoType: "unauthorized", Event: event}); err != nil {
		t.Errorf("error %v", err)
	}
	if n := len(s.backend.copies()); n != 1 {
		t.Errorf("the backend got %d requests", n)
	}
	other := keptEvent{Server: "srv0", Host: "a.example.com", URI: "/elsewhere", Proto: "HTTP/1.1", Message: []byte(eventXML("unauthorized", ""))}
	if event, err = json.Marshal(other); err != nil {
		t.Fatal(err)
	}
	err = s.app.forwardThrough(t.Context(), s.servers, tokens.Forward{Platform: platformID, InfoType: "unauthorized", Event: event})
	if !errors.Is(err, tokens.ErrNotForwarded) || strings.Contains(err.Error(), "nil") {
		t.Errorf("to a path that is no more: %v", err)
	}
}

// TestForwardsWaitInTheStatus: what waits for a backend is told, also after a restart, and no longer once the backend has it.
func TestForwardsWaitInTheStatus(t *testing.T) {
	t.Parallel()
	app, _ := newTestApp(t, testConfig(""))
	var up atomic.Bool
	const metric = "caddy_wechat_forwards_waiting"
	waiting := func(n int) {
		t.Helper()
		text := fmt.Sprintf("# HELP %s %s\n# TYPE %[1]s gauge\n%[1]s %[3]d\n", metric,
			"Events that wait to be forwarded by wechat_event, as far as this node knows; nodes that share a store count the same ones.", n)
		if err := testutil.CollectAndCompare(app.metrics().keeping, strings.NewReader(text), metric); err != nil {
			t.Error(err)
		}
	}
	app.env.Forward = func(context.Context, tokens.Forward) error {
		if up.Load() {
			return nil
		}
		return tokens.ErrNotForwarded
	}
	m := app.manager()
	for range 2 {
		id, err := m.KeepForward(t.Context(), tokens.Forward{Platform: platformID, InfoType: "something_new", Event: []byte("{}")})
		if err != nil {
			t.Fatal(err)
		}
		_ = m.HandOn(t.Context(), id, func(context.Context) error { return tokens.ErrNotForwarded })
	}
	eventually(t, app, "two events wait", func(s Status) bool {
		f := s.finding("forwards_waiting", "")
		return f != nil && f.Level == Yellow && strings.HasPrefix(f.Text.EN, "2 events")
	})
	waiting(2)
	up.Store(true)
	eventually(t, app, "none waits", func(s Status) bool { return s.finding("forwards_waiting", "") == nil })
	waiting(0)
}

// TestForwardIsAnswered: an answer is the end of an event, whatever it is; where none came a backend may have it, and it is tried again later.
func TestForwardIsAnswered(t *testing.T) {
	t.Parallel()
	status := func(code int) func(http.ResponseWriter, *http.Request) error {
		return func(w http.ResponseWriter, _ *http.Request) error { w.WriteHeader(code); return nil }
	}
	fails := func(err error) func(http.ResponseWriter, *http.Request) error {
		return func(http.ResponseWriter, *http.Request) error { return err }
	}
	for name, tt := range map[string]struct {
		next  func(http.ResponseWriter, *http.Request) error
		fails bool
		again bool
	}{
		"200":                        {status(http.StatusOK), false, false},
		"500":                        {status(http.StatusInternalServerError), true, false},
		"502 of a proxy behind":      {status(http.StatusBadGateway), true, false},
		"499 of a backend's own":     {status(statusCanceled), true, false},
		"the connection broke":       {fails(caddyhttp.Error(http.StatusBadGateway, io.ErrUnexpectedEOF)), true, true},
		"its own time ran out":       {fails(caddyhttp.Error(http.StatusGatewayTimeout, errors.New("timeout awaiting response headers"))), true, true},
		"refused by another handler": {fails(caddyhttp.Error(http.StatusForbidden, errors.New("no"))), true, false},
		"a bug":                      {func(http.ResponseWriter, *http.Request) error { panic("a bug") }, true, false},
		"broke off, then none reached": {func(_ http.ResponseWriter, r *http.Request) error {
			_, _ = io.Copy(io.Discard, r.Body)
			noteArrival(r, io.ErrUnexpectedEOF)
			return reverseproxy.NewDialError(errors.New("connection refused"))
		}, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			copied := detach(httptest.NewRequest(http.MethodPost, "/wx/event", nil), crypto.FormatXML, &facts{platform: platformID}, []byte(eventXML("unauthorized", "")))
			err := handedOn(t.Context(), copied.serveReached(t.Context(), caddyhttp.HandlerFunc(tt.next)))
			if (err != nil) != tt.fails || errors.Is(err, tokens.ErrUnanswered) != tt.again || errors.Is(err, tokens.ErrNotForwarded) != tt.again {
				t.Errorf("error %v", err)
			}
		})
	}
}

// TestForwardLimitsOfSeveral: what waits is kept in one place, whose limits are the largest; each wechat_event has its own places.
func TestForwardLimitsOfSeveral(t *testing.T) {
	s := newSites(t, t.TempDir(), `:8080 {
		wechat_event /a {
			forward {
				max_waiting 5
				try_duration 2h
			}
		}
		wechat_event /b {
			forward {
				max_waiting 7
				try_duration 1h
			}
		}
	}
`)
	if env := s.app.env; env.MaxForwards != 7 || env.ForwardLife != 2*time.Hour {
		t.Errorf("%d events for %v", env.MaxForwards, env.ForwardLife)
	}
}

// TestForwardsByWeChatsClock: how old an event is that waits to be forwarded is told by WeChat's clock too, which its answers tell: an event is
// kept with its CreateTime.
func TestForwardsByWeChatsClock(t *testing.T) {
	t.Parallel()
	const ahead = -10 * 24 * time.Hour // WeChat's: ours is ahead
	app, moduleCtx := newTestApp(t, testConfig(""))
	e := &Event{Forward: true}
	if err := e.Provision(moduleCtx); err != nil {
		t.Fatal(err)
	}
	if _, known := app.env.WeChatAhead(); known {
		t.Error("WeChat's clock is known before it has answered")
	}
	app.health().dated(time.Now().Add(ahead).UTC().Format(http.TimeFormat), time.Now(), app.logger)
	if by, known := app.env.WeChatAhead(); !known || (by-ahead).Abs() > 2*time.Second {
		t.Errorf("WeChat's clock is %v ahead, %v; want %v", by, known, ahead)
	}

	handed, release := make(chan struct{}), make(chan struct{})
	t.Cleanup(func() { close(release) }) // before the app's own
	next := caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
		close(handed)
		<-release
		return nil
	})
	s := eventSender(t)
	s.at = time.Now().Add(ahead)
	created := s.at.Add(-time.Minute).Unix()
	event := fmt.Sprintf("<xml><AppId><![CDATA[%s]]></AppId><CreateTime>%d</CreateTime><InfoType><![CDATA[something_new]]></InfoType></xml>", platformID, created)
	if rec := serve(t, e, s.push("/wx/event", event), next); rec.Code != http.StatusOK {
		t.Fatalf("%d %q", rec.Code, rec.Body)
	}
	<-handed
	names, err := app.env.Store.List(t.Context(), "wechat/v1/forward")
	if err != nil || len(names) != 1 {
		t.Fatalf("kept: %q, %v", names, err)
	}
	kept, err := app.env.Store.Load(t.Context(), names[0])
	if err != nil {
		t.Fatal(err)
	}
	var of struct {
		Created int64 `json:"created"`
	}
	if err := json.Unmarshal(kept, &of); err != nil || of.Created != created {
		t.Errorf("it is kept as made at %d, want %d: %v", of.Created, created, err)
	}
}

// TestForwardKeptHasItsTime: what was kept has as long as the route gives it, and what an answer that is no HTTP had in it is not told.
func TestForwardKeptHasItsTime(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	answer := make(chan string, 2)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer func() { _ = c.Close() }()
			if r, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
				_, _ = io.Copy(io.Discard, r.Body)
			}
			_, _ = io.WriteString(c, <-answer)
		}
	}()
	s := newSites(t, t.TempDir(), ":8080 {\nroute /wx/event {\nwechat_event {\nforward {\nbackend_timeout 1s\n}\n}\nreverse_proxy "+l.Addr().String()+"\n}\n}\n")
	event, err := json.Marshal(keptEvent{Server: "srv0", Host: "a.example.com", URI: "/wx/event", Proto: "HTTP/1.1", Message: []byte(eventXML("unauthorized", ""))})
	if err != nil {
		t.Fatal(err)
	}
	f := tokens.Forward{Platform: platformID, InfoType: "unauthorized", Event: event}
	answer <- ""
	began := time.Now()
	if err := s.app.forwardThrough(t.Context(), s.servers, f); !errors.Is(err, tokens.ErrUnanswered) {
		t.Errorf("error %v", err)
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("it ended after %v", took)
	}
	answer <- "access_token=abc\r\n"
	err = s.app.forwardThrough(t.Context(), s.servers, f)
	if !errors.Is(err, tokens.ErrUnanswered) || strings.Contains(err.Error(), "access_token") {
		t.Errorf("error %v", err)
	}
}

// TestForwardKeptTakesAPlace: what was kept goes to no more backends at once than max_in_flight says, and waits if there is no place.
func TestForwardKeptTakesAPlace(t *testing.T) {
	arrived, answer := make(chan struct{}, 2), make(chan struct{})
	backend := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { arrived <- struct{}{}; <-answer }))
	defer backend.Close()
	s := newSites(t, t.TempDir(), ":8080 {\nroute /wx/event {\nwechat_event {\nforward {\nmax_in_flight 1\n}\n}\nreverse_proxy "+backend.Listener.Addr().String()+"\n}\n}\n")
	event, err := json.Marshal(keptEvent{Server: "srv0", Host: "a.example.com", URI: "/wx/event", Proto: "HTTP/1.1", Message: []byte(eventXML("unauthorized", ""))})
	if err != nil {
		t.Fatal(err)
	}
	f := tokens.Forward{Platform: platformID, InfoType: "unauthorized", Event: event}
	first := make(chan error)
	go func() { first <- s.app.forwardThrough(t.Context(), s.servers, f) }()
	<-arrived
	second := make(chan error)
	go func() { second <- s.app.forwardThrough(t.Context(), s.servers, f) }()
	select {
	case err := <-second:
		if !errors.Is(err, tokens.ErrNoPlace) || !errors.Is(err, tokens.ErrNotForwarded) || errors.Is(err, tokens.ErrUnanswered) {
			t.Errorf("error %v", err)
		}
	case <-arrived:
		t.Error("two are with the backend")
		defer func() { <-second }()
	}
	close(answer)
	if err := <-first; err != nil {
		t.Error(err)
	}
	if err := s.app.forwardThrough(t.Context(), s.servers, f); err != nil {
		t.Errorf("the place was not given back: %v", err)
	}
}

// TestForwardEndsInTheMetrics: each event is counted by what became of it, also one that must not leave the gateway.
func TestForwardEndsInTheMetrics(t *testing.T) {
	t.Parallel()
	e, app := newEvent(t)
	e.Forward = true
	app.env.MaxForwards = 1
	e.forwards = make(chan struct{}, 1)
	answer := make(chan struct{})
	next := caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { <-answer; return nil })
	push := func(event string) {
		t.Helper()
		if rec := serve(t, e, eventSender(t).push("/wx/event", event), next); rec.Body.String() != string(success) {
			t.Errorf("answered %d %q", rec.Code, rec.Body)
		}
	}
	push(eventXML("something_new", ""))
	push(eventXML("something_new", "<Another>1</Another>")) // while the other is at the backend
	push(eventXML("something_new", "<AuthorizationCode>a&#64;code</AuthorizationCode>"))
	close(answer)
	app.shared.work.Wait()
	for how, want := range map[tokens.ForwardEnd]float64{
		tokens.ForwardAnswered: 1, tokens.ForwardFull: 1, tokens.ForwardUnfit: 1, tokens.ForwardFailed: 0, tokens.ForwardGivenUp: 0, tokens.ForwardLeft: 0,
	} {
		if got := testutil.ToFloat64(app.metrics().forwards.WithLabelValues(string(how))); got != want {
			t.Errorf("%s: %v, want %v", how, got, want)
		}
	}
}

// TestForwardsNobodyWantsInTheStatus: what waits in the store of a configuration without forward is told.
func TestForwardsNobodyWantsInTheStatus(t *testing.T) {
	t.Parallel()
	app, _ := newTestApp(t, testConfig(""))
	for i := range 2 {
		name := fmt.Sprintf("wechat/v1/forward/%016x%016x", time.Now().Add(-time.Hour).UnixNano(), i)
		if err := app.env.Store.Store(t.Context(), name, []byte("{}")); err != nil {
			t.Fatal(err)
		}
	}
	app.inForce()
	eventually(t, app, "two events wait for nobody", func(s Status) bool {
		f := s.finding("forwards_unwanted", "")
		return f != nil && f.Level == Yellow && strings.HasPrefix(f.Text.EN, "2 events")
	})
}
