package caddymodule

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

const verifyFileName = "MP_verify_a1B2c3D4e5F6g7H8.txt"

func provisionVerify(t *testing.T, v *Verify) *observer.ObservedLogs {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	t.Cleanup(cancel)
	if err := v.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	if err := v.Validate(); err != nil {
		t.Fatal(err)
	}
	core, logs := observer.New(zap.DebugLevel)
	v.logger = zap.New(core)
	return logs
}

func writeFile(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// verifyFolder is a folder with one of everything that may lie in one.
func verifyFolder(t *testing.T) string {
	t.Helper()
	outside := filepath.Join(t.TempDir(), "secret.txt")
	writeFile(t, outside, "top secret")
	folder := t.TempDir()
	writeFile(t, filepath.Join(folder, verifyFileName), "\ufeffexact\r\n ")
	writeFile(t, filepath.Join(folder, "index.html"), "no")
	writeFile(t, filepath.Join(folder, "largest.txt"), strings.Repeat("x", maxVerifyFile))
	writeFile(t, filepath.Join(folder, "larger.txt"), strings.Repeat("x", maxVerifyFile+1))
	if err := os.Mkdir(filepath.Join(folder, "folder.txt"), 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(folder, "folder.txt", "inner.txt"), "no")
	for name, target := range map[string]string{
		"absolute.txt": outside, "relative.txt": "../" + filepath.Base(filepath.Dir(outside)) + "/secret.txt", "inside.txt": verifyFileName,
	} {
		if err := os.Symlink(target, filepath.Join(folder, name)); err != nil {
			t.Fatal(err)
		}
	}
	return folder
}

func TestVerifyServes(t *testing.T) {
	t.Parallel()
	v := &Verify{Folder: verifyFolder(t), Files: map[string]string{"inline.txt": "inline", "index.txt": "wins"}}
	writeFile(t, filepath.Join(v.Folder, "index.txt"), "loses")
	provisionVerify(t, v)
	for path, want := range map[string]string{
		"/" + verifyFileName: "\ufeffexact\r\n ",
		"/inside.txt":        "\ufeffexact\r\n ",
		"/inline.txt":        "inline",
		"/index.txt":         "wins",
		"/largest.txt":       strings.Repeat("x", maxVerifyFile),
	} {
		for _, method := range []string{http.MethodGet, http.MethodHead} {
			t.Run(method+path, func(t *testing.T) {
				t.Parallel()
				rec := serve(t, v, httptest.NewRequest(method, path+"?x=1", nil), nil)
				wantBody := want
				if method == http.MethodHead {
					wantBody = ""
				}
				if rec.Code != http.StatusOK || rec.Body.String() != wantBody {
					t.Errorf("answer %d, %d bytes", rec.Code, rec.Body.Len())
				}
				h := rec.Header()
				if h.Get("Content-Type") != "text/plain" || h.Get("X-Content-Type-Options") != "nosniff" {
					t.Errorf("headers %v", h)
				}
				if rec.Result().ContentLength != int64(len(want)) {
					t.Errorf("Content-Length %d, want %d", rec.Result().ContentLength, len(want))
				}
			})
		}
	}
}

func TestVerifyFallsThrough(t *testing.T) {
	t.Parallel()
	v := &Verify{Folder: verifyFolder(t), Files: map[string]string{"inline.txt": "inline"}}
	provisionVerify(t, v)
	tests := []struct{ name, method, path string }{
		{"unknown name", "GET", "/MP_verify_unknown.txt"},
		{"post", "POST", "/inline.txt"},
		{"below a path", "GET", "/mp/inline.txt"},
		{"not a text file", "GET", "/index.html"},
		{"in a folder", "GET", "/folder.txt/inner.txt"},
		{"a folder", "GET", "/folder.txt"},
		{"too large", "GET", "/larger.txt"},
		{"absolute link out", "GET", "/absolute.txt"},
		{"relative link out", "GET", "/relative.txt"},
		{"dots", "GET", "/../inline.txt"},
		{"encoded dots", "GET", "/%2e%2e/secret.txt"},
		{"encoded slash", "GET", "/..%2fsecret.txt"},
		{"other case", "GET", "/INLINE.TXT"},
		{"NUL", "GET", "/inline.txt%00"},
		{"newline", "GET", "/inline.txt%0a"},
		{"name too long", "GET", "/" + strings.Repeat("a", 65) + ".txt"},
		{"root", "GET", "/"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			passed := false
			rec := serve(t, v, httptest.NewRequest(tt.method, tt.path, nil), caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
				passed = true
				w.WriteHeader(http.StatusTeapot)
				return nil
			}))
			if !passed || rec.Code != http.StatusTeapot || rec.Header().Get("Content-Type") != "" {
				t.Errorf("answered %d %q itself", rec.Code, rec.Body)
			}
		})
	}
}

