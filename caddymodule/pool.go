package caddymodule

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// Limits of what reloads share.
const (
	maxUsers  = 100_000 // tracking ids remembered at once
	maxBodies = 200_000 // pushes in plaintext mode remembered at once

	backgroundTimeout = 30 * time.Second // one piece of work begun for a push that was already answered
	drainTimeout      = 5 * time.Second  // for such work when the last configuration goes
	endTimeout        = time.Second      // then, for what has been cut off to leave to the next process, in its store, what it has not done
	// exitTimeout is how long a process that ends waits for the backends that work on pushes: as long as WeChat does.
	exitTimeout = 15 * time.Second
	exitLook    = 20 * time.Millisecond // how often it looks whether they are done
)

// sharedPool holds what outlives a configuration, one per store. Adding an account, a client or a key is the
// commonest reload, so those are not part of the key: they live in the environment that each generation brings.
var sharedPool = caddy.NewUsagePool()

// shared is the state that reloads share.
type shared struct {
	manager *tokens.Manager
	users   *tokens.UserTable
	metrics *metrics
	health  *health
	feed    *feed
	events  *eventQueue
	claims  *claims
	*pushMemory
	// authorizations are the starts and ends of wechat_authorize.
	authorizations *authorizations
	// logins is what visitors brought to callbacks of wechat_oauth that was good for nothing.
	logins *visitorLimits

	work   tasks
	ctx    context.Context // ends background work
	cancel context.CancelFunc
	keeper sync.WaitGroup // of what runs all the time, until stop
	stop   context.CancelFunc
	heir   atomic.Pointer[shared] // takes the place of this one, which ends; nil: nothing does

	mu           sync.Mutex
	environments []*tokens.Environment // in force and waiting, the current one last
	emitters     map[*tokens.Environment]*emitter
}

// pushMemory is what is known of pushes. Another store does not make WeChat begin anew: it pushes again what the configuration of before
// has not answered yet, and that is still at work on.
type pushMemory struct {
	calls *callTable
	// bodies has the text that came with each timestamp and nonce in plaintext mode.
	bodies        *tokens.Window[pushID, pushID]
	releaseChecks *releaseChecks

	forgotten *prometheus.CounterVec
	holders   atomic.Int32

	mu     sync.Mutex
	limits []limitsOf // of the configurations in force, the current one's last
}

// limitsOf are the limits of a configuration, which is known by its environment.
type limitsOf struct {
	env *tokens.Environment
	pushLimits
}

// bound has the limits of a configuration hold that comes in force.
func (p *pushMemory) bound(env *tokens.Environment, l pushLimits) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.limits = append(p.limits, limitsOf{env, l})
	p.calls.limit(l)
}

// unbound is the end of bound. When it was the current configuration, because it was refused after all, the limits of the one before it hold
// again; the last one's stay.
func (p *pushMemory) unbound(env *tokens.Environment) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.limits = slices.DeleteFunc(p.limits, func(l limitsOf) bool { return l.env == env })
	if n := len(p.limits); n > 0 {
		p.calls.limit(p.limits[n-1].pushLimits)
	}
}

// hold is the memory that a configuration goes on with; nil: a new one is made.
func (p *pushMemory) hold() *pushMemory {
	if p == nil {
		p = &pushMemory{bodies: tokens.NewWindow[pushID, pushID](2*defaultTimestampWindow, maxBodies), releaseChecks: newReleaseChecks()}
		p.forgotten = newForgotten()
		p.calls = newCallTable(func(what string) { p.forgotten.WithLabelValues(what).Inc() })
	}
	p.holders.Add(1)
	return p
}

func (p *pushMemory) letGo() {
	if p.holders.Add(-1) == 0 {
		p.bodies.Close()
		p.releaseChecks.Close()
	}
}

// inForceNow is the app of the configuration that Caddy runs, which is the one of before while another is loaded; nil: there is none.
func inForceNow() *App {
	app, err := optionalApp(caddy.ActiveContext())
	if err != nil || app == nil || app.shared == nil {
		return nil
	}
	return app
}

