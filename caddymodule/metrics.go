package caddymodule

import (
	"errors"
	"sync"
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
	joined          prometheus.Counter
	takenOver       prometheus.Counter
	degraded        prometheus.Gauge
	lateReplies     *prometheus.CounterVec
	forgotten       *prometheus.CounterVec
	inFlight        prometheus.GaugeFunc
	mirrors         *prometheus.CounterVec
	tokenRefreshes  *prometheus.CounterVec
	refreshDuration *prometheus.HistogramVec
	tokenWaiters    prometheus.Gauge
	rogues          *prometheus.CounterVec
	keeping         *keepingCollector
	apiRequests     *prometheus.CounterVec
	apiRetries      *prometheus.CounterVec
	apiErrors       *prometheus.CounterVec
	apiToday        *dailyCalls
	oauth           *prometheus.CounterVec
	jssdk           *prometheus.CounterVec
	authorize       *prometheus.CounterVec
	storeDuration   *prometheus.HistogramVec
	storeErrors     *prometheus.CounterVec
	lockWait        prometheus.Histogram
	eventsDropped   prometheus.Counter
	forwards        *prometheus.CounterVec
	store           string // the store's module, as a label

	// Those of every message, so that none looks for them.
	messageOK       prometheus.Counter
	messageDuration prometheus.Observer
	messageSealed   prometheus.Counter
	apiServed       servedCalls
}

// servedCalls are the counters of the calls that went well, by client, so that none is looked for by its labels.
type servedCalls struct {
	all      *prometheus.CounterVec
	byClient *sync.Map // of names, of which the configuration has all; to prometheus.Counter
}

func (s servedCalls) of(client string) prometheus.Counter {
	if c, ok := s.byClient.Load(client); ok {
		return c.(prometheus.Counter)
	}
	c := s.all.WithLabelValues(client, outcomeOK)
	s.byClient.Store(client, c)
	return c
}

// newForgotten counts what a table of calls drops, and stands at zero.
func newForgotten() *prometheus.CounterVec {
	forgotten := prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: "caddy", Subsystem: "wechat", Name: "pushes_forgotten_total",
		Help: "What was remembered of answered pushes and forgotten early, for lack of room: the answer or the identity.",
	}, []string{"what"})
	for _, what := range []string{droppedAnswer, droppedIdentity} {
		forgotten.WithLabelValues(what)
	}
	return forgotten
}

