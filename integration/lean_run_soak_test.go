//go:build soak

package integration_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	mrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

const (
	leanSteady = "wxe000000000000001" // whose pushes go to backends that leave their connections in order
	leanFickle = "wxe000000000000002"

	// keepAlive is how long the gateway keeps idle connections, and headerTimeout how long it waits for an answer.
	keepAlive     = 2 * time.Second
	headerTimeout = 3 * time.Second
	// leanReason is the header that says why the gateway has not passed on an answer.
	leanReason = "X-Reason"
	// thinkTime is up to how many milliseconds a client waits between two requests.
	thinkTime = 40
	// serverDrains is how much of a request Go's server reads after its answer before it closes the connection.
	serverDrains = 256 << 10
	// leanSlack is how many more goroutines and descriptors than at the first rest are none too many: timers, and connections of WeChat's.
	leanSlack = 12
)

// leanRun is a gateway process with every hostile backend behind transport http and behind transport wechat_lean, and clients that
// ask both the same.
type leanRun struct {
	t       *testing.T
	w       *integration.World
	backend *leanBackend
	pools   map[string]*leanPool      // by name
	clients map[string][]*http.Client // by transport: Go's h2 server may end a connection for what Caddy's own does on it
	plain   string                    // host and port of the http site
	openIDs map[string]string
	stop    context.Context
	wg      sync.WaitGroup

	exchanges, pushes atomic.Int64
	nonces            atomic.Uint64
	resting           sync.RWMutex // held for reading by whoever asks

	mu     sync.Mutex
	wrongs int
	tally  map[leanKey]int
	tries  map[uint64]int // by nonce, of requests that the client itself made more than once
	rests  []leanRest
}

// leanKey is what exchanges are counted by.
type leanKey struct{ script, transport, outcome string }

// leanRest is the gateway when nobody asks anything any more.
type leanRest struct {
	after                   time.Duration
	exchanges, pushes       int64
	busy, goroutines        int
	descriptors, rss, conns int
	heap                    int64 // after a garbage collection, in KiB
}

// What comes of an exchange for the client.
const (
	cameWhole   = "whole"
	cameCut     = "broken off"
	cameRefused = "502"
	cameTimeout = "504"
	cameMisled  = "misled" // got what the backend had said unasked
	cameLeft    = "left"   // hung up
	cameOther   = "other"  // what was not to come
	cameNothing = "success"
)

var leanOutcomes = []string{cameWhole, cameRefused, cameTimeout, cameCut, cameOther, cameMisled, cameLeft}

// leanKinds are the pools that each transport has.
var leanKinds = []string{"steady", "fickle", "tls", "unix"}

func newLeanRun(t *testing.T, workers int) *leanRun {
	t.Helper()
	over, end := context.WithCancel(context.Background())
	r := &leanRun{t: t, pools: make(map[string]*leanPool), openIDs: make(map[string]string), tally: make(map[leanKey]int), tries: make(map[uint64]int), stop: over}
	r.backend = &leanBackend{over: over, wrong: r.wrong, seen: make(map[uint64]leanSight)}
	routes := r.listen()
	r.w = newWorld(t, func(w *integration.World) {
		polite(w)
		w.Config.Pace.Timeout = wechatWait + leanPatience
		w.Config.Platforms = []wxsim.Platform{{AppID: integration.PlatformID}}
		var accounts strings.Builder
		for _, id := range []string{leanSteady, leanFickle} {
			secret, token, key := rand.Text(), rand.Text(), newKey()
			w.Env = append(w.Env, "SECRET_"+id+"="+secret, "TOKEN_"+id+"="+token, "KEY_"+id+"="+key)
			w.Config.Accounts = append(w.Config.Accounts, wxsim.Account{AppID: id, Secret: secret, Token: token, AESKey: key, Mode: wxsim.ModeSafe})
			fmt.Fprintf(&accounts, "\t\taccount %s {\n\t\t\tsecret {env.SECRET_%[1]s}\n\t\t\ttoken {env.TOKEN_%[1]s}\n\t\t\taes_key {env.KEY_%[1]s}\n\t\t}\n", id)
		}
		w.Caddyfile = filepath.Join(t.TempDir(), "Caddyfile")
		if err := os.WriteFile(w.Caddyfile, []byte(leanCaddyfile(accounts.String(), routes)), 0o600); err != nil {
			t.Fatal(err)
		}
	})
	// Before the gateway is stopped.
	t.Cleanup(func() {
		end()
		r.wg.Wait()
		for _, p := range r.pools {
			_ = p.Close()
		}
		r.backend.wg.Wait()
	})
	for id, kind := range map[string]string{leanSteady: "steady", leanFickle: "fickle"} {
		r.w.WeChat.SetMessageURL(id, r.w.HTTPURL("/wx/"+kind+"/"+id))
		r.openIDs[id] = r.w.WeChat.NewUser(id).OpenID
	}
	r.dialers()
	for n := range workers {
		dice := mrand.New(mrand.NewPCG(uint64(n), 7))
		r.wg.Go(func() {
			for r.stop.Err() == nil {
				r.step(dice)
			}
		})
	}
	return r
}

