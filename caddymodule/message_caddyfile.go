package caddymodule

import (
	"cmp"
	"fmt"
	"strconv"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/dustin/go-humanize"
)

// Defaults and bounds of wechat_message.
const (
	defaultPushes         = wechatPushes
	maxPushes             = 10
	defaultReplyTimeout   = 4500 * time.Millisecond
	defaultBackendTimeout = time.Minute
	maxBackendTimeout     = time.Hour
	defaultMaxInFlight    = 10_000
	maxMaxInFlight        = 1_000_000
)

// What the last push can get when the backend's answer is not there.
const (
	slowSuccess         = "success"
	slowText            = "text"
	slowCustomerService = "customer_service"

	deduplicateCluster = "cluster"
	deduplicateLocal   = "local"

	wantSlowReply = "want success, text and a text, or customer_service"
)

func parseMessage(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	m := new(Message)
	if err := m.UnmarshalCaddyfile(h.Dispenser); err != nil {
		return nil, err
	}
	return m, fitsOption(h, m)
}

// UnmarshalCaddyfile sets up the handler:
//
//	wechat_message [<matcher>] [<appid>] {
//		pushes               <number>
//		reply_timeout        <duration>
//		slow_reply           success | text <text> | customer_service
//		fallback             text <text>
//		backend_timeout      <duration>
//		timestamp_window     <duration>
//		max_body             <size>
//		max_in_flight        <number>
//		deduplication        cluster | local
//		mirror               <upstream>...
//		mirror_timeout       <duration>
//		mirror_max_in_flight <number>
//	}
func (m *Message) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if d.NextArg() {
		m.AppID = d.Val()
		if err := literalAppID(m.AppID); err != nil {
			return d.WrapErr(err)
		}
		if d.NextArg() {
			return d.ArgErr()
		}
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		if err := m.unmarshalOption(d); err != nil {
			return err
		}
	}
	if m.limitsNoMirror() {
		return d.WrapErr(errNoMirror)
	}
	if m.BackendTimeout != 0 {
		if err := checkBackendTimeout(m.BackendTimeout, cmp.Or(m.ReplyTimeout, caddy.Duration(defaultReplyTimeout))); err != nil {
			return d.WrapErr(err)
		}
	}
	return nil
}

func (m *Message) unmarshalOption(d *caddyfile.Dispenser) error {
	switch d.Val() {
	case "pushes":
		if err := number(d, &m.Pushes); err != nil {
			return err
		}
		if err := literalPushes(m.Pushes); err != nil {
			return d.WrapErr(err)
		}
	case "reply_timeout":
		if err := duration(d, &m.ReplyTimeout); err != nil {
			return err
		}
		if err := literalReplyTimeout(m.ReplyTimeout); err != nil {
			return d.WrapErr(err)
		}
	case "slow_reply":
		return m.unmarshalSlowReply(d)
	case "fallback":
		if m.FallbackText != "" {
			return d.Err("fallback is given twice")
		}
		var kind, text string
		if !d.AllArgs(&kind, &text) {
			return d.ArgErr()
		}
		if kind != "text" || text == "" {
			return d.Errf("fallback: want text and a text, such as: fallback text \"稍后回复您\"")
		}
		m.FallbackText = text
	case "backend_timeout":
		return duration(d, &m.BackendTimeout)
	case "timestamp_window":
		return windowOption(d, &m.TimestampWindow)
	case "max_body":
		return size(d, &m.MaxBody)
	case "max_in_flight":
		if err := number(d, &m.MaxInFlight); err != nil {
			return err
		}
		if m.MaxInFlight > maxMaxInFlight {
			return d.Errf("max_in_flight: at most %d", maxMaxInFlight)
		}
	case "deduplication":
		if err := value(d, &m.Deduplication, nil); err != nil {
			return err
		}
		if m.Deduplication != deduplicateCluster && m.Deduplication != deduplicateLocal {
			return d.Errf("deduplication: '%s' is none: want cluster or local", m.Deduplication)
		}
	case "mirror":
		return m.unmarshalMirror(d)
	case "mirror_timeout":
		if err := duration(d, &m.MirrorTimeout); err != nil {
			return err
		}
		if err := checkMirrorTimeout(m.MirrorTimeout); err != nil {
			return d.WrapErr(err)
		}
	case "mirror_max_in_flight":
		if err := number(d, &m.MirrorMaxInFlight); err != nil {
			return err
		}
		if m.MirrorMaxInFlight > maxMaxInFlight {
			return d.Errf("mirror_max_in_flight: at most %d", maxMaxInFlight)
		}
	default:
		return d.Errf("unknown subdirective '%s': want pushes, reply_timeout, slow_reply, fallback, backend_timeout, timestamp_window, max_body, max_in_flight, deduplication, mirror, mirror_timeout or mirror_max_in_flight", d.Val())
	}
	return nil
}

func (m *Message) unmarshalSlowReply(d *caddyfile.Dispenser) error {
	if m.SlowReply != "" {
		return d.Err("slow_reply is given twice")
	}
	args := d.RemainingArgs()
	if len(args) == 0 {
		return d.ArgErr()
	}
	m.SlowReply = args[0]
	switch {
	case m.SlowReply == slowText && len(args) == 2 && args[1] != "":
		m.SlowReplyText = args[1]
	case (m.SlowReply == slowSuccess || m.SlowReply == slowCustomerService) && len(args) == 1:
	default:
		return d.Errf("slow_reply: %s", wantSlowReply)
	}
	return nil
}

// literalPushes refuses a number of pushes that WeChat would never make.
func literalPushes(n int) error {
	if n < 1 || n > maxPushes {
		return fmt.Errorf("pushes: want a number from 1 to %d: WeChat pushes a message three times", maxPushes)
	}
	return nil
}

// literalReplyTimeout refuses a time after which WeChat no longer waits.
func literalReplyTimeout(t caddy.Duration) error {
	if t <= 0 || time.Duration(t) >= wechatWait {
		return fmt.Errorf("reply_timeout: want less than the %s that WeChat waits, and some time for the way back", wechatWait)
	}
	return checkUnit("reply_timeout", t)
}

// checkBackendTimeout refuses a time that ends the backend's work before the last push must be answered, or hardly ever.
func checkBackendTimeout(t, reply caddy.Duration) error {
	if err := checkUnit("backend_timeout", t); err != nil {
		return err
	}
	if t < reply || t > caddy.Duration(maxBackendTimeout) {
		return fmt.Errorf("backend_timeout: want at least reply_timeout, which is %s, and at most %s", time.Duration(reply), maxBackendTimeout)
	}
	return nil
}

// number parses a subdirective that is a positive number.
func number(d *caddyfile.Dispenser, into *int) error {
	name := d.Val()
	if *into != 0 {
		return d.Errf("%s is given twice", name)
	}
	var arg string
	if !d.AllArgs(&arg) {
		return d.ArgErr()
	}
	n, err := strconv.Atoi(arg)
	if err != nil || n <= 0 {
		return d.Errf("%s: '%s' is not a number above 0", name, arg)
	}
	*into = n
	return nil
}

// size parses a subdirective that is a number of bytes.
func size(d *caddyfile.Dispenser, into *int64) error {
	name := d.Val()
	if *into != 0 {
		return d.Errf("%s is given twice", name)
	}
	var arg string
	if !d.AllArgs(&arg) {
		return d.ArgErr()
	}
	n, err := humanize.ParseBytes(arg)
	if err != nil || n == 0 || n > maxSize {
		return d.Errf("%s: '%s' is not a size from 1 B to 1 GiB: write it like 1MiB", name, arg)
	}
	*into = int64(n)
	return nil
}
