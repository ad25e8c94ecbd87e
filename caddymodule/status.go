package caddymodule

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// Limits of an examination.
const (
	storeCheckWait = time.Second      // for the store to answer
	tokenCheckWait = time.Second      // for WeChat to give a component token where there is none, all platforms together
	ticketReread   = 12 * time.Minute // age at which another node is asked, through the store, whether it has a newer ticket
	verdictLife    = time.Second      // for how long a verdict on readiness is believed
	verdictStale   = 10 * verdictLife // and for how long while the next one is awaited
	examineTimeout = 5 * time.Second  // for all of it
	modulePath     = "github.com/caddy-wechat/caddy-wechat"
)

// Level says how well something is.
type Level string

// The levels, the best first.
const (
	Green  Level = "green"
	Yellow Level = "yellow" // it works, and somebody should look
	Red    Level = "red"    // something does not work
)

// rank orders levels.
func (l Level) rank() int { return slices.Index([]Level{Green, Yellow, Red}, l) }

func worst(a, b Level) Level {
	if a.rank() >= b.rank() {
		return a
	}
	return b
}

// Finding is something that those who run the gateway should know, and what to do about it.
type Finding struct {
	Level   Level       `json:"level"`
	Code    string      `json:"code"`
	Subject string      `json:"subject"`
	Text    tokens.Text `json:"text"`
	Remedy  tokens.Text `json:"remedy"`

	about   string // the appid or host that it counts for
	unready bool   // as long as it lasts the gateway is not ready
}

// Status is the state of the gateway as it can be shown: no token, key or message is in it.
type Status struct {
	Version   string           `json:"version"`
	Node      string           `json:"node"`
	Time      time.Time        `json:"time"`
	Started   time.Time        `json:"started"`
	Level     Level            `json:"level"`
	Findings  []Finding        `json:"findings"`
	Platforms []PlatformStatus `json:"platforms"`
	Accounts  []AccountStatus  `json:"accounts"`
	Clients   []ClientStatus   `json:"clients"`
	Store     StoreStatus      `json:"store"`
	Hosts     []HostStatus     `json:"hosts"`
	Backends  []BackendStatus  `json:"backends"`
	Pushes    PushesStatus     `json:"pushes"`
}

// PlatformStatus is the state of a third-party platform.
type PlatformStatus struct {
	AppID        string             `json:"appid"`
	Level        Level              `json:"level"`
	Ticket       *TicketStatus      `json:"ticket,omitempty"` // absent: none
	Token        TokenStatus        `json:"token"`
	Keys         []KeyStatus        `json:"keys"`
	ReleaseCheck ReleaseCheckStatus `json:"release_check"`
	Unexchanged  int                `json:"unexchanged"` // authorizations whose codes are not exchanged yet
	Lost         int                `json:"lost"`        // and whose codes never will be: their owners must authorise again
	LastPush     *time.Time         `json:"last_push,omitempty"`
}

// TicketStatus is the newest ticket of a platform.
type TicketStatus struct {
	Received time.Time `json:"received"`
	Age      int64     `json:"age_seconds"`
}

// TokenStatus is the state of an access token, without the token.
type TokenStatus struct {
	Expires   *time.Time   `json:"expires,omitempty"`
	Refreshed *time.Time   `json:"refreshed,omitempty"`
	Refused   bool         `json:"refused,omitempty"` // by WeChat, since
	Error     *tokens.Text `json:"error,omitempty"`   // of the last renewal
}

// KeyStatus is an aes_key or token of the configuration, by its place: 0 is the newest.
type KeyStatus struct {
	What     string     `json:"what"`
	Index    int        `json:"index"`
	LastUsed *time.Time `json:"last_used,omitempty"` // by a push; of this process
}

// ReleaseCheckStatus says when WeChat's acceptance check (全网发布) last came.
type ReleaseCheckStatus struct {
	Seen bool       `json:"seen"`
	Last *time.Time `json:"last,omitempty"`
}

// AccountStatus is the state of a plain account.
type AccountStatus struct {
	AppID    string      `json:"appid"`
	Mode     string      `json:"mode,omitempty"` // empty: it receives no pushes
	Level    Level       `json:"level"`
	Token    TokenStatus `json:"token"`
	Keys     []KeyStatus `json:"keys"`
	LastPush *time.Time  `json:"last_push,omitempty"`
}

