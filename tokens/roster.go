package tokens

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"sync"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// The roster is WeChat's list of the accounts that authorised a platform. It is read page by page: once when the store
// is new, was emptied or had an archive put into it, then once a day, and when there is a doubt about an account. How far it was read is kept in the
// store, so that one node reads it at a time and another goes on where that one died.

const (
	pathAuthorizerList = "/cgi-bin/component/api_get_authorizer_list"

	// rosterEvery is how often the list is read.
	rosterEvery = 24 * time.Hour
	// rosterCheck is how often it is checked whether it has to be read: another store, an emptied one.
	rosterCheck = 5 * time.Minute
	// rosterHasten is how soon after a check another one may be made, when an account is missing.
	rosterHasten = 10 * time.Second
	// rosterPage is the number of accounts that WeChat gives at most in one answer.
	rosterPage = 500
	// rosterPause lies between two pages. A million accounts take 17 minutes.
	rosterPause = 500 * time.Millisecond
	// rosterLease is for how long a node that reads the list is believed to be alive.
	rosterLease = 2 * time.Minute
	// rosterSettle is how soon the list is read after an archive was imported. A second import, which brings what the first
	// one missed with its tokens, often follows; meanwhile WeChat is asked for an account that is missing.
	rosterSettle = time.Minute
	// rosterAgain is how soon the list is read again for accounts in doubt, and rosterRest how long it rests for them, in
	// times of what reading it took.
	rosterAgain = 10 * time.Minute
	rosterRest  = 4

	// rosterEmpty is how often a page that is empty before the end is asked for again, until it is believed.
	rosterEmpty = 5

	// absentLists is how many lists in a row must not name an account when none of them was whole.
	absentLists = 2

	maxSuspects = 10_000
	maxOrphans  = 10_000
	// maxNamed bounds the accounts that one line of the log names.
	maxNamed = 20
)

// rosterWire is how far the list was read.
type rosterWire struct {
	CompletedAt int64     `json:"completed_at,omitempty"` // 0: never for this store
	Took        int64     `json:"took,omitempty"`         // seconds
	MovedAt     int64     `json:"moved_at,omitempty"`     // when an archive came, after which it has not been read to its end
	Walk        *walkWire `json:"walk,omitempty"`
}

// ahead reports whether the list was read to its end at a time that has not come yet: by a clock that was ahead, so that nothing can be told from it.
func (s *rosterWire) ahead(now time.Time) bool {
	return fromUnix(s.CompletedAt).After(now.Add(clockSlack))
}

type walkWire struct {
	Node      string `json:"node"`
	At        int64  `json:"at"` // of its last page
	StartedAt int64  `json:"started_at"`
	Offset    int    `json:"offset"`
	Total     int    `json:"total"`
	Steady    bool   `json:"steady"`          // every page named the same total
	Empty     int    `json:"empty,omitempty"` // empty pages at this place, which is before the end
}

// rosterTable is what this node knows of the rosters.
type rosterTable struct {
	mu        sync.Mutex
	node      string
	platforms map[string]*roster
	missing   map[Key]bool // accounts whose record was damaged
}

type roster struct {
	complete bool // the list was read to its end for this store
	checked  time.Time
	walked   time.Time // when this node last began
	wanted   time.Time // when somebody last came to doubt what is held; zero: nobody does
	said     time.Time // when the log last heard that it cannot be read
	suspects map[string]*suspicion
	orphans  map[string]bool // accounts of which WeChat has no refresh token
}

// suspicion is about an account that WeChat calls unauthorized.
type suspicion struct {
	since  time.Time
	listed bool
	absent int // lists, read to their end one after the other, that did not name it
}

// at returns the platform's roster; mu is held.
func (t *rosterTable) at(platform string) *roster {
	if t.platforms == nil {
		t.platforms = make(map[string]*roster)
		t.node = rand.Text()
	}
	r := t.platforms[platform]
	if r == nil {
		r = &roster{suspects: make(map[string]*suspicion), orphans: make(map[string]bool)}
		t.platforms[platform] = r
	}
	return r
}

func (t *rosterTable) change(platform string, change func(*roster)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	change(t.at(platform))
}

// incomplete reports whether the list was never read to its end for this store.
func (t *rosterTable) incomplete(platform string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return !t.at(platform).complete
}

// lost reports whether the store may have lost an account that it does not know.
func (t *rosterTable) lost(k Key) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return !t.at(k.Platform).complete || t.missing[k]
}

