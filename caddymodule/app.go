package caddymodule

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// defaultOpen is where the authorization pages of WeChat are.
const defaultOpen = "https://open.weixin.qq.com"

// App holds what all parts of the WeChat gateway share: the platforms, accounts and clients, the store that keeps
// tickets and tokens, and the way to WeChat's API. It is configured once, by the global option `wechat`, which in JSON is this app; the
// handlers wechat_event, wechat_message, wechat_api, wechat_oauth, wechat_authorize and wechat_jssdk use it, and so do the verification files that are
// added at run time and the permission wechat of on-demand TLS.
//
// What must last (tickets, refresh tokens, the intent to exchange an authorization code) is kept in Caddy's
// configured storage, sealed with seal_keys when there are any. Access tokens are fetched on demand, renewed before
// they expire while they are in use, and never leave the gateway. A reload keeps all of it.
//
// What the storage does not take, such as a full disk, is kept in a spill folder of the node and moved to the storage
// later. What the storage has lost, or holds damaged, is had from WeChat again: tickets are asked for, and the list of
// accounts that authorised a platform is compared with the storage when that is new or was emptied, and once a day.
//
// Metrics, in the config's registry: caddy_wechat_pushes_total, caddy_wechat_push_duration_seconds,
// caddy_wechat_replies_total, caddy_wechat_push_retries_joined_total, caddy_wechat_pushes_taken_over_total, caddy_wechat_deduplication_degraded, caddy_wechat_late_replies_total,
// caddy_wechat_pushes_in_flight, caddy_wechat_pushes_forgotten_total, caddy_wechat_mirrors_total, caddy_wechat_token_refreshes_total,
// caddy_wechat_token_refresh_duration_seconds, caddy_wechat_token_waiters, caddy_wechat_rogue_refreshes_total, caddy_wechat_ticket_age_seconds,
// caddy_wechat_records_waiting, caddy_wechat_records_unsaved, caddy_wechat_api_requests_total,
// caddy_wechat_api_credential_retries_total, caddy_wechat_api_errors_total, caddy_wechat_oauth_total, caddy_wechat_jssdk_total, caddy_wechat_authorize_total,
// caddy_wechat_oauth_users, caddy_wechat_oauth_forgotten_total,
// caddy_wechat_store_operation_duration_seconds, caddy_wechat_store_errors_total, caddy_wechat_lock_wait_seconds, caddy_wechat_tokens_cached,
// caddy_wechat_api_calls_today, caddy_wechat_events_dropped_total, caddy_wechat_forwards_waiting, caddy_wechat_forwards_total.
//
// Events, through Caddy's events app, with the data platform, appid, kind, and for failures reason and errcode, as far as
// they apply: wechat_ticket_received, wechat_ticket_overdue, wechat_authorized, wechat_unauthorized, wechat_token_refreshed,
// wechat_token_failed, wechat_rogue_refresh, wechat_release_check. They are emitted in the background.
type App struct {
	// Platforms are the third-party platforms, in the order in which a push is tried against them. Default: none.
	Platforms []*Platform `json:"platforms,omitempty"`
	// Accounts are the plain accounts. Default: none.
	Accounts []*Account `json:"accounts,omitempty"`
	// Clients are the apps that may call WeChat's API. Default: none.
	Clients []*Client `json:"clients,omitempty"`
	// StoreRaw is the store for what must last. Default: {"module": "caddy"}, Caddy's own storage.
	StoreRaw json.RawMessage `json:"store,omitempty" caddy:"namespace=wechat.stores inline_key=module"`
	// SealKeys encrypt the records at rest: 32 bytes each as hexadecimal or base64, newest first; records sealed
	// with a later one are still read. Default: none, records are stored as Caddy stores private keys.
	SealKeys []string `json:"seal_keys,omitempty"`
	// API are the origins of WeChat's API, the preferred one first; the others are tried only when no connection can
	// be made. Plain http is allowed to a loopback address only. Default: https://api.weixin.qq.com.
	API []string `json:"api,omitempty"`
	// Open is the origin of WeChat's authorization pages, to which browsers are sent. Only a simulator has another one.
	// Default: https://open.weixin.qq.com, and https://mp.weixin.qq.com for computers.
	Open string `json:"open,omitempty"`
	// Spill is a folder on a disk of this machine, absolute and for this process alone: records that the store does not
	// take are kept there, sealed like all others, until it does. Default: wechat-spill in Caddy's data folder, with a
	// folder in it for each store.
	Spill string `json:"spill,omitempty"`
	// Proxy is the egress proxy for the gateway's own calls and the apps' calls alike. Calls to an API origin on this
	// machine over plain http do not use it: it could read their tokens. Default: none.
	Proxy string `json:"proxy,omitempty"`
	// MaxAnswers is how many bytes the answers to pushes may take that are kept for a minute, because WeChat may push a message again, from
	// 1 MiB to 512 MiB; beyond that the oldest go early. Default: 9 MiB.
	MaxAnswers int64 `json:"max_answers,omitempty"`
	// MaxIdentities is how many answered pushes whose answers are gone are still known when they come again, at some twenty bytes each,
	// from 10,000 to 10,000,000. Default: 1000000.
	MaxIdentities int `json:"max_identities,omitempty"`

	logger  *zap.Logger
	ctx     caddy.Context // of this configuration, to find its sites by
	origins []*url.URL
	open    *url.URL
	proxyTo *url.URL
	byAppID map[string]any // *Platform or *Account

	platformCodecs []candidate // of all platforms, in order

	store       StoreModule
	storeModule string // its name in the configuration
	env         *tokens.Environment
	poolKey     string
	shared      *shared
	// before is the state of the configuration in whose place this one is loaded, of another store, until that has ended; nil: there is none.
	before      atomic.Pointer[shared]
	generations *generations // that this one joins when it comes in force
	activate    sync.Once
}

