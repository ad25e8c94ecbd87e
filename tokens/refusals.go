package tokens

import (
	"errors"
	"slices"
	"sync"
	"time"
)

// maxRefusals bounds the table of refusals, and with it how many are told of within troubleLogEvery.
const maxRefusals = 4096

// refusalTable remembers which refusals the log has heard of. The zero value is ready.
type refusalTable struct {
	mu      sync.Mutex
	told    map[refusalKey]*toldRefusal
	sweptAt time.Time
	crowded int // held back because the table was full
}

type refusalKey struct {
	appid string
	code  int64
}

type toldRefusal struct {
	at     time.Time
	missed int
}

// tell reports whether to tell the log of a refusal: of the first, and then rarely. Missed is how many it has not heard of.
func (t *refusalTable) tell(k refusalKey) (say bool, missed int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if x := t.told[k]; x != nil {
		if now.Sub(x.at) < troubleLogEvery {
			x.missed++
			return false, 0
		}
		missed = x.missed
		x.at, x.missed = now, 0
		return true, missed
	}
	if len(t.told) >= maxRefusals && now.Sub(t.sweptAt) >= time.Minute {
		t.sweptAt = now
		for old, x := range t.told {
			if now.Sub(x.at) >= troubleLogEvery {
				delete(t.told, old)
			}
		}
	}
	if len(t.told) >= maxRefusals {
		t.crowded++
		return false, 0
	}
	if t.told == nil {
		t.told = make(map[refusalKey]*toldRefusal)
	}
	t.told[k] = &toldRefusal{at: now}
	missed, t.crowded = t.crowded, 0
	return true, missed
}

// maxBudgetLines is how many lines a lineBudget allows within troubleLogEvery.
const maxBudgetLines = 20

// lineBudget is for lines of which there may be one for each of a million accounts, as when a new store is filled from WeChat's list. The
// zero value is ready.
type lineBudget struct {
	mu     sync.Mutex
	since  time.Time
	said   int
	missed int
}

// tell reports whether to say one more. Missed is how many have not been said.
func (b *lineBudget) tell() (say bool, missed int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if now := time.Now(); now.Sub(b.since) >= troubleLogEvery {
		b.since, b.said = now, 0
	}
	if b.said >= maxBudgetLines {
		b.missed++
		return false, 0
	}
	b.said++
	missed, b.missed = b.missed, 0
	return true, missed
}

// rest is how many have not been said, for a line that sums up.
func (b *lineBudget) rest() (missed int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	missed, b.missed = b.missed, 0
	return missed
}

// notLogged adds to the fields of a line how many others were left out.
func notLogged(missed int, args ...any) []any {
	if missed > 0 {
		args = append(args, "not_logged", missed)
	}
	return args
}

// Refusal is what the log says of a refusal of WeChat's.
type Refusal struct {
	Errcode

	API      string // the path, without its query
	RID      string
	EgressIP string // the address that WeChat saw; empty unless that is what it refuses
	// PermissionSet is what the path needs and Granted whether the account granted it, "yes", "no" or "unknown". They
	// are empty unless that may be the reason.
	PermissionSet, Granted string

	NotLogged int // refusals like this one that were not told of
}

// remedyGranted is the remedy where the permission set is not what is missing.
var remedyGranted = Text{"the account granted the permission set: look up the account's own 接口权限 (kind, verification), whether the set is still selected for the platform, and whether the path takes another kind of token",
	"账号已授予该权限集：请检查账号自身的接口权限（类型、认证）、第三方平台是否仍勾选该权限集，以及该路径是否需要另一种令牌"}

// newRefusal explains an errcode. Text is the errmsg, or the answer that it is in: only the request id and the address
// are taken from it.
func newRefusal(api string, code int64, text string) Refusal {
	r := Refusal{API: api, RID: RequestID(text)}
	r.Errcode, _ = Explain(code)
	if r.NamesEgressIP() {
		r.EgressIP = EgressIP(text)
	}
	return r
}

