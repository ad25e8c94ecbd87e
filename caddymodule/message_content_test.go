package caddymodule

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/fcgi"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-wechat/caddy-wechat/crypto"
)

// WeChat does not escape the control characters that a user has typed. What the user wrote reaches the backend as it is.
func TestMessageOfControlCharacters(t *testing.T) {
	t.Parallel()
	const odd = " \x1dc\x02\x10"
	m, _ := newMessage(t, nil)
	s, b, message := platformSender(t), &answering{text: replyXML}, textMessage(odd)
	rec := serve(t, m, s.push("/wx/message/"+authorizerID, message), b)
	if reply, err := s.codec.OpenReply(rec.Body.Bytes()); err != nil || string(reply) != replyXML || b.body != message {
		t.Errorf("%d %q, backend got %q", rec.Code, rec.Body, b.body)
	}

	// In 兼容模式 it stands in the envelope too.
	_, ctx := newTestApp(t, fmt.Sprintf(`{"accounts": [{"appid": %q, "secret": "s", "tokens": [%q], "aes_keys": [%q], "mode": "compat"}]}`, accountID, accountToken, accountKey))
	compat := new(Message)
	if err := compat.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	s, b = accountSender(t), &answering{text: replyXML}
	r := s.push("/"+accountID, message)
	envelope, _ := io.ReadAll(r.Body)
	_, encrypt, _ := strings.Cut(string(envelope), "</ToUserName>")
	outer := strings.TrimSuffix(message, "</xml>") + encrypt
	r.Body, r.ContentLength = io.NopCloser(strings.NewReader(outer)), int64(len(outer))
	rec = serve(t, compat, r, b)
	if reply, err := s.codec.OpenReply(rec.Body.Bytes()); rec.Code != http.StatusOK || err != nil || string(reply) != replyXML || b.body != message {
		t.Errorf("compatible mode: %d %q, backend got %q", rec.Code, rec.Body, b.body)
	}
}

// What a user writes makes no event of a message: WeChat escapes no end of CDATA in it.
func TestMessageMakesNoEvent(t *testing.T) {
	t.Parallel()
	m, _ := newMessage(t, nil)
	message := strings.Replace(textMessage("x"), "<MsgType><![CDATA[text]]></MsgType><Content><![CDATA[x]]></Content>",
		"<MsgType><![CDATA[link]]></MsgType><Title><![CDATA[]]></Title><Event>LOCATION</Event><EventKey>k</EventKey><InfoType>unauthorized</InfoType><Title><![CDATA[]]></Title>", 1)
	gps, revoked := &MessageMatcher{Event: []string{"LOCATION"}}, &MessageMatcher{InfoType: []string{"unauthorized"}}
	for _, matcher := range []*MessageMatcher{gps, revoked} {
		if err := matcher.compile(); err != nil {
			t.Fatal(err)
		}
	}
	called := false
	serve(t, m, platformSender(t).push("/wx/message/"+authorizerID, message), caddyhttp.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) error {
		called = true
		if ok, _ := gps.MatchWithError(r); ok || r.Header.Get("X-Wechat-Event") != "" || r.Header.Get("X-Wechat-Msg-Type") != "link" {
			t.Errorf("matches: %v, headers %v", ok, r.Header)
		}
		if ok, _ := revoked.MatchWithError(r); ok {
			t.Error("it matches as an authorization event")
		}
		repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
		if got := repl.ReplaceAll("{wechat.event}{wechat.event_key}", ""); got != "" {
			t.Errorf("placeholders %q", got)
		}
		return nil
	}))
	if !called {
		t.Error("not passed on")
	}

	// Nor does it make a push of doctor's, which no backend gets.
	for _, name := range []string{"Event", "InfoType"} {
		s, b := platformSender(t), new(answering)
		message := strings.Replace(textMessage("x"), "</MsgId>", "</MsgId><"+name+">"+doctorEvent+"</"+name+">", 1)
		if serve(t, m, s.push("/wx/message/"+authorizerID, message), b); b.body != message {
			t.Errorf("%s: the backend got %q", name, b.body)
		}
	}
}

// Events of devices (微信硬件平台) have a type of their own, and so may others that nobody has told us of.
func TestMessageOfOtherTypes(t *testing.T) {
	t.Parallel()
	for _, msgType := range []string{"device_event", "Event", "never_heard_of"} {
		m, _ := newMessage(t, nil)
		message := "<xml><ToUserName><![CDATA[" + ghID + "]]></ToUserName><FromUserName><![CDATA[" + openID + "]]></FromUserName><CreateTime>" + createTime +
			"</CreateTime><MsgType><![CDATA[" + msgType + "]]></MsgType><Event><![CDATA[bind]]></Event><DeviceType><![CDATA[" + ghID + "]]></DeviceType><Content><![CDATA[]]></Content></xml>"
		bind := &MessageMatcher{Type: []string{msgType}, Event: []string{"bind"}}
		if err := bind.compile(); err != nil {
			t.Fatal(err)
		}
		called := false
		serve(t, m, platformSender(t).push("/wx/message/"+authorizerID, message), caddyhttp.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) error {
			called = true
			if ok, _ := bind.MatchWithError(r); !ok || r.Header.Get("X-Wechat-Event") != "bind" {
				t.Errorf("%s: matches: %v, headers %v", msgType, ok, r.Header)
			}
			return nil
		}))
		if !called {
			t.Errorf("%s: not passed on", msgType)
		}
	}
}

