package caddymodule

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-wechat/caddy-wechat/crypto"
)

const (
	// slowPush is how long the handshake may take before it is pointed out: WeChat waits pushPatience.
	slowPush = 2 * time.Second
	// maxDoctorFiles is how many verification files are asked for on each site.
	maxDoctorFiles = 20
	// doctorAuthorizer stands for an account that authorised a platform. No account has it.
	doctorAuthorizer = "wx0000000000000000"
)

// pushURL is a URL that WeChat pushes to, with the keys that it pushes with.
type pushURL struct {
	url   string
	keys  *pushKeys
	event bool // of wechat_event
}

// pushURLs are those of the public sites.
func (d *doctor) pushURLs() (list []pushURL) {
	all, _ := d.config.app.pushKeys()
	for _, s := range d.config.public() {
		for _, h := range s.handlers {
			var fields struct {
				AppID string `json:"appid"`
			}
			_ = json.Unmarshal(h.fields, &fields)
			for _, k := range all {
				appid := doctorAuthorizer
				switch {
				case h.name == "wechat_event" && k.what == ofPlatform:
				case h.name == "wechat_message" && k.what == ofPlatform && fields.AppID == "":
				case h.name == "wechat_message" && k.what == ofAccount && (fields.AppID == "" || fields.AppID == k.appid):
					appid = k.appid
				default:
					continue
				}
				patterns := h.patterns
				if len(patterns) == 0 {
					patterns = []string{"/*"}
				}
				if p, ok := pathOf(patterns[0], appid); ok && (fields.AppID != "" || h.name == "wechat_event" || k.what == ofPlatform || strings.Contains(p, k.appid)) {
					list = append(list, pushURL{s.origin() + p, k, h.name == "wechat_event"})
				}
			}
		}
	}
	return list
}

// checkPushes asks each push URL as WeChat does when it is entered in the console, sees that a forgery is refused, and pushes
// something to itself as WeChat would, rightly signed and encrypted. None of them reaches a backend.
func (d *doctor) checkPushes(ctx context.Context) []doctorResult {
	urls := d.pushURLs()
	if len(urls) == 0 {
		return []doctorResult{skippedOf("", "no wechat_event or wechat_message on a site with a public name has keys that resolve", "没有可检查的推送 URL")}
	}
	client := d.client()
	d.askWeChat(ctx) // for wechatNow, before the time of the first begins
	return doctorEach(d, ctx, urls, func(ctx context.Context, p pushURL) doctorResult {
		if r := d.handshake(ctx, client, p); r.Level == doctorRed {
			return r
		} else if forged := d.forgery(ctx, client, p); forged.Level == doctorRed {
			return forged
		} else if pushed := d.signed(ctx, client, p); pushed.Level == doctorRed {
			return pushed
		} else {
			return r
		}
	})
}

// wechatNow is the time by WeChat's clock, which its pushes bear: by that the gateway judges them where the clock here is off.
func (d *doctor) wechatNow(ctx context.Context) time.Time {
	offset, _ := d.clockOffset(ctx)
	return d.now().Add(-offset)
}

