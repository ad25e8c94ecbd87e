package tokens

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"slices"
	"sync"
	"time"
)

// A confirm file is the verification file of a mini program's web-view domain (业务域名), which WeChat gives by API: one
// for each platform, and one for each account that authorised it.

const (
	pathPlatformConfirmFile = "/cgi-bin/component/get_domain_confirmfile"
	pathAccountConfirmFile  = "/wxa/get_webviewdomain_confirmfile"

	// confirmSet is the permission set of an account's confirm file: mini program development.
	confirmSet = 18

	// confirmEvery is how soon WeChat is asked again for the file of one platform or account, on all nodes together.
	confirmEvery = 5 * time.Minute
	// confirmRetry is how soon it is asked again, by this node, when it was not reached.
	confirmRetry = time.Minute
	// confirmRefresh is the age at which a platform's file is fetched again without anybody's asking for it.
	confirmRefresh = 24 * time.Hour
	// confirmNoTicket is how soon it is looked whether the platform has a ticket by now.
	confirmNoTicket = 10 * time.Second
	// confirmRecheck is how soon a platform's record is read again: another node may have asked.
	confirmRecheck = time.Second
	// confirmTimeout bounds one fetch, and the wait for one.
	confirmTimeout = renewTimeout

	// confirmAccounts may be looked up at once for their files, and then confirmAccountsPerSecond: whoever knows the
	// appids of accounts could otherwise have a token fetched for each.
	confirmAccounts          = 20
	confirmAccountsPerSecond = 1
	// maxConfirmStates bounds the accounts whose files are in memory, and confirmMemory for how long they are.
	maxConfirmStates = 1 << 12
	confirmMemory    = time.Hour
)

// confirmState is what this node knows of one confirm file.
type confirmState struct {
	file  VerifyFile
	until time.Time // when the record may be looked at again
	heard uint64    // how often news may have been missed before
}

// confirmFiles are those that are known on this node.
type confirmFiles struct {
	accounts *Window[Key, confirmState]
	budget   budget

	mu        sync.Mutex
	platforms map[string]confirmState
	looking   map[Key]*confirmLook // records that are looked at now
	said      map[string]time.Time // by platform: when the log last heard of a failure
	missed    uint64               // how often news may have been missed
}

// confirmLook is a look at a record, or several where an older configuration is at it as well.
type confirmLook struct {
	users int
	news  bool // there was some since it began
}

func (c *confirmFiles) get(k Key) confirmState {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at(k)
}

// at is get; mu is held. What was known before news may have been missed may be looked at again.
func (c *confirmFiles) at(k Key) confirmState {
	state := c.platforms[k.Platform]
	if k.Kind == KindAuthorizer {
		state, _ = c.accounts.Get(k)
	}
	if state.heard != c.missed {
		state.until = time.Time{}
	}
	return state
}

func (c *confirmFiles) put(k Key, state confirmState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.set(k, state)
}

// set is put; mu is held.
func (c *confirmFiles) set(k Key, state confirmState) {
	state.heard = c.missed
	if k.Kind == KindAuthorizer {
		c.accounts.Set(k, state, 0)
		return
	}
	if c.platforms == nil {
		c.platforms = make(map[string]confirmState)
	}
	c.platforms[k.Platform] = state
}

// begin notes that the record of a file is looked at, until leave.
func (c *confirmFiles) begin(k Key) *confirmLook {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.looking == nil {
		c.looking = make(map[Key]*confirmLook)
	}
	look := c.looking[k]
	if look == nil {
		look = new(confirmLook)
		c.looking[k] = look
	}
	look.users++
	return look
}

// end keeps what came of a look. The record may be looked at again at once if there was news meanwhile.
func (c *confirmFiles) end(k Key, look *confirmLook, state confirmState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if look.news {
		state.until = time.Time{}
	}
	c.set(k, state)
}

// leave is the end of begin, whatever came of the look.
func (c *confirmFiles) leave(k Key, look *confirmLook) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if look.users--; look.users == 0 {
		delete(c.looking, k)
	}
}

// news notes that another node has changed the record of a file that this node has in memory, or is looking at.
func (c *confirmFiles) news(k Key) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if look := c.looking[k]; look != nil {
		look.news = true
	}
	if state := c.at(k); !state.until.IsZero() {
		state.until = time.Time{}
		c.set(k, state)
	}
}

// resumed is news of each record: other nodes were not heard for a while.
func (c *confirmFiles) resumed() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.missed++
	for _, look := range c.looking {
		look.news = true
	}
}

