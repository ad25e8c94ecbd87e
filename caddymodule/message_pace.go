package caddymodule

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strconv"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// redialEvery is the pause before a backend that could not be reached is tried again.
const redialEvery = 500 * time.Millisecond

func (m *Message) pace() pace {
	return pace{pushes: m.Pushes, replyTimeout: time.Duration(m.ReplyTimeout)}
}

// pass has the next handler answer a push, or joins it to the earlier push that did.
func (m *Message) pass(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler, p *push, f *facts, at time.Time) error {
	id, age, validUntil := p.identity(f.appid, r), p.age(), p.validUntil(time.Duration(m.TimestampWindow))
	if m.clustered {
		return m.passShared(w, r, next, p, f, &turn{id: id, at: at, age: age, validUntil: validUntil})
	}
	a := m.app.calls().arrive(id, at, age, validUntil, m.pace())
	if a.call == nil { // the last push got its answer long ago
		writePlain(w, success)
		return nil
	}
	defer m.app.calls().leaveNow(a.call)
	if a.first {
		return m.lead(w, r, next, p, f, a)
	}
	m.app.metrics().joined.Inc()
	return m.join(w, r, p, f, a)
}

// age is how long before this push its message was made, by WeChat's own clock: 0 where that cannot be told.
func (p *push) age() time.Duration {
	if p.last {
		return lastAfter
	}
	created, err := strconv.ParseInt(string(p.fields.CreateTime), 10, 64)
	if err != nil || len(p.fields.CreateTime) != len("1700000000") {
		return 0
	}
	return time.Duration(p.query.unix()-created) * time.Second
}

// unix is the timestamp, which has been found to be of the right form.
func (q *pushQuery) unix() int64 {
	sec, _ := strconv.ParseInt(q.timestamp, 10, 64)
	return sec
}

// join waits for the answer that an earlier push's handler gets.
func (m *Message) join(w http.ResponseWriter, r *http.Request, p *push, f *facts, a arrival) error {
	calls := m.app.calls()
	ready, done := calls.wait(a.call)
	if !done {
		timer := time.NewTimer(time.Until(a.by))
		defer timer.Stop()
		select {
		case <-ready:
		case <-r.Context().Done():
			return errHeld
		case <-timer.C:
			if !a.last {
				return errHeld
			}
			if calls.giveUp(a.call) {
				m.writeSlow(w, p)
				return nil
			}
		}
	}
	answer, late, abandoned := calls.outcome(a.call)
	switch {
	case m.clustered && calls.hasMoved(a.call):
		return errMoved
	case abandoned && !a.last:
		return errHeld
	case abandoned:
		answer = passiveReply{outcome: outcomeLost}
		m.note(p, f, answer, errCrowded)
	case late:
		m.writeSlow(w, p)
		return nil
	}
	return m.give(w, r, p, answer, a)
}

// give answers a push and notes that it was, unless WeChat has hung up.
func (m *Message) give(w http.ResponseWriter, r *http.Request, p *push, answer passiveReply, a arrival) error {
	if r.Context().Err() != nil {
		return errHeld
	}
	// If WeChat has dropped this push and something in between kept the connection, the next push gets the same answer. What
	// goes out by the customer-service API is not given as well.
	if m.app.calls().deliver(a.call) && m.SlowReply == slowCustomerService {
		m.finishSlow(w, r.ProtoMajor, p)
		return nil
	}
	m.writeAnswer(w, p, answer)
	return nil
}

// lead has the next handler answer a message that came for the first time. It ends when that is done, however long
// WeChat has hung up by then: others wait for the answer.
func (m *Message) lead(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler, p *push, f *facts, a arrival) error {
	if a.last && r.ProtoMajor > 1 {
		return m.leadApart(w, r, next, p, f, a)
	}
	return m.leadHere(w, r, next, p, f, a)
}

