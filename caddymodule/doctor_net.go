package caddymodule

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

const (
	// soonExpired is how long before its end a certificate is pointed out; Caddy renews with a third of its life left.
	soonExpired = 7 * 24 * time.Hour
)

// checkRoots: without CA roots no certificate of anybody's can be checked.
func (d *doctor) checkRoots(context.Context) []doctorResult {
	roots, err := d.roots()
	if err == nil && roots != nil && !roots.Equal(x509.NewCertPool()) {
		return []doctorResult{greenOf("", "the system has CA roots", "系统有 CA 根证书")}
	}
	return []doctorResult{redOf("", texts("the system has no CA roots: WeChat's certificate cannot be checked", "系统没有 CA 根证书，无法验证微信的证书"),
		texts("install them: the package ca-certificates, in a container too", "请安装 ca-certificates（容器中也需要）"))}
}

// checkDNS: the names of the config's sites have addresses.
func (d *doctor) checkDNS(ctx context.Context) []doctorResult {
	hosts := siteNames(d.config.visited())
	if len(hosts) == 0 {
		return []doctorResult{skippedOf("", "the config has no site with a public name that WeChat or visitors come to", "配置中没有供微信或访客访问的公网域名站点")}
	}
	return doctorEach(d, ctx, hosts, func(ctx context.Context, host string) doctorResult {
		addrs, err := d.resolve(ctx, host)
		if e, ok := errors.AsType[*net.DNSError](err); err != nil && (!ok || !e.IsNotFound) {
			return redOf(host, following("cannot be looked up here: ", "本机无法查询其解析：", causeOf(err)), remedyResolver)
		}
		if err != nil || len(addrs) == 0 {
			return redOf(host, following("has no address: ", "没有解析结果：", causeOf(err)), texts("add an A record with the gateway's public address", "请添加指向网关公网地址的 A 记录"))
		}
		var found []string
		ipv4, private := false, false
		for _, a := range addrs {
			a = a.Unmap()
			found = append(found, a.String())
			ipv4 = ipv4 || a.Is4()
			private = private || a.IsPrivate() || a.IsLoopback() || a.IsLinkLocalUnicast()
		}
		list := strings.Join(found, ", ")
		switch {
		case private:
			return yellowOf(host, texts("is "+list+" here, which WeChat cannot reach", "在本机解析为 "+list+"，微信无法访问"),
				texts("if that is only the answer inside your network, look from outside as well", "若只是内网解析结果，请从外网再查一次"))
		case !ipv4:
			return yellowOf(host, texts("has IPv6 addresses alone ("+list+")", "只有 IPv6 地址（"+list+"）"), texts("add an A record: WeChat pushes over IPv4", "请添加 A 记录：微信通过 IPv4 推送"))
		}
		return greenOf(host, "is "+list, "解析为 "+list)
	})
}

// causeOf is why a connection, an answer or an address could not be had, where there is an error.
func causeOf(err error) tokens.Text {
	if err == nil {
		return texts("no records", "没有记录")
	}
	en := plainCause(err).Error()
	if e, ok := errors.AsType[*net.DNSError](err); ok {
		if en = e.Err; e.IsNotFound {
			return texts(en, "域名不存在")
		}
	}
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return texts(en, "连接被拒绝")
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return texts(en, "连接被对方断开")
	case isTimeout(err):
		return texts(en, "超时")
	}
	if own := textOf(plainCause(err)); own.EN == en {
		return own
	}
	return texts(en, quotedZH(en))
}

// following is a text behind another.
func following(en, zh string, t tokens.Text) tokens.Text { return texts(en+t.EN, zh+t.ZH) }

// checkTLS: each HTTPS site shows a certificate for its name that WeChat accepts.
func (d *doctor) checkTLS(ctx context.Context) []doctorResult {
	var sites []*doctorSite
	for _, s := range d.config.visited() {
		if s.secure {
			sites = append(sites, s)
		}
	}
	if len(sites) == 0 {
		return []doctorResult{skippedOf("", "the config has no HTTPS site with a public name that WeChat or visitors come to", "配置中没有供微信或访客访问的公网域名 HTTPS 站点")}
	}
	return doctorEach(d, ctx, sites, func(ctx context.Context, s *doctorSite) doctorResult {
		return d.certificate(ctx, s.host, s.port)
	})
}