// miss notes an account whose record is damaged or void.
func (t *rosterTable) miss(k Key) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.missing == nil {
		t.missing = make(map[Key]bool)
	}
	if len(t.missing) < maxSuspects {
		t.missing[k] = true
	}
	t.at(k.Platform).wanted = time.Now()
}

// found is the end of miss.
func (t *rosterTable) found(k Key) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.missing, k)
}

// orphan notes an account of which WeChat has no refresh token; it is false if that was noted before.
func (t *rosterTable) orphan(k Key) (noted bool) {
	t.change(k.Platform, func(r *roster) {
		if !r.orphans[k.AppID] && len(r.orphans) < maxOrphans {
			r.orphans[k.AppID], noted = true, true
		}
	})
	return noted
}

// settled is the end of every doubt about an account: it has authorised, or has taken that back.
func (t *rosterTable) settled(k Key) {
	t.change(k.Platform, func(r *roster) {
		delete(r.orphans, k.AppID)
		delete(r.suspects, k.AppID)
		delete(t.missing, k)
	})
}

// suspect notes a doubt about an account; it is false if that was noted before.
func (t *rosterTable) suspect(k Key) (noted bool) {
	t.change(k.Platform, func(r *roster) {
		if r.suspects[k.AppID] == nil && len(r.suspects) < maxSuspects {
			r.suspects[k.AppID] = &suspicion{since: time.Now()}
			r.wanted, noted = time.Now(), true
		}
	})
	return noted
}

// Orphans are the accounts that authorised a platform and of which WeChat has no refresh token, because no authorization
// code of theirs was ever exchanged, as far as the list was read. They have to authorise again: see AuthorizationLink.
func (m *Manager) Orphans(platform string) (appids []string) {
	m.rosters.change(platform, func(r *roster) { appids = slices.Sorted(maps.Keys(r.orphans)) })
	return appids
}

// OrphanCount is how many Orphans there are.
func (m *Manager) OrphanCount(platform string) (n int) {
	m.rosters.change(platform, func(r *roster) { n = len(r.orphans) })
	return n
}

func rosterJob(platform string) string { return "roster " + platform }

// wantRoster has the list read soon.
func (m *Manager) wantRoster(platform string) {
	m.rosters.change(platform, func(r *roster) { r.wanted = time.Now() })
	m.hastenRoster(platform)
}

// hastenRoster has it checked soon whether the list has to be read.
func (m *Manager) hastenRoster(platform string) {
	due := time.Now()
	m.rosters.change(platform, func(r *roster) {
		if again := r.checked.Add(rosterHasten); again.After(due) {
			due = again
		}
	})
	m.queue.hastenTo(rosterJob(platform), due)
}

// watchRoster is the job that reads a platform's list, one page at a time.
func (m *Manager) watchRoster(platform string) func(context.Context) error {
	return func(ctx context.Context) error {
		env, err := m.current()
		if err != nil {
			return nil //nolint:nilerr // closed
		}
		if _, ok := env.platform(platform); !ok || env.RosterEvery <= 0 {
			return nil // no longer configured
		}
		m.rosters.change(platform, func(r *roster) { r.checked = time.Now() }) // whatever comes of it
		if _, err := m.ticket(ctx, env, platform); err != nil {
			return retryError{after: rosterHasten} // nothing can be asked; whoever keeps a ticket hastens this job
		}
		unlock, err := m.lockStore(ctx, env, rosterName(platform), writeLockWait)
		if err != nil {
			return err
		}
		defer unlock()
		state, err := m.loadRoster(ctx, env, platform)
		if err != nil {
			return err
		}
		doubt, err := m.doubtAt(ctx, env, platform, state)
		if err != nil {
			return err
		}
		pause, due := m.rosters.due(platform, state, doubt, env.RosterEvery)
		if !due {
			return retryError{after: pause}
		}
		more, err := m.readPage(ctx, env, platform, state)
		if err != nil {
			m.rosters.change(platform, func(r *roster) {
				if time.Since(r.said) >= troubleLogEvery {
					r.said = time.Now()
					env.Log.Warn("WeChat's list of authorizers cannot be read; tried again", "platform", platform, "error", err)
				}
			})
			return err
		}
		if more {
			return retryError{after: rosterPause}
		}
		return retryError{after: rosterCheck}
	}
}

