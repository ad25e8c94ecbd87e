package caddymodule

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// taker is a handler of ours that passes nothing on of what comes to it, but for wechat_authorize, of which not all is its own that
// begins with wx.
type taker struct {
	siteSpot
	name string
}

// maxTakers bounds how many takers of a server each handler is held against: named routes that invoke each other lead to very many.
const maxTakers = 5000

// takerNames are the handlers that are takers wherever they stand. wechat_message is none: it is meant to have others behind it.
var takerNames = []string{"wechat_event", "wechat_oauth", "wechat_authorize", "wechat_jssdk", "wechat_ready", "wechat_api", "wechat_console"}

// loginHandler is what basic_auth makes. To pushes it is a taker: WeChat logs in nowhere.
const loginHandler = "authentication"

// hiddenHandler is a handler of ours of whose addresses one before it takes some, or all.
type hiddenHandler struct {
	name, taker string
	origin      string
	address     string // that is taken; empty: all, on whatever path
	all         bool
}

// ownAddresses are those of another handler's by which it can be told that they are taken: all that it asks for, but not what is its
// own only if an appid stands there.
func ownAddresses(within []string) []string {
	return slices.DeleteFunc(slices.Clone(within), func(pattern string) bool { return strings.HasSuffix(pattern, "/wx*") })
}

// narrowed is the place of a handler that has a base, with what the handler itself takes of what comes there: a config in JSON may leave the
// choice to it, where a Caddyfile's has a matcher too.
func (s siteSpot) narrowed(name string, raw json.RawMessage) siteSpot {
	h, ok := map[string]interface {
		addresses() caddyhttp.MatchPath
	}{"wechat_oauth": new(OAuth), "wechat_authorize": new(Authorize), "wechat_jssdk": new(JSSDK)}[name]
	if !ok || json.Unmarshal(raw, h) != nil {
		return s
	}
	if s.lost { // which of the addresses asked for it takes cannot be told
		s.choosy = true
		return s
	}
	own := []string(h.addresses())
	if s.within == nil {
		s.within = own
		return s
	}
	var within []string
	for _, pattern := range s.within {
		if coversAll(own, []string{pattern}) {
			within = append(within, pattern)
		}
	}
	for _, pattern := range own {
		if coversAll(s.within, []string{pattern}) && !slices.Contains(within, pattern) {
			within = append(within, pattern)
		}
	}
	if s.choosy = s.choosy || within == nil; within != nil {
		s.within = within
	}
	return s
}

// look notes what of ours comes to a handler too late.
func (r *siteReader) look(name string, at siteSpot) {
	if name != loginHandler && !strings.HasPrefix(name, "wechat_") || at.never || at.behind != "" {
		return
	}
	for _, t := range r.takers {
		if name == loginHandler || t.name == loginHandler && name != "wechat_event" && name != "wechat_message" {
			continue
		}
		for _, host := range at.hosts {
			if r.again && host != "" || !slices.Contains(t.hosts, host) && !slices.Contains(t.hosts, "") || !t.mayGoOn(host, at) {
				continue
			}
			found := hiddenHandler{name: name, taker: t.name, all: true}
			if t.within != nil {
				taken := 0
				for _, own := range ownAddresses(at.within) {
					if !coversAll(ownAddresses(t.within), []string{own}) {
						found.all = false
					} else if taken++; found.address == "" {
						found.address = own
					}
				}
				if taken == 0 {
					continue
				}
			}
			found.origin = r.config.site(strings.ToLower(host), r.port, r.secure(host), r.bound).origin()
			if !slices.Contains(r.config.hidden, found) {
				r.config.hidden = append(r.config.hidden, found)
			}
		}
	}
	if (name == loginHandler || slices.Contains(takerNames, name)) && !at.choosy && len(r.takers) < maxTakers {
		r.takers = append(r.takers, taker{at, name})
	}
}

// isChoosy reports whether a route takes less than what its matchers say of paths and hosts.
func (r *httpRoute) isChoosy() bool {
	return r.matchesMore || len(r.Match) > 1 && slices.ContainsFunc(r.Match, func(set struct {
		Host []string `json:"host"`
		Path []string `json:"path"`
	},
	) bool {
		return len(set.Host) > 0
	})
}

// UnmarshalJSON also notes whether there are matchers that are not looked at.
func (r *httpRoute) UnmarshalJSON(text []byte) error {
	type plain httpRoute
	if err := json.Unmarshal(text, (*plain)(r)); err != nil {
		return err
	}
	var sets struct {
		Match []map[string]json.RawMessage `json:"match"`
	}
	if err := json.Unmarshal(text, &sets); err != nil {
		return err
	}
	r.matchesMore = slices.ContainsFunc(sets.Match, func(set map[string]json.RawMessage) bool {
		for name := range set {
			if name != "host" && name != "path" {
				return true
			}
		}
		return false
	})
	return nil
}