func (m *Message) leadHere(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler, p *push, f *facts, a arrival) error {
	calls, c := m.app.calls(), a.call
	own := m.endBy(w, r.ProtoMajor, p, a)
	defer own.release()
	answer, why := m.takePlace(c)
	switch {
	case why == nil:
		m.sendMirrors(r, p, f)
		answer, why = m.ask(r, next, p, f, c, own)
		<-m.places
	case why == errCrowded && !a.last:
		calls.abandon(c, time.Now())
		m.release(c)
		if own.take() {
			m.hold(r, a)
			return errHeld
		}
		return errDropped
	}
	now := time.Now()
	if m.SlowReply == slowCustomerService && answer.outcome == outcomeSealed {
		defer calls.promised()() // a process that ends waits for it
	}
	late, taken := m.finish(p, f, a, answer, why, now)
	if taken {
		switch ours := own.take(); {
		case ours && a.last:
			m.writeAnswer(w, p, answer)
			return nil
		case ours:
			return errHeld
		case a.last:
			return nil
		}
		return errDropped
	}
	if !own.take() {
		m.settle(p, f, c, answer, late)
		if a.last {
			return nil
		}
		return errDropped
	}
	p.answered = now
	err := m.give(w, r, p, answer, a)
	m.settle(p, f, c, answer, late)
	return err
}

// leadApart is lead of a push that comes first and last, over HTTP/2 or later: an answer ends there only when its handler returns, and this one
// may have to be given while the backend is still at work. So the message is answered as if WeChat had hung up, and the push waits for that as
// one that came again does.
func (m *Message) leadApart(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler, p *push, f *facts, a arrival) error {
	calls, work, copied, facts := m.app.calls(), apart(r), p.apart(), *f
	f.announce(r)
	first := a
	first.last, first.by = false, a.at.Add(maxHold)
	calls.hold(a.call)
	m.app.background(func(context.Context) { // backend_timeout ends it
		defer copied.release()
		defer calls.leaveNow(a.call)
		_ = m.leadHere(&ignoredAnswer{header: make(http.Header)}, work, next, copied, &facts, first)
	})
	switch err := m.join(w, r, p, f, a); {
	case err == errMoved: //nolint:errorlint // our own, never wrapped
		m.writeSlow(w, p)
	case err != nil:
		return err
	case !p.slow && p.entry.Outcome == "":
		if answer, _, _ := calls.outcome(a.call); answer.outcome == outcomeLost || answer.outcome == outcomeUnusable {
			p.entry.Outcome, p.entry.Reason = outcomeFailed, answer.outcome
		}
	}
	return nil
}

// hold waits until WeChat drops a push for which there is no room, unless too many are held already.
func (m *Message) hold(r *http.Request, a arrival) {
	defer m.crowd.Add(-1)
	if m.crowd.Add(1) > int64(m.MaxInFlight) {
		return
	}
	timer := time.NewTimer(time.Until(a.by))
	defer timer.Stop()
	select {
	case <-r.Context().Done():
	case <-timer.C:
	}
}

// takePlace waits for a place among the messages in flight, as long as that makes sense, and not at all when too many
// wait already. It returns an error without one, and what becomes of the message then.
func (m *Message) takePlace(c *call) (passiveReply, error) {
	select {
	case m.places <- struct{}{}:
		return passiveReply{}, nil
	default:
	}
	defer m.waiting.Add(-1)
	if m.waiting.Add(1) > int64(m.MaxInFlight) {
		return passiveReply{outcome: outcomeLost}, errCrowded
	}
	for {
		left := time.Until(m.app.calls().worthTrying(c, m.pace()))
		if left <= 0 {
			return passiveReply{outcome: outcomeLost}, errBusy
		}
		timer := time.NewTimer(min(left, redialEvery)) // the last push may come, and move the end
		select {
		case m.places <- struct{}{}:
			timer.Stop()
			return passiveReply{}, nil
		case <-timer.C:
		}
	}
}

var (
	errBusy      = said("max_in_flight messages are at the backend already", "后端正在处理的消息已达 max_in_flight 条")
	errCrowded   = said("max_in_flight messages are at the backend already, and as many wait", "后端正在处理的消息已达 max_in_flight 条，等待的也有同样多")
	errTooSlow   = said("the backend took longer than backend_timeout", "后端用时超过 backend_timeout")
	errBrokenOff = said("the backend broke off in the middle of its answer, or sent what is no gzip under Content-Encoding: gzip; see Caddy's line 'aborting with incomplete response'",
		"后端在应答途中断开，或在 Content-Encoding: gzip 之下发送了并非 gzip 的内容；见 Caddy 的日志行 'aborting with incomplete response'")
)

