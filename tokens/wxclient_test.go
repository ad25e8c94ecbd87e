package tokens

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/textproto"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

const clearSecret = "open-sesame-0123456789"

func newTestClient(t *testing.T, o ClientOptions) *Client {
	t.Helper()
	c, err := NewClient(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func serve(t *testing.T, handler http.HandlerFunc) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(handler)
	t.Cleanup(s.Close)
	return s
}

func TestClientAnswers(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		status int
		answer string
		code   int64 // of the *APIError wanted
		err    error
	}{
		{name: "plain", answer: `{"value":"x"}`},
		{name: "zero errcode", answer: `{"errcode":0,"errmsg":"ok","value":"x"}`},
		{name: "zero errcode as text", answer: `{"errcode":"0","value":"x"}`},
		{name: "null errcode", answer: `{"errcode":null,"value":"x"}`},
		{name: "spaces and a byte order mark", answer: "\xef\xbb\xbf \r\n{\"value\":\"x\"}\n"},
		{name: "errmsg of another type", answer: `{"errcode":0,"errmsg":{},"value":"x"}`},
		{name: "error", answer: `{"errcode":61004,"errmsg":"access clientip is not registered"}`, code: 61004},
		{name: "negative", answer: `{"errcode":-1,"errmsg":"system error"}`, code: -1},
		{name: "error as text", answer: `{"errcode":"40013","errmsg":"invalid appid"}`, code: 40013},
		{name: "error without a message", answer: `{"errcode":40013}`, code: 40013},
		{name: "beyond 32 bits", answer: `{"errcode":9999999999}`, code: 9999999999},
		{name: "errcode that is no number", answer: `{"errcode":"many"}`, err: ErrUnreachable},
		{name: "fractional errcode", answer: `{"errcode":1.5}`, err: ErrUnreachable},
		{name: "html", answer: "<html><body>busy</body></html>", err: ErrUnreachable},
		{name: "half", answer: `{"value":"x`, err: ErrUnreachable},
		{name: "two answers", answer: `{"value":"x"}{"errcode":1}`, err: ErrUnreachable},
		{name: "list", answer: `[{"value":"x"}]`, err: ErrUnreachable},
		{name: "text", answer: `"x"`, err: ErrUnreachable},
		{name: "nothing", answer: "", err: ErrUnreachable},
		{name: "another shape", answer: `{"value":{"x":1}}`, err: ErrUnreachable},
		{name: "bad gateway", status: http.StatusBadGateway, answer: `{"value":"x"}`, err: ErrUnreachable},
		{name: "redirect", status: http.StatusFound, answer: `{"value":"x"}`, err: ErrUnreachable},
		{name: "too long", answer: `{"value":"` + strings.Repeat("x", maxAnswer) + `"}`, err: ErrUnreachable},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var redirected atomic.Bool
			s := serve(t, func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/elsewhere" {
					redirected.Store(true)
				}
				w.Header().Set("Content-Type", "text/html")
				w.Header().Set("Location", "/elsewhere")
				if test.status != 0 {
					w.WriteHeader(test.status)
				}
				_, _ = io.WriteString(w, test.answer)
			})
			c := newTestClient(t, ClientOptions{Origins: []string{s.URL}})
			for method, call := range map[string]func(out any) error{
				"POST": func(out any) error { return c.Post(t.Context(), "/cgi-bin/x", nil, struct{}{}, out) },
				"GET":  func(out any) error { return c.Get(t.Context(), "/cgi-bin/x", nil, out) },
			} {
				var out struct{ Value string }
				err := call(&out)
				switch {
				case test.code != 0:
					if !hasCode(err, test.code) {
						t.Errorf("%s: %v, want errcode %d", method, err, test.code)
					}
				case test.err != nil:
					if !errors.Is(err, test.err) {
						t.Errorf("%s: %v, want %v", method, err, test.err)
					}
				case err != nil || out.Value != "x":
					t.Errorf("%s: %+v, %v", method, out, err)
				}
			}
			if redirected.Load() {
				t.Error("a redirect was followed")
			}
		})
	}
}