// wrong notes what must not be; the first are shown.
func (r *leanRun) wrong(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.wrongs++; r.wrongs <= 40 {
		r.t.Errorf(format, args...)
	}
}

func (r *leanRun) count(script, transport, outcome string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.tally[leanKey{script, transport, outcome}]++
}

// listen starts a backend for each pool, and returns the routes to them.
func (r *leanRun) listen() string {
	r.t.Helper()
	secure := httptest.NewTLSServer(http.NotFoundHandler()) // for its certificate
	r.t.Cleanup(secure.Close)
	dir := r.t.TempDir()
	ca := filepath.Join(dir, "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw}), 0o600); err != nil {
		r.t.Fatal(err)
	}
	var routes strings.Builder
	for _, transport := range []string{"http", lean} {
		for _, kind := range slices.Concat(leanKinds, []string{"wx-steady", "wx-fickle"}) {
			push := strings.HasPrefix(kind, "wx-")
			if push && transport != lean {
				continue
			}
			p := &leanPool{transport: transport, kind: kind}
			var err error
			options := ""
			switch kind {
			case "unix":
				socket := filepath.Join(dir, transport+".sock")
				p.Listener, err = net.Listen("unix", socket)
				p.address, p.limit = "unix/"+socket, 4
				options = fmt.Sprintf("\t\t\tmax_conns_per_host %d\n", p.limit)
			default:
				p.Listener, err = net.Listen("tcp", "127.0.0.1:0")
			}
			if err != nil {
				r.t.Fatal(err)
			}
			switch kind {
			case "unix":
			case "tls":
				p.address = "https://" + p.Addr().String()
				p.Listener = tls.NewListener(p.Listener, &tls.Config{Certificates: secure.TLS.Certificates})
				options = "\t\t\ttls_trust_pool file " + ca + "\n\t\t\ttls_server_name example.com\n"
			default:
				p.address = p.Addr().String()
			}
			if transport == "http" {
				options += "\t\t\tcompression off\n\t\t\tversions 1.1\n"
			}
			r.pools[p.name()] = p
			r.backend.serve(p)
			path, first := "/"+p.name()+"/*", ""
			if push {
				path, first = "/wx/"+strings.TrimPrefix(kind, "wx-")+"/*", "\t\twechat_message\n"
			}
			fmt.Fprintf(&routes, `	route %s {
%s		reverse_proxy %s {
			lb_try_duration 0
			transport %s {
			dial_timeout 2s
			response_header_timeout %v
			expect_continue_timeout 200ms
			keepalive %v
			max_response_header 64KiB
%s			}
		}
	}
`, path, first, p.address, transport, headerTimeout, keepAlive, options)
		}
	}
	return routes.String()
}

func leanCaddyfile(accounts, routes string) string {
	return `{
	http_port {$WECHAT_HTTP_PORT}
	https_port {$WECHAT_HTTPS_PORT}
	admin {$WECHAT_ADMIN}
	skip_install_trust
	auto_https disable_redirects
	servers {
		protocols h1 h2 h2c
	}
	log { # each 502 is an error there
		level INFO
		exclude http.handlers.reverse_proxy http.log.error http.stdlib
	}
	log panics {
		output stderr
		level DEBUG
		include http.stdlib
	}

	wechat {
		platform ` + integration.PlatformID + ` {
			secret {env.WECHAT_PLATFORM_SECRET}
			token {env.WECHAT_PLATFORM_TOKEN}
			aes_key {env.WECHAT_PLATFORM_AES_KEY}
		}
` + accounts + `		seal_key {env.WECHAT_SEAL_KEY}
		api {$WECHAT_API}
	}
}

(routes) {
` + routes + `	handle_errors { # the log leaves it out
		header ` + leanReason + ` "{err.message}"
		respond "" {err.status_code}
	}
}

{$WECHAT_HOST} {
	tls internal
	import routes
}

http://{$WECHAT_HOST} {
	import routes
}
`
}