func (d *doctor) handshake(ctx context.Context, client *http.Client, p pushURL) doctorResult {
	subject := p.url + " (" + p.keys.String() + ")"
	stamp, nonce, echo := strconv.FormatInt(d.wechatNow(ctx).Unix(), 10), digits(10), digits(19)
	query := url.Values{"signature": {p.keys.codec.Signature(stamp, nonce)}, "timestamp": {stamp}, "nonce": {nonce}, "echostr": {echo}}
	a, err := d.ask(ctx, client, http.MethodGet, p.url+"?"+query.Encode(), "", nil)
	if err != nil {
		return redOf(subject, following("cannot be reached: ", "无法访问：", tlsCause(err)),
			texts("see the checks dns and tls; from inside your own network the public address may not be reachable", "参见 dns 与 tls 检查；内网可能无法访问自己的公网地址"))
	}
	switch {
	case a.status == http.StatusOK && string(a.body) == echo && a.took > slowPush:
		return yellowOf(subject, texts(fmt.Sprintf("answers the handshake only after %d ms", a.took.Milliseconds()), fmt.Sprintf("URL 验证的应答用了 %d 毫秒", a.took.Milliseconds())),
			texts("see what slows the way down: WeChat waits 5 seconds", "请检查链路：微信只等待 5 秒"))
	case a.status == http.StatusOK && string(a.body) == echo:
		return greenOf(subject, fmt.Sprintf("answers WeChat's handshake after %d ms and refuses a forgery", a.took.Milliseconds()), fmt.Sprintf("URL 验证正常（%d 毫秒），并拒绝伪造的推送", a.took.Milliseconds()))
	case a.status == http.StatusOK && bytes.Contains(a.body, []byte(echo)):
		return redOf(subject, texts("answers echostr, but with something around it: WeChat wants it byte for byte", "回复的 echostr 前后有多余内容：微信要求完全一致"),
			texts("take away what adds to answers: a template, a BOM, a newline", "去掉附加内容的处理：模板、BOM、换行"))
	case a.status == http.StatusForbidden:
		return redOf(subject, texts("refuses the handshake (403): the running gateway has another token, or its clock is off", "拒绝 URL 验证（403）：运行中的网关使用另一个 token，或时钟有偏差"),
			texts("reload the gateway with this config and the same environment; its log says why it refused", "请用此配置与相同的环境变量重新加载网关；拒绝原因见日志"))
	case a.status >= 300 && a.status < 400:
		return redOf(subject, texts(fmt.Sprintf("redirects (HTTP %d): WeChat follows no redirect of a push", a.status), fmt.Sprintf("发生重定向（HTTP %d）：微信推送不跟随", a.status)),
			texts("enter the URL in WeChat's console as it is served: https, and the right host", "请在微信后台填写实际提供服务的 URL"))
	}
	return redOf(subject, texts(fmt.Sprintf("answers HTTP %d instead of echostr: the gateway does not get this request", a.status), fmt.Sprintf("返回 HTTP %d 而非 echostr：请求没有到达网关", a.status)),
		texts("see what answers before the gateway: another server, a CDN, a login, or a route without wechat_message", "请检查网关之前的环节：其他服务器、CDN、登录，或缺少 wechat_message 的路由"))
}

// forgery sends a push with a wrong signature.
func (d *doctor) forgery(ctx context.Context, client *http.Client, p pushURL) doctorResult {
	subject := p.url + " (" + p.keys.String() + ")"
	zeros := strings.Repeat("0", 40)
	query := url.Values{"signature": {zeros}, "msg_signature": {zeros}, "timestamp": {strconv.FormatInt(d.wechatNow(ctx).Unix(), 10)}, "nonce": {digits(10)}, "encrypt_type": {"aes"}}
	body := "<xml><ToUserName>gh_000000000000</ToUserName><Encrypt>" + strings.Repeat("A", 128) + "</Encrypt></xml>"
	a, err := d.ask(ctx, client, http.MethodPost, p.url+"?"+query.Encode(), body, http.Header{"Content-Type": {"text/xml"}})
	if err == nil && a.status == http.StatusForbidden {
		return greenOf(subject, "refuses a forgery", "拒绝伪造的推送")
	}
	what := following("a POST gets no answer: ", "POST 没有回复：", causeOf(err))
	if err == nil {
		what = texts(fmt.Sprintf("a POST with a wrong signature gets HTTP %d, want 403: it does not go to the gateway as a GET does", a.status), fmt.Sprintf("签名错误的 POST 返回 HTTP %d，应为 403：POST 没有像 GET 一样到达网关", a.status))
	}
	return redOf(subject, what, texts("let POST through unchanged: look at firewalls (WAF), CDNs and routes that only match GET", "请原样放行 POST：检查 WAF、CDN 与仅匹配 GET 的路由"))
}

