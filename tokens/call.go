package tokens

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// Call makes one call of the gateway's own to WeChat's API with k's token in the query, GET or POST, and decodes the
// answer into out. If WeChat refuses the token it is renewed, once for all who wait, and the call is repeated once:
// WeChat refuses before it acts.
func (m *Manager) Call(ctx context.Context, k Key, method, path string, query url.Values, body, out any) error {
	env, err := m.current()
	if err != nil {
		return err
	}
	return m.call(ctx, env, k, method, path, query, body, out)
}

func (m *Manager) call(ctx context.Context, env *Environment, k Key, method, path string, query url.Values, body, out any) error {
	token, err := m.token(ctx, env, k)
	if err != nil {
		return tokenMissing(k, err)
	}
	err = send(ctx, env.API, token, tokenParameter(k.Kind, path), method, path, query, body, out)
	api, ok := errors.AsType[*APIError](err)
	if !ok || !IsTokenRefused(api.Code) {
		m.report(env, k, err)
		return err
	}
	held, at := token, time.Now()
	if token, err = m.renewRefused(ctx, env, k, held.Value); err != nil {
		if k.Kind == KindComponent && errors.Is(err, ErrBackoff) {
			m.dead(k, held.Value)
		}
		return tokenMissing(k, fmt.Errorf("%w (after %w)", err, api))
	}
	err = send(ctx, env.API, token, tokenParameter(k.Kind, path), method, path, query, body, out)
	if api, ok := errors.AsType[*APIError](err); ok && IsTokenRefused(api.Code) {
		m.refused(k, token.Value)
	}
	if tookToken(err) {
		m.Healed(k, held.Value, at)
	}
	m.report(env, k, err)
	return err
}

// refused notes that WeChat refused a token, for whoever asks for it next.
func (m *Manager) refused(k Key, token secret.String) {
	if e := m.cache.Load().get(k); e != nil && e.token.Value.Same(token) {
		m.troubles.refuse(k, token)
		e.refused.Store(true)
	}
}

// dead has a platform's token not spared that WeChat refused on a path which takes no other: authorizers, against whom it is not held, would
// have WeChat asked with it as often as apps call.
func (m *Manager) dead(k Key, token secret.String) {
	if e := m.cache.Load().get(k); e != nil && e.token.Value.Same(token) {
		m.troubles.end(k, token)
		e.ended.Store(true)
	}
}

// componentCall is call with a platform's own token.
func (m *Manager) componentCall(ctx context.Context, env *Environment, platform, path string, body, out any) error {
	return m.call(ctx, env, ComponentKey(platform), http.MethodPost, path, nil, body, out)
}

// errNoComponentToken marks a call that failed for want of the platform's own token, so that it is not held against
// the authorizer on whose behalf it was to be made.
var errNoComponentToken = errors.New("component token")

func tokenMissing(k Key, err error) error {
	if k.Kind == KindComponent {
		return fmt.Errorf("%w: %w", errNoComponentToken, err)
	}
	return err
}

func send(ctx context.Context, c *Client, t Token, parameter, method, path string, query url.Values, body, out any) error {
	query = maps.Clone(query)
	if query == nil {
		query = make(url.Values, 1)
	}
	query.Set(parameter, t.Value.Reveal())
	switch method {
	case http.MethodGet:
		return c.Get(ctx, path, query, out)
	case http.MethodPost:
		return c.Post(ctx, path, query, body, out)
	default:
		return fmt.Errorf("%s: method %q: want GET or POST", path, method)
	}
}

// tokenParameter names the query parameter. The component calls take access_token too by now, but every source
// agrees on component_access_token, and it cannot be taken for an authorizer's.
func tokenParameter(kind Kind, path string) string {
	if kind == KindComponent && (strings.HasPrefix(path, "/cgi-bin/component/") || strings.HasPrefix(path, "/sns/")) {
		return "component_access_token"
	}
	return "access_token"
}
