package caddymodule

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

const (
	// doctorTimeout bounds the whole of a run.
	doctorTimeout = 60 * time.Second
	// doctorCheckTimeout bounds one check.
	doctorCheckTimeout = 40 * time.Second
	// doctorRequestTimeout bounds one request or question of a check.
	doctorRequestTimeout = 10 * time.Second
	// doctorAtOnce is how many requests are under way at a time.
	doctorAtOnce = 16
	// maxDoctorAnswer bounds an answer that is read, in bytes.
	maxDoctorAnswer = 1 << 20
)

// The levels of a check.
const (
	doctorGreen   = "green"
	doctorYellow  = "yellow"
	doctorRed     = "red"
	doctorSkipped = "skipped"
)

// doctorResult is what a check found about one thing.
type doctorResult struct {
	ID      string       `json:"id"`
	Level   string       `json:"level"`
	Subject string       `json:"subject,omitempty"`
	Text    tokens.Text  `json:"text"`
	Remedy  *tokens.Text `json:"remedy,omitempty"`
}

// countOf is a number of things.
func countOf(n int, thing string) string {
	if n != 1 {
		thing += "s"
	}
	return fmt.Sprintf("%d %s", n, thing)
}

func greenOf(subject, en, zh string) doctorResult {
	return doctorResult{Level: doctorGreen, Subject: subject, Text: texts(en, zh)}
}

func skippedOf(subject, en, zh string) doctorResult {
	return doctorResult{Level: doctorSkipped, Subject: subject, Text: texts(en, zh)}
}

func redOf(subject string, text, remedy tokens.Text) doctorResult {
	return doctorResult{Level: doctorRed, Subject: subject, Text: text, Remedy: &remedy}
}

func yellowOf(subject string, text, remedy tokens.Text) doctorResult {
	r := redOf(subject, text, remedy)
	r.Level = doctorYellow
	return r
}

// doctorCheck is one of the things that are looked at.
type doctorCheck struct {
	id     string
	online bool // it needs the network
	run    func(*doctor, context.Context) []doctorResult
}

// doctorChecks are all of them, in the order in which they are reported.
var doctorChecks = []doctorCheck{
	{"config", false, (*doctor).checkConfig},
	{"placeholders", false, (*doctor).checkPlaceholders},
	{"ca_roots", false, (*doctor).checkRoots},
	{"dns", true, (*doctor).checkDNS},
	{"tls", true, (*doctor).checkTLS},
	{"upstreams", true, (*doctor).checkUpstreams},
	{"wechat_hosts", true, (*doctor).checkWeChat},
	{"clock", true, (*doctor).checkClock},
	{"push", true, (*doctor).checkPushes},
	{"verify_files", true, (*doctor).checkVerifyFiles},
	{"oauth", false, (*doctor).checkOAuth},
	{"gateway", true, (*doctor).checkGateway},
	{"accounts", true, (*doctor).checkAccounts},
	{"egress_ip", true, (*doctor).checkEgress},
	{"callback_check", true, (*doctor).checkCallback},
}

// doctor looks at a config, and from outside at the gateway that runs with it. All that is not the config comes through the
// fields, so that a test can be the world.
type doctor struct {
	resolve    func(ctx context.Context, host string) ([]netip.Addr, error)
	dial       func(ctx context.Context, network, address string) (net.Conn, error)
	roots      func() (*x509.CertPool, error)
	interfaces func() ([]net.Addr, error)
	now        func() time.Time

	config   doctorConfig
	admin    string // its address; empty: none
	adminOff bool   // the config says so

	mu     sync.Mutex
	wechat []wechatAnswer // of WeChat's hosts, once one check has asked
	asked  sync.Once
	places chan struct{}
}

func newDoctor() *doctor {
	return &doctor{
		resolve: func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		},
		dial:       (&net.Dialer{Timeout: doctorRequestTimeout}).DialContext,
		roots:      x509.SystemCertPool,
		interfaces: net.InterfaceAddrs,
		now:        time.Now,
		places:     make(chan struct{}, doctorAtOnce),
	}
}

// doctorReport is the whole of a run.
type doctorReport struct {
	Level  string         `json:"level"`
	TookMS int64          `json:"took_ms"`
	Checks []doctorResult `json:"checks"`
}