// coversAll reports whether each path that has one of the patterns certainly has one of the others; nil is any path.
func coversAll(others, patterns []string) bool {
	if others == nil {
		return true
	}
	return patterns != nil && !slices.ContainsFunc(patterns, func(pattern string) bool {
		return !slices.ContainsFunc(others, func(other string) bool {
			fixed, rest := fixedPart(other), strings.IndexAny(other, `*{%?[\`)
			if rest < 0 {
				return fixed == strings.ToLower(pattern)
			}
			return other[rest:] == "*" && strings.HasPrefix(fixedPart(pattern), fixed)
		})
	})
}

// checkHidden says which handlers of ours have addresses that another one takes before them.
func (c *doctorConfig) checkHidden() (results []doctorResult) {
	for _, h := range c.hidden {
		subject := h.name + " of " + h.origin
		remedy := texts("give each a path of its own: no base below another's, and a path behind a directive that would take all, as in: wechat_event /wx/event",
			"请给各指令互不重叠的路径：一个路径不要位于另一个之下；会应答所有请求的指令要写上路径，例如 wechat_event /wx/event")
		switch {
		case h.taker == loginHandler:
			results = append(results, redOf(subject, texts("a login comes before it, and WeChat has none: pushes get 401", "前面有登录认证，而微信不会登录：推送会得到 401"),
				texts("let the login take the paths alone that need it, as in: basic_auth /admin/* { … }", "登录只用于需要它的路径，例如 basic_auth /admin/* { … }")))
		case h.name == "wechat_message" && h.taker == "wechat_event":
			results = append(results, yellowOf(subject, texts("messages come to wechat_event first, which hands on those alone whose account it can tell, and complains of each",
				"消息先到 wechat_event，它只能转交认得出账号的消息，并逐一记入日志"), remedy))
		case h.address == "":
			results = append(results, redOf(subject, texts("stands behind "+h.taker+" without a path, which answers everything: nothing gets to it", "位于没有路径的 "+h.taker+" 之后，而后者会应答所有请求：请求到不了它"), remedy))
		case h.all:
			results = append(results, redOf(subject, texts(fmt.Sprintf("%s is taken by %s, which comes before it: nothing gets to it", h.address, h.taker), fmt.Sprintf("%s 由位于它之前的 %s 应答：请求到不了它", h.address, h.taker)), remedy))
		default:
			results = append(results, redOf(subject, texts(fmt.Sprintf("%s is taken by %s, which comes before it", h.address, h.taker), fmt.Sprintf("%s 由位于它之前的 %s 应答", h.address, h.taker)), remedy))
		}
	}
	return results
}

// checkReach looks for what cannot be right with names, ports and accounts, whatever the network says.
func (c *doctorConfig) checkReach() (results []doctorResult) {
	names := make(map[string]bool)
	for i := range c.sites {
		s := &c.sites[i]
		for _, h := range s.handlers {
			names[h.name] = true
			if i := slices.IndexFunc(h.patterns, func(pattern string) bool { return strings.ContainsFunc(pattern, isMistyped) }); i >= 0 && !slices.ContainsFunc(results, func(r doctorResult) bool { return r.Subject == "path "+h.patterns[i] }) {
				results = append(results, yellowOf("path "+h.patterns[i], texts("it has a semicolon or punctuation of an input method in it, which would have to be in what is asked for", "含有分号或全角标点，请求的路径也必须含有它才能匹配"),
					texts("take it out: a line of a Caddyfile ends without one", "请去掉：Caddyfile 的行尾不写分号")))
			}
			if h.name == "wechat_message" && h.behind == "" {
				results = append(results, c.checkAccounts(s, h)...)
			}
		}
		if odd := strings.IndexFunc(s.host, isMistyped); odd >= 0 {
			char, _ := utf8.DecodeRuneInString(s.host[odd:])
			results = append(results, redOf("site "+s.host, texts(fmt.Sprintf("no host has '%c' in its name: punctuation of an input method, or of another server's config?", char), fmt.Sprintf("域名里不会有“%c”：是输入法的全角标点，或其他服务器的写法吗？", char)),
				texts("write it in ASCII, with a blank before {, and commas with one behind them", "请改用半角字符，{ 前和逗号后各留一个空格")))
		}
		if s.isPublic() && s.takesPushes() && !c.pushedTo(s.host) {
			results = append(results, yellowOf("site "+s.origin(), texts(fmt.Sprintf("it takes pushes on port %d, and WeChat pushes to ports 80 and 443 alone", s.port), fmt.Sprintf("在 %d 端口接收推送，而微信只向 80 和 443 端口推送", s.port)),
				texts("leave the port out of the site's address, unless something leads one of the two to it", "站点地址不要写端口；若已从这两个端口之一转发过来则无妨")))
		}
	}
	if len(c.public()) == 0 || names["wechat_message"] { // it takes events too
		return results
	}
	if len(c.app.Platforms) > 0 && !names["wechat_event"] {
		results = append(results, yellowOf("wechat_event", texts("no site has it: no ticket comes to this gateway, and without tickets a platform has no tokens", "没有站点使用它：网关收不到 ticket，平台就没有令牌"),
			texts("add wechat_event /wx/event to the site of 授权事件接收URL, unless other nodes with the same store have it", "在授权事件接收URL 的站点里添加 wechat_event /wx/event；共用存储的其他节点已有则无妨")))
	}
	for _, acc := range c.app.Accounts {
		if acc != nil && len(acc.Tokens) > 0 {
			results = append(results, yellowOf("account "+acc.AppID, texts("it has a token, and no site has wechat_message: its pushes are not taken", "填写了 token，但没有站点使用 wechat_message：其推送无人接收"),
				texts("add wechat_message before reverse_proxy, or take the token out if it gets no pushes; nothing is to be done if other nodes with the same config take them",
					"在 reverse_proxy 前添加 wechat_message；不接收推送则删去 token；若由使用同一配置的其他节点接收则无妨")))
		}
	}
	return results
}

// takesPushes reports whether a site has one of the handlers that pushes are for.
func (s *doctorSite) takesPushes() bool {
	return slices.ContainsFunc(s.handlers, func(h siteHandler) bool { return h.name == "wechat_event" || h.name == "wechat_message" })
}

// pushedTo reports whether a host takes pushes on a port that WeChat pushes to, or that Caddy is told such a port leads to.
func (c *doctorConfig) pushedTo(host string) bool {
	return slices.ContainsFunc(c.sites, func(s doctorSite) bool {
		return s.host == host && s.takesPushes() && (s.port == 80 || s.port == 443 || slices.Contains(c.own, s.port))
	})
}

// checkAccounts says of a wechat_message that all it names are accounts from which no push can be taken.
func (c *doctorConfig) checkAccounts(s *doctorSite, h siteHandler) []doctorResult {
	var fields struct {
		AppID string `json:"appid"`
	}
	if len(c.app.Platforms) > 0 || json.Unmarshal(h.fields, &fields) != nil {
		return nil
	}
	named := []string{fields.AppID}
	if fields.AppID == "" {
		if named = nil; len(h.only) == 0 {
			return nil
		}
		for _, path := range h.only {
			segments := strings.Split(path, "/")
			slices.Reverse(segments)
			i := slices.IndexFunc(segments, isAppID)
			if i < 0 {
				return nil // which is said elsewhere
			}
			named = append(named, segments[i])
		}
	}
	if slices.ContainsFunc(named, func(appid string) bool {
		return slices.ContainsFunc(c.app.Accounts, func(acc *Account) bool { return acc != nil && acc.AppID == appid && len(acc.Tokens) > 0 })
	}) {
		return nil
	}
	return []doctorResult{redOf("wechat_message of "+s.origin(), texts(fmt.Sprintf("it is for %s, and the global option wechat has no account of that appid with a token: each push is refused", named[0]),
		fmt.Sprintf("它用于 %s，但全局选项 wechat 中没有带 token 的这个账号：所有推送都会被拒绝", named[0])),
		texts("compare the appid, and give the account its token and aes_key", "请核对 appid，并为该账号填写 token 与 aes_key"))}
}

// hostMarks are the marks that names of hosts have in some scripts: RFC 5892, appendix A, and the middle dot of Chinese names.
const hostMarks = "\u00b7\u0375\u05f3\u05f4\u200c\u200d\u30fb"

// isMistyped reports whether a character hardly stands in a host's name or a path on purpose: letters of other scripts may, and so may
// emoji.
func isMistyped(c rune) bool {
	return c > unicode.MaxASCII && !unicode.In(c, unicode.L, unicode.M, unicode.N, unicode.So, unicode.Sk) && !strings.ContainsRune(hostMarks, c) || c == ';'
}

// wayIn is how Caddy tells of what it was about when a module failed.
var wayIn = regexp.MustCompile(`^(?:(?:loading|provision|setting up|server|route|position) .*: )?provision (?:http\.handlers\.)?(\w+: )`)

// withoutWay is what Caddy says of a config that it does not load, from the module on that failed: what comes before differs from
// run to run, and hides what is to be mended.
func withoutWay(text string) string { return wayIn.ReplaceAllString(text, "$1") }
