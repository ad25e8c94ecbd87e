package tokens

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

const (
	// ticketLife is how long a component_verify_ticket can be exchanged.
	ticketLife = 12 * time.Hour
	// pushInterval is how often, at most, WeChat is asked to push a platform's ticket.
	pushInterval = 10 * time.Minute
	// askAgain is how soon that is tried again when WeChat was not reached.
	askAgain = time.Minute
	// ticketOverdue is the age at which the newest ticket says that WeChat's pushes do not arrive: two are missing.
	ticketOverdue = 25 * time.Minute
	// noTicketMemory is how long it is believed that a platform has no ticket. Another node may be given one.
	noTicketMemory = time.Second

	pathStartPush = "/cgi-bin/component/api_start_push_ticket"
)

// Ticket is a component_verify_ticket, which WeChat pushes every ten minutes.
type Ticket struct {
	Value     secret.String
	CreatedAt time.Time // CreateTime of the push
}

// same reports whether both are one push.
func (t Ticket) same(o Ticket) bool {
	return t.CreatedAt.Equal(o.CreatedAt) && t.Value.Equal(o.Value.Reveal())
}

// supersedes: of two tickets of one second the one that came last counts.
func (t Ticket) supersedes(o Ticket) bool { return !t.CreatedAt.Before(o.CreatedAt) }

type ticketWire struct {
	Ticket     string `json:"ticket"`
	CreatedAt  int64  `json:"created_at"`
	ReceivedAt int64  `json:"received_at,omitempty"`
}

// ticketTable is the exact memory of the newest ticket of each platform, for when the store fails.
type ticketTable struct {
	mu   sync.Mutex
	held map[string]heldTicket
	push map[string]pushState
}

// pushState is what is known of a platform's pushes.
type pushState struct {
	asked  time.Time // when api_start_push_ticket was last called
	wanted bool      // WeChat has to be asked, whether or not there is a ticket
	said   time.Time // when the log last heard that it cannot be asked
	askErr error     // why that was so the last time

	missingAt time.Time // when neither this node nor the store had a live ticket
	missing   error     // what was said then
	news      uint64    // how often another node may have been given one: what was read before that is not believed

	refused Ticket // by WeChat
	refusal error
}

// NoTicketError is ErrNoTicket, and says of which platform: an account that is asked for may have authorised another.
type NoTicketError struct {
	Platform string
	cause    error // why there is none; nil: it has not come
}

// Error implements error.
func (e *NoTicketError) Error() string {
	text := "platform " + e.Platform + ": " + ErrNoTicket.Error()
	if e.cause != nil {
		text += ": " + e.cause.Error()
	}
	return text
}

// Unwrap is for errors.Is and errors.As.
func (e *NoTicketError) Unwrap() []error {
	if e.cause == nil {
		return []error{ErrNoTicket}
	}
	return []error{ErrNoTicket, e.cause}
}

// noTicket says why there is none.
func noTicket(platform string, cause error) error { return &NoTicketError{platform, cause} }

// heldTicket is a ticket as this gateway has it.
type heldTicket struct {
	Ticket
	// receivedAt is when it first came, by our clock: its life is counted from there, as WeChat's clock and ours may
	// differ by more than that life. The same push again does not change it.
	receivedAt time.Time
	durable    bool
}

func (t heldTicket) live(now time.Time) bool {
	return !t.Value.IsZero() && now.Before(t.receivedAt.Add(ticketLife))
}

func (t heldTicket) wire() ticketWire {
	return ticketWire{Ticket: t.Value.Reveal(), CreatedAt: unix(t.CreatedAt), ReceivedAt: unix(t.receivedAt)}
}

func (w ticketWire) held() heldTicket {
	h := heldTicket{
		Ticket:     Ticket{Value: secret.New(w.Ticket), CreatedAt: fromUnix(w.CreatedAt)},
		receivedAt: fromUnix(w.ReceivedAt), durable: true,
	}
	if h.receivedAt.IsZero() {
		h.receivedAt = h.CreatedAt
	}
	return h
}

func (t *ticketTable) get(platform string) heldTicket {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.held[platform]
}

