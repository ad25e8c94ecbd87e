package caddymodule

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

func TestPeek(t *testing.T) {
	t.Parallel()
	long := `{"a":"` + strings.Repeat("x", 3*peekSize) + `"}`
	for name, c := range map[string]struct {
		body  string
		whole bool
	}{
		"small JSON": {`{"errcode":0}`, true}, "spaces first": {"\n  {}", true}, "empty": {"", true}, "long JSON": {long, false},
		"one less than the limit": {long[:peekSize-1], true}, "the limit": {long[:peekSize], false}, "binary": {"\xff\xd8\xff" + long, false},
	} {
		for how, reader := range map[string]func(io.Reader) io.Reader{
			"at once": func(r io.Reader) io.Reader { return r }, "byte by byte": iotest.OneByteReader, "with its end": iotest.DataErrReader,
		} {
			p := new(peekedBody)
			whole := p.peek(io.NopCloser(reader(strings.NewReader(c.body))), peekSize, time.Minute, false)
			got, err := io.ReadAll(p)
			if whole != c.whole || err != nil || string(got) != c.body {
				t.Errorf("%s, %s: whole %v, %d bytes, %v; want %v, %d bytes", name, how, whole, len(got), err, c.whole, len(c.body))
			}
		}
	}
	p := new(peekedBody)
	whole := p.peek(io.NopCloser(io.MultiReader(strings.NewReader(`{"a`), iotest.ErrReader(io.ErrUnexpectedEOF))), peekSize, time.Minute, false)
	got, err := io.ReadAll(p)
	if whole || !errors.Is(err, io.ErrUnexpectedEOF) || string(got) != `{"a` {
		t.Errorf("broken: whole %v, %q, %v", whole, got, err)
	}
}

// A Read more costs a call more than the Read that was needed.
func TestPeekedBodyEndsWithItsLastBytes(t *testing.T) {
	t.Parallel()
	for _, reader := range []io.Reader{strings.NewReader(`{"errcode":0}`), iotest.DataErrReader(strings.NewReader(`{"errcode":0}`))} {
		p := new(peekedBody)
		p.peek(io.NopCloser(reader), peekSize, time.Minute, false)
		buf := make([]byte, 8)
		if n, err := p.Read(buf); n != 8 || err != nil {
			t.Errorf("first %d bytes, %v; want 8 and more to come", n, err)
		}
		if n, err := p.Read(buf); n != 5 || err != io.EOF {
			t.Errorf("then %d bytes, %v; want the last 5 and the end", n, err)
		}
	}
}

// lastMoment is a body whose first byte comes at the moment that it counts as silent, and its end at once after that.
type lastMoment struct {
	limit time.Duration

	begun, closed atomic.Bool
}

func (b *lastMoment) Read(p []byte) (int, error) {
	if b.begun.Swap(true) {
		return 0, io.EOF
	}
	time.Sleep(b.limit)
	p[0] = 'x'
	return 1, nil
}

func (b *lastMoment) Close() error { b.closed.Store(true); return nil }

// A timer that has fired is never another body's.
func TestStallTimerThatFired(t *testing.T) {
	t.Parallel()
	for range 1000 {
		synctest.Test(t, func(t *testing.T) {
			var timers stallTimers
			read := func(b *lastMoment) {
				_, _ = io.ReadAll(&liveBody{body: b, call: new(apiCall), caller: t.Context(), limit: time.Second, timers: &timers})
			}
			read(&lastMoment{limit: time.Second})
			next := &lastMoment{limit: time.Millisecond}
			read(next)
			synctest.Wait()
			if next.closed.Load() {
				t.Error("a body was closed by the timer of the one before")
			}
		})
	}
}

// The buffer of an answer that was read is another's.
func TestPeekedBodyGivesItsBufferAway(t *testing.T) {
	t.Parallel()
	for range 100 {
		first, second := new(peekedBody), new(peekedBody)
		first.peek(io.NopCloser(iotest.DataErrReader(strings.NewReader(`{"errcode":0}`))), peekSize, time.Minute, false)
		half := make([]byte, 8)
		if n, err := first.Read(half); n != len(half) || err != nil || first.first == nil {
			t.Fatalf("%d bytes, %v, buffer %v", n, err, first.first != nil)
		}
		second.peek(io.NopCloser(strings.NewReader(`{"another":1}`)), peekSize, time.Minute, false)
		if rest, err := io.ReadAll(first); string(half)+string(rest) != `{"errcode":0}` || err != nil || first.first != nil || first.head != nil {
			t.Fatalf("got %q, %v", string(half)+string(rest), err)
		}
		third := new(peekedBody)
		third.peek(io.NopCloser(strings.NewReader(`{"third":1}`)), peekSize, time.Minute, false)
		for p, want := range map[*peekedBody]string{first: "", second: `{"another":1}`, third: `{"third":1}`} {
			if got, err := io.ReadAll(p); string(got) != want || err != nil {
				t.Errorf("got %q, %v, want %q", got, err, want)
			}
		}
	}
}

