package wxsim

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// call is one API request on its way through the simulator.
type call struct {
	s      *Server
	r      *http.Request
	route  route
	query  url.Values
	body   []byte
	fields map[string]any // of a JSON body
	cred   *credential    // the access token that came with it
	entry  Entry
	issued []*credential // handed out by this call
}

// answer is what a handler wants to send.
type answer struct {
	status      int // default 200
	errcode     int64
	contentType string
	disposition string
	location    string
	body        []byte
}

const (
	maxBody         = 32 << 20
	jsonContentType = "application/json; encoding=utf-8" // sic
	textContentType = "text/plain"
	htmlContentType = "text/html; charset=utf-8"
)

// ServeHTTP answers as api.weixin.qq.com or open.weixin.qq.com would, by path alone.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := &call{s: s, r: r, route: s.routes[r.URL.Path]}
	c.entry = Entry{
		Time: time.Now(), Direction: In, Method: r.Method, Host: r.Host, Path: r.URL.Path, Proto: r.Proto,
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		// The client hung up or sent more than any API takes: there is no call to answer.
		c.note("body not read: %v", err)
		c.record(answer{status: http.StatusRequestEntityTooLarge})
		w.WriteHeader(http.StatusRequestEntityTooLarge)
		return
	}
	c.body = body
	c.inspect()
	endRenewal := sync.OnceFunc(c.beginRenewal())
	defer endRenewal()

	c.progress(StepArrived, 0)
	fault, prepared := s.takeFault(r.URL.Path)
	if !prepared {
		fault = s.hostileFault(c)
	}
	c.entry.Fault = fault.name()
	if fault.Delay > 0 {
		timer := time.NewTimer(fault.Delay)
		select {
		case <-timer.C:
		case <-r.Context().Done():
		case <-s.ctx.Done():
		}
		timer.Stop()
	}
	var a answer
	if fault.changesAnswer() && !fault.Act && !fault.Half {
		c.refuse(fault.Errcode)
		a = answer{errcode: fault.Errcode}
	} else {
		a = c.handle()
		c.progress(StepActed, a.errcode)
	}
	if fault.changesAnswer() || r.Context().Err() != nil { // the caller cannot learn the true answer
		s.mu.Lock()
		for _, cred := range c.issued {
			cred.lost = true
		}
		s.mu.Unlock()
	}
	endRenewal() // before the answer, after which another renewal may rightly come
	s.send(w, c, a, fault)
}

// hostileFault decides what unprepared hostility strikes this call.
func (s *Server) hostileFault(c *call) Fault {
	var f Fault
	if c.route.handle == nil || c.route.page {
		return f
	}
	path := c.r.URL.Path
	if s.dice.hit(s.cfg.Faults.SlowAnswers, "slow", path) {
		f.Delay = s.cfg.Faults.SlowBy
	}
	rate := s.cfg.Faults.LostAnswers
	if c.route.precious {
		rate = s.cfg.Faults.LostTokenAnswers
	}
	if s.dice.hit(rate, "lost", path) {
		f.Act = true
		if s.dice.throw("lost-how", path).IntN(2) == 0 {
			f.DropConnection = true
		} else {
			f.Status, f.Body = http.StatusBadGateway, "<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>\n"
		}
	}
	return f
}

func (f Fault) changesAnswer() bool {
	return f.Errcode != 0 || f.Half || f.DropConnection || f.Status != 0 || f.Body != ""
}

func (f Fault) name() string {
	var parts []string
	if f.Delay > 0 {
		parts = append(parts, "delay")
	}
	switch {
	case f.DropConnection:
		parts = append(parts, "drop")
	case f.Half:
		parts = append(parts, "half")
	case f.Errcode != 0:
		parts = append(parts, "errcode")
	case f.Status != 0 || f.Body != "":
		parts = append(parts, "status")
	}
	if f.Act {
		parts = append(parts, "lost")
	}
	return strings.Join(parts, "+")
}

// send writes the journal, then the answer, so that whoever has the answer finds the entry.
func (s *Server) send(w http.ResponseWriter, c *call, a answer, f Fault) {
	switch {
	case f.DropConnection:
		c.entry.Status = 0
		c.record(answer{errcode: a.errcode, status: -1})
		panic(http.ErrAbortHandler) // net/http's own way of dropping a connection
	case f.Errcode != 0:
		a = c.errorAnswer(f.Errcode, f.Errmsg)
	case f.Half:
	case f.Status != 0 || f.Body != "":
		a = answer{status: f.Status, contentType: f.ContentType, body: []byte(f.Body)}
		if a.contentType == "" {
			a.contentType = "text/html"
		}
	}
	if a.status == 0 {
		a.status = http.StatusOK
	}
	c.record(a)
	h := w.Header()
	if a.contentType == "" {
		a.contentType = jsonContentType
		if c.route.text {
			a.contentType = textContentType
		}
	}
	h.Set("Date", s.now().UTC().Format(http.TimeFormat))
	h.Set("Content-Type", a.contentType)
	h.Set("Content-Length", strconv.Itoa(len(a.body)))
	if a.errcode != 0 {
		h.Set("LogicRet", strconv.FormatInt(a.errcode, 10))
		h.Set("RetKey", "11")
	}
	if a.disposition != "" {
		h.Set("Content-Disposition", a.disposition)
	}
	if a.location != "" {
		h.Set("Location", a.location)
	}
	w.WriteHeader(a.status)
	if f.Half {
		_, _ = w.Write(a.body[:len(a.body)/2])
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}
	_, _ = w.Write(a.body) // the client may be gone
	c.flush(w)
	c.progress(StepAnswered, a.errcode)
}

