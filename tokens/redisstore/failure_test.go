package redisstore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/internal/stall"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

const (
	platform   = "wx00000000000000aa"
	account    = "wx00000000000000cc"
	authorizer = "wx00000000000000dd"
	// soon is more than what memory takes and less than any wait for a store.
	soon = 200 * time.Millisecond
	// inForce is how soon what happened on one node counts on all.
	inForce = time.Second
)

var authKey = tokens.AuthorizerKey(platform, authorizer)

// fakeWeChat gives another refresh token with each refresh, and takes the newest one alone.
type fakeWeChat struct {
	mu        sync.Mutex
	serial    int
	refresh   string
	refreshes int
	away      bool // for exchanges of codes
}

func (f *fakeWeChat) RoundTrip(r *http.Request) (*http.Response, error) {
	var body map[string]any
	if r.Body != nil {
		_ = json.NewDecoder(r.Body).Decode(&body)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.serial++
	token := fmt.Sprintf("token-%d", f.serial)
	answer := `{"errcode":0,"errmsg":"ok"}`
	switch r.URL.Path {
	case "/cgi-bin/stable_token":
		answer = fmt.Sprintf(`{"access_token":%q,"expires_in":7200}`, token)
	case "/cgi-bin/component/api_component_token":
		answer = fmt.Sprintf(`{"component_access_token":%q,"expires_in":7200}`, token)
	case "/cgi-bin/component/api_query_auth":
		if f.away {
			return nil, errors.New("WeChat is away")
		}
		f.refresh = "refresh-" + token
		answer = fmt.Sprintf(`{"authorization_info":{"authorizer_appid":%q,"authorizer_access_token":%q,"expires_in":7200,"authorizer_refresh_token":%q}}`,
			authorizer, token, f.refresh)
	case "/cgi-bin/component/api_authorizer_token":
		if body["authorizer_refresh_token"] != f.refresh {
			answer = `{"errcode":61023,"errmsg":"refresh_token is invalid"}`
			break
		}
		f.refreshes++
		f.refresh = "refresh-" + token
		answer = fmt.Sprintf(`{"authorizer_access_token":%q,"expires_in":7200,"authorizer_refresh_token":%q}`, token, f.refresh)
	case "/cgi-bin/ticket/getticket":
		answer = fmt.Sprintf(`{"errcode":0,"errmsg":"ok","ticket":%q,"expires_in":7200}`, token)
	case "/cgi-bin/component/api_get_authorizer_info":
		answer = fmt.Sprintf(`{"authorizer_info":{"user_name":"gh_1"},"authorization_info":{"authorizer_appid":%q,"authorizer_refresh_token":%q}}`, authorizer, f.refresh)
	case "/cgi-bin/component/api_get_authorizer_list":
		answer = fmt.Sprintf(`{"total_count":1,"list":[{"authorizer_appid":%q,"refresh_token":%q,"auth_time":1}]}`, authorizer, f.refresh)
	}
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(answer)), Request: r}, nil
}

func (f *fakeWeChat) set(change func()) { f.mu.Lock(); defer f.mu.Unlock(); change() }

func (f *fakeWeChat) count() int { f.mu.Lock(); defer f.mu.Unlock(); return f.refreshes }

func (f *fakeWeChat) current() string { f.mu.Lock(); defer f.mu.Unlock(); return f.refresh }

// node is a gateway's manager, with a relay between it and Redis.
type node struct {
	*tokens.Manager
	wx    *fakeWeChat
	relay *redistest.Relay
	store *Store

	tickets int
}

func newNode(t *testing.T, wx *fakeWeChat, target string, cut bool) *node {
	t.Helper()
	relay := redistest.NewRelay(t, target)
	if cut {
		relay.Cut()
	}
	n := newNodeOn(t, wx, Options{Addresses: []string{relay.Addr}})
	n.relay = relay
	return n
}

// newNodeOn is a node without a relay.
func newNodeOn(t *testing.T, wx *fakeWeChat, o Options) *node {
	t.Helper()
	n := &node{Manager: tokens.NewManager(), wx: wx, store: open(t, o)}
	client, err := tokens.NewClient(tokens.ClientOptions{Transport: wx})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	n.Use(&tokens.Environment{
		Store: n.store, API: client, Spill: t.TempDir(),
		Platforms: []tokens.PlatformCredentials{{AppID: platform, Secret: secret.New("s")}},
		Accounts:  []tokens.AccountCredentials{{AppID: account, Secret: secret.New("s")}},
	})
	return n
}

