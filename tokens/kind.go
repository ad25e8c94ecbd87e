package tokens

import (
	"hash/fnv"
	"slices"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// Kind says what a token is for.
type Kind string

// The kinds of token that a Manager keeps.
const (
	// KindComponent is a third-party platform's component_access_token.
	KindComponent Kind = "component"
	// KindAuthorizer is the authorizer_access_token of an account that authorised a platform.
	KindAuthorizer Kind = "authorizer"
	// KindAccount is a plain account's own access_token, from stable_token.
	KindAccount Kind = "account"
	// KindJSAPI is the jsapi_ticket of an account, which signs pages for the JS-SDK.
	KindJSAPI Kind = "jsapi"
	// KindCard is the api_ticket of an account, which signs cards (卡券).
	KindCard Kind = "card"
)

// allKinds are all of them.
var allKinds = [...]Kind{KindComponent, KindAuthorizer, KindAccount, KindJSAPI, KindCard}

// Kinds returns all kinds of token that there are.
func Kinds() []Kind { return slices.Clone(allKinds[:]) }

// Key names one token. It is comparable.
type Key struct {
	Kind     Kind
	Platform string // appid of the platform; empty for KindAccount, and for the tickets of a plain account
	AppID    string // appid of the account; empty for KindComponent
}

// ComponentKey names the component token of a platform.
func ComponentKey(platform string) Key { return Key{Kind: KindComponent, Platform: platform} }

// AuthorizerKey names the token that a platform holds for an authorizer.
func AuthorizerKey(platform, appid string) Key {
	return Key{Kind: KindAuthorizer, Platform: platform, AppID: appid}
}

// AccountKey names the token of a plain account.
func AccountKey(appid string) Key { return Key{Kind: KindAccount, AppID: appid} }

// JSAPIKey names the jsapi_ticket of an account: of an authorizer of platform, or of a plain account where platform is
// empty.
func JSAPIKey(platform, appid string) Key {
	return Key{Kind: KindJSAPI, Platform: platform, AppID: appid}
}

// CardKey names the api_ticket of an account, as JSAPIKey does its jsapi_ticket.
func CardKey(platform, appid string) Key {
	return Key{Kind: KindCard, Platform: platform, AppID: appid}
}

// isJSTicket reports whether the key names a ticket that is fetched with the access token of an account.
func (k Key) isJSTicket() bool { return k.Kind == KindJSAPI || k.Kind == KindCard }

// account is the key of the access token that a JS ticket is fetched with; of any other key it is the key itself.
func (k Key) account() Key {
	switch {
	case !k.isJSTicket():
		return k
	case k.Platform != "":
		return AuthorizerKey(k.Platform, k.AppID)
	default:
		return AccountKey(k.AppID)
	}
}

// owner is the appid that a log line or a metric names for this token.
func (k Key) owner() string {
	if k.Kind == KindComponent {
		return k.Platform
	}
	return k.AppID
}

// Token is a usable access token.
type Token struct {
	Value      secret.String
	ExpiresAt  time.Time
	Generation uint64 // grows by one with each change of the token's record
}

const (
	// componentMargin and authorizerMargin are the remaining life at which a two-hour token turns stale: WeChat
	// recommends renewal at 1 h 50 min.
	componentMargin  = 10 * time.Minute
	authorizerMargin = 10 * time.Minute
	// componentJitter spreads the renewals of platforms.
	componentJitter = 2 * time.Minute
	// authorizerJitter spreads the renewals of accounts that were authorised together.
	authorizerJitter = 5 * time.Minute
	// JSTicketMargin is the remaining life at which a JS ticket turns stale, at the latest. SDKs get tickets with the life
	// that is left and take up to 1500 seconds off it; with nothing left, silenceper/wechat cannot sign.
	JSTicketMargin = 26 * time.Minute
	// jsTicketJitter spreads the renewals of JS tickets. Beyond the margin it goes as far as a quarter of their life.
	jsTicketJitter = 4 * time.Minute
	// accountMargin: stable_token gives the same token until its last five minutes. Asking a little later than that
	// spares the call that would bring nothing.
	accountMargin = 5*time.Minute - 10*time.Second
	// accountJitter spreads the renewals of accounts: they come that much later.
	accountJitter = time.Minute
	// deadSkew is taken off the end of a token's life for clocks and for the way to WeChat.
	deadSkew = 5 * time.Second
	// shortestLife is what a token gets whose expires_in is absent, zero or negative: WeChat issued it, so it is
	// tried, but never in a loop.
	shortestLife = time.Minute
	// longestLife bounds an absurd expires_in. WeChat's tokens live two hours; one that dies earlier than it said
	// is refused by WeChat and renewed then.
	longestLife = 24 * time.Hour
)

// margin is the remaining life at which the token turns stale. It is the same on every node and after a restart.
func (k Key) margin() time.Duration {
	h := fnv.New32a()
	_, _ = h.Write([]byte(k.Platform))
	_, _ = h.Write([]byte(k.AppID))
	spread := time.Duration(h.Sum32())
	switch k.Kind {
	case KindComponent:
		return componentMargin + spread%componentJitter
	case KindAccount:
		return accountMargin - spread%accountJitter
	case KindJSAPI, KindCard:
		return JSTicketMargin + spread%jsTicketJitter
	default:
		return authorizerMargin + spread%authorizerJitter
	}
}

// lifeOf turns an expires_in, in seconds, into a life that can be worked with.
func lifeOf(expiresIn int64) time.Duration {
	switch {
	case expiresIn <= 0:
		return shortestLife
	case expiresIn > int64(longestLife/time.Second):
		return longestLife
	default:
		return time.Duration(expiresIn) * time.Second
	}
}