func TestClientRequest(t *testing.T) {
	t.Parallel()
	var got *http.Request
	var body string
	s := serve(t, func(w http.ResponseWriter, r *http.Request) {
		raw, _ := io.ReadAll(r.Body)
		got, body = r, string(raw)
		_, _ = io.WriteString(w, `{}`)
	})
	c := newTestClient(t, ClientOptions{Origins: []string{s.URL + "/"}})
	query := url.Values{"access_token": {"a+b&c=d@@@"}}
	if err := c.Post(t.Context(), "/cgi-bin/message", query, map[string]string{"content": "<a href=\"x\">&中</a>"}, nil); err != nil {
		t.Fatal(err)
	}
	if want := `{"content":"<a href=\"x\">&中</a>"}`; body != want {
		t.Errorf("body %s, want %s", body, want)
	}
	if got.ContentLength != int64(len(body)) || got.URL.Query().Get("access_token") != "a+b&c=d@@@" {
		t.Errorf("length %d, query %q", got.ContentLength, got.URL.RawQuery)
	}
	if err := c.Post(t.Context(), "/x", nil, nil, nil); err != nil || body != "{}" {
		t.Errorf("a call without arguments sends %q, %v; want an empty object", body, err)
	}
	if err := c.Get(t.Context(), "/x", nil, nil); err != nil || got.ContentLength > 0 || len(got.TransferEncoding) != 0 || body != "" {
		t.Errorf("GET sends a body: %q, length %d, %v, %v", body, got.ContentLength, got.TransferEncoding, err)
	}
	if err := c.Post(t.Context(), "/x", nil, func() {}, nil); err == nil {
		t.Error("a body that cannot be encoded was sent")
	}
}

func TestClientOrigins(t *testing.T) {
	t.Parallel()
	var calls atomic.Int32
	up := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		calls.Add(1)
		_, _ = io.WriteString(w, `{}`)
	})
	breaks := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		calls.Add(1)
		conn, _, err := w.(http.Hijacker).Hijack()
		if err == nil {
			_ = conn.Close()
		}
	})
	busy := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		calls.Add(1)
		w.WriteHeader(http.StatusServiceUnavailable)
	})
	const down = "http://127.0.0.1:1" // nobody listens there, or ever will, as on a port that was free a moment ago

	for _, test := range []struct {
		name    string
		origins []string
		ok      bool
		calls   int32
	}{
		{"first is up", []string{up.URL, busy.URL}, true, 1},
		{"first cannot be reached", []string{down, up.URL}, true, 1},
		{"none can be reached", []string{down, down}, false, 0},
		{"connection broke", []string{breaks.URL, up.URL}, false, 1},
		{"bad answer", []string{busy.URL, up.URL}, false, 1},
	} {
		calls.Store(0)
		c := newTestClient(t, ClientOptions{Origins: test.origins})
		err := c.Post(t.Context(), "/x", nil, nil, nil)
		if (err == nil) != test.ok || calls.Load() != test.calls {
			t.Errorf("%s: %v after %d calls, want %d", test.name, err, calls.Load(), test.calls)
		}
		if err != nil && !errors.Is(err, ErrUnreachable) {
			t.Errorf("%s: %v, want ErrUnreachable", test.name, err)
		}
	}
	// A transport that does not report its connections is only believed when it says that it could not dial.
	for failure, want := range map[error]int32{
		&net.OpError{Op: "dial", Err: errors.New("refused")}: 2,
		&net.OpError{Op: "read", Err: errors.New("reset")}:   1,
		errors.New("anything"):                               1,
	} {
		calls.Store(0)
		c := newTestClient(t, ClientOptions{Origins: []string{up.URL, up.URL}, Transport: roundTrip(func(*http.Request) (*http.Response, error) {
			calls.Add(1)
			return nil, failure
		})})
		if err := c.Post(t.Context(), "/x", nil, nil, nil); err == nil || calls.Load() != want {
			t.Errorf("%v: %v after %d calls, want %d", failure, err, calls.Load(), want)
		}
	}
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// A kept connection that the server closes while the request is on its way is what net/http likes to repeat.
func TestClientNeverSendsTwice(t *testing.T) {
	t.Parallel()
	var calls atomic.Int32
	s := serve(t, func(w http.ResponseWriter, r *http.Request) {
		calls.Add(1)
		_, _ = io.Copy(io.Discard, r.Body)
		if r.URL.Path == "/break" {
			if conn, _, err := w.(http.Hijacker).Hijack(); err == nil {
				_ = conn.Close()
			}
			return
		}
		_, _ = io.WriteString(w, `{}`)
	})
	c := newTestClient(t, ClientOptions{Origins: []string{s.URL, s.URL}})
	for method, call := range map[string]func(path string) error{
		"POST": func(path string) error { return c.Post(t.Context(), path, nil, nil, nil) },
		"GET":  func(path string) error { return c.Get(t.Context(), path, nil, nil) },
	} {
		if err := call("/fine"); err != nil {
			t.Fatal(err)
		}
		calls.Store(0)
		if err := call("/break"); !errors.Is(err, ErrUnreachable) || calls.Load() != 1 {
			t.Errorf("%s: %v after %d calls", method, err, calls.Load())
		}
	}
}

