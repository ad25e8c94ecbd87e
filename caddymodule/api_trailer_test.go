package caddymodule

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"golang.org/x/net/http2"
)

// speaking has the calls of a new gateway go to its WeChat over HTTP/1.1 or over h2.
func speaking(t *testing.T, proto string) (*gateway, *fakeWeChat) {
	t.Helper()
	var both, one http.Protocols
	both.SetHTTP1(true) // which the gateway's own calls speak
	both.SetUnencryptedHTTP2(true)
	wechat := newFakeWeChat(t)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if isCall := strings.HasPrefix(r.URL.Path, "/cgi-bin/x"); isCall && r.Proto != proto {
			t.Errorf("WeChat is spoken to by %s, want %s", r.Proto, proto)
		}
		wechat.ServeHTTP(w, r)
	}))
	server.Config.Protocols = &both
	server.Start()
	t.Cleanup(server.Close)
	g := newGateway(t, wechat, gatewayConfig(server.URL), "")
	one.SetHTTP1(proto == "HTTP/1.1")
	one.SetUnencryptedHTTP2(proto == "HTTP/2.0")
	g.transport().HTTPTransport.Transport.Protocols = &one
	return g, wechat
}

// answered is an answer with all that may come around it.
type answered struct {
	answer
	trailer http.Header
	interim string // statuses and headers
	err     error
}

// ask makes a call and reads all that comes.
func (g *gateway) ask(method, target string) (a answered) {
	g.t.Helper()
	ctx := httptrace.WithClientTrace(g.t.Context(), &httptrace.ClientTrace{Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
		a.interim += fmt.Sprint(code, h)
		return nil
	}})
	req, err := http.NewRequestWithContext(ctx, method, g.URL+target, nil)
	if err != nil {
		g.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+crmKey)
	res, err := g.Client().Transport.RoundTrip(req)
	if err != nil {
		g.t.Fatal(err)
	}
	body, err := io.ReadAll(res.Body)
	_ = res.Body.Close()
	a.answer, a.trailer, a.err = answer{res.StatusCode, res.Header, string(body), res.ContentLength}, res.Trailer, err
	return a
}

// shows reports whether a token is in an answer, in whatever case.
func (a answered) shows() bool {
	return strings.Contains(strings.ToUpper(fmt.Sprint(a.answer, a.trailer, a.interim)), "REALTOKEN")
}

// What comes behind an answer is the caller's, unless it repeats the token.
func TestAPITrailers(t *testing.T) {
	asked := func(r *http.Request) string { return "https://api.example" + r.URL.String() }
	for _, proto := range []string{"HTTP/1.1", "HTTP/2.0"} {
		g, wechat := speaking(t, proto)
		for name, body := range map[string]string{
			"empty": "", "small JSON": `{"errcode":0}`, "long JSON": `{"a":"` + strings.Repeat("x", 2*peekSize) + `"}`, "text": "some text",
		} {
			for contentType := range map[string]bool{"application/json": true, "image/jpeg": true} {
				for _, c := range []struct {
					name      string
					announced string
					set       func(h http.Header, r *http.Request)
					want      string
				}{
					{"announced", "X-Sum", func(h http.Header, _ *http.Request) { h.Set("X-Sum", "42") }, "42"},
					{"not announced", "", func(h http.Header, _ *http.Request) { h.Set(http.TrailerPrefix+"X-Sum", "42") }, "42"},
					{"announced, repeats", "X-Sum", func(h http.Header, r *http.Request) { h.Set("X-Sum", asked(r)) }, ""},
					{"not announced, repeats", "", func(h http.Header, r *http.Request) { h.Set(http.TrailerPrefix+"X-Sum", asked(r)) }, ""},
					{"second value repeats", "X-Sum", func(h http.Header, r *http.Request) { h["X-Sum"] = []string{"42", asked(r)} }, ""},
					{"another repeats", "X-Sum", func(h http.Header, r *http.Request) {
						h.Set("X-Sum", "42")
						h.Set(http.TrailerPrefix+"X-Url", asked(r))
					}, ""},
					{"a name repeats", "", func(h http.Header, r *http.Request) {
						h.Set(http.TrailerPrefix+"X-"+r.URL.Query().Get("access_token"), "42")
					}, ""},
				} {
					wechat.answer(func(w http.ResponseWriter, r *http.Request) {
						w.Header().Set("Content-Type", contentType)
						if c.announced != "" {
							w.Header().Set("Trailer", c.announced)
						}
						io.WriteString(w, body)
						_ = http.NewResponseController(w).Flush()
						c.set(w.Header(), r)
					})
					a := g.ask(http.MethodGet, "/"+accountID+"/cgi-bin/x")
					if a.shows() || a.err != nil || a.Status != http.StatusOK || a.Body != body || a.trailer.Get("X-Sum") != c.want {
						t.Errorf("%s, %s, %s, %s: got %d, %d of %d bytes, trailer %v, %v", proto, name, contentType, c.name, a.Status, len(a.Body), len(body), a.trailer, a.err)
					}
				}
			}
		}
		if n := g.transport().lost.missed; n == 0 {
			t.Errorf("%s: nothing of it is in the log", proto)
		}
		g.noSecretsLogged()
	}
}

