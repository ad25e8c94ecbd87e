package caddymodule

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// decryptParams are what decrypt is told.
type decryptParams struct {
	keys      keyParams
	address   string
	plaintext bool
	asJSON    bool
}

// decryptCommand is `caddy wechat decrypt`.
func decryptCommand() *cobra.Command {
	p := &decryptParams{}
	cmd := &cobra.Command{
		Use: "decrypt [<file>]", Short: "Opens a captured push, or says why it does not open", Args: cobra.MaximumNArgs(1),
		Long: `Opens a push that was captured, offline: what WeChat sent to an event or message URL. The file, or standard input, is the body
alone or a whole HTTP request with request line and headers. With a body alone, --url says what was requested, or its query;
without a query the signature cannot be checked.

The keys are those of all platforms and accounts of the config, of which nothing else needs to resolve, or those in the
files of --token, --aes-key and --appid.

When a push does not open it says which of token, aes_key, receive id, query and body is wrong: each token and each key is
tried by itself. The plaintext is shown on a terminal, or with --plaintext; else only what kind of message it is.

The exit code is 0 if it opens and its signature fits, or is not there; 2 if not; 1 if there are no keys or nothing to open.`,
		Example: "caddy wechat decrypt --config /etc/caddy/Caddyfile request.txt\n" +
			"caddy wechat decrypt --token @token --aes-key @key --appid wx1111111111111111 --url 'https://…?msg_signature=…' body.xml",
	}
	p.keys.flags(cmd)
	cmd.Flags().StringVarP(&p.address, "url", "u", "", "the URL that was requested, or its query, in quotes")
	cmd.Flags().BoolVar(&p.plaintext, "plaintext", false, "write the plaintext to standard output even if that is no terminal")
	cmd.Flags().BoolVar(&p.asJSON, "json", false, "print a JSON object")
	cmd.RunE = caddycmd.WrapCommandFuncForCobra(func(fl caddycmd.Flags) (int, error) {
		opened, err := p.run(fl.Args(), cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		switch {
		case err != nil:
			return caddy.ExitCodeFailedStartup, err
		case !opened:
			return exitFailed, nil
		}
		return caddy.ExitCodeSuccess, nil
	})
	return cmd
}

// run reads, opens and prints.
func (p *decryptParams) run(args []string, in io.Reader, out, talk io.Writer) (opened bool, err error) {
	keys, err := p.keys.load(talk)
	if err != nil {
		return false, err
	}
	data, err := readCapture(args, in)
	if err != nil {
		return false, err
	}
	c, err := parseCapture(data, p.address)
	if err != nil {
		return false, err
	}
	d := c.decrypt(keys)
	if p.asJSON {
		if p.plaintext && d.Opened {
			text := string(d.message)
			d.Plaintext = &text
		}
		line, err := json.Marshal(d)
		if err != nil {
			return false, err
		}
		return d.Opened, printJSON(out, line)
	}
	if !d.Opened || !p.plaintext && !isTerminal(out) {
		d.print(out)
		return d.Opened, nil
	}
	// The plaintext alone is what a pipe gets.
	d.print(talk)
	_, _ = io.WriteString(out, forTerminal(out, string(d.message)))
	if isTerminal(out) {
		_, _ = fmt.Fprintln(out)
	}
	return true, nil
}

func readCapture(args []string, in io.Reader) ([]byte, error) {
	if len(args) > 0 && args[0] != "-" {
		f, err := os.Open(args[0])
		if err != nil {
			return nil, err
		}
		defer func() { _ = f.Close() }()
		in = f
	}
	data, err := io.ReadAll(io.LimitReader(in, maxCapture+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxCapture {
		return nil, fmt.Errorf("more than %d bytes: this is no push", maxCapture)
	}
	return data, nil
}

// What keeps a push from opening.
const (
	verdictOpened    = "opened"
	verdictToken     = "token"      // it opens, and no token made its signature
	verdictKey       = "aes_key"    // the signature fits, and no key opens it
	verdictReceiveID = "receive_id" // it opens, and is for another appid
	verdictQuery     = "query"      // the query is not the push's, or not all of it
	verdictBody      = "body"       // no envelope, or not all of it, or another push's
	verdictBase64    = "base64"     // Encrypt is damaged
	verdictStranger  = "stranger"   // nothing fits: another platform's or account's
	verdictMixed     = "mixed"      // token and key are of different entries
)

// decryption is what became of a push.
type decryption struct {
	Opened    bool         `json:"opened"`
	Verdict   string       `json:"verdict"`
	Reason    tokens.Text  `json:"reason"`
	Remedy    *tokens.Text `json:"remedy,omitempty"`
	What      string       `json:"what,omitempty"`
	AppID     string       `json:"appid,omitempty"`
	ReceiveID string       `json:"receive_id,omitempty"`
	// Signed: a token made its signature. Without a query that is not known.
	Signed *bool `json:"signed,omitempty"`
	// Token and Key are which of the entry's fit, from 1 for the newest.
	Token int        `json:"token,omitempty"`
	Key   int        `json:"aes_key,omitempty"`
	Time  *time.Time `json:"time,omitempty"`

	Format       string   `json:"format,omitempty"`
	Encrypted    bool     `json:"encrypted"`
	BodyBytes    int      `json:"body_bytes"`
	MessageBytes int      `json:"message_bytes,omitempty"`
	Fields       []string `json:"fields,omitempty"`
	MsgType      string   `json:"msg_type,omitempty"`
	Event        string   `json:"event,omitempty"`
	InfoType     string   `json:"info_type,omitempty"`

	Tried     []triedKeys `json:"tried,omitempty"`
	Plaintext *string     `json:"plaintext,omitempty"`

	message []byte
	of      *pushKeys
}

// triedKeys is what of one entry fits.
type triedKeys struct {
	What      string `json:"what"`
	AppID     string `json:"appid"`
	Tokens    int    `json:"tokens"`
	AESKeys   int    `json:"aes_keys"`
	Token     int    `json:"token,omitempty"`     // that made msg_signature, from 1
	Signature bool   `json:"signature,omitempty"` // one made signature, which covers no body
	Key       int    `json:"aes_key,omitempty"`   // that opens it, from 1
	ReceiveID string `json:"receive_id,omitempty"`
}

// decrypt tries all keys on a push.
func (c *capture) decrypt(all []*pushKeys) *decryption {
	q := c.pushQuery()
	d := &decryption{BodyBytes: len(c.body), Time: stampTime(q.timestamp)}
	if len(c.body) == 0 && q.hasEcho {
		c.decryptEcho(d, q, all)
		return d
	}
	env, err := crypto.ScanEnvelope(c.body)
	if err != nil {
		c.decryptPlain(d, q, all, err)
		return d
	}
	d.Encrypted, d.Format = true, env.Format.String()
	c.decryptSealed(d, q, all, env)
	return d
}

// fail says why it does not open.
func (d *decryption) fail(verdict string, reason, remedy tokens.Text) {
	d.Verdict, d.Reason, d.Remedy = verdict, reason, &remedy
}

// opens takes the plaintext.
func (d *decryption) opens(of *pushKeys, message []byte, reason tokens.Text) {
	d.Opened, d.Verdict, d.Reason = true, verdictOpened, reason
	d.belongs(of)
	d.message, d.MessageBytes = message, len(message)
	var f crypto.Fields
	if crypto.ScanFields(message, &f) == nil {
		d.Fields, _ = crypto.FieldNames(message)
		d.MsgType, d.Event, d.InfoType = shownWord(f.MsgType), shownWord(f.Event), shownWord(f.InfoType)
	}
}

func (d *decryption) belongs(of *pushKeys) {
	if d.of = of; of != nil {
		d.What, d.AppID = of.what, of.appid
	}
}

// maxShown bounds what is shown of a message's type, which is a word of WeChat's.
const maxShown = 64

// shownWord is a type or event as it may be shown.
func shownWord(text crypto.Text) string {
	for _, c := range text {
		if c <= ' ' || c > '~' {
			return "?"
		}
	}
	return string(text[:min(len(text), maxShown)])
}

// The next steps.
var (
	remedyToken = texts("compare the token with 消息校验Token on the page of WeChat's console, for spaces too; after a change keep the old one as a second token", "核对微信后台的消息校验Token（注意首尾空格）；修改后请把旧值留作第二个 token")
	remedyKey   = texts("compare the aes_key with 消息加解密Key (EncodingAESKey) of WeChat's console; after a change keep the old one as a second aes_key", "核对微信后台的消息加解密Key（EncodingAESKey）；修改后请把旧值留作第二个 aes_key")
	remedyQuery = texts("give the query exactly as WeChat sent it, in single quotes: a shell ends a word at &", "请原样提供微信请求的查询串并用单引号括起：shell 会在 & 处截断")
	remedyBody  = texts("capture the body again, as bytes: an editor, a terminal or a log may have changed or cut it", "请重新按原始字节抓取正文：编辑器、终端或日志可能改动或截断了它")
)

func (c *capture) decryptSealed(d *decryption, q *pushQuery, all []*pushKeys, env crypto.Envelope) {
	params := crypto.Params{MsgSignature: q.msgSignature, Timestamp: q.timestamp, Nonce: q.nonce}
	var buffers crypto.Buffers
	encoded := true
	// The first of all that has a token, a key, both, a key for another appid, or a token by signature alone.
	var token, key, both, foreign, plain *pushKeys
	var message []byte
	found := make(map[*pushKeys]crypto.Diagnosis, len(all))
	for _, k := range all {
		g := k.codec.Diagnose(&buffers, params, env.Encrypt)
		tried := triedKeys{What: k.what, AppID: k.appid, Tokens: k.tokens, AESKeys: k.aesKeys, Token: g.Token + 1, Key: g.Key + 1, ReceiveID: g.ReceiveID}
		tried.Signature = q.signature != "" && k.codec.VerifySignature(q.signature, q.timestamp, q.nonce)
		d.Tried = append(d.Tried, tried)
		encoded = encoded && g.Encoded
		first(&token, k, g.Token >= 0)
		first(&plain, k, tried.Signature)
		own := g.Key >= 0 && g.ReceiveID == k.appid
		if own && (key == nil || g.Token >= 0 && both == nil) {
			message = append([]byte(nil), g.Message...)
		}
		first(&key, k, own)
		first(&foreign, k, g.Key >= 0 && !own)
		first(&both, k, own && g.Token >= 0)
		g.Message = nil // it lies in the buffers, which the next one takes
		found[k] = g
	}
	if c.hasQuery {
		signed := token != nil
		d.Signed = &signed
	}
	of := firstOf(both, key, foreign, token)
	d.belongs(of)
	if of != nil {
		d.Token, d.Key, d.ReceiveID = found[of].Token+1, found[of].Key+1, found[of].ReceiveID
	}
	doubt, cut := c.doubt(q, true), c.cutShort()
	switch {
	case both != nil && doubt.EN != "":
		d.fail(verdictQuery, doubt, remedyQuery) // the gateway refuses it all the same
	case both != nil && q.signature != "" && !d.tried(both).Signature:
		d.fail(verdictQuery, texts("it opens and msg_signature fits, but signature does not: that parameter was altered", "可以解密且 msg_signature 正确，但 signature 不符：该参数被改动过"), remedyQuery)
	case both != nil:
		d.opens(both, message, texts("it opens, and its signature fits", "可以解密，签名正确"))
	case !encoded && cut.EN != "":
		d.fail(verdictBody, cut, remedyBody)
	case !encoded:
		d.fail(verdictBase64, base64Doubt(env.Encrypt), remedyBody)
	case key != nil && !c.hasQuery:
		d.opens(key, message, texts("it opens; without the query the signature was not checked", "可以解密；没有查询串，未验证签名"))
	case token != nil && token != key && key != nil:
		d.fail(verdictMixed, texts(fmt.Sprintf("the token is that of %s, the aes_key that of %s", token, key), fmt.Sprintf("token 属于 %s，而 aes_key 属于 %s", token, key)),
			texts("the two come from one page of WeChat's console: put both of them into the same entry", "两者来自微信后台的同一页面：请放进同一个配置项"))
	case key != nil && doubt.EN != "":
		d.fail(verdictQuery, doubt, remedyQuery)
	case key != nil && d.tried(key).Signature:
		d.fail(verdictQuery, texts("the aes_key opens it and the token fits signature, but not msg_signature: that parameter was altered, or belongs to another push", "aes_key 可以解密，token 与 signature 相符，但 msg_signature 不符：该参数被改动，或属于另一条推送"), remedyQuery)
	case key != nil:
		d.fail(verdictToken, texts(fmt.Sprintf("the aes_key of %s opens it, but its token did not sign it; that would be so too if timestamp, nonce and the signatures were altered", key),
			fmt.Sprintf("%s 的 aes_key 可以解密，但签名不是由其 token 产生；若 timestamp、nonce 和签名被改动也会如此", key)), remedyToken)
	case foreign != nil:
		id := found[foreign].ReceiveID
		d.fail(verdictReceiveID, texts(fmt.Sprintf("the aes_key of %s opens it, but it was encrypted for %s", foreign, id), fmt.Sprintf("%s 的 aes_key 可以解密，但它是为 %s 加密的", foreign, id)),
			texts("configure "+id+", or give each platform and account a token and key of its own; pushes for authorizers are encrypted for the platform's appid", "请配置 "+id+"，或让每个平台与账号各用自己的 token 与 key；授权方的推送使用平台的 appid 加密"))
	case cut.EN != "":
		d.fail(verdictBody, cut, remedyBody)
	case token != nil && token.aesKeys == 0:
		d.fail(verdictKey, texts(fmt.Sprintf("the token of %s signed it, and it has no aes_key", token), fmt.Sprintf("签名由 %s 的 token 产生，但未配置 aes_key", token)), remedyKey)
	case token != nil:
		d.fail(verdictKey, texts(fmt.Sprintf("the token of %s signed it, but no aes_key opens it", token), fmt.Sprintf("签名由 %s 的 token 产生，但没有 aes_key 能解密", token)), remedyKey)
	case doubt.EN != "":
		d.fail(verdictQuery, doubt, remedyQuery)
	case plain != nil:
		d.belongs(plain)
		d.fail(verdictBody, texts(fmt.Sprintf("the token of %s made signature, which covers no body, but neither msg_signature fits nor an aes_key opens it: body and query are of different pushes, or the body was altered", plain),
			fmt.Sprintf("signature（不含正文）由 %s 的 token 产生，但 msg_signature 不符且无法解密：正文与查询串不属于同一条推送，或正文被改动", plain)), remedyBody)
	case !c.hasQuery:
		d.fail(verdictKey, texts("no configured aes_key opens it; without the query it is not known whether a token fits", "没有已配置的 aes_key 能解密；没有查询串，无法得知 token 是否相符"), remedyKey)
	default:
		d.fail(verdictStranger, texts("neither a token nor an aes_key fits: it is for a platform or account that is not configured, or both were changed", "token 与 aes_key 都不相符：它属于未配置的平台或账号，或两者都已修改"),
			texts("look in the push for whom it is (AppId or ToUserName of the envelope, the appid in the path), then compare token and aes_key with that one's page of WeChat's console", "先看推送属于谁（信封中的 AppId 或 ToUserName、路径中的 appid），再核对微信后台中它那一页的 token 与 aes_key"))
	}
}

func first(to **pushKeys, k *pushKeys, fits bool) {
	if fits && *to == nil {
		*to = k
	}
}

func firstOf(list ...*pushKeys) *pushKeys {
	for _, k := range list {
		if k != nil {
			return k
		}
	}
	return nil
}

// tried is what of an entry fits.
func (d *decryption) tried(k *pushKeys) triedKeys {
	for _, t := range d.Tried {
		if t.What == k.what && t.AppID == k.appid {
			return t
		}
	}
	return triedKeys{}
}

// base64Doubt says how Encrypt is damaged.
func base64Doubt(encrypt []byte) tokens.Text {
	text := string(encrypt)
	switch {
	case strings.Contains(text, " "):
		return texts("Encrypt has spaces in it, where + belongs: something decoded the body as a form", "Encrypt 中的 + 变成了空格：正文被当作表单解码过")
	case strings.Contains(text, "%2B") || strings.Contains(text, "%2F") || strings.Contains(text, "%3D"):
		return texts("Encrypt is percent-escaped", "Encrypt 被做了百分号转义")
	case strings.ContainsAny(text, "\r\n"):
		return texts("Encrypt has line breaks in it", "Encrypt 中有换行")
	case strings.ContainsAny(text, "-_"):
		return texts("Encrypt is in the base64 of URLs, with - and _ for + and /", "Encrypt 是 URL 形式的 base64（- 和 _ 代替了 + 和 /）")
	}
	return texts(fmt.Sprintf("Encrypt, of %d characters, is not the base64 of whole blocks of 32 bytes: it was cut or altered", len(text)), fmt.Sprintf("Encrypt（%d 个字符）不是 32 字节整块的 base64：被截断或改动过", len(text)))
}

// decryptPlain is for a body without an envelope: a push in plaintext mode, or none. Cause is why it is no envelope.
func (c *capture) decryptPlain(d *decryption, q *pushQuery, all []*pushKeys, cause error) {
	var f crypto.Fields
	if crypto.ScanFields(c.body, &f) != nil || len(f.MsgType) == 0 && len(f.InfoType) == 0 {
		reason := c.cutShort()
		if reason.EN == "" {
			text := strings.TrimPrefix(cause.Error(), crypto.ErrEnvelope.Error()+": ")
			reason = texts("the body is no envelope with Encrypt, and no message: "+text, "正文既不是含 Encrypt 的信封，也不是消息："+text)
		}
		d.fail(verdictBody, reason, remedyBody)
		return
	}
	d.Format = f.Format.String()
	if !c.hasQuery {
		d.opens(nil, c.body, texts("it is not encrypted (明文模式); without the query the signature was not checked", "未加密（明文模式）；没有查询串，未验证签名"))
		return
	}
	of := c.signer(d, q, all)
	switch doubt := c.doubt(q, false); {
	case of != nil:
		d.opens(of, c.body, texts("it is not encrypted (明文模式), and its signature, which covers no body, fits", "未加密（明文模式），签名（不含正文）正确"))
	case doubt.EN != "":
		d.fail(verdictQuery, doubt, remedyQuery)
	default:
		d.fail(verdictToken, texts("it is not encrypted (明文模式), and no token made its signature", "未加密（明文模式），且签名不是由任何 token 产生"), remedyToken)
	}
}

// signer is whose token made signature.
func (c *capture) signer(d *decryption, q *pushQuery, all []*pushKeys) *pushKeys {
	var of *pushKeys
	for _, k := range all {
		fits := k.codec.VerifySignature(q.signature, q.timestamp, q.nonce)
		d.Tried = append(d.Tried, triedKeys{What: k.what, AppID: k.appid, Tokens: k.tokens, AESKeys: k.aesKeys, Signature: fits})
		first(&of, k, fits)
	}
	signed := of != nil
	d.Signed = &signed
	return of
}

// decryptEcho is for the handshake, a GET with echostr.
func (c *capture) decryptEcho(d *decryption, q *pushQuery, all []*pushKeys) {
	if q.msgSignature != "" {
		d.Encrypted = true
		c.decryptSealed(d, q, all, crypto.Envelope{Encrypt: []byte(q.echoStr)})
		return
	}
	of := c.signer(d, q, all)
	switch doubt := c.doubt(q, false); {
	case of != nil:
		d.opens(of, []byte(q.echoStr), texts("it is WeChat's check of a URL (服务器配置校验), and its signature fits", "这是微信的服务器配置校验，签名正确"))
	case doubt.EN != "":
		d.fail(verdictQuery, doubt, remedyQuery)
	default:
		d.fail(verdictToken, texts("it is WeChat's check of a URL (服务器配置校验), and no token made its signature", "这是微信的服务器配置校验，签名不是由任何 token 产生"), remedyToken)
	}
}

// print shows all but the plaintext.
func (d *decryption) print(w io.Writer) {
	line := func(name, format string, args ...any) {
		_, _ = fmt.Fprintf(w, "%-9s %s\n", name, shown(fmt.Sprintf(format, args...)))
	}
	head := "opened"
	if !d.Opened {
		head = "wrong"
		line(head, "%s", d.Verdict)
		line("", "%s", d.Reason.EN)
		line("", "%s", d.Reason.ZH)
		line("remedy", "%s", d.Remedy.EN)
		line("处理", "%s", d.Remedy.ZH)
	} else {
		line(head, "%s", d.Reason.EN)
		line("", "%s", d.Reason.ZH)
	}
	if d.of != nil {
		line("keys", "%s%s", d.of, d.which())
	}
	if d.ReceiveID != "" {
		line("for", "%s", d.ReceiveID)
	}
	if d.Time != nil {
		line("time", "%s", d.Time.Format(time.RFC3339))
	}
	size := fmt.Sprintf("%d bytes", d.BodyBytes)
	if d.Format != "" {
		size += " of " + d.Format
	}
	if d.MessageBytes > 0 && d.Encrypted {
		size += fmt.Sprintf(", %d decrypted", d.MessageBytes)
	}
	line("body", "%s", size)
	var kind []string
	for _, word := range []string{d.MsgType, d.Event, d.InfoType} {
		if word != "" {
			kind = append(kind, word)
		}
	}
	if len(kind) > 0 {
		line("type", "%s", strings.Join(kind, " "))
	}
	if len(d.Fields) > 0 {
		line("fields", "%s", strings.Join(d.Fields, " "))
	}
	if !d.Opened {
		for _, t := range d.Tried {
			line("tried", "%s %s: %s", t.What, t.AppID, t.result())
		}
	}
}

// which tokens and keys of the entry it were.
func (d *decryption) which() string {
	text := ""
	if d.Token > 0 {
		text += fmt.Sprintf(", token %d of %d", d.Token, d.of.tokens)
	}
	if d.Key > 0 {
		text += fmt.Sprintf(", aes_key %d of %d", d.Key, d.of.aesKeys)
	}
	return text
}

func (t triedKeys) result() string {
	var fits []string
	if t.Token > 0 {
		fits = append(fits, fmt.Sprintf("token %d fits msg_signature", t.Token))
	}
	if t.Signature {
		fits = append(fits, "a token fits signature")
	}
	if t.Key > 0 {
		fits = append(fits, fmt.Sprintf("aes_key %d opens it", t.Key))
	}
	if len(fits) == 0 {
		return fmt.Sprintf("none of %d tokens and %d aes_keys fits", t.Tokens, t.AESKeys)
	}
	return strings.Join(fits, ", ")
}
