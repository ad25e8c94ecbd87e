package tokens

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// Scan fails and waits as List does.
func (s *faultStore) Scan(ctx context.Context, prefix, cursor string, n int) ([]string, string, error) {
	if err := s.check("scan", prefix); err != nil {
		return nil, "", err
	}
	return s.MemStore.Scan(ctx, prefix, cursor, n)
}

// seed puts the record of an account into the store, past the manager.
func (r *rig) seed(t testing.TB, k Key, rec *record) {
	t.Helper()
	if err := r.storeRecord(context.Background(), r.env.prepared(), k.recordName(), rec.wire()); err != nil {
		t.Fatal(err)
	}
}

// page asks for a page that is in order.
func (r *rig) page(t testing.TB, q AuthorizerQuery) AuthorizerPage {
	t.Helper()
	if q.Limit == 0 {
		q.Limit = 50
	}
	page, err := r.Authorizers(context.Background(), q)
	if exact := kindOfSearch(foldName(q.Text)); err != nil || len(page.Authorizers) > q.Limit && exact != searchAppID && exact != searchUserName {
		t.Fatalf("%+v: %d accounts, %v", q, len(page.Authorizers), err)
	}
	return page
}

// pages asks for all pages, and calls between after each.
func (r *rig) pages(t testing.TB, q AuthorizerQuery, between func()) (all []ListedAuthorizer) {
	t.Helper()
	for range 10_000 {
		page := r.page(t, q)
		all = append(all, page.Authorizers...)
		if q.Cursor = page.Next; q.Cursor == "" {
			return all
		}
		if between != nil {
			between()
		}
	}
	t.Fatalf("%+v: no end", q)
	return nil
}

func appids(list []ListedAuthorizer) (ids []string) {
	for _, a := range list {
		ids = append(ids, a.AppID)
	}
	return ids
}

// sameSet reports whether both have the same texts, each once.
func sameSet(a, b []string) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.Sort(a)
	slices.Sort(b)
	return slices.Equal(a, b)
}

// Each account comes once, those of one platform after those of the other, while others come and go, over a restart and
// with the platforms in another order.
func TestAuthorizersInPages(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		var want, second []string
		for i := range 300 {
			want = append(want, appidOf(i))
			r.seed(t, AuthorizerKey(testPlatform, appidOf(i)), &record{Gen: 1, NickName: fmt.Sprint("n", i)})
		}
		for i := range 20 {
			second = append(second, appidOf(i))
			r.seed(t, AuthorizerKey(testPlatform2, appidOf(i)), &record{Gen: 1})
		}
		for _, limit := range []int{1, 7, 50, 200} {
			came := 1000
			all := r.pages(t, AuthorizerQuery{Limit: limit}, func() {
				came++
				r.seed(t, AuthorizerKey(testPlatform, appidOf(came)), &record{Gen: 1})
				if came%3 == 0 {
					r.restart()
					slices.Reverse(r.env.Platforms)
				}
			})
			seen := make(map[Key]int)
			var order []string
			for _, a := range all {
				if seen[AuthorizerKey(a.Platform, a.AppID)]++; len(order) == 0 || order[len(order)-1] != a.Platform {
					order = append(order, a.Platform)
				}
			}
			for _, ids := range []struct {
				platform string
				ids      []string
			}{{testPlatform, want}, {testPlatform2, second}} {
				for _, id := range ids.ids {
					if n := seen[AuthorizerKey(ids.platform, id)]; n != 1 {
						t.Errorf("limit %d: %s of %s came %d times", limit, id, ids.platform, n)
					}
				}
			}
			if !slices.Equal(order, []string{testPlatform, testPlatform2}) {
				t.Errorf("limit %d: platforms in the order %v", limit, order)
			}
			for i := 1001; i <= came; i++ {
				_ = r.store.Delete(t.Context(), AuthorizerKey(testPlatform, appidOf(i)).recordName())
			}
		}
		if got := r.pages(t, AuthorizerQuery{Platform: testPlatform2, Limit: 3}, nil); !sameSet(appids(got), second) {
			t.Errorf("of one platform: %v", got)
		}
		// A platform that was taken out of the configuration while somebody was on its page.
		first := r.page(t, AuthorizerQuery{Limit: 1})
		r.env.Platforms = slices.DeleteFunc(r.env.Platforms, func(p PlatformCredentials) bool { return p.AppID == testPlatform })
		r.Use(r.env)
		if got := r.pages(t, AuthorizerQuery{Cursor: first.Next}, nil); !sameSet(appids(got), second) {
			t.Errorf("after the platform went: %v", appids(got))
		}
	})
}

