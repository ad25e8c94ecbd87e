package integration_test

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
)

const (
	// fleetHost is the name under which WeChat and browsers reach the gateways, and fleetAPI the apps.
	fleetHost = "gateway.test"
	fleetAPI  = "api.test"
	fleetWeb  = "http://web.test/landed"

	// A balancer notices within noticed that a node has failed, and within that again that it is back.
	noticed = 2 * time.Second
	// appWait is how long an app waits for an answer before it asks another node.
	appWait = 5 * time.Second
	// leaseLife is how long the lock of a node that sleeps counts in Redis.
	leaseLife = 10 * time.Second
)

// fleet is a number of gateway processes that share a Redis, each over a relay of its own, with a WeChat and a backend
// around them.
type fleet struct {
	t       *testing.T
	wechat  *wxsim.Server
	backend *fleetBackend
	redis   *redistest.Server
	nodes   []*fleetNode
	env     []string // that all nodes have
	secrets []string // of the configuration
	key     string   // of the client
	config  string   // the Caddyfile

	mu       sync.Mutex
	failures []string
}

// fleetNode is one of the processes.
type fleetNode struct {
	*integration.Gateway
	name      string
	relay     *redistest.Relay
	http, api string
	apps      *http.Client // of WeChat's side and of the apps' side, by the host of the URL

	mu      sync.Mutex
	down    bool      // dead, or asleep
	changed time.Time // when that began or ended
}

// fleetOptions is what a test wants of its fleet.
type fleetOptions struct {
	nodes     int
	simulator func(*wxsim.Config)
	store     []string // lines of the block of store redis; default: the node's relay as address
	redis     []string // options of redis-server
	cut       bool     // Redis cannot be reached when the nodes start
	env       []string
	server    *redistest.Server // default: one of the fleet's own
}

const fleetCaddyfile = `{
	http_port {$HTTP_PORT}
	admin {$ADMIN}
	skip_install_trust
	auto_https off
	log {
		level {$WECHAT_LOG_LEVEL:DEBUG}
	}
	wechat {
		platform ` + integration.PlatformID + ` {
			secret {env.PLATFORM_SECRET}
			token {env.PLATFORM_TOKEN}
			aes_key {env.PLATFORM_KEY}
		}
		account ` + integration.AccountID + ` {
			secret {env.ACCOUNT_SECRET}
			token {env.ACCOUNT_TOKEN}
			aes_key {env.ACCOUNT_KEY}
		}
		client crm {
			key {env.CRM_KEY}
			appids *
		}
		store redis {
%s
		}
		seal_key {env.WECHAT_SEAL_KEY}
		api {$WECHAT_API}
		open {$WECHAT_API}
	}
}

http://:{$HTTP_PORT} {
	bind 127.0.0.1
	wechat_event /wx/event
	route /wx/message/* {
		wechat_message
		reverse_proxy {$WECHAT_BACKEND} {
			header_up X-Node {$NODE}
			lb_try_duration 12s
		}
	}
	wechat_oauth /wx/thirdParty {
		origin http://` + fleetHost + `
		require_start
		func verify ` + fleetWeb + `
	}
}

http://:{$API_PORT} {
	bind 127.0.0.1
	wechat_api
}
`

