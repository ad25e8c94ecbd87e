package redistest

import (
	"errors"
	"testing"

	"github.com/redis/go-redis/v9"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(Tests{M: m}) }

// TestProbesAreAwaited says, too, if go-redis calls its probe by another name.
func TestProbesAreAwaited(t *testing.T) {
	client := redis.NewClient(&redis.Options{Addr: FreeAddr(t), PoolSize: 1, MaxRetries: -1})
	Eventually(t, "the pool looks for its server", func() error {
		client.Ping(t.Context())
		if !probing() {
			return errors.New("nothing does")
		}
		return nil
	})
	if err := client.Close(); err != nil {
		t.Fatal(err)
	}
	awaitProbes()
	goleak.VerifyNone(t)
}
