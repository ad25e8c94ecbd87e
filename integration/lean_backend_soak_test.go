//go:build soak

package integration_test

import (
	"bufio"
	"bytes"
	"context"
	little "encoding/binary"
	"encoding/xml"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// leanWant is what a client is to get of an answer.
type leanWant string

const (
	wantWhole   leanWant = "whole"
	wantCut     leanWant = "broken off"
	wantRefused leanWant = "502"
	wantTimeout leanWant = "504"
	wantStrict  leanWant = "502 of wechat_lean" // one of the differences that LeanTransport documents
	wantAny     leanWant = "whole, broken off or 502"
)

// leanScript is how a backend answers one request.
type leanScript struct {
	name   string
	want   leanWant
	fickle bool // leaves a connection that is not fit for another request, and does not say so
	web    bool // not for pushes
	head   bool // for HEAD as well
	bare   bool // the answer has no body
	before bool // 1xx come before it
	act    func(x *hostile) (again bool)
}

// leanOrdinary is how many scripts, from the first, leave their connection to the next request.
const leanOrdinary = 3

var leanScripts = []*leanScript{
	{name: "at once", want: wantWhole, head: true, act: func(x *hostile) bool { return x.drain() && x.say(x.head(x.length()), x.payload()) }},
	{name: "in pieces", want: wantWhole, head: true, act: func(x *hostile) bool { return x.drain() && x.pieces(x.head(x.length())+x.payload()) }},
	{name: "chunked, extensions, trailer", want: wantWhole, head: true, act: func(x *hostile) bool { return x.drain() && x.chunked(true) }},
	{name: "until close", want: wantWhole, act: func(x *hostile) bool {
		_ = x.drain() && x.pieces(x.head(x.oneOf("", "Connection: close\r\n"))+x.payload())
		return false
	}},
	{name: "HTTP/1.0", want: wantWhole, act: func(x *hostile) bool {
		x.version = "HTTP/1.0"
		if x.dice.IntN(2) == 0 {
			return x.drain() && x.say(x.head("Connection: keep-alive\r\n"+x.length()), x.payload())
		}
		_ = x.drain() && x.say(x.head(x.oneOf("", x.length())), x.payload())
		return false
	}},
	{name: "1xx before", want: wantWhole, head: true, before: true, act: func(x *hostile) bool {
		early := strings.Repeat("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", 1+x.dice.IntN(3))
		return x.drain() && x.pieces(early+x.oneOf("", "HTTP/1.1 102 Processing\r\n\r\n")+x.head(x.length())+x.payload())
	}},
	{name: "100 Continue", want: wantWhole, before: true, act: func(x *hostile) bool {
		return x.say("HTTP/1.1 100 Continue\r\n\r\n") && x.drain() && x.say(x.head(x.length()), x.payload())
	}},
	{name: "early, reads on", want: wantWhole, web: true, act: func(x *hostile) bool {
		x.early = true
		return x.say(x.head(x.length()), x.payload()) && x.drain()
	}},
	{name: "early, closes", want: wantAny, web: true, act: func(x *hostile) bool {
		x.say(x.head("Connection: close\r\n"+x.length()), x.payload())
		return false
	}},
	{name: "empty", want: wantWhole, web: true, head: true, bare: true, act: func(x *hostile) bool {
		x.body = ""
		if x.dice.IntN(2) == 0 {
			return x.drain() && x.say(x.head("Content-Length: 0\r\n"))
		}
		return x.drain() && x.chunked(false)
	}},
	{name: "204", want: wantWhole, web: true, head: true, bare: true, act: func(x *hostile) bool {
		x.status = "204 No Content"
		return x.drain() && x.say(x.head(""))
	}},
	{name: "304", want: wantWhole, web: true, head: true, bare: true, act: func(x *hostile) bool {
		x.status = "304 Not Modified"
		return x.drain() && x.say(x.head(x.oneOf("", x.length())))
	}},
	{name: "upgrade", web: true, act: func(x *hostile) bool {
		x.status = "101 Switching Protocols"
		if x.say(x.head("Connection: Upgrade\r\nUpgrade: echo\r\n")) {
			_ = x.conn.SetDeadline(time.Now().Add(leanPatience))
			_, _ = io.Copy(x.conn, x.br)
		}
		return false
	}},

	{name: "closes, unsaid", want: wantWhole, fickle: true, act: func(x *hostile) bool {
		if x.drain() && x.say(x.head(x.length()), x.payload()) && x.dice.IntN(2) == 0 {
			x.pause(time.Duration(x.dice.IntN(8000)) * time.Microsecond)
		}
		return false
	}},
	{name: "RST after", want: wantAny, fickle: true, act: func(x *hostile) bool {
		if x.drain() && x.say(x.head(x.length()), x.payload()) && x.dice.IntN(2) == 0 {
			x.pause(time.Duration(x.dice.IntN(8000)) * time.Microsecond)
		}
		return x.reset()
	}},
	{name: "two answers", want: wantWhole, fickle: true, act: func(x *hostile) bool {
		x.body = x.body[:min(len(x.body), atomicAnswer)] // else the second could be on its way still, which nobody can know
		if x.drain() && x.say(x.head(x.length())+x.payload()+extraAnswer) {
			x.heardAgain("an answer that nobody had asked for was with the last", x.pool.transport == lean)
		}
		return false
	}},
	{name: "another answer later", want: wantWhole, fickle: true, act: func(x *hostile) bool {
		if x.drain() && x.say(x.head(x.length()), x.payload()) {
			x.pause(time.Duration(1+x.dice.IntN(20)) * time.Millisecond)
			if x.br.Buffered() > 0 || !x.say(extraAnswer) {
				return false
			}
			x.heardAgain("", false) // it may have been on its way already
		}
		return false
	}},

	{name: "hangs up", want: wantRefused, act: func(x *hostile) bool { x.drain(); return false }},
	{name: "RST before", want: wantRefused, act: func(x *hostile) bool {
		_ = x.dice.IntN(2) == 0 && x.drain()
		return x.reset()
	}},
	{name: "half a head", want: wantRefused, act: func(x *hostile) bool {
		_ = x.drain() && x.say(x.head(x.length())[:20+x.dice.IntN(20)])
		return false
	}},
	{name: "garbage", want: wantRefused, act: func(x *hostile) bool {
		junk := make([]byte, 1+x.dice.IntN(8<<10))
		for i := range junk {
			junk[i] = byte(x.dice.UintN(256))
		}
		junk[0] = '\x16'
		_ = x.drain() && x.say(string(junk))
		return false
	}},
	{name: "head too large", want: wantRefused, act: func(x *hostile) bool {
		return x.drain() && x.say(x.head(x.length()+strings.Repeat("X-Long: "+strings.Repeat("x", 2000)+"\r\n", 80)), x.payload())
	}},
	{name: "head of 30 KB", want: wantWhole, head: true, act: func(x *hostile) bool {
		return x.drain() && x.pieces(x.head(x.length()+strings.Repeat("X-Long: "+strings.Repeat("x", 2000)+"\r\n", 15))+x.payload())
	}},
	{name: "silence", want: wantTimeout, act: func(x *hostile) bool {
		_ = x.conn.SetReadDeadline(time.Now().Add(leanPatience))
		_ = x.drain()
		_, _ = x.br.ReadByte() // until the gateway hangs up
		return false
	}},
	{name: "RST within", want: wantCut, act: func(x *hostile) bool {
		x.fill()
		_ = x.drain() && x.say(x.head(x.length()), x.body[:x.dice.IntN(len(x.body))])
		x.pause(time.Duration(x.dice.IntN(3)) * time.Millisecond)
		return x.reset()
	}},
	{name: "ends within", want: wantCut, act: func(x *hostile) bool {
		x.fill()
		_ = x.drain() && x.say(x.head(x.length()), x.body[:x.dice.IntN(len(x.body))])
		return false
	}},
	{name: "ends between chunks", want: wantCut, act: func(x *hostile) bool {
		x.fill()
		part := x.body[:1+x.dice.IntN(len(x.body))]
		_ = x.drain() && x.say(x.head("Transfer-Encoding: chunked\r\n"), fmt.Sprintf("%x\r\n%s\r\n", len(part), part))
		return false
	}},
	{name: "no chunk", want: wantCut, act: func(x *hostile) bool {
		x.fill()
		part := x.body[:1+x.dice.IntN(len(x.body))]
		_ = x.drain() && x.say(x.head("Transfer-Encoding: chunked\r\n"), fmt.Sprintf("%x\r\n%s%s", len(part), part, x.oneOf("\r\nzz\r\n", "x\r\n0\r\n\r\n", "\r\n-1\r\n", "\r\nfffffffffffffffff\r\n")))
		return false
	}},

	{name: "LF alone", want: wantWhole, head: true, act: odd(func(x *hostile) bool {
		if !x.drain() {
			return false
		}
		head := x.head(x.oneOf("", "X-A: b\r\n") + x.length())
		if x.dice.IntN(2) == 0 {
			head = strings.ReplaceAll(head, "\r", "")
		} else {
			head = strings.Replace(head, "\r\n", "\n", 1+x.dice.IntN(4))
		}
		return x.pieces(head + x.payload())
	})},
	{name: "LF alone in a 1xx", want: wantWhole, head: true, before: true, act: odd(func(x *hostile) bool {
		return x.drain() && x.pieces("HTTP/1.1 103 Early Hints\nLink: </a>\n\n"+x.head(x.length())+x.payload())
	})},
	{name: "folded", want: wantWhole, head: true, act: odd(func(x *hostile) bool {
		return x.drain() && x.pieces(x.head("X-A: b"+x.oneOf("\r\n c\r\n", "\r\n\tc\r\n  d\r\n", "\n c\n")+x.length())+x.payload())
	})},
	{name: "length and chunks", want: wantWhole, head: true, act: odd(func(x *hostile) bool {
		x.fields += x.oneOf("Content-Length: 1\r\n", "Content-Length: 0\r\n", x.length())
		return x.drain() && x.chunked(x.dice.IntN(2) == 0)
	})},
	{name: "length and no chunks", want: wantCut, act: func(x *hostile) bool {
		if x.fill(); !x.push {
			x.body = "not a chunk " + x.body
		}
		_ = x.drain() && x.say(x.head(x.length()+"Transfer-Encoding: chunked\r\n"), x.payload())
		return false
	}},

	{name: "two lengths", want: wantStrict, act: framed(func(x *hostile) string { return x.length() + "Content-Length: 1\r\n" })},
	{name: "no length", want: wantStrict, act: framed(func(x *hostile) string { return "Content-Length: " + x.oneOf("-1", "+1", "0x1", "1, 1", "") + "\r\n" })},
	{name: "space before the colon", want: wantStrict, act: framed(func(x *hostile) string { return "X-A : b\r\n" + x.length() })},
	{name: "folded first", want: wantRefused, act: func(x *hostile) bool {
		x.fields = " X-A: b\r\n" + x.fields
		_ = x.drain() && x.say(x.head(x.length()), x.payload())
		return false
	}},
	{name: "chunked in HTTP/1.0", want: wantStrict, act: func(x *hostile) bool {
		x.version = "HTTP/1.0"
		_ = x.drain() && x.chunked(false)
		return false
	}},
}

// odd is an answer that wechat_lean takes although it is not to the letter, and whose connection it has no more use for.
func odd(act func(x *hostile) bool) func(x *hostile) bool {
	return func(x *hostile) bool {
		again := act(x)
		if again && x.pool.transport == lean {
			x.heardAgain("its last answer was odd", true)
			return false
		}
		return again
	}
}

// framed answers with a head that two readers might understand in two ways, and hangs up.
func framed(fields func(x *hostile) string) func(x *hostile) bool {
	return func(x *hostile) bool {
		_ = x.drain() && x.say(x.head(fields(x)), x.payload())
		return false
	}
}

const (
	lean         = "wechat_lean"
	leanPatience = 20 * time.Second
	// atomicAnswer is how long a body may be for its whole answer, and another, to arrive in one segment and one record of TLS.
	atomicAnswer = 8 << 10
	extraAnswer  = "HTTP/1.1 200 OK\r\nX-Extra: 1\r\nContent-Length: 5\r\n\r\nextra"
)

// leanPool is a route of the gateway's with a transport of its own, and what listens behind it.
type leanPool struct {
	transport, kind string
	limit           int64 // max_conns_per_host
	address         string
	net.Listener
	open, most atomic.Int64 // connections
	strays     atomic.Int64 // requests on connections that had said something unasked
}

func (p *leanPool) name() string { return p.transport + "-" + p.kind }

// leanBackend is a backend that does to each request as the request says, on bare sockets.
type leanBackend struct {
	over  context.Context
	wrong func(format string, args ...any)
	wg    sync.WaitGroup

	mu   sync.Mutex
	seen map[uint64]leanSight // by nonce
}

// leanSight is how often a request was seen, and what it asked for.
type leanSight struct {
	times    int
	script   *leanScript
	request  string // method and length, as it was seen last
	harmless bool   // it may be sent once more: each time it was a GET or HEAD without a body
}

// saw reports whether any request with that nonce arrived.
func (b *leanBackend) saw(nonce uint64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.seen[nonce].times > 0
}

// serve accepts connections until the listener is closed.
func (b *leanBackend) serve(p *leanPool) {
	b.wg.Go(func() {
		for {
			conn, err := p.Accept()
			if err != nil {
				return
			}
			n := p.open.Add(1)
			for most := p.most.Load(); n > most && !p.most.CompareAndSwap(most, n); most = p.most.Load() {
			}
			b.wg.Go(func() {
				defer p.open.Add(-1)
				defer func() { _ = conn.Close() }()
				stop := context.AfterFunc(b.over, func() { _ = conn.Close() })
				defer stop()
				br := bufio.NewReader(conn)
				for b.one(p, conn, br) {
				}
			})
		}
	})
}

// hostile is one request at the backend.
type hostile struct {
	*leanBackend
	pool *leanPool
	conn net.Conn
	br   *bufio.Reader
	req  *http.Request
	dice *rand.Rand

	nonce           uint64
	up              int
	version, status string
	fields          string
	body            string
	push            bool
	early           bool   // the answer did not wait for the request
	trailer         string // of the request
}

// overLean is the bit of a nonce that says that the request goes over wechat_lean.
const (
	overLean  = 1 << iota
	nonceBits = iota
)

// one reads a request and answers it, and reports whether the connection can have another.
func (b *leanBackend) one(p *leanPool, conn net.Conn, br *bufio.Reader) bool {
	req, err := http.ReadRequest(br)
	if err != nil {
		return false
	}
	x := &hostile{leanBackend: b, pool: p, conn: conn, br: br, req: req, version: "HTTP/1.1", status: "200 OK"}
	script, ok := x.read()
	if !ok {
		b.wrong("%s: the backend got %s %s, which is no script", p.name(), req.Method, req.RequestURI)
		return false
	}
	b.mu.Lock()
	before := b.seen[x.nonce]
	harmless := (req.Method == http.MethodGet || req.Method == http.MethodHead) && req.ContentLength == 0
	b.seen[x.nonce] = leanSight{
		before.times + 1, script, fmt.Sprintf("%s of %d bytes", req.Method, req.ContentLength), harmless && (before.times == 0 || before.harmless),
	}
	b.mu.Unlock()
	_ = conn.SetDeadline(time.Now().Add(leanPatience))
	defer func() { _ = conn.SetDeadline(time.Time{}) }()
	return script.act(x)
}

// read finds out what to do: from the query, or from the message that WeChat pushed.
func (x *hostile) read() (*leanScript, bool) {
	q := x.req.URL.Query()
	var number, nonce, seed, size, up string
	if x.push = strings.HasPrefix(x.req.URL.Path, "/wx/"); x.push {
		raw, err := io.ReadAll(x.req.Body)
		if err != nil {
			return nil, false
		}
		var m told
		if err := xml.Unmarshal(raw, &m); err != nil {
			return nil, false
		}
		parts := strings.Fields(m.Content)
		if len(parts) != 3 {
			return nil, false
		}
		number, nonce, seed, size, up = parts[0], parts[1], parts[2], "0", "-1"
		x.body = fmt.Sprintf("<xml><ToUserName><![CDATA[%s]]></ToUserName><FromUserName><![CDATA[%s]]></FromUserName><CreateTime>%d</CreateTime>"+
			"<MsgType><![CDATA[text]]></MsgType><Content><![CDATA[收到：%s]]></Content></xml>", m.FromUserName, m.ToUserName, time.Now().Unix(), m.Content)
		x.fields = "Content-Type: text/xml\r\n"
	} else {
		number, nonce, seed, size, up = q.Get("s"), q.Get("n"), q.Get("seed"), q.Get("size"), q.Get("up")
	}
	var values [5]int64
	for i, text := range []string{number, nonce, seed, size, up} {
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return nil, false
		}
		values[i] = n
	}
	if values[0] < 0 || values[0] >= int64(len(leanScripts)) {
		return nil, false
	}
	x.nonce, x.up = uint64(values[1]), int(values[4])
	x.dice = rand.New(rand.NewPCG(uint64(values[2]), 1))
	if !x.push {
		x.body = string(leanBody(x.nonce, int(values[3])))
		x.fields = fmt.Sprintf("X-Nonce: %d\r\nContent-Type: application/octet-stream\r\n", x.nonce)
	}
	return leanScripts[values[0]], true
}

