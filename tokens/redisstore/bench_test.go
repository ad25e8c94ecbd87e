//go:build unix

package redisstore

import (
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// BenchmarkOperations is what the store takes on a server of this machine: a cold read, a write, a lock and its end.
func BenchmarkOperations(b *testing.B) {
	s := open(b, Options{Addresses: []string{redistest.Start(b).Addr}})
	value := make([]byte, 600)
	if err := s.Store(b.Context(), locked, value); err != nil {
		b.Fatal(err)
	}
	b.Run("load", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := s.Load(b.Context(), locked); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("swap", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := s.Swap(b.Context(), locked, value, value); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("lock", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			unlock, err := s.Lock(b.Context(), locked)
			if err != nil {
				b.Fatal(err)
			}
			unlock()
		}
	})
}

// BenchmarkClaims is what a claim costs this process, by how many callers there are at once: each does some work of its
// own between its claims, as a push is.
func BenchmarkClaims(b *testing.B) {
	s := open(b, Options{Addresses: []string{redistest.Start(b).Addr}})
	var serial atomic.Int64
	for _, callers := range []int{1, 8, 64, 256} {
		b.Run(fmt.Sprint(callers), func(b *testing.B) {
			b.ReportAllocs()
			b.ResetTimer()
			before := processorTime()
			var wg sync.WaitGroup
			for range callers {
				wg.Go(func() {
					for range b.N / callers {
						claims := []tokens.Claim{{Name: fmt.Sprintf("p%021d", serial.Add(1)), Value: []byte("abcdefgh 360000"), TTL: time.Minute}}
						if err := s.ClaimAll(claims, long); err != nil || !claims[0].First {
							b.Error(claims[0].First, err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64((processorTime()-before).Microseconds())/float64(b.N/callers*callers), "cpu-µs/claim")
		})
	}
}

// long is more than a claim takes on a busy machine.
const long = 10 * time.Second

// processorTime is what this process has used, in the kernel too.
func processorTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
