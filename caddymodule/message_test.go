package caddymodule

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha1" //nolint:gosec // WeChat's protocol
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap/zapcore"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

func newMessage(t *testing.T, configure func(*Message)) (*Message, *App) {
	t.Helper()
	app, ctx := newTestApp(t, testConfig(""))
	m := new(Message)
	if configure != nil {
		configure(m)
	}
	if err := m.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	if err := m.Validate(); err != nil {
		t.Fatal(err)
	}
	return m, app
}

// answering is a backend that answers every push with the same text and keeps what it got.
type answering struct {
	status int
	text   string
	err    error
	got    *http.Request
	body   string
}

func (b *answering) ServeHTTP(w http.ResponseWriter, r *http.Request) error {
	body, _ := io.ReadAll(r.Body)
	got := *r // r is the outer request again once the handler returns
	b.got, b.body = &got, string(body)
	if b.err != nil {
		return b.err
	}
	w.Header().Set("Content-Type", "text/html") // what old servlets call their XML
	w.Header().Set("Set-Cookie", "session=1")
	if b.status != 0 {
		w.WriteHeader(b.status)
	}
	_, _ = io.WriteString(w, b.text)
	return nil
}

const replyXML = "<xml><ToUserName><![CDATA[oUser123]]></ToUserName><Content>你好</Content></xml>"

// The doctor's own push, rightly signed, is answered without a backend, whatever else the gateway knows of the account.
func TestDoctorsPushReachesNoBackend(t *testing.T) {
	t.Parallel()
	_, ctx := newTestApp(t, testConfig(""))
	m, e := &Message{}, &Event{Forward: true}
	for _, h := range []caddy.Provisioner{m, e} {
		if err := h.Provision(ctx); err != nil {
			t.Fatal(err)
		}
	}
	backend := caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
		t.Error("it reached a backend")
		return nil
	})
	s := platformSender(t)
	event := "<xml><ToUserName>gh_x</ToUserName><FromUserName>doctor</FromUserName><CreateTime>" + createTime + "</CreateTime><MsgType>event</MsgType><Event>" + doctorEvent + "</Event></xml>"
	if rec := serve(t, m, s.push("/wx/message/"+authorizerID, event), backend); rec.Code != http.StatusOK || rec.Body.String() != "success" {
		t.Errorf("message: %d %s", rec.Code, rec.Body)
	}
	info := "<xml><AppId>" + platformID + "</AppId><CreateTime>" + createTime + "</CreateTime><InfoType>" + doctorEvent + "</InfoType></xml>"
	if rec := serve(t, e, s.push("/wx/event", info), backend); rec.Code != http.StatusOK || rec.Body.String() != "success" {
		t.Errorf("event: %d %s", rec.Code, rec.Body)
	}
}

func TestMessageReachesBackendAsPlaintext(t *testing.T) {
	t.Parallel()
	m, app := newMessage(t, nil)
	s := platformSender(t)
	message := textMessage("你好 & welcome")
	r := s.push("/wx/message/"+authorizerID, message)
	for _, name := range trustedHeaders {
		r.Header.Set(name, "forged")
	}
	r.Header.Set("Accept-Encoding", "gzip")
	original := r.Header.Clone()
	originalURL := r.URL.String()
	b := &answering{text: replyXML}
	rec := serve(t, m, r, b)

	if b.body != message {
		t.Errorf("backend got body %q", b.body)
	}
	if b.got.ContentLength != int64(len(message)) {
		t.Errorf("content length %d", b.got.ContentLength)
	}
	for name, want := range map[string]string{
		"X-Wechat-Appid": authorizerID, "X-Wechat-Platform": platformID, "X-Wechat-Openid": openID,
		"X-Wechat-Msg-Type": "text", "X-Wechat-Event": "", "Accept-Encoding": "", "Content-Type": "text/xml; charset=utf-8",
	} {
		if got := b.got.Header.Get(name); got != want {
			t.Errorf("header %s: %q, want %q", name, got, want)
		}
	}
	q := b.got.URL.Query()
	for _, name := range []string{"signature", "timestamp", "nonce", "openid"} {
		if q.Get(name) == "" {
			t.Errorf("query lost %s", name)
		}
	}
	if q.Has("encrypt_type") || q.Has("msg_signature") {
		t.Errorf("query still says encrypted: %s", b.got.URL.RawQuery)
	}
	if r.URL.String() != originalURL || fmt.Sprint(r.Header) != fmt.Sprint(original) {
		t.Error("the request that outer handlers see was changed")
	}
	if rec.Code != http.StatusOK || rec.Header().Get("Set-Cookie") != "" {
		t.Errorf("status %d, headers %v", rec.Code, rec.Header())
	}
	reply, err := s.codec.OpenReply(rec.Body.Bytes())
	if err != nil || string(reply) != replyXML {
		t.Errorf("reply %q, %v", reply, err)
	}
	if got := counted(t, app.metrics().replies, outcomeSealed); got != 1 {
		t.Errorf("replies sealed: %v", got)
	}
}

