package tokens

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

const (
	pathBusiness = "/cgi-bin/user/info"

	fleetLife = 2 * time.Hour
	// untilUsed: a refresh token that was replaced is taken until its successor has been used.
	untilUsed = -1
)

// fleetWeChat is WeChat as strict as it may be: it remembers every token and every refresh token that it gave, to
// which node, whether that node wrote it down, and whether it was refused since; and it notes each call that a gateway
// which keeps its promises does not make. It works in synctest bubbles. What goes wrong depends on the seed and on the
// call, not on which goroutine came first.
type fleetWeChat struct {
	seed    uint64
	rotates func(appid string) bool // each refresh gives a new refresh token
	grace   time.Duration           // a replaced refresh token is taken for so long; or untilUsed
	overlap time.Duration           // a replaced access token works for so long
	nodes   int                     // that share one store; some promises hold for one alone

	mu       sync.Mutex
	fault    func(path, owner string, roll func(string) uint64) wxFault // nil: none
	serial   int
	holders  map[Key]*wxHolder
	tickets  map[string]*wxHolder // jsapi and card tickets, by type and appid
	records  map[string]*wxHolder // by the record's name
	tokens   map[string]*wxToken
	refresh  map[string]int // each refresh token ever given -> its number
	codes    map[string]*wxCode
	pushed   map[string]time.Time // tickets, until when they are taken
	faults   map[wxFault]int
	calls    map[string]int
	wrong    []string
	storeBad func() bool // the store failed a moment ago
}

// wxHolder is who has tokens: a platform, an authorizer, a plain account.
type wxHolder struct {
	key     Key
	current *wxToken
	calls   int                // for its token, all of them
	renewed int                // tokens given
	busy    map[*fleetNode]int // calls for its token that are being answered

	authorized bool
	authTime   time.Time
	refresh    wxRefresh
	old        string // accepted until oldEnd
	oldEnd     time.Time

	forced   []time.Time
	forcedBy *fleetNode
	saved    *recordWire // what the store has of it
}

// wxRefresh is a refresh token.
type wxRefresh struct {
	value   string
	given   *fleetNode // to which the answer with it got through
	savedAt time.Time  // when it first was in the store
}

type wxToken struct {
	holder    *wxHolder
	value     string
	serial    int
	until     time.Time // its end, as it was given
	end       time.Time // its end
	killed    bool
	given     *fleetNode // to which the answer with it got through
	saved     bool       // is in the store
	wasSaved  bool       // was there once
	seen      bool       // was served to a caller
	apart     bool       // was given while the nodes could not see each other's records, or this one its own
	renewable bool       // it was refused, or its renewal was asked for
	refusedTo *fleetNode
	refusedAt time.Time
}

type wxCode struct {
	appid string
	end   time.Time
	used  bool
}

// wxFault is how a call goes wrong.
type wxFault string

const (
	faultNone   wxFault = ""
	faultDial   wxFault = "no connection"
	faultLost   wxFault = "done, and the answer lost"
	fault500    wxFault = "HTTP 500"
	faultHTML   wxFault = "HTML instead of JSON"
	faultBusy   wxFault = "-1"
	faultQuota  wxFault = "45009"
	faultSlow   wxFault = "no answer in time"
	faultBroken wxFault = "the caller left"
)

var wxFaults = []wxFault{faultDial, faultLost, fault500, faultHTML, faultBusy, faultQuota, faultSlow}

func newFleetWeChat(seed uint64) *fleetWeChat {
	f := &fleetWeChat{
		seed: seed, rotates: func(string) bool { return false }, nodes: 1,
		holders: make(map[Key]*wxHolder), tickets: make(map[string]*wxHolder), records: make(map[string]*wxHolder),
		tokens: make(map[string]*wxToken), refresh: make(map[string]int), codes: make(map[string]*wxCode),
		pushed: make(map[string]time.Time), faults: make(map[wxFault]int), calls: make(map[string]int),
		storeBad: func() bool { return false },
	}
	f.holder(ComponentKey(testPlatform))
	return f
}

// dice is a number that depends on the seed and on what is thrown for, and on nothing else.
func dice(seed uint64, parts ...any) uint64 {
	h := seed ^ 14695981039346656037
	for _, b := range []byte(fmt.Sprint(parts...)) {
		h = (h ^ uint64(b)) * 1099511628211
	}
	h ^= h >> 30 // the finish of splitmix64: FNV's low bits are poor
	h *= 0xbf58476d1ce4e5b9
	h ^= h >> 27
	h *= 0x94d049bb133111eb
	return h ^ h>>31
}

func (f *fleetWeChat) violation(format string, args ...any) {
	if len(f.wrong) < 50 {
		f.wrong = append(f.wrong, time.Now().UTC().Format("02 15:04:05.000 ")+fmt.Sprintf(format, args...))
	}
}

