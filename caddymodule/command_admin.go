package caddymodule

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"
)

const (
	// askTimeout bounds one question to a running gateway. A refresh waits for WeChat.
	askTimeout = time.Minute
	// maxAskAnswer bounds an answer, in bytes.
	maxAskAnswer = 64 << 20
	// completionTimeout bounds what a shell waits for a completion.
	completionTimeout = 2 * time.Second
)

// askParams say which running gateway is asked, and in what form its answer is shown.
type askParams struct {
	address         string
	config, adapter string
	json            bool

	dial func(ctx context.Context, network, address string) (net.Conn, error) // nil: as usual
}

func (p *askParams) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&p.address, "address", "", "address of the admin endpoint (default: that of the config, else "+caddy.DefaultAdminListen+")")
	cmd.Flags().StringVarP(&p.config, "config", "c", "", "the gateway's config, for the address (default: Caddyfile in this folder, if there is one)")
	cmd.Flags().StringVarP(&p.adapter, "adapter", "a", "", "name of the config adapter to apply")
	cmd.Flags().BoolVar(&p.json, "json", false, "print the answer as it is, in JSON")
}

// endpoint is where the admin endpoint listens.
func (p *askParams) endpoint() (caddy.NetworkAddress, error) {
	listen := p.address
	if listen == "" {
		config, file, _, err := caddycmd.LoadConfig(p.config, p.adapter)
		if err != nil {
			return caddy.NetworkAddress{}, err
		}
		admin, err := adminOf(config)
		if err != nil {
			return caddy.NetworkAddress{}, fmt.Errorf("%s: %w", file, err)
		}
		if admin.Disabled {
			return caddy.NetworkAddress{}, said(file+": admin is off, so that the gateway cannot be asked: it needs the global option admin", file+"：admin 为 off，无法询问网关：需要全局选项 admin")
		}
		listen = admin.Listen
	}
	if listen == "" {
		listen = caddy.DefaultAdminListen
	}
	listen, err := caddy.NewReplacer().ReplaceOrErr(listen, true, true)
	if err != nil {
		return caddy.NetworkAddress{}, fmt.Errorf("admin address: %w", err)
	}
	at, err := caddy.ParseNetworkAddress(listen)
	if err != nil || !isAdminAddress(at) {
		return caddy.NetworkAddress{}, said(fmt.Sprintf("'%s' is not the address of an admin endpoint: write it like localhost:2019 or unix//run/caddy-admin.sock", listen),
			fmt.Sprintf("“%s”不是 admin 端点的地址：请写作 localhost:2019 或 unix//run/caddy-admin.sock", listen))
	}
	if at.IsUnixNetwork() {
		at.Host, _, _ = strings.Cut(at.Host, "|") // permissions may follow, as in listen
	}
	return at, nil
}

// isAdminAddress reports whether one endpoint can be asked at an address: a name or an address with a port, no URL.
func isAdminAddress(at caddy.NetworkAddress) bool {
	if at.IsUnixNetwork() {
		return true
	}
	host := at.JoinHostPort(0)
	u, err := url.Parse("http://" + host)
	return err == nil && strings.HasPrefix(at.Network, "tcp") && at.PortRangeSize() == 1 && at.StartPort != 0 &&
		u.Host == strings.Replace(host, "%25", "%", 1) // an IPv6 zone, written as in URLs
}

// adminOf is what a config, as JSON, says of the admin endpoint.
func adminOf(config []byte) (caddy.AdminConfig, error) {
	var parts struct {
		Admin caddy.AdminConfig `json:"admin"`
	}
	if len(config) == 0 {
		return parts.Admin, nil
	}
	err := json.Unmarshal(caddy.RemoveMetaFields(config), &parts)
	return parts.Admin, err
}