// ClientStatus says what an app may do.
type ClientStatus struct {
	Name   string   `json:"name"`
	AppIDs []string `json:"appids"`
	Paths  []string `json:"paths,omitempty"` // empty: all that are neither dangerous nor able to reveal a token
}

// StoreStatus is the state of the store.
type StoreStatus struct {
	Module    string     `json:"module"`
	Level     Level      `json:"level"`
	LastError *time.Time `json:"last_error,omitempty"`
	Error     string     `json:"error,omitempty"`
	Waiting   int        `json:"waiting"` // records that it has not taken yet
	Unsaved   int        `json:"unsaved"` // records and tickets in memory alone
	Degraded  bool       `json:"degraded"`
}

// HostStatus is how one of WeChat's hosts did, to the gateway's own calls and to those of apps.
type HostStatus struct {
	Host      string     `json:"host"`
	Level     Level      `json:"level"`
	LastOK    *time.Time `json:"last_ok,omitempty"`
	LastError *time.Time `json:"last_error,omitempty"`
	Error     string     `json:"error,omitempty"`     // class and reason of the last error
	EgressIP  string     `json:"egress_ip,omitempty"` // from which WeChat said that it sees calls come
}

// BackendStatus is an upstream of some reverse_proxy, as Caddy counts it.
type BackendStatus struct {
	Address  string `json:"address"`
	Level    Level  `json:"level"`
	InFlight int    `json:"in_flight"`
	Fails    int    `json:"fails"` // within fail_duration, if passive health checks are configured
}

// PushesStatus is about the pushes of all accounts.
type PushesStatus struct {
	InFlight int        `json:"in_flight"`
	Last     *time.Time `json:"last,omitempty"`
}

// timeOf is a time as JSON shows it: in UTC, to the second, or not at all.
func timeOf(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC().Truncate(time.Second)
	return &t
}

// version is the gateway's own.
var version = sync.OnceValue(func() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, m := range append(info.Deps, &info.Main) {
		if m.Path == modulePath && m.Version != "" {
			return m.Version
		}
	}
	return "unknown"
})

// status examines everything.
func (a *App) status(ctx context.Context) Status {
	ctx, cancel := context.WithTimeout(ctx, examineTimeout)
	defer cancel()
	x := a.examine(ctx)
	x.configuration(ctx)
	h := a.health()
	node, _ := os.Hostname()
	s := Status{
		Version: version(), Node: node, Time: *timeOf(x.now), Started: *timeOf(h.started),
		Platforms: x.platforms, Accounts: x.accounts, Clients: a.clientStatus(), Store: x.store,
		Hosts: x.hosts(), Backends: x.backends(), Pushes: x.pushes(),
	}
	x.sightings()
	x.clock()
	if caddy.Exiting() {
		x.found(shuttingDown())
	}
	slices.SortStableFunc(x.findings, func(f, g Finding) int { return g.Level.rank() - f.Level.rank() })
	s.Findings, s.Level = x.findings, Green
	for _, f := range s.Findings {
		s.Level = worst(s.Level, f.Level)
	}
	for i := range s.Platforms {
		s.Platforms[i].Level = x.levelOf(s.Platforms[i].AppID)
	}
	for i := range s.Accounts {
		s.Accounts[i].Level = x.levelOf(s.Accounts[i].AppID)
	}
	s.Store.Level = x.levelOf(aboutStore)
	return s
}

// ready examines what service depends on, and returns what stands in its way. A verdict serves for a second.
func (a *App) ready(ctx context.Context) []Finding {
	if caddy.Exiting() { // at once, for Caddy's shutdown_delay is there to have it noticed
		return []Finding{shuttingDown()}
	}
	return a.health().verdict.get(func() []Finding {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), examineTimeout) // it is for others too
		defer cancel()
		return slices.DeleteFunc(a.examine(ctx).findings, func(f Finding) bool { return !f.unready })
	})
}

// verdict is what ready last came to. The zero value is ready.
type verdict struct {
	asking sync.Mutex // held while somebody examines

	mu       sync.Mutex
	at       time.Time // zero: never
	findings []Finding
}