// dialers makes the clients: HTTP/1.1, h2 over TLS, h2c.
func (r *leanRun) dialers() {
	r.plain = r.w.HTTP
	trusting, err := r.w.Client()
	if err != nil {
		r.t.Fatal(err)
	}
	h1, h2, h2c := new(http.Protocols), new(http.Protocols), new(http.Protocols)
	h1.SetHTTP1(true)
	h2.SetHTTP2(true)
	h2c.SetUnencryptedHTTP2(true)
	r.clients = make(map[string][]*http.Client)
	for i := range 6 {
		behind, protocols := []string{"http", lean}[i/3], []*http.Protocols{h1, h2, h2c}[i%3]
		transport := &http.Transport{
			Protocols: protocols, DisableCompression: true, ExpectContinueTimeout: time.Second, MaxIdleConnsPerHost: 16,
			TLSClientConfig: trusting.Transport.(*http.Transport).TLSClientConfig.Clone(),
		}
		to := r.w.HTTP
		if protocols == h2 {
			to = r.w.HTTPS
		}
		transport.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, to)
		}
		r.clients[behind] = append(r.clients[behind], &http.Client{Transport: transport, CheckRedirect: plainClient.CheckRedirect})
	}
}

// step is what a worker does, again and again.
func (r *leanRun) step(dice *mrand.Rand) {
	pause(r.stop, time.Duration(dice.IntN(thinkTime))*time.Millisecond)
	r.resting.RLock()
	defer r.resting.RUnlock()
	if r.stop.Err() != nil {
		return
	}
	if dice.IntN(8) == 0 {
		r.push(dice)
		return
	}
	kind := leanKinds[dice.IntN(len(leanKinds))]
	script := dice.IntN(len(leanScripts))
	if dice.IntN(3) == 0 {
		script = dice.IntN(leanOrdinary) // there are to be idle connections
	}
	for leanScripts[script].fickle && kind != "fickle" || leanScripts[script].want == wantTimeout && dice.IntN(4) > 0 {
		script = dice.IntN(len(leanScripts))
	}
	ask := r.question(dice, kind, script)
	if leanScripts[script].name == "upgrade" {
		for _, transport := range []string{"http", lean} {
			r.upgrade(ask, transport)
		}
		return
	}
	r.compare(ask, r.ask(ask, "http"), r.ask(ask, lean))
}

// leanAsk is a request, to be made over both transports.
type leanAsk struct {
	script   *leanScript
	number   int
	kind     string
	method   string
	client   int
	seed     int32
	size, up int // of the answer and of the request; up is -1 without a body
	known    bool
	trailer  bool
	expect   bool
	slow     bool          // the body comes in pieces
	leave    time.Duration // 0: stays
}

// question throws the dice for a request.
func (r *leanRun) question(dice *mrand.Rand, kind string, script int) leanAsk {
	q := leanAsk{
		kind: kind, script: leanScripts[script], number: script, client: dice.IntN(len(r.clients[lean])), seed: dice.Int32(),
		size: leanSize(dice), up: -1, known: dice.IntN(2) == 0, slow: dice.IntN(4) == 0,
		method: []string{"GET", "GET", "POST", "POST", "PUT", "DELETE", "HEAD"}[dice.IntN(7)],
	}
	if q.method == "HEAD" && !q.script.head {
		q.method = "GET"
	}
	if q.method == "POST" || q.method == "PUT" || q.method != "HEAD" && dice.IntN(10) == 0 {
		q.up = leanSize(dice)
		q.trailer = !q.known && dice.IntN(2) == 0
		if q.client > 0 && (q.script.want != wantWhole || strings.HasPrefix(q.script.name, "early") || kind == "fickle") {
			q.trailer = false // Go's h2 server ends the whole connection when a trailer meets an answer that did not wait for it
		}
		q.expect = dice.IntN(8) == 0
	}
	// When a stream ends while Go's h2 server writes a 1xx answer, it may still be reading the header that reverse_proxy changes then.
	if dice.IntN(10) == 0 && !(q.client > 0 && q.script.before) {
		q.leave = time.Duration(1 + dice.IntN(20_000_000))
	}
	return q
}