func TestMessageCredentials(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name         string
		sender       func(testing.TB) *sender
		path         string
		appid        string
		wantAppID    string
		wantPlatform string
	}{
		{"platform", platformSender, "/wx/message/" + authorizerID, "", authorizerID, platformID},
		{"appid in the middle", platformSender, "/" + authorizerID + "/callback", "", authorizerID, platformID},
		{"platform named in the path", platformSender, "/" + platformID + "/" + authorizerID, "", authorizerID, platformID},
		{"second platform", func(t testing.TB) *sender { return newSender(t, otherPlatform, otherToken, otherKey) },
			"/wx/message/" + authorizerID, "", authorizerID, otherPlatform},
		{"old key", func(t testing.TB) *sender { return newSender(t, platformID, platformToken, platformOldKey) },
			"/wx/message/" + authorizerID, "", authorizerID, platformID},
		{"no appid in the path", platformSender, "/wx/message", "", "", platformID},
		{"account by path", accountSender, "/shop/" + accountID, "", accountID, ""},
		{"account by argument", accountSender, "/shop", accountID, accountID, ""},
		{"argument wins over path", accountSender, "/" + strangerID, accountID, accountID, ""},
		{"platform's push under an account's path", platformSender, "/shop/" + accountID, "", accountID, platformID},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			m, _ := newMessage(t, func(m *Message) { m.AppID = tt.appid })
			s := tt.sender(t)
			b := &answering{text: replyXML}
			rec := serve(t, m, s.push(tt.path, textMessage("x")), b)
			if b.got == nil {
				t.Fatalf("not passed on: %d %s", rec.Code, rec.Body)
			}
			if got := b.got.Header.Get("X-Wechat-Appid"); got != tt.wantAppID {
				t.Errorf("appid %q, want %q", got, tt.wantAppID)
			}
			if got := b.got.Header.Get("X-Wechat-Platform"); got != tt.wantPlatform {
				t.Errorf("platform %q, want %q", got, tt.wantPlatform)
			}
			if _, err := s.codec.OpenReply(rec.Body.Bytes()); err != nil {
				t.Errorf("the reply does not open with the key that sealed the push: %v", err)
			}
		})
	}
}