// Of a call that is repeated with another token, the second answer is held to that, and of the first nothing comes.
func TestAPITrailersOfARepeatedCall(t *testing.T) {
	for _, proto := range []string{"HTTP/1.1", "HTTP/2.0"} {
		for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodHead} {
			g, wechat := speaking(t, proto)
			calls := 0 // one after the other
			wechat.answer(func(w http.ResponseWriter, r *http.Request) {
				calls++
				w.Header().Set("Content-Type", "application/json")
				w.Header().Set("Trailer", "X-Call, X-Url")
				w.WriteHeader(http.StatusEarlyHints)
				body := `{"errcode":0}`
				if calls == 1 && r.Method != http.MethodHead {
					body = `{"errcode":40001,"errmsg":"invalid credential"}`
				}
				io.WriteString(w, body)
				_ = http.NewResponseController(w).Flush()
				w.Header().Set("X-Call", fmt.Sprint(calls))
				if r.Method != http.MethodPost {
					w.Header().Set("X-Url", "https://api.example"+r.URL.String())
				}
			})
			a := g.ask(method, "/"+accountID+"/cgi-bin/x")
			wantCalls, wantBody, wantCall := 2, `{"errcode":0}`, ""
			switch method {
			case http.MethodHead:
				wantCalls, wantBody = 1, ""
			case http.MethodPost:
				wantCall = "2"
			}
			if a.shows() || a.interim != "" || a.err != nil || a.Status != http.StatusOK || calls != wantCalls || a.Body != wantBody || a.trailer.Get("X-Call") != wantCall {
				t.Errorf("%s, %s: %d calls, got %+v", proto, method, calls, a)
			}
		}
	}
}

// What an answer says of itself before its body is its head too: which trailers are to come, and what its status means.
func TestAPIHeadsThatRepeatTheToken(t *testing.T) {
	for _, proto := range []string{"HTTP/1.1", "HTTP/2.0"} {
		g, wechat := speaking(t, proto)
		for name, set := range map[string]func(h http.Header, token string){
			"the name of a trailer": func(h http.Header, token string) { h.Set("Trailer", "X-Sum, X-"+token) },
			"the name of a header":  func(h http.Header, token string) { h.Set("X-"+token+"-Of", "1") },
		} {
			wechat.answer(func(w http.ResponseWriter, r *http.Request) {
				set(w.Header(), r.URL.Query().Get("access_token"))
				io.WriteString(w, `{"errcode":0}`)
				_ = http.NewResponseController(w).Flush()
			})
			if a := g.ask(http.MethodGet, "/"+accountID+"/cgi-bin/x"); a.shows() || a.Status != http.StatusBadGateway {
				t.Errorf("%s, %s: got %+v", proto, name, a)
			}
		}
	}
	g, wechat := speaking(t, "HTTP/1.1")
	for name, head := range map[string]string{
		"the text of the status":    "HTTP/1.1 200 at %s\r\nContent-Length: 2\r\n\r\n{}",
		"a status of no answer":     "HTTP/1.1 099 Low\r\nContent-Length: 2\r\n\r\n{}",
		"a protocol nobody asked":   "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
		"101 that upgrades nothing": "HTTP/1.1 101 Switching Protocols\r\n\r\n",
	} {
		wechat.answer(func(w http.ResponseWriter, r *http.Request) {
			writeRaw(t, w, strings.Replace(head, "%s", r.URL.String(), 1))
		})
		if a := g.ask(http.MethodGet, "/"+accountID+"/cgi-bin/x"); a.Status != http.StatusBadGateway || a.code(t) != 502 {
			t.Errorf("%s: got %+v", name, a)
		}
	}
}

