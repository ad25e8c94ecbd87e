package caddymodule

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-wechat/caddy-wechat/crypto"
)

// sendBackend opens what send pushes, and answers with what reply says.
type sendBackend struct {
	*httptest.Server
	codec *crypto.Codec
	reply func(w http.ResponseWriter, r *http.Request, plain string)

	mu     sync.Mutex
	plains []string
	heads  []http.Header
}

func newSendBackend(t *testing.T, reply func(w http.ResponseWriter, r *http.Request, plain string)) *sendBackend {
	t.Helper()
	b := &sendBackend{codec: platformSender(t).codec, reply: reply}
	b.Server = httptest.NewServer(b)
	t.Cleanup(b.Close)
	return b
}

func (b *sendBackend) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	q, plain := r.URL.Query(), string(body)
	if q.Has("msg_signature") {
		env, err := crypto.ScanEnvelope(body)
		if err != nil || !b.codec.VerifySignature(q.Get("signature"), q.Get("timestamp"), q.Get("nonce")) {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		params := crypto.Params{MsgSignature: q.Get("msg_signature"), Timestamp: q.Get("timestamp"), Nonce: q.Get("nonce")}
		opened, err := b.codec.Open(&crypto.Buffers{}, params, env.Encrypt)
		if err != nil {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		plain = string(opened.Message)
	}
	b.mu.Lock()
	b.plains, b.heads = append(b.plains, plain), append(b.heads, r.Header.Clone())
	b.mu.Unlock()
	b.reply(w, r, plain)
}

// sealedReply is a reply as a server of the platform's seals it.
func sealedReply(t *testing.T, plain string) string {
	t.Helper()
	s := platformSender(t)
	body, err := s.codec.AppendReply(nil, &crypto.Buffers{}, crypto.Opened{}, crypto.FormatXML, time.Now().Unix(), "1", []byte(plain))
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

func pongTo(to string) string {
	return "<xml><ToUserName>" + to + "</ToUserName><FromUserName>gh_1</FromUserName><CreateTime>1</CreateTime><MsgType>text</MsgType><Content>pong</Content></xml>"
}

// TestSend: what arrives is what WeChat would have sent, and the answer is judged as WeChat does.
func TestSend(t *testing.T) {
	t.Parallel()
	config := commandConfig(t)
	answer := func(text string) func(http.ResponseWriter, *http.Request, string) {
		return func(w http.ResponseWriter, _ *http.Request, _ string) { _, _ = io.WriteString(w, text) }
	}
	own := filepath.Join(t.TempDir(), "own.xml")
	if err := os.WriteFile(own, []byte("<xml><AppId>"+platformID+"</AppId><InfoType>unauthorized</InfoType></xml>\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	token, key := secretFile(t, platformToken), secretFile(t, platformKey)
	for _, tt := range []struct {
		name  string
		reply func(http.ResponseWriter, *http.Request, string)
		args  string
		code  int
		says  string
		plain string // in what arrived
	}{
		{"success", answer("success"), "--content ]]>&", 0, "answered  success", "<Content><![CDATA[]]]]><![CDATA[>&]]></Content><MsgId>"},
		{"nothing", answer(""), "", 0, "as Caddy also does where no site or route has this URL: --echostr", ""},
		{"empty", answer(""), "", 0, "answered  success", "<MsgType><![CDATA[text]]></MsgType><Content><![CDATA[test]]>"},
		{"event", answer(""), "--event CLICK --event-key menu --openid oX --to gh_X", 0, "answered", "<ToUserName><![CDATA[gh_X]]></ToUserName><FromUserName><![CDATA[oX]]>"},
		{"image", answer(""), "--type image", 0, "answered", "<MediaId>"},
		{"json", answer(""), "--format json --event CLICK", 0, "answered", `"MsgType":"event","Event":"CLICK","EventKey":""}`},
		{"own", answer("success"), "--xml @" + own, 0, "answered", "<InfoType>unauthorized</InfoType></xml>"},
		{"reply", answer(sealedReply(t, pongTo(sendOpenID))), "", 0, "answered  reply", ""},
		{"reply to another", answer(sealedReply(t, pongTo("oOther"))), "", 2, "ToUserName is not the sender", ""},
		{"reply of another format", answer(sealedReply(t, `{"MsgType":"text","ToUserName":"`+sendOpenID+`"}`)), "", 2, "the reply is json, the push was xml", ""},
		{"reply in the clear", answer(pongTo(sendOpenID)), "", 2, "the reply is not encrypted", ""},
		{"success sealed", answer(sealedReply(t, "success")), "", 2, "`success` is encrypted", ""},
		{"no message sealed", answer(sealedReply(t, "ok")), "", 2, "the decrypted reply is no message", ""},
		{"a page", answer("<html></html>"), "", 2, "neither `success` nor empty nor an encrypted message", ""},
		{"altered", answer(strings.Replace(sealedReply(t, pongTo(sendOpenID)), "<MsgSignature><![CDATA[", "<MsgSignature><![CDATA[0", 1)), "", 2, "MsgSignature fits no token", ""},
		{"500", func(w http.ResponseWriter, _ *http.Request, _ string) { w.WriteHeader(500) }, "", 2, "HTTP 500: WeChat wants 200", ""},
		{"403", func(w http.ResponseWriter, _ *http.Request, _ string) { w.WriteHeader(403) }, "", 2, "HTTP 403: refused", ""},
		{"redirect", func(w http.ResponseWriter, r *http.Request, _ string) { http.Redirect(w, r, "/x", http.StatusFound) }, "", 2, "follows no redirect", ""},
		{"handshake", func(w http.ResponseWriter, r *http.Request, _ string) {
			_, _ = io.WriteString(w, r.URL.Query().Get("echostr"))
		}, "--echostr", 0, "answered  echostr", ""},
		{"handshake, a newline", func(w http.ResponseWriter, r *http.Request, _ string) {
			_, _ = io.WriteString(w, r.URL.Query().Get("echostr")+"\n")
		}, "--echostr", 2, "byte for byte", ""},
		{"plain", answer(pongTo(sendOpenID)), "--plain --event CLICK", 0, "answered  reply", "<Event><![CDATA[CLICK]]>"},
		{"plain, a page", answer("<html></html>"), "--plain", 2, "nor a message", ""},
	} {
		b := newSendBackend(t, tt.reply)
		for _, source := range [][]string{{"--config", config, "--appid", platformID}, {"--token", token, "--aes-key", key, "--appid", platformID}} {
			args := append([]string{b.URL + "/wx/" + authorizerID + "?own=1"}, append(source, strings.Fields(tt.args)...)...)
			out, talk, code, err := runCommand(t, sendCommand(), nil, args...)
			if code != tt.code || err != nil || !strings.Contains(out, tt.says) || strings.Contains(talk, "warning") {
				t.Errorf("%s: %d %v, want %d %q\n%s%s", tt.name, code, err, tt.code, tt.says, out, talk)
			}
			b.mu.Lock()
			if len(b.plains) == 0 || !strings.Contains(b.plains[len(b.plains)-1], tt.plain) {
				t.Errorf("%s: there arrived %q", tt.name, b.plains)
			}
			b.mu.Unlock()
		}
		out, _, _, _ := runCommand(t, sendCommand(), nil, append([]string{b.URL, "--config", config, "--appid", platformID, "--json"}, strings.Fields(tt.args)...)...)
		var r sendResult
		if json.Unmarshal([]byte(out), &r) != nil || r.OK != (tt.code == 0) || len(r.Tries) != 1 {
			t.Errorf("%s: --json: %s", tt.name, out)
		}
	}
	b := newSendBackend(t, answer(""))
	if _, _, code, err := runCommand(t, sendCommand(), nil, "--plain", "--event", "CLICK", "--appid", authorizerID, b.URL); code != 0 {
		t.Fatal(err)
	}
	for name, want := range map[string]string{headerAppID: authorizerID, headerOpenID: sendOpenID, headerMsgType: "event", headerEvent: "CLICK", "Content-Type": xmlType} {
		if got := b.heads[0].Get(name); got != want {
			t.Errorf("plain: %s is %q, want %q", name, got, want)
		}
	}
	link := secretFile(t, "<xml><FromUserName>"+sendOpenID+"</FromUserName><MsgType>link</MsgType><Title></Title><Event>CLICK</Event></xml>")
	if _, _, code, err := runCommand(t, sendCommand(), nil, "--plain", "--xml", link, "--appid", authorizerID, b.URL); code != 0 {
		t.Fatal(err)
	}
	if h := b.heads[1]; h.Get(headerMsgType) != "link" || h.Get(headerEvent) != "" {
		t.Errorf("plain: of a link with an Event: %v", h)
	}
}

// TestSendToTheGateway: a gateway takes what send pushes, and its sealed reply is opened.
func TestSendToTheGateway(t *testing.T) {
	t.Parallel()
	app, ctx := newTestApp(t, testConfig(""))
	m := &Message{}
	m.app = app
	if err := m.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	next := caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
		_, err := io.WriteString(w, pongTo(sendOpenID))
		return err
	})
	gateway := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r = caddyhttp.PrepareRequest(r, caddy.NewReplacer(), w, &caddyhttp.Server{})
		if err := m.ServeHTTP(w, r, next); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(gateway.Close)
	config := commandConfig(t)
	for _, tt := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{gateway.URL + "/wx/message/" + accountID, "--config", config}, 0, "account " + accountID}, // the path says whose keys
		{[]string{gateway.URL + "/wx/message/" + authorizerID, "--config", config, "--appid", platformID}, 0, "pong"},
		{[]string{gateway.URL + "/wx/message/" + authorizerID, "--config", config, "--appid", platformID, "--echostr"}, 0, "echostr"},
		{[]string{gateway.URL + "/wx/message/" + authorizerID, "--token", secretFile(t, "another"), "--aes-key", secretFile(t, platformKey), "--appid", platformID}, 2, "403"},
	} {
		out, _, code, err := runCommand(t, sendCommand(), nil, tt.args...)
		if code != tt.code || err != nil || !strings.Contains(out, tt.says) {
			t.Errorf("%q: %d %v\n%s", tt.args, code, err, out)
		}
	}
}

