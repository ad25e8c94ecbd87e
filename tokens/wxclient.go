package tokens

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	// DefaultOrigin is WeChat's API.
	DefaultOrigin = "https://api.weixin.qq.com"
	// DefaultTimeout bounds a whole call, all origins together.
	DefaultTimeout = 10 * time.Second

	dialTimeout     = 3 * time.Second  // leaves time for the next origin
	idleConnTimeout = 30 * time.Second // shorter than servers keep idle connections, so that we seldom write into a dying one
	maxAnswer       = 1 << 20          // bytes of an answer that are read; WeChat's are below 100 KiB
	maxIdlePerHost  = 16
)

// ClientOptions configure a Client. The zero value is usable.
type ClientOptions struct {
	// Origins are scheme://host[:port], tried in order; the next one only when no connection could be established.
	// Plain http is for loopback addresses alone. Default: DefaultOrigin.
	Origins []string
	// Proxy chooses the egress proxy; nil: none.
	Proxy func(*http.Request) (*url.URL, error)
	// Timeout bounds one call. Default: DefaultTimeout.
	Timeout time.Duration
	// Heard, if not nil, is told how each exchange with an origin's host, host[:port], ended: an *APIError is an answer
	// too. It must be quick, and safe for concurrent use.
	Heard func(host string, err error)
	// Dated, if not nil, is told the Date of each answer that is WeChat's, as it stands there, and when that answer came by the clock here.
	Dated func(date string, at time.Time)
	// Transport replaces the client's own, for tests. Proxy is not used then.
	Transport http.RoundTripper
}

// Client makes the gateway's own calls to WeChat. It follows no redirects, reads at most 1 MiB, judges an answer by
// its body and not by its Content-Type, never sends a request twice, and its errors hold no URL (WeChat takes tokens
// in the query). It is safe for concurrent use.
type Client struct {
	origins []string
	timeout time.Duration
	http    *http.Client
	heard   func(host string, err error)
	dated   func(date string, at time.Time)
	// traced: the transport reports its connections, so that "no connection" is known and not guessed.
	traced bool
}

// NewClient checks the options; it opens no connection.
func NewClient(o ClientOptions) (*Client, error) {
	c := &Client{timeout: o.Timeout, heard: o.Heard, dated: o.Dated}
	if c.heard == nil {
		c.heard = func(string, error) {}
	}
	if c.dated == nil {
		c.dated = func(string, time.Time) {}
	}
	if c.timeout <= 0 {
		c.timeout = DefaultTimeout
	}
	origins := o.Origins
	if len(origins) == 0 {
		origins = []string{DefaultOrigin}
	}
	for _, origin := range origins {
		u, err := ParseOrigin(origin)
		if err != nil {
			return nil, err
		}
		c.origins = append(c.origins, u.String())
	}
	transport := o.Transport
	if transport == nil {
		c.traced = true
		transport = &http.Transport{
			Proxy:                 o.Proxy,
			DialContext:           (&net.Dialer{Timeout: dialTimeout, KeepAlive: idleConnTimeout}).DialContext,
			TLSHandshakeTimeout:   dialTimeout,
			ResponseHeaderTimeout: c.timeout,
			IdleConnTimeout:       idleConnTimeout,
			MaxIdleConnsPerHost:   maxIdlePerHost,
			ForceAttemptHTTP2:     true,
		}
	}
	c.http = &http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return c, nil
}

// Close closes idle connections. Calls that still run end by themselves.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Post sends body as JSON (nil: an empty object) and decodes the answer, a JSON object, into out (nil: dropped).
// An errcode other than 0 is returned as *APIError; anything that is not an answer wraps ErrUnreachable.
func (c *Client) Post(ctx context.Context, path string, query url.Values, body, out any) error {
	payload, err := encodeBody(body)
	if err != nil {
		return fmt.Errorf("%s: encode request: %w", path, err)
	}
	return c.do(ctx, http.MethodPost, path, query, payload, out)
}

// Get is Post without a body.
func (c *Client) Get(ctx context.Context, path string, query url.Values, out any) error {
	return c.do(ctx, http.MethodGet, path, query, nil, out)
}

func (c *Client) do(ctx context.Context, method, path string, query url.Values, payload []byte, out any) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	var err error
	for _, origin := range c.origins {
		var answer answered
		var connected bool
		answer, connected, err = c.exchange(ctx, method, origin+path, query, payload)
		if err == nil {
			err = decodeAnswer(path, answer.body, out, func() []string { return secretsOf(query, payload) })
			c.tell(origin, err)
			if !errors.Is(err, ErrUnreachable) {
				c.dated(answer.date, answer.at)
			}
			return err
		}
		c.tell(origin, err)
		if connected || ctx.Err() != nil {
			break
		}
	}
	return fmt.Errorf("%s: %w: %w", path, ErrUnreachable, err)
}