func (n *node) get(t *testing.T, k tokens.Key) tokens.Token {
	t.Helper()
	token, err := n.Get(t.Context(), k)
	if err != nil {
		t.Fatalf("Get(%v): %v", k, err)
	}
	return token
}

func (n *node) ticket(t *testing.T) error {
	t.Helper()
	n.tickets++
	created := time.Now().Add(time.Duration(n.tickets) * time.Second) // each is another one
	return n.PutTicket(t.Context(), platform, tokens.Ticket{Value: secret.New(fmt.Sprint("ticket-", n.tickets)), CreatedAt: created})
}

func (n *node) accept(t *testing.T) error {
	t.Helper()
	now := time.Now()
	return n.Accept(t.Context(), tokens.Intent{
		Platform: platform, AppID: authorizer, Code: secret.New(fmt.Sprint("code-", now.UnixNano())), CreatedAt: now, InfoType: "updateauthorized",
	})
}

// authorize has the account authorise, and its token at hand.
func (n *node) authorize(t *testing.T) {
	t.Helper()
	if err := n.ticket(t); err != nil {
		t.Fatal(err)
	}
	if _, err := n.ExchangeAuthCode(t.Context(), platform, authorizer, secret.New(fmt.Sprint("code-", time.Now().UnixNano()))); err != nil {
		t.Fatal(err)
	}
	n.get(t, authKey)
}

// written waits until nothing waits for the store, and looks whether it has WeChat's refresh token.
func (n *node) written(t *testing.T, server *redistest.Server) {
	t.Helper()
	redistest.Eventually(t, "the store has what WeChat has", func() error {
		if w, u := n.Waiting(), n.Unsaved(); w+u > 0 {
			return fmt.Errorf("%d wait, %d unsaved", w, u)
		}
		fields, err := server.Client().HGetAll(t.Context(), n.folderOfAuthorizer(t, server)).Result()
		if err != nil {
			return err
		}
		if record := fields[authorizer]; !strings.Contains(record, fmt.Sprintf("%q", n.wx.current())) {
			return errors.New("the record has another refresh token")
		}
		return nil
	})
}

func (n *node) folderOfAuthorizer(t *testing.T, server *redistest.Server) string {
	t.Helper()
	keys, err := server.Client().Keys(t.Context(), "wechat:{wechat/v1/authorizer/"+platform+"/??}").Result()
	if err != nil || len(keys) != 1 {
		return ""
	}
	return keys[0]
}

// servesOn fails unless the token at hand is served, and soon.
func (n *node) servesOn(t *testing.T, k tokens.Key, want tokens.Token) {
	t.Helper()
	w := stall.New(t)
	for i := range 20 {
		start := time.Now()
		got := n.get(t, k)
		if took := w.Since(start); took > checkLimit(i) {
			t.Errorf("use %d waited %v", i, took)
		}
		if !got.Value.Same(want.Value) {
			t.Fatalf("use %d: another token", i)
		}
	}
}

// checkLimit: the first use may find out that the store is away.
func checkLimit(use int) time.Duration {
	if use == 0 {
		return 2 * time.Second
	}
	return soon
}