// hangingTransport answers nothing until the given try, and then `success`.
type hangingTransport struct {
	until  int
	bodies []string
}

func (h *hangingTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	if h.bodies = append(h.bodies, r.URL.RawQuery+" "+string(body)); len(h.bodies) < h.until {
		<-r.Context().Done()
		return nil, r.Context().Err()
	}
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: io.NopCloser(strings.NewReader("success"))}, nil
}

// TestSendAgain: an unanswered push comes again with the same message, and a signature of its own.
func TestSendAgain(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		times, until, tries int
		well                bool
	}{{3, 3, 3, true}, {3, 2, 2, true}, {1, 2, 1, false}, {3, 9, 3, false}} {
		synctest.Test(t, func(t *testing.T) { testSendAgain(t, tt.times, tt.until, tt.tries, tt.well) })
	}
}

func testSendAgain(t *testing.T, times, until, tries int, want bool) {
	hanging := &hangingTransport{until: until}
	p := &sendParams{
		keys: keyParams{tokens: []string{secretFile(t, platformToken)}, appid: platformID}, plain: true, msgType: "text", format: "xml",
		times: times, patience: pushPatience, client: hanging,
	}
	var out strings.Builder
	well, err := p.run(context.Background(), "http://127.0.0.1:1/x", &out, io.Discard)
	if well != want || err != nil || len(hanging.bodies) != tries || well == strings.Contains(out.String(), "it was not answered: no answer within "+pushPatience.String()) {
		t.Errorf("answered at try %d of %d: %v %v %d tries\n%s", until, times, well, err, len(hanging.bodies), out.String())
	}
	for _, again := range hanging.bodies[1:] {
		query, body, _ := strings.Cut(again, " ")
		firstQuery, firstBody, _ := strings.Cut(hanging.bodies[0], " ")
		if body != firstBody || query == firstQuery {
			t.Errorf("answered at try %d of %d: again %q after %q", until, times, again, hanging.bodies[0])
		}
	}
}

