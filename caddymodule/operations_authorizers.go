package caddymodule

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// defaultAuthorizers is the number of accounts on a page when nobody says how many.
const defaultAuthorizers = 50

// listedAuthorizer is an account as the list of authorizers shows it.
type listedAuthorizer struct {
	Platform string `json:"platform"`
	AppID    string `json:"appid"`
	Name     string `json:"name,omitempty"`
	UserName string `json:"user_name,omitempty"`
	State    string `json:"state"`
}

func newListedAuthorizer(a tokens.ListedAuthorizer) listedAuthorizer {
	return listedAuthorizer{a.Platform, a.AppID, a.NickName, a.UserName, string(a.State)}
}

// authorizerPage is a page of that list.
type authorizerPage struct {
	Authorizers []listedAuthorizer `json:"authorizers"`
	Next        string             `json:"next"`
	Index       nameIndexState     `json:"index"`
}

// nameIndexState is how far the index is in which accounts are looked up by their names.
type nameIndexState struct {
	State string `json:"state"`
	Seen  int    `json:"seen"`
	Full  bool   `json:"full,omitempty"`
}

// authorizers lists the accounts that authorised a platform.
func (o *operations) authorizers(w http.ResponseWriter, r *http.Request) error {
	if o.app == nil {
		return errNoApp
	}
	q, err := operationQuery(r, "platform", "q", "cursor", "limit")
	if err != nil {
		return err
	}
	limit := defaultAuthorizers
	if text := q.Get("limit"); text != "" {
		if limit, err = strconv.Atoi(text); err != nil {
			limit = 0 // which is refused
		}
	}
	page, err := o.app.manager().Authorizers(r.Context(), tokens.AuthorizerQuery{
		Platform: q.Get("platform"), Text: q.Get("q"), Cursor: q.Get("cursor"), Limit: limit,
	})
	if err != nil {
		return o.refused(w, "authorizers cannot be listed", err)
	}
	answer := authorizerPage{Authorizers: []listedAuthorizer{}, Next: page.Next, Index: nameIndexState(page.Index)}
	for _, a := range page.Authorizers {
		answer.Authorizers = append(answer.Authorizers, newListedAuthorizer(a))
	}
	return answerJSON(w, http.StatusOK, answer)
}

// operationQuery is the query of a request that may have these parameters, each once.
func operationQuery(r *http.Request, names ...string) (url.Values, error) {
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, badRequest("%s", "the query is not in order: escape what is in it, as in q=%E5%B0%8F%E5%BA%97")
	}
	known := make(map[string]bool, len(names))
	for _, name := range names {
		if known[name] = true; len(q[name]) > 1 {
			return nil, badRequest("%s: comes twice", name)
		}
	}
	for name := range q {
		if !known[name] {
			return nil, badRequest("%q: there is no such parameter", name)
		}
	}
	return q, nil
}

// badRequest refuses a request for what it says.
func badRequest(format string, args ...any) error {
	return caddy.APIError{HTTPStatus: http.StatusBadRequest, Err: fmt.Errorf(format, args...)}
}

// oneAuthorizer reads which account a request is about, and of which platform, if it says so.
func (o *operations) oneAuthorizer(r *http.Request) (appid, platform string, err error) {
	if o.app == nil {
		return "", "", errNoApp
	}
	q, err := operationQuery(r, "platform")
	if err != nil {
		return "", "", err
	}
	appid = r.PathValue("appid")
	return appid, q.Get("platform"), o.isAuthorizer(appid)
}

// authorizerDetail is one account.
type authorizerDetail struct {
	listedAuthorizer
	AuthorizedAt   *time.Time      `json:"authorized_at,omitempty"`
	RevokedAt      *time.Time      `json:"revoked_at,omitempty"`
	Type           *accountType    `json:"type,omitempty"`
	Principal      string          `json:"principal,omitempty"`
	PermissionSets []permissionSet `json:"permission_sets"`
	Token          TokenStatus     `json:"token"`
	// LastPush, LastCall and LastError are what this node saw of the account last.
	LastPush  *Entry `json:"last_push,omitempty"`
	LastCall  *Entry `json:"last_call,omitempty"`
	LastError *Entry `json:"last_error,omitempty"`
}

