package caddymodule

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

func gzipped(text string) string {
	var b bytes.Buffer
	zw := gzip.NewWriter(&b)
	_, _ = io.WriteString(zw, text)
	_ = zw.Close()
	return b.String()
}

// inCoding answers in a content coding.
func inCoding(coding string, status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", coding)
		w.Header().Set("Content-Type", "application/json; encoding=utf-8")
		w.WriteHeader(status)
		io.WriteString(w, body)
	}
}

// A caller gets no coding that it has not asked for, as programs on the way put on, and none hides the token.
func TestAPICodings(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.opaque(accountID, crmKey)
	wechat.mu.Lock()
	token := wechat.current[accountID]
	wechat.mu.Unlock()
	const plain = `{"errcode":0,"errmsg":"ok"}`
	long := plain + strings.Repeat(" <a page> ", maxErrorPage)
	for _, c := range []struct {
		name   string
		answer http.HandlerFunc
		status int
		body   string // empty: an error of the gateway's own
		coding string
	}{
		{"gzip", inCoding("gzip", 200, gzipped(plain)), 200, plain, ""},
		{"gzip by its old name", inCoding("X-GZip", 200, gzipped(plain)), 200, plain, ""},
		{"gzip with a parameter", inCoding("gzip;q=1.0", 200, gzipped(plain)), 200, plain, ""},
		{"gzip that is long", inCoding("gzip", 200, gzipped(long)), 200, long, ""},
		{"nothing in gzip", inCoding("gzip", 200, ""), 200, "", ""},
		{"an error page in gzip", inCoding("gzip", 500, gzipped("<html>500</html>")), 500, "<html>500</html>", ""},
		{"gzip that repeats the token", inCoding("gzip", 200, gzipped(`{"url":"`+token+`"}`)), 502, "", ""},
		{"an error page in gzip that repeats the token", inCoding("gzip", 404, gzipped("no "+token)), 502, "", ""},
		{"half of it", inCoding("gzip", 200, gzipped(plain)[:25]), 502, "", ""},
		{"no gzip", inCoding("gzip", 200, plain), 502, "", ""},
		{"a part of a file in gzip", inCoding("gzip", 206, gzipped(token)), 502, "", ""},
		{"gzip twice", inCoding("gzip, gzip", 200, gzipped(gzipped(token))), 502, "", ""},
		{"gzip twice, with a parameter", inCoding("gzip; q=1, gzip", 200, gzipped(gzipped(token))), 502, "", ""},
		{"EXI", inCoding("exi", 200, "$EXI\x80"), 502, "", ""},
		{"brotli", inCoding("br", 200, "\x0b\x02\x80{}\x03"), 502, "", ""},
		{"xz", inCoding("xz", 200, "\xfd7zXZ\x00"), 502, "", ""},
		{"gzip in xz", inCoding("gzip, xz", 200, "\xfd7zXZ\x00"), 502, "", ""},
		{"a long name", inCoding(strings.Repeat("x", 99), 200, plain), 502, "", ""},
		{"odd bytes", inCoding("x\xff=1", 200, plain), 502, "", ""},
		{"many", inCoding(strings.Repeat("br,", 99), 200, plain), 502, "", ""},
		{"a part of a file in xz", inCoding("xz", 206, "\xfd7zXZ\x00"), 502, "", ""},
		{"what has not changed", inCoding("br", 304, ""), 304, "", "br"},
		{"what is gone", inCoding("xz", 204, ""), 204, "", "xz"},
		{"none", inCoding("identity", 200, plain), 200, plain, "identity"},
		{"none, in gzip", inCoding("identity, gzip", 200, gzipped(plain)), 200, plain, ""},
		{"empty", inCoding("", 200, plain), 200, plain, ""},
		{"empty words", inCoding(" , ,", 200, plain), 200, plain, ", ,"},
		{"none that repeats the token", inCoding("identity", 200, `{"url":"`+token+`"}`), 502, "", ""},
		{"a charset", inCoding("utf-8", 200, plain), 200, plain, "utf-8"},
		{"another charset", inCoding("GB2312", 200, plain), 200, plain, "GB2312"},
		{"a charset with its name", inCoding("charset=utf-8", 200, plain), 200, plain, "charset=utf-8"},
		{"a media type", inCoding("application/json; charset=utf-8", 200, plain), 200, plain, "application/json; charset=utf-8"},
	} {
		wechat.answer(c.answer)
		a := g.get("/"+accountID+"/cgi-bin/x", bearer(crmKey), "Accept-Encoding: gzip, br")
		wechat.seen()
		if a.Status != c.status || a.Body != c.body && c.status != 502 || a.Header.Get("Content-Encoding") != c.coding {
			t.Errorf("%s: got %d %.200q in %q", c.name, a.Status, a.Body, a.Header.Get("Content-Encoding"))
		}
		if c.status == 502 && a.code(t) != 502 {
			t.Errorf("%s: got %d %s", c.name, a.Status, a.Body)
		}
	}
	// Without a secret of the gateway's, what cannot be read is the caller's.
	wechat.answer(inCoding("br", 200, "\x0b\x02\x80{}\x03"))
	if a := g.get("/sns/userinfo?access_token=USER&openid=o"); a.Status != http.StatusOK || a.Header.Get("Content-Encoding") != "br" {
		t.Errorf("a user's own token: got %d %q", a.Status, a.Body)
	}
	g.noSecretsLogged(token)
}