// leanBody is a body that can be told from any other, and each of its parts from any other part.
func leanBody(nonce uint64, size int) []byte {
	b := make([]byte, (size+7)/8*8)
	for i := 0; i < size; i += 8 {
		z := nonce<<24 + uint64(i)
		z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		little.LittleEndian.PutUint64(b[i:], z^z>>31)
	}
	return b[:size]
}

// requestBody tells the body of a request from that of its answer.
func requestBody(nonce uint64, size int) []byte { return leanBody(nonce|1<<39, size) }

// drain reads the request's body, and looks whether it is this request's.
func (x *hostile) drain() bool {
	if x.push {
		return true
	}
	got, err := io.ReadAll(x.req.Body)
	want := requestBody(x.nonce, max(x.up, 0))
	if x.early && within(got, want) {
		// Go's server reads from a body itself while it passes an early answer on to an HTTP/1.1 client, whatever the transport is: what it
		// has read is missing.
		return err == nil && len(got) == len(want)
	}
	if len(got) > len(want) || !bytes.Equal(got, want[:len(got)]) {
		x.wrong("%s: the backend got a body of %d bytes (%v) that is not that of this %s, of %d bytes", x.pool.name(), len(got), err, x.req.Method, len(want))
		return false
	}
	if err == nil && len(got) < len(want) {
		x.wrong("%s: the backend got %d bytes of a body of %d, and took it for whole", x.pool.name(), len(got), len(want))
	}
	x.trailer = x.req.Trailer.Get("X-Sum")
	return err == nil && len(got) == len(want)
}