type accountType struct {
	MiniProgram bool `json:"mini_program"`
}

type permissionSet struct {
	ID   int          `json:"id"`
	Name *tokens.Text `json:"name,omitempty"` // nil: it is not known here
}

// authorizer shows one account.
func (o *operations) authorizer(w http.ResponseWriter, r *http.Request) error {
	appid, platform, err := o.oneAuthorizer(r)
	if err != nil {
		return err
	}
	d, err := o.app.manager().AuthorizerDetail(r.Context(), platform, appid)
	if err != nil {
		return o.refused(w, "the account cannot be shown", err)
	}
	shown := authorizerDetail{
		listedAuthorizer: newListedAuthorizer(d.ListedAuthorizer), AuthorizedAt: timeOf(d.AuthorizedAt), RevokedAt: timeOf(d.RevokedAt),
		Principal: d.Principal, PermissionSets: []permissionSet{}, Token: tokenStatus(d.Token),
	}
	shown.LastPush, shown.LastCall, shown.LastError = o.app.shared.feed.of(appid)
	if d.Asked {
		shown.Type = &accountType{d.MiniProgram}
	}
	for _, id := range d.FuncInfo {
		set := permissionSet{ID: id}
		if name, ok := tokens.PermissionSet(id); ok {
			set.Name = &name
		}
		shown.PermissionSets = append(shown.PermissionSets, set)
	}
	return answerJSON(w, http.StatusOK, shown)
}

// isAuthorizer refuses an appid that is in the configuration, where no authorizer is.
func (o *operations) isAuthorizer(appid string) error {
	switch o.app.byAppID[appid].(type) {
	case *Platform:
		return caddy.APIError{HTTPStatus: http.StatusNotFound, Err: fmt.Errorf("%s is a platform, not an account that authorised one", appid)}
	case *Account:
		return caddy.APIError{HTTPStatus: http.StatusNotFound, Err: fmt.Errorf("%s is an account of the configuration, not one that authorised a platform", appid)}
	}
	return nil
}

// refused is the answer to an operation that failed. What its errors say was made for a log, and holds no secret.
func (o *operations) refused(w http.ResponseWriter, what string, err error) error {
	answer := func(status int, err error) error { return caddy.APIError{HTTPStatus: status, Err: err} }
	if query, ok := errors.AsType[tokens.QueryError](err); ok {
		return answer(http.StatusBadRequest, query)
	}
	if soon, ok := errors.AsType[*tokens.TooSoonError](err); ok {
		w.Header().Set("Retry-After", strconv.Itoa(max(1, int(math.Ceil(soon.After.Seconds())))))
		return answer(http.StatusTooManyRequests, soon)
	}
	api, isAPI := errors.AsType[*tokens.APIError](err)
	switch {
	case errors.Is(err, tokens.ErrStore), errors.Is(err, tokens.ErrClosed):
		return o.storeFailed(what, err)
	case errors.Is(err, tokens.ErrNoTicket):
		return answer(http.StatusServiceUnavailable, err)
	case errors.Is(err, tokens.ErrBackoff):
		return answer(http.StatusTooManyRequests, err)
	case isAPI:
		known, _ := tokens.Explain(api.Code)
		return answer(http.StatusBadGateway, fmt.Errorf("WeChat refuses: %w (%s; %s)", err, known.Meaning.EN, known.Remedy.EN))
	case errors.Is(err, tokens.ErrUnreachable):
		return answer(http.StatusBadGateway, err)
	case errors.Is(err, tokens.ErrNotConfigured), errors.Is(err, tokens.ErrNotAuthorized):
		return answer(http.StatusNotFound, err)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return answer(http.StatusGatewayTimeout, fmt.Errorf("%s: it takes too long; what was begun goes on", what))
	default:
		return o.storeFailed(what, err)
	}
}