// CaddyModule returns the Caddy module information.
func (*App) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "wechat", New: func() caddy.Module { return new(App) }}
}

// Provision resolves and checks the configuration and takes the state that reloads share. It opens no connection
// and writes nothing.
func (a *App) Provision(ctx caddy.Context) error {
	a.logger, a.ctx = ctx.Logger(), ctx
	unquoteLog()
	if err := a.provisionLimits(); err != nil {
		return err
	}
	r := resolver{caddy.NewReplacer(), a.logger}
	if err := a.provisionNames(r); err != nil {
		return err
	}
	sealer, err := a.provisionSealer(r)
	if err != nil {
		return err
	}
	client, err := a.provisionWeChat(r)
	if err != nil {
		return err
	}
	store, err := a.provisionStore(ctx)
	if err != nil {
		return err
	}
	a.store = store
	var before *shared
	if app := inForceNow(); app != nil {
		before = app.shared
	}
	shared, err := acquireShared(store.Identity(), storeName(store), before)
	if err != nil {
		return err
	}
	if before != shared {
		a.before.Store(before)
	}
	a.shared, a.poolKey, a.generations = shared, store.Identity(), &running
	a.env = &tokens.Environment{
		Store: store.Store(), Sealer: sealer, API: client, Log: ctx.Slogger(), Observer: &watcher{shared.health, shared},
	}
	if env := a.env; before != nil { // Caddy may still refuse this configuration when it is in force already
		a.env.Settled = func() bool {
			now := inForceNow()
			return now != nil && (now.env == env || before != shared && now.shared == shared)
		}
	}
	if a.env.Spill, err = a.spillFolder(r, store.Identity()); err != nil {
		return err
	}
	if open := a.openOrigin(); open != defaultOpen {
		a.env.Pages = open
	}
	for _, p := range a.Platforms {
		p.ring = shared.health.ring(p.AppID, p.prints)
		a.env.Platforms = append(a.env.Platforms, tokens.PlatformCredentials{AppID: p.AppID, Secret: p.secret})
	}
	for _, acc := range a.Accounts {
		acc.ring = shared.health.ring(acc.AppID, acc.prints)
		a.env.Accounts = append(a.env.Accounts, tokens.AccountCredentials{AppID: acc.AppID, Secret: acc.secret})
	}
	if err := a.provisionEvents(ctx); err != nil {
		return err
	}
	if err := shared.metrics.register(ctx.GetMetricsRegistry(), usersCollector{shared.users}); err != nil {
		return fmt.Errorf("registering metrics: %w", err)
	}
	return nil
}

// receives reports whether pushes for an account ("": any) can be opened.
func (a *App) receives(appid string) bool {
	return len(a.Platforms) > 0 || slices.ContainsFunc(a.Accounts, func(acc *Account) bool {
		return acc.codec != nil && (appid == "" || acc.AppID == appid)
	})
}