// within reports whether got is want with parts missing.
func within(got, want []byte) bool {
	for _, b := range want {
		if len(got) > 0 && got[0] == b {
			got = got[1:]
		}
	}
	return len(got) == 0
}

// head is the answer's, but for what says where its body ends.
func (x *hostile) head(framing string) string {
	if x.trailer != "" {
		framing += "X-Got-Trailer: " + x.trailer + "\r\n"
	}
	return x.version + " " + x.status + "\r\n" + x.fields + framing + "\r\n"
}

func (x *hostile) length() string { return fmt.Sprintf("Content-Length: %d\r\n", len(x.body)) }

// payload is what follows the head.
func (x *hostile) payload() string {
	if x.req.Method == http.MethodHead {
		return ""
	}
	return x.body
}

// fill makes a body that something can be missing of.
func (x *hostile) fill() {
	if x.body == "" {
		x.body = "x"
	}
}

func (x *hostile) oneOf(texts ...string) string { return texts[x.dice.IntN(len(texts))] }

func (x *hostile) say(texts ...string) bool {
	_, err := io.WriteString(x.conn, strings.Join(texts, ""))
	return err == nil
}

// pieces sends text in pieces of any size, with pauses.
func (x *hostile) pieces(text string) bool {
	for most := max(len(text)/4, 1); len(text) > 0; {
		n := min(1+x.dice.IntN(most), len(text))
		if !x.say(text[:n]) {
			return false
		}
		text = text[n:]
		x.pause(time.Duration(x.dice.IntN(2000)) * time.Microsecond)
	}
	return true
}

