package caddymodule

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

const (
	// maxDoctorAccounts is how many accounts that authorised a platform are looked at one by one.
	maxDoctorAccounts = 20
	// ticketDoubt is how old a ticket may be before it is pointed out: WeChat pushes one each ten minutes, and one is good
	// for twelve hours.
	ticketDoubt = 30 * time.Minute
)

// notAskedError is why the running gateway was not asked, or did not answer.
type notAskedError struct {
	why     tokens.Text
	trouble bool // something there is to be mended
}

func (e *notAskedError) Error() string { return e.why.EN }

// askAdmin asks the running gateway's admin endpoint, and reads its JSON.
func (d *doctor) askAdmin(ctx context.Context, path string, into any) *notAskedError {
	switch {
	case d.adminOff:
		return &notAskedError{why: texts("the config has admin off: a gateway that runs with it cannot be asked", "配置中 admin 为 off，无法询问运行中的网关")}
	case d.admin == "":
		return &notAskedError{why: texts("there is no admin endpoint", "没有 admin 端点")}
	}
	p := &askParams{address: d.admin, dial: d.dial}
	at, err := p.endpoint()
	if err != nil {
		why := textOf(err)
		return &notAskedError{texts(why.EN, "admin 端点的地址有误："+why.ZH), true}
	}
	ctx, cancel := context.WithTimeout(ctx, doctorRequestTimeout)
	defer cancel()
	status, body, err := p.exchange(ctx, at, http.MethodGet, path)
	_, nobody := errors.AsType[nobodyListensError](err)
	switch {
	case nobody:
		return &notAskedError{why: texts("no gateway is running with this admin endpoint", "该 admin 端点上没有运行中的网关")}
	case err != nil:
		why := textOf(err)
		return &notAskedError{texts(why.EN, "无法询问 admin 端点："+why.ZH), true}
	case status == http.StatusNotFound:
		name, _, _ := strings.Cut(path, "?")
		return &notAskedError{why: texts("the running gateway has no "+name, "运行中的网关没有 "+name)}
	case status != http.StatusOK:
		return &notAskedError{texts(fmt.Sprintf("the admin endpoint answers HTTP %d", status), fmt.Sprintf("admin 端点返回 HTTP %d", status)), true}
	case json.Unmarshal(body, into) != nil:
		return &notAskedError{texts("the admin endpoint answers what is not understood", "admin 端点的回复无法识别"), true}
	}
	return nil
}

// skippedFor is why the running gateway could not be asked.
func (d *doctor) skippedFor(err *notAskedError) doctorResult {
	return skippedOf(d.admin, err.why.EN, err.why.ZH)
}

// runtimeFiles are the names of the verification files that were added at run time.
func (d *doctor) runtimeFiles(ctx context.Context) (names []string) {
	var list struct {
		Files []struct{ Name string } `json:"files"`
		Auto  []struct{ Name string } `json:"auto"`
	}
	if d.askAdmin(ctx, "/wechat/verify", &list) != nil {
		return nil
	}
	for _, f := range slices.Concat(list.Files, list.Auto) {
		names = append(names, f.Name)
	}
	return names
}

// gatewayStatus is what of GET /wechat/status is looked at.
type gatewayStatus struct {
	Level     string           `json:"level"`
	Findings  []gatewayFinding `json:"findings"`
	Platforms []struct {
		AppID  string `json:"appid"`
		Ticket struct {
			Received   *time.Time `json:"received"`
			AgeSeconds *float64   `json:"age_seconds"`
		} `json:"ticket"`
	} `json:"platforms"`
	Hosts []struct {
		EgressIP string `json:"egress_ip"`
	} `json:"hosts"`
}

// gatewayFinding is something that the gateway finds wrong itself.
type gatewayFinding struct {
	Level   string      `json:"level"`
	Code    string      `json:"code"`
	Subject string      `json:"subject"`
	Text    tokens.Text `json:"text"`
	Remedy  tokens.Text `json:"remedy"`
}