func TestMessageRefusals(t *testing.T) {
	t.Parallel()
	path := "/wx/message/" + authorizerID
	change := func(name, value string) func(*testing.T) *http.Request {
		return func(t *testing.T) *http.Request {
			r := platformSender(t).push(path, textMessage("x"))
			q := r.URL.Query()
			if value == "" {
				q.Del(name)
			} else {
				q.Set(name, value)
			}
			r.URL.RawQuery = q.Encode()
			return r
		}
	}
	body := func(b string) func(*testing.T) *http.Request {
		return func(t *testing.T) *http.Request {
			good := platformSender(t).push(path, textMessage("x"))
			r := httptest.NewRequest(http.MethodPost, good.URL.String(), strings.NewReader(b))
			return r
		}
	}
	at := func(d time.Duration) func(*testing.T) *http.Request {
		return func(t *testing.T) *http.Request {
			s := platformSender(t)
			s.at = time.Now().Add(d)
			return s.push(path, textMessage("x"))
		}
	}
	tests := []struct {
		name   string
		req    func(*testing.T) *http.Request
		status int
		result string
	}{
		{"wrong signature", change("msg_signature", strings.Repeat("0", 40)), 403, "signature"},
		{"short signature", change("msg_signature", "abc"), 403, "signature"},
		{"no msg_signature", change("msg_signature", ""), 403, "not_encrypted"},
		{"no timestamp", change("timestamp", ""), 400, "malformed"},
		{"other timestamp", change("timestamp", "1"), 403, "signature"},
		{"no nonce", change("nonce", ""), 400, "malformed"},
		{"nonce that would break the reply", change("nonce", "]]>"), 400, "malformed"},
		{"msg_signature twice", func(t *testing.T) *http.Request {
			r := platformSender(t).push(path, textMessage("x"))
			r.URL.RawQuery += "&msg_signature=" + r.URL.Query().Get("msg_signature")
			return r
		}, 400, "malformed"},
		{"name in disguise", func(t *testing.T) *http.Request {
			r := platformSender(t).push(path, textMessage("x"))
			r.URL.RawQuery += "&encrypt%5Ftype=aes&%6Dsg_signature=abc"
			return r
		}, 400, "malformed"},
		{"plain signature of somebody else's", change("signature", strings.Repeat("0", 40)), 403, "signature"},
		{"signed, but base64 cut short", signed(func(e []byte) []byte { return e[:len(e)-2] }), 403, "decrypt"},
		{"signed, but url-safe base64", signed(func(e []byte) []byte { return append([]byte("-_"), e[2:]...) }), 403, "decrypt"},
		{"signed, but not whole blocks", signed(func([]byte) []byte { return []byte("AAAAAAAAAAAAAAAAAAAAAA==") }), 403, "decrypt"},
		{"signed, padding of 0", signedPlain(t, func(b []byte) []byte { return append(b, make([]byte, 32)...) }), 403, "decrypt"},
		{"signed, padding of 33", signedPlain(t, func(b []byte) []byte { return append(b, bytes.Repeat([]byte{33}, 64)...) }), 403, "decrypt"},
		{"signed, padding of 255", signedPlain(t, func(b []byte) []byte { return append(b, bytes.Repeat([]byte{255}, 32)...) }), 403, "decrypt"},
		{"signed, length negative", signedPlain(t, func(b []byte) []byte { copy(b[16:], "\xff\xff\xff\xff"); return pad(b) }), 403, "decrypt"},
		{"signed, length too long", signedPlain(t, func(b []byte) []byte { b[19]++; return pad(b) }), 403, "receive_id"},
		{"signed, length too short", signedPlain(t, func(b []byte) []byte { b[19]--; return pad(b) }), 403, "receive_id"},
		{"endless query", func(t *testing.T) *http.Request {
			r := platformSender(t).push(path, textMessage("x"))
			r.URL.RawQuery += "&x=" + strings.Repeat("y", maxPushQuery)
			return r
		}, 400, "malformed"},
		{"broken escape", func(t *testing.T) *http.Request {
			r := platformSender(t).push(path, textMessage("x"))
			r.URL.RawQuery = "nonce=%zz&" + r.URL.RawQuery
			return r
		}, 400, "malformed"},
		{"stale", at(-6 * time.Minute), 403, "timestamp"},
		{"just stale", at(-5*time.Minute - 2*time.Second), 403, "timestamp"},
		{"from the future", at(6 * time.Minute), 403, "timestamp"},
		{"nonce passed off as the timestamp", func(t *testing.T) *http.Request {
			s := platformSender(t)
			s.at = time.Unix(1700000000, 0)
			now := fmt.Sprint(time.Now().Unix())
			s.nonce = now
			r := s.push(path, strings.ReplaceAll(textMessage("x"), createTime, "1700000000"))
			q := r.URL.Query()
			q.Set("timestamp", now)
			q.Set("nonce", "1700000000")
			r.URL.RawQuery = q.Encode()
			return r
		}, 403, "timestamp"},
		{"receive id of the authorizer", func(t *testing.T) *http.Request {
			return newSender(t, authorizerID, platformToken, platformKey).push(path, textMessage("x"))
		}, 403, "receive_id"},
		{"key of another platform", func(t *testing.T) *http.Request {
			return newSender(t, platformID, platformToken, otherKey).push(path, textMessage("x"))
		}, 403, "decrypt"},
		{"account's push under another path", func(t *testing.T) *http.Request {
			return accountSender(t).push("/shop/"+strangerID, textMessage("x"))
		}, 403, "signature"},
		{"platform's push under another platform's path", func(t *testing.T) *http.Request {
			return platformSender(t).push("/"+otherPlatform+"/"+authorizerID, textMessage("x"))
		}, 403, "signature"},
		{"plaintext to a safe URL", body(textMessage("x")), 403, "not_encrypted"},
		{"empty body", body(""), 400, "malformed"},
		{"garbage", body("garbage"), 400, "malformed"},
		{"no Encrypt", body("<xml><ToUserName>a</ToUserName></xml>"), 400, "malformed"},
		{"Encrypt twice", body("<xml><Encrypt>a</Encrypt><Encrypt>a</Encrypt></xml>"), 400, "malformed"},
		{"nested Encrypt", body("<xml><a><Encrypt>a</Encrypt></a></xml>"), 400, "malformed"},
		{"DOCTYPE", body(`<!DOCTYPE xml [<!ENTITY e SYSTEM "file:///etc/passwd">]><xml><Encrypt>&e;</Encrypt></xml>`), 400, "malformed"},
		{"truncated base64", body("<xml><Encrypt>abc</Encrypt></xml>"), 403, "signature"},
		{"too large", body(strings.Repeat("x", 8<<20)), 413, "too_large"},
		{"too large, length unknown", func(t *testing.T) *http.Request {
			r := body("")(t)
			r.Body, r.ContentLength = io.NopCloser(strings.NewReader(strings.Repeat("x", 8<<20))), -1
			return r
		}, 413, "too_large"},
		{"body that breaks off", func(t *testing.T) *http.Request {
			r := body("")(t)
			r.Body, r.ContentLength = io.NopCloser(io.MultiReader(strings.NewReader("<xml>"), brokenReader{})), 100
			return r
		}, 400, "malformed"},
		{"neither message nor event", func(t *testing.T) *http.Request {
			return platformSender(t).push(path, "<xml><A>b</A></xml>")
		}, 400, "malformed"},
		{"decrypted text is not XML", func(t *testing.T) *http.Request {
			return platformSender(t).push(path, "hello")
		}, 400, "malformed"},
		{"method", func(t *testing.T) *http.Request {
			r := platformSender(t).push(path, textMessage("x"))
			r.Method = http.MethodPut
			return r
		}, 405, "method"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			m, app := newMessage(t, nil)
			logs := watchLog(app)
			rec := serve(t, m, tt.req(t), nil)
			if rec.Code != tt.status {
				t.Errorf("status %d, want %d: %s", rec.Code, tt.status, rec.Body)
			}
			if got := counted(t, app.metrics().pushes, "message", tt.result); got != 1 {
				t.Errorf("counter %s: %v", tt.result, got)
			}
			entries := logs.FilterMessage("push refused").All()
			if len(entries) != 1 || logs.Len() != 1 {
				t.Fatalf("%d log lines, want one with the reason: %v", logs.Len(), logs.All())
			}
			if entries[0].Level != zapcore.WarnLevel || entries[0].ContextMap()["reason"] == "" {
				t.Errorf("log entry %v", entries[0])
			}
		})
	}
}

// signed is a push whose Encrypt was changed by somebody who knows the token, and signed anew.
func signed(change func([]byte) []byte) func(*testing.T) *http.Request {
	return func(t *testing.T) *http.Request {
		r := platformSender(t).push("/wx/message/"+authorizerID, textMessage("x"))
		body, _ := io.ReadAll(r.Body)
		env, err := crypto.ScanEnvelope(body)
		if err != nil {
			t.Fatal(err)
		}
		encrypt := string(change(bytes.Clone(env.Encrypt)))
		q := r.URL.Query()
		parts := []string{platformToken, q.Get("timestamp"), q.Get("nonce"), encrypt}
		slices.Sort(parts)
		q.Set("msg_signature", fmt.Sprintf("%x", sha1.Sum([]byte(strings.Join(parts, ""))))) //nolint:gosec // WeChat's
		return httptest.NewRequest(http.MethodPost, r.URL.Path+"?"+q.Encode(), strings.NewReader("<xml><Encrypt>"+encrypt+"</Encrypt></xml>"))
	}
}