// signed pushes an event that the gateway answers itself. It comes after forgery: what takes a forged push is not the gateway,
// and would believe this one.
func (d *doctor) signed(ctx context.Context, client *http.Client, p pushURL) doctorResult {
	subject := p.url + " (" + p.keys.String() + ")"
	now := d.wechatNow(ctx).Unix()
	stamp, nonce, created := strconv.FormatInt(now, 10), digits(10), strconv.FormatInt(now, 10)
	body := []byte("<xml><AppId>" + p.keys.appid + "</AppId><ToUserName>gh_000000000000</ToUserName><FromUserName>doctor</FromUserName><CreateTime>" + created +
		"</CreateTime><MsgType>event</MsgType><Event>" + doctorEvent + "</Event></xml>")
	if p.event {
		body = []byte("<xml><AppId>" + p.keys.appid + "</AppId><CreateTime>" + created + "</CreateTime><InfoType>" + doctorEvent + "</InfoType></xml>")
	}
	query := url.Values{"signature": {p.keys.codec.Signature(stamp, nonce)}, "timestamp": {stamp}, "nonce": {nonce}}
	if p.keys.aesKeys > 0 {
		sealed, signature, err := p.keys.codec.SealPush(&crypto.Buffers{}, crypto.FormatXML, "ToUserName", "gh_000000000000", now, nonce, body)
		if err != nil {
			return redOf(subject, texts("no push can be made with its keys", "无法用其密钥生成推送"), texts("see the check config", "参见 config 检查"))
		}
		body = sealed
		query.Set("encrypt_type", "aes")
		query.Set("msg_signature", signature)
	}
	a, err := d.ask(ctx, client, http.MethodPost, p.url+"?"+query.Encode(), string(body), http.Header{"Content-Type": {"text/xml"}})
	switch {
	case err != nil:
		return redOf(subject, following("a push gets no answer: ", "推送没有得到回复：", causeOf(err)), texts("see what cuts off a POST with a body: a firewall (WAF), a limit", "请检查是否有 WAF 或限制截断带正文的 POST"))
	case a.status == http.StatusOK && string(a.body) == string(success):
		return greenOf(subject, "answers a push", "推送正常")
	case a.status == http.StatusForbidden:
		return redOf(subject, texts("refuses a push that is rightly signed and encrypted (403): the running gateway has another token or aes_key", "拒绝了签名与加密均正确的推送（403）：运行中的网关使用另一个 token 或 aes_key"),
			texts("reload the gateway with this config and the same environment; its log says why it refused", "请用此配置与相同的环境变量重新加载网关；拒绝原因见日志"))
	}
	return redOf(subject, texts(fmt.Sprintf("answers a push with HTTP %d, not with success", a.status), fmt.Sprintf("对推送返回 HTTP %d，而非 success", a.status)),
		texts("see what changes a POST or its answer on the way, and whether the running gateway is of this version", "请检查链路上改动 POST 或其回复的环节，以及运行中的网关是否为同一版本"))
}

