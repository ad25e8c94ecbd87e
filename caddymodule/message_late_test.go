package caddymodule

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// lateXML is a passive reply as an old backend writes it, addressed to somebody else than the sender.
func lateXML(kind, rest string) string {
	return "<xml>\n  <ToUserName><![CDATA[oSomebodyElse]]></ToUserName>\n  <FromUserName><![CDATA[" + ghID + "]]></FromUserName>\n  <CreateTime>12345678</CreateTime>\n" +
		"  <MsgType><![CDATA[" + kind + "]]></MsgType>\n" + rest + "\n</xml>\n"
}

func lateJSON(kind, rest string) string {
	return `{"ToUserName":"oSomebodyElse","FromUserName":"` + ghID + `","CreateTime":12345678,"MsgType":"` + kind + `"` + rest + "}"
}

func TestCustomerMessage(t *testing.T) {
	t.Parallel()
	const to = `"touser":"` + openID + `"`
	for _, tt := range []struct{ name, kind, asXML, asJSON, want string }{
		{
			"text", "text", "<Content><![CDATA[你好 <b>&amp; \"x\"\n]]></Content>", `,"Content":"你好 <b>&amp; \"x\"\n"`,
			`{"msgtype":"text","text":{"content":"你好 <b>&amp; \"x\"\n"},` + to + `}`,
		},
		{
			"text as plain text", "text", "<Content>1 &lt; 2 &#x1F600;</Content>", `,"Content":"1 < 2 \ud83d\ude00"`,
			`{"msgtype":"text","text":{"content":"1 < 2 😀"},` + to + `}`,
		},
		{
			"text of a number", "text", "<Content>42</Content>", `,"Content":42`,
			`{"msgtype":"text","text":{"content":"42"},` + to + `}`,
		},
		{
			"end mark of CDATA", "text", "<Content>" + cdata("a]]>b") + "</Content>", `,"Content":"a]]>b"`,
			`{"msgtype":"text","text":{"content":"a]]>b"},` + to + `}`,
		},
		{
			"image", "image", "<Image><MediaId><![CDATA[m-1_x]]></MediaId></Image>", `,"Image":{"MediaId":"m-1_x"}`,
			`{"image":{"media_id":"m-1_x"},"msgtype":"image",` + to + `}`,
		},
		{
			"voice", "voice", "<Voice>\n\t<MediaId>m</MediaId>\n</Voice>", `,"Voice":{"MediaId":"m"}`,
			`{"msgtype":"voice",` + to + `,"voice":{"media_id":"m"}}`,
		},
		{
			"video", "video", "<Video><Title>t</Title><MediaId>m</MediaId><Description>d &amp; e</Description></Video>",
			`,"Video":{"Description":"d & e","MediaId":"m","Title":"t"}`,
			`{"msgtype":"video",` + to + `,"video":{"description":"d & e","media_id":"m","title":"t"}}`,
		},
		{
			"video without title", "video", "<Video><MediaId>m</MediaId><Title/></Video>", `,"Video":{"MediaId":"m","Title":null}`,
			`{"msgtype":"video",` + to + `,"video":{"media_id":"m"}}`,
		},
		{
			"video of former years", "video", "<Video><MediaId>m</MediaId><ThumbMediaId>p</ThumbMediaId></Video>", `,"Video":{"MediaId":"m","ThumbMediaId":"p"}`,
			`{"msgtype":"video",` + to + `,"video":{"media_id":"m","thumb_media_id":"p"}}`,
		},
		{
			"music", "music",
			"<Music><Title>t</Title><Description>d</Description><MusicUrl>http://a/?x=1&amp;y=2</MusicUrl><HQMusicUrl>http://b/</HQMusicUrl><ThumbMediaId>p</ThumbMediaId></Music>",
			`,"Music":{"Title":"t","Description":"d","MusicUrl":"http:\/\/a/?x=1&y=2","HQMusicUrl":"http://b/","ThumbMediaId":"p"}`,
			`{"msgtype":"music","music":{"description":"d","hqmusicurl":"http://b/","musicurl":"http://a/?x=1&y=2","thumb_media_id":"p","title":"t"},` + to + `}`,
		},
		{
			"music with one address", "music", "<Music><MusicURL>http://a/</MusicURL><ThumbMediaId>p</ThumbMediaId></Music>",
			`,"Music":{"MusicURL":"http://a/","HQMusicUrl":"","ThumbMediaId":"p"}`,
			`{"msgtype":"music","music":{"hqmusicurl":"http://a/","musicurl":"http://a/","thumb_media_id":"p"},` + to + `}`,
		},
		{
			"music with the better address", "music", "<Music><HQMusicUrl>http://b/</HQMusicUrl><ThumbMediaId>p</ThumbMediaId></Music>",
			`,"Music":{"HQMusicUrl":"http://b/","ThumbMediaId":"p"}`,
			`{"msgtype":"music","music":{"hqmusicurl":"http://b/","musicurl":"http://b/","thumb_media_id":"p"},` + to + `}`,
		},
		{
			"news", "news",
			"<ArticleCount>2</ArticleCount><Articles><item><Title>1</Title><Description>d</Description><PicUrl>http://p/</PicUrl><Url>http://u/</Url></item>" +
				"<item><Title>2</Title><Url>http://no/</Url></item></Articles>",
			`,"ArticleCount":2,"Articles":[{"Title":"1","Description":"d","PicUrl":"http://p/","Url":"http://u/"},{"Title":"2","Url":"http://no/"}]`,
			`{"msgtype":"news","news":{"articles":[{"description":"d","picurl":"http://p/","title":"1","url":"http://u/"}]},` + to + `}`,
		},
		{
			"news of one", "news", "<Articles><item><Title>1</Title></item></Articles>", `,"Articles":{"item":{"Title":"1"}}`,
			`{"msgtype":"news","news":{"articles":[{"title":"1"}]},` + to + `}`,
		},
		{
			"other kinds' elements beside", "text", "<Image>x<y/></Image><Image/><Articles/><Content>c</Content>", `,"Image":"x","Articles":[],"Content":"c"`,
			`{"msgtype":"text","text":{"content":"c"},` + to + `}`,
		},
	} {
		for format, reply := range map[crypto.Format]string{crypto.FormatXML: lateXML(tt.kind, tt.asXML), crypto.FormatJSON: lateJSON(tt.kind, tt.asJSON)} {
			before := []string{"", "\ufeff", " \r\n", "\ufeff\n"}
			if format == crypto.FormatXML {
				before = append(before, "\ufeff<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n", "\n<?xml version='1.0'?>")
			}
			for _, b := range before {
				message, kind, err := customerMessage(format, []byte(b+reply), openID)
				if err != nil || kind != tt.kind {
					t.Errorf("%s in %s after %q: %q, %v", tt.name, format, b, kind, err)
					continue
				}
				if got := encoded(t, message); got != tt.want {
					t.Errorf("%s in %s after %q:\ngot  %s\nwant %s", tt.name, format, b, got, tt.want)
				}
			}
		}
	}
}

