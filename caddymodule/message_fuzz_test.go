package caddymodule

import (
	"bytes"
	"cmp"
	"crypto/sha1" //nolint:gosec // WeChat's protocol
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/internal/stall"
)

const (
	plainModeID    = "wx5555555555555555"
	plainModeToken = "plain-token"
	compatID       = "wx6666666666666666"
	compatToken    = "compat-token"
	compatKey      = "mNnY5GekpChwqhy2c4NBH90g3hND6GeI4gii2YCvKLY"

	// fuzzWindow lets the official vectors pass, which are years old.
	fuzzWindow  = 40 * 365 * 24 * time.Hour
	fuzzMaxBody = 64 << 10
	// fuzzGoroutines is how many more goroutines than at the start may be there between two pushes: those that exchange
	// authorization codes in the background end by themselves.
	fuzzGoroutines = 100
)

// What the bits of a fuzzed push's first argument choose. Below fuzzSender the push goes out as it is, else sealed by a
// sender of the list.
const (
	fuzzSender  = 0x7 << 0
	fuzzPath    = 0x3 << 3
	fuzzBackend = 0x7 << 5
	fuzzMethod  = 0x3 << 8
	fuzzJSON    = 0x1 << 10
)

func fuzzBits(how, mask uint16) int { return int(how&mask) / int(mask&-mask) }

// fuzzVector is one of the official examples of encrypted messages.
type fuzzVector struct {
	Token        string `json:"token"`
	AESKey       string `json:"encoding_aes_key"`
	AppID        string `json:"appid"`
	Timestamp    string `json:"timestamp"`
	Nonce        string `json:"nonce"`
	Encrypt      string `json:"encrypt"`
	MsgSignature string `json:"msg_signature"`
	ReceiveID    string `json:"receive_id"`
}

func fuzzVectors(f *testing.F) []fuzzVector {
	f.Helper()
	data, err := os.ReadFile("../crypto/testdata/vectors.json")
	if err != nil {
		f.Fatal(err)
	}
	var file struct {
		Messages []fuzzVector `json:"message_crypto"`
	}
	if err := json.Unmarshal(data, &file); err != nil {
		f.Fatal(err)
	}
	return slices.DeleteFunc(file.Messages, func(v fuzzVector) bool {
		return !isAppID(v.AppID) || v.ReceiveID != v.AppID || v.Token == "" || v.Timestamp == "" || v.Encrypt == ""
	})
}

// fuzzTarget is a gateway with two platforms and an account of each mode, whose pushes are fuzzed.
type fuzzTarget struct {
	m       *Message
	senders []*sender // of the accounts and platforms; the one in plaintext mode seals nothing
	vectors []fuzzVector
	tokens  []string        // that sign a handshake or a push in plaintext mode
	codecs  []*crypto.Codec // that open what was rightly sealed
	running int             // goroutines
	watch   *stall.Watch
}

func newFuzzTarget(f *testing.F) *fuzzTarget {
	f.Helper()
	var config map[string]any
	if err := json.Unmarshal([]byte(testConfig("")), &config); err != nil {
		f.Fatal(err)
	}
	t := &fuzzTarget{vectors: fuzzVectors(f)}
	accounts := config["accounts"].([]any)
	account := func(appid, token, key, mode string) {
		a := map[string]any{"appid": appid, "secret": "account-secret", "tokens": []string{token}, "mode": mode}
		if key != "" {
			a["aes_keys"] = []string{key}
		}
		accounts = append(accounts, a)
	}
	account(plainModeID, plainModeToken, "", "plain")
	account(compatID, compatToken, compatKey, "compat")
	known := make(map[string]bool)
	for _, v := range t.vectors {
		if !known[v.AppID] { // an appid with two tokens keeps the first
			known[v.AppID] = true
			account(v.AppID, v.Token, v.AESKey, "safe")
		}
		t.add(newSender(f, v.AppID, v.Token, v.AESKey), v.Token)
	}
	config["accounts"] = accounts
	written, err := json.Marshal(config)
	if err != nil {
		f.Fatal(err)
	}
	app, ctx := newTestApp(f, string(written))
	app.logger = zap.NewNop()
	t.m = &Message{TimestampWindow: caddy.Duration(fuzzWindow), MaxBody: fuzzMaxBody, FallbackText: "稍后回复您"}
	if err := t.m.Provision(ctx); err != nil {
		f.Fatal(err)
	}
	if err := t.m.Validate(); err != nil {
		f.Fatal(err)
	}
	t.senders = []*sender{
		platformSender(f), newSender(f, platformID, platformToken, platformOldKey), newSender(f, otherPlatform, otherToken, otherKey),
		accountSender(f), newSender(f, compatID, compatToken, compatKey), newPlainSender(f),
	}
	for i, token := range []string{platformToken, platformToken, otherToken, accountToken, compatToken} {
		t.add(t.senders[i], token)
	}
	t.tokens = append(t.tokens, plainModeToken)
	_ = app.manager()
	t.watch = stall.New(f)
	t.running = runtime.NumGoroutine()
	return t
}

