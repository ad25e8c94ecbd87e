package caddymodule

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// Ages at which something is said. WeChat pushes a ticket every ten minutes, and one lives twelve hours.
const (
	ticketLate     = 25 * time.Minute // two are missing: the gateway asks WeChat to push again
	ticketLost     = time.Hour        // six are, and asking did not help
	ticketDead     = 12 * time.Hour
	codeWaits      = time.Minute // an exchange takes a second
	rotationSettle = time.Hour   // without a push by an older key while the newest opens them: WeChat has forgotten the older
	writeFailLife  = sightingLife
	maxRecordsRead = 16 // of plain accounts without a token, for one status
)

// aboutStore is what findings about the store count for.
const aboutStore = "store"

// examination gathers the state of one configuration and what is wrong with it. It belongs to one goroutine.
type examination struct {
	app      *App
	now      time.Time
	findings []Finding

	platforms []PlatformStatus
	accounts  []AccountStatus
	store     StoreStatus
	storeErr  error
	read      int // records, see maxRecordsRead
}

// examine looks at what service depends on: store, tickets and tokens.
func (a *App) examine(ctx context.Context) *examination {
	x := &examination{app: a, now: time.Now(), findings: []Finding{}, platforms: []PlatformStatus{}, accounts: []AccountStatus{}}
	x.examineStore(ctx)
	tokenCtx, cancel := context.WithTimeout(ctx, tokenCheckWait)
	defer cancel()
	for _, p := range a.Platforms {
		x.platforms = append(x.platforms, x.platform(ctx, tokenCtx, p))
	}
	failing := 0
	for _, acc := range a.Accounts {
		s, dead := x.account(ctx, acc)
		x.accounts = append(x.accounts, s)
		if dead {
			failing++
		}
	}
	x.sealed(a.manager().MissingSealKey(), false) // what takes the node out of service was found before
	if len(a.Platforms) == 0 && failing > 0 && failing == len(a.Accounts) {
		for i := range x.findings {
			x.findings[i].unready = x.findings[i].unready || x.findings[i].Level == Red && x.app.account(x.findings[i].about) != nil
		}
	}
	return x
}

// found adds a finding.
func (x *examination) found(f Finding) { x.findings = append(x.findings, f) }

// has reports whether something with that code was found.
func (x *examination) has(code string) bool {
	return slices.ContainsFunc(x.findings, func(f Finding) bool { return f.Code == code })
}

// levelOf is the worst level of what was found about something.
func (x *examination) levelOf(about string) Level {
	level := Green
	for _, f := range x.findings {
		if f.about == about {
			level = worst(level, f.Level)
		}
	}
	return level
}

func (x *examination) examineStore(ctx context.Context) {
	a := x.app
	m := a.manager()
	ctx, cancel := context.WithTimeout(ctx, storeCheckWait)
	defer cancel()
	x.storeErr = m.CheckStore(ctx)
	writeFails, failedAt, reason := a.health().store.last()
	x.store = StoreStatus{
		Module: a.storeModule, LastError: timeOf(failedAt), Error: reason,
		Waiting: m.Waiting(), Unsaved: m.Unsaved(), Degraded: a.claims().away.Load(),
	}
	switch {
	case x.storeErr != nil:
		if x.store.Error == "" {
			x.store.LastError, x.store.Error = timeOf(x.now), safeReason(x.storeErr)
		}
		x.found(storeDown(x.store))
	case writeFails && (x.store.Waiting+x.store.Unsaved > 0 || x.now.Sub(failedAt) < writeFailLife):
		x.found(storeWriteFails(x.store))
	}
	// A ticket that is being written is in memory alone too: that is none of our business until a write fails.
	if unsaved := x.store.Unsaved; unsaved > 0 && (writeFails || x.storeErr != nil) {
		x.found(recordsUnsaved(unsaved))
	}
	if spilled := x.store.Waiting - x.store.Unsaved; spilled > 0 {
		x.found(recordsWaiting(x.store.Waiting))
	}
	if x.store.Degraded {
		x.found(deduplicationDegraded())
	}
}

// sealed reports whether an error says that a record waits for a seal_key, and has that found, once.
func (x *examination) sealed(err error, unready bool) bool {
	why, lacks := tokens.LacksSealKey(err)
	if lacks && !x.has(codeSealKey) {
		x.found(recordsSealed(x.store.Module, why, unready))
	}
	return lacks
}

