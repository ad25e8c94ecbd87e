package wxsim

import (
	"context"
	"crypto/x509"
	"net"
	"time"
)

// Config says what exists in the simulated WeChat and how it behaves. The zero value of every
// field is usable.
type Config struct {
	// Platforms are the third-party platforms (第三方平台).
	Platforms []Platform
	// Accounts are accounts with a secret of their own, used without a platform.
	Accounts []Account
	// Authorizers are accounts that may authorize a platform; none has done so yet. An appid
	// first named in [Server.Authorize] is added with plausible values.
	Authorizers []Authorizer
	// OAuthHosts are the domains allowed in redirect_uri (网页授权域名, 公众号开发域名). WeChat allows
	// no port; an entry with a port stands for exactly that host and port. Empty: none is allowed.
	OAuthHosts []string
	// Hosts are more names for the certificate of [Server.StartTLS]; WeChat's own hosts,
	// localhost, 127.0.0.1 and ::1 are always in it.
	Hosts []string
	// Lives are the lives of what is issued.
	Lives Lives
	// Pace is the timing of pushes.
	Pace Pace
	// Faults is the hostility; its zero value is hostile.
	Faults Faults
	// Seed makes the hostility repeatable.
	Seed uint64
	// Quotas limits how often an API path may be called for one appid (errcode 45009), until
	// clear_quota. Default: no limits but WeChat's on forced stable tokens.
	Quotas map[string]int
	// TicketEvery pushes a ticket to each platform with an event URL at once and then in this
	// interval, and at once after api_start_push_ticket. Default: only [Server.PushTicket] does.
	TicketEvery time.Duration
	// PushRoots verifies the certificates of https push URLs. Default: the system's roots.
	PushRoots *x509.CertPool
	// PushDial connects to push URLs, so that a public name can lead to a local port.
	// Default: the system's dialer.
	PushDial func(ctx context.Context, network, address string) (net.Conn, error)
	// PushApart gives each attempt of a push a connection of its own, so that PushDial decides where each goes. The
	// values of the context that a push is made with are in PushDial's.
	PushApart bool
	// Ask has WeChat's pages ask whoever opens them in a browser, who agrees or refuses by a click. Default: a browser is
	// sent on at once, as one whose owner agrees. [Server.Visit] and [Server.FollowAuthorizationLink] ask nobody.
	Ask bool
	// JournalSize is the number of entries that the journal keeps. Default 10000.
	JournalSize int
	// Observe is called with each journal entry, in order, while it is being written down; it
	// must be quick and must not call the server.
	Observe func(Entry)
}

// Platform is a third-party platform (component).
type Platform struct {
	AppID, Secret string
	Token, AESKey string // push credentials: 消息校验Token, 43 characters of 消息加解密Key
	EventURL      string // 授权事件接收URL
	TestEventURL  string // event URL of the test configuration; tickets go to it too, when set
	MessageURL    string // 消息与事件接收URL; $APPID$ stands for the authorizer's appid
	// AuthorizeHost is the domain of the page with the authorization link and of its redirect_uri (授权发起页域名). WeChat
	// allows no port; here one stands for exactly that host and port. Default: no link is followed.
	AuthorizeHost string
}

// Account is an official account or mini program used with its own secret.
type Account struct {
	AppID, OriginalID string // wx…, gh_…; OriginalID default: made up
	Secret            string
	Token, AESKey     string
	Mode              Mode   // default: safe with an AESKey, else plain
	Format            Format // default: XML
	MessageURL        string
	NickName          string
	MiniProgram       bool
	FuncInfo          []int // should it also authorize a platform; default as for Authorizer
}

// Authorizer is an account that may authorize a platform.
type Authorizer struct {
	AppID, OriginalID string // OriginalID default: made up
	NickName          string
	FuncInfo          []int // permission set ids; default: messages, users, web service … of its sort
	MiniProgram       bool
}

// Mode is the encryption mode of an account's pushes.
type Mode string

// The three modes of the console: 明文模式, 兼容模式, 安全模式.
const (
	ModePlain  Mode = "plain"
	ModeCompat Mode = "compat"
	ModeSafe   Mode = "safe"
)

// Format is the format of an account's pushes and replies.
type Format string

// The two formats.
const (
	FormatXML  Format = "xml"
	FormatJSON Format = "json"
)