// checkGateway asks the running gateway how it is.
func (d *doctor) checkGateway(ctx context.Context) []doctorResult {
	var s gatewayStatus
	if err := d.askAdmin(ctx, "/wechat/status", &s); err != nil {
		if err.trouble {
			return []doctorResult{yellowOf(d.admin, err.why,
				texts("run doctor as the gateway's user, and give --address if its admin endpoint is elsewhere", "请以网关的用户运行 doctor；admin 端点若在别处，用 --address 指定"))}
		}
		return []doctorResult{d.skippedFor(err)}
	}
	var results []doctorResult
	for _, f := range s.Findings {
		subject := strings.TrimSpace(f.Subject + " " + f.Code)
		switch f.Level {
		case doctorRed:
			results = append(results, redOf(subject, f.Text, f.Remedy))
		case doctorYellow:
			results = append(results, yellowOf(subject, f.Text, f.Remedy))
		}
	}
	for _, p := range s.Platforms {
		subject := "platform " + p.AppID
		if slices.ContainsFunc(s.Findings, func(f gatewayFinding) bool {
			return f.Subject == subject && strings.Contains(f.Code, "ticket")
		}) {
			continue
		}
		remedy := texts("compare 授权事件接收URL in the platform's console with the site, see the check push, then press its button to push the ticket again", "对照站点核对平台后台的授权事件接收URL，参见 push 检查，然后在平台后台点击重新推送票据")
		switch {
		case p.Ticket.AgeSeconds == nil && p.Ticket.Received == nil:
			results = append(results, redOf(subject, texts("no ticket has come yet", "尚未收到票据"), remedy))
		case p.Ticket.AgeSeconds != nil && *p.Ticket.AgeSeconds > ticketDoubt.Seconds():
			age := (time.Duration(*p.Ticket.AgeSeconds) * time.Second).Round(time.Minute)
			results = append(results, yellowOf(subject, texts("the ticket is "+age.String()+" old; WeChat pushes one every ten minutes", "票据已有 "+age.String()+"；微信每十分钟推送一次"), remedy))
		default:
			results = append(results, greenOf(subject, "its ticket is fresh", "最近收到过票据"))
		}
	}
	if len(results) == 0 {
		results = append(results, greenOf(d.admin, "the gateway is running and finds nothing wrong", "网关正在运行，未发现问题"))
	}
	return results
}

// checkAccounts looks at the accounts that authorised the platforms: their permission sets and tokens.
func (d *doctor) checkAccounts(ctx context.Context) []doctorResult {
	type entry struct {
		Platform string `json:"platform"`
		AppID    string `json:"appid"`
		Name     string `json:"name"`
		State    string `json:"state"`
	}
	var page struct {
		Authorizers []entry `json:"authorizers"`
		Next        string  `json:"next"`
	}
	if err := d.askAdmin(ctx, fmt.Sprintf("/wechat/authorizers?limit=%d", maxDoctorAccounts), &page); err != nil {
		return []doctorResult{d.skippedFor(err)}
	}
	if len(page.Authorizers) == 0 {
		return []doctorResult{skippedOf("", "no account has authorised a platform", "没有授权方")}
	}
	results := doctorEach(d, ctx, page.Authorizers, func(ctx context.Context, e entry) doctorResult {
		subject := "authorizer " + e.AppID
		if e.State == "revoked" {
			return yellowOf(subject, texts("it has revoked its authorization", "已取消授权"), texts("have its owner authorise the platform again, if it is still wanted", "如仍需要，请其管理员重新授权"))
		}
		var detail authorizerDetail
		if err := d.askAdmin(ctx, "/wechat/authorizers/"+url.PathEscape(e.AppID)+"?platform="+url.QueryEscape(e.Platform), &detail); err != nil {
			r := d.skippedFor(err)
			r.Subject = subject
			return r
		}
		if e := detail.Token.Error; e != nil {
			return redOf(subject, texts("its token cannot be had: "+e.EN, "无法获取其 token："+e.ZH), texts("see `caddy wechat explain` for the code, and the log for the rest", "错误码见 `caddy wechat explain`，其余见日志"))
		}
		if detail.Type == nil {
			return skippedOf(subject, "WeChat does not say now what kind of account it is", "微信暂未返回账号类型")
		}
		var missing []int
		for _, id := range tokens.PermissionSetsInUse(detail.Type.MiniProgram) {
			if !slices.ContainsFunc(detail.PermissionSets, func(s permissionSet) bool { return s.ID == id }) {
				missing = append(missing, id)
			}
		}
		switch {
		case len(detail.PermissionSets) == 0:
			return skippedOf(subject, "its permission sets are not known yet", "尚不知道其权限集")
		case len(missing) > 0:
			var en, zh []string
			for _, id := range missing {
				name := tokens.PermissionSetNames([]int{id})
				en, zh = append(en, name.EN), append(zh, name.ZH)
			}
			return yellowOf(subject, texts("it did not grant "+strings.Join(en, ", "), "未授予权限集："+strings.Join(zh, "、")), texts("have its owner authorise the platform again and tick the permission set; one that another platform holds must be given up there", "请其管理员重新授权并勾选该权限集；若该权限集已授权给其他平台且不能共用，须先在那里取消"))
		}
		return greenOf(subject, countOf(len(detail.PermissionSets), "permission set")+", and no trouble with its token", fmt.Sprintf("%d 个权限集，token 正常", len(detail.PermissionSets)))
	})
	if page.Next != "" {
		results = append(results, skippedOf("", fmt.Sprintf("there are more: only the first %d were looked at", len(page.Authorizers)), fmt.Sprintf("还有更多授权方，只检查了前 %d 个", len(page.Authorizers))))
	}
	return results
}

