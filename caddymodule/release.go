package caddymodule

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"strings"

	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// releaseCheckAccounts are the accounts WeChat uses for its automated acceptance check (全网发布接入检测), by their
// original ids. They are nobody's customers: their messages never reach a backend. The last one is historic.
var releaseCheckAccounts = map[string]string{
	"gh_3c884a361561": "wx570bc396a51b8ff8", "gh_8dad206e9538": "wxd101a85aa106f53e",
	"gh_c0f28a78b318": "wx9252c5e0bb1836fc", "gh_905ae9d01059": "wxc39235c15087f6f3",
	"gh_3f222ed8d140": "wx8e1097c5bc82cde9", "gh_393666f1fdf4": "wx7720d01d4b2a4500",
	"gh_26128078e9ab": "wx14550af28c71a144", "gh_39abb5d4e1b7": "wx05d483572dcd5d8b",
	"gh_2b3713f184a6": "wxa35b9c23cfe664eb", "gh_7818dcb60240": "wx5910277cae6fd970",
	"gh_ea3c04785154": "",
}

const (
	releaseCheckText     = "TESTCOMPONENT_MSG_TYPE_TEXT"
	releaseCheckAuthCode = "QUERY_AUTH_CODE:"
)

// answerReleaseCheck answers a message of WeChat's acceptance check and reports whether it was one: the text is
// echoed with _callback; QUERY_AUTH_CODE is answered with nothing at once, and then, with the code exchanged, by a
// customer-service message; an event, as the check of former years sent it, by its name.
func (a *App) answerReleaseCheck(w http.ResponseWriter, p *push, appid string) bool {
	if p.platform == nil || !p.platform.releaseCheck() {
		return false
	}
	known, ok := releaseCheckAccounts[string(p.fields.ToUserName)]
	if !ok {
		return false
	}
	if known != "" {
		appid = known // the path is not signed
	}
	content := string(p.fields.Content)
	if !bytes.Equal(p.fields.MsgType, []byte("text")) {
		content = ""
	}
	switch code, isCode := strings.CutPrefix(content, releaseCheckAuthCode); {
	case isCode && code != "":
		writePlain(w, nil)
		platform, openID := p.platform.AppID, string(p.fields.FromUserName)
		a.shared.background(func(ctx context.Context) { a.finishReleaseCheck(ctx, platform, appid, openID, code) })
	case bytes.Equal(p.fields.MsgType, []byte("event")):
		a.writeReleaseReply(w, p, string(p.fields.Event)+"from_callback")
	case content == releaseCheckText:
		a.writeReleaseReply(w, p, releaseCheckText+"_callback")
	default:
		writePlain(w, success)
	}
	a.metrics().replies.WithLabelValues(outcomeReleaseCheck).Inc()
	a.logger.Info("release check answered", zap.String("platform", p.platform.AppID), zap.String("appid", appid))
	return true
}

func (a *App) writeReleaseReply(w http.ResponseWriter, p *push, text string) {
	if err := a.writeReply(w, p, textReply(p, text)); err != nil {
		writePlain(w, success)
	}
}

// finishReleaseCheck exchanges the code and sends the message that the check waits for. The code is the one that
// also came with the authorized event, so it may have been exchanged already: then the token held serves.
func (a *App) finishReleaseCheck(ctx context.Context, platform, appid, openID, code string) {
	authorizer, err := a.manager().ExchangeAuthCode(ctx, platform, appid, secret.New(code))
	if err == nil {
		appid = authorizer.AppID
	} else if _, held := a.manager().Authorizer(ctx, platform, appid); held != nil {
		a.logger.Error("release check: the authorization code could not be exchanged", zap.String("platform", platform),
			zap.String("appid", appid), zap.Error(err))
		return
	}
	message := map[string]any{"touser": openID, "msgtype": "text", "text": map[string]string{"content": code + "_from_api"}}
	err = a.manager().Call(ctx, tokens.AuthorizerKey(platform, appid), http.MethodPost, customServiceAPI, url.Values{}, message, nil)
	if err != nil {
		a.logger.Error("release check: the customer-service message could not be sent", zap.String("platform", platform),
			zap.String("appid", appid), zap.Error(err))
	}
}

// cdata writes text as CDATA sections; the end mark cannot stand in one, so it is split over two.
func cdata(text string) string {
	return "<![CDATA[" + strings.ReplaceAll(text, "]]>", "]]]]><![CDATA[>") + "]]>"
}

// jsonString writes text as a JSON string without escaping what need not be: WeChat shows \u003c as it is.
func jsonString(text string) string {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(text); err != nil {
		return `""` // a string always encodes
	}
	return string(bytes.TrimRight(b.Bytes(), "\n"))
}
