package caddymodule

import (
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"golang.org/x/time/rate"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

const (
	maxVisitors   = 10_000 // remembered; one more drops who was counted least lately
	visitorV6Bits = 64     // what one visitor has of IPv6, unless it stands for an address of IPv4
)

// allowance is how often each visitor may do something: so many times at once, and then once every so often.
type allowance struct {
	what   string // tells apart what is counted
	atOnce int
	every  time.Duration
	// debt is how far what turns out afterwards to count can go beyond that.
	debt int
}

// memory is how long a visitor is remembered: who has been away for that has all of the allowance again.
func (a allowance) memory() time.Duration { return time.Duration(a.atOnce+a.debt) * a.every }

// visitorLimits counts what visitors do. It is bounded and lives in memory.
type visitorLimits struct {
	limiters *tokens.Window[visitorKey, *rate.Limiter]
}

type visitorKey struct {
	visitor netip.Prefix
	of      allowance
}

func newVisitorLimits() *visitorLimits {
	return &visitorLimits{tokens.NewWindow[visitorKey, *rate.Limiter](time.Hour, maxVisitors)} // each is set with its own time
}

func (l *visitorLimits) close() { l.limiters.Close() }

// take counts one, if there may be one now.
func (l *visitorLimits) take(visitor netip.Prefix, a allowance) bool {
	return l.limiter(visitor, a).Allow()
}

// charge counts one that has been. Several that went on at once make a debt, up to the allowance's.
func (l *visitorLimits) charge(visitor netip.Prefix, a allowance) {
	if limiter := l.limiter(visitor, a); limiter.Tokens() > -float64(a.debt) {
		limiter.Reserve()
	}
}

// wait is how long it is until there may be one more; 0: now. It counts nothing, and remembers nobody.
func (l *visitorLimits) wait(visitor netip.Prefix, a allowance) time.Duration {
	limiter, known := l.limiters.Get(visitorKey{visitor, a})
	if !known {
		return 0
	}
	return time.Duration(max(0, 1-limiter.Tokens()) * float64(a.every))
}

func (l *visitorLimits) limiter(visitor netip.Prefix, a allowance) *rate.Limiter {
	key := visitorKey{visitor, a}
	limiter, _ := l.limiters.GetOrSet(key, func() *rate.Limiter { return rate.NewLimiter(rate.Every(a.every), a.atOnce) })
	l.limiters.Set(key, limiter, a.memory()) // a value's life does not begin anew when it is read
	return limiter
}

// sharedAddresses are those between a provider and its customers (RFC 6598), from which some clouds' balancers come.
var sharedAddresses = netip.MustParsePrefix("100.64.0.0/10")

// oneVisitorOf is the visitor's network, or the zero prefix if that cannot be told. A private address that nobody told us is rather that
// of a proxy which trusted_proxies does not name, and then all visitors'.
func oneVisitorOf(r *http.Request) netip.Prefix {
	addr, peer := visitorAddr(r), peerAddr(r)
	told := addr != peer
	addr, _ = embedded(addr)
	if !told && (!addr.IsGlobalUnicast() || addr.IsPrivate() || sharedAddresses.Contains(addr)) {
		return netip.Prefix{}
	}
	return network(addr)
}

// visitorOf is the visitor's network. Requests without a readable address count as one visitor.
func visitorOf(r *http.Request) netip.Prefix { return network(visitorAddr(r)) }

// visitorAddr is the visitor's address, by what a trusted proxy says, if there is one.
func visitorAddr(r *http.Request) netip.Addr { return plainAddr(visitorText(r)) }

// visitorText is that as Caddy's access log has it: of a Unix socket there is none, or "@".
func visitorText(r *http.Request) string {
	if text, _ := caddyhttp.GetVar(r.Context(), caddyhttp.ClientIPVarKey).(string); text != "" {
		return text
	}
	return peerText(r)
}

// peerAddr is the address at the other end of the connection.
func peerAddr(r *http.Request) netip.Addr { return plainAddr(peerText(r)) }

func peerText(r *http.Request) string {
	text, _, _ := net.SplitHostPort(r.RemoteAddr)
	return text
}

// plainAddr is not valid if the text is no address.
func plainAddr(text string) netip.Addr {
	addr, _ := netip.ParseAddr(text)
	return addr.Unmap().WithZone("")
}

// Networks of IPv6 in which visitors of IPv4 are, all of them or many in one prefix of visitorV6Bits.
var (
	nat64      = netip.MustParsePrefix("64:ff9b::/96")   // RFC 6052
	localNAT64 = netip.MustParsePrefix("64:ff9b:1::/48") // RFC 8215: where in it the address stands, each network decides for itself
	teredo     = netip.MustParsePrefix("2001::/32")      // RFC 4380
	sixToFour  = netip.MustParsePrefix("2002::/16")      // RFC 3056: and each address of IPv4 has very many prefixes
)

// embedded is the visitor's address of IPv4 where an address of IPv6 stands for one, or else the address as it is. Whole says that all of
// its bits tell visitors apart.
func embedded(addr netip.Addr) (_ netip.Addr, whole bool) {
	if !addr.Is6() {
		return addr, true
	}
	b := addr.As16()
	switch {
	case nat64.Contains(addr):
		return netip.AddrFrom4([4]byte(b[12:])), true
	case localNAT64.Contains(addr):
		return addr, true
	case teredo.Contains(addr):
		return netip.AddrFrom4([4]byte{^b[12], ^b[13], ^b[14], ^b[15]}), true
	case sixToFour.Contains(addr):
		return netip.AddrFrom4([4]byte(b[2:6])), true
	}
	return addr, false
}

func network(addr netip.Addr) netip.Prefix {
	if !addr.IsValid() {
		return netip.Prefix{}
	}
	addr, whole := embedded(addr)
	bits := addr.BitLen()
	if !whole {
		bits = visitorV6Bits
	}
	prefix, _ := addr.Prefix(bits) // the number of bits is right
	return prefix
}
