package caddymodule

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/caddy-wechat/caddy-wechat/tokens"
	"github.com/caddy-wechat/caddy-wechat/tokens/redisstore"
)

// What can be found, and what to do about it. Each function makes one finding.

var (
	remedyEventURL = texts(
		"compare 授权事件接收URL in open.weixin.qq.com > 管理中心 > 第三方平台 with where wechat_event is served, and look into the access log for pushes to it; the platform must be 已全网发布 or in test, and the URL reachable from the internet",
		"核对微信开放平台 > 管理中心 > 第三方平台 的授权事件接收URL 与 wechat_event 的地址，并查看访问日志中是否有推送；平台须已全网发布或处于测试状态，该地址须能从公网访问")
	// Who has just started the gateway has nothing to mend yet.
	remedyFirstTicket = texts("wait ten minutes from the start; then "+remedyEventURL.EN, "启动后请先等十分钟；之后"+remedyEventURL.ZH)

	remedyResolver = texts("look at this machine's resolver (/etc/resolv.conf): the name must resolve here", "检查本机的域名解析（/etc/resolv.conf）")
	remedySealKey  = texts(
		"write the seal_key that the records were sealed with behind the new one, in the same line, on all nodes; until then nothing is written over",
		"把加密这些记录时的 seal_key 写在新密钥之后（同一行，所有节点）；在此之前不会覆盖任何记录")
	remedyStore = texts(
		"bring the store back: for redis look at the server, its address and password; for Caddy's own storage at the disk and who owns the folder; live tokens serve on meanwhile, and WeChat pushes events again",
		"恢复存储：redis 请检查服务器、地址与密码；Caddy 存储请检查磁盘与目录权限；期间仍有效的令牌继续使用，微信会重推事件")
)

// asked adds to a text why WeChat could not be asked to push.
func asked(t tokens.Text, asking error) tokens.Text {
	if asking == nil {
		return t
	}
	why := reasonOf(asking)
	return texts(t.EN+"; asked to push one, WeChat says: "+why.EN, t.ZH+"；请求推送时微信返回："+why.ZH)
}

// remedyFor is WeChat's errcode's remedy, or else another.
func remedyFor(err error, otherwise tokens.Text) tokens.Text {
	if api, ok := errors.AsType[*tokens.APIError](err); ok {
		if known, listed := tokens.Explain(api.Code); listed {
			return known.Remedy
		}
	}
	return otherwise
}

func noTicket(platform string, asking error) Finding {
	return Finding{
		Level: Red, Code: "no_ticket", Subject: subjectPlatform(platform), about: platform, unready: true,
		Text:   asked(texts("no component_verify_ticket has come: WeChat pushes one every ten minutes, and without one there are no tokens", "尚未收到 component_verify_ticket：微信每 10 分钟推送一次，没有它就无法获取令牌"), asking),
		Remedy: remedyFor(asking, remedyFirstTicket),
	}
}

func ticketRefused(platform string, why error) Finding {
	reason := reasonOf(why)
	return Finding{
		Level: Red, Code: "ticket_refused", Subject: subjectPlatform(platform), about: platform, unready: true,
		Text:   texts("WeChat refused the newest ticket: "+reason.EN, "微信拒绝了最新的 ticket："+reason.ZH),
		Remedy: remedyFor(why, remedyEventURL),
	}
}

func ticketExpired(platform string, age time.Duration, asking error) Finding {
	ago := span(age)
	return Finding{
		Level: Red, Code: "ticket_expired", Subject: subjectPlatform(platform), about: platform, unready: true,
		Text:   asked(texts("the newest ticket came "+ago.EN+" ago; it lives twelve hours, so no token can be had any more", "最新的 ticket 是 "+ago.ZH+"前收到的，有效期 12 小时，现在已无法获取令牌"), asking),
		Remedy: remedyFor(asking, remedyEventURL),
	}
}