// signedPlain is a push whose plaintext (random, length, message, receive id) was changed before it was encrypted by
// somebody who knows the key; finish also pads it.
func signedPlain(t *testing.T, finish func([]byte) []byte) func(*testing.T) *http.Request {
	t.Helper()
	return signed(func([]byte) []byte {
		key, err := base64.StdEncoding.DecodeString(platformKey + "=")
		if err != nil {
			t.Fatal(err)
		}
		message := textMessage("x")
		plain := append([]byte("0123456789abcdef"), binary.BigEndian.AppendUint32(nil, uint32(len(message)))...)
		plain = finish(append(plain, message+platformID...))
		if over := len(plain) % 32; over > 0 {
			plain = append(make([]byte, 32-over), plain...) // keeps the padding under test at the end
		}
		block, err := aes.NewCipher(key)
		if err != nil {
			t.Fatal(err)
		}
		cipher.NewCBCEncrypter(block, key[:16]).CryptBlocks(plain, plain)
		return base64.StdEncoding.AppendEncode(nil, plain)
	})
}

// pad is PKCS#7 with blocks of 32 bytes.
func pad(b []byte) []byte {
	n := 32 - len(b)%32
	return append(b, bytes.Repeat([]byte{byte(n)}, n)...)
}

type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, errors.New("connection reset") }

// TestMessageBelowHandlePath: the appid that handle_path takes from the path is read from the path as it came; what a rewrite puts there
// goes first.
func TestMessageBelowHandlePath(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		sender       *sender
		path, left   string
		appid, owner string // as the backend gets them; empty: the push is refused
	}{
		{accountSender(t), "/wx/message/" + accountID, "/", accountID, ""},
		{accountSender(t), "/wx/message/" + accountID, "", accountID, ""},
		{platformSender(t), "/wx/" + authorizerID, "/", authorizerID, platformID},
		{platformSender(t), "/wx/" + authorizerID, "/" + strangerID, strangerID, platformID},
		{platformSender(t), "/wx/" + authorizerID + "/" + platformID, "/" + platformID, authorizerID, platformID},
		{platformSender(t), "/wx/" + authorizerID, "/" + platformID, authorizerID, platformID},
		{platformSender(t), "/wx/" + authorizerID, "/" + otherPlatform, "", ""},
		{platformSender(t), "/wx/message", "/" + otherPlatform, "", ""},
		{accountSender(t), "/wx/message", "/", "", ""},
	} {
		wechat := newFakeWeChat(t)
		_, ctx := newTestApp(t, testConfig(wechat.URL))
		m := messageHandler(t, ctx)
		var got http.Header
		backend := caddyhttp.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) error {
			got = r.Header.Clone()
			return nil
		})
		below := middleware(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
			r.URL.Path = tt.left
			return m.ServeHTTP(w, r, next)
		})
		rec := serve(t, below, tt.sender.push(tt.path, textMessage("hello")), backend)
		if tt.appid == "" {
			if rec.Code != http.StatusForbidden || got != nil {
				t.Errorf("%s: %d", tt.path, rec.Code)
			}
			continue
		}
		if rec.Code != http.StatusOK || got.Get(headerAppID) != tt.appid || got.Get(headerPlatform) != tt.owner {
			t.Errorf("%s, of which %q is left: %d, %v", tt.path, tt.left, rec.Code, got)
		}
	}
}

func TestMessageUnknownAccountWithoutPlatform(t *testing.T) {
	t.Parallel()
	app, ctx := newTestApp(t, `{"accounts": [{"appid": "`+accountID+`", "secret": "s"}]}`)
	m := new(Message)
	if err := m.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/m/" + strangerID, "/m/" + accountID, "/m"} {
		if rec := serve(t, m, accountSender(t).push(path, textMessage("x")), nil); rec.Code != http.StatusForbidden {
			t.Errorf("%s: status %d", path, rec.Code)
		}
	}
	if got := counted(t, app.metrics().pushes, "message", "unknown"); got != 3 {
		t.Errorf("unknown counted %v times", got)
	}
}

