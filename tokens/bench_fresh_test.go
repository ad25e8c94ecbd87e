package tokens

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// BenchmarkFreshToken is what a call pays for a token that needs no renewal: first while all accounts fit into the read
// cache, then with a million, of which it holds one in fifteen. "2 cores" has two goroutines at it on two processors;
// time is by the wall there, so half of the other's is the best that can be.
//
//   - cached: each account asked for is in the cache. With a million, these are those of the zipf-distributed traffic
//     that the cache has kept.
//   - zipf: that traffic as it comes, hits and misses.
//   - miss: no account asked for is in the cache. A miss reads, opens and decodes the record and offers it to the cache;
//     the store is memory here, so what a real one takes comes on top.
//
// Loads/op is the share of calls that read the store.
func BenchmarkFreshToken(b *testing.B) {
	for _, accounts := range []int{1, 10, 10_000} {
		b.Run(fmt.Sprintf("accounts=%d", accounts), func(b *testing.B) {
			f := newFreshRig(b, accounts)
			calls := f.calls(func(int) int { return rand.IntN(accounts) }, anyCall)
			f.warm(b, calls)
			f.bench(b, "cached", calls, noLoads)
		})
	}
	b.Run("accounts=1000000", func(b *testing.B) {
		const accounts = 1_000_000
		f := newFreshRig(b, accounts)
		zipf := rand.NewZipf(rand.New(rand.NewPCG(1, 2)), 1.1, 1, accounts-1) //nolint:gosec // traffic, not a secret
		traffic := func(int) int { return int(zipf.Uint64()) }                //nolint:gosec // below a million
		f.warm(b, f.calls(traffic, anyCall))
		f.bench(b, "cached", f.calls(traffic, f.cached), noLoads)
		f.bench(b, "zipf", f.calls(traffic, anyCall), anyLoads)
		// Each account once: a second call for it might be a hit.
		f.bench(b, "miss", f.calls(func(i int) int { return i }, func(k Key) bool { return !f.cached(k) }), anyLoads)
	})
}

// freshCalls is the number of different calls that a benchmark goes through, a power of two.
const freshCalls = 1 << 18

// freshShare is the number of calls that a goroutine takes at a time.
const freshShare = 64

// freshRig is a manager over a store with a fresh token for each of many authorizers.
type freshRig struct {
	*rig
	next atomic.Uint64 // of the calls, modulo their number: runs go on where the one before ended, and meet no miss again
}

func newFreshRig(b *testing.B, accounts int) *freshRig {
	b.Helper()
	f := &freshRig{rig: newRig(b)}
	f.store.records = make(map[string][]byte, accounts+16)
	f.Use(f.env)
	env, err := f.current()
	if err != nil {
		b.Fatal(err)
	}
	now := time.Now().Truncate(time.Second)
	var wg sync.WaitGroup
	writers := runtime.GOMAXPROCS(0)
	for w := range writers {
		wg.Go(func() {
			for n := w; n < accounts; n += writers {
				rec := &record{
					Gen: 7, AccessToken: secret.New(fmt.Sprintf("97_%0133d", n)), ObtainedAt: now, ExpiresAt: now.Add(2 * time.Hour),
					RefreshToken: secret.New(fmt.Sprintf("refreshtoken@@@%043d", n)), FuncInfo: []int{1, 2, 3, 4, 7, 11, 15},
					AuthorizedAt: now.Add(-30 * 24 * time.Hour),
				}
				if err := f.storeRecord(context.Background(), env, freshKey(n).recordName(), rec.wire()); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	return f
}

// freshKey is the key of an account, with strings of its own as a request has them.
func freshKey(n int) Key { return AuthorizerKey(testPlatform, fmt.Sprintf("wx%016x", n)) }

// calls are those of choose, by the number of the attempt, that fit.
func (f *freshRig) calls(choose func(i int) int, fits func(Key) bool) []Key {
	calls := make([]Key, 0, freshCalls)
	for i := 0; len(calls) < freshCalls; i++ {
		if k := freshKey(choose(i)); fits(k) {
			calls = append(calls, k)
		}
	}
	return calls
}

func anyCall(Key) bool { return true }

func (f *freshRig) cached(k Key) bool { return f.cache.Load().get(k) != nil }

func (f *freshRig) warm(b *testing.B, calls []Key) {
	b.Helper()
	for _, k := range calls {
		f.get(b, k)
	}
}

// Whether a benchmark may read the store.
const (
	noLoads  = false
	anyLoads = true
)

func (f *freshRig) bench(b *testing.B, name string, calls []Key, loads bool) {
	b.Helper()
	ctx := context.Background()
	report := func(b *testing.B, before int) {
		n := f.store.count("load") - before
		b.ReportMetric(float64(n)/float64(b.N), "loads/op")
		if n > 0 && !loads {
			b.Errorf("%d loads", n)
		}
	}
	b.Run(name, func(b *testing.B) {
		b.ReportAllocs()
		before := f.store.count("load")
		i := f.next.Load()
		for b.Loop() {
			if _, err := f.Get(ctx, calls[i%freshCalls]); err != nil {
				b.Fatal(err)
			}
			i++
		}
		f.next.Store(i)
		report(b, before)
	})
	b.Run(name+", 2 cores", func(b *testing.B) {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
		b.ReportAllocs()
		before := f.store.count("load")
		b.RunParallel(func(pb *testing.PB) {
			for i, end := uint64(0), uint64(0); pb.Next(); i++ {
				if i == end {
					end = f.next.Add(freshShare)
					i = end - freshShare
				}
				if _, err := f.Get(ctx, calls[i%freshCalls]); err != nil {
					b.Error(err)
					return
				}
			}
		})
		report(b, before)
	})
}