// leanSize is a length of a body: nothing, little, around the limits of buffers, a few MiB.
func leanSize(dice *mrand.Rand) int {
	switch n := dice.IntN(20); {
	case n == 0:
		return 0
	case n < 8:
		return dice.IntN(1 << 10)
	case n < 13:
		return 4096*(1+dice.IntN(8)) - 300 + dice.IntN(600)
	case n < 19:
		return dice.IntN(200 << 10)
	}
	return dice.IntN(3 << 20)
}

// leanGot is what a client got.
type leanGot struct {
	outcome string
	nonce   uint64
	status  int
	header  http.Header
	trailer http.Header
	why     string
}

func (q leanAsk) path(transport string, nonce uint64) string {
	return fmt.Sprintf("/%s-%s/?s=%d&n=%d&seed=%d&size=%d&up=%d", transport, q.kind, q.number, nonce, q.seed, q.size, q.up)
}

// nonce is a new one.
func (r *leanRun) nonce(transport string) uint64 {
	n := r.nonces.Add(1) << nonceBits
	if transport == lean {
		n |= overLean
	}
	return n
}

// ask makes a request and looks at all that can be seen of its answer alone.
func (r *leanRun) ask(q leanAsk, transport string) (got leanGot) {
	r.exchanges.Add(1)
	got.nonce = r.nonce(transport)
	defer func() {
		if q.leave > 0 && got.outcome != cameMisled {
			got.outcome = cameLeft
		}
		r.count(q.script.name, transport, got.outcome)
	}()
	ctx, cancel := context.WithTimeout(r.stop, leanPatience+headerTimeout)
	defer cancel()
	if q.leave > 0 {
		timer := time.AfterFunc(q.leave, cancel)
		defer timer.Stop()
	}
	scheme := "http://" + integration.Host + ":" + integration.Port(r.w.HTTP)
	if q.client == 1 {
		scheme = "https://" + r.w.HostPort()
	}
	tries, reused := 0, false
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
		reused = info.Reused
		if tries++; tries > 1 { // the client's own repetition
			r.mu.Lock()
			r.tries[got.nonce] = tries
			r.mu.Unlock()
		}
	}})
	req, err := http.NewRequestWithContext(ctx, q.method, scheme+q.path(transport, got.nonce), nil)
	if err != nil {
		r.wrong("%v", err)
		return got
	}
	if q.up >= 0 {
		var body io.Reader = bytes.NewReader(requestBody(got.nonce, q.up))
		if q.slow {
			body = &slowReader{ctx: ctx, Reader: body}
		}
		req.Body, req.ContentLength = io.NopCloser(body), -1
		if q.known {
			if req.ContentLength = int64(q.up); q.up == 0 {
				req.Body = http.NoBody
			}
		}
		if q.trailer {
			req.Trailer = http.Header{"X-Sum": {strconv.FormatUint(got.nonce, 10)}}
		}
		if q.expect && q.up > 0 {
			req.Header.Set("Expect", "100-continue")
		}
	}
	res, err := r.clients[transport][q.client].Do(req)
	if errors.Is(err, context.Canceled) && ctx.Err() == nil {
		got.outcome = cameLeft // net/http's client: the one before on its connection hung up when all had been said
		return got
	}
	if err != nil && ctx.Err() == nil && reused && q.client == 0 && !r.backend.saw(got.nonce) {
		// Go's server has closed the connection after the exchange before, whose request it would not read to its end, and unsaid if its
		// answer was on its way already, over either transport.
		got.outcome = cameLeft
		return got
	}
	if err != nil {
		got.outcome, got.why = cameCut, err.Error()
		return got
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	got.status, got.header, got.trailer = res.StatusCode, res.Header, res.Trailer
	what := fmt.Sprintf("%s-%s, %s, %s over %s", transport, q.kind, q.script.name, q.method, res.Proto)
	if res.Header.Get("X-Extra") != "" {
		got.outcome = cameMisled
		if transport == lean && q.kind != "fickle" {
			r.wrong("%s: the answer is one that was not asked for", what)
		}
		return got
	}
	said := res.Header.Get("X-Nonce")
	if said == "" {
		got.why = res.Header.Get(leanReason)
		switch {
		case res.StatusCode == http.StatusBadGateway && len(body) == 0:
			got.outcome = cameRefused
		case res.StatusCode == http.StatusGatewayTimeout && len(body) == 0:
			got.outcome = cameTimeout
		default:
			got.outcome = cameOther
			r.wrong("%s: status %d without a nonce and with %d bytes", what, res.StatusCode, len(body))
		}
		if got.why == "" {
			r.wrong("%s: status %d without a reason", what, res.StatusCode)
		}
		return got
	}
	if said != strconv.FormatUint(got.nonce, 10) {
		r.wrong("%s: the answer is to request %s, not %d", what, said, got.nonce)
		got.outcome = cameOther
		return got
	}
	want := leanBody(got.nonce, q.size)
	switch {
	case q.method == "HEAD" || q.script.bare:
		want = nil
	case q.script.name == "two answers":
		want = want[:min(len(want), atomicAnswer)]
	case q.size == 0 && q.script.want == wantCut:
		want = []byte("x")
	}
	switch {
	case len(body) > len(want) && q.script.want != wantStrict && q.script.want != wantCut || !bytes.Equal(body[:min(len(body), len(want))], want[:min(len(body), len(want))]):
		if transport == lean || q.script.want == wantWhole { // Caddy's own may read what is ambiguous as it likes
			r.wrong("%s: %d bytes that are not the answer's %d", what, len(body), len(want))
		}
		got.outcome = cameOther
	case err != nil:
		got.outcome, got.why = cameCut, err.Error()
	case len(body) < len(want):
		if transport == lean && q.script.want != wantStrict && q.script.want != wantCut {
			r.wrong("%s: %d bytes of %d pass for the whole", what, len(body), len(want))
		}
		got.outcome = cameOther
	default:
		got.outcome = cameWhole
	}
	// As with net/http, an empty body of a GET or DELETE is none, and has no trailer.
	if got.outcome == cameWhole && q.trailer && transport == lean && q.up > 0 && res.Header.Get("X-Got-Trailer") != strconv.FormatUint(got.nonce, 10) && !strings.HasPrefix(q.script.name, "early") {
		r.wrong("%s: the request's trailer arrived as %q", what, res.Header.Get("X-Got-Trailer"))
	}
	return got
}

