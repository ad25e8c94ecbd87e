package wxsim

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// ReplyKind is what a push was answered with.
type ReplyKind string

// The kinds of answers; the others are the MsgType of a passive reply: "text", "image", ….
const (
	ReplyNone    ReplyKind = "none"    // no answer, or one that WeChat cannot use
	ReplySuccess ReplyKind = "success" // `success` or an empty body: nothing for the user
	ReplyRaw     ReplyKind = "raw"     // of events that want a body of their own (xpay_* …)
)

// What a user sees when the account's server fails.
const (
	FaultText     = "该公众号提供的服务出现故障，请稍后再试"
	FaultTextMini = "该小程序提供的服务出现故障，请稍候再试"
)

// Attempt is one sending of a push.
type Attempt struct {
	At       time.Time
	URL      string // as requested, query included
	Sent     []byte // the body as sent
	Latency  time.Duration
	Status   int
	Header   http.Header
	Body     []byte // as received
	TimedOut bool   // WeChat dropped the connection after Pace.Timeout
	Err      error  // no answer; names no URL
}

// PushResult is what came of a push.
type PushResult struct {
	Attempts []Attempt
	Plain    []byte // what was pushed, before encryption
	OpenID   string // sender of the message
	MsgID    int64

	Kind    ReplyKind
	Reply   []byte // the reply as WeChat reads it: decrypted
	UserSaw string // what the user sees: the reply's text, nothing, or WeChat's fault text
	Wrong   string // why the last answer is wrong or missing; "" when it is right

	// Duplicate is the same push sent once more after it was answered rightly, if it was.
	Duplicate *PushResult
}

// OK reports whether the push was answered rightly.
func (r PushResult) OK() bool { return r.Wrong == "" && len(r.Attempts) > 0 }

// Last is the last attempt, the zero Attempt before any.
func (r PushResult) Last() Attempt {
	if len(r.Attempts) == 0 {
		return Attempt{}
	}
	return r.Attempts[len(r.Attempts)-1]
}

// Param is one query parameter.
type Param struct{ Key, Value string }

// Outgoing is one attempt just before it is sent, for tests that send what WeChat never would.
type Outgoing struct {
	Method string
	URL    string // without the push's own parameters
	Query  []Param
	Header http.Header
	Body   []byte
}

// Get returns the value of a parameter, "" without it.
func (o *Outgoing) Get(key string) string {
	for _, p := range o.Query {
		if p.Key == key {
			return p.Value
		}
	}
	return ""
}

// Set changes the value of a parameter, adding it where there is none.
func (o *Outgoing) Set(key, value string) {
	for i := range o.Query {
		if o.Query[i].Key == key {
			o.Query[i].Value = value
			return
		}
	}
	o.Query = append(o.Query, Param{key, value})
}

// Delete removes a parameter.
func (o *Outgoing) Delete(key string) {
	kept := o.Query[:0]
	for _, p := range o.Query {
		if p.Key != key {
			kept = append(kept, p)
		}
	}
	o.Query = kept
}

// delivery is a push on its way.
type delivery struct {
	s        *Server
	url      string
	crypt    *Crypt
	mode     Mode
	format   Format
	idName   string // ToUserName or AppId
	id       string
	openID   string // "" for events of the event URL
	platform string
	appID    string // the account that it is about
	plain    []byte
	skew     time.Duration
	attempts int
	event    bool // repeated until `success`
	tamper   func(*Outgoing)
	judge    func(Attempt) verdict
}

// verdict is how WeChat reads one answer.
type verdict struct {
	kind  ReplyKind
	reply []byte
	saw   string
	wrong string
}

