package caddymodule

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

const (
	// maxCountedAppIDs bounds the accounts with a count of their own, per day; a platform may have a million.
	maxCountedAppIDs = 1000
	// otherAppIDs is the label of all accounts beyond.
	otherAppIDs = "_other"
)

// beijing is where WeChat's day begins, at which it resets its daily quotas. China has had no summer time since 1991.
var beijing = time.FixedZone("Asia/Shanghai", 8*60*60)

// dailyCalls counts, since midnight in Beijing, the calls of apps that WeChat may have counted against an account's
// daily quota (errcode 45009): by whose credential they had. The first accounts of a day are counted one by one. A
// restart begins at zero.
type dailyCalls struct {
	now  func() time.Time // time.Now, but for tests
	desc *prometheus.Desc

	mu    sync.Mutex
	begun time.Time        // the day's beginning in Beijing
	calls map[string]int64 // by appid
}

func newDailyCalls() *dailyCalls {
	return &dailyCalls{
		now: time.Now,
		desc: prometheus.NewDesc("caddy_wechat_api_calls_today",
			"API calls that went to WeChat since midnight in Beijing, by the account or platform whose quota they count against; _other is all accounts after the first thousand of the day.",
			[]string{"appid"}, nil),
		calls: make(map[string]int64),
	}
}

// add counts one call.
func (d *dailyCalls) add(appid string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.turn()
	if len(d.calls) >= maxCountedAppIDs {
		if _, counted := d.calls[appid]; !counted {
			appid = otherAppIDs
		}
	}
	d.calls[appid]++
}

// turn begins a new day if there is one. The caller holds mu.
func (d *dailyCalls) turn() {
	now := d.now()
	if since := now.Sub(d.begun); since >= 0 && since < 24*time.Hour {
		return // nearly always, and it costs no calendar
	}
	year, month, day := now.In(beijing).Date()
	d.begun = time.Date(year, month, day, 0, 0, 0, 0, beijing)
	clear(d.calls)
}

// Describe implements prometheus.Collector.
func (d *dailyCalls) Describe(c chan<- *prometheus.Desc) { c <- d.desc }

// Collect implements prometheus.Collector.
func (d *dailyCalls) Collect(c chan<- prometheus.Metric) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.turn()
	for appid, n := range d.calls {
		c <- prometheus.MustNewConstMetric(d.desc, prometheus.GaugeValue, float64(n), appid)
	}
}

// countToday counts a call against whose credential it has. A call without one of the gateway's names no account that
// has been checked, so it could fill the table with any.
func (t *Transport) countToday(call *apiCall) {
	switch {
	case !call.sealed():
	case call.key.Kind == tokens.KindComponent:
		t.app.metrics().apiToday.add(call.key.Platform)
	default:
		t.app.metrics().apiToday.add(call.appid)
	}
}

var _ prometheus.Collector = (*dailyCalls)(nil)
