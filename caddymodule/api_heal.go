package caddymodule

import (
	"errors"
	"net/http"
	"net/url"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// WeChat answers 40001 not only when a token is bad, but also when a path wants another kind of token. Taken at its
// word each time, one such path would have the token of an account renewed with each call, for everybody who shares it.
const (
	refusingMemory = 10 * time.Minute // for how long a path that refused a new token is not believed
	maxRefusing    = 4096             // paths remembered at once; one that is forgotten costs a renewal
)

// refusingPath is a path whose refusals say nothing about the token.
type refusingPath struct {
	key  tokens.Key
	path string // in lower case, or another spelling would be another path
	once bool   // for calls that cannot be repeated: they never find out whether a new token helps
}

// refusedToken is what a call that cannot be repeated was refused with: whether the next token helps is seen in a later one. It is zero for
// other calls.
type refusedToken struct {
	value secret.String
	at    time.Time
}

func newRefusingPaths() *tokens.Window[refusingPath, refusedToken] {
	return tokens.NewWindow[refusingPath, refusedToken](refusingMemory, maxRefusing)
}

// heal is called with an answer that refused the token. It returns the answer of the one repetition, or else an answer
// that says why there was none.
func (t *Transport) heal(req *http.Request, call *apiCall, origin *url.URL, first *http.Response) (*http.Response, error) {
	path := refusingPath{key: call.key, path: strings.ToLower(call.path), once: !call.repeatable()}
	held := refusedToken{call.token.Value, time.Now()}
	renew := (*tokens.Manager).Renew
	if t.believesNot(path, held) {
		// Unless the token was replaced while the call was under way: then the refusal says nothing about the path.
		renew = (*tokens.Manager).Replaced
	}
	token, err := lasting(t.app, func(m *tokens.Manager) (tokens.Token, error) {
		return renew(m, req.Context(), call.key, call.token.Value)
	})
	switch {
	case errors.Is(err, tokens.ErrNotReplaced):
		return t.refusedAgain(req, call, first), nil
	case err != nil && req.Context().Err() != nil:
		_ = first.Body.Close()
		return t.failed(req, call, err)
	case err != nil && call.sdk:
		_ = first.Body.Close()
		call.outcome = outcomeUnavailable
		return ownAnswer(req, tokenRefusal(err, call.appid, true)), nil
	case err != nil, path.once, !call.repeatable(): // a body still under way may have outgrown the buffer meanwhile
		return first, nil // the next call has the new token
	}
	_ = first.Body.Close()
	t.app.metrics().apiRetries.WithLabelValues(string(call.key.Kind)).Inc()
	call.outcome = outcomeOK
	res, refused, err := t.attempt(req, call, origin, token.Value)
	switch {
	case err != nil:
		return t.failed(req, call, notDialing{err})
	case refused:
		t.refusing.Set(path, refusedToken{}, 0)
		if ok, missed := t.twice.allow(); ok {
			t.logger.Error("WeChat refused a token that was just renewed: does this path take another kind of token, or does another program renew it too?",
				zap.Inline(call), zap.String("kind", string(call.key.Kind)), zap.Int("not_logged", missed))
		}
		res = t.refusedAgain(req, call, res)
	case call.tookToken(req):
		t.app.manager().Healed(call.key, held.value, held.at)
	}
	return res, nil
}

// believesNot reports whether a refusal on that path is no reason to renew the token. Of the calls that cannot be
// repeated, the first one in a while is believed.
func (t *Transport) believesNot(path refusingPath, held refusedToken) bool {
	if !path.once {
		_, refusing := t.refusing.Get(path)
		return refusing
	}
	_, before := t.refusing.GetOrSet(path, func() refusedToken { return held })
	return before
}

// accepted notes that WeChat took the token of a call that cannot be repeated: the next refusal may be believed, and the last one was of
// the token. That it took the very token which it refused says nothing of the next one: the call was sent before. An answer that does not
// tell leaves the last refusal as it is.
func (t *Transport) accepted(req *http.Request, call *apiCall) {
	if call.key.Kind == "" || call.repeatable() || !call.tookToken(req) {
		return
	}
	another := func(held refusedToken) bool { return !held.value.Same(call.token.Value) }
	held, refused := t.refusing.Take(refusingPath{key: call.key, path: strings.ToLower(call.path), once: true}, another)
	if refused {
		t.app.manager().Healed(call.key, held.value, held.at)
	}
}

// tookToken reports whether WeChat's answer to a call shows that it took the token; of one without a body it cannot be told.
func (c *apiCall) tookToken(req *http.Request) bool {
	return req.Method != http.MethodHead && c.status == http.StatusOK && c.outcome != outcomeUnreachable && tokens.TookToken(c.errcode)
}

// refusedAgain is what the caller gets of a refusal that no renewal mends: WeChat's own answer or, so that no SDK asks
// for a new token again and again, one of the gateway's.
func (t *Transport) refusedAgain(req *http.Request, call *apiCall, res *http.Response) *http.Response {
	if !call.sdk {
		return res
	}
	_ = res.Body.Close()
	return ownAnswer(req, refuse(http.StatusOK, codeUnauthorizedAPI, "token",
		"WeChat refuses the token of %s on this path, also after it was renewed: does the path take another kind of token, "+
			"or does another program renew it too?", call.appid))
}

// notDialing hides that an error is one of dialing: part of the body may be gone, so Caddy must not try again.
type notDialing struct{ cause error }

func (e notDialing) Error() string { return e.cause.Error() }
func (e notDialing) Timeout() bool { return isTimeout(e.cause) }
