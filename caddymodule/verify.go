package caddymodule

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// maxVerifyFile is the size above which a file is no verification file. Real ones have 16 or 32 bytes; some kilobytes
// are the login page of a console session that had expired, saved under the file's name.
const maxVerifyFile = 64 << 10

// maxLookedThrough bounds the files of a folder that are looked at when the configuration is loaded.
const maxLookedThrough = 256

// autoWait bounds a request's wait for a file that is being fetched from WeChat, which has its own request waiting.
const autoWait = 2 * time.Second

// verifyName is the shape of every name that WeChat hands out: MP_verify_<16>.txt, WW_verify_<16>.txt, <10>.txt.
var verifyName = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}\.txt$`)

// Verify serves the files by which WeChat checks who owns a domain, such as MP_verify_a1B2c3D4e5F6g7H8.txt. A request
// whose path is one of those files is answered with its exact bytes as text/plain, for GET and HEAD. Every other request
// goes on to the next handler. Nothing is made up for a name: a server that answers any name lets strangers claim the
// domain. A file comes from the first of these that has it:
//
//  1. The configuration (files).
//  2. The folder, which is read at each request, so that a file that is put there is served without a reload. Only plain
//     files directly in it are served, of at most 64 KiB, and only under names of the verification shape (letters, digits,
//     - and _, then .txt); a symbolic link that leads out of the folder is not followed.
//  3. The files that were added at run time, by PUT /wechat/verify/<name> on the admin endpoint; the app wechat has to be
//     configured. All nodes that share its store serve them, a second later at the latest.
//  4. With auto, WeChat itself: the file of the web-view domain (业务域名) of each platform of the app, and, on a host whose
//     first label is the appid of an account that authorised a platform, as in wx3333333333333333.wx.example.com, that of
//     the account. A platform's is fetched ahead. For a name that is not known WeChat is asked at most once in five minutes
//     for each platform and account, whatever is requested, and the request waits for at most 2 s.
//
// A byte order mark is part of a file like all else, and WeChat then takes it for another one (86103): the log warns of
// such a file, and of a web page under a file's name, an empty file, and one in UTF-16.
//
// WeChat fetches these files over plain HTTP as well, so an HTTPS site needs an http:// site beside it that has this
// handler too.
type Verify struct {
	// Folder holds verification files. Placeholders are resolved when the config is loaded. A folder that does not
	// exist yet is allowed. Default: none.
	Folder string `json:"folder,omitempty"`
	// Files are verification files by name, with their content, which is served as it is: no placeholders, no
	// newline added. Default: none.
	Files map[string]string `json:"files,omitempty"`
	// Path is the path below which the files are served, instead of at the root: with /mp, a file is at
	// /mp/<name> and not at /<name>. For a domain that was registered with a path. Default: the root.
	Path string `json:"path,omitempty"`
	// Auto gets the files of web-view domains from WeChat. It needs the app wechat with a platform. Default: false.
	Auto bool `json:"auto,omitempty"`

	logger *zap.Logger
	app    *App    // nil: not configured
	folder string  // resolved
	prefix string  // ends with a slash
	unread *damper // of log lines about what cannot be read
	doubts *damper // of log lines about what WeChat will not accept
}

// CaddyModule returns the Caddy module information.
func (Verify) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.wechat_verify", New: func() caddy.Module { return new(Verify) }}
}

// Provision resolves the folder's name, and warns of files that WeChat will not accept.
func (v *Verify) Provision(ctx caddy.Context) error {
	v.logger, v.unread, v.doubts = ctx.Logger(), new(damper), new(damper)
	v.prefix = strings.TrimSuffix(v.Path, "/") + "/"
	var err error
	if v.app, err = optionalApp(ctx); err != nil {
		return err
	}
	if v.Auto && v.app != nil {
		v.app.wantConfirmFiles()
	}
	for name, content := range v.Files {
		v.warn(name, []byte(content))
	}
	if v.Folder == "" {
		return nil
	}
	if v.folder, err = (resolver{repl: caddy.NewReplacer()}).required("folder", v.Folder); err != nil {
		return err
	}
	v.warnOfFolder()
	return nil
}

// readableFolder says why this process cannot read a folder.
func readableFolder(path string) error {
	absolute, err := filepath.Abs(path) // the error tells where a relative path led
	if err != nil {
		return err
	}
	info, err := os.Stat(absolute)
	switch {
	case err != nil:
		return err
	case !info.IsDir():
		return fmt.Errorf("%s is not a folder", absolute)
	}
	folder, err := os.Open(absolute)
	if err != nil {
		return err
	}
	return folder.Close()
}

// warnOfFolder tells the log of a folder that cannot be read, and of files in it that WeChat will not accept.
func (v *Verify) warnOfFolder() {
	if err := readableFolder(v.folder); err != nil {
		v.logger.Warn("the folder of verification files cannot be read yet: its files are served once it is there",
			zap.String("folder", v.folder), zap.Error(err))
		return
	}
	eachVerifyFile(v.folder, v.warn)
}

// eachVerifyFile calls see with the first verification files in a folder.
func eachVerifyFile(path string, see func(name string, content []byte)) {
	folder, err := os.Open(path)
	if err != nil {
		return // said at the first request
	}
	defer folder.Close()
	names, _ := folder.Readdirnames(maxLookedThrough)
	for _, name := range names {
		if !verifyName.MatchString(name) {
			continue
		}
		if content, err := readPlainFile(path, name, maxVerifyFile); err == nil {
			see(name, content)
		}
	}
}

// doubtful are the names of the configured files, and of those in the folder, that WeChat will not accept, with what is
// wrong with each.
func (v *Verify) doubtful() map[string]string {
	doubts := make(map[string]string)
	note := func(name string, content []byte) {
		if doubt := doubtOf(content); doubt != "" {
			doubts[name] = doubt
		}
	}
	for name, content := range v.Files {
		note(name, []byte(content))
	}
	if v.folder != "" {
		eachVerifyFile(v.folder, note)
	}
	return doubts
}

// warn tells the log of a file that WeChat will not accept.
func (v *Verify) warn(name string, content []byte) {
	if doubt := doubtOf(content); doubt != "" {
		v.logger.Warn("WeChat will not accept a verification file: it "+doubt, zap.String("file", name))
	}
}

// byteOrderMark is what some editors put before a text.
var byteOrderMark = []byte("\ufeff")

// isPage tells a web page from a verification file, which has no markup.
func isPage(content []byte) bool {
	return bytes.HasPrefix(bytes.TrimSpace(bytes.TrimPrefix(content, byteOrderMark)), []byte("<"))
}

// isUTF16 tells what an editor has saved in UTF-16.
func isUTF16(content []byte) bool {
	return bytes.HasPrefix(content, []byte("\xff\xfe")) || bytes.HasPrefix(content, []byte("\xfe\xff"))
}

// doubtOf says what is wrong with the content of a verification file; "": nothing.
func doubtOf(content []byte) string {
	switch {
	case isPage(content):
		return "is a web page, such as the login page of WeChat's console: log in there and download the file again"
	case bytes.HasPrefix(content, byteOrderMark):
		return "begins with a byte order mark, which an editor put there: save it without one"
	case isUTF16(content):
		return "is in UTF-16, in which an editor saved it: download it again"
	case len(content) == 0:
		return "is empty: download it again"
	}
	return ""
}

const (
	errNothingToServe = "nothing to serve: name a folder or a file, or configure the global option wechat, so that files can be added at run time"
	errNoAuto         = "auto needs a platform in the global option wechat: WeChat hands these files to platforms alone"
)

// empty reports whether the configuration of this handler names nothing to serve.
func (v *Verify) empty() bool { return v.Folder == "" && len(v.Files) == 0 && !v.Auto }

// Validate refuses what could never be served.
func (v *Verify) Validate() error {
	if v.empty() && v.app == nil {
		return errors.New(errNothingToServe)
	}
	if v.app != nil {
		if err := v.fits(v.app); err != nil {
			return err
		}
	} else if v.Auto {
		return errors.New(errNoAuto)
	}
	for name, content := range v.Files {
		if err := checkVerifyFile(name, content); err != nil {
			return err
		}
	}
	return checkVerifyPath(v.Path)
}

// fits implements fitting.
func (v *Verify) fits(app *App) error {
	if v.Auto && len(app.Platforms) == 0 {
		return errors.New(errNoAuto)
	}
	return nil
}

func checkVerifyFile(name, content string) error {
	switch {
	case !verifyName.MatchString(name):
		return fmt.Errorf("'%s' is not the name of a verification file: want one like MP_verify_a1B2c3D4e5F6g7H8.txt", name)
	case content == "":
		return fmt.Errorf("file '%s' is empty: give the text of the file that WeChat handed out", name)
	case len(content) > maxVerifyFile:
		return fmt.Errorf("file '%s' is larger than %d bytes: that is no verification file", name, maxVerifyFile)
	}
	return nil
}

func checkVerifyPath(p string) error {
	if p == "" || p == "/" {
		return nil
	}
	return checkPath("path", p)
}

// ServeHTTP answers for a registered file and passes everything else on.
func (v *Verify) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	name, below := strings.CutPrefix(r.URL.Path, v.prefix)
	if !below || (r.Method != http.MethodGet && r.Method != http.MethodHead) || !verifyName.MatchString(name) {
		return next.ServeHTTP(w, r)
	}
	content, ok := v.content(r, name)
	if !ok {
		return next.ServeHTTP(w, r)
	}
	h := w.Header()
	h.Set("Content-Type", "text/plain") // exactly: any charset here is one more thing to compare
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Length", strconv.Itoa(len(content)))
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodHead {
		return nil
	}
	_, _ = w.Write(content) // a visitor who left is no error of this handler
	return nil
}

// content returns a file that is registered under that name, if there is one.
func (v *Verify) content(r *http.Request, name string) ([]byte, bool) {
	if text, ok := v.Files[name]; ok {
		return []byte(text), true
	}
	if content, ok := v.fromFolder(name); ok {
		return content, true
	}
	if v.app == nil || !tokens.IsVerifyFileName(name) {
		return nil, false
	}
	content, ok, err := v.app.manager().VerifyFile(r.Context(), name)
	if err != nil {
		v.notServed(name, err)
	}
	if ok || !v.Auto || accountsFile.MatchString(name) {
		return content, ok
	}
	ctx, cancel := context.WithTimeout(r.Context(), autoWait)
	defer cancel()
	if content, ok, err = v.app.manager().ConfirmFile(ctx, name, appIDOfHost(r.Host)); err != nil {
		v.notServed(name, err)
	}
	return content, ok
}

// fromFolder returns a file of the folder.
func (v *Verify) fromFolder(name string) ([]byte, bool) {
	if v.folder == "" {
		return nil, false
	}
	content, err := readPlainFile(v.folder, name, maxVerifyFile)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			v.notServed(name, err)
		}
		return nil, false
	}
	if doubtOf(content) != "" {
		if ok, _ := v.doubts.allow(); ok {
			v.warn(name, content)
		}
	}
	return content, true
}

// notServed tells the log, rarely: anybody can ask, and for any name, and what is wrong with the folder or the store is
// wrong with all of them.
func (v *Verify) notServed(name string, err error) {
	if ok, missed := v.unread.allow(); ok {
		v.logger.Warn("a verification file is not served", zap.String("file", name), zap.Error(err), zap.Int("not_logged", missed))
	}
}

// accountsFile is a name that WeChat never gives to a web-view domain: an official account's, and WeCom's.
var accountsFile = regexp.MustCompile(`^(MP|WW)_verify_`)

// appIDOfHost is the appid that a host begins with, as in wx3333333333333333.wx.example.com; "" if it does not.
func appIDOfHost(host string) string {
	label, _, more := strings.Cut(strings.ToLower(host), ".")
	if !more || !isAppID(label) {
		return ""
	}
	return label
}

// readPlainFile reads a file of at most limit bytes that lies in folder, also if a symbolic link leads to it.
func readPlainFile(folder, name string, limit int64) ([]byte, error) {
	root, err := os.OpenRoot(folder)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	// Looked at before it is opened, because opening a named pipe waits for whoever writes to it.
	info, err := root.Stat(name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("not a plain file")
	}
	file, err := root.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	content, err := io.ReadAll(io.LimitReader(file, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(content)) > limit {
		return nil, fmt.Errorf("larger than %d bytes: download the file from WeChat's console again", limit)
	}
	return content, nil
}

// checkPath judges a path of the configuration that handlers serve below: absolute, literal, clean.
func checkPath(what, p string) error {
	switch {
	case strings.Contains(p, "*"):
		return fmt.Errorf("%s '%s' contains a '*': it is a path, not a matcher; everything below it is served", what, p)
	case !strings.HasPrefix(p, "/"):
		return fmt.Errorf("%s '%s' must begin with /", what, p)
	case !plainPath.MatchString(p) || p != "/" && path.Clean(p) != strings.TrimSuffix(p, "/") || p == "//":
		return fmt.Errorf("%s '%s' is not a plain path: want segments of letters, digits and . _ ~ - only, as in /wx/login", what, p)
	}
	return nil
}

// plainPath matches paths that are the same escaped and unescaped.
var plainPath = regexp.MustCompile(`^(/[A-Za-z0-9._~-]*)+$`)

// UnmarshalCaddyfile parses the directive, after its matcher was taken away:
//
//	wechat_verify [<matcher>] [<folder>] {
//		file <name> <content>
//		path <prefix>
//		auto
//	}
//
// One argument is the folder, even if it begins with a slash, as with root; only @name and * are taken as
// a matcher then.
func (v *Verify) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	switch args := d.RemainingArgs(); len(args) {
	case 0:
	case 1:
		v.Folder = args[0]
	default:
		return d.ArgErr()
	}
	for d.NextBlock(0) {
		switch option := d.Val(); option {
		case "file":
			var name, content string
			if !d.AllArgs(&name, &content) {
				return d.ArgErr()
			}
			if err := checkVerifyFile(name, content); err != nil {
				return d.WrapErr(err)
			}
			if _, twice := v.Files[name]; twice {
				return d.Errf("file '%s' is given twice", name)
			}
			if v.Files == nil {
				v.Files = make(map[string]string)
			}
			v.Files[name] = content
		case "path":
			if v.Path != "" {
				return d.Err("path is given twice: write a second wechat_verify for a second path")
			}
			if !d.AllArgs(&v.Path) {
				return d.ArgErr()
			}
			if err := checkVerifyPath(v.Path); err != nil {
				return d.WrapErr(err)
			}
		case "auto":
			if v.Auto {
				return d.Err("auto is given twice")
			}
			if d.NextArg() {
				return d.ArgErr()
			}
			v.Auto = true
		default:
			return d.Errf("unknown subdirective '%s': want file, path or auto", option)
		}
		if d.NextBlock(d.Nesting()) {
			return d.Errf("file, path and auto take no block")
		}
	}
	return nil
}

// parseVerify sets up wechat_verify. It looks for the matcher itself, because a handler directive would take a folder
// such as /srv/wechat-verify as a path matcher.
func parseVerify(h httpcaddyfile.Helper) ([]httpcaddyfile.ConfigValue, error) {
	h.Next()
	withMatcher := h.CountRemainingArgs() > 1
	if h.CountRemainingArgs() == 1 && h.NextArg() {
		withMatcher = strings.HasPrefix(h.Val(), "@") || h.Val() == "*"
	}
	h.Reset()
	var matcher caddy.ModuleMap
	if withMatcher {
		h.Next()
		var err error
		if matcher, err = h.ExtractMatcherSet(); err != nil {
			return nil, err
		}
	}
	verify := new(Verify)
	if err := verify.UnmarshalCaddyfile(h.Dispenser); err != nil {
		return nil, err
	}
	if h.Option("wechat") == nil {
		switch {
		case verify.empty():
			return nil, h.Err(errNothingToServe)
		case verify.Auto:
			return nil, h.Err(errNoAuto)
		}
	}
	if err := fitsOption(h, verify); err != nil {
		return nil, err
	}
	route := caddyhttp.Route{HandlersRaw: []json.RawMessage{caddyconfig.JSONModuleObject(verify, "handler", "wechat_verify", nil)}}
	if matcher != nil {
		route.MatcherSetsRaw = caddyhttp.RawMatcherSets{matcher}
	}
	return []httpcaddyfile.ConfigValue{{Class: "route", Value: route}}, nil
}

var (
	_ caddy.Provisioner           = (*Verify)(nil)
	_ caddy.Validator             = (*Verify)(nil)
	_ caddyhttp.MiddlewareHandler = (*Verify)(nil)
	_ caddyfile.Unmarshaler       = (*Verify)(nil)
)