// wronged is violation for those who do not hold mu.
func (f *fleetWeChat) wronged(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.violation(format, args...)
}

func (f *fleetWeChat) violations() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.wrong)
}

// apart reports whether the nodes could not tell each other what they do, a moment ago, for the store failed.
func (f *fleetWeChat) apart() bool { return f.nodes > 1 && f.storeBad() }

// holder returns a key's holder, making one; mu is held, or nobody else is there yet.
func (f *fleetWeChat) holder(k Key) *wxHolder {
	h := f.holders[k]
	if h == nil {
		h = &wxHolder{key: k, busy: make(map[*fleetNode]int)}
		f.holders[k] = h
		f.records[k.recordName()] = h
	}
	return h
}

// issue gives a holder a new token. The one before works on for the overlap.
func (f *fleetWeChat) issue(h *wxHolder, what string, overlap time.Duration) *wxToken {
	f.serial++
	now := time.Now()
	if h.current != nil {
		h.current.die(now.Add(overlap))
	}
	h.renewed++
	h.current = &wxToken{
		holder: h, value: fmt.Sprintf("%s-token-%d", what, f.serial), serial: f.serial,
		until: now.Add(fleetLife), end: now.Add(fleetLife), apart: f.apart(),
	}
	f.tokens[h.current.value] = h.current
	return h.current
}

// issueRefresh gives an authorizer a new refresh token. The one before is void, or taken for a grace.
func (f *fleetWeChat) issueRefresh(h *wxHolder, grace time.Duration) {
	f.serial++
	h.old, h.oldEnd = h.refresh.value, time.Now().Add(grace)
	if grace == untilUsed {
		h.oldEnd = time.Now().Add(1000 * time.Hour)
	}
	h.refresh = wxRefresh{value: fmt.Sprintf("refreshtoken@@@%d", f.serial)}
	f.refresh[h.refresh.value] = f.serial
}

// takes reports whether a refresh token of the holder works.
func (h *wxHolder) takes(refresh string) bool {
	return refresh != "" && (refresh == h.refresh.value || refresh == h.old && time.Now().Before(h.oldEnd))
}

// die ends a token before its time.
func (t *wxToken) die(at time.Time) {
	if t.end.After(at) {
		t.end, t.killed = at, true
	}
}

func (t *wxToken) live() bool { return time.Now().Before(t.end) }

// newCode is an authorization code for an account that authorises now.
func (f *fleetWeChat) newCode(appid string) (code secret.String, at time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	h := f.holder(AuthorizerKey(testPlatform, appid))
	h.authorized, h.authTime = true, time.Now()
	f.serial++
	value := fmt.Sprintf("queryauthcode@@@%d", f.serial)
	f.codes[value] = &wxCode{appid: appid, end: time.Now().Add(codeLife)}
	return secret.New(value), time.Now()
}

// revoke is an account that takes its authorization back: its tokens and codes are void.
func (f *fleetWeChat) revoke(appid string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	h := f.holder(AuthorizerKey(testPlatform, appid))
	h.authorized = false
	h.refresh, h.old = wxRefresh{}, ""
	if h.current != nil {
		h.current.die(time.Now())
	}
	for _, c := range f.codes {
		if c.appid == appid {
			c.used = true
		}
	}
}

// kill lets the current token of a key die before its end.
func (f *fleetWeChat) kill(k Key) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if t := f.holder(k).current; t != nil {
		t.die(time.Now())
	}
}

// rogue is another system that refreshes the account's token.
func (f *fleetWeChat) rogue(k Key) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if h := f.holder(k); k.Kind == KindAuthorizer && h.authorized && h.refresh.value != "" {
		f.issue(h, "rogue", f.overlap)
	}
}

// newTicket is a component_verify_ticket to be pushed.
func (f *fleetWeChat) newTicket() Ticket {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.serial++
	t := Ticket{Value: secret.New(fmt.Sprintf("ticket@@@%d", f.serial)), CreatedAt: time.Now()}
	f.pushed[t.Value.Reveal()] = time.Now().Add(ticketLife)
	return t
}

// accepts is an app's call to WeChat with a token: it is refused if that has ended.
func (f *fleetWeChat) accepts(n *fleetNode, token Token) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.accept(n, token.Value.Reveal(), time.Now())
}

// accept judges a token that came at a time with a call of a node.
func (f *fleetWeChat) accept(n *fleetNode, value string, came time.Time) bool {
	t := f.tokens[value]
	switch {
	case t == nil:
		f.violation("a call with a token that was never given")
		return false
	case t.live():
		return true
	}
	// Whether the refusal of before had reached the node can only be told after as long as it may take to note it.
	if ago := came.Sub(t.refusedAt); t.refusedTo == n && ago > loadTimeout {
		f.violation("a call with a token of %s that was refused %v before", t.holder.key.owner(), ago)
	}
	return false
}