func ticketOverdue(platform string, age time.Duration, asking error) Finding {
	level := Yellow
	if age > ticketLost {
		level = Red
	}
	ago := span(age)
	return Finding{
		Level: level, Code: "ticket_overdue", Subject: subjectPlatform(platform), about: platform,
		Text:   asked(texts("the newest ticket came "+ago.EN+" ago: WeChat's pushes do not arrive; tokens can be renewed until it is twelve hours old", "最新的 ticket 是 "+ago.ZH+"前收到的：微信的推送没有到达；满 12 小时后就无法刷新令牌"), asking),
		Remedy: remedyFor(asking, remedyEventURL),
	}
}

// tokenFails is about the token of a platform or an account. Unready: the gateway is not ready without it.
func tokenFails(subject, about string, state tokens.TokenState, unready bool) Finding {
	f := Finding{Level: Red, Code: "token_failing", Subject: subject, about: about, unready: unready}
	lives := texts("", "")
	if state.Live {
		f.Level = Yellow
		left := span(time.Until(state.ExpiresAt))
		lives = texts("; the present one lives for "+left.EN, "；现有令牌还可用 "+left.ZH)
	}
	reason := reasonOf(state.Err)
	f.Text = texts("the access token cannot be renewed: "+reason.EN+lives.EN, "access_token 无法刷新："+reason.ZH+lives.ZH)
	f.Remedy = remedyFor(state.Err, texts("see what WeChat's hosts say below, and the log", "查看下方微信接口域名的状态与日志"))
	if _, sealed := tokens.LacksSealKey(state.Err); sealed {
		f.Remedy = remedySealKey
	}
	api, ok := errors.AsType[*tokens.APIError](state.Err)
	if !ok {
		return f
	}
	switch known, _ := tokens.Explain(api.Code); {
	case known.NamesEgressIP():
		f.Code = codeAddressRefused
		ip := addressText(tokens.EgressIP(api.Msg))
		f.Text = texts("WeChat refuses the address that calls come from ("+ip.EN+"): "+reason.EN+lives.EN, "微信拒绝了出口 IP（"+ip.ZH+"）："+reason.ZH+lives.ZH)
	case api.Code == 40001 || api.Code == 40125 || api.Code == 41004:
		f.Code = "secret_wrong"
		f.Text = texts("WeChat refuses the secret: "+reason.EN+lives.EN, "微信拒绝了 AppSecret："+reason.ZH+lives.ZH)
		f.Remedy = texts("compare secret in the global option wechat with the AppSecret in WeChat's console; one that was reset there voids the former at once",
			"核对全局选项 wechat 中的 secret 与微信后台的 AppSecret；重置后旧值立即失效")
	}
	return f
}

func authorizationsWait(platform string, n int) Finding {
	return Finding{
		Level: Yellow, Code: "authorizations_waiting", Subject: subjectPlatform(platform), about: platform,
		Text:   texts(fmt.Sprintf("%d accepted authorizations are not exchanged for tokens yet; it is tried again and again, and the codes live an hour", n), fmt.Sprintf("%d 个已接受的授权尚未换取令牌；网关会反复重试，授权码有效期 1 小时", n)),
		Remedy: texts("mend what the other findings name, then POST /wechat/drain has all of them tried at once", "先处理其他各项，再调用 POST /wechat/drain 立即全部重试"),
	}
}

func forwardsWait(n int) Finding {
	return Finding{
		Level: Yellow, Code: "forwards_waiting", Subject: thisMachine,
		Text:   texts(fmt.Sprintf("%d events wait to be forwarded by wechat_event: no backend has answered them; it is tried again and again, for try_duration", n), fmt.Sprintf("%d 个事件等待 wechat_event 转交：后端连不上，或没有应答；网关会反复重试，直到 try_duration 为止", n)),
		Remedy: texts("look whether the backend behind wechat_event runs, and whether the site still forwards; the log says what became of an attempt", "检查 wechat_event 之后的后端是否运行、站点是否仍写有 forward；日志写明重试的结果"),
	}
}

func forwardsUnwanted(n int) Finding {
	return Finding{
		Level: Yellow, Code: "forwards_unwanted", Subject: thisMachine,
		Text:   texts(fmt.Sprintf("%d events in the store wait to be forwarded, and no wechat_event of this configuration has forward: nobody tries them", n), fmt.Sprintf("存储里有 %d 个事件等待转交，而本配置没有写 forward 的 wechat_event：没有人在重试", n)),
		Remedy: texts("write forward in wechat_event again: they are forwarded, and those older than try_duration given up; another node that shares the store and has forward does the same; if no backend is to get them, remove what is in wechat/v1/forward of the store", "在 wechat_event 里重新写上 forward：事件随即转交，早于 try_duration 的放弃；共用存储、写有 forward 的别的节点也会这样做；没有后端需要时，删除存储中 wechat/v1/forward 里的内容"),
	}
}