func (m *Manager) loadRoster(ctx context.Context, env *Environment, platform string) (*rosterWire, error) {
	name := rosterName(platform)
	state := new(rosterWire)
	err := m.loadRecord(ctx, env, name, state)
	if errors.Is(err, errDamaged) {
		if err = m.setAside(ctx, env, name, new(rosterWire), true); err == nil {
			err = fs.ErrNotExist
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return new(rosterWire), nil
	}
	return state, err
}

// doubtWire is a doubt about what the store holds that outlives the process which has it, and reaches the other nodes.
type doubtWire struct {
	At int64 `json:"at"`
}

// keepDoubt notes that the record of that name is about to be set aside. It comes first: once the record is gone, nothing else tells a process
// that did not do it that the store has lost an account.
func (m *Manager) keepDoubt(ctx context.Context, env *Environment, name string) error {
	if env.RosterEvery < 0 {
		return nil
	}
	var platforms []string
	if k, ok := keyOf(name); ok && k.Kind == KindAuthorizer {
		platforms = []string{k.Platform}
	} else if path.Dir(name) == intentFolder {
		platforms = sortedPlatforms(env)
	}
	for _, platform := range platforms {
		if err := m.storeRecord(ctx, env, doubtName(platform), doubtWire{At: time.Now().Unix()}); err != nil {
			return err
		}
	}
	return nil
}

// doubtAt is when the last doubt was kept that the list has not been read for since; zero: there is none. One that cannot be read is of before
// the seal key was changed.
func (m *Manager) doubtAt(ctx context.Context, env *Environment, platform string, state *rosterWire) (time.Time, error) {
	var doubt doubtWire
	err := m.loadRecord(ctx, env, doubtName(platform), &doubt)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, errUnreadable):
		return time.Time{}, nil
	case err != nil:
		return time.Time{}, err
	}
	at, now := fromUnix(doubt.At), time.Now()
	if began := fromUnix(state.CompletedAt - state.Took); at.Before(began) && !state.ahead(now) || at.After(now.Add(clockSlack)) {
		return time.Time{}, nil
	}
	return at, nil
}

// due decides whether this node has to read a page now, and if not, when to look again.
func (t *rosterTable) due(platform string, state *rosterWire, doubt time.Time, every time.Duration) (pause time.Duration, due bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r, now := t.at(platform), time.Now()
	r.checked, r.complete = now, state.CompletedAt != 0 && doubt.IsZero()
	if w := state.Walk; w != nil {
		if w.Node != t.node && now.Sub(fromUnix(w.At)).Abs() < rosterLease { // else it died, or the clock was set back
			return rosterLease, false // another node is at it
		}
		return 0, true
	}
	if since := now.Sub(fromUnix(state.MovedAt)).Abs(); state.MovedAt != 0 && since < rosterSettle {
		return rosterSettle - since, false
	}
	next := fromUnix(state.CompletedAt).Add(every)
	if state.ahead(now) {
		// The clock was set back, by nobody knows how much; or another node's is ahead, which takes what this node read for old in its turn.
		if next = now; !r.walked.IsZero() {
			next = r.walked.Add(every)
		}
	}
	if !r.wanted.IsZero() || !doubt.IsZero() { // the latter is over for all nodes once one has read the list
		again := r.walked.Add(rosterAgain)
		if rested := fromUnix(state.CompletedAt + rosterRest*state.Took); rested.After(again) && !state.ahead(now) {
			again = rested
		}
		if again.Before(next) {
			next = again
		}
	}
	if state.CompletedAt == 0 || !now.Before(next) {
		return 0, true
	}
	return min(next.Sub(now), rosterCheck), false
}

// listed is one account of WeChat's list.
type listed struct {
	AppID    string    `json:"authorizer_appid"`
	Refresh  wireToken `json:"refresh_token"`
	AuthTime wireInt   `json:"auth_time"`
}