// platform looks at a platform. TokenCtx is what is left of the time that all platforms have to get a token.
func (x *examination) platform(ctx, tokenCtx context.Context, p *Platform) PlatformStatus {
	m := x.app.manager()
	s := PlatformStatus{AppID: p.AppID, Keys: keyStatus(p.ring), LastPush: timeOf(when(p.ring.last))}
	received, sealed := m.TicketReceived(p.AppID), false
	if x.storeErr == nil && x.now.Sub(received) > ticketReread {
		// Another node may have been told since.
		storeCtx, cancel := context.WithTimeout(ctx, storeCheckWait)
		at, err := m.LastTicket(storeCtx, p.AppID)
		cancel()
		sealed = x.sealed(err, true)
		switch {
		case err == nil:
			received = at
		case !sealed:
			x.storeErr = err
			x.store.LastError, x.store.Error = timeOf(x.now), safeReason(err)
			x.found(storeDown(x.store))
		}
	}
	if !received.IsZero() {
		s.Ticket = &TicketStatus{Received: *timeOf(received), Age: max(0, int64(x.now.Sub(received)/time.Second))}
	}
	hasTicket := x.ticket(p, received, sealed)
	state := m.HeldToken(tokens.ComponentKey(p.AppID))
	if !state.Live && hasTicket && x.storeErr == nil {
		_, err := m.Get(tokenCtx, tokens.ComponentKey(p.AppID)) // which is held back if it failed a moment ago
		if state = m.HeldToken(tokens.ComponentKey(p.AppID)); state.Err == nil && !state.Live {
			state.Err = err
		}
	}
	s.Token = tokenStatus(state)
	if state.Err != nil && !errors.Is(state.Err, tokens.ErrNoTicket) {
		x.sealed(state.Err, !state.Live)
		x.found(tokenFails(subjectPlatform(p.AppID), p.AppID, state, !state.Live))
	}
	if at := when(p.ring.release); !at.IsZero() {
		s.ReleaseCheck = ReleaseCheckStatus{true, timeOf(at)}
	}
	waiting, oldest := m.Unexchanged(p.AppID)
	s.Unexchanged, s.Lost = waiting, m.OrphanCount(p.AppID)
	if waiting > 0 && x.now.Sub(oldest) > codeWaits {
		x.found(authorizationsWait(p.AppID, waiting))
	}
	if s.Lost > 0 {
		x.found(authorizationsLost(p.AppID, s.Lost))
	}
	x.rotation(subjectPlatform(p.AppID), p.AppID, p.ring)
	return s
}

// ticket looks at a platform's ticket and reports whether there is one that can be exchanged. Sealed says that the store has one which
// no seal_key opens.
func (x *examination) ticket(p *Platform, received time.Time, sealed bool) bool {
	m := x.app.manager()
	asking := m.PushRefusal(p.AppID)
	refused := m.TicketRefusal(p.AppID)
	age := x.now.Sub(received)
	switch {
	case received.IsZero() && sealed:
		x.found(ticketSealed(p.AppID))
	case received.IsZero():
		x.found(noTicket(p.AppID, asking))
	case refused != nil:
		x.found(ticketRefused(p.AppID, refused))
	case age > ticketDead:
		x.found(ticketExpired(p.AppID, age, asking))
	default:
		if age > ticketLate {
			x.found(ticketOverdue(p.AppID, age, asking))
		}
		return true
	}
	return false
}

// account looks at a plain account; dead: it has no token, and gets none.
func (x *examination) account(ctx context.Context, acc *Account) (s AccountStatus, dead bool) {
	m, key := x.app.manager(), tokens.AccountKey(acc.AppID)
	state := m.HeldToken(key)
	if !state.Live && state.Err == nil && x.storeErr == nil && x.read < maxRecordsRead {
		x.read++
		storeCtx, cancel := context.WithTimeout(ctx, storeCheckWait)
		switch err := m.Unreadable(storeCtx, key); {
		case x.sealed(err, false):
			state.Err = err
		case err != nil:
			x.read = maxRecordsRead // the store may be slow with the next one too
		}
		cancel()
	}
	s = AccountStatus{
		AppID: acc.AppID, Mode: acc.mode, Token: tokenStatus(state), Keys: keyStatus(acc.ring), LastPush: timeOf(when(acc.ring.last)),
	}
	if state.Err != nil {
		x.sealed(state.Err, false)
		x.found(tokenFails(subjectAccount(acc.AppID), acc.AppID, state, false))
		dead = !state.Live
	}
	x.rotation(subjectAccount(acc.AppID), acc.AppID, acc.ring)
	return s, dead
}

func tokenStatus(state tokens.TokenState) TokenStatus {
	s := TokenStatus{Refreshed: timeOf(state.ObtainedAt), Refused: state.Refused}
	if state.Live {
		s.Expires = timeOf(state.ExpiresAt)
	}
	if state.Err != nil {
		reason := reasonOf(state.Err)
		s.Error = &reason
	}
	return s
}