func authorizationsLost(platform string, n int) Finding {
	return Finding{
		Level: Yellow, Code: "authorizations_lost", Subject: subjectPlatform(platform), about: platform,
		Text:   texts(fmt.Sprintf("%d accounts have authorised the platform and their codes were never exchanged: WeChat has no refresh token of them", n), fmt.Sprintf("%d 个账号已授权，但授权码从未换取令牌：微信处没有其 refresh_token", n)),
		Remedy: texts("let their owners authorise again: GET /wechat/orphans on the admin endpoint lists them, and makes links", "请这些账号的管理员重新授权：admin 端点的 GET /wechat/orphans 会列出它们并生成链接"),
	}
}

func olderInUse(subject, appid, what string) Finding {
	return Finding{
		Level: Yellow, Code: "rotation_unfinished", Subject: subject, about: appid,
		Text:   texts("WeChat's pushes still open with an older "+what, "微信的推送仍在使用旧的 "+what),
		Remedy: texts("enter the newest "+what+" in WeChat's console; keep the older one in the configuration until this is gone", "在微信后台填写最新的 "+what+"；在本提示消失前请保留旧值"),
	}
}

func olderUnused(subject, appid, what string) Finding {
	return Finding{
		Level: Green, Code: "rotation_finished", Subject: subject, about: appid,
		Text:   texts("pushes to this node open with the newest "+what+" alone", "推送到本节点的消息已全部使用最新的 "+what),
		Remedy: texts("if all nodes say so, the older "+what+" can be taken out of the configuration", "若所有节点均如此，可以从配置中移除旧的 "+what),
	}
}

func storeDown(s StoreStatus) Finding {
	return Finding{
		Level: Red, Code: "store_down", Subject: "store " + s.Module, about: aboutStore, unready: true,
		Text:   texts("the store does not answer: "+s.Error, "存储没有响应："+quotedZH(s.Error)),
		Remedy: remedyStore,
	}
}

func storeWriteFails(s StoreStatus) Finding {
	return Finding{
		Level: Red, Code: "store_not_writing", Subject: "store " + s.Module, about: aboutStore,
		Text:   texts("the store can be read but did not take what was last written: "+s.Error, "存储可读，但最近一次写入失败："+quotedZH(s.Error)),
		Remedy: texts("look for a full disk, a folder that is not the gateway's, or a Redis that is read-only or out of memory", "检查磁盘是否已满、目录权限，或 Redis 是否只读、内存不足"),
	}
}

// eachOf takes apart what errors.Join has put together, in lines that no finding has room for.
func eachOf(err error) []error {
	if several, ok := err.(interface{ Unwrap() []error }); ok { //nolint:errorlint // the outermost alone
		return several.Unwrap()
	}
	return []error{err}
}

func storeUnfit(module string, err error) Finding {
	var en, zh []string
	level := Yellow
	for _, one := range eachOf(err) {
		reason := textOf(one)
		en, zh = append(en, reason.EN), append(zh, reason.ZH)
		if !errors.Is(one, redisstore.ErrForgets) && !errors.Is(one, redisstore.ErrSplitsReads) { // these lose no record
			level = Red
		}
	}
	return Finding{
		Level: level, Code: "store_unfit", Subject: "store " + module, about: aboutStore,
		Text: texts("the store is not fit for what it is to keep: "+strings.Join(en, "; "), "存储的设置不满足要求："+strings.Join(zh, "；")),
		Remedy: texts("set Redis to maxmemory-policy noeviction, version 7.0 or later, give the address of a master, and let the user's access list allow what docs/clustering.md names, which also has what to choose of a managed Redis",
			"将 Redis 的 maxmemory-policy 设为 noeviction，版本 7.0 以上，地址应为主节点，访问权限与托管 Redis 的选择见 docs/clustering.zh-CN.md"),
	}
}

