package caddymodule

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"strings"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// guardRead is how much of a guarded answer is read at once.
const guardRead = 8 << 10

// errRepeatsSecret is what a guarded answer ends with where it repeats a secret.
var errRepeatsSecret = errors.New("the answer repeats the request's credential")

// isTextual reports whether an answer may be one that repeats its request, as pages do. Media do not, and are passed on unread.
func isTextual(h http.Header) bool {
	types := h["Content-Type"]
	if len(types) == 0 {
		return true
	}
	media, _, _ := strings.Cut(types[0], ";")
	media = strings.ToLower(strings.TrimSpace(media))
	return media == "" || strings.HasPrefix(media, "text/") || strings.HasSuffix(media, "json") || strings.HasSuffix(media, "xml") ||
		strings.HasSuffix(media, "javascript")
}

// guardedBody is an answer of any length to a call with a secret of the gateway's. It is passed on as it comes, but for what may be
// the beginning of the secret, and breaks off before that is repeated.
type guardedBody struct {
	io.ReadCloser

	secrets []secret.String
	found   func() // told that a secret was
	buf     []byte
	ready   []byte // of buf: looked at, and not yet passed on
	held    []byte // of buf, behind that: what may be the beginning of a secret
	err     error  // what comes after ready
}

// guard has an answer's body, unless it was looked at already, break off before it repeats a secret of the call's.
func (t *Transport) guard(res *http.Response, call *apiCall, token secret.String) {
	if !call.sealed() || !isTextual(res.Header) {
		return
	}
	g := &guardedBody{ReadCloser: res.Body, found: func() { t.notAPI(call, "its answer has the request's credential in it, and was cut off") }}
	longest := 0
	add := func(s secret.String) {
		if !s.IsZero() {
			g.secrets, longest = append(g.secrets, s), max(longest, len(s.Reveal()))
		}
	}
	add(token)
	for _, p := range call.extra {
		if p.name == paramSecret {
			add(p.value)
		}
	}
	g.buf = make([]byte, guardRead+longest)
	res.Body = g
}

// Read implements io.Reader.
func (g *guardedBody) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	for len(g.ready) == 0 && g.err == nil {
		g.fill()
	}
	n := copy(b, g.ready)
	if g.ready = g.ready[n:]; len(g.ready) > 0 {
		return n, nil
	}
	return n, g.err
}

// fill reads once.
func (g *guardedBody) fill() {
	held := copy(g.buf, g.held)
	n, err := g.ReadCloser.Read(g.buf[held:])
	text := g.buf[:held+n]
	g.held, g.err = nil, err
	for _, s := range g.secrets {
		if at := indexSecret(text, s.Reveal()); at >= 0 {
			text, g.err = text[:at], errRepeatsSecret
		}
	}
	if g.err == errRepeatsSecret { //nolint:errorlint // our own, never wrapped
		g.found()
	}
	end := len(text)
	if g.err == nil {
		for _, s := range g.secrets {
			end = min(end, len(text)-startOf(text, s.Reveal()))
		}
	}
	g.ready, g.held = text[:end], text[end:]
}

// startOf is how many bytes at the end of a text may be the beginning of a secret.
func startOf(text []byte, value string) int {
	tail := text[max(0, len(text)-len(value)+1):]
	for {
		at := bytes.IndexByte(tail, value[0])
		if at < 0 {
			return 0
		}
		tail = tail[at:]
		if value[:len(tail)] == string(tail) {
			return len(tail)
		}
		tail = tail[1:]
	}
}
