package storetest

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// authorizersInPages: a manager lists the accounts that the store has, each once, and goes on where another one was.
func authorizersInPages(t *testing.T, s tokens.Store) {
	const platform = "wxffffffffffffffff"
	env := &tokens.Environment{Store: s, Platforms: []tokens.PlatformCredentials{{AppID: platform}}, RosterEvery: -1}
	var list strings.Builder
	var want []string
	list.WriteString("platform,appid,refresh_token\n")
	for i := range 300 {
		want = append(want, fmt.Sprintf("wx%016x", i))
		fmt.Fprintf(&list, "%s,%s,refresh%d\n", platform, want[i], i)
	}
	if _, err := tokens.NewMover(env).ImportCSV(t.Context(), strings.NewReader(list.String()), false); err != nil {
		t.Fatal(err)
	}
	for _, q := range []tokens.AuthorizerQuery{{Limit: 200}, {Limit: 35}, {Limit: 200, Text: want[0x20][:17]}} {
		var got []string
		for page := 0; ; page++ {
			m := tokens.NewManager()
			m.Use(env)
			answer, err := m.Authorizers(t.Context(), q)
			m.Close()
			if err != nil || page > 300 {
				t.Fatalf("page %d: %v", page, err)
			}
			for _, a := range answer.Authorizers {
				got = append(got, a.AppID)
			}
			if q.Cursor = answer.Next; q.Cursor == "" {
				break
			}
		}
		slices.Sort(got)
		all := want
		if q.Text != "" {
			all = want[0x20:0x30]
		}
		if !slices.Equal(got, all) {
			t.Errorf("%d on a page, %q: %d accounts, want %d", q.Limit, q.Text, len(got), len(all))
		}
	}
}