// exchange asks the admin endpoint of a running gateway. Its error is one of askFailed's.
func (p *askParams) exchange(ctx context.Context, at caddy.NetworkAddress, method, path string) (status int, body []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	host := at.JoinHostPort(0)
	origin := "http://" + host
	if at.IsUnixNetwork() {
		origin = "http://127.0.0.1" // Caddy takes this one from a socket
	}
	req, err := http.NewRequestWithContext(ctx, method, origin+path, http.NoBody)
	if err != nil {
		return 0, nil, err
	}
	if !at.IsUnixNetwork() {
		req.Header.Set("Origin", origin) // as enforce_origin may demand
	}
	to := at                                                      // the name stays as the config has it: Caddy takes no other
	if to.Host == "" || to.Host == "0.0.0.0" || to.Host == "::" { // every interface: this machine's too
		switch to.Host = "localhost"; to.Network { // which need not have an address of each kind
		case "tcp4":
			to.Host = "127.0.0.1"
		case "tcp6":
			to.Host = "::1"
		}
	}
	dial := p.dial
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dial(ctx, to.Network, to.JoinHostPort(0))
		},
	}
	client := &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	res, err := client.Do(req)
	if err != nil {
		return 0, nil, askFailed(err, at)
	}
	defer func() { _ = res.Body.Close() }()
	if body, err = io.ReadAll(io.LimitReader(res.Body, maxAskAnswer)); err != nil {
		return 0, nil, askFailed(err, at)
	}
	return res.StatusCode, body, nil
}

// ask asks a running gateway and returns its answer, one of the statuses that are wanted.
func (p *askParams) ask(ctx context.Context, method, path string, want ...int) ([]byte, error) {
	at, err := p.endpoint()
	if err != nil {
		return nil, err
	}
	status, body, err := p.exchange(ctx, at, method, path)
	if err != nil {
		return nil, err
	}
	if !slices.Contains(append(want, http.StatusOK), status) {
		return nil, askRefused(status, body, at)
	}
	if !json.Valid(body) {
		return nil, fmt.Errorf("what answers at %s is not Caddy's admin endpoint", at)
	}
	return body, nil
}

// nobodyListensError: there is no Caddy at that address.
type nobodyListensError struct{ at caddy.NetworkAddress }

func (e nobodyListensError) Error() string {
	return fmt.Sprintf("no Caddy listens at %s: is it running? If its admin endpoint is elsewhere, give --config or --address", e.at)
}

// askFailed says why there was no answer.
func askFailed(err error, at caddy.NetworkAddress) error {
	switch {
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, os.ErrNotExist):
		return nobodyListensError{at}
	case errors.Is(err, os.ErrPermission):
		return said(fmt.Sprintf("%s cannot be opened: run this as the gateway's user", at), fmt.Sprintf("无法打开 %s：请以网关的用户运行", at))
	case errors.Is(err, context.Canceled):
		return said("interrupted", "已中断")
	case isTimeout(err):
		return said(fmt.Sprintf("no answer in time from the Caddy at %s", at), fmt.Sprintf("%s 处的 Caddy 没有及时应答", at))
	}
	return said(fmt.Sprintf("no answer from the Caddy at %s: %s", at, rootOf(err)), fmt.Sprintf("%s 处的 Caddy 没有应答：%s", at, causeOf(rootOf(err)).ZH))
}

// askRefused is an answer that is an error.
func askRefused(status int, body []byte, at caddy.NetworkAddress) error {
	var said struct {
		Error string `json:"error"`
	}
	switch {
	case json.Unmarshal(body, &said) == nil && said.Error != "":
		return errors.New(said.Error)
	case status == http.StatusNotFound:
		return fmt.Errorf("the Caddy at %s has no such WeChat gateway: it was built without this plugin, or with an older one", at)
	}
	return fmt.Errorf("what answers at %s is not Caddy's admin endpoint: HTTP %d", at, status)
}

