package caddymodule

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// What can become of an answer; also the metric's label.
const (
	outcomePlain        = "plain"    // empty or success: nothing to encrypt
	outcomeSealed       = "sealed"   // encrypted
	outcomeUnusable     = "unusable" // replaced by success or the fallback
	outcomeLost         = "lost"     // no backend could be reached; replaced like an unusable one
	outcomeLate         = "late"     // it came after the last push had been answered without it
	outcomeReleaseCheck = "release_check"
)

// plaintext is the decrypted text as a request's body. A transport may still read a body after the handler has
// returned (the backend answered early), so the text is given up only when nobody is reading and nobody will.
type plaintext struct {
	mu   sync.Mutex
	data []byte
}

// plaintextBody is one reading of the text.
type plaintextBody struct {
	text   *plaintext
	offset int
	of     *work // that the first bytes are told to, if any
}

// again is a further reading of the text.
func (t *plaintext) again() (io.ReadCloser, error) { return &plaintextBody{text: t}, nil }

// Read implements io.Reader.
func (b *plaintextBody) Read(into []byte) (int, error) {
	b.text.mu.Lock()
	defer b.text.mu.Unlock()
	if b.offset >= len(b.text.data) {
		return 0, io.EOF
	}
	if b.offset == 0 && b.of != nil {
		b.of.begin()
	}
	n := copy(into, b.text.data[b.offset:])
	b.offset += n
	return n, nil
}

// isBegun reports whether anything was read.
func (b *plaintextBody) isBegun() bool {
	b.text.mu.Lock()
	defer b.text.mu.Unlock()
	return b.offset > 0
}

// Close implements io.Closer.
func (*plaintextBody) Close() error { return nil }

// detach takes the text away from all readers: what they read from now on is the end. It waits for a copy that is
// being made, at most.
func (t *plaintext) detach() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.data = nil
}

// replyWriter keeps the next handler's answer in memory. It is not Caddy's recorder, because that shares the real
// writer's headers, and nothing of the backend's may reach WeChat unjudged.
type replyWriter struct {
	header  http.Header
	status  int
	body    bytes.Buffer
	limit   int64
	tooLong bool
}

var replyPool = sync.Pool{New: func() any { return &replyWriter{header: make(http.Header)} }}

func newReplyWriter(limit int64) *replyWriter {
	w := replyPool.Get().(*replyWriter)
	w.limit = limit
	return w
}

func (w *replyWriter) release() {
	if w.body.Cap() > maxPooledBuffer {
		return
	}
	clear(w.header)
	w.status, w.tooLong = 0, false
	w.body.Reset()
	replyPool.Put(w)
}

// Header implements http.ResponseWriter.
func (w *replyWriter) Header() http.Header { return w.header }

// WriteHeader implements http.ResponseWriter.
func (w *replyWriter) WriteHeader(status int) {
	if w.status == 0 && (status >= 200 || status == http.StatusSwitchingProtocols) {
		w.status = status
	}
}

var errReplyTooLong = said("answer is larger than max_body", "应答超过 max_body")

// Write implements http.ResponseWriter.
func (w *replyWriter) Write(b []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	if int64(w.body.Len()+len(b)) > w.limit {
		w.tooLong = true
		return 0, errReplyTooLong
	}
	return w.body.Write(b)
}

// FlushError lets handlers flush, which means nothing here.
func (*replyWriter) FlushError() error { return nil }