// refused notes that a node was told that a token is dead.
func (f *fleetWeChat) refused(n *fleetNode, value string) {
	if t := f.tokens[value]; t != nil && !t.live() {
		t.renewable = true
		if t.refusedTo != n {
			t.refusedTo, t.refusedAt = n, time.Now()
		}
	}
}

// wxRequest is what the calls of this package say, all of them together.
type wxRequest struct {
	GrantType       string `json:"grant_type"`
	AppID           string `json:"appid"`
	Secret          string `json:"secret"`
	Force           bool   `json:"force_refresh"`
	Platform        string `json:"component_appid"`
	PlatformSecret  string `json:"component_appsecret"`
	StartPushSecret string `json:"component_secret"`
	Ticket          string `json:"component_verify_ticket"`
	Authorizer      string `json:"authorizer_appid"`
	Refresh         string `json:"authorizer_refresh_token"`
	Code            string `json:"authorization_code"`
	Offset          int    `json:"offset"`
	Count           int    `json:"count"`
}

// wxCall is a call on its way.
type wxCall struct {
	wxRequest
	path, token string
	came        time.Time
	kind        string     // of a ticket
	holder      *wxHolder  // whose token is asked for; nil: none
	node        *fleetNode // that calls
	refusal     bool       // the answer says that the token is dead
	gives       *wxToken
	refresh     *wxHolder // whose refresh token the answer has
}

// RoundTrip makes a node the transport of its own client: what is lost with the node is known.
func (n *fleetNode) RoundTrip(r *http.Request) (*http.Response, error) {
	f := n.wx
	c := &wxCall{path: r.URL.Path, node: n, came: time.Now(), kind: r.URL.Query().Get("type")}
	c.token = cmp.Or(r.URL.Query().Get("component_access_token"), r.URL.Query().Get("access_token"))
	raw, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	if len(raw) > 0 {
		if err := json.Unmarshal(raw, &c.wxRequest); err != nil {
			return nil, fmt.Errorf("fake: body is no JSON")
		}
	}
	fault, there, back := f.arrive(c)
	defer f.leave(c)
	if fault == faultDial {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: errors.New("connection refused")}
	}
	if err := n.travel(r.Context(), there); err != nil {
		f.abandoned(c)
		return nil, err
	}
	status, text := f.answer(c, fault)
	if err := n.travel(r.Context(), back); err != nil {
		return nil, err
	}
	if fault == faultLost {
		return nil, io.ErrUnexpectedEOF
	}
	f.deliver(c)
	return &http.Response{
		StatusCode: status, Header: http.Header{"Content-Type": {"text/plain"}},
		Body: io.NopCloser(strings.NewReader(text)), Request: r,
	}, nil
}

// travel is the way of a call or of its answer.
func (n *fleetNode) travel(ctx context.Context, takes time.Duration) error {
	timer := time.NewTimer(takes)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-n.cut:
		return errKilled
	}
}

// arrive notes a call and decides how it will go, and how long it will be on its way there and back.
func (f *fleetWeChat) arrive(c *wxCall) (fault wxFault, there, back time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls[c.path]++
	owner := ""
	switch c.path {
	case pathComponentToken:
		c.holder = f.holder(ComponentKey(c.Platform))
	case pathAuthorizerToken:
		c.holder = f.holder(AuthorizerKey(c.Platform, c.Authorizer))
	case pathStableToken:
		c.holder = f.holder(AccountKey(c.AppID))
	case pathQueryAuth:
		owner = c.Code
	}
	nth := f.calls[c.path]
	if c.holder != nil {
		c.holder.calls++
		c.holder.busy[c.node]++
		owner, nth = c.holder.key.owner(), c.holder.calls
		busy := 0
		for n, calls := range c.holder.busy {
			if !n.gone() {
				busy += calls
			}
		}
		if busy > 1 && !f.apart() {
			f.violation("%d calls at once for a token of %s", busy, owner)
		}
	}
	roll := func(what string) uint64 { return dice(f.seed, what, c.path, owner, nth) }
	if f.fault != nil {
		fault = f.fault(c.path, owner, roll)
	}
	f.faults[fault]++
	there = time.Duration(10+roll("there")%100) * time.Millisecond
	back = time.Duration(10+roll("back")%400) * time.Millisecond
	if fault == faultSlow {
		there += DefaultTimeout
	}
	return fault, there, back
}

func (f *fleetWeChat) leave(c *wxCall) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if c.holder != nil {
		if c.holder.busy[c.node]--; c.holder.busy[c.node] == 0 {
			delete(c.holder.busy, c.node)
		}
	}
}