// ask runs the next handler, again and again while no backend can be reached, and judges its answer.
func (m *Message) ask(r *http.Request, next caddyhttp.Handler, p *push, f *facts, c *call, own *ending) (passiveReply, error) {
	for {
		a, err := m.askOnce(r, next, p, f, own)
		if !notReached(err) {
			return a, err
		}
		left := time.Until(m.app.calls().worthTrying(c, m.pace()))
		if left <= 0 {
			return passiveReply{outcome: outcomeLost}, err
		}
		timer := time.NewTimer(min(left, redialEvery))
		<-timer.C
	}
}

// noUpstreams is what reverse_proxy says with status 503 when there is none that it could dial. With other words the status may be a
// backend's own, which handle_response passes on.
const noUpstreams = "no upstreams available"

// notReached reports whether the last backend that was to get the request has not seen it: it could not be dialled, or there is none
// that could be.
func notReached(err error) bool {
	if err == nil {
		return false
	}
	if _, ok := errors.AsType[reverseproxy.DialError](err); ok {
		return true
	}
	he, ok := errors.AsType[caddyhttp.HandlerError](err)
	return ok && he.StatusCode == http.StatusServiceUnavailable && he.Err != nil && he.Err.Error() == noUpstreams
}

// statusCanceled is what reverse_proxy answers, with no error, to a client that has left, which it takes the end of the work for when it is
// dialling.
const statusCanceled = 499

// askOnce runs the next handler, in memory, detached from WeChat's connection.
func (m *Message) askOnce(r *http.Request, next caddyhttp.Handler, p *push, f *facts, own *ending) (passiveReply, error) {
	reply := newReplyWriter(m.MaxBody)
	defer reply.release()
	work := newWork(r.Context(), p.opened.Message, time.Now().Add(time.Duration(m.BackendTimeout)))
	defer work.end(nil)
	f.content = p.fields.Content
	// Until next returns, r itself is the plaintext request: Caddy's placeholders and variables belong to this r, and a
	// copy alone would leave them with what the caller sent. The handlers get a copy with the same URL and headers,
	// because the server reads r when the last push is answered while they run.
	outer := wireOf(r)
	own.mu.Lock()
	own.begin(work)
	makePlaintext(r, p, f, &work.parts)
	own.mu.Unlock()
	inner := r.WithContext(work)
	inner.Body = &work.parts.sent
	err := runNext(next, reply, inner)
	own.mu.Lock()
	own.work = nil
	outer.restore(r)
	own.mu.Unlock()
	work.parts.text.detach()
	f.content = nil // its buffer will be another push's
	if work.isLate() && (err != nil || reply.status == statusCanceled) {
		err = errTooSlow
	}
	if err == nil && reply.status == 0 && work.hasSwitched() {
		reply.WriteHeader(http.StatusSwitchingProtocols)
	}
	if notReached(err) && work.hasArrived() { // with another handler than the one that could not reach any
		err = fmt.Errorf("a backend may have the message, and the one that was to get it then was not reached: %v", err) //nolint:errorlint // it is not to be tried again
	}
	body, outcome, err := reply.judge(p.fields.Format, err)
	return passiveReply{outcome: outcome, body: append([]byte(nil), body...)}, err
}

// runNext runs the rest of the chain. A backend that breaks off in the middle of its answer makes reverse_proxy panic;
// that is an answer that cannot be used, and no more.
func runNext(next caddyhttp.Handler, w http.ResponseWriter, r *http.Request) (err error) {
	defer func() {
		switch v := recover(); v {
		case nil:
		case http.ErrAbortHandler:
			err = errBrokenOff
		default:
			err = &panicError{value: v, stack: zap.Stack("").String}
		}
	}()
	return next.ServeHTTP(w, r)
}

// panicError is a panic below us. Its value may hold anything, so only its kind is told.
type panicError struct {
	value any
	stack string
}

func (e *panicError) Error() string { return fmt.Sprintf("a handler panicked with a %T", e.value) }