// readPage reads the next page, takes over what the store lacks, and keeps how far it came. The caller holds the
// roster's lock in the store.
func (m *Manager) readPage(ctx context.Context, env *Environment, platform string, state *rosterWire) (more bool, err error) {
	now := time.Now()
	var walk walkWire
	m.rosters.change(platform, func(r *roster) {
		if state.Walk == nil {
			state.Walk = &walkWire{StartedAt: now.Unix(), Steady: true}
			r.walked = now
			for _, s := range r.suspects {
				s.listed = false
			}
		} else if state.Walk.Node != m.rosters.node {
			r.walked = now // of what the dead node had seen, nothing is known about the accounts in doubt here
		}
		walk = *state.Walk
		walk.Node, walk.At = m.rosters.node, now.Unix()
	})
	body := struct {
		Platform string `json:"component_appid"`
		Offset   int    `json:"offset"`
		Count    int    `json:"count"`
	}{platform, walk.Offset, rosterPage}
	var page struct {
		Total wireInt  `json:"total_count"`
		List  []listed `json:"list"`
	}
	if err := m.componentCall(ctx, env, platform, pathAuthorizerList, body, &page); err != nil {
		return false, err
	}
	others := new(othersIntents)
	for _, a := range page.List {
		if err := m.compare(ctx, env, platform, a, others); err != nil {
			return false, err // the page is read again
		}
	}
	if len(page.List) == 0 && walk.Offset < max(walk.Total, int(page.Total)) && walk.Empty < rosterEmpty {
		walk.Empty++
		state.Walk = &walk
		if err := m.storeRecord(ctx, env, rosterName(platform), state); err != nil {
			return false, err
		}
		return false, fmt.Errorf("%s: %w: an empty page before the end", pathAuthorizerList, ErrUnreachable)
	}
	walk.Steady = walk.Steady && (walk.Offset == 0 || walk.Total == int(page.Total))
	walk.Total, walk.Empty = int(page.Total), 0
	walk.Offset += len(page.List)
	// A full page may not be the last, whatever the total.
	more = len(page.List) > 0 && (walk.Offset < walk.Total || len(page.List) >= rosterPage)
	if more {
		state.Walk = &walk
		return true, m.storeRecord(ctx, env, rosterName(platform), state)
	}
	ended := walk.Offset >= walk.Total
	if err := m.endWalk(ctx, env, platform, fromUnix(walk.StartedAt), ended, walk.Steady && walk.Offset == walk.Total); err != nil {
		return false, err
	}
	*state = rosterWire{CompletedAt: now.Unix(), Took: max(0, now.Unix()-walk.StartedAt)}
	if err := m.storeRecord(ctx, env, rosterName(platform), state); err != nil {
		return false, err
	}
	m.rosters.change(platform, func(r *roster) {
		r.complete = true
		from := r.walked
		if began := fromUnix(walk.StartedAt); from.After(began.Add(time.Second)) {
			from = began // by the node that died over it
		}
		if len(r.suspects) == 0 && !r.wanted.After(from) { // else the doubt may be about an account of a page before
			r.wanted = time.Time{}
		}
	})
	env.Log.Info("WeChat's list of authorizers was compared with the store", notLogged(m.takenOver.rest(), "platform", platform, "accounts", walk.Total)...)
	return false, nil
}

// compare holds one listed account against the store.
func (m *Manager) compare(ctx context.Context, env *Environment, platform string, a listed, others *othersIntents) error {
	k := AuthorizerKey(platform, a.AppID)
	if env.knows(k) != nil {
		return nil // no appid
	}
	m.rosters.change(platform, func(r *roster) {
		if s := r.suspects[a.AppID]; s != nil {
			s.listed = true
		}
		if a.Refresh != "" {
			delete(r.orphans, a.AppID)
		}
	})
	// Its code may be here or on another node, and exchanged in this moment: asked before the record is read, which has the tokens
	// once it is not.
	exchanging := false
	if a.Refresh == "" {
		var err error
		if _, exchanging = m.intents.latest(k); !exchanging {
			if exchanging, err = others.exchange(ctx, m, env, k); err != nil {
				return err
			}
		}
	}
	// Not through the cache: a million accounts would drive those in use out of it.
	var wire recordWire
	cur := m.pending.get(k)
	if cur == nil {
		switch err := m.loadRecord(ctx, env, k.recordName(), &wire); {
		case err == nil:
			cur = wire.record()
		case errors.Is(err, fs.ErrNotExist):
		case errors.Is(err, errDamaged):
			if err := m.setAside(ctx, env, k.recordName(), new(recordWire), false); err != nil {
				return err
			}
		case errors.Is(err, errUnreadable):
			return nil // said when it is used
		default:
			return err
		}
	}
	info, at := accountInfo{refresh: secret.New(string(a.Refresh))}, fromUnix(int64(a.AuthTime))
	switch {
	case a.Refresh == "" && (cur == nil || cur.RefreshToken.IsZero() && !cur.revoked()):
		if !exchanging && m.rosters.orphan(k) {
			m.settleOrphan(ctx, env, k, secret.String{}) // what it is noted for was read before
		}
	case cur == nil && !info.refresh.IsZero():
		if _, err := m.adopt(ctx, env, k, info, at, false); err != nil {
			return err
		}
		m.rosters.found(k)
	case m.adoptable(k, cur, info.refresh, at):
		// Between the list and the record as it was read now, much may have happened.
		err := m.reconsider(ctx, env, k, at)
		if _, api := errors.AsType[*APIError](err); err != nil && !api && !errors.Is(err, errNoRefreshToken) {
			return err
		}
		m.rosters.found(k)
	}
	return nil
}

