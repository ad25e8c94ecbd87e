package main

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// What the gateways are configured with.
const (
	appID        = "wx2222222222222222"
	originalID   = "gh_0123456789ab"
	pushToken    = "benchmark-token"
	clientKey    = "benchmark-client-key-0123456789"
	accessToken  = "76_benchmark-AbCdEfGhIjKlMnOpQrStUvWxYz0123456789AbCdEfGhIjKlMnOpQrStUvWxYz0123456789AbCdEfGhIjKlMnOpQrStUvWx"
	openIDPrefix = "oBENCHMARK-" // and 17 digits: 28 characters, as WeChat's
)

// pushKey is the EncodingAESKey: 32 bytes that are no secret.
var pushKey = strings.TrimRight(base64.StdEncoding.EncodeToString([]byte("benchmark key of thirty-two byte")), "=")

// batch are requests, prepared so that sending them costs the generator a write each.
type batch struct {
	wire []byte   // the requests, one after the other
	ends []int    // where each ends in wire
	ids  []uint64 // what the reply to each must speak of
}

func (b *batch) len() int { return len(b.ends) }

func (b *batch) request(i int) []byte {
	if i == 0 {
		return b.wire[:b.ends[0]]
	}
	return b.wire[b.ends[i-1]:b.ends[i]]
}

func (b *batch) add(id uint64) { b.ends, b.ids = append(b.ends, len(b.wire)), append(b.ids, id) }

// traffic makes requests and knows the right replies. Both judgements say what is wrong with a reply, nothing if it is right.
type traffic interface {
	// prepare makes n requests that were never made before, for a server at host.
	prepare(n int, host string) (*batch, error)
	// glance judges each reply while the clock runs, and is cheap.
	glance(id uint64, body []byte) (wrong string)
	// inspect judges replies afterwards.
	inspect(id uint64, body []byte) (wrong string)
}

// ids gives every request of the run another number, and those of another run others: a gateway remembers messages, in a
// shared store for longer than one run.
var ids atomic.Uint64

func init() { ids.Store(uint64(time.Now().UnixNano())) } //nolint:gosec // after 1970

// The mix of pushes, by the size of the plaintext: of twenty, sixteen, three and one.
const (
	smallPush  = 512
	mediumPush = 1024
	largePush  = 4096
	replySize  = 320 // of a backend's plaintext reply
)

// pushSize is the size of the i-th push, the larger ones spread out.
func pushSize(i int) int {
	switch i * 7 % 20 {
	case 0:
		return largePush
	case 1, 8, 14:
		return mediumPush
	}
	return smallPush
}

// template is a text in which a decimal number has a place of its own.
type template struct {
	text   []byte
	at     int
	digits int
}

// newTemplate fills head + content + tail up to size. The number has the place of the zeroes in head or tail.
func newTemplate(head, tail string, size, digits int) template {
	const content = "你好，请问今天几点开门？hello "
	room := size - len(head) - len(tail)
	filler := bytes.ToValidUTF8([]byte(strings.Repeat(content, size/len(content)+1)[:room]), nil)
	text := head + string(filler) + strings.Repeat(".", room-len(filler)) + tail
	return template{text: []byte(text), at: strings.Index(text, strings.Repeat("0", digits)), digits: digits}
}

func (t template) append(dst []byte, id uint64) []byte {
	start := len(dst)
	dst = append(dst, t.text...)
	putDigits(dst[start+t.at:start+t.at+t.digits], id)
	return dst
}

// id reads the number from a text that is otherwise the template.
func (t template) id(b []byte) (uint64, bool) {
	end := t.at + t.digits
	if len(b) != len(t.text) || !bytes.Equal(b[:t.at], t.text[:t.at]) || !bytes.Equal(b[end:], t.text[end:]) {
		return 0, false
	}
	return digits(b[t.at:end])
}

func putDigits(dst []byte, n uint64) {
	for i := len(dst) - 1; i >= 0; i-- {
		dst[i] = byte('0' + n%10)
		n /= 10
	}
}

func digits(b []byte) (n uint64, ok bool) {
	for _, c := range b {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + uint64(c-'0')
	}
	return n, len(b) > 0
}

func pow10(n int) uint64 {
	p := uint64(1)
	for range n {
		p *= 10
	}
	return p
}

