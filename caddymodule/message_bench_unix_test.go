//go:build unix

package caddymodule

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
)

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