// acquireShared takes the state of the store with that identity. Module is the store's, as a label. Before is the state of the
// configuration in force, or nil.
func acquireShared(identity, module string, before *shared) (*shared, error) {
	v, _, err := sharedPool.LoadOrNew(identity, func() (caddy.Destructor, error) {
		ctx, cancel := context.WithCancel(context.Background())
		manager := tokens.NewManager()
		var known *pushMemory
		if before != nil {
			known = before.pushMemory
		}
		s := &shared{
			manager: manager, users: tokens.NewUserTable(maxUsers), stop: cancel, pushMemory: known.hold(), feed: newFeed(),
			authorizations: newAuthorizations(manager), logins: newVisitorLimits(),
		}
		s.ctx, s.cancel = context.WithCancel(context.Background())
		s.users.Share(manager)
		s.metrics = newMetrics(manager, s.calls)
		s.metrics.forgotten = s.forgotten
		s.metrics.store = module
		s.health = newHealth(s.metrics)
		s.events = newEventQueue(ctx, s.metrics.eventsDropped.Inc)
		s.emitters = make(map[*tokens.Environment]*emitter)
		s.claims = newClaims(s.calls, s.metrics.degraded)
		s.keeper.Go(func() { keepLogUnquoted(ctx) })
		return s, nil
	})
	if err != nil {
		return nil, err
	}
	return v.(*shared), nil
}

func releaseShared(identity string) error {
	_, err := sharedPool.Delete(identity)
	return err
}

// use puts an environment in force.
func (s *shared) use(env *tokens.Environment) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.environments = append(s.environments, env)
	s.events.current.Store(s.emitters[env])
	s.manager.Use(env)
	s.claims.use(env)
}

// introduce says how the configuration of an environment emits events, before it is in force.
func (s *shared) introduce(env *tokens.Environment, e *emitter) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.emitters[env] = e
}

// retire withdraws an environment. When it is the current one, because its configuration was refused after all, the
// one before it is back in force; the last one stays, for requests that outlive their configuration.
func (s *shared) retire(env *tokens.Environment) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.emitters, env)
	i := slices.Index(s.environments, env)
	if i < 0 {
		return
	}
	current := i == len(s.environments)-1
	s.environments = slices.Delete(s.environments, i, i+1)
	if current && i == 0 {
		s.events.current.Store(nil) // nobody can hear them any more
	}
	if current && i > 0 {
		s.events.current.Store(s.emitters[s.environments[i-1]])
		s.manager.Use(s.environments[i-1])
		s.claims.use(s.environments[i-1])
	}
}

// running are the generations of this process.
var running generations

// generations are the configurations that are in force, the newest last. While a reload is under way there are two: Caddy starts
// the new one before it stops the old one.
type generations struct {
	mu   sync.Mutex
	apps []*App
}

// enter notes that a configuration came in force.
func (g *generations) enter(a *App) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.apps = append(g.apps, a)
}

// leave notes that a configuration ends. It may never have been in force.
func (g *generations) leave(a *App) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if i := slices.Index(g.apps, a); i >= 0 {
		g.apps = slices.Delete(g.apps, i, i+1)
	}
}

// current is a configuration itself while it is in force, and else the newest that is; nil: none is.
func (g *generations) current(own *App) *App {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case len(g.apps) == 0:
		return nil
	case own != nil && slices.Contains(g.apps, own):
		return own
	}
	return g.apps[len(g.apps)-1]
}

// firstBody reports whether a push in plaintext mode is the first with its timestamp and nonce, or the same as that: its
// signature covers these alone, and whoever saw it could put it on a text of their own. Guarded: one that is new here is
// to be compared with what came to other nodes.
func (s *shared) firstBody(p *push, window time.Duration, guarded bool) bool {
	b := p.scratch[:0]
	for _, part := range [...]string{p.codec.ReceiveID(), p.query.timestamp, p.query.nonce} {
		b = append(binary.AppendUvarint(b, uint64(len(part))), part...)
	}
	p.scratch = b
	id, text := shortSum(b), shortSum(p.body)
	life := 2*window + p.ahead.Abs()
	known, found := s.bodies.GetOrSetFor(id, life, func() pushID { return text })
	if !found && guarded {
		p.guard = &bodyGuard{id: id, text: text, life: life, shared: s}
	}
	return !found || known == text
}