// offer keeps a ticket unless a newer one is held, and returns what is held now.
func (t *ticketTable) offer(platform string, ticket heldTicket) heldTicket {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.held == nil {
		t.held = make(map[string]heldTicket)
	}
	h := t.held[platform]
	switch {
	case h.same(ticket.Ticket):
		h.durable = h.durable || ticket.durable
	case ticket.supersedes(h.Ticket):
		h = ticket
		t.change(platform, func(s *pushState) { s.missing = nil })
	}
	t.held[platform] = h
	return h
}

// change changes a platform's state; mu is held.
func (t *ticketTable) change(platform string, change func(*pushState)) {
	if t.push == nil {
		t.push = make(map[string]pushState)
	}
	s := t.push[platform]
	change(&s)
	t.push[platform] = s
}

// pick returns the newer one of what is held and what the store has, if it can be exchanged, and ErrNoTicket
// otherwise. That is remembered for a moment if the store was read, unless there was news since.
func (t *ticketTable) pick(platform string, stored heldTicket, read bool, news uint64) (heldTicket, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	best := t.held[platform]
	if stored.CreatedAt.After(best.CreatedAt) {
		best = stored // another node was told
	}
	now, state := time.Now(), t.push[platform]
	if best.receivedAt.After(now.Add(clockSlack)) {
		// The clock was set back since, by nobody knows how much, or another node's is ahead: it counts as received now. A ticket
		// from the store is kept so by whoever asked.
		if best.receivedAt = now.Truncate(time.Second); t.held[platform].same(best.Ticket) {
			best.durable = t.held[platform].durable
			t.held[platform] = best
		}
	}
	refused := best.same(state.refused)
	if best.live(now) && !refused {
		return best, nil
	}
	err := noTicket(platform, nil)
	if refused {
		err = noTicket(platform, state.refusal)
	}
	if read && state.news == news {
		t.change(platform, func(s *pushState) { s.missing, s.missingAt = err, now })
	}
	return heldTicket{}, err
}

// missing returns ErrNoTicket if a moment ago there was no ticket.
func (t *ticketTable) missing(platform string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.push[platform]; s.missing != nil && time.Since(s.missingAt) < noTicketMemory {
		return s.missing
	}
	return nil
}

// refuse notes that WeChat refused a ticket. The next push, whatever its value, is another one.
func (t *ticketTable) refuse(platform string, ticket Ticket, why error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.change(platform, func(s *pushState) { s.refused, s.refusal = ticket, why })
}

// want notes whether WeChat has to be asked to push, although there is a ticket.
func (t *ticketTable) want(platform string, wanted bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.change(platform, func(s *pushState) { s.wanted = wanted })
}

// doubt is want for an answer that casts doubt on the ticket, and reports whether it is the first one since WeChat was asked.
func (t *ticketTable) doubt(platform string) (first bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.change(platform, func(s *pushState) { first, s.wanted = !s.wanted, true })
	return first
}

func (t *ticketTable) wanted(platform string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.push[platform].wanted
}

// waiting returns the platforms whose ticket the store does not have.
func (t *ticketTable) waiting() (platforms []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for p, h := range t.held {
		if !h.durable {
			platforms = append(platforms, p)
		}
	}
	return platforms
}

func (t *ticketTable) unsaved() int { return len(t.waiting()) }

// forget drops the ticket of a platform that is no longer configured.
func (t *ticketTable) forget(platform string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.held, platform)
}

// mayAsk reports how long to wait until WeChat may be asked again for a push; 0: now, and the question is noted.
func (t *ticketTable) mayAsk(platform string) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if last := t.push[platform].asked; !last.IsZero() && now.Sub(last) < pushInterval {
		return pushInterval - now.Sub(last)
	}
	t.change(platform, func(s *pushState) { s.asked = now })
	return 0
}

// notAsked takes back that WeChat was asked, as it was not reached, and says whether to say so in the log.
func (t *ticketTable) notAsked(platform string, err error) (say bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	t.change(platform, func(s *pushState) {
		s.askErr = err
		if errors.Is(err, ErrUnreachable) {
			s.asked = now.Add(askAgain - pushInterval)
		}
		if say = s.said.IsZero() || now.Sub(s.said) >= troubleLogEvery; say {
			s.said = now
		}
	})
	return say
}

