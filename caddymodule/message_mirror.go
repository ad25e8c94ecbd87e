package caddymodule

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"
)

// Defaults of copies to mirrors.
const (
	maxMirrorCopies = 256              // under way at once to one mirror; one that hangs must not pile them up
	mirrorTimeout   = 15 * time.Second // for one copy: as long as WeChat waits for the backend
)

// What can become of a copy; also the metric's label.
const (
	mirrorOK    = "ok"
	mirrorError = "error" // not delivered, or not accepted: a status other than 2xx
	mirrorFull  = "full"  // not sent: too many are under way to that mirror
)

// mirror is a further backend that gets a copy of each message.
type mirror struct {
	handler caddyhttp.Handler
	number  int           // as configured, from 1
	places  chan struct{} // one for each copy under way
	failed  damper
	full    damper
}

// provisionMirrors loads the mirrors' handlers.
func (m *Message) provisionMirrors(ctx caddy.Context) error {
	unused := m.limitsNoMirror()
	if m.MirrorTimeout == 0 {
		m.MirrorTimeout = caddy.Duration(mirrorTimeout)
	}
	if m.MirrorMaxInFlight == 0 {
		m.MirrorMaxInFlight = maxMirrorCopies
	}
	if err := m.checkMirrorLimits(); err != nil {
		return err
	}
	if unused {
		return errNoMirror
	}
	if len(m.MirrorsRaw) == 0 {
		return nil
	}
	if i := again(m.MirrorsRaw); i >= 0 {
		return fmt.Errorf("mirrors: entry %d is there before: each message would be sent there twice", i+1)
	}
	loaded, err := ctx.LoadModule(m, "MirrorsRaw")
	if err != nil {
		return fmt.Errorf("mirrors: %w", err)
	}
	for i, v := range loaded.([]any) {
		h, ok := v.(caddyhttp.MiddlewareHandler)
		if !ok {
			return fmt.Errorf("mirror %d: a %T handles no requests", i+1, v)
		}
		m.mirrors = append(m.mirrors, &mirror{
			handler: caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error { return h.ServeHTTP(w, r, nothing) }),
			number:  i + 1, places: make(chan struct{}, m.MirrorMaxInFlight),
		})
	}
	return nil
}

// limitsNoMirror reports whether there are limits and no mirror. It is for what has no defaults yet.
func (m *Message) limitsNoMirror() bool {
	return len(m.MirrorsRaw) == 0 && (m.MirrorTimeout != 0 || m.MirrorMaxInFlight != 0)
}

var errNoMirror = errors.New("mirror_timeout and mirror_max_in_flight are of copies for a mirror, and there is none")

// checkMirrorLimits refuses limits of copies that send none, or that pile them up. It is for Provision, which makes room for them.
func (m *Message) checkMirrorLimits() error {
	if err := checkMirrorTimeout(m.MirrorTimeout); err != nil {
		return err
	}
	if m.MirrorMaxInFlight < 0 || m.MirrorMaxInFlight > maxMaxInFlight {
		return fmt.Errorf("mirror_max_in_flight: want a number from 1 to %d", maxMaxInFlight)
	}
	return nil
}

// checkMirrorTimeout refuses a time for a copy that is longer than work in the background gets.
func checkMirrorTimeout(t caddy.Duration) error {
	if t <= 0 || time.Duration(t) > backgroundTimeout {
		return fmt.Errorf("mirror_timeout: want more than 0 and at most %s", backgroundTimeout)
	}
	return checkUnit("mirror_timeout", t)
}

// again is the first of the values that one before it says too, in whatever order and spacing; -1: each is there once.
func again(values []json.RawMessage) int {
	seen := make(map[string]bool, len(values))
	for i, raw := range values {
		var v any
		if json.Unmarshal(raw, &v) != nil || v == nil {
			continue // Caddy says what is wrong with it
		}
		text, _ := json.Marshal(v)
		if seen[string(text)] {
			return i
		}
		seen[string(text)] = true
	}
	return -1
}

