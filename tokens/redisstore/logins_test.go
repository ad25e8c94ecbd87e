package redisstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/internal/stall"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// loginNode is a gateway's manager with its table of those who logged in.
type loginNode struct {
	*node
	*tokens.UserTable
	log *safeLog
}

// safeLog is a log that can be read while it is written.
type safeLog struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *safeLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}
func (l *safeLog) String() string { l.mu.Lock(); defer l.mu.Unlock(); return l.buf.String() }

// newLoginNodes starts nodes on a server, each with a relay of its own.
func newLoginNodes(t *testing.T, server *redistest.Server, n int) []*loginNode {
	t.Helper()
	wx, nodes := new(fakeWeChat), make([]*loginNode, n)
	for i := range nodes {
		nodes[i] = newLoginNodeOn(t, wx, server.Addr, func(s *Store) tokens.Store { return s })
	}
	return nodes
}

func newLoginNodeOn(t *testing.T, wx *fakeWeChat, target string, through func(*Store) tokens.Store) *loginNode {
	t.Helper()
	sealer, err := crypto.NewSealer(bytes.Repeat([]byte{7}, 32))
	if err != nil {
		t.Fatal(err)
	}
	client, err := tokens.NewClient(tokens.ClientOptions{Transport: wx})
	if err != nil {
		t.Fatal(err)
	}
	m := &node{Manager: tokens.NewManager(), wx: wx, relay: redistest.NewRelay(t, target)}
	m.store = open(t, Options{Addresses: []string{m.relay.Addr}})
	t.Cleanup(m.Manager.Close)
	l := &loginNode{node: m, UserTable: tokens.NewUserTable(1000), log: new(safeLog)}
	l.UserTable.Share(m.Manager)
	m.Use(&tokens.Environment{
		Store: through(m.store), API: client, Sealer: sealer, Spill: t.TempDir(), RosterEvery: -1,
		Log:       slog.New(slog.NewTextHandler(l.log, nil)),
		Platforms: []tokens.PlatformCredentials{{AppID: platform, Secret: secret.New("s")}},
		Accounts:  []tokens.AccountCredentials{{AppID: account, Secret: secret.New("s")}},
	})
	return l
}

var testGrant = tokens.UserGrant{
	OpenID: "openid-1", AccessToken: secret.New("user-token"), RefreshToken: secret.New("user-refresh"), ExpiresAt: time.Now().Add(time.Hour),
}

func TestTrackingIDsOnAllNodes(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	nodes := newLoginNodes(t, server, 3)
	user := tokens.User{
		AppID: account, Platform: platform, OpenID: "openid-1", UnionID: "union-1", Scope: "snsapi_userinfo", FuncKey: "scan",
		State: "\xff\x00é", Snapshot: true, Profile: &tokens.Profile{Nickname: "nickname-1", Privilege: []string{"p"}},
	}
	for _, once := range []bool{false, true} {
		for range 20 {
			for try := range stall.Tries(t, stepStop, server.Turn) {
				if redeemedOnAllNodes(t, try, nodes, user, once); try.Failed() {
					nodes = newLoginNodes(t, server, 3) // these may take Redis for being away
				}
			}
		}
	}

	// What Redis has says nothing, and ends.
	id := nodes[0].Keep(t.Context(), user, testGrant, time.Minute, true)
	location := "https://shop.example.com/?wxTkId=" + id
	if _, err := nodes[0].Login(t.Context(), tokens.Callback{Code: secret.New("code-1"), Path: "/cb", AppID: account, Flow: "FLOW"}, func(context.Context) (string, error) { return location, nil }); err != nil {
		t.Fatal(err)
	}
	held := 0
	for _, key := range server.Do("KEYS", "*login*").([]any) {
		held++
		name, _ := key.(string)
		value, _ := server.Do("GET", name).(string)
		if left := server.Do("PTTL", name).(int64); left <= 0 || left > time.Hour.Milliseconds() {
			t.Errorf("%s ends in %d ms", name, left)
		}
		for _, private := range []string{"user-token", "renewed-token", "user-refresh", "openid-1", "union-1", "nickname-1", id, "code-1", "shop.example.com", "FLOW", account} {
			if strings.Contains(name+value, private) {
				t.Errorf("Redis has %q in the clear", private)
			}
		}
	}
	if held < 5 {
		t.Errorf("Redis has %d values", held)
	}
}

