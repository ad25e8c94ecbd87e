package caddymodule

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// Platform is a third-party platform (第三方平台, component). Secrets may be placeholders such as {env.NAME},
// which are resolved when the config is loaded and never appear in what Caddy shows of its config.
type Platform struct {
	// AppID is the platform's appid: wx and 16 lower-case hexadecimal digits. Required.
	AppID string `json:"appid,omitempty"`
	// Secret is the platform's AppSecret. Required.
	Secret string `json:"secret,omitempty"`
	// Tokens are the 消息校验Token, newest first. At least one; the second and later may resolve to nothing.
	Tokens []string `json:"tokens,omitempty"`
	// AESKeys are the 消息加解密Key (EncodingAESKey, 43 characters), newest first. At least one; the second and
	// later may resolve to nothing.
	AESKeys []string `json:"aes_keys,omitempty"`
	// ReleaseCheck lets the gateway answer WeChat's automated acceptance check (全网发布接入检测) itself, for
	// WeChat's own test accounts only. Default: true.
	ReleaseCheck *bool `json:"release_check,omitempty"`

	codec  *crypto.Codec
	prints fingerprints
	ring   *ring
	secret secret.String
}

// Account is a plain 公众号 or 小程序 that has a secret of its own.
type Account struct {
	// AppID is the account's appid: wx and 16 lower-case hexadecimal digits. Required.
	AppID string `json:"appid,omitempty"`
	// Secret is the account's AppSecret. Required.
	Secret string `json:"secret,omitempty"`
	// Tokens are the server configuration's Token, newest first. Needed only to receive pushes. Default: none.
	Tokens []string `json:"tokens,omitempty"`
	// AESKeys are the EncodingAESKey, newest first. Needed in 安全模式 and 兼容模式. Default: none.
	AESKeys []string `json:"aes_keys,omitempty"`
	// Mode is how WeChat's console says that pushes come: safe (安全模式), compat (兼容模式), of which only the encrypted
	// part is used, or plain (明文模式). In safe and compat a push that is not encrypted is refused. In plain WeChat signs
	// no body, so that loading warns; one that is encrypted is accepted there too, if there is a key that opens it.
	// Default: safe with AESKeys, else plain.
	Mode string `json:"mode,omitempty"`

	codec  *crypto.Codec // nil: receives no pushes
	prints fingerprints
	ring   *ring
	secret secret.String
	mode   string // Mode, or its default
}

// The modes of an account's pushes.
const (
	modePlain  = "plain"
	modeCompat = "compat"
	modeSafe   = "safe"
)

// Client is an app that may call WeChat's API through the gateway.
type Client struct {
	// Name is how logs and metrics name the client. Required.
	Name string `json:"name,omitempty"`
	// Keys are what the client proves itself with, newest first: as Authorization: Bearer, or in the place of an
	// SDK's secret. At least one key or key_sha256; the second and later may resolve to nothing.
	Keys []string `json:"keys,omitempty"`
	// KeySHA256 are SHA-256 sums of further keys, in hexadecimal, for generated keys of at least 128 bits. Default: none.
	KeySHA256 []string `json:"key_sha256,omitempty"`
	// AppIDs are the accounts and authorizers the client may act for. "*" means all of them, but never a platform,
	// which must be named: that grants what a component token grants, all its authorizers. Required.
	AppIDs []string `json:"appids,omitempty"`
	// Paths are the API paths the client may call, such as /cgi-bin/user/*, where * stands for any text, slashes too. Default: every path that is neither
	// dangerous nor able to reveal a token.
	Paths []string `json:"paths,omitempty"`

	keys      []secret.String
	keyHashes [][sha256.Size]byte
}

// appIDShape describes an appid in error messages.
const appIDShape = "wx and 16 lower-case hexadecimal digits"

