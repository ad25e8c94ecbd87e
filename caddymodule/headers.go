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

// standsForTrusted reports whether a name is a trusted header's, or one that becomes the same to a backend: CGI, and what came of it
// (FastCGI, WSGI), makes one variable of names that differ in case and in what is no letter or digit.
func standsForTrusted(name string) bool {
	for _, trusted := range trustedHeaders {
		if len(name) == len(trusted) && isOneVariable(name, trusted) {
			return true
		}
	}
	return false
}

func isOneVariable(name, other string) bool {
	for i := range len(name) {
		if variableByte(name[i]) != variableByte(other[i]) {
			return false
		}
	}
	return true
}

func variableByte(c byte) byte {
	switch {
	case 'a' <= c && c <= 'z':
		return c - 'a' + 'A'
	case 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		return c
	}
	return '_'
}
