package caddymodule

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

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

// Limits of the acceptance check.
const (
	releaseCheckMemory   = time.Hour              // as long as a code lives, a push that comes again is known
	maxReleaseChecks     = 1024                   // pushes remembered; one run of the check has four
	releaseCheckRetry    = 200 * time.Millisecond // before the second attempt at the message; doubled from then on
	releaseCheckMaxRetry = 3 * time.Second        // WeChat waits for seconds; backgroundTimeout ends it all
)

// releaseChecks remembers the pushes of acceptance checks and how they were answered: nil for QUERY_AUTH_CODE.
type releaseChecks = tokens.Window[[sha256.Size]byte, []byte]

func newReleaseChecks() *releaseChecks {
	return tokens.NewWindow[[sha256.Size]byte, []byte](releaseCheckMemory, maxReleaseChecks)
}

// releaseCheckKey is what a push is remembered by. No part can hold a zero byte.
func releaseCheckKey(parts ...string) [sha256.Size]byte {
	return sha256.Sum256([]byte(strings.Join(parts, "\x00")))
}

// isReleaseCheckAccount reports whether an appid is one of WeChat's test accounts.
func isReleaseCheckAccount(appid string) bool {
	if appid == "" {
		return false
	}
	for _, known := range releaseCheckAccounts {
		if known == appid {
			return true
		}
	}
	return false
}

// answerReleaseCheck answers a message of WeChat's acceptance check and reports whether it was one: the text is
// echoed with _callback; QUERY_AUTH_CODE is answered with nothing at once, and then, with the code exchanged, by a
// customer-service message; an event, as the check of former years sent it, by its name. Which account it is for is
// read from the push, because the path is not signed and may name none; only the historic account's appid is nowhere
// else. A push that comes again gets the same answer, and no second message.
func (a *App) answerReleaseCheck(w http.ResponseWriter, p *push, appid string) bool {
	if p.platform == nil || !p.platform.releaseCheck() {
		return false
	}
	known, ok := releaseCheckAccounts[string(p.fields.ToUserName)]
	if !ok {
		return false
	}
	if known != "" {
		appid = known
	}
	touch(p.platform.ring.release)
	content := ""
	if bytes.Equal(p.fields.MsgType, []byte("text")) {
		content = string(p.fields.Content)
	}
	item := "other"
	switch code, isCode := strings.CutPrefix(content, releaseCheckAuthCode); {
	case isCode && code != "":
		item = "api text"
		writePlain(w, nil)
		_ = http.NewResponseController(w).Flush() // before the message; what cannot flush sends it when we return
		a.beginReleaseMessage(releaseMessage{
			platform: p.platform.AppID, appid: appid, account: string(p.fields.ToUserName), openID: string(p.fields.FromUserName), code: code,
		})
	case bytes.Equal(p.fields.MsgType, []byte("event")):
		item = "event"
		a.writeReleaseReply(w, p, string(p.fields.Event)+"from_callback")
	case content == releaseCheckText:
		item = "text"
		a.writeReleaseReply(w, p, releaseCheckText+"_callback")
	default:
		writePlain(w, success)
	}
	p.entry.AppID, p.entry.Platform, p.entry.What = appid, p.platform.AppID, whatReleaseCheck
	a.shared.events.emit(happening{name: eventReleaseCheck, platform: p.platform.AppID, appid: appid})
	a.metrics().replies.WithLabelValues(outcomeReleaseCheck).Inc()
	a.logger.Info("release check answered", zap.String("platform", p.platform.AppID), zap.String("appid", appid), zap.String("item", item))
	return true
}

// writeReleaseReply answers a push with a text: the same one, to its CreateTime, when the push comes again.
func (a *App) writeReleaseReply(w http.ResponseWriter, p *push, text string) {
	key := releaseCheckKey(p.platform.AppID, string(p.opened.Message))
	reply, _ := a.shared.releaseChecks.GetOrSet(key, func() []byte { return textReply(p, text) })
	if err := a.writeReply(w, p, reply); err != nil {
		writePlain(w, success)
	}
}

// releaseMessage is the customer-service message that a QUERY_AUTH_CODE asks for.
type releaseMessage struct {
	platform, appid string
	account         string // the gh_ id it was pushed for
	openID, code    string
}

