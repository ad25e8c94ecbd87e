package caddymodule

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// Codes of what is seen of pushes, calls and answers. The table in status_findings.go says what each means.
const (
	codePushSignature    = "push_signature"
	codePushKey          = "push_aes_key"
	codePushReceiveID    = "push_receive_id"
	codePushAddressee    = "push_addressee"
	codePushUnknown      = "push_unknown"
	codePushTooLarge     = "push_too_large"
	codePushNotEncrypted = "push_not_encrypted"
	codePushNoKey        = "push_no_key"
	codePushReplayed     = "push_replayed"
	codePushNotKept      = "push_not_kept"
	codeClock            = "clock_offset"

	codeEventMisdirected   = "event_misdirected"
	codeMessageMisdirected = "message_misdirected"

	codeRepliesLost     = "replies_lost"
	codeRepliesUnusable = "replies_unusable"

	codeAuthorizerToken = "authorizer_token"
	codeRogue           = "rogue_refresh"
	codeAddressRefused  = "address_refused"
	codePermission      = "permission_missing"
	codeQuota           = "quota_used_up"
	codeCallRefused     = "call_refused"
)

// pushCodes are what a push that opens shows to be mended.
var pushCodes = []string{
	codePushSignature, codePushKey, codePushReceiveID, codePushUnknown, codePushNotEncrypted, codePushNoKey,
}

// thisMachine is the subject of what concerns no account.
const thisMachine = "this machine"

// texts is a text in both languages.
func texts(en, zh string) tokens.Text { return tokens.Text{EN: en, ZH: zh} }

// codeOf is what a refusal of a push says to who runs the gateway; "": nothing, for anybody can send garbage.
func codeOf(why *refusal) string {
	switch why {
	case errSignature:
		return codePushSignature
	case errDecrypt:
		return codePushKey
	case errReceiveID:
		return codePushReceiveID
	case errAddressee:
		return codePushAddressee
	case errUnknown:
		return codePushUnknown
	case errTooLarge:
		return codePushTooLarge
	case errPlainPush:
		return codePushNotEncrypted
	case errSealed:
		return codePushNoKey
	case errReplayed:
		return codePushReplayed
	case errNotKept:
		return codePushNotKept
	}
	return "" // one that is stale is seen where it is known to be WeChat's
}

// sawRefused notes a push that was not accepted. Whose it was is what opened it if it could not be kept, else what its path says,
// or the only one that it can be.
func (a *App) sawRefused(r *http.Request, endpoint string, p *push, why *refusal) {
	code := codeOf(why)
	if code == "" {
		return
	}
	subject := "wechat_" + endpoint
	if len(a.Platforms) == 1 {
		subject = a.Platforms[0].AppID
	}
	for segment := range strings.SplitSeq(r.URL.Path, "/") {
		if acc := a.account(segment); acc != nil && acc.codec != nil || a.platform(segment) != nil {
			subject = segment
			break
		}
	}
	if why == errNotKept && p.platform != nil {
		subject = p.platform.AppID
	}
	a.health().sightings.saw(code, subject, tokens.Text{})
}

// inTime is push.inTime, of a push whose signature is right and which so tells of the clocks. It goes by WeChat's clock where
// wechatClock.judges says so, and has that learned before it refuses one: what it refuses WeChat pushes to no other node.
func (a *App) inTime(p *push, window time.Duration) error {
	err := a.judge(p, window)
	unknown := false
	if err != nil && p.ahead == 0 && p.inTime(time.Unix(p.query.unix(), 0), window) == nil {
		if unknown = !a.learnClock(); !unknown {
			err = a.judge(p, window)
		}
	}
	s := &a.health().sightings
	if err == nil {
		s.mended(thisMachine, codeClock)
		return nil
	}
	if offset := p.query.clockOffset().Round(time.Second); offset.Abs() >= window && unknown { // else it says nothing about our clock
		s.saw(codeClock, thisMachine, aheadText(offset))
	}
	return err
}

// judge is push.inTime by the clock that counts.
func (a *App) judge(p *push, window time.Duration) error {
	now := time.Now()
	p.ahead = a.health().clock.judges(now, window)
	return p.inTime(now.Add(p.ahead), window)
}

