package kvstore

import (
	"context"
	"path"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// Scan implements tokens.Scanner. A KV only gives whole folders, so that a page costs a list of its folder.
func (s *Store) Scan(ctx context.Context, prefix, cursor string, n int) (names []string, next string, err error) {
	if names, err = s.List(ctx, path.Dir(prefix+"x")); err != nil {
		return nil, "", err
	}
	return tokens.PageOf(names, prefix, cursor, n)
}

var _ tokens.Scanner = (*Store)(nil)
