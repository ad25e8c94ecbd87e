package caddymodule

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// adminMux serves the admin routes as Caddy's admin endpoint does.
func adminMux(t *testing.T, app *App) *http.ServeMux {
	t.Helper()
	return muxOf(t, &Admin{operations{app: app, logger: zap.NewNop()}})
}

// muxOf has the routes of an admin endpoint, as Caddy makes them reachable.
func muxOf(t *testing.T, admin *Admin) *http.ServeMux {
	t.Helper()
	mux := http.NewServeMux()
	for _, route := range admin.Routes() {
		mux.HandleFunc(route.Pattern, func(w http.ResponseWriter, r *http.Request) {
			err := route.Handler.ServeHTTP(w, r)
			if refused, ok := err.(caddy.APIError); ok {
				http.Error(w, refused.Err.Error(), refused.HTTPStatus)
			} else if err != nil {
				t.Errorf("%s %s: %v", r.Method, r.URL, err)
			}
		})
	}
	return mux
}

func adminCall(mux *http.ServeMux, method, path, body string) *httptest.ResponseRecorder {
	rec := httptest.NewRecorder()
	mux.ServeHTTP(rec, httptest.NewRequest(method, path, strings.NewReader(body)))
	return rec
}

// verifyOf provisions a handler beside an app.
func verifyOf(t *testing.T, ctx caddy.Context, v *Verify) *Verify {
	t.Helper()
	if err := v.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	if err := v.Validate(); err != nil {
		t.Fatal(err)
	}
	return v
}

// file is what a handler serves for a path: the body, or "" if the request goes on.
func file(t *testing.T, v *Verify, method, target string) string {
	t.Helper()
	passed := false
	rec := serve(t, v, httptest.NewRequest(method, target, nil), caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
		passed = true
		return nil
	}))
	if passed {
		return ""
	}
	if rec.Code != http.StatusOK || rec.Header().Get("Content-Type") != "text/plain" || rec.Header().Get("X-Content-Type-Options") != "nosniff" {
		t.Errorf("%s: %d %v", target, rec.Code, rec.Header())
	}
	if method == http.MethodHead {
		return rec.Header().Get("Content-Length")
	}
	return rec.Body.String()
}

// What is added on the admin endpoint is served as it is by every handler, below its path, until it is removed.
func TestAdminVerifyFiles(t *testing.T) {
	t.Parallel()
	app, ctx := newTestApp(t, testConfig(""))
	mux := adminMux(t, app)
	root, below := verifyOf(t, ctx, &Verify{}), verifyOf(t, ctx, &Verify{Path: "/mp", Files: map[string]string{"configured.txt": "configured"}})
	const url = "/wechat/verify/" + verifyFileName
	if got := file(t, root, "GET", "/"+verifyFileName); got != "" {
		t.Fatalf("served %q before there was anything", got)
	}
	for _, step := range []struct {
		method, path, body string
		status             int
		answer, serves     string
	}{
		{"PUT", url, "\ufeffexact\r\n ", 201, `it begins with a byte order mark`, "\ufeffexact\r\n "},
		{"POST", url, "a1B2c3D4e5F6g7H8", 200, `{"name":"` + verifyFileName + `","size":16}`, "a1B2c3D4e5F6g7H8"},
		{"PUT", url, "", 400, "it is empty", "a1B2c3D4e5F6g7H8"},
		{"PUT", url, "\n<!DOCTYPE html><html>login</html>", 400, "is a web page", "a1B2c3D4e5F6g7H8"},
		{"PUT", url, strings.Repeat("x", tokens.MaxVerifyContent+1), 413, "larger than 4096 bytes", "a1B2c3D4e5F6g7H8"},
		{"PUT", url, strings.Repeat("x", tokens.MaxVerifyContent), 200, `"size":4096`, strings.Repeat("x", tokens.MaxVerifyContent)},
		{"PUT", "/wechat/verify/robots.txt", "x", 400, "is not the name of a verification file", strings.Repeat("x", tokens.MaxVerifyContent)},
		{"PUT", "/wechat/verify/..%2f..%2fpasswd.txt", "x", 400, "is not the name", strings.Repeat("x", tokens.MaxVerifyContent)},
		{"GET", "/wechat/verify", "", 200, `"auto":[]`, strings.Repeat("x", tokens.MaxVerifyContent)},
		{"DELETE", url, "", 204, "", ""},
		{"DELETE", url, "", 404, "was added at run time", ""},
		{"GET", "/wechat/verify", "", 200, `{"auto":[],"files":[]}`, ""},
	} {
		rec := adminCall(mux, step.method, step.path, step.body)
		if rec.Code != step.status || !strings.Contains(rec.Body.String(), step.answer) {
			t.Errorf("%s %s: %d %s, want %d %s", step.method, step.path, rec.Code, rec.Body, step.status, step.answer)
		}
		if got := file(t, root, "GET", "/"+verifyFileName); got != step.serves {
			t.Errorf("%s %s: then serves %.40q, want %.40q", step.method, step.path, got, step.serves)
		}
		if got := file(t, below, "GET", "/mp/"+verifyFileName); got != step.serves {
			t.Errorf("%s %s: then serves %.40q below the path, want %.40q", step.method, step.path, got, step.serves)
		}
		if got := file(t, below, "GET", "/"+verifyFileName); got != "" {
			t.Errorf("serves %q outside of its path", got)
		}
	}
	if got := file(t, below, "GET", "/mp/configured.txt"); got != "configured" {
		t.Errorf("serves %q", got)
	}
	adminCall(mux, "PUT", "/wechat/verify/configured.txt", "added")
	if got := file(t, below, "GET", "/mp/configured.txt"); got != "configured" {
		t.Errorf("serves %q over what is configured", got)
	}
	if got := file(t, root, "HEAD", "/configured.txt"); got != "5" {
		t.Errorf("HEAD says %q bytes", got)
	}
	if rec := adminCall(mux, "PATCH", url, "x"); rec.Code != http.StatusMethodNotAllowed {
		t.Errorf("PATCH: %d", rec.Code)
	}
}

