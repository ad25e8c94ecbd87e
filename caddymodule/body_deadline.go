package caddymodule

import (
	"net/http"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// setBodyDeadline gives what is still to come of a request's body so long, or as long as the server gives a whole body (read_body) if that
// is shorter, and returns how long that is: the deadline takes the place of the server's where there is no read_body_idle.
func setBodyDeadline(w http.ResponseWriter, r *http.Request, within time.Duration) time.Duration {
	if server, ok := r.Context().Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server); ok && server.ReadTimeout > 0 {
		within = min(within, time.Duration(server.ReadTimeout))
	}
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(within)) // what cannot has the server's limits
	return within
}

// endBodyDeadline takes the deadline back once all of the body is there, for it was the body's. In its place Caddy sets the server's own
// again, which is over as well: HTTP/1 takes one that passes for a caller who left, while the request waits for its answer.
func endBodyDeadline(w http.ResponseWriter, r *http.Request) {
	_ = http.NewResponseController(w).SetReadDeadline(time.Time{})
	if reader, _ := caddyhttp.IdleTimeoutsFromContext(r.Context()); reader != nil {
		reader.HandlerDone()
	}
}