// An answer in gzip that breaks off late breaks off here too, and is counted as WeChat's fault.
func TestAPIGzipBreaksOff(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.opaque(accountID, crmKey)
	page := gzipped(fmt.Sprint(bytes.Repeat([]byte{1, 2, 3}, 64<<10)))
	wechat.answer(inCoding("gzip", 200, page[:len(page)-8]))
	if a := g.ask(http.MethodGet, "/"+accountID+"/cgi-bin/x"); a.err == nil {
		t.Errorf("got %d, %d bytes", a.Status, len(a.Body))
	}
	if n := counted(t, g.app.metrics().apiRequests, "crm", outcomeUnreachable); n != 1 {
		t.Errorf("%v calls are counted as unreachable, want 1", n)
	}
}

// What is unpacked is looked at to its end.
func TestAPIGzipRepeatsTheTokenLate(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.opaque(accountID, crmKey)
	wechat.mu.Lock()
	token := wechat.current[accountID]
	wechat.mu.Unlock()
	wechat.answer(inCoding("gzip", 200, gzipped(strings.Repeat(" <a page> ", maxErrorPage)+token)))
	if a := g.ask(http.MethodGet, "/"+accountID+"/cgi-bin/x"); a.err == nil || strings.Contains(a.Body, token) {
		t.Errorf("got %d, %d bytes, %v", a.Status, len(a.Body), a.err)
	}
	g.noSecretsLogged(token)
}

