package caddymodule

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
	"github.com/caddy-wechat/caddy-wechat/internal/stall"
)

// redisNode is one of several gateways on one Redis, each by a relay of its own.
type redisNode struct {
	*Message
	relay *redistest.Relay
	log   *lockedBuffer
}

// lockedBuffer is a log.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), text)
}

func newRedisNode(t *testing.T, server *redistest.Server) *redisNode {
	t.Helper()
	n := &redisNode{relay: redistest.NewRelay(t, server.Addr), log: new(lockedBuffer)}
	app, ctx := newTestApp(t, fmt.Sprintf(`{
		"accounts": [{"appid": %q, "secret": "s", "tokens": [%q], "aes_keys": [%q]}],
		"seal_keys": [%q], "store": {"module": "redis", "addresses": [%q]}
	}`, accountID, accountToken, accountKey, strings.Repeat("ab", 32), n.relay.Addr))
	n.Message = new(Message)
	if err := n.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	if !n.clustered {
		t.Fatal("a Redis makes no cluster")
	}
	app.env.Log = slog.New(slog.NewTextHandler(n.log, nil))
	return n
}

// answer pushes a message and returns the answer, decrypted, and how long it took by the clock.
func (n *redisNode) answer(t *testing.T, message string, next caddyhttp.Handler) (string, time.Duration) {
	t.Helper()
	began := time.Now()
	s := accountSender(t)
	rec := serve(t, n, s.push("/"+accountID, message), next)
	took := time.Since(began)
	if body := rec.Body.String(); rec.Code != http.StatusOK || body == "" || body == "success" {
		return fmt.Sprint(rec.Code, " ", body), took
	}
	text, err := s.codec.OpenReply(rec.Body.Bytes())
	if err != nil {
		t.Error(err)
	}
	return string(text), took
}

// counting is a backend that says how often it ran.
type counting struct{ runs atomic.Int32 }

func (b *counting) ServeHTTP(w http.ResponseWriter, _ *http.Request) error {
	_, _ = fmt.Fprintf(w, "<xml><Content>secret run %d</Content></xml>", b.runs.Add(1))
	return nil
}

const firstRun = "<xml><Content>secret run 1</Content></xml>"

// TestClaimsOnRedis: nodes on one Redis give one answer, and Redis has it sealed, if at all.
func TestClaimsOnRedis(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	for try := range stall.Tries(t, claimWait/4, server.Turn) { // a node takes Redis for being away when the machine stands still for longer
		server.Do("FLUSHALL")
		claimsOnRedis(t, try, server)
	}
}

func claimsOnRedis(t *testing.T, try *stall.Try, server *redistest.Server) {
	t.Helper()
	nodes := []*redisNode{newRedisNode(t, server), newRedisNode(t, server), newRedisNode(t, server)}
	backend, message := new(counting), textMessage("plain words")
	if got, _ := nodes[0].answer(t, message, backend); got != firstRun {
		try.Errorf("first: %s", got)
	}
	keys, _ := server.Do("KEYS", "wechat:claim:p*").([]any)
	if len(keys) != 1 {
		try.Errorf("%d claims", len(keys))
		return
	}
	// docs/clustering.md has this figure.
	if size, _ := server.Do("MEMORY", "USAGE", keys[0]).(int64); size > 160 {
		t.Errorf("a claim takes %d bytes", size)
	}
	for i := range 6 {
		if got, _ := nodes[i%3].answer(t, message, backend); got != firstRun {
			try.Errorf("again: %s", got)
		}
	}
	if n := backend.runs.Load(); n != 1 {
		try.Errorf("the backend ran %d times", n)
	}
	keys, _ = server.Do("KEYS", "wechat:*").([]any)
	answers := 0
	for _, key := range keys {
		name := key.(string)
		if server.Do("TYPE", name) != "string" {
			continue
		}
		value, _ := server.Do("GET", name).(string)
		if strings.Contains(value, "secret") || strings.Contains(value, "plain words") || strings.Contains(value, openID) {
			t.Errorf("%s shows %q", name, value)
		}
		if strings.HasPrefix(name, "wechat:once:{a") {
			answers++
		}
	}
	if answers != 1 {
		try.Errorf("%d answers in %q", answers, keys)
	}
}