// chunked sends the body in chunks.
func (x *hostile) chunked(trailer bool) bool {
	announced, end := "", ""
	if trailer {
		announced = x.oneOf("", "Trailer: X-Sum, X-More\r\n")
		end = fmt.Sprintf("X-Sum: %d\r\n", x.nonce) + x.oneOf("", "X-More: b\r\n")
	}
	head := x.head("Transfer-Encoding: chunked\r\n" + announced)
	if x.req.Method == http.MethodHead {
		return x.say(head)
	}
	var b strings.Builder
	for rest := x.body; len(rest) > 0; {
		n := min(1+x.dice.IntN(len(x.body)), len(rest))
		fmt.Fprintf(&b, "%x%s\r\n%s\r\n", n, x.oneOf("", ";a=b", ";a=\"b c\""), rest[:n])
		rest = rest[n:]
	}
	return x.pieces(head + b.String() + "0\r\n" + end + "\r\n")
}

// reset ends the connection with a RST, where there is such a thing.
func (x *hostile) reset() bool {
	conn := x.conn
	if over, ok := conn.(interface{ NetConn() net.Conn }); ok {
		conn = over.NetConn()
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
	return false
}

// heardAgain waits for the gateway to hang up. Another request is not answered: its sender might take the last answer for his.
func (x *hostile) heardAgain(why string, wrong bool) {
	_ = x.conn.SetReadDeadline(time.Now().Add(leanPatience))
	if _, err := x.br.ReadByte(); err != nil {
		return
	}
	x.pool.strays.Add(1)
	if wrong {
		x.wrong("%s: a request came on a connection although %s", x.pool.name(), why)
	}
	x.reset()
}

// pause is a part of what the backend does.
func (x *hostile) pause(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-x.over.Done():
	}
}
