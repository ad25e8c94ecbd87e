package caddymodule

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestReady(t *testing.T) {
	t.Parallel()
	wechat := newFakeWeChat(t)
	app, ctx := newTestApp(t, statusConfig(wechat.URL, ""))
	h := new(Ready)
	if err := h.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	ask := func(method string) *httptest.ResponseRecorder {
		t.Helper()
		rec := serve(t, h, httptest.NewRequest(method, "/healthz", nil), nil)
		if rec.Body.Len() > 0 || rec.Header().Get("Cache-Control") != "no-store" || rec.Header().Get("Content-Length") != "0" {
			t.Errorf("%s: %q, %v", method, rec.Body, rec.Header())
		}
		return rec
	}
	detailed := func() (int, string) {
		t.Helper()
		rec := httptest.NewRecorder()
		ops := operations{app: app, logger: app.logger}
		if err := ops.ready(rec, httptest.NewRequest(http.MethodGet, "http://localhost/wechat/ready", nil)); err != nil {
			t.Fatal(err)
		}
		return rec.Code, rec.Body.String()
	}
	for _, method := range []string{http.MethodGet, http.MethodHead} {
		if rec := ask(method); rec.Code != http.StatusServiceUnavailable {
			t.Errorf("%s without a ticket: %d", method, rec.Code)
		}
	}
	if rec := ask(http.MethodPost); rec.Code != http.StatusMethodNotAllowed || rec.Header().Get("Allow") != "GET, HEAD" {
		t.Errorf("POST: %d %v", rec.Code, rec.Header())
	}
	if code, body := detailed(); code != http.StatusServiceUnavailable || !strings.HasPrefix(body, `{"ready":false,"findings":[{"level":"red","code":"no_ticket","subject":"platform wx1111111111111111"`) {
		t.Errorf("%d %s", code, body)
	}
	pushTicket(t, eventHandler(t, ctx))
	if !isReady(app) || ask(http.MethodGet).Code != http.StatusOK || ask(http.MethodHead).Code != http.StatusOK {
		t.Error("not ready with a ticket")
	}
	if code, body := detailed(); code != http.StatusOK || body != `{"ready":true}` {
		t.Errorf("%d %s", code, body)
	}
	if err := (&operations{}).ready(httptest.NewRecorder(), nil); err == nil || err.Error() != errNoApp.Error() {
		t.Errorf("without the app: %v", err)
	}
	if err := (&operations{}).status(httptest.NewRecorder(), nil); err == nil || err.Error() != errNoApp.Error() {
		t.Errorf("without the app: %v", err)
	}
}

// However many ask, one examines; the others get the last verdict meanwhile.
func TestVerdictIsShared(t *testing.T) {
	t.Parallel()
	var v verdict
	times := 0
	bad := []Finding{{Code: "bad"}}
	if got := v.get(func() []Finding { times++; return bad }); len(got) != 1 {
		t.Error(got)
	}
	if got := v.get(func() []Finding { times++; return nil }); len(got) != 1 || times != 1 {
		t.Errorf("%v after %d examinations", got, times)
	}
	v.mu.Lock()
	v.at = v.at.Add(-2 * verdictLife)
	v.mu.Unlock()
	begun, end := make(chan struct{}), make(chan struct{})
	var asking sync.WaitGroup
	asking.Go(func() {
		v.get(func() []Finding { close(begun); <-end; return nil })
	})
	<-begun
	if got := v.get(func() []Finding { t.Error("two examine"); return nil }); len(got) != 1 {
		t.Errorf("%v while the next verdict is awaited", got)
	}
	close(end)
	asking.Wait()
	if got := v.get(func() []Finding { t.Error("examined again"); return bad }); len(got) != 0 {
		t.Errorf("%v after the verdict", got)
	}
	v.mu.Lock()
	v.at = time.Now().Add(-2 * verdictStale)
	v.mu.Unlock()
	if got := v.get(func() []Finding { return bad }); len(got) != 1 {
		t.Error(got)
	}
}
