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

// failure is the error of an operation: that of its context where that has ended.
func failure(ctx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, redis.ErrClosed):
		return fmt.Errorf("redis: %w", tokens.ErrClosed)
	case ctx.Err() != nil && !errors.Is(err, ctx.Err()):
		return fmt.Errorf("redis did not answer: %w (%w)", ctx.Err(), discreet(err))
	default:
		return fmt.Errorf("redis: %w", discreet(err))
	}
}

// discreet is an error of go-redis without what was sent or received, which may be a password or a token: a server quotes
// the arguments of a command that it does not know, and go-redis an answer that it cannot read.
func discreet(err error) error {
	text := err.Error()
	_, quotes := errors.AsType[*strconv.NumError](err)
	for _, part := range []string{"redis: can't parse", "redis: can't read", "redis: invalid reply"} {
		quotes = quotes || strings.Contains(text, part)
	}
	if quotes {
		return errors.New("the answer is none of Redis's, or not to what was asked")
	}
	if _, said := errors.AsType[redis.Error](err); !said || errors.Is(err, redis.Nil) {
		return err
	}
	text, _, _ = strings.Cut(text, ", with args beginning with")
	return errors.New(strings.ToValidUTF8(text[:min(len(text), maxSaid)], string(utf8.RuneError)))
}
