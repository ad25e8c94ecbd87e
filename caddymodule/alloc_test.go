//go:build !race

package caddymodule

import (
	"net/http"
	"strings"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// The race detector allocates on its own account, so these gates are not built with it. They are what was measured: one
// that is exceeded tells what a change costs, and is raised only for what is worth that.
const (
	maxPushAllocs      = 23 // of wechat_message, beside those of Caddy and of the backend: 18, and what growing tables and emptied pools add
	maxPushAgainAllocs = 13 // of a push whose message was answered: 8, and what emptied pools add
	maxCallAllocs      = -6 // of a whole call, above what the proxy takes for one that it only passes on: 9 fewer, and what emptied pools add
	maxBearerAllocs    = 3
	maxOpaqueAllocs    = 10
	maxTransportAllocs = 2
	maxUploadAllocs    = 5 // of a call that has a body, for the watch over its being taken
)

func TestPushAllocations(t *testing.T) {
	const pushes = 500
	p := newPushBench(t, 2*pushes)
	i := 0
	count := func(name string, max float64, serve func()) float64 {
		i = 0
		n := testing.AllocsPerRun(pushes-1, func() { serve(); i++ })
		if t.Logf("%s: %v", name, n); n > max {
			t.Errorf("%s: %v allocations a push, want at most %v", name, n, max)
		}
		return n
	}
	backend, gateway := p.backend(), p.gateway()
	caddy := count("caddy", 1000, func() { p.push(t, backend, i) })
	count("a push", caddy+maxPushAllocs, func() { p.push(t, gateway, i) })
	count("again", caddy+maxPushAgainAllocs, func() { p.push(t, gateway, 0) })
}

func TestCallAllocations(t *testing.T) {
	g := newGateway(t, newFakeWeChat(t), "", "")
	calls := admittedCalls(g)
	c := newCallBench(t)
	proxied := testing.AllocsPerRun(500, func() { c.call(t, c.proxy) })
	n := testing.AllocsPerRun(500, func() { c.call(t, c.gateway) })
	if t.Logf("a call: %v, %v through the proxy alone", n, proxied); n > proxied+maxCallAllocs {
		t.Errorf("%v allocations a call, want at most %v", n, proxied+maxCallAllocs)
	}
	for name, max := range map[string]float64{"bearer": maxBearerAllocs, "opaque": maxOpaqueAllocs} {
		n := testing.AllocsPerRun(500, func() { admitCall(t, g, calls[name]) })
		if t.Logf("%s: %v", name, n); n > max {
			t.Errorf("%s: %v allocations a call, want at most %v", name, n, max)
		}
	}
	if n := testing.AllocsPerRun(500, lookingAtHeaders(t)); n != 0 {
		t.Errorf("%v allocations for an answer's headers", n)
	}
	n = testing.AllocsPerRun(500, transportRequest(t))
	if t.Logf("request: %v", n); n > maxTransportAllocs {
		t.Errorf("%v allocations for the transport's request, want at most %v", n, float64(maxTransportAllocs))
	}
}

func TestUploadAllocations(t *testing.T) {
	part := make([]byte, uploadPart)
	n := testing.AllocsPerRun(500, func() {
		kept := &keptBody{src: zeros{}, lost: true}
		u, _ := newUpload(t.Context(), stallTimeout, responseTimeout)
		body := u.body(&bodyReader{body: kept})
		_, _ = body.Read(part)
		_, _ = body.Read(part)
		_ = body.Close()
		u.end()
		u.cancel()
	})
	const beside = 2 // the body, and its first sending
	if t.Logf("an upload: %v", n-beside); n-beside > maxUploadAllocs {
		t.Errorf("%v allocations an upload, want at most %v", n-beside, float64(maxUploadAllocs))
	}
}

// lookingAtHeaders looks at those of a usual answer, one of them longer than the token.
func lookingAtHeaders(tb testing.TB) func() {
	token, call := secret.New(strings.Repeat("t", 136)), new(apiCall)
	h := http.Header{
		"Content-Type": {"application/json; encoding=utf-8"}, "Content-Length": {"123"}, "Date": {"Mon, 02 Jan 2006 15:04:05 GMT"},
		"X-Long": {strings.Repeat("t", 135) + strings.Repeat("x", 200)},
	}
	return func() {
		if echoes(h, call, token) {
			tb.Fatal("the token is in none of them")
		}
	}
}

func TestMatcherAllocatesNothing(t *testing.T) {
	for name, m := range benchMatchers() {
		if n := testing.AllocsPerRun(500, matching(t, m)); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func TestFeedAllocatesNothing(t *testing.T) {
	for name, enter := range map[string]func(){"push": feedOfPush(t), "call": feedOfCall(t)} {
		enter() // the account's place
		if n := testing.AllocsPerRun(500, enter); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}