// tell tells how an exchange with an origin ended. What was called off says nothing.
func (c *Client) tell(origin string, err error) {
	if errors.Is(err, context.Canceled) {
		return
	}
	_, host, _ := strings.Cut(origin, "://")
	c.heard(host, err)
}

// answered is what a request got.
type answered struct {
	body []byte
	date string
	at   time.Time
}

// exchange makes one request. Connected is false only if it is certain that nothing of it reached the other side.
func (c *Client) exchange(ctx context.Context, method, target string, query url.Values, payload []byte) (answer answered, connected bool, err error) {
	gotConn := false
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { gotConn = true }})
	req, err := http.NewRequestWithContext(ctx, method, target, http.NoBody)
	if err != nil {
		return answered{}, true, errors.New("request cannot be built") // the cause would quote the URL
	}
	req.URL.RawQuery = query.Encode()
	// A body that net/http cannot read a second time keeps it from repeating a request whose connection broke. A GET
	// is in need of that too, as some of them burn a code; the empty body adds nothing to it on the wire.
	req.Body = io.NopCloser(bytes.NewReader(payload))
	req.GetBody = nil
	req.ContentLength = int64(len(payload))
	if payload != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := c.http.Do(req)
	if err != nil {
		return answered{}, gotConn || !c.traced && !isDialError(err), safeCause(err, query, payload)
	}
	answer.date, answer.at = res.Header.Get("Date"), time.Now()
	defer func() { _ = res.Body.Close() }()
	if res.StatusCode != http.StatusOK {
		return answered{}, true, said(nil, fmt.Sprintf("answered HTTP %d", res.StatusCode), fmt.Sprintf("应答 HTTP %d", res.StatusCode))
	}
	answer.body, err = io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	switch {
	case err != nil:
		return answered{}, true, fmt.Errorf("answer broke off: %w", safeCause(err, query, payload))
	case len(answer.body) > maxAnswer:
		return answered{}, true, said(nil, fmt.Sprintf("answer exceeds %d bytes", maxAnswer), fmt.Sprintf("应答超过 %d 字节", maxAnswer))
	}
	return answer, true, nil
}

// decodeAnswer judges a body: it must be one JSON object, without an errcode or with errcode 0. Secrets are the values
// that an error must not repeat.
func decodeAnswer(path string, answer []byte, out any, secrets func() []string) error {
	answer = bytes.TrimSpace(bytes.TrimPrefix(answer, []byte("\xef\xbb\xbf")))
	if len(answer) == 0 || answer[0] != '{' || !json.Valid(answer) {
		return fmt.Errorf("%s: %w", path, said(ErrUnreachable, fmt.Sprintf("the answer is not a JSON object (%d bytes)", len(answer)), fmt.Sprintf("应答不是 JSON 对象（%d 字节）", len(answer))))
	}
	var status struct {
		Code wireInt `json:"errcode"`
		Msg  any     `json:"errmsg"`
	}
	if err := json.Unmarshal(answer, &status); err != nil {
		return fmt.Errorf("%s: %w", path, said(ErrUnreachable, "the errcode of the answer is no number", "应答中的 errcode 不是数字"))
	}
	if status.Code != 0 {
		msg, _ := status.Msg.(string)
		return newAPIError(path, int64(status.Code), msg, secrets()...)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return fmt.Errorf("%s: %w", path, said(ErrUnreachable, "the answer is not of the documented form", "应答不是文档所述的格式"))
	}
	return nil
}

