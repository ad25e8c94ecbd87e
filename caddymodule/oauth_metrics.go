package caddymodule

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// usersCollector tells how full the table of those who logged in is, as of each scrape.
type usersCollector struct{ users *tokens.UserTable }

var (
	oauthUsersDesc = prometheus.NewDesc("caddy_wechat_oauth_users",
		"Tracking ids that are kept.", nil, nil)
	oauthForgottenDesc = prometheus.NewDesc("caddy_wechat_oauth_forgotten_total",
		"What was remembered of web authorizations and forgotten early, for lack of room: the tracking id, the code or the flow.", []string{"what"}, nil)
)

// Describe implements prometheus.Collector.
func (usersCollector) Describe(c chan<- *prometheus.Desc) {
	c <- oauthUsersDesc
	c <- oauthForgottenDesc
}

// Collect implements prometheus.Collector.
func (u usersCollector) Collect(c chan<- prometheus.Metric) {
	c <- prometheus.MustNewConstMetric(oauthUsersDesc, prometheus.GaugeValue, float64(u.users.Len()))
	forgotten := u.users.Forgotten()
	for what, n := range map[string]uint64{"tracking_id": forgotten.Users, "code": forgotten.Codes, "flow": forgotten.Flows} {
		c <- prometheus.MustNewConstMetric(oauthForgottenDesc, prometheus.CounterValue, float64(n), what)
	}
}
