package tokens

import (
	"cmp"
	"context"
	"log/slog"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// PlatformCredentials are what a third-party platform proves itself with.
type PlatformCredentials struct {
	AppID  string
	Secret secret.String // component_appsecret
}

// AccountCredentials are what a plain account proves itself with.
type AccountCredentials struct {
	AppID  string
	Secret secret.String
}

// Observer hears of refreshes and store operations, for metrics. Its methods are called on the goroutine that did
// the work: they must be quick, and safe for concurrent use.
type Observer interface {
	// TokenRefreshed reports one call to WeChat for a new token. AppID is the platform's for a component token.
	TokenRefreshed(kind Kind, appid string, took time.Duration, err error)
	// TokenAwaited reports callers that begin (1) and cease (-1) to wait for a token that is not at hand.
	TokenAwaited(callers int)
	// RogueRefresh reports a token that WeChat refused long before its end, although no node here renewed it: another
	// system is refreshing the tokens of that appid. Where WeChat refuses the next one too it is not reported: a path may take another
	// kind of token.
	RogueRefresh(kind Kind, appid string)
	// Happened reports what those who run the gateway, and their programs, may want to hear of. Err is why something failed.
	Happened(what Happening, k Key, err error)
	// StoreOperation reports one operation on the store: load, store, delete, list, lock, or share, which is a
	// step of what nodes share for a short time. A lock that somebody else is known to hold is no error, and what failed
	// because its caller left is not reported.
	StoreOperation(op string, took time.Duration, err error)
	// ForwardEnded reports events that are not, or no longer, to be handed on.
	ForwardEnded(how ForwardEnd, events int)
}

// Happening is what Observer hears of a key.
type Happening uint8

// What can happen.
const (
	TicketReceived Happening = iota // WeChat pushed a platform's ticket that is newer than the one held
	TicketOverdue                   // none came for ticketOverdue; said again with each look
	Authorized                      // the account authorised the platform, or authorised it again
	Unauthorized                    // it took that back
	TokenRenewed                    // by a call to WeChat
	TokenFailed                     // WeChat gave none
	TokenRogue                      // see RogueRefresh
	CallFailed                      // WeChat refused another call of the gateway's own
)

// Environment is what one generation of the configuration brings. It must not be changed after Use.
type Environment struct {
	Store     Store
	Sealer    *crypto.Sealer // nil: records are stored unsealed
	API       *Client
	Platforms []PlatformCredentials // in the order of the configuration
	Accounts  []AccountCredentials
	Log       *slog.Logger // nil: nothing is logged
	Observer  Observer     // nil: nobody listens

	// Pages is the origin of WeChat's authorization pages in a simulator. Empty: they are WeChat's own.
	Pages string

	// Spill is a folder of this node alone. What the store does not take is kept there, sealed and synced, until it
	// does. Empty: such records live in memory alone.
	Spill string
	// RosterEvery is how often WeChat's list of a platform's authorizers is compared with the store. Default: a day.
	// Negative: never, not even when the store is empty.
	RosterEvery time.Duration
	// ConfirmFiles: the verification file of each platform's web-view domain is fetched before anybody asks for it.
	ConfirmFiles bool
	// Forward hands on an event that an earlier process, another node or an earlier attempt has not: see ErrNotForwarded. Nil: this
	// configuration hands on none.
	Forward func(context.Context, Forward) error
	// MaxForwards is how many events are kept that wait for Forward. Default: DefaultMaxForwards.
	MaxForwards int
	// ForwardLife is for how long one is kept. Default: DefaultForwardLife.
	ForwardLife time.Duration
	// WeChatAhead is how far WeChat's clock is ahead of this machine's, if that is known. Nil: it never is, and this machine's is right.
	WeChatAhead func() (ahead time.Duration, known bool)
	// Settled reports whether this configuration stays: until then, and no longer than settleLimit, a manager that is used for the
	// first time begins nothing of its own, and none seals records anew with other keys. It still does what it is asked for. Nil: it does.
	Settled func() bool

	serial    uint64       // of the Use that brought it
	opens     *atomic.Bool // a sealed record has opened with its keys
	platforms map[string]PlatformCredentials
	accounts  map[string]AccountCredentials
}

// prepared is a copy with its look-up tables built and its optional parts filled in.
func (e *Environment) prepared() *Environment {
	p := *e
	p.opens = new(atomic.Bool)
	p.platforms = make(map[string]PlatformCredentials, len(e.Platforms))
	for _, c := range e.Platforms {
		p.platforms[c.AppID] = c
	}
	p.accounts = make(map[string]AccountCredentials, len(e.Accounts))
	for _, c := range e.Accounts {
		p.accounts[c.AppID] = c
	}
	if p.Log == nil {
		p.Log = slog.New(slog.DiscardHandler)
	}
	if p.Observer == nil {
		p.Observer = noObserver{}
	}
	if p.RosterEvery == 0 {
		p.RosterEvery = rosterEvery
	}
	p.MaxForwards = cmp.Or(p.MaxForwards, DefaultMaxForwards)
	p.ForwardLife = cmp.Or(p.ForwardLife, DefaultForwardLife)
	return &p
}

// flight names a piece of shared work on a key. Work for one configuration is not shared with callers of another,
// which may have mended what it fails for.
func (e *Environment) flight(what string, k Key) string {
	return e.flightName(what, string(k.Kind)+"\x00"+k.Platform+"\x00"+k.AppID)
}

func (e *Environment) flightName(what, id string) string {
	return what + "\x00" + strconv.FormatUint(e.serial, 10) + "\x00" + id
}

// platform returns the credentials of a configured platform.
func (e *Environment) platform(appid string) (PlatformCredentials, bool) {
	c, ok := e.platforms[appid]
	return c, ok
}

// account returns the credentials of a configured account.
func (e *Environment) account(appid string) (AccountCredentials, bool) {
	c, ok := e.accounts[appid]
	return c, ok
}

type noObserver struct{}

func (noObserver) TokenRefreshed(Kind, string, time.Duration, error) {}
func (noObserver) TokenAwaited(int)                                  {}
func (noObserver) RogueRefresh(Kind, string)                         {}
func (noObserver) Happened(Happening, Key, error)                    {}
func (noObserver) StoreOperation(string, time.Duration, error)       {}
func (noObserver) ForwardEnded(ForwardEnd, int)                      {}

var _ Observer = noObserver{}