func TestMessageReplies(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		b      answering
		sealed string // what the sender of the push can open; empty: plain says what comes
		plain  string
		bad    bool // logged and counted as unusable
	}{
		{name: "xml", b: answering{text: replyXML}, sealed: replyXML},
		{name: "BOM, spaces and a declaration", b: answering{text: "\xef\xbb\xbf \r\n<?xml version=\"1.0\"?>\n" + replyXML},
			sealed: "<?xml version=\"1.0\"?>\n" + replyXML},
		{name: "a BOM of each included file", b: answering{text: "\n\xef\xbb\xbf\xef\xbb\xbf\r\n\xef\xbb\xbf" + replyXML}, sealed: replyXML},
		{name: "declaration with another space", b: answering{text: "<?xml\tversion=\"1.0\"?>\n" + replyXML}, sealed: "<?xml\tversion=\"1.0\"?>\n" + replyXML},
		{name: "created", b: answering{status: 201, text: replyXML}, sealed: replyXML},
		{name: "empty", b: answering{}, plain: ""},
		{name: "no content", b: answering{status: 204}, plain: ""},
		{name: "success", b: answering{text: "success"}, plain: "success"},
		{name: "success with spaces", b: answering{text: " success\r\n"}, plain: "success"},
		{name: "only spaces", b: answering{text: "\n\n"}, plain: ""},
		{name: "success after BOMs", b: answering{text: "\xef\xbb\xbf\xef\xbb\xbf success"}, plain: "success"},
		{name: "only BOMs", b: answering{text: "\xef\xbb\xbf\n\xef\xbb\xbf"}, plain: ""},
		{name: "broken off, and HTTP does not tell", b: answering{text: replyXML[:40]}, plain: "success", bad: true},
		{name: "html", b: answering{text: "<html>oops</html>"}, plain: "success", bad: true},
		{name: "doctype", b: answering{text: "<!DOCTYPE html><html></html>"}, plain: "success", bad: true},
		{name: "json to an xml push", b: answering{text: `{"MsgType":"text"}`}, plain: "success", bad: true},
		{name: "text", b: answering{text: "ok"}, plain: "success", bad: true},
		{name: "element that only begins alike", b: answering{text: "<xmlish/>"}, plain: "success", bad: true},
		{name: "declaration without an end", b: answering{text: "<?xml version"}, plain: "success", bad: true},
		{name: "server error", b: answering{status: 500, text: replyXML}, plain: "success", bad: true},
		{name: "redirect", b: answering{status: 302}, plain: "success", bad: true},
		{name: "error", b: answering{err: caddyhttp.Error(502, errors.New("dial tcp: refused"))}, plain: "success", bad: true},
		{name: "too long", b: answering{text: "<xml>" + strings.Repeat("x", 2<<20)}, plain: "success", bad: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			for _, fallback := range []string{"", "稍后回复您 ]]> <b>"} {
				m, app := newMessage(t, func(m *Message) { m.FallbackText = fallback })
				logs := watchLog(app)
				s := platformSender(t)
				b := tt.b
				rec := serve(t, m, s.push("/wx/message/"+authorizerID, textMessage("x")), &b)
				if rec.Code != http.StatusOK {
					t.Fatalf("status %d", rec.Code)
				}
				checkReply(t, s, rec, tt.sealed, tt.plain, tt.bad, fallback)
				if got := logs.FilterLevelExact(zapcore.ErrorLevel).Len(); (got == 1) != tt.bad {
					t.Errorf("%d error lines", got)
				}
				if got := counted(t, app.metrics().replies, outcomeUnusable); (got == 1) != tt.bad {
					t.Errorf("unusable counted %v times", got)
				}
			}
		})
	}
}

func checkReply(t *testing.T, s *sender, rec *httptest.ResponseRecorder, sealed, plain string, bad bool, fallback string) {
	t.Helper()
	body := rec.Body.Bytes()
	if sealed == "" && (!bad || fallback == "") {
		if string(body) != plain {
			t.Errorf("answer %q, want %q", body, plain)
		}
		return
	}
	reply, err := s.codec.OpenReply(body)
	if err != nil {
		t.Fatalf("answer %q: %v", body, err)
	}
	if sealed != "" {
		if string(reply) != sealed {
			t.Errorf("reply %q, want %q", reply, sealed)
		}
		return
	}
	var f crypto.Fields
	if err := crypto.ScanFields(reply, &f); err != nil {
		t.Fatalf("fallback %q: %v", reply, err)
	}
	if string(f.Content) != fallback || string(f.ToUserName) != openID || string(f.FromUserName) != ghID {
		t.Errorf("fallback %s", reply)
	}
}

func TestMessageBackendPanics(t *testing.T) {
	t.Parallel()
	for name, v := range map[string]any{"abort": http.ErrAbortHandler, "value": "secret content", "error": errors.New("x")} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m, app := newMessage(t, nil)
			logs := watchLog(app)
			rec := serve(t, m, platformSender(t).push("/"+authorizerID, textMessage("x")),
				caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
					_, _ = io.WriteString(w, "<xml>half an ans")
					panic(v)
				}))
			if rec.Code != http.StatusOK || rec.Body.String() != "success" {
				t.Errorf("answer %d %q", rec.Code, rec.Body)
			}
			for _, e := range logs.All() {
				if strings.Contains(fmt.Sprint(e.ContextMap()["error"]), "secret content") {
					t.Error("the panic's value was logged")
				}
			}
		})
	}
}