func (d *doctor) certificate(ctx context.Context, host string, port uint) doctorResult {
	conn, err := d.dialHost(ctx, "tcp", net.JoinHostPort(host, strconv.FormatUint(uint64(port), 10)))
	if err != nil {
		return redOf(host, following(fmt.Sprintf("no connection to port %d: ", port), fmt.Sprintf("无法连接端口 %d：", port), causeOf(err)),
			texts("is the gateway running, and does the firewall let the port in? From inside your own network the public address may not be reachable", "网关是否在运行、防火墙是否放行？内网可能无法访问自己的公网地址"))
	}
	defer func() { _ = conn.Close() }()
	roots, _ := d.roots()
	secured := tls.Client(conn, &tls.Config{ServerName: host, RootCAs: roots, Time: d.now, MinVersion: tls.VersionTLS12})
	if err := secured.HandshakeContext(ctx); err != nil {
		return redOf(host, following("WeChat would not accept it: ", "微信不会接受其证书：", tlsCause(err)),
			texts("let Caddy get a certificate: ports 80 and 443 open, the name pointing here; its log says what failed", "让 Caddy 获取证书：开放 80 与 443 端口、域名指向本机；失败原因见日志"))
	}
	ends := secured.ConnectionState().PeerCertificates[0].NotAfter
	if left := ends.Sub(d.now()); left < soonExpired {
		return yellowOf(host, texts(fmt.Sprintf("its certificate ends in %s", left.Round(time.Hour)), fmt.Sprintf("证书将在 %s 后到期", left.Round(time.Hour))), texts("see in Caddy's log why it is not renewed", "请在 Caddy 日志中查看未续期的原因"))
	}
	return greenOf(host, "its certificate is good until "+ends.UTC().Format(time.DateOnly), "证书有效期至 "+ends.UTC().Format(time.DateOnly))
}

// tlsCause puts the usual errors into plainer words.
func tlsCause(err error) tokens.Text {
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return texts("its certificate is signed by an authority that is not known", "证书由未知的机构签发")
	}
	if e, ok := errors.AsType[x509.CertificateInvalidError](err); ok && e.Reason == x509.Expired {
		return texts("its certificate has expired, or is not valid yet by the clock here", "证书已过期，或按本机时钟尚未生效")
	}
	if _, ok := errors.AsType[x509.HostnameError](err); ok {
		return texts("its certificate is for another name", "证书属于其他域名")
	}
	return causeOf(err)
}

// checkUpstreams: a backend's name must not lead back to the gateway.
func (d *doctor) checkUpstreams(ctx context.Context) []doctorResult {
	if len(d.config.upstreams) == 0 {
		return []doctorResult{skippedOf("", "the config has no reverse_proxy", "配置中没有 reverse_proxy")}
	}
	own, err := d.ownAddresses(ctx)
	if err != nil {
		return []doctorResult{skippedOf("", "the addresses of this machine are not known: "+err.Error(), "无法获知本机地址："+quotedZH(err.Error()))}
	}
	return doctorEach(d, ctx, d.config.upstreams, func(ctx context.Context, upstream string) doctorResult {
		host, port, err := net.SplitHostPort(upstream)
		if err != nil || strings.Contains(upstream, "{") {
			return skippedOf(upstream, "is no host and port that is known beforehand", "无法预先得知其地址")
		}
		addrs, err := d.addressesOf(ctx, host)
		if err != nil || len(addrs) == 0 {
			return redOf(upstream, following("has no address: ", "没有解析结果：", causeOf(err)), texts("mend the name, or the DNS of this machine", "请修正名称或本机 DNS"))
		}
		number, _ := strconv.ParseUint(port, 10, 16)
		for _, a := range addrs {
			a = a.Unmap()
			if (a.IsLoopback() || a.IsUnspecified() || slices.Contains(own, a)) && slices.Contains(d.config.entrances, uint(number)) {
				return redOf(upstream, texts("leads back to the gateway itself ("+a.String()+"): a push would go round for ever", "解析到网关自身（"+a.String()+"）：推送会无限循环"),
					texts("name the backend by an address that is not the gateway's, such as its internal name", "请用后端自己的地址，例如内网名称"))
			}
		}
		conn, err := d.dialAny(ctx, "tcp", addrs, port) // as Caddy does
		if err != nil {
			return yellowOf(upstream, following("takes no connection: ", "无法连接：", causeOf(err)), texts("start the backend, or mend its address", "请启动后端或修正地址"))
		}
		_ = conn.Close()
		return greenOf(upstream, "takes connections, and is not the gateway", "可以连接，且不是网关自身")
	})
}

