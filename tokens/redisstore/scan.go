package redisstore

import (
	"context"
	"path"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// Scan implements tokens.Scanner. It asks for the names in the folder, which are a few thousand of a million authorizers.
// Redis's own HSCAN would send the records too, before 7.4, and its cursors mean nothing to a server that was restarted,
// or to the replica that takes over.
func (s *Store) Scan(ctx context.Context, prefix, cursor string, n int) (names []string, next string, err error) {
	if names, err = s.List(ctx, path.Dir(prefix+"x")); err != nil {
		return nil, "", err
	}
	return tokens.PageOf(names, prefix, cursor, n)
}

var _ tokens.Scanner = (*Store)(nil)