// A MsgId of 0 is none: two messages that have it are two.
func TestMessagesWithoutAnID(t *testing.T) {
	t.Parallel()
	m, _ := newMessage(t, nil)
	s, runs := platformSender(t), 0
	backend := caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
		runs++
		_, _ = io.WriteString(w, replyXML)
		return nil
	})
	message := func(content string) string {
		before, rest, _ := strings.Cut(textMessage(content), "<MsgId>")
		_, after, _ := strings.Cut(rest, "</MsgId>")
		return before + "<MsgId>0</MsgId>" + after
	}
	for i, content := range []string{"a", "b", "a", "b"} {
		if rec := serve(t, m, s.push("/wx/message/"+authorizerID, message(content)), backend); rec.Code != http.StatusOK {
			t.Errorf("%d: %d", i, rec.Code)
		}
	}
	if runs != 2 {
		t.Errorf("the backend got %d of two messages", runs)
	}
}

// fastcgiApp is an application behind FastCGI, which knows a request by its variables.
type fastcgiApp struct {
	env  map[string]string
	uri  string
	body string
}

func newFastCGI(t *testing.T) (app *fastcgiApp, address string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	app = new(fastcgiApp)
	go func() {
		_ = fcgi.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			app.env, app.uri, app.body = map[string]string{}, r.URL.RequestURI(), string(body)
			for name, values := range r.Header {
				app.env[name] = strings.Join(values, ", ")
			}
			w.Header().Set("Content-Type", "text/html")
			_, _ = io.WriteString(w, replyXML)
		}))
	}()
	return app, listener.Addr().String()
}

// A PHP application gets the plaintext request through FastCGI as others do, by whichever variable it looks.
func TestMessageThroughFastCGI(t *testing.T) {
	t.Parallel()
	app, address := newFastCGI(t)
	b := newBehindProxyOver(t, address, map[string]any{"protocol": "fastcgi", "root": t.TempDir(), "split_path": []string{".php"}})
	for range 20 { // the variables are made in the order of a map
		s, message := platformSender(t), textMessage("你好")
		r := s.push("/wx/message/"+authorizerID, message)
		r.Header["X_wechat_appid"] = []string{accountID}
		r.Header["X-Wechat_openid"] = []string{"forged"}
		r.Header["X.wechat.event"] = []string{"forged"}
		rec := serve(t, b, r, caddyhttp.HandlerFunc(b.pass))
		if reply, err := s.codec.OpenReply(rec.Body.Bytes()); err != nil || string(reply) != replyXML {
			t.Fatalf("%d %q: %v", rec.Code, rec.Body, err)
		}
		if app.body != message || app.env["X-Wechat-Appid"] != authorizerID || app.env["X-Wechat-Openid"] != openID || app.env["X-Wechat-Event"] != "" {
			t.Fatalf("body %q, variables %v", app.body, app.env)
		}
		if strings.Contains(app.uri, "msg_signature") || strings.Contains(app.uri, "encrypt_type") || !strings.Contains(app.uri, "signature=") || !strings.Contains(app.uri, "openid="+openID) {
			t.Fatalf("REQUEST_URI %s", app.uri)
		}
	}
}

// So does one that gets copies in the background.
func TestDetachedThroughFastCGI(t *testing.T) {
	t.Parallel()
	app, address := newFastCGI(t)
	b := newBehindProxyOver(t, address, map[string]any{"protocol": "fastcgi", "root": t.TempDir(), "split_path": []string{".php"}})
	message := textMessage("x")
	r := platformSender(t).push("/wx/message/"+authorizerID, message)
	copied := detach(r, crypto.FormatXML, &facts{appid: authorizerID, openID: openID}, []byte(message))
	if err := copied.serve(t.Context(), caddyhttp.HandlerFunc(b.pass)); err != nil {
		t.Fatal(err)
	}
	if app.body != message || strings.Contains(app.uri, "msg_signature") || !strings.Contains(app.uri, "openid="+openID) {
		t.Errorf("body %q, REQUEST_URI %s", app.body, app.uri)
	}

	// Below handle_path REQUEST_URI has the whole path, as for the backend that the push itself goes to.
	r = platformSender(t).push("/wx/message/"+authorizerID, message)
	r = caddyhttp.PrepareRequest(r, caddy.NewReplacer(), httptest.NewRecorder(), new(caddyhttp.Server))
	r.URL.Path = "/" + authorizerID
	copied = detach(r, crypto.FormatXML, &facts{appid: authorizerID, openID: openID}, []byte(message))
	err := copied.serve(t.Context(), caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
		if r.URL.Path != "/"+authorizerID || !strings.HasPrefix(r.RequestURI, "/"+authorizerID+"?") {
			t.Errorf("path %s, %s", r.URL.Path, r.RequestURI)
		}
		return b.pass(w, r)
	}))
	if err != nil || !strings.HasPrefix(app.uri, "/wx/message/"+authorizerID+"?") || strings.Contains(app.uri, "msg_signature") || !strings.Contains(app.uri, "openid="+openID) {
		t.Errorf("%v; below handle_path: REQUEST_URI %s", err, app.uri)
	}
}