// codeSealKey is of records that wait for a seal_key.
const codeSealKey = "seal_key_missing"

// recordsSealed is said of records that are sealed with a key that is not configured. The store is well.
func recordsSealed(module string, why tokens.Text, unready bool) Finding {
	return Finding{
		Level: Red, Code: codeSealKey, Subject: "store " + module, about: aboutStore, unready: unready,
		Text: texts("records are sealed with a seal_key that is not in the configuration: "+why.EN, "加密记录所用的 seal_key 不在配置中："+why.ZH), Remedy: remedySealKey,
	}
}

// ticketSealed is said of a platform whose ticket is one of those.
func ticketSealed(platform string) Finding {
	return Finding{
		Level: Red, Code: "no_ticket", Subject: subjectPlatform(platform), about: platform, unready: true,
		Text:   texts("its component_verify_ticket in the store cannot be opened, and no other has come since the start", "存储中的 component_verify_ticket 打不开，启动后也没有收到新的"),
		Remedy: remedySealKey,
	}
}

func recordsUnsaved(n int) Finding {
	return Finding{
		Level: Red, Code: "records_unsaved", Subject: thisMachine, about: aboutStore, unready: true,
		Text:   texts(fmt.Sprintf("%d records or tickets live in this process's memory alone: neither the store nor the spill folder takes them, and they are lost if the process ends", n), fmt.Sprintf("%d 条记录或 ticket 仅在本进程内存中：存储与 spill 目录均未写入，进程结束即丢失", n)),
		Remedy: texts("do not restart; bring the store back, or make the spill folder writable", "请勿重启；恢复存储，或使 spill 目录可写"),
	}
}

func recordsWaiting(n int) Finding {
	return Finding{
		Level: Yellow, Code: "spill_in_use", Subject: thisMachine, about: aboutStore,
		Text:   texts(fmt.Sprintf("%d records wait in this node's spill folder for the store to take them", n), fmt.Sprintf("%d 条记录在本节点的 spill 目录中等待写入存储", n)),
		Remedy: remedyStore,
	}
}

func deduplicationDegraded() Finding {
	return Finding{
		Level: Yellow, Code: "deduplication_degraded", Subject: thisMachine, about: aboutStore,
		Text:   texts("the store does not answer for pushes: one that comes again to another node is not known there, and its backend gets it twice", "存储对推送没有响应：重推到其他节点的消息，那个节点认不出来，后端会收到两次"),
		Remedy: remedyStore,
	}
}

func hostFails(host, class, reason string, proxied bool) Finding {
	f := Finding{Level: Red, Code: "host_" + class, Subject: "host " + host, about: host}
	f.Text = texts("the last call did not reach it ("+class+"): "+reason, "最近一次调用未能到达（"+class+"）："+quotedZH(reason))
	switch class {
	case classDNS:
		f.Remedy = remedyResolver
	case classTLS:
		f.Remedy = texts("look at this machine's clock and CA certificates, and whether something in between opens TLS", "检查本机时钟与 CA 根证书，以及中间是否有设备拦截 TLS")
	case classProxy:
		f.Remedy = texts("look at the egress proxy of the global option wechat: its address, and whether it lets this host through", "检查全局选项 wechat 的 proxy：地址是否正确，是否放行该域名")
	case classAnswer:
		f.Text = texts("the last call to it got no answer of WeChat's: "+reason, "最近一次调用没有得到微信的应答："+quotedZH(reason))
		f.Remedy = texts("it is not WeChat that answered, or WeChat is in trouble: look for a proxy or a portal in between", "应答者不是微信，或微信故障：检查中间的代理或认证页面")
	case classTimeout:
		f.Remedy = texts("look at the firewall and the way out to port 443; if WeChat itself is slow, wait", "检查防火墙是否放行到 443 端口的出站连接；若是微信自己响应慢，只能等待")
	default:
		f.Remedy = texts("look at the firewall and the way out to port 443", "检查防火墙是否放行到 443 端口的出站连接")
	}
	if proxied && class != classProxy {
		f.Remedy = texts(f.Remedy.EN+"; calls go through the configured proxy", f.Remedy.ZH+"；调用经由所配置的 proxy")
	}
	return f
}