// encoded is a message as JSON, with no more escapes than needed.
func encoded(t *testing.T, message any) string {
	t.Helper()
	var b strings.Builder
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(message); err != nil {
		t.Fatal(err)
	}
	return strings.TrimSuffix(b.String(), "\n")
}

func TestCustomerMessageRefuses(t *testing.T) {
	t.Parallel()
	const private = "PrivateWords" // must be in no error
	for _, tt := range []struct {
		name, kind, asXML, asJSON string
		wantKind, want            string
		notSendable               bool
	}{
		{"transfer", "transfer_customer_service", "<TransInfo><KfAccount>" + private + "</KfAccount></TransInfo>", `,"TransInfo":{"KfAccount":"` + private + `"}`, transferKind, "transfer_customer_service", true},
		{"unknown kind", private, "", "", "", "none of text, image", true},
		{"wrong case", "Text", "<Content>" + private + "</Content>", `,"Content":"` + private + `"`, "", "none of text, image", true},
		{"no kind", "", "<Content>" + private + "</Content>", `,"Content":"` + private + `"`, "", "no MsgType", false},
		{"text without content", "text", "", "", "text", "Content is missing", false},
		{"empty text", "text", "<Content/>", `,"Content":""`, "text", "Content is missing", false},
		{"text in an element", "text", "<Content><x>" + private + "</x></Content>", `,"Content":{"x":"` + private + `"}`, "text", "nested content", false},
		{"image without image", "image", "<MediaId>" + private + "</MediaId>", `,"MediaId":"` + private + `"`, "image", "Image/MediaId is missing", false},
		{"image of another kind", "image", "<Voice><MediaId>" + private + "</MediaId></Voice>", `,"Voice":{"MediaId":"` + private + `"}`, "image", "Image/MediaId is missing", false},
		{"empty voice", "voice", "<Voice><MediaId></MediaId></Voice>", `,"Voice":{"MediaId":null}`, "voice", "Voice/MediaId is missing", false},
		{"two voices", "voice", "<Voice><MediaId>" + private + "</MediaId><MediaId>b</MediaId></Voice>", `,"Voice":{"MediaId":"` + private + `","MediaId":"b"}`, "voice", "given twice", false},
		{"words for a video", "video", "<Video>" + private + "</Video>", `,"Video":"` + private + `"`, "video", "text between the fields", false},
		{"music without picture", "music", "<Music><MusicUrl>" + private + "</MusicUrl></Music>", `,"Music":{"MusicUrl":"` + private + `"}`, "music", "Music/ThumbMediaId is missing", false},
		{"music without address", "music", "<Music><ThumbMediaId>" + private + "</ThumbMediaId></Music>", `,"Music":{"ThumbMediaId":"` + private + `"}`, "music", "Music/MusicUrl is missing", false},
		{"news without articles", "news", "<ArticleCount>1</ArticleCount><Articles/>", `,"ArticleCount":1,"Articles":[]`, "news", "Articles/item/Title is missing", false},
		{"first article without title", "news", "<Articles><item><Url>u</Url></item><item><Title>" + private + "</Title></item></Articles>", `,"Articles":[{"Url":"u"},{"Title":"` + private + `"}]`, "news", "Articles/item/Title is missing", false},
		{"kind twice", "text", "<Content>" + private + "</Content><MsgType>image</MsgType>", `,"Content":"` + private + `","MsgType":"image"`, "", "given twice", false},
		{"garbage behind", "text", "<Content>" + private + "</Content></xml>" + private, `,"Content":"` + private + `"}` + private, "", "something after the end", false},
		{"very deep", "image", "<Image>" + strings.Repeat("<a>", 1000), `,"Image":` + strings.Repeat("[", 1000), "", "nested too deep", false},
		{"cut short", "text", "<Content><![CDATA[" + private, `,"Content":"` + private, "", "cut short", false},
		{"entity", "text", "<Content>&" + private + ";</Content>", `,"Content":"\x` + private + `"`, "", "", false},
	} {
		for format, reply := range map[crypto.Format]string{crypto.FormatXML: lateXML(tt.kind, tt.asXML), crypto.FormatJSON: lateJSON(tt.kind, tt.asJSON)} {
			message, kind, err := customerMessage(format, []byte(reply), openID)
			if err == nil || message != nil || kind != tt.wantKind {
				t.Errorf("%s in %s: %v, %q, %v", tt.name, format, message, kind, err)
				continue
			}
			if !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), private) || errors.Is(err, errNotSendable) != tt.notSendable {
				t.Errorf("%s in %s: %v", tt.name, format, err)
			}
		}
	}
	good := lateXML("text", "<Content>c</Content>")
	if _, _, err := customerMessage(crypto.FormatXML, []byte(good), ""); !errors.Is(err, errNoSender) {
		t.Errorf("to nobody: %v", err)
	}
	for _, reply := range []string{"", "success", "\ufeff", "<html>" + private + "</html>", lateJSON("text", `,"Content":"c"`)} {
		if _, _, err := customerMessage(crypto.FormatXML, []byte(reply), openID); !errors.Is(err, crypto.ErrEnvelope) || strings.Contains(err.Error(), private) {
			t.Errorf("%q: %v", reply, err)
		}
	}
}