// refuseNull refuses what only JSON can have: a place in a list with nothing there.
func (a *App) refuseNull() error {
	null := func(list string, i int) error {
		if i < 0 {
			return nil
		}
		return fmt.Errorf("%s: entry %d is null: take it out, or put what it is to be there", list, i+1)
	}
	return cmp.Or(null("platforms", slices.Index(a.Platforms, nil)), null("accounts", slices.Index(a.Accounts, nil)),
		null("clients", slices.Index(a.Clients, nil)))
}

// refuseNameless refuses, by its place, what has no name by which an error could call it.
func (a *App) refuseNameless() error {
	nameless := func(list string, i int, field string) error {
		if i < 0 {
			return nil
		}
		return fmt.Errorf("%s: entry %d: %s is missing", list, i+1, field)
	}
	return cmp.Or(nameless("platforms", slices.IndexFunc(a.Platforms, func(p *Platform) bool { return p.AppID == "" }), "appid"),
		nameless("accounts", slices.IndexFunc(a.Accounts, func(acc *Account) bool { return acc.AppID == "" }), "appid"),
		nameless("clients", slices.IndexFunc(a.Clients, func(c *Client) bool { return c.Name == "" }), "name"))
}

// provisionNames resolves platforms, accounts and clients and refuses what is named twice.
func (a *App) provisionNames(r resolver) error {
	if err := a.refuseNull(); err != nil {
		return err
	}
	if err := a.refuseNameless(); err != nil {
		return err
	}
	a.byAppID = make(map[string]any, len(a.Platforms)+len(a.Accounts))
	for _, p := range a.Platforms {
		if err := p.provision(r.of(zap.String("appid", p.AppID))); err != nil {
			return fmt.Errorf("platform %s: %w", p.AppID, err)
		}
		if _, twice := a.byAppID[p.AppID]; twice {
			return fmt.Errorf("platform %s: this appid is configured twice", p.AppID)
		}
		a.byAppID[p.AppID] = p
		a.platformCodecs = append(a.platformCodecs, candidate{codec: p.codec, platform: p})
	}
	for _, acc := range a.Accounts {
		if err := acc.provision(r.of(zap.String("appid", acc.AppID))); err != nil {
			return fmt.Errorf("account %s: %w", acc.AppID, err)
		}
		if _, twice := a.byAppID[acc.AppID]; twice {
			return fmt.Errorf("account %s: this appid is configured twice", acc.AppID)
		}
		a.byAppID[acc.AppID] = acc
		if acc.mode == modePlain {
			a.logger.Warn("pushes of this account are in 明文模式, in which WeChat signs no text and whoever has seen a push could forge others: choose 安全模式 in its server configuration and give the aes_key",
				zap.String("appid", acc.AppID))
		}
	}
	names := make(map[string]bool, len(a.Clients))
	for _, c := range a.Clients {
		if err := c.provision(r.of(zap.String("client", c.Name))); err != nil {
			return fmt.Errorf("client %s: %w", c.Name, err)
		}
		if names[c.Name] {
			return fmt.Errorf("client %s: this name is configured twice", c.Name)
		}
		names[c.Name] = true
	}
	return refuseSharedKeys(a.Clients)
}

func (a *App) provisionSealer(r resolver) (*crypto.Sealer, error) {
	keys, err := a.resolveSealKeys(r)
	if err != nil || len(keys) == 0 {
		return nil, err
	}
	return crypto.NewSealer(keys...)
}

// resolveSealKeys are the seal keys, newest first; none: records are not sealed.
func (a *App) resolveSealKeys(r resolver) ([][]byte, error) {
	if len(a.SealKeys) == 0 {
		return nil, nil
	}
	texts, err := r.newestFirst("seal_key", a.SealKeys)
	if err != nil {
		return nil, err
	}
	keys := make([][]byte, len(texts))
	for i, text := range texts {
		if keys[i], err = crypto.ParseSealKey(text); err != nil {
			return nil, fmt.Errorf("seal_key %d: %w", i+1, err)
		}
	}
	return keys, nil
}

// provisionLimits fills in the limits that are not given, and refuses those that make no sense.
func (a *App) provisionLimits() error {
	a.MaxAnswers = cmp.Or(a.MaxAnswers, defaultMaxAnswers)
	a.MaxIdentities = cmp.Or(a.MaxIdentities, defaultMaxIdentities)
	if a.MaxAnswers < leastMaxAnswers || a.MaxAnswers > mostMaxAnswers {
		return fmt.Errorf("max_answers: want a number of bytes from 1 MiB to 512 MiB, not %d", a.MaxAnswers)
	}
	if a.MaxIdentities < leastMaxIdentities || a.MaxIdentities > mostMaxIdentities {
		return fmt.Errorf("max_identities: want a number from %d to %d, not %d", leastMaxIdentities, mostMaxIdentities, a.MaxIdentities)
	}
	return nil
}