func TestClientErrorsHoldNoSecret(t *testing.T) {
	t.Parallel()
	var mode atomic.Int32
	s := serve(t, func(w http.ResponseWriter, r *http.Request) {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		switch mode.Load() {
		case 1:
			fmt.Fprintf(conn, "%s is no HTTP\r\n\r\n", r.URL)
		case 2:
			fmt.Fprintf(conn, "HTTP/1.1 302 Found\r\nLocation: ://%s\r\nContent-Length: 0\r\n\r\n", r.URL)
		case 3:
			fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{\"%s", clearSecret)
		case 4:
			fmt.Fprintf(conn, "HTTP/1.1 200 %s\r\nContent-Length: x\r\n\r\n", clearSecret)
		}
		_ = conn.Close()
	})
	query := url.Values{"access_token": {clearSecret}}
	body := map[string]string{"component_appsecret": clearSecret}
	for _, origin := range []string{s.URL, "http://127.0.0.1:1", "https://" + strings.TrimPrefix(s.URL, "http://")} {
		c := newTestClient(t, ClientOptions{Origins: []string{origin}})
		for m := range int32(5) {
			mode.Store(m)
			err := c.Post(t.Context(), "/cgi-bin/x", query, body, nil)
			if !errors.Is(err, ErrUnreachable) {
				t.Errorf("mode %d: %v", m, err)
			}
			if text := fmt.Sprintf("%v %+v %q", err, err, err); strings.Contains(text, clearSecret) || strings.Contains(text, "access_token") {
				t.Errorf("mode %d: a secret in %s", m, text)
			}
		}
	}
}

// What comes back of a body is in no error either, whole or in part.
func TestClientErrorsHoldNothingOfTheBody(t *testing.T) {
	t.Parallel()
	const opens = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
	for name, answer := range map[string]func(body string) string{
		"in place of an answer": func(body string) string { return body + "\r\n\r\n" },
		"a part of it":          func(body string) string { return body[strings.Index(body, clearSecret)+2:] + "\r\n\r\n" },
		"for a header":          func(body string) string { return "HTTP/1.1 200 OK\r\n" + body + "\r\n\r\n" },
		"for a trailer":         func(body string) string { return opens + body + "\r\n\r\n" },
	} {
		s := serve(t, func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			conn, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			_, _ = io.WriteString(conn, answer(string(body)))
			_ = conn.Close()
		})
		c := newTestClient(t, ClientOptions{Origins: []string{s.URL}})
		err := c.Post(t.Context(), "/cgi-bin/stable_token", nil, map[string]string{"secret": clearSecret}, nil)
		if !errors.Is(err, ErrUnreachable) || strings.Contains(err.Error(), clearSecret[2:]) || !strings.Contains(err.Error(), "malformed") {
			t.Errorf("%s: %v", name, err)
		}
	}
	line := textproto.ProtocolError("malformed MIME header line: " + clearSecret) // as some Go says it, without quotation marks
	if err := safeCause(line, nil, []byte(`{"secret":"`+clearSecret+`"}`)); strings.Contains(err.Error(), clearSecret) {
		t.Error(err)
	}
	if err := safeCause(io.ErrUnexpectedEOF, nil, nil); err != io.ErrUnexpectedEOF { //nolint:errorlint // the same one
		t.Error(err)
	}
}

