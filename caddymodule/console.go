package caddymodule

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"mime"
	"net"
	"net/http"
	"net/url"
	"path"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
)

// Console is one page for those who run the gateway: how it is and what to do about what is not well, the authorizers,
// the pushes and calls as they come, the links of wechat_oauth with QR codes to try them, and what WeChat's errcodes mean.
// It shows no token, no key, no message and no openid.
//
// It lets in two kinds of requests and answers 403, with what to do, to all others:
//
//   - those that come straight from this machine, from a loopback address and with no header of a proxy (Forwarded,
//     X-Forwarded-*, X-Real-IP, Via), and name it localhost, 127.0.0.1 or [::1], with any port, in HTTP/1.1 or later: by
//     SSH port forwarding the console opens on any other machine. A proxy on this machine that replaces the Host and says
//     nothing of whom it speaks for makes everybody local: then a login must come first;
//   - those that an authentication handler before it let in: {http.auth.user.id} is not empty.
//
// It serves the page wherever a path ends with a slash, what belongs to it beside it, and below api/ what the admin endpoint
// has below /wechat/. All addresses in it are relative, so it also works below a path, with handle_path or without. Other
// sites' pages can neither read nor change anything: requests for api/ that a browser sends for another origin are refused,
// and changes must come as application/json, or application/octet-stream for a file.
//
// The page loads nothing from elsewhere and runs under a Content-Security-Policy that lets it do nothing else.
type Console struct {
	operations operations
	logger     *zap.Logger
	mux        *http.ServeMux
	names      map[string]bool // first segments of the operations' paths
	origins    *http.CrossOriginProtection
}

// CaddyModule returns the Caddy module information.
func (Console) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.wechat_console", New: func() caddy.Module { return new(Console) }}
}

// Provision gets the app.
func (c *Console) Provision(ctx caddy.Context) error {
	app, err := loadApp(ctx)
	if err != nil {
		return err
	}
	c.logger = ctx.Logger()
	c.operations = operations{app: app, logger: c.logger}
	c.mount(c.operations.list())
	return nil
}

// mount makes operations reachable below api/.
func (c *Console) mount(list []operation) {
	c.origins, c.mux, c.names = http.NewCrossOriginProtection(), http.NewServeMux(), make(map[string]bool)
	for _, op := range list {
		name, _, _ := strings.Cut(op.path[1:], "/")
		c.names[name] = true
		c.mux.HandleFunc(op.method+" "+op.path, func(w http.ResponseWriter, r *http.Request) {
			if err := op.handle(w, r); err != nil {
				c.fail(w, err)
			}
		})
	}
}

// UnmarshalCaddyfile parses the directive:
//
//	wechat_console [<matcher>]
func (*Console) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if d.NextArg() {
		return d.ArgErr()
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		return d.Errf("unknown subdirective '%s': wechat_console has none", d.Val())
	}
	return nil
}

func parseConsole(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	c := new(Console)
	if err := c.UnmarshalCaddyfile(h.Dispenser); err != nil {
		return nil, err
	}
	return c, nil
}

const (
	consoleAPI = "/api/" // before the path of an operation
	// maxConsoleBody bounds what a change may bring. The largest thing is a verification file.
	maxConsoleBody = 64 << 10

	consoleCSP = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; " +
		"frame-ancestors 'none'; form-action 'none'; base-uri 'none'; require-trusted-types-for 'script'"
)

//go:embed console
var consoleFiles embed.FS

// consoleAsset is a file of the page.
type consoleAsset struct {
	contentType, etag string
	content           []byte
}

// consoleAssets are all of them, by name.
var consoleAssets = loadConsoleAssets()

func loadConsoleAssets() map[string]consoleAsset {
	types := map[string]string{
		".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml",
	}
	assets := make(map[string]consoleAsset)
	files, _ := consoleFiles.ReadDir("console")
	for _, f := range files {
		content, _ := consoleFiles.ReadFile("console/" + f.Name())
		sum := sha256.Sum256(content)
		assets[f.Name()] = consoleAsset{types[path.Ext(f.Name())], `"` + hex.EncodeToString(sum[:16]) + `"`, content}
	}
	return assets
}

