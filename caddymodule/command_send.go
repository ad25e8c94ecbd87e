package caddymodule

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

const (
	// pushPatience is how long WeChat waits for an answer.
	pushPatience = 5 * time.Second
	// maxSendTimes bounds how often send pushes.
	maxSendTimes = 10
	// maxSendReply bounds an answer that is read, in bytes.
	maxSendReply = 1 << 20

	sendOpenID = "oTestUser0000000000000000000"
	sendTo     = "gh_000000000000"
)

// weixinDomains are WeChat's own, with all below them: nobody's backend is there.
var weixinDomains = []string{"qq.com", "weixin.com", "wechat.com", "servicewechat.com", "weixinbridge.com", "tenpay.com"}

// isWeChatHost reports whether a host is WeChat's.
func isWeChatHost(host string) bool {
	host = strings.TrimSuffix(strings.ToLower(host), ".")
	return slices.ContainsFunc(weixinDomains, func(own string) bool { return host == own || strings.HasSuffix(host, "."+own) })
}

// sendParams are what send is told.
type sendParams struct {
	keys                                          keyParams
	msgType, content, event, eventKey, openID, to string
	text                                          string // @file with an own plaintext
	format                                        string
	plain, echo, asJSON                           bool
	times                                         int

	patience time.Duration     // of WeChat's; tests have less
	client   http.RoundTripper // nil: the network
}

