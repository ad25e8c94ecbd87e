package caddymodule

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// verbatim is what a Chinese text has in quotation marks: what is typed, or what somebody else says.
var verbatim = regexp.MustCompile("“[^”]*”|`[^`]*`")

// plainWord tells words from names, which have digits, underscores, hyphens, dots, slashes or capitals in them.
var plainWord = regexp.MustCompile(`^[A-Za-z][a-z]*('[a-z]+)?[,;:.]?$`)

// englishIn are the first three words that follow each other in a Chinese text.
func englishIn(text string) string {
	own := verbatim.ReplaceAllString(text, "“”")
	for _, part := range strings.FieldsFunc(own, func(c rune) bool { return c > unicode.MaxASCII || strings.ContainsRune("()", c) }) {
		words := strings.Fields(part)
		for i := range len(words) - 2 {
			if three := words[i : i+3]; !slices.ContainsFunc(three, func(w string) bool { return !plainWord.MatchString(w) }) {
				return strings.Join(three, " ")
			}
		}
	}
	return ""
}

// speaksBoth fails for a text that is not in both languages.
func speaksBoth(t *testing.T, of string, text tokens.Text) {
	t.Helper()
	switch found := englishIn(text.ZH); {
	case text.EN == "" || text.ZH == "":
		t.Errorf("%s: a language is missing: %+v", of, text)
	case found != "":
		t.Errorf("%s: English in Chinese: %q in %q", of, found, text.ZH)
	case !strings.ContainsFunc(text.ZH, func(c rune) bool { return unicode.Is(unicode.Han, c) }):
		t.Errorf("%s: no Chinese in %q", of, text.ZH)
	}
}

func TestEnglishIn(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]bool{
		"token 1: it has a space in it": true, "无法访问：its certificate has expired": true, "无法连接：no such host": true, "没有响应：“no such host at all”": false,
		"请用 `openssl rand -hex 32` 生成": false, "请用 NTP 校时：timedatectl set-ntp true，或启动 chrony": false, "运行中的 Caddy 与 WeChat Pay 网关": false,
		"在全局选项 wechat 中添加 platform 或 account": false, "It is a whole sentence.": true,
	} {
		if got := englishIn(text); (got != "") != want {
			t.Errorf("%q: %q", text, got)
		}
	}
}

// TestDoctorSpeaksBothOfWrongKeys: what is wrong with an appid, a token or a key is said in Chinese too.
func TestDoctorSpeaksBothOfWrongKeys(t *testing.T) {
	t.Setenv("DOCTOR_BLANK", "a b")
	t.Setenv("DOCTOR_QUOTED", `"quoted"`)
	t.Setenv("DOCTOR_LONG", strings.Repeat("a", 44))
	t.Setenv("DOCTOR_ODD", strings.Repeat("a", 42)+"!")
	for name, tt := range map[string]struct {
		field  string
		value  any
		en, zh string
	}{
		"blank":             {"tokens", []any{"{env.DOCTOR_BLANK}"}, "token 1: {env.DOCTOR_BLANK}: it has a space", "token 1：{env.DOCTOR_BLANK}：含有空格"},
		"quoted":            {"tokens", []any{"{env.DOCTOR_QUOTED}"}, "it has quotation marks", "首尾带有引号"},
		"a name":            {"tokens", []any{"$TOKEN"}, "token 1: it looks like", "token 1：看起来是变量名"},
		"none":              {"tokens", []any{}, "no token, want", "没有 token"},
		"braces":            {"tokens", []any{"a", "{nothing}"}, "token: what stands in braces is not a placeholder", "token：花括号中的内容 不是 Caddy 认识的占位符"},
		"long":              {"aes_keys", []any{"{env.DOCTOR_LONG}"}, "aes_key 1: aes key has 44 characters", "aes_key 1：有 44 个字符"},
		"odd":               {"aes_keys", []any{"{env.DOCTOR_ODD}"}, "a wrong character at position 43", "第 43 个字符有误"},
		"appid":             {"appid", "wx1", "'wx1' is not an appid", "“wx1”不是 appid"},
		"appid in capitals": {"appid", "WX1111111111111111", "write it in lower case", "请改为小写"},
		"original id":       {"appid", "gh_1234567890ab", "this is an account's original id", "这是账号的原始ID"},
		"WeCom":             {"appid", "ww1234567890abcdef", "this is an id of WeCom's", "这是企业微信的 ID"},
		"appid hidden":      {"appid", "{env.APPID}", "cannot be a placeholder", "不能用占位符"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPatient(t)
			p.part("apps/wechat/platforms/0")[tt.field] = tt.value
			p.offline = true
			found := p.examine(t).of("placeholders")
			if !slices.ContainsFunc(found, func(r doctorResult) bool {
				return r.Level == doctorRed && strings.Contains(r.Text.EN, tt.en) && strings.Contains(r.Text.ZH, tt.zh)
			}) {
				t.Errorf("%+v", found)
			}
		})
	}
}

func TestTextOf(t *testing.T) {
	t.Parallel()
	own := said("it is so", "就是这样")
	for _, tt := range []struct {
		err error
		zh  string
	}{
		{own, "就是这样"},
		{fmt.Errorf("token 2: %w", own), "token 2：就是这样"},
		{fmt.Errorf("%w, to be sure", own), "“it is so, to be sure”"},
		{errors.New("disk is full"), "“disk is full”"},
	} {
		if got := textOf(tt.err); got.EN != tt.err.Error() || got.ZH != tt.zh {
			t.Errorf("%+v, want %s", got, tt.zh)
		}
	}
}
