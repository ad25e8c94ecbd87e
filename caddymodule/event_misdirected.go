package caddymodule

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// Limits of messages that come to the authorization-event URL.
const (
	userNameTimeout     = time.Second      // to look up whose message it is, of the 5 s that WeChat waits
	misdirectedLogEvery = 10 * time.Minute // between two log lines about a platform whose messages are handled all the same
	// learnWait is for how long the last push of a message waits until its account is known; what is left of the 5 s is the backend's.
	learnWait = 3 * time.Second
	// rereadEvery is how often the last push looks whether a store answers again.
	rereadEvery = 500 * time.Millisecond
	// maxAwaiting bounds the messages that wait for that at the same time.
	maxAwaiting = 1000
)

// Why a message that came to the authorization-event URL was not delivered.
var (
	errNoMessageRoute = errors.New("this site has no wechat_message that is reached by a path with the account's appid")
	errWhichAccount   = errors.New("the account's gh_ id is not known yet, so that the path of its messages is not either")
	errAccountUnread  = errors.New("the store does not say whose gh_ id it is")
	errRouteNotTaken  = errors.New("a handler before the site's wechat_message did not let it through")
)

// What becomes of messages that come to the authorization-event URL.
var (
	textHandled = texts("they are handled", "已照常处理")
	textAwaited = texts("whose they are is looked for, and WeChat pushes them again", "正在查找所属账号，微信会重推")
	textLost    = texts("they are not delivered: the log says why", "未能送达，原因见日志")
)

// misdirected has a message that came to the authorization-event URL handled by the site's wechat_message, as if it had
// come there. If there is none, or it cannot be told on which path the account's messages come, it is answered success. The error
// is errHeld or errDropped if it was not answered, and a refusedDetour if it was refused.
func (e *Event) misdirected(w http.ResponseWriter, r *http.Request, p *push) error {
	saw := func(what tokens.Text) { e.app.health().sightings.saw(codeMessageMisdirected, p.platform.AppID, what) }
	if e.app.answerReleaseCheck(w, p, "") { // whatever routes there are
		saw(textHandled)
		return nil
	}
	found, err := e.awaitRoute(r, p)
	if errors.Is(err, errHeld) {
		saw(textAwaited)
		p.entry.Reason += ", and whose it is is not known yet"
		return errHeld
	}
	if err == nil {
		saw(textHandled)
		err = found.run(w, r, p)
	}
	_, refused := errors.AsType[refusedDetour](err)
	taken := refused || errors.Is(err, errHeld) || errors.Is(err, errDropped)
	if err != nil && !taken {
		saw(textLost)
		p.entry.Outcome = outcomeFailed
		p.entry.Reason += " and was not delivered"
		e.app.logger.Warn("a message came to the authorization-event URL and was not delivered: in the platform's console, 消息与事件接收URL must be the URL of the wechat_message route; compare it with 授权事件接收URL",
			append(whyFields(err), zap.String("platform", p.platform.AppID), zap.ByteString("msg_type", p.fields.MsgType))...)
		writePlain(w, success)
		return nil
	}
	if ok, missed := e.detours[p.platform].allowEvery(misdirectedLogEvery); ok {
		e.app.logger.Warn("messages come to the authorization-event URL and are handled by the site's wechat_message: in the platform's console, mend 消息与事件接收URL; 授权事件接收URL is right",
			zap.String("platform", p.platform.AppID), zap.String("message_path", found.pattern()), zap.Int("missed", missed))
	}
	return err
}