func TestAuthorizersFound(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		r.authorize(t, testPlatform2, testAuthorizer)
		if _, err := r.FetchAccountInfo(t.Context(), testPlatform, testAuthorizer); err != nil {
			t.Fatal(err)
		}
		const gone, broken, other = "wx00000000000000e1", "wx00000000000000e2", "wx1230000000000001"
		r.seed(t, AuthorizerKey(testPlatform, gone), &record{Gen: 1, RevokedAt: time.Now(), NickName: "Gone"})
		r.seed(t, AuthorizerKey(testPlatform, other), &record{Gen: 1, NickName: "小店 ABC", UserName: "gh_1"})
		_ = r.store.Store(t.Context(), AuthorizerKey(testPlatform, broken).recordName(), []byte("torn"))
		_ = r.store.Store(t.Context(), authorizerFolder(testPlatform, 3)+"/stray", []byte("x"))
		_ = r.store.Store(t.Context(), authorizerFolder(testPlatform, 3)+"/x-zz", []byte("x"))
		r.page(t, AuthorizerQuery{Text: "name"}) // has the index built
		synctest.Wait()
		info := r.page(t, AuthorizerQuery{Text: testAuthorizer}).Authorizers
		for text, want := range map[string][]string{
			"":                              {testAuthorizer, testAuthorizer, gone, broken, other},
			testAuthorizer:                  {testAuthorizer, testAuthorizer},
			strings.ToUpper(testAuthorizer): {testAuthorizer, testAuthorizer},
			"wx0000000000000099":            nil,
			"wx":                            {testAuthorizer, testAuthorizer, gone, broken, other},
			"WX123":                         {other},
			" wx00000000000000e ":           {gone, broken},
			"gh_" + testAuthorizer[2:]:      {testAuthorizer, testAuthorizer},
			"GH_" + testAuthorizer[2:]:      {testAuthorizer, testAuthorizer},
			"gh_unknown":                    nil,
			"店 a":                           {other},
			"小店":                            {other},
			"gone":                          {gone},
			"n":                             {testAuthorizer, gone},
			"e1":                            nil, // of an appid, not of a name
			"gh_unknown name":               nil,
			"/":                             nil,
			"../../ticket":                  nil,
			"x-6768":                        nil,
			"小店 ABC which is not all of its name": nil,
		} {
			for _, limit := range []int{1, 50} {
				got := r.pages(t, AuthorizerQuery{Text: text, Limit: limit}, nil)
				if ids := appids(got); !sameSet(ids, want) && limit == 50 || len(ids) == 0 && len(want) > 0 {
					t.Errorf("%q, limit %d: %v, want %v", text, limit, ids, want)
				}
			}
		}
		for _, a := range r.page(t, AuthorizerQuery{}).Authorizers {
			want := StateAuthorized
			switch a.AppID {
			case gone:
				want = StateRevoked
			case broken:
				want = StateUnreadable
			}
			if a.State != want {
				t.Errorf("%+v, want %s", a, want)
			}
		}
		if len(info) != 2 || info[0].NickName != "N" || info[0].UserName != "gh_"+testAuthorizer[2:] {
			t.Errorf("%+v", info)
		}
	})
}