// TestClaimsWithoutRedis: while Redis is away pushes are answered, and do not wait once that is known; it is said once, and once
// when Redis is back.
func TestClaimsWithoutRedis(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		away, back func(*redistest.Relay, *redistest.Server)
	}{
		"hangs": {func(r *redistest.Relay, _ *redistest.Server) { r.Hang() }, func(r *redistest.Relay, _ *redistest.Server) { r.Pass() }},
		"cut":   {func(r *redistest.Relay, _ *redistest.Server) { r.Cut() }, func(r *redistest.Relay, _ *redistest.Server) { r.Pass() }},
		"full": {func(_ *redistest.Relay, s *redistest.Server) { s.Do("CONFIG", "SET", "maxmemory", "1") },
			func(_ *redistest.Relay, s *redistest.Server) { s.Do("CONFIG", "SET", "maxmemory", "0") }},
		"killed": {func(_ *redistest.Relay, s *redistest.Server) { s.Kill() }, func(_ *redistest.Relay, s *redistest.Server) { s.Restart() }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for try := range stall.Tries(t, claimWait/4) { // a node takes Redis for being away when the machine stands still for longer
				claimsWithoutRedis(t, try, tt.away, tt.back)
			}
		})
	}
}

func claimsWithoutRedis(t *testing.T, try *stall.Try, takeAway, bringBack func(*redistest.Relay, *redistest.Server)) {
	t.Helper()
	server := redistest.Start(t)
	a, b := newRedisNode(t, server), newRedisNode(t, server)
	answer := func(n *redisNode, message string, next caddyhttp.Handler) (string, time.Duration) {
		start := time.Now()
		got, _ := n.answer(t, message, next)
		return got, try.Since(start)
	}
	degraded := a.app.metrics().degraded
	backend := new(counting)
	a.answer(t, textMessage("x"), backend)
	b.answer(t, textMessage("x"), backend)
	takeAway(a.relay, server)
	if got, took := answer(a, textMessage("x"), backend); !strings.Contains(got, "secret run") || took > claimWait+soon {
		try.Errorf("at first: %s after %v", got, took)
	}
	redistest.Eventually(t, "it is known", func() error {
		if testutil.ToFloat64(degraded) != 1 {
			return errStoreAway
		}
		return nil
	})
	message := textMessage("x")
	for range 5 {
		if got, took := answer(a, message, backend); !strings.Contains(got, "secret run 4") || took > soon {
			try.Errorf("then: %s after %v", got, took)
		}
	}
	bringBack(a.relay, server)
	redistest.Eventually(t, "Redis is back", func() error {
		if testutil.ToFloat64(degraded) != 0 || testutil.ToFloat64(b.app.metrics().degraded) != 0 {
			return errStoreAway
		}
		return nil
	})
	message = textMessage("x")
	first, _ := a.answer(t, message, backend)
	if again, _ := b.answer(t, message, backend); again != first {
		try.Errorf("on another node: %s, first it was %s", again, first)
	}
	// Once for each time, which a busy machine may add one to, and not for each push.
	away, back := a.log.count("the store does not answer for pushes"), a.log.count("are known on all nodes again")
	if away < 1 || away > 2 || back != away {
		try.Errorf("the log says %d times that the store is away, and %d times that it is back", away, back)
	}
}

// soon is more than what a push takes that waits for nothing, on a busy machine.
const soon = 400 * time.Millisecond

// TestClaimsWiped: a push that is held for another node is answered here when Redis has forgotten that.
func TestClaimsWiped(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	a, b := newRedisNode(t, server), newRedisNode(t, server)
	message := textMessage("x")
	begun, gate := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		defer func() {
			// It is answered, or WeChat has to push again: that depends on whether it heard that another node waits.
			if v := recover(); v != nil && v != http.ErrAbortHandler { //nolint:errorlint // as net/http compares it
				t.Errorf("panic: %v", v)
			}
		}()
		a.answer(t, message, caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
			close(begun)
			<-gate
			_, _ = io.WriteString(w, "<xml><Content>a</Content></xml>")
			return nil
		}))
	})
	<-begun
	wg.Go(func() {
		if got, _ := b.answer(t, message, new(counting)); got != firstRun {
			t.Errorf("held: %s", got)
		}
		close(gate)
	})
	redistest.Eventually(t, "the push is held", func() error {
		if b.app.claims().held() != 1 {
			return errHeld
		}
		return nil
	})
	server.Do("FLUSHALL")
	wg.Wait()
}

// held is how many messages that other nodes have answered pushes are held of here.
func (c *claims) held() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.waiting)
}