// complete asks for words that may follow. What fails completes nothing.
func (p *askParams) complete(path string, words func(body []byte) []string) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(context.Background(), completionTimeout)
	defer cancel()
	body, err := p.ask(ctx, http.MethodGet, path)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return words(body), cobra.ShellCompDirectiveNoFileComp
}

// printJSON prints JSON on a line of its own, as it is but for what forTerminal says.
func printJSON(w io.Writer, body []byte) error {
	_, err := fmt.Fprintf(w, "%s\n", forTerminal(w, string(body)))
	return err
}

// table writes rows of cells as columns, the first row being their names.
type table [][]string

// columnGap is the space between columns.
const columnGap = 2

func (t table) write(w io.Writer) { t.writeAfter(w, 0) }

// writeAfter is write without the first rows, which only make room.
func (t table) writeAfter(w io.Writer, first int) {
	var widths []int
	for _, row := range t {
		for i, cell := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], displayWidth(cell))
		}
	}
	for _, row := range t[first:] {
		var b strings.Builder
		for i, cell := range row {
			b.WriteString(cell)
			if i < len(row)-1 {
				b.WriteString(strings.Repeat(" ", widths[i]-displayWidth(cell)+columnGap))
			}
		}
		_, _ = fmt.Fprintln(w, strings.TrimRight(b.String(), " "))
	}
}

// wide are the runes that take two places in a terminal: East Asian ones and pictures.
var wide = &unicode.RangeTable{
	R16: []unicode.Range16{
		{0x1100, 0x115f, 1}, {0x2e80, 0x303e, 1}, {0x3041, 0xa4cf, 1}, {0xac00, 0xd7a3, 1}, {0xf900, 0xfaff, 1},
		{0xfe30, 0xfe6f, 1}, {0xff00, 0xff60, 1}, {0xffe0, 0xffe6, 1},
	},
	R32: []unicode.Range32{{0x1f300, 0x1f64f, 1}, {0x1f680, 0x1f6ff, 1}, {0x1f900, 0x1f9ff, 1}, {0x20000, 0x3fffd, 1}},
}

// displayWidth is how many places a text takes in a terminal.
func displayWidth(s string) (n int) {
	for _, r := range s {
		switch {
		case unicode.In(r, unicode.Mn, unicode.Me, unicode.Cf):
		case unicode.Is(wide, r):
			n += 2
		default:
			n++
		}
	}
	return n
}

// shown makes a text from elsewhere fit for a terminal: what could steer it is left out.
func shown(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || unicode.In(r, unicode.Cf, unicode.Zl, unicode.Zp) {
			return -1
		}
		return r
	}, s)
}

// forTerminal is a text from elsewhere as it may be written to w: as it is, or, on a terminal, with escapes in place of what could
// steer that.
func forTerminal(w io.Writer, s string) string {
	if !isTerminal(w) {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if r == '\n' || r == '\t' || r != '\ufeff' && !unicode.IsControl(r) && !unicode.In(r, unicode.Bidi_Control) {
			b.WriteRune(r)
			continue
		}
		_, _ = fmt.Fprintf(&b, `\u%04x`, r) // which JSON has too
	}
	return b.String()
}

// orDash is what a cell shows that has nothing to say.
func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return shown(s)
}

// ago says how long ago a time was, or how far ahead it is.
func ago(t *time.Time, now time.Time) string {
	if t == nil {
		return "-"
	}
	d := now.Sub(*t)
	if d < 0 {
		return "in " + inWords(-d)
	}
	return inWords(d) + " ago"
}

func inWords(d time.Duration) string {
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d/time.Second))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d/time.Minute))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d/time.Hour))
	}
	return fmt.Sprintf("%dd", int(d/(24*time.Hour)))
}

// inChinese reports whether the one at the terminal reads Chinese, by the environment.
func inChinese() bool {
	for _, name := range []string{"LC_ALL", "LC_MESSAGES", "LANG"} {
		if v := os.Getenv(name); v != "" {
			return strings.HasPrefix(v, "zh")
		}
	}
	return false
}