func TestAPIAnswersThatAreNone(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.opaque(accountID, crmKey)
	for _, c := range []struct {
		name   string
		answer http.HandlerFunc
		status int
		body   string // empty: an error of the gateway's own
	}{
		{"web page", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
			fmt.Fprintf(w, "<html>log in to reach %s</html>", r.URL)
		}, 502, ""},
		{"web page that is long", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			w.Header().Set("Content-Length", "10000")
			io.WriteString(w, "<html>"+r.URL.String()+strings.Repeat(" ", 10000-6-len(r.URL.String())))
		}, 502, ""},
		{"JSON called a web page", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			io.WriteString(w, ` {"ok":1}`)
		}, 200, ` {"ok":1}`},
		{"half an answer", func(w http.ResponseWriter, r *http.Request) {
			writeRaw(t, w, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{\"errcode\":")
		}, 502, ""},
		{"half a chunked answer", func(w http.ResponseWriter, r *http.Request) {
			writeRaw(t, w, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"err")
		}, 502, ""},
		{"no answer", func(w http.ResponseWriter, r *http.Request) { writeRaw(t, w, "") }, 502, ""},
		{"not HTTP", func(w http.ResponseWriter, r *http.Request) { writeRaw(t, w, "SSH-2.0-x REALTOKEN\r\n") }, 502, ""},
		{"redirect that repeats the token", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://login.example"+r.URL.String(), http.StatusFound)
		}, 502, ""},
		{"answer with a header that repeats the token", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Add("X-Asked", "a")
			w.Header().Add("X-Asked", "https://api.example"+r.URL.String())
			io.WriteString(w, `{"errcode":0}`)
		}, 502, ""},
		{"media with a header that repeats the token", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "image/jpeg")
			w.Header().Set("Content-Disposition", `attachment; filename="`+r.URL.Query().Get("access_token")+`"`)
			io.WriteString(w, strings.Repeat("x", 2*peekSize))
		}, 502, ""},
		{"answer with a header that is as long and is another", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Asked", strings.Repeat("x", len(r.URL.String())))
			io.WriteString(w, `{"errcode":0}`)
		}, 200, `{"errcode":0}`},
		{"error page that repeats the token", func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusRequestURITooLong)
			io.WriteString(w, "too long: "+r.URL.String())
		}, 502, ""},
		{"error page that repeats the token late", func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusBadGateway)
			io.WriteString(w, "<html>"+strings.Repeat(" ", maxErrorPage-1000)+r.URL.String())
		}, 502, ""},
		{"error page that repeats the token in two parts", func(w http.ResponseWriter, r *http.Request) {
			half := strings.Index(r.URL.String(), "REALTOKEN") + len("REALTOKEN")
			w.WriteHeader(http.StatusNotFound)
			io.WriteString(w, "no such page: "+r.URL.String()[:half])
			_ = http.NewResponseController(w).Flush()
			io.WriteString(w, r.URL.String()[half:])
		}, 502, ""},
		{"JSON error that repeats the token late", func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusInternalServerError)
			io.WriteString(w, `{"pad":"`+strings.Repeat("x", 2*peekSize)+`","url":"`+r.URL.String()+`"}`)
		}, 502, ""},
		{"error page that is as long as may be", func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusNotFound)
			io.WriteString(w, strings.Repeat("x", maxErrorPage))
		}, 404, strings.Repeat("x", maxErrorPage)},
		{"error page that is longer", func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusNotFound)
			io.WriteString(w, strings.Repeat("x", maxErrorPage+1))
		}, 502, ""},
		{"text that repeats the token", func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, "you asked for "+r.URL.String())
		}, 502, ""},
		{"part of a long file", func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusPartialContent)
			io.WriteString(w, strings.Repeat("x", 2*maxErrorPage))
		}, 206, strings.Repeat("x", 2*maxErrorPage)},
		{"JSON that repeats the token", func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, `{"errcode":40097,"errmsg":"bad url %s"}`, r.URL)
		}, 502, ""},
		{"its own 502", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			w.WriteHeader(http.StatusBadGateway)
			io.WriteString(w, "<html>502 Bad Gateway</html>")
		}, 502, "<html>502 Bad Gateway</html>"},
		{"a refusal with another status is none", func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusForbidden)
			io.WriteString(w, `{"errcode":40001}`)
		}, 403, `{"errcode":40001}`},
		{"busy", func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, `{"errcode":-1,"errmsg":"system error"}`)
		},
			200, `{"errcode":-1,"errmsg":"system error"}`},
		{"errcode of something within", func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, `{"list":[{"errcode":40001}],"a":"\"errcode\":40001"}`)
		}, 200, `{"list":[{"errcode":40001}],"a":"\"errcode\":40001"}`},
		{"a refusal too long to be one", func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, `{"errcode":40001,"pad":"`+strings.Repeat("x", peekSize)+`"}`)
		}, 200, `{"errcode":40001,"pad":"` + strings.Repeat("x", peekSize) + `"}`},
		{"nothing", func(w http.ResponseWriter, r *http.Request) {}, 200, ""},
	} {
		wechat.answer(c.answer)
		wechat.seen()
		a := g.post("/"+accountID+"/cgi-bin/x", "{}", bearer(crmKey))
		if n := len(wechat.seen()); n != 1 {
			t.Errorf("%s: WeChat was called %d times", c.name, n)
		}
		if a.Status != c.status || a.Body != c.body && c.body != "" {
			t.Errorf("%s: got %d %q", c.name, a.Status, a.Body)
			continue
		}
		if c.body == "" && c.status != http.StatusOK && a.code(t) != 502 {
			t.Errorf("%s: got %d %q", c.name, a.Status, a.Body)
		}
		if strings.Contains(fmt.Sprint(a.Header), "REALTOKEN") {
			t.Errorf("%s: the headers show the token: %v", c.name, a.Header)
		}
	}
	if n := wechat.tokensIssued(accountID); n != 1 {
		t.Errorf("WeChat issued %d tokens", n)
	}
}

