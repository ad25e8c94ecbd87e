package wxsim

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// fakeGateway opens pushes and answers with what reply returns for the plaintext.
type fakeGateway struct {
	t     *testing.T
	crypt *Crypt
	mode  Mode
	reply func(plain string) string // sealed unless empty or `success`; "raw:" in front: sent as it is
	*httptest.Server

	mu     sync.Mutex
	bodies [][]byte
	plains []string
	query  []string // raw queries
}

func newFakeGateway(t *testing.T, receiveID string, mode Mode, reply func(string) string) *fakeGateway {
	t.Helper()
	crypt, err := NewCrypt(testToken, testKey, receiveID)
	if err != nil {
		t.Fatal(err)
	}
	g := &fakeGateway{t: t, crypt: crypt, mode: mode, reply: reply}
	g.Server = httptest.NewServer(g)
	t.Cleanup(g.Close)
	return g
}

func (g *fakeGateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	plain, err := g.open(r, body)
	if err != nil {
		w.WriteHeader(http.StatusForbidden)
		return
	}
	g.mu.Lock()
	g.bodies, g.plains, g.query = append(g.bodies, body), append(g.plains, plain), append(g.query, r.URL.RawQuery)
	g.mu.Unlock()
	answer := g.reply(plain)
	if raw, ok := strings.CutPrefix(answer, "raw:"); ok || answer == "" || answer == answerSuccess || g.mode == ModePlain {
		if ok {
			answer = raw
		}
		_, _ = io.WriteString(w, answer)
		return
	}
	encrypt, err := g.crypt.Seal([]byte(answer))
	if err != nil {
		g.t.Error(err)
	}
	timestamp, nonce := strconv.FormatInt(time.Now().Unix(), 10), r.URL.Query().Get("nonce")
	format := "<xml><Encrypt><![CDATA[%s]]></Encrypt><MsgSignature><![CDATA[%s]]></MsgSignature><TimeStamp>%s</TimeStamp><Nonce><![CDATA[%s]]></Nonce></xml>"
	if strings.HasPrefix(answer, "{") {
		format = `{"Encrypt":"%s","MsgSignature":"%s","TimeStamp":%s,"Nonce":"%s"}`
	}
	_, _ = fmt.Fprintf(w, format, encrypt, g.crypt.Sign(timestamp, nonce, encrypt), timestamp, nonce)
}

// open checks and decrypts a push; its plaintext in plain mode is the body.
func (g *fakeGateway) open(r *http.Request, body []byte) (string, error) {
	q := r.URL.Query()
	if g.crypt.Sign(q.Get("timestamp"), q.Get("nonce")) != q.Get("signature") {
		return "", errors.New("signature")
	}
	if g.mode == ModePlain {
		return string(body), nil
	}
	body = bytes.TrimPrefix(body, []byte("\xef\xbb\xbf"))
	format := FormatXML
	if bytes.HasPrefix(bytes.TrimSpace(body), []byte("{")) {
		format = FormatJSON
	}
	root, err := parse(bytes.TrimSpace(body), format)
	if err != nil {
		return "", err
	}
	encrypt, err := root.only("Encrypt")
	if err != nil {
		return "", err
	}
	if g.crypt.Sign(q.Get("timestamp"), q.Get("nonce"), encrypt.text) != q.Get("msg_signature") {
		return "", errors.New("msg_signature")
	}
	plain, err := g.crypt.Open(encrypt.text)
	return string(plain), err
}

// value is the text of an element of an XML or JSON message.
func value(plain, name string) string {
	format := FormatXML
	if strings.HasPrefix(plain, "{") {
		format = FormatJSON
	}
	root, err := parse([]byte(plain), format)
	if err != nil {
		return ""
	}
	n, err := root.only(name)
	if err != nil {
		return ""
	}
	return n.text
}

// echo answers a text with the same text.
func echo(plain string) string {
	fields := []Field{
		{Name: "ToUserName", Value: value(plain, "FromUserName")}, {Name: "FromUserName", Value: value(plain, "ToUserName")},
		{Name: "CreateTime", Value: "1400000000", Number: true}, {Name: "MsgType", Value: "text"}, {Name: "Content", Value: "re: " + value(plain, "Content")},
	}
	format := FormatXML
	if strings.HasPrefix(plain, "{") {
		format = FormatJSON
	}
	return string(builder{format: format}.build(fields))
}