// examine runs all checks at once.
func (d *doctor) examine(ctx context.Context, offline bool) *doctorReport {
	started := time.Now()
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	results := make([][]doctorResult, len(doctorChecks))
	var all sync.WaitGroup
	for i, c := range doctorChecks {
		if c.online && offline {
			results[i] = []doctorResult{skippedOf("", "needs the network, and --offline was given", "需要网络，而指定了 --offline")}
			continue
		}
		all.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, doctorCheckTimeout)
			defer cancel()
			results[i] = c.run(d, ctx)
		})
	}
	all.Wait()
	report := &doctorReport{Level: doctorGreen, Checks: []doctorResult{}}
	for i, list := range results {
		for _, r := range list {
			r.ID = doctorChecks[i].id
			report.Checks = append(report.Checks, r)
			if doctorRank(r.Level) > doctorRank(report.Level) {
				report.Level = r.Level
			}
		}
	}
	report.TookMS = time.Since(started).Milliseconds()
	return report
}

func doctorRank(level string) int {
	return slices.Index([]string{doctorSkipped, doctorGreen, doctorYellow, doctorRed}, level)
}

// doctorEach runs f for every item, as many at once as all checks together may, and puts the results in the items' order.
func doctorEach[T any](d *doctor, ctx context.Context, items []T, f func(context.Context, T) doctorResult) []doctorResult {
	results := make([]doctorResult, len(items))
	var all sync.WaitGroup
	for i, item := range items {
		all.Go(func() {
			select {
			case d.places <- struct{}{}:
			case <-ctx.Done():
				results[i] = skippedOf("", "there was no time left for it", "没有时间进行此项检查")
				return
			}
			defer func() { <-d.places }()
			ctx, cancel := context.WithTimeout(ctx, doctorRequestTimeout)
			defer cancel()
			results[i] = f(ctx, item)
		})
	}
	all.Wait()
	return results
}