// agreed notes that WeChat was asked.
func (t *ticketTable) agreed(platform string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.change(platform, func(s *pushState) { s.askErr = nil })
}

// PutTicket keeps a ticket that was pushed. It is durable when nil is returned. An older one than the one held is
// ignored. If the store fails the error wraps ErrStore; the ticket serves from memory then, and is written later.
func (m *Manager) PutTicket(ctx context.Context, platform string, t Ticket) error {
	env, err := m.current()
	if err != nil {
		return err
	}
	if err := env.knows(ComponentKey(platform)); err != nil {
		return err
	}
	if t.Value.IsZero() {
		return fmt.Errorf("ticket of %s: the push has no ComponentVerifyTicket", platform)
	}
	if t.CreatedAt.IsZero() {
		t.CreatedAt = time.Now()
	}
	t.CreatedAt = fromUnix(unix(t.CreatedAt)) // as it will be read back
	before := m.tickets.get(platform)
	held := m.tickets.offer(platform, heldTicket{Ticket: t, receivedAt: time.Now().Truncate(time.Second)})
	if held.durable && !held.same(t) {
		return nil // older than what is kept
	}
	if held.same(t) && !before.same(t) {
		m.troubles.over(ComponentKey(platform), secret.String{}) // what failed for want of a ticket may be tried at once
		env.Observer.Happened(TicketReceived, ComponentKey(platform), nil)
	}
	if err := m.saveTicket(ctx, env, platform); err != nil {
		m.queue.add("ticket "+platform, backoffFirst, m.saveTicketLater(platform))
		return err
	}
	m.tickets.want(platform, false) // WeChat pushes, and is answered
	if m.rosters.incomplete(platform) {
		m.queue.hasten(rosterJob(platform)) // what it needs is there
	}
	return nil
}

// saveTicketLater is the job that writes a ticket which the store did not take, and then has WeChat asked for more:
// it may have stopped pushing to a gateway that did not acknowledge.
func (m *Manager) saveTicketLater(platform string) func(context.Context) error {
	return m.saveHeldTicket(platform, func() {
		m.tickets.want(platform, true)
		m.wantTicket(platform)
	})
}

// saveHeldTicket is a job that writes the ticket held in memory, and then calls saved, unless a push that came later was taken.
func (m *Manager) saveHeldTicket(platform string, saved func()) func(context.Context) error {
	return func(ctx context.Context) error {
		env, err := m.current()
		if err != nil {
			return nil //nolint:nilerr // closed: Close writes what waits
		}
		if _, ok := env.platform(platform); !ok {
			m.tickets.forget(platform)
			return nil
		}
		if m.tickets.get(platform).durable {
			return nil // a later push was taken: WeChat has not stopped
		}
		if err := m.saveTicket(ctx, env, platform); err != nil {
			return err
		}
		saved()
		return nil
	}
}

// saveTicket writes the ticket held in memory, unless the store has it or a newer one.
func (m *Manager) saveTicket(ctx context.Context, env *Environment, platform string) error {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	name := ticketName(platform)
	unlock, err := m.locks.lock(ctx, name)
	if err != nil {
		return fmt.Errorf("%w: write of %s: %w", ErrStore, name, err)
	}
	defer unlock()
	for range maxSwaps {
		if err = m.saveTicketOnce(ctx, env, platform); !errors.Is(err, ErrSwapped) {
			break // else another node was told at the same time
		}
	}
	return err
}