// An answer in gzip is read to its end, behind which the connection takes the next call, a repeated one too.
func TestAPIGzipKeepsTheConnection(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.opaque(accountID, crmKey)
	var mu sync.Mutex
	seen := make(map[string]int)
	wechat.answer(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		seen[r.RemoteAddr]++
		mu.Unlock()
		text := `{"errcode":0,"errmsg":"ok"}`
		if strings.HasSuffix(r.URL.Query().Get("access_token"), "-1") {
			text = `{"errcode":40001,"errmsg":"invalid credential"}`
		}
		inCoding("gzip", 200, gzipped(text))(w, r)
	})
	for range 5 {
		if a := g.get("/"+accountID+"/cgi-bin/x", bearer(crmKey)); a.Body != `{"errcode":0,"errmsg":"ok"}` {
			t.Errorf("got %d %q", a.Status, a.Body)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if len(seen) != 1 {
		t.Errorf("calls came by these connections: %v", seen)
	}
}

// A refusal of the token is one behind a byte order mark and in gzip too: SDKs that see it ask for tokens in vain.
func TestAPIHealsRefusalsInDisguise(t *testing.T) {
	const refusal = `{"errcode":40001,"errmsg":"invalid credential rid: 64f1e2d3-0a1b2c3d-4e5f6071"}`
	for name, disguise := range map[string]http.HandlerFunc{
		"a byte order mark":   inCoding("", 200, "\ufeff"+refusal),
		"marks and spaces":    inCoding("", 200, " \ufeff\r\n\ufeff "+refusal),
		"gzip":                inCoding("gzip", 200, gzipped(refusal)),
		"gzip and a mark":     inCoding("gzip", 200, gzipped("\ufeff"+refusal)),
		"digits in quotes":    inCoding("", 200, strings.Replace(refusal, "40001", `"40001"`, 1)),
		"a fraction":          inCoding("", 200, strings.Replace(refusal, "40001", "40001.0", 1)),
		"behind what is long": inCoding("", 200, strings.Replace(refusal, "{", `{"pad":"`+strings.Repeat("x", 3000)+`",`, 1)),
	} {
		wechat := newFakeWeChat(t)
		g := newGateway(t, wechat, "", "")
		opaque := g.opaque(accountID, crmKey)
		wechat.answer(func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Query().Get("access_token"), "-1") {
				disguise(w, r)
				return
			}
			io.WriteString(w, `{"errcode":0,"errmsg":"ok"}`)
		})
		if a := g.post("/cgi-bin/x?access_token="+opaque, "{}"); a.Body != `{"errcode":0,"errmsg":"ok"}` {
			t.Errorf("%s: got %d %q", name, a.Status, a.Body)
		}
		if n := len(wechat.seen()); n != 2 {
			t.Errorf("%s: WeChat was called %d times", name, n)
		}
	}
}

func TestJSONStart(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]byte{
		"": 0, " \t\r\n": 0, "\xef": 0, "\xef\xbb": 0, "\ufeff": 0, "\ufeff ": 0, "{": '{', " {": '{', "\ufeff{": '{', " \ufeff\n\ufeff{": '{',
		"x{": 'x', "\xef{": 0xef, "\xef\xbbx": 0xef, "\xff\xd8{": 0xff,
	} {
		if got, known := jsonStart([]byte(text)); got != want || known != (want != 0) {
			t.Errorf("%q: %q, %v", text, got, known)
		}
	}
}

// What says that it is gzip and is not is named as such, to the caller and in the log, without a byte of it.
func TestAPIGzipThatIsNone(t *testing.T) {
	const refusal = `{"errcode":40001,"errmsg":"invalid credential"}`
	damaged := []byte(gzipped(strings.Repeat(refusal, 9)))
	damaged[len(damaged)-6] ^= 1
	for came, body := range map[string]string{
		"and is JSON":               refusal,
		"and is none":               "x",
		"and is a web page or XML":  "\ufeff <html>" + refusal,
		"and is zstd":               "\x28\xb5\x2f\xfd" + refusal,
		"and is deflate":            "\x78\x9c" + refusal,
		"its gzip is damaged":       string(damaged),
		"its answer broke off":      gzipped(refusal)[:5],
		"is none: is there a proxy": strings.Repeat("\x00", 2*peekSize),
	} {
		wechat := newFakeWeChat(t)
		g := newGateway(t, wechat, "", "")
		g.opaque(accountID, crmKey)
		wechat.answer(inCoding("gzip", 200, body))
		core, logs := observer.New(zapcore.WarnLevel)
		g.transport().logger = zap.New(core)
		a := g.get("/"+accountID+"/cgi-bin/x", bearer(crmKey))
		if a.Status != 502 || !strings.Contains(a.Body, came) || strings.Contains(a.Body, "40001") {
			t.Errorf("%s: got %d %s", came, a.Status, a.Body)
		}
		found := logs.FilterMessage("answer from WeChat's host is not its API's").All()
		if len(found) != 1 || !strings.Contains(fmt.Sprint(found[0].ContextMap()["reason"]), came) {
			t.Errorf("%s: logged %v", came, found)
		}
	}
}