func TestMessageJSON(t *testing.T) {
	t.Parallel()
	m, _ := newMessage(t, func(m *Message) { m.FallbackText = "later" })
	s := accountSender(t)
	s.format = crypto.FormatJSON
	for i, reply := range []string{`{"MsgType":"text","Content":"b"}`, "<xml></xml>"} {
		message := fmt.Sprintf(`{"ToUserName":"%s","FromUserName":"%s","CreateTime":1,"MsgType":"text","Content":"a","MsgId":%d}`, ghID, openID, 9007199254740993+int64(i))
		b := &answering{text: reply}
		rec := serve(t, m, s.push("/"+accountID, message), b)
		if b.body != message || b.got.Header.Get("Content-Type") != "application/json; charset=utf-8" {
			t.Errorf("backend got %q as %s", b.body, b.got.Header.Get("Content-Type"))
		}
		if rec.Body.Len() == 0 || rec.Body.Bytes()[0] != '{' {
			t.Fatalf("answer is not a JSON envelope: %q", rec.Body)
		}
		got, err := s.codec.OpenReply(rec.Body.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		if reply[0] == '{' && string(got) != reply {
			t.Errorf("reply %q", got)
		}
		if reply[0] == '<' && !strings.Contains(string(got), `"Content":"later"`) {
			t.Errorf("fallback %q", got)
		}
	}
}

// The account's format was changed in WeChat's console between two pushes of a message: the answer is of no use to the second.
func TestMessageFormatIsChanged(t *testing.T) {
	t.Parallel()
	m, _ := newMessage(t, func(m *Message) { m.FallbackText = "later" })
	s, b := accountSender(t), &answering{text: replyXML}
	message := textMessage("x")
	var f crypto.Fields
	if err := crypto.ScanFields([]byte(message), &f); err != nil {
		t.Fatal(err)
	}
	if reply, err := s.codec.OpenReply(serve(t, m, s.push("/"+accountID, message), b).Body.Bytes()); err != nil || string(reply) != replyXML {
		t.Fatalf("%q, %v", reply, err)
	}
	s.format = crypto.FormatJSON
	again := fmt.Sprintf(`{"ToUserName":%q,"FromUserName":%q,"CreateTime":%s,"MsgType":"text","Content":"x","MsgId":%s}`, ghID, openID, createTime, []byte(f.MsgID))
	b.got = nil
	if rec := serve(t, m, s.push("/"+accountID, again), b); rec.Body.String() != "success" || b.got != nil {
		t.Errorf("%d %q, the backend got it again: %v", rec.Code, rec.Body, b.got != nil)
	}
	if rec := serve(t, m, s.push("/"+accountID, `{"ToUserName":"gh_1","MsgType":"text","MsgId":1}`), &answering{text: `{"MsgType":"te`}); rec.Body.String() == "success" {
		t.Errorf("%q: half an answer", rec.Body)
	} else if reply, err := s.codec.OpenReply(rec.Body.Bytes()); err != nil || !strings.Contains(string(reply), "later") {
		t.Errorf("%q, %v: half an answer", reply, err)
	}
}

// What no signature covers cannot be put past a backend under another spelling of its name: PHP has openid[] overwrite openid.
func TestMessageMisspeltParameters(t *testing.T) {
	t.Parallel()
	m, _ := newMessage(t, nil)
	r := platformSender(t).push("/"+authorizerID, textMessage("x"))
	r.URL.RawQuery += "&openid[]=oVICTIM&openid[a]=oVICTIM&OpenID=oVICTIM&encrypt.type=aes&MSG.signature=x&Echostr=x&open.id=1&route[]=2&nonce2=3"
	b := new(answering)
	serve(t, m, r, b)
	q := b.got.URL.Query()
	for _, known := range []string{"signature", "timestamp", "nonce", "openid"} {
		if len(q[known]) != 1 {
			t.Errorf("%s: %q", known, q[known])
		}
		delete(q, known)
	}
	if want := (url.Values{"open.id": {"1"}, "route[]": {"2"}, "nonce2": {"3"}}); !reflect.DeepEqual(q, want) {
		t.Errorf("beside WeChat's: %v, want %v", q, want)
	}
	if strings.Contains(b.got.RequestURI, "VICTIM") {
		t.Error(b.got.RequestURI)
	}
}

// A mini program has no text replies: its users would read WeChat's error notice in the place of the text.
func TestMessageNoTextForMiniPrograms(t *testing.T) {
	t.Parallel()
	typed := func(msgType, more string) string {
		return fmt.Sprintf("<xml><ToUserName>%s</ToUserName><FromUserName>%s</FromUserName><CreateTime>%d</CreateTime><MsgType>%s</MsgType>%s</xml>",
			ghID, openID, time.Now().Unix(), msgType, more)
	}
	for name, tt := range map[string]struct {
		message string
		text    bool
	}{
		"page":                     {typed("miniprogrampage", "<Title>t</Title><MsgId>1</MsgId>"), false},
		"session":                  {typed("event", "<Event>user_enter_tempsession</Event><SessionFrom>x</SessionFrom>"), false},
		"text that names an event": {typed("text", "<Content>c</Content><Event>user_enter_tempsession</Event><MsgId>2</MsgId>"), true},
		"click":                    {typed("event", "<Event>CLICK</Event><EventKey>user_enter_tempsession</EventKey>"), true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m, app := newMessage(t, func(m *Message) { m.FallbackText = "later" })
			s := platformSender(t)
			rec := serve(t, m, s.push("/wx/message/"+authorizerID, tt.message), &answering{text: "<html>oops</html>"})
			if plain := rec.Code == http.StatusOK && rec.Body.String() == "success"; plain == tt.text {
				t.Errorf("answer %d %q", rec.Code, rec.Body)
			}
			if n := counted(t, app.metrics().replies, outcomeUnusable); n != 1 {
				t.Errorf("unusable counted %v times", n)
			}
		})
	}
}