// Lives are lifetimes. A zero life means WeChat's usual one, named in each comment. A zero
// overlap means that the old token dies at once, the harshest reading of the protocol; only
// StableOverlap has a default.
type Lives struct {
	Component   time.Duration // component_access_token: 2 h
	Authorizer  time.Duration // authorizer_access_token: 2 h
	Account     time.Duration // /cgi-bin/token: 2 h
	Stable      time.Duration // /cgi-bin/stable_token: 2 h
	JSTicket    time.Duration // jsapi and card tickets: 2 h
	Ticket      time.Duration // component_verify_ticket: 12 h
	PreAuthCode time.Duration // 30 min
	AuthCode    time.Duration // 1 h
	UserCode    time.Duration // web authorization and mini-program login codes: 5 min
	UserToken   time.Duration // a user's access_token: 2 h
	UserRefresh time.Duration // a user's refresh_token: 30 days

	ComponentOverlap  time.Duration // old component token after a new one
	AuthorizerOverlap time.Duration // old authorizer token after a new one
	AccountOverlap    time.Duration // old /cgi-bin/token token after a new one
	RefreshOverlap    time.Duration // old authorizer_refresh_token after a changed one
	StableOverlap     time.Duration // last part of a stable token's life, in which a new one is given and both work: life/24
	ForceGap          time.Duration // stable_token with force_refresh sooner than this changes nothing: 30 s
}

const (
	tokenLife       = 2 * time.Hour
	ticketLife      = 12 * time.Hour
	preAuthCodeLife = 30 * time.Minute
	authCodeLife    = time.Hour
	userCodeLife    = 5 * time.Minute
	userRefreshLife = 30 * 24 * time.Hour
	forceGap        = 30 * time.Second
	stableShare     = 24 // StableOverlap is this part of the life: 5 min of 2 h
)

func (l Lives) withDefaults() Lives {
	for _, d := range []struct {
		p   *time.Duration
		def time.Duration
	}{
		{&l.Component, tokenLife}, {&l.Authorizer, tokenLife}, {&l.Account, tokenLife}, {&l.Stable, tokenLife},
		{&l.JSTicket, tokenLife}, {&l.Ticket, ticketLife}, {&l.PreAuthCode, preAuthCodeLife}, {&l.AuthCode, authCodeLife},
		{&l.UserCode, userCodeLife}, {&l.UserToken, tokenLife}, {&l.UserRefresh, userRefreshLife}, {&l.ForceGap, forceGap},
	} {
		if *d.p <= 0 {
			*d.p = d.def
		}
	}
	if l.StableOverlap <= 0 {
		l.StableOverlap = l.Stable / stableShare
	}
	return l
}

// Pace is the timing of pushes. Scale Timeout down to have a test finish sooner; a gateway
// that counts in seconds needs to be told as well.
type Pace struct {
	Timeout  time.Duration // WeChat drops the connection of an unanswered push after this: 5 s
	Attempts int           // how often a push is sent in all: 3
	Interval time.Duration // pause between two attempts: none
	// RetryWrong also repeats a message that was answered wrongly; by default only an
	// unanswered message is pushed again. Events are always repeated until `success`.
	RetryWrong bool
	// ReleaseWait is how long the release check waits for the customer-service message: 5 s.
	ReleaseWait time.Duration
	// ReleaseWatch is for how long it then looks out for a second one: 300 ms.
	ReleaseWatch time.Duration
}

const (
	pushTimeout  = 5 * time.Second
	pushAttempts = 3
	releaseWait  = 5 * time.Second
	releaseWatch = 300 * time.Millisecond
)

func (p Pace) withDefaults() Pace {
	if p.Timeout <= 0 {
		p.Timeout = pushTimeout
	}
	if p.Attempts <= 0 {
		p.Attempts = pushAttempts
	}
	if p.ReleaseWait <= 0 {
		p.ReleaseWait = releaseWait
	}
	if p.ReleaseWatch <= 0 {
		p.ReleaseWatch = releaseWatch
	}
	return p
}

var (
	officialSets = []int{1, 2, 3, 4, 7, 11, 15} // messages … custom menu
	miniSets     = []int{17, 18, 19, 20, 21, 30}
)

func defaultSets(given []int, mini bool) []int {
	switch {
	case len(given) > 0:
		return given
	case mini:
		return miniSets
	default:
		return officialSets
	}
}