func TestIsAnswer(t *testing.T) {
	t.Parallel()
	for status, want := range map[int]bool{-1: false, 0: false, 99: false, 101: false, 199: false, 200: true, 599: true, 999: true, 1000: false} {
		if isAnswer(status) != want {
			t.Errorf("%d: want %v", status, want)
		}
	}
}

// Interim answers are nobody's: of WeChat's there are none, and whatever one says stays here. The answer after them is the caller's.
func TestAPIInterimAnswers(t *testing.T) {
	for _, proto := range []string{"HTTP/1.1", "HTTP/2.0"} {
		g, wechat := speaking(t, proto)
		wechat.answer(func(w http.ResponseWriter, r *http.Request) {
			for _, status := range []int{100, 102, 103, 103, 150, 199} {
				w.Header().Set("Link", "<https://api.example"+r.URL.String()+">; rel=preload")
				w.WriteHeader(status)
			}
			if r.ProtoMajor == 2 {
				w.WriteHeader(http.StatusSwitchingProtocols)
			}
			w.Header().Del("Link")
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusAccepted)
			io.WriteString(w, `{"errcode":0}`)
		})
		for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodHead} {
			a := g.ask(method, "/"+accountID+"/cgi-bin/x")
			if want := map[bool]string{true: "", false: `{"errcode":0}`}[method == http.MethodHead]; a.shows() || a.interim != "" ||
				a.err != nil || a.Status != http.StatusAccepted || a.Body != want {
				t.Errorf("%s, %s: got %+v", proto, method, a)
			}
		}
	}
}

// Of an answer that breaks off, net/http says why, and may quote what it could not read: Caddy logs that.
func TestAPIBrokenAnswersAreNotQuoted(t *testing.T) {
	logFile := filepath.Join(t.TempDir(), "caddy.log")
	wechat := newFakeWeChat(t)
	config := new(caddy.Config)
	if err := json.Unmarshal(fmt.Appendf(nil, `{"logging":{"logs":{"default":{"level":"DEBUG","writer":{"output":"file","filename":%q}}}}}`, logFile), config); err != nil {
		t.Fatal(err)
	}
	storage, _ := json.Marshal(map[string]string{"module": "file_system", "root": t.TempDir()})
	config.Admin, config.StorageRaw = &caddy.AdminConfig{Disabled: true}, storage
	config.AppsRaw = caddy.ModuleMap{"wechat": json.RawMessage(gatewayConfig(wechat.URL))}
	g := provisionGateway(t, config, "")
	chunked := func(contentType, body string) string {
		return fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n", contentType, len(body), body)
	}
	long := strings.Repeat("x", 2*peekSize)
	for name, head := range map[string]string{
		"media": chunked("image/jpeg", long), "text": chunked("text/plain", long), "JSON": chunked("application/json", "{}"), "head": "HTTP/1.1 200 OK\r\n",
	} {
		wechat.answer(func(w http.ResponseWriter, r *http.Request) {
			writeRaw(t, w, head+"asked for "+r.URL.String()+"\r\n\r\n")
		})
		if a := g.ask(http.MethodGet, "/"+accountID+"/cgi-bin/x"); a.shows() || a.err == nil && a.Status != http.StatusBadGateway {
			t.Errorf("%s: got %+v", name, a)
		}
	}
	logged, err := os.ReadFile(logFile)
	if err != nil || !bytes.Contains(logged, []byte("aborting with incomplete response")) {
		t.Fatalf("the proxy logged nothing of it: %v", err)
	}
	if i := bytes.Index(logged, []byte("REALTOKEN")); i >= 0 {
		t.Errorf("log shows the token: …%s", logged[max(0, i-300):min(len(logged), i+50)])
	}
}