// run sends the push until it is answered and returns the result.
func (d *delivery) run(ctx context.Context) (PushResult, error) {
	r := PushResult{Plain: d.plain}
	var first *Outgoing
	for n := range d.attempts {
		if n > 0 {
			if err := pause(ctx, d.s.cfg.Pace.Interval); err != nil {
				return r, err
			}
		}
		out := first
		if out == nil || !d.s.dice.hit(d.s.cfg.Faults.SameNonce, "same-nonce", d.appID) {
			var err error
			if out, err = d.compose(); err != nil {
				return r, err
			}
		}
		if first == nil {
			first = out
		}
		att := d.s.post(d.watched(ctx), out)
		if att.Err == nil {
			d.s.progress(Progress{Step: StepReplied, AppID: d.appID})
		}
		v := d.judge(att)
		r.Attempts = append(r.Attempts, att)
		r.Kind, r.Reply, r.UserSaw, r.Wrong = v.kind, v.reply, v.saw, v.wrong
		d.write(out, att, v, n)
		if ctx.Err() != nil {
			return r, ctx.Err()
		}
		if v.wrong == "" || att.Err == nil && !d.event && !d.s.cfg.Pace.RetryWrong {
			break
		}
	}
	return r, nil
}

// again sends an answered push once more and notes when the answer is another one.
func (d *delivery) again(ctx context.Context, r *PushResult) error {
	once := *d
	once.attempts = 1
	dup, err := once.run(ctx)
	if err != nil {
		return err
	}
	r.Duplicate = &dup
	if dup.Kind != r.Kind || !bytes.Equal(dup.Reply, r.Reply) {
		d.s.journal.add(Entry{
			Time: time.Now(), Direction: Out, Method: http.MethodPost, AppID: d.appID, Platform: d.platform, Status: dup.Last().Status,
			Violations: []Violation{{RuleDuplicate, fmt.Sprintf("answered %s, then %s", r.Kind, dup.Kind)}},
		})
	}
	return nil
}

// compose makes the request of one attempt: fresh timestamp, nonce and ciphertext.
func (d *delivery) compose() (*Outgoing, error) {
	faults, dice, name := d.s.cfg.Faults, d.s.dice, d.platform+d.appID
	timestamp := strconv.FormatInt(d.s.now().Add(d.skew).Unix(), 10)
	nonce := strconv.Itoa(100_000_000 + dice.throw("nonce", name).IntN(900_000_000))
	out := &Outgoing{Method: http.MethodPost, URL: d.url, Header: http.Header{
		"User-Agent": {"Mozilla/4.0"}, "Accept": {"*/*"}, "Pragma": {"no-cache"}, "Content-Type": {"text/xml"},
	}}
	if d.format == FormatJSON {
		out.Header.Set("Content-Type", "application/json")
	}
	out.Query = []Param{{"signature", d.crypt.Sign(timestamp, nonce)}, {"timestamp", timestamp}, {"nonce", nonce}}
	if d.openID != "" {
		out.Query = append(out.Query, Param{"openid", d.openID})
	}
	if d.mode == ModePlain {
		out.Body = d.plain
	} else {
		encrypt, err := d.crypt.Seal(d.plain)
		if err != nil {
			return nil, err
		}
		out.Query = append(out.Query, Param{"encrypt_type", "aes"}, Param{"msg_signature", d.crypt.Sign(timestamp, nonce, encrypt)})
		out.Body = d.envelope(encrypt)
	}
	if dice.hit(faults.ExtraQuery, "extra-query", name) {
		out.Query = append(out.Query, Param{"wx_trace", nonce[:4]})
	}
	if dice.hit(faults.ShuffledQuery, "shuffled-query", name) {
		dice.throw("shuffle", name).Shuffle(len(out.Query), func(i, j int) { out.Query[i], out.Query[j] = out.Query[j], out.Query[i] })
	}
	if d.tamper != nil {
		d.tamper(out)
	}
	return out, nil
}

// envelope wraps Encrypt as the mode wants, with stray bytes around it now and then.
func (d *delivery) envelope(encrypt string) []byte {
	name := d.platform + d.appID
	stray := d.s.dice.hit(d.s.cfg.Faults.StrayBytes, "stray-bytes", name)
	throw := d.s.dice.throw("stray-which", name)
	b := builder{format: d.format, bare: d.s.dice.hit(d.s.cfg.Faults.NoCDATA, "envelope-cdata", name), lines: stray && throw.IntN(2) == 0}
	var body []byte
	if d.mode == ModeCompat {
		body = appendField(d.plain, d.format, Field{Name: "Encrypt", Value: encrypt})
	} else {
		body = b.build([]Field{{Name: d.idName, Value: d.id}, {Name: "Encrypt", Value: encrypt}})
	}
	if !stray {
		return body
	}
	before := []string{"\n", " \r\n\t", "\xef\xbb\xbf", "\xef\xbb\xbf\n", ""}
	if d.format == FormatJSON {
		before = []string{"\n", "  ", ""}
	}
	return append(append([]byte(before[throw.IntN(len(before))]), body...), []string{"\n", "\r\n ", ""}[throw.IntN(3)]...)
}