// judge decides what becomes of the answer: its bytes as they are to be sent or sealed, the outcome, and why when it
// cannot be used.
func (w *replyWriter) judge(format crypto.Format, err error) (body []byte, outcome string, why error) {
	switch {
	case w.tooLong:
		return nil, outcomeUnusable, errReplyTooLong
	case err != nil:
		return nil, outcomeUnusable, err
	case w.status >= 300, w.status == http.StatusSwitchingProtocols:
		return nil, outcomeUnusable, said(fmt.Sprintf("status %d", w.status), fmt.Sprintf("状态码 %d", w.status))
	}
	body = w.body.Bytes()
	if len(body) == 0 {
		return nil, outcomePlain, nil
	}
	if bytes.HasPrefix(body, gzipStart) {
		if body, err = gunzip(body, w.limit); err != nil {
			return nil, outcomeUnusable, err
		}
	}
	text := trimReply(body)
	switch {
	case len(text) == 0 || bytes.Equal(text, success):
		return text, outcomePlain, nil
	case isReply(format, text):
		end := endOf(format, text)
		if end < 0 {
			return nil, outcomeUnusable, errNoEnd
		}
		if isEnvelope(format, text) {
			return nil, outcomeUnusable, errEncrypted
		}
		return text[:end], outcomeSealed, nil
	}
	if coding := contentCoding(w.header["Content-Encoding"]); coding != "" {
		return nil, outcomeUnusable, said(fmt.Sprintf("its Content-Encoding is %s, which nobody asked for, and what came is neither gzip nor %s", coding, format),
			fmt.Sprintf("其 Content-Encoding 为 %s，没有人请求过；收到的既不是 gzip 也不是 %s", coding, format))
	}
	kind := kindOfText(text)
	return nil, outcomeUnusable, said(fmt.Sprintf("it is neither empty, nor success, nor %s: it begins with %s", format, kind.EN),
		fmt.Sprintf("既不为空，也不是 success 或 %s：开头是%s", format, kind.ZH))
}

var gzipStart = []byte("\x1f\x8b\x08")

// gunzip unpacks an answer, which may have limit bytes then. No backend is asked for gzip by us, but some send nothing else, and only
// a transport that has itself asked for it unpacks it. What a script prints behind it, be it a line break, is left out, unless it is gzip
// too: one text may be packed in pieces.
func gunzip(body []byte, limit int64) ([]byte, error) {
	packed := bytes.NewReader(body)
	r, err := gzip.NewReader(packed)
	if err != nil {
		return nil, errBadGzip
	}
	var text bytes.Buffer
	for {
		r.Multistream(false)
		_, err := text.ReadFrom(io.LimitReader(r, limit+1-int64(text.Len())))
		switch {
		case int64(text.Len()) > limit:
			return nil, errReplyTooLong
		case err != nil:
			return nil, errBadGzip
		case !bytes.HasPrefix(body[len(body)-packed.Len():], gzipStart):
			return text.Bytes(), nil
		}
		if r.Reset(packed) != nil {
			return nil, errBadGzip
		}
	}
}

var errBadGzip = said("the answer is gzip that cannot be unpacked: the backend broke off, or has damaged it", "应答是无法解压的 gzip：后端中途断开，或数据已损坏")

// trimReply takes away the spaces around an answer, and the byte order marks before it: each file that a script includes may bring one.
func trimReply(body []byte) []byte {
	for {
		text := bytes.TrimSpace(body)
		if body = bytes.TrimPrefix(text, byteOrderMark); len(body) == len(text) {
			return text
		}
	}
}

// isReply reports whether an answer begins like one of a format.
func isReply(format crypto.Format, text []byte) bool {
	if format == crypto.FormatJSON {
		return bytes.HasPrefix(text, []byte("{"))
	}
	return isXMLReply(text)
}

// errEncrypted is an answer that an SDK encrypted because it has the AESKey, though the push came to it in plaintext. WeChat would find an
// envelope in the gateway's own, and tell the user that the account is out of order.
var errEncrypted = said("it is encrypted already: the backend gets plaintext, and has to answer plaintext; take the AESKey out of the configuration of the backend's SDK",
	"已经加密：后端收到的是明文，也应以明文应答；请从后端 SDK 的配置中去掉 AESKey")

// isEnvelope reports whether an answer begins with one of the four values of an encrypted one, and has the one that matters. No message does.
func isEnvelope(format crypto.Format, text []byte) bool {
	switch string(firstName(format, text)) {
	case "Encrypt":
		return true
	case "MsgSignature", "TimeStamp", "Nonce":
		if format == crypto.FormatJSON {
			return bytes.Contains(text, []byte(`"Encrypt"`))
		}
		return bytes.Contains(text, []byte("<Encrypt>"))
	}
	return false
}