// quoted is what errors quote, such as the line of an answer that is no HTTP.
var quoted = regexp.MustCompile(`"(?:[^"\\]|\\.)*"?`)

// whyFields are an error's fields in the log. What it quotes may be a part of an answer, and is left out.
func whyFields(err error) []zap.Field {
	fields := []zap.Field{zap.String("error", unquotedText(err))}
	if pe, ok := errors.AsType[*panicError](err); ok {
		fields = append(fields, zap.String("stack", pe.stack))
	}
	return fields
}

func unquotedText(err error) string { return quoted.ReplaceAllString(err.Error(), `"…"`) }

// ending is the end of a push whose handler is busy with the backend: a timer answers it, or drops it. The same timer ends the
// backend's work when that takes too long.
type ending struct {
	mu    sync.Mutex // also of the request, which the timer reads
	timer *time.Timer
	taken bool      // the push is answered or dropped, or is being so
	by    time.Time // when the timer does that; zero once it was time
	work  *work     // under way, or nil
	idle  bool      // the timer was stopped before it was time
	over  func()    // fire, made once

	of pushEnd
}

// pushEnd is what the end of a push is made of.
type pushEnd struct {
	m     *Message
	w     http.ResponseWriter
	proto int
	p     *push
	a     arrival
}

// endings are used again, each with a new timer: one of a test's own time must not come into another's.
var endings = sync.Pool{New: func() any {
	own := new(ending)
	own.over = own.fire
	return own
}}

// endBy sees to it that the first push ends in time: the last one with an answer, any other without. No handler uses w
// meanwhile, for the chain writes to memory.
func (m *Message) endBy(w http.ResponseWriter, proto int, p *push, a arrival) *ending {
	own := endings.Get().(*ending)
	own.mu.Lock()
	defer own.mu.Unlock()
	own.taken, own.by, own.of = false, a.by, pushEnd{m, w, proto, p, a}
	own.timer = time.AfterFunc(time.Until(a.by), own.over)
	return own
}

// fire does what it is time for. It may come late, when the ending is another push's already, or nobody's.
func (own *ending) fire() {
	own.mu.Lock()
	defer own.mu.Unlock()
	defer own.wait()
	now := time.Now()
	if own.work != nil && !now.Before(own.work.deadline) {
		own.work.end(errTooSlow)
		own.work = nil
	}
	if own.taken || own.by.IsZero() || now.Before(own.by) {
		return
	}
	own.by = time.Time{}
	switch e := &own.of; {
	case !e.a.last:
		own.taken = true
		drop(e.w)
	case e.m.app.calls().giveUp(e.a.call):
		own.taken = true
		if work := own.work; work != nil { // whoever does not read the answer does not keep the backend busy
			end := time.AfterFunc(time.Until(work.deadline), func() { work.end(errTooSlow) })
			defer end.Stop()
		}
		e.m.finishSlow(e.w, e.proto, e.p)
	}
}

// begin has the timer end a piece of work at its deadline. The caller holds mu.
func (own *ending) begin(work *work) {
	own.work = work
	if own.by.IsZero() || work.deadline.Before(own.by) {
		own.wait()
	}
}

// wait sets the timer to what is next. The caller holds mu.
func (own *ending) wait() {
	next := own.by
	if own.taken {
		next = time.Time{}
	}
	if own.work != nil && (next.IsZero() || own.work.deadline.Before(next)) {
		next = own.work.deadline
	}
	if !next.IsZero() {
		own.timer.Reset(time.Until(next))
	}
}

// finishSlow answers a push without the backend's answer while its handler has other things to do.
// What handlers outside of us have put around the response is passed by: a header rule there reads the request's variables,
// which the chain is writing, and an encoder ends its stream only when the handler returns.
func (m *Message) finishSlow(w http.ResponseWriter, proto int, p *push) {
	p.answered = time.Now()
	for outer, ok := w.(unwrapper); ok; outer, ok = w.(unwrapper) {
		w = outer.Unwrap()
	}
	closeAfter(w, proto)
	m.writeSlow(w, p)
	_ = http.NewResponseController(w).Flush() // the handler returns later; the length is known, so WeChat has it all
}