// compare judges an exchange over both transports.
func (r *leanRun) compare(q leanAsk, stock, got leanGot) {
	if q.leave > 0 || got.outcome == cameLeft || r.stop.Err() != nil {
		return
	}
	what := fmt.Sprintf("%s, %s (%s, answer %d, request %d, known %t, trailer %t, expect %t, client %d)", q.kind, q.script.name, q.method, q.size, q.up, q.known, q.trailer, q.expect, q.client)
	ok := false
	switch q.script.want {
	case wantWhole:
		// Where backends hang up unsaid, a request may meet its end; and what a backend says unasked may come between.
		ok = got.outcome == cameWhole || q.kind == "fickle" && (got.outcome == cameRefused || got.outcome == cameMisled)
		switch {
		case strings.HasPrefix(q.script.name, "early") && (q.up > 16<<10 || q.up > 0 && !q.known):
			// It depends on how much the kernels have taken, and, over HTTP/1.1, on who is first to read the request's body: Go's server, which
			// closes it then, breaks the exchange off over either transport.
			ok = ok || got.outcome == stock.outcome || got.outcome == cameCut
		case q.script.name == "304" && q.client > 0: // Go's h2 client misses the body that a Content-Length speaks of
			ok = ok || got.outcome == cameCut && got.status == http.StatusNotModified
		}
	case wantCut:
		ok = got.outcome == cameCut || got.outcome == cameRefused || got.outcome == cameMisled && q.kind == "fickle"
	case wantRefused, wantStrict:
		// A client over HTTP/1.1 that still sends much may see the server close rather than its answer.
		ok = got.outcome == cameRefused || got.outcome == cameCut && got.status == 0 && q.client == 0 && q.up > serverDrains || got.outcome == cameMisled && q.kind == "fickle"
	case wantTimeout:
		ok = got.outcome == cameTimeout || q.kind == "fickle" && (got.outcome == cameRefused || got.outcome == cameMisled)
	case wantAny:
		ok = got.outcome != cameOther
	}
	if !ok {
		r.wrong("%s: wechat_lean: %s (%d %s), want %s; http: %s (%d %s)", what, got.outcome, got.status, got.why, q.script.want, stock.outcome, stock.status, stock.why)
		return
	}
	if stock.outcome != cameWhole || got.outcome != cameWhole {
		return
	}
	if a, b := comparable(stock), comparable(got); stock.status != got.status || !reflect.DeepEqual(a, b) {
		r.wrong("%s: over http %d %v, over wechat_lean %d %v", what, stock.status, a, got.status, b)
	}
}