// refusedCallError is an answer of wechat_api's own: no word of WeChat's.
type refusedCallError struct {
	status int
	msg    string
}

func (e *refusedCallError) Error() string {
	return fmt.Sprintf("wechat_api answers HTTP %d: %s", e.status, e.msg)
}

// notCalled is why a call through the running gateway came to nothing.
func notCalled(appid string, err error) doctorResult {
	refused, ok := errors.AsType[*refusedCallError](err)
	switch {
	case ok && refused.status == http.StatusUnauthorized:
		return yellowOf(appid, texts("the running gateway does not take the key of the config: "+refused.msg, "运行中的网关不接受配置中的 key："+quotedZH(refused.msg)),
			texts("reload the gateway with this config and the same environment", "请用此配置与相同的环境变量重新加载网关"))
	case ok && refused.status >= http.StatusInternalServerError:
		return redOf(appid, texts("the gateway has no answer of WeChat's: "+refused.msg, "网关没有得到微信的应答："+quotedZH(refused.msg)),
			texts("see the checks gateway and wechat_hosts, and the gateway's log", "参见 gateway 与 wechat_hosts 检查，以及网关日志"))
	}
	why := textOf(err)
	if ok {
		why.ZH = fmt.Sprintf("wechat_api 返回 HTTP %d：%s", refused.status, quotedZH(refused.msg))
	}
	return skippedOf(appid, why.EN, "无法通过网关调用："+why.ZH)
}