// backendFails is about an upstream of a reverse_proxy.
func (x *examination) backendFails(address string, fails int) {
	x.found(Finding{
		Level: Yellow, Code: "backend_failing", Subject: "backend " + address, about: address,
		Text:   texts(fmt.Sprintf("%d requests to it failed within the fail_duration of its reverse_proxy", fails), fmt.Sprintf("在其 reverse_proxy 的 fail_duration 内有 %d 次请求失败", fails)),
		Remedy: texts("look whether the backend runs and listens there", "检查该后端是否运行并监听该地址"),
	})
}

func shuttingDown() Finding {
	return Finding{
		Level: Yellow, Code: "shutting_down", Subject: thisMachine, unready: true,
		Text:   texts("the process was told to end, and serves until shutdown_delay is over", "进程已收到停止信号，在 shutdown_delay 结束前继续服务"),
		Remedy: texts("nothing: a load balancer that asks whether the gateway is ready takes this node out meanwhile", "无需处理：查询就绪状态的负载均衡会在此期间摘除本节点"),
	}
}

func nothingConfigured() Finding {
	return Finding{
		Level: Yellow, Code: "nothing_configured", Subject: thisMachine,
		Text:   texts("there is neither a platform nor an account", "没有配置任何 platform 或 account"),
		Remedy: texts("add a platform or an account to the global option wechat", "在全局选项 wechat 中添加 platform 或 account"),
	}
}

func noSealKey() Finding {
	return Finding{
		Level: Yellow, Code: "no_seal_key", Subject: thisMachine, about: aboutStore,
		Text:   texts("there is no seal_key: tokens are in the store as Caddy keeps private keys, readable by whoever can read it", "没有 seal_key：令牌在存储中未加密，凡能读取存储者均可读取"),
		Remedy: texts("add seal_key with what `openssl rand -hex 32` prints to the global option wechat", "用 `openssl rand -hex 32` 生成密钥，填入全局选项 wechat 的 seal_key"),
	}
}

func plainMode(appid string) Finding {
	return Finding{
		Level: Yellow, Code: "plain_mode", Subject: subjectAccount(appid), about: appid,
		Text:   texts("its pushes are in 明文模式, in which WeChat signs no text", "该账号的推送为明文模式，微信不对正文签名"),
		Remedy: texts("choose 安全模式 in its 服务器配置 and give the aes_key", "在其服务器配置中选择安全模式，并填写 aes_key"),
	}
}

func verifyFileDoubtful(name, doubt string) Finding {
	return Finding{
		Level: Yellow, Code: "verify_file", Subject: "file " + name,
		Text:   texts("WeChat will not accept it: it "+doubt, "微信不会接受该校验文件：内容是网页、带有 BOM、存成了 UTF-16 或为空"),
		Remedy: texts("put the file as WeChat gave it into the folder of wechat_verify, or PUT it to /wechat/verify/"+name, "将微信给出的文件原样放入 wechat_verify 的文件夹，或 PUT 到 /wechat/verify/"+name),
	}
}

// clockDiffers is about a clock of which WeChat's answers say that it is off. Tokens and logins end by it, too early or too late.
func clockDiffers(ahead time.Duration) Finding {
	by := aheadText(ahead)
	f := Finding{
		Level: Yellow, Code: codeClock, Subject: thisMachine,
		Text:   texts("WeChat's clock is "+by.EN+", by the Date of its answers", "微信的时钟"+by.ZH+"（依据其应答的 Date）"),
		Remedy: sightedTexts[codeClock].remedy,
	}
	if ahead.Abs() >= defaultTimestampWindow {
		f.Level = Red
		f.Text = texts(f.Text.EN+", by which it is judged whether pushes are in time", f.Text.ZH+"，推送是否及时改按微信的时钟判断")
	}
	return f
}

// sightedText is what a code of sightings means.
type sightedText struct {
	level        Level
	text, remedy tokens.Text // text may have a %s for the detail
}