func (m *Manager) saveTicketOnce(ctx context.Context, env *Environment, platform string) error {
	name := ticketName(platform)
	held := m.tickets.get(platform)
	var stored ticketWire
	raw, err := m.loadRaw(ctx, env, name)
	if err == nil {
		_, err = m.decode(env, name, raw, &stored)
	}
	switch {
	case !errors.Is(err, errDamaged):
	case m.hearing.Load() != nil && m.lacksKeyOf(env, name, raw) != nil:
		if held.durable {
			return nil // the one held was there before it
		}
		stored, err = ticketWire{}, fs.ErrNotExist // another node's is not kept, with each that comes to either: the last push counts
	default:
		if err = m.setAside(ctx, env, name, new(ticketWire), false); err == nil {
			stored, raw, err = ticketWire{}, nil, fs.ErrNotExist
		}
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case fromUnix(stored.CreatedAt).After(held.CreatedAt):
		m.tickets.offer(platform, stored.held())
		return nil
	case stored.held().same(held.Ticket):
		held.receivedAt, held.durable = stored.held().receivedAt, true // the push came before, to another node or before a restart
		m.tickets.replace(platform, held)
		return nil
	}
	err = m.swapRecord(ctx, env, name, raw, held.wire())
	if err == nil {
		m.tickets.saved(platform, held.Ticket)
	}
	return err
}

// saved marks a ticket as durable if it is still the one held.
func (t *ticketTable) saved(platform string, ticket Ticket) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if h := t.held[platform]; h.same(ticket) {
		h.durable = true
		t.held[platform] = h
	}
}

// replace puts right what is known of the ticket that is held.
func (t *ticketTable) replace(platform string, ticket heldTicket) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.held[platform].same(ticket.Ticket) {
		t.held[platform] = ticket
	}
}

// Ticket returns the newest ticket of a platform that this node or the store knows. It is ErrNoTicket if there is
// none, or only one that came more than twelve hours ago or that WeChat refused.
func (m *Manager) Ticket(ctx context.Context, platform string) (Ticket, error) {
	env, err := m.current()
	if err != nil {
		return Ticket{}, err
	}
	if err := env.knows(ComponentKey(platform)); err != nil {
		return Ticket{}, err
	}
	t, err := m.ticket(ctx, env, platform)
	return t.Ticket, err
}

// TicketReceived returns when the newest ticket of a platform that this node knows came, by this node's clock: the zero
// time if there is none. It never waits.
func (m *Manager) TicketReceived(platform string) time.Time {
	return m.tickets.get(platform).receivedAt
}

func (m *Manager) ticket(ctx context.Context, env *Environment, platform string) (heldTicket, error) {
	var stored ticketWire
	news := m.tickets.news(platform)
	err := m.loadRecord(ctx, env, ticketName(platform), &stored)
	if errors.Is(err, errDamaged) {
		// The next push is kept in its place.
		stored, err = ticketWire{}, fs.ErrNotExist
	}
	read := err == nil || errors.Is(err, fs.ErrNotExist)
	t, missing := m.tickets.pick(platform, stored.held(), read, news)
	if missing != nil && !read {
		return heldTicket{}, err
	}
	if missing == nil && t.durable {
		m.tickets.offer(platform, t) // another node was told, or an earlier process
	}
	return t, missing
}

func pushJob(platform string) string { return "push " + platform }

// wantTicket makes sure that WeChat is asked for a platform's ticket.
func (m *Manager) wantTicket(platform string) {
	m.queue.add(pushJob(platform), 0, m.watchTicket(platform))
	m.queue.hasten(pushJob(platform))
}

// DoubtTicket is called when WeChat said, in a call that was made with a token of the platform's or of one of its authorizers, that
// the platform's ticket has expired or is invalid (61005, 61006): it is asked to push one, as often as may be. The one that is held stays,
// as the call did not bring it.
func (m *Manager) DoubtTicket(platform string) {
	env, err := m.current()
	if err != nil || env.knows(ComponentKey(platform)) != nil {
		return
	}
	if m.tickets.doubt(platform) {
		m.wantTicket(platform)
	}
}