func TestVerifySaysWhyAFileIsNotServed(t *testing.T) {
	t.Parallel()
	v := &Verify{Folder: verifyFolder(t)}
	logs := provisionVerify(t, v)
	pass := caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { return nil })
	synctest.Test(t, func(t *testing.T) {
		for _, path := range []string{"/unknown.txt", "/larger.txt", "/folder.txt", "/absolute.txt"} {
			time.Sleep(damperInterval)
			serve(t, v, httptest.NewRequest(http.MethodGet, path, nil), pass)
		}
	})
	var files []string
	for _, e := range logs.All() {
		files = append(files, e.ContextMap()["file"].(string))
	}
	if got := strings.Join(files, " "); got != "larger.txt folder.txt absolute.txt" {
		t.Errorf("logged about %q", got)
	}
}

// Anybody can ask for any name, and a folder that cannot be read is wrong with each of them.
func TestVerifyUnreadableFolderIsSaidOnceAMinute(t *testing.T) {
	t.Parallel()
	folder := filepath.Join(t.TempDir(), "file")
	writeFile(t, folder, "not a folder") // unreadable to root too, who runs tests in containers
	v := &Verify{Folder: folder}
	logs := provisionVerify(t, v)
	pass := caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { return nil })
	synctest.Test(t, func(t *testing.T) {
		for i := range 50 {
			serve(t, v, httptest.NewRequest(http.MethodGet, fmt.Sprintf("/a%d.txt", i), nil), pass)
		}
		if n := logs.Len(); n != 1 {
			t.Errorf("%d log lines of 50 requests, want 1", n)
		}
		time.Sleep(damperInterval)
		serve(t, v, httptest.NewRequest(http.MethodGet, "/a.txt", nil), pass)
	})
	if all := logs.All(); len(all) != 2 || all[1].ContextMap()["not_logged"] != int64(49) {
		t.Errorf("a minute later: %v", all)
	}
}

// A visitor who leaves early is no failure of the site's, and Caddy would log one.
func TestVerifyVisitorLeaves(t *testing.T) {
	t.Parallel()
	v := &Verify{Files: map[string]string{"a.txt": "a"}}
	provisionVerify(t, v)
	if err := v.ServeHTTP(goneVisitor{httptest.NewRecorder()}, httptest.NewRequest(http.MethodGet, "/a.txt", nil), nil); err != nil {
		t.Errorf("err = %v", err)
	}
}

// goneVisitor is the ResponseWriter of a visitor who left.
type goneVisitor struct{ *httptest.ResponseRecorder }

func (goneVisitor) Write([]byte) (int, error) { return 0, syscall.EPIPE }

func TestVerifyPath(t *testing.T) {
	t.Parallel()
	for _, path := range []string{"/mp", "/mp/"} {
		v := &Verify{Path: path, Files: map[string]string{"a.txt": "a"}}
		provisionVerify(t, v)
		for target, want := range map[string]bool{"/mp/a.txt": true, "/a.txt": false, "/mpa.txt": false, "/mp//a.txt": false} {
			passed := false
			serve(t, v, httptest.NewRequest(http.MethodGet, target, nil), caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
				passed = true
				return nil
			}))
			if passed == want {
				t.Errorf("path %s: %s served %v, want %v", path, target, !passed, want)
			}
		}
	}
}

// A file that is put into the folder is served without a reload, even if the folder itself came later.
func TestVerifyFolderMayComeLater(t *testing.T) {
	folder := filepath.Join(t.TempDir(), "later")
	t.Setenv("WECHAT_VERIFY_TEST_FOLDER", folder)
	v := &Verify{Folder: "{env.WECHAT_VERIFY_TEST_FOLDER}"}
	logs := provisionVerify(t, v)
	status := func() int {
		return serve(t, v, httptest.NewRequest(http.MethodGet, "/a.txt", nil), caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
			w.WriteHeader(http.StatusTeapot)
			return nil
		})).Code
	}
	if got := status(); got != http.StatusTeapot {
		t.Errorf("without a folder: %d", got)
	}
	if err := os.Mkdir(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(folder, "a.txt"), "a")
	if got := status(); got != http.StatusOK {
		t.Errorf("with the file: %d", got)
	}
	if n := logs.Len(); n != 0 {
		t.Errorf("%d log lines", n)
	}
}

