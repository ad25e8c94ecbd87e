package storetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// scanning are the tests of a tokens.Scanner.
var scanning = []test{
	{"scan in pages", scanPages},
	{"scan by a prefix of the names", scanPrefix},
	{"scan while records come and go", scanChanging},
	{"scan of an absent folder is empty", scanAbsent},
	{"scan with an ended context", scanEnded},
}

// scanAll reads all pages. Between, if given, is called after each.
func scanAll(t *testing.T, s tokens.Store, prefix string, n int, between func(page int)) (names []string) {
	t.Helper()
	cursor := ""
	for page := 0; ; page++ {
		got, next, err := s.(tokens.Scanner).Scan(t.Context(), prefix, cursor, n)
		if err != nil || len(got) > n || page > 10_000 {
			t.Fatalf("Scan(%q, %q, %d), page %d: %d names, error %v", prefix, cursor, n, page, len(got), err)
		}
		names = append(names, got...)
		if between != nil {
			between(page)
		}
		if next == "" {
			return names
		}
		cursor = next
	}
}

func scanPages(t *testing.T, s tokens.Store) {
	var want []string
	for _, name := range []string{"b", "a", "ab", "B", "x-6768", "-", "_", "0", "é", "a.b", "zz"} {
		want = append(want, "wechat/v1/scan/"+name)
		mustStore(t, s, "wechat/v1/scan/"+name, []byte("x"))
	}
	for _, name := range []string{"wechat/v1/scans", "wechat/v1/scan2/a", "wechat/v1/sca/b"} {
		mustStore(t, s, name, []byte("x"))
	}
	slices.Sort(want)
	for _, n := range []int{1, 2, 3, len(want) - 1, len(want), len(want) + 1, 1000} {
		if got := scanAll(t, s, "wechat/v1/scan/", n, nil); !slices.Equal(got, want) {
			t.Errorf("in pages of %d: %q, want %q", n, got, want)
		}
	}
	if _, _, err := s.(tokens.Scanner).Scan(t.Context(), "wechat/v1/scan/", "", 0); err == nil {
		t.Error("a page of nothing")
	}
}

func scanPrefix(t *testing.T, s tokens.Store) {
	for _, name := range []string{"wx12", "wx123", "wx1", "wx2", "w", "xwx12"} {
		mustStore(t, s, "wechat/v1/scan/"+name, []byte("x"))
	}
	for prefix, want := range map[string][]string{
		"wx12": {"wx12", "wx123"}, "wx2": {"wx2"}, "wx": {"wx1", "wx12", "wx123", "wx2"}, "wx1234": nil, "y": nil,
	} {
		for _, n := range []int{1, 100} {
			got := scanAll(t, s, "wechat/v1/scan/"+prefix, n, nil)
			for i := range got {
				got[i] = strings.TrimPrefix(got[i], "wechat/v1/scan/")
			}
			if !slices.Equal(got, want) {
				t.Errorf("%s, in pages of %d: %q, want %q", prefix, n, got, want)
			}
		}
	}
}

// scanChanging: what is there throughout is returned once, and nothing twice.
func scanChanging(t *testing.T, s tokens.Store) {
	const stays = 60
	name := func(kind string, i int) string { return fmt.Sprintf("wechat/v1/scan/%03d%s", i, kind) }
	for i := range stays {
		mustStore(t, s, name("stays", i), []byte("x"))
		mustStore(t, s, name("goes", i), []byte("x"))
	}
	got := scanAll(t, s, "wechat/v1/scan/", 7, func(page int) {
		for _, i := range []int{page, stays - 1 - page} { // behind and ahead of the cursor
			if i < 0 || i >= stays {
				continue
			}
			if err := s.Delete(t.Context(), name("goes", i)); err != nil {
				t.Error(err)
			}
			mustStore(t, s, name("comes", i), []byte("x"))
			mustStore(t, s, name("stays", i), []byte("changed"))
		}
	})
	seen := make(map[string]int)
	for _, name := range got {
		if seen[name]++; seen[name] > 1 {
			t.Errorf("%s comes twice", name)
		}
	}
	for i := range stays {
		if seen[name("stays", i)] != 1 {
			t.Errorf("%s is left out", name("stays", i))
		}
	}
}

func scanAbsent(t *testing.T, s tokens.Store) {
	if got := scanAll(t, s, "wechat/v1/nothing/", 10, nil); len(got) != 0 {
		t.Errorf("%q", got)
	}
}

func scanEnded(t *testing.T, s tokens.Store) {
	mustStore(t, s, "wechat/v1/scan/a", []byte("x"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := s.(tokens.Scanner).Scan(ctx, "wechat/v1/scan/", "", 10); !errors.Is(err, context.Canceled) {
		t.Errorf("Scan: %v, want context.Canceled", err)
	}
}