// watchTicket is the job that asks WeChat to push tickets while a platform has none or only an old one, or once if
// pushes may have stopped, at most once per pushInterval.
func (m *Manager) watchTicket(platform string) func(context.Context) error {
	return func(ctx context.Context) error {
		env, err := m.current()
		if err != nil {
			return nil //nolint:nilerr // closed
		}
		p, ok := env.platform(platform)
		if !ok {
			return nil // no longer configured
		}
		t, err := m.ticket(ctx, env, platform)
		wanted := m.tickets.wanted(platform)
		switch {
		case err == nil && !wanted && time.Since(t.receivedAt) < ticketOverdue:
			return retryError{after: min(ticketOverdue-time.Since(t.receivedAt), ticketOverdue)} // or the clock was set back
		case err != nil && !errors.Is(err, ErrNoTicket):
			return err
		}
		if last := m.tickets.get(platform).receivedAt; !last.IsZero() && time.Since(last) >= ticketOverdue {
			env.Observer.Happened(TicketOverdue, ComponentKey(platform), err)
		}
		if wait := m.askedLately(ctx, env, platform); wait > 0 {
			return retryError{after: wait}
		}
		if m.hearing.Load() != nil { // what casts doubt on a ticket is said to all nodes at once
			unlock, err := m.lockStore(ctx, env, pushAskedName(platform), storeTimeout)
			switch {
			case err == nil:
				defer unlock()
				if wait := m.askedLately(ctx, env, platform); wait > 0 {
					return retryError{after: wait}
				}
			case errors.Is(err, ErrLockHeld):
				return retryError{after: askAgain}
			}
		}
		if wait := m.tickets.mayAsk(platform); wait > 0 {
			return retryError{after: wait}
		}
		m.tickets.want(platform, false)
		err = m.askForPush(ctx, env, p, t.receivedAt)
		if err != nil && wanted {
			m.tickets.want(platform, true)
		}
		if errors.Is(err, ErrUnreachable) {
			return retryError{after: askAgain}
		}
		return retryError{after: pushInterval}
	}
}

// askedWire is when WeChat was last asked to push, by whichever node, before or after a restart.
type askedWire struct {
	AskedAt int64 `json:"asked_at"`
}

// askedLately reports how long to wait because another node, or an earlier process, has asked WeChat to push. What the
// store cannot tell does not keep the gateway from asking.
func (m *Manager) askedLately(ctx context.Context, env *Environment, platform string) time.Duration {
	var asked askedWire
	if m.loadRecord(ctx, env, pushAskedName(platform), &asked) != nil {
		return 0
	}
	since := time.Since(fromUnix(asked.AskedAt))
	if since < 0 || since >= pushInterval { // or the clock was set back
		return 0
	}
	return pushInterval - since
}

// askForPush calls api_start_push_ticket, which names the secret differently from every other call, and returns nil if
// WeChat agreed. Last is when the newest ticket came.
func (m *Manager) askForPush(ctx context.Context, env *Environment, p PlatformCredentials, last time.Time) error {
	body := struct {
		AppID  string `json:"component_appid"`
		Secret string `json:"component_secret"`
	}{p.AppID, p.Secret.Reveal()}
	if err := env.API.Post(ctx, pathStartPush, nil, body, nil); err != nil {
		if m.tickets.notAsked(p.AppID, err) {
			args := []any{"platform", p.AppID, "error", err}
			if api, ok := errors.AsType[*APIError](err); ok {
				args = append(args, m.explained(ComponentKey(p.AppID), api)...)
			}
			env.Log.Error("component_verify_ticket awaited, and WeChat cannot be asked to push one; tried again", args...)
		}
		return err
	}
	m.tickets.agreed(p.AppID)
	if err := m.storeRecord(ctx, env, pushAskedName(p.AppID), askedWire{AskedAt: time.Now().Unix()}); err != nil {
		env.Log.Warn("it cannot be kept that WeChat was asked to push tickets", "platform", p.AppID, "error", err)
	}
	switch {
	case last.IsZero():
		env.Log.Warn("component_verify_ticket awaited; asked WeChat to push one, which takes up to ten minutes", "platform", p.AppID)
	case time.Since(last) < ticketOverdue:
		env.Log.Warn("component_verify_ticket in doubt, as WeChat called it expired or invalid in a call, or pushes were not taken; asked WeChat to push again",
			"platform", p.AppID, "last_came", last.Format(time.RFC3339))
	default:
		env.Log.Warn("component_verify_ticket overdue; asked WeChat to push again: compare 授权事件接收URL in the platform's console with where wechat_event is served",
			"platform", p.AppID, "last_came", last.Format(time.RFC3339), "minutes_ago", int(time.Since(last).Minutes()))
	}
	return nil
}
