package caddymodule

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// metrics are the gateway's collectors. They belong to what reloads share, so a reload resets no counter; each
// configuration registers the same collectors in its own registry.
type metrics struct {
	pushes          *prometheus.CounterVec
	pushDuration    *prometheus.HistogramVec
	replies         *prometheus.CounterVec
	tokenRefreshes  *prometheus.CounterVec
	refreshDuration *prometheus.HistogramVec
	apiRequests     *prometheus.CounterVec
	apiRetries      *prometheus.CounterVec
	apiErrors       *prometheus.CounterVec
	oauth           *prometheus.CounterVec
	storeDuration   *prometheus.HistogramVec
	storeErrors     *prometheus.CounterVec
}

func newMetrics() *metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "caddy", Subsystem: "wechat", Name: name, Help: help,
		}, labels)
	}
	histogram := func(name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: "caddy", Subsystem: "wechat", Name: name, Help: help, Buckets: buckets,
		}, labels)
	}
	// WeChat gives up after 5 s, so the buckets are dense below that.
	pushBuckets := []float64{.005, .025, .1, .25, .5, 1, 2, 3, 4, 4.5, 5, 10}
	return &metrics{
		pushes:          counter("pushes_total", "Pushes received, by endpoint and what became of them.", "endpoint", "result"),
		pushDuration:    histogram("push_duration_seconds", "Time from a push to its answer.", pushBuckets, "endpoint"),
		replies:         counter("replies_total", "Answers to messages, by outcome.", "outcome"),
		tokenRefreshes:  counter("token_refreshes_total", "Renewals of credentials at WeChat, by kind and result.", "kind", "result"),
		refreshDuration: histogram("token_refresh_duration_seconds", "Time to renew a credential at WeChat.", prometheus.DefBuckets, "kind"),
		apiRequests:     counter("api_requests_total", "API calls by apps, by client and result.", "client", "result"),
		apiRetries:      counter("api_credential_retries_total", "API calls repeated with a renewed credential, by kind.", "kind"),
		apiErrors:       counter("api_errors_total", "Error codes in WeChat's answers to API calls.", "errcode"),
		oauth:           counter("oauth_total", "OAuth steps, by step and result.", "step", "result"),
		storeDuration:   histogram("store_operation_duration_seconds", "Time of a store operation.", prometheus.DefBuckets, "op"),
		storeErrors:     counter("store_errors_total", "Store operations that did not succeed.", "op"),
	}
}

func (m *metrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{
		m.pushes, m.pushDuration, m.replies, m.tokenRefreshes, m.refreshDuration, m.apiRequests, m.apiRetries,
		m.apiErrors, m.oauth, m.storeDuration, m.storeErrors,
	}
}

// register adds the collectors to a configuration's registry; the gateway may be mentioned there more than once.
func (m *metrics) register(r *prometheus.Registry) error {
	for _, c := range m.collectors() {
		if err := r.Register(c); err != nil {
			if _, ok := errors.AsType[prometheus.AlreadyRegisteredError](err); !ok {
				return err
			}
		}
	}
	return nil
}

// result names an outcome in a label.
func result(err error) string {
	if err != nil {
		return "error"
	}
	return "ok"
}

// TokenRefreshed implements tokens.Observer.
func (m *metrics) TokenRefreshed(kind tokens.Kind, _ string, took time.Duration, err error) {
	m.tokenRefreshes.WithLabelValues(string(kind), result(err)).Inc()
	m.refreshDuration.WithLabelValues(string(kind)).Observe(took.Seconds())
}

// StoreOperation implements tokens.Observer.
func (m *metrics) StoreOperation(op string, took time.Duration, err error) {
	m.storeDuration.WithLabelValues(op).Observe(took.Seconds())
	if err != nil {
		m.storeErrors.WithLabelValues(op).Inc()
	}
}

var _ tokens.Observer = (*metrics)(nil)