// The account's secret is looked for in headers as the token is, and an absent token is in none.
func TestEchoes(t *testing.T) {
	t.Parallel()
	call := &apiCall{extra: []queryParam{{"appid", secret.New("wx1")}, {paramSecret, secret.New("SECRET")}}}
	for _, c := range []struct {
		call  *apiCall
		token string
		value string
		want  bool
	}{
		{call, "", "a SECRET", true}, {call, "TOKEN", "a TOKEN", true}, {call, "TOKEN", "wx1 TOKE SECRE", false},
		{new(apiCall), "", "a SECRET", false}, {new(apiCall), "", "", false}, {new(apiCall), "TOKEN", "TOKEN", true},
	} {
		if got := echoes(http.Header{"X-A": {"b"}, "X-B": {"", c.value}}, c.call, secret.New(c.token)); got != c.want {
			t.Errorf("%q, %v: got %v", c.value, c.call.extra, got)
		}
	}
}

// The same holds for calls that carry no secret of the gateway's.
func TestAPIAnswersThatAreNoneWithoutSecret(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	for name, answer := range map[string]http.HandlerFunc{
		"web page": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			io.WriteString(w, "<html>log in</html>")
		},
		"half an answer": func(w http.ResponseWriter, r *http.Request) {
			if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
				io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{\"openid\":")
				conn.Close()
			}
		},
		"half of something else": func(w http.ResponseWriter, r *http.Request) {
			if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
				io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 100\r\n\r\n")
				conn.Close()
			}
		},
	} {
		wechat.answer(answer)
		for _, target := range []string{"/sns/userinfo?access_token=USER&openid=o1", "/sns/anything/else"} {
			if a := g.get(target, bearer(crmKey)); a.Status != http.StatusBadGateway || a.code(t) != 502 {
				t.Errorf("%s, %s: got %d %s", name, target, a.Status, a.Body)
			}
		}
	}
	// Its error pages are not waited for.
	long := strings.Repeat("x", 2*maxErrorPage)
	wechat.answer(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusNotFound)
		io.WriteString(w, long)
	})
	if a := g.get("/sns/userinfo?access_token=USER&openid=o1"); a.Status != http.StatusNotFound || a.Body != long {
		t.Errorf("a long error page: got %d and %d bytes", a.Status, len(a.Body))
	}
	// What such a call's errcode says is between the user and WeChat.
	wechat.answer(lastingRefusal)
	if a := g.get("/sns/userinfo?access_token=USER&openid=o1"); a.Status != http.StatusOK || a.code(t) != 40001 || len(wechat.seen()) == 0 {
		t.Errorf("a user's token that is refused: got %d %s", a.Status, a.Body)
	}
	if n := counted(t, g.app.metrics().apiErrors, "40001"); n != 0 {
		t.Errorf("%v errors are counted", n)
	}
}

