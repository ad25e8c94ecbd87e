package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/caddy-wechat/caddy-wechat/integration"
)

// Names of the targets that are in every run.
const (
	targetStock   = "stock"        // the reference: stock Caddy that does what it can of the job
	targetBare    = "stock, bare"  // stock Caddy that only passes on
	targetSame    = "same program" // the gateway's program, configured as stock Caddy that only passes on
	targetGateway = "gateway"      // as Caddyfile.example has it

	targetSameLean    = "same program, wechat_lean"
	targetGatewayHTTP = "gateway, transport http" // Caddy's own to the backend
)

// What a reverse_proxy behind wechat_message has in its block.
const (
	overLean = "transport wechat_lean" // as Caddyfile.example has it
	overHTTP = "transport http"        // as it is without a word
)

// target is a server process under measurement.
type target struct {
	scenario string
	name     string
	binary   string
	global   string // lines of the global options
	site     string // lines of the site
	traffic  traffic
	far      *farEnd // nil: the server answers by itself
	passing  string  // the target that only passes on, with the same program in the same way; empty: there is none
	rated    bool    // takes part in the rounds at a fixed rate, too

	gateway *integration.Gateway
	addr    string
	figures
}

// scenario is a job, and those who do it in the same rounds. The first is the reference.
type scenario struct {
	name    string
	what    string
	targets []*target
}

// world is what the targets are made of and run between.
type world struct {
	dir             string // emptied before
	stock, gateway  string // binaries
	others          []program
	variants        []variant
	cpus            []int // of the servers; none: not pinned
	certificate     *tls.Certificate
	certificateFile string
	redis           *redisServer // if a variant wants one
	faults          faults
	around          func(office) office // put around the far ends' offices, if there is one
	files           office              // takes uploads, which are refused without it
	far             []*farEnd
	running         []*target
}

// program is a further build of the gateway.
type program struct{ name, binary string }

// faults are what a test has go wrong, to see that it is noticed.
type faults struct {
	key   string // the gateway has this EncodingAESKey
	token string // WeChat gives out this token, and takes another
}

func (w *world) farEnd(o office, cert *tls.Certificate) (*farEnd, error) {
	if w.around != nil {
		o = w.around(o)
	}
	f, err := startFarEnd(o, cert)
	if err == nil {
		w.far = append(w.far, f)
	}
	return f, err
}

// prepare lays out the folder.
func (w *world) prepare() error {
	if err := os.RemoveAll(w.dir); err != nil {
		return err
	}
	if err := os.MkdirAll(w.dir, 0o700); err != nil {
		return err
	}
	cert, pem, err := newCertificate()
	if err != nil {
		return err
	}
	w.certificate, w.certificateFile = cert, filepath.Join(w.dir, "far-end.pem")
	return os.WriteFile(w.certificateFile, pem, 0o600)
}

// Close ends everything that was started.
func (w *world) Close() error {
	var err error
	for _, t := range w.running {
		err = errors.Join(err, t.gateway.Stop())
	}
	for _, f := range w.far {
		err = errors.Join(err, f.Close())
	}
	if w.redis != nil {
		err = errors.Join(err, w.redis.Close())
	}
	w.running, w.far, w.redis = nil, nil, nil
	return err
}

// scenarios are all there are. Their far ends listen, their servers do not run yet.
func (w *world) scenarios() ([]*scenario, error) {
	inbound, err := w.inbound()
	if err != nil {
		return nil, err
	}
	overHTTP, err := w.outbound("outbound", "calls over HTTP", nil)
	if err != nil {
		return nil, err
	}
	overH2, err := w.outbound("outbound-h2", "calls over TLS and HTTP/2", w.certificate)
	if err != nil {
		return nil, err
	}
	return []*scenario{inbound, overHTTP, overH2, w.respond()}, nil
}

// proxying is a site that passes pushes on.
func proxying(to, transport string) string {
	return "route /wx/message/* {\n" + block("reverse_proxy "+to, transport) + "}\n"
}

func (w *world) inbound() (*scenario, error) {
	sealed, err := w.farEnd(backend(false), nil)
	if err != nil {
		return nil, err
	}
	opened, err := w.farEnd(backend(true), nil)
	if err != nil {
		return nil, err
	}
	s := &scenario{name: "inbound", what: "encrypted pushes of 512 B (80 %), 1 KB (15 %) and 4 KB (5 %), replies of 320 B"}
	s.targets = []*target{
		{name: targetStock, binary: w.stock, site: proxying(sealed.URL(), ""), traffic: pushes{}, far: sealed, passing: targetSame, rated: true},
		{name: targetSame, binary: w.gateway, site: proxying(sealed.URL(), ""), traffic: pushes{}, far: sealed},
		{name: targetSameLean, binary: w.gateway, site: proxying(sealed.URL(), overLean), traffic: pushes{}, far: sealed},
	}
	gateway := func(name, binary string, v variant) *target {
		proxy, passing := cmp.Or(v.Proxy, overLean), targetSame
		if strings.Contains(proxy, overLean) {
			passing = targetSameLean
		}
		return &target{
			name: name, binary: binary, global: w.wechat(opened, v), traffic: pushes{sealed: true}, far: opened, passing: passing, rated: true,
			site: "route /wx/message/* {\n" + block("wechat_message", v.Message) + block("reverse_proxy "+opened.URL(), proxy) + "}\n",
		}
	}
	s.targets = append(s.targets, gateway(targetGateway, w.gateway, variant{}), gateway(targetGatewayHTTP, w.gateway, variant{Proxy: overHTTP}))
	w.further(s, gateway)
	return w.named(s), nil
}

