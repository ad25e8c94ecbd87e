package wxsim

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// ErrTicketsStopped means that WeChat stopped pushing tickets, after ticketFailures wrong
// answers in a row, until api_start_push_ticket is called.
var ErrTicketsStopped = errors.New("ticket pushes are stopped: api_start_push_ticket starts them")

// ticketFailures: WeChat names no number; three pushes with all their retries is a guess.
const ticketFailures = 3

// PushTicket makes a new component_verify_ticket and pushes it to the platform's event URL,
// and to that of the test configuration if there is one. The hostile simulator now and then pushes
// it twice, and the ticket before it again afterwards.
func (s *Server) PushTicket(ctx context.Context, platformAppID string) (PushResult, error) {
	s.mu.Lock()
	p := s.platforms[platformAppID]
	if p == nil {
		s.mu.Unlock()
		return PushResult{}, fmt.Errorf("no platform %s", platformAppID)
	}
	if p.stopped {
		s.mu.Unlock()
		return PushResult{}, ErrTicketsStopped
	}
	h := holder{KindTicket, platformAppID, platformAppID}
	old, oldAt, now := s.current[h], p.prevAt, s.now()
	ticket := s.issue(h, s.cfg.Lives.Ticket)
	s.current[h], p.prevAt = ticket, now
	testURL := p.TestEventURL
	s.mu.Unlock()

	d, err := s.eventDelivery(platformAppID, platformAppID, "component_verify_ticket", now, Field{Name: "ComponentVerifyTicket", Value: ticket.value})
	if err != nil {
		return PushResult{}, err
	}
	r, err := d.run(ctx)
	if err != nil {
		return r, err
	}
	if testURL != "" {
		second := *d
		second.url = testURL
		if _, err := second.run(ctx); err != nil {
			return r, err
		}
	}
	s.countTicket(platformAppID, r.OK())
	if r.OK() && s.dice.hit(s.cfg.Faults.RepeatedTickets, "ticket-twice", platformAppID) {
		if err := d.again(ctx, &r); err != nil {
			return r, err
		}
	}
	if r.OK() && old != nil && oldAt.Unix() < now.Unix() && s.dice.hit(s.cfg.Faults.StaleTickets, "ticket-stale", platformAppID) {
		stale, err := s.eventDelivery(platformAppID, platformAppID, "component_verify_ticket", oldAt, Field{Name: "ComponentVerifyTicket", Value: old.value})
		if err != nil {
			return r, err
		}
		if _, err := stale.run(ctx); err != nil {
			return r, err
		}
	}
	return r, nil
}

func (s *Server) countTicket(platformID string, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.platforms[platformID]
	if p.failures++; ok {
		p.failures = 0
	}
	p.stopped = p.failures >= ticketFailures
}

// PushEvent pushes any event of a platform: InfoType and the fields besides AppId and
// CreateTime. AppID is the account that it is about, for the journal.
func (s *Server) PushEvent(ctx context.Context, platformAppID, appID, infoType string, fields ...Field) (PushResult, error) {
	d, err := s.eventDelivery(platformAppID, appID, infoType, s.now(), fields...)
	if err != nil {
		return PushResult{}, err
	}
	return d.run(ctx)
}

// EventPush is a push to the event URL with everything that a test may want to bend.
type EventPush struct {
	Platform string
	InfoType string
	Fields   []Field // besides AppId, CreateTime, InfoType
	Raw      []byte  // the whole plaintext instead
	// CreateTime defaults to now.
	CreateTime time.Time
	Keys       *PushKeys
	Skew       time.Duration
	Attempts   int // default Pace.Attempts
	Tamper     func(*Outgoing)
}

// PushEventWith pushes a bent event.
func (s *Server) PushEventWith(ctx context.Context, e EventPush) (PushResult, error) {
	if e.CreateTime.IsZero() {
		e.CreateTime = s.now()
	}
	d, err := s.eventDelivery(e.Platform, e.Platform, e.InfoType, e.CreateTime, e.Fields...)
	if err != nil {
		return PushResult{}, err
	}
	if e.Raw != nil {
		d.plain = e.Raw
	}
	if e.Attempts > 0 {
		d.attempts = e.Attempts
	}
	if e.Keys != nil {
		id := e.Keys.ReceiveID
		if id == "" {
			id = e.Platform
		}
		if d.crypt, err = NewCrypt(e.Keys.Token, e.Keys.AESKey, id); err != nil {
			return PushResult{}, err
		}
	}
	d.skew, d.tamper = e.Skew, e.Tamper
	return d.run(ctx)
}