// encodeBody makes JSON as WeChat wants it: without the HTML escapes that some of its APIs take literally, and
// without the encoder's final newline.
func encodeBody(body any) ([]byte, error) {
	if body == nil {
		return []byte("{}"), nil
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(body); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// ParseOrigin reads an origin of WeChat's, scheme://host[:port] and nothing more: https, or http to this machine, because
// tokens go over it. Its errors never repeat a password.
func ParseOrigin(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	switch {
	case strings.Contains(s, "@"):
		return nil, errors.New("an origin has no user and password: write it like " + DefaultOrigin)
	case err != nil || u.Host == "" || strings.ContainsAny(u.Host, ";,") || (u.Scheme != "https" && u.Scheme != "http"):
		return nil, fmt.Errorf("'%s' is not an origin: write it like %s", s, DefaultOrigin)
	case u.RawQuery != "" || u.Fragment != "" || (u.Path != "" && u.Path != "/"):
		return nil, fmt.Errorf("'%s' is more than an origin: write scheme, host and port only", s)
	case u.Scheme == "http" && !IsLoopbackHost(u.Hostname()):
		return nil, fmt.Errorf("'%s' would carry tokens in the clear: use https, or http to a loopback address", s)
	}
	return &url.URL{Scheme: u.Scheme, Host: u.Host}, nil
}

// IsLoopbackHost reports whether a host name or address means this machine.
func IsLoopbackHost(host string) bool {
	if host == "localhost" {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.IsLoopback()
}

// isDialError recognises a failure before any byte of a request was sent.
func isDialError(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return ok && op.Op == "dial"
}

// safeCause drops what may repeat the request: url.Error's URL, what net/http quotes of an answer, and any text with a query, a value of
// the request's query or a secret of its body in it. What is wrong with a certificate is no such quote.
func safeCause(err error, query url.Values, payload []byte) error {
	for {
		u, ok := errors.AsType[*url.Error](err)
		if !ok {
			break
		}
		err = u.Err
	}
	text, quotes := err.Error(), false
	if _, certificate := errors.AsType[*tls.CertificateVerificationError](err); !certificate {
		text, _, quotes = strings.Cut(text, `"`)
	}
	unsafe := len(text) > maxErrorText || strings.ContainsAny(text, "?&=") ||
		slices.ContainsFunc(secretsOf(nil, payload), func(s string) bool { return strings.Contains(text, s) })
	for _, values := range query {
		for _, v := range values {
			unsafe = unsafe || v != "" && strings.Contains(text, v)
		}
	}
	if !unsafe && !quotes {
		return err
	}
	for _, known := range []error{context.DeadlineExceeded, context.Canceled, io.ErrUnexpectedEOF} {
		if errors.Is(err, known) {
			return known
		}
	}
	if text = strings.TrimRight(text, ": "); !unsafe && text != "" {
		return errors.New(text)
	}
	return errors.New("connection failed")
}

// wireInt is a whole number that WeChat may write as a number or as a string.
type wireInt int64

// UnmarshalJSON accepts 7200, 7200.0, "7200" and null; text that is no number is an error.
func (n *wireInt) UnmarshalJSON(data []byte) error {
	text := strings.TrimSpace(strings.Trim(string(data), `"`))
	if text == "null" || text == "" {
		*n = 0
		return nil
	}
	var number json.Number
	if err := json.Unmarshal([]byte(text), &number); err != nil {
		return errors.New("not a number")
	}
	if i, err := number.Int64(); err == nil {
		*n = wireInt(i)
		return nil
	}
	f, err := number.Float64()
	if err != nil || f != float64(int64(f)) {
		return errors.New("not a whole number")
	}
	*n = wireInt(f)
	return nil
}

// wireSeconds is an expires_in. Whatever it holds, the token beside it is good: what cannot be read counts as 0.
type wireSeconds int64

// UnmarshalJSON accepts what wireInt does, and anything else as 0.
func (s *wireSeconds) UnmarshalJSON(data []byte) error {
	text := strings.TrimSpace(strings.Trim(string(data), `"`))
	f, err := strconv.ParseFloat(text, 64)
	switch {
	case err != nil && !errors.Is(err, strconv.ErrRange), math.IsNaN(f):
		*s = 0
	case f > longestLife.Seconds():
		*s = wireSeconds(longestLife.Seconds())
	case f < 0:
		*s = 0
	default:
		*s = wireSeconds(f)
	}
	return nil
}

// wireText is a text beside something that is good whatever it holds: what is no text counts as none.
type wireText string

// UnmarshalJSON accepts a text, and anything else as none.
func (s *wireText) UnmarshalJSON(data []byte) error {
	var text string
	_ = json.Unmarshal(data, &text) // leaves it empty
	*s = wireText(text)
	return nil
}

// maxToken bounds a token or ticket of WeChat's, in bytes. WeChat says to have room for 512.
const maxToken = 4 << 10

// wireToken is a token or a ticket. One that cannot be WeChat's counts as none: it must neither take the place of a good one nor
// keep what stands beside it from being taken.
type wireToken string

// UnmarshalJSON accepts a text of visible ASCII, up to maxToken, and anything else as none.
func (s *wireToken) UnmarshalJSON(data []byte) error {
	var text string
	if json.Unmarshal(data, &text) != nil || len(text) > maxToken ||
		strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r > '~' }) {
		text = ""
	}
	*s = wireToken(text)
	return nil
}

// wireFlag is a flag that WeChat writes as 1 or leaves out.
type wireFlag bool

// UnmarshalJSON takes zero, false, null and an empty text for no, with or without quotes, and anything else for yes.
func (f *wireFlag) UnmarshalJSON(data []byte) error {
	text := strings.TrimSpace(strings.Trim(string(data), `"`))
	*f = text != "false" && text != "null" && strings.Trim(text, "0.") != ""
	return nil
}