// abandoned is a call whose caller left, or died: WeChat may have done what it asked for.
func (f *fleetWeChat) abandoned(c *wxCall) {
	f.mu.Lock()
	f.faults[faultBroken]++
	acts := dice(f.seed, "abandoned", c.path, f.calls[c.path])%2 == 0
	f.mu.Unlock()
	if acts {
		f.answer(c, faultLost)
	}
}

// deliver notes what an answer brought to the node.
func (f *fleetWeChat) deliver(c *wxCall) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if c.node.gone() {
		return
	}
	if c.refusal {
		f.refused(c.node, c.token)
	}
	if c.gives != nil {
		c.gives.given = c.node
		c.gives.apart = c.gives.apart || f.apart()
	}
	if c.refresh != nil && c.refresh.refresh.given == nil {
		c.refresh.refresh.given = c.node
	}
}

func (f *fleetWeChat) answer(c *wxCall, fault wxFault) (status int, text string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch fault {
	case fault500:
		return http.StatusInternalServerError, "<html>oops</html>"
	case faultHTML:
		return http.StatusOK, "<html>maintenance</html>"
	case faultBusy:
		return http.StatusOK, wxError(-1, "system error")
	case faultQuota:
		return http.StatusOK, wxError(45009, "reach max api daily quota limit")
	}
	return http.StatusOK, f.act(c)
}

// act does what a call asks for; mu is held.
func (f *fleetWeChat) act(c *wxCall) string {
	if strings.HasPrefix(c.path, "/cgi-bin/component/") && c.path != pathComponentToken && c.path != pathStartPush {
		if !f.accept(c.node, c.token, c.came) {
			c.refusal = true
			return wxError(40001, "invalid credential")
		}
	}
	switch c.path {
	case pathStartPush:
		if c.StartPushSecret != testPlatformSecret {
			return wxError(40125, "invalid appsecret")
		}
		return `{"errcode":0,"errmsg":"ok"}`
	case pathComponentToken:
		switch {
		case c.PlatformSecret != testPlatformSecret:
			return wxError(40125, "invalid appsecret")
		case !time.Now().Before(f.pushed[c.Ticket]):
			return wxError(61006, "component ticket is invalid")
		}
		f.mayRefresh(c)
		c.gives = f.issue(c.holder, "component", f.overlap)
		return fmt.Sprintf(`{"component_access_token":%q,"expires_in":7200}`, c.gives.value)
	case pathStableToken:
		return f.stable(c)
	case pathAuthorizerToken:
		return f.refreshed(c)
	case pathQueryAuth:
		return f.exchanged(c)
	case pathAuthorizerInfo:
		h := f.holders[AuthorizerKey(c.Platform, c.Authorizer)]
		if h == nil || !h.authorized {
			return wxError(61003, "component is not authorized by this account")
		}
		c.refresh = h
		return fmt.Sprintf(`{"authorizer_info":{"nick_name":"a","user_name":"gh_%s"},"authorization_info":{"authorizer_appid":%q,
			"authorizer_refresh_token":%q,"func_info":[]}}`, c.Authorizer[2:14], c.Authorizer, h.refresh.value)
	case pathAuthorizerList:
		return f.list(c)
	case pathGetTicket:
		return f.ticket(c)
	default:
		if !f.accept(c.node, c.token, c.came) {
			c.refusal = true
			return wxError(40001, "invalid credential, access_token is invalid or not latest")
		}
		return `{"errcode":0,"errmsg":"ok"}`
	}
}

// mayRefresh notes a refresh that nobody needed: the token that the gateway had was fresh, and never refused.
func (f *fleetWeChat) mayRefresh(c *wxCall) {
	t, k := c.holder.current, c.holder.key
	if t == nil || t.given == nil || t.renewable || c.node.gone() {
		return
	}
	margin := k.margin() + renewTimeout + 2*time.Second // a life is counted from when it was asked for, in whole seconds
	if k.Kind == KindAccount {
		margin = 5*time.Minute + renewTimeout
	}
	if !time.Now().Before(t.end.Add(-margin)) {
		return
	}
	switch {
	case f.apart(), k.Kind != KindAuthorizer && (f.storeBad() || t.apart):
		// What can be had for a secret is not worth waiting for a store.
	case t.saved:
		f.violation("%s was refreshed %v before the end of a token that is in the store, works, and was never refused",
			k.owner(), time.Until(t.end).Round(time.Second))
	case t.given == c.node:
		f.violation("%s was refreshed %v before the end of a token that this node was given, and that was never refused",
			k.owner(), time.Until(t.end).Round(time.Second))
	}
}

