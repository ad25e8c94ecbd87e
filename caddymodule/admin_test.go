package caddymodule

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/caddyserver/caddy/v2"
)

// Without the global option the routes exist and say so; with it, and nothing to report, the list is empty.
func TestAdminOrphans(t *testing.T) {
	t.Parallel()
	app, _ := newTestApp(t, testConfig("http://127.0.0.1:1"))
	for _, tt := range []struct {
		admin  *Admin
		query  string
		status int
		body   string
	}{
		{&Admin{}, "", http.StatusNotFound, ""},
		{&Admin{operations{app: app}}, "", http.StatusOK, `{"orphans":[]}`},
		{&Admin{operations{app: app}}, "?redirect=ftp://x", http.StatusBadRequest, ""},
		{&Admin{operations{app: app}}, "?redirect=https:///x", http.StatusBadRequest, ""},
		{&Admin{operations{app: app}}, "?redirect=%", http.StatusOK, `{"orphans":[]}`},
	} {
		rec := httptest.NewRecorder()
		status := http.StatusOK
		err := tt.admin.operations.orphans(rec, httptest.NewRequest(http.MethodGet, "http://localhost/wechat/orphans"+tt.query, nil))
		if refused, ok := err.(caddy.APIError); ok {
			status = refused.HTTPStatus
		} else if err != nil {
			t.Fatal(err)
		}
		if status != tt.status || rec.Body.String() != tt.body {
			t.Errorf("%q: %d %s", tt.query, status, rec.Body)
		}
	}
}
