package tokens

import (
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// cacheEntry is an entry of a generation, each obtained when all the others were.
func cacheEntry(k Key, gen uint64) *entry {
	now := cacheEpoch
	return newEntry(k, &record{
		Gen: gen, AccessToken: secret.New(fmt.Sprint("generation ", gen)),
		ObtainedAt: now, ExpiresAt: now.Add(2 * time.Hour),
	}, now)
}

var cacheEpoch = time.Now()

func TestCacheNeverGoesBack(t *testing.T) {
	t.Parallel()
	c, err := newCache()
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	var locks keyLocks
	var wg sync.WaitGroup
	for i := range 8 {
		k := AccountKey(fmt.Sprint("wx", i%2))
		wg.Go(func() {
			for gen := range uint64(300) {
				unlock, err := locks.lock(t.Context(), k.AppID)
				if err != nil {
					t.Error(err)
					return
				}
				c.put(cacheEntry(k, gen+1))
				held := c.get(k)
				unlock()
				if held != nil && held.gen() < gen+1 {
					t.Errorf("generation %d after %d was put", held.gen(), gen+1)
				}
			}
		})
		wg.Go(func() {
			last := uint64(0)
			for range 3000 {
				e := c.get(k)
				if e == nil {
					continue
				}
				if e.key != k || e.gen() < last {
					t.Errorf("%v of generation %d after %v of %d", e.key, e.gen(), k, last)
					return
				}
				last = e.gen()
			}
		})
	}
	wg.Wait()
}

// The cache holds far fewer entries than there are accounts: every one is still found, in the store.
func TestDroppedEntriesAreReadAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.get(t, AccountKey(testAccount))
		synctest.Wait() // the loop's first jobs read the store too
		calls := r.wx.count(pathStableToken)
		for range 10 {
			c := r.cache.Load()
			c.entries.Clear()
			reads := r.store.count("load")
			r.get(t, AccountKey(testAccount))
			if n := r.store.count("load") - reads; n != 1 {
				t.Errorf("%d reads of the store for an entry that was dropped, want 1", n)
			}
		}
		if n := r.wx.count(pathStableToken) - calls; n != 0 {
			t.Errorf("%d refreshes for tokens that were in the store", n)
		}
	})
}

func TestRefusalOutlivesTheCache(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		k := AccountKey(testAccount)
		dead := r.get(t, k)
		r.wx.kill(dead)
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(string, map[string]any) (string, error) { return wxError(-1, "busy"), nil }
		})
		if _, err := r.Renew(t.Context(), k, dead.Value); err == nil {
			t.Fatal("renewed")
		}
		r.cache.Load().entries.Clear()
		if token, err := r.Get(t.Context(), k); err == nil && token.Value.Same(dead.Value) {
			t.Error("a token known to be dead was served")
		}
	})
}

func TestCacheAfterClose(t *testing.T) {
	t.Parallel()
	c, err := newCache()
	if err != nil {
		t.Fatal(err)
	}
	k := AccountKey("wx")
	c.put(cacheEntry(k, 1))
	if c.get(k) == nil {
		t.Error("what was put is not there")
	}
	c.close()
	c.close()
	c.put(cacheEntry(k, 2))
	if c.get(k) != nil {
		t.Error("an entry in a closed cache")
	}
}

func TestCacheTellsEqualHashesApart(t *testing.T) {
	t.Parallel()
	c, err := newCache()
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	// As if the hash of one key were another's.
	a, b := cacheEntry(AccountKey("wxa"), 9), cacheEntry(AccountKey("wxb"), 1)
	c.put(a)
	b.key = a.key
	c.put(b) // an older generation of a: not taken
	if e := c.get(a.key); e != a {
		t.Error("an older generation replaced a newer one")
	}
	b.key = AccountKey("wxb")
	a.key = b.key // the slot now holds another key's entry
	if c.get(AccountKey("wxa")) != nil {
		t.Error("another key's token was returned")
	}
}

func TestMarginsAreSpreadAndSteady(t *testing.T) {
	t.Parallel()
	seen := make(map[time.Duration]bool)
	for i := range 100 {
		k := AuthorizerKey(testPlatform, fmt.Sprintf("wx%016x", i))
		m := k.margin()
		if m < authorizerMargin || m >= authorizerMargin+authorizerJitter || m != k.margin() {
			t.Fatalf("margin %v", m)
		}
		seen[m] = true
	}
	if len(seen) < 90 {
		t.Errorf("%d different margins for 100 accounts", len(seen))
	}
	// Within a quarter of a ticket's life the margin is what it says.
	for _, k := range []Key{JSAPIKey("", testAccount), CardKey(testPlatform, testAuthorizer)} {
		if m := k.margin(); m < JSTicketMargin || m >= 2*time.Hour/4 {
			t.Errorf("margin of a ticket: %v", m)
		}
	}
}

// hotRig is a manager whose cache holds fresh tokens of so many authorizers.
func hotRig(tb testing.TB, accounts int) (*rig, []Key) {
	tb.Helper()
	r := newRig(tb)
	r.Use(r.env)
	keys := make([]Key, accounts)
	for i := range keys {
		keys[i] = AuthorizerKey(testPlatform, fmt.Sprintf("wx%016x", i))
		r.cache.Load().put(cacheEntry(keys[i], 1))
	}
	return r, keys
}

// TestCacheCountsTokens: by kind, also when entries are replaced, turned away or lose their tokens.
func TestCacheCountsTokens(t *testing.T) {
	t.Parallel()
	c, err := newCache()
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	m := NewManager()
	m.cache.Store(c)
	want := func(what string, kind Kind, n int) {
		t.Helper()
		if got := m.Cached()[kind]; got != n {
			t.Errorf("%s: %d tokens, want %d", what, got, n)
		}
	}
	rec := func(gen uint64) *record {
		now := time.Now()
		return &record{Gen: gen, AccessToken: secret.New("token"), RefreshToken: secret.New("refresh"), ObtainedAt: now, ExpiresAt: now.Add(time.Hour)}
	}
	for i := range 10 {
		c.put(newEntry(AccountKey(fmt.Sprint("wx", i)), rec(1), time.Now()))
	}
	want("ten accounts", KindAccount, 10)
	c.put(newEntry(AccountKey("wx0"), rec(2), time.Now()))
	want("replaced", KindAccount, 10)
	c.put(newEntry(AuthorizerKey("p", "wx0"), rec(1), time.Now()))
	c.put(newEntry(AuthorizerKey("p", "wx1"), nil, time.Now()))
	want("an authorizer, and one that is none", KindAuthorizer, 1)
	want("of others", KindComponent, 0)
	for i := range 2 * cacheEntries {
		c.put(newEntry(AuthorizerKey("p", fmt.Sprint("many", i)), rec(1), time.Now()))
	}
	if n := m.Cached()[KindAuthorizer]; n > cacheEntries || n < cacheEntries/2 {
		t.Errorf("%d tokens in a cache for %d", n, cacheEntries)
	}
}
