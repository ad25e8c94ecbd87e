package caddymodule

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// What the feed costs a push and a call that go well. The gate is 150 ns and no memory.

func BenchmarkFeedPush(b *testing.B) {
	enter := feedOfPush(b)
	b.ReportAllocs()
	for b.Loop() {
		enter()
	}
}

func BenchmarkFeedCall(b *testing.B) {
	enter := feedOfCall(b)
	b.ReportAllocs()
	for b.Loop() {
		enter()
	}
}

// BenchmarkFeedParallel is many accounts' pushes at once.
func BenchmarkFeedParallel(b *testing.B) {
	f := newFeed()
	appids := make([]string, 4096)
	for i := range appids {
		appids[i] = fmt.Sprintf("wx%016x", uint64(i)*0x9e3779b97f4a7c1)
	}
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for i := 0; pb.Next(); i++ {
			f.add(&Entry{Kind: feedPush, Time: time.Unix(1, 0), AppID: appids[i%len(appids)], Platform: platformID, What: "text", Outcome: outcomeOK, known: true})
		}
	})
}

// feedOfPush does with a push what the feed adds to it.
func feedOfPush(tb testing.TB) func() {
	app, _ := newTestApp(tb, testConfig(""))
	p, f := newPush(), &facts{appid: authorizerID, platform: platformID, msgType: "event", event: "CLICK"}
	p.codec = app.Platforms[0].codec
	at := time.Now()
	return func() {
		p.entry = Entry{Time: at}
		p.answered = at
		app.nameMessage(p, f)
		app.feedPush(tb.Context(), p, feedPush, outcomeOK)
	}
}

// feedOfCall does with a call what the feed adds to it.
func feedOfCall(tb testing.TB) func() {
	g := newGateway(tb, newFakeWeChat(tb), "", "")
	req := &apiRequest{Request: httptest.NewRequest(http.MethodGet, "/", nil), appid: accountID, path: "/cgi-bin/user/info", client: g.app.Clients[0]}
	call := &apiCall{status: 200, key: tokens.AccountKey(accountID)}
	return func() {
		req.started, req.entry = g.app.shared.feed.now(), Entry{}
		call.enter(&req.entry)
		g.api.feedCall(req, outcomeOK)
	}
}