// isAppID reports whether s has the shape of an appid.
func isAppID(s string) bool {
	if len(s) != 18 || s[0] != 'w' || s[1] != 'x' {
		return false
	}
	for i := 2; i < len(s); i++ {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// hasPlaceholder reports whether a config string can only be judged once it has been resolved.
func hasPlaceholder(s string) bool { return strings.Contains(s, "{") }

// literalAppID refuses an appid of the wrong shape. Appids name things in the config, so they are never placeholders.
func literalAppID(s string) error {
	switch {
	case isAppID(s):
		return nil
	case hasPlaceholder(s):
		return said(fmt.Sprintf("'%s': an appid cannot be a placeholder: write it out, or as {$NAME}, which Caddy fills in when it reads the file", s),
			fmt.Sprintf("“%s”：appid 不能用占位符：请直接写出，或写作 {$NAME}，由 Caddy 读取文件时替换", s))
	}
	return notAppID(s)
}

// notAppID refuses what stands in an appid's place, and says what it is if that can be told.
func notAppID(s string) error {
	en, zh := "", ""
	switch lower := strings.ToLower(s); {
	case isAppID(lower):
		en, zh = "; write it in lower case", "，请改为小写"
	case strings.HasPrefix(lower, "gh_"):
		en, zh = "; this is an account's original id (原始ID), and the appid is in 微信开发者平台 > 我的业务 (for 小程序: mp.weixin.qq.com > 开发管理)", "；这是账号的原始ID，appid 在微信开发者平台 > 我的业务（小程序：公众平台 > 开发管理）"
	case strings.HasPrefix(lower, "ww"):
		en, zh = "; this is an id of WeCom's (企业微信), which has a protocol of its own that the gateway does not speak", "；这是企业微信的 ID，企业微信使用另一套协议，网关不支持"
	}
	return said(fmt.Sprintf("'%s' is not an appid: want %s%s", s, appIDShape, en), fmt.Sprintf("“%s”不是 appid：应为 wx 加 16 位小写十六进制数字%s", s, zh))
}

// unmeantLiteral is what was meant to name a variable or a file and would be taken for the secret itself, which could be guessed:
// $NAME, ${...}, %NAME%, and env. or file. with no braces or the wrong ones.
var unmeantLiteral = regexp.MustCompile(`(?is)^(?:\$[a-z_][a-z0-9_]*|\$\{.*|%[a-z_][a-z0-9_]*%|(?:[$<%][$<%{]*|\{[$<%{]+)?(?:env|file)\..+)$`)

var errUnmeant = said("it looks like the name of a variable or file, and would be taken as it stands: write {env.NAME} or {file./absolute/path}",
	"看起来是变量名或文件名，会被原样使用：请写作 {env.NAME} 或 {file./absolute/path}")

// literalSecret refuses a secret or push token of WeChat's that is wrong as it stands. The error never shows it.
func literalSecret(s string) error {
	if unmeantLiteral.MatchString(s) {
		return errUnmeant
	}
	return plainText(emptied(s))
}

// literalKey is literalSecret for the key of a client, which may be any text.
func literalKey(s string) error {
	switch {
	case unmeantLiteral.MatchString(s):
		return errUnmeant
	case strings.HasSuffix(s, ";") && namedPlaceholder.MatchString(s):
		return errSemicolon
	case hasPlaceholder(s):
		return nil // the whole is judged: the ends may be anywhere in it
	}
	return keyText(s)
}

// emptied is a config string without its placeholders.
func emptied(s string) string { return anyPlaceholder.ReplaceAllString(s, "") }

var anyPlaceholder = regexp.MustCompile(`\{[^{}]*\}`)

// plainText refuses what WeChat neither gives out nor accepts: blanks, line breaks, and what an input method or an editor put
// around a value. Such a secret fits nothing, and would say so only when it is used.
func plainText(s string) error {
	for _, c := range s {
		if c <= ' ' || c > '~' {
			return said("it has a space, a line break, or a character such as Chinese punctuation in it: write it exactly as it was given, in ASCII",
				"含有空格、换行或中文标点等字符：请按给出的值原样填写，只用 ASCII")
		}
	}
	if n := len(s); n > 1 && s[0] == s[n-1] && (s[0] == '"' || s[0] == '\'') {
		return said("it has quotation marks around it, which would be part of it: leave them out where it is set", "首尾带有引号，会被当作值的一部分：请在设置处去掉引号")
	}
	if strings.HasSuffix(s, ";") {
		return errSemicolon
	}
	return nil
}

// errSemicolon is of those who come from nginx: a Token has letters and digits alone, and an AppSecret hexadecimal ones.
var errSemicolon = said("it ends in a semicolon, which would be part of it: leave it out, for a line of a Caddyfile ends without one",
	"以分号结尾，会被当作值的一部分：请去掉，Caddyfile 的行尾不写分号")

// fairKey is how many characters a client's key has at least that nobody guesses by trying.
const fairKey = 16

// isShortKey reports whether a client's key could be guessed.
func isShortKey(key string) bool { return utf8.RuneCountInString(key) < fairKey }

// keyText refuses what no request carries: control characters, the mark that editors put before a text, and blanks at the ends.
func keyText(s string) error {
	if strings.ContainsFunc(s, func(c rune) bool { return unicode.IsControl(c) || c == '\uFEFF' }) {
		return said("it has a line break or another control character in it: set it without", "含有换行或其他控制字符：请去掉")
	}
	if strings.TrimSpace(s) != s {
		return said("it has blanks around it: set it without them", "首尾有空白：请去掉")
	}
	return nil
}

// literalAESKey refuses an EncodingAESKey that is wrong as it stands. The error never shows it.
func literalAESKey(s string) error {
	if hasPlaceholder(s) {
		return nil
	}
	_, err := crypto.ParseKey(s)
	return err
}

// literalKeySHA256 refuses what is not the hexadecimal form of a SHA-256 sum.
func literalKeySHA256(s string) error {
	if hasPlaceholder(s) {
		return nil
	}
	if sum, err := hex.DecodeString(s); err != nil || len(sum) != sha256.Size {
		return errors.New("want the SHA-256 sum of a key as 64 hexadecimal digits")
	}
	return nil
}

// literalSealKey refuses a seal key that is wrong as it stands. The error never shows it.
func literalSealKey(s string) error {
	if hasPlaceholder(s) {
		return nil
	}
	_, err := crypto.ParseSealKey(s)
	return err
}

// literalOrigin is tokens.ParseOrigin for what can be judged before placeholders are resolved.
func literalOrigin(s string) error {
	if hasPlaceholder(s) {
		return nil
	}
	_, err := tokens.ParseOrigin(s)
	return err
}

// parseProxy reads the egress proxy's address.
func parseProxy(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || strings.Contains(u.Host+u.Path, ";") || (u.Scheme != "http" && u.Scheme != "https" && u.Scheme != "socks5") {
		return nil, errors.New("not a proxy address: write it like http://proxy.internal:3128") // the value may hold a password
	}
	return u, nil
}

// literalProxy is parseProxy for what can be judged before placeholders are resolved.
func literalProxy(s string) error {
	if hasPlaceholder(s) {
		return nil
	}
	_, err := parseProxy(s)
	return err
}

// literalFolder refuses a relative path, whose place would depend on where the process was started.
func literalFolder(s string) error {
	if hasPlaceholder(s) || filepath.IsAbs(s) {
		return nil
	}
	return fmt.Errorf("'%s' is not an absolute path: write it like /var/lib/caddy/wechat-spill", s)
}

// namedPlaceholder is a placeholder that says by its form that it is one: a secret that merely has braces in it does not.
var namedPlaceholder = regexp.MustCompile(`\{(?:env|file|system|time)\.[^{}]+\}`)

// inBraces stands for what may be a secret that has braces in it.
var inBraces = texts("what stands in braces", "花括号中的内容")

// placeholderIn is what may be shown of a config string that does not resolve.
func placeholderIn(s string) string {
	if p := namedPlaceholder.FindString(s); p != "" {
		return p
	}
	return inBraces.EN
}

// resolver turns config strings into values, once, when the config is loaded.
type resolver struct {
	repl *caddy.Replacer
	log  *zap.Logger // told of what is left out; nil: nobody is
}

// of is the resolver for one block of the config, which its warnings name.
func (r resolver) of(name zap.Field) resolver {
	if r.log != nil {
		r.log = r.log.With(name)
	}
	return r
}

// Why a placeholder has no value.
var (
	errNoPlaceholder = said("resolves to nothing: write {env.NAME} or {file./absolute/path}, and set it before starting Caddy",
		"解析为空：请写作 {env.NAME} 或 {file./absolute/path}，并在启动 Caddy 前设置")
	errUnset              = said("resolves to nothing: set what it refers to before starting Caddy", "解析为空：请在启动 Caddy 前设置它所引用的值")
	errUnknownPlaceholder = said("is not a placeholder that Caddy knows", "不是 Caddy 认识的占位符")
)

// required resolves a setting that must have a value.
func (r resolver) required(field, s string) (string, error) {
	if s == "" {
		return "", said(field+" is missing", "缺少 "+field)
	}
	v, err := r.repl.ReplaceOrErr(s, true, true)
	switch {
	case err != nil && !namedPlaceholder.MatchString(s):
		return "", fmt.Errorf("%s: %s %w", field, placeholderIn(s), errNoPlaceholder)
	case err != nil:
		return "", fmt.Errorf("%s: %s %w", field, placeholderIn(s), errUnset)
	}
	return v, nil
}

// secretKind is how a kind of secret is judged: as it is written, and by what that stands for.
type secretKind struct{ literal, text func(string) error }

var (
	ofWeChat = secretKind{literalSecret, plainText}
	ofClient = secretKind{literalKey, keyText}
)

// secret is required for what WeChat gave out.
func (r resolver) secret(field, s string) (string, error) {
	v, err := r.required(field, s)
	if err != nil {
		return "", err
	}
	if err = ofWeChat.literal(s); err == nil {
		err = ofWeChat.text(v)
	}
	return v, wrongSecret(field, s, err)
}

// secrets is newestFirst for secrets. What a placeholder hides at a later place and cannot be right may be left over from a
// rotation: it is left out, and said, but keeps no config from loading.
func (r resolver) secrets(field string, list []string, kind secretKind) ([]string, error) {
	values := make([]string, 0, len(list))
	for i, s := range list {
		v, err := r.nth(field, i, s)
		if err != nil {
			return nil, err
		}
		if v == "" {
			continue
		}
		place := fmt.Sprintf("%s %d", field, i+1)
		if err := kind.literal(s); err != nil {
			return nil, wrongSecret(place, s, err)
		}
		err = kind.text(v)
		switch {
		case err == nil:
			values = append(values, v)
		case i == 0 || !hasPlaceholder(s):
			return nil, wrongSecret(place, s, err)
		case r.log != nil:
			r.log.Warn("an older value cannot be right and is left out: mend it, or take it out", zap.NamedError("error", wrongSecret(place, s, err)))
		}
	}
	return values, nil
}

// wrongSecret says where a secret is that err is about, and not what it is.
func wrongSecret(field, written string, err error) error {
	switch {
	case err == nil:
		return nil
	case namedPlaceholder.MatchString(written):
		return fmt.Errorf("%s: %s: %w", field, placeholderIn(written), err)
	}
	return fmt.Errorf("%s: %w", field, err)
}

// newestFirst resolves a list of which only the first must have a value: the others may belong to a rotation that
// is over.
func (r resolver) newestFirst(field string, list []string) ([]string, error) {
	values := make([]string, 0, len(list))
	for i, s := range list {
		v, err := r.nth(field, i, s)
		if err != nil {
			return nil, err
		}
		if v != "" {
			values = append(values, v)
		}
	}
	return values, nil
}

// nth resolves what stands at a place of such a list.
func (r resolver) nth(field string, i int, s string) (string, error) {
	if i == 0 {
		return r.required(field, s)
	}
	v, err := r.repl.ReplaceOrErr(s, false, true)
	if err != nil {
		return "", fmt.Errorf("%s: %s %w", field, placeholderIn(s), errUnknownPlaceholder)
	}
	return v, nil
}

var errNoToken = said("no token, want at least the token of the WeChat console", "没有 token，至少需要微信后台的那个")

// codec builds the push credentials of a receive id.
func (r resolver) codec(receiveID string, tokens, aesKeys []string) (*crypto.Codec, fingerprints, error) {
	var prints fingerprints
	tokenTexts, err := r.secrets("token", tokens, ofWeChat)
	if err != nil {
		return nil, prints, err
	}
	var keyTexts []string
	if len(aesKeys) > 0 {
		if keyTexts, err = r.newestFirst("aes_key", aesKeys); err != nil {
			return nil, prints, err
		}
	}
	secrets := make([]secret.String, len(tokenTexts))
	for i, t := range tokenTexts {
		secrets[i] = secret.New(t)
		if !slices.Contains(tokenTexts[:i], t) { // as the codec counts them
			prints.tokens = append(prints.tokens, ringPrint(receiveID, "token", t))
		}
	}
	keys := make([]crypto.Key, len(keyTexts))
	for i, k := range keyTexts {
		if keys[i], err = crypto.ParseKey(k); err != nil {
			return nil, prints, fmt.Errorf("aes_key %d: %w", i+1, err)
		}
		if !slices.ContainsFunc(keys[:i], keys[i].Same) {
			prints.keys = append(prints.keys, ringPrint(receiveID, "key", k))
		}
	}
	if len(secrets) == 0 {
		return nil, prints, errNoToken
	}
	codec, err := crypto.NewCodec(receiveID, secrets, keys)
	return codec, prints, err
}

// complete refuses a platform that lacks something.
func (p *Platform) complete() error {
	switch {
	case p.Secret == "":
		return errors.New("secret is missing: add a line like: secret {env.WECHAT_PLATFORM_SECRET}")
	case len(p.Tokens) == 0:
		return errors.New("token is missing: give the 消息校验Token of the platform's console page")
	case len(p.AESKeys) == 0:
		return errors.New("aes_key is missing: give the 消息加解密Key of the platform's console page")
	}
	return nil
}

func (p *Platform) provision(r resolver) error {
	if err := literalAppID(p.AppID); err != nil {
		return err
	}
	if err := p.complete(); err != nil {
		return err
	}
	s, err := r.secret("secret", p.Secret)
	if err != nil {
		return err
	}
	p.secret = secret.New(s)
	p.codec, p.prints, err = r.codec(p.AppID, p.Tokens, p.AESKeys)
	return err
}

// releaseCheck reports whether the gateway answers WeChat's acceptance check.
func (p *Platform) releaseCheck() bool { return p.ReleaseCheck == nil || *p.ReleaseCheck }

// complete refuses an account that lacks something. One without token and aes_key calls the API and receives no
// pushes.
func (a *Account) complete() error {
	switch {
	case a.Secret == "":
		return errors.New("secret is missing: add a line like: secret {env.SHOP_SECRET}")
	case len(a.Tokens) == 0 && len(a.AESKeys) > 0:
		return errors.New("token is missing: an aes_key needs the Token of the same server configuration page")
	case a.Mode != "" && a.Mode != modePlain && a.Mode != modeCompat && a.Mode != modeSafe:
		return fmt.Errorf("mode: '%s' is none: want plain, compat or safe, as the account's server configuration says", a.Mode)
	case a.Mode != "" && len(a.Tokens) == 0:
		return errors.New("token is missing: mode is about pushes, which need the Token of the server configuration page")
	case (a.Mode == modeSafe || a.Mode == modeCompat) && len(a.AESKeys) == 0:
		return fmt.Errorf("aes_key is missing: mode %s needs the EncodingAESKey of the account's server configuration", a.Mode)
	}
	return nil
}

func (a *Account) provision(r resolver) error {
	if err := literalAppID(a.AppID); err != nil {
		return err
	}
	if err := a.complete(); err != nil {
		return err
	}
	s, err := r.secret("secret", a.Secret)
	if err != nil {
		return err
	}
	a.secret = secret.New(s)
	if len(a.Tokens) == 0 {
		return nil
	}
	if a.mode = a.Mode; a.mode == "" {
		a.mode = modeSafe
		if len(a.AESKeys) == 0 {
			a.mode = modePlain
		}
	}
	a.codec, a.prints, err = r.codec(a.AppID, a.Tokens, a.AESKeys)
	return err
}

// complete refuses a client that lacks something.
func (c *Client) complete() error {
	switch {
	case c.Name == "":
		return errors.New("name is missing")
	case len(c.Keys) == 0 && len(c.KeySHA256) == 0:
		return errors.New("key is missing: add a line like: key {env.CRM_KEY}")
	case len(c.AppIDs) == 0:
		return errors.New("appids is missing: list the appids it may act for, or *")
	}
	return nil
}

func (c *Client) provision(r resolver) error {
	if err := c.complete(); err != nil {
		return err
	}
	if err := literalClientName(c.Name); err != nil {
		return err
	}
	keys, err := r.secrets("key", c.Keys, ofClient)
	if err != nil {
		return err
	}
	c.keys = c.keys[:0]
	for _, k := range keys {
		c.keys = append(c.keys, secret.New(k))
		if isShortKey(k) && r.log != nil {
			r.log.Warn("a key is short and could be guessed by whoever reaches wechat_api: take what `openssl rand -hex 32` prints")
		}
	}
	hashes, err := r.newestFirst("key_sha256", c.KeySHA256)
	if err != nil {
		return err
	}
	c.keyHashes = c.keyHashes[:0]
	for _, h := range hashes {
		if err := literalKeySHA256(h); err != nil {
			return fmt.Errorf("key_sha256: %w", err)
		}
		var sum [sha256.Size]byte
		_, _ = hex.Decode(sum[:], []byte(h))
		c.keyHashes = append(c.keyHashes, sum)
	}
	for _, id := range c.AppIDs {
		if id == "*" {
			continue
		}
		if err := literalAppID(id); err != nil {
			return fmt.Errorf("appids: %w", err)
		}
	}
	for _, p := range c.Paths {
		if err := literalPathPattern(p); err != nil {
			return fmt.Errorf("paths: %w", err)
		}
	}
	return nil
}

func errSharedKey(client, other string) error {
	return fmt.Errorf("client %s: it has a key that client %s has too: give each client its own", client, other)
}

// refuseSharedKeys refuses a key that two clients have: which of them calls could not be told.
func refuseSharedKeys(clients []*Client) error {
	owners := make(map[[sha256.Size]byte]string)
	for _, c := range clients {
		sums := append([][sha256.Size]byte(nil), c.keyHashes...)
		for _, k := range c.keys {
			sums = append(sums, sha256.Sum256([]byte(k.Reveal())))
		}
		for _, sum := range sums {
			if other, taken := owners[sum]; taken && other != c.Name {
				return errSharedKey(c.Name, other)
			}
			owners[sum] = c.Name
		}
	}
	return nil
}