func TestAuthorizersRefuse(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		for i := range 10 {
			r.seed(t, AuthorizerKey(testPlatform, appidOf(i)), &record{Gen: 1, NickName: "n"})
		}
		next := r.page(t, AuthorizerQuery{Limit: 1}).Next
		coded := func(text string) string { return base64.RawURLEncoding.EncodeToString([]byte(text)) }
		mark := func(text string) string {
			b, err := newBrowser(r.Manager, r.env.prepared(), AuthorizerQuery{Limit: 1, Text: text})
			if err != nil {
				t.Fatal(err)
			}
			return b.mark
		}
		for what, q := range map[string]AuthorizerQuery{
			"limit: want":          {Limit: -1},
			"limit: want ":         {Limit: MaxAuthorizers + 1},
			"limit: want a":        {},
			"platform: the config": {Limit: 1, Platform: "wx../../ticket"},
			"q: longer":            {Limit: 1, Text: strings.Repeat("a", maxBrowseText+1)},
			"q: not UTF-8":         {Limit: 1, Text: "\xff"},
			"q: has a control":     {Limit: 1, Text: "a\x00b"},
			"q: has a ":            {Limit: 1, Text: "a\nb"},
			"cursor: not one":      {Limit: 1, Cursor: "%%%"},
			"cursor: not ":         {Limit: 1, Cursor: coded("{}")},
			"cursor: not o":        {Limit: 1, Cursor: coded("null")},
			"cursor: not on":       {Limit: 1, Cursor: next + "AAAA"},
			"cursor: n":            {Limit: 1, Cursor: strings.Repeat("A", maxBrowseCursor+1)},
			"cursor: ":             {Limit: 1, Cursor: coded(`{"q":"` + mark("") + `","p":"` + testPlatform + `","s":256}`)},
			"cursor:":              {Limit: 1, Cursor: coded(`{"q":"` + mark("") + `","p":"` + testPlatform + `","s":-1}`)},
			"cursor":               {Limit: 1, Cursor: coded(`{"q":"` + mark("") + `","p":"","s":0}`)},
			"curso":                {Limit: 1, Cursor: coded(`{"q":"` + mark("") + `","p":"` + strings.Repeat("a", maxID+1) + `","s":0}`)},
			"curs":                 {Limit: 1, Cursor: coded(`{"q":"` + mark("") + `","p":"` + testPlatform + `","s":0,"b":1}`)},
			"cur":                  {Limit: 1, Cursor: coded(`{"q":"` + mark(testAuthorizer) + `","p":"` + testPlatform + `","s":0}`), Text: testAuthorizer},
			"cursor: it was given": {Limit: 1, Cursor: next, Text: "wx0"},
			"cursor: it was":       {Limit: 1, Cursor: next, Platform: testPlatform},
		} {
			page, err := r.Authorizers(t.Context(), q)
			if query, ok := errors.AsType[QueryError](err); !ok || !strings.HasPrefix(query.Error(), what) {
				t.Errorf("%s: %v, %v", what, page, err)
			}
		}
		// A cursor that was made up may begin anywhere, and shows nothing else.
		all := r.pages(t, AuthorizerQuery{}, nil)
		for _, after := range []string{"", "../../ticket", "\x00", "\xff\xff", strings.Repeat("z", 500)} {
			wire := (&browser{mark: mark("")}).cursor(place{testPlatform, 0, after})
			for _, a := range r.pages(t, AuthorizerQuery{Cursor: wire}, nil) {
				if !slices.Contains(all, a) {
					t.Errorf("after %q: %+v", after, a)
				}
			}
		}
	})
}

// A store that is slow gives short pages, and one that does not answer an error, within the time of a page.
func TestAuthorizersOfASlowStore(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		var want []string
		for i := range 400 {
			want = append(want, appidOf(i))
			r.seed(t, AuthorizerKey(testPlatform, appidOf(i)), &record{Gen: 1})
		}
		r.store.hold(func(op, _ string) {
			if op == "scan" {
				time.Sleep(500 * time.Millisecond)
			}
		})
		var got []string
		short := 0
		for q := (AuthorizerQuery{Limit: 200}); ; {
			start := time.Now()
			page := r.page(t, q)
			if took := time.Since(start); took > browseTimeout+time.Second {
				t.Errorf("a page took %v", took)
			}
			got = append(got, appids(page.Authorizers)...)
			if q.Cursor = page.Next; q.Cursor == "" {
				break
			}
			if len(page.Authorizers) < 200 {
				short++
			}
		}
		if !sameSet(got, want) || short == 0 {
			t.Errorf("%d accounts, %d short pages", len(got), short)
		}
		r.store.hold(func(op, _ string) {
			if op == "scan" {
				time.Sleep(time.Minute)
			}
		})
		if _, err := r.Authorizers(t.Context(), AuthorizerQuery{Limit: 1}); !errors.Is(err, ErrStore) {
			t.Errorf("a store that hangs: %v", err)
		}
		r.store.hold(nil)
		for _, op := range []string{"scan", "load"} {
			r.store.fail(func(now, _ string) error {
				if now == op {
					return errDisk
				}
				return nil
			})
			for _, q := range []AuthorizerQuery{{Limit: 1}, {Limit: 200}, {Limit: 1, Text: "wx0"}, {Limit: 1, Text: appidOf(0)}, {Limit: 1, Text: "gh_1"}} {
				if page, err := r.Authorizers(t.Context(), q); !errors.Is(err, ErrStore) && (op == "load" || kindOfSearch(q.Text) != searchAppID && kindOfSearch(q.Text) != searchUserName) {
					t.Errorf("%s fails, %+v: %v, %v", op, q, page, err)
				}
			}
		}
		r.store.fail(nil)
	})
}