// awaitRoute is messageRoute of a message that waits, if need be, until it is known whose it is. The account is looked for: the gateway
// learns gh_ ids by messages on their accounts' own paths, of which none may ever come. The error is errHeld if the search still goes on when
// WeChat drops the push, so that it pushes the message again. Its last push is answered in time.
func (e *Event) awaitRoute(r *http.Request, p *push) (*detour, error) {
	found, err := e.messageRoute(r, p)
	came, calls, pace := p.entry.Time, e.app.calls(), pace{pushes: wechatPushes, replyTimeout: learnWait}
	if err == nil {
		found.last = calls.wouldBeLast(p.identity("", r), came, p.age(), pace) // others may have waited, in vain
		return found, nil
	}
	if !accountUnknown(err) || p.isDoctors() || len(p.fields.ToUserName) == 0 {
		return nil, err
	}
	defer e.awaiting.Add(-1)
	if e.awaiting.Add(1) > maxAwaiting {
		return nil, err
	}
	a := calls.arrive(p.identity("", r), came, p.age(), p.validUntil(time.Duration(e.TimestampWindow)), pace)
	if a.call == nil { // it was answered on this path, before a reload
		return nil, err
	}
	calls.abandon(a.call, came) // it is there for the count of its pushes alone
	defer calls.leaveNow(a.call)
	look := func() (unknown bool) {
		if found, err = e.messageRoute(r, p); err == nil {
			found.last = a.last
		}
		return accountUnknown(err)
	}
	timer := time.NewTimer(time.Until(a.by))
	defer timer.Stop()
	for {
		var learned <-chan struct{}
		if errors.Is(err, errWhichAccount) {
			learned = e.app.manager().SeekUserName(p.platform.AppID, string(p.fields.ToUserName))
			// It may have become known before that.
			if !look() || learned == nil && errors.Is(err, errWhichAccount) {
				return found, err
			}
		}
		var again <-chan time.Time // nil: WeChat's next push tells whether the store answers again
		if a.last && errors.Is(err, errAccountUnread) {
			again = time.After(rereadEvery)
		}
		select {
		case <-learned:
		case <-again:
			if !look() {
				return found, err
			}
		case <-r.Context().Done():
			return nil, errHeld
		case <-timer.C:
			if !a.last {
				return nil, errHeld
			}
			return nil, err
		}
	}
}

// accountUnknown reports whether a message has no route because it is not known whose it is.
func accountUnknown(err error) bool {
	return errors.Is(err, errWhichAccount) || errors.Is(err, errAccountUnread)
}

// detour is the way of a message from the authorization-event URL to the site's wechat_message.
type detour struct {
	server *caddyhttp.Server
	path   string // on which the message would have come
	appid  string // the account, as wechat_message reads it from that path
	body   []byte
	came   time.Time   // the push
	last   bool        // it is the last of its message, of which wechat_message may not have seen another
	taken  atomic.Bool // by wechat_message: only now the body can be read and an answer be given

	answered time.Time // by wechat_message, whose handler may go on for long after that
	dropped  bool      // not answered, and its connection is closed
	refused  *refusal  // by wechat_message, which has answered with it; nil: it has not
}

// pattern is the path as it is entered in the platform's console.
func (d *detour) pattern() string {
	if d.appid == "" {
		return d.path
	}
	return strings.ReplaceAll(d.path, d.appid, "$APPID$")
}

// refusedDetour is a message that wechat_message refused: it is answered, and told in the log.
type refusedDetour struct{ why *refusal }

func (r refusedDetour) Error() string { return r.why.reason }

type detourKey struct{}

// onDetour returns the detour that a request is on, or nil.
func onDetour(r *http.Request) *detour { d, _ := r.Context().Value(detourKey{}).(*detour); return d }

// admit reports whether a request is for this handler, which it is unless it is on a detour, not nil, to another account's.
func (m *Message) admit(d *detour, r *http.Request) bool {
	if d == nil || d.taken.Load() {
		return true
	}
	appid, _ := m.whose(r)
	return appid == d.appid && d.taken.CompareAndSwap(false, true)
}