var sightedTexts = map[string]sightedText{
	codePushSignature: {Yellow,
		texts("pushes come whose signature fits no configured token, or somebody forges them", "收到签名与所配置的 token 都不符的推送，也可能是有人伪造"),
		texts("compare token with the Token (消息校验Token) in WeChat's console, and the path with the account", "核对 token 与微信后台的 Token（消息校验Token），并核对路径对应的账号")},
	codePushKey: {Red,
		texts("pushes come with a right signature that no configured aes_key opens", "收到签名正确、但所配置的 aes_key 均无法解密的推送"),
		texts("compare aes_key with the EncodingAESKey (消息加解密Key) in WeChat's console; while it is changed there, configure both, newest first", "核对 aes_key 与微信后台的 EncodingAESKey（消息加解密Key）；更换期间请同时配置新旧两个，新的在前")},
	codePushReceiveID: {Red,
		texts("pushes come that were encrypted for another appid", "收到为其他 appid 加密的推送"),
		texts("compare the appid in the configuration with WeChat's console: two consoles share token and key, or the URL is entered in the wrong one", "核对配置中的 appid 与微信后台：可能两个平台或账号用了相同的 token 与密钥，或 URL 填到了另一个的后台")},
	codePushAddressee: {Yellow,
		texts("pushes come on the path of one account that are for another, by their ToUserName", "推送的 ToUserName 与路径中的账号不符"),
		texts("let 消息与事件接收URL end in /$APPID$, and look whether something rewrites the path", "消息与事件接收URL 应以 /$APPID$ 结尾，并检查是否有路径改写")},
	codePushUnknown: {Yellow,
		texts("pushes come on a path that names no configured account", "推送的路径中没有已配置的账号"),
		texts("add the account to the global option wechat, or mend the URL in its 服务器配置", "在全局选项 wechat 中添加该账号，或修改其服务器配置中的 URL")},
	codePushTooLarge: {Yellow,
		texts("pushes come that are larger than max_body", "收到超过 max_body 的推送"),
		texts("WeChat's own are below 100 KB: look who sends them, or raise max_body", "微信的推送不超过 100 KB：检查发送者，或调高 max_body")},
	codePushNotEncrypted: {Yellow,
		texts("pushes come that are not encrypted, and the account is not in mode plain", "收到未加密的推送，而该账号不是 plain 模式"),
		texts("choose 安全模式 in WeChat's console, or give the account mode plain", "在微信后台选择安全模式，或将账号设为 mode plain")},
	codePushNoKey: {Red,
		texts("pushes come encrypted, and the account has no aes_key", "收到加密的推送，而该账号没有 aes_key"),
		texts("give the account its EncodingAESKey as aes_key, or choose 明文模式 in WeChat's console", "为账号填写 aes_key（EncodingAESKey），或在微信后台选择明文模式")},
	codePushReplayed: {Yellow,
		texts("pushes come whose timestamp and nonce came before with another text: somebody forges them, which 明文模式 allows", "收到 timestamp 与 nonce 重复而正文不同的推送：明文模式下可被伪造"),
		texts("choose 安全模式 in the account's 服务器配置", "在账号的服务器配置中选择安全模式")},
	codePushNotKept: {Red,
		texts("events were answered with 503 because they could not be made durable; WeChat pushes them again", "事件没能落盘，应答了 503；微信会重推"),
		remedyStore},
	codeClock: {Red,
		texts("WeChat's clock is %s: messages are refused", "微信的时钟%s：消息被拒绝"),
		texts("set this machine's clock (chrony, systemd-timesyncd); timestamp_window says how far they may differ", "校准本机时钟（chrony、systemd-timesyncd）；允许的偏差由 timestamp_window 指定")},
	codeEventMisdirected: {Yellow,
		texts("authorization events come to a message URL; they are handled", "授权事件推送到了消息与事件接收URL；已照常处理"),
		texts("mend 授权事件接收URL in the platform's console", "修正第三方平台的授权事件接收URL")},
	codeMessageMisdirected: {Yellow,
		texts("messages come to the authorization-event URL; %s", "消息推送到了授权事件接收URL；%s"),
		texts("mend 消息与事件接收URL in the platform's console: it is that of the wechat_message route", "修正第三方平台的消息与事件接收URL，应为 wechat_message 的地址")},
	codeRepliesLost: {Red,
		texts("messages are lost, for no backend could be reached: %s", "消息丢失：无法连接后端：%s"),
		texts("start the backend, or mend the address of the reverse_proxy behind wechat_message", "启动后端，或修正 wechat_message 之后 reverse_proxy 的地址")},
	codeRepliesUnusable: {Yellow,
		texts("the backend's answers cannot be used: %s", "后端的应答不可用：%s"),
		texts("have the backend answer with status 200 and reply XML, success, or nothing", "后端应返回 200，内容为回复 XML、success 或空")},
	codeAuthorizerToken: {Yellow,
		texts("its token cannot be renewed: %s", "该账号的令牌无法刷新：%s"),
		texts("where WeChat was not reached, mend what is said of its host; else see what the errcode asks for: caddy wechat explain; if its refresh token is void, its owner authorises again",
			"若未能连接微信，先处理微信服务器的问题；否则用 caddy wechat explain 查看错误码；若 refresh_token 失效，请账号管理员重新授权")},
	codeRogue: {Yellow,
		texts("another system is refreshing its tokens (%s): WeChat refused one that nobody here had renewed", "有其他系统也在刷新该账号的令牌（%s）：网关没有刷新，微信却拒绝了网关手上的令牌"),
		texts("find the program that has the secret or the refresh token, and have it use wechat_api instead", "找出持有 secret 或 refresh_token 的其他程序，改为使用 wechat_api")},
	codeAddressRefused: {Red,
		texts("WeChat refuses the address that calls come from: %s", "微信拒绝了出口 IP：%s"),
		texts("add the address to the whitelist: of a platform open.weixin.qq.com > 管理中心 > 第三方平台 > 白名单IP地址列表; of a 公众号 微信开发者平台 (developers.weixin.qq.com/platform) > 我的业务 > 公众号/服务号 > 基础信息 > IP白名单, of a 小程序 mp.weixin.qq.com > 开发管理 > 开发设置 > IP白名单; it takes up to ten minutes",
			"将该 IP 加入白名单：第三方平台在微信开放平台 > 管理中心 > 第三方平台 > 白名单IP地址列表；公众号、服务号在微信开发者平台（developers.weixin.qq.com/platform）> 我的业务 > 公众号/服务号 > 基础信息 > IP白名单，小程序在公众平台 > 开发管理 > 开发设置 > IP白名单；约 10 分钟生效")},
	codePermission: {Yellow,
		texts("WeChat refuses a call for want of a permission: %s", "因缺少权限，微信拒绝了调用：%s"),
		texts("select the permission set for the platform and let the account's owner authorise again, or look up the account's own 接口权限", "为第三方平台勾选该权限集并请账号管理员重新授权，或检查账号自身的接口权限")},
	codeQuota: {Yellow,
		texts("a quota of WeChat's is used up: %s", "微信接口额度已用尽：%s"),
		texts("wait for midnight in Beijing, or clear it (clear_quota, ten times a month); look for a caller that polls", "等到北京时间零点，或调用 clear_quota（每月 10 次）；检查是否有轮询的调用方")},
	codeCallRefused: {Yellow,
		texts("WeChat refuses a call: %s", "微信拒绝了调用：%s"),
		texts("caddy wechat explain says what the errcode asks for", "用 caddy wechat explain 查看该错误码的处理方法")},
}

// sighted makes the finding of a sighting.
func (x *examination) sighted(s sighting) Finding {
	known := sightedTexts[s.code]
	f := Finding{Level: known.level, Code: s.code, Subject: x.app.subjectOf(s.subject), about: s.subject, Text: known.text, Remedy: known.remedy}
	if strings.Contains(known.text.EN, "%s") {
		f.Text = texts(fmt.Sprintf(known.text.EN, s.detail.EN), fmt.Sprintf(known.text.ZH, s.detail.ZH))
	}
	times, ago := fmt.Sprintf(" (%s, last at %s)", countOf(s.count, "time"), s.last.UTC().Format(time.TimeOnly)), fmt.Sprintf("（%d 次，最近 %s UTC）", s.count, s.last.UTC().Format(time.TimeOnly))
	f.Text = texts(f.Text.EN+times, f.Text.ZH+ago)
	return f
}
