package caddymodule

import (
	"context"
	"errors"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

func (a *App) sendLate(context.Context, tokens.Key, string, crypto.Format, []byte) error {
	return errors.New("not there yet")
}
