// Package caddywechat puts the WeChat gateway's modules into a Caddy build:
//
//	xcaddy build --with github.com/caddy-wechat/caddy-wechat
//
// It only imports package caddymodule, which registers them.
package caddywechat

import _ "github.com/caddy-wechat/caddy-wechat/caddymodule"
