package caddymodule

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-wechat/caddy-wechat/crypto"
)

// wholeReplies are answers with everything in them that looks like an end and is none.
var wholeReplies = map[string]crypto.Format{
	replyXML: crypto.FormatXML,
	"<xml><Content><![CDATA[end with </xml>, not <xml/>]]></Content><!-- </xml> --><xmlish></xmlish></xml >": crypto.FormatXML,
	"<?xml version=\"1.0\"?>\n<xml><Content><![CDATA[a]]]]><![CDATA[>b <!-- ]]></Content></xml>":             crypto.FormatXML,
	"<xml a='/'><xml/><xml b=\"/>\"><xml>a</xml ></xml><xml c='' /><?php echo '</xml></xml>' ?>b</xml>":      crypto.FormatXML,
	`{"MsgType":"news","Articles":[{"Title":"}\"]}\\"},{"Title":"{["}],"Text":{"a":{}}}`:                     crypto.FormatJSON,
}

// TestReplyEnds: an answer that is broken off anywhere is not whole, and what follows on a whole one is not part of it.
func TestReplyEnds(t *testing.T) {
	t.Parallel()
	for whole, format := range wholeReplies {
		for n := range len(whole) {
			if end := endOf(format, []byte(whole[:n])); end >= 0 {
				t.Errorf("%q is said to be whole", whole[:n])
			}
		}
		// One that an error handler prints after the beginning of another does not make that one whole.
		if end := endOf(format, []byte(whole[:len(whole)-len("}")]+whole)); end >= 0 && format == crypto.FormatJSON {
			t.Errorf("%q behind its own beginning is said to be whole", whole)
		}
		if end := endOf(format, []byte("<xml><Content>"+whole)); end >= 0 && format == crypto.FormatXML {
			t.Errorf("%q behind a beginning is said to be whole", whole)
		}
		for _, after := range []string{"", "\n", "<br />\n<b>Warning</b>: x.php", "<!-- 0.01 s -->", "</xml>", "}", "\x00"} {
			if end := endOf(format, []byte(whole+after)); end != len(whole) {
				t.Errorf("%q ends at %d, want %d", whole+after, end, len(whole))
			}
		}
	}
}