// TestAPITimeouts: how long WeChat may take is configured, for the beginning of an answer and for what follows.
func TestAPITimeouts(t *testing.T) {
	for _, tt := range []struct {
		name, api string
		begin     bool
	}{
		{"no answer", `{"response_header_timeout":"100ms"}`, false},
		{"half an answer", `{"stall_timeout":"100ms"}`, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			release := make(chan struct{})
			wechat := newFakeWeChat(t)
			defer close(release)
			g := newGateway(t, wechat, "", tt.api)
			wechat.answer(func(w http.ResponseWriter, _ *http.Request) {
				if tt.begin {
					_, _ = io.WriteString(w, `{"errcode":`)
					_ = http.NewResponseController(w).Flush()
				}
				<-release
			})
			began := time.Now()
			if a := g.get("/"+accountID+"/cgi-bin/x", bearer(crmKey)); a.Status != http.StatusGatewayTimeout || a.code(t) != 504 {
				t.Errorf("got %d %s", a.Status, a.Body)
			}
			if took := time.Since(began); took < 100*time.Millisecond || took > responseTimeout/2 {
				t.Errorf("it took %v", took)
			}
		})
	}
}

// WeChat sends headers, or the beginning of an answer, and then nothing more.
func TestAPIStalls(t *testing.T) {
	release := make(chan struct{})
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	opaque := g.opaque(accountID, crmKey)
	g.transport().stall = 50 * time.Millisecond
	stallAfter := func(contentType, start string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", contentType)
			io.WriteString(w, start)
			_ = http.NewResponseController(w).Flush()
			<-release
		}
	}
	defer close(release)
	for name, start := range map[string]string{"headers": "", "half an answer": `{"errcode":`} {
		wechat.answer(stallAfter("application/json", start))
		for _, a := range []answer{
			g.get("/"+accountID+"/cgi-bin/x", bearer(crmKey)), g.get("/cgi-bin/x?access_token=" + opaque), g.get("/sns/userinfo?access_token=USER"),
		} {
			if a.Status != http.StatusGatewayTimeout || a.code(t) != 504 {
				t.Errorf("%s: got %d %s", name, a.Status, a.Body)
			}
		}
	}
	if n := counted(t, g.app.metrics().apiRequests, "crm", outcomeUnreachable); n != 4 {
		t.Errorf("%v calls are counted as unreachable, want 4", n)
	}
	// What has begun to stream can only be cut off.
	g.transport().stall = time.Second // in which the first bytes come, on a busy machine too
	wechat.answer(stallAfter("image/jpeg", "first bytes"))
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, g.URL+"/"+accountID+"/cgi-bin/media/get", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+crmKey)
	res, err := g.Client().Transport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if got, err := io.ReadAll(res.Body); err == nil || string(got) != "first bytes" {
		t.Errorf("streaming: got %q, %v", got, err)
	}
	if n := waitCounted(t, g, "crm", outcomeUnreachable, 5); n != 5 {
		t.Errorf("%v calls are counted as unreachable, want 5", n)
	}
	g.transport().stall = 50 * time.Millisecond
	// An error page, and an object that may be an error, are waited for as a whole, and no longer however little of them comes.
	for status, start := range map[int]string{http.StatusBadGateway: "x", http.StatusOK: `{"x":"`} {
		g.transport().answer = 50 * time.Millisecond
		wechat.answer(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			for next := start; ; next = "x" {
				if _, err := io.WriteString(w, next); err != nil || http.NewResponseController(w).Flush() != nil {
					return
				}
				select {
				case <-time.After(10 * time.Millisecond):
				case <-release:
					return
				}
			}
		})
		if a := g.get("/"+accountID+"/cgi-bin/x", bearer(crmKey)); a.Status != http.StatusGatewayTimeout || a.code(t) != 504 {
			t.Errorf("an endless answer with %d: got %d %s", status, a.Status, a.Body)
		}
	}
}

// slowBody sends a part after each pause, and then nothing until it is cut off.
type slowBody struct {
	closed chan struct{}
	parts  int
	pause  time.Duration
}

func (b *slowBody) Read(p []byte) (int, error) {
	if b.parts == 0 {
		<-b.closed
		return 0, errors.New("read on a closed body")
	}
	b.parts--
	time.Sleep(b.pause) // in a synctest bubble
	return copy(p, "part "), nil
}

func (b *slowBody) Close() error {
	select {
	case <-b.closed:
	default:
		close(b.closed)
	}
	return nil
}

// An answer that is slow, but never silent for too long, takes as long as it takes.
func TestLiveBody(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		call := &apiCall{outcome: outcomeOK}
		b := &liveBody{
			body: &slowBody{closed: make(chan struct{}), parts: 10, pause: stallTimeout - time.Second}, call: call, caller: t.Context(), limit: stallTimeout,
			timers: new(stallTimers),
		}
		start := time.Now()
		got, err := io.ReadAll(b)
		if string(got) != strings.Repeat("part ", 10) || !errors.Is(err, errStalled) || !isTimeout(err) || call.outcome != outcomeUnreachable {
			t.Errorf("got %q, %v, counted as %s", got, err, call.outcome)
		}
		if took := time.Since(start); took != 10*(stallTimeout-time.Second)+stallTimeout {
			t.Errorf("it was cut off after %v", took)
		}
		b.Close()
	})
}