func keyStatus(r *ring) []KeyStatus {
	list := make([]KeyStatus, 0, len(r.tokens)+len(r.keys))
	for i, at := range r.keys {
		list = append(list, KeyStatus{"aes_key", i, timeOf(when(at))})
	}
	for i, at := range r.tokens {
		list = append(list, KeyStatus{"token", i, timeOf(when(at))})
	}
	return list
}

// rotation says how far the change of a key or a token is.
func (x *examination) rotation(subject, appid string, r *ring) {
	for _, of := range []struct {
		what string
		used []*atomic.Int64
	}{{"aes_key", r.keys}, {"token", r.tokens}} {
		if len(of.used) < 2 {
			continue
		}
		newest, older := when(of.used[0]), time.Time{}
		for _, at := range of.used[1:] {
			if used := when(at); used.After(older) {
				older = used
			}
		}
		since := older // the older ones have not been seen since
		if since.IsZero() {
			since = x.app.health().started
		}
		switch {
		case older.After(newest):
			x.found(olderInUse(subject, appid, of.what))
		case newest.After(older) && x.now.Sub(since) > rotationSettle:
			x.found(olderUnused(subject, appid, of.what))
		}
	}
}

// host looks at one of WeChat's hosts.
func (x *examination) host(name string, h *hostHealth) HostStatus {
	h.mu.Lock()
	defer h.mu.Unlock()
	okAt := when(&h.okAt)
	s := HostStatus{Host: name, Level: Green, LastOK: timeOf(okAt), LastError: timeOf(h.failedAt), EgressIP: h.egressIP}
	if h.failedAt.IsZero() {
		return s
	}
	s.Error = h.class + ": " + h.reason
	if h.failing.Load() {
		s.Level = Red
		x.found(hostFails(name, h.class, h.reason, x.app.usesProxy(name)))
	}
	return s
}

// configuration says what of the configuration itself is worth a look.
func (x *examination) configuration(ctx context.Context) {
	a := x.app
	if len(a.Platforms)+len(a.Accounts) == 0 {
		x.found(nothingConfigured())
	}
	if a.env.Sealer == nil {
		x.found(noSealKey())
	}
	if n := a.manager().ForwardsWaiting(); n > 0 {
		x.found(forwardsWait(n))
	}
	if n := a.manager().ForwardsUnwanted(); n > 0 {
		x.found(forwardsUnwanted(n))
	}
	for _, acc := range a.Accounts {
		if acc.mode == modePlain {
			x.found(plainMode(acc.AppID))
		}
	}
	if x.storeErr != nil {
		return
	}
	if store, ok := a.store.(interface{ Unfit(context.Context) error }); ok {
		ctx, cancel := context.WithTimeout(ctx, storeCheckWait)
		defer cancel()
		if err := store.Unfit(ctx); err != nil {
			x.found(storeUnfit(x.store.Module, err))
		}
	}
	x.verifyFiles(ctx)
}

// verifyFiles looks at the verification files of all sites, and those that were added at run time.
func (x *examination) verifyFiles(ctx context.Context) {
	doubts := make(map[string]string)
	for _, v := range x.app.searchSites().verify {
		maps.Copy(doubts, v.doubtful())
	}
	files, err := x.app.manager().VerifyFiles(ctx)
	if err != nil {
		files = nil // the store's finding is there by the next examination
	}
	for _, f := range files {
		if doubt := doubtOf(f.Content); doubt != "" {
			doubts[f.Name] = doubt
		}
	}
	for _, name := range slices.Sorted(maps.Keys(doubts)) {
		x.found(verifyFileDoubtful(name, doubts[name]))
	}
}

// sightings says what was seen of late.
func (x *examination) sightings() {
	for _, s := range x.app.health().sightings.recent(x.now) {
		x.found(x.sighted(s))
	}
}

// subjectOf names whom an appid is.
func (a *App) subjectOf(appid string) string {
	switch {
	case a.platform(appid) != nil:
		return subjectPlatform(appid)
	case a.account(appid) != nil || isAppID(appid):
		return subjectAccount(appid)
	}
	return appid
}

func subjectPlatform(appid string) string { return "platform " + appid }

func subjectAccount(appid string) string { return "account " + appid }

// span writes a duration for people.
func span(d time.Duration) tokens.Text {
	switch {
	case d >= 2*time.Hour:
		n := int(d / time.Hour)
		return texts(strconv.Itoa(n)+" hours", strconv.Itoa(n)+" 小时")
	case d >= 2*time.Minute:
		n := int(d / time.Minute)
		return texts(strconv.Itoa(n)+" minutes", strconv.Itoa(n)+" 分钟")
	}
	n := int(d / time.Second)
	return texts(fmt.Sprintf("%d seconds", n), fmt.Sprintf("%d 秒", n))
}
