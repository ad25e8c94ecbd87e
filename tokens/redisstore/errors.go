package redisstore

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/redis/go-redis/v9"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// maxSaid bounds what is passed on of a server's message, in bytes.
const maxSaid = 200

// errNoMaster: Sentinels were reached, and none knows the name.
var errNoMaster = errors.New("no Sentinel that answers knows the name of the master: it is the one of \"sentinel monitor\" in their configuration")

// isNil tells that Redis has no such value from all else: what goes wrong before a command is sent may wrap redis.Nil, as a
// Sentinel's answer that it knows no such master.
func isNil(err error) bool { return err == redis.Nil } //nolint:errorlint // see above

const hintManaged = "docs/clustering.md has what to choose of a managed Redis"

// hints say what is to be done about what a server says, by what its message has in it. Of two the first counts.
var hints = []struct {
	said, hint string
	alone      bool // where there are neither Sentinels nor a Cluster
}{
	{said: "NOAUTH ", hint: "store redis needs a password"},
	{said: "Protocol error: unauthenticated", hint: "store redis needs a password"},
	{said: "NOPERM ", hint: "docs/clustering.md has what an access list must allow"},
	{said: "The user executing the script can't", hint: "docs/clustering.md has what an access list must allow"},
	{said: "ACL failure in script", hint: "docs/clustering.md has what an access list must allow"}, // since 7.2
	{said: "READONLY ", hint: "it is a replica: give the address of its master, or those of the Sentinels; a managed Redis says so for a moment while it fails over", alone: true},
	{said: "READONLY ", hint: "it is a replica, and was the master a moment ago, or is taken for it still"},
	{said: "MOVED ", hint: "it is a node of a Redis Cluster, for which store redis has the option cluster", alone: true},
	{said: "MOVED ", hint: "the nodes of the Cluster do not agree where this is: if that lasts, see redis-cli --cluster check"},
	{said: "TRYAGAIN ", hint: "the Cluster is moving this to another node: if that lasts, see redis-cli --cluster check"},
	{said: "cluster support disabled", hint: "it is no node of a Redis Cluster: leave out the option cluster"},
	{said: "unknown command 'sentinel'", hint: "it is no Sentinel: leave out the option sentinel, or give the addresses of the Sentinels"},
	{said: "Only HELLO messages are accepted by Sentinel", hint: "it is a Sentinel, for which store redis has the option sentinel"},
	// What services say that have a proxy before Redis, or forbid commands.
	{said: "wrong number of arguments for 'auth'", hint: "leave out username, and put it into password, as docs/clustering.md has it for a managed Redis"},
	{said: "bad lua script", hint: hintManaged},
	{said: "not allowed from script", hint: hintManaged},
	{said: "called from script", hint: hintManaged},
	{said: "called from Lua script", hint: hintManaged},
	{said: "not support for normal user", hint: hintManaged},
	{said: "unknown command", hint: "docs/clustering.md has the commands that must be allowed"},
}

// failure is the error of an operation: that of its context where that has ended.
func (s *Store) failure(ctx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, redis.ErrClosed):
		return fmt.Errorf("redis: %w", tokens.ErrClosed)
	case ctx.Err() != nil && !errors.Is(err, ctx.Err()):
		return fmt.Errorf("redis did not answer: %w (%w)", ctx.Err(), s.discreet(err))
	default:
		return fmt.Errorf("redis: %w", s.discreet(err))
	}
}

// discreet is an error of go-redis without what was sent or received, which may be a password or a token: a server quotes
// the arguments of a command that it does not know, and go-redis an answer that it cannot read.
func (s *Store) discreet(err error) error {
	text := err.Error()
	_, quotes := errors.AsType[*strconv.NumError](err)
	for _, part := range []string{"redis: can't parse", "redis: can't read", "redis: invalid reply"} {
		quotes = quotes || strings.Contains(text, part)
	}
	if quotes {
		return errors.New("the answer is none of Redis's, or not to what was asked")
	}
	if errors.Is(err, redis.Nil) && !isNil(err) {
		return errNoMaster
	}
	if _, said := errors.AsType[redis.Error](err); !said {
		return err
	}
	text, _, _ = strings.Cut(text, ", with args beginning with")
	text = strings.ToValidUTF8(text[:min(len(text), maxSaid)], string(utf8.RuneError))
	for _, h := range hints {
		if strings.Contains(text, h.said) && (s.alone || !h.alone) {
			return fmt.Errorf("%s (%s)", text, h.hint)
		}
	}
	return errors.New(text)
}