func (w *world) outbound(name, what string, cert *tls.Certificate) (*scenario, error) {
	gives := cmp.Or(w.faults.token, accessToken)
	withToken, err := w.farEnd(wechatAPI{gives: gives, wants: accessToken, http2: cert != nil, files: w.files}.office, cert)
	if err != nil {
		return nil, err
	}
	without, err := w.farEnd(wechatAPI{http2: cert != nil}.office, cert)
	if err != nil {
		return nil, err
	}
	s := &scenario{name: name, what: what + ", a small JSON answer"}
	bare := "reverse_proxy " + without.URL() + "\n"
	s.targets = []*target{
		{name: targetStock, binary: w.stock, site: "uri query access_token " + accessToken + "\nreverse_proxy " + withToken.URL() + "\n", traffic: calls{}, far: withToken, passing: targetSame, rated: true},
		{name: targetBare, binary: w.stock, site: bare, traffic: calls{}, far: without, passing: targetSame},
		{name: targetSame, binary: w.gateway, site: bare, traffic: calls{}, far: without},
	}
	gateway := func(name, binary string, v variant) *target {
		return &target{
			name: name, binary: binary, global: w.wechat(withToken, v), traffic: calls{}, far: withToken, passing: targetSame, rated: true,
			site: block("wechat_api", v.API),
		}
	}
	s.targets = append(s.targets, gateway(targetGateway, w.gateway, variant{}))
	w.further(s, gateway)
	return w.named(s), nil
}

// respond is Caddy alone: what the gateway's modules cost where they are not used.
func (w *world) respond() *scenario {
	site := "respond " + page + "\n"
	return w.named(&scenario{name: "respond", what: "a page that Caddy has at hand", targets: []*target{
		{name: targetStock, binary: w.stock, site: site, traffic: pages{}, rated: true},
		{name: targetGateway, binary: w.gateway, site: site, traffic: pages{}, rated: true, global: w.wechat(nil, variant{})},
	}})
}

// further adds the other builds, and the variants of the scenario.
func (w *world) further(s *scenario, gateway func(name, binary string, v variant) *target) {
	for _, p := range w.others {
		other := gateway(p.name, p.binary, variant{})
		other.passing = "" // another program's, which is not there
		s.targets = append(s.targets, other)
	}
	for _, v := range w.variants {
		if v.Scenario == s.name {
			s.targets = append(s.targets, gateway(v.Name, w.gateway, v))
		}
	}
}

func (w *world) named(s *scenario) *scenario {
	for _, t := range s.targets {
		t.scenario = s.name
	}
	return s
}

// wechat is the global option: an account that receives pushes and whose API is called, and the app that may.
func (w *world) wechat(api *farEnd, v variant) string {
	origin := "http://127.0.0.1:9" // nobody's: this one calls nothing
	if api != nil {
		origin = api.URL()
	}
	return block("wechat", fmt.Sprintf("account %s {\n\tsecret benchmark-secret\n\ttoken %s\n\taes_key %s\n}\nclient bench {\n\tkey %s\n\tappids *\n}\napi %s\n%s",
		appID, pushToken, cmp.Or(w.faults.key, pushKey), clientKey, origin, v.Wechat))
}

// block is a directive with a block, if there is something to put into it.
func block(head, lines string) string {
	if strings.TrimSpace(lines) == "" {
		return head + "\n"
	}
	return strings.TrimLeft(head+" {\n", " ") + indent(lines) + "}\n"
}

func indent(lines string) string {
	var b strings.Builder
	for line := range strings.Lines(strings.TrimSpace(lines) + "\n") {
		b.WriteString("\t" + strings.TrimLeft(line, " "))
	}
	return b.String()
}

// caddyfile is the target's configuration: Caddy's and the gateway's defaults, but for what listens where, and for the transport to the
// backend, which Caddyfile.example chooses.
func (t *target) caddyfile(admin, addr string) string {
	return block("", "admin "+admin+"\nauto_https off\npersist_config off\n"+t.global) +
		block("http://:"+integration.Port(addr), "bind 127.0.0.1\n"+t.site)
}

// start starts the target's process, and returns once it serves.
func (w *world) start(ctx context.Context, t *target) error {
	admin, err := integration.FreeAddr("")
	if err != nil {
		return err
	}
	if t.addr, err = integration.FreeAddr(""); err != nil {
		return err
	}
	dir := filepath.Join(w.dir, strings.NewReplacer(" ", "-", ",", "").Replace(t.scenario+"-"+t.name))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	t.gateway = &integration.Gateway{
		Binary: t.binary, Dir: dir, Caddyfile: filepath.Join(dir, "Caddyfile"), Admin: admin,
		Env: []string{"SSL_CERT_FILE=" + w.certificateFile, redisVariable + "=" + w.redis.address()},
	}
	if err := os.WriteFile(t.gateway.Caddyfile, []byte(t.caddyfile(admin, t.addr)), 0o600); err != nil {
		return err
	}
	if err := onCPUs(w.cpus, func() error { return t.gateway.Start(ctx) }); err != nil {
		return fmt.Errorf("%s %s: %w", t.scenario, t.name, err)
	}
	w.running = append(w.running, t)
	return nil
}

// stop ends the target's process.
func (w *world) stop(t *target) error {
	for i, r := range w.running {
		if r == t {
			w.running = append(w.running[:i], w.running[i+1:]...)
			break
		}
	}
	return t.gateway.Stop()
}