// newFleet starts a Redis, a WeChat that tries nothing but what the test says, and the nodes.
func newFleet(t *testing.T, o fleetOptions) *fleet {
	t.Helper()
	f := &fleet{t: t, backend: newFleetBackend(), redis: o.server, key: rand.Text()}
	t.Cleanup(f.sum)
	if f.redis == nil {
		f.redis = redistest.Start(t, o.redis...)
	}
	backend := &integration.Backend{Answer: f.backend.ServeHTTP}
	if err := backend.Start("127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(backend.Close)
	t.Cleanup(func() { close(f.backend.over) })
	f.simulate(o)
	t.Cleanup(f.wechat.Close)
	if err := f.wechat.Start("127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	f.env = append(f.env, "WECHAT_API="+f.wechat.URL(), "WECHAT_BACKEND="+backend.Addr())
	f.env = append(f.env, o.env...)
	store := o.store
	if store == nil {
		store = []string{"address {$REDIS}"}
	}
	f.config = filepath.Join(t.TempDir(), "Caddyfile")
	text := fmt.Sprintf(fleetCaddyfile, strings.TrimSuffix(block(store), "\n"))
	if err := os.WriteFile(f.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for i := range o.nodes {
		f.nodes = append(f.nodes, f.newNode(string(rune('A'+i)), o.cut))
	}
	var wg sync.WaitGroup
	errs := make([]error, len(f.nodes))
	for i, n := range f.nodes {
		wg.Go(func() { errs[i] = n.Start(t.Context()) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	return f
}

// simulate makes the WeChat, in which the platform and a plain account exist.
func (f *fleet) simulate(o fleetOptions) {
	secret := func(name, value string) string {
		f.env = append(f.env, name+"="+value)
		f.secrets = append(f.secrets, value)
		return value
	}
	seal := make([]byte, 32)
	_, _ = rand.Read(seal)
	secret("WECHAT_SEAL_KEY", hex.EncodeToString(seal))
	secret("CRM_KEY", f.key)
	cfg := wxsim.Config{
		Seed: 1, Faults: wxsim.Faults{Polite: true, RotateRefreshTokens: true}, PushApart: true, PushDial: f.dial, OAuthHosts: []string{fleetHost},
		Platforms: []wxsim.Platform{{
			AppID: integration.PlatformID, Secret: secret("PLATFORM_SECRET", rand.Text()), Token: secret("PLATFORM_TOKEN", rand.Text()),
			AESKey: secret("PLATFORM_KEY", newKey()), EventURL: "http://" + fleetHost + "/wx/event", MessageURL: "http://" + fleetHost + "/wx/message/$APPID$",
		}},
		Accounts: []wxsim.Account{{
			AppID: integration.AccountID, Secret: secret("ACCOUNT_SECRET", rand.Text()), Token: secret("ACCOUNT_TOKEN", rand.Text()),
			AESKey: secret("ACCOUNT_KEY", newKey()), MessageURL: "http://" + fleetHost + "/wx/message/" + integration.AccountID,
		}},
		// An event that nobody takes comes again until somebody does.
		Pace: wxsim.Pace{Attempts: 300, Interval: 100 * time.Millisecond},
	}
	if o.simulator != nil {
		o.simulator(&cfg)
	}
	f.wechat = wxsim.New(cfg)
}

// newNode prepares a node; nothing runs yet.
func (f *fleet) newNode(name string, cut bool) *fleetNode {
	f.t.Helper()
	n := &fleetNode{name: name, relay: redistest.NewRelay(f.t, f.redis.Addr), http: freeAddr(f.t), api: freeAddr(f.t)}
	if cut {
		n.relay.Cut()
	}
	admin := freeAddr(f.t)
	n.Gateway = &integration.Gateway{
		Binary: binary, Dir: f.t.TempDir(), Caddyfile: f.config, Admin: admin,
		Env: append([]string{
			"NODE=" + name, "ADMIN=" + admin, "REDIS=" + n.relay.Addr,
			"HTTP_PORT=" + integration.Port(n.http), "API_PORT=" + integration.Port(n.api),
		}, f.env...),
	}
	n.apps = &http.Client{
		Timeout:       2 * appWait,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{MaxIdleConnsPerHost: 64, DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			to := n.http
			if strings.HasPrefix(address, fleetAPI+":") {
				to = n.api
			}
			return new(net.Dialer).DialContext(ctx, network, to)
		}},
	}
	f.t.Cleanup(func() {
		n.goOn()
		n.relay.Pass()
		if err := n.Stop(); err != nil {
			f.errorf("node %s: %v", n.name, err)
		}
		n.apps.CloseIdleConnections()
		log := n.Log()
		for _, race := range races(log) {
			f.errorf("node %s has a data race:\n%s", n.name, race)
		}
		f.checkNoSecrets("log of node "+n.name, log)
		if f.t.Failed() {
			f.keepLog(n.name, log)
		}
	})
	return n
}

// errorf fails the test. What failed is said once more at the very end, where it is found among all that was excused.
func (f *fleet) errorf(format string, args ...any) {
	f.t.Helper()
	f.t.Errorf(format, args...)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failures = append(f.failures, time.Now().Format("15:04:05.000 ")+fmt.Sprintf(format, args...))
}

func (f *fleet) sum() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, failure := range f.failures {
		f.t.Log("it failed for this: " + failure)
	}
}

// keepLog leaves the log of a node of a failed test beside what else `make` writes, and its errors in the test's output.
func (f *fleet) keepLog(name, log string) {
	folder := filepath.Join("..", ".run")
	if err := os.MkdirAll(folder, 0o755); err != nil {
		f.t.Error(err)
		return
	}
	file := filepath.Join(folder, strings.ReplaceAll(f.t.Name(), "/", "-")+"-"+name+".log")
	if err := os.WriteFile(file, []byte(log), 0o600); err != nil {
		f.t.Error(err)
	}
	f.t.Logf("the log of node %s is in %s", name, file)
}

// checkNoSecrets fails if a secret of the fleet is in the text.
func (f *fleet) checkNoSecrets(where, text string) {
	f.t.Helper()
	checkAbsent(f.t, append(f.wechat.Secrets(), f.secrets...), where, text)
}

// pinned is the key of a node in a context: where a push goes.
type pinned struct{}

// on is a context for pushes to one node.
func on(ctx context.Context, n *fleetNode) context.Context {
	return context.WithValue(ctx, pinned{}, n)
}

// dial is the balancer in front of the message and event URLs, which sends each connection to a node by chance.
func (f *fleet) dial(ctx context.Context, network, _ string) (net.Conn, error) {
	if n, _ := ctx.Value(pinned{}).(*fleetNode); n != nil {
		return new(net.Dialer).DialContext(ctx, network, n.http)
	}
	var err error
	for _, i := range mathrand.Perm(len(f.nodes)) { //nolint:gosec // no secret
		n := f.nodes[i]
		if n.away() {
			continue
		}
		var conn net.Conn
		if conn, err = new(net.Dialer).DialContext(ctx, network, n.http); err == nil {
			return conn, nil
		}
	}
	return nil, errors.Join(errors.New("no node takes the connection"), err)
}

// any is a node by chance, one that the balancer does not know to be away if there is one.
func (f *fleet) any() *fleetNode {
	for _, i := range mathrand.Perm(len(f.nodes)) { //nolint:gosec // no secret
		if !f.nodes[i].away() {
			return f.nodes[i]
		}
	}
	return f.nodes[0]
}

// away reports whether the balancer gives the node nothing.
func (n *fleetNode) away() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	long := time.Since(n.changed) >= noticed
	return n.down && long || !n.down && !long
}

// troubled reports whether a failure of the node at that time is the test's own doing.
func (n *fleetNode) troubled(since time.Time) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.down || n.changed.After(since)
}

func (n *fleetNode) set(down bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.down, n.changed = down, time.Now()
}

// freeze stops the process without ending it, and thaw lets it go on.
func (n *fleetNode) freeze() { n.set(true); n.halt() }
func (n *fleetNode) thaw()   { n.goOn(); n.set(false) }

// kill ends the process as kill -9 does, and revive starts it again.
func (n *fleetNode) kill() error { n.set(true); return n.Kill() }

func (n *fleetNode) revive(ctx context.Context) error {
	err := n.Start(ctx)
	n.set(false)
	return err
}

// metric is one of the node's metrics.
func (n *fleetNode) metric(t *testing.T, name string) string {
	t.Helper()
	return metricAt(t, n.Admin, name)
}

// settled reports what the node has not written to Redis yet.
func (n *fleetNode) settled(t *testing.T) error {
	t.Helper()
	w, u, files := n.metric(t, "caddy_wechat_records_waiting"), n.metric(t, "caddy_wechat_records_unsaved"), len(n.spilled())
	if w != "0" || u != "0" || files > 0 {
		return fmt.Errorf("node %s: %s records wait, %s are in memory alone, %d files are spilled", n.name, w, u, files)
	}
	return nil
}

// spilled are the files in the node's spill folder.
func (n *fleetNode) spilled() []string {
	files, _ := filepath.Glob(filepath.Join(n.Dir, "data", "caddy", "wechat-spill", "*", "*")) // the pattern is right
	return files
}

// fleetAnswer is what an app gets.
type fleetAnswer struct {
	status int
	body   string
	header http.Header
	took   time.Duration
	err    error
}

// get asks one node.
func (f *fleet) get(ctx context.Context, n *fleetNode, address string, cookies []*http.Cookie) (a fleetAnswer) {
	start := time.Now()
	defer func() { a.took = time.Since(start) }()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return fleetAnswer{err: err}
	}
	if req.URL.Host == fleetAPI {
		req.Header.Set("Authorization", "Bearer "+f.key)
	}
	for _, c := range cookies {
		req.AddCookie(c)
	}
	resp, err := n.apps.Do(req)
	if err != nil {
		return fleetAnswer{err: err}
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	return fleetAnswer{status: resp.StatusCode, body: string(body), header: resp.Header, err: err}
}

// user calls WeChat for a user of an account, through one node.
func (f *fleet) user(ctx context.Context, n *fleetNode, u wxsim.User) fleetAnswer {
	return f.get(ctx, n, "http://"+fleetAPI+"/"+u.AppID+"/cgi-bin/user/info?openid="+u.OpenID, nil)
}

// good reports whether the answer is the user's.
func (a fleetAnswer) good(u wxsim.User) bool {
	return a.err == nil && a.status == http.StatusOK && strings.Contains(a.body, u.OpenID)
}

func (a fleetAnswer) String() string {
	if a.err != nil {
		return a.err.Error()
	}
	return fmt.Sprintf("%d %s", a.status, a.body)
}

// untilGood calls until an answer is good.
func (f *fleet) untilGood(ctx context.Context, n *fleetNode, u wxsim.User, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var last fleetAnswer
	for {
		a := f.user(ctx, n, u)
		if a.good(u) {
			return nil
		}
		if ctx.Err() == nil || last.status == 0 {
			last = a
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("node %s, %s: %s", n.name, u.AppID, last)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// ticket has WeChat push a ticket until the node, or one by chance, takes it.
func (f *fleet) ticket(ctx context.Context) error {
	result, err := f.wechat.PushTicket(ctx, integration.PlatformID)
	if err == nil && !result.OK() {
		err = errors.New(result.Wrong)
	}
	return err
}

// authorize has new accounts authorise the platform, and returns a user of each, for whom calls work on all nodes.
func (f *fleet) authorize(names ...string) []wxsim.User {
	f.t.Helper()
	if err := f.ticket(f.t.Context()); err != nil {
		f.t.Fatal(err)
	}
	users := make([]wxsim.User, 0, len(names))
	for _, appid := range names {
		if a, err := f.wechat.Authorize(f.t.Context(), integration.PlatformID, appid); err != nil || !a.Push.OK() {
			f.t.Fatalf("authorized: %s %v", a.Push.Wrong, err)
		}
		users = append(users, f.wechat.NewUser(appid))
	}
	for _, u := range users {
		for _, n := range f.nodes {
			if err := f.untilGood(f.t.Context(), n, u, healTime); err != nil {
				f.t.Fatal(err)
			}
		}
	}
	return users
}

// fleetBackend answers texts as they say, and knows how often it was given each, by which node.
type fleetBackend struct {
	over chan struct{} // closed when the test is over

	mu   sync.Mutex
	runs map[string][]backendRun
}

type backendRun struct {
	node string
	at   time.Time
}

func newFleetBackend() *fleetBackend {
	return &fleetBackend{over: make(chan struct{}), runs: make(map[string][]backendRun)}
}

// ran is how often the backend was given a message.
func (b *fleetBackend) ran(s script) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.runs[s.String()])
}

// take returns and forgets the runs of a message.
func (b *fleetBackend) take(s script) []backendRun {
	b.mu.Lock()
	defer b.mu.Unlock()
	runs := b.runs[s.String()]
	delete(b.runs, s.String())
	return runs
}

func (b *fleetBackend) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m, s, _, err := readScript(r)
	if err != nil {
		http.Error(w, "not a script", http.StatusBadRequest)
		return
	}
	b.mu.Lock()
	b.runs[s.String()] = append(b.runs[s.String()], backendRun{r.Header.Get("X-Node"), time.Now()})
	b.mu.Unlock()
	timer := time.NewTimer(s.take)
	defer timer.Stop()
	select {
	case <-timer.C:
		_, _ = io.WriteString(w, m.reply(s.repliesWith(), false))
	case <-r.Context().Done():
	case <-b.over:
	}
}