// firstName is the name of the first value of an answer for which isReply holds, or nil.
func firstName(format crypto.Format, text []byte) []byte {
	before, after := "<", xmlSpace+"/>"
	if format == crypto.FormatJSON {
		text, before, after = text[1:], `"`, `"`
	} else {
		text = afterDeclaration(text)
		text = text[max(endOfTag(text), 0):]
	}
	name, found := bytes.CutPrefix(bytes.TrimLeft(text, xmlSpace), []byte(before))
	end := bytes.IndexAny(name, after)
	if !found || end < 0 {
		return nil
	}
	return name[:end]
}

// errNoEnd is an answer that ends before it should, though HTTP says that it is whole.
var errNoEnd = said("the answer has no end: the backend broke off, or its Content-Length is too small, as one that counts characters and not bytes is",
	"应答没有结尾：后端中途断开，或 Content-Length 偏小，例如按字符数而不是字节数计算")

var (
	endTag       = []byte("</xml")
	cdataStart   = []byte("<![CDATA[")
	cdataEnd     = []byte("]]>")
	commentStart = []byte("<!--")
	commentEnd   = []byte("-->")
	instrStart   = []byte("<?")
	instrEnd     = []byte("?>")
)

// endOf is where an answer ends, or -1: HTTP does not tell of one without a length that it was broken off. What follows is no part of the
// message: what old backends write there are warnings, traces and the time that a page took.
func endOf(format crypto.Format, text []byte) int {
	if format == crypto.FormatJSON {
		return endOfJSON(text)
	}
	return endOfXML(text)
}

// endOfXML is behind the tag that closes the first <xml>. What stands in a CDATA section, a comment or a processing instruction is no tag.
func endOfXML(text []byte) int {
	for i, depth := 0, 0; ; {
		next := bytes.IndexByte(text[i:], '<')
		if next < 0 {
			return -1
		}
		i += next
		switch rest := text[i:]; {
		case bytes.HasPrefix(rest, cdataStart):
			next = endOfSection(rest, cdataStart, cdataEnd)
		case bytes.HasPrefix(rest, commentStart):
			next = endOfSection(rest, commentStart, commentEnd)
		case bytes.HasPrefix(rest, instrStart):
			next = endOfSection(rest, instrStart, instrEnd)
		case bytes.HasPrefix(rest, endTag):
			next = len(endTag)
			if after := bytes.TrimLeft(rest[len(endTag):], xmlSpace); len(after) > 0 && after[0] == '>' {
				next = len(rest) - len(after) + 1
				if depth--; depth <= 0 {
					return i + next
				}
			}
		case isXMLTag(rest):
			if next = endOfTag(rest); next > 0 && rest[next-2] != '/' {
				depth++
			}
		default:
			next = 1
		}
		if next < 0 {
			return -1
		}
		i += next
	}
}

// endOfTag is behind the first > that is not in quotes, or -1.
func endOfTag(text []byte) int {
	quote := byte(0)
	for i, c := range text {
		switch {
		case c == quote:
			quote = 0
		case quote != 0:
		case c == '"', c == '\'':
			quote = c
		case c == '>':
			return i + 1
		}
	}
	return -1
}

// endOfSection is where a section that begins with start has its end, or -1.
func endOfSection(text, start, end []byte) int {
	i := bytes.Index(text[len(start):], end)
	if i < 0 {
		return -1
	}
	return len(start) + i + len(end)
}

// endOfJSON is behind the bracket that closes the first one.
func endOfJSON(text []byte) int {
	depth, quoted := 0, false
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case c == '"':
			quoted = !quoted
		case quoted && c == '\\':
			i++
		case quoted:
		case c == '{', c == '[':
			depth++
		case c == '}', c == ']':
			if depth--; depth == 0 {
				return i + 1
			}
		}
	}
	return -1
}