// get returns a verdict that is young enough. One caller at a time asks for the next; others get the last one meanwhile.
func (v *verdict) get(ask func() []Finding) []Finding {
	if findings, fresh := v.last(verdictLife); fresh {
		return findings
	}
	if !v.asking.TryLock() {
		if findings, fresh := v.last(verdictStale); fresh {
			return findings
		}
		v.asking.Lock()
	}
	defer v.asking.Unlock()
	if findings, fresh := v.last(verdictLife); fresh {
		return findings
	}
	findings := ask()
	v.mu.Lock()
	defer v.mu.Unlock()
	v.at, v.findings = time.Now(), findings
	return findings
}

func (v *verdict) last(life time.Duration) (findings []Finding, fresh bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.findings, !v.at.IsZero() && time.Since(v.at) < life
}

// clientStatus shows the clients, without their keys.
func (a *App) clientStatus() []ClientStatus {
	list := make([]ClientStatus, 0, len(a.Clients))
	for _, c := range a.Clients {
		list = append(list, ClientStatus{Name: c.Name, AppIDs: c.AppIDs, Paths: c.Paths})
	}
	return list
}

// hosts shows WeChat's hosts that are configured.
func (x *examination) hosts() []HostStatus {
	list := make([]HostStatus, 0, len(x.app.origins))
	for _, origin := range x.app.origins {
		list = append(list, x.host(origin.Host, x.app.health().hosts.at(origin.Host)))
	}
	return list
}

func (x *examination) pushes() PushesStatus {
	var last time.Time
	for _, p := range x.app.Platforms {
		if at := when(p.ring.last); at.After(last) {
			last = at
		}
	}
	for _, acc := range x.app.Accounts {
		if at := when(acc.ring.last); at.After(last) {
			last = at
		}
	}
	return PushesStatus{InFlight: x.app.calls().inFlight(), Last: timeOf(last)}
}

// upstreamsModule is what Caddy's own admin endpoint asks about upstreams.
const upstreamsModule = "admin.api.reverse_proxy"

// backends shows the upstreams of every reverse_proxy but those of wechat_api, which are WeChat's hosts.
func (x *examination) backends() []BackendStatus {
	list := []BackendStatus{}
	upstreams, err := askUpstreams()
	if err != nil {
		x.app.logger.Error("upstreams cannot be listed", zap.Error(err))
		return list
	}
	ours := make(map[string]bool, len(x.app.origins))
	for _, origin := range x.app.origins {
		ours[dialAddress(origin)] = true
	}
	for _, u := range upstreams {
		if ours[u.Address] {
			continue
		}
		b := BackendStatus{Address: u.Address, Level: Green, InFlight: u.NumRequests, Fails: u.Fails}
		if u.Fails > 0 {
			b.Level = Yellow
			x.backendFails(u.Address, u.Fails)
		}
		list = append(list, b)
	}
	return list
}

// upstream is one as Caddy's admin endpoint shows it.
type upstream struct {
	Address     string `json:"address"`
	NumRequests int    `json:"num_requests"`
	Fails       int    `json:"fails"`
}

// askUpstreams asks what GET /reverse_proxy/upstreams of Caddy's admin endpoint answers, whether or not that listens.
func askUpstreams() (list []upstream, err error) {
	info, err := caddy.GetModule(upstreamsModule)
	if err != nil {
		return nil, nil //nolint:nilerr // a Caddy without reverse_proxy has none
	}
	router, ok := info.New().(caddy.AdminRouter)
	if !ok {
		return nil, errors.New(upstreamsModule + " has no routes")
	}
	for _, route := range router.Routes() {
		req, err := http.NewRequest(http.MethodGet, "http://localhost"+route.Pattern, http.NoBody)
		if err != nil {
			return nil, err
		}
		answer := &heldAnswer{header: make(http.Header)}
		if err := route.Handler.ServeHTTP(answer, req); err != nil {
			return nil, err
		}
		var some []upstream
		if err := json.Unmarshal(answer.body, &some); err != nil {
			return nil, err
		}
		list = append(list, some...)
	}
	slices.SortFunc(list, func(a, b upstream) int {
		if a.Address < b.Address {
			return -1
		}
		return 1
	})
	return list, nil
}

// heldAnswer is a ResponseWriter into memory.
type heldAnswer struct {
	header http.Header
	body   []byte
}

func (a *heldAnswer) Header() http.Header { return a.header }
func (*heldAnswer) WriteHeader(int)       {}
func (a *heldAnswer) Write(b []byte) (int, error) {
	a.body = append(a.body, b...)
	return len(b), nil
}