// TestSendRefusals: what cannot be meant is said.
func TestSendRefusals(t *testing.T) {
	t.Parallel()
	config := commandConfig(t)
	for _, tt := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"https://api.weixin.qq.com/x"}, 1, "api.weixin.qq.com is WeChat's own"},
		{[]string{"https://MP.Weixin.QQ.com./x"}, 1, "is WeChat's own"},
		{[]string{"localhost"}, 1, "not a URL"},
		{[]string{"http://u:p@127.0.0.1/"}, 1, "no user and password"},
		{[]string{"http://127.0.0.1/", "--times", "11"}, 1, "--times: want a number from 1 to 10"},
		{[]string{"http://127.0.0.1/", "--format", "yaml"}, 1, "--format: 'yaml' is none"},
		{[]string{"http://127.0.0.1/", "--config", config}, 1, "say which one's keys"},
		{[]string{"http://127.0.0.1/", "--token", "visible", "--appid", platformID}, 1, "give --token @file"},
		{[]string{"http://127.0.0.1/", "--token", secretFile(t, "t"), "--appid", platformID}, 1, "--aes-key is missing"},
		{[]string{"http://127.0.0.1/", "--plain", "--type", "event"}, 1, "needs --event"},
		{[]string{"http://127.0.0.1/", "--plain", "--xml", "x"}, 1, "want @file"},
		{[]string{"http://127.0.0.1/", "--plain", "--xml", "@/nonexistent/x"}, 1, "/nonexistent/x"},
		{[]string{"http://127.0.0.1/", "--plain", "--xml", secretFile(t, "<xml>")}, 1, "--xml: not a WeChat envelope or message"},
		{[]string{"http://127.0.0.1/", "--plain", "--content", "\x01"}, 1, "a value that xml cannot carry"},
		{[]string{"http://" + deadAddress(t), "--plain"}, 2, "it was not answered"},
		{[]string{"http://backend.invalid/", "--plain"}, 2, "it was not answered"},
		{[]string{}, 1, "accepts 1 arg"}, // of nil, cobra reads those of the process
	} {
		out, talk, code, err := runCommand(t, sendCommand(), nil, tt.args...)
		if code != tt.code || !strings.Contains(out+fmt.Sprint(err), tt.says) {
			t.Errorf("%q: %d %v, want %d %q\n%s", tt.args, code, err, tt.code, tt.says, out)
		}
		if strings.Contains(out+talk, "signature=") {
			t.Errorf("%q: shows a signature", tt.args)
		}
		if strings.Contains(fmt.Sprint(tt.args), "backend.invalid") != strings.Contains(talk, "warning: backend.invalid is not this machine") {
			t.Errorf("%q: %s", tt.args, talk)
		}
	}
}