// TestReplyEndsWhereReadersSay: what others can read ends where they say.
func TestReplyEndsWhereReadersSay(t *testing.T) {
	t.Parallel()
	parts := map[crypto.Format][]string{
		crypto.FormatXML: {
			"<xml>", "</xml>", "</xml >", "<xml/>", "<xml\n>", "<xml a='>'>", `<xml a="/"/>`, "<xmlish>", "</xmlish>", "<a b='c>d'>", "</a>",
			"<![CDATA[", "]]>", "]]", "<!--", "-->", "--", "<?x ", "?>", "text", ">",
		},
		crypto.FormatJSON: {"{", "}", "[", "]", `"a"`, `"a":`, ":", ",", "1", `"`, `\`, `\"`, "true", " "},
	}
	readers := map[crypto.Format]func([]byte) int{crypto.FormatXML: endOfXMLByDecoder, crypto.FormatJSON: endOfJSONByDecoder}
	for format, of := range parts {
		random, read := rand.New(rand.NewPCG(1, 2)), 0 //nolint:gosec // the same each time
		for range 50_000 {
			text := []byte("<xml>")
			if format == crypto.FormatJSON {
				text = []byte("{")
			}
			for range random.IntN(9) {
				text = append(text, of[random.IntN(len(of))]...)
			}
			want := readers[format](text)
			if want < 0 {
				continue
			}
			read++
			if end := endOf(format, text); end != want {
				t.Errorf("%q ends at %d, want %d", text, end, want)
			}
		}
		if read < 1000 {
			t.Errorf("%d texts of %s could be read", read, format)
		}
	}
}

// endOfXMLByDecoder is where encoding/xml finds the end of the first element, or -1.
func endOfXMLByDecoder(text []byte) int {
	decoder, depth := xml.NewDecoder(bytes.NewReader(text)), 0
	for {
		token, err := decoder.Token()
		if err != nil {
			return -1
		}
		switch token.(type) {
		case xml.StartElement:
			depth++
		case xml.EndElement:
			if depth--; depth == 0 {
				return int(decoder.InputOffset())
			}
		}
	}
}

// endOfJSONByDecoder is where encoding/json finds the end of the first value, or -1.
func endOfJSONByDecoder(text []byte) int {
	decoder := json.NewDecoder(bytes.NewReader(text))
	var value json.RawMessage
	if decoder.Decode(&value) != nil {
		return -1
	}
	return int(decoder.InputOffset())
}

// TestReplyThatScriptsGoOnAfter: WeChat gets the message, and not the warnings that a script prints after it.
func TestReplyThatScriptsGoOnAfter(t *testing.T) {
	t.Parallel()
	for whole, format := range wholeReplies {
		m, _ := newMessage(t, nil)
		s, message := platformSender(t), textMessage("x")
		path := "/" + authorizerID
		if format == crypto.FormatJSON {
			s, message, path = accountSender(t), `{"ToUserName":"gh_1","MsgType":"text","MsgId":1}`, "/"+accountID
			s.format = format
		}
		rec := serve(t, m, s.push(path, message), &answering{text: whole + "\n<b>Warning</b>: Undefined variable $a in /srv/x.php\n"})
		if reply, err := s.codec.OpenReply(rec.Body.Bytes()); err != nil || string(reply) != whole {
			t.Errorf("%q, %v, want %q", reply, err, whole)
		}
		m, app := newMessage(t, nil)
		logs := watchLog(app)
		broken := whole[:strings.LastIndexAny(whole, "<}")]
		if rec := serve(t, m, s.push(path, message), &answering{text: broken}); rec.Body.String() != "success" {
			t.Errorf("%q, want success in the place of %q", rec.Body, broken)
		}
		if got := counted(t, app.metrics().replies, outcomeUnusable); got != 1 || logs.FilterMessageSnippet("cannot be used").Len() != 1 {
			t.Errorf("unusable counted %v times, the log says %v", got, logs.All())
		}
	}
}

// TestReplyThatIsEncrypted: an SDK that has the AESKey encrypts its answer, be the push encrypted or not. Nobody could read it if it were
// encrypted once more.
func TestReplyThatIsEncrypted(t *testing.T) {
	t.Parallel()
	jsonReply := `{"ToUserName":"o1","Encrypt":"x","MsgType":"text","Content":"x"}`
	for _, c := range []struct {
		text   string
		format crypto.Format
		bad    bool
	}{
		{"<xml><Encrypt>x</Encrypt><MsgSignature>x</MsgSignature><TimeStamp>1</TimeStamp><Nonce>x</Nonce></xml>", crypto.FormatXML, true}, // EasyWeChat's
		{"<xml>\n<Encrypt><![CDATA[x]]></Encrypt>\n<MsgSignature><![CDATA[x]]></MsgSignature>\n</xml>", crypto.FormatXML, true},           // wechatpy's
		{"<?xml version=\"1.0\"?>\n<xml a='>'>\r\n<MsgSignature >x</MsgSignature><Encrypt>x</Encrypt></xml>", crypto.FormatXML, true},
		{`{"Encrypt":"x","MsgSignature":"x","TimeStamp":1,"Nonce":"x"}`, crypto.FormatJSON, true},
		{"{\n\t\"Nonce\" : \"x\", \"Encrypt\": \"x\"}", crypto.FormatJSON, true},
		{"<xml><ToUserName>o1</ToUserName><Content><Encrypt>x</Encrypt></Content></xml>", crypto.FormatXML, false},
		{"<xml><Encrypted>x</Encrypted></xml>", crypto.FormatXML, false},
		{"<xml></xml>", crypto.FormatXML, false},
		{"<xml>x</xml>", crypto.FormatXML, false},
		{jsonReply, crypto.FormatJSON, false},
		{"{}", crypto.FormatJSON, false},
		{"{Encrypt:1}", crypto.FormatJSON, false},
		{`{"TimeStamp":1,"ErrCode":0}`, crypto.FormatJSON, false}, // an event's own kind of answer
		{"<xml><Nonce>x</Nonce><Encrypted>x</Encrypted></xml>", crypto.FormatXML, false},
	} {
		m, app := newMessage(t, nil)
		logs := watchLog(app)
		s, message, path := platformSender(t), textMessage("x"), "/"+authorizerID
		if c.format == crypto.FormatJSON {
			s, message, path = accountSender(t), `{"ToUserName":"gh_1","MsgType":"text","MsgId":1}`, "/"+accountID
			s.format = c.format
		}
		rec := serve(t, m, s.push(path, message), &answering{text: c.text})
		found := logs.FilterMessageSnippet("cannot be used").All()
		if !c.bad {
			if reply, err := s.codec.OpenReply(rec.Body.Bytes()); err != nil || string(reply) != c.text || len(found) != 0 {
				t.Errorf("%q became %q (%v), and the log says %v", c.text, reply, err, found)
			}
			continue
		}
		if rec.Body.String() != "success" || len(found) != 1 || found[0].ContextMap()["error"] != errEncrypted.Error() {
			t.Errorf("%q became %q, and the log says %v; want success, and that it is encrypted", c.text, rec.Body, found)
		}
	}
}

// TestReplyInGzip: some backends compress whether they are asked to or not. The limit is one for what is unpacked.
func TestReplyInGzip(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		text, sealed, plain string
		bad                 bool
	}{
		"whole":       {text: gzipped("\xef\xbb\xbf" + replyXML), sealed: replyXML},
		"more":        {text: gzipped(replyXML) + "\n", sealed: replyXML},
		"in pieces":   {text: gzipped("") + gzipped(replyXML[:40]) + gzipped(replyXML[40:]) + "\n", sealed: replyXML},
		"half pieces": {text: gzipped(replyXML[:40]) + gzipped(replyXML[40:])[:20], plain: "success", bad: true},
		"a bomb in pieces": {
			text: strings.Repeat(gzipped("<xml>"+strings.Repeat("x", 600<<10)), 2) + gzipped("</xml></xml>"), plain: "success", bad: true,
		},
		"success":    {text: gzipped("success\n"), plain: "success"},
		"nothing":    {text: gzipped("")},
		"broken off": {text: gzipped(replyXML)[:40], plain: "success", bad: true},
		"no head":    {text: "\x1f\x8b\x08", plain: "success", bad: true},
		"half":       {text: gzipped(replyXML[:40]), plain: "success", bad: true},
		"a bomb":     {text: gzipped("<xml>" + strings.Repeat("x", 2<<20) + "</xml>"), plain: "success", bad: true},
	} {
		m, app := newMessage(t, nil)
		s := platformSender(t)
		rec := serve(t, m, s.push("/"+authorizerID, textMessage("x")), &answering{text: tt.text})
		t.Run(name, func(t *testing.T) { checkReply(t, s, rec, tt.sealed, tt.plain, tt.bad, "") })
		if got := counted(t, app.metrics().replies, outcomeUnusable); (got == 1) != tt.bad {
			t.Errorf("%s: unusable counted %v times", name, got)
		}
	}
}

