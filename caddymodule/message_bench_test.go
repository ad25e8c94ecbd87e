package caddymodule

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
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

// BenchmarkMessageShared is what deduplication over all nodes costs the processor, by how many pushes there are at once: the
// same pushes with deduplication local and cluster, on one Redis.
func BenchmarkMessageShared(b *testing.B) {
	server := redistest.Start(b)
	config := strings.Replace(testConfig(""), `"api"`, `"store": {"module": "redis", "addresses": ["`+server.Addr+`"]}, "api"`, 1)
	app, ctx := newTestApp(b, config)
	s := platformSender(b)
	reply := []byte(replyXML)
	backend := caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = w.Write(reply)
		return nil
	})
	for _, atOnce := range []int{8, 64} {
		for _, where := range []string{deduplicateLocal, deduplicateCluster} {
			b.Run(fmt.Sprint(where, "-", atOnce), func(b *testing.B) {
				m := &Message{Deduplication: where}
				if err := m.Provision(ctx); err != nil {
					b.Fatal(err)
				}
				requests := make(chan *http.Request, b.N)
				for range b.N {
					requests <- s.push("/wx/message/"+authorizerID, textMessage(strings.Repeat("长", 60)))
				}
				close(requests)
				app.inForce()
				_ = app.claims().shared()
				b.ReportAllocs()
				b.ResetTimer()
				before := processorTime()
				var wg sync.WaitGroup
				for range atOnce {
					wg.Go(func() {
						for r := range requests {
							rec := &discardWriter{header: make(http.Header)}
							if err := m.ServeHTTP(rec, caddyhttp.PrepareRequest(r, caddy.NewReplacer(), rec, &caddyhttp.Server{}), backend); err != nil || rec.status != http.StatusOK {
								b.Error(rec.status, err)
							}
						}
					})
				}
				wg.Wait()
				b.ReportMetric(float64((processorTime()-before).Nanoseconds())/1000/float64(b.N), "cpu-µs/push")
			})
		}
	}
}

// processorTime is what this process has used, in the kernel too.
func processorTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
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