// sendMirrors sends each mirror a copy of a message, in the background. It is for the first push of a message alone, and
// before the next handler gets it.
func (m *Message) sendMirrors(r *http.Request, p *push, f *facts) {
	if len(m.mirrors) == 0 || !mirrorable(p) {
		return
	}
	var copied *detached
	for _, to := range m.mirrors {
		select {
		case to.places <- struct{}{}:
		default:
			m.mirrored(to, mirrorFull, nil)
			continue
		}
		if copied == nil {
			own := *f
			own.content = bytes.Clone(p.fields.Content)
			copied = detach(r, p.fields.Format, &own, bytes.Clone(p.opened.Message))
		}
		m.app.background(func(ctx context.Context) {
			defer func() { <-to.places }()
			ctx, cancel := context.WithTimeout(ctx, time.Duration(m.MirrorTimeout))
			defer cancel()
			if err := copied.serve(ctx, to.handler); err != nil {
				m.mirrored(to, mirrorError, err)
				return
			}
			m.mirrored(to, mirrorOK, nil)
		})
	}
}

// mirrored counts a copy and tells the log, now and then, of one that did not arrive.
func (m *Message) mirrored(to *mirror, result string, err error) {
	m.app.metrics().mirrors.WithLabelValues(result).Inc()
	switch result {
	case mirrorError:
		if ok, missed := to.failed.allow(); ok {
			m.app.logger.Warn("a copy of a message did not reach a mirror, or it refused it",
				append(whyFields(err), zap.Int("mirror", to.number), zap.Int("missed", missed))...)
		}
	case mirrorFull:
		if ok, missed := to.full.allow(); ok {
			m.app.logger.Warn("copies of messages are not sent to a mirror, because too many are under way: it does not answer fast enough",
				zap.Int("mirror", to.number), zap.Int("under_way", cap(to.places)), zap.Int("missed", missed))
		}
	}
}

// mirrorable reports whether copies of a message may be made. WeChat's acceptance check (全网发布) is between it and
// whoever answers it, and the code in it works once.
func mirrorable(p *push) bool {
	if bytes.HasPrefix(bytes.TrimSpace(p.fields.Content), []byte(releaseCheckAuthCode)) {
		return false
	}
	_, check := releaseCheckAccounts[string(p.fields.ToUserName)]
	return !check || p.platform == nil
}

// unmarshalMirror parses the subdirective mirror, whose addresses are what reverse_proxy accepts. It may come again.
func (m *Message) unmarshalMirror(d *caddyfile.Dispenser) error {
	if d.CountRemainingArgs() == 0 {
		return d.ArgErr()
	}
	for d.NextArg() {
		// The tokens keep their place in the file, so that errors of reverse_proxy name it.
		name, address := d.Token(), d.Token()
		name.Text = "reverse_proxy"
		proxy := new(reverseproxy.Handler)
		if err := proxy.UnmarshalCaddyfile(caddyfile.NewDispenser([]caddyfile.Token{name, address})); err != nil {
			return fmt.Errorf("mirror: %w", err)
		}
		upstreams := proxy.Upstreams // several if the address is a range of ports
		for _, upstream := range upstreams {
			proxy.Upstreams = reverseproxy.UpstreamPool{upstream}
			raw := caddyconfig.JSONModuleObject(proxy, "handler", "reverse_proxy", nil)
			if slices.ContainsFunc(m.MirrorsRaw, func(other json.RawMessage) bool { return bytes.Equal(other, raw) }) {
				return d.Errf("mirror '%s' is given twice", address.Text)
			}
			m.MirrorsRaw = append(m.MirrorsRaw, raw)
		}
	}
	if d.NextBlock(d.Nesting()) {
		return d.Err("mirror takes addresses alone: a mirror with options of reverse_proxy can be given in JSON, as mirrors")
	}
	return nil
}
