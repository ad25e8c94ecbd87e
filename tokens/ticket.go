package tokens

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

const (
	// ticketLife is how long a component_verify_ticket can be exchanged.
	ticketLife = 12 * time.Hour
	// pushInterval is how often, at most, WeChat is asked to push a platform's ticket.
	pushInterval = 10 * time.Minute

	pathStartPush = "/cgi-bin/component/api_start_push_ticket"
)

// Ticket is a component_verify_ticket, which WeChat pushes every ten minutes.
type Ticket struct {
	Value     secret.String
	CreatedAt time.Time // CreateTime of the push
}

func (t Ticket) live(now time.Time) bool {
	return !t.Value.IsZero() && now.Before(t.CreatedAt.Add(ticketLife))
}

// same reports whether both are one push.
func (t Ticket) same(o Ticket) bool {
	return t.CreatedAt.Equal(o.CreatedAt) && t.Value.Equal(o.Value.Reveal())
}

// supersedes: of two tickets of one second the one that came last counts.
func (t Ticket) supersedes(o Ticket) bool { return !t.CreatedAt.Before(o.CreatedAt) }

type ticketWire struct {
	Ticket    string `json:"ticket"`
	CreatedAt int64  `json:"created_at"`
}

// ticketTable is the exact memory of the newest ticket of each platform, for when the store fails.
type ticketTable struct {
	mu    sync.Mutex
	held  map[string]heldTicket
	asked map[string]time.Time // when api_start_push_ticket was last called
	none  map[string]time.Time // until when it is believed that there is no ticket
}

type heldTicket struct {
	Ticket
	durable bool
	refused bool // WeChat does not take it, whatever its age
}

func (t *ticketTable) get(platform string) heldTicket {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.held[platform]
}

// offer keeps a ticket unless a newer one is held, and returns what is held now.
func (t *ticketTable) offer(platform string, ticket Ticket, durable bool) heldTicket {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.held == nil {
		t.held = make(map[string]heldTicket)
	}
	delete(t.none, platform)
	h := t.held[platform]
	switch {
	case h.same(ticket):
		h.durable = h.durable || durable
	case ticket.supersedes(h.Ticket):
		h = heldTicket{Ticket: ticket, durable: durable}
	}
	t.held[platform] = h
	return h
}

func (t *ticketTable) unsaved() (n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, h := range t.held {
		if !h.durable {
			n++
		}
	}
	return n
}

// noTicketRecheck is for how long it is believed that a platform has no ticket: another node may be told.
const noTicketRecheck = time.Second

// missing notes that a platform has no ticket that works.
func (t *ticketTable) missing(platform string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.none == nil {
		t.none = make(map[string]time.Time)
	}
	t.none[platform] = time.Now().Add(noTicketRecheck)
}

// absent is ErrNoTicket while a platform is known to have none.
func (t *ticketTable) absent(platform string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if time.Now().Before(t.none[platform]) {
		return fmt.Errorf("platform %s: %w", platform, ErrNoTicket)
	}
	return nil
}

// refuse notes that WeChat did not take a ticket. It reports whether the ticket was the one held.
func (t *ticketTable) refuse(platform string, ticket Ticket) {
	t.mu.Lock()
	defer t.mu.Unlock()
	h := t.held[platform]
	if !h.same(ticket) {
		if !ticket.supersedes(h.Ticket) {
			return
		}
		h = heldTicket{Ticket: ticket, durable: true} // from the store
	}
	if t.held == nil {
		t.held = make(map[string]heldTicket)
	}
	h.refused = true
	t.held[platform] = h
}

// platforms are those with a ticket in memory.
func (t *ticketTable) platforms() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Collect(maps.Keys(t.held))
}

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
	if t.asked == nil {
		t.asked = make(map[string]time.Time)
	}
	now := time.Now()
	if last, ok := t.asked[platform]; ok && now.Sub(last) < pushInterval {
		return pushInterval - now.Sub(last)
	}
	t.asked[platform] = now
	return 0
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
	held := m.tickets.offer(platform, t, false)
	if held.durable {
		return nil
	}
	if held.same(t) && !before.same(t) {
		m.troubles.over(ComponentKey(platform)) // what failed for want of a ticket may be tried at once
	}
	if err := m.saveTicket(ctx, env, platform); err != nil {
		m.queue.add("ticket "+platform, backoffFirst, func(ctx context.Context) error {
			env, err := m.current()
			if err != nil {
				return nil //nolint:nilerr // closed
			}
			if _, ok := env.platform(platform); !ok {
				m.tickets.forget(platform)
				return nil
			}
			if err := m.saveTicket(ctx, env, platform); err != nil {
				return err
			}
			// Pushes that were not acknowledged may have made WeChat stop.
			if p, ok := env.platform(platform); ok && m.tickets.mayAsk(platform) == 0 {
				m.askForPush(ctx, env, p, "a component_verify_ticket could not be stored for a while")
			}
			return nil
		})
		return err
	}
	return nil
}