func TestPushMessage(t *testing.T) {
	t.Parallel()
	for _, mode := range []Mode{ModePlain, ModeCompat, ModeSafe} {
		for _, format := range []Format{FormatXML, FormatJSON} {
			for seed := range uint64(8) {
				t.Run(fmt.Sprintf("%s %s %d", mode, format, seed), func(t *testing.T) {
					t.Parallel()
					s := newSim(t, func(c *Config) {
						c.Accounts[0].Mode, c.Accounts[0].Format = mode, format
						c.Seed, c.Faults = seed, Faults{} // hostile
					})
					g := newFakeGateway(t, testAccount, mode, echo)
					s.SetMessageURL(testAccount, g.URL+"/wx?a=1")
					for _, content := range []string{"你好", "a ]]> <b> & \"q\"", strings.Repeat("x", 31), strings.Repeat("x", 32)} {
						r, err := s.PushMessage(t.Context(), Message{AppID: testAccount, Content: content})
						if err != nil || r.Kind != "text" || r.UserSaw != "re: "+content || len(r.Attempts) != 1 {
							t.Fatalf("%q: %v %+v", content, err, r)
						}
					}
					wantNoViolations(t, s)
					if mode == ModeCompat && value(string(bytes.TrimSpace(bytes.TrimPrefix(g.bodies[0], []byte("\xef\xbb\xbf")))), "Content") != "你好" {
						t.Errorf("compat body lacks the plain fields: %s", g.bodies[0])
					}
				})
			}
		}
	}
}

func TestPushToPlatform(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	var path string
	g := newFakeGateway(t, testPlatform, ModeSafe, echo)
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		path = r.URL.Path
		g.ServeHTTP(w, r)
	}))
	t.Cleanup(front.Close)
	s.SetURLs(testPlatform, "", front.URL+"/wx/$APPID$/callback")
	r, err := s.PushMessage(t.Context(), Message{Platform: testPlatform, AppID: testShop, Content: "hi"})
	if err != nil || r.UserSaw != "re: hi" {
		t.Fatalf("%v %+v", err, r)
	}
	if path != "/wx/"+testShop+"/callback" {
		t.Errorf("path %s", path)
	}
	if string(r.Plain) != g.plains[0] || !bytes.Equal(r.Attempts[0].Sent, g.bodies[0]) || !strings.HasSuffix(r.Attempts[0].URL, g.query[0]) {
		t.Errorf("the result does not say what was sent: %+v", r)
	}
	if value(g.plains[0], "ToUserName") != "gh_333333333333" || value(g.plains[0], "FromUserName") != r.OpenID {
		t.Errorf("plaintext %s", g.plains[0])
	}
	if value(g.plains[0], "MsgId") != strconv.FormatInt(r.MsgID, 10) {
		t.Errorf("MsgId of %s is not %d", g.plains[0], r.MsgID)
	}
	if !strings.Contains(g.query[0], "openid="+r.OpenID) {
		t.Errorf("query %s lacks the openid", g.query[0])
	}
}