// comparable is a header and a trailer without what differs between any two answers.
func comparable(g leanGot) [2]http.Header {
	own := strconv.FormatUint(g.nonce, 10)
	var both [2]http.Header
	for i, h := range []http.Header{g.header, g.trailer} {
		both[i] = http.Header{}
		for name, values := range h {
			// An empty answer of unknown length is one of length 0 if it ends before reverse_proxy's first flush.
			if name == "Date" || name == "Content-Length" && values[0] == "0" {
				continue
			}
			if name == "Trailer" { // in any order
				values = strings.Split(strings.Join(values, ", "), ", ")
				slices.Sort(values)
			}
			for _, v := range values {
				if v == own {
					v = "its nonce"
				}
				both[i].Add(name, v)
			}
		}
	}
	return both
}

// slowReader gives a body in pieces.
type slowReader struct {
	io.Reader
	ctx context.Context
	n   int
}

func (s *slowReader) Read(p []byte) (int, error) {
	if s.n++; s.n < 8 {
		pause(s.ctx, time.Duration(s.n)*time.Millisecond)
		p = p[:min(len(p), 1<<s.n)]
	}
	return s.Reader.Read(p)
}

// pause is part of what a client does; it ends early with ctx.
func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// upgrade has a tunnel made and says something in both directions.
func (r *leanRun) upgrade(q leanAsk, transport string) {
	r.exchanges.Add(1)
	nonce := r.nonce(transport)
	outcome, err := r.tunnel(q, transport, nonce)
	if err != nil && q.leave == 0 && r.stop.Err() == nil && (transport == lean && q.kind != "fickle") {
		r.wrong("%s-%s, upgrade: %v", transport, q.kind, err)
	}
	r.count(q.script.name, transport, outcome)
}

func (r *leanRun) tunnel(q leanAsk, transport string, nonce uint64) (string, error) {
	conn, err := net.Dial("tcp", r.plain)
	if err != nil {
		return cameCut, err
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(leanPatience))
	_, _ = fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s:%s\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n", q.path(transport, nonce), integration.Host, integration.Port(r.plain))
	br := bufio.NewReader(conn)
	res, err := http.ReadResponse(br, nil)
	switch {
	case err != nil:
		return cameCut, err
	case res.StatusCode == http.StatusBadGateway:
		return cameRefused, errors.New("502")
	case res.Header.Get("X-Extra") != "":
		return cameMisled, nil
	case res.StatusCode != http.StatusSwitchingProtocols || res.Header.Get("X-Nonce") != strconv.FormatUint(nonce, 10):
		r.wrong("%s-%s, upgrade: status %d, nonce %s", transport, q.kind, res.StatusCode, res.Header.Get("X-Nonce"))
		return cameOther, nil
	}
	if q.leave > 0 { // in the middle
		_, _ = conn.Write(leanBody(nonce, q.size)[:q.size/2])
		return cameLeft, nil
	}
	sent := leanBody(nonce, q.size)
	failed := make(chan error, 1)
	go func() {
		_, err := conn.Write(sent)
		failed <- err
	}()
	got := make([]byte, len(sent))
	n, err := io.ReadFull(br, got)
	if err != nil && len(sent) > 0 {
		_ = conn.Close()
		return cameCut, fmt.Errorf("%d of %d bytes came back: %w", n, len(sent), errors.Join(err, <-failed))
	}
	if err := <-failed; err != nil {
		return cameCut, err
	}
	if !bytes.Equal(got, sent) {
		r.wrong("%s-%s, upgrade: other bytes came back than were sent", transport, q.kind)
		return cameOther, nil
	}
	return cameWhole, nil
}