// callThrough makes a call of an account's through the running gateway's wechat_api, with a key of the config, so that no
// token leaves the gateway.
func (d *doctor) callThrough(ctx context.Context, appid, method, path, body string, into any) error {
	var listener *doctorSite
	for i := range d.config.sites {
		s := &d.config.sites[i]
		if !s.secure && slices.ContainsFunc(s.handlers, func(h siteHandler) bool { return h.name == "wechat_api" }) {
			if listener = s; tokens.IsLoopbackHost(s.host) || s.host == "" {
				break
			}
		}
	}
	if listener == nil {
		return said("the config has no wechat_api on plain http to call through", "配置中没有可供调用的 http（非 https）wechat_api")
	}
	to := *listener
	if to.host == "" || to.host == "0.0.0.0" || to.host == "::" {
		to.host = "127.0.0.1"
	}
	if !tokens.IsLoopbackHost(to.host) {
		return said("wechat_api is not on this machine, and a key is not sent elsewhere in the clear", "wechat_api 不在本机，而 key 不会以明文发往别处")
	}
	client := &http.Client{Transport: &http.Transport{DialContext: d.dial, DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	err := said("no client of the config with a key may call for "+appid, "配置中没有带 key 且可为 "+appid+" 调用的 client")
	for _, c := range d.config.clients {
		if !c.may(appid) {
			continue
		}
		header := http.Header{"Authorization": {"Bearer " + c.key}, "Content-Type": {"application/json"}}
		err = d.callAs(ctx, client, method, to.origin()+"/"+appid+path, body, header, into)
		if refused, ok := errors.AsType[*refusedCallError](err); !ok || refused.status != http.StatusForbidden {
			break // else another client may make this call
		}
	}
	return err
}

// callAs makes a call of wechat_api.
func (d *doctor) callAs(ctx context.Context, client *http.Client, method, target, body string, header http.Header, into any) error {
	a, err := d.ask(ctx, client, method, target, body, header)
	var own wechatSaid
	switch {
	case err != nil:
		return said("wechat_api of the running gateway does not answer", "运行中的网关的 wechat_api 没有应答")
	case a.status != http.StatusOK && json.Unmarshal(a.body, &own) == nil && own.Msg != "":
		return &refusedCallError{a.status, shown(own.Msg)}
	case json.Unmarshal(a.body, into) != nil:
		return said(fmt.Sprintf("wechat_api answers HTTP %d and no JSON", a.status), fmt.Sprintf("wechat_api 返回 HTTP %d，且不是 JSON", a.status))
	}
	return nil
}

// wechatSaid is what answers of WeChat's have in common.
type wechatSaid struct {
	Code int64  `json:"errcode"`
	Msg  string `json:"errmsg"`
}

// checkEgress: WeChat accepts calls from the address that the gateway's calls come from.
func (d *doctor) checkEgress(ctx context.Context) []doctorResult {
	subjects := d.callers(ctx)
	if len(subjects) == 0 {
		return []doctorResult{skippedOf("", "there is no account to call for", "没有可以替它调用的账号")}
	}
	return doctorEach(d, ctx, subjects, func(ctx context.Context, appid string) doctorResult {
		var said struct {
			wechatSaid
			List []string `json:"ip_list"`
		}
		if err := d.callThrough(ctx, appid, http.MethodGet, "/cgi-bin/getcallbackip", "", &said); err != nil {
			return notCalled(appid, err)
		}
		if said.Code != 0 {
			return explainedOf(appid, said.Code, said.Msg)
		}
		return greenOf(appid, fmt.Sprintf("WeChat accepts the gateway's calls; it pushes from %d addresses (getcallbackip)", len(said.List)), fmt.Sprintf("微信接受网关的调用；推送来自 %d 个地址（getcallbackip）", len(said.List)))
	})
}

// callers are the accounts to call for: the plain ones, and one that authorised a platform.
func (d *doctor) callers(ctx context.Context) (list []string) {
	for _, a := range d.config.app.Accounts {
		if a != nil && isAppID(a.AppID) {
			list = append(list, a.AppID)
		}
	}
	var page struct {
		Authorizers []struct {
			AppID string `json:"appid"`
			State string `json:"state"`
		} `json:"authorizers"`
	}
	if d.askAdmin(ctx, "/wechat/authorizers?limit=1", &page) == nil {
		for _, a := range page.Authorizers {
			if a.State != "revoked" && isAppID(a.AppID) {
				list = append(list, a.AppID)
			}
		}
	}
	return list
}

// checkCallback has WeChat test the way from its push servers to each plain account's server.
func (d *doctor) checkCallback(ctx context.Context) []doctorResult {
	var accounts []string
	for _, a := range d.config.app.Accounts {
		if a != nil && len(a.Tokens) > 0 && isAppID(a.AppID) {
			accounts = append(accounts, a.AppID)
		}
	}
	if len(accounts) == 0 {
		return []doctorResult{skippedOf("", "WeChat checks the network of plain accounts only, and none receives pushes", "微信只对普通账号做网络检测，而配置中没有接收推送的普通账号")}
	}
	return doctorEach(d, ctx, accounts, func(ctx context.Context, appid string) doctorResult {
		var said struct {
			wechatSaid
			DNS []struct {
				IP string `json:"ip"`
			} `json:"dns"`
			Ping []struct {
				IP   string `json:"ip"`
				From string `json:"from_operator"`
				Loss string `json:"package_loss"`
				Time string `json:"time"`
			} `json:"ping"`
		}
		if err := d.callThrough(ctx, appid, http.MethodPost, "/cgi-bin/callback/check", `{"action":"all","check_operator":"DEFAULT"}`, &said); err != nil {
			return notCalled(appid, err)
		}
		if said.Code != 0 {
			return explainedOf(appid, said.Code, said.Msg)
		}
		if len(said.DNS) == 0 {
			return redOf(appid, texts("WeChat finds no address of the server's host", "微信无法解析服务器域名"), texts("mend the DNS of the host in 服务器配置; see the check dns", "请修正服务器配置中域名的解析，参见 dns 检查"))
		}
		var ips []string
		for _, a := range said.DNS {
			ips = append(ips, a.IP)
		}
		for _, p := range said.Ping {
			if p.Loss != "" && p.Loss != "0%" {
				return yellowOf(appid, texts(fmt.Sprintf("WeChat loses %s of its pings to %s (from %s)", p.Loss, p.IP, p.From), fmt.Sprintf("微信 ping %s 丢包 %s（来自 %s）", p.IP, p.Loss, p.From)),
					texts("if the firewall drops pings, that is all; else the route from WeChat is bad", "若防火墙丢弃 ping 则无妨，否则微信到本机的线路不佳"))
			}
		}
		return greenOf(appid, "WeChat resolves the server to "+strings.Join(ips, ", ")+" and reaches it", "微信解析为 "+strings.Join(ips, "、")+"，可以到达")
	})
}