// TestRedisThatFails: what was acknowledged is kept, what could not be kept is not acknowledged, and live tokens serve on.
func TestRedisThatFails(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		fail, mend func(*redistest.Server, *redistest.Relay)
	}{
		"down":    {func(_ *redistest.Server, r *redistest.Relay) { r.Cut() }, func(_ *redistest.Server, r *redistest.Relay) { r.Pass() }},
		"killed":  {func(s *redistest.Server, _ *redistest.Relay) { s.Kill() }, func(s *redistest.Server, _ *redistest.Relay) { s.Restart() }},
		"stopped": {func(s *redistest.Server, _ *redistest.Relay) { s.Pause() }, func(s *redistest.Server, _ *redistest.Relay) { s.Resume() }},
		"hangs":   {func(_ *redistest.Server, r *redistest.Relay) { r.Hang() }, func(_ *redistest.Server, r *redistest.Relay) { r.Pass() }},
		"full": {
			func(s *redistest.Server, _ *redistest.Relay) { s.Do("CONFIG", "SET", "maxmemory", "1") },
			func(s *redistest.Server, _ *redistest.Relay) { s.Do("CONFIG", "SET", "maxmemory", "0") },
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := redistest.Start(t, "--appendonly", "yes", "--appendfsync", "always")
			n := newNode(t, new(fakeWeChat), server.Addr, false)
			n.authorize(t)
			token := n.get(t, authKey)
			tt.fail(server, n.relay)

			n.servesOn(t, authKey, token)
			start := time.Now()
			if err := n.accept(t); !errors.Is(err, tokens.ErrStore) {
				t.Errorf("an event was acknowledged: %v", err)
			}
			if err := n.ticket(t); !errors.Is(err, tokens.ErrStore) {
				t.Errorf("a ticket was acknowledged: %v", err)
			}
			if took := time.Since(start); took > 2*4500*time.Millisecond {
				t.Errorf("WeChat waited %v for two answers", took)
			}
			if _, err := n.Ticket(t.Context(), platform); err != nil {
				t.Errorf("the ticket does not serve from memory: %v", err)
			}
			// WeChat changes the refresh token while the store is away.
			renewed, err := n.Renew(t.Context(), authKey, token.Value)
			if err != nil || renewed.Value.Same(token.Value) {
				t.Fatalf("Renew: %v", err)
			}
			if w, u := n.Waiting(), n.Unsaved(); w != 1 || u != 1 { // the ticket is in memory alone
				t.Errorf("%d records wait, %d are in memory alone", w, u)
			}
			n.servesOn(t, authKey, renewed)

			tt.mend(server, n.relay)
			n.written(t, server)
			other := newNode(t, n.wx, server.Addr, false)
			if got := other.get(t, authKey); !got.Value.Same(renewed.Value) {
				t.Error("another node has another token")
			}
			if c := n.wx.count(); c != 1 {
				t.Errorf("%d refreshes, want 1", c)
			}
		})
	}
}

func TestRedisDownAtStart(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	n := newNode(t, new(fakeWeChat), server.Addr, true)
	n.get(t, tokens.AccountKey(account)) // has nothing to lose
	if err := n.ticket(t); !errors.Is(err, tokens.ErrStore) {
		t.Errorf("a ticket was acknowledged: %v", err)
	}
	n.get(t, tokens.ComponentKey(platform)) // by the ticket in memory
	if err := n.accept(t); !errors.Is(err, tokens.ErrStore) {
		t.Errorf("an event was acknowledged: %v", err)
	}
	n.relay.Pass()
	redistest.Eventually(t, "what waited is written", func() error {
		if w, u := n.Waiting(), n.Unsaved(); w+u > 0 {
			return fmt.Errorf("%d wait, %d unsaved", w, u)
		}
		return nil
	})
	redistest.Eventually(t, "events are taken", func() error { return n.accept(t) })
}

// TestRedisWiped: live tokens serve on, and a node that knows nothing has the account from WeChat.
func TestRedisWiped(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	n := newNode(t, new(fakeWeChat), server.Addr, false)
	n.authorize(t)
	token := n.get(t, authKey)
	server.Do("FLUSHALL")
	n.servesOn(t, authKey, token)
	if err := n.ticket(t); err != nil {
		t.Fatal(err)
	}
	other := newNode(t, n.wx, server.Addr, false)
	redistest.Eventually(t, "the account on another node", func() error {
		_, err := other.Get(t.Context(), authKey)
		return err
	})
	n.written(t, server)
}

