//go:build unix

package caddymodule

import (
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// Opening a named pipe waits for a writer, so a request for one would hang for ever.
func TestVerifyDoesNotOpenPipes(t *testing.T) {
	t.Parallel()
	v := &Verify{Folder: t.TempDir()}
	provisionVerify(t, v)
	if err := syscall.Mkfifo(filepath.Join(v.Folder, "pipe.txt"), 0o600); err != nil {
		t.Fatal(err)
	}
	passed := false
	serve(t, v, httptest.NewRequest(http.MethodGet, "/pipe.txt", nil), caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
		passed = true
		return nil
	}))
	if !passed {
		t.Error("a pipe was served")
	}
}