// A page of few accounts in 256 folders does not read them one after the other, and one of many reads one folder.
func TestAuthorizersReadsFolders(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.seed(t, testAuthKey, &record{Gen: 1})
		r.store.hold(func(op, _ string) {
			if op == "scan" {
				time.Sleep(10 * time.Millisecond)
			}
		})
		start := time.Now()
		r.page(t, AuthorizerQuery{Platform: testPlatform})
		if took := time.Since(start); took > 200*time.Millisecond {
			t.Errorf("256 folders took %v, with 10ms for each", took)
		}
		r.store.hold(nil)
		for i := range 10_000 {
			r.seed(t, AuthorizerKey(testPlatform2, appidOf(i)), &record{Gen: 1})
		}
		scans := r.store.count("scan")
		r.page(t, AuthorizerQuery{Platform: testPlatform2, Limit: 20})
		if n := r.store.count("scan") - scans; n > 1 {
			t.Errorf("%d folders were read for a page that the first one fills", n)
		}
	})
}

// The index is built once somebody looks for a name, learns what happens, and goes when nobody does.
func TestNameIndex(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		for i := range 2000 {
			r.seed(t, AuthorizerKey(testPlatform, appidOf(i)), &record{Gen: 1, AuthorizedAt: time.Now(), NickName: fmt.Sprintf("Shop %04d", i)})
		}
		find := func(text string) []string {
			t.Helper()
			return appids(r.pages(t, AuthorizerQuery{Text: text}, nil))
		}
		if s := r.page(t, AuthorizerQuery{}).Index; s.State != "absent" {
			t.Errorf("before anybody asks: %+v", s)
		}
		r.store.hold(func(op, _ string) {
			if op == "scan" {
				time.Sleep(100 * time.Millisecond)
			}
		})
		page := r.page(t, AuthorizerQuery{Text: "shop 12"})
		if page.Index.State != "building" || len(page.Authorizers) != 0 {
			t.Errorf("the first question: %+v", page)
		}
		time.Sleep(12 * time.Second)
		page = r.page(t, AuthorizerQuery{Text: "shop 1", Limit: 200})
		if n := page.Index.Seen; page.Index.State != "building" || n == 0 || n == 2000 || len(page.Authorizers) == 0 {
			t.Errorf("under way: %+v, %d accounts", page.Index, len(page.Authorizers))
		}
		r.store.hold(nil)
		time.Sleep(time.Minute)
		if s := r.page(t, AuthorizerQuery{Text: "shop 12"}).Index; s != (NameIndexState{State: "ready", Seen: 2000}) {
			t.Errorf("built: %+v", s)
		}
		if got := find("SHOP 19"); len(got) != 100 {
			t.Errorf("%d accounts", len(got))
		}
		if got := r.pages(t, AuthorizerQuery{Text: "shop 19", Limit: 1}, r.restart); len(got) == 0 || len(got) > 100 {
			t.Errorf("%d accounts over restarts, in an index that is built anew each time", len(got))
		}
		r.ticket(t, testPlatform)
		synctest.Wait()
		// What this node learns.
		r.authorize(t, testPlatform, testAuthorizer)
		r.wx.set(func(f *fakeWeChat) {
			f.hook = func(path string, _ map[string]any) (string, error) {
				if path == pathAuthorizerInfo {
					return `{"authorizer_info":{"nick_name":"新的 Name\n","user_name":"gh_1"},"authorization_info":{}}`, nil
				}
				return "", nil
			}
		})
		if got := find("新的 name"); got != nil {
			t.Errorf("a name that nobody knows: %v", got)
		}
		if _, err := r.FetchAccountInfo(t.Context(), testPlatform, testAuthorizer); err != nil {
			t.Fatal(err)
		}
		if got := find("新的 name"); !slices.Equal(got, []string{testAuthorizer}) {
			t.Errorf("learned: %v", got)
		}
		// What others do is seen when the index is built anew.
		r.seed(t, AuthorizerKey(testPlatform, appidOf(7)), &record{Gen: 2, NickName: "renamed"})
		_ = r.store.Delete(t.Context(), AuthorizerKey(testPlatform, appidOf(8)).recordName())
		if got := find("shop 0007"); got != nil {
			t.Errorf("by a name that it had: %v", got)
		}
		if got := find("shop 0008"); got != nil {
			t.Errorf("that is gone: %v", got)
		}
		for range 4 {
			time.Sleep(nameIndexAge / 3)
			find("x")
		}
		synctest.Wait()
		if got := find("renamed"); !slices.Equal(got, []string{appidOf(7)}) {
			t.Errorf("renamed elsewhere: %v", got)
		}
		if s := r.names.state(); s != (NameIndexState{State: "ready", Seen: 1999}) {
			t.Errorf("built anew: %+v", s)
		}
		// Nobody asks.
		time.Sleep(nameIndexIdle - time.Minute)
		if r.names.index.Load() == nil {
			t.Error("dropped too early")
		}
		time.Sleep(2 * time.Minute)
		if r.names.index.Load() != nil {
			t.Error("kept although nobody asks")
		}
		find("shop")
		synctest.Wait()
		if s := r.names.state(); s.State != "ready" {
			t.Errorf("asked again: %+v", s)
		}
		// Another platform.
		r.env.Platforms = append(r.env.Platforms, PlatformCredentials{AppID: "wx00000000000000bc"})
		r.seed(t, AuthorizerKey("wx00000000000000bc", appidOf(1)), &record{Gen: 1, NickName: "of a new platform"})
		r.Use(r.env)
		find("new platform")
		synctest.Wait()
		if got := find("new platform"); len(got) != 1 {
			t.Errorf("of a new platform: %v", got)
		}
	})
}

