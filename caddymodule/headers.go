package caddymodule

import "golang.org/x/net/http/httpguts"

// The headers by which the gateway tells a backend what it verified. A caller's own copies are removed first.
// They are in canonical form, so they can be used as map keys.
const (
	headerAppID    = "X-Wechat-Appid"
	headerPlatform = "X-Wechat-Platform"
	headerOpenID   = "X-Wechat-Openid"
	headerMsgType  = "X-Wechat-Msg-Type"
	headerEvent    = "X-Wechat-Event"
)

// trustedHeaders are all of them.
var trustedHeaders = [...]string{headerAppID, headerPlatform, headerOpenID, headerMsgType, headerEvent}

// isTrusted reports whether a value can stand in a trusted header. One that cannot is left out, and so is an empty one.
func isTrusted(value string) bool { return value != "" && httpguts.ValidHeaderFieldValue(value) }