func (f *fleetWeChat) refreshed(c *wxCall) string {
	h := c.holder
	switch {
	case !h.authorized:
		return wxError(61003, "component is not authorized by this account")
	case !h.takes(c.Refresh):
		// A renewal that began before the new one was written may come with the old one.
		if at := h.refresh.savedAt; !at.IsZero() && time.Since(at) > renewTimeout && !f.apart() {
			f.violation("%s was refreshed with a void refresh token; the one that counts has been in the store for %v", h.key.owner(), time.Since(at))
		}
		return wxError(61023, "refresh_token is invalid")
	}
	f.mayRefresh(c)
	if c.Refresh == h.refresh.value {
		h.old = "" // its successor was used
		if f.rotates(h.key.AppID) {
			f.issueRefresh(h, f.grace)
		}
	}
	c.gives, c.refresh = f.issue(h, "authorizer", f.overlap), h
	if c.Refresh == h.refresh.value && f.serial%4 == 0 { // it did not change
		return fmt.Sprintf(`{"authorizer_access_token":%q,"expires_in":7200}`, c.gives.value)
	}
	return fmt.Sprintf(`{"authorizer_access_token":%q,"expires_in":7200,"authorizer_refresh_token":%q}`, c.gives.value, h.refresh.value)
}

func (f *fleetWeChat) exchanged(c *wxCall) string {
	code := f.codes[c.Code]
	switch {
	case code == nil || code.used:
		return wxError(61009, "code is invalid")
	case !time.Now().Before(code.end):
		return wxError(61010, "code is expired")
	}
	code.used = true
	h := f.holder(AuthorizerKey(c.Platform, code.appid))
	f.issueRefresh(h, 0) // a new authorization makes the refresh token of before void
	h.old = ""
	c.gives, c.refresh = f.issue(h, "authorizer", f.overlap), h
	return fmt.Sprintf(`{"authorization_info":{"authorizer_appid":%q,"authorizer_access_token":%q,"expires_in":7200,
		"authorizer_refresh_token":%q,"func_info":[{"funcscope_category":{"id":1}}]}}`, code.appid, c.gives.value, h.refresh.value)
}

// stable is stable_token: in normal mode the same token until its last five minutes.
func (f *fleetWeChat) stable(c *wxCall) string {
	if c.Secret != testAccountSecret {
		return wxError(40125, "invalid appsecret")
	}
	h, now := c.holder, time.Now()
	t := h.current
	f.mayRefresh(c)
	if c.Force {
		h.forced = slices.DeleteFunc(h.forced, func(at time.Time) bool { return now.Sub(at) >= 24*time.Hour })
		switch n := len(h.forced); {
		case t != nil && !t.renewable:
			f.violation("%s was forced although its token was never refused", h.key.owner())
		case n > 0 && now.Sub(h.forced[n-1]) < forceInterval:
			if h.forcedBy == c.node && t != nil && t.given == c.node {
				f.violation("%s was forced twice in %v", h.key.owner(), now.Sub(h.forced[n-1]))
			}
			c.Force = false
		case n >= 20:
			return wxError(45009, "reach max api daily quota limit")
		}
	}
	switch {
	case c.Force:
		h.forced, h.forcedBy = append(h.forced, now), c.node
		t = f.issue(h, "account", 0)
	case t == nil || now.After(t.until.Add(-5*time.Minute)): // WeChat does not look whether the token works
		t = f.issue(h, "account", 5*time.Minute)
	}
	c.gives = t
	return fmt.Sprintf(`{"access_token":%q,"expires_in":%d}`, t.value, int(t.until.Sub(now)/time.Second))
}

func (f *fleetWeChat) list(c *wxCall) string {
	if c.Count > 500 || c.Count < 1 {
		return wxError(40170, "count out of range")
	}
	type item struct {
		AppID   string `json:"authorizer_appid"`
		Refresh string `json:"refresh_token"`
		Time    int64  `json:"auth_time"`
	}
	var all []*wxHolder
	for _, h := range f.holders {
		if h.key.Kind == KindAuthorizer && h.key.Platform == c.Platform && h.authorized {
			all = append(all, h)
		}
	}
	slices.SortFunc(all, func(a, b *wxHolder) int { return strings.Compare(a.key.AppID, b.key.AppID) })
	page := []item{}
	for _, h := range all[min(c.Offset, len(all)):min(c.Offset+c.Count, len(all))] {
		page = append(page, item{h.key.AppID, h.refresh.value, h.authTime.Unix()})
		if h.refresh.given == nil {
			h.refresh.given = c.node
		}
	}
	text, _ := json.Marshal(map[string]any{"total_count": len(all), "list": page})
	return string(text)
}