// A store that fails holds the building up, and what was read stays.
func TestNameIndexOfAFailingStore(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		for i := range 1000 {
			r.seed(t, AuthorizerKey(testPlatform, appidOf(i)), &record{Gen: 1, NickName: "shop"})
		}
		_ = r.store.Store(t.Context(), AuthorizerKey(testPlatform, appidOf(1)).recordName(), []byte("torn"))
		reads := 0
		r.store.fail(func(op, _ string) error {
			if op == "scan" {
				if reads++; reads > 100 {
					return errDisk
				}
			}
			return nil
		})
		r.page(t, AuthorizerQuery{Text: "shop"})
		time.Sleep(5 * time.Minute)
		page := r.page(t, AuthorizerQuery{Text: "shop", Limit: 200})
		if page.Index.State != "building" || page.Index.Seen == 0 || len(page.Authorizers) != 200 {
			t.Errorf("%+v, %d accounts", page.Index, len(page.Authorizers))
		}
		if n := r.log.count("cannot be read for a search by name"); n != 1 {
			t.Errorf("the log says it %d times", n)
		}
		r.store.fail(nil)
		time.Sleep(2 * time.Minute)
		if s := r.page(t, AuthorizerQuery{Text: "shop"}).Index; s != (NameIndexState{State: "ready", Seen: 999}) {
			t.Errorf("%+v", s)
		}
	})
}

// An account that another node has let in is found by its name as soon as that is known there.
func TestNameIndexHears(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		b.page(t, AuthorizerQuery{Text: "n"})
		synctest.Wait()
		const other = "wx00000000000000ee"
		a.authorize(t, testPlatform, other)
		synctest.Wait()
		if !b.names.index.Load().shardOf(AuthorizerKey(testPlatform, other)).has(other) {
			t.Error("not heard of")
		}
		if _, err := a.FetchAccountInfo(t.Context(), testPlatform, testAuthorizer); err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // the other node has it in its cache, and reads it again
		if got := b.page(t, AuthorizerQuery{Text: "n"}).Authorizers; len(got) != 1 || got[0].AppID != testAuthorizer {
			t.Errorf("%+v", got)
		}
	})
}