func TestClientDeadlines(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	var calls atomic.Int32
	s := serve(t, func(http.ResponseWriter, *http.Request) {
		calls.Add(1)
		<-release
	})
	t.Cleanup(func() { close(release) })
	c := newTestClient(t, ClientOptions{Origins: []string{s.URL, s.URL}, Timeout: 500 * time.Millisecond})
	if err := c.Get(t.Context(), "/slow", nil, nil); !errors.Is(err, ErrUnreachable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a slow WeChat: %v", err)
	}
	if calls.Load() != 1 {
		t.Errorf("a call that timed out was made %d times", calls.Load())
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Get(ctx, "/slow", nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("a caller that left: %v", err)
	}
}

func TestClientUsesTheProxy(t *testing.T) {
	t.Parallel()
	var seen atomic.Value
	proxy := serve(t, func(w http.ResponseWriter, r *http.Request) {
		seen.Store(r.URL.Host)
		_, _ = io.WriteString(w, `{}`)
	})
	u, _ := url.Parse(proxy.URL)
	c := newTestClient(t, ClientOptions{Origins: []string{"http://127.0.0.1:1"}, Proxy: http.ProxyURL(u)})
	if err := c.Get(t.Context(), "/x", nil, nil); err != nil || seen.Load() != "127.0.0.1:1" {
		t.Errorf("through the proxy: %v, host %v", err, seen.Load())
	}
}

func TestOrigins(t *testing.T) {
	t.Parallel()
	for origin, ok := range map[string]bool{
		"https://api.weixin.qq.com":      true,
		"https://api.weixin.qq.com:443/": true,
		"http://127.0.0.1:8080":          true,
		"http://[::1]:8080":              true,
		"http://localhost:8080":          true,
		"http://api.weixin.qq.com":       false,
		"http://127.0.0.1.example.com":   false,
		"ftp://api.weixin.qq.com":        false,
		"api.weixin.qq.com":              false,
		"https://":                       false,
		"https://u:p@api.weixin.qq.com":  false,
		"https://api.weixin.qq.com/base": false,
		"https://api.weixin.qq.com?a=b":  false,
		"https://api.weixin.qq.com#f":    false,
		"://":                            false,
		"":                               false,
	} {
		_, err := NewClient(ClientOptions{Origins: []string{origin}})
		if (err == nil) != ok {
			t.Errorf("origin %q: %v", origin, err)
		}
		if err != nil && strings.Contains(err.Error(), "u:p") {
			t.Errorf("the error repeats a password: %v", err)
		}
	}
	if c, err := NewClient(ClientOptions{}); err != nil || c.origins[0] != DefaultOrigin || c.timeout != DefaultTimeout {
		t.Errorf("defaults: %+v, %v", c, err)
	}
}

func TestAPIError(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		msg, text, rid string
	}{
		{"invalid appid rid: 64f1e2d3-0a1b2c3d-4e5f6071", "/api: 1 invalid appid rid: 64f1e2d3-0a1b2c3d-4e5f6071", "64f1e2d3-0a1b2c3d-4e5f6071"},
		{"invalid appid hint: [x]", "/api: 1 invalid appid hint: [x]", ""},
		{"bad rid: 64f1e2d3-0a1b2c3d", "/api: 1 bad rid: 64f1e2d3-0a1b2c3d", ""},
		{"line\r\nbreak\x1b[31m\x00\xff", "/api: 1 linebreak[31m", ""},
		{"", "/api: 1", ""},
		{strings.Repeat("中", 200), "/api: 1 " + strings.Repeat("中", maxErrorText/3), ""},
	} {
		e := newAPIError("/api", 1, test.msg)
		if e.Error() != test.text || e.RID != test.rid {
			t.Errorf("%q: %q, rid %q", test.msg, e.Error(), e.RID)
		}
	}
	if got := (&APIError{Code: 40001}).Error(); got != "40001" {
		t.Errorf("a bare error: %q", got)
	}
	for code, want := range map[int64]bool{40001: true, 40014: true, 42001: true, 42006: true, 0: false, -1: false, 41001: false, 61003: false, 48001: false} {
		if IsTokenRefused(code) != want {
			t.Errorf("IsTokenRefused(%d) = %v", code, !want)
		}
	}
}