// The digits of an id in each place. A nonce has ten, as WeChat's have; the ids of a run differ in them.
const (
	msgIDDigits  = 19
	nonceDigits  = 10
	openIDDigits = 17
)

// The plaintexts of pushes by size, of their replies, and of answers to calls. CreateTime and openid have no run of zeroes as
// long as the places' own.
var (
	messages = map[int]template{smallPush: newMessage(smallPush), mediumPush: newMessage(mediumPush), largePush: newMessage(largePush)}
	reply    = newTemplate("<xml><ToUserName><![CDATA[oBENCHMARK-user-1234567890ab]]></ToUserName><FromUserName><![CDATA["+originalID+
		"]]></FromUserName><CreateTime>1715943330</CreateTime><MsgType><![CDATA[text]]></MsgType><Content><![CDATA["+
		strings.Repeat("0", nonceDigits)+" ", "]]></Content></xml>", replySize, nonceDigits)
	answer = template{
		text: []byte(`{"subscribe":1,"openid":"` + openIDPrefix + strings.Repeat("0", openIDDigits) + `","language":"zh_CN","subscribe_time":1715943329,` +
			`"unionid":"oUNIONID-1234567890abcdefghi","remark":"","groupid":2,"tagid_list":[128,2],"subscribe_scene":"ADD_SCENE_QR_CODE","qr_scene":98765,"qr_scene_str":""}`),
		at: len(`{"subscribe":1,"openid":"` + openIDPrefix), digits: openIDDigits,
	}
)

func newMessage(size int) template {
	return newTemplate("<xml><ToUserName><![CDATA["+originalID+"]]></ToUserName>\n<FromUserName><![CDATA[oBENCHMARK-user-1234567890ab]]></FromUserName>\n"+
		createTime+templateTime+"</CreateTime>\n<MsgType><![CDATA[text]]></MsgType>\n<Content><![CDATA[",
		"]]></Content>\n<MsgId>"+strings.Repeat("0", msgIDDigits)+"</MsgId>\n</xml>", size, msgIDDigits)
}

const (
	createTime   = "<CreateTime>"
	unixDigits   = 10
	templateTime = "1715943329"
)

// stamp writes the time into a message; it must be in it as WeChat has it, too. Messages that are compared are stamped alike.
func stamp(message []byte, timestamp string) {
	if at := bytes.Index(message, []byte(createTime)); at >= 0 && len(message) > at+len(createTime)+unixDigits {
		copy(message[at+len(createTime):][:unixDigits], timestamp)
	}
}

// pushes are encrypted messages as WeChat sends them to an account. The judge is package wxsim, which shares no code with the
// gateway.
type pushes struct {
	sealed bool // whether the replies are to be encrypted, as the gateway's are and stock Caddy's are not
}

func (p pushes) prepare(n int, host string) (*batch, error) {
	crypt, err := wxsim.NewCrypt(pushToken, pushKey, appID)
	if err != nil {
		return nil, err
	}
	b := &batch{wire: make([]byte, 0, n*1800), ends: make([]int, 0, n), ids: make([]uint64, 0, n)}
	timestamp := strconv.FormatInt(time.Now().Unix(), 10) // of sending; the gateway wants it within five minutes
	var plain, nonce []byte
	nonce = make([]byte, nonceDigits)
	for i := range n {
		id := ids.Add(1)
		plain = messages[pushSize(i)].append(plain[:0], id)
		stamp(plain, timestamp)
		encrypt, err := crypt.Seal(plain)
		if err != nil {
			return nil, err
		}
		putDigits(nonce, id)
		body := "<xml>\n    <ToUserName><![CDATA[" + originalID + "]]></ToUserName>\n    <Encrypt><![CDATA[" + encrypt + "]]></Encrypt>\n</xml>\n"
		b.wire = fmt.Appendf(b.wire, "POST /wx/message/%s?signature=%s&timestamp=%s&nonce=%s&openid=oBENCHMARK-user-1234567890ab&encrypt_type=aes&msg_signature=%s HTTP/1.1\r\n"+
			"User-Agent: Mozilla/4.0\r\nAccept: */*\r\nHost: %s\r\nPragma: no-cache\r\nConnection: Keep-Alive\r\nContent-Length: %d\r\nContent-Type: text/xml\r\n\r\n",
			appID, crypt.Sign(timestamp, string(nonce)), timestamp, nonce, crypt.Sign(timestamp, string(nonce), encrypt), host, len(body))
		b.wire = append(b.wire, body...)
		b.add(id)
	}
	return b, nil
}