// addressesOf are those of an upstream's host; a port alone is on this machine.
func (d *doctor) addressesOf(ctx context.Context, host string) ([]netip.Addr, error) {
	if host == "" {
		return []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})}, nil
	}
	if a, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{a}, nil
	}
	return d.resolve(ctx, host)
}

// ownAddresses are those of this machine, and those that its public names lead to.
func (d *doctor) ownAddresses(ctx context.Context) ([]netip.Addr, error) {
	list, err := d.interfaces()
	if err != nil {
		return nil, err
	}
	var own []netip.Addr
	for _, a := range list {
		if prefix, err := netip.ParsePrefix(a.String()); err == nil {
			own = append(own, prefix.Addr().Unmap())
		}
	}
	for _, host := range siteNames(d.config.public()) {
		ctx, cancel := context.WithTimeout(ctx, doctorRequestTimeout)
		addrs, err := d.resolve(ctx, host)
		cancel()
		if err != nil {
			continue // said by checkDNS
		}
		for _, a := range addrs {
			own = append(own, a.Unmap())
		}
	}
	return own, nil
}

// wechatAnswer is what one of WeChat's hosts said.
type wechatAnswer struct {
	origin *url.URL
	*doctorAnswer
	err error
}

// speaks reports whether it was WeChat that answered.
func (a *wechatAnswer) speaks() bool {
	var said struct {
		Code *int64 `json:"errcode"`
	}
	return a.doctorAnswer != nil && json.Unmarshal(a.body, &said) == nil && said.Code != nil
}

// probePath is asked for without a token: WeChat answers 41001, which shows that it is there and costs nothing.
const probePath = "/cgi-bin/getcallbackip"

// askWeChat asks each of WeChat's hosts once, for all checks that want to know.
func (d *doctor) askWeChat(ctx context.Context) []wechatAnswer {
	d.asked.Do(func() {
		client := d.client()
		if proxy := d.config.proxy; proxy != nil {
			transport := client.Transport.(*http.Transport) //nolint:forcetypeassert // our own
			transport.Proxy, transport.DialContext = directInTheClear(http.ProxyURL(proxy)), d.dialHost
		}
		answers := make([]wechatAnswer, len(d.config.origins))
		for i, origin := range d.config.origins {
			answers[i].origin = origin
		}
		doctorEach(d, ctx, indexes(len(answers)), func(ctx context.Context, i int) doctorResult {
			origin := d.config.origins[i]
			a, err := d.ask(ctx, client, http.MethodGet, origin.String()+probePath, "", nil)
			answers[i] = wechatAnswer{origin, a, err}
			return doctorResult{}
		})
		d.mu.Lock()
		defer d.mu.Unlock()
		d.wechat = answers
	})
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.wechat
}

func indexes(n int) []int {
	list := make([]int, n)
	for i := range list {
		list[i] = i
	}
	return list
}