func redeemedOnAllNodes(t *testing.T, try *stall.Try, nodes []*loginNode, user tokens.User, once bool) {
	t.Helper()
	no := func(tokens.User) bool { return false }
	id := nodes[0].Keep(t.Context(), user, testGrant, time.Minute, once)
	if _, err := nodes[1].Redeem(t.Context(), id, "other", no); !errors.Is(err, tokens.ErrUserForbidden) {
		try.Errorf("a client that may not: %v", err)
	}
	var got atomic.Int32
	var by atomic.Pointer[string]
	var wg sync.WaitGroup
	for i := range 4 * len(nodes) {
		wg.Go(func() {
			name := fmt.Sprint("client-", i)
			u, err := nodes[i%len(nodes)].Redeem(t.Context(), id, name, nil)
			switch {
			case err == nil:
				got.Add(1)
				by.Store(&name)
				if u.State != user.State || u.OpenID != user.OpenID || u.Profile == nil || u.Profile.Nickname != "nickname-1" || u.Profile.Privilege[0] != "p" || !u.Snapshot || u.UnionID != user.UnionID {
					try.Errorf("another user: %+v", u)
				}
			case !errors.Is(err, tokens.ErrUserUnknown):
				try.Errorf("%v", err)
			}
		})
	}
	wg.Wait()
	if n := got.Load(); once && n > 1 { // whatever stood still
		t.Errorf("redeemed %d times", n)
	}
	if want := map[bool]int32{false: int32(4 * len(nodes)), true: 1}[once]; got.Load() != want {
		try.Errorf("once %v: redeemed %d times, want %d", once, got.Load(), want)
		return
	}
	// Who has it may go on to ask, on any node; with a token that one of them renews.
	renewed := testGrant
	renewed.AccessToken = secret.New("renewed-token")
	for i, n := range []*loginNode{nodes[2], nodes[1]} {
		_, err := n.AskProfile(t.Context(), id, *by.Load(), nil, func(_ context.Context, u tokens.User, g tokens.UserGrant) (tokens.Profile, tokens.UserGrant, error) {
			if want := []secret.String{testGrant.AccessToken, renewed.AccessToken}[i]; !g.AccessToken.Same(want) || !g.RefreshToken.Same(testGrant.RefreshToken) || g.ExpiresAt.Unix() != testGrant.ExpiresAt.Unix() || u.State != user.State {
				try.Errorf("question %d has other tokens", i)
			}
			return tokens.Profile{}, renewed, nil
		})
		if err != nil {
			try.Errorf("question %d: %v", i, err)
		}
	}
	_, err := nodes[1].AskProfile(t.Context(), id, "client-x", nil, func(_ context.Context, _ tokens.User, g tokens.UserGrant) (tokens.Profile, tokens.UserGrant, error) {
		return tokens.Profile{}, g, nil
	})
	if once != errors.Is(err, tokens.ErrUserUnknown) {
		try.Errorf("once %v, another client: %v", once, err)
	}
}

func TestCodeIsExchangedOnceOnAllNodes(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	nodes := newLoginNodes(t, server, 4) // one of them sees the code under another path alone
	rounds := 0
	for range 10 {
		for try := range stall.Tries(t, stepStop, server.Turn) {
			rounds++
			if exchangedOnce(t, try, nodes, fmt.Sprint(rounds)); try.Failed() {
				nodes = newLoginNodes(t, server, 4) // these may take Redis for being away
			}
		}
	}
}

// stepStop is for how long the machine may stand still before a step that waits for Redis takes it for being away, and does not ask again for
// a second.
const stepStop = 200 * time.Millisecond

func exchangedOnce(t *testing.T, try *stall.Try, nodes []*loginNode, round string) {
	cb := tokens.Callback{Code: secret.New("code-" + round), Path: "/cb/f", AppID: account, Flow: "flow-" + round}
	var exchanges atomic.Int32
	begun, gate := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	join := func(n *loginNode) {
		wg.Go(func() {
			got, err := n.Login(t.Context(), cb, func(context.Context) (string, error) {
				if exchanges.Add(1) == 1 {
					close(begun)
				}
				<-gate
				return "there", nil
			})
			if got != "there" || err != nil {
				try.Errorf("Login = %q, %v", got, err)
			}
		})
	}
	for i := range 9 {
		join(nodes[i%3])
	}
	<-begun
	other := cb
	other.Path = "/cb/g"
	misused := func(n *loginNode) {
		if _, err := n.Login(t.Context(), other, func(context.Context) (string, error) { return "", errors.New("exchanged") }); !errors.Is(err, tokens.ErrCodeUsed) {
			try.Errorf("under another path: %v", err)
		}
	}
	misused(nodes[3])
	close(gate)
	wg.Wait()
	for _, n := range nodes {
		misused(n)
	}
	other = cb
	other.Code = secret.New("another")
	for _, n := range nodes {
		if _, err := n.Login(t.Context(), other, func(context.Context) (string, error) { return "", errors.New("exchanged") }); !errors.Is(err, tokens.ErrFlowUsed) {
			try.Errorf("another code: %v", err)
		}
	}
	if n := exchanges.Load(); n != 1 {
		try.Errorf("%d exchanges", n)
	}
}