// push has WeChat push a message whose backend acts by a script.
func (r *leanRun) push(dice *mrand.Rand) {
	account := []string{leanSteady, leanFickle}[dice.IntN(2)]
	n := dice.IntN(len(leanScripts))
	for leanScripts[n].web || leanScripts[n].fickle && account != leanFickle || leanScripts[n].want == wantTimeout && dice.IntN(4) > 0 {
		n = dice.IntN(len(leanScripts))
	}
	script := leanScripts[n]
	r.pushes.Add(1)
	text := fmt.Sprintf("%d %d %d", n, r.nonce(lean), dice.Int32())
	ctx, cancel := context.WithTimeout(r.stop, 2*leanPatience)
	defer cancel()
	result, err := r.w.WeChat.PushMessage(ctx, wxsim.Message{AppID: account, From: r.openIDs[account], Content: text})
	if r.stop.Err() != nil {
		return
	}
	outcome := cameOther
	switch {
	case err != nil:
		r.wrong("push, %s: %v", script.name, err)
	case !result.OK():
		r.wrong("push, %s: %s", script.name, result.Wrong)
	case result.UserSaw == "收到："+text:
		outcome = cameWhole
	case result.Kind == wxsim.ReplySuccess:
		outcome = cameNothing
	default:
		r.wrong("push, %s: the reply to %q is %q", script.name, text, result.UserSaw)
	}
	r.count(script.name, "pushes", outcome)
	switch script.want {
	case wantWhole:
		if outcome == cameNothing && account == leanSteady {
			r.wrong("push, %s: success instead of the reply", script.name)
		}
	case wantAny:
	default:
		if outcome == cameWhole {
			r.wrong("push, %s: a broken answer became a reply", script.name)
		}
	}
}

// load has clients ask, and rests again and again.
func (r *leanRun) load(every time.Duration, times int) {
	start := time.Now()
	for range times {
		pause(r.t.Context(), every)
		busy := r.goroutines()
		r.resting.Lock()
		r.rest(time.Since(start), busy)
		r.resting.Unlock()
		if r.t.Context().Err() != nil {
			return
		}
	}
}

// rest waits until the gateway is as it was at the first rest, and nothing is open to any backend.
func (r *leanRun) rest(after time.Duration, busy int) {
	for _, c := range slices.Concat(r.clients["http"], r.clients[lean]) {
		c.CloseIdleConnections()
	}
	rest := leanRest{after: after, busy: busy, exchanges: r.exchanges.Load(), pushes: r.pushes.Load()}
	deadline := time.Now().Add(20 * time.Second)
	for {
		rest.conns = 0
		for _, p := range r.pools {
			rest.conns += int(p.open.Load())
		}
		rest.goroutines, rest.descriptors = r.goroutines(), r.descriptors()
		fine := rest.conns == 0
		if len(r.rests) > 0 {
			first := r.rests[0]
			fine = fine && rest.goroutines <= first.goroutines+leanSlack && rest.descriptors <= first.descriptors+leanSlack
		}
		if fine || time.Now().After(deadline) {
			if !fine {
				r.wrong("after %v: %d connections to backends are open, %d goroutines, %d descriptors; at the first rest %+v", after, rest.conns, rest.goroutines, rest.descriptors, r.rests)
			}
			break
		}
		pause(r.t.Context(), 100*time.Millisecond)
	}
	rest.rss = memory(r.t, r.w, "VmRSS") >> 10
	_, text := fetch(r.t, plainClient, http.MethodGet, "http://"+r.w.Admin+"/debug/pprof/heap?gc=1&debug=1", nil, "")
	if _, after, ok := strings.Cut(text, "# HeapAlloc = "); ok {
		_, _ = fmt.Sscan(after, &rest.heap)
		rest.heap >>= 10
	} else {
		r.wrong("no heap profile: %s", text[:min(len(text), 200)])
	}
	r.rests = append(r.rests, rest)
}

