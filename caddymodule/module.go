// Package caddymodule holds the gateway's Caddy modules: the app behind the global option wechat, the handlers
// wechat_verify, wechat_event, wechat_message, wechat_api, wechat_oauth, wechat_authorize, wechat_jssdk, wechat_ready and wechat_console, the matcher wechat_message, the
// reverse_proxy transports wechat and wechat_lean, the on-demand TLS permission wechat, the stores, and what is on Caddy's admin endpoint. The documentation of each module is its type's comment.
package caddymodule

import (
	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
)

// All registration is here, in one init: the order of directives is the order of these lines.
func init() {
	caddy.RegisterModule(new(App))
	caddy.RegisterModule(new(CaddyStore))
	caddy.RegisterModule(new(RedisStore))
	caddy.RegisterModule(new(Verify))
	caddy.RegisterModule(new(Event))
	caddy.RegisterModule(new(Message))
	caddy.RegisterModule(new(MessageMatcher))
	caddy.RegisterModule(new(API))
	caddy.RegisterModule(new(Transport))
	caddy.RegisterModule(new(LeanTransport))
	caddy.RegisterModule(new(OAuth))
	caddy.RegisterModule(new(Authorize))
	caddy.RegisterModule(new(JSSDK))
	caddy.RegisterModule(new(Ready))
	caddy.RegisterModule(new(Console))
	caddy.RegisterModule(new(Admin))
	caddy.RegisterModule(new(Permission))

	caddycmd.RegisterCommand(wechatCommand())

	httpcaddyfile.RegisterGlobalOption("wechat", parseApp)
	httpcaddyfile.RegisterDirective("wechat_verify", parseVerify)
	httpcaddyfile.RegisterHandlerDirective("wechat_event", parseEvent)
	httpcaddyfile.RegisterDirective("wechat_oauth", parseOAuth)
	httpcaddyfile.RegisterDirective("wechat_authorize", parseAuthorize)
	httpcaddyfile.RegisterDirective("wechat_jssdk", parseJSSDK)
	httpcaddyfile.RegisterHandlerDirective("wechat_ready", parseReady)
	httpcaddyfile.RegisterHandlerDirective("wechat_message", parseMessage)
	httpcaddyfile.RegisterHandlerDirective("wechat_api", parseAPI)
	httpcaddyfile.RegisterHandlerDirective("wechat_console", parseConsole)

	// Before redir: no login, rewrite, redirect or catch-all may hide what WeChat itself calls.
	for _, directive := range []string{"wechat_verify", "wechat_event", "wechat_oauth", "wechat_authorize", "wechat_jssdk", "wechat_ready"} {
		httpcaddyfile.RegisterDirectiveOrder(directive, httpcaddyfile.Before, "redir")
	}
	for _, directive := range []string{"wechat_message", "wechat_api", "wechat_console"} {
		httpcaddyfile.RegisterDirectiveOrder(directive, httpcaddyfile.Before, "handle")
	}
}