// ServeHTTP answers every request.
func (c *Console) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	setConsoleHeaders(w.Header())
	operation := c.operationPath(r)
	admitted := isLoggedIn(r) || isLocal(r)
	switch {
	case !admitted && operation == "":
		w.Header().Del("Cross-Origin-Opener-Policy") // there is nothing to keep apart, and browsers complain of it on plain http
		pageConsole.write(w, r)
	case !admitted:
		c.fail(w, caddy.APIError{HTTPStatus: http.StatusForbidden, Err: errors.New(pageConsole.en.Text)})
	case operation != "":
		c.serveAPI(w, r, operation)
	default:
		c.servePage(w, r)
	}
	return nil
}

// operationPath is the path of the operation that a request is for, as it came; empty: it is for the page or its files,
// which may be mounted below a path with api/ in it.
func (c *Console) operationPath(r *http.Request) string {
	escaped := r.URL.EscapedPath()
	i := strings.LastIndex(escaped, consoleAPI)
	if i < 0 || strings.HasSuffix(escaped, "/") {
		return ""
	}
	operation := escaped[i+len(consoleAPI)-1:]
	if name, _, _ := strings.Cut(operation[1:], "/"); c.names[name] {
		return operation
	}
	if _, isFile := consoleAssets[path.Base(operation)]; isFile || wantsPage(r) {
		return ""
	}
	return operation
}

// wantsPage reports whether a browser is led to an address, and does not load a file or call an operation.
func wantsPage(r *http.Request) bool { return strings.Contains(r.Header.Get("Accept"), "text/html") }

// isLoggedIn reports whether an authentication handler knows who sent a request.
func isLoggedIn(r *http.Request) bool {
	repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if !ok {
		return false
	}
	user, _ := repl.GetString("http.auth.user.id")
	return user != ""
}

// isLocal reports whether a request is this machine's own. No browser speaks HTTP/1.0, but proxies do that replace the Host
// and do not say whom they speak for, such as nginx with proxy_pass and nothing else.
func isLocal(r *http.Request) bool {
	return r.ProtoAtLeast(1, 1) && isConsoleHost(r.Host) && isDirectLoopback(r)
}

// isOwnOrigin reports whether a request comes from a page of the host that it asks, as far as it says so. That it does not
// also tells of a proxy which replaces the Host.
func isOwnOrigin(r *http.Request) bool {
	origin := r.Header.Get("Origin")
	if origin == "" {
		return true
	}
	u, err := url.Parse(origin)
	return err == nil && u.Host == r.Host
}

// isConsoleHost reports whether a Host is one under which this machine is known to itself alone. A name that somebody
// else let resolve to this machine is none.
func isConsoleHost(host string) bool {
	if name, port, err := net.SplitHostPort(host); err == nil {
		if strings.Trim(port, "0123456789") != "" {
			return false
		}
		if strings.Contains(name, ":") {
			name = "[" + name + "]"
		}
		host = name
	}
	// Not strings.EqualFold, to which localhoſt is the same.
	return strings.ToLower(host) == "localhost" || host == "127.0.0.1" || host == "[::1]"
}

var pageConsole = page{status: http.StatusForbidden,
	zh: pageText{"控制台不对外开放", "控制台只能在网关所在的机器上用 http://localhost 打开。在别处请用 SSH：ssh -L 9000:127.0.0.1:2020 网关主机，然后打开 http://localhost:9000。若要放在登录之后，请在 wechat_console 之前配置 basic_auth 等认证。"},
	en: pageText{"The console is not open to the outside", "It opens on the gateway's own machine, at http://localhost. From elsewhere use SSH: ssh -L 9000:127.0.0.1:2020 and the gateway's host, then open http://localhost:9000. Or put a login, such as basic_auth, before wechat_console."}}

// setConsoleHeaders sets what every answer has.
func setConsoleHeaders(h http.Header) {
	h.Set("Content-Security-Policy", consoleCSP)
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Frame-Options", "DENY")
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
	h.Set("Cross-Origin-Embedder-Policy", "require-corp")
	h.Set("Cache-Control", "no-store")
}