// sawAnswered notes what became of a message to an account.
func (a *App) sawAnswered(appid, outcome string, why error) {
	s := &a.health().sightings
	switch outcome {
	case outcomeLost, outcomeUnusable:
		code := codeRepliesLost
		if outcome == outcomeUnusable {
			code = codeRepliesUnusable
		}
		reason := texts("?", "?")
		if he, ok := errors.AsType[caddyhttp.HandlerError](why); ok && he.Err != nil {
			why = he.Err
		}
		if why != nil {
			why = rootOf(why)
			safe := safeReason(why)
			if reason = textOf(why); reason.EN != safe {
				reason = texts(safe, quotedZH(safe))
			}
		}
		s.saw(code, appid, reason)
	default:
		s.mended(appid, codeRepliesLost, codeRepliesUnusable)
	}
}

// sawRefusal notes that WeChat refused a call of an app's for a reason that who runs the gateway can mend.
func (t *Transport) sawRefusal(call *apiCall, key tokens.Key, known tokens.Errcode, answer []byte) {
	h := t.app.health()
	code, subject := codeCallRefused, call.appid
	detail := texts(fmt.Sprintf("%s: %d %s", call.path, known.Code, known.Meaning.EN), fmt.Sprintf("%s：%d %s", call.path, known.Code, known.Meaning.ZH))
	switch {
	case known.NamesEgressIP():
		code = codeAddressRefused
		if key.Platform != "" {
			subject = key.Platform // one list for all its accounts
		}
		ip := tokens.EgressIP(string(answer))
		for _, host := range t.hosts {
			host.sawAddress(ip)
		}
		detail = addressText(ip)
	case known.MissesPermission():
		code = codePermission
		if sets := tokens.PermissionSetNames(tokens.PermissionSetsFor(call.path)); sets.EN != "" {
			detail = texts(detail.EN+"; it needs "+sets.EN, detail.ZH+"；需要 "+sets.ZH)
		}
	case known.Class == tokens.ClassBackoff:
		code = codeQuota
	}
	h.sightings.saw(code, subject, detail)
}

// addressText names the address that WeChat refused.
func addressText(ip string) tokens.Text {
	if ip == "" {
		return texts("which address, WeChat does not say", "微信未指明地址")
	}
	return texts(ip, ip)
}

// reasonOf says why a call to WeChat failed. It holds nothing of the request.
func reasonOf(err error) tokens.Text {
	if api, ok := errors.AsType[*tokens.APIError](err); ok {
		known, listed := tokens.Explain(api.Code)
		rid := ""
		if api.RID != "" && (listed || !strings.Contains(api.Msg, api.RID)) {
			rid = " (rid " + api.RID + ")"
		}
		if !listed {
			return texts(fmt.Sprintf("%d %s%s", api.Code, api.Msg, rid), fmt.Sprintf("%d %s%s", api.Code, quotedZH(api.Msg), rid))
		}
		return texts(fmt.Sprintf("%d %s%s", api.Code, known.Meaning.EN, rid), fmt.Sprintf("%d %s%s", api.Code, known.Meaning.ZH, rid))
	}
	own, isOwn := errors.AsType[*tokens.SaidError](err)
	switch {
	case errors.Is(err, tokens.ErrNoTicket):
		return texts("there is no ticket", "没有 component_verify_ticket")
	case errors.Is(err, tokens.ErrUnreachable) && isOwn:
		return texts(safeReason(err), "微信的应答不可用："+own.Text.ZH)
	case errors.Is(err, tokens.ErrUnreachable):
		return texts(safeReason(err), "未能连接微信："+causeOf(rootOf(err)).ZH)
	case isOwn:
		return texts(own.Error(), own.Text.ZH)
	case errors.Is(err, tokens.ErrNotAuthorized):
		return texts(safeReason(err), "该账号未授权第三方平台")
	case errors.Is(err, tokens.ErrStore):
		return texts("the store does not answer", "存储没有响应")
	case isTimeout(err):
		return texts("WeChat has not answered yet", "微信尚未应答")
	}
	reason := safeReason(err)
	return texts(reason, quotedZH(reason))
}