// write records an attempt.
func (d *delivery) write(out *Outgoing, att Attempt, v verdict, n int) {
	e := Entry{
		Time: att.At, Direction: Out, Method: out.Method, AppID: d.appID, Platform: d.platform, Status: att.Status,
		BodySize: int64(len(out.Body)), Notes: []string{fmt.Sprintf("attempt %d", n+1)},
	}
	if u, err := url.Parse(out.URL); err == nil {
		e.Host, e.Path = u.Host, u.Path
	}
	for _, p := range out.Query {
		e.QueryKeys = append(e.QueryKeys, p.Key)
	}
	switch {
	case att.TimedOut:
		e.Notes = append(e.Notes, "not answered in time")
	case att.Err != nil:
		e.Notes = append(e.Notes, "not answered: "+att.Err.Error())
	case v.wrong != "" && d.tamper == nil:
		e.Violations = []Violation{{RuleAnswer, v.wrong}}
	}
	d.s.journal.add(e)
}

const maxReply = 1 << 20

// errNoAnswer stands for an answer that did not come in time.
var errNoAnswer = errors.New("no answer within the time that WeChat waits")

// post sends one attempt and reads the answer, all within Pace.Timeout.
func (s *Server) post(ctx context.Context, out *Outgoing) Attempt {
	att := Attempt{At: time.Now(), Sent: out.Body}
	target := out.URL
	if len(out.Query) > 0 {
		separator := "?"
		if strings.Contains(target, "?") {
			separator = "&"
		}
		var query []string
		for _, p := range out.Query {
			query = append(query, url.QueryEscape(p.Key)+"="+url.QueryEscape(p.Value))
		}
		target += separator + strings.Join(query, "&")
	}
	att.URL = target
	timed, cancel := context.WithTimeoutCause(ctx, s.cfg.Pace.Timeout, errNoAnswer)
	defer cancel()
	stop := context.AfterFunc(s.ctx, cancel)
	defer stop()
	req, err := http.NewRequestWithContext(timed, out.Method, target, bytes.NewReader(out.Body))
	if err != nil {
		att.Err = errors.New("push URL is not a URL")
		return att
	}
	req.Header = out.Header.Clone()
	resp, err := s.pushing.Do(req)
	if err == nil {
		defer func() { _ = resp.Body.Close() }()
		att.Body, err = io.ReadAll(io.LimitReader(resp.Body, maxReply))
	}
	att.Latency = time.Since(att.At)
	if err != nil {
		att.Body, att.TimedOut = nil, errors.Is(context.Cause(timed), errNoAnswer) && ctx.Err() == nil
		if att.Err = err; att.TimedOut {
			att.Err = errNoAnswer
		} else if inner, ok := errors.AsType[*url.Error](err); ok {
			att.Err = inner.Err // without the URL
		}
		return att
	}
	att.Status, att.Header = resp.StatusCode, resp.Header
	return att
}

const (
	dialTimeout   = 5 * time.Second
	idlePushConns = 64
)

// newPushClient is WeChat as a client: HTTP/1.1, kept-alive connections unless they are to be apart, no redirects.
func newPushClient(roots *x509.CertPool, dial func(context.Context, string, string) (net.Conn, error), apart bool) *http.Client {
	if dial == nil {
		dial = (&net.Dialer{Timeout: dialTimeout}).DialContext
	}
	return &http.Client{
		Transport: &http.Transport{
			DialContext: dial, DisableCompression: true, DisableKeepAlives: apart, MaxIdleConnsPerHost: idlePushConns, IdleConnTimeout: idleTimeout,
			TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
			// A non-nil empty map keeps HTTP/2 off.
			TLSNextProto: map[string]func(string, *tls.Conn) http.RoundTripper{},
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// pause waits d or until ctx ends.
func pause(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
