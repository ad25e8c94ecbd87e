package caddymodule

import (
	"encoding/json"
	"fmt"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/certmagic"

	"github.com/caddy-wechat/caddy-wechat/tokens"
	"github.com/caddy-wechat/caddy-wechat/tokens/kvstore"
)

// StoreModule is what a module in the namespace wechat.stores implements.
type StoreModule interface {
	// Store returns the store. It connects on first use, not before.
	Store() tokens.Store
	// Identity tells stores apart: two configurations with the same identity share their state over a reload.
	Identity() string
}

// CaddyStore keeps the gateway's records in Caddy's configured storage, by default the file system, below the
// folder wechat/. It is the default store.
type CaddyStore struct {
	storage certmagic.Storage
}

// CaddyModule returns the Caddy module information.
func (*CaddyStore) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "wechat.stores.caddy", New: func() caddy.Module { return new(CaddyStore) }}
}

// Provision takes the storage of the configuration.
func (s *CaddyStore) Provision(ctx caddy.Context) error {
	s.storage = ctx.Storage()
	return nil
}

// UnmarshalCaddyfile parses `store caddy`, which has no options.
func (s *CaddyStore) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if d.NextArg() {
		return d.ArgErr()
	}
	if d.NextBlock(d.Nesting()) {
		return d.Errf("unknown subdirective '%s': the store 'caddy' has none, it uses the global option storage", d.Val())
	}
	return nil
}

// Store implements StoreModule.
func (s *CaddyStore) Store() tokens.Store { return kvstore.New(s.storage) }

// Identity implements StoreModule. Storages describe themselves; one that does not is told apart by its settings.
func (s *CaddyStore) Identity() string {
	if d, ok := s.storage.(fmt.Stringer); ok {
		return fmt.Sprintf("%T %s", s.storage, d.String())
	}
	settings, _ := json.Marshal(s.storage)
	return fmt.Sprintf("%T %s", s.storage, settings)
}

// storesAlone reports whether the store has nothing in which nodes meet. While there is only its name, that tells it of Caddy's
// storage alone.
func (a *App) storesAlone() bool {
	switch {
	case a.env != nil:
		_, shared := a.env.Store.(tokens.Claims)
		return !shared
	case !a.namesStore():
		return true
	}
	var named struct {
		Module string `json:"module"`
	}
	return json.Unmarshal(a.StoreRaw, &named) == nil && named.Module == "caddy"
}

// namesStore reports whether the configuration says which store there is to be. In JSON null says as little as nothing does.
func (a *App) namesStore() bool { return len(a.StoreRaw) > 0 && string(a.StoreRaw) != "null" }

// storeName is what a store's module is called in the configuration.
func storeName(store StoreModule) string {
	if m, ok := store.(caddy.Module); ok {
		return m.CaddyModule().ID.Name()
	}
	return "" // Caddy loads nothing else
}

func (a *App) provisionStore(ctx caddy.Context) (StoreModule, error) {
	if !a.namesStore() {
		a.StoreRaw = json.RawMessage(`{"module":"caddy"}`)
	}
	var named struct {
		Module string `json:"module"`
	}
	_ = json.Unmarshal(a.StoreRaw, &named) // LoadModule says what is wrong with it, and leaves nothing of it
	a.storeModule = named.Module
	v, err := ctx.LoadModule(a, "StoreRaw")
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	return v.(StoreModule), nil
}

var (
	_ caddy.Provisioner     = (*CaddyStore)(nil)
	_ caddyfile.Unmarshaler = (*CaddyStore)(nil)
	_ StoreModule           = (*CaddyStore)(nil)
)