// The lines of a folder say what a map says, whatever is noted while the folder is read.
func TestNameShardModel(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // a test
	for range 50 {
		x := newNameIndex([]string{testPlatform})
		s := &x.shards[testPlatform][0]
		want := make(map[string]string)
		var read []byte   // what a reading of the folder has come to
		var from []string // that are still to be read, as they were then
		reading := false
		names := func(n int) string { return strings.Repeat(string(rune('a'+n%3)), n%5) }
		for step := range 400 {
			switch id := fmt.Sprintf("wx%04d", random.IntN(60)); random.IntN(12) {
			case 0:
				if !reading {
					s.begin()
					reading, read, from = true, nil, nil
					for id := range want {
						from = append(from, id)
					}
					slices.Sort(from)
					for _, id := range from {
						read = appendLine(read, id, want[id])
					}
				}
			case 1:
				if reading {
					x.replace(s, read)
					reading = false
				}
			case 2, 3:
				delete(want, id)
				x.set(s, id, "", true)
			default:
				want[id] = names(step)
				x.set(s, id, names(step), false)
			}
			if !bytes.Equal(s.lines, linesOf(want)) {
				t.Fatalf("step %d: %q, want %q", step, s.lines, linesOf(want))
			}
			if x.size.Load() != int64(len(s.lines)) {
				t.Fatalf("step %d: the size of %d bytes is taken for %d", step, len(s.lines), x.size.Load())
			}
			part, limit := names(1+random.IntN(4)), 1+random.IntN(5)
			if part == "" {
				continue
			}
			var hits, got []string
			for id, name := range want {
				if strings.Contains(name, part) {
					hits = append(hits, id)
				}
			}
			slices.Sort(hits)
			for after := ""; ; after = got[len(got)-1] {
				page := s.find([]byte(part), after, limit)
				if got = append(got, page...); len(page) < limit {
					break
				}
			}
			if !slices.Equal(got, hits) {
				t.Fatalf("step %d: %q in %q: %v, want %v", step, part, s.lines, got, hits)
			}
		}
	}
}

func linesOf(names map[string]string) (lines []byte) {
	var ids []string
	for id := range names {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	for _, id := range ids {
		lines = appendLine(lines, id, names[id])
	}
	return lines
}

// Beyond its room the index takes no more, and says so.
func TestNameIndexIsBounded(t *testing.T) {
	t.Parallel()
	x := newNameIndex([]string{testPlatform})
	name := strings.Repeat("n", maxNickName)
	for i := 0; !x.full.Load(); i++ {
		s := &x.shards[testPlatform][i%shardCount]
		lines := appendLine(nil, "a", name)
		for j := range 2000 {
			lines = appendLine(lines, fmt.Sprintf("b%d", 1000+j), name)
		}
		x.replace(s, lines)
		x.set(s, fmt.Sprint("c", i), name, false)
		if i > 10*shardCount {
			t.Fatal("never full")
		}
	}
	total := 0
	for i := range x.shards[testPlatform] {
		lines := x.shards[testPlatform][i].lines
		if total += len(lines); len(lines) > 0 && lines[len(lines)-1] != '\n' {
			t.Error("a line is cut off")
		}
	}
	if total > maxNameIndex || total < maxNameIndex*9/10 || int64(total) != x.size.Load() {
		t.Errorf("%d bytes, taken for %d", total, x.size.Load())
	}
}

// Many look for names and page through the list while accounts are let in and learned of. In a bubble no deadline passes while
// one of them has something to do: on a machine that has no processor to spare they would.
func TestAuthorizersUnderLoad(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		const accounts = 3000
		for i := range accounts {
			r.seed(t, AuthorizerKey(testPlatform, appidOf(i)), &record{Gen: 1, NickName: fmt.Sprint("shop ", i%10)})
		}
		env := r.env.prepared()
		var wg sync.WaitGroup
		for w := range 4 {
			wg.Go(func() {
				for i := range 100 {
					k := AuthorizerKey(testPlatform, appidOf((i*37+w*700)%accounts))
					_, err := r.commit(context.Background(), env, k, false, func(cur *record) *record {
						next := *cur
						next.NickName = fmt.Sprint("shop ", i%10)
						return &next
					})
					if err != nil {
						t.Error(err)
					}
				}
			})
			wg.Go(func() {
				for i := range 20 {
					r.pages(t, AuthorizerQuery{Text: fmt.Sprint("shop ", i%10), Limit: 200}, nil)
				}
			})
			wg.Go(func() {
				if got := r.pages(t, AuthorizerQuery{Limit: 200}, nil); len(got) != accounts {
					t.Errorf("%d accounts", len(got))
				}
			})
		}
		wg.Wait()
		synctest.Wait()
		if state := r.page(t, AuthorizerQuery{Text: "shop"}).Index.State; state != "ready" {
			t.Errorf("the index is %s", state)
		}
		if got := r.pages(t, AuthorizerQuery{Text: "shop", Limit: 200}, nil); len(got) != accounts {
			t.Errorf("%d accounts by name", len(got))
		}
	})
}

// Where there is no platform there is nobody to look for.
func TestNameSearchWithoutPlatforms(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.env.Platforms = nil
	r.Use(r.env)
	for range 2 {
		if page, err := r.Authorizers(t.Context(), AuthorizerQuery{Text: "shop", Limit: 10}); err != nil || len(page.Authorizers) > 0 || page.Index.State != "absent" {
			t.Errorf("%+v, %v", page, err)
		}
	}
}