// servePage serves the page and its files.
func (c *Console) servePage(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		c.fail(w, caddy.APIError{HTTPStatus: http.StatusMethodNotAllowed, Err: errors.New("the console is only looked at: use GET")})
		return
	}
	_, name := path.Split(r.URL.Path)
	if name == "" {
		// The browser resolves the page's addresses by the path that it asked for, before handle_path took something off.
		if _, last := path.Split(originalPath(r)); last != "" {
			redirectToSlash(w, last)
			return
		}
		name = "index.html"
	}
	asset, ok := consoleAssets[name]
	switch {
	case ok:
	case path.Ext(name) == "", wantsPage(r):
		redirectToSlash(w, name)
		return
	default:
		c.fail(w, caddy.APIError{HTTPStatus: http.StatusNotFound, Err: errors.New("the console has no such page")})
		return
	}
	h := w.Header()
	h.Set("Content-Type", asset.contentType)
	h.Set("Cache-Control", "no-cache") // kept, and asked about: after an upgrade page and script fit together
	h.Set("ETag", asset.etag)
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(asset.content))
}

// redirectToSlash leads to the same address with a slash at its end. It is relative, so that it stays on this host
// whatever the path says.
func redirectToSlash(w http.ResponseWriter, last string) {
	w.Header().Set("Location", "./"+url.PathEscape(last)+"/")
	w.WriteHeader(http.StatusFound)
}

// serveAPI has an operation answer. The path is the operation's, as it came.
func (c *Console) serveAPI(w http.ResponseWriter, r *http.Request, escaped string) {
	unescaped, err := url.PathUnescape(escaped)
	switch site := r.Header.Get("Sec-Fetch-Site"); {
	case err != nil || path.Clean(unescaped) != unescaped:
		c.fail(w, errNoOperation)
		return
	case site != "" && site != "same-origin" && site != "none": // what other pages cannot read they need not have done
		c.fail(w, errForeignPage)
		return
	case !isLoggedIn(r) && !isOwnOrigin(r), c.origins.Check(r) != nil:
		c.fail(w, errForeignPage)
		return
	}
	inner := r.Clone(r.Context())
	inner.URL.Path, inner.URL.RawPath = unescaped, escaped
	if _, pattern := c.mux.Handler(inner); pattern == "" {
		c.noOperation(w, inner)
		return
	}
	switch r.Method {
	case http.MethodGet, http.MethodHead:
	default:
		// No form of another site's can send these, even for a browser that says nothing of where a request comes from.
		kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
		if err != nil || kind != "application/json" && kind != "application/octet-stream" {
			c.fail(w, caddy.APIError{HTTPStatus: http.StatusUnsupportedMediaType, Err: errors.New("changes must come with Content-Type: application/json, or application/octet-stream for a file")})
			return
		}
		inner.Body = http.MaxBytesReader(w, r.Body, maxConsoleBody)
	}
	c.mux.ServeHTTP(w, inner)
}

var (
	errNoOperation = caddy.APIError{HTTPStatus: http.StatusNotFound, Err: errors.New("the gateway has no such operation")}
	errForeignPage = caddy.APIError{HTTPStatus: http.StatusForbidden, Err: errors.New("this request comes from another site's page: open the console by its own address")}
)

// noOperation answers where no operation has that method and path.
func (c *Console) noOperation(w http.ResponseWriter, r *http.Request) {
	var allowed []string
	for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodPut, http.MethodDelete} {
		other := r.Clone(r.Context())
		other.Method = method
		if _, pattern := c.mux.Handler(other); pattern != "" {
			allowed = append(allowed, method)
		}
	}
	if len(allowed) == 0 {
		c.fail(w, errNoOperation)
		return
	}
	list := strings.Join(allowed, ", ")
	w.Header().Set("Allow", list)
	c.fail(w, caddy.APIError{HTTPStatus: http.StatusMethodNotAllowed, Err: errors.New("this address takes " + list)})
}

// fail answers with an error as the admin endpoint has it.
func (c *Console) fail(w http.ResponseWriter, err error) {
	known, ok := errors.AsType[caddy.APIError](err)
	if !ok {
		c.logger.Error("an operation failed", zap.Error(err))
		known = caddy.APIError{HTTPStatus: http.StatusInternalServerError, Err: errors.New("the operation failed: the log says why")}
	}
	if known.Err != nil {
		known.Message = known.Err.Error()
	}
	_ = answerJSON(w, known.HTTPStatus, known)
}

var (
	_ caddy.Provisioner           = (*Console)(nil)
	_ caddyhttp.MiddlewareHandler = (*Console)(nil)
	_ caddyfile.Unmarshaler       = (*Console)(nil)
)