func newMetrics(manager *tokens.Manager, calls *callTable) *metrics {
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
	m := &metrics{
		pushes:       counter("pushes_total", "Pushes received, by endpoint and what became of them.", "endpoint", "result"),
		pushDuration: histogram("push_duration_seconds", "Time from a push to its answer.", pushBuckets, "endpoint"),
		replies:      counter("replies_total", "Answers to messages, by outcome: one for each message, however often it was pushed.", "outcome"),
		joined: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: "caddy", Subsystem: "wechat", Name: "push_retries_joined_total", Help: "Pushes that joined an earlier push of the same message.",
		}),
		takenOver: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: "caddy", Subsystem: "wechat", Name: "pushes_taken_over_total", Help: "Messages that this node had answered because the node that had them seemed to be dead.",
		}),
		degraded: prometheus.NewGauge(prometheus.GaugeOpts{
			Namespace: "caddy", Subsystem: "wechat", Name: "deduplication_degraded",
			Help: "1 while the store does not answer for pushes, so that one which comes again to another node is not known there.",
		}),
		lateReplies: counter("late_replies_total", "Answers that came after WeChat's last push and were sent by the customer-service API, by result.", "result"),
		forgotten:   newForgotten(),
		inFlight: prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: "caddy", Subsystem: "wechat", Name: "pushes_in_flight", Help: "Messages that wait for a backend's answer.",
		}, func() float64 { return float64(calls.inFlight()) }),
		mirrors:         counter("mirrors_total", "Copies of messages to mirrors, by result.", "result"),
		tokenRefreshes:  counter("token_refreshes_total", "Renewals of credentials at WeChat, by kind and result.", "kind", "result"),
		refreshDuration: histogram("token_refresh_duration_seconds", "Time to renew a credential at WeChat.", prometheus.DefBuckets, "kind"),
		tokenWaiters: prometheus.NewGauge(prometheus.GaugeOpts{
			Namespace: "caddy", Subsystem: "wechat", Name: "token_waiters", Help: "Callers that wait for a token which is being fetched.",
		}),
		rogues:        counter("rogue_refreshes_total", "Tokens that WeChat refused long before their end although the gateway had not renewed them, by kind: another system does.", "kind"),
		keeping:       &keepingCollector{manager: manager},
		apiRequests:   counter("api_requests_total", "API calls by apps, by client and result.", "client", "result"),
		apiRetries:    counter("api_credential_retries_total", "API calls repeated with a renewed credential, by kind.", "kind"),
		apiErrors:     counter("api_errors_total", "Error codes in WeChat's answers to API calls.", "errcode"),
		apiToday:      newDailyCalls(),
		oauth:         counter("oauth_total", "OAuth steps, by step and result.", "step", "result"),
		jssdk:         counter("jssdk_total", "Pages to be signed for the JS-SDK, by result.", "result"),
		authorize:     counter("authorize_total", "Steps of authorizing a platform, by step and result.", "step", "result"),
		storeDuration: histogram("store_operation_duration_seconds", "Time of a store operation.", prometheus.DefBuckets, "store", "op"),
		storeErrors:   counter("store_errors_total", "Store operations that did not succeed. A lock that another node is known to hold, and a caller that left, do not count.", "store", "op"),
		lockWait: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: "caddy", Subsystem: "wechat", Name: "lock_wait_seconds", Help: "Time until the store gave a lock, or did not.", Buckets: prometheus.DefBuckets,
		}),
		eventsDropped: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: "caddy", Subsystem: "wechat", Name: "events_dropped_total", Help: "Events that no handler heard of, because those that are subscribed are too slow.",
		}),
		forwards: counter("forwards_total", "Events that wechat_event forwards, by outcome, once nothing more is done with them.", "outcome"),
	}
	m.messageOK, m.messageDuration = m.pushes.WithLabelValues("message", "ok"), m.pushDuration.WithLabelValues("message")
	m.messageSealed = m.replies.WithLabelValues(outcomeSealed)
	m.apiServed = servedCalls{m.apiRequests, new(sync.Map)}
	m.begin()
	return m
}

// begin has the counters that alerts look for stand at zero: Prometheus sees no increase in a series whose first value is 1, and
// nothing at all of one that is not there.
func (m *metrics) begin() {
	for _, outcome := range []string{outcomePlain, outcomeSealed, outcomeUnusable, outcomeLost, outcomeLate, outcomeReleaseCheck} {
		m.replies.WithLabelValues(outcome)
	}
	for _, kind := range tokens.Kinds() {
		m.rogues.WithLabelValues(string(kind))
		m.tokenRefreshes.WithLabelValues(string(kind), resultOK)
		m.tokenRefreshes.WithLabelValues(string(kind), resultError)
	}
	m.lateReplies.WithLabelValues(resultOK)
	m.lateReplies.WithLabelValues(resultError)
	for _, copied := range []string{mirrorOK, mirrorError, mirrorFull} {
		m.mirrors.WithLabelValues(copied)
	}
	for _, how := range tokens.ForwardEnds() {
		m.forwards.WithLabelValues(string(how))
	}
}

func (m *metrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{
		m.pushes, m.pushDuration, m.replies, m.tokenRefreshes, m.refreshDuration, m.apiRequests, m.apiRetries,
		m.apiErrors, m.oauth, m.jssdk, m.authorize, m.storeDuration, m.storeErrors, m.tokenWaiters, m.rogues, m.keeping, m.apiToday,
		m.lockWait, m.eventsDropped, m.forwards,
		m.joined, m.takenOver, m.degraded, m.lateReplies, m.forgotten, m.inFlight, m.mirrors,
	}
}

// register adds the collectors to a configuration's registry; the gateway may be mentioned there more than once.
func (m *metrics) register(r *prometheus.Registry, more ...prometheus.Collector) error {
	for _, c := range append(m.collectors(), more...) {
		if err := r.Register(c); err != nil {
			if _, ok := errors.AsType[prometheus.AlreadyRegisteredError](err); !ok {
				return err
			}
		}
	}
	return nil
}

// What result returns.
const (
	resultOK    = "ok"
	resultError = "error"
)

// result names an outcome in a label.
func result(err error) string {
	if err != nil {
		return resultError
	}
	return resultOK
}

// TokenRefreshed is tokens.Observer's, for watcher.
func (m *metrics) TokenRefreshed(kind tokens.Kind, _ string, took time.Duration, err error) {
	m.tokenRefreshes.WithLabelValues(string(kind), result(err)).Inc()
	m.refreshDuration.WithLabelValues(string(kind)).Observe(took.Seconds())
}

