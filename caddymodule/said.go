package caddymodule

import (
	"errors"
	"fmt"
	"strings"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// said makes an error that is shown in both languages.
func said(en, zh string) error { return &tokens.SaidError{Text: texts(en, zh)} }

// textOf is what an error says, in both languages. Around the innermost of the gateway's own there are but names: of fields, and of placeholders.
// What is not the gateway's own stays as it is, and is quoted.
func textOf(err error) tokens.Text {
	en := err.Error()
	var inner error
	var zh string
	if own, ok := errors.AsType[*tokens.SaidError](err); ok {
		inner, zh = own, own.Text.ZH
	} else if key, ok := errors.AsType[*crypto.KeyError](err); ok {
		inner, zh = key, fmt.Sprintf("第 %d 个字符有误，只能是 A-Z、a-z 和 0-9", key.Position)
		if key.Position == 0 {
			zh = fmt.Sprintf("有 %d 个字符，应为微信后台所示的 43 个", key.Length)
		}
	} else {
		return texts(en, quotedZH(en))
	}
	names, found := strings.CutSuffix(en, inner.Error())
	if !found {
		return texts(en, quotedZH(en))
	}
	return texts(en, strings.NewReplacer(": ", "：", inBraces.EN, inBraces.ZH).Replace(names)+zh)
}

// quotedZH is what somebody else says, for a Chinese text.
func quotedZH(s string) string { return "“" + s + "”" }