// tasks are waited for together, and may become more meanwhile, which a sync.WaitGroup's may not.
type tasks struct {
	mu      sync.Mutex
	running int
	idle    chan struct{} // closed when none is left; nil: nobody waits
}

// Go runs a task.
func (t *tasks) Go(task func()) {
	t.mu.Lock()
	t.running++
	t.mu.Unlock()
	go func() {
		defer t.done()
		task()
	}()
}

func (t *tasks) done() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.running--; t.running == 0 && t.idle != nil {
		close(t.idle)
		t.idle = nil
	}
}

// Wait returns once none is running.
func (t *tasks) Wait() {
	t.mu.Lock()
	if t.running == 0 {
		t.mu.Unlock()
		return
	}
	if t.idle == nil {
		t.idle = make(chan struct{})
	}
	idle := t.idle
	t.mu.Unlock()
	<-idle
}

// background runs work that a push began and whose answer does not wait for it. It survives reloads, has a
// deadline, and is waited for when the process ends in good order.
func (s *shared) background(timeout time.Duration, work func(context.Context)) {
	s.work.Go(func() {
		ctx, cancel := context.WithTimeout(s.ctx, timeout)
		defer cancel()
		defer func() {
			if v := recover(); v != nil { // a bug costs one piece of work, not the process
				caddy.Log().Named("wechat").Error("background work panicked",
					zap.String("panic_type", fmt.Sprintf("%T", v)), zap.Stack("stack"))
			}
		}()
		work(ctx)
	})
}

// runOut waits for backends that work on pushes. The server does not: a push that WeChat dropped has no connection any more, and
// its handler would end with the process, unanswered. After a reload they go on by themselves.
func (s *shared) runOut() {
	timeout := time.After(exitTimeout)
	look := time.NewTicker(exitLook)
	defer look.Stop()
	for s.calls.inFlight() > 0 || s.calls.promises.Load() > 0 {
		select {
		case <-look.C:
		case <-timeout:
			return
		}
	}
}

// inherit has the state of the configuration in force take the place of this one. That is of another store, or this would not end.
func (s *shared) inherit() *shared {
	app := inForceNow()
	if app == nil || app.shared == s || caddy.Exiting() {
		return nil
	}
	s.heir.Store(app.shared)
	app.before.CompareAndSwap(s, nil)
	return app.shared
}

// current is the state itself, or what has taken its place: requests that were taken in before a reload outlive their own.
func (s *shared) current() *shared {
	for {
		heir := s.heir.Load()
		if heir == nil {
			return s
		}
		s = heir
	}
}

// drain waits for background work, for a while, and ends it. An heir waits in the place of this one, and the work goes on.
func (s *shared) drain(heir *shared) {
	if heir != nil {
		heir.work.Go(func() { // each piece of it has a deadline
			defer context.AfterFunc(heir.ctx, s.cancel)()
			defer s.cancel()
			s.work.Wait()
		})
		return
	}
	drained := make(chan struct{})
	go func() { s.work.Wait(); close(drained) }()
	for _, timeout := range [...]time.Duration{drainTimeout, endTimeout} {
		select {
		case <-drained:
		case <-time.After(timeout):
		}
		s.cancel()
	}
}

// Destruct ends everything once the last configuration that used it is gone. What was accepted and is not done yet becomes the duty of
// the state that takes the place of this one.
func (s *shared) Destruct() error {
	if caddy.Exiting() {
		s.runOut()
	}
	heir := s.inherit()
	s.drain(heir)
	s.stop()
	s.keeper.Wait()
	s.events.close(drainTimeout)
	s.claims.close()
	s.manager.Close()
	if heir != nil {
		heir.manager.TakeOver(s.manager)
	}
	s.users.Close()
	s.authorizations.close()
	s.logins.close()
	s.letGo()
	return nil
}