func (t *fuzzTarget) add(s *sender, token string) {
	t.tokens, t.codecs = append(t.tokens, token), append(t.codecs, s.codec)
}

// newPlainSender signs for the account in plaintext mode. A codec needs a key to seal with, which is never used.
func newPlainSender(t testing.TB) *sender {
	return newSender(t, plainModeID, plainModeToken, "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA")
}

// fuzzed is one push, and what may come of it.
type fuzzed struct {
	target     *fuzzTarget
	r          *http.Request
	body       []byte // as sent
	sender     *sender
	plain      bool   // of the account in plaintext mode
	message    []byte // what the sender sealed
	called     int
	answer     []byte // what the backend gives
	unexpected string // what the backend was given and should not have been
}

// push makes the push that the fuzzer describes. It reports false for a query that no HTTP server would let pass.
func (t *fuzzTarget) push(how uint16, query string, body, answer []byte) (*fuzzed, bool) {
	if strings.ContainsFunc(query, func(c rune) bool { return c <= ' ' || c == 0x7f }) {
		return nil, false
	}
	p := &fuzzed{target: t, body: body, answer: answer}
	path := "/wx/message/" + authorizerID
	if i := fuzzBits(how, fuzzSender); i > 0 && i <= len(t.senders) {
		p.sender, p.message = t.senders[i-1], body
		p.plain = i == len(t.senders)
		var sealed string
		p.body, sealed = p.seal(how&fuzzJSON != 0)
		if query != "" {
			sealed += "&" + query
		}
		query = sealed
		if p.sender.codec.ReceiveID() != platformID && p.sender.codec.ReceiveID() != otherPlatform {
			path = "/wx/message/" + p.sender.codec.ReceiveID()
		}
	} else if i > len(t.senders) {
		path = "/wx/message/" + plainModeID
	}
	switch fuzzBits(how, fuzzPath) {
	case 1:
		path = "/wx/message/" + accountID
	case 2:
		path = "/" + platformID + path
	case 3:
		path = "/wx/message/" + t.vectors[len(query)%len(t.vectors)].AppID
	}
	u := &url.URL{Path: path, RawQuery: query}
	p.r = &http.Request{
		Method: []string{http.MethodPost, http.MethodPost, http.MethodGet, http.MethodPut}[fuzzBits(how, fuzzMethod)], URL: u,
		RequestURI: path + "?" + query, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Host: "wechat.example.com",
		RemoteAddr: "192.0.2.1:1234", Header: http.Header{"Content-Type": {"text/xml"}},
		Body: io.NopCloser(bytes.NewReader(p.body)), ContentLength: int64(len(p.body)),
	}
	return p, true
}

