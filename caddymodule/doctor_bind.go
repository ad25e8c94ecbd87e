package caddymodule

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// isInternal reports whether a site is for those who run the gateway, or for their apps, alone.
func (s *doctorSite) isInternal() bool {
	return !s.isVisited() && slices.ContainsFunc(s.handlers, func(h siteHandler) bool { return h.name == "wechat_api" || h.name == "wechat_console" })
}

// isUnbound reports whether who listens there listens on all addresses of the machine.
func isUnbound(bound string) bool {
	addr, err := netip.ParseAddr(bound)
	return bound == "" || err == nil && addr.IsUnspecified()
}

// isInternalHost reports whether a host is this machine or one of its network's, by address.
func isInternalHost(host string) bool {
	addr, err := netip.ParseAddr(host)
	return tokens.IsLoopbackHost(host) || err == nil && (addr.IsPrivate() || addr.IsLinkLocalUnicast())
}

// checkBinds says of internal sites what bind does not do for them. Caddy has a server for each set of addresses: a connection comes to the
// one that listens on its address, or else to the one that listens on all, and each knows the sites alone that listen there.
func (c *doctorConfig) checkBinds() (results []doctorResult) {
	for i := range c.sites {
		s := &c.sites[i]
		if !s.isInternal() {
			continue
		}
		subject := "site " + s.origin()
		if slices.ContainsFunc(s.bound, isUnbound) {
			if isInternalHost(s.host) {
				results = append(results, yellowOf(subject, texts("its address is the Host that it answers, and not where it listens, which is on all addresses: whoever sends this Host gets to it", "站点地址只限定请求的 Host，不限定监听地址：它监听所有地址，任何人带上这个 Host 就能访问"),
					texts(fmt.Sprintf("write http://:%d, with bind 127.0.0.1 ::1, or the internal address, in the site", s.port), fmt.Sprintf("请写作 http://:%d，并在站点内用 bind 127.0.0.1 ::1 或内网地址", s.port))))
			}
			continue
		}
		results = append(results, c.checkBind(s, subject)...)
	}
	return results
}

// checkBind looks for a site with visitors that an internal one has in its way, or in its reach.
func (c *doctorConfig) checkBind(s *doctorSite, subject string) []doctorResult {
	for _, bound := range s.bound {
		at := net.JoinHostPort(bound, strconv.FormatUint(uint64(s.port), 10))
		for i := range c.sites {
			v := &c.sites[i]
			if v.port != s.port || !v.isVisited() || strings.Contains(bound, "{") {
				continue
			}
			if slices.Contains(v.bound, bound) {
				return []doctorResult{yellowOf(subject, texts(fmt.Sprintf("it listens on %s with %s: whoever gets to that one gets to it too, by another Host, for bind does not part them", at, v.origin()), fmt.Sprintf("它与 %s 同在 %s 上监听：能访问后者的人换一个 Host 就能访问它，bind 不能隔开二者", v.origin(), at)),
					texts("give it a port of its own, or bind it to an address at which nothing else listens", "请换用单独的端口，或用 bind 绑定到没有其他站点监听的地址"))}
			}
			if slices.ContainsFunc(v.bound, isUnbound) && !tokens.IsLoopbackHost(bound) {
				return []doctorResult{yellowOf(subject, texts(fmt.Sprintf("all that comes to %s comes to it, and not to %s, which listens on the other addresses of that port: a push that comes there gets an empty 200, which WeChat takes for an answer", at, v.origin()),
					fmt.Sprintf("发往 %s 的请求都到它这里，到不了在该端口其他地址上监听的 %s：从那里来的推送得到空的 200，微信会当作应答", at, v.origin())),
					texts("give it a port of its own; all is well if nothing from outside comes to that address, not even what a router or a balancer sends on", "请换用单独的端口；若外部流量（包括路由器或负载均衡转来的）不会到达该地址则无妨"))}
			}
		}
	}
	return nil
}