func TestVerifyBadConfig(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		v    Verify
		want string
	}{
		{"nothing", Verify{}, "nothing to serve"},
		{"name", Verify{Files: map[string]string{"a.html": "x"}}, "'a.html' is not the name"},
		{"newline in a name", Verify{Files: map[string]string{"a.txt\n": "x"}}, "is not the name"},
		{"empty", Verify{Files: map[string]string{"a.txt": ""}}, "is empty"},
		{"large", Verify{Files: map[string]string{"a.txt": strings.Repeat("x", maxVerifyFile+1)}}, "larger than"},
		{"path", Verify{Folder: "/x", Path: "mp"}, "must begin with /"},
		{"path with a star", Verify{Folder: "/x", Path: "/mp/*"}, "contains a '*'"},
		{"path with dots", Verify{Folder: "/x", Path: "/mp/.."}, "not a plain path"},
		{"path with a space", Verify{Folder: "/x", Path: "/m p"}, "not a plain path"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if err := tt.v.Validate(); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("err = %v, want %q in it", err, tt.want)
			}
		})
	}
}

func TestVerifyFolderOfNothing(t *testing.T) {
	t.Parallel()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	t.Cleanup(cancel)
	err := (&Verify{Folder: "{env.WECHAT_NO_SUCH_VARIABLE}"}).Provision(ctx)
	if err == nil || !strings.Contains(err.Error(), "folder: {env.WECHAT_NO_SUCH_VARIABLE} resolves to nothing") {
		t.Errorf("err = %v", err)
	}
}

// A folder that cannot be read is told of with the reason, and with the place that a relative name stands for.
func TestVerifySaysWhyAFolderCannotBeRead(t *testing.T) {
	t.Parallel()
	place := t.TempDir()
	file, closed := filepath.Join(place, "file"), filepath.Join(place, "closed")
	writeFile(t, file, "x")
	if err := os.Mkdir(closed, 0); err != nil {
		t.Fatal(err)
	}
	here, err := filepath.Abs("no-such-folder")
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]string{file: file + " is not a folder", filepath.Join(place, "missing"): "no such file", "no-such-folder": here}
	if os.Geteuid() != 0 { // root opens it all the same
		tests[closed] = "permission denied"
	}
	for folder, want := range tests {
		v := &Verify{Folder: folder}
		logs := provisionVerify(t, v)
		v.warnOfFolder()
		said := logs.FilterMessageSnippet("cannot be read yet").All()
		if len(said) != 1 || !strings.Contains(fmt.Sprint(said[0].ContextMap()["error"]), want) {
			t.Errorf("%s: %v, want %q", folder, said, want)
		}
	}
}

// What WeChat will not accept is served as it is, and said: when the configuration is loaded, and when it is asked for.
func TestVerifyDoubts(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	writeFile(t, filepath.Join(folder, "marked.txt"), "\ufeffa1B2c3D4e5F6g7H8")
	writeFile(t, filepath.Join(folder, "page.txt"), " <!DOCTYPE html>")
	writeFile(t, filepath.Join(folder, "none.txt"), "")
	writeFile(t, filepath.Join(folder, "wide.txt"), "\xff\xfea\x00")
	writeFile(t, filepath.Join(folder, "good.txt"), "a1B2c3D4e5F6g7H8\n")
	writeFile(t, filepath.Join(folder, "other.html"), "<html>")
	v := &Verify{Folder: folder, Files: map[string]string{"inline.txt": "\ufeffx", "fine.txt": "x"}}
	logs := provisionVerify(t, v)
	doubted := func() string {
		var files []string
		for _, e := range logs.TakeAll() {
			files = append(files, e.ContextMap()["file"].(string))
		}
		slices.Sort(files)
		return strings.Join(files, " ")
	}
	for name, content := range v.Files {
		v.warn(name, []byte(content))
	}
	v.warnOfFolder()
	if got := doubted(); got != "inline.txt marked.txt none.txt page.txt wide.txt" {
		t.Errorf("when loaded: %s", got)
	}
	synctest.Test(t, func(t *testing.T) {
		for _, name := range []string{"good.txt", "marked.txt", "marked.txt", "page.txt"} {
			if rec := serve(t, v, httptest.NewRequest(http.MethodGet, "/"+name, nil), nil); rec.Code != http.StatusOK {
				t.Errorf("%s: %d", name, rec.Code)
			}
		}
	})
	if got := doubted(); got != "marked.txt" {
		t.Errorf("when asked for, all in one minute: %s", got)
	}
}