// seal is the push that WeChat makes of the message.
func (p *fuzzed) seal(asJSON bool) (body []byte, query string) {
	// One nonce for each body, as WeChat has it: in plaintext mode a nonce is good for one body alone.
	sum := sha1.Sum(p.message) //nolint:gosec // no secret
	nonce := hex.EncodeToString(sum[:8])
	stamp := strconv.FormatInt(p.sender.at.Unix(), 10)
	q := "signature=" + p.sender.codec.Signature(stamp, nonce) + "&timestamp=" + stamp + "&nonce=" + nonce + "&openid=" + openID
	if p.plain {
		return p.message, q
	}
	format := crypto.FormatXML
	if asJSON {
		format = crypto.FormatJSON
	}
	body, signature, err := p.sender.codec.SealPush(new(crypto.Buffers), format, "ToUserName", ghID, p.sender.at.Unix(), nonce, p.message)
	if err != nil {
		p.sender.t.Fatal(err)
	}
	return body, q + "&encrypt_type=aes&msg_signature=" + signature
}

// backend answers, in all the ways in which a backend can, and notes whether it should have been asked.
func (p *fuzzed) backend(how uint16) caddyhttp.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) error {
		p.called++
		given, err := io.ReadAll(r.Body)
		if err != nil {
			p.unexpected = "the body cannot be read: " + err.Error()
		}
		p.check(r, given)
		switch fuzzBits(how, fuzzBackend) {
		case 1:
			panic("a handler's mistake")
		case 2:
			_, _ = w.Write(p.answer)
			panic(http.ErrAbortHandler)
		case 3:
			return errors.New("a handler's error")
		case 4:
			w.WriteHeader(http.StatusInternalServerError)
		case 5:
			http.Redirect(w, r, "/elsewhere", http.StatusFound)
		case 6:
			w.WriteHeader(http.StatusNoContent)
			return nil
		case 7:
			_, _ = io.WriteString(w, "\xef\xbb\xbf \n")
		}
		half := len(p.answer) / 2
		_, _ = w.Write(p.answer[:half])
		_, _ = w.Write(p.answer[half:])
		return nil
	}
}

// check finds out whether the backend was given what somebody with the right credentials sent, and nothing else.
func (p *fuzzed) check(r *http.Request, given []byte) {
	appid := r.Header.Get("X-Wechat-Appid")
	switch {
	case r.Method != http.MethodPost:
		p.unexpected = "a request by " + r.Method
	case p.sender != nil && !bytes.Equal(given, p.message):
		p.unexpected = fmt.Sprintf("another text than was sealed: %q", given)
	case p.sender != nil:
	case p.target.signsSealed(p.r.URL.RawQuery, p.body):
	case appid == plainModeID && p.target.signsPlain(p.r.URL.RawQuery) && bytes.Equal(given, p.body):
	default:
		p.unexpected = fmt.Sprintf("what nobody signed, for %s: %q", appid, given)
	}
	if r.ContentLength != int64(len(given)) || r.Header.Get("Accept-Encoding") != "" {
		p.unexpected = cmp.Or(p.unexpected, fmt.Sprintf("%d bytes as %d, %v", len(given), r.ContentLength, r.Header))
	}
	if q := r.URL.Query(); q.Has("msg_signature") || q.Has("encrypt_type") {
		p.unexpected = cmp.Or(p.unexpected, "a query that says encrypted: "+r.URL.RawQuery)
	}
}

// signsPlain reports whether a query has the signature of the account in plaintext mode.
func (t *fuzzTarget) signsPlain(rawQuery string) bool {
	q := parseFuzzQuery(rawQuery)
	return q["signature"] == sha1Of(plainModeToken, q["timestamp"], q["nonce"])
}

// signsSealed reports whether somebody with a right token signed the Encrypt element of a body, reading both a second way.
func (t *fuzzTarget) signsSealed(rawQuery string, body []byte) bool {
	var envelope struct{ Encrypt string }
	body = bytes.TrimSpace(bytes.TrimPrefix(body, byteOrderMark))
	if bytes.HasPrefix(body, []byte("{")) {
		if json.Unmarshal(body, &envelope) != nil {
			return false
		}
	} else if xml.Unmarshal(bytes.Map(withoutControl, body), &envelope) != nil {
		return false
	}
	q := parseFuzzQuery(rawQuery)
	return slices.ContainsFunc(t.tokens, func(token string) bool {
		return q["msg_signature"] == sha1Of(token, q["timestamp"], q["nonce"], envelope.Encrypt)
	})
}

