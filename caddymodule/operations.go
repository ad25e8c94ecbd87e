package caddymodule

import (
	"errors"
	"net/http"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
)

// operations are what those who run the gateway can ask of it and have it do. The admin endpoint offers them below
// /wechat/ and the console below its own address, so that both say the same. They return state, never a token, a key or
// a message.
type operations struct {
	app    *App // nil without the global option wechat
	logger *zap.Logger
	// running are asked for the configuration in force, in case app is not. nil: app is, as for a handler of its sites.
	running *generations
}

// operation is one of them. Its pattern is that of an http.ServeMux, for a path that begins with /.
type operation struct {
	method, path string
	handle       func(http.ResponseWriter, *http.Request) error
}

// errNotInForce is the answer while there is a gateway in the configuration, and none that runs.
var errNotInForce = caddy.APIError{HTTPStatus: http.StatusServiceUnavailable,
	Err: errors.New("no configuration with the global option wechat is in force: it is still being loaded, was refused, or has been stopped; the log says which")}

// now are the operations of the configuration in force. Each request asks anew: a reload may be refused after the admin
// endpoint has moved to it, and then nobody tells.
func (o *operations) now() (*operations, error) {
	if o.running == nil {
		return o, nil
	}
	app := o.running.current(o.app)
	if app == nil && o.app != nil {
		return nil, errNotInForce
	}
	return &operations{app: app, logger: o.logger}, nil
}

// list is all there is.
func (o *operations) list() []operation {
	ask := func(do func(*operations, http.ResponseWriter, *http.Request) error) func(http.ResponseWriter, *http.Request) error {
		return func(w http.ResponseWriter, r *http.Request) error {
			now, err := o.now()
			if err != nil {
				return err
			}
			return do(now, w, r)
		}
	}
	return []operation{
		{http.MethodGet, "/status", ask((*operations).status)},
		{http.MethodGet, "/ready", ask((*operations).ready)},
		{http.MethodGet, "/authorizers", ask((*operations).authorizers)},
		{http.MethodGet, "/authorizers/{appid}", ask((*operations).authorizer)},
		{http.MethodPost, "/refresh/{appid}", ask((*operations).refresh)},
		{http.MethodPost, "/revoke/{appid}", ask((*operations).revoke)},
		{http.MethodPost, "/drain", ask((*operations).drain)},
		{http.MethodGet, "/explain", o.explainCode},
		{http.MethodGet, "/feed", ask((*operations).liveFeed)},
		{http.MethodGet, "/orphans", ask((*operations).orphans)},
		{http.MethodGet, "/refusals", ask((*operations).refusals)},
		{http.MethodGet, "/funcs", ask((*operations).funcs)},
		{http.MethodGet, "/qr", ask((*operations).qr)},
		{http.MethodGet, "/verify", ask((*operations).verifyFiles)},
		{http.MethodPut, "/verify/{name}", ask((*operations).addVerifyFile)},
		{http.MethodPost, "/verify/{name}", ask((*operations).addVerifyFile)},
		{http.MethodDelete, "/verify/{name}", ask((*operations).deleteVerifyFile)},
	}
}