// say reports whether to tell the log of a failure.
func (c *confirmFiles) say(platform string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if at, before := c.said[platform]; before && now.Sub(at) < troubleLogEvery {
		return false
	}
	if c.said == nil {
		c.said = make(map[string]time.Time)
	}
	c.said[platform] = now
	return true
}

// confirmWire is a confirm file in the store. Without a name WeChat gave none when it was asked.
type confirmWire struct {
	Name    string `json:"name,omitempty"`
	Content []byte `json:"content,omitempty"`
	AskedAt int64  `json:"asked_at"`
}

func (w *confirmWire) file() VerifyFile {
	return VerifyFile{Name: w.Name, Content: w.Content, AddedAt: fromUnix(w.AskedAt)}
}

// asked reports whether WeChat was asked within that time.
func (w *confirmWire) asked(within time.Duration) bool {
	return w.AskedAt != 0 && time.Since(fromUnix(w.AskedAt)).Abs() < within
}

// ConfirmFile returns the content of the confirm file of that name: of one of the configured platforms, or else of the
// account of that appid, if one is given and has authorised a platform. WeChat is asked for a file that is not known, at
// most once in five minutes for each platform and account; this waits for the answer until ctx ends. The content must
// not be changed.
func (m *Manager) ConfirmFile(ctx context.Context, name, appid string) (content []byte, found bool, err error) {
	env, err := m.current()
	if err != nil || !IsVerifyFileName(name) {
		return nil, false, err
	}
	keys := make([]Key, 0, len(env.Platforms)+1)
	for i := range env.Platforms {
		keys = append(keys, ComponentKey(env.Platforms[i].AppID))
	}
	if appid != "" {
		e, failed := m.holder(ctx, env, appid)
		if err = failed; e != nil && (len(e.rec.FuncInfo) == 0 || slices.Contains(e.rec.FuncInfo, confirmSet)) {
			keys = append(keys, e.key)
		}
	}
	for _, k := range keys { // first all that is in memory
		if state := m.confirm.get(k); state.file.Name == name {
			return state.file.Content, true, nil
		}
	}
	for _, k := range keys {
		file, failed := m.confirmFile(ctx, env, k, confirmEvery)
		switch {
		case failed != nil:
			if file = m.confirm.get(k).file; file.Name == name {
				return file.Content, true, nil
			}
			err = failed
		case file.Name == name:
			return file.Content, true, nil
		}
	}
	return nil, false, err
}

// confirmFile returns a confirm file as it is known, and asks WeChat if it was last asked longer ago than that.
func (m *Manager) confirmFile(ctx context.Context, env *Environment, k Key, every time.Duration) (file VerifyFile, err error) {
	for range 2 { // a look that was under way may be of before a change
		state := m.confirm.get(k)
		if time.Now().Before(state.until) {
			return state.file, nil
		}
		file, err = m.lookAtConfirmFile(ctx, env, k, every)
		if ctx.Err() != nil {
			break
		}
		if state = m.confirm.get(k); !state.until.IsZero() {
			if err == nil {
				file = state.file // another look may have brought it since
			}
			break
		}
	}
	return file, err
}

// lookAtConfirmFile is confirmFile of one that may be looked at again.
func (m *Manager) lookAtConfirmFile(ctx context.Context, env *Environment, k Key, every time.Duration) (VerifyFile, error) {
	return share(ctx, m, env.flight("confirm", k), confirmTimeout, func(ctx context.Context) (VerifyFile, error) {
		state := m.confirm.get(k)
		if time.Now().Before(state.until) {
			return state.file, nil // looked up between the look and the turn
		}
		if k.Kind == KindAuthorizer && !m.confirm.budget.spend(confirmAccounts, confirmAccountsPerSecond) {
			return state.file, nil
		}
		look := m.confirm.begin(k)
		defer m.confirm.leave(k, look)
		file, pause, err := m.fetchConfirmFile(ctx, env, k, every)
		if file.Name == "" {
			file = m.confirm.get(k).file // what is known serves on
		}
		if k.Kind == KindAuthorizer {
			pause = max(pause, confirmRetry) // or one account's visitors would use up the budget of all
		}
		m.confirm.end(k, look, confirmState{file: file, until: time.Now().Add(pause)})
		if err != nil && !errors.Is(err, ErrNoTicket) && m.confirm.say(k.Platform) {
			args := []any{"platform", k.Platform, "appid", k.owner(), "error", err}
			if api, ok := errors.AsType[*APIError](err); ok {
				args = append(args, m.explained(k, api)...)
			}
			env.Log.Warn("WeChat gives no verification file for the web-view domain; tried again", args...)
		}
		return file, err
	})
}

