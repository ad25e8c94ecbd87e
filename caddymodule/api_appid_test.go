package caddymodule

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"unsafe"
)

// isPartOf reports whether two strings share memory.
func isPartOf(part, whole string) bool {
	at, start := uintptr(unsafe.Pointer(unsafe.StringData(part))), uintptr(unsafe.Pointer(unsafe.StringData(whole)))
	return start <= at && at < start+uintptr(len(whole))
}

// Caches keep appids. The request line that one came in goes, if it is long, and a short one costs no copy.
func TestAppIDLeavesLongRequestLine(t *testing.T) {
	t.Parallel()
	inPath := func(t *testing.T, r *http.Request) string {
		req := &apiRequest{Request: r}
		if refused := new(API).read(req); refused != nil {
			t.Fatalf("refused: %s", refused.msg)
		}
		return req.appid
	}
	inLogin := func(t *testing.T, r *http.Request) string {
		_, appid, _, refused := readLogin(&apiRequest{Request: r})
		if refused != nil {
			t.Fatalf("refused: %s", refused.msg)
		}
		return appid
	}
	for name, c := range map[string]struct {
		target string
		appid  func(*testing.T, *http.Request) string
	}{
		"path":  {"/" + accountID + "/cgi-bin/x?pad=", inPath},
		"login": {"/sns/jscode2session?appid=" + accountID + "&js_code=", inLogin},
	} {
		for length, pinned := range map[int]bool{maxPinnedLine: true, maxPinnedLine + 1: false} {
			r := httptest.NewRequest(http.MethodGet, c.target+strings.Repeat("x", length-len(c.target)), nil)
			appid := c.appid(t, r)
			if appid != accountID || isPartOf(appid, r.RequestURI) != pinned {
				t.Errorf("%s of %d bytes: got %q, part of it: %v, want %v", name, length, appid, isPartOf(appid, r.RequestURI), pinned)
			}
		}
	}
}

// The form of a request for a token is not kept either.
func TestAppIDLeavesForm(t *testing.T) {
	t.Parallel()
	r := httptest.NewRequest(http.MethodGet, "/cgi-bin/token?appid="+accountID, nil)
	asked, refused := readGrant(httptest.NewRecorder(), &apiRequest{Request: r, known: classify("/cgi-bin/token")}, grantBodyTimeout)
	if refused != nil || asked.AppID != accountID || isPartOf(asked.AppID, r.RequestURI) {
		t.Errorf("got %q, part of the query: %v, %v", asked.AppID, isPartOf(asked.AppID, r.RequestURI), refused)
	}
	if params, _ := url.ParseQuery(r.URL.RawQuery); !isPartOf(params.Get("appid"), r.RequestURI) {
		t.Error("net/url copies values by itself: the copy in readGrant can go")
	}
}