// provisionEvents finds the events app of this configuration.
func (a *App) provisionEvents(ctx caddy.Context) error {
	v, err := ctx.App("events")
	if err != nil {
		return fmt.Errorf("events: %w", err)
	}
	events, ok := v.(*caddyevents.App)
	if !ok {
		return fmt.Errorf("the app named events is a %T", v)
	}
	a.shared.introduce(a.env, &emitter{ctx: ctx, app: events})
	return nil
}

// spillFolder is where this process keeps what the store of that identity does not take.
func (a *App) spillFolder(r resolver, identity string) (string, error) {
	if a.Spill == "" {
		sum := sha256.Sum256([]byte(identity))
		return filepath.Join(caddy.AppDataDir(), "wechat-spill", hex.EncodeToString(sum[:8])), nil
	}
	folder, err := r.required("spill", a.Spill)
	if err != nil {
		return "", err
	}
	if err := literalFolder(folder); err != nil {
		return "", fmt.Errorf("spill: %w", err)
	}
	return folder, nil
}

func (a *App) provisionWeChat(r resolver) (*tokens.Client, error) {
	api := a.API
	if len(api) == 0 {
		api = []string{tokens.DefaultOrigin}
	}
	log := a.logger
	opts := tokens.ClientOptions{
		Heard: func(host string, err error) { a.health().hosts.note(host, err) },
		Dated: func(date string, at time.Time) { a.health().dated(date, at, log) },
	}
	a.origins = nil
	for _, s := range api {
		v, err := r.required("api", s)
		if err != nil {
			return nil, err
		}
		u, err := tokens.ParseOrigin(v)
		if err != nil {
			return nil, fmt.Errorf("api: %w", err)
		}
		a.origins = append(a.origins, u)
		opts.Origins = append(opts.Origins, u.String())
	}
	open := a.Open
	if open == "" {
		open = defaultOpen
	}
	v, err := r.required("open", open)
	if err != nil {
		return nil, err
	}
	if a.open, err = tokens.ParseOrigin(v); err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	if a.Proxy != "" {
		v, err := r.required("proxy", a.Proxy)
		if err != nil {
			return nil, err
		}
		if a.proxyTo, err = parseProxy(v); err != nil {
			return nil, fmt.Errorf("proxy: %w", err)
		}
		opts.Proxy = directInTheClear(http.ProxyURL(a.proxyTo))
	}
	return tokens.NewClient(opts)
}

// directInTheClear has a proxy for https alone. Plain http goes to this machine only, which needs no proxy, and a proxy
// would get to read the tokens in it.
func directInTheClear(proxy func(*http.Request) (*url.URL, error)) func(*http.Request) (*url.URL, error) {
	return func(r *http.Request) (*url.URL, error) {
		if r.URL.Scheme == "http" {
			return nil, nil
		}
		return proxy(r)
	}
}

// Start puts this generation of the configuration in force for everything that reloads share.
func (a *App) Start() error {
	a.inForce()
	return nil
}

// Stop ends nothing: requests accepted under this generation still need their tokens.
func (*App) Stop() error { return nil }

// Cleanup gives back what Provision took.
func (a *App) Cleanup() error {
	if a.shared == nil {
		return nil
	}
	a.activate.Do(func() {}) // a request that a refused configuration had taken in must not put it in force
	if before := a.before.Swap(nil); before != nil {
		before.heir.CompareAndSwap(a.shared, nil) // which goes on after all
	}
	a.generations.leave(a)
	a.shared.retire(a.env)
	a.shared.unbound(a.env)
	err := releaseShared(a.poolKey)
	a.env.API.Close()
	return err
}

// inForce makes this generation current, once. Start does it, or the first request, whichever comes first: apps
// start in random order, and a site may be served before Start is called here. The admin endpoint, which Caddy starts while
// apps are still being provisioned, must not do it: it asks generations.
func (a *App) inForce() {
	a.activate.Do(func() {
		before := a.before.Load()
		if before != nil {
			a.shared.manager.TakeTickets(before.manager, a.env)
		}
		a.shared.heir.Store(nil) // if it was in force before, and something held it meanwhile
		a.shared.use(a.env)
		a.shared.bound(a.env, pushLimits{int(a.MaxAnswers), a.MaxIdentities})
		if before != nil { // while both serve, one of them renews tokens
			before.heir.Store(a.shared)
		}
		a.generations.enter(a)
	})
}