// Over HTTP/3, by which the console may be asked, nobody tells that there should have been more of a body.
func TestAdminVerifyFileEndsEarly(t *testing.T) {
	t.Parallel()
	app, _ := newTestApp(t, testConfig(""))
	c := &Console{logger: zap.NewNop()}
	c.mount((&operations{app: app, logger: zap.NewNop()}).list())
	put := own(http.MethodPut, "/api/verify/"+verifyFileName, "a1B2c3D4", "Content-Type: application/octet-stream")
	put.ContentLength = 16
	if rec := serve(t, c, put, nil); rec.Code != http.StatusBadRequest || !strings.Contains(rec.Body.String(), "the body broke off") {
		t.Errorf("half a file: %d %s", rec.Code, rec.Body)
	}
	if files, err := app.manager().VerifyFiles(t.Context()); err != nil || len(files) != 0 {
		t.Errorf("kept: %v, %v", files, err)
	}
}

// Without the global option, and while the store fails, the routes say so.
func TestAdminVerifyFilesUnavailable(t *testing.T) {
	t.Parallel()
	closed, ctx := newTestApp(t, testConfig(""))
	v := verifyOf(t, ctx, &Verify{Files: map[string]string{"configured.txt": "configured"}})
	closed.manager().Close()
	for _, tt := range []struct {
		app    *App
		status int
		want   string
	}{{nil, 404, "no global option wechat"}, {closed, 503, "the log says why"}} {
		mux := adminMux(t, tt.app)
		for _, method := range []string{"GET", "PUT", "POST", "DELETE"} {
			path := "/wechat/verify"
			if method != "GET" {
				path += "/" + verifyFileName
			}
			if rec := adminCall(mux, method, path, "x"); rec.Code != tt.status || !strings.Contains(rec.Body.String(), tt.want) {
				t.Errorf("%s: %d %s", method, rec.Code, rec.Body)
			}
		}
	}
	if got := file(t, v, "GET", "/"+verifyFileName); got != "" {
		t.Errorf("serves %q without a store", got)
	}
	if got := file(t, v, "GET", "/configured.txt"); got != "configured" {
		t.Errorf("serves %q without a store", got)
	}
}

// With auto, the files that WeChat gives are served under their names: the platform's on every host, an account's on the
// host that its appid names. Without auto, none is.
func TestVerifyAuto(t *testing.T) {
	t.Parallel()
	app, ctx := authorizedApp(t)
	auto, without := verifyOf(t, ctx, &Verify{Auto: true}), verifyOf(t, ctx, &Verify{})
	if !app.env.ConfirmFiles {
		t.Error("the platform's file is not fetched ahead")
	}
	for _, tt := range []struct{ host, name, want string }{
		{"wechat.example.com", platformFile, "of the platform"},
		{authorizerID + ".wx.example.com", platformFile, "of the platform"},
		{authorizerID + ".wx.example.com", authorizerFile, "of the authorizer"},
		{strings.ToUpper(authorizerID) + ".wx.example.com:8443", authorizerFile, "of the authorizer"},
		{"wechat.example.com", authorizerFile, ""},
		{strangerID + ".wx.example.com", authorizerFile, ""},
		{authorizerID, authorizerFile, ""},
		{"www." + authorizerID + ".example.com", authorizerFile, ""},
		{authorizerID + ".wx.example.com", "unknown123.txt", ""},
		{authorizerID + ".wx.example.com", verifyFileName, ""},
	} {
		target := "http://" + tt.host + "/" + tt.name
		if got := file(t, auto, "GET", target); got != tt.want {
			t.Errorf("%s: %q, want %q", target, got, tt.want)
		}
		if got := file(t, without, "GET", target); got != "" {
			t.Errorf("%s: %q without auto", target, got)
		}
		if got := file(t, auto, "POST", target); got != "" {
			t.Errorf("%s: POST answered %q", target, got)
		}
	}
	rec := adminCall(adminMux(t, app), "GET", "/wechat/verify", "")
	if body := rec.Body.String(); !strings.Contains(body, `"auto":[{"name":"`+platformFile+`"`) || !strings.Contains(body, platformID) || strings.Contains(body, "access") {
		t.Errorf("the list: %s", body)
	}
}

func TestVerifyAutoNeedsAPlatform(t *testing.T) {
	t.Parallel()
	_, without := newTestApp(t, `{}`)
	bare, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	t.Cleanup(cancel)
	for name, ctx := range map[string]caddy.Context{"no app": bare, "no platform": without} {
		v := &Verify{Auto: true}
		if err := v.Provision(ctx); err != nil {
			t.Fatal(err)
		}
		if err := v.Validate(); err == nil || !strings.Contains(err.Error(), "auto needs a platform") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