// fetchConfirmFile reads the record of a confirm file, and asks WeChat unless that was done lately. Pause is how long to
// wait before the next look.
func (m *Manager) fetchConfirmFile(ctx context.Context, env *Environment, k Key, every time.Duration) (VerifyFile, time.Duration, error) {
	name := confirmName(k)
	known, err := m.loadConfirm(ctx, env, name, false)
	if err != nil || known.asked(every) {
		return known.file(), confirmRecheck, err
	}
	if file := known.file(); file.Name != "" { // it serves while WeChat is asked, and if WeChat does not answer
		m.confirm.put(k, confirmState{file: file})
	}
	if err := m.barred(k); err != nil {
		return known.file(), pauseAfter(err), err // nothing can be asked
	}
	unlock, err := m.lockStore(ctx, env, name, writeLockWait)
	if err != nil {
		return known.file(), confirmRetry, err
	}
	defer unlock()
	if known, err = m.loadConfirm(ctx, env, name, true); err != nil || known.asked(every) {
		return known.file(), confirmRecheck, err // another node was faster
	}
	file, failed := m.askConfirmFile(ctx, env, k)
	if _, refused := errors.AsType[*APIError](failed); failed != nil && !refused {
		return known.file(), pauseAfter(failed), failed
	}
	if failed == nil {
		known.Name, known.Content = file.Name, file.Content
	}
	known.AskedAt = time.Now().Unix()
	if err := m.storeRecord(ctx, env, name, known); err != nil {
		return known.file(), confirmRetry, errors.Join(failed, err)
	}
	return known.file(), confirmRecheck, failed
}

// pauseAfter is how long to wait after a failure that was no answer of WeChat's.
func pauseAfter(err error) time.Duration {
	if errors.Is(err, ErrNoTicket) {
		return confirmNoTicket
	}
	return confirmRetry
}

// loadConfirm reads a record. Locked says that the caller has the store's lock on it.
func (m *Manager) loadConfirm(ctx context.Context, env *Environment, name string, locked bool) (*confirmWire, error) {
	wire := new(confirmWire)
	err := m.loadRecord(ctx, env, name, wire)
	if errors.Is(err, errDamaged) {
		if err = m.setAside(ctx, env, name, new(confirmWire), locked); err == nil {
			err = fs.ErrNotExist
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return new(confirmWire), nil
	}
	return wire, err
}

// askConfirmFile asks WeChat for a confirm file: for a platform's with the platform's token, for an account's with the
// account's.
func (m *Manager) askConfirmFile(ctx context.Context, env *Environment, k Key) (VerifyFile, error) {
	var answer struct {
		Name    string `json:"file_name"`
		Content string `json:"file_content"`
	}
	api := pathPlatformConfirmFile
	if k.Kind == KindAuthorizer {
		api = pathAccountConfirmFile
	}
	if err := m.call(ctx, env, k, http.MethodPost, api, nil, nil, &answer); err != nil {
		return VerifyFile{}, err
	}
	file := VerifyFile{Name: answer.Name, Content: []byte(answer.Content)}
	if err := file.check(); err != nil {
		return VerifyFile{}, fmt.Errorf("%s: %w: %w", api, ErrUnreachable, err)
	}
	return file, nil
}

// ConfirmFiles are the confirm files of the platforms that this node has in memory, by platform.
func (m *Manager) ConfirmFiles() map[string]VerifyFile {
	files := make(map[string]VerifyFile)
	for _, platform := range m.Platforms() {
		if state := m.confirm.get(ComponentKey(platform)); state.file.Name != "" {
			files[platform] = state.file
		}
	}
	return files
}

func confirmJob(platform string) string { return "confirm " + platform }

// watchConfirmFile is the job that has a platform's confirm file at hand before WeChat asks for it.
func (m *Manager) watchConfirmFile(platform string) func(context.Context) error {
	return func(ctx context.Context) error {
		env, err := m.current()
		if err != nil {
			return nil //nolint:nilerr // closed
		}
		if _, ok := env.platform(platform); !ok || !env.ConfirmFiles {
			return nil // no longer wanted
		}
		file, err := m.confirmFile(ctx, env, ComponentKey(platform), confirmRefresh)
		switch {
		case errors.Is(err, ErrNoTicket):
			return retryError{after: confirmNoTicket}
		case err != nil:
			return retryError{after: confirmEvery}
		}
		left := confirmRefresh - time.Since(file.AddedAt)
		return retryError{after: max(left, confirmEvery)}
	}
}
