package caddymodule

import (
	"cmp"
	"errors"
	"fmt"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// Defaults and bounds of what wechat_event forwards.
const (
	defaultForwardTimeout = 30 * time.Second
	// maxForwardTimeout: after a change of store, connections to the one of before are kept for redisGrace.
	minForwardTimeout, maxForwardTimeout = time.Second, time.Minute
	// defaultMaxForwards: events are rare, and a backend that hangs must not pile them up.
	defaultMaxForwards = 64
	// maxMaxWaiting: each that waits is a record, and all of them are listed whenever one is tried again.
	maxMaxWaiting                  = 100_000
	minTryDuration, maxTryDuration = time.Minute, 30 * 24 * time.Hour
)

// ForwardLimits bound what wechat_event hands to the next handler. Of several wechat_event the largest MaxWaiting and TryDuration count: what
// waits is kept in one place.
type ForwardLimits struct {
	// BackendTimeout is how long the next handler has for an event, from 1 s to 1 m; one without an answer by then is tried again. Default: 30s.
	BackendTimeout caddy.Duration `json:"backend_timeout,omitempty"`
	// MaxInFlight is how many events may be at the next handler at once, at most 1,000,000; those above it wait for some minutes. Default: 64.
	MaxInFlight int `json:"max_in_flight,omitempty"`
	// MaxWaiting is how many events are kept that no backend has answered, at most 100,000; what comes then is not forwarded. Default: 1000.
	MaxWaiting int `json:"max_waiting,omitempty"`
	// TryDuration is how long an event is tried again, from 1 m to 720 h; then it is given up. Default: 168h.
	TryDuration caddy.Duration `json:"try_duration,omitempty"`
}

// provision fills in the defaults.
func (l *ForwardLimits) provision() {
	l.BackendTimeout = cmp.Or(l.BackendTimeout, caddy.Duration(defaultForwardTimeout))
	l.MaxInFlight = cmp.Or(l.MaxInFlight, defaultMaxForwards)
	l.MaxWaiting = cmp.Or(l.MaxWaiting, tokens.DefaultMaxForwards)
	l.TryDuration = cmp.Or(l.TryDuration, caddy.Duration(tokens.DefaultForwardLife))
}

// check refuses limits that make no sense. Those that are not said are zero.
func (l *ForwardLimits) check() error {
	return cmp.Or(
		l.checkDuration("backend_timeout", l.BackendTimeout, minForwardTimeout, maxForwardTimeout),
		l.checkDuration("try_duration", l.TryDuration, minTryDuration, maxTryDuration),
		l.checkNumber("max_in_flight", l.MaxInFlight, maxMaxInFlight),
		l.checkNumber("max_waiting", l.MaxWaiting, maxMaxWaiting),
	)
}

func (*ForwardLimits) checkDuration(field string, v caddy.Duration, least, most time.Duration) error {
	if err := checkUnit(field, v); err != nil {
		return err
	}
	if v != 0 && (time.Duration(v) < least || time.Duration(v) > most) {
		return fmt.Errorf("%s: want at least %s and at most %s, not %s", field, least, most, time.Duration(v))
	}
	return nil
}

func (*ForwardLimits) checkNumber(field string, v, most int) error {
	if v < 0 || v > most {
		return fmt.Errorf("%s: want a number from 1 to %d, not %d", field, most, v)
	}
	return nil
}

var errLimitsWithoutForward = errors.New("forward_limits: nothing is forwarded: put \"forward\": true beside it, or take it out")

// unmarshalForward parses forward, alone or with limits.
func (e *Event) unmarshalForward(d *caddyfile.Dispenser) error {
	if e.Forward {
		return d.Err("forward is given twice")
	}
	if d.NextArg() {
		return d.ArgErr()
	}
	e.Forward = true
	l := new(ForwardLimits)
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		var err error
		switch d.Val() {
		case "backend_timeout":
			err = duration(d, &l.BackendTimeout)
		case "max_in_flight":
			err = number(d, &l.MaxInFlight)
		case "max_waiting":
			err = number(d, &l.MaxWaiting)
		case "try_duration":
			err = duration(d, &l.TryDuration)
		default:
			err = d.Errf("unknown subdirective '%s' of forward: want backend_timeout, max_in_flight, max_waiting or try_duration", d.Val())
		}
		if err != nil {
			return err
		}
		if err := l.check(); err != nil {
			return d.WrapErr(err)
		}
		e.ForwardLimits = l
	}
	return nil
}
