package caddymodule

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
)

// today is what the metric shows, by appid.
func (g *gateway) today(t *testing.T, appids ...string) (counts []int64) {
	t.Helper()
	d := g.app.metrics().apiToday
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, appid := range appids {
		counts = append(counts, d.calls[appid])
	}
	return counts
}

// A call counts for whose credential it has, each time it is sent; one that the gateway refuses, that reaches nobody or
// that has no credential of the gateway's does not.
func TestAPICallsToday(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.authorize()
	opaque := g.opaque(accountID, crmKey)
	for _, target := range []string{
		"/cgi-bin/user/info?access_token=" + opaque, "/sns/jscode2session?js_code=c1&appid=" + accountID + "&secret=" + crmKey,
		"/cgi-bin/openapi/rid/get?access_token=" + opaque, "/" + strangerID + "/sns/userinfo?access_token=USER",
	} {
		g.get(target)
	}
	g.get("/"+authorizerID+"/cgi-bin/user/info", bearer(crmKey))
	g.get("/"+authorizerID+"/wxa/gettemplatelist", bearer(panelKey)) // by the platform's token
	if got := fmt.Sprint(g.today(t, accountID, authorizerID, platformID, strangerID)); got != "[2 1 1 0]" {
		t.Errorf("counted %s, want [2 1 1 0]", got)
	}
	wechat.spoil(accountID)
	g.get("/cgi-bin/user/info?access_token=" + opaque)
	wechat.Close()
	g.get("/cgi-bin/user/info?access_token=" + opaque)
	if got := g.today(t, accountID)[0]; got != 4 {
		t.Errorf("counted %d, want 4: a repetition counts, a failed dial does not", got)
	}
}

func TestDailyCallsTurn(t *testing.T) {
	t.Parallel()
	d := newDailyCalls()
	at := time.Date(2026, 3, 1, 15, 59, 59, 0, time.UTC) // one second before midnight in Beijing
	d.now = func() time.Time { return at }
	d.add(accountID)
	d.add(accountID)
	want := func(text string) {
		t.Helper()
		if text != "" {
			text = "# HELP caddy_wechat_api_calls_today API calls that went to WeChat since midnight in Beijing, by the account or platform whose quota they count against; _other is all accounts after the first thousand of the day.\n" +
				"# TYPE caddy_wechat_api_calls_today gauge\n" + text
		}
		if err := testutil.CollectAndCompare(d, strings.NewReader(text)); err != nil {
			t.Error(err)
		}
	}
	want(`caddy_wechat_api_calls_today{appid="` + accountID + `"} 2` + "\n")
	at = at.Add(time.Second)
	want("")
	d.add(authorizerID)
	want(`caddy_wechat_api_calls_today{appid="` + authorizerID + `"} 1` + "\n")
}

// A platform may have a million accounts; a metric may not.
func TestDailyCallsBounded(t *testing.T) {
	t.Parallel()
	d := newDailyCalls()
	for range 2 {
		for i := range maxCountedAppIDs + 500 {
			d.add(fmt.Sprintf("wx%016x", i))
		}
	}
	if n := testutil.CollectAndCount(d); n != maxCountedAppIDs+1 {
		t.Errorf("%d series, want %d", n, maxCountedAppIDs+1)
	}
	if d.calls[otherAppIDs] != 1000 || d.calls["wx0000000000000000"] != 2 {
		t.Errorf("counted %d for all others and %d for the first", d.calls[otherAppIDs], d.calls["wx0000000000000000"])
	}
}