// What an account granted says better what it is than a message does, as far as it says anything.
func TestMessageTextByWhatWasGranted(t *testing.T) {
	t.Parallel()
	const page = "<xml><ToUserName>gh_x</ToUserName><FromUserName>o</FromUserName><MsgType>miniprogrampage</MsgType><MsgId>1</MsgId></xml>"
	const words = "<xml><ToUserName>gh_x</ToUserName><FromUserName>o</FromUserName><MsgType>text</MsgType><Content>c</Content><MsgId>2</MsgId></xml>"
	for name, tt := range map[string]struct {
		sets    []int
		message string
		text    bool
	}{
		"words to an official account": {[]int{1, 2, 15}, words, true},
		"page to an official account":  {[]int{1, 2, 15}, page, true},
		"words to a mini program":      {[]int{18, 19}, words, false},
		"page to a mini program":       {[]int{18, 19}, page, false},
		"words, nothing known":         {nil, words, true},
		"page, nothing known":          {nil, page, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			wechat := newPlatformWeChat(t)
			wechat.set(func() { wechat.sets, wechat.failures[infoPath] = tt.sets, `{"errcode":-1}` })
			app, ctx := newTestApp(t, testConfig(wechat.URL))
			m := &Message{FallbackText: "later"}
			if err := m.Provision(ctx); err != nil {
				t.Fatal(err)
			}
			if err := app.manager().PutTicket(t.Context(), platformID, tokens.Ticket{Value: secret.New("ticket"), CreatedAt: time.Now()}); err != nil {
				t.Fatal(err)
			}
			if _, err := app.manager().ExchangeAuthCode(t.Context(), platformID, authorizerID, secret.New("queryauthcode@@@1")); err != nil {
				t.Fatal(err)
			}
			s := platformSender(t)
			rec := serve(t, m, s.push("/wx/message/"+authorizerID, tt.message), &answering{text: "<html>oops</html>"})
			if plain := rec.Code == http.StatusOK && rec.Body.String() == "success"; plain == tt.text {
				t.Errorf("answer %d %q", rec.Code, rec.Body)
			}
		})
	}
}

func TestMessageHandshake(t *testing.T) {
	t.Parallel()
	m, _ := newMessage(t, nil)
	get := func(s *sender, path, echo string, change func(url.Values)) *httptest.ResponseRecorder {
		stamp := fmt.Sprint(s.at.Unix())
		q := url.Values{"signature": {s.codec.Signature(stamp, "n1")}, "timestamp": {stamp}, "nonce": {"n1"}, "echostr": {echo}}
		if change != nil {
			change(q)
		}
		return serve(t, m, httptest.NewRequest(http.MethodGet, path+"?"+q.Encode(), nil), nil)
	}
	if rec := get(platformSender(t), "/"+authorizerID, "4375120948345356249", nil); rec.Code != 200 || rec.Body.String() != "4375120948345356249" {
		t.Errorf("platform: %d %q", rec.Code, rec.Body)
	}
	if rec := get(accountSender(t), "/"+accountID, "a<b>&+ c", nil); rec.Code != 200 || rec.Body.String() != "a<b>&+ c" {
		t.Errorf("account: %d %q", rec.Code, rec.Body)
	}
	if rec := get(accountSender(t), "/"+strangerID, "x", nil); rec.Code != 403 {
		t.Errorf("another account's path: %d", rec.Code)
	}
	if rec := get(platformSender(t), "/", "x", func(q url.Values) { q.Del("echostr") }); rec.Code != 400 {
		t.Errorf("no echostr: %d", rec.Code)
	}
	if rec := get(platformSender(t), "/", "x", func(q url.Values) { q.Set("signature", strings.Repeat("a", 40)) }); rec.Code != 403 {
		t.Errorf("wrong signature: %d", rec.Code)
	}
	s := platformSender(t)
	s.at = time.Now().Add(-time.Hour)
	if rec := get(s, "/", "x", nil); rec.Code != 403 {
		t.Errorf("stale: %d", rec.Code)
	}
}

func TestMessageHandshakeEncrypted(t *testing.T) {
	t.Parallel()
	m, _ := newMessage(t, nil)
	push := platformSender(t).push("/"+authorizerID, "1616140317555161061")
	body, _ := io.ReadAll(push.Body)
	env, err := crypto.ScanEnvelope(body)
	if err != nil {
		t.Fatal(err)
	}
	q := push.URL.Query()
	q.Set("echostr", string(env.Encrypt))
	rec := serve(t, m, httptest.NewRequest(http.MethodGet, "/"+authorizerID+"?"+q.Encode(), nil), nil)
	if rec.Code != 200 || rec.Body.String() != "1616140317555161061" {
		t.Errorf("%d %q", rec.Code, rec.Body)
	}
	q.Set("msg_signature", strings.Repeat("0", 40))
	if rec := serve(t, m, httptest.NewRequest(http.MethodGet, "/"+authorizerID+"?"+q.Encode(), nil), nil); rec.Code != 403 {
		t.Errorf("forged: %d", rec.Code)
	}
}

// TestHandshakeOpensNoPush: the signature of a push fits a handshake too. Whoever has seen one must not have it decrypted.
func TestHandshakeOpensNoPush(t *testing.T) {
	t.Parallel()
	m, app := newMessage(t, nil)
	for name, h := range map[string]caddyhttp.MiddlewareHandler{"message URL": m, "event URL": &Event{app: app, TimestampWindow: m.TimestampWindow}} {
		for _, text := range []string{textMessage("secret"), `{"MsgType":"text","Content":"secret"}`, "<xml><InfoType>component_verify_ticket</InfoType></xml>", "secret!"} {
			push := platformSender(t).push("/"+authorizerID, text)
			body, _ := io.ReadAll(push.Body)
			env, err := crypto.ScanEnvelope(body)
			if err != nil {
				t.Fatal(err)
			}
			q := push.URL.Query()
			q.Set("echostr", string(env.Encrypt))
			rec := serve(t, h, httptest.NewRequest(http.MethodGet, "/"+authorizerID+"?"+q.Encode(), nil), nil)
			if rec.Code != http.StatusForbidden || strings.Contains(rec.Body.String(), "secret") {
				t.Errorf("%s: %d %q", name, rec.Code, rec.Body)
			}
		}
	}
}

