package integration_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// TestHTTP3Bodies has bodies at, above and far above each limit come over HTTP/3 as over HTTP/2: whole, without a length, ended
// before their Content-Length, of which quic-go tells nobody, and given up half-way. A body that is not all there is nowhere taken
// for one that is, and nobody else is blamed for it.
func TestHTTP3Bodies(t *testing.T) {
	t.Parallel()
	s := newSDKWorldOf(t, nil)
	authorize(t, s.World)
	h2, err := s.Client()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h2.CloseIdleConnections)
	clients := map[int]*http.Client{2: h2, 3: {Transport: http3Transport(t, s.World)}}
	message, err := s.WeChat.PushMessage(t.Context(), wxsim.Message{Platform: integration.PlatformID, AppID: integration.AuthorizerID, Content: "quick"})
	if err != nil || !message.OK() {
		t.Fatal(message.Wrong, err)
	}
	ticket, err := s.WeChat.PushTicket(t.Context(), integration.PlatformID)
	if err != nil || !ticket.OK() {
		t.Fatal(ticket.Wrong, err)
	}
	address := func(r wxsim.PushResult) string {
		to, err := url.Parse(r.Attempts[0].URL)
		if err != nil {
			t.Fatal(err)
		}
		return s.URL(to.RequestURI())
	}
	padded := func(text string, size int) string { return text + strings.Repeat(" ", size-len(text)) }
	push, event := string(message.Attempts[0].Sent), string(ticket.Attempts[0].Sent)
	api := "https://api.weixin.qq.com:" + integration.Port(s.HTTPS)
	stable, user, upload := api+"/cgi-bin/stable_token", api+"/sns/userinfo?access_token=made-up&openid=o", api+"/"+integration.AuthorizerID+"/cgi-bin/media/upload?type=image"
	grant := `{"grant_type":"client_credential","appid":"` + integration.AuthorizerID + `","secret":"` + s.ClientKey + `"}`
	media := func(size int) string {
		const head, tail = "--b\r\nContent-Disposition: form-data; name=\"media\"; filename=\"a.jpg\"\r\nContent-Type: image/jpeg\r\n\r\n", "\r\n--b--\r\n"
		return head + strings.Repeat("x", size-len(head)-len(tail)) + tail
	}
	const (
		broken  = "400 body could not be read"
		large   = "413 body is larger than max_body"
		noGrant = `200 {"errcode":413,"errmsg":"the request for a token is larger than 65536 bytes, or broke off"}`
		noBody  = `200 {"errcode":413,"errmsg":"the request's body is larger than 65536 bytes: /sns/userinfo takes none"}`
		offCall = `{"errcode":400,"errmsg":"the request's body broke off"}`
		mib     = 1 << 20
	)
	for _, c := range []struct {
		name, to, body string
		whole          string // what it is answered with, or the beginning of that
		unmeasured     string // the same without a length; "": as whole
		early          string // and of one that ends early
	}{
		{"push", address(message), push, "200 <xml>", "", broken},
		{"push at the limit", address(message), padded(push, mib), "200 <xml>", "", broken},
		{"push above it", address(message), padded(push, mib+1), large, "", large},
		{"push far above it", address(message), padded(push, 8*mib), large, "", large},
		{"event", address(ticket), event, "200 success", "", broken},
		{"event at the limit", address(ticket), padded(event, mib), "200 success", "", broken},
		{"event far above it", address(ticket), padded(event, 8*mib), large, "", large},
		{"token", stable, grant, `200 {"access_token":`, "", noGrant},
		{"token at the limit", stable, padded(grant, 64<<10), `200 {"access_token":`, "", noGrant},
		{"token above it", stable, padded(grant, 64<<10+1), noGrant, "", noGrant},
		{"token far above it", stable, padded(grant, 8*mib), noGrant, "", noGrant},
		{"user's token at the limit", user, padded("", 64<<10), `200 {"errcode":43001,`, "", "200 " + offCall},
		{"user's token above it", user, padded("", 64<<10+1), noBody, "", noBody},
		{"call", upload, media(1000), `200 {"created_at":`, "", "400 " + offCall},
		{"call at what is kept", upload, media(mib), `200 {"created_at":`, "", "400 " + offCall},
		// WeChat takes no file without a length, and only what is kept can be measured.
		{"call above it", upload, media(mib + 1), `200 {"created_at":`, `200 {"errcode":41005,`, "400 " + offCall},
		{"call far above it", upload, media(4 * mib), `200 {"created_at":`, `200 {"errcode":41005,`, "400 " + offCall},
	} {
		for _, how := range []string{"whole", "without a length", "ended early", "given up", "given up, without a length"} {
			for major, client := range clients {
				t.Run(fmt.Sprintf("%s, %s, over HTTP/%d", c.name, how, major), func(t *testing.T) {
					s.WeChat.Journal().Reset()
					body, length, want := io.Reader(strings.NewReader(c.body)), int64(len(c.body)), c.whole
					if strings.Contains(how, "without") {
						length = -1
						if c.unmeasured != "" {
							want = c.unmeasured
						}
					}
					switch half := io.LimitReader(body, length/2); {
					case how == "ended early":
						body, want = half, c.early
					case strings.HasPrefix(how, "given up"):
						body = io.MultiReader(io.LimitReader(body, int64(len(c.body)/2)), iotest.ErrReader(errors.New("given up")))
					}
					ctx, cancel := context.WithTimeout(t.Context(), 25*time.Second)
					defer cancel()
					req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.to, io.NopCloser(body))
					if err != nil {
						t.Fatal(err)
					}
					if c.to == upload {
						req.Header = bearer(s.World)
						req.Header.Set("Content-Type", "multipart/form-data; boundary=b")
					}
					req.ContentLength = length
					status, answer, err := exchange(client, req)
					got := fmt.Sprintf("%d %s", status, answer)
					switch {
					case errors.Is(err, context.DeadlineExceeded):
						t.Error("there was no answer")
					case strings.HasPrefix(how, "given up"): // who has gone need not get one
						if err == nil && strings.HasPrefix(got, c.whole) && !strings.Contains(c.whole, "413") {
							t.Errorf("taken for whole: %s", got)
						}
					case err != nil || !strings.HasPrefix(got, want):
						t.Errorf("got %s %v, want %s", got, err, want)
					}
					for _, e := range s.WeChat.Journal().Entries() {
						if e.Direction == wxsim.In && e.Status == http.StatusOK && (int(e.BodySize) != len(c.body) || want == c.early) {
							t.Errorf("WeChat got %d bytes of %d for whole", e.BodySize, len(c.body))
						}
					}
				})
			}
		}
	}
	if got := s.Backend.Received(); len(got) != 1 {
		t.Errorf("the backend got the message %d times", len(got))
	}
}

// exchange returns the status and text of an answer, or the error in the place of either.
func exchange(client *http.Client, req *http.Request) (int, string, error) {
	resp, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(text), err
}
