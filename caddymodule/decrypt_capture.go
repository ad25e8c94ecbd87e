package caddymodule

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httputil"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// maxCapture bounds a captured push, in bytes: a push at max_body, sealed, with its headers.
const maxCapture = 4 << 20

// capture is a push as somebody recorded it.
type capture struct {
	query    string // as it was sent
	hasQuery bool
	whole    bool // a whole HTTP request
	body     []byte
	announce int64 // the Content-Length of a whole request, -1 without
}

// requestLine begins a whole HTTP request.
var requestLine = regexp.MustCompile(`^[A-Z]{3,7} \S+ HTTP/[0-9.]+\r?\n`)

// parseCapture reads a push: the body alone, with address its URL or query if that is known, or a whole HTTP request.
func parseCapture(data []byte, address string) (*capture, error) {
	c := &capture{body: data, announce: -1}
	if start := bytes.TrimLeft(data, "\r\n\t "); requestLine.Match(start) {
		if err := c.readRequest(start); err != nil {
			return nil, err
		}
	}
	if address != "" {
		if c.hasQuery {
			return nil, errors.New("--url: the captured request has a query already: leave --url out, or give the body alone")
		}
		c.setTarget(address)
		if !c.hasQuery {
			return nil, errors.New("--url: no query in it: give what WeChat asked for, such as '/wx/message/wx…?signature=…&timestamp=…&nonce=…&msg_signature=…', in quotes")
		}
	}
	if len(bytes.TrimSpace(c.body)) == 0 && !c.hasQuery {
		return nil, errors.New("nothing to open: give a file with the push's body or the whole request, or pipe it in")
	}
	return c, nil
}

// setTarget takes the query of a URL, of a path, or the query alone.
func (c *capture) setTarget(target string) {
	query, found := target, strings.Contains(target, "=") && !strings.ContainsAny(target, "/?")
	if !found {
		_, query, found = strings.Cut(target, "?")
	}
	query, _, _ = strings.Cut(query, "#")
	c.query, c.hasQuery = query, found && query != ""
}

func (c *capture) readRequest(data []byte) error {
	head, body, found := bytes.Cut(data, []byte("\r\n\r\n"))
	if unix, rest, ok := bytes.Cut(data, []byte("\n\n")); ok && (!found || len(unix) < len(head)) {
		head, body, found = unix, rest, true
	}
	if !found {
		head, body = bytes.TrimRight(data, "\r\n"), nil
	}
	r, err := http.ReadRequest(bufio.NewReader(io.MultiReader(bytes.NewReader(head), strings.NewReader("\r\n\r\n"))))
	if err != nil {
		return fmt.Errorf("it begins like an HTTP request, and is none: %w", withoutURL(err))
	}
	c.whole = true
	c.setTarget(r.RequestURI)
	c.body = body
	if len(r.TransferEncoding) > 0 && isChunked(body) {
		if c.body, err = io.ReadAll(httputil.NewChunkedReader(bytes.NewReader(body))); err != nil {
			return errors.New("the chunks of the body break off")
		}
		return nil
	}
	if n, err := strconv.ParseInt(r.Header.Get("Content-Length"), 10, 64); err == nil {
		c.announce = n
		// What stands after the body is the newline of an editor.
		if n >= 0 && n < int64(len(body)) && len(bytes.TrimSpace(body[n:])) == 0 {
			c.body = body[:n]
		}
	}
	return nil
}

// chunkSize begins a body in chunks. Some recorders write that it came so, and put it together all the same.
var chunkSize = regexp.MustCompile(`^[0-9a-fA-F]{1,8}\r?\n`)

func isChunked(body []byte) bool { return chunkSize.Match(body) }

// withoutURL takes away what may quote a query.
func withoutURL(err error) error {
	if inner, ok := errors.AsType[*url.Error](err); ok {
		return inner.Err
	}
	if strings.ContainsAny(err.Error(), "?&") {
		return errors.New("malformed request line or header")
	}
	return err
}

// doubt is what is wrong with a query as it stands, whatever the keys are; the zero value: nothing. Sealed says that the
// body is encrypted.
func (c *capture) doubt(q *pushQuery, sealed bool) tokens.Text {
	if !c.hasQuery {
		return tokens.Text{}
	}
	if strings.Contains(c.query, "&amp;") {
		return texts("the query has &amp; where & belongs: it was copied out of a web page", "查询串中 & 变成了 &amp;：是从网页中复制出来的")
	}
	values, err := url.ParseQuery(c.query)
	if err != nil {
		return texts("the query is not escaped rightly", "查询串的转义不正确")
	}
	want := []string{"timestamp", "nonce", "msg_signature"}
	if !sealed {
		want[2] = "signature"
	}
	var missing []string
	for _, name := range want {
		switch n := len(values[name]); {
		case n == 0 || values.Get(name) == "":
			missing = append(missing, name)
		case n > 1:
			return texts(name+" is there twice in the query", "查询串中 "+name+" 出现了两次")
		}
	}
	if len(missing) > 0 {
		names := strings.Join(missing, ", ")
		return texts("the query lacks "+names, "查询串缺少 "+names)
	}
	for _, name := range []string{"msg_signature", "signature"} {
		if s := values.Get(name); s != "" && !signatureShape.MatchString(s) {
			return texts(fmt.Sprintf("%s has %d characters or others than 0-9 and a-f, want 40 of those", name, len(s)), name+" 应为 40 位小写十六进制字符")
		}
	}
	if s := values.Get("timestamp"); len(s) != len("1700000000") || strings.Trim(s, "0123456789") != "" {
		return texts("timestamp is not ten digits", "timestamp 不是 10 位数字")
	}
	if err := q.parse(c.query); err != nil {
		return texts("the gateway would refuse the query: "+err.Error(), "网关会拒绝该查询串")
	}
	return tokens.Text{}
}

var signatureShape = regexp.MustCompile(`^[0-9a-f]{40}$`)

// pushQuery reads what can be read of the query, where the gateway would refuse all of it.
func (c *capture) pushQuery() *pushQuery {
	q := &pushQuery{}
	if q.parse(c.query) == nil {
		return q
	}
	values, _ := url.ParseQuery(c.query)
	*q = pushQuery{
		signature: values.Get("signature"), msgSignature: values.Get("msg_signature"), timestamp: values.Get("timestamp"),
		nonce: values.Get("nonce"), echoStr: values.Get("echostr"), hasEcho: values.Has("echostr"),
	}
	return q
}

// cutShort is what says that the body is not all there; the zero value: nothing.
func (c *capture) cutShort() tokens.Text {
	if missing := c.announce - int64(len(c.body)); missing > 0 {
		return texts(fmt.Sprintf("%d of the %d bytes of the body are missing", missing, c.announce), fmt.Sprintf("正文共 %d 字节，缺少 %d 字节", c.announce, missing))
	}
	if c.announce >= 0 && c.announce < int64(len(c.body)) {
		return texts("the body is longer than its Content-Length", "正文比 Content-Length 更长")
	}
	return tokens.Text{}
}

// stampTime is what a timestamp says, nil if it says nothing.
func stampTime(timestamp string) *time.Time {
	seconds, err := strconv.ParseInt(timestamp, 10, 64)
	if err != nil || len(timestamp) != len("1700000000") {
		return nil
	}
	t := time.Unix(seconds, 0).UTC()
	return &t
}