// withoutControl leaves out the control characters that a user's text may hold and encoding/xml does not read.
func withoutControl(r rune) rune {
	if r > 0 && r < ' ' && r != '\t' && r != '\n' && r != '\r' {
		return -1
	}
	return r
}

// signsEcho reports whether a query is a handshake that somebody with a right token signed.
func (t *fuzzTarget) signsEcho(rawQuery string) bool {
	q := parseFuzzQuery(rawQuery)
	return slices.ContainsFunc(t.tokens, func(token string) bool {
		return q["msg_signature"] == "" && q["signature"] == sha1Of(token, q["timestamp"], q["nonce"]) ||
			q["msg_signature"] == sha1Of(token, q["timestamp"], q["nonce"], q["echostr"])
	})
}

// parseFuzzQuery reads a query a second way.
func parseFuzzQuery(raw string) map[string]string {
	values := make(map[string]string)
	for pair := range strings.SplitSeq(raw, "&") {
		name, value, _ := strings.Cut(pair, "=")
		if text, err := url.QueryUnescape(value); err == nil {
			values[name] = text
		}
	}
	return values
}

func sha1Of(parts ...string) string {
	slices.Sort(parts)
	sum := sha1.Sum([]byte(strings.Join(parts, ""))) //nolint:gosec // WeChat's protocol
	return hex.EncodeToString(sum[:])
}

// judge holds the answer against what may be answered.
func (p *fuzzed) judge(t *testing.T, rec *httptest.ResponseRecorder) {
	t.Helper()
	if p.unexpected != "" {
		t.Errorf("the backend was given %s", p.unexpected)
	}
	if p.called > 1 {
		t.Errorf("the backend was called %d times", p.called)
	}
	body := rec.Body.Bytes()
	switch rec.Code {
	case http.StatusOK:
	case http.StatusBadRequest, http.StatusForbidden, http.StatusMethodNotAllowed, http.StatusRequestEntityTooLarge, http.StatusServiceUnavailable:
		if p.called > 0 {
			t.Errorf("refused with %d after the backend was asked", rec.Code)
		}
		return
	default:
		t.Errorf("status %d", rec.Code)
		return
	}
	if p.r.Method == http.MethodGet {
		if !p.target.signsEcho(p.r.URL.RawQuery) {
			t.Errorf("a handshake that nobody signed was answered %q", body)
		}
		return
	}
	if len(body) == 0 || bytes.Equal(body, success) {
		return
	}
	if p.sender != nil && !p.plain {
		if _, err := p.sender.codec.OpenReply(body); err == nil {
			return
		}
	}
	if p.sender == nil && slices.ContainsFunc(p.target.codecs, func(c *crypto.Codec) bool { _, err := c.OpenReply(body); return err == nil }) {
		return
	}
	if p.plain || p.target.signsPlain(p.r.URL.RawQuery) {
		if body[0] == '<' || body[0] == '{' {
			return
		}
	}
	t.Errorf("answered with neither nothing, nor success, nor what the sender can open: %q", body)
}