func TestTokenParameter(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		kind Kind
		path string
		want string
	}{
		{KindComponent, pathQueryAuth, "component_access_token"},
		{KindComponent, "/sns/oauth2/component/access_token", "component_access_token"},
		{KindComponent, "/wxa/gettemplatelist", "access_token"},
		{KindAuthorizer, "/cgi-bin/component/setprivacysetting", "access_token"},
		{KindAccount, "/cgi-bin/user/info", "access_token"},
	} {
		if got := tokenParameter(test.kind, test.path); got != test.want {
			t.Errorf("%s %s: %s", test.kind, test.path, got)
		}
	}
}

func FuzzDecodeAnswer(f *testing.F) {
	for _, seed := range []string{`{"errcode":40001,"errmsg":"x rid: 64f1e2d3-0a1b2c3d-4e5f6071"}`, `{"errcode":"0","expires_in":"7200"}`, `{`, `[]`, "\xef\xbb\xbf{}"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		var out struct {
			Token     string      `json:"access_token"`
			ExpiresIn wireSeconds `json:"expires_in"`
		}
		err := decodeAnswer("/x", answer, &out, func() []string { return nil })
		if api, ok := errors.AsType[*APIError](err); ok && (api.Code == 0 || len(api.Msg) > maxErrorText) {
			t.Errorf("%+v", api)
		} else if err != nil && !ok && !errors.Is(err, ErrUnreachable) {
			t.Errorf("an error of no class: %v", err)
		}
		if life := lifeOf(int64(out.ExpiresIn)); life < time.Second || life > longestLife {
			t.Errorf("a life of %v", life)
		}
	})
}

// WeChat quotes what it was sent in some of its errors.
func TestEchoedSecretsAreTakenOut(t *testing.T) {
	t.Parallel()
	const (
		token   = "abcdefgh+ijkl/0123456789"
		ticket  = "ticket@@@0123456789abcdef"
		account = "wx00000000000000aa"
		words   = "words of a message to a user"
	)
	for _, echo := range []string{
		"invalid ticket " + ticket, "bad content: " + words, "token=" + url.QueryEscape(token), "split " + ticket[:9] + "\x00" + ticket[9:],
		strings.Repeat("x", maxErrorText-len(ticket)/2) + ticket, // capped in the middle
	} {
		c := newTestClient(t, ClientOptions{Transport: roundTrip(func(*http.Request) (*http.Response, error) {
			answer, err := json.Marshal(map[string]any{"errcode": 61006, "errmsg": echo + " of " + account})
			return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(bytes.NewReader(answer))}, err
		})})
		body := map[string]any{
			"component_verify_ticket": ticket, "component_appid": account, "n": 1,
			"news": map[string]any{"articles": []map[string]string{{"title": words}}},
		}
		err := c.Post(t.Context(), "/x", url.Values{"access_token": {token}}, body, nil)
		if !hasCode(err, 61006) {
			t.Fatalf("err = %v", err)
		}
		for _, secret := range []string{ticket, ticket[:12], token, url.QueryEscape(token), words} {
			if strings.Contains(err.Error(), secret) {
				t.Errorf("%q: the error repeats the request: %v", echo, err)
			}
		}
		if len(echo) < 100 && !strings.Contains(err.Error(), account) {
			t.Errorf("the account is gone from the error: %v", err)
		}
	}
}