// TestReplyInACodingThatItIsNot: the log tells a coding that nobody asked for, or that is not there, from a connection that broke.
func TestReplyInACodingThatItIsNot(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		transport    object
		coding, body string
		want         string
	}{
		{object{"protocol": "http"}, "gzip", replyXML, errBrokenOff.Error()}, // which unpacks it itself
		{object{"protocol": "wechat_lean"}, "gzip", "x", "its Content-Encoding is gzip"},
		{object{"protocol": "http"}, "br", "\x0b\x02\x80{}\x03", "its Content-Encoding is br"},
		{object{"protocol": "wechat_lean"}, "xz", "\xfd7zXZ\x00", "its Content-Encoding is xz"},
		{object{"protocol": "wechat_lean"}, "utf-8", "x", "it begins with other text"},
	} {
		backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", c.coding)
			_, _ = io.WriteString(w, c.body)
		}))
		defer backend.Close()
		b := newBehindProxyOver(t, backend.Listener.Addr().String(), c.transport)
		logs := watchLog(b.app)
		s := platformSender(t)
		checkReply(t, s, serve(t, b, s.push("/"+authorizerID, textMessage("x")), caddyhttp.HandlerFunc(b.pass)), "", "success", true, "")
		found := logs.FilterMessageSnippet("cannot be used").All()
		if len(found) != 1 || !strings.Contains(fmt.Sprint(found[0].ContextMap()["error"]), c.want) {
			t.Errorf("%s of %v: logged %v", c.coding, c.transport, found)
		}
	}
}

// TestBackendThatSwitchesProtocols: nobody asked for that, so it is no answer, and not an empty one either.
func TestBackendThatSwitchesProtocols(t *testing.T) {
	t.Parallel()
	eachTransport(t, func(t *testing.T, transport object) {
		for _, header := range []string{"", "Upgrade: websocket\r\nConnection: Upgrade\r\n"} {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			backend := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { //nolint:gosec // a test's
				_, _ = io.Copy(io.Discard, r.Body)
				if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
					_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\n"+header+"\r\n")
					_ = conn.Close()
				}
			})}
			defer backend.Close()
			go func() { _ = backend.Serve(l) }() // ends with the test
			b := newBehindProxyOver(t, l.Addr().String(), transport)
			b.FallbackText = "later"
			logs := watchLog(b.app)
			s := platformSender(t)
			rec := serve(t, b, s.push("/"+authorizerID, textMessage("x")), caddyhttp.HandlerFunc(b.pass))
			checkReply(t, s, rec, "", "", true, "later")
			if found := logs.FilterMessageSnippet("cannot be used").All(); len(found) != 1 || found[0].ContextMap()["error"] != "status 101" {
				t.Errorf("the log says %v", found)
			}
		}
	})
}