// ticket is getticket: a new one for each call.
func (f *fleetWeChat) ticket(c *wxCall) string {
	if !f.accept(c.node, c.token, c.came) {
		c.refusal = true
		return wxError(40001, "invalid credential, access_token is invalid or not latest")
	}
	owner := f.tokens[c.token].holder.key
	id := c.kind + " " + owner.owner()
	h := f.tickets[id]
	if h == nil {
		h = &wxHolder{key: owner}
		f.tickets[id] = h
	}
	if t := h.current; t != nil && t.given == c.node && !t.renewable && time.Now().Before(t.end.Add(-20*time.Minute)) {
		f.violation("a ticket %s was fetched %v before its end", id, time.Until(t.end))
	}
	h.current = nil // tickets of before go on
	c.gives = f.issue(h, "ticket", 0)
	return fmt.Sprintf(`{"errcode":0,"errmsg":"ok","ticket":%q,"expires_in":7200}`, c.gives.value)
}

// wrote is the ledger: it hears of each record that reached the store, and checks that nothing goes backwards.
// Mu is held.
func (f *fleetWeChat) wrote(name string, data []byte) {
	h := f.records[name]
	if h == nil {
		return
	}
	next := new(recordWire)
	if err := decodeRecord(name, data, next); err != nil {
		f.violation("a record was written that cannot be read: %v", err)
		return
	}
	// Nodes that cannot see each other's records may refresh one token at the same time. Which of two counts can then not
	// be told.
	if prev := h.saved; prev != nil && !f.apart() {
		revoked := next.record().revoked()
		switch {
		case next.Gen < prev.Gen:
			f.violation("%s: generation %d was written over generation %d", h.key.owner(), next.Gen, prev.Gen)
		case next.Gen == prev.Gen && !next.record().same(prev.record()):
			f.violation("%s: generation %d was written over another one of the same number", h.key.owner(), next.Gen)
		case next.RefreshToken == "" && prev.RefreshToken != "" && !revoked:
			f.violation("%s: a refresh token was written over with none", h.key.owner())
		case next.RefreshToken != "" && f.refresh[next.RefreshToken] < f.refresh[prev.RefreshToken]:
			f.violation("%s: a refresh token was written over with an earlier one", h.key.owner())
		case next.AccessToken != "" && prev.AccessToken != "" && f.tokens[next.AccessToken].serial < f.tokens[prev.AccessToken].serial:
			f.violation("%s: a token was written over with an earlier one", h.key.owner())
		}
	}
	f.note(h, next)
}

// note takes a record for what the store has; mu is held.
func (f *fleetWeChat) note(h *wxHolder, rec *recordWire) {
	if h.saved = rec; rec == nil {
		return
	}
	if h.current != nil {
		h.current.saved = false
	}
	if t := f.tokens[rec.AccessToken]; t != nil {
		t.saved, t.wasSaved = t == h.current, true
	}
	if rec.RefreshToken != "" && rec.RefreshToken == h.refresh.value && h.refresh.savedAt.IsZero() {
		h.refresh.savedAt = time.Now()
	}
}

// replaced notes that the store was put back to an older state, or emptied.
func (f *fleetWeChat) replaced(records map[string][]byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for name, h := range f.records {
		if h.current != nil {
			h.current.saved = false
		}
		h.refresh.savedAt = time.Time{}
		var rec *recordWire
		if data, ok := records[name]; ok {
			rec = new(recordWire)
			_ = decodeRecord(name, data, rec)
		}
		f.note(h, rec)
	}
}

var errKilled = errors.New("the process is dead")

// storeFault is how an operation on the store goes wrong.
type storeFault int

const (
	storeWell    storeFault = iota
	storeFails              // nothing done, an error
	storeHangs              // nothing done, an error after as long as an operation may take
	storeForgets            // done, and an error all the same
)

// fleetStore is the store that all nodes share. It outlives them.
type fleetStore struct {
	*MemStore
	wx      *fleetWeChat
	latency time.Duration

	mu     sync.Mutex
	fault  func(op, name string) storeFault // nil: none
	badAt  time.Time                        // when an operation last went wrong
	faults map[storeFault]int
}

func newFleetStore(wx *fleetWeChat) *fleetStore {
	s := &fleetStore{MemStore: NewMemStore(), wx: wx, faults: make(map[storeFault]int)}
	wx.storeBad = func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return !s.badAt.IsZero() && time.Since(s.badAt) < 2*renewTimeout
	}
	return s
}

func (s *fleetStore) fail(fault func(op, name string) storeFault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = fault
}

func (s *fleetStore) how(op, name string) storeFault {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fault == nil {
		return storeWell
	}
	f := s.fault(op, name)
	if f != storeWell {
		s.badAt = time.Now()
	}
	s.faults[f]++
	return f
}

// snapshot is a backup.
func (s *fleetStore) snapshot() map[string][]byte {
	s.MemStore.mu.Lock()
	defer s.MemStore.mu.Unlock()
	return maps.Clone(s.records)
}