// A reply may be as large as max_body: what of it is sent must be right, and what is not sent must not matter.
func TestCustomerMessageHuge(t *testing.T) {
	t.Parallel()
	huge := strings.Repeat("字<&>\"\\", 200_000)
	var asJSON strings.Builder
	asJSON.WriteString(`,"Articles":[{"Title":"1"}`)
	for i := range 10_000 {
		fmt.Fprintf(&asJSON, `,{"Title":"%d","Url":"http://u/"}`, i)
	}
	asJSON.WriteString("]")
	articles := "<Articles><item><Title>1</Title></item>" + strings.Repeat("<item><Title>2</Title><Url>http://u/</Url></item>", 10_000) + "</Articles>"
	for format, replies := range map[crypto.Format][2]string{
		crypto.FormatXML:  {lateXML("text", "<Content>"+cdata(huge)+"</Content>"), lateXML("news", articles)},
		crypto.FormatJSON: {lateJSON("text", `,"Content":`+jsonString(huge)), lateJSON("news", asJSON.String())},
	} {
		message, _, err := customerMessage(format, []byte(replies[0]), openID)
		if err != nil {
			t.Fatal(err)
		}
		if part, _ := message["text"].(map[string]string); part["content"] != huge {
			t.Errorf("%s: the text has changed", format)
		}
		message, _, err = customerMessage(format, []byte(replies[1]), openID)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := encoded(t, message["news"]), `{"articles":[{"title":"1"}]}`; got != want {
			t.Errorf("%s: %s", format, got)
		}
	}
}