// sendCommand is `caddy wechat send`.
func sendCommand() *cobra.Command {
	p := &sendParams{patience: pushPatience}
	cmd := &cobra.Command{
		Use: "send <url>", Short: "Sends a test push, signed and encrypted as WeChat does", Args: cobra.ExactArgs(1),
		Long: `Sends a push as WeChat would to a gateway or to any backend, and shows what came back: status, time, and the reply, decrypted and
verified. It is encrypted with the newest token and key of the config's platform or account (--appid says which, if there
are several), or with those in the files of --token, --aes-key and --appid. The URL is the whole of it: for a platform the
path has the appid of the account, as 消息与事件接收URL has it.

With --plain it goes to a backend directly, in the form that the gateway would hand on: plaintext, with the X-Wechat-*
headers. No keys are needed then. With --echostr it is WeChat's check of a URL. A message that is an event of a platform's (InfoType)
comes from --xml.

Like WeChat it waits 5 seconds for an answer. With --times it pushes an unanswered message again, with the same MsgId.

The exit code is 0 if it was answered as WeChat wants it, 2 if not, 1 if it could not be sent.`,
		Example: "caddy wechat send --config Caddyfile --appid wx2222222222222222 --content hello http://localhost/wx/message/wx2222222222222222\n" +
			"caddy wechat send --plain --event CLICK --event-key menu-1 http://127.0.0.1:8080/",
	}
	p.keys.flags(cmd)
	f := cmd.Flags()
	f.StringVar(&p.msgType, "type", "text", "MsgType of the message; other fields than text's and an event's come with --xml")
	f.StringVar(&p.content, "content", "test", "content of a text")
	f.StringVar(&p.event, "event", "", "Event, such as CLICK or subscribe; makes it an event")
	f.StringVar(&p.eventKey, "event-key", "", "EventKey of an event")
	f.StringVar(&p.openID, "openid", sendOpenID, "who sends it")
	f.StringVar(&p.to, "to", sendTo, "gh_ id of the account; a gateway that knows the account's refuses another")
	f.StringVar(&p.text, "xml", "", "@file with a plaintext of your own, XML or JSON, instead of all of these")
	f.StringVar(&p.format, "format", "xml", "data format: xml or json")
	f.BoolVar(&p.plain, "plain", false, "as a backend behind the gateway gets it: in plaintext")
	f.BoolVar(&p.echo, "echostr", false, "the check of a URL (GET with echostr) instead of a message")
	f.IntVar(&p.times, "times", 1, "how often to push while it is not answered; WeChat does 3")
	f.BoolVar(&p.asJSON, "json", false, "print a JSON object")
	_ = cmd.RegisterFlagCompletionFunc("type", cobra.FixedCompletions([]string{"text", "event", "image", "voice", "video", "location", "link"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("event", cobra.FixedCompletions([]string{"subscribe", "unsubscribe", "SCAN", "LOCATION", "CLICK", "VIEW"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"xml", "json"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("xml", func(_ *cobra.Command, _ []string, toComplete string) ([]string, cobra.ShellCompDirective) {
		return secretFiles(toComplete), cobra.ShellCompDirectiveNoSpace | cobra.ShellCompDirectiveNoFileComp
	})
	cmd.RunE = caddycmd.WrapCommandFuncForCobra(func(fl caddycmd.Flags) (int, error) {
		ctx, cancel := interruptible()
		defer cancel()
		well, err := p.run(ctx, fl.Arg(0), cmd.OutOrStdout(), cmd.ErrOrStderr())
		switch {
		case err != nil:
			return caddy.ExitCodeFailedStartup, err
		case !well:
			return exitFailed, nil
		}
		return caddy.ExitCodeSuccess, nil
	})
	return cmd
}

// target checks where it goes.
func (p *sendParams) target(address string, talk io.Writer) (*url.URL, error) {
	u, err := url.Parse(address)
	switch {
	case err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https":
		return nil, errors.New("not a URL: give all of it, such as https://wechat.example.com/wx/message/wx2222222222222222")
	case u.User != nil:
		return nil, errors.New("WeChat sends no user and password: leave them out of the URL")
	case isWeChatHost(u.Hostname()):
		return nil, fmt.Errorf("%s is WeChat's own: a push goes to a gateway or a backend of yours", u.Hostname())
	case p.times < 1 || p.times > maxSendTimes:
		return nil, fmt.Errorf("--times: want a number from 1 to %d", maxSendTimes)
	case p.format != "xml" && p.format != "json":
		return nil, fmt.Errorf("--format: '%s' is none: want xml or json", p.format)
	}
	if !tokens.IsLoopbackHost(u.Hostname()) {
		_, _ = fmt.Fprintf(talk, "warning: %s is not this machine: what answers there takes the push for a real one\n", u.Hostname())
	}
	u.Fragment = ""
	return u, nil
}

// chosen are the keys to push with; nil where none are needed.
func (p *sendParams) chosen(u *url.URL, talk io.Writer) (*pushKeys, error) {
	if p.plain && len(p.keys.tokens) == 0 && p.keys.config == "" {
		return nil, nil
	}
	all, err := p.keys.load(talk)
	if err != nil {
		return nil, err
	}
	if p.keys.appid == "" && len(all) > 1 {
		// The path names the account, or the only platform is meant.
		var platforms []*pushKeys
		for _, k := range all {
			switch {
			case k.what == ofPlatform:
				platforms = append(platforms, k)
			case slices.Contains(strings.Split(u.Path, "/"), k.appid):
				return k, nil
			}
		}
		if all = platforms; len(all) != 1 {
			return nil, errors.New("--appid: the config has several platforms or accounts: say which one's keys to push with")
		}
	}
	k := all[0]
	if !p.plain && !p.echo && k.aesKeys == 0 && k.mode != modePlain && len(p.keys.tokens) > 0 {
		return nil, errors.New("--aes-key is missing: give it, or --plain for a push that is not encrypted")
	}
	return k, nil
}

// message is the plaintext.
func (p *sendParams) message(now time.Time) ([]byte, error) {
	if p.text != "" {
		if !strings.HasPrefix(p.text, "@") || p.text == "@" {
			return nil, errors.New("--xml: want @file, a file with the plaintext")
		}
		f, err := os.Open(p.text[1:])
		if err != nil {
			return nil, fmt.Errorf("--xml: %w", err)
		}
		defer func() { _ = f.Close() }()
		text, err := io.ReadAll(io.LimitReader(f, defaultMaxBody+1))
		if err != nil {
			return nil, fmt.Errorf("--xml: %w", err)
		}
		if len(text) > defaultMaxBody {
			return nil, fmt.Errorf("--xml: more than %d bytes", defaultMaxBody)
		}
		text = bytes.TrimRight(text, "\r\n")
		var fields crypto.Fields
		if err := crypto.ScanFields(text, &fields); err != nil {
			return nil, fmt.Errorf("--xml: %w", err)
		}
		return text, nil
	}
	fields := [][2]string{{"ToUserName", p.to}, {"FromUserName", p.openID}, {"CreateTime", strconv.FormatInt(now.Unix(), 10)}}
	switch {
	case p.event != "" || p.msgType == "event":
		if p.event == "" {
			return nil, errors.New("--type event needs --event, such as CLICK")
		}
		fields = append(fields, [][2]string{{"MsgType", "event"}, {"Event", p.event}, {"EventKey", p.eventKey}}...)
	case p.msgType == "text":
		fields = append(fields, [][2]string{{"MsgType", "text"}, {"Content", p.content}, {"MsgId", strconv.FormatInt(now.UnixNano(), 10)}}...)
	default:
		fields = append(fields, [][2]string{{"MsgType", p.msgType}, {"MediaId", "test-media-id"}, {"MsgId", strconv.FormatInt(now.UnixNano(), 10)}}...)
	}
	return writeMessage(p.format, fields)
}

// writeMessage writes fields as WeChat does: numbers bare, texts in CDATA sections or quotes.
func writeMessage(format string, fields [][2]string) ([]byte, error) {
	var b bytes.Buffer
	number := func(name string) bool { return name == "CreateTime" || name == "MsgId" }
	if format == "json" {
		for i, f := range fields {
			b.WriteByte("{,"[min(i, 1)])
			value, err := json.Marshal(f[1])
			if err != nil {
				return nil, err
			}
			if number(f[0]) {
				value = []byte(f[1])
			}
			_, _ = fmt.Fprintf(&b, "%q:%s", f[0], value)
		}
		b.WriteByte('}')
	} else {
		b.WriteString("<xml>")
		for _, f := range fields {
			value := "<![CDATA[" + strings.ReplaceAll(f[1], "]]>", "]]]]><![CDATA[>") + "]]>"
			if number(f[0]) {
				value = f[1]
			}
			_, _ = fmt.Fprintf(&b, "<%s>%s</%s>", f[0], value, f[0])
		}
		b.WriteString("</xml>")
	}
	var check crypto.Fields
	err := crypto.ScanFields(b.Bytes(), &check)
	if err == nil { // of control characters too, which WeChat lets pass: with --xml one can send them
		_, err = crypto.ScanElements(b.Bytes(), check.Format)
	}
	if err != nil {
		return nil, fmt.Errorf("a value that %s cannot carry: %w", format, err)
	}
	return b.Bytes(), nil
}

// sent is one try of a push.
type sent struct {
	Status  int    `json:"status,omitempty"`
	TookMS  int64  `json:"took_ms"`
	Error   string `json:"error,omitempty"`
	body    []byte
	nonce   string
	echo    string
	dropped bool // it was not answered in time
}

// sendResult is what came of all tries.
type sendResult struct {
	OK    bool         `json:"ok"`
	Keys  string       `json:"keys,omitempty"`
	Tries []sent       `json:"tries"`
	Kind  string       `json:"kind,omitempty"` // success, reply, echostr
	Reply string       `json:"reply,omitempty"`
	Wrong *tokens.Text `json:"wrong,omitempty"`
}

// run sends, judges and prints.
func (p *sendParams) run(ctx context.Context, address string, out, talk io.Writer) (well bool, err error) {
	u, err := p.target(address, talk)
	if err != nil {
		return false, err
	}
	keys, err := p.chosen(u, talk)
	if err != nil {
		return false, err
	}
	now := time.Now()
	message, err := p.message(now)
	if err != nil {
		return false, err
	}
	o := &outgoing{params: p, url: u, keys: keys, message: message}
	_ = crypto.ScanFields(message, &o.fields)
	result := sendResult{}
	if keys != nil {
		result.Keys = keys.String()
	}
	client := o.client()
	defer client.CloseIdleConnections()
	for range p.times {
		r, s, err := o.compose()
		if err != nil {
			return false, err
		}
		o.send(ctx, client, r, s)
		result.Tries = append(result.Tries, *s)
		if !s.dropped || ctx.Err() != nil {
			break
		}
	}
	o.judge(&result)
	if p.asJSON {
		line, err := json.Marshal(result)
		if err != nil {
			return false, err
		}
		return result.OK, printJSON(out, line)
	}
	result.print(out)
	return result.OK, nil
}

// outgoing is a push on its way.
type outgoing struct {
	params  *sendParams
	url     *url.URL
	keys    *pushKeys
	message []byte
	fields  crypto.Fields
}

// client is WeChat as a client: no redirects, and the environment's proxy is not WeChat's.
func (o *outgoing) client() *http.Client {
	transport := o.params.client
	if transport == nil {
		transport = &http.Transport{TLSHandshakeTimeout: pushPatience, DisableCompression: true}
	}
	return &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// digits are n random ones, the first no zero.
func digits(n int) string {
	text := make([]byte, n)
	for i := range text {
		d, err := rand.Int(rand.Reader, big.NewInt(9))
		if err != nil {
			return strings.Repeat("1", n) // crypto/rand does not fail
		}
		text[i] = '1' + byte(d.Int64()) //nolint:gosec // below 9
	}
	return string(text)
}

// compose makes the request of one try: a timestamp, a nonce and a ciphertext of its own.
func (o *outgoing) compose() (*http.Request, *sent, error) {
	p, s := o.params, &sent{nonce: digits(10)}
	now := time.Now().Unix()
	stamp := strconv.FormatInt(now, 10)
	var query [][2]string
	if o.keys != nil {
		query = append(query, [2]string{"signature", o.keys.codec.Signature(stamp, s.nonce)})
	}
	query = append(query, [2]string{"timestamp", stamp}, [2]string{"nonce", s.nonce})
	method, body := http.MethodPost, o.message
	openID := string(o.fields.FromUserName)
	switch {
	case p.echo:
		s.echo = digits(19)
		method, body = http.MethodGet, nil
		query = append(query, [2]string{"echostr", s.echo})
	case openID != "":
		query = append(query, [2]string{"openid", openID})
	}
	if !p.echo && o.sealed() {
		idName, id := "ToUserName", string(o.fields.ToUserName)
		if len(o.fields.InfoType) > 0 && len(o.fields.MsgType) == 0 {
			idName, id = "AppId", o.keys.appid
		}
		var signature string
		var err error
		if body, signature, err = o.keys.codec.SealPush(&crypto.Buffers{}, o.fields.Format, idName, id, now, s.nonce, o.message); err != nil {
			return nil, nil, err
		}
		query = append(query, [2]string{"encrypt_type", "aes"}, [2]string{"msg_signature", signature})
	}
	target := *o.url
	parts := make([]string, len(query))
	for i, q := range query {
		parts[i] = q[0] + "=" + url.QueryEscape(q[1])
	}
	if target.RawQuery != "" {
		target.RawQuery += "&"
	}
	target.RawQuery += strings.Join(parts, "&")
	r, err := http.NewRequest(method, target.String(), bytes.NewReader(body))
	if err != nil {
		return nil, nil, errors.New("not a URL that can be requested")
	}
	r.Header.Set("User-Agent", "Mozilla/4.0")
	r.Header.Set("Accept", "*/*")
	if method == http.MethodPost {
		r.Header.Set("Content-Type", "text/xml")
		if o.fields.Format == crypto.FormatJSON {
			r.Header.Set("Content-Type", "application/json")
		}
	}
	if p.plain && !p.echo {
		o.gatewayHeaders(r.Header)
	}
	return r, s, nil
}

// sealed reports whether the message is encrypted.
func (o *outgoing) sealed() bool { return !o.params.plain && o.keys != nil && o.keys.aesKeys > 0 }

// gatewayHeaders are those that a backend behind the gateway gets.
func (o *outgoing) gatewayHeaders(h http.Header) {
	h.Set("Content-Type", contentType(o.fields.Format))
	appid, platform := o.params.keys.appid, ""
	if o.keys != nil {
		if appid = o.keys.appid; o.keys.what == ofPlatform {
			platform, appid = o.keys.appid, ""
		}
	}
	for segment := range strings.SplitSeq(o.url.Path, "/") {
		if isAppID(segment) && segment != platform {
			appid = segment
		}
	}
	event := string(o.fields.Event)
	if isMessageType(o.fields.MsgType) {
		event = ""
	}
	for _, v := range [...]struct{ name, value string }{
		{headerAppID, appid}, {headerPlatform, platform}, {headerOpenID, string(o.fields.FromUserName)},
		{headerMsgType, string(o.fields.MsgType)}, {headerEvent, event},
	} {
		if isTrusted(v.value) {
			h.Set(v.name, v.value)
		}
	}
}

// send makes one try.
func (o *outgoing) send(ctx context.Context, client *http.Client, r *http.Request, s *sent) {
	ctx, cancel := context.WithTimeout(ctx, o.params.patience)
	defer cancel()
	started := time.Now()
	defer func() { s.TookMS = time.Since(started).Milliseconds() }()
	res, err := client.Do(r.WithContext(ctx))
	if err == nil {
		defer func() { _ = res.Body.Close() }()
		s.Status = res.StatusCode
		s.body, err = io.ReadAll(io.LimitReader(res.Body, maxSendReply+1))
	}
	if err != nil {
		s.dropped = true
		if s.Error = plainCause(err).Error(); errors.Is(err, context.DeadlineExceeded) {
			s.Error = fmt.Sprintf("no answer within %s, when WeChat hangs up", o.params.patience)
		}
	}
}

// plainCause is an error of net/http's without the URL, which has signatures in it.
func plainCause(err error) error {
	if inner, ok := errors.AsType[*url.Error](err); ok {
		return inner.Err
	}
	return err
}

// judge says whether the last answer is one that WeChat takes.
func (o *outgoing) judge(r *sendResult) {
	s := &r.Tries[len(r.Tries)-1]
	wrong := func(en, zh string) { r.Wrong = &tokens.Text{EN: en, ZH: zh} }
	body := bytes.TrimSpace(s.body)
	switch {
	case s.Error != "":
		wrong("it was not answered: "+s.Error, "没有得到回复")
	case s.Status >= 300 && s.Status < 400:
		wrong(fmt.Sprintf("HTTP %d: WeChat follows no redirect of a push; give the URL that it leads to", s.Status), fmt.Sprintf("HTTP %d：微信推送不跟随重定向，请填写最终的 URL", s.Status))
	case s.Status == http.StatusForbidden:
		wrong("HTTP 403: refused; a gateway says why in its log: token, aes_key, clock, or --to is another account's gh_ id", "HTTP 403：被拒绝；原因见网关日志：token、aes_key、时钟，或 --to 不是该账号的原始 ID")
	case s.Status != http.StatusOK:
		wrong(fmt.Sprintf("HTTP %d: WeChat wants 200", s.Status), fmt.Sprintf("HTTP %d：微信要求 200", s.Status))
	case len(s.body) > maxSendReply:
		wrong(fmt.Sprintf("the reply has more than %d bytes", maxSendReply), "回复过大")
	case o.params.echo && string(s.body) != s.echo:
		wrong("the answer is not echostr, byte for byte", "回复与 echostr 不完全一致")
	case o.params.echo:
		r.OK, r.Kind = true, "echostr"
	case len(body) == 0 || string(body) == "success":
		r.OK, r.Kind = true, "success"
	case o.sealed():
		o.judgeSealed(r, body)
	default:
		var f crypto.Fields
		if err := crypto.ScanFields(body, &f); err != nil || len(f.MsgType) == 0 {
			wrong("the reply is neither `success` nor empty nor a message", "回复既不是 success、空，也不是消息")
			return
		}
		o.judgeMessage(r, body, &f)
	}
}

func (o *outgoing) judgeSealed(r *sendResult, body []byte) {
	wrong := func(en, zh string) { r.Wrong = &tokens.Text{EN: en, ZH: zh} }
	message, err := o.keys.codec.OpenReply(body)
	switch {
	case errors.Is(err, crypto.ErrEnvelope):
		var f crypto.Fields
		if crypto.ScanFields(body, &f) == nil && len(f.MsgType) > 0 {
			wrong("the reply is not encrypted: in 安全模式 WeChat does not take it", "回复未加密：安全模式下微信不接受")
			return
		}
		wrong("the reply is neither `success` nor empty nor an encrypted message", "回复既不是 success、空，也不是加密消息")
	case errors.Is(err, crypto.ErrReceiveID):
		wrong("the reply was encrypted for another appid", "回复是为另一个 appid 加密的")
	case errors.Is(err, crypto.ErrSignature):
		wrong("the reply's MsgSignature fits no token", "回复的 MsgSignature 与 token 不符")
	case err != nil:
		wrong("the reply opens with no key", "回复无法用任何 key 解密")
	default:
		if string(bytes.TrimSpace(message)) == "success" {
			wrong("`success` is encrypted: WeChat takes it only in the clear", "success 被加密了：微信只接受明文 success")
			return
		}
		var f crypto.Fields
		if crypto.ScanFields(message, &f) != nil || len(f.MsgType) == 0 {
			wrong("the decrypted reply is no message", "解密后的回复不是消息")
			return
		}
		o.judgeMessage(r, message, &f)
	}
}

// judgeMessage looks at a passive reply.
func (o *outgoing) judgeMessage(r *sendResult, message []byte, f *crypto.Fields) {
	r.Reply = string(message)
	switch {
	case f.Format != o.fields.Format:
		r.Wrong = &tokens.Text{EN: "the reply is " + f.Format.String() + ", the push was " + o.fields.Format.String(), ZH: "回复的数据格式与推送不同"}
	case len(o.fields.FromUserName) > 0 && !bytes.Equal(f.ToUserName, o.fields.FromUserName):
		r.Wrong = &tokens.Text{EN: "the reply's ToUserName is not the sender", ZH: "回复的 ToUserName 不是发送者"}
	default:
		r.OK, r.Kind = true, "reply"
	}
}

func (r *sendResult) print(w io.Writer) {
	line := func(name, format string, args ...any) {
		_, _ = fmt.Fprintf(w, "%-9s %s\n", name, shown(fmt.Sprintf(format, args...)))
	}
	if r.Keys != "" {
		line("keys", "%s", r.Keys)
	}
	for i, s := range r.Tries {
		if s.Error != "" {
			line("push "+strconv.Itoa(i+1), "%s, after %d ms", s.Error, s.TookMS)
			continue
		}
		line("push "+strconv.Itoa(i+1), "HTTP %d after %d ms, %d bytes", s.Status, s.TookMS, len(s.body))
	}
	if r.Wrong != nil {
		line("wrong", "%s", r.Wrong.EN)
		line("", "%s", r.Wrong.ZH)
	} else {
		line("answered", "%s", r.Kind)
		if n := len(r.Tries); r.Keys != "" && r.Kind == "success" && n > 0 && len(bytes.TrimSpace(r.Tries[n-1].body)) == 0 {
			line("", "%s", "with nothing, as Caddy also does where no site or route has this URL: --echostr tells them apart")
			line("", "%s", "正文为空；没有站点或路由对应此 URL 时 Caddy 也这样应答：用 --echostr 区分")
		}
	}
	if r.Reply != "" {
		_, _ = fmt.Fprintf(w, "\n%s\n", forTerminal(w, r.Reply))
	}
}
