package caddymodule

import (
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
)

// TestMain fails if a goroutine of ours is left. What Caddy's own packages leave behind is known and let be; each ends
// by itself, or with a context that Caddy cancels but caddy.ProvisionContext, which the tests use, gives no way to.
func TestMain(m *testing.M) {
	if command := os.Getenv(testCommand); command != "" {
		os.Exit(runTestCommand(command))
	}
	const proxy = "github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy."
	goleak.VerifyTestMain(redistest.Tests{M: m, End: closeRedis},
		goleak.IgnoreAnyFunction("github.com/caddyserver/certmagic.keepLockfileFresh"), // sleeps for 5 s before it sees that the lock is gone
		goleak.IgnoreAnyFunction(proxy+"(*metricsUpstreamsHealthyUpdater).init.func1"), // until the context ends
		goleak.IgnoreAnyFunction(proxy+"(*Handler).countFailure.func1"),                // until the context ends, or the failure is forgotten
		goleak.IgnoreAnyFunction("github.com/DeRuina/timberjack.(*Logger).millRun"),    // of a log file that was closed
	)
}

// closeRedis closes the connections that belong to a context as well. Until then a lock whose server has gone is released again and again.
func closeRedis() {
	redisPool.Range(func(_, store any) bool {
		store.(pooledRedis).Close()
		return true
	})
}