// newLate is an app in front of a fake WeChat, whose platform and authorizer have tokens.
func newLate(t *testing.T) (*App, *fakeWeChat) {
	t.Helper()
	wechat := newFakeWeChat(t)
	app, _ := newTestApp(t, gatewayConfig(wechat.URL))
	g := &gateway{t: t, app: app}
	g.authorize()
	wechat.seen()
	return app, wechat
}

func TestSendLate(t *testing.T) {
	t.Parallel()
	app, wechat := newLate(t)
	reply := []byte(lateXML("text", "<Content>你好 &lt;b&gt; &amp; \"x\"</Content>"))
	for key, token := range map[tokens.Key]string{
		tokens.AccountKey(accountID):                   "REALTOKEN-" + accountID + "-1",
		tokens.AuthorizerKey(platformID, authorizerID): "REALTOKEN-" + authorizerID + "-1",
	} {
		if err := app.sendLate(t.Context(), key, openID, crypto.FormatXML, reply); err != nil {
			t.Fatal(err)
		}
		c := wechat.one(t)
		if want := `{"msgtype":"text","text":{"content":"你好 <b> & \"x\""},"touser":"` + openID + `"}`; c.Body != want {
			t.Errorf("body\n%s\nwant\n%s", c.Body, want)
		}
		if c.Method != http.MethodPost || c.Path != "/cgi-bin/message/custom/send" || c.Query != "access_token="+token || c.Length != int64(len(c.Body)) {
			t.Errorf("call %s %s?%s, %d bytes", c.Method, c.Path, c.Query, c.Length)
		}
	}
}

// A refused token is renewed, once, and the message is sent with the new one.
func TestSendLateRefusedToken(t *testing.T) {
	t.Parallel()
	app, wechat := newLate(t)
	reply := []byte(lateJSON("image", `,"Image":{"MediaId":"m"}`))
	if err := app.sendLate(t.Context(), tokens.AccountKey(accountID), openID, crypto.FormatJSON, reply); err != nil {
		t.Fatal(err)
	}
	first := wechat.one(t)
	wechat.spoil(accountID)
	if err := app.sendLate(t.Context(), tokens.AccountKey(accountID), openID, crypto.FormatJSON, reply); err != nil {
		t.Fatal(err)
	}
	calls := wechat.seen()
	if len(calls) != 2 || calls[0].Query != first.Query || calls[1].Query == first.Query || calls[1].Body != first.Body {
		t.Errorf("calls %+v", calls)
	}
}

func TestSendLateFails(t *testing.T) {
	t.Parallel()
	const private = "PrivateWords"
	reply := []byte(lateXML("text", "<Content>"+private+"</Content>"))
	key := tokens.AuthorizerKey(platformID, authorizerID)
	answer := func(text string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, text) }
	}
	for _, tt := range []struct {
		name   string
		answer http.HandlerFunc
		code   int64 // 0: no answer of WeChat's
	}{
		{"window over", answer(`{"errcode":45015,"errmsg":"response out of time limit"}`), 45015},
		{"too many", answer(`{"errcode":45047,"errmsg":"out of response count limit rid: 64f1e2d3-0a1b2c3d-4e5f6071"}`), 45047},
		{"busy", answer(`{"errcode":-1,"errmsg":"system error"}`), -1},
		{"quoted", answer(`{"errcode":45002,"errmsg":"content size out of limit: ` + private + `"}`), 45002},
		{"refused twice", answer(`{"errcode":40001,"errmsg":"invalid credential ` + private + `"}`), 40001},
		{"no JSON", answer("<html>" + private + "</html>"), 0},
		{"status 502", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) }, 0},
		{"hung up", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			app, wechat := newLate(t)
			wechat.answer(tt.answer)
			err := app.sendLate(t.Context(), key, openID, crypto.FormatXML, reply)
			want := 1
			if tt.code == 40001 {
				want = 2
			}
			if n := len(wechat.seen()); n != want {
				t.Errorf("%d calls, want %d", n, want)
			}
			api, ok := errors.AsType[*tokens.APIError](err)
			if err == nil || ok != (tt.code != 0) || ok && (api.Code != tt.code || api.Msg != "") {
				t.Fatalf("error %v", err)
			}
			if tt.code != 0 && !strings.Contains(err.Error(), fmt.Sprintf("%s: %d", customServiceAPI, tt.code)) {
				t.Errorf("error without path or code: %v", err)
			}
			if tt.name == "too many" && api.RID != "64f1e2d3-0a1b2c3d-4e5f6071" {
				t.Errorf("request id %q", api.RID)
			}
			for _, secret := range []string{private, "REALTOKEN", openID} {
				if strings.Contains(err.Error(), secret) {
					t.Errorf("error holds %q: %v", secret, err)
				}
			}
		})
	}
}