// Args are the fields for a log, as slog takes them.
func (r Refusal) Args() []any {
	args := []any{"api", r.API, "errcode", r.Code, "rid", r.RID, "remedy", r.Remedy.EN}
	if r.EgressIP != "" {
		args = append(args, "egress_ip", r.EgressIP)
	}
	if r.PermissionSet != "" {
		args = append(args, "permission_set", r.PermissionSet, "granted", r.Granted)
	}
	if r.NotLogged > 0 {
		args = append(args, "not_logged", r.NotLogged)
	}
	return args
}

// ExplainRefusal explains that WeChat refused a call with the token of k, or with its secret. Say is false if the log
// need not hear of it: it is not for who runs the gateway, or was told less than ten minutes ago of that account and
// code, be it by another configuration. Text is WeChat's answer. It asks neither WeChat nor the store.
func (m *Manager) ExplainRefusal(k Key, api string, code int64, text string) (r Refusal, say bool) {
	known, _ := Explain(code)
	if !known.Reported() {
		return Refusal{}, false
	}
	about := refusalKey{k.owner(), code}
	if k.Platform != "" && known.NamesEgressIP() {
		about.appid = k.Platform // one list for all its accounts
	}
	say, missed := m.refusals.tell(about)
	if !say {
		return Refusal{}, false
	}
	r = newRefusal(api, code, text)
	r.NotLogged = missed
	if k = k.account(); k.Kind == KindAuthorizer && r.MissesPermission() {
		m.explainPermission(&r, k)
	}
	return r, true
}

// explained are the fields of a log line on a failure of the gateway's own that is damped otherwise: what to do about it the
// first time, and then again once troubleLogEvery has passed for the account and code. A token that comes and goes would have
// it said each time.
func (m *Manager) explained(k Key, e *APIError) []any {
	about := refusalKey{k.owner(), e.Code}
	if known, _ := Explain(e.Code); k.Platform != "" && known.NamesEgressIP() {
		about.appid = k.Platform
	}
	say, missed := m.failures.tell(about)
	if !say {
		return []any{"errcode", e.Code, "rid", e.RID}
	}
	args := e.Explained()
	if missed > 0 {
		args = append(args, "not_logged", missed)
	}
	return args
}

// explainPermission says which permission set a call to an authorizer's API needed.
func (m *Manager) explainPermission(r *Refusal, k Key) {
	var granted []int
	if c := m.cache.Load(); c != nil {
		if e := c.get(k); e != nil && e.authorized() {
			granted = e.rec.FuncInfo
		}
	}
	need := PermissionSetsFor(r.API)
	r.PermissionSet, r.Granted = DescribePermissionSets(need), "unknown"
	switch {
	case len(need) == 0:
		r.PermissionSet = "unknown"
	case len(granted) == 0: // an authorization without any is one of which they are not known
	case slices.ContainsFunc(need, func(id int) bool { return slices.Contains(granted, id) }):
		r.Granted, r.Remedy = "yes", remedyGranted
	default:
		r.Granted, r.Remedy = "no", remedySet
	}
}

// report tells the log that WeChat refused a call of the gateway's own. Renewals report their failures themselves, and an
// account that has not authorised the platform is one to look for in WeChat's list.
func (m *Manager) report(env *Environment, k Key, err error) {
	api, ok := errors.AsType[*APIError](err)
	if ok && api.API != pathAuthorizerToken && api.API != pathGetTicket {
		env.Observer.Happened(CallFailed, k, err)
	}
	if k.Platform != "" && hasCode(err, codeTicketExpired, codeTicketInvalid) {
		m.DoubtTicket(k.Platform)
	}
	if !ok || api.API == pathAuthorizerToken || api.API == pathGetTicket || api.Code == codeNotAuthorized {
		return
	}
	r, say := m.ExplainRefusal(k, api.API, api.Code, api.Msg)
	if !say {
		return
	}
	r.RID = api.RID // the text may be cut off before it
	env.Log.Warn("WeChat refused a call of the gateway's own", append([]any{"appid", k.owner(), "platform", k.Platform, "meaning", r.Meaning.EN}, r.Args()...)...)
}