// eventDelivery prepares a push to the event URL.
func (s *Server) eventDelivery(platformID, appID, infoType string, created time.Time, fields ...Field) (*delivery, error) {
	if s.err != nil {
		return nil, s.err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.platforms[platformID]
	if p == nil {
		return nil, fmt.Errorf("no platform %s", platformID)
	}
	if p.EventURL == "" {
		return nil, ErrNoURL
	}
	all := append([]Field{
		{Name: "AppId", Value: platformID}, {Name: "CreateTime", Value: strconv.FormatInt(created.Unix(), 10), Number: true},
		{Name: "InfoType", Value: infoType},
	}, fields...)
	b := builder{
		format: FormatXML, bare: s.dice.hit(s.cfg.Faults.NoCDATA, "event-cdata", platformID),
		lines: s.dice.hit(s.cfg.Faults.StrayBytes, "event-lines", platformID),
	}
	return &delivery{
		s: s, url: p.EventURL, crypt: p.crypt, mode: ModeSafe, format: FormatXML, idName: "AppId", id: platformID,
		platform: platformID, appID: appID, plain: b.build(all), attempts: s.cfg.Pace.Attempts, event: true, judge: judgeEvent,
	}, nil
}

// judgeEvent wants exactly `success`, plain.
func judgeEvent(att Attempt) verdict {
	switch {
	case att.Err != nil:
		return verdict{kind: ReplyNone, wrong: "no answer: " + att.Err.Error()}
	case att.Status != http.StatusOK:
		return verdict{kind: ReplyNone, wrong: fmt.Sprintf("status %d", att.Status)}
	case string(att.Body) != answerSuccess:
		return verdict{kind: ReplyNone, wrong: "the body is not exactly `success`"}
	default:
		return verdict{kind: ReplySuccess}
	}
}

// Handshake is the outcome of the console's check of a push URL.
type Handshake struct {
	Attempt
	Wrong string // "" when the URL was accepted
}

// VerifyEventURL checks a platform's event URL as the console does on saving: GET with echostr.
func (s *Server) VerifyEventURL(ctx context.Context, platformAppID string) (Handshake, error) {
	d, err := s.eventDelivery(platformAppID, platformAppID, "", s.now())
	if err != nil {
		return Handshake{}, err
	}
	return d.verify(ctx), nil
}

// VerifyMessageURL does the same with a message URL: of a plain account, or with a platform for
// one of its authorizers.
func (s *Server) VerifyMessageURL(ctx context.Context, platformAppID, appID string) (Handshake, error) {
	d, err := s.prepare(&Message{Platform: platformAppID, AppID: appID})
	if err != nil {
		return Handshake{}, err
	}
	return d.verify(ctx), nil
}

func (d *delivery) verify(ctx context.Context) Handshake {
	throw := d.s.dice.throw("echostr", d.appID)
	timestamp, nonce := strconv.FormatInt(d.s.now().Unix(), 10), strconv.Itoa(throw.IntN(1_000_000_000))
	echo := strconv.FormatUint(throw.Uint64(), 10)
	if throw.IntN(2) == 0 {
		echo = strings.Replace(randomText(40), "-", "+", 1) + "+/=" // as in the encrypted flavour: needs escaping
	}
	out := &Outgoing{Method: http.MethodGet, URL: d.url, Header: http.Header{"User-Agent": {"Mozilla/4.0"}}, Query: []Param{
		{"signature", d.crypt.Sign(timestamp, nonce)}, {"echostr", echo}, {"timestamp", timestamp}, {"nonce", nonce},
	}}
	h := Handshake{Attempt: d.s.post(ctx, out)}
	switch {
	case h.Err != nil:
		h.Wrong = "no answer: " + h.Err.Error()
	case h.Status != http.StatusOK:
		h.Wrong = fmt.Sprintf("status %d", h.Status)
	case string(h.Body) != echo:
		h.Wrong = "the body is not exactly echostr"
	}
	d.write(out, h.Attempt, verdict{wrong: h.Wrong}, 0)
	return h
}
