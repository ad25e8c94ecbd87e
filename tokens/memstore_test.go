package tokens_test

import (
	"testing"

	"github.com/caddy-wechat/caddy-wechat/tokens"
	"github.com/caddy-wechat/caddy-wechat/tokens/storetest"
)

func TestMemStoreConformance(t *testing.T) {
	t.Parallel()
	storetest.Run(t, func() tokens.Store { return tokens.NewMemStore() })
}