// isXMLReply reports whether an answer begins like a message: <xml, after a declaration perhaps.
func isXMLReply(text []byte) bool { return isXMLTag(afterDeclaration(text)) }

// afterDeclaration is an answer without its XML declaration: nothing, if that has no end.
func afterDeclaration(text []byte) []byte {
	rest, ok := bytes.CutPrefix(text, []byte("<?xml"))
	if !ok || len(rest) == 0 || !isXMLSpace(rest[0]) {
		return text
	}
	end := bytes.Index(text, instrEnd)
	if end < 0 {
		return nil
	}
	return bytes.TrimLeft(text[end+len(instrEnd):], xmlSpace)
}

// isXMLTag reports whether a text begins with <xml>, with attributes perhaps.
func isXMLTag(text []byte) bool {
	rest, ok := bytes.CutPrefix(text, []byte("<xml"))
	return ok && len(rest) > 0 && (rest[0] == '>' || isXMLSpace(rest[0]))
}

const xmlSpace = " \t\r\n"

func isXMLSpace(c byte) bool { return c == ' ' || c == '\t' || c == '\r' || c == '\n' }

// kindOfText tells the operator what a backend sent instead, without showing it.
func kindOfText(text []byte) tokens.Text {
	lower := bytes.ToLower(text[:min(len(text), 16)])
	switch {
	case bytes.HasPrefix(lower, []byte("<!doctype html")), bytes.HasPrefix(lower, []byte("<html")):
		return texts("an HTML page", " HTML 页面")
	case text[0] == '<':
		return texts("another element than <xml>", " <xml> 以外的元素")
	case text[0] == '{':
		return texts("JSON", " JSON")
	}
	return texts("other text", "其他文本")
}

var sealedPool = sync.Pool{New: func() any { b := make([]byte, 0, 4<<10); return &b }}

// writeReply encrypts an answer with the key that opened the push, and sends it, dated by the clock by which the push was judged. In plaintext mode it goes as it is.
func (a *App) writeReply(w http.ResponseWriter, p *push, reply []byte) error {
	if p.plain {
		writeBody(w, contentType(p.format), reply)
		return nil
	}
	buf := sealedPool.Get().(*[]byte)
	defer sealedPool.Put(buf)
	sealed, err := p.codec.AppendReply((*buf)[:0], &p.buffers, p.opened, p.format, p.replyDate(), p.query.nonce, reply)
	if err != nil {
		return err
	}
	writeBody(w, contentType(p.format), sealed)
	if cap(sealed) <= maxPooledBuffer {
		*buf = sealed
	}
	return nil
}

// writeBody answers with a body of known length. Header rules of the configuration change values in place, so no array of values
// is another response's too.
func writeBody(w http.ResponseWriter, mediaType string, body []byte) {
	values := [...]string{mediaType, strconv.Itoa(len(body))}
	h := w.Header()
	h["Content-Type"], h["Content-Length"] = values[:1:1], values[1:]
	w.WriteHeader(http.StatusOK)
	_, _ = w.Write(body)
}

// textReply is a passive text reply to a push, in its format.
func textReply(p *push, text string) []byte {
	var b bytes.Buffer
	now := strconv.FormatInt(p.replyDate(), 10)
	if p.fields.Format == crypto.FormatJSON {
		b.WriteString(`{"ToUserName":` + jsonString(string(p.fields.FromUserName)) +
			`,"FromUserName":` + jsonString(string(p.fields.ToUserName)) +
			`,"CreateTime":` + now + `,"MsgType":"text","Content":` + jsonString(text) + `}`)
		return b.Bytes()
	}
	b.WriteString("<xml><ToUserName>" + cdata(string(p.fields.FromUserName)) + "</ToUserName><FromUserName>" +
		cdata(string(p.fields.ToUserName)) + "</FromUserName><CreateTime>" + now +
		"</CreateTime><MsgType><![CDATA[text]]></MsgType><Content>" + cdata(text) + "</Content></xml>")
	return b.Bytes()
}