// unwrapper is a response around another one, as http.ResponseController knows them.
type unwrapper interface{ Unwrap() http.ResponseWriter }

// closeAfter asks WeChat not to use the connection again: the handler that has it will be busy for a while.
func closeAfter(w http.ResponseWriter, proto int) {
	if proto == 1 {
		w.Header()["Connection"] = []string{"close"}
	}
}

// drop ends a connection whose handler is still running: over HTTP/1.1 it is closed, over h2 the stream is reset.
func drop(w http.ResponseWriter) {
	c := http.NewResponseController(w)
	if conn, _, err := c.Hijack(); err == nil {
		_ = conn.Close()
		return
	}
	_ = c.SetWriteDeadline(time.Unix(1, 0))
}

// take reports whether the handler itself is to answer. Afterwards the timer does not touch the response.
func (own *ending) take() bool {
	stopped := own.timer.Stop()
	own.mu.Lock()
	defer own.mu.Unlock()
	taken := own.taken
	own.taken, own.idle = true, stopped
	return !taken
}

// release lets go of the push, which has been taken.
func (own *ending) release() {
	own.mu.Lock()
	idle := own.idle && own.work == nil
	own.by, own.idle, own.of = time.Time{}, false, pushEnd{}
	own.mu.Unlock()
	if idle {
		endings.Put(own)
	}
}

// finish makes an answer known to all pushes of a message. Taken: another node has the message, and has it answered again.
func (m *Message) finish(p *push, f *facts, a arrival, answer passiveReply, why error, now time.Time) (late, taken bool) {
	calls := m.app.calls()
	if m.clustered {
		if late, taken = m.app.claims().finish(a.call, answer, now.Sub(a.at)); taken {
			m.app.logger.Warn("another node had a message answered that this one seemed to have died with: the backend got it twice", m.fields(p, f)...)
			calls.withdraw(a.call)
			return false, true
		}
		if late {
			calls.giveUp(a.call)
		}
	}
	m.note(p, f, answer, why)
	late = calls.finish(a.call, answer, now)
	if m.clustered {
		m.tellLatecomers(a.call)
	}
	return late, false
}

// note counts what became of a message and says what is wrong with it. Sealed answers are counted once it is known whether
// they are in time.
func (m *Message) note(p *push, f *facts, a passiveReply, why error) {
	if a.outcome != outcomeSealed {
		m.app.metrics().replies.WithLabelValues(a.outcome).Inc()
	}
	m.app.sawAnswered(f.appid, a.outcome, why)
	if a.outcome == outcomeLost || a.outcome == outcomeUnusable {
		p.entry.Outcome, p.entry.Reason = outcomeFailed, backendReason(a.outcome, why)
	}
	switch a.outcome {
	case outcomeLost:
		m.app.logger.Error("a push is lost: no backend could be reached before WeChat's last push; the sender sees the fallback or nothing",
			append(m.fields(p, f), whyFields(why)...)...)
	case outcomeUnusable:
		m.app.logger.Error("the backend's answer to a push cannot be used; the sender sees the fallback or nothing",
			append(m.fields(p, f), whyFields(why)...)...)
	default:
		if log := m.app.logger.Check(zapcore.DebugLevel, "push answered"); log != nil {
			log.Write(append(m.fields(p, f), zap.String("outcome", a.outcome), zap.Strings("odd", oddities(p, a)))...)
		}
	}
}

// fields name a push in the log.
func (m *Message) fields(p *push, f *facts) []zap.Field {
	return []zap.Field{
		zap.String("appid", f.appid), zap.String("platform", f.platform), zap.ByteString("msg_id", p.fields.MsgID),
		zap.String("msg_type", f.msgType), zap.String("event", f.event),
	}
}

// oddities are what WeChat may dislike about an answer that is passed on all the same.
func oddities(p *push, a passiveReply) []string {
	var reply crypto.Fields
	if a.outcome != outcomeSealed || crypto.ScanFields(a.body, &reply) != nil {
		return nil
	}
	var odd []string
	if string(reply.ToUserName) != string(p.fields.FromUserName) {
		odd = append(odd, "its ToUserName is not the sender")
	}
	if string(reply.FromUserName) != string(p.fields.ToUserName) {
		odd = append(odd, "its FromUserName is not the account")
	}
	if len(reply.CreateTime) > len("1700000000") {
		odd = append(odd, "its CreateTime is not in seconds")
	}
	return odd
}