// beginReleaseMessage has the message sent, unless it was for an earlier push of the same, on whichever node of those that share
// a store.
func (a *App) beginReleaseMessage(m releaseMessage) {
	key := releaseCheckKey(m.platform, m.account, m.openID, m.code)
	if _, again := a.shared.releaseChecks.GetOrSet(key, func() []byte { return nil }); again {
		return
	}
	a.background(func(ctx context.Context) {
		nodes, shared := a.env.Store.(tokens.Ephemeral)
		name, node := "release/"+hex.EncodeToString(key[:]), []byte(a.calls().node)
		if shared {
			limited, cancel := context.WithTimeout(ctx, claimWait)
			held, first, err := nodes.Claim(limited, name, node, releaseCheckMemory)
			cancel()
			if err == nil && !first && !bytes.Equal(held, node) { // another node has it sent
				a.shared.releaseChecks.Delete(key) // unless it fails: then it is tried again, here too
				return
			}
		}
		if !a.finishReleaseCheck(ctx, m) { // should WeChat ask again, it is tried again
			a.shared.releaseChecks.Delete(key)
			if shared {
				a.freeReleaseCheck(ctx, nodes, name, node)
			}
		}
	})
}

// freeReleaseCheck gives up a node's own claim: where the store failed at the claim, it may be another's. A store that does not answer
// forgets it in time.
func (a *App) freeReleaseCheck(ctx context.Context, nodes tokens.Ephemeral, name string, node []byte) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), claimWork)
	defer cancel()
	if held, err := nodes.Peek(ctx, name); err == nil && bytes.Equal(held, node) {
		_, _ = nodes.Take(ctx, name)
	}
}

// finishReleaseCheck gets the message sent and reports false only if it is certain that it was not. The code may be in
// exchange at this moment, on this node or on another, WeChat may be busy or out of reach: so it is tried until ctx ends,
// but never again once a message may have gone out.
func (a *App) finishReleaseCheck(ctx context.Context, m releaseMessage) (maybeSent bool) {
	for wait := releaseCheckRetry; ; wait = min(2*wait, releaseCheckMaxRetry) {
		again, err := a.sendReleaseMessage(ctx, &m)
		if err == nil {
			a.logger.Info("release check: customer-service message sent", zap.String("platform", m.platform), zap.String("appid", m.appid))
			return true
		}
		if again {
			timer := time.NewTimer(wait)
			select {
			case <-timer.C:
				continue
			case <-ctx.Done():
				timer.Stop()
			}
		}
		a.logger.Error("release check: the customer-service message could not be sent", zap.String("platform", m.platform),
			zap.String("appid", m.appid), zap.Error(err))
		_, refused := errors.AsType[*tokens.APIError](err)
		return !again && !refused
	}
}

// sendReleaseMessage is one attempt: it exchanges the code and sends the message. The code is the one that also came
// with the authorized event, so it may be used up already: then the token held serves. Again is true if nothing was
// sent and another attempt may help.
func (a *App) sendReleaseMessage(ctx context.Context, m *releaseMessage) (again bool, err error) {
	authorizer, err := a.manager().ExchangeAuthCode(ctx, m.platform, m.appid, secret.New(m.code))
	switch {
	case err == nil:
		m.appid = authorizer.AppID
	case m.appid == "": // of the historic account, whose appid only the path says
		return true, err
	}
	key := tokens.AuthorizerKey(m.platform, m.appid)
	if _, missing := a.manager().Get(ctx, key); missing != nil {
		return true, errors.Join(err, missing)
	}
	message := map[string]any{"touser": m.openID, "msgtype": "text", "text": map[string]string{"content": m.code + "_from_api"}}
	err = a.manager().Call(ctx, key, http.MethodPost, customServiceAPI, url.Values{}, message, nil)
	return err != nil && sentNothing(err), err
}

// sentNothing reports whether a call for the message did not reach WeChat, or was refused for a reason that may pass.
func sentNothing(err error) bool {
	if api, ok := errors.AsType[*tokens.APIError](err); ok {
		const systemBusy = -1
		return api.API != customServiceAPI || api.Code == systemBusy || tokens.IsTokenRefused(api.Code)
	}
	op, ok := errors.AsType[*net.OpError](err)
	return ok && op.Op == "dial"
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
