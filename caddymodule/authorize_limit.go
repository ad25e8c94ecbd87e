package caddymodule

import (
	"context"
	"crypto/sha256"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"golang.org/x/time/rate"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// How often authorizations may be started: each start costs a call to WeChat, of which a day has a limited number.
const (
	visitorStarts     = 10          // of one visitor at once
	visitorStartEvery = time.Minute // of one visitor after that
	allStarts         = 100         // of all visitors at once
	allStartsEvery    = 2 * time.Second
	maxVisitors       = 10_000 // remembered; one more drops who started least lately
	visitorV6Bits     = 64     // what one visitor has of IPv6
	maxArrivals       = 10_000 // callbacks remembered, far more than can be started while a state lives
)

// authorizations are the starts and the ends of authorizations, as far as reloads share them. It is bounded and lives in
// memory only.
type authorizations struct {
	visitors *tokens.Window[netip.Prefix, *rate.Limiter]
	all      *rate.Limiter
	arrivals *tokens.Window[stateID, *callbackResult]
}

func newAuthorizations() *authorizations {
	return &authorizations{
		// A limiter is full again after this time, so nothing is lost when it is forgotten.
		visitors: tokens.NewWindow[netip.Prefix, *rate.Limiter](visitorStarts*visitorStartEvery, maxVisitors),
		all:      rate.NewLimiter(rate.Every(allStartsEvery), allStarts),
		arrivals: tokens.NewWindow[stateID, *callbackResult](stateLife, maxArrivals),
	}
}

func (s *authorizations) close() {
	s.visitors.Close()
	s.arrivals.Close()
}

// admit counts a start, and says why there may be none now.
func (s *authorizations) admit(r *http.Request) *oauthFailure {
	visitor := visitorOf(r)
	limiter, _ := s.visitors.GetOrSet(visitor, func() *rate.Limiter {
		return rate.NewLimiter(rate.Every(visitorStartEvery), visitorStarts)
	})
	s.visitors.Set(visitor, limiter, 0) // a value's life does not begin anew when it is read
	switch {
	case !limiter.Allow():
		return failVisitorTooMany
	case !s.all.Allow():
		return failAllTooMany
	}
	return nil
}

// visitorOf is the visitor's network. Requests without a readable address count as one visitor.
func visitorOf(r *http.Request) netip.Prefix {
	text, _ := caddyhttp.GetVar(r.Context(), caddyhttp.ClientIPVarKey).(string)
	if text == "" {
		text, _, _ = net.SplitHostPort(r.RemoteAddr)
	}
	addr, err := netip.ParseAddr(text)
	if err != nil {
		return netip.Prefix{}
	}
	addr = addr.Unmap().WithZone("")
	bits := addr.BitLen()
	if addr.Is6() {
		bits = visitorV6Bits
	}
	prefix, _ := addr.Prefix(bits) // the number of bits is right
	return prefix
}

// callbackResult is what one callback came to. The fields below done are written before it is closed and read after.
type callbackResult struct {
	code [sha256.Size]byte // of the authorization code

	done    chan struct{}
	got     *authorized
	failure *oauthFailure
}

// once runs exchange for the first callback with a state; whoever brings the same state and code gets the same answer,
// waiting for it if need be. The same state with another code is failStateUsed. A failure is forgotten, so that a reload
// tries again, unless it is final.
//
// Exchange runs on the caller's goroutine, detached from the caller's cancellation, with a deadline of its own.
func (s *authorizations) once(ctx context.Context, id stateID, code secret.String,
	exchange func(context.Context) (*authorized, *oauthFailure),
) (*authorized, *oauthFailure) {
	mine := &callbackResult{code: sha256.Sum256([]byte(code.Reveal())), done: make(chan struct{}), failure: failUnfinished}
	a, found := s.arrivals.GetOrSet(id, func() *callbackResult { return mine })
	if found {
		if a.code != mine.code {
			return nil, failStateUsed
		}
		select {
		case <-a.done:
			return a.got, a.failure
		case <-ctx.Done():
			return nil, exchangeFailure(ctx.Err())
		}
	}
	defer func() {
		if a.failure != nil && !isFinal(a.failure) {
			s.arrivals.Take(id, func(now *callbackResult) bool { return now == a })
		}
		close(a.done)
	}()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callbackTimeout)
	defer cancel()
	a.got, a.failure = exchange(ctx)
	return a.got, a.failure
}
