package caddymodule

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"net/http"
	"time"

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
	maxArrivals       = 10_000 // callbacks remembered, far more than can be started while a state lives
)

var startAllowance = allowance{what: "starts of authorizations", atOnce: visitorStarts, every: visitorStartEvery}

// authorizations are the starts and the ends of authorizations, as far as reloads share them. It is bounded and lives in
// memory; what a callback came to is also shared with the other nodes on the store.
type authorizations struct {
	manager  *tokens.Manager
	visitors *visitorLimits
	all      *rate.Limiter
	arrivals *tokens.Window[stateID, *callbackResult]
}

func newAuthorizations(manager *tokens.Manager) *authorizations {
	return &authorizations{
		manager:  manager,
		visitors: newVisitorLimits(),
		all:      rate.NewLimiter(rate.Every(allStartsEvery), allStarts),
		arrivals: tokens.NewWindow[stateID, *callbackResult](stateLife, maxArrivals),
	}
}

func (s *authorizations) close() {
	s.visitors.close()
	s.arrivals.Close()
}

// admit counts a start, and says why there may be none now.
func (s *authorizations) admit(r *http.Request) *oauthFailure {
	switch {
	case !s.visitors.take(visitorOf(r), startAllowance):
		return failVisitorTooMany
	case !s.all.Allow():
		return failAllTooMany
	}
	return nil
}

// callbackResult is what one callback came to. The fields below done are written before it is closed and read after.
type callbackResult struct {
	code [sha256.Size]byte // of the authorization code

	done    chan struct{}
	got     *authorized
	failure *oauthFailure
}

// once runs exchange for the first callback with a state; whoever brings the same state and code gets the same answer,
// on whichever node, waiting for it if need be. The same state with another code is failStateUsed. A failure is forgotten,
// so that a reload tries again, unless it is final: that is failStateUsed on other nodes.
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
	keep := false // also if exchange panics
	defer func() {
		if !keep {
			s.arrivals.Take(id, func(now *callbackResult) bool { return now == a })
		}
		close(a.done)
	}()
	a.got, keep, a.failure = s.exchange(context.WithoutCancel(ctx), id, a.code, exchange)
	return a.got, a.failure
}

// exchange runs the exchange of a callback, or has its result from another node. Keep says that this node is to remember
// the state.
func (s *authorizations) exchange(ctx context.Context, id stateID, code [sha256.Size]byte,
	exchange func(context.Context) (*authorized, *oauthFailure),
) (got *authorized, keep bool, failure *oauthFailure) {
	work := tokens.Work{
		Name: "authorize " + string(id[:]), Match: code[:],
		Limit: callbackTimeout, Repeat: stateLife, Memory: stateLife,
	}
	result, here, err := s.manager.DoOnce(ctx, work, func(ctx context.Context) ([]byte, bool, error) {
		ctx, cancel := context.WithTimeout(ctx, callbackTimeout)
		defer cancel()
		if got, failure = exchange(ctx); failure != nil {
			return nil, isFinal(failure), errCallbackFailed
		}
		result, err := json.Marshal(got.wire())
		return result, true, err
	})
	switch {
	case here:
		return got, failure == nil || isFinal(failure), failure
	case errors.Is(err, tokens.ErrWorkDone):
		return nil, false, failStateUsed
	case err != nil:
		return nil, false, exchangeFailure(err)
	}
	var wire authorizedWire
	if err := json.Unmarshal(result, &wire); err != nil {
		return nil, false, failUnfinished // of a newer version
	}
	return wire.authorized(), false, nil // the other node's time counts
}

// errCallbackFailed: what failed is beside it.
var errCallbackFailed = errors.New("the authorization did not succeed")

// authorizedWire is what a page tells about an account, as nodes share it.
type authorizedWire struct {
	AppID     string `json:"appid"`
	Name      string `json:"name,omitempty"`
	Principal string `json:"principal,omitempty"`
	Picture   string `json:"picture,omitempty"`
	Mini      bool   `json:"mini,omitempty"`
	Known     bool   `json:"known,omitempty"`
	Granted   []int  `json:"granted,omitempty"`
	Asked     []int  `json:"asked,omitempty"`
}

func (g *authorized) wire() authorizedWire {
	return authorizedWire{g.appid, g.name, g.principal, g.picture, g.mini, g.known, g.granted, g.asked}
}

func (w *authorizedWire) authorized() *authorized {
	return &authorized{
		appid: w.AppID, name: w.Name, principal: w.Principal, picture: w.Picture, mini: w.Mini, known: w.Known,
		granted: w.Granted, asked: w.Asked,
	}
}
