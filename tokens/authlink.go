package tokens

import (
	"context"
	"fmt"
	"net/url"
	"strconv"
	"strings"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// WeChat's pages on which an account's owner authorises a platform.
const (
	desktopOrigin   = "https://mp.weixin.qq.com"
	desktopLinkPath = "/cgi-bin/componentloginpage" // shows a QR code to scan with the owner's WeChat
	mobileOrigin    = "https://open.weixin.qq.com"
	mobileLinkPath  = "/wxaopen/safe/bindcomponent" // opens in WeChat itself

	pathPreAuthCode = "/cgi-bin/component/api_create_preauthcode"
)

// DefaultAuthType lets official accounts and mini programs authorise a platform.
const DefaultAuthType = 3

// AuthorizationLink is a link on which an account's owner authorises a platform.
type AuthorizationLink struct {
	Platform string
	// Redirect is where WeChat sends the owner afterwards, with auth_code and expires_in: an https URL on the platform's
	// authorization domain (授权发起页域名).
	Redirect string
	// Mobile makes a link to follow in WeChat on the phone, instead of one for a computer.
	Mobile bool
	// AuthType is which sorts of account may authorise, as WeChat numbers them. Default: DefaultAuthType.
	AuthType int
	// AppID is the only account that may authorise. Default: any.
	AppID string
	// Categories are the ids of the permission sets asked for. Default: those that the platform published.
	Categories []int
}

// AuthorizationLink makes a link with a fresh pre-authorization code: it works once, for half an hour. WeChat demands
// that it be followed from a page on the platform's authorization domain.
func (m *Manager) AuthorizationLink(ctx context.Context, l AuthorizationLink) (secret.String, error) {
	env, err := m.current()
	if err != nil {
		return secret.String{}, err
	}
	if err := env.knows(ComponentKey(l.Platform)); err != nil {
		return secret.String{}, err
	}
	code, err := m.preAuthCode(ctx, env, l.Platform)
	if err != nil {
		return secret.String{}, fmt.Errorf("authorization link: %w", err)
	}
	return secret.New(l.text(env.Pages, code)), nil
}

// text writes the link with its parameters in the order that WeChat documents. Pages is a simulator's origin, or empty.
func (l AuthorizationLink) text(pages string, code secret.String) string {
	origin, path := desktopOrigin, desktopLinkPath+"?"
	if l.Mobile {
		origin, path = mobileOrigin, mobileLinkPath+"?action=bindcomponent&no_scan=1&"
	}
	if pages != "" {
		origin = pages
	}
	authType := l.AuthType
	if authType == 0 {
		authType = DefaultAuthType
	}
	var b strings.Builder
	b.WriteString(origin + path + "component_appid=" + url.QueryEscape(l.Platform))
	b.WriteString("&pre_auth_code=" + url.QueryEscape(code.Reveal()))
	b.WriteString("&redirect_uri=" + url.QueryEscape(l.Redirect))
	b.WriteString("&auth_type=" + strconv.Itoa(authType))
	if l.AppID != "" {
		b.WriteString("&biz_appid=" + url.QueryEscape(l.AppID))
	}
	for i, id := range l.Categories {
		if i == 0 {
			b.WriteString("&category_id_list=")
		} else {
			b.WriteString("%7C")
		}
		b.WriteString(strconv.Itoa(id))
	}
	if l.Mobile {
		b.WriteString("#wechat_redirect")
	}
	return b.String()
}

func (m *Manager) preAuthCode(ctx context.Context, env *Environment, platform string) (secret.String, error) {
	body := struct {
		Platform string `json:"component_appid"`
	}{platform}
	var answer struct {
		Code string `json:"pre_auth_code"`
	}
	if err := m.componentCall(ctx, env, platform, pathPreAuthCode, body, &answer); err != nil {
		return secret.String{}, err
	}
	if answer.Code == "" {
		return secret.String{}, fmt.Errorf("%s: %w: the answer has no code", pathPreAuthCode, ErrUnreachable)
	}
	return secret.New(answer.Code), nil
}
