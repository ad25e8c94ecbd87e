package caddymodule

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestPrefersEnglish(t *testing.T) {
	t.Parallel()
	tests := []struct {
		accept string
		want   bool
	}{
		{"", false},
		{"zh-CN", false},
		{"zh-CN,zh;q=0.9,en;q=0.8", false},
		{"ZH-cn", false},
		{"en", true},
		{"en-US,en;q=0.9,zh-CN;q=0.8", true},
		{"en;q=0.8, zh;q=0.9", false},
		{"fr-FR", true},
		{"*", false},
		{"en;q=0", false},
		{"en;q=oops", false},
		{"en;q=NaN,zh;q=0.1", false},
		{"en;q=7", false},
		{",,;,", false},
	}
	for _, tt := range tests {
		t.Run(tt.accept, func(t *testing.T) {
			t.Parallel()
			if got := prefersEnglish([]string{tt.accept}); got != tt.want {
				t.Errorf("got %v", got)
			}
		})
	}
}

func TestPageWrite(t *testing.T) {
	t.Parallel()
	p := page{status: http.StatusGone, zh: pageText{"标题<b>", "正文"}, en: pageText{"Title<b>", "Text"}}
	tests := []struct {
		name, method, accept string
		want                 []string
		not                  []string
		lang                 string
	}{
		{"zh", "GET", "", []string{"标题&lt;b&gt;", "正文", `lang="zh-CN"`, pageCSS}, []string{"Title", "<b>"}, "zh-CN"},
		{"en", "GET", "en", []string{"Title&lt;b&gt;", "Text", `lang="en"`}, []string{"标题"}, "en"},
		{"HEAD", "HEAD", "en", nil, []string{"<"}, "en"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := httptest.NewRequest(tt.method, "/", nil)
			r.Header.Set("Accept-Language", tt.accept)
			rec := httptest.NewRecorder()
			p.write(rec, r)
			body := rec.Body.String()
			for _, s := range tt.want {
				if !strings.Contains(body, s) {
					t.Errorf("body lacks %q:\n%s", s, body)
				}
			}
			for _, s := range tt.not {
				if strings.Contains(body, s) {
					t.Errorf("body has %q:\n%s", s, body)
				}
			}
			if rec.Code != http.StatusGone || rec.Header().Get("Content-Language") != tt.lang {
				t.Errorf("status %d, headers %v", rec.Code, rec.Header())
			}
			assertPrivate(t, rec.Header())
			if tt.method == http.MethodGet && int(rec.Result().ContentLength) != len(body) {
				t.Errorf("Content-Length %d of %d", rec.Result().ContentLength, len(body))
			}
		})
	}
}

// The link reloads by having no address: the one of the page holds the code.
func TestPageTryAgain(t *testing.T) {
	t.Parallel()
	for accept, want := range map[string]string{"": `href="">重试</a>`, "en": `href="">Try again</a>`} {
		r := httptest.NewRequest(http.MethodGet, "/?code=the-code", nil)
		r.Header.Set("Accept-Language", accept)
		rec := httptest.NewRecorder()
		pageTryAgain.write(rec, r)
		if body := rec.Body.String(); rec.Code != http.StatusServiceUnavailable || !strings.Contains(body, want) || strings.Contains(body, "the-code") {
			t.Errorf("Accept-Language %q: %d\n%s", accept, rec.Code, body)
		}
		assertPrivate(t, rec.Header())
	}
	rec := httptest.NewRecorder()
	pageUnavailable.write(rec, httptest.NewRequest(http.MethodGet, "/", nil))
	if strings.Contains(rec.Body.String(), "<a ") {
		t.Errorf("a page where a reload does not help has a link:\n%s", rec.Body)
	}
}

func assertPrivate(t *testing.T, h http.Header) {
	t.Helper()
	if h.Get("Cache-Control") != "no-store" || h.Get("Referrer-Policy") != "no-referrer" || h.Get("X-Content-Type-Options") != "nosniff" {
		t.Errorf("headers %v", h)
	}
	csp := h.Get("Content-Security-Policy")
	if !strings.HasPrefix(csp, "default-src 'none'; style-src 'sha256-") || strings.Contains(csp, "unsafe") {
		t.Errorf("Content-Security-Policy %q", csp)
	}
}

// The policy allows the style by its hash, so the page must hold those very bytes, as a browser hashes them.
func TestPageStyleIsTheOneAllowed(t *testing.T) {
	t.Parallel()
	rec := httptest.NewRecorder()
	pageDenied.write(rec, httptest.NewRequest(http.MethodGet, "/", nil))
	_, rest, _ := strings.Cut(rec.Body.String(), "<style>")
	style, _, ok := strings.Cut(rest, "</style>")
	if !ok || !strings.Contains(rec.Header().Get("Content-Security-Policy"), "'sha256-"+styleHash(style)+"'") {
		t.Errorf("the style of the page is not the one of its policy")
	}
}

func TestPagesAreComplete(t *testing.T) {
	t.Parallel()
	for name, p := range map[string]page{
		"denied": pageDenied, "not found": pageNotFound, "bad request": pageBadRequest, "foreign": pageForeign, "invalid": pageInvalidCode,
		"used": pageUsedCode, "method": pageMethod, "refused": pageRefused, "unavailable": pageUnavailable, "try again": pageTryAgain,
		"too many": pageTooMany,
	} {
		if p.status < 400 || p.zh.Title == "" || p.zh.Text == "" || p.en.Title == "" || p.en.Text == "" {
			t.Errorf("page %q: %+v", name, p)
		}
	}
}