func (p pushes) glance(id uint64, body []byte) string {
	if !p.sealed {
		return p.inspect(id, body)
	}
	if !bytes.HasPrefix(body, []byte("<xml>")) || !bytes.Contains(body, []byte("<Encrypt>")) {
		return "reply is not encrypted: " + excerpt(body)
	}
	return ""
}

func (p pushes) inspect(id uint64, body []byte) string {
	if !p.sealed {
		return judgeReply(id, body)
	}
	crypt, err := wxsim.NewCrypt(pushToken, pushKey, appID)
	if err != nil {
		return err.Error()
	}
	text := string(body)
	encrypt, timestamp, nonce := element(text, "Encrypt"), element(text, "TimeStamp"), element(text, "Nonce")
	if element(text, "MsgSignature") != crypt.Sign(timestamp, nonce, encrypt) {
		return "signature of the reply is wrong: " + excerpt(body)
	}
	plain, err := crypt.Open(encrypt)
	if err != nil {
		return "encrypted reply: " + err.Error()
	}
	return judgeReply(id, plain)
}

// judgeReply judges a reply in plaintext.
func judgeReply(id uint64, plain []byte) string {
	switch got, ok := reply.id(plain); {
	case !ok:
		return "reply is not the backend's: " + excerpt(plain)
	case got != id%pow10(nonceDigits):
		return "reply belongs to another push"
	}
	return ""
}

// element is the text of an element of a reply's envelope.
func element(text, name string) string {
	_, text, _ = strings.Cut(text, "<"+name+">")
	text, _, _ = strings.Cut(text, "</"+name+">")
	return strings.TrimSuffix(strings.TrimPrefix(text, "<![CDATA["), "]]>")
}

func excerpt(b []byte) string {
	const most = 120
	if len(b) > most {
		return fmt.Sprintf("%q…", b[:most])
	}
	return fmt.Sprintf("%q", b)
}

// calls ask WeChat's API about a user each.
type calls struct{}

func (calls) prepare(n int, host string) (*batch, error) {
	b := &batch{wire: make([]byte, 0, n*320), ends: make([]int, 0, n), ids: make([]uint64, 0, n)}
	number := make([]byte, openIDDigits)
	for range n {
		id := ids.Add(1)
		putDigits(number, id)
		b.wire = fmt.Appendf(b.wire, "GET /cgi-bin/user/info?openid=%s%s&lang=zh_CN HTTP/1.1\r\nHost: %s\r\nUser-Agent: sdk/1\r\nAccept: */*\r\n"+
			"Authorization: Bearer %s\r\nX-Wechat-Appid: %s\r\n\r\n", openIDPrefix, number, host, clientKey, appID)
		b.add(id)
	}
	return b, nil
}

func (c calls) glance(id uint64, body []byte) string { return c.inspect(id, body) }

func (calls) inspect(id uint64, body []byte) string {
	switch got, ok := answer.id(body); {
	case !ok:
		return "answer is not WeChat's: " + excerpt(body)
	case got != id%pow10(openIDDigits):
		return "answer belongs to another call"
	}
	return ""
}

// pages ask for what Caddy's respond answers by itself.
type pages struct{}

const page = "benchmark"

func (pages) prepare(n int, host string) (*batch, error) {
	b := &batch{wire: make([]byte, 0, n*100), ends: make([]int, 0, n), ids: make([]uint64, 0, n)}
	for range n {
		id := ids.Add(1)
		b.wire = fmt.Appendf(b.wire, "GET /page/%d HTTP/1.1\r\nHost: %s\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n", id, host)
		b.add(id)
	}
	return b, nil
}

func (p pages) glance(id uint64, body []byte) string { return p.inspect(id, body) }

func (pages) inspect(_ uint64, body []byte) string {
	if string(body) != page {
		return "page is another one: " + excerpt(body)
	}
	return ""
}