// saveTicket writes the ticket held in memory, unless the store has a newer one.
func (m *Manager) saveTicket(ctx context.Context, env *Environment, platform string) error {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	name := ticketName(platform)
	unlock, err := m.locks.lock(ctx, name)
	if err != nil {
		return fmt.Errorf("%w: write of %s: %w", ErrStore, name, err)
	}
	defer unlock()
	held := m.tickets.get(platform)
	if held.durable {
		return nil
	}
	var stored ticketWire
	switch err := m.loadRecord(ctx, env, name, &stored); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case fromUnix(stored.CreatedAt).After(held.CreatedAt):
		m.tickets.offer(platform, stored.ticket(), true)
		return nil
	}
	err = m.storeRecord(ctx, env, name, ticketWire{Ticket: held.Value.Reveal(), CreatedAt: unix(held.CreatedAt)})
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

func (w ticketWire) ticket() Ticket {
	return Ticket{Value: secret.New(w.Ticket), CreatedAt: fromUnix(w.CreatedAt)}
}

// Ticket returns the newest ticket of a platform that this node or the store knows. It is ErrNoTicket if there is
// none, or only one older than twelve hours.
func (m *Manager) Ticket(ctx context.Context, platform string) (Ticket, error) {
	env, err := m.current()
	if err != nil {
		return Ticket{}, err
	}
	if err := env.knows(ComponentKey(platform)); err != nil {
		return Ticket{}, err
	}
	return m.ticket(ctx, env, platform)
}

func (m *Manager) ticket(ctx context.Context, env *Environment, platform string) (Ticket, error) {
	var stored ticketWire
	err := m.loadRecord(ctx, env, ticketName(platform), &stored)
	held := m.tickets.get(platform)
	t, refused := held.Ticket, held.refused
	if err == nil && stored.ticket().CreatedAt.After(t.CreatedAt) {
		t, refused = stored.ticket(), false // another node was told
	}
	switch {
	case t.live(time.Now()) && !refused:
		return t, nil
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return Ticket{}, err
	default:
		m.tickets.missing(platform)
		return Ticket{}, fmt.Errorf("platform %s: %w", platform, ErrNoTicket)
	}
}

func pushJob(platform string) string { return "push " + platform }

// wantTicket makes sure that WeChat is asked for a platform's ticket.
func (m *Manager) wantTicket(platform string) {
	m.queue.add(pushJob(platform), 0, m.watchTicket(platform))
}

// watchTicket is the job that asks WeChat to push tickets while a platform has none, at most once per pushInterval.
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
		switch _, err := m.ticket(ctx, env, platform); {
		case err == nil:
			return nil
		case !errors.Is(err, ErrNoTicket):
			return err
		}
		if wait := m.tickets.mayAsk(platform); wait > 0 {
			return retryError{after: wait}
		}
		m.askForPush(ctx, env, p, "there is no component_verify_ticket")
		return retryError{after: pushInterval}
	}
}

// askForPush calls api_start_push_ticket, which names the secret differently from every other call.
func (m *Manager) askForPush(ctx context.Context, env *Environment, p PlatformCredentials, why string) {
	body := struct {
		AppID  string `json:"component_appid"`
		Secret string `json:"component_secret"`
	}{p.AppID, p.Secret.Reveal()}
	if err := env.API.Post(ctx, pathStartPush, nil, body, nil); err != nil {
		env.Log.Error(why+", and WeChat cannot be asked to push one", "platform", p.AppID, "error", err)
		return
	}
	env.Log.Warn(why+"; asked WeChat to push one, which takes up to ten minutes", "platform", p.AppID)
}