func (r *leanRun) goroutines() int {
	_, text := fetch(r.t, plainClient, http.MethodGet, "http://"+r.w.Admin+"/debug/pprof/goroutine?debug=1", nil, "")
	n := 0
	_, _ = fmt.Sscanf(text, "goroutine profile: total %d", &n)
	return n
}

func (r *leanRun) descriptors() int {
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", r.w.Gateway.PID()))
	if err != nil {
		r.t.Fatal(err)
	}
	return len(list)
}

var leanPanic = regexp.MustCompile(`(?m)^.*(panic|runtime error).*$`)

// finish makes the last checks and the tables.
func (r *leanRun) finish() string {
	select {
	case <-r.w.Gateway.Exited():
		r.wrong("the gateway has ended")
	default:
	}
	if found := leanPanic.FindString(r.w.Gateway.Log()); found != "" {
		r.wrong("in the gateway's log: %s", found)
	}
	first, last := r.rests[0], r.rests[len(r.rests)-1]
	if last.heap > first.heap*3/2 {
		r.wrong("the heap that lives has grown from %d to %d KiB", first.heap, last.heap)
	}
	if !raceEnabled && last.rss > first.rss*3/2+100 { // the race detector's own memory grows
		r.wrong("resident memory has grown from %d to %d MiB", first.rss, last.rss)
	}
	for _, p := range r.pools {
		if most := p.most.Load(); p.limit > 0 && most > 2*p.limit { // the gateway has closed some that the backend has yet to see
			r.wrong("%s: %d connections at once, where %d are allowed", p.name(), most, p.limit)
		}
	}
	r.checkSights()
	return r.table()
}

// checkSights fails for what a backend saw too often: a POST of which it saw anything is not sent again, and a GET once.
func (r *leanRun) checkSights() {
	r.backend.mu.Lock()
	defer r.backend.mu.Unlock()
	for nonce, sight := range r.backend.seen {
		r.mu.Lock()
		tries := max(1, r.tries[nonce])
		r.mu.Unlock()
		most := tries
		if sight.harmless {
			most *= 2
		}
		if nonce&overLean != 0 && sight.times > most {
			r.wrong("%s: the backend saw a request %d times that its client made %d times: %s", sight.script.name, sight.times, tries, sight.request)
		}
	}
}

func (r *leanRun) table() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var b strings.Builder
	b.WriteString("| the backend's answer | to be | http: " + strings.Join(leanOutcomes, " | ") + " | wechat_lean: " + strings.Join(leanOutcomes, " | ") + " | pushes: the reply | `success` |\n")
	b.WriteString("|" + strings.Repeat(" --- |", 2+2*len(leanOutcomes)+2) + "\n")
	sums := make(map[leanKey]int)
	line := func(name, want string, count map[leanKey]int) {
		fmt.Fprintf(&b, "| %s | %s |", name, want)
		for _, transport := range []string{"http", lean} {
			for _, outcome := range leanOutcomes {
				fmt.Fprintf(&b, " %d |", count[leanKey{name, transport, outcome}])
			}
		}
		fmt.Fprintf(&b, " %d | %d |\n", count[leanKey{name, "pushes", cameWhole}], count[leanKey{name, "pushes", cameNothing}])
	}
	for _, s := range leanScripts {
		want := string(s.want)
		if s.name == "upgrade" {
			want = string(wantWhole)
		}
		line(s.name, want, r.tally)
	}
	for key, n := range r.tally {
		sums[leanKey{"all", key.transport, key.outcome}] += n
	}
	line("all", "", sums)
	b.WriteString("\n| after | exchanges | pushes | goroutines | at rest | descriptors at rest | RSS at rest | heap at rest | connections to backends at rest |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n")
	for _, rest := range r.rests {
		fmt.Fprintf(&b, "| %v | %d | %d | %d | %d | %d | %d MiB | %d KiB | %d |\n", rest.after.Round(time.Second), rest.exchanges, rest.pushes, rest.busy, rest.goroutines, rest.descriptors, rest.rss, rest.heap, rest.conns)
	}
	b.WriteString("\n| pool | most connections at once | requests after something unasked |\n| --- | --- | --- |\n")
	for _, name := range slices.Sorted(maps.Keys(r.pools)) {
		p := r.pools[name]
		fmt.Fprintf(&b, "| %s | %d | %d |\n", name, p.most.Load(), p.strays.Load())
	}
	return b.String()
}