// run sends the push, sealed as it came, through the site's routes. Until a wechat_message has taken it, its context is
// done and its body cannot be read, so that no backend gets it, and nothing is answered.
func (d *detour) run(w http.ResponseWriter, r *http.Request, p *push) error {
	d.body, d.came = bytes.Clone(p.body), p.entry.Time
	before := w.Header().Clone()
	answer := &detourAnswer{w, d}
	ctx := detourContext{context.WithValue(r.Context(), detourKey{}, d), d}
	err := d.serve(answer, d.request(r, answer, ctx))
	switch {
	case d.dropped:
		return errDropped
	case d.taken.Load() && errors.Is(err, errHeld):
		return errHeld
	case d.refused != nil:
		return refusedDetour{d.refused}
	case d.taken.Load():
		p.answered = d.answered
		return nil
	}
	clear(w.Header())
	maps.Copy(w.Header(), before)
	if err != nil {
		return fmt.Errorf("%w: %w", errRouteNotTaken, err)
	}
	return errRouteNotTaken
}

// serve runs the site's routes. A panic is a misfortune of the handlers before wechat_message, or wechat_message's way to
// leave a push unanswered.
func (d *detour) serve(w http.ResponseWriter, r *http.Request) (err error) {
	defer func() {
		switch v := recover(); {
		case v == nil:
		case !d.taken.Load():
			err = &panicError{value: v, stack: zap.Stack("").String}
		case v == http.ErrAbortHandler: //nolint:errorlint // a panic's value
			err = errHeld
		default:
			panic(v)
		}
	}()
	return d.server.Routes.Compile(nothing).ServeHTTP(w, r)
}

// request is the request that the push would have been.
func (d *detour) request(r *http.Request, w http.ResponseWriter, ctx context.Context) *http.Request {
	c := r.Clone(ctx)
	c.URL.Path, c.URL.RawPath = d.path, ""
	c.RequestURI = c.URL.RequestURI()
	c.Body, c.ContentLength, c.TransferEncoding, c.GetBody = &detourBody{detour: d}, int64(len(d.body)), nil, nil
	return caddyhttp.PrepareRequest(c, caddy.NewReplacer(), w, d.server)
}

// detourContext is done until wechat_message has the push: a handler before it that would send it on cannot.
type detourContext struct {
	context.Context
	detour *detour
}

// Done implements context.Context.
func (c detourContext) Done() <-chan struct{} {
	if c.detour.taken.Load() {
		return c.Context.Done()
	}
	return alwaysDone
}

// Err implements context.Context.
func (c detourContext) Err() error {
	if c.detour.taken.Load() {
		return c.Context.Err()
	}
	return context.Canceled
}

var alwaysDone = func() <-chan struct{} { c := make(chan struct{}); close(c); return c }()

// detourBody is the push's body, for wechat_message alone.
type detourBody struct {
	detour *detour
	offset int
}

var errNotForYou = errors.New("an encrypted push is for wechat_message alone")

// Read implements io.Reader.
func (b *detourBody) Read(into []byte) (int, error) {
	if !b.detour.taken.Load() {
		return 0, errNotForYou
	}
	if b.offset == len(b.detour.body) {
		return 0, io.EOF
	}
	n := copy(into, b.detour.body[b.offset:])
	b.offset += n
	return n, nil
}

// Close implements io.Closer.
func (*detourBody) Close() error { return nil }

// detourAnswer is the answer to the push, for wechat_message alone. What others write is dropped.
type detourAnswer struct {
	w      http.ResponseWriter
	detour *detour
}

// Header implements http.ResponseWriter.
func (a *detourAnswer) Header() http.Header { return a.w.Header() }

// WriteHeader implements http.ResponseWriter.
func (a *detourAnswer) WriteHeader(status int) {
	if a.detour.taken.Load() {
		a.w.WriteHeader(status)
	}
}

// Write implements http.ResponseWriter.
func (a *detourAnswer) Write(b []byte) (int, error) {
	if !a.detour.taken.Load() {
		return len(b), nil
	}
	return a.w.Write(b)
}

// Unwrap is for http.ResponseController.
func (a *detourAnswer) Unwrap() http.ResponseWriter {
	if !a.detour.taken.Load() {
		return nil
	}
	return a.w
}