// TokenAwaited is tokens.Observer's, for watcher.
func (m *metrics) TokenAwaited(callers int) { m.tokenWaiters.Add(float64(callers)) }

// RogueRefresh is tokens.Observer's, for watcher.
func (m *metrics) RogueRefresh(kind tokens.Kind, _ string) {
	m.rogues.WithLabelValues(string(kind)).Inc()
}

// ForwardEnded is tokens.Observer's, for watcher.
func (m *metrics) ForwardEnded(how tokens.ForwardEnd, events int) {
	m.forwards.WithLabelValues(string(how)).Add(float64(events))
}

// keepingCollector tells how well the manager can keep what it was given, as of each scrape.
type keepingCollector struct {
	manager *tokens.Manager

	mu      sync.Mutex
	awaited map[string]time.Time // platforms that have never had a ticket, and since when that is known
}

var (
	ticketAgeDesc = prometheus.NewDesc("caddy_wechat_ticket_age_seconds",
		"Time since the newest component_verify_ticket came, or since the first look at a platform that has none; WeChat pushes one every ten minutes.",
		[]string{"platform"}, nil)
	tokensCachedDesc = prometheus.NewDesc("caddy_wechat_tokens_cached",
		"Tokens in memory, by kind.", []string{"kind"}, nil)
	recordsWaitingDesc = prometheus.NewDesc("caddy_wechat_records_waiting",
		"Token records that the store has not taken yet, in the spill folder or in memory.", nil, nil)
	forwardsWaitingDesc = prometheus.NewDesc("caddy_wechat_forwards_waiting",
		"Events that wait to be forwarded by wechat_event, as far as this node knows; nodes that share a store count the same ones.", nil, nil)
	recordsUnsavedDesc = prometheus.NewDesc("caddy_wechat_records_unsaved",
		"Token records and tickets that live in this process's memory alone.", nil, nil)
)

// Describe implements prometheus.Collector.
func (*keepingCollector) Describe(c chan<- *prometheus.Desc) {
	c <- ticketAgeDesc
	c <- tokensCachedDesc
	c <- recordsWaitingDesc
	c <- recordsUnsavedDesc
	c <- forwardsWaitingDesc
}

// Collect implements prometheus.Collector.
func (k *keepingCollector) Collect(c chan<- prometheus.Metric) {
	for platform, since := range k.ticketsSince() {
		c <- prometheus.MustNewConstMetric(ticketAgeDesc, prometheus.GaugeValue, time.Since(since).Seconds(), platform)
	}
	for kind, n := range k.manager.Cached() {
		c <- prometheus.MustNewConstMetric(tokensCachedDesc, prometheus.GaugeValue, float64(n), string(kind))
	}
	c <- prometheus.MustNewConstMetric(recordsWaitingDesc, prometheus.GaugeValue, float64(k.manager.Waiting()))
	c <- prometheus.MustNewConstMetric(recordsUnsavedDesc, prometheus.GaugeValue, float64(k.manager.Unsaved()))
	c <- prometheus.MustNewConstMetric(forwardsWaitingDesc, prometheus.GaugeValue, float64(k.manager.ForwardsWaiting()))
}

// ticketsSince is when each platform's newest ticket came. Without one it is when that was first seen: whoever waits for an age to
// grow would otherwise never hear of a platform whose tickets do not arrive at all.
func (k *keepingCollector) ticketsSince() map[string]time.Time {
	k.mu.Lock()
	defer k.mu.Unlock()
	since, awaited := make(map[string]time.Time), make(map[string]time.Time)
	for _, platform := range k.manager.Platforms() {
		came := k.manager.TicketReceived(platform)
		if came.IsZero() {
			if came = k.awaited[platform]; came.IsZero() {
				came = time.Now()
			}
			awaited[platform] = came
		}
		since[platform] = came
	}
	k.awaited = awaited
	return since
}

// StoreOperation is tokens.Observer's, for watcher.
func (m *metrics) StoreOperation(op string, took time.Duration, err error) {
	m.storeDuration.WithLabelValues(m.store, op).Observe(took.Seconds())
	if op == "lock" {
		m.lockWait.Observe(took.Seconds())
	}
	if err != nil {
		m.storeErrors.WithLabelValues(m.store, op).Inc()
	}
}