// settle sees to an answer that the first push did not get. If none of the later ones does either, it is delivered
// otherwise, or said to be late.
func (m *Message) settle(p *push, f *facts, c *call, a passiveReply, late bool) {
	if a.outcome != outcomeSealed {
		return // there is nothing to deliver
	}
	if !late && m.delivered(c) {
		m.app.metrics().messageSealed.Inc()
		return
	}
	if m.clustered {
		switch delivered, taken := m.app.claims().forsake(c, m.SlowReply == slowCustomerService); {
		case taken:
			return
		case delivered:
			m.app.metrics().messageSealed.Inc()
			return
		}
	}
	m.app.metrics().replies.WithLabelValues(outcomeLate).Inc()
	if m.SlowReply != slowCustomerService {
		m.app.logger.Warn("the backend's answer came too late for WeChat's last push and is not delivered: have the backend answer within 14 seconds, or choose slow_reply customer_service",
			m.fields(p, f)...)
		return
	}
	key := tokens.AccountKey(f.appid)
	if f.platform != "" {
		key = tokens.AuthorizerKey(f.platform, f.appid)
	}
	ctx, cancel := context.WithTimeout(context.Background(), backgroundTimeout)
	defer cancel()
	err := m.app.sendLate(ctx, key, f.openID, p.fields.Format, a.body)
	m.app.metrics().lateReplies.WithLabelValues(result(err)).Inc()
	if err != nil {
		m.app.logger.Error("the backend's answer came too late for WeChat's last push and could not be sent by the customer-service API",
			append(m.fields(p, f), zap.Error(err))...)
	}
}

// delivered waits until one of the pushes got the answer, or can no longer come.
func (m *Message) delivered(c *call) bool {
	delivered := m.app.calls().delivery(c)
	if delivered == nil {
		return true
	}
	timer := time.NewTimer(maxHold) // the next push comes before that, if one does
	defer timer.Stop()
	select {
	case <-delivered:
		return true
	case <-timer.C:
		return m.SlowReply == slowCustomerService && !m.app.calls().forsake(c)
	}
}

// writeAnswer answers a push. An answer in the other format, to a push before the account's was changed in WeChat's console, is none to this one.
func (m *Message) writeAnswer(w http.ResponseWriter, p *push, a passiveReply) {
	switch {
	case a.outcome == outcomePlain:
		writePlain(w, a.body)
	case a.outcome == outcomeSealed && isReply(p.fields.Format, a.body) && m.app.writeReply(w, p, a.body) == nil:
	case a.outcome != outcomeSealed && m.writeText(w, p, m.FallbackText):
	default:
		writePlain(w, success)
	}
}

// writeSlow answers the last push without the backend's answer.
func (m *Message) writeSlow(w http.ResponseWriter, p *push) {
	p.slow = true
	if m.SlowReply != slowText || !m.writeText(w, p, m.SlowReplyText) {
		writePlain(w, success)
	}
}

// writeText answers a push with a text of the configuration, if there is one and it can be: a mini program has no text
// replies, and WeChat shows its users the very error notice that the text is to spare them.
func (m *Message) writeText(w http.ResponseWriter, p *push, text string) bool {
	return text != "" && !m.isMiniProgram(p) && m.app.writeReply(w, p, textReply(p, text)) == nil
}

// isMiniProgram reports whether a push is known to be a mini program's. Of an authorizer it shows by what it granted; where that
// says nothing, by a page or session that WeChat documents of mini programs alone.
func (m *Message) isMiniProgram(p *push) bool {
	if p.platform != nil {
		if mini, known := m.app.manager().IsMiniProgram(p.platform.AppID, p.entry.AppID); known {
			return mini
		}
	}
	f := &p.fields
	return string(f.MsgType) == "miniprogrampage" || p.isEvent() && string(f.Event) == "user_enter_tempsession"
}
