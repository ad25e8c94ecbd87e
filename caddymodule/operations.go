package caddymodule

import (
	"net/http"

	"go.uber.org/zap"
)

// operations are what those who run the gateway can ask of it and have it do. The admin endpoint offers them below
// /wechat/ and the console below its own address, so that both say the same. They return state, never a token, a key or
// a message.
type operations struct {
	app    *App // nil without the global option wechat
	logger *zap.Logger
}

// operation is one of them. Its pattern is that of an http.ServeMux, for a path that begins with /.
type operation struct {
	method, path string
	handle       func(http.ResponseWriter, *http.Request) error
}

// list is all there is.
func (o *operations) list() []operation {
	return []operation{
		{http.MethodGet, "/status", o.status},
		{http.MethodGet, "/ready", o.ready},
		{http.MethodGet, "/authorizers", o.authorizers},
		{http.MethodGet, "/authorizers/{appid}", o.authorizer},
		{http.MethodPost, "/refresh/{appid}", o.refresh},
		{http.MethodPost, "/revoke/{appid}", o.revoke},
		{http.MethodPost, "/drain", o.drain},
		{http.MethodGet, "/explain", o.explainCode},
		{http.MethodGet, "/feed", o.liveFeed},
		{http.MethodGet, "/orphans", o.orphans},
		{http.MethodGet, "/refusals", o.refusals},
		{http.MethodGet, "/funcs", o.funcs},
		{http.MethodGet, "/qr", o.qr},
		{http.MethodGet, "/verify", o.verifyFiles},
		{http.MethodPut, "/verify/{name}", o.addVerifyFile},
		{http.MethodPost, "/verify/{name}", o.addVerifyFile},
		{http.MethodDelete, "/verify/{name}", o.deleteVerifyFile},
	}
}