// record completes the entry and puts it into the journal. A status of -1 is no answer.
func (c *call) record(a answer) {
	c.entry.Errcode = a.errcode
	if c.entry.Status = a.status; a.status < 0 {
		c.entry.Status = 0
	}
	sum := sha256.Sum256(c.body)
	c.entry.BodySize, c.entry.BodySHA = int64(len(c.body)), hex.EncodeToString(sum[:])
	c.s.mu.Lock()
	if !c.route.precious {
		c.entry.Body = []byte(c.s.mask(string(c.body[:min(len(c.body), bodyKept)])))
	}
	c.entry.Query = c.s.maskQuery(c.r.URL.RawQuery)
	c.s.mu.Unlock()
	c.entry.Header = journalHeader(c.r.Header)
	c.s.journal.add(c.entry)
}

// handle checks method, encoding and token, then runs the path's handler.
func (c *call) handle() answer {
	rt := c.route
	if rt.handle == nil {
		return c.fail(40066)
	}
	if rt.page {
		return rt.handle(c)
	}
	switch {
	case rt.method == get && c.r.Method != http.MethodGet:
		return c.fail(43001)
	case rt.method == post && c.r.Method != http.MethodPost:
		return c.fail(43002)
	case c.r.Method != http.MethodGet && c.r.Method != http.MethodPost:
		return c.fail(43001)
	}
	if media, _, _ := mime.ParseMediaType(c.r.Header.Get("Content-Type")); c.r.ContentLength < 0 && len(c.body) > 0 {
		if strings.HasPrefix(media, "multipart/") {
			c.violate(RuleChunked, "upload without Content-Length")
			return c.fail(41005)
		}
		c.note("body without Content-Length")
	}
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if code := c.authenticate(); code != 0 {
		return c.fail(code)
	}
	if c.lacksSet() {
		return c.fail(codeNotGranted)
	}
	if c.cred != nil && c.overQuota() {
		return c.fail(45009)
	}
	if rt.json {
		if code := c.parseJSON(); code != 0 {
			return c.fail(code)
		}
	}
	return rt.handle(c)
}

// parseJSON reads the body as one JSON object, numbers kept as written.
func (c *call) parseJSON() int64 {
	if len(bytes.TrimSpace(c.body)) == 0 {
		return 44002
	}
	d := json.NewDecoder(bytes.NewReader(c.body))
	d.UseNumber()
	if err := d.Decode(&c.fields); err != nil || c.fields == nil {
		return 47001
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return 47001
	}
	return 0
}

// text returns a field of the JSON body as text, numbers as written.
func (c *call) text(name string) string {
	switch v := c.fields[name].(type) {
	case string:
		return v
	case json.Number:
		return v.String()
	default:
		return ""
	}
}

func (c *call) violate(rule Rule, format string, args ...any) {
	v := Violation{Rule: rule, Text: fmt.Sprintf(format, args...)}
	if !slices.Contains(c.entry.Violations, v) {
		c.entry.Violations = append(c.entry.Violations, v)
	}
}

func (c *call) note(format string, args ...any) {
	c.entry.Notes = append(c.entry.Notes, fmt.Sprintf(format, args...))
}

// ok answers with v as compact JSON without HTML escaping.
func (c *call) ok(v any) answer {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return c.errorAnswer(-1, err.Error())
	}
	return answer{body: bytes.TrimSuffix(b.Bytes(), []byte("\n"))}
}

// done is the answer of calls without a result.
func (c *call) done() answer { return c.ok(errorBody{Errmsg: "ok"}) }

func (c *call) fail(code int64) answer { return c.errorAnswer(code, "") }

type errorBody struct {
	Errcode int64  `json:"errcode"`
	Errmsg  string `json:"errmsg"`
}

func (c *call) errorAnswer(code int64, msg string) answer {
	if msg == "" {
		msg = errmsgs[code]
	}
	a := c.ok(errorBody{code, strings.TrimSpace(msg + " rid: " + newRID(time.Now()))})
	a.errcode = code
	if c.route.binary && c.s.dice.throw("error-type", c.r.URL.Path).IntN(2) == 0 {
		a.contentType = textContentType
	}
	return a
}
