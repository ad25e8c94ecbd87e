package caddymodule

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
)

// Ten megabytes go up and come down as they are, with their lengths, and not through memory.
func TestAPIStreams(t *testing.T) {
	big := make([]byte, 10<<20)
	_, _ = rand.Read(big)
	big[0] = '{' // what begins like JSON is not waited for either
	sum := sha256.Sum256(big)
	wechat := newFakeWeChat(t)
	wechat.answer(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			got, _ := io.ReadAll(r.Body)
			fmt.Fprintf(w, `{"sum":"%x"}`, sha256.Sum256(got))
			return
		}
		w.Header().Set("Content-Type", "image/jpeg")
		w.Header().Set("Content-Disposition", `attachment; filename="a.jpg"`)
		if r.URL.Query().Get("chunked") == "" {
			w.Header().Set("Content-Length", strconv.Itoa(len(big)))
		}
		_, _ = w.Write(big)
	})
	g := newGateway(t, wechat, "", "")
	opaque := g.opaque(accountID, crmKey)
	wechat.seen()
	for name, body := range map[string]io.Reader{"length": bytes.NewReader(big), "chunked": io.MultiReader(bytes.NewReader(big))} {
		a := g.do(http.MethodPost, "/cgi-bin/media/upload?access_token="+opaque+"&type=image", body, "Content-Type: multipart/form-data; boundary=b")
		if want := fmt.Sprintf(`{"sum":"%x"}`, sum); a.Body != want {
			t.Errorf("%s, up: got %d %s, want %s", name, a.Status, a.Body, want)
		}
		got := wechat.one(t)
		if (got.Length == int64(len(big))) != (name == "length") || got.Header.Get("Content-Type") != "multipart/form-data; boundary=b" {
			t.Errorf("%s, up: WeChat got length %d, Content-Type %s", name, got.Length, got.Header.Get("Content-Type"))
		}
	}
	for name, query := range map[string]string{"length": "", "chunked": "&chunked=1"} {
		a := g.get("/cgi-bin/media/get?access_token=" + opaque + query)
		if sha256.Sum256([]byte(a.Body)) != sum || a.Header.Get("Content-Type") != "image/jpeg" || a.Header.Get("Content-Disposition") != `attachment; filename="a.jpg"` {
			t.Errorf("%s, down: %d bytes, %v", name, len(a.Body), a.Header)
		}
		if name == "length" && a.Length != int64(len(big)) {
			t.Errorf("%s, down: length %d", name, a.Length)
		}
	}
}

// The first bytes of an answer arrive before the last are sent, and those of a request too.
func TestAPIDoesNotWait(t *testing.T) {
	arrived, proceed := make(chan string, 1), make(chan struct{})
	wechat := newFakeWeChat(t)
	slow := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/cgi-bin/up":
			first := make([]byte, 5)
			_, _ = io.ReadFull(r.Body, first)
			arrived <- string(first)
			rest, _ := io.ReadAll(r.Body)
			fmt.Fprintf(w, `{"rest":%q}`, rest)
		case "/cgi-bin/down":
			io.WriteString(w, "first")
			_ = http.NewResponseController(w).Flush()
			<-proceed
			io.WriteString(w, "last")
		default:
			wechat.ServeHTTP(w, r)
		}
	}))
	defer slow.Close()
	g := newGateway(t, wechat, gatewayConfig(slow.URL), "")

	body, writer := io.Pipe()
	go func() {
		_, _ = io.WriteString(writer, "first")
		if got := <-arrived; got != "first" {
			t.Errorf("WeChat got %q", got)
		}
		_, _ = io.WriteString(writer, "last")
		_ = writer.Close()
	}()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, g.URL+"/"+accountID+"/cgi-bin/up", body)
	if err != nil {
		t.Fatal(err)
	}
	req.ContentLength = 9
	req.Header.Set("Authorization", "Bearer "+crmKey)
	if a := g.send(req); a.Body != `{"rest":"last"}` {
		t.Errorf("up: got %d %s", a.Status, a.Body)
	}

	req, err = http.NewRequestWithContext(t.Context(), http.MethodGet, g.URL+"/"+accountID+"/cgi-bin/down", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+crmKey)
	res, err := g.Client().Transport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	first := make([]byte, 5)
	if _, err := io.ReadFull(res.Body, first); err != nil || string(first) != "first" {
		t.Errorf("down: got %q, %v", first, err)
	}
	close(proceed)
	if rest, _ := io.ReadAll(res.Body); string(rest) != "last" {
		t.Errorf("down: the rest is %q", rest)
	}
}

func TestAPIExpectContinue(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.opaque(accountID, crmKey)
	wechat.seen()
	conn, err := net.Dial("tcp", g.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "POST /%s/cgi-bin/media/upload HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n", accountID, crmKey)
	r := bufio.NewReader(conn)
	if line, err := r.ReadString('\n'); err != nil || !strings.HasPrefix(line, "HTTP/1.1 100 ") {
		t.Fatalf("got %q, %v; want 100 Continue", line, err)
	}
	_, _ = r.ReadString('\n')
	io.WriteString(conn, "data")
	res, err := http.ReadResponse(r, nil)
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("got %v, %v", res, err)
	}
	res.Body.Close()
	if got := wechat.one(t); got.Body != "data" || got.Length != 4 || got.Header.Get("Expect") != "" {
		t.Errorf("WeChat got %+v", got)
	}
	// Who may not, is told before the body is asked for.
	fmt.Fprintf(conn, "POST /%s/cgi-bin/media/upload HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer x\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n", accountID)
	if res, err := http.ReadResponse(r, nil); err != nil || res.StatusCode != http.StatusUnauthorized {
		t.Errorf("got %v, %v; want 401 without 100 Continue", res, err)
	}
}

// WeChat does not even get the beginning of a body in chunks that breaks off before it grows too large to be kept.
func TestAPIChunksBreakOff(t *testing.T) {
	wechat := newFakeWeChat(t)
	var begun atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/cgi-bin/x" {
			begun.Add(1)
		}
		wechat.ServeHTTP(w, r)
	}))
	defer server.Close()
	g := newGateway(t, wechat, gatewayConfig(server.URL), "")
	g.opaque(accountID, crmKey)
	for name, chunks := range map[string]string{"no chunk": "x\r\n", "a size beyond counting": "FFFFFFFFFFFFFFFFF\r\n", "a chunk that does not end": "2\r\n{}XX0\r\n\r\n", "more than its size": "1\r\n{}\r\n0\r\n\r\n"} {
		status, body := g.raw(t, fmt.Sprintf("POST /%s/cgi-bin/x HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nTransfer-Encoding: chunked\r\n\r\n%s", accountID, crmKey, chunks))
		if status != http.StatusBadRequest || !strings.Contains(body, "broke off") {
			t.Errorf("%s: got %d %s", name, status, body)
		}
	}
	if n := begun.Load(); n != 0 {
		t.Errorf("WeChat was sent the beginning of %d calls", n)
	}
}

func TestAPICallerBreaksOff(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.opaque(accountID, crmKey)
	wechat.seen()
	conn, err := net.Dial("tcp", g.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "POST /%s/cgi-bin/x HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: 40\r\n\r\nhalf", accountID, crmKey)
	_ = conn.(*net.TCPConn).CloseWrite()
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err == nil {
		if res.StatusCode != http.StatusBadRequest && res.StatusCode != 499 {
			t.Errorf("got %d", res.StatusCode)
		}
		res.Body.Close()
	}
	conn.Close()
	if calls := wechat.seen(); len(calls) != 0 {
		t.Errorf("WeChat got %+v as a whole request", calls)
	}
}