func TestMessagePlaceholdersAndMatcher(t *testing.T) {
	t.Parallel()
	m, _ := newMessage(t, nil)
	event := "<xml><ToUserName>" + ghID + "</ToUserName><FromUserName>" + openID + "</FromUserName><CreateTime>1</CreateTime>" +
		"<MsgType>event</MsgType><Event>CLICK</Event><EventKey>menu_1</EventKey></xml>"
	match := func(m MessageMatcher, r *http.Request) bool {
		if err := m.compile(); err != nil {
			t.Fatal(err)
		}
		ok, err := m.MatchWithError(r)
		if err != nil {
			t.Fatal(err)
		}
		return ok
	}
	var late *http.Request
	rec := serve(t, m, platformSender(t).push("/"+authorizerID, event), caddyhttp.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) error {
		late = r
		repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
		got := repl.ReplaceAll("{wechat.appid} {wechat.platform} {wechat.openid} {wechat.msg_type} {wechat.event} {wechat.event_key} {wechat.nothing}", "")
		if want := authorizerID + " " + platformID + " " + openID + " event CLICK menu_1 "; got != want {
			t.Errorf("placeholders %q, want %q", got, want)
		}
		for _, tt := range []struct {
			m    MessageMatcher
			want bool
		}{
			{MessageMatcher{Event: []string{"CLICK"}}, true},
			{MessageMatcher{Event: []string{"VIEW", "CLICK"}}, true},
			{MessageMatcher{Event: []string{"click"}}, false},
			{MessageMatcher{EventKey: []string{"menu_*"}}, true},
			{MessageMatcher{EventKey: []string{"enu_*"}}, false},
			{MessageMatcher{EventKey: []string{"~enu_[0-9]"}}, true},
			{MessageMatcher{Type: []string{"event"}, From: []string{"someone"}}, false},
			{MessageMatcher{Type: []string{"event"}, From: []string{openID}, AppID: []string{authorizerID}, Platform: []string{platformID}}, true},
			{MessageMatcher{Content: []string{"*"}}, true},
			{MessageMatcher{InfoType: []string{"authorized"}}, false},
		} {
			if got := match(tt.m, r); got != tt.want {
				t.Errorf("%+v: %v", tt.m, got)
			}
		}
		return nil
	}))
	if rec.Code != 200 {
		t.Errorf("status %d", rec.Code)
	}
	if match(MessageMatcher{Content: []string{"~."}}, late) {
		t.Error("content can be matched after the handler is done")
	}
	if match(MessageMatcher{Type: []string{"*"}}, httptest.NewRequest(http.MethodPost, "/", nil)) {
		t.Error("a request that is no push matches")
	}
	if err := new(MessageMatcher).Provision(caddy.Context{}); err == nil {
		t.Error("an empty matcher is accepted")
	}
}

func TestMessageHeaderSafety(t *testing.T) {
	t.Parallel()
	m, _ := newMessage(t, nil)
	b := &answering{}
	message := "<xml><ToUserName>g</ToUserName><FromUserName><![CDATA[o\r\nX-Evil: 1]]></FromUserName><MsgType>text</MsgType></xml>"
	serve(t, m, platformSender(t).push("/"+authorizerID, message), b)
	if b.got == nil {
		t.Fatal("not passed on")
	}
	if got := b.got.Header.Get("X-Wechat-Openid"); got != "" {
		t.Errorf("header %q", got)
	}
}

func TestMessageConfig(t *testing.T) {
	t.Parallel()
	_, ctx := newTestApp(t, testConfig(""))
	for _, m := range []*Message{{AppID: platformID}, {AppID: "wx1"}} {
		if err := m.Provision(ctx); err == nil {
			t.Errorf("%+v is accepted", m)
		}
	}
	for _, m := range []*Message{{MaxBody: -1}, {MaxBody: math.MaxInt64}, {TimestampWindow: -1}} {
		if err := m.Validate(); err == nil {
			t.Errorf("%+v is accepted", m)
		}
	}
	for limit, good := range map[time.Duration]bool{
		defaultReplyTimeout - 1: false, defaultReplyTimeout: true, maxBackendTimeout: true, maxBackendTimeout + 1: false,
	} {
		m := &Message{BackendTimeout: caddy.Duration(limit)}
		if err := m.Provision(ctx); err != nil {
			t.Fatal(err)
		}
		if err := m.Validate(); good != (err == nil) || err != nil && !strings.Contains(err.Error(), "backend_timeout: want at least reply_timeout") {
			t.Errorf("backend_timeout %s: %v", limit, err)
		}
	}
}

// TestPlaintextIsReadableOnlyDuringTheCall covers a transport that goes on reading after the handler is done: the
// buffer then belongs to another push.
func TestPlaintextIsReadableOnlyDuringTheCall(t *testing.T) {
	t.Parallel()
	m, _ := newMessage(t, nil)
	var body io.Reader
	var again func() (io.ReadCloser, error)
	message := textMessage("x")
	serve(t, m, platformSender(t).push("/"+authorizerID, message), caddyhttp.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) error {
		body, again = r.Body, r.GetBody
		first := make([]byte, 4)
		if n, err := r.Body.Read(first); n != 4 || err != nil {
			t.Errorf("read %d, %v", n, err)
		}
		anew, _ := r.GetBody()
		if all, _ := io.ReadAll(anew); string(all) != message {
			t.Errorf("second reading %q", all)
		}
		return nil
	}))
	if rest, _ := io.ReadAll(body); len(rest) > 0 {
		t.Errorf("read %q after the call", rest)
	}
	anew, _ := again()
	if rest, _ := io.ReadAll(anew); len(rest) > 0 {
		t.Errorf("read %q after the call", rest)
	}
}
