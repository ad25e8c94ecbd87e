package redisstore

import (
	"testing"

	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
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