// FuzzPush fuzzes the whole handler of pushes: any query and body, as they are or sealed with the right key; any answer of
// the backend. No input makes it panic or hang, nothing reaches the backend that was not signed or sealed with the right
// credentials, and what WeChat is answered is legal.
func FuzzPush(f *testing.F) {
	target := newFuzzTarget(f)
	message := []byte(textMessage("你好"))
	reply := []byte(replyXML)
	for i := range uint16(8) {
		f.Add(i, "", message, reply)
		f.Add(i|fuzzJSON, "wx_trace=1", []byte(`{"ToUserName":"gh_1","FromUserName":"o1","CreateTime":`+createTime+`,"MsgType":"text","Content":"x","MsgId":6054768590064713728}`),
			[]byte(`{"ToUserName":"o1","MsgType":"text","Content":"y"}`))
		f.Add(1|i<<5, "", []byte(textMessage("backend "+strconv.Itoa(int(i)))), reply)
	}
	for _, text := range []string{
		strings.Replace(textMessage("这个不会过期"), "<CreateTime>"+createTime+"</CreateTime>", "", 1), // what the fuzzer makes of it stays fresh
		"<xml><AppId>" + platformID + "</AppId><CreateTime>" + createTime + "</CreateTime><InfoType>component_verify_ticket</InfoType><ComponentVerifyTicket>ticket@@@1</ComponentVerifyTicket></xml>",
		"<xml><AppId>" + platformID + "</AppId><CreateTime>" + createTime + "</CreateTime><InfoType>unauthorized</InfoType><AuthorizerAppid>" + authorizerID + "</AuthorizerAppid></xml>",
		"<xml><ToUserName>" + ghID + "</ToUserName><FromUserName>o</FromUserName><CreateTime>" + createTime + "</CreateTime><MsgType>event</MsgType><Event>CLICK</Event><EventKey>k</EventKey></xml>",
		"<xml><ToUserName>gh_3c884a361561</ToUserName><FromUserName>o</FromUserName><CreateTime>" + createTime + "</CreateTime><MsgType>text</MsgType><Content>TESTCOMPONENT_MSG_TYPE_TEXT</Content></xml>",
	} {
		f.Add(uint16(1), "", []byte(text), []byte("success"))
	}
	for i, v := range target.vectors {
		query := url.Values{"signature": {sha1Of(v.Token, v.Timestamp, v.Nonce)}, "msg_signature": {v.MsgSignature}, "timestamp": {v.Timestamp}, "nonce": {v.Nonce}, "encrypt_type": {"aes"}}.Encode()
		for len(query)%len(target.vectors) != i { // the path is chosen by the length
			query += "&"
		}
		f.Add(uint16(fuzzPath), query, []byte("<xml><ToUserName><![CDATA[gh_1]]></ToUserName><Encrypt><![CDATA["+v.Encrypt+"]]></Encrypt></xml>"), reply)
		f.Add(uint16(fuzzPath), query, []byte(`{"ToUserName":"gh_1","Encrypt":"`+v.Encrypt+`"}`), reply)
	}
	// Pushes that are right as they are, with all that WeChat sends: what the fuzzer changes in them is not signed.
	for i, s := range target.senders {
		p, _ := target.push(uint16(i+1), "", message, nil)
		how := uint16(0)
		if s.codec.ReceiveID() == accountID {
			how = 1 << 3
		} else if p.plain {
			how = fuzzSender
		}
		f.Add(how, p.r.URL.RawQuery, p.body, reply)
	}
	stamp := strconv.FormatInt(time.Now().Unix(), 10)
	f.Add(uint16(2<<8), "signature="+sha1Of(platformToken, stamp, "1")+"&timestamp="+stamp+"&nonce=1&echostr=echo%2B1", []byte{}, []byte{})

	f.Fuzz(func(t *testing.T, how uint16, query string, body, answer []byte) {
		p, ok := target.push(how, query, body, answer)
		if !ok {
			return
		}
		rec := httptest.NewRecorder()
		r := caddyhttp.PrepareRequest(p.r, caddy.NewReplacer(), rec, &caddyhttp.Server{})
		begun := time.Now()
		if err := target.m.ServeHTTP(rec, r, p.backend(how)); err != nil {
			t.Errorf("handler returned an error, with which Caddy would log the URI: %v", err)
		}
		if took := target.watch.Since(begun); took > time.Second {
			t.Errorf("took %v, and the backend answers at once", took)
		}
		p.judge(t, rec)
		target.checkGoroutines(t)
	})
}

// checkGoroutines fails when goroutines pile up.
func (t *fuzzTarget) checkGoroutines(tb *testing.T) {
	tb.Helper()
	for begun := time.Now(); runtime.NumGoroutine() > t.running+fuzzGoroutines; time.Sleep(10 * time.Millisecond) {
		if time.Since(begun) > backgroundTimeout+time.Second {
			tb.Fatalf("%d goroutines, at the start %d", runtime.NumGoroutine(), t.running)
		}
	}
}