func TestRepliesAreJudged(t *testing.T) {
	t.Parallel()
	good := func(change ...string) func(string) string {
		return func(plain string) string { return strings.NewReplacer(change...).Replace(echo(plain)) }
	}
	fixed := func(text string) func(string) string { return func(string) string { return text } }
	news := func(count string, titles ...string) func(string) string {
		var items strings.Builder
		for _, title := range titles {
			items.WriteString("<item><Title>" + title + "</Title></item>")
		}
		return func(plain string) string {
			return strings.NewReplacer("[text]", "[news]", "</xml>", "<ArticleCount>"+count+"</ArticleCount><Articles>"+items.String()+"</Articles></xml>").Replace(echo(plain))
		}
	}
	for _, tc := range []struct {
		name  string
		reply func(string) string
		kind  ReplyKind
		saw   string
		wrong string // part of the reason
		mini  bool
	}{
		{name: "text", reply: echo, kind: "text", saw: "re: x"},
		{name: "empty", reply: fixed(""), kind: ReplySuccess},
		{name: "success", reply: fixed(answerSuccess), kind: ReplySuccess},
		{name: "success and newline", reply: fixed("raw:success\n"), wrong: "envelope"},
		{name: "success encrypted", reply: fixed("success "), wrong: "`success` encrypted"},
		{name: "plain XML in safe mode", reply: func(p string) string { return "raw:" + echo(p) }, wrong: "Encrypt is missing"},
		{name: "HTML", reply: fixed("raw:<html></html>"), wrong: "envelope"},
		{name: "not swapped", reply: func(p string) string { return p }, wrong: "is not"},
		{name: "ToUserName missing", reply: good("ToUserName", "ToUser"), wrong: "ToUserName is missing"},
		{name: "CreateTime not a number", reply: good("1400000000", "now"), wrong: "CreateTime"},
		{name: "empty text", reply: good("re: x", ""), wrong: "empty Content"},
		{name: "unknown type", reply: good("[text]", "[words]"), wrong: "unknown MsgType"},
		{name: "image", reply: good("[text]", "[image]", "</xml>", "<Image><MediaId>M</MediaId></Image></xml>"), kind: "image", saw: "[image M]"},
		{name: "image without id", reply: good("[text]", "[image]"), wrong: "Image is missing"},
		{name: "music", reply: good("[text]", "[music]", "</xml>", "<Music></Music></xml>"), kind: "music", saw: "[music]"},
		{name: "news", reply: news("1", "A"), kind: "news", saw: "A"},
		{name: "news with wrong count", reply: news("2", "A"), wrong: "ArticleCount"},
		{name: "too many news", reply: news("2", "A", "B"), wrong: "at most 1"},
		{name: "two roots", reply: func(p string) string { return echo(p) + "<xml></xml>" }, wrong: "one <xml>"},
		{name: "byte order mark", reply: func(p string) string { return "\xef\xbb\xbf" + echo(p) }, wrong: "byte order mark"},
		{name: "customer service", reply: good("[text]", "[transfer_customer_service]"), kind: "transfer_customer_service"},
		{name: "text to a mini program", reply: echo, mini: true, wrong: "mini program"},
		{name: "customer service of a mini program", reply: good("[text]", "[transfer_customer_service]"), mini: true, kind: "transfer_customer_service"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := newSim(t, nil)
			g := newFakeGateway(t, testPlatform, ModeSafe, tc.reply)
			s.SetURLs(testPlatform, "", g.URL+"/$APPID$")
			appID, fault := testShop, FaultText
			if tc.mini {
				appID, fault = testMini, FaultTextMini
			}
			r, err := s.PushMessage(t.Context(), Message{Platform: testPlatform, AppID: appID, Content: "x"})
			if err != nil {
				t.Fatal(err)
			}
			if len(r.Attempts) != 1 {
				t.Errorf("%d attempts: only what is not answered comes again", len(r.Attempts))
			}
			if tc.wrong == "" {
				if r.Kind != tc.kind || r.UserSaw != tc.saw || !r.OK() {
					t.Errorf("%+v", r)
				}
				wantNoViolations(t, s)
				return
			}
			if r.Kind != ReplyNone || r.UserSaw != fault || !strings.Contains(r.Wrong, tc.wrong) {
				t.Errorf("%+v, want wrong: %s", r, tc.wrong)
			}
			if rules(s)[RuleAnswer] != 1 {
				t.Errorf("violations %v", rules(s))
			}
		})
	}
}