// checkWeChat: each origin of the API answers as WeChat does.
func (d *doctor) checkWeChat(ctx context.Context) []doctorResult {
	if len(d.config.origins) == 0 {
		return []doctorResult{skippedOf("", "no api origin resolves here: see the check placeholders", "api 的地址在此无法解析，参见 placeholders 检查")}
	}
	var results []doctorResult
	for i, a := range d.askWeChat(ctx) {
		way, wayZH := "", ""
		if d.config.proxy != nil && a.origin.Scheme != "http" {
			way, wayZH = " through the proxy "+d.config.proxy.Host, "（经由代理 "+d.config.proxy.Host+"）"
		}
		subject := a.origin.String()
		var r doctorResult
		switch {
		case a.err != nil:
			f := hostFails(a.origin.Host, classOf(a.err), "", way != "")
			r = redOf(subject, following("cannot be reached"+way+": ", "无法访问"+wayZH+"：", tlsCause(a.err)), f.Remedy)
		case a.doctorAnswer == nil:
			r = skippedOf(subject, "there was no time left for it", "没有时间进行此项检查")
		case !a.speaks():
			r = redOf(subject, texts(fmt.Sprintf("answers HTTP %d%s, but not as WeChat does", a.status, way), fmt.Sprintf("返回 HTTP %d%s，但不是微信的回复", a.status, wayZH)),
				texts("something in between answers: a login page, a filter or a wrong proxy", "中间设备拦截了请求：登录页、过滤器或错误的代理"))
		default:
			r = greenOf(subject, fmt.Sprintf("answers%s after %d ms", way, a.took.Milliseconds()), fmt.Sprintf("可以访问%s，%d 毫秒", wayZH, a.took.Milliseconds()))
		}
		if r.Level == doctorRed && i > 0 {
			r.Level = doctorYellow // a backup
		}
		results = append(results, r)
	}
	return results
}

// clockOffset is how far this machine's clock is ahead of WeChat's, and whose answer says so; "": none does.
func (d *doctor) clockOffset(ctx context.Context) (offset time.Duration, host string) {
	for _, a := range d.askWeChat(ctx) {
		if !a.speaks() {
			continue // or it is somebody else's clock
		}
		if theirs, err := http.ParseTime(a.header.Get("Date")); err == nil {
			// Date has whole seconds, and is half of one late on average.
			return a.at.Sub(theirs.Add(time.Second / 2)).Round(time.Second), a.origin.Host
		}
	}
	return 0, ""
}

// checkClock compares this machine's clock with WeChat's.
func (d *doctor) checkClock(ctx context.Context) []doctorResult {
	offset, host := d.clockOffset(ctx)
	if host == "" {
		return []doctorResult{skippedOf("", "no answer of WeChat's says the time", "没有得到微信的时间")}
	}
	text := texts(fmt.Sprintf("is %s ahead of WeChat's", offset), fmt.Sprintf("比微信快 %s", offset))
	if offset < 0 {
		text = texts(fmt.Sprintf("is %s behind WeChat's", -offset), fmt.Sprintf("比微信慢 %s", -offset))
	}
	remedy := texts("set the clock by NTP: timedatectl set-ntp true, or start chrony", "请用 NTP 校时：timedatectl set-ntp true，或启动 chrony")
	switch {
	case offset.Abs() >= defaultTimestampWindow:
		text.EN += ": pushes are refused as stale whenever the gateway cannot learn WeChat's time"
		text.ZH += "：网关无法得知微信的时间时，推送会因过期被拒绝"
		return []doctorResult{redOf(host, text, remedy)}
	case offset.Abs() >= clockDoubt:
		return []doctorResult{yellowOf(host, text, remedy)}
	}
	return []doctorResult{greenOf(host, fmt.Sprintf("agrees with WeChat's (%s)", offset), fmt.Sprintf("与微信一致（%s）", offset))}
}

// explainedOf is an errcode with what it means and what to do.
func explainedOf(subject string, code int64, msg string) doctorResult {
	e, _ := tokens.Explain(code)
	text := texts(fmt.Sprintf("errcode %d: %s", code, e.Meaning.EN), fmt.Sprintf("errcode %d：%s", code, e.Meaning.ZH))
	if ip := tokens.EgressIP(msg); ip != "" {
		text.EN += "; WeChat saw " + ip
		text.ZH += "；微信看到的地址为 " + ip
	}
	if rid := tokens.RequestID(msg); rid != "" {
		text.EN += "; rid " + rid
		text.ZH += "；rid " + rid
	}
	return redOf(subject, text, tokens.Text(e.Remedy))
}