// Whatever a Go says of it, and how: what it quotes is left out, and what an error says of itself stays.
func TestUnquoted(t *testing.T) {
	t.Parallel()
	line := textproto.ProtocolError("malformed MIME header line: REALTOKEN") // as some say it, without quotation marks
	for _, err := range []error{line, fmt.Errorf("net/http: HTTP/1.x transport connection broken: %w", line), fmt.Errorf("missing colon: %q", "REALTOKEN")} {
		if text := unquoted(err).Error() + safeReason(err); strings.Contains(text, "REALTOKEN") {
			t.Error(text)
		}
	}
	for _, err := range []error{io.ErrUnexpectedEOF, context.Canceled, context.DeadlineExceeded, errStalled, http2.StreamError{StreamID: 1}} {
		if got := unquoted(err); got != err { //nolint:errorlint // the same one
			t.Errorf("%v has become %v", err, got)
		}
	}
}

// A configuration that fails before the app is reached leaves a writer of Caddy's own behind, with which the one before goes on.
func TestLogStaysUnquotedAfterAConfigurationThatFails(t *testing.T) {
	loadEvents(t, filepath.Join(t.TempDir(), "storage"), 1)
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
	})
	provisioning.Lock()
	err := caddy.Load([]byte(`{"admin":{"disabled":true,"config":{"persist":false}},"storage":{"module":"missing"}}`), true)
	provisioning.Unlock()
	if err == nil {
		t.Fatal("it did not fail")
	}
	for deadline := time.Now().Add(20 * time.Second); !isUnquoted(log.Writer()); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("package log writes to a %T", log.Writer())
		}
	}
}

// stdLog has package log write to a buffer until the test ends, through what the app has put before its writer.
func stdLog(t *testing.T) *lockedBuffer {
	t.Helper()
	was, to := log.Writer(), new(lockedBuffer)
	if _, ok := was.(unquotedLog); !ok {
		t.Fatalf("package log writes to a %T", was)
	}
	log.SetOutput(unquotedLog{to})
	t.Cleanup(func() { log.SetOutput(was) })
	return to
}

// What comes behind an answer net/http says by itself, in the log of package log, and quotes it.
func TestAPINothingBehindAnswersIsQuoted(t *testing.T) {
	g, wechat := speaking(t, "HTTP/1.1")
	logged := stdLog(t)
	wechat.answer(func(w http.ResponseWriter, r *http.Request) {
		writeRaw(t, w, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}asked for "+r.URL.String())
	})
	if a := g.ask(http.MethodGet, "/"+accountID+"/cgi-bin/x"); a.shows() || a.Body != "{}" {
		t.Errorf("got %+v", a)
	}
	for deadline := time.Now().Add(10 * time.Second); logged.count("Unsolicited response received") == 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("net/http said nothing of it")
		}
	}
	if logged.count("REALTOKEN")+logged.count("asked for") > 0 {
		t.Error("log quotes it")
	}
	if log.Print("something else"); logged.count("something else\n") != 1 || logged.count("\n") != 2 {
		t.Error("log has lost a line, or the end of one")
	}
}

// They are bounded, too: an answer that never begins for all its announcements ends the call.
func TestAPIEndlessInterimAnswers(t *testing.T) {
	for _, proto := range []string{"HTTP/1.1", "HTTP/2.0"} {
		g, wechat := speaking(t, proto)
		wechat.answer(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Link", strings.Repeat("x", 32<<10))
			for r.Context().Err() == nil {
				w.WriteHeader(http.StatusEarlyHints)
			}
		})
		began := time.Now()
		a := g.ask(http.MethodGet, "/"+accountID+"/cgi-bin/x")
		if took := time.Since(began); a.Status != http.StatusBadGateway || a.interim != "" || took > responseTimeout/2 {
			t.Errorf("%s: got %+v after %v", proto, a, took)
		}
	}
}