// othersIntents are the intents in the store that this node is not working on, as they are when the first account of a page
// needs them. Each page lists them once at most, and reads as many as it has accounts at most.
type othersIntents struct {
	listed bool
	more   bool // not all can be read: any account may have one
	keys   map[Key]bool
}

// exchange reports whether another node may be exchanging a code of an account. Its error is that ctx has ended: what the store does not
// tell holds no list up.
func (o *othersIntents) exchange(ctx context.Context, m *Manager, env *Environment, k Key) (bool, error) {
	if !o.listed {
		unread, err := o.read(ctx, m, env)
		if ctx.Err() != nil {
			return false, ctx.Err()
		}
		if o.listed = true; o.more {
			env.Log.Warn("codes that are being exchanged cannot all be read: accounts of this page that have to authorise again are told by the next list",
				"platform", k.Platform, "unread", unread, "error", err)
		}
	}
	return o.more || o.keys[k], nil
}

// read reads what there is. It returns how many it did not read, and why, if not for their number.
func (o *othersIntents) read(ctx context.Context, m *Manager, env *Environment) (unread int, failure error) {
	o.keys = make(map[Key]bool)
	hashes, err := m.storedIntents(ctx, env)
	if err != nil {
		o.more = true
		return 0, err
	}
	reads := 0
	for _, hash := range hashes {
		if m.intents.get(hash) != nil {
			continue // asked for already
		}
		if reads++; reads > rosterPage {
			o.more = true
			unread++
			continue
		}
		switch in, err := m.keptIntent(ctx, env, hash); {
		case err == nil:
			o.keys[AuthorizerKey(in.Platform, in.AppID)] = true
		case !notAnIntent(err):
			o.more, failure = true, err
			unread++
		}
		if ctx.Err() != nil {
			break
		}
	}
	return unread, failure
}

// heardOrphan has an orphan's record looked at that another node has changed: it may have authorised there.
func (m *Manager) heardOrphan(k Key) {
	orphan := false
	if k.Kind == KindAuthorizer {
		m.rosters.change(k.Platform, func(r *roster) { orphan = r.orphans[k.AppID] })
	}
	if !orphan {
		return
	}
	m.queue.addNews("orphan "+k.recordName(), func(ctx context.Context) {
		if env, err := m.current(); err == nil {
			// If the refresh token is the void one still, the next renewal notes it again. A change that is not heard, the next list tells.
			m.settleOrphan(ctx, env, k, secret.String{})
		}
	})
}

// settleOrphan looks whether an account that is noted as an orphan has authorised again meanwhile, or revoked. Void is the
// refresh token, if any, that it is noted for.
func (m *Manager) settleOrphan(ctx context.Context, env *Environment, k Key, void secret.String) {
	rec, err := m.look(ctx, env, k)
	if err == nil && rec != nil && (rec.revoked() || !rec.RefreshToken.IsZero() && !rec.RefreshToken.Same(void)) {
		m.rosters.settled(k)
	}
}

// endWalk settles the doubts that a list which was read to its end can settle, and reports the accounts that nothing can
// be done for here. Ended says that the list had as many accounts as it said at the end, whole that it also said so from
// the beginning, so that nothing can have been missed. The list of a large platform is never whole: while it is read,
// accounts come and go. An account that two of those do not name, and that WeChat still calls unauthorized, is.
func (m *Manager) endWalk(ctx context.Context, env *Environment, platform string, began time.Time, ended, whole bool) error {
	var gone, orphans []string
	m.rosters.change(platform, func(r *roster) {
		for appid, s := range r.suspects {
			if s.listed {
				delete(r.suspects, appid)
				continue
			}
			if s.since.After(began) || r.walked.After(began.Add(time.Second)) {
				continue // it was not looked for from the beginning
			}
			if s.absent++; whole || ended && s.absent >= absentLists {
				gone = append(gone, appid)
			}
		}
		orphans = slices.Sorted(maps.Keys(r.orphans))
	})
	for _, appid := range gone {
		if err := m.confirmGone(ctx, env, AuthorizerKey(platform, appid)); err != nil {
			return fmt.Errorf("account %s: %w", appid, err)
		}
		m.rosters.change(platform, func(r *roster) { delete(r.suspects, appid) })
	}
	if len(orphans) > 0 {
		env.Log.Error("accounts authorised the platform, and WeChat has no refresh token of them, since no authorization code of theirs was ever exchanged: each has to authorise again, on a link that is made for it",
			"platform", platform, "accounts", len(orphans), "appids", orphans[:min(len(orphans), maxNamed)])
	}
	return nil
}
