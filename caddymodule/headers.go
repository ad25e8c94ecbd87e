package caddymodule

import (
	"net/http"

	"golang.org/x/net/http/httpguts"
)

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

// setTrusted sets a trusted header unless the value is empty or cannot stand in a header.
func setTrusted(h http.Header, name, value string) {
	if value != "" && httpguts.ValidHeaderFieldValue(value) {
		h[name] = []string{value}
	}
}
