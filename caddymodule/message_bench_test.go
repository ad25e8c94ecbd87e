package caddymodule

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// benchMessages is how many different pushes the benchmark has at hand: what the gateway remembers of them is thrown
// away before they come again.
const benchMessages = 20_000

// BenchmarkMessage is the gateway's own part of a push: everything but the network and reverse_proxy. The request and
// the table of variables that Caddy makes for each request are outside of the measured part, in "caddy". Every message is
// another one in "gateway"; in "again" one that was answered comes again.
func BenchmarkMessage(b *testing.B) {
	app, ctx := newTestApp(b, testConfig(""))
	m := new(Message)
	if err := m.Provision(ctx); err != nil {
		b.Fatal(err)
	}
	_ = app.manager()
	s := platformSender(b)
	type sealed struct {
		url  url.URL
		body []byte
	}
	pushes := make([]sealed, benchMessages)
	var r *http.Request
	for i := range pushes {
		r = s.push("/wx/message/"+authorizerID, textMessage(strings.Repeat("长", 60)))
		body, _ := io.ReadAll(r.Body)
		pushes[i] = sealed{*r.URL, body}
	}
	reply := []byte(replyXML)
	backend := caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = w.Write(reply)
		return nil
	})
	run := func(b *testing.B, different int, serve func(http.ResponseWriter, *http.Request) error) {
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			if i%different == 0 && different > 1 {
				app.shared.calls = newCallTable(nil)
			}
			push := &pushes[i%different]
			req := *r
			req.URL = &push.url
			req.Body, req.ContentLength = io.NopCloser(bytes.NewReader(push.body)), int64(len(push.body))
			rec := &discardWriter{header: make(http.Header)}
			if err := serve(rec, caddyhttp.PrepareRequest(&req, caddy.NewReplacer(), rec, &caddyhttp.Server{})); err != nil || rec.status != http.StatusOK {
				b.Fatal(rec.status, err)
			}
		}
	}
	gateway := func(w http.ResponseWriter, r *http.Request) error { return m.ServeHTTP(w, r, backend) }
	b.Run("caddy", func(b *testing.B) { run(b, benchMessages, backend.ServeHTTP) })
	b.Run("gateway", func(b *testing.B) { run(b, benchMessages, gateway) })
	b.Run("again", func(b *testing.B) { run(b, 1, gateway) })
}

// BenchmarkMatch is what the matcher wechat_message adds to a push in each of its forms.
func BenchmarkMatch(b *testing.B) {
	rec := httptest.NewRecorder()
	r := caddyhttp.PrepareRequest(httptest.NewRequest(http.MethodPost, "/", nil), caddy.NewReplacer(), rec, &caddyhttp.Server{})
	caddyhttp.SetVar(r.Context(), factsVar, &facts{
		appid: authorizerID, platform: platformID, openID: openID, msgType: "event", event: "CLICK", eventKey: "menu_1",
		content: []byte(strings.Repeat("hello ", 20)),
	})
	for _, bm := range []struct {
		name string
		m    MessageMatcher
	}{
		{"exact", MessageMatcher{Type: []string{"event"}, Event: []string{"VIEW", "CLICK"}}},
		{"glob", MessageMatcher{EventKey: []string{"menu_*"}}},
		{"regexp", MessageMatcher{Content: []string{"~(?i)^hello"}}},
	} {
		b.Run(bm.name, func(b *testing.B) {
			if err := bm.m.compile(); err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				if ok, err := bm.m.MatchWithError(r); !ok || err != nil {
					b.Fatal(ok, err)
				}
			}
		})
	}
}

// discardWriter is a response that nobody reads.
type discardWriter struct {
	header http.Header
	status int
}

func (w *discardWriter) Header() http.Header    { return w.header }
func (w *discardWriter) WriteHeader(status int) { w.status = status }
func (w *discardWriter) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	return len(b), nil
}