// restore puts a backup back; nil empties the store.
func (s *fleetStore) restore(backup map[string][]byte) {
	s.MemStore.mu.Lock()
	s.records = make(map[string][]byte)
	maps.Copy(s.records, backup)
	s.MemStore.mu.Unlock()
	s.mu.Lock()
	s.badAt = time.Now()
	s.mu.Unlock()
	s.wx.replaced(backup)
}

// fleetNode is one process of the gateway: a Manager with its own way to the store and to WeChat, both of which end
// with it. What it still does after that reaches nobody.
type fleetNode struct {
	*Manager
	wx    *fleetWeChat
	store *fleetStore
	env   *Environment
	cut   chan struct{}

	mu    sync.Mutex
	locks map[int]func() // locks of the store that it holds
	taken int
	seq   int
	dead  map[string]int // tokens that it was told are dead -> seq
	floor map[Key]Token  // the newest token that it served
}

func newFleetNode(wx *fleetWeChat, store *fleetStore, accounts []AccountCredentials) *fleetNode {
	n := &fleetNode{
		Manager: NewManager(), wx: wx, store: store, cut: make(chan struct{}),
		locks: make(map[int]func()), dead: make(map[string]int), floor: make(map[Key]Token),
	}
	client, err := NewClient(ClientOptions{Transport: n})
	if err != nil {
		panic(err)
	}
	n.env = &Environment{
		Store: nodeStore{n}, API: client, Accounts: accounts,
		Platforms: []PlatformCredentials{{testPlatform, secret.New(testPlatformSecret)}},
	}
	n.Use(n.env)
	return n
}

func (n *fleetNode) gone() bool {
	select {
	case <-n.cut:
		return true
	default:
		return false
	}
}

// crash ends the process as kill -9 does.
func (n *fleetNode) crash() {
	n.end()
	go func() {
		n.Close() // only for its goroutines to end
		n.abandonLocks()
	}()
}

// stop ends the process in good order.
func (n *fleetNode) stop() {
	n.Close()
	n.end()
	go n.abandonLocks()
}

// end cuts the process off. No answer and no write is half on its way then.
func (n *fleetNode) end() {
	n.wx.mu.Lock()
	defer n.wx.mu.Unlock()
	close(n.cut)
}

// abandonLocks frees what the process held when it ended, once that is stale, as in Caddy's file storage.
func (n *fleetNode) abandonLocks() {
	time.Sleep(10 * time.Second)
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, unlock := range n.locks {
		unlock()
	}
	n.locks = nil
}

// nodeStore is a node's way to the store.
type nodeStore struct{ n *fleetNode }

// do makes one operation: act under the lock that crash takes, so that it happens before the crash or never.
func (s nodeStore) do(ctx context.Context, op, name string, act func() error) error {
	if s.n.gone() {
		return errKilled
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if s.n.store.latency > 0 {
		time.Sleep(s.n.store.latency)
	}
	fault := s.n.store.how(op, name)
	switch fault {
	case storeFails:
		return errDisk
	case storeHangs:
		timer := time.NewTimer(storeTimeout)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
		case <-s.n.cut:
		}
		return errDisk
	}
	if err := act(); err != nil {
		return err
	}
	if fault == storeForgets {
		return errDisk
	}
	return nil
}