// wantConfirmFiles has the platforms' verification files fetched ahead. It is for Provision: an environment in force is
// not changed any more.
func (a *App) wantConfirmFiles() { a.env.ConfirmFiles = true }

// manager is what keeps tickets and tokens.
func (a *App) manager() *tokens.Manager { a.inForce(); return a.shared.current().manager }

// lasting asks the manager, and, if that ends meanwhile since a reload has changed the store, the one that has taken its place.
func lasting[T any](a *App, ask func(*tokens.Manager) (T, error)) (T, error) {
	m := a.manager()
	answer, err := ask(m)
	if errors.Is(err, tokens.ErrClosed) {
		if heir := a.manager(); heir != m {
			return ask(heir)
		}
	}
	return answer, err
}

// token is a token for a call.
func (a *App) token(ctx context.Context, k tokens.Key) (tokens.Token, error) {
	return lasting(a, func(m *tokens.Manager) (tokens.Token, error) { return m.Get(ctx, k) })
}

// users keeps who came through OAuth.
func (a *App) users() *tokens.UserTable { return a.shared.current().users }

// authorizations are the starts and ends of authorizations.
func (a *App) authorizations() *authorizations { return a.shared.current().authorizations }

// logins is how many codes and accounts visitors have brought that WeChat does not take.
func (a *App) logins() *visitorLimits { return a.shared.current().logins }

// background runs work that a push began: see shared.
func (a *App) background(work func(context.Context)) { a.backgroundFor(backgroundTimeout, work) }

func (a *App) backgroundFor(timeout time.Duration, work func(context.Context)) {
	a.shared.current().background(timeout, work)
}

func (a *App) metrics() *metrics { return a.shared.metrics }

// health is what was seen of pushes, calls, hosts and the store.
func (a *App) health() *health { return a.shared.health }

// calls are the messages on their way.
func (a *App) calls() *callTable { return a.shared.calls }

// claims are the messages of all nodes.
func (a *App) claims() *claims { return a.shared.claims }

// platform returns the configured platform of that appid, or nil.
func (a *App) platform(appid string) *Platform { p, _ := a.byAppID[appid].(*Platform); return p }

// listedPlatform is platform for an app that was not provisioned.
func (a *App) listedPlatform(appid string) *Platform {
	i := slices.IndexFunc(a.Platforms, func(p *Platform) bool { return p.AppID == appid })
	if i < 0 {
		return nil
	}
	return a.Platforms[i]
}

// account returns the configured plain account of that appid, or nil.
func (a *App) account(appid string) *Account { acc, _ := a.byAppID[appid].(*Account); return acc }

// usesProxy reports whether calls to a host of WeChat's API go through the egress proxy.
func (a *App) usesProxy(host string) bool {
	return a.proxyTo != nil && slices.ContainsFunc(a.apiOrigins(), func(o *url.URL) bool { return o.Host == host && o.Scheme == "https" })
}

// apiOrigins are the origins of WeChat's API, the preferred one first.
func (a *App) apiOrigins() []*url.URL { return a.origins }

// proxyURL is the egress proxy, or nil.
func (a *App) proxyURL() *url.URL { return a.proxyTo }

// openOrigin is where WeChat's authorization pages are.
func (a *App) openOrigin() string { return a.open.String() }

// loadApp gets the app for a handler's Provision.
func loadApp(ctx caddy.Context) (*App, error) {
	app, err := optionalApp(ctx)
	if app == nil && err == nil {
		err = errors.New("needs the global option wechat { … } with the platforms and accounts (in JSON: the app wechat)")
	}
	return app, err
}

// optionalApp is loadApp for what can do without: it returns nil if the app is not configured.
func optionalApp(ctx caddy.Context) (*App, error) {
	v, err := ctx.AppIfConfigured("wechat")
	if errors.Is(err, caddy.ErrNotConfigured) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	app, ok := v.(*App)
	if !ok {
		return nil, fmt.Errorf("the app named wechat is a %T", v)
	}
	return app, nil
}

var (
	_ caddy.App          = (*App)(nil)
	_ caddy.Provisioner  = (*App)(nil)
	_ caddy.CleanerUpper = (*App)(nil)
)