// What cannot be converted, and what has no token, is not sent at all.
func TestSendLateNothing(t *testing.T) {
	t.Parallel()
	app, wechat := newLate(t)
	key := tokens.AccountKey(accountID)
	if err := app.sendLate(t.Context(), key, openID, crypto.FormatXML, []byte(lateXML(transferKind, ""))); !errors.Is(err, errNotSendable) {
		t.Errorf("transfer: %v", err)
	}
	reply := []byte(lateXML("text", "<Content>c</Content>"))
	if err := app.sendLate(t.Context(), key, "", crypto.FormatXML, reply); !errors.Is(err, errNoSender) {
		t.Errorf("to nobody: %v", err)
	}
	if err := app.sendLate(t.Context(), tokens.AuthorizerKey(platformID, strangerID), openID, crypto.FormatXML, reply); err == nil {
		t.Error("no error for an account that never authorised")
	}
	for _, c := range wechat.seen() {
		if c.Path == customServiceAPI {
			t.Errorf("sent %s", c.Body)
		}
	}
}

// TestSlowReplyByCustomerService: an answer that comes after the last push goes out once, and
// what cannot go out is counted and said.
func TestSlowReplyByCustomerService(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, reply string
		result      string // "": nothing is to be sent
	}{
		{"text", lateXML("text", "<Content>c</Content>"), "ok"},
		{"transfer", lateXML(transferKind, ""), "error"},
		{"success", "success", ""},
		{"unusable", "<html>", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			app, wechat := newLate(t)
			logs := watchLog(app)
			m := &Message{
				AppID: authorizerID, Pushes: 1, ReplyTimeout: caddy.Duration(20 * time.Millisecond), SlowReply: slowCustomerService,
				BackendTimeout: caddy.Duration(time.Minute), MaxBody: 1 << 20, MaxInFlight: 1, TimestampWindow: caddy.Duration(time.Minute),
				app: app, places: make(chan struct{}, 1),
			}
			r := platformSender(t).push("/", textMessage("x"))
			rec := &paceWriter{ResponseRecorder: httptest.NewRecorder(), flushed: make(chan struct{})}
			err := m.ServeHTTP(rec, caddyhttp.PrepareRequest(r, caddy.NewReplacer(), rec, &caddyhttp.Server{}),
				caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
					<-rec.flushed // the push was answered
					_, _ = io.WriteString(w, tt.reply)
					return nil
				}))
			if err != nil || rec.Body.String() != "success" {
				t.Errorf("the push got %q, %v", rec.Body, err)
			}
			sent := 0
			for _, c := range wechat.seen() {
				if c.Path == customServiceAPI {
					sent++
					if !strings.Contains(c.Body, `"touser":"`+openID+`"`) {
						t.Errorf("sent %s", c.Body)
					}
				}
			}
			if want := map[string]int{"ok": 1}[tt.result]; sent != want {
				t.Errorf("sent %d times, want %d", sent, want)
			}
			if tt.result != "" && (counted(t, app.metrics().lateReplies, tt.result) != 1 || counted(t, app.metrics().replies, outcomeLate) != 1) {
				t.Error("not counted")
			}
			if lines := logs.FilterMessageSnippet("could not be sent by the customer-service API").Len(); (lines == 1) != (tt.result == "error") {
				t.Errorf("%d lines about it", lines)
			}
		})
	}
}