// TestFailOverThatLosesTheLastWrites: the replica that takes over never got the new authorization; the node that was
// told yes for it writes it again.
func TestFailOverThatLosesTheLastWrites(t *testing.T) {
	t.Parallel()
	master := redistest.Start(t)
	link := redistest.NewRelay(t, master.Addr)
	replica := redistest.Replica(t, link.Addr)
	n := newNode(t, new(fakeWeChat), master.Addr, false)
	n.authorize(t)
	old := n.wx.current()
	redistest.Eventually(t, "the replica has it", func() error {
		if len(replica.Do("KEYS", "*authorizer*").([]any)) == 0 {
			return errors.New("not yet")
		}
		return nil
	})
	link.Hang()
	n.authorize(t)
	n.wx.set(func() { n.wx.away = true })
	if err := n.accept(t); err != nil {
		t.Fatal(err)
	}
	master.Kill()
	link.Cut()
	replica.Do("REPLICAOF", "NO", "ONE")
	if record := replica.Client().HGet(t.Context(), n.folderOfAuthorizer(t, replica), authorizer).Val(); !strings.Contains(record, old) {
		t.Fatal("the replica has lost nothing")
	}
	n.relay.Retarget(replica.Addr)
	n.written(t, replica)
	redistest.Eventually(t, "the accepted authorization", func() error {
		if len(replica.Do("HKEYS", "wechat:{wechat/v1/intent}").([]any)) == 0 {
			return errors.New("is not there")
		}
		return nil
	})
}

// TestNodesActAsOne: one refresh for all nodes, and what happens on one is in force on all.
func TestNodesActAsOne(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	for try := range stall.Tries(t, stepStop, server.Turn) {
		server.Do("FLUSHALL")
		nodesActAsOne(t, try, server)
	}
}