// TestLoginsWhenRedisFails: they go on, and none waits long for Redis.
func TestLoginsWhenRedisFails(t *testing.T) {
	t.Parallel()
	const most = 1200 * time.Millisecond // once for what is read and once for what is written; a machine that stands still does not count
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
			server := redistest.Start(t, "--appendonly", "yes")
			var a, b *loginNode
			var before string
			var ids []string
			for try := range stall.Tries(t, stepStop) {
				nodes := newLoginNodes(t, server, 2)
				a, b = nodes[0], nodes[1]
				before, ids = a.Keep(t.Context(), tokens.User{OpenID: "before"}, testGrant, time.Hour, false), nil
				tt.fail(server, a.relay)
				start := time.Now()
				for i := range 20 {
					ids = append(ids, a.Keep(t.Context(), tokens.User{OpenID: "during"}, testGrant, time.Hour, true))
					cb := tokens.Callback{Code: secret.New(fmt.Sprint("code-", i)), Path: "/cb", Flow: fmt.Sprint("flow-", i)}
					if got, err := a.Login(t.Context(), cb, func(context.Context) (string, error) { return "there", nil }); got != "there" || err != nil {
						t.Fatalf("Login = %q, %v", got, err)
					}
					if _, err := a.Redeem(t.Context(), before, "crm", nil); err != nil {
						t.Fatal(err)
					}
				}
				if took := try.Since(start); took > most {
					try.Errorf("twenty logins took %v", took)
				}
				tt.mend(server, a.relay)
			}
			redistest.Eventually(t, "users are shared again", func() error {
				_, err := b.Redeem(t.Context(), a.Keep(t.Context(), tokens.User{}, testGrant, time.Hour, true), "crm", nil)
				return err
			})
			for _, id := range ids {
				if _, err := b.Redeem(t.Context(), id, "crm", nil); !errors.Is(err, tokens.ErrUserUnknown) {
					t.Errorf("on the other node: %v", err)
				}
				if _, err := a.Redeem(t.Context(), id, "crm", nil); err != nil {
					t.Errorf("on the node that knows it: %v", err)
				}
				if _, err := a.Redeem(t.Context(), id, "crm", nil); !errors.Is(err, tokens.ErrUserUnknown) {
					t.Errorf("again: %v", err)
				}
			}
			if log := a.log.String(); strings.Count(log, "logins are not shared") == 0 || strings.Contains(log, "user-token") || strings.Contains(log, "user-refresh") || strings.Contains(log, before) {
				t.Errorf("the log: %s", log)
			}
		})
	}
}

// TestOpaqueTokensOnAllNodes: also of the first key, which all want to make.
func TestOpaqueTokensOnAllNodes(t *testing.T) {
	t.Parallel()
	claims := tokens.OpaqueClaims{Client: "crm", AppID: account, Kind: tokens.KindAccount, ExpiresAt: time.Now().Add(time.Hour)}
	server := redistest.Start(t)
	var nodes []*loginNode
	for try := range stall.Tries(t, stepStop, server.Turn) {
		server.Do("FLUSHALL")
		nodes = newLoginNodes(t, server, 3)
		listeningAll(t, nodes)
		firstOpaqueTokens(t, try, nodes, claims)
		if try.Failed() {
			for _, n := range nodes {
				n.Manager.Close() // or it writes its keys again
			}
		}
	}
	fields := server.Do("HLEN", "wechat:{wechat/v1/mac}")
	if record := server.Client().HGet(t.Context(), "wechat:{wechat/v1/mac}", "opaque").Val(); fields != int64(1) || record == "" {
		t.Errorf("%v records of keys", fields)
	}

	// Redis comes back empty: nodes that start then accept what the others issue.
	server.Kill()
	server.Restart()
	redistest.Eventually(t, "the keys are written again", func() error {
		return server.Client().HGet(t.Context(), "wechat:{wechat/v1/mac}", "opaque").Err()
	})
	late := newLoginNodes(t, server, 1)[0]
	for _, n := range nodes {
		token, err := n.IssueOpaque(t.Context(), claims)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := late.OpenOpaque(t.Context(), token.Reveal()); err != nil {
			t.Errorf("on a node that started later: %v", err)
		}
	}
}