// Load implements Store.
func (s nodeStore) Load(ctx context.Context, name string) (value []byte, err error) {
	err = s.do(ctx, "load", name, func() error {
		value, err = s.n.store.MemStore.Load(ctx, name)
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		value = nil
	}
	return value, err
}

// Store implements Store.
func (s nodeStore) Store(ctx context.Context, name string, value []byte) error {
	return s.do(ctx, "store", name, func() error {
		s.n.wx.mu.Lock()
		defer s.n.wx.mu.Unlock()
		if s.n.gone() {
			return errKilled
		}
		s.n.wx.wrote(name, value)
		return s.n.store.MemStore.Store(context.WithoutCancel(ctx), name, value)
	})
}

// Delete implements Store.
func (s nodeStore) Delete(ctx context.Context, name string) error {
	return s.do(ctx, "delete", name, func() error {
		s.n.wx.mu.Lock()
		defer s.n.wx.mu.Unlock()
		if s.n.gone() {
			return errKilled
		}
		return s.n.store.MemStore.Delete(context.WithoutCancel(ctx), name)
	})
}

// List implements Store.
func (s nodeStore) List(ctx context.Context, prefix string) (names []string, err error) {
	err = s.do(ctx, "list", prefix, func() error {
		names, err = s.n.store.MemStore.List(ctx, prefix)
		return err
	})
	return names, err
}

// Lock implements Store.
func (s nodeStore) Lock(ctx context.Context, name string) (func(), error) {
	var unlock func()
	err := s.do(ctx, "lock", name, func() (err error) {
		unlock, err = s.n.store.MemStore.Lock(ctx, name)
		return err
	})
	if err != nil {
		if unlock != nil {
			unlock()
		}
		return nil, err
	}
	s.n.mu.Lock()
	defer s.n.mu.Unlock()
	s.n.taken++
	id := s.n.taken
	if s.n.locks == nil { // it died meanwhile
		unlock()
		return nil, errKilled
	}
	s.n.locks[id] = unlock
	return func() {
		s.n.mu.Lock()
		defer s.n.mu.Unlock()
		if !s.n.gone() {
			delete(s.n.locks, id)
			unlock()
		}
	}, nil
}

// served is Get or Renew with everything checked that can be told from outside: the token is one of the key's, works by
// its own word, is not known to be dead, does not go backwards, and is in the store unless the node says otherwise.
func (n *fleetNode) served(k Key, ask func() (Token, error)) (Token, error) {
	n.mu.Lock()
	start, floor := n.seq, n.floor[k]
	n.mu.Unlock()
	token, err := ask()
	unsaved := n.Unsaved()
	if err != nil || n.gone() {
		return token, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.wx.mu.Lock()
	defer n.wx.mu.Unlock()
	f, owner := n.wx, k.owner()
	t := f.tokens[token.Value.Reveal()]
	if t == nil || t.holder.key != k {
		f.violation("%s was served a token that is not one of its own", owner)
		return token, nil
	}
	if known, ok := n.dead[t.value]; ok && known <= start {
		f.violation("%s was served a token that the node knows to be dead", owner)
	}
	if !t.killed && !t.live() {
		f.violation("%s was served a token %v after its end", owner, time.Since(t.end))
	}
	if before := f.tokens[floor.Value.Reveal()]; before != nil && !before.apart && (t.serial < before.serial || f.nodes == 1 && token.Generation < floor.Generation) {
		f.violation("%s was served generation %d after generation %d", owner, token.Generation, floor.Generation)
	}
	if !t.seen && !t.wasSaved && unsaved == 0 {
		f.violation("%s was served a token that is not in the store, and the node does not say so", owner)
	}
	t.seen = true
	if before := f.tokens[n.floor[k].Value.Reveal()]; before == nil || t.serial >= before.serial {
		n.floor[k] = token
	}
	return token, nil
}

func (n *fleetNode) get(ctx context.Context, k Key) (Token, error) {
	return n.served(k, func() (Token, error) { return n.Get(ctx, k) })
}

// renew reports a refused token; the zero one asks for a new one in any case.
func (n *fleetNode) renew(ctx context.Context, k Key, refused secret.String) (Token, error) {
	n.wx.mu.Lock()
	for _, t := range []*wxToken{n.wx.tokens[refused.Reveal()], n.wx.holder(k).current} {
		if t != nil && (refused.IsZero() || t.value == refused.Reveal()) {
			t.renewable = true
		}
	}
	n.wx.refused(n, refused.Reveal())
	n.wx.mu.Unlock()
	token, err := n.served(k, func() (Token, error) { return n.Renew(ctx, k, refused) })
	// A node that cannot look up what it holds does not know that it is that which was refused.
	blind := errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrStore)
	if !refused.IsZero() && !blind {
		n.mu.Lock()
		n.seq++
		if _, ok := n.dead[refused.Reveal()]; !ok {
			n.dead[refused.Reveal()] = n.seq
		}
		n.mu.Unlock()
	}
	return token, err
}

var errRefusedTwice = errors.New("refused twice")

// use is an app's call, which is repeated once if the token is refused.
func (n *fleetNode) use(ctx context.Context, k Key) error {
	token, err := n.get(ctx, k)
	if err != nil || n.wx.accepts(n, token) {
		return err
	}
	if token, err = n.renew(ctx, k, token.Value); err != nil || n.wx.accepts(n, token) {
		return err
	}
	return errRefusedTwice
}

// inStep reports whether the store has a refresh token that WeChat takes.
func (f *fleetWeChat) inStep(k Key) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	h := f.holder(k)
	return h.saved != nil && h.takes(h.saved.RefreshToken)
}

// whole checks one authorizer after all troubles: what WeChat takes is in the store, or it cannot be, and that is why
// the account does not work. It reports whether the account has to work.
func (f *fleetWeChat) whole(appid string) (works bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	h := f.holder(AuthorizerKey(testPlatform, appid))
	held := ""
	if h.saved != nil {
		held = h.saved.RefreshToken
	}
	switch {
	case !h.authorized || h.refresh.value == "":
		return false
	case h.takes(held):
		return true
	default:
		f.violation("%s: its refresh token is not in the store, and was not got back", appid)
		return false
	}
}