func nodesActAsOne(t *testing.T, try *stall.Try, server *redistest.Server) {
	t.Helper()
	wx := new(fakeWeChat)
	nodes := make([]*node, 3)
	for i := range nodes {
		nodes[i] = newNode(t, wx, server.Addr, false)
		defer nodes[i].Close()
	}
	a, b := nodes[0], nodes[1]
	a.authorize(t)
	before := a.get(t, authKey)
	for _, n := range nodes {
		redistest.Eventually(t, "the node has the ticket", func() error { _, err := n.Ticket(t.Context(), platform); return err })
		n.get(t, authKey)
	}
	var wg sync.WaitGroup
	for range 20 {
		for _, n := range nodes {
			wg.Go(func() {
				if _, err := n.Renew(t.Context(), authKey, before.Value); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
	if c := wx.count(); c != 1 {
		t.Errorf("%d refreshes of one token on three nodes", c)
	}
	waitFor := func(what string, limit time.Duration, done func() bool) {
		t.Helper()
		start := time.Now()
		redistest.Eventually(t, what, func() error {
			if !done() {
				return errors.New("not yet")
			}
			return nil
		})
		if took := try.Since(start); took > limit {
			try.Errorf("%s took %v", what, took)
		}
	}
	a.authorize(t)
	token := a.get(t, authKey)
	waitFor("the new authorization", inForce, func() bool { return b.get(t, authKey).Value.Same(token.Value) })
	revoked := func() bool {
		_, err := b.Get(t.Context(), authKey)
		return errors.Is(err, tokens.ErrNotAuthorized)
	}
	if err := a.Revoke(t.Context(), platform, authorizer, time.Now().Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	waitFor("the revocation", inForce, revoked)

	// A message is lost with the connection: it counts once there is another.
	if _, err := a.ExchangeAuthCode(t.Context(), platform, authorizer, secret.New("code-again")); err != nil {
		t.Fatal(err)
	}
	waitFor("the account is back", 2*inForce, func() bool { _, err := b.Get(t.Context(), authKey); return err == nil })
	b.relay.Cut()
	if err := a.Revoke(t.Context(), platform, authorizer, time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if revoked() {
		t.Error("a node that is cut off knows what it cannot")
	}
	b.relay.Pass()
	waitFor("the revocation that was missed", 2*inForce, revoked)
}

// TestPasswordsAreSaidToNobody: not by an error of an operation, and not by a report.
func TestPasswordsAreSaidToNobody(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, "--requirepass", "right-password")
	reports := make(chan error, 10)
	s := open(t, Options{Addresses: []string{server.Addr}, Password: secret.New("wrong-password"), Report: func(err error) { reports <- err }})
	_, err := s.Load(t.Context(), locked)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { s.Watch(ctx, new(deafListener)); close(done) }()
	reported := <-reports
	cancel()
	<-done
	for _, err := range []error{err, reported} {
		if err == nil || !strings.Contains(err.Error(), "WRONGPASS") || strings.Contains(fmt.Sprintf("%v %+v", err, err), "wrong-password") {
			t.Errorf("error %v", err)
		}
	}
	if text := fmt.Sprintf("%+v", Options{Password: secret.New("wrong-password"), SentinelPassword: secret.New("wrong-password")}); strings.Contains(text, "wrong-password") {
		t.Errorf("options print as %s", text)
	}
}

type deafListener struct{}

func (deafListener) Listening(bool) {}
func (deafListener) Changed(string) {}

// sentinelRights are enough for a user of the Sentinels, and docs/clustering.md names them.
var sentinelRights = []any{"&+switch-master", "&+replica-reconf-done", "+@connection", "+sentinel|get-master-addr-by-name", "+sentinel|sentinels", "+subscribe"}

// TestSentinelsHaveAUserOfTheirOwn: and the server another password.
func TestSentinelsHaveAUserOfTheirOwn(t *testing.T) {
	t.Parallel()
	master := redistest.Start(t)
	sentinel := redistest.Sentinels(t, "wechat", master, 0)[0]
	master.Do("ACL", "SETUSER", "gateway", "on", ">of-the-server", "~*", "&*", "+@all")
	asked := redis.NewClient(&redis.Options{Addr: sentinel})
	defer func() { _ = asked.Close() }()
	err := open(t, Options{Addresses: []string{sentinel}}).Tell(t.Context(), "node", "x")
	concise(t, err, "it is a sentinel, for which store redis has the option sentinel", "of-the")
	rights := append([]any{"ACL", "SETUSER", "asker", "on", ">of-the-sentinels"}, sentinelRights...)
	for _, args := range [][]any{rights, {"ACL", "SETUSER", "default", "off"}} {
		if err := asked.Do(t.Context(), args...).Err(); err != nil {
			t.Fatal(err)
		}
	}
	o := Options{
		Addresses: []string{sentinel}, Master: "wechat", Username: "gateway", Password: secret.New("of-the-server"),
		SentinelUsername: "asker", SentinelPassword: secret.New("of-the-sentinels"),
	}
	if err := open(t, o).Store(t.Context(), "a", []byte("x")); err != nil {
		t.Error(err)
	}
	redistest.Eventually(t, "it hears of a fail-over", func() error {
		clients, err := asked.Do(t.Context(), "CLIENT", "LIST", "TYPE", "pubsub").Text()
		if err == nil && !regexp.MustCompile(`(?m) sub=2 .* user=asker `).MatchString(clients) {
			err = fmt.Errorf("who subscribes: %s", clients)
		}
		return err
	})
	o.SentinelPassword = secret.New("of-nobody")
	if err := open(t, o).Store(t.Context(), "a", []byte("x")); err == nil || !strings.Contains(err.Error(), "sentinels") || strings.Contains(err.Error(), "of-nobody") {
		t.Errorf("with the wrong password the error is %v", err)
	}
}

// TestUserOfAnAccessList: these rights are enough, and docs/clustering.md names them.
func TestUserOfAnAccessList(t *testing.T) {
	t.Parallel()
	t.Run("server", func(t *testing.T) {
		t.Parallel()
		server := redistest.Start(t)
		hasRights(t, []*redistest.Server{server}, "", Options{Addresses: []string{server.Addr}})
	})
	t.Run("cluster", func(t *testing.T) {
		t.Parallel()
		nodes := redistest.Cluster(t)
		hasRights(t, nodes, "cluster", Options{Addresses: []string{nodes[0].Addr}, Cluster: true})
	})
}

func hasRights(t *testing.T, servers []*redistest.Server, more string, o Options) {
	t.Helper()
	args := []any{"ACL", "SETUSER", "gateway", "on", ">pass", "~wechat:*", "&wechat:*", "+@connection", "+@scripting"}
	for c := range strings.FieldsSeq("hget hset hdel hkeys get set del pttl time publish subscribe info " + more) {
		args = append(args, "+"+c)
	}
	for _, s := range servers {
		s.Do(args...)
	}
	o.Username, o.Password = "gateway", secret.New("pass")
	a, b := open(t, o), open(t, o)
	defer mustLock(t, a)()
	if err := a.Swap(t.Context(), locked, nil, []byte("x")); err != nil {
		t.Error(err)
	}
	if _, first, err := a.Claim(t.Context(), "x", nil, time.Minute); err != nil || !first {
		t.Error(first, err)
	}
	if _, err := b.Take(t.Context(), "x"); err != nil {
		t.Error(err)
	}
	if names, err := b.List(t.Context(), "wechat/v1/account"); err != nil || len(names) != 1 {
		t.Error(names, err)
	}
	if err := a.ClaimAll([]tokens.Claim{{Name: "x", Value: []byte("1"), TTL: time.Minute}}, time.Minute); err != nil {
		t.Error(err)
	}
	if value, _, err := b.PeekClaim(t.Context(), "x"); err != nil || string(value) != "1" {
		t.Error(value, err)
	}
	if swapped, err := b.SwapClaim(t.Context(), "x", []byte("1"), []byte("2"), 0); err != nil || !swapped {
		t.Error(swapped, err)
	}
	if err := a.Beat(t.Context(), "node", time.Minute); err != nil {
		t.Error(err)
	}
	if alive, err := b.Lives(t.Context(), "node"); err != nil || !alive {
		t.Error(alive, err)
	}
	if err := a.Tell(t.Context(), "node", "x"); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	on := make(listening, 10)
	var wg sync.WaitGroup
	wg.Go(func() { b.Watch(ctx, on) })
	defer wg.Wait()
	defer cancel()
	if !<-on {
		t.Error("does not listen")
	}
}

type listening chan bool

func (l listening) Listening(on bool) {
	select {
	case l <- on:
	default:
	}
}
func (listening) Changed(string) {}

// TestEvictionIsReported: a server that may throw away refresh tokens.
func TestEvictionIsReported(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, "--maxmemory-policy", "allkeys-lru")
	reports := make(chan error, 10)
	s := open(t, Options{Addresses: []string{server.Addr}, Report: func(err error) { reports <- err }})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { s.Watch(ctx, deafListener{}) })
	if err := <-reports; !errors.Is(err, ErrEvicts) || !strings.Contains(err.Error(), "allkeys-lru") {
		t.Errorf("reported %v", err)
	}
	cancel()
	wg.Wait()
}

// TestEvictionThatIsSetLater: a policy that is changed while the server runs is reported, too, and once.
func TestEvictionThatIsSetLater(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	reports := make(chan error, 100)
	s := open(t, Options{Addresses: []string{server.Addr}, Report: func(err error) { reports <- err }})
	s.look = 20 * time.Millisecond
	ctx, cancel := context.WithCancel(t.Context())
	on := make(listening, 10)
	var wg sync.WaitGroup
	wg.Go(func() { s.Watch(ctx, on) })
	defer wg.Wait()
	defer cancel()
	if !<-on {
		t.Fatal("does not listen")
	}
	looksAgain := func() {
		asked := func() int {
			stats, _ := server.Do("INFO", "commandstats").(string)
			_, stats, _ = strings.Cut(stats, "cmdstat_info:calls=")
			n, _, _ := strings.Cut(stats, ",")
			calls, _ := strconv.Atoi(n) // nobody has asked yet
			return calls
		}
		polls, before := 0, asked()
		redistest.Eventually(t, "it looks again", func() error {
			if polls++; asked()-before-polls < 10 {
				return errors.New("not yet")
			}
			return nil
		})
	}
	looksAgain()
	for range 2 {
		server.Do("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
		if err := <-reports; !errors.Is(err, ErrEvicts) {
			t.Errorf("reported %v", err)
		}
		looksAgain()
		server.Do("CONFIG", "SET", "maxmemory-policy", "noeviction")
		looksAgain()
	}
	if n := len(reports); n > 0 {
		t.Errorf("%d more reports, the first: %v", n, <-reports)
	}
}

// TestSilentConnectionIsNoticed: it stays, and nothing comes any more.
func TestSilentConnectionIsNoticed(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	relay := redistest.NewRelay(t, server.Addr)
	s := open(t, Options{Addresses: []string{relay.Addr}})
	ctx, cancel := context.WithCancel(t.Context())
	on := make(listening, 10)
	var wg sync.WaitGroup
	wg.Go(func() { s.Watch(ctx, on) })
	defer wg.Wait()
	defer cancel()
	if !<-on {
		t.Fatal("does not listen")
	}
	relay.Hang()
	start := time.Now()
	if <-on {
		t.Fatal("listens again, before it said that it does not")
	}
	if took := time.Since(start); took > silenceMost+2*time.Second {
		t.Errorf("it took %v", took)
	}
	relay.Pass()
	if !<-on {
		t.Error("does not listen again")
	}
}

// TestClaimsThatNobodyWaitsForAreNotMade: a server that comes back is not met by all that was asked of it meanwhile, and
// Close does not wait for that.
func TestClaimsThatNobodyWaitsForAreNotMade(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	relay := redistest.NewRelay(t, server.Addr)
	s := open(t, Options{Addresses: []string{relay.Addr}})
	claim := func(name string, within time.Duration) error {
		return s.ClaimAll([]tokens.Claim{{Name: name, Value: []byte("x"), TTL: time.Minute}}, within)
	}
	if err := claim("before", time.Minute); err != nil {
		t.Fatal(err)
	}
	relay.Hang()
	const callers = 4 * maxPipelines * maxBatch
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			if err := claim(fmt.Sprint("meanwhile ", i), pipelineLimit/4); !errors.Is(err, errSlow) {
				t.Errorf("error %v, want %v", err, errSlow)
			}
		})
	}
	wg.Wait()
	relay.Pass()
	redistest.Eventually(t, "claims are made again", func() error { return claim("afterwards", time.Minute) })
	if n, _ := server.Do("DBSIZE").(int64); n > maxPipelines*maxBatch+2 {
		t.Errorf("%d claims were made, of %d", n, callers+2)
	}
}

// TestCloseEndsWhatIsLeft: later operations say so and do not hang.
func TestCloseEndsWhatIsLeft(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	s, err := New(Options{Addresses: []string{server.Addr}})
	if err != nil {
		t.Fatal(err)
	}
	unlock := mustLock(t, s)
	l := s.held[locked]
	s.Close()
	if l.renewal.Stop() {
		t.Error("a lock is to be renewed")
	}
	unlock()
	if _, err := claimOne(t, s); !errors.Is(err, tokens.ErrClosed) {
		t.Errorf("ClaimAll: %v", err)
	}
	if _, err := s.Load(t.Context(), locked); !errors.Is(err, tokens.ErrClosed) {
		t.Errorf("Load: %v", err)
	}
	if _, err := s.Lock(t.Context(), locked); !errors.Is(err, tokens.ErrClosed) {
		t.Errorf("Lock: %v", err)
	}
}

// TestNewConnectsNowhere: a configuration that is only checked must open no socket.
func TestNewConnectsNowhere(t *testing.T) {
	t.Parallel()
	for _, o := range []Options{{}, {Master: "wechat"}, {Cluster: true}} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		o.Addresses = []string{l.Addr().String()}
		open(t, o)
		_ = l.(*net.TCPListener).SetDeadline(time.Now().Add(50 * time.Millisecond))
		if _, err := l.Accept(); err == nil {
			t.Error("a connection was made")
		}
		_ = l.Close()
	}
}