func firstOpaqueTokens(t *testing.T, try *stall.Try, nodes []*loginNode, claims tokens.OpaqueClaims) {
	t.Helper()
	// One has just looked, and knows that there is no key.
	if _, err := nodes[2].OpenOpaque(t.Context(), strings.Repeat("AgAAAAA", 12)); !errors.Is(err, tokens.ErrOpaqueUnknown) {
		try.Errorf("of no key: %v", err)
	}
	var wg sync.WaitGroup
	for _, n := range nodes[:2] {
		wg.Go(func() {
			token, err := n.IssueOpaque(t.Context(), claims)
			if err != nil {
				try.Errorf("%v", err)
				return
			}
			for _, other := range nodes {
				start := time.Now()
				if got, err := other.OpenOpaque(t.Context(), token.Reveal()); err != nil || got.Client != "crm" {
					try.Errorf("on another node: %v", err)
				}
				if took := try.Since(start); took > 500*time.Millisecond {
					try.Errorf("it took %v", took)
				}
			}
		})
	}
	wg.Wait()
}

// listeningAll waits until the nodes hear each other.
func listeningAll(t *testing.T, nodes []*loginNode) {
	t.Helper()
	for _, n := range nodes {
		redistest.Eventually(t, "a node listens", func() error {
			subscribed, err := n.store.client.PubSubNumSub(t.Context(), n.store.channel).Result()
			if err == nil && subscribed[n.store.channel] < int64(len(nodes)) {
				err = errors.New("not yet")
			}
			return err
		})
	}
}

// deafStore is a store that tells of no changes.
type deafStore struct{ *realStore }

type realStore = Store

func (deafStore) Watch(ctx context.Context, _ tokens.Listener) { <-ctx.Done() }

// TestVerifyFilesOnAllNodes: at once where it is heard, and within a second where it is not.
func TestVerifyFilesOnAllNodes(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	nodes := newLoginNodes(t, server, 2)
	listeningAll(t, nodes)
	deaf := newLoginNodeOn(t, nodes[0].wx, nodes[0].relay.Addr, func(s *Store) tokens.Store { return deafStore{s} })
	all := append(nodes[1:2:2], deaf)
	files := 0
	for range 3 {
		for try := range stall.Tries(t, stepStop, server.Turn) {
			name := fmt.Sprintf("MP_verify_a1B2c3D4e5F6g7%02d.txt", files)
			files++
			for _, n := range all {
				if _, found, err := n.VerifyFile(t.Context(), name); found || err != nil {
					try.Errorf("found %v, %v", found, err)
				}
			}
			change := func(what string, there bool, make func() error) {
				if err := make(); err != nil {
					try.Errorf("%s: %v", what, err)
				}
				for i, n := range all {
					start := time.Now()
					redistest.Eventually(t, what, func() error {
						content, found, err := n.VerifyFile(t.Context(), name)
						if err == nil && (found != there || there && string(content) != "content") {
							err = errors.New("not yet")
						}
						return err
					})
					if took, most := try.Since(start), []time.Duration{500 * time.Millisecond, 1300 * time.Millisecond}[i]; took > most {
						try.Errorf("%s: seen after %v, want %v at most", what, took, most)
					}
				}
			}
			change("a file that was added", true, func() error {
				_, err := nodes[0].PutVerifyFile(t.Context(), name, []byte("content"))
				return err
			})
			change("a file that was deleted", false, func() error {
				_, err := nodes[0].DeleteVerifyFile(t.Context(), name)
				return err
			})
		}
	}
}

// TestAccountGoesAndComesOnAllNodes: what one node is told is in force on all within a second.
func TestAccountGoesAndComesOnAllNodes(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	nodes := newLoginNodes(t, server, 2)
	listeningAll(t, nodes)
	a, b := nodes[0], nodes[1]
	jsapi := tokens.JSAPIKey(platform, authorizer)
	rounds := 0
	for range 3 {
		for try := range stall.Tries(t, stepStop, server.Turn) {
			rounds++
			a.authorize(t)
			start := time.Now()
			redistest.Eventually(t, "the account is there", func() error {
				known, err := b.Authorized(t.Context(), authorizer)
				if err == nil && !known {
					err = errors.New("not yet")
				}
				return err
			})
			b.get(t, authKey)
			b.get(t, jsapi)
			if took := try.Since(start); took > inForce {
				try.Errorf("an authorization counted after %v", took)
			}
			if err := a.Revoke(t.Context(), platform, authorizer, time.Now().Add(time.Duration(rounds)*time.Minute)); err != nil {
				t.Fatal(err)
			}
			start = time.Now()
			redistest.Eventually(t, "the account is gone", func() error {
				if known, err := b.Authorized(t.Context(), authorizer); known || err != nil {
					return fmt.Errorf("authorized %v, %w", known, err)
				}
				for _, k := range []tokens.Key{authKey, jsapi} {
					if _, err := b.Get(t.Context(), k); !errors.Is(err, tokens.ErrNotAuthorized) {
						return fmt.Errorf("%v: %w", k, err)
					}
				}
				return nil
			})
			if took := try.Since(start); took > inForce {
				try.Errorf("a revocation counted after %v", took)
			}
		}
	}
}