func TestEnvelopesAreJudged(t *testing.T) {
	t.Parallel()
	crypt, err := NewCrypt(testToken, testKey, testPlatform)
	if err != nil {
		t.Fatal(err)
	}
	other, err := NewCrypt(testToken, testKey, testShop)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	stamp := strconv.FormatInt(now.Unix(), 10)
	envelope := func(c *Crypt, stamp string) string {
		encrypt, err := c.Seal([]byte("<xml/>"))
		if err != nil {
			t.Fatal(err)
		}
		return "<xml><Encrypt>" + encrypt + "</Encrypt><MsgSignature>" + c.Sign(stamp, "n", encrypt) + "</MsgSignature><TimeStamp>" + stamp + "</TimeStamp><Nonce>n</Nonce></xml>"
	}
	j := judging{crypt: crypt, mode: ModeSafe, format: FormatXML}
	good := envelope(crypt, stamp)
	if _, err := j.open([]byte(good), now); err != nil {
		t.Errorf("a good envelope: %v", err)
	}
	for name, body := range map[string]string{
		"another receive id":   envelope(other, stamp),
		"wrong signature":      strings.Replace(good, "<Nonce>n", "<Nonce>m", 1),
		"no nonce":             strings.Replace(good, "<Nonce>n</Nonce>", "", 1),
		"empty nonce":          strings.Replace(good, "<Nonce>n", "<Nonce>", 1),
		"twice":                strings.Replace(good, "<Nonce>", "<Nonce>n</Nonce><Nonce>", 1),
		"quoted time":          strings.Replace(good, stamp, "<![CDATA["+stamp+"]]>", 1),
		"old time":             envelope(crypt, "1400000000"),
		"no number":            envelope(crypt, "now"),
		"unknown element":      strings.Replace(good, "</xml>", "<X/></xml>", 1),
		"newline behind":       good + "\n",
		"declaration in front": "<?xml version=\"1.0\"?>\n" + good + " ",
		"doctype":              "<!DOCTYPE xml>" + good,
		"JSON":                 "{}",
		"empty":                " ",
	} {
		if _, err := j.open([]byte(body), now); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	j.format = FormatJSON
	for _, body := range []string{`{"Encrypt":"a","Encrypt":"b"}`, `{"Encrypt":"a"} x`, `[]`, good} {
		if _, err := j.open([]byte(body), now); err == nil {
			t.Errorf("%s: taken", body)
		}
	}
}

func TestUnansweredPushesComeAgain(t *testing.T) {
	t.Parallel()
	s := newSim(t, func(c *Config) { c.Pace.Timeout = 500 * time.Millisecond }) // also on a busy machine
	var mu sync.Mutex
	var ids []string
	held := make(chan struct{})
	g := newFakeGateway(t, testAccount, ModeSafe, func(plain string) string {
		mu.Lock()
		ids = append(ids, value(plain, "MsgId"))
		n := len(ids)
		mu.Unlock()
		if n < 3 {
			<-held // WeChat gives up
			return ""
		}
		return echo(plain)
	})
	t.Cleanup(func() { close(held) }) // before g closes
	s.SetMessageURL(testAccount, g.URL)
	r, err := s.PushMessage(t.Context(), Message{AppID: testAccount, Content: "x"})
	if err != nil || r.UserSaw != "re: x" || len(r.Attempts) != 3 || !r.Attempts[0].TimedOut || !r.Attempts[1].TimedOut {
		t.Fatalf("%v %+v", err, r)
	}
	mu.Lock()
	defer mu.Unlock()
	if ids[0] != ids[1] || ids[1] != ids[2] {
		t.Errorf("the retries have other ids: %v", ids)
	}
	if got := len(s.Journal().Pushes(testAccount)); got != 3 {
		t.Errorf("%d pushes in the journal, want 3", got)
	}
}

func TestNobodyThere(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	if _, err := s.PushMessage(t.Context(), Message{AppID: testAccount}); !errors.Is(err, ErrNoURL) {
		t.Errorf("%v, want ErrNoURL", err)
	}
	srv := httptest.NewServer(nil)
	srv.Close()
	s.SetMessageURL(testAccount, srv.URL+"/secret-path")
	r, err := s.PushMessage(t.Context(), Message{AppID: testAccount, Content: "x"})
	if err != nil || r.UserSaw != FaultText || len(r.Attempts) != 3 || strings.Contains(r.Wrong, "secret-path") {
		t.Errorf("%v %+v", err, r)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.PushMessage(ctx, Message{AppID: testAccount}); err == nil {
		t.Error("a push with a dead context")
	}
	for _, m := range []Message{{AppID: testShop}, {Platform: testShop, AppID: testShop}} {
		if _, err := s.PushMessage(t.Context(), m); err == nil {
			t.Errorf("%+v was pushed", m)
		}
	}
}

func TestDuplicatesMustGetTheSameAnswer(t *testing.T) {
	t.Parallel()
	s := newSim(t, func(c *Config) { c.Faults.DuplicatePushes = 1 })
	var n int
	g := newFakeGateway(t, testAccount, ModeSafe, func(plain string) string {
		n++ // one push at a time
		if value(plain, "Content") == "changing" {
			return strings.Replace(echo(plain), "re: ", strconv.Itoa(n), 1)
		}
		return echo(plain)
	})
	s.SetMessageURL(testAccount, g.URL)
	r, err := s.PushMessage(t.Context(), Message{AppID: testAccount, Content: "same"})
	if err != nil || r.Duplicate == nil || r.Duplicate.UserSaw != "re: same" {
		t.Errorf("%v %+v", err, r)
	}
	wantNoViolations(t, s)
	if _, err = s.PushMessage(t.Context(), Message{AppID: testAccount, Content: "changing"}); err != nil {
		t.Fatal(err)
	}
	if rules(s)[RuleDuplicate] != 1 {
		t.Errorf("violations %v, want %s", rules(s), RuleDuplicate)
	}
}

func TestBentPushes(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	g := newFakeGateway(t, testAccount, ModeSafe, echo)
	s.SetMessageURL(testAccount, g.URL)
	const otherKey = "jWmYm7qr5nMoAUwZRjGtBxmz3KA1tkAj3ykkR6q2B2C"
	for name, m := range map[string]Message{
		"wrong msg_signature": {Tamper: func(o *Outgoing) { o.Set("msg_signature", strings.Repeat("0", 40)) }},
		"no msg_signature":    {Tamper: func(o *Outgoing) { o.Delete("msg_signature") }},
		"no Encrypt":          {Tamper: func(o *Outgoing) { o.Body = []byte("<xml></xml>") }},
		"another key":         {Keys: &PushKeys{Token: testToken, AESKey: otherKey}},
		"another receive id":  {Keys: &PushKeys{Token: testToken, AESKey: testKey, ReceiveID: testShop}},
	} {
		m.AppID, m.Attempts = testAccount, 1
		r, err := s.PushMessage(t.Context(), m)
		if err != nil || r.Last().Status != http.StatusForbidden {
			t.Errorf("%s: %v %+v", name, err, r)
		}
	}
	raw := `<xml><ToUserName>x</ToUserName></xml>`
	if _, err := s.PushMessage(t.Context(), Message{AppID: testAccount, Raw: []byte(raw), Skew: -time.Hour}); err != nil {
		t.Fatal(err)
	}
	if g.plains[len(g.plains)-1] != raw {
		t.Errorf("plaintext %s", g.plains[len(g.plains)-1])
	}
	if err := s.SetPushKeys(testAccount, testToken, otherKey); err != nil {
		t.Fatal(err)
	}
	if r, err := s.PushMessage(t.Context(), Message{AppID: testAccount}); err != nil || r.Last().Status != http.StatusForbidden {
		t.Errorf("after the rotation: %v %+v", err, r)
	}
	old := &PushKeys{Token: testToken, AESKey: testKey}
	if r, err := s.PushMessage(t.Context(), Message{AppID: testAccount, Keys: old}); err != nil || !r.OK() {
		t.Errorf("with the old key: %v %+v", err, r)
	}
	if s.SetPushKeys("wx0", testToken, testKey) == nil || s.SetPushKeys(testPlatform, testToken, "") == nil {
		t.Error("keys were set where they cannot be")
	}
}

func TestJSONMessageIDs(t *testing.T) {
	t.Parallel()
	s := newSim(t, func(c *Config) { c.Accounts[0].Format, c.Faults.StringNumbers = FormatJSON, 1 })
	g := newFakeGateway(t, testAccount, ModeSafe, func(string) string { return "" })
	s.SetMessageURL(testAccount, g.URL)
	if _, err := s.PushMessage(t.Context(), Message{AppID: testAccount}); err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal([]byte(g.plains[0]), &m); err != nil {
		t.Fatal(err)
	}
	if _, ok := m["MsgId"].(string); !ok {
		t.Errorf("MsgId of %s is no string", g.plains[0])
	}
}

func TestJSONReplies(t *testing.T) {
	t.Parallel()
	head := `{"ToUserName":"o1","FromUserName":"gh_1","CreateTime":"1400000000","MsgType":`
	for reply, saw := range map[string]string{
		head + `"text","Content":"a"}`:                                                                        "a",
		head + `"image","Image":{"MediaId":"M"}}`:                                                             "[image M]",
		head + `"news","ArticleCount":2,"Articles":[{"Title":"A"},{"Title":"B"}]}`:                            "A\nB",
		head + `"news","ArticleCount":"1","Articles":{"item":[{"Title":"A","Url":null}]}}`:                    "A",
		head + `"news","ArticleCount":9,"Articles":{"item":[` + strings.Repeat(`{"Title":"A"},`, 8) + `{}]}}`: "",
		head + `"text","Content":"a","Content":"b"}`:                                                          "",
		head + `"text","Content":"a"}}`:                                                                       "",
		head + `"text"`:                                                                                       "",
	} {
		j := judging{mode: ModePlain, format: FormatJSON, user: "o1", account: "gh_1", articles: manyArticles}
		v, err := j.read(Attempt{Status: http.StatusOK, Body: []byte(reply)})
		if (err == nil) != (saw != "") || err == nil && v.saw != saw {
			t.Errorf("%s: the user saw %q, %v; want %q", reply, v.saw, err, saw)
		}
	}
	own := judging{mode: ModePlain, format: FormatJSON, ownBody: wantsOwnBody("xpay_goods_deliver_notify")}
	if v, err := own.read(Attempt{Status: http.StatusOK, Body: []byte(`{"ErrCode":0}`)}); err != nil || v.kind != ReplyRaw {
		t.Errorf("%+v, %v", v, err)
	}
}