// client asks over the network as WeChat does: at the address that DNS gives, without a proxy, following nothing.
func (d *doctor) client() *http.Client {
	roots, _ := d.roots()
	return &http.Client{
		Transport: &http.Transport{
			DialContext: d.dialHost, DisableKeepAlives: true, DisableCompression: true,
			TLSClientConfig: &tls.Config{RootCAs: roots, Time: d.now, MinVersion: tls.VersionTLS12},
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// dialHost resolves a name itself and dials its addresses.
func (d *doctor) dialHost(ctx context.Context, network, address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return d.dial(ctx, network, address)
	}
	addrs, err := d.resolve(ctx, host)
	if err != nil {
		return nil, err
	}
	if len(addrs) == 0 {
		return nil, said(host+" has no address", host+" 没有解析结果")
	}
	return d.dialAny(ctx, network, addrs, port)
}

// dialAny dials addresses, of which there is one at least, in turn, those of IPv4 first, over which WeChat pushes. Each has its
// share of the time: one that swallows what is sent to it does not take it from the next.
func (d *doctor) dialAny(ctx context.Context, network string, addrs []netip.Addr, port string) (conn net.Conn, err error) {
	slices.SortStableFunc(addrs, func(a, b netip.Addr) int { return a.Unmap().BitLen() - b.Unmap().BitLen() })
	for i, addr := range addrs {
		if conn, err = d.dialShare(ctx, network, net.JoinHostPort(addr.Unmap().String(), port), len(addrs)-i); err == nil {
			return conn, nil
		}
	}
	return nil, err
}

// dialShare dials within one of so many equal parts of the time that is left.
func (d *doctor) dialShare(ctx context.Context, network, address string, parts int) (net.Conn, error) {
	left := doctorRequestTimeout
	if deadline, ok := ctx.Deadline(); ok {
		left = time.Until(deadline)
	}
	ctx, cancel := context.WithTimeout(ctx, left/time.Duration(parts))
	defer cancel()
	return d.dial(ctx, network, address)
}

// doctorAnswer is what a request got.
type doctorAnswer struct {
	status int
	header http.Header
	body   []byte
	at     time.Time // between request and answer, by the clock here
	took   time.Duration
}

// ask makes a request and reads the answer. Its error has no URL in it.
func (d *doctor) ask(ctx context.Context, client *http.Client, method, target, body string, header http.Header) (*doctorAnswer, error) {
	r, err := http.NewRequestWithContext(ctx, method, target, strings.NewReader(body))
	if err != nil {
		return nil, said("not a URL that can be requested", "不是可以请求的 URL")
	}
	for name, values := range header {
		r.Header[name] = values
	}
	started := d.now()
	res, err := client.Do(r)
	if err != nil {
		return nil, plainCause(err)
	}
	defer func() { _ = res.Body.Close() }()
	took := d.now().Sub(started)
	content, err := io.ReadAll(io.LimitReader(res.Body, maxDoctorAnswer))
	if err != nil {
		return nil, plainCause(err)
	}
	return &doctorAnswer{res.StatusCode, res.Header, content, started.Add(took / 2), took}, nil
}

// doctorParams are what doctor is told.
type doctorParams struct {
	config, adapter, address string
	asJSON, offline          bool
}

// doctorCommand is `caddy wechat doctor`.
func doctorCommand() *cobra.Command {
	p := &doctorParams{}
	cmd := &cobra.Command{
		Use: "doctor", Short: "Checks config, network and the running gateway, and says what to do", Args: cobra.NoArgs,
		Long: `Checks, all at once and within a minute: the config and whether each of its placeholders resolves; the CA roots, the clock; DNS and
certificates of the config's own hosts; WeChat's hosts, through the egress proxy if there is one; each push URL, from outside;
verification files, from outside; the OAuth domain; upstreams that lead back here; and, if a gateway is running, its tickets
and tokens, each account's permission sets, and by calls through it the IP whitelist and WeChat's own check of the callback network.

It changes nothing: a push URL gets WeChat's handshake (GET with echostr), a push with a wrong signature, which
must be refused with 403, and one that is rightly signed; none of them reaches a backend. It holds no token and refreshes none; what needs one goes through the running
gateway's wechat_api, with a client's key of the config. Run it on the gateway's machine, as its user and with its environment.

The exit code is 0 if all is green or yellow, 2 if something is red, 1 if there is no config to look at.`,
		Example: "caddy wechat doctor --config /etc/caddy/Caddyfile",
	}
	f := cmd.Flags()
	f.StringVarP(&p.config, "config", "c", "", "the gateway's config (default: Caddyfile in this folder, if there is one)")
	f.StringVarP(&p.adapter, "adapter", "a", "", "name of the config adapter to apply")
	f.StringVar(&p.address, "address", "", "address of the running gateway's admin endpoint (default: the config's)")
	f.BoolVar(&p.asJSON, "json", false, "print a JSON object")
	f.BoolVar(&p.offline, "offline", false, "only what needs no network")
	_ = cmd.MarkFlagFilename("config")
	cmd.RunE = caddycmd.WrapCommandFuncForCobra(func(caddycmd.Flags) (int, error) {
		ctx, cancel := interruptible()
		defer cancel()
		d := newDoctor()
		if err := d.read(p.config, p.adapter, p.address); err != nil {
			return caddy.ExitCodeFailedStartup, err
		}
		report := d.examine(ctx, p.offline)
		if err := report.print(cmd.OutOrStdout(), p.asJSON); err != nil {
			return caddy.ExitCodeFailedStartup, err
		}
		if report.Level == doctorRed {
			return exitFailed, nil
		}
		return caddy.ExitCodeSuccess, nil
	})
	return cmd
}

func (r *doctorReport) print(w io.Writer, asJSON bool) error {
	if asJSON {
		line, err := json.Marshal(r)
		if err != nil {
			return err
		}
		return printJSON(w, line)
	}
	count := make(map[string]int)
	for _, c := range r.Checks {
		count[c.Level]++
		subject := c.Subject
		if subject != "" {
			subject = " " + subject
		}
		_, _ = fmt.Fprintf(w, "%-8s%s%s: %s\n", c.Level, c.ID, subject, c.Text.EN)
		if c.Level == doctorGreen || c.Level == doctorSkipped {
			continue
		}
		_, _ = fmt.Fprintf(w, "        %s\n", c.Text.ZH)
		if c.Remedy != nil {
			_, _ = fmt.Fprintf(w, "        remedy: %s\n        处理: %s\n", c.Remedy.EN, c.Remedy.ZH)
		}
	}
	_, _ = fmt.Fprintf(w, "%s: %d green, %d yellow, %d red, %d skipped, in %d ms\n",
		r.Level, count[doctorGreen], count[doctorYellow], count[doctorRed], count[doctorSkipped], r.TookMS)
	return nil
}
