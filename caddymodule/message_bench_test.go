package caddymodule

import (
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// BenchmarkMessage is the gateway's own part of a push: everything but the network and reverse_proxy. The request and
// the table of variables that Caddy makes for each request are outside of the measured part, in "caddy".
func BenchmarkMessage(b *testing.B) {
	app, ctx := newTestApp(b, testConfig(""))
	m := new(Message)
	if err := m.Provision(ctx); err != nil {
		b.Fatal(err)
	}
	_ = app.manager()
	message := textMessage(strings.Repeat("长", 60))
	r := platformSender(b).push("/wx/message/"+authorizerID, message)
	body, _ := io.ReadAll(r.Body)
	reply := []byte(replyXML)
	backend := caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = w.Write(reply)
		return nil
	})
	run := func(b *testing.B, serve func(http.ResponseWriter, *http.Request) error) {
		b.ReportAllocs()
		for b.Loop() {
			req := *r
			req.Body, req.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
			rec := &discardWriter{header: make(http.Header)}
			if err := serve(rec, caddyhttp.PrepareRequest(&req, caddy.NewReplacer(), rec, &caddyhttp.Server{})); err != nil || rec.status != http.StatusOK {
				b.Fatal(rec.status, err)
			}
		}
	}
	b.Run("caddy", func(b *testing.B) { run(b, backend.ServeHTTP) })
	b.Run("gateway", func(b *testing.B) {
		run(b, func(w http.ResponseWriter, r *http.Request) error { return m.ServeHTTP(w, r, backend) })
	})
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
