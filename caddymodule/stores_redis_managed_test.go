package caddymodule

import (
	"errors"
	"fmt"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-wechat/caddy-wechat/tokens"
	"github.com/caddy-wechat/caddy-wechat/tokens/redisstore"
)

// TestRedisIsLoggedAsLoudAsItMatters: what nobody can mend is no warning, and what loses no record is no error.
func TestRedisIsLoggedAsLoudAsItMatters(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		err  error
		want zapcore.Level
		text string
	}{
		{nil, zap.InfoLevel, "Redis is reached again"},
		{redisstore.ErrUntold, zap.InfoLevel, "Redis does not tell how it is set up"},
		{redisstore.ErrForgets, zap.WarnLevel, "Redis is not set up to keep what it is given"},
		{redisstore.ErrSplitsReads, zap.WarnLevel, "Redis is read from replicas"},
		{redisstore.ErrEvicts, zap.ErrorLevel, "Redis is not set up to keep what it is given"},
		{redisstore.ErrTooOld, zap.ErrorLevel, "Redis refuses what nodes need of it"},
		{redisstore.ErrReplica, zap.ErrorLevel, "Redis refuses what nodes need of it"},
		{redisstore.ErrLosesNews, zap.ErrorLevel, "Redis does not pass on what other nodes change: each node looks at the accounts in use once a second instead"},
	} {
		core, logs := observer.New(zap.DebugLevel)
		err := tt.err
		if err != nil {
			err = fmt.Errorf("redis: %w", err)
		}
		logRedis(zap.New(core), err)
		if all := logs.All(); len(all) != 1 || all[0].Level != tt.want || all[0].Message != tt.text {
			t.Errorf("%v: %+v", tt.err, all)
		}
	}
}

// TestUnfitStoreIsRedWhereRecordsAreLost.
func TestUnfitStoreIsRedWhereRecordsAreLost(t *testing.T) {
	t.Parallel()
	unfit := func(kind error) error { return &tokens.SaidError{Kind: kind, Text: texts("it is so", "Redis 如此")} }
	forgets, evicts, splits := unfit(redisstore.ErrForgets), unfit(redisstore.ErrEvicts), unfit(redisstore.ErrSplitsReads)
	for _, tt := range []struct {
		err  error
		want Level
	}{
		{errors.Join(forgets), Yellow}, {errors.Join(forgets, splits), Yellow}, {errors.Join(evicts), Red},
		{errors.Join(forgets, unfit(redisstore.ErrTooOld)), Red}, {errors.Join(unfit(redisstore.ErrLosesNews)), Red},
	} {
		f := storeUnfit("redis", tt.err)
		if f.Level != tt.want {
			t.Errorf("%v: %v, want %v", tt.err, f.Level, tt.want)
		}
		speaksBoth(t, f.Code, f.Text)
		speaksBoth(t, f.Code, f.Remedy)
	}
}
