package tokens

import (
	"context"
	"fmt"
	"io/fs"
	"path"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// folderStore is a store that lists its folders as fast as a real one; it cannot be written to once it is read.
type folderStore struct {
	*MemStore
	folders map[string][]string
}

func (s *folderStore) Load(_ context.Context, name string) ([]byte, error) {
	if value, ok := s.records[name]; ok {
		return value, nil
	}
	return nil, fs.ErrNotExist
}

func (s *folderStore) Scan(_ context.Context, prefix, cursor string, n int) ([]string, string, error) {
	return PageOf(slices.Clone(s.folders[path.Dir(prefix+"x")]), prefix, cursor, n)
}

// BenchmarkAuthorizers is what a page of the list costs this process, and a look for a name, by how many accounts there
// are, and what the index of names takes in memory: each account has a name of 30 bytes, as ten Chinese characters are. The store is
// memory, so what a real one takes comes on top.
func BenchmarkAuthorizers(b *testing.B) {
	for _, accounts := range []int{10, 100_000, 1_000_000} {
		b.Run(fmt.Sprintf("accounts=%d", accounts), func(b *testing.B) {
			r := newRig(b)
			store := &folderStore{NewMemStore(), make(map[string][]string)}
			env := r.env.prepared()
			for n := range accounts {
				name := AuthorizerKey(testPlatform, appidOf(n)).recordName()
				rec := &record{
					Gen: 7, AccessToken: secret.New(fmt.Sprintf("97_%0133d", n)), RefreshToken: secret.New(fmt.Sprintf("refreshtoken@@@%043d", n)),
					FuncInfo: []int{1, 2, 3, 4, 7, 11, 15}, AuthorizedAt: time.Unix(1, 0), UserName: fmt.Sprintf("gh_%012x", n),
					NickName: fmt.Sprintf("第%06d号小店分店有限", n),
				}
				value, err := encodeRecord(env, name, rec.wire())
				if err != nil {
					b.Fatal(err)
				}
				store.records[name] = value
				store.folders[path.Dir(name)] = append(store.folders[path.Dir(name)], name)
			}
			for _, names := range store.folders {
				slices.Sort(names)
			}
			r.env.Store, r.env.Platforms = store, r.env.Platforms[:1]
			env = r.env.prepared()
			r.names.index.Store(nil)
			r.cache.Store(nil)
			r.Manager.env.Store(env)
			page := func(b *testing.B, q AuthorizerQuery, want int) (next string) {
				p, err := r.Authorizers(b.Context(), q)
				if err != nil || want >= 0 && len(p.Authorizers) != want {
					b.Fatalf("%+v: %d accounts, %v", q, len(p.Authorizers), err)
				}
				return p.Next
			}
			b.Run("page of 50", func(b *testing.B) {
				b.ReportAllocs()
				cursor := ""
				for b.Loop() {
					cursor = page(b, AuthorizerQuery{Limit: 50, Cursor: cursor}, -1)
				}
			})
			b.Run("rare prefix", func(b *testing.B) {
				for b.Loop() {
					page(b, AuthorizerQuery{Limit: 50, Text: appidOf(7)[:17]}, min(16, accounts))
				}
			})
			b.Run("index", func(b *testing.B) {
				var before, after runtime.MemStats
				for b.Loop() {
					runtime.GC()
					runtime.ReadMemStats(&before)
					x := newNameIndex([]string{testPlatform})
					if err := r.walkNames(b.Context(), env, x); err != nil {
						b.Fatal(err)
					}
					x.ready.Store(true)
					x.used.Store(time.Now().UnixNano())
					r.names.index.Store(x)
					runtime.GC()
					runtime.ReadMemStats(&after)
					b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/(1<<20), "MiB")
				}
			})
			for what, q := range map[string]AuthorizerQuery{
				"a name": {Limit: 50, Text: fmt.Sprintf("%06d", accounts-1)}, "no name": {Limit: 50, Text: "no such name"}, "a page of names": {Limit: 50, Text: "小店"},
			} {
				b.Run(what, func(b *testing.B) {
					want := map[string]int{"a name": 1, "no name": 0, "a page of names": min(50, accounts)}[what]
					for b.Loop() {
						page(b, q, want)
					}
				})
			}
		})
	}
}