// TestSentinelsFailOver: the store follows to the server that the Sentinels promote, and listens there.
func TestSentinelsFailOver(t *testing.T) {
	t.Parallel()
	master := redistest.Start(t)
	replica := redistest.Replica(t, master.Addr)
	o := Options{Addresses: redistest.Sentinels(t, "wechat", master, 1), Master: "wechat"}
	a, b := open(t, o), open(t, o)
	ctx, cancel := context.WithCancel(t.Context())
	on := make(listening, 100)
	var wg sync.WaitGroup
	wg.Go(func() { b.Watch(ctx, on) })
	defer wg.Wait()
	defer cancel()
	if !<-on {
		t.Fatal("does not listen")
	}
	if err := a.Store(t.Context(), locked, []byte("before")); err != nil {
		t.Fatal(err)
	}
	redistest.Eventually(t, "the replica has it", func() error {
		if n := replica.Do("EXISTS", a.folder("wechat/v1/account")); n != int64(1) {
			return errors.New("not yet")
		}
		return nil
	})
	master.Kill()
	if <-on {
		t.Error("listens again, before it said that it does not")
	}
	redistest.Eventually(t, "records are taken", func() error { return a.Store(t.Context(), locked, []byte("after")) })
	if !<-on {
		t.Error("does not listen again")
	}
	if got := replica.Client().HGet(t.Context(), a.folder("wechat/v1/account"), "wx1").Val(); got != "after" {
		t.Errorf("the promoted server has %q", got)
	}
	mustLock(t, b)()
}