// checkVerifyFiles fetches the verification files from outside, on http and https.
func (d *doctor) checkVerifyFiles(ctx context.Context) []doctorResult {
	type wanted struct {
		url     string
		secure  bool
		content []byte
	}
	var list []wanted
	runtime := d.runtimeFiles(ctx)
	for _, s := range d.config.public() {
		for _, h := range s.handlers {
			if h.name != "wechat_verify" {
				continue
			}
			var v Verify
			if json.Unmarshal(h.fields, &v) != nil {
				continue
			}
			files := filesOf(&v)
			for _, name := range runtime {
				if _, there := files[name]; !there {
					files[name] = nil // its content is not known here
				}
			}
			names := make([]string, 0, len(files))
			for name := range files {
				names = append(names, name)
			}
			slices.Sort(names)
			for _, name := range names[:min(len(names), maxDoctorFiles)] {
				list = append(list, wanted{s.origin() + path.Join("/", v.Path, name), s.secure, files[name]})
			}
		}
	}
	if len(list) == 0 {
		return []doctorResult{skippedOf("", "there are no verification files on a site with a public name", "公网站点上没有校验文件")}
	}
	client := d.client()
	return doctorEach(d, ctx, list, func(ctx context.Context, w wanted) doctorResult {
		a, err := d.ask(ctx, client, http.MethodGet, w.url, "", nil)
		if err != nil {
			return redOf(w.url, following("cannot be fetched: ", "无法获取：", tlsCause(err)), texts("see the checks dns and tls", "参见 dns 与 tls 检查"))
		}
		return judgeVerifyFile(w.url, a, w.content)
	})
}

func judgeVerifyFile(subject string, a *doctorAnswer, content []byte) doctorResult {
	serve := texts("serve it with wechat_verify, before any login, redirect or rewrite, on the http:// site too", "请在登录、重定向、改写之前用 wechat_verify 提供，http:// 站点也需要")
	again := texts("download the file again and do not open it", "请重新下载，不要打开")
	switch {
	case a.status >= 300 && a.status < 400:
		return redOf(subject, texts(fmt.Sprintf("is redirected (HTTP %d): WeChat may not follow", a.status), fmt.Sprintf("被重定向（HTTP %d）：微信可能不跟随", a.status)), serve)
	case a.status != http.StatusOK:
		return redOf(subject, texts(fmt.Sprintf("HTTP %d", a.status), fmt.Sprintf("返回 HTTP %d", a.status)), serve)
	case isPage(a.body):
		return redOf(subject, texts("is a web page", "返回的是网页"), texts("download the file again while logged in at WeChat's console; if the file is right, something answers before the gateway", "请登录微信后台重新下载；若文件无误，则有其他服务先行回复"))
	case bytes.HasPrefix(a.body, byteOrderMark):
		return redOf(subject, texts("begins with a byte order mark: WeChat says 86103", "以 BOM 开头：微信会报 86103"), texts("save the file without a BOM, or download it again", "请以无 BOM 方式保存，或重新下载"))
	case isUTF16(a.body):
		return redOf(subject, texts("is in UTF-16: WeChat says 86103", "是 UTF-16 编码：微信会报 86103"), again)
	case len(a.body) == 0:
		return redOf(subject, texts("is empty: WeChat says 86103", "内容为空：微信会报 86103"), again)
	case content != nil && !bytes.Equal(a.body, content):
		return redOf(subject, texts("is not what the config has: another file is served", "与配置中的内容不同：提供的是另一个文件"), texts("reload the gateway, or see what else serves this host", "请重新加载网关，或检查该域名由谁提供服务"))
	}
	if kind, _, _ := strings.Cut(a.header.Get("Content-Type"), ";"); kind != "text/plain" {
		return yellowOf(subject, texts("is served as '"+kind+"', not as text/plain", "Content-Type 为“"+kind+"”，不是 text/plain"), serve)
	}
	return greenOf(subject, "is served as it is", "内容正确")
}

// filesOf are the files that a handler serves from the config and its folder.
func filesOf(v *Verify) map[string][]byte {
	files := make(map[string][]byte)
	folder, err := resolver{repl: caddy.NewReplacer()}.required("folder", v.Folder)
	if err == nil {
		if dir, err := os.Open(folder); err == nil {
			names, _ := dir.Readdirnames(maxLookedThrough)
			_ = dir.Close()
			for _, name := range names {
				if !verifyName.MatchString(name) {
					continue
				}
				if content, err := readPlainFile(folder, name, maxVerifyFile); err == nil {
					files[name] = content
				}
			}
		}
	}
	for name, content := range v.Files {
		files[name] = []byte(content)
	}
	return files
}
